// Sizes, parameters and small pieces that the parts of decode.cu share. See there for what is what.
#pragma once
#include "prelude.cuh"

typedef NUMBER E;

// SUMS: how far sums lie in memory. Next to either there may be what rounding takes from them: the lower half of
// the bits beside bf16, so that both are an f32, or a second f32 beside the first.
#define SUMS_F32 0
#define SUMS_BF16 1
#if SUMS == SUMS_BF16
typedef bf16 Sum;
typedef u16 SumLow;
#else
typedef f32 Sum;
typedef f32 SumLow;
#endif

// SERIES: a rule of series.cuh; those other than RULE_FIXED (0) make coefficients for each query.
#define PER_QUERY (SERIES != 0)
#define FADES_SLOPES 1
#define FADES_GATES 2
#define NEAR_NONE (-1)

constexpr int G = PASS;                              // queries that one pass over the sums answers
constexpr int HEADS = (GROUP + PASS - 1) / PASS * PASS;
constexpr int PASSES = HEADS / PASS;
constexpr int PLANES = PER_QUERY ? ORDER_COUNT : 1;  // numerators and denominators of a query
constexpr int ROW = D_VALUE + 1;                     // its numerators, then its denominator
constexpr f32 LOWEST = -3.402823466e+38f;

// How the lanes of a warp lie over rows of d_value elements: each loads VEC of them at once.
#if SUMS == SUMS_BF16
constexpr int VEC = D_VALUE % 8 == 0 ? 8 : D_VALUE % 4 == 0 ? 4 : D_VALUE % 2 == 0 ? 2 : 1;
#else
constexpr int VEC = D_VALUE % 4 == 0 ? 4 : D_VALUE % 2 == 0 ? 2 : 1;
#endif
constexpr int COLUMNS = D_VALUE / VEC;
constexpr int ACROSS = COLUMNS < 32 ? COLUMNS : 32;         // lanes along a row
constexpr int AT_ONCE = 32 / ACROSS;                        // rows that a warp loads at once
constexpr int STRETCHES = (COLUMNS + ACROSS - 1) / ACROSS;  // loads along a row

// A tile: rows whose features a warp makes at once, LANE_ROWS per lane.
constexpr int TILE = 32 * LANE_ROWS;
constexpr int TILE_LOADS = (TILE + AT_ONCE - 1) / AT_ONCE;
constexpr int BATCH = TILE_LOADS < IN_FLIGHT ? TILE_LOADS : IN_FLIGHT;
constexpr int TOKEN_LOADS = (32 + AT_ONCE - 1) / AT_ONCE;

__host__ __device__ constexpr int largest(int a, int b) { return a > b ? a : b; }

// Indices of a feature's factors, packed. Index D_KEY stands for 1.
__host__ __device__ constexpr int bits_for(int count) {
    int bits = 1;
    while ((1 << bits) < count) ++bits;
    return bits;
}
constexpr int INDEX_BITS = bits_for(D_KEY + 1);
constexpr int PER_WORD = 32 / INDEX_BITS;
constexpr int WORDS = (HIGHEST + PER_WORD - 1) / PER_WORD;

// Folding: tokens of a block that are brought to shared memory at once, and rows that a warp sums them for at once:
// FOLD_LANE_ROWS neighbouring ones a lane, so that their features are read 16 bytes at a time.
constexpr int FOLD_PITCH = FOLD_TOKENS + 4;  // of a channel's numbers: no two of eight neighbours meet in a bank
constexpr int FOLD_LANE_ROWS = AT_ONCE >= 8 ? 4 : 8;
constexpr int FOLD_ROWS = FOLD_LANE_ROWS * AT_ONCE;
constexpr int FOLD_FEATURES = (FOLD_ROWS + 31) / 32;  // features that a lane makes
constexpr int FOLD_GROUP = 2;  // rows that a lane loads at once to add to
constexpr int FOLD_STEP = 8;                          // tokens whose features are made at once
static_assert(FOLD_TOKENS % FOLD_STEP == 0, "whole steps");

