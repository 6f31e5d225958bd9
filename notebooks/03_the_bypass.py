# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 03 · The bypass
#
# [← 02 A small autograd](02_a_small_autograd.ipynb) · [All notebooks](README.md) · [04 Blockwise absmax →](04_blockwise_absmax.ipynb)
#
# **Question.** What does training save when a weight is frozen and two small matrices
# beside it are trained instead?
#
# **You will be able to**
#
# - derive the gradients of $A$ and $B$ without that of the dense weight;
# - explain why exactly one of the two starts at 0;
# - count what LoRA saves in memory and in work.
#
# **Needs:** pullbacks and the tape ([02](02_a_small_autograd.ipynb), sections 1 and 4);
# Adam's two moments for each number (01's "running averages").
#
# **Hours:** 2 (1 to read and run, 1 for the exercises).
#
# **Papers:** LoRA (arXiv 2106.09685) §2, equations 1 and 2, and §4.1, equation 3; "LoRA
# Without Regret" (2025) on FLOPs. Settled: whether A and B are swapped (LoRA issues 42,
# 98, 121, 142, peft 983; section 4), and why LoRA is not faster (LoRA 24, peft 2063,
# bitsandbytes 605; section 6).
#
# Folded cells measure, check or draw. Click ••• to open one.

# %% tags=["setup"]
import itertools

import numpy as np
from drawings.nb03 import bypass_costs
from grading import grade

import tinylora as tl
from tinylora import ops
from tinylora.adapters.kinds import LoRAEmbedding
from tinylora.costs import flops, parameters
from tinylora.nn import Embedding, Linear

rng = np.random.default_rng(0)
tl.seed(0)


def normal(*shape):
    return rng.standard_normal(shape).astype(np.float32)


# %% [markdown]
# ## 1 · What LoRA trains
#
# The data are pairs of a prompt $x$ and a target $y$ with the tokens $y_t$. Full
# fine-tuning starts at the pretrained weights $Φ_0$ and moves all of them (equation 1).
# LoRA trains far fewer parameters $Θ$, which encode an update $ΔΦ$ (equation 2):
#
# $$\max_Φ\sum_{(x,y)}\sum_t\log P_Φ(y_t\mid x,y_{<t})\quad(1)\qquad
# \max_Θ\sum_{(x,y)}\sum_t\log P_{Φ_0+ΔΦ(Θ)}(y_t\mid x,y_{<t})\quad(2)$$
#
# The tokens of the prompt are read, not learned; in code a mask leaves them out. The
# paper says that $|Θ|$, the count of parameters, can be 0.01 % of $|Φ_0|$. This is rank
# $r=4$ on the query and value matrices of GPT-3.

# %% tags=["hide-input"]
# Checks: the masked sum by hand, and the share of parameters on GPT-3 (96 layers of width 12,288).
z, targets = rng.standard_normal((1, 7, 9)), rng.integers(0, 9, (1, 7))
mask = np.array([[0, 0, 0, 0, 1, 1, 1]])  # four tokens of prompt, three targets
log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
by_hand = -sum(log_p[0, t, targets[0, t]] for t in range(4, 7))
assert abs(ops.softmax_cross_entropy(tl.Tensor(z), targets, mask, reduction="sum").item() - by_hand) < 1e-12
for r in (4, 1):
    Θ = parameters.lora_square(2 * 96, 12288, r)
    print(f"r = {r}: |Θ| = {Θ:,}, {Θ / 175_255.8e6:.4%} of 175,255.8 million")
    assert f"{Θ / 175_255.8e6:.4%}" == {4: "0.0108%", 1: "0.0027%"}[r]

# %% [markdown]
# ## 2 · The bypass and its gradients
#
# $Θ$ consists of two matrices, $A$ ($r$ × in) and $B$ (out × $r$), for each adapted
# weight $W_0$ (out × in):
#
# $$h=W_0x+s\,BA\,x,\qquad s=\frac{α}{r},\qquad r≪\min(\text{in},\text{out}).$$
#
# With tokens as rows this is one line. It never forms the product $BA$.


