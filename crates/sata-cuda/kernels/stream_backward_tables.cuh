// Tables of sums, for stream_backward.cuh, which includes this: what rows read of them, and how they are made.
#pragma once

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
