# %% [markdown]
# # 14 · Scaling and learning rates (appendix)
#
# [← 13 Subspaces and amplification](13_subspaces_and_amplification.ipynb) · [All notebooks](README.md) · [15 Switching and combining adapters →](15_switching_and_combining.ipynb)
#
# **Question.** What do LoRA's scale, the size of its initial weights and its learning
# rates do to a run?
#
# **You will be able to**
#
# - predict how the first step grows with the rank, under SGD and under Adam
# - exchange α, the size of $A_0$ and the learning rates without changing a run
# - say what the ratio of LoRA's best rate to full fine-tuning's depends on
#
# **Needs:** the gradients of the two factors ([03](03_the_bypass.ipynb), section 2);
# Adam's update; the mean and variance of a uniform variable.
#
# **Hours:** 3 (1½ to read and run, 1½ for the exercises).
#
# **Papers:** LoRA §4.1 and Table 12; rsLoRA (arXiv 2312.03732); "LoRA Without
# Regret"; LoRA+ (arXiv 2402.12354). Settled: why LoRA divides α by r (LoRA issue 101,
# LLMs-from-scratch 821).
#
# Folded cells measure, check or draw. Click ••• to open one.

# %% tags=["setup"]
import numpy as np
from drawings.nb14 import exchange
from grading import grade

import tinylora as tl
from tinylora.papers.claims import dynamics, toys
from tinylora.papers.claims.registry import above
from tinylora.training import finetune

rng = np.random.default_rng(0)
SEEDS = (0, 1, 2)

# %% [markdown]
# ## 1 · The first step
#
# LoRA computes $h = Wx$ with $W = W_0 + s\,BA$ and $s = α/r$, and starts from $B_0 = 0$.
# The released code draws $A_0$ ($r × d$) uniformly between $±1/\sqrt d$, so each entry
# has the variance $σ_A^2 = 1/(3d)$.
#
# Let $L$ be the loss, $G = ∂L/∂W$ and η the learning rate. At the first step the gradient
# of $A$ is $sB_0^\top G = 0$. Only $B$ moves, and its gradient is $g = s\,GA_0^\top$. SGD
# moves $B$ by $-ηg$, and Adam by $-η\,\mathrm{sign}(g)$:


# %%
def sgd(g):
    """The first step of SGD, divided by −η."""
    return g


def adam(g):
    """The first step of Adam with ε = 0, divided by −η."""
    m, v = 0.1 * g, 0.001 * g * g  # the two running averages, which start at 0
    m_hat, v_hat = m / (1 - 0.9), v / (1 - 0.999)
    return m_hat / np.sqrt(v_hat)  # g / |g|: the sign of g


def first_step(G, r, power, rule, alpha=16.0):
    """ΔW₁ from a fresh A₀ at η = 1, with the scale s = α / r^power."""
    A = rng.uniform(-1, 1, (r, len(G))) / np.sqrt(len(G))
    s = alpha / r**power  # power 1: LoRA's α/r; ½: rsLoRA's α/√r
    B = -rule(s * G @ A.T)
    return s * B @ A


# %% [markdown]
# The step of $W$ is $ΔW_1 = s\,B_1A_0$. Under SGD it contains $s$ twice, once through
# $g$:
#
# $$\text{SGD: } ΔW_1 = -η\,s^2\,GA_0^\top A_0, \qquad
# \text{Adam: } ΔW_1 = -η\,s\,\mathrm{sign}(GA_0^\top)\,A_0.$$
#
# To first order the loss falls by the *gain*
# $⟨-ΔW_1, G⟩ = -\sum_{ij} (ΔW_1)_{ij}G_{ij}$:
#
# $$\text{SGD: } η\,s^2\,‖GA_0^\top‖_F^2, \qquad
# \text{Adam: } η\,s\,\sum_{ik}|GA_0^\top|_{ik}.$$
#
# Both are sums over the $r$ rows of $A_0$, with the same expectation for every row. So
# the expected gain is proportional to $s^2r$ under SGD and to $sr$ under Adam. Since
# $E[A_0^\top A_0] = rσ_A^2\,I$, SGD's is
#
# $$E⟨-ΔW_1, G⟩ = η\,s^2\,\frac{r}{3d}\,‖G‖_F^2.$$
#
# Here is the measured gain for a Gaussian $G$ of 256 × 256 (means over 8 draws of $A_0$):

# %% tags=["hide-input"]
# Measures: the gain at each rank over the gain at r = 1, against the predicted power of r.
d, ranks, draws = 256, np.array([1, 4, 16, 64, 256]), 8
G = rng.standard_normal((d, d))
RULES = {"SGD, α/r": (1, sgd), "SGD, α/√r": (0.5, sgd), "Adam, α/r": (1, adam), "Adam, α/√r": (0.5, adam)}
gain, norm = {}, {}
print(f"{'gain over that at r = 1':25}" + "".join(f"{f'r = {r}':>10}" for r in ranks) + "   theory")
for (name, (power, rule)), theory in zip(RULES.items(), (-1, 0, 0, 0.5), strict=True):
    steps = [[first_step(G, r, power, rule) for _ in range(draws)] for r in ranks]
    gain[name] = np.array([np.mean([-(D * G).sum() for D in row]) for row in steps])
    norm[name] = np.sqrt([np.mean([(D * D).sum() for D in row]) for row in steps])
    relative = gain[name] / gain[name][0]
    print(f"{name:25}" + "".join(f"{g:10.4f}" for g in relative) + f"   r^{theory:g}")
    assert np.allclose(relative, ranks.astype(float) ** theory, rtol=0.15)  # at r = 1 a draw is one row, so it is noisy
