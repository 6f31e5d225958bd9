# %% [markdown]
# # 05 · Building NF4
#
# [← 04 Blockwise absmax](04_blockwise_absmax.ipynb) · [All notebooks](README.md) · [06 Double quantization →](06_double_quantization.ipynb)
#
# **Question.** Where do NF4's 16 values come from, to the last bit?
#
# **You will be able to**
#
# - build NF4 from normal quantiles, so that all 16 bit patterns are the published ones;
# - say where its 0.9677083 comes from, and why equation 4 gives another code;
# - compute how often each of the 16 values is used.
#
# **Needs:** NumPy; the normal distribution function Φ and its inverse Φ⁻¹; that a float32
# has 24 significant bits; the division of a block by its absmax
# ([04](04_blockwise_absmax.ipynb), section 2).
#
# **Hours:** 2 (1 to read and run, 1 for the exercises).
#
# **Papers:** QLoRA §3 (equation 4) and appendix E. Settled: equation 4
# gives −∞ (qlora issue 94; sections 1, 2); where 0.9677083 comes from (bitsandbytes 440,
# 938, 968; section 3); NF4 step by step (bitsandbytes 543, 1283; qlora 299; section 4);
# the exact values (bitsandbytes 1772; sections 4, 5).
#
# Folded cells measure, check or draw. Click ••• to open one.

# %% tags=["setup"]
from fractions import Fraction
from statistics import NormalDist

import numpy as np
from drawings.nb05 import nf4_on_the_normal
from grading import grade

from tinylora import codebooks, quantize
from tinylora.numerics import optimality

Φ, Φ_inverse = NormalDist().cdf, NormalDist().inv_cdf

# the 16 values of QLoRA's appendix E, as bitsandbytes lists them too
published = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], np.float32)  # fmt: skip

# %% [markdown]
# ## 1 · Equation 4, read literally
#
# QLoRA §3 wants a code whose 16 values are used equally often by normal weights. With the
# normal quantile $Q = Φ^{-1}$ it gives the $2^k$ values of a $k$-bit code as
#
# $$q_i = \tfrac12\Big(Q\big(\tfrac{i}{2^k+1}\big) + Q\big(\tfrac{i+1}{2^k+1}\big)\Big).\qquad(4)$$
#
# The paper gives no range for $i$. For $k = 4$ take $i = 0 … 15$. Since $Q(0) = -∞$, the
# first value is −∞.

# %%
Q = np.array([-np.inf, *map(Φ_inverse, np.arange(1, 17) / 17)])  # Q(0/17) … Q(16/17)
q = (Q[:-1] + Q[1:]) / 2
print(q.round(3))
assert q[0] == -np.inf and np.isfinite(q[1:]).all() and round(q[15], 3) == 1.376
assert np.abs(q[1:] + q[:0:-1]).max() < 1e-15 and abs(q[8]) < 1e-15  # symmetric, with a 0

# %% [markdown]
# The other 15 values are symmetric and contain an exact 0. The paper cannot mean them:
# its next sentence says that a symmetric $k$-bit code has no exact zero. Nor are they
# the 16 values that the paper prints in its appendix E. After division by the largest
# value, the 7 negative values differ by up to 0.075.

# %% tags=["hide-input"]
# Checks: equation 4 against appendix E, value by value
literal = q[1:] / q[15]
for mine, theirs in zip(literal[:8], published[:8], strict=True):
    print(f"equation 4: {mine:7.4f}   appendix E: {theirs:7.4f}   {mine - theirs:+.4f}")
gap = np.abs(literal[:8] - published[:8]).max()
assert round(gap, 3) == 0.075 and (literal < 0).sum() == (published < 0).sum() == 7

# %% [markdown]
# ## 2 · The two ranges
#
# To get a zero and use all 16 patterns, the paper estimates quantiles of two ranges:
# $2^{k-1} = 8$ for the negative part and $2^{k-1}+1 = 9$ for the positive part. One of
# the two zeros is removed. So 7 negative values, one 0 and 8 positive values remain.
# The paper does not say how equation 4 enters. Here are two readings, each for the
# $n - 1$ positive values of a range of $n$:
#
# - *halves*: the positive half of equation 4, with $2n + 1$ in the denominator;
# - *bins*: ½ to 1 is cut into $n$ equal bins, and the quantiles at the two ends of a bin
#   are averaged. The last bin is left out, since it ends at $Q(1) = ∞$.


