// Small heads: one pass over a sequence, whose sums stay in registers.
//
// A *unit* of WARPS warps owns the sums of one key/value head over a *segment* of one sequence, and walks over its chunks
// of CHUNK tokens. Sums lie in the accumulators of the matrix unit, f32, their features split over the warps: rows are
// features, columns a value, a one and zeros (NP). For queries they are multiplied by coefficients, rounded to bf16 and put
// into shared memory once per chunk; keys and values of the chunk, and of what is near, are weighed one by one.
//
// Compile-time constants (-D):
//   D_KEY    8 or 16;  D_VALUE a multiple of 8;  TERMS P
//   FEATURE_TILES  tiles of 16 features;  HALVES the features, eight at a time (below)
//   WARPS    warps of a unit, of which each SPLIT share ROW_TILES tiles of 16 queries;  UNITS units of a block of threads, RESIDENTS of
//            which a multiprocessor is to run at once
//   HAS_G    whether weights decay;  HAS_NEAR whether some are exact
//   GIVES, TAKES  where features are too many for the registers of one block: whether others' numerators and denominators are
//            added to, and whether these are left to others
//   UNIT_BYTES shared memory of a unit
//
// Features come in halves of a tile, eight monomials each: {order, i, j, k, l} stands for x[i+s] x[j+s] x[k+s] x[l+s], the first
// `order` factors, indices modulo D_KEY, s = 0 ... 7. A lane that keeps elements rotated by its own row or column makes its
// monomials of all halves by the same code, one packed product each. Where a monomial comes twice, the second coefficient is 0.
#pragma once
#include "mma.cuh"
#include "stream_types.cuh"

constexpr int D = D_KEY, WORDS = D / 2;
constexpr int NT = D_VALUE / 8 + 1, NP = 8 * NT;        // tiles of 8 columns, columns
constexpr int TILES = FEATURE_TILES;
constexpr int OWN = (TILES + WARPS - 1) / WARPS;        // tiles of features of a warp
constexpr int GROUPS = WARPS / SPLIT;                   // warps that share queries count once
constexpr int CHUNK = 16 * ROW_TILES * GROUPS, CHUNK_TILES = CHUNK / 16;
constexpr f32 LOG2E = 1.4426950408889634f;

// Bytes between rows in shared memory: odd multiples of 16, so that eight rows lie in different banks.
constexpr int KEY_STRIDE = D == 8 ? 16 : 2 * D + 16;
constexpr int COLUMN_STRIDE = (NT % 2 ? NT : NT + 1) * 16;

// What a unit has in shared memory. Two stages, so that the next piece of keys and the next queries arrive while these are used.
constexpr int PIECE_KEYS = CHUNK * KEY_STRIDE, PIECE_VALUES = CHUNK * COLUMN_STRIDE, PIECE_G = HAS_G ? CHUNK * 8 : 0;
constexpr int STAGE = 2 * PIECE_KEYS + PIECE_VALUES + 2 * PIECE_G;  // queries, keys; values; g of queries and of keys
constexpr int TRANSPOSED = 2 * STAGE;                               // keys [tile][2 D][16], tokens in the order of lanes
constexpr int FALL = TRANSPOSED + CHUNK * D * 4;                    // with decay: fall f32, 2^fall f32, weights bf16
constexpr int SUMS = FALL + (HAS_G ? CHUNK * 12 : 0);
constexpr int EXCHANGE = SUMS + TILES * 16 * COLUMN_STRIDE;         // between the warps that share queries
constexpr int EXCHANGE_LANE = NT * 16 + 16;
constexpr int BASES = EXCHANGE + (SPLIT > 1 ? GROUPS * ROW_TILES * 32 * EXCHANGE_LANE : 0);
constexpr int SHARED = BASES + 64;
static_assert(SHARED == UNIT_BYTES, "shared memory differs from what Rust asks for");
static_assert(SPLIT <= 2, "two warps share queries at most");

