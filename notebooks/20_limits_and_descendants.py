# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 20 · Limits and descendants
#
# **LoRA says that an update is $s B A$ and leaves the rest open: where $A$ and $B$ start, which of the two learns and how fast, which
# layer gets which rank, how the size of a weight is treated, and what happens when the base has 4 bits. Each descendant changes one
# line.** This notebook derives five of these lines, runs the others, and measures what each is good for.
#
# Accompanies PiSSA (arXiv 2404.02948), LoftQ (2310.08659), LoRA-GA (2407.05000), LoRA-FA (2308.03303), VeRA (2310.11454), LoRA+
# (2402.12354), AdaLoRA (2303.10512), DoRA (2402.09353), QA-LoRA (2309.14717), IR-QLoRA (2402.05445), and "LoRA Learns Less and
# Forgets Less" (2405.09673). How each of them was read stands at the end.
#
# Hours: 4 (3 to read and run, 1 for the exercises).
#
# Prerequisites: notebook 02 (the bypass and its gradients); the singular value decomposition and Eckart and Young's theorem
# (notebook 12). No more is needed for sections 1, 2, 5, 7, 8 and 10 and exercises 3 and 4; section 6 also needs notebook 14. Sections 3, 4
# and 9 and exercise 1 are about 4 bits and need NF4 (notebooks 04 and 05), section 9 also its entropy (16).
#
# Code that only measures, checks or draws is folded where the editor can fold it; its output is not.

# %% tags=["setup"]
import math

import numpy as np
from drawings.nb20 import which_start
from grading import grade

import tinylora as tl
from tinylora import LoRALinear, Tensor, quantize, variants
from tinylora.nn import Linear, Linear4bit
from tinylora.papers import claims
from tinylora.papers.claims.descendants import draw_quantization_starts
from tinylora.papers.claims.toys import linear, orthonormal, weight
from tinylora.variants import IntegerLinear, QALoRALinear

tl.seed(0)  # of what the layers draw
rng = np.random.default_rng(0)
r, s = 8, 2.0  # the rank and the scale, so α = 16
W = rng.standard_normal((96, 128)).astype(np.float32).astype(np.float64)  # a weight (out, in)
x = rng.standard_normal((50, 128)).astype(np.float32)  # 50 rows of input

# %% [markdown]
# ## 1 · One line each
#
# Of $h = W_0 x + s\,B A x$ with $s = α/r$, $A$ random and $B = 0$:
#
# | what is left open | who changes it | the changed line | tinylora |
# |---|---|---|---|
# | where to start | PiSSA | $sBA$ = the best rank $r$ of $W$; the base keeps the rest | `variants.pissa` |
# | | LoftQ | $Q + sBA ≈ W$ with $Q$ in 4 bits | `variants.loftq` |
# | | LoRA-GA | $A$, $B$ = singular vectors of the gradient | `variants.lora_ga` |
# | what to train | LoRA-FA | $A$ stays as it is | `variants.freeze_A` |
# | | VeRA | $Λ_b B Λ_d A\,x$ with $A$, $B$ random and shared, two diagonals trained | `variants.add_vera` |
# | | LoRA+ | $η_B = λ\,η_A$ | `variants.lora_plus_groups` |
# | how to share the rank | AdaLoRA | $s\,P Λ Q\,x$, and a budget for the entries of $Λ$ | `variants.add_adalora` |
# | how large a step is | rsLoRA | $s = α/\sqrt r$ (notebook 14) | `use_rslora=True` |
# | how to measure size | DoRA | $m ⊙ (W_0 + sBA)/‖W_0 + sBA‖$ | `use_dora=True` |
# | how to meet 4 bits | QA-LoRA | $A$ reads sums over groups, so that $BA$ fits into zero points | `variants.QALoRALinear` |
# | | IR-QLoRA | each block shifted for the entropy of its codes; short cuts | `variants.information_calibration` |
#
# ## 2 · Start from the weight: PiSSA
#
# Let $W = U S V^{\top}$. PiSSA (eq. 2 to 5) gives the bypass the first $r$ directions, half of each singular value to either factor,
# and leaves the base the residual:
#
# $$A = \sqrt{S_r/s}\;V_r^{\top},\qquad B = U_r\sqrt{S_r/s},\qquad W_{\mathrm{res}} = W - s\,B A .$$
#
# (The division by $s$ is the authors' code's and PEFT's. The paper writes $Y = X(W^{res} + AB)$, with $A$ and $B$ the other way round.)

# %%
U, S, Vt = np.linalg.svd(W, full_matrices=False)
root = np.sqrt(S[:r] / s)
A, B = root[:, None] * Vt[:r], U[:, :r] * root
W_res = W - s * B @ A

# %% [markdown]
# The library's are the same, up to the rounding to float32. The layer starts with the output of its base, as LoRA does, although
# $B ≠ 0$. So at the first step $A$ has a gradient too, $\bar A = s\,B^{\top} G$ with $G = ∂L/∂W$: in LoRA that is 0 (notebook 02).


# %% tags=["hide-input"]
def off(found, wanted):
    """‖found − wanted‖ / ‖wanted‖."""
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


layer = variants.pissa(LoRALinear(linear(W), r=r, alpha=s * r))
a, b = layer.lora_A.weight, layer.lora_B.weight
print(
    f"off from the library: A {off(a.data, A):.0e}, B {off(b.data, B):.0e}, W_res {off(layer.base_layer.dense(), W_res):.0e}"
)
assert max(off(a.data, A), off(b.data, B), off(layer.base_layer.dense(), W_res)) < 1e-6
assert off(layer(Tensor(x)).data, x @ W.T) < 1e-6

plain = LoRALinear(linear(W), r=r, alpha=s * r)
g = rng.standard_normal((50, 96)).astype(np.float32)
for h in (plain, layer):
    h(Tensor(x)).backward(g)
assert not plain.lora_A.weight.grad.any() and off(a.grad, s * B.T @ (g.T @ x)) < 1e-5
print(f"‖Ā‖ at the first step: LoRA {np.linalg.norm(plain.lora_A.weight.grad):.0f}, PiSSA {np.linalg.norm(a.grad):.0f}")

