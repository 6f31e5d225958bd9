# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 21 · The same equation on a GPU (appendix)
#
# [← 20 Limits and descendants](20_limits_and_descendants.ipynb) · [All notebooks](README.md) · [22 What blocks buy →](22_what_blocks_buy.ipynb)
#
# **Question.** What does a GPU do when it turns 4 bits back into a weight?
#
# **You will be able to**
#
# - read the kernel that dequantizes, line by line
# - say which of a GPU's results have the CPU's bits, and why others have not
# - predict the time of such a kernel from the bytes that it moves
#
# **Needs:** blocks and their absmax ([04](04_blockwise_absmax.ipynb)), double
# quantization ([06](06_double_quantization.ipynb)), the QLoRA layer
# ([07](07_the_qlora_layer.ipynb)). No GPU is needed. If CuPy finds one, section 6
# measures on it.
#
# **Hours:** 2 (¾ to read and run, 1¼ for exercises 1 and 2; exercise 3 is optional).
#
# **Papers:** QLoRA (arXiv 2305.14314) §3, equation 6. The kernel is in
# `tinylora/kernels/cuda.cu`.
#
# Folded cells measure, check or draw. Click ••• to open one.

# %% tags=["setup"]
import math
import time
from dataclasses import replace
from fractions import Fraction

import numpy as np
from drawings.nb21 import bytes_by_step
from grading import grade

import tinylora as tl
from tinylora import backend, quant
from tinylora.dtypes import round_to
from tinylora.kernels import cuda
from tinylora.nn import Linear4bit

f32 = np.float32

# %% [markdown]
# ## 1 · The equation
#
# Weight $i$ lies in block $b = \lfloor i/64 \rfloor$. Its index $q_i$ has 4 bits, and its
# block's constant $m_b$ is stored in 8 bits. Equation 6 restores the constant first, and
# then the weight:
#
# $$w_i = \text{code}[q_i]\; m_b, \qquad m_b = d[k_b]\; n_{\lfloor b/256 \rfloor} + \mu .$$
#
# Here $\text{code}$ holds NF4's 16 values, $d$ the 256 values of the 8-bit code, and
# $k_b$ is the constant's 8-bit index. Each 256 blocks share a float32 $n$, and $\mu$ is
# the mean of all constants. In NumPy these are two lines. They give the bits of the
# library's `quant.dequantize`.

# %%
w = f32(0.02) * np.random.default_rng(0).standard_normal((256, 1024), dtype=f32)
q = tl.quantize(w, "nf4", double_quant=True)
k, n, d, mu = q.absmax_codes, q.nested_absmax, q.constants.code, q.offset

