"""Figures of notebook 17: what AF4 costs against the block size, and where the codes that came after NF4 have their values."""

import numpy as np

from tinylora import codebooks
from tinylora.figures.style import COLOURS, canvas
from tinylora.numerics.optimality import expected_error, optimal_code

RELEASED = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # the block sizes for which AF4 was released


def _excess(code, blocksize):
    """E|X − q(X)| above that of the best code with −1, 0 and 1, in per cent."""
    best = optimal_code(blocksize, 1, of="normalized")
    cost, least = (expected_error(q, blocksize, 1, of="normalized") for q in (code, best))
    return 100 * (cost / least - 1)


def af4_against_blocksize():
    """E|X − q(X)| of NF4 and of AF4 as released, in per cent above the best code with −1, 0 and 1, for blocks of 32 to 4096."""
    sizes = [round(I) for I in np.geomspace(32, 4096, 29)]  # every fourth one is a released size
    nf4 = [_excess(codebooks.nf4(), I) for I in sizes]
    af4 = [_excess(codebooks.af4(I), I) for I in sizes]
    low, high = 512, 1024
    while high - low > 1:
        middle = (low + high) // 2
        ahead = _excess(codebooks.af4(middle), middle) < _excess(codebooks.nf4(), middle)
        low, high = (low, middle) if ahead else (middle, high)

    figure, ax = canvas(8, 3.6)
    ax.axhline(0, color="black", lw=1.5)
    ax.plot(sizes, nf4, color=COLOURS[0], lw=2)
    ax.plot(sizes, af4, color=COLOURS[2], lw=2, ls="--")
    ax.plot(RELEASED, af4[::4], "s", color=COLOURS[2], ms=5)
    ax.plot([high, high], [0, _excess(codebooks.nf4(), high)], color="0.5", lw=0.9, ls=":")
    ax.text(high, -0.25, f"{high}", fontsize=9, color="0.3", ha="center", va="top")
    ax.text(2000, 7.3, "NF4", fontsize=10, color=COLOURS[0], ha="right")
    ax.text(4096, 3.75, "AF4 as released", fontsize=10, color=COLOURS[2], ha="right")
    ax.text(4096, 0.25, "medians, all boundaries half-way", fontsize=10, ha="right")
    at = sizes.index(64)
    for value, above in ((af4[at], 7), (nf4[at], 6)):
        ax.annotate(f"{value:.2f} %", (64, value), (0, above), textcoords="offset points", ha="center", fontsize=9)
    ax.set_xscale("log", base=2)
    ax.set_xticks(RELEASED, [str(I) for I in RELEASED])
    ax.set_ylim(-0.9, 10.6)
    ax.set_xlabel("block size I (weights)")
    ax.set_ylabel("E|X − q(X)| above the\nbest pinned code (per cent)")
    ax.set_title(f"AF4 as released: {af4[at]:.1f} % above the optimum at 64; ahead of NF4 from {high} on", fontsize=11)
    return figure


def code_values(blocksize=64):
    """The 16 values of seven codes as rows of ticks, with their squared and absolute error for normal weights at the right."""
    I = blocksize
    rows = [
        ("NF4", codebooks.nf4(), False),
        ("AF4 as released", codebooks.af4(I), False),
        ("AF4, boundaries half-way", optimal_code(I, 1, of="normalized"), False),
        ("BOF4 (MAE)", codebooks.bof4(I, "mae"), False),
        ("BOF4 (MSE)", codebooks.bof4(I, "mse"), False),
        ("BOF4-S (MSE)", codebooks.bof4(I, "mse", True), True),
        ("no pins (MSE)", optimal_code(I, 2, pins=None), False),
    ]
    figure, ax = canvas(8, 3.6)
    best = {p: min(expected_error(q, I, p, s) for _, q, s in rows) for p in (1, 2)}
    for y, (name, q, signed) in zip(range(len(rows))[::-1], rows, strict=True):
        ax.plot([-1, 1], [y, y], color="0.85", lw=1, zorder=0)
        pins = np.isin(q, (-1, 0, 1))
        ax.vlines(q[~pins], y - 0.3, y + 0.3, color=COLOURS[2] if name == "AF4 as released" else COLOURS[0], lw=2)
        ax.vlines(q[pins], y - 0.3, y + 0.3, color="black", lw=2)
        for x, p in ((1.24, 2), (1.56, 1)):
            cost = expected_error(q, I, p, signed)
            weight = "bold" if cost == best[p] else "normal"
            ax.text(x, y, f"{cost:.6f}"[1:], fontsize=9, ha="center", va="center", weight=weight)
    top = len(rows) - 0.2
    ax.text(1.24, top, "MSE (σ²)", fontsize=9, ha="center")
    ax.text(1.56, top, "MAE (σ)", fontsize=9, ha="center")
    near = [f"{below:.4f} and {above:.4f}".replace("0.", ".") for _, q, _ in rows[:2] for below, above in [q[[6, 8]]]]
    title = f"Blocks of {I}: the neighbours of 0 are {near[1]} in AF4 as released, {near[0]} in NF4"
    ax.set_title(title.replace("-.", "−."), fontsize=10, x=0.45)
    ax.set_yticks(range(len(rows))[::-1], [name for name, _, _ in rows])
    ax.set_xticks(np.linspace(-1, 1, 9))
    ax.set_xlim(-1.04, 1.72)
    ax.set_ylim(-0.6, len(rows) + 0.2)
    ax.spines["bottom"].set_bounds(-1, 1)
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("code value, in units of the block's largest magnitude (black: −1, 0 and 1)", x=0.377)
    return figure
