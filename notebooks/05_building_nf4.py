# %% [markdown]
# # 05 · Building NF4
#
# **NF4's 16 values are quantiles of the normal distribution at evenly spaced probabilities: 7 below zero, one 0, 8
# above, divided by the largest. This notebook computes them to the last bit. The formula in the paper gives another
# code.**
#
# Accompanies QLoRA §3 ("4-bit NormalFloat", equation 4) and its appendix E, which lists the values. Four questions that
# readers have asked are settled on the way: that equation 4 gives −∞ (qlora issue 94; sections 1 and 2), where
# 0.9677083 comes from (bitsandbytes 440, 938, 968; section 3), what NF4 is step by step (bitsandbytes 543, 1283;
# qlora 299; section 4), and how to get the exact values (bitsandbytes 1772; sections 4 and 5).
#
# Hours: 3½ (2 to read and run, 1½ for the exercises).
#
# Prerequisites: NumPy; the normal distribution function Φ and its inverse, the quantile function Φ⁻¹; that a float32
# holds 24 significant bits. Notebook 04, section 2, for the division of a block by its absmax (from section 6 on).
#
# Code that only measures, checks or draws is folded where the editor can fold it; its output is not.

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
# ## 1. Equation 4, read literally
#
# QLoRA §3 wants a code whose 16 values are used equally often by normal weights. With $Q = Φ^{-1}$ it says
#
# $$q_i = \tfrac12\Big(Q\big(\tfrac{i}{2^k+1}\big) + Q\big(\tfrac{i+1}{2^k+1}\big)\Big)\qquad(4)$$
#
# for the $2^k$ values of a $k$-bit code. No range is given for $i$; take $i = 0 … 15$ for $k = 4$. Since
# $Q(0) = -∞$, so is the first value.

# %%
Q = np.array([-np.inf, *map(Φ_inverse, np.arange(1, 17) / 17)])  # Q(0/17) … Q(16/17)
q = (Q[:-1] + Q[1:]) / 2
print(q.round(3))
assert q[0] == -np.inf and np.isfinite(q[1:]).all() and round(q[15], 3) == 1.376
assert np.abs(q[1:] + q[:0:-1]).max() < 1e-15 and abs(q[8]) < 1e-15

# %% [markdown]
# What remains are 15 symmetric values from −1.376 to 1.376 *with an exact 0*. (With $i = 1 … 16$ they are the same,
# and +∞ comes last.) Yet the paper's next sentence says that a symmetric $k$-bit code made in this way has no exact
# zero, so it cannot mean these values. Nor are they appendix E, once they are divided by the largest. Both have 7
# negative values, so those compare one to one:

# %% tags=["hide-input"]
literal = q[1:] / q[15]
for mine, theirs in zip(literal[:8], published[:8], strict=True):
    print(f"equation 4: {mine:7.4f}   appendix E: {theirs:7.4f}   {mine - theirs:+.4f}")
gap = np.abs(literal[:8] - published[:8]).max()
assert round(gap, 3) == 0.075 and (literal < 0).sum() == (published < 0).sum() == 7

# %% [markdown]
# ## 2. The two ranges
#
# To have a zero and to use all 16 patterns, the paper goes on, estimate quantiles of two ranges, $2^{k-1} = 8$ for the
# negative part and $2^{k-1}+1 = 9$ for the positive part, unify them, and remove one of the two zeros. So each count
# includes a zero: 7 negative values, 0, 8 positive ones. The paper does not say how equation 4 and the two counts go
# together. Two readings:
#
# - *halves*: take the half from 0 upwards of a code with $n$ values on either side, which is equation 4 with $2n + 1$
#   in the denominator, for $n = 8$ and $n = 9$;
# - *bins of |W|*: the means of neighbouring quantiles of $|W|$, at $i/n$, without the infinite last one.


# %% tags=["hide-input"]
def halves(n):
    return [(Φ_inverse(i / (2 * n + 1)) + Φ_inverse((i + 1) / (2 * n + 1))) / 2 for i in range(n + 1, 2 * n)]


def bins(n):
    return [(Φ_inverse(0.5 + i / 2 / n) + Φ_inverse(0.5 + (i + 1) / 2 / n)) / 2 for i in range(n - 1)]


