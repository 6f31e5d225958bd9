"""The operations: a forward equation, and beside it one pullback for each argument.

ḡ is the gradient of the loss with respect to the output, and x̄ the one with respect to the input x. A pullback maps ḡ to
x̄. Where arguments share the work (normalization, attention), one function returns all of their gradients. The engine
undoes broadcasting, so every rule is written as if the shapes matched.

Three operations are the papers' own:

    softmax_cross_entropy    L = −Σ m log p(target) / Σ m: what LoRA eq. 1 maximizes, as a mean and with its sign changed.
                             The mask m is 1 for the tokens of the answer and 0 for those of the prompt
    linear                   y = x Wᵀ + b;   x̄ = ḡ W,   W̄ = ḡᵀ x
    linear_frozen            y = x Ŵᵀ + b with Ŵ = dequantize(q);   x̄ = ḡ Ŵ, and no W̄         (QLoRA eq. 5 without its adapter)

The pullback of `linear_frozen` captures the 4-bit q and never Ŵ. The dense weight is rebuilt for the backward pass, in
memory that the next layer uses again.

Shapes: the last axis is the feature axis, as in torch. float32 in gives float32 out.

Differs from torch.nn.functional: there is no autocast, no in-place version, and no integer tensor (token ids, masks and
indices are plain arrays).

Leaves out: convolutions (`adapters.conv`), and most operations that a Llama does not need. `_attend` is attention's equation;
`causal_attention` runs it on blocks of queries (`kernels.attention`). The functions `sum` and `max` hide Python's in this file.
"""

import math

import numpy as np

from . import backend
from .backend import array_module, rowdot
from .kernels import device
from .kernels.attention import in_blocks, unseen
from .kernels.dequantize import for_product
from .kernels.products import product, rounded
from .kernels.scatter import scatter_add
from .tensor import Tensor, primitive


# ---------------------------------------------------------------------------------------------------------------- arithmetic
@primitive
def add(x, y):
    "z = x + y;   x̄ = ḡ,   ȳ = ḡ"
    return x + y, (lambda g: g,
                   lambda g: g)


@primitive
def sub(x, y):
    "z = x − y;   x̄ = ḡ,   ȳ = −ḡ"
    return x - y, (lambda g: g,
                   lambda g: -g)


@primitive
def mul(x, y):
    "z = x y;   x̄ = ḡ y,   ȳ = ḡ x"
    return x * y, (lambda g: g * y,
                   lambda g: g * x)


@primitive
def div(x, y):
    "z = x / y;   x̄ = ḡ / y,   ȳ = −ḡ z / y"
    z = x / y
    return z, (lambda g: g / y,
               lambda g: -g * z / y)


@primitive
def neg(x):
    "z = −x;   x̄ = −ḡ"
    return -x, (lambda g: -g,)


@primitive
def power(x, n):
    "z = xⁿ for a number n;   x̄ = ḡ n xⁿ⁻¹, and 0 for n = 0, also where x = 0.   (x * x * x is many times faster than x ** 3)"
    if backend.is_array(n):
        raise TypeError("power: the exponent is a Tensor or an array, expected a number; write exp(n * log(x)) for xⁿ with such an n")
    return x**n, (lambda g: g * (n * x ** (n - 1)) if n else 0 * g,)


@primitive
def exp(x):
    "y = eˣ;   x̄ = ḡ y"
    y = array_module(x).exp(x)
    return y, (lambda g: g * y,)


@primitive
def log(x):
    "y = ln x;   x̄ = ḡ / x"
    return array_module(x).log(x), (lambda g: g / x,)


@primitive
def tanh(x):
    "y = tanh x;   x̄ = ḡ (1 − y²)"
    y = array_module(x).tanh(x)
    return y, (lambda g: g * (1 - y * y),)


@primitive
def sqrt(x):
    "y = √x;   x̄ = ḡ / 2y"
    y = array_module(x).sqrt(x)
    return y, (lambda g: g / (2 * y),)


