// What the Hopper kernels share: sizes, the order of features, barriers, packed bf16 arithmetic.
//
// Compile-time constants (-D):
//   D_KEY    elements of a key, padded with zeros to a multiple of 8 (a zero element makes monomials that are 0)
//   D_VALUE  elements of a value
//   TERMS    P; ORDERS a mask of the orders kept (bit p)
//   HAS_G    whether weights decay; HAS_NEAR whether some are exact
//
// Features come in blocks of 8: a common prefix times 8 neighbouring elements, block c holding elements 8c ... 8c+7.
// Monomials of order 3 with indices from blocks a, b, c (any order) are covered by
//   T(a; c)    prefixes x_i x_j, i <= j both in block a, times block c, for every a and c: 36 feature blocks;
//   R(b, c)    prefixes x_i x_j, i in a block before b, j in block b, times block c > b: 8 * 8b feature blocks;
// order 2 by Q(b, c), b <= c: x_i (i in b) times block c; order 1 by the blocks themselves; order 0 by a block whose
// first feature is 1. A monomial that occurs twice has coefficient 0 the second time (the host's table says so).
// This order of feature blocks is "program order"; sums lie in it as [feature block][8][NP].
#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
typedef unsigned short u16;

#define DEV static __device__ __forceinline__
#define DEV_MEMBER __device__ __forceinline__

constexpr int NB = D_KEY / 8;                  // blocks of elements
constexpr int NP = (D_VALUE + 1 + 7) / 8 * 8;  // columns: a value, a one, zeros
constexpr int NA = NP / 2;                     // accumulators of a thread per 64 rows
constexpr bool HAS0 = (ORDERS >> 0) & 1, HAS1 = (ORDERS >> 1) & 1, HAS2 = (ORDERS >> 2) & 1, HAS3 = (ORDERS >> 3) & 1;
constexpr int KEY_TILE = 64;                   // tokens of a tile
// Elements of a key in the tiles that are multiplied by queries: whole steps of 16.
constexpr int DQ = (D_KEY + 15) / 16 * 16;

// The 36 pairs i <= j < 8 in three groups of 12.
struct Pairs {
    int i[36], j[36];
    constexpr Pairs() : i(), j() {
        const int order[8] = {0, 4, 1, 3, 2, 5, 6, 7};
        int at = 0;
        for (int o = 0; o < 8; o++)
            for (int k = order[o]; k < 8; k++) {
                i[at] = order[o];
                j[at] = k;
                at++;
            }
    }
};

// Feature blocks before each part, in program order: T, R, Q, then order 1 and order 0, padded to an even number.
constexpr int T_BLOCKS = HAS3 ? 36 * NB * NB : 0;
__host__ __device__ constexpr int r_blocks_before(int b) {  // of R(b', .) for b' < b
    int n = 0;
    for (int k = 1; k < b; k++) n += (NB - 1 - k) * 64 * k;
    return n;
}
constexpr int R_BLOCKS = HAS3 ? r_blocks_before(NB) : 0;
constexpr int Q_BLOCKS = HAS2 ? NB * (NB + 1) / 2 * 8 : 0;
constexpr int L_BLOCKS = (HAS1 ? NB : 0) + (HAS0 ? 1 : 0);
constexpr int T_BASE = 0, R_BASE = T_BLOCKS, Q_BASE = R_BASE + R_BLOCKS, L_BASE = Q_BASE + Q_BLOCKS;
constexpr int BLOCKS = (L_BASE + L_BLOCKS + 7) / 8 * 8;  // padded to whole tiles of 64 features
constexpr int STEPS_L = (L_BLOCKS + 1) / 2;

// A descriptor of B without swizzle: `along_k` and `along_n` bytes between core matrices.
DEV u64 descriptor(u32 address, u32 along_k, u32 along_n) {
    return (u64)((address & 0x3ffff) >> 4) | (u64)(along_k >> 4) << 16 | (u64)(along_n >> 4) << 32;
}
constexpr float LOG2E = 1.4426950408889634f;

#if defined(SATA_EMULATOR)
#include "hopper_emulated.cuh"
#else
// Dynamic shared memory.
extern __shared__ __align__(128) char shared[];

DEV u32 smem(const void* p) { return (u32)__cvta_generic_to_shared(p); }

DEV void mma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
DEV void mma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
template <int LEFT> DEV void mma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(LEFT) : "memory"); }
// Tells the compiler that accumulators change while the unit works.
template <int N> DEV void mma_touch(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// Products of two bf16 at once.
DEV u32 mul2(u32 a, u32 b) {
    u32 c;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}
// Two floats to bf16, `low` in the lower half.
DEV u32 pack2(float low, float high) {
    u32 c;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(c) : "f"(high), "f"(low));
    return c;
}
DEV u16 to_bf16(float x) {
    u16 c;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(c) : "f"(x));
    return c;
}
DEV float of_bf16(u16 x) { return __uint_as_float((u32)x << 16); }
// The larger of each of two bf16.
DEV u32 max2(u32 a, u32 b) {
    u32 c;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}
