"""Checks of notebook 14, scaling and learning rates."""

import math

import numpy as np
from grading import check

from tinylora import optim


def _number(found, call):
    assert np.ndim(found) == 0 and np.isreal(found) and math.isfinite(found), (
        f"{call} should return one finite number; it returned {found!r}."
    )
    return float(found)


def _numbers(found, n, call):
    assert isinstance(found, (tuple, list, np.ndarray)) and np.shape(found) == (n,), (
        f"{call} should return {n} numbers; it returned {found!r}."
    )
    found = [float(x) for x in found]
    assert all(math.isfinite(x) and x > 0 for x in found), f"{call} should return positive finite numbers, not {found}."
    return found


def _slope(rng, k, m, c, a, d=96, ranks=(4, 64), draws=24):
    """The exponent of the gain between two ranks, measured. Entries of A are normal, with deviation r^−a/√d."""
    gains = []
    for r in ranks:
        total = 0.0
        for _ in range(draws):
            G = rng.standard_normal((d, d))
            A = rng.standard_normal((r, d)) / (math.sqrt(d) * r**a)
            s = 16 / r**c
            g = s * G @ A.T
            B = -np.sign(g) * np.abs(g) ** k / np.linalg.norm(g) ** m
            total -= float((s * (B @ A) * G).sum())
        gains.append(total)
    return math.log(gains[1] / gains[0]) / math.log(ranks[1] / ranks[0])


@check("14-1")
def _(answer, rng):
    cases = [
        (1.0, 0.0, 1.0, 0.0),
        (0.0, 0.0, 1.0, 0.0),
        (0.0, 0.0, 0.5, 0.0),
        (1.0, 1.0, 0.5, 0.0),
        (1.0, 0.0, 1.0, 1.0),
    ]
    cases += [
        (
            *map(float, rng.choice([0, 0.5, 1, 2], 1)),
            *map(float, rng.choice([0, 1, 2], 1)),
            *map(float, rng.uniform(0, 1.5, 2)),
        )
        for _ in range(6)
    ]
    for k, m, c, a in cases:
        call = f"exercise_1(k={k:g}, m={m:g}, c={c:.3g}, a={a:.3g})"
        found = _number(answer(k, m, c, a), call)
        measured = _slope(rng, k, m, c, a)
        assert abs(found - measured) < 0.1, (
            f"{call} is {found:.3f}; the gain was measured to go as r^{measured:.2f}. Count the powers of r in one entry of g, in the "
            "number of its entries, in ‖g‖, and in what multiplies B₁ on the way to ⟨−ΔW₁, G⟩."
        )


def _losses(rng_seed, alpha, f, eta, d=12, r=3, n=48, steps=25):
    """The losses of a regression with ΔW = s B A under Adam with ε = 0 in float64; f scales A₀."""
    rng = np.random.default_rng(rng_seed)
    w0, delta = rng.standard_normal((2, d, d)) / math.sqrt(d)
    x = rng.standard_normal((n, d))
    y = x @ (w0 + delta).T
    a, b, s = f * rng.uniform(-1, 1, (r, d)) / math.sqrt(d), np.zeros((d, r)), alpha / r
    moments = [np.zeros((2, w.size)) for w in (a, b)]
    losses = []
    for t in range(1, steps + 1):
        error = x @ (w0 + s * b @ a).T - y
        losses.append(float((error * error).mean()))
        g = 2 / error.size * error.T @ x
        gradients = s * b.T @ g, s * g @ a.T
        for i, w in enumerate((a, b)):
            grad = np.ascontiguousarray(gradients[i]).reshape(-1)
            if grad.any():
                optim.adamw_step(w.reshape(-1), grad, *moments[i], t, eta[i], eps=0.0)
    return np.array(losses)


def _compare(one, other, call, why):
    with np.errstate(all="ignore"):
        off = np.abs(other / one - 1)
    off = np.where(np.isfinite(off), off, np.inf)
    step = int(np.argmax(off > 1e-9))
    assert off.max() < 1e-9, f"{call}: the two runs part at step {step}, by {off[step]:.1e} of the loss. {why}"


