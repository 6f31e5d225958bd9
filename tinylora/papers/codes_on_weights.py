"""What 4 bits do to real weights: error and usage of every code at equal bits, tensor by tensor, and how normal the weights are.

What is computed: `measure` takes these numbers of one tensor, under every code; `mean` is their mean over the weights of several.

    relative squared error  Σ (w − ŵ)² / Σ w²          for normal weights this is E(W − Ŵ)² of `optimality`, .00846 for NF4 in blocks of 64
    usage                   H = −Σ P log₂ P in bits, P the shares of the code's values
    normal                  the share of rows (output neurons) that Shapiro and Wilk's test does not reject at 5 % (QLoRA, appendix F).
                            Normal rows pass at 95 %. The test's power grows with the length of a row, so lengths must be alike to compare;
                            a sample of rows here, all of them and the power in `normality`
    outliers                the share of blocks whose largest |w| exceeds F_M⁻¹(0.95)·σ_b, σ_b the block's own deviation (BOF4, eq. 9)

All codes are compared at equal bits: 4 a weight, the same blocks, the same form of the constants. A line of normal weights, drawn with a
fixed seed and measured in the same way (`control`), stands beside the real ones: what differs from it is what is not normal.

What is said: `describe` prints two tables, errors and usage, with what theory expects of normal weights below; `tinylora quantize` shows
them. What is drawn: `draw_errors` shows the error of each code, a dot a tensor.
"""

from dataclasses import asdict, dataclass, field, replace

import numpy as np

from .. import codebooks
from ..costs.tables import printable
from ..dtypes import as_float32
from ..figures.style import COLOURS, canvas
from ..numerics import optimality
from ..quant import quantize
from .normality import SHORTEST, rejected

#: {name: (the code for a block size, whether absmax is signed)}
CODES = {
    **{name: (lambda _, name=name: name, False) for name in ("nf4", "fp4", "fp4_e2m1", "int4", "sf4")},
    "af4": (codebooks.af4, False),
    "bof4_mae": (lambda I: codebooks.bof4(I, "mae"), False),
    "bof4": (codebooks.bof4, False),
    "bof4_s": (lambda I: codebooks.bof4(I, signed=True), True),
}

_ROWS, _LENGTH = 48, 4096  # rows tested for normality, and values of each


@dataclass
class Line:
    """What was measured on one tensor."""

    name: str
    shape: tuple
    normal: float
    outliers: float
    error: dict = field(default_factory=dict)  # code -> relative squared error
    usage: dict = field(default_factory=dict)  # code -> shares of its values, ascending
    bits: float = 0.0

    def entropy(self, code):
        """H of a code's usage, in bits."""
        p = np.array(self.usage[code])
        return float(-(p[p > 0] @ np.log2(p[p > 0]))) + 0.0


def measure(name, w, codes=tuple(CODES), blocksize=64, double_quant=True):
    """Σ (w − ŵ)² / Σ w², usage, normality and outliers of one tensor under every code. w (out, in), any float dtype -> Line

    ValueError with the tensor's `name` for NaN or Inf.
    """
    w = np.ascontiguousarray(as_float32(w)[0])
    if not np.isfinite(w).all():
        raise ValueError(f"{name} holds NaN or Inf; leave it out (--skip {name})")
    line = Line(name, tuple(w.shape), normality(w), outlier_blocks(w, blocksize))
    power = float(np.square(w, dtype=np.float64).sum()) or 1.0
    for code in codes:
        make, signed = CODES[code]
        q = quantize(w, make(blocksize), blocksize, double_quant, name=name, signed=signed)
        line.error[code] = float(np.square(q.dequantize("float32") - w, dtype=np.float64).sum() / power)
        if not np.isfinite(line.error[code]):
            raise ValueError(
                f"{name} holds numbers up to {np.abs(w).max():g}, and the mean of its constants is more than float32 holds; leave it "
                f"out (--skip {name}), or measure without double quantization"
            )
        counts = np.bincount(q.indices().reshape(-1), minlength=len(q.code)).astype(np.float64)
        values, first = np.unique(q.code, return_inverse=True)  # fp4 has two zeros
        line.usage[code] = (np.bincount(first, counts, len(values)) / w.size).tolist()
        line.bits = q.bits_per_param
    return line


def normality(w):
    """The share of rows that Shapiro and Wilk's test does not reject at 5 %: of up to 48 rows, 4,096 values each. NaN for short rows."""
    rows = w[np.linspace(0, len(w) - 1, min(len(w), _ROWS)).astype(int), :_LENGTH]
    return float(1 - rejected(rows).mean()) if rows.shape[1] >= SHORTEST else float("nan")


