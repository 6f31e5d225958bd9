# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 13 · Subspaces and amplification (appendix)
#
# [← 12 Is ΔW really low rank?](12_is_delta_w_low_rank.ipynb) · [All notebooks](README.md) · [14 Scaling and learning rates →](14_scaling_and_learning_rates.ipynb)
#
# **Question.** Which directions does an update take, and what would an unrelated update
# have given?
#
# **You will be able to**
#
# - compute the similarity φ of two subspaces, and its mean and deviation by chance
# - repair an identity of LoRA's appendix G
# - say what Table 7 shows beside its baselines, and what the factor 21.5 does not show
#
# **Needs:** the singular value decomposition, projections, the trace; mean and standard
# deviation; the planted task ([12](12_is_delta_w_low_rank.ipynb), section 2).
#
# **Hours:** 3 (2 to read and run, 1 for the exercises).
#
# **Papers:** LoRA (arXiv 2106.09685) §7.2 (eq. 4, Figures 3 and 4), §7.3 (Table 7),
# appendices G, H.3 (Figure 8) and H.4.
#
# Folded cells measure, check or draw. Click ••• to open one.

# %% tags=["setup"]
import numpy as np
from grading import grade

from tinylora.papers import claims, subspaces
from tinylora.papers.claims import directions
from tinylora.papers.claims.directions import shared_only, trained, update
from tinylora.papers.claims.toys import Planted, orthonormal

rng = np.random.default_rng(0)

# %% [markdown]
# ## 1 · The similarity φ
#
# Take the top $i$ singular vectors of a matrix $X$ as the columns of $U_i$, and the top
# $j$ of a matrix $Y$ as the columns of $U_j$. Both lie in $\mathbb R^d$. Eq. 4 of the
# paper (§7.2) is
#
# $$\varphi(X, Y, i, j) = \frac{\|U_i^\top U_j\|_F^2}{\min(i, j)} \in [0, 1] .$$
#
# The entries of $U_i^\top U_j$ are cosines between the vectors. With the projections
# $P_i = U_i U_i^\top$ and $P_j = U_j U_j^\top$ the numerator is
# $\operatorname{tr}(P_i P_j)$. So $\varphi$ depends on the two *spaces* only, and not on
# the vectors chosen in them. It is 1 if the smaller space lies in the larger, and 0 if
# the spaces are orthogonal.


# %%
def phi(X, Y, i, j):
    Ui, Uj = (np.linalg.svd(M)[2][:n].T for M, n in ((X, i), (Y, j)))  # right singular vectors, as columns
    return np.linalg.norm(Ui.T @ Uj) ** 2 / min(i, j)


A, A64 = rng.standard_normal((8, 96)), rng.standard_normal((64, 96))
print("two Gaussian matrices:", {(i, j): round(float(phi(A, A64, i, j)), 4) for i, j in ((1, 1), (8, 8), (8, 64))})
assert all(abs(phi(A, A64, i, j) - subspaces.similarity(A, A64, i, j)) < 1e-12 for i, j in ((1, 1), (8, 8), (8, 64)))

# %% tags=["hide-input"]
# Checks: φ of the same span, of one that contains the other, and of orthogonal ones
mixed = orthonormal(rng, 8, 8) @ np.diag(np.arange(1.0, 9)) @ orthonormal(rng, 8, 8) @ A  # the same row space
apart = np.linalg.svd(A)[2][8:16]  # orthogonal to it
same, contained = phi(A, mixed, 8, 8), phi(A, np.vstack([mixed, A64]), 8, 72)
print(f"the same span {same:.12f}; contained {contained:.12f}; orthogonal {phi(A, apart, 8, 8):.1e}")
assert abs(same - 1) < 1e-12 and abs(contained - 1) < 1e-12 and phi(A, apart, 8, 8) < 1e-12

# %% [markdown]
# ## 2 · Right or left singular vectors?
#
# The paper says *right*-singular in §7.2, *left*-singular in appendix G, and "column
# vectors" under its figures. $A$ is $r \times d_{in}$. Its right singular vectors live in
# $\mathbb R^{d_{in}}$ and span its row space, the inputs that the adapter reads. Its left
# ones live in $\mathbb R^r$, and all $r$ of them span that whole space. With the left
# ones $\varphi(r, r)$ would be 1 for any two matrices. So for $A$ the right ones are
# meant. For $B$ $(d_{out} \times r)$ the left ones are meant: they span what the adapter
# writes to.

