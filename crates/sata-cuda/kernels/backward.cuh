// What the kernels of the backward pass share: the call, where its tokens lie, where they stand in time.
//
// A *unit* is one key/value head of one sequence. Its tokens are counted in *places*: those that the state holds open,
// then the call's own. `folds` are the places F_0 = 0, F_1, …, F_n of a sequence: chunk c folds the tokens from F_c
// until F_(c+1) into the sums S_(c+1), and its queries read S_c and weigh what comes after F_c one by one. Without
// causality all queries read S_n, and weigh what comes after F_n.
//
// With v̂ = [v, 1], D = Σ w and ĝ_t = [dy_t, −δ_t]/D_t, δ = dy·y, every weight has dL/dw_ts = ĝ_t·v̂_s, and with
// Γ = Σ_t w_t Φ(q_t) ĝ_tᵀ over all queries that come after, every key has dv = Φᵀ Γ_v and h_f = Γ_f·v̂, dk = Σ h_f ∂Φ_f/∂k.
//
// Weights are relative to the last token that a query sees, and to exp(shift): exp(g_own − g_s − shift) κ. Sums are
// relative to the last token that they hold.
//
// Compile-time constants: NUMBER the type of tensors; D_KEY, D_VALUE; TERMS one more than the highest order; FADES whether
// weights decay; CAUSAL; BACKWARD_BYTES the size of the parameters.
#include "prelude.cuh"

typedef NUMBER E;

// Indices of a monomial: those of low order begin with D_KEY, where a token's elements are followed by a 1.
constexpr int ORDER = TERMS > 2 ? TERMS - 1 : 1;
constexpr int D_MORE = D_KEY + 1;
// A run of features with a common prefix: their first last index, how many, the prefix; and as many as make eights of bytes.
constexpr int RUN = (ORDER + 1 + 3) / 4 * 4;
// Stands for the level of what weighs nothing.
constexpr f32 NOTHING = -1e30f;

struct Sequence {
    i64 q_batch, q_first, queries;
    i64 k_batch, k_first, keys;
    // Places before the call's own tokens, and tokens of the sequence before place 0.
    i64 open, folded;
    // Elements of other sequences before its own: places (+1 each), queries.
    i64 places_at, queries_at;
    // Its part of `folds` (n + 1 of them) and of `reads`.
    i64 folds_at, folds, reads_at, reads;
    // The gradient by the final state joins Γ at this fold, and its open tokens begin at this place.
    i64 joins, open_after;
    // Its sequence of the state, and where the ring of its open tokens begins there.
    i64 slot, ring;
};

// Queries that read the same sums.
struct Read {
    i64 first, end;
};

struct Feature {
    u32 prefix, last;
};

// Raw tokens of a state, or gradients by them: rows of slot · kv_heads + head.
struct Raw {
    f32* keys;     // [rows][most][D_KEY]
    f32* values;   // [rows][most][D_VALUE]
    f64* fading;   // [rows][most]: logarithms; of all since the sequence's start for sinks. Of gradients: Σ w dw
    f32* weights;  // [rows][most], 1 or 0
    i64 most;
};

// What a state's sums stand at: tokens summed, g at the last token before place 0 less g at the last of those, and g
// there since the sequence's start.
struct Mark {
    u64 count;
    f64 lag, total;
};

struct Backward {
    View q, k, v, dy, dq, dk, dv, log_gates, d_log_gates;
    const Sequence* sequences;
    const i64* folds;
    const Read* reads;
    const u8* mask;  // [batch][keys], or null
    const f64* slopes;
    f64* d_slopes;

    const f32* coefficients;  // a_p
    const Feature* features;  // [features, and more that are 0]
    const u16* prefixes;
    const f32* factors;       // multiplicity · a_p, likewise
    const u16* runs;          // see RUN
    const i32* tile_runs;     // runs before each 32 features

    // The state that the call goes on from, or null: [rows]; its sums with what rounding took from them, or null; bf16
    // ones have the lower halves of an f32's bits there.
    const Mark* past;
    const void* past_sums;     // [rows][features][D_VALUE]
    const f32* past_z;         // [rows][features]
    const void* past_sums_low;
    const f32* past_z_low;
    i64 past_is_bf16;
    Raw open, sinks;
    // The gradient by the final state, and by the initial one; null where there is none.
    const f32* final_sums;
    const f32* final_z;
    Raw final_open, final_sinks;
    const f64* final_past;
    f32* initial_sums;
    f32* initial_z;
    Raw initial_open, initial_sinks;
    f64* initial_past;

