"""QA-LoRA: a bypass that reads sums over groups, so that it merges into the zero points of an integer code."""

import math

import numpy as np

from .. import backend, ops
from ..backend import array_module, whole
from ..nn import Module, uniform
from ..tensor import Tensor


class IntegerLinear(Module):
    """y = x Ŵᵀ + b, Ŵ = α (q − β) with one scale α and one zero point β for each output and group of inputs.   QA-LoRA §3.3.

    codes (out, in) uint8 below 2^bits;  scale, zero (out, L): L groups of in/L neighbours. β is a real number, so that the
    smallest and the largest weight of a group are hit exactly (GPTQ, which the authors use, rounds it).
    """

    def __init__(self, codes, scale, zero, bias=None):
        self.codes, self.scale, self.zero, self.bias = codes, scale, zero, bias

    @classmethod
    def of(cls, linear, bits=4, group=32):
        """Round the weight of a Linear to `bits` bits in groups of `group` inputs: α = (max − min)/(2^bits − 1), β = −min/α."""
        w, out, n = linear.dense(), linear.out_features, linear.in_features
        if not 1 <= bits <= 8:
            raise ValueError(f"IntegerLinear: bits = {bits}, expected 1 to 8")
        if group < 1 or n % group:
            raise ValueError(f"IntegerLinear: {n} inputs do not split into groups of {group}")
        xp, grouped = array_module(w), w.reshape(out, n // group, group)
        low, high = grouped.min(axis=2), grouped.max(axis=2)
        scale = (high - low) / (2**bits - 1)
        scale = xp.where(scale > 0, scale, xp.ones_like(scale))  # a constant group: q = 0 and β carries it
        codes = (((grouped - low[..., None]) / scale[..., None]) + 0.5).astype(np.uint8).reshape(out, n)
        return cls(Tensor(codes), Tensor(scale), Tensor(-low / scale), linear.bias)

    shape = property(lambda self: self.codes.shape)
    in_features = property(lambda self: self.shape[1])
    out_features = property(lambda self: self.shape[0])
    groups = property(lambda self: self.scale.shape[1])

    def dequantize(self, dtype=None):
        """Ŵ (out, in) in the precision of the scale."""
        scale, zero = self.scale.data[..., None], self.zero.data[..., None]
        q = self.codes.data.reshape(*self.scale.shape, -1).astype(self.scale.dtype)
        return ((q - zero) * scale).reshape(self.shape)

    dense = dequantize

    def forward(self, x):
        y = ops.linear_frozen(x, self, backward_weight="forward")
        return y if self.bias is None else y + self.bias


class QALoRALinear(Module):
    """h = Ŵ x + s B A p(x), p(x)_l = the sum of x over group l.   QA-LoRA (Xu et al. 2023, arXiv 2309.14717) §3.3, algorithm 1.

    base   an IntegerLinear with L groups; A (r, L) ~ U(−1/√L, 1/√L), B (out, r) zeros, s = α/r
    What changes against LoRA: A sees L sums instead of `in` inputs, so B A is constant within a group, which is exactly what a
    zero point can absorb: `merge` keeps the integer codes and loses nothing, as long as the zero points may be real numbers
    (rounded to integers they lose about as much as LoRA merged and rounded anew: notebook 20). The authors' code pools means
    and divides by the group size where it merges: the same method with A that many times larger.
    """

    def __init__(self, base, r=8, alpha=16):
        if not isinstance(base, IntegerLinear):
            raise ValueError(f"QALoRALinear: expected an IntegerLinear, got {type(base).__name__}")
        r = whole("QALoRALinear: r", r)
        base.requires_grad_(False)
        self.base_layer, self.r, self.alpha, n = base, r, alpha, base.groups
        dtype, xp = base.scale.dtype, array_module(base.scale.data)
        a = uniform((r, n), 1 / math.sqrt(n)).astype(dtype)
        self.lora_A = Tensor(backend.move(a, xp), requires_grad=True)
        self.lora_B = Tensor(xp.zeros((base.out_features, r), dtype=dtype), requires_grad=True)

    scaling = property(lambda self: self.alpha / self.r)

    def forward(self, x):
        pooled = ops.sum(ops.reshape(x, (*x.shape[:-1], self.base_layer.groups, -1)), axis=-1)
        return self.base_layer(x) + ops.linear(ops.linear(pooled, self.lora_A), self.lora_B) * self.scaling

    def merge(self):
        """An IntegerLinear with the same codes and scales and β' = β − s B A/α. Exact in real arithmetic; β' is no integer."""
        base = self.base_layer
        moved = base.zero.data - self.scaling * (self.lora_B.data @ self.lora_A.data) / base.scale.data
        return IntegerLinear(base.codes, base.scale, Tensor(moved), base.bias)
