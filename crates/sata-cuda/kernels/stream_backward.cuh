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

// ---- Reading sums ---------------------------------------------------------------------------------------------
// c += Φ(rows) · table, of one base. With one tile of rows every other product has accumulators of its own, so that they wait
// for each other less.
DEVICE void read_sums(OfColumns& c, const Rotated& x, const bf16* table) {
    const int lane = lane_now();
    constexpr bool TWO = ROW_TILES == 1;
    OfColumns odd;
    clear(odd);
    each<0, TILES>([&](auto tile) {
        constexpr int T = decltype(tile)::value;
        const Right right = right_rows(table + T * 16 * COLUMN_STRIDE, lane);
#pragma unroll
        for (int m = 0; m < ROW_TILES; m++) {
            const u32(&low)[D_KEY] = x.pair[m][0];
            const u32(&high)[D_KEY] = x.pair[m][1];
            const u32 a0 = feature_pair<2 * T>(low), a1 = feature_pair<2 * T>(high);
            const u32 a2 = feature_pair<2 * T + 1>(low), a3 = feature_pair<2 * T + 1>(high);
#pragma unroll
            for (int n = 0; n < COLUMN_TILES; n++) {
                multiply(TWO && T % 2 == 1 ? odd[m][n] : c[m][n], a0, a1, a2, a3, right.word[n][0], right.word[n][1]);
            }
        }
    });
#pragma unroll
    for (int m = 0; TWO && m < ROW_TILES; m++) {
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n++) {
#pragma unroll
            for (int j = 0; j < 4; j++) c[m][n][j] += odd[m][n][j];
        }
    }
}

// Gradients by rows g and g+8, of elements rotated likewise.
struct Slopes {
    u32 pair[2][D_KEY / 2];
    f32 by[2][D_KEY];
    // Of two rows and two columns: what two elements that many monomials begin with are multiplied by.
    f32 prefix[2][2], sum[2][2];
};
template <int I>
DEVICE f32 element(const Slopes& s, int r) {
    return I % 2 == 0 ? low_of(s.pair[r][I / 2]) : high_of(s.pair[r][I / 2]);
}
template <int N, int E>
DEVICE void take_slopes_of(Slopes& s, const f32 (&d)[4]) {
    using H = EightOf<N>;
    constexpr int A = (H::a + E) % D_KEY, B = (H::b + E) % D_KEY, C = (H::c + E) % D_KEY;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const f32 dx = d[2 * r + E];
        f32 &prefix = s.prefix[r][E], &sum = s.sum[r][E];
        if constexpr (H::order == 3) {
            if constexpr (H::first) prefix = element<A>(s, r) * element<B>(s, r), sum = 0;
            sum = fmaf(dx, element<C>(s, r), sum);
            s.by[r][C] = fmaf(dx, prefix, s.by[r][C]);
            if constexpr (H::last) {
                s.by[r][A] = fmaf(sum, element<B>(s, r), s.by[r][A]);
                s.by[r][B] = fmaf(sum, element<A>(s, r), s.by[r][B]);
            }
        } else if constexpr (H::order == 2) {
            if constexpr (H::first) sum = 0;
            sum = fmaf(dx, element<B>(s, r), sum);
            s.by[r][B] = fmaf(dx, element<A>(s, r), s.by[r][B]);
            if constexpr (H::last) s.by[r][A] += sum;
        } else if constexpr (H::order == 1) {
            s.by[r][A] += dx;
        }
    }
}
template <int N>
DEVICE void take_slopes(Slopes& s, const f32 (&d)[4]) {
    take_slopes_of<N, 0>(s, d);
    take_slopes_of<N, 1>(s, d);
}
// c += the gradient by the rows of left · tableᵀ · Φ(rows), of one base.
DEVICE void read_slopes(OfKeys& c, const Rotated& x, const Left& left, const bf16* table, int base) {
    const int lane = lane_now(), t = lane % 4;
    Slopes s[ROW_TILES];
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
#pragma unroll
            for (int i = 0; i < D_KEY; i++) s[m].by[r][i] = 0;
#pragma unroll
            for (int i = 0; i < D_KEY / 2; i++) s[m].pair[r][i] = x.pair[m][r][2 * i];
        }
    }
    each<0, TILES>([&](auto tile) {
        constexpr int T = decltype(tile)::value;
        if constexpr (EightOf<2 * T>::order > 0) {
            const Right right = right_columns(table + T * 16 * COLUMN_STRIDE, lane);
#pragma unroll
            for (int m = 0; m < ROW_TILES; m++) {
                f32 d[4] = {0, 0, 0, 0};
                transposed_times(d, left.word[m], right, 0);
                take_slopes<2 * T>(s[m], d);
                if constexpr (EightOf<2 * T + 1>::order > 0) {
                    f32 e[4] = {0, 0, 0, 0};
                    transposed_times(e, left.word[m], right, 1);
                    take_slopes<2 * T + 1>(s[m], e);
                }
            }
        }
    });
    // Lane t has elements rotated by 2t + 8 base; it needs those of columns 2t, 2t+1 (and 8 on) from all four.
