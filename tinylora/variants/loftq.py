"""LoftQ: the factors start as the best repair of the quantization error."""

import math

from ..lora import LoRALinear
from .svd import as_host, best_rank, quantized, set_factors


def loftq(linear, r=16, alpha=None, steps=5, code="nf4", **options):
    """Q_t = q(W − A_{t−1} B_{t−1}),  A_t B_t = the best rank r of W − Q_t.   LoftQ (Li et al. 2023, arXiv 2310.08659) eq. 6–9, algorithm 1.

    linear   a Linear, left alone. -> LoRALinear around a Linear4bit that holds Q_T
    alpha    None: r, so that s = 1; else the factors are divided by √s each
    options  blocksize, double_quant (False), compute_dtype and the others of Linear4bit.of
    steps    T. 1 is one quantization and the best repair of its error; each further step is a heuristic, not a descent: where the
             spectrum of W falls steeply, many steps make it worse again (notebook 20)
    What changes against LoRA: the bypass starts as the quantization error's best rank r, so Q + s B A is nearer to W than
    Q is. q here is any code of `quantize`; the authors have NormalFloat tables of their own (same offset as NF4, blocks of 64);
    PEFT uses bitsandbytes' NF4 (blocks of 64, no double quantization, 1 step by default) and does not divide by s: with
    alpha ≠ r its model starts at Q + (alpha/r) B A.
    """
    if steps < 1:
        raise ValueError(f"loftq: steps = {steps}, expected 1 or more")
    w, low = as_host(linear.dense()), 0.0
    for _ in range(steps):
        base = quantized(linear, w - low, code, **options)
        b, a = best_rank(w - as_host(base.dense()), r, "loftq")
        low = b @ a
    layer = LoRALinear(base, r=r, alpha=r if alpha is None else alpha)
    # after one step the base is q(W), as anybody has it
    layer.bypasses["default"].started_by = "loftq" if steps > 1 else ""
    return set_factors(layer, a / math.sqrt(layer.scaling), b / math.sqrt(layer.scaling))
