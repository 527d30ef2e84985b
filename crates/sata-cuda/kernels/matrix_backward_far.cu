// What sums give the gradients of queries (KEYS 0), or of keys (KEYS 1), on Hopper's matrix units.
//
// Sums lie as hopper_sums.cu leaves them, bf16 with coefficients. Products H_f = sum_e S_fe dy_e of all features with a
// token's dy (or of v and 1 with the sums of queries) stay in registers, where they are contracted with the derivatives of
// the features at once: of x_i x_j x_c, for 8 neighbouring c,
//
//     dx_c += H_c x_i x_j,   h = sum_c H_c x_c,   dx_i += h x_j,   dx_j += h x_i.
//
// By Euler's theorem sum_f H_f Phi_f is sum_p x.dx_p / p over the orders. Gradients by the sums of ones, which are the same
// for all tokens of a chunk, are read from their derivatives (matrix_backward_slopes) by features of order 2 and less.
// Keys multiply their features with the sums, for dv, as well.
//
// Grid: blocks of ROWS tokens of a chunk (of each head of a group), chunks, units at work. Block: READERS warpgroups of 64
// tokens each and one that copies. Leaves the rows that matrix_backward_queries and matrix_backward_keys read.
// Bytes: the sums once per block (from L2). FLOPs: 2 D D_VALUE on matrix units (keys: 4), 7 D beside them, per token.
#include "backward.cuh"
namespace hopper {
#include "hopper.cuh"
#include "hopper_mma.cuh"
#undef shared  // the emulator's name for what DYNAMIC_SHARED names here
}
using namespace hopper;

struct Far {
    Backward b;
    const u16* sums;    // [unit][place][feature block][NP / 8][8 features][8]
    const u16* slopes;  // [unit][place][block][D_KEY / 8][8 features][8 elements]
    i32 places, unused;
};
SAME_SIZE(Far, FAR_BYTES);

constexpr int ROWS = READERS * 64, THREADS = READERS * 128 + 128;
constexpr int BLOCK_BYTES = NP * 16, STEP_BYTES = 2 * BLOCK_BYTES;
// Feature blocks of T(a; c) and R(b, c) that are multiplied at once, as many as registers hold; steps of a stage of T.
constexpr int T_AT_ONCE = KEYS ? 4 : 6, R_AT_ONCE = KEYS ? 4 : 8, T_STEPS = 3 * T_AT_ONCE / 2;
constexpr int STAGE_BYTES = (9 * STEP_BYTES > 64 * D_KEY * 2 ? 9 * STEP_BYTES : 64 * D_KEY * 2) + 127 & ~127;
// Rows that lie in different banks.
constexpr int PITCH = D_KEY % 16 == 8 ? D_KEY : D_KEY + 8;
constexpr int T_SLABS = HAS3 ? 18 / T_STEPS * NB * NB : 0, R_SLABS = R_BLOCKS / 16, Q_SLABS = Q_BLOCKS / 8;
// Derivatives of sums of ones: those of order 3 for each feature block of order 2, of order 2 for those of order 1, padded
// to an even number, and two of order 0.
constexpr int SLOPE_Q = HAS3 ? NB * (NB + 1) / 2 * 8 : 0, SLOPE_L = (NB + 1) / 2 * 2, SLOPES = SLOPE_Q + SLOPE_L + 2;
constexpr int STEPS = (D_VALUE + 15) / 16;
#if KEYS
constexpr int VALUES = D_VALUE;
#endif

struct Shared {
    char stages[STAGES][STAGE_BYTES];
    f32 x[ROWS * PITCH];   // of the tokens
    f32 dx[ROWS * PITCH];
    u64 bars[2 * STAGES];
};
SAME_SIZE(Shared, SHARED_BYTES);

struct Ring {
    u32 base, bars;
    int stage;
    u32 phase;
    DEV_MEMBER u32 acquire() {
        barrier_wait(bars + 8 * stage, phase);
        return base + stage * STAGE_BYTES;
    }
    DEV_MEMBER void release() {
        if ((threadIdx.x & 127) == 0) barrier_arrive(bars + 8 * (STAGES + stage));
        if (++stage == STAGES) {
            stage = 0;
            phase ^= 1;
        }
    }
};