expected = 16**2 / ranks**2 * ranks / (3 * d) * (G * G).sum()
print(f"SGD, α/r: gain / (s² r/(3d) ‖G‖²) = {np.round(gain['SGD, α/r'] / expected, 3)}")
assert np.allclose(gain["SGD, α/r"] / expected, 1, atol=0.12)

# %% tags=["hide-input"]
# Checks: one step of SGD and one of the library's AdamW (ε = 0) move a LoRALinear by the two formulas.
worst = 0.0
for power in (1, 0.5):
    task = toys.Planted("full", d=64, n=512)
    layer = tl.lora.LoRALinear(task.base(), r=8, alpha=16, use_rslora=power == 0.5)
    A, B, s = layer.lora_A.weight.data.astype(float), layer.lora_B.weight, 16 / 8**power
    full = toys.linear(task.w0, trainable=True)
    toys.squared_error(full(tl.Tensor(task.x)), task.y).backward()
    g = full.weight.grad.astype(float)
    toys.squared_error(layer(tl.Tensor(task.x)), task.y).backward()
    assert layer.scaling == s and not layer.lora_A.weight.grad.any()
    for name, formula in (("SGD", -0.1 * s * s * g @ A.T @ A), ("Adam", -1e-3 * s * np.sign(g @ A.T) @ A)):
        B.data[:] = 0
        if name == "SGD":
            B.data -= 0.1 * B.grad
        else:
            tl.AdamW([B], lr=1e-3, eps=0.0).step()
        worst = max(worst, np.abs(layer.delta() - formula).max() / np.abs(formula).max())
print(f"the layer's ΔW₁ and the formula differ by at most {worst:.0e} of the formula's largest entry")
assert worst < 1e-5

# %% [markdown]
# The figure repeats this with a regression's gradient and three seeds. Its right half
# belongs to section 2.

# %% tags=["hide-input"]
# Draws: the gain and the size of the first step of a regression, against r.
results = [dynamics.first_step(seed) for seed in SEEDS]
table = {key: np.mean([r[key] for r in results], axis=0) for key in results[0] if key != "ranks"}
assert results[0]["ranks"] == ranks.tolist()
assert [f"{g:.3f}" for g in table["sgd_r"]] == ["1.000", "0.255", "0.064", "0.016", "0.004"]
assert np.abs(table["sgd_rs"] - 1).max() < 0.04 and np.abs(table["adam_r"] - 1).max() < 0.04
assert np.allclose(table["adam_rs"], [1, 2, 4, 8, 16], rtol=0.04) and f"{table['adam_rs'][-1]:.1f}" == "16.3"
assert f"{table['sgd_rs'][-1]:.2f} {table['adam_r'][-1]:.2f}" == "1.03 1.02"
sizes = table["adam_rs_size"][-2], table["adam_rs_size"][-1], 1 / table["adam_r_size"][-1]
assert "{:.2f} {:.2f} {:.1f}".format(*sizes) == "1.08 1.28 12.6"
dynamics.draw_first_step(results)