@check("14-2")
def _(answer, rng):
    cases = [(8.0, 0.01, 0.01, 32.0), (8.0, 0.01, 0.01, 1.0), (8.0, 0.01, 0.16, 8.0)]
    for _ in range(5):
        eta = float(rng.uniform(0.003, 0.02))
        cases.append((float(rng.uniform(2, 16)), eta, eta * float(rng.uniform(0.3, 8)), float(rng.uniform(1, 64))))
    for alpha, eta_a, eta_b, new_alpha in cases:
        call = f"exercise_2({alpha:.4g}, {eta_a:.4g}, {eta_b:.4g}, {new_alpha:.4g})"
        f, eta = _numbers(answer(alpha, eta_a, eta_b, new_alpha), 2, call)
        seed = int(rng.integers(1 << 30))
        one, other = _losses(seed, alpha, 1.0, (eta_a, eta_b)), _losses(seed, new_alpha, f, (eta, eta))
        _compare(
            one,
            other,
            call,
            "The rate of A over the size of A₀ must stay, and so must α times the size of A₀ times the rate of B.",
        )


def _family(seed, alpha, sizes, options, k, d=12, r=3, n=48, steps=25):
    """The losses of a regression with ΔW = s B A in float64, A₀ scaled by sizes[0], under exercise 3's four lines.

    options: (η, ε, λ, μ, c) of A and of B. Returns the losses and the norms of both gradients from the loss, (steps, 2).
    """
    rng = np.random.default_rng(seed)
    w0, delta = rng.standard_normal((2, d, d)) / math.sqrt(d)
    x = rng.standard_normal((n, d))
    y = x @ (w0 + delta).T
    factors, s = [sizes[0] * rng.uniform(-1, 1, (r, d)) / math.sqrt(d), np.zeros((d, r))], alpha / r
    m, v, losses, norms = [0.0, 0.0], [0.0, 0.0], [], []
    for t in range(1, steps + 1):
        a, b = factors
        error = x @ (w0 + s * b @ a).T - y
        losses.append(float((error * error).mean()))
        g = 2 / error.size * error.T @ x
        gradients = s * b.T @ g, s * g @ a.T
        norms.append([float(np.linalg.norm(grad)) for grad in gradients])
        for i, (grad, (eta, eps, decay, l2, clip)) in enumerate(zip(gradients, options, strict=True)):
            w, norm = factors[i], norms[-1][i]
            grad = grad * min(1.0, clip / norm) if norm > 0 else grad
            grad = grad + l2 * w
            m[i], v[i] = 0.9 * m[i] + 0.1 * grad, 0.999 * v[i] + 0.001 * grad * grad
            root = np.sqrt(v[i] / (1 - 0.999**t)) + eps
            factors[i] = w - eta * decay * w - eta * (m[i] / (1 - 0.9**t)) / root**k
    return np.array(losses), np.array(norms)


@check("14-3")
def _(answer, rng):
    cases = [(4.0, 8.0, 1.0), (0.5, 4.0, 1.0), (3.0, 0.7, 0.0), (0.6, 2.0, 0.5)]
    cases += [(*(float(x) for x in rng.uniform(0.3, 6, 2)), float(k)) for k in (1, 0, *rng.uniform(0.2, 1.5, 2))]
    for p, q, k in cases:
        eta, eps = 0.3 * 0.04 ** min(k, 1.0), float(10 ** rng.uniform(-4, -2))
        decay, l2 = float(rng.uniform(0.5, 2)), float(rng.uniform(0.002, 0.02))
        seed = int(rng.integers(1 << 30))
        free = _family(seed, 8.0, (1.0,), [(eta, eps, decay, l2, math.inf)] * 2, k)[1]
        clips = [float(np.median(norms)) for norms in free.T]  # so that about half of the steps are clipped
        before = [(eta, eps, decay, l2, clip) for clip in clips]
        after = [
            _numbers(answer(f, k, *options), 5, f"exercise_3({f:.4g}, {k:.3g}, …)")
            for f, options in zip((p, q), before, strict=True)
        ]
        with np.errstate(all="ignore"):
            one, other = _family(seed, 8.0, (1.0,), before, k)[0], _family(seed, 8.0 / (p * q), (p,), after, k)[0]
        assert np.isfinite(one).all()
        _compare(
            one,
            other,
            f"exercise_3 at k = {k:.3g}, called with p = {p:.4g} for A and {q:.4g} for B",
            "Go through the four lines: after the first two g must be 1/p of what it was, the decay must take the same share of w, "
            "and the step must be p times as large. What power of 1/p does √v̂ + ε, raised to k, bring?",
        )