// The first of some products: what was in the accumulators is nothing.
#if defined(SATA_EMULATOR)
template <int N> struct First {
    static __device__ void run(f32 (&d)[N / 2], u32 a0, u32 a1, u32 a2, u32 a3, u64 b) {
        for (f32& x : d) x = 0;
        Mma<N>::template run<0>(d, a0, a1, a2, a3, b);
    }
};
#else
template <int N> struct First;
#define FIRST(N, COUNT, LIST, A0, A1, A2, A3, B, ...)                                                                                   \
    template <> struct First<N> {                                                                                                      \
        static __device__ __forceinline__ void run(float (&d)[COUNT], u32 a0, u32 a1, u32 a2, u32 a3, u64 b) {                           \
            asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" LIST "}, {" A0 ", " A1 ", " A2 ", " A3 "}, " B ", 0, 1, 1, 0;\n" \
                         : __VA_ARGS__                                                                                                 \
                         : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));                                                                 \
        }                                                                                                                              \
    }
#define OUT4(i) "=f"(d[i]), "=f"(d[i + 1]), "=f"(d[i + 2]), "=f"(d[i + 3])
FIRST(16, 8, "%0, %1, %2, %3, %4, %5, %6, %7", "%8", "%9", "%10", "%11", "%12", OUT4(0), OUT4(4));
FIRST(32, 16, "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15", "%16", "%17", "%18", "%19", "%20", OUT4(0), OUT4(4), OUT4(8),
      OUT4(12));
FIRST(48, 24, "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23", "%24", "%25", "%26",
      "%27", "%28", OUT4(0), OUT4(4), OUT4(8), OUT4(12), OUT4(16), OUT4(20));
FIRST(64, 32,
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, "
      "%30, %31",
      "%32", "%33", "%34", "%35", "%36", OUT4(0), OUT4(4), OUT4(8), OUT4(12), OUT4(16), OUT4(20), OUT4(24), OUT4(28));
#endif

struct A {
    u32 a[4];
};
// What a thread has of two tokens, rows g and g + 8 of its warp's 16.
struct Rows {
    u32 values[STEPS][4];      // dy, or v, as A
#if KEYS
    f32 dv[VALUES / 2];
#endif
};

// Begins H of N / 8 feature blocks from `at` on.
template <int N> DEV void begin(f32 (&h)[N / 2], const Rows& rows, u32 at) {
    mma_fence();
    First<N>::run(h, rows.values[0][0], rows.values[0][1], rows.values[0][2], rows.values[0][3], descriptor(at, 128, BLOCK_BYTES));
#pragma unroll
    for (int s = 1; s < STEPS; s++)
        Mma<N>::template run<0>(h, rows.values[s][0], rows.values[s][1], rows.values[s][2], rows.values[s][3], descriptor(at + s * 256, 128, BLOCK_BYTES));
#if KEYS
    // And a one, which is column D_VALUE.
    const u32 one = (threadIdx.x & 3) == D_VALUE % 8 / 2 ? (D_VALUE % 2 ? 0x3f800000u : 0x3f80u) : 0u;
    Mma<N>::template run<0>(h, one, one, 0u, 0u, descriptor(at + D_VALUE / 8 * 128, 0, BLOCK_BYTES));
#endif
}
#if KEYS
// dv of two feature blocks.
DEV void add_values(Rows& rows, const A& a, u32 at) {
    Mma<VALUES>::template run<1>(rows.dv, a.a[0], a.a[1], a.a[2], a.a[3], descriptor(at, BLOCK_BYTES, 128));
}
#endif
template <int N> DEV void finish(f32 (&h)[N], Rows& rows) {
    mma_commit();
    mma_wait<0>();
    mma_touch(h);
#if KEYS
    mma_touch(rows.dv);
#endif
}

DEV f32 quad_sum(f32 x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}
// Sums over the four lanes of a quad of 8 numbers, two of which each lane keeps: 2m and 2m + 1.
DEV float2 scatter(const f32 (&x)[8]) {
    const int m = threadIdx.x & 3;
    f32 four[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const f32 keep = m & 2 ? x[i + 4] : x[i], give = m & 2 ? x[i] : x[i + 4];
        four[i] = keep + __shfl_xor_sync(~0u, give, 2);
    }
    f32 two[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const f32 keep = m & 1 ? four[i + 2] : four[i], give = m & 1 ? four[i] : four[i + 2];
        two[i] = keep + __shfl_xor_sync(~0u, give, 1);
    }
    return make_float2(two[0], two[1]);
}
DEV void add_to(f32* to, f32 x, f32 y) {
    float2 own = *reinterpret_cast<const float2*>(to);
    own.x += x, own.y += y;
    *reinterpret_cast<float2*>(to) = own;
}
DEV void load8(f32 (&x)[8], const f32* from) {
    const float4 a = load4(from), b = load4(from + 4);
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}

// Features x_i x_j times block c, for one x_i and some j, of one row: what their H adds to the derivatives.
//
//     t_c = sum_j H_jc x_j,   dx_j += x_i sum_c H_jc x_c,   dx_c += x_i t_c,   dx_i += sum_c t_c x_c
struct Run {
    f32 t0, t1;
    DEV_MEMBER void begin() { t0 = t1 = 0.f; }
    DEV_MEMBER void add(f32 h0, f32 h1, f32 xi, f32 xj, float2 xc, f32& dj) {
        t0 = fmaf(h0, xj, t0);
        t1 = fmaf(h1, xj, t1);
        dj = fmaf(fmaf(h0, xc.x, h1 * xc.y), xi, dj);
    }
    DEV_MEMBER void end(f32 xi, float2 xc, f32 (&dc)[2], f32& di) {
        dc[0] = fmaf(t0, xi, dc[0]);
        dc[1] = fmaf(t1, xi, dc[1]);
        di = fmaf(t0, xc.x, fmaf(t1, xc.y, di));
    }
};
#if KEYS
// x_j times block c of each row, rounded, of which a feature is one more product.
struct Products {
    u32 x[2][8];
    DEV_MEMBER void make(const f32 (&xj)[2][8], const float2 (&xc)[2]) {
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int j = 0; j < 8; j++) x[r][j] = pack2(xj[r][j] * xc[r].x, xj[r][j] * xc[r].y);
    }
};
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 1) matrix_backward_far(const __grid_constant__ Far far) {
    DYNAMIC_SHARED(memory);
    Shared& room = *reinterpret_cast<Shared*>(memory);
    const Backward& p = far.b;
    UNIT(u, p.first_unit + blockIdx.z);
    const i64 chunk = blockIdx.y, tiles = (p.far_tokens + ROWS - 1) / ROWS;
    const i64 head = blockIdx.x / tiles, own = blockIdx.x % tiles * ROWS;
    i64 first, end;
    int place;
#if KEYS
    if (chunk >= u.s.folds) return;
    first = fold_of(p, u, chunk) + own, end = fold_of(p, u, chunk + 1);
    place = int(gridDim.y) - 1 - int(chunk);
    // Nothing comes after: the consumer is told zeros.
    const bool nothing = place == 0;
#else
    if (chunk >= u.s.reads) return;
    const Read read = p.reads[u.s.reads_at + chunk];
    first = read.first + own, end = read.end;
    place = int(chunk);
    f64 mark;
    const bool nothing = !mark_of(u, fold_of_read(p, u, chunk), mark);
#endif
    if (first >= end) return;
    const int count = int(min(end - first, i64(ROWS)));
    constexpr int FAR_ROWS = KEYS ? D_KEY + 1 + D_VALUE : 2 * D_KEY + 2;
    f32* const out = far_of(p, 0, blockIdx.z, KEYS ? 0 : head, chunk, FAR_ROWS) + own;
    if (nothing) {
        for (int i = threadIdx.x; i < FAR_ROWS * ROWS; i += THREADS)
            if (i % ROWS < count) out[i / ROWS * p.far_tokens + i % ROWS] = 0;
        return;
    }
    const u32 base = smem(&room.stages), bars = smem(&room.bars);
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, m = lane & 3;
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            barrier_init(bars + 8 * s, 1);
            barrier_init(bars + 8 * (STAGES + s), READERS);
        }
        barrier_init_done();
    }
    __syncthreads();
    if (warp >= READERS * 4) {
        role_copies<READERS>();
        if (warp == READERS * 4 && lane == 0) {
            int stage = 0;
            u32 phase = 1;
            auto send = [&](const char*& from, u32 bytes) {
                barrier_wait(bars + 8 * (STAGES + stage), phase);
                barrier_expect(bars + 8 * stage, bytes);
                copy_bulk(base + stage * STAGE_BYTES, from, bytes, bars + 8 * stage);
                from += bytes;
                if (++stage == STAGES) {
                    stage = 0;
                    phase ^= 1;
                }
            };
            const i64 at = i64(blockIdx.z) * far.places + place;
            const char* s = reinterpret_cast<const char*>(far.sums + at * (BLOCKS * 8 * NP));
            for (int t = 0; t < T_SLABS; t++) send(s, T_STEPS * STEP_BYTES);
            for (int t = 0; t < R_SLABS; t++) send(s, 8 * STEP_BYTES);
            for (int t = 0; t < Q_SLABS; t++) send(s, 4 * STEP_BYTES);
            for (int t = 0; t < STEPS_L; t++) send(s, STEP_BYTES);
            if (!KEYS) {
                s = reinterpret_cast<const char*>(far.slopes + at * (SLOPES * 8 * D_KEY));
                for (int t = 0; t < SLOPE_Q / 8; t++) send(s, 64 * D_KEY * 2);
                for (int t = 0; t < SLOPE_L / 2 + 1; t++) send(s, 16 * D_KEY * 2);
            }
        }
        return;
    }
    role_multiplies<READERS>();
    Ring ring{base, bars, 0, 0};
    // Rows g and g + 8 of the warp's 16.
    const int top = warp * 16 + g;
    f32* const x0 = room.x + top * PITCH;
    f32* const dx0 = room.dx + top * PITCH;
    Rows rows;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const i64 t = first + min(top + 8 * r, count - 1);
