// Queries of a segment: sums of what precedes their chunk, and the keys since one by one: see stream_wide.cuh.
//
// Reads q [batch][heads][tokens][32], k, v [batch][kv_heads][tokens][32 | D_VALUE] bf16, keys since the frontier once per chunk
// and query head and once for sums; writes y like q. FLOPs: 4 * FEATURES * NP a token and head, and 2 * (32 + NP) a key since
// the frontier, which are 64 at a time.
constexpr int SUM_STAGES = 3;
#include "stream_wide.cuh"

// Shared memory: stages of sums, then these.
constexpr int PUBLISHED = SUM_SHARED;
constexpr int PIECES = PUBLISHED + 2 * NT * SUM_PLANE;
constexpr int QUERIES = PIECES + PIECE_STAGES * PIECE_BYTES;
constexpr int COEFFICIENTS = QUERIES + QUERY_STAGES * QUERY_BYTES;
constexpr int BARS = COEFFICIENTS + FEATURES * 4;
constexpr int PIECE_BARS = BARS, QUERY_BARS = PIECE_BARS + 2 * PIECE_STAGES * 8, PUBLISHED_BARS = QUERY_BARS + 2 * QUERY_STAGES * 8;
using PieceRing = Ring<PIECE_STAGES, PIECE_BARS, 32>;
using QueryRing = Ring<QUERY_STAGES, QUERY_BARS, 32>;
using PublishedRing = Ring<2, PUBLISHED_BARS, 32>;
constexpr int TURNS = PUBLISHED_BARS + 4 * 8, TURN_BYTES = 32;  // of the warps that read
constexpr int ONES = TURNS + 8 * TURN_BYTES, ONES_ROW = 34;       // sums of ones f32 [33][34]
static_assert(ONES + 33 * ONES_ROW * 4 + 8 == UNIT_BYTES, "shared memory differs from what Rust asks for");

