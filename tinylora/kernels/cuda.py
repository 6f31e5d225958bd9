"""The kernels of cuda.cu: compiled by NVRTC, through CuPy, when the first one is asked for, and started.

Each kernel is one equation of the library, which stands above it, and tests/test_cuda.py holds it to the array version. Where the order of
operations can be kept, the bits are equal; a kernel that adds up a row, or takes tanh, exp or log, agrees to a few units in the last place.
`kernels.device` says which operation uses which kernel. A machine without CuPy reads none of this.
"""

import contextlib
import os
from functools import cache

import numpy as np

THREADS = 256  # of a block; the source says 256, too
DTYPES = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.uint16}  # as which the source sees them


#: Nothing is fused, and denormals are kept: each operation is NumPy's.
OPTIONS = ("-std=c++17", "--fmad=false")


def available(xp):
    """Whether an array module compiles kernels for an NVIDIA GPU: CuPy does."""
    return hasattr(xp, "RawModule") and not xp.cuda.runtime.is_hip


@cache
def source():
    with open(os.path.join(os.path.dirname(__file__), "cuda.cu"), encoding="utf-8") as file:
        return file.read()


@cache
def _kernel(xp, name):
    return _module(xp).get_function(name)


@cache
def _module(xp):
    """The loaded module. Its binary is kept beside CuPy's own kernels, behind its hash, because every process would compile it again."""
    about = source(), OPTIONS, xp.__version__, xp.cuda.nvrtc.getVersion(), xp.cuda.Device().compute_capability
    name = f"tinylora_{_hash(repr(about).encode()).hex()[:32]}.cubin"
    if (binary := _kept(name)) is None:
        # not by CuPy's RawModule, which adds -ftz=true to any options: denormals would be zeros, and 1e-38 a denormal
        binary, _ = xp.cuda.compiler.compile_using_nvrtc(source(), OPTIONS)
        _keep(name, binary)
    module = xp.cuda.function.Module()
    module.load(binary)
    return module


def _hash(data):
    import hashlib

    return hashlib.sha256(data).digest()


def folder():
    """Where CuPy keeps compiled kernels: CUPY_CACHE_DIR, or ~/.cupy/kernel_cache; None if CUPY_CACHE_IN_MEMORY is set."""
    if os.environ.get("CUPY_CACHE_IN_MEMORY", "0") not in ("", "0"):
        return None
    from pathlib import Path

    return Path(os.environ.get("CUPY_CACHE_DIR") or os.path.expanduser("~/.cupy/kernel_cache"))


def _kept(name):
    """The bytes that were kept under a name; None if there are none, or damaged ones."""
    try:
        found = (folder() / name).read_bytes() if folder() else b""
    except OSError:
        return None
    return found[32:] if found[32:] and _hash(found[32:]) == found[:32] else None


def _keep(name, binary):
    """Write a file whole, or not at all. Where nothing can be written it is compiled again next time."""
    if not folder():
        return
    import tempfile  # only where it is needed, as hashlib and pathlib: they take as long to import as half of the core

    with contextlib.suppress(OSError):
        folder().mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder(), prefix=name, delete=False) as new:
            try:
                new.write(_hash(binary) + binary)
                new.close()
                os.replace(new.name, folder() / name)
            except OSError:
                os.unlink(new.name)
                raise


def launch(xp, name, n, *arguments, threads=1, most=None):
    """Start kernel `name` for n elements or rows with so many threads each, in `most` blocks at the most.

    arguments: C-contiguous arrays, and NumPy scalars of the kernel's own types
    """
    blocks = -(-n * threads // THREADS)
    if blocks:
        _kernel(xp, name)((min(blocks, most or blocks),), (THREADS,), arguments)
