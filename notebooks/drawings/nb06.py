"""Figure of notebook 06: the constants before and after their mean is subtracted, and what four 8-bit codes cost."""

import numpy as np

from tinylora.figures.style import COLOURS, canvas

BLUE, RED, GREY = COLOURS[0], COLOURS[2], "0.35"
NAMES = {"int8": "Int8", "dynamic8": "dynamic map", "fp8_e4m3": "E4M3", "fp8_e5m2": "E5M2"}


def constants_and_errors(absmax, costs):
    """Left: the quotients that are coded, without and with the mean, above E4M3's values. Right: the cost of each code. -> figure

    absmax   (blocks,) float32, whole blocks of 256
    costs    {code: (added squared error with the mean, without)}, relative to exact constants
    """
    from tinylora import codebooks

    figure, (left, right) = canvas(9.6, 3.7, ncols=2, width_ratios=[1.2, 1])
    bins = np.linspace(-1, 1, 101)
    for values, colour, style, hatch, text, at in (
        (absmax, RED, "-", "///", "not subtracted, $m_b / n_j$:\nmean {:.2f}", (-0.35, 3.3)),
        (
            absmax - absmax.mean(),
            BLUE,
            "--",
            None,
            "mean subtracted, $(m_b - \\mu) / n_j$:\nmean magnitude {:.2f}",
            (-0.98, 1.75),
        ),
    ):
        rows = values.reshape(-1, 256)
        x = (rows / np.abs(rows).max(axis=1, keepdims=True)).reshape(-1)
        share = np.histogram(x, bins, density=True)[0]
        left.stairs(share, bins, fill=True, color=colour, alpha=0.18, hatch=hatch)
        left.stairs(share, bins, color=colour, ls=style, lw=1.5)
        left.text(*at, text.format(np.abs(x).mean()), color=colour, fontsize=9, ha="left")
    e4m3 = codebooks.get_nested("fp8_e4m3")
    left.vlines(e4m3, -0.72, -0.25, color=GREY, lw=0.6)
    left.axhline(0, color="0.25", lw=0.8)
    for at in (0.22, 0.63):
        i = np.searchsorted(e4m3, at)
        left.text(at, -0.82, f"step {e4m3[i] - e4m3[i - 1]:.3f}", fontsize=8.5, color=GREY, ha="center", va="top")
    left.text(-0.98, -0.82, "values of E4M3", fontsize=8.5, color=GREY, va="top")
    left.set_ylim(-1.3, 4.4)
    left.set_xlim(-1.02, 1.08)
    left.set_yticks((0, 1, 2, 3, 4))
    left.set_ylabel("density", y=0.6)
    left.set_xlabel("quotient that is stored in 8 bits")
    left.set_title("Around the mean, the quotients lie where E4M3 is 4 times finer", fontsize=10)

    label = {"textcoords": "offset points", "fontsize": 9, "ha": "center"}
    for y, name in enumerate(NAMES):
        with_mean, without = (100 * c for c in costs[name])
        right.plot((with_mean, without), (y, y), "-", color="0.7", lw=1.5, zorder=1)
        for value, marker, fill, colour in ((with_mean, "o", BLUE, BLUE), (without, "s", "white", RED)):
            right.plot(value, y, marker, mfc=fill, mec=colour, mew=1.5, ms=7, zorder=2)
            right.annotate(f"{value:#.2g} %".replace(". ", " "), (value, y), xytext=(0, 8), color=colour, **label)
    y = len(NAMES) - 1
    with_mean, without = (100 * c for c in costs["fp8_e5m2"])
    right.annotate("mean subtracted", (with_mean, y), xytext=(0, 22), color=BLUE, **label)
    right.annotate("not subtracted", (without, y), xytext=(0, 22), color=RED, **label)
    right.set_yticks(range(len(NAMES)), NAMES.values())
    right.set_ylim(-0.4, y + 0.9)
    right.set_xscale("log")
    right.set_xlim(0.01, 120)
    right.set_xticks((0.01, 0.1, 1, 10, 100), ("0.01 %", "0.1 %", "1 %", "10 %", "100 %"))
    right.minorticks_off()
    right.set_xlabel("squared error added by 8-bit constants")
    with_mean, without = costs["fp8_e4m3"]
    right.set_title(f"Subtracting the mean cuts E4M3's cost {without / with_mean:.0f} times", fontsize=10)
    return figure
