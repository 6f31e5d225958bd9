"""LoRA-FA: A stays frozen, and B's gradient is corrected for it."""

import numpy as np

from .. import backend
from ..backend import array_module
from ..lora import LoRALinear


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
