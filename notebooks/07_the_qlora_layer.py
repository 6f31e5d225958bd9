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
# [← 06 Double quantization](06_double_quantization.ipynb) · [All notebooks](README.md) · [08 Paged optimizers →](08_paged_optimizers.ipynb)
#
# **Question.** How does a gradient pass through a weight that is stored in 4 bits?
#
# **You will be able to**
#
# - build a QLoRA layer from its bytes, forward and backward
# - show with a finite difference which weight the backward pass needs
# - say what such a layer leaves on the tape
#
# **Needs:** pullbacks and the tape ([02](02_a_small_autograd.ipynb)), the bypass
# ([03](03_the_bypass.ipynb)), double quantization ([06](06_double_quantization.ipynb)).
#
# **Hours:** 2 (1 to read and run, 1 for the exercises).
#
# **Papers:** QLoRA (arXiv 2305.14314) §3, equations 5 and 6. Settled: why dequantize
# and how gradients pass (qlora issues 258 and 286); why 4 bits are not faster
# (bitsandbytes issue 605).
#
# Folded cells measure, check or draw. Click ••• to open one.

# %% tags=["setup"]
import copy

import numpy as np
from drawings.nb07 import gradient_by_depth
from grading import grade

import tinylora as tl
from tinylora import codebooks, ops, quantize
from tinylora.adapters import kbit
from tinylora.costs import memory, parameters
from tinylora.dtypes import round_to
from tinylora.nn import Linear, Linear4bit

NF4 = codebooks.nf4()


