// Of each token of a call's windows: g, the running sum of the logarithms of the decays, and how many tokens there are
// up to the last one that is there.
//
// Shapes: gates [tokens] f32 per batch and key/value head (a view with dim 1), or slopes [kv_heads] f64; the state's
// open tokens' own logarithms [slots][capacity] f64; log, g [kv_heads][works] f64. Mask [batch][tokens], one byte a
// token; the state's weights [slots][capacity] f32; live [works] u8, last [works] i32; the same of sinks.
// g is relative to what is just before the window; only differences of it are ever used, and it stays f64 so that they
// keep their digits however long the sequence.
// Blocks: one per piece of 2048 tokens and head. `running_sums` and `living_ends` find what each piece comes to;
// `running` and `living` join those before a piece, in an order that only its place decides, and go through it. Bytes:
// twice 4 or 0 read and 8 (with log 16) written per token and head, twice 1 read and 5 written per token.
#include "generic.cuh"

constexpr int SCANNERS = 256;             // threads
constexpr int ITEMS = 8;                  // neighbouring tokens of one thread
constexpr int PIECE = SCANNERS * ITEMS;   // tokens of a block
static_assert(PIECE == PIECE_TOKENS, "as in Rust");

struct Decay {
    View gates;               // where there are gates
    const f64* slopes;        // [kv_heads], where there are slopes
    const f64* open;          // [slots][capacity], or null
    const Sequence* sequences;
    f64* log;                 // or null
    f64* g;
    f64* sums;                // [kv_heads][pieces]: of the logarithms of each piece
    i64 works, capacity, pieces;
    i32 sequence_count, kv_heads;
};
SAME_SIZE(Decay, DECAY_BYTES);

struct Living {
    const u8* mask;           // or null
    const f32* open;          // [slots][capacity], or null
    const f32* sinks;         // [slots][sink_capacity], or null
    const Sequence* sequences;
    u8* live;
    i32* last;
    u8* sink_live;
    i32* sink_last;
    i32 *ends, *sink_ends;    // [pieces], [sink pieces]: tokens of the sequence up to a piece's last that is there, or 0
    i64 mask_batch, capacity, sink_capacity, most_sinks, pieces, sink_pieces;
    i32 sequence_count, kv_heads;
};
SAME_SIZE(Living, LIVING_BYTES);

// The scan over a block's threads, exclusive; `total` is that over all.
template <class T, class F>
DEVICE T scan_threads(T x, T nothing, T* shared, T* total, F join) {
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
    T sum = x;
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
        const T other = __shfl_up_sync(0xffffffffu, sum, unsigned(by));
        if (lane >= by) sum = join(other, sum);
    }
    T before = __shfl_up_sync(0xffffffffu, sum, 1u);
    if (lane == 0) before = nothing;
    __syncthreads();
    if (lane == 31) shared[warp] = sum;
    __syncthreads();
    T earlier = nothing, all = nothing;
#pragma unroll
    for (int i = 0; i < SCANNERS / 32; i++) {
        if (i == warp) earlier = all;
        all = join(all, shared[i]);
    }
    *total = all;
    return join(earlier, before);
}

// Below this a gate's logarithm is as good as minus infinity: no logit makes up for it.
DEVICE f64 log_of(f64 x) { return x < -1e5 ? -1e5 : x; }

// Where a piece is: windows lie side by side, and the pieces of sequence n are those from begin / PIECE + n on, so that
// a sequence has as many as it needs, or one more.
struct Stretch {
    i64 n, first, place;  // the sequence, the piece's first token, its sequence's first piece
};
template <class Begin>
DEVICE Stretch piece_of(i64 piece, i32 count, Begin begin) {
    i64 low = 0, high = count;
    while (high - low > 1) {
        const i64 middle = (low + high) / 2;
        if (begin(middle) / PIECE + middle <= piece) low = middle;
        else high = middle;
    }
    const i64 place = begin(low) / PIECE + low;
    return Stretch{low, (piece - place) * PIECE, place};
}

// The logarithms of a thread's tokens, which are 32 apart from `own` on; returns their sum.
DEVICE f64 logs_of(const Decay& p, const Sequence& s, i64 n, int head, i64 own, f64 (&logs)[ITEMS]) {
    f64 sum = 0.0;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const i64 t = own + i * 32;
        f64 x = 0.0;
        if (t < s.open) {
            x = p.open[(n * p.kv_heads + head) * p.capacity + (s.ring + t) % p.capacity];
        } else if (t < s.tokens) {
            x = log_of(p.slopes ? -p.slopes[head] : f64(*row<f32>(p.gates, s.k_batch, head, s.k_first + t - s.open)));
        }
        logs[i] = x;
        sum += x;
    }
    return sum;
}
// A warp's tokens are neighbours, and so are those that its threads have at a time.
DEVICE i64 own_token(const Stretch& piece) { return piece.first + i64(threadIdx.x / 32) * (32 * ITEMS) + threadIdx.x % 32; }

extern "C" __global__ void __launch_bounds__(SCANNERS) running_sums(const __grid_constant__ Decay p) {
    __shared__ f64 shared[SCANNERS / 32];
    const int head = int(blockIdx.y);
    const Stretch piece = piece_of(blockIdx.x, p.sequence_count, [&](i64 n) { return p.sequences[n].work; });
    const Sequence s = p.sequences[piece.n];
    f64 logs[ITEMS], total;
    const f64 sum = logs_of(p, s, piece.n, head, own_token(piece), logs);
    scan_threads(sum, 0.0, shared, &total, [](f64 a, f64 b) { return a + b; });
    if (threadIdx.x == 0) p.sums[head * p.pieces + blockIdx.x] = total;
}

