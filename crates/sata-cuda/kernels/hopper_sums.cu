// Sums of chunks: features of keys times values and ones, weighed to the end of the chunk.
//
// tiles  records of 64 tokens for sums (hopper.cuh)
// sums   f32 [kv head][chunk][feature block][8][NP], in program order; or, with PREFIX,
// far    bf16 [kv head][chunk][feature block][NP / 8][8 features][8]: what precedes each chunk, times its coefficient
//
// A warpgroup owns up to TILES tiles of 64 features in its accumulators and streams tokens past them: features are made
// in registers, transposed (rows are features, columns tokens), values come from the ring. 2 * features * NP FLOPs a
// token; bytes: the records once per block of threads, the sums once.
//
// Without PREFIX a block of threads has one chunk. With it, a slice of features and all chunks of a head, one after
// another, are a unit; what precedes a chunk stays in shared memory, and nothing but `far` is written. Blocks work in
// teams, whose members have different slices of the same heads at the same time, so that tokens come from memory once a
// team. The units of one member, end to end, are cut into as many stretches of chunks as there are teams, each at least a
// unit long. A block first does the head of the unit that the next team ends, and leaves what it came to; then whole
// units; and last the tail of the unit that the team before has begun, which is long there by then. No block waits for
// one that waits.
#include "hopper.cuh"
#include "hopper_mma.cuh"

constexpr int TILES = SUM_TILES;             // accumulators: TILES * NA registers
constexpr int GROUP_TILES = SUM_GROUP;       // multiplied at once
constexpr int PAIRS = 2 * TILES;             // feature blocks of a warp
constexpr int GROUPS = 36 / PAIRS;           // parts of a T
constexpr int THREADS = WARPGROUPS * 128 + 128;
constexpr int STAGE_BYTES = (SUM_TILE_BYTES + 127) & ~127;

// Work of a warpgroup: T items, then R items, then the rest, tile by tile.
constexpr int C_GROUPS = (NB + 3) / 4;
constexpr int T_ITEMS = !HAS3 || NB == 1 ? 0 : NB == 2 ? GROUPS : NB * C_GROUPS * GROUPS;
__host__ __device__ constexpr int r_items_of(int b) { return (8 * b + TILES - 1) / TILES; }
__host__ __device__ constexpr int r_items() {
    int n = 0;
    for (int b = 1; b < NB; b++) n += (NB - 1 - b) * r_items_of(b);
    return n;
}
constexpr int R_ITEMS = HAS3 ? r_items() : 0;
constexpr int REST_BASE = NB == 1 ? 0 : Q_BASE;
constexpr int REST_ITEMS = ((BLOCKS - REST_BASE + 7) / 8 + TILES - 1) / TILES;
constexpr int ITEMS = T_ITEMS + R_ITEMS + REST_ITEMS;
static_assert(NB != 1 || REST_ITEMS <= 1, "all features of 8 elements fit one item");

constexpr int GRID = (ITEMS + WARPGROUPS - 1) / WARPGROUPS;  // blocks of threads for a chunk

// Whether accumulators leave registers for what tiles are made of.
constexpr bool FEW = TILES * NA <= 64;

// What a thread keeps of what precedes a chunk, 16 bytes at a time, each beside the other threads'.
constexpr int KEPT = TILES * NA / 4;
constexpr int KEPT_BYTES = PREFIX ? WARPGROUPS * KEPT * 128 * 16 : 0;

struct SumChunks {
    const char* tiles;
    float* sums;                // or, with PREFIX:
    u16* far;
    const float* coefficients;  // [feature block][8]
    const double* references;   // [kv head][chunk]
    float4* left;               // [block of threads][WARPGROUPS][KEPT][128]: what its head came to
    u32* ready;                 // [block of threads][WARPGROUPS]: whether that is there; zeros before
    const int4* items;          // a chunk's first tile, how many tiles, its place, its number in its sequence
    int item_count, heads, tile_count, chunk_count;
    int team, unused;           // blocks of a team
};
static_assert(sizeof(SumChunks) == SUMS_BYTES && BLOCKS == FEATURE_BLOCKS && SUM_TILE_BYTES == TOKEN_TILE_BYTES, "as in Rust");
static_assert(GRID == CHUNK_BLOCKS && STAGES * STAGE_BYTES + KEPT_BYTES + STAGES * 16 == SUMS_SHARED, "as in Rust");

