# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 10 · Merging and switching
#
# **The bypass can be added into the weight, and then it costs nothing. On paper it can be subtracted again as well; in floating
# point it cannot, and in four bits a small one may not arrive at all.** This notebook merges, unmerges, switches and combines
# adapters, and measures what each loses.
#
# Accompanies LoRA (arXiv 2106.09685) §4.1 ("No Additional Inference Latency"), §4.2 and table 1. Questions that readers have
# asked: how to merge into a 4-bit base (peft 2321; qlora 28 and 29; section 8), and why weights change under `eval()` (LoRA
# issues 34, 61 and 190; section 4).
#
# Hours: 4 (2 to read and run, 2 for the exercises). Prerequisites: notebook 02, sections 5 and 6 (the bypass); that a float32
# holds 24 significant bits and is rounded to the nearest, a tie to the even one; the singular value decomposition for exercise
# 2; for section 8 that a 4-bit weight is one of 21 values times its block's scale (notebooks 04 and 05).
#
# Code that only measures, checks or draws is folded where the editor can fold it; its output is not.

# %% tags=["setup"]
import numpy as np
from grading import grade
from threadpoolctl import threadpool_limits

import tinylora as tl
from tinylora import adapters, codebooks, ops, quantize
from tinylora.costs import flops, parameters
from tinylora.interop import loralib
from tinylora.nn import Linear, Linear4bit, Linear16bit
from tinylora.numerics import optimality
from tinylora.papers import lora_numbers
from tinylora.papers.claims import dynamics

f32 = np.float32
one_thread = threadpool_limits(1, user_api="blas")  # the products are small; a second thread costs more than it brings


def exponents(x):
    """e with 2^(e−1) ≤ |x| < 2^e"""
    return np.frexp(np.abs(x))[1]


# %% [markdown]
# ## 1. Merging
#
# Since the bypass is linear, it can be added into the weight (LoRA §4.1):
#
# $$h = W_0 x + s\,B A\,x = (W_0 + s\,B A)\,x = W x .$$
#
# In float64 the two sides agree to 1e-13 of their size. In float32, which is what a layer holds, `layer.merge()` makes this
# same sum, bit for bit; it makes a *new* layer and leaves $W_0$ and the factors as they are.

# %%
rng = np.random.default_rng(0)
n, r, s = 256, 8, 2.0
W0, A, B, x = (rng.standard_normal(shape) for shape in ((n, n), (r, n), (n, r), (5, n)))
W = W0 + s * (B @ A)
two, one = x @ W0.T + s * (x @ A.T) @ B.T, x @ W.T
assert np.linalg.norm(two - one) < 1e-13 * np.linalg.norm(one)

# %% tags=["hide-input"]
layer = tl.LoRALinear(Linear(n, n), r=r, alpha=s * r)
for part, array in ((layer.base_layer, W0), (layer.lora_A, A), (layer.lora_B, B)):
    part.weight.data = array.astype(f32)
merged = layer.merge()
assert (merged.weight.data == W0.astype(f32) + (B.astype(f32) @ A.astype(f32)) * f32(s)).all()
assert layer.base_layer.weight.data.tobytes() == W0.astype(f32).tobytes()
two_paths, one_path = (net(tl.Tensor(x.astype(f32))).data for net in (layer, merged))
error = np.linalg.norm(two_paths - one_path) / np.linalg.norm(one_path)
exact = np.linalg.norm(two - one) / np.linalg.norm(one)
print(f"two paths against one: {exact:.0e} (float64), {error:.0e} (float32)")
assert error < 1e-6

# %% [markdown]
# ## 2. No added latency, and what depth costs
#
# Merged, the layer is a plain one again: one product instead of three. That is the whole of the paper's claim, and it holds for
# the merged layer only.

# %% tags=["hide-input"]
for name, net in (("base", layer.base_layer), ("adapted", layer), ("merged", merged)):
    with flops.counting() as count, tl.no_grad():
        net(tl.Tensor(np.ones((1, n), f32)))
    print(f"{name:8} {len(count.products)} products, {count.multiply_adds:,} multiply-adds a token")
    assert (len(count.products), count.multiply_adds) == ((3, n * n + 2 * n * r) if name == "adapted" else (1, n * n))

# %% [markdown]
# Adapter layers, which table 1 compares with, cannot be merged: they stand *between* the layers, with a nonlinearity inside.
# The table gives milliseconds of a forward pass of GPT-2 medium. Its six percentages are recomputed below, and beside each the
# adapters' share of the multiply-adds (of the matrices in the blocks; attention and the head left out, so the true share is
# smaller). The sizes are 0.5M parameters in the first setting and 11M in the others; the widths $r$ that fit them come from
# `parameters`.

