// Folding a block into far sums: a warp sums the block's tokens for 32 rows at a time in registers, and then adds that
// to the rows, which it alone reads and writes in the whole launch.
#pragma once
#include "decode_sums.cuh"
#include "decode_past.cuh"

// What is left of the far sums, and whether any token of the block has a weight.
struct Fading {
    f32 factor;
    bool live;
};

// Goes over the block's tokens backwards, 32 at a time. Each lane's weight of its token is exp of what has been lost
// from the token to the last one that has a weight (the anchor, to which sums are relative).
struct Backwards {
    f64 lost;    // from the tokens before this part to the anchor
    bool found;  // the anchor
};
DEVICE f32 fold_weight(const Past& past, int token, bool inside, Backwards& b) {
    f32 live = inside ? past.weight(token) : 0.0f;
#if FADES
    f64 log = inside ? past.log(token) : 0.0;
    u32 alive = __ballot_sync(0xffffffffu, live != 0.0f);
    int lane = threadIdx.x % 32, last = 31;
    if (!b.found) {
        last = alive == 0 ? -1 : 31 - __clz(int(alive));
        b.found = alive != 0;
    }
    if (lane > last) log = 0.0;
    f64 suffix = log;
#pragma unroll
    for (int by = 1; by < 32; by <<= 1) {
        f64 other = __shfl_down_sync(0xffffffffu, suffix, by);
        if (lane + by < 32) suffix += other;
    }
    f64 since = suffix - log + b.lost;
    b.lost += __shfl_sync(0xffffffffu, suffix, 0);
    return live != 0.0f ? live * faded(since) : 0.0f;
#else
    return live;
#endif
}

// What folding the block leaves of the far sums.
DEVICE Fading fading_of(const Past& past) {
    Fading fading = {1.0f, false};
    Backwards b = {0.0, false};
#pragma unroll 1
    for (int first = (BLOCK - 1) / 32 * 32; first >= 0; first -= 32) {
        int token = first + threadIdx.x % 32;
        f32 weight = fold_weight(past, token, token < BLOCK, b);
        fading.live |= __any_sync(0xffffffffu, weight != 0.0f) != 0;
    }
#if FADES
    if (fading.live && past.mark.count != 0) fading.factor = faded(b.lost + past.mark.lag);
#endif
    return fading;
}

// Bits that no one could guess, the same at each run.
DEVICE u32 scramble(u32 x) {
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
}

// x · factor + more. What rounding takes is kept in `low`.
DEVICE f32 add_to(f32 x, f32& low, f32 factor, f32 more) {
    f32 product = __fmul_rn(x, factor), sum = __fadd_rn(product, more), part = __fsub_rn(sum, product);
    f32 lost = __fadd_rn(__fsub_rn(product, __fsub_rn(sum, part)), __fsub_rn(more, part));
    low = low * factor + (fmaf(x, factor, -product) + lost);
    return sum;
}
DEVICE void add_to(f32* x, f32* low, f32 factor, f32 more) {
    f32 rest = low == nullptr ? 0.0f : *low;
    *x = add_to(*x, rest, factor, more);
    if (low != nullptr) *low = rest;
}

// The same of VEC numbers of far sums.
#if SUMS == SUMS_BF16
// Beside a bf16 the rest of an f32's bits: as integers, the bf16 is the nearest and the rest what remains, with its
// sign. Without it, rounding is up or down by `chance`, so that many small additions are not lost.
DEVICE u16 round_bf16(u32 bits, u32 carry) {
    if ((bits & 0x7f800000u) == 0x7f800000u) return u16(bits >> 16 | ((bits & 0x7fffffu) != 0));
    return u16((bits + carry) >> 16);
}
DEVICE void add_to(bf16* x, u16* low, f32 factor, const Vec& more, u32 chance) {
    Raw high = load_raw(x), rest = low == nullptr ? raw_zeros() : load_raw(reinterpret_cast<const bf16*>(low));
    Raw next = raw_zeros(), next_rest = raw_zeros();
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
        int shift = i % 2 * 16;
        u32 before = (high.words[i / 2] >> shift) << 16;
        if (low != nullptr) before += u32(i32(i16(rest.words[i / 2] >> shift)));
        u32 bits = __float_as_uint(__uint_as_float(before) * factor + more.x[i]);
        u32 carry = low != nullptr ? 0x8000u : scramble(chance + u32(i)) & 0xffffu;
        next.words[i / 2] |= u32(round_bf16(bits, carry)) << shift;
        next_rest.words[i / 2] |= (bits & 0xffffu) << shift;
    }
    store_raw(x, next);
    if (low != nullptr) store_raw(reinterpret_cast<bf16*>(low), next_rest);
}
#else
DEVICE void add_to(f32* x, f32* low, f32 factor, const Vec& more, u32) {
    Vec sums = load(x), rest = low == nullptr ? zeros() : load(low);
#pragma unroll
    for (int i = 0; i < VEC; ++i) sums.x[i] = add_to(sums.x[i], rest.x[i], factor, more.x[i]);
    store(x, sums);
    if (low != nullptr) store(low, rest);
}
#endif