// The ring of token tiles as one warpgroup sees it.
struct Stream {
    u32 base, bars;
    int stage;
    u32 phase;
    DEV_MEMBER u32 acquire() {
        barrier_wait(bars + 8 * stage, phase);
        return base + stage * STAGE_BYTES;
    }
    DEV_MEMBER void release() {
        group_arrive(bars + 8 * (STAGES + stage));
        if (++stage == STAGES) {
            stage = 0;
            phase ^= 1;
        }
    }
};

DEV uint2 mul(uint2 a, uint2 b) { return make_uint2(mul2(a.x, b.x), mul2(a.y, b.y)); }
// A's words of a step of 16 tokens for some tiles: rows `low` and `low + 8` of each.
template <int G> struct Steps {
    uint2 low[G], high[G];
};
// Multiplies some tiles while the next steps are being made: two groups of a warpgroup are always on their way.
template <int FIRST, int G, class Make> DEV Steps<G> multiply(float (&acc)[TILES][NA], const Steps<G>& a, u64 b, Make make) {
    mma_fence();
#pragma unroll
    for (int t = 0; t < G; t++) Mma<NP>::run<1>(acc[FIRST + t], a.low[t].x, a.high[t].x, a.low[t].y, a.high[t].y, b);
    mma_commit();
    const Steps<G> next = make();
    mma_wait<1>();
    return next;
}
DEV u64 values_descriptor(u32 stage, int slab) { return descriptor(stage + 4 * SLAB_BYTES + slab * (32 * NP), NP * 16, 128); }
// All tiles, G at a time from FIRST on; `next(first)` makes the steps from tile `first` on.
template <int FIRST, int G, class Next> DEV void multiply_all(float (&acc)[TILES][NA], Steps<G>& steps, u64 b, Next next) {
    if constexpr (FIRST < TILES) {
        steps = multiply<FIRST>(acc, steps, b, [&] { return next(FIRST + G); });
        multiply_all<FIRST + G>(acc, steps, b, next);
    }
}
DEV void clear(float (&acc)[TILES][NA]) {
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int i = 0; i < NA; i++) acc[t][i] = 0.f;
}
DEV void settle(float (&acc)[TILES][NA]) {
#pragma unroll
    for (int t = 0; t < TILES; t++) mma_touch(acc[t]);
}

// Some chunks of a unit, and where their sums go.
struct Part {
    int kv, slice, item, end, number;
    bool follows, leads;  // whether the block before has what precedes it; whether the next one wants what it comes to
};
// What the warpgroups are at, in shared memory: registers are scarce.
__shared__ Part parts[WARPGROUPS];
DEV float4* kept_of(int thread) { return (float4*)(shared + STAGES * STAGE_BYTES) + (thread >> 7) * KEPT * 128 + (thread & 127); }