# %% [markdown]
# ## 3 · Start from the error of quantization: LoftQ
#
# With $Q = \mathrm{quant}(W)$ in 4 bits and $B = 0$, QLoRA starts at $Q$, not at $W$. LoftQ (eq. 6 to 9, algorithm 1) looks for
# $\min ‖W - Q - BA‖_F$ by turns: quantize what the bypass does not hold, then let the bypass hold the best rank $r$ of what the
# quantization lost.
#
# $$Q_t = \mathrm{quant}(W - B_{t-1}A_{t-1}),\qquad B_t A_t = \text{the best rank } r \text{ of } W - Q_t .$$

# %%
low = 0
for _ in range(5):
    Q = quantize((W - low).astype(np.float32), "nf4", 64).dequantize()
    U, S, Vt = np.linalg.svd(W - Q, full_matrices=False)
    low = (U[:, :r] * S[:r]) @ Vt[:r]

# %% [markdown]
# The library's result is the same. (A weight on the border between two of NF4's cells may round the other way where a last bit differs;
# the bound leaves room for a few.) PiSSA can be quantized as well: QPiSSA stores $\mathrm{quant}(W_{\mathrm{res}})$.

# %% tags=["hide-input"]
loftq = variants.loftq(linear(W), r=r, alpha=s * r, steps=5)
assert off(loftq.base_layer.dense(), Q) < 0.01 and off(loftq.delta(), low) < 0.05
assert off(weight(loftq), Q + low) < 0.01
qpissa = variants.pissa(LoRALinear(linear(W), r=r, alpha=s * r), code="nf4")
alone = off(Linear4bit.of(linear(W), double_quant=False).dense(), W)
five, pissa = off(Q + low, W), off(weight(qpissa), W)
print(f"error at the start: NF4 alone {alone:.4f}, QPiSSA {pissa:.4f}, LoftQ in five steps {five:.4f}")
assert five < pissa < alone

# %% [markdown]
# ## 4 · Which start for 4 bits?
#
# Both say that they reduce the error of quantization, PiSSA by "about 20 %" against QLoRA (second-hand; in the nuclear norm, eq. 8).
# The error at the start, $‖Q + sBA - W‖_F/‖W‖_F$, for three kinds of $W$ (512 × 512, $r = 16$, NF4 in blocks of 64), three seeds:

# %% tags=["hide-input"]
found = claims.run(["quantized_starts"])["quantized_starts"]
for kind in ("gauss", "power", "outliers"):
    rows = {name: np.mean([f[f"{kind}_{name}"] for f in found]) for name in ("nf4", "pissa", "loftq_1", "loftq_5")}
    print(f"{kind:8}", *(f"{name} {value:.3f}" for name, value in rows.items()))
    expected = {"gauss": (0.092, 0.087, 0.087, 0.079), "power": (0.092, 0.042, 0.085, 0.078)}.get(kind)
    assert expected is None or [round(v, 3) for v in rows.values()] == list(expected)
    assert kind != "outliers" or (abs(rows["pissa"] / rows["nf4"] - 0.48) < 0.03 and rows["loftq_5"] > 0.1)
print(claims.EXPERIMENTS["quantized_starts"].verdict(found))

# %% tags=["hide-input"]
draw_quantization_starts(found)

# %% [markdown]
# On a flat spectrum LoftQ is better, if it takes its five steps; on a falling one and with outlier columns PiSSA is, by a factor of
# nearly two. Why?
#
# NF4's error is proportional to the size of what is quantized, $‖W - \mathrm{quant}(W)‖ ≈ ε‖W‖$ with $ε ≈ .092$ where no column stands
# out, and looks like noise, a Gaussian matrix. Call $p$ the share of $‖W‖_F^2$ in $W$'s first $r$ singular directions, and $g$ the same
# share for a Gaussian matrix of that shape. PiSSA takes $p$ out of what is quantized; one step of LoftQ takes $g$ out of the error. If
# $ε$ is the same before and after,
#
# $$\frac{\text{PiSSA}}{\text{NF4}} = \sqrt{1 - p},\qquad \frac{\text{LoftQ, 1 step}}{\text{NF4}} = \sqrt{1 - g},\qquad
# p = \frac{\sum_{i ≤ r} σ_i^2}{\sum_i σ_i^2} .$$
#
# On a Gaussian $W$ these are the same number: hence .087 twice. PiSSA wins over one step where $W$'s spectrum falls more steeply than
# noise's. Four further steps lower LoftQ's error by about another tenth on the spectra below, so against five of them $p$ must be larger.
#
# The condition on $ε$ matters. An outlier column inflates the maxima of the blocks that it crosses, so the other weights of these
# blocks are quantized too coarsely. PiSSA removes just that column, and $ε$ falls as well:

# %% tags=["hide-input"]
outliers = []
for seed in range(3):
    draw = np.random.default_rng(seed)
    w = draw.standard_normal((512, 512))
    w[:, draw.choice(512, 4, replace=False)] *= 10
    sigma = np.linalg.svd(w, compute_uv=False)
    size, rest = np.linalg.norm(sigma), np.linalg.norm(sigma[16:])
    before = np.linalg.norm(Linear4bit.of(linear(w), double_quant=False).dense() - w)
    after = np.linalg.norm(weight(variants.pissa(LoRALinear(linear(w), r=16, alpha=16), code="nf4")) - w)
    outliers.append((1 - (rest / size) ** 2, rest / size, before / size, after / rest, after / before))
print("4 of 512 columns ten times as large, three seeds:")
for name, column in zip(
    ("p", "√(1 − p)", "ε of W", "ε of W_res", "PiSSA / NF4"), zip(*outliers, strict=True), strict=True
):
    print(f"{name:11}", *(f"{value:.3f}" for value in column), sep="  ")
