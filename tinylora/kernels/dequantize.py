"""code[q] · absmax, by tables: the line of `quant` that says it, two or four weights at a time.

    flat = code[q] · absmax of the block          two 4-bit indices lie in each packed byte

`scaled` looks up 256 pairs of values by the packed byte, on any array module. `scaled_on_host` looks up 65,536 quadruples by two
bytes, in chunks that stay in the cache. Both give the bits that the plain product gives (tests/test_quant.py).
"""

from functools import lru_cache

import numpy as np

from ..backend import array_module
from ..dtypes import round_bits, round_to
from . import device
from .products import held
from .reciprocal import flush

_CHUNK = 1 << 17  # elements dequantized at a time, so that they stay in the cache


def dequantized(q, dtype):
    """code[q] · absmax of a QuantizedTensor, rounded once to `dtype`; denormals are zeros under the GPU's rule.

    bfloat16 is held in float32 on NumPy, and on a device as it is.
    """
    flushed = q.rule == "bitsandbytes-cuda"
    if array_module(q.packed) is not np:
        w = device.dequantized(q, dtype)
        if w is None:
            flat = scaled(q, q.absmax)[: q.size].reshape(q.shape)
            w = held(flush(flat) if flushed else flat, dtype)
        return w
    absmax = q.absmax
    in_chunks = dtype == "bfloat16" and not flushed and bool(np.isfinite(absmax).all())  # in the cache; no NaN arises
    flat = scaled_on_host(q, absmax, in_chunks)[: q.size].reshape(q.shape)
    return flat if in_chunks else round_to(flush(flat) if flushed else flat, dtype)


def scaled(q, absmax):
    """c[q] · absmax on any array module: two neighbours are looked up at once, in 256 pairs indexed by the packed byte. (≥ n,) float32"""
    xp, n = array_module(q.packed), q.size
    flat = xp.take(_pairs(q.code), q.packed).view(np.float32)
    whole = n // q.blocksize
    body = flat[: whole * q.blocksize].reshape(whole, q.blocksize)
    body *= absmax[:whole, None]
    if whole * q.blocksize < n:
        flat[whole * q.blocksize : n] *= absmax[whole]
    return flat


def scaled_on_host(q, absmax, bfloat16=False):
    """The same on NumPy, in chunks that stay in the cache, four neighbours at once: 65,536 quadruples indexed by two packed bytes."""
    packed = np.append(q.packed, np.zeros(1, np.uint8)) if len(q.packed) % 2 else q.packed
    packed, table = packed.view("<u2"), _quadruples(q.code.astype("<f4", copy=False).tobytes())
    flat = np.empty(4 * len(packed), np.float32)
    step = max(_CHUNK // (4 * q.blocksize), 1) * 4 * q.blocksize  # whole blocks and whole quadruples
    for start in range(0, len(flat), step):
        part = flat[start : start + step]
        np.take(table, packed[start // 4 : (start + len(part)) // 4], out=part.view(np.complex128), mode="clip")
        scale = absmax[start // q.blocksize : (start + len(part)) // q.blocksize]
        body = part[: len(scale) * q.blocksize].reshape(-1, q.blocksize)
        body *= scale[:, None]
        rest = part[len(scale) * q.blocksize :]
        if len(rest) and (start + len(part)) // q.blocksize < len(absmax):
            rest *= absmax[-1]
        if bfloat16:
            round_bits(part.view(np.uint32), part.view(np.uint32) >> 16)
    return flat


def _pairs(code):
    """(256,) complex64: entry (i << 4 | j) is the pair (code[i], code[j])."""
    xp = array_module(code)
    values = xp.zeros(16, np.float32)
    values[: len(code)] = code
    table = xp.empty((16, 16, 2), np.float32)
    table[..., 0], table[..., 1] = values[:, None], values[None, :]
    return table.reshape(-1).view(np.complex64)


@lru_cache(maxsize=8)  # 1 MB each
def _quadruples(code):
    """(65536,) complex128: entry (b₁ << 8 | b₀) is the pair of byte b₀ and the pair of byte b₁. code: its bytes"""
    pairs = _pairs(np.frombuffer(code, "<f4"))
    table = np.empty((256, 256, 2), np.complex64)
    table[..., 0], table[..., 1] = pairs[None, :], pairs[:, None]
    return table.reshape(-1).view(np.complex128)
