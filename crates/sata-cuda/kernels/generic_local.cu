// From far sums and raw tokens to outputs: far tokens that are still raw are weighed by the polynomial, near ones and
// sinks by exp; all under one denominator, with one shift per query.
//
// Shapes: q, y [tokens][D_KEY], [tokens][D_VALUE] of E; k, v of KV (views; k and v may be work arrays); num, den: what
// `far_read` leaves; sinks' keys and values f32. With EACH, coefficients are each query's own: first the moments of
// its raw far logits are added to those of the far sums, then the coefficients are made of them (series.cuh).
// A query stands at token `at` of its window; it sees tokens 0 ... at, far ones before `far`. The far part is relative
// to the last far token that is there (the *anchor*), all parts to the last of all that is there (the *reference*):
// so that it does not matter how much everything has faded since.
// Blocks: 64 queries of one chunk (over the query heads of a key/value head, head by head); KEYS tokens a step:
// logits from registers, 4 x KEYS/8 a thread; weights by two threads per query; products with values from registers.
// Bytes: q, y once; k and v of the window once per 64 queries, from L2; FLOPs: 2 (D_KEY + D_VALUE) + 2 P + about 20
// per query and raw token, with EACH another 2 (D_KEY + P) per raw far token.
// Defines: D_KEY, D_VALUE, E, KV, HIGHEST (the highest order), EACH; COLUMNS, COLUMN_TILES, KEYS; LOCAL_BYTES,
// SHARED_BYTES.
#include "generic.cuh"
#include "series.cuh"

constexpr int THREADS = 128;
constexpr int ROWS = 64;
constexpr int PITCH = ROWS + 4;       // of transposed queries
constexpr int KEY_PITCH = KEYS + 4;   // of transposed keys, and of logits
constexpr int SLICE = D_KEY < 64 ? D_KEY : 64;  // elements of keys at a time
constexpr int SLICES = (D_KEY + SLICE - 1) / SLICE;
constexpr int KN = KEYS / 8;          // keys of a thread
constexpr int CN = COLUMNS / 8;       // columns of a thread
constexpr int KEPT = HIGHEST <= 8 ? HIGHEST + 1 : 1;  // coefficients that are kept in registers
constexpr int MOMENTS = EACH ? HIGHEST + 1 : 1;
constexpr int UNROLLED = HIGHEST <= 8 ? MOMENTS : 1;
constexpr f32 LOWEST = -3.402823466e38f;

// What a call notices.
struct Tally {
    u64 non_positive, non_finite;
    u64 first;  // 2^64 - 1 less the first of those: sequence, head, token; 0 for none
};

struct Local {
    View q, k, v, y;
    const Sequence* sequences;
    const Chunk* chunks;
    const u8* live;            // [works]
    const i32* last;           // [works]: how many tokens there are up to the last before the next that is there
    const f64* g;              // [heads][works], or null
    const f32* num;
    const f32* den;
    Marks marks;               // [slots]
    const f32* reach;          // [slots], the largest |k|^2 of the call's own tokens, where EACH
    const f64* reach_before;   // [slots], the same of those before it, or null
    const f32* sink_keys;      // [heads][sinks][D_KEY]
    const f32* sink_values;
    const u8* sink_live;       // [sinks]
    const i32* sink_last;      // [sinks], as `last`
    const f64* sink_g;         // [heads][sinks]
    const f32* coefficients;   // [HIGHEST + 1], unless EACH
    const i32* plane_of;       // [HIGHEST + 1], where EACH: an order's plane, or -1
    Tally* tally;
    i64 works, first_row, rows, block, near, sinks, sink_works, most_queries;
    f64 tau, relative, absolute;
    f32 scale;
    i32 rule, terms, plane_count, parts, tiles, causal, gathered;
    i32 first_head, heads, kv_heads, group, first_chunk, padding;
};
SAME_SIZE(Local, LOCAL_BYTES);

struct Shared {
    f32 logits[ROWS * KEY_PITCH];
    f32 values[KEYS * COLUMNS];
    f32 keys[SLICE * KEY_PITCH];
    f32 queries[SLICE * PITCH];
    f32 g[2 * KEYS];    // high and low parts
    f32 live[KEYS];
    f32 factor[ROWS];
    f32 den[ROWS];
};
SAME_SIZE(Shared, SHARED_BYTES);

