// What the kernels share that walk over a sequence with the sums of one key/value head in accumulators: the backward
// pass of causal attention by mma.sync, for keys of 8 or 16 elements and values of up to 16.
//
// With v̂ = (v, 1), N̂_i = Σ_j w_ij v̂_j = (N, D) and ĝ_i = (dy_i, -dy_i·y_i)/D_i, queries read S = Σ_j Φ(k_j) v̂_jᵀ: first
// N̂ = Φ(q) S, then dΦ(q) = ĝ Sᵀ. Keys read R = Σ_i Φ(q_i) ĝ_iᵀ: dv̂ = Φ(k) R and dΦ(k) = v̂ Rᵀ. Both are the same
// products of rows' features, and of rows' columns, with a table of sums.
//
// Features come in *eights*: the shifts of one monomial, x[s+a] x[s+b] x[s+c] for s = base .. base + 7, indices modulo
// D_KEY. All shifts of a monomial have the same multiplicity. A lane that holds the elements rotated by its own columns (or
// rows) makes any eight by the same products as every other lane, and those of base 8 by the same as those of base 0 from
// elements that are rotated by 8 more. Two eights of one base are a *tile*: 16 features, the depth of one product, or the
// rows of one.
//
// Sums are f32, in accumulators that are split by tiles over the warps. To be read, they are multiplied by
// multiplicities and coefficients, rounded to bf16 and written to shared memory, once a chunk of CHUNK tokens. Pairs of
// tokens too near for that are weighed one by one: those of a chunk, and with LAG those of LAG chunks before it.
//
// Compile-time constants: D_KEY 8 or 16; D_VALUE up to 16; ORDERS a bit for each order of features; CHUNK; WARPS; ROW_TILES
// of a warp; LAG; FADES whether weights decay; NEAR whether some are exact; STASH whether sums wait in shared memory while rows are read;
// ITEM_BYTES, WALK_BYTES sizes of structs.
#pragma once
#include "prelude.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr int BASES = D_KEY / 8;
// Tiles of 16 tokens; of a warp's own rows; and warps that share those: each reads the features of every SPLIT-th base, and
// weighs every SPLIT-th tile of tokens.
constexpr int TOKEN_TILES = CHUNK / 16, GROUPS = TOKEN_TILES / ROW_TILES, SPLIT = WARPS / GROUPS;
static_assert(SPLIT * GROUPS == WARPS && (SPLIT == 1 || SPLIT == BASES), "bases are shared out evenly");
// A value and two ones; of ĝ, two parts of its last element, which is the small difference of large ones.
constexpr int COLUMNS = (D_VALUE + 9) / 8 * 8;
constexpr int COLUMN_TILES = COLUMNS / 8;
constexpr int KEY_TILES = D_KEY / 8;
// Elements from one row to the next in shared memory, such that 8 rows of 16 bytes lie in different banks.
constexpr int KEY_STRIDE = D_KEY == 8 ? 8 : 24;
constexpr int COLUMN_STRIDE = COLUMNS == 8 ? 8 : 24;
constexpr int TURNED_STRIDE = CHUNK + 8;
constexpr f32 LOG2_E = 1.4426950408889634f;
static_assert(D_KEY == 8 || D_KEY == 16, "orbits are made of halves of 8");
static_assert(COLUMN_TILES <= 3, "values have up to 16 elements");

// ---- Loops whose counter is a constant ------------------------------------------------------------------------
template <int I>
struct Constant {
    static constexpr int value = I;
};
template <int BEGIN, int END, class F>
DEVICE void each(F&& f) {
    if constexpr (END - BEGIN == 1) {
        f(Constant<BEGIN>{});
    } else if constexpr (END > BEGIN) {
        each<BEGIN, (BEGIN + END) / 2>(f);
        each<(BEGIN + END) / 2, END>(f);
    }
}

