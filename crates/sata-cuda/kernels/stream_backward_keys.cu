// Gradients by keys and values: one block walks with R, the sums of queries after a chunk, from an item's last chunk to its
// first. A warp has 16 keys: dv̂ and dk from sums and from the queries until them. Leaves v̂·dv̂ where weights decay.
// Grid: items, key/value heads. Bytes: q, k, v, dy, dk, dv once, 8 per query. See stream_backward.cuh.
#include "stream_backward.cuh"

// Where a warp is: for the keys of `chunk`, query head `h`'s chunk `other`; which of two buffers each. In memory, for that takes
// no registers.
struct State {
    int chunk, h, other, buffers;
};
struct Shared {
    bf16 table[BASES * TABLE];
    bf16 queries[2][CHUNK * KEY_STRIDE];
    bf16 dy[2][CHUNK * COLUMN_STRIDE];
    bf16 columns[CHUNK * COLUMN_STRIDE];
    bf16 turned[D_KEY * TURNED_STRIDE];
    bf16 keys[2][CHUNK * KEY_STRIDE];
    bf16 values[2][CHUNK * COLUMN_STRIDE];
    bf16 scaled[LOGS ? CHUNK * COLUMN_STRIDE : 8];
    f32 of_queries[2][3][CHUNK];
    f32 logs[LOGS ? CHUNK : 4];
    f32 factors[(2 * TILES + 3) / 4 * 4];
    f32 by[CHUNK];
    f64 g[2][OF_G];
    f64 key_g[2][OF_G];
    f64 sums_mark, unused;
    State state[WARPS];
    f32 sums[STASH ? SET : 4];
    f32 room[GROUPS * ROOM];
    Place place;
};
SAME_SIZE(Shared, KEY_SHARED);

DEVICE void fetch_rows(const Place& u, Shared& s, int chunk, int to) {
    fetch_keys(s.keys[to], u.k, chunk * CHUNK, u.at.tokens);
    fetch_values(s.values[to], u.v, chunk * CHUNK, u.at.tokens);
    fetch_g(s.key_g[to], u, chunk);
    // Both buffers, and once more the one that the last tokens were in.
    if (chunk + 3 >= u.at.end) put_ones(s.values[to], chunk * CHUNK, u.at.tokens);
}
#include "stream_backward_fetch.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, KEY_BLOCKS) stream_backward_keys(const __grid_constant__ Walk p) {
    DYNAMIC_SHARED(raw);
    Shared& s = *reinterpret_cast<Shared*>(raw);
    const Place& u = s.place;
    find_place(p, s.place);
    Sums sums;
    clear_sums(sums);
    if (u.at.end + LAG < u.at.chunks) load_sums(sums, sums_at(p, u.head, u.at.last_slot));
    if constexpr (STASH) store_sums(sums, s.sums);
    make_factors(p, s.factors);
    clear_columns(s);

    if (threadIdx.x == 0) s.sums_mark = mark_of(p, u.at, u.head, u.at.end);
    State state{u.at.end - 1, 0, u.at.end - 1, 0};
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
        return State{at.chunk, at.h, at.other, at.buffers};
    };
    set_state(state);
    fetch_rows(u, s, u.at.end - 1, 0);
    fetch_queries(p, u, s, u.at.end - 1, 0, 0);
    copy_async_commit();
    Logs logs;
    OfColumns dv;
    OfKeys dk;
