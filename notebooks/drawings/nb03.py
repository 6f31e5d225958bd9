"""The figure of notebook 03: what the bypass costs in multiply-adds, and what one layer's step holds."""

import numpy as np

from tinylora import backend
from tinylora.costs import flops
from tinylora.figures.style import COLOURS, SMALL, canvas
from tinylora.lora import LoRALinear
from tinylora.nn import Linear
from tinylora.optim import AdamW
from tinylora.tape import tape_bytes
from tinylora.tensor import Tensor


def _ones(shape, **options):
    return Tensor(np.ones(shape, np.float32), **options)


def _multiply_adds(layer, n, kind):
    """Multiply-adds of one token through a layer of width n: "both" passes, both without x̄ ("first"), or the "forward" alone."""
    with flops.counting() as count:
        y = layer(_ones((1, n), requires_grad=kind == "both"))
        if kind != "forward":
            y.backward(np.ones((1, n), np.float32))
    return count.multiply_adds


def _held(layer, n, tokens):
    """(tape, gradients, m and v) in bytes for a step over so many tokens in which x needs a gradient."""
    y = layer(_ones((tokens, n), requires_grad=True))
    tape = tape_bytes(y, exclude=layer.parameters())
    y.backward(np.ones((tokens, n), np.float32))
    trained = [p for _, p in layer.trainable()]
    return tape, sum(p.grad.nbytes for p in trained), AdamW(trained, lr=0.1).state_bytes


def bypass_costs(n=256, tokens=64, r=8, ranks=(1, 2, 4, 8, 16, 32, 64, 128)):
    """Left: LoRA's multiply-adds over full fine-tuning's against r, counted (marks) and by formula (lines). Right: bytes of one step."""
    figure, (left, right) = canvas(9.2, 3.7, ncols=2, width_ratios=(1.5, 1))
    with backend.using_generator(np.random.default_rng(0)):
        full, adapted = Linear(n, n), {rank: LoRALinear(Linear(n, n), r=rank) for rank in ranks}
    lines = np.geomspace(ranks[0], ranks[-1], 200)
    for kind, label, colour, mark, formula, shift in (
        ("forward", "forward alone", "0.35", "^", 1 + 2 * lines / n, (0, 8)),
        ("both", "forward and backward", COLOURS[0], "o", 2 / 3 + 2 * lines / n, (-4, 8)),
        ("first", "the same without x̄", COLOURS[2], "s", 1 / 2 + 5 * lines / (2 * n), (0, -20)),
    ):
        of_full = _multiply_adds(full, n, kind)
        found = [_multiply_adds(layer, n, kind) / of_full for layer in adapted.values()]
        left.plot(lines, formula, "-", color=colour, lw=1.3, zorder=1)
        left.plot(ranks, found, mark, color=colour, ms=5, mec="white", mew=0.4)
        left.annotate(label, (ranks[2], found[2]), shift, ha="center", color=colour, **SMALL)
    left.axhline(1, color="0.6", lw=0.9, ls=":", zorder=0)
    left.plot([n / 6, n / 6], [0.3, 1], "--", color=COLOURS[0], lw=0.9)
    left.annotate(f"r = N/6 = {n / 6:.1f}", (n / 6, 0.35), (5, 0), color=COLOURS[0], **SMALL)
    left.set(xscale="log", ylim=(0.3, 2.05), xlabel="rank r", ylabel="LoRA's multiply-adds\nover full fine-tuning's")
    left.set_xticks(ranks, [f"{rank}" for rank in ranks])
    left.minorticks_off()
    low = _multiply_adds(adapted[r], n, "both") / _multiply_adds(full, n, "both")
    left.set_title(f"N = {n}: at r = {r} LoRA makes {low:.3f} of the multiply-adds", fontsize=10)

    bars = [_held(layer, n, tokens) for layer in (full, adapted[r])]
    bottom = np.zeros(2)
    parts = (("tape", COLOURS[0], "white"), ("gradients", "0.72", "0.1"), ("m and v", "0.88", "0.1"))
    for i, (label, colour, ink) in enumerate(parts):
        heights = np.array([bar[i] for bar in bars]) / 1000
        right.bar((0, 1), heights, 0.76, bottom=bottom, color=colour, edgecolor="white", lw=0.8)
        at = (0, bottom[0] + heights[0] / 2)
        right.text(*at, f"{label} {heights[0]:,.1f}", ha="center", va="center", color=ink, fontsize=8.5)
        bottom += heights
    said = "\n".join(f"{part[0]} {size / 1000:,.1f}" for part, size in reversed(list(zip(parts, bars[1], strict=True))))
    right.annotate(said, (1, bottom[1]), (0, 4), ha="center", color="0.2", **SMALL)
    right.set_xticks((0, 1), ["full", f"LoRA, r = {r}"], fontsize=9)
    right.set(xlim=(-0.5, 1.5), ylabel=f"kilobytes for {tokens} tokens,\nbeside the weights")
    tape, rest = bars[1][0] / bars[0][0], sum(bars[0][1:]) / sum(bars[1][1:])
    right.set_title(f"The tape grows × {tape:.3f}, the rest shrinks ÷ {rest:.0f}", fontsize=10)
    return figure
