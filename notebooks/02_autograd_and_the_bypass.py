# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 02 · A small autograd and the bypass
#
# **LoRA puts two small matrices beside a frozen one and trains only them. Everything that follows from this, what is saved and
# what is not, can be read off the backward pass.** This notebook writes a reverse-mode autograd in about twenty lines, derives
# LoRA's gradients with it, and counts bytes and multiplications.
#
# Accompanies LoRA (arXiv 2106.09685) §2, equations 1 and 2, and §4.1, equation 3; and "LoRA Without Regret" (Thinking Machines
# Lab 2025) on FLOPs. Three questions that readers have asked are settled on the way: why gradients accumulate, and why in a
# certain order (micrograd issues 2, 53 and 68; section 3); whether A and B are swapped (LoRA issues 42, 98, 121, 142; section
# 6); why LoRA is not faster (LoRA issue 24, peft 2063, bitsandbytes 605; section 8).
#
# Hours: 4 (2 to read and run, 2 for the exercises). Prerequisites: NumPy; matrix products and their derivatives; the chain
# rule; what a Python closure is. No other notebook.
#
# Code that only measures, checks or draws is folded where the editor can fold it; its output is not.

# %% tags=["setup"]
import itertools

import numpy as np
from drawings.nb02 import bypass_costs
from grading import grade

import tinylora as tl
from tinylora import ops
from tinylora.adapters.kinds import LoRAEmbedding
from tinylora.costs import flops, parameters
from tinylora.nn import Embedding, Linear

clock = itertools.count()  # 0, 1, 2, …: the age of a value

# %% [markdown]
# ## 1. An operation and its pullbacks
#
# Write $\bar y = ∂L/∂y$ for the gradient of the loss $L$ with respect to a value $y$; it has the shape of $y$. If $y = f(x)$,
# then $\bar x = J^{\top} \bar y$, where $J$ is the Jacobian of $f$. The map from $\bar y$ to $\bar x$ is the *pullback* of $f$.
# $J$ itself is never needed. For a linear layer, with one token a row of $x$,
#
# $$y = x W^{\top},\qquad dL = \langle \bar y, dy\rangle = \langle \bar y, dx\,W^{\top} + x\,dW^{\top}\rangle
# \quad\Longrightarrow\quad \bar x = \bar y\,W,\qquad \bar W = \bar y^{\top} x .$$
#
# The paper has tokens as columns, $h = W_0 x$; the layers of tinylora, PEFT and torch have them as rows. $W$ is (out × in) in
# both.
#
# A value remembers its parents and, for each, the pullback that leads to it. Only parents that need a gradient are kept
# (`wanted`). The pullback of another is dropped, together with everything that it captured.


# %%
class Value:
    def __init__(self, data, *pairs, wanted=False):
        self.data, self.grad, self.born = data, 0.0, next(clock)
        self.parents = [(x, pull) for x, pull in pairs if x.wanted]
        self.wanted = wanted or len(self.parents) > 0


def linear(x, w):
    X, W = x.data, w.data
    return Value(X @ W.T, (x, lambda g: g @ W), (w, lambda g: g.T @ X))


# %% [markdown]
# Three more operations, each with its pullbacks beside it: $z = x + y$ has $\bar x = \bar y = \bar z$; $z = s\,x$ has $\bar x =
# s\,\bar z$; $z = \max(x, 0)$ has $\bar x = \bar z$ where $x > 0$, and 0 elsewhere.


# %%
def add(x, y):
    return Value(x.data + y.data, (x, lambda g: g), (y, lambda g: g))


def scale(x, s):
    return Value(x.data * s, (x, lambda g: g * s))


def relu(x):
    on = x.data > 0
    return Value(x.data * on, (x, lambda g: g * on))


# %% [markdown]
# ## 2. The walk
#
# Backward, from the last value to the first: take the youngest value that waits, hand its gradient to its parents, *add* what
# they receive to what they have. An operation is always younger than its inputs. So whoever could still contribute to a value's
# gradient is younger than the value, and has had its turn.


# %%
def backward(y, g):
    y.grad, waiting = g, {y}
    while waiting:
        y = max(waiting, key=lambda v: v.born)
        waiting.remove(y)
        for x, pull in y.parents:
            x.grad = x.grad + pull(y.grad)
            waiting.add(x)


