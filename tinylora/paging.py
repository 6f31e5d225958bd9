"""Paged optimizer state: the state is cut into pages, and only a budget of them is resident at a time.

QLoRA §3, "Paged Optimizers", lets the CUDA driver move optimizer state between GPU and CPU, as an operating system moves memory
between RAM and disk. Here this is done by hand, so that every move can be read and counted. `page(i)` returns page i as a
resident array:

    hit      the page is resident already
    fault    it is not: it is copied from the pool to a frame, which is the resident array
    evict    if the budget is full, the page that was used longest ago is first copied back to the pool

A copy that fails loses nothing: a page that could not be put back stays resident, and the pager goes on.

A page is a block of `page_bytes` and not a whole tensor, so a tensor may be larger than the budget. `counters` has the
number of hits, faults and evictions and the bytes moved; `trace` lists every event, if that is asked for. Where the pages
live while they are not resident, and who copies them, is in `kernels.pools`.

Without a budget nothing is evicted or copied, and the pages are plain arrays (except in the pool "managed", whose pages the CUDA
driver moves).

The file has two more features. The first saves time, and the second saves memory:
  * An optimizer knows which page comes next. `page(i, then=j)` starts to bring page j while the caller works on page i.
  * The paper's pages give way when a long sequence needs their memory. `yielding(f)` runs f. If an allocation fails in f,
    every page is evicted and f runs once more. So f must depend on nothing but its arguments, as a micro-batch does.

Differs from bitsandbytes: there a whole state lies in CUDA managed memory and is fetched as a whole, states of fewer than
100,000 elements are not paged, and the CUDA driver decides what is evicted.

Leaves out: any other rule than "least recently used goes first".
"""

import contextlib
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from . import backend
from .kernels import pools


@dataclass
class Counters:
    """What a Pager has done so far: calls, and the bytes that its copies moved. Each use of a page that can
    move is a hit or a fault."""

    hits: int = 0
    faults: int = 0
    prefetches: int = 0
    evictions: int = 0
    rescues: int = 0  # times that an allocation failed elsewhere and every page was evicted for it
    bytes_in: int = 0
    bytes_out: int = 0

    bytes_moved = property(lambda self: self.bytes_in + self.bytes_out)


