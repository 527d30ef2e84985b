// What the generic kernels share: tables of a call's sequences, chunks and pieces, and where its tokens are.
//
// The tokens of a sequence that a call looks at are its *window*: those that waited in the state's open blocks, then
// the call's own. A window is counted from 0, and begins where a block does. Work arrays hold the windows of all
// sequences side by side, `works` tokens per key/value head.
#pragma once
#include "prelude.cuh"

// One sequence of a call.
struct Sequence {
    i64 q_batch, q_first, queries;  // its queries in q and y
    i64 k_batch, k_first;           // the call's own tokens in k, v, gates and mask
    i64 open;                       // tokens of the window that waited in the state
    i64 tokens;                     // of the window
    i64 folded;                     // of the sequence before the window
    i64 work;                       // the window's first token in work arrays
    i64 row;                        // its first query among the rows of all sequences
    i64 piece, pieces;              // its first piece, and how many
    i64 committed;                  // how many of them the state's sums are of after the call
    i64 sink, sinks;                // its first sink in work arrays, and how many it has after the call
    i64 ring;                       // the window's first token among the state's open ones, which are a ring
    i64 settled;                    // tokens of the window that are folded after the call, where a state is kept
};

// Some queries of one sequence that read the same far sums, and weigh tokens from `window` on one by one.
struct Chunk {
    i32 sequence;
    i32 prefix;  // which far sums: 0 the state's, j > 0 those with the sequence's pieces 0 ... j-1; -1 none
    i64 first;   // its first query, counted in the call
    i64 count;   // over all query heads of a key/value head less than 2^31
    i64 window;
};

// Tokens of one sequence that are summed together.
struct Piece {
    i32 sequence, index;
    i64 first, count;
};

// What a head's far sums are relative to: `mark.rs` of the CPU engine.
struct Mark {
    u64 count;  // tokens summed
    f64 lag;    // g at the last token folded less g at the last token summed
    f64 total;  // g at the last token folded less g at the sequence's start
};
// Of all slots, or null where there was nothing before the call.
struct Marks {
    Mark* all;
    DEVICE bool any(i64 slot) const { return all && all[slot].count > 0; }
    // g at the last token summed, counted from the window's start.
    DEVICE f64 summed(i64 slot) const { return all ? -all[slot].lag : 0.0; }
};

// A state's far sums: f32, or bf16; beside them, or null, what rounding took: f32, or the lower halves of the bits of
// f32s of which the bf16s are the nearest.
struct StateSums {
    void* sums;  // [slots][features][d_value]
    void* low;
    f32* z;      // [slots][features]
    f32* z_low;
    i32 is_bf16, padding;
    DEVICE f32 sum(i64 i) const {
        if (!is_bf16) return static_cast<const f32*>(sums)[i];
        const u32 high = u32(static_cast<const bf16*>(sums)[i].bits) << 16;
        const i32 rest = low ? i32(static_cast<const i16*>(low)[i]) : 0;
        return __uint_as_float(high + u32(rest));
    }
    DEVICE f64 exact_sum(i64 i) const {
        return f64(sum(i)) + (!is_bf16 && low ? f64(static_cast<const f32*>(low)[i]) : 0.0);
    }
    DEVICE f64 exact_z(i64 i) const { return f64(z[i]) + (z_low ? f64(z_low[i]) : 0.0); }
    // Where no half is kept, bf16 is rounded up or down by `chance`, so that many small additions are not lost.
    DEVICE void set_sum(i64 i, f32 x, u32 chance) const {
        if (!is_bf16) {
            static_cast<f32*>(sums)[i] = x;
            return;
        }
        const u32 bits = __float_as_uint(x), carry = low ? 0x8000u : chance & 0xffffu;
        const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
        const u16 high = u16(finite ? (bits + carry) >> 16 : bits >> 16 | ((bits & 0x7fffffu) != 0));
        static_cast<bf16*>(sums)[i].bits = high;
        if (low) static_cast<u16*>(low)[i] = u16(bits);
    }
};
// A number that looks random.
DEVICE u32 scrambled(u32 x) {
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
}

// e^log of what is summed, or 0 where that is nothing beside 1.
DEVICE f32 faded(f64 log) { return log < -60.0 ? 0.0f : expf(f32(log)); }

// A number as the sum of two, so that differences of large ones keep their digits.
DEVICE float2 split(f64 g) {
    f32 high = f32(g);
    return make_float2(high, f32(g - f64(high)));
}
DEVICE f32 difference(float2 a, float2 b) { return (a.x - b.x) + (a.y - b.y); }

// Where token `t` of a window is in a view of keys or values: the call's own tensor, or, once open tokens and new ones
// have been gathered, a work array.
template <class E>
DEVICE const E* token(const View& x, const Sequence& s, bool gathered, i64 head, i64 t) {
    return gathered ? row<E>(x, 0, head, s.work + t) : row<E>(x, s.k_batch, head, s.k_first + t);
}

// ---- Tiles of products with sums ------------------------------------------------------------------------------
// A block of THREADS threads has ROW_THREADS x COLUMN_THREADS of them at work, each on TM rows (features, or queries)
// and TN columns (of values): COLUMNS in all, so that COLUMN_TILES blocks have all. All but D_VALUE are the host's
// choice: TN and COLUMNS are multiples of 4, ROW_THREADS * TM too.
#if defined(TM)
constexpr int THREADS = 128;
constexpr int COLUMN_THREADS = COLUMNS / TN;
constexpr int ROW_THREADS = THREADS / COLUMN_THREADS / 4 * 4;
constexpr int ROWS = ROW_THREADS * TM;
static_assert(COLUMN_THREADS * TN == COLUMNS && COLUMN_THREADS <= 32 && ROWS > 0, "threads share the columns evenly");

// N neighbouring floats from shared memory, aligned to as many, at most 4.
template <int N>
DEVICE void load(f32 (&to)[N], const f32* from) {
    if constexpr (N % 4 == 0) {
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            float4 x = load4(from + i);
            to[i] = x.x, to[i + 1] = x.y, to[i + 2] = x.z, to[i + 3] = x.w;
        }
    } else if constexpr (N % 2 == 0) {
#pragma unroll
        for (int i = 0; i < N; i += 2) {
            float2 x = *reinterpret_cast<const float2*>(from + i);
            to[i] = x.x, to[i + 1] = x.y;
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) to[i] = from[i];
    }
}
#endif
