// Keys take their gradients from the queries that weigh them one by one, add what sums gave them, and have them all.
//
// With each query's shift, 1/D and δ, p = w/D and b = w'/D · (u − δ) (see backward_queries):
//
//     dv_s = Σ_t p dy_t,   dk_s = Σ_t b scale q_t,   Σ_t w dw = Σ_t p (u − δ)
//
// over the queries of all heads of the group. `backward_keys` writes those of the window's keys (0 for sinks);
// `backward_sinks` sums a share of the queries for the sinks, and `backward_sinks_end` adds the shares up.
//
// Grid: tiles of TILE keys, chunks at work, units at work; tiles of sinks, shares of the queries, units at work.
// Block: 256 threads; tiles of queries pass.
// Bytes: the queries and dy that see a tile, once (from L2). FLOPs: 4 (D_KEY + D_VALUE) per pair.
#include "backward_pairs.cuh"

struct Shared {
    QueryTile queries;
    KeyTile keys;
    f32 weights[TILE * STRIDE];  // [query][key]: p
    f32 slopes[TILE * STRIDE];   // b
    f32 coefficients[TERMS];
};
SAME_SIZE(Shared, SHARED_BYTES);

// What a thread has of SIDE keys.
struct Rows {
    f32 dk[SIDE][KEY_COLUMNS], dv[SIDE][VALUE_COLUMNS], dw[SIDE];

    DEVICE void clear() {
#pragma unroll
        for (int i = 0; i < SIDE; ++i) {
            dw[i] = 0;
#pragma unroll
            for (int j = 0; j < KEY_COLUMNS; ++j) dk[i][j] = 0;
#pragma unroll
            for (int j = 0; j < VALUE_COLUMNS; ++j) dv[i][j] = 0;
        }
    }
};

// The queries that have been loaded weigh the keys from place `fold` on.
template <bool SINKS>
DEVICE void weigh(Shared& shared, Rows& rows, i32 fold) {
    int x = threadIdx.x % 16, y = threadIdx.x / 16;
    const QueryTile& queries = shared.queries;
    const KeyTile& keys = shared.keys;
    f32 logits[SIDE][SIDE], u[SIDE][SIDE];
    products<D_KEY>(keys.x, y * SIDE, queries.x, x * SIDE, logits);
    products<D_VALUE>(keys.v, y * SIDE, queries.dy, x * SIDE, u);
    f32 weights[SIDE][SIDE], slopes[SIDE][SIDE];
#pragma unroll
    for (int j = 0; j < SIDE; ++j) {
        int t = x * SIDE + j;
        i32 place = queries.place[t], limit = queries.limit[t];
        float2 own = queries.own[t];
        f32 shift = queries.shift[t], inverse = queries.inverse[t], delta = queries.delta[t];
#pragma unroll
        for (int i = 0; i < SIDE; ++i) {
            int s = y * SIDE + i;
            f32 weight = 0, slope = 0;
            if (keys.place[s] <= place && (SINKS || keys.place[s] >= fold)) {
                f32 level = FADES ? difference(own, keys.g[s]) : 0;
                if (SINKS || keys.place[s] >= limit) {
                    weight = slope = expf(level + logits[i][j] - shift) * inverse;
                } else {
                    f32 fading = expf(level - shift) * inverse;
                    weight = fading * polynomial(shared.coefficients, logits[i][j], slope);
                    slope *= fading;
                }
                f32 by = u[i][j] - delta;
                slope *= by;
                rows.dw[i] = fmaf(weight, by, rows.dw[i]);
            }
            weights[i][j] = weight;
            slopes[i][j] = slope;
        }
    }
    put_weights(shared.weights, weights, x, y);
    put_weights(shared.slopes, slopes, x, y);
    __syncthreads();
    each_row(x, y, [&](int row, int at) {
        f32 a[SIDE], b[SIDE], dy[VALUE_COLUMNS], q[KEY_COLUMNS];
        take(&shared.weights[at], a);
        elements<D_VALUE>(queries.dy, row, x, dy);
        multiply_add(a, dy, rows.dv);
        take(&shared.slopes[at], b);
        elements<D_KEY>(queries.x, row, x, q);
        multiply_add(b, q, rows.dk);
    });
}

