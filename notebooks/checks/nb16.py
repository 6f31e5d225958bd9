"""Checks of notebook 16."""

from functools import cache
from statistics import NormalDist

import numpy as np
from grading import check

from tinylora.numerics.optimality import expected_max


@check("16-1")
def _(answer, rng):
    for k in (0, 1, 2, float(rng.uniform(0, 5))):
        I = int(rng.integers(2, 200))
        x = rng.uniform(-1, 1, (3, 4))
        said = answer(x, I, k)
        assert isinstance(said, (tuple, list)) and len(said) == 2, (
            "exercise_1 should return a pair: g_k(x), and the atom at +1."
        )
        g, atom = np.asarray(said[0], float), float(said[1])
        assert g.shape == x.shape, f"g_k should have x's shape {x.shape}, and has {g.shape}."
        mean = np.trapezoid(np.linspace(0, 1, 200_001) ** (I - 1 + k), dx=1 / 200_000) * I
        if k == 0:
            total = 2 * g.mean() + 2 * atom
            assert abs(total - 1) < 1e-6, (
                f"For k = 0 and I = {I} the density and both atoms add up to {total:.6f}, expected 1."
            )
        if k == 2:
            second = (g.mean() * 2 / 3 if np.ptp(g) < 1e-12 else np.nan) + 2 * atom
            assert abs(second - 1 / 3) < 1e-6, (
                f"For k = 2 and I = {I}, ∫ x² g_2 plus both atoms should be E W² = 1/3, the variance of a uniform weight on "
                f"[−1, 1], and is {second:.6f}."
            )
        assert abs(2 * I * atom - mean) < 1e-4 * mean, (
            f"The atom at +1, for I = {I} and k = {k:.3g}, is {atom:.6g}. A block's maximum is one weight of I, it is positive "
            f"half of the time, and it counts with M^k, where M has the density I·m^(I−1)."
        )
        per_m = mean * (I - 1) / I
        assert np.abs(2 * g - per_m).max() < 1e-4 * per_m, (
            f"g_k at I = {I}, k = {k:.3g} is {g.flat[0]:.6g}. Given M = m, what is the law of another weight, and so of x = w/m? "
            f"How does it depend on m?"
        )


LAST = " The last I with E[M] not above the edge was asked for, not the nearest."


@check("16-2")
def _(answer, rng):
    mean = cache(expected_max)
    known = [(0.9677083, 0, 9), (0.9677083, 1, 67), (0.9677083, 2, 434)]
    for offset, p, expected in known:
        said = answer(offset, p)
        near = isinstance(said, (int, np.integer)) and abs(said - expected) == 1
        assert said == expected, (
            f"For NF4's own offset and p = {p} the answer is {expected}; exercise_2 returned {said!r}.{LAST if near else ''}"
        )
    left = 5
    while left:
        p = float(rng.choice([0, 0.5, 1, 2, rng.uniform(0, 2)]))
        I = int(np.exp(rng.uniform(np.log(2), np.log(900))))  # so E[M] at 2 is never above the edge
        middle = mean(I) + rng.uniform(0.1, 0.9) * (mean(I + 1) - mean(I))
        offset = NormalDist().cdf(middle / (1 + p) ** 0.5)
        if not 0.75 <= offset <= 0.97:
            continue
        left -= 1
        said = answer(offset, p)
        assert isinstance(said, (int, np.integer)), f"exercise_2 should return an int, and returned {said!r}."
        hint = (
            " Where is this code cut, in standard deviations of the weight, if it is read as the best code for that p?"
        )
        assert said == I, (
            f"For offset = {offset:.6f} and p = {p:.4g} exercise_2 returned {said}, where E[M] = {mean(max(int(said), 2)):.4f}."
            f"{LAST if abs(said - I) == 1 else hint}"
        )


