"""Products of matrices in 16 bits: the operands rounded, the sums in float32, the result rounded once.

    y = a b + bias                                                        dtype "float32"
    y = round(round(a) round(b) + round(bias))                            dtype "bfloat16" or "float16": what tensor cores compute

NumPy multiplies rounded numbers that are held as float32, and takes the time of a float32 product. CuPy (14 or later) multiplies arrays of
two bytes on the tensor cores. Both mean the same; a sum in another order may be rounded to the neighbouring number.
"""

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


def held(x, dtype):
    """x rounded to a logical dtype, in the array that is multiplied: two bytes a number on a device, float32 on NumPy."""
    if dtype == "float32":
        return widened(x)
    if array_module(x) is not np:
        return x.astype(two_bytes(dtype), copy=False)
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
    y = a @ b if a.dtype.itemsize > 2 else array_module(a).matmul(a, b, dtype=np.float32)
    y += rounded(bias, dtype)
    return rounded(y, dtype)