# ---------------------------------------------------------------------------------------------------------------- reductions
def _kept(shape, axis):
    """The shape of a reduction over axis that keeps the reduced axes, as length 1: it broadcasts against the input."""
    n = len(shape) or 1
    axes = range(n) if axis is None else {a % n for a in (axis if isinstance(axis, tuple) else (axis,))}
    return tuple(1 if i in axes else length for i, length in enumerate(shape))


@primitive
def sum(x, axis=None, keepdims=False):
    "y = Σ x over axis;   x̄ = ḡ, stretched back"
    xp, shape, kept = array_module(x), x.shape, _kept(x.shape, axis)
    return x.sum(axis=axis, keepdims=keepdims), (lambda g: xp.broadcast_to(g.reshape(kept), shape),)


@primitive
def mean(x, axis=None, keepdims=False):
    "y = (1/n) Σ x over axis;   x̄ = ḡ / n, stretched back"
    xp, shape, kept = array_module(x), x.shape, _kept(x.shape, axis)
    n = math.prod(shape) // math.prod(kept) if math.prod(kept) else 1
    return x.mean(axis=axis, keepdims=keepdims), (lambda g: xp.broadcast_to(g.reshape(kept) / n, shape),)


@primitive
def max(x, axis=None, keepdims=False):
    "y = max x over axis;   x̄ = ḡ where x = y; entries that tie share it evenly"
    hit, kept = x == x.max(axis=axis, keepdims=True), _kept(x.shape, axis)
    share = hit / hit.sum(axis=axis, keepdims=True).astype(x.dtype)
    return x.max(axis=axis, keepdims=keepdims), (lambda g: g.reshape(kept) * share,)


# --------------------------------------------------------------------------------------------------------------------- shapes
@primitive
def reshape(x, shape):
    "y = x in another shape;   x̄ = ḡ in x's shape"
    before = x.shape
    return x.reshape(shape), (lambda g: g.reshape(before),)


@primitive
def transpose(x, axes=None):
    "y = x with its axes permuted (reversed by default);   x̄ = ḡ with the inverse permutation"
    if axes is not None and len(axes) != x.ndim:
        raise ValueError(f"transpose: axes {axes} for an array of {x.ndim} axes; give all of them, or swap two with swapaxes")
    inverse = None if axes is None else tuple(int(i) for i in np.argsort([a % x.ndim for a in axes]))
    return x.transpose(axes), (lambda g: g.transpose(inverse),)


@primitive
def swapaxes(x, i, j):
    "y = x with axes i and j exchanged;   x̄ = ḡ with them exchanged back"
    return x.swapaxes(i, j), (lambda g: g.swapaxes(i, j),)


@primitive
def index(x, key):
    "y = x[key];   x̄ = 0 with x̄[key] += ḡ (an element picked twice receives twice)"
    xp, shape, dtype = array_module(x), x.shape, x.dtype

    def pull(g):
        out = xp.zeros(shape, dtype=dtype)
        if _is_basic(key):
            out[key] = g  # a basic key picks no element twice
        else:
            xp.add.at(out, key, g)
        return out

    return x[key], (pull,)


def _is_basic(key):
    """Whether a key is made of whole numbers and slices, which pick no element twice."""
    return all(k is None or k is Ellipsis or isinstance(k, (int, slice)) for k in (key if isinstance(key, tuple) else (key,)))


@primitive
def _concatenate(*xs, axis):
    xp = array_module(xs[0])
    ends = np.cumsum([x.shape[axis] for x in xs]).tolist()
    before = (slice(None),) * (axis % xs[0].ndim)
    parts = [(*before, slice(start, end)) for start, end in zip([0, *ends], ends, strict=False)]
    return xp.concatenate(xs, axis=axis), tuple(lambda g, part=part: g[part] for part in parts)


def concatenate(xs, axis=0):
    "y = [x₁ | x₂ | …] along axis;   x̄ᵢ = the i-th part of ḡ"
    return _concatenate(*xs, axis=axis)


