"""tinylora: LoRA and QLoRA, small enough to read beside the papers.

    import tinylora as tl

    model = tl.Llama.from_pretrained("base")
    tl.quantize_linears(model, code="nf4", double_quant=True)
    tl.add_lora(model, r=16, alpha=32, target_modules="all-linear")
    tl.print_trainable_parameters(model)

Importing loads NumPy and nothing else; scipy, safetensors and tqdm are imported where they are used.
"""

import importlib

from . import adapters, backend, codebooks, conv, dtypes, lora, nn, ops, optim, paging, quant
from .adapters import (
    adapter_rows,
    add_lora,
    add_weighted_adapter,
    disable_adapter,
    merge,
    print_trainable_parameters,
    set_adapter,
    trainable_parameters,
    unmerge,
)
from .backend import seed
from .llama import KVCache, Llama, LlamaConfig
from .lora import LoRALinear
from .nn import quantize_linears
from .optim import AdamW
from .optim8bit import AdamW8bit
from .paging import Pager
from .quant import QuantizedTensor, quantize
from .tensor import Tensor, checkpoint, no_grad, primitive, tape_bytes

__version__ = "0.1.0"

# fmt: off
__all__ = ["AdamW", "AdamW8bit", "KVCache", "Llama", "LlamaConfig", "LoRALinear", "Pager", "QuantizedTensor", "Tensor", "adapter_rows",
           "adapters", "add_lora", "add_weighted_adapter", "backend", "checkpoint", "codebooks", "conv", "disable_adapter", "dtypes",
           "interop", "lora", "merge", "nn", "no_grad", "ops", "optim", "paging", "primitive", "print_trainable_parameters", "quant",
           "quantize", "quantize_linears", "seed", "set_adapter", "tape_bytes", "trainable_parameters", "unmerge"]
# fmt: on


#: Where a module that had a place of its own lies now. One release of aliases: `tinylora.laws` still works.
MOVED = {
    "subspaces": "papers.subspaces",
    "intrinsic": "papers.intrinsic",
    "ranks": "papers.ranks",
    "switching": "papers.switching",
    "experiments": "papers.claims",
    "survey": "papers.codes_on_weights",
    "derivation": "papers.nf4_construction",
    "normality": "papers.normality",
    "footprints": "papers.qlora_numbers",
}


def __getattr__(name):
    """Heavier rooms are opened when they are asked for: tinylora.interop, tinylora.train, …"""
    if name in (
        "papers",
        "interop",
        "counting",
        "flops",
        "variants",
        "train",
        "corpus",
        "finetune",
        "pretrain",
        "figures",
        "data",
        "laws",
        "optimality",
        "memory",
        "paging_costs",
        "optim8bit",
    ):
        return importlib.import_module(f"{__name__}.{name}")
    if name in MOVED:
        return importlib.import_module(f"{__name__}.{MOVED[name]}")
    raise AttributeError(f"module 'tinylora' has no attribute {name!r}")