#pragma unroll
    for (int from = 0; from < 4; from++) {
        // The lane that is `from` before this one has its columns at 2 from, or 8 further where that wraps.
        const int source = (lane & ~3) | ((t - from) & 3);
        const bool wraps = (t < from) != (base > 0);
#pragma unroll
        for (int at = 0; at < ROW_TILES * 4; at++) {
            const int m = at / 4, r = at / 2 % 2, e = at % 2;
            f32 y[KEY_TILES];
#pragma unroll
            for (int n = 0; n < KEY_TILES; n++) {
                const f32 own = s[m].by[r][2 * from + e + 8 * n];
                y[n] = from == 0 ? own : __shfl_sync(0xffffffffu, own, source);
            }
#pragma unroll
            for (int n = 0; n < KEY_TILES; n++) {
                c[m][n][2 * r + e] += KEY_TILES == 2 && wraps ? y[KEY_TILES - 1 - n] : y[n];
            }
        }
    }
}

constexpr int TABLE = TILES * 16 * COLUMN_STRIDE;  // of a base
// c += Φ(rows) · table, of a part's bases. `rows_of_base` gives them rotated.
template <class F>
DEVICE void read_all_sums(OfColumns& c, F&& rows_of_base, const bf16* table, int part) {
#pragma unroll 1
    for (int base = part; base < BASES; base += SPLIT) read_sums(c, rows_of_base(base), table + base * TABLE);
}
template <class F>
DEVICE void read_all_slopes(OfKeys& c, F&& rows_of_base, const Left& left, const bf16* table, int part) {
#pragma unroll 1
    for (int base = part; base < BASES; base += SPLIT) {
        read_slopes(c, rows_of_base(base), left, table + base * TABLE, base);
    }
}

