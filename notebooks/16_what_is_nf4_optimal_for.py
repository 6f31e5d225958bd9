# %% [markdown]
# # 16 · What is NF4 optimal for? (appendix)
#
# [← 15 Switching and combining adapters](15_switching_and_combining.ipynb) · [All notebooks](README.md) · [17 AF4 and BOF4 →](17_af4_and_bof4.ipynb)
#
# **Question.** For which error, and in blocks of which size, is NF4 nearly the best code?
#
# **You will be able to**
#
# - compute the expected error of any code in blocks of normal weights, without drawing
#   any;
# - find the best code for an error with Lloyd's iteration;
# - predict from one number for which error a code is suited.
#
# **Needs:** [05](05_building_nf4.ipynb), or its result: NF4's 16 values are quantiles of a
# normal law, divided by the largest; conditional densities; the idea of numerical
# integration. Point masses, Newton's step and minimizing over a function are explained
# where they are used.
#
# **Hours:** 6 (3 to read and run, 3 for the exercises).
#
# **Papers:** QLoRA §3, "4-bit NormalFloat quantization" (arXiv 2305.14314), where NF4 is
# called information-theoretically optimal for normal weights; Yoshida 2023, "NF4 Isn't
# Information Theoretically Optimal (and that's Good)" (2306.06965); BOF4 (Blumenberg et
# al. 2025, 2505.06653), eq. 2 to 17. The law of a block is BOF4's. The three block sizes,
# and the rule that predicts them, are this project's own computation.
#
# Folded cells measure, check or draw. Click ••• to open one.

# %% [markdown]
# **The answer in short.** In blocks of 64 normal weights NF4 has nearly the least mean
# absolute error that a code with −1, 0 and 1 can have. NF4's error is 0.0250 % above the
# least one, which is one part in 4,000. For squared error its best block size is 453, and
# at 64 its error is 5.86 % above the least. Its values are used most equally in blocks of
# 12.

# %% tags=["setup"]
from functools import cache
from statistics import NormalDist

import numpy as np
from grading import grade
from scipy.special import ndtr as Phi

from tinylora import codebooks, quantize
from tinylora.numerics import distributions
from tinylora.numerics.optimality import entropy, expected_error, expected_max, optimal_code, usage
from tinylora.papers.nf4_construction import nf4_optimal_for

NF4 = codebooks.nf4().astype(float)
Phi_inverse = NormalDist().inv_cdf


def phi(w):
    return np.exp(-w * w / 2) / np.sqrt(2 * np.pi)


# %% [markdown]
# ## 1 · The law of a scaled weight
#
# A block has $I$ weights $W_1 … W_I$, independent and N(0, 1). (Their standard deviation σ
# would cancel.) Their largest magnitude $M = \max|W_i|$ is stored. Each scaled weight
# $X = W/M$ is replaced by the nearest of 16 code values. This section derives the law of
# $X$.
#
# **The maximum.** Let $\Phi$ be the distribution function of N(0, 1), and $\varphi$ its
# density. All $I$ magnitudes lie below $m$ with probability $(2\Phi(m)-1)^I$. The
# derivative in $m$ is the density of $M$ (BOF4 eq. 12):
#
# $$p_M(m) = 2I\,\varphi(m)\,\big(2\Phi(m)-1\big)^{I-1}.$$
#
# **The other weights.** Suppose that $M = m$. One weight is $\pm m$. The other $I-1$ are
# independent normal weights cut to $[-m, m]$, with density $\varphi(w)/(2\Phi(m)-1)$. So
# $x = w/m$ has the density $m\,\varphi(mx)/(2\Phi(m)-1)$. A weight picked at random is one
# of the others with probability $(I-1)/I$.
#
# **The factor of a block.** The error of $W = MX$ is $M$ times the error of $X$. Its
# $k$-th power therefore carries the factor $M^k$. Averaged over $M$ with this factor, the
# density of $X$ is
#
# $$g_k(x) = \frac{I-1}{I}\int_0^\infty m^k\,\frac{m\,\varphi(mx)}{2\Phi(m)-1}\,p_M(m)\,dm
#   = 2(I-1)\int_0^\infty m^{k+1}\varphi(m)\,\varphi(mx)\,\big(2\Phi(m)-1\big)^{I-2}dm .$$
#
# The density $g_0$ says how often a value is used, $g_1$ weighs the absolute error of $W$,
# and $g_2$ weighs its squared error.
#
# **The atoms.** The maximum itself lies at $x = 1$ or $x = -1$. It adds a point mass,
# called an *atom*, of $\mathrm E[M^k]/(2I)$ at each of the two.
#
# **The quadrature.** Over an interval $[a, b]$ the integral over $x$ has a closed form.
# With $w = mx$,
#
# $$\int_a^b x^n\,m\,\varphi(mx)\,dx = m^{-n}\int_{ma}^{mb} w^n\varphi(w)\,dw,$$
#
# and the antiderivatives of $\varphi$, $w\varphi$ and $w^2\varphi$ are $\Phi$, $-\varphi$
# and $\Phi-w\varphi$. Only the integral over $m$ is left. A Gauss–Legendre rule replaces
# it by a weighted sum over 480 nodes in [−1, 1], which are moved to $m$ in [0, 12]. `law`
# returns the nodes $m$ and, for each node, what the other weights and the maximum
# contribute.

# %%
rule = cache(np.polynomial.legendre.leggauss)