# %%
C = rng.standard_normal((8, 96))
left, right = phi(A.T, C.T, 8, 8), phi(A, C, 8, 8)  # the left singular vectors of A are the right ones of Aᵀ
print(f"φ(8, 8) of two unrelated 8 × 96 matrices: left {left:.12f}, right {right:.4f}")
assert abs(left - 1) < 1e-12 and right < 0.2

# %% tags=["hide-input"]
# Checks: subspaces.similarity with side="left" and side="right"
by_side = [subspaces.similarity(A, C, 8, 8, side=side) for side in ("left", "right")]
assert np.allclose(by_side, [left, right], atol=1e-12)
assert abs(subspaces.similarity(A.T, C.T, 8, 8, side="left") - right) < 1e-12  # B's column space is Bᵀ's row space

# %% [markdown]
# ## 3 · The projection metric, and an erratum
#
# Appendix G derives $\varphi$ from a distance. Let $p = \min(i, j)$. The singular values
# $s_1, \dots, s_p$ of $U_i^\top U_j$ are the cosines of the *principal angles* between
# the spaces. The projection metric $\delta$ (appendix G writes $d$, which is a dimension
# here) is
#
# $$\delta = \sqrt{p - \textstyle\sum s^2}, \qquad
# \text{for } i = j:\quad \delta^2 = \tfrac12 \|P_i - P_j\|_F^2 .$$
#
# Since $\sum s^2 = \|U_i^\top U_j\|_F^2 = p\,\varphi$, it follows that
# $\delta^2 = p\,(1 - \varphi)$. So
#
# $$\varphi = 1 - \frac{\delta^2}{p}, \qquad\text{whereas appendix G prints}\qquad
# \varphi = \frac1p\,(1 - \delta^2) .$$
#
# The printed value is too small by $1 - 1/p$. It is right for $p = 1$. For the unrelated
# spaces below it is negative, which no similarity may be.

# %%
Ui, Uj = (np.linalg.svd(M)[2][:8].T for M in (A, C))
δ2 = 8 - (np.linalg.svd(Ui.T @ Uj, compute_uv=False) ** 2).sum()
correct, printed, whole = 1 - δ2 / 8, (1 - δ2) / 8, phi(A, C, 8, 8)
print(f"φ = {whole:.6f}; 1 − δ²/p = {correct:.6f}; as printed {printed:.6f}")
assert np.isclose(whole, correct, atol=1e-12) and np.isclose(printed, whole - (1 - 1 / 8), atol=1e-12) and printed < 0

# %% tags=["hide-input"]
# Checks: the second form of the metric, and the library's two functions
distance = subspaces.projection_distance(A, C, 8, 8)
assert np.isclose(δ2, np.linalg.norm(Ui @ Ui.T - Uj @ Uj.T) ** 2 / 2) and np.isclose(np.sqrt(δ2), distance)
assert np.isclose(subspaces.similarity_from_distance(distance, 8), whole, atol=1e-12) and 1 - 1 / 8 == 0.875

# %% [markdown]
# ## 4 · What is φ of unrelated spaces?
#
# The similarity of unrelated spaces is not 0. Turn one space by a uniformly random
# rotation $R$. The mean of $R P_i R^\top$ commutes with every rotation, so it is a
# multiple of the identity. Its trace is $i$, so the mean is $(i/d)\,I$. Hence
#
# $$\mathrm E \operatorname{tr}(P_i P_j) = \operatorname{tr}\big(\tfrac{i}{d} P_j\big)
# = \frac{i j}{d},
# \qquad \mathrm E\,\varphi = \frac{i j}{d \min(i, j)} = \frac{\max(i, j)}{d} .$$
#
# The standard deviation follows in the same way. Let $M = P_i - \frac id I$ and
# $N = P_j - \frac jd I$. Then $\operatorname{tr}(P_i P_j) - ij/d = \operatorname{tr}(MN)$
# and $\|M\|_F^2 = i(d-i)/d$. The symmetric matrices of trace 0 form a space of
# $(d-1)(d+2)/2$ dimensions, and a random rotation favours none of them. So
# $\mathrm E \operatorname{tr}(MN)^2 = \|M\|_F^2\, \|N\|_F^2 \big/ \tfrac{(d-1)(d+2)}{2}$,
# and
#
# $$\text{deviation of } \varphi = \frac{1}{\min(i,j)}
# \sqrt{\frac{2\, i j\, (d-i)(d-j)}{d^2 (d-1)(d+2)}} .$$


# %%
def chance(i, j, d):
    deviation = np.sqrt(2 * i * j * (d - i) * (d - j) / (d**2 * (d - 1) * (d + 2))) / min(i, j)
    return max(i, j) / d, deviation


