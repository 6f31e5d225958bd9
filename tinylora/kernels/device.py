"""The operations of `ops` and the steps of the optimizers as a GPU runs them, in one to four kernels instead of a dozen.

A function here has the arguments of the operation that it stands for, behind `plain`, the operation itself, to which it leaves whatever the
kernels do not know: other dtypes than float32, empty arrays, and arguments that are wrong, so that one place says what is wrong. It returns
what the operation returns: (output, pullbacks). The equations stand in `ops`, and over each kernel. What differs from `ops`:

    embedding, softmax_cross_entropy    an id or target that is out of range gives NaN: to raise an error the host would have to wait
    softmax_cross_entropy               keeps the logits, a maximum and a sum for each row, and not the probabilities
    causal_attention                    keeps all of its probabilities, those of hidden keys too, in the compute dtype
"""

import functools
import math

import numpy as np

from ..backend import array_module, move
from . import casts, cuda
from .attention import in_blocks
from .casts import multiplied_in, two_bytes
from .products import batched
from .scatter import scatter_add

f32, i32, i64 = np.float32, np.int32, np.int64
_SCORES = 1 << 29  # at a time; in 2 bytes each, 1 GB
_LARGE = 1 << 18  # numbers of a gradient that is worth a launch of its own


def compiles(*arrays):
    """Whether these are float32 arrays on a device that compiles kernels, and not empty."""
    xp = array_module(arrays[0])
    return xp is not np and cuda.available(xp) and all(a.dtype == f32 and a.size for a in arrays)


def _each(x):
    """(array module, x as float32 in one piece, an empty array like it)."""
    xp = array_module(x)
    x = xp.ascontiguousarray(x, dtype=f32)  # a gradient that somebody hands in may be float64
    return xp, x, xp.empty_like(x)


# ------------------------------------------------------------------------------------------------------------------ operations
def embedding(plain, ids, w):
    if not compiles(w) or ids.dtype.kind not in "iu" or not ids.size:
        return plain(ids, w)
    xp, (n, d), ids = array_module(w), w.shape, ids.astype(i64, copy=False)
    known = (ids >= 0) & (ids < n)
    y = xp.where(known[..., None], w[xp.where(known, ids, 0)], f32(np.nan))
    return y, (None, lambda g: scatter_add(g.reshape(-1, d), ids.reshape(-1), n))


def rms_norm(plain, x, w, eps=1e-5):
    if not compiles(x, w) or w.shape != x.shape[-1:]:
        return plain(x, w, eps=eps)
    xp, x, y = _each(x)
    w, d, rows = xp.ascontiguousarray(w), x.shape[-1], x.size // x.shape[-1]
    rho = xp.empty((*x.shape[:-1], 1), f32)
    cuda.launch(xp, "rms_norm", rows, x, w, y, rho, f32(eps), i32(d), i64(rows), threads=32)

    def pull(g, need):
        gw = (g * (x * rho)).reshape(rows, d).sum(0) if need[1] else None
        if not need[0]:
            return None, gw
        _, g, gx = _each(g)
        cuda.launch(xp, "rms_norm_back", rows, x, w, rho, g, gx, i32(d), i64(rows), threads=32)
        return gx, gw

    return y, pull