# %% [markdown]
# That is all. A small network, $y = h + W_2\max(h, 0)$ with $h = W_1 x$, uses $h$ twice. Its output and its gradients must
# equal tinylora's in every entry (the products are the same, in the same order), and central differences to 1e-7:

# %% tags=["hide-input"]
rng = np.random.default_rng(0)
x0, v1, v2, g0 = (rng.standard_normal(shape) for shape in ((6, 5), (7, 5), (7, 7), (6, 7)))


def network(x, w1, w2):
    h = linear(x, w1)
    return add(h, linear(relu(h), w2))


mine = [Value(a, wanted=True) for a in (x0, v1, v2)]
backward(y := network(*mine), g0)
theirs = [tl.Tensor(a, requires_grad=True) for a in (x0, v1, v2)]
h = ops.linear(theirs[0], theirs[1])
(out := h + ops.linear(ops.relu(h), theirs[2])).backward(g0)
assert (y.data == out.data).all()
for name, a, b in zip(("x", "W1", "W2"), mine, theirs, strict=True):
    direction, ε = rng.standard_normal(a.data.shape), 1e-6

    def loss(step, a=a, direction=direction):
        moved = [Value(v.data + (step * direction if v is a else 0)) for v in mine]
        return (network(*moved).data * g0).sum()

    numeric, exact = (loss(ε) - loss(-ε)) / (2 * ε), (a.grad * direction).sum()
    error = abs(numeric / exact - 1)
    print(
        f"{name:2}: entries that differ from tinylora's: {(a.grad != b.grad).sum()}; central differences: {error:.0e}"
    )
    assert (a.grad == b.grad).all() and error < 1e-7

# %% [markdown]
# The set of surviving pullbacks is called the tape. What they captured is the memory that a backward pass costs. `held` below
# adds up the arrays in the closures; for the same network `tl.tape_bytes` must find the same number. With all three wanted
# these are $x$ and $\max(h, 0)$ for the weights' pullbacks, the mask $h > 0$, and the weights.


# %% tags=["hide-input"]
def held(y):
    arrays, waiting, seen = {}, [y], set()
    while waiting:
        y = waiting.pop()
        for x, pull in y.parents if y not in seen else ():
            cells = [c.cell_contents for c in pull.__closure__ or ()]
            arrays |= {id(a): a.nbytes for a in cells if isinstance(a, np.ndarray)}
            waiting.append(x)
        seen.add(y)
    return sum(arrays.values())


for needs in ((True, True, True), (False, True, True), (False, False, True), (True, False, False)):
    y = network(*(Value(a, wanted=n) for a, n in zip((x0, v1, v2), needs, strict=True)))
    t = [tl.Tensor(a, requires_grad=n) for a, n in zip((x0, v1, v2), needs, strict=True)]
    h = ops.linear(t[0], t[1])
    print(f"gradients for x, W1, W2: {needs!s:21} tape {held(y):4} bytes")
    assert held(y) == tl.tape_bytes(h + ops.linear(ops.relu(h), t[2]))
    if needs == (True, True, True):
        assert held(y) == 8 * (x0.size + v1.size + v2.size + 6 * 7) + 6 * 7
assert held(y) == 8 * (v1.size + v2.size) + 6 * 7  # for x alone: the weights and the mask

# %% [markdown]
# ## 3. Why accumulate, and why in that order
#
# The smallest case that shows both: `b = a + a; c = b + b`, so $c = 4a$ and $\bar a = 4$. Three recursive walks that one might
# write instead of `backward`:
#
# - *overwrite*: set the parent's gradient, then visit it;
# - *accumulate, then visit at once*: add to the parent's gradient, and pass the sum on, although more may still come;
# - *one path at a time*: add to the parent's gradient, and pass on only what has just come.
#
# The same for a chain of $n$ doublings, where $\bar a = 2^n$, with the number of pullbacks called:


# %% tags=["hide-input"]
def doublings(n):
    a = y = Value(1.0, wanted=True)
    for _ in range(n):
        y = add(y, y)
    return a, y


def recursive(y, g, way):
    """Returns the number of pullbacks called."""
    y.grad, calls = g if way == "overwrite" else y.grad + g, 0
    for x, pull in y.parents:
        calls += 1 + recursive(x, pull(g if way == "one path at a time" else y.grad), way)
    return calls


