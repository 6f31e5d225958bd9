"""Figures of real weights under 4-bit codes."""

import numpy as np

from .style import COLOURS, canvas, require_matplotlib, save


def survey(lines, normal, path):
    """The relative squared error of each code: a dot a tensor, a bar for the mean over weights, a cross for normal weights."""
    from ..survey import mean

    require_matplotlib()
    codes = list(lines[0].error)
    total = mean(lines)
    figure, ax = canvas(8, 0.8 + 0.45 * len(codes))
    rng = np.random.default_rng(0)
    right = max(max(x.error.values()) for x in [*lines, normal])
    for row, code in enumerate(codes[::-1]):
        x = np.array([line.error[code] for line in lines])
        ax.plot(x, row + rng.uniform(-0.18, 0.18, len(x)), "o", color=COLOURS[0], ms=3, alpha=0.5, mew=0)
        ax.plot([total.error[code]] * 2, [row - 0.32, row + 0.32], color="black", lw=1.5)
        ax.plot(normal.error[code], row, "x", color=COLOURS[2], ms=7, mew=1.5)
        ax.annotate(
            f"{total.error[code]:.5f}",
            (right, row),
            xytext=(12, -3),
            textcoords="offset points",
            annotation_clip=False,
            fontsize=9,
        )
    ax.set_yticks(range(len(codes)), codes[::-1])
    ax.set_xlim(0, right * 1.02)
    ax.set_xlabel(
        f"relative squared error at {total.bits:.3f} bits a weight\n"
        "dots: tensors; bar and number: mean over weights; cross: normal weights",
        fontsize=9,
    )
    save(figure, path)