def two_ranges(negative, positive, joint):
    a, b = np.array(negative), np.array(positive)
    return np.array([*-a[::-1] / max(a.max(), b.max() * joint), 0, *b / b.max()])


# %% [markdown]
# Each half can be divided by its own largest value, or both by the largest of all. Four combinations, and how far each is
# from appendix E:

# %% tags=["hide-input"]
gap = {}
for reading in (halves, bins):
    for joint in (True, False):
        code = two_ranges(reading(8), reading(9), joint)
        gap[reading.__name__, joint] = np.abs(code - published).max()
        divided = "joint maximum" if joint else "each by its own"
        print(f"{reading.__name__:6}, {divided:15}: {np.abs(code - published).max():.4f}")
assert len(code) == 16 and [f"{g:.4f}" for g in gap.values()] == ["0.0668", "0.0747", "0.0546", "0.0628"]

# %% [markdown]
# None comes nearer than 0.05. Appendix E is not made of means of quantiles at all. It is made of quantiles.
#
# ## 3. Where 0.9677083 comes from
#
# The released code (bitsandbytes, `create_normal_map`) takes quantiles at evenly spaced probabilities from ½ to an
# outermost $o = 0.9677083$, short of the infinite $Q(1)$. Its docstring calls it "empirically optimized to minimize
# quantization error" and gives "~1.845 standard deviations"; it is $Q(o) = 1.848$ of them, and its seven digits are
# those of a formula. QLoRA §3 does not mention it. Two codes lie near at hand. Cut the probability 1 into 16 equal
# bins and put a value in the middle of each: half a bin is left at either end, $1/32$, but no value is at ½, where
# the zero would be. With 15 bins there is one, with 7 values on either side; half a bin is $1/30$. NF4 has 16 values
# and a zero, and its tail is the mean:
#
# $$o = 1 - \tfrac12\big(\tfrac1{32} + \tfrac1{30}\big) = \tfrac{929}{960} = 0.96770833…,\ \text{cut to seven digits: } 0.9677083.$$

# %%
exact = 1 - (Fraction(1, 32) + Fraction(1, 30)) / 2
print(f"{exact} = {float(exact):.12f}, cut to seven digits {int(exact * 10**7) / 10**7}")
assert exact == Fraction(929, 960) and int(exact * 10**7) / 10**7 == codebooks.NF4_OFFSET == 0.9677083
for tail, o in (("1/32", 31 / 32), ("1/30", 29 / 30), ("their mean", codebooks.NF4_OFFSET)):
    gap[tail] = np.abs(codebooks.normal_float(4, offset=o) - published).max()  # the recipe of section 4
    print(f"tail {tail:10}: o = {o:.7f}, largest distance to appendix E {gap[tail]:.4f}")
assert (round(gap["1/32"], 4), round(gap["1/30"], 4), gap["their mean"]) == (0.0027, 0.0026, 0)

# %% [markdown]
# Neither tail alone gives the table; the mean does, and all seven digits agree with it. (Exercise 2 finds the same
# digits in appendix E alone.) *Why* the mean of these two was taken no source read for this notebook says; the
# docstring speaks of an optimization, not of this formula.
#
# ## 4. The recipe, step by step
#
# **Step 1, the probabilities.** `torch.linspace` works in float32: $h = (b-a)/(n-1)$ is rounded to float32, the first
# half of the grid is counted up from $a$, the second down from $b$, and each $a + h\,i$ is a fused multiply-add, which
# rounds once. NumPy has none. In float64 the product is exact and the sum nearly so, and one rounding to float32 at
# the end gives the same (unless the sum falls within $2^{-53}$ of a tie).


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
# **Steps 2 to 4.** Quantiles, rounded to float32; those of the grid of 8 with a minus sign; the last of either grid is
# $Q(½) = 0$ and is left out, and one 0 is put in. Sort. Divide by the largest, in float32. All 16 bit patterns must
# be the published ones.

# %%
positive = np.array([Φ_inverse(float(p)) for p in grid(9)[:-1]], np.float32)
negative = -np.array([Φ_inverse(float(p)) for p in grid(8)[:-1]], np.float32)
values = np.sort(np.concatenate([negative, np.zeros(1, np.float32), positive]))
nf4 = values / values.max()

