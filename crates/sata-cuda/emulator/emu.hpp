// Runs CUDA kernels on the CPU, from the same sources: each thread of a block is a fiber, fibers of a block
// take turns on one thread of the system, blocks run one after another on as many of those as the caller brings.
//
// The caller brings an arena per thread of the system, ARENA_BYTES, aligned to as much, of zeroed pages:
//
//     | context, fibers' records | stack of fiber 0 | stack of fiber 1 | ...
//
// A fiber finds its record by its stack's address, so no thread-local lookups are needed. Fibers never move to
// another thread of the system, so that __shared__ variables are thread-local ones.
//
// Wrong use is found and reported instead of hanging: a barrier that some threads never reach, shuffles that
// name lanes of other masks, traps. Shared dynamic memory holds NaN when a block begins. Threads run from the
// first to the last in every other block, from the last to the first in the others: where a barrier is missing,
// one of the two reads what is not there yet.
#pragma once

// The C library's functions without the C++ library's templates around them, which take long to read.
#if !__has_include(<__config>)
#define _GLIBCXX_INCLUDE_NEXT_C_HEADERS
#endif
#include <float.h>
#include <math.h>
#include <sched.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emu {

constexpr size_t STACK_BYTES = size_t(1) << 16;
constexpr size_t ARENA_BYTES = size_t(1) << 27;
constexpr unsigned MAX_THREADS = 1024;
constexpr unsigned WARP = 32;
constexpr unsigned MASKS = 8;   // different masks of one warp that may be under way at once
constexpr unsigned BARRIERS = 16;

struct Dim3 {
    unsigned x, y, z;
};

// What the caller asks for, as in Rust.
struct Launch {
    Dim3 grid, block;
    uint64_t shared_bytes;
    uint64_t blocks;     // all of the grid
    uint64_t next;       // the next block to run, shared by all threads of the system
    uint32_t failed;     // set once
    char message[256];
};

#if defined(__x86_64__)
using Context = void*;
#else
using Context = ucontext_t;
#endif

struct Fiber {
    Context context;
    Dim3 thread;
    unsigned index, next, previous;  // in the ring of those that have not ended
    bool ended;
};

struct Barrier {
    unsigned arrived, generation, expected;
    unsigned gathered, result;       // __syncthreads_or and the like
};

// Lanes of one mask that meet: who has come, and how many have yet to take what the last meeting brought.
struct Meeting {
    unsigned mask, arrived, generation, leaving;
    uint64_t slot[2][WARP];
};

struct Warp {
    unsigned alive;
    Meeting meetings[MASKS];
};

struct Block {
    Launch* launch;
    void (*body)(void*);
    void* arguments;
    Dim3 index;
    unsigned threads, alive;
    bool backwards;                  // its threads take turns from the last to the first
    uint64_t progress, seen, idle, naps;
    Context scheduler;
    Barrier barriers[BARRIERS];
    Warp warps[MAX_THREADS / WARP];
    Fiber fibers[MAX_THREADS];
    unsigned char* shared;
};

static_assert(sizeof(Block) <= 8 * STACK_BYTES, "the records fit before the first stack");
constexpr size_t FIRST_STACK = 8;
static_assert((FIRST_STACK + MAX_THREADS) * STACK_BYTES + (size_t(1) << 20) <= ARENA_BYTES, "an arena holds all");
constexpr size_t SHARED_AT = (FIRST_STACK + MAX_THREADS) * STACK_BYTES;
constexpr size_t SHARED_MOST = 228 * 1024;

inline __attribute__((always_inline)) uintptr_t here() {
    return reinterpret_cast<uintptr_t>(__builtin_frame_address(0));
}
inline __attribute__((always_inline)) Block& block() {
    return *reinterpret_cast<Block*>(here() & ~(ARENA_BYTES - 1));
}
inline __attribute__((always_inline)) Fiber& self() {
    uintptr_t at = here();
    size_t index = ((at & (ARENA_BYTES - 1)) / STACK_BYTES) - FIRST_STACK;
    return reinterpret_cast<Block*>(at & ~(ARENA_BYTES - 1))->fibers[index];
}