struct Output {
    const SumChunks& p;
    DEV_MEMBER void begin() {
        if constexpr (PREFIX) {
            const Part& part = parts[threadIdx.x >> 7];
            float4* const kept = kept_of(threadIdx.x);
            if (!part.follows || p.items[part.item].w == 0) return;
            const int place = (blockIdx.x - p.team) * WARPGROUPS + (threadIdx.x >> 7);
            flag_wait(p.ready + place);
            const float4* const left = p.left + (i64)place * KEPT * 128 + (threadIdx.x & 127);
            for (int i = 0; i < KEPT; i++) kept[i * 128] = __ldcg(left + i * 128);
        }
    }
    // After the last tile of a chunk; `where` has each tile's feature blocks. The tiles of the next chunk, or 0.
    template <class Where> DEV_MEMBER int end(float (&acc)[TILES][NA], Where where) {
        constexpr i64 SIZE = BLOCKS * 8 * NP;
        const int thread = thread_here(), wg = thread >> 7, row = (thread & 31) >> 2, m = thread & 3;
        Part& part = parts[wg];
        float4* const kept = kept_of(thread);
        const int item = part.item;
        const int4 now = p.items[item];
        if constexpr (PREFIX) {
            const i64 place = (i64)part.kv * p.chunk_count + now.z;
            u32* const far = (u32*)(p.far + (place + 1) * SIZE);
            float fade = now.w == 0 ? 0.f : 1.f;
            if constexpr (HAS_G) {
                if (now.w > 0) fade = exp2_fast((float)(p.references[place + 1] - p.references[place]) * LOG2E);
            }
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                const int2 block = where(t);
                const float low = block.x < 0 ? 0.f : p.coefficients[block.x * 8 + row], high = block.y < 0 ? 0.f : p.coefficients[block.y * 8 + row];
#pragma unroll
                for (int j = 0; j < NA / 4; j++) {
                    float4& keep = kept[(t * (NA / 4) + j) * 128];
                    float4 x = make_float4(acc[t][4 * j], acc[t][4 * j + 1], acc[t][4 * j + 2], acc[t][4 * j + 3]);
                    if (now.w > 0) {
                        const float4 before = keep;
                        x.x = fmaf(before.x, fade, x.x);
                        x.y = fmaf(before.y, fade, x.y);
                        x.z = fmaf(before.z, fade, x.z);
                        x.w = fmaf(before.w, fade, x.w);
                    }
                    keep = x;
                    if (block.x >= 0) far[((block.x * (NP / 8) + j) * 8 + row) * 4 + m] = pack2(x.x * low, x.y * low);
                    if (block.y >= 0) far[((block.y * (NP / 8) + j) * 8 + row) * 4 + m] = pack2(x.z * high, x.w * high);
                    // One after another: registers are scarce.
                    in_order();
                }
            }
        } else {
            float* const sums = p.sums + ((i64)part.kv * p.chunk_count + now.z) * SIZE;
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                const int2 block = where(t);
#pragma unroll
                for (int j = 0; j < NA / 4; j++) {
                    if (block.x >= 0) *(float2*)(sums + (block.x * 8 + row) * NP + 8 * j + 2 * m) = make_float2(acc[t][4 * j], acc[t][4 * j + 1]);
                    if (block.y >= 0) *(float2*)(sums + (block.y * 8 + row) * NP + 8 * j + 2 * m) = make_float2(acc[t][4 * j + 2], acc[t][4 * j + 3]);
                }
            }
        }
        clear(acc);
        const bool more = item + 1 < part.end;
        group_sync(1 + wg, 128);
        if (more) {
            if ((thread & 127) == 0) part.item = item + 1;
            group_sync(1 + wg, 128);
            return p.items[item + 1].y;
        }
        if constexpr (PREFIX) {
            if (part.leads) {
                const int place = blockIdx.x * WARPGROUPS + wg;
                float4* const left = p.left + (i64)place * KEPT * 128 + (thread & 127);
                for (int i = 0; i < KEPT; i++) left[i * 128] = kept[i * 128];
                __threadfence();
                group_sync(1 + wg, 128);
                if ((thread & 127) == 0) flag_set(p.ready + place);
            }
        }
        return 0;
    }
};
// Streams a part's tiles: `load(at, slab)` loads what `make(at, slab, first tile)` makes steps of.
template <int G, class Load, class Make, class Where> DEV void stream_part(Stream& stream, Output& out, Load load, Make make, Where where) {
    float acc[TILES][NA];
    clear(acc);
    out.begin();
    int left = out.p.items[parts[threadIdx.x >> 7].item].y;
#pragma unroll 1
    do {
        const u32 at = stream.acquire();
        load(at, 0);
        Steps<G> steps = make(at, 0, 0);
#pragma unroll
        for (int slab = 0; slab < 4; slab++)
            multiply_all<0>(acc, steps, values_descriptor(at, slab), [&](int first) {
                if (first < TILES) return make(at, slab, first);
                if (slab == 3) return steps;
                load(at, slab + 1);
                return make(at, slab + 1, 0);
            });
        mma_wait<0>();
        stream.release();
        if (--left == 0) {
            settle(acc);
            left = out.end(acc, where);
        }
    } while (left > 0);
}

