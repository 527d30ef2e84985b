// Queries weigh what is raw, and have all their gradients: backward_queries.cu for bf16 on matrix units.
//
// With w = exp(g_own - g_s - shift) kappa(x), u_s = dy.v_s - c for some number c of each query, and w' = w, or exp(...)
// kappa'(x) where kappa is the polynomial:
//
//     D = sum w,  e = sum w u / D,  delta = c + e,  dq = scale/D . (sum w' u k - e sum w' k)
//
// in one pass over the keys of the window, sinks, and what sums gave (backward_read). c is the mean of dy.v over the first
// 16 keys that pass, so that what values have in common is not lost when w' u is rounded to bf16.
//
// Grid: (heads of a group) . (tiles of ROWS queries, the last first), chunks at work, units at work. Block: WARPS warps,
// each has 16 ROW_TILES queries in registers; tiles of keys and values pass through shared memory.
// Leaves dq, and shift, 1/D, delta and the sums' factor of each query.
// Bytes: the window's keys and values once per tile (from L2). FLOPs: 2 (3 D_KEY + D_VALUE) per pair.
#include "matrix_backward.cuh"

struct Stage {
    bf16 keys[TILE * KEY_PITCH];
    bf16 values[TILE * VALUE_PITCH];
    f64 g[TILE];
    i32 live[TILE];  // live[place + 1] of the window; of sinks 1 or 0
};
struct Shared {
    Stage stages[STAGES];
    // The block's: its queries' head and the first of them, counted in the call and in the chunk; where the window begins.
    i64 head, first, first_read, fold;
    float2 own[ROWS];          // g at the last token that each query sees
    i32 limit[ROWS];           // far are the keys before this, counted from the first query's place
    float2 g[WARPS][TILE];     // of the keys of the tile, for each warp
    f32 fading[WARPS][TILE];
};
SAME_SIZE(Shared, SHARED_BYTES);
static_assert(STAGES * sizeof(Stage) >= ROWS * (KEY_PITCH + VALUE_PITCH) * 2, "queries fit where stages will be");

// What a thread has of its rows.
struct Rows {
    f32 by_sums[ROW_TILES][2 * KEY_STEPS][4], by_z[ROW_TILES][2 * KEY_STEPS][4];
    f32 den[ROW_TILES][2], dot[ROW_TILES][2], common[ROW_TILES][2];
    f32 level[ROW_TILES][2];  // what weights are relative to

    DEVICE void scale(int r, int h, f32 factor) {
        den[r][h] *= factor;
        dot[r][h] *= factor;
#pragma unroll
        for (int j = 0; j < 2 * KEY_STEPS; ++j) {
#pragma unroll
            for (int e = 2 * h; e < 2 * h + 2; ++e) by_sums[r][j][e] *= factor, by_z[r][j][e] *= factor;
        }
    }
};

// Where the tile of keys lies that passes.
struct Pass {
    i32 first;   // its first key, counted from the first query's place
    int count;   // of keys
    bool sinks;
};