# %% [markdown]
# This answers why LoRA scales by α/r. LoRA §4.1 speaks of Adam, and **under Adam α/r
# makes the first step's gain independent of r**. The gain at $r = 256$ over that at
# $r = 1$ is:
#
# | | SGD | Adam |
# |---|---|---|
# | α/r | .004 | 1.02 |
# | α/√r | 1.03 | 16.3 |
#
# rsLoRA scales by α/√r. Its abstract says that α/r slows the learning of large ranks.
# Measured by the gain, this is true of SGD and false of Adam.
#
# ## 2 · The norm of the same step
#
# rsLoRA uses another measure. It calls an adapter *rank-stabilized* if the moments of its
# outputs, and of the gradients on the way back, neither shrink nor grow with r
# (definition 3.1, from notes on the paper). For an input $x ∼ N(0, I)$ that is
# independent of the batch, $E‖ΔW_1x‖^2 = ‖ΔW_1‖_F^2$, so this measure is the norm.
#
# $ΔW_1$ is a sum of $r$ terms, one for each random row of $A_0$, and only a part of this
# sum lies along $G$. So the norm follows another law than the gain.
#
# **SGD.** $‖GA_0^\top A_0‖_F^2 = \mathrm{tr}\,G\,(A_0^\top A_0)^2\,G^\top$, so
# $E(A_0^\top A_0)^2$ is needed. Let the vectors $a_1 … a_r$ be the rows of $A_0$. Then
# $A_0^\top A_0 = \sum_k a_ka_k^\top$, and its square is a sum over pairs $(k, l)$:
#
# - In the $r(r-1)$ pairs with $k ≠ l$ the two vectors are independent:
#   $E\,a_ka_k^\top a_la_l^\top = σ_A^4\,I$.
# - The $r$ terms with $k = l$ are $‖a‖^2\,aa^\top$. Their mean off the diagonal is 0,
#   since each entry is symmetric about 0. On the diagonal it is
#   $E\,a_i^4 + \sum_{j≠i}E\,a_j^2a_i^2 = \tfrac95σ_A^4 + (d-1)\,σ_A^4$. The factor
#   $\tfrac95$ belongs to the uniform law; a normal law has 3.
#
# Together $E(A_0^\top A_0)^2 = σ_A^4\,r\,\big[(r-1) + \tfrac95 + (d-1)\big]\,I$, which
# gives
#
# $$\text{SGD: } E‖ΔW_1‖_F^2 = η^2s^4σ_A^4\,r\,(d + r - \tfrac15)\,‖G‖_F^2 .$$
#
# **Adam.** Let $g$ now be a row of $G$. The same row of $ΔW_1$ is
# $-ηs\sum_k \mathrm{sign}(g·a_k)\,a_k$, and its squared norm is again a sum over pairs:
#
# - The $r$ terms with $k = l$ have the mean $E‖a_k‖^2 = dσ_A^2$.
# - The $r(r-1)$ others have the mean $‖c‖^2$ by independence, where
#   $c = E[\mathrm{sign}(g·a)\,a]$ for one row $a$.
#
# Split $a$ into its part along $g$ and the rest. For a normal $a$ the rest is independent
# of the sign and has the mean 0. The part along $g$ has the law $N(0, σ_A^2)$ and the
# mean magnitude $σ_A\sqrt{2/π}$. Then $c = σ_A\sqrt{2/π}\;g/‖g‖$. For a uniform $a$ this
# holds nearly, since $g·a$ is a sum of $d$ terms. The sum over the $d_{\text{out}}$ rows
# of $G$ is
#
# $$\text{Adam: } E‖ΔW_1‖_F^2 ≈
# η^2s^2σ_A^2\,r\,\big(d + \tfrac2π(r-1)\big)\,d_{\text{out}} .$$

# %%
σ_A = np.sqrt(1 / (3 * d))
a = np.random.default_rng(1).uniform(-1, 1, (20_000, d)) / np.sqrt(d)
g = G[0]
c = (np.sign(a @ g)[:, None] * a).mean(axis=0)
print(f"c along g: {c @ g / np.linalg.norm(g) / σ_A:.3f} σ_A, predicted {np.sqrt(2 / np.pi):.3f} σ_A")
assert abs(c @ g / np.linalg.norm(g) / (σ_A * np.sqrt(2 / np.pi)) - 1) < 0.03


def sgd_norm(s, r):
    """√E‖ΔW₁‖² at η = 1; exact."""
    return s**2 * σ_A**2 * np.sqrt(r * (d + r - 1 / 5)) * np.linalg.norm(G)


def adam_norm(s, r):
    """√E‖ΔW₁‖² at η = 1; G has d rows."""
    return s * σ_A * np.sqrt(r * (d + 2 / np.pi * (r - 1)) * d)


# %% tags=["hide-input"]
# Measures: the norms of section 1's steps against the two formulas, the cosine with G, the −1/5 and the scale α/r^¼.
print(f"{'norm over that at r = 1':25}" + "".join(f"{f'r = {r}':>10}" for r in ranks))
for name, (power, rule) in RULES.items():
    predicted = (sgd_norm if rule is sgd else adam_norm)(16 / ranks**power, ranks)
    print(f"{name:25}" + "".join(f"{n:10.4f}" for n in norm[name] / norm[name][0]))
    assert np.allclose(norm[name], predicted, rtol=0.05)
for name in ("SGD, α/r", "Adam, α/r"):
    cosine = gain[name] / norm[name] / np.linalg.norm(G)
    print(f"cosine of −ΔW₁ and G, {name[:4].rstrip(','):4}" + "".join(f"{c:10.3f}" for c in cosine))
    if name[0] == "S":
        assert np.allclose(cosine, np.sqrt(ranks / (d + ranks - 0.2)), atol=0.01)