def outlier_blocks(w, blocksize):
    """The share of whole blocks whose largest |w| exceeds F_M⁻¹(0.95)·σ_b (BOF4 eq. 9)."""
    blocks = w.reshape(-1)[: w.size // blocksize * blocksize].reshape(-1, blocksize)
    if blocksize < 2 or len(blocks) == 0:
        return float("nan")
    limit = optimality.max_quantile(0.95, blocksize) * blocks.std(axis=1, ddof=1, dtype=np.float64)
    return float((np.abs(blocks).max(axis=1) > limit).mean())


def control(width, codes=tuple(CODES), blocksize=64, double_quant=True):
    """The same measurement on about 2²⁰ normal weights in rows of `width`. The seed is fixed. -> Line"""
    w = np.random.default_rng(0).standard_normal((max((1 << 20) // width, 1), width), dtype=np.float32)
    return measure("normal weights, drawn", w, codes, blocksize, double_quant)


def mean(lines):
    """Σ n_t e_t / Σ n_t over tensors t of n_t weights, of errors, usage, normality and outliers alike. -> Line"""
    n = np.array([np.prod(line.shape) for line in lines], np.float64)

    def average(values):
        values = np.asarray(values, np.float64)
        known = ~np.isnan(values)
        return float((values * n)[known].sum() / n[known].sum()) if known.any() else float("nan")

    total = Line(
        "mean over weights", (int(n.sum()),), average([x.normal for x in lines]), average([x.outliers for x in lines])
    )
    for code in lines[0].error:
        total.error[code] = average([x.error[code] for x in lines])
        total.usage[code] = np.average([x.usage[code] for x in lines], axis=0, weights=n).tolist()
    total.bits = average([x.bits for x in lines])
    return total


def theory(codes, blocksize):
    """{code: E(W − Ŵ)²} for normal weights and exact constants, by quadrature."""
    values = {code: (CODES[code][0](blocksize), CODES[code][1]) for code in codes}
    return {
        code: optimality.expected_error(codebooks.get(q)[1] if isinstance(q, str) else q, blocksize, 2, signed)
        for code, (q, signed) in values.items()
    }


def describe(lines, blocksize, normal=None):
    """The two tables: errors, with the smallest of each line marked, and usage."""
    lines = [replace(line, name=printable(line.name)) for line in lines]  # it is a file's
    codes = list(lines[0].error)
    total = mean(lines)
    below = [total, *([normal] if normal else [])]
    name, width = max(len(x.name) for x in [*lines, *below]), 10
    head = f"{'':<{name}}  {'shape':>12}  {'normal':>7}  {'outliers':>8}  "

    def share(x):
        return f"{100 * x:.1f} %" if x == x else "-"

    def row(line):
        best = min(line.error.values())
        cells = (f"{line.error[c]:.5f}{'*' if line.error[c] == best else ' '}".rjust(width) for c in codes)
        shape = "x".join(map(str, line.shape))
        return f"{line.name:<{name}}  {shape:>12}  {share(line.normal):>7}  {share(line.outliers):>8}  {''.join(cells)}"

    def usage(line):
        return f"{line.name:<{name}}  " + "".join(f"{line.entropy(c):.3f}".rjust(width) for c in codes)

    columns = "".join(f"{c} ".rjust(width) for c in codes)
    text = [
        f"relative squared error at equal bits: {total.bits:.3f} a weight, constants counted (* the smallest)",
        head + columns,
        *(row(line) for line in lines),
        "",
        *(row(line) for line in below),
    ]
    if blocksize >= 2:
        expected = theory(codes, blocksize)
        label = f"normal weights, by quadrature, exact constants{'':<{name}}"
        text.append(f"{label[: len(head)]:<{len(head)}}" + "".join(f"{expected[c]:.5f} ".rjust(width) for c in codes))
    text += ["", "usage: entropy of the code's values in bits, at most log2 of their number"]
    text += [f"{'':<{name}}  " + "".join(c.rjust(width) for c in codes), *(usage(line) for line in [*lines, *below])]
    return "\n".join(text)


def as_json(lines, normal, **about):
    """Everything measured, for report.json; NaN (a row too short to test) becomes null."""

    def plain(line):
        return {name: None if value != value else value for name, value in asdict(line).items()}

    return {**about, "control": plain(normal), "tensors": [plain(line) for line in lines]}


def draw_errors(lines, normal):
    """The relative squared error of each code: a dot a tensor, a bar for the mean over weights, a cross for normal weights. -> figure"""
    codes = list(lines[0].error)
    total = mean(lines)
    figure, ax = canvas(8, 0.8 + 0.45 * len(codes))
    rng = np.random.default_rng(0)
    right = max(max(x.error.values()) for x in [*lines, normal])
    for row, code in enumerate(codes[::-1]):
        x = np.array([line.error[code] for line in lines])
        ax.plot(x, row + rng.uniform(-0.18, 0.18, len(x)), "o", color=COLOURS[0], ms=3, alpha=0.5, mew=0)
        ax.plot([total.error[code]] * 2, [row - 0.32, row + 0.32], color="black", lw=1.5)
        ax.plot(normal.error[code], row, "x", color=COLOURS[2], ms=7, mew=1.5)
        ax.annotate(
            f"{total.error[code]:.5f}",
            (right, row),
            xytext=(12, -3),
            textcoords="offset points",
            annotation_clip=False,
            fontsize=9,
        )
    ax.set_yticks(range(len(codes)), codes[::-1])
    ax.set_xlim(0, right * 1.02)
    ax.set_xlabel(
        f"relative squared error at {total.bits:.3f} bits a weight\n"
        "dots: tensors; bar and number: mean over weights; cross: normal weights",
        fontsize=9,
    )
    return figure