columns = np.array(outliers)
assert [f"{m:.2f}" for m in columns.mean(axis=0)[:2]] == ["0.49", "0.71"] and (
    np.abs(columns[:, 3] - 0.092) < 0.001
).all()
assert (columns[:, 2] > 0.13).all() and (columns[:, 2] < 0.145).all() and (columns[:, 4] < 0.51).all()

# %% [markdown]
# With $p = .49$ the rule says .71; as $ε$ falls from about .14 to .092, less than .5 is left of NF4's error. So the rule is for matrices
# without outlier columns, and PiSSA does better than the rule where there are some.
#
# The test: power laws $σ_i = i^{-a}$, $a = 0 … 1$, and the 35 weights of the embedded base model, all with $r = 8$.


# %% tags=["hide-input"]
def share(w, r=8):
    sigma = np.linalg.svd(w, compute_uv=False) ** 2
    return float(sigma[:r].sum() / sigma.sum())


def starts(w, r=8):
    """p, and the errors of PiSSA and of LoftQ in 1 and 5 steps as multiples of NF4's."""
    nf4 = off(Linear4bit.of(linear(w), double_quant=False).dense(), w)
    layers = {"pissa": variants.pissa(LoRALinear(linear(w), r=r, alpha=r), code="nf4")}
    layers |= {f"loftq_{k}": variants.loftq(linear(w), r, steps=k) for k in (1, 5)}
    return {"share": share(w, r)} | {name: off(weight(h), w) / nf4 for name, h in layers.items()}


def power_law(a, d=192, seed=0):
    rng = np.random.default_rng(seed)
    return (orthonormal(rng, d, d) * np.arange(1, d + 1) ** -a) @ orthonormal(rng, d, d).T


laws = [starts(power_law(a)) for a in np.arange(0, 1.05, 0.1)]
base = tl.Llama.from_pretrained("base")
matrices = [
    starts(np.asarray(h.dense(), float)) for path, h in base.named_modules() if type(h) is Linear and "layers" in path
]
g = share(np.random.default_rng(0).standard_normal((192, 192)))

# %% tags=["hide-input"]
miss = max(abs(f["pissa"] / np.sqrt(1 - f["share"]) - 1) for f in laws + matrices)
one, five = (sum(f["pissa"] < f[f"loftq_{k}"] for f in matrices) for k in (1, 5))
p = [f["share"] for f in matrices]
print(
    f"PiSSA is √(1 − p) to {miss:.1%}; one step on a flat spectrum: {laws[0]['loftq_1']:.3f}, √(1 − g) = {np.sqrt(1 - g):.3f}"
)
print(
    f"base model: p from {min(p):.2f} to {max(p):.2f}; PiSSA ahead of one step on {one} of {len(p)}, of five on {five}"
)
assert miss < 0.03 and abs(laws[0]["loftq_1"] - np.sqrt(1 - g)) < 0.01
assert len(p) == 35 and one == 35 and five == 7
assert all(0.88 < f["loftq_5"] / f["loftq_1"] < 0.93 for f in laws)

# %% tags=["hide-input"]
which_start(laws, matrices)

# %% [markdown]
# (Hollow squares and triangles differ in height since the base model's matrices differ in shape, and $g$ with them.)
#
# The rule holds for trained weights as for drawn ones, to 3 %. On the base model PiSSA is nearer to $W$ than one step of LoftQ in
# every matrix, and nearer than five steps in 7 of the 35. (Nearer at the start: what training makes of it, this does not say.)
#
# And more steps? The SVD is the best answer to a given $Q$. But quantization, with its scales taken from the maxima, is not the best
# answer to a given $BA$, so the whole is no descent. On a Gaussian it settles. On a steep spectrum it turns round:

# %% tags=["hide-input"]
steep = power_law(1.5)
alone = off(quantize(steep.astype(np.float32), "nf4", 64).dequantize(), steep)
errors, below, sizes = [], 0, []
for _ in range(40):
    quantized = quantize((steep - below).astype(np.float32), "nf4", 64).dequantize()
    u, sigma, vt = np.linalg.svd(steep - quantized)
    below = (u[:, :r] * sigma[:r]) @ vt[:r]
    errors.append(off(quantized + below, steep) / alone)
    sizes.append(np.linalg.norm(steep - below) / np.linalg.norm(steep))
print(
    "σᵢ = i^−1.5, LoftQ's error over NF4's:",
    *(f"{errors[t - 1]:.2f} after {t}" for t in (1, 2, 5, 10, 20, 40)),
    sep="  ",
)
print(f"‖W − BA‖/‖W‖: {sizes[0]:.2f} after 1, {sizes[-1]:.2f} after 40")
assert sizes[0] < 1 and sizes[-1] > 1.4
assert 3 <= 1 + int(np.argmin(errors)) <= 7 and round(min(errors), 2) == 0.75 and errors[-1] > 0.85 > errors[0]

# %% [markdown]
# It is best after about five steps, at .75; after 40 it is worse than after one, and not far from NF4 alone. The bypass drifts
# against $W$: what is left to quantize, $W - BA$, becomes larger than $W$ itself, and NF4's error grows with it. PiSSA makes that part
# smaller on purpose.
#
# ## 5 · Start from the gradient: LoRA-GA
#
# One step of gradient descent with rate η on both factors moves $W$ to first order by $-η\,s\,(\bar B A + B \bar A)$, and with $\bar B =
# s\,G A^{\top}$, $\bar A = s\,B^{\top}G$ this is
#
# $$ΔW_1 = -η s^2\,(G A^{\top}A + B B^{\top} G) .$$
#
# Its rank is at most $2r$. Take $G = U S V^{\top}$, rows of $A$ from $v_1 … v_r$ and columns of $B$ from $u_{r+1} … u_{2r}$, all of one
# length: then it is the best approximation of $-G$ of that rank. $W$ gives up $sBA$, so that the output at the start is the base's.
# ($G$ has $σ_i = i^{-0.7}$ here, and is 256 × 256.)

# %%
U, V, i = orthonormal(rng, 256, 256), orthonormal(rng, 256, 256), np.arange(1, 257)
G = (U * i**-0.7) @ V.T
A, B = V.T[:r], U[:, r : 2 * r]
step = G @ A.T @ A + B @ B.T @ G