flat = norm["Adam, α/√r"] / norm["Adam, α/√r"][0]
fall = norm["Adam, α/r"] / norm["Adam, α/r"][0]
small = rng.uniform(-1, 1, (200_000, 2, 3)) / np.sqrt(3)  # d = 3, r = 2, where the −1/5 can be seen
gram = np.swapaxes(small, 1, 2) @ small
square = np.trace(gram @ gram, axis1=1, axis2=2).mean() / 3 / 2 * 81
print(f"E (AᵀA)² / (σ_A⁴ r) at d = 3, r = 2: {square:.2f}, predicted 4.80")
assert abs(square - 4.8) < 0.05
quarter = [np.linalg.norm(first_step(G, r, 0.25, sgd)) for r in ranks for _ in range(draws)]
quarter = np.reshape(quarter, (-1, draws)).mean(axis=1)
print(f"{'SGD, α/r^¼':25}" + "".join(f"{n:10.4f}" for n in quarter / quarter[0]))
assert np.allclose(quarter / quarter[0], np.sqrt((d + ranks) / (d + 1)), rtol=0.05)
assert f"{flat[-2]:.2f}" == "1.09" and f"{flat[-1]:.2f}" == "1.29" and f"{1 / fall[-1]:.1f}" == "12.6"

# %% [markdown]
# For $r ≪ d$, where LoRA is used, the norm is proportional to $s^2\sqrt r$ under SGD and
# to $s\sqrt r$ under Adam:
#
# - **With α/√r the norm of Adam's first step is nearly flat.** At $r = 64$ it is 1.09
#   times that at $r = 1$.
# - With α/r this norm falls as $1/\sqrt r$ while $r ≪ d$. At $r = d = 256$ it is 1/12.6
#   of that at $r = 1$ (the power alone gives 1/16).
# - Under SGD the cosine between $-ΔW_1$ and $G$ is $\sqrt{r/(d+r)}$. At $r = 1$ it is
#   .06.
#
# Far beyond $r = d$, norm and gain agree: by either measure α/√r suits SGD's first step,
# and α/r suits Adam's.
#
# | scale for a first step flat in r | SGD | Adam |
# |---|---|---|
# | gain ⟨−ΔW₁, G⟩ | α/√r | α/r |
# | norm ‖ΔW₁‖, r ≪ d | α/r^¼ | α/√r |
#
# ## 3 · After the first step
#
# LoRA §4.1 scales so that hyperparameters need less retuning when r varies. Two trials
# test this on regressions of width 64 whose update has full rank (Adam with $ε = 0$, α =
# 8, three seeds):
#
# - *A small rate.* Which part of the loss is left after 20 steps at the rate $2^{-10}$?
# - *The best rate.* Which of the rates $2^{-7} … 2^{-2}$ leaves the least loss after 15
#   steps? The brackets hold the lowest and the highest rate that the seeds cannot tell
#   from the best.

# %% tags=["hide-input"]
# Measures: what is left of the loss at a small rate, and the best rate, for four ranks and both scales.
tasks, few, exponents = [toys.Planted("full", d=64, n=512, seed=seed) for seed in SEEDS], (2, 8, 32, 64), range(-7, -1)
early, best, kept = {}, {}, {}


def left(power, k, steps):
    """log of the loss after the last step over that before the first, for each r and seed."""
    rates = {"lr_a": 2.0**k, "lr_b": 2.0**k, "steps": steps}
    curves = [
        [dynamics.curve(task, alpha=8.0 * r ** (1 - power), r=r, seed=s, **rates) for s, task in enumerate(tasks)]
        for r in few
    ]
    return np.array([[np.log(c[-1] / c[0]) for c in row] for row in curves])


for name, power in (("α/r", 1), ("α/√r", 0.5)):
    early[name] = np.exp(left(power, -10, 20).mean(axis=1))
    logs = np.array([left(power, k, 15) for k in exponents])  # rates, ranks, seeds
    table = np.exp(logs.mean(axis=2))
    equal = [
        [k for k, x in zip(exponents, logs[:, i] - logs[j, i], strict=True) if above(x) is not True]
        for i, j in enumerate(table.argmin(axis=0))
    ]
    best[name] = [(exponents[j], min(e), max(e)) for j, e in zip(table.argmin(axis=0), equal, strict=True)]
    kept[name] = table[exponents.index(-5)] / table.min(axis=0)
    rates = "".join(f"{f'{k} [{low} … {high}]':>14}" for k, low, high in best[name])
    print(f"{name + ', r =':31}" + "".join(f"{r:>14}" for r in few))
    print(f"{'  loss left at the rate 2^-10':31}" + "".join(f"{x:14.3f}" for x in early[name]))
    print(f"{'  best rate, 2^':31}{rates}")
    print(f"{'  loss at 2^-5 over the least':31}" + "".join(f"{x:14.2f}" for x in kept[name]))
assert [f"{x:.3f}" for x in early["α/r"][1:]] == ["0.949", "0.944", "0.944"]
assert [f"{x:.2f}" for x in early["α/√r"][1:]] == ["0.89", "0.75", "0.65"]
first, last = ({name: best[name][i][1:] for name in best} for i in (0, -1))
assert all(-6 <= low <= -5 <= high <= -4 for low, high in first.values())  # r = 2: undecided between neighbours
assert first["α/r"][1] < last["α/r"][0] and last["α/√r"] == (-5, -5)
assert f"{kept['α/r'][-1]:.1f}" == "1.5" and kept["α/√r"][-1] == 1

