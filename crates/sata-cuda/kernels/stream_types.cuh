// What the kernels that walk over sequences are given, as Rust has it.
#pragma once
#include "prelude.cuh"

// One sequence of a call.
struct Sequence {
    i64 q_batch, q_first, k_batch, k_first, work, row;
    i32 tokens, unused;
};
// A segment: chunks first ... end-1 of a sequence; the slots of what it is summed to and what precedes it, or -1.
struct Segment {
    i32 sequence, first, end, sum, before;
};
struct Tally {
    u64 non_positive, non_finite, first;
};
struct Stream {
    View q, k, v, y;
    const f64* g;               // [kv_heads][works], where weights decay
    const Sequence* sequences;
    const Segment* segments;
    f32* sums;                  // [slots][heads][TILES * 16][NP]
    const f32* coefficients;    // [TILES * 16]
    f32* partial;               // [heads * group][rows][NP]: numerators and denominators
    Tally* tally;
    i64 works, rows, most_queries;
    i32 segment_count, kv_heads, group, block, near;
    i32 first_head, heads;      // key/value heads of the launch
    f32 exp2_scale;
    f32 a[8];                   // a_p scale^p
};
SAME_SIZE(Stream, STREAM_BYTES);
