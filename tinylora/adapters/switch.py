"""Adapters put on a model, switched, given to single rows of a batch, and taken off."""

import contextlib
import copy
import functools
import re
from dataclasses import replace

import numpy as np

from .. import ops
from ..backend import array_module, move
from ..lora import LoRALayer
from ..nn import stored_array
from ..tensor import Tensor
from .config import BASE, Adapter, LoRAConfig, matches
from .kinds import bypass_for, factor_shapes, lora_layer
from .patterns import Work
from .state import active_adapters, configs, state
from .targets import HEAD, adaptable_layers, base_of, lora_layers, own_weights, saved_whole, select


# --------------------------------------------------------------------------------------------------------------- add and switch
def add_lora(
    model, r=8, alpha=16, dropout=0.0, target_modules="all-linear", init="kaiming", *, name="default", **options
):
    """Put an adapter on the model, in place; returns the model. options: the other fields of LoRAConfig.

    The first adapter freezes the base, computes and is trained. A further one waits, frozen, until `set_adapter` names it
    (as PEFT's add_adapter). Nothing changes if anything does not fit. `find_targets` says what exclude_modules and
    layers_to_transform mean.
    """
    if isinstance(target_modules, (list, tuple, set, frozenset)) and all(isinstance(t, str) for t in target_modules):
        target_modules = tuple(sorted(set(target_modules)))  # a set to PEFT; sorted, so that files are reproducible
    elif not isinstance(target_modules, str):
        raise ValueError(
            f"lora: target_modules = {target_modules!r}, expected 'all-linear', a regular expression, or a list of names"
        )
    config = LoRAConfig(r, alpha, dropout, target_modules, init, **options)
    if config.brought:
        raise ValueError(
            "lora: trainable_token_indices and saved_embeddings are read from PEFT's files and cannot be trained here; "
            "modules_to_save trains a whole embedding"
        )
    targets = select(model, config)
    unused = [*config.rank_pattern, *config.alpha_pattern]
    for path in targets if unused else ():
        work = Work()
        unused = [key for key in unused if not matches(key, path, work)]
    if unused:
        raise ValueError(
            f"lora: the pattern {unused[0]!r} matches none of the adapted layers ({', '.join(targets[:3])}, …)"
        )
    return put_on(model, name, config, targets)