# %% tags=["hide-input"]
L, d = lora_numbers.GPT2_M
table1 = [row for row in lora_numbers.audit() if row.where == "Table 1"]
latency = {(row.setting, row.method): row for row in table1 if row.printed.endswith("%")}
width = {(row.printed, row.method): int(row.setting[4:]) for row in table1 if not row.printed.endswith("%")}
share = {}
for (setting, method), row in latency.items():
    r_fit = width["0.5M" if setting == "32 × 512" else "11M", method]
    layers = L * (1 if method == "Adapter^L" else 2)
    share[setting, method] = layers * 2 * d * r_fit / (12 * L * d * d)
    print(f"batch × length {setting:8} {method}  printed {row.printed:>5}, recomputed {row.computed:6.3f} %", end="")
    print(f"   multiply-adds + {share[setting, method]:.2%}   products in a row {6 * L} + {2 * layers}")
assert all(row.verdict == "rounds to" for row in latency.values()) and len(latency) == 6
assert [f"{v:.2%}" for v in share.values()] == ["0.13%", "0.16%", "3.47%", "3.48%", "3.47%", "3.48%"]

# %% [markdown]
# All six are right. And the work does not explain them: with 3.5 % more multiply-adds, adapter layers take 5.0 and 8.4 % more
# time on 16 sequences, and 20.7 and 30.3 % more on a single short one. The paper's own explanation (§3) is depth: adapter
# layers have to be processed one after the other. A block of GPT-2 is a chain of six products, each of which waits for the one
# before (q, k, v in one; scores; values; output; up; down). An adapter layer adds two. 144 products in a row become 192 (+ 33
# %) or 240 (+ 67 %), and with a batch of one the hardware waits for each of them. The bypass, even unmerged, lies *beside*
# $W_0$ and not behind it.
#
# ## 3. There and back
#
# "When we need to switch to another downstream task, we can recover $W_0$ by subtracting $BA$ and then adding a different
# $B'A'$" (§4.1). In exact arithmetic. In float32 the entries that come back exactly:


# %%
def restored(seed, n=256, r=8, ratio=None):
    rng = np.random.default_rng(seed)
    W0 = rng.standard_normal((n, n)).astype(f32)
    Δ = rng.standard_normal((n, r)) @ rng.standard_normal((r, n))
    Δ = (Δ * (ratio * np.linalg.norm(W0) / np.linalg.norm(Δ) if ratio else 1)).astype(f32)
    return W0, Δ, (W0 + Δ) - Δ


# %% tags=["hide-input"]
def shares(seeds=range(10), **options):
    all_of = [restored(seed, **options) for seed in seeds]
    ratio = np.mean([np.linalg.norm(Δ) / np.linalg.norm(W0) for W0, Δ, _ in all_of])
    worst = max(np.abs(back - W0).max() for W0, _, back in all_of)
    return ratio, [float((back == W0).mean()) for W0, _, back in all_of], worst


print("W0, A, B ~ N(0, 1), s = 1, ten seeds (512: three):")
for n, r, low, high in (
    (256, 8, 0.455, 0.465),
    (64, 8, 0.445, 0.47),
    (512, 8, 0.455, 0.465),
    (256, 1, 0.69, 0.73),
    (256, 64, 0.245, 0.255),
):
    ratio, part, worst = shares(n=n, r=r, seeds=range(10 if n < 512 else 3))
    print(f"{n} × {n}, r = {r:2}: ‖ΔW‖/‖W0‖ = {ratio:4.2f}   {np.mean(part):.1%} restored", end="")
    print(f" ({min(part):.1%} to {max(part):.1%}), largest error {worst:.1e}")
    assert low < np.mean(part) < high and worst < 4e-6
print("256 × 256, r = 8, ΔW scaled:")
by_ratio = {}
for ratio in (0.01, 0.11, 1.0, 8**0.5, 8.0):
    _, part, worst = shares(ratio=ratio)
    by_ratio[ratio] = np.mean(part)
    print(f"‖ΔW‖/‖W0‖ = {ratio:4.2f}   {np.mean(part):.1%} restored, largest error {worst:.1e}")
assert np.allclose(list(by_ratio.values()), [0.977, 0.883, 0.653, 0.460, 0.259], atol=0.005)

