"""Checks of notebook 08, paged optimizers."""

from functools import cache

import numpy as np
from grading import check

from tinylora import AdamW, Pager, Tensor


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
