// Queries read far sums: of each query and plane, num[c] = sum over features of a m_f Phi_f(q) sums[f][c], and den
// likewise of z. A plane is one order's, or all of them together.
//
// Shapes: q [tokens][D_KEY] of E (a view), times `scale`; sums [features][D_VALUE] and z [features], f32: the state's,
// or of a piece (what comes before and with it); num [parts][planes][heads' rows][D_VALUE], den [parts][planes]
// [heads' rows], f32; `factors` as for sums: bit 31 of the first says that all but the last are as in the feature
// before. Features come in groups of at most 32 of one order.
// Blocks: ROWS queries of one chunk (over the query heads of a key/value head, head by head) times COLUMNS columns;
// 32 features a step: features of queries are made in shared memory (a thread has its own four queries), then
// multiplied by sums from registers, TM x TN a thread. `parts` blocks share the features of one tile.
// Bytes: features * (D_VALUE + 1) * 4 read per block, from L2; queries * planes * parts * (D_VALUE + 1) * 4 written.
// FLOPs: 2 * queries * features * (D_VALUE + 1), and about 2 per feature, query and tile of columns.
// Defines: D_KEY, D_VALUE, E; TM, TN, COLUMNS (generic.cuh); STAGED: whether queries are brought to shared memory;
// READ_BYTES, SHARED_BYTES (without factors).
#include "generic.cuh"

constexpr int STEP = 32;           // features of a step
constexpr int FLUSH = 64;          // steps after which sums go to memory, so that they do not get too unlike
constexpr int PITCH = ROWS + 4;    // of transposed queries and features
constexpr int QUADS = ROWS / 4;
constexpr int MAKERS = THREADS / QUADS > 0 ? THREADS / QUADS : 1;  // threads that share a quad's features
constexpr int QUADS_EACH = (QUADS + THREADS - 1) / THREADS;        // quads that a thread has

// Neighbouring features of one order.
struct Group {
    i32 first, count, order;
    f32 coefficient;
};

struct Read {
    View q;
    const Sequence* sequences;
    const Chunk* chunks;
    const u32* factors;
    const f32* multiplicities;
    const Group* groups;
    const i32* planes;       // [planes + 1]: the groups of each plane
    StateSums state;
    const f32* sums;         // [slot's pieces][features][D_VALUE]
    const f32* z;
    f32* num;
    f32* den;
    i64 features;
    i64 first_piece, first_row, rows;  // of those in work arrays
    f32 scale;
    i32 width, plane_count, parts, tiles;
    i32 first_head, heads, kv_heads, group, first_chunk;
};
SAME_SIZE(Read, READ_BYTES);

struct Shared {
    f32 features[STEP * PITCH];
    f32 sums[STEP * COLUMNS];
    f32 z[STEP];
    f32 queries[STAGED ? D_KEY * PITCH : 4];
};
SAME_SIZE(Shared, SHARED_BYTES);

