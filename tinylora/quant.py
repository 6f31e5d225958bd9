"""Blockwise quantization to 4 bits, and double quantization of its constants.

The weight is flattened and cut into blocks of `blocksize` weights. Let c be the code (see `codebooks`), and m_b the
largest magnitude in block b, its absmax. Then, for a weight w_i of block b (QLoRA §2),

    quantize      q_i = the index of the code value nearest to w_i / m_b
    dequantize    ŵ_i = c[q_i] · m_b

QLoRA's equations 1 and 2 are the special case of 8-bit integers. There the letter c means the factor 127/m_b, and
dequantizing divides by it. Here c is the code, and dequantizing multiplies by absmax.

Double quantization stores the m_b in 8 bits as well (QLoRA §3). Their mean μ is subtracted, and the rest is quantized
in blocks of 256, with an 8-bit code d and a float32 constant n for each of these blocks:

    m_b ≈ d[k_b] · n_⌊b/256⌋ + μ                                            (QLoRA eq. 6 restores m_b in this way, then the weight)

    bits a weight, in blocks of 64:   4 + 32/64 = 4.5   becomes   4 + 8/64 + 32/(64 · 256) = 4.127

Differs from bitsandbytes: any code and any block size are possible, and the constants can be stored in any of four 8-bit codes. A
QuantizedTensor is plain data, and its `size` counts weights, not bytes. NaN and Inf are refused unless they are asked
for. On a CPU the stored bits equal those of bitsandbytes: ties, zeros, partial blocks and NaN are rounded by its rule
(`kernels.rounding`), and μ is torch's float32 sum in torch's order on one thread. From 32,768 blocks on, torch's sum
depends on its number of threads. To use another mean, pass it as `offset=`.

Leaves out: gradients. A quantized weight is never trained, and this file does not import `tensor`. Whoever only wants to know
NF4 reads `codebooks`, this file and, for the search of the nearest value, `kernels.rounding`. What makes dequantizing fast is in
`kernels.dequantize`.
"""

from dataclasses import dataclass, replace

import numpy as np

from . import codebooks
from .backend import array_module, move, whole
from .dtypes import Stored, as_float32, dtype_name
from .kernels import device
from .kernels.dequantize import dequantized
from .kernels.rounding import CPU, RULES, in_pieces, signed_absmax, torch_mean

NESTED_BLOCKSIZE = 256


@dataclass(frozen=True)
class DoubleQuantized:
    """absmax in 8 bits: m_b ≈ code[codes] · absmax + offset.   QLoRA §3.

    codes (blocks,) uint8: indices into code (≤ 256,) float32; absmax (blocks/256,) float32; offset: the mean μ, float32; blocksize 256
    """

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
        absmax = xp.repeat(self.absmax, self.blocksize)[: len(self.codes)]
        return self.code[self.codes] * absmax + self.offset


@dataclass(frozen=True)
class QuantizedTensor(Stored):
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

    nbytes = property(lambda self: self.packed.nbytes + self.constants.nbytes)
    held = property(lambda self: self.packed)
    double_quant = property(lambda self: isinstance(self.constants, DoubleQuantized))
    takes_out = True  # dequantize has out=

    @property
    def absmax(self):
        """One float32 per block: as measured, or restored where it is double-quantized."""
        with np.errstate(all="ignore"):
            return self.constants.restore() if self.double_quant else self.constants

    # The parts of double quantization, None without it: absmax's 8-bit codes, their own absmax, and the mean that was subtracted.
    absmax_codes = property(lambda self: self.constants.codes if self.double_quant else None)
    nested_absmax = property(lambda self: self.constants.absmax if self.double_quant else None)
    offset = property(lambda self: self.constants.offset if self.double_quant else None)

    def indices(self):
        """q, one uint8 below 16 for each weight, in the weight's shape."""
        xp = array_module(self.packed)
        return xp.stack([self.packed >> 4, self.packed & 15], axis=1).reshape(-1)[: self.size].reshape(self.shape)

    def dequantize(self, dtype=None, out=None):
        """`dequantize(self)` by a faster kernel, equal in every bit; rounded once to `dtype` (default: the weight's own).

        bfloat16 comes in float32 storage on the host, and as ml_dtypes.bfloat16 on a device. out: on the host, a float32 array of the
        weight's shape, in one piece, that is written to and returned; ValueError for any other, and for float16.
        """
        with np.errstate(all="ignore"):
            return dequantized(self, dtype_name(dtype or self.dtype), out)

    def to(self, move):
        """The same weight with its arrays passed through `move` (see backend.move)."""
        c = self.constants
        c = replace(c, codes=move(c.codes), absmax=move(c.absmax), code=move(c.code)) if self.double_quant else move(c)
        return replace(self, packed=move(self.packed), constants=c, code=move(self.code))

    def like(self, w, name="weight"):
        return quantize_like(w, self, name)


