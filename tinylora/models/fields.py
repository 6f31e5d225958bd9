"""What a file may say: fields are declared once and checked before anything is built from them.

    FIELDS = {"hidden_size": whole(1, 1 << 20), "rms_norm_eps": number(above=0), "bos_token_id": optional(whole())}
    check(config, FIELDS, "my-model/config.json", required=("hidden_size",))

    ValueError: my-model/config.json: hidden_size = '192', expected a whole number from 1 to 1048576

A file that a stranger wrote is believed in nothing: types, ranges, finite numbers and lengths are the reader's to state. Fields that
are not declared are left alone, since later versions of a format add some.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

_SHOWN = 60  # characters of a value that a sentence quotes
LARGEST = (1 << 63) - 1


@dataclass(frozen=True)
class Kind:
    """A kind of value: what a sentence calls it, which values are of it, and the fields of an object or the kind of each entry."""

    expected: str
    fits: Callable
    inside: dict | None = None  # of an object: {name: Kind}
    each: "Kind | None" = None  # of a list, or of an object's values


def whole(low=0, high=LARGEST):
    """A whole number in [low, high]; True and 3.0 are none."""
    span = f", {low} or more" if high >= LARGEST else f" from {low} to {high}"
    return Kind(f"a whole number{span}", lambda v: type(v) is int and low <= v <= high)


def number(low=-math.inf, high=math.inf, above=-math.inf):
    """A finite number in [low, high] that is larger than `above`."""
    bounds = [f"more than {above:g}"] if above > -math.inf else []
    bounds += [f"{low:g} or more"] if low > -math.inf else []
    bounds += [f"at most {high:g}"] if high < math.inf else []
    what = "a finite number" + "".join(f", {b}" for b in bounds)

    def fits(v):
        if type(v) is int and abs(v) > LARGEST:
            return False
        return type(v) in (int, float) and math.isfinite(v) and low <= v <= high and v > above

    return Kind(what, fits)


def flag():
    """True or false."""
    return Kind("true or false", lambda v: type(v) is bool)


def text(longest=10_000):
    """A string of at most so many characters."""
    return Kind(f"a text of at most {longest} characters", lambda v: type(v) is str and len(v) <= longest)


def one_of(*values):
    """One of these values."""
    return Kind(f"one of {', '.join(map(shown, values))}", lambda v: any(type(v) is type(w) and v == w for w in values))


def several(each, most=1_000_000):
    """A list of values of one kind."""
    return Kind(
        f"a list of at most {most} entries, each {each.expected}",
        lambda v: type(v) in (list, tuple) and len(v) <= most,
        each=each,
    )


def mapping(each, most=1_000_000):
    """An object whose values are of one kind, whatever their names."""
    what = f"an object of at most {most} names, each with {each.expected}"
    return Kind(what, lambda v: type(v) is dict and len(v) <= most and all(type(k) is str for k in v), each=each)


def fields(declared):
    """An object with declared fields of its own."""
    return Kind("an object", lambda v: type(v) is dict, inside=declared)


def anything():
    """A value that nobody computes with."""
    return Kind("a value", lambda v: True)


def either(*kinds):
    """A value of one of these kinds."""
    return Kind(" or ".join(k.expected for k in kinds), lambda v: any(_problem("", v, k) is None for k in kinds))


def optional(kind):
    """A value of this kind, or null."""
    return Kind(f"{kind.expected}, or null", lambda v: v is None or kind.fits(v), kind.inside, kind.each)


def check(values, declared, where, required=()):
    """`values` if each declared field in it is of its kind; ValueError names `where`, the field, its value and what was expected."""
    if type(values) is not dict:
        raise ValueError(f"{where}: expected an object, found {shown(values)}")
    for name in required:
        if name not in values:
            raise ValueError(f"{where}: {name} is missing")
    for name, kind in declared.items():
        if name in values and (problem := _problem(name, values[name], kind)):
            raise ValueError(f"{where}: {problem}")
    return values


def check_value(value, kind, where, name):
    """`value` if it is of this kind; ValueError as from `check`."""
    return check({name: value}, {name: kind}, where)[name]


def _problem(path, value, kind):
    """A sentence on the first part of a value that is not of its kind, None if all of it is."""
    if not kind.fits(value):
        return f"{path} = {shown(value)}, expected {kind.expected}"
    if value is None:
        return None
    parts = ()
    if kind.inside is not None:
        parts = ((f".{name}", value[name], k) for name, k in kind.inside.items() if name in value)
    elif kind.each is not None and type(value) is dict:
        parts = ((f".{shown(name)}", v, kind.each) for name, v in value.items() if not _is(v, kind.each))
    elif kind.each is not None:
        parts = ((f"[{i}]", v, kind.each) for i, v in enumerate(value) if not _is(v, kind.each))
    return next((p for p in (_problem(path + name, v, k) for name, v, k in parts) if p), None)


def _is(value, kind):
    """Whether a value is of a simple kind, which is most of a long list and needs no path."""
    return kind.inside is None and kind.each is None and kind.fits(value)


def shown(value):
    """A value as a sentence quotes it: shortened, and with control characters escaped."""
    if type(value) is int and abs(value) > 1 << 200:
        return f"a whole number of {value.bit_length()} bits"
    if isinstance(value, (list, tuple, dict)) and len(value) > 8:
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)} entries"
    try:
        quoted = repr(value[: 2 * _SHOWN] if isinstance(value, (str, bytes)) else value)
    except (RecursionError, ValueError):
        return f"a {type(value).__name__} that is nested deeply or long"
    return quoted if len(quoted) <= _SHOWN else f"{quoted[:_SHOWN]}…"
