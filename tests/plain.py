"""The slow, obvious versions that fast paths are held to."""

import numpy as np

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
