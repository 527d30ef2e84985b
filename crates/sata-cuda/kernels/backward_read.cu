// What reading sums does to the tokens that read. Queries read S, with the multiplicities and coefficients c_f:
//
//     by_sums = Σ_f c_f (S_f·dy) ∂Φ_f/∂q     by_z = Σ_f c_f z_f ∂Φ_f/∂q
//     dot = Σ_f c_f Φ_f(q) (S_f·dy)          den = Σ_f c_f Φ_f(q) z_f
//
// (kept apart because δ is only known when everything has been read), and keys Γ, likewise one gradient:
//
//     dk = Σ_f c_f (Γ_f·[v, 1]) ∂Φ_f/∂k,     dot = Σ_f c_f Φ_f(k) (Γ_f·[v, 1])
//
// Grid: (splits of the features) · (heads of a group) · (tiles of 32 · WARPS tokens), chunks at work, units at work.
// Block: a thread per token. 32 features at a time: each warp multiplies their sums by its 32 tokens' values (8 features
// and 4 tokens a thread), and then each thread goes through the features, run by run, for its own token, whose elements
// and gradients lie in shared memory. A run's common prefix is multiplied once, and gets its gradient once.
// Leaves rows of tokens in `far`: by_sums, by_z (D_KEY each), dot, den; or dk, dot, and room for dv (backward_values).
// Bytes: D · (D_VALUE + 1) · 4 per tile (from L2). FLOPs: 2 D (D_VALUE + 4) per token.
#include "backward.cuh"

constexpr int TOKENS = 32 * WARPS;
constexpr int VALUES = (D_VALUE + 3) / 4 * 4;
// An odd number of fours: four rows lie in different banks.
constexpr int S_STRIDE = VALUES / 4 % 2 == 1 ? VALUES : VALUES + 4;
constexpr int H_STRIDE = 40;
constexpr int X_STRIDE = TOKENS + 4;
// Sums of the next features that each thread holds, or 0 where that would be too many.
constexpr int AHEAD_ALL = (32 * D_VALUE + TOKENS - 1) / TOKENS;
constexpr int AHEAD = AHEAD_ALL <= 24 ? AHEAD_ALL : 0;

template <int SETS>
struct Tile {
    f32 sums[32 * S_STRIDE];
    f32 values[VALUES * X_STRIDE];
    f32 h[WARPS * 32 * H_STRIDE];
    f32 x[D_MORE * X_STRIDE];
    f32 by[SETS * D_MORE * X_STRIDE];
    f32 z[32];
};
SAME_SIZE(Tile<2>, QUERY_BYTES);
SAME_SIZE(Tile<1>, KEY_BYTES);

// Sums of 32 features on their way.
struct Next {
    f32 sums[AHEAD > 0 ? AHEAD : 1];
    f32 z;
};

DEVICE void fetch(const Backward& p, const f32* slot, i64 first, Next& next) {
    int thread = threadIdx.x;
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
        int at = thread + i * TOKENS;
        i64 f = first + at / D_VALUE;
        next.sums[i] = at < 32 * D_VALUE && f < p.features_count ? slot[first * D_VALUE + at] * p.factors[f] : 0;
    }
    i64 f = first + thread;
    next.z = thread < 32 && f < p.features_count ? slot[p.features_count * D_VALUE + f] * p.factors[f] : 0;
}

template <class T>
DEVICE void put(const Backward& p, const f32* slot, i64 first, const Next& next, T& tile) {
    int thread = threadIdx.x;
    if (AHEAD > 0) {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            int at = thread + i * TOKENS;
            if (at < 32 * D_VALUE) tile.sums[at / D_VALUE * S_STRIDE + at % D_VALUE] = next.sums[i];
        }
    } else {
        for (int at = thread; at < 32 * D_VALUE; at += TOKENS) {
            i64 f = first + at / D_VALUE;
            tile.sums[at / D_VALUE * S_STRIDE + at % D_VALUE] =
                f < p.features_count ? slot[first * D_VALUE + at] * p.factors[f] : 0;
        }
    }
    if (thread < 32) tile.z[thread] = next.z;
}

// h_ft = Σ_e S_fe v_et for 32 features and the warp's 32 tokens; with z_f, if it is asked for.
template <bool WITH_Z, class T>
DEVICE void multiply(T& tile, int warp, int lane) {
    int f = lane & 3, t = lane >> 2 << 2;
    f32 h[8][4];
#pragma unroll
    for (int i = 0; i < 8; ++i) h[i][0] = h[i][1] = h[i][2] = h[i][3] = WITH_Z ? tile.z[f + 4 * i] : 0.0f;
    const f32* values = &tile.values[warp * 32 + t];
    const f32* sums = &tile.sums[f * S_STRIDE];
#pragma unroll 1
    for (int e = 0; e < VALUES; e += 4) {
        float4 v[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) v[j] = load4(values + (e + j) * X_STRIDE);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            float4 s = load4(sums + 4 * i * S_STRIDE + e);
            h[i][0] = fmaf(s.w, v[3].x, fmaf(s.z, v[2].x, fmaf(s.y, v[1].x, fmaf(s.x, v[0].x, h[i][0]))));
            h[i][1] = fmaf(s.w, v[3].y, fmaf(s.z, v[2].y, fmaf(s.y, v[1].y, fmaf(s.x, v[0].y, h[i][1]))));
            h[i][2] = fmaf(s.w, v[3].z, fmaf(s.z, v[2].z, fmaf(s.y, v[1].z, fmaf(s.x, v[0].z, h[i][2]))));
            h[i][3] = fmaf(s.w, v[3].w, fmaf(s.z, v[2].w, fmaf(s.y, v[1].w, fmaf(s.x, v[0].w, h[i][3]))));
        }
    }
    f32* to = &tile.h[warp * 32 * H_STRIDE + t];