def law(I, nodes=480):
    t, weight = rule(nodes)
    m, dm = 6 * (1 + t), 6 * weight
    inside = 2 * Phi(m) - 1
    return m, 2 * (I - 1) * phi(m) * inside ** (I - 2) * dm, 2 * phi(m) * inside ** (I - 1) * dm


# %% [markdown]
# `moments` returns $\int y^n g_k(y)\,dy$ up to $x$, for $n = 0, 1, 2$, each up to a
# constant. The difference between the two ends of an interval is the integral over it.
# `top` is $\mathrm E[M^k]/I$, which is both atoms together.


# %%
def moments(x, k, I, nodes=480):
    m, others, _ = law(I, nodes)
    w = np.multiply.outer(m, x)
    inner = Phi(w), -phi(w), Phi(w) - w * phi(w)
    return np.array([(others * m ** (k - n)) @ inner[n] for n in range(3)])


def top(k, I, nodes=480):
    m, _, maximum = law(I, nodes)
    return maximum @ m**k


# %% [markdown]
# Three things must come out. The mass between −1 and 1 is $(I-1)/I$. The two atoms have
# the remaining $1/I$. And $\mathrm E\,W^2 = 1$, where $\mathrm E\,W^2$ is the second
# moment of $g_2$ plus $\mathrm E[M^2]/I$.

# %% tags=["hide-input"]
# Checks: the masses and the variance, for four block sizes
for I in (8, 64, 512, 4096):
    mass = np.diff(moments([-1, 1], 0, I)[0]).item()
    variance = np.diff(moments([-1, 1], 2, I)[2]).item() + top(2, I)
    print(f"I = {I:4}   mass {mass:.12f}   atoms {top(0, I):.12f}   E W² {variance:.12f}   E M {I * top(1, I):.4f}")
    assert max(abs(mass - (I - 1) / I), abs(top(0, I) - 1 / I), abs(variance - 1)) < 1e-12
    assert abs(I * top(1, I) - expected_max(I)) < 1e-12

# %% [markdown]
# ## 2 · What a code costs, and how often its values are used
#
# Let $q(x)$ be the code value nearest to $x$, and cell $\ell$ the interval of all $x$
# whose nearest value is $q_\ell$. The error of the weights is (BOF4 eq. 2 and 3)
#
# $$\mathrm E\,|W-\hat W|^p = \mathrm E\,M^p\,|X-q(X)|^p = \sum_\ell \int_{\text{cell }\ell} |x-q_\ell|^p\,g_p(x)\,dx
#   + \frac{\mathrm E[M^p]}{2I}\Big(|1-q(1)|^p + |1+q(-1)|^p\Big).$$
#
# For $p = 2$ the square is expanded: $\int x^2 g_2 - 2q\int x\,g_2 + q^2\int g_2$. For
# $p = 1$ the cell is cut at $q$, and in each part the error has one sign. If a code has
# −1 and 1, the atoms cost nothing.


# %%
def ends(q):
    return np.concatenate([[-1], (q[1:] + q[:-1]) / 2, [1]])


def error(q, p, I, nodes=480):
    at_ends, at_q = moments(ends(q), p, I, nodes), moments(q, p, I, nodes)
    if p == 2:
        mass, first, second = np.diff(at_ends)
        inside = second - 2 * q * first + q * q * mass
    else:
        left, right = at_q - at_ends[:, :-1], at_ends[:, 1:] - at_q
        inside = (q * left[0] - left[1]) + (right[1] - q * right[0])
    return inside.sum() + top(p, I, nodes) / 2 * ((1 - q[-1]) ** p + (1 + q[0]) ** p)


# %% [markdown]
# The usage of a value is its cell's mass under $g_0$. The outermost cells also get the
# atoms.


# %%
def shares(q, I):
    P = np.diff(moments(ends(q), 0, I)[0])
    P[[0, -1]] += top(0, I) / 2
    return P


# %% [markdown]
# In blocks of 64 NF4 has a mean squared error of 0.0084601 σ² and a mean absolute error of
# 0.0727955 σ. The library, whose nodes lie elsewhere, gives the same to 1e-12. So do twice
# as many nodes. The rarest value of NF4 is used by 1.73 % of the weights, and the
# commonest by 9.24 %. The entropy of the usage is 3.8847 bits, not 4.

# %% tags=["hide-input"]
# Checks: errors, usage and entropy against the library's
for p, I in ((2, 64), (1, 64), (2, 8), (1, 8), (2, 4096), (1, 4096)):
    value = error(NF4, p, I)
    print(f"E|W − Ŵ|^{p} at I = {I:4}: {value:.10f}")
    assert abs(value - expected_error(NF4, I, p)) < 1e-12 and abs(value - error(NF4, p, I, nodes=960)) < 1e-12
assert f"{error(NF4, 2, 64):.7f} {error(NF4, 1, 64):.7f}" == "0.0084601 0.0727955"

P = shares(NF4, 64)
H = -(P @ np.log2(P))
print("usage in per cent:", *np.round(100 * P, 1), f"  H = {H:.4f} bits")
assert np.abs(P - usage(NF4, 64)).max() < 1e-12 and abs(H - entropy(NF4, 64)) < 1e-12
assert (round(P.min(), 4), round(P.max(), 4), round(H, 4)) == (0.0173, 0.0924, 3.8847)

