"""Adapters on a whole model: put on, switched, combined, taken off, merged.

    add_lora(model, r=8, alpha=16)              freeze the model and put a bypass on its linear layers
    add_lora(model, …, name="b")                one more, on the same base
    set_adapter(model, "b")                     which one computes and trains; a list: their bypasses add up
    with disable_adapter(model): …              the base, bit for bit
    with adapter_rows(model, ["a", "b"]): …     row i of a batch through its own adapter (LoRA §4.2's limitation, unmerged)
    add_weighted_adapter(model, ["a", "b"], [0.7, 0.3], "c", "cat")
    merge(model) / unmerge(model)               W₀ + s B A as plain layers, and back
    detach(model) / attach(model, adapter)      take an adapter off; put it, or another one, on

An adapter is its bypasses and, if asked for, copies of parameters that it trains whole: biases (`bias`) and modules such
as a head (`modules_to_save`). Active, its copies stand in the model; otherwise the base's own parameters do.

The files: `switch` (on, off, active), `combine`, `merge`, `config` (an adapter's settings and arrays), `targets` (which layers),
`state` (what a model knows of its adapters), `kinds` and `conv` (bypasses of embeddings and convolutions), `dora`, `kbit` (a base of few
bits made ready), `fused` (a layer and its bypass in one operation).

Compared with PEFT: the same vocabulary and the same numbers. The base's biases are kept, so a disabled or detached
adapter leaves the base as it was (PEFT trains them in place and warns); unmerging puts W₀ back instead of subtracting;
`linear` combination is there because PEFT has it, with its cross terms said. Left out: ties, dare and magnitude pruning.
"""

from ..lora import LoRALayer, count_parameters, print_trainable_parameters, trainable_parameters
from . import dora, fused  # noqa: F401 (use_dora makes the one's classes; frozen layers use the other)
from .combine import COMBINATIONS, add_weighted_adapter
from .config import BASE, BIASES, Adapter, LoRAConfig
from .kbit import prepare_for_kbit_training, prepare_model_for_int8_training
from .kinds import ADAPTABLE, LINEAR
from .merge import dequantize_linears, merge, merge_errors, unmerge
from .state import active_adapters, configs
from .switch import (
    adapter_of,
    adapter_rows,
    add_lora,
    attach,
    delete_adapter,
    detach,
    disable_adapter,
    refuse_unfit,
    set_adapter,
    untie,
    untied,
)
from .targets import base_of, find_targets, lora_layers, needs_own_head

adapters = lora_layers  # the name until 0.1

# fmt: off
__all__ = ["ADAPTABLE", "BASE", "BIASES", "COMBINATIONS", "LINEAR", "Adapter", "LoRAConfig", "LoRALayer", "active_adapters",
           "adapter_of", "adapter_rows", "adapters", "add_lora", "add_weighted_adapter", "attach", "base_of", "configs",
           "count_parameters", "delete_adapter", "dequantize_linears", "detach", "disable_adapter", "find_targets", "lora_layers",
           "merge", "merge_errors", "needs_own_head", "prepare_for_kbit_training", "prepare_model_for_int8_training",
           "print_trainable_parameters", "refuse_unfit", "set_adapter", "trainable_parameters", "unmerge", "untie", "untied"]
# fmt: on
