"""Random walks through the pager and through paged optimizers, beside plain arrays and an unpaged optimizer that do the same.

hypothesis draws operations and failures in any order: the pager allocates, pages in, is written through, evicts and resumes, and now and
then a copy, an allocation or the disk fails. After each step the pages hold what was written, and the books add up.
"""

import contextlib
import copy
import itertools
import os
import pickle
import threading
from unittest import mock

import fake_cupy
import numpy as np
import pytest

pytest.importorskip("hypothesis")

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tinylora import AdamW, Pager, Tensor, backend
from tinylora.kernels import copies, pools
from tinylora.training.adamw8bit import AdamW8bit

PLACES = [("host", np), ("file", np), ("host", fake_cupy), ("file", fake_cupy), ("managed", fake_cupy)]
BUDGETS = [None, 128, 192, 320, 10**6]


# ------------------------------------------------------------------------------------------------------------------ the injector
class Faults:
    """Lets the n-th call of one kind fail, and the `times - 1` calls after it.

    kinds   "copy" (a page into a frame or back; half of it is copied before), "memory" (a frame), "disk" (room for pages), "thread"
    """

    def __init__(self):
        self._kind, self._calls, self.raised = None, range(0), 0
        self._count = itertools.count()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def armed(self, kind, error, n, times):
        """Within the block that kind of call fails with `error`; afterwards nothing fails."""
        self._kind, self._error, self._calls, self._count = kind, error, range(n, n + times), itertools.count()
        self.raised = 0
        try:
            yield self
        finally:
            self._kind = None

    def due(self, kind):
        """Whether this call of that kind is one that fails."""
        with self._lock:
            return kind == self._kind and next(self._count) in self._calls

    def call(self, kind, function, *arguments, **options):
        if self.due(kind):
            self.fail()
        return function(*arguments, **options)

    def fail(self):
        self.raised += 1
        raise self._error("injected")

    @contextlib.contextmanager
    def installed(self):
        """The shims in place of what a pager's pools call; only for pagers that are made already."""
        faults = self

        class Watched(np.ndarray):
            """A page or a frame on the host that notices when it is overwritten; its views do not."""

            mapped = None  # the name under which a page of a file, too, knows that it is no view

            def __setitem__(self, key, value):
                if self.mapped is not None and faults.due("copy"):
                    half = self.shape[-1] // 2
                    np.ndarray.__setitem__(self, (slice(None), slice(half)), value[:, :half])
                    faults.fail()
                np.ndarray.__setitem__(self, key, value)

        def watched(array):
            array = array.view(Watched)
            array.mapped = True
            return array

        class NumPy:
            def __getattr__(self, name):
                return getattr(np, name)

            def empty(self, *arguments):
                return watched(faults.call("memory", np.empty, *arguments))

        def patched(module, name, kind):
            function = getattr(module, name)
            return mock.patch.object(module, name, lambda *a, **k: faults.call(kind, function, *a, **k))

        zeros = copies.pinned_zeros

        def pinned_zeros(xp, *arguments):
            page = faults.call("disk", zeros, xp, *arguments)
            return watched(page) if xp is np else page

        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(pools, "np", NumPy()))
            stack.enter_context(mock.patch.object(copies, "pinned_zeros", pinned_zeros))
            stack.enter_context(mock.patch.object(pools._Mapped, "__setitem__", Watched.__setitem__, create=True))
            for module, name, kind in (
                (copies, "copy_to_host", "copy"),
                (copies, "copy_to_device", "copy"),
                (copies, "prefetch_managed", "copy"),
                (copies, "managed_zeros", "disk"),
                (fake_cupy, "empty", "memory"),
                (pools.mmap, "mmap", "disk"),
                (threading.Thread, "start", "thread"),
            ):
                stack.enter_context(patched(module, name, kind))
            if hasattr(os, "posix_fallocate"):
                stack.enter_context(patched(os, "posix_fallocate", "disk"))
            yield


KINDS = {
    "copy": (OSError, MemoryError),
    "memory": (MemoryError,),
    "disk": (OSError, MemoryError),
    "thread": (RuntimeError,),
}
failures = st.sampled_from([(kind, error) for kind, errors in KINDS.items() for error in errors]).flatmap(
    lambda both: st.tuples(st.just(both[0]), st.just(both[1]), st.integers(0, 3), st.sampled_from([1, 1, 2, 100]))
)


