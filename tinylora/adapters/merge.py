"""Adapters merged into the base's weights, and unmerged again: W = W₀ + s B A (LoRA §4.1)."""

from typing import NamedTuple

from ..nn import FrozenLinear, Linear
from ..tensor import Tensor
from .state import active_adapters, configs, state
from .switch import activate, check_names
from .targets import lora_layers


# --------------------------------------------------------------------------------------------------------------------- merging
def merge(model, names=None, keep=False):
    """Replace every adapted layer by its merged layer, in place; returns the model. LoRA §4.1: W = W₀ + s B A.

    names   the adapters to merge (the active ones); all others are dropped
    keep    True: `unmerge` can put everything back, bit for bit, at the price of holding W₀ beside W; a later merge without
            it gives up what an earlier one kept
    Parameters that the merged adapters trained whole stay in the model. What merging into 4 or 16 bits cost is on each
    new layer as `merge_error`, and in `merge_errors(model)`.
    """
    if not configs(model):
        raise ValueError("merge: the model carries no adapter")
    if keep and state(model).kept is not None:
        raise ValueError("merge: the base's weights of an earlier merge are kept; unmerge first, or merge without keep")
    names = check_names(model, active_adapters(model) if names is None else names)
    tied = [
        p
        for p, layer in lora_layers(model)
        if f"{p}.weight" in getattr(model, "tied_parameters", ()) and set(names) & set(layer.bypasses)
    ]
    if tied:
        raise ValueError(
            f"merge: the head reads the weight of {tied[0]} too and would change along with it; call model.untie() first"
        )
    before, flags = (
        active_adapters(model),
        [(p, p.requires_grad) for p in (*model.parameters(), *state(model).copies.values())],
    )
    activate(model, names)  # so that the biases that these adapters trained are the ones that are merged
    try:
        merged = [(path, layer.merge(names)) for path, layer in lora_layers(model)]
    except BaseException:
        activate(model, before)
        raise
    kept = Kept(before, names, lora_layers(model), dict(configs(model)), dict(state(model).copies), flags)
    for path, layer in merged:
        layer.training = model.get(path).training
        model.replace(path, layer)
    configs(model).clear()
    state(model).copies.clear()
    state(model).active = ()
    state(model).kept = kept if keep else None  # what an earlier merge kept is no longer what lies below
    return model.requires_grad_(False)


class Kept(NamedTuple):
    """What `unmerge` needs: the wrapped layers, and which adapters and parameters were what."""

    active: tuple
    merged: tuple
    layers: list
    configs: dict
    copies: dict
    flags: list


def unmerge(model):
    """Undo merge(model, keep=True): the wrapped layers with their own W₀ are put back. Nothing is subtracted."""
    kept = state(model).kept
    if kept is None:
        raise ValueError("unmerge: there is nothing to undo; only merge(model, keep=True) keeps the base's weights")
    if configs(model):
        raise ValueError(f"unmerge: the merged model carries {', '.join(configs(model))}; detach or merge that first")
    for path, layer in kept.layers:
        layer.train(model.get(path).training)
        model.replace(path, layer)
    configs(model).update(kept.configs)
    state(model).copies.update(kept.copies)
    state(model).active, state(model).kept = kept.merged, None
    activate(model, kept.active)
    for p, flag in kept.flags:
        p.requires_grad = flag
    return model


def dequantize_linears(model):
    """Replace every linear layer in few bits by a Linear with the weight that it stands for, in place; returns the model.

    It does so under adapters too. Nothing is rounded: what the model computes stays. A `merge` after it gives W = Ŵ + s B A, dense.
    """
    for path, layer in list(model.named_modules()):
        if isinstance(layer, FrozenLinear):
            dense = Linear.of(Tensor(layer.dense()), layer.bias)
            dense.training = layer.training
            model.replace(path, dense)
    return model


def merge_errors(model):
    """{path: ‖Ŵ − W‖/‖W‖} of the layers that `merge` made: 0 for dense ones, the price of rounding for 4 and 16 bits."""
    return {path: layer.merge_error for path, layer in model.named_modules() if hasattr(layer, "merge_error")}
