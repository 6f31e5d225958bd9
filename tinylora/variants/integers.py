"""Variants that choose the quantization along with the adapter: QA-LoRA (integers that a bypass merges into) and IR-QLoRA's ICQ.

`optimality.entropy` is the theory beside the second: the entropy of a code over all blocks of Gaussian weights.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from .. import backend, ops
from ..backend import array_module
from ..codebooks import NF4_OFFSET
from ..nn import Module, uniform
from ..quant import QuantizedTensor, quantize
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
    (rounded to integers they lose about as much as LoRA merged and rounded anew: notebook 13). The authors' code pools means
    and divides by the group size where it merges: the same method with A that many times larger.
    """

    def __init__(self, base, r=8, alpha=16):
        if not isinstance(base, IntegerLinear):
            raise ValueError(f"QALoRALinear: expected an IntegerLinear, got {type(base).__name__}")
        if r < 1:
            raise ValueError(f"QALoRALinear: r = {r}, expected a whole number, 1 or more")
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


# ----------------------------------------------------------------------------------------------- information: IR-QLoRA
def block_entropy(indices, blocksize, levels=16):
    """H_b = −Σ_q P_b(q) log₂ P_b(q), P_b the shares of the codes within block b. indices (…) ints -> (blocks,) bits.

    Within a block of 64 this is less than the entropy of all blocks together (`optimality.entropy`), by 0.20 bits for NF4 and
    Gaussian weights: 64 draws do not show 16 shares (to first order they miss 15/(2 · 64 ln 2) = 0.17 bits).
    """
    blocks = backend.move(indices, "cpu").reshape(-1, blocksize).astype(np.int64)
    where = blocks + levels * np.arange(len(blocks))[:, None]
    share = np.bincount(where.reshape(-1), minlength=levels * len(blocks)).reshape(len(blocks), levels) / blocksize
    return -(share * np.log2(np.where(share > 0, share, 1))).sum(axis=1)


@dataclass(frozen=True)
class Calibrated:
    """Ŵ = dequantize(quantized) + τ of its block. quantized: a QuantizedTensor of w − τ; tau (blocks,) float32."""

    quantized: QuantizedTensor
    tau: np.ndarray

    shape = property(lambda self: self.quantized.shape)
    dtype = "float32"

    def dequantize(self, dtype=None):
        """Ŵ in float32."""
        flat = self.quantized.dequantize("float32").reshape(len(self.tau), -1) + self.tau[:, None]
        return flat.reshape(self.shape)


def information_calibration(w, code="nf4", blocksize=64, reach=0.1, n=50):
    """τ* = argmax_τ H(q(w − τ)) for each block, over τ₀ ± reach · σ.   IR-QLoRA (Qin et al. 2024, arXiv 2402.05445) eq. 8–10.

    w       float array whose size is a multiple of blocksize. -> Calibrated
    reach   λ, and n candidates on either side of the block's median τ₀ (the paper: λ = 0.1, n = 100; its code: 0.1, 51)
    σ       max |w − τ₀| / 1.848: the paper's σ = 1 on the scale where NF4's largest value is Φ⁻¹(0.9677) = 1.848, as its code has it
    What changes against QLoRA: one number more a block, chosen for entropy and not for the error. Of equal entropies the τ
    nearest to the median wins (the code: the smallest). τ is kept in float32 here; paper and code store it in 8 bits.
    """
    flat = np.ascontiguousarray(backend.move(w, "cpu"), np.float32).reshape(-1)
    if not flat.size or flat.size % blocksize:
        raise ValueError(f"information_calibration: {flat.size} weights do not split into blocks of {blocksize}")
    blocks = flat.reshape(-1, blocksize)
    middle = np.median(blocks, axis=1).astype(np.float32)
    sigma = abs(blocks - middle[:, None]).max(axis=1) / NormalDist().inv_cdf(NF4_OFFSET)

    def quantized(tau):
        return quantize((blocks - tau[:, None]).reshape(w.shape), code, blocksize)

    best, most = middle, np.full(len(blocks), -1.0)
    for step in sorted(range(-n, n + 1), key=abs):
        tau = (middle + reach * step / max(n, 1) * sigma).astype(np.float32)
        entropy = block_entropy(quantized(tau).indices(), blocksize)
        best, most = np.where(entropy > most + 1e-9, tau, best), np.maximum(entropy, most)
    return Calibrated(quantized(best), best)
