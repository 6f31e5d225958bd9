"""8 bits on NumPy as bitsandbytes rounds them on a CPU, in buffers that stay in the cache: for absmax, and for AdamW's m and v.

    s = x / absmax of its block
    k = floor(float32((s + 1)/2 · 65535 + 1/2))            the place of the nearest of 65,536 numbers v_i = 2i/65535 − 1
    code = table[k]                                        the code nearest to v_k, and not always the one nearest to s

    fma(a, b, c) = float32(a·b + c), rounded once

`round_blocks` rounds, `adamw` is one step of AdamW with such states (the equations stand in `training.adamw8bit`, whose plain form for any
array module gives the same bits). Fresh temporaries of a chunk lie at the allocator's threshold, where some machines pay page faults.
Against the plain forms, in processor time on one thread: rounding 1M constants takes 0.17 (Zen 4), a step of 10M parameters 0.32 (Zen 5).
"""

import math
from functools import lru_cache

import numpy as np

from ..backend import array_module
from .buffers import buffer

CHUNK = 1 << 17  # elements worked on at a time
_ONE, _HALF, _TINY = np.float32(1), np.float32(0.5), 2.0**-126  # _TINY: the smallest normal float32
_HALF_WAY = np.iinfo(np.int64).min
_BELOW_TINY = np.uint64((np.float64(_TINY).view(np.uint64) << np.uint64(1)) - np.uint64(1))


@lru_cache(maxsize=16)  # 64 kB each
def table(code):
    """The 65,536 codes: for each v_i the index of the nearest value of an ascending code. code: its float32 bytes"""
    values = np.frombuffer(code, np.float32)
    grid = np.arange(65536, dtype=np.float32) * np.float32(2) / np.float32(65535) - _ONE
    return np.searchsorted((values[:-1] + values[1:]) / np.float32(2), grid, "left").astype(np.uint8)


def round_blocks(rows, codes_of, codes, absmax):
    """codes, absmax ← rows, of a block each, rounded to 8 bits; NaN does not count for absmax. codes_of: a `table`."""
    s, wide, place = (buffer(name, rows.shape, dtype) for name, dtype in (("s", "f4"), ("wide", "f8"), ("place", "i4")))
    np.bitwise_and(
        rows.view(np.uint32), np.uint32(0x7FFFFFFF), out=s.view(np.uint32)
    )  # |rows|; as whole numbers they compare faster
    starts = np.arange(0, rows.size, rows.shape[1])
    np.maximum.reduceat(s.view(np.uint32).reshape(-1), starts, out=absmax.view(np.uint32))
    if numbers := bool(np.isfinite(absmax).all()):
        scale = _ONE / absmax
        numbers = bool(np.isfinite(scale).all())
    else:
        s[np.isnan(s)] = 0
        s.max(axis=1, out=absmax)
        scale = _ONE / absmax
    np.multiply(rows, scale[:, None], out=s)
    if not numbers:  # elsewhere |s| is at most 1 + 2⁻²¹, which is rounded away or ends in the last place
        np.fmax(s, -_ONE, out=s)  # NaN, too, gets the code of v_0
        np.minimum(s, _ONE, out=s)
    s += _ONE
    wide[...] = s
    wide *= 32767.5  # exact, so that the sum is rounded once, as by a fused multiply-add
    wide += 0.5
    s[...] = wide
    place[...] = s
    _look_up(codes_of, place, codes)


def fma(a, b, c):
    """float32(a·b + c), rounded once, on any array module. a and c: float32 of one shape; b: float32 that broadcasts to it."""
    xp = array_module(a)
    product = xp.multiply(a, b, dtype=np.float64)  # exact: 24 + 24 bits of 53
    total = product + c  # rounded, and below rounded again: that errs only where it lies half way between two float32
    twice = (total.view(np.int64) & 0x1FFFFFFF) == 0x10000000
    size = xp.abs(total)
    twice |= (size < _TINY) & (size > 0)  # for denormals that is at other bits
    if bool(twice.any()):
        at = xp.flatnonzero(twice)
        s, x, y = total.reshape(-1)[at], product.reshape(-1)[at], c.reshape(-1)[at].astype(np.float64)
        rest = s - x
        lost = (x - (s - rest)) + (y - rest)  # TwoSum: s + lost = a·b + c
        odd = s.view(np.int64)  # of the two float64 around a·b + c the odd one: it is never half way
        odd += xp.where((lost != 0) & (odd % 2 == 0), xp.where((lost > 0) == (s > 0), 1, -1), 0)
        total.reshape(-1)[at] = s
    return total.astype(np.float32)


def _look_up(values, at, out):
    """out ← values[at]. The indices are widened into a buffer: np.take would do it in fresh memory."""
    index = buffer("index", at.shape, "i8")
    index[...] = at
    np.take(values, index, out=out, mode="clip")


def _fma(a, b, c, out):
    """out ← fma(a, b, c); `fma` itself computes the few sums that may be rounded twice. b: also a number. out may be a, b or c."""
    total, other = buffer("wide", a.shape, "f8"), buffer("other", a.shape, "f8")
    bits, unsigned = other.view(np.int64), other.view(np.uint64)
    total[...] = a
    total *= b
    other[...] = c
    total += other
    doubtful = []
    np.left_shift(
        total.view(np.int64), 35, out=bits
    )  # half way between two float32: of the last 29 bits the first is set alone
    if bits.min(initial=0) == _HALF_WAY:
        doubtful.append(np.flatnonzero(bits == _HALF_WAY))
    np.left_shift(total.view(np.uint64), np.uint64(1), out=unsigned)  # without the sign
    unsigned -= np.uint64(1)  # 0 becomes the largest
    if unsigned.min(initial=_BELOW_TINY) < _BELOW_TINY:
        doubtful.append(np.flatnonzero(unsigned < _BELOW_TINY))
    if not doubtful:
        out[...] = total
        return
    at = np.concatenate(doubtful)
    once = fma(*(x.reshape(-1)[at] if np.ndim(x) else x for x in (a, b, c)))
    out[...] = total
    out.reshape(-1)[at] = once


def adamw(p, g, codes_m, codes_v, absmax_m, absmax_v, t, lr, betas, eps, weight_decay, maps, tables):
    """One step in place, on rows of a block each, in the order of bitsandbytes' CPU step. maps, tables: of m and of v"""
    f, (b1, b2) = np.float32, betas
    m, v = buffer("m", p.shape), buffer("v", p.shape)
    for x, b, codes, absmax, values in ((m, b1, codes_m, absmax_m, maps[0]), (v, b2, codes_v, absmax_v, maps[1])):
        _look_up(values, codes, x)
        x *= absmax[:, None]
        x *= f(b)
    _fma(g, f(1 - b1), m, m)
    scaled = np.multiply(g, f(1 - b2), out=buffer("s", p.shape))
    _fma(scaled, g, v, v)
    round_blocks(m, tables[0], codes_m, absmax_m)
    round_blocks(v, tables[1], codes_v, absmax_v)
    np.sqrt(v, out=v)
    v /= f(math.sqrt(1 - b2**t))
    v += f(eps)
    m *= f(-lr / (1 - b1**t))
    m /= v
    if weight_decay > 0:
        p *= f(1 - lr * weight_decay)
    p += m
