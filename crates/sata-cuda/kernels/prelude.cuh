// What every kernel begins with: number types, conversions, loads, copies to shared memory, barriers.
//
// Compiles under NVRTC (which brings no headers), nvcc, and the emulator (emulator/emu.hpp comes before it).
#pragma once

typedef float f32;
typedef double f64;
typedef signed char i8;
typedef unsigned char u8;
typedef short i16;
typedef unsigned short u16;
typedef int i32;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

#define DEVICE __device__ __forceinline__

#undef INFINITY
#define INFINITY (__int_as_float(0x7f800000))
#undef NAN
#define NAN (__int_as_float(0x7fffffff))

// Dynamic shared memory, aligned to 1024 bytes, as `unsigned char*`.
#if defined(SATA_EMULATOR)
#define DYNAMIC_SHARED(name) unsigned char* name = ::emu::block().shared
#else
#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#endif

// A struct of parameters has the size that it has in Rust; `bytes` is a define made from it.
#define SAME_SIZE(type, bytes) static_assert(sizeof(type) == (bytes), #type " differs from its definition in Rust")

// A tensor [batch, heads, tokens, dim] in device memory: strides in elements, the last dimension contiguous.
struct View {
    void* ptr;
    i64 batch, head, token;
};
template <class E>
DEVICE E* row(const View& x, i64 batch, i64 head, i64 token) {
    return static_cast<E*>(x.ptr) + (batch * x.batch + head * x.head + token * x.token);
}

// ---- bf16 and f16 as bits -----------------------------------------------------------------------------------
struct __align__(2) bf16 {
    u16 bits;
};
struct __align__(2) f16 {
    u16 bits;
};

DEVICE f32 to_f32(f32 x) { return x; }
DEVICE f32 to_f32(bf16 x) { return __uint_as_float(u32(x.bits) << 16); }

