# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 12 · Is ΔW really low rank? (appendix)
#
# [← 11 Counting LoRA](11_counting_lora.ipynb) · [All notebooks](README.md) · [13 Subspaces and amplification →](13_subspaces_and_amplification.ipynb)
#
# **Question.** LoRA's tables hardly change with the rank r; does that show that the
# update ΔW has a low rank?
#
# **You will be able to**
#
# - derive what an update of rank r must lose, and predict the loss of a rank-r fit
# - say what a flat table over r shows, and what it does not show
# - tell a low rank from a low intrinsic dimension
#
# **Needs:** the singular value decomposition, projections, least squares; LoRA's layer
# ([03](03_the_bypass.ipynb)) helps.
#
# **Hours:** 4 (2 to read and run, 2 for the exercises).
#
# **Papers:** LoRA (arXiv 2106.09685) §4.1 and §7.2, Tables 5, 6, 16 and 18; Li et al.
# (arXiv 1804.08838) §2 and Aghajanyan et al. (arXiv 2012.13255) for intrinsic dimension.
#
# Folded cells measure, check or draw. Click ••• to open one.

# %% tags=["setup"]
import numpy as np
from grading import grade

from tinylora.optim import AdamW
from tinylora.papers import claims, intrinsic, subspaces
from tinylora.papers.claims import planted
from tinylora.papers.claims.toys import Planted, fit, linear, orthonormal, weight

rng = np.random.default_rng(0)

# %% [markdown]
# ## 1 · What an update of rank r must lose
#
# Let $M = \sum_i s_i u_i v_i^\top$ be the update that we want, with the singular values
# $s_1 \ge s_2 \ge \dots$. Let $X$ be an update of rank $r$. Its columns lie in a space of
# $r$ dimensions, and $\Pi$ is the orthogonal projection onto that space. The best $X$
# with columns in the space is $\Pi M$, and it misses
#
# $$\|M - \Pi M\|_F^2 = \|M\|_F^2 - \|\Pi M\|_F^2 = \sum_i s_i^2\,(1 - c_i),
# \qquad c_i = \|\Pi u_i\|^2 .$$
#
# The cell compares both sides for a random space.

# %%
M, r = rng.standard_normal((30, 20)), 5
U, s, Vt = np.linalg.svd(M, full_matrices=False)
Q = orthonormal(rng, 30, r)  # its columns span a random space, Π = Q Qᵀ
c = ((Q.T @ U) ** 2).sum(axis=0)
in_space = ((M - Q @ Q.T @ M) ** 2).sum()
assert np.isclose(in_space, (s**2 * (1 - c)).sum())
assert c.max() < 1 and c.sum() <= r

# %% [markdown]
# Each $c_i$ lies between 0 and 1. Their sum is at most $\operatorname{tr} \Pi = r$,
# because the $u_i$ are orthonormal. The error is linear in the $c_i$, so it is least when
# the whole budget $r$ goes to the largest $s_i$: $c_1 = \dots = c_r = 1$, the others 0.
# This is the theorem of Eckart and Young (1936):
#
# $$\min_{\operatorname{rank} X \le r} \|M - X\|_F^2 = \sum_{i > r} s_i^2,
# \qquad\text{reached by}\quad X = \sum_{i \le r} s_i u_i v_i^\top .$$
#
# The sum $\sum_{i > r} s_i^2$ is called the *tail*. Training computes no singular
# values. The cell below fits $BA$ to $M$ as training might: it solves least squares for
# $B$ with $A$ fixed, then for $A$ with $B$ fixed, and repeats both.

# %%
tail, best = (s[r:] ** 2).sum(), ((M - U[:, :r] * s[:r] @ Vt[:r]) ** 2).sum()
A = rng.standard_normal((r, 20))
for _ in range(1000):
    B = np.linalg.lstsq(A.T, M.T, rcond=None)[0].T
    A = np.linalg.lstsq(B, M, rcond=None)[0]
fitted = ((M - B @ A) ** 2).sum()
print(f"tail {tail:.6f}; truncated {best:.6f}; fitted {fitted:.6f}; random space {in_space:.1f}")
assert np.isclose(best, tail) and np.isclose(best, subspaces.best_rank_error(M, r))
assert abs(fitted / best - 1) < 1e-6

# %% [markdown]
# ## 2 · A planted update of rank 2 gives a flat table
#
# We plant an update whose rank is known. The task is
# $y = (W_0 + \Delta W)\,x + \sigma\varepsilon$ with $x \sim N(0, I)$ and
# $\varepsilon \sim N(0, I)$, $d = 96$ inputs and outputs, noise $\sigma = 0.05$, and a
# $\Delta W$ with the singular values 3 and 2.

# %%
d, σ, n = 96, 0.05, 4096
draw = np.random.default_rng([0, d, n])
w0 = draw.standard_normal((d, d)) / np.sqrt(d)
ΔW = orthonormal(draw, d, 2) * (3, 2) @ orthonormal(draw, d, 2).T
x = draw.standard_normal((n, d)).astype(np.float32)
y = (x @ (w0 + ΔW).T + σ * draw.standard_normal((n, d))).astype(np.float32)
task = Planted()  # the library's class draws the same numbers
assert np.array_equal(x, task.x) and np.array_equal(y, task.y)

