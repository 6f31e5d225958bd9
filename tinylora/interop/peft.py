"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors.

    base_model.model.<path>.lora_A.weight               (r, in), for a convolution (r, in, *kernel)
    base_model.model.<path>.lora_B.weight               (out, r), for a convolution (out, r/groups, 1, …)
    base_model.model.<path>.lora_B.bias                 (out,)             with lora_bias
    base_model.model.<path>.lora_magnitude_vector       (out,), for a convolution (1, out, 1, …)    with DoRA
    base_model.model.<path>.lora_embedding_A, _B        (r, vocabulary), (d, r)
    base_model.model.<path>.base_layer.bias             (out,)             bias "lora_only" or "all", of an adapted layer
    base_model.model.<path>.bias / .weight              bias "all" of any other layer; modules_to_save
    (more of embeddings and heads: see `embeddings`)

An adapter saved here opens with `PeftModel.from_pretrained`, and one that PEFT trained opens here: LoRA with rsLoRA,
DoRA, rank_pattern, alpha_pattern, lora_bias, bias, modules_to_save, trainable_token_indices and added tokens, on linear layers,
embeddings and convolutions. What this file does not read is refused with a sentence, since ignoring it would change the model
silently; a key that PEFT does not know either is ignored with a warning, as there.

An adapter carries its base: `save_adapter` writes into the metadata of adapter_model.safetensors, under "tinylora", what
`models.identity` says of it (PEFT ignores that). `load_adapter` refuses another base, and warns where the same one is held otherwise.

Where PEFT misleads, and what is done here
  * A config without `r` or `lora_alpha` means 8 to PEFT, and so it does here: an adapter that was trained with another
    alpha then has the wrong scale, silently. Files written here always name both.
  * `rank_pattern` and `alpha_pattern` are regular expressions for the end of a path, and the first that matches wins.
  * `fan_in_fan_out` says how a GPT-2 base stores its weights; A and B are the same either way, and bases here are (out, in).
  * In an adapter of several, PEFT writes "default" into the folder itself and every other into a folder of its name;
    `save_adapters` does so too.
