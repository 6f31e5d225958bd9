# %% [markdown]
# # 14 · Scaling, learning rates, invariances
#
# **Whether LoRA's scale should be α/r or α/√r depends on the optimizer, and on what is to stay the same as r grows.
# And under Adam with ε = 0 and no weight decay, α, the size of A₀ and the two learning rates act through two numbers
# only.**
#
# Accompanies LoRA §4.1 (the paragraph on α/r) and its Tables 11 and 12; rsLoRA (Kalajdzievski 2023, arXiv
# 2312.03732); "LoRA Without Regret" (Schulman et al. 2025); LoRA+ (Hayou et al. 2024, arXiv 2402.12354). A question
# that readers have asked, why α/r at all (LoRA issue 101, LLMs-from-scratch 821), is answered in sections 1 to 3.
#
# Hours: 3 (1½ to read and run, 1½ for the exercises).
#
# Prerequisites: the gradients of the two factors, $∂L/∂B = sGA^\top$ and $∂L/∂A = sB^\top G$ (notebook 02); Adam's
# update; the mean and variance of a uniform variable; that multiplying a float by a power of two rounds nothing.
#
# Code that only measures, checks or draws is folded where the editor can fold it; its output is not.

# %% tags=["setup"]
import numpy as np
from grading import grade

import tinylora as tl
from tinylora.papers.claims import dynamics, toys
from tinylora.papers.claims.registry import above
from tinylora.training import finetune

rng = np.random.default_rng(0)
SEEDS = (0, 1, 2)

# %% [markdown]
# ## 1. The first step
#
# LoRA computes $h = W_0x + s\,BAx$ with $s = α/r$ (LoRA eq. 3 and §4.1), $B_0 = 0$ and, in the released code, $A_0$
# uniform between $±1/\sqrt d$, so each entry has variance $σ_A^2 = 1/(3d)$. Let $G = ∂L/∂W$. At step 0 the gradient of
# $A$ is $sB_0^\top G = 0$, so only $B$ moves, and $ΔW_1 = s\,B_1A_0$ with
#
# $$\text{SGD: } B_1 = -η\,s\,GA_0^\top \qquad \text{Adam: } B_1 = -η\,\mathrm{sign}(s\,GA_0^\top) = -η\,\mathrm{sign}(GA_0^\top)$$
#
# (Adam's first step: $\hat m = g$ and $\hat v = g^2$, so $\hat m/\sqrt{\hat v} = \mathrm{sign}\,g$.) The scale enters
# SGD's $ΔW_1$ twice, once through the gradient of $B$, and Adam's once:
#
# $$\text{SGD: } ΔW_1 = -η\,s^2\,GA_0^\top A_0 \qquad\qquad \text{Adam: } ΔW_1 = -η\,s\,\mathrm{sign}(GA_0^\top)\,A_0.$$


# %%
def first_step(G, r, power, rule, alpha=16.0):
    A = rng.uniform(-1, 1, (r, len(G))) / np.sqrt(len(G))
    s = alpha / r**power  # power 1: LoRA's α/r; ½: rsLoRA's α/√r
    B = -rule(s * G @ A.T)  # η = 1
    return s * B @ A


# %% [markdown]
# How much does the loss fall? To first order by $⟨-ΔW_1, G⟩ = -\sum_{ij} (ΔW_1)_{ij}G_{ij}$; call it the *gain*. It
# is $η\,s^2\,‖GA_0^\top‖_F^2$ under SGD and $η\,s\,\sum_{ik}|GA_0^\top|_{ik}$ under Adam: sums over the $r$ rows of
# $A_0$, each row with the same expectation. With $E[A_0^\top A_0] = rσ_A^2\,I$ SGD's is
#
# $$E⟨-ΔW_1, G⟩ = η\,s^2\,r\,σ_A^2\,‖G‖_F^2 = η\,s^2\,\frac{r}{3d}\,‖G‖_F^2.$$
#
# So the gain goes as $s^2r$ under SGD and as $sr$ under Adam. Here with $G ∼ N(0,1)$, 256 × 256, the mean of 8 draws
# of $A_0$, divided by the value at $r = 1$:

# %% tags=["hide-input"]
d, ranks, draws = 256, np.array([1, 4, 16, 64, 256]), 8
G = rng.standard_normal((d, d))
RULES = {
    "SGD, α/r": (1, np.asarray),
    "SGD, α/√r": (0.5, np.asarray),
    "Adam, α/r": (1, np.sign),
    "Adam, α/√r": (0.5, np.sign),
}
gain, norm = {}, {}
print(f"{'gain over that at r = 1':25}" + "".join(f"{f'r = {r}':>10}" for r in ranks) + "   theory")
for (name, (power, rule)), theory in zip(RULES.items(), (-1, 0, 0, 0.5), strict=True):
    steps = [[first_step(G, r, power, rule) for _ in range(draws)] for r in ranks]
    gain[name] = np.array([np.mean([-(D * G).sum() for D in row]) for row in steps])
    norm[name] = np.sqrt([np.mean([(D * D).sum() for D in row]) for row in steps])
    relative = gain[name] / gain[name][0]
    print(f"{name:25}" + "".join(f"{g:10.4f}" for g in relative) + f"   r^{theory:g}")
    assert np.allclose(relative, ranks.astype(float) ** theory, rtol=0.15)  # at r = 1 a draw is a single row
expected = 16**2 / ranks**2 * ranks / (3 * d) * (G * G).sum()
print(f"SGD, α/r: gain / (s² r/(3d) ‖G‖²) = {np.round(gain['SGD, α/r'] / expected, 3)}")
assert np.allclose(gain["SGD, α/r"] / expected, 1, atol=0.12)

# %% [markdown]
# The library's layer takes the same steps: one step of SGD, and one of `AdamW`, from a `LoRALinear`, against the two
# formulas above, with both scales and $ε = 0$ (section 6 is about ε).

# %% tags=["hide-input"]
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
print(f"the layer's ΔW₁ and the formula differ by at most {worst:.0e} of its largest entry")
assert worst < 1e-5

# %% [markdown]
# With the gradient of a regression instead of a Gaussian one (`dynamics.first_step`, three seeds; the numbers at the
# right end are means): on the left the gain, on the right the size $‖ΔW_1‖_F$, which is the subject of section 2.

# %% tags=["hide-input"]
results = [dynamics.first_step(seed) for seed in SEEDS]
table = {key: np.mean([r[key] for r in results], axis=0) for key in results[0] if key != "ranks"}
assert results[0]["ranks"] == ranks.tolist()
assert [f"{g:.3f}" for g in table["sgd_r"]] == ["1.000", "0.255", "0.064", "0.016", "0.004"]
assert np.abs(table["sgd_rs"] - 1).max() < 0.04 and np.abs(table["adam_r"] - 1).max() < 0.04
assert np.allclose(table["adam_rs"], [1, 2, 4, 8, 16], rtol=0.04) and f"{table['adam_rs'][-1]:.1f}" == "16.3"
assert f"{table['sgd_rs'][-1]:.2f} {table['adam_r'][-1]:.2f}" == "1.03 1.02"
assert (
    f"{table['adam_rs_size'][-2]:.2f} {table['adam_rs_size'][-1]:.2f} {table['adam_r_size'][-1]:.3f}"
    == "1.08 1.28 0.079"
)
dynamics.draw_first_step(results)

