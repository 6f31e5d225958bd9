"""VeRA: two random factors, frozen and shared by all layers, between two trained vectors."""

import math

import numpy as np

from .. import ops
from ..adapters.targets import find_targets
from ..backend import whole
from .bypass import AdditiveBypass, tensor_like, wrap


class VeRALinear(AdditiveBypass):
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
    r = whole("add_vera: r", r)
    targets = [model.get(path) for path in find_targets(model, target_modules)]
    rng = np.random.default_rng(seed)
    shapes = (r, max(t.in_features for t in targets)), (max(t.out_features for t in targets), r)
    a, b = (tensor_like(targets[0], rng.uniform(-1, 1, shape) * math.sqrt(6 / shape[1])) for shape in shapes)
    return wrap(model, target_modules, lambda layer: VeRALinear(layer, a, b, d_initial))
