// Tiles of queries and keys that are weighed pair by pair, for the direct parts.
//
// Compile-time constants: TILE tokens of a tile, 32 or 64; BLOCKS of a multiprocessor at once, 1 or 2. 256 threads, 16 by
// 16; thread (x, y) has the pairs of tokens SIDE·y … of one kind and SIDE·x … of the other.
#include "backward.cuh"

constexpr int SIDE = TILE / 16, STRIDE = TILE + 4, THREADS = 256;
constexpr int KEY_COLUMNS = (D_KEY + 15) / 16, VALUE_COLUMNS = (D_VALUE + 15) / 16;

constexpr i32 NOWHERE = 1 << 30;

// Queries of one head. Places count from one that the block chooses, and g is two numbers, so that differences of large
// ones keep their digits.
struct QueryTile {
    f32 x[D_KEY * STRIDE];     // q · scale
    f32 dy[D_VALUE * STRIDE];
    float2 own[TILE];          // g at the last token that each sees
    i32 place[TILE];           // before all places for none
    i32 limit[TILE];           // far are the keys before this
    f32 shift[TILE], inverse[TILE], delta[TILE];
};

// Keys: of the window, or sinks.
struct KeyTile {
    f32 x[D_KEY * STRIDE];
    f32 v[D_VALUE * STRIDE];
    float2 g[TILE];
    i32 place[TILE];           // past all places for one that weighs nothing
};

DEVICE float2 split(f64 g) {
    f32 high = f32(g);
    return make_float2(high, f32(g - f64(high)));
}
DEVICE f32 difference(float2 a, float2 b) { return (a.x - b.x) + (a.y - b.y); }
// A place counted from `from`, where that is more than a few thousand million tokens away just before or after all.
DEVICE i32 place_from(i64 place, i64 from) { return i32(max(min(place - from, i64(NOWHERE) - 1), i64(1) - NOWHERE)); }

DEVICE void load_queries(const Backward& p, const Unit& u, QueryTile& tile, i64 head, i64 first, i64 end, i64 from,
                         bool settled) {
    int thread = threadIdx.x;
    int count = int(min(i64(TILE), end - first));
    load_transposed<D_KEY, TILE, THREADS>(tile.x, STRIDE, count, [&](int t, int i) { return query_at(p, u, head, first + t, i); });
    load_transposed<D_VALUE, TILE, THREADS>(tile.dy, STRIDE, count, [&](int t, int i) { return dy_at(p, u, head, first + t, i); });
    for (int t = thread; t < TILE; t += THREADS) {
        i64 place = place_of(u, first + t);
        tile.place[t] = -NOWHERE;
        tile.limit[t] = 0;
        tile.own[t] = make_float2(0, 0);
        tile.inverse[t] = tile.shift[t] = tile.delta[t] = 0;
        if (t >= count) continue;
        tile.place[t] = place_from(place, from);
        tile.limit[t] = place_from(far_until(p, place), from);
        if (FADES) tile.own[t] = split(p.own[unit_places(p, u) + place + 1]);
        if (settled) {
            i64 at = unit_queries(p, u, head) + first + t;
            tile.shift[t] = p.shift[at];
            tile.inverse[t] = p.inverse[at];
            tile.delta[t] = p.delta[at];
        }
    }
}

DEVICE void load_window(const Backward& p, const Unit& u, KeyTile& tile, i64 first, i64 end, i64 from) {
    int thread = threadIdx.x;
    int count = int(min(i64(TILE), end - first));
    load_transposed<D_KEY, TILE, THREADS>(tile.x, STRIDE, count, [&](int t, int i) { return key_at(p, u, first + t, i); });
    load_transposed<D_VALUE, TILE, THREADS>(tile.v, STRIDE, count, [&](int t, int i) { return value_at(p, u, first + t, i); });
    for (int t = thread; t < TILE; t += THREADS) {
        bool live = t < count && is_live(u, first + t);
        tile.place[t] = live ? place_from(first + t, from) : NOWHERE;
        tile.g[t] = split(FADES && live ? u.g[first + t] : 0);
    }
}