// Copies keys since the frontier, in pieces. One warp.
DEV void copy_keys(const Stream& p, const Walk& w, u8* at) {
    const int lane = int(threadIdx.x) % 32;
    PieceRing ahead{smem(at), 1}, behind = ahead;
    auto finish = [&] {
        __syncwarp();
        if constexpr (HAS_G) {
            u8* const stage = at + PIECES + behind.stage() * PIECE_BYTES;
            const f64* g = reinterpret_cast<const f64*>(stage + PIECE_G);
            f32* const fall = reinterpret_cast<f32*>(stage + PIECE_FALL);
#pragma unroll
            for (int i = lane; i < PIECE; i += 32) {
                const f32 x = f32(g[PIECE - 1] - g[i]) * LOG2E;
                fall[i] = x, fall[PIECE + i] = exp2_fast(x);
            }
            __syncwarp();
            halve_g<PIECE>(stage + PIECE_G);
        }
        proxy_fence();
        behind.filled();
    };
    bool begun = false;
#pragma unroll 1
    for (int c = w.segment.first; c < w.segment.end; c++)
#pragma unroll 1
        for (int h = 0; h < p.group; h++)
#pragma unroll 1
            for (int first = w.frontier(c), end = w.end(c); first < end; first += PIECE) {
                ahead.wait_empty();
                u8* const stage = at + PIECES + ahead.stage() * PIECE_BYTES;
                copy_rows<4, PIECE>(stage, PLANE, w.keys(p, first), p.k.token, end - first);
                if constexpr (HAS_G) copy_g<PIECE>(stage + PIECE_G, w.g, first, end);
                copy_async_commit();
                ahead.next();
                if (begun) copy_async_wait<1>(), finish();
                begun = true;
            }
    copy_async_wait<0>();
    if (begun) finish();
}
// Copies queries, and values since the frontier. One warp.
DEV void copy_queries(const Stream& p, const Walk& w, u8* at) {
    QueryRing queries{smem(at), 1}, queries_behind = queries;
    PieceRing pieces{smem(at), 1}, pieces_behind = pieces;
    // What has been begun last.
    enum { NOTHING, SOME_QUERIES, SOME_VALUES } last = NOTHING;
    auto finish = [&] {
        if (last == SOME_QUERIES) {
            if constexpr (HAS_G) {
                __syncwarp();
                halve_g<CHUNK + 2>(at + QUERIES + queries_behind.stage() * QUERY_BYTES + QUERY_G);
            }
            queries_behind.filled();
        } else if (last == SOME_VALUES) {
            proxy_fence();
            pieces_behind.filled();
        }
    };
#pragma unroll 1
    for (int c = w.segment.first; c < w.segment.end; c++)
#pragma unroll 1
        for (int h = 0; h < p.group; h++) {
            queries.wait_empty();
            const int begin = c * CHUNK, end = w.end(c);
            u8* const stage = at + QUERIES + queries.stage() * QUERY_BYTES;
            const bf16* const q = row<bf16>(p.q, w.sequence.q_batch, w.head * p.group + h, w.sequence.q_first + begin);
            copy_rows<4, CHUNK, true>(stage, QUERY_PLANE, q, p.q.token, end - begin);
            if constexpr (HAS_G) {
                copy_g<CHUNK>(stage + QUERY_G, w.g, begin, end);
                // At the frontier, and at the last token that is far from the second half.
                const int half = threadIdx.x % 32, far = half == 0 || !HAS_NEAR ? w.frontier(c) : min(w.since(begin + 64), end);
                if (half < 2) copy_async<8>(stage + QUERY_G + (CHUNK + half) * 8, w.g + max(far - 1, 0), far > 0 ? 8 : 0);
            }
            copy_async_commit();
            queries.next();
            copy_async_wait<1>();
            finish();
            last = SOME_QUERIES;
#pragma unroll 1
            for (int first = w.frontier(c); first < end; first += PIECE) {
                pieces.wait_empty();
                copy_rows<NV, PIECE>(at + PIECES + pieces.stage() * PIECE_BYTES + KEY_BYTES, PLANE, w.values(p, first), p.v.token, end - first);
                copy_async_commit();
                pieces.next();
                copy_async_wait<1>();
                finish();
                last = SOME_VALUES;
            }
        }
    copy_async_wait<0>();
    finish();
}

// Rounds sums times coefficients to where queries read them.
DEV void publish(Sums& sums, u8* to, const f32* coefficients, f32* ones) {
    // Asked for anew here and below: what is made of it would be kept in registers from chunk to chunk.
    const int thread = hopper::thread_here() & 127, warp = thread / 32, lane = thread % 32;
    // Sums of ones by way of shared memory, since those who have them are few.
    group_sync(1, 128);
    if (warp < 2) {
        f32* const own = ones + (warp * 16 + lane / 4) * ONES_ROW + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
            for (int h = 0; h < 2; h++)
                *reinterpret_cast<float2*>(own + 8 * h * ONES_ROW + 8 * n) = make_float2(sums.z[4 * n + 2 * h], sums.z[4 * n + 2 * h + 1]);
        if (lane % 4 == 0) own[32] = sums.z[16], own[32 + 8 * ONES_ROW] = sums.z[18];
    } else if (thread == 64) {
        ones[32 * ONES_ROW + 32] = sums.z[16];
    }
    u8* const own = to + (warp * 16 + lane % 16) * 16;
    const f32* const by = coefficients + warp * 16 + lane / 4;
#pragma unroll
    for (int j = 0; j < WIDE_TILES; j++) {
        const f32 low = by[64 * j], high = by[64 * j + 8];
        u32 r[NV][2];
#pragma unroll
        for (int n = 0; n < NV; n++) {
            r[n][0] = pack2(sums.v[j][4 * n] * low, sums.v[j][4 * n + 1] * low);
            r[n][1] = pack2(sums.v[j][4 * n + 2] * high, sums.v[j][4 * n + 3] * high);
        }
#pragma unroll
        for (int n = 0; n + 1 < NV; n += 2) {
            const u32 four[4] = {r[n][0], r[n][1], r[n + 1][0], r[n + 1][1]};
            store_matrices<4>(own + (n + lane / 16) * SUM_PLANE + j * 1024, four);
        }
        if constexpr (NV % 2) store_matrices<2>(own + (NV - 1) * SUM_PLANE + j * 1024, r[NV - 1]);
    }
    group_sync(1, 128);
    const int own_row = hopper::thread_here() & 127;
    u8* const plane = to + NV * SUM_PLANE + own_row * 16;
    auto put = [&](int m, const f32& x) { *reinterpret_cast<u16*>(plane + m * 2048) = bf16_bits(x * coefficients[own_row + 128 * m]); };
    const int part = own_row / 16 % 4, i = own_row % 32, apart = own_row / 64 + part / 2 * 8;
#pragma unroll
    for (int m = 0; m < 4; m++) put(m, ones[i * ONES_ROW + (i + apart + 2 * m) % 32]);
    if (own_row < 64) put(4, ones[part == 0 ? i * ONES_ROW + i + 16 : part < 3 ? (own_row - 16) * ONES_ROW + 32 : 32 * ONES_ROW + 32]);
}

