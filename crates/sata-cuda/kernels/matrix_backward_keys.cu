// Keys take their gradients from the queries that weigh them one by one, add what sums gave them, and have them all:
// backward_keys.cu for bf16 on matrix units.
//
// With each query's shift, 1/D and delta, p = w/D and b = w'/D . (u - delta) (see matrix_backward_queries):
//
//     dv_s = sum_t p dy_t,   dk_s = sum_t b scale q_t,   sum_t w dw = sum_t p (u - delta)
//
// over the queries of all heads of the group.
//
// Grid: tiles of ROWS keys, chunks at work, units at work. Block: WARPS warps, each has 16 ROW_TILES keys and values in
// registers; tiles of queries and dy pass through shared memory.
// Bytes: the queries and dy that see a tile, once (from L2). FLOPs: 4 (D_KEY + D_VALUE) per pair.
#include "matrix_backward.cuh"

struct Stage {
    bf16 queries[TILE * KEY_PITCH];
    bf16 dy[TILE * VALUE_PITCH];
    f64 own[TILE];
    f32 shift[TILE], inverse[TILE], delta[TILE];
};
// What there is to know of a query that passes, for one warp.
struct Query {
    f32 factor[TILE];  // of its far weights, over D, relative to the block's last key
    float2 own[TILE];
    i32 limit[TILE], place[TILE];
};
// A tile of queries of one head.
struct Pass {
    i64 head, read, query;  // within the group; the chunk; the first query
    i64 end, fold;
    i64 count;                // 0 after the last
};
constexpr int PASSES = 4;
struct Shared {
    Stage stages[STAGES];
    Pass passes[PASSES];
    i64 first, own;  // the block's first key's place, counted in the chunk too
    float2 end;      // g at its last
    float2 g[ROWS];
    Query queries[WARPS];
};
SAME_SIZE(Shared, SHARED_BYTES);
static_assert(STAGES * sizeof(Stage) >= ROWS * (KEY_PITCH + VALUE_PITCH) * 2, "keys fit where stages will be");

// What a thread has of its rows.
struct Rows {
    f32 dk[ROW_TILES][2 * KEY_STEPS][4], dv[ROW_TILES][2 * VALUE_STEPS][4];
    f32 dw[ROW_TILES][2], fading[ROW_TILES][2];
};

// How the 16 queries from `at` on weigh the keys: x and u become b and p.
template <bool PLAIN>
DEVICE void weigh(const Backward& p, const Polynomial& polynomial, const Shared& shared, const Stage& stage, Rows& rows, i32 fold, int at,
                  f32 (&x)[ROW_TILES][2][4], f32 (&u)[ROW_TILES][2][4]) {
    int lane = lane_of_warp(), warp = threadIdx.x / 32, g = lane / 4, m = lane % 4;
    const Query& query = shared.queries[warp];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        int t = at + 8 * j + 2 * m;
        const float2 far = *reinterpret_cast<const float2*>(&query.factor[t]);
        const float2 delta = *reinterpret_cast<const float2*>(&stage.delta[t]);
        if constexpr (PLAIN) {
#pragma unroll
            for (int r = 0; r < ROW_TILES; ++r) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    f32 factor = e % 2 ? far.y : far.x;
                    if (FADES) factor *= rows.fading[r][e / 2];
                    f32 slope, w = factor * polynomial(x[r][j][e], slope);
                    f32 by = u[r][j][e] - (e % 2 ? delta.y : delta.x);
                    rows.dw[r][e / 2] = fmaf(w, by, rows.dw[r][e / 2]);
                    u[r][j][e] = w;
                    x[r][j][e] = slope * factor * by;
                }
            }
        } else {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                float2 own = query.own[t + c];
                i32 limit = query.limit[t + c], place = query.place[t + c];
                f32 shift = stage.shift[t + c], inverse = stage.inverse[t + c];
#pragma unroll
                for (int r = 0; r < ROW_TILES; ++r) {
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        i32 key = (warp * ROW_TILES + r) * 16 + g + 8 * h;
                        f32 &to_x = x[r][j][2 * h + c], &to_u = u[r][j][2 * h + c];
                        f32 weight = 0, slope = 0;
                        if (key <= place && key >= fold) {
                            f32 level = (FADES ? difference(own, shared.g[key]) : 0) - shift;
                            if (key >= limit) {
                                weight = exp2_fast(fmaf(p.scale, to_x, level) * LOG2E) * inverse;
                                slope = weight * p.scale;
                            } else {
                                f32 fading = exp2_fast(level * LOG2E) * inverse;
                                weight = fading * polynomial(to_x, slope);
                                slope *= fading;
                            }
                        }
                        f32 by = to_u - (c ? delta.y : delta.x);
                        rows.dw[r][h] = fmaf(weight, by, rows.dw[r][h]);
                        to_u = weight;
                        to_x = slope * by;
                    }
                }
            }
        }
    }
}