# %% [markdown]
# At 256 × 256 with $r = 8$ and factors from $\mathcal N(0, 1)$ it is 46 %, and the size does not matter: 64 and 512 give the
# same. The rank does, because with such factors $‖ΔW‖/‖W_0‖ = \sqrt r$. That ratio is what the share depends on in the main;
# floating point has no scale of its own. (The shape of the distribution has a part too. At ratio 1 a ΔW of rank 1, whose
# entries are products of two normals and often small, leaves 71 %, one of rank 8 leaves 65 %.) At 0.11, which table 7 has for
# GPT-3 (6.91/61.95), 88 % come back.
#
# Why? Both operations round. Write ulp(·) for the distance to the next float, and
#
# $$S = \mathrm{fl}(W_0 + ΔW) = W_0 + ΔW + ε,\quad |ε| \le \tfrac12\,\mathrm{ulp}(S);\qquad S - ΔW = W_0 + ε .$$
#
# The last number is rounded to the floats around $W_0$, which lie ulp($W_0$) apart. So $W_0$ comes back if $|ε| <
# ½\,\mathrm{ulp}(W_0)$. If the sum has an exponent $k$ larger than $W_0$, it has lost the last $k$ bits of $W_0$: ε is spread
# over $2^k$ ulps of $W_0$, and only one in $2^k$ lands near enough.

# %% tags=["hide-input"]
W0, Δ, back = restored(0)
k = exponents(W0 + Δ) - exponents(W0)
for grown in range(5):
    part = (back == W0)[k == grown].mean()
    print(f"exponent grown by {grown}: {(k == grown).mean():.1%} of the entries, {part:.1%} of them restored")
    assert abs(part - (2.0**-grown if grown else 0.92)) < 0.02
assert (back == W0)[k < 0].all()

# %% [markdown]
# Half, a quarter, an eighth. Where the exponent shrinks, all are restored. Where it stays the same, a few are lost all the
# same; exercise 1 asks why, and turns the table into a prediction.
#
# The figure: by how many units in its last place $W_0$ is missed, for three sizes of ΔW; and on the right the part that is
# restored against the size, in float32 and in bfloat16. There, rounding takes another toll: where ΔW is small, many entries are
# not changed by merging at all.

# %% tags=["hide-input"] margin=0.03
results = [dynamics.merge_restores(seed) for seed in (0, 1, 2)]
mean = {key: np.mean([result[key] for result in results], axis=0) for key in ("restored", "lost_bfloat16")}
for i, size in enumerate(results[0]["sizes"]):
    print(
        f"‖ΔW‖/‖W0‖ = {size:4}: restored {mean['restored'][i]:.0%}; bfloat16, unchanged by merging {mean['lost_bfloat16'][i]:.1%}"
    )
# over seeds 0, 1, 2 and OpenBLAS's kernels with and without a fused multiply-add: .974 to .978, .878 to .889, .644 to .652, .378 to .385
assert np.allclose(mean["restored"], [0.976, 0.883, 0.648, 0.382], atol=0.01) and mean["lost_bfloat16"][0] > 0.15
dynamics.draw_merge_ulps(results)

# %% [markdown]
# ## 4. What `eval()` does
#
# loralib, the library of the paper, does just this: `eval()` adds $s B A$ into the weight, `train()` subtracts it. A second
# trip with the same factors loses nothing more (with rounding to even, $((W + Δ) - Δ) + Δ$ equals $W + Δ$: Reiser and Knuth
# 1975). But training changes the factors, so that every evaluation adds an error. `tinylora.interop.loralib` reproduces it. W
# and A as they start, $B$ uniform and drawn anew for each of 100 evaluations:

# %% tags=["hide-input"] margin=0.02
tl.seed(0)
rng = np.random.default_rng(0)
theirs = loralib.Linear(256, 256, r=8, lora_alpha=8)
before, missed = theirs.weight.data.copy(), {}
for trip in range(1, 101):
    theirs.lora_B.data = rng.uniform(-1, 1, (256, 8)).astype(f32) / f32(8**0.5)
    theirs.eval().train()
    if trip == 1:
        once = theirs.weight.data
        assert (theirs.eval().train().weight.data == once).all()  # the same factors again
    if trip in (1, 10, 100):
        off = theirs.weight.data - before
        missed[trip] = np.sqrt(np.square(off).mean())
        print(
            f"after {trip:3} evaluations: {(off == 0).mean():.1%} of W0 as it was, root mean square error {missed[trip]:.1e}"
        )
assert 0.72 < (once == before).mean() < 0.75 and 8.4 < missed[100] / missed[1] < 9.1 and (off == 0).mean() < 0.2

ours = tl.LoRALinear(Linear(256, 256), r=8)
ours.lora_B.weight.data = rng.standard_normal((256, 8)).astype(f32)
before = ours.base_layer.weight.data.tobytes()
for _ in range(100):
    ours.eval().train()
assert ours.base_layer.weight.data.tobytes() == before
print("tinylora's layer after 100 evaluations: W0 as it was")

# %% [markdown]
# The error grows nearly as a random walk does, by 8.4 to 9.1 instead of $\sqrt{100} = 10$ (`tests/test_loralib.py`). It is
# small beside what training changes; but the base is no longer the base, and adapters that share it disagree about it.
#
# In tinylora `eval()` changes no weight. `tl.merge(model, keep=True)` makes new layers and keeps the old ones, and
# `tl.unmerge(model)` puts them back: nothing is subtracted. The price is $W_0$ beside $W$:

# %% tags=["hide-input"]
text = np.frombuffer(tl.data.jargon("train")[:514], np.uint8).reshape(2, 257).astype(int)


def logits(model, rows=text[:, :64]):
    with tl.no_grad():
        return model(rows).data


def drawn(model, name, seed):
    """Give every B of an adapter values, as if it had been trained."""
    rng = np.random.default_rng(seed)
    for _, layer in adapters.lora_layers(model, name):
        b = layer.bypasses[name].lora_B.weight
        b.data = (0.02 * rng.standard_normal(b.shape)).astype(f32)


model = tl.Llama.from_pretrained("base")
whole = sum(w.nbytes for w in model.parameters())
alone = logits(model)
tl.add_lora(model, r=8, alpha=16, name="one")
drawn(model, "one", seed=1)
one = logits(model)
targets = sum(layer.base_layer.weight.nbytes for _, layer in adapters.lora_layers(model))
tl.merge(model, keep=True)
print(
    f"merged logits differ by {np.abs(logits(model) - one).max():.0e}, of {np.abs(one).max():.0f}; W0 kept beside W: {targets:,} bytes"
)
assert np.abs(logits(model) - one).max() < 1e-3 and not adapters.lora_layers(model)
tl.unmerge(model)
assert logits(model).tobytes() == one.tobytes()
with tl.disable_adapter(model):
    assert logits(model).tobytes() == alone.tobytes()
assert (targets, whole) == (8_110_080, 8_315_136)

# %% [markdown]
# ## 5. Switching
#
# Unmerged, a switch moves the factors and nothing else. Two ways: carry several adapters and choose (`tl.set_adapter`), or take
# one off and put another on (`adapters.detach`, `adapters.attach`). Either way the base stays what it was, bit for bit, and so
# does an adapter that comes back.

# %% tags=["hide-input"]
tl.add_lora(model, r=8, alpha=16, name="two")
drawn(model, "two", seed=2)
tl.set_adapter(model, "two")
two = logits(model)
tl.set_adapter(model, "one")
assert logits(model).tobytes() == one.tobytes() != two.tobytes()
second, first = adapters.detach(model, "two"), adapters.detach(model, "one")
assert logits(model).tobytes() == alone.tobytes()  # a plain model again
for adapter, wanted in ((second, two), (first, one)):
    adapters.attach(model, adapter)
    assert logits(model).tobytes() == wanted.tobytes()
    adapters.detach(model)
print(f"an adapter: {first.nbytes:,} bytes; the model: {whole:,}, {whole / first.nbytes:.1f} times as many")
Θ = parameters.lora_square(2 * 96, 12288, 4)
print(
    f"GPT-3, q and v, r = 4, two bytes a weight: {2 * Θ / 1e6:.1f} MB against 350 GB, {350e9 / (2 * Θ):,.0f} times as many"
)
print(f"100 tasks: {(350e9 + 100 * 35e6) / 1e9:.1f} GB instead of {100 * 350e9 / 1e12:.0f} TB")
assert first.nbytes == second.nbytes == 552_960 and round(whole / first.nbytes) == 15
assert f"{2 * Θ / 1e6:.1f}" == "37.7" and round(350e9 / (2 * Θ), -1) == 9270

# %% [markdown]
# Here 15 times fewer bytes than the model, since $r = 8$ is not small beside a width of 192; for GPT-3 some 9,270 times (the
# paper rounds to 35 MB and 10,000). A *merged* model would have to rewrite every adapted weight: 8,110,080 bytes instead of
# 552,960.
#
# ## 6. One batch, several adapters
#
# What merging gives up is said in §4.2: inputs for different tasks cannot share a forward pass once $A$ and $B$ are in $W$.
# Unmerged they can. Row $i$ of the batch goes through the adapter $t(i)$,
#
# $$h_i = W_0 x_i + s\,B_{t(i)} A_{t(i)}\,x_i ,$$
#
# one product with $W_0$ for all rows, and small ones for each adapter. By hand, row by row, and with `tl.adapter_rows`:


# %%
def rows_by_hand(x, W0, bypasses, names):
    h = x @ W0.T
    for i, name in enumerate(names):
        s, B, A = bypasses[name]
        h[i] += s * (x[i] @ A.T) @ B.T
    return h


# %% tags=["hide-input"]
adapters.attach(model, first, "one")
adapters.attach(model, second, "two")
names = ["one", "__base__", "two", "one"]
layer = model.model.layers[0].mlp.up_proj
x = np.random.default_rng(3).standard_normal((4, 5, layer.in_features)).astype(f32)
bypasses = {n: (b.scaling, b.lora_B.weight.data, b.lora_A.weight.data) for n, b in layer.bypasses.items()}
bypasses["__base__"] = (0, *bypasses["one"][1:])
with tl.adapter_rows(model, names), flops.counting() as count, tl.no_grad():
    together = layer(tl.Tensor(x)).data
