"""GGUF files written, for llama.cpp and whatever else reads them: a model under its names, one tensor at a time.

    convert("folder", "model.gguf", "q8_0")     a folder (dense or of few bits), another GGUF, or "base"
    save(model, "model.gguf", "f16")            a model in memory: merged, or quantized

    f32     exact
    f16     rounded, ties to even; a weight above 65,504 has no float16 and is refused
    bf16    rounded, ties to even
    q8_0    blocks of 32 along a row: a float16 d = max|w| / 127 and the whole numbers w / d, as the gguf package rounds them

Norms and biases are float32 in every file, and a matrix whose rows are not whole blocks of 32 is f16 in a file of q8_0; both as in
llama.cpp's own converter. Its architecture llama pairs neighbouring rows of q and k for the rotary turn (see `gguf`), so there

    row 2i of a head there = row i here,    row 2i + 1 of a head there = row i + d/2 here,    i < d/2        (q and k)

and qwen2 and qwen3 pair halves, as Hugging Face does. Of rope scaling, a file holds a factor ("linear"), or what each frequency is
divided by, in the tensor rope_freqs.weight ("llama3"; see `rope`). The vocabulary is written by `gguf_vocabulary`. Whatever GGUF has no
place for is refused, or, where only another program would compute differently, said in a sentence (`Written.notes`).
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..backend import move
from ..nn import is_adapter_weight
from ..tensor import Tensor
from . import files, fourbit, gguf, rope
from .files import atomic
from .gguf_vocabulary import vocabulary
from .llama import Llama, _open

#: What --type may be: the type of the matrices, the number by which llama.cpp knows such a file, and the largest weight it holds.
TYPES = {
    "f32": ("F32", 0, float(np.finfo(np.float32).max)),
    "f16": ("F16", 1, 65504.0),
    "q8_0": ("Q8_0", 7, 127 * 65504.0),
    "bf16": ("BF16", 32, 255 * 2.0**120),
}
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_THEIRS = {ours: theirs for theirs, ours in gguf._NAMES.items()}


@dataclass(frozen=True)
class Written:
    """What was written: how many weights, and a sentence for each thing that a reader of the file should know."""

    weights: int
    notes: tuple


def convert(source, path, kind="f16", bar=iter):
    """Write the model at `source` as a GGUF, one weight in memory at a time. -> Written

    source   a folder (dense, or 4-bit: dequantized), FILE.gguf (dequantized and rounded once more), or "base"
    kind     "f16", "q8_0", "bf16" or "f32"
    bar      is given the names of the tensors and hands them on, for a progress bar
    """
    check_target(source, path, kind)
    if fourbit.is_quantized(source):
        return save(Llama.from_pretrained(source), path, kind, _name(source), bar)
    model, opened = _open(Llama, source)
    shapes = {name: w.shape for name, w in model.named_parameters()}
    return _write_model(path, model, shapes, opened.weights.float32, kind, _name(source), bar)


def save(model, path, kind="f16", name=None, bar=iter):
    """Write a model in memory as a GGUF; weights of few bits are dequantized. -> Written; ValueError if it carries an adapter."""
    check_target(None, path, kind)
    weights = dict(model.named_weights())
    if any(map(is_adapter_weight, weights)):
        raise ValueError(
            "the model carries an adapter: merge it first, or write it alone with interop.gguf.save_adapter"
        )

    def read(name):
        w = weights[name]
        return move(w.data if isinstance(w, Tensor) else w.dequantize("float32"), "cpu")

    return _write_model(path, model, {n: w.shape for n, w in weights.items()}, read, kind, name, bar)


def check_target(source, path, kind):
    """ValueError for a type that is unknown and a file that cannot be written, or that would be the source itself."""
    if kind not in TYPES:
        raise ValueError(f"type {kind!r} is unknown: expected one of {', '.join(TYPES)}")
    gguf._package("writing")
    files.check_target(path, *([] if source is None else [source]), folder=False)


def _name(source):
    """What the file says that the model is called: its folder or file."""
    path = Path(source).resolve()
    return path.stem if gguf.is_gguf(path) else path.name


def _write_model(path, model, shapes, read, kind, name, bar):
    config = model.config
    fields, (words, notes) = _fields(config, kind, name), vocabulary(model.tokenizer, config)
    sources, extra = {theirs(here): here for here in shapes}, _divisors(config)
    plan, odd = planned(
        {name: shapes[here] for name, here in sources.items()} | {n: w.shape for n, w in extra.items()}, kind
    )
    if config.model_type == "mistral" and "llama.attention.sliding_window" in fields:
        notes.append(
            f"llama.cpp attends to every position here, and the model only to the last {config.sliding_window}"
        )

    notes += _unread_by_transformers(config, shapes)

    def there(tensor):
        return extra[tensor] if tensor in extra else rows_there(sources[tensor], read(sources[tensor]), config)

    write(path, fields | words, plan, there, bar)
    return Written(sum(math.prod(shape) for shape in shapes.values()), (*notes, *odd))


def _unread_by_transformers(config, shapes):
    """Sentences about what llama.cpp and tinylora read from the file, and transformers' reader (5.23) passes over."""
    kind, notes = (config.rope_scaling or {}).get("rope_type"), []
    if kind in ("linear", "llama3", "longrope"):
        where = "rope.scaling.factor" if kind == "linear" else gguf._FREQUENCIES
        notes.append(
            f"transformers does not read {where} of a GGUF, and computes without the scaled positions; llama.cpp and tinylora do"
        )
    own = ".q_proj.", ".k_proj.", ".v_proj."  # biases that every qwen2 has
    biases = [
        n for n in shapes if n.endswith(".bias") and not (config.model_type == "qwen2" and any(p in n for p in own))
    ]
    if biases:
        who = "llama.cpp and tinylora do" if architecture(config) == "llama" else "tinylora does"
        notes.append(f"transformers does not read the {len(biases)} biases of such a GGUF, and computes without; {who}")
    return notes


