"""The figure of the memory account: a step's bytes by method, part by part."""

from ..costs.memory import ROWS
from ..costs.tables import in_units
from .style import COLOURS, SMALL, canvas, narrow

#: Account's fields: (name in the figures, colour). Each colour has a pattern of its own, and neighbours differ in lightness.
PARTS = {
    "weights": ("weights, 16 or 32 bits", "0.35"),
    "codes": ("4-bit codes", COLOURS[0]),
    "codes8": ("8-bit codes", COLOURS[4]),
    "constants": ("constants", "#a9bcd9"),
    "adapters": ("adapters", COLOURS[2]),
    "gradients": ("gradients", "#f2c9a5"),
    "optimizer": ("optimizer", COLOURS[1]),
    "activations": ("activations", "0.93"),
}
#: Colour: how a patch of it is hatched, so that no figure needs its colours. The weights are plain.
HATCH = {
    PARTS["codes"][1]: {"hatch": "...."},
    PARTS["codes8"][1]: {"hatch": "oo"},
    PARTS["constants"][1]: {"hatch": "||||", "edgecolor": "0.5"},
    PARTS["adapters"][1]: {"hatch": "xxxx"},
    PARTS["gradients"][1]: {"hatch": "----", "edgecolor": "0.5"},
    PARTS["optimizer"][1]: {"hatch": "\\\\\\\\"},
    PARTS["activations"][1]: {"hatch": "////", "edgecolor": "0.6"},
}
GB = 1e9


def look(colour):
    """How a patch of one of PARTS' colours is drawn: its face, its edge, and its pattern, which has the edge's colour."""
    return {"facecolor": colour, "edgecolor": "white", **HATCH.get(colour, {})}


def stacked_bar(ax, y, parts, height):
    """One horizontal bar of (value, colour), from the left; returns its length."""
    left = 0.0
    for value, colour in parts:
        ax.barh(y, value, height, left=left, lw=0.7, **look(colour))
        left += value
    return left


def write_over_bar(ax, y, title, parts, line=3):
    """In one column: a bar's name and total, bold, and its parts below them, `line` in a line, all over the bar's upper edge at y."""
    rows = [", ".join(parts[i : i + line]) for i in range(0, len(parts), line)]
    ax.annotate("\n".join(rows), (0, y), (2, 1), color="0.2", va="bottom", **SMALL)
    height = 1.2 * SMALL["fontsize"] * len(rows) + 3
    ax.annotate(title, (0, y), (2, height), va="bottom", weight="bold", **SMALL)


def account_bars(accounts, title=None):
    """Stacked bars, one for each Account: its parts from left to right, their bytes above them, the total at the end. -> figure"""
    accounts = list(accounts)
    figure, ax = canvas(9.2, 1.6 + 1.05 * len(accounts) if narrow() else 1.25 + 0.78 * len(accounts))
    longest = max(a.total for a in accounts)
    shown = [field for field in PARTS if field in ROWS or any(a.codes8 for a in accounts)]
    scale, unit = next((u for u in ((GB, "GB"), (1e6, "MB")) if longest >= u[0]), (1e3, "kB"))
    for y, account in enumerate(accounts):
        parts = [(getattr(account, field) / scale, PARTS[field][1]) for field in shown]
        said = [
            f"{PARTS[field][0].split(',')[0]} {in_units(getattr(account, field))}"
            for field in shown
            if getattr(account, field)
        ]
        if narrow():
            stacked_bar(ax, y, parts, 0.24)
            write_over_bar(ax, y - 0.15, f"{account.label}: {in_units(account.total)}", said)
            continue
        end = stacked_bar(ax, y, parts, 0.42)
        ax.annotate(
            in_units(account.total),
            (end, y),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            weight="bold",
        )
        words = {"textcoords": "offset points", "fontsize": 7.5, "color": "0.25", "va": "bottom"}
        ax.annotate("   ".join(said), (0, y - 0.27), (2, 0), **words)
    for name, colour in map(PARTS.get, shown):
        ax.barh(0, 0, label=name, lw=0.7, **look(colour))
    ax.legend(
        frameon=False,
        fontsize=8,
        ncols=3 if narrow() else len(shown),
        handlelength=2.4,
        handleheight=1.2,
        loc="upper center",
        bbox_to_anchor=(0.45, -0.1 - (0.1 if narrow() else 0.24) / len(accounts)),
    )
    ax.get_legend().set_in_layout(True)
    if narrow():
        ax.set_yticks([])
    else:
        ax.set_yticks(range(len(accounts)), [a.label for a in accounts], fontsize=9)
    top = -0.85 if narrow() else -0.65
    ax.set(xlim=(0, 1.14 * longest / scale), ylim=(len(accounts) - 0.6, top), xlabel=f"{unit} of one training step")
    ax.xaxis.set_label_coords(0.98, 0.04)
    ax.xaxis.label.set(ha="right", va="bottom", fontsize=9)
    if title is None:
        most, least = max(accounts, key=lambda a: a.total), min(accounts, key=lambda a: a.total)
        title = f"{most.label} holds {most.total / least.total:.1f} times what {least.label} does"
    ax.set_title(title, fontsize=10)
    return figure