def rope(plain, x, cos, sin):
    if (
        not compiles(x, cos, sin)
        or x.ndim < 3
        or x.shape[-1] % 2
        or not cos.shape == sin.shape == (x.shape[-3], x.shape[-1] // 2)
    ):
        return plain(x, cos, sin)
    xp, (t, heads, d) = array_module(x), x.shape[-3:]
    cos, sin = xp.ascontiguousarray(cos), xp.ascontiguousarray(sin)

    def turned(x, sign):
        _, x, y = _each(x)
        cuda.launch(
            xp, "rope", x.size // 2, x, cos, sin, y, f32(sign), i32(t), i32(heads), i32(d // 2), i64(x.size // 2)
        )
        return y

    return turned(x, 1), (lambda g: turned(g, -1),)


def swiglu(plain, a, b):
    if not compiles(a, b) or a.shape != b.shape or not a.ndim:
        return plain(a, b)
    xp, a, y = _each(a)
    b = xp.ascontiguousarray(b)
    cuda.launch(xp, "swiglu", a.size, a, b, y, i64(a.size))

    def pull(g, need):
        _, g, ga = _each(g)
        gb = xp.empty_like(ga)
        cuda.launch(xp, "swiglu_back", a.size, a, b, g, ga, gb, i64(a.size))
        return ga, gb

    return y, pull


def softmax_cross_entropy(plain, z, targets, mask=None, reduction="mean"):
    shapes = {x.shape for x in (targets, mask) if x is not None}
    if (
        not compiles(z)
        or shapes != {z.shape[:-1]}
        or targets.dtype.kind not in "iu"
        or reduction not in ("mean", "sum")
    ):
        return plain(z, targets, mask=mask, reduction=reduction)
    xp, n = array_module(z), z.shape[-1]
    z, rows = xp.ascontiguousarray(z), z.size // n
    targets = xp.ascontiguousarray(targets.astype(i64, copy=False))
    weight = xp.ones(rows, f32) if mask is None else mask.reshape(-1).astype(f32)
    if reduction == "mean":
        weight = weight / xp.maximum(weight.sum(), np.finfo(f32).tiny)
    loss, kept = xp.empty(rows, f32), xp.empty((rows, 2), f32)
    cuda.launch(xp, "cross_entropy", rows, z, targets, weight, loss, kept, i32(n), i64(rows), threads=32)

    def pull(g):
        gz = xp.empty_like(z)
        arguments = z, targets, weight, kept, xp.ascontiguousarray(g, dtype=f32), gz
        cuda.launch(xp, "cross_entropy_back", rows, *arguments, i32(n), i64(rows), threads=32)
        return gz

    return loss.sum(), (pull,)


def causal_attention(plain, q, k, v, window=None, compute_dtype="float32"):
    (b, t, heads, d), (s, groups) = q.shape, k.shape[1:3]
    if not compiles(q, k, v) or heads % groups or k.shape != v.shape or (k.shape[0], k.shape[3]) != (b, d) or s < t:
        return plain(q, k, v, window=window, compute_dtype=compute_dtype)
    block = max(_SCORES // (b * heads * s), 64)
    return in_blocks(lambda *part: _attend(*part, compute_dtype), q, k, v, window, block)


def _attend(q, k, v, window, dtype):
    """ops._attend with mask and softmax, and what their pullbacks do, in a kernel each; scores and probabilities in the compute dtype."""
    (b, t, heads, d), (s, groups) = q.shape, k.shape[1:3]
    xp, scale = array_module(q), f32(1 / math.sqrt(d))
    kind = multiplied_in(xp, dtype)

    # (b, t, heads, d) -> (b, groups, m t, d), rounded; the pair with scale x if a scale is given
    def split(x, scale=None):
        if x.dtype == f32 and casts.vectorizable(x, d):
            found = casts.to_16bit(x, dtype, scale, (*x.shape[1:3], d))
        else:
            laid = [
                xp.ascontiguousarray(y.transpose(0, 2, 1, 3), dtype=kind)
                for y in ([x] if scale is None else [x, x * scale])
            ]
            found = laid[0] if scale is None else laid
        return found.reshape(b, groups, -1, d) if scale is None else [y.reshape(b, groups, -1, d) for y in found]

    # (b, groups, n, d) back to (b, t, heads, d), in float32
    def join(x, heads):
        laid = x.reshape(b, heads, -1, d)
        if casts.vectorizable(laid, d):
            return casts.to_float32(laid, swap=(*laid.shape[1:3], d)).reshape(b, -1, heads, d)
        return xp.ascontiguousarray(laid.transpose(0, 2, 1, 3), dtype=f32)

    (q, scaled), k, v = split(q, scale), split(k), split(v)
    p = batched(scaled, k, b_t=True)  # the scores, (b, groups, m t, s); in place the probabilities
    del scaled
    rows = p.size // s
    cuda.launch(xp, f"attend_{dtype}", rows, p, i32(t), i32(s), i32(window or 0), i64(rows), threads=32)

    def pull(g, need):
        g = split(g)
        gv = join(batched(p, g, a_t=True), groups) if need[2] else None
        if not (need[0] or need[1]):
            return None, None, gv
        gs = batched(g, v, b_t=True)
        cuda.launch(xp, f"attend_back_{dtype}", rows, p, gs, scale, i32(t), i32(s), i64(rows), threads=32)
        gk = join(batched(gs, q, a_t=True), groups) if need[1] else None
        return join(batched(gs, k), heads) if need[0] else None, gk, gv

    return join(batched(p, v), heads), pull


_FUSED = {f.__name__: f for f in (embedding, rms_norm, rope, swiglu, softmax_cross_entropy, causal_attention)}


def fuse(*operations):
    """Let the function of the same name here stand for each operation of `ops` where its arrays lie on a device."""
    for operation in operations:
        operation.fused = functools.partial(_FUSED[operation.__name__], operation.fused)


# ---------------------------------------------------------------------------------------------------------------------- weights
def dequantized(q, dtype):
    """code[q] · absmax as `products.held` holds it. None where no kernel can: blocks that are no power of two, sizes no multiple of 8."""
    xp, blocks = array_module(q.packed), q.blocksize
    nested = q.double_quant and q.constants.blocksize == 256 and len(q.constants.code) == 256
    if (
        not cuda.available(xp)
        or q.size % 8
        or not 8 <= blocks == 1 << (blocks.bit_length() - 1)
        or (q.double_quant and not nested)
    ):
        return None
    if not q.size or q.size >= 1 << 33 or q.packed.data.ptr % 4 or dtype not in cuda.DTYPES:
        return None
    each = 4 if dtype == "float32" else 8  # weights of a thread
    w = xp.empty(q.shape, f32 if dtype == "float32" else two_bytes(dtype))
    c, absmax = q.constants, q.absmax if not q.double_quant else q.constants.absmax
    constants = (c.codes, c.absmax, c.code, f32(c.offset)) if nested else (q.packed, absmax, absmax, f32(0))
    code = q.code
    if len(code) < 16:
        code = xp.zeros(16, f32)
        code[: len(q.code)] = q.code
    numbers = (
        np.uint32(q.size // each),
        i32((blocks // each).bit_length() - 1),
        i32(nested),
        i32(q.rule == "bitsandbytes-cuda"),
    )
    arguments = w, q.packed.view(np.uint32), absmax, *constants, code, *numbers
    # it loops: 64 blocks for each of an H100's processors
    cuda.launch(xp, f"dequantize_{dtype}", q.size // each, *arguments, most=8448)
    return w


def quantized(flat, form, bounds, order, check_finite):
    """(packed, absmax) of a float32 vector on its device, by form's rule; None where no kernel can, and where a number is not finite."""
    n, size, last, gpu = flat.size, form.blocksize, len(bounds), form.rule == "bitsandbytes-cuda"
    if not compiles(flat) or n % size or size % 2 or form.signed or (form.code_name == "fp4" and gpu):
        return None
    xp = array_module(flat)
    flat, packed, absmax = xp.ascontiguousarray(flat), xp.empty(n // 2, np.uint8), xp.empty(n // size, f32)
    bounds, order = np.append(bounds, np.full(15 - last, np.inf, f32)), np.resize(order.astype(np.uint8), 16)
    numbers = i32(last), i32(size), i32(gpu), i64(len(absmax))
    cuda.launch(
        xp, "quantize", len(absmax), flat, packed, absmax, xp.asarray(bounds), xp.asarray(order), *numbers, threads=32
    )
    if check_finite and not xp.isfinite(flat if gpu else absmax).all():  # the one stop; the host says where
        return None
    return packed, absmax


# ------------------------------------------------------------------------------------------------------------------- optimizers
def squares(gradients):
    """[Σ g², …] as Python floats, one for each gradient; on a device the small ones make one sum, and the host waits once for all."""
    if not gradients or array_module(gradients[0]) is np:
        return [float(np.vdot(g, g)) for g in gradients]
    xp = array_module(gradients[0])
    pieces = [g for g in gradients if g.size > _LARGE]  # a sum of each; several copies of all of them would be too much
    if small := [g.reshape(-1) for g in gradients if g.size <= _LARGE]:
        pieces.append(xp.concatenate(small))
    return move(xp.stack([xp.vdot(g, g) for g in pieces]), "cpu").tolist()


def adamw_step(p, g, m, v, t, lr, betas, eps, weight_decay):
    """optim.adamw_step in one kernel, equal in every bit."""
    b1, b2 = betas
    numbers = b1, 1 - b1, b2, 1 - b2, 1 / math.sqrt(1 - b2**t), eps, lr / (1 - b1**t), 1 - lr * weight_decay
    cuda.launch(array_module(p), "adamw", p.size, p, g, m, v, *map(f32, numbers), i64(p.size))


def adamw8bit_step(p, g, codes_m, codes_v, absmax_m, absmax_v, maps, tables, t, lr, betas, eps, weight_decay):
    """training.adamw8bit's step under the rule "bitsandbytes-cpu" in one kernel, equal in every bit. maps, tables: signed, unsigned"""
    b1, b2 = betas
    numbers = b1, 1 - b1, b2, 1 - b2, math.sqrt(1 - b2**t), eps, -lr / (1 - b1**t), 1 - lr * weight_decay
    arrays = p, g, codes_m, codes_v, absmax_m, absmax_v, *maps, *tables
    cuda.launch(array_module(p), "adamw8bit", p.size, *arrays, *map(f32, numbers), i64(p.size))
