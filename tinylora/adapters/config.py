"""What an adapter is: its settings in PEFT's words, and its arrays off the model."""

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np

from ..backend import whole
from ..lora import INITS
from . import patterns

BIASES = ("none", "all", "lora_only")
BASE = "__base__"  # PEFT's word for "no adapter"
MOST_NAMES, MOST_CHARACTERS = 10_000, 100_000  # of layers and patterns for them in one config, and of all its patterns
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class LoRAConfig:
    """What an adapter is made of (as given to `add_lora`).

    r, alpha, dropout     of each bypass; rank_pattern and alpha_pattern {name or regular expression: value} override the
                          first two where the end of a layer's path matches (as in PEFT)
    target_modules, exclude_modules, layers_to_transform, layers_pattern
                          which layers carry a bypass: see `find_targets`
    use_rslora, use_dora, lora_bias     see lora.LinearBypass
    bias                  "none", "all" (every bias of the model is trained), "lora_only" (those of the adapted layers)
    modules_to_save       names of modules that are trained whole, and saved with the adapter. As in PEFT, a name means every module
                          whose path ends with it, in the middle of a word too: "norm" means every …layernorm
    ensure_weight_tying   where modules_to_save names an embedding that is the head too (tied), its copy is the head's as well
    trainable_token_indices, saved_embeddings     what a PEFT adapter brings along: {path of an embedding or a head: the rows that it
                          replaces}, and paths of the weights of such layers. They are read, saved and merged, and not trained
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
    exclude_modules: str | tuple | None = None
    layers_to_transform: int | tuple | None = None
    layers_pattern: str | tuple | None = None
    ensure_weight_tying: bool = False
    trainable_token_indices: dict = field(default_factory=dict)
    saved_embeddings: tuple = ()

    def __post_init__(self):
        for name in ("rank_pattern", "alpha_pattern", "trainable_token_indices"):
            given = getattr(self, name)
            if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
                raise ValueError(f"lora: {name} = {quoted(given)}, expected names and numbers")
        for name, value in (("alpha", self.alpha), *(("alpha_pattern", v) for v in self.alpha_pattern.values())):
            if not _is_number(value):
                raise ValueError(f"lora: {name} = {quoted(value)}, expected a number")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"lora: dropout = {self.dropout}, expected 0 <= dropout < 1")
        whole("lora: r", self.r)
        for key, rank in self.rank_pattern.items():
            whole(f"lora: rank_pattern[{quoted(key)}]", rank)
        for name in ("r", "alpha", "dropout"):
            object.__setattr__(self, name, python_number(getattr(self, name)))
        for name in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, name, {k: python_number(v) for k, v in getattr(self, name).items()})
        if self.init not in INITS:
            raise ValueError(f"lora: init {quoted(self.init)} is unknown: expected 'kaiming' or 'gaussian'")
        if self.bias not in BIASES:
            raise ValueError(f"lora: bias = {quoted(self.bias)}, expected 'none', 'all' or 'lora_only'")
        self._check_selection()
        self._check_patterns()

    def _check_selection(self):
        """Bring what says which layers into one form (tuples, None for nothing), and refuse what PEFT refuses."""
        if isinstance(self.modules_to_save, str):
            raise ValueError(f"lora: modules_to_save is a list of names, got {quoted(self.modules_to_save)}")
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            given = getattr(self, name)
            nothing = given is None or (isinstance(given, Collection) and not given)
            if nothing and name in ("exclude_modules", "layers_pattern"):
                object.__setattr__(self, name, None)
                continue
            if not isinstance(given, str):
                if not isinstance(given, Collection) or not all(isinstance(n, str) for n in given):
                    raise ValueError(
                        f"lora: {name} = {quoted(given)}, expected a list of names"
                        + (" or a regular expression" if name != "modules_to_save" else "")
                    )
                given = tuple(sorted(set(given)) if name == "exclude_modules" else given)
            object.__setattr__(self, name, given)
        layers = self.layers_to_transform
        if layers is not None:
            numbers = tuple(layers) if isinstance(layers, Collection) else (layers,)
            if any(isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 0 for n in numbers):
                raise ValueError(
                    f"lora: layers_to_transform = {quoted(layers)}, expected the number of a layer or a list of them"
                )
            object.__setattr__(self, "layers_to_transform", tuple(map(int, numbers)) or None)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("lora: layers_pattern is for layers_to_transform; give that too")
        if self.layers_to_transform and isinstance(self.target_modules, str) and not self.all_linear:
            raise ValueError(
                "lora: layers_to_transform is for a list of names or 'all-linear'; a regular expression can name the layers itself"
            )

    def _check_patterns(self):
        """ValueError for what is no regular expression, or none that is matched here, and for more than would be matched soon."""
        alone = [(n, getattr(self, n)) for n in ("exclude_modules", "target_modules")]
        alone = [(name, value) for name, value in alone if isinstance(value, str)]
        inside = [("the pattern", key) for key in (*self.rank_pattern, *self.alpha_pattern)]
        inside += [("modules_to_save", m) for m in self.modules_to_save]
        inside += [("layers_pattern", p) for p in as_tuple(self.layers_pattern)]
        names = [*as_tuple(self.target_modules), *as_tuple(self.exclude_modules), *as_tuple(self.layers_to_transform)]
        if (n := len(names) + len(inside)) > MOST_NAMES:
            raise ValueError(f"lora: it has {n} names, numbers and patterns of layers, expected at most {MOST_NAMES}")
        if (n := sum(len(value) for _, value in alone + inside)) > MOST_CHARACTERS:
            raise ValueError(f"lora: its patterns have {n} characters, expected at most {MOST_CHARACTERS}")
        for name, value in alone + inside:
            try:
                flagged = patterns.compiled(value).flagged
                parted = name == "layers_pattern" and patterns.compiled(rf"(?:^|.*?\.){value}\.").parted
            except ValueError as error:
                raise ValueError(
                    f"lora: {name} {quoted(value)} is no regular expression that can be used here: {error}"
                ) from None
            if flagged and (name, value) in inside:
                raise ValueError(
                    f"lora: {name} {quoted(value)} sets flags for the whole expression, of which it is a part; write (?i:…)"
                )
            if parted:
                raise ValueError(
                    f"lora: {name} {quoted(value)} is a part of an expression that its | would divide; write (?:…|…)"
                )

    @property
    def all_linear(self):
        """Whether the targets are every linear layer but the head."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear"

    @property
    def token_weights(self):
        """Paths of the weights some of whose rows the adapter replaces."""
        return tuple(f"{name}.weight" for name in self.trainable_token_indices)

    @property
    def brought(self):
        """Paths of the parameters that the adapter brings along and does not train."""
        return (*self.saved_embeddings, *self.token_weights)

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


