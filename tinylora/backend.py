"""Where arrays live: NumPy on the host, CuPy on the device.

This is the only file that knows CuPy exists. The rest of tinylora uses operators and methods, which both kinds of array
share, and asks `array_module(x)` where it needs a function (`xp.exp`, `xp.concatenate`). There is no global backend:
host and device arrays live in one process, they never mix silently, and `move` is the one call that carries bytes
across.

    Y = move(X, "cuda")          # host -> device, counted in `transfers`
    x = move(Y, "cpu")           # device -> host, counted

Any module that looks like CuPy will do: `array_module` asks an array's type which top-level module it came from. That
is how the tests run every array test on a stand-in that refuses what CuPy refuses.
"""

import contextlib
import importlib
import sys
import threading
from dataclasses import dataclass

import numpy as np


@dataclass
class Transfers:
    """What `move` has carried, in calls and in bytes, one pair of counters per direction."""

    to_device: int = 0
    to_device_bytes: int = 0
    to_host: int = 0
    to_host_bytes: int = 0


transfers = Transfers()
counting = threading.Lock()


def array_module(x):
    """xp = the module whose functions accept x: numpy, or cupy for a device array."""
    if isinstance(x, (np.ndarray, np.generic, int, float)):
        return np
    return sys.modules[type(x).__module__.partition(".")[0]]


def is_array(x):
    """True for a host or a device array (anything with `shape`, `dtype` and `__getitem__`), False for scalars and lists."""
    kind = type(x)
    return kind is np.ndarray or (
        hasattr(kind, "ravel") and hasattr(kind, "dtype") and not issubclass(kind, np.generic)
    )


def device_of(x):
    """ "cpu" for a NumPy array, "cuda" for a device array."""
    return "cpu" if array_module(x) is np else "cuda"


def cuda():
    """The CuPy module, if a GPU is present.

    Raises RuntimeError with a sentence that says which of the two is missing: CuPy, or the GPU. CuPy imports without a
    GPU, so the question is `cupy.cuda.is_available()`, not whether the import works.
    """
    try:
        cupy = importlib.import_module("cupy")
    except ImportError:
        raise RuntimeError("device cuda: CuPy is not installed (pip install 'tinylora[gpu]'); use device cpu") from None
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
    with counting:
        if xp is np:
            transfers.to_host += 1
            transfers.to_host_bytes += x.nbytes
        else:
            transfers.to_device += 1
            transfers.to_device_bytes += x.nbytes
    return x.get() if xp is np else xp.asarray(x)


def special(xp):
    """scipy.special for numpy, cupyx.scipy.special for cupy: `erf` lives there."""
    return importlib.import_module("scipy.special" if xp is np else f"{xp.__name__}x.scipy.special")


def rowdot(x, y):
    """z_i = Σ_j x_ij y_ij over the last axis. NumPy 2's vecdot makes no temporary; CuPy multiplies and sums."""
    xp = array_module(x)
    return xp.vecdot(x, y) if xp is np else (x * y).sum(-1)


def scatter_add(rows, index, n):
    """W̄[index[i]] += rows[i]: the adjoint of a table look-up. rows (m, d), index (m,) -> (n, d).

    `np.add.at` walks element by element; sorting the index first and adding runs with `reduceat` is about ten times as
    fast and adds in the same order every time. On a GPU the additions are atomic and their order is not fixed: training an embedding
    there is not reproducible to the last bit.
    """
    xp = array_module(rows)
    out = xp.zeros((n, *rows.shape[1:]), dtype=rows.dtype)
    if xp is not np:
        xp.add.at(out, index, rows)
        return out
    if len(index) == 0:
        return out
    order = np.argsort(index, kind="stable")
    ordered = index[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    out[ordered[starts]] = np.add.reduceat(rows[order], starts, axis=0)
    return out


# ---------------------------------------------------------------------------------------------------------------- randomness
class _Random(threading.local):
    generator = None


_random = _Random()


def generator():
    """The thread's current NumPy random generator (seeded with 0 until `seed` or `using_generator` says otherwise)."""
    if _random.generator is None:
        seed(0)
    return _random.generator


def seed(value):
    """Start this thread's generator anew from `value` (an int, or a list of ints)."""
    _random.generator = np.random.default_rng(value)


@contextlib.contextmanager
def using_generator(rng):
    """Within the block, `generator()` is `rng`. Training gives each (seed, step, shard) one of its own."""
    before, _random.generator = _random.generator, rng
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