// ---- What two warps share -------------------------------------------------------------------------------------
// The second warp of a pair gives; the first has the sum. `room` is the pair's own.
constexpr int ROOM = SPLIT > 1 ? ROW_TILES * (COLUMN_TILES > KEY_TILES ? COLUMN_TILES : KEY_TILES) * 128 : 4;
DEVICE void meet() { barrier_sync(1 + warp_now() % GROUPS, 64); }
template <int N>
DEVICE void gather(f32 (&c)[ROW_TILES][N][4], f32* room, int part) {
    if constexpr (SPLIT > 1) {
        const int lane = lane_now();
        if (part > 0) {
#pragma unroll
            for (int i = 0; i < ROW_TILES * N; i++) {
                const f32(&x)[4] = c[i / N][i % N];
                store4(room + i * 128 + 4 * lane, make_float4(x[0], x[1], x[2], x[3]));
            }
        }
        meet();
        if (part == 0) {
#pragma unroll
            for (int i = 0; i < ROW_TILES * N; i++) {
                const float4 y = load4(room + i * 128 + 4 * lane);
                f32(&x)[4] = c[i / N][i % N];
                x[0] += y.x, x[1] += y.y, x[2] += y.z, x[3] += y.w;
            }
        }
    }
}
// The first warp's, to the second.
DEVICE void share(Left& x, f32* room, int part) {
    if constexpr (SPLIT > 1) {
        const int lane = lane_now();
        constexpr int WORDS = 2 * COLUMN_TILES;
        u32* words = reinterpret_cast<u32*>(room) + lane;
        if (part == 0) {
#pragma unroll
            for (int i = 0; i < ROW_TILES * WORDS; i++) words[i * 32] = x.word[i / WORDS][i % WORDS];
        }
        meet();
        if (part > 0) {
#pragma unroll
            for (int i = 0; i < ROW_TILES * WORDS; i++) x.word[i / WORDS][i % WORDS] = words[i * 32];
        }
    }
}
// The larger of both, to both.
DEVICE void share_largest(f32 (&x)[ROW_TILES][2], f32* room, int part) {
    if constexpr (SPLIT > 1) {
        f32* numbers = room + lane_now();
#pragma unroll
        for (int i = 0; i < 2 * ROW_TILES; i++) numbers[(2 * i + part) * 32] = x[i / 2][i % 2];
        meet();
#pragma unroll
        for (int i = 0; i < 2 * ROW_TILES; i++) x[i / 2][i % 2] = fmaxf(x[i / 2][i % 2], numbers[(2 * i + 1 - part) * 32]);
        meet();
    }
}

// ---- Making sums ----------------------------------------------------------------------------------------------
typedef f32 Sums[WARP_TILES][COLUMN_TILES][4];

