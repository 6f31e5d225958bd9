"""IR-QLoRA: an offset a block that is chosen for entropy, and a bypass with short cuts."""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from .. import backend, ops
from ..backend import array_module
from ..codebooks import NF4_OFFSET
from ..nn import uniform
from ..quant import QuantizedTensor, quantize
from .bypass import AdditiveBypass, tensor_like


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


# ------------------------------------------------------------------------------------------------------------------------ IEC
class IECLinear(AdditiveBypass):
    """h = base(x) + s U₂(U₁(x)), U₁(x) = A x + β₁ M x, U₂(x') = B x' + β₂ R x'.   IR-QLoRA eq. 12–15 (information elastic connection).

    M averages each of the r runs of in/r neighbours, R repeats each of the r numbers out/r times in a row; β₁, β₂ (1,) are trained
    from 0, A and B start as LoRA's: the first output is the base's. `in` and `out` must be multiples of r.
    What changes against LoRA: two numbers more a layer; the update (B + β₂ R)(A + β₁ M) is still one product of rank r, and merges.
    M and R are the released code's. The paper's printed eq. 12 sums r slices of in/r and has the wrong length unless in = r²,
    and its R concatenates x' as a whole.
    """

    def __init__(self, base, r=8, alpha=16):
        super().__init__(base)
        if r < 1 or base.in_features % r or base.out_features % r:
            raise ValueError(
                f"IECLinear: r = {r} must divide the layer's {base.in_features} inputs and {base.out_features} outputs"
            )
        self.r, self.alpha = r, alpha
        a = uniform((r, base.in_features), 1 / math.sqrt(base.in_features))
        self.lora_A = tensor_like(base, a, trained=True)
        self.lora_B = tensor_like(base, np.zeros((base.out_features, r)), trained=True)
        self.beta1, self.beta2 = (tensor_like(base, np.zeros(1), trained=True) for _ in range(2))

    scaling = property(lambda self: self.alpha / self.r)

    def bypass(self, x):
        lead, r = x.shape[:-1], self.r
        low = ops.linear(x, self.lora_A) + ops.mean(ops.reshape(x, (*lead, r, -1)), axis=-1) * self.beta1
        high = ops.linear(low, self.lora_B).reshape(*lead, r, -1) + low.reshape(*lead, r, 1) * self.beta2
        return high.reshape(*lead, self.out_features) * self.scaling

    def delta(self):
        """ΔW = s (B + β₂ R)(A + β₁ M) (out, in)."""
        xp, eye = array_module(self.lora_A.data), np.eye(self.r, dtype=self.lora_A.dtype)
        n, m = self.in_features // self.r, self.out_features // self.r
        a = self.lora_A.data + self.beta1.data * xp.asarray(np.repeat(eye, n, axis=1) / n)
        b = self.lora_B.data + self.beta2.data * xp.asarray(np.repeat(eye, m, axis=0))
        return (b @ a) * self.scaling