def apart(a, b):
    """‖a − b‖ / ‖b‖ over all entries."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


# %% [markdown]
# ## 1 · Ŵ from the bytes
#
# Take a weight $W$ of 512 × 512 normal numbers with σ = 0.05. $X$ will be 256 inputs,
# and $\bar Y$ (`G`) the gradient of a loss with respect to the 256 outputs.

# %%
rng = np.random.default_rng(0)
W = (0.05 * rng.standard_normal((512, 512))).astype(np.float32)
X, G = (rng.standard_normal((256, 512)).astype(np.float32) for _ in range(2))

# %% [markdown]
# Quantized, $W$ is stored as 4-bit codes $q_i$, two in a byte, the even one in the high
# half. Each block of 64 weights has a constant in one byte, $k_b$. Each 256 of these
# bytes share a float32 $n$. One float32, $\mu$, is the mean of all constants. Equation
# 6 restores first the constants and then the weights. $d$ is the 8-bit code and $c$ is
# NF4:
#
# $$\tilde m_b = d[k_b]\, n_{\lfloor b/256 \rfloor} + \mu, \qquad
# \hat w_i = c[q_i]\, \tilde m_{\lfloor i/64 \rfloor} .$$

# %%
q = quantize(W, double_quant=True)
k, n, d, mu = q.absmax_codes, q.nested_absmax, q.constants.code, q.offset

m = d[k] * np.repeat(n, 256) + mu
codes = np.stack([q.packed >> 4, q.packed & 15], axis=1)
W_hat = (NF4[codes].reshape(-1, 64) * m[:, None]).reshape(W.shape)
assert W_hat.tobytes() == q.dequantize("float32").tobytes()  # it equals the library's
print(f"stored {q.nbytes:,} bytes, Ŵ {W_hat.nbytes:,} bytes, error of Ŵ {100 * apart(W_hat, W):.1f} %")

# %% tags=["hide-input"]
# Checks: the bytes that are stored, and the error of Ŵ
assert q.nbytes == 512 * 512 // 2 + 4096 + 4 * 16 + 4 == 135_236
assert round(apart(W_hat, W), 3) == 0.092

# %% [markdown]
# ## 2 · The layer
#
# Equation 5, with the scale $s = \alpha/r$ that equation 3 has and equation 5 lacks, is
#
# $$Y = X \hat W^{\top} + s\, X A^{\top} B^{\top} .$$
#
# The paper stores the transposed matrices: its $L_1$ is $A^{\top}$, its $L_2$ is
# $B^{\top}$. With the paper's $\alpha = 16$ and $r = 64$, $s$ is 1/4.

# %%
tl.seed(0)
layer = tl.LoRALinear(Linear4bit(q), r=64, alpha=16)
A, B, s = layer.lora_A.weight.data, layer.lora_B.weight.data, np.float32(layer.scaling)
B += (0.05 * rng.standard_normal(B.shape)).astype(np.float32)  # as if it had been trained

Y = X @ W_hat.T + (X @ A.T @ B.T) * s
assert Y.tobytes() == layer(tl.Tensor(X)).data.tobytes() and s == 0.25

# %% [markdown]
# A LoRA layer on a dense $\hat W$ has the same output and the same gradients (folded).
# **To the rest of the network a QLoRA layer is a LoRA layer on $\hat W$.**


# %% tags=["hide-input"]
# Checks: a LoRA layer on a dense Ŵ has the same output and the same gradients, to the bit
def gradients(layer):
    """(y, x̄, Ā, B̄) for the input X and the output gradient G."""
    layer.zero_grad()
    x = tl.Tensor(X, requires_grad=True)
    y = layer(x)
    y.backward(G)
    return y.data, x.grad, layer.lora_A.weight.grad, layer.lora_B.weight.grad


dense = Linear(512, 512)
dense.weight.data = W_hat.copy()
twin = tl.LoRALinear(dense, bypass=copy.deepcopy(layer.bypasses["default"]))
four_bits = gradients(layer)
assert all(a.tobytes() == b.tobytes() for a, b in zip(four_bits, gradients(twin), strict=True))

# %% [markdown]
# ## 3 · The backward pass
#
# The forward pass multiplies by the constant matrix $\hat W^{\top}$. So the backward
# pass multiplies by $\hat W$ and needs nothing else. How $\hat W$ came about is not
# differentiated. $\hat W$ is rebuilt from the bytes, used, and dropped:


# %%
def frozen(x, q):
    """y = x Ŵᵀ, and the pullback ȳ → x̄. The pullback holds q, and neither Ŵ nor x."""

    def pullback(g):
        return g @ q.dequantize("float32")  # x̄ = ȳ Ŵ

    return x @ q.dequantize("float32").T, pullback


# %% [markdown]
# The bypass adds its share to $\bar X$. $A$ and $B$ are trained, so they get gradients.
# With $U = s\,\bar Y B$:
#
# $$\bar X = \bar Y \hat W + U A, \qquad \bar A = U^{\top} X, \qquad
# \bar B = s\,\bar Y^{\top} X A^{\top} .$$

# %%
_, pullback = frozen(X, q)
U = (s * G) @ B
X_bar = pullback(G) + U @ A
A_bar, B_bar = U.T @ X, (s * G).T @ (X @ A.T)

# %% tags=["hide-input"]
# Checks: the three gradients are the library's to the bit, and Ŵ has none
assert all(a.tobytes() == b.tobytes() for a, b in zip((X_bar, A_bar, B_bar), four_bits[1:], strict=True))
assert [name.split(".")[-2] for name, _ in layer.trainable()] == ["lora_A", "lora_B"] and not hasattr(q, "grad")

# %% [markdown]
# No *straight-through estimator*, a made-up derivative of rounding, is involved: only
# training $W$ would need one.
#
# ## 4 · Ŵ or W? Ask the loss
#
# Suppose that somebody has kept the unquantized $W$ and uses $\bar x = \bar y\,W$. But the
# loss belongs to the network with $\hat W$. Its slope can be measured without a backward
# pass, and the measurement decides.
#
# `ops.linear_frozen` calls its weight's `dequantize(dtype)` once in each pass. In the
# backward pass it asks for the weight's own `dtype`. If this is named "backward", a weight
# can give each pass another matrix:


# %%
class TwoWeights:
    """A stored weight with one matrix for the forward pass and one for the backward pass."""

    dtype = "backward"

    def __init__(self, forward, backward):
        self.forward, self.backward, self.shape = forward, backward, forward.shape

    def dequantize(self, dtype):
        return self.backward if dtype == "backward" else self.forward


# %% [markdown]
# The folded cell puts such weights into the embedded model: 5 blocks of 7 linear layers,
# in NF4, with fresh bypasses ($B = 0$). The backward pass takes $\hat W$, $W$, or
# $\hat W$ rounded to bfloat16. For each of these ways, `claimed[way][block]` is the
# gradient of the block's seven $B$, as one vector. `loss_at(block, b)` is the loss if
# these $B$ are the vector `b`.


# %% tags=["hide-input"]
# Measures: the gradients of B in each block, with three weights in the backward pass
text = np.frombuffer(tl.data.jargon("train")[:257], np.uint8).astype(int)[None]
ways = {
    "Ŵ": lambda w, w_hat: w_hat,
    "W": lambda w, w_hat: w,
    "bfloat16(Ŵ)": lambda w, w_hat: round_to(w_hat, "bfloat16"),
}


def adapted(choose):
    """The model in NF4 with bypasses; choose(W, Ŵ) is the weight of the backward pass."""
    tl.seed(0)
    model = tl.Llama.from_pretrained("base")
    original = {name: part.weight.data for name, part in model.named_modules() if isinstance(part, Linear)}
    tl.add_lora(tl.quantize_linears(model), r=8, alpha=16)
    for name, part in model.named_modules():
        if isinstance(part, Linear4bit):
            w, w_hat = original[name.removesuffix(".base_layer")], part.dense()
            part.weight = TwoWeights(w_hat, choose(w, w_hat))
    for p in model.parameters():
        p.data = p.data.astype(np.float64)  # so that differences of the loss keep their digits
    return model


def factors(model, block):
    """The B of the block's seven layers."""
    return [p for name, p in model.model.layers[block].trainable() if "lora_B" in name]