// Whether what is small and cheap to find again is kept in registers: with two bases there are none to spare, with one
// instructions are what limits.
constexpr bool KEEPS = BASES == 1;
// A thread's lane, and warp. Without KEEPS read anew wherever that is written: what follows from them then takes no
// registers in between.
#if defined(SATA_EMULATOR)
DEVICE int lane_now() { return int(threadIdx.x) % 32; }
DEVICE int thread_now() { return int(threadIdx.x); }
#else
DEVICE int lane_now() {
    if constexpr (KEEPS) return int(threadIdx.x) % 32;
    int lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    return lane;
}
DEVICE int thread_now() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}
#endif
DEVICE int warp_now() { return thread_now() / 32; }
// Which of a block's groups of rows a warp has, and which part of their work; its lane; the first of its rows.
struct Own {
    int group, part, lane, g, t, rows;
};
DEVICE Own own_now() {
    const int warp = warp_now(), lane = lane_now();
    return Own{warp % GROUPS, warp / GROUPS, lane, lane / 4, lane % 4, warp % GROUPS * ROW_TILES * 16};
}
// f(0) .. f(COUNT - 1), each by some thread.
template <int COUNT, class F>
DEVICE void spread(F&& f) {
    const int thread = thread_now();
#pragma unroll
    for (int first = 0; first < COUNT; first += THREADS) {
        if (first + THREADS <= COUNT || first + thread < COUNT) f(first + thread);
    }
}

// ---- The features ---------------------------------------------------------------------------------------------
struct Eight {
    int order, a, b, c, times;
};
constexpr bool has_order(int order) { return (ORDERS >> order & 1) != 0; }

// Eight number n of each base, or their number as `times` of order -1 after the last. Those of order 3 with the same a and b
// are neighbours, as are those of order 2 with the same a.
constexpr Eight eight_at(int n) {
    int count = 0;
    if (has_order(3)) {
        // Gaps between the indices, around the circle: a, m, and what is left, which is larger than a.
        for (int a = 0; 3 * a < D_KEY; a++) {
            for (int m = a; D_KEY - a - m > a; m++) {
                if (count++ == n) return Eight{3, 0, a, a + m, a > 0 ? 6 : m > 0 ? 3 : 1};
            }
        }
    }
    if (has_order(2)) {
        // Opposite elements are there twice.
        for (int m = 0; 2 * m <= D_KEY; m++) {
            if (count++ == n) return Eight{2, 0, m, 0, m == 0 || 2 * m == D_KEY ? 1 : 2};
        }
    }
    if (has_order(1) && count++ == n) return Eight{1, 0, 0, 0, 1};
    // One feature, and others that weigh nothing.
    if (has_order(0) && count++ == n) return Eight{0, 0, 0, 0, 1};
    return Eight{-1, 0, 0, 0, count};
}
constexpr int EIGHTS = eight_at(1 << 20).times;
constexpr bool HAS_ONE = has_order(0);
// Tiles of a base, and those that a warp has in accumulators, all of one base.
constexpr int TILES = (EIGHTS + 1) / 2;
constexpr int SUMMERS = WARPS / BASES, WARP_TILES = (TILES + SUMMERS - 1) / SUMMERS;

template <int N>
struct EightOf {
    static constexpr Eight is = eight_at(N);
    static constexpr int order = is.order, a = is.a, b = is.b, c = is.c, times = is.times;
    static constexpr Eight before = N > 0 ? eight_at(N - 1) : Eight{-1, 0, 0, 0, 0}, after = eight_at(N + 1);
    static constexpr bool first = before.order != order || before.a != a || (order == 3 && before.b != b);
    static constexpr bool last = after.order != order || after.a != a || (order == 3 && after.b != b);
};

// ---- What the matrix units do ---------------------------------------------------------------------------------
// Lane 4g + t. A [16 x 16]: a0 row g, columns 2t, 2t+1; a1 row g+8; a2, a3 the same 8 columns on. B [16 x 8]: b0 rows 2t,
// 2t+1 of column g; b1 8 rows on. C [16 x 8]: c0, c1 row g, columns 2t, 2t+1; c2, c3 row g+8.
#if defined(SATA_EMULATOR)
struct Exchange {
    u64 word[32][6];
};
DEVICE Exchange& exchange() {
    __shared__ Exchange all[WARPS];
    return all[threadIdx.x / 32];
}
DEVICE f32 low_of(u32 x) { return __uint_as_float(x << 16); }
DEVICE f32 high_of(u32 x) { return __uint_as_float(x & 0xffff0000u); }