// What the 16 keys from `at` on weigh: x and u become w' u and w'.
template <bool PLAIN>
DEVICE void weigh(const Backward& p, const Polynomial& polynomial, Shared& shared, const Stage& stage, const Pass& pass, Rows& rows, int at, bool first,
                  const f32 (&row_factor)[ROW_TILES][2], f32 (&x)[ROW_TILES][2][4], f32 (&u)[ROW_TILES][2][4]) {
    int lane = lane_of_warp(), warp = threadIdx.x / 32, g = lane / 4, m = lane % 4;
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
        if constexpr (PLAIN) {
            if (first) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    f32 sum = u[r][0][2 * h] + u[r][0][2 * h + 1] + u[r][1][2 * h] + u[r][1][2 * h + 1];
                    rows.common[r][h] = quad_sum(sum) / 16;
                }
            }
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                float2 fading = make_float2(1, 1);
                if (FADES) fading = *reinterpret_cast<const float2*>(&shared.fading[warp][at + 8 * j + 2 * m]);
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    f32 slope, w = polynomial(x[r][j][e], slope);
                    if (FADES) {
                        f32 factor = row_factor[r][e / 2] * (e % 2 ? fading.y : fading.x);
                        w *= factor;
                        slope *= factor;
                    }
                    f32 by = u[r][j][e] - rows.common[r][e / 2];
                    rows.den[r][e / 2] += w;
                    rows.dot[r][e / 2] = fmaf(w, by, rows.dot[r][e / 2]);
                    u[r][j][e] = slope;
                    x[r][j][e] = slope * by;
                }
            }
        } else {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                int row = (warp * ROW_TILES + r) * 16 + g + 8 * h;
                i32 place = CAUSAL ? row : NOWHERE - 1;
                i32 limit = pass.sinks ? -NOWHERE : shared.limit[row];
                float2 own = shared.own[row];
                f32 level = rows.level[r][h], highest = level;
                f32 log[4];
                bool seen[4], near[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    int t = at + 8 * (i / 2) + 2 * m + i % 2;
                    i32 key = pass.first + t;
                    seen[i] = shared.fading[warp][t] != 0 && key <= place;
                    near[i] = key >= limit;
                    log[i] = FADES ? difference(own, shared.g[warp][t]) : 0;
                    f32 logit = fmaf(p.scale, x[r][i / 2][2 * h + i % 2], log[i]);
                    if (near[i] && seen[i]) highest = fmaxf(highest, logit);
                }
                if (first) {
                    f32 sum = 0, many = 0;
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        if (seen[i]) sum += u[r][i / 2][2 * h + i % 2], many += 1;
                    }
                    sum = quad_sum(sum), many = quad_sum(many);
                    rows.common[r][h] = many > 0 ? sum / many : 0;
                }
                highest = quad_max(highest);
                if (highest > level) {
                    rows.scale(r, h, exp2_fast((level - highest) * LOG2E));
                    rows.level[r][h] = highest;
                }
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    f32 &to_x = x[r][i / 2][2 * h + i % 2], &to_u = u[r][i / 2][2 * h + i % 2];
                    f32 weight = 0, slope = 0;
                    if (seen[i]) {
                        if (near[i]) {
                            weight = exp2_fast((fmaf(p.scale, to_x, log[i]) - highest) * LOG2E);
                            slope = weight * p.scale;
                        } else {
                            f32 fading = exp2_fast((log[i] - highest) * LOG2E);
                            weight = fading * polynomial(to_x, slope);
                            slope *= fading;
                        }
                    }
                    f32 by = to_u - rows.common[r][h];
                    rows.den[r][h] += weight;
                    rows.dot[r][h] = fmaf(weight, by, rows.dot[r][h]);
                    to_u = slope;
                    to_x = slope * by;
                }
            }
        }
    }
}

// A tile of keys passes.
template <bool PLAIN>
DEVICE void pass_keys(const Backward& p, const Polynomial& polynomial, Shared& shared, const Stage& stage, const Pass& pass, Rows& rows, bool first,
                      const u32 (&q)[ROW_TILES][KEY_STEPS][4], const u32 (&dy)[ROW_TILES][VALUE_STEPS][4]) {
    int lane = lane_of_warp(), warp = threadIdx.x / 32, g = lane / 4;
    const bf16* keys = stage.keys + place_of_b<KEY_PITCH>(lane);
    const bf16* values = stage.values + place_of_b<VALUE_PITCH>(lane);
    const bf16* keys_transposed = stage.keys + place_of_b_transposed<KEY_PITCH>(lane);
    f32 row_factor[ROW_TILES][2];
    if (FADES || !PLAIN) {
        // Every warp for itself.
        float2 end = split(FADES ? stage.g[pass.count - 1] : 0);
#pragma unroll
        for (int i = 0; i < TILE; i += 32) {
            int t = i + lane;
            if (FADES) {
                float2 own = split(t < pass.count ? stage.g[t] : 0);
                shared.g[warp][t] = own;
                if (PLAIN) shared.fading[warp][t] = exp2_fast(difference(end, own) * LOG2E);
            }
            if (!PLAIN) shared.fading[warp][t] = stage.live[t];
        }
        __syncwarp();
        if (PLAIN) {
#pragma unroll
            for (int r = 0; r < ROW_TILES; ++r) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    int row = (warp * ROW_TILES + r) * 16 + g + 8 * h;
                    row_factor[r][h] = exp2_fast((difference(shared.own[row], end) - rows.level[r][h]) * LOG2E);
                }
            }
        }
    }
