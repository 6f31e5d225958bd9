"""The slow, obvious versions that fast paths are held to."""

from fractions import Fraction
from functools import cache

import numpy as np

from tinylora.kernels.reciprocal import rcp

f32 = np.float32


def quantize_4bit(w, code, blocksize):
    """(codes, absmax) one weight at a time: count the midpoints that lie strictly below w/absmax (ascending code, finite input)."""
    flat, codes, scales = w.astype(f32).reshape(-1), [], []
    bounds = [f32((code[i] + code[i + 1]) / f32(2)) for i in range(len(code) - 1)]
    for start in range(0, len(flat), blocksize):
        block = flat[start : start + blocksize]
        absmax = f32(max(abs(x) for x in block))
        whole = len(block) == blocksize
        if not whole:
            absmax = max(absmax, f32(1e-38))
        scales.append(absmax)
        for x in block:
            x = x * (f32(1) / max(absmax, f32(1e-38))) if whole else x / absmax
            codes.append(sum(bool(b < x) for b in bounds))
    return np.array(codes, np.uint8), np.array(scales, f32)


def pack(codes, zero):
    """Two codes a byte, the first in the high half; an odd end is filled with the code of zero."""
    codes = list(codes) + [zero] * (len(codes) % 2)
    return np.array([codes[i] << 4 | codes[i + 1] for i in range(0, len(codes), 2)], np.uint8)


def dequantize_4bit(codes, absmax, code, blocksize):
    """One weight at a time: code[q] · absmax in float32."""
    return np.array([code[q] * absmax[i // blocksize] for i, q in enumerate(codes)], f32)


def cpu_quantize_8bit(x, code, blocksize=256):
    """(codes, absmax), the rule as it is written: kernels.rounding.cpu_quantize_8bit without buffers."""
    blocks = -(-len(x) // blocksize)
    rows = np.zeros((blocks, blocksize), f32)
    rows.reshape(-1)[: len(x)] = x
    absmax = np.where(np.isnan(rows), f32(0), np.abs(rows)).max(axis=1, initial=f32(0))
    s = rows * (f32(1) / absmax)[:, None]
    u = (np.clip(s, -1, 1) + f32(1)) * f32(0.5)
    # one fused multiply-add there; exact in float64 here
    position = (u.astype(np.float64) * 65535 + 0.5).astype(np.float32)
    position = np.where(np.isnan(position), f32(0), position).astype(np.int32) & 0xFFFF
    grid = np.arange(65536, dtype=f32) * f32(2) / f32(65535) - f32(1)
    table = np.searchsorted(((code[:-1] + code[1:]) / f32(2)), grid, "left").astype(np.uint8)
    codes = table[position]
    codes[absmax == 0] = 0
    return codes.reshape(-1)[: len(x)], absmax


# --------------------------------------------------------------------------------------- bitsandbytes' GPU kernels, one number at a time
def flush(x):
    """Denormals become zeros, as with -ftz=true."""
    return f32(np.copysign(f32(0), x)) if abs(x) < f32(2.0**-126) else f32(x)


@cache
def once(decimal):
    """The float32 nearest to a decimal, as a compiler rounds a literal: once, and not by way of float64."""
    exact, near = Fraction(decimal), f32(float(decimal))
    around = [near, np.nextafter(near, f32(2)), np.nextafter(near, f32(-2))]
    return min(around, key=lambda x: abs(Fraction(float(x)) - exact))


def cuda_nf4(x):
    """The kernel's tree of comparisons, with its pivots as it writes them."""
    if x > once("0.03979014977812767"):
        if x > once("0.3893125355243683"):
            if x > once("0.6427869200706482"):
                return 15 if x > once("0.8614784181118011") else 14
            return 13 if x > once("0.5016634166240692") else 12
        if x > once("0.2035212516784668"):
            return 11 if x > once("0.2920137718319893") else 10
        return 9 if x > once("0.1202552504837513") else 8
    if x > once("-0.33967943489551544"):
        if x > once("-0.13791173323988914"):
            return 7 if x > once("-0.045525018125772476") else 6
        return 5 if x > once("-0.23460740596055984") else 4
    if x > once("-0.6106329262256622"):
        return 3 if x > once("-0.4599952697753906") else 2
    return 1 if x > once("-0.8480964004993439") else 0


def cuda_fp4(x):
    """The same for FP4: the sign from x < 0, then |x|."""
    sign, x = 8 if x < 0 else 0, abs(x)
    if x > once("0.29166667"):
        if x > once("0.583333"):
            return sign + (3 if x > once("0.8333333") else 2)
        return sign + (5 if x > once("0.4166667") else 4)
    if x > once("0.0859375"):
        return sign + (7 if x > once("0.20833333") else 6)
    return sign + (1 if x > once("0.00260417") else 0)


def cuda_8bit(code, x):
    """Halve 256 codes seven times, then compare with the midpoint towards x."""
    pivot, lower, upper = 127, 0, 255
    for step in (64, 32, 16, 8, 4, 2, 1):
        if x > code[pivot]:
            lower, pivot = pivot, pivot + step
        else:
            upper, pivot = pivot, pivot - step
    if x > code[pivot]:
        return upper if x > (code[upper] + code[pivot]) * f32(0.5) else pivot
    return lower if x < (code[lower] + code[pivot]) * f32(0.5) else pivot


def cuda_quantize_4bit(w, tree, blocksize):
    """(codes with the pad, absmax) block by block: fmaxf skips NaN, the reciprocal is the instruction's, denormals are zeros."""
    flat, codes, scales = w.astype(f32).reshape(-1), [], []
    for start in range(0, len(flat), blocksize):
        block = [flush(x) for x in flat[start : start + blocksize]]
        numbers = [abs(x) for x in block if not np.isnan(x)] + [f32(0)] * (len(block) < blocksize)
        absmax = max(numbers) if numbers else -np.finfo(f32).max
        scales.append(absmax)
        reciprocal = rcp(f32(absmax))
        pad = [f32(0)] * (len(block) < blocksize and len(block) % 2)
        codes += [tree(flush(x * reciprocal)) for x in block + pad]
    return np.array(codes, np.uint8), np.array(scales, f32)
