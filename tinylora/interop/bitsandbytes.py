"""4-bit weights in bitsandbytes' format: folders that transformers opens with `load_in_4bit`, and the reverse.

A weight <path>.weight of shape (out, in) becomes, in a safetensors file,

    <path>.weight                                          (⌈n/2⌉, 1) uint8, the even element in the high half
    <path>.weight.absmax                                   (blocks,) float32; with double quantization uint8
    <path>.weight.quant_map                                (16,) float32, the code by index
    <path>.weight.nested_absmax, .nested_quant_map         (⌈blocks/256⌉,) and (256,) float32, with double quantization
    <path>.weight.quant_state.bitsandbytes__nf4 | __fp4    JSON as uint8: quant_type, blocksize, dtype, shape, nested_…

and config.json gains a `quantization_config`. Both maps are read from the file and not assumed: the CPU quantizer of bitsandbytes up to
0.49 put −1 in front of its 8-bit map, and dequantizing with another map would be wrong.

bitsandbytes knows the codes NF4 and FP4, in blocks of 32 to 4096; other codes are refused with a sentence. Left out: LLM.int8().
"""

import json
import re
import shutil
from pathlib import Path

import numpy as np

from .. import codebooks, files
from ..backend import move
from ..dtypes import BFloat16Array, as_float32
from ..llama import Llama, LlamaConfig
from ..nn import Linear, Linear4bit
from ..quant import DoubleQuantized, QuantizedTensor, quantize
from ..tensor import Tensor
from ..tokenizers import load_tokenizer

_BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_STATE = ".quant_state.bitsandbytes__"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")

#: Matrices that are not linear layers, and heads, which transformers leaves in 16 bits.
NOT_LINEAR = (
    r"embed|lm_head|proj_out|cls\.predictions\.decoder|\bwte\b|\bwpe\b|\bshared\b|position|relative_attention_bias"
)

#: Heads that are tied to an embedding are in no file; transformers must still be told that they are dense.
_HEADS = ("lm_head", "embed_out", "proj_out", "cls.predictions.decoder")

#: model_types whose 4-bit copies were opened and run in transformers (tests/test_oracle.py). Others may store a linear weight as (in, out),
#: as GPT-2 does, or fuse experts on loading, and would come out wrong.
OPENED = ("llama", "mistral", "qwen2", "qwen3", "bert", "gpt_neox", "whisper")


# ---------------------------------------------------------------------------------------------------------------- one weight
def to_tensors(name, q):
    """The tensors under which bitsandbytes stores a QuantizedTensor. {name: array}"""
    if q.code_name not in ("nf4", "fp4") or q.blocksize not in _BLOCKSIZES:
        raise ValueError(
            f"{name}: bitsandbytes opens the codes nf4 and fp4 in blocks of {', '.join(map(str, _BLOCKSIZES))}, "
            f"this is {q.code_name} in blocks of {q.blocksize}"
        )
    q = q.to(lambda a: move(a, "cpu"))
    state = {"quant_type": q.code_name, "blocksize": q.blocksize, "dtype": q.dtype, "shape": list(q.shape)}
    tensors = {name: q.packed[:, None], f"{name}.quant_map": q.code}
    if q.double_quant:
        c = q.constants
        tensors[f"{name}.absmax"], tensors[f"{name}.nested_absmax"] = c.codes, c.absmax
        tensors[f"{name}.nested_quant_map"] = np.pad(c.code, (0, 256 - len(c.code)), mode="edge")
        state |= {"nested_blocksize": c.blocksize, "nested_dtype": "float32", "nested_offset": float(c.offset)}
    else:
        tensors[f"{name}.absmax"] = q.constants
    packed_state = np.frombuffer(json.dumps(state).encode("utf-8"), np.uint8)
    return {**tensors, f"{name}{_STATE}{q.code_name}": packed_state}


