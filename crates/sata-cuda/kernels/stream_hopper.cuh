// What the kernels that walk over sequences share on Hopper: rings of stages, descriptors, where a unit is, weights of keys.
//
// Chunks have CHUNK tokens, pieces of keys PIECE. Compile-time constants as in the files that include it.
#pragma once
#include "mma.cuh"
#include "stream_types.cuh"

#define DEV static __device__ __forceinline__
#define DEV_MEMBER __device__ __forceinline__
namespace hopper {
#if defined(SATA_EMULATOR)
#include "hopper_emulated.cuh"
#else
#include "hopper_device.cuh"
#endif
#include "hopper_mma.cuh"
}  // namespace hopper
#undef shared
using hopper::barrier_init, hopper::barrier_arrive, hopper::proxy_fence, hopper::group_sync, hopper::smem;
using hopper::mma_fence, hopper::mma_commit, hopper::mma_wait, hopper::mma_touch, hopper::Mma;

constexpr int CHUNK = 128, PIECE = 64;
constexpr f32 LOG2E = 1.4426950408889634f;

// What is the same in all lanes, in a register of the warp, where descriptors and what is added to them belong.
#if defined(SATA_EMULATOR)
DEV u32 uniform(u32 x) { return x; }
#else
DEV u32 uniform(u32 x) {
    u32 y;
    asm("redux.sync.or.b32 %0, %1, 0xffffffff;" : "=r"(y) : "r"(x));
    return y;
}
#endif

// A descriptor of B at an address of shared memory that is the same in all lanes, ALONG_K and ALONG_N bytes between its 8 x 8
// core matrices.
template <int ALONG_K, int ALONG_N> struct Descriptor {
    u32 low;
    DEV_MEMBER explicit Descriptor(u32 address) : low(uniform(address >> 4 | u32(ALONG_K >> 4) << 16)) {}
    // Some bytes further on: one addition of 64 bits, where made of halves it would be three instructions.
    DEV_MEMBER u64 at(int bytes) const { return (u64(ALONG_N >> 4) << 32 | low) + u32(bytes >> 4); }
};
#if defined(SATA_EMULATOR)
template <int REGISTERS> DEV void more_registers() {}
template <int REGISTERS> DEV void fewer_registers() {}
#else
template <int REGISTERS> DEV void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS)); }
template <int REGISTERS> DEV void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS)); }
#endif

// Waits for a phase of a barrier, asleep for long rather than asking again and again.
#if defined(SATA_EMULATOR)
DEV void barrier_wait(u32 bar, u32 parity) { hopper::barrier_wait(bar, parity); }
#else
DEV void barrier_wait(u32 bar, u32 parity) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "again:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1, %2;\n"
        "@p bra done;\nbra again;\ndone:\n}\n" ::"r"(bar), "r"(parity), "r"(1000000) : "memory");
}
#endif

// A ring of stages, each with a barrier for when it is full and one for when it is empty, BARS after a base. What fills
// begins at phase 1. A warp arrives by one lane, or by all 32: racecheck (compute-sanitizer)
// sees an order of what threads store and load only where both have arrived themselves, which takes 2 % longer.
template <int STAGES, int BARS, int LANES = 1> struct Ring {
    u32 base, at;  // at: 2 * stage + phase
    DEV_MEMBER int stage() const { return int(at >> 1); }
    DEV_MEMBER u32 full() const { return base + BARS + 8 * stage(); }
    DEV_MEMBER u32 empty() const { return full() + 8 * STAGES; }
    DEV_MEMBER void wait_full() const { barrier_wait(full(), at & 1); }
    DEV_MEMBER void wait_empty() const { barrier_wait(empty(), at & 1); }
    DEV_MEMBER void next() {
        at += 2;
        if (at >= 2 * STAGES) at = (at ^ 1) - 2 * STAGES;
    }
    // A warp has filled a stage, or reads it no more.
    DEV_MEMBER void filled() {
        __syncwarp();
        if (LANES == 32 || threadIdx.x % 32 == 0) barrier_arrive(full());
        next();
    }
    DEV_MEMBER void release() {
        __syncwarp();
        if (LANES == 32 || threadIdx.x % 32 == 0) barrier_arrive(empty());
        next();
    }
    static DEV_MEMBER void init(u32 base, int fill, int use) {
        for (int i = 0; i < STAGES; i++) barrier_init(base + BARS + 8 * i, u32(fill * LANES)), barrier_init(base + BARS + 8 * (STAGES + i), u32(use * LANES));
    }
};