probabilities = [*(1 - grid(8)[:-1]), *grid(9)[::-1]]
print(" i  probability         Φ⁻¹   / 1.8481308   bits      published")
for i, (p, z, c) in enumerate(zip(probabilities, values, nf4, strict=True)):
    print(f"{i:2}    {p:.7f}  {z:10.7f}  {c:12.9f}   {c.view(np.uint32):08x}  {published[i].view(np.uint32):08x}")
assert nf4.dtype == np.float32 and nf4.tobytes() == published.tobytes() == codebooks.nf4().tobytes()
assert ((nf4 < 0).sum(), (nf4 == 0).sum(), (nf4 > 0).sum()) == (7, 1, 8) and f"{values.max():.7f}" == "1.8481308"

# %% [markdown]
# **16 of 16**, with 7 negative values, one 0 and 8 positive ones. (The answer to qlora issue 299 lists 15 values, the
# positive ones a mirror image of the negative ones. That is not NF4.) This is `tinylora.codebooks.nf4()`; from here on
# the library's is used.
#
# ## 5. What breaks it
#
# Each row below changes one thing in the recipe and shows how many ULPs (units in the last place, steps from one
# float32 to the next) each of the 16 values is off.


# %% tags=["hide-input"]
def recipe(grid, precision=np.float32):
    positive, negative = (np.array([Φ_inverse(float(p)) for p in grid(n)[:-1]], precision) for n in (9, 8))
    values = np.sort(np.concatenate([-negative, np.zeros(1, precision), positive]))
    return (values / values.max()).astype(np.float32)


