"""The numbers of the article docs/nf4.md: how nearly NF4 is optimal, the proof that the best code is unique, and the law s₀·√(1 + p).

What is computed, for normal weights (E|W − Ŵ|ᵖ, p = 1 or 2; `nf4_construction.nf4_excess` is NF4's excess over the least error):

    slopes(q, I, p)         the derivative of the error in each value of a code: 0 at the best code, and nowhere else (Theorem 2)
    box(q, I, p)            how far a box around q reaches, at whose two corners the signs of `slopes` enclose the best code
    enclosed(q, I, p)       whether they do, so that the best code lies within a radius of q
    splits(I, p)            the least error for each number of values below 0: the best code is the best of these
    limit_excess(I, p)      NF4's excess where the code has infinitely many values (Proposition 3, for all p > 0)
    best_blocksize(f, …)    the block size at which an excess is least
    usage_blocksize(q)      the block size at which a code's entropy is largest

What is said: `tables()`, the article's tables in Markdown. What is drawn: `nf4_law()`, the law for other offsets than NF4's.

    python -m tinylora.papers.nf4_optimum      prints the tables
"""

from functools import cache
from statistics import NormalDist

import numpy as np

from .. import codebooks
from ..figures.style import COLOURS, canvas
from ..models.llama import Llama
from ..nn import Linear
from ..numerics import optimality
from ..quant import quantize
from .nf4_construction import nf4_excess, predicted_blocksize

BLOCKSIZES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
OFFSETS = (0.93, 0.94, 0.95, 0.96, codebooks.NF4_OFFSET, 0.97, 0.98, 0.985)
_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(100)  # for integrals over [0, 1]
_POINTS, _WEIGHTS = (_POINTS + 1) / 2, _WEIGHTS / 2


# ------------------------------------------------------------------------------------------------------------ the best code
def slopes(q, blocksize, power, order=20):
    """Half of ∂E/∂q_ℓ for p = 2, and all of it for p = 1, in the values other than −1, 0 and 1. (n,) code -> (n − 3,) float64

    p = 2: q·∫g₂ − ∫x g₂ over the value's cell; p = 1: ∫g₁ over the part below the value less that over the part above.

    order: Gauss–Legendre nodes a panel. Twice as many change no slope by more than 1e-13. The bound 1e-12 of `optimality` is about errors.
    """
    q = np.asarray(q, np.float64)
    block = optimality.block_law(blocksize, order=order)
    ends = np.concatenate([[-1], (q[1:] + q[:-1]) / 2, [1]])
    at_ends = block.moments(ends, power)
    if power == 2:
        mass, first, _ = np.diff(at_ends)
        slope = q * mass - first
    else:
        slope = 2 * block.moments(q, 1)[0] - at_ends[0, :-1] - at_ends[0, 1:]
    return slope[~np.isin(q, (-1, 0, 1))]


def box(q, blocksize, power, radius=1e-10):
    """v, half the sides of a box around q: H v ∝ 1, so that near a best code all slopes at q + v are alike. -> (n,) float64

    H: the slopes' derivatives, by differences. v is 0 at −1, 0 and 1, and its largest value is `radius`.
    """
    free = ~np.isin(q, (-1, 0, 1))
    steps = 1e-6 * np.eye(len(q))[free]
    columns = [slopes(q + e, blocksize, power) - slopes(q - e, blocksize, power) for e in steps]
    v = np.zeros(len(q))
    v[free] = np.linalg.solve(np.array(columns).T, np.ones(free.sum()))
    return v * (radius / np.abs(v).max())


def enclosed(q, blocksize, power, radius=1e-10):
    """Whether the best code with the values −1, 0 and 1, and as many on either side of 0, lies within `radius` of q. -> bool

    Lloyd's iteration q ↦ F(q) moves each value up with its neighbours. If all slopes are positive at q + v and negative at q − v, with
    v > 0, then F maps the box between the two into itself and has a fixed point there, which is the only one (Theorem 2 of docs/nf4.md).
    """
    q = np.asarray(q, np.float64)
    v = box(q, blocksize, power, radius)
    above, below = slopes(q + v, blocksize, power), slopes(q - v, blocksize, power)
    return bool((v[~np.isin(q, (-1, 0, 1))] > 0).all() and (above > 0).all() and (below < 0).all())