// Whether tiles of the W-th warp of a base have element i or i + 1 in one of their eights.
template <int W>
constexpr bool needs_element(int i) {
    for (int n = 2 * W * WARP_TILES; n < 2 * (W + 1) * WARP_TILES && n < EIGHTS; n++) {
        const Eight h = eight_at(n);
        if (h.order >= 1 && (h.a == i || h.a == i + 1)) return true;
        if (h.order >= 2 && (h.b == i || h.b == i + 1)) return true;
        if (h.order >= 3 && (h.c == i || h.c == i + 1)) return true;
    }
    return false;
}
template <int W, int I>
struct Needs {
    static constexpr bool is = needs_element<W>(I);
};
// sums += Φ(tokens)ᵀ · columns over a chunk; `turned` has the tokens' elements as rows.
template <int W>
DEVICE void add_sums_of(Sums& sums, const bf16* turned, const bf16* columns, int base) {
    const int lane = lane_now();
#pragma unroll 1
    for (int step = 0; step < CHUNK / 16; step++) {
        // Of tokens 2t, 2t+1, and 8 on: element i + g + 8 base.
        u32 pair[2][D_KEY];
        each<0, D_KEY / 2>([&](auto at) {
            constexpr int I = 2 * decltype(at)::value;
            if constexpr (Needs<W, I>::is) {
                u32 w[4];
                const int row = (I + lane / 16 + lane % 8 + 8 * base) % D_KEY;
                load_matrices<false>(w, turned + row * TURNED_STRIDE + step * 16 + lane / 8 % 2 * 8);
                pair[0][I] = w[0], pair[1][I] = w[1], pair[0][I + 1] = w[2], pair[1][I + 1] = w[3];
            } else {
                pair[0][I] = pair[1][I] = pair[0][I + 1] = pair[1][I + 1] = 0;
            }
        });
        const Right right = right_rows(columns + step * 16 * COLUMN_STRIDE, lane);
        each<0, WARP_TILES>([&](auto i) {
            constexpr int T = W * WARP_TILES + decltype(i)::value;
            if constexpr (T < TILES) {
                const u32 a0 = feature_pair<2 * T>(pair[0]), a1 = feature_pair<2 * T + 1>(pair[0]);
                const u32 a2 = feature_pair<2 * T>(pair[1]), a3 = feature_pair<2 * T + 1>(pair[1]);
#pragma unroll
                for (int n = 0; n < COLUMN_TILES; n++) {
                    multiply(sums[decltype(i)::value][n], a0, a1, a2, a3, right.word[n][0], right.word[n][1]);
                }
            }
        });
    }
}
DEVICE void add_sums(Sums& sums, const bf16* turned, const bf16* columns) {
    const int warp = warp_now();
    each<0, SUMMERS>([&](auto w) {
        if (warp % SUMMERS == decltype(w)::value) add_sums_of<decltype(w)::value>(sums, turned, columns, warp / SUMMERS);
    });
}
DEVICE void fade_sums(Sums& sums, f32 by) {
#pragma unroll
    for (int i = 0; i < WARP_TILES; i++) {
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n++) {
#pragma unroll
            for (int j = 0; j < 4; j++) sums[i][n][j] *= by;
        }
    }
}
DEVICE void clear_sums(Sums& sums) {
#pragma unroll
    for (int i = 0; i < WARP_TILES; i++) {
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n++) {
#pragma unroll
            for (int j = 0; j < 4; j++) sums[i][n][j] = 0;
        }
    }
}
constexpr int SET = BASES * TILES * COLUMN_TILES * 128;  // numbers of a set of sums
DEVICE f32* sums_at(const Walk& p, i64 head, int slot) { return p.sums + (head * p.slots + slot) * SET; }
DEVICE void load_sums(Sums& sums, const f32* from) {
    const int warp = warp_now(), lane = lane_now();
#pragma unroll
    for (int i = 0; i < WARP_TILES; i++) {
        const int own = warp % SUMMERS * WARP_TILES + i, tile = warp / SUMMERS * TILES + own;
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n++) {
            const float4 x = own < TILES ? load4(from + (tile * COLUMN_TILES + n) * 128 + 4 * lane) : make_float4(0, 0, 0, 0);
            sums[i][n][0] = x.x, sums[i][n][1] = x.y, sums[i][n][2] = x.z, sums[i][n][3] = x.w;
        }
    }
}
DEVICE void store_sums(const Sums& sums, f32* to) {
    const int warp = warp_now(), lane = lane_now();
#pragma unroll
    for (int i = 0; i < WARP_TILES; i++) {
        const int own = warp % SUMMERS * WARP_TILES + i, tile = warp / SUMMERS * TILES + own;
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n++) {
            const float4 x = make_float4(sums[i][n][0], sums[i][n][1], sums[i][n][2], sums[i][n][3]);
            if (own < TILES) store4(to + (tile * COLUMN_TILES + n) * 128 + 4 * lane, x);
        }
    }
}
// Rounded to be read, with the factors of their eights.
DEVICE void show_sums(const Sums& sums, bf16* table, const f32* factors) {
    const int warp = warp_now(), lane = lane_now(), g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < WARP_TILES; i++) {
        const int own = warp % SUMMERS * WARP_TILES + i, tile = warp / SUMMERS * TILES + own;
        if (own >= TILES) break;
        bf16* row = table + (tile * 16 + g) * COLUMN_STRIDE + 2 * t;
        f32 low = factors[2 * own], high = factors[2 * own + 1];
        // Of order 0 there is only one feature.
        if (g > 0 || warp >= SUMMERS) {
            if (HAS_ONE && 2 * own == EIGHTS - 1) low = 0;
            if (HAS_ONE && 2 * own + 1 == EIGHTS - 1) high = 0;
        }
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n++) {
            *reinterpret_cast<u32*>(row + 8 * n) = bf16x2_bits(sums[i][n][0] * low, sums[i][n][1] * low);
            *reinterpret_cast<u32*>(row + 8 * COLUMN_STRIDE + 8 * n) = bf16x2_bits(sums[i][n][2] * high, sums[i][n][3] * high);
        }
    }
}
DEVICE void make_factors(const Walk& p, f32* factors) {
    each<0, 2 * TILES>([&](auto n) {
        constexpr int N = decltype(n)::value, ORDER = EightOf<N>::order;
        if (int(threadIdx.x) == N % THREADS) factors[N] = ORDER >= 0 ? f32(EightOf<N>::times) * p.a[ORDER >= 0 ? ORDER : 0] : 0.0f;
    });
}

