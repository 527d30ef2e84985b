// Reading far sums: a warp makes the features of a tile of rows for its queries, a feature per lane, and then streams
// the rows past them, 16 bytes per lane and load.
#pragma once
#include "decode_types.cuh"

// Numerators and denominators that a lane has of G queries: its columns of its rows, and its features.
struct Sums {
    f32 num[G][STRETCHES][VEC];
    f32 den[G];
};
DEVICE void clear(Sums& a) {
#pragma unroll
    for (int g = 0; g < G; ++g) {
        a.den[g] = 0.0f;
#pragma unroll
        for (int s = 0; s < STRETCHES; ++s)
#pragma unroll
            for (int i = 0; i < VEC; ++i) a.num[g][s][i] = 0.0f;
    }
}

DEVICE void scale(Sums& a, f32 by) {
#pragma unroll
    for (int g = 0; g < G; ++g) {
        a.den[g] *= by;
#pragma unroll
        for (int s = 0; s < STRETCHES; ++s)
#pragma unroll
            for (int i = 0; i < VEC; ++i) a.num[g][s][i] *= by;
    }
}

// Where a lane is among rows and columns.
struct Lane {
    int index, row, column;
};
DEVICE Lane lane_of(int index) { return Lane{index, index / ACROSS, index % ACROSS}; }
// Whether a lane has a row at all (32 may be no multiple of the columns), and this column.
DEVICE bool has_row(const Lane& lane) { return 32 % ACROSS == 0 || lane.row < AT_ONCE; }
DEVICE bool has_column(const Lane& lane, int stretch) {
    return COLUMNS % ACROSS == 0 || stretch * ACROSS + lane.column < COLUMNS;
}

// G numbers of a row of shared memory, as wide as alignment allows.
DEVICE void load_heads(const f32* p, f32 (&x)[G]) {
    if constexpr (G % 4 == 0) {
#pragma unroll
        for (int g = 0; g < G; g += 4) {
            float4 a = load4(p + g);
            x[g] = a.x, x[g + 1] = a.y, x[g + 2] = a.z, x[g + 3] = a.w;
        }
    } else if constexpr (G % 2 == 0) {
#pragma unroll
        for (int g = 0; g < G; g += 2) {
            float2 a = *reinterpret_cast<const float2*>(p + g);
            x[g] = a.x, x[g + 1] = a.y;
        }
    } else {
#pragma unroll
        for (int g = 0; g < G; ++g) x[g] = p[g];
    }
}
DEVICE void store_heads(f32* p, const f32 (&x)[G]) {
    if constexpr (G % 4 == 0) {
#pragma unroll
        for (int g = 0; g < G; g += 4) store4(p + g, make_float4(x[g], x[g + 1], x[g + 2], x[g + 3]));
    } else if constexpr (G % 2 == 0) {
#pragma unroll
        for (int g = 0; g < G; g += 2) *reinterpret_cast<float2*>(p + g) = make_float2(x[g], x[g + 1]);
    } else {
#pragma unroll
        for (int g = 0; g < G; ++g) p[g] = x[g];
    }
}

// Which variables a feature is the product of, and by what it is multiplied when it is read.
struct Feature {
    u32 words[largest(WORDS, 1)];
    f32 multiplier;
    DEVICE int operator[](int i) const {
        return int(words[i / PER_WORD] >> (i % PER_WORD * INDEX_BITS) & ((1u << INDEX_BITS) - 1u));
    }
};
DEVICE Feature feature_of(const Decode& p, int index) {
    Feature f;
    uint2 entry = __ldg(p.features + index);
    f.words[0] = entry.x;
    f.multiplier = __uint_as_float(entry.y);
#pragma unroll
    for (int w = 1; w < WORDS; ++w) f.words[w] = __ldg(p.more_indices + i64(w - 1) * FEATURES + index);
    return f;
}

// Rows of far sums.
struct Rows {
    int from, to;
};

// The first loads of a tile. They depend on nothing but the slot, and so are under way early, unless they take too many
// registers from what is done meanwhile.
struct First {
    Raw rows[BATCH];
    f32 z[LANE_ROWS];
};
constexpr bool EARLY = BATCH * int(sizeof(Raw)) <= 192;
template <bool once>
DEVICE void load_first(const Decode& p, u32 slot, int at, int to, const Lane& lane, First& first) {
    const Sum* sums = p.sums + slot * (i64(FEATURES) * D_VALUE) + lane.column * VEC;
    const f32* z = p.z + slot * i64(FEATURES);
#pragma unroll
    for (int j = 0; j < BATCH; ++j) {
        int r = at + j * AT_ONCE + lane.row;
        // Where a tile is no whole number of loads the last one goes into the next tile.
        bool there = has_row(lane) && r < to && (TILE_LOADS * AT_ONCE <= TILE || r < at + TILE);
        first.rows[j] = there ? load_raw<once>(sums + i64(r) * D_VALUE) : raw_zeros();
    }
#pragma unroll
    for (int u = 0; u < LANE_ROWS; ++u) {
        int index = at + u * 32 + lane.index;
        first.z[u] = index < to ? z[index] : 0.0f;
    }
}

