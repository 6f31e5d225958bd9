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
from pathlib import Path

import numpy as np

from .. import codebooks
from ..backend import move
from ..dtypes import BFloat16Array
from ..quant import DoubleQuantized, QuantizedTensor
from . import files

_BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_STATE = ".quant_state.bitsandbytes__"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


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


# ------------------------------------------------------------------------------------------------------------- a model folder
#: What the sentences about other folders end with.
OPENS = "tinylora opens dense folders, folders in bitsandbytes' 4 or 8 bits and GGUF files"

_BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}


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
    config = files.read_json(folder / "config.json")
    said = [config[key] for key in ("quantization_config", "compression_config") if config.get(key)]
    methods = [entry.get("quant_method") if isinstance(entry, dict) else entry for entry in said]
    methods += ["mlx"] * bool(config.get("quantization"))
    methods += [method for name, method in _BESIDE.items() if (folder / name).is_file()]
    if not methods:
        return "dense"
    if said and isinstance(said[0], dict) and methods[0] in (None, "bitsandbytes"):
        for bits in ("4bit", "8bit"):
            if said[0].get(f"load_in_{bits}") or said[0].get(f"_load_in_{bits}"):
                return bits
    raise ValueError(f"{folder}: its weights are quantized by {methods[0] or 'a method without a name'!r}; {OPENS}")


def is_quantized(path):
    """Whether a path is a folder in bitsandbytes' 4 or 8 bits; ValueError as in `held`."""
    return held(path) != "dense"
