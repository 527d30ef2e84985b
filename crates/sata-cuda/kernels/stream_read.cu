// Queries of a segment: sums of what precedes their chunk, and the keys since one by one: see stream.cuh.
//
// Reads q [batch][heads][tokens][D_KEY], k, v [batch][kv_heads][tokens][D_KEY | D_VALUE] bf16 once (keys near twice), writes y like q.
// FLOPs: 4 * 16 * TILES * NP a token and head, and 2 * (D_KEY + NP) a key of the chunk.
#include "stream.cuh"

using Outputs = f32[ROW_TILES][NT][4];
// The power of 2 below which what has faded is weighed relative to what the last far token has faded to.
constexpr f32 FADED = -60.0f;

// The row tiles of a warp: of two one of the first half of the chunk and one of the second, so that all weigh equally many keys.
DEVICE int row_tile(const Place& at, int r) {
    const int group = at.warp % GROUPS;
    return r == 0 ? group : 2 * GROUPS - 1 - group;
}

// Adds what queries read of the sums: features (made here) times sums, those of the warp's share.
template <int SHARE>
DEVICE void read_share(Outputs& acc, const u32 (&x)[ROW_TILES][2][D], const u8* sums, int lane) {
    constexpr Program P;
    constexpr int FIRST = SHARE * TILES / SPLIT, END = (SHARE + 1) * TILES / SPLIT;
#pragma unroll
    for (int tile = FIRST; tile < END; tile++) {
        u32 b[NT][2];
        load_values(b, sums + tile * 16 * COLUMN_STRIDE, lane);
        const Half low = P.at[2 * tile], high = P.at[2 * tile + 1];
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++) {
            const u32 a[4] = {product(low, x[r][0]), product(low, x[r][1]), product(high, x[r][0]), product(high, x[r][1])};
#pragma unroll
            for (int n = 0; n < NT; n++) mma(acc[r][n], a, b[n]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(UNITS * WARPS * 32, RESIDENTS) stream_read(const __grid_constant__ Stream p) {
    DYNAMIC_SHARED(shared);
    // Coefficients, for all units of the block.
    f32* const coefficients = reinterpret_cast<f32*>(shared + UNITS * UNIT_BYTES);
    for (int i = int(threadIdx.x); i < TILES * 16; i += UNITS * WARPS * 32) coefficients[i] = p.coefficients[i];
    __syncthreads();
    Place at;
    Segment segment;
    i64 local;
    if (!find(p, shared, at, segment, local)) return;
    const int lane = at.lane, g = lane / 4, t = lane % 4;

    Sums sums;
    clear(sums);
    clear_columns(at);
    if (segment.before >= 0) {
        const f32* from = p.sums + (i64(segment.before) * p.heads + local) * (TILES * 16 * NP);
        each_sum(
            at, sums,
            [&](int feature, int column, f32& x, f32& y) {
                const float2 two = *reinterpret_cast<const float2*>(from + feature * NP + column);
                x = two.x, y = two.y;
            },
            [&](int feature, f32& x) { x = from[feature * NP + D_VALUE]; });
    }
    // Steps: chunks, query heads of the group, pieces of the keys since the frontier.
    auto load = [&](int stage, int turn, int c, int h, int piece) {
        if (piece == 0) {
            load_rows<D>(at, at.queries(turn), KEY_STRIDE, at.bases()->q + h * p.q.head, p.q.token, c * CHUNK, at.end(c));
            if constexpr (HAS_G) load_g(at, at.query_g(turn), c * CHUNK, at.end(c));
        }
        load_piece(p, at, stage, at.frontier(c) + piece * CHUNK, at.end(c));
        copy_async_commit();
    };
    Outputs acc;
    int since[ROW_TILES];         // where some weights are exact: from which token on,
    f32 shift[ROW_TILES][2];       // and what is taken off logits of base 2
    int c = segment.first, h = 0, next_piece = 0, stage = 0;
    int turn = 0;          // of queries
    load(0, 0, c, h, 0);
#pragma unroll 1
    while (c < at.bases()->end) {
        copy_async_wait<0>();
        meet(at.unit);
        const int piece = HAS_NEAR ? next_piece : 0;
        const int frontier = at.frontier(c), pieces = at.pieces(c), first = frontier + piece * CHUNK;
        // Of the segment's last chunk nobody reads what it adds to the sums.
        const bool last = c + 1 == at.bases()->end;
        const int next_frontier = last ? 0 : at.frontier(c + 1);
        const bool absorbs = h == 0 && first < next_frontier;
        {
            int nc = c, nh = h, np = piece + 1;
            if (np == pieces) np = 0, nh++;
            if (nh == p.group) nh = 0, nc++;
            if (nc < at.bases()->end) load(stage ^ 1, turn ^ (np == 0), nc, nh, np);
        }
        if (piece == 0 && h == 0) {
            publish(at, sums, coefficients);
            // From here on they are counted from the next frontier.
            if (HAS_G && !last) scale(sums, exp2_fast(at.faded(frontier, next_frontier)));
        }
        if (absorbs) transpose_keys(at, stage);
        fall_of_keys(at, stage, first, next_frontier);
        meet(at.unit);

        auto row_g = [&](int r, int k) { return at.query_g(turn)[row_tile(at, r) * 16 + 8 * k + g]; };
        if (piece == 0) {
#pragma unroll
            for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
                for (int n = 0; n < NT; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) acc[r][n][e] = 0.0f;
            if constexpr (HAS_NEAR) {
#pragma unroll
                for (int r = 0; r < ROW_TILES; r++) {
                    since[r] = ((c * CHUNK + row_tile(at, r) * 16) / at.block - at.near) * at.block;
                    shift[r][0] = shift[r][1] = since[r] > 0 ? 0.0f : -INFINITY;
                    if (HAS_G && since[r] > 0) {
                        // What is far may have faded so much that nothing of it would be left beside 1.
                        const f64 far_g = at.g()[min(since[r], at.tokens()) - 1];
#pragma unroll
                        for (int k = 0; k < 2; k++) {
                            const f32 faded = f32(row_g(r, k) - far_g) * LOG2E;
                            if (faded < FADED) shift[r][k] = faded;
                        }
                    }
                }
            }
            if (frontier > 0) {
                u32 x[ROW_TILES][2][D];
#pragma unroll
                for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
                    for (int k = 0; k < 2; k++) {
                        const u8* from = at.queries(turn) + (row_tile(at, r) * 16 + 8 * k + g) * KEY_STRIDE;
                        u32(&y)[D] = x[r][k];
#pragma unroll
                        for (int i = 0; i < WORDS; i++) y[2 * i] = *reinterpret_cast<const u32*>(from + ((i + t) & (WORDS - 1)) * 4);
#pragma unroll
                        for (int i = 0; i < WORDS; i++) y[2 * i + 1] = between(y[2 * i], y[(2 * i + 2) & (D - 1)]);
                    }
                if (SPLIT == 1 || at.warp < GROUPS) read_share<0>(acc, x, at.shared + SUMS, lane);
                else read_share<SPLIT - 1>(acc, x, at.shared + SUMS, lane);
                if constexpr (HAS_G) {
                    const f64 from_g = at.g()[frontier - 1];
#pragma unroll
                    for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
                        for (int k = 0; k < 2; k++) {
                            const f32 left = exp2_fast(f32(row_g(r, k) - from_g) * LOG2E - (HAS_NEAR ? shift[r][k] : 0.0f));
#pragma unroll
                            for (int n = 0; n < NT; n++) acc[r][n][2 * k] *= left, acc[r][n][2 * k + 1] *= left;
                        }
                }
            }
        }

        // What a lane has of numerators and denominators that are added up over several launches.
        auto partial = [&](int token) {
            return at.bases()->partial + (h * p.rows + token) * NP + 2 * t;
        };
        if (TAKES && !GIVES && piece == 0 && (SPLIT == 1 || at.warp < GROUPS)) {
#pragma unroll
            for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    const int token = c * CHUNK + row_tile(at, r) * 16 + 8 * k + g;
                    if (token >= at.tokens()) continue;
#pragma unroll
                    for (int n = 0; n < NT; n++) {
                        const float2 two = *reinterpret_cast<const float2*>(partial(token) + 8 * n);
                        acc[r][n][2 * k] += two.x, acc[r][n][2 * k + 1] += two.y;
                    }
                }
        }

        // Keys of the piece, 16 at a time; of two warps that share queries each takes every other tile.
        const int row_end = c * CHUNK + row_tile(at, ROW_TILES - 1) * 16;
        const int tiles = GIVES ? 0 : min(CHUNK_TILES, (row_end - first) / 16 + 1);
#pragma unroll 1
        for (int tile = SPLIT == 1 ? 0 : at.warp / GROUPS; tile < tiles; tile += SPLIT) {
            const int token = first + 16 * tile;
            u32 keys[2][2], values[NT][2];
            {
                const u8* from = at.keys(stage) + tile * 16 * KEY_STRIDE;
                if constexpr (D == 8) {
                    u32 r[2];
                    load_matrices<2, false>(r, from + (lane % 16) * KEY_STRIDE);
                    keys[0][0] = r[0], keys[1][0] = r[1], keys[0][1] = keys[1][1] = 0;
                } else {
                    u32 r[4];
                    load_matrices<4, false>(r, from + (lane % 8 + lane / 16 * 8) * KEY_STRIDE + lane / 8 % 2 * 16);
                    keys[0][0] = r[0], keys[0][1] = r[1], keys[1][0] = r[2], keys[1][1] = r[3];
                }
            }
            load_values(values, at.values(stage) + tile * 16 * COLUMN_STRIDE, lane);
            f64 end_g = 0.0;
            if constexpr (HAS_G) end_g = at.key_g(stage)[16 * tile + 15];
#pragma unroll
            for (int r = 0; r < ROW_TILES; r++) {
                const int rows = c * CHUNK + row_tile(at, r) * 16;
                if (token > rows) continue;
                f32 w[2][4] = {};
                const u8* from = at.queries(turn) + (row_tile(at, r) * 16 + lane % 16) * KEY_STRIDE;
                if constexpr (D == 8) {
                    u32 x[2];
                    load_matrices<2, false>(x, from);
#pragma unroll
                    for (int j = 0; j < 2; j++) mma_half(w[j], x[0], x[1], keys[j][0]);
                } else {
                    u32 x[4];
                    load_matrices<4, false>(x, from + lane / 16 * 16);
#pragma unroll
                    for (int j = 0; j < 2; j++) mma(w[j], x, keys[j]);
                }
                f32 fade[2] = {};
                if constexpr (HAS_G) {
#pragma unroll
                    for (int k = 0; k < 2; k++) fade[k] = f32(row_g(r, k) - end_g) * LOG2E;
                }
                if (HAS_NEAR && token >= since[r]) {
#pragma unroll
                    for (int k = 0; k < 2; k++) {
                        f32 most = -INFINITY;
#pragma unroll
                        for (int j = 0; j < 2; j++)
#pragma unroll
                            for (int e = 2 * k; e < 2 * k + 2; e++) {
                                const int key = 8 * j + 2 * t + (e & 1);
                                const bool sees = token + key <= rows + g + 8 * k;
                                // What has faded is no longer the largest.
                                const f32 faded = HAS_G ? fade[k] + at.fall()[16 * tile + key] : 0.0f;
                                w[j][e] = sees ? fmaf(w[j][e], p.exp2_scale, faded) : -INFINITY;
                                most = fmaxf(most, w[j][e]);
                            }
                        most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 1));
                        most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 2));
                        const f32 before = shift[r][k], now = fmaxf(before, most);
                        const f32 by = exp2_fast(before - now);
                        shift[r][k] = now;
#pragma unroll
                        for (int n = 0; n < NT; n++) acc[r][n][2 * k] *= by, acc[r][n][2 * k + 1] *= by;
#pragma unroll
                        for (int j = 0; j < 2; j++)
#pragma unroll
                            for (int e = 2 * k; e < 2 * k + 2; e++) w[j][e] = exp2_fast(w[j][e] - now);
                    }
                } else {
#pragma unroll
                    for (int j = 0; j < 2; j++)
#pragma unroll
                        for (int e = 0; e < 4; e++) {
                            f32 y = p.a[TERMS - 1];
#pragma unroll
                            for (int i = TERMS - 2; i >= 0; i--) y = fmaf(y, w[j][e], p.a[i]);
                            w[j][e] = y;
                        }
                    if (token == rows) {
#pragma unroll
                        for (int j = 0; j < 2; j++)
#pragma unroll
                            for (int e = 0; e < 4; e++)
                                if (8 * j + 2 * t + (e & 1) > g + (e & 2) * 4) w[j][e] = 0.0f;
                    }
                }
                if (HAS_G && !(HAS_NEAR && token >= since[r])) {
                    if (token == rows) {
#pragma unroll
                        for (int j = 0; j < 2; j++)
#pragma unroll
                            for (int e = 0; e < 4; e++) w[j][e] *= exp2_fast(fminf(fade[e >> 1] + at.fall()[16 * tile + 8 * j + 2 * t + (e & 1)], 0.0f));
                    } else {
#pragma unroll
                        for (int k = 0; k < 2; k++) fade[k] = exp2_fast(fade[k] - (HAS_NEAR ? shift[r][k] : 0.0f));
#pragma unroll
                        for (int j = 0; j < 2; j++)
#pragma unroll
                            for (int e = 0; e < 4; e++) w[j][e] *= fade[e >> 1] * at.fallen()[16 * tile + 8 * j + 2 * t + (e & 1)];
                    }
                }
                const u32 a[4] = {pack2(w[0][0], w[0][1]), pack2(w[0][2], w[0][3]), pack2(w[1][0], w[1][1]), pack2(w[1][2], w[1][3])};
#pragma unroll
                for (int n = 0; n < NT; n++) mma(acc[r][n], a, values[n]);
            }
        }

        if (piece + 1 == pieces) {
            // Warps that share queries each finish one of two tiles, or the first the only one.
            const int share = SPLIT == 1 ? 0 : at.warp / GROUPS;
            if constexpr (SPLIT == 2) {
                u8* exchange = at.shared + EXCHANGE + ((at.warp % GROUPS) * ROW_TILES * 32 + lane) * EXCHANGE_LANE;
                u8* mine = exchange + (ROW_TILES == 2 ? share ^ 1 : 0) * 32 * EXCHANGE_LANE;
                const u8* other = exchange + (ROW_TILES == 2 ? share : 0) * 32 * EXCHANGE_LANE;
                auto give = [&](const f32(&from)[NT][4], const f32(&shifts)[2]) {
#pragma unroll
                    for (int n = 0; n < NT; n++) *reinterpret_cast<float4*>(mine + 16 * n) = make_float4(from[n][0], from[n][1], from[n][2], from[n][3]);
                    if constexpr (HAS_NEAR) *reinterpret_cast<float2*>(mine + 16 * NT) = make_float2(shifts[0], shifts[1]);
                };
                if (share == 1) give(acc[0], shift[0]);
                else if constexpr (ROW_TILES == 2) give(acc[1], shift[1]);
                barrier_sync(1 + UNITS + at.warp % GROUPS, 64);
                auto take = [&](f32(&to)[NT][4], f32(&shifts)[2]) {
                    f32 by[2] = {1.0f, 1.0f}, by_other[2] = {1.0f, 1.0f};
                    if constexpr (HAS_NEAR) {
                        const float2 two = *reinterpret_cast<const float2*>(other + 16 * NT);
                        const f32 others[2] = {two.x, two.y};
#pragma unroll
                        for (int k = 0; k < 2; k++) {
                            // Nothing weighed exactly by one of them: its outputs are 0, or all is relative to 0.
                            const f32 now = fmaxf(shifts[k], others[k]);
                            by[k] = shifts[k] == now ? 1.0f : exp2_fast(shifts[k] - now);
                            by_other[k] = others[k] == now ? 1.0f : exp2_fast(others[k] - now);
                        }
                    }
#pragma unroll
                    for (int n = 0; n < NT; n++) {
                        const float4 y = *reinterpret_cast<const float4*>(other + 16 * n);
                        to[n][0] = fmaf(to[n][0], by[0], y.x * by_other[0]), to[n][1] = fmaf(to[n][1], by[0], y.y * by_other[0]);
                        to[n][2] = fmaf(to[n][2], by[1], y.z * by_other[1]), to[n][3] = fmaf(to[n][3], by[1], y.w * by_other[1]);
                    }
                };
                if (share == 0) take(acc[0], shift[0]);
                else if constexpr (ROW_TILES == 2) take(acc[1], shift[1]);
            }
#pragma unroll
            for (int r = 0; r < ROW_TILES; r++) {
                if (SPLIT == 2 && r != share) continue;
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    const f32 sum = __shfl_sync(ALL_LANES, acc[r][NT - 1][2 * k], lane & ~3);
                    const int token = c * CHUNK + row_tile(at, r) * 16 + 8 * k + g;
                    if constexpr (GIVES) {
                        if (token >= at.tokens()) continue;
#pragma unroll
                        for (int n = 0; n < NT; n++) {
                            float2* to = reinterpret_cast<float2*>(partial(token) + 8 * n);
                            float2 two = make_float2(acc[r][n][2 * k], acc[r][n][2 * k + 1]);
                            if constexpr (TAKES) two.x += to->x, two.y += to->y;
                            *to = two;
                        }
                        continue;
                    }
                    if (token >= at.tokens()) continue;
                    if (t == 0 && !(sum > 0.0f && sum < INFINITY)) {
                        // Rare; kept as its complement, so that the largest is the first.
                        const u64 place = at.bases()->place + u64(h) * p.most_queries + token;
                        atomicAdd(sum * 0.0f == 0.0f ? &p.tally->non_positive : &p.tally->non_finite, u64(1));
                        atomicMax(&p.tally->first, ~place);
                    }
                    const f32 inverse = reciprocal_fast(sum);
                    bf16* y = at.bases()->y + h * p.y.head + token * p.y.token + 2 * t;
#pragma unroll
                    for (int n = 0; n < NT - 1; n++)
                        *reinterpret_cast<u32*>(y + 8 * n) = pack2(acc[r][n][2 * k] * inverse, acc[r][n][2 * k + 1] * inverse);
                }
            }
        }
        if (absorbs) absorb(at, sums, stage, min(CHUNK, next_frontier - first) / 16);
        next_piece = piece + 1;
        if (next_piece == pieces) next_piece = 0, h++, turn ^= 1;
        if (h == p.group) h = 0, c++;
        stage ^= 1;
    }
}
