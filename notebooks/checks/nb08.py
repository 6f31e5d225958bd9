"""Checks of notebook 08, paged optimizers."""

import math
from functools import cache

import numpy as np
from grading import check

from tinylora import AdamW, Pager, Tensor
from tinylora.training.adamw8bit import adamw8bit_step


def _whole(got, what):
    assert isinstance(got, (int, np.integer)) and not isinstance(got, bool), f"{what}: expected an int, got {got!r}."
    return int(got)


def _fewest(uses, frames):
    """Faults, by trying every eviction."""

    @cache
    def from_here(i, resident):
        if i == len(uses):
            return 0
        if uses[i] in resident:
            return from_here(i + 1, resident)
        if len(resident) < frames:
            return 1 + from_here(i + 1, resident | {uses[i]})
        return 1 + min(from_here(i + 1, resident - {q} | {uses[i]}) for q in resident)

    return from_here(0, frozenset())


@check("08-1")
def _(answer, rng):
    "Fresh short lists against an exhaustive search, and orders whose optimum is known."
    cases = [([], 2), ([3, 3, 3], 1), ([0, 1, 0, 1], 1), (list(range(4)) * 3, 4), (list(range(4)) * 4, 3)]
    cases += [(rng.integers(0, 6, 24).tolist(), int(rng.integers(1, 5))) for _ in range(40)]
    for uses, frames in cases:
        got = _whole(answer(list(uses), frames), f"uses {uses}, {frames} frames")
        least = _fewest(tuple(uses), frames)
        assert got >= least, f"uses {uses}, {frames} frames: {got} faults cannot be reached; the fewest are more."
        assert got == least, f"uses {uses}, {frames} frames: {got} faults, but fewer are possible."
    for pages, frames in ((40, 20), (9, 4)):  # n − 1 uses in a circle have k − 1 hits, so n rounds come out even
        rounds = pages
        got = _whole(answer(list(range(pages)) * rounds, frames), f"{pages} pages round and round, {frames} frames")
        least = pages + pages * (pages - frames)
        assert got == least, (
            f"{pages} pages round and round, {rounds} times, {frames} frames: "
            f"{got} faults {'cannot be reached' if got < least else 'is not the fewest'}."
        )
        forth = [page for step in range(rounds) for page in list(range(pages))[:: (1, -1)[step % 2]]]
        got, least = answer(forth, frames), pages + (rounds - 1) * (pages - frames)
        assert got == least, (
            f"{pages} pages back and forth, {rounds} times, {frames} frames: {got} faults is not the fewest."
        )


def _moved(state, page_bytes, budget, steps, spikes, rng):
    """Bytes moved by a real optimizer, with the spikes at random steps."""
    p = Tensor(np.zeros(state // 8, np.float32), requires_grad=True)
    p.grad = np.ones(state // 8, np.float32)
    optimizer = AdamW([p], pager=Pager(budget, page_bytes, prefetch=False))
    at = set((1 + rng.permutation(steps - 1)[:spikes]).tolist())
    for step in range(steps):
        if step in at:
            optimizer.pager.evict_all()
        optimizer.step()
    return optimizer.pager.counters.bytes_moved


@check("08-2")
def _(answer, rng):
    "The bill of real runs, for budgets that are no whole number of pages, and for more than the state."
    cases = [(8 * 512, 512, 10**6, 5, 0), (8 * 512, 512, 8 * 512, 4, 2), (8 * 512, 512, 512, 1, 0)]
    cases += [(8 * 512, 512, 3 * 512, 1, 0), (8 * 512, 512, 3 * 512, 6, 0), (8 * 512, 512, 4 * 512 - 8, 6, 0)]
    for _ in range(12):
        page_bytes, n, steps = 8 * int(rng.integers(1, 40)), int(rng.integers(2, 12)), int(rng.integers(2, 9))
        budget = int(rng.integers(page_bytes, (n + 2) * page_bytes))
        cases.append((n * page_bytes, page_bytes, budget, steps, int(rng.integers(0, steps))))
    for state, page_bytes, budget, steps, spikes in cases:
        what = f"state {state}, pages of {page_bytes}, budget {budget}, {steps} steps, {spikes} spikes"
        got = answer(state, page_bytes, budget, steps, spikes)
        assert isinstance(got, (int, np.integer, float)), f"{what}: expected an int, got {got!r}."
        real = _moved(state, page_bytes, budget, steps, spikes, rng)
        assert got == real, f"{what}: predicted {got:,} bytes, and a real run moved {real:,}."


def _run(n, pieces, rule, p, grads):
    """p and the state after a step for each gradient, in pieces (start, end, first, last)."""
    p, blocks = p.copy(), -(-n // 256)
    codes, absmax = np.zeros((2, n), np.uint8), np.zeros((2, blocks), np.float32)
    for t, g in enumerate(grads, 1):
        for a, b, c, d in pieces:
            adamw8bit_step(p[a:b], g[a:b], *codes[:, a:b], *absmax[:, c:d], t, 1e-2, rule=rule)
    return p.tobytes(), codes.tobytes(), absmax.tobytes()


@check("08-3")
def _(answer, rng):
    "Pages that cover everything once, fit, are few, and give the bits of the whole."
    cases = [(256, 512), (1, 512), (257, 512), (1024, 2048), (5000, 2000), (10_000, 1 << 20), (2560, 1023)]
    cases += [(int(rng.integers(1, 6000)), int(rng.integers(512, 4000))) for _ in range(6)]
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


@check("08-4")
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
