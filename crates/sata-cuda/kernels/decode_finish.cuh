// From far sums to outputs: what one team does once the far sums of its head have been read. It weighs the raw tokens,
// brings all parts under one denominator, and leaves the new token in the state.
#pragma once
#include "decode_past.cuh"
#include "decode_team.cuh"
#include "decode_tokens.cuh"
#if PER_QUERY
#include "series.cuh"
#endif

// How the parts stand to each other in time.
struct Standing {
    f64 all;     // what the open tokens have lost together: log of it
    f64 gap;     // g at the reference of all less g at the far sums' own
    f64 since;   // g at the reference since the sequence's start
    f32 factor;  // what is left of the far sums
};
DEVICE Standing standing_of(const Past& past, int lane) {
    Standing s = {0.0, 0.0, past.mark.total, 1.0f};
#if FADES
    f64 logs = 0.0;
    for (int token = lane; token < past.open; token += 32) logs += past.log(token);
    s.all = warp_sum(logs);
    s.since = past.mark.total + s.all;
    f64 since_anchor = s.all + past.mark.lag;
    if (NEAR == NEAR_NONE && !past.is_sink()) {
        s.factor = faded(since_anchor);
    } else {
        s.gap = since_anchor;
    }
#endif
    return s;
}

// Sums over the team's warps of element `e` of what each has.
DEVICE f32 over_warps(const Team& team, int e) {
    f32 sum = team.parts[e];
#pragma unroll
    for (int w = 1; w < TEAM; ++w) sum += team.parts[w * G * ROW + e];
    return sum;
}

#if PER_QUERY
// Coefficients of query g of a pass, of its far sums and open tokens; gives the logarithm of their scale.
DEVICE f64 fit_query(const Decode& p, const Past& past, const Team& team, u32 slot, int pass, int g, f32 factor) {
    constexpr int orders[PLANES] = ORDERS;
    constexpr int MOST = largest(largest(HIGHEST + 1, TERMS), 3);
    f64 sums[MOST], c[MOST];
    for (int i = 0; i < MOST; ++i) sums[i] = 0.0;
#pragma unroll
    for (int plane = 0; plane < PLANES; ++plane) {
        f32 sum = team.far_of(plane, pass)[g * ROW + D_VALUE] * factor;
#if NEAR == NEAR_NONE
        for (int w = 0; w < TEAM; ++w) sum += team.parts[(w * PLANES + plane) * G + g];
#endif
        sums[orders[plane]] = f64(sum);
    }
    f64 farthest = past.mark.count == 0 ? 0.0 : fmax(p.reaches[slot], f64(team.scales[G]));
    Noise noise = {p.relative_noise, p.absolute_noise, sqrt(farthest) * sqrt(f64(team.scales[g]))};
    Fit fit = fit_series<MOST>(SERIES, f64(p.tau), nullptr, sums, HIGHEST + 1, noise, 0.0, c, TERMS);
    for (int i = 0; i < TERMS; ++i) team.coefficients[g * TERMS + i] = past.has_far() ? f32(c[i]) : 0.0f;
    team.far_of(0, pass)[g * ROW + D_VALUE] = past.has_far() ? f32(fit.denominator) : 0.0f;
    return past.has_far() ? fit.log_scale : 0.0;
}
#endif

