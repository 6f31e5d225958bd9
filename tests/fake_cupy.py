"""A stand-in for CuPy: NumPy underneath, refusing what CuPy refuses.

    * a device array and a NumPy array never meet in one operation; only `asarray` and `.get()` cross, and they are counted
    * np.asarray(device array) raises, as CuPy's does
    * a function that CuPy lacks is missing here (`errstate`, `erf`, `vecdot`, `maximum.reduceat`, …): only those listed exist
    * with `limit` set, an allocation that would exceed it raises OutOfMemoryError
    * a copy in a stream of its own happens as late as possible: only when an event behind it is waited for, or the stream. What
      forgets to wait reads what was there before. With streams["lazy"] = False it happens at once, which is as legal
    * memory that is freed is overwritten: what still reads it reads NaN
    * managed memory is device memory that remembers where it was prefetched

It counts what a GPU is slow at: `counters["launches"]`, each array operation that is no view, and `counters["stops"]`, each time that the
host needs a number from the device and has to wait for it. Kernels in CUDA C run here as well where tests/cuda_on_host.py has a compiler:
`compile_kernels` gives this module what CuPy compiles with.

It is stricter than CuPy in one way: NumPy's own functions refuse a device array, where CuPy would take over. Not a
simulation of speed. tinylora finds it as it finds CuPy, by the module that an array's type came
from.
"""

import ctypes
import sys
import tempfile
import types
import weakref
from pathlib import Path

import numpy as np

float32, float64, float16, uint8, uint16, uint32, int64 = (
    np.float32,
    np.float64,
    np.float16,
    np.uint8,
    np.uint16,
    np.uint32,
    np.int64,
)
__version__ = "14"
newaxis, inf, nan, pi = None, np.inf, np.nan, np.pi

_FUNCTIONS = [
    "abs",
    "add",
    "all",
    "any",
    "arange",
    "argmax",
    "argsort",
    "array_equal",
    "ascontiguousarray",
    "broadcast_to",
    "clip",
    "concatenate",
    "copysign",
    "cos",
    "cumsum",
    "divide",
    "empty",
    "empty_like",
    "equal",
    "exp",
    "expand_dims",
    "flatnonzero",
    "full",
    "full_like",
    "greater",
    "isfinite",
    "isnan",
    "less_equal",
    "log",
    "log1p",
    "matmul",
    "maximum",
    "mean",
    "minimum",
    "multiply",
    "ones",
    "ones_like",
    "outer",
    "prod",
    "repeat",
    "rint",
    "sign",
    "sin",
    "sqrt",
    "square",
    "stack",
    "subtract",
    "sum",
    "take",
    "tanh",
    "triu",
    "tril",
    "vdot",
    "where",
    "zeros",
    "zeros_like",
]

counters = {"to_device": 0, "to_host": 0, "launches": 0, "stops": 0}
_VIEWS = {
    "reshape",
    "swapaxes",
    "transpose",
    "view",
    "squeeze",
    "ravel",
    "broadcast_to",
    "expand_dims",
    "empty",
    "empty_like",
}
memory = {"used": 0, "limit": None}
_wrapped = weakref.WeakValueDictionary()


class OutOfMemoryError(MemoryError):
    "What cupy.cuda.memory.OutOfMemoryError is to CuPy."


def _release(a):
    memory["used"] -= a.nbytes
    if a.flags.writeable and a.size:
        a.reshape(-1).view(np.uint8)[...] = 255


def _wrap(a):
    """A device array around a NumPy array; the same one each time, so that identity works as with CuPy."""
    if isinstance(a, tuple):
        return tuple(map(_wrap, a))
    if not isinstance(a, (np.ndarray, np.generic)):
        return a
    a = np.asarray(a)
    if id(a) in _wrapped:
        return _wrapped[id(a)]
    x = object.__new__(ndarray)
    x._a, x._base = a, None
    if a.base is None:
        if memory["limit"] is not None and memory["used"] + a.nbytes > memory["limit"]:
            raise OutOfMemoryError(
                f"out of memory allocating {a.nbytes:,} bytes (allocated so far: {memory['used']:,})"
            )
        memory["used"] += a.nbytes
        weakref.finalize(x, _release, a)
    else:
        x._base = _wrapped.get(id(a.base))  # a view keeps what it looks at
    _wrapped[id(a)] = x
    return x


def _unwrap(x):
    if isinstance(x, ndarray):
        return x._a
    if isinstance(x, np.ndarray):
        raise TypeError("Unsupported type <class 'numpy.ndarray'>")
    if isinstance(x, (tuple, list)):
        return type(x)(map(_unwrap, x))
    if isinstance(x, slice):
        return x
    if isinstance(x, dict):
        return {k: _unwrap(v) for k, v in x.items()}
    return x


def _call(f, *args, **kwargs):
    return _wrap(f(*map(_unwrap, args), **_unwrap(kwargs)))


class _Function:
    """A NumPy function or ufunc behind the counter; `.at` exists where CuPy has it, `.reduceat` does not."""

    def __init__(self, f):
        self._f, self.__name__ = f, f.__name__

    def __call__(self, *args, **kwargs):
        counters["launches"] += self.__name__ not in _VIEWS
        return _call(self._f, *args, **kwargs)

    def at(self, *args):
        return _call(self._f.at, *args)


