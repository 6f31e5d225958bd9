"""Checks of notebook 17, AF4 and BOF4."""

from functools import cache

import numpy as np
from grading import check

from tinylora import codebooks
from tinylora.numerics.optimality import block_law, expected_error, expected_max, optimal_code


def _cubed_slope(q, blocksize, signed):
    """(derivatives of E|W − Ŵ|³, the same without the maximum itself), by a quadrature in x of the density g₃."""
    block, ends = block_law(blocksize), np.concatenate([[-1], (q[1:] + q[:-1]) / 2, [1]])
    t, weight = np.polynomial.legendre.leggauss(24)
    halves = np.stack([np.stack([ends[:-1], q]), np.stack([q, ends[1:]])], axis=-1)  # (end, value, side)
    low, high = halves[0], halves[1]
    x = (low + high)[..., None] / 2 + (high - low)[..., None] / 2 * t
    off = x - q[:, None, None]
    density = block.density(x.reshape(-1), 3).reshape(x.shape)
    inside = (-3 * off * np.abs(off) * density * weight * (high - low)[..., None] / 2).sum(axis=(1, 2))
    slope, atom = inside.copy(), block.atom(3)
    slope[-1] -= 3 * (1 - q[-1]) ** 2 * (atom if signed else atom / 2)
    slope[0] += 0 if signed else 3 * (1 + q[0]) ** 2 * atom / 2
    return slope, inside


@check("17-1")
def _(answer, rng):
    "Against a quadrature in x, for random codes, block sizes and both kinds of absmax."
    for signed in (False, True, False, True):
        n, blocksize = int(rng.integers(3, 17)), int(rng.integers(4, 300))
        q = np.sort(rng.permutation(np.linspace(-0.93, 0.93, 40))[:n] + rng.uniform(-0.02, 0.02, n))
        slope = np.asarray(answer(q.copy(), blocksize, signed), float)
        assert slope.shape == (n,), f"A code of {n} values has {n} derivatives; the answer has the shape {slope.shape}."
        expected, inside = _cubed_slope(q, blocksize, signed)
        wrong = np.flatnonzero(~(np.abs(slope - expected) < 1e-9))
        where = "at the outermost values" if set(wrong) <= {0, n - 1} else f"at the values {wrong.tolist()}"
        kind, worst = "signed" if signed else "unsigned", int(np.argmax(np.abs(slope - expected)))
        hint = " The sign is turned." if np.abs(slope + expected).max() < 1e-9 else ""
        hint = " The maximum itself is missing." if np.abs(slope - inside).max() < 1e-9 else hint
        assert len(wrong) == 0, (
            f"For blocks of {blocksize}, {kind} absmax, the gradient of E|W − Ŵ|³ is wrong {where}: at value {worst} it is "
            f"{slope[worst]:.9f}, expected {expected[worst]:.9f}.{hint}"
        )


@cache
def _medians_of_x(blocksize):
    return optimal_code(blocksize, 1, of="normalized")


def _with_boundaries(blocksize, moved):
    """(code, {i: where}): medians of X, with boundary i at q[i] + t (q[i+1] − q[i]) for {i: t} in `moved`, and else half-way.

    By Newton's method on 2F(q_i) = F(its two boundaries), whose matrix is tridiagonal; None where it does not converge.
    """
    block, q = block_law(blocksize), _medians_of_x(blocksize).copy()
    free, share = np.flatnonzero(~np.isin(q, (-1, 0, 1))), np.full(15, 0.5)
    for i, t in moved.items():
        share[i] = t
    for _ in range(50):
        b = q[:-1] + share * np.diff(q)
        F, at_q, f, f_at_q = block.moments(b, 0)[0], block.moments(q, 0)[0], block.density(b, 0), block.density(q, 0)
        off = F[:-1] + F[1:] - 2 * at_q[1:-1]
        matrix = np.diag(f[:-1] * share[:-1] + f[1:] * (1 - share[1:]) - 2 * f_at_q[1:-1])
        matrix += np.diag(f[1:-1] * share[1:-1], 1) + np.diag(f[1:-1] * (1 - share[1:-1]), -1)
        inner = free - 1
        step = np.linalg.solve(matrix[np.ix_(inner, inner)], -off[inner])
        q[free] += step
        if (np.diff(q) <= 0).any():
            return None
        if np.abs(step).max() < 1e-12:
            b = q[:-1] + share * np.diff(q)
            return q, {i: b[i] for i in moved}
    return None


