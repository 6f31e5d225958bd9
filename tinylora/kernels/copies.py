"""Memory that a device can reach by itself, copies in a stream, and freed memory of the host: returned at once, or kept."""

import contextlib
import math
import mmap
import sys
from functools import cache

import numpy as np

from .. import backend
from ..backend import array_module


# ------------------------------------------------------------------------------------- memory that a device can reach by itself
def pinned_zeros(xp, shape, dtype):
    """Zero-filled host memory; page-locked if xp is a device's module, so that copies from and to it can run beside the computation."""
    if xp is np:
        return np.zeros(shape, dtype)
    n = int(np.prod(shape))
    memory = xp.cuda.alloc_pinned_memory(n * np.dtype(dtype).itemsize)
    page = np.frombuffer(memory, dtype, n).reshape(shape)
    page[...] = 0
    return page


def copy_to_device(page, frame, stream):
    """frame ← page in a stream; page-locked memory makes it asynchronous. Counted."""
    frame.set(np.asarray(page), stream=stream)
    backend.transfers.count("to_device", page.nbytes)


def copy_to_host(frame, page, stream):
    """page ← frame in a stream. Counted."""
    frame.get(out=np.asarray(page), stream=stream, blocking=False)
    backend.transfers.count("to_host", page.nbytes)


def managed_zeros(xp, shape, dtype):
    """A zero-filled device array in CUDA managed memory (cudaMallocManaged): the driver keeps it on the side where it was used last."""
    n = int(np.prod(shape)) * np.dtype(dtype).itemsize
    page = xp.ndarray(shape, dtype, memptr=xp.cuda.malloc_managed(n))
    page.fill(0)
    return page


def prefetch_managed(page, device):
    """Ask the driver to bring managed memory to "cuda" or "cpu" (cudaMemPrefetchAsync) in the current stream."""
    cuda = array_module(page).cuda
    stream = cuda.get_current_stream().ptr
    if device == "cpu" and cuda.runtime.runtimeGetVersion() >= 13000:
        _prefetch_to_host(page.data.ptr, page.nbytes, stream)
    else:
        where = -1 if device == "cpu" else cuda.Device().id  # −1: cudaCpuDeviceId
        cuda.runtime.memPrefetchAsync(page.data.ptr, page.nbytes, where, stream)


def _prefetch_to_host(address, nbytes, stream):
    """The same since CUDA 13, where a place is a kind and a number: CuPy 14.2 takes −1 for a device there, which does not exist."""
    from cuda.bindings import runtime  # comes with CuPy's wheel for CUDA 13

    host = runtime.cudaMemLocation()
    host.type = runtime.cudaMemLocationType.cudaMemLocationTypeHost
    (error,) = runtime.cudaMemPrefetchAsync(address, nbytes, host, 0, stream)
    if error != runtime.cudaError_t.cudaSuccess:
        raise RuntimeError(f"pager: managed memory could not be prefetched to the host ({error.name})")


# ------------------------------------------------------------------------------------------------------ freed memory of the host
def returned_when_dropped(shape, dtype):
    """An array whose memory goes back to the system when the last reference does. malloc may keep it in a hole of its heap, where the large
    array that needs room finds none. For 64 kB and more; smaller ones, and more than the system maps, come from malloc all the same.
    """
    nbytes, private = math.prod(shape) * np.dtype(dtype).itemsize, getattr(mmap, "MAP_PRIVATE", None)
    if nbytes >= 1 << 16:
        with contextlib.suppress(OSError):
            memory = mmap.mmap(-1, nbytes) if private is None else mmap.mmap(-1, nbytes, flags=private)
            return np.frombuffer(memory, dtype).reshape(shape)
    return np.empty(shape, dtype)


@cache
def raise_trim_threshold():
    """Let glibc keep up to 62 MB at the end of its heap, which a step frees and the next one needs again.

    glibc gives the end of the heap back to the system when more is free there than twice the largest block that it has unmapped so far
    (mallopt(3), M_MMAP_THRESHOLD; 32 MB at the most count). A step's temporaries together are more than twice the largest of them: each
    step gives them back, and the next one has a page fault for every 4 kB. One block of 31 MB, freed untouched, raises the bound once.

    A training step in a loop of one's own then takes 0.83 of the time (the embedded model in full, 8 × 256 tokens), and a QLoRA linear
    layer of 1024 × 1024 takes 0.68. Where lengths change from step to step it takes 0.93 to 0.97; the peak is the same within 2 %, and at
    the end the process holds up to 28 MB more. This is malloc's own rule, for the whole process: who has set mallopt or MALLOC_ variables
    keeps them, and `keep_freed_memory`, which keeps more, comes before it. Linux alone.
    """
    if sys.platform.startswith("linux"):
        with contextlib.suppress(MemoryError):
            np.empty((31 << 20) - (1 << 12), np.uint8)  # 31 MB with malloc's own words, rounded up to pages


def keep_freed_memory():
    """Ask glibc to keep freed blocks below 16 MB instead of returning them to the kernel. True if it was possible.

    A training step frees and allocates the same large temporaries again and again; each fresh block costs page faults,
    which can be a third of the step. Larger blocks (the logits of a large vocabulary) are still returned: kept, those of one
    length do not fit the next, and the heap grows with every new length. Linux with glibc only. Never called at import: it
    changes the whole process.
    """
    if not sys.platform.startswith("linux"):
        return False
    import ctypes

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3
    big = 2**31 - 1
    return all([mallopt(m_mmap_threshold, 16 << 20), mallopt(m_trim_threshold, big), mallopt(m_top_pad, 64 << 20)])
