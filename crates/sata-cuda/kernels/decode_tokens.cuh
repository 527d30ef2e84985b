// Raw tokens, 32 at a time, one per lane: logits, then weights, then the rows of values past them.
#pragma once
#include "decode_past.cuh"
#include "decode_sums.cuh"

// x of one key for G queries; key4(i) gives four of its elements, key(i) one.
template <class Key4, class Key>
DEVICE void logits(Key4 key4, Key key, const f32* queries, f32 (&x)[G]) {
#pragma unroll
    for (int g = 0; g < G; ++g) x[g] = 0.0f;
    if constexpr (D_KEY % 4 == 0) {
#pragma unroll 8
        for (int i = 0; i < D_KEY; i += 4) {
            float4 k = key4(i);
            f32 each[4] = {k.x, k.y, k.z, k.w};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                f32 q[G];
                load_heads(queries + (i + j) * G, q);
#pragma unroll
                for (int g = 0; g < G; ++g) x[g] = fmaf(each[j], q[g], x[g]);
            }
        }
    } else {
#pragma unroll 4
        for (int i = 0; i < D_KEY; ++i) {
            f32 q[G], k = key(i);
            load_heads(queries + i * G, q);
#pragma unroll
            for (int g = 0; g < G; ++g) x[g] = fmaf(k, q[g], x[g]);
        }
    }
}
DEVICE void logits(const Past& past, int token, const f32* queries, f32 (&x)[G]) {
    logits([&](int i) { return past.key4(token, i); }, [&](int i) { return past.key(token, i); }, queries, x);
}

// What has been lost from each lane's token to the newest one, going backwards, and in `lost` from the first.
DEVICE f64 lost_since(f64 log, int lane, f64& lost) {
    f64 suffix = log;
#pragma unroll
    for (int by = 1; by < 32; by <<= 1) {
        f64 other = __shfl_down_sync(0xffffffffu, suffix, by);
        if (lane + by < 32) suffix += other;
    }
    f64 since = suffix - log + lost;
    lost += __shfl_sync(0xffffffffu, suffix, 0);
    return since;
}

// The values of up to 32 tokens as a lane's rows and columns; loaded before the tokens' weights are known where they fit
// in a few registers.
constexpr bool VALUES_EARLY = TOKEN_LOADS * STRETCHES * VEC <= 16;
struct Values {
    Vec x[VALUES_EARLY ? TOKEN_LOADS : 1][STRETCHES];
};
// values(t, i) loads from those of a token below `count`.
template <class From>
DEVICE void load_values(Values& v, int count, const Lane& lane, From values) {
    if constexpr (VALUES_EARLY) {
#pragma unroll
        for (int j = 0; j < TOKEN_LOADS; ++j)
#pragma unroll
            for (int s = 0; s < STRETCHES; ++s) {
                int t = j * AT_ONCE + lane.row;
                bool there = has_row(lane) && has_column(lane, s) && t < count;
                v.x[j][s] = there ? values(t, (s * ACROSS + lane.column) * VEC) : zeros();
            }
    }
}
// Adds the rows of values times their weights [32][G], which are 0 from `count` on.
template <class From>
DEVICE void add_values(Sums& a, const Values& v, const f32* weights, int count, const Lane& lane, From values) {
    if constexpr (VALUES_EARLY) {
#pragma unroll
        for (int j = 0; j < TOKEN_LOADS; ++j) {
            int t = j * AT_ONCE + lane.row;
            f32 w[G];
            load_heads(weights + (TOKEN_LOADS * AT_ONCE > 32 ? min(t, 31) : t) * G, w);
#pragma unroll
            for (int s = 0; s < STRETCHES; ++s)
#pragma unroll
                for (int g = 0; g < G; ++g)
#pragma unroll
                    for (int i = 0; i < VEC; ++i) a.num[g][s][i] = fmaf(w[g], v.x[j][s].x[i], a.num[g][s][i]);
        }
        return;
    }
#pragma unroll
    for (int s = 0; s < STRETCHES; ++s) {
        if (!has_row(lane) || !has_column(lane, s)) continue;
#pragma unroll 4
        for (int t = lane.row; t < count; t += AT_ONCE) {
            Vec value = values(t, (s * ACROSS + lane.column) * VEC);
            f32 w[G];
            load_heads(weights + t * G, w);
#pragma unroll
            for (int g = 0; g < G; ++g)
#pragma unroll
                for (int i = 0; i < VEC; ++i) a.num[g][s][i] = fmaf(w[g], value.x[i], a.num[g][s][i]);
        }
    }
}

// Weights e^{x − max}: all that was summed before becomes relative to the new maxima.
DEVICE void exponential(Sums& a, f32 (&max)[G], f32 (&x)[G], f32 fading, f32 live) {
#pragma unroll
    for (int g = 0; g < G; ++g) {
        x[g] = live != 0.0f ? x[g] + fading : LOWEST;
        f32 top = fmaxf(max[g], warp_max(x[g]));
        if (top != max[g]) {
            f32 shrink = expf(max[g] - top);
            a.den[g] *= shrink;
#pragma unroll
            for (int s = 0; s < STRETCHES; ++s)
#pragma unroll
                for (int i = 0; i < VEC; ++i) a.num[g][s][i] *= shrink;
            max[g] = top;
        }
        x[g] = live != 0.0f ? expf(x[g] - top) : 0.0f;
        a.den[g] += x[g];
    }
}