# %% [markdown]
# - *At the small rate* α/r keeps the ranks together, as the law of the gain predicts. At
#   $r$ = 8, 32 and 64 the part left is .949, .944 and .944. With α/√r it is .89, .75 and
#   .65.
# - *The best rate* is kept by α/√r, as the law of the norm suggests. From $r = 2$ to 64
#   it moves at most 2-fold with α/√r, and rises 2- to 4-fold with α/r. The rate $2^{-5}$
#   is the best at $r = 2$. At $r = 64$ with α/r it leaves 1.5 times the least loss.
#
# This is one toy, and it does not show why the norm should decide at the best rate. What
# holds in general is section 2's table: **neither scale keeps everything fixed, and
# comparing ranks at one rate favors some of them.**
#
# ## 4 · The exchange
#
# Now r is fixed, and each factor has its own rate, $η_A$ or $η_B$. "LoRA Without Regret"
# states that under Adam with $ε = 0$, for any $p, q > 0$, this exchange changes no loss:
#
# $$α → \frac{α}{pq},\quad A_0 → p\,A_0,\quad η_A → p\,η_A,\quad η_B → q\,η_B.$$
#
# *Proof.* Claim: at every step the new run has $A' = pA$ and $B' = qB$. It holds at step
# 0, since $B_0 = 0$. If it holds at some step, then
# $s'B'A' = \frac{s}{pq}\,qB\,pA = sBA$. The layer is the same, so the loss and $G$ are
# the same. The gradients are
#
# $$\frac{∂L}{∂A'} = s'B'^\top G = \frac1p\,\frac{∂L}{∂A},\qquad
# \frac{∂L}{∂B'} = s'GA'^\top = \frac1q\,\frac{∂L}{∂B}.$$
#
# A factor that all gradients so far have in common cancels in Adam's
# $\hat m/\sqrt{\hat v}$. So $A'$ moves by p times what $A$ moves by, and $B'$ by q times
# what $B$ moves by. The claim holds at the next step. ∎
#
# The proof uses nothing about the loss, so each layer of a network may have its own p and
# q. Here is Adam in NumPy on a regression. (The first gradient of $A$ is 0, and its step
# 0/0 is taken as 0.)

# %%
task, r = toys.Planted(d=32, n=128, seed=0), 4
x, y, A0 = task.x.astype(float), task.y.astype(float), task.adapted(r, seed=0).lora_A.weight.data.astype(float)


def train(alpha, A0, eta_A, eta_B, eps=(0.0, 0.0), steps=50):
    """The losses of a run of LoRA under Adam; eps holds ε for A and for B."""
    A, B, s, losses = A0.copy(), np.zeros((len(task.w0), r)), alpha / r, []
    m, v = [0.0, 0.0], [0.0, 0.0]
    for t in range(1, steps + 2):
        error = x @ (task.w0 + s * B @ A).T - y
        losses.append((error**2).mean())
        G = 2 / error.size * error.T @ x
        for k, (w, g, eta) in enumerate(((A, s * B.T @ G, eta_A), (B, s * G @ A.T, eta_B))):
            m[k], v[k] = 0.9 * m[k] + 0.1 * g, 0.999 * v[k] + 0.001 * g * g
            root = np.sqrt(v[k] / (1 - 0.999**t)) + eps[k]
            w -= eta * np.divide(m[k] / (1 - 0.9**t), root, out=np.zeros_like(w), where=root > 0)
    return np.array(losses)


# %% [markdown]
# The four runs are the plain one, the exchanges with $(p,q)=(4,8)$ and $(3,1)$, and α/32
# alone:

# %%
plain = train(8, A0, 0.01, 0.01)
powers = train(8 / 32, 4 * A0, 0.04, 0.08)
three = train(8 / 3, 3 * A0, 0.03, 0.01)
alone = train(8 / 32, A0, 0.01, 0.01)


def largest(a, b):
    """The largest relative difference of two loss curves."""
    return np.abs(a / b - 1).max()


assert (powers == plain).all()  # equal in every bit
assert 0 < largest(three, plain) < 1e-14 and largest(alone, plain) > 30

# %% [markdown]
# **For powers of two the losses are equal to the bit.** Such a factor changes only the
# exponent of a float, and all roundings stay the same. With a factor of 3 they change,
# and the losses differ in the 16th digit. The library's experiment finds the same with
# three seeds, for powers of two also in float32.

# %% tags=["hide-input"]
# Checks: train is the library's layer, tape and adamw_step; the library's experiment with three seeds.
print(f"loss: {plain[0]:.4f} before, {plain[-1]:.4f} after 50 steps")
library = dynamics.curve(task, alpha=8.0, dtype=np.float64, seed=0)
print(f"the library's curve: largest relative difference {largest(library, plain):.0e}")
assert largest(library, plain) < 1e-12 and plain[-1] < plain[0] / 10
results = [dynamics.invariance(seed) for seed in SEEDS]
different, relative = (max(result[key] for result in results) for key in ("different_powers", "relative_three"))
apart = np.mean([result["relative_alone"] for result in results])
print(f"three seeds: {different:.0f} of {3 * 102} losses differ for p = 4, q = 8;", end=" ")
print(f"relative difference: at most {relative:.1e} for p = 3, {apart:.3g} for α/32 alone")
assert different == 0 and 0 < relative < 1e-14 and apart > 30

