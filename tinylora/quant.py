"""Blockwise quantization to 4 bits, and double quantization of its constants.

The flattened weight is cut into blocks of `blocksize`. With c the code and m_b = max |w| over block b (its absmax),

    quantize:     q_i = the index of the code value nearest to w_i / m_b
    dequantize:   ŵ_i = c[q_i] · m_b                                            (QLoRA §2)

(QLoRA's equations 1 and 2 are the special case of 8-bit integers, and their c is the factor 127/m_b, by which they
divide to come back; here c is the code, and absmax multiplies.)

Double quantization (QLoRA §3) stores the m_b in 8 bits as well, in blocks of 256 and around their mean μ:

    m_b ≈ d[k_b] · n_⌊b/256⌋ + μ,      d the dynamic 8-bit code, n = max |m − μ| over 256 blocks

    4 + 32/64 = 4.5 bits a weight become 4 + 8/64 + 32/(64·256) = 4.127.

The rule "bitsandbytes-cpu" is what bitsandbytes 0.50 does on a CPU, to the bit; where its rounding surprises, the
comment says so. In particular its 8-bit rounding is a look-up in a table of 65,536 entries and not the nearest code,
and its mean is torch's float32 sum in torch's order. (From 32,768 blocks on, torch's sum depends on its number of
threads; here it is that of one thread, and `offset=` takes another.)

Differs from bitsandbytes: a QuantizedTensor is plain data; NaN and Inf are refused unless asked for; `size` counts
weights, not bytes. This file never imports the tensor: whoever only wants to know about NF4 reads this one and
codebooks.py.
"""

from dataclasses import dataclass, replace

import numpy as np

from . import codebooks
from .backend import array_module, is_array, move
from .dtypes import as_float32, round_to

NESTED_BLOCKSIZE = 256
_CHUNK = 1 << 18  # elements worked on at a time, so that the temporaries stay in the cache


@dataclass(frozen=True)
class DoubleQuantized:
    """absmax in 8 bits: codes (blocks,) uint8, absmax (blocks/256,) float32, offset float32, code (256,) float32."""

    codes: np.ndarray
    absmax: np.ndarray
    offset: np.float32
    code: np.ndarray

    @property
    def nbytes(self):
        return self.codes.nbytes + self.absmax.nbytes + 4

    def restore(self):
        """d[k_b] · n_⌊b/256⌋ + μ, with two float32 roundings. (blocks,)"""
        xp = array_module(self.codes)
        scale = xp.repeat(self.absmax, NESTED_BLOCKSIZE)[: len(self.codes)]
        return self.code[self.codes] * scale + self.offset


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight in 4 bits: plain data, made by `quantize`.

    packed      (⌈size/2⌉,) uint8: the even element in the high half, the odd one in the low half
    constants   absmax as a float32 vector, or DoubleQuantized
    code        the values by index, float32;  code_name  "nf4", "fp4", "int4" or "custom"
    blocksize, shape, dtype ("float32", "bfloat16", "float16": what the weight was)

    `size` is the number of weights and `nbytes` what is held for them. (The codes, 64 bytes and for double quantization
    another 1,024, are shared by all tensors and not counted.)
    """

    packed: np.ndarray
    constants: np.ndarray | DoubleQuantized
    code: np.ndarray
    code_name: str
    blocksize: int
    shape: tuple
    dtype: str

    @property
    def size(self):
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self):
        return self.packed.nbytes + self.constants.nbytes

    @property
    def bits_per_param(self):
        return 8 * self.nbytes / self.size

    @property
    def double_quant(self):
        return isinstance(self.constants, DoubleQuantized)

    @property
    def absmax(self):
        """One float32 a block: as measured, or restored where it is double-quantized."""
        with np.errstate(all="ignore"):
            return self.constants.restore() if self.double_quant else self.constants

    @property
    def absmax_codes(self):
        """The 8-bit codes of absmax, or None."""
        return self.constants.codes if self.double_quant else None

    @property
    def nested_absmax(self):
        """The constants of the constants, or None."""
        return self.constants.absmax if self.double_quant else None

    @property
    def offset(self):
        """The mean that was subtracted from absmax before its quantization, or None."""
        return self.constants.offset if self.double_quant else None

    def indices(self):
        """q, one uint8 below 16 for each weight, in the weight's shape."""
        xp = array_module(self.packed)
        return xp.stack([self.packed >> 4, self.packed & 15], axis=1).reshape(-1)[: self.size].reshape(self.shape)

    def dequantize(self, dtype=None):
        """Ŵ = c[q] · absmax in float32, rounded once to `dtype` (default: the weight's own). bfloat16 comes in float32 storage.

        Two neighbours are looked up at once: 256 pairs of values, indexed by the packed byte.
        """
        xp, n = array_module(self.packed), self.size
        pairs = xp.take(_pair_table(self.code), self.packed)  # (⌈n/2⌉,) complex64: two float32 beside each other
        flat, absmax = pairs.view(np.float32)[:n], self.absmax
        whole = n // self.blocksize
        with np.errstate(all="ignore"):
            body = flat[: whole * self.blocksize].reshape(whole, self.blocksize)
            body *= absmax[:whole, None]
            if whole * self.blocksize < n:
                flat[whole * self.blocksize :] *= absmax[whole]
            return round_to(flat.reshape(self.shape), dtype or self.dtype)

    def to(self, move):
        """The same weight with its arrays passed through `move` (see backend.move)."""
        c = self.constants
        c = DoubleQuantized(move(c.codes), move(c.absmax), c.offset, move(c.code)) if self.double_quant else move(c)
        return replace(self, packed=move(self.packed), constants=c, code=move(self.code))


