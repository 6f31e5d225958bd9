"""A new adapter as a weighted sum of others."""

import math
from dataclasses import replace

import numpy as np

from ..backend import array_module, whole
from .state import configs, state
from .switch import check_name, put_on
from .targets import lora_layers

# ------------------------------------------------------------------------------------------------------------------- combining
COMBINATIONS = ("cat", "svd", "linear")


def add_weighted_adapter(model, names, weights, new_name, combination_type="svd", svd_rank=None):
    """A new adapter with ΔW = Σ wᵢ sᵢ Bᵢ Aᵢ, or near it; it waits until `set_adapter` names it. Scaling 1, as in PEFT.

    "cat"     A: the wᵢ sᵢ Aᵢ on top of each other, B: the Bᵢ side by side; r = Σ rᵢ. Exact.
    "svd"     the best rank-r approximation, r = svd_rank or the largest rᵢ. Exact if r ≥ rank of the sum (Eckart–Young).
    "linear"  A = Σ ± √|wᵢsᵢ| Aᵢ, B = Σ √|wᵢsᵢ| Bᵢ, for equal ranks: B A contains Σ wᵢ sᵢ Bᵢ Aᵢ *and all cross terms* Bᵢ Aⱼ, which for
              unrelated adapters are as large as what was asked for. It is right only for a single adapter.
    PEFT turns every combination of a single adapter into "linear"; so is done here. PEFT lets the new adapter keep the
    first one's use_rslora, and so multiplies its ΔW by √r; here the scaling is 1. Adapters with DoRA, lora_bias or
    parameters trained whole are refused: their ΔW alone is not what they do.
    """
    names, weights = list(names), [float(w) for w in weights]
    if not names or len(names) != len(weights):
        raise ValueError(
            f"add_weighted_adapter: {len(names)} adapters and {len(weights)} weights; expected one weight for each"
        )
    if combination_type not in COMBINATIONS:
        raise ValueError(
            f"add_weighted_adapter: combination_type {combination_type!r}, expected one of {', '.join(COMBINATIONS)}"
        )
    if not all(math.isfinite(w) for w in weights):
        raise ValueError(f"add_weighted_adapter: the weights are {weights}, expected finite numbers")
    for name in names:
        check_name(model, name)
        c = configs(model)[name]
        if c.use_dora or c.lora_bias or any(owner == name for owner, _ in state(model).copies):
            raise ValueError(f"add_weighted_adapter: {name!r} does more than add s B A (DoRA, biases or saved modules)")
        grouped = [path for path, layer in lora_layers(model, name) if getattr(layer.base_layer, "groups", 1) > 1]
        if grouped:
            raise ValueError(
                f"add_weighted_adapter: {grouped[0]} is a grouped convolution, whose factors are no matrices"
            )
    if svd_rank is not None:
        whole("add_weighted_adapter: svd_rank", svd_rank)
    kind = "linear" if len(names) == 1 else combination_type
    ranks = [configs(model)[n].max_rank for n in names]
    unequal = [
        p for p, layer in lora_layers(model) if len({layer.bypasses[n].r for n in names if n in layer.bypasses}) > 1
    ]
    if kind == "linear" and (len(set(ranks)) > 1 or unequal):
        raise ValueError(f"add_weighted_adapter: 'linear' needs equal ranks, got {ranks}; use 'svd' or 'cat'")
    r = {"linear": ranks[0], "cat": sum(ranks), "svd": svd_rank or max(ranks)}[kind]
    first = configs(model)[names[0]]
    targets = sorted({path for n in names for path, _ in lora_layers(model, n)})
    plain = {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "bias": "none"}
    anywhere = {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
    config = replace(first, r=r, alpha=r, target_modules=tuple(targets), **plain, **anywhere)
    made = {}
    for path in targets:
        layer = model.get(path)
        parts = [(w, layer.bypasses[n]) for n, w in zip(names, weights, strict=True) if n in layer.bypasses]
        made[path] = _combine(kind, r, parts, path)
    put_on(model, new_name, config, targets)
    for path, (b, a) in made.items():
        bypass = model.get(path).bypasses[new_name]
        for factor, matrix in ((bypass.lora_B, b), (bypass.lora_A, a)):
            factor.weight.data = matrix.reshape(factor.weight.shape)
    return model


def _combine(kind, r, parts, path):
    """(B, A) as matrices (outputs × r) and (r × inputs) of Σ w s B A over parts = [(w, bypass)]; see add_weighted_adapter."""
    xp = array_module(parts[0][1].lora_A.weight.data)
    scaled = [(w * bypass.scaling, *bypass.factors()) for w, bypass in parts]
    with np.errstate(over="ignore", invalid="ignore"):
        if not all(bool(xp.isfinite(b).all() & xp.isfinite(c * a).all()) for c, b, a in scaled):
            raise ValueError(f"add_weighted_adapter: the factors of {path} hold NaN or Inf, or do with these weights")
    if kind == "linear":
        roots = [math.sqrt(abs(c)) for c, _, _ in scaled]
        b = sum(root * b for root, (_, b, _) in zip(roots, scaled, strict=True))
        a = sum(math.copysign(root, c) * a for root, (c, _, a) in zip(roots, scaled, strict=True))
    elif kind == "cat":
        b, a = xp.concatenate([b for _, b, _ in scaled], axis=1), xp.concatenate([c * a for c, _, a in scaled])
    else:
        u, s, vt = xp.linalg.svd(sum(c * (b @ a) for c, b, a in scaled), full_matrices=False)
        b, a = u[:, :r] * s[:r], vt[:r]
    full_b, full_a = xp.zeros((b.shape[0], r), np.float32), xp.zeros((r, a.shape[1]), np.float32)
    full_b[:, : b.shape[1]] = b  # a layer where a part is missing, or smaller than r, is filled with zeros
    full_a[: len(a)] = a
    return full_b, full_a
