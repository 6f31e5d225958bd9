"""Where an array lives: NumPy arrays on the host, CuPy arrays on a GPU.

Operators and methods are the same for both kinds of array. For a function such as exp, the code first asks which module
the array belongs to:

    xp = array_module(x)         # numpy or cupy
    xp.exp(x)

There is no global backend. Host arrays and device arrays live in one process and never mix silently. `move` is the call
that carries an array across, and `transfers` counts what it carried:

    Y = move(X, "cuda")          # host -> device
    x = move(Y, "cpu")           # device -> host

The file also has the random generator of each thread, and the one array function that is written differently for NumPy and
for CuPy: row-wise dot products.

Differs from torch: a device is "cpu" or "cuda", and the second is CuPy's current GPU. Random numbers are drawn on the
host, so that one seed gives the same dropout mask on every device.

Leaves out: several GPUs, streams, and memory that both sides can reach (for these see `kernels.copies`). This is the
only file that imports CuPy. Any module that looks like CuPy will do: `array_module` asks an array's type for its
top-level module. The tests use that to run every array test on a stand-in that refuses what CuPy refuses.
"""

import contextlib
import functools
import importlib
import sys
import threading
from dataclasses import dataclass

import numpy as np


@dataclass
class Transfers:
    """What was carried between host and device, in calls and in bytes, one pair of counters per direction."""

    to_device: int = 0
    to_device_bytes: int = 0
    to_host: int = 0
    to_host_bytes: int = 0

    def count(self, direction, nbytes):
        """One more call in a direction, "to_device" or "to_host"."""
        with _counting:
            setattr(self, direction, getattr(self, direction) + 1)
            setattr(self, f"{direction}_bytes", getattr(self, f"{direction}_bytes") + nbytes)


_counting = threading.Lock()
transfers = Transfers()  # of the whole process: memory on the device is the process's too


def array_module(x):
    """xp = the module whose functions accept x: numpy, or cupy for a device array."""
    return _module_of(type(x))


@functools.cache
def _module_of(kind):
    host = issubclass(kind, (np.ndarray, np.generic, int, float))
    return np if host else sys.modules[kind.__module__.partition(".")[0]]


def is_array(x):
    """True for a host or a device array (an array type with `ravel` and `dtype`), False for scalars and lists."""
    return module_of_arrays(type(x)) is not None


@functools.cache
def module_of_arrays(kind):
    """numpy or cupy for a type of arrays; None for any other type."""
    array = hasattr(kind, "ravel") and hasattr(kind, "dtype") and not issubclass(kind, np.generic)
    return _module_of(kind) if array else None


def device_of(x):
    """Where an array lives: "cpu" (NumPy) or "cuda"."""
    return "cpu" if array_module(x) is np else "cuda"


def cuda():
    """The CuPy module, if a GPU is present.

    Raises RuntimeError with a sentence that says which of the two is missing: CuPy, or the GPU. CuPy imports without a
    GPU, so the question is `cupy.cuda.is_available()`, not whether the import works.
    """
    try:
        cupy = importlib.import_module("cupy")
    except ImportError:
        raise RuntimeError(
            "device cuda: CuPy is not installed; use device cpu, or install it in a clone of tinylora: "
            "pip install -e '.[gpu]' for CUDA 13, '.[gpu12]' for CUDA 12"
        ) from None
    if not cupy.cuda.is_available():
        raise RuntimeError("device cuda: CuPy is installed but finds no GPU; use device cpu")
    return cupy


def module_for(device):
    """The array module of a device name: numpy for "cpu", cupy for "cuda". A module is passed through."""
    if device == "cpu":
        return np
    if device == "cuda":
        return cuda()
    if hasattr(device, "asarray"):
        return device
    raise ValueError(f"device {device!r} is unknown: expected 'cpu' or 'cuda'")


def move(x, device):
    """x on the given device ("cpu", "cuda" or an array module). An array that is already there is returned as it is."""
    xp, here = module_for(device), array_module(x)
    if xp is here:
        return x
    transfers.count("to_host" if xp is np else "to_device", x.nbytes)
    return x.get() if xp is np else xp.asarray(x)


def whole(name, value, least=1, otherwise=""):
    """value as an int, if it is a whole number, `least` or more; else ValueError in a sentence that names it and ends in `otherwise`."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name} = {value!r}, expected a whole number, {least} or more{otherwise}")
    return int(value)


def rowdot(x, y):
    """z_i = Σ_j x_ij y_ij over the last axis. NumPy 2's vecdot makes no temporary; CuPy multiplies and sums."""
    xp = array_module(x)
    return xp.vecdot(x, y) if xp is np else (x * y).sum(-1)


# ---------------------------------------------------------------------------------------------------------------- randomness
_random = threading.local()


def generator():
    """The thread's current NumPy random generator (seeded with 0 until `seed` or `using_generator` says otherwise)."""
    if getattr(_random, "generator", None) is None:
        seed(0)
    return _random.generator


def seed(value):
    """Start this thread's generator anew from `value` (an int, or a list of ints)."""
    _random.generator = np.random.default_rng(value)


@contextlib.contextmanager
def using_generator(rng):
    """Within the block, `generator()` is `rng`. Training gives each (seed, step, shard) one of its own."""
    before, _random.generator = getattr(_random, "generator", None), rng
    try:
        yield rng
    finally:
        _random.generator = before


def uniform_like(x):
    """Uniform [0, 1) numbers of x's shape, float32, on x's device.

    Drawn on the host on purpose: the same seed then gives the same dropout mask on every device, at the price of a
    counted transfer.
    """
    return move(generator().random(x.shape, dtype=np.float32), array_module(x))
