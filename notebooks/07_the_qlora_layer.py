# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 07 · The QLoRA layer
#
# **The weight is stored in 4 bits and is never trained, but gradients pass through it: $\bar x = \bar y\,\hat W$, with
# the $\hat W$ of the forward pass, rebuilt when it is needed and dropped again.** This notebook builds the layer from
# its bytes, derives its backward pass, and asks finite differences of a real loss which weight belongs there.
#
# Accompanies QLoRA (arXiv 2305.14314) §3, "QLoRA", equations 5 and 6, and §2 on gradient checkpointing. Questions that
# readers have asked and that are settled on the way: why dequantize at all, and how do gradients pass through 4 bits
# (qlora 258 and 286; sections 3 to 5); why is 4-bit not faster (bitsandbytes 605; section 5).
#
# Hours: 4 (1½ to read and run, 2½ for the exercises). Prerequisites: notebook 02, sections 1, 2 and 5 (pullbacks, the
# tape, the bypass); notebook 06, sections 1 and 2 (double quantization); that a bfloat16 is a float32 with 8
# significant bits.
#
# Code that only measures, checks or draws is folded where the editor can fold it; its output is not.

# %% tags=["setup"]
import copy

import numpy as np
from drawings.nb07 import gradient_by_depth
from grading import grade

import tinylora as tl
from tinylora import backend, codebooks, nn, ops, quantize
from tinylora.adapters import kbit
from tinylora.costs import memory, parameters
from tinylora.dtypes import BFloat16Array, round_to
from tinylora.nn import Linear, Linear4bit
from tinylora.tape import watch_rebuilds

NF4 = codebooks.nf4()


# %% tags=["hide-input"]
def bf16(a):
    """a rounded to bfloat16, ties to even, in float32 storage."""
    return round_to(a, "bfloat16")


