"""Products of matrices in 16 bits: the operands rounded, the sums in float32, the result rounded once.

    y = a b + bias                                                        dtype "float32"
    y = round(round(a) round(b) + round(bias))                            dtype "bfloat16" or "float16": what tensor cores compute

NumPy multiplies rounded numbers that are held as float32, and takes the time of a float32 product. CuPy (14 or later) multiplies arrays of
two bytes on the tensor cores. Both mean the same; a sum in another order may be rounded to the neighbouring number.
"""

import importlib
import math
import sys
from functools import cache

import numpy as np

from ..backend import array_module
from ..dtypes import round_to
from . import casts
from .casts import multiplied_in
from .copies import raise_trim_threshold

DTYPES = ("float32", "bfloat16", "float16")
_MAPPED = 1 << 17  # bytes of a result from which on page faults take time: smaller ones are used again at once


def held(x, dtype):
    """x rounded to a logical dtype, in the array that is multiplied: two bytes a number on a device, float32 on NumPy."""
    if dtype == "float32":
        return widened(x)
    if array_module(x) is np:
        return round_to(x, dtype).astype(np.float32, copy=False)
    kind = multiplied_in(array_module(x), dtype)
    if x.dtype == kind:
        return x
    if x.ndim == 2 and x.flags.f_contiguous and not x.flags.c_contiguous:
        return held(x.T, dtype).T
    return casts.to_16bit(x, dtype) if x.dtype == np.float32 and casts.vectorizable(x) else x.astype(kind)


def widened(x):
    """An array of two-byte numbers as float32; any other as it is."""
    if x.dtype.itemsize != 2:
        return x
    return casts.to_float32(x) if array_module(x) is not np and casts.vectorizable(x) else x.astype(np.float32)


def rounded(x, dtype):
    """x rounded to a logical dtype, as float32."""
    return widened(held(x, dtype))


def product(a, b, dtype="float32", bias=None):
    """a b + bias as the module's equations round it. a (..., n, k), b (..., k, m), bias (m,) or None -> (..., n, m) float32"""
    a, b = held(a, dtype), held(b, dtype)
    if bias is None:
        return rounded(multiplied(a, b), dtype)  # on a device the product is rounded already, and this widens it
    y = multiplied(a, b, np.float32)
    y += rounded(bias, dtype)
    return rounded(y, dtype)


def multiplied(a, b, out=None):
    """a b of arrays as `held` gives them; two-byte numbers on a device are rounded once to `out`, their own dtype or float32."""
    if a.dtype.itemsize > 2:
        y = by_scipy(a, b) if sys.platform == "emscripten" else a @ b
        if type(y) is np.ndarray and y.nbytes >= _MAPPED:
            raise_trim_threshold()
        return y
    if not a.ndim == b.ndim == 2 or not (a.size and b.size):
        # of bfloat16 CuPy 14.2 multiplies no stacks: "data type 'E' not understood"
        return (a.astype(np.float32) @ b.astype(np.float32)).astype(a.dtype if out is None else out, copy=False)
    # not by CuPy's matmul: with dtype=float32 it rounds to two bytes first
    (a, a_t), (b, b_t) = (_in_one_piece(x) for x in (a, b))
    return batched(a, b, a_t, b_t, out)


def by_scipy(a, b):
    """a b, for float32 matrices by SciPy's BLAS: in a browser NumPy has none, and its own loops take three times as long."""
    if not (a.ndim == b.ndim == 2 and a.dtype == b.dtype == np.float32 and a.size and b.size):
        return a @ b
    from scipy.linalg.blas import sgemm

    (a, a_t), (b, b_t) = (_in_one_piece(x) for x in (a, b))
    return sgemm(1.0, b.T, a.T, trans_a=b_t, trans_b=a_t).T  # BLAS counts down the columns: (a b)ᵀ = bᵀ aᵀ


def _in_one_piece(x):
    """(a matrix or its transpose, whichever lies row by row; whether it is the transpose)"""
    turned = x.flags.f_contiguous and not x.flags.c_contiguous
    return (x.T, True) if turned else (array_module(x).ascontiguousarray(x), False)


def batched(a, b, a_t=False, b_t=False, out=None):
    """a b of two stacks of matrices on a device, (..., n, k) and (..., k, m) in one piece each, read as transposed where a_t or b_t say so.

    Sums in float32, rounded once to `out`: the arrays' own dtype, or float32. (Where cuBLAS splits a long sum, its default mode lets it add
    the parts in `out`.) CuPy's @ copies a transposed stack, and some of its versions
    multiply stacks of 16 bits in float32; cuBLAS, which is called here, reads a stack as it lies.
    """
    xp, library = array_module(a), _cublas(array_module(a).__name__)
    if a.shape[:-2] != b.shape[:-2] or a.shape[-2 if a_t else -1] != b.shape[-1 if b_t else -2] or a.dtype != b.dtype:
        raise ValueError(
            f"a product of {a.shape} {a.dtype}{'ᵀ' * a_t} and {b.shape} {b.dtype}{'ᵀ' * b_t}: they do not fit"
        )
    out = np.dtype(a.dtype if out is None else out)
    if library is None:
        a, b = (x.astype(out, copy=False) for x in (a, b))
        return (a.swapaxes(-1, -2) if a_t else a) @ (b.swapaxes(-1, -2) if b_t else b)
    n, k = a.shape[-2:][:: -1 if a_t else 1]
    m, stack = b.shape[-2 if b_t else -1], math.prod(a.shape[:-2])
    y = xp.empty((*a.shape[:-2], n, m), out)
    kind = _kind(a.dtype)
    # cuBLAS counts down the columns: what it takes for (a b)ᵀ = bᵀ aᵀ is a b in rows
    first = b.data.ptr, kind, b.shape[-1], b.shape[-2] * b.shape[-1]
    second = a.data.ptr, kind, a.shape[-1], a.shape[-2] * a.shape[-1]
    how = stack, library.CUBLAS_COMPUTE_32F, library.CUBLAS_GEMM_DEFAULT
    numbers = _ONE.ctypes.data, *first, *second, _ZERO.ctypes.data, y.data.ptr, _kind(out), m, n * m
    library.gemmStridedBatchedEx(xp.cuda.device.get_cublas_handle(), int(b_t), int(a_t), m, n, k, *numbers, *how)
    return y


@cache
def _kind(dtype):
    """The cudaDataType of an array's dtype."""
    return {"float32": 0, "float16": 2, "bfloat16": 14}[dtype.name]


_ONE, _ZERO = np.ones(1, np.float32), np.zeros(1, np.float32)


@cache
def _cublas(module):
    """CuPy's own door to cuBLAS; None if this array module has none."""
    try:
        return importlib.import_module(f"{module}_backends.cuda.libs.cublas")
    except ImportError:
        return None
