// Gradients by queries: one block walks with S, the sums of keys before a chunk, from an item's first chunk to its last.
// A warp has 16 queries: N̂ from sums and from the keys since, ĝ from that, then dq from both again. Leaves 1/D and the
// last element of ĝ for the keys' turn.
// Grid: items, key/value heads. Bytes: q, k, v, dy, dq once, 8 per query. See stream_backward.cuh.
#include "stream_backward.cuh"

constexpr int SLOTS = LAG + 2;
struct Shared {
    bf16 table[TILES * 16 * COLUMN_STRIDE];
    bf16 keys[SLOTS][CHUNK * KEY_STRIDE];
    bf16 columns[SLOTS][CHUNK * COLUMN_STRIDE];
    bf16 turned[D_KEY * TURNED_STRIDE];
    bf16 queries[2][CHUNK * KEY_STRIDE];
    bf16 dy[2][CHUNK * COLUMN_STRIDE];
    bf16 scaled[FADES ? CHUNK * COLUMN_STRIDE : 8];
    f32 logs[SLOTS][LOGS ? CHUNK : 4];
    f32 factors[(2 * TILES + 3) / 4 * 4];
    f32 by[CHUNK];
    f32 sums[STASH ? SET : 4];
    f32 room[ROW_TILES * (ROOM > 0 ? ROOM : 4)];
    Place place;
};
SAME_SIZE(Shared, QUERY_SHARED);

DEVICE void fetch_chunk(const Walk& p, const Place& u, Shared& s, int chunk, bool fresh) {
    const int slot = chunk % SLOTS, first = chunk * CHUNK;
    fetch_keys(s.keys[slot], u.k, first, u.at.tokens);
    fetch_values(s.columns[slot], u.v, first, u.at.tokens);
    if (fresh || first + CHUNK > u.at.tokens) put_ones(s.columns[slot], first, u.at.tokens);
    if constexpr (LOGS) {
        const f64 mark = mark_of(p, u.at, u.head, chunk);
        for (int i = threadIdx.x; i < CHUNK; i += THREADS) s.logs[slot][i] = -log_of(p, u, chunk, i, mark);
    }
}
DEVICE void fetch_rows(const Walk& p, const Place& u, Shared& s, int chunk, int h, int to) {
    const i64 head = u.head * p.group + h;
    fetch_keys(s.queries[to], rows_of(p.q, u.at.q_batch, head, u.at.q_first), chunk * CHUNK, u.at.tokens);
    fetch_values(s.dy[to], rows_of(p.dy, u.at.q_batch, head, u.at.q_first), chunk * CHUNK, u.at.tokens);
}

