"""Adapters on a whole model: put on, switched, combined, taken off, merged.

    add_lora(model, r=8, alpha=16)              freeze the model and put a bypass on its linear layers
    add_lora(model, …, name="b")                one more, on the same base
    set_adapter(model, "b")                     which one computes and trains; a list: their bypasses add up
    with disable_adapter(model): …              the base, bit for bit
    with adapter_rows(model, ["a", "b"]): …     row i of a batch through its own adapter (LoRA §4.2's limitation, unmerged)
    add_weighted_adapter(model, ["a", "b"], [0.7, 0.3], "c", "cat")
    merge(model) / unmerge(model)               W₀ + s B A as plain layers, and back
    detach(model) / attach(model, adapter)      take an adapter off; put it, or another one, on

An adapter is its bypasses and, if asked for, copies of parameters that it trains whole: biases (`bias`) and modules such
as a head (`modules_to_save`). Active, its copies stand in the model; otherwise the base's own parameters do.

Compared with PEFT: the same vocabulary and the same numbers. The base's biases are kept, so a disabled or detached
adapter leaves the base as it was (PEFT trains them in place and warns); unmerging puts W₀ back instead of subtracting;
`linear` combination is there because PEFT has it, with its cross terms said. Left out: ties, dare and magnitude pruning.
"""

import contextlib
import math
import re
from dataclasses import dataclass, field, replace

import numpy as np

from . import backend
from .backend import array_module, move
from .lora import ADAPTABLE, INITS, LINEAR, LoRALayer, bypass_for, lora_layer
from .nn import STORED
from .tensor import Tensor

BIASES = ("none", "all", "lora_only")
BASE = "__base__"  # PEFT's word for "no adapter"


@dataclass(frozen=True)
class LoRAConfig:
    """What an adapter is made of (as given to `add_lora`).

    r, alpha, dropout     of each bypass; rank_pattern and alpha_pattern {name or regular expression: value} override the
                          first two where the end of a layer's path matches (as in PEFT)
    target_modules        which layers carry a bypass: see `find_targets`
    use_rslora, use_dora, lora_bias     see lora.Bypass
    bias                  "none", "all" (every bias of the model is trained), "lora_only" (those of the adapted layers)
    modules_to_save       names of modules that are trained whole, and saved with the adapter
    """

    r: int = 8
    alpha: float = 16
    dropout: float = 0.0
    target_modules: str | tuple = "all-linear"
    init: str = "kaiming"
    rank_pattern: dict = field(default_factory=dict)
    alpha_pattern: dict = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    bias: str = "none"
    modules_to_save: tuple = ()

    def __post_init__(self):
        for name, value in (("alpha", self.alpha), *(("alpha_pattern", v) for v in self.alpha_pattern.values())):
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float, np.integer, np.floating))
                or not math.isfinite(value)
            ):
                raise ValueError(f"lora: {name} = {value!r}, expected a number")
        for name in ("r", "alpha", "dropout"):
            object.__setattr__(self, name, _python(getattr(self, name)))
        for name in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, name, {k: _python(v) for k, v in getattr(self, name).items()})
        if self.init not in INITS:
            raise ValueError(f"lora: init {self.init!r} is unknown: expected 'kaiming' or 'gaussian'")
        for key in (*self.rank_pattern, *self.alpha_pattern):
            try:
                re.compile(key)
            except re.error as error:
                raise ValueError(f"lora: the pattern {key!r} is no regular expression: {error}") from None
        if self.bias not in BIASES:
            raise ValueError(f"lora: bias = {self.bias!r}, expected 'none', 'all' or 'lora_only'")
        if isinstance(self.modules_to_save, str):
            raise ValueError(f"lora: modules_to_save is a list of names, got {self.modules_to_save!r}")
        object.__setattr__(self, "modules_to_save", tuple(self.modules_to_save))

    def options(self, path):
        """Bypass's arguments for the layer at `path`."""
        return {
            "r": _pattern(self.rank_pattern, path, self.r),
            "alpha": _pattern(self.alpha_pattern, path, self.alpha),
            "dropout": self.dropout,
            "init": self.init,
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
            "lora_bias": self.lora_bias,
        }

    @property
    def max_rank(self):
        """The largest rank that a layer may have."""
        return max(self.r, *self.rank_pattern.values()) if self.rank_pattern else self.r