"""

import contextlib
import json
import math
import os
import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .. import adapters, data
from ..adapters.kinds import LoRAConv, LoRAEmbedding
from ..adapters.targets import (
    HEAD,
    adaptable_layers,
    linears,
    named,
    needs_own_head,
    own_weights,
    saved_whole,
    targeted,
)
from ..backend import move
from ..models import fields, files, identity, safetensors
from ..models.fields import either, flag, mapping, number, one_of, optional, several, shown, text, whole
from ..models.llama import Llama
from ..models.tokenizers import BPETokenizer
from . import embeddings

_PREFIX = "base_model.model."
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: What an adapter that is saved takes the place of.
_FILES = (
    _CONFIG,
    _WEIGHTS,
    "tokenizer.json",
    "tokenizer_config.json",
)
_METADATA = "tinylora"  # the key of the base's description in the metadata

#: Settings that change what the adapter computes, and that tinylora lacks.
_REFUSED = (
    "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "velora_config", "layer_replication",
    "alora_invocation_tokens", "target_parameters",
)  # fmt: skip
#: Settings of PEFT (0.21.2) that this file reads, or that change nothing of what a finished adapter computes.
_KNOWN = (
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core",
    "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "task_type", "trainable_token_indices", "use_dora", "use_rslora",
)  # fmt: skip
#: What these settings may be; the other inits (pissa, olora, …) move a part of the base's weight into the factors.
_ONLY = {
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
    "bias": adapters.BIASES,
}
_PATTERNS = {"rank_pattern": whole(1), "alpha_pattern": number()}
#: What the other settings may be that are read here; LoRAConfig checks the rest.
_FIELDS = {
    "base_model_name_or_path": optional(identity.NAME),
    "r": whole(1),
    "lora_alpha": number(-3e38, 3e38),
    "lora_dropout": number(0, 1),
    "trainable_token_indices": optional(either(several(whole()), mapping(several(whole())))),
    **dict.fromkeys(("use_rslora", "use_dora", "lora_bias", "ensure_weight_tying", "fan_in_fan_out"), optional(flag())),
}
_LARGEST = 1e15  # number of a tensor, and change of a weight's: float32 still sums squares of such ones
_MOST_AXES = 5  # of a tensor: those of a convolution over three axes
_LARGEST_CONFIG, _MOST_SETTINGS, _LARGEST_DESCRIPTION = 16 << 20, 1 << 18, 4 << 20  # bytes, values, characters
_CONDENSED = 20  # so many target_modules PEFT condenses to shorter names; layers_to_transform then means other layers


# -------------------------------------------------------------------------------------------------------------------- saving
def save_adapter(model, folder, base_model=None, name=None, tokenizer=None):
    """Write one adapter as PEFT does (without a name, the active one), and beside it what its base is.

    base_model   what PEFT should record as the base (a name or a folder)
    tokenizer    one that comes along, where the adapter has tokens that its base lacks
    """
    adapter = adapters.adapter_of(model, name)
    tensors, config = _tensors(model, adapter), _config(model, adapter, base_model)
    json.dumps(config)  # what cannot be written is said before anything is
    about = {"base": base_model, **identity.identity(own_weights(model), linears(model))}
    with files.whole_folder(folder, head=_CONFIG, replaces=_FILES) as new:
        safetensors.write_safetensors(
            new / _WEIGHTS,
            {key: ("F32", array.shape) for key, array in tensors.items()},
            tensors.__getitem__,
            {"format": "pt", _METADATA: json.dumps(about)},
        )
        if tokenizer is not None:
            tokenizer.save(new)
        files.write_json(new / _CONFIG, config)


def _tensors(model, adapter):
    """{name in PEFT's file: array} of an Adapter's factors, and of what it saves whole."""
    tensors = {}
    for path, arrays in adapter.weights.items():
        layer = model.get(path)
        for factor, array in arrays.items():
            array = move(array, "cpu")
            if isinstance(layer, LoRAConv) and factor == "lora_magnitude_vector":
                array = array.reshape(1, -1, *[1] * (len(layer.base_layer.weight.shape) - 2))
            tensors[_PREFIX + _key(path, factor, isinstance(layer, LoRAEmbedding))] = array
    for path, array in adapter.saved.items():
        if path not in adapter.config.brought:
            parent, _, leaf = path.rpartition(".")
            inside = f"{parent}.base_layer.{leaf}" if parent in adapter.weights else path
            tensors[_PREFIX + inside] = move(array, "cpu")
    return tensors | {_PREFIX + key: array for key, array in embeddings.tensors_of(model, adapter).items()}


def _config(model, adapter, base_model):
    """What adapter_config.json holds, in PEFT's words."""
    c = adapter.config
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if isinstance(model, Llama) else None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": int(c.r),
        "lora_alpha": c.alpha,
        "lora_dropout": c.dropout,
        **_selection(model, c, set(adapter.weights)),
        "bias": c.bias,
        "fan_in_fan_out": False,
        "init_lora_weights": "gaussian" if c.init == "gaussian" and not c.lora_bias else True,  # PEFT refuses the pair
        "use_rslora": c.use_rslora,
        "use_dora": c.use_dora,
        "lora_bias": c.lora_bias,
        "rank_pattern": c.rank_pattern,
        "alpha_pattern": c.alpha_pattern,
        "modules_to_save": list(c.modules_to_save) or None,
        "ensure_weight_tying": c.ensure_weight_tying,
        "trainable_token_indices": {path: list(i) for path, i in c.trainable_token_indices.items()} or None,
    }


def save_adapters(model, folder, base_model=None):
    """Write every adapter of the model: "default" into the folder, the others into folders of their names, as PEFT does."""
    for name in adapters.configs(model):
        save_adapter(model, folder if name == "default" else Path(folder) / name, base_model, name)