# %% tags=["hide-input"]
# Draws: the losses before and after the exchange, and the relative difference for p = 3.
exchange(results[0])

# %% [markdown]
# ## 5 · What the exchange settles
#
# The exchange takes two degrees of freedom from the settings α, $σ_A$ (section 1), $η_A$
# and $η_B$. With $ε = 0$ and no weight decay, a run depends on r, on the draw of $A_0$,
# and on two numbers that no exchange changes:
#
# $$\frac{η_A}{σ_A}\qquad\text{and}\qquad α\,σ_A\,η_B .$$
#
# **"Tuning α is roughly the same as tuning the learning rate if we scale the
# initialization appropriately"** (LoRA §4.1, of Adam). With one rate for both factors,
# $p = q = ½$ turns the run $(α, A_0, 2η)$ into $(4α, ½A_0, η)$. So the quoted sentence is
# exact if $A_0 ∝ 1/\sqrtα$, and α then acts as the *square* of the rate.

# %%
assert (train(32, A0 / 2, 0.01, 0.01) == train(8, A0, 0.02, 0.02)).all()

# %% tags=["hide-input"]
# Measures: how far (4α, A₀, η) lies from (α, A₀, 2η) if A₀ stays.
results = [dynamics.alpha_is_like_lr(seed) for seed in SEEDS]
same = [result["different_scaled"] for result in results]
print(f"(4α, A₀/2, η) against (α, A₀, 2η): {sum(same):.0f} of {3 * 51} losses differ")
apart = {}
for key, what in (("largest_unscaled", "if A₀ stays, at most"), ("last_unscaled", "at the last step")):
    apart[key] = np.array([result[key] for result in results])
    print(f"{what + ':':24}{apart[key].mean():7.1%}  [{apart[key].min():.1%} … {apart[key].max():.1%}]")
assert not any(same)
assert f"{apart['largest_unscaled'].mean():.0%} {apart['largest_unscaled'].max():.0%}" == "59% 85%"
assert f"{apart['last_unscaled'].mean():.0%}" == "10%"

# %% [markdown]
# If $A_0$ stays, the losses of $(4α, A_0, η)$ and $(α, A_0, 2η)$ differ by up to 59 %
# (mean of three seeds; 85 % in one). At the last step they differ by 10 %.
#
# **LoRA+** gives $B$ a rate λ times that of $A$. With $p = 1, q = λ$ the run
# $(λα, A_0, η, η)$ becomes $(α, A_0, η, λη)$: **under Adam with $ε = 0$, LoRA+'s λ is a
# factor λ on α.** (LoRA+'s theorem on the best rates at large widths is not affected.)
# Searching α and one learning rate finds every run of LoRA+
# ([20](20_limits_and_descendants.ipynb), section 6).


# %% tags=["hide-input"]
# Checks: the library's lora_plus_groups with λ = 16 against plain LoRA with 16 α, with ε = 0 and with ε = 1e-8.
def run(alpha, ratio, steps=50, lr=0.01):
    layer = task.adapted(r, alpha=alpha, seed=0)
    optimizer, found = tl.AdamW(tl.variants.lora_plus_groups(layer, lr, ratio), lr=lr), []
    for _ in range(steps + 1):
        loss = toys.squared_error(layer(tl.Tensor(task.x)), task.y)
        found.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return np.array(found)


exact = (dynamics.curve(task, alpha=8.0, lr_b=0.16) != dynamics.curve(task, alpha=128.0)).sum()
plus, sixteen, without = run(8, 16), run(128, 1), run(8, 1)
print(f"λ = 16 against 16 α, ε = 0: {exact} of 51 losses differ")
print(f"ε = 1e-8: they differ by at most {largest(plus, sixteen):.0e}; without λ by up to {largest(without, plus):.3g}")
assert exact == 0 and largest(plus, sixteen) < 1e-3 and largest(without, plus) > 1

# %% [markdown]
# ## 6 · With ε
#
# Adam divides by $\sqrt{\hat v} + ε$, so a factor on the gradient no longer cancels. The
# gradients of $B'$ are $1/q$ times those of $B$, so with the averages of $B$ its step is
# $qη_B\,\hat m/(\sqrt{\hat v} + qε)$. This is as if ε were q times as large for $B$, and
# p times for $A$. With $ε/p$ for $A$ and $ε/q$ for $B$ the exchange is exact again, here
# for $p = 4, q = 8$:

# %%
before, broken, repaired = {}, {}, {}
for eps in (1e-8, 1e-6, 1e-4, 1e-2):
    before[eps] = train(8, A0, 0.01, 0.01, (eps, eps))
    broken[eps] = train(8 / 32, 4 * A0, 0.04, 0.08, (eps, eps))
    repaired[eps] = train(8 / 32, 4 * A0, 0.04, 0.08, (eps / 4, eps / 8))
    assert (repaired[eps] == before[eps]).all()

