// Sums of parts of each segment but the last of a sequence: see stream.cuh.
//
// Reads k, v [batch][kv_heads][tokens][D_KEY | D_VALUE] bf16 once; writes sums [slots][kv_heads][TILES * 16][NP] f32.
// FLOPs: 2 * 16 * TILES * NP a token and head. One unit per part and key/value head.
#include "stream.cuh"

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

// Sums of parts become those of all up to each: one thread per element, head and sequence; each adds what rounding took.
// `chains` has, per sequence, the slots first ... first+count-1 and the tokens at which each ends.
struct Chain {
    i32 sequence, first, count, unused;
};
struct Chains {
    f32* sums;
    const f64* g;
    const Sequence* sequences;
    const Chain* chains;
    const i32* ends;           // [slots]
    i64 works;
    i32 first_head, heads;
};
SAME_SIZE(Chains, CHAINS_BYTES);

extern "C" __global__ void __launch_bounds__(256) stream_scan(const __grid_constant__ Chains p) {
    const int element = int(blockIdx.x * 256 + threadIdx.x);
    if (element >= TILES * 16 * NP || element % NP > D_VALUE) return;
    const Chain chain = p.chains[blockIdx.z];
    const i64 head = blockIdx.y;
    const f64* g = HAS_G ? p.g + (p.first_head + head) * p.works + p.sequences[chain.sequence].work : nullptr;
    f32 sum = 0.0f, low = 0.0f;
    auto slot = [&](int i) { return p.sums + (i64(chain.first + i) * p.heads + head) * (TILES * 16 * NP) + element; };
    f32 next = *slot(0);
    for (int i = 0; i < chain.count; i++) {
        const f32 own = next;
        if (i + 1 < chain.count) next = *slot(i + 1);
        if (HAS_G && i > 0) {
            const int from = p.ends[chain.first + i - 1], to = p.ends[chain.first + i];
            const f64 before = from > 0 ? g[from - 1] : 0.0, now = to > 0 ? g[to - 1] : 0.0;
            const f32 left = exp2_fast(f32(now - before) * LOG2E);
            sum *= left, low *= left;
        }
        // Knuth's sum of two.
        const f32 both = sum + own, part = both - sum;
        low += (sum - (both - part)) + (own - part);
        sum = both;
        *slot(i) = sum + low;
    }
}
