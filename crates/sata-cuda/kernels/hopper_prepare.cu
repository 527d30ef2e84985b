// Prepares tiles of 64 keys and values for the other Hopper kernels: the layouts that the matrix unit reads, a one beside
// each value, weights of decay (hopper.cuh describes the records).
//
// k, v [batch, kv heads, tokens, D_KEY or D_VALUE] bf16, strided; g f64 [batch][kv heads][tokens]
// Bytes per token: 2 (D_KEY + D_VALUE) read, TILE_BYTES / 64 + SUM_TILE_BYTES / 64 written; no FLOPs to speak of.
#include "hopper.cuh"

struct Prepare {
    View k, v;
    const double* g;            // [kv head][works], counted from the window's start
    const unsigned char* live;  // [works]: 0 for a token that is not there; or null
    const float *sink_keys, *sink_values;  // [kv head][sink works][D_KEY or D_VALUE]
    const unsigned char* sink_live;
    const double* sink_g;
    const double* references;   // [kv head][chunk]: g that what precedes a chunk is relative to
    char* tiles;                // [kv head][tile]
    char* sum_tiles;            // the same
    const Sequence* sequences;
    const int2* items;          // sequence, tile; or -1 - sink tile
    i64 works, sink_works;
    int tile_count, chunk_count, chunk_tokens, first_head;
};

static_assert(sizeof(Prepare) == PREPARE_BYTES && TILE_BYTES == KEY_TILE_BYTES && SUM_TILE_BYTES == TOKEN_TILE_BYTES, "as in Rust");

constexpr int PREPARE_THREADS = 128;

extern "C" __global__ void __launch_bounds__(PREPARE_THREADS) hopper_prepare(const __grid_constant__ Prepare p) {
    constexpr int KS = D_KEY + 8, VS = NP + 8;  // padded rows
    __shared__ __align__(16) u16 keys[KEY_TILE * KS], values[KEY_TILE * VS];
    __shared__ float fall[KEY_TILE], weight[KEY_TILE];
    __shared__ double ends[1];
    const int local = blockIdx.y;
    const i64 head = p.first_head + local;
    const int2 item = p.items[blockIdx.x];
    const Sequence seq = p.sequences[item.x];
    const bool sinks = item.y < 0;
    const int tile = sinks ? -1 - item.y : item.y;
    const int first = tile * KEY_TILE, count = min(KEY_TILE, (sinks ? seq.sinks : seq.tokens) - first);
    const unsigned char* const flags = sinks ? p.sink_live + seq.sink + first : p.live ? p.live + seq.work + first : nullptr;
    auto live = [&](int t) { return t < count && (!flags || flags[t]); };

    for (int e = threadIdx.x; e < KEY_TILE * NB; e += PREPARE_THREADS) {
        const int t = e / NB, c = e % NB;
        uint4 x = make_uint4(0, 0, 0, 0);
        if (live(t)) {
            if (sinks) {
                const float* k = p.sink_keys + (head * p.sink_works + seq.sink + first + t) * D_KEY + 8 * c;
                x = make_uint4(pack2(k[0], k[1]), pack2(k[2], k[3]), pack2(k[4], k[5]), pack2(k[6], k[7]));
            } else {
                x = *(const uint4*)(p.k.data + seq.k_batch * p.k.batch + head * p.k.head + (seq.k_first + first + t) * p.k.token + 8 * c);
            }
        }
        *(uint4*)(keys + t * KS + 8 * c) = x;
    }
    for (int e = threadIdx.x; e < KEY_TILE * (NP / 8); e += PREPARE_THREADS) {
        const int t = e / (NP / 8), c = e % (NP / 8);
        uint4 x = make_uint4(0, 0, 0, 0);
        if (live(t)) {
            const u16* const v = p.v.data + seq.k_batch * p.v.batch + head * p.v.head + (seq.k_first + first + t) * p.v.token;
            const float* const s = p.sink_values + (head * p.sink_works + seq.sink + first + t) * D_VALUE;
            if (D_VALUE % 8 == 0 && 8 * c < D_VALUE && !sinks) {
                x = *(const uint4*)(v + 8 * c);
            } else {
                u32 y[8];
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    const int col = 8 * c + i;
                    y[i] = col < D_VALUE ? (sinks ? to_bf16(s[col]) : v[col]) : col == D_VALUE ? 0x3f80 : 0;
                }
                x = make_uint4(y[0] | y[1] << 16, y[2] | y[3] << 16, y[4] | y[5] << 16, y[6] | y[7] << 16);
            }
        }
        *(uint4*)(values + t * VS + 8 * c) = x;
    }
    const int chunk = first / p.chunk_tokens;
    if (threadIdx.x < KEY_TILE) {
        const int t = threadIdx.x;
        if constexpr (HAS_G) {
            const double* const g = sinks ? p.sink_g + head * p.sink_works + seq.sink : p.g + head * p.works + seq.work;
            // The last that is there, before which no key has faded less; of those after it nothing but g is read.
            int last = count - 1;
            while (last > 0 && !live(last)) last--;
            const double end = g[first + last], own = g[first + min(t, count - 1)];
            fall[t] = (float)(end - own) * LOG2E;
            ends[0] = end;
            weight[t] = 0.f;
            if (!sinks && first + t < seq.summed && live(t))
                weight[t] = exp2_fast((float)(p.references[(i64)local * p.chunk_count + seq.chunk + chunk + 1] - own) * LOG2E);
        } else {
            weight[t] = first + t < seq.summed ? 1.f : 0.f;
        }
    }
    __syncthreads();

    const i64 place = (i64)local * p.tile_count + (sinks ? seq.sink_tile : seq.tile) + tile;
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
            ((float*)(record + META))[KEY_TILE + threadIdx.x] = exp2_fast(fminf(fall[threadIdx.x], 0.f));
        }
        if (threadIdx.x == 0) *(double*)(record + META_END) = ends[0];
    }
    if (sinks || first >= seq.summed) return;
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

// What precedes each chunk is relative to g at the last of those tokens that is there, or at the last that the past summed.
struct References {
    const double* g;
    const int* last;            // [works]: tokens of the window up to the last that is there; or null: all are
    const Mark* marks;          // [sequence][kv heads], or null
    double* references;         // [kv head][chunk]
    const Sequence* sequences;
    i64 works;
    int sequence_count, chunk_count, chunk_tokens, first_head, kv_heads, unused;
};
static_assert(sizeof(References) == REFERENCES_BYTES, "as in Rust");

extern "C" __global__ void __launch_bounds__(PREPARE_THREADS) hopper_references(const __grid_constant__ References p) {
    const int local = blockIdx.y;
    const i64 head = p.first_head + local;
    for (int n = blockIdx.x; n < p.sequence_count; n += gridDim.x) {
        const Sequence seq = p.sequences[n];
        const double before = p.marks ? -p.marks[(i64)n * p.kv_heads + head].lag : 0.0;
        for (int c = threadIdx.x; c <= seq.chunks; c += PREPARE_THREADS) {
            const int end = (int)min((i64)c * p.chunk_tokens, (i64)seq.summed);
            const int last = end == 0 ? 0 : p.last ? p.last[seq.work + end - 1] : end;
            p.references[(i64)local * p.chunk_count + seq.chunk + c] = last > 0 ? p.g[head * p.works + seq.work + last - 1] : before;
        }
    }
}