// Adds Σ_f multiplier_f · Φ_f(q) · [S_f, Z_f] over rows, of whose first tile `first` has been loaded. `weights` is the
// warp's own memory. `then(from, to)` is called for each tile that has been read; where it goes over the rows again
// (AGAIN), the next tile's loads wait for it, so that they take no registers from it.
template <bool AGAIN, class Then>
DEVICE void read_sums(const Decode& p, u32 slot, Rows all, const f32* queries, f32* weights, const Lane& lane,
                      First& first, Sums& a, Then then) {
    const Sum* sums = p.sums + slot * (i64(FEATURES) * D_VALUE) + lane.column * VEC;
    const int to = all.to;
#pragma unroll 1
    for (int at = all.from; at < to; at += TILE) {
        if (!EARLY) load_first<ONCE && !AGAIN>(p, slot, at, to, lane, first);
#pragma unroll
        for (int u = 0; u < LANE_ROWS; ++u) {
            int index = at + u * 32 + lane.index;
            f32 w[G];
#pragma unroll
            for (int g = 0; g < G; ++g) w[g] = 0.0f;
            if (index < to) {
                Feature feature = feature_of(p, index);
#pragma unroll
                for (int g = 0; g < G; ++g) w[g] = feature.multiplier;
#pragma unroll
                for (int i = 0; i < HIGHEST; ++i) {
                    f32 x[G];
                    load_heads(queries + feature[i] * G, x);
#pragma unroll
                    for (int g = 0; g < G; ++g) w[g] *= x[g];
                }
#pragma unroll
                for (int g = 0; g < G; ++g) a.den[g] = fmaf(w[g], first.z[u], a.den[g]);
            }
            store_heads(weights + (u * 32 + lane.index) * G, w);
        }
        __syncwarp();
#pragma unroll
        for (int s = 0; s < STRETCHES; ++s) {
#pragma unroll
            for (int begin = 0; begin < TILE_LOADS; begin += BATCH) {
                if (s > 0 || begin > 0) {
#pragma unroll
                    for (int j = 0; j < BATCH; ++j) {
                        if (begin + j >= TILE_LOADS) break;
                        int r = (begin + j) * AT_ONCE + lane.row;
                        bool there = has_row(lane) && has_column(lane, s) && at + r < to && r < TILE;
                        const Sum* from = sums + i64(at + r) * D_VALUE + s * ACROSS * VEC;
                        first.rows[j] = there ? load_raw<ONCE && !AGAIN>(from) : raw_zeros();
                    }
                }
#pragma unroll
                for (int j = 0; j < BATCH; ++j) {
                    if (begin + j >= TILE_LOADS) break;
                    int r = (begin + j) * AT_ONCE + lane.row;
                    f32 w[G];
                    load_heads(weights + (TILE_LOADS * AT_ONCE > TILE ? min(r, TILE - 1) : r) * G, w);
#pragma unroll
                    for (int g = 0; g < G; ++g)
#pragma unroll
                        for (int i = 0; i < VEC; ++i) {
                            a.num[g][s][i] = fmaf(w[g], number(first.rows[j], i), a.num[g][s][i]);
                        }
                }
            }
        }
        __syncwarp();
        if (EARLY && !AGAIN) load_first<ONCE>(p, slot, at + TILE, to, lane, first);
        then(at, min(at + TILE, to));
        if (EARLY && AGAIN) load_first<false>(p, slot, at + TILE, to, lane, first);
    }
}

// The lanes' sums together, as rows [G][ROW] at `out` in shared memory. `scratch` is the warp's own memory.
DEVICE void gather(const Sums& a, const Lane& lane, f32* scratch, f32* out) {
#pragma unroll
    for (int g = 0; g < G; ++g) {
        f32 den = warp_sum(a.den[g]);
        if (lane.index == 0) out[g * ROW + D_VALUE] = den;
#pragma unroll
        for (int s = 0; s < STRETCHES; ++s) {
            f32* to = out + g * ROW + (s * ACROSS + lane.column) * VEC;
            const f32(&x)[VEC] = a.num[g][s];
            if constexpr (32 % ACROSS == 0 && VEC == 4 && AT_ONCE >= 4) {
                // Each lane keeps two of its four columns, then one, so that fewer numbers change places.
                bool odd = lane.row % 2 != 0, second = lane.row / 2 % 2 != 0;
                f32 b0 = odd ? x[2] : x[0], b1 = odd ? x[3] : x[1];
                b0 += __shfl_xor_sync(0xffffffffu, odd ? x[0] : x[2], ACROSS);
                b1 += __shfl_xor_sync(0xffffffffu, odd ? x[1] : x[3], ACROSS);
                f32 sum = second ? b1 : b0;
                sum += __shfl_xor_sync(0xffffffffu, second ? b0 : b1, 2 * ACROSS);
#pragma unroll
                for (int by = 4 * ACROSS; by < 32; by <<= 1) sum += __shfl_xor_sync(0xffffffffu, sum, by);
                if (lane.row < 4) to[(odd ? 2 : 0) + (second ? 1 : 0)] = sum;
            } else {
                Vec v;
#pragma unroll
                for (int i = 0; i < VEC; ++i) v.x[i] = x[i];
                if constexpr (32 % ACROSS == 0) {
#pragma unroll
                    for (int by = ACROSS; by < 32; by <<= 1)
#pragma unroll
                        for (int i = 0; i < VEC; ++i) v.x[i] += __shfl_xor_sync(0xffffffffu, v.x[i], by);
                } else if constexpr (AT_ONCE > 1) {
                    __syncwarp();
#pragma unroll
                    for (int i = 0; i < VEC; ++i) scratch[lane.index * VEC + i] = v.x[i];
                    __syncwarp();
                    for (int r = 1; lane.row == 0 && r < AT_ONCE; ++r)
#pragma unroll
                        for (int i = 0; i < VEC; ++i) v.x[i] += scratch[(lane.index + r * ACROSS) * VEC + i];
                }
                if (lane.row == 0 && has_column(lane, s)) {
#pragma unroll
                    for (int i = 0; i < VEC; ++i) to[i] = v.x[i];
                }
            }
        }
    }
}
