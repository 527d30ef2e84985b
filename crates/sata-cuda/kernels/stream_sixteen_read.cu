// Queries of a segment, heads of 16: sums of what precedes their chunk, and the keys since one by one: see stream_sixteen.cuh.
//
// Before the warpgroups that hold the sums add a chunk's keys they round sums times coefficients to bf16 into shared memory, two
// buffers in turn, where two other warpgroups find them, which read for 64 queries each and weigh keys since the frontier in
// pieces of 64.
//
// Reads q [batch][heads][tokens][16], k, v [batch][kv_heads][tokens][16 | D_VALUE] bf16, keys since the frontier once per 64
// queries and once for sums; writes y like q. FLOPs: 4 * FEATURES * NP a token and head, and 2 * (16 + NP) a key since the
// frontier, which are 64 at a time.
constexpr int SUMMING = 2;
#include "stream_sixteen.cuh"

// Matrix instructions of a group when queries read.
constexpr int READ_GROUP = 2;
// Planes of 16 bytes a row: [2][64 tokens] of keys, [NT][64 tokens] of values and ones, [NT][FEATURES] of sums.
constexpr int PLANE = PIECE * 16 + 32, SUM_PLANE = FEATURES * 16;
// Queries [64][48 bytes]; with decay g as two f32, and g at the frontier and at the last token that is far.
constexpr int QUERY_ROW = 48, QUERY_G = PIECE * QUERY_ROW, QUERY_BYTES = QUERY_G + (HAS_G ? PIECE * 8 + 16 : 0);
// A piece: keys, values, ones; with decay g f64, fall = log2(e) (g at its last token - g) f32, 2^fall f32.
constexpr int PIECE_VALUES = 2 * PLANE, PIECE_G = PIECE_VALUES + NT * PLANE, PIECE_FALL = PIECE_G + PIECE * 8;
constexpr int PIECE_BYTES = PIECE_G + (HAS_G ? PIECE * 16 : 0);
// Two of each for each warpgroup that reads.
constexpr int READERS = SUM_SHARED, READER_BYTES = 2 * (QUERY_BYTES + PIECE_BYTES);
constexpr int PUBLISHED = (READERS + 2 * READER_BYTES + 127) / 128 * 128;
constexpr int COEFFICIENTS = PUBLISHED + 2 * NT * SUM_PLANE;
constexpr int BARS = COEFFICIENTS + FEATURES * 4;
using PublishedRing = Ring<2, BARS>;
static_assert(QUERY_BYTES % 16 == 0 && PIECE_BYTES % 16 == 0, "core matrices are aligned");
static_assert(BARS + 4 * 8 == UNIT_BYTES, "shared memory differs from what Rust asks for");

// Rounds sums times coefficients to where queries read them: `to` and `by` are of the warpgroup's own features.
DEV void publish(const Sums& sums, u8* to, const f32* by) {
    const int thread = hopper::thread_here() & 127, warp = thread / 32, lane = thread % 32;
    u8* const own = to + (warp * 16 + lane % 16) * 16;
    by += warp * 16 + lane / 4;
#pragma unroll
    for (int j = 0; j < OWN_TILES; j++) {
        const f32 low = by[64 * j], high = by[64 * j + 8];
        u32 r[NT][2];
#pragma unroll
        for (int n = 0; n < NT; n++) {
            // Beside the sum of ones there is nothing.
            r[n][0] = pack2(sums.v[j][4 * n] * low, n < NV ? sums.v[j][4 * n + 1] * low : 0.0f);
            r[n][1] = pack2(sums.v[j][4 * n + 2] * high, n < NV ? sums.v[j][4 * n + 3] * high : 0.0f);
        }
#pragma unroll
        for (int n = 0; n + 1 < NT; n += 2) {
            const u32 four[4] = {r[n][0], r[n][1], r[n + 1][0], r[n + 1][1]};
            store_matrices<4>(own + (n + lane / 16) * SUM_PLANE + j * 1024, four);
        }
        if constexpr (NT % 2) store_matrices<2>(own + (NT - 1) * SUM_PLANE + j * 1024, r[NT - 1]);
    }
}

