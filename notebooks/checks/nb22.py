"""Checks of notebook 22, what blocks buy."""

import numpy as np
from grading import check
from scipy.special import erf

from tinylora import codebooks
from tinylora.numerics import distributions, optimality


def _expected_max(counts, sigmas):
    """E[M] by Gauss–Legendre panels, finer than the tolerance needs."""
    top = max(sigmas)
    x, weight = np.polynomial.legendre.leggauss(20)
    edges = np.linspace(0, 14 * top, 501)
    half = np.diff(edges)[:, None] / 2
    m = ((edges[:-1, None] + half) + half * x).reshape(-1)
    F = np.exp(sum(n * np.log(erf(m / (s * np.sqrt(2)))) for n, s in zip(counts, sigmas, strict=True)))
    return float((half * weight).reshape(-1) @ (1 - F))


@check("22-1")
def _(answer, rng):
    def compare(counts, sigmas, why):
        expected, found = _expected_max(counts, sigmas), answer(list(counts), list(sigmas))
        assert np.ndim(found) == 0 and np.isfinite(found), f"The answer should be one finite number; it is {found!r}."
        assert abs(found - expected) < 1e-3 * max(sigmas), (
            f"E[M] is off by {(found - expected) / max(sigmas):+.4f} of the largest sigma for counts {list(counts)} and "
            f"sigmas {[round(float(s), 4) for s in sigmas]}: {why}."
        )

    compare([1], [1.0], "a single weight, of which the mean magnitude is asked")
    for I in (2, 64, 4096, 10**6):
        assert abs(_expected_max([I], [1.0]) - optimality.expected_max(I)) < 1e-6
        compare([I], [1.0], "one scale, as in section 1 of the notebook")
    compare([64], [0.001], "one small scale; the grid must follow the scales")
    compare([64], [100.0], "one large scale; the grid must follow the scales")
    compare([32, 32], [1.0, 1.0], "two groups of the same scale are one group of 64")
    compare([64, 64], [1.0, 0.8], "the largest weight may come from either group")
    compare([1, 1], [1.0, 3.0], "one weight of each scale, neither of them drawn by chance")
    compare([1000, 4], [1.0, 2.0], "many small weights can outdo few large ones")
    for _ in range(4):
        groups = int(rng.integers(2, 30))
        counts = rng.integers(1, 400, groups).tolist()
        compare(counts, np.exp(rng.normal(0, 0.7, groups)).tolist(), "a random mixture")


@check("22-2")
def _(answer, rng):
    spaced = np.sort(np.concatenate([[-1, 1], rng.uniform(-0.95, 0.95, 14)]))
    codes = {"NF4": codebooks.nf4(), "Int4": codebooks.int4(), "a random code": spaced}

    def compare(name, k, outliers, blocksize, expected):
        found = answer(codes[name].copy(), k, outliers, blocksize)
        assert np.ndim(found) == 0 and np.isfinite(found), f"The answer should be one finite number; it is {found!r}."
        assert abs(found / expected - 1) < 1e-3, (
            f"For {name}, k = {k:.3g}, {outliers} outliers in a block of {blocksize} the answer is {found / expected:.4f} times "
            "what is expected. The mean runs over all weights of the block; a code value stands for value · absmax."
        )

    for name in codes:
        for blocksize in (4, 64, 256):
            k = float(rng.uniform(6, 30))
            one = optimality.expected_error(codes[name], blocksize, law=distributions.Outlier(k))
            compare(name, k, 1, blocksize, one)
            more = int(rng.integers(2, blocksize))
            compare(name, k, more, blocksize, one * (blocksize - more) / (blocksize - 1))