extern "C" __global__ void __launch_bounds__(THREADS, QUERY_BLOCKS) stream_backward_queries(const __grid_constant__ Walk p) {
    DYNAMIC_SHARED(raw);
    Shared& s = *reinterpret_cast<Shared*>(raw);
    const Place& u = s.place;
    find_place(p, s.place);
    // The warp's 16 rows, and which part of them.
    const int warp = threadIdx.x / 32 % ROW_TILES, part = threadIdx.x / 32 / ROW_TILES;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    f32* room = s.room + warp * ROOM;
    Sums sums;
    clear_sums(sums);
    if (u.at.first > LAG) load_sums(sums, sums_at(p, u.head, u.at.slot));
    if constexpr (STASH) store_sums(sums, s.sums);
    make_factors(p, s.factors);
    // Columns of dy beyond its own stay 0.
    for (int i = threadIdx.x; i < 2 * CHUNK * COLUMN_STRIDE; i += THREADS) s.dy[0][i].bits = 0;
    __syncthreads();
    for (int chunk = max(0, u.at.first - LAG); chunk <= u.at.first; chunk++) fetch_chunk(p, u, s, chunk, true);
    fetch_rows(p, u, s, u.at.first, 0, 0);
    copy_async_commit();

    int chunk = u.at.first, h = 0;
    const int steps = (u.at.end - u.at.first) * p.group;
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
        const int buffer = step & 1, summed = chunk - LAG;
        copy_async_wait<0>();
        __syncthreads();
        if (step + 1 < steps) {
            const bool next = h + 1 == p.group;
            if (next) fetch_chunk(p, u, s, chunk + 1, chunk < u.at.first + SLOTS);
            fetch_rows(p, u, s, chunk + (next ? 1 : 0), next ? 0 : h + 1, buffer ^ 1);
        }
        copy_async_commit();
        const f64 mark = mark_of(p, u.at, u.head, chunk);
        const f64 sums_mark = LAG > 0 ? mark_of(p, u.at, u.head, max(summed, 0)) : mark;
        const f64 next_mark = mark_of(p, u.at, u.head, max(summed, 0) + 1);
        if (h == 0) {
            if constexpr (STASH) load_sums(sums, s.sums);
            show_sums(sums, s.table, s.factors);
            if (summed >= 0) {
                const int slot = summed % SLOTS;
                turn(s.turned, s.keys[slot]);
                if constexpr (FADES) {
                    for (int i = threadIdx.x; i < CHUNK; i += THREADS) {
                        s.by[i] = exp2_of(s.logs[slot][i] + f32(next_mark - sums_mark) * LOG2_E);
                    }
                    __syncthreads();
                    scale_columns(s.scaled, s.columns[slot], s.by);
                }
            }
            __syncthreads();
        }

        const bool has_sums = summed > 0;
        const int first = chunk * CHUNK + warp * 16;
        const Rotated x = rotated_rows(s.queries[buffer] + warp * 16 * KEY_STRIDE);
        // Goes through what is weighed one by one.
        Logs logs;
        auto pairs = [&](auto&& of) {
#pragma unroll 1
            for (int other = LAG > 0 ? max(0, summed) : chunk; other <= chunk; other++) {
                const int slot = other % SLOTS;
                logs.all = LAG > 0 && FADES ? f32(mark - mark_of(p, u.at, u.head, other)) * LOG2_E : 0.0f;
                const int tiles = other == chunk ? warp + 1 : ROW_TILES;
#pragma unroll 1
                for (int tile = part; tile < tiles; tile += SPLIT) {
                    const bf16* keys = s.keys[slot] + tile * 16 * KEY_STRIDE;
                    const bf16* columns = s.columns[slot] + tile * 16 * COLUMN_STRIDE;
                    const Cut cut = other == chunk && tile == warp ? COLUMNS_UP_TO_ROW : WHOLE;
                    const bool exact = is_near(p, first, other * CHUNK + tile * 16);
                    logs.column = s.logs[slot] + (LOGS ? tile * 16 : 0);
                    f32 of_pairs[2][4];
                    logits(of_pairs, x, keys);
                    of(of_pairs, keys, columns, cut, exact);
                }
            }
        };
        f32 shift[2] = {0, 0};
        if constexpr (LOGS) {
#pragma unroll
            for (int r = 0; r < 2; r++) logs.row[r] = log_of(p, u, chunk, warp * 16 + g + 8 * r, mark);
        }
        if constexpr (NEAR) {
            // The largest near logit, but no less than leaves far weights finite.
            shift[0] = shift[1] = has_sums ? -60.0f : -3e38f;
            pairs([&](const f32 (&z)[2][4], const bf16*, const bf16*, Cut cut, bool exact) {
                if (!exact) {
                    shift[0] = fmaxf(shift[0], -60.0f), shift[1] = fmaxf(shift[1], -60.0f);
                    return;
                }
#pragma unroll
                for (int n = 0; n < 2; n++) {
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        const int column = 8 * n + 2 * t + j % 2;
                        if (cut == WHOLE || column <= g + j / 2 * 8) shift[j / 2] = fmaxf(shift[j / 2], z[n][j] * p.scale);
                    }
                }
            });
#pragma unroll
            for (int r = 0; r < 2; r++) {
                shift[r] = fmaxf(shift[r], __shfl_xor_sync(0xffffffffu, shift[r], 1));
                shift[r] = fmaxf(shift[r], __shfl_xor_sync(0xffffffffu, shift[r], 2));
            }
            share_largest(shift, room, part);
#pragma unroll
            for (int r = 0; r < 2; r++) logs.row[r] -= shift[r] * LOG2_E;
        }
        f32 far[2] = {1, 1};
        if constexpr (LOGS) {
#pragma unroll
            for (int r = 0; r < 2; r++) far[r] = exp2_of(logs.row[r] + f32(mark - sums_mark) * LOG2_E);
        }

        f32 c[COLUMN_TILES][4];
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n++) c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0;
        if (has_sums) {
            read_sums(c, x, s.table, part);
            if constexpr (LOGS) {
#pragma unroll
                for (int n = 0; n < COLUMN_TILES; n++) {
#pragma unroll
                    for (int j = 0; j < 4; j++) c[n][j] *= far[j / 2];
                }
            }
        }
        pairs([&](const f32 (&z)[2][4], const bf16*, const bf16* columns, Cut cut, bool exact) {
            f32 w[2][4];
            weigh<false>(p, w, z, logs, cut, exact);
            weigh_columns(c, w, columns);
        });

        gather(c, room, part);

        // From N̂ to ĝ. What is rounded of dy/D is so in the last element, too: ĝ·N̂ stays 0.
        constexpr int TAIL_TILE = D_VALUE / 8, TAIL_LANE = D_VALUE % 8 / 2, TAIL = D_VALUE % 2;
        constexpr int REST_TILE = (D_VALUE + 1) / 8, REST_LANE = (D_VALUE + 1) % 8 / 2, REST = (D_VALUE + 1) % 2;
        f32 inverse[2], dot[2] = {0, 0};