// ---- Tokens in shared memory ----------------------------------------------------------------------------------
// g of a chunk's tokens, after that of the token before it; zeros where there are none.
constexpr int OF_G = FADES ? CHUNK + 2 : 2;
DEVICE void fetch_g(f64* to, const Place& u, int chunk) {
    if constexpr (FADES) {
        spread<CHUNK + 1>([&](int i) {
            const int token = chunk * CHUNK - 1 + i;
            const bool is = token >= 0 && token < u.at.tokens;
            copy_async<8>(to + i, u.g + (is ? token : 0), is ? 8 : 0);
        });
    }
}
// The logarithm to base 2 of what a token of a chunk has faded since the token before the chunk, or since another mark.
DEVICE f32 log_of(const f64* g, int t, f64 mark) { return FADES ? f32(g[1 + t] - mark) * LOG2_E : 0.0f; }
DEVICE f32 log_of(const f64* g, int t) { return log_of(g, t, g[0]); }
// What sums fade by when they are no longer relative to one mark, but to another.
DEVICE f32 fading(f64 to, f64 from) { return exp2_of(f32(to - from) * LOG2_E); }

// Rows [CHUNK x D_KEY] of tokens from `first` on; zeros after the last.
DEVICE void fetch_keys(bf16* to, const Rows& x, int first, int tokens) {
    spread<CHUNK * KEY_TILES>([&](int i) {
        const int t = i / KEY_TILES, part = i % KEY_TILES;
        const bool is = first + t < tokens;
        copy_async<16>(to + t * KEY_STRIDE + part * 8, x.first + (is ? first + t : 0) * x.stride + part * 8, is ? 16 : 0);
    });
}
// The same of values, whose further columns stay as they are.
DEVICE void fetch_values(bf16* to, const Rows& x, int first, int tokens) {
    if constexpr (D_VALUE % 8 == 0) {
        constexpr int PARTS = D_VALUE / 8;
        spread<CHUNK * PARTS>([&](int i) {
            const int t = i / PARTS, part = i % PARTS;
            const bool is = first + t < tokens;
            copy_async<16>(to + t * COLUMN_STRIDE + part * 8, x.first + (is ? first + t : 0) * x.stride + part * 8, is ? 16 : 0);
        });
    } else {
#pragma unroll 1
        for (int i = threadIdx.x; i < CHUNK * D_VALUE; i += THREADS) {
            const int t = i / D_VALUE, j = i % D_VALUE;
            bf16 element;
            element.bits = 0;
            if (first + t < tokens) element = (x.first + (first + t) * x.stride)[j];
            to[t * COLUMN_STRIDE + j] = element;
        }
    }
}
// The ones after a value, and zeros; all zeros after the last token.
DEVICE void put_ones(bf16* to, int first, int tokens) {
#pragma unroll 1
    for (int i = threadIdx.x; i < CHUNK * (COLUMNS - D_VALUE); i += THREADS) {
        const int t = i / (COLUMNS - D_VALUE), j = i % (COLUMNS - D_VALUE);
        to[t * COLUMN_STRIDE + D_VALUE + j].bits = j <= 1 && first + t < tokens ? 0x3f80 : 0;
    }
}
// [D_KEY x CHUNK] of rows.
DEVICE void turn(bf16* to, const bf16* rows) {
    spread<CHUNK * (D_KEY / 4)>([&](int i) {
        const int t = i % CHUNK, part = i / CHUNK * 4;
        const uint2 x = *reinterpret_cast<const uint2*>(rows + t * KEY_STRIDE + part);
        bf16* column = to + part * TURNED_STRIDE + t;
        column[0].bits = u16(x.x);
        column[TURNED_STRIDE].bits = u16(x.x >> 16);
        column[2 * TURNED_STRIDE].bits = u16(x.y);
        column[3 * TURNED_STRIDE].bits = u16(x.y >> 16);
    });
}
// Columns of each token times what fades until the last token of the chunk.
DEVICE void fade_columns(bf16* to, const bf16* from, const f64* g) {
    const f64 last = g[CHUNK];
    spread<CHUNK * COLUMNS / 2>([&](int i) {
        const int t = i / (COLUMNS / 2), at = t * COLUMN_STRIDE + i % (COLUMNS / 2) * 2;
        const f32 by = exp2_of(-log_of(g, t, last));
        const u32 x = *reinterpret_cast<const u32*>(from + at);
        *reinterpret_cast<u32*>(to + at) = bf16x2_bits(low_of(x) * by, high_of(x) * by);
    });
}