found = {}
for n in (2, 3, 10):
    a, y = doublings(n)
    backward(y, 1.0)
    assert a.grad == 2**n
    print(f"{n:2} doublings, {'the walk of section 2':31} gradient {a.grad:18,.0f}, pullbacks called {2 * n:5,}")
    for way in ("overwrite", "accumulate, then visit at once", "one path at a time"):
        a, y = doublings(n)
        calls = recursive(y, 1.0, way)
        found[n, way] = (a.grad, calls)
        print(f"{n:2} doublings, {way:31} gradient {a.grad:18,.0f}, pullbacks called {calls:5,}")
    assert found[n, "overwrite"] == (1, 2 ** (n + 1) - 2)
    assert found[n, "one path at a time"] == (2**n, 2 ** (n + 1) - 2)
assert [found[n, "accumulate, then visit at once"][0] for n in (2, 3)] == [6, 26]
assert [2 * 10, found[10, "one path at a time"][1]] == [20, 2046]

# %% [markdown]
# Overwriting gives 1. Accumulating and going on at once gives 6: the first visit of $b$ passes 1 on twice, the second passes
# the sum 2 on twice. With one path at a time the number is right and the price exponential, 2,046 pullbacks for ten doublings
# where 20 do. So: accumulate, and visit a value only after all that came from it. The age is one way to know that; exercise 3
# finds another. And a loop instead of a recursion does not end at Python's stack.
#
# ## 4. What LoRA trains
#
# Full fine-tuning starts at the pretrained weights $Φ_0$ and moves all of them (LoRA §2, equation 1); LoRA optimizes an update
# that is encoded by far fewer parameters $Θ$ (equation 2):
#
# $$\max_Φ \sum_{(x,y)} \sum_t \log P_Φ(y_t \mid x, y_{<t}) \quad(1)\qquad\qquad
# \max_Θ \sum_{(x,y)} \sum_t \log p_{Φ_0 + ΔΦ(Θ)}(y_t \mid x, y_{<t}) \quad(2)$$
#
# The sum is over the *targets* $y$; tokens of the prompt $x$ are read and not learned. In code that is a mask. "As small as
# 0.01 %" of $|Φ_0|$ is $r = 4$ on the query and value matrices of GPT-3, 96 layers of width 12,288:

# %% tags=["hide-input"]
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
# ## 5. The bypass and its gradients
#
# $Θ$ consists of two factors for each adapted matrix (§4.1, equation 3, with the scale that the text adds):
#
# $$h = W_0 x + ΔW x = W_0 x + s\,B A\,x,\qquad s = \frac{α}{r},\qquad r ≪ \min(\text{in}, \text{out}),$$
#
# with $A$ (r × in) and $B$ (out × r).
#
# With the operations above it is one line. $B A$ is never formed.


# %%
def bypass(x, w0, a, b, s):
    return add(linear(x, w0), scale(linear(linear(x, a), b), s))


# %% [markdown]
# Its pullbacks follow from those of `linear`. Call $g = \bar h$, and $u = g B$, the gradient behind $B$ without the scale
# (tokens as rows):
#
# $$\bar A = s\,u^{\top} x,\qquad \bar B = s\,g^{\top} (x A^{\top}),\qquad \bar x = g\,W_0 + s\,u\,A .$$
#
# With the gradient of the dense weight, $G = g^{\top} x$, which full fine-tuning would need, these are
#
# $$\frac{∂L}{∂A} = s\,B^{\top} G,\qquad \frac{∂L}{∂B} = s\,G A^{\top}.$$
#
# But $G$ (out × in) is never formed: $B^{\top}(g^{\top} x)$ is computed as $(g B)^{\top} x$. Below, output and gradients of the
# one line against `tl.LoRALinear`, in every entry; against the formulas with $G$ in float64; and the shapes of all the products
# that the library makes.

