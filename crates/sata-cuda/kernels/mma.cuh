// The matrix instructions of sm_80 and later, a warp at a time, and what feeds them; bf16 in, f32 out.
//
// With g = lane / 4 and t = lane % 4, of a product C[16 x 8] += A[16 x 16] B[16 x 8]
//   A  a[0] row g, columns 2t, 2t+1;  a[1] row g+8;  a[2] row g, columns 2t+8, 2t+9;  a[3] row g+8, the same
//   B  b[0] rows 2t, 2t+1 of column g;  b[1] rows 2t+8, 2t+9
//   C  c[0], c[1] row g, columns 2t, 2t+1;  c[2], c[3] row g+8
// Under the emulator lanes exchange what the instruction would bring together.
#pragma once
#include "prelude.cuh"

constexpr u32 ALL_LANES = 0xffffffffu;
constexpr u32 BF16_ONES = 0x3f803f80u;

#if defined(SATA_EMULATOR)
DEVICE f32 low_f32(u32 x) { return __uint_as_float(x << 16); }
DEVICE f32 high_f32(u32 x) { return __uint_as_float(x & 0xffff0000u); }

// Products of two bf16 at once.
DEVICE u32 mul2(u32 a, u32 b) { return bf16x2_bits(low_f32(a) * low_f32(b), high_f32(a) * high_f32(b)); }

template <int STEPS>
DEVICE void emulated_mma(f32 (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    const int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
    f32 rows[2][16], columns[2][16];
    auto both = [](u32 x, u32 y) { return u64(x) | u64(y) << 32; };
    const auto* first = emu::exchange(ALL_LANES, both(a[0], a[1]));
    for (int i = 0; i < 4; i++)
        for (int h = 0; h < 2; h++) {
            const u32 x = u32(first[4 * g + i] >> 32 * h);
            rows[h][2 * i] = low_f32(x), rows[h][2 * i + 1] = high_f32(x);
        }
    const auto* second = emu::exchange(ALL_LANES, both(a[2], a[3]));
    for (int i = 0; i < 4; i++)
        for (int h = 0; h < 2; h++) {
            const u32 x = u32(second[4 * g + i] >> 32 * h);
            rows[h][2 * i + 8] = low_f32(x), rows[h][2 * i + 9] = high_f32(x);
        }
    const auto* third = emu::exchange(ALL_LANES, both(b[0], b[1]));
    for (int i = 0; i < 4; i++)
        for (int n = 0; n < 2; n++) {
            const u64 x = third[4 * (2 * t + n) + i];
            columns[n][2 * i] = low_f32(u32(x)), columns[n][2 * i + 1] = high_f32(u32(x));
            columns[n][2 * i + 8] = low_f32(u32(x >> 32)), columns[n][2 * i + 9] = high_f32(u32(x >> 32));
        }
    for (int h = 0; h < 2; h++)
        for (int n = 0; n < 2; n++)
            for (int k = 0; k < 8 * STEPS; k++) c[2 * h + n] += rows[h][k] * columns[n][k];
}
DEVICE void mma(f32 (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) { emulated_mma<2>(c, a, b); }
// The same over 8 rows of B.
DEVICE void mma_half(f32 (&c)[4], u32 a0, u32 a1, u32 b0) {
    const u32 a[4] = {a0, a1, 0, 0}, b[2] = {b0, 0};
    emulated_mma<1>(c, a, b);
}

template <int MATRICES, bool TRANSPOSED>
DEVICE void load_matrices(u32 (&r)[MATRICES], const void* row) {
    const int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
    const auto* rows = emu::exchange(ALL_LANES, reinterpret_cast<u64>(row));
    for (int m = 0; m < MATRICES; m++) {
        auto at = [&](int r, int c) { return u32(reinterpret_cast<const u16*>(rows[8 * m + r])[c]); };
        r[m] = TRANSPOSED ? at(2 * t, g) | at(2 * t + 1, g) << 16 : at(g, 2 * t) | at(g, 2 * t + 1) << 16;
    }
}
// The reverse: stores what each lane has of elements 2t, 2t+1 of row g.
template <int MATRICES>
DEVICE void store_matrices(void* row, const u32 (&r)[MATRICES]) {
    const int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
    const auto* rows = emu::exchange(ALL_LANES, reinterpret_cast<u64>(row));
    for (int m = 0; m < MATRICES; m++) reinterpret_cast<u32*>(rows[8 * m + g])[t] = r[m];
}
DEVICE f32 exp2_fast(f32 x) { return exp2f(x); }
DEVICE f32 reciprocal_fast(f32 x) { return 1.0f / x; }
// The upper half of `low`, the lower of `high`.
DEVICE u32 between(u32 low, u32 high) { return low >> 16 | high << 16; }
#else
DEVICE u32 mul2(u32 a, u32 b) {
    u32 c;
#if __CUDA_ARCH__ >= 900
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
#else
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(c) : "r"(a), "r"(b), "r"(0x80008000u));
#endif
    return c;
}
DEVICE void mma(f32 (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE void mma_half(f32 (&c)[4], u32 a0, u32 a1, u32 b0) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(b0));
}

// MATRICES 8 x 8 matrices of 16-bit elements from shared memory: lane 8m + r brings the address of row r of matrix m.
// Each lane gets elements 2t, 2t+1 of row g; TRANSPOSED: element g of rows 2t, 2t+1.
template <int MATRICES, bool TRANSPOSED>
DEVICE void load_matrices(u32 (&r)[MATRICES], const void* row) {
    static_assert(MATRICES == 1 || MATRICES == 2 || MATRICES == 4, "ldmatrix loads 1, 2 or 4");
    const u32 at = shared_address(row);
    if constexpr (MATRICES == 4) {
        if constexpr (TRANSPOSED)
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
        else
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
    } else if constexpr (MATRICES == 2) {
        if constexpr (TRANSPOSED)
            asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(at) : "memory");
        else
            asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(at) : "memory");
    } else {
        if constexpr (TRANSPOSED)
            asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(at) : "memory");
        else
            asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(at) : "memory");
    }
}
template <int MATRICES>
DEVICE void store_matrices(void* row, const u32 (&r)[MATRICES]) {
    static_assert(MATRICES == 2 || MATRICES == 4, "2 or 4 are stored");
#if __CUDA_ARCH__ >= 900
    const u32 at = shared_address(row);
    if constexpr (MATRICES == 4)
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
    else
        asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(at), "r"(r[0]), "r"(r[1]) : "memory");
#else
    const int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
    const u32 own = shared_address(row);
#pragma unroll
    for (int m = 0; m < MATRICES; m++) {
        const u32 at = __shfl_sync(ALL_LANES, own, 8 * m + g) + 4 * t;
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(r[m]) : "memory");
    }
#endif
}
// To the last place but one.
DEVICE f32 reciprocal_fast(f32 x) {
    f32 y;
    asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE f32 exp2_fast(f32 x) {
    f32 y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE u32 between(u32 low, u32 high) { return __byte_perm(low, high, 0x5432); }
#endif

// Two floats as bf16, `low` in the lower half.
DEVICE u32 pack2(f32 low, f32 high) { return bf16x2_bits(low, high); }
