// Sums of a chunk's features: of keys times [v, 1], or of queries times [dy, −δ]/D.
//
//     A_fe = Σ_t w_t Φ_f(x_t) v̂_te      f < D, e ≤ D_VALUE
//
// Grid: (tiles of FEATURES features) · (blocks of COLUMNS columns), chunks at work, units at work.
// Block: one thread per 8 features and 4 columns, in whole warps. Tokens pass in steps of 64: their elements
// [D_KEY + 1][64] and weighted values [64][COLUMNS] are loaded, the tile's monomials [64][FEATURES] made from them, and
// multiplied with the values; each thread's 32 sums stay in registers over the whole chunk.
// Bytes: the tokens once per tile (from L2), D · (D_VALUE + 1) · 4 written per chunk. FLOPs: 2 D (D_VALUE + 1) per token.
#include "backward.cuh"

constexpr int STEP = 64, ROWS = FEATURES / 16;
constexpr int COLUMN_GROUPS = COLUMNS / 4;
constexpr int THREADS = (16 * COLUMN_GROUPS + 31) / 32 * 32;
constexpr int COLUMN_BLOCKS = (D_VALUE + 1 + COLUMNS - 1) / COLUMNS;
constexpr int X_STRIDE = STEP + 4, F_STRIDE = FEATURES + 4;

struct Tile {
    f32 x[D_MORE * X_STRIDE];
    f32 values[STEP * COLUMNS];
    f32 monomials[STEP * F_STRIDE];
    f32 weights[STEP];
    u16 indices[ORDER * FEATURES];
};
SAME_SIZE(Tile, SHARED_BYTES);

// `load(t, place of the token, i)` gives elements, `value(…)` values.
template <class Tokens>
DEVICE void absorb(const Backward& p, Tile& tile, f32 (&sums)[ROWS][4], const Tokens& tokens, i64 from, i64 to, int column) {
    int thread = threadIdx.x;
    for (i64 first = from; first < to; first += STEP) {
        int count = int(min(i64(STEP), to - first));
        __syncthreads();
        for (int t = thread; t < STEP; t += THREADS) {
            tile.weights[t] = t < count ? tokens.weight(first + t) : 0;
            tile.x[D_KEY * X_STRIDE + t] = 1;
        }
        load_transposed<D_KEY, STEP, THREADS>(tile.x, X_STRIDE, count, [&](int t, int i) { return tokens.element(first + t, i); });
        __syncthreads();
        for (int i = thread; i < STEP * COLUMNS; i += THREADS) {
            int t = i / COLUMNS, c = column + i % COLUMNS;
            f32 weight = tile.weights[t];
            tile.values[i] = weight == 0 || c > D_VALUE ? 0 : weight * tokens.value(first + t, c);
        }
        for (int i = thread; i < FEATURES * (STEP / 4); i += THREADS) {
            int f = i % FEATURES, t = i / FEATURES * 4;
            float4 y = load4(&tile.x[tile.indices[f] * X_STRIDE + t]);
#pragma unroll
            for (int j = 1; j < ORDER; ++j) {
                float4 x = load4(&tile.x[tile.indices[j * FEATURES + f] * X_STRIDE + t]);
                y.x *= x.x, y.y *= x.y, y.z *= x.z, y.w *= x.w;
            }
            f32* to = &tile.monomials[t * F_STRIDE + f];
            to[0] = y.x, to[F_STRIDE] = y.y, to[2 * F_STRIDE] = y.z, to[3 * F_STRIDE] = y.w;
        }
        __syncthreads();
        if (thread < 16 * COLUMN_GROUPS) {
            const f32* value = &tile.values[thread % COLUMN_GROUPS * 4];
            const f32* monomial = &tile.monomials[thread / COLUMN_GROUPS * ROWS];
#pragma unroll 4
            for (int t = 0; t < STEP; ++t) {
                float4 v = load4(value + t * COLUMNS);
                f32 x[ROWS];
                if (ROWS % 4 == 0) {
#pragma unroll
                    for (int r = 0; r < ROWS / 4; ++r) {
                        float4 four = load4(monomial + t * F_STRIDE + 4 * r);
                        x[4 * r] = four.x, x[4 * r + 1] = four.y, x[4 * r + 2] = four.z, x[4 * r + 3] = four.w;
                    }
                } else {
#pragma unroll
                    for (int r = 0; r < ROWS; ++r) x[r] = monomial[t * F_STRIDE + r];
                }
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                    sums[r][0] = fmaf(x[r], v.x, sums[r][0]);
                    sums[r][1] = fmaf(x[r], v.y, sums[r][1]);
                    sums[r][2] = fmaf(x[r], v.z, sums[r][2]);
                    sums[r][3] = fmaf(x[r], v.w, sums[r][3]);
                }
            }
        }
    }
}

