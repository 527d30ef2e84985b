// Sums of parts of each segment but the last of a sequence: see stream.cuh.
//
// Reads k, v [batch][kv_heads][tokens][D_KEY | D_VALUE] bf16 once; writes sums [slots][kv_heads][TILES * 16][NP] f32.
// FLOPs: 2 * 16 * TILES * NP a token and head. One unit per part and key/value head.
#include "stream.cuh"
#include "stream_scan.cuh"

extern "C" __global__ void __launch_bounds__(UNITS * WARPS * 32, RESIDENTS) stream_sums(const __grid_constant__ Stream p) {
    DYNAMIC_SHARED(shared);
    Place at;
    Segment segment;
    i64 local;
    if (!find(p, shared, at, segment, local)) return;

    Sums sums;
    clear(sums);
    // Tokens between the frontiers of the segment's first chunk and the next one's, a chunk at a time.
    const int begin = at.frontier(segment.first), end = at.frontier(segment.end);
    // A part may end before the first frontier that is a token.
    if (begin < end) load_piece(p, at, 0, begin, end);
    copy_async_commit();
    int stage = 0;
#pragma unroll 1
    for (int first = begin; first < end; first += CHUNK, stage ^= 1) {
        copy_async_wait<0>();
        meet(at.unit);
        if (first + CHUNK < end) {
            load_piece(p, at, stage ^ 1, first + CHUNK, end);
            copy_async_commit();
        }
        const int to = min(first + CHUNK, end);
        transpose_keys(at, stage);
        fall_of_keys(at, stage, first, to);
        if constexpr (HAS_G) scale(sums, exp2_fast(at.faded(first, to)));
        meet(at.unit);
        absorb(at, sums, stage, (to - first + 15) / 16);
    }
    f32* to = p.sums + (i64(segment.sum) * p.heads + local) * (TILES * 16 * NP);
    each_sum(
        at, sums, [&](int feature, int column, f32 x, f32 y) { *reinterpret_cast<float2*>(to + feature * NP + column) = make_float2(x, y); },
        [&](int feature, f32 x) { to[feature * NP + D_VALUE] = x; });
}

extern "C" __global__ void __launch_bounds__(256) stream_scan(const __grid_constant__ Chains p) { scan(p); }