struct Half {
    int order, i, j, k, l;
};
struct Program {
    Half at[2 * TILES] = {HALVES};
    constexpr Program() {}
};
// The monomials of one half for a lane: `x` holds pairs of elements (of one row), or of one element of two tokens, rotated.
DEVICE u32 product(const Half& h, const u32 (&x)[D]) {
    if (h.order == 0) return BF16_ONES;
    u32 y = x[h.i];
    if (h.order > 1) y = mul2(y, x[h.j]);
    if (h.order == 3) y = mul2(y, x[h.k]);
    if (h.order == 4) y = mul2(y, mul2(x[h.k], x[h.l]));
    return y;
}

template <int N>
struct Const {
    static constexpr int value = N;
};
// Calls f with the warp's number as a constant: each warp makes features of its own.
template <int W = 0, class F>
DEVICE void by_warp(int warp, F f) {
    if constexpr (W == WARPS - 1) {
        f(Const<W>());
    } else {
        if (warp == W) f(Const<W>());
        else by_warp<W + 1>(warp, f);
    }
}
__host__ __device__ constexpr int first_tile_of(int warp) { return warp * TILES / WARPS; }

// All warps of a unit meet.
DEVICE void meet(int unit) {
    if constexpr (WARPS == 1) __syncwarp();
    else barrier_sync(1 + unit, WARPS * 32);
}

// Where a unit's tensors begin, in shared memory because registers are scarce.
struct Bases {
    const bf16 *q, *k, *v;  // of the sequence's first token and the unit's (first) head
    bf16* y;
    f32* partial;
    const f64* g;           // or null
    u64 place;              // of the first query among all queries
    i32 tokens, end;        // of the sequence; chunks of the segment
};

// Where a unit is, and what every step needs.
struct Place {
    u8* shared;
    int unit, warp, lane, thread;       // of the block; of the unit
    int near, block;

    DEVICE Bases* bases() const { return reinterpret_cast<Bases*>(shared + BASES); }
    DEVICE const f64* g() const { return bases()->g; }
    DEVICE int tokens() const { return bases()->tokens; }
    // Tokens before this are in the sums when chunk c is read.
    DEVICE int frontier(int c) const {
        if (!HAS_NEAR) return c * CHUNK;
        const int b = c * CHUNK / block - near;
        return b > 0 ? b * block : 0;
    }
    DEVICE int end(int c) const { return min((c + 1) * CHUNK, tokens()); }
    DEVICE int pieces(int c) const { return !HAS_NEAR ? 1 : (end(c) - frontier(c) + CHUNK - 1) / CHUNK; }
    // log2 of what is left of the sums of tokens before `from` when they are counted from `to`.
    DEVICE f32 faded(int from, int to) const {
        // Within the tensor even where it does not count: at one term compute-sanitizer saw g[-1] read.
        const f64 before = g()[max(from - 1, 0)], last = g()[max(to - 1, 0)];
        const f64 a = from > 0 ? before : 0.0, b = to > 0 ? last : 0.0;
        return f32(b - a) * LOG2E;
    }
    DEVICE u8* stage(int i) const { return shared + i * STAGE; }
    DEVICE u8* queries(int i) const { return stage(i); }
    DEVICE u8* keys(int i) const { return stage(i) + PIECE_KEYS; }
    DEVICE u8* values(int i) const { return stage(i) + 2 * PIECE_KEYS; }
    DEVICE f64* query_g(int i) const { return reinterpret_cast<f64*>(stage(i) + 2 * PIECE_KEYS + PIECE_VALUES); }
    DEVICE f64* key_g(int i) const { return query_g(i) + CHUNK; }
    DEVICE f32* fall() const { return reinterpret_cast<f32*>(shared + FALL); }
    DEVICE f32* fallen() const { return fall() + CHUNK; }
    DEVICE u16* weights() const { return reinterpret_cast<u16*>(fall() + 2 * CHUNK); }
};

