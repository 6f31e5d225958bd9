"""Weights in 4 and 8 bits in bitsandbytes' format: folders that transformers opens with bitsandbytes, and the reverse.

A 4-bit weight <path>.weight of shape (out, in) becomes, in a safetensors file,

    <path>.weight                                          (⌈n/2⌉, 1) uint8, the even element in the high half
    <path>.weight.absmax                                   (blocks,) float32; with double quantization uint8
    <path>.weight.quant_map                                (16,) float32, the code by index
    <path>.weight.nested_absmax, .nested_quant_map         (⌈blocks/256⌉,) and (256,) float32, with double quantization
    <path>.weight.quant_state.bitsandbytes__nf4 | __fp4    JSON as uint8: quant_type, blocksize, dtype, shape, nested_…

and config.json gains a `quantization_config`. Both maps are read from the file and not assumed: the CPU quantizer of bitsandbytes up to
0.49 put −1 in front of its 8-bit map, and dequantizing with another map would be wrong.

bitsandbytes knows the codes NF4 and FP4, in blocks of 32 to 4096; other codes are refused with a sentence. A weight in 8 bits (LLM.int8)
becomes its codes, its scales and a mark: see `models.eightbit`. Left out: a folder in both.
"""

import json
import re
import shutil
from pathlib import Path

from ..backend import move
from ..dtypes import BFloat16Array
from ..models import eightbit, files, safetensors
from ..models.eightbit import Linear8bit, VectorwiseInt8
from ..models.folders import MODEL_FILES
from ..models.fourbit import (  # noqa: F401 (from_tensors is handed on)
    check_finite,
    from_tensors,
    is_quantized,
    read_config,
    to_tensors,
)
from ..models.llama import Llama
from ..nn import Linear, is_adapter_weight
from ..quant import QuantizedTensor, quantize
from ..tensor import Tensor

#: Matrices that are not linear layers, and heads, which transformers leaves in 16 bits.
NOT_LINEAR = (
    r"embed|lm_head|proj_out|cls\.predictions\.decoder|\bwte\b|\bwpe\b|\bshared\b|position|relative_attention_bias"
)

#: Heads that are tied to an embedding are in no file; transformers must still be told that they are dense.
_HEADS = ("lm_head", "embed_out", "proj_out", "cls.predictions.decoder")

#: model_types whose copies in 4 and in 8 bits were opened and run in transformers (tests/oracle). Others may store a
#: linear weight as (in, out), as GPT-2 does, or fuse experts on loading, and would come out wrong.
OPENED = ("llama", "mistral", "qwen2", "qwen3", "bert", "gpt_neox", "whisper")


# ------------------------------------------------------------------------------------------------------------------- one model
def save(model, folder, compute_dtype="float32"):
    """Write a model whose linear layers are in 4 bits or in 8 (`quantize_linears`) as config.json and model.safetensors.

    All other weights are written in bfloat16 where that holds every one of them exactly, else in float32.
    """
    tensors, dense, kinds = {}, {}, {}
    for name, w in model.named_weights():
        if is_adapter_weight(name):
            raise ValueError(
                "save: the model carries an adapter; merge it, or save it alone with interop.peft.save_adapter"
            )
        if isinstance(w, (QuantizedTensor, VectorwiseInt8)):
            check_finite(w, f"save: {name}")
            tensors |= to_tensors(name, w) if isinstance(w, QuantizedTensor) else eightbit.to_tensors(name, w)
            kinds[type(w)] = w
        else:
            dense[name] = w if isinstance(w, BFloat16Array) else move(w.data if isinstance(w, Tensor) else w, "cpu")
    for name, w in dense.items():
        safetensors.check_finite(w, "save", name)
    if not kinds:
        raise ValueError(
            "save: the model has no 4-bit layers and no 8-bit ones; quantize_linears makes them, save_pretrained writes dense ones"
        )
    half = {name: w if isinstance(w, BFloat16Array) else BFloat16Array.of(w) for name, w in dense.items()}
    exact = all(
        (half[n].dequantize("float32") == w).all() for n, w in dense.items() if not isinstance(w, BFloat16Array)
    )
    kept = sorted(path for path, layer in model.named_modules() if isinstance(layer, Linear)) or ["lm_head"]
    config = {**model.config.to_dict(), "dtype": "bfloat16" if exact else "float32"}
    if len(kinds) > 1:
        raise ValueError("save: the model has layers both in 4 and in 8 bits, and config.json can say only one of them")
    if QuantizedTensor in kinds:
        config["quantization_config"] = quantization_config(kinds[QuantizedTensor], compute_dtype, kept)
    else:
        config["quantization_config"] = eightbit.quantization_config(_threshold(model), kept)
    with files.whole_folder(folder, replaces=MODEL_FILES) as new:
        safetensors.save_safetensors(new / "model.safetensors", tensors | (half if exact else dense))
        model.tokenizer.save(new)
        files.write_json(new / "config.json", config)


