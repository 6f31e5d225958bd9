# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 13 · Subspaces and amplification
#
# **Which directions does an update take? LoRA answers with two numbers, a similarity $\varphi$ of subspaces and an amplification
# factor.** Both need a baseline: what would unrelated matrices give? The paper draws some (Figure 4, right; Table 7's random
# column; Figure 8's random baseline). This notebook derives them all, repairs an identity of appendix G, and reads the figures and
# the table again with the baseline beside them.
#
# Hours: 3 (2 to read and run, about 1 for the exercises). Prerequisites: singular value decomposition, orthogonal projections, trace;
# expectation and standard deviation; notebook 12 for the planted task.
#
# Accompanies LoRA (arXiv 2106.09685) §7.2 (eq. 4, Figures 3 and 4), §7.3 (Table 7), and appendices G, H.3 and H.4.
#
# Code that only measures, checks or draws is folded where the editor can fold it; its output is not.

# %% tags=["setup"]
import numpy as np
from grading import grade

from tinylora.papers import claims, subspaces
from tinylora.papers.claims import directions
from tinylora.papers.claims.directions import shared_only, trained, update
from tinylora.papers.claims.toys import Planted, orthonormal

rng = np.random.default_rng(0)

# %% [markdown]
# ## 1 · φ
#
# Take the top $i$ singular vectors of one matrix as the columns of $U_i$, the top $j$ of another as those of $U_j$, both in
# $\mathbb R^d$. Eq. 4 of the paper (§7.2), for any two matrices $X$ and $Y$:
#
# $$\varphi(X, Y, i, j) = \frac{\|U_i^\top U_j\|_F^2}{\min(i, j)} \in [0, 1] .$$
#
# The entries of $U_i^\top U_j$ are cosines between the vectors. With the projections $P_i = U_i U_i^\top$ and $P_j$ it reads
# $\|U_i^\top U_j\|_F^2 = \operatorname{tr}(P_i P_j)$: it depends on the two *spaces* only, not on the vectors chosen in them. It is
# 1 if the smaller space lies in the larger, 0 if they are orthogonal.


# %%
def phi(X, Y, i, j):
    Ui, Uj = (np.linalg.svd(M)[2][:n].T for M, n in ((X, i), (Y, j)))  # right singular vectors, as columns
    return np.linalg.norm(Ui.T @ Uj) ** 2 / min(i, j)


A, A64 = rng.standard_normal((8, 96)), rng.standard_normal((64, 96))
print("two Gaussian matrices:", {(i, j): round(float(phi(A, A64, i, j)), 4) for i, j in ((1, 1), (8, 8), (8, 64))})
assert all(abs(phi(A, A64, i, j) - subspaces.similarity(A, A64, i, j)) < 1e-12 for i, j in ((1, 1), (8, 8), (8, 64)))

# %% tags=["hide-input"]
mixed = orthonormal(rng, 8, 8) @ np.diag(np.arange(1.0, 9)) @ orthonormal(rng, 8, 8) @ A  # the same row space
apart = np.linalg.svd(A)[2][8:16]  # orthogonal to it
same, contained = phi(A, mixed, 8, 8), phi(A, np.vstack([mixed, A64]), 8, 72)
print(f"the same span {same:.12f}; contained {contained:.12f}; orthogonal {phi(A, apart, 8, 8):.1e}")
assert abs(same - 1) < 1e-12 and abs(contained - 1) < 1e-12 and phi(A, apart, 8, 8) < 1e-12

# %% [markdown]
# ## 2 · Right, left, or columns?
#
# The paper says it in three ways: *right*-singular in §7.2, *left*-singular in appendix G, "column vectors" under its figures. $A$
# is $r \times d_{in}$ (the paper's $k$). Its right singular vectors live in $\mathbb R^{d_{in}}$ and span its row space, the inputs
# that the adapter reads. Its left ones live in $\mathbb R^r$, and all $r$ of them span all of it: $\varphi(r, r) = 1$ for any two
# matrices. So the right ones are meant, for $A$. For $B$ $(d_{out} \times r)$ it is the left ones, which span what the layer writes to.

