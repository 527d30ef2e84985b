// Heads of 16 with features of order 3, on Hopper: one pass over a sequence, whose sums stay in registers.
//
// A block of threads owns one key/value head over a segment of one sequence, and walks over its chunks of 128 tokens. SUMMING
// (2 or 4) warpgroups hold the sums in the accumulators of `wgmma`, 16 tiles of 64 features in all, rows features, columns a value,
// a one and zeros (NP). Each thread copies a part of what is needed next.
//
// Compile-time constants (-D):
//   D_VALUE  a multiple of 8;  TERMS P
//   HAS_G    whether weights decay;  HAS_NEAR whether some are exact, blocks being whole pieces
//   UNIT_BYTES  shared memory
//
// Features come in orbits x[s] x[s+a] x[s+b], s = 0 ... 15, indices modulo 16, which are a warp's 16 rows of a tile (of keys) or
// a step of 16 columns (of queries). The four of a tile have the same a, and b = 4m ... 4m+3: of all tiles third factors are the
// same four words, rotated. What comes twice or is not wanted has coefficient 0, and queries leave out orbits of nothing else.
#pragma once
#include "stream_hopper.cuh"

constexpr int D = 16;
constexpr int NT = D_VALUE / 8 + 1, NV = NT - 1, NP = 8 * NT, NA = NP / 2;  // accumulators of a thread per 64 rows
constexpr int WIDE_TILES = 16, OWN_TILES = WIDE_TILES / SUMMING, FEATURES = 64 * WIDE_TILES;
// Matrix instructions of a group; two groups are on their way at once.
constexpr int SUM_GROUP = 2;
constexpr int SUM_THREADS = 128 * SUMMING;

// The four orbits of a tile: of order 3 with a and b = 4m on; SECOND of order 2, x[s] x[s+4m] on; SPECIAL x[s] x[s+5] x[s+10], then
// x[s] x[s+8] for s < 8 and ones, then x[s], then x[s] x[s+3] x[s+7].
constexpr int SECOND = -1, SPECIAL = -2;
struct Tile {
    int a, m;
};
__host__ __device__ constexpr Tile tile_of(int tile) {
    constexpr Tile all[WIDE_TILES] = {{0, 0}, {0, 1}, {0, 2}, {SPECIAL, 0}, {0, 3}, {1, 1}, {1, 2}, {1, 3},
                                      {2, 1}, {2, 2}, {2, 3}, {SECOND, 0}, {3, 2}, {3, 3}, {4, 2}, {SECOND, 1}};
    return all[tile];
}
// Whether an orbit has been before.
__host__ __device__ constexpr bool is_again(int tile, int orbit) {
    const Tile x = tile_of(tile);
    return (x.a == 2 && x.m == 3 && orbit == 2) || (x.a == 3 && x.m == 3 && orbit >= 2);
}

// Planes of 16 bytes a row: [2][128 tokens] of keys, [NT][128 tokens] of values and ones.
constexpr int CHUNK_PLANE = CHUNK * 16 + 32;
// What is added to sums next, and after that: keys, values, ones; with decay g f64.
constexpr int SUM_VALUES = 2 * CHUNK_PLANE, SUM_G = SUM_VALUES + NT * CHUNK_PLANE, SUM_STAGE = SUM_G + (HAS_G ? CHUNK * 8 : 0);
// Its keys transposed, per 16 tokens elements 0 ... 15, 0 ... 15, then ones 16 times, then weights, 32 bytes each: what four lanes
// need, tokens 2t, 2t+1 | 2t+8, 2t+9.
constexpr int SLAB = 49 * 32, SLAB_ONES = 32 * 32, SLAB_WEIGHTS = 48 * 32;
constexpr int SLABS = 2 * SUM_STAGE, SUM_SHARED = SLABS + CHUNK / 16 * SLAB;
static_assert(SUM_STAGE % 16 == 0 && SLAB % 16 == 0, "core matrices are aligned");

// Where a unit's tensors begin, of the sequence's first token and the (first) head.
struct Bases {
    const bf16 *q, *k, *v;
    bf16* y;
};
DEV void find(Bases& bases, const Stream& p, const Walk& w) {
    bases.q = row<bf16>(p.q, w.sequence.q_batch, w.head * p.group, w.sequence.q_first);
    bases.y = row<bf16>(p.y, w.sequence.q_batch, w.head * p.group, w.sequence.q_first);
    bases.k = w.keys(p, 0), bases.v = w.values(p, 0);
}