#if KEYS
        const bf16* const x = row<bf16>(p.k, u.s.k_batch, u.head, u.s.k_first + t - u.s.open);
        const bf16* const v = row<bf16>(p.v, u.s.k_batch, u.head, u.s.k_first + t - u.s.open);
#else
        const bf16* const x = row<bf16>(p.q, u.s.q_batch, u.head * p.group + head, u.s.q_first + t);
        const bf16* const v = row<bf16>(p.dy, u.s.q_batch, u.head * p.group + head, u.s.q_first + t);
#endif
#pragma unroll
        for (int c = 0; c < NB; c++) {
            const u32 w = *reinterpret_cast<const u32*>(x + 8 * c + 2 * m);
            *reinterpret_cast<float2*>(x0 + 8 * r * PITCH + 8 * c + 2 * m) = make_float2(__uint_as_float(w << 16), __uint_as_float(w & 0xffff0000u));
            *reinterpret_cast<float2*>(dx0 + 8 * r * PITCH + 8 * c + 2 * m) = make_float2(0.f, 0.f);
        }
#pragma unroll
        for (int s = 0; s < 2 * STEPS; s++)
            rows.values[s / 2][r + s % 2 * 2] = 8 * s < D_VALUE ? *reinterpret_cast<const u32*>(v + 8 * s + 2 * m) : 0u;
    }