#if defined(__x86_64__)
extern "C" void sata_emu_switch(void** from, void* to);
__asm__(
    ".text\n"
    ".hidden sata_emu_switch\n"
    ".globl sata_emu_switch\n"
    ".type sata_emu_switch,@function\n"
    "sata_emu_switch:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n"
    ".size sata_emu_switch,.-sata_emu_switch\n");
inline void change(Context& from, Context& to) { sata_emu_switch(&from, to); }
#else
inline void change(Context& from, Context& to) { swapcontext(&from, &to); }
#endif

// Gives up the whole launch.
[[noreturn]] inline void fail(Block& b, const char* why) {
    if (!__atomic_exchange_n(&b.launch->failed, 1u, __ATOMIC_SEQ_CST)) {
        strncpy(b.launch->message, why, sizeof b.launch->message - 1);
    }
    Context dropped;
    change(dropped, b.scheduler);
    __builtin_unreachable();
}

// Lets another fiber run: of the whole block in turn, or of the warp.
inline __attribute__((noinline)) void yield(bool within_warp) {
    Block& b = block();
    Fiber& me = self();
    if (b.progress != b.seen) {
        b.seen = b.progress;
        b.idle = 0;
    } else if (++b.idle > uint64_t(64) * b.alive + 1024) {
        fail(b, "threads wait at a barrier that others never reach");
    }
    unsigned next = me.next;
    if (within_warp) {
        unsigned lane = me.index % WARP, alive = b.warps[me.index / WARP].alive, other;
        if (b.backwards) {
            unsigned before = alive & ((1u << lane) - 1);
            other = 31 - unsigned(__builtin_clz(before ? before : alive));
        } else {
            unsigned after = alive & ~((2u << lane) - 1);
            other = unsigned(__builtin_ctz(after ? after : alive));
        }
        next = me.index - lane + other;
    }
    if (next != me.index) change(me.context, b.fibers[next].context);
    __asm__ volatile("" ::: "memory");
}

// A thread waits for memory that others write, perhaps of another block.
inline void nap() {
    Block& b = block();
    if (++b.naps > 20000000) fail(b, "threads wait for memory that nobody writes");
    ++b.progress;
    if (b.naps % 64 == 0) sched_yield();
    yield(false);
}

inline void release(Block& b, Barrier& barrier) {
    barrier.arrived = 0;
    barrier.result = barrier.gathered;
    barrier.gathered = 0;
    ++barrier.generation;
    ++b.progress;
}

// The block's own barrier waits for all threads that have not ended.
inline unsigned expected(const Block& b, unsigned id) {
    return id == 0 ? b.alive : b.barriers[id].expected;
}

inline unsigned barrier(unsigned id, unsigned threads, unsigned gathered, bool conjunction, bool wait) {
    __asm__ volatile("" ::: "memory");
    Block& b = block();
    if (id >= BARRIERS) fail(b, "there are 16 named barriers");
    Barrier& barrier = b.barriers[id];
    if (id != 0) {
        if (threads == 0 || threads % WARP != 0 || threads > b.threads) {
            fail(b, "a named barrier counts whole warps of the block");
        }
        if (barrier.arrived != 0 && barrier.expected != threads) {
            fail(b, "threads count a named barrier differently");
        }
        barrier.expected = threads;
    }
    barrier.gathered = conjunction ? barrier.gathered + (gathered == 0) : barrier.gathered + gathered;
    unsigned generation = barrier.generation;
    ++b.progress;
    if (++barrier.arrived == expected(b, id)) {
        release(b, barrier);
    } else if (wait) {
        while (barrier.generation == generation) yield(false);
    }
    return barrier.result;
}

// Lets lanes go once all have come that have not ended.
inline void close(const Warp& warp, Meeting& meeting) {
    unsigned wanted = meeting.mask & warp.alive;
    if (meeting.arrived != 0 && (meeting.arrived & wanted) == wanted) {
        meeting.leaving += unsigned(__builtin_popcount(meeting.arrived));
        meeting.arrived = 0;
        ++meeting.generation;
    }
}

