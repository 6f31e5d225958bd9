"""Where the pages of a Pager live while they are not resident: host memory, a file, or CUDA managed memory.

| pool | a page is | a resident frame is | what moves it |
|---|---|---|---|
| "host" | host memory (page-locked under CuPy) | an array on the device | explicit copies, on a stream of their own under CuPy |
| "file" | a stretch of a memory-mapped file | an array on the device, or in RAM | explicit copies, by a thread on NumPy |
| "managed" | CUDA managed memory | the page itself | cudaMemPrefetchAsync, to the device and back |

"host" is what QLoRA §3 describes (GPU and CPU), done by hand; "managed" is how bitsandbytes does it, by the CUDA driver; "file" is the
analogy that the paper draws, RAM and disk, and the one that is real on a laptop: what is not resident takes no memory.

A pool has one way to move things, `exchange`: put these frames back, then bring that page in, in this order and, if `ahead`, beside the
computation. A frame leaves the list as soon as it has been put back: what is left after a failure was not. A frame that is put back is
used again for the page that comes in, where the sizes agree: no allocation, and never more than the budget.
"""

import contextlib
import mmap
import os

import numpy as np

from .. import backend
from . import copies


def make(name, device):
    """The pool of that name for frames on `device` ("cpu", "cuda" or an array module)."""
    if name not in POOLS:
        raise ValueError(f"pager: pool {name!r} is unknown: expected one of {', '.join(map(repr, POOLS))}")
    return POOLS[name](backend.module_for(device))


#: States with fewer elements are not paged by bitsandbytes (its optimizer.py, get_state_buffer).
WHOLE_TENSORS_FROM = 100_000


def whole_tensors(n, moves):
    """(elements a page, whether it moves) of a state of n elements as bitsandbytes cuts it: one page, and small states always stay."""
    return max(n, 1), moves and n >= WHOLE_TENSORS_FROM


class HostPool:
    """Pages in host memory. On NumPy both sides are RAM: that shows the mechanism and its cost, and saves nothing."""

    def __init__(self, xp):
        self.xp, self._queue = xp, None
        self._stream = None if xp is np else _CopyStream(xp)

    def allocate(self, shapes, dtype):
        """Zero-filled pages of these shapes."""
        return [copies.pinned_zeros(self.xp, shape, dtype) for shape in shapes]

    def exchange(self, back, source, ahead=False):
        """A ticket for the frame of page `source`, once each (frame, page) of `back` has been put into its page. source: a page or None."""
        if self._stream:
            return self._stream.exchange(back, source)
        if ahead and self._queue is None:
            from concurrent.futures import ThreadPoolExecutor

            queue = ThreadPoolExecutor(1, thread_name_prefix="pager")
            queue.submit(int)  # RuntimeError where no thread can be started: there is no queue then
            self._queue = queue
        if self._queue is None:
            return self._exchange(back, source)
        ticket = self._queue.submit(self._exchange, back, source)  # one thread: first come, first served
        if not ahead:
            ticket.result()
        return ticket

    def wait(self, ticket):
        """The frame of a ticket, ready to be computed on."""
        if self._stream:
            return self._stream.wait(ticket)
        return ticket.result() if self._queue else ticket

    def finish(self):
        """Return when every page holds what was put back into it."""
        if self._stream:
            self._stream.synchronize()
        elif self._queue:
            self._queue.submit(int).result()

    def _exchange(self, back, source):
        frame = None
        while back:
            old, page = back[-1]
            page[...] = old
            back.pop()
            self.release(page)
            if source is not None and old.shape == source.shape and old.dtype == source.dtype:
                frame = old
            del old  # before anything new is allocated
        if source is None:
            return None
        if frame is None:
            frame = copies.returned_when_dropped(source.shape, source.dtype)
        frame[...] = source
        self.release(source)
        return frame

    def release(self, page):
        """A page is not looked at for now."""


