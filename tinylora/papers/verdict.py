"""What a recomputed number is called: it rounds to the printed one, is cut off, roughly agrees, or does not follow."""

import re
from dataclasses import dataclass


# ------------------------------------------------------------------------------------------------------------------ the verdict
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

    @property
    def value(self):
        """The printed number."""
        return parse(self.printed)[0]

    @property
    def difference(self):
        """printed − computed, or None."""
        return None if self.computed is None else self.value - self.computed


_UNITS = {"M": 1e6, "B": 1e9, "GB": 1e9, "MB": 1e6, "TB": 1e12, "%": 0.01}


def parse(printed):
    """("18.8M") -> (18.8, the step of the last digit 0.1, the unit 1e6)"""
    number, unit = re.fullmatch(r"\D*?(-?[\d,]*\.?\d+)\s*(\D*)", printed).groups()
    return float(number.replace(",", "")), 10.0 ** -len(number.partition(".")[2]), _UNITS.get(unit.strip(), 1.0)


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
    return "truncated" if 0 < error < step else "does not follow"
