"""The figure of notebook 02: the gradients that four walks give, and the pullbacks that they call."""

from tinylora.figures.style import COLOURS, SMALL, canvas


def four_walks(found):
    """Left: the graph b = a + a; c = b + b with b̄ and ā of each walk. Right: pullbacks called against doublings.

    found   {walk: [([gradient of each value, the first one's first], pullbacks called) for 1, 2, … doublings]}
    """
    figure, (left, right) = canvas(9.2, 3.6, ncols=2, width_ratios=(1.25, 1))
    heights = {"c": 2, "b": 1, "a": 0}
    for name, y in heights.items():
        left.text(0, y, name, ha="center", va="center", fontsize=12, bbox={"boxstyle": "circle", "fc": "white"})
    for top in (2, 1):
        for bend in (-0.35, 0.35):  # both inputs of a sum are the same value
            style = {"arrowstyle": "->", "connectionstyle": f"arc3,rad={bend}", "color": "0.4"}
            left.annotate("", (0, top - 0.78), (0, top - 0.22), arrowprops=style)
    for column, (walk, rows) in enumerate(found.items(), 1):
        left.text(column, 2.55, walk, ha="center", fontsize=9.5)
        for y, g, right_one in zip(heights.values(), rows[1][0][::-1], (1, 2, 4), strict=True):
            label, colour = (f"{g:g}", "0.1") if g == right_one else (f"{g:g}  wrong", COLOURS[2])
            left.text(column, y, label, ha="center", va="center", fontsize=11, color=colour)
    left.text(0, 2.55, "value", ha="center", fontsize=9.5)
    left.set(xlim=(-0.5, 4.6), ylim=(-0.4, 2.75))
    left.set_axis_off()
    wrong = [walk for walk, rows in found.items() if rows[1][0][0] != 4]
    left.set_title(f"c = 4a: {len(wrong)} of the 4 walks give a wrong gradient of a", fontsize=10)

    doublings = range(1, len(found["one path"]) + 1)
    for walk, label, mark, line, colour, at in (
        ("one path", "each of the three recursions", "s", "--", COLOURS[2], 8),
        ("section 2", "the walk of section 2", "o", "-", COLOURS[0], 12),
    ):
        calls = [row[1] for row in found[walk]]
        right.plot(doublings, calls, mark + line, color=colour, ms=4.5, lw=1.3)
        right.annotate(f"{calls[9]:,}", (10, calls[9]), (4, -15), ha="left", color=colour, **SMALL)
        right.annotate(label, (at, calls[at - 1]), (-4, 8), ha="right", color=colour, **SMALL)
    few, many = (found[walk][9][1] for walk in ("section 2", "one path"))
    right.set(yscale="log", xlabel="doublings", ylabel="pullbacks called", ylim=(1.2, 2e4))
    right.set_xticks(range(2, 13, 2))
    right.set_title(f"Ten doublings: {many:,} pullbacks against {few}", fontsize=10)
    return figure