# %%
def bypass(x, W0, A, B, s):
    return ops.linear(x, W0) + s * ops.linear(ops.linear(x, A), B)


# %% [markdown]
# $W_0$ is frozen, so the backward pass computes three gradients. `flops.counting`
# records the shapes of all matrix products that are made.

# %%
d_in, d_out, r, tokens, s = 48, 40, 4, 9, 4.0
W0 = tl.Tensor(normal(d_out, d_in))
x, A, B = (tl.Tensor(normal(*shape), requires_grad=True) for shape in ((tokens, d_in), (r, d_in), (d_out, r)))
g = normal(tokens, d_out)  # the gradient of h
with flops.counting() as count:
    (h := bypass(x, W0, A, B, s)).backward(g)
print("products:", *(f"{p.left}·{p.right}" for p in count.products))

# %% [markdown]
# Full fine-tuning would need the dense gradient $G=g^{\top}x$ (out × in). The bypass acts
# like the dense weight $W_0+sBA$. A small change of $A$ and $B$ changes that weight by
# $s(B\,dA+dB\,A)$ and the loss by $\langle G,s(B\,dA+dB\,A)\rangle$. So
#
# $$\bar A=s\,B^{\top}G,\qquad\bar B=s\,G\,A^{\top}.$$
#
# But none of the eight products printed above results in the shape of $G$. The autograd
# computes $B^{\top} (g^{\top}x)$ in the other order, as $(gB)^{\top}x$, where $gB$ is
# only (tokens × $r$). With $u=gB$ the gradients are
#
# $$\bar A=s\,u^{\top}x,\qquad\bar B=s\,g^{\top}(xA^{\top}),\qquad\bar x=g\,W_0+s\,u\,A.$$

# %%
G = g.T @ x.data  # what the bypass does without
for found, dense in ((A.grad, s * B.data.T @ G), (B.grad, s * G @ A.data.T)):
    assert np.allclose(found, dense, rtol=1e-4, atol=1e-4)

# %% tags=["hide-input"]
# Checks: no product has the shape of G; the gradients in float64; every entry against tl.LoRALinear.
results = [(p.left[0], p.right[-1]) for p in count.products]
assert len(results) == 8 and not {(d_out, d_in), (d_in, d_out)} & set(results) and W0.grad is None
x64, w64, a64, b64, g64 = (v.astype(float) for v in (x.data, W0.data, A.data, B.data, g))
G64 = g64.T @ x64
exact = {"A": (A, s * b64.T @ G64), "B": (B, s * G64 @ a64.T), "x": (x, g64 @ (w64 + s * b64 @ a64))}
for name, (value, wanted) in exact.items():
    error = np.linalg.norm(value.grad - wanted) / np.linalg.norm(wanted)
    print(f"gradient of {name}: shape {value.grad.shape}, relative distance to the formula {error:.0e} (float32)")
    assert error < 1e-6
layer = tl.LoRALinear(Linear(d_in, d_out), r=r, alpha=16)
for part, value in ((layer.base_layer, W0), (layer.lora_A, A), (layer.lora_B, B)):
    part.weight.data = value.data
(ht := layer(xt := tl.Tensor(x.data, requires_grad=True))).backward(g)
assert layer.scaling == s and (h.data == ht.data).all() and (x.grad == xt.grad).all()
assert (A.grad == layer.lora_A.weight.grad).all() and (B.grad == layer.lora_B.weight.grad).all()
assert layer.base_layer.weight.grad is None

# %% [markdown]
# ## 3 · Why B starts at 0
#
# "We use a random Gaussian initialization for A and zero for B, so ΔW = BA is zero at
# the beginning of training" (§4.1). With $B=0$ the output is that of the base $W_0$, bit
# for bit. $\bar A=s\,B^{\top}G$ is 0, so the first step moves only $B$. The four possible
# starts:

# %%
for kind_a, kind_b in itertools.product(("random", "0"), repeat=2):
    A = tl.Tensor(normal(r, d_in) * (kind_a != "0"), requires_grad=True)
    B = tl.Tensor(normal(d_out, r) * (kind_b != "0"), requires_grad=True)
    (h := bypass(x, W0, A, B, s)).backward(g)
    same = h.data.tobytes() == ops.linear(x, W0).data.tobytes()
    assert same == ("0" in (kind_a, kind_b))
    assert (A.grad.any(), B.grad.any()) == (kind_b != "0", kind_a != "0")
    print(f"A {kind_a:6}  B {kind_b:6}  output {'is' if same else 'is not'} the base's;", end="")
    print(f"  gradient of A {'≠' if A.grad.any() else '='} 0, of B {'≠' if B.grad.any() else '='} 0")

# %% [markdown]
# Either factor may be 0. With both at 0 neither ever gets a gradient. With both random
# the output changes before the first step.
#
# ## 4 · Are A and B swapped?
#
# No, but four facts make it look so.
#
# - **$A$ acts first and is written last:** $BAx=B(Ax)$. $A$ reads the input, $B$ writes
#   the output.
# - **QLoRA writes rows:** $Y=XW+s\,XL_1L_2$ (its equation 3), with $L_1=A^{\top}$ and
#   $L_2=B^{\top}$. The first factor is written first.
# - **A comment in loralib, the authors' code, disagrees with the code:** in the
#   repository on the linear layer, in release 0.1.2 on the embedding. The linear layer
#   draws $A$ and zeroes $B$, as the paper says. The draw is uniform between
#   $±1/\sqrt{\text{in}}$, not Gaussian. PEFT, Hugging Face's library, does so by default.
# - **The embedding of loralib and PEFT is reversed:** $A$ is 0 and $B$ is normal.

# %% tags=["hide-input"]
# Checks: the distribution of A, the first step of two embeddings, rows against columns.
a = tl.LoRALinear(Linear(300, 4), r=200).lora_A.weight.data
kurtosis = (a**4).mean() / (a**2).mean() ** 2
print(f"A, in = 300: largest {np.abs(a).max():.5f} (1/√300 = {300**-0.5:.5f}), ", end="")
print(f"variance {a.var() * 900:.3f} / 900, kurtosis {kurtosis:.2f}")
assert np.abs(a).max() <= 300**-0.5 and abs(a.var() * 900 - 1) < 0.02 and abs(kurtosis - 1.8) < 0.05  # a Gaussian: 3
ids = rng.integers(0, 30, 12)
for made in (LoRAEmbedding(Embedding(30, 8), r=2), tl.interop.loralib.Embedding(30, 8, r=2)):
    made(ids).backward(normal(12, 8))
    ours, other = (getattr(part, "weight", part) for part in (made.lora_A, made.lora_B))
    assert not ours.data.any() and ours.grad.any() and other.data.any() and not other.grad.any()
print("embedding: A = 0 and has a gradient, B is random and has none")
rows, columns = x64 @ w64.T + s * x64 @ a64.T @ b64.T, w64 @ x64.T + s * b64 @ (a64 @ x64.T)
assert np.abs(rows - columns.T).max() < 1e-12

# %% [markdown]
# ## 5 · What is saved in memory
#
# Take $T$ tokens, in = out = $N$, float32, and an $x$ that needs a gradient. Beside the
# weights, which `exclude` leaves out, a step holds the tape, the gradients, and Adam's
# two moments.


# %%
def in_memory(layer):
    """(bytes of the tape, bytes of the gradients and of Adam's moments) of one step."""
    y = layer(tl.Tensor(normal(T, N), requires_grad=True))
    tape = tl.tape_bytes(y, exclude=layer.parameters())
    y.backward(normal(T, N))
    trained = [p for _, p in layer.trainable()]
    moments = tl.AdamW(trained, lr=0.1).state_bytes if trained else 0
    return tape, sum(p.grad.nbytes for p in trained) + moments


