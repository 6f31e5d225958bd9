"""Checks of notebook 17, AF4 and BOF4."""

import numpy as np
from grading import check

from tinylora import codebooks
from tinylora.numerics.optimality import block_law, expected_error, expected_max, optimal_code


@check("17-1")
def _(answer, rng):
    "Against central differences of the expected error, for random codes, block sizes and both kinds of absmax."
    h = 1e-5
    for signed in (False, True, False, True):
        n, blocksize = int(rng.integers(3, 17)), int(rng.integers(4, 300))
        q = np.sort(rng.permutation(np.linspace(-0.93, 0.93, 40))[:n] + rng.uniform(-0.02, 0.02, n))
        slope = np.asarray(answer(q.copy(), blocksize, signed), float)
        assert slope.shape == (n,), f"A code of {n} values has {n} derivatives; the answer has the shape {slope.shape}."
        expected = [
            (expected_error(q + e, blocksize, 1, signed) - expected_error(q - e, blocksize, 1, signed)) / (2 * h)
            for e in h * np.eye(n)
        ]
        wrong = np.flatnonzero(np.abs(slope - expected) > 1e-6)
        where = "at the outermost values" if set(wrong) <= {0, n - 1} else f"at the values {wrong.tolist()}"
        kind, worst = "signed" if signed else "unsigned", int(np.argmax(np.abs(slope - expected)))
        turned = " The sign is turned." if np.abs(slope + expected).max() < 1e-6 else ""
        assert len(wrong) == 0, (
            f"For blocks of {blocksize}, {kind} absmax, the gradient differs from central differences {where}: at value {worst} "
            f"it is {slope[worst]:.7f}, and the difference quotient {expected[worst]:.7f}.{turned}"
        )


def _with_boundaries(blocksize, moved, steps=3000):
    """(code, {i: where}): medians of X, with boundary i at q[i] + t (q[i+1] − q[i]) for {i: t} in `moved`, and else half-way."""
    block, q = block_law(blocksize), codebooks.nf4().astype(float)
    free, share = ~np.isin(q, (-1, 0, 1)), np.full(15, 0.5)
    for i, t in moved.items():
        share[i] = t
    for _ in range(steps):
        b = q[:-1] + share * np.diff(q)
        F, at_q = block.moments(np.concatenate([[-1], b, [1]]), 0)[0], block.moments(q, 0)[0]
        step = np.where(free, (F[:-1] + F[1:] - 2 * at_q) / (2 * block.density(q, 0)), 0)
        q = q + step
        if np.abs(step).max() < 1e-12:
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

    blocksize = int(rng.integers(16, 500))
    compare(optimal_code(blocksize, 1, of="normalized"), {}, blocksize, "The optimum")
    compare(codebooks.af4(blocksize, np.float64), {6: 0.0, 7: 0.0}, blocksize, "AF4 as released")
    below, above = rng.integers(1, 6), rng.integers(8, 14)
    for boundaries in ([0], [6], [7], [14], [below], [above], [below, above], [0, 14], [6, above]):
        blocksize, made = int(rng.integers(16, 500)), None
        while made is None:
            moved = {int(i): 0.5 + rng.choice([-1, 1]) * rng.uniform(0.1, 0.3) for i in boundaries}
            made = _with_boundaries(blocksize, moved)
        compare(*made, blocksize, f"A code with {len(boundaries)} of its boundaries moved")


@check("17-3")
def _(answer, rng):
    "Against optimal_code for random splits and block sizes."
    for below in (7, *rng.choice([4, 5, 6, 8, 9, 10], 2, replace=False)):
        blocksize, below = int(rng.integers(8, 1000)), int(below)
        start = np.concatenate([np.linspace(-0.9, 0, below + 1), np.linspace(0, 1, 16 - below)[1:]])
        expected = optimal_code(blocksize, 2, pins=(0, 1), signed=True, start=start)
        q = np.asarray(answer(blocksize, below), float)
        case = f"For blocks of {blocksize} and {below} negative values"
        assert q.shape == (16,), f"{case}: expected 16 values, and got the shape {q.shape}."
        assert (np.diff(q) > 0).all(), f"{case}: the values should ascend."
        assert (q < 0).sum() == below and 0 in q and q[-1] == 1, (
            f"{case}: expected {below} negative values, an exact 0, and a last value of exactly 1."
        )
        worst = int(np.abs(q - expected).argmax())
        cost = expected_error(q, blocksize, 2, True) / expected_error(expected, blocksize, 2, True) - 1
        assert np.abs(q - expected).max() < 1e-6, (
            f"{case}: value {worst} is {abs(q[worst] - expected[worst]):.1g} from the optimum, and the code costs {cost:.1g} more."
        )


@check("17-4")
def _(answer, rng):
    "At the z that is returned both codes must cost the same, where a share z of all weights is 0."
    for blocksize in (64, int(rng.integers(8, 40)), int(rng.integers(200, 3000))):
        codes = [optimal_code(blocksize, pins=pins) for pins in ((-1, 0, 1), (-1, 1))]
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