// ---- Pairs ----------------------------------------------------------------------------------------------------
// Of a warp's rows and 16 tokens: two tiles of 8 columns for each tile of rows.
typedef f32 OfPairs[ROW_TILES][2][4];

// x = rows · tokensᵀ, tokens in shared memory.
DEVICE void logits(OfPairs& x, const Rotated& rows, const bf16* tokens, int part) {
    const int lane = lane_now();
    clear(x);
    if constexpr (D_KEY == 16) {
        u32 w[4];
        // Rows are rotated by 8 part, and so are tokens.
        load_matrices<false>(w, tokens + (lane / 16 * 8 + lane % 8) * KEY_STRIDE + (lane / 8 % 2 ^ part) * 8);
#pragma unroll
        for (int m = 0; m < ROW_TILES; m++) {
            const u32 a0 = rows.pair[m][0][0], a1 = rows.pair[m][1][0];
            const u32 a2 = rows.pair[m][0][8 % D_KEY], a3 = rows.pair[m][1][8 % D_KEY];
            multiply(x[m][0], a0, a1, a2, a3, w[0], w[1]);
            multiply(x[m][1], a0, a1, a2, a3, w[2], w[3]);
        }
    } else {
        u32 w[2];
        load_matrices<false>(w, tokens + lane % 16 * KEY_STRIDE);
#pragma unroll
        for (int m = 0; m < ROW_TILES; m++) {
            multiply(x[m][0], rows.pair[m][0][0], rows.pair[m][1][0], w[0]);
            multiply(x[m][1], rows.pair[m][0][0], rows.pair[m][1][0], w[1]);
        }
    }
}
// c += w · (16 tokens' columns).
DEVICE void weigh_columns(OfColumns& c, const OfPairs& w, const bf16* columns) {
    const Right right = right_rows(columns, lane_now());
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++) {
        const u32 a0 = bf16x2_bits(w[m][0][0], w[m][0][1]), a1 = bf16x2_bits(w[m][0][2], w[m][0][3]);
        const u32 a2 = bf16x2_bits(w[m][1][0], w[m][1][1]), a3 = bf16x2_bits(w[m][1][2], w[m][1][3]);
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n++) multiply(c[m][n], a0, a1, a2, a3, right.word[n][0], right.word[n][1]);
    }
}
// c += w · (16 tokens' keys).
DEVICE void weigh_keys(OfKeys& c, const OfPairs& w, const bf16* tokens) {
    const int lane = lane_now();
    u32 b[2 * KEY_TILES];
    load_matrices<true>(b, tokens + lane % 16 * KEY_STRIDE + (KEY_TILES == 2 ? lane / 16 * 8 : 0));
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++) {
        const u32 a0 = bf16x2_bits(w[m][0][0], w[m][0][1]), a1 = bf16x2_bits(w[m][0][2], w[m][0][3]);
        const u32 a2 = bf16x2_bits(w[m][1][0], w[m][1][1]), a3 = bf16x2_bits(w[m][1][2], w[m][1][3]);
#pragma unroll
        for (int n = 0; n < KEY_TILES; n++) multiply(c[m][n], a0, a1, a2, a3, b[2 * n], b[2 * n + 1]);
    }
}
// w *= left · (16 tokens' columns)ᵀ.
DEVICE void times_columns(OfPairs& w, const Left& left, const bf16* columns) {
    const Right right = right_columns(columns, lane_now());
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++) {
#pragma unroll
        for (int n = 0; n < 2; n++) {
            f32 d[4] = {0, 0, 0, 0};
            transposed_times(d, left.word[m], right, n);
#pragma unroll
            for (int j = 0; j < 4; j++) w[m][n][j] *= d[j];
        }
    }
}
DEVICE f32 polynomial(const Walk& p, f32 x) { return fmaf(fmaf(fmaf(p.a[3], x, p.a[2]), x, p.a[1]), x, p.a[0]); }
DEVICE f32 slope(const Walk& p, f32 x) { return fmaf(fmaf(3.0f * p.a[3], x, 2.0f * p.a[2]), x, p.a[1]); }

