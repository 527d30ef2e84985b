// What the Hopper kernels ask of the hardware: the matrix unit's order, barriers of the copy engine, packed bf16 arithmetic.
// Under the emulator hopper_emulated.cuh stands for it.
#pragma once

// Dynamic shared memory.
extern __shared__ __align__(128) char shared[];

DEV u32 smem(const void* p) { return (u32)__cvta_generic_to_shared(p); }

DEV void mma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
DEV void mma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
template <int LEFT> DEV void mma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(LEFT) : "memory"); }
// Tells the compiler that accumulators change while the unit works.
template <int N> DEV void mma_touch(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// Products of two bf16 at once.
DEV u32 mul2(u32 a, u32 b) {
    u32 c;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}
// Two floats to bf16, `low` in the lower half.
DEV u32 pack2(float low, float high) {
    u32 c;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(c) : "f"(high), "f"(low));
    return c;
}
DEV u16 to_bf16(float x) {
    u16 c;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(c) : "f"(x));
    return c;
}
DEV float of_bf16(u16 x) { return __uint_as_float((u32)x << 16); }
// The larger of each of two bf16.
DEV u32 max2(u32 a, u32 b) {
    u32 c;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}
DEV float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Barriers of the copy engine.
DEV void barrier_init(u32 bar, u32 count) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count)); }
DEV void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEV void barrier_arrive(u32 bar, u32 count = 1) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(count) : "memory"); }
// For a warpgroup whose matrix instructions have ended: they are all warps' together.
DEV void group_arrive(u32 bar, u32 count = 1) {
    if ((threadIdx.x & 127) == 0) barrier_arrive(bar, count);
}
DEV void barrier_expect(u32 bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
DEV void barrier_wait(u32 bar, u32 parity) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "again:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
        "@p bra done;\nbra again;\ndone:\n}\n" ::"r"(bar), "r"(parity) : "memory");
}
// `bytes` contiguous bytes (a multiple of 16) from global to shared memory; `bar` counts them.
DEV void copy_bulk(u32 to, const void* from, u32 bytes, u32 bar) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes), "r"(bar)
                 : "memory");
}
// 16 bytes, or as many zeros, in the background.
DEV void copy_16(void* to, const void* from, bool is) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem(to)), "l"(from), "r"(is ? 16 : 0) : "memory");
}
DEV void copy_16_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }
DEV void group_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
DEV void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Registers of a thread that multiplies, in a block of `groups` warpgroups of them and one that copies.
__host__ __device__ constexpr int registers_of(int groups) { return groups == 1 ? 0 : groups == 2 ? 240 : groups == 3 ? 160 : 112; }
template <int GROUPS, int REGISTERS = 24> DEV void role_copies() {
    if constexpr (registers_of(GROUPS) > 0) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int GROUPS> DEV void role_multiplies() {
    if constexpr (registers_of(GROUPS) > 0) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers_of(GROUPS)));
}

// The indices of this block and thread, asked for where they are needed: what is made of them takes no registers before.
DEV u32 block_here() {
    u32 block;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
    return block;
}
DEV int thread_here() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}
// The compiler knows nothing of x from here on, and moves no access to memory across.
DEV void forget(int& x) { asm volatile("" : "+r"(x)); }
DEV void in_order() { asm volatile("" ::: "memory"); }
// A flag in global memory: what was written before it is set is seen after the wait.
DEV void flag_set(u32* flag) { asm volatile("st.release.gpu.u32 [%0], 1;" ::"l"(flag) : "memory"); }
DEV void flag_wait(const u32* flag) {
    u32 is = 0;
    while (!is) asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(is) : "l"(flag) : "memory");
}
// 8 bytes of shared memory.
DEV uint2 load_pair(u32 address) {
    uint2 x;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(address));
    return x;
}