# %% [markdown]
# How well is it aligned with full fine-tuning's step? The cosine of the two, against the best of rank $2r$, $\sqrt{p_{2r}}$; then the
# experiment, which takes the library's factors, and LoRA's and PEFT's beside them.

# %% tags=["hide-input"]
cosine = (step * G).sum() / np.linalg.norm(step) / np.linalg.norm(G)
first = claims.run(["aligned_first_step"])["aligned_first_step"]
lora, ga, peft, bound = (np.mean([f[k] for f in first]) for k in ("lora", "lora_ga", "peft", "bound"))
print(
    f"by hand {cosine:.4f}, best possible {np.sqrt(share(G, 2 * r)):.4f}; library {ga:.4f}, as in PEFT {peft:.4f}, LoRA {lora:.3f}"
)
assert off(step, (U[:, : 2 * r] * i[: 2 * r] ** -0.7) @ V.T[: 2 * r]) < 1e-12
assert abs(cosine - np.sqrt(share(G, 2 * r))) < 1e-12 and abs(ga - cosine) < 1e-5 and abs(bound - cosine) < 1e-12
assert (round(ga, 2), round(peft, 2), round(lora, 2)) == (0.90, 0.85, 0.16)

# %% [markdown]
# .90 against .16: LoRA's random $A$ sees 8 of 256 directions. That is one step; what follows it the experiment does not say.
#
# ## 6 · What to train: LoRA-FA, VeRA, LoRA+
#
# **LoRA-FA** freezes $A$. The gradient of $B$ needs $A x$, with $r$ numbers a row, and not $x$, with $d$: what the tape holds for the
# bypass falls by the factor $1 + d/r$. The update stays in $A$'s row space.
#
# **VeRA** trains $λ_b$ (out numbers) and $λ_d$ ($r$ numbers) for each layer, and shares one random pair: $L(d + r)$ in all. GPT-3
# with q and v in 96 layers of $d = 12288$, at $r = 256$, against LoRA's $L \cdot 2d \cdot r$ at $r = 1$:

# %% tags=["hide-input"]
n, d, k = 40, 512, 4
h, rows = LoRALinear(Linear(d, 96), r=k), Tensor(rng.standard_normal((n, d)).astype(np.float32), requires_grad=True)
held = [tl.tape_bytes(h(rows), exclude=[w for _, w in h.named_weights()])]
variants.freeze_A(h)
held.append(tl.tape_bytes(h(rows), exclude=[w for _, w in h.named_weights()]))
print(f"LoRA-FA: the tape holds {held[1]:,} bytes instead of {held[0]:,}, 1 + d/r = {held[0] / held[1]:.0f} times less")
assert held == [4 * n * (d + k), 4 * n * k] and held[0] / held[1] == 1 + d / k == 129

vera, lora = 2 * 96 * (12288 + 256), 2 * 96 * 2 * 12288
counted = claims.run(["vera_counts"], seeds=(0,))["vera_counts"][0]
print(f"VeRA, r = 256: {vera:,}; LoRA, r = 1: {lora:,}")
assert (vera, lora) == (2_408_448, 4_718_592) and (counted["vera"], counted["lora"]) == (vera / 1e6, lora / 1e6)

# %% [markdown]
# **LoRA+** gives $B$ a rate λ times $A$'s. Its theorem 1 is about Adam: as the width $n$ grows, equal rates cannot be efficient, $η_A =
# Θ(1/n)$ with $η_B = Θ(1)$ can. What is λ in a given network? That depends on the optimizer.
#
# *Under gradient descent λ is a larger start.* Put $A' = λ^{1/4}A$, $B' = λ^{-1/4}B$: the product is the same, the gradients are
# $\bar A' = λ^{-1/4}\bar A$, $\bar B' = λ^{1/4}\bar B$, and the rates $(η, λη)$ become
#
# $$A' ← A' - \sqrt λ\,η\,\bar A',\qquad B' ← B' - \sqrt λ\,η\,\bar B' :$$
#
# equal rates from a larger start of $A$. Adam, or the sign of the gradient, does not see the factors $λ^{∓1/4}$, so there these are two
# different runs.
#
# *Under Adam λ is a larger α.* Notebook 14 (sections 4 and 5): with $ε = 0$ and no weight decay, $(α, A_0, η, λη)$ and $(λα, A_0, η, η)$
# are one run. (In these terms the theorem asks for $α$ in proportion to $n$, if the rates are equal.)
#
# Measured, three seeds: the difference of the two runs of the first claim, under either rule; then a small ReLU network with Adam, where
# each λ has its best η of eight, with α = 4 and, for λ = 1, also with α = 64.

# %% tags=["hide-input"]
plus = claims.run(["lora_plus_start", "lora_plus_ratio"])
same, sweep = plus.values()
sign = [f["sign"] for f in same]
print(
    f"gradient descent: the two runs differ by {max(f['descent'] for f in same):.0e}; sign descent: by {min(sign):.2f} to {max(sign):.2f}"
)
assert max(f["descent"] for f in same) == 0 and min(sign) > 0.15
for width, expected in ((32, "0.078 0.056 0.033 0.033"), (128, "0.061 0.064 0.034 0.034")):
    rows = np.array(
        [[f[f"width_{width}_{key}"] for f in sweep] for key in ("ratio_1", "ratio_4", "ratio_16", "alpha_64")]
    )
    left = [f"{e:.3f}" for e in rows.mean(axis=1)]
    shown = [
        f"{e} ± {half:.3f}" for e, half in zip(left, np.ptp(rows, axis=1) / 2, strict=True)
    ]  # ±: half the range of the seeds
    print(
        f"width {width:3}: error left at λ = 1, 4, 16: {', '.join(shown[:3])};  at λ = 1 with 16 times the α: {shown[3]}"
    )
    assert " ".join(left) == expected and np.abs(rows[3] / rows[2] - 1).max() < 0.02
    assert (rows[0] / rows[2] > 1.5).all()

