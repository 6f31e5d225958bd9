// What a CUDA C source expects of its compiler and its machine, for a CPU: see cuda_on_host.py.
//
// The blocks of a grid run one after the other. Each thread of a block has a stack of its own and runs until it has to wait
// for others, at a barrier or in a warp; then the next one runs. A thread that never waits runs to its end at once, and its
// stack goes to the next thread.
#pragma once

#define ON_HOST 1

#define _GLIBCXX_INCLUDE_NEXT_C_HEADERS  // C's own headers: <cmath> takes longer to read than a kernel
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#undef _GLIBCXX_INCLUDE_NEXT_C_HEADERS

// ------------------------------------------------------------------------------------------------- keywords
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static __attribute__((section("cuda_shared")))

// ------------------------------------------------------------------------------------------------- types
#define CUDA_VECTOR2(T, name, n) \
    struct __align__(n) name { T x, y; }; \
    static inline name make_##name(T x, T y) { return {x, y}; }
#define CUDA_VECTOR4(T, name, n) \
    struct __align__(n) name { T x, y, z, w; }; \
    static inline name make_##name(T x, T y, T z, T w) { return {x, y, z, w}; }
CUDA_VECTOR2(float, float2, 8)
CUDA_VECTOR4(float, float4, 16)
CUDA_VECTOR2(double, double2, 16)
CUDA_VECTOR2(int, int2, 8)
CUDA_VECTOR4(int, int4, 16)
CUDA_VECTOR2(unsigned int, uint2, 8)
CUDA_VECTOR4(unsigned int, uint4, 16)
CUDA_VECTOR2(long long, longlong2, 16)
CUDA_VECTOR2(unsigned long long, ulonglong2, 16)
CUDA_VECTOR2(short, short2, 4)
CUDA_VECTOR4(short, short4, 8)
CUDA_VECTOR2(unsigned short, ushort2, 4)
CUDA_VECTOR4(unsigned short, ushort4, 8)
CUDA_VECTOR2(signed char, char2, 2)
CUDA_VECTOR4(signed char, char4, 4)
CUDA_VECTOR2(unsigned char, uchar2, 2)
CUDA_VECTOR4(unsigned char, uchar4, 4)

struct uint3 { unsigned int x, y, z; };
static uint3 threadIdx, blockIdx, blockDim, gridDim;
static const int warpSize = 32;