// The open tokens by exp: this warp's share of them.
DEVICE void near_tokens(const Past& past, const f32* queries, f32* weights, int warp, const Lane& lane, Sums& a,
                        f32 (&max)[G]) {
    f64 lost = 0.0;
    int tile = 0;
#pragma unroll 1
    for (int first = (past.open - 1) / 32 * 32; first >= 0; first -= 32, ++tile) {
        int token = first + lane.index;
        bool inside = token < past.open;
        f32 fading = 0.0f;
#if FADES
        fading = f32(lost_since(inside ? past.log(token) : 0.0, lane.index, lost));
#endif
        if (tile % TEAM != warp) continue;
        f32 live = inside ? past.weight(token) : 0.0f, x[G];
        auto values = [&](int t, int i) { return past.values(first + t, i); };
        int count = min(past.open - first, 32);
        Values v;
        load_values(v, count, lane, values);
        logits(past, inside ? token : first, queries, x);
        exponential(a, max, x, fading, live);
        store_heads(weights + lane.index * G, x);
        __syncwarp();
        add_values(a, v, weights, count, lane, values);
        __syncwarp();
    }
}

// The sinks by exp: this warp's share of them. `since` is g at the new token since the sequence's start.
DEVICE void sinks(const Decode& p, const Past& past, u32 slot, f64 since, const f32* queries, f32* weights, int warp,
                  const Lane& lane, Sums& a, f32 (&max)[G]) {
    const f32* keys = p.sink_keys + slot * (i64(SINKS) * D_KEY);
    const f32* values = p.sink_values + slot * (i64(SINKS) * D_VALUE);
    int count = past.is_sink() ? int(past.position) + 1 : SINKS;
    int newest = past.is_sink() ? int(past.position) : -1;
#pragma unroll 1
    for (int first = warp * 32; first < count; first += TEAM * 32) {
        int token = first + lane.index;
        bool inside = token < count;
        f32 live = 0.0f, fading = 0.0f, x[G];
        if (inside) live = token == newest ? 1.0f : p.sink_weights[i64(slot) * SINKS + token];
#if FADES
        if (inside && token != newest) fading = f32(since - p.sink_fading[i64(slot) * SINKS + token]);
#endif
        auto from = [&](int t, int i) {
            return first + t == newest ? load(past.team->new_value + i) : load(values + i64(first + t) * D_VALUE + i);
        };
        Values v;
        load_values(v, min(count - first, 32), lane, from);
        int known = inside ? token : first;
        const f32* key = keys + i64(known) * D_KEY;
        logits([&](int i) { return known == newest ? load4(past.team->new_key + i) : load4(key + i); },
               [&](int i) { return known == newest ? past.team->new_key[i] : key[i]; }, queries, x);
        exponential(a, max, x, fading, live);
        store_heads(weights + lane.index * G, x);
        __syncwarp();
        add_values(a, v, weights, min(count - first, 32), lane, from);
        __syncwarp();
    }
}

// How a far token has faded.
DEVICE f32 far_weight(const Past& past, int token, bool inside, int lane, f64& lost) {
    f32 weight = inside ? past.weight(token) : 0.0f;
#if FADES
    weight *= expf(fminf(f32(lost_since(inside ? past.log(token) : 0.0, lane, lost)), 0.0f));
#endif
    return weight;
}

// The open tokens by the polynomial with coefficients [TERMS] of each query, or of all (`stride` 0): the share of one
// of `count` warps.
DEVICE void far_tokens(const Past& past, const f32* queries, const f32* coefficients, int stride, f32* weights,
                       int warp, int count, const Lane& lane, Sums& a) {
    f64 lost = 0.0;
    int tile = 0;
#pragma unroll 1
    for (int first = (past.open - 1) / 32 * 32; first >= 0; first -= 32, ++tile) {
        int token = first + lane.index;
        bool inside = token < past.open;
        f32 weight = far_weight(past, token, inside, lane.index, lost);
        if (count > 1 && tile % count != warp) continue;
        auto values = [&](int t, int i) { return past.values(first + t, i); };
        int tokens = min(past.open - first, 32);
        Values v;
        load_values(v, tokens, lane, values);
        f32 x[G];
        logits(past, inside ? token : first, queries, x);
#pragma unroll
        for (int g = 0; g < G; ++g) {
            const f32* c = coefficients + g * stride;
            f32 w = c[TERMS - 1];
#pragma unroll 8
            for (int i = TERMS - 2; i >= 0; --i) w = fmaf(w, x[g], c[i]);
            x[g] = weight != 0.0f ? w * weight : 0.0f;
            a.den[g] += x[g];
        }
        store_heads(weights + lane.index * G, x);
        __syncwarp();
        add_values(a, v, weights, tokens, lane, values);
        __syncwarp();
    }
}

#if PER_QUERY
// Σ w x^p of the open tokens for the orders p of the planes: this warp's share, by lane.
DEVICE void moments(const Past& past, const f32* queries, int warp, const Lane& lane, f32 (&sums)[PLANES][G]) {
    constexpr int orders[PLANES] = ORDERS;
    f64 lost = 0.0;
    int tile = 0;
#pragma unroll
    for (int plane = 0; plane < PLANES; ++plane)
#pragma unroll
        for (int g = 0; g < G; ++g) sums[plane][g] = 0.0f;
#pragma unroll 1
    for (int first = (past.open - 1) / 32 * 32; first >= 0; first -= 32, ++tile) {
        int token = first + lane.index;
        bool inside = token < past.open;
        f32 weight = far_weight(past, token, inside, lane.index, lost);
        if (tile % TEAM != warp) continue;
        f32 x[G];
        logits(past, inside ? token : first, queries, x);
#pragma unroll
        for (int g = 0; g < G; ++g) {
            f32 w = weight;
            int power = 0;
#pragma unroll
            for (int plane = 0; plane < PLANES; ++plane) {
                for (; power < orders[plane]; ++power) w *= x[g];
                sums[plane][g] += w;
            }
        }
    }
}
#endif