def splits(blocksize, power, levels=16):
    """{number of values between −1 and 0: the least error of such a code with −1, 0 and 1}, up to half: mirror images cost the same."""
    least = {}
    for below in range((levels - 1) // 2):
        start = np.concatenate([np.linspace(-1, 0, below + 2)[:-1], [0], np.linspace(0, 1, levels - 1 - below)[1:]])
        q = optimality.optimal_code(blocksize, power, levels=levels, start=start)
        least[below] = optimality.expected_error(q, blocksize, power)
    return least


# ------------------------------------------------------------------------------------------------------------------ the law
def cut(offset=codebooks.NF4_OFFSET):
    """s₀ = Φ⁻¹(offset): where a code of NF4's recipe cuts the normal law, in standard deviations. -> float"""
    return NormalDist().inv_cdf(offset)


def limit_excess(blocksize, power, offset=codebooks.NF4_OFFSET):
    """R − 1 = ∫g λ⁻ᵖ / (∫g^(1/(1+p)))^(1+p) − 1, λ the normal density cut at s₀: the excess of infinitely many values. -> float"""
    g = optimality.block_law(int(blocksize)).density(_POINTS, power)
    points = np.exp(-((cut(offset) * _POINTS) ** 2) / 2)
    points /= _WEIGHTS @ points
    return float((_WEIGHTS @ (g * points**-power)) / (_WEIGHTS @ g ** (1 / (1 + power))) ** (1 + power) - 1)


@cache
def recipe_excess(blocksize, power, offset=codebooks.NF4_OFFSET, bits=4):
    """What NF4's recipe with this offset and 2^bits values costs above the best code with −1, 0, 1 and as many values. -> float"""
    code, half = codebooks.normal_float(bits, offset), 2 ** (bits - 1)
    start = np.concatenate([np.linspace(-1, 0, half)[:-1], [0], np.linspace(0, 1, half + 1)[1:]])
    best = optimality.optimal_code(blocksize, power, levels=2 * half, start=start)
    return optimality.expected_error(code, blocksize, power) / optimality.expected_error(best, blocksize, power) - 1


def best_blocksize(f, near):
    """The whole number from near/2 to 2·near at which f is least; f falls and then rises there. -> int"""
    f = cache(f)
    lo, hi = max(2, near // 2), 2 * near
    while hi - lo > 2:
        a, b = lo + (hi - lo) // 3, hi - (hi - lo) // 3
        lo, hi = (lo, b) if f(a) < f(b) else (a, hi)
    return min(range(lo, hi + 1), key=f)


def usage_blocksize(code, most=256):
    """The block size from 2 to `most` at which the entropy of a code's usage is largest. -> int"""
    return max(range(2, most + 1), key=lambda I: optimality.entropy(code, I))


@cache
def law(power, offset=codebooks.NF4_OFFSET):
    """(predicted, limit, computed): the block size by E[M] = s₀·√(1 + p), for infinitely many values, and for 16. -> three int"""
    predicted = predicted_blocksize(power, offset)
    limit = best_blocksize(lambda I: limit_excess(I, power, offset), predicted)
    return predicted, limit, best_blocksize(lambda I: recipe_excess(I, power, offset), predicted)


def deviation(blocksize, power, offset=codebooks.NF4_OFFSET):
    """E[M]/(s₀·√(1 + p)) − 1 at a block size: how far the law misses there. -> float"""
    return optimality.expected_max(blocksize) / (cut(offset) * (1 + power) ** 0.5) - 1


# ---------------------------------------------------------------------------------------------------------------- real weights
@cache
def on_weights(blocksize, power):
    """NF4's Σ|w − ŵ|ᵖ over that of the code that is best for normal weights, less 1, on the embedded model's linear layers. -> float

    Each tensor is divided by its standard deviation, so that all count alike. Constants are float32.
    """
    total = {}
    for name, code in (("nf4", "nf4"), ("best", optimality.optimal_code(blocksize, power).astype(np.float32))):
        off = (np.abs(quantize(w, code, blocksize).dequantize().astype(np.float64) - w) for w in _weights())
        total[name] = sum(float((o**power).sum()) for o in off)
    return total["nf4"] / total["best"] - 1


@cache
def _weights():
    modules = Llama.from_pretrained("base").named_modules()
    tensors = [np.asarray(layer.weight.data, np.float32) for _, layer in modules if type(layer) is Linear]
    return [w / np.float32(w.std(dtype=np.float64)) for w in tensors]


# -------------------------------------------------------------------------------------------------------------------- as text
def tables():
    """{name: the table in Markdown} of the article."""
    nf4, error, best = codebooks.nf4(), optimality.expected_error, optimality.optimal_code
    found = {}
    found["answer"] = _table(
        ("block size", "absolute error", "squared error", "entropy of the indices"),
        [(I, *(f"{nf4_excess(I, p):.4%}" for p in (1, 2)), f"{optimality.entropy(nf4, I):.4f}") for I in BLOCKSIZES],
    )
    found["errors"] = _table(
        ("$I$", r"$\text{E}[M]$", "$D_1$ of NF4", "least $D_1$", "$D_2$ of NF4", "least $D_2$"),
        [
            (
                I,
                f"{optimality.expected_max(I):.6f}",
                *(f"{error(q, I, p):.10f}" for p in (1, 2) for q in (nf4, best(I, p))),
            )
            for I in BLOCKSIZES
        ],
    )
    found["codes"] = _table(
        ("NF4", "best for $D_1$", "best for $D_2$"),
        [[f"{x:.8f}".replace("-", "−") for x in row] for row in zip(nf4, best(64, 1), best(64, 2), strict=True)],
    )
    found["law"] = _table(
        ("$p$", r"$s_0\sqrt{1+p}$", "predicted", "limit", "computed", "excess there", "excess at 64"),
        [
            (p, f"{cut() * (1 + p) ** 0.5:.4f}", *law(p), *(f"{nf4_excess(I, p):.4%}" for I in (law(p)[2], 64)))
            for p in (1, 2)
        ],
    )
    found["offsets"] = _table(
        ("$p$", "offset", "$s_0$", "predicted", "limit", "computed", "the law misses by"),
        [
            (p, f"{o:.7g}", f"{cut(o):.4f}", *law(p, o), f"{deviation(law(p, o)[2], p, o):+.2%}".replace("-", "−"))
            for p in (1, 2)
            for o in OFFSETS
        ],
    )
    found["moved"] = _table(
        ("block size", "offset for $p = 1$", "above the least", "offset for $p = 2$", "above the least"),
        [(I, *(cell for p, c in ((1, "mae"), (2, "mse")) for cell in _moved(I, p, c))) for I in BLOCKSIZES],
    )
    found["weights"] = _table(
        ("block size", "$p = 1$: normal", "embedded model", "$p = 2$: normal", "embedded model"),
        [
            (I, *(f"{f(I, p):.3%}" for p in (1, 2) for f in (nf4_excess, on_weights)))
            for I in (16, 32, 64, 128, 256, 512)
        ],
    )
    return {name: text.replace("%", " %") for name, text in found.items()}


def _moved(blocksize, power, criterion):
    offset = NormalDist().cdf(optimality.expected_max(blocksize) / (1 + power) ** 0.5)
    least = optimality.expected_error(optimality.optimal_code(blocksize, power), blocksize, power)
    cost = optimality.expected_error(codebooks.closed_form(blocksize, criterion), blocksize, power)
    return f"{offset:.5f}", f"{cost / least - 1:.3%}"


def _table(head, rows):
    lines = [head, ["---:"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


# ------------------------------------------------------------------------------------------------------------------ as figure
def nf4_law(offsets=OFFSETS):
    """E[M] at the best block size of codes of NF4's recipe against s₀, beside s₀·√(1 + p), and how far the law misses -> figure"""
    figure, (left, right) = canvas(8, 3.5, ncols=2)
    s0 = np.array([cut(o) for o in offsets])
    span = np.array([s0.min() - 0.04, s0.max() + 0.04])
    right.axhline(0, color="0.6", lw=0.9)
    for p, colour, mark, line in ((1, COLOURS[0], "o", "-"), (2, COLOURS[2], "s", "--")):
        best = [law(p, o)[2] for o in offsets]
        left.plot(span, span * (1 + p) ** 0.5, line, color=colour, lw=1.2)
        left.plot(s0, [optimality.expected_max(I) for I in best], mark, color=colour, ms=5)
        words, x, y = {1: ("absolute error, p = 1", 1.9, -0.42), 2: ("squared error, p = 2", 1.46, 0.62)}[p]
        left.text(x, x * (1 + p) ** 0.5 + y, words, color=colour, fontsize=9)
        missed = [100 * deviation(I, p, o) for I, o in zip(best, offsets, strict=True)]
        right.plot(s0, missed, mark + line, color=colour, ms=5, lw=1.2)
        nf4 = law(p)[2]
        below = {"ha": "left", "va": "top", "textcoords": "offset points", "fontsize": 9, "color": colour}
        left.annotate(f"NF4: {nf4}", (cut(), optimality.expected_max(nf4)), (5, -3), **below)
    left.set(xlabel="s₀ of the code, in standard deviations", ylabel="E[M] at the best block size")
    right.set(xlabel="s₀ of the code, in standard deviations", ylabel="E[M] above s₀·√(1 + p) (per cent)")
    for ax in (left, right):
        ax.axvline(cut(), color="0.6", lw=0.9, ls=":", zorder=0)
    right.text(cut() + 0.01, 0.98, "NF4", transform=right.get_xaxis_transform(), fontsize=9, va="top")
    return figure


if __name__ == "__main__":
    for name, text in tables().items():
        print(f"{name}\n\n{text}\n")
