// y = value, or y += by · x: the smallest kernels, to try a device with.
//
// Shapes: x, y [count] of NUMBER (f32, bf16, f16), contiguous.
// Bytes: count · 2 or 4 written (fill); as many twice read and once written (add_scaled).
// FLOPs: 2 · count (add_scaled).
#include "prelude.cuh"

typedef NUMBER E;

struct Fill {
    void* y;
    const void* x;
    i64 count;
    f32 value;
};
SAME_SIZE(Fill, FILL_BYTES);

extern "C" __global__ void __launch_bounds__(256) fill(const __grid_constant__ Fill p) {
    i64 i = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < p.count) static_cast<E*>(p.y)[i] = from_f32<E>(p.value);
}

extern "C" __global__ void __launch_bounds__(256) add_scaled(const __grid_constant__ Fill p) {
    i64 i = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= p.count) return;
    E* y = static_cast<E*>(p.y) + i;
    *y = from_f32<E>(fmaf(p.value, to_f32(static_cast<const E*>(p.x)[i]), to_f32(*y)));
}