# %% [markdown]
# The inputs $x$ are *white*: their covariance is $I$. So the error of any $W$ on unseen
# data follows without a sample. Averaged over the outputs it is
#
# $$\mathrm E\,\|Wx - y\|^2 / d = \|W - W_0 - \Delta W\|_F^2 / d + \sigma^2,
# \qquad\text{at least}\quad \frac1d\sum_{i > r}s_i^2 + \sigma^2
# \quad\text{for LoRA of rank } r .$$
#
# The least error is $2^2/96 + 0.05^2 = 0.0442$ for $r = 1$. For every $r \ge 2$ it is
# $\sigma^2 = 0.0025$. Estimating the update from $n$ examples costs a little more.
# Matrices of rank $r$ form a surface of $r(2d - r)$ dimensions. Each dimension adds
# about $\sigma^2/(nd)$ to the error, because $n d$ numbers are seen:
#
# $$\text{error} \approx \frac1d \sum_{i > r}s_i^2
# + \sigma^2\Big(1 + \frac{r(2d-r)}{n d}\Big) .$$


# %%
def predicted(s, r, noise, n, d=96):
    return (np.asarray(s)[r:] ** 2).sum() / d + noise**2 * (1 + r * (2 * d - r) / (n * d))


# %% [markdown]
# LoRA of rank $r$ is trained on the 4,096 examples: 200 steps of AdamW on batches of 256.
# `task.adapted(r)` is $W_0$ with a bypass of rank $r$ around it.