extern "C" __global__ void __launch_bounds__(THREADS, 1) far_read(const __grid_constant__ Read p) {
    DYNAMIC_SHARED(memory);
    Shared& m = *reinterpret_cast<Shared*>(memory);
    u32* factors = reinterpret_cast<u32*>(memory + sizeof(Shared));  // [STEP][width]
    const int thread = int(threadIdx.x);
    const Chunk chunk = p.chunks[p.first_chunk + blockIdx.x / p.tiles];
    const int count = int(chunk.count), all_rows = count * p.group;
    const int first_row = int(blockIdx.x % p.tiles) * ROWS;
    if (chunk.prefix < 0 || first_row >= all_rows) return;
    const Sequence s = p.sequences[chunk.sequence];
    const int head = p.first_head + int(blockIdx.y);
    const int part = int(blockIdx.z) / COLUMN_TILES, column_tile = int(blockIdx.z) % COLUMN_TILES;
    const int first_column = column_tile * COLUMNS;
    // Which sums: the state's, or a piece's.
    const bool of_state = chunk.prefix == 0;
    const i64 slot = of_state ? i64(chunk.sequence) * p.kv_heads + head
                              : (s.piece - p.first_piece) * p.heads + i64(blockIdx.y) * s.pieces + chunk.prefix - 1;
    const i64 first_sum = slot * p.features * D_VALUE;
    const f32* z = (of_state ? p.state.z : p.z) + slot * p.features;
    // Element c of the query of a row.
    auto query = [&](int r, int c) -> f32 {
        const int at = first_row + r;
        if (at >= all_rows) return 0.0f;
        const i64 query_head = i64(head) * p.group + at / count;
        return p.scale * to_f32(row<E>(p.q, s.q_batch, query_head, s.q_first + chunk.first + at % count)[c]);
    };
    if constexpr (STAGED) {
        for (int i = thread; i < ROWS * D_KEY; i += THREADS) m.queries[i % D_KEY * PITCH + i / D_KEY] = query(i / D_KEY, i % D_KEY);
    }
    const int row_thread = thread / COLUMN_THREADS, column = thread % COLUMN_THREADS;
    const bool busy = row_thread < ROW_THREADS;
    // Which features of a step this thread makes, and of which queries.
    const int maker = MAKERS > 1 ? thread / QUADS : 0;
    const bool makes = maker < MAKERS;
    const int from = STEP * maker / MAKERS, to = STEP * (maker + 1) / MAKERS;

    f32 sum[TM][TN];
    float4 den[QUADS_EACH];
    for (int plane = 0; plane < p.plane_count; plane++) {
        const int begin = p.planes[plane], groups = p.planes[plane + 1] - begin;
        const int first_group = begin + int(i64(groups) * part / p.parts);
        const int last_group = begin + int(i64(groups) * (part + 1) / p.parts);
        bool begun = false;
        int steps = 0;
#pragma unroll
        for (int i = 0; i < TM; i++)
#pragma unroll
            for (int j = 0; j < TN; j++) sum[i][j] = 0.0f;
#pragma unroll
        for (int i = 0; i < QUADS_EACH; i++) den[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        for (int n = first_group; n < last_group || !begun; n++) {
            if (n < last_group) {
                const Group group = p.groups[n];
                __syncthreads();
                for (int i = thread; i < STEP * COLUMNS; i += THREADS) {
                    const int f = i / COLUMNS, c = first_column + i % COLUMNS;
                    f32 x = 0.0f;
                    if (f < group.count && c < D_VALUE) {
                        const i64 feature = group.first + f;
                        const i64 at = first_sum + feature * D_VALUE + c;
                        x = (of_state ? p.state.sum(at) : p.sums[at]) * (p.multiplicities[feature] * group.coefficient);
                    }
                    m.sums[i] = x;
                }
                for (int f = thread; f < STEP; f += THREADS) {
                    const i64 feature = group.first + f;
                    m.z[f] = f < group.count ? z[feature] * (p.multiplicities[feature] * group.coefficient) : 0.0f;
                }
                for (int i = thread; i < group.count * p.width; i += THREADS)
                    factors[i] = p.factors[i64(group.first) * p.width + i];
                __syncthreads();
                if (makes) {
#pragma unroll
                    for (int i = 0; i < QUADS_EACH; i++) {
                        const int quad = MAKERS > 1 ? thread % QUADS : thread + i * THREADS;
                        if (quad >= QUADS) continue;
                        auto element = [&](u32 c) {
                            if constexpr (STAGED) {
                                return load4(m.queries + c * PITCH + 4 * quad);
                            } else {
                                return make_float4(query(4 * quad, c), query(4 * quad + 1, c), query(4 * quad + 2, c),
                                                   query(4 * quad + 3, c));
                            }
                        };
                        float4 prefix = make_float4(1.0f, 1.0f, 1.0f, 1.0f);
                        for (int f = from; f < to; f++) {
                            float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                            if (f < group.count) {
                                const u32* factor = factors + f * p.width;
                                if (f == from || !(factor[0] >> 31)) {
                                    prefix = make_float4(1.0f, 1.0f, 1.0f, 1.0f);
                                    for (int j = 0; j + 1 < group.order; j++) {
                                        const float4 y = element(factor[j] & 0x7fffffffu);
                                        prefix.x *= y.x, prefix.y *= y.y, prefix.z *= y.z, prefix.w *= y.w;
                                    }
                                }
                                x = prefix;
                                if (group.order > 0) {
                                    const float4 y = element(factor[group.order - 1] & 0x7fffffffu);
                                    x.x *= y.x, x.y *= y.y, x.z *= y.z, x.w *= y.w;
                                }
                                const f32 zf = m.z[f];
                                den[i].x = fmaf(x.x, zf, den[i].x), den[i].y = fmaf(x.y, zf, den[i].y);
                                den[i].z = fmaf(x.z, zf, den[i].z), den[i].w = fmaf(x.w, zf, den[i].w);
                            }
                            store4(m.features + f * PITCH + 4 * quad, x);
                        }
                    }
                }
                __syncthreads();
                if (busy) {
                    const f32* features = m.features + row_thread * TM;
                    const f32* values = m.sums + column * TN;
#pragma unroll 4
                    for (int f = 0; f < STEP; f++) {
                        f32 a[TM], b[TN];
                        load(a, features + f * PITCH);
                        load(b, values + f * COLUMNS);
#pragma unroll
                        for (int i = 0; i < TM; i++)
#pragma unroll
                            for (int j = 0; j < TN; j++) sum[i][j] = fmaf(a[i], b[j], sum[i][j]);
                    }
                }
                steps++;
                if (steps % FLUSH != 0 && n + 1 < last_group) continue;
            }
            // To memory, added to what is there.
            const i64 place = i64(part) * p.plane_count + plane;
            const i64 heads_rows = i64(p.heads) * p.group * p.rows;
            auto out_row = [&](int at) {
                const i64 query_head = i64(blockIdx.y) * p.group + at / count;
                return place * heads_rows + query_head * p.rows + (s.row - p.first_row) + chunk.first + at % count;
            };
            if (busy) {
#pragma unroll
                for (int i = 0; i < TM; i++) {
                    const int at = first_row + row_thread * TM + i;
                    if (at < all_rows) {
                        f32* out = p.num + out_row(at) * D_VALUE + first_column + column * TN;
#pragma unroll
                        for (int j = 0; j < TN; j++)
                            if (first_column + column * TN + j < D_VALUE) out[j] = begun ? out[j] + sum[i][j] : sum[i][j];
                    }
#pragma unroll
                    for (int j = 0; j < TN; j++) sum[i][j] = 0.0f;
                }
            }
            // Threads that share a query's features put their parts together.
            __syncthreads();
            f32* shares = m.features;  // [MAKERS][ROWS]
#pragma unroll
            for (int i = 0; i < QUADS_EACH; i++) {
                const int quad = MAKERS > 1 ? thread % QUADS : thread + i * THREADS;
                if (makes && quad < QUADS) store4(shares + maker * ROWS + 4 * quad, den[i]);
                den[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            }
            __syncthreads();
            if (column_tile == 0) {
                for (int r = thread; r < ROWS; r += THREADS) {
                    f32 x = 0.0f;
                    for (int i = 0; i < MAKERS; i++) x += shares[i * ROWS + r];
                    const int at = first_row + r;
                    if (at < all_rows) {
                        f32* out = p.den + out_row(at);
                        *out = begun ? *out + x : x;
                    }
                }
            }
            begun = true;
        }
    }
}
