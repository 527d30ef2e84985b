// From the sums of chunks to what precedes each: a running sum per feature and column, in order.
//
// sums   f32 [kv head][chunk][feature block][8][NP]           (program order)
// far    bf16 [kv head][chunk][feature block][NP / 8][8][8]   what precedes each chunk, times its coefficient
// the state's sums [slot][features][D_VALUE] and z [slot][features], bare, in the order of the basis, with what rounding
// took from them beside them (generic.cuh); `map` has each feature's place in program order
// Bytes: 4 read and 2 written per feature, column and chunk.
#include "hopper.cuh"

// The layout of generic.cuh's.
struct StateSums {
    void *sums, *low;
    float *z, *z_low;
    int is_bf16, unused;
};
struct Scan {
    const float* sums;
    u16* far;
    float* total;               // [kv head][sequence][feature block][8][NP]: of the chunks alone; or null
    const float* coefficients;  // [feature block][8]
    const int* places;          // [feature block][8]: a feature of the basis, or -1
    const double* references;   // [kv head][chunk]
    const Mark* marks;          // [slot]
    StateSums state;            // or null
    const Sequence* sequences;
    i64 features;
    int chunk_count, sequence_count, first_head, kv_heads;
};

static_assert(sizeof(Scan) == SCAN_BYTES && BLOCKS == FEATURE_BLOCKS, "as in Rust");

constexpr int SCAN_THREADS = 128;

extern "C" __global__ void __launch_bounds__(SCAN_THREADS) hopper_scan(const __grid_constant__ Scan p) {
    const int e = blockIdx.x * SCAN_THREADS + threadIdx.x;  // 8 columns of a feature: [block][NP / 8][8 features]
    if (e >= BLOCKS * NP) return;
    const int local = blockIdx.y, sequence = blockIdx.z;
    const Sequence seq = p.sequences[sequence];
    const int block = e / NP, columns = e % NP / 8, row = e % 8;
    const int from = (block * 8 + row) * NP + columns * 8;
    const float coefficient = p.coefficients[block * 8 + row];
    constexpr i64 SIZE = BLOCKS * 8 * NP;
    const i64 slot = (i64)sequence * p.kv_heads + p.first_head + local, first = (i64)local * p.chunk_count + seq.chunk;
    float carry[8] = {}, total[8] = {};
    const int place = p.state.sums ? p.places[block * 8 + row] : -1;
    if (place >= 0 && p.marks[slot].count > 0) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int column = columns * 8 + i;
            const i64 at = slot * p.features + place, in = at * D_VALUE + column;
            if (column < D_VALUE) {
                if (p.state.is_bf16) {
                    const int rest = p.state.low ? ((const short*)p.state.low)[in] : 0;
                    carry[i] = __uint_as_float(((u32)((const u16*)p.state.sums)[in] << 16) + (u32)rest);
                } else {
                    carry[i] = ((const float*)p.state.sums)[in];
                }
            } else if (column == D_VALUE) {
                carry[i] = p.state.z[at];
            }
        }
    }
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
        const float x[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
        float fade = 1.f;
        if constexpr (HAS_G) fade = exp2_fast((float)(p.references[first + c + 1] - p.references[first + c]) * LOG2E);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            carry[i] = fmaf(carry[i], fade, x[i]);
            total[i] = fmaf(total[i], fade, x[i]);
        }
    }
    if (p.total) {
        float4* s = (float4*)(p.total + ((i64)local * p.sequence_count + sequence) * SIZE + from);
        s[0] = make_float4(total[0], total[1], total[2], total[3]);
        s[1] = make_float4(total[4], total[5], total[6], total[7]);
    }
}

// Adds the chunks' sums to the state's, compensated. One thread has one feature's column.
struct Commit {
    const float* total;
    const int* map;             // [features]: a feature's place in program order
    const double* references;
    const Mark* marks;
    StateSums state;
    const Sequence* sequences;
    i64 features;
    int chunk_count, sequence_count, first_head, kv_heads;
};
static_assert(sizeof(Commit) == COMMIT_BYTES, "as in Rust");

extern "C" __global__ void __launch_bounds__(SCAN_THREADS) hopper_commit(const __grid_constant__ Commit p) {
    const i64 e = (i64)blockIdx.x * SCAN_THREADS + threadIdx.x;
    if (e >= p.features * (D_VALUE + 1)) return;
    const int local = blockIdx.y, sequence = blockIdx.z;
    const Sequence seq = p.sequences[sequence];
    if (seq.chunks == 0) return;
    const i64 feature = e / (D_VALUE + 1), column = e % (D_VALUE + 1);
    const i64 slot = (i64)sequence * p.kv_heads + p.first_head + local, first = (i64)local * p.chunk_count + seq.chunk;
    constexpr i64 SIZE = BLOCKS * 8 * NP;
    const double sum = p.total[((i64)local * p.sequence_count + sequence) * SIZE + (i64)p.map[feature] * NP + column];
    double fade = 1.0;
    if constexpr (HAS_G) {
        const double log = p.references[first + seq.chunks] - p.references[first];
        fade = log < -60.0 ? 0.0 : exp(log);
    }
    const bool any = p.marks[slot].count > 0;
    const i64 at = slot * p.features + feature, in = at * D_VALUE + column;
    float* const to = column == D_VALUE ? p.state.z + at : (float*)p.state.sums + in;
    float* const low = column == D_VALUE ? (p.state.z_low ? p.state.z_low + at : nullptr) : p.state.low ? (float*)p.state.low + in : nullptr;
    const double before = any ? (double)*to + (low ? (double)*low : 0.0) : 0.0;
    const double after = before * fade + sum;
    *to = (float)after;
    if (low) *low = (float)(after - (double)(float)after);
}