def _key(path, factor, embedding):
    if embedding and factor in ("lora_A", "lora_B"):
        return f"{path}.{factor.replace('lora_', 'lora_embedding_')}"
    return f"{path}.{factor}.weight" if factor in ("lora_A", "lora_B") else f"{path}.{factor}"


def _selection(model, config, paths):
    """What tells PEFT to adapt these layers and no others: the config's own words if they do, else names, whole paths, or an expression.

    "all-linear" is never written, since PEFT would resolve it anew.
    """
    names = sorted({path.rpartition(".")[2] for path in paths})
    given = names if config.all_linear else config.target_modules
    given = given if isinstance(given, str) else _existing(model, given)
    anywhere = replace(config, exclude_modules=None, layers_to_transform=None, layers_pattern=None, target_modules=())
    ways = [replace(config, target_modules=given if isinstance(given, str) else tuple(given))] if given else []
    ways += [replace(anywhere, target_modules=targets) for targets in (tuple(names), tuple(sorted(paths)))]
    ways += [replace(anywhere, target_modules="|".join(map(re.escape, sorted(paths))))]
    way = next(way for way in ways if _means(model, way, paths))
    return {
        "target_modules": _json(way.target_modules),
        "exclude_modules": _json(way.exclude_modules),
        "layers_to_transform": _json(way.layers_to_transform),
        "layers_pattern": _json(way.layers_pattern),
    }


def _json(value):
    return list(value) if isinstance(value, tuple) else value


def _means(model, config, paths):
    """Whether PEFT adapts these layers, and finds nothing else, on its own model."""
    if config.layers_to_transform and len(config.target_modules) >= _CONDENSED:
        return False
    modules = {path for path, _ in model.named_modules() if path} | set(paths)
    if isinstance(model, Llama):  # modules that transformers' model has beside these, which PEFT cannot adapt
        blocks = [f"model.layers.{i}" for i in range(model.config.num_hidden_layers)]
        modules |= {
            "lm_head",
            "model.layers",
            "model.rotary_emb",
            *blocks,
            *(f"{block}.mlp.act_fn" for block in blocks),
        }
    inside = tuple(f"{path}." for path, _ in adapters.lora_layers(model))
    modules = {path for path in modules if not path.startswith(inside)} if inside else modules
    return {path for path in modules if targeted(path, config, modules_to_save=config.modules_to_save)} == paths


def _existing(model, names):
    """Those of the names that the model has: PEFT lets a name be one that it lacks, as long as another is there."""
    return [n for n in names if any(named(path, n) for path, _ in model.named_modules())]


# -------------------------------------------------------------------------------------------------------------------- reading
@dataclass(frozen=True)
class _File:
    """What an adapter's folder holds: see embeddings.settle for bases and rows; about: the base's description, None in PEFT's files."""

    adapter: adapters.Adapter
    settings: dict
    bases: dict
    rows: dict
    about: dict | None


def read_adapter(folder):
    """An Adapter (see adapters.attach) from a folder that PEFT or tinylora wrote. One that brings an embedding along needs its model,
    and so `load_adapter`."""
    file = _read(Path(folder))
    _warn_of_unknown_keys(file.settings, folder)
    brought = sorted({*file.rows, *(path for path, (_, comes_along) in file.bases.items() if comes_along)})
    if brought:
        raise ValueError(
            f"{folder} brings {brought[0]} along, or rows of it (tokens that were added or trained), and that means something on "
            "a model only; put it on one with load_adapter, or merge it"
        )
    return file.adapter


def read_config(folder):
    """The LoRAConfig of the adapter in a folder, as far as it is known without its model (which saved_embeddings need)."""
    return _read(Path(folder)).adapter.config


def _read(folder):
    """The _File of a folder."""
    files.settle(folder)
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}; expected an adapter folder as PEFT writes it")
    where = folder / _CONFIG
    written = files.stamp(where)
    settings = files.read_json(where, _LARGEST_CONFIG, _MOST_SETTINGS)
    _refuse_what_is_not_read(settings, where)
    try:
        config = _lora_config(settings)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    opened = safetensors.Safetensors(folder / _WEIGHTS)
    weights, saved, bases, rows = _sort_tensors(opened, config, opened.path)
    config = replace(config, trainable_token_indices=_token_indices(settings, rows, where))
    about = _description(opened.metadata, opened.path)
    files.check_unchanged(where, written)
    return _File(adapters.Adapter(config, weights, saved), settings, bases, rows, about)


