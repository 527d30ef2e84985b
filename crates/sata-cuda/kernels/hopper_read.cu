// Reading: y = (far sums read by features of q + keys of the same chunk weighed directly) / the same of ones.
//
// q, y  [batch, query heads, tokens, D_KEY or D_VALUE] bf16, strided
// far   bf16 [kv head][chunk][feature block][NP / 8][8 features][8]: what precedes each chunk, coefficients applied
// tiles records of 64 keys (hopper.cuh)
//
// A block of threads takes WARPGROUPS * ROW_TILES * 64 queries of one head, then others. One warp copies slabs of the sums and key
// tiles into a ring; each warpgroup makes features of its queries in registers and multiplies.
// Per query 2 * features * (D_VALUE + 1) FLOPs of the sums, 2 * (D_KEY + D_VALUE + 1) per key of the direct part;
// bytes: q, y once; the sums of a chunk once per block of threads (L2).
#include "hopper_read.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1) hopper_read(const __grid_constant__ ReadQueries p) {
    const u32 base = smem(shared);
    u32* const q_words = (u32*)(shared + STAGES * STAGE_BYTES);
    double* const row_g = (double*)(q_words + QUERIES * Q_WORDS * (PERSISTS ? 2 : 1));
    float* const row_shift = (float*)(row_g + HAS_G * QUERIES);
    int* const near_from = (int*)(row_shift + HAS_NEAR * QUERIES);  // [2][8 row tiles]: the first key that is near any row, all rows
    const u32 bars = base + STAGES * STAGE_BYTES + ROWS_BYTES;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            barrier_init(bars + 8 * s, 1);
            barrier_init(bars + 8 * (STAGES + s), WARPGROUPS * 128);
        }
        barrier_init_done();
    }
    __syncthreads();

    if (warp >= WARPGROUPS * 4) {
        role_copies<WARPGROUPS>();
        if (warp == WARPGROUPS * 4 && lane == 0) {
            int stage = 0;
            u32 phase = 1;
            auto send = [&](const char* from, u32 bytes) {
                const u32 full = bars + 8 * stage, empty = bars + 8 * (STAGES + stage);
                barrier_wait(empty, phase);
                barrier_expect(full, bytes);
                copy_bulk(base + stage * STAGE_BYTES, from, bytes, full);
                if (++stage == STAGES) {
                    stage = 0;
                    phase ^= 1;
                }
            };
            Rows rows;
            for (int n = 0; (n == 0 || PERSISTS) && rows_at(p, n, rows); n++) {
                const char* const tiles = p.tiles + ((i64)rows.kv * p.tile_count + rows.seq.tile) * TILE_BYTES;
                const char* const sinks = p.tiles + ((i64)rows.kv * p.tile_count + rows.seq.sink_tile) * TILE_BYTES;
                if (rows.has_far) {
                    const char* s = (const char*)(p.far + ((i64)rows.kv * p.chunk_count + rows.far_chunk) * (i64)(BLOCKS * 8 * NP));
                    auto steps = [&](int slabs, int n) {
                        for (int t = 0; t < slabs; t++) {
                            send(s, n * STEP_BYTES);
                            s += n * STEP_BYTES;
                        }
                    };
                    steps(T_SLABS, 9);
                    steps(R_SLABS, 8);
                    steps(Q_SLABS, 4);
                    steps(L_SLABS, STEPS_L);
                }
                for (int t = 0; t < rows.sink_tiles; t++) send(sinks + (i64)t * TILE_BYTES, TILE_BYTES);
                for (int t = rows.first_tile; t < rows.end_tile; t++) send(tiles + (i64)t * TILE_BYTES, TILE_BYTES);
            }
        }
        return;
    }

    role_multiplies<WARPGROUPS>();
    // Row tiles of a warpgroup lie far apart, so that the causal work is even.
    const int wg = warp >> 2;
    const int g = (warp & 3) * 16 + (lane >> 2), m = lane & 3;
    Ring ring{base, bars, 0, 0};
    // What the warpgroup is at: looked up anew where it is needed, since registers are scarce.
    __shared__ Rows places[PERSISTS ? WARPGROUPS : 1];
    auto look_up = [&] {
        Rows rows;
        if constexpr (PERSISTS) rows = places[wg];
        else rows_at(p, 0, rows);
        return rows;
    };
    auto tile_of = [&](int r) { return r % 2 == 0 ? wg + r * WARPGROUPS : (r + 1) * WARPGROUPS - 1 - wg; };
    // Where in shared memory a row tile has its place, at the same distance in all warpgroups.
    auto place_of = [&](int r) { return wg + r * WARPGROUPS; };
    // Begins to copy the warpgroup's queries.
    auto copy_queries = [&](const Rows& rows) {
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++) {
            u32* const words = q_words + ((PERSISTS ? rows.number & 1 : 0) * QUERIES + place_of(r) * 64) * Q_WORDS;
            for (int e = threadIdx.x & 127; e < 64 * NB; e += 128) {
                const int row = e / NB, c = e % NB, t = rows.row0 + tile_of(r) * 64 + row;
                const bool is = t >= rows.lead && t < rows.count;
                const i64 head = (i64)p.first_head * p.group + rows.local, token = rows.seq.q_first + (is ? t - rows.lead : 0);
                copy_16(words + row * Q_WORDS + 4 * c, p.q.data + rows.seq.q_batch * p.q.batch + head * p.q.head + token * p.q.token + 8 * c, is);
            }
        }
    };
    if constexpr (PERSISTS) {
        Rows first;
        if (rows_at(p, 0, first)) copy_queries(first);
    }