# %% tags=["hide-input"]
C = rng.standard_normal((8, 96))
left, right = (subspaces.similarity(A, C, 8, 8, side=side) for side in ("left", "right"))
print(f"φ(8, 8) of two unrelated 8 × 96 matrices: left {left:.12f}, right {right:.4f}")
assert abs(left - 1) < 1e-12 and right < 0.2
assert abs(subspaces.similarity(A.T, C.T, 8, 8, side="left") - right) < 1e-12  # B's column space is Bᵀ's row space

# %% [markdown]
# ## 3 · The projection metric, and an erratum
#
# Appendix G grounds $\varphi$ in a distance. The singular values $s_1, \dots, s_p$ of $U_i^\top U_j$, $p = \min(i, j)$, are the
# cosines of the *principal angles* between the spaces, and the projection metric (written $d$ in the appendix; elsewhere $d$ is a
# dimension) is
#
# $$d = \sqrt{p - \textstyle\sum s^2}, \qquad\text{for } i = j:\quad d^2 = \tfrac12 \|P_i - P_j\|_F^2 .$$
#
# Since $\sum s^2 = \|U_i^\top U_j\|_F^2 = p\,\varphi$, it follows that $d^2 = p\,(1 - \varphi)$, so
#
# $$\varphi = 1 - \frac{d^2}{p}, \qquad\text{whereas appendix G prints}\qquad \varphi = \frac1p\,(1 - d^2) .$$
#
# The printed value is too small by $1 - 1/p$: right for $p = 1$, and negative for unrelated spaces, which no similarity may be.

# %%
Ui, Uj = (np.linalg.svd(M)[2][:8].T for M in (A, C))
d2 = 8 - (np.linalg.svd(Ui.T @ Uj, compute_uv=False) ** 2).sum()
correct, printed, whole = 1 - d2 / 8, (1 - d2) / 8, phi(A, C, 8, 8)
print(f"φ = {whole:.6f}; 1 − d²/p = {correct:.6f}; as printed {printed:.6f}")
assert np.isclose(whole, correct, atol=1e-12) and np.isclose(printed, whole - (1 - 1 / 8), atol=1e-12) and printed < 0

# %% tags=["hide-input"]
distance = subspaces.projection_distance(A, C, 8, 8)
assert np.isclose(d2, np.linalg.norm(Ui @ Ui.T - Uj @ Uj.T) ** 2 / 2) and np.isclose(np.sqrt(d2), distance)
assert np.isclose(subspaces.similarity_from_distance(distance, 8), whole, atol=1e-12)

# %% [markdown]
# ## 4 · What is φ of unrelated spaces?
#
# Not 0. Turn one of the spaces by a uniformly random rotation $R$. The mean of $R P_i R^\top$ commutes with every rotation, so it
# is a multiple of the identity; its trace is $i$, so it is $(i/d)\,I$. Hence
#
# $$\mathrm E \operatorname{tr}(P_i P_j) = \operatorname{tr}\big(\tfrac{i}{d} P_j\big) = \frac{i j}{d},
# \qquad \mathrm E\,\varphi = \frac{i j}{d \min(i, j)} = \frac{\max(i, j)}{d} .$$
#
# The standard deviation follows in the same way. Let $M = P_i - \frac id I$ and $N = P_j - \frac jd I$; then
# $\operatorname{tr}(P_i P_j) - ij/d = \operatorname{tr}(MN)$, and $\|M\|_F^2 = i(d-i)/d$. The traceless symmetric matrices have
# $(d-1)(d+2)/2$ dimensions, and a random rotation favours none of them. So the mean square of the inner product is
# $\mathrm E \operatorname{tr}(MN)^2 = \|M\|_F^2\, \|N\|_F^2 \big/ \tfrac{(d-1)(d+2)}{2}$, and
#
# $$\text{deviation of } \varphi = \frac{1}{\min(i,j)} \sqrt{\frac{2\, i j\, (d-i)(d-j)}{d^2 (d-1)(d+2)}} .$$
#
# Both are measured on 500 pairs of Gaussian matrices.


