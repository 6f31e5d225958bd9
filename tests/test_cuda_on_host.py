"""The machine in cuda_on_host.py does what CUDA says: threads, shared memory, barriers, warps, roundings, and its own refusals."""

import cuda_on_host
import fake_cupy
import numpy as np
import pytest
from cuda_on_host import RawModule

from tinylora.dtypes import bfloat16_bits, from_bfloat16_bits
from tinylora.kernels.reciprocal import rcp

pytestmark = pytest.mark.skipif(not cuda_on_host.available(), reason="needs Linux and g++")

f32, i32, u32 = np.float32, np.int32, np.uint32

SOURCE = r"""
#ifndef ON_HOST
static __device__ __forceinline__ float rcp_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#endif
typedef unsigned short u16;
struct Wide { typedef const float* pointer; };
#define WARPS 4
#define FULL 0xffffffffu

extern "C" __global__ void __launch_bounds__(128) where(int* __restrict__ thread, int* __restrict__ block, const int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;  // a comment with __global__ void decoy(int n) in it
    if (i >= n) return;
    thread[i] = threadIdx.x + 1000 * threadIdx.y + 1000 * (blockDim.z - 1);
    block[i] = blockIdx.x + 100 * gridDim.x;
}

// Each block's sum, in a fixed tree.
extern "C" __global__ void block_sum(const float* __restrict__ x, float* __restrict__ out, long long n) {
    __shared__ float part[128];
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    part[threadIdx.x] = i < n ? x[i] : 0.0f;
    __syncthreads();
#pragma unroll
    for (int half = 64; half > 0; half >>= 1) {
        if (threadIdx.x < half) part[threadIdx.x] = __fadd_rn(part[threadIdx.x], part[threadIdx.x + half]);
        __syncthreads();
    }
    if (threadIdx.x == 0) out[blockIdx.x] = part[0];
}

extern __shared__ __align__(16) unsigned char dynamic[];
extern "C" __global__ void turn_around(unsigned int* x, int barrier) {
    unsigned int* held = reinterpret_cast<unsigned int*>(dynamic);
    held[threadIdx.x] = x[threadIdx.x];
    if (barrier) __syncthreads();
    x[threadIdx.x] = held[blockDim.x - 1 - threadIdx.x];
}

extern "C" __global__ void untouched(float* out) {
    __shared__ float part[4];
    if (threadIdx.x > 8) part[threadIdx.x & 3] = 0.0f;
    out[threadIdx.x] = part[threadIdx.x];
}

template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
    for (int m = 16; m; m >>= 1) x += __shfl_xor_sync(FULL, x, m);
    return x;
}

extern "C" __global__ void warps(const float* x, float* sum, int* counted, float* first, unsigned* down, int* up, int* votes) {
    const int i = threadIdx.x, lane = i & (warpSize - 1);
    __shared__ float sums[WARPS];
    const float s = warp_sum(x[i]);
    if (lane == 0) sums[i / 32] = s;
    __syncthreads();
    sum[i] = sums[i / 32];
    counted[i] = warp_sum(1);
    first[i] = __shfl_sync(FULL, x[i], 5);
    down[i] = __shfl_down_sync(FULL, (unsigned)i, 3);
    up[i] = __shfl_up_sync(FULL, i, 3);
    if (lane < 16) votes[i] = __ballot_sync(0xffffu, lane % 3 == 0);  // half a warp by itself
    else votes[i] = __any_sync(0xffff0000u, lane == 20) + 2 * __all_sync(0xffff0000u, lane == 20);
    __syncwarp();
}

extern "C" __global__ void some_return(int* out, int n) {
    __shared__ int value;
    if (threadIdx.x >= n) return;
    if (threadIdx.x == 0) value = 7;
    __syncthreads();
    out[threadIdx.x] = value;
    __syncwarp();
    if (threadIdx.x == 0) out[n] = __popc(__ballot_sync(1u, 1));
}

extern "C" __global__ void bad(int how, float* out) {
    const int i = threadIdx.x;
    float x = i;
    if (how == 0 && i != 3) x = __shfl_xor_sync(FULL, x, 1);  // lane 3 exits
    if (how == 1) {  // lane 3 stands at a barrier that nobody else reaches
        if (i == 3) __syncthreads();
        else x = __shfl_xor_sync(FULL, x, 1);
    }
    if (how == 2) {  // two masks that do not agree
        if (i == 0) x = __shfl_sync(FULL, x, 1);
        else x = __shfl_sync(0xfffffffeu, x, 1);
        __syncthreads();
    }
    if (how == 3 && i < 16) x = __shfl_xor_sync(0xffffu, x, 16);
    if (how == 4) x = __shfl_sync(0xffffu, x, 0);
    if (how == 5) {
        if (i == 3) __syncwarp(FULL);
        else __syncwarp(0xfffffff0u | 7u);
        if (i != 3) __syncthreads();
    }
    if (how == 6) {
        const float4 v = *reinterpret_cast<const float4*>(out + i);
        x = v.x;
    }
    if (how == 7) x = __shfl_xor_sync(FULL, x, 1);  // right, for a block of whole warps
    out[i] = x;
}

extern "C" __global__ void types(Wide::pointer a, unsigned char* b, u16* c, unsigned int* d, int* e, long long* f, void* g, const float4* h,
                                 int i, long long j, unsigned k, float l, double m, bool n) {
    if (threadIdx.x == 0) b[0] = i + j + k + l + m + n;
}

extern "C" __global__ void halves(const unsigned* bits, u16* b, u16* h, unsigned* r, unsigned* from_b, unsigned* from_h, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const float x = __uint_as_float(bits[i]);
    b[i] = to_bf16(x);
    h[i] = to_f16(x);
    r[i] = __float_as_uint(rcp_approx(x));
    from_b[i] = __float_as_uint(from_bf16((u16)bits[i]));
    from_h[i] = __float_as_uint(from_f16((u16)bits[i]));
}

extern "C" __global__ void rounded(const float* a, const float* b, const float* c, float* apart, float* plain, float* fused, float* root) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    apart[i] = __fadd_rn(__fmul_rn(a[i], b[i]), c[i]);
    plain[i] = a[i] * b[i] + c[i];
    fused[i] = __fmaf_rn(a[i], b[i], c[i]);
    root[i] = __fdiv_rn(__fsqrt_rn(fabsf(a[i])), fmaxf(b[i], fminf(c[i], NAN)));
}

#define COPY(name, T) extern "C" __global__ void name(const T* x, T* y) { y[threadIdx.x] = x[threadIdx.x]; }
COPY(copy4, uchar4)
COPY(copy2, float2)

extern "C" __global__ void count(float* total, int* largest) {
    atomicAdd(total, 1.0f);
    atomicMax(largest, (int)threadIdx.x);
}
"""


