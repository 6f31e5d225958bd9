"""A 4-bit weight as bitsandbytes stores it in a safetensors file.

A weight <path>.weight of shape (out, in) becomes

    <path>.weight                                          (⌈n/2⌉, 1) uint8, the even element in the high half
    <path>.weight.absmax                                   (blocks,) float32; with double quantization uint8
    <path>.weight.quant_map                                (16,) float32, the code by index
    <path>.weight.nested_absmax, .nested_quant_map         (⌈blocks/256⌉,) and (256,) float32, with double quantization
    <path>.weight.quant_state.bitsandbytes__nf4 | __fp4    JSON as uint8: quant_type, blocksize, dtype, shape, nested_…

Both maps are read from the file and not assumed: the CPU quantizer of bitsandbytes up to 0.49 put −1 in front of its 8-bit map, and
dequantizing with another map would be wrong.
"""

import json
import math
from pathlib import Path

import numpy as np

from .. import codebooks
from ..backend import array_module, move
from ..dtypes import BFloat16Array
from ..quant import DoubleQuantized, QuantizedTensor
from . import files
from .fields import check, fields, flag, number, one_of, optional, several, shown, text, whole

_BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_STATE = ".quant_state.bitsandbytes__"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_SAID = {
    "quant_type": one_of("nf4", "fp4"),
    "blocksize": one_of(*_BLOCKSIZES),
    "dtype": one_of("float32", "float16", "bfloat16"),
    "shape": several(whole(0, 1 << 48), most=8),
}
_SAID_OF_NESTED = {"nested_blocksize": whole(1, 4096), "nested_offset": number(-3e38, 3e38)}


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


def names(tensors):
    """The names of the 4-bit weights among a file's tensors."""
    return [key.partition(_STATE)[0] for key in tensors if _STATE in key]


def from_tensors(name, tensors, where="the file"):
    """The QuantizedTensor that bitsandbytes stored under `name`; takes its tensors out of the dict."""
    keys = [key for key in tensors if key.startswith(name + _STATE)]
    if len(keys) != 1:
        raise ValueError(f"{where}: expected one {name}{_STATE}nf4 or …fp4, found {len(keys)}")
    try:
        state = json.loads(_bytes(tensors.pop(keys[0])).tobytes())
        parts = {part: tensors.pop(f"{name}.{part}") for part in _PARTS if f"{name}.{part}" in tensors}
        q = _read(state, parts, _bytes(tensors.pop(name)))
    except (KeyError, ValueError, RecursionError) as error:
        what = f"{error.args[0]} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{where}: the 4-bit weight {name} is incomplete or damaged ({what})") from None
    if keys[0] != f"{name}{_STATE}{q.code_name}":
        raise ValueError(f"{where}: {keys[0]} says {q.code_name} inside")
    return q