#if KEYS
#pragma unroll
    for (int i = 0; i < VALUES / 2; i++) rows.dv[i] = 0.f;
#endif
    __syncwarp();
    auto pair_at = [&](int r, int c) { return *reinterpret_cast<const float2*>(x0 + 8 * r * PITCH + 8 * c + 2 * m); };
    // x.dx over the lane's own elements.
    auto euler = [&](f32 (&sum)[2]) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            sum[r] = 0.f;
#pragma unroll
            for (int c = 0; c < NB; c++) {
                const float2 x = pair_at(r, c), dx = *reinterpret_cast<const float2*>(dx0 + 8 * r * PITCH + 8 * c + 2 * m);
                sum[r] = fmaf(x.x, dx.x, fmaf(x.y, dx.y, sum[r]));
            }
        }
    };
    f32 dot[2] = {0.f, 0.f}, before[2] = {0.f, 0.f};

    if constexpr (HAS3) {
        constexpr Pairs P;
#pragma unroll 1
        for (int a = 0; a < NB; a++) {
            f32 xa[2][8], da[2][8];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                load8(xa[r], x0 + 8 * r * PITCH + 8 * a);
#pragma unroll
                for (int i = 0; i < 8; i++) da[r][i] = 0.f;
            }
#pragma unroll 1
            for (int c = 0; c < NB; c++) {
                const float2 xc[2] = {pair_at(0, c), pair_at(1, c)};
                f32 dc[2][2] = {};
                Run run[2];
#if KEYS
                Products products;
                products.make(xa, xc);
#endif
#pragma unroll
                for (int slab = 0; slab < 18 / T_STEPS; slab++) {
                    const u32 at = ring.acquire();
#pragma unroll
                    for (int s = 0; s < 3; s++) {
                        constexpr int N = T_AT_ONCE;
                        f32 h[4 * N];
#if KEYS
                        A steps[N / 2];
#pragma unroll
                        for (int k = 0; k < N; k++) {
                            const int e = (3 * slab + s) * N + k;
#pragma unroll
                            for (int r = 0; r < 2; r++) {
                                const f32 xi = xa[r][P.i[e]];
                                steps[k / 2].a[k % 2 * 2 + r] = mul2(pack2(xi, xi), products.x[r][P.j[e]]);
                            }
                        }
#endif
                        begin<8 * N>(h, rows, at + s * N * BLOCK_BYTES);
#if KEYS
#pragma unroll
                        for (int k = 0; k < N / 2; k++) add_values(rows, steps[k], at + (s * N + 2 * k) * BLOCK_BYTES);
#endif
                        finish(h, rows);
#pragma unroll
                        for (int k = 0; k < N; k++) {
                            const int e = (3 * slab + s) * N + k, i = P.i[e], j = P.j[e];
#pragma unroll
                            for (int r = 0; r < 2; r++) {
                                if (j == i) run[r].begin();
                                run[r].add(h[4 * k + 2 * r], h[4 * k + 2 * r + 1], xa[r][i], xa[r][j], xc[r], da[r][j]);
                                if (j == 7) run[r].end(xa[r][i], xc[r], dc[r], da[r][i]);
                            }
                        }
                    }
                    ring.release();
                }
#pragma unroll
                for (int r = 0; r < 2; r++) add_to(dx0 + 8 * r * PITCH + 8 * c + 2 * m, dc[r][0], dc[r][1]);
            }
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const float2 sum = scatter(da[r]);
                add_to(dx0 + 8 * r * PITCH + 8 * a + 2 * m, sum.x, sum.y);
            }
        }