# %% [markdown]
# ## 3 · Is it true? Draw weights
#
# Almost seventeen million seeded normal weights go through `quantize`, the function that
# codes a model. One block is one observation, so the standard error is that of the mean
# over 262,144 blocks. The mean must lie within four standard errors of the quadrature.
# Both errors come from the same weights, so their two deviations are not independent.

# %% tags=["hide-input"]
# Measures: the errors of 262,144 drawn blocks, against the quadrature
rng, costs = np.random.default_rng(0), []
for _ in range(8):
    w = rng.standard_normal((1 << 15, 64), dtype=np.float32)
    off = np.abs(quantize(w, "nf4", blocksize=64).dequantize() - w)
    costs.append([off.mean(axis=1, dtype=float), np.square(off).mean(axis=1, dtype=float)])
for p, cost in zip((1, 2), np.concatenate(costs, axis=1), strict=True):
    mean, deviation, exact = cost.mean(), cost.std() / np.sqrt(len(cost)), error(NF4, p, 64)
    z = (mean - exact) / deviation
    print(f"p = {p}: drawn {mean:.7f} ± {deviation:.7f}, computed {exact:.7f}: {z:+.2f} standard errors")
    assert abs(z) < 4

# %% [markdown]
# ## 4 · The best code, from random starts
#
# Move one value $q_\ell$ of a code. The two ends of its cell, $\xi_\ell$ and
# $\xi_{\ell+1}$, move too. An end lies half-way between two values, so both are equally
# far from it. Its move changes nothing to first order. The derivative of the error
# therefore vanishes where (BOF4 eq. 5 and 7)
#
# $$p = 2:\quad q_\ell = \int x\,g_2 \Big/ \int g_2, \qquad\qquad
#   p = 1:\quad \int_{\xi_\ell}^{q_\ell} g_1 = \tfrac12\int_{\xi_\ell}^{\xi_{\ell+1}} g_1 .$$
#
# For $p = 2$ the value is the centroid of its cell. For $p = 1$ it is the weighted median
# of its cell.
#
# **Lloyd's iteration** repeats two steps. It draws the ends half-way between the values,
# and then moves every value to the centroid or the median of its cell. The values −1, 0
# and 1 stay, as in NF4. They are *pinned*.
#
# The centroid is a quotient of two moments. The median has no such formula, so one Newton
# step goes towards it. The step subtracts from $q_\ell$ the excess of
# $\int_{\xi_\ell}^{q_\ell} g_1$ over half the cell's mass, divided by its derivative
# $g_1(q_\ell)$. If no value moves any more, every free value is at its median.


# %%
def g(x, k, I):
    m, others, _ = law(I)
    return (others * m ** (k + 1)) @ phi(np.multiply.outer(m, x))


def targets(q, p, I):
    """The centroid of each value's cell, or one Newton step towards its median."""
    xi = ends(q)
    mass, first, _ = np.diff(moments(xi, p, I))
    if p == 2:
        return first / mass
    below = moments(q, 1, I)[0] - moments(xi[:-1], 1, I)[0]
    return np.clip(q + (mass / 2 - below) / g(q, 1, I), xi[:-1], xi[1:])


# %% [markdown]
# `lloyd` repeats this, with the pinned values held, until no value moves by more than
# `until`.


# %%
def lloyd(q, p, I, until=1e-12):
    pinned, step = np.isin(q, (-1, 0, 1)), 1
    while step > until:
        moved = np.where(pinned, q, targets(q, p, I))
        q, step = moved, np.abs(moved - q).max()
    return q


# %% [markdown]
# Draw six values below zero and seven above it, uniformly. For each error, five such
# starts end at the same code, which is the library's to 1e-8. (The library finds it with
# Newton's method.) This is to be expected: $\log g_1$ and $\log g_2$ are concave on [−1,
# 1]. For log-concave densities Fleischer (1964, $p = 2$) and Trushkin (1982) proved that
# only one code of a given size obeys the condition above. Their theorems have no pinned
# values, so here the random starts are the evidence.

# %% tags=["hide-input"]
# Checks: five random starts for each error, and the library's code
rng, best = np.random.default_rng(0), {}
for p in (1, 2):
    assert (np.diff(np.log(g(np.linspace(-1, 1, 2001), p, 64)), 2) < 0).all()
    found = []
    for _ in range(5):
        start = np.sort(np.concatenate([[-1, 0, 1], -rng.uniform(0, 1, 6), rng.uniform(0, 1, 7)]))
        found.append(lloyd(start, p, 64))
    best[p] = found[0]
    assert np.ptp(found, axis=0).max() < 1e-8 and np.abs(best[p] - optimal_code(64, p)).max() < 1e-8
    more, away = error(NF4, p, 64) / error(best[p], p, 64) - 1, np.abs(NF4 - best[p]).max()
    print(f"p = {p}: 5 starts, largest distance between the codes they reach {np.ptp(found, axis=0).max():.0e}")
    print(f"       least error {error(best[p], p, 64):.7f}, NF4 costs {more:.4%} more, values up to {away:.4f} away")
    assert (round(100 * more, 4), round(away, 4)) == ((0.0250, 0.0069) if p == 1 else (5.8628, 0.0574))

# %% [markdown]
# How many values should lie below zero? NF4 has six between −1 and 0, and seven between 0
# and 1. Lloyd's iteration keeps the split it starts with, so each split from 4 to 9 is
# tried. Six is best. Seven, its mirror image, costs the same. Five costs 3.7 % more in
# absolute error, and 11.4 % more in squared error.

