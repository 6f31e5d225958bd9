"""Pictures of what a run or an account returned, drawn with matplotlib (extra `notebooks` or `dev`).

    runs      held-out bits per byte of runs: methods beside each other, against the step, against the rank
    memory    where the bytes of a training step are
    paging    the timeline of a pager, and what a budget costs
    speed     the benchmark: ratios to other libraries, and how a step grows
    style     the canvas, the colours and the file that all figures share

What a paper claims is drawn where it is computed, in `papers`; what only a notebook draws is in notebooks/drawings. The functions
return a figure, which shows itself in a notebook; `save(figure, path)` writes it as SVG, whole or not at all.
"""

from .style import canvas, require_matplotlib, save

__all__ = ["canvas", "require_matplotlib", "save"]
