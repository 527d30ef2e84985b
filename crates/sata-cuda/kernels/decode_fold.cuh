// Folding a block into far sums: the team brings the block's tokens to shared memory, each weighed by what is left of it,
// and each warp sums them for some rows at a time in registers before it adds that to the rows, which it alone reads
// and writes in the whole launch.
#pragma once
#include "decode_sums.cuh"
#include "decode_past.cuh"
#include "decode_team.cuh"

// What is left of the far sums, and whether any token of the block has a weight.
struct Fading {
    f32 factor;
    bool live;
};

// Goes over the block's tokens backwards, 32 at a time. Each lane's weight of its token is exp of what has been lost
// from the token to the last one that has a weight (the anchor, to which sums are relative).
struct Backwards {
    f64 lost;    // from the tokens before this part to the anchor
    bool found;  // the anchor
};
DEVICE f32 fold_weight(const Past& past, int token, bool inside, Backwards& b) {
    f32 live = inside ? past.weight(token) : 0.0f;
#if FADES
    f64 log = inside ? past.log(token) : 0.0;
    u32 alive = __ballot_sync(0xffffffffu, live != 0.0f);
    int lane = threadIdx.x % 32, last = 31;
    if (!b.found) {
        last = alive == 0 ? -1 : 31 - __clz(int(alive));
        b.found = alive != 0;
    }
    if (lane > last) log = 0.0;
    f64 suffix = log;
#pragma unroll
    for (int by = 1; by < 32; by <<= 1) {
        f64 other = __shfl_down_sync(0xffffffffu, suffix, by);
        if (lane + by < 32) suffix += other;
    }
    f64 since = suffix - log + b.lost;
    b.lost += __shfl_sync(0xffffffffu, suffix, 0);
    return live != 0.0f ? live * faded(since) : 0.0f;
#else
    return live;
#endif
}

// Some of the block's tokens in shared memory.
struct Folded {
    f32* keys;     // [D_KEY + 1][FOLD_PITCH], transposed; the last row is 1
    f32* values;   // [FOLD_TOKENS][D_VALUE], times the tokens' weights
    f32* weights;  // [FOLD_TOKENS]
};
DEVICE Folded folded_of(const Team& team) {
    f32* values = team.fold + round4((D_KEY + 1) * FOLD_PITCH);
    return Folded{team.fold, values, values + round4(FOLD_TOKENS * D_VALUE)};
}

// Brings tokens `first` to before `first + FOLD_TOKENS` of the block; later ones have been brought before.
DEVICE void bring(const Past& past, const Team& team, int first, Backwards& b) {
    Folded folded = folded_of(team);
    int count = min(BLOCK - first, FOLD_TOKENS), lane = threadIdx.x % 32;
    team.sync();
    if (team.warp == 0) {
#pragma unroll 1
        for (int part = (FOLD_TOKENS - 1) / 32 * 32; part >= 0; part -= 32) {
            int t = part + lane;
            f32 weight = fold_weight(past, first + t, t < count, b);
            if (t < FOLD_TOKENS) folded.weights[t] = weight;
        }
    }
#pragma unroll 4
    for (int e = team.thread; e < FOLD_TOKENS * D_KEY; e += TEAM_THREADS) {
        int t = e / D_KEY, i = e % D_KEY;
        folded.keys[i * FOLD_PITCH + t] = t < count ? past.key(first + t, i) : 0.0f;
    }
    for (int t = team.thread; t < FOLD_TOKENS; t += TEAM_THREADS) folded.keys[D_KEY * FOLD_PITCH + t] = 1.0f;
    team.sync();
#pragma unroll 4
    for (int e = team.thread; e < FOLD_TOKENS * D_VALUE; e += TEAM_THREADS) {
        int t = e / D_VALUE;
        folded.values[e] = t < count ? past.value(first + t, e % D_VALUE) * folded.weights[t] : 0.0f;
    }
    team.sync();
}

// What folding the block leaves of the far sums.
DEVICE Fading fading_of(const Past& past) {
    Fading fading = {1.0f, false};
    Backwards b = {0.0, false};
#pragma unroll 1
    for (int first = (BLOCK - 1) / 32 * 32; first >= 0; first -= 32) {
        int token = first + threadIdx.x % 32;
        f32 weight = fold_weight(past, token, token < BLOCK, b);
        fading.live |= __any_sync(0xffffffffu, weight != 0.0f) != 0;
    }
#if FADES
    if (fading.live && past.mark.count != 0) fading.factor = faded(b.lost + past.mark.lag);
#endif
    return fading;
}

// Bits that no one could guess, the same at each run.
DEVICE u32 scramble(u32 x) {
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
}

