// One step of decode: each (sequence, key/value head) of a list takes one token, and its query heads are answered.
//
//     y = (Σ_p a_p S_pᵀ Φ_p(q) + tokens by the polynomial or by exp) / (the same of Z and 1)
//
// Shapes: q [entries, kv_heads · GROUP, 1, D_KEY], k [entries, kv_heads, 1, D_KEY], v [.., D_VALUE] of NUMBER; the
// state by slot = sequence · kv_heads + head: far sums [slot][FEATURES][D_VALUE] f32 or bf16, Z [slot][FEATURES] f32,
// open tokens and sinks f32. Features are monomials in the order of the CPU's basis.
//
// A team has one head: a warp where states are small, else a block, or several blocks of
// which the last to come goes on. Each of its warps streams tiles of rows of S and Z, making the features of a tile for PASS queries at once as
// it goes, one feature per lane: a product of HIGHEST numbers of shared memory, whose indices are packed in a word or
// two of a table that all heads share. Then the team weighs the open tokens and sinks, divides, and writes. In a step
// that fills a block, each warp also folds that block into the rows that it has just read.
//
// What the host does depends on no data: positions are on the device, and blocks branch on them.
//
// Bytes: FEATURES · (D_VALUE · 4 or 2 + 4) read a head and step, as many written each BLOCK steps, and the open tokens.
// FLOPs: 2 · FEATURES · (D_VALUE + 1 + HIGHEST / 2) a query; folding, 2 · FEATURES · D_VALUE a token.
#include "decode_finish.cuh"
#include "decode_fold.cuh"

// Open tokens by the same coefficients as the far sums: they are weighed along with them.
constexpr bool ALONG = !PER_QUERY && NEAR == NEAR_NONE;
// The block lies in shared memory as a whole: each tile of rows is folded as soon as it has been read.
constexpr bool FOLD_AT_ONCE = BLOCK <= FOLD_TOKENS;

// Tiles of a range that one of `count` takes.
DEVICE Rows share(Rows all, u32 index, u32 count, int tile) {
    u32 tiles = u32(all.to - all.from + tile - 1) / tile;
    // Products of tiles and parts (at most 256) stay below 2^32.
    static_assert(FEATURES / 32 < (1 << 24), "too many features");
    int from = all.from + int(tiles * index / count) * tile, to = all.from + int(tiles * (index + 1) / count) * tile;
    return Rows{min(from, all.to), min(to, all.to)};
}
// The rows of a plane among those.
DEVICE Rows of_plane(Rows all, int plane) {
#if PER_QUERY
    constexpr int starts[PLANES + 1] = STARTS;
    return Rows{max(all.from, starts[plane]), max(max(all.from, starts[plane]), min(all.to, starts[plane + 1]))};
#else
    return all;
#endif
}

// `count` numbers to shared memory, converted: all loads first, for each waits for memory.
template <int count>
struct Inputs {
    static constexpr int EACH = (count + TEAM_THREADS - 1) / TEAM_THREADS;
    static constexpr int KEPT = EACH < 8 ? EACH : 8;
    E kept[KEPT];
    template <class From>
    DEVICE void load(int thread, From from) {
#pragma unroll
        for (int i = 0; i < KEPT; ++i) {
            int e = thread + i * TEAM_THREADS;
            if (e < count) kept[i] = from(e);
        }
    }
    template <class From, class To>
    DEVICE void store(int thread, From from, To to) const {
#pragma unroll
        for (int i = 0; i < KEPT; ++i) {
            int e = thread + i * TEAM_THREADS;
            if (e < count) to(e, to_f32(kept[i]));
        }
        for (int e = thread + KEPT * TEAM_THREADS; e < count; e += TEAM_THREADS) to(e, to_f32(from(e)));
    }
};
DEVICE void load_inputs(const Decode& p, const Team& team, u32 entry, u32 head) {
    const E* q = row<E>(p.q, entry, i64(head) * GROUP, 0);
    const E* k = row<E>(p.k, entry, head, 0);
    const E* v = row<E>(p.v, entry, head, 0);
    auto from_q = [&](int e) { return q[e / D_KEY * p.q.head + e % D_KEY]; };
    auto from_k = [&](int e) { return k[e]; };
    auto from_v = [&](int e) { return v[e]; };
    auto place = [](int query, int i) { return (query / G * (D_KEY + 1) + i) * G + query % G; };
    Inputs<GROUP * D_KEY> queries;
    Inputs<D_KEY> key;
    Inputs<D_VALUE> value;
    queries.load(team.thread, from_q);
    key.load(team.thread, from_k);
    value.load(team.thread, from_v);
    queries.store(team.thread, from_q, [&](int e, f32 x) { team.queries[place(e / D_KEY, e % D_KEY)] = x * p.scale; });
    key.store(team.thread, from_k, [&](int e, f32 x) { team.new_key[e] = x; });
    value.store(team.thread, from_v, [&](int e, f32 x) { team.new_value[e] = x; });
    // Heads that fill up the last pass; and the row of ones.
    for (int e = GROUP * D_KEY + team.thread; e < HEADS * D_KEY; e += TEAM_THREADS) {
        team.queries[place(e / D_KEY, e % D_KEY)] = 0.0f;
    }
    for (int query = team.thread; query < HEADS; query += TEAM_THREADS) team.queries[place(query, D_KEY)] = 1.0f;
}

