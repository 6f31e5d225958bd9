"""Rotary positions of the Llama family: the angles by which pairs of a head's features are turned.

    ω_i = θ^(−2i/d), i < d/2;   at position m the pair i is turned by the angle m ω'_i                        (RoFormer eq. 15)

    default     ω' = ω
    linear      ω' = ω / s                                                                                (Chen et al. 2023)
    llama3      ω' = ω where λ < n/h,  ω / s where λ > n/l,  (1 − γ) ω/s + γ ω between;   λ = 2π/ω, γ = (n/λ − l) / (h − l)
    dynamic     ω' = θ'^(−2i/d), θ' = θ (s t/N − (s − 1))^(d/(d − 2)) for t > N tokens; up to N tokens ω' = ω    ("NTK-aware")
    longrope    ω' = ω / f_i, where both lists of factors are f and attention_factor is 1: what rope_freqs.weight of a GGUF says

s is `factor`, l and h are `low_freq_factor` and `high_freq_factor`, n is `original_max_position_embeddings` and N the config's
`max_position_embeddings`: Hugging Face's names, in `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5). Any other
type is refused by its name, and so are longrope's two different lists: it changes the frequencies and scales the attention.

Angles are computed in float64 and their cosines and sines rounded once; transformers computes them in float32.
"""

import math

import numpy as np

from .. import ops
from ..backend import move
from .fields import fields, number, optional, several, shown, text

#: {type: the numbers that it needs}
TYPES = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": (),  # see _one_list
}

_NUMBER = number(1e-30, 1e30)  # whose powers and quotients here are finite in float64
#: What `rope_scaling` or `rope_parameters` may say that is looked at.
SCALING = fields(
    {
        "rope_type": optional(text(100)),
        "type": optional(text(100)),
        **dict.fromkeys(("rope_theta", "factor", "low_freq_factor", "high_freq_factor"), optional(_NUMBER)),
        **dict.fromkeys(
            ("original_max_position_embeddings", "attention_factor", "partial_rotary_factor"), optional(_NUMBER)
        ),
        **dict.fromkeys(("short_factor", "long_factor"), optional(several(_NUMBER, most=1 << 20))),
    }
)
_MADE_WHOLE = 1 << 15  # positions: a table of more is made as far as it is asked for


def read(config):
    """(rope_theta, scaling) of a config.json, whichever spelling it has; scaling is None or {"rope_type": …, its numbers}."""
    spelling = "rope_scaling" if config.get("rope_scaling") or not config.get("rope_parameters") else "rope_parameters"
    found = config.get(spelling) or {}
    if not isinstance(found, dict) or any(isinstance(value, dict) for value in found.values()):
        raise ValueError(f"{spelling} = {shown(found)}: expected one rotary table for all layers")
    found = {name: value for name, value in found.items() if value is not None}
    theta = found.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    if not _positive(theta):
        raise ValueError(f"rope_theta = {theta!r}, expected a positive number")
    kind = found.get("rope_type", found.get("type", None if found else "default"))
    _check_kind(kind, spelling)
    if kind == "llama3":  # the order in which transformers looks for it
        name = "original_max_position_embeddings"
        found[name] = config.get(name) or found.get(name) or config.get("max_position_embeddings")
    if found.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"partial_rotary_factor = {found['partial_rotary_factor']!r} is not supported")
    return theta, {**found, "rope_type": kind}


def checked(scaling, head_dim):
    """A scaling with the numbers that its type needs and no others; None for no scaling. ValueError names what does not fit."""
    kind = (scaling or {}).get("rope_type", "default")
    _check_kind(kind)
    if kind == "default":
        return None
    if kind == "longrope":
        return _one_list(scaling, head_dim)
    for name in TYPES[kind]:
        if not _positive(scaling.get(name)):
            raise ValueError(
                f"rope_scaling of type {kind!r}: {name} is {scaling.get(name)!r}, expected a positive number"
            )
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise ValueError("rope_scaling of type 'llama3': high_freq_factor must be more than low_freq_factor")
    if kind == "dynamic" and head_dim < 4:
        raise ValueError(f"rope_scaling of type 'dynamic' is not defined for head_dim = {head_dim}")
    return {"rope_type": kind, **{name: scaling[name] for name in TYPES[kind]}}


def _check_kind(kind, spelling="rope_scaling"):
    if kind not in TYPES:
        known = ", ".join(repr(name) for name in TYPES)
        raise ValueError(
            f"{spelling} of type {shown(kind)} is not supported by tinylora's Llama, whose rope_type is one of {known}"
        )


