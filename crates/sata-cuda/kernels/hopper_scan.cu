// From the sums of chunks to what precedes each: a running sum per feature and column, in order.
//
// sums   f32 [kv head][chunk][feature block][8][NP]           (program order)
// far    bf16 [kv head][chunk][feature block][NP / 8][8][8]   what precedes each chunk, times its coefficient
// final  f32 [kv head][sequence][feature block][8][NP]        all of it, bare
// Bytes: 4 read and 2 written per feature, column and chunk.
#include "hopper.cuh"

struct Scan {
    const float* sums;
    u16* far;
    const float* initial;     // like `final`, or null
    float* final;             // or null
    const float* coefficients;  // [feature block][8]
    const char* tiles;        // records, for g
    const double* before;     // [kv head][sequence]: g that the initial sums are relative to, where there is decay
    const Sequence* sequences;
    int tile_count, chunk_count, chunk_tokens, sequence_count;
};

constexpr int SCAN_THREADS = 128;

extern "C" __global__ void __launch_bounds__(SCAN_THREADS) hopper_scan(const __grid_constant__ Scan p) {
    const int e = blockIdx.x * SCAN_THREADS + threadIdx.x;  // 8 columns of a feature: [block][NP / 8][8 features]
    if (e >= BLOCKS * NP) return;
    const int sequence = blockIdx.y, kv = blockIdx.z;
    const Sequence seq = p.sequences[sequence];
    const int block = e / NP, columns = e % NP / 8, row = e % 8;
    const int from = (block * 8 + row) * NP + columns * 8;
    const float coefficient = p.coefficients[block * 8 + row];
    constexpr i64 SIZE = BLOCKS * 8 * NP;
    float carry[8] = {};
    if (p.initial) {
        const float4* s = (const float4*)(p.initial + ((i64)kv * p.sequence_count + sequence) * SIZE + from);
        const float4 a = s[0], b = s[1];
        carry[0] = a.x, carry[1] = a.y, carry[2] = a.z, carry[3] = a.w, carry[4] = b.x, carry[5] = b.y, carry[6] = b.z, carry[7] = b.w;
    }
    double g = 0;
    if (HAS_G) g = p.before[kv * p.sequence_count + sequence];
    const i64 first = (i64)kv * p.chunk_count + seq.chunk;
    for (int c = 0; c <= seq.chunks; c++) {
        uint4 out;
        out.x = pack2(carry[0] * coefficient, carry[1] * coefficient);
        out.y = pack2(carry[2] * coefficient, carry[3] * coefficient);
        out.z = pack2(carry[4] * coefficient, carry[5] * coefficient);
        out.w = pack2(carry[6] * coefficient, carry[7] * coefficient);
        *(uint4*)(p.far + (first + c) * SIZE + (i64)e * 8) = out;
        if (c == seq.chunks) break;
        const float4* s = (const float4*)(p.sums + (first + c) * SIZE + from);
        const float4 a = s[0], b = s[1];
        float fade = 1.f;
        if constexpr (HAS_G) {
            const int last = (min(seq.keys, (c + 1) * p.chunk_tokens) - 1) / KEY_TILE;
            const double end = *(const double*)(p.tiles + ((i64)kv * p.tile_count + seq.tile + last) * TILE_BYTES + META_END);
            fade = exp2_fast((float)(end - g) * LOG2E);
            g = end;
        }
        carry[0] = fmaf(carry[0], fade, a.x), carry[1] = fmaf(carry[1], fade, a.y), carry[2] = fmaf(carry[2], fade, a.z);
        carry[3] = fmaf(carry[3], fade, a.w), carry[4] = fmaf(carry[4], fade, b.x), carry[5] = fmaf(carry[5], fade, b.y);
        carry[6] = fmaf(carry[6], fade, b.z), carry[7] = fmaf(carry[7], fade, b.w);
    }
    if (p.final) {
        float4* s = (float4*)(p.final + ((i64)kv * p.sequence_count + sequence) * SIZE + from);
        s[0] = make_float4(carry[0], carry[1], carry[2], carry[3]);
        s[1] = make_float4(carry[4], carry[5], carry[6], carry[7]);
    }
}
