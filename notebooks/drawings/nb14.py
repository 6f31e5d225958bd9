"""The figure of notebook 14: what the exchange changes, and what it leaves alone."""

import numpy as np

from tinylora.figures.style import COLOURS, SMALL, canvas


def exchange(result):
    """Losses before and after the exchange with p = 4, q = 8, beside α/32 alone; the relative difference for p = 3.

    result    of `dynamics.invariance`
    """
    figure, (left, right) = canvas(8.8, 3.5, ncols=2, width_ratios=(1.3, 1))
    before, after, alone = (np.array(result[key]) for key in ("curve", "curve_powers", "curve_alone"))
    steps = np.arange(len(before))
    left.semilogy(steps, before, "-", color="0.2", lw=1.2)
    left.semilogy(steps[::3], after[::3], "o", color=COLOURS[0], mfc="none", ms=6, mew=1.2)
    left.semilogy(steps, alone, "--", color=COLOURS[2], lw=1.5)
    left.annotate("dashes: α/32 alone", (50, alone[-1]), (0, 17), ha="right", color=COLOURS[2], **SMALL)
    left.text(2, before[-1] * 1.9, "line: α, A₀, η, η", color="0.2", fontsize=8.5)
    left.text(2, before[-1] * 1.2, "rings: α/32, 4 A₀, 4 η, 8 η", color=COLOURS[0], fontsize=8.5)
    left.set(xlabel="step", ylabel="training loss (mean squared error)")
    differ = f"{result['different_powers']:.0f} of {2 * len(steps)} losses differ in any bit"
    left.set_title(f"p = 4, q = 8: line and rings are the same run;\n{differ}", fontsize=10)
    difference = np.array(result["difference_three"]) / 2**-52
    right.vlines(steps, 0, difference, color="0.6", lw=1)
    right.plot(steps, difference, "s", color=COLOURS[1], ms=3.5)
    right.set(xlabel="step", ylabel="relative difference, in 2⁻⁵² = 2.2e-16", ylim=(0, 1.25 * max(difference.max(), 1)))
    right.set_title(f"p = 3, q = 1: the 16th digit differs,\nby at most {difference.max() * 2**-52:.1e}", fontsize=10)
    return figure
