"""The learning rate over the steps of a run."""

import math

SCHEDULES = ("constant", "linear", "cosine")


def schedule(kind, step, steps, warmup=0, floor=0.1):
    """The factor on the learning rate at step = 0 … steps − 1.

    All begin with a linear warm-up over `warmup` steps. Then "constant" stays at 1, "linear" falls in a straight line that
    reaches 0 at `steps` (as transformers' schedule of that name), and "cosine" falls to `floor` along half a cosine.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"schedule {kind!r} is unknown: expected one of {', '.join(map(repr, SCHEDULES))}")
    if step < warmup:
        return (step + 1) / warmup
    if kind == "constant":
        return 1.0
    progress = (step - warmup) / max(steps - warmup, 1)
    if kind == "linear":
        return 1.0 - progress
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
