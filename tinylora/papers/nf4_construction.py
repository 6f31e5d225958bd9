"""How NF4 is built, value by value, and what it is optimal for: what `tinylora nf4` prints and draws.

What is computed: `recipe()` goes from normal quantiles to the 16 values, with each choice of the recipe open; `equation_4()` is the paper's
own equation, which gives another code; `nf4_excess(blocksize, power)` is what NF4 costs above the best code with the same pins −1, 0, 1.

What is said, as text whose numbers are computed when it is printed:

    construction()                  the steps from the offset to the values, with their bit patterns beside the published ones
    deviations()                    what breaks the table, in units in the last place (ULP)
    optimality_table(blocksizes)    the errors of NF4, how far they lie above the best code's, and the entropy of its usage

What is drawn: `nf4_optimal_for()` shows that excess against the block size, beside what theory predicts.
"""

from functools import cache
from statistics import NormalDist

import numpy as np

from .. import codebooks
from ..figures.style import COLOURS, canvas
from ..numerics import optimality

_BLOCKSIZES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_DEFAULT = 64  # QLoRA's block size


def recipe(grid=codebooks.linspace_f32, offset=codebooks.NF4_OFFSET, precision=np.float32):
    """NF4's recipe with each of its choices open -> (probabilities, quantiles, values) for the 7 negatives, 0 and the 8 positives.

    grid(start, stop, n) makes the probabilities; precision is that of the quantiles and of the division by the largest.
    """
    inverse = NormalDist().inv_cdf
    positive, negative = grid(offset, 0.5, 9)[:-1], grid(offset, 0.5, 8)[:-1]
    below, above = (np.array([inverse(float(p)) for p in side], precision) for side in (negative, positive))
    quantiles = np.concatenate([-below, np.zeros(1, precision), above[::-1]])
    probabilities = np.concatenate([1 - np.float64(negative), [0.5], np.float64(positive)[::-1]])
    return probabilities, quantiles, (quantiles / quantiles.max()).astype(np.float32)


def ulps(values):
    """(value − published) in units in the last place. (16,) float32 -> list of int"""
    published = np.array(codebooks.NF4_PUBLISHED, np.uint32)
    apart = (values.view(np.uint32) & 0x7FFFFFFF).astype(np.int64) - (published & 0x7FFFFFFF)
    return np.where(published >> 31, -apart, apart).tolist()


def construction():
    """The steps, and the 16 values beside the published ones."""
    exact = 1 - (1 / 32 + 1 / 30) / 2
    probabilities, quantiles, values = recipe()
    published = np.array(codebooks.NF4_PUBLISHED, np.uint32)
    lines = [
        "1  the outermost probability: half a bin of 16 and half a bin of 15 are cut off, on average",
        f"   o = 1 - (1/32 + 1/30)/2 = 929/960 = {exact:.12f}, of which seven digits are used: {codebooks.NF4_OFFSET}",
        "2  evenly spaced probabilities from o to 1/2, in float32: 8 for the positive side, 7 for the negative",
        "3  their normal quantiles, rounded to float32; 1/2 becomes an exact 0 and is taken once",
        f"4  all of them divided by the largest, {quantiles.max():.7f}, in float32",
        "",
        " i  probability    quantile          value        bits  published  ULP",
    ]
    for i, row in enumerate(
        zip(probabilities, quantiles, values, values.view(np.uint32), published, ulps(values), strict=True)
    ):
        lines.append("{:2d}    {:.7f}  {:+.7f}  {:+.10f}    {:08x}   {:08x}  {:3d}".format(i, *row))
    equal = int((values.view(np.uint32) == published).sum())
    return "\n".join([*lines, "", f"{equal} of 16 bit patterns equal the published ones"])


def deviations():
    """What happens to the table if one choice of the recipe is made otherwise."""
    choices = {
        "np.linspace in float32": {"grid": lambda a, b, n: np.linspace(a, b, n, dtype=np.float32)},
        "np.linspace in float64": {"grid": np.linspace},
        "quantiles and division in float64": {"precision": np.float64},
        "929/960 instead of 0.9677083": {"offset": 929 / 960},
    }
    lines = ["what breaks the table, in ULP (index 0 to 15)"]
    for name, change in choices.items():
        lines.append(f"   {name:<34}" + "".join(f"{u:4d}" for u in ulps(recipe(**change)[2])))
    q = equation_4()
    lines.append(f"   equation 4 as printed: {q[0]}, then 15 values from {q[1]:.3f} to {q[15]:.3f}; another code")
    return "\n".join(lines)


def equation_4(k=4):
    """q_i = ½(Q(i/(2^k + 1)) + Q((i + 1)/(2^k + 1))), i = 0 … 2^k − 1, Q = Φ⁻¹: QLoRA eq. 4, literally. (2^k,) float64"""
    n = 2**k
    Q = np.array([-np.inf, *(NormalDist().inv_cdf(i / (n + 1)) for i in range(1, n + 1))])
    return (Q[:-1] + Q[1:]) / 2


# ---------------------------------------------------------------------------------------------------------------- by block size
def nf4_excess(blocksize, power):
    """E|W − Ŵ|ᵖ of NF4 over that of the best code with −1, 0 and 1, less 1, in blocks of normal weights. -> float"""
    blocksize = int(blocksize)
    best = optimality.optimal_code(blocksize, power)
    nf4 = optimality.expected_error(codebooks.nf4(), blocksize, power)
    return nf4 / optimality.expected_error(best, blocksize, power) - 1


def predicted_blocksize(power, offset=codebooks.NF4_OFFSET):
    """The last block size I (to 4095) with E[M] ≤ s₀·√(1+p), where s₀ = Φ⁻¹(offset) is where NF4 cuts the normal law. -> int"""
    edge = NormalDist().inv_cdf(offset) * (1 + power) ** 0.5
    lo, hi = 2, 4096
    while hi - lo > 1:
        middle = (lo + hi) // 2
        lo, hi = (middle, hi) if optimality.expected_max(middle) <= edge else (lo, middle)
    return lo


def optimality_table(blocksizes=_BLOCKSIZES):
    """Errors of NF4 for normal weights, the best code with pins −1, 0, 1 beside it, and the entropy of its usage."""
    nf4 = codebooks.nf4()
    lines = [
        "what NF4 costs for N(0, 1) weights, and how much that lies above the best code with the same -1, 0 and 1",
        " block  E[max]   squared error    above   absolute error    above   entropy, bits",
    ]
    for I in blocksizes:
        cells = [f"{I:6d}  {optimality.expected_max(I):6.3f}"]
        for power in (2, 1):
            cost = optimality.expected_error(nf4, I, power)
            cells.append(f"{cost:15.7f}  {nf4_excess(I, power):7.3%}")
        lines.append("  ".join([*cells, f"{optimality.entropy(nf4, I):12.4f}"]))
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------------------- as figure
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
    ticks = ticks if power else ticks[::2]
    ax.set_xticks(ticks, [str(I) for I in ticks])
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
