// Of each token of a call's windows: g, the running sum of the logarithms of the decays, and how many tokens there are
// up to the last one that is there.
//
// Shapes: gates [tokens] f32 per batch and key/value head (a view with dim 1), or slopes [kv_heads] f64; the state's
// open tokens' own logarithms [slots][capacity] f64; log, g [kv_heads][works] f64. Mask [batch][tokens], one byte a
// token; the state's weights [slots][capacity] f32; live [works] u8, last [works] i32; the same of sinks.
// g is relative to what is just before the window; only differences of it are ever used, and it stays f64 so that they
// keep their digits however long the sequence.
// Blocks: one per sequence and head, which goes through the tokens 2048 at a time; bytes: 4 or 0 read and 8 (with log
// 16) written per token and head, 1 read and 5 written per token.
#include "generic.cuh"

constexpr int SCANNERS = 256;  // threads
constexpr int ITEMS = 8;       // neighbouring tokens of one thread

struct Decay {
    View gates;               // where there are gates
    const f64* slopes;        // [kv_heads], where there are slopes
    const f64* open;          // [slots][capacity], or null
    const Sequence* sequences;
    f64* log;                 // or null
    f64* g;
    i64 works, capacity;
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
    i64 mask_batch, capacity, sink_capacity, most_sinks;
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

extern "C" __global__ void __launch_bounds__(SCANNERS) running(const __grid_constant__ Decay p) {
    __shared__ f64 shared[SCANNERS / 32];
    const int head = int(blockIdx.y);
    for (i64 n = blockIdx.x; n < p.sequence_count; n += gridDim.x) {
        const Sequence s = p.sequences[n];
        f64* g = p.g + head * p.works + s.work;
        f64* log = p.log ? p.log + head * p.works + s.work : nullptr;
        f64 before = 0.0;
        for (i64 first = 0; first < s.tokens; first += SCANNERS * ITEMS) {
            const i64 own = first + i64(threadIdx.x) * ITEMS;
            f64 logs[ITEMS], sum = 0.0;
#pragma unroll
            for (int i = 0; i < ITEMS; i++) {
                const i64 t = own + i;
                f64 x = 0.0;
                if (t < s.open) {
                    x = p.open[(n * p.kv_heads + head) * p.capacity + (s.ring + t) % p.capacity];
                } else if (t < s.tokens) {
                    x = log_of(p.slopes ? -p.slopes[head] : f64(*row<f32>(p.gates, s.k_batch, head, s.k_first + t - s.open)));
                }
                logs[i] = x;
                sum += x;
            }
            f64 total;
            f64 at = before + scan_threads(sum, 0.0, shared, &total, [](f64 a, f64 b) { return a + b; });
#pragma unroll
            for (int i = 0; i < ITEMS; i++) {
                at += logs[i];
                if (own + i < s.tokens) {
                    g[own + i] = at;
                    if (log) log[own + i] = logs[i];
                }
            }
            before += total;
        }
    }
}

extern "C" __global__ void __launch_bounds__(SCANNERS) living(const __grid_constant__ Living p) {
    __shared__ i32 shared[SCANNERS / 32];
    const bool of_sinks = blockIdx.y == 1;
    for (i64 n = blockIdx.x; n < p.sequence_count; n += gridDim.x) {
        const Sequence s = p.sequences[n];
        const i64 count = of_sinks ? s.sinks : s.tokens, seen = s.folded + s.open;
        u8* live = of_sinks ? p.sink_live + s.sink : p.live + s.work;
        i32* last = of_sinks ? p.sink_last + s.sink : p.last + s.work;
        i32 before = 0;
        for (i64 first = 0; first < count; first += SCANNERS * ITEMS) {
            const i64 own = first + i64(threadIdx.x) * ITEMS;
            i32 places[ITEMS], place = 0;
#pragma unroll
            for (int i = 0; i < ITEMS; i++) {
                const i64 t = own + i;
                bool is = t < count;
                i64 fresh = of_sinks ? t - seen : t - s.open;  // its place among the call's own tokens
                if (is && fresh < 0) {
                    is = of_sinks ? p.sinks[n * p.kv_heads * p.sink_capacity + t] != 0.0f
                                  : p.open[n * p.kv_heads * p.capacity + (s.ring + t) % p.capacity] != 0.0f;
                } else if (is) {
                    if (p.mask) is = p.mask[s.k_batch * p.mask_batch + s.k_first + fresh] != 0;
                    if (!of_sinks && s.folded + t < p.most_sinks) is = false;
                }
                if (t < count) live[t] = is;
                if (is) place = i32(t + 1);
                places[i] = place;
            }
            i32 total;
            auto larger = [](i32 a, i32 b) { return a > b ? a : b; };
            i32 at = larger(before, scan_threads(place, 0, shared, &total, larger));
#pragma unroll
            for (int i = 0; i < ITEMS; i++)
                if (own + i < count) last[own + i] = larger(at, places[i]);
            before = larger(before, total);
        }
    }
}