DEVICE Past past_of(const Decode& p, const Team& team, u32 slot, u32 sequence, u32 entry, u32 head) {
    Past past;
    past.p = &p;
    past.team = &team;
    past.slot = slot;
    past.position = p.positions[sequence];
    past.open = int(p.open[sequence]) + 1;
    past.start = int((past.position - u64(past.open - 1)) % CAPACITY);
    past.mark = p.marks[slot];
    prefetch_line(p.reaches + slot);
    past.new_log = 0.0;
    // No logit makes up for less than e^-100000.
#if FADES == FADES_GATES
    past.new_log = fmax(f64(p.log_gates[entry * p.gates_batch + head * p.gates_head]), -1e5);
#elif FADES == FADES_SLOPES
    past.new_log = fmax(-p.slopes[head], -1e5);
#endif
    return past;
}

// Asks for the open tokens, which are looked at when the far sums have been read.
DEVICE void prefetch_tokens(const Past& past, int thread, int threads) {
#pragma unroll 1
    for (int token = thread; token < past.open - 1; token += threads) {
        const f32 *key = past.old_key(token), *value = past.old_value(token);
#pragma unroll
        for (int i = 0; i < D_KEY; i += 32) prefetch_line(key + i);
#pragma unroll
        for (int i = 0; i < D_VALUE; i += 32) prefetch_line(value + i);
    }
}

// Adds up what the parts have of a head, each plane those that have rows of it.
DEVICE void join_parts(const Decode& p, const Team& team, u32 unit, const Lane& lane) {
#pragma unroll 1
    for (int plane = 0; plane < PLANES; ++plane) {
        u32 first = 0, end = p.split;
#if PER_QUERY
        constexpr int starts[PLANES + 1] = STARTS;
        constexpr u64 tiles = (FEATURES + TILE - 1) / TILE;
        // Part i has tiles from floor(tiles i / split) on.
        first = u32((u64(starts[plane] / TILE + 1) * p.split + tiles - 1) / tiles) - 1;
        end = u32((u64((starts[plane + 1] - 1) / TILE + 1) * p.split + tiles - 1) / tiles);
#endif
#pragma unroll 1
        for (int pass = 0; pass < PASSES; ++pass) {
            const f32* from = p.partial + (i64(unit) * p.split * PLANES + plane) * (HEADS * ROW) + pass * G * ROW;
            for (int e = lane.index; e < G * ROW; e += 32) {
                f32 sum = 0.0f;
#pragma unroll 16
                for (u32 part = first + team.warp; part < end; part += TEAM) {
                    sum += __ldcg(from + i64(part) * (PLANES * HEADS * ROW) + e);
                }
                team.parts[team.warp * G * ROW + e] = sum;
            }
            team.sync();
            for (int e = team.thread; e < G * ROW; e += TEAM_THREADS) team.far_of(plane, pass)[e] = over_warps(team, e);
            team.sync();
        }
    }
}

