// AdamW over many parameters at once.
//
// Each part is a parameter's weights, gradient, first and second moments, f32 [n]; a block takes SHARE elements of one.
// squares: sums of squared gradients, f64, one for each block. gradient_norm: their sum to `norm` f64 [1].
// adamw: as of the mean of `batches` summed gradients, clipped to a norm; nothing changes when it is not finite.
// add_gradients: first moments' place holds sums, to which gradients are added.
#include "prelude.cuh"

struct Part {
    f32* weights;
    const f32* gradient;
    f32* first;
    f32* second;
    i64 n;
    i32 block;   // the first that works on it
    i32 decays;
};
struct Update {
    Part parts[PARTS];
    f64* sums;
    f64* norm;
    i32 count, block;  // block: the first of this launch among all
    i32 blocks;        // of all launches
    f32 each;          // 1 / batches
    f32 clip, beta1, beta2, keep, rate, root;
};
SAME_SIZE(Update, UPDATE_BYTES);

DEVICE const Part& part_of(const Update& p, int block) {
    int i = 0;
    while (i + 1 < p.count && p.parts[i + 1].block <= block) i++;
    return p.parts[i];
}

extern "C" __global__ void __launch_bounds__(256) squares(const __grid_constant__ Update p) {
    __shared__ f64 of_warps[8];
    const Part& part = part_of(p, int(blockIdx.x));
    const i64 first = i64(int(blockIdx.x) - part.block) * SHARE;
    f64 sum = 0.0;
    for (i64 i = first + threadIdx.x; i < first + SHARE && i < part.n; i += 256) {
        sum += f64(part.gradient[i]) * f64(part.gradient[i]);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int w = 1; w < 8; w++) sum += of_warps[w];
        p.sums[p.block + blockIdx.x] = sum;
    }
}

extern "C" __global__ void __launch_bounds__(256) gradient_norm(const __grid_constant__ Update p) {
    __shared__ f64 sums[256];
    f64 sum = 0.0;
    for (int i = int(threadIdx.x); i < p.blocks; i += 256) sum += p.sums[i];
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < 256; i++) sum += sums[i];
        p.norm[0] = sqrt(sum) * f64(p.each);
    }
}

extern "C" __global__ void __launch_bounds__(256) adamw(const __grid_constant__ Update p) {
    const f64 norm = p.norm[0];
    if (!(norm < 1e300)) return;
    const Part& part = part_of(p, int(blockIdx.x));
    const i64 begin = i64(int(blockIdx.x) - part.block) * SHARE;
    const f32 scale = norm > f64(p.clip) ? f32(f64(p.clip) / norm * f64(p.each)) : p.each;
    const f32 keep = part.decays ? p.keep : 1.0f;
    for (i64 i = begin + threadIdx.x; i < begin + SHARE && i < part.n; i += 256) {
        const f32 g = scale * part.gradient[i];
        const f32 m = p.beta1 * part.first[i] + (1.0f - p.beta1) * g;
        const f32 v = p.beta2 * part.second[i] + (1.0f - p.beta2) * (g * g);
        part.first[i] = m;
        part.second[i] = v;
        part.weights[i] = keep * part.weights[i] - p.rate * m / (sqrtf(v) * p.root + 1e-8f);
    }
}

extern "C" __global__ void __launch_bounds__(256) add_gradients(const __grid_constant__ Update p) {
    const Part& part = part_of(p, int(blockIdx.x));
    const i64 first = i64(int(blockIdx.x) - part.block) * SHARE;
    for (i64 i = first + threadIdx.x; i < first + SHARE && i < part.n; i += 256) part.first[i] += part.gradient[i];
}
