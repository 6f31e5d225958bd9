"""The planted task and the training loop that the experiments share.

    y = (W₀ + ΔW) x + σ ε,     x ~ N(0, I),  ε ~ N(0, I)

W₀ is known and frozen, ΔW is planted with singular values of our choice, and the layer under test starts at W₀. Because x is
white, the error on unseen data needs no sample:

    E|W x − y|² / d_out = ‖W − W₀ − ΔW‖²_F / d_out + σ²
"""

import math

import numpy as np

from ... import backend, nn
from ...lora import LoRALinear
from ...optim import AdamW
from ...tensor import Tensor
from ...training.schedule import schedule


class Planted:
    """A linear regression with a planted update.   w0, delta (d, d); x, y (n, d) float32; noise σ.

    singular    singular values of ΔW, or "full": a Gaussian matrix with ‖ΔW‖_F = √(3² + 2²)
    directions  (U, V) with the planted vectors as columns; random orthonormal ones by default
    """

    def __init__(self, singular=(3.0, 2.0), d=96, n=4096, noise=0.05, seed=0, w0=None, directions=None):
        rng = np.random.default_rng([seed, d, n])
        self.d, self.noise = d, noise
        self.w0 = rng.standard_normal((d, d)) / math.sqrt(d) if w0 is None else w0
        if isinstance(singular, str):
            self.delta = rng.standard_normal((d, d)) * (math.sqrt(13) / d)
        else:
            k = len(singular)
            u, v = (orthonormal(rng, d, k), orthonormal(rng, d, k)) if directions is None else directions
            self.delta = u * np.asarray(singular) @ v.T
        self.x = rng.standard_normal((n, d)).astype(np.float32)
        clean = self.x @ (self.w0 + self.delta).T
        self.y = (clean + noise * rng.standard_normal((n, d))).astype(np.float32)

    def base(self):
        """A linear layer that holds W₀."""
        return linear(self.w0)

    def adapted(self, r, alpha=16, seed=0):
        """A LoRALinear around W₀, with A drawn from its own seed."""
        with backend.using_generator(np.random.default_rng([seed, r])):
            return LoRALinear(self.base(), r=r, alpha=alpha)

    def mse(self, w):
        """‖W − W₀ − ΔW‖²_F / d + σ²: the mean squared error of W on unseen data. -> float"""
        difference = w - self.w0 - self.delta
        return float((difference * difference).sum() / self.d) + self.noise**2

    def tail(self, r):
        """Σ_{i>r} σᵢ² / d + σ²: the least error of any update of rank r (Eckart and Young). -> float"""
        sigma = np.linalg.svd(self.delta, compute_uv=False)
        return float((sigma[r:] ** 2).sum() / self.d) + self.noise**2


def orthonormal(rng, d, k):
    """k orthonormal columns of length d, uniformly distributed."""
    return np.linalg.qr(rng.standard_normal((d, k)))[0]


def linear(w, trainable=False):
    """A Linear without bias that holds the array w (out, in) as float32."""
    with backend.using_generator(np.random.default_rng(0)):  # the weight drawn here is thrown away
        layer = nn.Linear(1, 1)
    layer.weight = Tensor(np.array(w, np.float32), requires_grad=trainable)
    return layer


def adapt(model, names, r, alpha=16, seed=0):
    """Freeze the model and put a LoRALinear around the linear layers at these paths, in place; returns the model."""
    model.requires_grad_(False)
    with backend.using_generator(np.random.default_rng([seed, r])):
        for name in names:
            model.replace(name, LoRALinear(model.get(name), r=r, alpha=alpha))
    return model


def squared_error(prediction, y):
    """mean (ŷ − y)² over all entries, as a Tensor."""
    difference = prediction - y
    return (difference * difference).mean()


def fit(model, x, y, steps=200, lr=0.01, batch=256, seed=0, loss=squared_error, kind="cosine"):
    """Train what is trainable with AdamW, on batches drawn without replacement in an epoch. -> the losses, a list of floats

    kind    "cosine": the rate falls to 0 along half a cosine;  "constant"
    """
    optimizer = AdamW([w for _, w in model.trainable()], lr=lr)
    rng, order, losses = np.random.default_rng([seed, 7]), [], []
    for step in range(steps):
        if len(order) < min(batch, len(x)):
            order = rng.permutation(len(x))
        rows, order = order[:batch], order[batch:]
        value = loss(model(x[rows]), y[rows])
        losses.append(value.item())
        value.backward()
        optimizer.step(schedule(kind, step, steps, floor=0.0))
        optimizer.zero_grad()
    return losses


def weight(layer):
    """The weight that the layer stands for: W₀ + s B A if it is adapted. -> float64 array (out, in)"""
    w = layer.base_layer.dense() + layer.delta() if isinstance(layer, LoRALinear) else layer.dense()
    return np.asarray(w, np.float64)
