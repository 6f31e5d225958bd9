"""The learning rate over the steps of a run."""

import math


def schedule(kind, step, steps, warmup=0, floor=0.1):
    """The factor on the learning rate at step = 0 … steps − 1.

    "constant": 1 after a linear warm-up over `warmup` steps. "cosine": from 1 down to `floor` along half a cosine after
    the same warm-up.
    """
    if kind not in ("constant", "cosine"):
        raise ValueError(f"schedule {kind!r} is unknown: expected 'constant' or 'cosine'")
    if step < warmup:
        return (step + 1) / warmup
    if kind == "constant":
        return 1.0
    progress = (step - warmup) / max(steps - warmup, 1)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