// A unit: one head over a segment.
struct Walk {
    Segment segment;
    Sequence sequence;
    i64 local, head;  // among the launch's key/value heads; among all
    int near, block, tokens;
    const f64* g;           // of the sequence's first token, or null

    DEV_MEMBER bool find(const Stream& p, i64 unit) {
        if (unit >= i64(p.segment_count) * p.heads) return false;
        segment = p.segments[unit / p.heads];
        local = unit % p.heads;
        head = p.first_head + local;
        sequence = p.sequences[segment.sequence];
        near = p.near, block = p.block, tokens = sequence.tokens;
        g = HAS_G ? p.g + head * p.works + sequence.work : nullptr;
        return true;
    }
    // The first token that is near those of a piece, which may be before all tokens. Most blocks are a piece.
    DEV_MEMBER int since(int token) const { return block == PIECE ? token - near * PIECE : (int(u32(token) / u32(block)) - near) * block; }
    // Tokens before this are in the sums when chunk c is read.
    DEV_MEMBER int frontier(int c) const {
        return HAS_NEAR ? max(since(c * CHUNK), 0) : c * CHUNK;
    }
    // The first chunk whose sums have a token that is the first of a piece.
    DEV_MEMBER int reader(int token) const {
        if (!HAS_NEAR) return token / CHUNK + 1;
        const int block_end = block == PIECE ? token + PIECE : (int(u32(token) / u32(block)) + 1) * block;
        return (block_end + near * block + CHUNK - 1) / CHUNK;
    }
    DEV_MEMBER int end(int c) const { return min((c + 1) * CHUNK, tokens); }
    DEV_MEMBER const bf16* keys(const Stream& p, int first) const { return row<bf16>(p.k, sequence.k_batch, head, sequence.k_first + first); }
    DEV_MEMBER const bf16* values(const Stream& p, int first) const { return row<bf16>(p.v, sequence.k_batch, head, sequence.k_first + first); }
    DEV_MEMBER f64 before(int token) const { return token > 0 ? g[token - 1] : 0.0; }
};

// Asked for anew: what is made of the lane, in loops, would be kept in registers all along.
DEV int lane_here() { return hopper::thread_here() & 31; }
// g as two f32 that add up to it.
DEV float2 halves(f64 g) {
    const f32 high = f32(g);
    return make_float2(high, f32(g - high));
}
DEV f32 difference(float2 a, float2 b) { return (a.x - b.x) + (a.y - b.y); }

DEV f32 polynomial(f32 x, const f32* a) {
    f32 y = a[TERMS - 1];
#pragma unroll
    for (int i = TERMS - 2; i >= 0; i--) y = fmaf(y, x, a[i]);
    return y;
}

