// What hopper_read.cu is made of: its parameters and shared memory, the ring of stages, features of queries and the products
// with the sums, and which queries a block of threads takes.
#pragma once
#include "hopper.cuh"
#include "hopper_mma.cuh"

constexpr int SLAB_STEPS = HAS3 ? 9 : STEPS_L > 4 ? STEPS_L : 4;  // at most
constexpr int STEP_BYTES = 16 * NP * 2;
constexpr int STAGE_BYTES = (SLAB_STEPS * STEP_BYTES > TILE_BYTES ? SLAB_STEPS * STEP_BYTES : TILE_BYTES) + 127 & ~127;
constexpr int QUERIES = WARPGROUPS * ROW_TILES * 64;
constexpr int Q_WORDS = D_KEY == 8 ? 4 : D_KEY / 2 + 4;  // words of a query's row in shared memory: no two rows in one bank
constexpr int THREADS = WARPGROUPS * 128 + 128;
// Whether a block of threads goes on with other queries after its first: where each takes long, registers matter more.
// The words of the next queries are copied while it is at the ones before.
constexpr bool PERSISTS = !HAS3 && (NP <= 40 || WARPGROUPS == 2);
// Per query: its words, g, the shift of its weights; per row tile the first near key.
constexpr int ROWS_BYTES = QUERIES * (Q_WORDS * 4 * (PERSISTS ? 2 : 1) + HAS_G * 8 + HAS_NEAR * 4) + HAS_NEAR * 64;

// Whether the dot products of all row tiles are on their way at once: they need registers.
constexpr bool TOGETHER = ROW_TILES * (NA + 32) <= (HAS_NEAR || HAS_G ? 64 : 96);

// What is found in denominators: the layout of generic_local.cu's.
struct Tally {
    u64 non_positive, non_finite, first;
};
struct ReadQueries {
    View q, y;
    const u16* far;
    const char* tiles;
    const Sequence* sequences;
    const int2* items;          // sequence, first row (a multiple of QUERIES, counted in the window)
    const double* references;   // [kv head][chunk]
    const int* last;            // [works]: tokens of the window up to the last that is there; or null: all are
    Tally* tally;
    i64 most_queries;
    int tile_count, chunk_count, chunk_tokens, group, first_head, heads;
    int block, near_blocks;     // -1: nothing is near
    int full, initial;          // full: all queries read all sums; initial: there may be sums before the first chunk
    float exp2_scale;           // scale * log2(e)
    int item_count, head_count, unused;  // of this launch
    float a[8];                 // coefficients with the scale's powers
};

// The slabs of the sums in program order, each a stage of the ring; key tiles follow.
constexpr int T_SLABS = HAS3 ? 2 * NB * NB : 0, R_SLABS = R_BLOCKS / 16, Q_SLABS = Q_BLOCKS / 8, L_SLABS = L_BLOCKS > 0 ? 1 : 0;

// The ring of stages as one warpgroup sees it.
struct Ring {
    u32 base, bars;
    int stage;
    u32 phase;
    DEV_MEMBER void next() {
        if (++stage == STAGES) {
            stage = 0;
            phase ^= 1;
        }
    }
    DEV_MEMBER u32 acquire() {
        barrier_wait(bars + 8 * stage, phase);
        return base + stage * STAGE_BYTES;
    }
    DEV_MEMBER u32 acquire_second() {
        const bool wraps = stage + 1 == STAGES;
        const int second = wraps ? 0 : stage + 1;
        barrier_wait(bars + 8 * second, wraps ? phase ^ 1 : phase);
        return base + second * STAGE_BYTES;
    }
    // After all of a warpgroup's reads of the stage have ended, which matrix instructions alone have read.
    DEV_MEMBER void release() {
        group_arrive(bars + 8 * (STAGES + stage), 128);
        next();
    }
    // … which threads too have read, where there are decays or near keys: each lets go itself.
    DEV_MEMBER void release_keys() {
        if constexpr (HAS_G || HAS_NEAR) barrier_arrive(bars + 8 * (STAGES + stage));
        else group_arrive(bars + 8 * (STAGES + stage), 128);
        next();
    }
};

// A's words of a few steps of 16 features.
template <int N> struct Steps {
    u32 a[N][4];
};
// Multiplies; what the steps before were made of may then be overwritten.
template <int N> DEV void multiply(float (&acc)[NA], const Steps<N>& steps, u64 b) {
    mma_fence();
#pragma unroll
    for (int s = 0; s < N; s++) Mma<NP>::run<1>(acc, steps.a[s][0], steps.a[s][1], steps.a[s][2], steps.a[s][3], b + s * (STEP_BYTES >> 4));
    mma_commit();
    mma_wait<1>();
}
DEV u64 sums_descriptor(u32 address) { return descriptor(address, NP * 16, 128); }

// x_i of the thread's two rows, each twice in a word, i = 0 ... 7 of a block; from the quad's own words.
DEV void spread(u32 (&x)[8][2], u32 w0, u32 w1) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const u32 v0 = __shfl_sync(~0u, w0, (lane & ~3) | i), v1 = __shfl_sync(~0u, w1, (lane & ~3) | i);
        x[2 * i][0] = __byte_perm(v0, 0, 0x1010);
        x[2 * i + 1][0] = __byte_perm(v0, 0, 0x3232);
        x[2 * i][1] = __byte_perm(v1, 0, 0x1010);
        x[2 * i + 1][1] = __byte_perm(v1, 0, 0x3232);
    }
}

