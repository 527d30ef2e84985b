// Sums of a chunk: features of keys times values and ones, weighed to the end of the chunk.
//
// tiles  records of 64 tokens for sums (hopper.cuh)
// sums   f32 [kv head][chunk][feature block][8][NP], in program order
//
// A warpgroup owns up to TILES tiles of 64 features in its accumulators and streams the chunk's tokens past them: features
// are made in registers, transposed (rows are features, columns tokens), values come from the ring. 2 * features * NP
// FLOPs a token; bytes: the chunk's records once per block of threads, the sums once.
#include "hopper.cuh"
#include "hopper_mma.cuh"

constexpr int TILES = D_KEY == 8 ? 6 : NA <= 20 ? 6 : 3;  // accumulators: TILES * NA registers
constexpr int PAIRS = 2 * TILES;                          // feature blocks of a warp
constexpr int GROUPS = 36 / PAIRS;                        // parts of a T
constexpr int THREADS = WARPGROUPS * 128 + 128;
constexpr int REGISTERS = WARPGROUPS == 1 ? 0 : WARPGROUPS == 2 ? 240 : WARPGROUPS == 3 ? 160 : 120;
constexpr int STAGE_BYTES = (SUM_TILE_BYTES + 127) & ~127;

// Work of a warpgroup: T items, then R items, then the rest, tile by tile.
constexpr int C_GROUPS = (NB + 3) / 4;
constexpr int T_ITEMS = !HAS3 || NB == 1 ? 0 : NB == 2 ? GROUPS : NB * C_GROUPS * GROUPS;
__host__ __device__ constexpr int r_items_of(int b) { return (8 * b + TILES - 1) / TILES; }
__host__ __device__ constexpr int r_items() {
    int n = 0;
    for (int b = 1; b < NB; b++) n += (NB - 1 - b) * r_items_of(b);
    return n;
}
constexpr int R_ITEMS = HAS3 ? r_items() : 0;
constexpr int REST_BASE = NB == 1 ? 0 : Q_BASE;
constexpr int REST_ITEMS = ((BLOCKS - REST_BASE) / 8 + TILES - 1) / TILES;
constexpr int ITEMS = T_ITEMS + R_ITEMS + REST_ITEMS;
static_assert(NB != 1 || REST_ITEMS <= 1, "all features of 8 elements fit one item");

struct Sums {
    const char* tiles;
    float* sums;
    const Sequence* sequences;
    const int2* items;  // sequence, chunk
    int tile_count, chunk_count, chunk_tokens, unused;
};

struct Stream {
    u32 base, bars;
    int stage;
    u32 phase;
    DEV_MEMBER u32 acquire() {
        barrier_wait(bars + 8 * stage, phase);
        return base + stage * STAGE_BYTES;
    }
    DEV_MEMBER void release() {
        if ((threadIdx.x & 127) == 0) barrier_arrive(bars + 8 * (STAGES + stage));
        if (++stage == STAGES) {
            stage = 0;
            phase ^= 1;
        }
    }
};

DEV uint2 pair_of(u32 address) {
    uint2 x;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(address));
    return x;
}
DEV uint2 mul(uint2 a, uint2 b) { return make_uint2(mul2(a.x, b.x), mul2(a.y, b.y)); }
DEV void step(float (&acc)[NA], uint2 low, uint2 high, u64 b) {
    mma_fence();
    Mma<NP>::run<1>(acc, low.x, high.x, low.y, high.y, b);
    mma_commit();
    mma_wait<1>();
}
DEV u64 values_descriptor(u32 stage, int slab) { return descriptor(stage + 4 * SLAB_BYTES + slab * (32 * NP), NP * 16, 128); }

