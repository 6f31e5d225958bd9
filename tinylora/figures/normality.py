"""How many rows a test for normality rejects, against their length."""

import numpy as np

from ..normality import ALL, ALPHA, LAWS, PAPER, STORED
from .style import COLOURS, canvas

_TICKS = (3, 5, 10, 20, 50, 100)


def rejected_against_length(models, power):
    """The share of rows rejected at 5 %: a labelled dot for each kind of layer, a curve for each known law.

    models {label: [Group]} as `normality.measure` gives them; power {length: `normality.drawn`}. The bands are two Monte Carlo errors wide
    on either side. The paper's 7.5 % stands at 4,096, the width of the model it was measured on. -> figure
    """
    figure, ax = canvas(11, 6.6)
    lengths = np.array(sorted(power))
    last = int(lengths[-1])
    ends = []
    for i, law in enumerate(LAWS):
        share = np.array([100 * power[n][law].rejected for n in lengths])
        error = np.array([200 * power[n][law].monte_carlo_error for n in lengths])
        null = i < 2
        style = {"color": "black" if null else "0.5", "lw": 1.2 if null else 1, "ls": ":" if law == STORED else "-"}
        ax.plot(lengths, share, **style)
        ax.fill_between(lengths, np.maximum(share - error, 0.1), share + error, color=style["color"], alpha=0.08, lw=0)
        ends.append((share[-1], f"{law}: {share[-1]:.1f} %", style["color"]))
    paper = 100 * PAPER["rejected"]
    theirs = [(paper, f"LLaMA-7B, QLoRA appendix F: {paper:.1f} %", COLOURS[2])]
    if last == PAPER["length"]:
        ends += theirs
    else:
        _labels(ax, PAPER["length"], -10, theirs)
    _labels(ax, last, 10, ends)
    ax.plot(PAPER["length"], paper, "D", color=COLOURS[2], ms=7)
    for i, (label, groups) in enumerate(models.items()):
        colour, side = COLOURS[i % 2], 1 - 2 * (i % 2)  # every other model is labelled to the left
        kinds = [g for g in groups if g.name != ALL]
        shares = np.maximum([100 * g.rejected for g in kinds], _TICKS[0])  # none rejected: on the lower edge
        ax.plot([g.length for g in kinds], shares, "o", color=colour, ms=5, label=label)
        for n in {g.length for g in kinds}:
            here = [(100 * g.rejected, f"{g.name} {100 * g.rejected:.1f} %", colour) for g in kinds if g.length == n]
            _labels(ax, n, -8 if n == last else 8 * side, here)
    ax.axhline(100 * ALPHA, color="black", lw=0.6, ls="--")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlim(lengths[0] * 0.94, last * 1.06)
    ax.set_ylim(_TICKS[0], 115)
    ax.set_xticks([n for n in lengths if n & (n - 1) == 0], [f"{n:,}" for n in lengths if n & (n - 1) == 0])
    ax.set_yticks(_TICKS, [f"{t} %" for t in _TICKS])
    ax.minorticks_off()
    ax.set_xlabel("values in a row (in-features)", fontsize=9)
    ax.set_ylabel("rows rejected by Shapiro and Wilk's test at 5 %", fontsize=9)
    draws = next(iter(power[last].values())).rows
    ax.set_title(
        f"Lines: rows drawn from known laws, {draws:,} for each point (band: ± 2 Monte Carlo errors). Dots: all rows of each kind of layer",
        fontsize=9,
        loc="left",
    )
    ax.legend(loc="upper left", bbox_to_anchor=(0, 0.93), fontsize=9, frameon=False)
    return figure


def _labels(ax, x, offset, entries, gap=11.0):
    """Write (y, text, colour) beside x, left where offset < 0: moved apart where they would overlap, with a thin line to y."""
    entries = sorted(entries)
    points = 72 * 6.6 * 0.8 / np.log(115 / _TICKS[0])  # of a factor e, about
    wanted = np.array([np.log(max(y, _TICKS[0])) * points for y, _, _ in entries])
    at = wanted.copy()
    for _ in range(200):  # push neighbours apart by halves until all gaps are wide enough
        lack = np.maximum(0, gap - np.diff(at)) / 2
        at[:-1] -= lack
        at[1:] += lack
    for (y, text, colour), shift in zip(entries, at - wanted, strict=True):
        ax.annotate(
            text,
            (x, max(y, _TICKS[0])),
            xytext=(offset, shift),
            textcoords="offset points",
            fontsize=8,
            color=colour,
            va="center",
            ha="left" if offset > 0 else "right",
            bbox={"boxstyle": "square,pad=0.05", "fc": "white", "ec": "none", "alpha": 0.75},
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "lw": 0.4, "color": colour, "shrinkA": 0, "shrinkB": 2},
        )


__all__ = ["rejected_against_length"]
