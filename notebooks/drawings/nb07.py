"""The figure of notebook 07: how wrong a gradient is, block by block, if the backward pass takes another weight than the forward pass."""

import numpy as np

from tinylora.figures.style import COLOURS, canvas

STYLES = {
    "W": (COLOURS[2], "^", "ȳ W"),
    "bfloat16(Ŵ)": (COLOURS[1], "s", "ȳ bfloat16(Ŵ)"),
    "Ŵ": (COLOURS[0], "o", "ȳ Ŵ"),
}


def gradient_by_depth(off):
    """Error of the gradient of each block's B, as finite differences tell it, against the block.

    off   {"Ŵ", "bfloat16(Ŵ)" and "W": errors by block, the bottom one first}: |⟨claimed, v⟩ − difference| / ‖gradient‖
    """
    figure, ax = canvas(8.4, 3.6)
    blocks = np.arange(1, len(off["W"]) + 1)
    small = {"textcoords": "offset points", "fontsize": 9}
    for name, (colour, mark, label) in STYLES.items():
        ax.plot(blocks, off[name], "-", marker=mark, color=colour, ms=6.5, mec="white", mew=0.6, lw=1.4)
        ax.annotate(
            label, (1, off[name][0]), (14, -4), va="center", color=colour, textcoords="offset points", fontsize=10
        )
        for block, error in zip(blocks, off[name], strict=True):
            told = f"{100 * error:.{1 if name == 'W' else 2}f} %" if max(off[name]) > 1e-4 else f"{error:.0e}"
            ax.annotate(told, (block, error), (0, 8), ha="center", color=colour, **small)
    ax.set(yscale="log", xlim=(len(blocks) + 0.4, -0.05), ylim=(5e-11, 3))
    ax.set_xticks(blocks, [f"{b}" for b in blocks])
    ax.set_xlabel("block (5 is next to the loss; the gradient travels from left to right)")
    ax.set_ylabel("error of the gradient of B\nover its norm")
    low, high = min(off["W"]), max(off["W"])
    ax.set_title(
        f"The measured slope agrees with Ŵ; with W the gradient is wrong by {100 * low:.1f} to {100 * high:.1f} %",
        fontsize=10,
    )
    return figure
