// The scan over sums of parts, f32 [slots][kv_heads][TILES * 16][NP]: read and written once.
#pragma once

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

DEVICE void scan(const Chains& p) {
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