extern "C" __global__ void __launch_bounds__(THREADS) local(const __grid_constant__ Local p) {
    DYNAMIC_SHARED(memory);
    Shared& m = *reinterpret_cast<Shared*>(memory);
    const int thread = int(threadIdx.x);
    const int chunk_index = p.first_chunk + int(blockIdx.x / p.tiles);
    const Chunk chunk = p.chunks[chunk_index];
    const int count = int(chunk.count), all_rows = count * p.group;
    const int first_row = int(blockIdx.x % p.tiles) * ROWS;
    if (first_row >= all_rows) return;
    const Sequence s = p.sequences[chunk.sequence];
    const int head = p.first_head + int(blockIdx.y);
    const i64 slot = i64(chunk.sequence) * p.kv_heads + head;
    const int first_column = int(blockIdx.z) * COLUMNS;
    const f64* g = p.g ? p.g + head * p.works + s.work : nullptr;
    const u8* live = p.live + s.work;
    const i32* last = p.last + s.work;
    const bool has_near = p.near >= 0 || p.sinks > 0;
    const bool has_sums = p.marks.any(slot);

    // Logits, and products with values: rows 4 * high ..., keys or columns by `low`.
    const int high = thread / 8, low = thread % 8;

    // ---- What the row's two threads know of its query ----
    const int row_index = thread / 2, half = thread % 2;
    const int at_row = first_row + row_index;
    const bool there = at_row < all_rows;
    const i64 query = chunk.first + (there ? at_row % count : 0);       // counted in the call
    const i64 query_head = i64(head) * p.group + (there ? at_row / count : 0);
    // Tokens of the window that it sees, and those that are far, both counted from the chunk's window.
    i64 seen = p.causal ? s.open + query + 1 : s.tokens;
    i64 far = seen;
    if (p.near >= 0) {
        i64 blocks = (seen - 1) / p.block - p.near;
        far = blocks > 0 ? blocks * p.block : 0;
    }
    i64 old = s.sinks;
    if (p.causal && s.folded + seen < old) old = s.folded + seen;
    if (!there) seen = far = old = 0;
    const i64 last_far = far > 0 ? last[far - 1] : 0, last_seen = seen > 0 ? last[seen - 1] : 0;
    const bool has_far = has_sums || last_far > 0;
    const int far_to = int(far > chunk.window ? far - chunk.window : 0);
    const int seen_to = int(seen > chunk.window ? seen - chunk.window : 0);
    float2 anchor = make_float2(0.0f, 0.0f), reference = anchor;
    f32 left = 1.0f;  // of the far sums, at the anchor
    f64 gap = 0.0;
    if (g && there) {
        const i64 last_summed = chunk.window > 0 ? last[chunk.window - 1] : 0;
        const f64 before = p.marks.summed(slot), summed = last_summed > 0 ? g[last_summed - 1] : before;
        const f64 at = last_far > 0 ? g[last_far - 1] : before;
        f64 own = last_seen > 0 ? g[last_seen - 1] : before;
        if (last_seen == 0 && !has_sums) {
            const i64 sink = old > 0 ? p.sink_last[s.sink + old - 1] : 0;
            own = sink > 0 ? p.sink_g[head * p.sink_works + s.sink + sink - 1] : 0.0;
        }
        if (last_summed > 0 || has_sums) left = faded(at - summed);
        gap = own - at;
        anchor = split(at);
        reference = split(own);
    }
    // The far part's share of the shift, until near tokens raise it.
    f32 top = LOWEST, den = 0.0f;
    f32 coefficients[KEPT];
#pragma unroll
    for (int i = 0; i < KEPT; i++) coefficients[i] = 0.0f;

    // Tokens that any row of this block sees.
    __shared__ int most[2];
    if (thread == 0) most[0] = most[1] = 0;
    __syncthreads();
    if (half == 0 && there) {
        atomicMax(&most[0], far_to);
        atomicMax(&most[1], seen_to);
    }
    __syncthreads();
    const int most_seen = most[1];

    // ---- Steps ----
    auto stage_queries = [&](int first) {
        for (int i = thread; i < ROWS * SLICE; i += THREADS) {
            const int r = i / SLICE, c = i % SLICE;
            const int at = first_row + r;
            f32 x = 0.0f;
            if (at < all_rows && first + c < D_KEY) {
                const i64 h = i64(head) * p.group + at / count;
                x = p.scale * to_f32(row<E>(p.q, s.q_batch, h, s.q_first + chunk.first + at % count)[first + c]);
            }
            m.queries[c * PITCH + r] = x;
        }
    };
    // Logits of KEYS tokens: key(t, c) is element c of the t-th.
    auto logits = [&](auto key) {
        f32 x[4][KN];
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < KN; j++) x[i][j] = 0.0f;
        for (int slice = 0; slice < SLICES; slice++) {
            const int first = slice * SLICE;
            if (SLICES > 1) {
                __syncthreads();
                stage_queries(first);
            }
            for (int i = thread; i < SLICE * KEYS; i += THREADS) {
                const int t = i / SLICE, c = i % SLICE;
                m.keys[c * KEY_PITCH + t] = m.live[t] != 0.0f && first + c < D_KEY ? key(t, first + c) : 0.0f;
            }
            __syncthreads();
#pragma unroll 4
            for (int c = 0; c < SLICE; c++) {
                const float4 a = load4(m.queries + c * PITCH + 4 * high);
                const f32 q[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
                for (int j = 0; j < KN; j += 4) {
                    const float4 b = load4(m.keys + c * KEY_PITCH + 4 * low + 8 * j);
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        x[i][j] = fmaf(q[i], b.x, x[i][j]);
                        x[i][j + 1] = fmaf(q[i], b.y, x[i][j + 1]);
                        x[i][j + 2] = fmaf(q[i], b.z, x[i][j + 2]);
                        x[i][j + 3] = fmaf(q[i], b.w, x[i][j + 3]);
                    }
                }
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < KN; j += 4)
                store4(m.logits + (4 * high + i) * KEY_PITCH + 4 * low + 8 * j,
                       make_float4(x[i][j], x[i][j + 1], x[i][j + 2], x[i][j + 3]));
    };
    // Tokens [first, first + KEYS) of the chunk's window: which are there, their decays and logits.
    auto window_logits = [&](int first) {
        __syncthreads();
        for (int t = thread; t < KEYS; t += THREADS) {
            const i64 at = chunk.window + first + t;
            const bool is = at < s.tokens && live[at];
            m.live[t] = is ? 1.0f : 0.0f;
            const float2 both = is && g ? split(g[at]) : make_float2(0.0f, 0.0f);
            m.g[t] = both.x;
            m.g[KEYS + t] = both.y;
        }
        __syncthreads();
        logits([&](int t, int c) { return to_f32(token<KV>(p.k, s, p.gathered, head, chunk.window + first + t)[c]); });
        __syncthreads();
    };
    // exp(g_a - g_t) of the t-th token.
    auto log_decay = [&](float2 a, int t) { return difference(a, make_float2(m.g[t], m.g[KEYS + t])); };
    auto decay = [&](float2 a, int t) {
        if (!g) return 1.0f;
        const f32 log = log_decay(a, t);
        return log < -60.0f ? 0.0f : expf(log);
    };
    auto polynomial = [&](f32 x) {
        f32 y;
        if constexpr (HIGHEST <= 8) {
            y = coefficients[HIGHEST];
#pragma unroll
            for (int i = HIGHEST - 1; i >= 0; i--) y = fmaf(y, x, coefficients[i]);
        } else {
            y = p.coefficients[HIGHEST];
            for (int i = HIGHEST - 1; i >= 0; i--) y = fmaf(y, x, p.coefficients[i]);
        }
        return y;
    };

    // ---- The far part of the sums, and coefficients ----
    if (SLICES == 1) stage_queries(0);
    const bool read = chunk.prefix >= 0 && (chunk.prefix > 0 || has_sums);
    const i64 heads_rows = i64(p.heads) * p.group * p.rows;
    const i64 local_row = (i64(blockIdx.y) * p.group + (query_head - i64(head) * p.group)) * p.rows + (s.row - p.first_row) + query;
    auto far_den = [&](int plane) {
        f32 sum = 0.0f;
        if (read && there)
            for (int part = 0; part < p.parts; part++) sum += p.den[(i64(part) * p.plane_count + plane) * heads_rows + local_row];
        return sum * left;
    };
    f64 level = 0.0;
#if EACH
    f32 each[MOMENTS];
    {
        f32 moments[MOMENTS];
        for (int i = 0; i < MOMENTS; i++) moments[i] = 0.0f;
        for (int first = 0; first < most[0]; first += KEYS) {
            window_logits(first);
            for (int i = half; i < KEYS; i += 2) {
                if (first + i >= far_to || m.live[i] == 0.0f) continue;
                const f32 x = m.logits[row_index * KEY_PITCH + i];
                f32 power = decay(anchor, i);
#pragma unroll UNROLLED
                for (int j = 0; j < MOMENTS; j++) {
                    moments[j] += power;
                    power *= x;
                }
            }
        }
        f64 sums[MOMENTS], c[MOMENTS];
        for (int i = 0; i < MOMENTS; i++) {
            const int plane = p.plane_of[i];
            const f32 both = moments[i] + __shfl_xor_sync(0xffffffffu, moments[i], 1);
            sums[i] = plane >= 0 ? f64(both + far_den(plane)) : 0.0;
            c[i] = 0.0;
            each[i] = 0.0f;
        }
        if (there && has_far) {
            Noise noise{p.relative, p.absolute, 0.0};
            if (read) {
                f32 square = 0.0f;
                for (int i = 0; i < D_KEY; i++) {
                    const f32 x = p.scale * to_f32(row<E>(p.q, s.q_batch, query_head, s.q_first + query)[i]);
                    square = fmaf(x, x, square);
                }
                const f64 before = p.reach_before ? p.reach_before[slot] : 0.0;
                noise.reach = sqrt(fmax(f64(p.reach[slot]), before) * f64(square));
            }
            const Fit fit = fit_series<MOMENTS>(p.rule, p.tau, nullptr, sums, MOMENTS, noise, 0.0, c, p.terms);
            level = fit.log_scale;
            den = f32(fit.denominator);
            for (int i = 0; i < p.terms; i++) each[i] = f32(c[i]);
        }
        if constexpr (HIGHEST <= 8) {
            for (int i = 0; i < KEPT; i++) coefficients[i] = each[i];
        }
    }
    auto weigh = [&](f32 x) {
        if constexpr (HIGHEST <= 8) {
            return polynomial(x);
        } else {
            f32 y = each[HIGHEST];
            for (int i = HIGHEST - 1; i >= 0; i--) y = fmaf(y, x, each[i]);
            return y;
        }
    };
#else
    if constexpr (HIGHEST <= 8) {
#pragma unroll
        for (int i = 0; i <= HIGHEST; i++) coefficients[i] = p.coefficients[i];
    }
    den = far_den(0);
    auto weigh = polynomial;
#endif
    if (has_far) {
        const f64 scale = level + gap;
        top = scale < f64(LOWEST) ? LOWEST : f32(scale);
    }
    const f32 far_top = top;

    // The numerators of all planes become one.
    f32 sum[4][CN];
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < CN; j++) sum[i][j] = 0.0f;
    if (chunk.prefix >= 0) {
        for (int order = 0; order < (EACH ? MOMENTS : 1); order++) {
            const int plane = EACH ? p.plane_of[order] : 0;
            if (plane < 0) continue;
            __syncthreads();
#if EACH
            if (half == 0) m.factor[row_index] = read && has_far ? left * each[order] : 0.0f;
#else
            if (half == 0) m.factor[row_index] = read ? left : 0.0f;
#endif
            __syncthreads();
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int r = 4 * high + i;
                const int at = first_row + r;
                const f32 factor = m.factor[r];
                if (at >= all_rows || !(factor != 0.0f)) continue;
                const i64 line = (i64(blockIdx.y) * p.group + at / count) * p.rows + (s.row - p.first_row) + chunk.first + at % count;
                for (int part = 0; part < p.parts; part++) {
                    const f32* from = p.num + ((i64(part) * p.plane_count + plane) * heads_rows + line) * D_VALUE + first_column;
#pragma unroll
                    for (int j = 0; j < CN; j++) {
                        const int c = CN % 4 == 0 ? 4 * low + j % 4 + 8 * (j / 4 * 4) : low + 8 * j;
                        if (first_column + c < D_VALUE) sum[i][j] = fmaf(factor, from[c], sum[i][j]);
                    }
                }
            }
        }
    }

    // Weights take the logits' places; near ones may raise the shift, by which all before is divided.
    // Tokens before `far` are far, those before `to` are seen; the first is number `first`.
    auto weights = [&](int first, int far, int to, float2 own) {
        f32* x = m.logits + row_index * KEY_PITCH;
        f32 factor = 1.0f;
        if (has_near) {
            f32 now = top;
            for (int i = half; i < KEYS; i += 2) {
                if (first + i < far || first + i >= to || m.live[i] == 0.0f) continue;
                if (g) x[i] += log_decay(own, i);
                now = fmaxf(now, x[i]);
            }
            now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, 1));
            factor = now == top ? 1.0f : expf(top - now);
            den *= factor;
            top = now;
        }
        const f32 far_factor = has_near && top != far_top ? expf(far_top - top) : 1.0f;
        for (int i = half; i < KEYS; i += 2) {
            f32 w = 0.0f;
            if (m.live[i] != 0.0f && first + i < to) {
                if (first + i < far) {
                    w = weigh(x[i]) * decay(anchor, i) * far_factor;
#if !EACH
                    den += w;
#endif
                } else {
                    w = expf(x[i] - top);
                    den += w;
                }
            }
            x[i] = w;
        }
        if (half == 0) m.factor[row_index] = factor;
    };
    auto add_values = [&]() {
        if (has_near) {
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < CN; j++) sum[i][j] *= m.factor[4 * high + i];
        }
