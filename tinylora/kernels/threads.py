"""Two pieces of elementwise work at a time: NumPy computes on one core, and releases the interpreter's lock meanwhile.

    side_by_side(f, parts) = [f(part) for part in parts]

A thread takes the next part as soon as it has done one: the other may begin a quarter of a millisecond late. Each part must be worth a
thread: between two NumPy calls a thread takes the lock back, so that pieces of 16K elements are slower on two threads than on one. No
element depends on how the work is shared out, and so no bit does. Two threads are what was measured; more are never taken. On two cores
with AVX-512, quantizing 64M weights and dequantizing 16M take 0.64 of one thread's time, and steps of AdamW and of AdamW in 8 bits on 10M
parameters 0.65 and 0.63.

A thread of `training.train.workers` has its core to itself and no other: there, work stays in the thread (`stay`).
"""

import contextlib
import contextvars
import os
import sys
import threading
from collections import deque
from functools import cache

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
    """[f(part) for part in parts], where the other thread helps unless somebody else keeps it busy. f writes to its part alone.

    After an error no other part is begun, and the error is raised when those under way are over.
    """
    parts = list(parts)
    if len(parts) < 2 or width() < 2:
        return [f(part) for part in parts]
    found, ends = [None] * len(parts), (None, None)  # one for each thread
    left = deque((*range(len(parts)), *ends))

    def work():
        try:
            for i in iter(left.popleft, None):
                found[i] = f(parts[i])
        except BaseException:
            left.extendleft(ends)
            raise

    context = contextvars.copy_context()  # np.errstate counts in it, too
    try:
        other = _helper().submit(context.run, work)
    except RuntimeError:  # no thread can be started, or the interpreter is about to end
        return [f(part) for part in parts]
    try:
        work()
    finally:
        if not other.cancel():
            _wait_for(other)
    if not other.cancelled():
        other.result()
    return found


def _wait_for(future):
    """Return when it is over, after Ctrl-C too: nobody may write to the caller's arrays any more."""
    try:
        future.exception()
    except KeyboardInterrupt:
        future.exception()
        raise
