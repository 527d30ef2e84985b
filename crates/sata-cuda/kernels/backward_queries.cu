// Queries weigh what is raw, and have all their gradients.
//
// With w = exp(g_own − g_s − shift) κ(x), u_s = dy·v_s and w' = w, or exp(…) κ'(x) where κ is the polynomial:
//
//     D = Σ w,  δ = Σ w u / D,  dq = scale/D · (Σ w' u k − δ Σ w' k)
//
// over keys of the window, sinks, and what sums gave (backward_read). Shifts are found as keys pass (one pass).
//
// Grid: (heads of a group) · (tiles of TILE queries), chunks at work, units at work. Block: 256 threads; tiles of keys
// pass, for each x and u are multiplied, weights made, and multiplied with keys again.
// Leaves dq, and shift, 1/D, δ and the sums' factor of each query.
// Bytes: the window's keys and values once per tile (from L2). FLOPs: 2 (3 D_KEY + D_VALUE) per pair.
#include "backward_pairs.cuh"

struct Shared {
    QueryTile queries;
    KeyTile keys;
    f32 weights[TILE * STRIDE];   // [key][query]: w'
    f32 products[TILE * STRIDE];  // w' u
    f32 coefficients[TERMS];
};
SAME_SIZE(Shared, SHARED_BYTES);

// What a thread has of SIDE queries.
struct Rows {
    f32 level[SIDE], den[SIDE], dot[SIDE];
    f32 by_sums[SIDE][KEY_COLUMNS], by_z[SIDE][KEY_COLUMNS];

    DEVICE void raise(int i, f32 level_now) {
        f32 factor = expf(level[i] - level_now);
        level[i] = level_now;
        den[i] *= factor;
        dot[i] *= factor;
#pragma unroll
        for (int c = 0; c < KEY_COLUMNS; ++c) by_sums[i][c] *= factor, by_z[i][c] *= factor;
    }
};

// What sums gave the queries of a tile.
DEVICE void take_far(const Backward& p, const Unit& u, Rows& rows, i64 head, i64 query, i64 first, i64 end, i64 fold) {
    int x = threadIdx.x % 16, y = threadIdx.x / 16;
    f64 mark, anchor;
    bool has_sums = mark_of(u, fold, mark);
#pragma unroll
    for (int i = 0; i < SIDE; ++i) {
        int t = y * SIDE + i;
        rows.level[i] = NOTHING;
        rows.den[i] = rows.dot[i] = 0;
#pragma unroll
        for (int c = 0; c < KEY_COLUMNS; ++c) rows.by_sums[i][c] = rows.by_z[i][c] = 0;
        if (query + t >= end) continue;
        i64 place = place_of(u, query + t);
        if (!mark_of(u, far_until(p, place), anchor)) continue;
        // All that is far is relative to the last that is far at first.
        f64 own = FADES ? p.own[unit_places(p, u) + place + 1] : 0;
        f32 level = FADES ? fmaxf(f32(own - anchor), NOTHING) : 0;
        rows.level[i] = level;
        if (!has_sums) continue;
        f32 factor = FADES ? expf(f32(own - mark) - level) : 1.0f;
        constexpr int FAR_ROWS = 2 * D_KEY + 2;
#pragma unroll 1
        for (i64 split = 0; split < p.splits; ++split) {
            const f32* far = far_of(p, split, blockIdx.z, head, blockIdx.y, FAR_ROWS) + first + t;
#pragma unroll
            for (int j = 0; j < KEY_COLUMNS; ++j) {
                int c = x + 16 * j;
                if (c >= D_KEY) continue;
                rows.by_sums[i][j] += factor * far[c * p.far_tokens];
                rows.by_z[i][j] += factor * far[(D_KEY + c) * p.far_tokens];
            }
            if (x == 0) {
                rows.dot[i] += factor * far[2 * D_KEY * p.far_tokens];
                rows.den[i] += factor * far[(2 * D_KEY + 1) * p.far_tokens];
            }
        }
    }
}

// The queries weigh the keys that have been loaded.
template <bool SINKS>
DEVICE void weigh(Shared& shared, Rows& rows) {
    int x = threadIdx.x % 16, y = threadIdx.x / 16;
    const QueryTile& queries = shared.queries;
    const KeyTile& keys = shared.keys;
    f32 logits[SIDE][SIDE], u[SIDE][SIDE];
    products<D_KEY>(queries.x, y * SIDE, keys.x, x * SIDE, logits);
    products<D_VALUE>(queries.dy, y * SIDE, keys.v, x * SIDE, u);
    f32 w[SIDE], wu[SIDE], weights[SIDE][SIDE], sums[SIDE][SIDE];
#pragma unroll
    for (int i = 0; i < SIDE; ++i) {
        int t = y * SIDE + i;
        i32 place = queries.place[t], limit = queries.limit[t];
        float2 own = queries.own[t];
        f32 highest = rows.level[i];
#pragma unroll
        for (int j = 0; j < SIDE; ++j) {
            int s = x * SIDE + j;
            // The logarithm of the decay, then of the weight, for now.
            weights[i][j] = FADES ? difference(own, keys.g[s]) : 0;
            bool near = SINKS || keys.place[s] >= limit;
            if (near && keys.place[s] <= place) highest = fmaxf(highest, weights[i][j] + logits[i][j]);
        }
#pragma unroll
        for (int by = 8; by > 0; by >>= 1) highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, by));
        if (highest > rows.level[i]) rows.raise(i, highest);
        w[i] = wu[i] = 0;