error = np.abs(together - rows_by_hand(x, layer.base_layer.weight.data, bypasses, names)).max() / np.abs(together).max()
n_in, n_out = layer.in_features, layer.out_features
print(
    f"one layer: {error:.0e} from the loop; {len(count.products)} products, {count.multiply_adds // 20:,} multiply-adds a token"
)
assert error < 1e-6 and len(count.products) == 1 + 2 * 2
assert count.multiply_adds == 20 * n_in * n_out + 15 * 8 * (n_in + n_out)  # three rows of four have a bypass, r = 8
rows = np.repeat(text[:1, :64], 4, axis=0)
with tl.adapter_rows(model, names):
    mixed = logits(model, rows)
for i, name in enumerate(names):
    tl.set_adapter(model, () if name == "__base__" else name)
    assert np.abs(mixed[i] - logits(model, rows[:1])[0]).max() < 1e-3
tl.set_adapter(model, "one")
print("the whole model: each row as if it had been alone")

# %% [markdown]
# ## 7. Combining
#
# Several adapters can become one. Stacking the factors is exact, at the price of the ranks' sum ("cat" in PEFT and here):
#
# $$\sum_i c_i B_i A_i = \begin{pmatrix} B_1 & B_2 & … \end{pmatrix}
# \begin{pmatrix} c_1 A_1 \\ c_2 A_2 \\ ⋮ \end{pmatrix},\qquad c_i = w_i s_i .$$
#
# PEFT's "linear" keeps the rank instead, and adds the factors, each with $\sqrt{c_i}$:
#
# $$\Big(\sum_i \sqrt{c_i}\,B_i\Big)\Big(\sum_j \sqrt{c_j}\,A_j\Big) = \sum_i c_i B_i A_i + \sum_{i \ne j} \sqrt{c_i c_j}\,B_i A_j .$$
#
# The first sum is what was asked for, the second was not. Of $m$ unrelated adapters with equal $c$ the first has $m$ terms and
# the second $m(m-1)$. If all $B_i A_j$ are of one size and nearly orthogonal, the error is $\sqrt{m - 1}$ times what was asked
# for: 100 % for two.


# %%
def linear_error(parts):
    wanted = sum(c * (B @ A) for c, B, A in parts)
    got = sum(c**0.5 * B for c, B, _ in parts) @ sum(c**0.5 * A for c, _, A in parts)
    return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)


# %% tags=["hide-input"]
model, every = tl.Llama.from_pretrained("base"), ["one", "two", "three", "four"]
for seed, name in enumerate(every):
    tl.add_lora(model, r=8, alpha=16, target_modules=["q_proj", "v_proj"], name=name)
    drawn(model, name, seed)
for m in (2, 3, 4):
    found = {}
    for kind in ("linear", "cat", "svd"):
        tl.add_weighted_adapter(model, every[:m], [1 / m] * m, f"{kind}{m}", kind)
        found[kind] = []
        for _, layer in adapters.lora_layers(model):
            delta = {n: layer.bypasses[n].delta(layer.base_layer) for n in (*every[:m], f"{kind}{m}")}
            wanted = sum(delta[n] for n in every[:m]) / m
            found[kind].append(np.linalg.norm(delta[f"{kind}{m}"] - wanted) / np.linalg.norm(wanted))
        if kind == "linear":  # by hand, on the last layer
            parts = [
                (b.scaling / m, b.lora_B.weight.data, b.lora_A.weight.data)
                for b in (layer.bypasses[n] for n in every[:m])
            ]
            assert abs(linear_error(parts) - found[kind][-1]) < 1e-4
    linear, cat, svd = np.mean(found["linear"]), max(found["cat"]), np.mean(found["svd"])
    print(f"{m} adapters: error of linear {linear:.3f} (√(m − 1) = {(m - 1) ** 0.5:.3f}), of cat {cat:.0e}", end="")
    print(f", of svd at r = 8 {svd:.3f} (at most √(1 − 1/m) = {(1 - 1 / m) ** 0.5:.3f})")
    assert abs(linear / (m - 1) ** 0.5 - 1) < 0.05 and cat < 1e-6 and 0.75 < svd / (1 - 1 / m) ** 0.5 < 0.9

# %% [markdown]
# So "linear" is right for a single adapter only, and for two unrelated ones as wrong as returning nothing. "svd" is the best
# that a given rank can do. Cut to the rank of one of $m$ adapters, it keeps the largest of $m$ times as many singular values,
# so at least $1/m$ of their squares: the error is $\sqrt{1 - 1/m}$ at most, here 10 to 25 % less. When is it exact?
# Exercise 2.
#
# ## 8. Merging into four bits
#
# QLoRA's base is stored in 4 bits, so there is no $W_0$ to add to. What is meant by merging is: dequantize, add, quantize
# again.