for i, j in ((1, 1), (8, 8), (8, 64), (64, 64)):
    print("GPT-3, d = 12288, φ({}, {:2}) by chance: {:.5f} ± {:.5f}".format(i, j, *chance(i, j, 12288)))

# %% tags=["hide-input"]
# Measures: mean and deviation on 500 pairs of Gaussian matrices
for i, j, d in ((1, 1, 96), (8, 8, 96), (8, 64, 96), (4, 16, 256)):
    drawn = [np.linalg.norm(orthonormal(rng, d, i).T @ orthonormal(rng, d, j)) ** 2 / min(i, j) for _ in range(500)]
    mean, deviation = chance(i, j, d)
    text = f"d = {d:3}, φ({i}, {j:2}): {np.mean(drawn):.4f} ± {np.std(drawn):.4f}"
    print(text + f"; predicted {mean:.4f} ± {deviation:.4f}")
    assert abs(np.mean(drawn) - mean) < 5 * deviation / np.sqrt(500) and abs(np.std(drawn) / deviation - 1) < 0.25
    assert mean == subspaces.expected_similarity(i, j, d)
assert round(chance(1, 1, 12288)[0], 5) == 0.00008 and round(chance(8, 64, 12288)[0], 4) == 0.0052

# %% [markdown]
# At GPT-3's width chance is nearly 0: where Figure 3 reports a $\varphi(1, 1)$ above
# 0.5, chance gives 0.00008. On a toy of $d = 96$ chance can be large: unrelated spaces
# have $\varphi(8, 64) = 0.67$. Whoever repeats the figure on a small model must compare
# with chance.
#
# The $d$ of the formula is the dimension of the space in which both can turn freely. If
# the inputs span only $m < d$ dimensions, what SGD adds to $A$ lies in their span. If
# the initial $A_0$ is subtracted, or negligible, chance is then $\max(i, j)/m$.
#
# ## 5 · Figures 3 and 4
#
# Adapters of rank 8 and 64 are trained on one task: notebook 12's planted update of rank
# 2 ($d = 96$, singular values 3 and 2). Suppose that they share the $k = 2$ planted
# directions and nothing else. Then the other $i - k$ and $j - k$ directions span
# unrelated spaces in the remaining $d - k$ dimensions, so
#
# $$\mathrm E\,\varphi
# = \frac{1}{\min(i, j)}\Big(k + \frac{(i - k)(j - k)}{d - k}\Big) .$$


# %%
def shared(i, j, d, k):
    return (k + (i - k) * (j - k) / (d - k)) / min(i, j)


pairs = ((1, 1), (2, 2), (8, 8), (8, 64))
small, large = (trained(Planted(), r, seed).lora_A.weight.data for r, seed in ((8, 0), (64, 1000)))
for i, j in pairs:
    text = f"φ({i}, {j:2}): {phi(small, large, i, j):.3f}; chance {chance(i, j, 96)[0]:.3f}"
    print(text + f"; with {min(2, i)} shared: {shared(i, j, 96, min(2, i)):.3f}")

# %% tags=["hide-input"]
# Measures: the same similarities with three seeds
runs = claims.run("subspace_overlap", seeds=(0, 1, 2))["subspace_overlap"]
found = np.array([result["phi"] for result in runs])
for n, (i, j) in enumerate(pairs):
    print(f"φ({i}, {j:2}): three seeds {np.round(found[:, n], 3)}")
    assert shared(i, j, 96, min(2, i)) == shared_only(i, j, 96, 2)
    assert abs(phi(small, large, i, j) - found[0, n]) < 1e-6
assert found[:, 0].min() > 0.88 and found[:, 1].min() > 0.994
assert all(np.abs(found[:, n] - shared(*pairs[n], 96, 2)).max() < 0.02 for n in (1, 2, 3))

# %% tags=["hide-input"]
# Draws: φ for every i and j, chance, and what is above chance
directions.draw_similarity_maps()

# %% [markdown]
# The left map looks like the paper's Figure 3: a bright corner at the first directions.
# The middle map shows chance, $c$. The right map shows $(\varphi - c)/(1 - c)$, which is
# 0 on average for unrelated spaces and 1 if the smaller space lies in the larger.
#
# Chance explains the bright bands of the left map. $\varphi(8, 8) = 0.31$ is well above
# its chance of 0.083. But two shared and six unrelated directions already give 0.298, so
# the six share nothing beyond chance. The same two directions also explain
# $\varphi(8, 64) = 0.73$, where chance is 0.67. The paper reads its figure in this way:
# the shared directions are the useful ones, and the rest is noise. In this toy that
# reading is right, but only the value above chance shows it.
#
# **$\varphi(1, 1)$ asks whether the *order* of the directions agrees.** With two equal
# planted singular values $\varphi(1, 1)$ can be anything, while $\varphi(2, 2)$ stays
# near 1.