def _python(value):
    """A NumPy scalar as Python's, which JSON knows."""
    return value.item() if isinstance(value, np.generic) else value


def _pattern(patterns, path, default):
    """The value of the first pattern that the end of the path matches, as PEFT looks it up."""
    return next((value for key, value in patterns.items() if _matches(key, path)), default)


def _matches(key, path):
    return re.match(rf"(.*\.)?({key})$", path) is not None


@dataclass(frozen=True)
class Adapter:
    """An adapter off its model.

    weights   {path: {"lora_A": array, "lora_B": array, and where there are such "lora_B.bias", "lora_magnitude_vector"}}
    saved     {path of a parameter: array} of what it trained whole
    """

    config: LoRAConfig
    weights: dict
    saved: dict = field(default_factory=dict)

    @property
    def nbytes(self):
        """Bytes of all its arrays: what a switch moves."""
        return sum(a.nbytes for w in self.weights.values() for a in w.values()) + sum(
            a.nbytes for a in self.saved.values()
        )


# ------------------------------------------------------------------------------------------------------------ choosing layers
def find_targets(model, target_modules="all-linear"):
    """Paths of the layers that `target_modules` names.

    "all-linear"       every linear layer except lm_head (as PEFT)
    another string     a regular expression that must match the whole path
    a list             names: a whole path, or the end of one ("q_proj" means every …q_proj)
    Names and expressions may mean embeddings and convolutions too. Anything that matches nothing raises ValueError and
    lists the names that exist.
    """
    layers = _layers(model)
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
        if not any(_named(p, name) for p in layers):
            raise ValueError(f"lora: target module {name!r} does not exist; the layers are {', '.join(names)}")
    return [p for p in layers if any(_named(p, name) for name in wanted)]


def _named(path, name):
    return path == name or path.endswith("." + name)


def base_of(layer):
    """The layer itself, or what is inside its wrapper."""
    return layer.base_layer if isinstance(layer, LoRALayer) else layer


def _layers(model):
    """{path: layer} of all that can be adapted, adapted or not."""
    found, inside = {}, None
    for path, layer in model.named_modules():  # depth first: what is inside a wrapper follows it
        if path and not (inside and path.startswith(inside)) and isinstance(layer, (*ADAPTABLE, LoRALayer)):
            found[path] = layer
            inside = path + "." if isinstance(layer, LoRALayer) else None
    return found


def adapters(model, name=None):
    """[(path, LoRALayer)] in the model's order; with a name, those that carry that adapter."""
    found = ((path, layer) for path, layer in model.named_modules() if isinstance(layer, LoRALayer))
    return [(path, layer) for path, layer in found if name is None or name in layer.bypasses]


def configs(model):
    """{name: LoRAConfig} of the adapters on the model, in the order in which they came."""
    return vars(model).setdefault("lora_configs", {})


def active_adapters(model):
    """The names of the adapters that compute."""
    return vars(model).get("lora_active", ())


# --------------------------------------------------------------------------------------------------------------- add and switch
def add_lora(
    model, r=8, alpha=16, dropout=0.0, target_modules="all-linear", init="kaiming", *, name="default", **options
):
    """Put an adapter on the model, in place; returns the model. options: the other fields of LoRAConfig.

    The first adapter freezes the base, computes and is trained. A further one waits, frozen, until `set_adapter` names it
    (as PEFT's add_adapter). Nothing changes if anything does not fit.
    """
    if isinstance(target_modules, (list, tuple, set, frozenset)) and all(isinstance(t, str) for t in target_modules):
        target_modules = tuple(sorted(set(target_modules)))  # a set to PEFT; sorted, so that files are reproducible
    elif not isinstance(target_modules, str):
        raise ValueError(
            f"lora: target_modules = {target_modules!r}, expected 'all-linear', a regular expression, or a list of names"
        )
    config = LoRAConfig(r, alpha, dropout, target_modules, init, **options)
    targets = find_targets(model, target_modules)
    for key in [*config.rank_pattern, *config.alpha_pattern]:
        if not any(_matches(key, path) for path in targets):
            raise ValueError(
                f"lora: the pattern {key!r} matches none of the adapted layers ({', '.join(targets[:3])}, …)"
            )
    return _put_on(model, name, config, targets)