template <int DEPTH>
DEVICE void emulated_product(f32 (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    Exchange& all = exchange();
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; i++) all.word[lane][i] = a[i];
    for (int i = 0; i < 2; i++) all.word[lane][4 + i] = b[i];
    __syncwarp();
    for (int r = 0; r < 2; r++) {
        for (int e = 0; e < 2; e++) {
            f32 sum = c[2 * r + e];
            for (int half = 0; half < DEPTH / 8; half++) {
                for (int s = 0; s < 4; s++) {
                    u32 x = u32(all.word[4 * g + s][r + 2 * half]), y = u32(all.word[4 * (2 * t + e) + s][4 + half]);
                    sum += low_of(x) * low_of(y) + high_of(x) * high_of(y);
                }
            }
            c[2 * r + e] = sum;
        }
    }
    __syncwarp();
}
DEVICE void multiply(f32 (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    const u32 a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
    emulated_product<16>(c, a, b);
}
DEVICE void multiply(f32 (&c)[4], u32 a0, u32 a1, u32 b0) {
    const u32 a[4] = {a0, a1, 0, 0}, b[2] = {b0, 0};
    emulated_product<8>(c, a, b);
}
template <bool TURN, int N>
DEVICE void load_matrices(u32 (&to)[N], const bf16* row) {
    Exchange& all = exchange();
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    all.word[lane][0] = reinterpret_cast<u64>(row);
    __syncwarp();
    for (int m = 0; m < N; m++) {
        auto at = [&](int r, int column) {
            return u32(reinterpret_cast<const bf16*>(all.word[8 * m + r][0])[column].bits);
        };
        to[m] = TURN ? at(2 * t, g) | at(2 * t + 1, g) << 16 : at(g, 2 * t) | at(g, 2 * t + 1) << 16;
    }
    __syncwarp();
}
DEVICE u32 times2(u32 x, u32 y) { return bf16x2_bits(low_of(x) * low_of(y), high_of(x) * high_of(y)); }
// The upper half of x, and then the lower of y.
DEVICE u32 between(u32 x, u32 y) { return x >> 16 | y << 16; }
DEVICE f32 exp2_of(f32 x) { return exp2f(x); }
#else
DEVICE f32 low_of(u32 x) { return __uint_as_float(x << 16); }
DEVICE f32 high_of(u32 x) { return __uint_as_float(x & 0xffff0000u); }
DEVICE void multiply(f32 (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DEVICE void multiply(f32 (&c)[4], u32 a0, u32 a1, u32 b0) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b0));
}
// Matrices of 8 x 8: lane l gives row l % 8 of matrix l / 8 (lanes from 8 N on give nothing that matters). A lane gets row g,
// columns 2t, 2t+1 of each; turned, rows 2t, 2t+1 of column g.
template <bool TURN, int N>
DEVICE void load_matrices(u32 (&to)[N], const bf16* row) {
    static_assert(N == 1 || N == 2 || N == 4, "ldmatrix loads 1, 2 or 4");
    const u32 from = shared_address(row);
    if constexpr (N == 4 && TURN) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(from) : "memory");
    } else if constexpr (N == 4) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(from) : "memory");
    } else if constexpr (N == 2 && TURN) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                     : "=r"(to[0]), "=r"(to[1]) : "r"(from) : "memory");
    } else if constexpr (N == 2) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                     : "=r"(to[0]), "=r"(to[1]) : "r"(from) : "memory");
    } else if constexpr (TURN) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(to[0]) : "r"(from) : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(to[0]) : "r"(from) : "memory");
    }
}
DEVICE u32 times2(u32 x, u32 y) {
    u32 z;
#if __CUDA_ARCH__ >= 900
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
#else
    // -0 as the third number leaves every product as it is.
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(z) : "r"(x), "r"(y), "r"(0x80008000u));
#endif
    return z;
}
DEVICE u32 between(u32 x, u32 y) { return __byte_perm(x, y, 0x5432); }
DEVICE f32 exp2_of(f32 x) {
    f32 y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#endif

// ---- A call ---------------------------------------------------------------------------------------------------
// A stretch of chunks of one sequence, whose sums one block walks with.
struct Item {
    i64 q_batch, q_first, k_batch, k_first;
    // Tokens of other sequences before this one's.
    i64 work;
    i32 tokens, chunks;  // of the sequence
    i32 first, end;      // chunks of this item
    // Where the sequence is cut: the sums before its first chunk, or its own; those after its last chunk.
    i32 slot, last_slot;
};
SAME_SIZE(Item, ITEM_BYTES);

struct Walk {
    View q, k, v, dy, dq, dk, dv;
    const Item* items;
    // [kv_heads][works]: g; and v̂·dv̂ of each token.
    const f64* g;
    f64* dw;
    // [query heads][works]: 1/D; -dy·y/D; what logits are relative to. D is relative to that, too.
    f32* inverse;
    f32* tail;
    f32* shift;
    // [kv_heads][slots][SET]
    f32* sums;
    i64 works;
    i32 group, slots, block, near;
    f32 scale;
    // a_p scale^p
    f32 a[4];
    i32 unused;
};
SAME_SIZE(Walk, WALK_BYTES);

// One head's rows of a sequence.
struct Rows {
    const bf16* first;
    i64 stride;
};
DEVICE Rows later_head(const Rows& x, i64 by) { return Rows{x.first + by, x.stride}; }
DEVICE Rows rows_of(const View& x, i64 batch, i64 head, i64 token) { return Rows{row<const bf16>(x, batch, head, token), x.token}; }

struct Place {
    Item at;
    i64 head;
    const f64* g;
    // Of the first query head.
    Rows q, dy;
    Rows k, v;
};
// g at the last token before a chunk: what sums of all tokens before it are relative to.
DEVICE f64 mark_of(const Walk& p, const Item& at, i64 head, int chunk) {
    const i64 token = min(i64(chunk) * CHUNK, i64(at.tokens)) - 1;
    return FADES && token >= 0 ? p.g[head * p.works + at.work + token] : 0.0;
}

// ---- Rows in registers ----------------------------------------------------------------------------------------
// Elements of rows g and g+8 of each of a warp's tiles, rotated by 2t + 8 base: pair 0 is elements 2t + 8 base and the next.
struct Rotated {
    u32 pair[ROW_TILES][2][D_KEY];
};
DEVICE Rotated rotated_rows(const bf16* rows, int base) {
    const int lane = lane_now(), g = lane / 4, t = lane % 4;
    Rotated x;
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const u32* row = reinterpret_cast<const u32*>(rows + (16 * m + 8 * r + g) * KEY_STRIDE);
            u32(&pair)[D_KEY] = x.pair[m][r];
#pragma unroll
            for (int i = 0; i < D_KEY / 2; i++) pair[2 * i] = row[(t + i + 4 * base) % (D_KEY / 2)];
#pragma unroll
            for (int i = 0; i < D_KEY / 2; i++) pair[2 * i + 1] = between(pair[2 * i], pair[(2 * i + 2) % D_KEY]);
        }
    }
    return x;
}
template <int N>
DEVICE u32 feature_pair(const u32 (&pair)[D_KEY]) {
    using H = EightOf<N>;
    if constexpr (H::order == 3) return times2(times2(pair[H::a], pair[H::b]), pair[H::c]);
    else if constexpr (H::order == 2) return times2(pair[H::a], pair[H::b]);
    else if constexpr (H::order == 1) return pair[H::a];
    // 1 in the first column (row) and 1 in those whose sums are read as 0.
    else if constexpr (H::order == 0) return 0x3f803f80u;
    else return 0;
}

