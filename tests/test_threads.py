"""Work on two threads: the bits are those of one, errors arrive, and who has neighbours keeps to its core."""

import os
import select
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tinylora import AdamW, AdamW8bit, Pager, Tensor, quantize
from tinylora.kernels import dequantize, eightbit, rounding, threads
from tinylora.training import train


@pytest.fixture
def two(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")


def where(_):
    return threading.get_ident()


@pytest.mark.parametrize("n", [0, 1, 2, 3, 7])
def test_results_come_in_order_from_at_most_two_threads(n, two):
    half, began = -(-n // 2), threading.Event()

    def f(i):
        if i >= half:
            began.set()
        elif n > 1:
            assert began.wait(30), "the other half has not begun"
        return i * i, threading.get_ident()

    found = threads.side_by_side(f, iter(range(n)))
    assert [square for square, _ in found] == [i * i for i in range(n)]
    assert [ident for _, ident in found[:half]] == [threading.get_ident()] * half
    assert len({ident for _, ident in found}) == min(n, 2)


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


@pytest.mark.parametrize("bad", [0, 3], ids=["here", "in the other thread"])
def test_an_error_arrives_when_both_halves_are_over(bad, two):
    done = []

    other = threading.Event()

    def f(i):
        if i < 2:
            other.wait(30)
        other.set()
        if i == bad:
            raise ValueError(f"part {i}")
        time.sleep(0.05)
        done.append(i)

    with pytest.raises(ValueError, match=f"part {bad}"):
        threads.side_by_side(f, range(4))
    assert sorted(done) == ([2, 3] if bad == 0 else [0, 1, 2])


def test_errors_of_arithmetic_are_treated_as_in_the_caller(two):
    zero = np.zeros(4, np.float32)
    with np.errstate(all="ignore"):
        threads.side_by_side(lambda _: zero / zero, range(2))
    with np.errstate(all="raise"), pytest.raises(FloatingPointError):
        threads.side_by_side(lambda i: zero / zero if i else None, range(2))


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
    monkeypatch.setattr(threads, "_CHUNK", 512)
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
@pytest.mark.parametrize("page_bytes", [1 << 12, 1 << 60])
def test_both_optimizers_end_with_the_same_bits(kind, page_bytes, rng, monkeypatch):
    small_chunks(monkeypatch)
    start = [rng.standard_normal(n).astype(np.float32) for n in (5000, 12_345, 100)]
    gradients = [[rng.standard_normal(p.shape).astype(np.float32) for p in start] for _ in range(4)]

    def trained():
        params = [Tensor(p.copy(), requires_grad=True) for p in start]
        optimizer = kind(params, lr=1e-2, weight_decay=0.1, pager=Pager(page_bytes=page_bytes))
        for step in gradients:
            for p, g in zip(params, step, strict=True):
                p.grad = g.copy()
            optimizer.step()
        return [p.data.tobytes() for p in params] + [x.tobytes() for x in optimizer.state_dict().values()]

    assert on(1, monkeypatch, trained) == on(2, monkeypatch, trained)