def rounded_twice(n, a=0.9677083, b=0.5):
    a, b = np.float32(a), np.float32(b)
    h, i = (b - a) / np.float32(n - 1), np.arange(n, dtype=np.float32)
    return np.where(i < n // 2, a + h * i, b - h * (np.float32(n - 1) - i))


# %% tags=["hide-input"]
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
# So the seven digits belong to the definition, and so does float32, for the grid and for the division. The fused
# multiply-add makes no difference to these two grids. It does to 4 of the 7 from which the signed 8-bit map of double
# quantization (notebook 06) is made by the same function. `np.linspace(…, dtype=float32)` computes in float64 and
# rounds at the end, while torch rounds the step $h$ first and carries that error along.
#
# All this is about the last bits. Averaging neighbouring quantiles of the *same* two grids, as equation 4 would, is
# about the second digit.

# %% tags=["hide-input"]
different = [n for n in 2 ** np.arange(7) + 1 if (rounded_twice(n, 0.1, 1) != grid(n, 0.1, 1)).any()]
print("grids from 0.1 to 1 that differ if not fused: those of", *different, "values")
z = [np.array([Φ_inverse(float(p)) for p in grid(n)])[::-1] for n in (8, 9)]
averaged = two_ranges(*((v[:-1] + v[1:]) / 2 for v in z), joint=True)
print(f"averaged neighbours: {np.abs(averaged - published).max():.4f} from appendix E")
assert len(different) == 4 and round(np.abs(averaged - published).max(), 3) == 0.038

# %% [markdown]
# ## 6. "Equal expected number of values in each bin"
#
# That is what QLoRA §3 says of its code, and why it calls it information-theoretically optimal: 16 values used
# equally often carry $H = -\sum_j p_j \log_2 p_j = 4$ bits. Take the sentence at its best first: $W ∼ N(0,1)$, *not*
# divided by an absmax, coded by the nearest of $s\,c_j$ with the scale of the recipe, $s = Φ^{-1}(o) = 1.848$. A value is
# used when $W$ falls between the midpoints to its neighbours:
#
# $$p_j = Φ\big(s\tfrac{c_j + c_{j+1}}2\big) - Φ\big(s\tfrac{c_{j-1} + c_j}2\big).$$

# %% tags=["hide-input"]
c, s = codebooks.nf4().astype(float), Φ_inverse(0.9677083)
ideal = np.diff([0, *(Φ(x) for x in s * (c[:-1] + c[1:]) / 2), 1])
print("p =", *(f"{p:.4f}" for p in ideal), f"  H = {-(ideal @ np.log2(ideal)):.4f}")
assert round(s, 3) == 1.848 and f"{-(ideal @ np.log2(ideal)):.4f}" == "3.9962"
assert (f"{ideal.min():.4f}", f"{ideal.max():.4f}") == ("0.0557", "0.0710")

# %% [markdown]
# Nearly equal, not equal: .0557 to .0710, where 1/16 is .0625. Below zero 7 steps share the probability $o - ½ = .4677$ and
# above it 8 steps do, .0668 and .0585 each. Nor do the cells end where the probability is half-way: a cell ends at
# the midpoint between two *quantiles*, which matters most far out.
#
# NF4 is not used so. Weights are divided by the largest of their block, and the largest of 64 lies at 2.6 σ on average
# (notebook 04), not at 1.848 σ. The code is stretched, and the middle gets more. `optimality.usage` integrates over the
# law of the block's maximum; 16,384 drawn blocks must agree within four standard errors of a share,
# $4\sqrt{.09\cdot.91/2^{20}} ≈ .0011$.

# %%
share = optimality.usage(c, 64)
H = -(share @ np.log2(share))
drawn = quantize(np.random.default_rng(0).standard_normal((16_384, 64)).astype(np.float32)).indices()
print("p =", *(f"{p:.4f}" for p in share), f"  H = {H:.4f}")
assert np.abs(np.bincount(drawn.ravel()) / drawn.size - share).max() < 0.0011
assert f"{H:.4f}" == f"{optimality.entropy(c, 64):.4f}" == "3.8847"
assert (share.argmin(), f"{share.min():.2%}") == (15, "1.73%") and round(optimality.expected_max(64), 1) == 2.6
assert (share.argmax(), f"{share.max():.2%}") == (6, "9.24%")

# %% [markdown]
# The rarest value, 1, gets 1.73 % of the weights, 1/128 = 0.78 % being the positive maxima themselves; the commonest,
# −0.09, gets 9.24 %. The entropy is 3.8847 bits and not 4. What the code is good for is another question, and
# notebook 16's.
#
# The figure puts both together: on the left the 16 probabilities and the values that they give, on the right the two
# usages, bars for blocks of 64 and diamonds for the undivided $N(0,1)$.

# %% tags=["hide-input"]
nf4_on_the_normal()

# %% [markdown]
# ## 7. Other widths
#
# The same rule for $k$ bits: $2^{k-1}$ values above zero and $2^{k-1} - 1$ below, and the tail the mean of half a bin of $2^k$
# and half a bin of $2^k - 1$:
#
# $$o_k = 1 - \tfrac12\Big(\frac1{2\cdot 2^k} + \frac1{2(2^k-1)}\Big).$$
#
# That is tinylora's generalization, `codebooks.normal_float(bits)`. The paper speaks of NF$k$ for any $k$ and lists NF4
# only, and so does bitsandbytes. (PEFT's LoftQ code builds other widths with 0.9677083 for all of them.) For $k = 4$ the
# function takes the seven digits.

# %% tags=["hide-input"]
for k in (2, 3, 4, 8):
    code, o = codebooks.normal_float(k), 1 - (Fraction(1, 2 ** (k + 1)) + Fraction(1, 2 ** (k + 1) - 2)) / 2
    below, zero, above = (code < 0).sum(), (code == 0).sum(), (code > 0).sum()
    print(f"k = {k}: o = {float(o):.7f}, {below} + {zero} + {above} values,", end=" ")
    print(f"beside 0: {code[below + 1]:.4f}, beside 1: {code[-2]:.4f}")
    assert (below, zero, above) == (2 ** (k - 1) - 1, 1, 2 ** (k - 1)) and code[0] == -1 and code[-1] == 1
    assert k == 4 or (code == codebooks.normal_float(k, float(o))).all()
assert (codebooks.normal_float(4) == codebooks.nf4()).all()

# %% [markdown]
# ## Where paper and code differ
#
# 1. **Equation 4 is not how the table was made.** It gives −∞ and 15 symmetric values with an exact 0, up to .075 from
#    appendix E (section 1). Used on two ranges it stays .055 to .075 away (section 2), on the released grids .038
#    (section 5). The table is made of quantiles, not of means of quantiles.
# 2. **The offset 0.9677083 is not in QLoRA §3.** It is 929/960 cut to seven digits (section 3), and 929/960 itself gives
#    other bits, 8 ULP at most (section 5). bitsandbytes' docstring gives 1.845 standard deviations for it; it is 1.848.
# 3. **"$2^{k-1}$ for the negative part, $2^{k-1} + 1$ for the positive part"** counts the zero on both sides: grids of 8
#    and 9, but 7 negative and 8 positive values. bitsandbytes' docstring counts it twice as well: "8 negative and 9
#    positive values (including zero), for 15 non-zero values total" (section 4).
# 4. **"Equal expected number of values in each quantization bin"** does not hold: at blocks of 64 from 1.73 % to 9.24 %,
#    3.8847 bits; for an ideal normal law from 5.57 % to 7.10 %, 3.9962 bits (section 6).
#
# ## Exercises
#
# For grading only the setup cell and the exercise cells are run: put helpers inside the exercise's cell.
#
# ### 05-1 Repair equation 4
#
# The paper says of its symmetric code that it has $2^k$ values and no zero. Equation 4 as printed gives $2^k - 1$ finite
# values, one of them 0. One number in it has to change.


# %% tags=["exercise"]
def exercise_1(k):
    """Return the symmetric k-bit code that equation 4 gives once its denominator is right, divided by its largest value.

    Each value is to be the mean of two neighbouring quantiles, ½ (Q(i/D) + Q((i+1)/D)) with Q = Φ⁻¹, all of them finite. Which D,
    and which i, give exactly 2^k values?

    k  2 to 8.   Φ_inverse(p) is at hand for 0 < p < 1.
    Checked: 2^k floats, ascending, the largest 1, to 1e-9.
    """
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
# How would you find 0.9677083 if you had nothing but appendix E?


# %% tags=["exercise"]
def exercise_2(code):
    """Return the offset o from which a code was made by NF4's recipe.

    code  float32, ascending: some negative quantiles, 0, and 2 to 20 positive quantiles, at evenly spaced probabilities between o
          and ½ as in section 4, divided by the largest. o lies between 0.8 and 0.999.

    The largest value is 1 whatever o was. What about its neighbour? Φ and Φ_inverse are at hand; a bisection will do.
    Checked: a float, within 5e-6, for random o and random numbers of values.
    """
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
# ### 05-3 A code that keeps the promise
#
# Section 6 showed that even $N(0,1)$ itself does not use NF4's values equally often. Is there a code of which it does?
# Quantiles in the middle of equal bins are a tempting answer, and a wrong one: a weight goes to the *nearest* value.


# %% tags=["exercise"]
def exercise_3(n):
    """Return n values so that W ~ N(0, 1), coded by the nearest one, uses each of them with probability exactly 1/n.

    Nothing is divided by anything: W is coded as it is. Where must the ends of the bins lie? What follows for each value
    from the one before it? Start in the middle; there is more than one answer.

    n  an even number, 2 to 64.   Φ_inverse(p) is at hand for 0 < p < 1.
    Checked: n floats, ascending, and every share to 1e-9. (Symmetry is not asked for.)
    """
    # BEGIN SOLUTION
    ends = [Φ_inverse(j / n) for j in range(n // 2, n)]  # from 0 upwards
    upper = [ends[1] / 2 if n > 2 else 1.0]  # anything between 0 and the first end
    for end in ends[1:]:
        upper.append(2 * end - upper[-1])  # the end is half-way between two values
    return np.array([-v for v in reversed(upper)] + upper)
    # END SOLUTION


# %%
_ = grade("05-3", exercise_3)

# %% [markdown]
# ## Summary
#
# - NF4 is $Φ^{-1}$ at evenly spaced probabilities from ½ to $o$, 8 steps up and 7 steps down, divided by
#   $Φ^{-1}(o) = 1.848$: 7 negative values, 0, 8 positive ones. `tinylora.codebooks.nf4()`; all 16 bit patterns are
#   the published ones, here and in `tests/test_codebooks.py`.
# - $o = 0.9677083$ is $1 - ½(1/32 + 1/30) = 929/960$ cut to seven digits. The float32 grid, the seven digits and the
#   division in float32 each decide last bits.
# - Equation 4 read literally gives −∞ and 15 other values, .075 away.
# - The 16 values are not used equally: 3.8847 of 4 bits at blocks of 64 (`optimality.usage`, `tests/test_optimality.py`).
# - Next: notebook 16, what NF4 is optimal for.