// x · factor + more; where there is a `low`, what rounding takes is kept in it.
DEVICE f32 add_to(f32 x, f32 factor, f32 more) { return __fadd_rn(__fmul_rn(x, factor), more); }
DEVICE f32 add_to(f32 x, f32& low, f32 factor, f32 more) {
    f32 product = __fmul_rn(x, factor), sum = __fadd_rn(product, more), part = __fsub_rn(sum, product);
    f32 lost = __fadd_rn(__fsub_rn(product, __fsub_rn(sum, part)), __fsub_rn(more, part));
    low = low * factor + (fmaf(x, factor, -product) + lost);
    return sum;
}
DEVICE void add_to(f32* x, f32* low, f32 factor, f32 more) {
    if (low == nullptr) {
        *x = add_to(*x, factor, more);
    } else {
        *x = add_to(*x, *low, factor, more);
    }
}

// The same of up to FOLD_GROUP rows of VEC numbers of far sums.
#if SUMS == SUMS_BF16
// Beside a bf16 the rest of an f32's bits: as integers, the bf16 is the nearest and the rest what remains, with its
// sign. Without it, rounding is up or down by `chance`, so that many small additions are not lost.
DEVICE u16 round_bf16(u32 bits, u32 carry) {
    if ((bits & 0x7f800000u) == 0x7f800000u) return u16(bits >> 16 | ((bits & 0x7fffffu) != 0));
    return u16((bits + carry) >> 16);
}
DEVICE void add_to(bf16* x, u16* low, int rows, f32 factor, const Vec* more, u32 chance) {
    Raw high[FOLD_GROUP], rest[FOLD_GROUP];
#pragma unroll
    for (int j = 0; j < FOLD_GROUP; ++j) {
        high[j] = j < rows ? load_raw(x + j * D_VALUE) : raw_zeros();
        rest[j] = low != nullptr && j < rows ? load_raw(reinterpret_cast<const bf16*>(low) + j * D_VALUE) : raw_zeros();
    }
#pragma unroll
    for (int j = 0; j < FOLD_GROUP; ++j) {
        if (j >= rows) break;
        Raw next = raw_zeros(), next_rest = raw_zeros();
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
            int shift = i % 2 * 16;
            u32 before = (high[j].words[i / 2] >> shift) << 16;
            before += u32(i32(i16(rest[j].words[i / 2] >> shift)));
            u32 bits = __float_as_uint(__uint_as_float(before) * factor + more[j].x[i]);
            u32 carry = low != nullptr ? 0x8000u : scramble(chance + u32(j * D_VALUE + i)) & 0xffffu;
            next.words[i / 2] |= u32(round_bf16(bits, carry)) << shift;
            next_rest.words[i / 2] |= (bits & 0xffffu) << shift;
        }
        store_raw(x + j * D_VALUE, next);
        if (low != nullptr) store_raw(reinterpret_cast<bf16*>(low) + j * D_VALUE, next_rest);
    }
}
#else
DEVICE void add_to(f32* x, f32* low, int rows, f32 factor, const Vec* more, u32) {
    Vec sums[FOLD_GROUP], rest[FOLD_GROUP];
#pragma unroll
    for (int j = 0; j < FOLD_GROUP; ++j) sums[j] = j < rows ? load(x + j * D_VALUE) : zeros();
    if (low == nullptr) {
#pragma unroll
        for (int j = 0; j < FOLD_GROUP; ++j) {
#pragma unroll
            for (int i = 0; i < VEC; ++i) sums[j].x[i] = add_to(sums[j].x[i], factor, more[j].x[i]);
            if (j < rows) store(x + j * D_VALUE, sums[j]);
        }
        return;
    }
#pragma unroll
    for (int j = 0; j < FOLD_GROUP; ++j) rest[j] = j < rows ? load(low + j * D_VALUE) : zeros();
#pragma unroll
    for (int j = 0; j < FOLD_GROUP; ++j) {
        if (j >= rows) break;
#pragma unroll
        for (int i = 0; i < VEC; ++i) sums[j].x[i] = add_to(sums[j].x[i], rest[j].x[i], factor, more[j].x[i]);
        store(x + j * D_VALUE, sums[j]);
        store(low + j * D_VALUE, rest[j]);
    }
}
#endif

