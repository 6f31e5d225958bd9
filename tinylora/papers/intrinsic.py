"""Intrinsic dimension: train d numbers that move all D weights together, and ask how small d may be.

    θ = θ₀ + P θ_d,     P (D × d) random, ‖P_·j‖ = 1, fixed;   θ_d = 0 at the start;   ∂L/∂θ_d = Pᵀ ∂L/∂θ     (Li et al. 2018)
    θ_i = θ₀_i + λ_i (P θ_{d−m})_i                             one trained scale for each of m weights          (SAID)
    d90 = the smallest d whose score is at least 90 % of that of full training

Aghajanyan et al. 2020 found that a pre-trained language model has a small d90, which is LoRA's motivation (§4.1): if d
random directions are enough, a low-rank ΔW should be. The two are not the same thing: a random subspace is fixed before
training and touches every weight; LoRA's updates of rank r form no subspace, and training chooses their directions.

    subspace = RandomSubspace(model, d=20, seed=1)
    optimizer = AdamW(subspace.trainable(), lr=1e-2)
    loss(subspace(x), y).backward(); optimizer.step()          # 20 numbers have moved
    subspace.apply()                                           # θ₀ + P θ_d into the model, for good

P is dense, drawn once and kept: 4 D d bytes in float32 (D = 10⁵, d = 100: 40 MB). Drawing it again for each product
would save that and cost D d normals each time; Aghajanyan et al. use Fastfood transforms instead, which are left out, as
are sparse projections. Their SAID shares one λ among all weights of a layer; here each weight tensor has one.
`tape.checkpoint` inside the model is not supported: its second run would see the model's own weights. Shards in threads
work, one after the other. Move the model to its device first; P is put beside it.
"""

import threading

import numpy as np

from .. import ops
from ..backend import array_module, move
from ..nn import Module
from ..tensor import Tensor

_swapping = threading.RLock()


class RandomSubspace(Module):
    """y = model(x) at θ = θ₀ + P θ_d, with θ_d (1, d) the only parameter (and λ (1, m), if `per_weight`).

    model        a Module; its parameters with requires_grad form θ (D numbers), and are frozen here as θ₀
    d            numbers to train in all, 1 to D; with per_weight the m scales are taken out of d, as in SAID
    per_weight   train one scale λ_i, 1 at the start, on each weight tensor's part of P θ_d. Because θ_d starts at 0, λ has no gradient at
                 the first step, as A has none in LoRA
    ValueError if d does not fit. Float32.
    """

    def __init__(self, model, d, seed=0, per_weight=False):
        names, weights = zip(*model.trainable(), strict=True) if model.trainable() else ((), ())
        size, m = sum(w.size for w in weights), len(weights) * per_weight
        if not isinstance(d, (int, np.integer)) or not m < d <= size:
            raise ValueError(
                f"RandomSubspace: d = {d!r}, expected a whole number from {m + 1} to {size}, the number of trainable weights"
                + f" ({m} of d are the scales λ)" * per_weight
            )
        xp, rng = array_module(weights[0].data), np.random.default_rng(seed)
        p = rng.standard_normal((d - m, size), dtype=np.float32)  # Pᵀ: its rows are P's columns
        p /= np.linalg.norm(p, axis=1, keepdims=True)
        model.requires_grad_(False)
        self.inner, self.projection, self._weights = [model], move(p, xp), (names, weights)
        self.theta = Tensor(xp.zeros((1, d - m), np.float32), requires_grad=True)
        self.scales = Tensor(xp.ones((1, m), np.float32), requires_grad=True) if per_weight else None

    def trainable(self):
        """[(name, Tensor)]: "theta", and "scales" with per_weight."""
        return [(n, w) for n, w in (("theta", self.theta), ("scales", self.scales)) if w is not None]

    @property
    def d(self):
        """How many numbers are trained."""
        return sum(w.size for _, w in self.trainable())

    def moved(self):
        """[θ₀_i + λ_i (P θ_d)_i] for each weight, as Tensors that lead back to θ_d and λ."""
        step, out, start = ops.matmul(self.theta, self.projection), [], 0
        for i, w in enumerate(self._weights[1]):
            part = step[0, start : start + w.size].reshape(w.shape)
            out.append(w + (part if self.scales is None else part * self.scales[0, i : i + 1]))
            start += w.size
        return out

    def forward(self, *args, **kwargs):
        with _swapping:  # the weights of one model are exchanged: threads take turns
            return self._at_theta(*args, **kwargs)

    def _at_theta(self, *args, **kwargs):
        model, there = self.inner[0], dict(zip(map(id, self._weights[1]), self.moved(), strict=True))
        places = [
            (module, name, w)
            for _, module in model.named_modules()
            for name, w in vars(module).items()
            if isinstance(w, Tensor) and id(w) in there
        ]
        try:
            for module, name, w in places:
                setattr(module, name, there[id(w)])
            return model(*args, **kwargs)
        finally:
            for module, name, w in places:
                setattr(module, name, w)

    def apply(self):
        """Write θ₀ + P θ_d into the model and start again from there (θ_d = 0, λ = 1). Returns the model, its weights trainable again."""
        for w, new in zip(self._weights[1], self.moved(), strict=True):
            w.data = new.data
        for w in self._weights[1]:
            w.requires_grad = True
        self.theta.data[...] = 0
        if self.scales is not None:
            self.scales.data[...] = 1
        return self.inner[0]


def d90(scores, full, fraction=0.9):
    """The smallest d in {d: score} with score(d) ≥ fraction · full; None if there is none.   Li et al. 2018, §2.

    Of a score where more is better (accuracy), not of a loss. `full` is the score of training all weights.
    """
    if not scores or not 0 < fraction <= 1:
        raise ValueError(f"d90: expected at least one score and 0 < fraction <= 1, got {len(scores)} and {fraction}")
    return min((d for d, score in scores.items() if score >= fraction * full), default=None)
