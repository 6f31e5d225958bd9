"""Numbers in units, aligned columns, and names that may hold anything."""

import math
import re

#: Control characters (C0, C1), line separators, marks that turn the direction of writing, and halves of surrogate pairs.
UNPRINTABLE = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")


def escaped(text, keep=""):
    """The text with what a terminal would obey instead of showing it written as Python writes it: "\\x1b", "\\n", "\\u202e"."""
    return UNPRINTABLE.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)


def printable(text, word=400, most=2000):
    """Any text, on one line of at most `most` characters: escaped, and with the middle of what is too long left out."""
    text = re.sub(rf"\S{{{word + 1},}}", lambda found: _shortened(found[0], word), str(text))
    return escaped(_shortened(text, most))


def _shortened(text, most):
    """The beginning and the end of a text that is longer than `most` characters, about as many in all."""
    half = most // 2
    return text if len(text) <= most else f"{text[:half]} ... {text[-half:]}"


def in_units(nbytes):
    """1234567 -> "1.23 MB": three digits or more, decimal units."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            value = nbytes / scale
            return f"{value:,.{max(2 - int(math.log10(value)), 0)}f} {unit}"
    return f"{nbytes:,} bytes"


def aligned(table, left=(0,)):
    """Rows of strings as lines, columns aligned: those in `left` to the left, the others to the right. Cells are made printable."""
    table = [[printable(text) for text in row] for row in table]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]

    def line(row):
        cells = enumerate(zip(row, widths, strict=True))
        return "  ".join(text.ljust(w) if i in left else text.rjust(w) for i, (text, w) in cells).rstrip()

    return "\n".join(map(line, table))
