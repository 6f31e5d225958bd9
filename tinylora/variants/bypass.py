"""What VeRA, AdaLoRA and IR-QLoRA's short cuts share: something else beside a frozen base."""

import numpy as np

from .. import backend
from ..adapters.kinds import LINEAR
from ..adapters.targets import find_targets
from ..backend import array_module
from ..lora import with_weight
from ..nn import Linear, Module, stored_array
from ..tensor import Tensor


class AdditiveBypass(Module):
    """h = base(x) + bypass(x), the base frozen: what VeRA, AdaLoRA and IEC share. A subclass defines `bypass` and `delta`."""

    def __init__(self, base):
        if not isinstance(base, LINEAR):
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
    return Linear.of(tensor_like(like, weight), None if like.bias is None else Tensor(like.bias.data))


def tensor_like(like, array, trained=False):
    """An array as a Tensor on the device where the layer `like` lives; float32 unless it is float64 already there."""
    xp = array_module(stored_array(like.weight))
    dtype = like.weight.dtype if isinstance(like.weight, Tensor) else np.float32
    return Tensor(backend.move(np.asarray(backend.move(array, "cpu"), dtype), xp), requires_grad=trained)


def wrap(model, target_modules, make):
    """Freeze the model and put make(layer) in the place of each target."""
    if any(isinstance(layer, AdditiveBypass) for _, layer in model.named_modules()):
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