def as_tuple(value):
    """None, one thing or several as a tuple."""
    return () if value is None else (value,) if isinstance(value, (str, int)) else tuple(value)


def python_number(value):
    """A NumPy scalar as Python's, which JSON knows."""
    return value.item() if isinstance(value, np.generic) else value


def quoted(value):
    """A value as a sentence quotes it, shortened."""
    return f"{value!r:.100}"


def _is_number(value):
    """Whether it is a finite number, no larger than a float can be."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        return False
    return bool(abs(value) <= _LARGEST)


def pattern(values, path, default):
    """The value of the first pattern that the end of the path matches, as PEFT looks it up."""
    work = patterns.Work()
    return next((value for key, value in values.items() if matches(key, path, work)), default)


def matches(key, path, work=None):
    r"""Whether the end of a path, all of it or what follows a dot, matches: re.match(r"(.*\.)?(KEY)$", path)."""
    expression = patterns.compiled(key)
    if not path.endswith((expression.tail, expression.tail + "\n")):
        return False
    line = path.partition("\n")[0]
    starts = (0, *(i + 1 for i, letter in enumerate(line) if letter == "."))
    try:
        return any(path[end:] in ("", "\n") for end in expression.ends(path, starts, work))
    except ValueError as error:
        raise ValueError(f"lora: the pattern {quoted(key)}: {error}") from None


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