@check("16-3")
def _(answer, rng):
    for p in (0, 1, 2, float(rng.uniform(0, 3))):
        edge, n = float(rng.uniform(0.5, 8)), int(rng.integers(1, 12))
        q = np.asarray(answer(edge, p, n), float)
        where = f"for edge = {edge:.3f}, p = {p:.3g}, n = {n}"
        assert q.shape == (n + 1,), (
            f"exercise_3 should return n + 1 = {n + 1} values, and returned the shape {q.shape}."
        )
        assert abs(q[0]) < 1e-12 and abs(q[-1] - 1) < 1e-9, (
            f"The first value should be 0 and the last 1, since the density is cut at the edge; {where} they are {q[0]:.4g} "
            f"and {q[-1]:.4g}."
        )
        assert (np.diff(q) > 0).all(), f"The values should ascend, and do not {where}."
        x = np.linspace(0, 1, 200_001)
        density = (np.exp(-np.sqrt(2) * edge * x) / np.sqrt(2)) ** (1 / (1 + p))
        mass = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
        part = np.diff(np.interp(q, x, mass / mass[-1])) * n
        assert np.abs(part - 1).max() < 1e-5, (
            f"Between neighbours should lie 1/n of the point density f^(1/(1+p)) on [0, edge]; {where} the parts are "
            f"{np.round(part[:3] / n, 4).tolist()} … Is f^(1/(1+p)) of a Laplace law what it is of a normal law?"
        )
        fine = np.interp(np.arange(n + 1) / n, mass / mass[-1], x)
        assert np.abs(q - fine).max() < 1e-6, f"A value is off by {np.abs(q - fine).max():.1e} {where}."


@check("16-4")
def _(answer, rng):
    for trial in range(4):
        blocks, I = int(rng.integers(20, 60)), int(rng.integers(5, 70))
        w = rng.standard_normal((blocks, I)) * 10.0 ** rng.uniform(-1, 1, (blocks, 1))
        q = np.sort(rng.uniform(-0.9, 0.9, int(rng.integers(4, 17))))
        if trial == 3:
            q = np.append(q, 5.0)  # nothing is ever nearest to it
        before = q.copy()
        new = np.asarray(answer(q, w.copy()), float)
        assert new.shape == q.shape, (
            f"exercise_4 should return as many values as q has ({len(q)}); it returned the shape {new.shape}."
        )
        assert (q == before).all(), "exercise_4 changed the array q that it was given; return a new one."
        assert np.isfinite(new).all(), (
            "A value became NaN or infinite; one that no weight is assigned to should stay where it is."
        )
        m = np.abs(w).max(axis=1, keepdims=True)
        cell = np.searchsorted((q[1:] + q[:-1]) / 2, w / m)
        for i in range(len(q)):
            here = cell == i
            if not here.any():
                assert new[i] == q[i], (
                    f"No weight is nearest to {q[i]:.4f}, so it should stay, and it became {new[i]:.4f}."
                )
                continue
            scale = np.broadcast_to(m, w.shape)[here]
            slope = (scale * (w[here] - scale * new[i])).sum() / (scale * scale).sum()
            plain = (w[here] / scale).mean()
            hint = ""
            if abs(new[i] - plain) < 1e-9:
                hint = " It is the mean of the scaled weights, which minimizes the error of X. What does the error of W add?"
            assert abs(slope) < 1e-9, (
                f"With its {here.sum()} weights kept, value {i} should not be able to lower Σ (w − ŵ)² any more, but a move by "
                f"{slope:.2e} would.{hint}"
            )


@check("16-5")
def _(answer, rng):
    for n in (2, 4, 16, 64, *(2 * rng.integers(3, 32, 3)).tolist()):
        call = f"exercise_5({n})"
        q = np.asarray(answer(n), np.float64)
        assert q.shape == (n,), f"{call} should return {n} values; it returned an array of shape {q.shape}."
        assert np.isfinite(q).all(), f"{call} should return finite values; {q[~np.isfinite(q)][0]} is not."
        assert (np.diff(q) > 0).all(), f"{call} should return ascending values, each larger than the one before."
        shares = np.diff([0.0, *(NormalDist().cdf(x) for x in (q[1:] + q[:-1]) / 2), 1.0])
        worst = int(np.abs(shares - 1 / n).argmax())
        assert abs(shares[worst] - 1 / n) < 1e-9, (
            f"{call}: value {worst} is the nearest one to {shares[worst]:.4%} of N(0, 1), and should be to {1 / n:.4%}. "
            "A bin ends at the midpoint between two values."
        )
