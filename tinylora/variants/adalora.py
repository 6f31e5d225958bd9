"""AdaLoRA: singular values that all layers compete for."""

import numpy as np

from .. import backend, ops
from ..backend import array_module, whole
from ..nn import normal
from .bypass import AdditiveBypass, tensor_like, wrap


# -------------------------------------------------------------------------------------------------------------------- AdaLoRA
class AdaLoRALinear(AdditiveBypass):
    """h = W₀ x + s P Λ Q x, s = α/r.   AdaLoRA (Zhang et al. 2023, arXiv 2303.10512) eq. 3, read in a transcription.

    P (out, r), Q (r, in) ~ N(0, 0.02²), trained to be nearly orthogonal (`orthogonality`);  Lambda (r,), zeros: the first
    output is the base's. A triplet (a column of P, an entry of Λ, a row of Q) is what RankAllocator keeps or masks.
    What changes against LoRA: a rank is given up by setting one number to 0, and can come back, because P and Q stay. The
    authors' code and PEFT call P, Λ, Q lora_B, lora_E (r, 1), lora_A, and divide by r + 1e-5.
    """

    def __init__(self, base, r=12, alpha=16):
        super().__init__(base)
        r = whole("AdaLoRALinear: r", r)
        self.r, self.alpha = r, alpha
        self.P = tensor_like(base, normal((base.out_features, r), 0.02), trained=True)
        self.Lambda = tensor_like(base, np.zeros(r), trained=True)
        self.Q = tensor_like(base, normal((r, base.in_features), 0.02), trained=True)

    scaling = property(lambda self: self.alpha / self.r)

    def bypass(self, x):
        return ops.linear(ops.linear(x, self.Q) * self.Lambda, self.P) * self.scaling

    def delta(self):
        """ΔW = s P Λ Q (out, in)."""
        return (self.P.data * self.Lambda.data) @ self.Q.data * self.scaling


def add_adalora(model, r=12, alpha=16, target_modules="all-linear"):
    """Freeze the model and put an AdaLoRALinear around each target, in place; returns the model."""
    return wrap(model, target_modules, lambda layer: AdaLoRALinear(layer, r, alpha))


def _adalora_layers(model):
    found = {path: layer for path, layer in model.named_modules() if isinstance(layer, AdaLoRALinear)}
    if not found:
        raise ValueError("variants: the model carries no AdaLoRALinear; add_adalora first")
    return found


def orthogonality(model, squared=True):
    """R = Σ_k ‖P_kᵀ P_k − I‖²_F + ‖Q_k Q_kᵀ − I‖²_F as a Tensor, to be added to the loss times γ.   AdaLoRA eq. 4.

    squared=False: the mean of the norms themselves over the 2n matrices, which is what the authors' code and PEFT train with
    (γ = 0.1 in the former, 0.5 in the latter by default; the paper chooses γ from 0.1, 0.3, 0.5).
    """
    terms = []
    for layer in _adalora_layers(model).values():
        for gram in (layer.P.T @ layer.P, layer.Q @ layer.Q.T):
            off = gram - array_module(gram.data).asarray(np.eye(layer.r, dtype=gram.dtype))
            terms.append((off * off).sum() if squared else (off * off).sum().sqrt())
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total if squared else total * (1 / len(terms))


class RankAllocator:
    """S_i = s(λ_i) + mean_j s(P_ji) + mean_j s(Q_ij), s = Ī Ū: the triplets of all layers compete for one budget.   AdaLoRA eq. 6–11.

        I = |w ∂L/∂w|,   Ī ← β₁ Ī + (1 − β₁) I,   Ū ← β₂ Ū + (1 − β₂) |I − Ī|                             (eq. 8–10)
        b(t) = b(0) up to t_i;  b(T) + (b(0) − b(T)) (1 − (t − t_i)/(T − t_i − t_f))³;  b(T) from T − t_f on     (§3.3)

    target      b(T): how many singular values all layers keep together (b(0) is what they have)
    steps       T;  warmup t_i;  final t_f;  interval: a mask is chosen every so many steps (the paper: 100)
    What changes against LoRA: r is not the same for every layer, it is what the importance of its triplets earns.

    `step(t)` is called with t = 1, 2, … after backward and the optimizer's step, before zero_grad, as PEFT says (the paper
    multiplies gradient and weight of the same moment). The whole part of b(t) is the authors' code's. Ties: exactly b triplets
    are kept here; PEFT masks all that do not exceed the (b(0) − b)-th smallest. In the last t_f steps the mask stays.
    """

    def __init__(self, model, target, steps, warmup, final, interval=100, beta1=0.85, beta2=0.85):
        self.layers = _adalora_layers(model)
        self.initial, self.target = sum(layer.r for layer in self.layers.values()), target
        if not 1 <= target <= self.initial:
            raise ValueError(f"RankAllocator: target = {target}, expected 1 to {self.initial}, what the layers have")
        if not 0 <= warmup < steps - final <= steps:
            raise ValueError(f"RankAllocator: warmup = {warmup} and final = {final} leave no step of {steps} between")
        self.steps, self.warmup, self.final, self.interval = steps, warmup, final, interval
        self.betas, self.kept, self._smooth = (beta1, beta2), {}, {}

    def budget(self, t):
        """b(t), a whole number."""
        if t <= self.warmup:
            return self.initial
        if t > self.steps - self.final:
            return self.target
        left = 1 - (t - self.warmup) / (self.steps - self.warmup - self.final)
        return int(self.target + (self.initial - self.target) * left**3)

    def update(self):
        """Ī and Ū of every entry from the gradients at hand."""
        b1, b2 = self.betas
        for path, layer in self.layers.items():
            for name in ("P", "Lambda", "Q"):
                w = getattr(layer, name)
                if w.grad is None:
                    raise ValueError(f"RankAllocator: {path}.{name} has no gradient; step(t) belongs after backward")
                now = abs(w.data * w.grad)
                mean, spread = self._smooth.get((path, name), (0.0, 0.0))
                mean = b1 * mean + (1 - b1) * now
                self._smooth[path, name] = mean, b2 * spread + (1 - b2) * abs(now - mean)

    def scores(self):
        """{path: S (r,)} on the host."""
        s = {key: backend.move(mean * spread, "cpu") for key, (mean, spread) in self._smooth.items()}
        return {p: s[p, "Lambda"] + s[p, "P"].mean(axis=0) + s[p, "Q"].mean(axis=1) for p in self.layers}

    def choose(self, b):
        """Keep the b triplets of largest S; returns {path: (r,) bool}."""
        scores = self.scores()
        flat = np.concatenate([scores[path] for path in self.layers])
        keep = np.zeros(len(flat), bool)
        keep[np.argsort(-flat, kind="stable")[:b]] = True
        ends = np.cumsum([layer.r for layer in self.layers.values()])[:-1]
        self.kept = dict(zip(self.layers, np.split(keep, ends), strict=True))
        return self.kept

    def step(self, t):
        """One update of the scores, and a mask where one is due; returns b(t)."""
        b, last = self.budget(t), self.steps - self.final
        if t < last:
            self.update()
        due = self.warmup < t < last and t % self.interval == 0
        if due or t == last:
            self.choose(b)
        if due or t >= last:
            for path, keep in self.kept.items():
                w = self.layers[path].Lambda
                w.data = w.data * backend.move(keep.astype(w.dtype), array_module(w.data))
        return b

    @property
    def ranks(self):
        """{path: how many triplets it keeps}."""
        return {path: int(keep.sum()) for path, keep in self.kept.items()}
