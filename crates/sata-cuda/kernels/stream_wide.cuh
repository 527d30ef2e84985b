// Heads of 32, orders up to 2, on Hopper: one pass over a sequence, whose sums stay in registers.
//
// A block of threads owns the sums of one key/value head over a segment of one sequence, and walks over its chunks of 128
// tokens. A warpgroup holds all sums in the accumulators of `wgmma`, rows features, columns a value, a one and zeros (NP).
// Before it adds a chunk's keys it rounds sums times coefficients to bf16 into shared memory, where the two warpgroups that
// read find them, which meanwhile are at the chunk before. The fourth warpgroup copies: keys and values since the frontier in
// pieces of 64, queries, and for sums the same keys transposed. All meet at barriers in shared memory.
//
// Compile-time constants (-D):
//   D_VALUE  a multiple of 8, 32 at most;  TERMS P
//   HAS_G    whether weights decay;  HAS_NEAR whether some are exact
//   UNIT_BYTES, SUM_BYTES  shared memory of stream_wide_read, of a unit of stream_wide_sums
//
// Features come in orbits: the 32 monomials that are shifts x[s] x[s+a] of one another, s = 0 ... 31, indices modulo 32. Tile
// j = 0 ... 7 of 64 features has the orbits a = j and a = j + 8; tile 8 x[s] x[s+16] for s < 16, then x, and a one 16 times.
// Warp w of a warpgroup holds rows 16w ... 16w+15, which are the columns of step w when queries read. A lane that keeps
// elements rotated by its own row or column makes its monomials of all tiles by the same code, one packed product each. What
// comes twice or is not wanted has coefficient 0.
#pragma once
#include "stream_hopper.cuh"

constexpr int D = 32;
constexpr int NT = D_VALUE / 8 + 1, NP = 8 * NT, NA = NP / 2;  // tiles of 8 columns, columns, accumulators per 64 rows
constexpr int NV = NT - 1;
constexpr int WIDE_TILES = 9, FEATURES = 64 * WIDE_TILES, TILES = FEATURES / 16;
// Matrix instructions of a group; two groups are on their way at once, and what they read takes registers.
constexpr int SUM_GROUP = 1, READ_GROUP = 2;
// Planes of 16 bytes a row: [D / 8][64 tokens] of keys, [NT][64 tokens] of values and ones, [NT][FEATURES] of sums. Those that
// rows are copied to lie so that the parts of a row are in different banks.
constexpr int PLANE = PIECE * 16 + 32, SUM_PLANE = FEATURES * 16, QUERY_PLANE = CHUNK * 16 + 32;
constexpr int KEY_BYTES = 4 * PLANE, VALUE_BYTES = NT * PLANE;

// A piece for readers: keys, values; with decay g f64, fall = log2(e) (g at its last token - g) f32, 2^fall f32.
constexpr int PIECE_STAGES = 4;
// g becomes two f32 that add up to it, in place.
constexpr int PIECE_G = KEY_BYTES + VALUE_BYTES, PIECE_FALL = PIECE_G + PIECE * 8;
constexpr int PIECE_BYTES = PIECE_G + (HAS_G ? PIECE * 16 : 0);
// Queries: the first plane comes once more after the last, since elements are taken modulo 32; with decay g, and g at
// the frontier and where the past of the second half begins to be far.
constexpr int QUERY_STAGES = 2;
constexpr int QUERY_G = 5 * QUERY_PLANE, QUERY_BYTES = QUERY_G + (HAS_G ? CHUNK * 8 + 16 : 0);
// A piece for sums: per 16 tokens elements 0 ... 31, 0 ... 31 and weights, 32 bytes each: what four lanes need, tokens
// 2t, 2t+1 | 2t+8, 2t+9; keys and ones; values; with decay what is left of the sums before, and g f64.
constexpr int SLAB = 65 * 32, SUM_KEYS = 4 * SLAB, SUM_VALUES = SUM_KEYS + KEY_BYTES + PLANE, SUM_FADE = SUM_VALUES + NV * PLANE;
constexpr int SUM_G = SUM_FADE + 128, SUM_STAGE = SUM_G + (HAS_G ? PIECE * 8 : 0);
static_assert(SUM_KEYS % 16 == 0 && SUM_VALUES % 16 == 0 && SUM_STAGE % 16 == 0, "core matrices are aligned");

