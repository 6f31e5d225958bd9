"""Numbers rounded to two bytes, brought back, and added: what lies between two products of 16 bits on a device.

    y = round(x),  z = round(s x)          float32 -> two bytes a number
    z = x  or  z = x + s y                 two bytes a number -> float32

Each line is one kernel of cuda.cu, whose threads take four numbers each. CuPy's conversions give the same bits and take more time.
`swap` = (a, b, d) also exchanges two axes in the same kernel, (…, a, b, d) -> (…, b, a, d), as attention lays out its heads.
"""

from functools import cache

import numpy as np

from ..backend import array_module
from . import cuda

f32, i32, i64 = np.float32, np.int32, np.int64


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


def vectorizable(x, d=4):
    """Whether the kernels take an array, whose rows have d numbers: on a device, in one piece, in whole fours, fewer than 2³⁴ numbers."""
    whole = x.size and not (x.size % 4 or d % 4 or x.size >> 34)
    return bool(whole and cuda.available(array_module(x)) and x.flags.c_contiguous and not x.data.ptr % 16)


def to_16bit(x, dtype, scale=None, swap=None):
    """round(x) of a float32 array, two bytes a number ("float32": four); the pair with round(scale x) if a scale is given."""
    xp = array_module(x)
    y = xp.empty(x.shape, multiplied_in(xp, dtype))
    z = y if scale is None else xp.empty_like(y)
    cuda.launch(
        xp,
        f"round_{dtype}",
        x.size // 4,
        x,
        f32(1 if scale is None else scale),
        y,
        z,
        *_numbers(x, scale is not None, swap),
    )
    return y if scale is None else (y, z)


def to_float32(x, y=None, scale=1, swap=None):
    """x in float32, or x + scale y; both of one dtype and shape."""
    xp, two = array_module(x), y is not None
    z = xp.empty(x.shape, f32)
    cuda.launch(xp, f"sum_{x.dtype.name}", x.size // 4, x, y if two else x, f32(scale), z, *_numbers(x, two, swap))
    return z


def _numbers(x, two, swap):
    a, b, d = swap or (0, 0, 4)
    return i32(two), i32(a), i32(b), i32(d // 4), i64(x.size // 4)