// Writes a tile's accumulators to feature blocks `low` and `high`.
DEV void store(float* sums, const float (&acc)[NA], int low, int high, bool has_low, bool has_high) {
    const int lane = threadIdx.x & 31, row = lane >> 2, m = lane & 3;
#pragma unroll
    for (int j = 0; j < NA / 4; j++) {
        if (has_low) *(float2*)(sums + (low * 8 + row) * NP + 8 * j + 2 * m) = make_float2(acc[4 * j], acc[4 * j + 1]);
        if (has_high) *(float2*)(sums + (high * 8 + row) * NP + 8 * j + 2 * m) = make_float2(acc[4 * j + 2], acc[4 * j + 3]);
    }
}
DEV void clear(float (&acc)[TILES][NA]) {
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int i = 0; i < NA; i++) acc[t][i] = 0.f;
}
DEV void settle(float (&acc)[TILES][NA]) {
#pragma unroll
    for (int t = 0; t < TILES; t++) mma_touch(acc[t]);
}

// Part GROUP of T(a; c): this warp's prefixes are the same as the other warps', its block c is its own.
template <int GROUP> DEV void t_item(Stream stream, int tiles, int a, int c, bool mine, float* sums) {
    constexpr Pairs P;
    const int lane = threadIdx.x & 31;
    float acc[TILES][NA];
    clear(acc);
#pragma unroll 1
    for (int tile = 0; tile < tiles; tile++) {
        const u32 at = stream.acquire();
#pragma unroll
        for (int slab = 0; slab < 4; slab++) {
            const u32 keys = at + slab * SLAB_BYTES + (lane & 3) * 8;
            const uint2 kc = pair_of(keys + (8 * c + (lane >> 2)) * 32);
            uint2 x[8], u[8];
#pragma unroll
            for (int i = 0; i < 8; i++) {
                bool is_i = false, is_j = false;
#pragma unroll
                for (int e = GROUP * PAIRS; e < (GROUP + 1) * PAIRS; e++) {
                    is_i |= P.i[e] == i;
                    is_j |= P.j[e] == i;
                }
                if (is_i || is_j) x[i] = pair_of(keys + (8 * a + i) * 32);
                if (is_j) u[i] = mul(x[i], kc);
            }
            const u64 b = values_descriptor(at, slab);
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                const int e = GROUP * PAIRS + 2 * t;
                step(acc[t], mul(x[P.i[e]], u[P.j[e]]), mul(x[P.i[e + 1]], u[P.j[e + 1]]), b);
            }
        }
        mma_wait<0>();
        stream.release();
    }
    settle(acc);
    const int block = T_BASE + 36 * (a * NB + c) + GROUP * PAIRS;
#pragma unroll
    for (int t = 0; t < TILES; t++) store(sums, acc[t], block + 2 * t, block + 2 * t + 1, mine, mine);
}

// Prefixes x_i x_j of R(b, c), i from `first` on; this warp has two j.
DEV void r_item(Stream stream, int tiles, int b, int c, int first, float* sums) {
    const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
    float acc[TILES][NA];
    clear(acc);
#pragma unroll 1
    for (int tile = 0; tile < tiles; tile++) {
        const u32 at = stream.acquire();
#pragma unroll
        for (int slab = 0; slab < 4; slab++) {
            const u32 keys = at + slab * SLAB_BYTES + (lane & 3) * 8;
            const uint2 kc = pair_of(keys + (8 * c + (lane >> 2)) * 32);
            const uint2 u0 = mul(kc, pair_of(keys + (8 * b + 2 * warp) * 32)), u1 = mul(kc, pair_of(keys + (8 * b + 2 * warp + 1) * 32));
            const u64 desc = values_descriptor(at, slab);
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                const uint2 x = pair_of(keys + (first + t) * 32);
                step(acc[t], mul(x, u0), mul(x, u1), desc);
            }
        }
        mma_wait<0>();
        stream.release();
    }
    settle(acc);
    const int block = R_BASE + r_blocks_before(b) + (c - b - 1) * 64 * b + 2 * warp;
#pragma unroll
    for (int t = 0; t < TILES; t++) {
        const int i = first + t;
        store(sums, acc[t], block + 8 * i, block + 8 * i + 1, i < 8 * b, i < 8 * b);
    }
}