// What a pair of row and column weighs, but for the polynomial or exponential, as logarithms to base 2: that of rows g and
// g+8 of each tile, those of columns in shared memory, that of all.
constexpr bool LOGS = FADES || NEAR;
struct Logs {
    f32 row[ROW_TILES][2];
    const f32* column;
    f32 all;
};
// A tile of columns beside a warp's rows: whether a key is only seen by its own and later tokens, columns being keys or
// queries; where the first row is, less where the first column is; and which tiles of rows are near it, as bits.
enum Cut { WHOLE, UP_TO_ROW, FROM_ROW };
struct Beside {
    Cut cut;
    int ahead;
    u32 near;
};

// Of logits x: weights, or their slopes, times what the pair weighs otherwise.
template <bool SLOPE>
DEVICE void weigh(const Walk& p, OfPairs& w, const OfPairs& x, const Logs& logs, const Beside& beside) {
    const int lane = lane_now(), g = lane / 4, t = lane % 4;
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++) {
        if (NEAR && (beside.near >> m & 1) != 0) {
#pragma unroll
            for (int n = 0; n < 2; n++) {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const f32 log = logs.row[m][j / 2] + logs.column[8 * n + 2 * t + j % 2] + logs.all;
                    w[m][n][j] = exp2_of(fmaf(x[m][n][j], p.scale * LOG2_E, log)) * (SLOPE ? p.scale : 1.0f);
                }
            }
        } else {
#pragma unroll
            for (int n = 0; n < 2; n++) {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    w[m][n][j] = SLOPE ? slope(p, x[m][n][j]) : polynomial(p, x[m][n][j]);
                    if constexpr (LOGS) {
                        w[m][n][j] *= exp2_of(logs.row[m][j / 2] + logs.column[8 * n + 2 * t + j % 2] + logs.all);
                    }
                }
            }
        }
    }
    if (beside.cut != WHOLE) {
#pragma unroll
        for (int m = 0; m < ROW_TILES; m++) {
#pragma unroll
            for (int n = 0; n < 2; n++) {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const int ahead = beside.ahead + 16 * m + g + j / 2 * 8 - (8 * n + 2 * t + j % 2);
                    if (beside.cut == UP_TO_ROW ? ahead < 0 : ahead > 0) w[m][n][j] = 0;
                }
            }
        }
    }
}
// Whether tokens of two tiles of 16 are near each other.
DEVICE bool is_near(const Walk& p, int query, int key) { return NEAR && query / p.block - key / p.block <= p.near; }

// In shared memory, where it takes no registers. All threads of the block take part.
DEVICE void find_place(const Walk& p, Place& u) {
    if (threadIdx.x == 0) {
        u.at = p.items[blockIdx.x];
        u.head = int(blockIdx.y);
        u.g = FADES ? p.g + (u.head * p.works + u.at.work) : nullptr;
        u.q = rows_of(p.q, u.at.q_batch, u.head * p.group, u.at.q_first);
        u.dy = rows_of(p.dy, u.at.q_batch, u.head * p.group, u.at.q_first);
        u.k = rows_of(p.k, u.at.k_batch, u.head, u.at.k_first);
        u.v = rows_of(p.v, u.at.k_batch, u.head, u.at.k_first);
    }
    __syncthreads();
}
DEVICE i64 query_at(const Walk& p, const Place& u, int h) { return (u.head * p.group + h) * p.works + u.at.work; }