# %%
W0, Δ, _ = restored(0, n=512, ratio=0.1)
q = quantize(W0, double_quant=True)
again = quantize(q.dequantize() + Δ, double_quant=True)

# %% [markdown]
# `layer.merge()` does the same, to the bit, and notes the error $‖\hat W - (\hat W_0 + ΔW)‖ / ‖\hat W_0 + ΔW‖$ as
# `merge_error`. How large it is depends on ΔW, and not in the way one might think. The column "arrives" is the part of ΔW that
# is found in the new weight, $\langle \hat W - \hat W_0, ΔW\rangle / ‖ΔW‖^2$:

# %% tags=["hide-input"]
u, sigma, vt = np.linalg.svd(Δ, full_matrices=False)


def in_bits(kind, size):
    """A layer with the base q in 4 bits, or its values in 16, and a ΔW of the given size beside ‖W0‖."""
    layer = tl.LoRALinear(Linear4bit(q) if kind == 4 else Linear16bit.of(Linear4bit(q)), r=8, alpha=8)
    layer.lora_A.weight.data = vt[:8].astype(f32)
    layer.lora_B.weight.data = (u[:, :8] * sigma[:8] * size / 0.1).astype(f32)
    return layer


assert (
    quantize(q.dequantize() + in_bits(4, 0.1).delta(), double_quant=True).packed
    == in_bits(4, 0.1).merge().weight.packed
).all()
assert (again.packed == in_bits(4, 0.1).merge().weight.packed).mean() > 0.999  # the same Δ, but for its last bits
own = np.linalg.norm(q.dequantize() - W0) / np.linalg.norm(W0)
print(f"quantizing W0 itself: error {own:.3f}")
arrives, error4 = {}, {}
for size in (0.003, 0.01, 0.03, 0.1, 0.3):
    layer, wide = in_bits(4, size), in_bits(16, size)
    merged, delta = layer.merge(), layer.delta()
    arrives[size] = ((merged.dense() - q.dequantize()) * delta).sum() / (delta * delta).sum()
    error4[size] = merged.merge_error
    changed = (merged.weight.indices() != q.indices()).mean()
    print(
        f"‖ΔW‖/‖W0‖ = {size:5}: merge_error {merged.merge_error:.4f}, codes changed {changed:6.2%}, arrives {arrives[size]:4.0%}",
        end="",
    )
    print(f"   16 bits: {wide.merge().merge_error:.4f}")
    assert wide.merge().merge_error < 0.002
assert np.allclose(list(arrives.values()), [0.01, 0.01, 0.05, 0.83, 0.99], atol=0.015)
assert (
    round(own, 3) == 0.092
    and abs(error4[0.3] - own) < 0.002
    and all(error4[size] > size for size in (0.003, 0.01, 0.03))
)
gap = np.diff(codebooks.nf4().astype(float)).min() / 2 * optimality.expected_max(64)
print(f"half of NF4's smallest gap, times the mean largest weight of a block of 64: {gap:.3f} σ")
assert round(gap, 2) == 0.10

# %% [markdown]
# A small update does not arrive. The weights sit exactly on their 16 values, and a value changes only where ΔW carries it over
# half a gap, 0.10 σ at the narrowest. At $‖ΔW‖ = 0.03\,‖W_0‖$ some 5 % of ΔW arrives, at 0.01 1 %; the error is as large as ΔW
# itself. At 0.3 nearly all of it arrives, with noise of 9.2 % of the weight, the error of quantizing anything. In 16 bits the
# error is below 0.2 %.
#
# On a real one: 20 short steps of QLoRA on the model that ships with tinylora, and then merging. The error for each layer is
# what `adapters.merge_errors(model)` lists:


# %% tags=["hide-input"]
def rows_of(split, count, seed):
    text = np.frombuffer(tl.data.jargon(split), np.uint8)
    starts = np.random.default_rng(seed).integers(0, len(text) - 129, count)
    return np.stack([text[i : i + 129] for i in starts]).astype(int)


def loss(model, rows):
    return ops.softmax_cross_entropy(model(rows[:, :-1]), rows[:, 1:])


def bits_per_byte(model):
    with tl.no_grad():
        return loss(model, heldout).item() / np.log(2)


tl.seed(0)
heldout = rows_of("heldout", 24, 1)
steps, batches = 20, rows_of("train", 80, 0).reshape(20, 4, -1)
model = tl.add_lora(tl.quantize_linears(tl.Llama.from_pretrained("base")), r=8, alpha=16)
optimizer = tl.AdamW([p for _, p in model.trainable()], lr=0.005)
for step, batch in enumerate(batches):
    optimizer.zero_grad()
    loss(model, batch).backward()
    optimizer.step(lr_scale=1 - step / steps)