def architecture(config):
    """llama.cpp's name of the model_type of a LlamaConfig."""
    if config.model_type not in _ARCHITECTURES:
        raise ValueError(f"GGUF: model_type is {config.model_type!r}, tinylora writes {', '.join(_ARCHITECTURES)}")
    return _ARCHITECTURES[config.model_type]


def theirs(name):
    """llama.cpp's name of a weight: model.layers.0.self_attn.q_proj.weight -> blk.0.attn_q.weight."""
    match = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)\.(weight|bias)", name)
    if match is None or match[2] not in _THEIRS:
        raise ValueError(f"GGUF: llama.cpp has no name for the weight {name}")
    return f"{'' if match[1] is None else f'blk.{match[1]}.'}{_THEIRS[match[2]]}.{match[3]}"


def turned_heads(name, config):
    """Of how many heads a weight's rows are made, where its file pairs them as neighbours; else None."""
    if architecture(config) == "llama":
        heads = {".q_proj.": config.num_attention_heads, ".k_proj.": config.num_key_value_heads}
        return next((n for which, n in heads.items() if which in name), None)
    return None


def rows_there(name, w, config):
    """The rows of a weight (out, ...) in the order in which its architecture's file has them: the inverse of gguf.halves."""
    heads = turned_heads(name, config)
    return w if heads is None else w.reshape(heads, 2, -1, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def planned(shapes, kind):
    """{tensor: (shape, type)} of {tensor: shape} in a file of this kind, and sentences about types that are not the kind's."""
    plan, odd = {}, []
    for name, shape in shapes.items():
        plan[name] = (tuple(shape), TYPES[kind][0])
        if len(shape) < 2:
            plan[name] = (tuple(shape), "F32")
        elif kind == "q8_0" and shape[-1] % 32:
            plan[name] = (tuple(shape), "F16")
            odd.append(name)
    what = f"{len(odd)} of {len(plan)} tensors are F16, because their rows are not whole blocks of 32"
    return plan, [f"{what}; the first is {odd[0]}"] if odd else []


def _fields(config, kind, name):
    """{key: value} of the header without the vocabulary; None is left out."""
    arch, scaling, window = architecture(config), config.rope_scaling or {}, config.sliding_window
    if scaling.get("rope_type") == "dynamic":
        raise ValueError("GGUF: llama.cpp has no rope scaling of type 'dynamic', which depends on a text's length")
    window = None if window is None or window >= config.max_position_embeddings else window
    if window is not None and arch != "llama":
        raise ValueError(
            f"GGUF: {arch} has no place for a sliding window ({window} tokens), and llama.cpp computes none"
        )
    linear = scaling.get("rope_type") == "linear"
    sizes = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.sliding_window": window,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
        "rope.scaling.type": "linear" if linear else None,
        "rope.scaling.factor": float(scaling["factor"]) if linear else None,
    }
    about = {
        "general.architecture": arch,
        "general.type": "model",
        "general.name": name,
        "general.file_type": TYPES[kind][1],
        "general.quantization_version": 2,
    }
    return about | {f"{arch}.{key}": value for key, value in sizes.items() if value is not None}


