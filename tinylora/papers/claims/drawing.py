"""What the figures of the claims share: results to draw, dots for the seeds, bars with their mean, lines with their range."""

import numpy as np

from ...figures.style import SMALL
from .registry import SEEDS, values

PALE = "#b8c4d6"  # a bar that is not the one the title speaks of


def given_or_run(given, function, **options):
    """The results that were given, or those of the experiment with seeds 0, 1, 2 if none were."""
    return [function(seed=seed, **options) for seed in SEEDS] if given is None else given


def dots(ax, x, y, colour, size, mark="o"):
    """Marks with a thin white edge: y against x, or all of y over one x."""
    ax.plot(np.broadcast_to(x, np.shape(y)), y, mark, color=colour, ms=size, mec="white", mew=0.4)


def bars(ax, at, results, keys, colours, form="{:.2f}", width=0.62):
    """One bar a key with its mean written above, and a dot a seed."""
    for x, key, colour in zip(at, keys, colours, strict=True):
        found = values(results, key)
        ax.bar(x, found.mean(), width, color=colour)
        dots(ax, x, found, "0.2", 3)
        label = form.format(found.mean())
        ax.annotate(label, (x, max(found.max(), found.mean())), (0, 4), ha="center", color="0.25", **SMALL)


def mean_and_range(ax, x, rows, mark, colour, alpha, **line):
    """The mean over the seeds as a line, and their range as a band.   rows (seeds, points) -> the line"""
    (mean,) = ax.plot(x, rows.mean(axis=0), mark, color=colour, **line)
    ax.fill_between(x, rows.min(axis=0), rows.max(axis=0), color=colour, alpha=alpha, lw=0)
    return mean
