// Sums of parts of each segment but the last of a sequence: see stream_wide.cuh.
//
// Reads k, v [batch][kv_heads][tokens][32 | D_VALUE] bf16 once; writes sums [slots][kv_heads][FEATURES][NP] f32.
// FLOPs: 2 * FEATURES * NP a token and head. A block of threads has two units, of a part and a key/value head each: a
// warpgroup that sums, and two warps that copy.
constexpr int SUM_STAGES = 4;
#include "stream_wide.cuh"
#include "stream_scan.cuh"

extern "C" __global__ void __launch_bounds__(384, 1) stream_wide_sums(const __grid_constant__ Stream p) {
    DYNAMIC_SHARED(dynamic);
    const int group = int(threadIdx.x) / 128, warp = int(threadIdx.x) / 32;
    const int own = group == 0 ? warp / 2 : group - 1;
    u8* const at = dynamic + own * SUM_SHARED;
    __shared__ Walk walks[2];
    __shared__ bool are[2];
    Walk& w = walks[own];
    if (threadIdx.x < 128 && threadIdx.x % 64 == 0) are[own] = w.find(p, i64(blockIdx.x) * 2 + own);
    static_assert(2 * SUM_SHARED == SUM_BYTES, "shared memory differs from what Rust asks for");
    if (group == 0) {
        const int which = warp % 2;
        if (threadIdx.x % 64 == 0) {
            SumRing::init(smem(at), 1, 4);
            hopper::barrier_init_done();
        }
        if (which == 0)
            for (int i = 0; i < SUM_STAGES; i++) write_ones(at + i * SUM_STAGE + SUM_KEYS + KEY_BYTES);
        proxy_fence();
    }
    __syncthreads();
    const bool is = are[own];
    // Tokens between the frontiers of the segment's first chunk and the next one's.
    const int begin = is ? w.frontier(w.segment.first) : 0, end = is ? w.frontier(w.segment.end) : 0;
    if (group == 0) {
        fewer_registers<56>();
        copy_for_sums(p, w, at, warp % 2, begin, end, [&](int, int& from, int& to) { from = -1, to = end; });
        return;
    }
    more_registers<224>();
    if (!is) return;
    Sums sums;
    clear(sums);
    SumRing ring{smem(at), 0};
#pragma unroll 1
    for (int first = begin; first < end; first += PIECE) {
        ring.wait_full();
        absorb(sums, at + ring.stage() * SUM_STAGE, smem(at) + ring.stage() * SUM_STAGE);
        ring.release();
    }
    f32* const to = p.sums + (i64(w.segment.sum) * p.heads + w.local) * (FEATURES * NP);
    each_pair(sums, [&](int feature, int column, f32 x, f32 y) { *reinterpret_cast<float2*>(to + feature * NP + column) = make_float2(x, y); });
    each_one(sums, [&](int feature, f32 x) { to[feature * NP + D_VALUE] = x; });
}

extern "C" __global__ void __launch_bounds__(256) stream_scan(const __grid_constant__ Chains p) { scan(p); }
