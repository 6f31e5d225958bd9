"""The figures of the benchmark, from the numbers that `python -m tests.bench` wrote to figures/data.

ratios    time over the peer's, row by row, with what was asked for
growth    time and memory of a QLoRA step against its FLOPs and its bytes
"""

from .style import COLOURS, SMALL, canvas, log_ticks

NOISY = "other work ran beside: no number here is to be quoted"
_MARKS = "oDs^v"  # of the checkouts, the first filled


def ratios(data):
    """Dots for the time over the peer's or over another of tinylora's own, less is better; whiskers are quartiles. -> figure

    Each row is shown for the largest number of threads it was run with. data: the content of data/bench.json
    """
    rows = [(found, line) for found in _most_threads(data["rows"]) for line in found["lines"]
            if line["kind"] == "ratio" and not line["more"] and any(line["values"].values())]  # fmt: skip
    figure, ax = canvas(7.5, 1.6 + 0.34 * len(rows))
    for y, (_, line) in enumerate(rows):
        for i, version in enumerate(data["versions"]):
            if line["values"][version] is None:
                continue
            low, middle, high = line["values"][version]
            colour, at = COLOURS[i % len(COLOURS)], y + 0.16 * i
            ax.plot([low, high], [at, at], color=colour, lw=1.6)
            ax.plot(middle, at, _MARKS[i % len(_MARKS)], color=colour, mfc="white" if i else colour, ms=5.5)
        for bound, mark in (("must", "|"), ("aim", "<")):
            if line[bound] is not None:
                ax.plot(line[bound], y, mark, color="0.2", ms=9 if bound == "must" else 5, mfc="none", zorder=1)
        ax.annotate(_said(rows[y]), (0, y), (2, 4), xycoords=("axes fraction", "data"), va="bottom", **SMALL)
    ax.axvline(1, color="0.5", lw=0.9, ls=":")
    for i, version in enumerate(data["versions"]):
        ax.plot(
            [], [], _MARKS[i % len(_MARKS)], color=COLOURS[i % len(COLOURS)], mfc="white" if i else None, label=version
        )
    ax.plot([], [], "|", color="0.2", ms=9, label="must")
    ax.plot([], [], "<", color="0.2", mfc="none", ms=5, label="aim")
    ax.legend(frameon=False, fontsize=8.5, ncols=2 + len(data["versions"]), loc="upper left")
    shown = [v for _, line in rows for values in line["values"].values() if values for v in values]
    shown += [line[b] for _, line in rows for b in ("must", "aim") if line[b]]
    ax.set_xscale("log")
    ticks = [t for t in (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100) if 0.5 * min(shown) <= t <= 2 * max(shown)]
    log_ticks(ax, ticks)
    ax.set(ylim=(len(rows) - 0.4, -2), yticks=[], xlabel="time over the other's (left of 1: faster)")
    asked = [line for _, line in rows if line["reached"]]
    reached = sum(line["reached"] != "no" for line in asked)
    if data["noisy"]:
        ax.set_title(NOISY, fontsize=10)
        return figure
    ax.set_title(f"{reached} of these {len(asked)} targets reached on {data['about']['CPU'].partition(' (')[0]}, {data['about']['date']}",
                 fontsize=10)  # fmt: skip
    return figure


def _most_threads(rows):
    """The entry of each case with the largest number of threads."""
    best = {}
    for found in rows:
        key = found["row"], found["case"]
        if key not in best or best[key]["threads"] < found["threads"]:
            best[key] = found
    return list(best.values())


def _said(row):
    """The words above a dot: the row, its case, and over whom."""
    found, line = row
    threads = "" if found["threads"] == 2 else f", {found['threads']} thread{'s' * (found['threads'] > 1)}"
    return f"{found['row']}, {found['case']}{threads}: {line['name'].removeprefix('tinylora ')}"


def growth(data):
    """Left: seconds of a step against its FLOPs, with the rate of bare products. Right: bytes, measured against predicted. -> figure

    Both on logarithmic axes, for the largest number of threads. data: the content of data/growth.json
    """
    figure, (left, right) = canvas(9.2, 3.9, ncols=2)
    steps = [(found, c) for found in _most_threads(data["rows"]) for c in found["contestants"]
             if c["version"] == data["versions"][0] and c["seconds"]]  # fmt: skip
    most = max(found["threads"] for found in data["rows"])
    floors = [c["facts"]["flops"] / c["seconds"][1] for found in data["rows"] for c in found["contestants"]
              if c["name"] == "sgemm" and c["seconds"] and c["threads"] == most]  # fmt: skip
    rate = sorted(floors)[len(floors) // 2]
    kinds = {"d": ("width d, 2 × 256 tokens", "o", COLOURS[0]), "c": ("context, 2,048 tokens", "s", COLOURS[2])}
    for kind, (name, mark, colour) in kinds.items():
        some = [(found, c) for found, c in steps if found["case"][0] == kind]
        flops, times = [c["facts"]["flops"] for _, c in some], [c["seconds"][1] for _, c in some]
        left.plot(flops, times, mark, color=colour, label=name)
        predicted, measured = [c["facts"]["bytes"] for _, c in some], [c["peak"] - c["held"] for _, c in some]
        right.plot(predicted, measured, mark, color=colour, label=name)
        named = [*zip(some, zip(flops, times, strict=True), strict=True)]
        for (found, _), at in named if kind == "d" else named[:: max(len(some) - 1, 1)]:  # contexts lie close together
            shift = {"xytext": (6, -9 if kind == "d" else -3)}
            if kind == "c" and at[0] == min(flops):
                shift = {"xytext": (-6, -3), "ha": "right"}
            left.annotate(found["case"].rpartition(" ")[2], at, **shift, **SMALL)
    everything = sorted(c["facts"]["flops"] for _, c in steps)
    ends = [everything[0], everything[-1]]
    left.plot(ends, [e / rate for e in ends], color="0.5", ls="--", lw=1, label="bare products")
    both = sorted(c["facts"]["bytes"] for _, c in steps)
    right.plot([both[0], both[-1]], [both[0], both[-1]], color="0.5", ls="--", lw=1, label="as predicted")
    for ax in (left, right):
        ax.set(xscale="log", yscale="log")
        ax.tick_params(which="minor", labelbottom=False, labelleft=False)
        ax.legend(frameon=False, fontsize=8.5, loc="upper left")
    left.set(xlabel="FLOPs of a step's products", ylabel="seconds")
    right.set(xlabel="bytes predicted", ylabel="bytes measured")
    found, largest = max(steps, key=lambda pair: pair[1]["facts"]["flops"])
    floor = next((c for c in found["contestants"] if c["name"] == "sgemm" and c["seconds"]), None)
    # against the products of the same rounds, as in the table
    beside = rate if floor is None else floor["facts"]["flops"] / floor["seconds"][1]
    share = largest["facts"]["flops"] / largest["seconds"][1] / beside
    left.set_title(
        NOISY if data["noisy"] else f"{share:.2f} of the bare products' rate at the largest step", fontsize=10
    )
    over = (largest["peak"] - largest["held"]) / largest["facts"]["bytes"]
    right.set_title(f"{over:.2f} times the predicted bytes at the largest", fontsize=10)
    return figure