# ----------------------------------------------------------------------------------------------------------- matrix products
@primitive
def matmul(x, w):
    "y = x w (batched over leading axes);   x̄ = ḡ wᵀ,   w̄ = xᵀ ḡ"
    if x.ndim < 2 or w.ndim < 2 or x.shape[-1] != w.shape[-2]:
        raise ValueError(f"matmul: x is {x.shape} and w is {w.shape}; both need two axes or more, and x's last must equal "
                         "w's second to last")
    return x @ w, (lambda g: g @ w.swapaxes(-1, -2),
                   lambda g: x.swapaxes(-1, -2) @ g)


def _rows(x):
    """x (..., d) as a matrix (rows, d); a view where memory allows."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _check_linear(x, shape):
    if len(shape) != 2 or x.ndim < 1 or x.shape[-1] != shape[1]:
        raise ValueError(f"linear: x has {x.shape[-1] if x.ndim else 0} features, w expects {shape[-1]} "
                         f"(x is {x.shape}, w is (out, in) = {tuple(shape)})")


@primitive
def linear(x, w, b=None, compute_dtype="float32"):
    """y = x wᵀ + b;   x̄ = ḡ w,   w̄ = ḡᵀ x,   b̄ = Σ ḡ over rows.   x (..., in), w (out, in), b (out,)

    compute_dtype: "float32", or "bfloat16" or "float16", of every product (see kernels.products).
    """
    _check_linear(x, w.shape)
    lead, rows = x.shape[:-1], _rows(x)
    y = product(rows, w.T, compute_dtype, b)
    return y.reshape(*lead, len(w)), (lambda g: product(_rows(g), w, compute_dtype).reshape(*lead, w.shape[1]),
                                      lambda g: product(_rows(g).T, rows, compute_dtype),
                                      lambda g: rounded(_rows(rounded(g, compute_dtype)).sum(0), compute_dtype))


@primitive
def linear_frozen(x, q, b=None, compute_dtype="float32", backward_weight="stored"):
    """y = x Ŵᵀ + b, Ŵ = dequantize(q);   x̄ = ḡ Ŵ,   b̄ = Σ ḡ over rows.   QLoRA eq. 5 without the adapter.

    x (..., in); q any stored weight with `shape` (out, in), `dtype` and `dequantize(dtype)`; b (out,). There is no pullback for Ŵ. The
    one for x captures q, and neither Ŵ nor x: the dense weight is rebuilt for the backward pass, in memory that the next one uses.

    compute_dtype     "float32", or "bfloat16" or "float16": x, Ŵ, b, then y, and the gradients are rounded to it around float32 sums
    backward_weight   "stored": in the backward pass Ŵ is first rounded to the weight's original dtype, as bitsandbytes does. Where that
                      dtype is bfloat16 and the compute dtype float32, forward and backward use two different weights.
                      "forward": the backward pass uses the forward's Ŵ, so that x̄ is the exact gradient
    """
    _check_linear(x, q.shape)
    lead, first = x.shape[:-1], compute_dtype if backward_weight == "forward" or q.dtype == "float32" else q.dtype
    y = product(_rows(x), for_product(q, compute_dtype).T, compute_dtype, b)
    return y.reshape(*lead, q.shape[0]), (lambda g: product(_rows(g), for_product(q, first), compute_dtype).reshape(*lead, q.shape[1]),
                                          None,
                                          lambda g: rounded(_rows(rounded(g, compute_dtype)).sum(0), compute_dtype))


def check_ids(ids, n):
    """Raise TypeError or IndexError unless ids are integers from 0 to n − 1."""
    if ids.dtype.kind not in "iu":
        raise TypeError(f"embedding: ids must be integers, got {ids.dtype}")
    if ids.size and (int(ids.max()) >= n or int(ids.min()) < 0):
        raise IndexError(f"embedding: ids run from {int(ids.min())} to {int(ids.max())}, the table has rows 0 to {n - 1}")


@primitive
def embedding(ids, w):
    "y = w[ids];   w̄[ids[i]] += ḡ[i].   ids (...) integers, w (n, d) -> y (..., d)"
    check_ids(ids, n := len(w))
    return w[ids], (None, lambda g: scatter_add(_rows(g), ids.reshape(-1), n))


# ------------------------------------------------------------------------------------------------------- softmax and the loss
def _softmax(x):
    """eˣ / Σ eˣ along the last axis, shifted by the row's maximum so that nothing overflows."""
    if x.shape[-1] == 0:
        return x
    p = x - x.max(axis=-1, keepdims=True)
    array_module(p).exp(p, out=p)
    p /= p.sum(axis=-1, keepdims=True)
    return p


