// Tokens in the layout that hopper_sums.cu streams: keys with values, or queries with their gradients by numerators and
// denominators, each multiplied by what it counts in the sums of its chunk; zeros where no token is.
//
// Grid: tiles of a chunk, chunks, units at work. `tiles` of the queries are those of one head after another.
// Bytes: the tokens once, SUM_TILE_BYTES written per 64 of them. No FLOPs to speak of.
#include "backward.cuh"
namespace hopper {
#include "hopper.cuh"
}
using hopper::NP;

struct Records {
    Backward b;
    char* records;      // [unit][chunk][tile]
    f64* references;    // [unit][place]: what precedes each place is relative to; where weights decay
    i32 tiles, places;  // of a chunk; of a unit
};
SAME_SIZE(Records, RECORDS_BYTES);
static_assert(hopper::SUM_TILE_BYTES == TOKEN_TILE_BYTES && D_VALUE % 8 == 0, "as in Rust");

constexpr int THREADS = 128, TILE = 64;

extern "C" __global__ void __launch_bounds__(THREADS) matrix_backward_records(const __grid_constant__ Records to) {
    constexpr int KEY_PITCH = D_KEY + 8, VALUE_PITCH = NP + 8;
    __shared__ __align__(16) u16 keys[TILE * KEY_PITCH], values[TILE * VALUE_PITCH];
    const Backward& p = to.b;
    UNIT(u, p.first_unit + blockIdx.z);
    const i64 chunk = blockIdx.y;
    const i64 tile = blockIdx.x;
    i64 first = 0, end = 0;
#if KEYS
    if (chunk < u.s.folds) first = fold_of(p, u, chunk) + tile * TILE, end = fold_of(p, u, chunk + 1);
#else
    const i64 each = (p.far_tokens + TILE - 1) / TILE;
    const i64 head = tile / each;
    if (chunk < u.s.reads) {
        const Read read = p.reads[u.s.reads_at + chunk];
        f64 mark;
        first = read.first + tile % each * TILE;
        end = mark_of(u, fold_of_read(p, u, chunk), mark) ? read.end : first;
    }
#endif
    const int count = int(max(min(end - first, i64(TILE)), i64(0)));
    for (int i = threadIdx.x; i < TILE * D_KEY / 8; i += THREADS) {
        const int t = i / (D_KEY / 8), c = i % (D_KEY / 8) * 8;
        uint4 x = make_uint4(0, 0, 0, 0);
        if (t < count) {
#if KEYS
            x = *reinterpret_cast<const uint4*>(row<bf16>(p.k, u.s.k_batch, u.head, u.s.k_first + first + t - u.s.open) + c);
#else
            x = *reinterpret_cast<const uint4*>(row<bf16>(p.q, u.s.q_batch, u.head * p.group + head, u.s.q_first + first + t) + c);
#endif
        }
        *reinterpret_cast<uint4*>(keys + t * KEY_PITCH + c) = x;
    }
    // Values by eights, a one (or -delta) after them.
    for (int i = threadIdx.x; i < TILE * NP / 8; i += THREADS) {
        const int t = i / (NP / 8), c = i % (NP / 8) * 8;
        f32 weight = 0, last = 1;
        uint4 x = make_uint4(0, 0, 0, 0);
        if (t < count) {
#if KEYS
            weight = p.folding[unit_places(p, u) + first + t];
            const bf16* const from = row<bf16>(p.v, u.s.k_batch, u.head, u.s.k_first + first + t - u.s.open);
#else
            const i64 at = unit_queries(p, u, head) + first + t;
            weight = p.reading[at];
            last = -p.delta[at];
            const bf16* const from = row<bf16>(p.dy, u.s.q_batch, u.head * p.group + head, u.s.q_first + first + t);
#endif
            if (weight != 0 && c < D_VALUE) x = *reinterpret_cast<const uint4*>(from + c);
        }
        u32 word[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) word[e] = bf16x2_bits(weight * __uint_as_float(word[e] << 16), weight * __uint_as_float(word[e] & 0xffff0000u));
        // Columns are D_VALUE, a multiple of 8, and a last block of 8.
        if (c == D_VALUE) word[0] = bf16_bits(weight != 0 ? weight * last : 0);
        *reinterpret_cast<uint4*>(values + t * VALUE_PITCH + c) = make_uint4(word[0], word[1], word[2], word[3]);
    }
    __syncthreads();
    char* const record = to.records + ((i64(blockIdx.z) * gridDim.y + chunk) * to.tiles + tile) * hopper::SUM_TILE_BYTES;
    for (int e = threadIdx.x; e < 4 * (D_KEY + 1) * 8; e += THREADS) {
        const int slab = e / ((D_KEY + 1) * 8), r = e / 8 % (D_KEY + 1), w = e % 8, t = 16 * slab + 8 * (w & 1) + 2 * (w >> 1);
        reinterpret_cast<u32*>(record)[e] = r < D_KEY ? keys[t * KEY_PITCH + r] | u32(keys[(t + 1) * KEY_PITCH + r]) << 16 : 0x3f803f80u;
    }
    for (int e = threadIdx.x; e < TILE * (NP / 8); e += THREADS) {
        const int t = e / NP * 8 + e % 8, c = e / 8 % (NP / 8);
        *reinterpret_cast<uint4*>(record + 4 * hopper::SLAB_BYTES + e * 16) = *reinterpret_cast<const uint4*>(values + t * VALUE_PITCH + 8 * c);
    }
    // Sums of queries go from the last chunk to the first: place i is of what comes after chunk places - 1 - i.
    if (FADES && tile == 0 && threadIdx.x == 0) {
        f64 before = 0, after = 0;
        const i64 now = min(chunk, u.s.folds), next = min(chunk + 1, u.s.folds);
        mark_of(u, fold_of(p, u, now), before);
        mark_of(u, fold_of(p, u, next), after);
        f64* const at = to.references + i64(blockIdx.z) * to.places;
        if (KEYS) {
            if (chunk == 0) at[0] = before;
            at[chunk + 1] = after;
        } else {
            const i64 place = i64(gridDim.y) - 1 - chunk;
            if (place == 0) at[0] = -after;
            at[place + 1] = -before;
        }
    }
}
