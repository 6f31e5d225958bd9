"""Numbers in units, and aligned columns."""

import math


# ------------------------------------------------------------------------------------------------------------------- as text
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
    return "\n".join(
        "  ".join(
            c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    )