# %% tags=["hide-input"]
# Measures: the least error for each split from 4 to 9 values below zero
for p in (1, 2):
    cost = {}
    for below in range(4, 10):
        start = np.concatenate([np.linspace(-1, 0, below + 2), np.linspace(0, 1, 15 - below)[1:]])
        cost[below] = error(lloyd(start, p, 64, until=1e-7), p, 64)
    print(f"p = {p}:", *(f"  {below} below: {c:.6f}" for below, c in cost.items()))
    assert sorted(cost, key=cost.get)[:2] in ([6, 7], [7, 6]) and abs(cost[6] - cost[7]) < 1e-12
    assert round(100 * (cost[5] / cost[6] - 1), 1) == {1: 3.7, 2: 11.4}[p]

# %% [markdown]
# So NF4 has the right split. At its own block size its mean absolute error is 0.0250 %
# above the least possible. Its mean squared error is 5.86 % above the least possible. The
# next section explains why the two differ so much.
#
# ## 5 · What theory predicts
#
# Let a code have many values: $n\lambda(x)$ of them per unit length, with
# $\int\lambda = 1$. Its cells are then $1/(n\lambda)$ wide. An error within a cell is
# proportional to the cell's width. So for weights of density $f$
#
# $$\mathrm E\,|\text{error}|^p \;\propto\; n^{-p}\int f\,\lambda^{-p}\,dx .$$
#
# Which function $\lambda$ makes this least? Add $\mu\int\lambda$, with a multiplier $\mu$
# for the constraint, and set the derivative with respect to $\lambda(x)$ to 0 at every
# $x$. This gives (Panter and Dite 1951 for $p = 2$)
#
# $$f\,\lambda^{-p-1} = \text{const}, \qquad\text{so}\qquad \lambda \propto f^{1/(1+p)} .$$
#
# As $p \to 0$ this becomes $\lambda \propto f$: equal usage, which is the largest entropy.
# For a normal law $f^{1/(1+p)} \propto e^{-x^2/(2(1+p))}$. That is a normal law again,
# $\sqrt{1+p}$ times as wide. In a block with maximum $m$ the scaled weight is $x = w/m$,
# and
#
# $$\lambda(x) \propto \exp\Big(-\frac{m^2x^2}{2(1+p)}\Big) \quad\text{on } [-1, 1].$$
#
# This is a normal law, cut at $m/\sqrt{1+p}$ of its standard deviations on either side.
#
# NF4 also follows a cut normal law. Its outermost probability, the *offset* 0.9677083,
# puts the cut at $s_0 = \Phi^{-1}(0.9677083) = 1.8481$ standard deviations. On either
# side of 0 the same probability lies between any two neighbours:

# %%
s0 = Phi_inverse(codebooks.NF4_OFFSET)
between = np.diff(Phi(s0 * NF4))
print(f"s0 = {s0:.4f}; probability between neighbours: {between[0]:.6f} (below 0), {between[-1]:.6f} (above 0)")
expected = np.repeat([(codebooks.NF4_OFFSET - 0.5) / 7, (codebooks.NF4_OFFSET - 0.5) / 8], [7, 8])
assert round(s0, 4) == 1.8481 and np.abs(between - expected).max() < 1e-7

# %% [markdown]
# So NF4 fits the error of power $p$ in blocks where $m = s_0\sqrt{1+p}$. But $M$ varies
# from block to block. At 64 its standard deviation is 16 % of its mean. Put the mean of
# $M$ in the place of $m$:
#
# $$\boxed{\;\mathrm E[M] = s_0\,\sqrt{1+p}\;}$$
#
# $\mathrm E[M]$ grows with the block size. The prediction is the last $I$ with
# $\mathrm E[M] \le s_0\sqrt{1+p}$. It is 9 for equal usage, 67 for the absolute error and
# 434 for the squared error.
#
# The rule can be read in two other ways. Blocks of 64 have $\mathrm E[M] = 2.596$, so
# there NF4 suits $p = 0.973$. And for $p = 1$ such blocks ask for the offset
# $\Phi(2.596/\sqrt2) = 0.96680$, while NF4's is 0.96771.

# %% tags=["hide-input"]
# Measures: the three predicted block sizes, and what blocks of 64 ask for
for p, predicted in ((0, 9), (1, 67), (2, 434)):
    fits = max(I for I in range(2, 600) if I * top(1, I) <= s0 * (1 + p) ** 0.5)
    print(f"p = {p}: E[M] should be {s0 * (1 + p) ** 0.5:.3f}; the last block size with no larger E[M] is {fits}")
    assert fits == predicted
mean = 64 * top(1, 64)
suits, offset = (mean / s0) ** 2 - 1, Phi(mean / 2**0.5)
print(f"blocks of 64: E[M] = {mean:.3f}, so NF4 suits p = {suits:.3f}; p = 1 asks for an offset of {offset:.5f}")
assert (round(mean, 3), round(suits, 3), round(offset, 5)) == (2.596, 0.973, 0.96680)
assert round((64 * top(2, 64) - mean**2) ** 0.5 / mean, 2) == 0.16

# %% [markdown]
# ## 6 · What holds
#
# The prediction replaced 16 values by infinitely many, and the maximum by its mean. This
# section asks the same three questions without these replacements. For every block size
# it computes the entropy of NF4's indices, and NF4's *excess*: what NF4 costs above the
# best code with −1, 0 and 1. Section 4 found that code in two ways, so from here on the
# library's faster `optimal_code` finds it.