// Makes plane 0 of the far sums the far numerators and denominators, open tokens included where they are far (which
// they already are where coefficients are the same for all queries: see decode.cu). Gives the logarithm of their scale.
DEVICE void finish_far(const Decode& p, const Past& past, const Team& team, u32 slot, int pass, const Standing& standing,
                       const Lane& lane, f32* level) {
    *level = 0.0f;
#if PER_QUERY
    constexpr int orders[PLANES] = ORDERS;
    // The squares of the queries' lengths, and of the new key's.
    for (int g = team.warp; g <= G; g += TEAM) {
        f32 size = 0.0f;
        for (int i = lane.index; i < D_KEY; i += 32) {
            f32 x = g < G ? team.queries_of(pass)[i * G + g] : team.new_key[i];
            size = fmaf(x, x, size);
        }
        size = warp_sum(size);
        if (lane.index == 0) team.scales[g] = size;
    }
#if NEAR == NEAR_NONE
    f32 sums[PLANES][G];
    moments(past, team.queries_of(pass), team.warp, lane, sums);
#pragma unroll
    for (int plane = 0; plane < PLANES; ++plane)
#pragma unroll
        for (int g = 0; g < G; ++g) {
            f32 sum = warp_sum(sums[plane][g]);
            if (lane.index == 0) team.parts[(team.warp * PLANES + plane) * G + g] = sum;
        }
#endif
    team.sync();
    if (team.thread < G) {
        f64 log_scale = fit_query(p, past, team, slot, pass, team.thread, standing.factor);
        f64 shifted = log_scale + standing.gap;
        *level = shifted < f64(LOWEST) ? LOWEST : f32(shifted);
    }
    team.sync();
#else
    if (team.thread < G) *level = f32(standing.gap);
#endif

#if PER_QUERY
#if NEAR == NEAR_NONE
    Sums a;
    clear(a);
    far_tokens(past, team.queries_of(pass), team.coefficients, TERMS, team.weights, team.warp, TEAM, lane, a);
    gather(a, lane, team.weights, team.parts + team.warp * G * ROW);
    team.sync();
#endif
    for (int e = team.thread; e < G * ROW; e += TEAM_THREADS) {
        // A query's denominator is already there.
        if (e % ROW == D_VALUE) continue;
        const f32* c = team.coefficients + e / ROW * TERMS;
        f32 sum = 0.0f;
#pragma unroll
        for (int plane = 0; plane < PLANES; ++plane) {
            if (orders[plane] < TERMS) sum = fmaf(c[orders[plane]], team.far_of(plane, pass)[e], sum);
        }
        sum *= standing.factor;
#if NEAR == NEAR_NONE
        sum += over_warps(team, e);
#endif
        team.far_of(0, pass)[e] = sum;
    }
    team.sync();
#endif
}

// Counts a denominator that is not positive and finite.
DEVICE void inspect(const Decode& p, f32 den, u64 place) {
    bool finite = den * 0.0f == 0.0f;
    if (finite && den > 0.0f) return;
    atomicAdd(finite ? &p.tally->non_positive : &p.tally->non_finite, u64(1));
    atomicMax(&p.tally->first, ~place);
}

DEVICE void write(const Decode& p, u32 entry, u32 head, int query, int column, f32 y) {
    row<E>(p.y, entry, i64(head) * GROUP + query, 0)[column] = from_f32<E>(y);
}
DEVICE u64 place_of(const Decode& p, u32 entry, u32 head, int query) {
    return u64(entry) * (u64(p.kv_heads) * GROUP) + u64(head) * GROUP + query;
}

// Answers the queries of one pass where all is far, and so has been summed: element(e) of [G][ROW].
template <class Element>
DEVICE void answer_far(const Decode& p, const Team& team, u32 entry, u32 head, int pass, Element element) {
    for (int e = team.thread; e < G * D_VALUE; e += TEAM_THREADS) {
        int g = e / D_VALUE, column = e % D_VALUE;
        if (pass * G + g >= GROUP) break;
        f32 den = element(g * ROW + D_VALUE);
        write(p, entry, head, pass * G + g, column, element(g * ROW + column) / den);
        if (column == 0) inspect(p, den, place_of(p, entry, head, pass * G + g));
    }
}

// Answers the queries of one pass.
DEVICE void answer(const Decode& p, const Past& past, const Team& team, u32 slot, u32 entry, u32 head, int pass,
                   const Standing& standing, const Lane& lane) {
    f32 level;
    finish_far(p, past, team, slot, pass, standing, lane, &level);
    const f32* far = team.far_of(0, pass);
    constexpr bool EXPONENTIAL = NEAR != NEAR_NONE || SINKS > 0;
    if constexpr (EXPONENTIAL) {
        Sums a;
        f32 max[G];
        clear(a);
#pragma unroll
        for (int g = 0; g < G; ++g) max[g] = LOWEST;
#if NEAR != NEAR_NONE
        near_tokens(past, team.queries_of(pass), team.weights, team.warp, lane, a, max);
#endif
#if SINKS > 0
        sinks(p, past, slot, standing.since, team.queries_of(pass), team.weights, team.warp, lane, a, max);
#endif
        gather(a, lane, team.weights, team.parts + team.warp * G * ROW);
        if (lane.index == 0) {
#pragma unroll
            for (int g = 0; g < G; ++g) team.levels[team.warp * G + g] = max[g];
        }
        team.sync();
    }
    int g = team.thread;
    if (g < G) {
        f32 den = far[g * ROW + D_VALUE];
        if constexpr (EXPONENTIAL) {
            if (!past.has_far()) level = LOWEST;
            f32 top = level;
            for (int w = 0; w < TEAM; ++w) top = fmaxf(top, team.levels[w * G + g]);
            f32 scale = expf(level - top);
            team.scales[g] = scale;
            den *= scale;
            for (int w = 0; w < TEAM; ++w) {
                scale = expf(team.levels[w * G + g] - top);
                team.scales[(w + 1) * G + g] = scale;
                den += team.parts[(w * G + g) * ROW + D_VALUE] * scale;
            }
        }
        team.scales[(TEAM + 1) * G + g] = den;
        int query = pass * G + g;
        if (query < GROUP) inspect(p, den, place_of(p, entry, head, query));
    }
    team.sync();
    for (int e = team.thread; e < G * D_VALUE; e += TEAM_THREADS) {
        int query = e / D_VALUE, column = e % D_VALUE;
        if (pass * G + query >= GROUP) break;
        f32 num = far[query * ROW + column];
        if constexpr (EXPONENTIAL) {
            num *= team.scales[query];
#pragma unroll
            for (int w = 0; w < TEAM; ++w) {
                num = fmaf(team.parts[(w * G + query) * ROW + column], team.scales[(w + 1) * G + query], num);
            }
        }
        write(p, entry, head, pass * G + query, column, num / team.scales[(TEAM + 1) * G + query]);
    }
    team.sync();
}