class WithFaults(RuleBasedStateMachine):
    """What both machines share: the injector, and copies on a stream that come early or late."""

    def start(self, lazy):
        self.faults, self.stack = Faults(), contextlib.ExitStack()
        self.stack.enter_context(mock.patch.dict(fake_cupy.streams, lazy=lazy))

    def teardown(self):
        if hasattr(self, "stack"):
            self.stack.close()

    @contextlib.contextmanager
    def failing(self, failure, pager):
        """Within the block that failure is in force, and only it may be seen. Yields a list that then holds it."""
        seen = []
        pager.pool.finish()  # a thread that still copies would make the count of calls a matter of chance
        with self.faults.armed(*failure) as faults:
            try:
                yield seen
            except (OSError, MemoryError, RuntimeError) as error:
                assert faults.raised and "injected" in str(error), error
                seen.append(error)
            pager.pool.finish()


def books_add_up(pager):
    """The counters against the table, the trace and the budget."""
    c, frames = pager.counters, sum(frame.nbytes for frame in pager._resident.values())
    coming = pager._pages[pager._coming[0]].nbytes if pager._coming else 0
    assert pager.resident_bytes == frames + coming <= pager.peak_resident_bytes
    sums = dict.fromkeys(("hit", "fault", "prefetch", "evict"), 0)
    for _, _, event, nbytes in pager.trace:
        sums[event] += nbytes
    counts = {event: sum(line[2] == event for line in pager.trace) for event in sums}
    assert (c.hits, c.faults, c.prefetches) == (counts["hit"], counts["fault"], counts["prefetch"])
    assert c.evictions == counts["evict"]
    assert (c.bytes_in, c.bytes_out) == (sums["fault"] + sums["prefetch"], sums["evict"])
    assert c.bytes_moved == c.bytes_in + c.bytes_out
    assert c.bytes_in - c.bytes_out == frames
    for number, frame in pager._resident.items():
        assert frame.shape == pager._pages[number].shape and frame.dtype == pager._pages[number].dtype