# %% tags=["hide-input"]
d_in, d_out, r, tokens = 48, 40, 4, 9
tl.seed(0)
layer = tl.LoRALinear(Linear(d_in, d_out), r=r, alpha=16)
layer.lora_B.weight.data = rng.standard_normal((d_out, r)).astype(np.float32)
arrays = [rng.standard_normal((tokens, d_in)).astype(np.float32)]
arrays += [part.weight.data for part in (layer.base_layer, layer.lora_A, layer.lora_B)]
g = rng.standard_normal((tokens, d_out)).astype(np.float32)
x, w0, a, b = (Value(array, wanted=i != 1) for i, array in enumerate(arrays))  # all but W0
backward(h := bypass(x, w0, a, b, layer.scaling), g)
xt = tl.Tensor(arrays[0], requires_grad=True)
with flops.counting() as count:
    (ht := layer(xt)).backward(g)
assert (h.data == ht.data).all() and (x.grad == xt.grad).all()
assert (a.grad == layer.lora_A.weight.grad).all() and (b.grad == layer.lora_B.weight.grad).all()
assert w0.grad == 0.0 and layer.base_layer.weight.grad is None

x64, w64, a64, b64, g64 = (array.astype(float) for array in (*arrays, g))
G, s = g64.T @ x64, layer.scaling
exact = {"A": (a, s * b64.T @ G), "B": (b, s * G @ a64.T), "x": (x, g64 @ (w64 + s * b64 @ a64))}
for name, (value, wanted) in exact.items():
    error = np.linalg.norm(value.grad - wanted) / np.linalg.norm(wanted)
    print(f"gradient of {name}: shape {value.grad.shape}, relative distance to the formula {error:.0e} (float32)")
    assert error < 1e-6
print("products:", *(f"{p.left}·{p.right}" for p in count.products))
results = [(p.left[0], p.right[-1]) for p in count.products]
assert len(results) == 8 and not {(d_out, d_in), (d_in, d_out)} & set(results)

# %% [markdown]
# ## 6. The first step, and which of the two is zero
#
# "We use a random Gaussian initialization for A and zero for B, so ΔW = BA is zero at the beginning of training" (§4.1). Two
# things follow. The output is the base's *bit for bit*, since what is added are zeros. And $∂L/∂A = s\,B^{\top} G = 0$: at the
# first step only $B$ moves.
#
# Would it work the other way round? The four possible starts, on one layer:

# %% tags=["hide-input"]
start = {
    "random": lambda shape: rng.standard_normal(shape).astype(np.float32),
    "0": lambda shape: np.zeros(shape, np.float32),
}
table = {}
for kind_a, kind_b in itertools.product(start, start):
    layer.lora_A.weight.data, layer.lora_B.weight.data = start[kind_a]((r, d_in)), start[kind_b]((d_out, r))
    layer.zero_grad()
    (h := layer(xt)).backward(g)
    same = h.data.tobytes() == layer.base_layer(xt).data.tobytes()
    moves = [bool(m.weight.grad.any()) for m in (layer.lora_A, layer.lora_B)]
    table[kind_a, kind_b] = (same, *moves)
    said = f"output {'is' if same else 'is not'} the base's; gradient of A {'≠' if moves[0] else '='} 0, of B {'≠' if moves[1] else '='} 0"
    print(f"A {kind_a:6}  B {kind_b:6}  {said}")
assert table["random", "0"] == (True, False, True) and table["0", "random"] == (True, True, False)
assert table["0", "0"] == (True, False, False) and table["random", "random"] == (False, True, True)

# %% [markdown]
# Either factor may be the zero one. Both may not: then neither ever has a gradient, and the layer stays as it is for good. Both
# random would change the model before the first step.
#
# So are A and B swapped? Four things get in each other's way:
#
# - $A$ acts first, though it is written last: $BAx = B(Ax)$. $A$ (r × in) reads the input, $B$ (out × r) writes to the output.
# - QLoRA writes rows: $Y = XW + s\,X L_1 L_2$ (its equation 3). $L_1 = A^{\top}$ and $L_2 = B^{\top}$, so there the first is
#   written first.
# - loralib's linear layer draws A and sets B to zero, as the paper says. In its repository the comment beside it says the
#   reverse; in the released version 0.1.2 that is right, and the comment on the embedding is not. Nor does it draw from a
#   Gaussian: `kaiming_uniform_(a=√5)` is uniform on $±1/\sqrt{\text{in}}$, with the variance $1/(3\,\text{in})$. PEFT does the
#   same by default.
# - loralib's and PEFT's *embedding* really has it the other way round: A is zero and B normal. There the first step moves A
#   alone.