def _put_on(model, name, config, targets):
    """Wrap or extend the layers at the paths `targets`, copy what is to be trained whole, and activate a first adapter."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name) or name == BASE:
        raise ValueError(f"lora: an adapter cannot be called {name!r} (letters, digits, - and _, and not {BASE!r})")
    if name in configs(model):
        raise ValueError(
            f"lora: the model carries an adapter already that is called {name!r}; give another name, or detach or merge it first"
        )
    layers, first = _layers(model), not configs(model)
    whole = _trained_whole(model, config, targets)
    both = [t for t in targets if f"{t}.weight" in whole]
    if both:
        raise ValueError(
            f"lora: {both[0]} is a target and among modules_to_save; it can have a bypass or be trained whole"
        )
    with _active(model, ()):  # the base's own parameters are in place: DoRA starts from its norms
        made = {
            path: bypass_for(base_of(layers[path]))(base_of(layers[path]), **config.options(path)) for path in targets
        }
    if first:
        model.requires_grad_(False)
    for path, bypass in made.items():
        wrapper = layers[path]
        if not isinstance(wrapper, LoRALayer):
            wrapper = lora_layer(layers[path], name=name, bypass=bypass)
            wrapper.training, wrapper.active = layers[path].training, ()
            model.replace(path, wrapper)
        wrapper.bypasses[name] = bypass.requires_grad_(False).train(wrapper.training)
    if whole:
        _spares(model).update({(name, path): Tensor(w.data.copy()) for path, w in whole.items()})
    configs(model)[name] = config
    return set_adapter(model, name) if first else model


def _trained_whole(model, config, targets):
    """{path: the base's Tensor} of the parameters that the config wants trained whole."""
    own = {_plain(p): w for p, w in model.named_parameters() if ".bypasses." not in f".{p}"}
    own |= {path: w for (owner, path), w in _spares(model).items() if owner == BASE}
    found = {}
    if config.bias != "none":
        biases = {p: w for p, w in own.items() if p.rpartition(".")[2] == "bias"}
        found |= {p: w for p, w in biases.items() if config.bias == "all" or p.removesuffix(".bias") in targets}
    for wanted in config.modules_to_save:
        here = {p: w for p, w in own.items() if any(_named(m, wanted) for m in _parents(p))}
        stored = [
            p
            for p, w in model.named_weights()
            if isinstance(w, STORED) and any(_named(m, wanted) for m in _parents(_plain(p)))
        ]
        if stored:
            raise ValueError(
                f"lora: modules_to_save names {wanted!r}, but {_plain(stored[0])} is stored in few bits and cannot be trained"
            )
        if not here:
            raise ValueError(
                f"lora: modules_to_save names {wanted!r}, which is no module with parameters of this model"
            )
        found |= here
    tied = [p for p in found if p in getattr(model, "tied_parameters", ())]
    if tied:
        raise ValueError(
            f"lora: {tied[0]} is tied to the model's head, which would change along with it (in PEFT it would not); "
            "call model.untie() first"
        )
    return found


def _plain(path):
    """A parameter's path as if its layer were not wrapped."""
    return path.replace(".base_layer.", ".")


def _parents(path):
    parts = path.split(".")[:-1]
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]


def _spares(model):
    """{(adapter, path): Tensor}: trained copies of parameters; (BASE, path) is the base's own while a copy stands in for it."""
    return vars(model).setdefault("lora_spares", {})


def set_adapter(model, names, inference_mode=False):
    """Let these adapters (a name, or a list whose bypasses add up) compute; they alone are trained unless inference_mode.

    Adapters that train parameters whole (`bias`, `modules_to_save`) cannot be active beside each other.
    """
    names = _activate(model, names)
    for _, layer in adapters(model):
        for name, bypass in layer.bypasses.items():
            for p in bypass.parameters():
                p.requires_grad = name in names and not inference_mode
    for (owner, _), tensor in _spares(model).items():
        if owner != BASE:
            tensor.requires_grad = owner in names and not inference_mode
    return model


