// Sums of parts of each segment but the last of a sequence, heads of 16: see stream_sixteen.cuh.
//
// Reads k, v [batch][kv_heads][tokens][16 | D_VALUE] bf16 once; writes sums [slots][kv_heads][FEATURES][NP] f32.
// FLOPs: 2 * FEATURES * NP a token and head.
constexpr int SUMMING = 4;
#include "stream_sixteen.cuh"
constexpr int TILES = FEATURES / 16;
#include "stream_scan.cuh"

static_assert(SUM_SHARED == UNIT_BYTES, "shared memory differs from what Rust asks for");

template <int WHICH>
DEV void sum(const Stream& p, const Walk& w, const Bases& bases, u8* at, u32 base) {
    Sums sums;
    each_accumulator(sums, [](f32& x) { x = 0.0f; });
    // Tokens between the frontiers of the segment's first chunk and the next one's.
    const int begin = w.frontier(w.segment.first), end = w.frontier(w.segment.end);
    f64 to_g = 0.0;
    if constexpr (HAS_G) to_g = w.before(end);
    int stage = 0;
    if (begin < end) load_for_sums(p, w, bases, at, begin, end);
    copy_async_commit();
    add<WHICH>(sums, p, w, bases, at, base, begin, end, end, to_g, stage);
    copy_async_wait<0>();
    f32* const to = p.sums + (i64(w.segment.sum) * p.heads + w.local) * (FEATURES * NP);
    each_sum<WHICH>(
        sums, [&](int offset, f32 x, f32 y) { *reinterpret_cast<float2*>(to + offset) = make_float2(x, y); },
        [&](int offset, f32 x) { to[offset] = x; });
}

extern "C" __global__ void __launch_bounds__(SUM_THREADS, 1) stream_sixteen_sums(const __grid_constant__ Stream p) {
    DYNAMIC_SHARED(at);
    const u32 base = smem(at);
    __shared__ Walk w;
    __shared__ Bases bases;
    if (threadIdx.x == 0) {
        w.find(p, blockIdx.x);
        find(bases, p, w);
    }
    if (threadIdx.x < 256) write_ones(at);
    proxy_fence();
    __syncthreads();
    const int group = int(threadIdx.x) / 128;
    if (group == 0) sum<0>(p, w, bases, at, base);
    else if (group == 1) sum<1>(p, w, bases, at, base);
    else if (group == 2) sum<2>(p, w, bases, at, base);
    else sum<3>(p, w, bases, at, base);
}

extern "C" __global__ void __launch_bounds__(256) stream_scan(const __grid_constant__ Chains p) { scan(p); }