def _threshold(model):
    """The one threshold of a model's Linear8bit layers."""
    found = sorted({layer.threshold for _, layer in model.named_modules() if isinstance(layer, Linear8bit)})
    if len(found) > 1:
        raise ValueError(
            f"save: the layers have different thresholds ({found[0]} and {found[-1]}), config.json holds one"
        )
    return found[0]


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
    """A Llama with Linear4bit or Linear8bit layers from a folder that bitsandbytes, transformers or `save` wrote. All of it is frozen."""
    path = Path(folder).resolve()  # a folder that is called "base" is not the embedded model
    if not is_quantized(path):
        raise ValueError(
            f"{folder} has no config.json with bitsandbytes' quantization_config; Llama.from_pretrained opens dense folders"
        )
    return Llama.from_pretrained(path, compute_dtype=compute_dtype)


open_model = load  # the name until 0.1


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
    """A copy of a folder with config.json and safetensors files: its linear weights in 4 bits, all other tensors as they were, and
    the small files that lie beside them (tokenizer, chat template, licence). Returns {name: QuantizedTensor}.

    code="int8_vectorwise" writes LLM.int8 instead, {name: VectorwiseInt8}; blocks, double quantization and rule are nothing to it.

    Linear weights are the matrices named *.weight apart from embeddings and heads, and apart from names that contain a word of `skip`.
    NaN and Inf are refused in all tensors but these. Architectures outside OPENED are refused unless `force` is true. So is a target
    that holds another, dense model. ValueError says what does not fit; nothing is written then.
    """
    from tqdm import tqdm

    source, target = Path(source), Path(target)
    config = _check_folders(source, target, force)
    opened = safetensors.open_folder(source)
    tensors, done = dict(opened.items()), {}
    linear = [name for name, w in tensors.items() if is_linear_weight(name, w, skip)]
    if not linear:
        raise ValueError(f"{source} holds no linear weights that are to be quantized")
    where = {name: f"{opened.where(name)}: {name}" for name in tensors}
    for name in tensors:
        if opened.is_float(name) and not any(s in name for s in skip) and not safetensors.is_finite(tensors[name]):
            raise ValueError(f"{where[name]} holds NaN or Inf; leave it as it is (skip, or --skip {name})")
    for name in tqdm(linear, desc=f"quantizing to {code}", disable=None if progress else True):
        if code == eightbit.CODE:
            done[name] = VectorwiseInt8.of(tensors.pop(name), where[name])
            tensors |= eightbit.to_tensors(name, done[name])
        else:
            done[name] = quantize(tensors.pop(name), code, blocksize, double_quant, rule, name=where[name])
            check_finite(done[name], where[name])
            tensors |= to_tensors(name, done[name])
    dense = {n.removesuffix(".weight") for n, w in tensors.items() if n.endswith(".weight") and len(w.shape) == 2}
    kept = sorted({*_HEADS, *dense} - {n.removesuffix(".weight") for n in done})
    if code == eightbit.CODE:
        config["quantization_config"] = eightbit.quantization_config(skip=kept)
    else:
        config["quantization_config"] = quantization_config(done[linear[0]], skip=kept)
    with files.whole_folder(target, replaces=(*MODEL_FILES, *MEASURED)) as new:
        for path in sorted(source.iterdir()):  # tokenizer, chat template, licence
            if path.is_file() and _goes_along(path.name):
                shutil.copyfile(path, new / path.name)
        safetensors.save_safetensors(new / "model.safetensors", tensors)
        files.write_json(new / "config.json", config)
    return done


#: What `tinylora quantize` writes beside the weights: it speaks of the ones that are replaced.
MEASURED = (
    "report.json",
    "errors.svg",
)


def _check_folders(source, target, force):
    """The source's config, if the source can be quantized and the target can be written."""
    for folder in (source, target):
        files.settle(folder)
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"{source} holds no config.json; expected a model folder as transformers saves it")
    config = read_config(source)
    try:
        json.dumps(config, allow_nan=False)
    except (ValueError, RecursionError):
        raise ValueError(
            f"{source / 'config.json'} holds NaN or Infinity, or is nested too deeply; it is not written again"
        ) from None
    if is_quantized(source):
        raise ValueError(f"{source / 'config.json'} says that the model is quantized already")
    files.check_target(target, source)
    if (target / "config.json").is_file() and not read_config(target).get("quantization_config"):
        raise ValueError(f"{target} holds another, dense model; choose a new folder")
    if config.get("model_type") not in OPENED and not force:
        raise ValueError(
            f"{source}: quantized copies of {config.get('model_type')!r} were not tried in transformers "
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
    """Whether a file of the source belongs beside the quantized weights: no other weights, no adapter, nothing hidden."""
    return (
        not name.endswith(_WEIGHTS) and not name.startswith(".") and name not in ("config.json", "adapter_config.json")
    )