// Whether the caller's block is the last of those that have a part of the head.
DEVICE bool is_last(const Decode& p, const Team& team, u32 unit) {
    __threadfence();
    team.sync();
    if (team.thread == 0) {
        bool last = atomicAdd(p.parts_done + unit, 1u) == p.split - 1;
        if (last) p.parts_done[unit] = 0;
        *team.flag = last;
    }
    team.sync();
    bool last = *team.flag != 0;
    if (last) __threadfence();
    return last;
}

DEVICE Team team_of(unsigned char* shared, int warp, const Lane& lane) {
    Team team;
    team.warp = TEAM == 1 ? 0 : warp;
    team.thread = TEAM == 1 ? lane.index : threadIdx.x;
    f32* at = reinterpret_cast<f32*>(shared) + (TEAM == 1 ? warp * TEAM_FLOATS : 0);
    team.queries = at, at += round4(SHARED_QUERIES);
    team.new_key = at, at += round4(D_KEY);
    team.new_value = at, at += round4(D_VALUE);
    team.far = at, at += round4(SHARED_FAR);
    team.parts = at, at += round4(SHARED_PARTS);
    team.levels = at, at += round4(SHARED_LEVELS);
    team.coefficients = at, at += round4(SHARED_COEFFICIENTS);
    team.scales = at, at += round4(SHARED_SCALES);
    team.flag = reinterpret_cast<u32*>(at), at += 4;
    team.fold = at, at += SHARED_FOLD;
    team.weights = at + team.warp * round4(SHARED_WARP);
    return team;
}

// A head that a team serves.
struct Unit {
    u32 index, entry, head, sequence, slot;
    bool there;
};
DEVICE Unit unit_of(const Decode& p, u32 index) {
    Unit unit = {index, index / p.kv_heads, index % p.kv_heads, 0, 0, false};
    if (unit.entry >= p.entries) return unit;
    unit.sequence = p.slots == nullptr ? unit.entry : p.slots[unit.entry];
    unit.slot = unit.sequence * p.kv_heads + unit.head;
    unit.there = unit.sequence < p.sequences;
    return unit;
}

// Rows that a warp reads first: of the highest order, which has most.
DEVICE Rows first_rows(Rows own, int warp) { return share(of_plane(own, PLANES - 1), warp, TEAM, TILE); }

