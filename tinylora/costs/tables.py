"""Numbers in units, and aligned columns."""

import math


def in_units(nbytes):
    """1234567 -> "1.23 MB": three digits or more, decimal units."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            value = nbytes / scale
            return f"{value:,.{max(2 - int(math.log10(value)), 0)}f} {unit}"
    return f"{nbytes:,} bytes"


def aligned(table, left=(0,)):
    """Rows of strings as lines, columns aligned: those in `left` to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]

    def line(row):
        cells = enumerate(zip(row, widths, strict=True))
        return "  ".join(text.ljust(w) if i in left else text.rjust(w) for i, (text, w) in cells).rstrip()

    return "\n".join(map(line, table))
