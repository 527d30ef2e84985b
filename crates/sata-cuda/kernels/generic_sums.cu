// Sums of features of some tokens: of each piece, sums[f][c] = sum of w_t Phi_f(k_t) v_t[c] and z[f] = sum of
// w_t Phi_f(k_t), where w_t = exp(g_r - g_t), r the piece's last token that is there.
//
// Shapes: k [tokens][D_KEY], v [tokens][D_VALUE] of KV (views); sums [slot's pieces][features][D_VALUE], z [slot's
// pieces][features], f32; factors [features][width]: the elements that a feature is the product of, padded with
// D_KEY, whose element is 1 (bit 31 of the first is not part of it). Any order of features.
// Blocks: FEATURES features times COLUMNS columns of one piece; 32 tokens a step: features are made in shared memory
// (a thread has its own features, whatever the token), then multiplied by values from registers, TM x TN a thread.
// Bytes: pieces * features * (D_VALUE + 1) * 4 written; k and v are read once per block of features, from L2.
// FLOPs: 2 * tokens * features * (D_VALUE + 1), and `width` per feature, token and tile of columns.
// Defines: D_KEY, D_VALUE, KV; TM, TN, COLUMNS (generic.cuh); STAGED: whether keys are brought to shared memory;
// SUMS_BYTES, SHARED_BYTES.
#include "generic.cuh"

constexpr int FEATURES = ROWS;
constexpr int STEP = 32;            // tokens of a step
constexpr int PITCH = STEP + 4;     // of transposed keys
constexpr int FLUSH = 512;          // tokens after which sums go to memory, so that they do not get too unlike
constexpr int OWN = (FEATURES + THREADS - 1) / THREADS;  // features that a thread makes
constexpr int KEPT = 4;             // factors that are kept in registers

struct Sums {
    View k, v;
    const Sequence* sequences;
    const Piece* pieces;
    const u8* live;   // [works]
    const i32* last;  // [works]: how many tokens there are up to the last before the next that is there
    const f64* g;     // [heads][works], or null
    const u32* factors;
    f32* sums;
    f32* z;
    i64 works, features;
    i64 first_piece;  // of those in the work array
    i32 first_head, heads;
    i32 width, tiles, gathered, padding;
};
SAME_SIZE(Sums, SUMS_BYTES);

struct Shared {
    f32 features[STEP * FEATURES];
    f32 values[STEP * COLUMNS];
    f32 weights[STEP];
    f32 keys[STAGED ? (D_KEY + 1) * PITCH : 4];
};
SAME_SIZE(Shared, SHARED_BYTES);

extern "C" __global__ void __launch_bounds__(THREADS, 1) chunk_sums(const __grid_constant__ Sums p) {
    DYNAMIC_SHARED(memory);
    Shared& m = *reinterpret_cast<Shared*>(memory);
    const int thread = int(threadIdx.x);
    const Piece piece = p.pieces[blockIdx.x / p.tiles];
    const Sequence s = p.sequences[piece.sequence];
    const int head = p.first_head + int(blockIdx.y);
    const i64 first_feature = i64(blockIdx.x % p.tiles) * FEATURES;
    const int first_column = int(blockIdx.z) * COLUMNS;
    const i64 slot = (s.piece - p.first_piece) * p.heads + i64(blockIdx.y) * s.pieces + piece.index;
    f32* sums = p.sums + slot * p.features * D_VALUE;
    f32* z = p.z + slot * p.features;

    // The factors of the features that this thread makes.
    u32 factors[OWN][KEPT];
    bool mine[OWN];
    f32 z_sum[OWN];
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        const int at = thread + i * THREADS;
        mine[i] = at < FEATURES && first_feature + at < p.features;
        z_sum[i] = 0.0f;
#pragma unroll
        for (int j = 0; j < KEPT; j++) {
            const bool there = mine[i] && j < p.width;
            factors[i][j] = there ? p.factors[(first_feature + at) * p.width + j] & 0x7fffffffu : u32(D_KEY);
        }
    }
    const int row = thread / COLUMN_THREADS, column = thread % COLUMN_THREADS;
    const bool busy = row < ROW_THREADS;
    f32 sum[TM][TN];
#pragma unroll
    for (int i = 0; i < TM; i++)
