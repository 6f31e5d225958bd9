"""The figure of notebook 15: what each way of combining adapters misses."""

import numpy as np

from tinylora.figures.style import COLOURS, SMALL, canvas


def errors_of_combining(counts, by_kind):
    """The error of "linear", "svd" and "cat", as a share of the sum asked for, against the number of adapters.

    counts     the numbers of adapters
    by_kind    {kind: errors}, in the order of `counts`
    """
    figure, ax = canvas(6.6, 3.5)
    m = np.linspace(min(counts), max(counts), 100)
    ax.plot(m, 100 * np.sqrt(m - 1), ":", color="0.45", lw=1.2)
    ax.plot(m, 100 * np.sqrt(1 - 1 / m), ":", color="0.45", lw=1.2)
    x = counts[0] + 0.3
    ax.annotate("√(m − 1)", (x, 100 * np.sqrt(x - 1)), (8, -12), color="0.35", **SMALL)
    ax.annotate("bound √(1 − 1/m)", (x, 100 * np.sqrt(1 - 1 / x)), (0, 9), color="0.35", **SMALL)
    for kind, mark, colour in (("linear", "s--", COLOURS[2]), ("svd", "o-", COLOURS[0]), ("cat", "^-", COLOURS[1])):
        errors = 100 * np.array(by_kind[kind])
        ax.plot(counts, errors, mark, color=colour, lw=1.3, ms=5.5)
        ax.annotate(f'"{kind}": {errors[-1]:.0f} %', (counts[-1], errors[-1]), (8, -3), color=colour, **SMALL)
    ax.set(xlabel="m, the number of adapters", ylabel="error (per cent of the sum)", ylim=(-8, 190))
    ax.set_xlim(counts[0] - 0.1, counts[-1] + 0.55)
    ax.set_xticks(counts)
    ax.set_title(
        f'For two adapters "linear" misses {100 * by_kind["linear"][0]:.0f} % of the sum, "svd" '
        f'{100 * by_kind["svd"][0]:.0f} %, and "cat" nothing',
        fontsize=10,
    )
    return figure
