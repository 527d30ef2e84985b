// Gradients by queries: one block walks with S, the sums of keys before a chunk, from an item's first chunk to its last.
// A warp has 16 queries: N̂ from sums and from the keys since, ĝ from that, then dq from both again. Leaves 1/D and the
// last element of ĝ for the keys' turn.
// Grid: items, key/value heads. Bytes: q, k, v, dy, dq once, 8 per query. See stream_backward.cuh.
#include "stream_backward.cuh"

constexpr int SLOTS = LAG + 2;
// Where a warp is: a chunk of one query head, which of two buffers. In memory, for that takes no registers.
struct State {
    int chunk, h, buffer, unused;
};
struct Shared {
    bf16 table[BASES * TABLE];
    bf16 keys[SLOTS][CHUNK * KEY_STRIDE];
    bf16 columns[SLOTS][CHUNK * COLUMN_STRIDE];
    bf16 turned[D_KEY * TURNED_STRIDE];
    bf16 queries[2][CHUNK * KEY_STRIDE];
    bf16 dy[2][CHUNK * COLUMN_STRIDE];
    bf16 scaled[FADES ? CHUNK * COLUMN_STRIDE : 8];
    f32 logs[SLOTS][LOGS ? CHUNK : 4];
    f32 factors[(2 * TILES + 3) / 4 * 4];
    f64 g[SLOTS][OF_G];
    State state[WARPS];
    f32 sums[STASH ? SET : 4];
    f32 room[GROUPS * ROOM];
    Place place;
};
SAME_SIZE(Shared, QUERY_SHARED);

DEVICE void fetch_chunk(const Walk& p, const Place& u, Shared& s, int chunk, bool fresh) {
    const int slot = chunk % SLOTS, first = chunk * CHUNK;
    fetch_keys(s.keys[slot], u.k, first, u.at.tokens);
    fetch_values(s.columns[slot], u.v, first, u.at.tokens);
    if (fresh || first + CHUNK > u.at.tokens) put_ones(s.columns[slot], first, u.at.tokens);
    fetch_g(s.g[slot], u, chunk);
}
// Logarithms of a chunk's keys, whose sign is that of what they have yet to fade.
DEVICE void find_logs(const Place& u, Shared& s, int chunk) {
    const int slot = chunk % SLOTS;
    spread<CHUNK>([&](int i) { s.logs[slot][i] = FADES && chunk * CHUNK + i < u.at.tokens ? -log_of(s.g[slot], i) : 0.0f; });
}
DEVICE void fetch_rows(const Walk& p, const Place& u, Shared& s, int chunk, int h, int to) {
    fetch_keys(s.queries[to], later_head(u.q, h * p.q.head), chunk * CHUNK, u.at.tokens);
    fetch_values(s.dy[to], later_head(u.dy, h * p.dy.head), chunk * CHUNK, u.at.tokens);
}

