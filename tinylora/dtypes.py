"""Sixteen-bit floats on NumPy: how a number is rounded to them, and how a weight is stored in two bytes.

NumPy has float16 but no bfloat16. A bfloat16 is the upper half of a float32: the sign, the same 8 exponent bits, and 7
of the 23 mantissa bits. So

    bf16(x) = the float32 whose lower 16 bits are zero and that is nearest to x; ties go to the even one

In arithmetic, a bfloat16 number is held as a float32 whose lower half is zero. A product of two such matrices is summed
in float32 and rounded once at the end; QLoRA's equation 5 has such products. In storage, a bfloat16 is a uint16.

The logical dtypes are named by strings: "float32", "float16", "bfloat16". ("float64" is taken too, for gradient checks.)

Differs from torch: rounding is an explicit call (`round_to`), and there is no autocast. A product of bfloat16 matrices
is rounded as tensor cores round it, and takes the time of a float32 product, because NumPy has no other.

Leaves out: the products themselves, which a GPU has in 16 bits (`kernels.products`), and dtypes of 8 bits. Those are codes
here (`codebooks.fp8_e4m3`).
"""

import math
from dataclasses import dataclass

import numpy as np

from .backend import array_module

BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "float64": 64}


def dtype_name(dtype):
    """The logical name of a dtype: accepts the names above, NumPy dtypes, and ml_dtypes.bfloat16."""
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in BITS:
        raise ValueError(f"dtype {name!r} is unknown: expected one of {', '.join(BITS)}")
    return name


def bfloat16_bits(x):
    """The 16 bits of bf16(x), ties to even. float32 (...) -> uint16 (...).

    Adding 0x7fff plus the lowest kept bit carries into the kept half exactly when the dropped half is above one half,
    or is one half and the kept half is odd. NaN must not be touched by that carry: it becomes a quiet NaN with its sign
    kept.
    """
    xp = array_module(x)
    shape = x.shape  # ascontiguousarray turns a 0-d array into one of shape (1,)
    u = xp.ascontiguousarray(x, dtype=np.float32).view(np.uint32).reshape(shape)
    rounded = (u + (0x7FFF + ((u >> 16) & 1))) >> 16
    quiet = (u >> 16) | 0x0040
    return xp.where((u & 0x7FFFFFFF) > 0x7F800000, quiet, rounded).astype(np.uint16)


def from_bfloat16_bits(bits):
    """The float32 numbers that the bfloat16 bit patterns stand for: exact. uint16 (...) -> float32 (...)."""
    u = bits.astype(np.uint32)
    u <<= 16
    return u.view(np.float32)


def round_to(x, dtype):
    """x rounded to a logical dtype and held in the array type that computes it: bfloat16 stays float32 storage.

    "float32" -> float32, "float16" -> float16, "bfloat16" -> float32 with zero lower halves. Ties to even.
    """
    name = dtype_name(dtype)
    if name != "bfloat16":
        return x.astype(name, copy=False)
    y = x.astype(np.float32)  # a copy
    if y.ndim == 0 or array_module(y) is not np or (y != y).any():  # no carry into NaN, no writing to a scalar
        return from_bfloat16_bits(bfloat16_bits(y))
    u = y.view(np.uint32)
    round_bits(u, u >> 16)
    return y


def round_bits(u, scratch):
    """`bfloat16_bits` without the shift, in place, for numbers that are not NaN. u: float32 patterns; scratch: u >> 16, overwritten."""
    scratch &= 1
    scratch += 0x7FFF
    u += scratch
    u &= 0xFFFF0000


def as_float32(x):
    """(x as float32, the logical dtype it came in): float32, float64, float16, ml_dtypes.bfloat16 and BFloat16Array."""
    if isinstance(x, BFloat16Array):
        return x.dequantize("float32"), "bfloat16"
    name = getattr(getattr(x, "dtype", None), "name", None)
    if name not in BITS:
        raise TypeError(f"expected a float array (float32, float16, bfloat16), got {name or type(x).__name__}")
    return x.astype(np.float32, copy=False), ("float32" if name == "float64" else name)


class Stored:
    """A frozen weight that is held in few bits. It is plain data: no gradient flows into it. A layer does not care which kind it holds.

    shape, dtype         what the weight was;  nbytes: what is held for it
    held                 one of its arrays, which tells the device that it lives on
    dequantize(dtype)    the weight in a logical dtype (default: its own)
    to(move)             the same weight with its arrays passed through `move` (see backend.move)
    like(w, name)        the array w, stored as this weight is
    """

    size = property(lambda self: math.prod(self.shape))

    @property
    def bits_per_param(self):
        """Bits held for each weight."""
        if not self.size:
            raise ValueError(f"bits_per_param: a weight of shape {tuple(self.shape)} has no element")
        return 8 * self.nbytes / self.size


@dataclass(frozen=True)
class BFloat16Array(Stored):
    """A weight stored in two bytes per number, as a 16-bit checkpoint stores it; `dequantize` gives float32 back."""

    bits: np.ndarray

    @classmethod
    def of(cls, x):
        """Round a float array to bfloat16, ties to even."""
        return cls(bfloat16_bits(x))

    shape = property(lambda self: self.bits.shape)
    nbytes = property(lambda self: self.bits.nbytes)
    held = property(lambda self: self.bits)
    dtype = "bfloat16"

    def dequantize(self, dtype="bfloat16"):
        """W in the asked logical dtype; float32 and bfloat16 are both exact here."""
        x = from_bfloat16_bits(self.bits)
        return x if dtype_name(dtype) in ("float32", "bfloat16") else round_to(x, dtype)

    def to(self, move):
        """The same weight with its array passed through `move` (see backend.move)."""
        return BFloat16Array(move(self.bits))

    def like(self, w, name="weight"):
        return BFloat16Array.of(w)