// Whether there is a unit for these threads; if so, which, and which of the launch's key/value heads it is of.
DEVICE bool find(const Stream& p, u8* shared, Place& at, Segment& segment, i64& local) {
    const int warp = int(threadIdx.x) / 32;
    at.unit = warp / WARPS, at.warp = warp % WARPS, at.lane = int(threadIdx.x) % 32, at.thread = int(threadIdx.x) % (WARPS * 32);
    at.shared = shared + at.unit * UNIT_BYTES;
    at.near = p.near, at.block = p.block;
    const i64 unit = i64(blockIdx.x) * UNITS + at.unit;
    if (unit >= i64(p.segment_count) * p.heads) return false;
    segment = p.segments[unit / p.heads];
    local = unit % p.heads;
    const i64 head = p.first_head + local;
    const Sequence s = p.sequences[segment.sequence];
    if (at.thread == 0) {
        Bases& to = *at.bases();
        to.q = row<bf16>(p.q, s.q_batch, head * p.group, s.q_first);
        to.k = row<bf16>(p.k, s.k_batch, head, s.k_first);
        to.v = row<bf16>(p.v, s.k_batch, head, s.k_first);
        to.y = row<bf16>(p.y, s.q_batch, head * p.group, s.q_first);
        to.partial = p.partial + (local * p.group * p.rows + s.row) * NP;
        to.g = HAS_G ? p.g + head * p.works + s.work : nullptr;
        to.place = (u64(segment.sequence) * p.kv_heads + head) * p.group * p.most_queries;
        to.tokens = s.tokens;
        to.end = segment.end;
    }
    meet(at.unit);
    return true;
}

// Rows of DIM bf16 from `from` on: tokens first ... first+CHUNK-1, those before `end`, the others 0.
template <int DIM>
DEVICE void load_rows(const Place& at, u8* to, int bytes, const bf16* from, i64 stride, int first, int end) {
    constexpr int PARTS = DIM / 8, TOKENS = WARPS * 32 / PARTS;  // 16 bytes each; tokens of all threads at once
    const int token = at.thread / PARTS, part = at.thread % PARTS;
    u8* const own = to + token * bytes + part * 16;
#pragma unroll
    for (int i = 0; i < CHUNK; i += TOKENS) {
        if ((WARPS * 32 % PARTS != 0 || CHUNK % TOKENS != 0) && (token >= TOKENS || token + i >= CHUNK)) break;
        const int there = first + token + i;
        const bool is = there < end;
        copy_async<16>(own + i * bytes, from + (is ? there : 0) * stride + part * 8, is ? 16 : 0);
    }
}
DEVICE void load_g(const Place& at, f64* to, int first, int end) {
    for (int i = at.thread; i < CHUNK; i += WARPS * 32)
        copy_async<8>(to + i, at.g() + (first + i < end ? first + i : end - 1), 8);
}
// Keys and values of one piece, and the ones beside values.
DEVICE void load_piece(const Stream& p, const Place& at, int stage, int first, int end) {
    load_rows<D>(at, at.keys(stage), KEY_STRIDE, at.bases()->k, p.k.token, first, end);
    load_rows<D_VALUE>(at, at.values(stage), COLUMN_STRIDE, at.bases()->v, p.v.token, first, end);
    for (int i = at.thread; i < CHUNK; i += WARPS * 32)
        *reinterpret_cast<uint4*>(at.values(stage) + i * COLUMN_STRIDE + 2 * D_VALUE) = make_uint4(first + i < end ? 0x3f80u : 0u, 0, 0, 0);
    if constexpr (HAS_G) load_g(at, at.key_g(stage), first, end);
}

// Keys of a piece, transposed: word [tile][element][2t, 2t+1 | 2t+8, 2t+9] is what lanes of row `element` need. Elements come twice,
// so that where rotated ones lie takes no arithmetic.
DEVICE void transpose_keys(const Place& at, int stage) {
    const int lane = at.lane, g = lane / 4, t = lane % 4;
    for (int tile = at.warp; tile < CHUNK_TILES; tile += WARPS) {
        const u8* keys = at.keys(stage) + tile * 16 * KEY_STRIDE;
        u8* to = at.shared + TRANSPOSED + tile * D * 64 + g * 32 + t * 8;
        if constexpr (D == 8) {
            u32 r[2];
            load_matrices<2, true>(r, keys + (lane % 16) * KEY_STRIDE);
            for (int i = 0; i < 2; i++) *reinterpret_cast<uint2*>(to + i * D * 32) = make_uint2(r[0], r[1]);
        } else {
            u32 r[4];
            load_matrices<4, true>(r, keys + (lane % 16) * KEY_STRIDE + lane / 16 * 16);
            for (int i = 0; i < 2; i++) {
                *reinterpret_cast<uint2*>(to + i * D * 32) = make_uint2(r[0], r[1]);
                *reinterpret_cast<uint2*>(to + i * D * 32 + 8 * 32) = make_uint2(r[2], r[3]);
            }
        }
    }
}