// Shared memory of a team, in floats.
__host__ __device__ constexpr int round4(int floats) { return (floats + 3) / 4 * 4; }
constexpr int SHARED_QUERIES = (D_KEY + 1) * HEADS;
constexpr int SHARED_FAR = PLANES * HEADS * ROW;
constexpr int SHARED_PARTS = TEAM * G * largest(ROW, PLANES);
constexpr int SHARED_LEVELS = TEAM * G;
constexpr int SHARED_COEFFICIENTS = PER_QUERY ? G * TERMS : 0;
constexpr int SHARED_SCALES = (TEAM + 2) * G;
constexpr int SHARED_FOLD = round4((D_KEY + 1) * FOLD_PITCH) + round4(FOLD_TOKENS * D_VALUE) + FOLD_TOKENS;
constexpr int SHARED_WARP = largest(largest(TILE * G, 256), FOLD_STEP * FOLD_ROWS);
constexpr int TEAM_FLOATS = round4(SHARED_QUERIES) + round4(D_KEY) + round4(D_VALUE) + round4(SHARED_FAR) +
                            round4(SHARED_PARTS) + round4(SHARED_LEVELS) + round4(SHARED_COEFFICIENTS) +
                            round4(SHARED_SCALES) + 4 + SHARED_FOLD + TEAM * round4(SHARED_WARP);
static_assert(TEAM_FLOATS * (WARPS / TEAM) * 4 == SHARED_BYTES, "shared memory differs from what is asked for");
static_assert(TEAM == 1 || TEAM == WARPS, "a team is a warp or a block");

// What a head's far sums are relative to: `mark.rs` of the CPU engine.
struct Mark {
    u64 count;  // tokens summed
    f64 lag;    // g at the last token folded less g at the last token summed
    f64 total;  // g at the last token folded less g at the sequence's start
};

// Denominators that are not positive, that are not finite; the first of either: 2^64 - 1 less its place (entry · query
// heads + head), 0 for none; and queries answered, counted in many places, each in a sector of its own.
constexpr int COUNTERS = 32;
struct Tally {
    u64 non_positive, non_finite, first, padding;
    u64 queries[COUNTERS][4];
};

struct Decode {
    View q, k, v, y;
    // [entries][kv_heads] with FADES_GATES, [kv_heads] with FADES_SLOPES.
    const f32* log_gates;
    i64 gates_batch, gates_head;
    const f64* slopes;
    // [entries] sequences of the state, or null for 0, 1, 2 ...; one that there is not is passed over.
    const u32* slots;
    // The state, by sequence and head.
    Sum* sums;
    f32* z;
    SumLow* sums_low;
    f32* z_low;
    f32* open_keys;
    f32* open_values;
    f32* open_weights;
    f64* open_fading;
    f32* sink_keys;
    f32* sink_values;
    f32* sink_weights;
    f64* sink_fading;
    Mark* marks;
    f64* reaches;
    // By sequence.
    u64* positions;
    u32* open;
    // Tables of the basis: [FEATURES] first words of indices, each with its multiplier (an f32), then further words
    // [WORDS - 1][FEATURES]; and the series' coefficients [TERMS].
    const uint2* features;
    const u32* more_indices;
    const f32* coefficients;
    // Sums of parts [entries · kv_heads][split][PLANES][HEADS][ROW], and who has come: 0 between steps.
    f32* partial;
    u32* parts_done;
    u32* heads_done;
    Tally* tally;
    f64 relative_noise, absolute_noise;
    u32 entries, kv_heads, sequences, split;
    f32 scale, tau;
};
SAME_SIZE(Decode, DECODE_BYTES);

