"""Checks of notebook 12, the rank of ΔW."""

import numpy as np
from grading import check


def _pair(found, call):
    assert isinstance(found, (tuple, list)) and len(found) == 2, f"{call} should return a pair; it returned {found!r}."
    return found


@check("12-1")
def _(answer, rng):
    cases = [([3.0, 2.0], 96, 96, 1, 0.05, 1.0), ([2.0, 3.0], 96, 96, 1, 0.0, 1.0), ([3.0], 8, 4, 6, 0.1, 2.0)]
    cases += [([1.0, 2.0], 10, 20, 0, 0.3, 1.0)]
    for _ in range(6):
        d_out, d_in = (int(n) for n in rng.integers(6, 60, 2))
        singular = rng.uniform(0.1, 3, int(rng.integers(1, min(d_out, d_in))))
        r = int(rng.integers(1, d_in))
        cases.append((singular.tolist(), d_out, d_in, r, float(rng.uniform(0, 1)), float(rng.uniform(0.3, 3))))
    for singular, d_out, d_in, r, noise, scale in cases:
        call = f"exercise_1({np.round(singular, 3).tolist()}, {d_out}, {d_in}, {r}, {noise:.3g}, {scale:.3g})"
        trained, frozen = _pair(answer(list(singular), d_out, d_in, r, noise, scale), call)
        squares = np.sort(np.square(singular))[::-1]
        expected = scale**2 * squares[r:].sum() / d_out + noise**2
        assert np.isclose(trained, expected, rtol=1e-9, atol=1e-15), (
            f"{call}: with A and B trained the error should be {expected:.6g}, and you predict {float(trained):.6g}. The best "
            "rank-r update keeps the r largest singular values; the error is averaged over the outputs, and x has variance scale²."
        )
        # a Gaussian A has a uniformly random row space of min(r, d_in) dimensions
        expected = scale**2 * squares.sum() * (1 - min(r, d_in) / d_in) / d_out + noise**2
        assert np.isclose(frozen, expected, rtol=1e-9, atol=1e-15), (
            f"{call}: with A frozen the error should be {expected:.6g} on average; you predict {float(frozen):.6g}. "
            "What the layer sees of x is its projection onto the row space of A, a random one. Which part of ΔW does that leave, "
            "and what if r reaches d_in?"
        )


@check("12-2")
def _(answer, rng):
    for trial in range(10):
        d, norm, noise = int(rng.integers(12, 60)), float(rng.uniform(1, 5)), float(rng.uniform(0.02, 0.2))
        n = d if trial == 0 else 9 if trial == 1 else int(rng.integers(9, d + 1))
        below, above = ((m - 8) / m for m in (n - 1, n))  # the parts of ‖ΔW‖² that n − 1 and n directions can leave
        part = below + float(rng.uniform(0.2, 0.8)) * (above - below)
        factor = 1 + part * norm**2 / (noise**2 * d)
        call = f"exercise_2({d}, {norm:.3f}, {noise:.4f}, {factor:.3f})"
        delta = answer(d, norm, noise, factor)
        assert delta is not None, f"{call}: there is such an update, and the answer was None."
        delta = np.asarray(delta, float)
        assert delta.shape == (d, d), f"{call} should return a {d} × {d} matrix; its shape is {delta.shape}."
        sigma = np.linalg.svd(delta, compute_uv=False)
        assert np.isclose(np.linalg.norm(sigma), norm, rtol=1e-6), (
            f"{call}: ‖ΔW‖_F should be {norm:.4f}; it is {np.linalg.norm(sigma):.4f}."
        )
        left = ((sigma[8:] ** 2).sum() / d + noise**2) / noise**2
        assert np.isclose(left, factor, rtol=1e-6), (
            f"{call}: rank 8 should be left with {factor:.4f} times noise²; with this ΔW it is {left:.4f} times."
        )
        found = int((sigma > 1e-7 * sigma[0]).sum())
        assert found == n, (
            f"{call}: rank {n} is possible, and this ΔW has rank {found}. For a given norm, which singular values make the tail beyond "
            "the eighth as large as it can be?"
        )
    for d, part in ((20, 1.0), (20, 0.7), (8, 0.1), (6, 0.01)):
        factor = 1 + part * 4 / (0.01 * d)
        assert answer(d, 2.0, 0.1, factor) is None, (
            f"exercise_2({d}, 2.0, 0.1, {factor:.3f}) should be None: no {d} × {d} matrix of norm 2 has so large a tail beyond its eighth "
            "singular value."
        )


@check("12-3")
def _(answer, rng):
    for trial in range(6):
        d_out, d_in = (int(n) for n in rng.integers(5, 14, 2))
        n = int(rng.integers(3 * d_in, 6 * d_in))
        mixing = np.linalg.qr(rng.standard_normal((d_in, d_in)))[0] * np.exp(rng.uniform(-3, 2, d_in))
        x, delta = rng.standard_normal((n, d_in)) @ mixing.T, rng.standard_normal((d_out, d_in))
        seen = np.linalg.svd(x @ delta.T / np.sqrt(n * d_out), compute_uv=False)  # Eckart and Young on ΔW xᵀ
        seen = seen[: min(d_out, d_in)]  # the others are 0
        tails = np.array([*np.cumsum(seen[::-1] ** 2)[::-1], 0.0])
        r = 0 if trial == 0 else int(rng.integers(1, len(seen)))
        excess = 1.5 * tails[0] if r == 0 else float(np.sqrt(tails[r] * tails[r - 1]))
        call = f"exercise_3(delta, x, {excess:.4g}) for delta {delta.shape} and x {x.shape}"
        found, update = _pair(answer(delta.copy(), x.copy(), excess), call)
        update = np.asarray(update, float)
        assert update.shape == delta.shape, f"{call}: X should have shape {delta.shape}; it has {update.shape}."
        assert found == r, (
            f"{call}: r should be {r}, and you return {found}. "
            + ("With X = 0 the error is small enough already." if r == 0 else "")
            + (
                "An update of smaller rank is good enough: an error in a direction that x hardly has hardly counts."
                if found > r
                else ""
            )
            + (
                "No update of so small a rank is good enough: look at what the strong directions of x see."
                if found < r
                else ""
            )
        )
        error = ((x @ (update - delta).T) ** 2).sum() / (n * d_out)
        assert error <= excess * (1 + 1e-9), (
            f"{call}: r is right, but X leaves {error:.4g} on these inputs. The best X on them is not the truncated SVD of delta."
        )
        rank = int(np.linalg.matrix_rank(update, tol=1e-8 * max(np.linalg.norm(update, 2), 1e-300)))
        assert rank <= r, f"{call}: X should have rank {r}; it has {rank}."