def _activate(model, names):
    """Let these adapters compute, and leave alone what is trained; returns the names. Everything is checked first."""
    names = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
    for name in names:
        _check_name(model, name)
    spares = _spares(model)
    wanted = [key for key in spares if key[0] in names]
    if len({path for _, path in wanted}) < len(wanted):
        raise ValueError(
            f"lora: of {', '.join(names)} more than one trains the same parameters whole; activate one of them"
        )
    for _, layer in adapters(model):
        layer.active, layer.rows = tuple(n for n in names if n in layer.bypasses), None
    for key in [key for key in spares if key[0] == BASE]:
        _place(model, key[1], spares.pop(key))
    for owner, path in wanted:
        spares[BASE, path] = _place(model, path, spares[owner, path])
    model.lora_active = names
    return names


def _place(model, path, tensor):
    """Let this Tensor be the parameter at the path; returns the one that was."""
    parent, _, leaf = path.rpartition(".")
    module = base_of(model.get(parent))
    before = getattr(module, leaf)
    setattr(module, leaf, tensor)
    return before


def _check_name(model, name):
    if name not in configs(model):
        there = ", ".join(configs(model)) or "none"
        raise ValueError(f"lora: the model carries no adapter called {name!r}; it carries {there}")


@contextlib.contextmanager
def _active(model, names, rows=None):
    """Within the block these adapters compute (and rows, if given, go their own ways); afterwards those of before that are still there."""
    before, rows_before = active_adapters(model), {id(layer): layer.rows for _, layer in adapters(model)}
    _activate(model, names)
    for _, layer in adapters(model):
        layer.rows = rows
    try:
        yield model
    finally:
        _activate(model, [n for n in before if n in configs(model)])
        for _, layer in adapters(model):
            layer.rows = rows_before.get(id(layer))


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
    for name in sorted(set(names) - {BASE}):
        _check_name(model, name)
        if any(owner == name for owner, _ in _spares(model)):
            raise ValueError(f"lora: {name!r} trains parameters whole, so it cannot be one of several in a batch")
    with _active(model, (), names):
        yield model


def delete_adapter(model, name):
    """Take an adapter off for good. If it was active alone, the first in the alphabet of those that remain becomes active (as in PEFT).

    A layer that pissa or lora_ga started keeps the base that they left: W without the part that was in the factors.
    """
    _check_name(model, name)
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
    _check_name(model, name)
    off = adapter_of(model, name)
    _take_off(model, name)
    return off


def _take_off(model, name):
    """Remove an adapter; if it was active alone, activate the first in the alphabet of the others."""
    alone = active_adapters(model) == (name,)
    _activate(model, [n for n in active_adapters(model) if n != name])
    for key in [key for key in _spares(model) if key[0] == name]:
        del _spares(model)[key]
    for path, layer in adapters(model, name):
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
    _check_name(model, name)
    weights = {}
    for path, layer in adapters(model, name):
        if layer.bypasses[name].started_by:
            raise ValueError(
                f"lora: {path} was started by {layer.bypasses[name].started_by}, which moved a part of W into the factors: "
                "they mean nothing off this base; merge(model) instead"
            )
        weights[path] = {factor: tensor.data for factor, tensor in _tensors(layer.bypasses[name]).items()}
    saved = {path: tensor.data for (owner, path), tensor in _spares(model).items() if owner == name}
    return Adapter(configs(model)[name], weights, saved)


