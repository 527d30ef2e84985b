// Root-mean-square norms over rows, forward and backward.
//
// x and dx f32 [rows][n], y and dy bf16 [rows][n], weight f32 [n]; sums of the weight's gradient, a row for each block,
// go to parts f32 [blocks][n]. Blocks: 8 warps, a row a warp, blocks that go on with other rows.
#include "prelude.cuh"

struct Norm {
    const f32* x;
    const f32* weight;
    const bf16* dy;
    bf16* y;
    f32* dx;
    f32* parts;
    i64 rows;
    i32 n;
    f32 eps;
};
SAME_SIZE(Norm, NORM_BYTES);

// 1 / sqrt(mean of squares + eps) of a row, in every lane.
DEVICE f32 inverse(const f32* x, int n, f32 eps, int lane) {
    f32 sum = 0.0f;
    for (int c = lane; c < n; c += 32) sum = fmaf(x[c], x[c], sum);
    return 1.0f / sqrtf(warp_sum(sum) / f32(n) + eps);
}

extern "C" __global__ void __launch_bounds__(256) rms_norm(const __grid_constant__ Norm p) {
    const int lane = int(threadIdx.x) % 32;
    for (i64 row = i64(blockIdx.x) * 8 + threadIdx.x / 32; row < p.rows; row += i64(gridDim.x) * 8) {
        const f32* x = p.x + row * p.n;
        const f32 r = inverse(x, p.n, p.eps, lane);
        bf16* y = p.y + row * p.n;
        for (int c = lane; c < p.n; c += 32) y[c] = from_f32<bf16>(x[c] * r * p.weight[c]);
    }
}

extern "C" __global__ void __launch_bounds__(256) rms_norm_back(const __grid_constant__ Norm p) {
    DYNAMIC_SHARED(shared);
    f32* sums = reinterpret_cast<f32*>(shared);  // [8][n], of each warp
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
    f32* own = sums + warp * p.n;
    for (int c = lane; c < p.n; c += 32) own[c] = 0.0f;
    for (i64 row = i64(blockIdx.x) * 8 + warp; row < p.rows; row += i64(gridDim.x) * 8) {
        const f32* x = p.x + row * p.n;
        const bf16* dy = p.dy + row * p.n;
        const f32 r = inverse(x, p.n, p.eps, lane);
        f32 dot = 0.0f;
        for (int c = lane; c < p.n; c += 32) dot = fmaf(to_f32(dy[c]) * p.weight[c], x[c], dot);
        const f32 back = warp_sum(dot) / f32(p.n) * r * r * r;
        f32* dx = p.dx + row * p.n;
        for (int c = lane; c < p.n; c += 32) {
            const f32 g = to_f32(dy[c]);
            dx[c] = g * p.weight[c] * r - x[c] * back;
            own[c] = fmaf(g * r, x[c], own[c]);
        }
    }
    __syncthreads();
    for (int c = int(threadIdx.x); c < p.n; c += 256) {
        f32 sum = 0.0f;
        for (int w = 0; w < 8; w++) sum += sums[w * p.n + c];
        p.parts[i64(blockIdx.x) * p.n + c] = sum;
    }
}
