// What the backward pass does token by token, besides weighing.
//
// backward_places: g at each place (f64, the running sum of the logarithms of decays from place 0 on), and how many
// places there are up to the last before each that weighs something. Grid: units. Block: 256 threads.
// backward_logs: the gradients by those logarithms. A gate is part of g of all tokens from its own on, and every query
// has Σ w dw = 0, so that of token r is (what comes after the call) − Σ_{s ≥ r} Σ_t w dw. Grid: units.
// backward_slopes: a slope is minus the logarithm of each token of its head. Grid: key/value heads. Block: 1 thread.
// All sums have the same order at every run.
// Bytes: 8 to 20 per token and key/value head.
#include "backward.cuh"

constexpr int THREADS = 256;
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
    int thread = threadIdx.x;
    if (FADES) {
        f64* g = p.g + unit_places(p, u);
        f64 before = 0, all;
        for (i64 first = 0; first < u.total; first += THREADS) {
            i64 place = first + thread;
            f64 log = place < u.total ? log_at(p, u, place) : 0;
            f64 sum = scan(of_g, log, 0.0, all, [](f64 a, f64 b) { return a + b; });
            if (place < u.total) g[place] = before + sum;
            before += all;
        }
    }
    if (u.head != 0) return;
    i32* live = p.live + u.s.places_at;
    i32 before = 0, all;
    if (thread == 0) live[0] = 0;
    for (i64 first = 0; first < u.total; first += THREADS) {
        i64 place = first + thread;
        bool is = place < u.total && u.s.folded + place >= p.sink_count;
        if (is && place < u.s.open) {
            is = p.open.weights[open_at(p, u, place)] != 0;
        } else if (is && p.mask) {
            is = p.mask[u.s.k_batch * p.mask_batch + u.s.k_first + place - u.s.open] != 0;
        }
        i32 last = scan(of_live, is ? i32(place) + 1 : 0, 0, all, [](i32 a, i32 b) { return a > b ? a : b; });
        if (place < u.total) live[place + 1] = max(before, last);
        before = max(before, all);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) backward_logs(const __grid_constant__ Backward p) {
    __shared__ Scan<f64> of_logs;
    UNIT(u, blockIdx.x);
    int thread = threadIdx.x;
    const f64* dw = p.dw + unit_places(p, u) + u.s.open;
    f64 later = p.final_past ? p.final_past[u.row] : 0, all, slope = 0;
    for (i64 first = 0; first < u.s.keys; first += THREADS) {
        i64 token = u.s.keys - 1 - first - thread;
        f64 own = token >= 0 ? -dw[token] : 0;
        f64 by_log = later + scan(of_logs, own, 0.0, all, [](f64 a, f64 b) { return a + b; });
        later += all;
        if (token < 0) continue;
        slope -= by_log;
        if (p.d_log_gates.ptr) {
            *row<f32>(p.d_log_gates, u.s.k_batch, u.head, u.s.k_first + token) = f32(by_log);
        }
    }
    scan(of_logs, slope, 0.0, all, [](f64 a, f64 b) { return a + b; });
    if (thread != 0) return;
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
