// Queries as those that are summed and weighed: what comes from memory, and ĝ made of it. `S` has queries, dy, of_queries and
// g by buffer, and columns, scaled, turned, logs, by.

template <class S>
DEVICE void fetch_queries(const Walk& p, const Place& u, S& s, int chunk, int h, int to) {
    fetch_keys(s.queries[to], later_head(u.q, h * p.q.head), chunk * CHUNK, u.at.tokens);
    fetch_values(s.dy[to], later_head(u.dy, h * p.dy.head), chunk * CHUNK, u.at.tokens);
    fetch_g(s.g[to], u, chunk);
    spread<CHUNK * (NEAR ? 3 : 2)>([&](int i) {
        const int kind = i / CHUNK, t = i % CHUNK;
        const bool is = chunk * CHUNK + t < u.at.tokens;
        const f32* from = kind == 0 ? p.inverse : kind == 1 ? p.tail : p.shift;
        copy_async<4>(&s.of_queries[to][kind][t], from + query_at(p, u, h) + (is ? chunk * CHUNK + t : 0), is ? 4 : 0);
    });
}
// Columns that nothing is ever written to.
template <class S>
DEVICE void clear_columns(S& s) {
    for (int i = threadIdx.x; i < CHUNK * COLUMN_STRIDE; i += THREADS) {
        s.columns[i].bits = 0;
        if constexpr (LOGS) s.scaled[i].bits = 0;
    }
}
// ĝ as columns, and queries turned and ĝ times what sums take in, where they do. Sums are relative to a token that no key
// which reads them is after, `since` (as a logarithm to base 2) before the chunk: relative to a later one what queries are, who
// see little but what is far, would not be finite where that has faded much.
template <class S>
DEVICE void make_columns(const Place& u, S& s, int chunk, int buffer, bool sums_grow, f32 since) {
    if constexpr (LOGS) {
        spread<CHUNK>([&](int i) {
            f32 log = NEAR ? -s.of_queries[buffer][2][i] * LOG2_E : 0.0f;
            // After the last token there is nothing, however much keys have faded since the chunk's first.
            log = chunk * CHUNK + i < u.at.tokens ? log + log_of(s.g[buffer], i) : -1e30f;
            s.logs[i] = log;
            s.by[i] = exp2_of(log + since);
        });
        __syncthreads();
    }
    auto put = [&](bf16* to, f32 inverse, u32 dy) {
        *reinterpret_cast<u32*>(to) = bf16x2_bits(low_of(dy) * inverse, high_of(dy) * inverse);
    };
    const bool scaled = LOGS && sums_grow;
    constexpr int PAIRS = (D_VALUE + 1) / 2;
    spread<CHUNK * PAIRS>([&](int i) {
        const int t = i / PAIRS, at = t * COLUMN_STRIDE + i % PAIRS * 2;
        const f32 inverse = s.of_queries[buffer][0][t];
        const u32 dy = *reinterpret_cast<const u32*>(s.dy[buffer] + at);
        put(s.columns + at, inverse, dy);
        if (scaled) put(s.scaled + at, inverse * s.by[t], dy);
    });
    // An odd value's last pair has had something that is not dy, which the tail takes the place of.
    if constexpr (D_VALUE % 2 == 1) __syncthreads();
    spread<CHUNK>([&](int t) {
        const f32 tail = s.of_queries[buffer][1][t];
        bf16* to = s.columns + t * COLUMN_STRIDE + D_VALUE;
        to[0] = from_f32<bf16>(tail);
        to[1] = from_f32<bf16>(rest_of(tail));
        if (scaled) {
            to = s.scaled + t * COLUMN_STRIDE + D_VALUE;
            to[0] = from_f32<bf16>(tail * s.by[t]);
            to[1] = from_f32<bf16>(rest_of(tail * s.by[t]));
        }
    });
    if (sums_grow) turn(s.turned, s.queries[buffer]);
}
