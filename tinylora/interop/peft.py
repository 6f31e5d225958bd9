"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors.

    base_model.model.<path>.lora_A.weight   (r, in)
    base_model.model.<path>.lora_B.weight   (out, r)

An adapter saved here opens with `PeftModel.from_pretrained`, and one that PEFT trained opens here. What this file does
not read (DoRA, rsLoRA, per-layer ranks, biases, modules_to_save) is refused with a sentence, since ignoring it would
change the model silently. A config without `r` or `lora_alpha` means 8 to PEFT, and so it does here.
"""

from pathlib import Path

import numpy as np

from .. import files, lora
from ..backend import move
from ..dtypes import BFloat16Array

_PREFIX = "base_model.model."

#: Settings that change what the adapter computes, or the base under it (the inits that PEFT subtracts from the base weight).
_REFUSED = (
    "use_dora", "use_rslora", "lora_bias", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save",
    "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "layer_replication", "alora_invocation_tokens",
    "trainable_token_indices", "target_parameters",
)  # fmt: skip
_ONLY = {"bias": ("none",), "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva")}


def save_adapter(model, folder, base_model=None):
    """Write the model's adapter as PEFT does. base_model: what PEFT should record as the base (a name or a folder)."""
    found = lora.adapters(model)
    if not found:
        raise ValueError("save_adapter: the model carries no adapter; add_lora puts one on")
    c = model.lora_config
    tensors = {}
    for path, layer in found:
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = move(layer.lora_A.weight.data, "cpu")
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = move(layer.lora_B.weight.data, "cpu")
    targets = c.target_modules
    if not isinstance(targets, str) or targets == "all-linear":
        # Names, as long as they mean these layers and no others; else whole paths. ("all-linear" would be resolved anew.)
        paths = {path for path, _ in found}
        targets = sorted({path.rpartition(".")[2] for path in paths}) if targets == "all-linear" else list(targets)
        if lora.named(model, targets) != paths:
            targets = sorted(paths)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": int(c.r),
        "lora_alpha": c.alpha,
        "lora_dropout": c.dropout,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
    }
    folder = Path(folder)
    files.save_safetensors(folder / "adapter_model.safetensors", tensors)
    files.write_json(folder / "adapter_config.json", config)


def read_adapter(folder):
    """An Adapter (see lora.attach) from a folder that PEFT or tinylora wrote."""
    folder = Path(folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}; expected an adapter folder as PEFT writes it")
    config = files.read_json(folder / "adapter_config.json")
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"{folder / 'adapter_config.json'}: peft_type is {config.get('peft_type')!r}, tinylora reads 'LORA'"
        )
    for name in _REFUSED:
        if config.get(name):
            raise ValueError(f"{folder / 'adapter_config.json'}: {name} = {config[name]!r} is not supported here")
    for name, fine in _ONLY.items():
        if config.get(name, fine[0]) not in fine:
            raise ValueError(
                f"{folder / 'adapter_config.json'}: {name} = {config[name]!r} is not supported here, only {fine[0]!r}"
            )
    tensors, _ = files.load_safetensors(folder / "adapter_model.safetensors")
    weights = {}
    for key, value in tensors.items():
        path, _, factor = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        if not key.startswith(_PREFIX) or factor not in ("lora_A", "lora_B"):
            raise ValueError(f"{folder / 'adapter_model.safetensors'}: did not expect the tensor {key}")
        value = value.dequantize("float32") if isinstance(value, BFloat16Array) else value.astype(np.float32)
        weights.setdefault(path, {})[factor] = value
    for path, pair in weights.items():
        if len(pair) != 2:
            raise ValueError(
                f"{folder / 'adapter_model.safetensors'}: {path} has {next(iter(pair))} but not its partner"
            )
    targets = config.get("target_modules", "all-linear")
    c = lora.LoRAConfig(
        config.get("r", 8),
        config.get("lora_alpha", 8),
        config.get("lora_dropout", 0.0),
        targets if isinstance(targets, str) else tuple(sorted(targets)),
    )
    return lora.Adapter(c, {path: (pair["lora_A"], pair["lora_B"]) for path, pair in weights.items()})


def load_adapter(model, folder):
    """Put the adapter of a folder on the model, in place; returns the model."""
    return lora.attach(model, read_adapter(folder))