# %% tags=["hide-input"]
# Measures: φ(1, 1) and φ(2, 2) for four seeds, with unequal and with equal singular values
for singular in ((3.0, 2.0), (2.5, 2.5)):
    ones, twos = [], []
    for seed in range(4):
        task = Planted(singular, seed=seed)
        small, large = (trained(task, r, s).lora_A.weight.data for r, s in ((8, seed), (64, seed + 1000)))
        ones.append(phi(small, large, 1, 1))
        twos.append(phi(small, large, 2, 2))
    print(f"planted {singular}: φ(1, 1) of four seeds {np.round(ones, 2)}, φ(2, 2) {np.round(twos, 3)}")
    assert min(twos) > 0.99 and (min(ones) > 0.85 if singular[0] == 3 else min(ones) < 0.1 and max(ones) > 0.9)

# %% [markdown]
# **Figure 4's control is not 0.** Figure 4 compares two seeds at $r = 64$. Its control,
# on the right, compares two Gaussian matrices, which are said to share no directions. On
# average they share $n/d$ of them. At $n = 16$ and GPT-3's width that is 0.0013. At
# $n = 16$ and $d = 96$ it is 0.17, and two seeds have 0.27.

# %% tags=["hide-input"]
# Measures: φ(n, n) of two seeds at r = 64 and of two Gaussian matrices
runs = claims.run("two_seeds", seeds=(0, 1, 2))["two_seeds"]
seeds, gaussian = (np.mean([result[key] for result in runs], axis=0) for key in ("phi", "gaussian"))
for n, a, b in zip((1, 2, 16, 64), seeds, gaussian, strict=True):
    text = f"φ({n}, {n}): two seeds {a:.3f}; Gaussian {b:.3f}; n/d {n / 96:.3f}"
    print(text + f"; with {min(n, 2)} shared {shared(n, n, 96, min(n, 2)):.3f}")
assert seeds[1] > 0.999 and round(seeds[2], 2) == 0.27 and round(gaussian[2], 2) == 0.17
assert np.abs(gaussian - np.array([1, 2, 16, 64]) / 96).max() < 0.01 and abs(seeds[3] - gaussian[3]) < 0.01
assert round(chance(16, 16, 12288)[0], 4) == 0.0013

# %% [markdown]
# ## 6 · Amplification, and Table 7
#
# Does $\Delta W$ repeat what $W$ does already, or does it bring something new? §7.3
# projects $W$ onto the top $r$ singular directions of $\Delta W$, $U$ on the left and $V$
# on the right, and compares norms:
#
# $$\text{factor} = \frac{\|\Delta W\|_F}{\|U^\top W V\|_F} .$$
#
# (The paper writes $U^\top W V^\top$, with the vectors as the rows of $V$.)


# %%
def amplification(delta, W, r):
    U, _, Vt = np.linalg.svd(delta)
    projected = np.linalg.norm(U[:, :r].T @ W @ Vt[:r].T)
    return np.linalg.norm(delta) / projected, projected


task = Planted()
delta, W = update(trained(task, 4, 0)), task.w0
factor, projected = amplification(delta, W, 4)
print(f"‖ΔW‖ = {np.linalg.norm(delta):.3f}, ‖UᵀWV‖ = {projected:.3f}, factor {factor:.2f}")
found = subspaces.amplification(delta, W, 4)
assert np.isclose(projected, found.projected) and np.isclose(factor, found.factor)

# %% [markdown]
# Table 7 (GPT-3, layer 48, $W_q$) lists $\|U^\top W V\|_F$ with $U$ and $V$ from
# $\Delta W$, from $W$ itself, and from a random matrix. §7.3 concludes:
#
# 1. $\Delta W$ is more related to $W$ than a random matrix is.
# 2. $\Delta W$ amplifies directions that $W$ does not emphasize.
# 3. The factor is huge: $21.5 \approx 6.91/0.32$ at $r = 4$.
#
# The random column can be derived. The argument of section 4, once for each side, gives
#
# $$\mathrm E\,\|U^\top W V\|_F^2 = \mathrm E \operatorname{tr}(P_U W P_V W^\top)
# = \frac{r}{d} \cdot \frac{r}{d}\, \|W\|_F^2,
# \qquad\text{so}\quad \|U^\top W V\|_F \approx \|W\|_F\, \frac{r}{d} .$$

