"""How bitsandbytes rounds: on a CPU, and on a GPU. Both are confirmed to the bit.

Blockwise quantization leaves much open that decides single bits: the scale as a quotient or a product with a reciprocal, ties,
blocks of zeros, a last partial block, NaN, and the nearest 8-bit code. A `Rule` settles it:

    absmax(w, blocksize)                   the constants m_b
    bounds(values)                         the boundaries between the code's values, which are ascending
    indices(w, absmax, blocksize, bounds, order, fp4)    the nearest code of each w_i / m_b; a pad is added to odd lengths
    quantize_8bit(x, code, blocksize)      codes and constants in 8 bits, for double quantization; code is ascending

order[k] is the index of the code's k-th value in ascending order (`codebooks.sorted_order`); fp4 says that the code is bitsandbytes' FP4,
for which the GPU has a rule of its own.

| | "bitsandbytes-cpu" (0.50.2, on a CPU) | "bitsandbytes-cuda" (0.50.2, on an NVIDIA H200) |
|---|---|---|
| scale | w·(1/m), m at least 1e-38; a last partial block w/m | w·(1/m), 1/m approximate (see `reciprocal`), denormals flushed to 0 |
| boundary | the midpoint in float32 | the midpoint's decimal in float32: for four of NF4's fifteen it is the neighbouring float32 |
| tie | lower value | lower value; FP4: smaller magnitude, at pivots of its own |
| block of zeros | the code of 0 | 0·∞ = NaN: index 0 (NF4: −1, times 0) |
| NaN | m = NaN, all indices the highest value's | ignored by m; its own index 0. Where nothing else is in a block, m = −FLT_MAX |
| dequantized denormals | kept | flushed to 0 |
| pad of an odd length | code of 0 | code of 0·(1/m) |
| 8 bits | a table of 65,536 entries, not always the nearest | a search; a tie goes to the even index |
| mean of the constants | torch's sum on one thread (`torch_mean`) | not reproduced: a GPU adds in another order; give `offset=` |
| block sizes there | 32 to 4096 | 32 to 4096, powers of two; 32 and 64 in a kernel of their own, with the same arithmetic |

Why a boundary is not always the midpoint: the kernel's source compares with decimals such as 0.5016634166240692, which is the shortest
one that stands for the midpoint in float64. Where the midpoint lies halfway between two float32, that decimal lies a hair beside it, and
the compiler, which rounds a decimal once, takes the nearer float32 and not the even one.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from . import eightbit
from .reciprocal import flush, rcp
from .threads import side_by_side

# Elements worked on at a time. The more they are, the less two threads wait for each other; on one thread a quarter of them is as fast.
_CHUNK = 1 << 20
_LEAST = np.float32(1e-38)  # where the CPU rule clamps absmax


class Rule(NamedTuple):
    """Four functions, see the module's docstring."""

    absmax: Callable
    bounds: Callable
    indices: Callable
    quantize_8bit: Callable