// Fragments of the first N tiles of columns of 16 tokens, or features: [column tile][half of the tokens].
template <int N>
DEVICE void load_values(u32 (&b)[N][2], const u8* rows, int lane) {
    const u8* from = rows + (lane % 16) * COLUMN_STRIDE + lane / 16 * 16;
#pragma unroll
    for (int n = 0; n + 1 < N; n += 2) {
        u32 r[4];
        load_matrices<4, true>(r, from + 16 * n);
        b[n][0] = r[0], b[n][1] = r[1], b[n + 1][0] = r[2], b[n + 1][1] = r[3];
    }
    if constexpr (N % 2) {
        u32 r[2];
        load_matrices<2, true>(r, rows + (lane % 16) * COLUMN_STRIDE + 16 * (N - 1));
        b[N - 1][0] = r[0], b[N - 1][1] = r[1];
    }
}

// fall = log2(e) (g at the last token of the tile - g at the token), 2^fall; and, as bf16, what weighs tokens when the
// frontier is at `to`.
DEVICE void fall_of_keys(const Place& at, int stage, int first, int to) {
    if constexpr (HAS_G) {
        const f64* g = at.key_g(stage);
        const f64 end = to > 0 ? at.g()[to - 1] : 0.0;
        for (int i = at.thread; i < CHUNK; i += WARPS * 32) {
            const f32 fall = f32(g[i | 15] - g[i]) * LOG2E;
            at.fall()[i] = fall;
            at.fallen()[i] = exp2_fast(fall);
            at.weights()[i] = bf16_bits(first + i < to ? exp2_fast(f32(end - g[i]) * LOG2E) : 0.0f);
        }
    }
}

// What a warp has of the sums: of values, by tiles of features and of columns; and of ones, where each tile of features has a
// column of its own, since a tile of columns for each would be empty but for one.
constexpr int NV = NT - 1;
struct Sums {
    f32 v[OWN][NV][4];
    f32 z[(OWN + 7) / 8][4];
};

// Adds features times values of the tiles of a piece that come before the next frontier.
DEVICE void absorb(const Place& at, Sums& sums, int stage, int tiles) {
    const int lane = at.lane, g = lane / 4, t = lane % 4;
    by_warp(at.warp, [&](auto own) {
        constexpr int FIRST = first_tile_of(decltype(own)::value), COUNT = first_tile_of(decltype(own)::value + 1) - FIRST;
        constexpr Program P;
#pragma unroll 1
        for (int tile = 0; tile < tiles; tile++) {
            u32 x[2][D], b[NV][2], w[2] = {BF16_ONES, BF16_ONES};
            const u8* keys = at.shared + TRANSPOSED + tile * D * 64 + g * 32 + t * 8;
#pragma unroll
            for (int i = 0; i < D; i++) {
                const uint2 word = *reinterpret_cast<const uint2*>(keys + i * 32);
                x[0][i] = word.x, x[1][i] = word.y;
            }
            load_values(b, at.values(stage) + tile * 16 * COLUMN_STRIDE, lane);
            if constexpr (HAS_G) {
                const u8* weights = reinterpret_cast<const u8*>(at.weights()) + tile * 32 + t * 4;
                w[0] = *reinterpret_cast<const u32*>(weights), w[1] = *reinterpret_cast<const u32*>(weights + 16);
#pragma unroll
                for (int n = 0; n < NV; n++) b[n][0] = mul2(b[n][0], w[0]), b[n][1] = mul2(b[n][1], w[1]);
            }
#pragma unroll
            for (int i = 0; i < COUNT; i++) {
                const Half low = P.at[2 * (FIRST + i)], high = P.at[2 * (FIRST + i) + 1];
                const u32 a[4] = {product(low, x[0]), product(high, x[0]), product(low, x[1]), product(high, x[1])};
#pragma unroll
                for (int n = 0; n < NV; n++) mma(sums.v[i][n], a, b[n]);
                const u32 ones[2] = {g == i % 8 ? w[0] : 0, g == i % 8 ? w[1] : 0};
                mma(sums.z[i / 8], a, ones);
            }
        }
    });
}

