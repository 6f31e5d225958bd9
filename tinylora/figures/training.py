"""Figures of training runs."""

import numpy as np

from .style import COLOURS, canvas, require_matplotlib, save


def comparison(reports, path):
    """Held-out bits per byte of each method (dots: seeds, bar: their mean) beside the bytes of weights, state and tape."""
    from ..finetune import METHODS

    require_matplotlib()
    names = [
        METHODS[m][0].replace(" + double quantization", "\n+ double quantization").replace(", ", ",\n", 1)
        for m in reports
    ]
    after = [[r.after for r in rs] for rs in reports.values()]
    figure, (left, right) = canvas(
        9, 3.6, ncols=2, gridspec_kw={"width_ratios": [1.25, 1], "wspace": 0.08}, sharey=True
    )
    y = np.arange(len(names))[::-1]
    for row, scores, colour in zip(y, after, COLOURS, strict=False):
        left.plot([np.mean(scores)] * 2, [row - 0.3, row + 0.3], color=colour, lw=3)
        left.plot(scores, [row] * len(scores), "o", color=colour, ms=4, mec="white", mew=0.5)
        left.annotate(f"{np.mean(scores):.4f}", (max(scores), row), textcoords="offset points", xytext=(8, -3))
    left.margins(x=0.2)
    left.set_yticks(y, names)
    left.set_xlabel("held-out bits per byte after fine-tuning\n(bar: mean over seeds, dots: seeds)")
    parts = (
        ("weights", ("frozen weights", "trained weights"), "#9aa5b1"),
        ("gradients", ("gradients",), "#c9b26b"),
        ("optimizer state", ("optimizer state",), "#b07aa1"),
    )
    start = np.zeros(len(names))
    for label, keys, colour in parts:
        size = np.array([sum(rs[0].bytes[k] for k in keys) / 1e6 for rs in reports.values()])
        right.barh(y, size, left=start, height=0.6, color=colour, label=label)
        start += size
    for row, total in zip(y, start, strict=True):
        right.annotate(f"{total:.1f}", (total, row), textcoords="offset points", xytext=(4, -3))
    right.set_xlabel("MB held beside the tape")
    right.margins(x=0.15)
    right.legend(frameon=False, loc="lower right", fontsize=8)
    save(figure, path)
