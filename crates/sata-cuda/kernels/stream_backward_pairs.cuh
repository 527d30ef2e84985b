// Tokens of a chunk weighed one by one, for stream_backward.cuh, which includes this.
#pragma once

// ---- Tokens in shared memory ----------------------------------------------------------------------------------
// g of a chunk's tokens, after that of the token before it; zeros where there are none.
constexpr int OF_G = FADES ? CHUNK + 2 : 2;
DEVICE void fetch_g(f64* to, const Place& u, int chunk) {
    if constexpr (FADES) {
        spread<CHUNK + 1>([&](int i) {
            const int token = chunk * CHUNK - 1 + i;
            const bool is = token >= 0 && token < u.at.tokens;
            copy_async<8>(to + i, u.g + (is ? token : 0), is ? 8 : 0);
        });
    }
}
// The logarithm to base 2 of what a token of a chunk has faded since the token before the chunk, or since another mark.
DEVICE f32 log_of(const f64* g, int t, f64 mark) { return FADES ? f32(g[1 + t] - mark) * LOG2_E : 0.0f; }
DEVICE f32 log_of(const f64* g, int t) { return log_of(g, t, g[0]); }
// What sums fade by when they are no longer relative to one mark, but to another.
DEVICE f32 fading(f64 to, f64 from) { return exp2_of(f32(to - from) * LOG2_E); }

// Rows [CHUNK x D_KEY] of tokens from `first` on; zeros after the last.
DEVICE void fetch_keys(bf16* to, const Rows& x, int first, int tokens) {
    spread<CHUNK * KEY_TILES>([&](int i) {
        const int t = i / KEY_TILES, part = i % KEY_TILES;
        const bool is = first + t < tokens;
        copy_async<16>(to + t * KEY_STRIDE + part * 8, x.first + (is ? first + t : 0) * x.stride + part * 8, is ? 16 : 0);
    });
}
// The same of values, whose further columns stay as they are.
DEVICE void fetch_values(bf16* to, const Rows& x, int first, int tokens) {
    if constexpr (D_VALUE % 8 == 0) {
        constexpr int PARTS = D_VALUE / 8;
        spread<CHUNK * PARTS>([&](int i) {
            const int t = i / PARTS, part = i % PARTS;
            const bool is = first + t < tokens;
            copy_async<16>(to + t * COLUMN_STRIDE + part * 8, x.first + (is ? first + t : 0) * x.stride + part * 8, is ? 16 : 0);
        });
    } else {
#pragma unroll 1
        for (int i = threadIdx.x; i < CHUNK * D_VALUE; i += THREADS) {
            const int t = i / D_VALUE, j = i % D_VALUE;
            bf16 element;
            element.bits = 0;
            if (first + t < tokens) element = (x.first + (first + t) * x.stride)[j];
            to[t * COLUMN_STRIDE + j] = element;
        }
    }
}
// The ones after a value, and zeros; all zeros after the last token.
DEVICE void put_ones(bf16* to, int first, int tokens) {
#pragma unroll 1
    for (int i = threadIdx.x; i < CHUNK * (COLUMNS - D_VALUE); i += THREADS) {
        const int t = i / (COLUMNS - D_VALUE), j = i % (COLUMNS - D_VALUE);
        to[t * COLUMN_STRIDE + D_VALUE + j].bits = j <= 1 && first + t < tokens ? 0x3f80 : 0;
    }
}
// [D_KEY x CHUNK] of rows.
DEVICE void turn(bf16* to, const bf16* rows) {
    spread<CHUNK * (D_KEY / 4)>([&](int i) {
        const int t = i % CHUNK, part = i / CHUNK * 4;
        const uint2 x = *reinterpret_cast<const uint2*>(rows + t * KEY_STRIDE + part);
        bf16* column = to + part * TURNED_STRIDE + t;
        column[0].bits = u16(x.x);
        column[TURNED_STRIDE].bits = u16(x.x >> 16);
        column[2 * TURNED_STRIDE].bits = u16(x.y);
        column[3 * TURNED_STRIDE].bits = u16(x.y >> 16);
    });
}
// Columns of each token times what fades until the last token of the chunk.
DEVICE void fade_columns(bf16* to, const bf16* from, const f64* g) {
    const f64 last = g[CHUNK];
    spread<CHUNK * COLUMNS / 2>([&](int i) {
        const int t = i / (COLUMNS / 2), at = t * COLUMN_STRIDE + i % (COLUMNS / 2) * 2;
        const f32 by = exp2_of(-log_of(g, t, last));
        const u32 x = *reinterpret_cast<const u32*>(from + at);
        *reinterpret_cast<u32*>(to + at) = bf16x2_bits(low_of(x) * by, high_of(x) * by);
    });
}