#pragma unroll
    for (int i = 0; i < 8; ++i) store4(to + (f + 4 * i) * H_STRIDE, make_float4(h[i][0], h[i][1], h[i][2], h[i][3]));
}

// One feature prefix · x_i and its h: what it adds to the gradient by x_i and to that by the prefix.
template <int SETS>
struct Lane {
    const f32* x;
    f32* by;
    f32 prefix;
    f32 of_prefix[SETS];
    template <int N>
    DEVICE void features(int i, const f32* h, const f32* z) {
        f32 h0[N], x0[N], by0[N], by1[N], z0[N];
#pragma unroll
        for (int n = 0; n < N; ++n) {
            h0[n] = h[n * H_STRIDE];
            x0[n] = x[(i + n) * X_STRIDE];
            by0[n] = by[(i + n) * X_STRIDE];
            if (SETS == 2) {
                z0[n] = z[n];
                by1[n] = by[(D_MORE + i + n) * X_STRIDE];
            }
        }
#pragma unroll
        for (int n = 0; n < N; ++n) {
            by[(i + n) * X_STRIDE] = fmaf(prefix, h0[n], by0[n]);
            of_prefix[0] = fmaf(x0[n], h0[n], of_prefix[0]);
            if (SETS == 2) {
                by[(D_MORE + i + n) * X_STRIDE] = fmaf(prefix, z0[n], by1[n]);
                of_prefix[SETS - 1] = fmaf(x0[n], z0[n], of_prefix[SETS - 1]);
            }
        }
    }
};

// A run as it lies in memory.
struct Indices {
    uint2 words[RUN / 4];
    DEVICE int at(int i) const {
        u32 word = i % 4 < 2 ? words[i / 4].x : words[i / 4].y;
        return int(i % 2 == 0 ? word & 0xffff : word >> 16);
    }
    DEVICE int prefix(int j) const { return at(2 + j); }
};
DEVICE Indices indices_of(const Backward& p, int run) {
    Indices indices;
    const uint2* from = reinterpret_cast<const uint2*>(p.runs + i64(run) * RUN);
#pragma unroll
    for (int i = 0; i < RUN / 4; ++i) indices.words[i] = __ldg(from + i);
    return indices;
}

// All features of some tiles of 32, `from` until `to`, for the block's tokens; gives Σ Φ h and Σ Φ z.
template <int SETS>
DEVICE void read_back(const Backward& p, const f32* slot, i64 from, i64 to, Tile<SETS>& tile, f32 (&total)[2]) {
    int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    for (int i = thread; i < 32 * S_STRIDE; i += TOKENS) tile.sums[i] = 0;
    for (int i = 0; i < SETS * D_MORE; ++i) tile.by[i * X_STRIDE + thread] = 0;
    total[0] = total[1] = 0;
    Next next;
    fetch(p, slot, from * 32, next);
    Lane<SETS> l;
    l.x = &tile.x[thread];
    l.by = &tile.by[thread];
    Indices coming = indices_of(p, p.tile_runs[from]);
    for (i64 at = from; at < to; ++at) {
        __syncthreads();
        put(p, slot, at * 32, next, tile);
        __syncthreads();
        if (at + 1 < to) fetch(p, slot, (at + 1) * 32, next);
        multiply<SETS == 1>(tile, warp, lane);
        __syncwarp();
        const f32* h = &tile.h[warp * 32 * H_STRIDE + lane];
        const f32* z = tile.z;
        int end = p.tile_runs[at + 1];
        for (int r = p.tile_runs[at]; r < end; ++r) {
            // There is one more run than there are, so that the next is there.
            Indices run = coming;
            coming = indices_of(p, r + 1);
            f32 x[ORDER];
            l.prefix = 1;
#pragma unroll
            for (int j = 0; j + 1 < ORDER; ++j) {
                x[j] = l.x[run.prefix(j) * X_STRIDE];
                l.prefix *= x[j];
            }
            l.of_prefix[0] = l.of_prefix[SETS - 1] = 0;
            int i = run.at(0), last = i + run.at(1);
            for (; i + 4 <= last; i += 4) {
                l.template features<4>(i, h, z);
                h += 4 * H_STRIDE;
                z += 4;
            }
            for (; i < last; ++i) {
                l.template features<1>(i, h, z);
                h += H_STRIDE;
                z += 1;
            }
#pragma unroll
            for (int s = 0; s < SETS; ++s) {
                f32 of_prefix = l.of_prefix[s];
                total[s] = fmaf(l.prefix, of_prefix, total[s]);
#pragma unroll
                for (int j = 0; j + 1 < ORDER; ++j) {
                    if (run.prefix(j) == D_KEY) continue;
                    f32 others = of_prefix;
#pragma unroll
                    for (int k = 0; k + 1 < ORDER; ++k) {
                        if (k != j) others *= x[k];
                    }
                    l.by[(s * D_MORE + run.prefix(j)) * X_STRIDE] += others;
                }
            }
        }
        __syncwarp();
    }
}

