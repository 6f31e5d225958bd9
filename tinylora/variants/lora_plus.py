"""LoRA+: B learns at a larger rate than A."""


def lora_plus_groups(model, lr, ratio=16, weight_decay=0.0):
    """η_A = lr, η_B = ratio · lr: parameter groups for AdamW.   LoRA+ (Hayou et al. 2024, arXiv 2402.12354).

    What changes against LoRA: only the optimizer. As in the authors' code and in PEFT, whatever is trained goes to A's group
    unless it is a B or has one axis (biases, norms); these learn at B's rate, and the latter without weight decay.
    The ratio: theorem 1 (informal) says that equal rates cannot be efficient as the width n grows and η_A = Θ(1/n), η_B = Θ(1) are;
    the constant is empirical. 16 is reported for RoBERTa started from a random B and A = 0; from B = 0, as here, 4 to 8; Llama 2 to
    4. The authors' code and PEFT have no default. (The theorem and these numbers were read in notes on the paper, not in the paper.)
    What it comes to: under Adam with ε = 0 and no weight decay, ratio · α with equal rates is the same run (notebook 14), so a ratio
    helps at an α that is too small; under gradient descent it is a larger start of A (notebook 20).
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