// Shared memory of the stages of a unit's sums; then stream_wide_read's.
constexpr int SUM_BARS = SUM_STAGES * SUM_STAGE, SUM_SHARED = (SUM_BARS + 2 * SUM_STAGES * 8 + 127) / 128 * 128;

using SumRing = Ring<SUM_STAGES, SUM_BARS, 32>;

// COUNT rows of 8 * PARTS bf16 into planes, the first of them the one before `left` others; those after are 0. One warp.
template <int PARTS, int COUNT, bool AGAIN = false>
DEV void copy_rows(u8* to, int plane, const bf16* from, i64 stride, int left) {
    const int token = int(threadIdx.x) % 32 / 4, part = int(threadIdx.x) % 4;
    if (PARTS < 4 && part >= PARTS) return;
    u8* const own = to + part * plane + token * 16;
    from += token * stride + part * 8;
    left -= token;
#pragma unroll 4
    for (int i = 0; i < COUNT; i += 8, from += 8 * stride) {
        copy_async<16>(own + i * 16, from, i < left ? 16 : 0);
        // The first plane once more after the last.
        if (AGAIN && part == 0) copy_async<16>(own + i * 16 + 4 * plane, from, i < left ? 16 : 0);
    }
}
template <int COUNT>
DEV void copy_g(u8* to, const f64* g, int first, int end) {
    const int lane = lane_here();
#pragma unroll
    for (int i = 0; i < COUNT; i += 32) copy_async<8>(to + (lane + i) * 8, g + min(first + lane + i, end - 1), 8);
}
// In place, one warp.
template <int COUNT>
DEV void halve_g(u8* at) {
    for (int i = lane_here(); i < COUNT; i += 32)
        *reinterpret_cast<float2*>(at + 8 * i) = halves(*reinterpret_cast<const f64*>(at + 8 * i));
}
// A plane of ones beside the others of a stage, which no copy writes. One warp.
DEV void write_ones(u8* plane) {
    for (int i = int(threadIdx.x) % 32; i < PIECE; i += 32) *reinterpret_cast<uint4*>(plane + i * 16) = make_uint4(0x3f80u, 0, 0, 0);
}

// Copies every second piece of begin ... end-1 for sums, by one of two warps. With decay range(first, from, to) says to which
// token a piece is weighed, and from where sums before it fade: `from` is -1 where there are none.
template <class Range>
DEV void copy_for_sums(const Stream& p, const Walk& w, u8* at, int which, int begin, int end, Range range) {
    const int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
    SumRing ring{smem(at), 1};
    if (which == 1) ring.next();
#pragma unroll 1
    for (int first = begin + which * PIECE; first < end; first += 2 * PIECE) {
        ring.wait_empty();
        u8* const stage = at + ring.stage() * SUM_STAGE;
        copy_rows<4, PIECE>(stage + SUM_KEYS, PLANE, w.keys(p, first), p.k.token, end - first);
        copy_rows<NV, PIECE>(stage + SUM_VALUES, PLANE, w.values(p, first), p.v.token, end - first);
        // With decay g where it is counted to and from, beside 2^(the difference).
        f64* const ends = reinterpret_cast<f64*>(stage + SUM_FADE + 16);
        if constexpr (HAS_G) {
            copy_g<PIECE>(stage + SUM_G, w.g, first, end);
            int from, to;
            range(first, from, to);
            if (lane < 2) copy_async<8>(ends + lane, w.g + max((lane == 0 ? to : from) - 1, 0), lane == 0 || from > 0 ? 8 : 0);
        }
        copy_async_commit();
        copy_async_wait<0>();
        __syncwarp();
        // Word [16 tokens][element][t][2].
#pragma unroll
        for (int tile = 0; tile < 4; tile++) {
            u8* const to = stage + tile * SLAB + g * 32 + t * 8;
#pragma unroll
            for (int e = 0; e < 4; e += 2) {
                u32 r[4];
                load_matrices<4, true>(r, stage + SUM_KEYS + (e + lane / 16) * PLANE + (tile * 16 + lane % 16) * 16);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    *reinterpret_cast<uint2*>(to + i * 1024 + e * 256) = make_uint2(r[0], r[1]);
                    *reinterpret_cast<uint2*>(to + i * 1024 + (e + 1) * 256) = make_uint2(r[2], r[3]);
                }
            }
        }
        if constexpr (HAS_G) {
            const f64 to_g = ends[0];
            const f64* own = reinterpret_cast<const f64*>(stage + SUM_G);
#pragma unroll
            for (int i = lane; i < PIECE; i += 32) {
                const int place = i / 16 * SLAB + 64 * 32 + i % 8 / 2 * 8 + i % 16 / 8 * 4 + i % 2 * 2;
                *reinterpret_cast<u16*>(stage + place) = bf16_bits(exp2_fast(f32(to_g - own[i]) * LOG2E));
            }
            if (lane == 0) *reinterpret_cast<f32*>(stage + SUM_FADE) = exp2_fast(f32(to_g - ends[1]) * LOG2E);
        }
        proxy_fence();
        ring.filled();
        ring.next();
    }
}