#pragma unroll (PLAIN ? UNROLLED : 1)
    for (int at = 0; at < TILE; at += 16) {
        f32 x[ROW_TILES][2][4], u[ROW_TILES][2][4];
        multiply_rows(x, q, keys + at * KEY_PITCH);
        multiply_rows(u, dy, values + at * VALUE_PITCH);
        weigh<PLAIN>(p, polynomial, shared, stage, pass, rows, at, first && at == 0, row_factor, x, u);
        u32 wu[ROW_TILES][4], w[ROW_TILES][4];
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r) round_to(wu[r], x[r]), round_to(w[r], u[r]);
#pragma unroll
        for (int n = 0; n < KEY_STEPS; ++n) {
            u32 word[4];
            load_matrices_transposed(word, keys_transposed + at * KEY_PITCH + 16 * n);
#pragma unroll
            for (int r = 0; r < ROW_TILES; ++r) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    multiply(rows.by_sums[r][2 * n + h], wu[r], word[2 * h], word[2 * h + 1]);
                    multiply(rows.by_z[r][2 * n + h], w[r], word[2 * h], word[2 * h + 1]);
                }
            }
        }
    }
}

// Keys from place `first` on, and what is to know of them.
DEVICE void load_keys(const Backward& p, const Unit& u, Stage& stage, i64 first, int count) {
    if (first >= u.s.open) {
        i64 token = u.s.k_first + first - u.s.open;
        load_rows<D_KEY, KEY_COLUMNS, KEY_PITCH, TILE>(stage.keys, row<const bf16>(p.k, u.s.k_batch, u.head, token), p.k.token, count);
        load_rows<D_VALUE, VALUE_COLUMNS, VALUE_PITCH, TILE>(stage.values, row<const bf16>(p.v, u.s.k_batch, u.head, token), p.v.token, count);
    } else {
        put_rows<D_KEY, KEY_COLUMNS, KEY_PITCH>(stage.keys, TILE, count, [&](int t, int i) { return key_at(p, u, first + t, i); });
        put_rows<D_VALUE, VALUE_COLUMNS, VALUE_PITCH>(stage.values, TILE, count, [&](int t, int i) { return value_at(p, u, first + t, i); });
    }
    load_numbers(stage.live, u.live + first + 1, count);
    if (FADES) load_numbers(stage.g, u.g + first, count);
}
DEVICE void load_sinks(const Backward& p, const Unit& u, Stage& stage, i64 first, int count) {
    put_rows<D_KEY, KEY_COLUMNS, KEY_PITCH>(stage.keys, TILE, count, [&](int t, int i) { return sink_key_at(p, u, first + t, i); });
    put_rows<D_VALUE, VALUE_COLUMNS, VALUE_PITCH>(stage.values, TILE, count, [&](int t, int i) { return sink_value_at(p, u, first + t, i); });
    for (int t = threadIdx.x; t < TILE; t += THREADS) {
        bool live = t < count && sink_is_live(p, u, first + t);
        stage.live[t] = live;
        if (FADES) stage.g[t] = live ? sink_g(p, u, first + t) : 0;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) matrix_backward_queries(const __grid_constant__ Backward p) {
    DYNAMIC_SHARED(memory);
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    UNIT(u, p.first_unit + blockIdx.z);
    i64 chunk = p.first_chunk + blockIdx.y;
    if (chunk >= u.s.reads) return;
    Read read = p.reads[u.s.reads_at + chunk];
    {
        i64 tiles = (p.far_tokens + ROWS - 1) / ROWS, own = (tiles - 1 - blockIdx.x % tiles) * ROWS;
        if (read.first + own >= read.end) return;
        // Registers are scarce until all keys have passed.
        if (threadIdx.x == 0) {
            shared.head = blockIdx.x / tiles;
            shared.first = read.first + own;
            shared.first_read = own;
            shared.fold = fold_of_read(p, u, chunk);
        }
        __syncthreads();
    }
    volatile const Shared& block = shared;
    const int count = int(min(i64(ROWS), read.end - block.first));
    const int lane = lane_of_warp(), warp = threadIdx.x / 32, g = lane / 4, m = lane % 4;
    Polynomial polynomial;
    polynomial.load(p);

    // Queries and dy, through the stages, to registers.
    u32 q[ROW_TILES][KEY_STEPS][4], dy[ROW_TILES][VALUE_STEPS][4];
    {
        i64 first = block.first, head = block.head, from = place_of(u, first);
        bf16 *queries = reinterpret_cast<bf16*>(memory), *gradients = queries + ROWS * KEY_PITCH;
        i64 query_head = u.head * p.group + head, token = u.s.q_first + first;
        load_rows<D_KEY, KEY_COLUMNS, KEY_PITCH, ROWS>(queries, row<const bf16>(p.q, u.s.q_batch, query_head, token), p.q.token, count);
        load_rows<D_VALUE, VALUE_COLUMNS, VALUE_PITCH, ROWS>(gradients, row<const bf16>(p.dy, u.s.q_batch, query_head, token), p.dy.token, count);
        copy_async_commit();
        for (int t = threadIdx.x; t < ROWS; t += THREADS) {
            i64 place = place_of(u, first + min(t, count - 1));
            shared.own[t] = split(FADES ? p.own[unit_places(p, u) + place + 1] : 0);
            shared.limit[t] = place_from(far_until(p, place), from);
        }
        copy_async_wait<0>();
        __syncthreads();
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r) {
            int at = (warp * ROW_TILES + r) * 16;
#pragma unroll
            for (int k = 0; k < KEY_STEPS; ++k) load_matrices(q[r][k], queries + at * KEY_PITCH + place_of_a<KEY_PITCH>(lane) + 16 * k);
#pragma unroll
            for (int k = 0; k < VALUE_STEPS; ++k) load_matrices(dy[r][k], gradients + at * VALUE_PITCH + place_of_a<VALUE_PITCH>(lane) + 16 * k);
        }
        __syncthreads();
    }
    Rows rows;
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            rows.den[r][h] = rows.dot[r][h] = rows.common[r][h] = 0;
            i64 place = place_of(u, block.first + min((warp * ROW_TILES + r) * 16 + g + 8 * h, count - 1));
            // All that is far is relative to the last that is far at first.
            f64 anchor, seen = FADES ? p.own[unit_places(p, u) + place + 1] : 0;
            rows.level[r][h] = !mark_of(u, far_until(p, place), anchor) ? NOTHING : FADES ? fmaxf(f32(seen - anchor), NOTHING) : 0;
        }