def apart(a, b):
    """‖a − b‖ / ‖b‖ over all entries."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


rng = np.random.default_rng(0)
W = (0.05 * rng.standard_normal((512, 512))).astype(np.float32)
X, G = (rng.standard_normal((256, 512)).astype(np.float32) for _ in range(2))  # 256 inputs, and output gradients
backend.seed(0)  # what new layers are drawn from


# %% [markdown]
# ## 1 · doubleDequant, from the bytes
#
# Equation 6, first the constants and then the weights:
#
# $$\mathrm{doubleDequant}(c_1, c_2, W^{4bit}) = \mathrm{dequant}(\mathrm{dequant}(c_1, c_2),\, W^{4bit}) = \hat W .$$
#
# What is stored for a weight of 512 × 512, here a normal $W$ with σ = 0.05: 4-bit codes, two in a byte, the even one in
# the high half; for each block of 64 weights one byte ($c_2$); for each 256 of these one float32 ($c_1$); and one
# float32 for the mean, which eq. 6 does not mention. $d$ is the 8-bit code and $c$ the 4-bit one:
#
# $$\tilde m_b = d[k_b]\, n_{\lfloor b/256 \rfloor} + \mu, \qquad \hat w_i = c[q_i]\, \tilde m_{\lfloor i/64 \rfloor} .$$

# %%
q = quantize(W, double_quant=True)
c1, c2, d = q.nested_absmax, q.absmax_codes, q.constants.code
m = d[c2] * np.repeat(c1, 256) + q.offset
codes = np.stack([q.packed >> 4, q.packed & 15], axis=1)
W_hat = (NF4[codes].reshape(-1, 64) * m[:, None]).reshape(W.shape)
assert W_hat.tobytes() == q.dequantize("float32").tobytes()
print(f"stored: {q.nbytes:,} bytes; W_hat has {W_hat.nbytes:,}; relative error of W_hat {apart(W_hat, W):.4f}")

# %% [markdown]
# The paper computes in bfloat16, so eq. 6 ends in $W^{BF16}$. Where one rounds matters. bitsandbytes and tinylora keep
# $\tilde m$ and the product in float32 and round the product once. Rounding the constants first as well gives another
# weight in 23 % of the places, and an error of 0.23 % instead of 0.17 %.

# %% tags=["hide-input"]
assert q.nbytes == 512 * 512 // 2 + 4096 + 4 * 16 + 4 == 135_236 and round(apart(W_hat, W), 3) == 0.092
once = bf16(W_hat)
assert once.tobytes() == q.dequantize("bfloat16").tobytes()
early = bf16((NF4[codes].reshape(-1, 64) * bf16(m)[:, None]).reshape(W.shape))
print(f"rounded once: error {apart(once, W_hat):.5f}; constants first: {apart(early, W_hat):.5f}, ", end="")
print(f"and {(early != once).mean():.1%} of the weights differ")
assert abs((early != once).mean() - 0.23) < 0.01
assert round(apart(once, W_hat), 4) == 0.0017 and round(apart(early, W_hat), 4) == 0.0023

# %% [markdown]
# ## 2 · The layer
#
# Equation 5, with the scale $s$ that equation 3 has and equation 5 lacks:
#
# $$Y = X\,\mathrm{doubleDequant}(c_1, c_2, W^{NF4}) + s\, X L_1 L_2 .$$
#
# The paper's weight is (in × out). Stored is its transpose (out × in), as everywhere in this package, so $L_1 =
# A^{\top}$, $L_2 = B^{\top}$, and a block of 64 runs along the inputs of one output. With the paper's $\alpha = 16$ and
# $r = 64$, $s = 1/4$.

# %%
layer = tl.LoRALinear(Linear4bit(q), r=64, alpha=16)
A, B, s = layer.lora_A.weight.data, layer.lora_B.weight.data, np.float32(layer.scaling)
B += (0.05 * rng.standard_normal(B.shape)).astype(np.float32)  # as if it had been trained
Y = X @ W_hat.T + (X @ A.T @ B.T) * s
x = tl.Tensor(X, requires_grad=True)
y = layer(x)
assert y.data.tobytes() == Y.tobytes() and s == 0.25

# %% [markdown]
# Equal in every bit. So is the whole layer to one with a dense, frozen weight $\hat W$, in its output and in all three
# gradients. **To the rest of the network a QLoRA layer *is* a LoRA layer on $\hat W$.** That $\hat W$ came out of 4
# bits plays no part in what it computes.

# %% tags=["hide-input"]
dense = Linear(512, 512)
dense.weight.data = W_hat.copy()
twin = tl.LoRALinear(dense, bypass=copy.deepcopy(layer.bypasses["default"]))


def gradients(layer):
    """(y, x̄, Ā, B̄) for the input X and the output gradient G."""
    layer.zero_grad()
    x = tl.Tensor(X, requires_grad=True)
    y = layer(x)
    y.backward(G)
    return y.data, x.grad, layer.lora_A.weight.grad, layer.lora_B.weight.grad


four_bits, on_w_hat = gradients(layer), gradients(twin)
assert all(a.tobytes() == b.tobytes() for a, b in zip(four_bits, on_w_hat, strict=True))

# %% [markdown]
# ## 3 · The backward pass
#
# $X$ comes from the layers below, which have adapters of their own, so $\bar X$ is needed. $A$ and $B$ are trained.
# $\hat W$ is not. From $dY = dX\,\hat W^{\top} + s\,(dX A^{\top} + X\,dA^{\top})B^{\top} + s\,X A^{\top} dB^{\top}$ one
# reads off, with $U = s\,\bar Y B$,
#
# $$\bar X = \bar Y \hat W + U A, \qquad \bar A = U^{\top} X, \qquad \bar B = s\,\bar Y^{\top} X A^{\top} .$$
#
# $\hat W$ stands in one place, and that is all that "gradients pass through 4 bits" means: the forward pass multiplies
# by the constant matrix $\hat W^{\top}$, so the backward pass multiplies by $\hat W$. How $\hat W$ came about is not
# differentiated.

# %%
U = (s * G) @ B
X_bar = G @ W_hat + U @ A
A_bar, B_bar = U.T @ X, (s * G).T @ (X @ A.T)
assert all(a.tobytes() == b.tobytes() for a, b in zip((X_bar, A_bar, B_bar), four_bits[1:], strict=True))

# %% [markdown]
# **Straight-through has nothing to do with it.** That trick is for whoever trains $W$ *through* its quantization and
# needs a value for $\partial \hat W / \partial W$, which is 0 almost
# everywhere for all but the largest weight of a block. Below, 97 % of the weights are moved
# (all but those largest ones, by about $10^{-6}$ of it), and one of 135,236 stored bytes changes, that of a
# weight which stood at the border between two codes. Straight-through pretends that this derivative is 1. QLoRA never
# asks for it.
#
# And $\hat W$ gets no gradient either: it has no pullback, and nothing in the layer that could hold one.

# %% tags=["hide-input"]
rows = W.reshape(-1, 64)
top = np.abs(rows).max(axis=1, keepdims=True)
nudge = np.where(np.abs(rows) == top, 0, 1e-6 * top * rng.standard_normal(rows.shape)).astype(np.float32)
moved = quantize((rows + nudge).reshape(W.shape), double_quant=True)
changed = int((moved.packed != q.packed).sum()) + int((moved.absmax_codes != c2).sum())
print(f"{(rows + nudge != rows).mean():.0%} of the weights moved, {changed} of {q.nbytes:,} bytes changed")
assert (rows + nudge != rows).mean() > 0.97 and changed == 1
assert (moved.absmax_codes == c2).all() and moved.nested_absmax.tobytes() == c1.tobytes() and moved.offset == q.offset
print("trained:", *(name for name, _ in layer.trainable()))
assert [name.split(".")[-2] for name, _ in layer.trainable()] == ["lora_A", "lora_B"] and not hasattr(q, "grad")
assert len(list(layer.named_weights())) == 3 and len(layer.parameters()) == 2

# %% [markdown]
# ## 4 · Ŵ or W? Ask the loss
#
# Suppose somebody still has the unquantized $W$ and uses $\bar y\,W$ in the backward pass. It is the "true" weight,
# after all. But the loss that is being lowered is that of the network with $\hat W$, and its gradient is what finite
# differences say.
#
# The model is the embedded one (5 blocks of 7 linear layers) in NF4, with fresh bypasses, and the loss that of 256
# bytes of the Jargon File. All but the 4-bit layers is held in float64, so that differences show digits. Three backward
# passes are compared: with $\hat W$; with $W$; and with $\hat W$ rounded to bfloat16 (section 7 has the reason). For
# each of the five blocks the gradients of its seven $B$ are one vector. Each rival is judged along the direction in
# which it and $\hat W$'s gradient differ most: there
#
# $$\frac{E(\theta + \varepsilon v) - E(\theta - \varepsilon v)}{2\varepsilon}$$
#
# decides who is right.


# %% tags=["hide-input"]
class TwoWeights:
    """A stored weight with one matrix for the forward pass and another one for the backward pass."""

    dtype = "backward"  # what `ops.linear_frozen` asks for in the backward pass

    def __init__(self, forward, backward):
        self.forward, self.backward, self.shape = forward, backward, forward.shape

    def dequantize(self, dtype):
        return self.backward if dtype == "backward" else self.forward


def adapted(backward):
    """The base model in NF4 with bypasses, in float64, and `backward(W, Ŵ)` as the weight of its backward pass."""
    backend.seed(0)
    model = tl.Llama.from_pretrained("base")
    original = {name: layer.weight.data for name, layer in model.named_modules() if isinstance(layer, Linear)}
    tl.add_lora(tl.quantize_linears(model), r=8, alpha=16)
    for name, layer in model.named_modules():
        if isinstance(layer, Linear4bit):
            w_hat = layer.dense()
            layer.weight = TwoWeights(w_hat, backward(original[name.removesuffix(".base_layer")], w_hat))
    for p in model.parameters():
        p.data = p.data.astype(np.float64)
    return model


text = np.frombuffer(tl.data.jargon("train")[:514], np.uint8).reshape(2, 257).astype(int)


def loss_of(model, rows=1):
    return ops.softmax_cross_entropy(model(text[:rows, :-1]), text[:rows, 1:])


def by_block(model):
    """The gradients of the loss with respect to the B of each block, as five vectors."""
    loss_of(model).backward()
    found = [[p.grad.ravel() for name, p in b.trainable() if "lora_B" in name] for b in model.model.layers]
    return [np.concatenate(parts) for parts in found]


# %% tags=["hide-input"]
ways = {"Ŵ": lambda w, w_hat: w_hat, "bfloat16(Ŵ)": lambda w, w_hat: bf16(w_hat), "W": lambda w, w_hat: w}
claimed = {name: by_block(adapted(way)) for name, way in ways.items()}
model = adapted(ways["Ŵ"])


def slope(block, v, eps=1e-3):
    """The central difference of the loss along the direction v in the B of one block."""
    factors, values = [p for name, p in model.model.layers[block].trainable() if "lora_B" in name], []
    for step in (eps, -eps, 0):
        parts = np.split(step * v, np.cumsum([p.size for p in factors])[:-1])
        for p, part in zip(factors, parts, strict=True):
            p.data = part.reshape(p.shape)
        with tl.no_grad():
            values.append(loss_of(model).item() if step else 0)
    return (values[0] - values[1]) / (2 * eps)


off = {name: [] for name in ways}
for block in range(5):
    g, worst = claimed["Ŵ"][block], []
    for rival in ("bfloat16(Ŵ)", "W"):
        v = claimed[rival][block] - g
        v /= np.linalg.norm(v)
        told = slope(block, v)
        off[rival].append(abs(claimed[rival][block] @ v - told) / np.linalg.norm(g))
        worst.append(abs(g @ v - told) / np.linalg.norm(g))
    off["Ŵ"].append(max(worst))
for name, errors in off.items():
    print(f"{name:12}", *(f"block {i} {e:.1e}" for i, e in enumerate(errors, 1)), sep="   ")
cosine = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(claimed["W"], claimed["Ŵ"], strict=True)]
print("cosine between the gradients with W and with Ŵ:", *(f"{c:.4f}" for c in cosine))

# %% [markdown]
# The loss sides with $\hat W$, to seven digits. $\bar y\,W$ is the gradient of no function at all: its forward pass is
# one network and its backward pass another. Its error is 5.9 % in the block next to the loss and 15.9 % in the first
# one: each layer on the way down multiplies by the wrong matrix once more. Such a gradient still points downhill (its
# cosine with the right one is 0.988 or more), so a training run would hardly betray the mistake. A finite difference
# does. (In a real run there is no $W$ to make the mistake with: it was thrown away.)

# %% tags=["hide-input"]
assert max(off["Ŵ"]) < 5e-8 and 0.987 < min(cosine) < 0.989
assert [f"{off['W'][i]:.1%}" for i in (-1, 0)] == ["5.9%", "15.9%"] and off["W"] == sorted(off["W"], reverse=True)
assert min(off["bfloat16(Ŵ)"]) > 0.0009 and max(off["bfloat16(Ŵ)"]) < 0.003

# %% tags=["hide-input"]
gradient_by_depth(off)

# %% [markdown]
# ## 5 · What the tape holds
#
# The pullback of $x$ needs $\hat W$. It could capture the one that the forward pass made. Then $\hat W$ of *every*
# layer would stay in memory until the backward pass, and 4-bit storage would save nothing. So it captures `q`, which
# the model holds anyway, and dequantizes a second time. For 512 × 512, in bytes (the codes' tables, 64 bytes and 1,024,
# are shared by all layers):
#
# | captured | bytes |
# |---|---|
# | $\hat W$ in float32 | $4\cdot 512^2 = 1{,}048{,}576$ |
# | `q`, float32 constants | $512^2/2 + 4\cdot 512^2/64 + 64 = 147{,}520$ |
# | `q`, double-quantized | $512^2/2 + 512^2/64 + 4\cdot 16 + 64 + 1024 = 136{,}320$ |
#
# A layer *without* a bypass keeps nothing else, not even $x$: only $\bar W$ would need it. The bypass needs $X$ for
# $\bar A$ and $X A^{\top}$ for $\bar B$.

# %% tags=["hide-input"]
leaf = tl.Tensor(X[:8].copy(), requires_grad=True)
held = {
    "Ŵ": tl.tape_bytes(ops.linear(leaf, tl.Tensor(W_hat))),
    "q, float32 constants": tl.tape_bytes(ops.linear_frozen(leaf, quantize(W))),
    "q, double-quantized": tl.tape_bytes(ops.linear_frozen(leaf, q)),
    "q, but as the model's own": tl.tape_bytes(ops.linear_frozen(leaf, q), exclude=[q]),
    "with a bypass of rank 64": tl.tape_bytes(layer(leaf), exclude=[q, A, B]),
}
for name, size in held.items():
    print(f"{name:26}{size:10,} bytes")
assert list(held.values()) == [1_048_576, 147_520, 136_320, 0, 4 * 8 * (512 + 64)]
assert 512**2 // 2 + 512**2 // 64 + 4 * 16 + 64 + 1024 == 136_320

# %% [markdown]
# At scale: the linear layers of LLaMA-7B, double-quantized, and all their $\hat W$ at once in bfloat16, which
# is 3.9 times as much. The price is a second dequantization in each step, on top of the products that LoRA
# needs anyway (notebook 02, section 8): this is one reason why 4-bit training is not faster.
#
# Must one dequantize at all? A product of 4-bit codes with $x$ has no meaning; the codes are names of values. But $\hat
# W$ need not exist as a *whole*: exercise 1 holds only a few rows of it at a time, and GPU kernels for single tokens a
# few numbers.

# %% tags=["hide-input"]
shapes = parameters.llama_shapes(memory.config_of("llama-7b"))
weights = sum(o * i for o, i in shapes)
stored = sum(memory.codes_bytes(o * i) + memory.constants_bytes(o * i) for o, i in shapes)
print(
    f"7B: {weights / 1e9:.3f}e9 linear weights, stored {stored / 1e9:.2f} GB, all Ŵ in bfloat16 {2 * weights / 1e9:.2f} GB"
)
assert (round(stored / 1e9, 2), round(2 * weights / 1e9, 2)) == (3.34, 12.95) and round(2 * weights / stored, 1) == 3.9

# %% tags=["hide-input"]
backend.seed(0)
model = tl.add_lora(tl.quantize_linears(tl.Llama.from_pretrained("base")), r=8, alpha=16)
block, rope = model.model.layers[0], ops.rope_table(np.arange(64), 48)
h, g = (rng.standard_normal((2, 64, 192)).astype(np.float32) for _ in range(2))

# %% [markdown]
# ## 6 · Checkpointing a block
#
# What grows with the tokens is not the weight but the tape, and 4 bits do nothing about that. Gradient checkpointing
# (§2; Chen et al. 2016) does: run a block without a tape, keep its input, and in the backward pass run it again with
# one. By hand, on the first block of the embedded model in NF4 with bypasses:

# %%
with tl.no_grad():
    out = block(tl.Tensor(h), rope)  # forward: of all that happens inside, nothing is kept
again = tl.Tensor(h, requires_grad=True)
block(again, rope).backward(g)  # backward: once more, now with a tape

# %% [markdown]
# `tl.checkpoint` does this as one operation on the tape. On the whole model: the same loss and the same gradients *in
# every bit*, since the same products are computed, only twice. The tape of 2 × 256 tokens:

# %% tags=["hide-input"]
mine = [again.grad, *(p.grad for _, p in block.trainable())]
block.zero_grad()
leaf = tl.Tensor(h, requires_grad=True)
tl.checkpoint(lambda t: block(t, rope), leaf).backward(g)
its = [leaf.grad, *(p.grad for _, p in block.trainable())]
assert all(a.tobytes() == b.tobytes() for a, b in zip(mine, its, strict=True))


def whole_step(model, checkpointing):
    """(loss, gradients, bytes held after the forward pass, bytes of each block as it is rebuilt); the weights not counted."""
    model.gradient_checkpointing, rebuilt, own = checkpointing, [], dict(model.named_weights()).values()
    model.zero_grad()
    loss = loss_of(model, rows=2)
    held = tl.tape_bytes(loss, exclude=own)
    with watch_rebuilds(lambda y: rebuilt.append(tl.tape_bytes(y, exclude=own))):
        loss.backward()
    return loss.item(), [p.grad for _, p in model.trainable()], held, rebuilt


plain, saving = whole_step(model, False), whole_step(model, True)
peak = saving[2] + max(saving[3])
print(f"loss {plain[0]:.6f} and {saving[0]:.6f}, {len(plain[1])} gradients, all equal to the bit")
print(f"tape without {plain[2]:,}; with {saving[2]:,} held + {max(saving[3]):,} for one block = {peak:,} bytes")
assert plain[0] == saving[0] and all(a.tobytes() == b.tobytes() for a, b in zip(plain[1], saving[1], strict=True))


class Counted:
    """A stored weight that counts how often all of its kind are dequantized."""

    times = 0

    def __init__(self, q):
        self.q, self.shape, self.dtype = q, q.shape, q.dtype

    def dequantize(self, dtype):
        Counted.times += 1
        return self.q.dequantize(dtype)


for _, part in model.named_modules():
    if isinstance(part, Linear4bit):
        part.weight = Counted(part.weight)
times = []
for checkpointing in (False, True):
    Counted.times = 0
    whole_step(model, checkpointing)
    times.append(Counted.times)
print(f"35 layers, dequantized in one step {times[0]} times without checkpointing, {times[1]} times with it")
assert times == [2 * 35 - 3, 3 * 35 - 3]
assert (plain[2], saving[2], max(saving[3])) == (42_465_280, 2_945_024, 8_425_472) and len(saving[3]) == 5
assert all(v.any() for v in plain[1][1::2]) and not any(v.any() for v in plain[1][::2])

# %% [markdown]
# 42.5 MB become 11.4 MB: the inputs of five blocks, what lies outside the blocks, and the tape of *one* block. A
# layer's weight is now dequantized three times in each step and not twice (q, k and v of the first block twice and not
# once, since nothing below them needs a gradient). Notebook 09 predicts these bytes from the model's sizes.
#
# torch's reentrant checkpoint sees only what is passed to the function. If the block's input needs no gradient, as
# behind a frozen embedding, it leaves the bypasses inside without gradients; hence PEFT lets the embedding's output ask
# for one. `tl.checkpoint` looks inside instead: the first block's seven $B$ have their gradients above, though its
# input has none.
#
# ## 7 · Computing in bfloat16
#
# With `compute_dtype="bfloat16"` the operands are rounded, the sums are float32, the result is rounded:
#
# $$Y = \mathrm{bf}\big(\mathrm{bf}(X)\,\mathrm{bf}(\hat W)^{\top}\big), \qquad
# \bar X = \mathrm{bf}\big(\mathrm{bf}(\bar Y)\,\mathrm{bf}(\hat W)\big) .$$

# %%
Y16 = bf16(bf16(X) @ bf16(W_hat).T)
X16_bar = bf16(bf16(G) @ bf16(W_hat))

# %% [markdown]
# Three roundings, each with a relative error of 0.17 % (in norm). They have nothing to do with each other, so their
# squares add up: the prediction is $\sqrt 3 \cdot 0.166\,\% = 0.288\,\%$.

# %% tags=["hide-input"]


def run(layer):
    x = tl.Tensor(X, requires_grad=True)
    y = layer(x)
    y.backward(G)
    return y.data, x.grad


(y32, g32), (y16, g16) = run(Linear4bit(q)), run(Linear4bit(q, compute_dtype="bfloat16"))
assert Y16.tobytes() == y16.tobytes() and X16_bar.tobytes() == g16.tobytes()
parts = [apart(bf16(a), a) for a in (X, W_hat, y32)]
print("relative errors of bf(X), bf(Ŵ), bf(Y):", *(f"{e:.5f}" for e in parts))
print(f"predicted {np.linalg.norm(parts):.5f}; measured: Y {apart(y16, y32):.5f}, X̄ {apart(g16, g32):.5f}")
print(f"quantization itself: {apart(W_hat, W):.4f}, {apart(W_hat, W) / apart(y16, y32):.0f} times as much")
assert all(abs(e - 0.00166) < 2e-5 for e in parts) and abs(np.linalg.norm(parts) - 0.00288) < 2e-5
assert all(abs(e / np.linalg.norm(parts) - 1) < 0.02 for e in (apart(y16, y32), apart(g16, g32)))
assert round(apart(W_hat, W) / apart(y16, y32)) == 32

# %% [markdown]
# ### Two weights in one layer
#
# bitsandbytes remembers in which dtype a weight was before it was quantized. Its forward pass takes $\hat W$ in the
# *compute* dtype. Its backward pass takes $\hat W$ in that *stored* dtype and then casts it to the compute dtype. If
# the checkpoint was bfloat16 and the computation is float32, the two passes use different weights.
# (`backward_weight="stored"`, the default here, does as bitsandbytes does; `"forward"` takes the forward's.) Products
# with the identity show both weights:

# %% tags=["hide-input"]
sources = {"float32": W, "bfloat16": BFloat16Array.of(W), "float16": W.astype(np.float16)}
different = {}
eye, nought = np.eye(512, dtype=np.float32), np.zeros((512, 512), np.float32)
for stored, source in sources.items():
    for compute in ("float32", "bfloat16"):
        two = Linear4bit(quantize(source, double_quant=True), compute_dtype=compute)
        x = tl.Tensor(nought, requires_grad=True)
        there = two(tl.Tensor(eye)).data.T
        two(x).backward(eye)
        different[stored, compute] = (x.grad != there).mean(), apart(x.grad, there)
        print(
            "stored as {:8} computed in {:8}: {:6.2%} of the weights differ, by {:.5f} in norm".format(
                stored, compute, *different[stored, compute]
            )
        )
        two.backward_weight, x.grad = "forward", None
        two(x).backward(eye)
        assert (x.grad == there).all()
share, size = different["bfloat16", "float32"]
assert abs(share - 0.91) < 0.01 and round(size, 4) == 0.0016
assert [k for k, (n, _) in different.items() if n] == [
    ("bfloat16", "float32"),
    ("float16", "float32"),
    ("float16", "bfloat16"),
]
assert abs(different["float16", "float32"][0] - 0.91) < 0.01 and round(different["float16", "float32"][1], 4) == 0.0002
assert abs(different["float16", "bfloat16"][0] - 0.06) < 0.01

# %% [markdown]
# Stored bfloat16 and computed in float32: 91 % of the weights differ, by 0.16 % in norm. That is the middle curve of
# the figure: the gradient is wrong by 0.1 to 0.3 %, not by chance but in the same way in each step. With bfloat16 for
# both (QLoRA's setting) the two are equal.
#
# ## 8 · What prepare does to a model
#
# Before training, PEFT's `prepare_model_for_kbit_training` does three things, and so does
# `adapters.kbit.prepare_for_kbit_training`: it freezes everything, turns the *other* 16-bit weights (embedding, head) into
# float32, and switches checkpointing on. The 4-bit layers stay.

# %% tags=["hide-input"]
ready = tl.Llama.from_pretrained("base").untie()  # with a head of its own, as large models have
kbit.store_in_16_bits(nn.quantize_linears(ready))
before = {name: w.nbytes for name, w in ready.named_weights()}
kbit.prepare_for_kbit_training(ready)
after = {name: w.nbytes for name, w in ready.named_weights()}
grown = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
for name, (a, b) in grown.items():
    print(f"{name:28}{a:9,} -> {b:9,} bytes")
print(f"{'all weights':28}{sum(before.values()):9,} -> {sum(after.values()):9,} bytes")
assert list(grown) == ["model.embed_tokens.weight", "lm_head.weight"] and set(grown.values()) == {(98_304, 196_608)}
assert (sum(before.values()), sum(after.values())) == (1_251_196, 1_447_804) and ready.gradient_checkpointing
first = len(ready.trainable()), len(tl.add_lora(ready, r=8).trainable())
second = len(kbit.prepare_for_kbit_training(ready).trainable())
print(f"trainable: {first[0]} when prepared, {first[1]} with bypasses, {second} if prepared once more")
assert (*first, second) == (0, 70, 0)
big = memory.config_of("llama-7b")
extra = 2 * 2 * big.vocab_size * big.hidden_size
print(f"LLaMA-7B: {extra / 1e9:.2f} GB more for embedding and head")
assert round(extra / 1e9, 2) == 0.52

# %% [markdown]
# For LLaMA-7B the embedding and the head take 0.52 GB more. The order matters: prepare first, then add the bypasses.
# "Freezes everything" means the bypasses too, if they are there already; then nothing is trained.
#
# ## Where paper and code differ
#
# 1. **Equation 5 has no scale.** Equation 3 has it, and the code applies $s = \alpha/r = 16/64$. Taken literally, eq. 5
#    makes the bypass 4 times as strong.
# 2. **"∂X/∂W".** §3 says that the adapters' gradients entail "the calculation of ∂X/∂W". What is needed is $\partial
#    Y/\partial X = \hat W$ (section 3): no derivative with respect to a weight is formed, none is kept.
# 3. **Equation 6 says nothing of rounding, and nothing of the mean.** The code rounds once, to bfloat16, after a
#    float32 product; constants rounded first would change 23 % of the weights (section 1). What leaving out the mean
#    does: notebook 06.
# 4. **One $W^{BF16}$ or two weights?** The paper uses one in both passes. bitsandbytes does too if storage and
#    computation have the same dtype. With bfloat16 stored and float32 computed 91 % of the weights differ, by 0.16 %,
#    and the gradients of the embedded model by 0.1 to 0.3 % (sections 4 and 7).
# 5. **X W or x Wᵀ.** The paper's blocks of 64 would run along the flattened (in × out) weight, the code's along (out ×
#    in). Quantizing the transpose gives another $\hat W$: 92 % of the weights differ, at the same error.

# %% tags=["hide-input"]
printed, base = X @ W_hat.T + X @ A.T @ B.T, X @ W_hat.T
print(
    f"eq. 5 as printed: the bypass adds {np.linalg.norm(printed - base) / np.linalg.norm(Y - base):.3f} times as much"
)
assert abs(np.linalg.norm(printed - base) / np.linalg.norm(Y - base) - 4) < 1e-3
other = quantize(np.ascontiguousarray(W.T), double_quant=True).dequantize("float32").T
print(
    f"blocks along the other axis: {(other != W_hat).mean():.0%} differ; errors {apart(other, W):.4f}, {apart(W_hat, W):.4f}"
)
assert abs((other != W_hat).mean() - 0.92) < 0.01 and abs(apart(other, W) / apart(W_hat, W) - 1) < 0.01

# %% [markdown]
# ## Exercises
#
# For grading only the setup cell and the exercise cells are run: put helpers inside the exercise's cell.
#
# ### 07-1 Never the whole Ŵ
#
# The layer of section 2 holds one dense $\hat W$ while it multiplies. It need not.


# %% tags=["exercise"]
def exercise_1(q, x, g, rows):
    """Return (y, x̄): y = x Ŵᵀ and x̄ = g Ŵ, with at most `rows` rows of Ŵ dequantized at any time.

    q      a QuantizedTensor of shape (out, in), in even. Use q.packed (two codes a byte, the even element in the high half), q.code (the
           values by code), q.absmax (one float32 a block, restored already) and q.blocksize. Blocks run along the flattened weight, so a
           block may begin in one row and end in the next.
    x      (tokens, in) float32            g  (tokens, out) float32
    rows   an int, 1 or more; out need not be a multiple of it

    Checked: both against the dense Ŵ, to 1e-5; odd sizes; and by the memory that a call takes at its peak: less than a quarter of the dense
    Ŵ for a large weight and few rows. (`q.indices()` and `q.dequantize()` make arrays for the whole weight.) What happens to y and to x̄
    when Ŵ is cut into groups of rows is not the same.
    """
    # BEGIN SOLUTION
    (n_out, n_in), absmax = q.shape, q.absmax
    y, x_bar = np.empty((len(x), n_out), np.float32), np.zeros((len(x), n_in), np.float32)
    for start in range(0, n_out, rows):
        end = min(start + rows, n_out)
        packed = q.packed[start * n_in // 2 : end * n_in // 2]
        values = q.code[np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)]
        w = (values * absmax[np.arange(start * n_in, end * n_in) // q.blocksize]).reshape(-1, n_in)
        y[:, start:end] = x @ w.T  # these outputs, and no others
        x_bar += g[:, start:end] @ w  # a share of every input's gradient
    return y, x_bar
    # END SOLUTION


# %%
_ = grade("07-1", exercise_1)

# %% [markdown]
# ### 07-2 The wrong weight, many layers deep
#
# In section 4 the error of $\bar y\,W$ grew on the way down. In a chain of linear layers it can be predicted from
# numbers that each layer has by itself.


# %% tags=["exercise"]
def exercise_2(pairs):
    """Predict ‖ḡ W₁⋯W_L − ḡ Ŵ₁⋯Ŵ_L‖ / ‖ḡ Ŵ₁⋯Ŵ_L‖ for many random rows ḡ, from sums over single layers.

    pairs   [(W, Ŵ), …], one for each layer that the gradient passes, square arrays of one size (at least 128 × 128)

    Multiply no two of the matrices. Use that for large, independent random matrices norms and inner products multiply:
    ‖PQ‖² ≈ ‖P‖² ‖Q‖² / n, and ⟨P₁Q₁, P₂Q₂⟩ ≈ ⟨P₁, P₂⟩ ⟨Q₁, Q₂⟩ / n, in which ⟨P, Q⟩ = Σ PᵢⱼQᵢⱼ and ‖P‖² = ⟨P, P⟩. Write the square of the
    difference out, and do not assume that W − Ŵ is orthogonal to Ŵ: for a code that is not made of centroids it is not.

    Return a float. Checked against the products, to 6 %, for codes from NF4 to four values, and up to twelve layers.
    """
    # BEGIN SOLUTION
    square, cross = 1.0, 1.0
    for w, w_hat in pairs:
        energy = float((w_hat * w_hat).sum())
        square *= float((w * w).sum()) / energy
        cross *= float((w * w_hat).sum()) / energy
    return float(np.sqrt(square - 2 * cross + 1))
    # END SOLUTION


# %%
_ = grade("07-2", exercise_2)

# %% [markdown]
# ### 07-3 A checkpoint for a layer that draws
#
# Section 6 ran a block twice and had the same bits, because nothing in it was random. LoRA's dropout draws a mask.


# %% tags=["exercise"]
def exercise_3(f, x, rng):
    """Checkpoint a function that draws random numbers. Return (y, backward), where backward(g) gives x̄.

    f      f(x, rng) returns (y, pullback) with pullback(g) = x̄. It draws from rng (a dropout mask, say), and the pullback holds all that it
           computed on the way.
    x      an array      rng    an np.random.Generator

    To whoever calls it, (y, backward) must behave as (y, pullback) of f(x, rng) does: the same y and x̄ to the bit, whatever was drawn
    from rng in between, each time that backward is called; and rng ends up in the same state. But until backward is called, nothing may
    be held of what f computed, except y. Checked: all of this.
    """
    # BEGIN SOLUTION
    before = copy.deepcopy(rng)
    y, _ = f(x, rng)

    def backward(g):
        _, pullback = f(x, copy.deepcopy(before))
        return pullback(g)

    return y, backward
    # END SOLUTION


# %%
_ = grade("07-3", exercise_3)

# %% [markdown]
# ## Summary
#
# - Ŵ = doubleDequant(c₁, c₂, W), done by hand, equals `QuantizedTensor.dequantize` to the bit, and the layer
#   (`nn.Linear4bit` in `tl.LoRALinear`) is LoRA on a dense Ŵ to the bit, gradients included.
#   `tests/oracle/test_oracle_linear4bit.py` compares it with bitsandbytes.
# - x̄ = ȳ Ŵ: finite differences of a real loss agree to seven digits; with W the gradient is wrong by 6 % near the loss
#   and 16 % at the bottom. No straight-through is involved (`ops.linear_frozen`; `tests/test_lora.py`).
# - The tape holds `q` and not Ŵ: 147,520 bytes instead of 1,048,576 (`tests/test_tensor.py`). Checkpointing brings the
#   rest from 42.5 MB to 11.4 MB with the same bits.
# - bfloat16 adds an error of 0.29 %, a thirty-second of the quantization's. A weight stored in bfloat16 and computed in
#   float32 is two weights.
# - Next: notebook 20 on better starts for such a base; 08 on the paged optimizer; 09 on where the memory goes.