# %% tags=["hide-input"]
# Measures: the block size with the largest entropy, and those with the least excess
def excess(I, p):
    return expected_error(NF4, I, p) / expected_error(optimal_code(I, p), I, p) - 1


def lowest(f):
    coarse = min((round(I) for I in np.geomspace(8, 2048, 49)), key=f)
    return min(range(int(coarse / 1.13), int(coarse * 1.13) + 1), key=f)


at_best = {1: lowest(lambda I: excess(I, 1)), 2: lowest(lambda I: excess(I, 2))}
at_best[0] = max(range(2, 2049), key=lambda I: entropy(NF4, I))
print(f"entropy: largest at I = {at_best[0]}, {entropy(NF4, at_best[0]):.4f} bits")
for p, name in ((1, "absolute error"), (2, "squared error")):
    print(f"{name}: excess least at I = {at_best[p]}, {excess(at_best[p], p):.4%}; at 64 {excess(64, p):.4%}")
assert at_best == {0: 12, 1: 69, 2: 453} and f"{entropy(NF4, 12):.4f}" == "3.9964"
assert [f"{excess(at_best[p], p):.4%}" for p in (1, 2)] == ["0.0194%", "0.0299%"]
assert [f"{excess(64, p):.3%}" for p in (1, 2)] == ["0.025%", "5.863%"]

# %% tags=["hide-input"]
# Draws: NF4's excess and its missing entropy, against the block size
nf4_optimal_for()

# %% [markdown]
# | what NF4 is to be best for | block size, predicted | block size, computed | NF4 at the computed size | NF4 in blocks of 64 |
# |---|---|---|---|---|
# | equal usage (entropy) | 9 | 12 | 3.9964 bits | 3.8847 bits |
# | mean absolute error | 67 | 69 | 0.0194 % above the best | 0.0250 % |
# | mean squared error | 434 | 453 | 0.0299 % above the best | 5.86 % |
#
# The minimum for the absolute error is broad: in blocks of 52 to 93 NF4 is within 0.1 %
# of the best. That 64 lies in this range may be an accident, since QLoRA argues for NF4
# with usage and not with absolute errors.
#
# For equal usage the rule does not carry over to other offsets. For offsets from 0.93 to
# 0.985 it says blocks of 4 to 20, and the computed ones are 10 to 16. For the two errors
# it does: it misses the mean maximum by at most 3.1 % ([the article](../docs/nf4.md)).
#
# Is the best code with −1, 0 and 1 a fair yardstick? At 64, NF4 costs 0.64 % more in
# absolute error than the best code without any pins, and 11.0 % more in squared error.
# Other codes give a sense of scale. In absolute error bitsandbytes' FP4 is 32.7 % above
# the best pinned code, and Int4 is 25.4 % above it. (Both have 15 different values, not
# 16.)

# %% tags=["hide-input"]
# Measures: the broad minimum, the best code without pins, FP4 and Int4
assert [I for I in range(40, 110) if excess(I, 1) < 0.001] == list(range(52, 94))
free = [expected_error(NF4, 64, p) / expected_error(optimal_code(64, p, pins=None), 64, p) - 1 for p in (1, 2)]
others = [expected_error(codebooks.get(c)[1], 64, 1) / error(best[1], 1, 64) - 1 for c in ("fp4", "int4")]
print(f"NF4 above the best code without pins: {free[0]:.2%} (p = 1), {free[1]:.1%} (p = 2)")
print(f"absolute error above the best pinned code: FP4 {others[0]:.1%}, Int4 {others[1]:.1%}")
assert [f"{x:.2%}" for x in free] == ["0.64%", "11.00%"] and [f"{x:.1%}" for x in others] == ["32.7%", "25.4%"]

# %% [markdown]
# ## 7 · Equal usage costs twice the squared error
#
# Suppose that equal usage is the aim. At $I = 64$, cut $[-1, 1]$ at the quantiles
# $F_X^{-1}(i/16)$ of the scaled weight, so that each of 16 cells holds exactly 1/16 of the
# weights. Give each cell the value that is best for the squared error: its centroid under
# $g_2$, with the atoms.

# %%
x = np.linspace(-1, 1, 4001)
F = top(0, 64) / 2 + moments(x, 0, 64)[0] - moments(-1, 0, 64)[0]  # P(X ≤ x) for x < 1
cuts = np.concatenate([[-1], np.interp(np.arange(1, 16) / 16, F, x), [1]])
mass, first, second = np.diff(moments(cuts, 2, 64))
atom = top(2, 64) / 2
mass[[0, -1]] += atom
first[[0, -1]] += [-atom, atom]
second[[0, -1]] += atom
cost = second - first**2 / mass  # the least ∫ (x − value)² g₂ of each cell

# %% [markdown]
# Every index now carries 4 bits. The squared error is 0.01713, which is 2.02 times NF4's.
# No code whose cells are intervals and equally used can do better, since equal usage
# leaves no choice of cells. (Exercise 5 finds a code of equal usage for the undivided
# normal law.)

# %% tags=["hide-input"]
# Checks: the error, and how much of it is made in the two outer cells
times, outer = cost.sum() / error(NF4, 2, 64), cost[[0, -1]].sum() / cost.sum()
print(f"outermost cut {cuts[-2]:.3f}, value {(first / mass)[-1]:.3f}; squared error {cost.sum():.5f}")
print(f"that is {times:.2f} times NF4's; {outer:.0%} of it in the two outer cells")
assert (round(cost.sum(), 5), round(times, 2), round(outer, 2), round(cuts[-2], 3)) == (0.01713, 2.02, 0.75, 0.610)

