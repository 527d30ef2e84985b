// Tiles of queries and keys that are weighed pair by pair, for the direct parts.
//
// Compile-time constants: TILE tokens of a tile, 32 or 64. 256 threads, 16 by 16; thread (x, y) has the pairs of tokens
// SIDE·y … of one kind and SIDE·x … of the other.
#include "backward.cuh"

constexpr int SIDE = TILE / 16, STRIDE = TILE + 4, THREADS = 256;
constexpr int KEY_COLUMNS = (D_KEY + 15) / 16, VALUE_COLUMNS = (D_VALUE + 15) / 16;

constexpr i64 NOWHERE = i64(1) << 62;

// Queries of one head.
struct QueryTile {
    f32 x[D_KEY * STRIDE];     // q · scale
    f32 dy[D_VALUE * STRIDE];
    f64 own[TILE];             // g at the last token that each sees
    i64 place[TILE];           // before all places for none
    i64 limit[TILE];           // far are the keys before this
    f32 shift[TILE], inverse[TILE], delta[TILE];
};

// Keys: of the window, or sinks.
struct KeyTile {
    f32 x[D_KEY * STRIDE];
    f32 v[D_VALUE * STRIDE];
    f64 g[TILE];
    i64 place[TILE];           // past all places for one that weighs nothing
};

DEVICE void load_queries(const Backward& p, const Unit& u, QueryTile& tile, i64 head, i64 first, i64 end, bool settled) {
    int thread = threadIdx.x;
    int count = int(min(i64(TILE), end - first));
    for (int i = thread; i < TILE * D_KEY; i += THREADS) {
        int t = i / D_KEY, c = i % D_KEY;
        tile.x[c * STRIDE + t] = t < count ? query_at(p, u, head, first + t, c) : 0;
    }
    for (int i = thread; i < TILE * D_VALUE; i += THREADS) {
        int t = i / D_VALUE, e = i % D_VALUE;
        tile.dy[e * STRIDE + t] = t < count ? dy_at(p, u, head, first + t, e) : 0;
    }
    for (int t = thread; t < TILE; t += THREADS) {
        i64 place = place_of(u, first + t);
        tile.place[t] = -NOWHERE;
        tile.limit[t] = 0;
        tile.own[t] = 0;
        tile.inverse[t] = tile.shift[t] = tile.delta[t] = 0;
        if (t >= count) continue;
        tile.place[t] = place;
        tile.limit[t] = far_until(p, place);
        if (FADES) own_of(p, u, place, tile.own[t]);
        if (settled) {
            i64 at = unit_queries(p, u, head) + first + t;
            tile.shift[t] = p.shift[at];
            tile.inverse[t] = p.inverse[at];
            tile.delta[t] = p.delta[at];
        }
    }
}

DEVICE void load_window(const Backward& p, const Unit& u, KeyTile& tile, i64 first, i64 end) {
    int thread = threadIdx.x;
    int count = int(min(i64(TILE), end - first));
    for (int i = thread; i < TILE * D_KEY; i += THREADS) {
        int t = i / D_KEY, c = i % D_KEY;
        tile.x[c * STRIDE + t] = t < count ? key_at(p, u, first + t, c) : 0;
    }
    for (int i = thread; i < TILE * D_VALUE; i += THREADS) {
        int t = i / D_VALUE, e = i % D_VALUE;
        tile.v[e * STRIDE + t] = t < count ? value_at(p, u, first + t, e) : 0;
    }
    for (int t = thread; t < TILE; t += THREADS) {
        bool live = t < count && is_live(u, first + t);
        tile.place[t] = live ? first + t : NOWHERE;
        tile.g[t] = FADES && live ? u.g[first + t] : 0;
    }
}

DEVICE void load_sinks(const Backward& p, const Unit& u, KeyTile& tile, i64 first, i64 end) {
    int thread = threadIdx.x;
    int count = int(min(i64(TILE), end - first));
    for (int i = thread; i < TILE * D_KEY; i += THREADS) {
        int t = i / D_KEY, c = i % D_KEY;
        tile.x[c * STRIDE + t] = t < count ? sink_key_at(p, u, first + t, c) : 0;
    }
    for (int i = thread; i < TILE * D_VALUE; i += THREADS) {
        int t = i / D_VALUE, e = i % D_VALUE;
        tile.v[e * STRIDE + t] = t < count ? sink_value_at(p, u, first + t, e) : 0;
    }
    for (int t = thread; t < TILE; t += THREADS) {
        bool live = t < count && sink_is_live(p, u, first + t);
        tile.place[t] = live ? place_of_sink(u, first + t) : NOWHERE;
        tile.g[t] = live ? sink_g(p, u, first + t) : 0;
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
#pragma unroll 4
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
