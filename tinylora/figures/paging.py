"""Paged optimizer state: the timeline of a run, and what a budget costs."""

import itertools

import numpy as np

from .style import COLOURS, SMALL, canvas

_MARKS = (("fault", COLOURS[2]), ("prefetch", COLOURS[0]), ("evict", "0.35"))


def timeline(trace, budget=None, title=None, tape=None, room=None):
    """Resident bytes, and faults, prefetches and evictions a step, from a Pager's trace. [(step, page, event, bytes)] -> figure

    The upper panel follows the trace event by event within each step; the lower one adds the bytes up. tape: {step: bytes} that the
    forward pass of a step held beside the pages, before its update; room: bytes that there are for both. With them, pages that were
    evicted before the first use of a step went to make room for its tape, and where it would have stood otherwise is outlined.
    """
    steps = np.array([row[0] for row in trace])
    if not len(steps):
        raise ValueError("timeline: the trace is empty; was the pager made with trace=True and a budget?")
    first, last = int(steps.min()), int(steps.max())
    bounds = np.searchsorted(steps, np.arange(first, last + 2))
    sign = {"fault": 1, "prefetch": 1, "evict": -1, "hit": 0}
    change = np.array([sign[row[2]] * row[3] for row in trace])
    resident = np.cumsum(change)
    # an event's place in time: its step, and its share of the step's events
    begin, place = 0.0 if tape is None else 0.4, []
    yielded = {}  # step -> events before its forward pass could run
    for s, (a, b) in zip(range(first, last + 1), itertools.pairwise(bounds), strict=True):
        n = 0 if tape is None else next((i for i in range(b - a) if trace[a + i][2] != "evict"), b - a)
        yielded[s] = n if n > 1 else 0
        rest = b - a - yielded[s]
        place += [s + 0.02] * yielded[s] + [s + begin + (1 - begin) * i / max(rest, 1) for i in range(rest)]
    figure, (top, below) = canvas(9.2, 4.6, nrows=2, height_ratios=(1.25, 1) if tape is None else (1.7, 1), sharex=True)
    unit, name = _unit(max(resident.max(), budget or 0))
    ends = [*place, last + 1], [*(resident / unit), resident[-1] / unit]
    top.fill_between(*ends, step="post", color=COLOURS[0], alpha=0.25, lw=0)
    top.plot(*ends, drawstyle="steps-post", color=COLOURS[0], lw=1)
    if tape is not None:
        _beside(
            top,
            tape,
            room,
            unit,
            name,
            {s: [0, *resident][a] for s, a in zip(yielded, bounds, strict=False)},
            {s: [0, *resident][a + yielded[s]] for s, a in zip(yielded, bounds, strict=False)},
        )
        top.annotate(
            "pages",
            (last + 0.7, resident[-1] / unit),
            (0, -13),
            ha="center",
            **SMALL,
            color=COLOURS[0],
        )
    elif budget is not None and budget < 1.6 * resident.max():
        top.axhline(budget / unit, color="0.35", ls="--", lw=1)
        top.annotate(
            f"budget {budget / unit:.2f} {name}",
            (place[0], budget / unit),
            (2, 3),
            **SMALL,
        )
    top.set(ylabel=f"{'resident' if tape is None else 'held'}, {name}", ylim=(0, None))
    wide = 0.27
    sums = {
        event: np.array([sum(row[3] for row in trace[a:b] if row[2] == event) for a, b in itertools.pairwise(bounds)])
        for event, _ in _MARKS
    }
    drawn = [mark for mark in _MARKS if sums[mark[0]].any()]
    for i, (event, colour) in enumerate(drawn):
        x = np.arange(first, last + 1) + 0.5 + wide * (i - (len(drawn) - 1) / 2)
        label = {"evict": "evicted", "fault": "faults", "prefetch": "prefetched"}[event]
        below.bar(x, sums[event] / unit, wide, color=colour, label=label)
    below.set(
        ylabel=f"{name} a step",
        xlabel="step",
        xlim=(first, last + 1),
        ylim=(0, 1.25 * max(s.max() for s in sums.values()) / unit or 1),
    )
    below.legend(frameon=False, fontsize=8.5, ncols=3, loc="upper right")
    if last - first < 25:
        below.set_xticks(np.arange(first, last + 1) + 0.5, [str(s) for s in range(first, last + 1)])
        below.tick_params(axis="x", length=0)
    moved = sum(s.sum() for s in sums.values())
    hits = sum(row[2] == "hit" for row in trace)
    uses = hits + sum(row[2] == "fault" for row in trace)
    said = f"{moved / unit:,.1f} {name} moved in {last - first + 1} steps; {hits:,} of {uses:,} uses found their page resident"
    top.set_title(f"{title}: {said}" if title else said, fontsize=10)
    return figure