// A tile of queries passes.
template <bool PLAIN>
DEVICE void pass_queries(const Backward& p, const Unit& unit, const Polynomial& polynomial, Shared& shared, const Stage& stage, const Pass& pass, Rows& rows,
                         const u32 (&k)[ROW_TILES][KEY_STEPS][4], const u32 (&v)[ROW_TILES][VALUE_STEPS][4]) {
    int lane = lane_of_warp(), warp = threadIdx.x / 32;
    const bf16* queries = stage.queries + place_of_b<KEY_PITCH>(lane);
    const bf16* gradients = stage.dy + place_of_b<VALUE_PITCH>(lane);
    const bf16* queries_transposed = stage.queries + place_of_b_transposed<KEY_PITCH>(lane);
    const bf16* gradients_transposed = stage.dy + place_of_b_transposed<VALUE_PITCH>(lane);
    // Every warp for itself.
    Query& query = shared.queries[warp];
    __syncwarp();
#pragma unroll
    for (int i = 0; i < TILE; i += 32) {
        int t = i + lane;
        float2 own = split(FADES ? stage.own[t] : 0);
        f32 inverse = stage.inverse[t];
        query.factor[t] = inverse == 0 ? 0 : exp2_fast(((FADES ? difference(own, shared.end) : 0) - stage.shift[t]) * LOG2E) * inverse;
        if (!PLAIN) {
            i64 place = place_of(unit, pass.query + min(t, int(pass.count) - 1));
            query.own[t] = own;
            query.limit[t] = place_from(far_until(p, place), shared.first);
            query.place[t] = t < pass.count ? place_from(place, shared.first) : -NOWHERE;
        }
    }
    __syncwarp();
    const i32 fold = PLAIN ? 0 : place_from(pass.fold, shared.first);
#pragma unroll (PLAIN ? UNROLLED : 1)
    for (int at = 0; at < TILE; at += 16) {
        f32 x[ROW_TILES][2][4], u[ROW_TILES][2][4];
        multiply_rows(x, k, queries + at * KEY_PITCH);
        multiply_rows(u, v, gradients + at * VALUE_PITCH);
        weigh<PLAIN>(p, polynomial, shared, stage, rows, fold, at, x, u);
        u32 b[ROW_TILES][4], w[ROW_TILES][4];
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r) round_to(b[r], x[r]), round_to(w[r], u[r]);
#pragma unroll
        for (int n = 0; n < VALUE_STEPS; ++n) {
            u32 word[4];
            load_matrices_transposed(word, gradients_transposed + at * VALUE_PITCH + 16 * n);
#pragma unroll
            for (int r = 0; r < ROW_TILES; ++r) {
                multiply(rows.dv[r][2 * n], w[r], word[0], word[1]);
                multiply(rows.dv[r][2 * n + 1], w[r], word[2], word[3]);
            }
        }
#pragma unroll
        for (int n = 0; n < KEY_STEPS; ++n) {
            u32 word[4];
            load_matrices_transposed(word, queries_transposed + at * KEY_PITCH + 16 * n);
#pragma unroll
            for (int r = 0; r < ROW_TILES; ++r) {
                multiply(rows.dk[r][2 * n], b[r], word[0], word[1]);
                multiply(rows.dk[r][2 * n + 1], b[r], word[2], word[3]);
            }
        }
    }
}