def attach(model, adapter, name="default"):
    """Put an Adapter on the model and let it compute. Every path and shape is checked before anything changes."""
    if not adapter.weights:
        raise ValueError("lora: the adapter holds no weights")
    layers, c = _layers(model), adapter.config
    for path, arrays in adapter.weights.items():
        if path not in layers:
            names = sorted({p.rpartition(".")[2] for p in layers})
            raise ValueError(
                f"lora: the adapter has weights for {path}, which the model lacks; its layers are {', '.join(names)}"
            )
        expected = _shapes(base_of(layers[path]), c, path)
        got = {factor: tuple(a.shape) for factor, a in arrays.items()}
        if got != expected:
            raise ValueError(
                f"lora: the adapter's arrays for {path} are {_say(got)}; this model with r = {c.options(path)['r']} needs {_say(expected)}"
            )
    whole = _trained_whole(model, c, list(adapter.weights))
    expected, got = ({p: tuple(w.shape) for p, w in ws.items()} for ws in (whole, adapter.saved))
    if expected != got:
        raise ValueError(
            f"lora: the adapter holds these parameters trained whole: {_say(got) or 'none'}; "
            f"on this model its bias = {c.bias!r} and modules_to_save = {list(c.modules_to_save)} mean {_say(expected) or 'none'}"
        )
    _put_on(model, name, c, list(adapter.weights))
    for path, layer in adapters(model, name):
        for factor, tensor in _tensors(layer.bypasses[name]).items():
            tensor.data = _like(tensor.data, adapter.weights[path][factor])
    for path, array in adapter.saved.items():
        tensor = _spares(model)[name, path]
        tensor.data = _like(tensor.data, array)
    return set_adapter(model, name)


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
    with backend.using_generator(np.random.default_rng(0)):  # what is drawn here is thrown away
        bypass = bypass_for(base)(base, **config.options(path) | {"use_dora": False})
    shapes = {factor: tuple(t.shape) for factor, t in _tensors(bypass).items()}
    return shapes | ({"lora_magnitude_vector": (bypass.factors()[0].shape[0],)} if config.use_dora else {})


def _say(shapes):
    return ", ".join(f"{name} {shape}" for name, shape in sorted(shapes.items()))


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
        _check_name(model, name)
        c = configs(model)[name]
        if c.use_dora or c.lora_bias or any(owner == name for owner, _ in _spares(model)):
            raise ValueError(f"add_weighted_adapter: {name!r} does more than add s B A (DoRA, biases or saved modules)")
        grouped = [path for path, layer in adapters(model, name) if getattr(layer.base_layer, "groups", 1) > 1]
        if grouped:
            raise ValueError(
                f"add_weighted_adapter: {grouped[0]} is a grouped convolution, whose factors are no matrices"
            )
    if svd_rank is not None and (not isinstance(svd_rank, (int, np.integer)) or svd_rank < 1):
        raise ValueError(f"add_weighted_adapter: svd_rank = {svd_rank!r}, expected a whole number, 1 or more")
    kind = "linear" if len(names) == 1 else combination_type
    ranks = [configs(model)[n].max_rank for n in names]
    unequal = [
        p for p, layer in adapters(model) if len({layer.bypasses[n].r for n in names if n in layer.bypasses}) > 1
    ]
    if kind == "linear" and (len(set(ranks)) > 1 or unequal):
        raise ValueError(f"add_weighted_adapter: 'linear' needs equal ranks, got {ranks}; use 'svd' or 'cat'")
    r = {"linear": ranks[0], "cat": sum(ranks), "svd": svd_rank or max(ranks)}[kind]
    first = configs(model)[names[0]]
    targets = sorted({path for n in names for path, _ in adapters(model, n)})
    config = replace(
        first, r=r, alpha=r, rank_pattern={}, alpha_pattern={}, use_rslora=False, target_modules=tuple(targets)
    )
    made = {}
    for path in targets:
        layer = model.get(path)
        parts = [(w, layer.bypasses[n]) for n, w in zip(names, weights, strict=True) if n in layer.bypasses]
        made[path] = _combine(kind, r, parts)
    _put_on(model, new_name, config, targets)
    for path, (b, a) in made.items():
        bypass = model.get(path).bypasses[new_name]
        for factor, matrix in ((bypass.lora_B, b), (bypass.lora_A, a)):
            factor.weight.data = matrix.reshape(factor.weight.shape).astype(np.float32)
    return model