@check("17-2")
def _(answer, rng):
    "An optimum, AF4 as released, and codes with a boundary moved on either side or both, at the pins and between free values."

    def compare(q, expected, blocksize, what):
        found = answer(np.array(q), blocksize)
        assert isinstance(found, dict), f"The answer is a dict {{boundary: where}}, and not a {type(found).__name__}."
        assert sorted(found) == sorted(expected), (
            f"{what}, blocks of {blocksize}: the boundaries {sorted(found)} were returned, which are not those that were moved."
        )
        for i, where in expected.items():
            assert abs(found[i] - where) < 1e-6, (
                f"{what}, blocks of {blocksize}: boundary {i} is the right one, but it does not lie at {found[i]:.7f}."
            )

    sizes = rng.integers(16, 500, 2).tolist()
    for blocksize in sizes:
        compare(_medians_of_x(blocksize), {}, blocksize, "The optimum")
    compare(codebooks.af4(blocksize, np.float64), {6: 0.0, 7: 0.0}, blocksize, "AF4 as released")
    below, above = rng.integers(1, 6), rng.integers(8, 14)
    both = ([below, above], [0, 14], [6, above], [below, 7])[rng.integers(4)]
    for boundaries in (rng.choice([0, 6], 1), rng.choice([7, 14], 1), [below], [above], both):
        blocksize, made = sizes[rng.integers(2)], None
        while made is None:
            moved = {int(i): 0.5 + rng.choice([-1, 1]) * rng.uniform(0.1, 0.3) for i in boundaries}
            made = _with_boundaries(blocksize, moved)
        compare(*made, blocksize, f"A code with {len(boundaries)} of its boundaries moved")


@check("17-3")
def _(answer, rng):
    "The condition of a sum of two errors, for random splits and block sizes."
    for below in (7, *rng.choice([4, 5, 6, 8, 9, 10], 2, replace=False)):
        sizes, below = (int(rng.integers(8, 40)), int(rng.integers(200, 1000))), int(below)
        q = np.asarray(answer(sizes, below), float)
        case = f"For blocks of {sizes[0]} and {sizes[1]}, and {below} negative values"
        assert q.shape == (16,), f"{case}: expected 16 values, and got the shape {q.shape}."
        assert np.isfinite(q).all() and (np.diff(q) > 0).all(), f"{case}: the values should be finite and ascend."
        assert (q < 0).sum() == below and 0 in q and q[-1] == 1 and q[0] >= -1, (
            f"{case}: expected {below} negative values, none below −1, an exact 0, and a last value of exactly 1."
        )
        ends, free = np.concatenate([[-1], (q[1:] + q[:-1]) / 2, [1]]), ~np.isin(q, (0, 1))
        each = [np.diff(block_law(I).moments(ends, 2), axis=1)[:2] for I in sizes]
        mass, first = each[0] + each[1]
        off = np.where(free, first / mass - q, 0)
        worst = int(np.abs(off).argmax())
        hint = "".join(
            f" Its values obey the condition for blocks of {I} alone."
            for I, (g, xg) in zip(sizes, each, strict=True)
            if np.abs(xg / g - q)[free].max() < 1e-7
        )
        quotients = np.mean([xg / g for g, xg in each], axis=0)
        if np.abs(quotients - q)[free].max() < 1e-7:
            hint = " It is the mean of two centroids. What is the centroid of a sum of two densities?"
        cost = np.mean([expected_error(q, I, 2, True) for I in sizes])
        assert abs(off[worst]) < 1e-7, (
            f"{case}: value {worst} is {abs(off[worst]):.1g} away from where its condition wants it; the mean squared error is "
            f"{cost:.9f}.{hint}"
        )


@cache
def _best(blocksize, pins):
    return optimal_code(blocksize, pins=pins)


@check("17-4")
def _(answer, rng):
    "At the z that is returned both codes must cost the same, where a share z of all weights is 0."
    for blocksize in (64, int(rng.integers(8, 40)) if rng.random() < 0.5 else int(rng.integers(200, 3000))):
        codes = [_best(blocksize, pins) for pins in ((-1, 0, 1), (-1, 1))]
        normal = np.array([expected_error(q, blocksize) for q in codes])
        zeros = np.array([np.abs(q).min() ** 2 for q in codes]) * expected_max(blocksize, 2)
        z = float(answer(blocksize))
        assert 0 < z < 1, f"Blocks of {blocksize}: {z} is not a share between 0 and 1."
        with_0, without = (1 - z) * normal + z * zeros
        right = (normal[0] - normal[1]) / (normal[0] - normal[1] + zeros[1])
        assert abs(z - right) < 1e-9, (
            f"Blocks of {blocksize}: with a share of {z:.6g} zeros the code with 0 costs {with_0:.9f} and the other {without:.9f}; "
            "they should cost the same."
        )