// The warpgroup that sums.
DEV void sum(const Stream& p, const Walk& w, u8* at, u32 base) {
    Sums sums;
    clear(sums);
    if (w.segment.before >= 0) {
        const f32* from = p.sums + (i64(w.segment.before) * p.heads + w.local) * (FEATURES * NP);
        each_pair(sums, [&](int feature, int column, f32& x, f32& y) {
            const float2 two = *reinterpret_cast<const float2*>(from + feature * NP + column);
            x = two.x, y = two.y;
        });
        each_one(sums, [&](int feature, f32& x) { x = from[feature * NP + D_VALUE]; });
    }
    SumRing ring{base, 0};
    PublishedRing published{base, 1};
#pragma unroll 1
    for (int c = w.segment.first; c < w.segment.end; c++) {
        published.wait_empty();
        publish(sums, at + PUBLISHED + published.stage() * NT * SUM_PLANE, reinterpret_cast<const f32*>(at + COEFFICIENTS), reinterpret_cast<f32*>(at + ONES));
        proxy_fence();
        published.filled();
        // Of the segment's last chunk nobody reads what it adds to the sums.
        const int from = w.frontier(c), to = c + 1 == w.segment.end ? from : w.frontier(c + 1);
#pragma unroll 1
        for (int first = from; first < to; first += PIECE) {
            ring.wait_full();
            const u8* const stage = at + ring.stage() * SUM_STAGE;
            if constexpr (HAS_G)
                if (first == from) scale(sums, *reinterpret_cast<const f32*>(stage + SUM_FADE));
            absorb(sums, stage, base + ring.stage() * SUM_STAGE);
            ring.release();
        }
    }
}