// What folding the block makes of the mark.
DEVICE Mark folded_mark(const Past& past) {
    Mark mark = past.p->marks[past.slot];
    f64 all = 0.0, after = 0.0;
    bool found = false;
    int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int first = (BLOCK - 1) / 32 * 32; first >= 0; first -= 32) {
        int token = first + lane;
        bool inside = token < BLOCK;
        u32 live = __ballot_sync(0xffffffffu, inside && past.weight(token) != 0.0f);
        mark.count += u64(__popc(live));
#if FADES
        f64 log = inside ? past.log(token) : 0.0;
        all += warp_sum(log);
        if (!found) after += warp_sum(lane > 31 - __clz(int(live)) ? log : 0.0);
#endif
        found |= live != 0;
    }
    mark.total += all;
    mark.lag = found ? after : mark.lag + all;
    return mark;
}

// Tells that a head's team has read its sequence's position; gives whether it is the last of the sequence's heads.
// What it has read comes in so that this cannot come before.
DEVICE bool tell_read(const Decode& p, const Past& past, u32 sequence) {
    if (p.kv_heads == 1) return true;
    u32 one = past.open > 0 && past.position != ~u64(0) ? 1 : 0;
    return atomicAdd(p.heads_done + sequence, one) == p.kv_heads - 1;
}

// Leaves the new token in the state. All that reads the head's past is done.
DEVICE void keep(const Decode& p, const Past& past, const Team& team, u32 slot, f64 since) {
    i64 place = past.place(past.open - 1);
    for (int i = team.thread; i < D_KEY; i += TEAM_THREADS) {
        p.open_keys[place * D_KEY + i] = past.is_sink() ? 0.0f : past.team->new_key[i];
    }
    for (int i = team.thread; i < D_VALUE; i += TEAM_THREADS) p.open_values[place * D_VALUE + i] = past.team->new_value[i];
#if SINKS > 0
    if (past.is_sink()) {
        i64 sink = i64(slot) * SINKS + i64(past.position);
        for (int i = team.thread; i < D_KEY; i += TEAM_THREADS) p.sink_keys[sink * D_KEY + i] = past.team->new_key[i];
        for (int i = team.thread; i < D_VALUE; i += TEAM_THREADS) p.sink_values[sink * D_VALUE + i] = past.team->new_value[i];
        if (team.thread == 0) {
            p.sink_weights[sink] = 1.0f;
#if FADES
            p.sink_fading[sink] = since;
#endif
        }
    }
#endif
    if (team.warp != 0) return;
    Mark mark = {0, 0.0, 0.0};
    if (past.folds()) mark = folded_mark(past);
    f32 reach = 0.0f;
    for (int i = team.thread; i < D_KEY; i += 32) reach = fmaf(past.team->new_key[i], past.team->new_key[i], reach);
    reach = warp_sum(reach);
    if (team.thread != 0) return;
    p.open_weights[place] = past.is_sink() ? 0.0f : 1.0f;
#if FADES
    p.open_fading[place] = past.new_log;
#endif
    if (past.folds()) p.marks[slot] = mark;
    if (f64(reach) > p.reaches[slot]) p.reaches[slot] = f64(reach);
}

// Counts the token, once all of its sequence's heads have read its position.
DEVICE void advance(const Decode& p, const Past& past, u32 sequence) {
    if (p.kv_heads > 1) p.heads_done[sequence] = 0;
    p.positions[sequence] = past.position + 1;
    p.open[sequence] = u32(past.folds() ? past.open - BLOCK : past.open);
    atomicAdd(&p.tally->queries[sequence % COUNTERS][0], u64(p.kv_heads) * GROUP);
}