// Asks for the line of an address to come to the L2 cache.
#if defined(SATA_EMULATOR)
DEVICE void prefetch_line(const void*) {}
#else
DEVICE void prefetch_line(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
#endif

// VEC numbers that are loaded at once.
struct Vec {
    f32 x[VEC];
};
DEVICE Vec zeros() {
    Vec v;
#pragma unroll
    for (int i = 0; i < VEC; ++i) v.x[i] = 0.0f;
    return v;
}
DEVICE Vec load(const f32* p) {
    Vec v;
    if constexpr (VEC == 8) {
        float4 a = load4(p), b = load4(p + 4);
        v.x[0] = a.x, v.x[1] = a.y, v.x[2] = a.z, v.x[3] = a.w;
        v.x[4] = b.x, v.x[5] = b.y, v.x[6] = b.z, v.x[7] = b.w;
    } else if constexpr (VEC == 4) {
        float4 a = load4(p);
        v.x[0] = a.x, v.x[1] = a.y, v.x[2] = a.z, v.x[3] = a.w;
    } else if constexpr (VEC == 2) {
        float2 a = *reinterpret_cast<const float2*>(p);
        v.x[0] = a.x, v.x[1] = a.y;
    } else {
        v.x[0] = *p;
    }
    return v;
}
// The same of far sums, as they lie in memory until they are used: 16 bytes or fewer.
#if SUMS == SUMS_BF16
constexpr int RAW_WORDS = (VEC + 1) / 2;
#else
constexpr int RAW_WORDS = VEC;
#endif
struct Raw {
    u32 words[RAW_WORDS];
};
DEVICE Raw raw_zeros() {
    Raw r;
#pragma unroll
    for (int i = 0; i < RAW_WORDS; ++i) r.words[i] = 0;
    return r;
}
template <bool once>
DEVICE uint4 load16(const uint4* p) {
#if !defined(SATA_EMULATOR)
    if constexpr (once) {
        uint4 x;
        asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                     : "l"(p));
        return x;
    }
#endif
    return *p;
}
// `once`: nothing else will look at these lines soon, so the L1 cache need not keep them.
template <bool once = false>
DEVICE Raw load_raw(const Sum* p) {
    Raw r;
    if constexpr (RAW_WORDS == 4) {
        uint4 a = load16<once>(reinterpret_cast<const uint4*>(p));
        r.words[0] = a.x, r.words[1] = a.y, r.words[2] = a.z, r.words[3] = a.w;
    } else if constexpr (RAW_WORDS == 2) {
        uint2 a = *reinterpret_cast<const uint2*>(p);
        r.words[0] = a.x, r.words[1] = a.y;
    } else if constexpr (VEC * sizeof(Sum) == 4) {
        r.words[0] = *reinterpret_cast<const u32*>(p);
    } else {
        r.words[0] = *reinterpret_cast<const u16*>(p);
    }
    return r;
}
DEVICE void store_raw(Sum* p, const Raw& r) {
    if constexpr (RAW_WORDS == 4) {
        *reinterpret_cast<uint4*>(p) = make_uint4(r.words[0], r.words[1], r.words[2], r.words[3]);
    } else if constexpr (RAW_WORDS == 2) {
        *reinterpret_cast<uint2*>(p) = make_uint2(r.words[0], r.words[1]);
    } else if constexpr (VEC * sizeof(Sum) == 4) {
        *reinterpret_cast<u32*>(p) = r.words[0];
    } else {
        *reinterpret_cast<u16*>(p) = u16(r.words[0]);
    }
}
DEVICE f32 number(const Raw& r, int i) {
#if SUMS == SUMS_BF16
    return __uint_as_float(i % 2 == 0 ? r.words[i / 2] << 16 : r.words[i / 2] & 0xffff0000u);
#else
    return __uint_as_float(r.words[i]);
#endif
}
DEVICE void store(f32* p, const Vec& v) {
    if constexpr (VEC == 8) {
        store4(p, make_float4(v.x[0], v.x[1], v.x[2], v.x[3]));
        store4(p + 4, make_float4(v.x[4], v.x[5], v.x[6], v.x[7]));
    } else if constexpr (VEC == 4) {
        store4(p, make_float4(v.x[0], v.x[1], v.x[2], v.x[3]));
    } else if constexpr (VEC == 2) {
        *reinterpret_cast<float2*>(p) = make_float2(v.x[0], v.x[1]);
    } else {
        *p = v.x[0];
    }
}
