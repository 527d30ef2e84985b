// What the backward kernels for matrix units share: products of 16 x 8 x 16 bf16 with f32 sums, how their operands are
// loaded from shared memory, tiles of tokens there, weights of a pair.
//
// mma.sync m16n8k16 (sm_80 and later): with g = lane / 4 and m = lane % 4,
//   A  a[0] row g, columns 2m, 2m+1;  a[1] row g+8;  a[2] row g, columns 8 further;  a[3] both
//   B  b0 rows 2m, 2m+1 of column g;  b1 rows 8 further
//   C  c[0], c[1] row g, columns 2m, 2m+1;  c[2], c[3] row g+8
// so that two neighbouring Cs, rounded, are an A.
//
// Compile-time constants, beside those of backward.cuh: WARPS of a block; ROW_TILES rows of 16 a warp has; BLOCKS of a
// multiprocessor at once; SHARED_BYTES.
#pragma once
#include "backward.cuh"

constexpr int THREADS = 32 * WARPS, ROWS = 16 * ROW_TILES * WARPS;
constexpr int TILE = 64;  // tokens of a tile that passes
constexpr int STAGES = 2;
// Pieces of a tile that are worked on at once, where registers allow it.
constexpr int UNROLLED = BLOCKS <= 2 ? 2 : 1;
// Elements in whole steps of 16, and rows that lie in different banks.
constexpr int KEY_COLUMNS = (D_KEY + 15) / 16 * 16, VALUE_COLUMNS = (D_VALUE + 15) / 16 * 16;
constexpr int KEY_PITCH = KEY_COLUMNS + 8, VALUE_PITCH = VALUE_COLUMNS + 8;
constexpr int KEY_STEPS = KEY_COLUMNS / 16, VALUE_STEPS = VALUE_COLUMNS / 16;

constexpr i32 NOWHERE = 1 << 30;
constexpr f32 LOG2E = 1.4426950408889634f;

DEVICE int lane_of_warp() { return int(threadIdx.x % 32); }