# %% [markdown]
# So this is the answer to "why α/r": LoRA §4.1 speaks of Adam, and **under Adam α/r makes the first gain independent
# of r**, 1.02 at $r = 256$. Under SGD it falls as $1/r$ to .004, and α/√r is flat, 1.03. Under Adam α/√r is not:
# 16.3.
#
# rsLoRA says that α/r slows the learning of large ranks (its abstract). For the first step that is true of SGD, and
# for the gain of Adam's first step it is not. But the gain is one measure among others.
#
# ## 2. The same step by its norm
#
# rsLoRA calls an adapter rank-stabilized if inputs with independent entries, whose moments do not depend on r, give
# outputs whose moments do not shrink or grow with r, and likewise gradients on the way back (its definition 3.1,
# taken here from notes on the paper). For an input $x ∼ N(0, I)$ that has nothing to do with the batch,
# $E‖ΔW_1x‖^2 = ‖ΔW_1‖_F^2$: so look at the norm. It does not follow the gain's law, since $r$ random rows point in $r$
# directions, and only a part of their sum lies along $G$.
#
# **SGD.** $‖GA_0^\top A_0‖_F^2 = \mathrm{tr}\,G\,(A_0^\top A_0)^2\,G^\top$, so $E(A_0^\top A_0)^2$ is needed. With the rows
# $a_1 … a_r$ of $A_0$ (as columns), $A_0^\top A_0 = \sum_k a_ka_k^\top$, and its square is a sum over pairs:
#
# - $k ≠ l$, $r(r-1)$ pairs: the two are independent, so $E\,a_ka_k^\top a_la_l^\top = (σ_A^2I)(σ_A^2I) = σ_A^4\,I$.
# - $k = l$, $r$ terms $‖a‖^2\,aa^\top$. Off the diagonal the mean is 0, since an entry may change its sign. On it
#   $E\,a_i^4 + \sum_{j≠i}E\,a_j^2a_i^2 = \tfrac95σ_A^4 + (d-1)\,σ_A^4$; the $\tfrac95$ is the uniform law's (3 for a normal).
#
# In all $E(A_0^\top A_0)^2 = σ_A^4\,r\,\big[(r-1) + \tfrac95 + (d-1)\big]\,I = σ_A^4\,r\,(d + r - \tfrac15)\,I$, and
#
# $$\text{SGD: } E‖ΔW_1‖_F^2 = η^2s^4σ_A^4\,r\,(d + r - \tfrac15)\,‖G‖_F^2 .$$

# %% [markdown]
# **Adam.** The row of $ΔW_1$ that belongs to the row $g$ of $G$ is $-ηs\sum_k \mathrm{sign}(g·a_k)\,a_k$. Its squared norm is a
# sum over pairs again. The $r$ terms $k = l$ are $E‖a_k‖^2 = dσ_A^2$ each; the $r(r-1)$ others are $‖c‖^2$ each, with
# $c = E[\mathrm{sign}(g·a)\,a]$, by independence. Split $a$ into its part along $g$ and the rest. If $a$ were normal, the
# rest would be independent of the sign and drop out, and the part along $g$ would leave the mean magnitude of an
# $N(0, σ_A^2)$: $c = σ_A\sqrt{2/π}\;g/‖g‖$. For a uniform $a$ that is true as far as a sum of $d$ terms is normal. So
#
# $$\text{Adam: } E‖ΔW_1‖_F^2 ≈ η^2s^2σ_A^2\,r\,\big(d + \tfrac2π(r-1)\big)\,d_{\text{out}} .$$

# %% tags=["hide-input"]
variance = 1 / (3 * d)  # σ_A²
print(f"{'norm over that at r = 1':25}" + "".join(f"{f'r = {r}':>10}" for r in ranks))
for name, (power, rule) in RULES.items():
    s = 16 / ranks**power
    predicted = s**2 * variance * np.sqrt(ranks * (d + ranks - 0.2) * (G * G).sum())
    if rule is np.sign:
        predicted = s * np.sqrt(variance * ranks * (d + 2 / np.pi * (ranks - 1)) * d)
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
print(
    f"E (AᵀA)² / (σ_A⁴ r) at d = 3, r = 2: {np.trace(gram @ gram, axis1=1, axis2=2).mean() / 3 / 2 * 81:.2f}, predicted 4.80"
)
assert abs(np.trace(gram @ gram, axis1=1, axis2=2).mean() / 3 / 2 * 81 - 4.8) < 0.05
quarter = [np.linalg.norm(first_step(G, r, 0.25, np.asarray)) for r in ranks for _ in range(draws)]
quarter = np.reshape(quarter, (-1, draws)).mean(axis=1)
print(f"{'SGD, α/r^¼':25}" + "".join(f"{n:10.4f}" for n in quarter / quarter[0]))
assert np.allclose(quarter / quarter[0], np.sqrt((d + ranks) / (d + 1)), rtol=0.05)
assert f"{1 / np.mean([result['adam_r_size'][-1] for result in results]):.1f}" == "12.6"
assert f"{flat[-2]:.2f}" == "1.09" and f"{flat[-1]:.2f}" == "1.29" and f"{1 / fall[-1]:.1f}" == "12.6"