extern "C" __global__ void __launch_bounds__(THREADS, QUERY_BLOCKS) stream_backward_queries(const __grid_constant__ Walk p) {
    DYNAMIC_SHARED(raw);
    Shared& s = *reinterpret_cast<Shared*>(raw);
    const Place& u = s.place;
    find_place(p, s.place);
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

    State state{u.at.first, 0, 0, 0};
    auto set_state = [&](State next) {
        if constexpr (KEEPS) {
            state = next;
        } else {
            __syncwarp();
            if (lane_now() == 0) s.state[warp_now()] = next;
            __syncwarp();
        }
    };
    auto state_now = [&] {
        if constexpr (KEEPS) return state;
        const volatile State& at = s.state[warp_now()];
        return State{at.chunk, at.h, at.buffer, 0};
    };
    set_state(state);
#pragma unroll 1
    while (state_now().chunk < u.at.end) {
        copy_async_wait<0>();
        __syncthreads();
        const State now = state_now();
        const int chunk = now.chunk, h = now.h, buffer = now.buffer, summed = chunk - LAG;
        const bool next = h + 1 == p.group;
        if (!next || chunk + 1 < u.at.end) {
            if (next) fetch_chunk(p, u, s, chunk + 1, chunk < u.at.first + SLOTS);
            fetch_rows(p, u, s, next ? chunk + 1 : chunk, next ? 0 : h + 1, buffer ^ 1);
        }
        copy_async_commit();
        if (h == 0) {
            if constexpr (STASH) load_sums(sums, s.sums);
            show_sums(sums, s.table, s.factors);
            if constexpr (LOGS) {
                for (int other = chunk == u.at.first ? max(0, summed) : chunk; other <= chunk; other++) find_logs(u, s, other);
            }
            if (summed >= 0 && chunk + 1 < u.at.end) {
                const int slot = summed % SLOTS;
                turn(s.turned, s.keys[slot]);
                if constexpr (FADES) fade_columns(s.scaled, s.columns[slot], s.g[slot]);
            }
            __syncthreads();
        }

        const bool has_sums = summed > 0;
        // The warp's rows, rotated.
        Rotated kept;
        if constexpr (KEEPS) kept = rotated_rows(s.queries[buffer] + own_now().rows * KEY_STRIDE, 0);
        auto rows_of_base = [&](int base) {
            if constexpr (KEEPS) return kept;
            return rotated_rows(s.queries[state_now().buffer] + own_now().rows * KEY_STRIDE, base);
        };
        // Goes through what is weighed one by one.
        Logs logs;
        auto pairs = [&](auto&& of) {
            const Own own = own_now();
            const State now = state_now();
            const int chunk = now.chunk, buffer = now.buffer, summed = chunk - LAG;
            const Rotated x = rows_of_base(own.part);
#pragma unroll 1
            for (int other = LAG > 0 ? max(0, summed) : chunk; other <= chunk; other++) {
                const int slot = other % SLOTS;
                logs.all = LAG > 0 && FADES ? f32(s.g[chunk % SLOTS][0] - s.g[slot][0]) * LOG2_E : 0.0f;
                const int tiles = other == chunk ? (own.group + 1) * ROW_TILES : TOKEN_TILES;
#pragma unroll 1
                for (int tile = own.part; tile < tiles; tile += SPLIT) {
                    const bf16* keys = s.keys[slot] + tile * 16 * KEY_STRIDE;
                    const bf16* columns = s.columns[slot] + tile * 16 * COLUMN_STRIDE;
                    Beside beside{WHOLE, own.rows - tile * 16, 0};
                    if (other == chunk && tile >= own.group * ROW_TILES) beside.cut = UP_TO_ROW;
                    if constexpr (NEAR) {
#pragma unroll
                        for (int m = 0; m < ROW_TILES; m++) {
                            if (is_near(p, chunk * CHUNK + own.rows + 16 * m, other * CHUNK + tile * 16)) beside.near |= 1u << m;
                        }
                    }
                    logs.column = s.logs[slot] + (LOGS ? tile * 16 : 0);
                    OfPairs of_pairs;
                    logits(of_pairs, x, keys, own.part);
                    of(of_pairs, keys, columns, beside);
                }
            }
        };
        const Own own = own_now();
        const int lane = own.lane, g = own.g, t = own.t, part = own.part;
        f32* room = s.room + own.group * ROOM;
        f32 shift[ROW_TILES][2], far[ROW_TILES][2];
        if constexpr (LOGS) {
#pragma unroll
            for (int i = 0; i < 2 * ROW_TILES; i++) logs.row[i / 2][i % 2] = log_of(s.g[chunk % SLOTS], own.rows + g + 8 * i);
        }
        if constexpr (NEAR) {
            // The largest near logit, faded, but no less than leaves far weights, faded, finite, and with them what a row is in
            // sums of queries.
            const f32 sums_log = FADES && LAG > 0 ? f32(s.g[chunk % SLOTS][0] - s.g[max(0, summed) % SLOTS][0]) * LOG2_E : 0.0f;
#pragma unroll
            for (int i = 0; i < 2 * ROW_TILES; i++) {
                const f32 row = FADES ? logs.row[i / 2][i % 2] * (1.0f / LOG2_E) : 0.0f;
                shift[i / 2][i % 2] = has_sums ? row + sums_log * (1.0f / LOG2_E) - 60.0f : -3e38f;
            }
            pairs([&](const OfPairs& z, const bf16*, const bf16*, const Beside& beside) {
#pragma unroll
                for (int m = 0; m < ROW_TILES; m++) {
                    const bool near = (beside.near >> m & 1) != 0;
#pragma unroll
                    for (int n = 0; n < 2; n++) {
#pragma unroll
                        for (int j = 0; j < 4; j++) {
                            const int ahead = beside.ahead + 16 * m + g + j / 2 * 8 - (8 * n + 2 * t + j % 2);
                            const f32 row = FADES ? logs.row[m][j / 2] * (1.0f / LOG2_E) : 0.0f;
                            const f32 faded = FADES ? row + (logs.column[8 * n + 2 * t + j % 2] + logs.all) * (1.0f / LOG2_E) : 0.0f;
                            const f32 logit = near ? fmaf(z[m][n][j], p.scale, faded) : faded - 60.0f;
                            if (beside.cut == WHOLE || ahead >= 0) shift[m][j / 2] = fmaxf(shift[m][j / 2], logit);
                        }
                    }
                }
            });
#pragma unroll
            for (int i = 0; i < 2 * ROW_TILES; i++) {
                f32& most = shift[i / 2][i % 2];
                most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
                most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
            }
            share_largest(shift, room, part);
#pragma unroll
            for (int i = 0; i < 2 * ROW_TILES; i++) logs.row[i / 2][i % 2] -= shift[i / 2][i % 2] * LOG2_E;
        }
        if constexpr (LOGS) {
            const f32 all = LAG > 0 && FADES ? f32(s.g[chunk % SLOTS][0] - s.g[max(0, summed) % SLOTS][0]) * LOG2_E : 0.0f;
#pragma unroll
            for (int i = 0; i < 2 * ROW_TILES; i++) far[i / 2][i % 2] = exp2_of(logs.row[i / 2][i % 2] + all);
        }

        OfColumns c;
        clear(c);
        if (has_sums) {
            read_all_sums(c, rows_of_base, s.table, part);
            if constexpr (LOGS) scale(c, far);
        }
        pairs([&](const OfPairs& z, const bf16*, const bf16* columns, const Beside& beside) {
            OfPairs w;
            weigh<false>(p, w, z, logs, beside);
            weigh_columns(c, w, columns);
        });
        gather(c, room, part);

        // From N̂ to ĝ. What is rounded of dy/D is so in the last element, too: ĝ·N̂ stays 0.
        constexpr int TAIL_TILE = D_VALUE / 8, TAIL_LANE = D_VALUE % 8 / 2, TAIL = D_VALUE % 2;
        constexpr int REST_TILE = (D_VALUE + 1) / 8, REST_LANE = (D_VALUE + 1) % 8 / 2, REST = (D_VALUE + 1) % 2;
#pragma unroll
        for (int i = 0; i < 2 * ROW_TILES; i++) {
            const int m = i / 2, r = i % 2, row = chunk * CHUNK + own.rows + g + 8 * i;
            f32 inverse = 1.0f / __shfl_sync(0xffffffffu, c[m][TAIL_TILE][2 * r + TAIL], (lane & ~3) | TAIL_LANE), dot = 0;
            if (row >= u.at.tokens) inverse = 0;
#pragma unroll
            for (int n = 0; n < COLUMN_TILES; n++) {
                const bf16* from = s.dy[buffer] + (own.rows + g + 8 * i) * COLUMN_STRIDE + 8 * n + 2 * t;
                const u32 dy = *reinterpret_cast<const u32*>(from);
                const u32 by = bf16x2_bits(low_of(dy) * inverse, high_of(dy) * inverse);
                // Where dy has no column, what is left of N̂ is not looked at.
                const bool low = 8 * n + 2 * t < D_VALUE, high = 8 * n + 2 * t + 1 < D_VALUE;
                dot += (low ? low_of(by) * c[m][n][2 * r] : 0.0f) + (high ? high_of(by) * c[m][n][2 * r + 1] : 0.0f);
                c[m][n][2 * r] = low_of(by);
                c[m][n][2 * r + 1] = high_of(by);
            }
            dot += __shfl_xor_sync(0xffffffffu, dot, 1);
            dot += __shfl_xor_sync(0xffffffffu, dot, 2);
            const f32 tail = -dot * inverse;
            if (t == TAIL_LANE) c[m][TAIL_TILE][2 * r + TAIL] = tail;
            if (t == REST_LANE) c[m][REST_TILE][2 * r + REST] = rest_of(tail);
            if (part == 0 && t == 0 && row < u.at.tokens) {
                const i64 at = query_at(p, u, h) + row;
                p.inverse[at] = inverse;
                p.tail[at] = tail;
                if constexpr (NEAR) p.shift[at] = shift[m][r];
            }
        }
        Left left = left_of(c);
        share(left, room, part);
        OfKeys dq;
        clear(dq);
        if (has_sums) {
            if constexpr (KEEPS) kept = rotated_rows(s.queries[buffer] + own.rows * KEY_STRIDE, 0);
            read_all_slopes(dq, rows_of_base, left, s.table, part);
            if constexpr (LOGS) scale(dq, far);
        }
        pairs([&](const OfPairs& z, const bf16* keys, const bf16* columns, const Beside& beside) {
            OfPairs w;
            weigh<true>(p, w, z, logs, beside);
            times_columns(w, left, columns);
            weigh_keys(dq, w, keys);
        });
        const Own last = own_now();
        const State then = state_now();
        gather(dq, s.room + last.group * ROOM, last.part);
#pragma unroll
        for (int i = 0; i < 2 * ROW_TILES; i++) {
            const int token = then.chunk * CHUNK + last.rows + last.g + 8 * i;
            if (last.part == 0 && token < u.at.tokens) {
                bf16* to = row<bf16>(p.dq, u.at.q_batch, u.head * p.group + then.h, u.at.q_first + token) + 2 * last.t;
#pragma unroll
                for (int n = 0; n < KEY_TILES; n++) {
                    const f32(&of)[4] = dq[i / 2][n];
                    *reinterpret_cast<u32*>(to + 8 * n) = bf16x2_bits(of[i % 2 * 2], of[i % 2 * 2 + 1]);
                }
            }
        }

        const bool goes_on = then.h + 1 == p.group;
        if (goes_on && then.chunk >= LAG && then.chunk + 1 < u.at.end) {
            const int slot = (then.chunk - LAG) % SLOTS;
            if constexpr (STASH) load_sums(sums, s.sums);
            if constexpr (FADES) fade_sums(sums, fading(s.g[slot][CHUNK], s.g[slot][0]));
            add_sums(sums, s.turned, FADES ? s.scaled : s.columns[slot]);
            if constexpr (STASH) store_sums(sums, s.sums);
        }
        const State after = state_now();
        const bool on = after.h + 1 == p.group;
        set_state(State{on ? after.chunk + 1 : after.chunk, on ? 0 : after.h + 1, after.buffer ^ 1, 0});
    }
}
