"""Checks of notebook 05, building NF4."""

from statistics import NormalDist

import numpy as np
from grading import check

from tinylora import codebooks

NORMAL = NormalDist()


def _vector(found, n, call):
    found = np.asarray(found, np.float64)
    assert found.shape == (n,), f"{call} should return {n} values; it returned an array of shape {found.shape}."
    assert np.isfinite(found).all(), f"{call} should return finite values; {found[~np.isfinite(found)][0]} is not."
    assert (np.diff(found) > 0).all(), f"{call} should return ascending values, each larger than the one before."
    return found


@check("05-1")
def _(answer, rng):
    for k in (4, *rng.permutation([2, 3, 5, 6, 7, 8]).tolist()):
        call = f"exercise_1({k})"
        found = _vector(answer(k), 2**k, call)
        assert abs(found[-1] - 1) < 1e-9, (
            f"{call}: the largest value should be 1 after the division; it is {found[-1]}."
        )
        assert np.abs(found + found[::-1]).max() < 1e-9, (
            f"{call}: the values should be symmetric, since quantiles of N(0, 1) are."
        )
        assert np.abs(found).min() > 1e-6, f"{call}: a symmetric code of an even number of values has no zero."
        parts = 2 * (2 ** (k - 1) + 1)
        Q = np.array([NORMAL.inv_cdf(i / parts) for i in range(1, parts)])
        expected = (Q[1:] + Q[:-1]) / (Q[-1] + Q[-2])
        assert np.abs(found - expected).max() < 1e-9, (
            f"{call} is off by {np.abs(found - expected).max():.4f}: each value should be the mean of two neighbouring quantiles "
            "Q(i/D) and Q((i+1)/D), before the division by the largest."
        )


def _quantiles(offset, steps):
    return np.array([NORMAL.inv_cdf(offset + (0.5 - offset) * i / steps) for i in range(steps)])


@check("05-2")
def _(answer, rng):
    made = [(codebooks.nf4(), codebooks.NF4_OFFSET, "NF4 itself")]
    for above in (2, 20, *rng.integers(3, 20, 6).tolist()):
        below, offset = int(rng.integers(1, 20)), float(rng.uniform(0.8, 0.999))
        both = np.concatenate([-_quantiles(offset, below), np.zeros(1), _quantiles(offset, above)])
        code = np.sort((both / both.max()).astype(np.float32))
        made.append((code, offset, f"a code with below/above zero = {below}/{above} values"))
    for code, offset, what in made:
        found = answer(code.copy())
        assert np.ndim(found) == 0 and np.isfinite(found), f"The answer should be one finite number; it is {found!r}."
        assert abs(found - offset) < 5e-6, (
            f"For {what}, made from o = {offset:.7f}, the answer is {float(found):.7f}. The probabilities run from o to ½ in as many "
            "equal steps as there are values on that side, since the value at ½ is the zero."
        )