// What rows accumulate: columns, or elements of keys.
typedef f32 OfColumns[ROW_TILES][COLUMN_TILES][4];
typedef f32 OfKeys[ROW_TILES][KEY_TILES][4];
template <int N>
DEVICE void clear(f32 (&c)[ROW_TILES][N][4]) {
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++) {
#pragma unroll
        for (int n = 0; n < N; n++) c[m][n][0] = c[m][n][1] = c[m][n][2] = c[m][n][3] = 0;
    }
}
// Rows g and g+8 of each tile times numbers of their own.
template <int N>
DEVICE void scale(f32 (&c)[ROW_TILES][N][4], const f32 (&by)[ROW_TILES][2]) {
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++) {
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
            for (int j = 0; j < 4; j++) c[m][n][j] *= by[m][j / 2];
        }
    }
}

// Columns of a warp's rows as the left factor of a product: tiles of 8 columns, rows g and g+8 each.
struct Left {
    u32 word[ROW_TILES][2 * COLUMN_TILES];
};
// From what a product left in accumulators.
DEVICE Left left_of(const OfColumns& c) {
    Left x;
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++) {
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n++) {
            x.word[m][2 * n] = bf16x2_bits(c[m][n][0], c[m][n][1]);
            x.word[m][2 * n + 1] = bf16x2_bits(c[m][n][2], c[m][n][3]);
        }
    }
    return x;
}
// What bf16 leaves of a number.
DEVICE f32 rest_of(f32 x) { return x - to_f32(from_f32<bf16>(x)); }
// From rows in shared memory.
DEVICE Left left_rows(const bf16* rows) {
    const int lane = lane_now(), g = lane / 4, t = lane % 4;
    Left x;
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++) {
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n++) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const bf16* from = rows + (16 * m + 8 * r + g) * COLUMN_STRIDE + 8 * n + 2 * t;
                x.word[m][2 * n + r] = *reinterpret_cast<const u32*>(from);
            }
        }
    }
    return x;
}