#pragma unroll 1
    for (int number = 0;; number = places[PERSISTS ? wg : 0].number + 1) {
        Rows now;
        if (!rows_at(p, number, now)) break;
        if constexpr (PERSISTS) {
            group_sync(1 + wg, 128);
            if ((threadIdx.x & 127) == 0) places[wg] = now;
        } else {
            copy_queries(now);
        }
        float acc[ROW_TILES][NA];
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++) {
#pragma unroll
            for (int i = 0; i < NA; i++) acc[r][i] = 0.f;
        }
        copy_16_wait();
        group_sync(1 + wg, 128);
        if constexpr (PERSISTS) {
            Rows next;
            if (rows_at(p, number + 1, next)) copy_queries(next);
        }
        const u32* const own = q_words + ((PERSISTS ? number & 1 : 0) * QUERIES + wg * 64 + g) * Q_WORDS + m;
        auto word = [&](int r, int c, int half) { return own[(r * WARPGROUPS * 64 + 8 * half) * Q_WORDS + 4 * c]; };

        if (now.has_far) {
            if constexpr (HAS3) {
                for (int a = 0; a < NB; a++)
                    for (int c = 0; c < NB; c++) {
                        const u64 b0 = sums_descriptor(ring.acquire());
                        u64 b1 = 0;
#pragma unroll
                        for (int r = 0; r < ROW_TILES; r++) {
                            u32 xi[8][2], u[8][2];
                            spread(xi, word(r, a, 0), word(r, a, 1));
                            const u32 c0 = word(r, c, 0), c1 = word(r, c, 1);
#pragma unroll
                            for (int j = 0; j < 8; j++) {
                                u[j][0] = mul2(xi[j][0], c0);
                                u[j][1] = mul2(xi[j][1], c1);
                            }
                            t_steps<0, 9>(acc[r], xi, u, b0);
                            if (r == 0) b1 = sums_descriptor(ring.acquire_second());
                            t_steps<9, 18>(acc[r], xi, u, b1);
                        }
                        mma_wait<0>();
                        ring.release();
                        ring.release();
                    }
                // One loop over slabs: nested ones make the compiler serialise the matrix instructions.
                int b = 1, c = 2, i = 0;
                u32 u[ROW_TILES][8][2];
#pragma unroll 1
                for (int t = 0; t < R_BLOCKS / 16; t++) {
                    if (i == 0) {
#pragma unroll
                        for (int r = 0; r < ROW_TILES; r++) {
                            spread(u[r], word(r, b, 0), word(r, b, 1));
                            const u32 c0 = word(r, c, 0), c1 = word(r, c, 1);
#pragma unroll
                            for (int j = 0; j < 8; j++) {
                                u[r][j][0] = mul2(u[r][j][0], c0);
                                u[r][j][1] = mul2(u[r][j][1], c1);
                            }
                        }
                    }
                    const u64 desc = sums_descriptor(ring.acquire());
#pragma unroll
                    for (int r = 0; r < ROW_TILES; r++) {
                        const int from = (lane & ~3) | (i & 7) >> 1;
                        const u32 v0 = __shfl_sync(~0u, word(r, i >> 3, 0), from), v1 = __shfl_sync(~0u, word(r, i >> 3, 1), from);
#pragma unroll
                        for (int h = 0; h < 2; h++) {
                            const u32 x0 = __byte_perm(v0, 0, h ? 0x3232 : 0x1010), x1 = __byte_perm(v1, 0, h ? 0x3232 : 0x1010);
                            Steps<4> steps;
#pragma unroll
                            for (int j = 0; j < 8; j++) {
                                steps.a[j / 2][j % 2 * 2] = mul2(x0, u[r][j][0]);
                                steps.a[j / 2][j % 2 * 2 + 1] = mul2(x1, u[r][j][1]);
                            }
                            multiply(acc[r], steps, desc + 4 * h * (STEP_BYTES >> 4));
                        }
                    }
                    mma_wait<0>();
                    ring.release();
                    i += 2;
                    if (i == 8 * b) {
                        i = 0;
                        if (++c == NB) c = ++b + 1;
                    }
                }
            }
            if constexpr (HAS2) {
                for (int b = 0; b < NB; b++)
                    for (int c = b; c < NB; c++) {
                        const u64 desc = sums_descriptor(ring.acquire());
#pragma unroll
                        for (int r = 0; r < ROW_TILES; r++) {
                            u32 x[8][2];
                            spread(x, word(r, b, 0), word(r, b, 1));
                            const u32 c0 = word(r, c, 0), c1 = word(r, c, 1);
                            Steps<4> steps;
#pragma unroll
                            for (int i = 0; i < 8; i++) {
                                steps.a[i / 2][i % 2 * 2] = mul2(x[i][0], c0);
                                steps.a[i / 2][i % 2 * 2 + 1] = mul2(x[i][1], c1);
                            }
                            multiply(acc[r], steps, desc);
                        }
                        mma_wait<0>();
                        ring.release();
                    }
            }
            if constexpr (L_BLOCKS > 0) {
                const u64 desc = sums_descriptor(ring.acquire());
                const u32 one = m == 0 ? 0x3f80u : 0u;
#pragma unroll
                for (int r = 0; r < ROW_TILES; r++) {
#pragma unroll
                    for (int s = 0; s < STEPS_L; s++) {
                        Steps<1> steps;
#pragma unroll
                        for (int h = 0; h < 2; h++) {
                            const int e = 2 * s + h;
                            if (HAS1 && e < NB) {
                                steps.a[0][2 * h] = word(r, e, 0);
                                steps.a[0][2 * h + 1] = word(r, e, 1);
                            } else {
                                steps.a[0][2 * h] = steps.a[0][2 * h + 1] = e < L_BLOCKS ? one : 0u;
                            }
                        }
                        multiply(acc[r], steps, desc + s * (STEP_BYTES >> 4));
                    }
                }
                mma_wait<0>();
                ring.release();
            }
        }
        mma_wait<0>();
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++) mma_touch(acc[r]);

        now = look_up();
        // g at the rows, what is left of the far past there, and what weights are relative to.
        if constexpr (HAS_G || HAS_NEAR) {
            if (!p.full) {
                const char* const tiles = tiles_of_window(p, now);
                const double before = HAS_G ? p.references[(i64)now.kv * p.chunk_count + now.far_chunk] : 0.;
#pragma unroll
                for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        const int row = place_of(r) * 64 + g + 8 * h, t = min(now.row0 + tile_of(r) * 64 + g + 8 * h, now.seq.tokens - 1);
                        const double own = HAS_G ? g_at(tiles, t) : 0.;
                        float left = (float)(own - before) * LOG2E;
                        if constexpr (HAS_NEAR) {
                            const float shift = first_shift(p, now, t, own);
                            left = fminf(left - shift, 0.f);
                            if (m == 0) row_shift[row] = shift;
                        }
                        if constexpr (HAS_G) {
                            if (m == 0) row_g[row] = own;
                            const float f = exp2_fast(left);
#pragma unroll
                            for (int j = 0; j < NA / 4; j++) {
                                acc[r][4 * j + 2 * h] *= f;
                                acc[r][4 * j + 2 * h + 1] *= f;
                            }
                        }
                    }
                __syncwarp();
            }
        }

        // Keys one by one: the polynomial where far, exp where near.
        // The first keys that are near any row of a row tile, and all its rows, kept beside the rows' shifts.
        if constexpr (HAS_NEAR) {
            __syncwarp();
#pragma unroll
            for (int r = 0; r < ROW_TILES; r++)
                if ((threadIdx.x & 127) < 2)
                    near_from[tile_of(r) + 8 * (threadIdx.x & 1)] =
                        p.near_blocks < 0 ? 1 << 30 : max(0, ((now.row0 + tile_of(r) * 64 + 63 * (int)(threadIdx.x & 1)) / p.block - p.near_blocks) * p.block);
            group_sync(1 + wg, 128);
        }
        auto horner = [&](float x, const float* a) {
            float y = a[TERMS - 1];
#pragma unroll
            for (int o = TERMS - 2; o >= 0; o--) y = (ORDERS >> o & 1) ? fmaf(y, x, a[o]) : y * x;
            return y;
        };
        // Dot products of a row tile's queries with a tile of keys, begun.
        auto begin = [&](float (&x)[32], int r, u32 at) {
            const u64 keys = descriptor(at, 128, DQ * 16);
#pragma unroll
            for (int i = 0; i < 32; i++) x[i] = 0.f;
#pragma unroll
            for (int k = 0; k < DQ / 16; k++) {
                const u32 hi0 = 2 * k + 1 < NB ? word(r, 2 * k + 1, 0) : 0u, hi1 = 2 * k + 1 < NB ? word(r, 2 * k + 1, 1) : 0u;
                mma_fence();
                Mma<64>::run<0>(x, word(r, 2 * k, 0), word(r, 2 * k, 1), hi0, hi1, keys + k * (256 >> 4));
            }
            mma_commit();
        };
        // Dot products to weights, in pairs as A's words have them.
        // The shift grows where near logits are so large that exp would overflow. In shared memory, one for a row: registers
        // are scarce.
        auto weigh = [&](float (&acc)[NA], float (&x)[32], u32 (&w)[16], int r, int n, u32 at) {
            float* const shifts = row_shift + place_of(r) * 64 + g;
            const bool sink_pass = n < now.sink_tiles;
            const int rows = now.row0 + tile_of(r) * 64;
            // Of a sink, its place counted in the window.
            const int key0 = sink_pass ? n * KEY_TILE - (int)min(now.seq.folded, (i64)1 << 30) : (now.first_tile + n - now.sink_tiles) * KEY_TILE;
            float end_fade[2] = {0.f, 0.f};
            const float* const fall = (const float*)(shared + (at - base) + META);
            if constexpr (HAS_G) {
                const double end = *(const double*)(fall + 2 * KEY_TILE);
#pragma unroll
                for (int h = 0; h < 2; h++) end_fade[h] = (float)(row_g[place_of(r) * 64 + g + 8 * h] - end) * LOG2E;
            }
            const bool before = !sink_pass && key0 + KEY_TILE <= rows;
            if (before && (!HAS_NEAR || key0 + KEY_TILE <= near_from[tile_of(r)])) {
                // All far, all before the rows.
                float a[2][TERMS];
                if constexpr (HAS_G || HAS_NEAR) {
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        const float scale = exp2_fast(fminf(end_fade[h] - (HAS_NEAR ? shifts[8 * h] : 0.f), 0.f));
#pragma unroll
                        for (int o = 0; o < TERMS; o++) a[h][o] = p.a[o] * scale;
                    }
                }
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    float2 f = make_float2(1.f, 1.f);
                    if constexpr (HAS_G) f = *(const float2*)(fall + KEY_TILE + 8 * j + 2 * m);
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        float y0 = horner(x[4 * j + 2 * h], HAS_G || HAS_NEAR ? a[h] : p.a), y1 = horner(x[4 * j + 2 * h + 1], HAS_G || HAS_NEAR ? a[h] : p.a);
                        if constexpr (HAS_G) y0 *= f.x, y1 *= f.y;
                        w[2 * j + h] = pack2(y0, y1);
                    }
                }
                return;
            }
            if constexpr (HAS_NEAR) {
                if (!sink_pass && key0 <= rows && key0 >= near_from[tile_of(r) + 8] && key0 % KEY_TILE == 0) {
                    // All near; keys after a row only where both begin at the same token.
                    if (key0 == rows) {
#pragma unroll
                        for (int i = 0; i < 32; i++)
                            if (8 * (i >> 2) + 2 * m + (i & 1) > g + 8 * (i >> 1 & 1)) x[i] = -__int_as_float(0x7f800000);
                    }
                    const float from[2] = {end_fade[0] - shifts[0], end_fade[1] - shifts[8]};
                    u32 most = 0;
#pragma unroll
                    for (int j = 0; j < 8; j++) {
                        float2 f = make_float2(0.f, 0.f);
                        if constexpr (HAS_G) f = *(const float2*)(fall + 8 * j + 2 * m);
#pragma unroll
                        for (int h = 0; h < 2; h++) {
                            w[2 * j + h] = pack2(exp2_fast(fmaf(x[4 * j + 2 * h], p.exp2_scale, from[h] + f.x)),
                                                 exp2_fast(fmaf(x[4 * j + 2 * h + 1], p.exp2_scale, from[h] + f.y)));
                            most = max2(most, w[2 * j + h]);
                        }
                    }
                    // None is 2^80 or more.
                    constexpr u32 LARGE = (127 + 80) << 7;
                    if (!__any_sync(~0u, (most & 0xffff) >= LARGE || most >> 16 >= LARGE)) return;
                }
            }
            int start[2] = {1 << 30, 1 << 30};
            float shift[2] = {0.f, 0.f};
            // What a key has faded to at a row.
            auto faded = [&](int key, int h) { return HAS_G ? fminf(end_fade[h] + fall[key], 0.f) : 0.f; };
            // Whether a key is there: its one is.
            auto is = [&](int key) { return *(const u16*)(shared + (at - base) + ones_of(key)) != 0; };
            if constexpr (HAS_NEAR) {
                float most[2] = {NOTHING, NOTHING};
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    shift[h] = shifts[8 * h];
                    if (p.near_blocks >= 0) start[h] = max(0, ((rows + g + 8 * h) / p.block - p.near_blocks) * p.block);
                    if (sink_pass) start[h] = -(1 << 30);
                }
