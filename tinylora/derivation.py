"""NF4 built step by step, as text: what `tinylora nf4` prints. Each number is computed when it is printed.

`construction()`    from the offset to the 16 values, with their bit patterns beside the published ones
`deviations()`      what breaks the table, in units in the last place (ULP)
`optimality_table(blocksizes)`   what NF4 costs beside the best code with the same pins −1, 0, 1
"""

from statistics import NormalDist

import numpy as np

from . import codebooks, optimality

_BLOCKSIZES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def recipe(grid=codebooks.linspace_f32, offset=codebooks.NF4_OFFSET, precision=np.float32):
    """NF4's recipe with each of its choices open -> (probabilities, quantiles, values) for the 7 negatives, 0 and the 8 positives.

    grid(start, stop, n) makes the probabilities; precision is that of the quantiles and of the division by the largest.
    """
    inverse = NormalDist().inv_cdf
    positive, negative = grid(offset, 0.5, 9)[:-1], grid(offset, 0.5, 8)[:-1]
    below, above = (np.array([inverse(float(p)) for p in side], precision) for side in (negative, positive))
    quantiles = np.concatenate([-below, np.zeros(1, precision), above[::-1]])
    probabilities = np.concatenate([1 - np.float64(negative), [0.5], np.float64(positive)[::-1]])
    return probabilities, quantiles, (quantiles / quantiles.max()).astype(np.float32)


def ulps(values):
    """(value − published) in units in the last place. (16,) float32 -> list of int"""
    published = np.array(codebooks.NF4_PUBLISHED, np.uint32)
    apart = (values.view(np.uint32) & 0x7FFFFFFF).astype(np.int64) - (published & 0x7FFFFFFF)
    return np.where(published >> 31, -apart, apart).tolist()


def construction():
    """The steps, and the 16 values beside the published ones."""
    exact = 1 - (1 / 32 + 1 / 30) / 2
    probabilities, quantiles, values = recipe()
    published = np.array(codebooks.NF4_PUBLISHED, np.uint32)
    lines = [
        "1  the outermost probability: half a bin of 16 and half a bin of 15 are cut off, on average",
        f"   o = 1 - (1/32 + 1/30)/2 = 929/960 = {exact:.12f}, of which seven digits are used: {codebooks.NF4_OFFSET}",
        "2  evenly spaced probabilities from o to 1/2, in float32: 8 for the positive side, 7 for the negative",
        "3  their normal quantiles, rounded to float32; 1/2 becomes an exact 0 and is taken once",
        f"4  all of them divided by the largest, {quantiles.max():.7f}, in float32",
        "",
        " i  probability    quantile          value        bits  published  ULP",
    ]
    for i, row in enumerate(
        zip(probabilities, quantiles, values, values.view(np.uint32), published, ulps(values), strict=True)
    ):
        lines.append("{:2d}    {:.7f}  {:+.7f}  {:+.10f}    {:08x}   {:08x}  {:3d}".format(i, *row))
    equal = int((values.view(np.uint32) == published).sum())
    return "\n".join([*lines, "", f"{equal} of 16 bit patterns equal the published ones"])


def deviations():
    """What happens to the table if one choice of the recipe is made otherwise."""
    choices = {
        "np.linspace in float32": {"grid": lambda a, b, n: np.linspace(a, b, n, dtype=np.float32)},
        "np.linspace in float64": {"grid": np.linspace},
        "quantiles and division in float64": {"precision": np.float64},
        "929/960 instead of 0.9677083": {"offset": 929 / 960},
    }
    lines = ["what breaks the table, in ULP (index 0 to 15)"]
    for name, change in choices.items():
        lines.append(f"   {name:<34}" + "".join(f"{u:4d}" for u in ulps(recipe(**change)[2])))
    q = equation_4()
    lines.append(f"   equation 4 as printed: {q[0]}, then 15 values from {q[1]:.3f} to {q[15]:.3f}; another code")
    return "\n".join(lines)


def equation_4(k=4):
    """q_i = ½(Q(i/(2^k + 1)) + Q((i + 1)/(2^k + 1))), i = 0 … 2^k − 1, Q = Φ⁻¹: QLoRA eq. 4, literally. (2^k,) float64"""
    n = 2**k
    Q = np.array([-np.inf, *(NormalDist().inv_cdf(i / (n + 1)) for i in range(1, n + 1))])
    return (Q[:-1] + Q[1:]) / 2


def optimality_table(blocksizes=_BLOCKSIZES):
    """Errors of NF4 for normal weights, the best code with pins −1, 0, 1 beside it, and the entropy of its usage."""
    nf4 = codebooks.nf4()
    lines = [
        "what NF4 costs for N(0, 1) weights, and how much that lies above the best code with the same -1, 0 and 1",
        " block  E[max]   squared error    above   absolute error    above   entropy, bits",
    ]
    for I in blocksizes:
        cells = [f"{I:6d}  {optimality.expected_max(I):6.3f}"]
        for power in (2, 1):
            cost = optimality.expected_error(nf4, I, power)
            best = optimality.expected_error(optimality.optimal_code(I, power), I, power)
            cells.append(f"{cost:15.7f}  {cost / best - 1:7.3%}")
        lines.append("  ".join([*cells, f"{optimality.entropy(nf4, I):12.4f}"]))
    return "\n".join(lines)


__all__ = ["construction", "deviations", "equation_4", "optimality_table", "recipe", "ulps"]