def _refuse_what_is_not_read(settings, where):
    """ValueError for a config with anything that would change the model and that tinylora would ignore."""
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{where}: peft_type is {shown(settings.get('peft_type'))}, tinylora reads 'LORA'")
    for name in _REFUSED:
        if settings.get(name):
            raise ValueError(f"{where}: {name} = {shown(settings[name])} is not supported here")
    for name, fine in _ONLY.items():
        if not one_of(*fine).fits(settings.get(name, fine[0])):
            raise ValueError(
                f"{where}: {name} = {shown(settings[name])} is not supported here, only {', '.join(map(repr, fine))}"
            )
    if settings.get("target_modules", "all-linear") is None:
        raise ValueError(f"{where}: target_modules is null; tinylora needs the names of the adapted layers")
    fields.check(settings, _FIELDS, where)


def _warn_of_unknown_keys(settings, folder):
    """Name the keys of an adapter's config that PEFT does not know either: of a later version of it, or misspelt."""
    if unknown := sorted(settings.keys() - {*_KNOWN, *_REFUSED}):
        where = Path(folder) / "adapter_config.json"
        names = ", ".join(map(_said, unknown[:8])) + (", …" if len(unknown) > 8 else "")
        warnings.warn(f"{where}: the keys {names} are unknown and are ignored", stacklevel=3)


def _lora_config(settings):
    """The LoRAConfig of what adapter_config.json holds, with PEFT's defaults for what it leaves out."""
    targets = settings.get("target_modules", "all-linear")
    given = {name: settings.get(name) for name in ("modules_to_save", "exclude_modules", "layers_pattern", *_PATTERNS)}
    given |= {"target_modules": targets}
    for name, value in given.items():
        kind, what = (
            (dict, "names and numbers") if name in _PATTERNS else ((list, str), "names or a regular expression")
        )
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"{name} = {shown(value)}, expected {what}")
        if isinstance(value, list) and not all(isinstance(n, str) for n in value):
            raise ValueError(f"{name} = {shown(value)}, expected names")
        for key, entry in value.items() if name in _PATTERNS and value else ():
            if not _PATTERNS[name].fits(entry):
                raise ValueError(f"{name}[{shown(key)}] = {shown(entry)}, expected {_PATTERNS[name].expected}")
    saved = given["modules_to_save"] or ()
    return adapters.LoRAConfig(
        r=settings.get("r", 8),
        alpha=settings.get("lora_alpha", 8),
        dropout=settings.get("lora_dropout", 0.0),
        target_modules=targets if isinstance(targets, str) else tuple(sorted(set(targets))),
        init="gaussian" if settings.get("init_lora_weights") == "gaussian" else "kaiming",
        **{name: given[name] or {} for name in _PATTERNS},
        use_rslora=bool(settings.get("use_rslora")),
        use_dora=bool(settings.get("use_dora")),
        lora_bias=bool(settings.get("lora_bias")),
        bias=settings.get("bias", "none"),
        modules_to_save=(saved,) if isinstance(saved, str) else tuple(saved),
        exclude_modules=given["exclude_modules"],
        layers_to_transform=settings.get("layers_to_transform"),
        layers_pattern=given["layers_pattern"],
        ensure_weight_tying=bool(settings.get("ensure_weight_tying")),
    )


