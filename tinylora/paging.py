"""Optimizer state that need not fit: pages in a pool, a budget of resident bytes, least recently used goes first.

QLoRA §3 ("Paged Optimizers") lets the CUDA driver move optimizer state between GPU and CPU like an operating system
moves memory between RAM and disk. Here the moving is done by hand, so that it can be read and counted:

    page(i)   resident -> a hit;   not resident -> a fault: copy pool -> frame, after evicting the page
              that was used longest ago (copy frame -> pool) if the budget is full.

A page is a block of `page_bytes` and not a whole tensor, so a tensor larger than the budget is no problem. Every move is in
`counters`, and in `trace` if asked. What the pool is made of, and who copies, is in `pools`.

Three things that matter for speed and for memory:
  * prefetch. An optimizer knows which page is next; `page(i, then=j)` starts to bring j while the caller works on i. The two together
    must fit the budget.
  * out of memory. The paper's pages move because a long sequence needs their room. `yielding(f)` runs f, and if an allocation fails
    in it, evicts every page and runs it once more: f must be a function of its arguments alone, as a micro-batch is here.
  * whole tensors. bitsandbytes pages (in fact prefetches) whole states, and only those of 100,000 elements or more; `whole_tensors`
    does the same, so that the difference can be seen.

Without a budget nothing is ever evicted and nothing is copied: the pages are plain arrays.
"""

import contextlib
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from . import backend
from .kernels import pools

#: States with fewer elements are not paged by bitsandbytes (its optimizer.py, get_state_buffer).
WHOLE_TENSORS_FROM = 100_000


@dataclass
class Counters:
    """What a Pager has done so far: calls, and the bytes that its copies moved. Each use of a page is a hit or a fault."""

    hits: int = 0
    faults: int = 0
    prefetches: int = 0
    evictions: int = 0
    rescues: int = 0  # times that an allocation failed elsewhere and every page was evicted for it
    bytes_in: int = 0
    bytes_out: int = 0

    @property
    def bytes_moved(self):
        return self.bytes_in + self.bytes_out


