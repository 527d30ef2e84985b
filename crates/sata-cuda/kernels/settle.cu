// What a call leaves in the state beside sums and tokens: weights and decays of open tokens and sinks, marks, places.
// And the largest |k|^2 of a head's keys.
//
// Shapes: weights [slots][capacity] f32, fading [slots][capacity] f64 (a ring), the same of sinks [slots]
// [sink_capacity]; marks and reach [slots]; positions u64 and open u32 [sequences]. k [tokens][dim] of E (a view).
// Blocks: settle: one per sequence and head; reach: 256 tokens. Bytes: 5 to 13 per token that stays, keys once.
#include "generic.cuh"

struct Settle {
    const Sequence* sequences;
    const u8* live;         // [works]
    const i32* last;        // [works]
    const f64* log;         // [kv_heads][works], or null where nothing fades
    const f64* g;           // likewise
    const u8* sink_live;    // [sink_works]
    const f64* sink_g;      // [kv_heads][sink_works]
    const f32* call_reach;  // [slots]
    Marks marks;
    f32* open_weights;
    f64* open_fading;
    f32* sink_weights;
    f64* sink_fading;
    f64* reach;
    u64* positions;
    u32* open;
    i64 works, sink_works, capacity, sink_capacity;
    i32 kv_heads, padding;
};
SAME_SIZE(Settle, SETTLE_BYTES);

struct Reach {
    View k;
    const u8* mask;  // [batch][tokens], or null
    const Sequence* sequences;
    f32* reach;      // [slots], 0 before
    i64 mask_batch, dim;
    i32 kv_heads, tiles;
};
SAME_SIZE(Reach, REACH_BYTES);

struct SinkPlaces {
    const Sequence* sequences;
    const f64* g;        // [kv_heads][works]
    const f64* fading;   // [slots][sink_capacity], or null
    Marks marks;
    f64* sink_g;         // [kv_heads][sink_works]
    i64 works, sink_works, sink_capacity;
    i32 kv_heads, padding;
};
SAME_SIZE(SinkPlaces, SINK_PLACES_BYTES);

// g of sinks, counted from the window's start.
extern "C" __global__ void __launch_bounds__(256) sink_places(const __grid_constant__ SinkPlaces p) {
    const i64 n = blockIdx.x;
    const int head = int(blockIdx.y);
    const Sequence s = p.sequences[n];
    const i64 slot = n * p.kv_heads + head, seen = s.folded + s.open;
    const f64 total = p.marks.all ? p.marks.all[slot].total : 0.0;
    for (i64 i = threadIdx.x; i < s.sinks; i += blockDim.x) {
        p.sink_g[head * p.sink_works + s.sink + i] = i < seen ? p.fading[slot * p.sink_capacity + i] - total
                                                              : p.g[head * p.works + s.work + s.open + i - seen];
    }
}

extern "C" __global__ void __launch_bounds__(256) settle(const __grid_constant__ Settle p) {
    const i64 n = blockIdx.x;
    const int head = int(blockIdx.y), thread = int(threadIdx.x);
    const Sequence s = p.sequences[n];
    const i64 slot = n * p.kv_heads + head;
    Mark& mark = p.marks.all[slot];
    const f64 total = mark.total;
    // Those that were open are where they were.
    for (i64 t = (s.settled > s.open ? s.settled : s.open) + thread; t < s.tokens; t += blockDim.x) {
        const i64 at = slot * p.capacity + (s.ring + t) % p.capacity;
        p.open_weights[at] = p.live[s.work + t] ? 1.0f : 0.0f;
        if (p.log) p.open_fading[at] = p.log[head * p.works + s.work + t];
    }
    for (i64 i = s.folded + s.open + thread; i < s.sinks; i += blockDim.x) {
        p.sink_weights[slot * p.sink_capacity + i] = p.sink_live[s.sink + i] ? 1.0f : 0.0f;
        if (p.log) p.sink_fading[slot * p.sink_capacity + i] = total + p.sink_g[head * p.sink_works + s.sink + i];
    }
    // Tokens that have been folded, and are there.
    __shared__ u32 count;
    if (thread == 0) count = 0;
    __syncthreads();
    u32 own = 0;
    for (i64 t = thread; t < s.settled; t += blockDim.x) own += p.live[s.work + t];
    atomicAdd(&count, own);
    __syncthreads();
    if (thread != 0) return;
    mark.count += count;
    if (p.g && s.settled > 0) {
        const f64* g = p.g + head * p.works + s.work;
        const f64 end = g[s.settled - 1];
        const i64 last = p.last[s.work + s.settled - 1];
        mark.total = total + end;
        mark.lag = last > 0 ? end - g[last - 1] : mark.lag + end;
    }
    p.reach[slot] = fmax(p.reach[slot], f64(p.call_reach[slot]));
    if (head == 0) {
        p.positions[n] = u64(s.folded + s.tokens);
        p.open[n] = u32(s.tokens - s.settled);
    }
}

// The largest |k|^2 of the call's own tokens that are not masked.
extern "C" __global__ void __launch_bounds__(256) reach(const __grid_constant__ Reach p) {
    const i64 n = blockIdx.x / p.tiles;
    const int head = int(blockIdx.y), warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
    const Sequence s = p.sequences[n];
    const i64 tokens = s.tokens - s.open, first = i64(blockIdx.x % p.tiles) * 256;
    f32 most = 0.0f;
    // A warp per token.
    for (i64 t = first + warp; t < first + 256 && t < tokens; t += 8) {
        if (p.mask && !p.mask[s.k_batch * p.mask_batch + s.k_first + t]) continue;
        const E* k = row<E>(p.k, s.k_batch, head, s.k_first + t);
        f32 square = 0.0f;
        for (i64 c = lane; c < p.dim; c += 32) square = fmaf(to_f32(k[c]), to_f32(k[c]), square);
        most = fmaxf(most, warp_sum(square));
    }
    // Numbers that are not negative are in order as integers.
    if (lane == 0) atomicMax(reinterpret_cast<u32*>(p.reach) + n * p.kv_heads + head, __float_as_uint(most));
}