# %% [markdown]
# At α = 4, λ = 16 leaves half the error of λ = 1 in these three seeds, .033 against .078 at width 32 and .034 against .061 at 128 (seeds
# 3 to 7 have gains between .8 and 1.8 at 32, 1.2 and 3.1 at 128: a gain, but not its size, can be told). And equal rates with α = 64
# leave the same .033 and .034, seed by seed to 2 % (the toy has $ε = 10^{-8}$ and float32, so it is not exact). λ helps here **because
# α = 4 was too small**; who searches α and one rate finds the same. That λ matters more in wider networks cannot be seen at these two
# widths.
#
# Which λ? 16 is reported for RoBERTa with $A = 0$ and a random $B$; with $B = 0$, as usual, 4 to 8, for Llama 2 to 4 (notes on the paper).
# Neither the authors' code nor PEFT has a default. By the exchange such numbers say little without the α that they belong to.
#
# ## 7 · How to share the rank: AdaLoRA
#
# AdaLoRA changes three things.
#
# - *The form.* $ΔW = s\,P Λ Q$ (eq. 3), like a singular value decomposition; a penalty keeps $P$ and $Q$ nearly orthogonal (eq. 4).
# - *Giving up a rank.* An entry of Λ is set to 0. It can come back, since its column of $P$ and row of $Q$ are kept.
# - *Who gives up.* All layers compete for one budget. Each entry of Λ has, with its column and row, an importance made of
#   $|w\,∂L/∂w|$, smoothed over the steps and weighted by its own unsteadiness (eq. 6 to 11); the least important are set to 0.
#
# Does the budget go where it is needed? Two layers planted with updates of ranks 1 and 6, and a budget of 7; three seeds:

# %% tags=["hide-input"]
shared = claims.run(["adalora_allocation"])["adalora_allocation"]
for f in shared:
    print(
        "given: {rank_one:.0f} and {rank_two:.0f}; error {error:.3f}, against {error_lora:.3f} for LoRA of ranks 3 and 4".format(
            **f
        )
    )
    assert (f["rank_one"], f["rank_two"]) == (1, 6)
    assert f["error"] < 0.02 and abs(f["error_lora"] - 0.41) < 0.01

# %% [markdown]
# A rank of 4 cannot hold 6 equal singular values: it must leave a third of one layer's $‖ΔW^*‖^2$, a sixth of both, and $\sqrt{1/6} = .41$.
#
# ## 8 · How to measure size: DoRA
#
# DoRA (eq. 5) splits a weight into the magnitude of each row and its direction, and lets LoRA move the direction:
#
# $$W' = m ⊙ \frac{V}{‖V‖},\qquad V = W_0 + s\,B A,\qquad m = ‖W_0‖ \text{ at the start}.$$
#
# Then $W' = W_0$ while $B = 0$. The norm of $V$ is treated as a constant in the backward pass (§4.3; exercise 4).

# %%
A, B = rng.standard_normal((r, 128)), 0.1 * rng.standard_normal((96, r))
m = np.linalg.norm(W, axis=1) * rng.uniform(0.9, 1.1, 96)  # some magnitudes, as after training
V = W + s * B @ A
W_dora = m[:, None] * V / np.linalg.norm(V, axis=1, keepdims=True)

# %% tags=["hide-input"]
dora = LoRALinear(linear(W), r=r, alpha=s * r, use_dora=True)
assert off(dora.merged(), W) < 1e-6  # at the start
for tensor, value in ((dora.lora_A.weight, A), (dora.lora_B.weight, B), (dora.magnitude, m)):
    tensor.data = value.astype(np.float32)
assert off(dora.merged(), W_dora) < 1e-6 and off(dora(Tensor(x)).data, x @ W_dora.T) < 1e-5
columns = np.linalg.norm(W, axis=0) * V / np.linalg.norm(V, axis=0)
by_rows = np.linalg.norm(W, axis=1, keepdims=True) * V / np.linalg.norm(V, axis=1, keepdims=True)
print(
    f"norms over columns instead of rows: W' differs by {off(columns, by_rows):.1%}, where ‖ΔW‖/‖W‖ = {off(V, W):.0%}"
)
assert round(off(columns, by_rows), 2) == 0.11 and round(off(V, W), 2) == 0.57

# %% [markdown]
# What for? DoRA's argument (§3.2, §4.1) is a correlation: over layers and steps, the change of magnitude ΔM and of direction ΔD
# go together in LoRA (+.83), and against each other in full fine-tuning (−.62) and in DoRA (−.31). A tanh network, tuned from one
# task to the next, its five hidden matrices adapted or trained:

# %% tags=["hide-input"]
moved = claims.run(["magnitude_and_direction"])["magnitude_and_direction"]
for axis in ("rows", "columns"):
    rows = {kind: [f[f"{kind}_{axis}"] for f in moved] for kind in ("lora", "dora", "full")}
    print(
        f"{axis:8}",
        *(f"{kind} {np.mean(c):+.2f} ({min(c):+.2f} to {max(c):+.2f})" for kind, c in rows.items()),
        sep="  ",
    )
lora, dora, full = ([f[f"{kind}_rows"] for f in moved] for kind in ("lora", "dora", "full"))
accuracy = [np.mean([f[f"{kind}_accuracy"] for f in moved]) for kind in ("lora", "dora", "full")]
print("accuracy: LoRA {:.3f}, DoRA {:.3f}, full {:.3f}".format(*accuracy))
assert min(lora) > 0.8 and -0.6 < min(dora) <= max(dora) < 0 and min(full) < 0 < np.mean(full) < max(full)
assert abs(accuracy[0] - accuracy[1]) < 0.01

