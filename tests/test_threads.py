"""Work on two threads: the bits are those of one, errors arrive, and who has neighbours keeps to its core."""

import os
import select
import signal
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tinylora import AdamW, AdamW8bit, Pager, Tensor, quantize
from tinylora.kernels import dequantize, eightbit, pagewise, rounding, threads
from tinylora.training import train


@pytest.fixture
def two(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")


def where(_):
    return threading.get_ident()


@pytest.mark.parametrize("n", [0, 1, 2, 3, 7])
def test_results_come_in_order_from_at_most_two_threads(n, two):
    both = threading.Barrier(2)

    def f(i):
        if i < 2 <= n:
            both.wait(30)  # each thread has taken a part
        return i * i, threading.get_ident()

    found = threads.side_by_side(f, iter(range(n)))
    assert [square for square, _ in found] == [i * i for i in range(n)]
    assert len({ident for _, ident in found}) == min(n, 2)
    assert not n or threading.get_ident() in {ident for _, ident in found}


def test_what_the_other_thread_has_no_time_for_is_done_here(two):
    """Several callers, as in somebody's own pool of threads: nobody waits for work that has not begun."""
    busy, free = threading.Event(), threading.Event()
    held = threads._helper().submit(lambda: busy.set() or free.wait(30))
    assert busy.wait(30)
    assert threads.side_by_side(where, range(4)) == [threading.get_ident()] * 4
    free.set()
    assert held.result(30)


def test_what_the_environment_allows_is_kept(monkeypatch):
    for asked, wanted in {"1": 1, "2": 2, "16": 2, "2,1": 2, "1,4": 1}.items():
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
        assert threads.width() == wanted
    for nothing in ("", "0", "many"):
        monkeypatch.setenv("OMP_NUM_THREADS", nothing)
        assert threads.width() == min(threads._cores(), 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert set(threads.side_by_side(where, range(4))) == {threading.get_ident()}


def test_a_worker_of_training_shares_nothing_out(two):
    with train.workers(2) as pool:
        assert list(pool.map(lambda _: threads.width(), range(4))) == [1] * 4
    assert threads.width() == 2
    with threads.alone():
        assert threads.width() == 1
        with threads.alone():
            pass
        assert threads.width() == 1
    assert threads.width() == 2


@pytest.mark.parametrize("here", [True, False], ids=["here", "in the other thread"])
def test_an_error_arrives_when_what_is_under_way_is_over_and_nothing_else_begins(here, two):
    begun, done, both, me = [], [], threading.Barrier(2), threading.get_ident()

    def f(i):
        begun.append(i)
        if i < 2:
            both.wait(30)
        if (threading.get_ident() == me) is here:
            raise ValueError("a bad part")
        time.sleep(0.2)
        done.append(i)

    with pytest.raises(ValueError, match="a bad part"):
        threads.side_by_side(f, range(8))
    assert sorted(begun) == [0, 1] and len(done) == 1


def test_a_thread_that_is_free_takes_the_next_part(two):
    """Parts of unequal size: while one thread is at the first, the other does all the rest."""
    rest, count = threading.Event(), []

    def f(i):
        if i == 0:
            assert rest.wait(30)
        else:
            count.append(i)
            if len(count) == 6:
                rest.set()
        return threading.get_ident()

    first, *others = threads.side_by_side(f, range(7))
    assert set(others) == {other for other in others if other != first}


def test_errors_of_arithmetic_are_treated_as_in_the_caller(two):
    zero, both, me = np.zeros(4, np.float32), threading.Barrier(2), threading.get_ident()

    def divide_there(_):
        both.wait(30)
        if threading.get_ident() != me:
            return zero / zero

    with np.errstate(all="ignore"):
        threads.side_by_side(divide_there, range(2))
    with np.errstate(all="raise"), pytest.raises(FloatingPointError):
        threads.side_by_side(divide_there, range(2))


def test_where_no_thread_can_be_started_the_work_is_done_here(two, monkeypatch):
    def none(thread):
        raise RuntimeError("can't start new thread")

    done = []
    threads._helper.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none)
        assert threads.side_by_side(where, range(4)) == [threading.get_ident()] * 4
        threads.side_by_side(done.append, range(4))
    threads.side_by_side(done.append, range(4, 8))
    assert sorted(done) == list(range(8)), "and nothing is done a second time when a thread can be started again"


def test_several_callers_at_once_get_each_its_own(two):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda k: threads.side_by_side(lambda i: (k, i), range(5)), range(40)))
    assert found == [[(k, i) for i in range(5)] for k in range(40)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_has_a_helper_of_its_own(two):
    threads.side_by_side(where, range(2))
    read, write = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            os.write(write, bytes(threads.side_by_side(lambda i: i + 1, range(4))))
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    if not select.select([read], [], [], 60)[0]:
        os.kill(child, signal.SIGKILL)
    assert os.read(read, 10) == bytes([1, 2, 3, 4])
    assert os.waitpid(child, 0)[1] == 0
    os.close(read)


# --------------------------------------------------------------------------------------------- the bits of one thread
def small_chunks(monkeypatch):
    monkeypatch.setattr(pagewise, "_PIECE", 512)
    monkeypatch.setattr(pagewise, "_WORTH", 0)
    monkeypatch.setattr(pagewise, "_LEAST", 0)
    monkeypatch.setattr(eightbit, "CHUNK", 512)
    monkeypatch.setattr(rounding, "_CHUNK", 512)
    monkeypatch.setattr(dequantize, "_CHUNK", 512)


def on(n, monkeypatch, f):
    monkeypatch.setenv("OMP_NUM_THREADS", str(n))
    return f()


@pytest.mark.parametrize("n", [1024, 5000, 40_001])
@pytest.mark.parametrize("code, double", [("nf4", True), ("fp4", False)])
def test_quantizing_and_dequantizing_give_the_same_bits(n, code, double, rng, monkeypatch):
    small_chunks(monkeypatch)
    w = rng.standard_normal(n).astype(np.float32)
    one, two = (on(k, monkeypatch, lambda: quantize(w, code, 64, double_quant=double)) for k in (1, 2))
    assert one.packed.tobytes() == two.packed.tobytes() and one.absmax.tobytes() == two.absmax.tobytes()
    for large in (0, 1 << 30):
        monkeypatch.setattr(dequantize, "_LARGE", large)
        plain, shared = (on(k, monkeypatch, one.dequantize) for k in (1, 2))
        assert plain.tobytes() == shared.tobytes()


@pytest.mark.parametrize("kind", [AdamW, AdamW8bit])
@pytest.mark.parametrize("page_bytes, budget", [(1 << 12, None), (1 << 12, 1 << 14), (1 << 60, None)])
def test_both_optimizers_end_with_the_same_bits(kind, page_bytes, budget, rng, monkeypatch):
    small_chunks(monkeypatch)
    start = [rng.standard_normal(n).astype(np.float32) for n in (5000, 12_345, 100)]
    gradients = [[rng.standard_normal(p.shape).astype(np.float32) for p in start] for _ in range(4)]

    def trained():
        params = [Tensor(p.copy(), requires_grad=True) for p in start]
        pager = Pager(budget, page_bytes=page_bytes, trace=True)
        optimizer = kind(params, lr=1e-2, weight_decay=0.1, pager=pager)
        for step in gradients:
            for p, g in zip(params, step, strict=True):
                p.grad = g.copy()
            optimizer.step()
        moved = pager.trace, pager.peak_resident_bytes
        return moved, [p.data.tobytes() for p in params], [x.tobytes() for x in optimizer.state_dict().values()]

    assert on(1, monkeypatch, trained) == on(2, monkeypatch, trained)


# ---------------------------------------------------------------------------------------------------------- a step over pages
@pytest.fixture
def small_pages(two, monkeypatch):
    """Pages of any size come together, in pieces of 8; one thread, so that the order can be told."""
    for name, value in {"_PIECE": 8, "_LEAST": 0, "_WORTH": 1 << 30}.items():
        monkeypatch.setattr(pagewise, name, value)


def steps(pager, numbers):
    """What `over_pages` calls, with each page's elements counted up by one: [(k, first, elements)]."""
    calls = []

    def update(k, page, first):
        page += 1
        calls.append((k, first, page.shape[1]))

    pagewise.over_pages(update, pager, numbers)
    return calls


def test_pages_come_in_pieces_and_in_groups_that_the_budget_holds(small_pages, monkeypatch):
    pager = Pager(2 * 160, page_bytes=160)  # pages of 2 x 20, two of them resident
    numbers = pager.allocate(2, 50)
    assert steps(pager, numbers) == [
        *((0, 0, 8), (0, 8, 8), (0, 16, 4), (1, 0, 8), (1, 8, 8), (1, 16, 4)),
        *((2, 0, 8), (2, 8, 2)),
    ]
    assert pager.read(numbers).tolist() == [[1.0] * 50] * 2 and pager.peak_resident_bytes == 320

    def groups():
        places = [(k, number, None) for k, number in enumerate(numbers)]
        return [[k for k, *_ in group] for group in pagewise._groups(pager, places)]

    assert groups() == [[0, 1], [2]], "what the budget holds"
    monkeypatch.setattr(pagewise, "_LEAST", 15)
    pager.budget = 1000
    assert groups() == [[0, 1], [2]], "a small page begins a group"
    monkeypatch.setattr(pagewise, "_LEAST", 0)
    assert groups() == [[0, 1, 2]]
    monkeypatch.setattr(pagewise, "_TOGETHER", 30)
    assert groups() == [[0], [1, 2]], "and no more than is worth it"
    monkeypatch.setattr(pagewise, "_TOGETHER", 1 << 22)
    pager.prefetch = True
    assert groups() == [[0], [1], [2]], "the next page comes beside the one in use"


class Short:
    """Memory for so many bytes of frames: a pool's `exchange` that counts the frames that somebody still holds."""

    def __init__(self, pager, nbytes):
        self.exchange, self.nbytes, self.frames, self.most = pager.pool.exchange, nbytes, [], 0
        pager.pool.exchange = self

    def held(self):
        self.frames = [frame for frame in self.frames if frame() is not None]
        return sum({id(frame()): frame().nbytes for frame in self.frames}.values())

    def __call__(self, back, source, ahead=False):
        freed = back[-1][0].nbytes if back else 0
        if source is not None and self.held() - freed + source.nbytes > self.nbytes:
            self.exchange(back, None)  # what was to go has gone
            if self.held() + source.nbytes > self.nbytes:
                raise MemoryError
        frame = self.exchange(back, source, ahead)
        if source is not None:
            self.frames.append(weakref.ref(frame))
            self.most = max(self.most, self.held())
        return frame


@pytest.mark.parametrize("sizes", [[20] * 5, [20, 21, 22, 23, 24]], ids=["of one size", "of five sizes"])
def test_where_memory_runs_out_before_the_budget_pages_come_one_at_a_time(sizes, small_pages):
    """A page that went for another of its group is out of reach: what is written to its old frame would be lost."""
    pager = Pager(1 << 20, page_bytes=1 << 10)
    numbers = [i for n in sizes for i in pager.allocate(2, n)]
    memory = Short(pager, 400)
    assert {(k, first) for k, first, _ in steps(pager, numbers)} == {(k, i) for k in range(5) for i in (0, 8, 16)}
    assert memory.most <= 400 and pager.counters.evictions >= 3
    for number in numbers:
        assert (pager.read([number]) == 1).all()


def test_no_frame_is_held_beyond_the_budget(small_pages):
    """Frames of unequal sizes are not used again; those of the group before must be gone."""
    pager = Pager(400, page_bytes=200)
    numbers = [i for n in (20, 21, 22, 23, 24) for i in pager.allocate(2, n)]
    memory = Short(pager, 1 << 20)
    steps(pager, numbers)
    assert memory.most <= 400 and pager.peak_resident_bytes <= 400
