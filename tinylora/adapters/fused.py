"""A frozen layer with one bypass as one operation on a device. `lora` composes it of five; here each array is rounded only once.

    h = x Ŵᵀ + s (x Aᵀ) Bᵀ                                                                                        QLoRA eq. 5, LoRA eq. 3

    Ā = s (ḡ B)ᵀ x,     B̄ = s ḡᵀ (x Aᵀ),     x̄ = ḡ Ŵ + s (ḡ B) A

`LoRALayer.forward` is the readable one, and tests/test_cuda.py holds this to it, on the CPU in every bit. Only the gradients of an x that
goes into several layers are added in another order.
"""

import numpy as np

from ..backend import array_module
from ..kernels import casts
from ..kernels.device import compiles
from ..kernels.products import held, multiplied, widened
from ..lora import LinearBypass, LoRALayer
from ..nn import FrozenLinear, Linear
from ..tensor import Tensor, primitive, state


def fused_forward(layer, x):
    """h = x Ŵᵀ + s (x Aᵀ) Bᵀ by `lora_linear`, or None where `LoRALayer.forward` has to compose it.

    None: on the host; x no Tensor or of one axis; no factor that trains; another kind of base or bypass, or several; dropout; a bias;
    different compute dtypes; shapes that do not fit, about which the composed path says what is wrong.
    """
    base, made = layer.base_layer, [layer.bypasses[name] for name in layer.active]
    # costs.flops and others look at each operation by state.around
    if not isinstance(x, Tensor) or array_module(x.data) is np or state.around is not None or x.data.ndim < 2:
        return None
    if type(base).forward is not FrozenLinear.forward or [type(b) for b in made] != [LinearBypass]:
        return None
    (one,) = made
    a, b = one.lora_A, one.lora_B
    trained = a.weight.requires_grad or b.weight.requires_grad  # what the pullback keeps is for their gradients
    if (
        not type(a) is type(b) is Linear
        or not base.bias is a.bias is b.bias is None
        or not base.compute_dtype == a.compute_dtype == b.compute_dtype
        or not compiles(x.data, a.weight.data, b.weight.data)
        or not x.shape[-1] == base.in_features == a.weight.shape[1]
        or b.weight.shape != (base.out_features, a.weight.shape[0])
        or not (trained or state.mode == "off")
        or (one.training and one.dropout)
    ):
        return None
    how = {"compute_dtype": base.compute_dtype, "backward_weight": base.backward_weight}
    return lora_linear(x, base.weight, a.weight, b.weight, scale=one.scaling, **how)


@primitive
def lora_linear(x, q, a, b, scale, compute_dtype, backward_weight):
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
    if dtype != "float32" and casts.vectorizable(x):
        return casts.to_16bit(x, dtype, scale)
    return held(x, dtype), held(x * np.float32(scale), dtype)


def _sum(x, y, scale):
    """x + scale y in float32"""
    return casts.to_float32(x, y, scale) if casts.vectorizable(x) else widened(x) + widened(y) * np.float32(scale)


LoRALayer.fused_forward = fused_forward
