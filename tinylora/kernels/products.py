"""Products of matrices in 16 bits: the operands rounded, the sums in float32, the result rounded once.

    y = a b + bias                                                        dtype "float32"
    y = round(round(a) round(b) + round(bias))                            dtype "bfloat16" or "float16": what tensor cores compute

NumPy multiplies rounded numbers that are held as float32, and takes the time of a float32 product. CuPy (14 or later) multiplies arrays of
two bytes on the tensor cores. Both mean the same; a sum in another order may be rounded to the neighbouring number.
"""

import importlib
import math
from functools import cache

import numpy as np

from ..backend import array_module
from ..dtypes import round_to

DTYPES = ("float32", "bfloat16", "float16")


def two_bytes(dtype):
    """The array dtype of "float16" or "bfloat16" on a device."""
    if dtype == "float16":
        return np.float16
    from ml_dtypes import bfloat16  # CuPy's own bfloat16 is this one

    return bfloat16


@cache
def multiplied_in(xp, dtype):
    """The array dtype in which a device's array module multiplies. ValueError for bfloat16 on a GPU that has no such products."""
    if dtype == "bfloat16" and int(xp.cuda.Device().compute_capability) < 80:
        raise ValueError(
            f"compute_dtype 'bfloat16': this GPU has compute capability {xp.cuda.Device().compute_capability}, and products "
            "of bfloat16 begin with 80 (Ampere); use 'float16' or 'float32'"
        )
    return np.float32 if dtype == "float32" else two_bytes(dtype)


def held(x, dtype):
    """x rounded to a logical dtype, in the array that is multiplied: two bytes a number on a device, float32 on NumPy."""
    if dtype == "float32":
        return widened(x)
    if array_module(x) is not np:
        return x.astype(multiplied_in(array_module(x), dtype), copy=False)
    return round_to(x, dtype).astype(np.float32, copy=False)


def widened(x):
    """An array of two-byte numbers as float32; any other as it is."""
    return x.astype(np.float32) if x.dtype.itemsize == 2 else x


def rounded(x, dtype):
    """x rounded to a logical dtype, as float32."""
    return widened(held(x, dtype))


def product(a, b, dtype="float32", bias=None):
    """a b + bias as the module's equations round it. a (..., n, k), b (..., k, m), bias (m,) or None -> (..., n, m) float32"""
    a, b = held(a, dtype), held(b, dtype)
    if bias is None:
        return rounded(a @ b, dtype)  # on a device the product is rounded already, and this widens it
    y = a @ b if a.dtype.itemsize > 2 else _not_yet_rounded(a, b)
    y += rounded(bias, dtype)
    return rounded(y, dtype)


def _not_yet_rounded(a, b):
    """a b of two-byte matrices on a device as float32. (CuPy's matmul with dtype=float32 rounds to two bytes first.)"""
    xp, turned = array_module(a), not b.flags.c_contiguous
    return batched(xp.ascontiguousarray(a), xp.ascontiguousarray(b.T if turned else b), b_t=turned, out=np.float32)


def batched(a, b, a_t=False, b_t=False, out=None):
    """a b of two stacks of matrices on a device, (..., n, k) and (..., k, m) in one piece each, read as transposed where a_t or b_t say so.

    Sums in float32, rounded once to `out`: the arrays' own dtype, or float32. CuPy's @ copies a transposed stack, and some of its versions
    multiply stacks of 16 bits in float32; cuBLAS, which is called here, reads a stack as it lies.
    """
    xp, library = array_module(a), _cublas(array_module(a).__name__)
    out = np.dtype(a.dtype if out is None else out)
    if library is None:
        a, b = (x.astype(out, copy=False) for x in (a, b))
        return (a.swapaxes(-1, -2) if a_t else a) @ (b.swapaxes(-1, -2) if b_t else b)
    n, k = a.shape[-2:][:: -1 if a_t else 1]
    m, stack = b.shape[-2 if b_t else -1], math.prod(a.shape[:-2])
    y = xp.empty((*a.shape[:-2], n, m), out)
    kind = _KINDS[a.dtype.name]
    # cuBLAS counts down the columns: what it takes for (a b)ᵀ = bᵀ aᵀ is a b in rows
    first = b.data.ptr, kind, b.shape[-1], b.shape[-2] * b.shape[-1]
    second = a.data.ptr, kind, a.shape[-1], a.shape[-2] * a.shape[-1]
    how = stack, library.CUBLAS_COMPUTE_32F, library.CUBLAS_GEMM_DEFAULT
    numbers = _ONE.ctypes.data, *first, *second, _ZERO.ctypes.data, y.data.ptr, _KINDS[out.name], m, n * m
    library.gemmStridedBatchedEx(xp.cuda.device.get_cublas_handle(), int(b_t), int(a_t), m, n, k, *numbers, *how)
    return y


_KINDS = {"float32": 0, "float16": 2, "bfloat16": 14}  # cudaDataType
_ONE, _ZERO = np.ones(1, np.float32), np.zeros(1, np.float32)


@cache
def _cublas(module):
    """CuPy's own door to cuBLAS; None if this array module has none."""
    try:
        return importlib.import_module(f"{module}_backends.cuda.libs.cublas")
    except ImportError:
        return None