def dequantize(q):
    """Ŵ = code[q] · absmax: each weight is its code value times the absmax of its block (QLoRA §2), in float32.

    This is the equation. `QuantizedTensor.dequantize` gives the same bits faster (`kernels.dequantize`). Under the rule
    "bitsandbytes-cuda" that method makes denormals zeros, as bitsandbytes' GPU kernels do, and this function keeps them.
    """
    absmax = array_module(q.packed).repeat(q.absmax, q.blocksize)[: q.size].reshape(q.shape)
    return q.code[q.indices()] * absmax


def quantize(w, code="nf4", blocksize=64, double_quant=False, rule="bitsandbytes-cpu", offset=None,
             check_finite=True, name="weight", nested_code="dynamic8", signed=False):  # fmt: skip
    """q_i = index of the code value nearest to w_i / absmax of its block (QLoRA §2 and §3). w (...) float -> QuantizedTensor.

    w              float32, float16 or ml_dtypes.bfloat16, any shape; blocks run along the flattened array (row-major)
    code           a name in codebooks.NAMED ("nf4", "fp4", "int4", …), or up to 16 ascending values
    blocksize      weights a block, 1 or more; None: the whole tensor is one block
    double_quant   store absmax in 8 bits, around its float32 mean or around `offset` if that is given (0: without the mean)
    rule           "bitsandbytes-cpu" or "bitsandbytes-cuda", both confirmed to the bit (see `kernels.rounding`).
                   The mean is torch's on a CPU under either; a GPU adds in another order, so give its `offset` to have its bits
    check_finite   True: NaN or Inf raises ValueError with the tensor's `name`; False: do what bitsandbytes does with them
    nested_code    the 8-bit code of double quantization: "dynamic8" (bitsandbytes), "fp8_e4m3", "fp8_e5m2" or "int8"
    signed         divide by the signed absmax, for codes such as bof4(signed=True); absmax then carries a sign

    ValueError for unknown names, a bad blocksize or code, and NaN or Inf; TypeError if w is not a float array.
    """
    if rule not in RULES:
        raise ValueError(f"quantize: rule {rule!r} is unknown: expected one of {', '.join(map(repr, RULES))}")
    if blocksize is not None:
        whole("quantize: blocksize", blocksize, otherwise=", or None for the whole tensor")
    code_name, values = codebooks.get(code)
    nested = codebooks.get_nested(nested_code)  # looked up first, so that a wrong name is said in any case
    # settings only: there is no weight yet
    form = QuantizedTensor(None, None, values, code_name, blocksize, (), "", rule, bool(signed))
    return _quantize(w, form, nested if double_quant else None, offset, check_finite, name)


def quantize_like(w, q, name="weight"):
    """w quantized as q was: its code, blocks, rule and form of the constants. w of any shape -> QuantizedTensor.

    The mean of the constants is taken anew, unless q has none (offset 0). NaN and Inf raise ValueError.
    """
    q = q.to(lambda a: move(a, "cpu"))
    if not q.double_quant:
        return _quantize(w, q, None, None, True, name)
    uncentred = q.offset == 0 and bool((q.nested_absmax != 0).any())  # a weight of zeros has mean 0 either way
    return _quantize(w, q, q.constants.code, 0.0 if uncentred else None, True, name)


def _quantize(w, form, nested_code, offset, check_finite, name):
    """form: a QuantizedTensor whose code, blocksize, rule and sign are taken. A device does it itself where it has a kernel for it."""
    floats, dtype = as_float32(w)
    xp, flat, order = array_module(floats), floats.reshape(-1), codebooks.sorted_order(form.code)
    form = replace(form, blocksize=int(form.blocksize or max(flat.size, 1)), shape=tuple(floats.shape), dtype=dtype)
    rule, bounds = RULES[form.rule], RULES[form.rule].bounds(form.code[order])
    found = None if xp is np else device.quantized(flat, form, bounds, order, check_finite)
    with np.errstate(all="ignore"):
        packed, absmax = found or _on_host(flat, form, rule, bounds, order, check_finite, name)
        if nested_code is not None:
            absmax = quantize_constants(move(absmax, "cpu"), offset, nested_code, rule)
    return replace(form, packed=packed, constants=absmax).to(lambda a: move(a, xp))


def _on_host(flat, form, rule, bounds, order, check_finite, name):
    """(packed, absmax) of a flat float32 weight; of some whole blocks at a time (`in_pieces`), so that it comes into the cache once."""
    weight, size = np.ascontiguousarray(move(flat, "cpu")), form.blocksize

    def quantized(flat):
        absmax = rule.absmax(flat, size)
        # a block's absmax is finite if its weights are; the GPU's rule passes NaN over
        if check_finite and not np.isfinite(absmax if rule is CPU else CPU.absmax(flat, size)).all():
            _refuse(weight, form.shape, name)
        if form.signed:
            absmax = signed_absmax(flat, absmax, size)
        return _pack(rule.indices(flat, absmax, size, bounds, order, form.code_name == "fp4")), absmax

    return in_pieces(quantized, weight, size)


def _refuse(flat, shape, name):
    """Say where the first NaN or Inf is."""
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
