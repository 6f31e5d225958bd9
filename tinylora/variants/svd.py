"""What PiSSA, LoftQ and LoRA-GA share: a start from singular vectors, with the base changed to match."""

import numpy as np

from .. import backend
from ..backend import array_module
from ..lora import LoRALinear
from ..nn import Linear, Linear4bit
from .bypass import linear_like


def as_host(x):
    return backend.move(x, "cpu").astype(np.float64)


def dense_weight(layer, who):
    base = getattr(layer, "base_layer", None)
    if not isinstance(layer, LoRALinear) or not isinstance(base, Linear):
        kind = type(layer if base is None else base).__name__
        raise ValueError(f"{who}: expected a LoRALinear around a dense Linear, got {kind}; quantize afterwards")
    return as_host(base.dense())


def best_rank(w, r, who):
    """(U_r √S_r, √S_r V_rᵀ): the best approximation of rank r, split evenly (Eckart and Young)."""
    if r > min(w.shape):
        raise ValueError(f"{who}: r = {r} exceeds the rank of a weight of shape {w.shape}")
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    root = np.sqrt(s[:r])
    return u[:, :r] * root, root[:, None] * vt[:r]


def restart(who, layer, a, b, weight, code=None, **options):
    """Give the layer these factors and a base that holds `weight`, quantized if a code is given."""
    old = layer.base_layer
    base = linear_like(old, weight) if code is None else quantized(old, weight, code, **options)
    layer.base_layer, layer.bypasses[layer.active[0]].started_by = base, who
    return set_factors(layer, a, b)


def quantized(like, weight, code, blocksize=64, double_quant=False, **options):
    return Linear4bit.of(linear_like(like, weight), code, blocksize, double_quant, **options)


def set_factors(layer, a, b):
    for factor, value in ((layer.lora_A.weight, a), (layer.lora_B.weight, b)):
        factor.data = backend.move(value.astype(factor.dtype), array_module(factor.data))
    return layer