// Calls f(number) for each accumulator.
template <class F>
DEVICE void each_accumulator(Sums& sums, F f) {
#pragma unroll
    for (int i = 0; i < OWN; i++)
#pragma unroll
        for (int n = 0; n < NV; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) f(sums.v[i][n][e]);
#pragma unroll
    for (int i = 0; i < (OWN + 7) / 8; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) f(sums.z[i][e]);
}
DEVICE void clear(Sums& sums) {
    each_accumulator(sums, [](f32& x) { x = 0.0f; });
}
DEVICE void scale(Sums& sums, f32 by) {
    each_accumulator(sums, [=](f32& x) { x *= by; });
}

// The columns beside values, where nothing but ones will be written: zeros.
DEVICE void clear_columns(const Place& at) {
    for (int i = at.thread; i < TILES * 16; i += WARPS * 32)
        *reinterpret_cast<uint4*>(at.shared + SUMS + i * COLUMN_STRIDE + 2 * D_VALUE) = make_uint4(0, 0, 0, 0);
}
// Puts sums times coefficients into shared memory, in bf16, where queries read them.
DEVICE void publish(const Place& at, const Sums& sums, const f32* coefficients) {
    const int g = at.lane / 4, t = at.lane % 4, first = first_tile_of(at.warp), end = first_tile_of(at.warp + 1);
    // Rows of matrices: of features 0-7 and 8-15 of columns 8n on, then of the next columns.
    u8* const rows = at.shared + SUMS + (first * 16 + at.lane % 16) * COLUMN_STRIDE;
    u8* const ones = at.shared + SUMS + (first * 16 + g) * COLUMN_STRIDE + 2 * D_VALUE;
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        if (first + i >= end) break;
        const f32 low = coefficients[(first + i) * 16 + g], high = coefficients[(first + i) * 16 + 8 + g];
        u32 r[NV][2];
#pragma unroll
        for (int n = 0; n < NV; n++) {
            r[n][0] = pack2(sums.v[i][n][0] * low, sums.v[i][n][1] * low);
            r[n][1] = pack2(sums.v[i][n][2] * high, sums.v[i][n][3] * high);
        }
#pragma unroll
        for (int n = 0; n + 1 < NV; n += 2) {
            const u32 four[4] = {r[n][0], r[n][1], r[n + 1][0], r[n + 1][1]};
            store_matrices<4>(rows + at.lane / 16 * 16 + i * 16 * COLUMN_STRIDE + 16 * n, four);
        }
        if constexpr (NV % 2) store_matrices<2>(rows + i * 16 * COLUMN_STRIDE + 16 * (NV - 1), r[NV - 1]);
        if (t == i % 8 / 2) {
            u8* const to = ones + i * 16 * COLUMN_STRIDE;
            *reinterpret_cast<u16*>(to) = bf16_bits(sums.z[i / 8][i % 2] * low);
            *reinterpret_cast<u16*>(to + 8 * COLUMN_STRIDE) = bf16_bits(sums.z[i / 8][2 + i % 2] * high);
        }
    }
}
// Calls pair(feature, column, two neighbouring sums of values) and one(feature, sum of ones) for what a lane has.
template <class F, class G>
DEVICE void each_sum(const Place& at, Sums& sums, F pair, G one) {
    const int g = at.lane / 4, t = at.lane % 4, first = first_tile_of(at.warp), end = first_tile_of(at.warp + 1);
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        if (first + i >= end) break;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int feature = (first + i) * 16 + 8 * h + g;
#pragma unroll
            for (int n = 0; n < NV; n++) pair(feature, 8 * n + 2 * t, sums.v[i][n][2 * h], sums.v[i][n][2 * h + 1]);
            if (t == i % 8 / 2) one(feature, sums.z[i / 8][2 * h + i % 2]);
        }
    }
}
