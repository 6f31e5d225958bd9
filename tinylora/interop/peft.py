"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors.

    base_model.model.<path>.lora_A.weight               (r, in), for a convolution (r, in, *kernel)
    base_model.model.<path>.lora_B.weight               (out, r), for a convolution (out, r/groups, 1, …)
    base_model.model.<path>.lora_B.bias                 (out,)             with lora_bias
    base_model.model.<path>.lora_magnitude_vector       (out,), for a convolution (1, out, 1, …)    with DoRA
    base_model.model.<path>.lora_embedding_A, _B        (r, vocabulary), (d, r)
    base_model.model.<path>.base_layer.bias             (out,)             bias "lora_only" or "all", of an adapted layer
    base_model.model.<path>.bias / .weight              bias "all" of any other layer; modules_to_save
    base_model.model.<path>.base_layer.weight           the base's own embedding or head, which PEFT adds where these are adapted

An adapter saved here opens with `PeftModel.from_pretrained`, and one that PEFT trained opens here: LoRA with rsLoRA,
DoRA, rank_pattern, alpha_pattern, lora_bias, bias and modules_to_save, on linear layers, embeddings and convolutions.
What this file does not read is refused with a sentence, since ignoring it would change the model silently.

Where PEFT misleads, and what is done here
  * A config without `r` or `lora_alpha` means 8 to PEFT, and so it does here: an adapter that was trained with another
    alpha then has the wrong scale, silently. Files written here always name both.
  * `rank_pattern` and `alpha_pattern` are regular expressions for the end of a path, and the first that matches wins.
  * `fan_in_fan_out` says how a GPT-2 base stores its weights; A and B are the same either way, and bases here are (out, in).
  * In an adapter of several, PEFT writes "default" into the folder itself and every other into a folder of its name;
    `save_adapters` does so too.
