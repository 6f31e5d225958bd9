"""The figure of notebook 20: which start suits a quantized base."""

import numpy as np

from tinylora.figures.style import COLOURS, SMALL, canvas
from tinylora.papers.claims import registry


def which_start(laws, matrices):
    """Error at the start over NF4's, against p, the share of ‖W‖² in W's top r directions, with PiSSA's √(1 − p) as a line.

    laws, matrices    lists of dicts with the keys share, pissa, loftq_1, loftq_5: of power-law spectra, and of a model's weights
    """
    figure, ax = canvas(7.2, 3.7)
    p = np.linspace(0, 0.97, 200)
    ax.plot(p, np.sqrt(1 - p), "-", color="0.5", lw=1.2, zorder=1)
    styles = (("pissa", COLOURS[2], "o"), ("loftq_1", COLOURS[0], "s"), ("loftq_5", COLOURS[1], "^"))
    for key, colour, mark in styles:
        for rows, face, size in ((laws, colour, 5), (matrices, "none", 4.5)):
            x, y = registry.values(rows, "share"), registry.values(rows, key)
            ax.plot(x, y, mark, color=colour, mfc=face, ms=size, mew=0.9, alpha=1 if rows is laws else 0.75)
    share, one, five = (registry.values(laws, key) for key in ("share", "loftq_1", "loftq_5"))
    ax.plot(share, one, "-", color=COLOURS[0], lw=1)
    ax.plot(share, five, "-", color=COLOURS[1], lw=1)
    ax.annotate("PiSSA (circles); line: √(1 − p)", (0.66, np.sqrt(0.34)), (16, 3), color=COLOURS[2], **SMALL)
    ax.annotate("LoftQ, 1 step (squares)", (share[-4], one[-4]), (-8, 9), color=COLOURS[0], **SMALL)
    ax.annotate("LoftQ, 5 steps (triangles)", (share[-4], five[-4]), (-18, -18), color=COLOURS[1], **SMALL)
    ax.text(
        0.03, 0.06, "filled: power laws\nhollow: the base model", transform=ax.transAxes, fontsize=8.5, color="0.35"
    )
    ax.set(
        xlabel="p, the share of ‖W‖² in its first r singular directions",
        ylabel="error at the start / NF4's error",
        xlim=(0, 0.96),
    )
    ax.set_ylim(0.2, 1.02)
    crossings = [1 - np.mean(y[:4]) ** 2 for y in (one, five)]
    ax.set_title(
        "On power laws PiSSA beats 1 step of LoftQ if p > {:.2f}, and 5 steps if p > {:.2f}".format(*crossings),
        fontsize=10,
    )
    return figure
