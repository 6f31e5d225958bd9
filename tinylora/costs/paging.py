"""What paging costs: bytes moved and time against the budget, and the same bits throughout.

One AdamW, with the budget at 100 % down to 5 % of its state, beside the plain one without a budget:

    around            pages first to last in every step. The least recently used page is always the one that is needed next, so any budget
                      below 100 % moves the whole state in and out: 2 · state bytes a step
    back and forth    every second step from last to first. What the last step used last is still there: 2 · (state − budget) bytes a step,
                      give or take a page

Time is a ratio to the plain optimizer, measured in turns (every setting once a round, medians over the rounds).
"""

import hashlib
import itertools
import time
from dataclasses import dataclass

import numpy as np

from .. import backend
from ..optim import AdamW
from ..paging import Pager
from ..tensor import Tensor

FRACTIONS = (1.0, 0.75, 0.5, 0.25, 0.1, 0.05)


@dataclass
class Cost:
    """What one setting cost: `fraction` of the state resident at most, bytes moved a step, seconds over the plain optimizer's."""

    fraction: float
    order: str  # "around", "back and forth"
    prefetch: bool
    bytes_moved: float
    faults: float  # uses of a page that had to wait for it, a step
    time_ratio: float
    digest: str  # of the parameters in the end


class _Around(AdamW):
    back_and_forth = False


def _optimizer(n, pager, around=False):
    start = np.random.default_rng(0).standard_normal(n, dtype=np.float32)
    p = Tensor(backend.move(start, pager.xp), requires_grad=True)
    return (_Around if around else AdamW)([p], lr=1e-3, pager=pager)


def measure(
    elements=1 << 22,
    page_bytes=1 << 18,
    pool="file",
    fractions=FRACTIONS,
    prefetch=(False, True),
    rounds=5,
    device="cpu",
):
    """([Cost], state bytes, whether all parameters ended with the same bits): two steps a round, after two that fill the frames.

    elements: float32 parameters; the state is 8 bytes each. Budgets below one page are left out, and prefetching where two do not fit.
    """
    state, grads = 8 * elements, np.random.default_rng(1).standard_normal((2, elements), dtype=np.float32)
    if state < 2 * page_bytes:
        raise ValueError(
            f"paging: {elements} elements have {state} bytes of state; expected two pages of {page_bytes} or more"
        )
    grads = [backend.move(g, device) for g in grads]
    optimizers = {None: _optimizer(elements, Pager(device=device))}
    for fraction, order, ahead in itertools.product(fractions, ("around", "back and forth"), prefetch):
        budget = int(fraction * state)
        if budget >= (2 if ahead else 1) * page_bytes:
            pager = Pager(budget, page_bytes, pool, device, prefetch=ahead)
            optimizers[fraction, order, ahead] = _optimizer(elements, pager, order == "around")
    for optimizer in optimizers.values():
        _seconds(optimizer, grads)
    before = {key: (o.pager.counters.bytes_moved, o.pager.counters.faults) for key, o in optimizers.items()}
    seconds = [{key: _seconds(optimizer, grads) for key, optimizer in optimizers.items()} for _ in range(rounds)]
    digests = {key: _digest(o.groups[0]["params"][0].numpy()) for key, o in optimizers.items()}
    del optimizers[None]
    costs, n = [], rounds * len(grads)
    for key, optimizer in optimizers.items():
        c, (moved, faults) = optimizer.pager.counters, before[key]
        ratio = float(np.median([row[key] / row[None] for row in seconds]))
        costs.append(Cost(*key, (c.bytes_moved - moved) / n, (c.faults - faults) / n, ratio, digests[key]))
    return costs, state, len(set(digests.values())) == 1


def most_bytes(elements, pool="file", fractions=FRACTIONS):
    """About what `measure` holds: two gradients, and of each setting the parameters, the state's resident share and a pool in memory."""
    settings = 4 * len(fractions)
    resident = 1 + 4 * sum(fractions) + (settings if pool != "file" else 0)
    return elements * (2 * 4 + 4 * (1 + settings) + int(8 * resident))


def _seconds(optimizer, grads):
    """The time of one step with each of the gradients."""
    began = time.perf_counter()
    for g in grads:
        optimizer.groups[0]["params"][0].grad = g
        optimizer.step()
    if optimizer.pager.xp is not np:
        optimizer.pager.xp.cuda.get_current_stream().synchronize()
    return time.perf_counter() - began


def _digest(array):
    return hashlib.sha256(array.tobytes()).hexdigest()[:16]


def predicted(fraction, order, state):
    """Bytes moved a step: 0 at 100 %, else 2 · state around and 2 · (state − budget) back and forth."""
    if fraction >= 1:
        return 0
    return 2 * state * (1 if order == "around" else 1 - fraction)


def describe(costs, state, same):
    """The table, as text."""
    head = f"{'budget':>8}  {'order':<15}{'prefetch':<10}{'bytes moved a step':>20}{'of 2 · state':>14}{'waits a step':>14}{'time':>8}"
    lines = [f"state: {state:,} bytes; time: over the optimizer without a budget", head]
    for c in costs:
        share = f"{100 * c.bytes_moved / (2 * state):.1f} %"
        lines.append(
            f"{100 * c.fraction:>6.0f} %  {c.order:<15}{'yes' if c.prefetch else 'no':<10}{c.bytes_moved:>20,.0f}{share:>14}"
            f"{c.faults:>14,.1f}{c.time_ratio:>7.2f}x"
        )
    return "\n".join([*lines, f"parameters: {'the same bits in every setting' if same else 'DIFFERENT BITS'}"])