# %%
W_NORM, WIDTH = 61.95, 12288  # published
TABLE_7 = {4: (0.32, 21.67, 0.02, 6.91), 64: (1.90, 37.71, 0.33, 3.57)}  # from ΔW, from W, random; ‖ΔW‖
for r, (own, _, drawn, norm) in TABLE_7.items():
    random = W_NORM * r / WIDTH
    print(f"r = {r:2}: random {random:.4f} (printed {drawn}); ΔW's directions have {own / random:.1f} times that")
    print(f"        factor {norm / own:.2f}; with random directions {norm / random:.1f}")

# %% tags=["hide-input"]
# Checks: the table's random column, the factors, and the formula on 300 draws
for r, (own, _, drawn, _) in TABLE_7.items():
    random = W_NORM * r / WIDTH
    assert abs(random - drawn) < 0.008 and round(random, 4) == {4: 0.0202, 64: 0.3227}[r]
    assert round(own / random) == {4: 16, 64: 6}[r]
factors = {r: (norm / own, norm * WIDTH / (W_NORM * r)) for r, (own, _, _, norm) in TABLE_7.items()}
assert np.round(factors[4], 1).tolist() == [21.6, 342.7] and np.round(factors[64], 2).tolist() == [1.88, 11.06]
assert round(6.91 / 0.32, 2) == 21.59
draws = [np.linalg.norm(orthonormal(rng, 96, 4).T @ W @ orthonormal(rng, 96, 4)) for _ in range(300)]
text = f"toy: √ mean square of 300 draws {np.sqrt(np.mean(np.square(draws))):.4f}"
print(text + f", predicted {np.linalg.norm(W) * 4 / 96:.4f}")
assert abs(np.sqrt(np.mean(np.square(draws))) / (np.linalg.norm(W) * 4 / 96) - 1) < 0.03
assert np.isclose(subspaces.expected_projection(W, 4), np.linalg.norm(W) * 4 / 96)

# %% [markdown]
# **Conclusion 3, the factor alone, is no evidence.** The factor is large whenever
# $\|U^\top W V\|$ is small, and a $\Delta W$ without any relation to $W$ makes that norm
# small. In the paper's own numbers a random $\Delta W$ of the same norm would have the
# factor 343 at $r = 4$, instead of 21.6. At $r = 64$ it would have 11, instead of 1.9.
#
# **The columns do show conclusion 1.** In $\Delta W$'s directions $\|U^\top W V\|$ is 16
# times as large as in random ones at $r = 4$, and 6 times at $r = 64$.
#
# **Does the table show conclusion 2?** It shows that $\Delta W$ does not repeat $W$'s
# top directions: the norms are 0.32 and 1.90, against 21.67 and 37.71. But are
# $\Delta W$'s directions ones that $W$ *has* and does not emphasize? For a third
# baseline, let $U$ and $V$ hold $r$ *pairs* of $W$, drawn at random: a left and a right
# singular vector with their value $\sigma_i$. Each pair contributes $\sigma_i^2$, whose
# mean is $\|W\|_F^2/d$, so $\|U^\top W V\|_F \approx \|W\|_F \sqrt{r/d}$.

# %%
for r, (own, largest, _, _) in TABLE_7.items():
    levels = W_NORM * r / WIDTH, own, W_NORM * np.sqrt(r / WIDTH), largest
    print("r = {:2}: random {:.3f} < ΔW's {:.2f} < pairs drawn at random {:.2f} < W's top {:.2f}".format(r, *levels))
    assert list(levels) == sorted(levels) and round(levels[2], 2) == {4: 1.12, 64: 4.47}[r]

# %% tags=["hide-input"]
# Checks: the third baseline on 2,000 draws, and the cosine of the next paragraph
sigma = np.linalg.svd(W, compute_uv=False)
pick = [np.sqrt((rng.permutation(sigma)[:4] ** 2).sum()) for _ in range(2000)]
assert abs(np.sqrt(np.mean(np.square(pick))) / (np.linalg.norm(W) * np.sqrt(4 / 96)) - 1) < 0.03
assert round(np.sqrt(0.32 / (21.67 / 2)), 2) == 0.17 and round(21.67 / 2, 1) == 10.8

