"""tinylora: LoRA and QLoRA, small enough to read beside the papers.

    import tinylora as tl

    model = tl.Llama.from_pretrained("base")
    tl.quantize_linears(model, code="nf4", double_quant=True)
    tl.add_lora(model, r=16, alpha=32, target_modules="all-linear")
    tl.print_trainable_parameters(model)

Importing loads NumPy and the core. Everything else, such as the models, the adapters, scipy or tqdm, is imported at its first use.
"""

import importlib
import importlib.machinery
import os
import sys
import types
from typing import TYPE_CHECKING

# As a command, and only then: Ctrl-C during the imports below ends it without a traceback, as it does from `cli.main` on.
_command = os.path.basename(sys.orig_argv[1]) if len(sys.orig_argv) > 1 else ""
if _command == "-m" and len(sys.orig_argv) > 2:
    _command = sys.orig_argv[2].removesuffix(".cli")
if _command in ("tinylora", "tinylora.exe"):
    import signal

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

from . import backend, codebooks, dtypes, lora, nn, ops, optim, paging, quant, tensor
from .backend import seed
from .kernels import pools  # noqa: F401 (tinylora.pools was its name)
from .lora import LoRALinear, print_trainable_parameters, trainable_parameters
from .nn import quantize_linears
from .optim import AdamW
from .paging import Pager
from .quant import QuantizedTensor, quantize
from .tape import checkpoint, tape_bytes
from .tensor import Tensor, no_grad, primitive

if TYPE_CHECKING:  # where an editor finds what is imported late
    from . import adapters, interop
    from .adapters import (
        adapter_rows,
        add_lora,
        add_weighted_adapter,
        conv,
        disable_adapter,
        merge,
        prepare_model_for_int8_training,
        set_adapter,
        unmerge,
    )
    from .models.llama import KVCache, Llama, LlamaConfig
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
#: Names that left a file that stayed, likewise for one release: {the file: {where they are now: names}}.
LEFT = {
    ops: {"adapters.conv": "conv", "kernels.attention": "QUERY_BLOCK"},
    paging: {"kernels.pools": "WHOLE_TENSORS_FROM"},
    backend: {
        "kernels.scatter": "scatter_add",
        "kernels.copies": "pinned_zeros copy_to_device copy_to_host managed_zeros prefetch_managed keep_freed_memory",
    },
    tensor: {"tape": "checkpoint watch_rebuilds tape_bytes"},
    optim: {"training.schedule": "schedule"},
    nn: {"adapters.kbit": "Embedding16bit store_in_16_bits prepare_for_kbit_training"},
    lora: {
        "adapters.kinds": "LoRAEmbedding LoRAConv EmbeddingBypass ConvBypass KINDS ADAPTABLE LINEAR bypass_for lora_layer"
    },
}
lora.Bypass = lora.LinearBypass
#: What takes a while to import and is not always wanted: {room: names}.
_LATE = {
    "adapters": "adapter_rows add_lora add_weighted_adapter conv disable_adapter merge prepare_model_for_int8_training set_adapter unmerge",
    "models.llama": "KVCache Llama LlamaConfig",
    "training.adamw8bit": "AdamW8bit",
}
ROOMS = (
    "adapters",
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
    for place, names in _LATE.items():
        if name in names.split():
            globals()[name] = getattr(_opened(place), name)
            return globals()[name]
    if name not in MOVED and name not in ROOMS:
        raise AttributeError(f"module 'tinylora' has no attribute {name!r}")
    found = [_opened(place) for place in MOVED.get(name, name).split()]
    if len(found) == 1:
        return found[0]
    together = types.ModuleType(f"{__name__}.{name}", found[0].__doc__)  # a module that was split
    for module in reversed(found):
        vars(together).update({key: value for key, value in vars(module).items() if not key.startswith("__")})
    globals()[name] = together  # made once
    return together


def _opened(place):
    """The module at a place such as "adapters.kinds". Its room comes first: there a thread waits for another one that is opening it."""
    importlib.import_module(f"{__name__}.{place.partition('.')[0]}")
    return importlib.import_module(f"{__name__}.{place}")


def _finder(file, places):
    """A file's __getattr__, which finds the names that left it."""
    where = {name: place for place, names in places.items() for name in names.split()}

    def find(name):
        if name not in where:
            raise AttributeError(f"module {file.__name__!r} has no attribute {name!r}")
        return getattr(_opened(where[name]), name)

    return find


for _file, _places in LEFT.items():
    _file.__getattr__ = _finder(_file, _places)
del _file, _places


class _DoRA:
    """LinearBypass.dora until `adapters` is imported, which puts the class itself in its place."""

    def __get__(self, bypass, owner):
        return _opened("adapters.dora").DoRALinearBypass


def _fused_forward(layer, x):
    """`adapters.fused.fused_forward`, which takes this function's place when it is imported."""
    return _opened("adapters.fused").fused_forward(layer, x)


lora.LinearBypass.dora, lora.LoRALayer.fused_forward = _DoRA(), _fused_forward


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
