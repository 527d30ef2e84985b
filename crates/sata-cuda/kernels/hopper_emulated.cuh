// What the Hopper kernels ask of the hardware, done by the emulator's threads: the matrix unit, barriers of the copy
// engine, packed arithmetic. Matrix instructions and copies are done when they are issued.
#pragma once

// Dynamic shared memory; addresses of the matrix unit count from its beginning.
#define shared (reinterpret_cast<char*>(::emu::block().shared))

DEV u32 smem(const void* p) { return u32(static_cast<const char*>(p) - shared); }
DEV void mma_fence() {}
DEV void mma_commit() {}
template <int LEFT> DEV void mma_wait() {}
template <int N> DEV void mma_touch(float (&)[N]) {}

DEV u16 to_bf16(float x) {
    const u32 bits = __float_as_uint(x);
    return u16((bits & 0x7fffffff) > 0x7f800000 ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
DEV float of_bf16(u16 x) { return __uint_as_float(u32(x) << 16); }
DEV u32 pack2(float low, float high) { return u32(to_bf16(high)) << 16 | to_bf16(low); }
DEV u32 mul2(u32 a, u32 b) { return pack2(of_bf16(u16(a)) * of_bf16(u16(b)), of_bf16(u16(a >> 16)) * of_bf16(u16(b >> 16))); }
DEV u32 max2(u32 a, u32 b) { return pack2(fmaxf(of_bf16(u16(a)), of_bf16(u16(b))), fmaxf(of_bf16(u16(a >> 16)), of_bf16(u16(b >> 16)))); }
DEV float exp2_fast(float x) {
    const float y = exp2f(x);
    return y < 1.17549435e-38f ? 0.f : y;
}
DEV u32 __byte_perm(u32 a, u32 b, u32 selector) {
    const u64 bytes = u64(b) << 32 | a;
    u32 y = 0;
    for (int i = 0; i < 4; i++) y |= u32(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return y;
}

struct CopyBarrier {
    u16 count, left;
    short sixteens;  // of bytes, that have yet to come
    unsigned char phase, unused;
};
static_assert(sizeof(CopyBarrier) == 8, "as in hardware");
DEV volatile CopyBarrier& barrier_at(u32 bar) { return *reinterpret_cast<volatile CopyBarrier*>(shared + bar); }
DEV void barrier_turn(volatile CopyBarrier& b) {
    if (b.left != 0 || b.sixteens != 0) return;
    b.phase = b.phase ^ 1;
    b.left = b.count;
    ::emu::block().naps = 0;  // they are counted from here
}
DEV void barrier_init(u32 bar, u32 count) {
    volatile CopyBarrier& b = barrier_at(bar);
    b.phase = 0;
    b.count = b.left = u16(count);
    b.sixteens = 0;
}
DEV void barrier_init_done() {}
DEV void barrier_arrive(u32 bar, u32 count = 1) {
    volatile CopyBarrier& b = barrier_at(bar);
    b.left = u16(b.left - count);
    barrier_turn(b);
}
DEV void barrier_expect(u32 bar, u32 bytes) {
    barrier_at(bar).sixteens = short(barrier_at(bar).sixteens + int(bytes / 16));
    barrier_arrive(bar);
}
DEV void barrier_wait(u32 bar, u32 parity) {
    while (barrier_at(bar).phase == parity) ::emu::nap();
}
DEV void copy_bulk(u32 to, const void* from, u32 bytes, u32 bar) {
    memcpy(shared + to, from, bytes);
    barrier_at(bar).sixteens = short(barrier_at(bar).sixteens - int(bytes / 16));
    barrier_turn(barrier_at(bar));
}
DEV void copy_16(void* to, const void* from, bool is) {
    memset(to, 0, 16);
    if (is) memcpy(to, from, 16);
}
DEV void copy_16_wait() {}
DEV void proxy_fence() {}
DEV void group_sync(int id, int threads) { ::emu::barrier(unsigned(id), unsigned(threads), 0, false, true); }
// In hardware no warp of a warpgroup goes ahead of the matrix instructions that the others take part in.
DEV void group_arrive(u32 bar, u32 count = 1) {
    group_sync(1 + int(threadIdx.x >> 7), 128);
    if ((threadIdx.x & 127) == 0) barrier_arrive(bar, count);
}
template <int GROUPS, int REGISTERS = 24> DEV void role_copies() {}
template <int GROUPS> DEV void role_multiplies() {}
DEV u32 block_here() { return blockIdx.x; }
DEV int thread_here() { return int(threadIdx.x); }
DEV void flag_set(u32* flag) { __atomic_store_n(flag, 1u, __ATOMIC_RELEASE); }
DEV void flag_wait(const u32* flag) {
    // Other blocks may take long.
    for (u32 times = 0; !__atomic_load_n(flag, __ATOMIC_ACQUIRE); times++) {
        if (times < 10000000) ::emu::block().naps = 0;
        sched_yield();
        ::emu::nap();
    }
}
DEV uint2 load_pair(u32 address) { return *reinterpret_cast<const uint2*>(shared + address); }
DEV void forget(int&) {}
DEV void in_order() {}

// As hopper_mma.cuh has it.
template <int N> struct Mma {
    template <int TRANSPOSED> static DEV_MEMBER void run(float (&d)[N / 2], u32 a0, u32 a1, u32 a2, u32 a3, u64 b) {
        const int lane = threadIdx.x & 31, m = lane & 3;
        float a[2][16];
        for (int from = 0; from < 4; from++) {
            const u64 low = __shfl_sync(~0u, u64(a1) << 32 | a0, (lane & ~3) | from), high = __shfl_sync(~0u, u64(a3) << 32 | a2, (lane & ~3) | from);
            for (int h = 0; h < 2; h++)
                for (int e = 0; e < 2; e++) {
                    a[h][2 * from + e] = of_bf16(u16(low >> (32 * h + 16 * e)));
                    a[h][2 * from + 8 + e] = of_bf16(u16(high >> (32 * h + 16 * e)));
                }
        }
        const char* const at = shared + ((b & 0x3fff) << 4);
        const u32 along_k = (b >> 16 & 0x3fff) << 4, along_n = (b >> 32 & 0x3fff) << 4;
        for (int j = 0; j < N / 8; j++)
            for (int e = 0; e < 2; e++) {
                const int n = 2 * m + e;
                float sum[2] = {};
                for (int k = 0; k < 16; k++) {
                    const u32 inside = TRANSPOSED ? k % 8 * 16 + n * 2 : n * 16 + k % 8 * 2;
                    const float x = of_bf16(*reinterpret_cast<const u16*>(at + k / 8 * along_k + j * along_n + inside));
                    sum[0] += a[0][k] * x;
                    sum[1] += a[1][k] * x;
                }
                d[4 * j + e] += sum[0];
                d[4 * j + 2 + e] += sum[1];
            }
    }
};