# %% [markdown]
# The measured values lie between those of random directions and of random pairs. Two
# readings fit. $\Delta W$'s directions may be weak pairs of $W$. Or they may be
# unrelated to $W$ but for a slight overlap with a strong pair: with cosine $t$ on each
# side that pair contributes $t^2 \sigma_i$. $W$'s top four pairs have
# $\sigma = 21.67/2 = 10.8$ (root mean square), so $t = 0.17$ with one of them gives
# 0.32. The norm cannot tell the two readings apart, so conclusion 2 does not follow from
# Table 7.
#
# A toy shows both readings, and random directions for comparison. Its $W_0$ has the
# singular values $10/i$. An update of rank 2 with the singular values 3 and 2 is planted
# along $W_0$'s pairs 25 and 26 ("weak"), or along random directions. The cell computes
# both norms before anything is trained.

# %%
σ, draws = 10 / np.arange(1, 97), np.random.default_rng(0)  # W₀ in its own singular vectors is diag(σ)
weak, by_chance = np.hypot(σ[24], σ[25]), np.linalg.norm(σ) * 2 / 96
norms = [np.linalg.norm(orthonormal(draws, 96, 2).T * σ @ orthonormal(draws, 96, 2)) for _ in range(4000)]
print(f"weak pairs: ‖UᵀWV‖ = {weak:.3f}, factor {np.sqrt(13) / weak:.1f}")
print(f"random directions: root mean square {by_chance:.2f}, factor from it {np.sqrt(13) / by_chance:.1f}")
print(f"    median {np.median(norms):.2f}, mean factor {np.mean(np.sqrt(13) / norms):.1f}")

# %% [markdown]
# Weak pairs have $\|U^\top W V\| = 0.555$ and the factor 6.5. Random directions have a
# *larger* factor, about 20 on average. With so steep a $W_0$ and $r = 2$ the values of
# $\|U^\top W V\|$ are skewed: their root mean square is 0.27, their median 0.21, and 80 %
# of draws lie between 0.1 and 0.4. The factor from the root mean square is 13.5.
#
# The next cell builds the second reading: $r = 4$ directions, one with cosine 0.4 to
# $W_0$'s top pair on each side, the others random.


# %%
def overlapping(t, n=4):
    """n orthonormal directions: one with cosine t to the first axis, the others random and orthogonal to that axis."""
    q = orthonormal(draws, 95, n)
    return np.vstack([t * np.eye(n)[:1], q * [np.sqrt(1 - t**2), *[1] * (n - 1)]])


near = [np.linalg.norm(overlapping(0.4).T * σ @ overlapping(0.4)) for _ in range(1000)]
pairs_at_random = np.linalg.norm(σ) * np.sqrt(4 / 96)
print(f"cosine 0.4: ‖UᵀWV‖ = {np.mean(near):.2f} ± {np.std(near):.2f}; four pairs at random {pairs_at_random:.2f}")

# %% tags=["hide-input"]
# Measures: the factor of trained updates in weak and in random directions; checks the numbers above
runs = claims.run("amplification", seeds=(0, 1, 2))["amplification"]
trained_weak, trained_random = (np.array([result[key] for result in runs]) for key in ("weak", "random"))
for place, factors in (("weak", trained_weak), ("random", trained_random)):
    text = f"ΔW in {place:6} directions: factor at r = 2, 4, 64 {np.round(factors.mean(axis=0), 2)}"
    print(text + f", range at 4 {np.round(factors[:, 1], 1)}")
assert round(weak, 3) == 0.555 and round(by_chance, 2) == 0.27 and np.isclose(by_chance, runs[0]["predicted"][0])
assert all(abs(result["projected_weak"][0] / weak - 1) < 0.001 for result in runs)
low, high = np.quantile(norms, (0.1, 0.9))
assert round(np.median(norms), 2) == 0.21 and (round(low, 1), round(high, 1)) == (0.1, 0.4)
assert 19 < np.mean(np.sqrt(13) / norms) < 22 and round(np.sqrt(13) / by_chance, 1) == 13.5
assert round(np.mean(near), 1) == 1.7 and max(near) < pairs_at_random and 0.8 * np.mean(near) < 10 * 0.4**2
assert round(pairs_at_random, 1) == 2.6
frame = overlapping(0.4)
assert np.allclose(frame.T @ frame, np.eye(4)) and np.allclose(frame[0], [0.4, 0, 0, 0])
assert np.abs(trained_weak[:, 0] - 6.5).max() < 0.01 and (trained_random[:, :2] > trained_weak[:, :2]).all()
assert round(trained_weak[:, 1].mean(), 1) == 6.0 and round(trained_random[:, 1].mean(), 1) == 10.1
assert trained_weak[:, 2].max() < 0.5 and trained_random[:, 2].max() < 0.5
assert round(1.90 / 0.32, 1) == 5.9 and round(3.57 / 6.91, 1) == 0.5 and np.sqrt(64 / 4) == 4