b, i = np.arange(len(k)), np.arange(q.size)
m = d[k] * n[b // 256] + mu
equation = q.code[q.indices().reshape(-1)] * m[i // 64]
assert equation.tobytes() == quant.dequantize(q).tobytes() == q.dequantize("float32").tobytes()

# %% [markdown]
# Each operation here makes a whole array before the next one begins. On a GPU each
# thread can take a few weights through all operations.
#
# ## 2 · What a GPU runs
#
# A *kernel* is a function of a number. The GPU calls it for thousands of numbers at a
# time, and each call is a *thread*. Here 256 threads form a *thread block*. 32 neighbours
# in it form a *warp*, whose threads execute the same instruction together. This is the
# kernel as it stands in `cuda.cu`:

# %%
text = cuda.source()
start, end = (text.index(mark) for mark in ("#define STORED", "#define DEQUANTIZE"))
print(text[start:end])

# %% tags=["hide-input"]
# Checks: the threads of a block, and the words that a thread takes of 67 million weights
assert cuda.THREADS == 256 and 8192**2 // 8 // (8448 * 256) == 3

# %% [markdown]
# Line by line:
#
# - **The head.** `STORED` lists the arguments that describe the stored weights. `packed`
#   holds the indices as 32-bit words, eight indices in a word. `k`, `n`, `d` and `mu`
#   are those of the equation. Without double quantization `nested` is 0, and the
#   constants are in `absmax`. `V<T>` is the type of the results `w`: float32, bfloat16
#   or float16.
# - **`EACH`** is how many results fill 16 bytes, the most that a thread can write at
#   once: 8 of two bytes, or 4 of float32. Where it is 4, a thread takes half a word. The
#   rest of this list assumes 8. `struct Some` holds the results.
# - **`__shared__`** names memory that the 256 threads of a thread block share. The
#   first 16 threads fetch one value of the code each. Every thread fetches one of the
#   256 values of `d`.
# - **`__syncthreads()`** makes each thread wait until all have fetched their values.
# - **`for`**. A thread's number is `blockIdx.x * 256 + threadIdx.x`. The thread takes the
#   word of that number, and then every $N$-th word after it, where $N$ is the number of
#   threads. The library starts at most 8,448 thread blocks. If there are 67 million
#   weights, a thread takes 3 or 4 words.
# - **`b = i >> per_block`**. Word $i$ holds the weights $8i$ to $8i + 7$. A block of 64
#   weights has 8 words, so $b = \lfloor i/8 \rfloor$, and `per_block` is 3.
# - **`float m`** is the constant of the block. `b >> 8` is $\lfloor b/256 \rfloor$.
# - **`for j`** takes the eight weights. The even weight of a pair lies in the high half
#   of its byte. So weight $j$ lies $4\,(j \oplus 1)$ bits up, where $j \oplus 1$ is $j$
#   with its last bit flipped. `& 15` keeps its four bits.
# - **`T::put`** rounds the product to the type of the result. `flush` makes denormal
#   numbers (those below $2^{-126}$) 0, as bitsandbytes' GPU kernels do. Where results
#   must be the CPU's, the library sets `ftz` to 0, and nothing is flushed.
# - **The last line** writes the eight results at once.
#
# Here is the same thread in Python. Shared memory is left out, because it changes no
# number.


# %%
def thread(i, packed, out):
    b, word = i >> 3, int(packed[i])
    m = d[k[b]] * n[b >> 8] + mu
    for j in range(8):
        out[8 * i + j] = q.code[word >> 4 * (j ^ 1) & 15] * m


words, out = q.packed.view("<u4"), np.empty(q.size, f32)
for i in range(len(words)):
    thread(i, words, out)
assert out.tobytes() == equation.tobytes()

# %% [markdown]
# All 262,144 weights have the bits of the equation. The threads may run in any order,
# because a thread writes to eight places that no other thread reads or writes.

# %% tags=["hide-input"]
# Checks: threads in a random order give the same bits
shuffled = np.full(q.size, np.nan, f32)
for i in np.random.default_rng(1).permutation(len(words)).tolist():
    thread(i, words, shuffled)
print(f"{len(words):,} threads in a random order: same bits {shuffled.tobytes() == equation.tobytes()}")
assert (q.size, len(words), q.size // len(k), len(k)) == (262_144, 32_768, 64, 4096)
assert shuffled.tobytes() == equation.tobytes()

# %% [markdown]
# ## 3 · What bfloat16 rounds
#
# A bfloat16 is the upper half of a float32. It has the same exponents, and 8
# significant bits in place of 24. `put` rounds to it with one instruction on newer
# GPUs. On older ones `put` adds 0x7fff and the lowest bit that is kept, and drops
# 16 bits:


# %%
def bf(a):
    """float32 numbers rounded to bfloat16, held in float32: the lower 16 bits are 0."""
    pattern = a.view(np.uint32)
    return ((pattern + 0x7FFF + (pattern >> 16 & 1)) & 0xFFFF0000).view(f32)


in_16_bits = bf(out)
assert in_16_bits.tobytes() == round_to(equation, "bfloat16").tobytes() == q.dequantize("bfloat16").tobytes()

# %% [markdown]
# **Where one rounds matters.** The kernel rounds once, after the product. One could also
# round the constants first. Then 21 % of the weights would differ, and the relative error
# of rounding (in norm) would grow from 0.17 % to 0.21 %.

# %%
early = bf(q.code[q.indices().reshape(-1)] * np.repeat(bf(m), 64))

# %% [markdown]
# A layer that computes in bfloat16 rounds three times: its input $X$, its weight
# $\hat W$, and its output. The sums in between are float32. The backward pass does the
# same with $\bar Y$, $\hat W$ and $\bar X$:

# %%
W_hat = equation.reshape(q.shape)
X, G = (np.random.default_rng(2).standard_normal((128, size), dtype=f32) for size in (1024, 256))
Y = bf(bf(X) @ bf(W_hat).T)
X_bar = bf(bf(G) @ bf(W_hat))

# %% [markdown]
# Each of the three roundings has a relative error of 0.166 %. The three are
# independent, so their squares add up. The prediction for $Y$ and for $\bar X$ is
# $\sqrt 3 \cdot 0.166\,\% = 0.288\,\%$.


# %% tags=["hide-input"]
# Measures: the errors of rounding early, of each rounding and of the layer; checks that the layer is the library's
def off_by(a, b):
    """‖a − b‖ / ‖b‖ over all entries."""
    return np.linalg.norm(a.astype(float) - b) / np.linalg.norm(b.astype(float))


others = (early != in_16_bits).mean()
print(f"constants rounded first: {others:.1%} of the weights differ; ", end="")
print(f"errors {off_by(early, equation):.3%} and {off_by(in_16_bits, equation):.3%}")
assert abs(others - 0.206) < 0.004 and round(off_by(early, equation), 4) == 0.0021
layer, x = Linear4bit(q, compute_dtype="bfloat16"), tl.Tensor(X, requires_grad=True)
y = layer(x)
y.backward(G)
assert y.data.tobytes() == Y.tobytes() and x.grad.tobytes() == X_bar.tobytes()
one = [off_by(bf(a), a) for a in (X, W_hat, X @ W_hat.T)]
found, quantizing = (off_by(Y, X @ W_hat.T), off_by(X_bar, G @ W_hat)), off_by(W_hat, w)
print("bf(X), bf(Ŵ) and bf(Y) are off by", *(f"{e:.3%}" for e in one), f"so {np.linalg.norm(one):.3%} is predicted")
print(f"measured: Y {found[0]:.3%}, X̄ {found[1]:.3%}; Ŵ is off from W by {quantizing:.1%}")
assert all(abs(e - 0.00166) < 2e-5 for e in one) and abs(np.linalg.norm(one) - 0.00288) < 2e-5
assert all(abs(e / np.linalg.norm(one) - 1) < 0.02 for e in found) and round(quantizing / np.linalg.norm(one)) == 32

# %% [markdown]
# The measured errors agree with the prediction within 2 %. Quantization itself errs 32
# times as much.
#
# ## 4 · A warp adds in another order
#
# `dequantize` adds nothing up, so its bits can be the CPU's. RMSNorm, softmax and the
# loss add up a row, and in float32 the order of a sum decides its last bits. In `cuda.cu`
# a warp shares a row. Its thread number $l$ ($l$ from 0 to 31), called *lane* $l$, adds
# the elements $l$, $l + 32$, $l + 64$, and so on. Then five *exchanges* follow. In the
# first, each lane adds the number that the lane at a distance of 16 holds. In the next
# ones the distances are 8, 4, 2 and 1. This is called a butterfly. Afterwards all 32
# lanes hold the same sum.


# %%
def warp_sum(x):
    s, lane = np.zeros(32, f32), np.arange(32)
    for part in x.reshape(-1, 32):
        s = s + part
    for mask in (16, 8, 4, 2, 1):
        s = s + s[lane ^ mask]
    return s


# %% tags=["hide-input"]
# Measures: how far a warp's sum, NumPy's and one from left to right are from the exact sum
rows, lane, sums = np.random.default_rng(0).random((1000, 4096), f32), np.arange(32), {}
by_lane = np.array([warp_sum(row) for row in rows])
assert (by_lane == by_lane[:, :1]).all()
sums["a warp"], sums["NumPy"] = by_lane[:, 0], np.array([row.sum() for row in rows])
sums["from left to right"] = np.cumsum(rows, axis=1, dtype=f32)[:, -1]
exact = np.array([math.fsum(row) for row in rows])
unit, off = np.spacing(exact.astype(f32)), {}
for name, found in sums.items():
    off[name] = np.abs(found - exact) / unit
    print(
        f"{name:18}: from the exact sum {off[name].mean():5.2f} units in the last place, {off[name].max():5.2f} at most"
    )
different = (sums["a warp"] != sums["NumPy"]).mean()
apart = (np.abs(sums["a warp"] - sums["NumPy"]) / unit).max()
print(f"a warp's sum is not NumPy's in {different:.1%} of the rows; they are {apart:.0f} units apart at most")
assert 0.35 < different < 0.48 and 1 <= apart <= 4
assert off["NumPy"].mean() < 0.5 and off["a warp"].mean() < 0.5 and off["from left to right"].mean() > 7

most = rows.reshape(1000, -1, 32).max(axis=1)
for mask in (16, 8, 4, 2, 1):
    most = np.maximum(most, most[:, lane ^ mask])
assert (most == rows.max(axis=1, keepdims=True)).all()

# %% [markdown]
# The warp's sum differs from NumPy's in 42 % of the rows, by 2 units in the last place at
# most. It is no worse. On average both are less than half a unit from the exact sum,
# because NumPy too adds many short sums. A single sum from left to right is off by 9
# units on average.
#
# A maximum is never rounded. The same exchanges with `maximum` in place of `+` give the
# same bits as NumPy. So a GPU's absmax can have the CPU's bits.
#
# ## 5 · Why a · b + c is not fused
#
# NumPy rounds $d[k]\,n + \mu$ twice: first the product, then the sum. A GPU has one
# instruction for both, a *fused multiply-add*, which rounds once. The fused instruction
# is faster and more exact, and it gives other bits. On a CPU the cell imitates it in
# float64. A float64 holds the product of two float32 exactly, and here the sum closely
# enough (the folded cell checks it with fractions).

# %%
twice = d[k] * n[b // 256] + mu
once = (d[k].astype(float) * n[b // 256] + float(mu)).astype(f32)

# %% tags=["hide-input"]
# Measures: the constants and weights whose bits a fused multiply-add changes
for block in range(len(k)):  # against exact arithmetic: is `once` the float32 nearest to the exact value?
    true = Fraction(float(d[k[block]])) * Fraction(float(n[block // 256])) + Fraction(float(mu))
    x = once[block]
    around = (np.nextafter(x, f32(-9)), x, np.nextafter(x, f32(9)))
    assert min(around, key=lambda y, true=true: abs(Fraction(float(y)) - true)) == x
at = int(np.flatnonzero(once != twice)[0])
a, c, ulp = float(d[k[at]]), float(n[at // 256]), float(np.spacing(twice[at]))
true = Fraction(a) * Fraction(c) + Fraction(float(mu))
print(f"block {at}: d[k] = {a:.8g}, n = {c:.8g}, μ = {float(mu):.8g}; errors in units of m's last place:")
print(
    f"  the rounded product is off by {float(Fraction(float(d[k[at]] * n[at // 256])) - Fraction(a) * Fraction(c)) / ulp:+.4f}"
)
for name, x in (("rounded twice", twice[at]), ("rounded once", once[at])):
    print(f"  m {name:13} {int(x.view(np.uint32)):08x}, off by {float(Fraction(float(x)) - true) / ulp:+.4f}")
other = q.code[q.indices().reshape(-1)] * np.repeat(once, 64)
changed, fused = int((once != twice).sum()), other != equation
fused_16 = round_to(other, "bfloat16") != round_to(equation, "bfloat16")
print(f"other bits if fused: {changed} of {len(k):,} constants, {changed / len(k):.1%}")
print(f"and of {q.size:,} weights {int(fused.sum()):,} in float32 and {int(fused_16.sum())} in bfloat16")
assert (changed, int(fused.sum()), int(fused_16.sum())) == (299, 15_136, 0)
assert "--fmad=false" in text and np.abs(once.view(np.int32) - twice.view(np.int32)).max() == 1

# %% [markdown]
# With a fused multiply-add 299 of the 4,096 constants, 7.3 %, would differ in the last
# bit. In float32, 15,136 of the 262,144 weights would differ. In bfloat16 none would,
# because a last bit of float32 rarely decides how the upper 16 bits are rounded. tinylora
# promises the same bits on CPU and GPU, so it compiles its kernels with `--fmad=false`.
#
# ## 6 · Counting bytes
#
# A thread computes little, so the memory decides how long this kernel takes. A weight
# comes in as 4 bits and its share of the constants, and goes out as 16 bits:
#
# $$4 + \tfrac{8}{64} + \tfrac{32}{64 \cdot 256} = 4.127 \text{ bits in}, \qquad
# 0.516 + 2 = 2.516 \text{ bytes moved a weight} .$$
#
# A *chain* of array operations moves more. Each operation reads its arguments from memory
# and writes its result there, and the next one reads it back at once. The cells below run
# the chain that the library used on a GPU before it had the kernel. `Counted` adds up the
# bytes of the arrays that each operation reads and writes. (The tables of 16 and 256
# values are not counted, because they stay in a cache.)


# %%
class Counted:
    """Runs array operations, and adds up by step the bytes that they read and write."""

    def __init__(self):
        self.moved = {}

    def __call__(self, step, f, *arrays):
        result = f(*arrays)
        read = {id(x): x.nbytes for x in arrays}  # an argument that is given twice is read once
        self.moved[step] = self.moved.get(step, 0) + sum(read.values()) + result.nbytes
        return result


# %% [markdown]
# The chain restores all constants. Then it looks up each byte in a table of 256 pairs of
# weights. Then it multiplies the weights by the constants:


# %%
def to_float32(q, op):
    """The weights of q by array operations. op(step, f, *arrays) runs one."""
    xp, c, step = backend.array_module(q.packed), q.constants, "restore the constants"
    m = op(step, lambda k: c.code[k], c.codes)
    m = op(step, lambda m, n: m * n, m, op(step, lambda n: xp.repeat(n, 256), c.absmax))
    m = op(step, lambda m: m + c.offset, m)
    pairs = xp.stack([xp.repeat(q.code, 16), xp.concatenate([q.code] * 16)], axis=1)
    pairs = pairs.reshape(-1).view(np.complex64)  # two float32 are looked up as one number of 8 bytes
    w = op("look up two weights a byte", lambda p: xp.take(pairs, p).view(f32), q.packed)
    return op("times the constant", lambda w, m: (w.reshape(len(m), -1) * m[:, None]).reshape(-1), w, m)


# %% [markdown]
# Rounding to bfloat16 takes a copy, a test for NaN, and `bf` of section 3 as five array
# operations:


# %%
def to_bfloat16(w, op):
    """float32 weights rounded to bfloat16, held in float32 with a lower half of 0."""
    w = op("copy", lambda w: w.copy(), w)
    bad = op("is one of them NaN?", lambda w, _: w != w, w, w)
    op("is one of them NaN?", lambda bad: bad.any(), bad)
    step, u = "round to bfloat16", w.view(np.uint32)
    bit = op(step, lambda u: u >> 16, u)
    bit = op(step, lambda bit: bit & np.uint32(1), bit)
    up = op(step, lambda bit: bit + np.uint32(0x7FFF), bit)
    u = op(step, lambda u, up: u + up, u, up)
    return op(step, lambda u: u & np.uint32(0xFFFF0000), u).view(f32)


# %% tags=["hide-input"]
# Measures: the bytes of the kernel, and of the chain with and without the rounding; checks the chain's bits
ways = {"one kernel": {"indices": 1 / 2, "constants": 1 / 64 + 4 / (64 * 256), "results": 2.0}}
op = Counted()
weights = to_float32(q, op)
ways["array operations, to float32"] = {step: moved / q.size for step, moved in op.moved.items()}
rounded = to_bfloat16(weights, op)
ways["array operations, to bfloat16"] = {step: moved / q.size for step, moved in op.moved.items()}
assert weights.tobytes() == equation.tobytes() and rounded.tobytes() == in_16_bits.tobytes()
total = {name: sum(steps.values()) for name, steps in ways.items()}
for name, steps in ways.items():
    print(f"{name}: {total[name]:.3f} bytes a weight")
    for step, bytes_ in steps.items():
        print(f"    {step:28}{bytes_:7.3f}")
kernel, in_float32, in_bfloat16 = total.values()
assert f"{8 * (kernel - 2):.3f}" == "4.127" and f"{kernel:.3f}" == "2.516"
assert (round(in_float32, 1), round(in_bfloat16, 1), round(in_bfloat16 / kernel, 1)) == (13.0, 71.0, 28.2)
assert ways["array operations, to bfloat16"]["round to bfloat16"] == 44

# %% tags=["hide-input"]
# Draws: the bytes moved by the three ways, step by step
bytes_by_step(ways)

# %% [markdown]
# The chain moves 71.0 bytes a weight. The kernel moves 2.516 bytes, 28 times fewer.
# Rounding alone moves 44 bytes in five operations. In the kernel the thread still has the
# number that it rounds, so rounding moves nothing.
#
# **Against the bandwidth.** One NVIDIA H200 moves 4.14 TB/s when it copies, reads and
# writes added. The bytes divided by the bandwidth give the least time. The times below
# were measured on such a card: the kernel's by `python -m tests.gpu`, which wrote
# `figures/gpu.md`, and the chain's before the library had kernels.

# %% tags=["hide-input"]
# Checks: the least times, and their share of the times that were measured on an H200
N, COPY = 8192**2, 4.14e12  # weights; bytes a second
measured = dict(zip(total, (0.0491, 0.614, 3.13), strict=True))  # ms, on the H200
least = {name: N * bytes_ / COPY * 1e3 for name, bytes_ in total.items()}
print(f"{N:,} weights; ms at {COPY / 1e12} TB/s, measured on an H200, and the share of the bandwidth that was used")
for name in total:
    print(f"{name:30} {least[name]:6.4f} {measured[name]:8.4f} {least[name] / measured[name]:6.0%}")
share = {name: least[name] / measured[name] for name in total}
fewer, better = in_bfloat16 / kernel, share["one kernel"] / share["array operations, to bfloat16"]
useful = N * (kernel + 2) / COPY * 1e3 / measured["array operations, to bfloat16"]
print(
    f"the kernel is faster by {fewer * better:.1f} = {fewer:.1f} (fewer bytes) times {better:.2f} (more bytes a second)"
)
print(f"what must be moved, with results of four bytes, is {useful:.1%} of the chain's time")
assert N == 67_108_864 and f"{least['one kernel']:.4f}" == "0.0408"
assert [f"{s:.0%}" for s in share.values()] == ["83%", "34%", "37%"]
assert math.isclose(fewer * better, 3.13 / 0.0491) and (round(fewer * better), round(better, 1)) == (64, 2.3)
assert (f"{in_bfloat16 / in_float32:.1f}", f"{3.13 / 0.614:.1f}", f"{useful:.1%}") == ("5.5", "5.1", "2.3%")

# %% [markdown]
# The kernel's least time is 0.0408 ms. Measured were 0.0491 ms, so the kernel used 83 %
# of the bandwidth. The chain's least time is 1.15 ms. Measured were 3.13 ms, so the
# chain used 37 %. The kernel is 64 times as fast. Fewer bytes give a factor of 28, and
# more bytes a second give a factor of 2.3.
#
# Faster single operations would not save the chain, because most of the bytes that it
# moves belong to intermediate results. Only the indices, the constants and the results of
# four bytes must be moved. At full bandwidth this would take 2.3 % of the chain's time.
#
# The count can be tested without the kernel. By the count, the chain to bfloat16 takes
# 5.5 times as long as the chain to float32. By the measured times it takes 5.1 times as
# long.
#
# The last cell of this section measures on a GPU, if there is one.


# %% tags=["hide-input"]
# Measures: bits and times on a GPU, if CuPy finds one
def on_this_gpu(xp, repeat=20, times=256):
    """Check the bits of both ways on a GPU, and print their times, for a weight of `times` copies of q, and the bandwidth of a copy."""

    def seconds(f):
        f()
        best = math.inf
        for _ in range(5):
            xp.cuda.Device().synchronize()
            began = time.perf_counter()
            for _ in range(repeat):
                f()
            xp.cuda.Device().synchronize()
            best = min(best, (time.perf_counter() - began) / repeat)
        return best

    c = replace(q.constants, codes=np.tile(k, times), absmax=np.tile(n, times))
    large = replace(q, packed=np.tile(q.packed, times), constants=c, shape=(times * q.size,))
    large = large.to(lambda x: backend.move(x, xp))
    theirs = backend.move(large.dequantize("bfloat16").view(np.uint16), "cpu")
    upper = (in_16_bits.view(np.uint32) >> 16).astype(np.uint16)
    assert theirs.tobytes() == upper.tobytes() * times, "the kernel's bits are not the CPU's"

    def chain():
        op = Counted()
        return to_bfloat16(to_float32(large, op), op)

    assert backend.move(chain(), "cpu").tobytes() == in_16_bits.tobytes() * times, "the chain's bits are not the CPU's"
    x = xp.zeros(times * q.size, f32)
    bandwidth = 2 * x.nbytes / seconds(lambda: x.copy())
    print(f"on this GPU a copy moves {bandwidth / 1e12:.2f} TB/s")
    for name, f, a_weight in (
        ("one kernel", lambda: large.dequantize("bfloat16"), kernel),
        ("array operations, to bfloat16", chain, in_bfloat16),
    ):
        took, needed = seconds(f), times * q.size * a_weight / bandwidth
        print(f"{name:30} {needed * 1e3:6.4f} {took * 1e3:8.4f} {needed / took:6.0%}")


try:
    gpu = backend.cuda()
except RuntimeError:
    print("no GPU here: the measured times above are the H200's")
else:
    on_this_gpu(gpu)

# %% [markdown]
# ## Where paper and code differ
#
# - **The mean.** Equation 6 has no $\mu$. §3 subtracts the mean before the constants
#   are quantized, and the code adds it back (section 1).
# - **Rounding.** The paper does not say where equation 6 is rounded. If the constants
#   were rounded first, 21 % of the weights would differ (section 3). If product and sum
#   were fused, 7.3 % of the constants would differ (section 5).
# - **Denormals.** bitsandbytes' GPU kernels make denormal results 0, and the equation
#   keeps them. The kernel here does either: the argument `ftz` decides (section 2).
#
# ## Exercises
#
# Put helpers inside the exercise's cell: grading runs only it and the setup.
#
# ### 21-1 Quantize a block with a warp
#
# This exercise turns weights into indices. 32 lanes hold a block of 64 weights, two each,
# and must agree on the largest magnitude. Given:
#
# - `x`: 64 float32. Lane $l$ holds `x[2 l]` and `x[2 l + 1]`. Write what the 32 lanes
#   hold as an array of 32 numbers.
# - `bounds`: the 15 float32 midpoints between NF4's values, ascending
# - `exchange`: `exchange(v, mask)` gives each lane $l$ the number of lane `l ^ mask`,
#   as `v[lane ^ mask]` does in section 4. Only `exchange` may carry a number from one
#   lane to another, so `v.max()` over lanes is not allowed. Five exchanges are enough.
#
# Return `(packed, absmax)`: 32 bytes (uint8), and the block's largest magnitude $m$.
#
# The index of a weight is the number of bounds that are less than
# $y = x \cdot (1 / m)$. If $m$ is below 1e-38, divide by 1e-38 instead. Round the
# quotient $1/m$ to float32, and the product as well. The index of a lane's first weight
# goes into the high half of its byte.
#
# Checked: every bit against `tl.quantize`, on fresh blocks, with ties and with zeros.
#
# Hint: before the first exchange a lane knows the larger magnitude of its own two
# weights.


# %% tags=["exercise"]
def exercise_1(x, bounds, exchange):
    """Quantize one block as a warp does. Return (packed, absmax)."""
    # BEGIN SOLUTION
    m = np.maximum(np.abs(x[::2]), np.abs(x[1::2]))
    for mask in (16, 8, 4, 2, 1):
        m = np.maximum(m, exchange(m, mask))
    scale = f32(1) / np.maximum(m, f32(1e-38))
    index = (np.repeat(scale, 2)[:, None] * x[:, None] > bounds).sum(axis=1)
    return (index[::2] << 4 | index[1::2]).astype(np.uint8), m[0]
    # END SOLUTION


# %%
_ = grade("21-1", exercise_1)

# %% [markdown]
# ### 21-2 What fusing saves
#
# Write section 6's count for any chain of array operations. Given:
#
# - `sizes`: a dict from the name of an array to its bytes
# - `operations`: a list of `(result, arguments)` in order, all names; `arguments` is a
#   tuple. Every result is used later, or wanted.
# - `wanted`: a tuple of the names of the results that must be in memory at the end
#
# Return `(chain, kernel)`: the bytes that the chain of array operations moves, and
# those that one kernel for all of it moves.
#
# - An array operation reads its arguments, each once even if it is given twice, and
#   writes its result. A result may have the name of an argument. The argument is then
#   overwritten, and counts as read and as written.
# - The kernel keeps what it computes in its threads. It reads what it cannot compute,
#   each array once, and writes what is wanted.
#
# Example: $y = (x\,x)\,w$ is `[("s", ("x", "x")), ("y", ("s", "w"))]`, wanted `("y",)`.
# If all arrays have 8 bytes, the chain moves 40 bytes and the kernel 24 bytes.
#
# Checked: the example, RMSNorm and SwiGLU in fresh shapes, and random chains.
#
# Hint: keep a set of the names that earlier operations have computed. Afterwards, find
# how many times fewer bytes the kernel of RMSNorm moves for long rows.


# %% tags=["exercise"]
def exercise_2(sizes, operations, wanted):
    """Return (chain, kernel), the bytes that a chain and one kernel move."""
    # BEGIN SOLUTION
    # RMSNorm: x x, its row sums, four operations on those, x ρ, and times w: 7 rows d numbers against 2, so 3.5 times
    chain, read, computed = 0, set(), set()
    for result, arguments in operations:
        chain += sizes[result] + sum(sizes[name] for name in set(arguments))
        read |= set(arguments) - computed
        computed.add(result)
    return chain, sum(sizes[name] for name in [*read, *wanted])
    # END SOLUTION


# %%
_ = grade("21-2", exercise_2)

# %% [markdown]
# ### 21-3 A warp's softmax (optional)
#
# Attention takes the softmax of a row in one kernel. Its warp needs the row's maximum
# first, and then a sum. Given:
#
# - `x`: 1 to 200 float32. Some may be −∞ (a masked key), but not all. Lane $l$ takes
#   `x[l]`, `x[l + 32]`, and so on.
# - `exchange`: as in exercise 1; five exchanges for the maximum and five for the sum
#
# Return as many float32 as `x` has: $e^{x - \max x} / \sum e^{x - \max x}$, computed by
# the 32 lanes of a warp.
#
# Checked: to 1e-5 of each number, also for numbers such as 10,000, and the ten
# exchanges.
#
# Hint: some lanes have no number at all, or nothing but −∞. What must they hold?


# %% tags=["exercise"]
def exercise_3(x, exchange):
    """Return the softmax of one row, computed by the 32 lanes of a warp."""
    # BEGIN SOLUTION
    held = np.full((-(-len(x) // 32), 32), -np.inf, f32)  # what is missing is −∞, and exp makes it 0
    held.reshape(-1)[: len(x)] = x
    top = held.max(axis=0)
    for mask in (16, 8, 4, 2, 1):
        top = np.maximum(top, exchange(top, mask))
    e = np.exp(held - top)
    s = e.sum(axis=0)
    for mask in (16, 8, 4, 2, 1):
        s = s + exchange(s, mask)
    return (e / s).reshape(-1)[: len(x)]
    # END SOLUTION


# %%
_ = grade("21-3", exercise_3)

# %% [markdown]
# ## Summary
#
# - `dequantize` in `tinylora/kernels/cuda.cu`, run thread by thread in any order, has
#   the bits of the equation (`tests/test_cuda.py` runs the C++ itself on a CPU).
# - A layer in bfloat16 rounds three times and errs by 0.288 %. Quantization errs 32 times
#   as much (`Linear4bit` in `tinylora/nn.py`; `tests/test_lora.py`).
# - A warp adds in another order, so its sum has other last bits, here in 42 % of the
#   rows. A maximum is equal in every bit (`tests/test_cuda_on_host.py`).
# - Fused multiply-adds would change 7.3 % of the constants, so the library switches
#   them off (`OPTIONS` in `tinylora/kernels/cuda.py`).
# - The least time of such a kernel is the bytes that it moves divided by the bandwidth.
#   One kernel moves 2.516 bytes a weight, and array operations move 71.0 bytes.