# %% [markdown]
# The outermost cell runs from 0.610 to 1 and holds the largest 1/16 of the weights. The
# two outer cells together cause 75 % of the squared error. Equal usage maximizes the
# information *about the index*, but a layer computes with the weight. Hence the title of
# Yoshida's note: NF4 isn't information-theoretically optimal, and that's good.
#
# ## 8 · Moving the offset
#
# The rule of section 5 can be turned round. Keep NF4's recipe, and choose the offset for
# the block size: $o = \Phi\big(\mathrm E[M]/\sqrt{1+p}\big)$.


# %%
def moved(I, p):
    return codebooks.normal_float(4, NormalDist().cdf(I * top(1, I) / (1 + p) ** 0.5))


assert (moved(64, 2) == codebooks.closed_form(64, "mse")).all()  # the library's

# %% [markdown]
# This is a closed form. Compare it with BOF4 (MSE), the best pinned code for the squared
# error ([17](17_af4_and_bof4.ipynb)), which is found by iteration. At 64 the offset is
# 0.93305, and the squared error is 0.007998; BOF4's is 0.007992. At the nine block sizes
# from 16 to 4096 the moved code costs at most 0.32 % more than BOF4. NF4 with its fixed
# offset costs up to 17.5 % more (at 16).

# %% tags=["hide-input"]
# Measures: the squared error of NF4, of the moved code and of BOF4, at nine block sizes
worst, fixed = 0, {}
for I in (16, 32, 64, 128, 256, 512, 1024, 2048, 4096):
    offset, bof4 = Phi(I * top(1, I) / 3**0.5), codebooks.bof4(I, "mse")
    assert (moved(I, 2) == codebooks.closed_form(I, "mse")).all()
    costs = [expected_error(q, I, 2) for q in (NF4, moved(I, 2), bof4)]
    worst, fixed[I] = max(worst, costs[1] / costs[2] - 1), costs[0] / costs[2] - 1
    print(f"I = {I:4}   o = {offset:.5f}   NF4 {costs[0]:.6f}   moved {costs[1]:.6f}   BOF4 {costs[2]:.6f}")
    assert I != 64 or (f"{offset:.5f}", f"{costs[1]:.6f}", f"{costs[2]:.6f}") == ("0.93305", "0.007998", "0.007992")
assert f"{worst:.2%}" == "0.32%" and f"{max(fixed.values()):.1%}" == f"{fixed[16]:.1%}" == "17.5%"

# %% [markdown]
# **Other widths.** The paper speaks of NF$k$ for any $k$, but it lists only NF4.
# bitsandbytes, too, has only NF4. `codebooks.normal_float(bits)` applies NF4's rule to
# $k$ bits: $2^{k-1}$ values above zero and $2^{k-1} - 1$ below. The tail, the probability
# beyond the offset, is the mean of half of $1/2^k$ and half of $1/(2^k - 1)$:
#
# $$o_k = 1 - \tfrac12\Big(\frac1{2\cdot 2^k} + \frac1{2(2^k-1)}\Big).$$
#
# This generalization is tinylora's. (PEFT's LoftQ code builds the other widths with
# 0.9677083 for all of them.) For $k = 4$ the function takes the published seven digits.

# %% tags=["hide-input"]
# Checks: the counts and the offset for 2, 3, 4 and 8 bits
for k in (2, 3, 4, 8):
    code, o = codebooks.normal_float(k), 1 - (1 / 2 ** (k + 1) + 1 / (2 ** (k + 1) - 2)) / 2
    below, zero, above = (code < 0).sum(), (code == 0).sum(), (code > 0).sum()
    print(f"k = {k}: o = {o:.7f}, {below} + {zero} + {above} values,", end=" ")
    print(f"beside 0: {code[below + 1]:.4f}, beside 1: {code[-2]:.4f}")
    assert (below, zero, above) == (2 ** (k - 1) - 1, 1, 2 ** (k - 1)) and code[0] == -1 and code[-1] == 1
    assert k == 4 or (code == codebooks.normal_float(k, o)).all()
assert (codebooks.normal_float(4) == codebooks.nf4()).all()

# %% [markdown]
# ## 9 · Limits
#
# So far the weights of a block were independent, normal and of one scale. Let them follow
# Student's $t$ with 5 degrees of freedom and variance 1 instead. The ranking of the codes
# changes. In squared error at 64, NF4 costs 0.01097. BOF4, which was solved for normal
# weights, costs 0.01183. BOF4-S, which divides by the signed maximum, costs 0.01089. In
# absolute error NF4 is 6.6 % above the best code for *these* weights, not 0.025 %.

# %% tags=["hide-input"]
# Measures: three codes under Student's t with 5 degrees of freedom
t5 = distributions.StudentT(5)
for name, q, signed in (
    ("NF4", NF4, False),
    ("BOF4", codebooks.bof4(64, "mse"), False),
    ("BOF4-S", codebooks.bof4(64, "mse", signed=True), True),
):
    normal, heavy = (expected_error(q, 64, 2, signed, law=f) for f in (distributions.Normal(), t5))
    print(f"{name:6}   normal {normal:.6f}   t5 {heavy:.5f}")
    assert f"{heavy:.5f}" == {"NF4": "0.01097", "BOF4": "0.01183", "BOF4-S": "0.01089"}[name]