#pragma unroll
                for (int i = 0; i < 32; i++) {
                    const int key = 8 * (i >> 2) + 2 * m + (i & 1), s = key0 + key, h = i >> 1 & 1;
                    // What has faded is no longer the largest.
                    if (s >= start[h] && s <= rows + g + 8 * h && is(key)) most[h] = fmaxf(most[h], fmaf(x[i], p.exp2_scale, faded(key, h)));
                }
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    most[h] = fmaxf(most[h], __shfl_xor_sync(~0u, most[h], 1));
                    most[h] = fmaxf(most[h], __shfl_xor_sync(~0u, most[h], 2));
                    if (most[h] > shift[h] + 80.f) {
                        const float f = exp2_fast(shift[h] - most[h]);
                        shift[h] = most[h];
#pragma unroll
                        for (int j = 0; j < NA / 4; j++) {
                            acc[4 * j + 2 * h] *= f;
                            acc[4 * j + 2 * h + 1] *= f;
                        }
                    }
                }
                __syncwarp();
                if (m == 0) shifts[0] = shift[0], shifts[8] = shift[1];
                __syncwarp();
            }
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    float y[2];
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const int key = 8 * j + 2 * m + e, s = key0 + key;
                        const float dot = x[4 * j + 2 * h + e], left = faded(key, h) - shift[h];
                        bool sees = s <= rows + g + 8 * h;
                        if (HAS_NEAR && s >= start[h]) {
                            y[e] = exp2_fast(fmaf(dot, p.exp2_scale, left));
                            sees = sees && is(key);
                        } else {
                            y[e] = horner(dot, p.a);
                            if constexpr (HAS_G || HAS_NEAR) y[e] *= exp2_fast(fminf(left, 0.f));
                        }
                        if (!sees) y[e] = 0.f;
                    }
                    w[2 * j + h] = pack2(y[0], y[1]);
                }
        };
        // Adds values by weights, begun.
        auto add = [&](float (&acc)[NA], const u32 (&w)[16], u32 at) {
            const u64 values = descriptor(at + KEY_BYTES, NP * 16, 128);
#pragma unroll
            for (int k = 0; k < 4; k++) {
                mma_fence();
                Mma<NP>::run<1>(acc, w[4 * k], w[4 * k + 1], w[4 * k + 2], w[4 * k + 3], values + k * (2 * NP * 16 >> 4));
            }
            mma_commit();
        };
        // Row tiles lie in ascending order, so first all of them have keys to weigh, then only the last, then none; no
        // branch goes around a matrix instruction, which would serialise them all.
        const int count_of_tiles = p.full ? 0 : now.sink_tiles + now.end_tile - now.first_tile;
        int tiles_of[ROW_TILES];
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++)
            tiles_of[r] = min(count_of_tiles, now.sink_tiles + now.row0 / KEY_TILE + tile_of(r) + 1 - now.first_tile);
        int n = 0;