# %% [markdown]
# For $r ≪ d$, which is where LoRA is used, the norm goes as $s^2\sqrt r$ under SGD and $s\sqrt r$ under Adam. (Under
# SGD the cosine between $-ΔW_1$ and $G$ is $\sqrt{r/(d+r)}$, .06 at $r = 1$.) So **under Adam the norm of the first
# step is nearly flat with α/√r**, 1.09 times as large at $r = 64$ as at 1. With α/r it falls as $1/\sqrt r$ while
# $r ≪ d$, and more slowly then: at $r = 256 = d$ it is 1/12.6, not 1/16, of what it is at $r = 1$, and with α/√r 1.29
# times. From $r ≈ d$ on, norm and gain go together: as $r → ∞$ with $d$ fixed, which is what $Θ$ in r would mean, α/√r
# suits SGD's first step by either measure, and α/r Adam's. (On the regression of section 1: 1.08 at $r = 64$, and 1/12.6
# and 1.28 at $r = 256$.)
#
# | flat in r at the first step | SGD | Adam |
# |---|---|---|
# | gain ⟨−ΔW₁, G⟩ | α/√r | α/r |
# | norm ‖ΔW₁‖, r ≪ d | α/r^¼ | α/√r |

# %% [markdown]
# ## 3. After the first step
#
# What is the scale for? LoRA §4.1: so that hyper-parameters need less retuning when r varies. Two trials on
# regressions of width 64 whose ΔW has full rank, with Adam ($ε = 0$), α = 8, three seeds. First a small rate,
# $2^{-10}$: what is left of the loss after 20 steps. Then 15 steps at each of the rates $2^{-7} … 2^{-2}$: the rate
# that leaves the least loss (geometric mean over the seeds) with, in brackets, the lowest and the highest that the seeds
# cannot tell from it; and how many times that least loss is left at the rate $2^{-5}$, the best for $r = 2$.

# %% tags=["hide-input"]
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
    print(f"{name + ', r =':45}" + "".join(f"{r:>8}" for r in few))
    print(f"{'  left after 20 steps at the rate 2^-10':45}" + "".join(f"{x:8.3f}" for x in early[name]))
    print(
        f"{'  best rate over 15 steps, 2^':31}"
        + "".join(f"{f'{k} [{low} … {high}]':>14}" for k, low, high in best[name])
    )
    print(f"{'  at the rate 2^-5, over the least':45}" + "".join(f"{x:8.2f}" for x in kept[name]))
assert [f"{x:.3f}" for x in early["α/r"][1:]] == ["0.949", "0.944", "0.944"]
assert [f"{x:.2f}" for x in early["α/√r"][1:]] == ["0.89", "0.75", "0.65"]
first, last = ({name: best[name][i][1:] for name in best} for i in (0, -1))
assert all(-6 <= low <= -5 <= high <= -4 for low, high in first.values())  # r = 2: undecided between neighbours
assert first["α/r"][1] < last["α/r"][0] and last["α/√r"] == (-5, -5)
assert f"{kept['α/r'][-1]:.1f}" == "1.5" and kept["α/√r"][-1] == 1

# %% [markdown]
# Both laws show. At a small rate the runs of r = 8, 32 and 64 stay together with α/r (.949, .944, .944 of the loss is
# left), as the gain says, and come apart with α/√r (.89, .75, .65). But the *best* rate is 32 or more times as large,
# and there it is the other way round: with α/√r it is about $2^{-5}$ at r = 2 and at r = 64, with α/r it rises to $2^{-3}$,
# and whoever keeps $2^{-5}$ at r = 64 is left with 1.5 times the least loss. (At r = 2 three seeds do not decide among
# neighbours: $2^{-5}$ or $2^{-4}$ with α/r, $2^{-6}$ or $2^{-5}$ with α/√r. So it rises 2- to 4-fold with α/r, and at most 2-fold with
# α/√r.) That fits the norm's law. (Why the norm should decide there was not shown.) It is one toy, and says nothing about large models.
#
# What holds in general is the table of section 2: neither scale keeps everything fixed, and a comparison of ranks at
# one rate favours some of them.
#
# ## 4. The exchange
#
# Now keep r and look at all the knobs of a run with Adam: α, the size of $A_0$, and a rate each for $A$ and $B$.
# "LoRA Without Regret" states that, with $ε = 0$, for any $p, q > 0$ this changes nothing:
#
# $$α → \frac{α}{pq},\qquad A_0 → p\,A_0,\qquad η_A → p\,η_A,\qquad η_B → q\,η_B.$$
#
# *Proof.* Claim: at every step the new run has $A' = pA$ and $B' = qB$. It holds at step 0, since $B_0 = 0$. If it
# holds at some step, then $s'B'A' = \frac{s}{pq}\,qB\,pA = sBA$: the same layer, so the same loss and the same $G$.
# The gradients are
#
# $$\frac{∂L}{∂A'} = s'B'^\top G = \frac1p\,\frac{∂L}{∂A},\qquad \frac{∂L}{∂B'} = s'GA'^\top = \frac1q\,\frac{∂L}{∂B}.$$
#
# Adam's $\hat m/\sqrt{\hat v}$ does not see a factor that all gradients so far have in common. So $A'$ moves by
# $pη_A\,\hat m/\sqrt{\hat v}$, which is p times what $A$ moves by, and $B'$ by q times what $B$ moves by. The claim
# holds at the next step. ∎ Nothing about the loss was used: it is true of each layer of a network, each with its own
# p and q.
#
# Adam in NumPy on a regression. A parameter all of whose gradients were 0, as $A$'s first is, has the step 0/0, taken
# as 0:

# %%
task, r = toys.Planted(d=32, n=128, seed=0), 4
x, y, A0 = task.x.astype(float), task.y.astype(float), task.adapted(r, seed=0).lora_A.weight.data.astype(float)


def train(alpha, A0, eta_A, eta_B, eps=(0.0, 0.0), steps=50):
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
# Three runs against the first: the exchange with $p = 4, q = 8$; with $p = 3, q = 1$; and α/32 alone. The first must
# also be the run of the library's layer, tape and `adamw_step` in float64.


# %% tags=["hide-input"]
def largest(a, b):
    """The largest relative difference of two loss curves."""
    return np.abs(a / b - 1).max()


plain = train(8, A0, 0.01, 0.01)
powers, three = train(8 / 32, 4 * A0, 0.04, 0.08), train(8 / 3, 3 * A0, 0.03, 0.01)
print(f"loss: {plain[0]:.4f} before, {plain[-1]:.4f} after 50 steps")
print(f"p = 4, q = 8: {(powers != plain).sum()} of {len(plain)} losses differ in any bit")
print(f"p = 3, q = 1: largest relative difference {largest(three, plain):.0e}")
print(f"α/32 alone:   largest relative difference {largest(train(8 / 32, A0, 0.01, 0.01), plain):.3g}")
library = dynamics.curve(task, alpha=8.0, dtype=np.float64, seed=0)
print(f"the library's curve: largest relative difference {largest(library, plain):.0e}")
assert (powers == plain).all() and 0 < largest(three, plain) < 1e-14 and largest(library, plain) < 1e-12
assert plain[-1] < plain[0] / 10 and largest(train(8 / 32, A0, 0.01, 0.01), plain) > 30

# %% [markdown]
# **Equal to the bit** for powers of two: multiplying by one changes only the exponent of a float, so each rounding of
# the first run happens in the second too. A factor of 3 rounds differently, in the 16th digit. The library's
# experiment has the same in float32 and float64, with three seeds:

# %% tags=["hide-input"]
results = [dynamics.invariance(seed) for seed in SEEDS]
different, relative = (max(result[key] for result in results) for key in ("different_powers", "relative_three"))
alone = np.mean([result["relative_alone"] for result in results])
print(
    f"p = 4, q = 8: {different:.0f} of {3 * 102} losses differ; p = 3: at most {relative:.1e}; α/32 alone: {alone:.3g}"
)
assert different == 0 and 0 < relative < 1e-14 and alone > 30

# %% tags=["hide-input"]
dynamics.draw_invariance(results[0])

# %% [markdown]
# ## 5. What the exchange settles
#
# Of four knobs two can be set at will, by p and q. With $ε = 0$ and no weight decay, what a run depends on, beside r and
# the draw of $A_0$, are two numbers that no exchange changes:
#
# $$\frac{η_A}{σ_A}\qquad\text{and}\qquad α\,σ_A\,η_B,\qquad\text{with }σ_A\text{ the size of }A_0.$$
#
# **"Tuning α is roughly the same as tuning the learning rate if we scale the initialization appropriately"** (LoRA
# §4.1, of Adam). With one rate for both factors put $p = q = ½$: $(4α, ½A_0, η)$ and $(α, A_0, 2η)$ are the same run.
# So the sentence is exact, with α as the *square* of the rate, and "appropriately" is $A_0 ∝ 1/\sqrtα$. If $A_0$
# stays:

# %% tags=["hide-input"]
results = [dynamics.alpha_is_like_lr(seed) for seed in SEEDS]
same = [result["different_scaled"] for result in results]
print(f"(4α, A₀/2, η) against (α, A₀, 2η): {sum(same):.0f} of {3 * 51} losses differ")
apart = {}
for key, what in (("largest_unscaled", "(4α, A₀, η), largest"), ("last_unscaled", "(4α, A₀, η), last step")):
    apart[key] = np.array([result[key] for result in results])
    print(f"{what + ':':24}{apart[key].mean():7.1%}  [{apart[key].min():.1%} … {apart[key].max():.1%}]")
assert (train(32, A0 / 2, 0.01, 0.01) == train(8, A0, 0.02, 0.02)).all() and not any(same)
assert f"{apart['largest_unscaled'].mean():.0%} {apart['largest_unscaled'].max():.0%}" == "59% 85%"
assert f"{apart['last_unscaled'].mean():.0%}" == "10%"

# %% [markdown]
# At most the losses of $(4α, A_0, η)$ lie 59 % from those of $(α, A_0, 2η)$ (mean of three seeds; 85 % in one), and
# at the last step 10 %.
#
# **LoRA+** gives $B$ a rate λ times that of $A$. With $p = 1$, $q = λ$ the run $(λα, A_0, η, η)$ becomes
# $(α, A_0, η, λη)$. *Under Adam with $ε = 0$, LoRA+'s λ is a factor λ on α*, and nothing else. That does not
# contradict LoRA+, whose theorem is about how the best rates go with the width; it says that a search over α and one
# rate, with $A_0$ as it is, holds all of LoRA+'s runs (notebook 20, section 6, has both searches).
#
# The library's `lora_plus_groups` with λ = 16 and its `AdamW` ($ε = 10^{-8}$), against plain LoRA with 16 α (what ε does
# is section 6):


# %% tags=["hide-input"]
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
print(f"ε = 0: {exact} of 51 losses differ")
print(f"ε = 1e-8: they differ by {largest(plus, sixteen):.0e} at most; without λ by {largest(without, plus):.3g}")
assert exact == 0 and largest(plus, sixteen) < 1e-3 and largest(without, plus) > 1

# %% [markdown]
# ## 6. With ε
#
# With $ε > 0$ Adam divides by $\sqrt{\hat v} + ε$, which does see a factor on the gradient. The gradients of $B'$ are
# $1/q$ times as large, so in the old units its step is $η_B\,\hat m/(\sqrt{\hat v} + qε)$: for $B$ it is as if ε were
# q times as large, and for $A$ p times. Give each factor its own ε, $ε/p$ and $ε/q$, and the exchange is exact again.
# With $p = 4, q = 8$:

# %% tags=["hide-input"]
error = x @ task.w0.T - y
size = np.abs(8 / r * 2 / error.size * error.T @ x @ A0.T)
print(f"B's first gradient: median magnitude {np.median(size):.1e}, least {size.min():.1e}")
broken = {}
for eps in (1e-8, 1e-6, 1e-4, 1e-2):
    before, after = train(8, A0, 0.01, 0.01, (eps, eps)), train(8 / 32, 4 * A0, 0.04, 0.08, (eps, eps))
    repaired = train(8 / 32, 4 * A0, 0.04, 0.08, (eps / 4, eps / 8))
    broken[eps] = largest(after, before)
    print(
        f"ε = {eps:.0e}: at most {broken[eps]:.1e} apart; with ε/p and ε/q {(repaired != before).sum()} losses differ"
    )
    assert (repaired == before).all()
assert f"{np.median(size):.0e}" == "3e-03" and f"{7 * 1e-8 / np.median(size):.0e}" == f"{broken[1e-8]:.0e}" == "2e-05"
assert f"{broken[1e-4]:.0%}" == "12%" and f"{after[-1] / after[0]:.0%} {before[-1] / before[0]:.0%}" == "72% 3%"

