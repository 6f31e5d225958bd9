"""What a recomputed number is called: it equals the printed one, rounds to it, is cut off, roughly agrees, or does not follow.

A `Row` is one printed number beside its recomputation, a `Claim` a statement in words beside the number that decides it; `judge` gives
the verdict. The audits of both papers (`lora_numbers`, `qlora_numbers`) are lists of these. `pick` finds rows in such a list and
`tally` counts its verdicts: what an audit derives from several rows asks them. The statements themselves, and what they came to, stand in
the map of the papers; a row names its entry there, and `agreement` compares the two.
"""

import re
from collections import Counter
from dataclasses import dataclass

FAILS = "does not follow"
HOLDS = {True: "holds", False: "does not hold"}


@dataclass(frozen=True)
class Row:
    """One printed number beside its recomputation, both in the printed unit."""

    where: str  # "Table 15"
    model: str
    method: str
    setting: str
    printed: str  # as printed: "18.8M"
    computed: float | None  # in the unit of `printed`; None where nothing in the paper determines it
    verdict: str  # match, rounds to, truncated, roughly, does not follow, not derivable
    note: str = ""
    claim: str = ""  # the id of the map's entry that the number is about (`map`); "" where it has none of its own

    @classmethod
    def judged(cls, where, model, method, setting, printed, computed, note="", about=False, claim=""):
        """The row with the verdict that `judge` gives."""
        return cls(where, model, method, setting, printed, computed, judge(printed, computed, about), note, claim)

    @property
    def value(self):
        """The printed number."""
        return parse(self.printed)[0]

    @property
    def difference(self):
        """printed − computed, or None."""
        return None if self.computed is None else self.value - self.computed


@dataclass(frozen=True)
class Claim(Row):
    """A statement in words beside the number that decides it: `printed` has no value, and nothing can be subtracted from it."""

    @classmethod
    def decided(cls, where, method, setting, printed, computed, verdict, note="", claim=""):
        """The claim; verdict True or False is "holds" or "does not hold", any other is the word itself."""
        computed = None if computed is None else float(computed)
        return cls(where, "", method, setting, printed, computed, HOLDS.get(verdict, verdict), note, claim)

    @property
    def value(self):
        """None."""

    @property
    def difference(self):
        """None."""


_UNITS = {"M": 1e6, "B": 1e9, "GB": 1e9, "MB": 1e6, "TB": 1e12, "%": 0.01}
_NUMBER = re.compile(r"\D*?(-?[\d,]*\.?\d+)\s*(\D*)")


def parse(printed):
    """("18.8M") -> (18.8, the step of the last digit 0.1, the unit 1e6)"""
    number, unit = _NUMBER.fullmatch(printed).groups()
    return float(number.replace(",", "")), 10.0 ** -decimals(printed), _UNITS.get(unit.strip(), 1.0)


def decimals(printed):
    """("18.8M") -> 1: the digits after the point."""
    return len(_NUMBER.fullmatch(printed)[1].partition(".")[2])


def in_unit_of(printed, exact):
    """An exact number in ones (weights, bytes, ratios) in the unit of `printed`; None stays None."""
    return None if exact is None else exact / parse(printed)[2]


def judge(printed, computed, about=False):
    """ "match": equal;  "rounds to", "truncated": equal to the printed digits, in one way or the other;  else "does not follow".

    printed as in the paper ("18.8M"), computed in the same unit, or None ("not derivable"). about: the paper says "roughly", or means
    a nominal size; within 10 % is then "roughly".
    """
    if computed is None:
        return "not derivable"
    value, step, _ = parse(printed)
    error, tiny = computed - value, 1e-9 * max(abs(computed), 1)
    if abs(error) <= tiny:
        return "match"
    if abs(error) <= step / 2 + tiny:
        return "rounds to"
    if about and abs(error) <= 0.1 * abs(computed):
        return "roughly"
    return "truncated" if 0 < error < step else FAILS


def agrees(printed, computed):
    """Whether the number is what is printed, or rounds to it."""
    return judge(printed, computed) in ("match", "rounds to")


# ------------------------------------------------------------------------------------------------------------- a list of rows
def pick(rows, **fields):
    """The rows in which every field has the value given: pick(rows, where="Table 15", method="LoRA")."""
    return [row for row in rows if all(getattr(row, name) == value for name, value in fields.items())]


def fail(rows):
    """Whether there are rows, and none of them follows."""
    return bool(rows) and {row.verdict for row in rows} == {FAILS}


def tally(rows):
    """Each verdict and how often it is given, in the order of the first of each, as text: "15 rounds to, 14 holds"."""
    return ", ".join(f"{n} {verdict}" for verdict, n in Counter(row.verdict for row in rows).items())