// Part GROUP of T(a; c): this warp's prefixes are the same as the other warps', its block c is its own.
template <int GROUP> DEV void t_item(Stream& stream, int a, int c, bool mine, Output& out) {
    constexpr Pairs P;
    const int lane = threadIdx.x & 31, block = T_BASE + 36 * (a * NB + c) + GROUP * PAIRS;
    const u32 keys_a = (lane & 3) * 8 + a * 256, keys_c = (lane & 3) * 8 + c * 256 + (lane >> 2) * 32;
    uint2 x[8], u[8];
    stream_part<GROUP_TILES>(
        stream, out,
        [&](u32 at, int slab) {
            const uint2 kc = load_pair(at + keys_c + slab * SLAB_BYTES);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                bool is_i = false, is_j = false;
#pragma unroll
                for (int e = GROUP * PAIRS; e < (GROUP + 1) * PAIRS; e++) {
                    is_i |= P.i[e] == i;
                    is_j |= P.j[e] == i;
                }
                if (is_i || is_j) x[i] = load_pair(at + keys_a + slab * SLAB_BYTES + i * 32);
                if (is_j) u[i] = mul(x[i], kc);
            }
        },
        [&](u32, int, int first) {
            Steps<GROUP_TILES> steps;
#pragma unroll
            for (int t = 0; t < GROUP_TILES; t++) {
                const int e = GROUP * PAIRS + 2 * (first + t);
                steps.low[t] = mul(x[P.i[e]], u[P.j[e]]);
                steps.high[t] = mul(x[P.i[e + 1]], u[P.j[e + 1]]);
            }
            return steps;
        },
        [&](int t) {
            int at = block;
            forget(at);
            return mine ? make_int2(at + 2 * t, at + 2 * t + 1) : make_int2(-1, -1);
        });
}

// Prefixes x_i x_j of R(b, c), i from `first` on; this warp has two j.
DEV void r_item(Stream& stream, int b, int c, int first, Output& out) {
    const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
    const int block = R_BASE + r_blocks_before(b) + (c - b - 1) * 64 * b + 2 * warp;
    const u32 keys_b = (lane & 3) * 8 + (8 * b + 2 * warp) * 32, keys_c = (lane & 3) * 8 + (8 * c + (lane >> 2)) * 32;
    const u32 keys_i = (lane & 3) * 8 + first * 32;
    uint2 u0, u1;
    stream_part<GROUP_TILES>(
        stream, out,
        [&](u32 at, int slab) {
            const uint2 kc = load_pair(at + keys_c + slab * SLAB_BYTES);
            u0 = mul(kc, load_pair(at + keys_b + slab * SLAB_BYTES));
            u1 = mul(kc, load_pair(at + keys_b + slab * SLAB_BYTES + 32));
        },
        [&](u32 at, int slab, int first) {
            Steps<GROUP_TILES> steps;
#pragma unroll
            for (int t = 0; t < GROUP_TILES; t++) {
                const uint2 x = load_pair(at + keys_i + slab * SLAB_BYTES + (first + t) * 32);
                steps.low[t] = mul(x, u0);
                steps.high[t] = mul(x, u1);
            }
            return steps;
        },
        [&](int t) {
            int at = block;
            forget(at);
            return first + t < 8 * b ? make_int2(at + 8 * (first + t), at + 8 * (first + t) + 1) : make_int2(-1, -1);
        });
}

// Rows of keys whose product is a feature block of order 2 or less: prefix, last (its rows `stride` bytes apart).
struct Rest {
    u32 prefix, last, stride;
};
DEV Rest rest_of(int block) {
    const u32 ones = D_KEY * 32;
    if (HAS2 && block < L_BASE) {
        int e = block - Q_BASE, b = 0;
        while (e >= 8 * (NB - b)) e -= 8 * (NB - b++);
        return Rest{(u32)(8 * b + e % 8) * 32, (u32)(8 * (b + e / 8)) * 32, 32};
    }
    const int e = block - L_BASE;
    if (HAS1 && e < NB) return Rest{ones, (u32)(8 * e) * 32, 32};
    return Rest{ones, ones, 0};
}
// Where the rows of a warp's tiles lie, prefix and last, 16 bits each, and in the lowest whether the last ones are 8: in
// shared memory where registers are scarce.
__shared__ u32 rest_rows[WARPGROUPS * 4][TILES][2];
// Tiles of order 2 alone, each of which has one block c of last elements, or those with the last few features among them.
template <bool MIXED> DEV void rest_item(Stream& stream, int first, Output& out) {
    const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
    u32(&mine)[TILES][2] = rest_rows[threadIdx.x >> 5];
    u32 rows[TILES][2];
    __syncwarp();
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int h = 0; h < (MIXED ? 2 : 1); h++) {
            const Rest rest = rest_of(first + 8 * t + 2 * warp + h);
            rows[t][h] = rest.prefix | rest.last << 16 | rest.stride >> 5;
            if (!FEW && lane == 0) mine[t][h] = rows[t][h];
        }
    __syncwarp();
    stream_part<1>(
        stream, out, [](u32, int) {},
        [&](u32 at, int slab, int t) {
            const u32 keys = at + slab * SLAB_BYTES + (lane & 3) * 8, row = (lane >> 2) * 32;
            auto last_of = [&](u32 w) { return load_pair(keys + (w >> 16) + (w & 1) * row); };
            const u32 low = FEW ? rows[t][0] : mine[t][0];
            const uint2 last = last_of(low);
            Steps<1> steps;
            steps.low[0] = mul(load_pair(keys + (low & 0xffe0)), last);
            if constexpr (MIXED) {
                const u32 high = FEW ? rows[t][1] : mine[t][1];
                steps.high[0] = mul(load_pair(keys + (high & 0xffe0)), last_of(high));
            } else {
                steps.high[0] = mul(load_pair(keys + (low & 0xffe0) + 32), last);
            }
            return steps;
        },
        [&](int t) {
            int block = first + 2 * warp;
            forget(block);
            block += 8 * t;
            return make_int2(block < BLOCKS ? block : -1, block + 1 < BLOCKS ? block + 1 : -1);
        });
}

