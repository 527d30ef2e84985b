// Prepares tiles of 64 keys and values for the other Hopper kernels: the layouts that the matrix unit reads, a one beside
// each value, weights of decay (hopper.cuh describes the records).
//
// k, v [batch, kv heads, tokens, D_KEY or D_VALUE] bf16, strided; g f64 [batch][kv heads][tokens]
// Bytes per token: 2 (D_KEY + D_VALUE) read, TILE_BYTES / 64 + SUM_TILE_BYTES / 64 written; no FLOPs to speak of.
#include "hopper.cuh"

struct Prepare {
    View k, v;
    const double* g;
    const unsigned char* mask;  // [batch][tokens], 0 where a key is hidden, or null
    char* tiles;                // [kv head][tile]
    char* sum_tiles;            // the same, or null where nothing is summed
    const Sequence* sequences;
    const int2* items;          // sequence, tile
    i64 g_batch, g_head, mask_batch;
    int tile_count, chunk_tokens;
};

constexpr int PREPARE_THREADS = 128;

extern "C" __global__ void __launch_bounds__(PREPARE_THREADS) hopper_prepare(const __grid_constant__ Prepare p) {
    constexpr int KS = D_KEY + 8, VS = NP + 8;  // padded rows
    __shared__ __align__(16) u16 keys[KEY_TILE * KS], values[KEY_TILE * VS];
    __shared__ float fall[KEY_TILE], weight[KEY_TILE];
    __shared__ double ends[2];
    const int kv = blockIdx.y;
    const int2 item = p.items[blockIdx.x];
    const Sequence seq = p.sequences[item.x];
    const int first = item.y * KEY_TILE, count = min(KEY_TILE, seq.keys - first);
    const u16* const k = p.k.data + seq.batch * p.k.batch + kv * p.k.head + (seq.k_token + first) * p.k.token;
    const u16* const v = p.v.data + seq.batch * p.v.batch + kv * p.v.head + (seq.k_token + first) * p.v.token;
    auto live = [&](int t) { return t < count && (!p.mask || p.mask[seq.batch * p.mask_batch + seq.k_token + first + t]); };

    for (int e = threadIdx.x; e < KEY_TILE * NB; e += PREPARE_THREADS) {
        const int t = e / NB, c = e % NB;
        uint4 x = make_uint4(0, 0, 0, 0);
        if (live(t)) x = *(const uint4*)(k + t * p.k.token + 8 * c);
        *(uint4*)(keys + t * KS + 8 * c) = x;
    }
    for (int e = threadIdx.x; e < KEY_TILE * (NP / 8); e += PREPARE_THREADS) {
        const int t = e / (NP / 8), c = e % (NP / 8);
        uint4 x = make_uint4(0, 0, 0, 0);
        if (live(t)) {
            if (D_VALUE % 8 == 0 && 8 * c < D_VALUE) {
                x = *(const uint4*)(v + t * p.v.token + 8 * c);
            } else {
                u16 y[8];
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    const int col = 8 * c + i;
                    y[i] = col < D_VALUE ? v[t * p.v.token + col] : col == D_VALUE ? 0x3f80 : 0;
                }
                x = make_uint4(y[0] | y[1] << 16, y[2] | y[3] << 16, y[4] | y[5] << 16, y[6] | y[7] << 16);
            }
        }
        *(uint4*)(values + t * VS + 8 * c) = x;
    }
    if constexpr (HAS_G) {
        const double* const g = p.g + seq.batch * p.g_batch + kv * p.g_head + seq.k_token;
        if (threadIdx.x < KEY_TILE) {
            const int t = min((int)threadIdx.x, count - 1);
            const double end = g[first + count - 1];
            const int chunk_end = min((first / p.chunk_tokens + 1) * p.chunk_tokens, seq.keys) - 1;
            fall[threadIdx.x] = (float)(end - g[first + t]) * LOG2E;
            weight[threadIdx.x] = first + (int)threadIdx.x < seq.sinks ? 0.f : exp2_fast((float)(g[chunk_end] - g[first + t]) * LOG2E);
            ends[0] = end;
        }
    } else {
        if (threadIdx.x < KEY_TILE) weight[threadIdx.x] = first + (int)threadIdx.x < seq.sinks ? 0.f : 1.f;
    }
    __syncthreads();

    const i64 place = (i64)kv * p.tile_count + seq.tile + item.y;
    char* const record = p.tiles + place * TILE_BYTES;
    for (int e = threadIdx.x; e < KEY_TILE * (DQ / 8); e += PREPARE_THREADS) {
        const int t = e / (8 * (DQ / 8)) * 8 + e % 8, c = e / 8 % (DQ / 8);
        *(uint4*)(record + e * 16) = c < NB ? *(const uint4*)(keys + t * KS + 8 * c) : make_uint4(0, 0, 0, 0);
    }
    for (int e = threadIdx.x; e < KEY_TILE * (NP / 8); e += PREPARE_THREADS) {
        const int t = e / NP * 8 + e % 8, c = e / 8 % (NP / 8);
        *(uint4*)(record + KEY_BYTES + e * 16) = *(const uint4*)(values + t * VS + 8 * c);
    }
    if constexpr (HAS_G) {
        if (threadIdx.x < KEY_TILE) {
            ((float*)(record + META))[threadIdx.x] = fall[threadIdx.x];
            ((float*)(record + META))[KEY_TILE + threadIdx.x] = exp2_fast(fall[threadIdx.x]);
        }
        if (threadIdx.x == 0) *(double*)(record + META_END) = ends[0];
    }
    if (!p.sum_tiles) return;
    char* const sums = p.sum_tiles + place * SUM_TILE_BYTES;
    for (int e = threadIdx.x; e < 4 * (D_KEY + 1) * 8; e += PREPARE_THREADS) {
        const int slab = e / ((D_KEY + 1) * 8), row = e / 8 % (D_KEY + 1), w = e % 8;
        const int t = 16 * slab + 8 * (w & 1) + 2 * (w >> 1);
        ((u32*)sums)[e] = row < D_KEY ? keys[t * KS + row] | (u32)keys[(t + 1) * KS + row] << 16 : 0x3f803f80u;
    }
    for (int e = threadIdx.x; e < KEY_TILE * (NP / 8); e += PREPARE_THREADS) {
        const int t = e / NP * 8 + e % 8, c = e / 8 % (NP / 8);
        uint4 x = *(const uint4*)(values + t * VS + 8 * c);
        if (HAS_G || weight[t] == 0.f) {
            u32 y[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
            for (int i = 0; i < 4; i++) y[i] = pack2(of_bf16(y[i] & 0xffff) * weight[t], of_bf16(y[i] >> 16) * weight[t]);
            x = make_uint4(y[0], y[1], y[2], y[3]);
        }
        *(uint4*)(sums + 4 * SLAB_BYTES + e * 16) = x;
    }
}