class Pager:
    """A page table over blocks of optimizer state.

    budget          most bytes resident at a time, or None for no limit; it holds for what is allocated afterwards
    page_bytes      bytes of a page (a short last page is allowed)
    pool            "host", "file" or "managed": see `kernels.pools`
    device          where resident pages live: "cpu", "cuda" or an array module
    trace           True: keep a list of (step, page, event, bytes); set `step` to label it. The events are "fault", "prefetch"
                    (bytes come in), "evict" (bytes go out) and "hit"
    prefetch        bring the next page beside the work on this one. None: only if the device is a GPU. On NumPy a thread does it, and
                    handing a page of 256 kB over takes longer than copying it (`tinylora paging`)
    whole_tensors   cut state as bitsandbytes does: see `pools.whole_tensors`
    """

    def __init__(
        self,
        budget=None,
        page_bytes=1 << 18,
        pool="host",
        device="cpu",
        trace=False,
        prefetch=None,
        whole_tensors=False,
    ):
        self.xp = backend.module_for(device)
        self.pool = pools.make(pool, self.xp)
        if page_bytes < 8 or page_bytes % 8:
            raise ValueError(
                f"pager: page_bytes = {page_bytes}; a page holds pairs of float32 (m, v), so expected a multiple of 8"
            )
        if budget is not None and not budget >= (0 if whole_tensors else page_bytes):  # NaN, too
            raise ValueError(
                f"pager: the budget of {budget} bytes is smaller than one page of {page_bytes} bytes; raise one, lower the other"
            )
        self.budget, self.page_bytes, self.whole_tensors = budget, page_bytes, whole_tensors
        self.prefetch = self.xp is not np if prefetch is None else prefetch
        self.counters, self.step, self.trace = Counters(), 0, [] if trace else None
        self.resident_bytes = self.peak_resident_bytes = 0
        self._pages = []  # page number -> page in the pool; or the resident array itself, where nothing moves
        self._moves = set()  # the numbers of the pages that can move
        self._resident = OrderedDict()  # page number -> frame, least recently used first
        self._coming = None  # of the page that is under way: (its number, the ticket, what goes for it)

    def __reduce_ex__(self, protocol):
        raise TypeError("a pager cannot be copied; make another, whose optimizer takes load_state_dict(state_dict())")

    def __len__(self):
        return len(self._pages)

    @property
    def total_bytes(self):
        """Bytes of all pages, wherever they are."""
        return sum(page.nbytes for page in self._pages)

    @property
    def unpaged_bytes(self):
        """Bytes of the pages that always stay: without a budget, all of them."""
        return sum(page.nbytes for i, page in enumerate(self._pages) if i not in self._moves)

    def allocate(self, rows, n, dtype=np.float32, multiple=1):
        """Page numbers that hold `rows` parallel vectors of n elements, zero-filled: each page is (rows, up to k).

        k is a multiple of `multiple`, except in the last page: what is quantized in blocks must not be cut within a block.
        """
        rows, n = backend.whole("pager: rows", rows), backend.whole("pager: n", n)
        itemsize, first = np.dtype(dtype).itemsize, len(self._pages)
        k = max(self.page_bytes // (itemsize * rows) // multiple, 1) * multiple
        moves = self.budget is not None or isinstance(self.pool, pools.ManagedPool)
        if self.whole_tensors:
            k, moves = pools.whole_tensors(n, moves)
        largest = rows * min(k, n) * itemsize
        if moves and self.budget is not None and largest > self.budget:
            raise ValueError(
                f"pager: a page of {largest} bytes ({rows} rows of {min(k, n)}) exceeds the budget of {self.budget} bytes; "
                f"{'page without whole_tensors' if self.whole_tensors else 'raise the budget'}"
            )
        shapes = [(rows, min(k, n - start)) for start in range(0, n, k)]
        self._pages += self.pool.allocate(shapes, dtype) if moves else [self.xp.zeros(shape, dtype) for shape in shapes]
        numbers = range(first, len(self._pages))
        self._moves.update(numbers if moves else ())
        return numbers

    def shape(self, number):
        """(rows, elements) of a page."""
        return self._pages[number].shape

    def page(self, number, then=None):
        """The resident array of a page. then: the page that is wanted next.

        Writes to it are kept as long as the page is resident. The next call may evict it; `frame` tells.
        """
        number = range(len(self._pages))[number]  # one page has one number
        if number not in self._moves:
            return self._pages[number]
        self._arrive()
        frame = self._resident.get(number)
        if frame is not None:
            if self.budget is None and frame is self._pages[number]:
                self.pool.exchange([], frame)  # managed memory: the driver may have moved it out; ask for it back
            self._resident.move_to_end(number)
            self.counters.hits += 1
            self._note("hit", number)
        else:
            frame = self.pool.wait(self._bring(number)[0])
            self.counters.faults += 1
            self._came_in("fault", number, frame)
        if then is not None and self.prefetch:
            self._prefetch(then, beside=number)
        return frame

    def frame(self, number):
        """The array of a page that is resident now, else None. Counts nothing and moves no page."""
        return self._resident.get(number) if number in self._moves else self._pages[number]

    def _prefetch(self, number, beside):
        """Start to bring a page in, if it fits the budget beside the one in use."""
        together = self._pages[beside].nbytes + self._pages[number].nbytes
        if number in self._moves and number not in self._resident and (self.budget is None or together <= self.budget):
            # It may evict for the budget, but not because memory ran out. A failure that lasts is seen where the page is needed.
            with contextlib.suppress(Exception):
                self._coming = (number, *self._bring(number, ahead=True))

    def _arrive(self):
        """The page under way, if there is one, is resident from now on; if it could not be brought, it was a guess and is dropped."""
        if self._coming is None:
            return
        number, ticket, going = self._coming
        try:
            frame = self.pool.wait(ticket)
        except Exception:
            self._coming = None
            self._keep(going, instead_of=self._pages[number].nbytes)
        else:
            self._coming = None
            self.counters.prefetches += 1
            self._came_in("prefetch", number, frame)

    def _bring(self, number, ahead=False):
        """Make room and start to copy a page in; where memory runs out, more pages go. -> the pool's ticket, and the pages that go"""
        source, going = self._pages[number], []
        self.resident_bytes += source.nbytes
        try:
            while self._resident and self.budget is not None and self.resident_bytes > self.budget:
                going.append(self._evict())
            self.peak_resident_bytes = max(self.peak_resident_bytes, self.resident_bytes)
            while True:
                try:
                    return self.pool.exchange(going, source, ahead), going
                except MemoryError:
                    if ahead or not self._resident:
                        raise
                going.append(self._evict())
        except BaseException:
            self._keep(going, instead_of=source.nbytes)
            raise

    def _keep(self, going, instead_of=0):
        """Finish what is under way. What is left in this list could not be put back: it stays, and so many bytes do not come."""
        self.pool.finish()
        self.resident_bytes -= instead_of
        while going:
            frame, page = going.pop()
            kept = next(i for i in self._moves if self._pages[i] is page)
            self._resident[kept] = frame
            self.resident_bytes += frame.nbytes
            self.counters.evictions -= 1
            self.counters.bytes_out -= frame.nbytes
            if self.trace is not None:
                del self.trace[max(i for i, line in enumerate(self.trace) if line[1:3] == (kept, "evict"))]

    def _came_in(self, event, number, frame):
        """Enter a page that has arrived into the table and the books."""
        self._resident[number] = frame
        self.counters.bytes_in += frame.nbytes
        self._note(event, number, frame.nbytes)

    def _evict(self):
        """Strike the least recently used page off the table. -> (its frame, its page): the pool has yet to put it back"""
        number, frame = self._resident.popitem(last=False)
        self.resident_bytes -= frame.nbytes
        self.counters.evictions += 1
        self.counters.bytes_out += frame.nbytes
        self._note("evict", number, frame.nbytes)
        return frame, self._pages[number]

    def evict_all(self):
        """Put every resident page back into the pool; returns the bytes that this freed."""
        self._arrive()
        before, going = self.resident_bytes, []
        try:
            while self._resident:
                going.append(self._evict())
            self.pool.exchange(going, None)
        finally:
            self._keep(going)
        return before

    def yielding(self, f, *args):
        """f(*args); if an allocation fails in it, f(*args) again with no page resident. f must not depend on having been tried."""
        try:
            return f(*args)
        except MemoryError:
            if not (self._resident or self._coming):
                raise
        self.counters.rescues += 1
        self.evict_all()  # outside `except`: only now is f's memory freed
        return f(*args)

    def _note(self, event, number, nbytes=0):
        """A line of the trace, if one is kept."""
        if self.trace is not None:
            self.trace.append((self.step, number, event, nbytes))

    def read(self, pages):
        """The (rows, n) contents of pages, on the host, wherever they are now; counts nothing and moves no page."""
        with self._settled(pages) as current:
            return np.concatenate([np.asarray(backend.move(page, "cpu")) for page in current], axis=1)

    def write(self, pages, values):
        """Overwrite the contents of pages with (rows, n) values, wherever they are now."""
        start = 0
        with self._settled(pages) as current:
            shape, dtype = (len(current[0]), sum(page.shape[1] for page in current)), current[0].dtype
            if values.shape != shape or not np.can_cast(values.dtype, dtype, "same_kind"):
                raise ValueError(f"pager: got {values.dtype} {values.shape} to write, expected {dtype} {shape}")
            for page in current:
                end = start + page.shape[1]
                page[...] = backend.move(np.ascontiguousarray(values[:, start:end]), backend.array_module(page))
                start = end

    @contextlib.contextmanager
    def _settled(self, pages):
        """The arrays that hold these pages now; nothing is under way meanwhile."""
        self._arrive()
        pages = [range(len(self._pages))[i] for i in pages]
        if self._moves:
            self.pool.finish()
        yield [self._resident.get(i, self._pages[i]) for i in pages]
        for i in pages:
            if i in self._moves and i not in self._resident:
                self.pool.release(self._pages[i])