class ndarray:
    "A device array."

    __array_ufunc__ = None

    def __array__(self, *args, **kwargs):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    def __new__(cls, shape, dtype, memptr):
        return _wrap(memptr.array.view(dtype).reshape(shape))

    def get(self, stream=None, out=None, blocking=True):
        counters["to_host"] += 1
        counters["stops"] += blocking
        if out is None:
            return self._a.copy()
        memory = self._a  # and not the array: a copy on its way keeps nothing alive
        (stream or _default)._do(lambda: np.copyto(out, memory))
        if blocking:
            (stream or _default).synchronize()
        return out

    def set(self, host, stream=None):
        if not isinstance(host, np.ndarray):
            raise TypeError("Only a NumPy array can be set")
        counters["to_device"] += 1
        memory = self._a
        (stream or _default)._do(lambda: np.copyto(memory, host))

    @property
    def data(self):
        return types.SimpleNamespace(ptr=self._a.ctypes.data)

    def __getitem__(self, key):
        return _wrap(self._a[_unwrap(key)])

    def __setitem__(self, key, value):
        counters["launches"] += 1
        self._a[_unwrap(key)] = _unwrap(value)

    def __len__(self):
        return len(self._a)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __bool__(self):
        counters["stops"] += 1
        return bool(self._a)

    def __float__(self):
        counters["stops"] += 1
        return float(self._a)

    def __int__(self):
        counters["stops"] += 1
        return int(self._a)

    def __index__(self):
        return self._a.__index__()

    def __repr__(self):
        return f"fake_cupy.{self._a!r}"

    def __deepcopy__(self, memo):
        return self.copy()

    def item(self):
        counters["stops"] += 1
        return self._a.item()

    @property
    def base(self):
        if self._base is None and self._a.base is not None:
            self._base = _wrap(self._a.base)  # the same object at every look, as long as this one lives
        return self._base

    @property
    def flags(self):
        f = self._a.flags
        return types.SimpleNamespace(c_contiguous=f.c_contiguous, f_contiguous=f.f_contiguous, owndata=f.owndata)

    __hash__ = object.__hash__


def _method(name):
    def method(self, *args, **kwargs):
        counters["launches"] += name not in _VIEWS
        if name in _IN_PLACE:
            if getattr(self._a, name)(*map(_unwrap, args)) is NotImplemented:
                raise TypeError(f"{name} is not possible with {args}")
            return self
        return _call(getattr(self._a, name), *args, **kwargs)

    return method


_BINARY = ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift"]
_IN_PLACE = {f"__i{name}__" for name in _BINARY}
for _name in (
    *(f"__{n}__" for n in _BINARY),
    *(f"__r{n}__" for n in _BINARY),
    *_IN_PLACE,
    "__neg__",
    "__abs__",
    "__invert__",
    "__eq__",
    "__ne__",
    "__lt__",
    "__le__",
    "__gt__",
    "__ge__",
    "all",
    "any",
    "argmax",
    "argmin",
    "astype",
    "copy",
    "cumsum",
    "dot",
    "fill",
    "max",
    "mean",
    "min",
    "ravel",
    "repeat",
    "reshape",
    "squeeze",
    "sum",
    "swapaxes",
    "take",
    "transpose",
    "view",
):
    setattr(ndarray, _name, _method(_name))


def _matmul(self, other):
    """The product; of two-byte numbers as cuBLAS makes it: sums in float32, rounded once."""
    counters["launches"] += 1
    a, b = _unwrap(self), _unwrap(other)
    if a.dtype.itemsize == b.dtype.itemsize == 2:
        with np.errstate(over="ignore"):
            return _wrap((a.astype(np.float32) @ b.astype(np.float32)).astype(a.dtype))
    return _wrap(a @ b)


ndarray.__matmul__ = _matmul
for _name in ["shape", "dtype", "ndim", "size", "nbytes", "flags", "strides", "itemsize", "T", "mT"]:
    setattr(ndarray, _name, property(lambda self, n=_name: _wrap(getattr(self._a, n))))

for _name in _FUNCTIONS:
    globals()[_name] = _Function(getattr(np, _name))


def compile_kernels(on):
    """Let this module compile kernels, as CuPy does, or not: RawModule is what is looked for. They are not kept among CuPy's."""
    import cuda_on_host

    from tinylora.kernels import cuda

    if on:
        globals()["RawModule"] = cuda_on_host.RawModule
        _folders.setdefault("cupy's", cuda.folder)
        cuda.folder = lambda: Path(_kept.name)
    else:
        globals().pop("RawModule", None)
        cuda.folder = _folders.get("cupy's", cuda.folder)


_kept, _folders = tempfile.TemporaryDirectory(), {}


def asarray(x, dtype=None):
    """Host data comes to the device here, and is counted."""
    if isinstance(x, ndarray):
        return x if dtype is None else x.astype(dtype)
    counters["to_device"] += isinstance(x, np.ndarray)
    return _wrap(np.array(x, dtype=dtype))


