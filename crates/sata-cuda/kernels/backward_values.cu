// dv from Γ: what keys read of its values.
//
//     dv_te = Σ_f c_f Φ_f(k_t) Γ_fe
//
// Grid: (splits of the features) · (blocks of COLUMNS columns) · (tiles of TOKENS tokens), chunks at work, units at work.
// Block: one thread per ROWS tokens and 4 columns, in whole warps. 32 features at a time: their monomials [32][TOKENS] are
// made in shared memory and multiplied with Γ [32][COLUMNS].
// Bytes: D · D_VALUE · 4 per tile (from L2). FLOPs: 2 D D_VALUE per token.
#include "backward.cuh"

constexpr int COLUMN_GROUPS = COLUMNS / 4;
constexpr int TOKEN_GROUPS = TOKENS / ROWS;
constexpr int WORKERS = TOKEN_GROUPS * COLUMN_GROUPS;
constexpr int THREADS = (WORKERS + 31) / 32 * 32;
constexpr int COLUMN_BLOCKS = (D_VALUE + COLUMNS - 1) / COLUMNS;
constexpr int X_STRIDE = TOKENS + 4;

struct Tile {
    f32 x[D_MORE * X_STRIDE];
    f32 monomials[32 * X_STRIDE];
    f32 sums[32 * COLUMNS];
    u16 indices[32 * ORDER];
};
SAME_SIZE(Tile, SHARED_BYTES);

extern "C" __global__ void __launch_bounds__(THREADS, 1) backward_values(const __grid_constant__ Backward p) {
    DYNAMIC_SHARED(shared);
    Tile& tile = *reinterpret_cast<Tile*>(shared);
    UNIT(u, p.first_unit + blockIdx.z);
    i64 chunk = p.first_chunk + blockIdx.y;
    if (chunk >= u.s.folds) return;
    i64 tiles = (p.far_tokens + TOKENS - 1) / TOKENS;
    i64 share = blockIdx.x;
    i64 own = share % tiles * TOKENS;
    int column = int(share / tiles % COLUMN_BLOCKS) * COLUMNS;
    i64 split = share / tiles / COLUMN_BLOCKS;
    i64 first = fold_of(p, u, chunk) + own, end = fold_of(p, u, chunk + 1);
    if (first >= end) return;
    int count = int(min(i64(TOKENS), end - first));
    i64 all = (p.features_count + 31) / 32;
    i64 from = all * split / p.splits * 32, to = all * (split + 1) / p.splits * 32;
    const f32* slot = slot_of(p, blockIdx.z, blockIdx.y);

    int thread = threadIdx.x;
    load_transposed<D_KEY, TOKENS, THREADS>(tile.x, X_STRIDE, count, [&](int t, int i) { return key_at(p, u, first + t, i); });
    for (int t = thread; t < TOKENS; t += THREADS) tile.x[D_KEY * X_STRIDE + t] = 1;
    f32 sums[ROWS][4];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) sums[r][0] = sums[r][1] = sums[r][2] = sums[r][3] = 0;
    int group = thread % COLUMN_GROUPS, row = thread / COLUMN_GROUPS * ROWS;

    for (i64 at = from; at < to; at += 32) {
        __syncthreads();
        for (int f = thread; f < 32; f += THREADS) {
            Feature feature = p.features[at + f];
            for (int j = 0; j + 1 < ORDER; ++j) tile.indices[j * 32 + f] = p.prefixes[feature.prefix + j];
            tile.indices[(ORDER - 1) * 32 + f] = u16(feature.last);
        }
        for (int i = thread; i < 32 * COLUMNS; i += THREADS) {
            i64 f = at + i / COLUMNS;
            int c = column + i % COLUMNS;
            tile.sums[i] = f < p.features_count && c < D_VALUE ? p.factors[f] * slot[f * D_VALUE + c] : 0;
        }
        __syncthreads();
        for (int i = thread; i < 32 * (TOKENS / 4); i += THREADS) {
            int f = i % 32, t = i / 32 * 4;
            float4 y = load4(&tile.x[tile.indices[f] * X_STRIDE + t]);
#pragma unroll
            for (int j = 1; j < ORDER; ++j) {
                float4 x = load4(&tile.x[tile.indices[j * 32 + f] * X_STRIDE + t]);
                y.x *= x.x, y.y *= x.y, y.z *= x.z, y.w *= x.w;
            }
            store4(&tile.monomials[f * X_STRIDE + t], y);
        }
        __syncthreads();
        if (thread < WORKERS) {
#pragma unroll 4
            for (int f = 0; f < 32; ++f) {
                float4 s = load4(&tile.sums[f * COLUMNS + group * 4]);
                f32 x[ROWS];
#pragma unroll
                for (int r = 0; r < ROWS / 4; ++r) {
                    float4 four = load4(&tile.monomials[f * X_STRIDE + row + 4 * r]);
                    x[4 * r] = four.x, x[4 * r + 1] = four.y, x[4 * r + 2] = four.z, x[4 * r + 3] = four.w;
                }
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                    sums[r][0] = fmaf(x[r], s.x, sums[r][0]);
                    sums[r][1] = fmaf(x[r], s.y, sums[r][1]);
                    sums[r][2] = fmaf(x[r], s.z, sums[r][2]);
                    sums[r][3] = fmaf(x[r], s.w, sums[r][3]);
                }
            }
        }
    }
    if (thread >= WORKERS) return;
    f32* far = far_of(p, split, blockIdx.z, 0, blockIdx.y, D_KEY + 1 + D_VALUE) + (D_KEY + 1) * p.far_tokens + own;
    column += group * 4;
    for (int c = 0; c < 4 && column + c < D_VALUE; ++c) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            if (row + r < count) far[(column + c) * p.far_tokens + row + r] = sums[r][c];
        }
    }
}