#pragma unroll 1
        for (int block = 1; block < NB; block++)
#pragma unroll 1
            for (int c = block + 1; c < NB; c++) {
                f32 xb[2][8], db[2][8];
                const float2 xc[2] = {pair_at(0, c), pair_at(1, c)};
                f32 dc[2][2] = {};
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    load8(xb[r], x0 + 8 * r * PITCH + 8 * block);
#pragma unroll
                    for (int i = 0; i < 8; i++) db[r][i] = 0.f;
                }
#if KEYS
                Products products;
                products.make(xb, xc);
#endif
#pragma unroll 1
                for (int i = 0; i < 8 * block; i += 2) {
                    const u32 at = ring.acquire();
                    f32 di[2][2] = {};
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const f32 xi[2] = {x0[i + e], x0[8 * PITCH + i + e]};
                        Run run[2];
                        run[0].begin();
                        run[1].begin();
#pragma unroll
                        for (int part = 0; part < 8; part += R_AT_ONCE) {
                            constexpr int N = R_AT_ONCE;
                            const u32 from = at + (e * 8 + part) * BLOCK_BYTES;
                            f32 h[4 * N];
#if KEYS
                            A steps[N / 2];
#pragma unroll
                            for (int k = 0; k < N; k++)
#pragma unroll
                                for (int r = 0; r < 2; r++) steps[k / 2].a[k % 2 * 2 + r] = mul2(pack2(xi[r], xi[r]), products.x[r][part + k]);
#endif
                            begin<8 * N>(h, rows, from);
#if KEYS
#pragma unroll
                            for (int k = 0; k < N / 2; k++) add_values(rows, steps[k], from + 2 * k * BLOCK_BYTES);
#endif
                            finish(h, rows);
#pragma unroll
                            for (int k = 0; k < N; k++)
#pragma unroll
                                for (int r = 0; r < 2; r++)
                                    run[r].add(h[4 * k + 2 * r], h[4 * k + 2 * r + 1], xi[r], xb[r][part + k], xc[r], db[r][part + k]);
                        }
#pragma unroll
                        for (int r = 0; r < 2; r++) run[r].end(xi[r], xc[r], dc[r], di[r][e]);
                    }
                    ring.release();
