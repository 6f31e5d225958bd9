"""PiSSA: the factors start as the weight's principal part, and the base keeps the rest."""

import math

from .svd import best_rank, dense_weight, restart


# --------------------------------------------------------------------------------------------------------------------- starts
def pissa(layer, code=None, **options):
    """A = √(S_r/s) V_rᵀ, B = U_r √(S_r/s), W_res = W − s B A, from W = U S Vᵀ.   PiSSA (Meng et al. 2024, arXiv 2404.02948) eq. 2–5.

    layer   a LoRALinear around a Linear; its base is replaced by one that holds W_res, the old one is left alone
    code    None: W_res stays dense. Else W_res is quantized (a code of `quantize`, with Linear4bit.of's options, but double_quant
            False): QPiSSA, whose error is ‖W_res − q(W_res)‖ (eq. 8, where the norm is the nuclear one)
    What changes against LoRA: the bypass holds W's principal directions and they are what is trained; B is not 0, and yet
    the first output is the base's up to rounding (with code: up to q's error). Dividing S_r by s is PEFT's.
    """
    w, r, s = dense_weight(layer, "pissa"), layer.r, layer.scaling
    b, a = best_rank(w, r, "pissa")
    return restart("pissa", layer, a / math.sqrt(s), b / math.sqrt(s), w - b @ a, code, **options)