// ---- Pairs ----------------------------------------------------------------------------------------------------
// Of a warp's rows and 16 tokens: two tiles of 8 columns for each tile of rows.
typedef f32 OfPairs[ROW_TILES][2][4];

// x = rows · tokensᵀ, tokens in shared memory.
DEVICE void logits(OfPairs& x, const Rotated& rows, const bf16* tokens, int part) {
    const int lane = lane_now();
    clear(x);
    if constexpr (D_KEY == 16) {
        u32 w[4];
        // Rows are rotated by 8 part, and so are tokens.
        load_matrices<false>(w, tokens + (lane / 16 * 8 + lane % 8) * KEY_STRIDE + (lane / 8 % 2 ^ part) * 8);
#pragma unroll
        for (int m = 0; m < ROW_TILES; m++) {
            const u32 a0 = rows.pair[m][0][0], a1 = rows.pair[m][1][0];
            const u32 a2 = rows.pair[m][0][8 % D_KEY], a3 = rows.pair[m][1][8 % D_KEY];
            multiply(x[m][0], a0, a1, a2, a3, w[0], w[1]);
            multiply(x[m][1], a0, a1, a2, a3, w[2], w[3]);
        }
    } else {
        u32 w[2];
        load_matrices<false>(w, tokens + lane % 16 * KEY_STRIDE);
#pragma unroll
        for (int m = 0; m < ROW_TILES; m++) {
            multiply(x[m][0], rows.pair[m][0][0], rows.pair[m][1][0], w[0]);
            multiply(x[m][1], rows.pair[m][0][0], rows.pair[m][1][0], w[1]);
        }
    }
}
// c += w · (16 tokens' columns).
DEVICE void weigh_columns(OfColumns& c, const OfPairs& w, const bf16* columns) {
    const Right right = right_rows(columns, lane_now());
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++) {
        const u32 a0 = bf16x2_bits(w[m][0][0], w[m][0][1]), a1 = bf16x2_bits(w[m][0][2], w[m][0][3]);
        const u32 a2 = bf16x2_bits(w[m][1][0], w[m][1][1]), a3 = bf16x2_bits(w[m][1][2], w[m][1][3]);
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n++) multiply(c[m][n], a0, a1, a2, a3, right.word[n][0], right.word[n][1]);
    }
}
// c += w · (16 tokens' keys).
DEVICE void weigh_keys(OfKeys& c, const OfPairs& w, const bf16* tokens) {
    const int lane = lane_now();
    u32 b[2 * KEY_TILES];
    load_matrices<true>(b, tokens + lane % 16 * KEY_STRIDE + (KEY_TILES == 2 ? lane / 16 * 8 : 0));
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++) {
        const u32 a0 = bf16x2_bits(w[m][0][0], w[m][0][1]), a1 = bf16x2_bits(w[m][0][2], w[m][0][3]);
        const u32 a2 = bf16x2_bits(w[m][1][0], w[m][1][1]), a3 = bf16x2_bits(w[m][1][2], w[m][1][3]);
#pragma unroll
        for (int n = 0; n < KEY_TILES; n++) multiply(c[m][n], a0, a1, a2, a3, b[2 * n], b[2 * n + 1]);
    }
}
// w *= left · (16 tokens' columns)ᵀ.
DEVICE void times_columns(OfPairs& w, const Left& left, const bf16* columns) {
    const Right right = right_columns(columns, lane_now());
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++) {
#pragma unroll
        for (int n = 0; n < 2; n++) {
            f32 d[4] = {0, 0, 0, 0};
            transposed_times(d, left.word[m], right, n);
#pragma unroll
            for (int j = 0; j < 4; j++) w[m][n][j] *= d[j];
        }
    }
}
DEVICE f32 polynomial(const Walk& p, f32 x) { return fmaf(fmaf(fmaf(p.a[3], x, p.a[2]), x, p.a[1]), x, p.a[0]); }
DEVICE f32 slope(const Walk& p, f32 x) { return fmaf(fmaf(3.0f * p.a[3], x, 2.0f * p.a[2]), x, p.a[1]); }

