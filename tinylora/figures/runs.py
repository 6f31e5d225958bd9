"""Figures of training runs."""

import itertools

import numpy as np

from .style import COLOURS, SMALL, canvas, log_ticks


def comparison(reports):
    """Held-out bits per byte of each method (dots: seeds, bar: their mean) beside the bytes of weights, gradients and state. -> figure"""
    from ..training.finetune import METHODS

    names = [
        METHODS[m].label.replace(" + double quantization", "\n+ double quantization").replace(", ", ",\n", 1)
        for m in reports
    ]
    after = [[r.after for r in rs] for rs in reports.values()]
    figure, (left, right) = canvas(9, 3.6, ncols=2, width_ratios=[1.25, 1], sharey=True)
    y = np.arange(len(names))[::-1]
    for row, scores in zip(y, after, strict=True):
        left.plot([np.mean(scores)] * 2, [row - 0.3, row + 0.3], color=COLOURS[0], lw=3)
        left.plot(scores, [row] * len(scores), "o", color=COLOURS[0], ms=4.5, mec="white", mew=0.5)
        left.annotate(f"{np.mean(scores):.4f}", (max(scores), row), textcoords="offset points", xytext=(8, -3))
    left.margins(x=0.2)
    left.set_yticks(y, names)
    left.set_xlabel("held-out bits per byte after fine-tuning\n(bar: mean over seeds, dots: seeds)")
    start = np.zeros(len(names))
    for label, keys, look in _HELD:
        size = np.array([sum(rs[0].bytes[k] for k in keys) / 1e6 for rs in reports.values()])
        right.barh(y, size, left=start, height=0.6, label=label, edgecolor="white", lw=0.7, **look)
        start += size
    for row, total in zip(y, start, strict=True):
        right.annotate(f"{total:.1f}", (total, row), textcoords="offset points", xytext=(4, -3))
    right.set_xlabel("MB held beside the tape")
    right.margins(x=0.15)
    right.legend(frameon=False, loc="lower right", fontsize=9)
    return figure


#: Marks and dashes of the methods, one after another: no curve needs its colour.
_LINES = ("o-", "s--", "^:", "d-.")

#: What is held beside the tape: its name, its keys in a Report's bytes, and how its bars look.
_HELD = (
    ("weights", ("frozen weights", "trained weights"), {"color": "0.35"}),
    ("gradients", ("gradients",), {"color": "0.8", "hatch": "----"}),
    ("optimizer state", ("optimizer state",), {"color": COLOURS[1], "hatch": "\\\\\\\\"}),
)


def loss_curves(reports, title=None):
    """Held-out bits per byte against the step for each method: thin lines are seeds, the thick one their mean. -> figure

    reports: {method: [Report for each seed]} of runs with eval_every; the value before training is the first seed's.
    """
    from ..training.finetune import METHODS

    figure, (left, right) = canvas(9.2, 3.6, ncols=2, width_ratios=(1.7, 1))
    ends = {}
    for (method, rs), colour, line in zip(reports.items(), COLOURS, itertools.cycle(_LINES), strict=False):
        if not all(any(row.get("heldout") is not None for row in r.history) for r in rs):
            raise ValueError(
                f"loss curves: a run of {method} has no held-out evaluations; run it with --eval-every in a new folder"
            )
        rows = [[(row["step"], row["heldout"]) for row in r.history if row.get("heldout") is not None] for r in rs]
        steps = [step for step, _ in rows[0]]
        values = np.array([[value for _, value in r] for r in rows])
        if rs[0].before is not None:
            steps, values = [0, *steps], np.column_stack([np.full(len(rs), rs[0].before), values])
        ends[method] = values[:, -1]
        for curve in values:
            left.plot(steps, curve, color=colour, lw=0.8, alpha=0.5)
        left.plot(steps, values.mean(0), line, color=colour, lw=1.8, ms=5, mfc="white", label=METHODS[method].label)
        y = len(reports) - len(ends)
        right.plot(values[:, -1], [y] * len(rs), line[0], color=colour, ms=5, mec="white", mew=0.5)
        right.plot([values[:, -1].mean()] * 2, [y - 0.18, y + 0.18], color=colour, lw=2.5)
        right.annotate(
            f"{values[:, -1].mean():.4f}", (values[:, -1].mean(), y + 0.24), ha="center", fontsize=9, color=colour
        )
    left.legend(frameon=False, fontsize=8.5, handlelength=3)
    left.set(xlabel="step", ylabel="held-out bits per byte")
    right.set(
        ylim=(-0.6, len(ends) - 0.3), xlabel=f"held-out bits per byte after {steps[-1]} steps\n(dots: seeds, bar: mean)"
    )
    right.set_yticks(range(len(ends)), [METHODS[m].label.split(",")[0] for m in reversed(list(ends))])
    right.margins(x=0.25)
    names = list(ends)
    if len(names) == 2:
        gap = ends[names[0]] - ends[names[1]]
        one, other = (METHODS[m].label.split(",")[0] for m in names)
        said = f"{one} minus {other}: {gap.mean():+.4f}"
        right.set_title(f"{said} [{gap.min():+.4f} … {gap.max():+.4f}]" if len(gap) > 1 else said, fontsize=9.5)
    left.set_title(title or f"{len(next(iter(reports.values())))} seeds", fontsize=10)
    return figure


def rank_table(results):
    """Held-out bits per byte against r for each set of target layers, seeds as dots and their means as lines.

    results    {(targets, r): [bits per byte of each seed]}, for example ("q_proj, v_proj", 8); ValueError if it is empty
    """
    if not results:
        raise ValueError("rank_table: no results; expected {(targets, r): [bits per byte of each seed]}")
    figure, ax = canvas(5.6, 3.5)
    every = sorted({r for _, r in results})
    lines = {}
    for place, targets in enumerate(dict.fromkeys(targets for targets, _ in results)):
        colour, mark = COLOURS[(0, 2, 1, 3, 4)[place % 5]], _LINES[place % 4]
        ranks = sorted(r for t, r in results if t == targets)
        means = [float(np.mean(results[targets, r])) for r in ranks]
        shift = 1.03 ** (1 if place else -1)
        for r in ranks:
            dots = results[targets, r]
            ax.plot([r * shift] * len(dots), dots, mark[0], color=colour, ms=4, mec="white", mew=0.4, zorder=3)
        ax.plot(np.array(ranks) * shift, means, mark[1:], color=colour, lw=1.5)
        ax.annotate(targets, (ranks[-1], means[-1]), (0, 9), ha="right", color=colour, **SMALL)
        lines[targets] = (ranks, means)
    ax.set(xscale="log", xlabel="rank r of the adapters", ylabel="held-out bits per byte")
    log_ticks(ax, every)
    ax.margins(y=0.16)
    seeds = max(map(len, results.values()))
    gains = "; ".join(f"{means[0] - means[-1]:+.3f} ({targets})" for targets, (_, means) in lines.items())
    ax.set_title(f"Bits gained from r = {every[0]} to {every[-1]}: {gains}", fontsize=10)
    ax.text(0.01, 0.02, f"dots: {seeds} seeds; line: mean", transform=ax.transAxes, fontsize=8.5, color="0.35")
    return figure