"""

import json
from pathlib import Path

import numpy as np

from .. import adapters
from ..adapters.kinds import LoRAConv, LoRAEmbedding
from ..backend import move
from ..dtypes import BFloat16Array
from ..models import files, safetensors
from ..models.llama import Llama

_PREFIX = "base_model.model."

#: Settings that change what the adapter computes, and that tinylora lacks.
_REFUSED = (
    "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "velora_config", "layer_replication",
    "alora_invocation_tokens", "trainable_token_indices", "target_parameters",
)  # fmt: skip
#: What these settings may be; the other inits (pissa, olora, …) move a part of the base's weight into the factors.
_ONLY = {
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
    "bias": adapters.BIASES,
}


def save_adapter(model, folder, base_model=None, name=None):
    """Write one adapter as PEFT does (without a name, the active one).

    base_model   what PEFT should record as the base (a name or a folder)
    """
    adapter = adapters.adapter_of(model, name)
    tensors, config = _tensors(model, adapter), _config(model, adapter, base_model)
    json.dumps(config)  # what cannot be written is said before anything is
    folder = Path(folder)
    safetensors.save_safetensors(folder / "adapter_model.safetensors", tensors)
    files.write_json(folder / "adapter_config.json", config)


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
        parent, _, leaf = path.rpartition(".")
        name = f"{parent}.base_layer.{leaf}" if parent in adapter.weights else path
        tensors[_PREFIX + name] = move(array, "cpu")
    return tensors


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
        "target_modules": _target_names(model, c.target_modules, set(adapter.weights)),
        "bias": c.bias,
        "fan_in_fan_out": False,
        "init_lora_weights": "gaussian" if c.init == "gaussian" and not c.lora_bias else True,  # PEFT refuses the pair
        "use_rslora": c.use_rslora,
        "use_dora": c.use_dora,
        "lora_bias": c.lora_bias,
        "rank_pattern": c.rank_pattern,
        "alpha_pattern": c.alpha_pattern,
        "modules_to_save": list(c.modules_to_save) or None,
    }


def save_adapters(model, folder, base_model=None):
    """Write every adapter of the model: "default" into the folder, the others into folders of their names, as PEFT does."""
    for name in adapters.configs(model):
        save_adapter(model, folder if name == "default" else Path(folder) / name, base_model, name)


def _key(path, factor, embedding):
    if embedding and factor in ("lora_A", "lora_B"):
        return f"{path}.{factor.replace('lora_', 'lora_embedding_')}"
    return f"{path}.{factor}.weight" if factor in ("lora_A", "lora_B") else f"{path}.{factor}"


def _target_names(model, targets, paths):
    """Names for PEFT, as long as they mean these layers and no others; else whole paths. ("all-linear" would be resolved anew.)"""
    if isinstance(targets, str) and targets != "all-linear":
        return targets
    names = sorted({path.rpartition(".")[2] for path in paths}) if targets == "all-linear" else list(targets)
    names = _existing(model, names)
    return names if names and set(adapters.find_targets(model, names)) == paths else sorted(paths)


def _existing(model, names):
    """Those of the names that the model has: PEFT lets a name be one that it lacks, as long as another is there."""
    return [n for n in names if any(f".{path}".endswith(f".{n}") for path, _ in model.named_modules())]


def read_adapter(folder):
    """An Adapter (see adapters.attach) from a folder that PEFT or tinylora wrote."""
    return _read(Path(folder))[0]


def _read(folder):
    """(Adapter, the config as it is in the file, {path: the base's own weight that came along})."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}; expected an adapter folder as PEFT writes it")
    where = folder / "adapter_config.json"
    settings = files.read_json(where)
    _refuse_what_is_not_read(settings, where)
    config = _lora_config(settings)
    weights, saved, bases = _sort_tensors(folder / "adapter_model.safetensors", config)
    return adapters.Adapter(config, weights, saved), settings, bases


def _refuse_what_is_not_read(settings, where):
    """ValueError for a config with anything that would change the model and that tinylora would ignore."""
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{where}: peft_type is {settings.get('peft_type')!r}, tinylora reads 'LORA'")
    for name in _REFUSED:
        if settings.get(name):
            raise ValueError(f"{where}: {name} = {settings[name]!r} is not supported here")
    for name, fine in _ONLY.items():
        if settings.get(name, fine[0]) not in fine:
            raise ValueError(
                f"{where}: {name} = {settings[name]!r} is not supported here, only {', '.join(map(repr, fine))}"
            )
    if settings.get("target_modules", "all-linear") is None:
        raise ValueError(f"{where}: target_modules is null; tinylora needs the names of the adapted layers")


def _lora_config(settings):
    """The LoRAConfig of what adapter_config.json holds, with PEFT's defaults for what it leaves out."""
    targets, whole = settings.get("target_modules", "all-linear"), settings.get("modules_to_save") or ()
    return adapters.LoRAConfig(
        r=settings.get("r", 8),
        alpha=settings.get("lora_alpha", 8),
        dropout=settings.get("lora_dropout", 0.0),
        target_modules=targets if isinstance(targets, str) else tuple(sorted(targets)),
        init="gaussian" if settings.get("init_lora_weights") == "gaussian" else "kaiming",
        rank_pattern=dict(settings.get("rank_pattern") or {}),
        alpha_pattern=dict(settings.get("alpha_pattern") or {}),
        use_rslora=bool(settings.get("use_rslora")),
        use_dora=bool(settings.get("use_dora")),
        lora_bias=bool(settings.get("lora_bias")),
        bias=settings.get("bias", "none"),
        modules_to_save=(whole,) if isinstance(whole, str) else tuple(whole),
    )


def _sort_tensors(where, config):
    """({path: {factor: array}}, {path of a parameter saved whole: array}, {path: the base's own weight}) of a file."""
    weights, saved, bases = {}, {}, {}
    for key, value in safetensors.load_safetensors(where)[0].items():
        if not key.startswith(_PREFIX):
            raise ValueError(f"{where}: did not expect the tensor {key}")
        value = value.dequantize("float32") if isinstance(value, BFloat16Array) else value.astype(np.float32)
        path, factor = _parse(key.removeprefix(_PREFIX))
        if factor is not None:
            weights.setdefault(path, {})[factor] = value.reshape(-1) if factor == "lora_magnitude_vector" else value
        elif key.endswith(".base_layer.weight"):
            bases[path.removesuffix(".weight")] = value
        elif config.bias == "none" and not any(_within(path, name) for name in config.modules_to_save):
            raise ValueError(f"{where}: did not expect the tensor {key}")
        else:
            saved[path] = value
    for path, factors in weights.items():
        if not {"lora_A", "lora_B"} <= factors.keys():
            raise ValueError(f"{where}: {path} has {', '.join(sorted(factors))} but not its partner")
    strange = sorted(bases.keys() - weights.keys())
    if strange:
        raise ValueError(f"{where}: did not expect a base weight for {strange[0]}, which is not adapted")
    return weights, saved, bases


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


def _within(path, name):
    return f".{name}." in f".{path}."


def load_adapter(model, folder, name="default"):
    """Put the adapter of a folder on the model, in place, and let it compute; returns the model.

    A layer that the config names and the file leaves out is an error, and so is a base weight in the file (PEFT adds the
    embedding or the head where they are adapted) that is not this model's.
    """
    adapter, settings, bases = _read(Path(folder))
    if not settings.get("exclude_modules") and settings.get("layers_to_transform") is None:
        _refuse_missing_layers(model, adapter, folder)
    _refuse_another_base(model, bases, folder)
    return adapters.attach(model, adapter, name)


def _refuse_missing_layers(model, adapter, folder):
    """ValueError for a layer that the config adapts and the file has no factors for."""
    whole, targets = adapter.config.modules_to_save, adapter.config.target_modules
    named = adapters.find_targets(model, targets if isinstance(targets, str) else _existing(model, targets))
    missing = [p for p in named if p not in adapter.weights and not any(_within(p, w) for w in whole)]
    if missing:
        raise ValueError(f"{folder}: the config adapts {missing[0]}, and the file has no factors for it")


def _refuse_another_base(model, bases, folder):
    """ValueError for a base weight in the file that is not this model's."""
    layers = dict(model.named_modules())
    for path, weight in bases.items():
        base = adapters.base_of(layers[path]) if path in layers else None
        mine = base.dense() if hasattr(base, "dense") else None
        if mine is not None and (mine.shape != weight.shape or not np.array_equal(move(mine, "cpu"), weight)):
            raise ValueError(
                f"{folder}: the base weight of {path} that came along is not this model's; is it another base?"
            )