// What a pair of row and column weighs, but for the polynomial or exponential, as logarithms to base 2: that of rows g and
// g+8 of each tile, those of columns in shared memory, that of all.
constexpr bool LOGS = FADES || NEAR;
struct Logs {
    f32 row[ROW_TILES][2];
    const f32* column;
    f32 all;
};
// A tile of columns beside a warp's rows: whether a key is only seen by its own and later tokens, columns being keys or
// queries; where the first row is, less where the first column is; and which tiles of rows are near it, as bits.
enum Cut { WHOLE, UP_TO_ROW, FROM_ROW };
struct Beside {
    Cut cut;
    int ahead;
    u32 near;
};

// Of logits x: weights, or their slopes, times what the pair weighs otherwise.
template <bool SLOPE>
DEVICE void weigh(const Walk& p, OfPairs& w, const OfPairs& x, const Logs& logs, const Beside& beside) {
    const int lane = lane_now(), g = lane / 4, t = lane % 4;
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++) {
        if (NEAR && (beside.near >> m & 1) != 0) {
#pragma unroll
            for (int n = 0; n < 2; n++) {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const f32 log = logs.row[m][j / 2] + logs.column[8 * n + 2 * t + j % 2] + logs.all;
                    w[m][n][j] = exp2_of(fmaf(x[m][n][j], p.scale * LOG2_E, log)) * (SLOPE ? p.scale : 1.0f);
                }
            }
        } else {
#pragma unroll
            for (int n = 0; n < 2; n++) {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    w[m][n][j] = SLOPE ? slope(p, x[m][n][j]) : polynomial(p, x[m][n][j]);
                    if constexpr (LOGS) {
                        w[m][n][j] *= exp2_of(logs.row[m][j / 2] + logs.column[8 * n + 2 * t + j % 2] + logs.all);
                    }
                }
            }
        }
    }
    if (beside.cut != WHOLE) {
#pragma unroll
        for (int m = 0; m < ROW_TILES; m++) {
#pragma unroll
            for (int n = 0; n < 2; n++) {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const int ahead = beside.ahead + 16 * m + g + j / 2 * 8 - (8 * n + 2 * t + j % 2);
                    if (beside.cut == UP_TO_ROW ? ahead < 0 : ahead > 0) w[m][n][j] = 0;
                }
            }
        }
    }
}
// Whether tokens of two tiles of 16 are near each other.
DEVICE bool is_near(const Walk& p, int query, int key) { return NEAR && query / p.block - key / p.block <= p.near; }

// In shared memory, where it takes no registers. All threads of the block take part.
DEVICE void find_place(const Walk& p, Place& u) {
    if (threadIdx.x == 0) {
        u.at = p.items[blockIdx.x];
        u.head = int(blockIdx.y);
        u.g = FADES ? p.g + (u.head * p.works + u.at.work) : nullptr;
        u.q = rows_of(p.q, u.at.q_batch, u.head * p.group, u.at.q_first);
        u.dy = rows_of(p.dy, u.at.q_batch, u.head * p.group, u.at.q_first);
        u.k = rows_of(p.k, u.at.k_batch, u.head, u.at.k_first);
        u.v = rows_of(p.v, u.at.k_batch, u.head, u.at.k_first);
    }
    __syncthreads();
}
DEVICE i64 query_at(const Walk& p, const Place& u, int h) { return (u.head * p.group + h) * p.works + u.at.work; }