// Rows `first` ... first + ROWS - 1 of DIM bf16 into planes or rows: those before the end; those after are 0. THREADS threads.
template <int DIM, int ROWS, int THREADS>
DEV void copy_rows(u8* to, int row_bytes, int part_bytes, const bf16* from, i64 stride, int first, int end, int thread) {
    constexpr int PARTS = DIM / 8;
    static_assert(ROWS * PARTS % THREADS == 0 || ROWS * PARTS < THREADS, "whole turns of all threads");
#pragma unroll
    for (int i = 0; i < ROWS * PARTS; i += THREADS) {
        const int row = (i + thread) / PARTS, part = (i + thread) % PARTS;
        if (ROWS * PARTS < THREADS && row >= ROWS) break;
        copy_async<16>(to + row * row_bytes + part * part_bytes, from + i64(min(first + row, end - 1)) * stride + part * 8, first + row < end ? 16 : 0);
    }
}

struct Sums {
    f32 v[OWN_TILES][NA];
};
DEV uint2 load2(const u8* at) { return *reinterpret_cast<const uint2*>(at); }
DEV uint2 mul(uint2 a, uint2 b) { return make_uint2(mul2(a.x, b.x), mul2(a.y, b.y)); }
// A factor for rows g and g + 8.
struct Factors {
    uint2 low, high;
};
DEV Factors load_factors(const u8* low, const u8* high) { return {load2(low), load2(high)}; }
DEV Factors mul(const Factors& a, const Factors& b) { return {mul(a.low, b.low), mul(a.high, b.high)}; }
DEV Factors mul(const Factors& a, uint2 b) { return {mul(a.low, b), mul(a.high, b)}; }