DEVICE void load_queries(const Backward& p, const Unit& u, Stage& stage, const Pass& pass) {
    i64 head = u.head * p.group + pass.head, token = u.s.q_first + pass.query;
    load_rows<D_KEY, KEY_COLUMNS, KEY_PITCH, TILE>(stage.queries, row<const bf16>(p.q, u.s.q_batch, head, token), p.q.token, int(pass.count));
    load_rows<D_VALUE, VALUE_COLUMNS, VALUE_PITCH, TILE>(stage.dy, row<const bf16>(p.dy, u.s.q_batch, head, token), p.dy.token, int(pass.count));
    i64 at = unit_queries(p, u, pass.head) + pass.query;
    load_numbers(stage.shift, p.shift + at, int(pass.count));
    load_numbers(stage.inverse, p.inverse + at, int(pass.count));
    load_numbers(stage.delta, p.delta + at, int(pass.count));
    if (FADES) {
        const f64* own = p.own + unit_places(p, u) + place_of(u, pass.query) + 1;
        int t = threadIdx.x;
        if (t < TILE) copy_async<8>(stage.own + t, own + (CAUSAL && t < pass.count ? t : 0));
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) matrix_backward_keys(const __grid_constant__ Backward p) {
    DYNAMIC_SHARED(memory);
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    UNIT(u, p.first_unit + blockIdx.z);
    i64 chunk = p.first_chunk + blockIdx.y;
    if (chunk > u.s.folds) return;
    bool folded = chunk < u.s.folds;
    i64 from = fold_of(p, u, chunk), to = folded ? fold_of(p, u, chunk + 1) : u.total;
    if (from + i64(blockIdx.x) * ROWS >= to) return;
    const int count = int(min(i64(ROWS), to - from - i64(blockIdx.x) * ROWS));
    // Registers are scarce until all queries have passed.
    if (threadIdx.x == 0) {
        shared.own = i64(blockIdx.x) * ROWS;
        shared.first = from + shared.own;
        shared.end = split(FADES ? u.g[shared.first + count - 1] : 0);
    }
    __syncthreads();
    volatile const Shared& block = shared;
    const int lane = lane_of_warp(), warp = threadIdx.x / 32, g = lane / 4, m = lane % 4;
    Polynomial polynomial;
    polynomial.load(p);

    // Keys and values, through the stages, to registers.
    u32 k[ROW_TILES][KEY_STEPS][4], v[ROW_TILES][VALUE_STEPS][4];
    {
        i64 first = block.first;
        bf16 *keys = reinterpret_cast<bf16*>(memory), *values = keys + ROWS * KEY_PITCH;
        if (first >= u.s.open) {
            i64 token = u.s.k_first + first - u.s.open;
            load_rows<D_KEY, KEY_COLUMNS, KEY_PITCH, ROWS>(keys, row<const bf16>(p.k, u.s.k_batch, u.head, token), p.k.token, count);
            load_rows<D_VALUE, VALUE_COLUMNS, VALUE_PITCH, ROWS>(values, row<const bf16>(p.v, u.s.k_batch, u.head, token), p.v.token, count);
        } else {
            put_rows<D_KEY, KEY_COLUMNS, KEY_PITCH>(keys, ROWS, count, [&](int t, int i) { return key_at(p, u, first + t, i); });
            put_rows<D_VALUE, VALUE_COLUMNS, VALUE_PITCH>(values, ROWS, count, [&](int t, int i) { return value_at(p, u, first + t, i); });
        }
        copy_async_commit();
        for (int t = threadIdx.x; t < ROWS; t += THREADS) shared.g[t] = split(FADES && t < count ? u.g[first + t] : 0);
        copy_async_wait<0>();
        __syncthreads();
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r) {
            int at = (warp * ROW_TILES + r) * 16;
#pragma unroll
            for (int s = 0; s < KEY_STEPS; ++s) load_matrices(k[r][s], keys + at * KEY_PITCH + place_of_a<KEY_PITCH>(lane) + 16 * s);
#pragma unroll
            for (int s = 0; s < VALUE_STEPS; ++s) load_matrices(v[r][s], values + at * VALUE_PITCH + place_of_a<VALUE_PITCH>(lane) + 16 * s);
        }
        __syncthreads();
    }
    Rows rows;
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            rows.dw[r][h] = 0;
            rows.fading[r][h] = FADES ? exp2_fast(difference(shared.end, shared.g[(warp * ROW_TILES + r) * 16 + g + 8 * h]) * LOG2E) : 1;
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) {
#pragma unroll
            for (int j = 0; j < 2 * KEY_STEPS; ++j) rows.dk[r][j][e] = 0;
#pragma unroll
            for (int j = 0; j < 2 * VALUE_STEPS; ++j) rows.dv[r][j][e] = 0;
        }
    }

    // From the queries on that stand where the first key does. One thread finds the tiles, one ahead of the copies.
    auto settle = [&](Pass pass) {
        const i64 first = block.first;
        for (;; ++pass.head) {
            if (pass.head == p.group) pass.head = 0, ++pass.read;
            pass.count = 0;
            if (pass.read >= u.s.reads) return pass;
            pass.fold = fold_of_read(p, u, pass.read);
            if (pass.fold >= first + count) return pass;
            Read read = p.reads[u.s.reads_at + pass.read];
            pass.query = CAUSAL ? max(read.first, first - u.s.open) : read.first;
            pass.end = read.end;
            pass.count = min(i64(TILE), max(pass.end - pass.query, i64(0)));
            if (pass.count > 0) return pass;
        }
    };
    auto after = [&](Pass pass) {
        if (pass.count == 0) return pass;
        pass.query += TILE;
        pass.count = min(i64(TILE), max(pass.end - pass.query, i64(0)));
        if (pass.count > 0) return pass;
        ++pass.head;
        return settle(pass);
    };
    if (threadIdx.x == 0) {
        Pass pass;
        pass.head = 0, pass.read = CAUSAL ? min(chunk, u.s.reads) : 0;
        while (pass.read > 0 && p.reads[u.s.reads_at + pass.read - 1].end + u.s.open > shared.first) --pass.read;
        shared.passes[0] = settle(pass);
        shared.passes[1] = after(shared.passes[0]);
    }
    __syncthreads();
    if (shared.passes[0].count > 0) load_queries(p, u, shared.stages[0], shared.passes[0]);
    copy_async_commit();