// Serves a head, or a part of it. `first` has been loaded for it.
DEVICE void serve(const Decode& p, const Team& team, const Unit& unit, u32 part, u32 split, const Lane& lane,
                  First& first) {
    const u32 slot = unit.slot;
    Rows own = share(Rows{0, FEATURES}, part, split, TILE);
    Past past = past_of(p, team, slot, unit.sequence, unit.entry, unit.head);
    load_inputs(p, team, unit.entry, unit.head);
    if (part == 0) prefetch_tokens(past, team.thread, TEAM_THREADS);
    team.sync();
    // A warp has then read all that it wants of the position; of more warps some may not.
    bool is_last_head = false;
    if (TEAM == 1 && team.thread == 0) is_last_head = tell_read(p, past, unit.sequence);
    Standing standing = standing_of(past, lane.index);
    Fading fading = {1.0f, false};
    if (past.folds()) {
        fading = fading_of(past);
        Backwards b = {0.0, false};
        if (FOLD_AT_ONCE && fading.live) {
            bring(past, team, 0, b);
            // Once more, so that they took no registers from that.
            Rows rows = first_rows(own, team.warp);
            if (EARLY) load_first<false>(p, slot, rows.from, rows.to, lane, first);
        }
    }

#pragma unroll 1
    for (int pass = 0; pass < PASSES; ++pass) {
#pragma unroll 1
        for (int plane = PLANES - 1; plane >= 0; --plane) {
            Rows rows = of_plane(own, plane);
            // Others' rows; where there is but one part, the plane has rows.
            if (PLANES > 1 && rows.from == rows.to) continue;
            Rows mine = share(rows, team.warp, TEAM, TILE);
            if (EARLY && (pass > 0 || plane < PLANES - 1)) load_first<ONCE>(p, slot, mine.from, mine.to, lane, first);
            Sums a;
            clear(a);
            const f32* queries = team.queries_of(pass);
            if (FOLD_AT_ONCE && fading.live && pass == PASSES - 1) {
                read_sums<true>(p, slot, mine, queries, team.weights, lane, first, a, [&](int from, int to) {
                    fold(p, past, team, slot, from, to, fading.factor, lane);
                });
            } else {
                read_sums<false>(p, slot, mine, queries, team.weights, lane, first, a, [](int, int) {});
            }
            if constexpr (ALONG) {
                if (FADES) scale(a, standing.factor);
                far_tokens(past, queries, p.coefficients, 0, team.weights, part * TEAM + team.warp, split * TEAM, lane,
                           a);
            }
            f32* to = team.far_of(plane, pass);
            if constexpr (TEAM == 1) {
                gather(a, lane, team.weights, to);
                team.sync();
            } else {
                gather(a, lane, team.weights, team.parts + team.warp * G * ROW);
                team.sync();
                if (split > 1) {
                    i64 place = (i64(unit.index) * split + part) * PLANES + plane;
                    to = p.partial + place * (HEADS * ROW) + pass * G * ROW;
                }
                for (int e = team.thread; e < G * ROW; e += TEAM_THREADS) to[e] = over_warps(team, e);
                team.sync();
            }
        }
    }
    if (!FOLD_AT_ONCE && fading.live) {
        Backwards b = {0.0, false};
        f32 factor = fading.factor;
#pragma unroll 1
        for (int token = (BLOCK - 1) / FOLD_TOKENS * FOLD_TOKENS; token >= 0; token -= FOLD_TOKENS) {
            bring(past, team, token, b);
#pragma unroll 1
            for (int plane = 0; plane < PLANES; ++plane) {
                Rows rows = share(of_plane(own, plane), team.warp, TEAM, TILE);
                fold(p, past, team, slot, rows.from, rows.to, factor, lane);
            }
            factor = 1.0f;
        }
    }
    if constexpr (TEAM > 1) {
        if (split > 1) {
            if (!is_last(p, team, unit.index)) return;
            join_parts(p, team, unit.index, lane);
        }
    }
#pragma unroll 1
    for (int pass = 0; pass < PASSES; ++pass) {
        if constexpr (ALONG && SINKS == 0) {
            const f32* far = team.far_of(0, pass);
            answer_far(p, team, unit.entry, unit.head, pass, [&](int e) { return far[e]; });
        } else {
            answer(p, past, team, slot, unit.entry, unit.head, pass, standing, lane);
        }
    }
    keep(p, past, team, slot, standing.since);
    if (team.thread == 0) {
        if (TEAM > 1) {
            __threadfence();
            is_last_head = tell_read(p, past, unit.sequence);
        }
        if (is_last_head) advance(p, past, unit.sequence);
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, MIN_BLOCKS) decode(const __grid_constant__ Decode p) {
    DYNAMIC_SHARED(shared);
    int warp = threadIdx.x / 32;
    Lane lane = lane_of(threadIdx.x % 32);
    Team team = team_of(shared, warp, lane);
    First first;
    if constexpr (TEAM == 1) {
        Unit unit = unit_of(p, blockIdx.x * WARPS + warp);
        if (!unit.there) return;
        const Rows rows = first_rows(Rows{0, FEATURES}, 0);
        if (EARLY) load_first<ONCE>(p, unit.slot, rows.from, rows.to, lane, first);
        serve(p, team, unit, 0, 1, lane, first);
    } else {
        Unit unit = unit_of(p, blockIdx.x / p.split);
        if (!unit.there) return;
        u32 part = blockIdx.x % p.split;
        Rows rows = first_rows(share(Rows{0, FEATURES}, part, p.split, TILE), team.warp);
        if (EARLY) load_first<ONCE>(p, unit.slot, rows.from, rows.to, lane, first);
        serve(p, team, unit, part, p.split, lane, first);
    }
}