// A warpgroup that sums, of two.
template <int WHICH>
DEV void sum(const Stream& p, const Walk& w, const Bases& bases, u8* at, u32 base) {
    Sums sums;
    each_accumulator(sums, [](f32& x) { x = 0.0f; });
    if (w.segment.before >= 0) {
        const f32* from = p.sums + (i64(w.segment.before) * p.heads + w.local) * (FEATURES * NP);
        each_sum<WHICH>(
            sums,
            [&](int offset, f32& x, f32& y) {
                const float2 two = *reinterpret_cast<const float2*>(from + offset);
                x = two.x, y = two.y;
            },
            [&](int offset, f32& x) { x = from[offset]; });
    }
    const int begin = w.frontier(w.segment.first), end = w.frontier(w.segment.end - 1);
    PublishedRing published{base, 1};
    int stage = 0;
    if (begin < end) load_for_sums(p, w, bases, at, begin, end);
    copy_async_commit();
#pragma unroll 1
    for (int c = w.segment.first; c < w.segment.end; c++) {
        // Of the segment's last chunk nobody reads what it adds to the sums.
        const int from = w.frontier(c), to = c + 1 == w.segment.end ? from : w.frontier(c + 1);
        f64 from_g = 0.0, to_g = 0.0;
        if constexpr (HAS_G) from_g = w.before(from), to_g = w.before(to);
        published.wait_empty();
        publish(sums, at + PUBLISHED + published.stage() * NT * SUM_PLANE + WHICH * OWN_TILES * 1024,
                reinterpret_cast<const f32*>(at + COEFFICIENTS) + WHICH * OWN_TILES * 64);
        proxy_fence();
        published.filled();
        if (HAS_G && from < to) {
            const f32 left = exp2_fast(f32(to_g - from_g) * LOG2E);
            each_accumulator(sums, [=](f32& x) { x *= left; });
        }
        add<WHICH>(sums, p, w, bases, at, base, from, to, end, to_g, stage);
    }
    copy_async_wait<0>();
}