// A's words of some steps.
struct Steps {
    u32 a[READ_GROUP][4];
};
using SumsDescriptor = Descriptor<128, SUM_PLANE>;
// Step `first` of a tile and the next.
DEV void multiply(f32 (&acc)[NA], const Steps& steps, const SumsDescriptor& b, int tile, int first) {
    mma_fence();
#pragma unroll
    for (int i = 0; i < READ_GROUP; i++)
        Mma<NP>::run<1>(acc, steps.a[i][0], steps.a[i][1], steps.a[i][2], steps.a[i][3], b.at(tile * 1024 + (first + i) * 256));
    mma_commit();
    mma_wait<1>();
}
// A query's (or two's) elements 2t, 2t+1 moved on by 2i + 8j.
struct Words {
    u32 low[4], high[4];  // rows g, g + 8
};
DEV Words load_words(const u8* row) {
    Words x;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        x.low[j] = *reinterpret_cast<const u32*>(row + j * QUERY_PLANE);
        x.high[j] = *reinterpret_cast<const u32*>(row + j * QUERY_PLANE + 128);
    }
    return x;
}
// Reads by the features of the orbits a and a + 8; y has elements moved on by a.
DEV void read_orbits(f32 (&acc)[NA], const Words& x, const Words& y, const SumsDescriptor& b, int tile) {
#pragma unroll
    for (int from = 0; from < 4; from += READ_GROUP) {
        Steps s;
#pragma unroll
        for (int i = from; i < from + READ_GROUP; i++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int own = i % 2 * 2 + h, other = (own + i / 2) % 4;
                s.a[i - from][2 * h] = mul2(x.low[own], y.low[other]);
                s.a[i - from][2 * h + 1] = mul2(x.high[own], y.high[other]);
            }
        multiply(acc, s, b, tile, from);
    }
}
// What queries read of the sums.
DEV void read(f32 (&acc)[NA], const u8* row, int t, u32 address) {
    const Words x = load_words(row + t * 4);
    // The words 2i further on, which may be in the next plane.
    auto words = [&](int i) { return load_words(row + t * 4 + i * 4 + (t + i >= 4 ? QUERY_PLANE - 16 : 0)); };
    auto between_words = [](const Words& y, const Words& next) {
        Words odd;
#pragma unroll
        for (int j = 0; j < 4; j++) odd.low[j] = between(y.low[j], next.low[j]), odd.high[j] = between(y.high[j], next.high[j]);
        return odd;
    };
    Words y = x;
    // As a loop, since all unrolled is loaded at once, for which there are no registers.
#pragma unroll 1
    for (int i = 0; i < 4; i += 2) {
        // Made anew: carried from turn to turn it would be in registers of lanes.
        const SumsDescriptor b(address + i * 2048);
        // What comes next is loaded before it is needed.
        const Words next = words(i + 1);
        read_orbits(acc, x, y, b, 0);
        read_orbits(acc, x, between_words(y, next), b, 1);
        y = words(i + 2);
        read_orbits(acc, x, next, b, 2);
        read_orbits(acc, x, between_words(next, y), b, 3);
    }
    const u32 last[4][4] = {{mul2(x.low[0], x.low[2]), mul2(x.high[0], x.high[2]), mul2(x.low[1], x.low[3]), mul2(x.high[1], x.high[3])},
                            {x.low[0], x.high[0], x.low[1], x.high[1]},
                            {x.low[2], x.high[2], x.low[3], x.high[3]},
                            {BF16_ONES, BF16_ONES, BF16_ONES, BF16_ONES}};
#pragma unroll
    for (int from = 0; from < 4; from += READ_GROUP) {
        Steps s;
#pragma unroll
        for (int i = 0; i < 4 * READ_GROUP; i++) s.a[i / 4][i % 4] = last[from + i / 4][i % 4];
        multiply(acc, s, SumsDescriptor(address), 8, from);
    }
    mma_wait<0>();
    mma_touch(acc);
}

// Where a warp that reads is: in shared memory, since registers are scarce.
struct Turn {
    int c, h;                        // chunk, query head of the group
    u32 pieces, queries, published;  // of the rings
    u32 unused[3];
};
DEV volatile Turn* turn_of(u8* at) { return reinterpret_cast<volatile Turn*>(at + TURNS) + threadIdx.x / 32 % 8; }
// A lane's own rows, looked up anew where they are needed.
struct Lane {
    int thread;
    DEV_MEMBER Lane() : thread(hopper::thread_here()) {}
    DEV_MEMBER int t() const { return thread % 4; }
    // The first of two among the 64 of the warpgroup; the warpgroup's first among those of chunk c.
    DEV_MEMBER int row() const { return thread % 128 / 32 * 16 + thread % 32 / 4; }
    DEV_MEMBER int rows(int c) const { return ((thread / 128 + c) & 1) * 64; }
};