def _divisors(config):
    """{"rope_freqs.weight": what the rotary frequencies are divided by} where each has its own; else nothing."""
    if (config.rope_scaling or {}).get("rope_type") not in ("llama3", "longrope"):
        return {}
    divisors = rope.divisors(config.head_dim, config.rope_theta, config.rope_scaling)
    return {gguf._FREQUENCIES: divisors.astype(np.float32)}


# --------------------------------------------------------------------------------------------------------------------- any file
def write(path, fields, plan, read, bar=iter):
    """Write a GGUF atomically, never more than one tensor in memory.

    fields   {key: value} of the header: str, bool, int (uint32), float (float32), or a list of one of them
    plan     {tensor: (shape, type)}, the type as GGUF names it: "F32", "Q8_0"
    read     read(tensor) -> float array of that shape
    """
    package = gguf._package("writing")
    with atomic(path) as temporary:
        writer = package.GGUFWriter(temporary, fields["general.architecture"])
        try:
            for key, value in fields.items():
                _add(writer, key, value)
            for name, (shape, kind) in plan.items():
                kind = package.GGMLQuantizationType[kind]
                block, size = package.GGML_QUANT_SIZES[kind]
                writer.add_tensor_info(name, shape, np.dtype(np.float32), math.prod(shape) // block * size, kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name in bar(list(plan)):
                writer.write_tensor_data(_packed(package, f"{path}: {name}", read(name), *plan[name]))
        finally:
            writer.close()


def _add(writer, key, value):
    """One entry of the header. The writer itself puts the architecture in, and leaves empty strings and lists out."""
    if key == "general.architecture" or value is None:
        return
    for kind, add in ((str, "string"), (bool, "bool"), (int, "uint32"), (float, "float32"), (list, "array")):
        if isinstance(value, kind):
            return getattr(writer, f"add_{add}")(key, value)
    raise TypeError(f"GGUF: {key} is a {type(value).__name__}")


def _packed(package, name, w, shape, kind):
    """A float array in a GGUF type; ValueError for another shape, and for a number that the type does not have."""
    if w.shape != shape:
        raise ValueError(f"{name} has shape {w.shape}, planned was {shape}")
    w = np.ascontiguousarray(w, np.float32)
    largest = max(w.max(), -w.min())
    limit = next(limit for known, _, limit in TYPES.values() if known == kind)
    if not largest <= limit:
        what = f"{largest:g}, and {kind} ends at {limit:g}: take another type"
        what = (
            ("NaN" if np.isnan(largest) else "Inf") + "; expected finite numbers" if not np.isfinite(largest) else what
        )
        raise ValueError(f"{name} holds {what}")
    with np.errstate(all="ignore"):  # the package divides blocks of zeros by 0, and then sets them to 0
        return package.quantize(w, package.GGMLQuantizationType[kind])
