// Gradients by the logarithms of decays. A gate is part of g of all tokens from its own on, and what queries have of g
// sums to 0, so that of token r is -Σ_{s >= r} v̂_s·dv̂_s. A slope is minus the logarithm of each token of its head.
// stream_backward_logs: grid: sequences, key/value heads; 256 threads, ITEMS neighbouring tokens each. Leaves each
// sequence's gradient by its head's slope.
// stream_backward_slopes: grid: key/value heads; one thread. All sums have the same order at every run.
// Bytes: 8 read and 4 written per token and head.
#include "prelude.cuh"

struct Item {
    i64 q_batch, q_first, k_batch, k_first, work;
    i32 tokens, chunks, first, end, slot, unused;
};
SAME_SIZE(Item, ITEM_BYTES);
struct Logs {
    const f64* dw;     // [kv_heads][works]
    View d_log_gates;  // or none
    f64* slopes;       // [kv_heads][sequences]
    f64* d_slopes;     // or null
    const Item* sequences;
    i64 works;
    i32 sequence_count, unused;
};
SAME_SIZE(Logs, LOGS_BYTES);

constexpr int THREADS = 256, ITEMS = 8;

// The running sum of `x` over the threads, this one included; `all` of the block, to every thread.
DEVICE f64 running_sum(f64* warps, f64 x, f64& all) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int by = 1; by < 32; by <<= 1) {
        const f64 other = __shfl_up_sync(0xffffffffu, x, by);
        if (lane >= by) x += other;
    }
    __syncthreads();
    if (lane == 31) warps[warp] = x;
    __syncthreads();
    f64 before = 0;
    all = 0;
#pragma unroll
    for (int w = 0; w < THREADS / 32; w++) {
        if (w == warp) before = all;
        all += warps[w];
    }
    return before + x;
}

extern "C" __global__ void __launch_bounds__(THREADS) stream_backward_logs(const __grid_constant__ Logs p) {
    __shared__ f64 warps[THREADS / 32];
    const Item u = p.sequences[blockIdx.x];
    const int head = int(blockIdx.y);
    const f64* dw = p.dw + head * p.works + u.work;
    f64 later = 0, all, slope = 0;
    for (i64 first = 0; first < u.tokens; first += THREADS * ITEMS) {
        const i64 own = u.tokens - 1 - first - threadIdx.x * ITEMS;
        f64 logs[ITEMS], of_own = 0;
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            logs[i] = own - i >= 0 ? -dw[own - i] : 0;
            of_own += logs[i];
        }
        f64 at = later + running_sum(warps, of_own, all) - of_own;
        later += all;
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            at += logs[i];
            if (own - i < 0) continue;
            slope -= at;
            if (p.d_log_gates.ptr) *row<f32>(p.d_log_gates, u.k_batch, head, u.k_first + own - i) = f32(at);
        }
    }
    running_sum(warps, slope, all);
    if (threadIdx.x == 0) p.slopes[i64(head) * p.sequence_count + blockIdx.x] = all;
}

extern "C" __global__ void __launch_bounds__(1) stream_backward_slopes(const __grid_constant__ Logs p) {
    f64 sum = 0;
    for (i64 i = 0; i < p.sequence_count; i++) sum += p.slopes[i64(blockIdx.x) * p.sequence_count + i];
    p.d_slopes[blockIdx.x] = sum;
}
