"""Which layers of a model can carry an adapter, which do, and what they are called."""

import re

from ..lora import LoRALayer
from .kinds import ADAPTABLE, LINEAR


# ------------------------------------------------------------------------------------------------------------ choosing layers
def find_targets(model, target_modules="all-linear"):
    """Paths of the layers that `target_modules` names.

    "all-linear"       every linear layer except lm_head (as PEFT)
    another string     a regular expression that must match the whole path
    a list             names: a whole path, or the end of one ("q_proj" means every …q_proj)
    Names and expressions may mean embeddings and convolutions too. Anything that matches nothing raises ValueError and
    lists the names that exist.
    """
    layers = adaptable_layers(model)
    linear = [path for path, layer in layers.items() if isinstance(base_of(layer), LINEAR)]
    names = sorted({path.rpartition(".")[2] for path in layers})
    if not layers:
        raise ValueError("lora: the model has no layer to adapt")
    if target_modules == "all-linear":
        if not linear:
            raise ValueError(f"lora: the model has no linear layer; it has {', '.join(names)}")
        found = [p for p in linear if p.rpartition(".")[2] != "lm_head"]
        if not found:
            raise ValueError("lora: 'all-linear' leaves lm_head out, and the model has no other linear layer; name it")
        return found
    if isinstance(target_modules, str):
        try:
            found = [p for p in layers if re.fullmatch(target_modules, p)]
        except re.error as error:
            raise ValueError(f"lora: target_modules {target_modules!r} is no regular expression: {error}") from None
        if not found:
            raise ValueError(
                f"lora: target_modules {target_modules!r} matches no layer; the layers are named {', '.join(names)} "
                f"(paths such as {next(iter(layers))})"
            )
        return found
    wanted = list(target_modules)
    if not wanted:
        raise ValueError(f"lora: target_modules is empty; the layers are {', '.join(names)}")
    for name in wanted:
        if not any(named(p, name) for p in layers):
            raise ValueError(f"lora: target module {name!r} does not exist; the layers are {', '.join(names)}")
    return [p for p in layers if any(named(p, name) for name in wanted)]


def named(path, name):
    return path == name or path.endswith("." + name)


def base_of(layer):
    """The layer itself, or what is inside its wrapper."""
    return layer.base_layer if isinstance(layer, LoRALayer) else layer


def adaptable_layers(model):
    """{path: layer} of all that can be adapted, adapted or not."""
    found, inside = {}, None
    for path, layer in model.named_modules():  # depth first: what is inside a wrapper follows it
        if path and not (inside and path.startswith(inside)) and isinstance(layer, (*ADAPTABLE, LoRALayer)):
            found[path] = layer
            inside = path + "." if isinstance(layer, LoRALayer) else None
    return found


def lora_layers(model, name=None):
    """[(path, LoRALayer)] in the model's order; with a name, those that carry that adapter."""
    found = ((path, layer) for path, layer in model.named_modules() if isinstance(layer, LoRALayer))
    return [(path, layer) for path, layer in found if name is None or name in layer.bypasses]


def plain(path):
    """A parameter's path as if its layer were not wrapped."""
    return path.replace(".base_layer.", ".")


def parents(path):
    parts = path.split(".")[:-1]
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