// The sums of a warpgroup: of values, by tiles; and of ones, which are the sums of x_i x_j, x_i and 1: rows 0 ... 31 are i, the
// others 1, columns 0 ... 31 are j, and 1.
struct Sums {
    f32 v[WIDE_TILES][4 * NV];
    f32 z[20];
};
DEV uint2 load2(const u8* at) { return *reinterpret_cast<const uint2*>(at); }
DEV uint2 mul(uint2 a, uint2 b) { return make_uint2(mul2(a.x, b.x), mul2(a.y, b.y)); }
// The bits of a where those of the mask are set, else of b.
DEV uint2 blend(u32 mask, uint2 a, uint2 b) { return make_uint2((a.x & mask) | (b.x & ~mask), (a.y & mask) | (b.y & ~mask)); }
// Second factors of one tile and 16 tokens: rows g, and g + 8.
struct Factors {
    uint2 low, high;
};
DEV Factors load_factors(const u8* at) { return {load2(at), load2(at + 256)}; }

// Adds features times values of a piece; what matrix instructions read may be overwritten afterwards.
DEV void absorb(Sums& sums, const u8* stage, u32 address) {
    const int warp = int(threadIdx.x) / 32 % 4, lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
    const u8* const lanes = stage + t * 8;
    const u8* const own = lanes + (warp % 2 * 16 + g) * 32;
    const u8* const others = own + warp / 2 * 256;
    // Of the last tile the second factors, or the only ones.
    const u8* const last = lanes + (warp == 1 ? g : 16 + g) * 32;
    // No branch goes around a matrix instruction, which would serialise them.
    const u32 is_square = warp == 0 ? ~0u : 0u, is_element = warp < 2 ? ~0u : 0u, is_one = warp == 3 ? ~0u : 0u;
    const uint2 ones = make_uint2(BF16_ONES, BF16_ONES);
    const Descriptor<128, PLANE> rows(address);
    auto factors = [&](int tile, int j) { return load_factors((j < 8 ? others + j * 32 : last) + tile * SLAB); };
    // What is multiplied next is loaded before this is waited for.
    uint2 next_low = load2(own), next_high = load2(own + 256), next_weights = ones;
    if constexpr (HAS_G) next_weights = load2(lanes + 64 * 32);
    Factors next[SUM_GROUP];
#pragma unroll
    for (int i = 0; i < SUM_GROUP; i++) next[i] = factors(0, i);
#pragma unroll
    for (int tile = 0; tile < 4; tile++) {
        uint2 low = next_low, high = next_high;
        const uint2 weights = next_weights;
        if constexpr (HAS_G) low = mul(low, weights), high = mul(high, weights);
        const uint2 u = blend(is_element, low, weights), v = blend(is_element, high, weights);
#pragma unroll
        for (int j = 0; j < WIDE_TILES; j += SUM_GROUP) {
            Factors a[SUM_GROUP];
#pragma unroll
            for (int i = 0; i < SUM_GROUP; i++) {
                if (j + i < 8) {
                    a[i] = {mul(low, next[i].low), mul(high, next[i].high)};
                } else if (j + i == 8) {
                    a[i] = {mul(blend(is_square, low, weights), blend(is_one, ones, next[i].low)),
                            mul(blend(is_square, high, weights), blend(is_one, ones, next[i].high))};
                }
            }
            const bool ends = j + SUM_GROUP >= WIDE_TILES;
            if (!ends || tile < 3) {
#pragma unroll
                for (int i = 0; i < SUM_GROUP; i++)
                    if (ends || j + SUM_GROUP + i < WIDE_TILES) next[i] = ends ? factors(tile + 1, i) : factors(tile, j + SUM_GROUP + i);
                if (ends) {
                    next_low = load2(own + (tile + 1) * SLAB), next_high = load2(own + (tile + 1) * SLAB + 256);
                    if constexpr (HAS_G) next_weights = load2(lanes + (tile + 1) * SLAB + 64 * 32);
                }
            }
            mma_fence();
#pragma unroll
            for (int i = 0; i < SUM_GROUP; i++)
                if (j + i < WIDE_TILES) Mma<8 * NV>::run<1>(sums.v[j + i], a[i].low.x, a[i].high.x, a[i].low.y, a[i].high.y, rows.at(SUM_VALUES + tile * 256));
            if (j == 0) Mma<40>::run<1>(sums.z, u.x, v.x, u.y, v.y, rows.at(SUM_KEYS + tile * 256));
            mma_commit();
            mma_wait<1>();
        }
    }
    mma_wait<0>();
#pragma unroll
    for (int j = 0; j < WIDE_TILES; j++) mma_touch(sums.v[j]);
    mma_touch(sums.z);
}
// Calls f for each accumulator.
template <class F>
DEV void each_accumulator(Sums& sums, F f) {
#pragma unroll
    for (int j = 0; j < WIDE_TILES; j++)
#pragma unroll
        for (int i = 0; i < 4 * NV; i++) f(sums.v[j][i]);
#pragma unroll
    for (int i = 0; i < 20; i++) f(sums.z[i]);
}
DEV void clear(Sums& sums) {
    each_accumulator(sums, [](f32& x) { x = 0.0f; });
}
DEV void scale(Sums& sums, f32 by) {
    each_accumulator(sums, [=](f32& x) { x *= by; });
}
// Calls one(feature, sum of ones) for what a lane has.
template <class F>
DEV void each_one(Sums& sums, F one) {
    const int warp = int(threadIdx.x) / 32 % 4, lane = int(threadIdx.x) % 32, t = lane % 4;
    const int i = warp * 16 + lane / 4;
    if (warp < 2) {
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const int own = i + k / 2 * 8, apart = (8 * n + 2 * t + k % 2 - own) & 31;
                if (apart < 16) one(apart % 8 * 64 + apart / 8 * 32 + own, sums.z[4 * n + k]);
                else if (apart == 16 && own < 16) one(512 + own, sums.z[4 * n + k]);
            }
        if (t == 0) one(528 + i, sums.z[16]), one(536 + i, sums.z[18]);
    } else if (warp == 2 && lane == 0) {
        one(560, sums.z[16]);
    }
}
// Calls pair(feature, column, two neighbouring sums of values).
template <class F>
DEV void each_pair(Sums& sums, F pair) {
    const int warp = int(threadIdx.x) / 32 % 4, lane = int(threadIdx.x) % 32;
    const int feature = warp * 16 + lane / 4, column = lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < WIDE_TILES; j++)
#pragma unroll
        for (int n = 0; n < NV; n++)
#pragma unroll
            for (int h = 0; h < 2; h++) pair(64 * j + feature + 8 * h, 8 * n + column, sums.v[j][4 * n + 2 * h], sums.v[j][4 * n + 2 * h + 1]);
}
