// What is done element by element: SwiGLU, forget gates, casts; and sums over rows.
//
// swiglu: x, dx bf16 [rows][2n], y, dy bf16 [rows][n], n a multiple of 4; a thread 4 elements.
// gates: logits and logs f32 [rows][n], bias f32 [n], dlogits bf16; bias' gradient to parts f32 [blocks][n]; n at most 256.
// to_bf16: x f32 [rows], y bf16. columns: parts f32 [rows][n] to sums f32 [n], 32 columns a block.
#include "prelude.cuh"

struct Rows {
    const void* x;
    const f32* bias;
    const void* dy;
    void* y;
    void* dx;
    f32* parts;
    i64 rows;
    i64 n;
};
SAME_SIZE(Rows, ROWS_BYTES);

DEVICE f32 sigmoid(f32 x) {
    const f32 e = expf(-fabsf(x));
    return (x >= 0.0f ? 1.0f : e) / (1.0f + e);
}

extern "C" __global__ void __launch_bounds__(256) swiglu(const __grid_constant__ Rows p) {
    const i64 fours = p.n / 4, all = p.rows * fours;
    for (i64 item = i64(blockIdx.x) * 256 + threadIdx.x; item < all; item += i64(gridDim.x) * 256) {
        const i64 row = item / fours, c = item % fours * 4;
        const bf16* x = static_cast<const bf16*>(p.x) + row * 2 * p.n + c;
        const float4 a = load4(x), b = load4(x + p.n);
        store4(static_cast<bf16*>(p.y) + row * p.n + c,
               make_float4(a.x * sigmoid(a.x) * b.x, a.y * sigmoid(a.y) * b.y, a.z * sigmoid(a.z) * b.z,
                           a.w * sigmoid(a.w) * b.w));
    }
}

DEVICE void swiglu_back_one(f32 a, f32 b, f32 dy, f32& da, f32& db) {
    const f32 s = sigmoid(a);
    db = dy * a * s;
    da = dy * b * s * (1.0f + a * (1.0f - s));
}

extern "C" __global__ void __launch_bounds__(256) swiglu_back(const __grid_constant__ Rows p) {
    const i64 fours = p.n / 4, all = p.rows * fours;
    for (i64 item = i64(blockIdx.x) * 256 + threadIdx.x; item < all; item += i64(gridDim.x) * 256) {
        const i64 row = item / fours, c = item % fours * 4;
        const bf16* x = static_cast<const bf16*>(p.x) + row * 2 * p.n + c;
        bf16* dx = static_cast<bf16*>(p.dx) + row * 2 * p.n + c;
        const float4 a = load4(x), b = load4(x + p.n), dy = load4(static_cast<const bf16*>(p.dy) + row * p.n + c);
        float4 da, db;
        swiglu_back_one(a.x, b.x, dy.x, da.x, db.x);
        swiglu_back_one(a.y, b.y, dy.y, da.y, db.y);
        swiglu_back_one(a.z, b.z, dy.z, da.z, db.z);
        swiglu_back_one(a.w, b.w, dy.w, da.w, db.w);
        store4(dx, da);
        store4(dx + p.n, db);
    }
}

// log sigmoid(x + bias), never above 0; NaN stays NaN.
extern "C" __global__ void __launch_bounds__(256) log_gates(const __grid_constant__ Rows p) {
    const f32* logits = static_cast<const f32*>(p.x);
    const i64 all = p.rows * p.n;
    for (i64 at = i64(blockIdx.x) * 256 + threadIdx.x; at < all; at += i64(gridDim.x) * 256) {
        const f32 x = logits[at] + p.bias[at % p.n];
        static_cast<f32*>(p.y)[at] = (x > 0.0f ? 0.0f : x) - log1pf(expf(-fabsf(x)));
    }
}

extern "C" __global__ void __launch_bounds__(256) log_gates_back(const __grid_constant__ Rows p) {
    __shared__ f32 sums[256];
    const f32* logits = static_cast<const f32*>(p.x);
    const int n = int(p.n), together = 256 / n, c = int(threadIdx.x) % n, first = int(threadIdx.x) / n;
    f32 sum = 0.0f;
    if (first < together) {
        for (i64 row = i64(blockIdx.x) * together + first; row < p.rows; row += i64(gridDim.x) * together) {
            const i64 at = row * n + c;
            const f32 dx = static_cast<const f32*>(p.dy)[at] * sigmoid(-(logits[at] + p.bias[c]));
            static_cast<bf16*>(p.dx)[at] = from_f32<bf16>(dx);
            sum += dx;
        }
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (int(threadIdx.x) < n) {
        f32 all = 0.0f;
        for (int i = 0; i < together; i++) all += sums[i * n + c];
        p.parts[i64(blockIdx.x) * n + c] = all;
    }
}

extern "C" __global__ void __launch_bounds__(256) to_bf16(const __grid_constant__ Rows p) {
    const f32* x = static_cast<const f32*>(p.x);
    for (i64 at = i64(blockIdx.x) * 256 + threadIdx.x; at < p.rows; at += i64(gridDim.x) * 256) {
        static_cast<bf16*>(p.y)[at] = from_f32<bf16>(x[at]);
    }
}

extern "C" __global__ void __launch_bounds__(256) columns(const __grid_constant__ Rows p) {
    __shared__ f32 sums[8][32];
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
    const i64 c = i64(blockIdx.x) * 32 + lane;
    const f32* x = static_cast<const f32*>(p.x);
    f32 sum = 0.0f;
    if (c < p.n) {
        for (i64 row = warp; row < p.rows; row += 8) sum += x[row * p.n + c];
    }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && c < p.n) {
        for (int w = 1; w < 8; w++) sum += sums[w][lane];
        static_cast<f32*>(p.y)[c] = sum;
    }
}
