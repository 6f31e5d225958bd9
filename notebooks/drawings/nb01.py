"""The figure of notebook 01: bits per byte at each step, and the bytes that training holds."""

import numpy as np

from tinylora.figures.style import COLOURS, SMALL, canvas


def learning_and_memory(losses, checks, memory):
    """Left: each step's loss, and held-out values {step: bits per byte}. Right: bars of bytes, {part: (all trained, QLoRA)}."""
    figure, (left, right) = canvas(9.2, 3.8, ncols=2, width_ratios=(1.7, 1))
    steps, (first, *_, last) = len(losses), checks.values()
    left.plot(np.arange(steps), losses, "-", color="0.65", lw=1, zorder=1)
    top = int(np.argmax(losses))
    left.annotate("training text, 8 pieces a step", (top, losses[top]), (10, -6), color="0.4", **SMALL)
    for value, ls, when, (x, side) in ((first, "--", "before", (steps, "right")), (last, ":", "after", (0, "left"))):
        left.axhline(value, color=COLOURS[0], lw=1, ls=ls, zorder=0)
        up = 5 if when == "before" else -12
        left.annotate(f"held-out text, {when}: {value:.2f}", (x, value), (0, up), ha=side, color=COLOURS[0], **SMALL)
    left.plot(list(checks), list(checks.values()), "o-", color=COLOURS[0], ms=6, lw=1.3, mec="white", mew=0.6)
    left.set(xlabel="step", ylabel="bits per byte", xlim=(-1, steps + 1))
    left.set_title(f"{steps} steps take the held-out text from {first:.2f} to {last:.2f} bits per byte", fontsize=10)

    bottom, sums = np.zeros(2), np.sum(list(memory.values()), axis=0)
    for (part, sizes), colour, ink, hatch in zip(
        memory.items(), (COLOURS[0], "0.72", "0.88"), ("white", "0.1", "0.1"), ("", "", "//"), strict=True
    ):
        heights = np.array(sizes) / 1e6
        right.bar((0, 1), heights, 0.7, bottom=bottom, color=colour, edgecolor="white", lw=0.8, hatch=hatch)
        right.text(
            0, bottom[0] + heights[0] / 2, f"{part} {heights[0]:.1f}", ha="center", va="center", color=ink, fontsize=8.5
        )
        bottom += heights
    said = "\n".join(f"{part} {sizes[1] / 1e6:.1f}" for part, sizes in reversed(memory.items()))
    right.annotate(said, (1, bottom[1]), (0, 4), ha="center", color="0.2", **SMALL)
    right.set_xticks((0, 1), ["all numbers\ntrained", "QLoRA"], fontsize=9)
    right.set(xlim=(-0.5, 1.5), ylabel="megabytes")
    right.set_title(f"QLoRA holds {sums[0] / sums[1]:.1f} times fewer bytes", fontsize=10)
    return figure
