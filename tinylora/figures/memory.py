"""Figures of the memory account: a step's bytes by method, and figure 6 of QLoRA recomputed beside its own labels."""

from .. import footprints
from ..memory import ROWS, in_units
from .style import COLOURS, canvas

#: Account's fields: (name in the figures, colour). Neighbours differ in lightness, so that the bars can be told apart in grey.
PARTS = {
    "weights": ("weights, 16 or 32 bits", "0.35"),
    "codes": ("4-bit codes", COLOURS[0]),
    "constants": ("constants", "#a9bcd9"),
    "adapters": ("adapters", COLOURS[2]),
    "gradients": ("gradients", "#f2c9a5"),
    "optimizer": ("optimizer", COLOURS[1]),
    "activations": ("activations", "0.93"),
}
_HATCH = {PARTS["activations"][1]: {"hatch": "////", "edgecolor": "0.6"}}
GB = 1e9


def _bar(ax, y, parts, height):
    """One horizontal bar of (value, colour), from the left; returns its length."""
    left = 0.0
    for value, colour in parts:
        ax.barh(
            y, value, height, left=left, facecolor=colour, lw=0.7, **{"edgecolor": "white", **_HATCH.get(colour, {})}
        )
        left += value
    return left


def account_bars(accounts, title=None):
    """Stacked bars, one for each Account: its parts from left to right, their bytes above them, the total at the end. -> figure"""
    accounts = list(accounts)
    figure, ax = canvas(9.2, 1.25 + 0.78 * len(accounts))
    longest = max(a.total for a in accounts)
    scale = GB if longest >= GB else 1e6 if longest >= 1e6 else 1e3
    for y, account in enumerate(accounts):
        parts = [(getattr(account, field) / scale, PARTS[field][1]) for field in ROWS]
        end = _bar(ax, y, parts, 0.42)
        ax.annotate(
            in_units(account.total),
            (end, y),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            weight="bold",
        )
        said = "   ".join(
            f"{PARTS[field][0].split(',')[0]} {in_units(getattr(account, field))}"
            for field in ROWS
            if getattr(account, field)
        )
        ax.annotate(said, (0, y - 0.27), (2, 0), textcoords="offset points", fontsize=7.5, color="0.25", va="bottom")
    for _, (name, colour) in PARTS.items():
        ax.barh(0, 0, facecolor=colour, label=name, **_HATCH.get(colour, {}))
    ax.legend(
        frameon=False, fontsize=8, ncols=7, loc="upper center", bbox_to_anchor=(0.45, -0.1 - 0.24 / len(accounts))
    )
    ax.get_legend().set_in_layout(True)
    ax.set_yticks(range(len(accounts)), [a.label for a in accounts], fontsize=9)
    unit = {GB: "GB", 1e6: "MB", 1e3: "kB"}[scale]
    ax.set(xlim=(0, 1.14 * longest / scale), ylim=(len(accounts) - 0.6, -0.65), xlabel=f"{unit} of one training step")
    ax.xaxis.set_label_coords(0.98, 0.04)
    ax.xaxis.label.set(ha="right", va="bottom", fontsize=9)
    if title is None:
        most, least = max(accounts, key=lambda a: a.total), min(accounts, key=lambda a: a.total)
        title = f"{most.label} holds {most.total / least.total:.1f} times what {least.label} does"
    ax.set_title(title, fontsize=10)
    return figure


def figure_6(seq_len=512):
    """QLoRA's figure 6: our account of the four Llamas (NF4 + DQ, r = 64, checkpointing) over the paper's labels, read as MiB. -> figure

    White is what the printed total, read as GiB, leaves beside the three labels.
    """
    figure, ax = canvas(9.2, 5.2)
    mib = 2**20 / GB
    ticks, end = [], 0.0
    for i, size in enumerate(footprints.SIZES):
        a, y = footprints.account(size, seq_len=seq_len, checkpointing=True), 2.6 * i
        base = footprints.base_bytes(size)
        model, adapters, optimizer, total = (float(x.replace(",", "")) for x in footprints.FIGURE_6[size])
        rest = footprints.figure_6_rest(size)
        ours = [
            (base, "codes"),
            (a.adapters, "adapters"),
            (a.gradients, "gradients"),
            (a.optimizer, "optimizer"),
            (a.activations, "activations"),
        ]
        theirs = [
            (model * mib, "codes"),
            (adapters * mib, "adapters"),
            (optimizer * mib, "optimizer"),
            (rest * 1024 * mib, None),
        ]
        for at, parts, head in (
            (y, [(n / GB, name) for n, name in ours], f"{a.total / GB:.1f} GB"),
            (y + 0.95, theirs, f"{total} GiB printed"),
        ):
            length = _bar(ax, at, [(n, PARTS[name][1] if name else "white") for n, name in parts], 0.42)
            ax.barh(at, length, 0.42, fill=False, edgecolor="0.45", lw=0.7)
            paper = {"fc": "white", "ec": "none", "pad": 0.6}  # so that the line at 48 GB does not cross the number
            bold = {"va": "center", "fontsize": 9, "weight": "bold", "bbox": paper}
            ax.annotate(head, (length, at), (5, 0), textcoords="offset points", **bold)
            end = max(end, length)
        names = {
            "codes": "model",
            "adapters": "adapters",
            "gradients": "gradients",
            "optimizer": "optimizer",
            "activations": "activations",
        }
        said = "   ".join(f"{names[name]} {n / GB:.2f}" for n, name in ours)
        small = {"textcoords": "offset points", "fontsize": 7.5, "color": "0.25", "va": "bottom"}
        ax.annotate(f"{said} GB", (0, y - 0.25), (2, 0), **small)
        printed = dict(zip(("model", "adapters", "optimizer"), footprints.FIGURE_6[size], strict=False))
        said = "   ".join(f"{name} {label}" for name, label in printed.items())
        ax.annotate(f"{said} MiB   not labelled {rest:.2f} GiB", (0, y + 0.7), (2, 0), **small)
        ticks += [(y, f"{size.upper()}, recomputed"), (y + 0.95, "paper")]
    ax.axvline(48, color="0.3", lw=0.9, ls=":", zorder=0)
    ax.annotate("48 GB", (48, -0.55), (4, 0), textcoords="offset points", fontsize=8.5, color="0.3", va="center")
    for name, text in (
        ("codes", "model"),
        ("adapters", None),
        ("gradients", None),
        ("optimizer", None),
        ("activations", None),
    ):
        colour = PARTS[name][1]
        ax.barh(0, 0, facecolor=colour, label=text or PARTS[name][0], **_HATCH.get(colour, {}))
    ax.barh(0, 0, fill=False, edgecolor="0.45", lw=0.7, label="not labelled in the paper")
    white = {"facecolor": "white", "edgecolor": "none", "framealpha": 1}  # the line at 48 GB ends at it
    ax.legend(**white, fontsize=8.5, loc="center right", bbox_to_anchor=(1.0, 0.62))
    ax.set_yticks([y for y, _ in ticks], [name for _, name in ticks], fontsize=9)
    ax.set(xlim=(0, 1.2 * end), ylim=(9.2, -0.9), xlabel=f"GB, one sequence of {seq_len} tokens")
    gap = [
        100 * (float(footprints.FIGURE_6[s][0].replace(",", "")) * 2**20 / footprints.base_bytes(s) - 1)
        for s in footprints.SIZES
    ]
    ax.set_title(
        f"adapters: one formula to the digit; model bars: {min(gap):.0f} to {max(gap):.0f} % above weights and constants",
        fontsize=10,
    )
    return figure