#pragma unroll 2
        for (int t = 0; t < KEYS; t += 4) {
            f32 w[4][4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float4 a = load4(m.logits + (4 * high + i) * KEY_PITCH + t);
                w[i][0] = a.x, w[i][1] = a.y, w[i][2] = a.z, w[i][3] = a.w;
            }
#pragma unroll
            for (int k = 0; k < 4; k++) {
                f32 v[CN];
                const f32* values = m.values + (t + k) * COLUMNS;
#pragma unroll
                for (int j = 0; j < CN; j++) {
                    if constexpr (CN % 4 == 0) {
                        if (j % 4 == 0) {
                            const float4 a = load4(values + 4 * low + 8 * j);
                            v[j] = a.x, v[j + 1] = a.y, v[j + 2] = a.z, v[j + 3] = a.w;
                        }
                    } else {
                        v[j] = values[low + 8 * j];
                    }
                }
#pragma unroll
                for (int i = 0; i < 4; i++)
#pragma unroll
                    for (int j = 0; j < CN; j++) sum[i][j] = fmaf(w[i][k], v[j], sum[i][j]);
            }
        }
    };
    // The second of a row's threads begins with nothing, and both have the same shift.
    if (half == 1) den = 0.0f;

    for (int first = 0; first < most_seen; first += KEYS) {
        window_logits(first);
        for (int i = thread; i < KEYS * COLUMNS; i += THREADS) {
            const int t = i / COLUMNS, c = first_column + i % COLUMNS;
            m.values[i] = m.live[t] != 0.0f && c < D_VALUE
                ? to_f32(token<KV>(p.v, s, p.gathered, head, chunk.window + first + t)[c]) : 0.0f;
        }
        weights(first, far_to, seen_to, reference);
        __syncthreads();
        add_values();
    }
    if (p.sinks > 0) {
        const i64 base = i64(head) * p.sink_works + s.sink;
        for (int first = 0; first < s.sinks; first += KEYS) {
            __syncthreads();
            for (int t = thread; t < KEYS; t += THREADS) {
                const bool is = first + t < s.sinks && p.sink_live[s.sink + first + t];
                m.live[t] = is ? 1.0f : 0.0f;
                const float2 both = is && g ? split(p.sink_g[base + first + t]) : make_float2(0.0f, 0.0f);
                m.g[t] = both.x;
                m.g[KEYS + t] = both.y;
            }
            __syncthreads();
            logits([&](int t, int c) { return p.sink_keys[(base + first + t) * D_KEY + c]; });
            for (int i = thread; i < KEYS * COLUMNS; i += THREADS) {
                const int t = i / COLUMNS, c = first_column + i % COLUMNS;
                m.values[i] = m.live[t] != 0.0f && c < D_VALUE ? p.sink_values[(base + first + t) * D_VALUE + c] : 0.0f;
            }
            __syncthreads();
            weights(first, 0, int(old), reference);
            __syncthreads();
            add_values();
        }
    }

    // ---- One normalisation ----
    const f32 all = den + __shfl_xor_sync(0xffffffffu, den, 1);
    if (half == 0) {
        m.den[row_index] = all;
        if (blockIdx.z == 0 && there) {
            const bool finite = all * 0.0f == 0.0f;
            if (!finite || all <= 0.0f) {
                atomicAdd(finite ? &p.tally->non_positive : &p.tally->non_finite, u64(1));
                const u64 place = (u64(chunk.sequence) * p.kv_heads * p.group + query_head) * p.most_queries + query;
                atomicMax(&p.tally->first, ~place);
            }
        }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int at = first_row + 4 * high + i;
        if (at >= all_rows) continue;
        const f32 total = m.den[4 * high + i];
        const i64 h = i64(head) * p.group + at / count;
        E* out = row<E>(p.y, s.q_batch, h, s.q_first + chunk.first + at % count) + first_column;
#pragma unroll
        for (int j = 0; j < CN; j++) {
            const int c = CN % 4 == 0 ? 4 * low + j % 4 + 8 * (j / 4 * 4) : low + 8 * j;
            if (first_column + c < D_VALUE) out[c] = from_f32<E>(sum[i][j] / total);
        }
    }
}