# %%
def chance(i, j, d):
    deviation = np.sqrt(2 * i * j * (d - i) * (d - j) / (d**2 * (d - 1) * (d + 2))) / min(i, j)
    return max(i, j) / d, deviation


# %% tags=["hide-input"]
for i, j, d in ((1, 1, 96), (8, 8, 96), (8, 64, 96), (4, 16, 256)):
    drawn = [np.linalg.norm(orthonormal(rng, d, i).T @ orthonormal(rng, d, j)) ** 2 / min(i, j) for _ in range(500)]
    mean, deviation = chance(i, j, d)
    print(
        f"d = {d:3}, φ({i}, {j:2}): {np.mean(drawn):.4f} ± {np.std(drawn):.4f}; predicted {mean:.4f} ± {deviation:.4f}"
    )
    assert abs(np.mean(drawn) - mean) < 5 * deviation / np.sqrt(500) and abs(np.std(drawn) / deviation - 1) < 0.25
    assert mean == subspaces.expected_similarity(i, j, d)
for i, j in ((1, 1), (8, 8), (8, 64), (64, 64)):
    print("GPT-3, d = 12288, φ({}, {:2}) by chance: {:.5f} ± {:.5f}".format(i, j, *chance(i, j, 12288)))
assert round(chance(1, 1, 12288)[0], 5) == 0.00008 and round(chance(8, 64, 12288)[0], 4) == 0.0052

# %% [markdown]
# At GPT-3's width chance is nearly nothing: a $\varphi(1, 1)$ above 0.5, as Figure 3 reports, stands against 0.00008. On a toy of
# $d = 96$ chance nearly fills the picture: $\varphi(8, 64) = 0.67$ without any relation. Whoever repeats the figure on a small
# model must subtract it. And $d$ is the dimension in which the spaces are free: if the inputs span only $m < d$ dimensions, what SGD
# adds to $A$ lies there. If $A_0$ is negligible beside it (or subtracted), chance is $\max(i, j)/m$.
#
# ## 5 · Figures 3 and 4
#
# Adapters of rank 8 and 64 are trained on one task with a planted rank-2 update (notebook 12: $d = 96$, singular values 3 and 2).
# If they share the $k = 2$ planted directions and nothing else, the other $i - k$ and $j - k$ are unrelated spaces of the remaining
# $d - k$ dimensions, so
#
# $$\mathrm E\,\varphi = \frac{1}{\min(i, j)}\Big(k + \frac{(i - k)(j - k)}{d - k}\Big) .$$


# %%
def shared(i, j, d, k):
    return (k + (i - k) * (j - k) / (d - k)) / min(i, j)


# %% tags=["hide-input"]
pairs = ((1, 1), (2, 2), (8, 8), (8, 64))
runs = claims.run("subspace_overlap", seeds=(0, 1, 2))["subspace_overlap"]
found = np.array([result["phi"] for result in runs])
for n, (i, j) in enumerate(pairs):
    k = min(2, i)
    print(
        f"φ({i}, {j:2}): three seeds {np.round(found[:, n], 3)}; chance {chance(i, j, 96)[0]:.3f}; sharing {k} {shared(i, j, 96, k):.3f}"
    )
    assert shared(i, j, 96, k) == shared_only(i, j, 96, 2)
assert found[:, 0].min() > 0.88 and found[:, 1].min() > 0.994
assert all(np.abs(found[:, n] - shared(*pairs[n], 96, 2)).max() < 0.02 for n in (1, 2, 3))

# %% tags=["hide-input"]
directions.draw_similarity_maps()

# %% [markdown]
# The left map looks like the paper's Figure 3: a bright corner at the first directions. What the bright *bands* say becomes clear
# beside chance $c$: $(\varphi - c)/(1 - c)$ is 0 for unrelated spaces and 1 if the smaller lies in the larger.
# $\varphi(8, 8) = 0.31$ is well above chance (0.083), yet the six directions beyond the planted two share nothing: two shared
# and six unrelated give 0.298. $\varphi(8, 64) = 0.73$ looks impressive and is chance (0.67) plus the same two. In this toy,
# then, the paper's reading is right: the shared directions are the useful ones, and the rest is noise. But only the value
# above the baseline says so.
#
# Two traps. First, $\varphi(1, 1)$ asks whether the *order* of the directions agrees. Plant two equal singular values, and it is
# anything, while $\varphi(2, 2)$ does not notice.

