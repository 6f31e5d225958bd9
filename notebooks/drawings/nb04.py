"""Figures of notebook 04: whom one outlier damages, and the law of a block's maximum."""

import numpy as np

from tinylora import quantize
from tinylora.figures.style import COLOURS, SMALL, canvas
from tinylora.numerics import optimality


def one_outlier(w, place=207, marked=(10, 50)):
    """NF4's squared error in the block that holds one outlier and in all others, with one absmax and in blocks of 64."""
    figure, ax = canvas(8, 3.3)
    k = np.unique(np.concatenate([np.geomspace(4, 150, 25), np.array(marked, float)]))
    inside = np.arange(w.size // 64) == place // 64

    def errors(blocksize):
        for size in k:
            hurt = w.copy().reshape(-1)
            hurt[place] = size
            error = np.square(quantize(hurt, "nf4", blocksize).dequantize() - hurt).reshape(-1, 64).mean(axis=1)
            yield error[inside].mean(), error[~inside].mean()

    whole, blocks = np.array(list(errors(None))), np.array(list(errors(64)))
    n = (~inside).sum()
    lines = (
        (whole[:, 1], f"the {n} other blocks, one absmax for the tensor", COLOURS[2], "-", "o", 6, -14),
        (blocks[:, 0], "the outlier's own block, in blocks of 64", COLOURS[0], "--", "^", -6, 8),
        (blocks[:, 1], f"the {n} other blocks, in blocks of 64", COLOURS[1], "-.", "s", 0, 7),
    )
    at = {x: int(np.flatnonzero(k == x)[0]) for x in marked}
    for error, label, colour, style, marker, right, up in lines:
        ax.loglog(k, error, style, color=colour, lw=1.8, marker=marker, markevery=list(at.values()), ms=6, label=label)
        for i in at.values():
            side = "left" if right > 0 else "right" if right < 0 else "center"
            ax.annotate(f"{error[i]:.3g}", (k[i], error[i]), (right, up), color=colour, ha=side, **SMALL)
    ax.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(0.42, 0.4), handlelength=3.4)
    ax.set(xlim=(3.8, 160), xlabel="size of the one outlier, in σ")
    ax.set(ylim=(0.005, 2.2), ylabel="mean squared error, in σ²")
    ax.set_xticks(ticks := [4, 6, 10, 20, 50, 100, 150], map(str, ticks))
    ax.minorticks_off()
    ax.set_title("With one absmax every block pays for one outlier; with blocks only its own block does", fontsize=10)
    return figure


def block_maximum(draws=20_000, seed=0):
    """Densities of M, the largest of I normal magnitudes, with their means and relative deviations; bars: a draw for I = 64."""
    figure, ax = canvas(8, 2.9)
    m = np.linspace(0.8, 5.6, 600)
    drawn = np.abs(np.random.default_rng(seed).standard_normal((draws, 64))).max(axis=1)
    ax.hist(drawn, bins=np.arange(0.8, 5.6, 0.08), density=True, color="0.88")
    ax.annotate(f"bars: drawn,\n{draws:,} blocks\nof 64", (0.84, 0.5), color="0.35", fontsize=8.5)
    for I, colour, shift in zip((16, 64, 256, 4096), COLOURS, (-16, -10, 0, 0), strict=False):
        density, mean = optimality.max_pdf(m, I), optimality.expected_max(I)
        cv = (optimality.expected_max(I, 2) / mean**2 - 1) ** 0.5
        ax.plot(m, density, color=colour, lw=1.8)
        ax.plot([mean, mean], [0, float(optimality.max_pdf(mean, I))], color=colour, lw=1, ls=":")
        peak = int(density.argmax())
        label = f"I = {I}\n{mean:.3f} ± {100 * cv:.0f} %"
        ax.annotate(label, (m[peak], density[peak]), (shift, 4), color=colour, ha="center", **SMALL)
    ax.set(xlim=(0.8, 5.6), xlabel="largest magnitude M of a block of I weights, in σ")
    ax.set(ylim=(0, 1.75), ylabel="density")
    ax.set_title(
        "The absmax of a block is a random number: its mean ± its standard deviation, in % of the mean", fontsize=10
    )
    return figure