// Brings `value` of each lane of `mask` to the others: after it, slots of the meeting hold them.
inline const uint64_t* exchange(unsigned mask, uint64_t value) {
    __asm__ volatile("" ::: "memory");
    Block& b = block();
    Fiber& me = self();
    Warp& warp = b.warps[me.index / WARP];
    unsigned lane = me.index % WARP;
    if (!(mask >> lane & 1)) fail(b, "a lane takes part in a warp's operation whose mask leaves it out");
    Meeting* meeting = nullptr;
    for (Meeting& each : warp.meetings) {
        if (each.mask == mask) { meeting = &each; break; }
        if (!meeting && each.arrived == 0 && each.leaving == 0) meeting = &each;
    }
    if (!meeting) fail(b, "a warp has too many masks under way");
    meeting->mask = mask;
    unsigned generation = meeting->generation;
    // Two sets of slots: a lane may come again before all have left.
    uint64_t* slot = meeting->slot[generation & 1];
    slot[lane] = value;
    meeting->arrived |= 1u << lane;
    ++b.progress;
    close(warp, *meeting);
    while (meeting->generation == generation) yield(true);
    --meeting->leaving;
    return slot;
}

template <class T>
inline uint64_t to_bits(T value) {
    static_assert(sizeof(T) <= 8, "a shuffle carries up to 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    return bits;
}
template <class T>
inline T from_bits(uint64_t bits) {
    T value;
    memcpy(&value, &bits, sizeof(T));
    return value;
}
template <class T>
inline T shuffle(unsigned mask, T value, unsigned from, bool within) {
    unsigned lane = self().index % WARP;
    const uint64_t* slots = exchange(mask, to_bits(value));
    if (!within) return value;
    if (from != lane && !(mask >> from & 1)) fail(block(), "a shuffle reads a lane that its mask leaves out");
    return from_bits<T>(slots[from]);
}

// A thread has ended: barriers no longer wait for it.
[[noreturn]] inline void end() {
    Block& b = block();
    Fiber& me = self();
    me.ended = true;
    ++b.progress;
    Warp& warp = b.warps[me.index / WARP];
    warp.alive &= ~(1u << me.index % WARP);
    for (Meeting& meeting : warp.meetings) close(warp, meeting);
    --b.alive;
    if (b.alive != 0 && b.barriers[0].arrived == b.alive) release(b, b.barriers[0]);
    Context dropped;
    if (b.alive == 0) {
        change(dropped, b.scheduler);
    } else {
        b.fibers[me.previous].next = me.next;
        b.fibers[me.next].previous = me.previous;
        change(dropped, b.fibers[me.next].context);
    }
    __builtin_unreachable();
}

inline void enter() {
    Block& b = block();
    b.body(b.arguments);
    end();
}

inline void make(Block& b, unsigned i) {
    Fiber& fiber = b.fibers[i];
    unsigned char* base = reinterpret_cast<unsigned char*>(&b) + (FIRST_STACK + i) * STACK_BYTES;
    // Tops differ, so that stacks do not all lie in the same lines of the caches.
    size_t top = STACK_BYTES - 64 - (i * 13 % 61) * 64;
#if defined(__x86_64__)
    // Where a call would have left the stack: 8 beside a multiple of 16.
    void** at = reinterpret_cast<void**>(base + top);
    *--at = nullptr;
    *--at = reinterpret_cast<void*>(&enter);
    for (int r = 0; r < 6; ++r) *--at = nullptr;
    fiber.context = at;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = base;
    fiber.context.uc_stack.ss_size = top;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &enter, 0);
#endif
}

