// Tokens between a state and a call: open tokens and new ones into one work array, the last ones into the state's open
// blocks, sinks likewise.
//
// Shapes: x [tokens][dim] of E (a view); open [slots][capacity][dim] f32, a ring; work arrays [kv_heads][works][dim] of
// OUT; sinks [slots][sink_capacity][dim] and work arrays [kv_heads][sink_works][dim], f32. A token that is not there
// has a key and a value of zeros.
// Blocks: 1024 elements of one sequence and head. Bytes: each element once read and once written.
#include "generic.cuh"

constexpr int EACH_BLOCK = 1024;

struct Tokens {
    View x;                  // the call's own tokens
    f32* state;              // [slots][capacity][dim]
    const Sequence* sequences;
    const u8* live;          // [works], for sinks [sink_works]
    void* work;              // [kv_heads][works][dim]
    i64 works, capacity, dim;
    i32 kv_heads, tiles;
};
SAME_SIZE(Tokens, TOKENS_BYTES);

// The block's elements, f(sequence, its index, head, token, channel), of `count` tokens.
template <class F>
DEVICE void each_element(const Tokens& p, F f, bool sinks) {
    const i64 n = blockIdx.x / p.tiles;
    const Sequence s = p.sequences[n];
    const i64 count = (sinks ? s.sinks : s.tokens) * p.dim;
    const i64 first = i64(blockIdx.x % p.tiles) * EACH_BLOCK;
    for (i64 i = first + threadIdx.x; i < first + EACH_BLOCK && i < count; i += blockDim.x)
        f(s, n, int(blockIdx.y), i / p.dim, i % p.dim);
}

// Open tokens, then the call's own.
extern "C" __global__ void __launch_bounds__(256) gather(const __grid_constant__ Tokens p) {
    each_element(p, [&](const Sequence& s, i64 n, int head, i64 t, i64 c) {
        f32 x = 0.0f;
        if (p.live[s.work + t]) {
            x = t < s.open ? p.state[((n * p.kv_heads + head) * p.capacity + (s.ring + t) % p.capacity) * p.dim + c]
                           : to_f32(row<E>(p.x, s.k_batch, head, s.k_first + t - s.open)[c]);
        }
        static_cast<OUT*>(p.work)[(head * p.works + s.work + t) * p.dim + c] = from_f32<OUT>(x);
    }, false);
}

// The call's last tokens, those that are not folded, to the state. Open ones are where they were.
extern "C" __global__ void __launch_bounds__(256) keep(const __grid_constant__ Tokens p) {
    each_element(p, [&](const Sequence& s, i64 n, int head, i64 t, i64 c) {
        if (t < s.settled || t < s.open) return;
        const f32 x = p.live[s.work + t] ? to_f32(row<E>(p.x, s.k_batch, head, s.k_first + t - s.open)[c]) : 0.0f;
        p.state[((n * p.kv_heads + head) * p.capacity + (s.ring + t) % p.capacity) * p.dim + c] = x;
    }, false);
}

// Sinks that the state has, then those among the call's own tokens.
extern "C" __global__ void __launch_bounds__(256) gather_sinks(const __grid_constant__ Tokens p) {
    each_element(p, [&](const Sequence& s, i64 n, int head, i64 t, i64 c) {
        const i64 fresh = t - (s.folded + s.open);
        f32 x = 0.0f;
        if (p.live[s.sink + t]) {
            x = fresh < 0 ? p.state[((n * p.kv_heads + head) * p.capacity + t) * p.dim + c]
                          : to_f32(row<E>(p.x, s.k_batch, head, s.k_first + fresh)[c]);
        }
        static_cast<f32*>(p.work)[(head * p.works + s.sink + t) * p.dim + c] = x;
    }, true);
}

// New sinks to the state.
extern "C" __global__ void __launch_bounds__(256) keep_sinks(const __grid_constant__ Tokens p) {
    each_element(p, [&](const Sequence& s, i64 n, int head, i64 t, i64 c) {
        if (t < s.folded + s.open) return;
        p.state[((n * p.kv_heads + head) * p.capacity + t) * p.dim + c] =
            static_cast<const f32*>(p.work)[(head * p.works + s.sink + t) * p.dim + c];
    }, true);
}
