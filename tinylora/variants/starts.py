"""Variants that leave LoRALinear as it is and change how it is trained (LoRA+, LoRA-FA) or where it starts (PiSSA, LoftQ, LoRA-GA)."""

import math

import numpy as np

from .. import backend
from ..backend import array_module
from ..lora import LoRALinear
from ..nn import Linear, Linear4bit
from .bypasses import linear_like


def lora_plus_groups(model, lr, ratio=16, weight_decay=0.0):
    """η_A = lr, η_B = ratio · lr: parameter groups for AdamW.   LoRA+ (Hayou et al. 2024, arXiv 2402.12354).

    What changes against LoRA: only the optimizer. As in the authors' code and in PEFT, whatever is trained goes to A's group
    unless it is a B or has one axis (biases, norms); these learn at B's rate, and the latter without weight decay.
    The ratio: theorem 1 (informal) says that equal rates cannot be efficient as the width n grows and η_A = Θ(1/n), η_B = Θ(1) are;
    the constant is empirical. 16 is reported for RoBERTa started from a random B and A = 0; from B = 0, as here, 4 to 8; Llama 2 to
    4. The authors' code and PEFT have no default. (The theorem and these numbers were read in notes on the paper, not in the paper.)
    What it comes to: under Adam with ε = 0 and no weight decay, ratio · α with equal rates is the same run (notebook 06), so a ratio
    helps at an α that is too small; under gradient descent it is a larger start of A (notebook 13).
    """
    if not ratio > 0:
        raise ValueError(f"lora_plus_groups: ratio = {ratio}, expected a number above 0")
    a, b, plain = [], [], []
    for name, w in model.trainable():
        (plain if w.ndim == 1 else b if "lora_B" in name else a).append((name, w))
    groups = ((a, lr, weight_decay), (b, lr * ratio, weight_decay), (plain, lr * ratio, 0.0))
    found = [{"params": p, "lr": rate, "weight_decay": decay} for p, rate, decay in groups if p]
    if not b:
        raise ValueError("lora_plus_groups: no trainable lora_B was found; add_lora first")
    return found


def freeze_A(model):
    """∂L/∂A is never formed: every A frozen as it is, every B trained; returns the model.   LoRA-FA (Zhang et al. 2023, arXiv 2308.03303).

    What changes against LoRA: half the parameters, and the tape holds A x (r numbers a row) instead of x (d) for the bypass: the
    gradient of B needs no more. The update stays in A's row space. (Read in the paper's abstract and in PEFT.)
    """
    for _, bypass in _active_bypasses(model):
        a = bypass.lora_A.weight
        a.requires_grad, a.grad = False, None
    return model


def correct_gradients(model, delta=1e-8):
    """B̄ ← B̄ (A Aᵀ + δ I)⁻¹ / s²: the gradient of B for which s B̄ A is nearest to G, in place.   LoRA-FA, the later version.

    With B̄ = s G Aᵀ this makes s B̄ A = G Aᵀ(A Aᵀ)⁻¹A, the projection of the full gradient G onto A's row space. Call it
    between backward and the optimizer's step. As PEFT's LoraFAOptimizer has it (its comment writes AᵀA, its code A Aᵀ; it
    rounds the product to bfloat16 where it can); of the paper only the abstract was read.
    """
    for _, bypass in _active_bypasses(model):
        a, b = bypass.lora_A.weight.data, bypass.lora_B.weight
        if b.grad is not None:
            gram = backend.move(a @ a.T, "cpu").astype(np.float64) + delta * np.eye(len(a))
            inverse = np.linalg.pinv(gram) / bypass.scaling**2
            b.grad = b.grad @ backend.move(inverse.astype(b.dtype), array_module(a))


def _active_bypasses(model):
    layers = [layer for _, layer in model.named_modules() if isinstance(layer, LoRALinear)]
    found = [(layer, layer.bypasses[name]) for layer in layers for name in layer.active]
    if not found:
        raise ValueError("variants: the model carries no active LoRALinear; add_lora first")
    return found


# --------------------------------------------------------------------------------------------------------------------- starts
def pissa(layer, code=None, **options):
    """A = √(S_r/s) V_rᵀ, B = U_r √(S_r/s), W_res = W − s B A, from W = U S Vᵀ.   PiSSA (Meng et al. 2024, arXiv 2404.02948) eq. 2–5.

    layer   a LoRALinear around a Linear; its base is replaced by one that holds W_res, the old one is left alone
    code    None: W_res stays dense. Else W_res is quantized (a code of `quantize`, with Linear4bit.of's options, but double_quant
            False): QPiSSA, whose error is ‖W_res − q(W_res)‖ (eq. 8, where the norm is the nuclear one)
    What changes against LoRA: the bypass holds W's principal directions and they are what is trained; B is not 0, and yet
    the first output is the base's up to rounding (with code: up to q's error). Dividing S_r by s is PEFT's.
    """
    w, r, s = _dense_weight(layer, "pissa"), layer.r, layer.scaling
    b, a = _best(w, r, "pissa")
    return _restart("pissa", layer, a / math.sqrt(s), b / math.sqrt(s), w - b @ a, code, **options)