// Runs blocks until there are none left. `memory` is an arena.
inline __attribute__((noinline)) void run(void* memory, Launch* launch, void (*body)(void*), void* arguments) {
    Block& b = *static_cast<Block*>(memory);
    b.launch = launch;
    b.body = body;
    b.arguments = arguments;
    b.threads = launch->block.x * launch->block.y * launch->block.z;
    b.shared = static_cast<unsigned char*>(memory) + SHARED_AT;
    for (;;) {
        uint64_t at = __atomic_fetch_add(&launch->next, 1, __ATOMIC_SEQ_CST);
        if (at >= launch->blocks || __atomic_load_n(&launch->failed, __ATOMIC_SEQ_CST)) return;
        b.index.x = unsigned(at % launch->grid.x);
        b.index.y = unsigned(at / launch->grid.x % launch->grid.y);
        b.index.z = unsigned(at / launch->grid.x / launch->grid.y);
        b.alive = b.threads;
        // What lacks a barrier goes wrong in one of the two directions, most likely.
        b.backwards = (b.index.x + b.index.y + b.index.z) % 2 == 1;
        b.progress = b.seen = b.idle = b.naps = 0;
        memset(b.barriers, 0, sizeof b.barriers);
        for (unsigned w = 0; w * WARP < b.threads; ++w) {
            b.warps[w].alive = 0;
            for (Meeting& each : b.warps[w].meetings) each.mask = each.arrived = each.generation = each.leaving = 0;
        }
        memset(b.shared, 0xff, launch->shared_bytes);
        for (unsigned i = 0; i < b.threads; ++i) {
            Fiber& fiber = b.fibers[i];
            fiber.thread.x = i % launch->block.x;
            fiber.thread.y = i / launch->block.x % launch->block.y;
            fiber.thread.z = i / launch->block.x / launch->block.y;
            fiber.index = i;
            unsigned above = i + 1 < b.threads ? i + 1 : 0, below = i > 0 ? i - 1 : b.threads - 1;
            fiber.next = b.backwards ? below : above;
            fiber.previous = b.backwards ? above : below;
            fiber.ended = false;
            b.warps[i / WARP].alive |= 1u << i % WARP;
            make(b, i);
        }
        change(b.scheduler, b.fibers[b.backwards ? b.threads - 1 : 0].context);
        __asm__ volatile("" ::: "memory");
    }
}

// Calls a kernel with its arguments by address, as cuLaunchKernel takes them.
template <size_t... I>
struct Indices {};
template <size_t N, size_t... I>
struct Count : Count<N - 1, N - 1, I...> {};
template <size_t... I>
struct Count<0, I...> {
    using Type = Indices<I...>;
};
template <class... P, size_t... I>
inline void call(void (*kernel)(P...), void** arguments, Indices<I...>) {
    kernel(*static_cast<P*>(arguments[I])...);
}
template <class... P>
inline void call(void (*kernel)(P...), void** arguments) {
    call(kernel, arguments, typename Count<sizeof...(P)>::Type());
}

}  // namespace emu

// One for each kernel, put after the source.
#define SATA_EMU_ENTRY(kernel)                                                                        \
    extern "C" __attribute__((visibility("default"))) void sata_emu_##kernel(                         \
        void* memory, emu::Launch* launch, void** arguments) {                                        \
        emu::run(memory, launch, [](void* a) { emu::call(&kernel, static_cast<void**>(a)); }, arguments); \
    }

// The language.
#define __global__ __attribute__((visibility("hidden")))
#define __device__
#define __host__
#define __constant__ static
#define __shared__ static thread_local
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __restrict__ __restrict
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __cluster_dims__(...)

#define threadIdx (::emu::self().thread)
#define blockIdx (::emu::block().index)
#define blockDim (::emu::block().launch->block)
#define gridDim (::emu::block().launch->grid)
#define warpSize 32

#define SATA_VECTOR(name, T, align)                                                            \
    struct __attribute__((aligned(align * 1))) name##1 { T x; };                               \
    struct __attribute__((aligned(align * 2))) name##2 { T x, y; };                            \
    struct name##3 { T x, y, z; };                                                             \
    struct __attribute__((aligned(align * 4 > 16 ? 16 : align * 4))) name##4 { T x, y, z, w; }; \
    inline name##1 make_##name##1(T x) { return {x}; }                                         \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                 \
    inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                         \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