# %% tags=["hide-input"]
for singular in ((3.0, 2.0), (2.5, 2.5)):
    ones, twos = [], []
    for seed in range(4):
        task = Planted(singular, seed=seed)
        small, large = (trained(task, r, s).lora_A.weight.data for r, s in ((8, seed), (64, seed + 1000)))
        ones.append(subspaces.similarity(small, large, 1, 1))
        twos.append(subspaces.similarity(small, large, 2, 2))
    print(f"planted {singular}: φ(1, 1) of four seeds {np.round(ones, 2)}, φ(2, 2) {np.round(twos, 3)}")
    assert min(twos) > 0.99 and (min(ones) > 0.85 if singular[0] == 3 else min(ones) < 0.1 and max(ones) > 0.9)

# %% [markdown]
# Second, Figure 4's control. It shows two seeds at $r = 64$ and, on the right, two Gaussian matrices, which are said to share no
# directions. They share $n/d$ of them: nearly none at GPT-3's width, but 0.17 at $d = 96$ and $n = 16$, beside 0.27 for the seeds.

# %% tags=["hide-input"]
runs = claims.run("two_seeds", seeds=(0, 1, 2))["two_seeds"]
seeds, gaussian = (np.mean([result[key] for result in runs], axis=0) for key in ("phi", "gaussian"))
for n, a, b in zip((1, 2, 16, 64), seeds, gaussian, strict=True):
    print(
        f"φ({n}, {n}): two seeds {a:.3f}; Gaussian {b:.3f}; n/d {n / 96:.3f}; sharing two {shared(n, n, 96, min(n, 2)):.3f}"
    )
assert seeds[1] > 0.999 and round(seeds[2], 2) == 0.27 and round(gaussian[2], 2) == 0.17
assert np.abs(gaussian - np.array([1, 2, 16, 64]) / 96).max() < 0.01 and abs(seeds[3] - gaussian[3]) < 0.01

# %% [markdown]
# ## 6 · Amplification, and Table 7
#
# Does $\Delta W$ repeat what $W$ does already, or bring something new? §7.3 projects $W$ onto the top $r$ singular directions of
# $\Delta W$, $U$ on the left and $V$ on the right, and compares norms:
#
# $$\text{factor} = \frac{\|\Delta W\|_F}{\|U^\top W V\|_F} .$$
#
# (The paper writes $U^\top W V^\top$, with the vectors as the rows of $V$.)

# %%
task = Planted()
delta, W, r = update(trained(task, 4, 0)), task.w0, 4
U, s, Vt = np.linalg.svd(delta)
projected = np.linalg.norm(U[:, :r].T @ W @ Vt[:r].T)
factor = np.linalg.norm(delta) / projected
found = subspaces.amplification(delta, W, r)
print(f"‖ΔW‖ = {np.linalg.norm(delta):.3f}, ‖UᵀWV‖ = {projected:.3f}, factor {factor:.2f}")
assert np.isclose(projected, found.projected) and np.isclose(factor, found.factor)

# %% [markdown]
# Table 7 (GPT-3, layer 48, $W_q$; published) lists $\|U^\top W V\|_F$ for $U, V$ from $\Delta W$, from $W$ itself, and from a
# random matrix, and §7.3 concludes three things: (1) $\Delta W$ is more related to $W$ than a random matrix is; (2) it amplifies
# directions that $W$ does not emphasize; (3) the factor is huge, $21.5 \approx 6.91/0.32$ at $r = 4$. The paper's random column, a
# drawn baseline, can also be derived. By the argument of section 4, once for each side,
#
# $$\mathrm E\,\|U^\top W V\|_F^2 = \mathrm E \operatorname{tr}(P_U W P_V W^\top) = \frac{r}{d} \cdot \frac{r}{d}\, \|W\|_F^2,
# \qquad\text{so}\quad \|U^\top W V\|_F \approx \|W\|_F\, \frac{r}{d} .$$
#
# With $\|W\|_F = 61.95$ and $d = 12288$ this is 0.0202 and 0.3227; printed are .02 and .33, from a draw.

