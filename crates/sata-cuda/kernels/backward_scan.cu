// From sums of chunks to the sums that each chunk reads: one after another, fading.
//
//     mode 0, forward   S_(c+1) = f_c S_c + A_c,  slot c becomes S_c;  S_0 is the state's, or 0
//     mode 1, reverse   Γ_c = f_c Γ_(c+1) + A_c,  slot c becomes Γ_(c+1);  the gradient by the final state joins Γ
//     mode 2, sum       Γ_n = Σ A_c, without causality; mode 1 then goes on with A_c = 0
//
// f_c = exp(g at the last of S_(c+1) − g at the last of S_c). What goes on is kept with what rounding took from it.
// Grid: blocks of 1024 elements of D · (D_VALUE + 1), 1, units at work. `flags`: bit 0 begin with what there is, bit 1
// the end of the sequence is here (the final state may join), bit 2 its beginning is (leave what the initial state gets).
// Block: 256 threads, 4 neighbouring elements each, the chunks' elements loaded AHEAD chunks at a time.
// Bytes: D · (D_VALUE + 1) · 4 read and written per chunk. FLOPs: a few per element.
#include "backward.cuh"

constexpr int THREADS = 256, AHEAD = 4;

// The rounded sum of a and b, and in `low` what it lacks besides what `low` lacked.
DEVICE f32 add(f32 a, f32 b, f32& low) {
    f32 sum = __fadd_rn(a, b);
    f32 of_b = __fsub_rn(sum, a);
    low = __fadd_rn(low, __fadd_rn(__fsub_rn(a, __fsub_rn(sum, of_b)), __fsub_rn(b, of_b)));
    return sum;
}

// Elements `at` … of sums and z, which lie one after the other in slots, and apart in states.
struct Place {
    i64 at, values, count, row;
    DEVICE f32 of(const f32* sums, const f32* z, int i) const {
        i64 e = at + i;
        if (e >= count) return 0;
        return e < values ? sums[row * values + e] : z[row * (count - values) + e - values];
    }
};

struct Carry {
    f32 high[4], low[4];
    DEVICE void add(float4 x) {
        high[0] = ::add(high[0], x.x, low[0]);
        high[1] = ::add(high[1], x.y, low[1]);
        high[2] = ::add(high[2], x.z, low[2]);
        high[3] = ::add(high[3], x.w, low[3]);
    }
    DEVICE void fade(f32 factor) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            high[i] = __fmul_rn(high[i], factor);
            low[i] = __fmul_rn(low[i], factor);
        }
    }
    DEVICE float4 rounded() const {
        return make_float4(__fadd_rn(high[0], low[0]), __fadd_rn(high[1], low[1]), __fadd_rn(high[2], low[2]),
                           __fadd_rn(high[3], low[3]));
    }
    // The gradient by the final state joins.
    DEVICE void join(const Backward& p, const Place& e) {
        if (!p.final_sums) return;
        f32 x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = e.of(p.final_sums, p.final_z, i);
        add(make_float4(x[0], x[1], x[2], x[3]));
    }
};

// What the state has.
DEVICE void past(const Backward& p, const Place& e, Carry& carry) {
    for (int i = 0; i < 4; ++i) {
        if (!p.past_is_bf16 || e.at + i >= e.values) {
            carry.high[i] = e.of(static_cast<const f32*>(p.past_sums), p.past_z, i);
            if (p.past_z_low) carry.low[i] = e.of(static_cast<const f32*>(p.past_sums_low), p.past_z_low, i);
            continue;
        }
        i64 at = e.row * e.values + e.at + i;
        u32 bits = u32(static_cast<const bf16*>(p.past_sums)[at].bits) << 16;
        // As integers, the bf16 is the nearest to the f32 and the rest what remains, with its sign.
        if (p.past_sums_low && (bits & 0x7f800000) != 0x7f800000) {
            bits += u32(i32(i16(static_cast<const u16*>(p.past_sums_low)[at])));
        }
        carry.high[i] = __uint_as_float(bits);
    }
}

