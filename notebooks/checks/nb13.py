"""Checks of notebook 13, subspaces and amplification."""

import numpy as np
from grading import check

from tinylora.papers import subspaces


def _frame(rng, d, n):
    return np.linalg.qr(rng.standard_normal((d, n)))[0]


def _numbers(found, n, call):
    assert isinstance(found, (tuple, list)) and len(found) == n, (
        f"{call} should return {n} values; it returned {found!r}."
    )
    return found


@check("13-1")
def _(answer, rng):
    for trial in range(10):
        d = int(rng.integers(20, 200))
        i, j = (int(n) for n in rng.integers(1, d // 2, 2))
        if trial == 3:
            i = 1
        basis, p = _frame(rng, d, d), min(i, j)
        cosines = np.ones(p) if trial == 0 else np.zeros(p) if trial == 1 else rng.uniform(0, 1, p)
        first = basis[:, :i]
        second = np.hstack(
            [basis[:, :p] * cosines + basis[:, i : i + p] * np.sqrt(1 - cosines**2), basis[:, i + p : i + j]]
        )
        phi = float(np.square(first.T @ second).sum() / p)
        printed = (1 - p * (1 - phi)) / p
        call = f"exercise_1({printed:.6f}, {i}, {j}, {d})"
        value, deviations = _numbers(answer(printed, i, j, d), 2, call)
        assert np.isclose(value, phi, atol=1e-9), (
            f"{call}: φ of these spaces is {phi:.6f}; you return {float(value):.6f}. "
            "Undo (1/p)(1 − distance²), then use the identity that holds."
        )
        mean, spread = (
            subspaces.expected_similarity(i, j, d),
            np.sqrt(2 * i * j * (d - i) * (d - j) / (d**2 * (d - 1) * (d + 2))) / p,
        )
        assert np.isclose(deviations, (phi - mean) / spread, rtol=1e-6, atol=1e-6), (
            f"{call}: φ = {phi:.6f} lies {(phi - mean) / spread:.3f} standard deviations above chance; you return {float(deviations):.3f}. "
            "Section 4 has mean and standard deviation of φ itself, not of tr(P_i P_j)."
        )


@check("13-2")
def _(answer, rng):
    cases = [
        (96, 8, 64, 2.0),
        (96, 64, 64, 5.0),
        (50, 3, 3, 0.0),
        (40, 5, 30, 5.0),
        (40, 30, 5, 5.0),
        (60, 12, 9, -0.2),
    ]
    for _ in range(8):
        d = int(rng.integers(20, 300))
        i, j = (int(n) for n in rng.integers(1, d, 2))
        cases.append((d, i, j, float(rng.uniform(0, min(i, j)))))
    for d, i, j, k in cases:
        phi = (k + (i - k) * (j - k) / (d - k)) / min(i, j)
        if abs(d - i - j + phi * min(i, j)) < 0.5:
            continue  # φ hardly depends on k there
        call = f"exercise_2({phi:.6f}, {i}, {j}, {d})"
        found = answer(phi, i, j, d)
        assert np.ndim(found) == 0 and np.isfinite(found), (
            f"{call} should return one finite number; it returned {found!r}."
        )
        assert np.isclose(found, k, rtol=1e-6, atol=1e-6), (
            f"{call} should be {k:.4f}, and is {float(found):.4f}: with {k:.4f} shared directions and {i} − k, {j} − k unrelated ones "
            "in the remaining d − k dimensions φ comes out as given."
        )


def _rows(rng):
    yield "Table 7, r = 4", 6.91, 61.95, 0.32, 4, 12288, 12288
    yield "Table 7, r = 64", 3.57, 61.95, 1.90, 64, 12288, 12288
    for trial in range(9):
        d, k, r = int(rng.integers(80, 140)), int(rng.integers(40, 70)), int(rng.integers(1, 4))
        if trial % 2:
            d, k = k, d
        n = min(d, k)
        u, v, sigma = _frame(rng, d, n), _frame(rng, k, n), 10 / np.arange(1, n + 1)
        w = u * sigma @ v.T
        place = trial % 3
        at = 0 if place == 0 else int(0.4 * n)
        left, right = (u[:, at : at + r], v[:, at : at + r]) if place < 2 else (_frame(rng, d, r), _frame(rng, k, r))
        size = float(rng.uniform(1, 5))
        delta = size * left @ right.T / np.sqrt(r)
        where = ("along W's top pairs", "along weak pairs of W", "in random directions")[place]
        yield f"ΔW {where}", np.linalg.norm(delta), np.linalg.norm(w), np.linalg.norm(left.T @ w @ right), r, d, k
    yield (
        "a wide W",
        1.0,
        10.0,
        1.5,
        4,
        100,
        400,
    )  # between by min(d_out, d_in) = 100, strong by √(d_out d_in) or by 400
    yield "a wide W", 1.0, 10.0, 0.41, 4, 100, 400  # random goes up to 0.4
    yield "a wide W", 1.0, 10.0, 0.39, 4, 100, 400
    yield "a tall W", 1.0, 10.0, 1.5, 4, 400, 100
    yield "a tall W", 1.0, 10.0, 2.1, 4, 400, 100


@check("13-3")
def _(answer, rng):
    for what, delta_norm, w_norm, projected, r, d, k in _rows(rng):
        values = [float(x) for x in (delta_norm, w_norm, projected)]
        call = "exercise_3({:.4g}, {:.4g}, {:.4g}, {}, {}, {})".format(*values, r, d, k)
        factor, random_factor, word = _numbers(answer(*values, r, d, k), 3, call)
        assert np.isclose(factor, values[0] / values[2]), (
            f"{call} ({what}): the factor is ‖ΔW‖/‖UᵀWV‖; you return {float(factor):.4f}."
        )
        random = values[1] * r / np.sqrt(d * k)
        assert np.isclose(random_factor, values[0] / random), (
            f"{call} ({what}): with random U and V the factor is {values[0] / random:.4f}, and you return {float(random_factor):.4f}. "
            "U averages over d_out dimensions, V over d_in."
        )
        pairs = values[1] * np.sqrt(r / min(d, k))
        expected = "random" if projected <= 2 * random else "between" if projected < pairs else "strong"
        assert word == expected, (
            f"{call} ({what}): the word is {expected!r}, and you return {word!r}. ‖W‖² is the sum of σ² over W's singular pairs; r "
            "pairs drawn at random have r times its mean."
        )