// One tile of 16 rows of COLUMNS columns in shared memory as right factors. As rows of depth (features or tokens):
// `word[n]` are the two words of column tile n. As columns: see `transposed_times`.
struct Right {
    u32 word[COLUMN_TILES][2];
};
DEVICE Right right_rows(const bf16* rows, int lane) {
    Right x;
    if constexpr (COLUMN_TILES >= 2) {
        u32 w[4];
        load_matrices<true>(w, rows + lane % 16 * COLUMN_STRIDE + lane / 16 * 8);
        x.word[0][0] = w[0], x.word[0][1] = w[1], x.word[1][0] = w[2], x.word[1][1] = w[3];
    }
    if constexpr (COLUMN_TILES % 2 == 1) {
        u32 w[2];
        load_matrices<true>(w, rows + lane % 16 * COLUMN_STRIDE + (COLUMN_TILES - 1) * 8);
        x.word[COLUMN_TILES - 1][0] = w[0], x.word[COLUMN_TILES - 1][1] = w[1];
    }
    return x;
}
// The same 16 rows, each a column of the right factor: word[n] are the words of its columns 8n .. of depth for rows 0-7
// and rows 8-15.
DEVICE Right right_columns(const bf16* rows, int lane) {
    Right x;
    if constexpr (COLUMN_TILES >= 2) {
        u32 w[4];
        load_matrices<false>(w, rows + (lane / 16 * 8 + lane % 8) * COLUMN_STRIDE + lane / 8 % 2 * 8);
        x.word[0][0] = w[0], x.word[1][0] = w[1], x.word[0][1] = w[2], x.word[1][1] = w[3];
    }
    if constexpr (COLUMN_TILES % 2 == 1) {
        u32 w[2];
        load_matrices<false>(w, rows + lane % 16 * COLUMN_STRIDE + (COLUMN_TILES - 1) * 8);
        x.word[COLUMN_TILES - 1][0] = w[0], x.word[COLUMN_TILES - 1][1] = w[1];
    }
    return x;
}
// c = left · (8 of the rows)ᵀ, rows 8 half .. of `right`.
DEVICE void transposed_times(f32 (&c)[4], const u32 (&left)[2 * COLUMN_TILES], const Right& right, int half) {
    if constexpr (COLUMN_TILES >= 2) {
        multiply(c, left[0], left[1], left[2], left[3], right.word[0][half], right.word[1][half]);
    }
    if constexpr (COLUMN_TILES % 2 == 1) {
        constexpr int LAST = COLUMN_TILES - 1;
        multiply(c, left[2 * LAST], left[2 * LAST + 1], right.word[LAST][half]);
    }
}

#include "stream_backward_tables.cuh"
#include "stream_backward_pairs.cuh"
