"""1/x as a GPU computes it: the instruction rcp.approx.ftz.f32, bit for bit, on any array module.

    rcp(x) = the float32 nearest to 1/x, or its neighbour         denormals, going in or coming out, are zeros

CUDA compiles a division in this way under --use_fast_math, and bitsandbytes' kernels are compiled so. Which neighbour it is depends on
the 23 bits of x's mantissa alone: `rcp_approx.npz` holds one bit for each mantissa whose reciprocal is one unit in the last place above
the nearest float32 (733,799 of 8,388,608), and one for each where it is one below (374,723). An NVIDIA H200 wrote the table; exponents
of −27, 0, 1 and 23 gave the same one. Eight bits to a byte it takes 2 MB in memory, which are read when they are first wanted.
"""

import os
from functools import cache

import numpy as np

from .. import backend
from ..backend import array_module

TINY = np.float32(2.0**-126)  # the smallest normal float32


def flush(x):
    """x with denormals replaced by zeros of their sign, as -ftz=true does to operands and results."""
    xp = array_module(x)
    return xp.where(xp.abs(x) < TINY, xp.copysign(np.float32(0), x), x)


def rcp(x):
    """The GPU's 1/x. float32 (...) -> float32 (...); 1/0 = ∞, 1/∞ = 0, NaN stays NaN, and all with their sign."""
    xp = array_module(x)
    x = xp.asarray(flush(x))
    with np.errstate(divide="ignore"):
        y = flush(np.float32(1) / x)
    mantissa = x.view(np.int32) & 0x7FFFFF
    above, below = (
        (xp.take(table, mantissa >> 3) >> (7 - (mantissa & 7)).astype(np.uint8)) & 1 for table in _tables(xp)
    )
    ulps = above.astype(np.int32) - below.astype(np.int32)
    return xp.where((y != 0) & xp.isfinite(y), y.view(np.int32) + ulps, y.view(np.int32)).view(np.float32)


@cache
def _tables(xp):
    """The two rows of 2²³ bits: above, below."""
    with np.load(os.path.join(os.path.dirname(__file__), "rcp_approx.npz")) as stored:
        rows = stored["delta"].reshape(2, -1)
    return tuple(backend.move(row, xp) for row in rows)
