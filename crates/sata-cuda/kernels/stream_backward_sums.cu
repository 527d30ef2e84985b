// Where sequences are cut: sums of the chunks of each item, of keys for the queries' turn and of queries for the keys', and
// what precedes (follows) each item. Items are smaller than those that walk, so that the device is busy.
// stream_backward_sum_keys, stream_backward_sum_queries. Grid: items, key/value heads; those that nobody reads do nothing.
// stream_backward_scan. Grid: 256 numbers of a set of sums each; sequences; key/value heads.
// See stream_backward.cuh.
#include "stream_backward.cuh"

// What `last_slot` says here: whether somebody reads the sums of an item's keys, and queries.
constexpr int OF_KEYS = 1, OF_QUERIES = 2;

struct Shared {
    bf16 queries[2][CHUNK * KEY_STRIDE];
    bf16 dy[2][CHUNK * COLUMN_STRIDE];
    bf16 columns[CHUNK * COLUMN_STRIDE];
    bf16 turned[D_KEY * TURNED_STRIDE];
    bf16 scaled[LOGS ? CHUNK * COLUMN_STRIDE : 8];
    f32 of_queries[2][3][CHUNK];
    f32 logs[LOGS ? CHUNK : 4];
    f32 by[CHUNK];
    f64 g[2][OF_G];
    Place place;
};
SAME_SIZE(Shared, SUM_SHARED);
#include "stream_backward_fetch.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, SUM_BLOCKS) stream_backward_sum_keys(const __grid_constant__ Walk p) {
    DYNAMIC_SHARED(raw);
    Shared& s = *reinterpret_cast<Shared*>(raw);
    const Place& u = s.place;
    find_place(p, s.place);
    if ((u.at.last_slot & OF_KEYS) == 0) return;
    Sums sums;
    clear_sums(sums);
    const int first = max(0, u.at.first - LAG), end = u.at.end - LAG;
    auto fetch = [&](int chunk, int to) {
        fetch_keys(s.queries[to], u.k, chunk * CHUNK, u.at.tokens);
        fetch_values(s.dy[to], u.v, chunk * CHUNK, u.at.tokens);
        fetch_g(s.g[to], u, chunk);
        if (chunk < first + 2) put_ones(s.dy[to], chunk * CHUNK, u.at.tokens);
        copy_async_commit();
    };
    if (first < end) fetch(first, 0);
#pragma unroll 1
    for (int chunk = first; chunk < end; chunk++) {
        const int buffer = (chunk - first) & 1;
        copy_async_wait<0>();
        __syncthreads();
        if (chunk + 1 < end) fetch(chunk + 1, buffer ^ 1);
        turn(s.turned, s.queries[buffer]);
        if constexpr (FADES) {
            const f64* g = s.g[buffer];
            fade_columns(s.scaled, s.dy[buffer], g);
            fade_sums(sums, fading(g[CHUNK], g[0]));
        }
        __syncthreads();
        add_sums(sums, s.turned, FADES ? s.scaled : s.dy[buffer]);
    }
    store_sums(sums, sums_at(p, u.head, u.at.slot));
}

extern "C" __global__ void __launch_bounds__(THREADS, SUM_BLOCKS) stream_backward_sum_queries(const __grid_constant__ Walk p) {
    DYNAMIC_SHARED(raw);
    Shared& s = *reinterpret_cast<Shared*>(raw);
    const Place& u = s.place;
    find_place(p, s.place);
    if ((u.at.last_slot & OF_QUERIES) == 0) return;
    Sums sums;
    clear_sums(sums);
    clear_columns(s);
    const int first = min(u.at.first + LAG, u.at.chunks), end = min(u.at.end + LAG, u.at.chunks);
    const int steps = (end - first) * p.group;
    // What all are relative to, where it takes no registers: of g's last place no token is.
    f64& mark = s.g[0][OF_G - 1];
    if (FADES && threadIdx.x == 0) mark = mark_of(p, u.at, u.head, u.at.first);
    if (steps > 0) fetch_queries(p, u, s, end - 1, 0, 0);
    copy_async_commit();
    int chunk = end - 1, h = 0;
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
        const int buffer = step & 1;
        const bool next = h + 1 == p.group;
        copy_async_wait<0>();
        __syncthreads();
        if (step + 1 < steps) fetch_queries(p, u, s, next ? chunk - 1 : chunk, next ? 0 : h + 1, buffer ^ 1);
        copy_async_commit();
        make_columns(u, s, chunk, buffer, true, FADES ? f32(s.g[buffer][0] - mark) * LOG2_E : 0.0f);
        __syncthreads();
        add_sums(sums, s.turned, LOGS ? s.scaled : s.columns);
        if (++h == p.group) h = 0, chunk--;
    }
    store_sums(sums, sums_at(p, u.head, u.at.slot));
}

// Items of one sequence.
struct Range {
    i32 first, count;
};
struct Scan {
    Walk walk;
    const Range* ranges;
    i64 reverse;
};
SAME_SIZE(Scan, SCAN_BYTES);
constexpr int AT_ONCE = 8;

extern "C" __global__ void __launch_bounds__(256) stream_backward_scan(const __grid_constant__ Scan scan) {
    const Walk& p = scan.walk;
    const Range range = scan.ranges[blockIdx.y];
    const int head = int(blockIdx.z), i = int(blockIdx.x) * 256 + int(threadIdx.x);
    if (i >= SET) return;
    f32 total = 0;
    for (int done = 0; done < range.count; done += AT_ONCE) {
        // All loads before what waits for them.
        f32 own[AT_ONCE];
        f32* at[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
            const int n = min(done + j, range.count - 1);
            const Item& u = p.items[range.first + (scan.reverse ? range.count - 1 - n : n)];
            at[j] = sums_at(p, head, u.slot) + i;
            own[j] = (u.last_slot & (scan.reverse ? OF_QUERIES : OF_KEYS)) != 0 ? *at[j] : 0.0f;
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
            if (done + j >= range.count) break;
            *at[j] = total;
            if constexpr (FADES) {
                const Item& u = p.items[range.first + (scan.reverse ? range.count - 1 - done - j : done + j)];
                int first = u.first - LAG, end = u.end - LAG;
                // Sums of queries are relative to the keys that read them.
                if (scan.reverse) first = u.first, end = u.end;
                total *= exp2_of(f32(mark_of(p, u, head, max(end, 0)) - mark_of(p, u, head, max(first, 0))) * LOG2_E);
            }
            total += own[j];
        }
    }
}
