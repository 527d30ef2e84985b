// From sums of chunks to the sums that each chunk reads: one after another, fading.
//
//     mode 0, forward   S_(c+1) = f_c S_c + A_c,  slot c becomes S_c;  S_0 is the state's, or 0
//     mode 1, reverse   Γ_c = f_c Γ_(c+1) + A_c,  slot c becomes Γ_(c+1);  the gradient by the final state joins Γ
//     mode 2, sum       Γ_n = Σ A_c, without causality; mode 1 then goes on with A_c = 0
//
// f_c = exp(g at the last of S_(c+1) − g at the last of S_c). What goes on is kept with what rounding took from it.
// Grid: blocks of 256 elements of D · (D_VALUE + 1), 1, units at work. `flags`: bit 0 begin with what there is, bit 1
// the end of the sequence is here (the final state may join), bit 2 its beginning is (leave what the initial state gets).
// Bytes: D · (D_VALUE + 1) · 4 read and written per chunk. FLOPs: a few per element.
#include "backward.cuh"

// The rounded sum of a and b, and in `low` what it lacks besides what `low` lacked.
DEVICE f32 add(f32 a, f32 b, f32& low) {
    f32 sum = __fadd_rn(a, b);
    f32 of_b = __fsub_rn(sum, a);
    low = __fadd_rn(low, __fadd_rn(__fsub_rn(a, __fsub_rn(sum, of_b)), __fsub_rn(b, of_b)));
    return sum;
}

struct Element {
    i64 at, values, count;
    i64 row;
    DEVICE f32 of(const f32* sums, const f32* z) const {
        return at < values ? sums[row * values + at] : z[row * (count - values) + at - values];
    }
};

// What the state has.
DEVICE void past(const Backward& p, const Element& e, f32& high, f32& low) {
    if (!p.past_is_bf16 || e.at >= e.values) {
        high = e.of(static_cast<const f32*>(p.past_sums), p.past_z);
        if (p.past_z_low) low = e.of(static_cast<const f32*>(p.past_sums_low), p.past_z_low);
        return;
    }
    i64 at = e.row * e.values + e.at;
    u32 bits = u32(static_cast<const bf16*>(p.past_sums)[at].bits) << 16;
    // As integers, the bf16 is the nearest to the f32 and the rest what remains, with its sign.
    if (p.past_sums_low && (bits & 0x7f800000) != 0x7f800000) {
        bits += u32(i32(i16(static_cast<const u16*>(p.past_sums_low)[at])));
    }
    high = __uint_as_float(bits);
}

extern "C" __global__ void __launch_bounds__(256) backward_scan(const __grid_constant__ Backward p) {
    UNIT(u, p.first_unit + blockIdx.z);
    Element e;
    e.values = p.features_count * D_VALUE;
    e.count = e.values + p.features_count;
    e.at = i64(blockIdx.x) * 256 + threadIdx.x;
    e.row = u.row;
    if (e.at >= e.count) return;
    bool begins = p.flags & 1, last = p.flags & 2, first = p.flags & 4;
    f32* carry = p.carry + 2 * e.count * blockIdx.z + e.at;
    f32* slot = slot_of(p, blockIdx.z, 0) + e.at;
    f32 high = 0, low = 0;
    if (!begins) {
        high = carry[0];
        low = carry[e.count];
    } else if (p.mode == 0 && u.past) {
        past(p, e, high, low);
    }
    if (p.mode == 2) {
        i64 chunks = min(i64(p.chunks), u.s.reads - p.first_chunk);
        for (i64 c = 0; c < chunks; ++c) high = add(high, slot[c * p.slot_chunk], low);
    } else {
        i64 chunks = max(min(i64(p.chunks), u.s.folds - p.first_chunk), i64(0));
        if (p.mode == 1 && last && u.s.joins == u.s.folds && p.final_sums) {
            high = add(high, e.of(p.final_sums, p.final_z), low);
        }
        for (i64 i = 0; i < chunks; ++i) {
            i64 c = p.mode == 0 ? i : chunks - 1 - i;
            i64 chunk = p.first_chunk + c;
            f64 before, after;
            f32 factor = 1;
            if (FADES && mark_of(u, fold_of(p, u, chunk), before)) {
                mark_of(u, fold_of(p, u, chunk + 1), after);
                factor = expf(f32(after - before));
            }
            // Without causality all queries come after all chunks.
            f32 own = p.mode == 1 && !CAUSAL ? 0 : slot[c * p.slot_chunk];
            slot[c * p.slot_chunk] = __fadd_rn(high, low);
            high = __fmul_rn(high, factor);
            low = __fmul_rn(low, factor);
            high = add(high, own, low);
            if (p.mode == 1 && chunk == u.s.joins && p.final_sums) {
                high = add(high, e.of(p.final_sums, p.final_z), low);
            }
        }
        if (p.mode == 1 && first && p.initial_sums) {
            f32* to = e.at < e.values ? p.initial_sums + u.row * e.values + e.at
                                      : p.initial_z + u.row * p.features_count + e.at - e.values;
            *to = __fadd_rn(high, low);
        }
    }
    carry[0] = high;
    carry[e.count] = low;
}