def loftq(linear, r=16, alpha=None, steps=5, code="nf4", **options):
    """Q_t = q(W − A_{t−1} B_{t−1}),  A_t B_t = the best rank r of W − Q_t.   LoftQ (Li et al. 2023, arXiv 2310.08659) eq. 6–9, algorithm 1.

    linear   a Linear, left alone. -> LoRALinear around a Linear4bit that holds Q_T
    alpha    None: r, so that s = 1; else the factors are divided by √s each
    options  blocksize, double_quant (False), compute_dtype and the others of Linear4bit.of
    steps    T. 1 is one quantization and the best repair of its error; each further step is a heuristic, not a descent: where the
             spectrum of W falls steeply, many steps make it worse again (notebook 13)
    What changes against LoRA: the bypass starts as the quantization error's best rank r, so Q + s B A is nearer to W than
    Q is. q here is any code of `quantize`; the authors have NormalFloat tables of their own (same offset as NF4, blocks of 64);
    PEFT uses bitsandbytes' NF4 (blocks of 64, no double quantization, 1 step by default) and does not divide by s: with
    alpha ≠ r its model starts at Q + (alpha/r) B A.
    """
    if steps < 1:
        raise ValueError(f"loftq: steps = {steps}, expected 1 or more")
    w, low = _as_host(linear.dense()), 0.0
    for _ in range(steps):
        base = _quantized(linear, w - low, code, **options)
        b, a = _best(w - _as_host(base.dense()), r, "loftq")
        low = b @ a
    layer = LoRALinear(base, r=r, alpha=r if alpha is None else alpha)
    layer.bypasses["default"].started_by = (
        "loftq" if steps > 1 else ""
    )  # after one step the base is q(W), as anybody has it
    return _set_factors(layer, a / math.sqrt(layer.scaling), b / math.sqrt(layer.scaling))


def lora_ga(layer, gradient, gamma=16):
    """A = c V_[1:r]ᵀ, B = c U_[r+1:2r], W ← W − s B A, from G = U S Vᵀ, c = ⁴√d_out/√γ.   LoRA-GA (Wang et al. 2024, arXiv 2407.05000).

    layer      a LoRALinear around a Linear; its base is replaced. gradient: G = ∂L/∂W at W (out, in), over some batches
    What changes against LoRA: a first step of gradient descent moves W along G V Vᵀ + U Uᵀ G, and with these two halves that
    is s²c² times the best rank-2r approximation of G. The first output is the base's up to rounding.
    c is that of the authors' code (its `stable` scale, stable_gamma = 16); the paper's own γ was not seen. PEFT's version
    differs: it multiplies B by the singular values too, and scales B only, which gives that property up.
    """
    w, r = _dense_weight(layer, "lora_ga"), layer.r
    if gradient.shape != w.shape:
        raise ValueError(f"lora_ga: the gradient is {gradient.shape}, the weight {w.shape}")
    if 2 * r > min(w.shape):
        raise ValueError(f"lora_ga: r = {r} needs 2 r singular vectors, and the weight is {w.shape}")
    u, _, vt = np.linalg.svd(_as_host(gradient), full_matrices=False)
    c = len(w) ** 0.25 / math.sqrt(gamma)
    a, b = c * vt[:r], c * u[:, r : 2 * r]
    return _restart("lora_ga", layer, a, b, w - layer.scaling * (b @ a))


def _as_host(x):
    return backend.move(x, "cpu").astype(np.float64)


def _dense_weight(layer, who):
    base = getattr(layer, "base_layer", None)
    if not isinstance(layer, LoRALinear) or not isinstance(base, Linear):
        kind = type(layer if base is None else base).__name__
        raise ValueError(f"{who}: expected a LoRALinear around a dense Linear, got {kind}; quantize afterwards")
    return _as_host(base.dense())


def _best(w, r, who):
    """(U_r √S_r, √S_r V_rᵀ): the best approximation of rank r, split evenly (Eckart and Young)."""
    if r > min(w.shape):
        raise ValueError(f"{who}: r = {r} exceeds the rank of a weight of shape {w.shape}")
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    root = np.sqrt(s[:r])
    return u[:, :r] * root, root[:, None] * vt[:r]


def _restart(who, layer, a, b, weight, code=None, **options):
    """Give the layer these factors and a base that holds `weight`, quantized if a code is given."""
    old = layer.base_layer
    base = linear_like(old, weight) if code is None else _quantized(old, weight, code, **options)
    layer.base_layer, layer.bypasses[layer.active[0]].started_by = base, who
    return _set_factors(layer, a, b)


def _quantized(like, weight, code, blocksize=64, double_quant=False, **options):
    return Linear4bit.of(linear_like(like, weight), code, blocksize, double_quant, **options)


def _set_factors(layer, a, b):
    for factor, value in ((layer.lora_A.weight, a), (layer.lora_B.weight, b)):
        factor.data = backend.move(value.astype(factor.dtype), array_module(factor.data))
    return layer
