"""Do the outputs of two runs of a notebook agree? Used by `build.py --check`.

One machine with one BLAS kernel gives the same bytes again. Another kernel adds the terms of a matrix product in another
order, so that a number that float32 arithmetic measured moves in its last digits. Hence, of what the cells print,

    words                  must be the same, however many spaces lie between them
    12   1,024             must be the same: counts, bytes and shapes are exact
    0.0376   45.8%         may move by 2 in the last digit that is printed: by 0.0002, by 0.2
    9e-08                  agrees with all below 1e-6 that has an exponent: what rounding errors leave is random
    a picture              must be there and have the same size in pixels; its bytes are not compared

where a number that one run prints with decimals and the other without, as 1 and 0.99, has them in both. Measured with
four of OpenBLAS's kernels (SkylakeX, Haswell, Sandybridge and Prescott): of 3,400 numbers, no whole number and no word
moved outside of the cells that carry a margin, and no decimal by more than 1 in its last digit. 2 leaves room for kernels
not tried.

In a source, `# %% tags=["hide-input"] margin=0.05` allows every number that the cell prints another 5 % of itself, whole
numbers too. It is for shares of float32 entries that come back, for the best of a grid, and for what an allocator says.
"""

import difflib
import re
import struct
from base64 import b64decode
from decimal import Decimal
from itertools import zip_longest

UNITS = 2  # of the last printed digit
ROUNDING = 1e-6
SHOWN = 5  # differing lines of a cell that are told
NUMBER = re.compile(r"(?<![\w.])[-+−]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?")


def apart(a, b, margin=0.0):
    """Why two printed numbers do not agree, or None if they do."""
    x, y = (Decimal(number.replace("−", "-").replace(",", "")) for number in (a, b))
    whole = all(re.fullmatch(r"[-+−]?[0-9,]+\.?", number) for number in (a, b))
    last = Decimal(10) ** min(number.as_tuple().exponent for number in (x, y))  # one of the last digit: 0.01 of 3.14
    allowed = (0 if whole else UNITS * last) + Decimal(str(margin)) * max(abs(x), abs(y))
    rounding = all("e" in number.lower() for number in (a, b)) and max(abs(x), abs(y)) < ROUNDING
    if x == y or rounding or abs(x - y) <= allowed:
        return None
    return f"{a} and {b} are {float(abs(x - y)):.3g} apart" + (f", more than {float(allowed):.3g}" if allowed else "")


def different_lines(before, after, margin=0.0):
    """[(line before or None, line after or None, why)] of two printed texts. A missing line does not shift the others."""
    lines = [text.splitlines() for text in (before, after)]
    words = [[tuple(" ".join(part.split()) for part in NUMBER.split(line)) for line in text] for text in lines]
    found = []
    for what, i, i_end, j, j_end in difflib.SequenceMatcher(None, *words, autojunk=False).get_opcodes():
        for old, new in zip_longest(lines[0][i:i_end], lines[1][j:j_end]):
            if what != "equal":
                found.append((old, new, "the words differ" if None not in (old, new) else "a line more or less"))
                continue
            why = [apart(a, b, margin) for a, b in zip(NUMBER.findall(old), NUMBER.findall(new), strict=True)]
            if any(why):
                found.append((old, new, "; ".join(filter(None, why))))
    return found


def shown(cell):
    """[(kind, text or base64)] of what a cell shows, in order."""
    outputs = cell.get("outputs", [])
    data = [output.get("data") or {output.get("name", "error"): output.get("text", "")} for output in outputs]
    return [item for output in data for item in sorted(output.items())]


def size(png):
    """(width, height) of a PNG in base64; None of another picture."""
    start = b64decode(png[:32])
    return struct.unpack(">II", start[16:24]) if start.startswith(b"\x89PNG") else None


def different_outputs(before, after, margin=0.0):
    """What differs in the outputs of a cell, as lines to print; none if they agree."""
    kinds = [[kind for kind, _ in shown(cell)] for cell in (before, after)]
    if kinds[0] != kinds[1]:
        return [f"committed  {', '.join(kinds[0]) or 'no output'}", f"this run   {', '.join(kinds[1]) or 'no output'}"]
    said = []
    for (kind, old), (_, new) in zip(shown(before), shown(after), strict=True):
        if kind.startswith("image/"):
            if size(old) != size(new):
                said.append([f"a picture of {size(old)} pixels was committed, this run's has {size(new)}"])
            continue
        for was, now, why in different_lines(old, new, margin):
            lines = (("committed", was), ("this run", now))
            said.append(
                [*(f"{who:<10} {line.rstrip()}" for who, line in lines if line is not None), f"{'':<10} ({why})"]
            )
    more = [f"and {len(said) - SHOWN} more"] if len(said) > SHOWN else []
    return [line for lines in said[:SHOWN] for line in lines] + more


def name(cells, i):
    """How a message calls cell i of a notebook, counted from 0: its number and its first line."""
    return f"cell {i + 1}, {next(iter(cells[i].source.strip().splitlines()), '')!r}"


def differences(before, after, margins=()):
    """One text a cell whose outputs differ, in two runs of a notebook; margins = {cell, from 0: margin}."""
    found = []
    for i, (old, new) in enumerate(zip(before.cells, after.cells, strict=True)):
        lines = different_outputs(old, new, dict(margins).get(i, 0.0))
        if lines:
            found.append("\n".join([f"{name(before.cells, i)}:", *(f"    {line}" for line in lines)]))
    return found