// Adds features times values of some slabs of 16 tokens, four at a time.
template <int WHICH>
DEV void absorb(Sums& sums, const u8* slabs, u32 values, int count) {
    const int warp = hopper::thread_here() / 32 % 4, lane = lane_here(), g = lane / 4, t = lane % 4;
    const u8* lanes = slabs + t * 8;
    const u8* own = lanes + g * 32;
    const int third = warp * 32;
    // Factors of the special tile, by rows of the slab; of the second orbit rows g + 8 are ones.
    const int up = warp == 1 ? 32 : 8, second = (warp == 0 ? 5 : warp == 1 ? 8 : warp == 2 ? 32 : 3), last = (warp == 0 ? 10 : warp == 3 ? 7 : 32);
#pragma unroll 1
    for (int from = 0; from < count; from += 4, values += 4 * 256, own += 4 * SLAB, lanes += 4 * SLAB) {
        const Descriptor<128, CHUNK_PLANE> b(values);
#pragma unroll
        for (int slab = 0; slab < 4; slab++) {
            const u8* const rows = own + slab * SLAB;
            const Factors x = load_factors(rows, rows + 8 * 32);
            Factors weighed = x;
            uint2 weights = make_uint2(BF16_ONES, BF16_ONES);
            if constexpr (HAS_G) weights = load2(lanes + slab * SLAB + SLAB_WEIGHTS), weighed = mul(x, weights);
            uint2 y[4];
#pragma unroll
            for (int m = 0; m < 4; m++) y[m] = load2(rows + third + m * 4 * 32);
            Factors pair = weighed;
#pragma unroll
            for (int j = 0; j < OWN_TILES; j += SUM_GROUP) {
                Factors a[SUM_GROUP];
#pragma unroll
                for (int i = 0; i < SUM_GROUP; i++) {
                    const Tile tile = tile_of(WHICH * OWN_TILES + j + i);
                    const bool is_new = j + i == 0 || tile.a != tile_of(WHICH * OWN_TILES + j + i - 1).a;
                    if (tile.a == SPECIAL) {
                        const u8* const f = rows + second * 32;
                        Factors first = load_factors(rows, rows + up * 32);
                        if constexpr (HAS_G) first = mul(first, weights);
                        a[i] = mul(mul(first, load_factors(f, f + up * 32)), load_factors(rows + last * 32, rows + last * 32 + 8 * 32));
                        continue;
                    }
                    if (is_new) {
                        if (tile.a == SECOND) pair = weighed;
                        else if (tile.a == 0) pair = mul(weighed, x);
                        else pair = mul(weighed, load_factors(rows + tile.a * 32, rows + (tile.a + 8) * 32));
                    }
                    a[i] = mul(pair, Factors{y[tile.m], y[(tile.m + 2) % 4]});
                }
                mma_fence();
#pragma unroll
                for (int i = 0; i < SUM_GROUP; i++)
                    Mma<NP>::template run<1>(sums.v[j + i], a[i].low.x, a[i].high.x, a[i].low.y, a[i].high.y, b.at(slab * 256));
                mma_commit();
                mma_wait<1>();
            }
        }
        mma_wait<0>();
#pragma unroll
        for (int j = 0; j < OWN_TILES; j++) mma_touch(sums.v[j]);
    }
}
template <class F>
DEV void each_accumulator(Sums& sums, F f) {
#pragma unroll
    for (int j = 0; j < OWN_TILES; j++)
#pragma unroll
        for (int i = 0; i < NA; i++) f(sums.v[j][i]);
}
// Calls pair(offset, two neighbouring sums of values) and one(offset, sum of ones) for what a lane has, in sums
// [FEATURES][NP].
template <int WHICH, class F, class G>
DEV void each_sum(Sums& sums, F pair, G one) {
    const int warp = int(threadIdx.x) / 32 % 4, lane = int(threadIdx.x) % 32, t = lane % 4;
    const int own = (WHICH * OWN_TILES * 64 + warp * 16 + lane / 4) * NP + 2 * t;
#pragma unroll
    for (int j = 0; j < OWN_TILES; j++)
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const int row = own + (64 * j + 8 * k) * NP;
#pragma unroll
            for (int n = 0; n < NV; n++) pair(row + 8 * n, sums.v[j][4 * n + 2 * k], sums.v[j][4 * n + 2 * k + 1]);
            if (t == 0) one(row + D_VALUE, sums.v[j][4 * NV + 2 * k]);
        }
}
// Copies tokens first ... first + CHUNK - 1, those before `end`, to a stage.
DEV void load_for_sums(const Stream& p, const Walk& w, const Bases& bases, u8* to, int first, int end) {
    const int thread = hopper::thread_here() & (SUM_THREADS - 1);
    copy_rows<D, CHUNK, SUM_THREADS>(to, 16, CHUNK_PLANE, bases.k, p.k.token, first, end, thread);
    copy_rows<D_VALUE, CHUNK, SUM_THREADS>(to + SUM_VALUES, 16, CHUNK_PLANE, bases.v, p.v.token, first, end, thread);
    if constexpr (HAS_G)
        if (thread < CHUNK) copy_async<8>(to + SUM_G + thread * 8, w.g + min(first + thread, end - 1), 8);
}
// Adds tokens from ... to - 1, weighed to where g is `to_g`. The first are on their way to `stage`; of those before `end` what
// comes next is, afterwards.
template <int WHICH>
DEV void add(Sums& sums, const Stream& p, const Walk& w, const Bases& bases, u8* at, u32 base, int from, int to, int end, f64 to_g, int& stage) {
#pragma unroll 1
    for (int first = from; first < to; first += CHUNK) {
        copy_async_wait<0>();
        proxy_fence();
        barrier_sync(1, SUM_THREADS);
        const int next = min(first + CHUNK, to);
        if (next < end) load_for_sums(p, w, bases, at + (stage ^ 1) * SUM_STAGE, next, end);
        copy_async_commit();
        u8* const keys = at + stage * SUM_STAGE;
        // Transposed, by a warp for each slab.
        const int warp = (hopper::thread_here() & (SUM_THREADS - 1)) / 32;
        if (warp < CHUNK / 16) {
            const int lane = lane_here(), g = lane / 4, t = lane % 4;
            u8* const slab = at + SLABS + warp * SLAB + g * 32 + t * 8;
            u32 r[4];
            load_matrices<4, true>(r, keys + lane / 16 * CHUNK_PLANE + (warp * 16 + lane % 16) * 16);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                *reinterpret_cast<uint2*>(slab + i * 512) = make_uint2(r[0], r[1]);
                *reinterpret_cast<uint2*>(slab + i * 512 + 256) = make_uint2(r[2], r[3]);
            }
            if constexpr (HAS_G) {
                if (lane < 16) {
                    const f64 own = *reinterpret_cast<const f64*>(keys + SUM_G + (warp * 16 + lane) * 8);
                    const int place = lane % 8 / 2 * 8 + lane / 8 * 4 + lane % 2 * 2;
                    *reinterpret_cast<u16*>(at + SLABS + warp * SLAB + SLAB_WEIGHTS + place) = bf16_bits(exp2_fast(f32(to_g - own) * LOG2E));
                }
            }
        }
        barrier_sync(1, SUM_THREADS);
        absorb<WHICH>(sums, at + SLABS, base + stage * SUM_STAGE + SUM_VALUES, (next - first) / 16);
        stage ^= 1;
    }
}

// Ones beside values, and of features, which no copy writes. 256 threads.
DEV void write_ones(u8* at) {
    const int i = int(threadIdx.x) & 255;
    *reinterpret_cast<uint4*>(at + i / CHUNK * SUM_STAGE + SUM_VALUES + NV * CHUNK_PLANE + i % CHUNK * 16) = make_uint4(0x3f80u, 0, 0, 0);
    *reinterpret_cast<uint4*>(at + SLABS + i / 32 * SLAB + SLAB_ONES + i % 32 * 16) = make_uint4(BF16_ONES, BF16_ONES, BF16_ONES, BF16_ONES);
}
