"""The figure of notebook 21: the bytes that dequantizing moves, step by step, as one kernel and as a chain of array operations."""

from tinylora.figures.style import COLOURS, canvas

BLUE, GREEN, RED, ORANGE, VIOLET, BROWN = COLOURS
_STEPS = {  # step: its colour and hatch
    "indices": (BLUE, "//"),
    "constants": ("0.25", ""),
    "results": (GREEN, ""),
    "restore the constants": ("0.25", ""),
    "look up two weights a byte": (BLUE, "//"),
    "times the constant": (GREEN, ""),
    "copy": (VIOLET, ".."),
    "is one of them NaN?": (BROWN, "xx"),
    "round to bfloat16": (RED, "\\\\"),
}


def _look(step):
    colour, hatch = _STEPS[step]
    return {"color": colour, "hatch": hatch, "alpha": 0.85, "edgecolor": "white", "lw": 0.7}


def bytes_by_step(ways):
    """A bar a way, stacked by step. ways {way: {step: bytes moved a weight}}, the first one being what must be moved."""
    figure, ax = canvas(9.2, 3.3)
    total = {way: sum(steps.values()) for way, steps in ways.items()}
    most, least = max(total.values()), next(iter(total.values()))
    for y, (way, steps) in enumerate(ways.items()):
        left = 0
        for step, amount in steps.items():
            ax.barh(y, amount, left=left, height=0.56, **_look(step))
            if amount > most / 30:
                inside = {"ha": "center", "va": "center", "fontsize": 8.5, "color": "white"}
                inside["bbox"] = {"boxstyle": "round,pad=0.15", "fc": _STEPS[step][0], "ec": "none"}
                ax.text(left + amount / 2, y, f"{amount:.1f}".removesuffix(".0"), **inside)
            left += amount
        ax.text(left + most / 90, y, f"{total[way]:#.3g}", va="center", fontsize=9.5, weight="bold")
    (first, small), last = next(iter(ways.items())), list(ways)[-1]
    told = ", ".join(f"{step} {amount:.2g}" for step, amount in small.items())
    ax.text(total[first] + most / 13, 0, told, va="center", fontsize=8.5, color="0.35")
    for step in ways[last]:
        ax.barh(0, 0, label=step, **_look(step))
    ax.legend(
        frameon=False, fontsize=8.5, loc="center right", bbox_to_anchor=(1.0, 0.62), handlelength=1.2, labelspacing=0.3
    )
    ax.set_yticks(range(len(ways)), [way.replace(", ", "\n") for way in ways])
    ax.set(xlim=(0, most * 1.08), ylim=(len(ways) - 0.5, -0.5))
    ax.set_xlabel("bytes read and written, a weight")
    ax.set_title(
        f"Array operations move {most / least:.0f} times the bytes of one kernel, for the same bits", fontsize=10
    )
    return figure
