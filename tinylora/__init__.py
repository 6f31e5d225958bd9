"""tinylora: LoRA and QLoRA, small enough to read beside the papers.

    import tinylora as tl

    model = tl.Llama.from_pretrained("base")
    tl.quantize_linears(model, code="nf4", double_quant=True)
    tl.add_lora(model, r=16, alpha=32, target_modules="all-linear")
    tl.print_trainable_parameters(model)

Importing loads NumPy and nothing else; scipy and tqdm are imported where they are used, and the models with the first `tl.Llama`.
"""

import importlib
import importlib.machinery
import os
import sys
import types

# As a command, and only then: Ctrl-C during the imports below ends it without a traceback, as it does from `cli.main` on.
_command = os.path.basename(sys.orig_argv[1]) if len(sys.orig_argv) > 1 else ""
if _command == "-m" and len(sys.orig_argv) > 2:
    _command = sys.orig_argv[2].removesuffix(".cli")
if _command in ("tinylora", "tinylora.exe"):
    import signal

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

from . import adapters, backend, codebooks, dtypes, lora, nn, ops, optim, paging, quant, tape, tensor
from .adapters import (
    adapter_rows,
    add_lora,
    add_weighted_adapter,
    conv,
    disable_adapter,
    kbit,
    kinds,
    merge,
    prepare_model_for_int8_training,
    print_trainable_parameters,
    set_adapter,
    trainable_parameters,
    unmerge,
)
from .backend import seed
from .kernels import attention, copies, pools, scatter
from .lora import LoRALinear
from .nn import quantize_linears
from .optim import AdamW
from .paging import Pager
from .quant import QuantizedTensor, quantize
from .tape import checkpoint, tape_bytes
from .tensor import Tensor, no_grad, primitive
from .training import schedule as rates
from .training.adamw8bit import AdamW8bit

__version__ = "0.1.0"

# fmt: off
__all__ = ["AdamW", "AdamW8bit", "KVCache", "Llama", "LlamaConfig", "LoRALinear", "Pager", "QuantizedTensor", "Tensor", "adapter_rows",
           "adapters", "add_lora", "add_weighted_adapter", "backend", "checkpoint", "codebooks", "conv", "disable_adapter", "dtypes",
           "interop", "lora", "merge", "nn", "no_grad", "ops", "optim", "paging", "prepare_model_for_int8_training", "primitive",
           "print_trainable_parameters", "quant", "quantize", "quantize_linears", "seed", "set_adapter", "tape_bytes",
           "trainable_parameters", "unmerge"]
# fmt: on


#: Where a module that had a place of its own lies now: one release of aliases, so that `tinylora.laws` still works.
MOVED = {
    "checkpoints": "models.folders",
    "corpus": "training.corpus",
    "counting": "costs.parameters papers.lora_numbers papers.verdict",
    "derivation": "papers.nf4_construction",
    "experiments": "papers.claims",
    "files": "models.files models.safetensors",
    "finetune": "training.finetune training.compare costs.methods",
    "flops": "costs.flops",
    "footprints": "papers.qlora_numbers",
    "gguf": "models.gguf",
    "intrinsic": "papers.intrinsic",
    "laws": "numerics.distributions",
    "llama": "models.llama",
    "memory": "costs.memory costs.tables",
    "normality": "papers.normality",
    "optimality": "numerics.optimality",
    "optim8bit": "training.adamw8bit",
    "paging_costs": "costs.paging",
    "pretrain": "training.pretrain",
    "ranks": "papers.ranks",
    "rounding": "kernels.rounding",
    "subspaces": "papers.subspaces",
    "survey": "papers.codes_on_weights",
    "switching": "papers.switching",
    "tokenizers": "models.tokenizers",
    "train": "training.train",
}
#: Names that left a file that stayed, likewise for one release.
for _old, _new, _names in (
    (ops, conv, "conv"),
    (ops, attention, "QUERY_BLOCK"),
    (paging, pools, "WHOLE_TENSORS_FROM"),
    (backend, scatter, "scatter_add"),
    (backend, copies, "pinned_zeros copy_to_device copy_to_host managed_zeros prefetch_managed keep_freed_memory"),
    (tensor, tape, "checkpoint watch_rebuilds tape_bytes"),
    (optim, rates, "schedule"),
    (nn, kbit, "Embedding16bit store_in_16_bits prepare_for_kbit_training"),
    (lora, kinds, "LoRAEmbedding LoRAConv EmbeddingBypass ConvBypass KINDS ADAPTABLE LINEAR bypass_for lora_layer"),
):
    for _name in _names.split():
        setattr(_old, _name, getattr(_new, _name))
del _old, _new, _names, _name
lora.Bypass = lora.LinearBypass
#: What takes a while to import and is not always wanted.
_LATE = {"KVCache": "models.llama", "Llama": "models.llama", "LlamaConfig": "models.llama"}
ROOMS = (
    "cli",
    "costs",
    "data",
    "figures",
    "interop",
    "kernels",
    "models",
    "numerics",
    "papers",
    "training",
    "variants",
)


def __dir__():
    return sorted({*globals(), *__all__, *ROOMS})


def __getattr__(name):
    """Rooms are opened when they are asked for, and so are the models, and what has moved: tinylora.interop, tinylora.experiments, …"""
    if name in _LATE:
        globals()[name] = getattr(importlib.import_module(f"{__name__}.{_LATE[name]}"), name)
        return globals()[name]
    if name not in MOVED and name not in ROOMS:
        raise AttributeError(f"module 'tinylora' has no attribute {name!r}")
    found = [importlib.import_module(f"{__name__}.{place}") for place in MOVED.get(name, name).split()]
    if len(found) == 1:
        return found[0]
    together = types.ModuleType(f"{__name__}.{name}", found[0].__doc__)  # a module that was split
    for module in reversed(found):
        vars(together).update({key: value for key, value in vars(module).items() if not key.startswith("__")})
    globals()[name] = together  # made once
    return together


class _Moved:
    """Lets `from tinylora.tokenizers import …` find a module that has moved: an import hook, for as long as the table stands."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        package, _, old = name.rpartition(".")
        return importlib.machinery.ModuleSpec(name, _Moved) if package == __name__ and old in MOVED else None

    @staticmethod
    def create_module(spec):
        return None

    @staticmethod
    def exec_module(module):
        sys.modules[module.__name__] = getattr(sys.modules[__name__], module.__name__.rpartition(".")[2])


sys.meta_path.append(_Moved)
