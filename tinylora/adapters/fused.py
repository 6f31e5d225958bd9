"""A frozen layer with one bypass as one operation. `lora` composes it of five; here fewer arrays are written and read.

    h = x Ŵᵀ + s (x Aᵀ) Bᵀ                                                                                        QLoRA eq. 5, LoRA eq. 3

    Ā = s (ḡ B)ᵀ x,     B̄ = s ḡᵀ (x Aᵀ),     x̄ = ḡ Ŵ + s (ḡ B) A

`LoRALayer.forward` is the readable one. On the host this one has its bits, those of the gradients included, unless a number leaves the
normal ones of float32 (tests/test_fused.py), and a training step takes 0.90 to 0.97 of the time (four models on two workers). On a device
each array is rounded only once, and only the gradients of an x that goes into several layers are added in another order
(tests/test_cuda.py).
"""

import math

import numpy as np

from ..backend import array_module
from ..kernels import casts
from ..kernels.dequantize import for_product
from ..kernels.device import compiles
from ..kernels.products import held, multiplied, widened
from ..lora import LinearBypass, LoRALayer
from ..nn import FrozenLinear, Linear
from ..tensor import Tensor, primitive, state


def fused_forward(layer, x):
    """h = x Ŵᵀ + s (x Aᵀ) Bᵀ in one operation, or None where `LoRALayer.forward` has to compose it.

    None: x no Tensor or of one axis; a frozen factor, whose composed pullbacks keep less; another kind of base or bypass, or several; a
    forward of an object's own; dropout; a bias; different compute dtypes; shapes that do not fit, about which the composed path says what
    is wrong; somebody who looks at each operation by state.around. On the host also: arrays or products in anything but float32, and an s
    that is no power of two.
    """
    base, made = layer.base_layer, [layer.bypasses[name] for name in layer.active]
    if not isinstance(x, Tensor) or state.around is not None or x.data.ndim < 2:
        return None
    if type(base).forward is not FrozenLinear.forward or [type(b) for b in made] != [LinearBypass]:
        return None
    (one,) = made
    a, b = one.lora_A, one.lora_B
    trained = a.weight.requires_grad and b.weight.requires_grad  # what the pullback keeps is for their gradients
    if (
        not type(a) is type(b) is Linear
        or not base.bias is a.bias is b.bias is None
        or not base.compute_dtype == a.compute_dtype == b.compute_dtype
        or not x.shape[-1] == base.in_features == a.weight.shape[1]
        or b.weight.shape != (base.out_features, a.weight.shape[0])
        or not (trained or state.mode == "off")
        or (one.training and one.dropout)
        or any("forward" in vars(module) for module in (base, one, a, b))
    ):
        return None
    arrays = x.data, a.weight.data, b.weight.data
    as_stored = base.backward_weight == "stored" and base.weight.dtype != "float32"  # as ops.linear_frozen has it
    first = base.weight.dtype if as_stored else base.compute_dtype
    if all(type(z) is np.ndarray and z.dtype == np.float32 for z in arrays):
        if base.compute_dtype != "float32" or math.frexp(one.scaling)[0] != 0.5:
            return None
        return lora_linear_on_host(x, x, base.weight, a.weight, b.weight, scale=one.scaling, first=first)
    if array_module(x.data) is np or not compiles(*arrays):
        return None
    how = {"compute_dtype": base.compute_dtype, "first": first}
    return lora_linear(x, base.weight, a.weight, b.weight, scale=one.scaling, **how)


@primitive
def lora_linear_on_host(x, again, q, a, b, scale, first):
    """h = x Ŵᵀ + (x Aᵀ) (s B)ᵀ in float32, s a power of two.   x (..., in), q stored (out, in), a (r, in), b (out, r) -> (..., out)

    again   x once more: s (ḡ B) A and ḡ Ŵ are added to its gradient one after the other, as the composed operations do it, so that the
            sum over the layers that x goes into has the same bits
    first   the dtype to which Ŵ is rounded for the backward pass (see `ops.linear_frozen`)

    A power of two changes no digit of what it multiplies, unless the product leaves float32's normal numbers. So B, which is small, bears
    the scale.
    """
    shape, x, s = x.shape, x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), np.float32(scale)
    h, u = multiplied(x, for_product(q, "float32").T), multiplied(x, a.T)
    h += multiplied(u, (b * s).T)

    def pull(g, need):
        g = g.astype(np.float32, copy=False)
        # ḡ may be one number, stretched; the composed pullbacks of A and B multiply s ḡ, which is an array in one piece
        whole = g if g.flags.forc else g.copy("K")
        g, whole = (z.reshape(len(x), len(b)) for z in (g, whole))
        gu = multiplied(whole, b * s)
        return (
            lambda _: multiplied(gu, a).reshape(shape),
            lambda _: multiplied(g, widened(for_product(q, first))).reshape(shape),
            None,
            multiplied(gu.T, x),
            multiplied(whole.T, u) * s,
        )

    return h.reshape(*shape[:-1], len(b)), pull


@primitive
def lora_linear(x, q, a, b, scale, compute_dtype, first):
    """h = x Ŵᵀ + s (x Aᵀ) Bᵀ on a device.   x (..., in), q a stored weight (out, in), a (r, in), b (out, r) -> (..., out) float32"""
    dtype, lead = compute_dtype, x.shape[:-1]
    x, a, b = held(x.reshape(-1, x.shape[-1]), dtype), held(a, dtype), held(b, dtype)
    u = multiplied(x, a.T)
    h = _sum(multiplied(x, held(q.dequantize(dtype), dtype).T), multiplied(u, b.T), scale)

    def pull(g, need):
        g = array_module(g).ascontiguousarray(g.reshape(-1, g.shape[-1]), dtype=np.float32)
        g, scaled = _rounded(g, dtype, scale)
        gb = widened(multiplied(scaled.T, u))
        gu = multiplied(scaled, b)
        ga = widened(multiplied(gu.T, x))
        gx = _sum(multiplied(g, held(q.dequantize(first), dtype)), multiplied(gu, a), 1) if need[0] else None
        return gx if gx is None else gx.reshape(*lead, -1), None, ga, gb

    return h.reshape(*lead, -1), pull


def _rounded(x, dtype, scale):
    """(round(x), round(scale x))"""
    if dtype != "float32" and casts.vectorizable(x):
        return casts.to_16bit(x, dtype, scale)
    return held(x, dtype), held(x * np.float32(scale), dtype)


def _sum(x, y, scale):
    """x + scale y in float32"""
    return casts.to_float32(x, y, scale) if casts.vectorizable(x) else widened(x) + widened(y) * np.float32(scale)


LoRALayer.fused_forward = fused_forward
