// Norms of the queries and keys of a packed projection, and their rotation.
//
// x, y, dy, dx bf16 [rows][width]: queries, keys, then what stays as it is; weights f32 [D]. Sums of the weights'
// gradients go to parts f32 [2][blocks][D]: queries', then keys'. A thread takes a head of a row. Blocks: y = 0
// queries, 1 keys, 2 the rest, eight elements a thread. Rotation: a thread an element, table f32 [tokens][D/2][2],
// cosine and sine.
#include "prelude.cuh"

struct HeadNorm {
    const bf16* x;
    const f32* q_weight;
    const f32* k_weight;
    const bf16* dy;
    bf16* y;
    bf16* dx;
    f32* parts;
    i64 rows;
    i32 heads, kv_heads, width;
    f32 eps;
};
SAME_SIZE(HeadNorm, HEAD_NORM_BYTES);

struct Rotate {
    const bf16* x;
    const f32* table;
    bf16* y;
    i64 rows, tokens;
    i32 heads, width;
    f32 sign;
    i32 padding;
};
SAME_SIZE(Rotate, ROTATE_BYTES);

// Eight elements from an address aligned to 16 bytes.
DEVICE void load8(const bf16* p, f32* x) {
    const uint4 v = *reinterpret_cast<const uint4*>(p);
    const u32 w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x[2 * i] = __uint_as_float(w[i] << 16);
        x[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
    }
}
DEVICE void store8(bf16* p, const f32* x) {
    *reinterpret_cast<uint4*>(p) =
        make_uint4(bf16x2_bits(x[0], x[1]), bf16x2_bits(x[2], x[3]), bf16x2_bits(x[4], x[5]), bf16x2_bits(x[6], x[7]));
}

DEVICE f32 inverse(const f32* x, f32 eps) {
    f32 sum = 0.0f;
#pragma unroll
    for (int i = 0; i < D; i++) sum = fmaf(x[i], x[i], sum);
    return 1.0f / sqrtf(sum / f32(D) + eps);
}

// What a block has to do: items (rows times heads) and where an item's elements are.
struct Share {
    int heads, first, size;
};
template <class P>
DEVICE Share share(const P& p) {
    const int normed = (p.heads + p.kv_heads) * D;
    if (blockIdx.y == 0) return Share{p.heads, 0, D};
    if (blockIdx.y == 1) return Share{p.kv_heads, p.heads * D, D};
    return Share{(p.width - normed) / 8, normed, 8};
}

extern "C" __global__ void __launch_bounds__(256) head_norm(const __grid_constant__ HeadNorm p) {
    const Share s = share(p);
    const i64 items = p.rows * s.heads;
    const f32* weight = blockIdx.y == 0 ? p.q_weight : p.k_weight;
    for (i64 item = i64(blockIdx.x) * 256 + threadIdx.x; item < items; item += i64(gridDim.x) * 256) {
        const i64 at = item / s.heads * p.width + s.first + item % s.heads * s.size;
        f32 x[D];
        if (blockIdx.y == 2) {
            load8(p.x + at, x);
            store8(p.y + at, x);
            continue;
        }
#pragma unroll
        for (int i = 0; i < D; i += 8) load8(p.x + at + i, x + i);
        const f32 r = inverse(x, p.eps);
#pragma unroll
        for (int i = 0; i < D; i++) x[i] = x[i] * r * weight[i];
#pragma unroll
        for (int i = 0; i < D; i += 8) store8(p.y + at + i, x + i);
    }
}

extern "C" __global__ void __launch_bounds__(256) head_norm_back(const __grid_constant__ HeadNorm p) {
    __shared__ f32 of_warps[8][D];
    const Share s = share(p);
    const i64 items = p.rows * s.heads;
    const f32* weight = blockIdx.y == 0 ? p.q_weight : p.k_weight;
    f32 sums[D] = {};
    for (i64 item = i64(blockIdx.x) * 256 + threadIdx.x; item < items; item += i64(gridDim.x) * 256) {
        const i64 at = item / s.heads * p.width + s.first + item % s.heads * s.size;
        f32 x[D], dy[D];
        if (blockIdx.y == 2) {
            load8(p.dy + at, x);
            store8(p.dx + at, x);
            continue;
        }
#pragma unroll
        for (int i = 0; i < D; i += 8) {
            load8(p.x + at + i, x + i);
            load8(p.dy + at + i, dy + i);
        }
        const f32 r = inverse(x, p.eps);
        f32 dot = 0.0f;
#pragma unroll
        for (int i = 0; i < D; i++) dot = fmaf(dy[i] * weight[i], x[i], dot);
        const f32 back = dot / f32(D) * r * r * r;
#pragma unroll
        for (int i = 0; i < D; i++) {
            sums[i] = fmaf(dy[i] * r, x[i], sums[i]);
            dy[i] = dy[i] * weight[i] * r - x[i] * back;
        }
#pragma unroll
        for (int i = 0; i < D; i += 8) store8(p.dx + at + i, dy + i);
    }
    if (blockIdx.y == 2) return;
#pragma unroll
    for (int i = 0; i < D; i++) {
        const f32 sum = warp_sum(sums[i]);
        if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32][i] = sum;
    }
    __syncthreads();
    for (int i = int(threadIdx.x); i < D; i += 256) {
        f32 sum = 0.0f;
        for (int w = 0; w < 8; w++) sum += of_warps[w][i];
        p.parts[(i64(blockIdx.y) * gridDim.x + blockIdx.x) * D + i] = sum;
    }
}

extern "C" __global__ void __launch_bounds__(256) rotate(const __grid_constant__ Rotate p) {
    const i64 all = p.rows * p.width;
    for (i64 at = i64(blockIdx.x) * 256 + threadIdx.x; at < all; at += i64(gridDim.x) * 256) {
        const int c = int(at % p.width), i = c % D;
        if (c >= p.heads * D) {
            p.y[at] = p.x[at];
            continue;
        }
        const i64 token = at / p.width % p.tokens;
        const f32* turn = p.table + (token * (D / 2) + i % (D / 2)) * 2;
        const f32 x = to_f32(p.x[at]), sine = p.sign * turn[1];
        const f32 y = i < D / 2 ? x * turn[0] - to_f32(p.x[at + D / 2]) * sine
                                : x * turn[0] + to_f32(p.x[at - D / 2]) * sine;
        p.y[at] = from_f32<bf16>(y);
    }
}
