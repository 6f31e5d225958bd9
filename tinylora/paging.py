"""Optimizer state that need not fit: pages in host memory, a budget of resident bytes, least recently used goes first.

QLoRA §3 ("Paged Optimizers") lets the CUDA driver move optimizer state between GPU and CPU like an operating system
moves memory between RAM and disk. Here the moving is done by hand, so that it can be read and counted:

    page(i)   resident -> a hit;   not resident -> a fault: copy pool -> frame, after evicting the page
              that was used longest ago (copy frame -> pool) if the budget is full.

A page is a block of `page_bytes` and not a whole tensor, so a tensor larger than the budget is no problem; bitsandbytes
pages whole states, and only those of 100,000 elements or more. Every move is in `counters`, and in `trace` if asked.

On a CPU pool and frames are both plain memory: there the pager shows the mechanism and its costs and saves nothing. On a
GPU the frames are device memory and the pool is not.

Without a budget nothing is ever evicted and nothing is copied: the pages are plain arrays.
"""

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from . import backend


@dataclass
class Counters:
    """What a Pager has done so far: calls, and the bytes that its copies moved."""

    hits: int = 0
    faults: int = 0
    evictions: int = 0
    bytes_in: int = 0
    bytes_out: int = 0

    @property
    def bytes_moved(self):
        return self.bytes_in + self.bytes_out


class Pager:
    """A page table over float32 blocks.

    budget       most bytes resident at a time, or None for no limit
    page_bytes   bytes of a page (a short last page is allowed)
    device       where resident pages live: "cpu", "cuda" or an array module; the pool is host memory
    trace        True: keep a list of (step, page, "fault" | "hit" | "evict", bytes); set `step` to label it
    """

    def __init__(self, budget=None, page_bytes=1 << 18, pool="host", device="cpu", trace=False):
        if pool != "host":
            raise ValueError(f"pager: pool {pool!r} is unknown: expected 'host'")
        if page_bytes < 8 or page_bytes % 8:
            raise ValueError(
                f"pager: page_bytes = {page_bytes}; a page holds pairs of float32 (m, v), so expected a multiple of 8"
            )
        if budget is not None and budget < page_bytes:
            raise ValueError(
                f"pager: the budget of {budget} bytes is smaller than one page of {page_bytes} bytes; "
                "raise the budget or make the pages smaller"
            )
        self.budget, self.page_bytes, self.xp = budget, page_bytes, backend.module_for(device)
        self.counters, self.step, self.peak_resident_bytes = Counters(), 0, 0
        self.trace = [] if trace else None
        self._pool = []  # page number -> host array; without a budget, the resident array itself
        self._resident = OrderedDict()  # page number -> frame, least recently used first

    def __len__(self):
        return len(self._pool)

    @property
    def resident_bytes(self):
        return sum(frame.nbytes for frame in self._resident.values())

    @property
    def total_bytes(self):
        return sum(page.nbytes for page in self._pool)

    def allocate(self, rows, n):
        """Page numbers that hold `rows` parallel float32 vectors of n elements, zero-filled: each page is (rows, up to k)."""
        k = max(self.page_bytes // (4 * rows), 1)
        xp = np if self.budget is not None else self.xp
        first = len(self._pool)
        self._pool += [xp.zeros((rows, min(k, n - start)), np.float32) for start in range(0, n, k)]
        return range(first, len(self._pool))

    def page(self, number):
        """The resident array of a page; valid until the next call. Writes to it are kept."""
        if self.budget is None:
            return self._pool[number]
        frame = self._resident.get(number)
        if frame is not None:
            self._resident.move_to_end(number)
            self.counters.hits += 1
            self._note(number, "hit", 0)
            return frame
        source = self._pool[number]
        while self._resident and self.resident_bytes + source.nbytes > self.budget:
            self._evict()
        frame = source.copy() if self.xp is np else backend.move(source, self.xp)
        self._resident[number] = frame
        self.counters.faults += 1
        self.counters.bytes_in += source.nbytes
        self._note(number, "fault", source.nbytes)
        self.peak_resident_bytes = max(self.peak_resident_bytes, self.resident_bytes)
        return frame

    def _evict(self):
        number, frame = self._resident.popitem(last=False)
        self._pool[number][...] = backend.move(frame, "cpu")
        self.counters.evictions += 1
        self.counters.bytes_out += frame.nbytes
        self._note(number, "evict", frame.nbytes)

    def _note(self, number, event, nbytes):
        if self.trace is not None:
            self.trace.append((self.step, number, event, nbytes))

    def read(self, pages):
        """The (rows, n) contents of pages, on the host, wherever they are now; counts nothing and moves no page."""
        return np.concatenate([backend.move(self._current(i), "cpu") for i in pages], axis=1)

    def write(self, pages, values):
        """Overwrite the contents of pages with (rows, n) values, wherever they are now."""
        start = 0
        for i in pages:
            target = self._current(i)
            end = start + target.shape[1]
            target[...] = backend.move(np.ascontiguousarray(values[:, start:end]), backend.array_module(target))
            start = end

    def _current(self, number):
        return self._resident.get(number, self._pool[number])
