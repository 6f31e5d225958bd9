"""The figure of notebook 05: where NF4's values lie on the normal distribution, and how often each is used."""

from statistics import NormalDist

import numpy as np

from tinylora import codebooks
from tinylora.figures.style import COLOURS, canvas
from tinylora.numerics import optimality


def nf4_on_the_normal(blocksize=64):
    """Left: Φ with NF4's evenly spaced probabilities and the values they give. Right: the values' usage in blocks of normal weights."""
    figure, (left, right) = canvas(9.6, 4.0, ncols=2, width_ratios=[1.15, 1])
    blue, red = COLOURS[0], COLOURS[2]
    normal, offset = NormalDist(), codebooks.NF4_OFFSET
    scale = normal.inv_cdf(offset)
    code = codebooks.nf4().astype(float)
    values = code * scale
    heights = np.array([normal.cdf(x) for x in values])
    colours = [*[blue] * 7, "0.25", *[red] * 8]  # the negative values, 0, the positive ones

    x = np.linspace(-2.6, 2.6, 400)
    left.plot(x, [normal.cdf(v) for v in x], color="0.55", lw=1.2, zorder=1)
    for v, p, colour in zip(values, heights, colours, strict=True):
        left.plot([-2.6, v, v], [p, p, 0], color=colour, lw=0.6, alpha=0.75, zorder=0)
        left.plot([v, v], [-0.05, 0], color=colour, lw=1.6, clip_on=False)
    left.scatter(values, heights, c=colours, s=14, zorder=2)
    left.axhline(0, color="0.25", lw=0.8)
    said = (
        (f"below ½: 7 steps of {(offset - 0.5) / 7:.4f}", blue),
        (f"above ½: 8 steps of {(offset - 0.5) / 8:.4f}", red),
        (f"beyond either end: {1 - offset:.4f}", "0.25"),
    )
    blank = {"facecolor": "white", "edgecolor": "none", "pad": 2}
    for y, (text, colour) in zip((0.34, 0.25, 0.16), said, strict=True):
        left.text(2.58, y, text, color=colour, fontsize=8.5, ha="right", va="center", bbox=blank, zorder=3)
    for text, i, colour in (("−1", 0, blue), ("0", 7, "0.25"), ("1", 15, red)):
        left.text(values[i], -0.065, text, color=colour, fontsize=9, ha="center", va="top")
    left.text(2.6, -0.065, "NF4", color="0.25", fontsize=9, ha="right", va="top")
    for text, y in (("1 − o", 1 - offset), ("½", 0.5), ("o", offset)):
        left.text(-2.65, y, text, fontsize=9, ha="right", va="center")
    left.set(xlim=(-2.6, 2.6), ylim=(-0.13, 1.03), xticks=range(-2, 3), yticks=[])
    left.set_xlabel("weight, in σ", fontsize=9.5)
    left.set_ylabel("probability Φ", fontsize=9.5, labelpad=30)
    left.set_title(
        f"NF4: quantiles of evenly spaced probabilities,\no = {offset}; Φ⁻¹(o) = {scale:.3f} σ becomes 1", fontsize=10
    )

    share, H = optimality.usage(code, blocksize), optimality.entropy(code, blocksize)
    cells = (values[1:] + values[:-1]) / 2
    ideal = np.diff([0, *map(normal.cdf, cells), 1])
    right.bar(np.arange(16), 100 * share, color=colours, width=0.78, alpha=0.75)
    right.plot(np.arange(16), 100 * ideal, "D", color="white", markeredgecolor="black", markersize=4, zorder=3)
    right.axhline(6.25, color="0.2", lw=1, ls="--")
    for i in (int(share.argmin()), int(share.argmax())):
        right.text(i, 100 * share[i] + 0.12, f"{100 * share[i]:.2f}", ha="center", fontsize=8.5)
    right.text(15.6, 6.32, "1/16", fontsize=8.5, ha="left", va="bottom")
    right.annotate(
        f"N(0, 1) itself, in units of {scale:.3f} σ",
        (13.05, 100 * ideal[13] + 0.12),
        (8.4, 8.75),
        fontsize=8.5,
        arrowprops={"arrowstyle": "-", "color": "0.5", "lw": 0.7},
    )
    right.set(xlim=(-0.7, 16.6), ylim=(0, 10.2), xticks=range(0, 16, 3))
    right.set_xlabel("index of the value", fontsize=9.5)
    right.set_ylabel("share of the weights, %", fontsize=9.5)
    right.set_title(f"Usage in blocks of {blocksize}: the middle values most,\nH = {H:.4f} bits, not 4", fontsize=10)
    return figure