def loss_of(model):
    """The loss on 256 bytes of the Jargon File."""
    return ops.softmax_cross_entropy(model(text[:, :-1]), text[:, 1:])


def claims(model):
    """The gradient of each block's B, by a backward pass."""
    loss_of(model).backward()
    return [np.concatenate([p.grad.ravel() for p in factors(model, i)]) for i in range(5)]


def loss_at(block, b):
    """The loss if the block's seven B are the vector b, and all other B are 0."""
    here = factors(model, block)
    for p in here:
        p.data, b = b[: p.size].reshape(p.shape), b[p.size :]
    with tl.no_grad():
        loss = loss_of(model).item()
    for p in here:
        p.data = 0 * p.data
    return loss


claimed = {way: claims(adapted(choose)) for way, choose in ways.items()}
model = adapted(ways["Ŵ"])

# %% [markdown]
# A gradient $g$ claims that along a direction $v$ the loss has the slope $g \cdot v$. A
# *central difference* measures this slope:


# %%
def slope(f, v, eps=1e-3):
    """(f(εv) − f(−εv)) / 2ε, the slope of f at 0 along v."""
    return (f(eps * v) - f(-eps * v)) / (2 * eps)


# %% [markdown]
# A rival of $\hat W$ is judged along the $v$ in which the two claims differ most:


# %%
def judged(rival, block):
    """Errors of the rival's claim and of Ŵ's claim, over the norm of Ŵ's gradient."""
    right, other = claimed["Ŵ"][block], claimed[rival][block]
    v = (other - right) / np.linalg.norm(other - right)
    told = slope(lambda b: loss_at(block, b), v)
    return [abs(g @ v - told) / np.linalg.norm(right) for g in (other, right)]


# %% tags=["hide-input"]
# Measures: the errors of the three ways in each block
verdicts = {rival: np.array([judged(rival, block) for block in range(5)]) for rival in ("W", "bfloat16(Ŵ)")}
off = {"Ŵ": list(np.max([both[:, 1] for both in verdicts.values()], axis=0))}
off |= {rival: list(both[:, 0]) for rival, both in verdicts.items()}
print(f"{'block':12}" + "".join(f"{i:>10}" for i in range(1, 6)))
for name, errors in off.items():
    print(f"{name:12}" + "".join(f"{e:10.1e}" for e in errors))
cosine = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(claimed["W"], claimed["Ŵ"], strict=True)]
print("cosine between the gradients with W and with Ŵ:", *(f"{c:.4f}" for c in cosine))
assert max(off["Ŵ"]) < 5e-8 and 0.982 < min(cosine) < 0.985
assert [f"{off['W'][i]:.1%}" for i in (-1, 0)] == ["6.7%", "18.4%"] and off["W"] == sorted(off["W"], reverse=True)
assert 0.0009 < min(off["bfloat16(Ŵ)"]) < 0.0015 and 0.0025 < max(off["bfloat16(Ŵ)"]) < 0.0035

# %% tags=["hide-input"]
# Draws: the error of the gradient, block by block
gradient_by_depth(off)

# %% [markdown]
# The slope agrees with $\hat W$ to seven digits. With $W$ the gradient is wrong by
# 6.7 % in the block next to the loss. Each layer on the way down multiplies by the
# wrong matrix once more. In the first block the error is 18.4 %. The wrong gradient
# still points downhill: its cosine with the right one is at least 0.98. So a training
# run would hardly betray the mistake.
#
# ## 5 · What the tape holds
#
# The pullback could also have kept the $\hat W$ of the forward pass. Then all layers'
# $\hat W$ would stay in memory until the backward pass. `tl.tape_bytes` counts what
# pullbacks hold:

# %%
x = tl.Tensor(X[:8].copy(), requires_grad=True)
kept = tl.tape_bytes(ops.linear(x, tl.Tensor(W_hat)))  # this pullback holds Ŵ
again = tl.tape_bytes(ops.linear_frozen(x, q))  # this one holds q and two tables of values
extra = tl.tape_bytes(ops.linear_frozen(x, q), exclude=[q])  # q is the model's anyway
bypass = tl.tape_bytes(layer(x), exclude=[q, A, B])  # x for Ā, and x Aᵀ for B̄
print(f"Ŵ {kept:,} bytes, q {again:,}; beside q {extra}, with a bypass {bypass:,}")
assert (kept, again, extra, bypass) == (1_048_576, 136_320, 0, 4 * 8 * (512 + 64))

# %% [markdown]
# The frozen product adds nothing to what the model holds, not even $x$. LLaMA-7B's
# stored linear layers take 3.34 GB. All their $\hat W$ at once, in bfloat16, would take
# 12.95 GB. The price is a second dequantization in each step. This is one reason why
# 4 bits are not faster.
#
# Must one dequantize at all? Yes: a code is an index into a table, and products need
# the values. But $\hat W$ need not exist as a whole (exercise 1).

# %% tags=["hide-input"]
# Checks: the bytes of LLaMA-7B's linear layers
weights = [o * i for o, i in parameters.llama_shapes(memory.config_of("llama-7b"))]
stored = sum(memory.codes_bytes(size) + memory.constants_bytes(size) for size in weights)
assert (round(stored / 1e9, 2), round(2 * sum(weights) / 1e9, 2)) == (3.34, 12.95)

# %% [markdown]
# ## 6 · What a training run adds
#
# One step with AdamW, on the layer of section 2:


# %% tags=["hide-input"]
# Measures: what each tensor of a step is stored in, what it is computed in, and whether it has a gradient
def dtype(*arrays):
    (name,) = {str(np.asarray(a).dtype) for a in arrays}
    return name


stepped, x = copy.deepcopy(layer), tl.Tensor(X, requires_grad=True)
stepped.zero_grad()
y = stepped(x)
y.backward(G)
optimizer, base = tl.AdamW(stepped.trainable(), lr=2e-4), stepped.base_layer
optimizer.step()
moments = [a for name, a in optimizer.state_dict().items() if name.endswith((".m", ".v"))]
bypass_ = [stepped.lora_A.weight, stepped.lora_B.weight]
rows = [
    ("tensor", "stored in", "computed in", "gradient"),
    ("x, y", dtype(x.data, y.data), base.compute_dtype, dtype(x.grad, G)),
    ("W", f"{dtype(q.packed)}, two NF4 codes a byte", f"{base.compute_dtype}, as Ŵ", "none"),
    ("absmax", f"{dtype(k)}; n and μ {dtype(n, mu)}", dtype(m), "none"),
    ("A, B", dtype(*(p.data for p in bypass_)), stepped.lora_A.compute_dtype, dtype(*(p.grad for p in bypass_))),
    ("Adam's m, v", dtype(*moments), dtype(*moments), "none"),
]
for row in rows:
    print("{:12} {:32} {:16} {}".format(*row))
assert len(moments) == 4 and not hasattr(q, "grad")  # m and v of A and of B; the bytes of W have no gradient

# %% [markdown]
# - **bfloat16.** QLoRA rounds $X$, $\hat W$ and $Y$ to bfloat16
#   ([21](21_the_same_equation_on_a_gpu.ipynb), section 3).
# - **Checkpointing** rebuilds a block's tape in the backward pass, with the same bits
#   (`tests/test_tensor.py`; [09](09_where_did_the_memory_go.ipynb) counts the bytes).
# - **`prepare_for_kbit_training`** freezes all weights, makes the other 16-bit ones
#   float32 and turns checkpointing on (`tests/oracle/test_oracle_linear4bit.py`). Call
#   it before `add_lora`, or it freezes the bypasses too.
#
# ## Where paper and code differ
#
# - **Scale.** As printed, equation 5's bypass is 4 times as strong.
# - **"∂X/∂W".** §3 asks for this derivative. What is needed is
#   $\partial Y/\partial X = \hat W$.
# - **One weight or two.** bitsandbytes' backward pass rounds $\hat W$ to the dtype of
#   the unquantized weight. If that was bfloat16 and the computation is float32, the
#   passes use two weights, and the gradient is wrong by 0.1 to 0.3 % (the figure's
#   middle curve). `backward_weight="forward"` avoids it.
# - **Orientation.** The paper's blocks run along (in × out), the code's along (out ×
#   in). 92 % of the entries of $\hat W$ differ, at the same error.