#pragma unroll 1
    while (state_now().chunk >= u.at.first) {
        copy_async_wait<0>();
        __syncthreads();
        bool begins;
        {
            const State now = state_now();
            const int chunk = now.chunk, other = now.other, buffer = now.buffers & 1, until = min(chunk + LAG, u.at.chunks - 1);
            begins = now.h == 0 && other == chunk;
            if (other < until || now.h + 1 < p.group) {
                const bool next = other == until;
                fetch_queries(p, u, s, next ? chunk : other + 1, next ? now.h + 1 : now.h, buffer ^ 1);
            } else if (chunk > u.at.first) {
                fetch_rows(u, s, chunk - 1, now.buffers >> 1 ^ 1);
                fetch_queries(p, u, s, chunk - 1, 0, buffer ^ 1);
            }
            copy_async_commit();
            const f32 since = LAG > 0 && FADES ? f32(s.g[buffer][0] - s.key_g[now.buffers >> 1][0]) * LOG2_E : 0.0f;
            make_columns(u, s, other, buffer, other == chunk + LAG && chunk > u.at.first, since);
        }
        if (begins) {
            if constexpr (STASH) load_sums(sums, s.sums);
            show_sums(sums, s.table, s.factors);
        }
        __syncthreads();
        if (begins) {
            const Own at = own_now();
            const State now = state_now();
            const int own = now.buffers >> 1, part = at.part;
            auto rows_of_base = [&](int base) { return rotated_rows(s.keys[own] + at.rows * KEY_STRIDE, base); };
            const Left left = left_rows(s.values[own] + at.rows * COLUMN_STRIDE);
            clear(dv);
            clear(dk);
            if constexpr (LOGS) {
#pragma unroll
                for (int i = 0; i < 2 * ROW_TILES; i++) {
                    logs.row[i / 2][i % 2] = -log_of(s.key_g[own], at.rows + at.g + 8 * i);
                }
            }
            if (now.chunk + LAG + 1 < u.at.chunks) {
                read_all_sums(dv, rows_of_base, s.table, part);
                read_all_slopes(dk, rows_of_base, left, s.table, part);
                if constexpr (FADES) {
                    const f32 all = f32(s.sums_mark - s.key_g[own][0]) * LOG2_E;
                    f32 far[ROW_TILES][2];
#pragma unroll
                    for (int i = 0; i < 2 * ROW_TILES; i++) far[i / 2][i % 2] = exp2_of(logs.row[i / 2][i % 2] + all);
                    scale(dv, far);
                    scale(dk, far);
                }
            }
        }
        const Own at = own_now();
        const State now = state_now();
        const int chunk = now.chunk, other = now.other, buffer = now.buffers & 1, own = now.buffers >> 1;
        const Rotated x = rotated_rows(s.keys[own] + at.rows * KEY_STRIDE, at.part);
        const Left left = left_rows(s.values[own] + at.rows * COLUMN_STRIDE);
        logs.all = LAG > 0 && FADES ? f32(s.g[buffer][0] - s.key_g[own][0]) * LOG2_E : 0.0f;
#pragma unroll 1
        for (int tile = (other == chunk ? at.group * ROW_TILES : 0) + at.part; tile < TOKEN_TILES; tile += SPLIT) {
            const bf16* queries = s.queries[buffer] + tile * 16 * KEY_STRIDE;
            const bf16* columns = s.columns + tile * 16 * COLUMN_STRIDE;
            Beside beside{WHOLE, at.rows - tile * 16, 0};
            if (other == chunk && tile < (at.group + 1) * ROW_TILES) beside.cut = FROM_ROW;
            if constexpr (NEAR) {
#pragma unroll
                for (int m = 0; m < ROW_TILES; m++) {
                    if (is_near(p, other * CHUNK + tile * 16, chunk * CHUNK + at.rows + 16 * m)) beside.near |= 1u << m;
                }
            }
            logs.column = s.logs + (LOGS ? tile * 16 : 0);
            OfPairs z, w;
            logits(z, x, queries, at.part);
            weigh<false>(p, w, z, logs, beside);
            weigh_columns(dv, w, columns);
            weigh<true>(p, w, z, logs, beside);
            times_columns(w, left, columns);
            weigh_keys(dk, w, queries);
        }
        const bool ends = now.h + 1 == p.group && other == min(chunk + LAG, u.at.chunks - 1);
        if (ends) {
            const int part = at.part, g = at.g, t = at.t;
            f32* room = s.room + at.group * ROOM;
            gather(dv, room, part);
            if constexpr (SPLIT > 1) meet();
            gather(dk, room, part);
#pragma unroll
            for (int i = 0; i < 2 * ROW_TILES; i++) {
                if (part > 0) break;
                const int m = i / 2, r = i % 2, token = chunk * CHUNK + at.rows + g + 8 * i;
                if constexpr (FADES) {
                    f32 dot = 0;
#pragma unroll
                    for (int n = 0; n < COLUMN_TILES; n++) {
                        const u32 v = left.word[m][2 * n + r];
                        dot += low_of(v) * dv[m][n][2 * r] + high_of(v) * dv[m][n][2 * r + 1];
                    }
                    dot += __shfl_xor_sync(0xffffffffu, dot, 1);
                    dot += __shfl_xor_sync(0xffffffffu, dot, 2);
                    if (t == 0 && token < u.at.tokens) p.dw[u.head * p.works + u.at.work + token] = dot;
                }
                if (token >= u.at.tokens) continue;
                bf16* to = row<bf16>(p.dk, u.at.k_batch, u.head, u.at.k_first + token) + 2 * t;
#pragma unroll
                for (int n = 0; n < KEY_TILES; n++) {
                    *reinterpret_cast<u32*>(to + 8 * n) = bf16x2_bits(dk[m][n][2 * r], dk[m][n][2 * r + 1]);
                }
                to = row<bf16>(p.dv, u.at.k_batch, u.head, u.at.k_first + token);
#pragma unroll
                for (int n = 0; n < COLUMN_TILES; n++) {
                    const int column = 8 * n + 2 * t;
                    const f32 low = dv[m][n][2 * r], high = dv[m][n][2 * r + 1];
                    if constexpr (D_VALUE % 2 == 0) {
                        if (column < D_VALUE) *reinterpret_cast<u32*>(to + column) = bf16x2_bits(low, high);
                    } else {
                        if (column < D_VALUE) to[column] = from_f32<bf16>(low);
                        if (column + 1 < D_VALUE) to[column + 1] = from_f32<bf16>(high);
                    }
                }
            }
        }
        const State then = state_now();
        if (then.other == then.chunk + LAG && then.chunk > u.at.first) {
            const f64 mark = s.key_g[then.buffers >> 1][0];
            if constexpr (STASH) load_sums(sums, s.sums);
            if (FADES && then.h == 0) fade_sums(sums, fading(s.sums_mark, mark));
            add_sums(sums, s.turned, LOGS ? s.scaled : s.columns);
            if constexpr (STASH) store_sums(sums, s.sums);
        }
        const State after = state_now();
        State next{after.chunk, after.h, after.other + 1, after.buffers ^ 1};
        if (next.other > min(after.chunk + LAG, u.at.chunks - 1)) {
            const bool on = after.h + 1 == p.group;
            next.chunk = next.other = on ? after.chunk - 1 : after.chunk;
            next.h = on ? 0 : after.h + 1;
            if (on) next.buffers ^= 2;
        }
        set_state(next);
        if constexpr (FADES) {
            // Everybody has read what sums were relative to.
            __syncthreads();
            if (threadIdx.x == 0 && after.other == after.chunk + LAG) s.sums_mark = s.key_g[after.buffers >> 1][0];
        }
    }
}