# %% tags=["hide-input"]
A = tl.LoRALinear(Linear(300, 4), r=200).lora_A.weight.data
kurtosis = (A**4).mean() / (A**2).mean() ** 2
print(
    f"A, in = 300: largest {np.abs(A).max():.5f} (1/√300 = {300**-0.5:.5f}), variance {A.var() * 900:.3f} / 900, kurtosis {kurtosis:.2f}"
)
assert np.abs(A).max() <= 300**-0.5 and abs(A.var() * 900 - 1) < 0.02 and abs(kurtosis - 1.8) < 0.05  # a Gaussian: 3
ids = rng.integers(0, 30, 12)
for made in (LoRAEmbedding(Embedding(30, 8), r=2), tl.interop.loralib.Embedding(30, 8, r=2)):
    made(ids).backward(rng.standard_normal((12, 8)).astype(np.float32))
    ours = made.lora_A.weight if hasattr(made.lora_A, "weight") else made.lora_A
    other = made.lora_B.weight if hasattr(made.lora_B, "weight") else made.lora_B
    assert not ours.data.any() and ours.grad.any() and other.data.any() and not other.grad.any()
print("embedding: A = 0 and has a gradient, B is random and has none")
L1, L2 = a64.T, b64.T
assert (
    np.abs((x64 @ w64.T + s * x64 @ L1 @ L2) - (w64 @ x64.T + s * b64 @ (a64 @ x64.T)).T).max() < 1e-12
)  # rows, columns

# %% [markdown]
# ## 7. What the tape holds
#
# A frozen $W_0$ has no pullback of its own, so nothing is kept *for it*. What does that save? In float32, for $T$ tokens, in =
# out = $N$, with an $x$ that needs a gradient, the weights themselves not counted:
#
# | layer | captured | bytes |
# |---|---|---|
# | full | $x$, for $\bar W$ | $4TN$ |
# | LoRA | $x$, for $\bar A$; $x A^{\top}$, for $\bar B$ | $4T(N + r)$ |
# | LoRA, A frozen | $x A^{\top}$ | $4Tr$ |
# | frozen, no bypass | nothing | 0 |
#
# An adapted layer holds *more* than a trained one: $\bar A$ needs $x$ just as $\bar W$ does. What LoRA does away with is the
# gradient and the two moments of Adam, $12 N^2$ bytes that become $24 N r$. Measured:

# %% tags=["hide-input"]
N, T, r = 256, 64, 8


def measured(layer):
    y = layer(tl.Tensor(rng.standard_normal((T, N)).astype(np.float32), requires_grad=True))
    tape = tl.tape_bytes(y, exclude=layer.parameters())
    trained = [p for _, p in layer.trainable()]
    if not trained:
        return tape, 0
    y.backward(rng.standard_normal((T, N)).astype(np.float32))
    return tape, sum(p.grad.nbytes for p in trained) + tl.AdamW(trained, lr=0.1).state_bytes


layers = {"full": Linear(N, N)} | {name: tl.LoRALinear(Linear(N, N), r=r) for name in ("LoRA", "LoRA, A frozen")}
layers["LoRA, A frozen"].lora_A.requires_grad_(False)
layers["frozen, no bypass"] = Linear(N, N).requires_grad_(False)
bytes_of = {name: measured(layer) for name, layer in layers.items()}
for name, (tape, rest) in bytes_of.items():
    print(f"{name:18} tape {tape:7,}   gradients and Adam {rest:7,}")
assert bytes_of["full"] == (4 * T * N, 12 * N * N) == (65_536, 786_432)
assert bytes_of["LoRA"] == (4 * T * (N + r), 24 * N * r) == (67_584, 49_152)
assert bytes_of["LoRA, A frozen"][0] == 4 * T * r == 2_048 and bytes_of["frozen, no bypass"] == (0, 0)

# %% [markdown]
# On the model that ships with tinylora (2 million weights, 2 × 256 bytes of text), for the whole network, with attention and
# norms:

# %% tags=["hide-input"]
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
assert [f"{trained[n] / trained['full']:.1%}" for n in ways] == ["100.0%", "6.7%", "1.3%"]