# %% [markdown]
# To compute $\bar W$, $x$ is kept. To compute $\bar A$ the same $x$ is kept, and for
# $\bar B$ also $xA^{\top}$. If only $B$ is trained, $x$ is not needed. A frozen layer
# keeps nothing. A trained number takes 4 bytes for its gradient and 8 for its moments.

# %%
N, T, r = 256, 64, 8
layers = {"full": Linear(N, N), "frozen": Linear(N, N).requires_grad_(False)}
layers |= {name: tl.LoRALinear(Linear(N, N), r=r) for name in ("LoRA", "only B")}
layers["only B"].lora_A.requires_grad_(False)
formula = {"full": (4 * T * N, 12 * N**2), "frozen": (0, 0)}
formula |= {"LoRA": (4 * T * (N + r), 24 * N * r), "only B": (4 * T * r, 12 * N * r)}
bytes_of = {name: in_memory(layer) for name, layer in layers.items()}
assert bytes_of == formula
for name, (tape, rest) in bytes_of.items():
    print(f"{name:9}  tape {tape:6,} bytes   gradients and Adam {rest:7,} bytes")

# %% [markdown]
# So an adapted layer holds a *larger* tape than a trained one, by the factor $1+r/N$.
# Gradients and moments shrink from $12N^2$ to $24Nr$ bytes. Now the whole base model of
# notebook 01:

# %% tags=["hide-input"]
# Measures: tape, states and multiply-adds of one step of the base model (2 million weights, 2 × 256 bytes of text).
text = np.frombuffer(tl.data.jargon("train")[:514], np.uint8).reshape(2, 257).astype(int)
ways = {"full": None, "LoRA on all 35": "all-linear", "LoRA on q and v": ["q_proj", "v_proj"]}
tape, adds, trained = {}, {}, {}
for name, targets in ways.items():
    model = tl.Llama.from_pretrained("base")
    if targets:
        tl.add_lora(model, r=8, target_modules=targets)
    with flops.counting() as count:
        loss = ops.softmax_cross_entropy(model(text[:, :-1]), text[:, 1:])
        tape[name] = tl.tape_bytes(loss, exclude=model.parameters())
        loss.backward()
    adds[name], trained[name] = count.multiply_adds, sum(p.nbytes for _, p in model.trainable())
    print(f"{name:16} tape {tape[name] / 1e6:5.2f} MB ({tape[name] / tape['full']:6.1%})   ", end="")
    print(f"gradients and Adam {3 * trained[name] / 1e6:5.2f} MB ({trained[name] / trained['full']:.1%})")
assert [f"{tape[n] / tape['full']:.1%}" for n in ways] == ["100.0%", "99.5%", "77.0%"]
# why 99.5 %: LoRA freezes the first norm and the embedding, which is the output layer too
model = tl.Llama.from_pretrained("base")
for path in ("model.embed_tokens", "model.layers.0.input_layernorm"):
    model.get(path).requires_grad_(False)
loss = ops.softmax_cross_entropy(model(text[:, :-1]), text[:, 1:])
assert tl.tape_bytes(loss, exclude=model.parameters()) + 35 * 4 * 512 * 8 == tape["LoRA on all 35"]  # + 35 of xAᵀ
assert [f"{trained[n] / trained['full']:.1%}" for n in ways] == ["100.0%", "6.7%", "1.3%"]