def _combine(kind, r, parts):
    """(B, A) as matrices (outputs × r) and (r × inputs) of Σ w s B A over parts = [(w, bypass)]; see add_weighted_adapter."""
    xp = array_module(parts[0][1].lora_A.weight.data)
    scaled = [(w * bypass.scaling, *bypass.factors()) for w, bypass in parts]
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
    if keep and vars(model).get("lora_kept") is not None:
        raise ValueError("merge: the base's weights of an earlier merge are kept; unmerge first, or merge without keep")
    names = (
        active_adapters(model) if names is None else (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
    )
    for name in names:
        _check_name(model, name)
    tied = [
        p
        for p, layer in adapters(model)
        if f"{p}.weight" in getattr(model, "tied_parameters", ()) and set(names) & set(layer.bypasses)
    ]
    if tied:
        raise ValueError(
            f"merge: the head reads the weight of {tied[0]} too and would change along with it; call model.untie() first"
        )
    before, flags = (
        active_adapters(model),
        [(p, p.requires_grad) for p in (*model.parameters(), *_spares(model).values())],
    )
    _activate(model, names)  # so that the biases that these adapters trained are the ones that are merged
    try:
        merged = [(path, layer.merge(names)) for path, layer in adapters(model)]
    except Exception:
        _activate(model, before)
        raise
    kept = Kept(before, names, adapters(model), dict(configs(model)), dict(_spares(model)), flags)
    for path, layer in merged:
        layer.training = model.get(path).training
        model.replace(path, layer)
    configs(model).clear()
    _spares(model).clear()
    model.lora_active = ()
    model.lora_kept = kept if keep else None  # what an earlier merge kept is no longer what lies below
    return model.requires_grad_(False)


@dataclass(frozen=True)
class Kept:
    """What `unmerge` needs: the wrapped layers, and which adapters and parameters were what."""

    active: tuple
    merged: tuple
    layers: list
    configs: dict
    spares: dict
    flags: list

    def aside(self):
        """What has to move along with the model."""
        return [*(layer for _, layer in self.layers), *self.spares.values()]


def unmerge(model):
    """Undo merge(model, keep=True): the wrapped layers with their own W₀ are put back. Nothing is subtracted."""
    kept = vars(model).get("lora_kept")
    if kept is None:
        raise ValueError("unmerge: there is nothing to undo; only merge(model, keep=True) keeps the base's weights")
    if configs(model):
        raise ValueError(f"unmerge: the merged model carries {', '.join(configs(model))}; detach or merge that first")
    for path, layer in kept.layers:
        layer.train(model.get(path).training)
        model.replace(path, layer)
    configs(model).update(kept.configs)
    _spares(model).update(kept.spares)
    model.lora_active, model.lora_kept = kept.merged, None
    _activate(model, kept.active)
    for p, flag in kept.flags:
        p.requires_grad = flag
    return model


def merge_errors(model):
    """{path: ‖Ŵ − W‖/‖W‖} of the layers that `merge` made: 0 for dense ones, the price of rounding for 4 and 16 bits."""
    return {path: layer.merge_error for path, layer in model.named_modules() if hasattr(layer, "merge_error")}


# -------------------------------------------------------------------------------------------------------------------- counting
def count_parameters(model):
    """(trainable, all): packed 4-bit weights count as the weights they stand for."""
    weights = [w for _, w in model.named_weights()]
    return sum(w.size for w in weights if isinstance(w, Tensor) and w.requires_grad), sum(w.size for w in weights)


def trainable_parameters(model):
    """The line that PEFT prints: trainable params: … || all params: … || trainable%: …

    With modules_to_save PEFT counts the original and the copy; here what stands in the model is counted, once.
    """
    trainable, total = count_parameters(model)
    return f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"


def print_trainable_parameters(model):
    """Print `trainable_parameters(model)`."""
    print(trainable_parameters(model))


# fmt: off
__all__ = ["LoRAConfig", "Adapter", "BASE", "add_lora", "set_adapter", "disable_adapter", "adapter_rows", "delete_adapter", "detach",
           "attach", "adapter_of", "add_weighted_adapter", "merge", "unmerge", "merge_errors", "adapters", "configs", "active_adapters",
           "find_targets", "count_parameters", "trainable_parameters", "print_trainable_parameters"]
# fmt: on
