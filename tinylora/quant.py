"""Blockwise quantization to 4 bits, and double quantization of its constants.

The flattened weight is cut into blocks of `blocksize`. With c the code and m_b = max |w| over block b (its absmax),

    quantize:     q_i = the index of the code value nearest to w_i / m_b
    dequantize:   ŵ_i = c[q_i] · m_b                                            (QLoRA §2)

(QLoRA's equations 1 and 2 are the special case of 8-bit integers, and their c is the factor 127/m_b, by which they
divide to come back; here c is the code, and absmax multiplies.)

Double quantization (QLoRA §3) stores the m_b in 8 bits as well, in blocks of 256 and around their mean μ:

    m_b ≈ d[k_b] · n_⌊b/256⌋ + μ,      d an 8-bit code, n = max |m − μ| over 256 blocks

    4 + 32/64 = 4.5 bits a weight become 4 + 8/64 + 32/(64·256) = 4.127.

How ties, zeros, partial blocks and NaN are rounded is bitsandbytes' own rule, on a CPU or on a GPU: see `rounding`. The mean μ
is torch's float32 sum in torch's order. (From 32,768 blocks on, torch's sum depends on its number of threads; here it is that
of one thread, and `offset=` takes another.)

Differs from bitsandbytes: any code, any block size, four 8-bit codes for the constants; a QuantizedTensor is plain data; NaN
and Inf are refused unless asked for; `size` counts weights, not bytes. This file never imports the tensor: whoever only wants to
know about NF4 reads codebooks.py, rounding.py and this one.
"""

from dataclasses import dataclass, replace

import numpy as np

from . import codebooks
from .backend import array_module, is_array, move
from .dtypes import as_float32, dtype_name, round_to
from .kernels.dequantize import scaled, scaled_on_host
from .kernels.rounding import CPU, RULES, signed_absmax, torch_mean

NESTED_BLOCKSIZE = 256


@dataclass(frozen=True)
class DoubleQuantized:
    """absmax in 8 bits: codes (blocks,) uint8, absmax (blocks/256,) float32, offset float32, code (≤ 256,) float32; blocksize 256."""

    codes: np.ndarray
    absmax: np.ndarray
    offset: np.float32
    code: np.ndarray
    blocksize: int = NESTED_BLOCKSIZE

    @property
    def nbytes(self):
        return self.codes.nbytes + self.absmax.nbytes + 4

    def restore(self):
        """d[k_b] · n_⌊b/256⌋ + μ, with two float32 roundings. (blocks,)"""
        xp = array_module(self.codes)
        scale = xp.repeat(self.absmax, self.blocksize)[: len(self.codes)]
        return self.code[self.codes] * scale + self.offset


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight in 4 bits: plain data, made by `quantize`.

    packed      (⌈size/2⌉,) uint8: the even element in the high half, the odd one in the low half
    constants   absmax as a float32 vector, or DoubleQuantized
    code        the values by index, float32;  code_name  a name in codebooks.NAMED, or "custom"
    blocksize, shape, dtype ("float32", "bfloat16", "float16": what the weight was)
    rule, signed            how it was quantized, for `quantize_like`

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
    rule: str = "bitsandbytes-cpu"
    signed: bool = False

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
        """Ŵ = c[q] · absmax in float32, rounded once to `dtype` (default: the weight's own). bfloat16 comes in float32 storage."""
        xp, dtype = array_module(self.packed), dtype_name(dtype or self.dtype)
        with np.errstate(all="ignore"):
            if xp is not np:
                return round_to(scaled(self)[: self.size].reshape(self.shape), dtype)
            absmax = self.absmax
            in_chunks = dtype == "bfloat16" and bool(
                np.isfinite(absmax).all()
            )  # while they are in the cache; no NaN can arise
            flat = scaled_on_host(self, absmax, in_chunks)[: self.size].reshape(self.shape)
            return flat if in_chunks else round_to(flat, dtype)

    def to(self, move):
        """The same weight with its arrays passed through `move` (see backend.move)."""
        c = self.constants
        c = replace(c, codes=move(c.codes), absmax=move(c.absmax), code=move(c.code)) if self.double_quant else move(c)
        return replace(self, packed=move(self.packed), constants=c, code=move(self.code))


