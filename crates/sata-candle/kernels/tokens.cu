// The first and the last of a language model: rows of a table by token, and the loss of logits.
//
// embed: table f32 [vocab][n], tokens u32 [rows], y f32 [rows][n]. Its gradient: `order` lists the rows of each token,
// token by token, in segments [segments + 1] of at most SEGMENT rows; sums of segments parts f32 [segments][n], and the
// first segment of each token `firsts` [vocab + 1].
// losses: logits f32 [rows][vocab], targets u32 [rows], losses f32 [rows], and where wanted their gradient times `gain`
// bf16 [rows][vocab]. mean: f32 losses [rows] to one. A token that is not below vocab makes NaN.
#include "prelude.cuh"

struct Embed {
    const f32* table;
    const u32* tokens;
    const u32* order;
    const u32* segments;
    const u32* firsts;
    const f32* dy;
    f32* parts;
    f32* y;
    i64 rows, vocab, n;
};
SAME_SIZE(Embed, EMBED_BYTES);

struct Loss {
    const f32* logits;
    const u32* targets;
    f32* losses;
    bf16* gradient;
    i64 rows, vocab;
    f32 gain;
    i32 padding;
};
SAME_SIZE(Loss, LOSS_BYTES);

extern "C" __global__ void __launch_bounds__(256) embed(const __grid_constant__ Embed p) {
    const i64 all = p.rows * p.n;
    for (i64 at = i64(blockIdx.x) * 256 + threadIdx.x; at < all; at += i64(gridDim.x) * 256) {
        const i64 token = p.tokens[at / p.n];
        p.y[at] = token < p.vocab ? p.table[token * p.n + at % p.n] : NAN;
    }
}

extern "C" __global__ void __launch_bounds__(128) embed_segments(const __grid_constant__ Embed p) {
    const i64 segment = blockIdx.x;
    const u32 first = p.segments[segment], end = p.segments[segment + 1];
    for (i64 c = threadIdx.x; c < p.n; c += 128) {
        f32 sum = 0.0f;
#pragma unroll 4
        for (u32 i = first; i < end; i++) sum += p.dy[i64(p.order[i]) * p.n + c];
        p.parts[segment * p.n + c] = sum;
    }
}

extern "C" __global__ void __launch_bounds__(128) embed_tokens(const __grid_constant__ Embed p) {
    const i64 token = blockIdx.x;
    const u32 first = p.firsts[token], end = p.firsts[token + 1];
    for (i64 c = threadIdx.x; c < p.n; c += 128) {
        f32 sum = 0.0f;
#pragma unroll 4
        for (u32 i = first; i < end; i++) sum += p.parts[i64(i) * p.n + c];
        p.y[token * p.n + c] = sum;
    }
}

// Over the 256 threads of a block, the same in each.
DEVICE f32 block_sum(f32 x, f32* shared) {
    x = warp_sum(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0.0f;
    for (int i = 0; i < 8; i++) x += shared[i];
    return x;
}
DEVICE f32 block_max(f32 x, f32* shared) {
    x = warp_max(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    x = shared[0];
    for (int i = 1; i < 8; i++) x = fmaxf(x, shared[i]);
    return x;
}

extern "C" __global__ void __launch_bounds__(256) losses(const __grid_constant__ Loss p) {
    __shared__ f32 shared[8];
    for (i64 row = blockIdx.x; row < p.rows; row += gridDim.x) {
        const f32* x = p.logits + row * p.vocab;
        const i64 target = p.targets[row];
        f32 most = -INFINITY, sum = 0.0f;
        for (i64 c = threadIdx.x; c < p.vocab; c += 256) most = fmaxf(most, x[c]);
        most = block_max(most, shared);
        for (i64 c = threadIdx.x; c < p.vocab; c += 256) sum += expf(x[c] - most);
        sum = block_sum(sum, shared);
        if (threadIdx.x == 0) p.losses[row] = target < p.vocab ? logf(sum) - (x[target] - most) : NAN;
        if (p.gradient == nullptr) continue;
        bf16* dx = p.gradient + row * p.vocab;
        const f32 each = p.gain / sum;
        for (i64 c = threadIdx.x; c < p.vocab; c += 256) {
            dx[c] = from_f32<bf16>(expf(x[c] - most) * each - (c == target ? p.gain : 0.0f));
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) mean(const __grid_constant__ Loss p) {
    __shared__ f64 sums[256];
    f64 sum = 0.0;
    for (i64 row = threadIdx.x; row < p.rows; row += 256) sum += f64(p.logits[row]);
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < 256; i++) sum += sums[i];
        p.losses[0] = f32(sum / f64(p.rows));
    }
}