def _pair_table(code):
    """(256,) complex64: entry (i << 4 | j) is the pair (code[i], code[j])."""
    xp = array_module(code)
    values = xp.zeros(16, np.float32)
    values[: len(code)] = code
    table = xp.empty((16, 16, 2), np.float32)
    table[..., 0], table[..., 1] = values[:, None], values[None, :]
    return table.reshape(-1).view(np.complex64)


def quantize(
    w,
    code="nf4",
    blocksize=64,
    double_quant=False,
    rule="bitsandbytes-cpu",
    offset=None,
    check_finite=True,
    name="weight",
):
    """q_i = index of the code value nearest to w_i / absmax of its block (QLoRA §2 and §3). w (...) float -> QuantizedTensor.

    w              float32, float16 or ml_dtypes.bfloat16, any shape; blocks run along the flattened array (row-major)
    code           "nf4", "fp4", "int4", or up to 16 ascending values
    double_quant   store absmax in 8 bits, around its float32 mean or around `offset` if that is given
    check_finite   True: NaN or Inf raises ValueError with the tensor's `name`; False: do what bitsandbytes does with them
    """
    if rule != "bitsandbytes-cpu":
        raise ValueError(f"quantize: rule {rule!r} is unknown: expected 'bitsandbytes-cpu'")
    if not isinstance(blocksize, (int, np.integer)) or blocksize < 1:
        raise ValueError(f"quantize: blocksize = {blocksize!r}, expected a whole number, 1 or more")
    code_name, values = codebooks.get(code)
    if is_array(w) and (xp := array_module(w)) is not np:  # quantizing happens once, and on the host
        q = quantize(move(w, "cpu"), code, blocksize, double_quant, rule, offset, check_finite, name)
        return q.to(lambda a: move(a, xp))
    floats, dtype = as_float32(w)
    flat = np.ascontiguousarray(floats).reshape(-1)
    with np.errstate(all="ignore"):
        absmax = _absmax(flat, blocksize)
        if check_finite and not np.isfinite(absmax).all():
            _refuse(flat, np.shape(w), name)
        packed = _pack(_nearest(flat, absmax, blocksize, values))
        constants = quantize_constants(absmax, offset) if double_quant else absmax
    return QuantizedTensor(packed, constants, values, code_name, int(blocksize), tuple(np.shape(w)), dtype)


def _refuse(flat, shape, name):
    bad = np.flatnonzero(~np.isfinite(flat))
    where = tuple(int(i) for i in np.unravel_index(bad[0], shape))
    raise ValueError(
        f"quantize: {name} holds {len(bad)} NaN or Inf (the first is {flat[bad[0]]} at {where}); "
        "pass check_finite=False to do with them what bitsandbytes does"
    )