# %% tags=["hide-input"]
# Draws: ‖UᵀWV‖ and the factor of the trained updates
directions.draw_amplification(runs)

# %% [markdown]
# The overlapping directions have $\|U^\top W V\| = 1.7$. Four random pairs have more,
# 2.6, although over 80 % of the 1.7 comes from $W_0$'s strongest pair.
#
# After training at $r = 4$ the factor is 6.0 in weak directions and 10.1 in random ones.
# At $r = 64$ both are below 0.5: beside the two planted directions $\Delta W$ has 62
# without meaning, and onto these $W_0$ projects as onto random ones.
#
# Table 7's factor falls from 21.6 at $r = 4$ to 1.9 at $r = 64$, for two reasons:
# $\|\Delta W\|$ halves, and $\|U^\top W V\|$ grows 5.9 times. Some of this growth comes
# from the larger $r$ alone. With pairs drawn at random $\|U^\top W V\|$ grows 4 times,
# and with random directions 16 times.
#
# ## 7 · The top of ΔW in the top of W (H.3)
#
# Figure 8 compares the top 4 directions of $\Delta W$ with the top 10 % of those of $W$.
# Its $\varphi$ hardly exceeds 0.2. The paper concludes that the top directions of $W$ are
# not those of $\Delta W$. One tenth of all directions holds on average one tenth of a
# random space, so chance is $1229/12288 = 0.10$, with a standard deviation of 0.0019. So
# 0.2 is twice chance, and far outside its spread. But it is small: a fifth of the space
# of $\Delta W$'s top 4 lies in the top tenth of $W$.

# %%
mean, deviation = chance(4, 1229, 12288)
print(f"GPT-3: chance {mean:.4f} ± {deviation:.4f}; 0.2 is {(0.2 - mean) / deviation:.0f} standard deviations above")

# %% tags=["hide-input"]
# Measures: the toy's φ(4, 10) with ΔW in weak and random directions and along W₀'s top two
assert round(mean, 2) == 0.10 and round(deviation, 4) == 0.0019
assert round(0.2 / mean) == 2 and round((0.2 - mean) / deviation) == 52
runs = claims.run("top_of_delta_in_w", seeds=(0, 1, 2))["top_of_delta_in_w"]
tops = {place: round(float(np.mean([result[place] for result in runs])), 3) for place in ("weak", "random", "top")}
print("toy, φ(4, 10), chance {:.3f} ± {:.3f}:".format(*chance(4, 10, 96)), tops)
assert np.round(list(tops.values()), 2).tolist() == [0.06, 0.1, 0.55] and round(chance(4, 10, 96)[0], 3) == 0.104

# %% [markdown]
# In the toy chance is 0.104. A $\Delta W$ planted along $W_0$'s weak pairs has
# $\varphi = 0.06$, less than chance. In random directions it has 0.10. Along $W_0$'s top
# two pairs it has 0.55, a little more than two directions of four.
#
# ## Where paper and code differ
#
# - Eq. 4's vectors are right-singular in §7.2, left-singular in appendix G, and "columns"
#   under the figures. `subspaces` takes the right ones for $A$ and the left ones for $B$.
# - Appendix G prints $\varphi = \frac1p(1 - \delta^2)$; $1 - \delta^2/p$ is right. At
#   $p = 8$ the printed value is too small by 0.875. Its inline formula also drops the
#   index $j$ of $U_j$.
# - Figure 4's Gaussian matrices share $n/d$ of their directions, not none.
# - Table 7's random column is $\|W\|\,r/d$: 0.0202 and 0.3227 (printed .02 and .33, from a
#   draw). The "21.5" of §7.3 is 6.91/0.32 = 21.59. §7.3's second conclusion does not
#   follow from the table.
# - Figure 8's 0.2 is 52 standard deviations above chance.
#
# ## Exercises
#
# Grading runs only the setup cell and the exercise cells: put helpers inside the latter.
#
# ### 13-1 Repair a published similarity
#
# Somebody computed similarities from correct distances with the identity that appendix G
# prints.
#
# - `printed`: float, $\frac1p(1 - \delta^2)$ with $p = \min(i, j)$; it may be negative
# - `i`, `j`: whole numbers, at least 1 and below `d`
# - `d`: the dimension
#
# Return `(phi, deviations)`: the true $\varphi(i, j)$, and how many standard deviations
# it lies above the mean of unrelated spaces of $\mathbb R^d$. Checked: both, on spaces
# with known angles, contained and orthogonal ones among them. Hint: sections 3 and 4.


