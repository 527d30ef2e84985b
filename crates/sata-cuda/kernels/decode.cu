// One step of decode: each (sequence, key/value head) of a list takes one token, and its query heads are answered.
//
//     y = (Σ_p a_p S_pᵀ Φ_p(q) + tokens by the polynomial or by exp) / (the same of Z and 1)
//
// Shapes: q [entries, kv_heads · GROUP, 1, D_KEY], k [entries, kv_heads, 1, D_KEY], v [.., D_VALUE] of NUMBER; the
// state by slot = sequence · kv_heads + head: far sums [slot][FEATURES][D_VALUE] f32 or bf16, Z [slot][FEATURES] f32,
// open tokens and sinks f32. Features are monomials in the order of the CPU's basis.
//
// A team (a warp where states are small, else a block, or several blocks of which the last to come goes on) has one
// head. Each of its warps streams tiles of rows of S and Z, making the features of a tile for PASS queries at once as
// it goes, one feature per lane: a product of HIGHEST numbers of shared memory, whose indices are packed in a word or
// two of a table that all heads share. Then the team weighs the open tokens and sinks, divides, and writes. In a step
// that fills a block, each warp also folds that block into the rows that it has just read.
//
// What the host does depends on no data: positions are on the device, and blocks branch on them.
//
// Bytes: FEATURES · (D_VALUE · 4 or 2 + 4) read a head and step, as many written each BLOCK steps, and the open tokens.
// FLOPs: 2 · FEATURES · (D_VALUE + 1 + HIGHEST / 2) a query; folding, 2 · FEATURES · D_VALUE a token.
#include "decode_finish.cuh"