t5_excess = expected_error(NF4, 64, 1, law=t5) / expected_error(optimal_code(64, 1, law=t5), 64, 1, law=t5) - 1
print(f"absolute error under t5: NF4 is {t5_excess:.1%} above the best pinned code for that law")
assert f"{t5_excess:.1%}" == "6.6%"

# %% [markdown]
# A smaller expected error does not mean a smaller perplexity either. In BOF4's table 5 a
# code without pins has a smaller squared error than one with −1, 0 and 1. Yet its
# published perplexity is larger: 8.81 against 8.51. Only experiments show what an error
# costs a model.
#
# ## Where paper and code differ
#
# - **"Information-theoretically optimal for normally distributed weights" (QLoRA §3).** If
#   that means equal usage, it holds in blocks of 12, to 0.0036 bits (3.9964 of 4). It does
#   not hold in blocks of 64: 3.8847 bits (section 2).
# - **"Equal expected number of values in each quantization bin" (QLoRA §3)** does not
#   hold. At 64 the shares run from 1.73 % to 9.24 % (section 2). For an unscaled normal
#   weight, cut where NF4 cuts it, they run from 5.57 % to 7.10 %, and the entropy is
#   3.9962 bits. The reason is that the *values* are quantiles, while the bins end half-way
#   between values, and the two sides have 8 and 7 of them.
# - **Dividing by absmax "is equivalent to rescaling the standard deviation" (QLoRA §3,
#   step 3).** The maximum is a random number. Its mean is 2.596 σ at 64 and 3.802 σ at
#   4096, while the code assumes 1.848 σ (section 5).
# - **Equal usage** is not a good aim either. It costs 2.02 times NF4's squared error
#   (section 7).
# - **What holds** of "optimal" is the absolute error. At 64, NF4 is within 0.0250 % of the
#   best code with −1, 0 and 1 (section 4).

# %% tags=["hide-input"]
# Checks: the usage of an unscaled normal weight, and the two mean maxima
unscaled = np.diff(Phi(np.concatenate([[-np.inf], s0 * (NF4[1:] + NF4[:-1]) / 2, [np.inf]])))
print(f"unscaled: {unscaled.min():.4f} to {unscaled.max():.4f}, H = {-(unscaled @ np.log2(unscaled)):.4f} bits")
assert (round(unscaled.min(), 4), round(unscaled.max(), 4)) == (0.0557, 0.0710)
assert round(-(unscaled @ np.log2(unscaled)), 4) == 3.9962 and round(4 - entropy(NF4, 12), 4) == 0.0036
assert round(64 * top(1, 64), 3) == 2.596 and round(4096 * top(1, 4096), 3) == 3.802

# %% [markdown]
# ## Exercises
#
# Grading runs only the setup cell and the exercise cells: put helpers inside the
# exercise's cell.
#
# ### 16-1 Uniform weights
#
# Derive section 1 anew. The `blocksize` weights $W$ of a block are independent and uniform
# on [−1, 1]; $M$ is their largest magnitude, and $X = W/M$.
#
# - **Given:** `x`, an array of numbers with |x| < 1; `blocksize`, 2 or more; `k`, a
#   number, 0 or more.
# - **Return** a pair: $g_k$ at `x`, an array of the same shape, and the weight of the atom
#   at +1 alone, a float.
# - **Checked:** both to a relative 1e-4, for random arguments.
# - **Hint:** both are closed forms; no quadrature is needed. Is $X$ independent of $M$?
#   Then think: which code is best for such weights, and does it depend on $p$?


# %% tags=["exercise"]
def exercise_1(x, blocksize, k):
    """Return g_k(x) and the atom at +1 for uniform weights."""
    # BEGIN SOLUTION
    # which code is best: X is uniform for every k, so evenly spaced values (from −1 to 1, if these are pinned) are best for every p
    mean = blocksize / (blocksize + k)  # E[Mᵏ], since M has the density I mᴵ⁻¹ on [0, 1]
    inner = (blocksize - 1) / blocksize * mean / 2  # X is uniform on [−1, 1], and independent of M
    return np.full(np.shape(x), inner), mean / (2 * blocksize)
    # END SOLUTION


# %%
_ = grade("16-1", exercise_1)

# %% [markdown]
# ### 16-2 Another offset
#
# Let a NormalFloat code have another offset than NF4. At which block size does section 5
# expect it to be nearly the best code for the error of power $p$?
#
# - **Given:** `offset`, the outermost probability of `normal_float(4, offset)`, between
#   0.75 and 0.97; `p`, any number, 0 or more. `expected_max(I)` is $\mathrm E[M]$.
# - **Return** an int: the last block size $I \ge 2$ whose $\mathrm E[M]$ is not above what
#   the code fits.
# - **Checked:** NF4's offset with p = 0, 1 and 2 (9, 67 and 434), and random cases with
#   answers below 1,000.
# - **Hint:** where is this code cut, in standard deviations? $\mathrm E[M]$ grows with
#   $I$, so a bisection is fast.


# %% tags=["exercise"]
def exercise_2(offset, p):
    """Return the block size that normal_float(4, offset) fits for E|W − Ŵ|ᵖ."""
    # BEGIN SOLUTION
    edge = NormalDist().inv_cdf(offset) * (1 + p) ** 0.5
    I, above = 2, 1024
    while above - I > 1:
        half = (I + above) // 2
        I, above = (half, above) if expected_max(half) <= edge else (I, half)
    return I
    # END SOLUTION