def from_tensors(name, tensors, where="the file"):
    """The QuantizedTensor that bitsandbytes stored under `name`; takes its tensors out of the dict."""
    keys = [key for key in tensors if key.startswith(name + _STATE)]
    if len(keys) != 1:
        raise ValueError(f"{where}: expected one {name}{_STATE}nf4 or …fp4, found {len(keys)}")
    try:
        state = json.loads(tensors.pop(keys[0]).tobytes())
        parts = {part: tensors.pop(f"{name}.{part}") for part in _PARTS if f"{name}.{part}" in tensors}
        q = _read(state, parts, _bytes(tensors.pop(name)))
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{where}: the 4-bit weight {name} is incomplete or damaged ({error})") from None
    if keys[0] != f"{name}{_STATE}{q.code_name}":
        raise ValueError(f"{where}: {keys[0]} says {q.code_name} inside")
    return q


def _read(state, parts, packed):
    """A QuantizedTensor from the JSON and the arrays of one weight; everything is checked before it is believed."""
    kind, blocksize, shape = (
        state["quant_type"],
        _whole(state["blocksize"], 1),
        tuple(_whole(n, 0) for n in state["shape"]),
    )
    size = int(np.prod(shape, dtype=np.int64))
    blocks = -(-size // blocksize)
    if kind not in ("nf4", "fp4") or state["dtype"] not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"it says quant_type {kind!r}, blocksize {blocksize}, dtype {state['dtype']!r}")
    nested = "nested_absmax" in parts
    _expect(packed, "the weight", (size + 1) // 2, np.uint8)
    _expect(parts["quant_map"], "quant_map", 16, np.float32)
    _expect(parts["absmax"], "absmax", blocks, np.uint8 if nested else np.float32)
    absmax, code = parts["absmax"], _same_or(codebooks.get(kind)[1], parts["quant_map"])
    if not nested:
        return QuantizedTensor(packed, absmax, code, kind, blocksize, shape, state["dtype"])
    second, offset = _whole(state["nested_blocksize"], 1), np.float32(float(state["nested_offset"]))
    if not np.isfinite(offset):
        raise ValueError(f"nested_offset is {offset}")
    _expect(parts["nested_quant_map"], "nested_quant_map", 256, np.float32)
    _expect(parts["nested_absmax"], "nested_absmax", -(-blocks // second), np.float32)
    nested_code = _same_or(codebooks.get_nested("dynamic8"), parts["nested_quant_map"])
    constants = DoubleQuantized(absmax, parts["nested_absmax"], offset, nested_code, second)
    return QuantizedTensor(packed, constants, code, kind, blocksize, shape, state["dtype"])


def _whole(n, least):
    if type(n) is not int or not least <= n < 1 << 48:
        raise ValueError(f"expected a whole number, {least} or more, found {n!r}")
    return n


def _expect(array, what, length, dtype):
    found = getattr(array, "dtype", None)
    if found != dtype or array.shape != (length,):
        raise ValueError(
            f"{what}: expected {length} {np.dtype(dtype).name}, found {found} of shape {tuple(array.shape)}"
        )


def _bytes(stored):
    """The packed bytes, in whichever dtype they were stored (bnb_4bit_quant_storage)."""
    stored = stored.bits if isinstance(stored, BFloat16Array) else stored
    return np.ascontiguousarray(stored).reshape(-1).view(np.uint8)


def _same_or(ours, theirs):
    """Our shared array where the file's is the same in every bit, else the file's."""
    return ours if ours.tobytes() == theirs.tobytes() else theirs


# ------------------------------------------------------------------------------------------------------------------- one model
def save(model, folder, compute_dtype="float32"):
    """Write a model whose linear layers are in 4 bits (`quantize_linears`) as config.json and model.safetensors.

    All other weights are written in bfloat16 where that holds every one of them exactly, else in float32.
    """
    tensors, dense, quantized = {}, {}, None
    for name, w in model.named_weights():
        if "lora_" in name:
            raise ValueError(
                "save: the model carries an adapter; merge it, or save it alone with interop.peft.save_adapter"
            )
        if isinstance(w, QuantizedTensor):
            tensors |= to_tensors(name, w)
            quantized = w
        else:
            dense[name] = w if isinstance(w, BFloat16Array) else move(w.data if isinstance(w, Tensor) else w, "cpu")
    if quantized is None:
        raise ValueError(
            "save: the model has no 4-bit layers; quantize_linears makes them, save_pretrained writes dense ones"
        )
    half = {name: w if isinstance(w, BFloat16Array) else BFloat16Array.of(w) for name, w in dense.items()}
    exact = all(
        (half[n].dequantize("float32") == w).all() for n, w in dense.items() if not isinstance(w, BFloat16Array)
    )
    kept = sorted(path for path, layer in model.named_modules() if isinstance(layer, Linear))
    config = {**model.config.to_dict(), "dtype": "bfloat16" if exact else "float32"}
    config["quantization_config"] = quantization_config(quantized, compute_dtype, kept or ["lm_head"])
    files.save_safetensors(Path(folder) / "model.safetensors", tensors | (half if exact else dense))
    model.tokenizer.save(Path(folder))
    files.write_json(Path(folder) / "config.json", config)


def quantization_config(q, compute_dtype="float32", skip=("lm_head",)):
    """config.json's entry for weights like q; `skip`: linear layers that stay dense."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": q.code_name,
        "bnb_4bit_use_double_quant": q.double_quant,
        "bnb_4bit_compute_dtype": compute_dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": list(skip),
    }


def load(folder, compute_dtype="float32"):
    """A Llama with Linear4bit layers from a folder that bitsandbytes, transformers or `save` wrote. All weights are frozen."""
    folder = Path(folder)
    config = files.read_json(folder / "config.json")
    if (config.get("quantization_config") or {}).get("quant_method") != "bitsandbytes":
        raise ValueError(
            f"{folder / 'config.json'} has no quantization_config of bitsandbytes; Llama.from_pretrained opens dense folders"
        )
    shape = LlamaConfig.from_dict(config, folder / "config.json")
    tensors = files.load_folder(folder)
    model = Llama(shape, load_tokenizer(folder, shape.vocab_size), draw=False)
    layers, state = dict(model.named_modules()), {}
    for key in [key for key in tensors if _STATE in key]:
        name = key.partition(_STATE)[0]
        state[name], path = from_tensors(name, tensors, folder), name.removesuffix(".weight")
        if not isinstance(layers.get(path), Linear) or layers[path].weight.shape != state[name].shape:
            raise ValueError(f"{folder}: {name} of shape {state[name].shape} fits no linear layer of its config.json")
        model.replace(path, Linear4bit(state[name], layers[path].bias, compute_dtype))
    if shape.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    state |= {n: w.dequantize("float32") if isinstance(w, BFloat16Array) else w for n, w in tensors.items()}
    try:
        model.load_state_dict(state)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{folder} does not fit its config.json: {error.args[0]}") from None
    return model.requires_grad_(False)


def is_quantized(path):
    """Whether a path is a folder whose config.json says that it is quantized."""
    config = Path(path) / "config.json"
    return str(path) != "base" and config.is_file() and bool(files.read_json(config).get("quantization_config"))


def open_model(path, compute_dtype="float32", dtype="float32", quantize=None):
    """A Llama from "base", a dense folder or a GGUF file (as from_pretrained, with its options), or from a 4-bit folder (as load)."""
    if is_quantized(path):
        if quantize is not None:
            raise ValueError(f"{path} is in 4 bits already; leave --quantize out")
        return load(path, compute_dtype)
    return Llama.from_pretrained(path, dtype, quantize)


# ------------------------------------------------------------------------------------------------------------ any folder
def is_linear_weight(name, w, skip=()):
    """Whether a tensor of a checkpoint is the weight of a linear layer, as far as its name and shape tell."""
    return (
        name.endswith(".weight")
        and len(w.shape) == 2
        and min(w.shape) > 1
        and (isinstance(w, BFloat16Array) or w.dtype.kind == "f")
        and not re.search(NOT_LINEAR, name)
        and not any(s in name for s in skip)
    )


def quantize_folder(
    source,
    target,
    code="nf4",
    blocksize=64,
    double_quant=True,
    skip=(),
    progress=True,
    rule="bitsandbytes-cpu",
    force=False,
):
    """A 4-bit copy of a folder with config.json and safetensors files: its linear weights in 4 bits, all other tensors as they were, and
    the small files that lie beside them (tokenizer, chat template, licence). Returns {name: QuantizedTensor}.

    Linear weights are the matrices named *.weight apart from embeddings and heads, and apart from names that contain a word of `skip`.
    Architectures outside OPENED are refused unless `force` is true. So is a target that holds another, dense model. ValueError says
    what does not fit; nothing is written then.
    """
    from tqdm import tqdm

    source, target = Path(source), Path(target)
    config = _check_folders(source, target, force)
    tensors, done = files.load_folder(source), {}
    linear = [name for name, w in tensors.items() if is_linear_weight(name, w, skip)]
    if not linear:
        raise ValueError(f"{source} holds no linear weights that are to be quantized")
    for name in linear:
        if not np.isfinite(as_float32(tensors[name])[0]).all():
            raise ValueError(f"{name} holds NaN or Inf; leave it out (skip, or --skip {name})")
    for name in tqdm(linear, desc=f"quantizing to {code}", disable=None if progress else True):
        done[name] = quantize(tensors.pop(name), code, blocksize, double_quant, rule, name=name)
        tensors |= to_tensors(name, done[name])
    dense = {n.removesuffix(".weight") for n, w in tensors.items() if n.endswith(".weight") and len(w.shape) == 2}
    kept = sorted({*_HEADS, *dense} - {n.removesuffix(".weight") for n in done})
    config["quantization_config"] = quantization_config(done[linear[0]], skip=kept)
    for path in sorted(source.iterdir()):  # tokenizer, chat template, licence
        if path.is_file() and _goes_along(path.name):
            with files.atomic(target / path.name) as temporary:
                shutil.copyfile(path, temporary)
    files.save_safetensors(target / "model.safetensors", tensors)
    files.write_json(target / "config.json", config)
    return done


def _check_folders(source, target, force):
    """The source's config, if the source can be quantized and the target can be written."""
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"{source} holds no config.json; expected a model folder as transformers saves it")
    config = files.read_json(source / "config.json")
    if config.get("quantization_config"):
        raise ValueError(f"{source / 'config.json'} says that the model is quantized already")
    if target.resolve() == source.resolve():
        raise ValueError(f"{target} would overwrite its source")
    if (target / "config.json").is_file() and not files.read_json(target / "config.json").get("quantization_config"):
        raise ValueError(f"{target} holds another, dense model; choose a new folder")
    if config.get("model_type") not in OPENED and not force:
        raise ValueError(
            f"{source}: 4-bit copies of {config.get('model_type')!r} were not tried in transformers "
            f"(tried: {', '.join(OPENED)}); force writes one all the same"
        )
    return config


_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pth",
    ".pt",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".onnx",
    ".ot",
    ".gguf",
    ".tflite",
    ".index.json",
)


def _goes_along(name):
    """Whether a file of the source belongs beside the 4-bit weights: no other weights, no adapter, nothing hidden."""
    return (
        not name.endswith(_WEIGHTS) and not name.startswith(".") and name not in ("config.json", "adapter_config.json")
    )


__all__ = [
    "OPENED",
    "from_tensors",
    "is_linear_weight",
    "load",
    "is_quantized",
    "open_model",
    "quantization_config",
    "quantize_folder",
    "save",
    "to_tensors",
]
