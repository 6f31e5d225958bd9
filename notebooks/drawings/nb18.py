"""Figure of notebook 18: what 4-bit formats cost at equal block size, and at equal bits a weight."""

import numpy as np

from tinylora.figures.style import COLOURS, canvas

BLOCKS = tuple(2**i for i in range(3, 11))  # 8 … 1024
BLUE, GREEN, RED, GREY = COLOURS[0], COLOURS[1], COLOURS[2], "0.45"


def _whole_zero_error(w, blocksize):
    """Mean squared error of affine integers whose zero point is one of the 16 integers."""
    x = w[: len(w) // blocksize * blocksize].reshape(-1, blocksize)
    low, high = np.minimum(x.min(axis=1, keepdims=True), 0), np.maximum(x.max(axis=1, keepdims=True), 0)
    step = (high - low) / 15
    zero = np.rint(-low / step)
    return np.square((np.clip(np.rint(x / step) + zero, 0, 15) - zero) * step - x).mean()


def _double_quantized_error(w, blocksize):
    """E(W − Ŵ)² of NF4 by quadrature, times what double quantization adds on drawn weights."""
    from tinylora import codebooks
    from tinylora.numerics import optimality
    from tinylora.quant import quantize

    x = w.astype(np.float32)
    exact, double = (
        np.square(quantize(x, blocksize=blocksize, double_quant=d).dequantize() - x).mean(dtype=float)
        for d in (False, True)
    )
    return optimality.expected_error(codebooks.nf4(), blocksize) * double / exact


def _crossing(sizes, other):
    """(block size, error) where NF4 costs what `other` says; the sizes ascend, and NF4 costs more at the first of them."""
    from tinylora import codebooks
    from tinylora.numerics import optimality

    nf4 = np.array([optimality.expected_error(codebooks.nf4(), b) for b in sizes])
    less = [other(b) for b in sizes] - nf4
    return np.interp(0, less, sizes), np.interp(0, less, nf4)


def bits_against_error(measured, seed=0):
    """E(W − Ŵ)² / E W² of 4-bit formats for normal weights, against the block size, and against bits a weight. -> figure

    By quadrature; 2²⁰ drawn weights where there is none (affine with a whole zero point, double quantization).

    measured   {"nf4": {block size: error}, "affine": {…}} of real weights, relative to their mean square: drawn as rings
    """
    from tinylora import codebooks
    from tinylora.numerics import optimality

    nf4, int4, w = codebooks.nf4(), codebooks.int4(), np.random.default_rng(seed).standard_normal(1 << 20)
    lines = {  # name: (its error in blocks of b, bits of constants a block, colour, style)
        "int4": (lambda b: optimality.expected_error(int4, b), 16, GREY, ":"),
        "affine": (optimality.affine_error, 32, RED, "-"),
        "whole zero": (lambda b: _whole_zero_error(w, b), 20, RED, "--"),
        "nf4": (lambda b: optimality.expected_error(nf4, b), 16, BLUE, "-"),
        "bof4-s": (
            lambda b: optimality.expected_error(codebooks.bof4(b, signed=True), b, signed=True),
            16,
            GREEN,
            "-.",
        ),
    }
    figure, (left, right) = canvas(9, 3.8, ncols=2, sharey=True)
    for name, (cost, constants, colour, style) in lines.items():
        error = [cost(b) for b in BLOCKS]
        if name != "whole zero":
            left.plot(BLOCKS, error, style, color=colour, lw=1.8)
        right.plot(constants / np.array(BLOCKS), error, style, color=colour, lw=1.8)
        for b, e in measured.get(name, {}).items():
            left.plot(b, e, "o", mfc="white", mec=colour, mew=1.2, ms=5)
            right.plot(constants / b, e, "o", mfc="white", mec=colour, mew=1.2, ms=5)
    doubled = (16, 32, 64, 128, 256)
    right.plot(
        8.125 / np.array(doubled), [_double_quantized_error(w, b) for b in doubled], "D", color=BLUE, ms=4.5, zorder=4
    )

    label = {"textcoords": "offset points", "weight": "bold", "fontsize": 9}
    block, error = _crossing(range(64, 97, 4), optimality.affine_error)
    left.plot(block, error, "ko", ms=6, zorder=5)
    left.annotate(f"B = {block:.0f}", (block, error), xytext=(-2, 10), **label)
    left.set_title(f"equal block size: affine errs less below B = {block:.0f}", fontsize=10)
    block, error = _crossing(range(16, 33, 4), lambda b: optimality.affine_error(2 * b))
    right.plot(16 / block, error, "ko", ms=6, zorder=5)
    arrow = {"arrowstyle": "-", "color": "black", "lw": 0.7, "shrinkB": 4}
    right.annotate(f"{4 + 16 / block:.2f}", (16 / block, error), xytext=(18, 24), arrowprops=arrow, **label)
    other, error = _crossing((44, 48, 52), lambda b: _whole_zero_error(w, b * 5 // 4))
    right.plot(16 / other, error, "ko", ms=4.5, zorder=5)
    right.annotate(f"{4 + 16 / other:.2f}", (16 / other, error), xytext=(-48, -42), arrowprops=arrow, **label)
    right.set_title(
        f"equal bits: affine errs less above {4 + 16 / block:.2f} (dashed: {4 + 16 / other:.2f})", fontsize=10
    )

    for ax, texts in (
        (left, (("Int4", 200, 0.0163, GREY), ("affine int4", 34, 0.0035, RED), ("NF4", 1000, 0.0113, BLUE))),
        (right, (("Int4", 0.055, 0.0173, GREY), ("NF4", 0.017, 0.0113, BLUE))),
    ):
        for text, x, y, colour in (*texts, ("BOF4-S", 700 if ax is left else 0.018, 0.0083, GREEN)):
            ax.text(x, y, text, color=colour, fontsize=9)
    for style, colour, text in (
        ("-", RED, "affine, 16-bit minimum"),
        ("--", RED, "affine, 4-bit zero point"),
        ("D", BLUE, "NF4, double-quantized"),
        ("o", GREY, "weights of the base model"),
    ):
        right.plot([], [], style, color=colour, mfc="white" if style == "o" else None, ms=4.5, label=text)
    right.legend(frameon=False, fontsize=8, loc="upper right", borderaxespad=0, handlelength=1.8)
    left.set_xscale("log", base=2)
    left.set_xticks(BLOCKS, [str(b) for b in BLOCKS])
    left.invert_xaxis()
    left.set_xlabel("weights a block, B")
    left.set_ylabel("squared error / variance")
    left.set_yscale("log")
    left.set_ylim(0.0023, 0.023)
    left.set_yticks((0.003, 0.005, 0.01, 0.02), ("0.003", "0.005", "0.01", "0.02"))
    right.set_xscale("log", base=2)
    right.set_xticks((1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2), ("4.03", "4.06", "4.125", "4.25", "4.5", "5", "6"))
    right.set_xlim(1 / 70, 2.3)
    right.set_xlabel("bits a weight, constants counted")
    for ax in (left, right):
        ax.minorticks_off()
    return figure
