"""Codes: the values that a 4-bit or 8-bit index stands for, each built from its definition.

A code is a float32 vector. Index i of a 4-bit number stands for code[i], to be multiplied by its block's absmax. Codes
are returned in the order of their indices: ascending, except `fp4`, whose index is the bit pattern of a small float.

    nf4         the quantiles of a normal distribution (QLoRA §3 and appendix E)
    fp4         bitsandbytes' grid of sign, two exponent bits, one mantissa bit
    int4        −7 … 7, evenly spaced
    dynamic8    bitsandbytes' 8-bit "dynamic" map, which double quantization uses for its constants (Dettmers et al. 2022, §2.2)

Needs nothing but NumPy and the standard library. Differs from bitsandbytes: the values are computed, not listed; a test
holds them equal to the published float32 tables in every bit.
"""

from functools import cache

import numpy as np

#: Where the outermost NF4 quantile lies. bitsandbytes states the number without its origin; it equals 1 − ½(1/32 + 1/30) cut to seven
#: digits, the mean of half a bin of 16 and half a bin of 15 (the code's positive side has 8 steps and its negative side 7).
NF4_OFFSET = 0.9677083


def linspace_f32(start, stop, n):
    """n evenly spaced float32 values as torch.linspace makes them: from both ends towards the middle, with a fused multiply-add.

        xᵢ = fma(h, i, start) for i < n/2,  fma(−h, n−1−i, stop) otherwise,  h = (stop − start)/(n − 1) in float32

    A fused multiply-add rounds once. In float64 the product h·i is exact (24 + 8 bits), and the sum is rounded to 53
    bits before the rounding to 24, which only differs from one rounding if it lands within 2⁻⁵³ of a tie.
    """
    a, b = np.float32(start), np.float32(stop)
    h = np.float32((b - a) / np.float32(n - 1))
    i = np.arange(n)
    up = np.float64(a) + np.float64(h) * i
    down = np.float64(b) - np.float64(h) * (n - 1 - i)
    return np.where(i < n // 2, up, down).astype(np.float32)


def _normal_quantiles(probabilities):
    """Φ⁻¹(p) in float64, rounded to float32."""
    from statistics import (
        NormalDist,
    )  # accurate to the last bits, and needs no scipy; imported here since it is slow to load

    inverse = NormalDist().inv_cdf
    return np.array([inverse(float(p)) for p in probabilities], np.float32)


def _frozen(values):
    """The same array, read-only, so that all quantized tensors can share it."""
    values.flags.writeable = False
    return values


@cache
def _nf4():
    positive = _normal_quantiles(linspace_f32(NF4_OFFSET, 0.5, 9)[:-1])  # 8 values above zero
    negative = -_normal_quantiles(linspace_f32(NF4_OFFSET, 0.5, 8)[:-1])  # 7 values below zero
    values = np.sort(np.concatenate([negative, np.zeros(1, np.float32), positive]))
    return values / values.max()


def nf4():
    """NF4: Φ⁻¹ at evenly spaced probabilities on either side of an exact 0, divided by the largest. (16,) float32, ascending.

        positive: Φ⁻¹(linspace(o, ½, 9)) without its last,  negative: −Φ⁻¹(linspace(o, ½, 8)) without its last,  o = NF4_OFFSET

    7 negative values, 0, 8 positive ones. Equal in all bits to the table in bitsandbytes and in QLoRA's appendix E. It
    is not what QLoRA eq. 4 says: taken literally, that formula has −∞ as its first value.
    """
    return _nf4().copy()


def fp4():
    """FP4 as bitsandbytes defines it: {0, 1/192, 2/3, 1, 1/3, 1/2, 1/6, 1/4} by bit pattern, then their negatives. (16,) float32.

    Sign, two exponent bits, one mantissa bit; the subnormal is 0.0625/12, which is neither OCP's E2M1 (1/12 of its
    largest) nor what bitsandbytes' own create_fp8_map(2, 1) returns (1/48). Index 8 is a second zero (+0 in the
    published table, −0 in one C++ loop; the product with absmax is a zero either way).
    """
    magnitude = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)
    return np.concatenate([magnitude, np.zeros(1, np.float32), -magnitude[1:]])


def int4():
    """Int4: −7/7 … 7/7, evenly spaced. (15,) float32, ascending; a sixteenth value would break the symmetry and is unused."""
    return np.arange(-7, 8, dtype=np.float32) / np.float32(7)


@cache
def _dynamic8(signed):
    values = [0.0, 1.0]
    for i in range(7):  # decade 10^(i−6): 2^i (signed) or 2^(i+1) (unsigned) bins between 0.1 and 1, each at its middle
        boundaries = linspace_f32(0.1, 1, (2**i if signed else 2 ** (i + 1)) + 1)
        middle = ((boundaries[:-1] + boundaries[1:]) / np.float32(2)) * np.float32(10.0 ** (i - 6))
        values += middle.tolist()
        if signed:
            values += (-middle).tolist()
    return _frozen(np.sort(np.array(values, np.float32)))


def dynamic8(signed=True):
    """bitsandbytes' dynamic 8-bit map: seven decades, each with twice as many evenly spaced values as the one below. (256,) float32.

    Signed: −0.99297 … 0 … 1 (there is no −1; index 127 is 0). Unsigned: 0 … 1. Not an IEEE-like float8, although QLoRA
    §3 calls the constants FP8. Source: Dettmers et al. 2022 (8-bit optimizers), §2.2; bitsandbytes' create_dynamic_map.
    """
    return _dynamic8(bool(signed)).copy()


NAMED = {"nf4": nf4, "fp4": fp4, "int4": int4}


@cache
def _shared(name):
    return _frozen(NAMED[name]())


def shared_dynamic8():
    """The signed dynamic map, read-only and shared."""
    return _dynamic8(True)


def get(code):
    """(name, values by index) of a 4-bit code given by name, or of a custom code: up to 16 ascending values."""
    if isinstance(code, str):
        if code not in NAMED:
            raise ValueError(
                f"code {code!r} is unknown: expected one of {', '.join(NAMED)}, or a sorted array of up to 16 values"
            )
        return code, _shared(code)
    values = np.asarray(code, np.float32)
    if values.ndim != 1 or not 2 <= len(values) <= 16 or not np.isfinite(values).all() or (np.diff(values) <= 0).any():
        raise ValueError("a custom code must be a vector of 2 to 16 finite values in ascending order")
    return "custom", values


def sorted_order(values):
    """The indices of a code in ascending order of value; of fp4's two zeros, index 0 comes before index 8."""
    return np.argsort(values, kind="stable")


def midpoints(values):
    """The boundaries between neighbours: float32((cᵢ + cᵢ₊₁)/2) of the sorted code. (n − 1,)"""
    ordered = values[sorted_order(values)]
    return (ordered[:-1] + ordered[1:]) / np.float32(2)
