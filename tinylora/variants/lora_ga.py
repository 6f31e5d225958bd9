"""LoRA-GA: the factors start as singular vectors of the gradient."""

import math

import numpy as np

from .svd import as_host, dense_weight, restart


def lora_ga(layer, gradient, gamma=16):
    """A = c V_[1:r]ᵀ, B = c U_[r+1:2r], W ← W − s B A, from G = U S Vᵀ, c = ⁴√d_out/√γ.   LoRA-GA (Wang et al. 2024, arXiv 2407.05000).

    layer      a LoRALinear around a Linear; its base is replaced. gradient: G = ∂L/∂W at W (out, in), over some batches
    What changes against LoRA: a first step of gradient descent moves W along G V Vᵀ + U Uᵀ G, and with these two halves that
    is s²c² times the best rank-2r approximation of G. The first output is the base's up to rounding.
    c is that of the authors' code (its `stable` scale, stable_gamma = 16); the paper's own γ was not seen. PEFT's version
    differs: it multiplies B by the singular values too, and scales B only, which gives that property up.
    """
    w, r = dense_weight(layer, "lora_ga"), layer.r
    if gradient.shape != w.shape:
        raise ValueError(f"lora_ga: the gradient is {gradient.shape}, the weight {w.shape}")
    if 2 * r > min(w.shape):
        raise ValueError(f"lora_ga: r = {r} needs 2 r singular vectors, and the weight is {w.shape}")
    u, _, vt = np.linalg.svd(as_host(gradient), full_matrices=False)
    c = len(w) ** 0.25 / math.sqrt(gamma)
    a, b = c * vt[:r], c * u[:, r : 2 * r]
    return restart("lora_ga", layer, a, b, w - layer.scaling * (b @ a))
