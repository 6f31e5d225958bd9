"""Checks of notebook 10, merging."""

import numpy as np
from grading import check


def _exponents(x):
    return np.frexp(np.abs(x))[1]


def _normal_pair(rng, ratio):
    w, d = rng.standard_normal((2, 80_000), dtype=np.float32)
    return w, np.float32(ratio) * d, f"w ~ N(0, 1) and d ~ N(0, {ratio:.3g}²)"


def _binade_pair(rng, j):
    w, d = rng.uniform(1, 2, (2, 80_000)) * (1 - 2 * rng.integers(0, 2, (2, 80_000)))
    what = f"w in ±[1, 2) and d in ±[2^{-j}, 2^{1 - j})"
    return w.astype(np.float32), np.ldexp(d, -j).astype(np.float32), what


@check("10-1")
def _(answer, rng):
    # the share in 80,000 entries is off by 0.0017 at most (one standard deviation, measured)
    cases = [_normal_pair(rng, float(r)) for r in (0.003, 0.1, 30, *np.exp(rng.uniform(-5, 3, 1)))]
    cases += [_binade_pair(rng, int(j)) for j in (1, 3, -1, rng.integers(-4, 7))]
    for w, d, what in cases:
        keep = (w != 0) & (d != 0) & (w + d != 0)
        w, d = w[keep], d[keep]
        share = float((((w + d) - d) == w).mean())
        given = [_exponents(v) for v in (w, d, w + d)]
        found = answer(*(v.copy() for v in given))
        assert np.ndim(found) == 0 and 0 <= found <= 1, (
            f"exercise_1 should return a share between 0 and 1, not {found!r}."
        )
        grown = float((given[2] > given[0]).mean())
        assert abs(found - share) < 0.008, (
            f"For {what}, {share:.1%} of the entries survive and exercise_1 predicts {float(found):.1%}. The exponent grows for "
            f"{grown:.1%} of them. Look at the entries with a given e_sum − e_w and a given e_w − e_d separately."
        )


def _stored(rng, size):
    """A code of that many values, and blocks of 64 stored weights with an update: (code, index, scale, D)."""
    code = np.cumsum(rng.uniform(0.02, 0.3, size)) - rng.uniform(0.5, 2)
    blocks = int(rng.integers(2, 6))
    D = rng.standard_normal((blocks, 64)) * 10 ** rng.uniform(-3, 3)
    D[rng.random(D.shape) < 0.1] = 0
    index = rng.integers(0, size, D.shape)
    index[0, :4], D[0, :4] = (0, 0, size - 1, size - 1), (-1, 1, -1, 1)  # both ends, outward and inward
    return code, index, 10 ** rng.uniform(-2, 2, (blocks, 1)), D


def _nearest(code, scale, w):
    return np.abs(w[..., None] - code * scale[..., None]).argmin(-1)


@check("10-2")
def _(answer, rng):
    for size in (16, 2, int(rng.integers(3, 30)), 21):
        code, index, scale, D = given = _stored(rng, size)
        copies = [v.copy() for v in given]
        found = np.asarray(answer(*copies))
        for v, before in zip(copies, given, strict=True):
            assert (v == before).all(), "exercise_2 changes an argument; they should stay as they are."
        assert found.shape == D.shape and found.dtype.kind == "f", (
            f"exercise_2 should return floats of the shape {D.shape}; it returned {found.dtype} of {found.shape}."
        )
        assert not np.isnan(found).any() and (found > 0).all(), "Every size should be positive or np.inf, and none NaN."
        # what an update with kept scales does: nothing, just below the size; another code, just above it
        w, finite = code[index] * scale, np.isfinite(found)
        t = np.where(finite, found, 0.0)
        for by, changes in ((1 - 1e-9, False), (1 + 1e-9, True)):
            wrong = finite & ((_nearest(code, scale, w + by * t * D) != index) != changes)
            if wrong.any():
                b, i = np.argwhere(wrong)[0]
                raise AssertionError(
                    f"With {size} values, entry {i} of block {b} has the code {index[b, i]} and D = {D[b, i]:.3g}. At "
                    f"{'1 + ' if changes else '1 − '}1e-9 times your size {found[b, i]:.6g} its code should "
                    f"{'have changed' if changes else 'not have changed yet'}."
                )
        far = (np.ptp(code) + 1) * scale / np.where(D, np.abs(D), 1)  # across the whole code
        missed = ~finite & (_nearest(code, scale, w + far * D) != index)
        if missed.any():
            b, i = np.argwhere(missed)[0]
            raise AssertionError(
                f"Entry {i} of block {b} has the code {index[b, i]} of {size} and D = {D[b, i]:.3g}: a large update "
                "changes it, so its size is finite."
            )
