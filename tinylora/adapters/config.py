"""What an adapter is: its settings in PEFT's words, and its arrays off the model."""

import math
import re
from dataclasses import dataclass, field

import numpy as np

from ..lora import INITS

BIASES = ("none", "all", "lora_only")
BASE = "__base__"  # PEFT's word for "no adapter"


@dataclass(frozen=True)
class LoRAConfig:
    """What an adapter is made of (as given to `add_lora`).

    r, alpha, dropout     of each bypass; rank_pattern and alpha_pattern {name or regular expression: value} override the
                          first two where the end of a layer's path matches (as in PEFT)
    target_modules        which layers carry a bypass: see `find_targets`
    use_rslora, use_dora, lora_bias     see lora.LinearBypass
    bias                  "none", "all" (every bias of the model is trained), "lora_only" (those of the adapted layers)
    modules_to_save       names of modules that are trained whole, and saved with the adapter
    """

    r: int = 8
    alpha: float = 16
    dropout: float = 0.0
    target_modules: str | tuple = "all-linear"
    init: str = "kaiming"
    rank_pattern: dict = field(default_factory=dict)
    alpha_pattern: dict = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    bias: str = "none"
    modules_to_save: tuple = ()

    def __post_init__(self):
        for name, value in (("alpha", self.alpha), *(("alpha_pattern", v) for v in self.alpha_pattern.values())):
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float, np.integer, np.floating))
                or not math.isfinite(value)
            ):
                raise ValueError(f"lora: {name} = {value!r}, expected a number")
        for name in ("r", "alpha", "dropout"):
            object.__setattr__(self, name, python_number(getattr(self, name)))
        for name in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, name, {k: python_number(v) for k, v in getattr(self, name).items()})
        if self.init not in INITS:
            raise ValueError(f"lora: init {self.init!r} is unknown: expected 'kaiming' or 'gaussian'")
        for key in (*self.rank_pattern, *self.alpha_pattern):
            try:
                re.compile(key)
            except re.error as error:
                raise ValueError(f"lora: the pattern {key!r} is no regular expression: {error}") from None
        if self.bias not in BIASES:
            raise ValueError(f"lora: bias = {self.bias!r}, expected 'none', 'all' or 'lora_only'")
        if isinstance(self.modules_to_save, str):
            raise ValueError(f"lora: modules_to_save is a list of names, got {self.modules_to_save!r}")
        object.__setattr__(self, "modules_to_save", tuple(self.modules_to_save))

    def options(self, path):
        """The bypass's arguments for the layer at `path`."""
        return {
            "r": pattern(self.rank_pattern, path, self.r),
            "alpha": pattern(self.alpha_pattern, path, self.alpha),
            "dropout": self.dropout,
            "init": self.init,
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
            "lora_bias": self.lora_bias,
        }

    @property
    def max_rank(self):
        """The largest rank that a layer may have."""
        return max(self.r, *self.rank_pattern.values()) if self.rank_pattern else self.r


def python_number(value):
    """A NumPy scalar as Python's, which JSON knows."""
    return value.item() if isinstance(value, np.generic) else value


def pattern(patterns, path, default):
    """The value of the first pattern that the end of the path matches, as PEFT looks it up."""
    return next((value for key, value in patterns.items() if matches(key, path)), default)


def matches(key, path):
    return re.match(rf"(.*\.)?({key})$", path) is not None


@dataclass(frozen=True)
class Adapter:
    """An adapter off its model.

    weights   {path: {"lora_A": array, "lora_B": array, and where there are such "lora_B.bias", "lora_magnitude_vector"}}
    saved     {path of a parameter: array} of what it trained whole
    """

    config: LoRAConfig
    weights: dict
    saved: dict = field(default_factory=dict)

    @property
    def nbytes(self):
        """Bytes of all its arrays: what a switch moves."""
        return sum(a.nbytes for w in self.weights.values() for a in w.values()) + sum(
            a.nbytes for a in self.saved.values()
        )
