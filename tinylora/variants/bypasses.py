"""Variants that put something else beside the base: VeRA (shared random factors), AdaLoRA (a budget of ranks), IEC (short cuts)."""

import math

import numpy as np

from .. import backend, ops
from ..adapters import find_targets
from ..backend import array_module
from ..lora import LINEAR, with_weight
from ..nn import Linear, Linear4bit, Linear16bit, Module, normal, stored_array, uniform
from ..tensor import Tensor


class Beside(Module):
    """h = base(x) + bypass(x), the base frozen: what VeRA, AdaLoRA and IEC share. A subclass defines `bypass` and `delta`."""

    def __init__(self, base):
        if not isinstance(base, (Linear, Linear4bit, Linear16bit)):
            raise ValueError(f"variants: a {type(base).__name__} cannot carry this bypass; expected a linear layer")
        base.requires_grad_(False)
        self.base_layer = base

    in_features = property(lambda self: self.base_layer.in_features)
    out_features = property(lambda self: self.base_layer.out_features)

    def forward(self, x):
        return self.base_layer(x) + self.bypass(x)

    def merge(self):
        """A new layer of the base's kind with W₀ + ΔW; a 4-bit or 16-bit base is rounded anew (see LoRALayer.merge)."""
        return with_weight(self.base_layer, self.base_layer.dense() + self.delta(), self.base_layer.bias)


def linear_like(like, weight):
    """A frozen Linear with this weight and the bias of `like`, on its device."""
    layer = Linear.__new__(Linear)
    layer.weight, layer.bias = tensor_like(like, weight), None if like.bias is None else Tensor(like.bias.data)
    return layer


def tensor_like(like, array, trained=False):
    """An array as a Tensor on the device where the layer `like` lives; float32 unless it is float64 already there."""
    xp = array_module(stored_array(like.weight))
    dtype = like.weight.dtype if isinstance(like.weight, Tensor) else np.float32
    return Tensor(backend.move(np.asarray(backend.move(array, "cpu"), dtype), xp), requires_grad=trained)


def _wrap(model, target_modules, make):
    """Freeze the model and put make(layer) in the place of each target."""
    if any(isinstance(layer, Beside) for _, layer in model.named_modules()):
        raise ValueError("variants: the model carries such a bypass already; merge it first")
    targets = {path: model.get(path) for path in find_targets(model, target_modules)}
    for path, layer in targets.items():
        if not isinstance(layer, LINEAR):
            raise ValueError(f"variants: {path} is a {type(layer).__name__}; expected a linear layer without a bypass")
    new = {path: make(layer) for path, layer in targets.items()}
    model.requires_grad_(False)
    for path, layer in new.items():
        model.replace(path, layer)
    return model


class VeRALinear(Beside):
    """h = W₀ x + Λ_b B Λ_d A x, Λ_b = diag(λ_b), Λ_d = diag(λ_d).   VeRA (Kopiczko et al. 2023, arXiv 2310.11454).

    A, B        Tensors (r, ≥ in) and (≥ out, r), frozen, shared by all layers; this layer uses A[:, :in] and B[:out]
    lambda_b    (out,), zeros: the first output is the base's;  lambda_d (r,), all d_initial
    What changes against LoRA: out + r parameters a layer instead of r (in + out), so r can be large; no α/r; A and B need
    not be stored, their seed suffices. (Equation read in several notes that agree, the slices and the 0.1 in PEFT.)
    """

    def __init__(self, base, A, B, d_initial=0.1):
        super().__init__(base)
        if A.shape[1] < base.in_features or B.shape[0] < base.out_features or A.shape[0] != B.shape[1]:
            raise ValueError(
                f"VeRALinear: A {A.shape} and B {B.shape} are too small for a layer of {base.in_features} inputs and "
                f"{base.out_features} outputs"
            )
        self.vera_A, self.vera_B = A, B
        self.lambda_b = tensor_like(base, np.zeros(base.out_features), trained=True)
        self.lambda_d = tensor_like(base, np.full(A.shape[0], d_initial), trained=True)

    def _slices(self):
        return self.vera_A.data[:, : self.in_features], self.vera_B.data[: self.out_features]

    def bypass(self, x):
        a, b = self._slices()
        return ops.linear(ops.linear(x, a) * self.lambda_d, b) * self.lambda_b

    def delta(self):
        """ΔW = Λ_b B Λ_d A (out, in)."""
        a, b = self._slices()
        return (self.lambda_b.data[:, None] * b) @ (self.lambda_d.data[:, None] * a)


def add_vera(model, r=256, seed=0, target_modules="all-linear", d_initial=0.1):
    """Freeze the model and put a VeRALinear around each target, in place, all with one pair A, B; returns the model.

    A (r, largest in) and B (largest out, r) ~ U(−√(6/fan_in), √(6/fan_in)), fan_in the last axis: Kaiming's uniform for
    ReLU, as PEFT draws it, from a generator of its own (`seed`; the numbers are not torch's). Trained: Σ (out + r).
    """
    if r < 1:
        raise ValueError(f"add_vera: r = {r}, expected a whole number, 1 or more")
    targets = [model.get(path) for path in find_targets(model, target_modules)]
    rng = np.random.default_rng(seed)
    shapes = (r, max(t.in_features for t in targets)), (max(t.out_features for t in targets), r)
    a, b = (tensor_like(targets[0], rng.uniform(-1, 1, shape) * math.sqrt(6 / shape[1])) for shape in shapes)
    return _wrap(model, target_modules, lambda layer: VeRALinear(layer, a, b, d_initial))


# -------------------------------------------------------------------------------------------------------------------- AdaLoRA
class AdaLoRALinear(Beside):
    """h = W₀ x + s P Λ Q x, s = α/r.   AdaLoRA (Zhang et al. 2023, arXiv 2303.10512) eq. 3, read in a transcription.

    P (out, r), Q (r, in) ~ N(0, 0.02²), trained to be nearly orthogonal (`orthogonality`);  Lambda (r,), zeros: the first
    output is the base's. A triplet (a column of P, an entry of Λ, a row of Q) is what RankAllocator keeps or masks.
    What changes against LoRA: a rank is given up by setting one number to 0, and can come back, because P and Q stay. The
    authors' code and PEFT call P, Λ, Q lora_B, lora_E (r, 1), lora_A, and divide by r + 1e-5.
    """

    def __init__(self, base, r=12, alpha=16):
        super().__init__(base)
        if r < 1:
            raise ValueError(f"AdaLoRALinear: r = {r}, expected a whole number, 1 or more")
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
    return _wrap(model, target_modules, lambda layer: AdaLoRALinear(layer, r, alpha))


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


# ------------------------------------------------------------------------------------------------------------------------ IEC
class IECLinear(Beside):
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