SATA_VECTOR(char, signed char, 1)
SATA_VECTOR(uchar, unsigned char, 1)
SATA_VECTOR(short, short, 2)
SATA_VECTOR(ushort, unsigned short, 2)
SATA_VECTOR(int, int, 4)
SATA_VECTOR(uint, unsigned, 4)
SATA_VECTOR(longlong, long long, 8)
SATA_VECTOR(ulonglong, unsigned long long, 8)
SATA_VECTOR(float, float, 4)
SATA_VECTOR(double, double, 8)
#undef SATA_VECTOR
using dim3 = ::emu::Dim3;

// Meeting.
inline void __syncthreads() { emu::barrier(0, 0, 0, false, true); }
inline int __syncthreads_or(int x) { return emu::barrier(0, 0, x != 0, false, true) != 0; }
inline int __syncthreads_and(int x) { return emu::barrier(0, 0, x != 0, true, true) == 0; }
inline int __syncthreads_count(int x) { return int(emu::barrier(0, 0, x != 0, false, true)); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emu::exchange(mask, 0); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __nanosleep(unsigned) { emu::nap(); }
[[noreturn]] inline void __trap() { emu::fail(emu::block(), "a thread trapped"); }

template <class T>
inline T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
    unsigned lane = emu::self().index % 32, base = lane & ~unsigned(width - 1);
    return emu::shuffle(mask, value, base + (unsigned(from) & unsigned(width - 1)), true);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int by, int width = 32) {
    unsigned lane = emu::self().index % 32, from = lane ^ unsigned(by);
    return emu::shuffle(mask, value, from, from < (lane & ~unsigned(width - 1)) + unsigned(width));
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
    unsigned lane = emu::self().index % 32, from = lane + by;
    return emu::shuffle(mask, value, from, from < (lane & ~unsigned(width - 1)) + unsigned(width));
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
    unsigned lane = emu::self().index % 32, base = lane & ~unsigned(width - 1);
    return emu::shuffle(mask, value, lane - by, lane >= base + by);
}
inline unsigned __activemask() { return emu::block().warps[emu::self().index / 32].alive; }
inline unsigned __ballot_sync(unsigned mask, int x) {
    unsigned alive = emu::block().warps[emu::self().index / 32].alive;
    const uint64_t* slots = emu::exchange(mask, x != 0);
    unsigned all = 0;
    for (unsigned lane = 0; lane < 32; ++lane) {
        if ((mask & alive) >> lane & 1) all |= unsigned(slots[lane]) << lane;
    }
    return all;
}
inline int __any_sync(unsigned mask, int x) { return __ballot_sync(mask, x) != 0; }
inline int __all_sync(unsigned mask, int x) { return __ballot_sync(mask, !x) == 0; }
#define SATA_REDUCE(name, T, by)                                                     \
    inline T __reduce_##name##_sync(unsigned mask, T value) {                        \
        const uint64_t* slots = emu::exchange(mask, emu::to_bits(value));            \
        bool first = true;                                                           \
        T all = value;                                                               \
        for (unsigned lane = 0; lane < 32; ++lane) {                                 \
            if (!(mask >> lane & 1)) continue;                                       \
            T x = emu::from_bits<T>(slots[lane]);                                    \
            all = first ? x : by;                                                    \
            first = false;                                                           \
        }                                                                            \
        return all;                                                                  \
    }
SATA_REDUCE(add, unsigned, all + x)
SATA_REDUCE(add, int, all + x)
SATA_REDUCE(max, unsigned, all > x ? all : x)
SATA_REDUCE(max, int, all > x ? all : x)
SATA_REDUCE(min, unsigned, all < x ? all : x)
SATA_REDUCE(min, int, all < x ? all : x)
SATA_REDUCE(or, unsigned, all | x)
SATA_REDUCE(and, unsigned, all & x)
#undef SATA_REDUCE