DEVICE void load_sinks(const Backward& p, const Unit& u, KeyTile& tile, i64 first, i64 end, i64 from) {
    int thread = threadIdx.x;
    int count = int(min(i64(TILE), end - first));
    load_transposed<D_KEY, TILE, THREADS>(tile.x, STRIDE, count, [&](int t, int i) { return sink_key_at(p, u, first + t, i); });
    load_transposed<D_VALUE, TILE, THREADS>(tile.v, STRIDE, count, [&](int t, int i) { return sink_value_at(p, u, first + t, i); });
    for (int t = thread; t < TILE; t += THREADS) {
        bool live = t < count && sink_is_live(p, u, first + t);
        tile.place[t] = live ? place_from(place_of_sink(u, first + t), from) : NOWHERE;
        tile.g[t] = split(live ? sink_g(p, u, first + t) : 0);
    }
}

DEVICE void take(const f32* from, f32 (&x)[4]) {
    float4 four = load4(from);
    x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
}
DEVICE void take(const f32* from, f32 (&x)[2]) {
    float2 two = *reinterpret_cast<const float2*>(from);
    x[0] = two.x, x[1] = two.y;
}
DEVICE void give(f32* to, const f32 (&x)[4]) { store4(to, make_float4(x[0], x[1], x[2], x[3])); }
DEVICE void give(f32* to, const f32 (&x)[2]) { *reinterpret_cast<float2*>(to) = make_float2(x[0], x[1]); }

// Products of rows of two arrays [depth][STRIDE]: SIDE of a from `at_a` on, SIDE of b from `at_b` on.
template <int DEPTH>
DEVICE void products(const f32* a, int at_a, const f32* b, int at_b, f32 (&out)[SIDE][SIDE]) {
#pragma unroll
    for (int i = 0; i < SIDE; ++i) {
#pragma unroll
        for (int j = 0; j < SIDE; ++j) out[i][j] = 0;
    }
#pragma unroll 2
    for (int c = 0; c < DEPTH; ++c) {
        f32 x[SIDE], y[SIDE];
        take(a + c * STRIDE + at_a, x);
        take(b + c * STRIDE + at_b, y);
#pragma unroll
        for (int i = 0; i < SIDE; ++i) {
#pragma unroll
            for (int j = 0; j < SIDE; ++j) out[i][j] = fmaf(x[i], y[j], out[i][j]);
        }
    }
}

// ---- Weights of a tile in shared memory, [TILE][STRIDE] ------------------------------------------------------------
// Row x·SIDE + j holds SIDE weights of each thread (x, y). Rows are turned by their number, so that threads that write
// them side by side find different banks; and half the threads read two rows of a group in the other order, since the
// elements that they multiply them with lie 8 rows apart in the same banks.
DEVICE int turned(int row, int y) { return (y * SIDE + row / SIDE * SIDE) & (TILE - 1); }

// Element j of row i goes to row x·SIDE + j.
DEVICE void put_weights(f32* to, const f32 (&w)[SIDE][SIDE], int x, int y) {
#pragma unroll
    for (int j = 0; j < SIDE; ++j) {
        f32 column[SIDE];
#pragma unroll
        for (int i = 0; i < SIDE; ++i) column[i] = w[i][j];
        give(to + (x * SIDE + j) * STRIDE + turned(x * SIDE, y), column);
    }
}

// N elements x, x + 16, … of `tokens` [DIM][STRIDE], of one token.
template <int DIM, int N>
DEVICE void elements(const f32* tokens, int token, int x, f32 (&to)[N]) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
        int c = x + 16 * n;
        to[n] = DIM % 16 == 0 || c < DIM ? tokens[c * STRIDE + token] : 0;
    }
}

// Calls f(row, where the thread's weights of it are) for each row, in the thread's order.
template <class F>
DEVICE void each_row(int x, int y, F f) {
    constexpr int HALF = SIDE / 2;
    int swap = x >= 8 ? HALF : 0;
#pragma unroll 1
    for (int group = 0; group < TILE; group += SIDE) {
        int turn = turned(group, y);
#pragma unroll
        for (int k = 0; k < SIDE; ++k) {
            int row = group + (k % HALF) + ((k / HALF * HALF) ^ swap);
            f(row, row * STRIDE + turn);
        }
    }
}
template <int N>
DEVICE void multiply_add(const f32 (&w)[SIDE], const f32 (&x)[N], f32 (&sums)[SIDE][N]) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int i = 0; i < SIDE; ++i) sums[i][n] = fmaf(w[i], x[n], sums[i][n]);
    }
}