def _sort_tensors(tensors, config, where):
    """The tensors of a file as (weights, saved, bases, rows).

    {path: {factor: array}}, {path of a parameter saved whole: array}, {path: (the base's own weight, whether it comes along)}, {path: rows}

    All are float32 on the host. ValueError names the file and the tensor that holds no finite floats, or that nothing is known of.
    """
    weights, saved, bases, rows, again = {}, {}, {}, {}, {}
    for key in tensors:
        if not key.startswith(_PREFIX) or not key.isprintable():
            raise ValueError(f"{where}: did not expect the tensor {_said(key)}")
        path, factor = _parse(key.removeprefix(_PREFIX))
        module, form = embeddings.form_of(key.removeprefix(_PREFIX))
        trained = saved_whole(path, config.modules_to_save)
        value = _floats(tensors, key, 2 if factor in ("lora_A", "lora_B") else 1)
        if form == "whole" and not trained and f"{_PREFIX}{module}.modules_to_save.weight" in tensors:
            form = "again"
        if path in saved or factor in weights.get(path, ()):
            raise ValueError(f"{where}: it holds {_said(key)} twice, under another name too")
        if factor is not None:
            weights.setdefault(path, {})[factor] = value.reshape(-1) if factor == "lora_magnitude_vector" else value
        elif form == "rows":
            rows[module] = value
        elif form == "again":
            again[f"{module}.weight"] = value
        elif form in ("base", "brought") or (form == "whole" and not trained):
            bases[module] = value, form != "base"
        elif config.bias == "none" and not trained:
            raise ValueError(f"{where}: did not expect the tensor {_said(key)}")
        else:
            saved[path] = value
    for path, factors in weights.items():
        if not {"lora_A", "lora_B"} <= factors.keys():
            raise ValueError(f"{where}: {path} has {', '.join(sorted(factors))} but not its partner")
        if saved_whole(f"{path}.weight", config.modules_to_save):
            raise ValueError(
                f"{where}: {path} is adapted and lies in a module that is trained whole (modules_to_save = "
                f"{list(config.modules_to_save)}); PEFT writes such a file and cannot open it either"
            )
    strange = sorted(path for path, (_, comes_along) in bases.items() if not comes_along and path not in weights)
    if strange:
        raise ValueError(f"{where}: did not expect a base weight for {strange[0]}, which is not adapted")
    for path, value in again.items():
        tied = saved.get(embeddings.EMBEDDING) if config.ensure_weight_tying else None
        if not np.array_equal(saved.get(path, tied), value):
            raise ValueError(f"{where}: it holds two copies of {path}, and they differ")
    return weights, saved, bases, rows


def _floats(tensors, name, axes):
    """A tensor of Safetensors as a float32 array of so many axes at least; ValueError if it is no array of finite floats."""
    kind, shape = tensors.kind(name)
    if not axes <= len(shape) <= _MOST_AXES or 0 in shape:
        raise ValueError(
            f"{tensors.path}: tensor {_said(name)} has shape {shown(shape)}, expected {axes} axes or more, none empty"
        )
    if not tensors.is_float(name):
        raise ValueError(f"{tensors.path}: tensor {_said(name)} has dtype {kind}, expected floats")
    with np.errstate(over="ignore"):
        array = tensors.float32(name)  # which says NaN and Inf
    if (largest := float(np.abs(array).max())) > _LARGEST:
        raise ValueError(
            f"{tensors.path}: tensor {_said(name)} holds numbers up to {largest:.0e}, expected at most {_LARGEST:.0e}"
        )
    return array


def _said(name):
    """A name as a sentence holds it: in quotation marks if it is long, or holds what a terminal would obey."""
    return name if len(name) <= 200 and name.isprintable() else shown(name)


def _parse(key):
    """(path, factor) of a bypass's tensor, or (path of a parameter, None)."""
    for ending, factor in (
        (".lora_A.weight", "lora_A"),
        (".lora_B.weight", "lora_B"),
        (".lora_B.bias", "lora_B.bias"),
        (".lora_magnitude_vector", "lora_magnitude_vector"),
        (".lora_embedding_A", "lora_A"),
        (".lora_embedding_B", "lora_B"),
    ):
        if key.endswith(ending):
            return key.removesuffix(ending), factor
    return key.replace(".base_layer.", "."), None