# %% [markdown]
# An entry $g$ of the gradient gives the first step $|g|/(|g| + ε)$ in place of 1, and $|g|/(|g| + qε)$ after the
# exchange: about $(q - 1)\,ε/|g|$ less, $2·10^{-5}$ at this toy's median of $3·10^{-3}$ and the default
# $ε = 10^{-8}$. The losses part by as much. At $ε = 10^{-4}$ they part by 12 %, and at $10^{-2}$, more than the
# gradients themselves, the second run keeps 72 % of its loss where the first keeps 3 %. What counts is ε beside the
# gradients: an entry as small as ε moves by ½ of η before the exchange, and by 1/9 of it after.
#
# ## 7. LoRA's rate and full fine-tuning's
#
# GPT-3 was trained by LoRA at 2e-4 and in full at 5e-6 (LoRA Tables 11 and 12), a ratio of 40; "LoRA Without Regret"
# finds about ten (9.8 fitted). By section 5 such a ratio cannot belong to LoRA alone: it goes with α and with $A_0$.
# The toy here is a network of three 64 × 64 layers, all adapted, trained for 80 steps at $2^k$; the best rate on
# unseen inputs, three seeds. Neighbouring rates often do equally well, so that the last bits of a matrix product, which
# differ between processors, decide which of them is best. All rates count whose error the seeds do not put above the
# least one, and the ratio is an interval:

# %% tags=["hide-input"]
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
# **The toy does not show a factor of ten**: 0.5 to 1 at $r = 4$, 0.5 to 2 at $r = 16$ (with α = 32, which "LoRA Without
# Regret" uses), and 2 to 8 at α = 1. That α/32 wants a larger rate is the exchange: $\sqrt{32} = 5.7$ times, were $A_0$
# scaled with it; with $A_0$ as it is, 4 to 8 times, on a grid of powers of two. For the embedded model the default recipes
# are 3e-3 with LoRA and 1e-3 in full, a factor of 3, neither searched finely (figures/README.md).
#
# ## Where paper and code differ
#
# 1. **$A_0$ is Gaussian in LoRA §4.1**, and uniform on $±1/\sqrt d$ in the released code, in PEFT and here. Of the
#    law only the variance $σ_A^2 = 1/(3d)$ enters SGD's expected gain (and Adam's, as far as a sum of $d$ terms is normal);
#    the norm has its kurtosis in the $-1/5$ of section 2. An $A_0$ whose size depends on r, such as PEFT's "gaussian"
#    $N(0, 1/r^2)$, changes every power of r (exercise 1).
# 2. **"α/r slows large ranks" (rsLoRA)** is true of SGD's first step (gain .004 at $r = 256$) and not of the gain of
#    Adam's (1.02), which with α/√r grows to 16.3. It is true of the norm of Adam's first step (as $1/\sqrt r$ while
#    $r ≪ d$, 12.6-fold up to $r = d = 256$), and in section 3 the best rate moves 4-fold with α/r and not with α/√r.
# 3. **"Tuning α is roughly the same as tuning the rate" (LoRA §4.1)** is exact with $A_0 ∝ 1/\sqrtα$ and α as the
#    rate's square; with $A_0$ as it is the losses lie up to 59 % apart.
# 4. **The exchange is stated for $ε = 0$.** The usual $10^{-8}$ breaks it by $2·10^{-5}$ in the toy (section 6).
#    Weight decay, clipping and other optimizers are left to exercise 3.
# 5. **"Ten times the rate of full fine-tuning"** does not show in the toy: 0.5 to 2 (section 7).
#
# ## Exercises
#
# For grading only the setup cell and the exercise cells are run: put helpers inside the exercise's cell.
#
# ### 14-1 Predict the power of r
#
# SGD and Adam are two rules of many. Predict what others do, from starts whose size depends on r, before you measure
# it.