extern "C" __global__ void __launch_bounds__(SCANNERS) running(const __grid_constant__ Decay p) {
    __shared__ f64 shared[SCANNERS / 32];
    const int head = int(blockIdx.y), lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
    const Stretch piece = piece_of(blockIdx.x, p.sequence_count, [&](i64 n) { return p.sequences[n].work; });
    const Sequence s = p.sequences[piece.n];
    if (piece.first >= s.tokens) return;
    f64 before = 0.0, total;
    for (i64 i = piece.place + threadIdx.x; i < i64(blockIdx.x); i += SCANNERS) before += p.sums[head * p.pieces + i];
    scan_threads(before, 0.0, shared, &total, [](f64 a, f64 b) { return a + b; });
    before = total;
    const i64 own = own_token(piece);
    f64 logs[ITEMS], at[ITEMS], carry = 0.0;
    logs_of(p, s, piece.n, head, own, logs);
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        f64 sum = logs[i];
#pragma unroll
        for (int by = 1; by < 32; by *= 2) {
            const f64 other = __shfl_up_sync(0xffffffffu, sum, unsigned(by));
            if (lane >= by) sum += other;
        }
        at[i] = carry + sum;
        carry = __shfl_sync(0xffffffffu, at[i], 31);
    }
    __syncthreads();
    if (lane == 0) shared[warp] = carry;
    __syncthreads();
    for (int i = 0; i < warp; i++) before += shared[i];
    f64* g = p.g + head * p.works + s.work;
    f64* log = p.log ? p.log + head * p.works + s.work : nullptr;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const i64 t = own + i * 32;
        if (t < s.tokens) {
            g[t] = before + at[i];
            if (log) log[t] = logs[i];
        }
    }
}

// How many tokens of the sequence, or of its sinks, there are up to each of a thread's, of those the last that is there
// counted; writes whether each is, if `live`.
DEVICE i32 places_of(const Living& p, const Sequence& s, i64 n, bool of_sinks, i64 own, i32 (&places)[ITEMS], u8* live) {
    const i64 count = of_sinks ? s.sinks : s.tokens, seen = s.folded + s.open;
    i32 place = 0;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const i64 t = own + i;
        bool is = t < count;
        const i64 fresh = of_sinks ? t - seen : t - s.open;  // its place among the call's own tokens
        if (is && fresh < 0) {
            is = of_sinks ? p.sinks[n * p.kv_heads * p.sink_capacity + t] != 0.0f
                          : p.open[n * p.kv_heads * p.capacity + (s.ring + t) % p.capacity] != 0.0f;
        } else if (is) {
            if (p.mask) is = p.mask[s.k_batch * p.mask_batch + s.k_first + fresh] != 0;
            if (!of_sinks && s.folded + t < p.most_sinks) is = false;
        }
        if (live && t < count) live[t] = is;
        if (is) place = i32(t + 1);
        places[i] = place;
    }
    return place;
}

DEVICE Stretch living_piece(const Living& p, bool of_sinks) {
    return piece_of(blockIdx.x, p.sequence_count, [&](i64 n) { return of_sinks ? p.sequences[n].sink : p.sequences[n].work; });
}

extern "C" __global__ void __launch_bounds__(SCANNERS) living_ends(const __grid_constant__ Living p) {
    __shared__ i32 shared[SCANNERS / 32];
    const bool of_sinks = blockIdx.y == 1;
    if (of_sinks && i64(blockIdx.x) >= p.sink_pieces) return;
    const Stretch piece = living_piece(p, of_sinks);
    const Sequence s = p.sequences[piece.n];
    i32 places[ITEMS], total;
    const i32 place = places_of(p, s, piece.n, of_sinks, piece.first + i64(threadIdx.x) * ITEMS, places, nullptr);
    scan_threads(place, 0, shared, &total, [](i32 a, i32 b) { return a > b ? a : b; });
    if (threadIdx.x == 0) (of_sinks ? p.sink_ends : p.ends)[blockIdx.x] = total;
}

extern "C" __global__ void __launch_bounds__(SCANNERS) living(const __grid_constant__ Living p) {
    __shared__ i32 shared[SCANNERS / 32];
    const bool of_sinks = blockIdx.y == 1;
    if (of_sinks && i64(blockIdx.x) >= p.sink_pieces) return;
    const Stretch piece = living_piece(p, of_sinks);
    const Sequence s = p.sequences[piece.n];
    const i64 count = of_sinks ? s.sinks : s.tokens;
    if (piece.first >= count) return;
    auto larger = [](i32 a, i32 b) { return a > b ? a : b; };
    const i32* const ends = of_sinks ? p.sink_ends : p.ends;
    i32 before = 0, total;
    for (i64 i = piece.place + threadIdx.x; i < i64(blockIdx.x); i += SCANNERS) before = larger(before, ends[i]);
    scan_threads(before, 0, shared, &total, larger);
    before = total;
    const i64 own = piece.first + i64(threadIdx.x) * ITEMS;
    i32 places[ITEMS];
    const i32 place = places_of(p, s, piece.n, of_sinks, own, places, of_sinks ? p.sink_live + s.sink : p.live + s.work);
    const i32 at = larger(before, scan_threads(place, 0, shared, &total, larger));
    i32* const last = of_sinks ? p.sink_last + s.sink : p.last + s.work;
#pragma unroll
    for (int i = 0; i < ITEMS; i++)
        if (own + i < count) last[own + i] = larger(at, places[i]);
}
