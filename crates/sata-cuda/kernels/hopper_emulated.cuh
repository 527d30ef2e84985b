// The instructions of Hopper's that hopper.cuh and hopper_mma.cuh wrap, for the emulator: addresses in shared memory,
// barriers that count bytes, and products of a warpgroup, which are done at once.
#pragma once

// Offsets in dynamic shared memory; of variables, which lie elsewhere, 16 bits beside the number of one of them.
struct Elsewhere {
    const unsigned char* at[1 << 12];
    u32 count;
};
DEV Elsewhere& elsewhere() {
    static thread_local Elsewhere all;
    return all;
}
DEV u32 smem(const void* p) {
    const unsigned char* at = (const unsigned char*)p;
    const i64 offset = at - emu::block().shared;
    if (offset >= 0 && offset < (i64)emu::SHARED_MOST) return (u32)offset;
    Elsewhere& all = elsewhere();
    u32 i = 0;
    while (i < all.count && all.at[i] != at) i++;
    if (i == all.count) {
        if (i == 1 << 12) emu::fail(emu::block(), "too many variables in shared memory");
        all.at[all.count++] = at;
    }
    return 1u << 30 | i << 16;
}
DEV unsigned char* shared_at(u32 address) {
    if (address >> 30) return (unsigned char*)elsewhere().at[address >> 16 & 0xfff] + (address & 0xffff);
    return emu::block().shared + address;
}

DEV void mma_fence() {}
DEV void mma_commit() {}
template <int LEFT> DEV void mma_wait() { emu::barrier(8 + threadIdx.x / 128, 128, 0, false, true); }
template <int N> DEV void mma_touch(float (&)[N]) {}

DEV float of_bf16(u16 x) { return __uint_as_float((u32)x << 16); }
DEV u16 to_bf16(float x) {
    const u32 bits = __float_as_uint(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
    return (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
DEV u32 pack2(float low, float high) { return (u32)to_bf16(high) << 16 | to_bf16(low); }
DEV u32 mul2(u32 a, u32 b) {
    return pack2(of_bf16((u16)a) * of_bf16((u16)b), of_bf16((u16)(a >> 16)) * of_bf16((u16)(b >> 16)));
}
DEV float exp2_fast(float x) { return exp2f(x); }
DEV u32 __byte_perm(u32 a, u32 b, u32 selector) {
    u32 all = 0;
    for (int i = 0; i < 4; i++) {
        const u32 from = selector >> 4 * i & 7;
        all |= ((from < 4 ? a : b) >> 8 * (from & 3) & 255) << 8 * i;
    }
    return all;
}

struct Barrier {
    u16 count, pending;
    int bytes : 31;
    u32 phase : 1;
    __device__ void settle() {
        ++emu::block().progress;
        if (pending != 0 || bytes != 0) return;
        pending = count;
        phase ^= 1;
    }
};
DEV Barrier& barrier_at(u32 bar) { return *(Barrier*)shared_at(bar); }
DEV void barrier_init(u32 bar, u32 count) {
    Barrier& b = barrier_at(bar);
    b.count = b.pending = (u16)count;
    b.bytes = 0;
    b.phase = 0;
}
DEV void barrier_init_done() {}
DEV void barrier_arrive(u32 bar) {
    barrier_at(bar).pending--;
    barrier_at(bar).settle();
}
DEV void barrier_expect(u32 bar, u32 bytes) {
    barrier_at(bar).bytes += (int)bytes;
    barrier_arrive(bar);
}
DEV void barrier_wait(u32 bar, u32 parity) {
    while (barrier_at(bar).phase == parity) emu::nap();
}
DEV void copy_bulk(u32 to, const void* from, u32 bytes, u32 bar) {
    memcpy(shared_at(to), from, bytes);
    barrier_at(bar).bytes -= (int)bytes;
    barrier_at(bar).settle();
}
DEV void group_sync(int id, int threads) { emu::barrier((unsigned)id, (unsigned)threads, 0, false, true); }
DEV void proxy_fence() {}
template <int GROUPS, int REGISTERS = 24> DEV void role_copies() {}
template <int GROUPS> DEV void role_multiplies() {}

// acc[64 x N] += A[64 x 16] * B[16 x N], by the 32 threads of each warp for its own rows.
template <int N> struct Mma {
    template <int TRANSPOSED>
    static __device__ void run(float (&d)[N / 2], u32 a0, u32 a1, u32 a2, u32 a3, u64 b) {
        u32 mine[4] = {a0, a1, a2, a3};
        const uint64_t* met = emu::exchange(0xffffffffu, (uint64_t)mine);
        const int g = (threadIdx.x & 31) >> 2, m = threadIdx.x & 3;
        float rows[2][16];
        for (int h = 0; h < 2; h++)
            for (int k = 0; k < 16; k++) {
                const u32 word = ((const u32*)met[4 * g + k % 8 / 2])[h + k / 8 * 2];
                rows[h][k] = of_bf16((u16)(k % 2 ? word >> 16 : word));
            }
        const u32 start = (u32)(b & 0x3fff) << 4, along_k = (u32)(b >> 16 & 0x3fff) << 4, along_n = (u32)(b >> 32 & 0x3fff) << 4;
        for (int i = 0; i < N / 2; i++) {
            const int n = i / 4 * 8 + 2 * m + i % 2;
            float sum = 0;
            for (int k = 0; k < 16; k++) {
                const u32 at = start + k / 8 * along_k + n / 8 * along_n + (TRANSPOSED ? k % 8 * 16 + n % 8 * 2 : n % 8 * 16 + k % 8 * 2);
                sum += rows[i / 2 % 2][k] * of_bf16(*(const u16*)shared_at(at));
            }
            d[i] += sum;
        }
        emu::exchange(0xffffffffu, 0);
    }
};