def _absmax(flat, blocksize):
    """max |w| a block; NaN if the block holds one. A last partial block is clamped to 1e-38, and stored so (bitsandbytes)."""
    if len(flat) == 0:
        return np.zeros(0, np.float32)
    out = np.concatenate(
        [
            np.maximum.reduceat(np.abs(flat[i : i + step]), np.arange(0, len(flat[i : i + step]), blocksize))
            for step in [max(_CHUNK // blocksize, 1) * blocksize]
            for i in range(0, len(flat), step)
        ]
    )
    if len(flat) % blocksize:
        out[-1] = np.maximum(out[-1], np.float32(1e-38))
    return out


def _nearest(flat, absmax, blocksize, values):
    """Code indices, uint8. Counts the midpoints below x: a tie goes to the lower value, NaN above all of them.

    A whole block is multiplied by the float32 reciprocal of its absmax, a last partial block is divided by it:
    bitsandbytes does so, and the two differ in the last bit. absmax below 1e-38 counts as 1e-38.
    """
    n, whole = len(flat), len(flat) // blocksize
    bounds, last = codebooks.midpoints(values), len(values) - 1
    index = np.empty(n, np.uint8)
    reciprocal = np.float32(1) / np.maximum(absmax[:whole], np.float32(1e-38))
    blocks = max(_CHUNK // blocksize, 1)
    x, hit = np.empty((blocks, blocksize), np.float32), np.empty((blocks, blocksize), np.bool_)
    for b in range(0, whole, blocks):
        r = reciprocal[b : b + blocks, None]
        part = slice(b * blocksize, (b + len(r)) * blocksize)
        np.multiply(flat[part].reshape(-1, blocksize), r, out=x[: len(r)])
        _count(x[: len(r)], bounds, last, hit[: len(r)], index[part].reshape(-1, blocksize))
    if whole * blocksize < n:
        tail = slice(whole * blocksize, n)
        _count(flat[tail] / absmax[-1], bounds, last, np.empty(n - tail.start, np.bool_), index[tail])
    order = codebooks.sorted_order(values).astype(np.uint8)
    if (order != np.arange(len(order))).any():
        index = order[index]
    if n % 2:  # bitsandbytes pads with the number 0 before it looks up the code
        zero = np.empty(1, np.uint8)
        _count(np.zeros(1, np.float32), bounds, last, np.empty(1, np.bool_), zero)
        index = np.append(index, order[zero])
    return index


def _count(x, bounds, last, hit, out):
    """out = last − #{b : x ≤ b}: one comparison a midpoint beats any search, and NaN compares False, so it ends at the top."""
    out[...] = last
    for b in bounds:
        np.less_equal(x, b, out=hit)
        out -= hit.view(np.uint8)


def _pack(index):
    """Two indices a byte, the even one in the high half; read as little-endian pairs to avoid two strided passes."""
    pair = index.view("<u2")
    return ((pair << 4) | (pair >> 8)).astype(np.uint8)


# ------------------------------------------------------------------------------------------------------- double quantization
def quantize_constants(absmax, offset=None):
    """absmax -> DoubleQuantized: subtract the mean (or `offset`), then blockwise 8 bits in blocks of 256."""
    mean = (torch_mean(absmax) if len(absmax) else np.float32(0)) if offset is None else np.float32(offset)
    code = codebooks.shared_dynamic8()
    codes, nested = quantize_8bit(absmax - mean, code, NESTED_BLOCKSIZE)
    return DoubleQuantized(codes, nested, mean, code)


def quantize_8bit(x, code, blocksize=256):
    """(codes uint8, absmax float32) of a float32 vector, as bitsandbytes' CPU kernel rounds.

    s = x / absmax is looked up in a table of the 65,536 numbers v_i = 2i/65535 − 1, each of which knows its own nearest
    code: the result is the code nearest to the nearest v_i, and not always the one nearest to s. s = 0 falls between
    two v_i and comes out as code 131 (1.56e-5) instead of 127 (0). A block of zeros gives code 0, which does no harm
    since its absmax is 0. NaN does not count for absmax and gets the code of v_0.
    """
    n = len(x)
    rows = np.zeros((-(-n // blocksize), blocksize), np.float32)
    rows.reshape(-1)[:n] = x
    absmax = np.where(np.isnan(rows), np.float32(0), np.abs(rows)).max(axis=1, initial=np.float32(0))
    s = rows * (np.float32(1) / absmax)[:, None]
    u = (np.clip(s, -1, 1) + np.float32(1)) * np.float32(0.5)
    position = (u.astype(np.float64) * 65535 + 0.5).astype(
        np.float32
    )  # one fused multiply-add there; exact in float64 here
    position = np.where(np.isnan(position), np.float32(0), position).astype(np.int32) & 0xFFFF
    grid = np.arange(65536, dtype=np.float32) * np.float32(2) / np.float32(65535) - np.float32(1)
    table = np.searchsorted(codebooks.midpoints(code), grid, "left").astype(np.uint8)
    codes = table[position]
    codes[absmax == 0] = 0
    return codes.reshape(-1)[:n], absmax


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