#pragma unroll
                    for (int r = 0; r < 2; r++) {
                        const f32 one = quad_sum(di[r][0]), two = quad_sum(di[r][1]);
                        if (m == i % 8 / 2) add_to(dx0 + 8 * r * PITCH + i, one, two);
                    }
                }
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const float2 sum = scatter(db[r]);
                    add_to(dx0 + 8 * r * PITCH + 8 * block + 2 * m, sum.x, sum.y);
                    add_to(dx0 + 8 * r * PITCH + 8 * c + 2 * m, dc[r][0], dc[r][1]);
                }
            }
        euler(before);
#pragma unroll
        for (int r = 0; r < 2; r++) dot[r] += before[r] * (1.f / 3);
    }
    if constexpr (HAS2) {
#pragma unroll 1
        for (int block = 0; block < NB; block++) {
            f32 xb[2][8], db[2][8];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                load8(xb[r], x0 + 8 * r * PITCH + 8 * block);
#pragma unroll
                for (int i = 0; i < 8; i++) db[r][i] = 0.f;
            }
#pragma unroll 1
            for (int c = block; c < NB; c++) {
                const float2 xc[2] = {pair_at(0, c), pair_at(1, c)};
                f32 dc[2][2] = {};
                const u32 at = ring.acquire();
                f32 h[32];
#if KEYS
                A steps[4];
#pragma unroll
                for (int k = 0; k < 8; k++)
#pragma unroll
                    for (int r = 0; r < 2; r++) steps[k / 2].a[k % 2 * 2 + r] = pack2(xb[r][k] * xc[r].x, xb[r][k] * xc[r].y);
#endif
                begin<64>(h, rows, at);
#if KEYS
#pragma unroll
                for (int k = 0; k < 4; k++) add_values(rows, steps[k], at + 2 * k * BLOCK_BYTES);
#endif
                finish(h, rows);
                ring.release();
#pragma unroll
                for (int k = 0; k < 8; k++)
#pragma unroll
                    for (int r = 0; r < 2; r++) {
                        const f32 h0 = h[4 * k + 2 * r], h1 = h[4 * k + 2 * r + 1];
                        dc[r][0] = fmaf(h0, xb[r][k], dc[r][0]);
                        dc[r][1] = fmaf(h1, xb[r][k], dc[r][1]);
                        db[r][k] = fmaf(h0, xc[r].x, fmaf(h1, xc[r].y, db[r][k]));
                    }
#pragma unroll
                for (int r = 0; r < 2; r++) add_to(dx0 + 8 * r * PITCH + 8 * c + 2 * m, dc[r][0], dc[r][1]);
            }
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const float2 sum = scatter(db[r]);
                add_to(dx0 + 8 * r * PITCH + 8 * block + 2 * m, sum.x, sum.y);
            }
        }
        f32 now[2];
        euler(now);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            dot[r] += (now[r] - before[r]) * 0.5f;
            before[r] = now[r];
        }
    }
    // Blocks of order 1, then that of order 0.
#pragma unroll 1
    for (int s = 0; s < STEPS_L; s++) {
        const u32 at = ring.acquire();
        f32 h[8];
#if KEYS
        A step;
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const int block = 2 * s + k;
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const float2 x = pair_at(r, HAS1 ? min(block, NB - 1) : 0);
                step.a[k * 2 + r] = HAS1 && block < NB ? pack2(x.x, x.y) : block < L_BLOCKS && m == 0 ? 0x3f80u : 0u;
            }
        }
#endif
        begin<16>(h, rows, at);
#if KEYS
        add_values(rows, step, at);
#endif
        finish(h, rows);
        ring.release();
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const int block = 2 * s + k;
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const f32 h0 = h[4 * k + 2 * r], h1 = h[4 * k + 2 * r + 1];
                if (HAS1 && block < NB) add_to(dx0 + 8 * r * PITCH + 8 * block + 2 * m, h0, h1);
                else if (block < L_BLOCKS && m == 0) dot[r] += h0;
            }
        }
    }
    {
        f32 now[2];
        euler(now);
#pragma unroll
        for (int r = 0; r < 2; r++) dot[r] = quad_sum(dot[r] + (now[r] - before[r]));
    }

    // Rows of what is left: elements (divided by the scale of queries), and what is summed.
    const f32 factor = KEYS ? 1.f : 1.f / p.scale;
    auto put = [&](int column, int r, f32 x) {
        if (top + 8 * r < count) out[column * p.far_tokens + top + 8 * r] = x;
    };
