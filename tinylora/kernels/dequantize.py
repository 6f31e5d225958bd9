"""code[q] · absmax, by tables: the line of `quant` that says it, two or four weights at a time.

    flat = code[q] · absmax of the block          two 4-bit indices lie in each packed byte

`scaled` looks up 256 pairs of values by the packed byte, on any array module. `scaled_on_host` does so on NumPy, in chunks that stay in the
cache; a large weight looks up 65,536 quadruples by two bytes. That table is 1 MB. In a loop of its own it takes 0.85 of the time of pairs;
after a product, which drives it out of the cache, it takes 1.6 times theirs (1024 × 1024). All give the bits of the plain product
(tests/test_quant.py).
"""

import math
from functools import lru_cache

import numpy as np

from ..backend import array_module
from ..dtypes import round_bits, round_to
from . import device
from .buffers import buffer
from .products import held
from .reciprocal import flush
from .threads import alone, side_by_side

_CHUNK = 1 << 19  # elements dequantized at a time, so that they stay in the cache
_LARGE = 1 << 23  # from this many weights on, the table of quadruples is worth its reading
_LARGEST = 1 << 24  # weights whose memory is kept: 64 MB


def for_product(q, dtype):
    """`q.dequantize(dtype)` of a stored weight for one product: the next call in this thread may use its memory again.

    Fresh arrays of 16 MB and more cost page faults each time. The memory, 64 MB at the most, is the thread's until it ends. One core
    dequantizes, because BLAS's threads spin on the others until the product comes. `takes_out` says of a kind of weight that its
    `dequantize` has out=; any other is dequantized into fresh memory.
    """
    fresh = dtype == "float16" or math.prod(q.shape) > _LARGEST or not getattr(type(q), "takes_out", False)
    if fresh or array_module(q.held) is not np:
        return q.dequantize(dtype)
    with alone():
        return q.dequantize(dtype, out=buffer("weight", q.shape, largest=_LARGEST))


def dequantized(q, dtype, out=None):
    """code[q] · absmax of a QuantizedTensor, rounded once to `dtype`; denormals are zeros under the GPU's rule.

    bfloat16 is held in float32 on NumPy, and on a device as it is. out: as `QuantizedTensor.dequantize` has it
    """
    flushed = q.rule == "bitsandbytes-cuda"
    if out is not None:
        _check_out(out, q, dtype)
    if array_module(q.packed) is not np:
        w = device.dequantized(q, dtype)
        if w is None:
            flat = scaled(q, q.absmax)[: q.size].reshape(q.shape)
            w = held(flush(flat) if flushed else flat, dtype)
        return w
    absmax = q.absmax
    in_chunks = dtype == "bfloat16" and not flushed and bool(np.isfinite(absmax).all())  # in the cache; no NaN arises
    flat = scaled_on_host(q, absmax, in_chunks, out)[: q.size].reshape(q.shape)
    w = flat if in_chunks else round_to(flush(flat) if flushed else flat, dtype)
    if out is None:
        return w
    if not np.shares_memory(w, out):
        out[...] = w
    return out


def _check_out(out, q, dtype):
    """ValueError unless `out` can hold the weight."""
    there = isinstance(out, np.ndarray) and out.flags.c_contiguous and out.flags.writeable
    if not there or (out.shape, out.dtype) != (tuple(q.shape), np.float32) or array_module(q.packed) is not np:
        given = f"{out.dtype} {out.shape}" if hasattr(out, "dtype") else type(out).__name__
        raise ValueError(
            f"dequantize: out is {given}, expected a NumPy array, float32 {tuple(q.shape)}, in one piece and writeable, "
            "for a weight on the host"
        )
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dequantize: out is float32 and cannot hold {dtype}; leave it out")


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


def scaled_on_host(q, absmax, bfloat16=False, out=None):
    """The same on NumPy, in chunks that stay in the cache; of a large weight four neighbours at once.

    out: float32 in one piece, to be written to where whole entries of the table fill it. Two threads share the chunks.
    """
    packed, code = q.packed, q.code.astype("<f4", copy=False).tobytes()
    if q.size < _LARGE:
        table = _pairs_of(code)
    else:
        packed = np.append(packed, np.zeros(1, np.uint8)) if len(packed) % 2 else packed
        packed, table = packed.view("<u2"), _quadruples(code)
    each = table.itemsize // 4
    n = each * len(packed)
    flat = out.reshape(-1) if out is not None and out.size == n else np.empty(n, np.float32)
    step = max(_CHUNK // (4 * q.blocksize), 1) * 4 * q.blocksize  # whole blocks and whole quadruples

    def dequantize(start):
        part = flat[start : start + step]
        index = buffer("index", (len(part) // each,), np.intp)
        index[...] = packed[start // each : (start + len(part)) // each]  # np.take would widen them in fresh memory
        np.take(table, index, out=part.view(table.dtype), mode="clip")
        scale = absmax[start // q.blocksize : (start + len(part)) // q.blocksize]
        body = part[: len(scale) * q.blocksize].reshape(-1, q.blocksize)
        body *= scale[:, None]
        rest = part[len(scale) * q.blocksize :]
        if len(rest) and (start + len(part)) // q.blocksize < len(absmax):
            rest *= absmax[-1]
        if bfloat16:
            round_bits(part.view(np.uint32), part.view(np.uint32) >> 16)

    side_by_side(dequantize, range(0, n, step))
    return flat


def _pairs(code):
    """(256,) complex64: entry (i << 4 | j) is the pair (code[i], code[j])."""
    xp = array_module(code)
    values = xp.zeros(16, np.float32)
    values[: len(code)] = code
    table = xp.empty((16, 16, 2), np.float32)
    table[..., 0], table[..., 1] = values[:, None], values[None, :]
    return table.reshape(-1).view(np.complex64)


@lru_cache(maxsize=8)
def _pairs_of(code):
    """`_pairs` of a code in bytes."""
    return _pairs(np.frombuffer(code, "<f4"))


@lru_cache(maxsize=8)  # 1 MB each
def _quadruples(code):
    """(65536,) complex128: entry (b₁ << 8 | b₀) is the pair of byte b₀ and the pair of byte b₁. code: its bytes"""
    pairs = _pairs_of(code)
    table = np.empty((256, 256, 2), np.complex64)
    table[..., 0], table[..., 1] = pairs[None, :], pairs[:, None]
    return table.reshape(-1).view(np.complex128)