# %%
_ = grade("16-2", exercise_2)

# %% [markdown]
# ### 16-3 Laplace weights
#
# Work out section 5 for weights with the density $f(w) = e^{-\sqrt2\,|w|}/\sqrt2$
# (variance 1). Take the block's maximum as a fixed number, `edge`, so that
# $x = w/\text{edge}$ lies in [−1, 1].
#
# - **Given:** `edge`, a positive number; `p`, any number, 0 or more; `n`, an int.
# - **Return** the n + 1 ascending values $0 = q_0 < … < q_n = 1$ that cut the best point
#   density $\lambda$ on [0, 1] into n equal parts, as a float array.
# - **Checked:** to 1e-6.
# - **Hint:** is $\lambda$ again $\sqrt{1+p}$ times as wide as $f$?


# %% tags=["exercise"]
def exercise_3(edge, p, n):
    """Return the n + 1 values that cut λ on [0, 1] into n equal parts, for Laplace weights."""
    # BEGIN SOLUTION
    rate = np.sqrt(2) * edge / (1 + p)  # f^(1/(1+p)) is again a Laplace law, 1 + p times as wide
    share = np.arange(n + 1) / n
    return -np.log1p(share * np.expm1(-rate)) / rate
    # END SOLUTION


# %%
_ = grade("16-3", exercise_3)

# %% [markdown]
# ### 16-4 One step of Lloyd's iteration, on data
#
# Do one Lloyd step for the mean squared error of $W$, with a sum over given weights in
# the place of the integral (BOF4 eq. 5).
#
# - **Given:** `q` (n,) float64, an ascending code, not necessarily with −1, 0 or 1; `w`
#   (blocks, I) float64, one block a row, none of them all zeros. The blocks' scales may
#   differ a hundredfold.
# - **Return** the (n,) code that makes Σ (w − ŵ)² least, while each weight stays assigned
#   to the value of `q` that is nearest to it after division by its block's absmax. Nothing
#   is pinned, and a block's maximum is a weight like any other. A value that no weight is
#   assigned to stays where it is.
# - **Checked:** no value can lower the sum by a move of more than 1e-9; `q` is not
#   changed.
# - **Hint:** the mean of the scaled weights minimizes the error of $X$. What does the
#   error of $W$ add?


# %% tags=["exercise"]
def exercise_4(q, w):
    """Return the code after one Lloyd step on the blocks w, for the mean squared error of W."""
    # BEGIN SOLUTION
    m = np.abs(w).max(axis=1, keepdims=True)
    cell = np.abs((w / m)[..., None] - q).argmin(axis=-1)
    new = np.array(q)
    for i in np.unique(cell):
        here = cell == i
        new[i] = (m * w)[here].sum() / np.broadcast_to(m * m, w.shape)[here].sum()  # Σ m² x / Σ m²
    return new
    # END SOLUTION


# %%
_ = grade("16-4", exercise_4)

# %% [markdown]
# ### 16-5 A code whose values are used equally often
#
# Even the undivided $N(0,1)$ does not use NF4's values equally often
# ([05](05_building_nf4.ipynb), section 6). Is there a code whose values it does use
# equally often? The quantiles in the middle of equal bins are a tempting answer. It is
# wrong, since a weight goes to the *nearest* value.
#
# - **Given:** `n`, an even number, 2 to 64. `Phi_inverse(p)` is at hand for 0 < p < 1.
# - **Return** n values such that $W \sim N(0,1)$, coded by the nearest one, uses each with
#   probability exactly 1/n. Nothing is divided by anything.
# - **Checked:** n floats, ascending, and every share to 1e-9. They need not be symmetric.
# - **Hint:** where must the ends of the bins lie? What follows for each value from the one
#   before it? Start in the middle; there is more than one answer.


# %% tags=["exercise"]
def exercise_5(n):
    """Return n values that N(0, 1) uses equally often."""
    # BEGIN SOLUTION
    bounds = [Phi_inverse(j / n) for j in range(n // 2, n)]  # from 0 upwards
    upper = [bounds[1] / 2 if n > 2 else 1.0]  # anything between 0 and the first bound
    for bound in bounds[1:]:
        upper.append(2 * bound - upper[-1])  # the bound is half-way between two values
    return np.array([-v for v in reversed(upper)] + upper)
    # END SOLUTION


# %%
_ = grade("16-5", exercise_5)

# %% [markdown]
# ## Summary
#
# - One quadrature gives the expected error of every code to 1e-12, since the integral over
#   a cell has a closed form (`expected_error` in `tinylora/numerics/optimality.py`). In
#   blocks of 64 NF4 has a squared error of 0.0084601 σ² and an absolute error of
#   0.0727955 σ.
# - NF4 is nearly optimal three times: for equal usage in blocks of 12, for the absolute
#   error at 69 (0.0194 % above the best; 0.0250 % at 64), and for the squared error at 453
#   (0.0299 %; 5.86 % at 64). The rule $\mathrm E[M] = s_0\sqrt{1+p}$ predicts 9, 67 and
#   434.
# - Equal usage of the values would double the squared error. `codebooks.closed_form` moves
#   the offset to the block size, and is within 0.32 % of BOF4 from 16 to 4096.
# - All of this is for normal weights. `tests/test_optimality.py` asserts these numbers
#   too, and compares them with mpmath at 30 digits.