# %% [markdown]
# With a bypass on all 35 matrices, gradients and moments are 6.7 % of full
# fine-tuning's, but the tape is 99.5 %. (It is below 100 % because the frozen output
# layer and first norm keep nothing.) With a bypass on query and value only, the tape is
# 77.0 %. LoRA saves what belongs to the weights, hardly what belongs to the tokens.
#
# ## 6 · Why isn't LoRA faster?
#
# A product of ($m$ × $k$) and ($k$ × $n$) takes $mkn$ multiply-adds. For each token:
#
# | | forward | $\bar x$ | $\bar W$, or $\bar A$ and $\bar B$ | together |
# |---|---|---|---|---|
# | full | $N^2$ | $N^2$ | $N^2$ | $3N^2$ |
# | LoRA | $N^2+2Nr$ | $N^2+2Nr$ | $2Nr$ | $2N^2+6Nr$ |
#
# Only the product for $\bar W$ is saved, at most a third of the work. $W_0x$ is still
# computed, and the gradient still passes back through $W_0$. Counted:


# %%
def work(layer, n, tokens=5):
    """Multiply-adds a token, forward and backward."""
    ones = np.ones((tokens, n), np.float32)
    with flops.counting() as count:
        layer(tl.Tensor(ones, requires_grad=True)).backward(ones)
    return count.multiply_adds // tokens


n = 96
for r in (1, 8, 16, 48):
    full, lora = work(Linear(n, n), n), work(tl.LoRALinear(Linear(n, n), r=r), n)
    assert full == 3 * n**2 and lora == 2 * n**2 + 6 * n * r
    print(f"N = {n}, r = {r:2}: full {full:,} a token, LoRA {lora:,}; ratio {lora / full:.4f}")

# %% tags=["hide-input"]
# Checks: the ratio of the multiply-adds at N = 4096, at r = N/6, and on the base model.
assert flops.lora(96, 16) == flops.full(96)  # r = N/6
ratios = {r: flops.lora(4096, r) / flops.full(4096) for r in (16, 64, 256)}
print("N = 4096:", *(f"r = {r} {ratio:.4f}" for r, ratio in ratios.items()))
assert [round(ratio, 4) for ratio in ratios.values()] == [0.6745, 0.6979, 0.7917]
print("base model, a step:", *(f"{name} {adds[name] / adds['full']:.3f}" for name in ways))
assert [f"{adds[n] / adds['full']:.3f}" for n in ways] == ["1.000", "0.757", "0.706"]

# %% [markdown]
# The two are equal at $r=N/6$. For ranks 16 to 256 at $N=4096$ the ratio is 0.67 to 0.79.
# On the base model it is 0.757 with a bypass on all matrices, and 0.706 with one on
# query and value.
#
# A count is not a time. LoRA makes eight products where full fine-tuning makes three,
# and six of the eight do little work on much data. Notebook
# [11](11_counting_lora.ipynb), section 10, counts the numbers that are moved.
#
# In the figure, the squares are a first layer, whose $\bar x$ nobody needs. m and v are
# Adam's moments.

# %% tags=["hide-input"]
# Draws: multiply-adds against the rank, counted (marks) and by formula (lines); the bytes of one step.
bypass_costs()

# %% [markdown]
# ## Where paper and code differ
#
# - **A is not Gaussian in the authors' code.** Uniform as it is, its variance is
#   1/(3 in). PEFT and tinylora have `init="gaussian"` as well.
# - **LoRA's equation 3 has no $s$**; the text below it does. QLoRA's equation 3 has it,
#   and its equation 5 does not. QLoRA's code has α = 16 and r = 64, so $s=0.25$.
# - **"25 % speedup"** (LoRA §4.2, footnote 5: 32.5 against 43.1 tokens a second) is
#   24.6 % less time, or 32.6 % more tokens a second. The count allows at most 33.3 %
#   less time.
# - **Memory.** §4.2 rightly explains the saving by the optimizer states. The tape of a
#   layer grows, here by r/N = 3.1 %.