class FilePool(HostPool):
    """Pages in a temporary file that disappears with the pool. What was written or read is unmapped at once, so that the process
    holds the resident frames and nothing else; the system may keep it in its disk cache, which is its to give away. (With frames on a
    device, pages stay mapped until they are read or written by the host.)

    The file lies in the system's folder for temporary files, which the environment variable TMPDIR chooses. Where that folder is itself in
    memory (tmpfs), so are the pages. OSError where the disk has no room: pages are reserved when they are allocated.
    """

    def __init__(self, xp):
        import tempfile

        super().__init__(xp)
        self._file = tempfile.TemporaryFile(prefix="tinylora-pages-")  # noqa: SIM115 (closed, and by that removed, with the pool)
        # the file's length; its last stretch, and how much of it is given out
        self._end, self._mapped, self._used = 0, None, 0

    def allocate(self, shapes, dtype):
        step = mmap.ALLOCATIONGRANULARITY  # each page can be unmapped alone
        sizes = [int(np.prod(shape)) * np.dtype(dtype).itemsize for shape in shapes]
        room = np.cumsum([0, *(-(-n // step) * step for n in sizes)]).tolist()
        try:
            mapped, first = self._stretch(room[-1])
        except OSError as error:
            import tempfile

            folder = tempfile.gettempdir()
            raise OSError(
                f"pager: no room for {room[-1]:,} bytes of pages in {folder} ({error}); TMPDIR chooses another"
            ) from None
        starts = [first + n for n in room]
        pages = [np.frombuffer(mapped, dtype, n // np.dtype(dtype).itemsize, start).reshape(shape)
                 for shape, n, start in zip(shapes, sizes, starts, strict=False)]  # fmt: skip
        return [_Mapped(page, mapped, start, n) for page, n, start in zip(pages, sizes, starts, strict=False)]

    def _stretch(self, n):
        """(mapping, where in it) of n new bytes. Each mapping is as long as all before it: few of them, as each holds a file descriptor."""
        if self._mapped is None or self._used + n > len(self._mapped):
            length = max(n, self._end, 1 << 20)
            self._file.truncate(self._end + length)
            self._mapped, self._used = mmap.mmap(self._file.fileno(), length, offset=self._end), 0
            self._end += length
        if n and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self._file.fileno(), self._end - len(self._mapped) + self._used, n)
        self._used += n
        return self._mapped, self._used - n

    def release(self, page):
        if hasattr(mmap, "MADV_DONTNEED"):  # of a shared mapping: the file keeps what was written
            with contextlib.suppress(OSError):  # advice that is not taken costs memory (a process may lock its pages)
                page.mapped.madvise(mmap.MADV_DONTNEED, page.start, page.length)


class _Mapped(np.ndarray):
    """A page of a file: an array that knows its mapping and its place in it."""

    def __new__(cls, array, mapped, start, length):
        page = array.view(cls)
        page.mapped, page.start, page.length = mapped, start, length
        return page

    def __array_finalize__(self, parent):
        self.mapped = self.start = self.length = None


class ManagedPool:
    """CUDA managed memory: one address, on whichever side it was used last; the driver moves it, and moves back what does not fit.

    cudaMallocManaged and cudaMemPrefetchAsync, as bitsandbytes' paged optimizers. Differs from them: with a budget, what exceeds it is
    prefetched back to the host; bitsandbytes leaves eviction to the driver, as it is left here without a budget.
    """

    def __init__(self, xp):
        if xp is np:
            raise ValueError(
                "pager: pool 'managed' is CUDA managed memory, and the device is the CPU; use 'host' or 'file'"
            )
        self.xp = xp

    def allocate(self, shapes, dtype):
        return [copies.managed_zeros(self.xp, shape, dtype) for shape in shapes]

    def exchange(self, back, source, ahead=False):
        for frame, _ in back:
            copies.prefetch_managed(frame, "cpu")
        back.clear()
        if source is not None:
            copies.prefetch_managed(source, "cuda")
        return source

    def wait(self, ticket):
        return ticket

    def release(self, page):
        """The driver's."""

    def finish(self):
        self.xp.cuda.get_current_stream().synchronize()


POOLS = {"host": HostPool, "file": FilePool, "managed": ManagedPool}


class _CopyStream:
    """Copies between page-locked host memory and the device on a stream of their own, ordered against the computation by events."""

    def __init__(self, xp):
        self.xp, self.stream = xp, xp.cuda.Stream(non_blocking=True)

    def exchange(self, back, source):
        """(frame, event that says it has arrived, frames that must live until then)"""
        try:
            return self._exchange(back, source)
        except BaseException:  # it holds the frames that are on their way to the host until this block ends
            self.stream.synchronize()
            raise

    def _exchange(self, back, source):
        computed = self.xp.cuda.get_current_stream().record()  # what is put back has been computed by then
        self.stream.wait_event(computed)
        frame, kept = None, []
        while back:
            old, page = back[-1]
            copies.copy_to_host(old, page, self.stream)
            back.pop()
            if frame is None and source is not None and (old.shape, old.dtype) == (source.shape, source.dtype):
                frame = old
            else:
                kept.append(old)
            del old
        if source is None:
            self.stream.synchronize()  # the memory was asked for now
            return None
        if frame is None:
            with contextlib.suppress(MemoryError):
                frame = self.xp.empty(source.shape, source.dtype)
            if frame is None and kept:  # what waits in the stream may be what is missing
                self.stream.synchronize()
                kept.clear()
            if frame is None:
                frame = self.xp.empty(source.shape, source.dtype)
            # nothing in flight may still use that memory
            self.stream.wait_event(self.xp.cuda.get_current_stream().record())
        copies.copy_to_device(source, frame, self.stream)
        return frame, self.stream.record(), kept

    def wait(self, ticket):
        frame, arrived, kept = ticket
        self.xp.cuda.get_current_stream().wait_event(arrived)
        kept.clear()  # whoever gets their memory next computes in this stream, and so after the event
        return frame

    def synchronize(self):
        self.stream.synchronize()