#pragma unroll
        for (int r = 0; r < 2; r++) {
            inverse[r] = 1.0f / __shfl_sync(0xffffffffu, c[TAIL_TILE][2 * r + TAIL], (lane & ~3) | TAIL_LANE);
            if (first + g + 8 * r >= u.at.tokens) inverse[r] = 0;
        }
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n++) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const bf16* from = s.dy[buffer] + (warp * 16 + g + 8 * r) * COLUMN_STRIDE + 8 * n + 2 * t;
                const u32 dy = *reinterpret_cast<const u32*>(from);
                const u32 by = bf16x2_bits(low_of(dy) * inverse[r], high_of(dy) * inverse[r]);
                // Where dy has no column, what is left of N̂ is not looked at.
                const bool low = 8 * n + 2 * t < D_VALUE, high = 8 * n + 2 * t + 1 < D_VALUE;
                dot[r] += (low ? low_of(by) * c[n][2 * r] : 0.0f) + (high ? high_of(by) * c[n][2 * r + 1] : 0.0f);
                c[n][2 * r] = low_of(by);
                c[n][2 * r + 1] = high_of(by);
            }
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            dot[r] += __shfl_xor_sync(0xffffffffu, dot[r], 1);
            dot[r] += __shfl_xor_sync(0xffffffffu, dot[r], 2);
            const f32 tail = -dot[r] * inverse[r];
            if (t == TAIL_LANE) c[TAIL_TILE][2 * r + TAIL] = tail;
            if (t == REST_LANE) c[REST_TILE][2 * r + REST] = rest_of(tail);
            if (part == 0 && t == 0 && first + g + 8 * r < u.at.tokens) {
                const i64 at = query_at(p, u, h) + first + g + 8 * r;
                p.inverse[at] = inverse[r];
                p.tail[at] = tail;
                if constexpr (NEAR) p.shift[at] = shift[r];
            }
        }
        Left left = left_of(c);
        share(left, room, part);
        f32 dq[KEY_TILES][4];
#pragma unroll
        for (int n = 0; n < KEY_TILES; n++) dq[n][0] = dq[n][1] = dq[n][2] = dq[n][3] = 0;
        if (has_sums) {
            read_slopes(dq, x, left, s.table, part);
            if constexpr (LOGS) {
#pragma unroll
                for (int n = 0; n < KEY_TILES; n++) {
#pragma unroll
                    for (int j = 0; j < 4; j++) dq[n][j] *= far[j / 2];
                }
            }
        }
        pairs([&](const f32 (&z)[2][4], const bf16* keys, const bf16* columns, Cut cut, bool exact) {
            f32 w[2][4], d[2][4];
            weigh<true>(p, w, z, logs, cut, exact);
            by_weights(d, left, columns);
#pragma unroll
            for (int n = 0; n < 2; n++) {
#pragma unroll
                for (int j = 0; j < 4; j++) w[n][j] *= d[n][j];
            }
            weigh_keys(dq, w, keys);
        });
        gather(dq, room, part);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int token = first + g + 8 * r;
            if (part == 0 && token < u.at.tokens) {
                bf16* to = row<bf16>(p.dq, u.at.q_batch, u.head * p.group + h, u.at.q_first + token) + 2 * t;
#pragma unroll
                for (int n = 0; n < KEY_TILES; n++) {
                    *reinterpret_cast<u32*>(to + 8 * n) = bf16x2_bits(dq[n][2 * r], dq[n][2 * r + 1]);
                }
            }
        }

        if (++h == p.group) {
            if (summed >= 0) {
                const bf16* columns = FADES ? s.scaled : s.columns[summed % SLOTS];
                if constexpr (STASH) load_sums(sums, s.sums);
                if constexpr (FADES) fade_sums(sums, exp2_of(f32(next_mark - sums_mark) * LOG2_E));
                add_sums(sums, s.turned, columns);
                if constexpr (STASH) store_sums(sums, s.sums);
            }
            h = 0;
            chunk++;
        }
    }
}