# %%
W_NORM, WIDTH = 61.95, 12288  # published
TABLE_7 = {4: (0.32, 21.67, 0.02, 6.91), 64: (1.90, 37.71, 0.33, 3.57)}  # from ΔW, from W, random; ‖ΔW‖
for r, (own, _, drawn, norm) in TABLE_7.items():
    random = W_NORM * r / WIDTH
    print(f"r = {r:2}: random {random:.4f} (printed {drawn}); factor {norm / own:.2f}, random {norm / random:.1f}")
    assert abs(random - drawn) < 0.008 and round(random, 4) == {4: 0.0202, 64: 0.3227}[r]

# %% tags=["hide-input"]
factors = {r: (norm / own, norm * WIDTH / (W_NORM * r)) for r, (own, _, _, norm) in TABLE_7.items()}
assert np.round(factors[4], 1).tolist() == [21.6, 342.7] and np.round(factors[64], 2).tolist() == [1.88, 11.06]
draws = [np.linalg.norm(orthonormal(rng, 96, 4).T @ W @ orthonormal(rng, 96, 4)) for _ in range(300)]
print(
    f"toy: √ mean square of 300 draws {np.sqrt(np.mean(np.square(draws))):.4f}, predicted {np.linalg.norm(W) * 4 / 96:.4f}"
)
assert abs(np.sqrt(np.mean(np.square(draws))) / (np.linalg.norm(W) * 4 / 96) - 1) < 0.03
assert np.isclose(subspaces.expected_projection(W, 4), np.linalg.norm(W) * 4 / 96)

# %% [markdown]
# **The factor alone, (3), is no evidence.** It is large whenever $\|U^\top W V\|$ is small, and for a $\Delta W$ without any
# relation to $W$ that is smallest of all: in the paper's own numbers a random $\Delta W$ of the same norm would be "amplified" 343
# times at $r = 4$ and 11 times at $r = 64$, instead of 21.6 and 1.9. What Table 7 does show is in its columns. In $\Delta W$'s
# directions $W$ is 16 times (at $r = 64$: 6 times) as large as in random ones: (1) holds.
#
# And (2)? That $\Delta W$ does not repeat $W$'s top directions, it shows: 0.32 and 1.90, against 21.67 and 37.71. But are they
# directions that $W$ *has* and does not emphasize? As a third reference let $U$ and $V$ be $r$ singular pairs of $W$ itself, chosen
# blindly. Each pair contributes its $\sigma_i^2$, whose mean is $\|W\|_F^2/d$, so
#
# $$\|U^\top W V\|_F \approx \|W\|_F \sqrt{r/d}
# \quad\text{for singular pairs of } W \text{ chosen at random:}\quad 1.12 \text{ at } r = 4,\ 4.47 \text{ at } r = 64 .$$
#
# The measured values lie between random and blind, and that leaves two readings open: weak pairs of $W$, or directions unrelated to
# $W$ but for a slight overlap with a strong pair. With cosine $t$ on each side a pair contributes $t^2 \sigma_i$. $W$'s top four have
# $\sigma = 21.67/2 = 10.8$ (root mean square), so $t = 0.17$ with one of them gives 0.32. The norm cannot tell, so (2) does not
# follow from Table 7. Section 7 looks at the overlap itself.

# %% tags=["hide-input"]
for r, (own, largest, _, _) in TABLE_7.items():
    levels = W_NORM * r / WIDTH, own, W_NORM * np.sqrt(r / WIDTH), largest
    print("r = {:2}: random {:.3f} < ΔW's {:.2f} < blind pairs {:.2f} < W's top {:.2f}".format(r, *levels))
    assert list(levels) == sorted(levels) and round(levels[2], 2) == {4: 1.12, 64: 4.47}[r]
    print(f"        ΔW's / random {own / levels[0]:.1f}")
    assert round(own / levels[0]) == {4: 16, 64: 6}[r]
