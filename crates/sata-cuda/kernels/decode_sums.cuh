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

// Which variables a feature is the product of.
struct Factors {
    u32 words[largest(WORDS, 1)];
    DEVICE int operator[](int i) const {
        return int(words[i / PER_WORD] >> (i % PER_WORD * INDEX_BITS) & ((1u << INDEX_BITS) - 1u));
    }
};
DEVICE Factors factors_of(const Decode& p, int feature) {
    Factors f;
#pragma unroll
    for (int w = 0; w < WORDS; ++w) f.words[w] = __ldg(p.indices + i64(w) * FEATURES + feature);
    return f;
}

// Adds Σ_f multiplier_f · Φ_f(q) · [S_f, Z_f] over rows `from` to before `to`. `weights` is the warp's own memory.
DEVICE void read_sums(const Decode& p, i64 slot, int from, int to, const f32* queries, f32* weights, const Lane& lane,
                      Sums& a) {
    const Sum* sums = p.sums + slot * (i64(FEATURES) * D_VALUE) + lane.column * VEC;
    const f32* z = p.z + slot * FEATURES;
#pragma unroll 1
    for (int at = from; at < to; at += TILE) {
        // Loads first: all that follows hides behind them.
        Raw rows[BATCH];
#pragma unroll
        for (int j = 0; j < BATCH; ++j) {
            int r = at + j * AT_ONCE + lane.row;
            rows[j] = has_row(lane) && r < to ? load_raw(sums + i64(r) * D_VALUE) : raw_zeros();
        }
#pragma unroll
        for (int u = 0; u < LANE_ROWS; ++u) {
            int feature = at + u * 32 + lane.index;
            f32 w[G];
#pragma unroll
            for (int g = 0; g < G; ++g) w[g] = 0.0f;
            if (feature < to) {
                f32 total = z[feature], multiplier = __ldg(p.multipliers + feature);
                Factors factors = factors_of(p, feature);
#pragma unroll
                for (int g = 0; g < G; ++g) w[g] = multiplier;
#pragma unroll
                for (int i = 0; i < HIGHEST; ++i) {
                    f32 x[G];
                    load_heads(queries + factors[i] * G, x);
#pragma unroll
                    for (int g = 0; g < G; ++g) w[g] *= x[g];
                }
#pragma unroll
                for (int g = 0; g < G; ++g) a.den[g] = fmaf(w[g], total, a.den[g]);
            }
            store_heads(weights + (u * 32 + lane.index) * G, w);
        }
        __syncwarp();
#pragma unroll
        for (int s = 0; s < STRETCHES; ++s) {
#pragma unroll
            for (int first = 0; first < TILE_LOADS; first += BATCH) {
                if (s > 0 || first > 0) {
#pragma unroll
                    for (int j = 0; j < BATCH; ++j) {
                        int r = (first + j) * AT_ONCE + lane.row;
                        bool there = has_row(lane) && has_column(lane, s) && at + r < to && r < TILE;
                        rows[j] = there ? load_raw(sums + i64(at + r) * D_VALUE + s * ACROSS * VEC) : raw_zeros();
                    }
                }
#pragma unroll
                for (int j = 0; j < BATCH; ++j) {
                    int r = (first + j) * AT_ONCE + lane.row;
                    f32 w[G];
                    load_heads(weights + (TILE_LOADS * AT_ONCE > TILE ? min(r, TILE - 1) : r) * G, w);
#pragma unroll
                    for (int g = 0; g < G; ++g)
#pragma unroll
                        for (int i = 0; i < VEC; ++i) a.num[g][s][i] = fmaf(w[g], number(rows[j], i), a.num[g][s][i]);
                }
            }
        }
        __syncwarp();
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
            Vec v;
#pragma unroll
            for (int i = 0; i < VEC; ++i) v.x[i] = a.num[g][s][i];
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
                for (int i = 0; i < VEC; ++i) out[g * ROW + (s * ACROSS + lane.column) * VEC + i] = v.x[i];
            }
        }
    }
}