#pragma unroll 1
        for (; n < tiles_of[0]; n++) {
            const u32 at = ring.acquire();
            if constexpr (TOGETHER) {
                float x[ROW_TILES][32];
#pragma unroll
                for (int r = 0; r < ROW_TILES; r++) begin(x[r], r, at);
#pragma unroll
                for (int r = 0; r < ROW_TILES; r++) {
                    mma_wait<ROW_TILES - 1>();
                    mma_touch(x[r]);
                    u32 w[16];
                    weigh(acc[r], x[r], w, r, n, at);
                    add(acc[r], w, at);
                }
                mma_wait<0>();
            } else {
#pragma unroll
                for (int r = 0; r < ROW_TILES; r++) {
                    float x[32];
                    begin(x, r, at);
                    mma_wait<0>();
                    mma_touch(x);
                    u32 w[16];
                    weigh(acc[r], x, w, r, n, at);
                    add(acc[r], w, at);
                    mma_wait<0>();
                }
            }
            ring.release_keys();
        }
        if constexpr (ROW_TILES == 2) {
#pragma unroll 1
            for (; n < tiles_of[1]; n++) {
                const u32 at = ring.acquire();
                float x[32];
                begin(x, 1, at);
                mma_wait<0>();
                mma_touch(x);
                u32 w[16];
                weigh(acc[1], x, w, 1, n, at);
                add(acc[1], w, at);
                mma_wait<0>();
                ring.release_keys();
            }
        }
        for (; n < count_of_tiles; n++) {
            ring.acquire();
            ring.release_keys();
        }