// Tiles of a range that one of `count` takes.
struct Rows {
    int from, to;
};
DEVICE Rows share(Rows all, int index, int count, int tile) {
    i64 tiles = (all.to - all.from + tile - 1) / tile;
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

DEVICE void load_inputs(const Decode& p, const Team& team, u32 entry, u32 head) {
    for (int e = team.thread; e < HEADS * D_KEY; e += TEAM_THREADS) {
        int query = e / D_KEY, i = e % D_KEY;
        f32 x = query < GROUP ? to_f32(row<E>(p.q, entry, i64(head) * GROUP + query, 0)[i]) * p.scale : 0.0f;
        team.queries[(query / G * (D_KEY + 1) + i) * G + query % G] = x;
    }
    for (int query = team.thread; query < HEADS; query += TEAM_THREADS) {
        team.queries[(query / G * (D_KEY + 1) + D_KEY) * G + query % G] = 1.0f;
    }
    for (int i = team.thread; i < D_KEY; i += TEAM_THREADS) team.new_key[i] = to_f32(row<E>(p.k, entry, head, 0)[i]);
    for (int i = team.thread; i < D_VALUE; i += TEAM_THREADS) {
        team.new_value[i] = to_f32(row<E>(p.v, entry, head, 0)[i]);
    }
}

DEVICE Past past_of(const Decode& p, const Team& team, i64 slot, u32 sequence, u32 entry, u32 head) {
    Past past;
    past.keys = p.open_keys + slot * (i64(CAPACITY) * D_KEY);
    past.values = p.open_values + slot * (i64(CAPACITY) * D_VALUE);
    past.weights = p.open_weights + slot * CAPACITY;
    past.fading = p.open_fading + slot * CAPACITY;
    past.position = p.positions[sequence];
    past.open = int(p.open[sequence]) + 1;
    past.start = int((past.position - u64(past.open - 1)) % CAPACITY);
    past.new_key = team.new_key;
    past.new_value = team.new_value;
    past.new_log = 0.0;
    // No logit makes up for less than e^-100000.
#if FADES == FADES_GATES
    past.new_log = fmax(f64(p.log_gates[entry * p.gates_batch + head * p.gates_head]), -1e5);
#elif FADES == FADES_SLOPES
    past.new_log = fmax(-p.slopes[head], -1e5);
#endif
    past.is_sink = SINKS > 0 && past.position < u64(largest(SINKS, 1));
    past.mark = p.marks[slot];
    return past;
}

// Whether the caller's block is the last of those that have a part of the head; then it brings their sums together.
DEVICE bool is_last(const Decode& p, const Team& team, u32 unit, const Lane& lane) {
#if TEAM > 1
    if (p.split == 1) return true;
    __threadfence();
    team.sync();
    if (team.thread == 0) {
        bool last = atomicAdd(p.parts_done + unit, 1u) == p.split - 1;
        if (last) p.parts_done[unit] = 0;
        *team.flag = last;
    }
    team.sync();
    if (*team.flag == 0) return false;
    __threadfence();
    Rows all = {0, FEATURES};
#pragma unroll 1
    for (int plane = 0; plane < PLANES; ++plane) {
        // The parts that have rows of this plane.
        int first = -1, end = 0;
        for (int part = 0; part < int(p.split); ++part) {
            Rows rows = of_plane(share(all, part, int(p.split), TILE), plane);
            if (rows.from < rows.to) {
                if (first < 0) first = part;
                end = part + 1;
            }
        }
#pragma unroll 1
        for (int pass = 0; pass < PASSES; ++pass) {
            const f32* from = p.partial + (i64(unit) * p.split * PLANES + plane) * (HEADS * ROW) + pass * G * ROW;
            for (int e = lane.index; e < G * ROW; e += 32) {
                f32 sum = 0.0f;
#pragma unroll 16
                for (int part = first + team.warp; part < end; part += TEAM) {
                    sum += __ldcg(from + i64(part) * (PLANES * HEADS * ROW) + e);
                }
                team.parts[team.warp * G * ROW + e] = sum;
            }
            team.sync();
            for (int e = team.thread; e < G * ROW; e += TEAM_THREADS) team.far_of(plane, pass)[e] = over_warps(team, e);
            team.sync();
        }
    }
#endif
    return true;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, MIN_BLOCKS) decode(const __grid_constant__ Decode p) {
    DYNAMIC_SHARED(shared);
    int warp = threadIdx.x / 32;
    Lane lane = lane_of(threadIdx.x % 32);
    Team team;
    team.warp = TEAM == 1 ? 0 : warp;
    team.thread = TEAM == 1 ? lane.index : threadIdx.x;
    f32* at = reinterpret_cast<f32*>(shared) + (TEAM == 1 ? warp * TEAM_FLOATS : 0);
    team.queries = at, at += round4(SHARED_QUERIES);
    team.new_key = at, team.new_value = at + round4(D_KEY), at += round4(D_KEY) + round4(D_VALUE);
    team.far = at, at += round4(SHARED_FAR);
    team.parts = at, at += round4(SHARED_PARTS);
    team.levels = at, at += round4(SHARED_LEVELS);
    team.coefficients = at, at += round4(SHARED_COEFFICIENTS);
    team.scales = at, at += round4(SHARED_SCALES);
    team.flag = reinterpret_cast<u32*>(at), at += 4;
    team.weights = at + team.warp * round4(SHARED_WARP);

    u32 unit = TEAM == 1 ? blockIdx.x * WARPS + warp : blockIdx.x / p.split;
    u32 part = TEAM == 1 ? 0 : blockIdx.x % p.split;
    u32 entry = unit / p.kv_heads, head = unit % p.kv_heads;
    if (entry >= p.entries) return;
    u32 sequence = p.slots == nullptr ? entry : p.slots[entry];
    if (sequence >= p.sequences) return;
    i64 slot = i64(sequence) * p.kv_heads + head;
    load_inputs(p, team, entry, head);
    Past past = past_of(p, team, slot, sequence, entry, head);
    team.sync();

    Rows own = share(Rows{0, FEATURES}, int(part), int(p.split), TILE);
#pragma unroll 1
    for (int pass = 0; pass < PASSES; ++pass) {
#pragma unroll 1
        for (int plane = 0; plane < PLANES; ++plane) {
            f32* to = team.far_of(plane, pass);
            Rows rows = of_plane(own, plane);
            if (PLANES > 1 && rows.from == rows.to) {
                // Not ours; where there is but one part, the plane has rows.
                continue;
            }
            Sums a;
            clear(a);
            Rows mine = share(rows, team.warp, TEAM, TILE);
            read_sums(p, slot, mine.from, mine.to, team.queries_of(pass), team.weights, lane, a);
            if constexpr (TEAM == 1) {
                gather(a, lane, team.weights, to);
                team.sync();
            } else {
                gather(a, lane, team.weights, team.parts + team.warp * G * ROW);
                team.sync();
                if (p.split > 1) {
                    i64 place = (i64(unit) * p.split + part) * PLANES + plane;
                    to = p.partial + place * (HEADS * ROW) + pass * G * ROW;
                }
                for (int e = team.thread; e < G * ROW; e += TEAM_THREADS) to[e] = over_warps(team, e);
                team.sync();
            }
        }
    }
    if (past.folds()) {
        Fading fading = fading_of(past);
        Rows mine = share(own, team.warp, TEAM, 32);
        fold(p, past, slot, mine.from, mine.to, fading, team.weights, lane);
    }
    if (!is_last(p, team, unit, lane)) return;

    Standing standing = standing_of(past, lane.index);
#pragma unroll 1
    for (int pass = 0; pass < PASSES; ++pass) answer(p, past, team, slot, entry, head, pass, standing, lane);
    keep(p, past, team, slot, sequence, standing.since);
}