bpb = {"adapter beside the base": bits_per_byte(model)}
with tl.disable_adapter(model):
    bpb = {"base, 4 bits": bits_per_byte(model)} | bpb
parts = {path: (layer.delta(), layer.base_layer.dense()) for path, layer in adapters.lora_layers(model)}

# %% tags=["hide-input"]
tl.merge(model, keep=True)
bpb["merged, 4 bits"] = bits_per_byte(model)
errors = adapters.merge_errors(model)
for path, (delta, w0) in parts.items():
    ratio = np.linalg.norm(delta) / np.linalg.norm(w0)
    arrived = ((model.get(path).dense() - w0) * delta).sum() / (delta * delta).sum()
    if path.startswith("model.layers.0"):
        print(
            f"{path.removeprefix('model.'):27} ‖ΔW‖/‖W0‖ {ratio:.3f}   merge_error {errors[path]:.3f}   arrives {arrived:.0%}"
        )
    assert 0.03 < ratio < 0.2 and 0.03 < errors[path] < 0.1
print(f"all 35 layers: merge_error {min(errors.values()):.3f} to {max(errors.values()):.3f}")
tl.unmerge(model)
for _, layer in adapters.lora_layers(model):
    layer.base_layer = Linear16bit.of(layer.base_layer)
bpb["merged, 16 bits"] = bits_per_byte(tl.merge(model))
for name, value in bpb.items():
    print(f"{name:24} {value:.4f} bits per byte")
gain = bpb["base, 4 bits"] - bpb["adapter beside the base"]
lost, lost16 = (bpb[f"merged, {bits} bits"] - bpb["adapter beside the base"] for bits in (4, 16))
print(f"of the gain of {gain:.3f}, merging loses {lost / gain:.1%} in 4 bits, {abs(lost16) / gain:.2%} in 16")
assert gain > 0.2 and 0.1 < lost / gain < 0.3 and abs(lost16) < 0.01 * gain

# %% [markdown]
# So, to the question how to merge into a 4-bit base: dequantize, add, and *stay* in 16 bits if memory allows. That is exact to
# bfloat16 and costs nearly four times the bytes. Merging back into 4 bits loses a part of what was learned, here between 10 and
# 30 % of the gain, and nearly all of it if ΔW is small. Or do not merge, and keep the adapter beside the base. In any case look
# at the error: tinylora keeps it on each merged layer, PEFT warns of rounding errors and names no number.
#
# ## Where paper and code differ
#
# 1. **"We can recover $W_0$ by subtracting $BA$"** (§4.1) holds in exact arithmetic. In float32 46 % of the entries come back
#    for factors from $\mathcal N(0, 1)$ at $r = 8$, 65 % at $‖ΔW‖ = ‖W_0‖$, 88 % at table 7's ratio of 0.11 (section 3).
# 2. **"No additional inference latency"** holds for merged weights. Unmerged, as PEFT and tinylora run by default, a layer
#    makes three products instead of one (section 2).
# 3. **loralib merges on `eval()` and subtracts on `train()`.** One trip changes 25 to 28 % of the weights' last bits, 100 with
#    changing factors bring 8.4 to 9.1 times that error (section 4). PEFT subtracts too when it unmerges. tinylora keeps $W_0$.
# 4. **PEFT's "linear" combination** has cross terms of $\sqrt{m-1}$ times what was asked for (section 7).
# 5. **Merging into 4 bits** is in neither paper's equations; QLoRA's equation 5 keeps the bypass beside the base. The error is
#    about 9.2 % of the weight, or all of ΔW, whichever is smaller (section 8).
# 6. **35 MB and 10,000 times** (§4.2) are 37.7 MB and 9,270 times (section 5).
#
# ## Exercises
#
# For grading only the setup cell and the exercise cells are run: put helpers inside the exercise's cell.
#
# ### 10-1 Which entries survive?
#
# Section 3's table stops short of a prediction: among the entries whose exponent stays the same, about 8 % were lost. By ties.
# Suppose that ΔW is the finer of the two, with an exponent $j \ge 1$ smaller. How many different remainders can the sum leave
# when it is rounded to ulp($W_0$), how many of them are ties, and where do two ties in a row lead?