// Adds the tokens in shared memory to rows, of which `factor` is left. `scratch` is the warp's own memory.
DEVICE void fold(const Decode& p, const Past& past, const Team& team, u32 slot, int from, int to, f32 factor,
                 const Lane& lane) {
    Folded folded = folded_of(team);
    f32* scratch = team.weights;
    Sum* sums = p.sums + slot * (i64(FEATURES) * D_VALUE);
    SumLow* sums_low = p.sums_low == nullptr ? nullptr : p.sums_low + slot * (i64(FEATURES) * D_VALUE);
    f32* z = p.z + slot * i64(FEATURES);
    f32* z_low = p.z_low == nullptr ? nullptr : p.z_low + slot * i64(FEATURES);
    u32 chance = scramble(u32(past.position) + scramble(u32(slot)));
#pragma unroll 1
    for (int at = from; at < to; at += FOLD_ROWS) {
        Feature features[FOLD_FEATURES];
        f32 more_z[FOLD_FEATURES];
#pragma unroll
        for (int u = 0; u < FOLD_FEATURES; ++u) {
            int row = u * 32 + lane.index;
            features[u] = feature_of(p, row < FOLD_ROWS && at + row < to ? at + row : at);
            more_z[u] = 0.0f;
        }
#pragma unroll 1
        for (int s = 0; s < STRETCHES; ++s) {
            Vec more[FOLD_LANE_ROWS];
#pragma unroll
            for (int j = 0; j < FOLD_LANE_ROWS; ++j) more[j] = zeros();
#pragma unroll 1
            for (int begin = 0; begin < FOLD_TOKENS; begin += FOLD_STEP) {
                // The features of some tokens, [token][row].
#pragma unroll 1
                for (int t = 0; t < FOLD_STEP; t += 4) {
                    const f32* keys = folded.keys + begin + t;
#pragma unroll
                    for (int u = 0; u < FOLD_FEATURES; ++u) {
                        int row = u * 32 + lane.index;
                        float4 phi = make_float4(1.0f, 1.0f, 1.0f, 1.0f);
#pragma unroll
                        for (int i = 0; i < HIGHEST; ++i) {
                            float4 x = load4(keys + features[u][i] * FOLD_PITCH);
                            phi = i == 0 ? x : make_float4(phi.x * x.x, phi.y * x.y, phi.z * x.z, phi.w * x.w);
                        }
                        if (s == 0) {
                            float4 w = load4(folded.weights + begin + t);
                            more_z[u] += fmaf(phi.x, w.x, fmaf(phi.y, w.y, fmaf(phi.z, w.z, phi.w * w.w)));
                        }
                        if (row < FOLD_ROWS) {
                            f32* out = scratch + t * FOLD_ROWS + row;
                            out[0] = phi.x, out[FOLD_ROWS] = phi.y, out[2 * FOLD_ROWS] = phi.z, out[3 * FOLD_ROWS] = phi.w;
                        }
                    }
                }
                __syncwarp();
                if (has_row(lane) && has_column(lane, s)) {
#pragma unroll(FOLD_LANE_ROWS == 4 ? FOLD_STEP : 2)
                    for (int t = 0; t < FOLD_STEP; ++t) {
                        Vec value = load(folded.values + (begin + t) * D_VALUE + (s * ACROSS + lane.column) * VEC);
                        const f32* phi = scratch + t * FOLD_ROWS + lane.row * FOLD_LANE_ROWS;
#pragma unroll
                        for (int j = 0; j < FOLD_LANE_ROWS; j += 4) {
                            float4 x = load4(phi + j);
#pragma unroll
                            for (int i = 0; i < VEC; ++i) {
                                more[j].x[i] = fmaf(x.x, value.x[i], more[j].x[i]);
                                more[j + 1].x[i] = fmaf(x.y, value.x[i], more[j + 1].x[i]);
                                more[j + 2].x[i] = fmaf(x.z, value.x[i], more[j + 2].x[i]);
                                more[j + 3].x[i] = fmaf(x.w, value.x[i], more[j + 3].x[i]);
                            }
                        }
                    }
                }
                __syncwarp();
            }
            if (has_row(lane) && has_column(lane, s)) {
                // Some rows at a time: all are loaded before the first of them is needed.
                int left = to - at - lane.row * FOLD_LANE_ROWS;
                i64 place = i64(to - left) * D_VALUE + (s * ACROSS + lane.column) * VEC;
                Sum* x = sums + place;
                SumLow* low = sums_low == nullptr ? nullptr : sums_low + place;
#pragma unroll
                for (int j = 0; j < FOLD_LANE_ROWS; j += FOLD_GROUP) {
                    if (j >= left) break;
                    add_to(x + j * D_VALUE, low == nullptr ? nullptr : low + j * D_VALUE, left - j, factor, more + j,
                           chance + u32(place + j * D_VALUE));
                }
            }
        }
#pragma unroll
        for (int u = 0; u < FOLD_FEATURES; ++u) {
            int row = u * 32 + lane.index;
            if (row >= FOLD_ROWS || at + row >= to) break;
            add_to(z + at + row, z_low == nullptr ? nullptr : z_low + at + row, factor, more_z[u]);
        }
    }
}