// Words of rows g and g + 8: elements 2t + i, 2t + i + 1, modulo 16.
struct Words {
    u32 x[2][D];
};
DEV u32 product(const Words& w, int row, int s, int a, int b) { return mul2(mul2(w.x[row][s], w.x[row][(s + a) % D]), w.x[row][(s + b) % D]); }
// A's word of an orbit: of a row (or the one 8 after), and from the element s on.
DEV u32 feature(const Words& w, int tile, int orbit, int row, int s) {
    const Tile x = tile_of(tile);
    if (x.a >= 0) return product(w, row, s, x.a, 4 * x.m + orbit);
    if (x.a == SECOND) return mul2(w.x[row][s], w.x[row][(s + 4 * x.m + orbit) % D]);
    if (orbit == 0) return product(w, row, s, 5, 10);
    if (orbit == 1) return s == 0 ? mul2(w.x[row][0], w.x[row][8]) : BF16_ONES;
    if (orbit == 2) return w.x[row][s];
    return product(w, row, s, 3, 7);
}
// What queries read of the sums.
DEV void read(f32 (&acc)[NA], const u8* row, int t, u32 address) {
    Words w;
#pragma unroll
    for (int k = 0; k < 2; k++) {
#pragma unroll
        for (int i = 0; i < D; i += 2) w.x[k][i] = *reinterpret_cast<const u32*>(row + k * 8 * QUERY_ROW + ((t + i / 2) & 7) * 4);
#pragma unroll
        for (int i = 0; i < D; i += 2) w.x[k][i + 1] = between(w.x[k][i], w.x[k][(i + 2) % D]);
    }
    const Descriptor<128, SUM_PLANE> b(address);
#pragma unroll
    for (int step = 0; step < 4 * WIDE_TILES; step += READ_GROUP) {
        u32 a[READ_GROUP][4];
#pragma unroll
        for (int i = 0; i < READ_GROUP; i++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                if (!is_again((step + i) / 4, (step + i) % 4)) a[i][e] = feature(w, (step + i) / 4, (step + i) % 4, e % 2, e / 2 * 8);
        mma_fence();
#pragma unroll
        for (int i = 0; i < READ_GROUP; i++)
            if (!is_again((step + i) / 4, (step + i) % 4)) Mma<NP>::template run<1>(acc, a[i][0], a[i][1], a[i][2], a[i][3], b.at((step + i) * 256));
        mma_commit();
        mma_wait<1>();
    }
    mma_wait<0>();
    mma_touch(acc);
}

// A warpgroup that reads: 64 rows of each chunk, the first and the second half in turn, so that both weigh as many keys.
DEV void answer(const Stream& p, const Walk& w, const Bases& bases, u8* at, u32 base, int reader) {
    constexpr int STAGES = 2 * QUERY_BYTES;
    u8* const own = at + READERS + reader * READER_BYTES;
    const u32 own_base = base + READERS + reader * READER_BYTES;
    auto rows_of = [&](int c) { return c * CHUNK + ((reader + c) & 1) * PIECE; };
    // Pieces that the rows of a chunk see.
    auto count = [&](int c) {
        const int frontier = w.frontier(c);
        return min(int(u32(w.end(c) - frontier + PIECE - 1) / PIECE), int(u32(rows_of(c) - frontier) / PIECE) + 1);
    };
    auto load = [&](int turn, int stage, int c, int h, int n) {
        const int thread = hopper::thread_here() & 127, end = w.end(c);
        if (n == 0) {
            u8* const to = own + turn * QUERY_BYTES;
            const int rows = rows_of(c);
            copy_rows<D, PIECE, 128>(to, QUERY_ROW, 16, bases.q + h * p.q.head, p.q.token, rows, end, thread);
            if constexpr (HAS_G) {
                const int frontier = w.frontier(c);
                const int far = thread == PIECE || !HAS_NEAR ? frontier : min(w.since(rows), end);
                if (thread < PIECE) copy_async<8>(to + QUERY_G + thread * 8, w.g + min(rows + thread, end - 1), 8);
                else if (thread < PIECE + 2) copy_async<8>(to + QUERY_G + thread * 8, w.g + max(far - 1, 0), far > 0 ? 8 : 0);
            }
        }
        u8* const to = own + STAGES + stage * PIECE_BYTES;
        const int first = w.frontier(c) + n * PIECE;
        copy_rows<D, PIECE, 128>(to, 16, PLANE, bases.k, p.k.token, first, end, thread);
        copy_rows<D_VALUE, PIECE, 128>(to + PIECE_VALUES, 16, PLANE, bases.v, p.v.token, first, end, thread);
        if constexpr (HAS_G)
            if (thread < PIECE) copy_async<8>(to + PIECE_G + thread * 8, w.g + min(first + thread, end - 1), 8);
    };
    PublishedRing published{base, 0};
    int turn = 0, stage = 0;
    load(0, 0, w.segment.first, 0, 0);
    copy_async_commit();
#pragma unroll 1
    for (int c = w.segment.first; c < w.segment.end; c++)
#pragma unroll 1
        for (int h = 0; h < p.group; h++, turn ^= 1) {
            f32 acc[NA], shift[2] = {0.0f, 0.0f};
            const int rows = rows_of(c), frontier = w.frontier(c), pieces = count(c);
            const u8* const queries = own + turn * QUERY_BYTES;
            // From which token on weights are exact. Where all are, the first ones' largest is what they are relative to.
            const int since = HAS_NEAR ? w.since(rows) : 0;
            f32 limit = since <= 0 ? -INFINITY : LARGE;
            // Piece n is there, and queries with the first; what comes next is on its way.
            auto arrive = [&](int n) {
                copy_async_wait<0>();
                if constexpr (HAS_G) {
                    // All of the piece's g, and the queries', have to be there.
                    barrier_sync(2 + reader, 128);
                    const int thread = hopper::thread_here() & 127;
                    u8* const piece = own + STAGES + stage * PIECE_BYTES;
                    if (thread < PIECE) {
                        const f64* const g = reinterpret_cast<const f64*>(piece + PIECE_G);
                        const f32 x = f32(g[PIECE - 1] - g[thread]) * LOG2E;
                        f32* const fall = reinterpret_cast<f32*>(piece + PIECE_FALL);
                        fall[thread] = x, fall[PIECE + thread] = exp2_fast(x);
                    } else if (n == 0) {
                        u8* const g = own + turn * QUERY_BYTES + QUERY_G + (thread - PIECE) * 8;
                        *reinterpret_cast<float2*>(g) = halves(*reinterpret_cast<const f64*>(g));
                        if (thread < PIECE + 2) *reinterpret_cast<float2*>(g + PIECE * 8) = halves(*reinterpret_cast<const f64*>(g + PIECE * 8));
                    }
                }
                proxy_fence();
                barrier_sync(2 + reader, 128);
                int next_c = c, next_h = h, next = n + 1, next_turn = turn;
                if (next == pieces) next = 0, next_h++, next_turn ^= 1;
                if (next_h == p.group) next_h = 0, next_c++;
                if (next_c < w.segment.end) load(next_turn, stage ^ 1, next_c, next_h, next);
                copy_async_commit();
            };
            arrive(0);
            {
                const int lane = lane_here(), t = lane % 4, g = (hopper::thread_here() & 127) / 32 * 16 + lane / 4;
                const u8* const row = queries + g * QUERY_ROW;
                auto row_g = [&](int k) { return reinterpret_cast<const float2*>(queries + QUERY_G)[g + 8 * k]; };
#pragma unroll
                for (int i = 0; i < NA; i++) acc[i] = 0.0f;
                if (h == 0) published.wait_full();
                read(acc, row, t, base + PUBLISHED + published.stage() * NT * SUM_PLANE);
                if (h + 1 == p.group) published.release();
                if constexpr (HAS_G) {
                    const float2* const ends = reinterpret_cast<const float2*>(queries + QUERY_G) + PIECE;
#pragma unroll
                    for (int k = 0; k < 2; k++) {
                        if constexpr (HAS_NEAR) shift[k] = first_shift(row_g(k), ends[1]);
                        const f32 left = exp2_fast(difference(row_g(k), ends[0]) * LOG2E - shift[k]);
#pragma unroll
                        for (int m = 0; m < NT; m++) acc[4 * m + 2 * k] *= left, acc[4 * m + 2 * k + 1] *= left;
                    }
                }
            }
#pragma unroll 1
            for (int n = 0;;) {
                const int lane = lane_here(), t = lane % 4, g = (hopper::thread_here() & 127) / 32 * 16 + lane / 4;
                const u8* const row = queries + g * QUERY_ROW;
                auto row_g = [&](int k) { return reinterpret_cast<const float2*>(queries + QUERY_G)[g + 8 * k]; };
                const int first = frontier + n * PIECE;
                const u32 address = own_base + STAGES + stage * PIECE_BYTES;
                f32 s[32];
                {
#pragma unroll
                    for (int i = 0; i < 32; i++) s[i] = 0.0f;
                    const u32* const x = reinterpret_cast<const u32*>(row) + t;
                    const u32 a[4] = {x[0], x[2 * QUERY_ROW], x[4], x[2 * QUERY_ROW + 4]};
                    const Descriptor<PLANE, 128> keys(address);
                    mma_fence();
                    Mma<64>::run<0>(s, a[0], a[1], a[2], a[3], keys.at(0));
                    mma_commit();
                    mma_wait<0>();
                    mma_touch(s);
                }
                const u8* const piece = own + STAGES + stage * PIECE_BYTES;
                f32 fade[2] = {};
                if constexpr (HAS_G) {
                    const float2 end_g = halves(reinterpret_cast<const f64*>(piece + PIECE_G)[PIECE - 1]);
#pragma unroll
                    for (int k = 0; k < 2; k++) fade[k] = difference(row_g(k), end_g) * LOG2E;
                }
                u32 weights[16];
                weigh(p, s, weights, acc, shift, limit, fade, reinterpret_cast<const f32*>(piece + PIECE_FALL) + 2 * t, HAS_NEAR && first >= since, first == rows, g, t);
                const Descriptor<128, PLANE> values(address + PIECE_VALUES);
                mma_fence();
#pragma unroll
                for (int i = 0; i < 4; i++)
                    Mma<NP>::template run<1>(acc, weights[4 * i], weights[4 * i + 1], weights[4 * i + 2], weights[4 * i + 3], values.at(i * 256));
                mma_commit();
                mma_wait<0>();
                mma_touch(acc);
                stage ^= 1;
                if (++n == pieces) break;
                arrive(n);
            }

            // Divides, and writes outputs.
            const int lane = lane_here(), t = lane % 4;
            int token = rows + (hopper::thread_here() & 127) / 32 * 16 + lane / 4;
            const i64 head = w.head * p.group + h;
            bf16* y = bases.y + h * p.y.head + token * p.y.token + 2 * t;
#pragma unroll
            for (int k = 0; k < 2; k++, token += 8, y += 8 * p.y.token) {
                const f32 total = __shfl_sync(ALL_LANES, acc[4 * NV + 2 * k], lane & ~3);
                if (token >= w.tokens) continue;
                if (t == 0 && !(total > 0.0f && total < INFINITY)) {
                    // Rare; kept as its complement, so that the largest is the first.
                    const u64 place = (u64(w.segment.sequence) * p.kv_heads * p.group + head) * p.most_queries + token;
                    atomicAdd(total * 0.0f == 0.0f ? &p.tally->non_positive : &p.tally->non_finite, u64(1));
                    atomicMax(&p.tally->first, ~place);
                }
                const f32 inverse = reciprocal_fast(total);
#pragma unroll
                for (int m = 0; m < NV; m++) *reinterpret_cast<u32*>(y + 8 * m) = pack2(acc[4 * m + 2 * k] * inverse, acc[4 * m + 2 * k + 1] * inverse);
            }
        }
    copy_async_wait<0>();
}

extern "C" __global__ void __launch_bounds__(512, 1) stream_sixteen_read(const __grid_constant__ Stream p) {
    DYNAMIC_SHARED(at);
    const int group = int(threadIdx.x) / 128;
    const u32 base = smem(at);
    __shared__ Walk w;
    __shared__ Bases bases;
    if (threadIdx.x == 0) {
        w.find(p, blockIdx.x);
        find(bases, p, w);
    }
    for (int i = int(threadIdx.x); i < FEATURES; i += 512) reinterpret_cast<f32*>(at + COEFFICIENTS)[i] = p.coefficients[i];
    if (group < 2) {
        write_ones(at);
    } else {
        // Beside values of pieces.
        const int i = int(threadIdx.x) - 2 * CHUNK;
        u8* const stage = at + READERS + i / CHUNK * READER_BYTES + 2 * QUERY_BYTES + i / PIECE % 2 * PIECE_BYTES;
        *reinterpret_cast<uint4*>(stage + PIECE_VALUES + NV * PLANE + i % PIECE * 16) = make_uint4(0x3f80u, 0, 0, 0);
    }
    if (threadIdx.x == 0) {
        PublishedRing::init(base, 8, 8);
        hopper::barrier_init_done();
    }
    proxy_fence();
    __syncthreads();
    // A thread of each warpgroup has 128 registers to begin with.
    if (group == 0) {
        more_registers<152>();
        sum<0>(p, w, bases, at, base);
    } else if (group == 1) {
        more_registers<152>();
        sum<1>(p, w, bases, at, base);
    } else {
        fewer_registers<104>();
        answer(p, w, bases, at, base, group - 2);
    }
}