# %% tags=["hide-input"]
# Measures: how far the exchange without the repair is off, beside the size of B's first gradient.
error = x @ task.w0.T - y
size = np.abs(8 / r * 2 / error.size * error.T @ x @ A0.T)
print(f"B's first gradient: median magnitude {np.median(size):.1e}, least {size.min():.1e}")
off = {eps: largest(broken[eps], before[eps]) for eps in before}
for eps, far in off.items():
    ends = before[eps][-1] / before[eps][0], broken[eps][-1] / broken[eps][0]
    print(f"ε = {eps:.0e}: losses at most {far:.1e} apart; {ends[0]:.0%} left before the exchange, {ends[1]:.0%} after")
assert f"{np.median(size):.0e}" == "3e-03" and f"{7 * 1e-8 / np.median(size):.0e}" == f"{off[1e-8]:.0e}" == "2e-05"
assert f"{off[1e-4]:.0%}" == "12%" and f"{ends[1]:.0%} {ends[0]:.0%}" == "72% 3%"

# %% [markdown]
# Without this repair, the error depends on ε relative to the gradients. An entry $g$
# gives the first step $|g|/(|g| + ε)$, and after the exchange $|g|/(|g| + qε)$. The
# second is smaller by about $(q - 1)\,ε/|g|$. At the default $ε = 10^{-8}$ and this toy's
# median $|g|$ of $3·10^{-3}$ that is $2·10^{-5}$. The losses differ by as much.
#
# At $ε = 10^{-4}$ they differ by 12 %. At $ε = 10^{-2}$, above the median gradient, the
# first run keeps 3 % of its loss and the second 72 %.
#
# ## 7 · LoRA's rate and full fine-tuning's
#
# GPT-3 was trained with LoRA at 2e-4 and in full at 5e-6 (LoRA Table 12), a ratio
# of 40. "LoRA Without Regret" finds about ten (its fit gives 9.8). By section 5 such a
# ratio depends on α and $A_0$.
#
# A toy of three 64 × 64 layers, all adapted, is trained for 80 steps at rates $2^k$. The
# best rate is the one with the least error on unseen inputs. Rates that three seeds
# cannot tell from the best one count too, so the ratio is an interval.

# %% tags=["hide-input"]
# Measures: LoRA's best rate over that of full fine-tuning.
results = [dynamics.learning_rate_ratio(seed) for seed in SEEDS]
ratio = {key: dynamics.rate_ratio(results, key) for key in ("r4", "r16", "r4_alpha1")}
for key, label in (("r4", "r = 4, α = 32"), ("r16", "r = 16, α = 32"), ("r4_alpha1", "r = 4, α = 1")):
    print(f"{label:14}: best rate over that of full fine-tuning {ratio[key][0]:g} to {ratio[key][1]:g}")
assert ratio["r4"][0] >= 0.5 and ratio["r4"][1] <= 2 and ratio["r16"][0] >= 0.5 and ratio["r16"][1] <= 2
assert ratio["r4_alpha1"][0] >= 2 and ratio["r4_alpha1"][1] < 10
recipes = finetune.LORA_RECIPE.lr, finetune.FULL_RECIPE.lr
print("the embedded model's recipes: LoRA {}, full {}".format(*recipes))
assert recipes == (3e-3, 1e-3) and round(2e-4 / 5e-6) == 40

# %% [markdown]
# **The toy does not show a factor of ten.** With α = 32, which "LoRA Without Regret"
# uses, the ratio is between 0.5 and 2. With α = 1 it is 2 to 8.
#
# By the exchange α/32 needs a larger rate: $\sqrt{32} = 5.7$ times, if $A_0$ were scaled
# too. The embedded model's recipes use 3e-3 with LoRA and 1e-3 in full, a ratio of 3.
# (Neither was searched finely; see figures/README.md.)
#
# ## Where paper and code differ
#
# - $A_0$ is Gaussian in LoRA §4.1, and uniform on $±1/\sqrt d$ in the released code, in
#   PEFT and here. Its fourth moment enters the norm, as the $-1/5$ of section 2. PEFT's
#   "gaussian" initialization $N(0, 1/r^2)$ changes every power of r (exercise 1).
# - rsLoRA's "α/r slows large ranks" is true of the norm of Adam's first step, and false
#   of its gain.
# - The exchange is stated for $ε = 0$. Section 6 repairs it for other ε, and exercise 3
#   for weight decay, clipping and other optimizers.
#
# ## Exercises
#
# Grading runs only the setup cell and the exercise cells: put helpers into the
# exercise's cell.
#
# ### 14-1 Predict the power of r
#
# How does the expected gain of the first step grow with r under other rules? Given are
# four floats, 0 or more:
#
# - `k`, `m`: the rule is $B_1 = -η\,\mathrm{sign}(g)\,|g|^k/‖g‖^m$, entry by entry, with
#   $g = s\,GA_0^\top$ and its Frobenius norm $‖g‖$. SGD is $(1, 0)$, Adam's first step
#   $(0, 0)$, SGD with a normalized gradient $(1, 1)$.
# - `c`: the scale is $s = α/r^c$.
# - `a`: the entries of $A_0$ are independent, of mean 0 and of a standard deviation in
#   proportion to $r^{-a}$.
#
# $‖g‖$ varies little from draw to draw. Return the exponent $e$ of the gain $∝ r^e$. It
# is checked to within 0.1 against the exponent measured between $r = 4$ and 64 on random
# matrices.
#
# Hint: count the powers of r in one entry of $g$, and the entries of $g$.


