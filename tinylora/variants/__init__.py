"""Descendants of LoRA, each a few lines on the layer of `lora`.

They change one thing each: how the factors are trained, where they start, or what stands between x and h.

    a rule of training     LoRA+      η_B = λ η_A                                            lora_plus_groups
                           LoRA-FA    A frozen; B̄ ← B̄ (A Aᵀ)⁻¹/s²                           freeze_A, correct_gradients
    a start                PiSSA      s B A = the best rank r of W, the base keeps the rest  pissa
                           LoftQ      Q + s B A ≈ W with Q in 4 bits                         loftq
                           LoRA-GA    A, B = singular vectors of the gradient                lora_ga
    another bypass         VeRA       Λ_b B Λ_d A x, with A and B random, frozen, shared     VeRALinear, add_vera
                           AdaLoRA    s P Λ Q x, with a budget of singular values            AdaLoRALinear, RankAllocator
                           QA-LoRA    s B A (sums of x over groups), merges into integers    QALoRALinear
                           IR-QLoRA   entropy-maximizing offsets; a bypass with short cuts   information_calibration, IECLinear

(rsLoRA and DoRA are options of LoRALinear.) A file a method, named after the method; `bypass` and `svd` hold what several share.

Each docstring says in which text its equation was read: the paper, the authors' released code, or PEFT 0.21.2, and where
these disagree. Left out: everything around the equation (which layers, which data, learning rates), fast randomized
SVDs (these are exact, on the host, in float64), and PEFT's files for these methods.
"""

from ..lora import LoRALayer
from .adalora import AdaLoRALinear, RankAllocator, add_adalora, orthogonality
from .bypass import AdditiveBypass
from .ir_qlora import Calibrated, IECLinear, block_entropy, information_calibration
from .loftq import loftq
from .lora_fa import correct_gradients, freeze_A
from .lora_ga import lora_ga
from .lora_plus import lora_plus_groups
from .pissa import pissa
from .qa_lora import IntegerLinear, QALoRALinear
from .vera import VeRALinear, add_vera

Beside = AdditiveBypass  # the name until 0.1


def merge(model):
    """Replace every VeRALinear, AdaLoRALinear, IECLinear and QALoRALinear by its merged layer, in place; returns the model."""
    found = [
        (path, layer) for path, layer in model.named_modules() if isinstance(layer, (AdditiveBypass, QALoRALinear))
    ]
    for path, layer in found:
        if isinstance(layer.base_layer, LoRALayer):
            raise ValueError(f"variants: {path} carries a LoRA adapter inside; tl.merge(model) first")
    merged = [(path, layer.merge()) for path, layer in found]
    for path, layer in merged:
        model.replace(path, layer)
    return model


# fmt: off
__all__ = ["AdaLoRALinear", "AdditiveBypass", "Beside", "Calibrated", "IECLinear", "IntegerLinear", "QALoRALinear", "RankAllocator",
           "VeRALinear", "add_adalora", "add_vera", "block_entropy", "correct_gradients", "freeze_A", "information_calibration",
           "loftq", "lora_ga", "lora_plus_groups", "merge", "orthogonality", "pissa"]
# fmt: on