# %% [markdown]
# LoRA +.95 and DoRA −.33, near the published values. But full fine-tuning, which DoRA is to resemble, has either sign here (−.31 to
# +.66): three seeds do not decide it. LoRA and DoRA learn equally well.
#
# ## 9 · How to meet quantization: QA-LoRA and IR-QLoRA
#
# Merging $sBA$ into a 4-bit weight means rounding again. **QA-LoRA** (§3.3, algorithm 1) makes a bypass that needs no rounding.
#
# - The base: $\hat W = κ(q - β)$ with integers $q$, and one scale $κ$ and one zero point $β$ for each output and each group of 32
#   inputs. (The paper writes α for $κ$. Here α is LoRA's.)
# - The bypass: $A$ (r × L) reads the *sum* of $x$ over each of the $L$ groups. So its update is one number for each output and group.
#
# Then the update is constant within a group, as $κβ$ is, and can be taken into it:
#
# $$κ(q - β) + s\,(BA)_{\text{group}} = κ\,(q - β'),\qquad β' = β - \frac{s\,BA}{κ} .$$

# %%
base = IntegerLinear.of(linear(W), bits=4, group=32)
q, κ, β = base.codes.data.reshape(96, 4, 32), base.scale.data.astype(float), base.zero.data.astype(float)
A, B = 0.05 * rng.standard_normal((r, 4)), rng.standard_normal((96, r))
β_merged = β - s * (B @ A) / κ
W_merged = (κ[..., None] * (q - β_merged[..., None])).reshape(96, 128)

# %% [markdown]
# By hand in float64, the merged weight gives the output of base and bypass to the last digits; the library in float32 agrees.
#
# Two comparisons: a plain LoRA of the same size, merged by rounding to 4 bits again; and QA-LoRA with its $β'$, which are real numbers,
# rounded to integers, as 4-bit zero points would be.

# %% tags=["hide-input"]
pooled = x.astype(float).reshape(50, 4, 32).sum(axis=2)
by_parts = x @ (κ[..., None] * (q - β[..., None])).reshape(96, 128).T + s * pooled @ A.T @ B.T
assert off(x @ W_merged.T, by_parts) < 1e-13
qa = QALoRALinear(base, r=r, alpha=s * r)
qa.lora_A.data, qa.lora_B.data = A.astype(np.float32), B.astype(np.float32)
assert off(qa.merge().dense(), W_merged) < 1e-6 and qa.merge().codes is base.codes
assert off(qa(Tensor(x)).data, x @ W_merged.T) < 1e-6

update = W_merged - base.dense()
plain = rng.standard_normal((96, r)) @ rng.standard_normal((r, 128))
plain *= np.linalg.norm(update) / np.linalg.norm(plain)
wanted = base.dense() + plain
again = np.linalg.norm(IntegerLinear.of(linear(wanted)).dense() - wanted) / np.linalg.norm(plain)
rounded = np.linalg.norm(np.repeat(κ * (np.round(β_merged) - β_merged), 32)) / np.linalg.norm(update)
print(f"‖ΔW‖/‖W‖ = {np.linalg.norm(update) / np.linalg.norm(W):.2f}; error of merging / ‖ΔW‖:")
print(
    f"QA-LoRA {off(x @ W_merged.T, by_parts):.0e}, plain LoRA rounded again {again:.2f}, QA-LoRA with whole zero points {rounded:.2f}"
)
assert abs(again - 0.29) < 0.02 and abs(rounded - 0.27) < 0.02

# %% [markdown]
# The merge is exact, but only with real zero points. Rounding $β'$ moves each weight by up to $κ/2$, with equal chances in between,
# which is just what rounding the weights does: .27 of the update's size against .29.
#
# The other price is freedom: $BA$ has 4 columns here instead of 128, and $A$ is 32 times smaller.
#
# **IR-QLoRA** shifts each block by a τ before quantization, since its authors read entropy as information kept:
#
# $$τ^* = \arg\max_τ H\big(\mathrm{quant}(w - τ)\big)\quad\text{over candidates around the block's median (eq. 8 to 10).}$$
#
# On Gaussian weights, and in bits a weight:

# %% tags=["hide-input"]
icq = claims.run(["calibrated_entropy"])["calibrated_entropy"]
bits, best, error = (np.mean([f[k] for f in icq]) for k in ("entropy_nf4", "entropy_best", "error_best"))
print(f"entropy of a block of 64: {bits:.2f} -> {best:.2f} bits; squared error: {error:.3f} times NF4's")
indices = quantize(rng.standard_normal((1024, 512)).astype(np.float32), "nf4", 64).indices()
pooled_bits = variants.block_entropy(indices, indices.size)[0]
print(
    f"of all blocks together: {pooled_bits:.2f} bits; mean over the blocks: {variants.block_entropy(indices, 64).mean():.2f}"
)
assert (round(bits, 2), round(best, 2)) == (3.69, 3.76) and all(0.98 < f["error_best"] < 1.02 for f in icq)
assert round(pooled_bits, 2) == 3.88 and round(variants.block_entropy(indices, 64).mean(), 2) == 3.69

# %% [markdown]
# The entropy rises by the paper's 0.07 bits, for weights that were drawn at random and know nothing. The squared error stays: within
# 1.5 % of NF4's, above or below. That is notebook 16's lesson again: a code that uses its values equally often is not a code that
# errs less.
#
# (Notebook 16 has 3.88 bits for NF4 in blocks of 64, and here it is 3.69. That one is the entropy of how often the 16 values are used in
# all blocks together. This one counts within each block and takes the mean: 64 weights use 16 values less evenly than their law.)
#
# IR-QLoRA's second part, the elastic connection, adds averages of $x$ beside $A$ and repetitions beside $B$. That is still one product
# of rank $r$ (`variants.IECLinear`).
#
# ## 10 · Limits
#
# - *The rank.* Where the update that a task needs has full rank, no rank is enough: with a planted ΔW of full rank there is no
#   plateau, and each rank leaves what Eckart and Young say, to 5 %: trained at $r = 8$ of 96, .103, 41 times the noise's
#   $σ^2 = .0025$ (mean of three seeds; notebook 12).
# - *Learning and forgetting.* "LoRA learns less and forgets less", and full fine-tuning's update has 10 to 100 times the rank (Biderman
#   et al. 2024). On a small tanh network, pre-trained on one task and tuned on another:

# %% tags=["hide-input"]
full = claims.run(["full_rank_target"])["full_rank_target"]
errors, tails = (np.array([f[key] for f in full]) for key in ("mse", "tail"))
print(
    "full-rank ΔW, error at r =",
    *(f"{k}: {e:.3f} " for k, e in zip(full[0]["ranks"], errors.mean(axis=0), strict=True)),
    "σ² 0.0025",
)
eight = errors.mean(axis=0)[full[0]["ranks"].index(8)]
assert (np.diff(errors) < 0).all() and (errors / tails - 1).min() > 0 and (errors / tails - 1).max() < 0.05
assert round(eight, 3) == 0.103 and round(eight / 0.0025) == 41

forgets = claims.run(["learns_less_forgets_less"])["learns_less_forgets_less"]
mean = {key: np.mean([f[key] for f in forgets]) for key in forgets[0]}
print(
    "new task learned: full {learned_full:.3f}, LoRA {learned_lora:.3f}; old task before: {old_before:.3f}".format(
        **mean
    )
)
print("old task kept by LoRA minus full, at equal learning: {kept_more:+.3f};".format(**mean), end=" ")
print("rank for 90 % of ‖ΔW‖²: full {rank_full:.1f}, LoRA {rank_lora:.1f}".format(**mean))
print(claims.EXPERIMENTS["learns_less_forgets_less"].verdict(forgets))
assert max(f["kept_more"] for f in forgets) < 0  # by .02 to .10; what one point of the 2,048 makes is .0005
assert abs(mean["kept_more"] + 0.05) < 0.03 and 3 < mean["rank_full"] / mean["rank_lora"] < 5

# %% [markdown]
# The ranks differ by a factor of 4, not 10: that part **fails** here. LoRA learns a little less (.64 against .66).
# At equal learning it keeps .05 *less* of the old task, not more; but the three seeds differ among each other by as much (.02 to .10) and
# leave it *undecided*. Eight seeds (0 to 7) have it between .01 and .10 less, each of them, which decides it. The toy does not refute the
# paper's measurement on language models; it does show that a low rank as such is no protection against forgetting.
#
# ## Where paper and code differ
#
# 1. **LoftQ in PEFT does not divide by $s$.** The model computes $Q + s\,BA$ with the factors of $s = 1$: from $α = 2r$ on it
#    starts farther from $W$ than NF4 alone (below, and with PEFT itself in `tests/oracle/test_oracle_variants.py`).
# 2. **LoRA-GA in PEFT** multiplies $B$ by its singular values and scales $B$ only: the first step's cosine falls from .90, the best
#    of its rank, to .85 (section 5).
# 3. **AdaLoRA's penalty** is a sum of *squared* norms in eq. 4; the authors' code and PEFT take the mean of the norms. For one layer
#    of $r = 12$ at the start, where $P$ and $Q$ are near 0, 22 becomes 3.3. (A norm's gradient, unlike its square's, does not fade
#    as the factors become orthogonal.)
# 4. **QA-LoRA**: algorithm 1 multiplies the pooled mean by $D_{in}/L$, that is, it pools sums. The code pools means, and divides by
#    the group size where it merges. Each is consistent. Mixing them is wrong by the group size, here 32 (exercise 2).
# 5. **DoRA**'s norm $‖\cdot‖_c$ is over columns; PEFT takes one norm for each output, over its inputs, which are rows of torch's
#    weight. The two give weights that lie 11 % apart in section 8's example, where $‖ΔW‖/‖W‖$ is 57 %.
# 6. **PiSSA's "about 20 %"** is in the nuclear norm, on language models. In the Frobenius norm it is 6 % here on a Gaussian, 54 % at
#    $i^{-0.7}$ and 52 % with outlier columns: it depends on $p$, and on whether $ε$ falls too (section 4).
# 7. **IR-QLoRA's eq. 12** as printed gives vectors of length $h r/\gcd(h, r)^2$ where $r$ are needed: right for $h = r^2$, such as
#    $h = 4096$ with $r = 64$, wrong for 11008 (172). The code averages $r$ runs of $h/r$ inputs, and so does `IECLinear`.