# %% tags=["hide-input"]
# Checks: the numbers of the list.
h = tl.LoRALinear(Linear(8, 8), r=64, alpha=16)
print(f"s = {h.scaling}; time {32.5 / 43.1 - 1:+.1%}, tokens a second {43.1 / 32.5 - 1:+.1%}")
assert h.scaling == 0.25 and (f"{1 - 32.5 / 43.1:.1%}", f"{43.1 / 32.5 - 1:.1%}") == ("24.6%", "32.6%")
assert round(1 - flops.lora(12288, 4) / flops.full(12288), 3) == 0.333
assert f"{bytes_of['LoRA'][0] / bytes_of['full'][0] - 1:.1%}" == "3.1%"
gaussian = tl.LoRALinear(Linear(300, 4), r=200, init="gaussian").lora_A.weight.data
assert abs((gaussian**4).mean() / (gaussian**2).mean() ** 2 - 3) < 0.15

# %% [markdown]
# ## Exercises
#
# Grading runs only the setup and the exercises' cells: put helpers there.
#
# ### 03-1 The bypass as one operation
#
# Write the pullbacks of $h=xW_0^{\top}+s\,(xA^{\top})B^{\top}$ in one function.
#
# Given, all float64:
#
# - `x` (tokens, in), `W0` (out, in), `A` (r, in), `B` (out, r), and the float `s`;
# - `g` (tokens, out), the gradient of $h$.
#
# Return the tuple $(\bar x,\bar A,\bar B)$.
#
# Checked: central differences, also with one token and with B = 0; that no argument is
# changed; that nothing as large as `W0` is formed, by the memory that the call takes.
#
# Hint: two paths lead from $x$ to $h$.


# %% tags=["exercise"]
def exercise_1(x, W0, A, B, s, g):
    """The gradients of x, A and B, where g is that of h = x W0ᵀ + s (x Aᵀ) Bᵀ."""
    # BEGIN SOLUTION
    u = s * (g @ B)  # (tokens, r): shared by x̄ and Ā
    return g @ W0 + u @ A, u.T @ x, s * (g.T @ (x @ A.T))
    # END SOLUTION


# %%
_ = grade("03-1", exercise_1)

# %% [markdown]
# ### 03-2 Predict the work of a step
#
# A network has two layers without bias: `x → linear → max(·, 0) → linear`. Its input
# needs no gradient. A gradient that nobody needs is not computed. Whether one is needed
# depends on what is trained before it.
#
# Given:
#
# - `sizes`, three ints: the widths of input, middle and output;
# - `tokens` and `r`, ints: the rows of x, and the rank of a bypass;
# - `how`, a pair, one for each layer: "full" (its weight is trained), "lora" (frozen,
#   with a trained bypass), or "frozen". Not both are "frozen".
#
# Return the multiply-adds of all matrix products of one step, forward and backward, as
# an int.
#
# Checked: all eight pairs, at small random sizes against `flops.counting()`, and at
# sizes above a million.
#
# Hint: where is $\bar x$ needed?


# %% tags=["exercise"]
def exercise_2(sizes, tokens, how, r):
    """The multiply-adds of one training step, forward and backward."""
    # BEGIN SOLUTION
    total, below = 0, False
    for n, m, kind in zip(sizes[:-1], sizes[1:], how, strict=True):
        total += n * m * (1 + below + (kind == "full"))  # forward; x̄ if something below is trained; W̄
        if kind == "lora":
            total += r * (n + m) + r * (n + m) + r * m + r * n * below  # forward; Ā and B̄; through B to Ā; on to x̄
        below = below or kind != "frozen"
    return tokens * total
    # END SOLUTION


# %%
_ = grade("03-2", exercise_2)

# %% [markdown]
# ## Summary
#
# - The gradients of $A$ and $B$ are $s\,G$ times the other factor, and the backward pass
#   never forms $G$. With $B=0$ the output is the base's, and only $B$ moves:
#   `tinylora/lora.py`, `tests/test_lora.py`.
# - LoRA saves the gradients and Adam's moments, $12N^2$ bytes that become $24Nr$. It
#   does not save the tape: `tinylora/tape.py`, `tests/test_tensor.py`.
# - LoRA saves at most a third of the multiply-adds: `tinylora/costs/flops.py`,
#   `tests/test_flops.py`.