# %% tags=["exercise"]
def exercise_1(printed, i, j, d):
    """(phi, deviations): the true similarity, and how far it lies above chance."""
    # BEGIN SOLUTION
    value = printed + 1 - 1 / min(i, j)
    spread = np.sqrt(2 * i * j * (d - i) * (d - j) / (d**2 * (d - 1) * (d + 2)))
    return value, (value - max(i, j) / d) * min(i, j) / spread
    # END SOLUTION


# %%
_ = grade("13-1", exercise_1)

# %% [markdown]
# ### 13-2 How many directions do two adapters share?
#
# A figure shows $\varphi(8, 64) = 0.73$ at $d = 96$. Solve section 5's formula for $k$.
#
# - `phi`: float, the measured $\varphi(i, j)$
# - `i`, `j`: whole numbers below `d`; $i + j$ may exceed `d`
# - `d`: the dimension
#
# Return $k$, a real number: how many shared directions explain `phi`, if everything else
# is unrelated. It is 0 for the $\varphi$ of chance, negative below that, and
# $\min(i, j)$ for `phi` = 1. Checked: against the formula of section 5, to six digits.
# Hint: multiply by $d - k$; what becomes of $k^2$?


# %% tags=["exercise"]
def exercise_2(phi, i, j, d):
    """How many shared directions explain φ(i, j) = phi in R^d."""
    # BEGIN SOLUTION
    # k (d − k) + (i − k)(j − k) = T (d − k) for T = φ min(i, j): the squares of k cancel
    total = phi * min(i, j)
    return (total * d - i * j) / (d - i - j + total)
    # END SOLUTION


# %%
_ = grade("13-2", exercise_2)

# %% [markdown]
# ### 13-3 Read a row of Table 7
#
# The factor alone says little. Judge a row by all its numbers, also for weights that are
# not square. $W$ and $\Delta W$ are $d_{out} \times d_{in}$; $U$ and $V$ are the top $r$
# singular vectors of $\Delta W$.
#
# - `delta_norm`, `w_norm`: floats, $\|\Delta W\|_F$ and $\|W\|_F$
# - `projected`: float above 0, $\|U^\top W V\|_F$
# - `r`, `d_out`, `d_in`: whole numbers, r ≤ min(d_out, d_in)
#
# Return `(factor, random_factor, word)`. `factor` is the amplification. `random_factor`
# is that of a $\Delta W$ of the same norm whose $U$ and $V$ are random (use the root mean
# square of $\|U^\top W V\|_F$). `word` is
#
# - `"random"` if `projected` is at most twice what random $U$ and $V$ give;
# - `"between"` if it is more than that and less than what $r$ singular pairs of $W$, drawn
#   at random, give (root mean square);
# - `"strong"` otherwise.
#
# Checked: on Table 7, on planted updates, and on wide and tall $W$. Hint: how many
# singular values does a $d_{out} \times d_{in}$ matrix have?


# %% tags=["exercise"]
def exercise_3(delta_norm, w_norm, projected, r, d_out, d_in):
    """(factor, random_factor, word) of one row of Table 7."""
    # BEGIN SOLUTION
    random = w_norm * r / np.sqrt(d_out * d_in)
    pairs = w_norm * np.sqrt(r / min(d_out, d_in))
    word = "random" if projected <= 2 * random else "between" if projected < pairs else "strong"
    return delta_norm / projected, delta_norm / random, word
    # END SOLUTION


# %%
_ = grade("13-3", exercise_3)

# %% [markdown]
# ## Summary
#
# - Unrelated spaces have $\varphi = \max(i, j)/d$ on average, not 0, and
#   $\varphi = 1 - \delta^2/p$ (`tinylora/papers/subspaces.py`,
#   `tests/papers/test_subspaces.py`).
# - Adapters of rank 8 and 64 share the two planted directions ($\varphi(2, 2) > 0.99$) and
#   nothing else beyond chance: $\varphi(8, 8)$ is 0.31, and 0.298 is predicted
#   (`tinylora/papers/claims/directions.py`, `tests/papers/test_experiments.py`).
# - A random $\Delta W$ has a larger amplification factor (343) than the paper's (21.6), so
#   the factor is no evidence.
# - 0.32 against 0.02 in Table 7 shows that $\Delta W$ is related to $W$. It does not show
#   to which of $W$'s directions.
