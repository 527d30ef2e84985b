// Raw tokens, 32 at a time, one per lane: logits, then weights, then the rows of values past them.
#pragma once
#include "decode_past.cuh"
#include "decode_sums.cuh"

// x of one key for G queries.
DEVICE void logits(const f32* key, const f32* queries, f32 (&x)[G]) {
#pragma unroll
    for (int g = 0; g < G; ++g) x[g] = 0.0f;
    if constexpr (D_KEY % 4 == 0) {
#pragma unroll 8
        for (int i = 0; i < D_KEY; i += 4) {
            float4 k = load4(key + i);
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
            f32 q[G];
            load_heads(queries + i * G, q);
#pragma unroll
            for (int g = 0; g < G; ++g) x[g] = fmaf(key[i], q[g], x[g]);
        }
    }
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

// Adds the weights' rows of values. `weights` is [32][G], `row` gives the values of a token below `count`.
template <class Rows>
DEVICE void add_values(Sums& a, const f32* weights, int count, const Lane& lane, Rows row) {
#pragma unroll
    for (int s = 0; s < STRETCHES; ++s) {
        if (!has_row(lane) || !has_column(lane, s)) continue;
#pragma unroll 4
        for (int t = lane.row; t < count; t += AT_ONCE) {
            Vec value = load(row(t) + (s * ACROSS + lane.column) * VEC);
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
        logits(past.key(inside ? token : first), queries, x);
        exponential(a, max, x, fading, live);
        store_heads(weights + lane.index * G, x);
        __syncwarp();
        add_values(a, weights, min(past.open - first, 32), lane, [&](int t) { return past.value(first + t); });
        __syncwarp();
    }
}

// The sinks by exp: this warp's share of them. `since` is g at the new token since the sequence's start.
DEVICE void sinks(const Decode& p, const Past& past, i64 slot, f64 since, const f32* queries, f32* weights, int warp,
                  const Lane& lane, Sums& a, f32 (&max)[G]) {
    const f32* keys = p.sink_keys + slot * (i64(SINKS) * D_KEY);
    const f32* values = p.sink_values + slot * (i64(SINKS) * D_VALUE);
    int count = past.is_sink ? int(past.position) + 1 : SINKS;
    int newest = past.is_sink ? int(past.position) : -1;
#pragma unroll 1
    for (int first = warp * 32; first < count; first += TEAM * 32) {
        int token = first + lane.index;
        bool inside = token < count;
        f32 live = 0.0f, fading = 0.0f, x[G];
        if (inside) live = token == newest ? 1.0f : p.sink_weights[slot * SINKS + token];
#if FADES
        if (inside && token != newest) fading = f32(since - p.sink_fading[slot * SINKS + token]);
#endif
        int known = inside ? token : first;
        logits(known == newest ? past.new_key : keys + i64(known) * D_KEY, queries, x);
        exponential(a, max, x, fading, live);
        store_heads(weights + lane.index * G, x);
        __syncwarp();
        add_values(a, weights, min(count - first, 32), lane, [&](int t) {
            return first + t == newest ? past.new_value : values + i64(first + t) * D_VALUE;
        });
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

// The open tokens by the polynomial with coefficients [TERMS] of each query, or of all (`stride` 0).
DEVICE void far_tokens(const Past& past, const f32* queries, const f32* coefficients, int stride, f32* weights,
                       int warp, const Lane& lane, Sums& a) {
    f64 lost = 0.0;
    int tile = 0;
#pragma unroll 1
    for (int first = (past.open - 1) / 32 * 32; first >= 0; first -= 32, ++tile) {
        int token = first + lane.index;
        bool inside = token < past.open;
        f32 weight = far_weight(past, token, inside, lane.index, lost);
        if (tile % TEAM != warp) continue;
        f32 x[G];
        logits(past.key(inside ? token : first), queries, x);
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
        add_values(a, weights, min(past.open - first, 32), lane, [&](int t) { return past.value(first + t); });
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
        logits(past.key(inside ? token : first), queries, x);
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
