"""Two pieces of elementwise work at a time: NumPy computes on one core, and releases the interpreter's lock meanwhile.

    side_by_side(f, parts) = [f(part) for part in parts]
    elementwise(step, vectors, *numbers) = step(*vectors, *numbers)            in chunks that stay in the cache

Each part must be worth a thread: between two NumPy calls a thread takes the lock back, so that pieces of 16K elements are
slower on two threads than on one. No element depends on how the work is shared out, and so no bit does. Two threads are what was measured;
more are never taken. In the times of figures/bench.md, dequantizing 16M weights takes 0.61 of one thread's time, quantizing 0.62, a step of
AdamW 0.70, and one of AdamW in 8 bits, which looks more up than it computes, 0.75.

A thread of `training.train.workers` has its core to itself and no other: there, work stays in the thread (`stay`).
"""

import contextlib
import contextvars
import os
import sys
import threading
from functools import cache

import numpy as np

from ..backend import array_module
from .buffers import buffer

_CHUNK = 1 << 17  # elements

_here = threading.local()


def stay():
    """From now on this thread shares no work out: its neighbours have work of their own."""
    _here.alone = True


@contextlib.contextmanager
def alone():
    """Within the block this thread shares no work out."""
    before, _here.alone = getattr(_here, "alone", False), True
    try:
        yield
    finally:
        _here.alone = before


def width():
    """How many threads may compute for this one, 1 or 2: what OMP_NUM_THREADS allows, else the cores that this process may use."""
    if getattr(_here, "alone", False) or sys.platform == "emscripten":  # a browser starts no threads
        return 1
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return min(int(asked), 2) if asked.isdigit() and int(asked) else min(_cores(), 2)


def _cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _helper():
    """The other thread, which stays for the next time. RuntimeError where no thread can be started; nothing waits in its queue then."""
    from concurrent.futures import ThreadPoolExecutor

    pool = ThreadPoolExecutor(1, thread_name_prefix="tinylora", initializer=stay)
    pool.submit(int)
    return pool


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_helper.cache_clear)  # a forked process has no threads but its own


def side_by_side(f, parts):
    """[f(part) for part in parts], the second half in the other thread unless somebody else keeps it busy. f writes to its part alone."""
    parts = list(parts)
    half = -(-len(parts) // 2)
    if len(parts) < 2 or width() < 2:
        return [f(part) for part in parts]
    context = contextvars.copy_context()  # np.errstate counts in it, too
    try:
        other = _helper().submit(context.run, lambda: [f(part) for part in parts[half:]])
    except RuntimeError:  # no thread can be started, or the interpreter is about to end
        return [f(part) for part in parts]
    try:
        mine = [f(part) for part in parts[:half]]
    finally:
        begun = not other.cancel()
        if begun:
            _wait_for(other)
    return mine + (other.result() if begun else [f(part) for part in parts[half:]])


def _wait_for(future):
    """Return when it is over, after Ctrl-C too: nobody may write to the caller's arrays any more."""
    try:
        future.exception()
    except KeyboardInterrupt:
        future.exception()
        raise


def elementwise(step, vectors, *numbers):
    """step(*vectors, *numbers) in place, for a step that knows no neighbours. On NumPy it gets `scratch`, (2, n) float32 to compute in."""
    n = len(vectors[0])
    if array_module(vectors[0]) is not np:
        return step(*vectors, *numbers)

    def chunk(start):
        scratch = buffer("scratch", (2, min(_CHUNK, n)))
        step(*(x[start : start + _CHUNK] for x in vectors), *numbers, scratch=scratch)

    side_by_side(chunk, range(0, n, _CHUNK))