# %% [markdown]
# With a bypass everywhere the tape is 99.5 % of full fine-tuning's, and the gradients and moments 6.7 %. Leaving layers without
# a bypass brings the tape down to 77 %. So LoRA saves what goes with the *weights*; against what goes with the *tokens*,
# checkpointing helps (`tl.checkpoint`).
#
# ## 8. Why isn't LoRA faster?
#
# A product of (m × k) and (k × n) takes $mkn$ multiply-adds. For each token, in = out = $N$:
#
# | | forward | $\bar x$ | $\bar W$, or $\bar A$ and $\bar B$ | together |
# |---|---|---|---|---|
# | full | $N^2$ | $N^2$ | $N^2$ | $3N^2$ |
# | LoRA | $N^2 + 2Nr$ | $N^2 + 2Nr$ | $2Nr$ | $2N^2 + 6Nr$ |
#
# Only the product for $\bar W$ goes away, a third at the very most. $W_0 x$ has to be computed, and the gradient has to pass
# through $W_0$ to the layers below. The forward pass alone costs *more* than the base's, and from $r = N/6$ on so is the whole
# step. `flops.counting()` watches the products that the engine makes; the last column is not a formula:

# %% tags=["hide-input"]
for n, r in ((96, 1), (96, 8), (96, 16), (96, 48)):
    layer = tl.LoRALinear(Linear(n, n), r=r)
    seen = []
    for one in (Linear(n, n), layer):
        with flops.counting() as count:
            one(tl.Tensor(np.ones((5, n), np.float32), requires_grad=True)).backward(np.ones((5, n), np.float32))
        seen.append(count.multiply_adds // 5)
    print(f"N = {n}, r = {r:2}: full {seen[0]:,} a token, LoRA {seen[1]:,}; ratio {seen[1] / seen[0]:.4f}")
    assert seen == [flops.full(n), flops.lora(n, r)] == [3 * n * n, 2 * n * n + 6 * n * r]
assert flops.lora(96, 16) == flops.full(96)  # r = N/6
ratios = {r: flops.lora(4096, r) / flops.full(4096) for r in (16, 64, 256)}
print("N = 4096:", *(f"r = {r} {ratio:.4f}" for r, ratio in ratios.items()))
assert [round(ratio, 4) for ratio in ratios.values()] == [0.6745, 0.6979, 0.7917]
print("base model, a step:", *(f"{name} {adds[name] / adds['full']:.3f}" for name in ways))
assert [f"{adds[n] / adds['full']:.3f}" for n in ways] == ["1.000", "0.757", "0.706"]

# %% [markdown]
# At $N = 4096$ the ratio is .67 to .79 for ranks 16 to 256. On the small base model, where $r = 8$ is not small beside the
# widths, a step takes .757 (all layers) or .706 (q and v) of the multiply-adds.
#
# And a count is not yet a time. LoRA makes eight products where full fine-tuning makes three: it drops the one for $\bar W$ and
# adds six small ones (section 5: $xA^{\top}$, the product with $B$, $u$, $\bar A$, $\bar B$, $uA$), which do little work on
# much data. Suppose that every product reads its operands once and writes its result once, and count the numbers moved for $T =
# N = 1024$, $r = 8$:


# %% tags=["hide-input"]
def moved(products):
    return sum(np.prod(p.left) + np.prod(p.right) + p.left[0] * p.right[1] for p in products)


n, r, counts = 1024, 8, {}
for name, layer in (("full", Linear(n, n)), ("LoRA", tl.LoRALinear(Linear(n, n), r=r))):
    with flops.counting() as count:
        layer(tl.Tensor(np.ones((n, n), np.float32), requires_grad=True)).backward(np.ones((n, n), np.float32))
    counts[name] = (len(count.products), count.multiply_adds, moved(count.products))
    print(f"{name}: products {counts[name][0]}, multiply-adds {counts[name][1]:,}, numbers moved {counts[name][2]:,}")
small, large = ([p for p in count.products if (r in (*p.left, *p.right)) == is_small] for is_small in (True, False))
per_number = [sum(p.multiply_adds for p in products) / moved(products) for products in (small, large)]
print(
    f"multiply-adds for each number moved: the small products {per_number[0]:.1f}, the large ones {per_number[1]:.1f}"
)
work, traffic = (counts["LoRA"][i] / counts["full"][i] for i in (1, 2))
print(f"LoRA over full: multiply-adds {work:.3f}, numbers moved {traffic:.3f}")
assert (counts["full"][0], counts["LoRA"][0], len(small)) == (3, 8, 6)
assert [round(v, 1) for v in per_number] == [7.9, 341.3] and (round(work, 3), round(traffic, 3)) == (0.682, 1.344)

# %% [markdown]
# Two thirds of the multiply-adds, four thirds of the traffic. A small product does 8 multiply-adds for each number that it
# moves, a large one 341; where memory is the limit and not arithmetic, the small ones cost far more than their FLOPs. With a
# 4-bit base the weight is moreover dequantized twice in each step, once forward and once for $\bar x$, which no count of
# products shows:


# %% tags=["hide-input"]
class Watched:
    """A stored weight that counts how often it is dequantized."""

    def __init__(self, q):
        self.q, self.shape, self.dtype, self.times = q, q.shape, q.dtype, 0

    def dequantize(self, dtype):
        self.times += 1
        return self.q.dequantize(dtype)


stored = Watched(tl.quantize(rng.standard_normal((64, 128)).astype(np.float32)))
y = ops.linear_frozen(tl.Tensor(np.ones((3, 128), np.float32), requires_grad=True), stored)
y.backward(np.ones((3, 64), np.float32))
print(f"dequantized {stored.times} times in one forward and one backward pass")
assert stored.times == 2

# %% [markdown]
# The figure: multiply-adds against the rank, counted (marks) and by formula (lines), also for the forward pass alone and for a
# layer at the bottom of a model, whose input needs no gradient; and the bytes that one step holds beside the weights.

# %% tags=["hide-input"]
bypass_costs()

# %% [markdown]
# ## Where paper and code differ
#
# 1. **A is not Gaussian in the authors' code.** §4.1 and figure 1 draw it from $\mathcal N(0, σ^2)$; loralib, PEFT and tinylora
#    draw it uniformly, with the variance 1/(3 in) and the kurtosis 1.8 instead of 3 (section 6). PEFT and tinylora have
#    `init="gaussian"` as well.
# 2. **Equation 3 has no scale.** The text below it multiplies by α/r. QLoRA's equation 3 has the $s$, its equation 5 leaves it
#    out; its code has α = 16, r = 64 and so $s = 0.25$, and without it the bypass would be 4 times as strong.
# 3. **"25 % speedup"** (§4.2, its footnote 5: 32.5 against 43.1 tokens a second) is 24.6 % less *time*; in tokens a second it
#    is 32.6 % more. The count allows up to 33.3 % less time, if nothing but these products cost any.
# 4. **The embedding** of loralib and PEFT zeroes A and draws B. At its first step A has the gradient (section 6).
# 5. **Memory.** §4.2 explains the saving by the optimizer states, and rightly so: the tape of an adapted layer grows, here by
#    r/N = 3.1 % (section 7).

# %% tags=["hide-input"]
h = tl.LoRALinear(Linear(8, 8), r=64, alpha=16)
print(f"s = {h.scaling}; time {32.5 / 43.1 - 1:+.1%}, tokens a second {43.1 / 32.5 - 1:+.1%}")
assert 1 / h.scaling == 4 and (f"{1 - 32.5 / 43.1:.1%}", f"{43.1 / 32.5 - 1:.1%}") == ("24.6%", "32.6%")
assert round(1 - flops.lora(12288, 4) / flops.full(12288), 3) == 0.333
assert f"{bytes_of['LoRA'][0] / bytes_of['full'][0] - 1:.1%}" == "3.1%"
gaussian = tl.LoRALinear(Linear(300, 4), r=200, init="gaussian").lora_A.weight.data
assert abs((gaussian**4).mean() / (gaussian**2).mean() ** 2 - 3) < 0.15

# %% [markdown]
# ## Exercises
#
# For grading only the setup cell and the exercise cells are run: put helpers inside the exercise's cell.
#
# ### 02-1 The bypass as one operation
#
# An engine that knows the bypass as a single operation can share work between its pullbacks.


# %% tags=["exercise"]
def exercise_1(x, W0, A, B, s, g):
    """The pullbacks of h = x W0ᵀ + s (x Aᵀ) Bᵀ. Return (x̄, Ā, B̄) for ḡ = g.

    x   (tokens, in) float64     W0  (out, in)     A  (r, in)     B  (out, r)     s  a float     g  (tokens, out)

    Checked: central differences on fresh inputs to 1e-6, with in ≠ out, with one token, and with B = 0; that no argument is changed;
    and that nothing as large as W0 is formed on the way (neither G nor W0 + s B A), by the memory that the call takes.
    """
    # BEGIN SOLUTION
    u = s * (g @ B)  # (tokens, r): shared by x̄ and Ā
    return g @ W0 + u @ A, u.T @ x, s * (g.T @ (x @ A.T))
    # END SOLUTION


# %%
_ = grade("02-1", exercise_1)

# %% [markdown]
# ### 02-2 Predict the work of a step
#
# Section 8 had one layer whose input needs a gradient. In a network of two layers, who needs what depends on what is trained
# below.


# %% tags=["exercise"]
def exercise_2(sizes, tokens, how, r):
    """Return the multiply-adds of all matrix products in one training step, forward and backward, of the network

        tokens × sizes[0]  → linear →  tokens × sizes[1]  → max(·, 0) →  linear  →  tokens × sizes[2]

    sizes  three ints      tokens  an int      r  the rank of a bypass
    how    a pair, for the first and the second layer: "full" (its weight is trained), "lora" (frozen, with a bypass of rank r whose A and B
           are trained), or "frozen" (frozen, without a bypass). Not both are "frozen".

    The network's input needs no gradient. The engine works as in sections 1 and 2: a pullback whose result nobody needs is not called.
    Checked: an int, equal to what flops.counting() counts, for all eight pairs and random sizes.
    """
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
_ = grade("02-2", exercise_2)

# %% [markdown]
# ### 02-3 Repair a backward that counts twice
#
# The values of some other engine carry no age. Its backward is the second walk of section 3:
#
#     def visit(y, total):
#         for x, pull in y.parents:
#             total[x] = total.get(x, 0.0) + pull(total[y])
#             visit(x, total)


# %% tags=["exercise"]
def exercise_3(root, g):
    """Return {value: gradient} for the root and every value below it, for the gradient g of the root.

    A value has one attribute, `parents`: a list of pairs (parent, pullback), empty for a leaf. A parent may stand in it more than once.
    Values can be keys of a dict. There is no order of creation. When is a value's gradient complete?

    Checked: b = a + a; c = b + b; random graphs; a chain of 5,000 operations, deeper than Python's stack; that no pullback is called more
    than once; and that nothing of the graph is changed.
    """
    # BEGIN SOLUTION
    uses, reached = {root: 0}, [root]
    for y in reached:  # the list grows while it is walked
        for x, _ in y.parents:
            if x not in uses:
                reached.append(x)
            uses[x] = uses.get(x, 0) + 1
    grad, ready = {root: g}, [root]
    while ready:
        y = ready.pop()
        for x, pull in y.parents:
            grad[x] = grad.get(x, 0.0) + pull(grad[y])
            uses[x] -= 1
            if uses[x] == 0:  # everything that used x has had its turn
                ready.append(x)
    return grad
    # END SOLUTION


# %%
_ = grade("02-3", exercise_3)

# %% [markdown]
# ## Summary
#
# - A tape autograd is a forward equation with its pullbacks beside it, kept only where a gradient is wanted, and a walk from
#   the youngest to the oldest that adds. `tinylora/tensor.py` does just that; `tests/test_ops.py` holds every pullback against
#   central differences.
# - $∂L/∂A = s B^{\top} G$ and $∂L/∂B = s G A^{\top}$, without $G$. With $B = 0$ the output is the base's bit for bit and A has
#   no gradient: `tests/test_lora.py`. Either factor may be the zero one, not both.
# - LoRA saves the gradients and Adam's moments ($12N^2 → 24Nr$ bytes), not the tape (× (1 + r/N) in an adapted layer):
#   `tl.tape_bytes`.
# - It saves a third of the multiply-adds at most ($2N^2 + 6Nr$ against $3N^2$) and moves more numbers: `tinylora.costs.flops`,
#   `tests/test_flops.py`.
# - Next: notebook 10, what merging the bypass does to $W_0$.
