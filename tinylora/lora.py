"""LoRA: a frozen layer and a low-rank bypass around it.

    h = W₀ x + s B A x,     s = α/r,     A (r × in) random,  B (out × r) = 0                      (LoRA eq. 3 and §4.1)

B starts at zero, so an adapted model computes what its base computes, bit for bit, until the first step; at that step B
has a gradient and A has none (∂L/∂A = s Bᵀ G). QLoRA is the same bypass around a 4-bit layer (QLoRA eq. 5; the s that
eq. 3 has and eq. 5 lacks is applied, as in the authors' code).

    add_lora(model, r=8, alpha=16)      freeze the model and put a bypass on its linear layers
    merge(model)                        W₀ + s B A as plain layers again
    detach(model) / attach(model, a)    take the adapter off; put it, or another one, on

Compared with PEFT: one adapter at a time, the factors are called the same and stored the same (see interop.peft), the
scale is applied last, merging makes a new layer and leaves W₀ alone (float32 subtraction would not restore it).
Compared with loralib: eval() changes no weight.
"""

import math
import re
from dataclasses import dataclass

import numpy as np

from . import backend, ops
from .dtypes import BFloat16Array
from .nn import Linear, Linear4bit, Linear16bit, Module, normal, stored_array, uniform
from .quant import QuantizedTensor, quantize_like
from .tensor import Tensor

ADAPTABLE = (Linear, Linear4bit, Linear16bit)


@dataclass(frozen=True)
class LoRAConfig:
    """r, alpha, dropout and the modules that carry a bypass (as given to `add_lora`)."""

    r: int = 8
    alpha: float = 16
    dropout: float = 0.0
    target_modules: str | tuple = "all-linear"

    def __post_init__(self):
        if not isinstance(self.r, (int, np.integer)) or self.r < 1:
            raise ValueError(f"lora: r = {self.r!r}, expected a whole number, 1 or more")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora: dropout = {self.dropout}, expected 0 <= dropout < 1")


class LoRALinear(Module):
    """h = base(x) + s B(A(dropout(x))), s = α/r.   LoRA eq. 3; scale last, as PEFT computes it.

    base     a Linear (frozen here), Linear4bit or Linear16bit; kept as `base_layer`
    init     A "kaiming": U(−1/√in, 1/√in), which loralib and PEFT use;  "gaussian": N(0, 1/r²), the paper's wording with PEFT's variance
    """

    def __init__(self, base, r=8, alpha=16, dropout=0.0, init="kaiming"):
        config = LoRAConfig(r, alpha, dropout)
        if init not in ("kaiming", "gaussian"):
            raise ValueError(f"lora: init {init!r} is unknown: expected 'kaiming' or 'gaussian'")
        base.requires_grad_(False)
        self.base_layer, self.r, self.alpha, self.dropout = base, config.r, alpha, dropout
        self.lora_A, self.lora_B = Linear(base.in_features, r), Linear(r, base.out_features)
        a = (
            uniform((r, base.in_features), 1 / math.sqrt(base.in_features))
            if init == "kaiming"
            else normal((r, base.in_features), 1 / r)
        )
        like = backend.array_module(stored_array(base.weight))
        self.lora_A.weight = Tensor(backend.move(a, like), requires_grad=True)
        self.lora_B.weight = Tensor(like.zeros((base.out_features, r), np.float32), requires_grad=True)

    in_features = property(lambda self: self.base_layer.in_features)
    out_features = property(lambda self: self.base_layer.out_features)
    scaling = property(lambda self: self.alpha / self.r)

    def forward(self, x):
        h = ops.dropout(x, self.dropout) if self.training else x
        return self.base_layer(x) + self.lora_B(self.lora_A(h)) * self.scaling

    def delta(self):
        """ΔW = s B A as an array (out, in). LoRA §4.1."""
        return (self.lora_B.weight.data @ self.lora_A.weight.data) * self.scaling

    def merge(self):
        """A new layer of the base's kind with W = W₀ + s B A; the base and the factors stay as they are.

        A 4-bit base is dequantized, added to and quantized again with the same settings. What that costs is on the new
        layer: `merge_error` = ‖Ŵ − (W₀ + ΔW)‖ / ‖W₀ + ΔW‖ (Frobenius).
        """
        base, wanted = self.base_layer, self.base_layer.dense() + self.delta()
        if isinstance(base, Linear):
            layer = Linear(1, 1)
            layer.weight, layer.bias = Tensor(wanted), base.bias
            layer.merge_error = 0.0
            return layer
        old = base.weight
        if isinstance(old, QuantizedTensor):
            layer = Linear4bit(quantize_like(wanted, old), base.bias, base.compute_dtype)
        else:
            layer = Linear16bit(BFloat16Array.of(wanted), base.bias, base.compute_dtype)
        difference = layer.dense() - wanted
        layer.merge_error = math.sqrt(
            float((difference * difference).sum()) / max(float((wanted * wanted).sum()), 1e-30)
        )
        return layer


