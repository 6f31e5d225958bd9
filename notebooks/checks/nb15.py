"""Checks of notebook 15, switching and combining adapters."""

import numpy as np
from grading import check, peak


def _combined(found, out, n_in, r, call):
    assert isinstance(found, tuple | list) and len(found) == 3, f"{call} should return (B, A, error)."
    b, a, error = np.asarray(found[0]), np.asarray(found[1]), found[2]
    assert b.shape == (out, r) and a.shape == (r, n_in), (
        f"{call}: expected B {(out, r)} and A {(r, n_in)}, got {b.shape} and {a.shape}. If r is larger than the rank, zeros fill up."
    )
    assert np.ndim(error) == 0 and np.isfinite(error), (
        f"{call}: the error should be one finite number; it is {error!r}."
    )
    return b, a, float(error)


@check("15-1")
def _(answer, rng):
    for case in range(8):
        out, n_in = int(rng.integers(12, 30)), int(rng.integers(12, 30))
        ranks = rng.integers(1, 4, int(rng.integers(2, 4))).tolist()
        parts = [
            (float(rng.uniform(0.3, 2)), rng.standard_normal((out, q)), rng.standard_normal((q, n_in))) for q in ranks
        ]
        r = int(rng.integers(1, sum(ranks) + 1))
        if case % 2:
            parts[0] = (-parts[0][0], *parts[0][1:])
        if case == 6:  # one A for all: the rank of the sum is that of one
            ranks = [2, 2, 2]
            a = rng.standard_normal((2, n_in))
            parts, r = [(float(rng.uniform(0.3, 2)), rng.standard_normal((out, 2)), a) for _ in ranks], 2
        if case == 7:
            r = sum(ranks) + 3
        wanted = sum(c * (b @ a) for c, b, a in parts)
        sigma = np.linalg.svd(wanted, compute_uv=False)
        least, size = float(np.sqrt((sigma[r:] ** 2).sum())), float(np.linalg.norm(wanted))
        call = f"exercise_1 with ranks {ranks}, c = {[round(c, 2) for c, *_ in parts]} and r = {r}"
        given = [(c, b.copy(), a.copy()) for c, b, a in parts]
        b, a, error = _combined(answer(parts, r), out, n_in, r, call)
        for (_, b0, a0), (_, b1, a1) in zip(parts, given, strict=True):
            assert (b0 == b1).all() and (a0 == a1).all(), (
                "exercise_1 changes its arguments; they should stay as they are."
            )
        missed = float(np.linalg.norm(b @ a - wanted))
        assert missed < least + 1e-9 * size, (
            f"{call}: B A misses the sum by {missed:.4g}, and {least:.4g} is possible"
            f"{' (it is exact: these adapters share their A)' if case == 6 else ''}."
        )
        assert abs(error - least) < 1e-7 * size, f"{call}: the error returned is {error:.4g}; it should be {least:.4g}."
    n = 900
    parts = [(1.0, rng.standard_normal((n, 3)), rng.standard_normal((3, n))) for _ in range(2)]
    taken = peak(answer, parts, 3)
    assert taken < n * n * 8 // 2, (
        f"For {n} × {n} the call takes {taken:,} bytes; one matrix of that shape has {8 * n * n:,}. It should not be formed."
    )


@check("15-2")
def _(answer, rng):
    for case in range(6):
        rows, tokens, n_in, n_out, r, n = (int(v) for v in rng.integers(2, 8, 6))
        A, B = rng.standard_normal((n, r, n_in)), rng.standard_normal((n, n_out, r))
        x, W0, s = rng.standard_normal((rows, tokens, n_in)), rng.standard_normal((n_out, n_in)), rng.uniform(0.3, 3, n)
        which = rng.integers(-1, n, rows)
        which[0] = -1 if case % 2 == 0 else n - 1
        which = np.full(rows, -1) if case == 4 else which
        given = [v.copy() for v in (x, W0, A, B, s, which)]
        wanted = np.stack(
            [v @ W0.T + (s[t] * (v @ A[t].T) @ B[t].T if t >= 0 else 0) for v, t in zip(x, which, strict=True)]
        )
        found = np.asarray(answer(x, W0, A, B, s, which))
        call = f"exercise_2 with which = {which.tolist()} and {n} adapters"
        assert found.shape == wanted.shape, f"{call} should return the shape {wanted.shape}; it returned {found.shape}."
        for v, before in zip((x, W0, A, B, s, which), given, strict=True):
            assert (v == before).all(), "exercise_2 changes an argument; they should stay as they are."
        off = np.abs(found - wanted).max(axis=(1, 2))
        worst = int(off.argmax())
        assert off[worst] < 1e-10 * max(1, np.abs(wanted).max()), (
            f"{call}: row {worst} (which = {which[worst]}) is off by {off[worst]:.2g} from the same row alone."
        )
    rows, n, d, r = 12, 6, 256, 2
    x, W0 = rng.standard_normal((rows, 2, d)), rng.standard_normal((d, d))
    A, B, s = rng.standard_normal((n, r, d)), rng.standard_normal((n, d, r)), rng.uniform(0.3, 3, n)
    which = rng.integers(-1, n, rows)
    taken = peak(answer, x, W0, A, B, s, which)
    assert taken < 8 * d * d - 1, (
        f"With W0 {d} × {d} the call takes {taken:,} bytes, and W0 has {W0.nbytes:,}: a ΔW is formed. Go through the rank instead."
    )