// Σ over the 16 threads that share a row.
DEVICE f32 row_sum(f32 x) {
#pragma unroll
    for (int by = 8; by > 0; by >>= 1) x += __shfl_xor_sync(0xffffffffu, x, by);
    return x;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) backward_keys(const __grid_constant__ Backward p) {
    DYNAMIC_SHARED(memory);
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    UNIT(u, p.first_unit + blockIdx.z);
    i64 chunk = p.first_chunk + blockIdx.y;
    if (chunk > u.s.folds) return;
    bool folded = chunk < u.s.folds;
    i64 from = fold_of(p, u, chunk), to = folded ? fold_of(p, u, chunk + 1) : u.total;
    i64 own = i64(blockIdx.x) * TILE, first = from + own;
    if (first >= to) return;
    i64 end = min(first + TILE, to);
    int thread = threadIdx.x, x = thread % 16, y = thread / 16;
    for (int i = thread; i < TERMS; i += THREADS) shared.coefficients[i] = p.coefficients[i];
    load_window(p, u, shared.keys, first, end, first);
    Rows rows;
    rows.clear();
    // From the queries on that stand where the first key does.
    i64 c = CAUSAL ? min(chunk, u.s.reads) : 0;
    while (c > 0 && p.reads[u.s.reads_at + c - 1].end + u.s.open > first) --c;
    for (; c < u.s.reads; ++c) {
        i64 fold = fold_of_read(p, u, c);
        if (fold >= end) break;
        Read read = p.reads[u.s.reads_at + c];
        i64 begin = CAUSAL ? max(read.first, first - u.s.open) : read.first;
        for (i64 head = 0; head < p.group; ++head) {
            for (i64 query = begin; query < read.end; query += TILE) {
                __syncthreads();
                load_queries(p, u, shared.queries, head, query, read.end, first, true);
                __syncthreads();
                weigh<false>(shared, rows, place_from(fold, first));
            }
        }
    }
#pragma unroll
    for (int i = 0; i < SIDE; ++i) {
        f32 dw = row_sum(rows.dw[i]);
        int t = y * SIDE + i;
        i64 place = first + t;
        if (place >= end) continue;
        f32 factor = folded ? p.folding[unit_places(p, u) + place] : 0;
        if (factor != 0) {
            for (i64 split = 0; split < p.splits; ++split) {
                const f32* far = far_of(p, split, blockIdx.z, 0, blockIdx.y, D_KEY + 1 + D_VALUE) + own + t;
#pragma unroll
                for (int j = 0; j < KEY_COLUMNS; ++j) {
                    int c = x + 16 * j;
                    if (c < D_KEY) rows.dk[i][j] += factor * far[c * p.far_tokens];
                }
                dw += factor * far[D_KEY * p.far_tokens];
#pragma unroll
                for (int j = 0; j < VALUE_COLUMNS; ++j) {
                    int e = x + 16 * j;
                    if (e < D_VALUE) rows.dv[i][j] += factor * far[(D_KEY + 1 + e) * p.far_tokens];
                }
            }
        }
        f64 by_fading = dw;
        // Of the open tokens of the final state and of the initial one.
        bool joins = p.final_open.keys && place >= u.s.open_after;
        i64 later = u.row * p.final_open.most + place - u.s.open_after;
        if (joins && FADES) by_fading += p.final_open.fading[later];
        bool old = place < u.s.open;
        i64 before = u.row * p.initial_open.most + place;
        i64 token = u.s.k_first + place - u.s.open;
#pragma unroll
        for (int j = 0; j < KEY_COLUMNS; ++j) {
            int c = x + 16 * j;
            if (c >= D_KEY) continue;
            f32 dk = rows.dk[i][j] + (joins ? p.final_open.keys[later * D_KEY + c] : 0);
            if (!old) {
                row<E>(p.dk, u.s.k_batch, u.head, token)[c] = from_f32<E>(dk);
            } else if (p.initial_open.keys) {
                p.initial_open.keys[before * D_KEY + c] = dk;
            }
        }
#pragma unroll
        for (int j = 0; j < VALUE_COLUMNS; ++j) {
            int e = x + 16 * j;
            if (e >= D_VALUE) continue;
            f32 dv = rows.dv[i][j] + (joins ? p.final_open.values[later * D_VALUE + e] : 0);
            if (!old) {
                row<E>(p.dv, u.s.k_batch, u.head, token)[e] = from_f32<E>(dv);
            } else if (p.initial_open.keys) {
                p.initial_open.values[before * D_VALUE + e] = dv;
            }
        }
        if (FADES && x == 0) {
            p.dw[unit_places(p, u) + place] = by_fading;
            if (old && p.initial_open.keys) p.initial_open.fading[before] = by_fading;
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) backward_sinks(const __grid_constant__ Backward p) {
    DYNAMIC_SHARED(memory);
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    UNIT(u, p.first_unit + blockIdx.z);
    i64 sinks = sinks_before(p, u, u.total), first = i64(blockIdx.x) * TILE;
    if (first >= sinks) return;
    int thread = threadIdx.x, x = thread % 16, y = thread / 16;
    for (int i = thread; i < TERMS; i += THREADS) shared.coefficients[i] = p.coefficients[i];
    i64 origin = place_of_sink(u, first);
    load_sinks(p, u, shared.keys, first, sinks, origin);
    Rows rows;
    rows.clear();
    i64 tiles = (u.s.queries + TILE - 1) / TILE;
    i64 from = tiles * blockIdx.y / p.sink_splits * TILE;
    i64 to = min(tiles * (blockIdx.y + 1) / p.sink_splits * TILE, u.s.queries);
    for (i64 head = 0; head < p.group; ++head) {
        for (i64 query = from; query < to; query += TILE) {
            if (CAUSAL && place_of(u, min(query + TILE, to) - 1) < place_of_sink(u, first)) continue;
            __syncthreads();
            load_queries(p, u, shared.queries, head, query, to, origin, true);
            __syncthreads();
            weigh<true>(shared, rows, 0);
        }
    }
#pragma unroll
    for (int i = 0; i < SIDE; ++i) {
        f32 dw = row_sum(rows.dw[i]);
        i64 sink = first + y * SIDE + i;
        if (sink >= sinks) continue;
        i64 at = (blockIdx.z * p.sink_splits + blockIdx.y) * p.most_sinks + sink;
        f32* to = p.sink_rows + at * (D_KEY + D_VALUE);
#pragma unroll
        for (int j = 0; j < KEY_COLUMNS; ++j) {
            if (x + 16 * j < D_KEY) to[x + 16 * j] = rows.dk[i][j];
        }
#pragma unroll
        for (int j = 0; j < VALUE_COLUMNS; ++j) {
            if (x + 16 * j < D_VALUE) to[D_KEY + x + 16 * j] = rows.dv[i][j];
        }
        if (x == 0) p.sink_dw[at] = dw;
    }
}

// Grid: sinks, 1, units at work. Block: 64 threads.
extern "C" __global__ void __launch_bounds__(64) backward_sinks_end(const __grid_constant__ Backward p) {
    UNIT(u, p.first_unit + blockIdx.z);
    i64 sink = blockIdx.x, old = old_sinks(p, u);
    if (sink >= sinks_before(p, u, u.total)) return;
    i64 token = u.s.k_first + place_of_sink(u, sink) - u.s.open;
    i64 later = u.row * p.final_sinks.most + sink, before = u.row * p.initial_sinks.most + sink;
    for (int i = threadIdx.x; i <= D_KEY + D_VALUE; i += 64) {
        f64 sum = 0;
        for (i64 split = 0; split < p.sink_splits; ++split) {
            i64 at = (blockIdx.z * p.sink_splits + split) * p.most_sinks + sink;
            sum += i < D_KEY + D_VALUE ? f64(p.sink_rows[at * (D_KEY + D_VALUE) + i]) : p.sink_dw[at];
        }
        bool joins = p.final_sinks.keys;
        if (i < D_KEY) {
            if (joins) sum += p.final_sinks.keys[later * D_KEY + i];
            if (sink >= old) row<E>(p.dk, u.s.k_batch, u.head, token)[i] = from_f32<E>(f32(sum));
            else if (p.initial_sinks.keys) p.initial_sinks.keys[before * D_KEY + i] = f32(sum);
        } else if (i < D_KEY + D_VALUE) {
            int e = i - D_KEY;
            if (joins) sum += p.final_sinks.values[later * D_VALUE + e];
            if (sink >= old) row<E>(p.dv, u.s.k_batch, u.head, token)[e] = from_f32<E>(f32(sum));
            else if (p.initial_sinks.keys) p.initial_sinks.values[before * D_VALUE + e] = f32(sum);
        } else if (FADES) {
            if (joins) sum += p.final_sinks.fading[later];
            if (sink >= old) p.dw[unit_places(p, u) + place_of_sink(u, sink)] = sum;
            else if (p.initial_sinks.keys) p.initial_sinks.fading[before] = sum;
        }
    }
}