def put_on(model, name, config, targets):
    """Wrap or extend the layers at the paths `targets`, copy what is to be trained whole, and activate a first adapter."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name) or name == BASE:
        raise ValueError(f"lora: an adapter cannot be called {name!r} (letters, digits, - and _, and not {BASE!r})")
    if name in configs(model):
        raise ValueError(
            f"lora: the model carries an adapter already that is called {name!r}; give another name, or detach or merge it first"
        )
    layers, first = adaptable_layers(model), not configs(model)
    whole = trained_whole(model, config, targets)
    both = [t for t in targets if f"{t}.weight" in whole]
    if both:
        raise ValueError(
            f"lora: {both[0]} is a target and among modules_to_save; it can have a bypass or be trained whole"
        )
    copies = {(name, path): Tensor(w.data.copy()) for path, w in whole.items()}
    with _active(
        model, ()
    ):  # the base's own parameters are in place: DoRA starts from its norms, and a wrapper freezes its base
        made = {
            path: bypass_for(base_of(layers[path]))(base_of(layers[path]), **config.options(path)) for path in targets
        }
        wrappers = {
            path: layers[path]
            if isinstance(layers[path], LoRALayer)
            else lora_layer(layers[path], name=name, bypass=bypass)
            for path, bypass in made.items()
        }
    if first:
        model.requires_grad_(False)
    for path, wrapper in wrappers.items():
        if wrapper is not layers[path]:
            wrapper.training, wrapper.active = layers[path].training, ()
            model.replace(path, wrapper)
        wrapper.bypasses[name] = made[path].requires_grad_(False).train(wrapper.training)
    state(model).copies.update(copies)
    configs(model)[name] = config
    return set_adapter(model, name) if first else model


def trained_whole(model, config, targets):
    """{path: the base's Tensor} of the parameters that the config wants trained whole."""
    weights = own_weights(model)
    own = {path: w for path, w in weights.items() if isinstance(w, Tensor)}
    found = {}
    if config.bias != "none":
        biases = {p: w for p, w in own.items() if p.rpartition(".")[2] == "bias"}
        found |= {p: w for p, w in biases.items() if config.bias == "all" or p.removesuffix(".bias") in targets}
    for wanted in config.modules_to_save:
        here = {path: w for path, w in weights.items() if saved_whole(path, (wanted,))}
        if stored := sorted(here.keys() - own.keys()):
            raise ValueError(
                f"lora: modules_to_save names {wanted!r}, but {stored[0]} is stored in few bits and cannot be trained"
            )
        if not here:
            raise ValueError(
                f"lora: modules_to_save names {wanted!r}, which is no module with parameters of this model"
            )
        found |= here
    tied = [p for p in found if p in getattr(model, "tied_parameters", ())]
    if tied and not config.ensure_weight_tying:
        raise ValueError(
            f"lora: {tied[0]} is tied to the model's head, which would change along with it (in PEFT it would not); "
            "call model.untie() first"
        )
    return found


def untie(model):
    """Give a model whose head is its embedding (tied) a head of its own with the same values; returns the model.

    Adapters that bring an embedding along bring the head then, too. One that trains it stands in the way.
    """
    tied, copies = getattr(model, "tied_parameters", ()), state(model).copies
    users = [(owner, path) for owner, path in copies if path in tied and owner != BASE]
    for owner, path in users:
        if path not in configs(model)[owner].brought:
            raise ValueError(
                f"lora: the adapter {owner!r} trains {path} for the embedding and the head, and so they cannot be parted"
            )
    with disable_adapter(model):
        model.untie()
    for owner, path in users:
        copies[owner, HEAD] = Tensor(copies[owner, path].data)
        config = configs(model)[owner]
        configs(model)[owner] = replace(config, saved_embeddings=(*config.saved_embeddings, HEAD))
    activate(model, active_adapters(model))
    return model


@contextlib.contextmanager
def untied(model):
    """Untie the model for good if the block ends well; after an error its head is its embedding as before. See `untie`."""
    known, config = state(model), model.config
    before = dict(known.configs), dict(known.copies)
    try:
        untie(model)
        yield model
    except BaseException:
        model.lm_head, model.config = None, config
        for now, then in zip((known.configs, known.copies), before, strict=True):
            now.clear()
            now.update(then)
        raise


def set_adapter(model, names, inference_mode=False):
    """Let these adapters (a name, or a list whose bypasses add up) compute; they alone are trained unless inference_mode.

    Adapters that train parameters whole (`bias`, `modules_to_save`) cannot be active beside each other.
    """
    names = activate(model, names)
    for _, layer in lora_layers(model):
        for name, bypass in layer.bypasses.items():
            for p in bypass.parameters():
                p.requires_grad = name in names and not inference_mode
    for (owner, path), tensor in state(model).copies.items():
        if owner != BASE:
            trained = path not in configs(model)[owner].brought
            tensor.requires_grad = trained and owner in names and not inference_mode
    return model


def activate(model, names):
    """Let these adapters compute, and leave alone what is trained; returns the names. Everything is checked first."""
    names = check_names(model, names)
    copies = state(model).copies
    wanted = [key for key in copies if key[0] in names]
    if len({path for _, path in wanted}) < len(wanted):
        raise ValueError(
            f"lora: of {', '.join(names)} more than one trains the same parameters whole; activate one of them"
        )
    for _, layer in lora_layers(model):
        layer.active = tuple(n for n in names if n in layer.bypasses)
        _route(layer, None)
    for key in [key for key in copies if key[0] == BASE]:
        _place(model, key[1], copies.pop(key))
    for owner, path in wanted:
        copies[BASE, path] = _place(model, path, copies[owner, path])
    state(model).active = names
    return names


def _place(model, path, tensor):
    """Let this Tensor be the parameter at the path; returns the one that was."""
    parent, _, leaf = path.rpartition(".")
    module = base_of(model.get(parent))
    before = getattr(module, leaf)
    setattr(module, leaf, tensor)
    return before


def check_names(model, names):
    """The names of adapters of the model (one, or several) as a tuple, each once."""
    try:
        names = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
    except TypeError:
        raise ValueError(f"lora: {names!r}, expected the name of an adapter or a list of names") from None
    for name in names:
        check_name(model, name)
    return names


def check_name(model, name):
    if not isinstance(name, str) or name not in configs(model):
        there = ", ".join(configs(model)) or "none"
        raise ValueError(f"lora: the model carries no adapter called {name!r}; it carries {there}")


@contextlib.contextmanager
def _active(model, names, rows=None):
    """Within the block these adapters compute, or with rows each row's own; afterwards those of before that are still there."""
    before = active_adapters(model)
    routes = {id(layer): vars(layer).get("forward") for _, layer in lora_layers(model)}
    activate(model, names)
    for _, layer in lora_layers(model):
        _route(layer, None if rows is None else functools.partial(_by_rows, layer, rows))
    try:
        yield model
    finally:
        activate(model, [n for n in before if n in configs(model)])
        for _, layer in lora_layers(model):
            _route(layer, routes.get(id(layer)))


def _route(layer, forward):
    """Let this function be the layer's forward; None: take such a one off."""
    if getattr(vars(layer).get("forward"), "func", None) is _by_rows:
        del layer.forward
    if forward is not None:
        layer.forward = forward


def _by_rows(layer, rows, x):
    """Row i of the batch through the adapter rows[i]: one product with the base, one small one an adapter."""
    if len(rows) != len(x):
        raise ValueError(f"lora: {len(rows)} adapter names for a batch of {len(x)} rows")
    y, parts, order = layer.base_layer(x), [], []
    for name in dict.fromkeys(rows):
        mine = [i for i, n in enumerate(rows) if n == name]
        order += mine
        mine = array_module(y.data).asarray(mine)
        part = y[mine]
        if name in layer.bypasses:
            part = part + layer.bypasses[name](x[mine], layer.base_layer, part)
        parts.append(part)
    return ops.concatenate(parts)[array_module(y.data).asarray(np.argsort(order))]


def disable_adapter(model):
    """Within the block the model computes what its base computes, bit for bit; biases and saved modules included.

    With gradient checkpointing run the backward pass inside the block too: it computes each block anew, with the adapters
    that are active then. The same holds for `adapter_rows`.
    """
    return _active(model, ())


@contextlib.contextmanager
def adapter_rows(model, names):
    """Within the block, row i of a batch goes through the adapter names[i]; "__base__" is the base alone.

    h_i = W₀ x_i + s_i B_i A_i x_i: one product with W₀ for the whole batch, one small one for each adapter. This is what
    merging makes impossible (LoRA §4.2), and what PEFT does with `adapter_names`; DoRA works here as well. Adapters that
    train parameters whole are refused.
    """
    names = list(names)
    for name in check_names(model, [n for n in names if n != BASE]):
        if any(owner == name for owner, _ in state(model).copies):
            raise ValueError(f"lora: {name!r} trains parameters whole, so it cannot be one of several in a batch")
    with _active(model, (), names):
        yield model


def delete_adapter(model, name):
    """Take an adapter off for good. If it was active alone, the first in the alphabet of those that remain becomes active (as in PEFT).

    A layer that pissa or lora_ga started keeps the base that they left: W without the part that was in the factors.
    """
    check_name(model, name)
    _take_off(model, name)
    return model


# ------------------------------------------------------------------------------------------------------------------ off and on
def detach(model, name=None):
    """Take an adapter off (without a name, the only one); returns an Adapter. With none left the model is its plain base."""
    if not configs(model):
        raise ValueError("lora: the model carries no adapter")
    if name is None and len(configs(model)) > 1:
        raise ValueError(f"lora: the model carries {', '.join(configs(model))}; say which one")
    name = next(iter(configs(model))) if name is None else name
    check_name(model, name)
    off = adapter_of(model, name)
    _take_off(model, name)
    return off


def _take_off(model, name):
    """Remove an adapter; if it was active alone, activate the first in the alphabet of the others."""
    alone = active_adapters(model) == (name,)
    activate(model, [n for n in active_adapters(model) if n != name])
    for key in [key for key in state(model).copies if key[0] == name]:
        del state(model).copies[key]
    for path, layer in lora_layers(model, name):
        del layer.bypasses[name]
        if not layer.bypasses:
            model.replace(path, layer.base_layer)
    del configs(model)[name]
    if alone and configs(model):
        set_adapter(model, min(configs(model)))


def adapter_of(model, name=None):
    """The Adapter (config and arrays, not copies) under a name, still on the model; without a name the active one."""
    if not configs(model):
        raise ValueError("lora: the model carries no adapter")
    if name is None and len(active_adapters(model)) != 1:
        raise ValueError(f"lora: the model carries {', '.join(configs(model))}; say which one")
    name = active_adapters(model)[0] if name is None else name
    check_name(model, name)
    weights = {}
    for path, layer in lora_layers(model, name):
        if layer.bypasses[name].started_by:
            raise ValueError(
                f"lora: {path} was started by {layer.bypasses[name].started_by}, which moved a part of W into the factors: "
                "they mean nothing off this base; merge(model) instead"
            )
        weights[path] = {factor: tensor.data for factor, tensor in _tensors(layer.bypasses[name]).items()}
    saved = {path: tensor.data for (owner, path), tensor in state(model).copies.items() if owner == name}
    return Adapter(configs(model)[name], weights, saved)


def attach(model, adapter, name="default"):
    """Put an Adapter on the model and let it compute. Every path and shape is checked before anything changes."""
    refuse_unfit(model, adapter)
    layers, own = adaptable_layers(model), own_weights(model)
    bases = {path: stored_array(base_of(layers[path]).weight) for path in adapter.weights}
    weights = {path: {factor: _like(bases[path], a) for factor, a in w.items()} for path, w in adapter.weights.items()}
    copies = {(name, path): Tensor(_like(own[path].data, array)) for path, array in adapter.saved.items()}
    put_on(model, name, adapter.config, list(weights))  # only now that all the memory is there
    for path, layer in lora_layers(model, name):
        for factor, tensor in _tensors(layer.bypasses[name]).items():
            tensor.data = weights[path][factor]
    state(model).copies.update(copies)
    return set_adapter(model, name)


def refuse_unfit(model, adapter):
    """ValueError for an Adapter whose paths or shapes are not this model's. An embedding or a head may bring more rows than it has."""
    if not adapter.weights:
        raise ValueError("lora: the adapter holds no weights")
    layers, c = adaptable_layers(model), adapter.config
    for path, arrays in adapter.weights.items():
        if path not in layers:
            names = sorted({p.rpartition(".")[2] for p in layers})
            raise ValueError(
                f"lora: the adapter has weights for {path}, which the model lacks; its layers are {', '.join(names)}"
            )
        expected = _shapes(_with_weight_of(adapter, path, base_of(layers[path])), c, path)
        got = {factor: tuple(a.shape) for factor, a in arrays.items()}
        if got != expected:
            raise ValueError(
                f"lora: the adapter's arrays for {path} are {_say(got)}; this model with r = {c.options(path)['r']} needs {_say(expected)}"
            )
    own = own_weights(model)
    brought = {path: own[path] for path in c.brought if path in own}
    whole = {p: tuple(w.shape) for p, w in (trained_whole(model, c, list(adapter.weights)) | brought).items()}
    got = {path: tuple(w.shape) for path, w in adapter.saved.items()}
    if whole.keys() != got.keys() or any(not _grown(path, whole[path], got[path]) for path in got):
        raise ValueError(
            f"lora: the adapter holds these parameters trained whole: {_say(got) or 'none'}; "
            f"on this model its bias = {c.bias!r} and modules_to_save = {list(c.modules_to_save)} mean {_say(whole) or 'none'}"
        )


def _grown(path, shape, new):
    """Whether a parameter may take the new shape: its own, or for an embedding or a head one with rows for added tokens."""
    rows = len(shape) == 2 and new[1:] == shape[1:] and new[0] > shape[0]
    return new == shape or (rows and path.rpartition(".")[0].rpartition(".")[2] in ("embed_tokens", "lm_head"))


def _with_weight_of(adapter, path, base):
    """The base layer with the weight that the adapter brings for it, if it brings one."""
    brought = adapter.saved.get(f"{path}.weight")
    if brought is None:
        return base
    base = copy.copy(base)
    base.weight = Tensor(brought)
    return base


def _like(old, new):
    return move(np.array(new, np.float32) if isinstance(new, np.ndarray) else new.astype(np.float32), array_module(old))


def _tensors(bypass):
    """{name in files: Tensor} of a bypass."""
    found = {"lora_A": bypass.lora_A.weight, "lora_B": bypass.lora_B.weight}
    if bypass.lora_B.bias is not None:
        found["lora_B.bias"] = bypass.lora_B.bias
    if bypass.magnitude is not None:
        found["lora_magnitude_vector"] = bypass.magnitude
    return found


def _shapes(base, config, path):
    """{name in files: shape} of a bypass for this base."""
    a, b = factor_shapes(base, config.options(path)["r"])
    shapes = {"lora_A": a, "lora_B": b}
    if config.lora_bias:
        shapes["lora_B.bias"] = b[:1]
    if config.use_dora:
        shapes["lora_magnitude_vector"] = b[:1]
    return shapes


def _say(shapes):
    return ", ".join(f"{name} {shape}" for name, shape in sorted(shapes.items()))