// Keys of one block of 8: all features at once; each warp makes its own, with compile-time places.
template <int WARP, int ITEM> DEV void make_all(uint2 (&a)[TILES][2], const uint2 (&x)[8], uint2 last) {
    constexpr Pairs P;
    const uint2 one = make_uint2(0x3f803f80u, 0x3f803f80u);
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int e = ITEM * PAIRS * 4 + 8 * t + 2 * WARP + h;
            if (e < T_BLOCKS) a[t][h] = mul(mul(x[P.j[e < 36 ? e : 0]], last), x[P.i[e < 36 ? e : 0]]);
            else if (e < L_BASE) a[t][h] = mul(x[(e - Q_BASE) & 7], last);
            else if (HAS1 && e == L_BASE) a[t][h] = last;
            else a[t][h] = one;
        }
}
template <int ITEM> DEV void all_item(Stream& stream, Output& out) {
    const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
    float acc[TILES][NA];
    clear(acc);
    out.begin();
    int left = out.p.items[parts[threadIdx.x >> 7].item].y;
#pragma unroll 1
    do {
        const u32 at = stream.acquire();
#pragma unroll 1
        for (int slab = 0; slab < 4; slab++) {
            const u32 keys = at + slab * SLAB_BYTES + (lane & 3) * 8;
            uint2 x[8], a[TILES][2];
#pragma unroll
            for (int i = 0; i < 8; i++) x[i] = load_pair(keys + i * 32);
            const uint2 last = load_pair(keys + (lane >> 2) * 32);
            if (warp == 0) make_all<0, ITEM>(a, x, last);
            else if (warp == 1) make_all<1, ITEM>(a, x, last);
            else if (warp == 2) make_all<2, ITEM>(a, x, last);
            else make_all<3, ITEM>(a, x, last);
            const u64 desc = values_descriptor(at, slab);
            mma_fence();
#pragma unroll
            for (int t = 0; t < TILES; t++) Mma<NP>::run<1>(acc[t], a[t][0].x, a[t][1].x, a[t][0].y, a[t][1].y, desc);
            mma_commit();
            mma_wait<0>();
        }
        stream.release();
        if (--left == 0) {
            settle(acc);
            left = out.end(acc, [&](int t) {
                const int block = ITEM * PAIRS * 4 + 8 * t + 2 * warp;
                return make_int2(block < BLOCKS ? block : -1, block + 1 < BLOCKS ? block + 1 : -1);
            });
        }
    } while (left > 0);
}

template <int GROUP> DEV void t_group(int group, Stream& stream, int a, int c, bool mine, Output& out) {
    if constexpr (GROUP < GROUPS) {
        if (group == GROUP) t_item<GROUP>(stream, a, c, mine, out);
        else t_group<GROUP + 1>(group, stream, a, c, mine, out);
    }
}