# %% tags=["exercise"]
def exercise_1(k, m, c, a):
    """The exponent of r with which the expected gain of the first step grows."""
    # BEGIN SOLUTION
    entry = -c - a  # the power of r in one entry of g, which has d·r entries
    norm = entry + 0.5
    step = k * entry - m * norm  # one entry of B₁
    return step + entry + 1  # ⟨−s B₁A₀, G⟩ = −⟨B₁, s G A₀ᵀ⟩ = −⟨B₁, g⟩: a sum over the entries of g
    # END SOLUTION


# %%
_ = grade("14-1", exercise_1)

# %% [markdown]
# ### 14-2 LoRA+ on a trainer with one rate
#
# A run under Adam with $ε = 0$ had a rate for each factor. Your trainer has one rate for
# both, and a fixed α. You may scale $A_0$. Given are positive floats:
#
# - `alpha`, `eta_A`, `eta_B`: the α and the two rates of the run
# - `new_alpha`: the α of your trainer
#
# Return `(f, eta)` such that your run, with $f·A_0$ and the rate `eta`, has the losses of
# the first run. Checked in float64, to a relative $10^{-9}$ at every step.
#
# Hint: which p and q of section 4 lead from the one run to the other?


# %% tags=["exercise"]
def exercise_2(alpha, eta_A, eta_B, new_alpha):
    """(f, eta): the factor on A₀ and the common rate with which new_alpha repeats the run."""
    # BEGIN SOLUTION
    f = np.sqrt(alpha * eta_B / (new_alpha * eta_A))  # α σ η_B must stay, and the new η_B is f η_A
    return f, f * eta_A  # because η_A / σ must stay
    # END SOLUTION


# %%
_ = grade("14-2", exercise_2)

# %% [markdown]
# ### 14-3 The exchange for a family of optimizers
#
# Let $w$ be one of the two factors and $g$ its gradient. At every step an optimizer does
# this:
#
# - clip: $g ← g·\min(1, c/‖g‖)$, with the norm of this factor's gradient alone
# - add an L2 penalty: $g ← g + μw$ (`weight_decay` of torch's SGD and Adam)
# - decay: $w ← w - ηλw$ (`weight_decay` of AdamW)
# - step: $w ← w - η\,\hat m/(\sqrt{\hat v} + ε)^k$, with Adam's two averages of $g$
#
# Here $k = 1$ is Adam, and $k = 0$ is gradient descent with momentum. Given are `p`, by
# which the exchange multiplies this factor, `k` (0 or more), and `eta`, `eps`, `decay`,
# `l2`, `clip`, which are η, ε, λ, μ and c (all positive).
#
# Return the five numbers `(eta, eps, decay, l2, clip)` that make the exchange exact, so
# that $w' = pw$ at every step. Checked by two runs in float64 to a relative $10^{-9}$ at
# every step; your function is called with $p$ for $A$ and with $q$ for $B$.
#
# Hint: the gradient from the loss is $1/p$ of what it was. What must each of the four
# lines become?


# %% tags=["exercise"]
def exercise_3(p, k, eta, eps, decay, l2, clip):
    """(eta, eps, decay, l2, clip) after the exchange, for the factor that is multiplied by p."""
    # BEGIN SOLUTION
    rate = p ** (2 - k)  # the step must be p times as large, and m̂/(√v̂ + ε)^k is p^(k−1) times
    return rate * eta, eps / p, decay / rate, l2 / p**2, clip / p  # ηλ stays; μ p w is to be 1/p of μ w
    # END SOLUTION


# %%
_ = grade("14-3", exercise_3)

# %% [markdown]
# ## Summary
#
# - Under Adam α/r keeps the first step's gain independent of r, and α/√r its norm while
#   $r ≪ d$ (`first_step` in `tinylora/papers/claims/dynamics.py`;
#   `tests/papers/test_experiments.py`).
# - In a toy, α/r keeps the ranks together at a small rate, and α/√r keeps the best rate.
# - Under Adam with $ε = 0$ and no decay, the exchange α/(pq), $pA_0$, $pη_A$, $qη_B$
#   changes no bit for powers of two (`invariance` in the same file and test).
# - LoRA+'s λ is a factor on α. If $A_0$ is scaled by $1/\sqrtα$, α acts as the square of
#   the rate.
# - In a toy, LoRA's best rate was 0.5 to 8 times that of full fine-tuning, depending on
#   α.