class Pager:
    """A page table over blocks of optimizer state.

    budget          most bytes resident at a time, or None for no limit
    page_bytes      bytes of a page (a short last page is allowed)
    pool            "host", "file" or "managed": see `pools`
    device          where resident pages live: "cpu", "cuda" or an array module
    trace           True: keep a list of (step, page, event, bytes); set `step` to label it. The events are "fault", "prefetch"
                    (bytes come in), "evict" (bytes go out) and "hit"
    prefetch        bring the next page beside the work on this one. None: on a device. On NumPy a thread does it, and handing a page of
                    256 kB over takes longer than copying it (`tinylora paging`)
    whole_tensors   a tensor's state is one page, and states of less than 100,000 elements are not paged (bitsandbytes)
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
        if budget is not None and budget < page_bytes and not whole_tensors:
            raise ValueError(
                f"pager: the budget of {budget} bytes is smaller than one page of {page_bytes} bytes; "
                "raise the budget or make the pages smaller"
            )
        self.budget, self.page_bytes, self.whole_tensors = budget, page_bytes, whole_tensors
        self.prefetch = self.xp is not np if prefetch is None else prefetch
        self.counters, self.step = Counters(), 0
        self.resident_bytes = self.peak_resident_bytes = self.unpaged_bytes = 0
        self.trace = [] if trace else None
        self._pages = []  # page number -> page in the pool; or the resident array itself, where nothing moves
        self._fixed = set()  # pages that always stay (whole tensors too small to page)
        self._resident = OrderedDict()  # page number -> frame, least recently used first
        self._coming = None  # (page number, ticket) of the page that is under way

    def __len__(self):
        return len(self._pages)

    @property
    def total_bytes(self):
        """Bytes of all pages, wherever they are."""
        return sum(page.nbytes for page in self._pages)

    def allocate(self, rows, n, dtype=np.float32, multiple=1):
        """Page numbers that hold `rows` parallel vectors of n elements, zero-filled: each page is (rows, up to k).

        k is a multiple of `multiple`, save in the last page: what is quantized in blocks must not be cut within a block.
        """
        itemsize, first = np.dtype(dtype).itemsize, len(self._pages)
        k = max(self.page_bytes // (itemsize * rows) // multiple, 1) * multiple
        fixed = self.whole_tensors and n < WHOLE_TENSORS_FROM
        if self.whole_tensors:
            k = max(n, 1)
        largest = rows * min(k, n) * itemsize
        if self.budget is not None and not fixed and largest > self.budget:
            raise ValueError(
                f"pager: a page of {largest} bytes ({rows} rows of {min(k, n)}) exceeds the budget of {self.budget} bytes; "
                f"{'page without whole_tensors' if self.whole_tensors else 'raise the budget'}"
            )
        shapes = [(rows, min(k, n - start)) for start in range(0, n, k)]
        if self._moves and not fixed:
            self._pages += self.pool.allocate(shapes, dtype)
        else:
            self._pages += [self.xp.zeros(shape, dtype) for shape in shapes]
        numbers = range(first, len(self._pages))
        if fixed:
            self._fixed.update(numbers)
            self.unpaged_bytes += sum(self._pages[i].nbytes for i in numbers)
        return numbers

    @property
    def _moves(self):
        return self.budget is not None or isinstance(self.pool, pools.ManagedPool)

    def shape(self, number):
        """(rows, elements) of a page."""
        return self._pages[number].shape

    def page(self, number, then=None):
        """The resident array of a page; valid until the next call. Writes to it are kept. then: the page that is wanted next."""
        if number in self._fixed or not self._moves:
            return self._pages[number]
        self._arrive()
        frame = self._resident.get(number)
        if frame is not None:
            self._resident.move_to_end(number)
            self.counters.hits += 1
            self._note(number, "hit", 0)
            if self.budget is None:
                self.pool.exchange([], frame)  # managed memory: the driver may have taken it away meanwhile
        else:
            self.counters.faults += 1
            frame = self.pool.wait(self._bring(number, "fault"))
            self._resident[number] = frame
        if then is not None and self.prefetch:
            self._prefetch(then, beside=number)
        return frame

    def _prefetch(self, number, beside):
        page = self._pages[number]
        known = number in self._fixed or number in self._resident
        if known or (self.budget is not None and self._pages[beside].nbytes + page.nbytes > self.budget):
            return
        self.counters.prefetches += 1
        with contextlib.suppress(MemoryError):  # a guess takes no page's place but by the budget
            self._coming = (number, self._bring(number, "prefetch", ahead=True))

    def _arrive(self):
        """The page under way, if there is one, is resident from now on; if there was no memory for it, it was a guess and is dropped."""
        if self._coming is None:
            return
        (number, ticket), self._coming = self._coming, None
        try:
            self._resident[number] = self.pool.wait(ticket)
        except MemoryError:
            self._cancel(number, "prefetch")

    def _bring(self, number, event, ahead=False):
        """Make room and start to copy a page in; where memory runs out, more pages go. -> the pool's ticket"""
        source, going = self._pages[number], []
        while self._resident and self.budget is not None and self.resident_bytes + source.nbytes > self.budget:
            going.append(self._leave())
        self.resident_bytes += source.nbytes
        self.peak_resident_bytes = max(self.peak_resident_bytes, self.resident_bytes)
        self.counters.bytes_in += source.nbytes
        self._note(number, event, source.nbytes)
        while True:
            try:
                return self.pool.exchange(going, source, ahead)
            except MemoryError:
                if ahead or not self._resident:
                    self._cancel(number, event)
                    raise
            going.append(self._leave())

    def _cancel(self, number, event):
        """Strike out a page that did not come: as if it had not been asked for."""
        nbytes = self._pages[number].nbytes
        self.resident_bytes -= nbytes
        self.counters.bytes_in -= nbytes
        if event == "prefetch":
            self.counters.prefetches -= 1
        else:
            self.counters.faults -= 1
        if self.trace is not None:
            last = max(i for i, row in enumerate(self.trace) if row[1:3] == (number, event))
            del self.trace[last]

    def _leave(self):
        """Strike the least recently used page off the table. -> (its frame, its page): the pool has yet to put it back"""
        number, frame = self._resident.popitem(last=False)
        self.resident_bytes -= frame.nbytes
        self.counters.evictions += 1
        self.counters.bytes_out += frame.nbytes
        self._note(number, "evict", frame.nbytes)
        return frame, self._pages[number]

    def evict_all(self):
        """Put every resident page back into the pool; returns the bytes that this freed."""
        self._arrive()
        before = self.resident_bytes
        while self._resident:
            self.pool.exchange([self._leave()], None)
        self.pool.finish()
        return before

    def yielding(self, f, *args):
        """f(*args); if an allocation fails in it, f(*args) again with no page resident. f must not depend on having been tried."""
        try:
            return f(*args)
        except MemoryError:
            if not (self._resident or self._coming):
                raise
        self.counters.rescues += 1
        self.evict_all()  # only here: the error, and with it all that f had allocated, is gone
        return f(*args)

    def _note(self, number, event, nbytes):
        if self.trace is not None:
            self.trace.append((self.step, number, event, nbytes))

    def read(self, pages):
        """The (rows, n) contents of pages, on the host, wherever they are now; counts nothing and moves no page."""
        self._settle()
        parts = np.concatenate([np.asarray(backend.move(self._current(i), "cpu")) for i in pages], axis=1)
        self._release(pages)
        return parts

    def write(self, pages, values):
        """Overwrite the contents of pages with (rows, n) values, wherever they are now."""
        self._settle()
        start = 0
        for i in pages:
            target = self._current(i)
            end = start + target.shape[1]
            target[...] = backend.move(np.ascontiguousarray(values[:, start:end]), backend.array_module(target))
            start = end
        self._release(pages)

    def _release(self, pages):
        for i in pages:
            if self._moves and i not in self._resident and i not in self._fixed:
                self.pool.release(self._pages[i])

    def _settle(self):
        self._arrive()
        if self._moves:
            self.pool.finish()

    def _current(self, number):
        return self._resident.get(number, self._pages[number])