// 18 steps of T(a; c): xi spread from block a, u = xj * block c.
template <int FIRST, int LAST>
DEV void t_steps(float (&acc)[NA], const u32 (&xi)[8][2], const u32 (&u)[8][2], u64 b) {
    constexpr Pairs P;
#pragma unroll
    for (int s = FIRST; s < LAST; s += 3) {
        Steps<3> steps;
#pragma unroll
        for (int k = 0; k < 3; k++) {
            const int e = 2 * (s + k);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                steps.a[k][2 * h] = mul2(xi[P.i[e + h]][0], u[P.j[e + h]][0]);
                steps.a[k][2 * h + 1] = mul2(xi[P.i[e + h]][1], u[P.j[e + h]][1]);
            }
        }
        multiply(acc, steps, b + (s - FIRST) * (STEP_BYTES >> 4));
    }
}

static_assert(sizeof(ReadQueries) == READ_BYTES && sizeof(Sequence) == SEQUENCE_BYTES && BLOCKS == FEATURE_BLOCKS && TILE_BYTES == KEY_TILE_BYTES, "as in Rust");
static_assert(QUERIES == BLOCK_QUERIES && STAGES * STAGE_BYTES + ROWS_BYTES + STAGES * 16 == READ_SHARED, "as in Rust");

// Some queries of a head, and what they read: sums at the chunk where the first row's far past ends, then keys from there.
struct Rows {
    Sequence seq;
    int sequence, row0, local, kv;          // the head within this launch; its key/value head
    int count, lead;                        // rows of the sequence, the first of them that is a query
    int first_tile, end_tile, sink_tiles, far_chunk;
    int number;
    bool has_far;
};
// Number n of those of this block of threads; false where there are no more.
DEV bool rows_at(const ReadQueries& p, int n, Rows& rows) {
    int place = blockIdx.x, local = blockIdx.y;
    if constexpr (PERSISTS) {
        const i64 at = block_here() + (i64)n * gridDim.x;
        if (at >= (i64)p.item_count * p.head_count) return false;
        place = (int)(at / p.head_count);
        local = (int)(at % p.head_count);
    }
    const int2 item = p.items[place];
    const Sequence seq = p.sequences[item.x];
    rows.number = n;
    rows.seq = seq;
    rows.sequence = item.x;
    rows.row0 = item.y;
    rows.local = local;
    rows.kv = rows.local / p.group;
    rows.count = p.full ? seq.queries : seq.tokens;
    rows.lead = p.full ? 0 : seq.lead;
    const int rows_end = min(item.y + QUERIES, rows.count);
    const int near_start = p.near_blocks < 0 ? item.y : max(0, (item.y / p.block - p.near_blocks) * p.block);
    const int chunk = p.full ? seq.chunks : min(near_start, seq.summed) / p.chunk_tokens;
    rows.has_far = chunk > 0 || p.initial;
    rows.first_tile = p.full ? 0 : chunk * (p.chunk_tokens / KEY_TILE);
    rows.sink_tiles = p.full ? 0 : seq.sink_tiles;
    rows.end_tile = p.full ? 0 : (rows_end + KEY_TILE - 1) / KEY_TILE;
    rows.far_chunk = seq.chunk + chunk;
    return true;
}

// g at a token, of the records of its head's window.
DEV double g_at(const char* tiles, int t) {
    const char* const record = tiles + (i64)(t / KEY_TILE) * TILE_BYTES;
    return *(const double*)(record + META_END) - (double)(((const float*)(record + META))[t % KEY_TILE] * (1.f / LOG2E));
}
DEV const char* tiles_of_window(const ReadQueries& p, const Rows& rows) {
    return p.tiles + ((i64)rows.kv * p.tile_count + rows.seq.tile) * TILE_BYTES;
}

// Weights are relative to 2^shift. Before anything near has been seen that is 1, unless nothing of the far past would be left
// beside it: then what the last far token has faded to, or NOTHING where nothing is far. Near logits may raise it.
constexpr float NOTHING = -1e30f;
constexpr float FADED = -60.f;
DEV float first_shift(const ReadQueries& p, const Rows& rows, int t, double own) {
    const int far = p.near_blocks < 0 ? t + 1 : max(0, (t / p.block - p.near_blocks) * p.block);
    const int last = far > 0 && p.last ? p.last[rows.seq.work + far - 1] : far;
    if (last == 0 && !(p.initial && rows.seq.folded > 0)) return NOTHING;
    if constexpr (!HAS_G) return 0.f;
    const char* const tiles = tiles_of_window(p, rows);
    const double mark = last > 0 ? g_at(tiles, last - 1) : p.references[(i64)rows.kv * p.chunk_count + rows.seq.chunk];
    const float faded = (float)(own - mark) * LOG2E;
    return faded < FADED ? fmaxf(faded, NOTHING) : 0.f;
}