#pragma unroll
    for (int r = 0; r < 2; r++) {
#pragma unroll
        for (int c = 0; c < NB; c++) {
            const float2 dx = *reinterpret_cast<const float2*>(dx0 + 8 * r * PITCH + 8 * c + 2 * m);
            put(8 * c + 2 * m, r, factor * dx.x);
            put(8 * c + 2 * m + 1, r, factor * dx.y);
        }
        if (m == 0) put(KEYS ? D_KEY : 2 * D_KEY, r, dot[r]);
    }
#if KEYS
#pragma unroll
    for (int j = 0; j < VALUES / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            if (8 * j + 2 * m + e % 2 < D_VALUE) put(D_KEY + 1 + 8 * j + 2 * m + e % 2, e / 2, rows.dv[4 * j + e]);
#else
    // Sums of ones.
    f32 z[D_KEY / 2];
#pragma unroll
    for (int i = 0; i < D_KEY / 2; i++) z[i] = 0.f;
    auto add = [&](const A& a, u32 at) { Mma<D_KEY>::template run<1>(z, a.a[0], a.a[1], a.a[2], a.a[3], descriptor(at, D_KEY * 16, 128)); };
    auto settle = [&]() {
        mma_commit();
        mma_wait<0>();
        mma_touch(z);
    };
    auto of_z = [&](f32 (&sum)[2]) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            sum[r] = 0.f;
#pragma unroll
            for (int c = 0; c < NB; c++) {
                const float2 x = pair_at(r, c);
                sum[r] = fmaf(x.x, z[4 * c + 2 * r], fmaf(x.y, z[4 * c + 2 * r + 1], sum[r]));
            }
        }
    };
    f32 den[2] = {0.f, 0.f};
    before[0] = before[1] = 0.f;
    if constexpr (HAS3) {
#pragma unroll 1
        for (int block = 0; block < NB; block++) {
            f32 xb[2][8];
#pragma unroll
            for (int r = 0; r < 2; r++) load8(xb[r], x0 + 8 * r * PITCH + 8 * block);
#pragma unroll 1
            for (int c = block; c < NB; c++) {
                const float2 xc[2] = {pair_at(0, c), pair_at(1, c)};
                const u32 at = ring.acquire();
                A steps[4];
#pragma unroll
                for (int k = 0; k < 8; k++)
#pragma unroll
                    for (int r = 0; r < 2; r++) steps[k / 2].a[k % 2 * 2 + r] = pack2(xb[r][k] * xc[r].x, xb[r][k] * xc[r].y);
                mma_fence();
#pragma unroll
                for (int k = 0; k < 4; k++) add(steps[k], at + k * 16 * D_KEY * 2);
                settle();
                ring.release();
            }
        }
        of_z(before);
#pragma unroll
        for (int r = 0; r < 2; r++) den[r] += before[r] * (1.f / 3);
    }
#pragma unroll 1
    for (int s = 0; s < SLOPE_L / 2; s++) {
        const u32 at = ring.acquire();
        A step;
#pragma unroll
        for (int k = 0; k < 2; k++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const float2 x = pair_at(r, min(2 * s + k, NB - 1));
                step.a[k * 2 + r] = 2 * s + k < NB ? pack2(x.x, x.y) : 0u;
            }
        mma_fence();
        add(step, at);
        settle();
        ring.release();
    }
    {
        f32 now[2];
        of_z(now);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            den[r] += (now[r] - before[r]) * 0.5f;
            before[r] = now[r];
        }
    }
    {
        const u32 at = ring.acquire();
        // One feature, 1; in the second block's first row the sum of ones itself.
        const A step = {{m == 0 ? 0x3f80u : 0u, m == 0 ? 0x3f80u : 0u, 0u, 0u}};
        mma_fence();
        add(step, at);
        settle();
        const u16 ones = *reinterpret_cast<const u16*>(memory + (at - base) + D_KEY * 16);
        f32 now[2];
        of_z(now);
#pragma unroll
        for (int r = 0; r < 2; r++) den[r] = quad_sum(den[r] + (now[r] - before[r])) + of_bf16(ones);
        ring.release();
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
#pragma unroll
        for (int c = 0; c < NB; c++) {
            put(D_KEY + 8 * c + 2 * m, r, factor * z[4 * c + 2 * r]);
            put(D_KEY + 8 * c + 2 * m + 1, r, factor * z[4 * c + 2 * r + 1]);
        }
        if (m == 0) put(2 * D_KEY + 1, r, den[r]);
    }
#endif
}