#pragma unroll
        for (int j = 0; j < SIDE; ++j) {
            int s = x * SIDE + j;
            f32 weight = 0, slope = 0;
            if (keys.place[s] <= place) {
                if (SINKS || keys.place[s] >= limit) {
                    weight = slope = expf(weights[i][j] + logits[i][j] - highest);
                } else {
                    f32 fading = expf(weights[i][j] - highest);
                    weight = fading * polynomial(shared.coefficients, logits[i][j], slope);
                    slope *= fading;
                }
            }
            w[i] += weight;
            wu[i] = fmaf(weight, u[i][j], wu[i]);
            weights[i][j] = slope;
            sums[i][j] = slope * u[i][j];
        }
        rows.den[i] += w[i];
        rows.dot[i] += wu[i];
    }
    put_weights(shared.weights, weights, x, y);
    put_weights(shared.products, sums, x, y);
    __syncthreads();
    each_row(x, y, [&](int row, int at) {
        f32 a[SIDE], b[SIDE], k[KEY_COLUMNS];
        take(&shared.products[at], a);
        take(&shared.weights[at], b);
        elements<D_KEY>(keys.x, row, x, k);
        multiply_add(a, k, rows.by_sums);
        multiply_add(b, k, rows.by_z);
    });
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) backward_queries(const __grid_constant__ Backward p) {
    DYNAMIC_SHARED(memory);
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    UNIT(u, p.first_unit + blockIdx.z);
    i64 chunk = p.first_chunk + blockIdx.y;
    if (chunk >= u.s.reads) return;
    i64 tiles = (p.far_tokens + TILE - 1) / TILE;
    i64 head = blockIdx.x / tiles, own = blockIdx.x % tiles * TILE;
    Read read = p.reads[u.s.reads_at + chunk];
    i64 first = read.first + own;
    if (first >= read.end) return;
    i64 fold = fold_of_read(p, u, chunk);
    int thread = threadIdx.x, x = thread % 16, y = thread / 16;
    for (int i = thread; i < TERMS; i += THREADS) shared.coefficients[i] = p.coefficients[i];
    i64 from = place_of(u, first);
    load_queries(p, u, shared.queries, head, first, read.end, from, false);
    __syncthreads();
    Rows rows;
    take_far(p, u, rows, head, first, own, read.end, fold);
    i64 last = place_of(u, min(first + TILE, read.end) - 1);
    for (i64 key = fold; key <= last; key += TILE) {
        __syncthreads();
        load_window(p, u, shared.keys, key, last + 1, from);
        __syncthreads();
        weigh<false>(shared, rows);
    }
    i64 sinks = sinks_before(p, u, last + 1);
    for (i64 key = 0; key < sinks; key += TILE) {
        __syncthreads();
        load_sinks(p, u, shared.keys, key, sinks, from);
        __syncthreads();
        weigh<true>(shared, rows);
    }
#pragma unroll
    for (int i = 0; i < SIDE; ++i) {
        f32 den = rows.den[i], dot = rows.dot[i];
#pragma unroll
        for (int by = 8; by > 0; by >>= 1) {
            den += __shfl_xor_sync(0xffffffffu, den, by);
            dot += __shfl_xor_sync(0xffffffffu, dot, by);
        }
        int t = y * SIDE + i;
        i64 query = first + t, place = place_of(u, query);
        if (query >= read.end) continue;
        f64 seen, mark;
        f32 inverse = own_of(p, u, place, seen) ? 1 / den : 0;
        f32 delta = dot * inverse;
        E* dq = row<E>(p.dq, u.s.q_batch, u.head * p.group + head, u.s.q_first + query);
#pragma unroll
        for (int j = 0; j < KEY_COLUMNS; ++j) {
            int c = x + 16 * j;
            if (c < D_KEY) dq[c] = from_f32<E>(p.scale * inverse * (rows.by_sums[i][j] - delta * rows.by_z[i][j]));
        }
        if (x == 0) {
            i64 at = unit_queries(p, u, head) + query;
            p.shift[at] = rows.level[i];
            p.inverse[at] = inverse;
            p.delta[at] = delta;
            bool has_sums = inverse != 0 && mark_of(u, fold, mark);
            p.reading[at] = has_sums ? expf(FADES ? f32(seen - mark) - rows.level[i] : -rows.level[i]) * inverse : 0;
        }
    }
}