// Divides, and writes outputs.
DEV void finish(const Stream& p, const Walk& w, u8* at, const f32 (&acc)[NA]) {
    const Lane lane;
    const int t = lane.t(), c = turn_of(at)->c, h = turn_of(at)->h;
    int token = c * CHUNK + lane.rows(c) + lane.row();
    const i64 head = w.head * p.group + h;
    bf16* y = row<bf16>(p.y, w.sequence.q_batch, head, w.sequence.q_first + token) + 2 * t;
    // Or the compiler keeps the product all along.
    int rows = 8;
    hopper::forget(rows);
#pragma unroll
    for (int k = 0; k < 2; k++, token += 8, y += rows * p.y.token) {
        const f32 total = __shfl_sync(ALL_LANES, acc[4 * NV + 2 * k], lane.thread % 32 & ~3);
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

// A warpgroup that reads: 64 rows of each chunk, the first and the second half in turn, so that both weigh as many keys.
DEV void answer(const Stream& p, const Walk& w, u8* at) {
    volatile Turn* const turn = turn_of(at);
    const u32 base = smem(at);
    turn->c = w.segment.first;
    turn->h = 0;
    turn->pieces = 0;
    turn->queries = 0;
    turn->published = 0;
    __syncwarp();
#pragma unroll 1
    while (turn->c < w.segment.end) {
        f32 acc[NA], shift[2] = {0.0f, 0.0f};
        {
            const Lane lane;
            const int c = turn->c;
            QueryRing queries{base, turn->queries};
            PublishedRing published{base, turn->published};
            const int own = lane.rows(c) + lane.row();
            queries.wait_full();
            const u8* const stage = at + QUERIES + queries.stage() * QUERY_BYTES;
#pragma unroll
            for (int n = 0; n < NA; n++) acc[n] = 0.0f;
            published.wait_full();
            read(acc, stage + own * 16, lane.t(), base + PUBLISHED + published.stage() * NT * SUM_PLANE);
            if (turn->h + 1 == p.group) {
                published.release();
                turn->published = published.at;
            }
            if constexpr (HAS_G) {
                const float2* const g = reinterpret_cast<const float2*>(stage + QUERY_G);
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    if constexpr (HAS_NEAR) shift[k] = first_shift(g[own + 8 * k], g[CHUNK + lane.rows(c) / 64]);
                    const f32 left = exp2_fast(difference(g[own + 8 * k], g[CHUNK]) * LOG2E - shift[k]);
#pragma unroll
                    for (int n = 0; n < NT; n++) acc[4 * n + 2 * k] *= left, acc[4 * n + 2 * k + 1] *= left;
                }
            }
        }

        const Lane lane;
        const int g = lane.row(), t = lane.t();
        const int c = turn->c, frontier = w.frontier(c), rows = c * CHUNK + lane.rows(c);
        QueryRing queries{base, turn->queries};
        PieceRing pieces{base, turn->pieces};
        const u8* const queries_at = at + QUERIES + queries.stage() * QUERY_BYTES;
        const u8* const row = queries_at + (lane.rows(c) + g) * 16;
        auto row_g = [&](int k) { return reinterpret_cast<const float2*>(queries_at + QUERY_G)[lane.rows(c) + g + 8 * k]; };
        // From which token on weights are exact. Where all are, the first ones' largest is what they are relative to.
        const int since = HAS_NEAR ? w.since(rows) : 0;
        f32 limit = since <= 0 ? -INFINITY : LARGE;

        const int count = int(u32(w.end(c) - frontier + PIECE - 1) / PIECE), mine = min(count, int(u32(rows - frontier) / PIECE) + 1);
        int n = 0;
#pragma unroll 1
        for (; n < mine; n++) {
            pieces.wait_full();
            const int first = frontier + n * PIECE;
            const u32 address = base + PIECES + pieces.stage() * PIECE_BYTES;
            f32 s[32];
            const Descriptor<PLANE, 128> keys(address);
            {
#pragma unroll
                for (int i = 0; i < 32; i++) s[i] = 0.0f;
                const Words x = load_words(row + t * 4);
                mma_fence();
                Mma<64>::run<0>(s, x.low[0], x.high[0], x.low[1], x.high[1], keys.at(0));
                Mma<64>::run<0>(s, x.low[2], x.high[2], x.low[3], x.high[3], keys.at(2 * PLANE));
                mma_commit();
                mma_wait<0>();
                mma_touch(s);
            }
            const u8* const piece = at + PIECES + pieces.stage() * PIECE_BYTES;
            const f32* const fall = reinterpret_cast<const f32*>(piece + PIECE_FALL) + 2 * t;
            f32 fade[2] = {};
            if constexpr (HAS_G) {
                const float2 end_g = reinterpret_cast<const float2*>(piece + PIECE_G)[PIECE - 1];
#pragma unroll
                for (int k = 0; k < 2; k++) fade[k] = difference(row_g(k), end_g) * LOG2E;
            }
            u32 weights[16];
            weigh(p, s, weights, acc, shift, limit, fade, fall, HAS_NEAR && first >= since, first == rows, g, t);
            const Descriptor<128, PLANE> values(address + KEY_BYTES);
            mma_fence();
#pragma unroll
            for (int i = 0; i < 4; i++)
                Mma<NP>::run<1>(acc, weights[4 * i], weights[4 * i + 1], weights[4 * i + 2], weights[4 * i + 3], values.at(i * 256));
            mma_commit();
            mma_wait<0>();
            mma_touch(acc);
            pieces.release();
        }
        for (; n < count; n++) {
            pieces.wait_full();
            pieces.release();
        }
        queries.release();
        turn->queries = queries.at;
        turn->pieces = pieces.at;

        finish(p, w, at, acc);
        const int h = turn->h + 1;
        __syncwarp();
        turn->h = h == p.group ? 0 : h;
        if (h == p.group) turn->c = c + 1;
        __syncwarp();
    }
}

extern "C" __global__ void __launch_bounds__(512, 1) stream_wide_read(const __grid_constant__ Stream p) {
    DYNAMIC_SHARED(at);
    const int group = int(threadIdx.x) / 128, warp = int(threadIdx.x) / 32;
    const u32 base = smem(at);
    __shared__ Walk w;
    if (threadIdx.x == 0) w.find(p, blockIdx.x);
    for (int i = int(threadIdx.x); i < FEATURES; i += 512) reinterpret_cast<f32*>(at + COEFFICIENTS)[i] = p.coefficients[i];
    // Nothing but ones is written beside sums of values.
    for (int i = int(threadIdx.x); i < 2 * FEATURES; i += 512)
        *reinterpret_cast<uint4*>(at + PUBLISHED + (i / FEATURES * NT + NV) * SUM_PLANE + i % FEATURES * 16) = make_uint4(0, 0, 0, 0);
    if (warp < PIECE_STAGES) write_ones(at + PIECES + warp * PIECE_BYTES + KEY_BYTES + NV * PLANE);
    else if (warp < PIECE_STAGES + SUM_STAGES) write_ones(at + (warp - PIECE_STAGES) * SUM_STAGE + SUM_KEYS + KEY_BYTES);
    if (threadIdx.x == 0) {
        SumRing::init(base, 1, 4);
        PieceRing::init(base, 2, 8);
        QueryRing::init(base, 1, 8);
        PublishedRing::init(base, 4, 8);
        hopper::barrier_init_done();
    }
    proxy_fence();
    __syncthreads();
    // A thread of each warpgroup has 128 registers to begin with.
    if (group == 0) {
        fewer_registers<64>();
        if (warp == 0) {
            copy_keys(p, w, at);
        } else if (warp == 1) {
            copy_queries(p, w, at);
        } else {
            // A piece is weighed to the frontier of the first chunk that reads it.
            auto range = [&](int first, int& from, int& to) {
                const int c = w.reader(first);
                from = w.frontier(c - 1), to = w.frontier(c);
            };
            copy_for_sums(p, w, at, warp - 2, w.frontier(w.segment.first), w.frontier(w.segment.end - 1), range);
        }
    } else if (group == 1) {
        more_registers<224>();
        sum(p, w, at, base);
    } else {
        fewer_registers<112>();
        answer(p, w, at);
    }
}