# ------------------------------------------------------------------------------------------------------------ choosing layers
def find_targets(model, target_modules="all-linear"):
    """Paths of the linear layers that `target_modules` names.

    "all-linear"       every linear layer except lm_head (as PEFT)
    another string     a regular expression that must match the whole path
    a list             names: a whole path, or the end of one ("q_proj" means every …q_proj)
    Anything that matches nothing raises ValueError and lists the names that exist.
    """
    paths = [path for path, layer in model.named_modules() if isinstance(layer, ADAPTABLE) and not _inside_lora(path)]
    names = sorted({path.rpartition(".")[2] for path in paths})
    if not paths:
        raise ValueError("lora: the model has no linear layer to adapt (are adapters on it already?)")
    if target_modules == "all-linear":
        return [p for p in paths if p.rpartition(".")[2] != "lm_head"]
    if isinstance(target_modules, str):
        try:
            found = [p for p in paths if re.fullmatch(target_modules, p)]
        except re.error as error:
            raise ValueError(f"lora: target_modules {target_modules!r} is no regular expression: {error}") from None
        if not found:
            raise ValueError(
                f"lora: target_modules {target_modules!r} matches no layer; the layers are named {', '.join(names)} "
                f"(paths such as {paths[0]})"
            )
        return found
    wanted = list(target_modules)
    if not wanted:
        raise ValueError(f"lora: target_modules is empty; the linear layers are {', '.join(names)}")
    for name in wanted:
        if not any(_named(p, name) for p in paths):
            raise ValueError(f"lora: target module {name!r} does not exist; the linear layers are {', '.join(names)}")
    return [p for p in paths if any(_named(p, name) for name in wanted)]


def _named(path, name):
    return path == name or path.endswith("." + name)


def named(model, names):
    """{paths of linear layers, adapted or not, that the names mean}."""
    layers = (path for path, layer in model.named_modules() if isinstance(layer, (*ADAPTABLE, LoRALinear)))
    return {path for path in layers if not _inside_lora(path) and any(_named(path, name) for name in names)}


def _inside_lora(path):
    return any(part in ("base_layer", "lora_A", "lora_B") for part in path.split("."))


def adapters(model):
    """[(path, LoRALinear)] in the model's order."""
    return [(path, layer) for path, layer in model.named_modules() if isinstance(layer, LoRALinear)]


# ------------------------------------------------------------------------------------------------------ on, off, and for good
def add_lora(model, r=8, alpha=16, dropout=0.0, target_modules="all-linear", init="kaiming"):
    """Freeze the model and put a LoRALinear around each target, in place; returns the model. See `find_targets`, LoRALinear."""
    if not isinstance(target_modules, str):
        target_modules = tuple(sorted(set(target_modules)))  # a set to PEFT; sorted, so that files are reproducible
    config = LoRAConfig(r, alpha, dropout, target_modules)
    if adapters(model):
        raise ValueError("lora: the model carries an adapter already; detach or merge it first")
    targets = find_targets(model, target_modules)
    model.requires_grad_(False)
    for path in targets:
        model.replace(path, LoRALinear(model.get(path), r, alpha, dropout, init))
    model.lora_config = config
    return model


@dataclass(frozen=True)
class Adapter:
    """An adapter off its model: the config, and {path: (A, B)} arrays."""

    config: LoRAConfig
    weights: dict

    @property
    def nbytes(self):
        return sum(a.nbytes + b.nbytes for a, b in self.weights.values())


def detach(model):
    """Take the adapter off: the model computes what its base computes again. Returns an Adapter."""
    found = adapters(model)
    if not found:
        raise ValueError("lora: the model carries no adapter")
    weights = {path: (layer.lora_A.weight.data, layer.lora_B.weight.data) for path, layer in found}
    for path, layer in found:
        model.replace(path, layer.base_layer)
    config, model.lora_config = model.lora_config, None
    return Adapter(config, weights)


def attach(model, adapter):
    """Put an Adapter on a model that carries none. Every path and shape is checked before anything changes."""
    if adapters(model):
        raise ValueError("lora: the model carries an adapter already; detach or merge it first")
    c = adapter.config
    if not adapter.weights:
        raise ValueError("lora: the adapter holds no weights")
    existing = {path: layer for path, layer in model.named_modules() if isinstance(layer, ADAPTABLE)}
    for path, (a, b) in adapter.weights.items():
        if path not in existing:
            names = sorted({p.rpartition(".")[2] for p in existing})
            raise ValueError(
                f"lora: the adapter has weights for {path}, which the model lacks; its layers are {', '.join(names)}"
            )
        expected = (c.r, existing[path].in_features), (existing[path].out_features, c.r)
        if (a.shape, b.shape) != expected:
            raise ValueError(
                f"lora: the adapter's A and B for {path} are {a.shape} and {b.shape}; "
                f"this model with r = {c.r} needs {expected[0]} and {expected[1]}"
            )
    model.requires_grad_(False)
    for path, (a, b) in adapter.weights.items():
        layer = LoRALinear(existing[path], c.r, c.alpha, c.dropout)
        like = backend.array_module(layer.lora_A.weight.data)
        layer.lora_A.weight.data, layer.lora_B.weight.data = (backend.move(x.astype(np.float32), like) for x in (a, b))
        model.replace(path, layer)
    model.lora_config = c
    return model


def merge(model):
    """Replace every LoRALinear by its merged layer, in place; returns the model. See LoRALinear.merge for a 4-bit base."""
    for path, layer in [(path, layer.merge()) for path, layer in adapters(model)]:
        model.replace(path, layer)
    model.lora_config = None
    return model


# -------------------------------------------------------------------------------------------------------------------- counting
def count_parameters(model):
    """(trainable, all): packed 4-bit weights count as the weights they stand for."""
    weights = [w for _, w in model.named_weights()]
    return sum(w.size for w in weights if isinstance(w, Tensor) and w.requires_grad), sum(w.size for w in weights)


def trainable_parameters(model):
    """The line that PEFT prints: trainable params: … || all params: … || trainable%: …"""
    trainable, total = count_parameters(model)
    return f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"


def print_trainable_parameters(model):
    """Print `trainable_parameters(model)`."""
    print(trainable_parameters(model))


# fmt: off
__all__ = ["LoRAConfig", "LoRALinear", "Adapter", "add_lora", "attach", "detach", "merge", "adapters", "find_targets",
           "count_parameters", "trainable_parameters", "print_trainable_parameters"]
# fmt: on