sigma = np.linalg.svd(W, compute_uv=False)
pick = [np.sqrt((rng.permutation(sigma)[:4] ** 2).sum()) for _ in range(2000)]
assert abs(np.sqrt(np.mean(np.square(pick))) / (np.linalg.norm(W) * np.sqrt(4 / 96)) - 1) < 0.03

assert round(np.sqrt(0.32 / (21.67 / 2)), 2) == 0.17 and round(21.67 / 2, 1) == 10.8

# %% [markdown]
# The toy has a $W_0$ with singular values $10/i$, and rank-2 updates planted along its singular pairs 25 and 26 ("weak", $\sigma$ =
# 0.40 and 0.38) or along random directions. For the weak ones $\|U^\top W V\| = \sqrt{0.40^2 + 0.38^2} = 0.555$ and the factor
# $\sqrt{13}/0.555 = 6.5$ are known beforehand. For random ones the root mean square of $\|U^\top W V\|$ is 0.27, so the factor is
# *larger*. With so steep a $W$ and $r = 2$ the law is skewed: the median is 0.21, 80 % of draws lie between 0.1 and 0.4, and the
# mean factor is about 20, where the root mean square gives 13.5. And directions with cosine 0.4 to $W$'s top pair ($r = 4$, the other
# three random) have 1.7, less than four blind pairs (2.6), though $W$'s strongest pair is most of it.

# %% tags=["hide-input"]
runs = claims.run("amplification", seeds=(0, 1, 2))["amplification"]
for place in ("weak", "random"):
    factors = np.array([result[place] for result in runs])
    print(
        f"ΔW in {place:6} directions: factor at r = 2, 4, 64 {np.round(factors.mean(axis=0), 2)}, range at 4 {np.round(factors[:, 1], 1)}"
    )
weak, random = (np.array([result[key] for result in runs]) for key in ("weak", "random"))
expected, by_chance = np.hypot(10 / 25, 10 / 26), runs[0]["predicted"][0]
print(f"weak pairs: ‖UᵀWV‖ at r = 2 {runs[0]['projected_weak'][0]:.4f}, predicted {expected:.4f}")
steep = 10 / np.arange(1, 97)  # W in its own singular vectors is diag(steep)
draws = np.random.default_rng(0)
norms = [np.linalg.norm(orthonormal(draws, 96, 2).T * steep @ orthonormal(draws, 96, 2)) for _ in range(4000)]
middle, low, high = np.median(norms), *np.quantile(norms, (0.1, 0.9))
print(f"random directions: root mean square {by_chance:.4f}, median {middle:.3f}, 10 to 90 % {low:.3f} to {high:.3f}")
print(f"    mean factor {np.mean(np.sqrt(13) / norms):.1f}, by the root mean square {np.sqrt(13) / by_chance:.1f}")
assert round(middle, 2) == 0.21 and (round(low, 1), round(high, 1)) == (0.1, 0.4)
assert 19 < np.mean(np.sqrt(13) / norms) < 22 and round(np.sqrt(13) / by_chance, 1) == 13.5


def overlapping(t, n=4):
    """n orthonormal directions: one with cosine t to the first axis, the others random and orthogonal to that axis and to it."""
    q = orthonormal(draws, 95, n)
    return np.vstack([t * np.eye(n)[:1], q * [np.sqrt(1 - t**2), *[1] * (n - 1)]])