# %% tags=["hide-input"]
unscaled = variants.loftq(linear(W), r=r, steps=5)  # s = 1: the factors that PEFT would take
distance = [off(unscaled.base_layer.dense() + k * unscaled.delta(), W) for k in (1, 2, 4)]
nf4 = off(Linear4bit.of(linear(W), double_quant=False).dense(), W)
print(f"1: α = r, 2r, 4r: {distance[0]:.3f}, {distance[1]:.3f}, {distance[2]:.3f}; NF4 alone {nf4:.3f}")
assert distance[0] < nf4 < distance[1] < distance[2]
fresh = variants.AdaLoRALinear(linear(W), r=12)
squared, norms = (variants.orthogonality(fresh, squared=k).item() for k in (True, False))
print(f"3: squared {squared:.1f}, mean of the norms {norms:.2f}")
assert abs(squared - 22) < 0.5 and abs(norms - 3.3) < 0.1
means = x.reshape(50, 4, 32).mean(axis=2) @ (32 * A).T @ B.T  # 4: the code pools means, so its A is 32 times larger
assert off(means, pooled @ A.T @ B.T) < 1e-6 and abs(off(means / 32, pooled @ A.T @ B.T) - 31 / 32) < 1e-6
gain = {
    kind: 1 - np.mean([f[f"{kind}_pissa"] / f[f"{kind}_nf4"] for f in found]) for kind in ("gauss", "power", "outliers")
}
print("6: PiSSA's gain: {gauss:.0%} on a Gaussian, {power:.0%} at i^−0.7, {outliers:.0%} with outliers".format(**gain))
assert [round(gain[kind], 2) for kind in ("gauss", "power", "outliers")] == [0.06, 0.54, 0.52]
assert [h * 64 // math.gcd(h, 64) ** 2 for h in (4096, 11008)] == [64, 172]

# %% [markdown]
# ## Exercises
#
# For grading only the setup cell and the exercise cells are run: put helpers inside the exercise's cell.
#
# ### 20-1 PiSSA or LoftQ?
#
# Section 4's rule, as a prediction from the spectrum alone, for a $W$ without outlier columns.


# %% tags=["exercise"]
def exercise_1(sigma, shape, r):
    """Return (pissa, loftq): the errors at the start of QPiSSA and of LoftQ with one step, as multiples of NF4's alone.

    W has no outlier columns: quantization errs in the same proportion to W's size before and after anything is taken away.
    sigma  the singular values of W, an array of min(shape) numbers, descending;  shape  (out, in);  r  the rank of the bypass
    "Error" is ‖Q + s B A − W‖_F. You do not get W. What does each start remove, and from what? For noise you may draw a matrix.
    Checked: two numbers, each within 4 % of what is measured on fresh matrices, among them long ones, of 40 to 576 rows and
    columns and with r from 8 to 16.
    """

    # BEGIN SOLUTION
    def rest(values):
        return math.sqrt(float((values[r:] ** 2).sum() / (values**2).sum()))

    noise = np.random.default_rng(0).standard_normal(shape)
    return rest(np.asarray(sigma)), rest(np.linalg.svd(noise, compute_uv=False))
    # END SOLUTION


# %%
_ = grade("20-1", exercise_1)

# %% [markdown]
# ### 20-2 Another merge
#
# Other kernels keep the smallest value of a group instead of a zero point, and the authors' code pools means instead of sums.


# %% tags=["exercise"]
def exercise_2(scale, low, A, B, s, group):
    """Return (low', A_sum): where the bypass goes when it is merged, and the A of the same bypass with sums instead of means.

    The base is Ŵ = scale · q + low, with q (out, L, group) integers and scale, low (out, L). The bypass adds s B A p(x), where p(x) has
    the L *means* of x over the groups; A (r, L), B (out, r).
    low' (out, L) is such that scale · q + low' computes what base and bypass compute together. A_sum (r, L) is such that s B A_sum
    times the *sums* of x is the same bypass. Checked: both arrays, to 1e-10.
    """
    # BEGIN SOLUTION
    A_sum = A / group  # a mean is a sum divided by the size of the group
    return low + s * (B @ A_sum), A_sum
    # END SOLUTION


# %%
_ = grade("20-2", exercise_2)

# %% [markdown]
# ### 20-3 VeRA against LoRA, counted
#
# VeRA's rank costs almost nothing to train, but its random pair must be held, or drawn again each time.


# %% tags=["exercise"]
def exercise_3(shapes, budget):
    """Return (r_vera, r_lora, frozen) for adapting layers with a budget of trained numbers.

    shapes  [(out, in), …], one for each layer;  budget  how many numbers may be trained in all
    r_vera  the largest rank of a VeRA on all these layers that keeps to the budget, 0 if there is none;  r_lora  the same for LoRA
    frozen  how many numbers the pair A, B that all the layers share holds at r_vera; each layer takes slices of it, A[:, :in]
            and B[:out]
    Checked: three whole numbers. (Ranks above min(out, in) are allowed.)
    """
    # BEGIN SOLUTION
    outs, ins = zip(*shapes, strict=True)
    r_vera = max(0, (budget - sum(outs)) // len(shapes))
    r_lora = budget // (sum(outs) + sum(ins))
    return (
        r_vera,
        r_lora,
        r_vera * (max(ins) + max(outs)),
    )  # the largest `in` and the largest `out` may be of two layers
    # END SOLUTION


# %%
_ = grade("20-3", exercise_3)

# %% [markdown]
# ### 20-4 What DoRA's backward pass leaves out


# %% tags=["exercise"]
def exercise_4(V, m, G):
    """Return (paper, exact): the gradient of L with respect to V in W' = m ⊙ V/‖V‖, as DoRA computes it, and as it is.

    V (out, in), m (out,), ‖V‖ the norm of each row;  G = ∂L/∂W' (out, in)
    paper  with ‖V‖ treated as a constant (§4.3);  exact  with ‖V‖ a function of V
    What does the second do to a change of V along V itself? Checked: two arrays (out, in), the second against differences of L.
    """
    # BEGIN SOLUTION
    norm = np.linalg.norm(V, axis=1, keepdims=True)
    paper = m[:, None] / norm * G
    unit = V / norm
    return paper, paper - (paper * unit).sum(axis=1, keepdims=True) * unit  # the part along V cannot change V/‖V‖
    # END SOLUTION


# %%
_ = grade("20-4", exercise_4)

# %% [markdown]
# ## Summary
#
# - A start beside a 4-bit weight: PiSSA leaves $\sqrt{1-p}$ of NF4's error, one step of LoftQ $\sqrt{1-g}$: .087 both on a Gaussian,
#   .042 against .085 at $i^{-0.7}$. Five steps of LoftQ reach .079 and .078. With outlier columns PiSSA leaves less than the rule says,
#   .48. (`variants.pissa`, `variants.loftq`; held by `tests/test_variants.py`.)
# - LoRA-GA's first step has the best cosine of its rank, .90. VeRA trains 2.41 million numbers where LoRA of rank 1 trains 4.72.
# - LoRA+'s λ is a larger start under gradient descent and a larger α under Adam: λ = 16 leaves .033 and .034, and so does 16 times the α.
# - AdaLoRA finds the planted 1 and 6. QA-LoRA merges exactly.
# - What did not come out: full fine-tuning's ΔM and ΔD (undecided: either sign), less forgetting (in no seed of eight), less error from
#   more entropy (1.00 times).
# - All of them: `claims.describe(claims.run([...]))`; beside PEFT: `tests/oracle/test_oracle_variants.py`.
#
# ## How the papers were read
#
# Sections and equations are cited where the text of a paper or a transcription of it was read. LoRA-FA, VeRA, LoRA+ and LoRA-GA were read
# in abstracts, notes, the authors' code and PEFT 0.21.2, so they are cited without numbers of equations; LoRA+'s theorem and its values
# of λ are from notes. PiSSA's "about 20 %" is second-hand.