#pragma unroll 1
    for (int n = 0; shared.passes[n % PASSES].count > 0; ++n) {
        copy_async_wait<0>();
        __syncthreads();
        const Pass &pass = shared.passes[n % PASSES], &next = shared.passes[(n + 1) % PASSES];
        if (next.count > 0) load_queries(p, u, shared.stages[(n + 1) % STAGES], next);
        copy_async_commit();
        if (threadIdx.x == 0) shared.passes[(n + 2) % PASSES] = after(next);
        const Stage& stage = shared.stages[n % STAGES];
        const i64 place = place_of(u, pass.query), first = block.first;
        const bool plain = pass.fold <= first && place >= first + count - 1 && far_until(p, place) >= first + count;
        if (plain) pass_queries<true>(p, u, polynomial, shared, stage, pass, rows, k, v);
        else pass_queries<false>(p, u, polynomial, shared, stage, pass, rows, k, v);
    }

    // What sums gave, and all together.
    const i64 first = block.first, own = block.own;
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            int t = (warp * ROW_TILES + r) * 16 + g + 8 * h;
            i64 place = first + t;
            f32 dw = quad_sum(rows.dw[r][h]);
            if (t >= count) continue;
            bool live = is_live(u, place);
            f32 factor = folded && live ? p.folding[unit_places(p, u) + place] : 0;
            bool joins = p.final_open.keys && place >= u.s.open_after;
            i64 later = u.row * p.final_open.most + place - u.s.open_after;
            bool old = place < u.s.open;
            i64 before = u.row * p.initial_open.most + place, token = u.s.k_first + place - u.s.open;
            if (!live) dw = 0;
            f32 dk[2 * KEY_STEPS][2], dv[2 * VALUE_STEPS][2];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
#pragma unroll
                for (int j = 0; j < 2 * KEY_STEPS; ++j) dk[j][e] = live ? rows.dk[r][j][2 * h + e] : 0;
#pragma unroll
                for (int j = 0; j < 2 * VALUE_STEPS; ++j) dv[j][e] = live ? rows.dv[r][j][2 * h + e] : 0;
            }
            if (factor != 0) {
#pragma unroll 1
                for (i64 split = 0; split < p.splits; ++split) {
                    const f32* far = far_of(p, split, blockIdx.z, 0, blockIdx.y, D_KEY + 1 + D_VALUE) + own + t;
                    const i64 line = p.far_tokens;
                    dw += factor * far[D_KEY * line];
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
#pragma unroll
                        for (int j = 0; j < 2 * KEY_STEPS; ++j)
                            if (8 * j < D_KEY) dk[j][e] = fmaf(factor, far[(8 * j + 2 * m + e) * line], dk[j][e]);
#pragma unroll
                        for (int j = 0; j < 2 * VALUE_STEPS; ++j)
                            if (8 * j < D_VALUE) dv[j][e] = fmaf(factor, far[(D_KEY + 1 + 8 * j + 2 * m + e) * line], dv[j][e]);
                    }
                }
            }
#pragma unroll
            for (int j = 0; j < 2 * KEY_STEPS; ++j) {
                if (8 * j >= D_KEY) continue;
                f32(&x)[2] = dk[j];
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    int c = 8 * j + 2 * m + e;
                    if (joins) x[e] += p.final_open.keys[later * D_KEY + c];
                    if (old && p.initial_open.keys) p.initial_open.keys[before * D_KEY + c] = x[e];
                }
                if (!old) *reinterpret_cast<u32*>(row<bf16>(p.dk, u.s.k_batch, u.head, token) + 8 * j + 2 * m) = bf16x2_bits(x[0], x[1]);
            }
#pragma unroll
            for (int j = 0; j < 2 * VALUE_STEPS; ++j) {
                if (8 * j >= D_VALUE) continue;
                f32(&x)[2] = dv[j];
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    int c = 8 * j + 2 * m + e;
                    if (joins) x[e] += p.final_open.values[later * D_VALUE + c];
                    if (old && p.initial_open.keys) p.initial_open.values[before * D_VALUE + c] = x[e];
                }
                if (!old) *reinterpret_cast<u32*>(row<bf16>(p.dv, u.s.k_batch, u.head, token) + 8 * j + 2 * m) = bf16x2_bits(x[0], x[1]);
            }
            if (FADES && m == 0) {
                f64 by_fading = dw;
                if (joins) by_fading += p.final_open.fading[later];
                p.dw[unit_places(p, u) + place] = by_fading;
                if (old && p.initial_open.keys) p.initial_open.fading[before] = by_fading;
            }
        }
    }
}