def in_pieces(quantized, flat, blocksize):
    """(packed, absmax) of a flat weight from quantized(part) of some whole blocks at a time: the weight comes into the cache once.

    The same bits as of quantized(flat), in 0.8 of the time and without an array of all indices.
    """
    step = max(_CHUNK // (2 * blocksize), 1) * 2 * blocksize  # whole bytes, too
    if len(flat) <= step:
        return quantized(flat)
    packed, absmax = np.empty(-(-len(flat) // 2), np.uint8), np.empty(-(-len(flat) // blocksize), np.float32)

    def piece(start):
        pairs, largest = quantized(flat[start : start + step])
        packed[start // 2 :][: len(pairs)], absmax[start // blocksize :][: len(largest)] = pairs, largest

    side_by_side(piece, range(0, len(flat), step))
    return packed, absmax


def signed_absmax(flat, absmax, blocksize):
    """absmax with the sign of the element that attains it (BOF4-S); + where both signs do. (blocks,)"""
    if len(flat) == 0:
        return absmax
    starts = np.arange(0, len(flat), blocksize)
    positive = np.maximum.reduceat(flat, starts) >= -np.minimum.reduceat(flat, starts)
    return np.where(positive, absmax, -absmax)


# ------------------------------------------------------------------------------------------------------------------------- CPU
def cpu_absmax(flat, blocksize):
    """max |w| a block; NaN if the block holds one. A last partial block is clamped to 1e-38, and stored so.

    Taken from the bit patterns without their sign bits: they are ordered as the magnitudes are, NaN above all, and compare faster.
    """
    out, bits = np.empty(-(-len(flat) // blocksize), np.uint32), flat.view(np.uint32)
    step = max(_CHUNK // blocksize, 1) * blocksize
    for i in range(0, len(flat), step):
        part = bits[i : i + step] & np.uint32(0x7FFFFFFF)
        starts = np.arange(0, len(part), blocksize)
        np.maximum.reduceat(part, starts, out=out[i // blocksize :][: len(starts)])
    out = out.view(np.float32)
    if len(flat) % blocksize:
        out[-1] = np.maximum(out[-1], _LEAST)
    return out


def midpoints(values):
    """The boundaries between neighbours: float32((cᵢ + cᵢ₊₁)/2) of an ascending code. (n − 1,)"""
    return (values[:-1] + values[1:]) / np.float32(2)


def cpu_indices(flat, absmax, blocksize, bounds, order, fp4=False):
    """The code indices, uint8, of even length. Counts the midpoints below x: a tie goes to the lower value, NaN above all of them.

    A whole block is multiplied by the float32 reciprocal of its absmax, a last partial block is divided by it: the two
    differ in the last bit. absmax below 1e-38 counts as 1e-38.
    """
    n, whole = len(flat), len(flat) // blocksize
    last = len(bounds)
    index = np.empty(n, np.uint8)
    reciprocal = np.float32(1) / np.copysign(np.maximum(np.abs(absmax[:whole]), _LEAST), absmax[:whole])
    for part, x in _scaled(flat, reciprocal, blocksize):
        _count_from_above(x, bounds, last, index[part])
    if whole * blocksize < n:
        _count_from_above(flat[whole * blocksize :] / absmax[-1], bounds, last, index[whole * blocksize :])
    order = order.astype(np.uint8)
    if (order != np.arange(len(order))).any():
        index = order[index]
    if n % 2:  # the number 0 is appended before the code is looked up
        zero = np.empty(1, np.uint8)
        _count_from_above(np.zeros(1, np.float32), bounds, last, zero)
        index = np.append(index, order[zero])
    return index


def _scaled(flat, reciprocal, blocksize):
    """(slice of flat, flat · reciprocal of its block) for all whole blocks, in chunks; x is overwritten by the next one."""
    blocks = max(_CHUNK // blocksize, 1)
    x = np.empty((min(blocks, len(reciprocal)), blocksize), np.float32)
    for b in range(0, len(reciprocal), blocks):
        r = reciprocal[b : b + blocks, None]
        part = slice(b * blocksize, (b + len(r)) * blocksize)
        np.multiply(flat[part].reshape(-1, blocksize), r, out=x[: len(r)])
        yield part, x[: len(r)].reshape(-1)


def _count_from_above(x, bounds, last, out):
    """out = last − #{b : x ≤ b}: one comparison a midpoint beats any search, and NaN compares False, so it ends at the top."""
    hit = np.empty(x.shape, np.bool_)
    out[...] = last
    for b in bounds:
        np.less_equal(x, b, out=hit)
        out -= hit.view(np.uint8)


def cpu_quantize_8bit(x, code, blocksize=256):
    """(codes uint8, absmax float32) of a float32 vector, as bitsandbytes' CPU kernel rounds (`eightbit.round_blocks`).

    s = x / absmax is looked up in a table of the 65,536 numbers v_i = 2i/65535 − 1, each of which knows its own nearest
    code: the result is the code nearest to the nearest v_i, and not always the one nearest to s. s = 0 falls between
    two v_i and comes out as code 131 (2.1e-5) instead of 127 (0). A block of zeros gives code 0, which does no harm
    since its absmax is 0. NaN does not count for absmax and gets the code of v_0.
    """
    x = np.asarray(x, np.float32)
    codes_of = eightbit.table(code.astype(np.float32).tobytes())
    blocks, whole = -(-len(x) // blocksize), len(x) // blocksize
    codes, absmax = np.empty((blocks, blocksize), np.uint8), np.empty(blocks, np.float32)
    step = max(eightbit.CHUNK // blocksize, 1)
    for b in range(0, whole, step):
        part = slice(b, min(b + step, whole))
        rows = x[part.start * blocksize : part.stop * blocksize].reshape(-1, blocksize)
        eightbit.round_blocks(rows, codes_of, codes[part], absmax[part])
    if whole < blocks:
        eightbit.round_blocks(_rows(x[whole * blocksize :], blocksize)[0], codes_of, codes[whole:], absmax[whole:])
    codes[absmax == 0] = 0
    return codes.reshape(-1)[: len(x)], absmax


def _rows(x, blocksize):
    """x in rows of a block each, filled with zeros, and max |x| of each row; NaN does not count."""
    rows = np.zeros((-(-len(x) // blocksize), blocksize), np.float32)
    rows.reshape(-1)[: len(x)] = x
    return rows, np.where(np.isnan(rows), np.float32(0), np.abs(rows)).max(axis=1, initial=np.float32(0))


# ------------------------------------------------------------------------------------------------------------------------ CUDA
#: dQuantizeFP4's pivots for |x| and the patterns between them, as the kernel writes them: decimals, some ulps beside the midpoints.
_FP4_PIVOTS = np.array([0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333], np.float32)
_FP4_PATTERNS = np.array([0, 1, 6, 7, 4, 5, 2, 3], np.uint8)


def cuda_absmax(flat, blocksize):
    """max |w| a block as fmaxf takes it: NaN does not count. A block of nothing but NaN keeps the start value −FLT_MAX, or 0 if partial."""
    if len(flat) == 0:
        return np.zeros(0, np.float32)
    out = flush(np.fmax.reduceat(np.abs(flat), np.arange(0, len(flat), blocksize)))
    nothing = np.isnan(out)
    out[nothing] = -np.finfo(np.float32).max
    if len(flat) % blocksize and nothing[-1]:
        out[-1] = 0  # it is filled with zeros
    return out


def decimal_midpoints(values):
    """float32 of the shortest decimal of (cᵢ + cᵢ₊₁)/2: the boundaries as CUDA's compiler reads them in the source. (n − 1,)"""
    exact = (values[:-1].astype(np.float64) + values[1:]) / 2  # float64 holds the midpoint of two float32 of like size
    return np.array([_nearest(repr(float(x))) for x in exact], np.float32)


def _nearest(decimal):
    """The float32 nearest to a decimal, rounded once."""
    from fractions import Fraction

    x = Fraction(decimal)
    near = np.float32(float(x))
    around = (near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf)))
    return min(around, key=lambda y: abs(Fraction(float(y)) - x))


def cuda_indices(flat, absmax, blocksize, bounds, order, fp4=False):
    """The code indices, uint8, of even length: x = w·rcp(absmax), then the number of boundaries strictly below x, so that NaN gives 0.

    FP4 compares |x| with its own pivots and takes the sign from x < 0. A code that bitsandbytes lacks is treated as NF4 is.
    """
    n = len(flat)
    padded = np.zeros(-(-n // blocksize) * blocksize, np.float32)
    padded[:n] = flat
    bounds, order = (_FP4_PIVOTS, _FP4_PATTERNS) if fp4 else (bounds, order.astype(np.uint8))
    index = np.empty(len(padded), np.uint8)
    for part, x in _scaled(flush(padded), rcp(absmax), blocksize):
        x = flush(x)
        index[part] = order[_count_from_below(np.abs(x) if fp4 else x, bounds)]
        if fp4:
            index[part] |= (x < 0).view(np.uint8) << 3
    if n % 2 and len(padded) == n:  # an odd block without a pad of its own (bitsandbytes has none): the code of 0
        index = np.append(index, order[_count_from_below(np.zeros(1, np.float32), bounds)])
    return index[: n + n % 2]


def _count_from_below(x, bounds):
    """#{b : x > b}, uint8; NaN is above none."""
    out = np.zeros(x.shape, np.uint8)
    for b in bounds:
        out += (x > b).view(np.uint8)
    return out


def cuda_quantize_8bit(x, code, blocksize=256):
    """(codes uint8, absmax float32): the code nearest to x·rcp(absmax), a tie between two codes to the even index; NaN gives 0.

    The kernel halves the 256 codes seven times, which ends on an even index, and then compares with the midpoint to the
    neighbour. A block of zeros is 0·∞ = NaN: code 0. A code of fewer than 256 values behaves as if its last were repeated.
    """
    rows, absmax = _rows(flush(x), blocksize)[0], cuda_absmax(x, blocksize)
    s = flush(rows * rcp(absmax)[:, None])
    bounds = midpoints(code)
    codes = np.searchsorted(bounds, s, "left")
    tie = (codes < len(bounds)) & (bounds[np.minimum(codes, len(bounds) - 1)] == s)
    codes = np.where(np.isnan(s), 0, codes + (tie & (codes % 2 == 1)))
    return codes.astype(np.uint8).reshape(-1)[: len(x)], absmax


CPU = Rule(cpu_absmax, midpoints, cpu_indices, cpu_quantize_8bit)
CUDA = Rule(cuda_absmax, decimal_midpoints, cuda_indices, cuda_quantize_8bit)
RULES = {"bitsandbytes-cpu": CPU, "bitsandbytes-cuda": CUDA}


# ------------------------------------------------------------------------------------------------------------------ torch.mean
def torch_mean(x):
    """mean(x) of a float32 vector, rounded as torch.Tensor.mean() on one CPU thread rounds: its sum in its order, over n.

    torch adds in 4 × 8 running sums (four registers of eight lanes) that spill into a coarser level every 2^k rows;
    what does not fill a row is added afterwards. A float64 mean differs in the last bit in a third of all cases, and
    that bit ends in `offset`.
    """
    n = len(x)
    lanes = 8 if n >= 8 else 1
    vectors = n // lanes
    rows = vectors // 4
    sums = _cascade(x[: rows * 4 * lanes].reshape(rows, 4 * lanes)).reshape(4, lanes)
    first = sums[0]
    for row in x[rows * 4 * lanes : vectors * lanes].reshape(-1, lanes):
        first = first + row
    for other in sums[1:]:
        first = first + other
    total = np.float32(0)
    for value in (*x[vectors * lanes :], *first):
        total = total + value
    return np.float32(total / np.float32(n))


def _cascade(rows):
    """Σ rows in torch's order: groups of `step` rows, the groups' sums in groups again, four levels; remainders lowest first."""
    n, width = rows.shape
    step = 1 << max(4, (max(n, 2) - 1).bit_length() // 4)

    def in_order(groups):  # (g, k, width) -> (g, width)
        out = np.zeros((len(groups), width), np.float32)
        for j in range(groups.shape[1]):
            out += groups[:, j]
        return out

    remainders, level = [], rows
    for _ in range(3):
        whole = len(level) // step * step
        remainders.append(in_order(level[None, whole:])[0])
        level = in_order(level[:whole].reshape(-1, step, width))
    remainders.append(in_order(level[None])[0])
    total = remainders[0]
    for other in remainders[1:]:
        total = total + other
    return total