DEV float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Barriers of the copy engine.
DEV void barrier_init(u32 bar, u32 count) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count)); }
DEV void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEV void barrier_arrive(u32 bar) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory"); }
// For a warpgroup whose matrix instructions have ended: they are all warps' together.
DEV void group_arrive(u32 bar) {
    if ((threadIdx.x & 127) == 0) barrier_arrive(bar);
}
DEV void barrier_expect(u32 bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
DEV void barrier_wait(u32 bar, u32 parity) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "again:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
        "@p bra done;\nbra again;\ndone:\n}\n" ::"r"(bar), "r"(parity) : "memory");
}
// `bytes` contiguous bytes (a multiple of 16) from global to shared memory; `bar` counts them.
DEV void copy_bulk(u32 to, const void* from, u32 bytes, u32 bar) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes), "r"(bar)
                 : "memory");
}
// 16 bytes, or as many zeros, in the background.
DEV void copy_16(void* to, const void* from, bool is) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem(to)), "l"(from), "r"(is ? 16 : 0) : "memory");
}
DEV void copy_16_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }
DEV void group_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
DEV void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Registers of a thread that multiplies, in a block of `groups` warpgroups of them and one that copies.
__host__ __device__ constexpr int registers_of(int groups) { return groups == 1 ? 0 : groups == 2 ? 240 : groups == 3 ? 160 : 112; }
template <int GROUPS, int REGISTERS = 24> DEV void role_copies() {
    if constexpr (registers_of(GROUPS) > 0) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int GROUPS> DEV void role_multiplies() {
    if constexpr (registers_of(GROUPS) > 0) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers_of(GROUPS)));
}

// The indices of this block and thread, asked for where they are needed: what is made of them takes no registers before.
DEV u32 block_here() {
    u32 block;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
    return block;
}
DEV int thread_here() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}
// The compiler knows nothing of x from here on, and moves no access to memory across.
DEV void forget(int& x) { asm volatile("" : "+r"(x)); }
DEV void in_order() { asm volatile("" ::: "memory"); }
// A flag in global memory: what was written before it is set is seen after the wait.
DEV void flag_set(u32* flag) { asm volatile("st.release.gpu.u32 [%0], 1;" ::"l"(flag) : "memory"); }
DEV void flag_wait(const u32* flag) {
    u32 is = 0;
    while (!is) asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(is) : "l"(flag) : "memory");
}
// 8 bytes of shared memory.
DEV uint2 load_pair(u32 address) {
    uint2 x;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(address));
    return x;
}
#endif

// The key tile records of one head: what prepare writes and the others copy in bulk.
//   keys   [8 groups of 8 tokens][DQ / 8][8 tokens][8]           (B of queries times keys)
//   values [8 groups of 8 tokens][NP / 8][8 tokens][8]           (v, 1, zeros; rows of 0 where no token is)
//   with decay: fall f32 [64] = log2(e) (g(end of tile) - g(token)), at most 0; 2^fall f32 [64]; g(end of tile) f64
constexpr int KEY_BYTES = KEY_TILE * DQ * 2;
constexpr int VALUE_BYTES = KEY_TILE * NP * 2;
constexpr int META_BYTES = HAS_G ? KEY_TILE * 8 + 16 : 0;
constexpr int TILE_BYTES = KEY_BYTES + VALUE_BYTES + META_BYTES;
constexpr int META = KEY_BYTES + VALUE_BYTES, META_END = META + KEY_TILE * 8;
// The same tokens for sums: four slabs of 16 tokens [D_KEY + 1][16] transposed (the last row ones; token t of the 16 at
// place 4 * (t % 8 / 2) + 2 * (t / 8) + t % 2), then values weighed to the end of the chunk.
constexpr int SLAB_BYTES = (D_KEY + 1) * 32;
constexpr int SUM_TILE_BYTES = 4 * SLAB_BYTES + VALUE_BYTES;

struct View {
    u16* data;
    i64 batch, head, token;
};
// One sequence: its window (open tokens of the past, then the call's own) in tiles of keys and chunks of sums, and where
// its tokens lie. Chunk c has tokens c * chunk_tokens on; there are chunks + 1 places: what precedes each, and all.
struct Sequence {
    i64 q_batch, q_first, k_batch, k_first;  // in q and y; in k and v (of what was gathered, where there are open tokens)
    i64 work, sink;                          // first places in per-token and per-sink arrays
    i64 folded;                              // tokens of the sequence before the window
    int tokens, lead, queries, tile;         // of the window, open ones among them; of the call; its first tile record
    int chunk, chunks, summed;               // its first chunk; tokens that are summed
    int sinks, sink_tile, sink_tiles;        // sinks, their tile records
};
struct Mark {
    u64 count;
    double lag, total;
};