// Logits of a warpgroup's 64 queries and the 64 keys of a piece become weights: those of 16 keys are four words. Weights are
// relative to 2^shift, as acc is; that moves where one would be larger than 2^limit.
constexpr f32 LARGE = 80.0f;
// What weights are relative to at first, of a row's g and that of the last token that is far: 1, unless what is far has faded so
// much that nothing of it would be left beside that.
constexpr f32 FADED = -60.0f;
DEV f32 first_shift(float2 own, float2 far) {
    const f32 faded = difference(own, far) * LOG2E;
    return faded < FADED ? faded : 0.0f;
}
template <int N>
DEV void weigh(const Stream& p, f32 (&s)[32], u32 (&weights)[16], f32 (&acc)[N], f32 (&shift)[2], f32& limit, const f32 (&fade)[2], const f32* fall, bool is_exact, bool diagonal, int g, int t) {
    if (is_exact) {
        if (diagonal) {
#pragma unroll
            for (int i = 0; i < 32; i++)
                if (8 * (i >> 2) + 2 * t + (i & 1) > g + 8 * (i >> 1 & 1)) s[i] = -INFINITY;
        }
        // To exponents, and the largest of each row's.
        f32 largest[2] = {-INFINITY, -INFINITY};
#pragma unroll
        for (int j = 0; j < 8; j++) {
            float2 f = make_float2(0.0f, 0.0f);
            if constexpr (HAS_G) f = *reinterpret_cast<const float2*>(fall + 8 * j);
#pragma unroll
            for (int k = 0; k < 2; k++) {
                s[4 * j + 2 * k] = fmaf(s[4 * j + 2 * k], p.exp2_scale, fade[k] - shift[k] + f.x);
                s[4 * j + 2 * k + 1] = fmaf(s[4 * j + 2 * k + 1], p.exp2_scale, fade[k] - shift[k] + f.y);
                largest[k] = fmaxf(largest[k], fmaxf(s[4 * j + 2 * k], s[4 * j + 2 * k + 1]));
            }
        }
        if (__any_sync(ALL_LANES, fmaxf(largest[0], largest[1]) > limit)) {
#pragma unroll
            for (int k = 0; k < 2; k++) {
                largest[k] = fmaxf(largest[k], __shfl_xor_sync(ALL_LANES, largest[k], 1));
                largest[k] = fmaxf(largest[k], __shfl_xor_sync(ALL_LANES, largest[k], 2));
                const f32 by = largest[k] > limit ? largest[k] : 0.0f;
                // Of the first ones it may be negative, when there is nothing to scale.
                const f32 times = exp2_fast(-fmaxf(by, 0.0f));
                shift[k] += by;
#pragma unroll
                for (int m = 0; m < N / 4; m++) acc[4 * m + 2 * k] *= times, acc[4 * m + 2 * k + 1] *= times;
#pragma unroll
                for (int j = 0; j < 8; j++) s[4 * j + 2 * k] -= by, s[4 * j + 2 * k + 1] -= by;
            }
        }
        limit = LARGE;
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int k = 0; k < 2; k++) weights[2 * j + k] = pack2(exp2_fast(s[4 * j + 2 * k]), exp2_fast(s[4 * j + 2 * k + 1]));
    } else if (HAS_NEAR || !diagonal) {
        // By the polynomial, all before the rows.
        f32 a[2][TERMS];
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const f32 by = HAS_G ? exp2_fast(fminf(HAS_NEAR ? fade[k] - shift[k] : fade[k], 0.0f)) : 1.0f;
#pragma unroll
            for (int i = 0; i < TERMS; i++) a[k][i] = HAS_G ? p.a[i] * by : p.a[i];
        }
#pragma unroll
        for (int j = 0; j < 8; j++) {
            float2 f = make_float2(1.0f, 1.0f);
            if constexpr (HAS_G) f = *reinterpret_cast<const float2*>(fall + PIECE + 8 * j);
#pragma unroll
            for (int k = 0; k < 2; k++)
                weights[2 * j + k] = pack2(polynomial(s[4 * j + 2 * k], a[k]) * f.x, polynomial(s[4 * j + 2 * k + 1], a[k]) * f.y);
        }
    } else {
        // 16 keys at a time: of those of a warp's own rows some are before, others are all before or none.
        const int warp = g >> 4;
#pragma unroll
        for (int q = 0; q < 4; q++) {
            if (q > warp) {
#pragma unroll
                for (int i = 4 * q; i < 4 * q + 4; i++) weights[i] = 0;
                continue;
            }
#pragma unroll
            for (int j = 2 * q; j < 2 * q + 2; j++) {
                float2 f = make_float2(0.0f, 0.0f);
                if constexpr (HAS_G) f = *reinterpret_cast<const float2*>(fall + 8 * j);
#pragma unroll
                for (int k = 0; k < 2; k++)
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        f32& y = s[4 * j + 2 * k + e];
                        y = polynomial(y, p.a);
                        if constexpr (HAS_G) y *= exp2_fast(fminf(fade[k] + (e == 0 ? f.x : f.y), 0.0f));
                    }
            }
            if (q == warp) {
#pragma unroll
                for (int i = 8 * q; i < 8 * q + 8; i++)
                    if (8 * (i >> 2) + 2 * t + (i & 1) > g + 8 * (i >> 1 & 1)) s[i] = 0.0f;
            }
#pragma unroll
            for (int i = 4 * q; i < 4 * q + 4; i++) weights[i] = pack2(s[2 * i], s[2 * i + 1]);
        }
    }
}