// A block begins: its features' indices, zeros.
DEVICE void begin(const Backward& p, Tile& tile, f32 (&sums)[ROWS][4], i64 first_feature) {
    for (int f = threadIdx.x; f < FEATURES; f += THREADS) {
        Feature feature = p.features[first_feature + f];
        for (int j = 0; j + 1 < ORDER; ++j) tile.indices[j * FEATURES + f] = p.prefixes[feature.prefix + j];
        tile.indices[(ORDER - 1) * FEATURES + f] = u16(feature.last);
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) sums[r][0] = sums[r][1] = sums[r][2] = sums[r][3] = 0;
}

DEVICE void end(const Backward& p, const f32 (&sums)[ROWS][4], f32* slot, i64 first_feature, int column) {
    int thread = threadIdx.x;
    if (thread >= 16 * COLUMN_GROUPS) return;
    column += thread % COLUMN_GROUPS * 4;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        i64 f = first_feature + thread / COLUMN_GROUPS * ROWS + r;
        if (f >= p.features_count) continue;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            if (column + c < D_VALUE) slot[f * D_VALUE + column + c] = sums[r][c];
            if (column + c == D_VALUE) slot[p.features_count * D_VALUE + f] = sums[r][c];
        }
    }
}

struct Keys {
    const Backward& p;
    const Unit& u;
    DEVICE f32 weight(i64 place) const { return p.folding[unit_places(p, u) + place]; }
    DEVICE f32 element(i64 place, int i) const { return key_at(p, u, place, i); }
    DEVICE f32 value(i64 place, int i) const { return i == D_VALUE ? 1.0f : value_at(p, u, place, i); }
};

struct Queries {
    const Backward& p;
    const Unit& u;
    i64 head;
    DEVICE f32 weight(i64 query) const { return p.reading[unit_queries(p, u, head) + query]; }
    DEVICE f32 element(i64 query, int i) const { return query_at(p, u, head, query, i); }
    DEVICE f32 value(i64 query, int i) const {
        return i == D_VALUE ? -p.delta[unit_queries(p, u, head) + query] : dy_at(p, u, head, query, i);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 2) backward_absorb_keys(const __grid_constant__ Backward p) {
    DYNAMIC_SHARED(shared);
    Tile& tile = *reinterpret_cast<Tile*>(shared);
    UNIT(u, p.first_unit + blockIdx.z);
    i64 chunk = p.first_chunk + blockIdx.y;
    if (chunk >= u.s.folds) return;
    i64 first_feature = i64(blockIdx.x / COLUMN_BLOCKS) * FEATURES;
    int column = blockIdx.x % COLUMN_BLOCKS * COLUMNS;
    f32 sums[ROWS][4];
    begin(p, tile, sums, first_feature);
    i64 from = fold_of(p, u, chunk), to = fold_of(p, u, chunk + 1);
    Keys keys = {p, u};
    absorb(p, tile, sums, keys, from, to, column);
    end(p, sums, slot_of(p, blockIdx.z, blockIdx.y), first_feature, column);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) backward_absorb_queries(const __grid_constant__ Backward p) {
    DYNAMIC_SHARED(shared);
    Tile& tile = *reinterpret_cast<Tile*>(shared);
    UNIT(u, p.first_unit + blockIdx.z);
    i64 chunk = p.first_chunk + blockIdx.y;
    if (chunk >= u.s.reads) return;
    i64 first_feature = i64(blockIdx.x / COLUMN_BLOCKS) * FEATURES;
    int column = blockIdx.x % COLUMN_BLOCKS * COLUMNS;
    f32 sums[ROWS][4];
    begin(p, tile, sums, first_feature);
    Read read = p.reads[u.s.reads_at + chunk];
    f64 mark;
    if (mark_of(u, fold_of_read(p, u, chunk), mark)) {
        for (i64 head = 0; head < p.group; ++head) {
            Queries queries = {p, u, head};
            absorb(p, tile, sums, queries, read.first, read.end, column);
        }
    }
    end(p, sums, slot_of(p, blockIdx.z, blockIdx.y), first_feature, column);
}
