"""The figure of notebook 22: what an outlier costs in a block, and what blocks buy."""

import numpy as np

from tinylora import codebooks
from tinylora.figures.style import COLOURS, SMALL, canvas
from tinylora.numerics import distributions, optimality

#: layers of the base model far from the curve: which point is labelled, and where the label goes
NAMED = (
    ("layers.0.self_attn.k_proj", 1, "k_proj of layer 0", (-30, 6)),
    ("layers.4.mlp.down_proj", 1, "down_proj\nof layer 4", (-26, 6)),
    ("layers.0.mlp.gate_proj", 2, "gate, up of layer 0", (-58, -13)),
    ("layers.0.self_attn.v_proj", 2, "v_proj of layer 0", (-56, -13)),
)


def price_and_gain(layers, outliers=(3, 4, 6, 10, 20)):
    """Left: NF4's error against the size k of one outlier a block of 64. Right: one quantizer for the tensor against blocks, by spread τ.

    layers    {name: (τ, ratio with 16 values, with 22)} as measured; the curves are theory (log-normal scales)
    """
    figure, (left, right) = canvas(8, 3.6, ncols=2)
    nf4 = codebooks.nf4()
    undisturbed = optimality.expected_error(nf4, 64)

    def with_outlier(k):
        return optimality.expected_error(nf4, 64, law=distributions.Outlier(float(k)))

    k = np.geomspace(1.5, 150, 60)
    left.loglog(k, [with_outlier(x) for x in k], color=COLOURS[0], lw=1.8)
    left.axhline(undisturbed, color="0.4", lw=1, ls="--")
    left.annotate(f"no outlier: {undisturbed:.6f}", (155, undisturbed), (0, 4), ha="right", **SMALL)
    left.axhline(63 / 64, color="0.4", lw=1, ls=":")
    left.annotate("all others coded as 0: 63/64", (1.5, 63 / 64), (0, 4), **SMALL)
    for x in outliers:
        left.plot(x, with_outlier(x), "o", color=COLOURS[0], ms=5)
        factor = f"×{with_outlier(x) / undisturbed:.2f}"
        left.annotate(factor, (x, with_outlier(x)), (-5, 3), ha="right", **SMALL)
    left.set(xlim=(1.4, 160), xlabel="size k of one outlier in each block of 64, in σ")
    left.set(ylim=(0.005, 2.2), ylabel="mean squared error, in σ²")
    left.set_xticks(ticks := [2, 3, 4, 6, 10, 20, 50, 100], map(str, ticks))
    left.minorticks_off()
    left.set_title("One large weight raises the error of its block", fontsize=10)

    tau = np.array([0, 0.06, 0.12, 0.18, 0.24, 0.3, 0.35, 0.38, 0.39, 0.44, 0.5, 0.56, 0.62, 0.68, 0.74])
    spread = [distributions.ScaleMixture.lognormal(t) for t in tau]
    points = np.array(list(layers.values())).T
    kinds = ((16, points[1], COLOURS[2], "^", "-", (0.6, 2.85)), (22, points[2], COLOURS[0], "o", "-.", (0.63, 1.68)))
    for levels, measured, colour, marker, style, place in kinds:
        cost = [optimality.distortion(optimality.optimal_levels(levels, 2, law), 2, law) for law in spread]
        ratio = np.array(cost) / undisturbed
        right.plot(tau, ratio, style, color=colour, lw=1.8)
        right.plot(points[0], measured, marker, color=colour, ms=4.5, mec="white", mew=0.4)
        label = f"{levels} values, {np.log2(levels):.3g} bits"
        right.annotate(label, place, color=colour, ha="right", fontsize=8.5)
    even = float(np.interp(1, ratio, tau))
    right.axhline(1, color="0.4", lw=1, ls="--")
    right.annotate("blocks: 4.5 bits", (0.72, 1), (0, 3), ha="right", color="0.3", **SMALL)
    right.plot(even, 1, "s", color=COLOURS[0], ms=5)
    right.annotate(f"τ = {even:.3f}", (even, 1), (5, -11), color=COLOURS[0], **SMALL)
    for path, point, label, place in NAMED:
        for row in (row for name, row in layers.items() if path in name):
            right.annotate(label, (row[0], row[point]), place, color="0.3", **SMALL)
    right.set(xlim=(-0.015, 0.73), xlabel="spread τ of the blocks' scales (sd of log σ)")
    right.set(ylim=(0.36, 3.2), ylabel="squared error, one quantizer / blocks")
    right.set_title("Curves: log-normal scales. Points: 35 layers", fontsize=10)
    return figure