array = asarray


streams = {"lazy": True}


class _Event:
    """A place in a stream's queue; None for a stream that never waits."""

    def __init__(self, stream, place):
        self.stream, self.place = stream, place

    def synchronize(self):
        self.stream._run(self.place)


class _Stream:
    """Work that is done as late as possible; the default stream does it at once."""

    ptr = 0

    def __init__(self, non_blocking=False, lazy=None):
        self.lazy, self.waiting, self.done = streams["lazy"] if lazy is None else lazy, [], 0

    def _do(self, work):
        if self.lazy:
            self.waiting.append(work)
        else:
            work()

    def _run(self, place):
        while self.done < place:
            self.waiting.pop(0)()
            self.done += 1

    def record(self):
        return _Event(self, self.done + len(self.waiting))

    def wait_event(self, event):
        self._do(event.synchronize)

    def synchronize(self):
        self._run(self.done + len(self.waiting))


_default = _Stream(lazy=False)
managed = {}  # address -> where that managed memory was prefetched last


def _malloc_managed(nbytes):
    return types.SimpleNamespace(array=np.empty(nbytes, np.uint8))


def _gemm(
    handle,
    ta,
    tb,
    m,
    n,
    k,
    one,
    a,
    a_type,
    lda,
    a_stride,
    b,
    b_type,
    ldb,
    b_stride,
    zero,
    c,
    c_type,
    ldc,
    c_stride,
    count,
    *how,
):
    """cublasGemmStridedBatchedEx: c = op(a) op(b) for `count` matrices each, all of them stored column after column."""
    import ml_dtypes

    kinds = {0: np.float32, 2: np.float16, 14: ml_dtypes.bfloat16}
    assert handle == "handle" and how == (68, -1) and a_type == b_type and c_type in (0, a_type)
    assert (ctypes.c_float.from_address(one).value, ctypes.c_float.from_address(zero).value) == (1, 0)

    def matrices(address, kind, rows, columns, ld, stride):
        dtype = np.dtype(kinds[kind])
        size = (stride * (count - 1) + ld * (columns - 1) + rows) * dtype.itemsize
        flat = np.frombuffer((ctypes.c_char * size).from_address(address), dtype)
        strides = tuple(dtype.itemsize * s for s in (stride, 1, ld))
        return np.lib.stride_tricks.as_strided(flat, (count, rows, columns), strides)

    counters["launches"] += 1
    x = matrices(a, a_type, *((k, m) if ta else (m, k)), lda, a_stride).astype(np.float32)
    y = matrices(b, b_type, *((n, k) if tb else (k, n)), ldb, b_stride).astype(np.float32)
    with np.errstate(all="ignore"):
        z = (x.swapaxes(1, 2) if ta else x) @ (y.swapaxes(1, 2) if tb else y)
        matrices(c, c_type, m, n, ldc, c_stride)[...] = z.astype(kinds[c_type])


class _Module:
    """cupy.cuda.function.Module of what `_compile_using_nvrtc` made: the source itself, run on the host."""

    def load(self, binary):
        self.get_function = globals()["RawModule"](code=binary.decode(), options=("-std=c++17",)).get_function


def _compile_using_nvrtc(source, options):
    assert options == ("-std=c++17", "--fmad=false"), "as the host runs it: nothing fused, denormals kept"
    return source.encode(), None


cuda = types.SimpleNamespace(
    compiler=types.SimpleNamespace(compile_using_nvrtc=_compile_using_nvrtc),
    function=types.SimpleNamespace(Module=_Module),
    device=types.SimpleNamespace(get_cublas_handle=lambda: "handle"),
    is_available=lambda: True,
    memory=types.SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
    Stream=_Stream,
    get_current_stream=lambda: _default,
    alloc_pinned_memory=bytearray,
    malloc_managed=_malloc_managed,
    Device=lambda: types.SimpleNamespace(id=0, compute_capability="90"),
    nvrtc=types.SimpleNamespace(getVersion=lambda: (12, 9)),
    runtime=types.SimpleNamespace(
        is_hip=False,
        runtimeGetVersion=lambda: 12090,
        memPrefetchAsync=lambda ptr, nbytes, device, stream: managed.__setitem__(ptr, device),
    ),
)

# cupyx.scipy.special, under the name that tinylora derives from the module's own
_special = types.ModuleType(__name__ + "x.scipy.special")


def _erf(x):
    from scipy.special import erf

    return _call(erf, x)


_special.erf = _erf
_cublas = types.ModuleType(f"{__name__}_backends.cuda.libs.cublas")
_cublas.gemmStridedBatchedEx, _cublas.CUBLAS_COMPUTE_32F, _cublas.CUBLAS_GEMM_DEFAULT = _gemm, 68, -1
sys.modules[_cublas.__name__] = _cublas
for _part in ("x", "x.scipy", "_backends", "_backends.cuda", "_backends.cuda.libs"):
    sys.modules[__name__ + _part] = types.ModuleType(__name__ + _part)
sys.modules[_special.__name__] = _special
