"""Checks of notebook 20, limits and descendants."""

import numpy as np
from grading import check

from tinylora import LoRALinear, variants
from tinylora.nn import Linear4bit
from tinylora.papers.claims.toys import linear, orthonormal, weight


def _off(found, wanted):
    return float(np.linalg.norm(found - wanted))


def _array(found, wanted, what):
    found = np.asarray(found, np.float64)
    assert found.shape == wanted.shape, f"{what} should have shape {wanted.shape}; it has {found.shape}."
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@check("20-1")
def _(answer, rng):
    spectra = {
        "a flat spectrum": lambda i: np.ones(len(i)),
        "a power law": lambda i: i ** -rng.uniform(0.3, 0.5),
        "a few large values over a flat rest": lambda i: np.where(i <= 3, 4.0, 1.0),
        "a straight line": lambda i: 1.2 - i / i.max(),
    }
    short, long = (int(rng.integers(40, 49)), int(64 * rng.integers(7, 10))), (int(64 * rng.integers(7, 10)), 64)
    cases = [
        (what, (int(rng.integers(96, 193)), int(64 * rng.integers(2, 4))), int(rng.integers(8, 17))) for what in spectra
    ]
    cases += [
        ("a flat spectrum", short, 16),
        ("a straight line", short, int(rng.integers(12, 16))),
        ("a flat spectrum", long, 12),
    ]
    for what, shape, r in cases:
        law, n = spectra[what], min(shape)
        sigma = law(np.arange(1.0, n + 1))
        w = (orthonormal(rng, shape[0], n) * sigma) @ orthonormal(rng, shape[1], n).T
        nf4 = _off(Linear4bit.of(linear(w), double_quant=False).dense(), w)
        pissa = _off(weight(variants.pissa(LoRALinear(linear(w), r=r, alpha=r), code="nf4")), w) / nf4
        loftq = _off(weight(variants.loftq(linear(w), r, steps=1)), w) / nf4
        found = answer(sigma.copy(), shape, r)
        assert np.shape(found) == (2,), f"exercise_1 should return two numbers, (pissa, loftq); it returned {found!r}."
        for name, value, wanted, hint in (
            (
                "pissa",
                found[0],
                pissa,
                "NF4's error is in proportion to the size of what is quantized: what is left of ‖W‖?",
            ),
            (
                "loftq",
                found[1],
                loftq,
                "It repairs the error of NF4, not W: what does the spectrum of that error look like?",
            ),
        ):
            assert abs(value / wanted - 1) < 0.04, (
                f"For {what} of shape {shape} and r = {r}, {name} leaves {wanted:.3f} of NF4's error; the answer is {float(value):.3f}. "
                f"{hint}"
            )


@check("20-2")
def _(answer, rng):
    for _ in range(4):
        out, groups, r = (int(k) for k in rng.integers(2, 9, 3))
        group, s = int(rng.choice([2, 5, 16, 32])), float(rng.uniform(0.3, 4))
        q, scale = rng.integers(0, 16, (out, groups, group)), rng.uniform(0.1, 1, (out, groups))
        low, a, b = rng.standard_normal((out, groups)), rng.standard_normal((r, groups)), rng.standard_normal((out, r))
        found = answer(scale.copy(), low.copy(), a.copy(), b.copy(), s, group)
        assert isinstance(found, tuple) and len(found) == 2, "exercise_2 should return two arrays, (low', A_sum)."
        x = rng.standard_normal((7, groups, group))
        wanted = np.einsum("nlg,olg->no", x, scale[..., None] * q + low[..., None]) + s * x.mean(axis=2) @ a.T @ b.T
        assert np.shape(found[0]) == (out, groups), f"low' should have shape {(out, groups)}, not {np.shape(found[0])}."
        merged = np.einsum("nlg,olg->no", x, scale[..., None] * q + np.asarray(found[0])[..., None])
        assert np.abs(merged - wanted).max() < 1e-10 * max(1, np.abs(wanted).max()), (
            f"With groups of {group}, s = {s:.2f}: scale · q + low' gives an output that is off by {np.abs(merged - wanted).max():.3g}. "
            "By how much does the bypass change a single weight of a group, if its input is a mean? And is low in units of the scale?"
        )
        assert np.shape(found[1]) == (r, groups), f"A_sum should have shape {(r, groups)}, not {np.shape(found[1])}."
        gap = np.abs(x.sum(axis=2) @ np.asarray(found[1]).T - x.mean(axis=2) @ a.T).max()
        assert gap < 1e-10, f"A_sum times the sums should be A times the means; it is off by {gap:.3g}."


@check("20-3")
def _(answer, rng):
    cases = [([(4, 9), (9, 4)], 100), ([(6, 6)], 5), ([(5, 7)], 5)]
    for _ in range(6):
        shapes = [tuple(int(k) for k in rng.integers(3, 400, 2)) for _ in range(rng.integers(1, 9))]
        cases.append((shapes, int(sum(map(sum, shapes)) * rng.uniform(0.3, 5))))
    for shapes, budget in cases:
        found = answer(list(shapes), budget)
        assert np.shape(found) == (3,), f"exercise_3 should return (r_vera, r_lora, frozen); it returned {found!r}."
        vera = lora = 0
        while sum(out + vera + 1 for out, _ in shapes) <= budget:
            vera += 1
        while sum((lora + 1) * (out + inn) for out, inn in shapes) <= budget:
            lora += 1
        call = f"exercise_3({shapes}, {budget})"
        assert found[0] == vera, (
            f"{call}: r_vera is {found[0]}. Each layer trains out + r numbers; the largest r within the budget is another."
        )
        assert found[1] == lora, (
            f"{call}: r_lora is {found[1]}. Each layer trains r (in + out); the largest r is another."
        )
        frozen = vera * max(inn for _, inn in shapes) + vera * max(out for out, _ in shapes)
        assert found[2] == frozen, (
            f"{call}: frozen is {found[2]}. One A and one B serve all layers: how wide must A be, and how tall B, at r = {vera}?"
        )


@check("20-4")
def _(answer, rng):
    for _ in range(3):
        out, inn = (int(k) for k in rng.integers(2, 9, 2))
        v, m, g = rng.standard_normal((out, inn)), rng.uniform(0.5, 2, out), rng.standard_normal((out, inn))
        found = answer(v.copy(), m.copy(), g.copy())
        assert isinstance(found, tuple) and len(found) == 2, "exercise_4 should return two arrays, (paper, exact)."
        norms = np.linalg.norm(v, axis=1)

        def difference(norm_of, v=v, m=m, g=g, eps=1e-6):
            gradient = np.empty_like(v)
            for at in np.ndindex(v.shape):
                step = np.zeros_like(v)
                step[at] = eps
                high, low = ((g * m[:, None] * u / norm_of(u)[:, None]).sum() for u in (v + step, v - step))
                gradient[at] = (high - low) / (2 * eps)
            return gradient

        paper = difference(lambda u, norms=norms: norms)
        exact = difference(lambda u: np.linalg.norm(u, axis=1))
        off = _array(found[0], paper, "paper")
        assert off < 1e-6, (
            f"paper is off by {off:.2g} (relative): with ‖V‖ a constant, W' is V times a number for each row."
        )
        off = _array(found[1], exact, "exact")
        assert off < 1e-6, (
            f"exact is off by {off:.2g} (relative) from central differences of L. Making a row of V longer does not change W': what "
            "must the exact gradient's product with that row be?"
        )