// Which tokens a block reads for.
struct Share {
    i64 split, head, first;
    i64 from, to;  // tiles of features
    DEVICE Share(const Backward& p) {
        i64 tiles = (p.far_tokens + TOKENS - 1) / TOKENS;
        i64 at = blockIdx.x;
        first = at % tiles * TOKENS;
        head = at / tiles % p.far_heads;
        split = at / tiles / p.far_heads;
        i64 all = (p.features_count + 31) / 32;
        from = all * split / p.splits;
        to = all * (split + 1) / p.splits;
    }
};

template <class T, class Tokens>
DEVICE void load(T& tile, const Tokens& tokens, i64 first, int count) {
    load_transposed<D_KEY, TOKENS, TOKENS>(tile.x, X_STRIDE, count, [&](int t, int i) { return tokens.element(first + t, i); });
    tile.x[D_KEY * X_STRIDE + threadIdx.x] = 1;
    load_transposed<VALUES, TOKENS, TOKENS>(tile.values, X_STRIDE, count, [&](int t, int e) {
        return e < D_VALUE ? tokens.value(first + t, e) : 0;
    });
}

struct Queries {
    const Backward& p;
    const Unit& u;
    i64 head;
    DEVICE f32 element(i64 query, int i) const { return query_at(p, u, head, query, i); }
    DEVICE f32 value(i64 query, int i) const { return dy_at(p, u, head, query, i); }
};

struct Keys {
    const Backward& p;
    const Unit& u;
    DEVICE f32 element(i64 place, int i) const { return key_at(p, u, place, i); }
    DEVICE f32 value(i64 place, int i) const { return value_at(p, u, place, i); }
};

extern "C" __global__ void __launch_bounds__(TOKENS, 1) backward_read_queries(const __grid_constant__ Backward p) {
    DYNAMIC_SHARED(shared);
    Tile<2>& tile = *reinterpret_cast<Tile<2>*>(shared);
    UNIT(u, p.first_unit + blockIdx.z);
    i64 chunk = p.first_chunk + blockIdx.y;
    if (chunk >= u.s.reads) return;
    Share share(p);
    Read read = p.reads[u.s.reads_at + chunk];
    f64 mark;
    if (read.first + share.first >= read.end || !mark_of(u, fold_of_read(p, u, chunk), mark)) return;
    int count = int(min(i64(TOKENS), read.end - read.first - share.first));
    Queries queries = {p, u, share.head};
    load(tile, queries, read.first + share.first, count);
    f32 total[2];
    read_back<2>(p, slot_of(p, blockIdx.z, blockIdx.y), share.from, share.to, tile, total);
    int thread = threadIdx.x;
    if (thread >= count) return;
    f32* far = far_of(p, share.split, blockIdx.z, share.head, blockIdx.y, 2 * D_KEY + 2) + share.first + thread;
    for (int i = 0; i < D_KEY; ++i) {
        far[i * p.far_tokens] = tile.by[i * X_STRIDE + thread];
        far[(D_KEY + i) * p.far_tokens] = tile.by[(D_MORE + i) * X_STRIDE + thread];
    }
    far[2 * D_KEY * p.far_tokens] = total[0];
    far[(2 * D_KEY + 1) * p.far_tokens] = total[1];
}

extern "C" __global__ void __launch_bounds__(TOKENS, 1) backward_read_keys(const __grid_constant__ Backward p) {
    DYNAMIC_SHARED(shared);
    Tile<1>& tile = *reinterpret_cast<Tile<1>*>(shared);
    UNIT(u, p.first_unit + blockIdx.z);
    i64 chunk = p.first_chunk + blockIdx.y;
    if (chunk >= u.s.folds) return;
    Share share(p);
    i64 first = fold_of(p, u, chunk) + share.first, end = fold_of(p, u, chunk + 1);
    if (first >= end) return;
    int count = int(min(i64(TOKENS), end - first));
    Keys keys = {p, u};
    load(tile, keys, first, count);
    f32 total[2];
    read_back<1>(p, slot_of(p, blockIdx.z, blockIdx.y), share.from, share.to, tile, total);
    int thread = threadIdx.x;
    if (thread >= count) return;
    f32* far = far_of(p, share.split, blockIdx.z, 0, blockIdx.y, D_KEY + 1 + D_VALUE) + share.first + thread;
    for (int i = 0; i < D_KEY; ++i) far[i * p.far_tokens] = tile.by[i * X_STRIDE + thread];
    far[D_KEY * p.far_tokens] = total[0];
}