def _one_list(scaling, head_dim):
    """longrope's scaling where it is the same for short and long texts and scales nothing but the frequencies."""
    short, long = scaling.get("short_factor"), scaling.get("long_factor")
    if not isinstance(short, (list, tuple)) or short != long or scaling.get("attention_factor") != 1:
        raise ValueError(
            "rope_scaling of type 'longrope' is supported only where short_factor and long_factor are one list and "
            "attention_factor is 1"
        )
    if len(short) != head_dim // 2 or not all(map(_positive, short)):
        raise ValueError(
            f"rope_scaling of type 'longrope': expected {head_dim // 2} positive factors, one for each pair"
        )
    return divided(short)


def _positive(x):
    return type(x) in (int, float) and math.isfinite(x) and x > 0


def written(config):
    """The entries of a config.json, in transformers' old spelling and its new one."""
    scaling = config.rope_scaling
    if scaling and scaling["rope_type"] == "longrope":  # transformers asks for these two, which then change nothing
        scaling = {**scaling, "factor": 1.0, "original_max_position_embeddings": config.max_position_embeddings}
    parameters = {"rope_theta": config.rope_theta, **(scaling or {"rope_type": "default"})}
    return {"rope_theta": config.rope_theta, "rope_scaling": scaling, "rope_parameters": parameters}


def frequencies(head_dim, theta, scaling=None, stretch=1.0):
    """ω' of a head; `stretch` is t/N, which matters to "dynamic" above 1. (d/2,) float64"""
    scaling = scaling or {"rope_type": "default"}
    kind, s = scaling["rope_type"], scaling.get("factor")
    if kind == "dynamic" and stretch > 1:
        theta = theta * (s * stretch - (s - 1)) ** (head_dim / (head_dim - 2))
    omega = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if kind == "linear":
        return omega / s
    if kind == "longrope":
        return omega / np.array(scaling["short_factor"])
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * omega / (2 * np.pi)  # n/λ
        gamma = np.clip((turns - low) / (high - low), 0, 1)
        return (1 - gamma) * omega / s + gamma * omega
    return omega


def divisors(head_dim, theta, scaling):
    """ω / ω': what each frequency is divided by, as rope_freqs.weight of a GGUF holds it. (d/2,) float64"""
    return frequencies(head_dim, theta) / frequencies(head_dim, theta, scaling)


def divided(divisors):
    """The scaling that divides frequency i by divisors[i]: a longrope that is the same for short and long texts."""
    factors = [float(f) for f in divisors]
    return {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "attention_factor": 1.0}


def agrees(stored, config):
    """Whether a table of frequencies that old folders carry along (in 16 bits, some) is the config's, scaled or not yet."""
    tables = [frequencies(config.head_dim, config.rope_theta, scaling) for scaling in (None, config.rope_scaling)]
    return any(stored.shape == t.shape and np.allclose(stored, t, rtol=2**-8, atol=2**-24) for t in tables)


def table_length(positions, end):
    """For how many of a model's positions there is a table once the first `end` of them were asked for: all, if they are not many."""
    return min(positions, max(_MADE_WHOLE, 1 << (end - 1).bit_length()))


class Tables:
    """cos and sin of a model's positions, made once for each device and sliced. A copied or pickled one is empty and fills again."""

    def __init__(self):
        self.clear()

    def clear(self):
        """Forget all tables; they are made again when they are asked for."""
        self._made = None, {}  # the config, {numpy or cupy: its table}

    def __getstate__(self):
        return {"_made": (None, {})}  # a module cannot be copied, and a table need not be

    def __call__(self, config, start, end, xp):
        """cos and sin for positions start … end − 1: two arrays (end − start, d/2) on xp's device."""
        if config is not self._made[0]:
            self._made = config, {}
        tables, n = self._made[1], config.max_position_embeddings
        head = config.head_dim, config.rope_theta, config.rope_scaling
        if end > n:  # only "dynamic" is defined there: its frequencies depend on the number of tokens
            return tuple(move(a, xp) for a in self._table(start, end, frequencies(*head, end / n)))
        if xp not in tables or len(tables[xp][0]) < end:
            tables[xp] = tuple(move(a, xp) for a in self._table(0, table_length(n, end), frequencies(*head)))
        return tuple(a[start:end] for a in tables[xp])

    @staticmethod
    def _table(start, end, omega):
        return ops.rope_table(np.arange(start, end), 2 * len(omega), frequency=omega)