# --------------------------------------------------------------------------------------------------------------------- the pager
class PagerMachine(WithFaults):
    """A Pager beside `arrays`: [(page numbers, the values that they should hold)]."""

    @initialize(
        place=st.sampled_from(PLACES), budget=st.sampled_from(BUDGETS), page_bytes=st.sampled_from([64, 128]),
        prefetch=st.booleans(), lazy=st.booleans(), whole_tensors=st.sampled_from([False, False, False, True]),
    )  # fmt: skip
    def make(self, place, budget, page_bytes, prefetch, lazy, whole_tensors):
        self.start(lazy)
        pool, self.xp = place
        self.pager = Pager(budget, page_bytes, pool, self.xp, True, prefetch, whole_tensors)
        self.stack.enter_context(self.faults.installed())
        self.arrays, self.uses, self.most = [], 0, 0

    def values(self, shape, dtype, seed):
        rng = np.random.default_rng(seed)
        return (
            rng.integers(0, 255, shape).astype(dtype) if dtype == np.uint8 else rng.standard_normal(shape).astype(dtype)
        )

    def chosen(self, where):
        """(page numbers, values, and one of the pages' places) that a number chooses."""
        pages, values = self.arrays[where % len(self.arrays)]
        return pages, values, where // len(self.arrays) % len(pages)

    def held(self):
        """Every page holds what was written."""
        for pages, values in self.arrays:
            read = self.pager.read(pages)
            assert read.dtype == values.dtype and read.tobytes() == values.tobytes()

    # ---------------------------------------------------------------------------------------------------------------- operations
    def allocate(self, rows, n, dtype, multiple):
        before = len(self.pager), self.pager.total_bytes
        itemsize, budget = np.dtype(dtype).itemsize, self.pager.budget
        k = max(self.pager.page_bytes // (itemsize * rows) // multiple, 1) * multiple
        largest, whole = rows * min(k, n) * itemsize, self.pager.whole_tensors
        try:
            pages = self.pager.allocate(rows, n, dtype, multiple)
        except ValueError as error:
            assert "exceeds the budget" in str(error) and not whole and largest > budget
            assert before == (len(self.pager), self.pager.total_bytes)
        except (OSError, MemoryError):
            assert before == (len(self.pager), self.pager.total_bytes)
            raise
        else:
            assert whole or budget is None or largest <= budget
            assert sum(self.pager.shape(i)[1] for i in pages) == n
            self.arrays.append((pages, np.zeros((rows, n), dtype)))

    def touch(self, where, after, seed):
        pages, values, i = self.chosen(where)
        others, _, j = self.chosen(after)
        start = sum(self.pager.shape(n)[1] for n in pages[:i])
        here = slice(start, start + self.pager.shape(pages[i])[1])
        frame = self.pager.page(pages[i], then=others[j])
        self.uses += pages[i] in self.pager._moves
        assert np.ascontiguousarray(backend.move(frame, "cpu")).tobytes() == values[:, here].tobytes()
        new = self.values(frame.shape, frame.dtype, seed)
        frame[:, :][...] = backend.move(new, self.xp)  # a view: the caller's own writing is no copy of the pager's
        values[:, here] = new

    def write(self, where, length, seed):
        pages, values, i = self.chosen(where)
        some = pages[i : i + length]
        start = sum(self.pager.shape(n)[1] for n in pages[:i])
        here = slice(start, start + sum(self.pager.shape(n)[1] for n in some))
        new = self.values(values[:, here].shape, values.dtype, seed)
        self.pager.write(some, new)
        values[:, here] = new

    # --------------------------------------------------------------------------------------------------------------------- rules
    shapes = st.tuples(
        st.integers(1, 3), st.integers(1, 90), st.sampled_from([np.float32, np.uint8, np.float64]), st.sampled_from([1, 8])
    )  # fmt: skip
    number, seeds = st.integers(0, 10**4), st.integers(0, 2**32 - 1)

    @rule(shape=shapes)
    def allocates(self, shape):
        self.allocate(*shape)

    @rule(rows=st.sampled_from([2, 0, -1]), n=st.sampled_from([0, -3, 2.0, None]))
    def allocates_nothing(self, rows, n):
        before = len(self.pager)
        with pytest.raises(ValueError, match=r"pager: .* expected a whole number, 1 or more"):
            self.pager.allocate(rows, n)
        assert len(self.pager) == before

    @precondition(lambda self: self.arrays)
    @rule(where=number, after=number, seed=seeds)
    def pages_in_and_writes(self, where, after, seed):
        self.touch(where, after, seed)
        if self.pager.budget is not None:
            assert not self.pager.resident_bytes > self.most

    @precondition(lambda self: self.arrays)
    @rule(where=number, length=st.integers(1, 4), seed=seeds)
    def writes(self, where, length, seed):
        self.write(where, length, seed)

    @precondition(lambda self: self.arrays)
    @rule(where=number, more=st.sampled_from([(0, 1), (1, 0), (0, -1)]))
    def writes_what_does_not_fit(self, where, more):
        pages, values, _ = self.chosen(where)
        for wrong in (np.zeros(np.add(values.shape, more), values.dtype), np.zeros(values.shape, np.complex64)):
            with pytest.raises(ValueError, match=r"pager: .* expected"):
                self.pager.write(pages, wrong)

    @precondition(lambda self: self.arrays)
    @rule(where=number)
    def counts_from_the_end_or_beyond_it(self, where):
        pages, _, i = self.chosen(where)
        assert self.pager.read([pages[i] - len(self.pager)]).tobytes() == self.pager.read([pages[i]]).tobytes()
        for use in (self.pager.page, lambda number: self.pager.read([number])):
            with pytest.raises(IndexError):
                use(len(self.pager))

    @rule()
    def reads(self):
        self.held()

    @rule()
    def evicts(self):
        before = self.pager.resident_bytes + 0
        assert self.pager.evict_all() <= before and self.pager.resident_bytes == 0 == len(self.pager._resident)

    @rule(budget=st.sampled_from([None, 64, 128, 192, 320, 10**6]))
    def changes_the_budget(self, budget):
        self.pager.budget = budget

    @rule(fails=st.integers(0, 2))
    def yields(self, fails):
        pager, left = self.pager, [fails]
        there, rescues = bool(pager._resident or pager._coming), pager.counters.rescues

        def work(x):
            if left[0]:
                left[0] -= 1
                raise MemoryError("work")
            return x

        if fails > there:
            with pytest.raises(MemoryError, match="work"):
                pager.yielding(work, 7)
        else:
            assert pager.yielding(work, 7) == 7
        assert pager.counters.rescues == rescues + (there and fails > 0)
        assert not (there and fails and pager._resident)

    @rule(failure=failures, shape=shapes)
    def fails_to_allocate(self, failure, shape):
        with self.failing(failure, self.pager):
            self.allocate(*shape)
        self.held()

    @precondition(lambda self: self.arrays)
    @rule(
        failure=failures, where=number, after=number, seed=seeds, more=st.lists(st.tuples(number, number), max_size=3)
    )
    def fails_to_page(self, failure, where, after, seed, more):
        with self.failing(failure, self.pager):
            for a, b in [(where, after), *more]:
                self.touch(a, b, seed)
            self.pager._arrive()
        self.held()

    @precondition(lambda self: self.arrays)
    @rule(failure=failures)
    def fails_to_evict(self, failure):
        with self.failing(failure, self.pager):
            self.pager.evict_all()
        self.held()

    @precondition(lambda self: self.arrays)
    @rule(failure=failures, where=number, length=st.integers(1, 4), seed=seeds)
    def fails_to_write(self, failure, where, length, seed):
        """What a failing write was to overwrite is old or new, element by element; all else stays."""
        with self.failing(failure, self.pager) as seen:
            self.write(where, length, seed)
        if seen:
            pages, values, i = self.chosen(where)
            start = sum(self.pager.shape(n)[1] for n in pages[:i])
            here = slice(start, start + sum(self.pager.shape(n)[1] for n in pages[i : i + length]))
            now = self.pager.read(pages)
            new = self.values(values[:, here].shape, values.dtype, seed)
            assert ((now[:, here] == new) | (now[:, here] == values[:, here])).all()
            values[:, here] = now[:, here]
        self.held()

    @rule(way=st.sampled_from([copy.copy, copy.deepcopy, pickle.dumps]))
    def is_copied(self, way):
        with pytest.raises(TypeError, match="a pager cannot be copied"):
            way(self.pager)

    # ---------------------------------------------------------------------------------------------------------------- invariants
    @invariant()
    def adds_up(self):
        if not hasattr(self, "pager"):
            return
        pager = self.pager
        books_add_up(pager)
        assert pager.counters.hits + pager.counters.faults == self.uses
        assert pager.total_bytes == sum(values.nbytes for _, values in self.arrays)
        assert pager.unpaged_bytes == pager.total_bytes - sum(pager._pages[i].nbytes for i in pager._moves)

    @invariant()
    def stays_below_the_budget(self):
        """More than the budget is resident only where a page alone exceeds it, or since it was lowered."""
        if not hasattr(self, "pager"):
            return
        pager = self.pager
        largest = max((pager._pages[i].nbytes for i in pager._moves), default=0)
        self.most = max(np.inf if pager.budget is None else pager.budget, largest, min(self.most, pager.resident_bytes))
        assert pager.resident_bytes <= self.most


def test_a_pager_keeps_what_was_written_whatever_fails(run_machine):
    run_machine(PagerMachine, examples=60, steps=40)


# ----------------------------------------------------------------------------------------------------------------- its optimizers
SIZES = (5, 300, 700, 1)


class OptimizerMachine(WithFaults):
    """A paged optimizer beside an unpaged one: the same bits in the parameters and in the state."""

    places = st.tuples(st.sampled_from(PLACES), st.sampled_from([None, 1024, 2048, 10**6]), st.booleans())

    @initialize(
        place=places,
        lazy=st.booleans(),
        eight=st.booleans(),
        decay=st.sampled_from([0.0, 0.1]),
        seed=st.integers(0, 99),
    )
    def make(self, place, lazy, eight, decay, seed):
        self.start(lazy)
        self.options = {"lr": 0.1, "weight_decay": decay}
        self.kind = (lambda *a, **k: AdamW8bit(*a, min_8bit_size=256, **k)) if eight else AdamW
        rng = np.random.default_rng(seed)
        first = [rng.standard_normal(n).astype(np.float32) for n in SIZES]
        self.plain = self.optimizer([a.copy() for a in first], None)
        self.begin(first, place)
        self.stack.enter_context(self.faults.installed())

    def optimizer(self, arrays, pager):
        named = [(f"p{i}", Tensor(a, requires_grad=True)) for i, a in enumerate(arrays)]
        return self.kind(named, pager=pager, **self.options)

    def begin(self, arrays, place):
        (pool, self.xp), budget, prefetch = place
        pager = Pager(budget, 1024, pool, self.xp, True, prefetch)
        self.paged = self.optimizer([backend.move(a.copy(), self.xp) for a in arrays], pager)

    def bits(self, optimizer):
        """{name: array}: parameters and state."""
        arrays = {f"{slot.name}": backend.move(slot.p.data, "cpu").reshape(-1).copy() for slot in optimizer._slots}
        return arrays | {name: a.copy() for name, a in optimizer.state_dict().items()}

    def same(self, left, right):
        assert left.keys() == right.keys()
        assert all(left[k].tobytes() == right[k].tobytes() for k in left)

    def gradients(self, seed, without):
        rng = np.random.default_rng(seed)
        for i, n in enumerate(SIZES):
            g = None if without >> i & 1 else (rng.standard_normal(n) * 10.0 ** rng.integers(-4, 3)).astype(np.float32)
            self.plain._slots[i].p.grad = g
            self.paged._slots[i].p.grad = None if g is None else backend.move(g.copy(), self.xp)

    @rule(seed=st.integers(0, 2**32 - 1), without=st.integers(0, 15))
    def steps(self, seed, without):
        self.gradients(seed, without)
        self.plain.step()
        self.paged.step()

    @rule()
    def evicts(self):
        self.paged.pager.evict_all()

    @rule(place=places)
    def resumes(self, place):
        """Elsewhere, with another budget."""
        saved = {name: a.copy() for name, a in self.paged.state_dict().items()}
        now = [backend.move(slot.p.data, "cpu") for slot in self.paged._slots]
        with mock.patch.object(pools, "np", np):  # the pool asks whether the device is NumPy
            self.begin(now, place)
        self.paged.load_state_dict(saved)

    @rule(
        change=st.sampled_from(
            [
                {"step": None},
                {"step": np.array(-1)},
                {"step": np.array(np.nan)},
                {"step": np.array([1, 2])},
                {"p1.t": np.array(0.5)},
                {"p2.m": None},
                {"p3.v": np.zeros(2, np.float32)},
                {"p0.m": np.zeros(5, np.float64)},
            ]
        )
    )
    def loads_what_does_not_fit(self, change):
        before = self.bits(self.paged)
        state = {name: a + np.asarray(1, a.dtype) for name, a in self.paged.state_dict().items()} | change
        with pytest.raises(ValueError, match=rf"AdamW\w*: the saved state.*{next(iter(change))}"):
            self.paged.load_state_dict({name: a for name, a in state.items() if a is not None})
        self.same(before, self.bits(self.paged))

    @rule(failure=failures, seed=st.integers(0, 2**32 - 1))
    def fails_within_a_step(self, failure, seed):
        """Each page of the parameters and of their state has had the step or not; what was saved before can be loaded."""
        before = self.bits(self.plain)
        self.gradients(seed, 0)
        with self.failing(failure, self.paged.pager) as seen:
            self.paged.step()
        self.plain.step()
        if seen:
            after, now = self.bits(self.plain), self.bits(self.paged)
            for name in now:
                if not name.endswith("t") and name != "step":
                    stepped, stayed = now[name] == after[name], now[name] == before[name]
                    assert (stepped | stayed).all(), name
            for optimizer in (self.plain, self.paged):
                for slot in optimizer._slots:
                    slot.p.data[...] = backend.move(before[slot.name], backend.array_module(slot.p.data))
                optimizer.load_state_dict(before)

    @rule(failure=failures)
    def fails_to_save(self, failure):
        with self.failing(failure, self.paged.pager):
            self.paged.state_dict()

    @rule(way=st.sampled_from([copy.deepcopy, pickle.dumps]))
    def is_copied(self, way):
        with pytest.raises(TypeError, match=r"a pager cannot be copied.*load_state_dict"):
            way(self.paged)

    @invariant()
    def equals_the_unpaged_one(self):
        if hasattr(self, "paged"):
            self.same(self.bits(self.plain), self.bits(self.paged))
            books_add_up(self.paged.pager)


def test_a_paged_optimizer_is_the_unpaged_one_bit_for_bit_whatever_fails(run_machine):
    run_machine(OptimizerMachine, examples=30, steps=20)