def _read(state, parts, packed):
    """A QuantizedTensor from the JSON and the arrays of one weight; everything is checked before it is believed."""
    check(state, _SAID, "quant_state", required=tuple(_SAID))
    kind, blocksize, shape, dtype = state["quant_type"], state["blocksize"], tuple(state["shape"]), state["dtype"]
    size = math.prod(shape)
    blocks = -(-size // blocksize)
    nested = "nested_absmax" in parts
    _expect(packed, "the weight", (size + 1) // 2, np.uint8)
    _expect(parts["quant_map"], "quant_map", 16, np.float32)
    _expect(parts["absmax"], "absmax", blocks, np.uint8 if nested else np.float32)
    absmax, code = parts["absmax"], _map(codebooks.get(kind)[1], parts, "quant_map")
    constants = _nested(state, parts, blocks) if nested else _positive(absmax, "absmax")
    q = QuantizedTensor(packed, constants, code, kind, blocksize, shape, dtype)
    check_finite(q, "the weight")
    return q


def _nested(state, parts, blocks):
    """The constants of a weight with double quantization."""
    check(state, _SAID_OF_NESTED, "quant_state", required=tuple(_SAID_OF_NESTED))
    second, offset = state["nested_blocksize"], np.float32(state["nested_offset"])
    _expect(parts["nested_quant_map"], "nested_quant_map", 256, np.float32)
    _expect(parts["nested_absmax"], "nested_absmax", -(-blocks // second), np.float32)
    code = _map(codebooks.get_nested("dynamic8"), parts, "nested_quant_map")
    return DoubleQuantized(parts["absmax"], _positive(parts["nested_absmax"], "nested_absmax"), offset, code, second)


def _positive(array, what):
    if not (array >= 0).all():
        raise ValueError(f"{what}: holds NaN or a negative number; expected what is 0 or more")
    return array


def check_finite(w, name):
    """ValueError if a weight in 4 bits stands for NaN or Inf anywhere: in its constants, or where they are multiplied by the code."""
    if isinstance(w, QuantizedTensor) and not (_finite(w, _bound(w)) or _finite(w, w.absmax)):
        raise ValueError(f"{name}: its absmax and its code stand for numbers that float32 does not hold")


def _bound(q):
    """What no absmax of a weight exceeds, without restoring each of them: max |d| · max |n| + |μ|. (1,)"""
    if not q.double_quant:
        return q.constants
    c, xp = q.constants, array_module(q.packed)
    with np.errstate(all="ignore"):
        return (xp.abs(c.code).max() * xp.abs(c.absmax).max(initial=np.float32(0)) + abs(c.offset)).reshape(1)


def _finite(q, absmax):
    xp = array_module(q.packed)
    with np.errstate(all="ignore"):
        return bool(xp.isfinite(xp.abs(absmax).max(initial=np.float32(0)) * xp.abs(q.code).max()))


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


def _map(ours, parts, what):
    """Our shared array where the file's map is the same in every bit, else the file's."""
    theirs = parts[what]
    if not np.isfinite(theirs).all():  # at a place that no weight uses, too
        raise ValueError(f"{what}: holds NaN or Inf; expected finite numbers")
    return ours if ours.tobytes() == theirs.tobytes() else theirs


# ------------------------------------------------------------------------------------------------------------- a model folder
#: What the sentences about other folders end with.
OPENS = "tinylora opens dense folders, folders in bitsandbytes' 4 or 8 bits and GGUF files"

#: What `quantization_config` may say that is looked at.
QUANTIZATION = {
    "quant_method": optional(text(100)),
    "load_in_4bit": optional(flag()),
    "load_in_8bit": optional(flag()),
    "_load_in_4bit": optional(flag()),
    "_load_in_8bit": optional(flag()),
    "bnb_4bit_quant_type": optional(text(100)),
    "bnb_4bit_use_double_quant": optional(flag()),
    "bnb_4bit_compute_dtype": optional(text(100)),
    "bnb_4bit_quant_storage": optional(text(100)),
    "llm_int8_skip_modules": optional(several(text())),
    "llm_int8_threshold": optional(number(0)),
    "llm_int8_has_fp16_weight": optional(flag()),
}

LONGEST_CONFIG, MOST_SETTINGS = 8 << 20, 1 << 17  # bytes, values

_BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}


def read_config(folder):
    """The config.json of a model folder, with no field looked at yet."""
    return files.read_json(Path(folder) / "config.json", LONGEST_CONFIG, MOST_SETTINGS)


def held(path):
    """How a model folder holds its weights: "dense", or in bitsandbytes' "4bit" or "8bit". ValueError names any other method.

    config.json says so in `quantization_config` (transformers), `compression_config` (older compressed-tensors) or `quantization` (MLX),
    or a file beside it does (AutoGPTQ, AutoAWQ and ModelOpt, before transformers knew them).
    """
    folder = Path(path)
    if str(path) == "base":
        return "dense"
    files.settle(folder)
    if not (folder / "config.json").is_file():
        return "dense"
    where, config, said = folder / "config.json", read_config(folder), {}
    for key in ("quantization_config", "compression_config"):
        if type(config.get(key)) is not str:  # an old spelling gives the method alone
            check(config, {key: optional(fields(QUANTIZATION))}, where)
        if config.get(key) not in (None, {}):
            said[key] = config[key]
    methods = [(f"{where}: {key} says that", e if type(e) is str else e.get("quant_method")) for key, e in said.items()]
    methods += [(f"{where}: quantization says that", "mlx")] * bool(config.get("quantization"))
    methods += [(f"{folder / name}:", method) for name, method in _BESIDE.items() if (folder / name).is_file()]
    if not methods:
        return "dense"
    first = next(iter(said.values()), None)
    if type(first) is dict and methods[0][1] in (None, "bitsandbytes"):
        for bits in ("4bit", "8bit"):
            if first.get(f"load_in_{bits}") or first.get(f"_load_in_{bits}"):
                return bits
    says, method = methods[0]
    raise ValueError(f"{says} its weights are quantized by {shown(method or 'a method without a name')}; {OPENS}")


def is_quantized(path):
    """Whether a path is a folder in bitsandbytes' 4 or 8 bits; ValueError as in `held`."""
    return held(path) != "dense"