@primitive
def softmax(x):
    "p = eˣ / Σ eˣ along the last axis;   x̄ = p (ḡ − Σ ḡ p)"
    p = _softmax(x)
    return p, (lambda g: p * (g - rowdot(g, p)[..., None]),)


@primitive
def softmax_cross_entropy(z, targets, mask=None, reduction="mean"):
    """L = −Σᵢ mᵢ log softmax(zᵢ)[targetᵢ] / Σ mᵢ;   z̄ᵢ = (softmax(zᵢ) − onehot(targetᵢ)) mᵢ / Σ mᵢ.   LoRA eq. 1.

    z (..., n) logits, targets (...) integers below n, mask (...) of 0 and 1 (or weights): only the target tokens count,
    the prompt is masked out. reduction="sum" leaves out the division, so that micro-batches with different masks add up
    exactly. An all-zero mask gives 0. L is in nats.
    """
    xp, shape = array_module(z), z.shape
    for name, x in (("targets", targets), ("mask", mask)):
        if x is not None and x.shape != shape[:-1]:
            raise ValueError(f"softmax_cross_entropy: logits are {shape}, so {name} must be {shape[:-1]}, got {x.shape}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"softmax_cross_entropy: reduction {reduction!r} is unknown: expected 'mean' or 'sum'")
    t = targets.reshape(-1)
    if t.size and not 0 <= int(t.min()) <= int(t.max()) < shape[-1]:
        raise IndexError(f"softmax_cross_entropy: targets run from {int(t.min())} to {int(t.max())}, expected 0 to {shape[-1] - 1}; "
                         "leave tokens out with the mask")
    rows = xp.arange(len(t))
    weight = xp.ones(len(t), dtype=z.dtype) if mask is None else mask.reshape(-1).astype(z.dtype)
    if reduction == "mean":
        weight = weight / xp.maximum(weight.sum(), np.finfo(z.dtype).tiny)
    p = _rows(z - z.max(axis=-1, keepdims=True)) if z.size else _rows(z)
    chosen = p[rows, t]  # log softmax(z)[t] = chosen − log Σ eᵖ
    xp.exp(p, out=p)  # in place: with a vocabulary of 49,152 a copy of the logits of 256 positions is 50 MB
    total = p.sum(axis=-1)
    loss = (weight * (xp.log(total) - chosen)).sum()
    p /= total[:, None]

    def pull(g):
        gw = g * weight
        d = p * gw[:, None]
        d[rows, t] -= gw
        return d.reshape(shape)

    return loss, (pull,)


# ------------------------------------------------------------------------------------------------------------------ activations
@primitive
def relu(x):
    "y = max(x, 0);   x̄ = ḡ where x > 0"
    on = x > 0
    return x * on, (lambda g: g * on,)


def _sigmoid(x):
    """1 / (1 + e⁻ˣ), written as ½ (1 + tanh(x/2)): nothing overflows, in one transcendental pass."""
    xp = array_module(x)
    s = xp.asarray(x * 0.5)  # a 0-d product is a scalar, which cannot be written to
    xp.tanh(s, out=s)
    s *= 0.5
    s += 0.5
    return s


@primitive
def sigmoid(x):
    "s = 1 / (1 + e⁻ˣ);   x̄ = ḡ s (1 − s)"
    s = _sigmoid(x)
    return s, (lambda g: g * (s * (1 - s)),)


@primitive
def swiglu(a, b):
    "z = y b, y = a s, s = sigmoid(a);   ā = ḡ b (s + y (1 − s)),   b̄ = ḡ y.   SiLU of a, times b (Shazeer 2020)."
    s = _sigmoid(a)
    y = a * s
    return y * b, (lambda g: (s + y * (1 - s)) * (g * b),
                   lambda g: g * y)


# ----------------------------------------------------------------------------------------------------------------- normalization
@primitive
def rms_norm(x, w, eps=1e-5):
    """y = w x̂, x̂ = x ρ, ρ = 1/√(mean(x²) + ε);   x̄ = ρ (h − x̂ mean(h x̂)) with h = ḡ w,   w̄ = Σ ḡ x̂ over rows.

    x (..., d), w (d,). Zhang & Sennrich 2019. Only x, w and one ρ a row are kept.
    """
    xp, d = array_module(x), x.shape[-1]
    rho = 1 / xp.sqrt(rowdot(x, x)[..., None] / d + eps)
    y = x * rho
    y *= w

    def pull(g, need):
        xhat = x * rho
        gw = _rows(g * xhat).sum(0) if need[1] else None
        if not need[0]:
            return None, gw
        h = g * w
        xhat *= rowdot(h, xhat)[..., None] / d
        h -= xhat
        h *= rho
        return h, gw

    return y, pull


# --------------------------------------------------------------------------------------------------------------------- attention
def rope_table(positions, head_dim, theta=10000.0, dtype=np.float32, frequency=None):
    """(cos, sin) of m θ^(−2i/d): position m, pair i of d/2. positions (t,) -> two arrays (t, d/2). RoFormer eq. 15.

    frequency: (d/2,) in the place of θ^(−2i/d), for positions that are scaled (see models.rope)
    """
    if frequency is None:
        frequency = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    angle = np.asarray(positions, dtype=np.float64)[:, None] * frequency
    return np.cos(angle).astype(dtype), np.sin(angle).astype(dtype)


def _rotate(x, cos, sin):
    """The pair (a, b) of x's halves turned by the angle: (a cos − b sin, b cos + a sin) = (b, a) (−sin, sin) + (a, b) (cos, cos)."""
    xp, half = array_module(x), x.shape[-1] // 2
    y = xp.empty_like(x)
    y[..., :half], y[..., half:] = x[..., half:], x[..., :half]
    y *= xp.concatenate([-sin, sin], axis=-1)
    y += x * xp.concatenate([cos, cos], axis=-1)
    return y


@primitive
def rope(x, cos, sin):
    """y = R x, R rotates the pair (x_i, x_{i+d/2}) by the angle of its position;   x̄ = Rᵀ ḡ.   RoFormer §3.2.

    x (..., t, heads, d), cos and sin (t, d/2) from `rope_table`. Pairs are the halves, as in Hugging Face's Llama; the
    paper, and GGUF files, pair neighbours (a permutation of the rows of W_q and W_k).
    """
    cos, sin = cos[:, None, :], sin[:, None, :]
    return _rotate(x, cos, sin), (lambda g: _rotate(g, cos, -sin),)


@primitive
def causal_attention(q, k, v, window=None, compute_dtype="float32"):
    """y = P v, P = softmax(mask(q kᵀ/√d));   v̄ = Pᵀ ḡ,  P̄ = ḡ vᵀ,  S̄ = P ∘ (P̄ − Σ P̄ ∘ P),  q̄ = S̄ k/√d,  k̄ = S̄ᵀ q/√d.

    ∘ is the elementwise product; all other products are of matrices.

    q (b, t, heads, d), k and v (b, s, kv_heads, d) with s ≥ t: query i sees the keys 0 … s − t + i. heads must be a
    multiple of kv_heads: query heads share a key head in groups (grouped-query attention, Ainslie et al. 2023). -> (b,
    t, heads, d). `_attend` is the equation; `in_blocks` runs it on 64 queries at a time, which never look at the keys after them.
    window: how many keys a query sees at the most, its own included (Mistral's sliding window); None for all. compute_dtype: that of the
    products (kernels.products), to which P is rounded too; the softmax is in float32.
    """
    (b, t, heads, d), (_, s, groups, _) = q.shape, k.shape
    if heads % groups or k.shape != v.shape or k.shape[0] != b or k.shape[3] != d or s < t:
        raise ValueError(f"causal_attention: q is (b, t, heads, d) = {q.shape}, k is {k.shape}, v is {v.shape}; k and v must be "
                         "(b, s, kv_heads, d) with s >= t and heads a multiple of kv_heads")
    return in_blocks(lambda *part: _attend(*part, compute_dtype), q, k, v, window)


def _attend(q, k, v, window=None, compute_dtype="float32"):
    """causal_attention in one piece."""
    (b, t, heads, d), (s, groups) = q.shape, k.shape[1:3]
    xp, m, scale, dtype = array_module(q), heads // groups, 1 / math.sqrt(d), compute_dtype

    def split(x):  # (b, t, heads, d) -> (b, groups, m t, d): the m query heads of a group stand on top of each other
        return x.reshape(b, t, groups, m, d).transpose(0, 2, 3, 1, 4).reshape(b, groups, m * t, d)

    def join(x):  # back to (b, t, heads, d)
        return x.reshape(b, groups, m, t, d).transpose(0, 3, 1, 2, 4).reshape(b, t, heads, d)

    q, k, v = split(q), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    scores = product(q * scale, k.swapaxes(-1, -2), dtype)  # (b, groups, m t, s)
    if t > 1:  # −∞ on every key that the query does not see
        scores.reshape(b, groups, m, t, s)[...] += unseen(xp, t, s, window, q.dtype)
    p = rounded(_softmax(scores), dtype)

    def pull(g, need):
        g = split(g)
        gv = product(p.swapaxes(-1, -2), g, dtype) if need[2] else None
        if not (need[0] or need[1]):
            return None, None, gv.transpose(0, 2, 1, 3)
        gs = product(g, v.swapaxes(-1, -2), dtype)  # P̄, and in place S̄
        gs -= rowdot(gs, p)[..., None]
        gs *= p
        gs *= scale
        return (join(product(gs, k, dtype)) if need[0] else None,
                product(gs.swapaxes(-1, -2), q, dtype).transpose(0, 2, 1, 3) if need[1] else None,
                None if gv is None else gv.transpose(0, 2, 1, 3))

    return join(product(p, v, dtype)), pull


@primitive
def _masked(x, keep, scale):
    "y = x m scale;   x̄ = ḡ m scale"
    return x * keep * scale, (lambda g: g * keep * scale,)


def dropout(x, p):
    """y = x m / (1 − p), m ~ Bernoulli(1 − p) from the current generator;   x̄ = ḡ m / (1 − p).   p = 0 returns x itself."""
    if not 0 <= p < 1:
        raise ValueError(f"dropout: p = {p}, expected 0 <= p < 1")
    if p == 0:
        return x
    keep = backend.uniform_like(x.data if isinstance(x, Tensor) else x) >= p
    return _masked(x, keep, 1 / (1 - p))


device.fuse(embedding, rms_norm, rope, swiglu, softmax_cross_entropy, causal_attention)  # on a GPU, a kernel or two stand for each


# ---------------------------------------------------------------------------------------- the operators and methods of a Tensor
def _several(operation):
    """A method that takes its numbers one by one or as one tuple, as NumPy's do: x.reshape(2, 3), x.transpose((1, 0))."""
    return lambda x, *numbers: operation(x, numbers[0] if len(numbers) == 1 and not isinstance(numbers[0], int) else numbers or None)


Tensor.__add__ = Tensor.__radd__ = add
Tensor.__sub__, Tensor.__rsub__ = sub, lambda x, y: sub(y, x)
Tensor.__mul__ = Tensor.__rmul__ = mul
Tensor.__truediv__, Tensor.__rtruediv__ = div, lambda x, y: div(y, x)
Tensor.__matmul__, Tensor.__rmatmul__ = matmul, lambda x, y: matmul(y, x)
Tensor.__neg__, Tensor.__pow__, Tensor.__getitem__ = neg, power, index
Tensor.reshape, Tensor.transpose, Tensor.swapaxes = _several(reshape), _several(transpose), swapaxes
Tensor.sum, Tensor.mean, Tensor.max = sum, mean, max
Tensor.exp, Tensor.log, Tensor.tanh, Tensor.sqrt = exp, log, tanh, sqrt
Tensor.T = property(transpose)