#pragma unroll
        for (int j = 0; j < 2 * KEY_STEPS; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) rows.by_sums[r][j][e] = rows.by_z[r][j][e] = 0;
        }
    }

    // The window, then sinks. Places are less than 2^30.
    const i32 begin = i32(block.fold), from = i32(place_of(u, block.first)), last = i32(place_of(u, block.first + count - 1));
    const i32 window = max(last + 1 - begin, 0), sinks = i32(sinks_before(p, u, last + 1));
    const i32 window_tiles = (window + TILE - 1) / TILE, all = window_tiles + (sinks + TILE - 1) / TILE;
    const i32 plain_until = i32(min(far_until(p, from), i64(from) + 1)) - from;
    auto load = [&](int n) {
        Stage& stage = shared.stages[n % STAGES];
        if (n < window_tiles) load_keys(p, u, stage, begin + n * TILE, min(TILE, window - n * TILE));
        else if (n < all) load_sinks(p, u, stage, (n - window_tiles) * TILE, min(TILE, sinks - (n - window_tiles) * TILE));
        copy_async_commit();
    };
    load(0);
#pragma unroll 1
    for (int n = 0; n < all; ++n) {
        copy_async_wait<0>();
        __syncthreads();
        load(n + 1);
        Stage& stage = shared.stages[n % STAGES];
        Pass pass;
        pass.sinks = n >= window_tiles;
        i32 at = (pass.sinks ? n - window_tiles : n) * TILE;
        pass.count = min(TILE, (pass.sinks ? sinks : window) - at);
        pass.first = (pass.sinks ? place_from(place_of_sink(u, at), 0) : begin + at) - from;
        bool plain = false;
        if (!pass.sinks) {
            bool low = stage.live[lane] == begin + at + lane + 1, high = stage.live[lane + 32] == begin + at + lane + 33;
            plain = pass.first + TILE <= plain_until && __all_sync(0xffffffffu, low && high);
            if (!plain) {
                // As of sinks: 1 or 0.
                __syncthreads();
                if (warp == 0) stage.live[lane] = low, stage.live[lane + 32] = high;
                __syncthreads();
            }
        }
        if (plain) pass_keys<true>(p, polynomial, shared, stage, pass, rows, n == 0, q, dy);
        else pass_keys<false>(p, polynomial, shared, stage, pass, rows, n == 0, q, dy);
    }

    // What sums gave, and all together.
    const i64 first = block.first, own = block.first_read, head = block.head, fold = block.fold;
    f64 mark, seen;
    bool has_sums = mark_of(u, fold, mark);
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            int t = (warp * ROW_TILES + r) * 16 + g + 8 * h;
            i64 query = first + t, place = place_of(u, query);
            f32 den = quad_sum(rows.den[r][h]), dot = quad_sum(rows.dot[r][h]);
            f32 common = rows.common[r][h], level = rows.level[r][h], factor = 0;
            bool there = query < read.end, sees = there && own_of(p, u, place, seen);
            if (f64 anchor; there && has_sums && mark_of(u, far_until(p, place), anchor)) {
                f64 g_own = FADES ? p.own[unit_places(p, u) + place + 1] : 0;
                factor = exp2_fast((FADES ? f32(g_own - mark) - level : -level) * LOG2E);
                constexpr int FAR_ROWS = 2 * D_KEY + 2;
                for (i64 split = 0; split < p.splits; ++split) {
                    const f32* sums = far_of(p, split, blockIdx.z, head, blockIdx.y, FAR_ROWS) + own + t;
                    f32 far_den = factor * sums[(2 * D_KEY + 1) * p.far_tokens];
                    den += far_den;
                    dot += factor * sums[2 * D_KEY * p.far_tokens] - common * far_den;
#pragma unroll
                    for (int j = 0; j < 2 * KEY_STEPS; ++j) {
#pragma unroll
                        for (int e = 0; e < 2; ++e) {
                            int c = 8 * j + 2 * m + e;
                            if (c >= D_KEY) continue;
                            // Those rows are by elements of the scaled query.
                            f32 by_z = p.scale * factor * sums[(D_KEY + c) * p.far_tokens];
                            rows.by_z[r][j][2 * h + e] += by_z;
                            rows.by_sums[r][j][2 * h + e] += p.scale * factor * sums[c * p.far_tokens] - common * by_z;
                        }
                    }
                }
            }
            if (!there) continue;
            f32 inverse = sees ? 1 / den : 0, excess = dot * inverse;
            u32* dq = reinterpret_cast<u32*>(row<bf16>(p.dq, u.s.q_batch, u.head * p.group + head, u.s.q_first + query));
#pragma unroll
            for (int j = 0; j < 2 * KEY_STEPS; ++j) {
                if (8 * j >= D_KEY) continue;
                f32 x[2];
#pragma unroll
                for (int e = 0; e < 2; ++e) x[e] = inverse * (rows.by_sums[r][j][2 * h + e] - excess * rows.by_z[r][j][2 * h + e]);
                dq[4 * j + m] = bf16x2_bits(x[0], x[1]);
            }
            if (m == 0) {
                i64 at = unit_queries(p, u, head) + query;
                p.shift[at] = level;
                p.inverse[at] = inverse;
                p.delta[at] = common + excess;
                bool reads = inverse != 0 && mark_of(u, fold, mark);
                p.reading[at] = reads ? expf(FADES ? f32(seen - mark) - level : -level) * inverse : 0;
            }
        }
    }
}