def _beside(ax, tape, room, unit, name, before, after):
    """The tape of each step on top of the pages: `before` the pages that were resident when it was wanted, `after` those that stayed."""
    for s, nbytes in tape.items():
        ax.bar(s + 0.05, nbytes / unit, 0.3, after[s] / unit, align="edge", color=COLOURS[3], alpha=0.75, lw=0)
        if before[s] > after[s]:
            ax.bar(s + 0.05, nbytes / unit, 0.3, before[s] / unit, align="edge", fill=False, ec="0.2", ls=":", lw=1.1)
            ax.annotate(
                f"beside the resident pages: {(nbytes + before[s]) / unit:.1f} {name}",
                (s + 0.38, (nbytes + before[s]) / unit),
                (2, -9),
                **SMALL,
            )
    s = min(s for s in tape if before[s] == max(before[s] for s in tape))
    ax.annotate(
        f"tape, {tape[s] / unit:.1f} {name}",
        (s + 0.05, (after[s] + tape[s]) / unit),
        (0, 3),
        ha="left",
        **SMALL,
        color=COLOURS[3],
    )
    if room is not None:
        ax.axhline(room / unit, color="0.2", lw=1.1)
        ax.annotate(
            f"room for both: {room / unit:.0f} {name}",
            (min(tape), room / unit),
            (3, 3),
            **SMALL,
        )


def _unit(nbytes):
    return (1e6, "MB") if nbytes >= 1e6 else (1e3, "kB")


def paging_costs(costs, state, title=None):
    """Left: bytes moved a step against the budget. Right: time over the optimizer without one. `costs` from costs.paging.measure"""
    figure, (left, right) = canvas(9.2, 3.7, ncols=2)
    styles = {"around": (COLOURS[2], "s"), "back and forth": (COLOURS[0], "o")}
    for order, (colour, mark) in styles.items():
        for ahead in (False, True):
            rows = sorted((c for c in costs if (c.order, c.prefetch) == (order, ahead)), key=lambda c: c.fraction)
            if not rows:
                continue
            x = [100 * c.fraction for c in rows]
            line = {
                "color": colour,
                "marker": mark,
                "ms": 5,
                "mfc": colour if ahead else "white",
                "ls": "-" if ahead else "--",
                "lw": 1.3,
            }
            if not ahead:
                left.plot(x, [c.bytes_moved / state for c in rows], **{**line, "ls": "-", "mfc": colour})
            right.plot(x, [c.time_ratio for c in rows], **line)
    ends = {order: [c for c in costs if c.order == order and not c.prefetch] for order in styles}
    for order, rows in ends.items():
        middle = min(rows, key=lambda c: abs(c.fraction - 0.5))
        shift = (0, -16) if order == "around" else (-8, -18)
        left.annotate(
            f"{order}: {middle.bytes_moved / state:.2f}", (100 * middle.fraction, middle.bytes_moved / state), shift,
            textcoords="offset points", ha="center" if order == "around" else "right", color=styles[order][0], fontsize=9,
        )  # fmt: skip
    left.set(xlabel="budget, % of the state", ylabel="bytes moved a step / state", ylim=(-0.08, 2.2), xlim=(0, 104))
    right.axhline(1, color="0.6", lw=0.9, ls=":")
    right.set(
        xlabel="budget, % of the state", ylabel="time / optimizer without a budget", xlim=(0, 104), ylim=(0, None)
    )
    right.annotate("filled: the next page is brought meanwhile\nopen: brought when it is needed", (2, 0), (4, 8),
                   **SMALL, color="0.25")  # fmt: skip
    worst = max(costs, key=lambda c: c.time_ratio)
    left.set_title(title or "the same bits at every budget", fontsize=10)
    right.set_title(f"at most {worst.time_ratio:.2f} times, at {100 * worst.fraction:.0f} %", fontsize=10)
    return figure