def _token_indices(settings, rows, where):
    """{path: the tokens whose rows are replaced} of the modules for which the file has rows."""
    given = settings.get("trainable_token_indices") or {}
    given = given if isinstance(given, dict) else {"": given}  # a list is for the embedding
    found = {path: next((v for name, v in given.items() if path.endswith(name)), None) for path in rows}
    for path, indices in found.items():
        if not isinstance(indices, list) or not all(type(i) is int and i >= 0 for i in indices):
            raise ValueError(f"{where}: trainable_token_indices is {shown(given)}, and the file holds rows for {path}")
    if given and not rows:
        raise ValueError(
            f"{where}: trainable_token_indices is {shown(given)}, and the file holds no rows for these tokens"
        )
    return {path: tuple(indices) for path, indices in found.items()}


def load_adapter(model, folder, name="default", check_base=True, untie=False):
    """Put the adapter of a folder on the model, in place, and let it compute; returns the model.

    check_base   False: put it on another base than it was trained on, too. (An adapter of PEFT's does not say which it was.)
    untie        True: a model whose head is its embedding gets a head of its own if the adapter changes one of the two alone

    A layer that the config names and the file leaves out is an error, and so is one that the file has and the config leaves out. A
    warning says that the base is held otherwise than when the adapter was trained (in other bits, in blocks of another size).
    """
    folder = Path(folder)
    file = _read(folder)
    _warn_of_unknown_keys(file.settings, folder)
    adapter, bases, rows = file.adapter, file.bases, file.rows
    if tied := getattr(model, "tied_parameters", ()):
        adapter, bases, rows = embeddings.tie(adapter, bases, rows)
    with _naming(folder):
        parted = tied and (HEAD.removesuffix(".weight") in adapter.weights or needs_own_head(model, adapter.config))
    if parted and not untie:
        raise ValueError(
            f"{folder}: the adapter changes the head or the embedding alone, and they are one weight in this model (tied); "
            "call model.untie() first, or load it with untie=True"
        )
    with adapters.untied(model) if parted else contextlib.nullcontext():  # a model that was refused stays as it was
        adapter = embeddings.settle(model, adapter, bases, rows, folder)
        with _naming(folder):
            adapters.refuse_unfit(model, adapter)
            refuse_too_large(adapter)
        _refuse_other_layers(model, adapter, folder)
        if check_base and file.about is not None:
            _check_base(model, file.about, folder)
        return adapters.attach(model, adapter, name)


def refuse_too_large(adapter):
    """ValueError for factors whose product may leave float32: s r max|A| max|B|, which no entry of s B A exceeds, has a bound."""
    for path, factors in adapter.weights.items():
        given = adapter.config.options(path)
        scale = abs(given["alpha"]) / (math.sqrt(given["r"]) if given["use_rslora"] else given["r"])
        largest = [float(np.abs(factors[name]).max(initial=0)) for name in ("lora_A", "lora_B")]
        if (change := scale * given["r"] * math.prod(largest)) > _LARGEST:
            raise ValueError(
                f"{path} has lora_A up to {largest[0]:.0e} and lora_B up to {largest[1]:.0e}, which may change its weight by "
                f"{change:.0e}; expected at most {_LARGEST:.0e}"
            )