// Rows of keys whose product is a feature block of order 2 or less: prefix, last (its rows `stride` bytes apart).
struct Rest {
    u32 prefix, last, stride;
};
DEV Rest rest_of(int block) {
    const u32 ones = D_KEY * 32;
    if (HAS2 && block < L_BASE) {
        int e = block - Q_BASE, b = 0;
        while (e >= 8 * (NB - b)) e -= 8 * (NB - b++);
        return Rest{(u32)(8 * b + e % 8) * 32, (u32)(8 * (b + e / 8)) * 32, 32};
    }
    const int e = block - L_BASE;
    if (HAS1 && e < NB) return Rest{ones, (u32)(8 * e) * 32, 32};
    return Rest{ones, ones, 0};
}
DEV void rest_item(Stream stream, int tiles, int first, float* sums) {
    const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
    float acc[TILES][NA];
    clear(acc);
    u32 prefix[TILES][2], last[TILES][2];
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const Rest rest = rest_of(first + 8 * t + 2 * warp + h);
            prefix[t][h] = rest.prefix;
            last[t][h] = rest.last + rest.stride * (lane >> 2);
        }
#pragma unroll 1
    for (int tile = 0; tile < tiles; tile++) {
        const u32 at = stream.acquire();
#pragma unroll 1
        for (int slab = 0; slab < 4; slab++) {
            const u32 keys = at + slab * SLAB_BYTES + (lane & 3) * 8;
            const u64 desc = values_descriptor(at, slab);
#pragma unroll
            for (int t = 0; t < TILES; t++)
                step(acc[t], mul(pair_of(keys + prefix[t][0]), pair_of(keys + last[t][0])), mul(pair_of(keys + prefix[t][1]), pair_of(keys + last[t][1])),
                     desc);
        }
        mma_wait<0>();
        stream.release();
    }
    settle(acc);
#pragma unroll
    for (int t = 0; t < TILES; t++) {
        const int block = first + 8 * t + 2 * warp;
        store(sums, acc[t], block, block + 1, block < BLOCKS, block + 1 < BLOCKS);
    }
}

// Keys of one block of 8: all features at once; each warp makes its own, with compile-time places.
template <int WARP, int ITEM> DEV void make_all(uint2 (&a)[TILES][2], const uint2 (&x)[8], uint2 last) {
    constexpr Pairs P;
    const uint2 one = make_uint2(0x3f803f80u, 0x3f803f80u);
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int e = ITEM * PAIRS * 4 + 8 * t + 2 * WARP + h;
            if (e < T_BLOCKS) a[t][h] = mul(mul(x[P.j[e < 36 ? e : 0]], last), x[P.i[e < 36 ? e : 0]]);
            else if (e < L_BASE) a[t][h] = mul(x[(e - Q_BASE) & 7], last);
            else if (HAS1 && e == L_BASE) a[t][h] = last;
            else a[t][h] = one;
        }
}
template <int ITEM> DEV void all_item(Stream stream, int tiles, float* sums) {
    const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
    float acc[TILES][NA];
    clear(acc);
#pragma unroll 1
    for (int tile = 0; tile < tiles; tile++) {
        const u32 at = stream.acquire();
#pragma unroll 1
        for (int slab = 0; slab < 4; slab++) {
            const u32 keys = at + slab * SLAB_BYTES + (lane & 3) * 8;
            uint2 x[8], a[TILES][2];
#pragma unroll
            for (int i = 0; i < 8; i++) x[i] = pair_of(keys + i * 32);
            const uint2 last = pair_of(keys + (lane >> 2) * 32);
            if (warp == 0) make_all<0, ITEM>(a, x, last);
            else if (warp == 1) make_all<1, ITEM>(a, x, last);
            else if (warp == 2) make_all<2, ITEM>(a, x, last);
            else make_all<3, ITEM>(a, x, last);
            const u64 desc = values_descriptor(at, slab);
            mma_fence();
#pragma unroll
            for (int t = 0; t < TILES; t++) Mma<NP>::run<1>(acc[t], a[t][0].x, a[t][1].x, a[t][0].y, a[t][1].y, desc);
            mma_commit();
            mma_wait<0>();
        }
        stream.release();
    }
    settle(acc);
#pragma unroll
    for (int t = 0; t < TILES; t++) {
        const int block = ITEM * PAIRS * 4 + 8 * t + 2 * warp;
        store(sums, acc[t], block, block + 1, block < BLOCKS, block + 1 < BLOCKS);
    }
}