// ------------------------------------------------------------------------------------------------- fibers
namespace on_host {

const size_t STACK = 128 << 10, GUARD = 4 << 10;
const unsigned MOST_THREADS = 1024, MOST_SHARED = 227 << 10;

void begin();  // where a fiber starts; it does not return

#if defined(__x86_64__) && !defined(ON_HOST_UCONTEXT)
typedef void *Context;  // the stack pointer; everything else that must survive lies on the stack
extern "C" __attribute__((visibility("hidden"))) void on_host_swap(void **from, void *to);
asm(R"(
    .text
    .globl on_host_swap
    .hidden on_host_swap
    .type on_host_swap, @function
on_host_swap:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size on_host_swap, .-on_host_swap
)");
static inline void swap(Context *from, Context *to) { on_host_swap(from, *to); }
static inline void prepare(Context *context, char *stack) {
    void **top = (void **)(stack + STACK);  // as if begin had been called: the stack pointer is 8 short of a multiple of 16
    top[-2] = (void *)begin;
    *context = top - 8;
}
#else
}
#include <ucontext.h>
namespace on_host {
typedef ucontext_t Context;
static inline void swap(Context *from, Context *to) { swapcontext(from, to); }
static inline void prepare(Context *context, char *stack) {
    getcontext(context);
    context->uc_stack.ss_sp = stack;
    context->uc_stack.ss_size = STACK;
    context->uc_link = nullptr;
    makecontext(context, begin, 0);
}
#endif

// ------------------------------------------------------------------------------------------------- threads
enum State { NEW, READY, AT_BARRIER, IN_WARP, EXITED };
enum Kind { SYNC, BALLOT, ANY, ALL, SHFL, SHFL_UP, SHFL_DOWN, SHFL_XOR };
static const char *const NAMES[] = {"__syncwarp",  "__ballot_sync",  "__any_sync",       "__all_sync",
                                    "__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync"};

struct Thread {
    State state;
    Kind kind;        // what it waits in with its warp, and what it brought there
    unsigned mask;
    int source;       // a shuffle: the lane it reads
    uint64_t value, result;
    char *stack;
    Context context;
};

static Thread threads[MOST_THREADS];
static Thread *current;
static Context scheduler;
static unsigned block_size;
static void (*kernel)(void **);
static void **arguments;
static char *stacks[MOST_THREADS];  // those that no thread is using
static unsigned stacks_free;
alignas(16) static unsigned char dynamic_shared[MOST_SHARED];
static bool failed;
static char *message;
static int message_length;

static void report(const char *format, ...) {
    if (failed) return;
    failed = true;
    va_list values;
    va_start(values, format);
    vsnprintf(message, message_length, format, values);
    va_end(values);
}

static unsigned number(const Thread &t) { return &t - threads; }

__attribute__((noinline)) static void leave() {
    swap(&current->context, &scheduler);
    asm volatile("" ::: "memory");
}

void begin() {
    kernel(arguments);
    current->state = EXITED;
    leave();
    abort();
}

static const char *whereabouts(unsigned index, char *text, size_t size) {
    if (index >= block_size) return "is not in the block";
    const Thread &t = threads[index];
    if (t.state == EXITED) return "has exited";
    if (t.state == AT_BARRIER) return "waits in __syncthreads";
    if (t.state != IN_WARP) return "has not arrived";
    snprintf(text, size, "waits in %s with mask 0x%08x", NAMES[t.kind], t.mask);
    return text;
}

static void report_missing(const Thread &t, unsigned lane, bool stuck) {
    char text[80];
    report("%sthread %u of block %u waits in %s with mask 0x%08x, which names lane %u, and that lane %s",
           stuck ? "no thread can go on: " : "", number(t), blockIdx.x, NAMES[t.kind], t.mask, lane,
           whereabouts((number(t) & ~31u) + lane, text, sizeof text));
}

// If every lane that t's mask names is there, each gets its result and may go on. A lane that has exited counts as there,
// as CUDA has it; only a shuffle refuses it, since what it would read is undefined.
static bool settle(Thread &t) {
    const unsigned base = number(t) & ~31u, mask = t.mask;
    unsigned there = 0, votes = 0;
    for (int lane = 31; lane >= 0; lane--) {
        if (!(mask >> lane & 1)) continue;
        if (base + lane >= block_size || threads[base + lane].state == EXITED) {
            if (t.kind >= SHFL) return report_missing(t, lane, false), false;
            continue;
        }
        const Thread &other = threads[base + lane];
        if (other.state != IN_WARP || other.kind != t.kind || other.mask != mask) return false;
        there |= 1u << lane;
        votes |= (unsigned)(other.value != 0) << lane;
    }
    const Kind kind = t.kind;
    for (unsigned lane = 0; lane < 32; lane++) {
        if (!(there >> lane & 1)) continue;
        Thread &other = threads[base + lane];
        if (kind == BALLOT) other.result = votes;
        if (kind == ANY) other.result = votes != 0;
        if (kind == ALL) other.result = votes == there;
        if (kind >= SHFL) {
            if (!(there >> other.source & 1))
                return report("thread %u of block %u reads lane %d in %s, and its mask 0x%08x does not name that lane",
                              base + lane, blockIdx.x, other.source, NAMES[kind], mask), false;
            other.result = threads[base + other.source].value;
        }
        other.state = READY;
    }
    return true;
}

static uint64_t meet(Kind kind, unsigned mask, uint64_t value, int source) {
    Thread &me = *current;
    me.kind = kind, me.mask = mask, me.value = value, me.source = source;
    if (!(mask >> (number(me) & 31) & 1)) {
        report("thread %u of block %u calls %s with mask 0x%08x, which does not name its own lane %u", number(me), blockIdx.x,
               NAMES[kind], mask, number(me) & 31);
        leave();
    }
    me.state = IN_WARP;
    settle(me);
    if (failed || me.state == IN_WARP) leave();
    asm volatile("" ::: "memory");
    return me.result;
}

static char *new_stack() {
    if (stacks_free) return stacks[--stacks_free];
    char *low = (char *)mmap(nullptr, GUARD + STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (low == MAP_FAILED) return nullptr;
    mprotect(low, GUARD, PROT_NONE);
    return low + GUARD;
}

static void run(Thread &t) {
    if (t.state == NEW) {
        t.stack = new_stack();
        if (!t.stack) return report("there is no memory for the stack of thread %u", number(t));
        prepare(&t.context, t.stack);
    }
    t.state = READY;
    current = &t;
    threadIdx = {number(t), 0, 0};
    swap(&scheduler, &t.context);
    asm volatile("" ::: "memory");
}

// Nobody runs: those who wait for threads that have exited go on, and so does a block that has all come to its barrier.
static void unblock() {
    unsigned at_barrier = 0, in_warp = 0;
    for (unsigned i = 0; i < block_size; i++) {
        Thread &t = threads[i];
        at_barrier += t.state == AT_BARRIER;
        if (t.state != IN_WARP) continue;
        if (settle(t) || failed) return;
        in_warp++;
    }
    if (!in_warp) {
        for (unsigned i = 0; i < block_size; i++)
            if (threads[i].state == AT_BARRIER) threads[i].state = READY;
        return;
    }
    for (unsigned i = 0; i < block_size; i++) {
        const Thread &t = threads[i];
        if (t.state != IN_WARP) continue;
        for (unsigned lane = 0; lane < 32; lane++) {
            const unsigned index = (i & ~31u) + lane;
            if (!(t.mask >> lane & 1) || index >= block_size || threads[index].state == EXITED) continue;
            const Thread &other = threads[index];
            if (other.state != IN_WARP || other.kind != t.kind || other.mask != t.mask) return report_missing(t, lane, true);
        }
    }
}

extern "C" __attribute__((weak, visibility("hidden"))) char __start_cuda_shared[], __stop_cuda_shared[];

static void run_block(unsigned shared, bool backwards) {
    if (__start_cuda_shared) memset(__start_cuda_shared, 255, __stop_cuda_shared - __start_cuda_shared);
    memset(dynamic_shared, 255, shared);
    for (unsigned i = 0; i < block_size; i++) threads[i].state = NEW, threads[i].stack = nullptr;
    for (unsigned alive = block_size; alive;) {
        bool moved = false;
        for (unsigned i = 0; i < block_size; i++) {
            Thread &t = threads[backwards ? block_size - 1 - i : i];
            if (t.state > READY) continue;
            moved = true;
            run(t);
            if (failed) return;
            if (t.state == EXITED) {
                alive--;
                stacks[stacks_free++] = t.stack;
                t.stack = nullptr;
            }
        }
        if (!moved) unblock();
        if (failed) return;
    }
}

static int launch(void (*function)(void **), unsigned grid, unsigned block, unsigned shared, int backwards, void **args,
                  char *text, int length) {
    kernel = function, arguments = args, message = text, message_length = length, failed = false;
    block_size = block;
    gridDim = {grid, 1, 1};
    blockDim = {block, 1, 1};
    for (unsigned b = 0; b < grid && !failed; b++) {
        blockIdx = {backwards ? grid - 1 - b : b, 0, 0};
        run_block(shared, backwards);
    }
    if (failed)
        for (unsigned i = 0; i < block_size; i++)  // what was still under way is dropped where it stood
            if (threads[i].stack) stacks[stacks_free++] = threads[i].stack;
    return failed;
}

static inline int segment(int lane, int width) { return lane & ~(width - 1); }

template <class T>
static inline T shuffle(Kind kind, unsigned mask, T value, int by, int width) {
    const int lane = threadIdx.x & 31, low = segment(lane, width);
    int source = lane;
    if (kind == SHFL) source = low + (by & (width - 1));
    if (kind == SHFL_UP && (unsigned)by <= (unsigned)(lane - low)) source = lane - by;
    if (kind == SHFL_DOWN && (unsigned)by < (unsigned)(low + width - lane)) source = lane + by;
    if (kind == SHFL_XOR && (lane ^ by) < low + width && (unsigned)by < 32) source = lane ^ by;
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    bits = meet(kind, mask, bits, source);
    memcpy(&value, &bits, sizeof(T));
    return value;
}

template <class To, class From>
static inline To as(From x) {
    static_assert(sizeof(To) == sizeof(From), "a change of type only");
    To y;
    memcpy(&y, &x, sizeof y);
    return y;
}

}  // namespace on_host

// A load or a store whose address is no multiple of its size stops a GPU, and here too: -fsanitize=alignment calls this.
struct on_host_place {
    const char *file;
    unsigned line, column;
    void *type;
    unsigned char log_alignment;
};
extern "C" __attribute__((visibility("hidden"), used)) void __ubsan_handle_type_mismatch_v1(on_host_place *place, void *address) {
    on_host::report("thread %u of block %u uses an address in line %u of the source that is not a multiple of %d",
                    threadIdx.x, blockIdx.x, place->line, 1 << place->log_alignment);
    (void)address;
    on_host::leave();
}

// ------------------------------------------------------------------------------------------------- a parameter's type
namespace on_host {

template <class T> struct dtype { static constexpr const char *value = "", *pointer = "*"; };  // neither a number nor numbers
#define CUDA_DTYPE(T, name) \
    template <> struct dtype<T> { static constexpr const char *value = name, *pointer = "*" name; };
#define CUDA_DTYPE_OF_VECTOR(T, name) \
    template <> struct dtype<T> { static constexpr const char *value = "", *pointer = "*" name; };
CUDA_DTYPE(bool, "bool")
CUDA_DTYPE(char, "int8")
CUDA_DTYPE(signed char, "int8")
CUDA_DTYPE(unsigned char, "uint8")
CUDA_DTYPE(short, "int16")
CUDA_DTYPE(unsigned short, "uint16")
CUDA_DTYPE(int, "int32")
CUDA_DTYPE(unsigned int, "uint32")
CUDA_DTYPE(long, "int64")
CUDA_DTYPE(unsigned long, "uint64")
CUDA_DTYPE(long long, "int64")
CUDA_DTYPE(unsigned long long, "uint64")
CUDA_DTYPE(float, "float32")
CUDA_DTYPE(double, "float64")
CUDA_DTYPE_OF_VECTOR(float2, "float32")
CUDA_DTYPE_OF_VECTOR(float4, "float32")
CUDA_DTYPE_OF_VECTOR(double2, "float64")
CUDA_DTYPE_OF_VECTOR(int2, "int32")
CUDA_DTYPE_OF_VECTOR(int4, "int32")
CUDA_DTYPE_OF_VECTOR(uint2, "uint32")
CUDA_DTYPE_OF_VECTOR(uint4, "uint32")
CUDA_DTYPE_OF_VECTOR(longlong2, "int64")
CUDA_DTYPE_OF_VECTOR(ulonglong2, "uint64")
CUDA_DTYPE_OF_VECTOR(short2, "int16")
CUDA_DTYPE_OF_VECTOR(short4, "int16")
CUDA_DTYPE_OF_VECTOR(ushort2, "uint16")
CUDA_DTYPE_OF_VECTOR(ushort4, "uint16")
CUDA_DTYPE_OF_VECTOR(char2, "int8")
CUDA_DTYPE_OF_VECTOR(char4, "int8")
CUDA_DTYPE_OF_VECTOR(uchar2, "uint8")
CUDA_DTYPE_OF_VECTOR(uchar4, "uint8")

template <class T> struct plain { typedef T type; };
template <class T> struct plain<const T> : plain<T> {};
template <class T> struct plain<volatile T> : plain<T> {};
template <class T> struct plain<const volatile T> : plain<T> {};
template <class T> struct parameter { static constexpr const char *value = dtype<typename plain<T>::type>::value; };
template <class T> struct parameter<const T> : parameter<T> {};
template <class T> struct parameter<T *> { static constexpr const char *value = dtype<typename plain<T>::type>::pointer; };

}  // namespace on_host

// ------------------------------------------------------------------------------------------------- barriers, votes, shuffles
static inline void __syncthreads() {
    on_host::current->state = on_host::AT_BARRIER;
    on_host::leave();
}
static inline void __threadfence() {}
static inline void __threadfence_block() {}
static inline void __syncwarp(unsigned mask = 0xffffffff) { on_host::meet(on_host::SYNC, mask, 0, 0); }
static inline unsigned __ballot_sync(unsigned mask, int p) { return (unsigned)on_host::meet(on_host::BALLOT, mask, p != 0, 0); }
static inline int __any_sync(unsigned mask, int p) { return (int)on_host::meet(on_host::ANY, mask, p != 0, 0); }
static inline int __all_sync(unsigned mask, int p) { return (int)on_host::meet(on_host::ALL, mask, p != 0, 0); }

#define CUDA_SHUFFLES(T) \
    static inline T __shfl_sync(unsigned mask, T x, int lane, int width = 32) { \
        return on_host::shuffle(on_host::SHFL, mask, x, lane, width); \
    } \
    static inline T __shfl_up_sync(unsigned mask, T x, unsigned by, int width = 32) { \
        return on_host::shuffle(on_host::SHFL_UP, mask, x, (int)by, width); \
    } \
    static inline T __shfl_down_sync(unsigned mask, T x, unsigned by, int width = 32) { \
        return on_host::shuffle(on_host::SHFL_DOWN, mask, x, (int)by, width); \
    } \
    static inline T __shfl_xor_sync(unsigned mask, T x, int by, int width = 32) { \
        return on_host::shuffle(on_host::SHFL_XOR, mask, x, by, width); \
    }
CUDA_SHUFFLES(int)
CUDA_SHUFFLES(unsigned int)
CUDA_SHUFFLES(long)
CUDA_SHUFFLES(unsigned long)
CUDA_SHUFFLES(long long)
CUDA_SHUFFLES(unsigned long long)
CUDA_SHUFFLES(float)
CUDA_SHUFFLES(double)

// ------------------------------------------------------------------------------------------------- arithmetic
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __frcp_rn(float a) { return 1.0f / a; }
static inline float __fsqrt_rn(float a) { return __builtin_sqrtf(a); }
static inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
static inline double __dmul_rn(double a, double b) { return a * b; }
static inline double __dadd_rn(double a, double b) { return a + b; }
static inline double __dsub_rn(double a, double b) { return a - b; }
static inline double __ddiv_rn(double a, double b) { return a / b; }
static inline double __dsqrt_rn(double a) { return __builtin_sqrt(a); }
static inline double __fma_rn(double a, double b, double c) { return __builtin_fma(a, b, c); }

static inline unsigned __float_as_uint(float x) { return on_host::as<unsigned>(x); }
static inline float __uint_as_float(unsigned x) { return on_host::as<float>(x); }
static inline int __float_as_int(float x) { return on_host::as<int>(x); }
static inline float __int_as_float(int x) { return on_host::as<float>(x); }
static inline long long __double_as_longlong(double x) { return on_host::as<long long>(x); }
static inline double __longlong_as_double(long long x) { return on_host::as<double>(x); }

static inline int __float2int_rz(float x) {  // a GPU's conversions stop at the ends of the range, and NaN becomes 0
    return x != x ? 0 : x >= 2147483648.0f ? 2147483647 : x < -2147483648.0f ? (-2147483647 - 1) : (int)x;
}
static inline int __float2int_rn(float x) { return __float2int_rz(__builtin_rintf(x)); }
static inline unsigned __float2uint_rz(float x) { return !(x > 0.0f) ? 0 : x >= 4294967296.0f ? 0xffffffff : (unsigned)x; }
static inline unsigned __float2uint_rn(float x) { return __float2uint_rz(__builtin_rintf(x)); }
static inline float __int2float_rn(int x) { return (float)x; }
static inline float __uint2float_rn(unsigned x) { return (float)x; }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
static inline int __ffs(int x) { return __builtin_ffs(x); }

#undef isnan
#undef isinf
#undef isfinite
#undef signbit
static inline bool isnan(float x) { return __builtin_isnan(x); }
static inline bool isnan(double x) { return __builtin_isnan(x); }
static inline bool isinf(float x) { return __builtin_isinf(x); }
static inline bool isinf(double x) { return __builtin_isinf(x); }
static inline bool isfinite(float x) { return __builtin_isfinite(x); }
static inline bool isfinite(double x) { return __builtin_isfinite(x); }
static inline bool signbit(float x) { return __builtin_signbit(x); }
static inline bool signbit(double x) { return __builtin_signbit(x); }

// A GPU's own: of a number and NaN the number, of two zeros +0 for the larger and −0 for the smaller. A C library may differ.
static inline float cuda_fmaxf(float a, float b) {
    if (a != a || b != b) return a == a ? a : b == b ? b : __uint_as_float(0x7fffffff);
    return a == b ? __uint_as_float(__float_as_uint(a) & __float_as_uint(b)) : a > b ? a : b;
}
static inline float cuda_fminf(float a, float b) {
    if (a != a || b != b) return a == a ? a : b == b ? b : __uint_as_float(0x7fffffff);
    return a == b ? __uint_as_float(__float_as_uint(a) | __float_as_uint(b)) : a < b ? a : b;
}
#define fmaxf cuda_fmaxf
#define fminf cuda_fminf

#define CUDA_MIN_MAX(T) \
    static inline T min(T a, T b) { return b < a ? b : a; } \
    static inline T max(T a, T b) { return a < b ? b : a; }
CUDA_MIN_MAX(int)
CUDA_MIN_MAX(unsigned int)
CUDA_MIN_MAX(long)
CUDA_MIN_MAX(unsigned long)
CUDA_MIN_MAX(long long)
CUDA_MIN_MAX(unsigned long long)
static inline float min(float a, float b) { return cuda_fminf(a, b); }
static inline float max(float a, float b) { return cuda_fmaxf(a, b); }

// In C++ these take a float without a detour by way of double.
#define CUDA_FLOAT(name) \
    static inline float name(float x) { return __builtin_##name##f(x); }
CUDA_FLOAT(exp)
CUDA_FLOAT(exp2)
CUDA_FLOAT(expm1)
CUDA_FLOAT(log)
CUDA_FLOAT(log2)
CUDA_FLOAT(log1p)
CUDA_FLOAT(tanh)
CUDA_FLOAT(erf)
CUDA_FLOAT(sin)
CUDA_FLOAT(cos)
CUDA_FLOAT(sqrt)
CUDA_FLOAT(fabs)
CUDA_FLOAT(floor)
CUDA_FLOAT(ceil)
CUDA_FLOAT(trunc)
CUDA_FLOAT(round)
CUDA_FLOAT(rint)
static inline float abs(float x) { return __builtin_fabsf(x); }
static inline double abs(double x) { return __builtin_fabs(x); }
static inline long long abs(long long x) { return x < 0 ? -x : x; }
static inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
static inline float pow(float a, float b) { return __builtin_powf(a, b); }
static inline float copysign(float a, float b) { return __builtin_copysignf(a, b); }

// ------------------------------------------------------------------------------------------------- memory
template <class T>
static inline T __ldg(const T *p) { return *p; }

#define CUDA_ATOMICS(T) \
    static inline T atomicAdd(T *p, T x) { T old = *p; *p = old + x; return old; } \
    static inline T atomicExch(T *p, T x) { T old = *p; *p = x; return old; }
#define CUDA_INT_ATOMICS(T) \
    CUDA_ATOMICS(T) \
    static inline T atomicMin(T *p, T x) { T old = *p; *p = x < old ? x : old; return old; } \
    static inline T atomicMax(T *p, T x) { T old = *p; *p = old < x ? x : old; return old; } \
    static inline T atomicCAS(T *p, T is, T x) { T old = *p; *p = old == is ? x : old; return old; }
CUDA_ATOMICS(float)
CUDA_ATOMICS(double)
CUDA_INT_ATOMICS(int)
CUDA_INT_ATOMICS(unsigned int)
CUDA_INT_ATOMICS(unsigned long long)

// ------------------------------------------------------------------------------------------------- what stands in for PTX
static inline unsigned short to_bf16(float x) {
    const unsigned u = __float_as_uint(x);
    if ((u & 0x7fffffff) > 0x7f800000) return (unsigned short)(u >> 16 | 0x40);
    return (unsigned short)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
static inline float from_bf16(unsigned short h) { return __uint_as_float((unsigned)h << 16); }

static inline unsigned short to_f16(float x) {
    const unsigned u = __float_as_uint(x), sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
    if (a > 0x7f800000) return (unsigned short)(sign | 0x7e00 | (a >> 13 & 0x3ff));
    if (a >= 0x477ff000) return (unsigned short)(sign | 0x7c00);  // 65520, half way to 65536, and above
    if (a < 0x38800000) return (unsigned short)(sign | (unsigned)__builtin_rintf(__uint_as_float(a) * 16777216.0f));  // below 2⁻¹⁴
    return (unsigned short)(sign | (a - 0x38000000 + 0xfff + (a >> 13 & 1)) >> 13);
}
static inline float from_f16(unsigned short h) {
    const unsigned sign = (unsigned)(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 0x3ff;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000 | (mantissa ? 0x400000 : 0) | mantissa << 13);
    if (exponent == 0) return __uint_as_float(sign | __float_as_uint((float)mantissa * 0x1p-24f));
    return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

extern "C" __attribute__((visibility("default"))) const unsigned char *on_host_rcp_table;
const unsigned char *on_host_rcp_table = nullptr;  // delta of rcp_approx.npz: 2²³ bits for one above, then 2²³ for one below

static inline float rcp_approx(float x) {
    const auto flush = [](float v) { return __builtin_fabsf(v) < 0x1p-126f ? __builtin_copysignf(0.0f, v) : v; };
    x = flush(x);
    const float y = flush(1.0f / x);
    if (y == 0.0f || !isfinite(y)) return y;
    const unsigned m = __float_as_uint(x) & 0x7fffff, byte = m >> 3, bit = 7 - (m & 7);
    const int above = on_host_rcp_table[byte] >> bit & 1, below = on_host_rcp_table[byte + (1 << 20)] >> bit & 1;
    return __int_as_float(__float_as_int(y) + above - below);
}

#define alignas(n) __attribute__((aligned(n)))  // CUDA lets it stand after __shared__, g++ does not