near = [np.linalg.norm(overlapping(0.4).T * steep @ overlapping(0.4)) for _ in range(1000)]
blind = np.linalg.norm(steep) * np.sqrt(4 / 96)
print(f"cosine 0.4 to W's top pair: ‖UᵀWV‖ {np.mean(near):.2f} ± {np.std(near):.2f}; four blind pairs {blind:.2f}")
assert round(np.mean(near), 1) == 1.7 and max(near) < blind and 0.8 * np.mean(near) < 10 * 0.4**2
frame = overlapping(0.4)
assert np.allclose(frame.T @ frame, np.eye(4)) and np.allclose(frame[0], [0.4, 0, 0, 0])
assert all(abs(result["projected_weak"][0] / expected - 1) < 0.001 for result in runs) and round(expected, 3) == 0.555
assert np.abs(weak[:, 0] - 6.5).max() < 0.01 and round(by_chance, 2) == 0.27
assert (
    round(weak[:, 1].mean(), 1) == 6.0 and round(random[:, 1].mean(), 1) == 10.1 and (random[:, :2] > weak[:, :2]).all()
)
assert weak[:, 2].max() < 0.5 and random[:, 2].max() < 0.5

# %% tags=["hide-input"]
directions.draw_amplification(runs)

# %% [markdown]
# At $r = 4$ the factor is 6.0 in weak directions and 10.1 in random ones; at $r = 64$ both fall below 0.5, because the 62
# directions without meaning project onto $W$ as random ones do. So read the fall in Table 7, 21.6 to 1.9: $\|\Delta W\|$ halves,
# and $\|U^\top W V\|$ grows 5.9 times. Some growth is forced: from $r = 4$ to 64, 4 times for blind pairs and 16 times for random
# directions.
#
# ## 7 · H.3: the top of ΔW in the top of W
#
# Figure 8 compares the top 4 directions of $\Delta W$ with the top 10 % of those of $W$: $\varphi$ hardly exceeds 0.2, which is
# read as: the top directions of $W$ are not those of $\Delta W$. The figure has a random baseline, and it can be derived: one
# tenth of all directions holds one tenth of any random space: $\mathrm E\,\varphi = 1229/12288 = 0.10$. So 0.2 is *twice* chance,
# not near 0. It is no accident either, for the standard deviation of chance is 0.0019. As a size it is small: a fifth of the
# space of $\Delta W$'s top 4 lies in the top tenth of $W$, and luck alone would put a tenth there. The toy sees all cases.

# %% tags=["hide-input"]
mean, deviation = chance(4, 1229, 12288)
print(f"GPT-3: chance {mean:.4f} ± {deviation:.4f}; 0.2 is {(0.2 - mean) / deviation:.0f} standard deviations above")
assert (
    round(mean, 2) == 0.10
    and round(deviation, 4) == 0.0019
    and round(0.2 / mean) == 2
    and round((0.2 - mean) / deviation) == 52
)
runs = claims.run("top_of_delta_in_w", seeds=(0, 1, 2))["top_of_delta_in_w"]
tops = {place: np.mean([result[place] for result in runs]) for place in ("weak", "random", "top")}
print(
    "toy, φ(4, 10), chance {:.3f} ± {:.3f}:".format(*chance(4, 10, 96)),
    {place: round(float(v), 3) for place, v in tops.items()},
)
assert np.round(list(tops.values()), 2).tolist() == [0.06, 0.1, 0.55] and round(chance(4, 10, 96)[0], 3) == 0.104

# %% [markdown]
# Planted along $W$'s weak pairs $\Delta W$ has 0.06, less than chance; in random directions 0.10, chance; along $W$'s top two 0.55,
# a little above the two of four.
#
# ## Where paper and code differ
#
# - Eq. 4's vectors are right-singular in §7.2, left-singular in appendix G and "columns" under the figures. Of two unrelated $A$ of
#   8 × 96 the left ones give $\varphi(8, 8) = 1$ (section 2). `subspaces` takes the right ones, for $B$ the left. Appendix G's
#   inline formula also loses the $j$ of $U_j$.
# - Appendix G: $\varphi = \frac1p(1 - d^2)$ is printed; $1 - d^2/p$ is right. For $p = 8$ the printed value is too small by 0.875
#   (section 3).
# - Figure 4: Gaussian matrices do share directions, $n/d$ of them: 0.0013 at $n = 16$ and $d = 12288$, but 0.17 at $d = 96$.
# - Table 7: the random column is $\|W\|\,r/d$, 0.0202 and 0.3227 (printed .02, .33). "21.5" is 6.91/0.32 = 21.59. A random
#   $\Delta W$ of that norm has a larger factor, 343 (section 6).
# - §7.3's (2) does not follow from Table 7: a cosine of 0.17 to a pair with $\sigma = 10.8$ gives its 0.32 (section 6).
# - H.3: 0.2 is twice chance, and 52 standard deviations above it (section 7).