// Memory.
template <class T>
inline T __ldg(const T* p) { return *p; }
template <class T>
inline T __ldcg(const T* p) { return *p; }
template <class T>
inline T __ldcs(const T* p) { return *p; }
template <class T>
inline void __stcs(T* p, T x) { *p = x; }
template <class T>
inline void __stcg(T* p, T x) { *p = x; }
namespace emu {
template <class T, class F>
inline T atomic(T* p, F f) {
    T old;
    __atomic_load(p, &old, __ATOMIC_SEQ_CST);
    T now;
    do {
        now = f(old);
    } while (!__atomic_compare_exchange(p, &old, &now, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
    ++block().progress;
    return old;
}
}  // namespace emu
template <class T>
inline T atomicAdd(T* p, T x) { return emu::atomic(p, [=](T old) { return T(old + x); }); }
template <class T>
inline T atomicSub(T* p, T x) { return emu::atomic(p, [=](T old) { return T(old - x); }); }
template <class T>
inline T atomicMax(T* p, T x) { return emu::atomic(p, [=](T old) { return old > x ? old : x; }); }
template <class T>
inline T atomicMin(T* p, T x) { return emu::atomic(p, [=](T old) { return old < x ? old : x; }); }
template <class T>
inline T atomicOr(T* p, T x) { return emu::atomic(p, [=](T old) { return T(old | x); }); }
template <class T>
inline T atomicAnd(T* p, T x) { return emu::atomic(p, [=](T old) { return T(old & x); }); }
template <class T>
inline T atomicExch(T* p, T x) { return emu::atomic(p, [=](T) { return x; }); }
template <class T>
inline T atomicCAS(T* p, T compare, T x) {
    return emu::atomic(p, [=](T old) { return old == compare ? x : old; });
}

// Arithmetic.
#define SATA_LESSER(T)                                        \
    inline T min(T a, T b) { return b < a ? b : a; }          \
    inline T max(T a, T b) { return a < b ? b : a; }
SATA_LESSER(int)
SATA_LESSER(unsigned)
SATA_LESSER(long)
SATA_LESSER(unsigned long)
SATA_LESSER(long long)
SATA_LESSER(unsigned long long)
#undef SATA_LESSER
#if defined(_GLIBCXX_INCLUDE_NEXT_C_HEADERS)
#define SATA_OF_FLOAT(name) \
    inline float name(float x) { return name##f(x); }
SATA_OF_FLOAT(exp)
SATA_OF_FLOAT(exp2)
SATA_OF_FLOAT(log)
SATA_OF_FLOAT(log2)
SATA_OF_FLOAT(sqrt)
SATA_OF_FLOAT(fabs)
SATA_OF_FLOAT(floor)
SATA_OF_FLOAT(ceil)
#undef SATA_OF_FLOAT
inline float fmax(float a, float b) { return fmaxf(a, b); }
inline float fmin(float a, float b) { return fminf(a, b); }
inline float fma(float a, float b, float c) { return fmaf(a, b, c); }
inline float pow(float a, float b) { return powf(a, b); }
inline int abs(int x) { return x < 0 ? -x : x; }
inline float abs(float x) { return fabsf(x); }
inline double abs(double x) { return fabs(x); }
#endif
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { volatile float s = a + b; return s; }
inline float __fsub_rn(float a, float b) { volatile float s = a - b; return s; }
inline float __fmul_rn(float a, float b) { volatile float s = a * b; return s; }
inline double __dadd_rn(double a, double b) { volatile double s = a + b; return s; }
inline double __dmul_rn(double a, double b) { volatile double s = a * b; return s; }
inline int __float_as_int(float x) { return emu::from_bits<int>(emu::to_bits(x)); }
inline unsigned __float_as_uint(float x) { return emu::from_bits<unsigned>(emu::to_bits(x)); }
inline float __int_as_float(int x) { return emu::from_bits<float>(emu::to_bits(x)); }
inline float __uint_as_float(unsigned x) { return emu::from_bits<float>(emu::to_bits(x)); }
inline long long __double_as_longlong(double x) { return emu::from_bits<long long>(emu::to_bits(x)); }
inline double __longlong_as_double(long long x) { return emu::from_bits<double>(emu::to_bits(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __brev(unsigned x) {
    unsigned r = 0;
    for (int i = 0; i < 32; ++i) r |= (x >> i & 1) << (31 - i);
    return r;
}
inline int __mul24(int a, int b) { return a * b; }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
#define __builtin_assume(x) ((void)0)
