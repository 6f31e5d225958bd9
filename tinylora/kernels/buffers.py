"""Memory to compute in, kept from call to call: fresh arrays of a chunk's size cost page faults on many machines."""

import math
import threading

import numpy as np

LARGEST = 1 << 18  # elements of an array that is kept, unless a call allows more


class _Buffers(threading.local):
    """buffer(name, shape, dtype): the calling thread's array of that name. What it held is lost with the next call of that name.

    largest: an array of more elements is a fresh one
    """

    def __init__(self):
        self._kept = {}

    def __call__(self, name, shape, dtype=np.float32, largest=LARGEST):
        size, dtype = math.prod(shape), np.dtype(dtype)
        if size > largest:
            return np.empty(shape, dtype)
        kept = self._kept.get((name, dtype))
        if kept is None or len(kept) < size:
            kept = self._kept[name, dtype] = np.empty(size, dtype)
        return kept[:size].reshape(shape)


buffer = _Buffers()
