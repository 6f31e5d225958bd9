"""The figure of notebook 08: which uses of a page are hits and which are faults, in a circle and back and forth."""

from tinylora.figures.style import COLOURS, canvas


def walks(traces, pages):
    """A row of pages for each number and a column for each use. traces: {name: [(page, "hit", "fault" or "evict")]} of whole steps"""
    figure, axes = canvas(9.2, 4.8, nrows=len(traces), sharex=True)
    for ax, (name, trace) in zip(axes, traces.items(), strict=True):
        uses = [(page, event) for page, event in trace if event != "evict"]
        faults = [(i, page) for i, (page, event) in enumerate(uses, 1) if event == "fault"]
        hits = [(i, page) for i, (page, event) in enumerate(uses, 1) if event == "hit"]
        ax.plot(*zip(*faults, strict=True), "x", color=COLOURS[2], ms=8, mew=2)
        if hits:
            ax.plot(*zip(*hits, strict=True), "o", color=COLOURS[0], ms=7)
        for edge in range(pages, len(uses), pages):
            ax.axvline(edge + 0.5, color="0.8", lw=1)
        for step in range(len(uses) // pages):
            ax.text(
                step * pages + (pages + 1) / 2, pages - 0.1, f"step {step + 1}", ha="center", fontsize=9, color="0.3"
            )
        ax.set_title(f"{name}, {len(faults)} of {len(uses)} uses are faults", fontsize=10, pad=22)
        ax.set(ylabel="page", ylim=(-0.6, pages - 0.4), yticks=range(pages), xlim=(0.4, len(uses) + 3))
        ax.annotate("× fault", (len(uses) + 1, 1), color=COLOURS[2], fontsize=10, va="center", annotation_clip=False)
        ax.annotate("● hit", (len(uses) + 1, 0), color=COLOURS[0], fontsize=10, va="center", annotation_clip=False)
    axes[-1].set(xlabel="use", xticks=[1, *range(pages, len(uses) + 1, pages)])
    return figure