# %%
def halves(n):
    return [(Φ_inverse(i / (2 * n + 1)) + Φ_inverse((i + 1) / (2 * n + 1))) / 2 for i in range(n + 1, 2 * n)]


def bins(n):
    end = [Φ_inverse(0.5 + 0.5 * i / n) for i in range(n)]
    return [(end[i] + end[i + 1]) / 2 for i in range(n - 1)]


def two_ranges(negative, positive, joint):
    """Mirror the negative part, add the 0, divide: both parts by b's largest value (joint), or each by its own."""
    a, b = np.array(negative), np.array(positive)
    return np.array([*-a[::-1] / (b.max() if joint else a.max()), 0, *b / b.max()])


# %% [markdown]
# Each side can be divided by its own largest value, or both by the larger of the two. Of
# the four codes none comes nearer to appendix E than 0.05.

# %% tags=["hide-input"]
# Measures: how far the four codes lie from appendix E
gap = {}
for reading in (halves, bins):
    for joint in (True, False):
        code = two_ranges(reading(8), reading(9), joint)
        gap[reading.__name__, joint] = np.abs(code - published).max()
        divided = "joint maximum" if joint else "each by its own"
        print(f"{reading.__name__:6}, {divided:15}: {np.abs(code - published).max():.4f}")
assert len(code) == 16 and [f"{g:.4f}" for g in gap.values()] == ["0.0668", "0.0747", "0.0546", "0.0628"]

# %% [markdown]
# Appendix E is made of quantiles, not of means of quantiles.
#
# ## 3 · Where 0.9677083 comes from
#
# The released code (bitsandbytes, `create_normal_map`) takes quantiles at evenly spaced
# probabilities, from ½ to an outermost $o = 0.9677083$. Its docstring calls $o$
# "empirically optimized", but the seven digits are those of a formula.
#
# Cut the probability 1 into 16 equal bins, and put a value in the middle of each. Half
# a bin, $1/32$, is left beyond the outermost value, as its *tail*. But no value lies at
# ½, where the zero would be. With 15 bins one does, and the tail is $1/30$. NF4 has 16
# values and a zero. Its tail is the mean of the two:
#
# $$o = 1 - \tfrac12\big(\tfrac1{32} + \tfrac1{30}\big) = \tfrac{929}{960} = 0.96770833…$$

# %%
exact = 1 - (Fraction(1, 32) + Fraction(1, 30)) / 2
print(f"{exact} = {float(exact):.12f}, cut to seven digits {int(exact * 10**7) / 10**7}")
assert exact == Fraction(929, 960) and int(exact * 10**7) / 10**7 == codebooks.NF4_OFFSET == 0.9677083

# %% tags=["hide-input"]
# Checks: with the recipe of section 4, only the mean of the two tails gives appendix E
for tail, o in (("1/32", 31 / 32), ("1/30", 29 / 30), ("their mean", codebooks.NF4_OFFSET)):
    gap[tail] = np.abs(codebooks.normal_float(4, offset=o) - published).max()
    print(f"tail {tail:10}: o = {o:.7f}, largest distance to appendix E {gap[tail]:.4f}")
assert (round(gap["1/32"], 4), round(gap["1/30"], 4), gap["their mean"]) == (0.0027, 0.0026, 0)

# %% [markdown]
# Neither tail alone gives the table. No source read for this notebook says *why* the mean
# was taken.
#
# ## 4 · The recipe, step by step
#
# **Step 1, the probabilities.** One grid from $o$ to ½ has 9 points, for the 8 positive
# values and the zero. The other has 8 points, for the 7 negative ones. bitsandbytes
# takes them from `torch.linspace`, which rounds the step $h = (b-a)/(n-1)$ to float32.
# It counts up from $a$ in the first half, and down from $b$ in the second. $a + h\,i$
# is rounded once (a *fused multiply-add*). In NumPy a float64 sum, rounded to float32,
# does the same here.