# %% tags=["hide-input"]
assert round(1.90 / 0.32, 1) == 5.9 and round(3.57 / 6.91, 1) == 0.5 and np.sqrt(64 / 4) == 4
assert 1 - 1 / 8 == 0.875 and round(chance(16, 16, 12288)[0], 4) == 0.0013 and round(6.91 / 0.32, 2) == 21.59

# %% [markdown]
# ## Exercises
#
# For grading only the setup cell and the exercise cells are run: put helpers inside the exercise's cell.
#
# ### 13-1 Repair a published similarity
#
# Somebody computed similarities with the identity that appendix G prints, from correct distances.


# %% tags=["exercise"]
def exercise_1(printed, i, j, d):
    """Return (phi, deviations): the true φ(i, j), and how many standard deviations it lies above that of unrelated spaces of R^d.

    printed    (1/p)(1 − distance²), p = min(i, j), with the right projection distance. May be negative.

    Checked on subspaces with known angles, contained and orthogonal ones among them; i and j below d.
    """
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
# A figure shows $\varphi(8, 64) = 0.73$ at $d = 96$. Turn section 5's formula around.


# %% tags=["exercise"]
def exercise_2(phi, i, j, d):
    """Return k, a real number: how many shared directions explain φ(i, j) = phi in R^d, if everything else is unrelated.

    0 for the φ of chance; below 0 if phi is smaller than that; min(i, j) for phi = 1. i + j may exceed d; i and j are below d.
    """
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
# The factor alone says little. Decide from all pieces, and for weights that are not square.


# %% tags=["exercise"]
def exercise_3(delta_norm, w_norm, projected, r, d_out, d_in):
    """Return (factor, random_factor, word) for one layer, W and ΔW of d_out × d_in, r ≤ min(d_out, d_in).

    delta_norm, w_norm    ‖ΔW‖_F and ‖W‖_F
    projected             ‖UᵀWV‖_F > 0, U (d_out, r) and V (d_in, r) the top singular vectors of ΔW
    factor                the amplification
    random_factor         what it would be for a ΔW of the same norm with random U and V (with the root mean square of ‖UᵀWV‖_F)
    word                  "random"  if projected is at most twice what random U and V give;
                          "between" otherwise, if it is below what r singular pairs of W, chosen blindly, give (root mean square);
                          "strong"  otherwise

    How many singular pairs with a σ of its own has a d_out × d_in matrix? Checked on Table 7, and on planted updates.
    """
    # BEGIN SOLUTION
    random = w_norm * r / np.sqrt(d_out * d_in)
    blind = w_norm * np.sqrt(r / min(d_out, d_in))
    word = "random" if projected <= 2 * random else "between" if projected < blind else "strong"
    return delta_norm / projected, delta_norm / random, word
    # END SOLUTION


# %%
_ = grade("13-3", exercise_3)

# %% [markdown]
# ## Summary
#
# $\varphi$ of unrelated spaces is $\max(i, j)/d$, not 0, and $1 - d^2/p$ (not appendix G's $\frac1p(1 - d^2)$) ties it to the
# projection metric. Adapters of rank 8 and 64 share the two planted directions ($\varphi(2, 2) > 0.99$) and, beyond them, chance:
# 0.31 at (8, 8), predicted 0.298. Table 7's random column is $\|W\| r/d$; by it a random $\Delta W$ has a factor of 343, so 21.5
# is no evidence, while 0.32 against 0.02 is, of some relation to $W$ and not of which. Library: `subspaces.similarity`,
# `expected_similarity`, `amplification`, `expected_projection`; tests: `tests/papers/test_subspaces.py`,
# `tests/papers/test_experiments.py`. Next: notebook 14, scales and learning rates.