#pragma unroll
        for (int r = 0; r < ROW_TILES; r++) mma_touch(acc[r]);

        now = look_up();
        // One division.
        const int first_query = now.lead, all = now.count;
        const i64 query_head = (i64)p.first_head * p.group + now.local;
        u32 non_positive = 0, non_finite = 0;
        u64 first = 0;  // the complement of the least place
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                constexpr int ONES = D_VALUE / 8, PLACE = D_VALUE % 8;
                const float sum = __shfl_sync(~0u, acc[r][4 * ONES + 2 * h + PLACE % 2], (lane & ~3) | PLACE / 2);
                const int t = now.row0 + tile_of(r) * 64 + g + 8 * h;
                if (t < first_query || t >= all) continue;
                if (m == 0 && !(sum > 0.f && sum < __int_as_float(0x7f800000))) {
                    const u64 place = ((u64)now.sequence * p.heads + query_head) * p.most_queries + (t - first_query);
                    if (~place > first) first = ~place;
                    if (sum * 0.f == 0.f) non_positive++;
                    else non_finite++;
                }
                const float inverse = 1.f / sum;
                u16* const y = p.y.data + now.seq.q_batch * p.y.batch + query_head * p.y.head + (now.seq.q_first + t - first_query) * p.y.token;
#pragma unroll
                for (int j = 0; j < NA / 4; j++) {
                    const int col = 8 * j + 2 * m;
                    const float y0 = acc[r][4 * j + 2 * h] * inverse, y1 = acc[r][4 * j + 2 * h + 1] * inverse;
                    if (D_VALUE % 2 == 0) {
                        if (col < D_VALUE) *(u32*)(y + col) = pack2(y0, y1);
                    } else {
                        if (col < D_VALUE) y[col] = to_bf16(y0);
                        if (col + 1 < D_VALUE) y[col + 1] = to_bf16(y1);
                    }
                }
            }
        if (first) {
            if (non_positive) atomicAdd(&p.tally->non_positive, (u64)non_positive);
            if (non_finite) atomicAdd(&p.tally->non_finite, (u64)non_finite);
            atomicMax(&p.tally->first, first);
        }
        if constexpr (!PERSISTS) break;
    }
}