def quantize(
    w,
    code="nf4",
    blocksize=64,
    double_quant=False,
    rule="bitsandbytes-cpu",
    offset=None,
    check_finite=True,
    name="weight",
    nested_code="dynamic8",
    signed=False,
):
    """q_i = index of the code value nearest to w_i / absmax of its block (QLoRA §2 and §3). w (...) float -> QuantizedTensor.

    w              float32, float16 or ml_dtypes.bfloat16, any shape; blocks run along the flattened array (row-major)
    code           a name in codebooks.NAMED ("nf4", "fp4", "int4", …), or up to 16 ascending values
    blocksize      weights a block, 1 or more; None: the whole tensor is one block
    double_quant   store absmax in 8 bits, around its float32 mean or around `offset` if that is given (0: without the mean)
    rule           "bitsandbytes-cpu", confirmed to the bit, or "bitsandbytes-cuda", read from the source and not run (see `rounding`).
                   The mean is torch's on a CPU under either; a GPU adds in another order, so give its `offset` to have its bits
    check_finite   True: NaN or Inf raises ValueError with the tensor's `name`; False: do what bitsandbytes does with them
    nested_code    the 8-bit code of double quantization: "dynamic8" (bitsandbytes), "fp8_e4m3", "fp8_e5m2" or "int8"
    signed         divide by the signed absmax, for codes such as bof4(signed=True); absmax then carries a sign

    ValueError for unknown names, a bad blocksize or code, and NaN or Inf; TypeError if w is not a float array.
    """
    if rule not in RULES:
        raise ValueError(f"quantize: rule {rule!r} is unknown: expected one of {', '.join(map(repr, RULES))}")
    if blocksize is not None and (not isinstance(blocksize, (int, np.integer)) or blocksize < 1):
        raise ValueError(
            f"quantize: blocksize = {blocksize!r}, expected a whole number, 1 or more, or None for the whole tensor"
        )
    code_name, values = codebooks.get(code)
    nested = codebooks.get_nested(nested_code)  # looked up first, so that a wrong name is said in any case
    settings = _Settings(code_name, values, blocksize, nested if double_quant else None, offset, rule, signed)
    return _quantize(w, settings, check_finite, name)


def quantize_like(w, q, name="weight"):
    """w quantized as q was: its code, blocks, rule and form of the constants. w of any shape -> QuantizedTensor.

    The mean of the constants is taken anew, unless q has none (offset 0). NaN and Inf raise ValueError.
    """
    q = q.to(lambda a: move(a, "cpu"))
    nested = q.constants.code if q.double_quant else None
    uncentred = (
        q.double_quant and q.offset == 0 and bool((q.nested_absmax != 0).any())
    )  # and not just a weight of zeros
    offset = 0.0 if uncentred else None
    return _quantize(w, _Settings(q.code_name, q.code, q.blocksize, nested, offset, q.rule, q.signed), True, name)


@dataclass(frozen=True)
class _Settings:
    code_name: str
    code: np.ndarray
    blocksize: int | None
    nested_code: np.ndarray | None
    offset: float | None
    rule: str
    signed: bool


def _quantize(w, settings, check_finite, name):
    """Quantizing happens once, and on the host; what comes from a device goes back to it."""
    xp = array_module(w) if is_array(w) else np
    w = w if xp is np else move(w, "cpu")
    floats, dtype = as_float32(w)
    flat = np.ascontiguousarray(floats).reshape(-1)
    c, how = settings, RULES[settings.rule]
    size = int(c.blocksize or max(len(flat), 1))
    with np.errstate(all="ignore"):
        absmax = how.absmax(flat, size)
        if check_finite and not np.isfinite(absmax if how is CPU else CPU.absmax(flat, size)).all():
            _refuse(flat, np.shape(w), name)
        if c.signed:
            absmax = signed_absmax(flat, absmax, size)
        bounds, order = codebooks.midpoints(c.code), codebooks.sorted_order(c.code)
        packed = _pack(how.indices(flat, absmax, size, bounds, order, fp4=c.code_name == "fp4"))
        constants = absmax if c.nested_code is None else quantize_constants(absmax, c.offset, c.nested_code, how)
    shape = tuple(np.shape(w))
    q = QuantizedTensor(packed, constants, c.code, c.code_name, size, shape, dtype, c.rule, bool(c.signed))
    return q if xp is np else q.to(lambda a: move(a, xp))


def _refuse(flat, shape, name):
    bad = np.flatnonzero(~np.isfinite(flat))
    where = tuple(int(i) for i in np.unravel_index(bad[0], shape))
    raise ValueError(
        f"quantize: {name} holds {len(bad)} NaN or Inf (the first is {flat[bad[0]]} at {where}); "
        "pass check_finite=False to do with them what bitsandbytes does"
    )


def _pack(index):
    """Two indices a byte, the even one in the high half; read as little-endian pairs to avoid two strided passes."""
    pair = index.view("<u2")
    return ((pair << 4) | (pair >> 8)).astype(np.uint8)


# ------------------------------------------------------------------------------------------------------- double quantization
def quantize_constants(absmax, offset=None, code=None, rule=CPU):
    """absmax -> DoubleQuantized: subtract the mean (or `offset`), then blockwise 8 bits in blocks of 256 (QLoRA §3)."""
    mean = (torch_mean(absmax) if len(absmax) else np.float32(0)) if offset is None else np.float32(offset)
    code = codebooks.get_nested("dynamic8") if code is None else code
    with np.errstate(all="ignore"):  # equal constants leave a block of zeros, and 1/0
        codes, nested = rule.quantize_8bit(absmax - mean, code, NESTED_BLOCKSIZE)
    return DoubleQuantized(codes, nested, mean, code)