#pragma unroll
        for (int j = 0; j < TN; j++) sum[i][j] = 0.0f;

    float2 end = make_float2(0.0f, 0.0f);
    const f64* g = p.g ? p.g + head * p.works + s.work : nullptr;
    if (g) {
        const i64 last = p.last[s.work + piece.first + piece.count - 1];
        if (last > piece.first) end = split(g[last - 1]);
    }
    bool begun = false;
    for (i64 first = 0; first < piece.count; first += STEP) {
        const int count = int(piece.count - first < STEP ? piece.count - first : STEP);
        const i64 t0 = piece.first + first;
        __syncthreads();
        for (int t = thread; t < STEP; t += THREADS) {
            f32 weight = 0.0f;
            if (t < count && p.live[s.work + t0 + t]) {
                weight = 1.0f;
                if (g) {
                    f32 log = difference(end, split(g[t0 + t]));
                    weight = log < -60.0f ? 0.0f : expf(log);
                }
            }
            m.weights[t] = weight;
        }
        __syncthreads();
        if constexpr (STAGED) {
            for (int i = thread; i < (D_KEY + 1) * STEP; i += THREADS) {
                const int t = i / (D_KEY + 1), c = i % (D_KEY + 1);
                f32 x = c == D_KEY ? 1.0f : 0.0f;
                if (c < D_KEY && m.weights[t] != 0.0f) x = to_f32(token<KV>(p.k, s, p.gathered, head, t0 + t)[c]);
                m.keys[c * PITCH + t] = x;
            }
        }
        for (int i = thread; i < STEP * COLUMNS; i += THREADS) {
            const int t = i / COLUMNS, c = first_column + i % COLUMNS;
            const f32 weight = m.weights[t];
            f32 x = 0.0f;
            if (weight != 0.0f && c < D_VALUE) x = weight * to_f32(token<KV>(p.v, s, p.gathered, head, t0 + t)[c]);
            m.values[i] = x;
        }
        __syncthreads();
        // Four tokens of a feature at a time.
        for (int t = 0; t < STEP; t += 4) {
            auto element = [&](u32 c) {
                if constexpr (STAGED) {
                    return load4(m.keys + c * PITCH + t);
                } else {
                    f32 x[4];
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        x[i] = c == D_KEY ? 1.0f : 0.0f;
                        if (c < D_KEY && m.weights[t + i] != 0.0f)
                            x[i] = to_f32(token<KV>(p.k, s, p.gathered, head, t0 + t + i)[c]);
                    }
                    return make_float4(x[0], x[1], x[2], x[3]);
                }
            };
            const float4 weight = load4(m.weights + t);
#pragma unroll
            for (int i = 0; i < OWN; i++) {
                const int at = thread + i * THREADS;
                if (at >= FEATURES) continue;
                float4 x = element(factors[i][0]);
                auto times = [&](float4 y) { x.x *= y.x, x.y *= y.y, x.z *= y.z, x.w *= y.w; };
#pragma unroll
                for (int j = 1; j < KEPT; j++)
                    if (j < p.width) times(element(factors[i][j]));
                for (int j = KEPT; j < p.width; j++)
                    times(element(mine[i] ? p.factors[(first_feature + at) * p.width + j] : u32(D_KEY)));
                f32* to = m.features + t * FEATURES + at;
                to[0] = x.x, to[FEATURES] = x.y, to[2 * FEATURES] = x.z, to[3 * FEATURES] = x.w;
                z_sum[i] = fmaf(x.x, weight.x, fmaf(x.y, weight.y, fmaf(x.z, weight.z, fmaf(x.w, weight.w, z_sum[i]))));
            }
        }
        __syncthreads();
        if (busy) {
            const f32* features = m.features + row * TM;
            const f32* values = m.values + column * TN;
#pragma unroll 4
            for (int t = 0; t < STEP; t++) {
                f32 a[TM], b[TN];
                load(a, features + t * FEATURES);
                load(b, values + t * COLUMNS);
#pragma unroll
                for (int i = 0; i < TM; i++)
#pragma unroll
                    for (int j = 0; j < TN; j++) sum[i][j] = fmaf(a[i], b[j], sum[i][j]);
            }
        }
        if ((first + STEP) % FLUSH != 0 && first + STEP < piece.count) continue;
        // To memory, added to what is there.
        if (busy) {
#pragma unroll
            for (int i = 0; i < TM; i++) {
                const i64 feature = first_feature + row * TM + i;
                if (feature >= p.features) break;
                f32* to = sums + feature * D_VALUE + first_column + column * TN;
#pragma unroll
                for (int j = 0; j < TN; j++) {
                    if (first_column + column * TN + j < D_VALUE) to[j] = begun ? to[j] + sum[i][j] : sum[i][j];
                    sum[i][j] = 0.0f;
                }
            }
        }
        if (blockIdx.z == 0) {
#pragma unroll
            for (int i = 0; i < OWN; i++) {
                const i64 feature = first_feature + thread + i * THREADS;
                if (mine[i]) z[feature] = begun ? z[feature] + z_sum[i] : z_sum[i];
                z_sum[i] = 0.0f;
            }
        }
        begun = true;
    }
}