// What is left of S_c when S_(c+1) is made.
DEVICE f32 factor_of(const Backward& p, const Unit& u, i64 chunk) {
    f64 before, after;
    if (!FADES || !mark_of(u, fold_of(p, u, chunk), before)) return 1;
    mark_of(u, fold_of(p, u, chunk + 1), after);
    return expf(f32(after - before));
}

extern "C" __global__ void __launch_bounds__(THREADS, 4) backward_scan(const __grid_constant__ Backward p) {
    __shared__ f32 factors[THREADS];
    UNIT(u, p.first_unit + blockIdx.z);
    int thread = threadIdx.x;
    Place e;
    e.values = p.features_count * D_VALUE;
    e.count = e.values + p.features_count;
    e.at = (i64(blockIdx.x) * THREADS + thread) * 4;
    e.row = u.row;
    // Slots end at a multiple of 4.
    bool there = e.at < e.count;
    i64 slot_len = (e.count + 3) / 4 * 4;
    f32* kept = p.carry + 2 * slot_len * blockIdx.z + e.at;
    f32* slot = slot_of(p, blockIdx.z, 0) + e.at;
    Carry carry;
#pragma unroll
    for (int i = 0; i < 4; ++i) carry.high[i] = carry.low[i] = 0;
    if (!(p.flags & 1)) {
        if (there) {
            float4 high = load4(kept), low = load4(kept + slot_len);
            carry.high[0] = high.x, carry.high[1] = high.y, carry.high[2] = high.z, carry.high[3] = high.w;
            carry.low[0] = low.x, carry.low[1] = low.y, carry.low[2] = low.z, carry.low[3] = low.w;
        }
    } else if (p.mode == 0 && u.past && there) {
        past(p, e, carry);
    }
    i64 all = p.mode == 2 ? u.s.reads : u.s.folds;
    int chunks = int(max(min(i64(p.chunks), all - p.first_chunk), i64(0)));
    bool reverse = p.mode == 1;
    if (reverse && p.flags & 2 && u.s.joins == u.s.folds) carry.join(p, e);
    for (int first = 0; first < chunks; first += THREADS) {
        int count = min(THREADS, chunks - first);
        __syncthreads();
        // Chunk i of those that follow.
        auto chunk = [&](int i) { return i64(reverse ? chunks - 1 - first - i : first + i); };
        if (thread < count && p.mode != 2) factors[thread] = factor_of(p, u, p.first_chunk + chunk(thread));
        __syncthreads();
        for (int i = 0; i < count && there; i += AHEAD) {
            float4 own[AHEAD];
#pragma unroll
            for (int n = 0; n < AHEAD; ++n) {
                own[n] = make_float4(0, 0, 0, 0);
                // Without causality all queries come after all chunks.
                if (i + n < count && !(reverse && !CAUSAL)) own[n] = load4(slot + chunk(i + n) * p.slot_chunk);
            }
#pragma unroll
            for (int n = 0; n < AHEAD; ++n) {
                if (i + n >= count) break;
                if (p.mode != 2) {
                    store4(slot + chunk(i + n) * p.slot_chunk, carry.rounded());
                    carry.fade(factors[i + n]);
                }
                carry.add(own[n]);
                if (reverse && p.first_chunk + chunk(i + n) == u.s.joins) carry.join(p, e);
            }
        }
    }
    if (!there) return;
    if (reverse && p.flags & 4 && p.initial_sums) {
        float4 x = carry.rounded();
        f32 all[4] = {x.x, x.y, x.z, x.w};
        for (int i = 0; i < 4 && e.at + i < e.count; ++i) {
            i64 at = e.at + i;
            f32* to = at < e.values ? p.initial_sums + u.row * e.values + at
                                    : p.initial_z + u.row * p.features_count + at - e.values;
            *to = all[i];
        }
    }
    store4(kept, make_float4(carry.high[0], carry.high[1], carry.high[2], carry.high[3]));
    store4(kept + slot_len, make_float4(carry.low[0], carry.low[1], carry.low[2], carry.low[3]));
}