    // Per place of each unit: g, g at the last token that a query just before it sees, Σ w dw, and what a key's features were
    // multiplied by when sums took them in. Per place of each sequence: how many there are up to the last before it that
    // weighs something.
    f64* g;
    f64* own;
    f64* dw;
    f32* folding;
    i32* live;
    // Per query: the logarithm that weights are relative to, 1/D, δ, and what sums are multiplied by over D.
    f32* shift;
    f32* inverse;
    f32* delta;
    f32* reading;

    // One set of sums per unit and chunk at work, [features][D_VALUE] and then [features]; what goes on to the next
    // chunks, and what rounding took from it; where reading leaves its share, [split][unit][group][chunk][row][token].
    f32* slots;
    f32* carry;
    f32* far;
    i64 slot_unit, slot_chunk;
    i64 far_tokens, far_split;
    // Gradients by sinks: [unit][split][sink][D_KEY + D_VALUE], and Σ w dw.
    f32* sink_rows;
    f64* sink_dw;
    i64 sink_splits, most_sinks;

    i64 features_count, mask_batch, block, sink_count, near;
    f32 scale;
    i32 kv_heads, group, sequences_count;
    // `far_heads`: of the tokens that read, per unit.
    i32 first_unit, units, first_chunk, chunks, far_heads, splits, mode, flags;
};
SAME_SIZE(Backward, BACKWARD_BYTES);

struct Unit {
    Sequence s;
    i64 head, total, row;
    const f64* g;
    const i32* live;
    // Whether the state's sums hold any token, and g at the last, relative to the last before place 0, as everywhere.
    bool past;
    f64 past_mark, past_total;
};

DEVICE Unit unit_of(const Backward& p, i64 index) {
    Unit u;
    i64 sequence = index / p.kv_heads;
    u.head = index % p.kv_heads;
    u.s = p.sequences[sequence];
    u.total = u.s.open + u.s.keys;
    u.g = p.g + (u.s.places_at * p.kv_heads + u.head * (u.total + 1));
    u.live = p.live + u.s.places_at;
    u.row = u.s.slot * p.kv_heads + u.head;
    u.past = p.past && p.past[u.row].count > 0;
    u.past_mark = u.past ? -p.past[u.row].lag : 0;
    u.past_total = p.past ? p.past[u.row].total : 0;
    return u;
}

// Unit `index` as `u`, in shared memory: it would take too many registers. All threads of the block take part.
#define UNIT(u, index)                                   \
    __shared__ Unit u;                                   \
    if (threadIdx.x == 0) u = unit_of(p, i64(index));    \
    __syncthreads()

DEVICE i64 unit_places(const Backward& p, const Unit& u) {
    return u.s.places_at * p.kv_heads + u.head * (u.total + 1);
}
// The first of a query head's numbers, `head` counted within the group.
DEVICE i64 unit_queries(const Backward& p, const Unit& u, i64 head) {
    return (u.s.queries_at * p.kv_heads + u.head * u.s.queries) * p.group + head * u.s.queries;
}
DEVICE i64 fold_of(const Backward& p, const Unit& u, i64 chunk) { return p.folds[u.s.folds_at + chunk]; }

// The fold that the queries of a read stand at.
DEVICE i64 fold_of_read(const Backward& p, const Unit& u, i64 read) { return fold_of(p, u, CAUSAL ? read : u.s.folds); }

DEVICE i64 place_of(const Unit& u, i64 query) { return CAUSAL ? u.s.open + query : u.total - 1; }

// Where the queries at a place stop to see by the polynomial.
DEVICE i64 far_until(const Backward& p, i64 place) {
    if (p.near < 0) return place + 1;
    i64 block = place / p.block;
    return block > p.near ? (block - p.near) * p.block : 0;
}

// Sinks that tokens before place `place` hold, and those that the state holds.
DEVICE i64 sinks_before(const Backward& p, const Unit& u, i64 place) { return min(u.s.folded + place, p.sink_count); }
DEVICE i64 old_sinks(const Backward& p, const Unit& u) { return sinks_before(p, u, u.s.open); }
DEVICE i64 place_of_sink(const Unit& u, i64 sink) { return sink - u.s.folded; }

DEVICE bool sink_is_live(const Backward& p, const Unit& u, i64 sink) {
    if (sink < old_sinks(p, u)) return p.sinks.weights[u.row * p.sinks.most + sink] != 0;
    return !p.mask || p.mask[u.s.k_batch * p.mask_batch + u.s.k_first + place_of_sink(u, sink) - u.s.open] != 0;
}
DEVICE f64 sink_g(const Backward& p, const Unit& u, i64 sink) {
    if (!FADES) return 0;
    if (sink < old_sinks(p, u)) return p.sinks.fading[u.row * p.sinks.most + sink] - u.past_total;
    return u.g[place_of_sink(u, sink)];
}

