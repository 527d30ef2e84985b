// Queries as those that are summed and weighed: what comes from memory, and ĝ made of it. `S` has queries, dy, of_queries by
// buffer, and columns, scaled, turned, logs, by.

template <class S>
DEVICE void fetch_queries(const Walk& p, const Place& u, S& s, int chunk, int h, int to) {
    const i64 head = u.head * p.group + h;
    fetch_keys(s.queries[to], rows_of(p.q, u.at.q_batch, head, u.at.q_first), chunk * CHUNK, u.at.tokens);
    fetch_values(s.dy[to], rows_of(p.dy, u.at.q_batch, head, u.at.q_first), chunk * CHUNK, u.at.tokens);
    for (int i = threadIdx.x; i < CHUNK * (NEAR ? 3 : 2); i += THREADS) {
        const int kind = i / CHUNK, t = i % CHUNK;
        const bool is = chunk * CHUNK + t < u.at.tokens;
        const f32* from = kind == 0 ? p.inverse : kind == 1 ? p.tail : p.shift;
        copy_async<4>(&s.of_queries[to][kind][t], from + query_at(p, u, h) + (is ? chunk * CHUNK + t : 0), is ? 4 : 0);
    }
}
// ĝ as columns, and queries turned and ĝ times what sums take in, where they do.
template <class S>
DEVICE void make_columns(const Walk& p, const Place& u, S& s, int chunk, int buffer, f64 mark, bool sums_grow) {
    if constexpr (LOGS) {
        for (int i = threadIdx.x; i < CHUNK; i += THREADS) {
            const f32 log = log_of(p, u, chunk, i, mark) - (NEAR ? s.of_queries[buffer][2][i] * LOG2_E : 0.0f);
            s.logs[i] = log;
            s.by[i] = exp2_of(log);
        }
        __syncthreads();
    }
    for (int i = threadIdx.x; i < CHUNK * COLUMNS / 2; i += THREADS) {
        const int t = i / (COLUMNS / 2), j = i % (COLUMNS / 2);
        const f32 inverse = s.of_queries[buffer][0][t], tail = s.of_queries[buffer][1][t];
        const u32 dy = reinterpret_cast<const u32*>(s.dy[buffer] + t * COLUMN_STRIDE)[j];
        auto column = [&](int i, f32 of_dy, f32 by) {
            if (i < D_VALUE) return of_dy * inverse * by;
            return i == D_VALUE ? tail * by : i == D_VALUE + 1 ? rest_of(tail * by) : 0.0f;
        };
        const f32 low = low_of(dy), high = high_of(dy);
        reinterpret_cast<u32*>(s.columns + t * COLUMN_STRIDE)[j] = bf16x2_bits(column(2 * j, low, 1), column(2 * j + 1, high, 1));
        if (LOGS && sums_grow) {
            const f32 by = s.by[t];
            const u32 scaled = bf16x2_bits(column(2 * j, low, by), column(2 * j + 1, high, by));
            reinterpret_cast<u32*>(s.scaled + t * COLUMN_STRIDE)[j] = scaled;
        }
    }
    if (sums_grow) turn(s.turned, s.queries[buffer]);
}
