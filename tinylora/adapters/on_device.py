"""A frozen layer with one bypass as one operation on a device: what `lora` composes of five, with each array rounded once.

    h = x Ŵᵀ + s (x Aᵀ) Bᵀ                                                                                        QLoRA eq. 5, LoRA eq. 3

    Ā = s (ḡ B)ᵀ x,     B̄ = s ḡᵀ (x Aᵀ),     x̄ = ḡ Ŵ + s (ḡ B) A

`LoRALayer.forward` is the readable one, and tests/test_cuda.py holds this to it: h, Ā and B̄ are equal in every bit. The gradients of an x
that goes into several layers are added in another order, by pairs.
"""

import numpy as np

from ..backend import array_module
from ..kernels import fours
from ..kernels.device import compiles
from ..kernels.products import held, multiplied, widened
from ..lora import LinearBypass, LoRALayer
from ..nn import FrozenLinear, Linear
from ..tensor import Tensor, primitive, state


def in_one(layer, x):
    """The layer's output by `linear`; None where it computes something else: on the host, with dropout, a bias, several compute dtypes."""
    base, made = layer.base_layer, [layer.bypasses[name] for name in layer.active]
    if (
        not isinstance(x, Tensor) or array_module(x.data) is np or state.around is not None
    ):  # somebody looks at each operation
        return None
    if type(base).forward is not FrozenLinear.forward or [type(b) for b in made] != [LinearBypass] or x.data.ndim < 2:
        return None
    (one,) = made
    a, b = one.lora_A, one.lora_B
    if (
        not type(a) is type(b) is Linear
        or not base.bias is a.bias is b.bias is None
        or not base.compute_dtype == a.compute_dtype == b.compute_dtype
        or not compiles(x.data, a.weight.data, b.weight.data)
        or x.shape[-1] != base.in_features
        or (one.training and one.dropout)
    ):
        return None
    how = {"compute_dtype": base.compute_dtype, "backward_weight": base.backward_weight}
    return linear(x, base.weight, a.weight, b.weight, scale=one.scaling, **how)


@primitive
def linear(x, q, a, b, scale, compute_dtype, backward_weight):
    """h = x Ŵᵀ + s (x Aᵀ) Bᵀ.   x (..., in), q a stored weight (out, in), a (r, in), b (out, r) -> (..., out) float32"""
    dtype, lead = compute_dtype, x.shape[:-1]
    first = dtype if backward_weight == "forward" or q.dtype == "float32" else q.dtype  # as ops.linear_frozen has it
    x, a, b = held(x.reshape(-1, x.shape[-1]), dtype), held(a, dtype), held(b, dtype)
    u = multiplied(x, a.T)
    h = _sum(multiplied(x, held(q.dequantize(dtype), dtype).T), multiplied(u, b.T), scale)

    def pull(g, need):
        g = array_module(g).ascontiguousarray(g.reshape(-1, g.shape[-1]), dtype=np.float32)
        g, scaled = _rounded(g, dtype, scale)
        gb = widened(multiplied(scaled.T, u)) if need[3] else None
        gu = multiplied(scaled, b)
        ga = widened(multiplied(gu.T, x)) if need[2] else None
        gx = _sum(multiplied(g, held(q.dequantize(first), dtype)), multiplied(gu, a), 1) if need[0] else None
        return gx if gx is None else gx.reshape(*lead, -1), None, ga, gb

    return h.reshape(*lead, -1), pull


def _rounded(x, dtype, scale):
    """(round(x), round(scale x))"""
    if dtype != "float32" and fours.takes(x):
        return fours.rounded(x, dtype, scale)
    return held(x, dtype), held(x * np.float32(scale), dtype)


def _sum(x, y, scale):
    """x + scale y in float32"""
    return fours.summed(x, y, scale) if fours.takes(x) else widened(x) + widened(y) * np.float32(scale)


LoRALayer.in_one = in_one