// Whether the sums of all tokens before `fold` hold any, and g at the last.
DEVICE bool mark_of(const Unit& u, i64 fold, f64& g) {
    i32 last = u.live[fold];
    g = 0;
    if (last == 0 && !u.past) return false;
    if (FADES) g = last > 0 ? u.g[last - 1] : u.past_mark;
    return true;
}

// Whether a query sees anything, and g at the last that it sees.
DEVICE bool own_of(const Backward& p, const Unit& u, i64 place, f64& g) {
    if (mark_of(u, place + 1, g)) return true;
    for (i64 sink = sinks_before(p, u, place + 1) - 1; sink >= 0; --sink) {
        if (sink_is_live(p, u, sink)) {
            g = sink_g(p, u, sink);
            return true;
        }
    }
    return false;
}

// Where the state's open token at a place is.
DEVICE i64 open_at(const Backward& p, const Unit& u, i64 place) {
    return u.row * p.open.most + (u.s.ring + place) % p.open.most;
}

// One element of the key or value at a place, and whether it weighs anything.
DEVICE f32 key_at(const Backward& p, const Unit& u, i64 place, int i) {
    if (place < u.s.open) return p.open.keys[open_at(p, u, place) * D_KEY + i];
    return to_f32(row<const E>(p.k, u.s.k_batch, u.head, u.s.k_first + place - u.s.open)[i]);
}
DEVICE f32 value_at(const Backward& p, const Unit& u, i64 place, int i) {
    if (place < u.s.open) return p.open.values[open_at(p, u, place) * D_VALUE + i];
    return to_f32(row<const E>(p.v, u.s.k_batch, u.head, u.s.k_first + place - u.s.open)[i]);
}
DEVICE f32 sink_key_at(const Backward& p, const Unit& u, i64 sink, int i) {
    if (sink < old_sinks(p, u)) return p.sinks.keys[(u.row * p.sinks.most + sink) * D_KEY + i];
    return key_at(p, u, place_of_sink(u, sink), i);
}
DEVICE f32 sink_value_at(const Backward& p, const Unit& u, i64 sink, int i) {
    if (sink < old_sinks(p, u)) return p.sinks.values[(u.row * p.sinks.most + sink) * D_VALUE + i];
    return value_at(p, u, place_of_sink(u, sink), i);
}
DEVICE bool is_live(const Unit& u, i64 place) { return u.live[place + 1] == place + 1; }

// A query's elements, times the scale, and those of its dL/dy.
DEVICE f32 query_at(const Backward& p, const Unit& u, i64 head, i64 query, int i) {
    return p.scale * to_f32(row<const E>(p.q, u.s.q_batch, u.head * p.group + head, u.s.q_first + query)[i]);
}
DEVICE f32 dy_at(const Backward& p, const Unit& u, i64 head, i64 query, int i) {
    return to_f32(row<const E>(p.dy, u.s.q_batch, u.head * p.group + head, u.s.q_first + query)[i]);
}

// Sums of unit `unit` (of those at work) and chunk `chunk` (likewise).
DEVICE f32* slot_of(const Backward& p, i64 unit, i64 chunk) { return p.slots + unit * p.slot_unit + chunk * p.slot_chunk; }

// One row of what reading leaves; `rows` of them.
DEVICE f32* far_of(const Backward& p, i64 split, i64 unit, i64 head, i64 chunk, i64 rows) {
    return p.far + split * p.far_split + ((unit * p.far_heads + head) * p.chunks + chunk) * rows * p.far_tokens;
}

// Σ a_p x^p and its slope.
DEVICE f32 polynomial(const f32* a, f32 x, f32& slope) {
    f32 y = a[TERMS - 1];
    slope = 0;
#pragma unroll
    for (int i = TERMS - 2; i >= 0; --i) {
        slope = fmaf(slope, x, y);
        y = fmaf(y, x, a[i]);
    }
    return y;
}

// Elements of `count` tokens, at most MOST, transposed: to[i · stride + t], zeros after the last. Four tokens a thread
// at once, since their rows of `to`, 4 (mod 32) apart, then lie in different banks.
template <int DIM, int MOST, int BY, class F>
DEVICE void load_transposed(f32* to, int stride, int count, F element) {
    for (int at = threadIdx.x; at < DIM * (MOST / 4); at += BY) {
        int i = at % DIM, t = at / DIM * 4;
        float4 x = make_float4(0, 0, 0, 0);
        if (t < count) x.x = element(t, i);
        if (t + 1 < count) x.y = element(t + 1, i);
        if (t + 2 < count) x.z = element(t + 2, i);
        if (t + 3 < count) x.w = element(t + 3, i);
        store4(to + i * stride + t, x);
    }
}