# %%
def train_lora(r, steps=200, batch=256):
    layer, epochs = task.adapted(r), np.random.default_rng([0, 7])
    optimizer = AdamW([w for _, w in layer.trainable()], lr=0.01)
    for step in range(steps):
        if step % (n // batch) == 0:
            order = epochs.permutation(n)
        rows, order = order[:batch], order[batch:]
        error = layer(x[rows]) - y[rows]
        (error * error).mean().backward()
        optimizer.step((1 + np.cos(np.pi * step / steps)) / 2)  # the rate falls to 0
        optimizer.zero_grad()
    return weight(layer)  # W₀ + (α/r) B A


for r in (1, 2, 8):
    W = train_lora(r)
    unseen = ((W - w0 - ΔW) ** 2).sum() / d + σ**2
    print(f"r = {r}: {unseen:.6f}, predicted {predicted((3, 2), r, σ, n):.6f}")

# %% tags=["hide-input"]
# Measures: the same errors with three seeds, at five ranks (claims.planted.rank_sweep)
low = claims.run("rank_sweep", seeds=(0, 1, 2))["rank_sweep"]
assert np.isclose(unseen, low[0]["mse"][3], rtol=1e-3)
mse = np.array([result["mse"] for result in low]).mean(axis=0)
for r, measured, tail in zip(low[0]["ranks"], mse, low[0]["tail"], strict=True):
    print(f"r = {r:2}: {measured:.6f}   least possible {tail:.6f}   predicted {predicted((3, 2), r, 0.05, 4096):.6f}")
assert np.isclose(low[0]["tail"][0], 4 / 96 + 0.0025) and np.allclose(low[0]["tail"][1:], 0.0025)
assert round(mse[0], 4) == 0.0442 and all(0.0025 < m < 0.00255 for m in mse[1:])
assert all(abs(m / predicted((3, 2), r, 0.05, 4096) - 1) < 0.01 for r, m in zip(low[0]["ranks"], mse, strict=True))
plateau = np.array([result["mse"][1:] for result in low])
print(f"largest / smallest from r = 2 on: {plateau.max() / plateau.min():.4f}")
assert 1.01 < plateau.max() / plateau.min() < 1.0125 and round(predicted((3, 2), 64, 0.05, 4096) / 0.0025, 2) == 1.02

# %% [markdown]
# The errors from $r = 2$ to $r = 64$ lie within 1.2 % of each other. Their slow rise is
# the price of estimating more numbers. The formula puts that price at 2 % for $r = 64$.
# The measured price is smaller, because 200 steps do not fit all the noise.
#
# The paper's Table 6 has such a plateau too. In our task its cause is known: the update
# has rank 2. A plateau that begins at rank $r$ allows one conclusion: *the wanted update
# has rank at most $r$, up to parts that are small against the noise, if the larger ranks
# were trained as well as the small ones.*
# ([Notebook 14](14_scaling_and_learning_rates.ipynb), section 3, is about that
# condition.) The plateau says nothing about other tasks.
#
# ## 3 · A target on which r = 8 must fail
#
# The counter-example is a $\Delta W$ with Gaussian entries and the same norm,
# $\|\Delta W\|_F^2 = 3^2 + 2^2 = 13$. Its rank is 96. The tail gives the least error of
# rank 8 before anything is trained.

# %%
delta = rng.standard_normal((96, 96))
delta *= np.sqrt(13) / np.linalg.norm(delta)
tail = subspaces.best_rank_error(delta, 8) / 96 + 0.05**2
print(f"a Gaussian ΔW, r = 8: at least {tail:.4f}, or {tail / 0.05**2:.0f} σ²")
assert round(tail, 3) == 0.101 and round(tail / 0.05**2) == 40

# %% tags=["hide-input"]
# Measures: LoRA on three Gaussian targets, at eight ranks, against the tail
full = claims.run("full_rank_target", seeds=(0, 1, 2))["full_rank_target"]
mse, tails = (np.array([result[key] for result in full]) for key in ("mse", "tail"))
for r, measured, least in zip(full[0]["ranks"], mse.mean(axis=0), tails.mean(axis=0), strict=True):
    print(f"r = {r:2}: {measured:.5f}   least possible {least:.5f}")
above = mse / tails - 1
print(f"above the bound: {above.min():.2%} to {above.max():.1%}")
print(f"r = 8, trained, leaves {mse[:, 3].mean() / 0.0025:.0f} σ²")
assert (np.diff(mse) < 0).all() and above.min() > 0 and 0.04 < above.max() < 0.05
assert round(mse[:, 3].mean(), 3) == 0.103 and round(mse[:, 3].mean() / 0.0025) == 41

# %% tags=["hide-input"]
# Draws: the error against the rank, for the planted rank 2 and for the Gaussian targets
planted.draw_rank_sweep(low, full)

# %% [markdown]
# The Gaussian targets show no plateau. Training at $r = 8$ ends at 0.103 on average,
# which is 41 $\sigma^2$. At every rank, training comes within 4.5 % of the bound. A
# better optimizer would therefore gain little at $r = 8$; a higher rank is needed. (The
# paper says in a footnote to §7.2 that a small $r$ need not work for every task.)
#
# ## 4 · "The rank of ΔW" is not one number
#
# An update found by full fine-tuning has full rank in floating point. Whoever calls it
# "effectively" of low rank must say which singular values count as small. Three measures
# are common:
#
# - entropy: $\exp(-\sum p_i \log p_i)$ with $p_i = s_i / \sum_j s_j$ (Roy and Vetterli
#   2007);
# - stable: $\sum s_i^2 / s_1^2$;
# - energy: the least number of $s_i^2$ that make 90 % of their sum.
#
# For $r$ equal singular values they give $r$, $r$ and $\lceil 0.9\,r \rceil$. A user of
# LoRA needs another number, the least $r$ whose tail adds at most a tenth of the noise:
# $\sum_{i>r}s_i^2/d \le \sigma^2/10$.


# %%
def ranks(s, d=96):
    s = s[s > 1e-9]
    p, squares = s / s.sum(), s**2
    entropy, stable = np.exp(-(p * np.log(p)).sum()), squares.sum() / squares[0]
    energy = 1 + int((squares.cumsum() < 0.9 * squares.sum() * (1 - 1e-12)).sum())
    tails = squares.sum() - np.array([0, *squares.cumsum()])
    least = [int((tails / d > noise**2 / 10).sum()) for noise in (0.05, 0.5)]
    return [round(entropy, 1), round(stable, 1), energy, *least]


table = {}
for name, singular in (("3, 2", (3.0, 2.0)), ("3/i", tuple(3 / np.arange(1, 97))), ("Gaussian", "full")):
    table[name] = ranks(np.linalg.svd(Planted(singular).delta, compute_uv=False))
    text = "{:9} entropy {:4}  stable {:4}  energy {:2}   least r at σ = 0.05: {:2}, at σ = 0.5: {}"
    print(text.format(name, *table[name]))

# %% tags=["hide-input"]
# Checks: the table, and the three measures against subspaces.effective_rank
assert table["3, 2"] == [2.0, 1.4, 2, 2, 2] and table["3/i"] == [38.6, 1.6, 6, 77, 4]
assert table["Gaussian"] == [76.9, 25.2, 49, 84, 40]
kinds = ("entropy", "stable", "energy")
for name, singular in (("3, 2", (3.0, 2.0)), ("3/i", tuple(3 / np.arange(1, 97))), ("Gaussian", "full")):
    dw = Planted(singular).delta
    assert [round(subspaces.effective_rank(dw, kind), 1) for kind in kinds] == table[name][:3]
    tails = np.array([subspaces.best_rank_error(dw, r) for r in range(97)]) / 96
    assert [int((tails > 0.1 * noise**2).sum()) for noise in (0.05, 0.5)] == table[name][3:]
equal = [round(subspaces.effective_rank(np.eye(24), kind), 9) for kind in kinds]
assert equal == [24, 24, np.ceil(0.9 * 24)]

# %% [markdown]
# For the singular values $3/i$ the three measures give 39, 1.6 and 6. The least $r$ is 77
# at $\sigma = 0.05$ and 4 at $\sigma = 0.5$. No measure predicts the least $r$, because
# the least $r$ depends on the noise. "Low rank" is a statement about a matrix *and*
# about the error that one accepts. Where the paper claims a small "intrinsic rank" of
# $\Delta W$ (§7.2), that error is measured by a validation accuracy.
#
# ## 5 · Tables 6 and 18
#
# The paper's Table 6 gives accuracies at $r = 1, 2, 4, 8, 64$. Table 5 gives their
# standard deviation over seeds: 0.5 on WikiSQL, 0.1 on MNLI. Suppose that the rank made
# no difference. Then the five results of a row would be five draws from one normal
# distribution. The *range* of five draws, the largest minus the smallest, can be
# simulated.

# %%
chance = np.ptp(np.random.default_rng(0).standard_normal((400_000, 5)), axis=1)
print(f"the range of five normal numbers is {chance.mean():.2f} standard deviations on average")

# %% tags=["hide-input"]
# Measures: the range of each row of Table 6 (published), and how often five equal ranks reach it
TABLE_6 = {
    ("WikiSQL", "q"): [68.8, 69.6, 70.5, 70.4, 70.0],
    ("WikiSQL", "q, v"): [73.4, 73.3, 73.7, 73.8, 73.5],
    ("WikiSQL", "q, k, v, o"): [74.1, 73.7, 74.0, 74.0, 73.9],
    ("MNLI", "q"): [90.7, 90.9, 91.1, 90.7, 90.7],
    ("MNLI", "q, v"): [91.3, 91.4, 91.3, 91.6, 91.4],
    ("MNLI", "q, k, v, o"): [91.2, 91.7, 91.7, 91.5, 91.4],
}
spans, odds = [], []
for (data, targets), row in TABLE_6.items():
    spans.append(round((max(row) - min(row)) / {"WikiSQL": 0.5, "MNLI": 0.1}[data], 1))
    odds.append((chance >= spans[-1]).mean())
    print(
        f"{data:8}{targets:11} {row}  range {spans[-1]} deviations; equal ranks reach that with probability {odds[-1]:.3f}"
    )
assert round(chance.mean(), 2) == 2.33 and spans == [3.4, 1.0, 0.8, 4.0, 3.0, 5.0]
assert (round(odds[0], 2), round(odds[5], 3), round(6 * odds[5], 2)) == (0.11, 0.004, 0.02) and min(odds[1:3]) > 0.95

# %% [markdown]
# On WikiSQL no row tells the ranks apart. The caption says that $W_q$ alone needs a
# larger $r$. The row of $W_q$ has a range of 3.4 deviations, which five equal ranks
# reach in 11 % of cases. The other two WikiSQL rows have smaller ranges: five equal
# ranks would exceed either in over 95 % of cases. So a deviation of 0.5 is probably too
# large for these two.
#
# One row does stand out: $q, k, v, o$ on MNLI. Its range is 5 deviations, and $r = 1$ is
# its worst rank. Equal ranks reach that range in 0.4 % of cases. At least one of six rows
# would reach it in about 2 % of cases.
#
# Table 18 (GPT-2 medium, $r = 1 \dots 1024 = d$) trains all ranks with the same
# hyper-parameters; the paper notes that some were tuned at $r = 4$. The validation loss
# falls, stays level, and ends 0.01 higher at $r = d$. That is one unit of its last
# digit. The formula of section 2 can take this shape: the tail falls with $r$, and the
# price of estimation rises. The cell evaluates it for $s_i = 3/i$, $\sigma = 0.5$ and
# 1,024 examples.

# %%
harmonic = 3 / np.arange(1, 97)
excess = np.array([predicted(harmonic, r, 0.5, 1024) - 0.25 for r in range(97)])
print(f"least at r = {excess.argmin()}; above the noise: {excess.min():.4f} there, {excess[96]:.4f} at r = d")

# %% tags=["hide-input"]
# Measures: LoRA on this task with 1,024 and with 16,384 examples, beside the formula and Table 18
TABLE_18 = [1.23, 1.21, 1.18, 1.17, 1.16, 1.16, 1.16, 1.16, 1.16, 1.16, 1.17]  # published
shape = claims.run("table18_shape", seeds=(0,))["table18_shape"][0]
ratios = []
for r, scarce, ample in zip(shape["ranks"], shape["scarce"], shape["ample"], strict=True):
    ratios.append(scarce / excess[r])
    text = f"r = {r:2}: above the noise, 1,024 examples {scarce:.4f} (formula {excess[r]:.4f})"
    print(text + f"; 16,384 examples {ample:.4f}")
loss = 0.25 + np.array(shape["scarce"])
print(f"loss at r = d / least loss: {loss[-1] / loss.min():.3f}, in Table 18 {1.17 / 1.16:.3f}")
assert min(ratios) >= 1 and max(ratios) < 1.31 and shape["best_scarce"] == 16 and excess.argmin() == 15
assert round(loss[-1] / loss.min(), 3) == 1.033 and round(max(TABLE_18[4:]) / min(TABLE_18), 3) == 1.009
hidden = 2 * 0.5 * np.sqrt(96 / 1024)
assert round(hidden, 2) == 0.31 and harmonic[8] > hidden > harmonic[9]
assert (np.diff(shape["ample"]) < 0).all() and round(shape["rise_scarce"], 1) == 1.6

# %% [markdown]
# The formula's best rank is 15; of the ranks trained, 16 is the best. The measured
# *excess*, the error above the noise, is up to 31 % above the formula's. The formula
# assumes that every direction of the update can be found. But the noise in an estimated
# $\Delta W$ has a largest singular value of about $2\sigma\sqrt{d/n} = 0.31$. From
# $i = 10$ on, $3/i$ lies below this value, and such directions are not found.
#
# At $r = d$ the excess is 1.6 times the least one, and the whole loss is 3.3 % above its
# least value (Table 18: 0.9 %). With 16 times as many examples the error falls at every
# step of $r$. A best rank is therefore a property of the task, of its noise *and* of the
# number of examples.
#
# A language model is not a planted regression. `tinylora ranks` runs the sweep of Table 6
# on the embedded base model; figures/README.md has its table. Compare the table's shape
# with both panels of section 3's figure before you call it flat.
#
# ## 6 · Few examples
#
# Table 16 reports that LoRA beats full fine-tuning on 100 examples of MNLI (63.8 against
# 60.2). On 1,000 and 10,000 examples the paper calls the two comparable. When should LoRA
# win? In our task full fine-tuning has $d^2 = 9216$ free numbers, and LoRA of rank 2 has
# $2(2d-2) = 380$ free dimensions. With $n > d + 1$ white examples their errors are
#
# $$\text{full least squares:}\quad \sigma^2\Big(1 + \frac{d}{n - d - 1}\Big), \qquad
# \text{rank 2:}\quad \sigma^2\Big(1 + \frac{2(2d-2)}{n d}\Big) .$$
#
# The first is exact, by the mean of an inverse Wishart matrix. The second is section 2's
# `predicted`.

# %%
expected = {n: 0.0025 * (1 + 96 / (n - 97)) / predicted((3, 2), 2, 0.05, n) for n in (192, 384, 1024)}
print("full / rank 2, predicted:", {n: round(float(ratio), 2) for n, ratio in expected.items()})

# %% tags=["hide-input"]
# Measures: LoRA of rank 2 and full fine-tuning on 16 to 1,024 examples, three seeds
few = claims.run("low_data", seeds=(0, 1, 2))["low_data"]
means = {key: np.mean([result[key] for result in few], axis=0) for key in ("lora", "full", "ratio", "ratio_full_rank")}
ranges = np.transpose([result["ratio"] for result in few])
for n, lora, all_weights, ratio, other, seeds in zip(few[0]["sizes"], *means.values(), ranges, strict=True):
    text = f"n = {n:4}: LoRA {lora:.5f}  full {all_weights:.5f}  full / LoRA {ratio:.2f}"
    print(text + f" [{seeds.min():.2f} … {seeds.max():.2f}]; with a ΔW of full rank {other:.2f}")
    assert n < 97 or abs(ratio / expected[n] - 1) < 0.2
assert np.round(means["ratio"], 2).tolist() == [0.8, 1.07, 1.71, 2.26, 1.44, 1.12]
assert all(min(result["ratio"][2:]) > 1.1 for result in few) and ranges[0].max() < 1
assert ranges[1].min() < 1 < ranges[1].max() and 1 - ranges[0].mean() < np.ptp(ranges[0])  # not decided by three seeds
assert max(means["ratio_full_rank"]) < 0.56 and means["ratio_full_rank"][-1] < 0.03

# %% tags=["hide-input"]
# Draws: both errors against the number of examples
planted.draw_low_data(few)

# %% [markdown]
# From $n = d$ on LoRA is ahead in every seed. It is ahead most at $n = 2d$, where full
# fine-tuning has 2.3 times LoRA's error. The formulas agree with the measured ratios to
# 20 %. With 48 examples LoRA is ahead in some seeds and behind in others. With 16
# examples LoRA is *behind* in each seed: full fine-tuning's error is 3 to 36 % smaller.
# Three seeds with so wide a spread decide nothing.
#
# Why is LoRA behind at $n = 16$? For $n < d$ no learner can know what $\Delta W$ does to
# an $x$ outside the span of the examples. On average a part $1 - n/d$ of
# $\|\Delta W\|_F^2$ lies there. The cell splits an error into the parts inside and
# outside the span of the 16 inputs.


# %%
def split(off, x):
    span = np.linalg.qr(x.T.astype(float))[0]  # 96 × 16, its columns span the inputs
    inside = off @ span
    return (inside**2).sum() / 96, ((off - inside @ span.T) ** 2).sum() / 96


# %% tags=["hide-input"]
# Measures: the error inside and outside the span for the untrained layer, LoRA and full fine-tuning, three seeds
parts = {"untrained": [], "LoRA": [], "full": []}
for seed in range(3):
    scarce = Planted(n=16, seed=seed)
    lora, everything = scarce.adapted(2, seed=seed), linear(scarce.w0, trainable=True)
    fit(lora, scarce.x, scarce.y, seed=seed)
    fit(everything, scarce.x, scarce.y, lr=0.003, seed=seed)
    for name, w in (("untrained", scarce.w0), ("LoRA", weight(lora)), ("full", weight(everything))):
        parts[name].append(split(w - scarce.w0 - scarce.delta, scarce.x))
for name, found in parts.items():
    print("{:9} inside the span {:.4f}, outside {:.4f}".format(name, *np.mean(found, axis=0)))
inside, outside = np.transpose([np.mean(found, axis=0) for found in parts.values()])
assert inside[1] < 1e-4 and inside[2] < 1e-3 and np.round(outside, 2).tolist() == [0.10, 0.15, 0.11]

# %% [markdown]
# Inside the span both methods learn nearly everything. Outside it nothing can be learned,
# and the untrained layer has an error of 0.10. LoRA raises that to 0.15, because $A$
# starts at random and $BA$ acts on all of $x$. Full fine-tuning raises it to 0.11. Its
# gradients lie in the span, but Adam does not follow the gradient's direction.
#
# With a $\Delta W$ of full rank LoRA of rank 2 never wins: the ratio of errors, full /
# LoRA, is at most 0.55, and 0.02 at $n = 1024$. LoRA's advantage on few examples comes
# from its assumption of a low rank, which is right in this task. If the rank of the
# update is unknown, it is also unknown whether LoRA helps when data are scarce.
#
# ## 7 · Intrinsic dimension, where the idea came from
#
# LoRA names Li et al. and Aghajanyan et al. as its inspiration (§1, §4.1). They train $m$
# numbers $\theta_m$ that move all $D$ weights along fixed random directions:
#
# $$\theta = \theta_0 + P\,\theta_m, \qquad
# P\ (D \times m)\ \text{random, its columns of length 1}, \qquad
# \nabla_{\theta_m} L = P^\top \nabla_\theta L .$$
#
# (The papers write $d$ for $m$.) They call $d_{90}$ the least $m$ that gives 90 % of the
# score of full training. Aghajanyan et al. find that 200 numbers are enough for RoBERTa
# on MRPC.
#
# Why so few? Take a loss that depends on $\theta$ only through $k$ linear combinations
# of its entries, $L = \|K\theta - b\|^2$ with $K$ $(k \times D)$. At $\theta_0 = 0$ the
# best $\theta_m$ solves $KP\,\theta_m = b$ in the least-squares sense. Let the rows of
# $K$ be orthonormal. Then the columns of $KP$ span a uniformly random $m$-dimensional
# subspace of $\mathbb R^k$. On average a part $1 - m/k$ of the loss is left, and none
# from $m = k$ on. **The number $D$ of weights does not occur.**

# %%
k, m = 40, 20


def left_in_random_subspace(D):
    K, b, P = orthonormal(rng, D, k).T, rng.standard_normal(k), rng.standard_normal((D, m))
    theta_m = np.linalg.lstsq(K @ P, b, rcond=None)[0]
    return ((K @ P @ theta_m - b) ** 2).sum() / (b**2).sum()


for D in (200, 2000):
    left = [left_in_random_subspace(D) for _ in range(100)]
    print(f"D = {D:4}: {np.mean(left):.3f} of the loss is left (± {np.std(left) / 10:.3f}); 1 − m/k = {1 - m / k}")
    assert abs(np.mean(left) - (1 - m / k)) < 4 * np.std(left) / 10

# %% [markdown]
# If the rows of $K$ differ in size, their sizes decide how much is left. Scale row $i$
# by $1/i$. For $b = K\theta^\ast$ with a random $\theta^\ast$ about 0.07 of the loss is
# left, instead of 0.50. For the unit vector $b = e_1$ less than 0.004 is left, and for
# $b = e_{40}$ 0.83. So $d_{90}$ depends on $k$ and on the spectrum of $K$. A real loss
# is unlikely to depend on only a few combinations, so a steep spectrum explains "200
# numbers" better than a small $k$.

# %% tags=["hide-input"]
# Measures: what is left if row i of K is scaled by 1/i
draws, size = np.random.default_rng(0), 1 / np.arange(1, k + 1)
left = {"K θ*": [], "e₁": [], "e₄₀": []}
for _ in range(1000):
    K = size[:, None] * orthonormal(draws, 200, k).T
    space = np.linalg.qr(K @ draws.standard_normal((200, m)))[0]
    for name, b in zip(left, (K @ draws.standard_normal(200), np.eye(k)[0], np.eye(k)[-1]), strict=True):
        left[name].append(1 - ((space.T @ b) ** 2).sum() / (b @ b))
steep = [float(np.mean(part)) for part in left.values()]
print("steep K, part of the loss left:", {name: round(value, 4) for name, value in zip(left, steep, strict=True)})
assert round(steep[0], 2) == 0.07 and steep[1] < 0.004 and round(steep[2], 2) == 0.83

# %% [markdown]
# **A low intrinsic dimension is not a low rank.** Take the planted task of rank 2. LoRA of
# rank 2 trains $2 \cdot 2 \cdot 96 = 384$ numbers and leaves nothing but noise. In a
# random subspace of 384 dimensions the same task should leave $1 - 384/9216 = 95.8\,\%$
# of $\|\Delta W\|_F^2$, because its loss depends on all $D = k = 9216$ weights. The cell
# trains the 384 numbers by gradient descent. The loss has curvature $2/d$ in every
# weight, so a rate of $d/2$ suits.

# %%
P = rng.standard_normal((96 * 96, 384))
P /= np.linalg.norm(P, axis=0)
θ = np.zeros(384)
for _ in range(40):
    W = w0 + (P @ θ).reshape(96, 96)
    gradient = 2 / y.size * (x @ W.T - y).T @ x  # of the mean squared error in W
    θ -= 96 / 2 * P.T @ gradient.reshape(-1)
left, expected = task.mse(w0 + (P @ θ).reshape(96, 96)), (1 - 384 / 9216) * 13 / 96 + 0.0025
print(f"384 random directions: {left:.4f} (predicted {expected:.4f}; untrained {task.tail(0):.4f})")
print(f"384 numbers of LoRA, r = 2: {low[0]['mse'][1]:.4f}")
assert abs(left / expected - 1) < 0.005 and low[0]["mse"][1] < 0.00252

# %% tags=["hide-input"]
# Checks: intrinsic.RandomSubspace moves the weight by the same bits, has the same gradient, and ends at the same error
first, second = x[:64], y[:64]
sub = intrinsic.RandomSubspace(linear(w0, trainable=True), 384)
assert np.allclose(np.linalg.norm(sub.projection, axis=1), 1, atol=1e-6) and round(1 - 384 / 9216, 2) == 0.96
sub.theta.data[:] = rng.standard_normal((1, 384))
moved = w0.astype(np.float32) + (sub.theta.data @ sub.projection).reshape(96, 96)  # .projection holds Pᵀ
assert sub.moved()[0].data.tobytes() == moved.tobytes()
error = sub(first) - second
(error * error).sum().backward()
by_hand = sub.projection.astype(float) @ (2 * (first @ moved.T - second).T.astype(float) @ first).reshape(-1)
assert np.abs(sub.theta.grad[0] / np.abs(by_hand).max() - by_hand / np.abs(by_hand).max()).max() < 1e-5
sub = intrinsic.RandomSubspace(linear(w0, trainable=True), 384)
fit(sub, x, y, lr=0.1)
assert abs(task.mse(sub.moved()[0].data.astype(float)) / expected - 1) < 0.005
assert np.linalg.matrix_rank((P[:, :20] @ np.ones(20)).reshape(96, 96)) == 96

# %% [markdown]
# The random subspace leaves 96 % of $\|\Delta W\|_F^2$, as predicted. LoRA trains as
# many numbers, and leaves only noise. The reason is that *training chooses* the
# directions in which LoRA's numbers act. Nor does a low intrinsic dimension imply a low
# rank: an update along 20 random directions has full rank.
#
# The last experiment measures $d_{90}$ of a small network, as the papers do. The network
# has the widths 16-32-32-4 and $D = 1664$ weights. It sorts 16 clusters into 4 classes,
# and its score is the accuracy on unseen data. It is trained from three starts: random
# weights; a body trained to tell the 16 clusters apart, with a new head; all weights
# trained on a nearby task.


# %%
def d90(scores, full):
    return min((m for m, score in scores.items() if score >= 0.9 * full), default=None)


# %% tags=["hide-input"]
# Measures: d90 of the network from the three starts, three seeds; also d90 of the part of the score above chance
runs = [claims.directions.intrinsic_dimension(seed, (50, 70, 100, 140, 200)) for seed in (0, 1, 2)]
found = {}
for name, what in (("random", "random start"), ("head", "trained body, new head"), ("near", "nearby task")):
    scores = [dict(zip(run["dimensions"], run[name], strict=True)) for run in runs]
    full_scores = [run[f"full_{name}"] for run in runs]
    found[name] = [d90(s, f) for s, f in zip(scores, full_scores, strict=True)]
    assert found[name] == [intrinsic.d90(s, f) for s, f in zip(scores, full_scores, strict=True)]
    beyond = [{m: a - 0.25 for m, a in s.items()} for s in scores]
    found[name, "above chance"] = [d90(s, f - 0.25) for s, f in zip(beyond, full_scores, strict=True)]
    print(f"{what:23} d90 of three seeds {found[name]}; of the part above chance {found[name, 'above chance']}")
# A single one of the 1,024 unseen points can move some of these by a step of the grid, and whether it is right can
# depend on the last bits of a matrix product. So a step on either side is allowed.
assert set(found["random"]) <= {100, 140} and set(found["head"] + found["near"]) <= {70, 100}
assert set(found["random", "above chance"]) <= {140, 200} and runs[0]["weights"] == 1664

# %% [markdown]
# From a random start $d_{90}$ is 100 or 140 of 1,664. A pre-trained start saves at most
# one step of the grid 50, 70, 100, 140, 200. Aghajanyan et al. report a saving too. But
# one of the 1,024 unseen points can make such a step, so three seeds do not decide
# whether pre-training saves anything.
#
# The score includes what guessing gives, here 25 %. If only the part above chance
# counts, $d_{90}$ from a random start is 140 or 200.
#
# ## Where paper and code differ
#
# - §4.1 says that LoRA "roughly" recovers full fine-tuning if $r$ is the rank of the
#   weight matrices. Such an adapter can *represent* every update: the bound at $r = 96$
#   is $\sigma^2$. On 4,096 examples LoRA's training ends 3 to 4 % above this bound, and
#   full least squares 2.4 %.
# - Table 6's caption says that $W_q$ alone needs more than $r = 1$. On WikiSQL the row
#   of $W_q$ does not differ from five equal ranks (section 5).
# - In our task, an advantage on few examples (Table 16) needs an update of low rank: at
#   $n = 2d$ full / LoRA is 2.3 with rank 2 and 0.04 with full rank.
# - Aghajanyan et al. use Fastfood transforms for $P$. `RandomSubspace` draws a dense $P$
#   with normalized columns, as Li et al. do.

# %% tags=["hide-input"]
# Checks: the numbers of this list
more = np.array([result["mse"][-1] for result in full]) / 0.0025 - 1
print(f"LoRA at r = d: {more.min():.1%} to {more.max():.1%} above σ²; full least squares {96 / (4096 - 97):.1%}")
assert np.isclose(full[0]["tail"][-1], 0.0025) and more.min() > 0.03 and more.max() < 0.04
assert round(96 / (4096 - 97), 3) == 0.024 and round(means["ratio_full_rank"][3], 2) == 0.04

# %% [markdown]
# ## Exercises
#
# Grading runs only the setup cell and the exercise cells: put helpers inside the latter.
#
# ### 12-1 Predict the plateau, with A trained and with A frozen
#
# LoRA-FA (arXiv 2308.03303) leaves $A$ as it was drawn and trains only $B$. What does that
# cost? The task is $y = (W_0 + \Delta W)\,x + \text{noise}\cdot\varepsilon$ with
# $x \sim N(0, \text{scale}^2 I)$ and $\varepsilon \sim N(0, I)$. The number of examples
# is unlimited, and training is perfect.
#
# - `singular`: list of positive floats, the nonzero singular values of $\Delta W$, in no
#   particular order
# - `d_out`, `d_in`: the shape of $\Delta W$
# - `r`: the rank of the adapter, 0 or more
# - `noise`, `scale`: floats
#
# Return `(trained, frozen)`, the errors on unseen data: the mean of $(\hat y - y)^2$ over
# outputs and data. For `trained`, $A$ ($r \times d_{in}$) and $B$ are trained. For
# `frozen`, a Gaussian $A$ stays as drawn, and the error is its expectation over $A$.
# Checked: both to nine digits, also for $r \ge d_{in}$ and $r = 0$. Hint: which part of
# $x$ does a frozen $A$ let through?


# %% tags=["exercise"]
def exercise_1(singular, d_out, d_in, r, noise, scale):
    """(trained, frozen): LoRA's least error on unseen data, with A trained and with A frozen."""
    # BEGIN SOLUTION
    squares = np.sort(np.square(np.asarray(singular, float)))[::-1]
    gain = scale**2 / d_out
    # B A reads x through the random r-dimensional row space of A, so a part 1 − r/d_in of each direction of ΔW is lost
    seen = min(r / d_in, 1)
    return gain * squares[r:].sum() + noise**2, gain * squares.sum() * (1 - seen) + noise**2
    # END SOLUTION


# %%
_ = grade("12-1", exercise_1)

# %% [markdown]
# ### 12-2 Build a target on which r = 8 leaves a given multiple of the noise's variance
#
# A target of full rank is not needed to defeat $r = 8$. How little rank is enough? Task
# and error are those of section 2.
#
# - `d`: whole number, the width
# - `norm`: float, the wanted $\|\Delta W\|_F$
# - `noise`: float, σ
# - `factor`: float above 1
#
# Return $\Delta W$, an array of $d \times d$ with this norm, on which LoRA of rank 8 is
# left with exactly `factor` times noise². Among all such $\Delta W$ return one of the
# smallest possible rank. Return None if there is none. Checked: norm, rank, the error
# that rank 8 leaves, and None where nothing is possible. Hint: for a given norm and rank,
# which singular values make the tail beyond the eighth largest?


# %% tags=["exercise"]
def exercise_2(d, norm, noise, factor):
    """ΔW of least rank on which LoRA of rank 8 is left with factor · noise², or None."""
    # BEGIN SOLUTION
    total, tail = norm**2, (factor - 1) * noise**2 * d
    for n in range(9, d + 1):
        # n − 8 equal squares below 8 equal ones: the largest tail that n directions can have is (n − 8)/n of the total
        if tail <= total * (n - 8) / n:
            squares = [(total - tail) / 8] * 8 + [tail / (n - 8)] * (n - 8)
            return np.diag(np.sqrt(squares + [0.0] * (d - n)))
    return None
    # END SOLUTION


# %%
_ = grade("12-2", exercise_2)

# %% [markdown]
# ### 12-3 Inputs that are not white
#
# Everything above needs $x \sim N(0, I)$. The inputs of a real layer have a few strong
# directions and many weak ones, and an error in a weak direction hardly counts. Which
# rank is needed then?
#
# - `delta`: array (d_out, d_in), the wanted update
# - `x`: array (n, d_in), the inputs, of full column rank, n ≥ d_in
# - `excess`: float, the error above the noise that is accepted
#
# The error above the noise of an update $X$ is
# $\|(X - \text{delta})\,x^\top\|_F^2 / (n \cdot d_{out})$. Return `(r, X)`: the least
# rank with which an error of at most `excess` is possible, and an update `X` (d_out,
# d_in) of that rank that reaches it; zeros for $r = 0$. Checked: r, the error of X, and
# its rank. Hint: Eckart and Young speak of $\|X - \text{delta}\|_F$. Which matrix must
# take the place of delta, so that the theorem speaks of this error?


# %% tags=["exercise"]
def exercise_3(delta, x, excess):
    """(r, X): the least rank, and an update of it, with an error of at most `excess` on x."""
    # BEGIN SOLUTION
    root = np.linalg.cholesky(x.T @ x / len(x))
    u, s, vt = np.linalg.svd(delta @ root, full_matrices=False)
    tails = np.array([np.square(s[n:]).sum() for n in range(len(s) + 1)]) / len(delta)
    r = int(np.argmax(tails <= excess))
    return r, (u[:, :r] * s[:r] @ vt[:r]) @ np.linalg.inv(root)
    # END SOLUTION


# %%
_ = grade("12-3", exercise_3)

# %% [markdown]
# ## Summary
#
# - An update of rank $r$ must leave the tail $\sum_{i>r}s_i^2$
#   (`tinylora/papers/subspaces.py`, `tests/papers/test_subspaces.py`).
# - A planted rank of 2 gives Table 6's plateau, 0.0025 from $r = 2$ on. A Gaussian target
#   of full rank leaves 41 $\sigma^2$ at $r = 8$ (`tinylora/papers/claims/planted.py`,
#   `tests/papers/test_experiments.py`).
# - A plateau bounds the rank that this task needs, given its noise and its data, if all
#   ranks were trained equally well.
# - LoRA wins on few examples where its assumption is right: full fine-tuning has 2.3
#   times LoRA's error at $n = 2d$.
# - LoRA learns the planted update with 384 numbers, and 384 random directions leave 96 %
#   of it (`tinylora/papers/intrinsic.py`, `tests/papers/test_intrinsic.py`).