# %% tags=["exercise"]
def exercise_1(e_w, e_d, e_sum):
    """Predict the share of the entries for which (w + d) − d equals w in float32, from exponents alone.

    e_w, e_d, e_sum   int arrays of one shape: exponents(w), exponents(d), exponents(w + d), for float32 w and d without zeros whose last
                      bits are random. (`exponents` is in the setup cell.)

    Each entry has a probability; return their mean, a float. Do not forget the entries whose exponent shrinks, nor those where d is the
    coarser of the two.
    Checked: within 0.006 of the share in 400,000 fresh entries, for ‖d‖/‖w‖ from 0.003 to 30, and for d within one binade.
    """
    # BEGIN SOLUTION
    k, j = e_sum - e_w, e_w - e_d
    # grown: one in 2^k. The same, d finer: of 2^j remainders one is a tie, and the second tie goes to the even neighbour: half are lost
    same = np.where(j >= 1, 1 - 0.5 ** (np.maximum(j, 1) + 1.0), 1.0)
    return float(np.where(k > 0, 0.5 ** np.maximum(k, 0), np.where(k == 0, same, 1.0)).mean())
    # END SOLUTION


# %%
_ = grade("10-1", exercise_1)

# %% [markdown]
# ### 10-2 The best of a given rank
#
# "svd" decomposes an out × in matrix. For a layer of GPT-3 that is 12,288 × 12,288, and its rank is at most the sum of a few
# small ranks.


# %% tags=["exercise"]
def exercise_2(parts, r):
    """Combine adapters into one of rank r, as well as possible, without forming an out × in matrix.

    parts   a list of (c, B, A): a float, (out × rᵢ), (rᵢ × in), float64; the sum Σ c B A is wanted
    r       the new rank, 1 or more; it may be larger than Σ rᵢ

    Return (B, A, error): (out × r), (r × in), and the Frobenius norm of what is missed, which must be the least possible. A QR
    decomposition of each stack of factors leaves a small matrix in the middle.
    Checked: shapes; the error, as returned and as it is, against Eckart and Young's; negative c; adapters that share their A, where a
    rank below Σ rᵢ is exact already; and the memory that the call takes.
    """
    # BEGIN SOLUTION
    left, right = np.hstack([c * B for c, B, _ in parts]), np.vstack([A for *_, A in parts])
    (qb, rb), (qa, ra) = np.linalg.qr(left), np.linalg.qr(right.T)
    u, sigma, vt = np.linalg.svd(rb @ ra.T, full_matrices=False)
    new_b, new_a, most = np.zeros((len(left), r)), np.zeros((r, right.shape[1])), min(r, len(sigma))
    new_b[:, :most], new_a[:most] = qb @ (u[:, :most] * sigma[:most]), vt[:most] @ qa.T
    return new_b, new_a, float(np.sqrt((sigma[most:] ** 2).sum()))
    # END SOLUTION


# %%
_ = grade("10-2", exercise_2)

# %% [markdown]
# ### 10-3 A batch of many adapters at once
#
# Section 6 looped over rows, and `tl.adapter_rows` loops over adapters. With one adapter for each row, neither is good.


# %% tags=["exercise"]
def exercise_3(x, W0, A, B, s, which):
    """Return h (rows, tokens, out): h[i] = x[i] W0ᵀ + s[t] (x[i] A[t]ᵀ) B[t]ᵀ, t = which[i], and h[i] = x[i] W0ᵀ where which[i] is −1.

    x (rows, tokens, in)     W0 (out, in)     A (n, r, in)     B (n, out, r)     s (n,)     which (rows,) ints from −1 to n − 1

    Two calls of np.einsum (or batched products) do all rows. No ΔW is formed, neither one for each row nor one for each adapter: the
    memory is checked. No argument is changed. Checked: fresh inputs to 1e-10, among them rows of the base only.
    """
    # BEGIN SOLUTION
    low = np.einsum("bti,bri->btr", x, A[which])  # −1 picks the last adapter …
    strength = np.where(which >= 0, s[which], 0.0)  # … and is multiplied by 0
    return x @ W0.T + np.einsum("btr,bor->bto", low * strength[:, None, None], B[which])
    # END SOLUTION


# %%
_ = grade("10-3", exercise_3)

# %% [markdown]
# ## Summary
#
# - $W = W_0 + s B A$ is exact to rounding and costs one product; table 1's percentages are right, and come from depth rather
#   than work. `tl.merge`, `tests/papers/test_claims_lora.py`.
# - Subtracting does not give $W_0$ back: 46 % of the entries at $‖ΔW‖ = \sqrt 8\,‖W_0‖$, one in $2^k$ where the exponent grew
#   by $k$. Keep $W_0$ (`merge(keep=True)`, `unmerge`); `tests/papers/test_experiments.py`. loralib's `eval()` drifts
#   (`tests/test_loralib.py`).
# - Unmerged adapters switch by moving the factors alone, 4 r (in + out) bytes a matrix in float32; they share a batch
#   (`tl.adapter_rows`) and combine exactly by stacking, not by PEFT's "linear" (`tests/test_adapters.py`).
# - Into 4 bits a ΔW below about 0.03 ‖W0‖ hardly arrives (5 % of it, or less); into 16 bits it does. `adapters.merge_errors`.
# - Next: notebook 12, whether ΔW really has a low rank.
