// What the backward pass does token by token, besides weighing.
//
// backward_places: g at each place (f64, the running sum of the logarithms of decays from place 0 on), and how many
// places there are up to the last before each that weighs something. Grid: units.
// backward_weights: from these g at the last token that a query just before each place sees, and what the features of a key there
// are multiplied by when sums take it in. Grid: units · (tiles of 256 places).
// backward_logs: the gradients by the logarithms. A gate is part of g of all tokens from its own on, and every query has
// Σ w dw = 0, so that of token r is (what comes after the call) − Σ_{s ≥ r} Σ_t w dw. Grid: units.
// backward_slopes: a slope is minus the logarithm of each token of its head. Grid: key/value heads. Block: 1 thread.
// Blocks have 256 threads; a thread of a scan has ITEMS neighbouring tokens.
// All sums have the same order at every run.
// Bytes: 8 to 20 per token and key/value head.
#include "backward.cuh"

constexpr int THREADS = 256, ITEMS = 4;
// As good as −∞ for the logarithm of a gate, with sums that keep their digits.
constexpr f64 LOWEST_GATE = -1e5;

template <class T>
struct Scan {
    T warps[THREADS / 32];
    T all;
};

// The running "sum" of `x` over the threads, this one included; `all` of the block, to every thread.
template <class T, class F>
DEVICE T scan(Scan<T>& shared, T x, T nothing, T& all, F together) {
    int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
#pragma unroll
    for (int by = 1; by < 32; by <<= 1) {
        T other = __shfl_up_sync(0xffffffffu, x, by);
        if (lane >= by) x = together(other, x);
    }
    __syncthreads();
    if (lane == 31) shared.warps[warp] = x;
    __syncthreads();
    if (thread == 0) {
        T sum = nothing;
        for (int w = 0; w < THREADS / 32; ++w) {
            T own = shared.warps[w];
            shared.warps[w] = sum;
            sum = together(sum, own);
        }
        shared.all = sum;
    }
    __syncthreads();
    all = shared.all;
    return together(shared.warps[warp], x);
}

DEVICE f64 log_at(const Backward& p, const Unit& u, i64 place) {
    if (place < u.s.open) return p.open.fading[open_at(p, u, place)];
    f64 log = p.slopes ? -p.slopes[u.head]
                       : f64(*row<const f32>(p.log_gates, u.s.k_batch, u.head, u.s.k_first + place - u.s.open));
    return fmax(log, LOWEST_GATE);
}

extern "C" __global__ void __launch_bounds__(THREADS) backward_places(const __grid_constant__ Backward p) {
    __shared__ Scan<f64> of_g;
    __shared__ Scan<i32> of_live;
    UNIT(u, blockIdx.x);
    if (FADES) {
        f64* g = p.g + unit_places(p, u);
        f64 before = 0, all;
        for (i64 first = 0; first < u.total; first += THREADS * ITEMS) {
            i64 own = first + threadIdx.x * ITEMS;
            f64 logs[ITEMS], sum = 0;
#pragma unroll
            for (int i = 0; i < ITEMS; ++i) {
                logs[i] = own + i < u.total ? log_at(p, u, own + i) : 0;
                sum += logs[i];
            }
            f64 at = scan(of_g, sum, 0.0, all, [](f64 a, f64 b) { return a + b; });
            at = before + at - sum;
#pragma unroll
            for (int i = 0; i < ITEMS; ++i) {
                at += logs[i];
                if (own + i < u.total) g[own + i] = at;
            }
            before += all;
        }
    }
    if (u.head != 0) return;
    i32* live = p.live + u.s.places_at;
    i32 before = 0, all;
    auto later = [](i32 a, i32 b) { return a > b ? a : b; };
    if (threadIdx.x == 0) live[0] = 0;
    for (i64 first = 0; first < u.total; first += THREADS * ITEMS) {
        i64 own = first + threadIdx.x * ITEMS;
        i32 last[ITEMS], highest = 0;
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            i64 place = own + i;
            bool is = place < u.total && u.s.folded + place >= p.sink_count;
            if (is && place < u.s.open) {
                is = p.open.weights[open_at(p, u, place)] != 0;
            } else if (is && p.mask) {
                is = p.mask[u.s.k_batch * p.mask_batch + u.s.k_first + place - u.s.open] != 0;
            }
            if (is) highest = i32(place) + 1;
            last[i] = highest;
        }
        // That of the threads before this one: they are in order.
        i32 with_own = scan(of_live, highest, 0, all, later);
        i32 up_to = __shfl_up_sync(0xffffffffu, with_own, 1u);
        if (threadIdx.x % 32 == 0) up_to = of_live.warps[threadIdx.x / 32];
        up_to = later(before, up_to);
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            if (own + i < u.total) live[own + i + 1] = later(up_to, last[i]);
        }
        before = later(before, all);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) backward_weights(const __grid_constant__ Backward p) {
    i64 tiles = p.far_tokens;
    UNIT(u, blockIdx.x / tiles);
    i64 place = i64(blockIdx.x % tiles) * THREADS + threadIdx.x;
    if (place > u.total) return;
    i64 at = unit_places(p, u) + place;
    if (FADES) {
        f64 own;
        own_of(p, u, place - 1, own);
        p.own[at] = own;
    }
    if (place == u.total) return;
    // The first fold after the place, if there is one.
    i64 low = 1, high = u.s.folds + 1;
    while (low < high) {
        i64 middle = (low + high) / 2;
        if (fold_of(p, u, middle) > place) high = middle;
        else low = middle + 1;
    }
    f32 weight = 0;
    if (low <= u.s.folds && is_live(u, place)) {
        weight = FADES ? expf(f32(u.g[u.live[fold_of(p, u, low)] - 1] - u.g[place])) : 1;
    }
    p.folding[at] = weight;
}

extern "C" __global__ void __launch_bounds__(THREADS) backward_logs(const __grid_constant__ Backward p) {
    __shared__ Scan<f64> of_logs;
    UNIT(u, blockIdx.x);
    const f64* dw = p.dw + unit_places(p, u) + u.s.open;
    f64 later = p.final_past ? p.final_past[u.row] : 0, all, slope = 0;
    auto sum = [](f64 a, f64 b) { return a + b; };
    for (i64 first = 0; first < u.s.keys; first += THREADS * ITEMS) {
        i64 own = u.s.keys - 1 - first - threadIdx.x * ITEMS;
        f64 logs[ITEMS], of_own = 0;
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            logs[i] = own - i >= 0 ? -dw[own - i] : 0;
            of_own += logs[i];
        }
        f64 at = later + scan(of_logs, of_own, 0.0, all, sum) - of_own;
        later += all;
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            at += logs[i];
            if (own - i < 0) continue;
            slope -= at;
            if (p.d_log_gates.ptr) {
                *row<f32>(p.d_log_gates, u.s.k_batch, u.head, u.s.k_first + own - i) = f32(at);
            }
        }
    }
    scan(of_logs, slope, 0.0, all, sum);
    if (threadIdx.x != 0) return;
    // Nobody reads g any more.
    p.g[unit_places(p, u)] = all;
    if (p.initial_past) p.initial_past[u.row] = later;
}

extern "C" __global__ void __launch_bounds__(1) backward_slopes(const __grid_constant__ Backward p) {
    f64 sum = 0;
    for (i64 sequence = 0; sequence < p.sequences_count; ++sequence) {
        Unit u = unit_of(p, sequence * p.kv_heads + blockIdx.x);
        sum += p.g[unit_places(p, u)];
    }
    p.d_slopes[blockIdx.x] = sum;
}