template <int GROUP> DEV void t_group(int group, Stream stream, int tiles, int a, int c, bool mine, float* sums) {
    if constexpr (GROUP < GROUPS) {
        if (group == GROUP) t_item<GROUP>(stream, tiles, a, c, mine, sums);
        else t_group<GROUP + 1>(group, stream, tiles, a, c, mine, sums);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) hopper_sums(const __grid_constant__ Sums p) {
    extern __shared__ __align__(128) char shared[];
    const u32 base = smem(shared), bars = base + STAGES * STAGE_BYTES;
    const int kv = blockIdx.z, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const int2 where = p.items[blockIdx.y];
    const Sequence seq = p.sequences[where.x];
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            barrier_init(bars + 8 * s, 1);
            barrier_init(bars + 8 * (STAGES + s), WARPGROUPS);
        }
        barrier_init_done();
    }
    __syncthreads();
    const int first = where.y * p.chunk_tokens / KEY_TILE;
    const int tiles = (min(seq.keys, (where.y + 1) * p.chunk_tokens) + KEY_TILE - 1) / KEY_TILE - first;

    if (warp >= WARPGROUPS * 4) {
        if constexpr (REGISTERS > 0) asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (warp == WARPGROUPS * 4 && lane == 0) {
            const char* from = p.tiles + ((i64)kv * p.tile_count + seq.tile + first) * SUM_TILE_BYTES;
            int stage = 0;
            u32 phase = 1;
            for (int t = 0; t < tiles; t++) {
                barrier_wait(bars + 8 * (STAGES + stage), phase);
                barrier_expect(bars + 8 * stage, SUM_TILE_BYTES);
                copy_bulk(base + stage * STAGE_BYTES, from + (i64)t * SUM_TILE_BYTES, SUM_TILE_BYTES, bars + 8 * stage);
                if (++stage == STAGES) {
                    stage = 0;
                    phase ^= 1;
                }
            }
        }
        return;
    }

    if constexpr (REGISTERS > 0) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
    Stream stream{base, bars, 0, 0};
    float* const sums = p.sums + ((i64)kv * p.chunk_count + seq.chunk + where.y) * (i64)(BLOCKS * 8 * NP);
    int item = blockIdx.x * WARPGROUPS + (warp >> 2);
    if constexpr (NB == 1) {

        if (item == 0) {
            all_item<0>(stream, tiles, sums);
            return;
        }
    } else {
        if (item < T_ITEMS) {
            const int w = warp & 3;
            if constexpr (NB == 2) {
                t_group<0>(item, stream, tiles, w >> 1, w & 1, true, sums);
            } else {
                const int c = item / GROUPS % C_GROUPS * 4 + w;
                t_group<0>(item % GROUPS, stream, tiles, item / GROUPS / C_GROUPS, min(c, NB - 1), c < NB, sums);
            }
            return;
        }
        item -= T_ITEMS;
        if (item < R_ITEMS) {
            int b = 1, n = item;
            while (n >= (NB - 1 - b) * r_items_of(b)) n -= (NB - 1 - b) * r_items_of(b), b++;
            r_item(stream, tiles, b, b + 1 + n / r_items_of(b), n % r_items_of(b) * TILES, sums);
            return;
        }
        item -= R_ITEMS;
        if (item < REST_ITEMS) {
            rest_item(stream, tiles, REST_BASE + item * TILES * 8, sums);
            return;
        }
    }
    for (int t = 0; t < tiles; t++) {
        stream.acquire();
        stream.release();
    }
}
