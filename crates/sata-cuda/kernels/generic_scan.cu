// From sums of pieces to sums of all before and with each piece, relative to the last of those tokens that is there.
//
// Shapes: sums [slot's pieces][features][d_value], z [slot's pieces][features], f32, in place; the state's sums before
// the call [slots][features][d_value] and [slots][features], where there is one. `commit` leaves the sums up to a
// given piece in the state, once nothing reads its sums from before the call any more; what rounding takes from them
// `scan` leaves there at once.
// One thread has one element of a slot's sums and goes through the pieces in order, in f64.
// Bytes: scan: 8 * pieces * features * (d_value + 1); commit: twice as much of one piece.
// FLOPs: 2 (f64) an element and piece.
#include "generic.cuh"

struct Scan {
    const Sequence* sequences;
    const i32* last;       // [works], where g is
    const f64* g;          // [heads][works], or null
    Marks marks;           // [slots]
    StateSums state;
    const Piece* pieces;
    f32* sums;
    f32* z;
    i64 works, features, d_value;
    i64 first_piece;       // of those in the work array
    i32 first_sequence, sequence_count, first_head, heads, kv_heads;
    i32 padding;
};
SAME_SIZE(Scan, SCAN_BYTES);

constexpr int AT_ONCE = 128;  // pieces whose factors are made at once

// What is left of the sums before a piece once it has been added.
DEVICE f32 left(const Scan& p, const Sequence& s, const Piece& piece, int head, i64 slot) {
    if (!p.g) return 1.0f;
    const i32* last = p.last + s.work;
    const f64* g = p.g + head * p.works + s.work;
    const i64 end = last[piece.first + piece.count - 1];
    if (end <= piece.first) return 1.0f;
    const i64 before = piece.first > 0 ? last[piece.first - 1] : 0;
    return faded(g[end - 1] - (before > 0 ? g[before - 1] : p.marks.summed(slot)));
}

extern "C" __global__ void __launch_bounds__(256) scan(const __grid_constant__ Scan p) {
    __shared__ f32 factors[AT_ONCE];
    const int head = p.first_head + int(blockIdx.y);
    const i64 matrix = p.features * p.d_value;
    const i64 i = i64(blockIdx.x) * 256 + threadIdx.x;
    for (i64 n = blockIdx.z; n < p.sequence_count; n += gridDim.z) {
        const i64 sequence = p.first_sequence + n;
        const Sequence s = p.sequences[sequence];
        const i64 slot = sequence * p.kv_heads + head;
        const i64 base = (s.piece - p.first_piece) * p.heads + i64(blockIdx.y) * s.pieces;
        // The element's place among sums of one piece, and how far apart pieces are.
        f32* to = i < matrix ? p.sums + base * matrix + i : p.z + base * p.features + (i - matrix);
        const i64 stride = i < matrix ? matrix : p.features;
        const bool mine = i < matrix + p.features;
        f64 sum = 0.0;
        const i64 at = i < matrix ? slot * matrix + i : slot * p.features + (i - matrix);
        f32* low = i >= matrix ? p.state.z_low : p.state.is_bf16 ? nullptr : static_cast<f32*>(p.state.low);
        if (mine && p.marks.any(slot)) sum = i < matrix ? p.state.exact_sum(at) : p.state.exact_z(at);
        for (i64 first = 0; first < s.pieces; first += AT_ONCE) {
            const int count = int(s.pieces - first < AT_ONCE ? s.pieces - first : AT_ONCE);
            __syncthreads();
            for (int j = int(threadIdx.x); j < count; j += 256)
                factors[j] = left(p, s, p.pieces[s.piece + first + j], head, slot);
            __syncthreads();
            if (!mine) continue;
            for (int j = 0; j < count; j++) {
                f32* place = to + (first + j) * stride;
                sum = sum * f64(factors[j]) + f64(*place);
                *place = f32(sum);
                if (low && first + j + 1 == s.committed) low[at] = f32(sum - f64(f32(sum)));
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) commit(const __grid_constant__ Scan p) {
    const int head = p.first_head + int(blockIdx.y);
    const i64 matrix = p.features * p.d_value;
    const i64 i = i64(blockIdx.x) * 256 + threadIdx.x;
    if (i >= matrix + p.features) return;
    for (i64 n = blockIdx.z; n < p.sequence_count; n += gridDim.z) {
        const i64 sequence = p.first_sequence + n;
        const Sequence s = p.sequences[sequence];
        if (s.committed == 0) continue;
        const i64 slot = sequence * p.kv_heads + head;
        const i64 at = (s.piece - p.first_piece) * p.heads + i64(blockIdx.y) * s.pieces + s.committed - 1;
        if (i < matrix) {
            const i64 place = slot * matrix + i;
            const u32 chance = scrambled(u32(place) + scrambled(u32(place >> 32) + scrambled(u32(s.folded + s.settled))));
            p.state.set_sum(place, p.sums[at * matrix + i], chance);
        } else {
            p.state.z[slot * p.features + (i - matrix)] = p.z[at * p.features + (i - matrix)];
        }
    }
}
