"""What NF4 is optimal for: its cost over the best code's, and the entropy it lacks, against the block size."""

from functools import cache
from statistics import NormalDist

import numpy as np

from .. import codebooks, optimality
from .style import COLOURS, canvas

_DEFAULT = 64  # QLoRA's block size


def nf4_excess(blocksize, power):
    """E|W − Ŵ|ᵖ of NF4 over that of the best code with −1, 0 and 1, less 1, in blocks of normal weights. -> float"""
    blocksize = int(blocksize)
    best = optimality.optimal_code(blocksize, power)
    nf4 = optimality.expected_error(codebooks.nf4(), blocksize, power)
    return nf4 / optimality.expected_error(best, blocksize, power) - 1


def predicted_blocksize(power):
    """The last block size I with E[M] ≤ s₀·√(1+p), where s₀ = Φ⁻¹(0.9677083) is where NF4 cuts the normal law. -> int"""
    edge = NormalDist().inv_cdf(codebooks.NF4_OFFSET) * (1 + power) ** 0.5
    lo, hi = 2, 4096
    while hi - lo > 1:
        middle = (lo + hi) // 2
        lo, hi = (middle, hi) if optimality.expected_max(middle) <= edge else (lo, middle)
    return lo


def nf4_optimal_for(blocksizes=None):
    """NF4's excess in absolute and squared error, and what its entropy lacks of 4 bits, by block size (8 … 2048) -> figure

    A dot marks each minimum, found among all whole block sizes between those beside it; a triangle where theory expects it; a square
    the value at QLoRA's 64.
    """
    sizes = np.unique(np.geomspace(8, 2048, 49).round() if blocksizes is None else blocksizes).astype(int)
    figure, (left, right) = canvas(8, 3.7, ncols=2, width_ratios=(1.6, 1))
    found = {
        1: _draw(left, lambda I: 100 * nf4_excess(I, 1), sizes, 1, COLOURS[0], "-", "{:.4f} %"),
        2: _draw(left, lambda I: 100 * nf4_excess(I, 2), sizes, 2, COLOURS[2], "--", "{:.4f} %"),
        0: _draw(right, _lack, sizes, 0, "0.25", "-", "{:.4f} bits"),
    }
    for ax in (left, right):
        low, high = ax.get_ylim()
        ax.set_ylim(low / 8, high * 1.6)
        ax.set_xlabel("block size I (weights)")
        ax.axvline(_DEFAULT, color="0.6", lw=0.9, ls=":", zorder=0)
    left.set_ylabel("NF4 above the best code\nwith −1, 0 and 1 (per cent)")
    right.set_ylabel("4 − H of NF4's indices (bits)")
    left.text(sizes[-1], 1.35 * found[1][-1], "absolute error", color=COLOURS[0], fontsize=9, ha="right", va="bottom")
    left.text(sizes[0], 1.3 * found[2][0], "squared error", color=COLOURS[2], fontsize=9, ha="left", va="bottom")
    for ax in (left, right):
        ax.text(_DEFAULT * 1.08, 0.97, "64", color="0.35", fontsize=9, transform=ax.get_xaxis_transform(), va="top")
    one, two = (100 * nf4_excess(_DEFAULT, p) for p in (1, 2))
    left.set_title(f"At 64: {one:.3f} % in absolute, {two:.2f} % in squared error", fontsize=10)
    right.set_title(f"At 64: H = {_entropy(_DEFAULT):.4f} bits", fontsize=10)
    return figure


def _draw(ax, f, sizes, power, colour, line, unit):
    """One curve with its marks. Returns its values at `sizes`."""
    f = cache(f)
    best, least = _minimum(f, sizes)
    drawn = [int(I) for I in np.union1d(sizes, best)]
    ax.plot(drawn, [f(I) for I in drawn], line, color=colour, lw=1.8)
    ax.plot(best, least, "o", color=colour, ms=5.5, zorder=3)
    words = {"fontsize": 9, "color": colour, "ha": "center" if power else "left", "textcoords": "offset points"}
    words["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # over the line at 64
    ax.annotate(f"{best}\n{unit.format(least)}", (best, least), (0 if power else -4, -7), va="top", **words)
    if sizes[0] <= _DEFAULT <= sizes[-1]:
        ax.plot(_DEFAULT, f(_DEFAULT), "s", mfc="white", mec=colour, ms=5.5, zorder=4)
    expected, bottom = predicted_blocksize(power), ax.get_xaxis_transform()
    if sizes[0] <= expected <= sizes[-1]:
        ax.plot(expected, 0.025, "^", color=colour, ms=6, transform=bottom, clip_on=False)
        at = (0, 5) if power else (5, -3)
        ax.annotate(f"theory: {expected}", (expected, 0.025), at, xycoords=bottom, va="bottom", **words)
    ax.set(xscale="log", yscale="log")
    ticks = [I for I in (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096) if sizes[0] <= I <= sizes[-1]]
    ax.set_xticks(ticks if power else ticks[::2], [str(I) for I in (ticks if power else ticks[::2])])
    ax.xaxis.minorticks_off()
    ax.yaxis.set_major_formatter("{x:g}")
    return [f(int(I)) for I in sizes]


def _lack(blocksize):
    return 4 - _entropy(blocksize)


def _entropy(blocksize):
    return optimality.entropy(codebooks.nf4(), blocksize)


def _minimum(f, sizes):
    """(I, f(I)) of the least f among the whole numbers beside the best of `sizes`; f falls and then rises there."""
    i = int(np.argmin([f(int(I)) for I in sizes]))
    lo, hi = int(sizes[max(i - 1, 0)]), int(sizes[min(i + 1, len(sizes) - 1)])
    while hi - lo > 2:
        a, b = lo + (hi - lo) // 3, hi - (hi - lo) // 3
        lo, hi = (lo, b) if f(a) < f(b) else (a, hi)
    best = min(range(lo, hi + 1), key=f)
    return best, f(best)