# %% tags=["hide-input"]
# Checks: what is trained if prepared before or after add_lora; the scale; blocks along the other axis
ready = kbit.prepare_for_kbit_training(tl.quantize_linears(tl.Llama.from_pretrained("base")))
assert not ready.trainable() and ready.gradient_checkpointing and len(tl.add_lora(ready, r=8).trainable()) == 70
assert not kbit.prepare_for_kbit_training(ready).trainable()
base = X @ W_hat.T
assert abs(np.linalg.norm(X @ A.T @ B.T) / np.linalg.norm(Y - base) - 4) < 1e-3
other = quantize(np.ascontiguousarray(W.T), double_quant=True).dequantize("float32").T
assert abs((other != W_hat).mean() - 0.92) < 0.01 and abs(apart(other, W) / apart(W_hat, W) - 1) < 0.01

# %% [markdown]
# ## Exercises
#
# Put helpers inside the exercise's cell.
#
# ### 07-1 Never the whole Ŵ
#
# Compute both products with at most `rows` rows of $\hat W$ in memory. Given:
#
# - `q`: a quantized weight of shape (out, in), where `in` is even. Use `q.packed` (flat),
#   `q.code` (the 16 values), `q.absmax` (one float32 a block, already restored) and
#   `q.blocksize`. Blocks run along the flattened weight, so a block may begin in one
#   row and end in the next.
# - `x` (tokens, in) and `g` (tokens, out), float32
# - `rows`: an int, at least 1; out need not be a multiple of it
#
# Return `(y, x_bar)`, $y = x \hat W^{\top}$ and $\bar x = g \hat W$.
#
# Checked: both to 1e-5, odd sizes, and that the call takes less memory than a quarter
# of $\hat W$ (`q.dequantize()` and `q.indices()` take more).
#
# Hint: a group of rows gives some entries of $y$, but a share of every entry of
# $\bar x$. Entry `j` of the flattened $\hat W$ is in block `j // q.blocksize`.


# %% tags=["exercise"]
def exercise_1(q, x, g, rows):
    """Return (y, x̄), y = x Ŵᵀ and x̄ = g Ŵ, with at most `rows` rows of Ŵ at any time."""
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
# The error of $\bar y\,W$ grew on the way down. In a chain of linear layers it can be
# predicted. Given:
#
# - `pairs`: $(W, \hat W)$ of each layer, independent random 128 × 128 arrays
#
# Return the expected error of the product, a float, without multiplying two matrices:
#
# $$\frac{\lVert W_1 \cdots W_L - \hat W_1 \cdots \hat W_L \rVert}
# {\lVert \hat W_1 \cdots \hat W_L \rVert}, \qquad
# \lVert P \rVert^2 = \langle P, P \rangle, \qquad
# \langle P, Q \rangle = \sum_{ij} P_{ij} Q_{ij} .$$
#
# Checked: to 4 %, for fine and coarse codes, against the mean over 16 products, each
# with the layers in a random order and the neurons between them renumbered.
#
# Hint: $\lVert P - Q \rVert^2 = \langle P, P \rangle - 2 \langle P, Q \rangle
# + \langle Q, Q \rangle$. Do not assume that $W - \hat W$ is orthogonal to $\hat W$. For
# large independent $n \times n$ matrices
#
# $$\langle P_1 P_2, Q_1 Q_2 \rangle \approx
# \langle P_1, Q_1 \rangle\, \langle P_2, Q_2 \rangle / n .$$
#
# If all terms are divided by $\langle Q, Q \rangle$, $n$ cancels.


# %% tags=["exercise"]
def exercise_2(pairs):
    """Predict the relative error of a product of many Ŵ, from sums over single layers."""
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
# ## Summary
#
# - A QLoRA layer is LoRA on a dense $\hat W$, to the bit (`Linear4bit` in
#   `tinylora/nn.py`; `tests/oracle/test_oracle_linear4bit.py` compares it with
#   bitsandbytes).
# - $\bar x = \bar y\,\hat W$. Finite differences agree to seven digits; with $W$ the
#   gradient is wrong by 7 to 18 % (`ops.linear_frozen`; `tests/test_lora.py`).
# - The pullback holds the bytes and not $\hat W$: 136,320 bytes instead of 1,048,576
#   (`tinylora/tensor.py`; `tests/test_tensor.py`).
#
# ## Build it
#
# Step 3 of [build_it.md](build_it.md) is this layer in your own `my_qlora.py`: a frozen
# linear layer with LoRA, forward and backward. `pytest notebooks -k my-3` grades it.