@contextlib.contextmanager
def _naming(folder):
    """Begin a ValueError's sentence with the two files of a folder, which do not fit each other or the model."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{Path(folder) / _CONFIG} or {_WEIGHTS}: {error}") from None


def _refuse_other_layers(model, adapter, folder):
    """ValueError for a layer that the config adapts and the file has no factors for, or the reverse."""
    config = adapter.config
    whole = linears(model) if config.all_linear else ()
    with _naming(folder):
        named = [p for p in adaptable_layers(model) if targeted(p, config, whole, config.modules_to_save)]
    if missing := [p for p in named if p not in adapter.weights]:
        raise ValueError(
            f"{Path(folder) / _CONFIG}: the config adapts {missing[0]}, and the file has no factors for it (target_modules)"
        )
    tied = {HEAD.removesuffix(".weight")} if config.ensure_weight_tying else set()
    if more := sorted(adapter.weights.keys() - {*named, *tied}):
        raise ValueError(
            f"{Path(folder) / _CONFIG}: the file has factors for {more[0]}, which the config does not adapt (target_modules)"
        )


# ------------------------------------------------------------------------------------------------------------- an adapter's base
@dataclass(frozen=True)
class Base:
    """The base of an adapter, as its folder tells it.

    folder   of the adapter
    name     what the base was called: a folder, a file, a name on a hub, or None
    about    what models.identity said of it; None if PEFT wrote the adapter
    """

    folder: Path
    name: str | None
    about: dict | None

    @property
    def held(self):
        """The options of nn.quantized_linear with which the adapter was trained; None for a dense base, or an unknown one."""
        return self.about["held"] if self.about else None

    def find(self):
        """What Llama.from_pretrained opens as this base: the folder or file of that name, or "base" if it is the embedded model."""
        path = os.path.realpath(self.name or "")
        if self.name == "base" or path == os.path.realpath(data.base_folder()):
            return "base"
        if self.name and (os.path.isfile(path) or os.path.isfile(os.path.join(path, "config.json"))):
            return path
        if self.about:
            embedded = Llama.from_pretrained("base")
            if identity.difference(self.about, own_weights(embedded), linears(embedded)) != "base":
                return "base"
        told = (
            f"was trained on {self.name!r:.500}, which is no folder or file here"
            if self.name
            else "does not name its base"
        )
        raise ValueError(f"{self.folder} {told}; give the base with --model")


def read_base(folder):
    """The Base of the adapter in a folder."""
    folder = Path(folder)
    file = _read(folder)
    return Base(folder, file.settings.get("base_model_name_or_path") or None, file.about)


def _description(metadata, where):
    """The base's description in a file's metadata, None if there is none."""
    if _METADATA not in metadata:
        return None
    try:
        told = fields.check_value(metadata[_METADATA], text(_LARGEST_DESCRIPTION), "the metadata", _METADATA)
        about = json.loads(told)
        identity.check(about)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{where}: its description of the adapter's base is damaged (metadata {_METADATA}: {error})"
        ) from None
    return about


def _check_base(model, about, folder):
    """ValueError if the model is another base than described; a warning if it is held otherwise."""
    weights, layers = own_weights(model), linears(model)
    kind = _refuse_other_base(about, weights, layers, folder)
    then, now = (identity.described(held) for held in (about["held"], identity.holding(weights, layers)))
    if kind == "held":
        warnings.warn(f"{folder} was trained on this base in {then}, and here it is held in {now}", stacklevel=3)
    elif kind == "rounding":
        warnings.warn(
            f"{folder} was trained on this base in {then}, made from a file of another precision than here",
            stacklevel=3,
        )


def _refuse_other_base(about, weights, layers, folder):
    """How these weights differ from the base described (see identity.difference); ValueError if they are another one."""
    kind, name = identity.difference(about, weights, layers), about.get("base")
    if kind == "base":
        on = "another base" if name is None else f"another base ({_said(name)})"
        raise ValueError(
            f"{folder} was trained on {on}, or on a copy of this one in another precision: this model's weights are others. "
            "A fine-tuned or merged copy is another base too; "
            "check_base=False (on the command line --force) puts the adapter on it all the same"
        )
    return kind


def take_tokenizer(model, folder):
    """Give the model the tokenizer in an adapter's folder, if it has more tokens than the model's. ValueError if they have no rows."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        return
    tokenizer, rows = BPETokenizer.from_file(path), len(model.model.embed_tokens.weight)
    if tokenizer.vocab_size > model.tokenizer.vocab_size:
        if tokenizer.vocab_size > rows:
            raise ValueError(
                f"{path} has {tokenizer.vocab_size} tokens, and the model's embedding {rows} rows; "
                + embeddings.resize_to(tokenizer.vocab_size)
            )
        model.tokenizer = tokenizer