#if defined(SATA_EMULATOR)
DEVICE f32 to_f32(f16 x) {
    u32 sign = u32(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000 | fraction << 13);
    if (exponent != 0) return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
    f32 small = f32(fraction) * 5.9604644775390625e-8f;  // 2^-24
    return sign ? -small : small;
}
// To nearest, ties to even.
DEVICE u16 bf16_bits(f32 x) {
    u32 bits = __float_as_uint(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
    return u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
DEVICE u16 f16_bits(f32 x) {
    u32 bits = __float_as_uint(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return 0x7fff;
    if (size >= 0x477ff000) return u16(sign | 0x7c00);  // 65520 and more are infinite
    if (size < 0x38800000) {                            // below 2^-14: steps of 2^-24
        // Adding 0.5, whose last place is 2^-24, rounds as wanted.
        f32 moved = __uint_as_float(size) + 0.5f;
        return u16(sign | (__float_as_uint(moved) - 0x3f000000));
    }
    u32 odd = size >> 13 & 1;
    return u16(sign | ((size - 0x38000000 + 0xfff + odd) >> 13));
}
// Two numbers in one register, `low` in the low half.
DEVICE u32 bf16x2_bits(f32 low, f32 high) { return u32(bf16_bits(high)) << 16 | bf16_bits(low); }
DEVICE u32 f16x2_bits(f32 low, f32 high) { return u32(f16_bits(high)) << 16 | f16_bits(low); }
#else
DEVICE f32 to_f32(f16 x) {
    f32 y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
DEVICE u16 bf16_bits(f32 x) {
    u16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
DEVICE u16 f16_bits(f32 x) {
    u16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
DEVICE u32 bf16x2_bits(f32 low, f32 high) {
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
DEVICE u32 f16x2_bits(f32 low, f32 high) {
    u32 y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
#endif

// from_f32<E>(x): the nearest number of type E.
template <class E>
struct Convert;
template <>
struct Convert<f32> {
    static DEVICE f32 of(f32 x) { return x; }
};
template <>
struct Convert<bf16> {
    static DEVICE bf16 of(f32 x) {
        bf16 y;
        y.bits = bf16_bits(x);
        return y;
    }
    static DEVICE u32 pair(f32 low, f32 high) { return bf16x2_bits(low, high); }
};
template <>
struct Convert<f16> {
    static DEVICE f16 of(f32 x) {
        f16 y;
        y.bits = f16_bits(x);
        return y;
    }
    static DEVICE u32 pair(f32 low, f32 high) { return f16x2_bits(low, high); }
};
template <class E>
DEVICE E from_f32(f32 x) {
    return Convert<E>::of(x);
}

// ---- Vectors ------------------------------------------------------------------------------------------------
// Four elements from an address aligned to four of them.
DEVICE float4 load4(const f32* p) { return *reinterpret_cast<const float4*>(p); }
DEVICE float4 load4(const bf16* p) {
    uint2 x = *reinterpret_cast<const uint2*>(p);
    return make_float4(__uint_as_float(x.x << 16), __uint_as_float(x.x & 0xffff0000u),
                       __uint_as_float(x.y << 16), __uint_as_float(x.y & 0xffff0000u));
}
DEVICE float4 load4(const f16* p) {
    ushort4 x = *reinterpret_cast<const ushort4*>(p);
    f16 a, b, c, d;
    a.bits = x.x, b.bits = x.y, c.bits = x.z, d.bits = x.w;
    return make_float4(to_f32(a), to_f32(b), to_f32(c), to_f32(d));
}
DEVICE void store4(f32* p, float4 x) { *reinterpret_cast<float4*>(p) = x; }
DEVICE void store4(bf16* p, float4 x) {
    *reinterpret_cast<uint2*>(p) = make_uint2(bf16x2_bits(x.x, x.y), bf16x2_bits(x.z, x.w));
}
DEVICE void store4(f16* p, float4 x) {
    *reinterpret_cast<uint2*>(p) = make_uint2(f16x2_bits(x.x, x.y), f16x2_bits(x.z, x.w));
}

// ---- Copies from global to shared memory, in the background -------------------------------------------------
// `bytes` is 4, 8 or 16, and both addresses are aligned to it; of these, `valid` are read and the others are 0.
#if defined(SATA_EMULATOR)
template <int bytes>
DEVICE void copy_async(void* shared, const void* global, int valid = bytes) {
    memset(shared, 0, bytes);
    memcpy(shared, global, size_t(valid));
}
DEVICE void copy_async_commit() {}
template <int left>
DEVICE void copy_async_wait() {}
#else
DEVICE u32 shared_address(const void* p) { return u32(__cvta_generic_to_shared(p)); }
template <int bytes>
DEVICE void copy_async(void* shared, const void* global, int valid = bytes) {
    static_assert(bytes == 4 || bytes == 8 || bytes == 16, "cp.async copies 4, 8 or 16 bytes");
    if constexpr (bytes == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                     "r"(valid)
                     : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global),
                     "n"(bytes), "r"(valid)
                     : "memory");
    }
}
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `left` of the newest groups are under way; only the thread's own copies: a barrier follows.
template <int left>
DEVICE void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
}
#endif

// ---- Barriers of some warps: `id` 1 to 15, `threads` a multiple of 32 ----------------------------------------
#if defined(SATA_EMULATOR)
DEVICE void barrier_sync(int id, int threads) { emu::barrier(unsigned(id), unsigned(threads), 0, false, true); }
DEVICE void barrier_arrive(int id, int threads) { emu::barrier(unsigned(id), unsigned(threads), 0, false, false); }
#else
DEVICE void barrier_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
DEVICE void barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
#endif

// ---- Sums and maxima over the lanes of a whole warp, the same in each lane and at each run --------------------
template <class T>
DEVICE T warp_sum(T x) {
#pragma unroll
    for (int by = 16; by > 0; by >>= 1) x += __shfl_xor_sync(0xffffffffu, x, by);
    return x;
}
DEVICE f32 warp_max(f32 x) {
#pragma unroll
    for (int by = 16; by > 0; by >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, by));
    return x;
}