// Folds the block into rows `from` to before `to`. `scratch` is the warp's own memory.
DEVICE void fold(const Decode& p, const Past& past, i64 slot, int from, int to, const Fading& fading, f32* scratch,
                 const Lane& lane) {
    if (!fading.live) return;
    Sum* sums = p.sums + slot * (i64(FEATURES) * D_VALUE);
    SumLow* sums_low = p.sums_low == nullptr ? nullptr : p.sums_low + slot * (i64(FEATURES) * D_VALUE);
    f32* z = p.z + slot * FEATURES;
    f32* z_low = p.z_low == nullptr ? nullptr : p.z_low + slot * FEATURES;
    u32 chance = scramble(u32(past.position) + scramble(u32(slot)));
#pragma unroll 1
    for (int at = from; at < to; at += 32) {
        int feature = at + lane.index;
        Factors factors = {};
        if (feature < to) factors = factors_of(p, feature);
#pragma unroll 1
        for (int s = 0; s < STRETCHES; ++s) {
            Vec more[TOKEN_LOADS];
#pragma unroll
            for (int j = 0; j < TOKEN_LOADS; ++j) more[j] = zeros();
            f32 more_z = 0.0f;
            Backwards b = {0.0, false};
#pragma unroll 1
            for (int first = (BLOCK - 1) / 32 * 32; first >= 0; first -= 32) {
                int token = first + lane.index, count = min(BLOCK - first, 32);
                f32 weight = fold_weight(past, token, token < BLOCK, b);
#pragma unroll 1
                for (int begin = 0; begin < count; begin += FOLD_TOKENS) {
                    // The features of some tokens, [token][row].
#pragma unroll
                    for (int t = 0; t < FOLD_TOKENS; ++t) {
                        f32 phi = __shfl_sync(0xffffffffu, weight, begin + t);
                        if (phi != 0.0f && feature < to) {
                            const f32* key = past.key(first + begin + t);
#pragma unroll
                            for (int i = 0; i < HIGHEST; ++i) {
                                int factor = factors[i];
                                if (factor < D_KEY) phi *= key[factor];
                            }
                        } else {
                            phi = 0.0f;
                        }
                        more_z += phi;
                        scratch[t * 32 + lane.index] = phi;
                    }
                    __syncwarp();
#pragma unroll 2
                    for (int t = 0; t < FOLD_TOKENS; ++t) {
                        if (begin + t >= count || !has_row(lane) || !has_column(lane, s)) break;
                        Vec value = load(past.value(first + begin + t) + (s * ACROSS + lane.column) * VEC);
#pragma unroll
                        for (int j = 0; j < TOKEN_LOADS; ++j) {
                            int r = j * AT_ONCE + lane.row;
                            f32 phi = scratch[t * 32 + (TOKEN_LOADS * AT_ONCE > 32 ? min(r, 31) : r)];
#pragma unroll
                            for (int i = 0; i < VEC; ++i) more[j].x[i] = fmaf(phi, value.x[i], more[j].x[i]);
                        }
                    }
                    __syncwarp();
                }
            }
            if (s == 0 && feature < to) add_to(z + feature, z_low == nullptr ? nullptr : z_low + feature, fading.factor, more_z);
            if (has_row(lane) && has_column(lane, s)) {
#pragma unroll
                for (int j = 0; j < TOKEN_LOADS; ++j) {
                    int r = j * AT_ONCE + lane.row;
                    if (r >= 32 || at + r >= to) continue;
                    i64 place = i64(at + r) * D_VALUE + (s * ACROSS + lane.column) * VEC;
                    SumLow* low = sums_low == nullptr ? nullptr : sums_low + place;
                    add_to(sums + place, low, fading.factor, more[j], scramble(chance + u32(place)));
                }
            }
        }
    }
}