# %% tags=["exercise"]
def exercise_1(k, m, c, a):
    """Return the exponent e with which the expected gain ⟨−ΔW₁, G⟩ of the first step grows with r, as r^e.

    The rule    B₁ = −η sign(g) |g|^k / ‖g‖^m, entry by entry, with the Frobenius norm ‖g‖ and g = s G A₀ᵀ.
                (k, m) = (1, 0) is SGD, (0, 0) Adam's first step, (1, 1) SGD with a normalized gradient.
    The scale   s = α / r^c.
    The start   entries of A₀ independent, of mean 0 and standard deviation proportional to r^−a.

    G has the same law for every r, and r is large enough for ‖g‖ to vary little from draw to draw. All arguments are floats, 0 or more.
    Checked: one number, within 0.1 of the slope measured between r = 4 and r = 64 on random matrices.
    """
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
# A run was made with $(α, A_0, η_A, η_B)$ and Adam with $ε = 0$. Your trainer has a single rate for both factors, and
# a configuration that you must not touch fixes another α. You may scale $A_0$.


# %% tags=["exercise"]
def exercise_2(alpha, eta_A, eta_B, new_alpha):
    """Return (f, eta) so that the run (new_alpha, f · A₀, eta for A and for B) has the losses of (alpha, A₀, eta_A, eta_B).

    All are positive floats. Which p and q of section 4 lead from the one run to the other?
    Checked: two training runs under Adam with ε = 0 in float64, equal to a relative 1e-9 at every step.
    """
    # BEGIN SOLUTION
    f = np.sqrt(alpha * eta_B / (new_alpha * eta_A))  # α σ η_B must stay, and the new η_B is f η_A
    return f, f * eta_A  # because η_A / σ must stay
    # END SOLUTION


# %%
_ = grade("14-2", exercise_2)

# %% [markdown]
# ### 14-3 The exchange for a family of optimizers
#
# Take any of the two factors, $w$, with its gradient $g$, and an optimizer that does this at every step:
#
# 1. clip: $g ← g·\min(1, c/‖g‖)$, with the norm of this factor's gradient alone;
# 2. add an L2 penalty: $g ← g + μw$ (`weight_decay` of torch's SGD and Adam);
# 3. decay: $w ← w - ηλw$ (`weight_decay` of AdamW);
# 4. step: $w ← w - η\,\hat m/(\sqrt{\hat v} + ε)^k$, with Adam's two averages of $g$.
#
# $k = 1$ is Adam, $k = 0$ gradient descent with momentum, and $k$ between them has been proposed as well.


# %% tags=["exercise"]
def exercise_3(p, k, eta, eps, decay, l2, clip):
    """Return (eta, eps, decay, l2, clip), as they must be after the exchange, for the factor that is multiplied by p.

    Before it the factor has these η, ε, λ, μ and c, all positive; k is 0 or more. The exchange is α/(pq), p A₀, q B (B₀ = 0): the
    gradients from the loss are 1/p of what they were. What must each of the four lines be for w' = p w to hold at the next step?
    Checked: two training runs in float64, yours being called once with p for A and once with q for B; the losses must be equal to
    a relative 1e-9 at every step.
    """
    # BEGIN SOLUTION
    rate = p ** (2 - k)  # the step must be p times as large, and m̂/(√v̂ + ε)^k is p^(k−1) times
    return rate * eta, eps / p, decay / rate, l2 / p**2, clip / p  # ηλ stays; μ p w is to be 1/p of μ w
    # END SOLUTION


# %%
_ = grade("14-3", exercise_3)

# %% [markdown]
# ## Summary
#
# - At the first step only B moves. Its gain goes as $s^2r$ under SGD and as $sr$ under Adam, so α/√r makes it flat in
#   r under SGD (1.03 at $r = 256$), and α/r under Adam (1.02); its norm goes as $s^2\sqrt r$ and $s\sqrt r$ while
#   $r ≪ d$, so that there, under Adam, the norm is flat with α/√r. `dynamics.first_step`, `tests/papers/test_experiments.py`.
# - In a toy, runs at a small rate stay together with α/r, and the best rate stays with α/√r. Neither scale fits all
#   purposes.
# - Under Adam with $ε = 0$ and no decay the exchange α/(pq), pA₀, pη_A, qη_B changes no bit for powers of two, and the 16th digit
#   for 3 (`dynamics.invariance`). So α is the rate's square if A₀ goes along, and LoRA+'s λ is a factor on α.
# - With $ε = 10^{-8}$ it holds to $2·10^{-5}$ here, and exactly if each factor has an ε of its own.
# - LoRA's best rate was 0.5 to 8 times that of full fine-tuning, not ten: the ratio goes with α.
# - Next: notebook 04, blockwise absmax.