// ---- Matrix units -----------------------------------------------------------------------------------------------
#if defined(SATA_EMULATOR)
DEVICE f32 half_of(u32 word, int high) { return __uint_as_float(high ? word & 0xffff0000u : word << 16); }
DEVICE void multiply(f32 (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    u32 mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    const uint64_t* met = emu::exchange(0xffffffffu, reinterpret_cast<uint64_t>(mine));
    const u32* all[32];
    for (int i = 0; i < 32; ++i) all[i] = reinterpret_cast<const u32*>(met[i]);
    int g = lane_of_warp() / 4, m = lane_of_warp() % 4;
    for (int i = 0; i < 4; ++i) {
        int column = 2 * m + i % 2;
        f32 sum = 0;
        for (int k = 0; k < 16; ++k) {
            f32 x = half_of(all[4 * g + k % 8 / 2][i / 2 + 2 * (k / 8)], k % 2);
            f32 y = half_of(all[4 * column + k % 8 / 2][4 + k / 8], k % 2);
            sum += x * y;
        }
        c[i] += sum;
    }
    __syncwarp();
}
// Four 8 x 8 matrices: lane 8 i + r brings the address of row r of matrix i.
DEVICE void load_matrices(u32 (&to)[4], const bf16* row) {
    const uint64_t* met = emu::exchange(0xffffffffu, reinterpret_cast<uint64_t>(row));
    for (int i = 0; i < 4; ++i) {
        const bf16* from = reinterpret_cast<const bf16*>(met[8 * i + lane_of_warp() / 4]) + 2 * (lane_of_warp() % 4);
        to[i] = u32(from[1].bits) << 16 | from[0].bits;
    }
    __syncwarp();
}
// The same, each transposed.
DEVICE void load_matrices_transposed(u32 (&to)[4], const bf16* row) {
    const uint64_t* met = emu::exchange(0xffffffffu, reinterpret_cast<uint64_t>(row));
    for (int i = 0; i < 4; ++i) {
        int at = 8 * i + 2 * (lane_of_warp() % 4);
        u32 low = reinterpret_cast<const bf16*>(met[at])[lane_of_warp() / 4].bits;
        u32 high = reinterpret_cast<const bf16*>(met[at + 1])[lane_of_warp() / 4].bits;
        to[i] = high << 16 | low;
    }
    __syncwarp();
}
DEVICE f32 exp2_fast(f32 x) { return exp2f(x); }
#else
DEVICE void multiply(f32 (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE void load_matrices(u32 (&to)[4], const bf16* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row)));
}
DEVICE void load_matrices_transposed(u32 (&to)[4], const bf16* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row)));
}
DEVICE f32 exp2_fast(f32 x) {
    f32 y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#endif

DEVICE f32 quad_sum(f32 x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
DEVICE f32 quad_max(f32 x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// Where a lane's rows of four matrices begin: 16 rows by 16 columns as A; or as B of 16 columns and 16 rows, stored
// column by column, or (transposed) row by row.
template <int PITCH>
DEVICE int place_of_a(int lane) { return (lane % 16) * PITCH + lane / 16 * 8; }
template <int PITCH>
DEVICE int place_of_b(int lane) { return (lane % 8 + lane / 16 * 8) * PITCH + lane / 8 % 2 * 8; }
template <int PITCH>
DEVICE int place_of_b_transposed(int lane) { return (lane % 16) * PITCH + lane / 16 * 8; }

// x[rows][16 columns] of a warp's rows times 16 rows of a tile, from `b` on: over all elements.
template <int STEPS>
DEVICE void multiply_rows(f32 (&x)[ROW_TILES][2][4], const u32 (&a)[ROW_TILES][STEPS][4], const bf16* b) {
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
#pragma unroll
        for (int i = 0; i < 4; ++i) x[r][0][i] = x[r][1][i] = 0;
    }
#pragma unroll
    for (int k = 0; k < STEPS; ++k) {
        u32 word[4];
        load_matrices(word, b + 16 * k);
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r) {
            multiply(x[r][0], a[r][k], word[0], word[1]);
            multiply(x[r][1], a[r][k], word[2], word[3]);
        }
    }
}
// Two neighbouring Cs as an A.
DEVICE void round_to(u32 (&a)[4], const f32 (&x)[2][4]) {
    a[0] = bf16x2_bits(x[0][0], x[0][1]);
    a[1] = bf16x2_bits(x[0][2], x[0][3]);
    a[2] = bf16x2_bits(x[1][0], x[1][1]);
    a[3] = bf16x2_bits(x[1][2], x[1][3]);
}

// ---- Tiles in shared memory -------------------------------------------------------------------------------------
// `count` rows of DIM elements, the first at `from` and `stride` apart, in the background; zeros around them.
template <int DIM, int COLUMNS, int PITCH, int MOST>
DEVICE void load_rows(bf16* to, const bf16* from, i64 stride, int count) {
    constexpr int PARTS = COLUMNS / 8;
    if constexpr (THREADS % PARTS == 0 && MOST * PARTS % THREADS == 0) {
        // Each thread has the same part of every so many-th row.
        constexpr int BY = THREADS / PARTS;
        int t = int(threadIdx.x) / PARTS, c = int(threadIdx.x) % PARTS * 8;
        const bf16* at = from + (t * stride + c);
        to += t * PITCH + c;
#pragma unroll
        for (int i = 0; i < MOST / BY; ++i) {
            bool there = t + i * BY < count && c < DIM;
            copy_async<16>(to + i * BY * PITCH, there ? at : from, there ? 16 : 0);
            at += BY * stride;
        }
    } else {
        for (int i = threadIdx.x; i < MOST * PARTS; i += THREADS) {
            int t = i / PARTS, c = i % PARTS * 8;
            bool there = t < count && c < DIM;
            copy_async<16>(to + t * PITCH + c, there ? from + (t * stride + c) : from, there ? 16 : 0);
        }
    }
}
// The same from f32s, at once: element(t, i) of row t.
template <int DIM, int COLUMNS, int PITCH, class F>
DEVICE void put_rows(bf16* to, int most, int count, F element) {
    for (int i = threadIdx.x; i < most * COLUMNS; i += THREADS) {
        int t = i / COLUMNS, c = i % COLUMNS;
        to[t * PITCH + c].bits = bf16_bits(t < count && c < DIM ? element(t, c) : 0.0f);
    }
}
// Numbers of tokens, in the background; zeros after them.
template <class T>
DEVICE void load_numbers(T* to, const T* from, int count) {
    static_assert(THREADS >= TILE, "a thread has a token at most");
    int t = threadIdx.x;
    if (t < TILE) copy_async<sizeof(T)>(to + t, t < count ? from + t : from, t < count ? int(sizeof(T)) : 0);
}

DEVICE float2 split(f64 g) {
    f32 high = f32(g);
    return make_float2(high, f32(g - f64(high)));
}
DEVICE f32 difference(float2 a, float2 b) { return (a.x - b.x) + (a.y - b.y); }
// A place counted from `from`, or as good as one.
DEVICE i32 place_from(i64 place, i64 from) { return i32(max(min(place - from, i64(NOWHERE) - 1), i64(1) - NOWHERE)); }

// ---- Weights ----------------------------------------------------------------------------------------------------
// Coefficients of the powers of a dot product that has not been scaled: in registers where they are few.
struct Polynomial {
    f32 a[TERMS];
    DEVICE void load(const Backward& p) {
        f32 power = 1;
#pragma unroll
        for (int i = 0; i < TERMS; ++i) {
            a[i] = p.coefficients[i] * power;
            power *= p.scale;
        }
    }
    DEVICE f32 operator()(f32 x, f32& slope) const {
        if constexpr (TERMS == 1) {
            slope = 0;
            return a[0];
        } else {
            f32 y = fmaf(a[TERMS - 1], x, a[TERMS - 2]);
            slope = a[TERMS - 1];
#pragma unroll
            for (int i = TERMS - 3; i >= 0; --i) {
                slope = fmaf(slope, x, y);
                y = fmaf(y, x, a[i]);
            }
            return y;
        }
    }
};
