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
#include "hopper_device.cuh"
#endif

// The key tile records of one head: what prepare writes and the others copy in bulk.
//   keys   [8 groups of 8 tokens][DQ / 8][8 tokens][8]           (B of queries times keys)
//   values [8 groups of 8 tokens][NP / 8][8 tokens][8]           (v, 1, zeros; rows of 0 where no token is)
//   with decay: fall f32 [64] = log2(e) (g(end) - g(token)), above 0 only after the end; 2^fall f32 [64], at most 1; g(end) f64,
//   where the end is the tile's last token that is there
constexpr int KEY_BYTES = KEY_TILE * DQ * 2;
constexpr int VALUE_BYTES = KEY_TILE * NP * 2;
constexpr int META_BYTES = HAS_G ? KEY_TILE * 8 + 16 : 0;
constexpr int TILE_BYTES = KEY_BYTES + VALUE_BYTES + META_BYTES;
// Where the one beside a token's value is.
DEV int ones_of(int token) { return KEY_BYTES + (token / 8 * NP + D_VALUE / 8 * 8 + token % 8) * 16 + D_VALUE % 8 * 2; }
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