// One part of a warpgroup's work.
DEV void run_item(int item, Stream& stream, Output& out) {
    const int w = threadIdx.x >> 5 & 3;
    if constexpr (NB == 1) {
        if (item == 0) return all_item<0>(stream, out);
    } else {
        if (item < T_ITEMS) {
            if constexpr (NB == 2) {
                t_group<0>(item, stream, w >> 1, w & 1, true, out);
            } else {
                const int c = item / GROUPS % C_GROUPS * 4 + w;
                t_group<0>(item % GROUPS, stream, item / GROUPS / C_GROUPS, min(c, NB - 1), c < NB, out);
            }
            return;
        }
        item -= T_ITEMS;
        if (item < R_ITEMS) {
            int b = 1, n = item;
            while (n >= (NB - 1 - b) * r_items_of(b)) n -= (NB - 1 - b) * r_items_of(b), b++;
            return r_item(stream, b, b + 1 + n / r_items_of(b), n % r_items_of(b) * TILES, out);
        }
        item -= R_ITEMS;
        if (item < REST_ITEMS) {
            const int first = REST_BASE + item * TILES * 8;
            if (HAS2 && first + 8 * TILES <= L_BASE) return rest_item<false>(stream, first, out);
            return rest_item<true>(stream, first, out);
        }
    }
    const Part& part = parts[threadIdx.x >> 7];
    for (int i = part.item; i < part.end; i++)
        for (int t = out.p.items[i].y; t > 0; t--) {
            stream.acquire();
            stream.release();
        }
}

// Part n of this block of threads; false where there are no more. Worked out anew each time: registers are scarce.
DEV bool part_at(const SumChunks& p, int n, Part& part) {
    const u32 block = block_here();
    if constexpr (PREFIX) {
        const int count = p.item_count, team = block / p.team, teams = gridDim.x / p.team, passes = (GRID + p.team - 1) / p.team;
        const i64 all = (i64)count * p.heads * passes, begin = all * team / teams, end = all * (team + 1) / teams;
        const int from = (int)(begin / count), to = (int)(end / count), tail = (int)(begin % count), head = (int)(end % count);
        // The head, whole units, the tail.
        const int whole = from + (tail > 0), at = whole + n - (head > 0);
        const bool is_head = at < whole, is_tail = at == to && tail > 0;
        const int unit = is_head ? to : is_tail ? from : at;
        const int slice = unit % passes * p.team + block % p.team;
        part = Part{unit / passes, slice, is_tail ? tail : 0, is_head ? head : count, n, is_tail, is_head};
        return at < to || is_tail;
    } else {
        const int item = block / GRID;
        part = Part{(int)blockIdx.y, (int)(block % GRID), item, item + 1, n, false, false};
        return n == 0;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) hopper_sums(const __grid_constant__ SumChunks p) {
    const u32 base = smem(shared), bars = base + STAGES * STAGE_BYTES + KEPT_BYTES;
    const int warp = threadIdx.x >> 5;
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            barrier_init(bars + 8 * s, 1);
            barrier_init(bars + 8 * (STAGES + s), WARPGROUPS);
        }
        barrier_init_done();
    }
    __syncthreads();

    if (warp >= WARPGROUPS * 4) {
        role_copies<WARPGROUPS, WARPGROUPS == 2 ? 24 : 32>();
        if (warp == WARPGROUPS * 4 && (threadIdx.x & 31) == 0) {
            int stage = 0;
            u32 phase = 1;
            Part part;
            for (int n = 0; part_at(p, n, part); n++)
                for (int i = part.item; i < part.end; i++) {
                    const int4 item = p.items[i];
                    const char* from = p.tiles + ((i64)part.kv * p.tile_count + item.x) * SUM_TILE_BYTES;
                    for (int t = 0; t < item.y; t++, from += SUM_TILE_BYTES) {
                        barrier_wait(bars + 8 * (STAGES + stage), phase);
                        barrier_expect(bars + 8 * stage, SUM_TILE_BYTES);
                        copy_bulk(base + stage * STAGE_BYTES, from, SUM_TILE_BYTES, bars + 8 * stage);
                        if (++stage == STAGES) {
                            stage = 0;
                            phase ^= 1;
                        }
                    }
                }
        }
        return;
    }
    role_multiplies<WARPGROUPS>();
    Stream stream{base, bars, 0, 0};
#pragma unroll 1
    for (int n = 0;; n = parts[thread_here() >> 7].number + 1) {
        const int wg = thread_here() >> 7;
        Part next;
        if (!part_at(p, n, next)) break;
        group_sync(1 + wg, 128);
        if ((threadIdx.x & 127) == 0) parts[wg] = next;
        group_sync(1 + wg, 128);
        Output out{p};
        run_item(next.slice * WARPGROUPS + wg, stream, out);
    }
}
