"""Checks of notebook 19, states in 8 bits."""

import math

import numpy as np
from grading import check

from tinylora.training.adamw8bit import adamw8bit_step


def _run(n, pieces, rule, p, grads):
    """p and the state after a step for each gradient, in pieces (start, end, first, last)."""
    p, blocks = p.copy(), -(-n // 256)
    codes, absmax = np.zeros((2, n), np.uint8), np.zeros((2, blocks), np.float32)
    for t, g in enumerate(grads, 1):
        for a, b, c, d in pieces:
            adamw8bit_step(p[a:b], g[a:b], *codes[:, a:b], *absmax[:, c:d], t, 1e-2, rule=rule)
    return p.tobytes(), codes.tobytes(), absmax.tobytes()


@check("19-1")
def _(answer, rng):
    "Pages that cover everything once, fit, are few, and give the bits of the whole."
    cases = [(256, 512), (1, 512), (257, 512), (1024, 2048), (3000, 2000), (3000, 1 << 20), (1536, 1023)]
    cases += [(int(rng.integers(1, 3000)), int(rng.integers(512, 3000))) for _ in range(4)]
    for n, page_bytes in cases:
        what = f"{n:,} parameters in pages of {page_bytes:,} bytes"
        pieces = [tuple(int(i) for i in piece) for piece in answer(n, page_bytes)]
        assert all(len(piece) == 4 for piece in pieces), f"{what}: expected (start, end, first, last) for each page."
        covered = [i for a, b, _, _ in pieces for i in range(a, b)]
        assert covered == list(range(n)), f"{what}: the pages do not cover 0 … {n - 1} once and in order."
        largest = max(2 * (b - a) for a, b, _, _ in pieces)
        assert largest <= page_bytes, (
            f"{what}: a page holds two codes for each parameter; the largest has {largest:,} bytes."
        )
        p, grads = rng.standard_normal(n).astype(np.float32), rng.standard_normal((2, n)).astype(np.float32)
        grads *= 10.0 ** rng.uniform(-3, 1, n).astype(np.float32)
        for rule in ("bitsandbytes-cpu", "bitsandbytes-cuda"):
            whole = _run(n, [(0, n, 0, -(-n // 256))], rule, p, grads)
            try:
                same = _run(n, pieces, rule, p, grads) == whole
            except ValueError as error:
                raise AssertionError(f"{what}: the step refuses a page. {error}") from None
            assert same, f"{what}: after two steps the bits are not those of a step over the whole."
        fewest = math.ceil(n / (page_bytes // 512 * 256))
        assert len(pieces) == fewest, f"{what}: {len(pieces)} pages, and {fewest} would do."


@check("19-2")
def _(answer, rng):
    "The library's own drift, for other rates and betas, from the first step on."
    cases = [(100, 1e-3, 0.9, 0.999), (1, 1e-3, 0.9, 0.999), (2, 1e-3, 0.9, 0.999), (5, 0.1, 0.5, 0.99)]
    cases += [
        (
            int(rng.integers(3, 150)),
            float(10 ** rng.uniform(-4, -1)),
            *map(float, rng.uniform((0.3, 0.9), (0.95, 0.999))),
        )
        for _ in range(5)
    ]
    for steps, lr, b1, b2 in cases:
        g = np.zeros(256, np.float32)
        g[rng.permutation(256)[:100]] = 10 ** rng.uniform(-1, 1)
        p, codes, absmax = np.zeros(256, np.float32), np.zeros((2, 256), np.uint8), np.zeros((2, 1), np.float32)
        for t in range(1, steps + 1):
            adamw8bit_step(p, g, *codes, *absmax, t, lr, (b1, b2), weight_decay=0)
        real, got = float(p[g == 0][0]), float(answer(steps, lr, b1, b2))
        assert abs(got - real) <= 0.01 * abs(real), (
            f"{steps} steps, lr {lr:.3g}, betas {b1:.3g} and {b2:.4g}: predicted {got:.4g}, the library has {real:.4g}."
        )