@pytest.fixture(scope="module")
def run():
    """run(name, grid, block, *arguments)"""
    module = RawModule(code=SOURCE, options=("-std=c++17", "--fmad=false"), backend="nvrtc")
    return lambda name, grid, block, *args, **kw: module.get_function(name)((grid,), (block,), args, **kw)


def test_each_thread_knows_its_place(run):
    n = 300
    thread, block = np.full(384, -1, i32), np.full(384, -1, i32)
    before = cuda_on_host.launches
    run("where", 3, 128, thread, block, i32(n))
    assert cuda_on_host.launches == before + 1
    i = np.arange(384)
    np.testing.assert_array_equal(thread, np.where(i < n, i % 128, -1))
    np.testing.assert_array_equal(block, np.where(i < n, i // 128 + 300, -1))


def test_the_stand_ins_arrays_are_written_in_place(run):
    thread, block = fake_cupy.zeros(4, np.int32), fake_cupy.zeros(8, np.int32)[::2][2:]
    run("where", 1, 4, thread, block, i32(2))
    np.testing.assert_array_equal(thread.get(), [0, 1, 0, 0])


@pytest.mark.parametrize("backwards", [False, True])
def test_shared_memory_and_barriers(run, backwards, monkeypatch):
    monkeypatch.setattr(cuda_on_host, "backwards", backwards)
    n = 128 * 5 + 17
    x, out = np.random.default_rng(0).standard_normal(n).astype(f32), np.zeros(6, f32)
    run("block_sum", 6, 128, x, out, np.int64(n))
    tree = np.zeros((6, 128), f32)
    tree.reshape(-1)[:n] = x
    while tree.shape[1] > 1:
        tree = tree[:, : tree.shape[1] // 2] + tree[:, tree.shape[1] // 2 :]
    np.testing.assert_array_equal(out, tree[:, 0])
    x = np.arange(1024, dtype=u32)
    run("turn_around", 1, 1024, x, i32(1), shared_mem=4096)
    np.testing.assert_array_equal(x, np.arange(1024)[::-1])


def test_a_missing_barrier_shows(run, monkeypatch):
    results = []
    for backwards in (False, True):
        monkeypatch.setattr(cuda_on_host, "backwards", backwards)
        x = np.arange(64, dtype=u32)
        run("turn_around", 1, 64, x, i32(0), shared_mem=256)
        results.append(x)
    assert (results[0] != results[1]).any() and (results[0] == 0xFFFFFFFF).any()


def test_shared_memory_starts_as_nan(run):
    out = np.zeros(4, f32)
    run("untouched", 1, 4, out)
    assert np.isnan(out).all()


@pytest.mark.parametrize("backwards", [False, True])
def test_warps(run, backwards, monkeypatch):
    monkeypatch.setattr(cuda_on_host, "backwards", backwards)
    x = np.random.default_rng(1).standard_normal(128).astype(f32)
    total, first, counted, up, votes = (np.zeros(128, t) for t in (f32, f32, i32, i32, i32))
    down = np.zeros(128, u32)
    run("warps", 1, 128, x, total, counted, first, down, up, votes)
    i, lanes = np.arange(128), x.reshape(4, 32)
    for m in (16, 8, 4, 2, 1):
        lanes = lanes + lanes[:, np.arange(32) ^ m]
    np.testing.assert_array_equal(total, lanes[:, :1].repeat(32, 1).reshape(-1))
    np.testing.assert_array_equal(counted, 32)
    np.testing.assert_array_equal(first, x.reshape(4, 32)[:, 5].repeat(32))
    np.testing.assert_array_equal(down, np.where(i % 32 < 29, i + 3, i))
    np.testing.assert_array_equal(up, np.where(i % 32 >= 3, i - 3, i))
    np.testing.assert_array_equal(votes, np.where(i % 32 < 16, sum(1 << k for k in range(0, 16, 3)), 1))


def test_threads_that_have_returned_count_at_a_barrier(run):
    out = np.zeros(41, i32)
    run("some_return", 1, 64, out, i32(40))
    np.testing.assert_array_equal(out, [7] * 40 + [1])


@pytest.mark.parametrize(
    ("how", "block", "sentence"),
    [
        (0, 32, "names lane 3, and that lane has exited"),
        (1, 32, "names lane 3, and that lane waits in __syncthreads"),
        (2, 32, "no thread can go on: thread 0 .* names lane 1, and that lane waits in __syncthreads"),
        (3, 32, "reads lane 16 in __shfl_xor_sync, and its mask 0x0000ffff does not name that lane"),
        (4, 32, "thread 16 .* does not name its own lane 16"),
        (5, 32, "thread 3 .* waits in __syncwarp with mask 0xffffffff, which names lane 0"),
        (6, 32, "thread 1 .* in line [0-9]+ of the source that is not a multiple of 16"),
        (7, 40, "thread 32 .* names lane 31, and that lane is not in the block"),
    ],
)
def test_what_a_gpu_leaves_undefined_is_an_error(run, how, block, sentence):
    out = np.zeros(128, f32)
    with pytest.raises(RuntimeError, match=f"bad: .*{sentence}"):
        run("bad", 2, block, i32(how), out)
    run("bad", 2, 64, i32(7), out)  # and the next launch is sound
    np.testing.assert_array_equal(out[:64], np.arange(64) ^ 1)


def _arguments():
    a = [np.zeros(4, t) for t in (f32, np.uint8, np.float16, u32, i32, np.int64, np.complex64, f32)]
    return [*a, i32(1), np.int64(2), u32(3), f32(4), np.float64(5), np.bool_(True)]


def test_arguments_of_the_right_types_arrive(run):
    args = _arguments()
    run("types", 1, 32, *args)
    assert args[1][0] == 16
    ml_dtypes = pytest.importorskip("ml_dtypes")
    args[2] = np.zeros(4, ml_dtypes.bfloat16)
    run("types", 1, 32, *args)


@pytest.mark.parametrize(
    ("at", "wrong", "sentence"),
    [
        (0, np.zeros(4), "parameter a is Wide::pointer and wants an array of float32, got float64"),
        (1, np.zeros(4, np.int8), "parameter b .* uint8, got int8"),
        (2, np.zeros(4, np.uint8), "parameter c .* 2 bytes, got uint8"),
        (3, np.zeros(4, i32), "parameter d .* uint32, got int32"),
        (4, np.zeros(4, u32), "parameter e .* int32, got uint32"),
        (5, fake_cupy.zeros(4, np.int32), "parameter f .* int64, got int32"),
        (6, None, "parameter g .* an array, got None of type NoneType"),
        (6, np.int64(0), "parameter g .* an array, got numpy.int64"),
        (7, np.zeros(4, u32), "parameter h .* float32, got uint32"),
        (8, 1, "parameter i is int and wants numpy.int32, got 1 of type int"),
        (8, np.int64(1), "parameter i .* numpy.int32, got numpy.int64"),
        (9, i32(1), "parameter j .* numpy.int64, got numpy.int32"),
        (10, i32(1), "parameter k .* numpy.uint32, got numpy.int32"),
        (11, 1.0, "parameter l is float and wants numpy.float32, got 1.0 of type float"),
        (11, np.float64(1), "parameter l .* numpy.float32, got numpy.float64"),
        (12, f32(1), "parameter m .* numpy.float64, got numpy.float32"),
        (13, True, "parameter n is bool and wants numpy.bool, got True of type bool"),
        (8, np.zeros(1, i32), "parameter i is int and wants a NumPy scalar, got an array"),
    ],
)
def test_arguments_of_other_types_are_refused(run, at, wrong, sentence):
    args = _arguments()
    args[at] = wrong
    before = cuda_on_host.launches
    with pytest.raises(TypeError, match=f"types: {sentence}"):
        run("types", 1, 32, *args)
    assert cuda_on_host.launches == before


def test_other_refusals(run):
    with pytest.raises(TypeError, match="types takes 14 arguments, got 1"):
        run("types", 1, 32, i32(1))
    with pytest.raises(ValueError, match="the block has 1 to 1,024 members, got 1,025"):
        run("untouched", 1, 1025, np.zeros(4, f32))
    with pytest.raises(ValueError, match=r"the grid has 1 to .* got 0"):
        run("untouched", 0, 4, np.zeros(4, f32))
    with pytest.raises(ValueError, match="49,153 bytes"):
        run("untouched", 1, 4, np.zeros(4, f32), shared_mem=49153)
    with pytest.raises(RuntimeError, match=r"no .* function named decoy"):
        run("decoy", 1, 4, i32(1))
    with pytest.raises(ValueError, match="without --use_fast_math"):
        RawModule(code=SOURCE, options=("--use_fast_math",))
    with pytest.raises(ValueError, match="f: parameter p is const P, which is neither"):
        RawModule(code='struct P { int x; };\nextern "C" __global__ void f(const P p) {}').get_function("f")
    with pytest.raises(ValueError, match=r"includes <cuda_fp16.h>, which"):
        RawModule(code="#include <cuda_fp16.h>\n").get_function("f")
    with pytest.raises(RuntimeError, match=r"(?s)g\+\+ does not take the source.*source.cu:2:.*nowhere"):
        RawModule(code='extern "C" __global__ void f(int n) {\n  nowhere = n; }').get_function("f")


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr(cuda_on_host, "available", lambda: False)
    with pytest.raises(RuntimeError, match="it was not found"):
        RawModule(code=SOURCE)


def test_the_stand_ins_for_ptx(run):
    special = np.array([0, 1, 0x7FFFFF, 0x800000, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF], u32)
    near = (np.array([65504, 65519.996, 65520, 2**-14, 2**-24, 2**-25, 2**127, 2**-126], f32).view(u32))[:, None]
    near = (near + np.arange(-3, 4).astype(u32)).reshape(-1)
    rng = np.random.default_rng(2)
    halves = (rng.uniform(-26, 17, 50_000).astype(f32), rng.standard_normal(50_000).astype(f32))
    halves = (np.exp2(halves[0]) * np.sign(halves[1])).view(u32)  # where float16 has its numbers
    ties = (halves[:10_000] & u32(0xFFFFE000)) | u32(0x1000)
    bits = np.concatenate([special, near, halves, ties, rng.integers(0, 2**32, 50_000, dtype=u32)])
    bits = np.concatenate([bits, bits ^ u32(0x80000000), np.arange(65536, dtype=u32)])
    n = bits.size
    b, h = np.zeros(n, np.uint16), np.zeros(n, np.uint16)
    r, from_b, from_h = np.zeros(n, u32), np.zeros(n, u32), np.zeros(n, u32)
    run("halves", -(-n // 256), 256, bits, b, h, r, from_b, from_h, i32(n))
    x, low = bits.view(f32), bits.astype(np.uint16)
    with np.errstate(all="ignore"):
        half, wide, reciprocal = x.astype(np.float16), low.view(np.float16).astype(f32), rcp(x)
    np.testing.assert_array_equal(b, bfloat16_bits(x))
    np.testing.assert_array_equal(r, reciprocal.view(u32))
    np.testing.assert_array_equal(from_b, from_bfloat16_bits(low).view(u32))
    quiet = ~np.isnan(x) | (bits & 0x400000 != 0)  # NumPy may or may not make a signalling NaN quiet
    np.testing.assert_array_equal(h[quiet], half.view(np.uint16)[quiet])
    assert np.isnan(h.view(np.float16)[~quiet]).all() and np.array_equal(h >> 15, bits >> 31)
    quiet = ~np.isnan(wide) | (low & 0x200 != 0)
    np.testing.assert_array_equal(from_h[quiet], wide.view(u32)[quiet])
    assert np.isnan(from_h.view(f32)[~quiet]).all()


def test_only_what_says_so_is_fused(run):
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((2, 4096)).astype(f32)
    c = -(a * b) * f32(1.0 + 2.0**-20)
    apart, plain, fused, root = np.zeros((4, 4096), f32)
    run("rounded", 32, 128, a, b, c, apart, plain, fused, root)
    np.testing.assert_array_equal(apart, a * b + c)
    np.testing.assert_array_equal(plain, apart)
    exact = a.astype(np.float64) * b + c.astype(np.float64)  # nearly the same exponent: float64 holds it exactly
    np.testing.assert_array_equal(fused, exact.astype(f32))
    assert (fused != apart).mean() > 0.5
    np.testing.assert_array_equal(root, np.sqrt(np.abs(a)) / np.maximum(b, c))


def test_vectors_macros_and_atomics(run):
    x, y = np.arange(32, dtype=np.uint8), np.zeros(32, np.uint8)
    run("copy4", 1, 8, x, y)
    np.testing.assert_array_equal(x, y)
    x, y = np.arange(32, dtype=f32), np.zeros(32, f32)
    run("copy2", 1, 16, x, y)
    np.testing.assert_array_equal(x, y)
    total, largest = np.zeros(1, f32), np.zeros(1, i32)
    run("count", 5, 100, total, largest)
    assert total == 500 and largest == 99


def test_fibers_of_other_processors():
    """Where the stacks are not swapped by hand, the C library does it."""
    module = RawModule(code=SOURCE, options=("-DON_HOST_UCONTEXT",))
    x = np.arange(96, dtype=u32)
    module.get_function("turn_around")((1,), (96,), (x, i32(1)), shared_mem=384)
    np.testing.assert_array_equal(x, np.arange(96)[::-1])
    with pytest.raises(RuntimeError, match="lane 3"):
        module.get_function("bad")((1,), (32,), (i32(1), np.zeros(32, f32)))