# %%
def grid(n, a=0.9677083, b=0.5):
    a, b = np.float32(a), np.float32(b)
    h, i = (b - a) / np.float32(n - 1), np.arange(n)
    up, down = np.float64(a) + np.float64(h) * i, np.float64(b) - np.float64(h) * (n - 1 - i)
    return np.where(i < n // 2, up, down).astype(np.float32)


for n in (9, 8):
    print(f"{n}:", *(f"{p:.7f}" for p in grid(n)))
    assert grid(n).tobytes() == codebooks.linspace_f32(0.9677083, 0.5, n).tobytes()

# %% [markdown]
# **Step 2:** take the quantiles and round them to float32. The last of either grid is
# $Q(½) = 0$ and is left out. Those of the grid of 8 get a minus sign. **Step 3:** put in
# one 0, and sort. **Step 4:** divide by the largest, in float32.

# %%
positive = np.array([Φ_inverse(float(p)) for p in grid(9)[:-1]], np.float32)
negative = -np.array([Φ_inverse(float(p)) for p in grid(8)[:-1]], np.float32)
values = np.sort(np.concatenate([negative, np.zeros(1, np.float32), positive]))
nf4 = values / values.max()
assert nf4.dtype == np.float32 and nf4.tobytes() == published.tobytes() == codebooks.nf4().tobytes()

# %% tags=["hide-input"]
# Checks: the bit patterns of the 16 values, beside the published ones
probabilities = [*(1 - grid(8)[:-1]), *grid(9)[::-1]]
print(" i  probability         Φ⁻¹   / 1.8481308   bits      published")
for i, (p, z, c) in enumerate(zip(probabilities, values, nf4, strict=True)):
    print(f"{i:2}    {p:.7f}  {z:10.7f}  {c:12.9f}   {c.view(np.uint32):08x}  {published[i].view(np.uint32):08x}")
assert ((nf4 < 0).sum(), (nf4 == 0).sum(), (nf4 > 0).sum()) == (7, 1, 8) and f"{values.max():.7f}" == "1.8481308"

# %% [markdown]
# **All 16 bit patterns are the published ones.** (The answer to qlora issue 299 lists 15
# mirrored values. That is not NF4.)
#
# ## 5 · What breaks it
#
# Which details decide the last bits? Here is the recipe with the grid and the precision
# of the division left open. `rounded_twice` is a grid that rounds $h\,i$ before the sum.


# %%
def recipe(grid, precision=np.float32):
    positive, negative = (np.array([Φ_inverse(float(p)) for p in grid(n)[:-1]], precision) for n in (9, 8))
    values = np.sort(np.concatenate([-negative, np.zeros(1, precision), positive]))
    return (values / values.max()).astype(np.float32)


def rounded_twice(n, a=0.9677083, b=0.5):
    a, b = np.float32(a), np.float32(b)
    h, i = (b - a) / np.float32(n - 1), np.arange(n, dtype=np.float32)
    return np.where(i < n // 2, a + h * i, b - h * (np.float32(n - 1) - i))


# %% [markdown]
# Each row below changes one thing. It shows by how many ULPs (steps from one float32 to
# the next) each value is off.

# %% tags=["hide-input"]
# Measures: the ULPs by which the 16 values are off, for five changes
changes = {
    "nothing": (grid,),
    "not fused: product, then sum": (rounded_twice,),
    "np.linspace in float32": (lambda n: np.linspace(0.9677083, 0.5, n, dtype=np.float32),),
    "np.linspace in float64": (lambda n: np.linspace(0.9677083, 0.5, n),),
    "divided in float64": (grid, np.float64),
    "929/960, not its 7 digits": (lambda n: grid(n, 929 / 960),),
}
off = {}
print(f"{'index of the value':28}", *(f"{i:2}" for i in range(16)))
for name, change in changes.items():
    off[name] = np.abs(recipe(*change).view(np.int32).astype(int) - published.view(np.int32)).tolist()
    print(f"{name:28}", *(f"{u or '·':>2}" for u in off[name]))
assert off["nothing"] == off["not fused: product, then sum"] == [0] * 16
assert off["np.linspace in float32"] == [0, 4, *[0] * 14]
assert off["np.linspace in float64"] == [0, 2, 0, 0, 0, 0, 5, 0, 4, 2, 0, 1, 1, 1, 2, 0]
assert off["divided in float64"] == [0, 1, 1, 0, 1, 0, 1, 0, 0, 0, 0, 1, 0, 1, 0, 0]
assert off["929/960, not its 7 digits"] == [0, 2, 4, 3, 4, 0, 6, 0, 7, 5, 8, 5, 2, 2, 5, 0]

# %% [markdown]
# So the seven digits belong to the definition. So does float32, for the grid and for the
# division. The fused multiply-add does not matter for these two grids, but for 4 of the 7
# grids of the 8-bit map in notebook [06](06_double_quantization.ipynb).
#
# These are last bits. Averaging neighbouring quantiles of the *same* two grids, as
# equation 4 does, moves a value by up to 0.038.

# %% tags=["hide-input"]
# Measures: the grids of the 8-bit map that differ, and the averaged neighbours
different = [n for n in 2 ** np.arange(7) + 1 if (rounded_twice(n, 0.1, 1) != grid(n, 0.1, 1)).any()]
print("grids from 0.1 to 1 that differ if not fused: those of", *different, "values")
z = [np.array([Φ_inverse(float(p)) for p in grid(n)])[::-1] for n in (8, 9)]
averaged = two_ranges(*((v[:-1] + v[1:]) / 2 for v in z), joint=True)
print(f"averaged neighbours: {np.abs(averaged - published).max():.4f} from appendix E")
assert len(different) == 4 and round(np.abs(averaged - published).max(), 3) == 0.038

# %% [markdown]
# ## 6 · "Equal expected number of values in each bin"
#
# QLoRA §3 says this of its code, and therefore calls it information-theoretically
# optimal. If value $j$ is used with probability $p_j$, a choice carries the entropy
# $H = -\sum_j p_j \log_2 p_j$, which is 4 bits if all 16 are used equally often.
#
# Test it first where it should hold best. Let $W ∼ N(0,1)$ *not* be divided by an absmax.
# It is coded by the nearest of $s\,c_j$: $c_j$ are NF4's values, and
# $s = Φ^{-1}(o) = 1.848$ undoes the recipe's division. A value is used when $W$ falls
# between the midpoints to its neighbours (±∞ at the ends):
#
# $$p_j = Φ\big(s\tfrac{c_j+c_{j+1}}2\big) - Φ\big(s\tfrac{c_{j-1}+c_j}2\big).$$

# %%
c, s = codebooks.nf4().astype(float), Φ_inverse(0.9677083)
ideal = np.diff([0, *(Φ(x) for x in s * (c[:-1] + c[1:]) / 2), 1])
print("p =", *(f"{p:.4f}" for p in ideal), f"  H = {-(ideal @ np.log2(ideal)):.4f}")
assert round(s, 3) == 1.848 and f"{-(ideal @ np.log2(ideal)):.4f}" == "3.9962"
assert (f"{ideal.min():.4f}", f"{ideal.max():.4f}") == ("0.0557", "0.0710")

# %% [markdown]
# The shares run from .0557 to .0710; 1/16 is .0625. One reason: the probability
# $o - ½ = .4677$ is cut into 7 steps below zero (.0668 each) and 8 above (.0585 each).
#
# NF4 is not used in this way. Weights are divided by the absmax of their block, which
# for 64 weights is 2.6 σ on average ([04](04_blockwise_absmax.ipynb), section 6), not
# 1.848 σ. This stretches the code, and the middle values get more weights.
# `optimality.usage` integrates over the law of the maximum
# ([16](16_what_is_nf4_optimal_for.ipynb) derives it). 16,384 drawn blocks must agree
# within four standard errors.

# %%
share = optimality.usage(c, 64)
H = -(share @ np.log2(share))
drawn = quantize(np.random.default_rng(0).standard_normal((16_384, 64)).astype(np.float32)).indices()
print("p =", *(f"{p:.4f}" for p in share), f"  H = {H:.4f}")
assert np.abs(np.bincount(drawn.ravel()) / drawn.size - share).max() < 0.0011  # 4 √(.09 · .91 / 2²⁰)
assert f"{H:.4f}" == f"{optimality.entropy(c, 64):.4f}" == "3.8847"
assert (share.argmin(), f"{share.min():.2%}") == (15, "1.73%") and round(optimality.expected_max(64), 1) == 2.6
assert (share.argmax(), f"{share.max():.2%}") == (6, "9.24%")

# %% [markdown]
# The rarest value, 1, gets 1.73 % of the weights. The commonest,
# −0.09, gets 9.24 %. The entropy is 3.8847 bits, not 4.
#
# The figure shows the 16 probabilities and their values (left), and the usages (right):
# bars for blocks of 64, diamonds for the undivided $N(0,1)$.

# %% tags=["hide-input"]
# Draws: the recipe on the normal law, and the usage of the values
nf4_on_the_normal()

# %% [markdown]
# ## Where paper and code differ
#
# - **Equation 4 did not make the table** (section 1).
# - **The bins are not used equally** (section 6).
# - **0.9677083 is not in QLoRA §3.** bitsandbytes' docstring puts it at 1.845 standard
#   deviations; it lies at 1.848 (section 6).
# - **"$2^{k-1}$ for the negative part, $2^{k-1} + 1$ for the positive"** counts the zero
#   twice. So does bitsandbytes' docstring.
#
# ## Exercises
#
# Grading runs only the setup and the exercises' cells: put helpers there.
#
# ### 05-1 Repair equation 4
#
# The paper says that a symmetric code has $2^k$ values and no zero. Equation 4 gives
# $2^k - 1$ finite values, one of them 0. Its denominator $D$ has to change.
#
# - **Given:** `k`, 2 to 8, and `Φ_inverse(p)` for 0 < p < 1.
# - **Return** the $2^k$ means ½ (Q(i/D) + Q((i+1)/D)), divided by the largest.
# - **Checked:** $2^k$ floats, ascending, to 1e-9.
# - **Hint:** which D, and which i, give exactly $2^k$ finite means?


# %% tags=["exercise"]
def exercise_1(k):
    """Return the symmetric k-bit code of equation 4 with the right denominator D."""
    # BEGIN SOLUTION
    D = 2**k + 2  # D − 1 finite quantiles have D − 2 means
    Q = np.array([Φ_inverse(i / D) for i in range(1, D)])
    q = (Q[:-1] + Q[1:]) / 2
    return q / q.max()
    # END SOLUTION


# %%
_ = grade("05-1", exercise_1)

# %% [markdown]
# ### 05-2 Read the offset off a table
#
# How would you find 0.9677083 if you had only appendix E?
#
# - **Given:** `code`, float32, ascending, made by section 4's recipe with another $o$ and
#   other grids: negative values, 0, and 2 to 20 positive values. $o$ lies between 0.8 and
#   0.999.
# - **Return** $o$, a float.
# - **Checked:** to 5e-6, for random $o$ and random numbers of values.
# - **Hint:** the largest value is 1 whatever $o$ was. How does its neighbour depend on
#   $o$? Bisect.


# %% tags=["exercise"]
def exercise_2(code):
    """Return the offset o from which a code was made by NF4's recipe."""
    # BEGIN SOLUTION
    positive = np.sort(np.asarray(code, float)[np.asarray(code) > 0])
    m, ratio = len(positive), positive[-2] / positive[-1]
    lo, hi = 0.5, 1.0
    for _ in range(60):
        o = (lo + hi) / 2
        if Φ_inverse(o - (o - 0.5) / m) / Φ_inverse(o) > ratio:  # it falls from 1 − 1/m to 0 as o grows
            lo = o
        else:
            hi = o
    return o
    # END SOLUTION


# %%
_ = grade("05-2", exercise_2)

# %% [markdown]
# ## Summary
#
# - NF4 is $Φ^{-1}$ at evenly spaced probabilities from ½ to $o$, 8 steps up and 7 steps
#   down, divided by $Φ^{-1}(o) = 1.848$. `tinylora/codebooks.py` builds it, and
#   `tests/test_codebooks.py` holds all 16 bit patterns.
# - $o = 0.9677083$ is $1 - ½(1/32 + 1/30) = 929/960$ cut to seven digits.
# - The values are not used equally: 3.8847 of 4 bits in blocks of 64
#   (`tinylora/numerics/optimality.py`, `tests/test_optimality.py`).
#
# ## Build it
#
# Write step 1 of [build_it.md](build_it.md) now: quantize a weight to NF4 and back, in
# NumPy, in your own `my_qlora.py`. `pytest notebooks -k my-1` grades it.
