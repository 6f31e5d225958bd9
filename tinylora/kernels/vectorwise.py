"""Int8 with one scale a row, products of whole numbers, and outlier columns apart: LLM.int8 (Dettmers et al. 2022), on plain arrays.

    s_i = max_j |x_ij|,   c_ij = round(127 x_ij / s_i)                            absmax (§2.1), one for each row (§3.1)
    x wᵀ ≈ (s_x ⊗ s_w) / 127² ⊙ (c_x c_wᵀ)                                        vector-wise: c_x c_wᵀ is a product of whole numbers (§3.1)
    x wᵀ ≈ (s_x ⊗ s_w) / 127² ⊙ Σ_{h ∉ O} c_x^h c_w^h + Σ_{h ∈ O} x^h w^h         mixed precision: O, the columns with an outlier (§3.2)

What is quantized are the rows of the activations x (n, k) and the rows of the weight w (out, k), which are the columns of the paper's
W (k, out). Each step is rounded where bitsandbytes 0.50.2 rounds it on a CPU, so codes, scales and the products of whole numbers are
equal in every bit:

    * x and w are rounded to float16 first. What lies above 65,504 becomes infinite there
    * 127 / s is (1/s) · 127 in float32, rounded twice, as torch divides a number by a tensor. A row of zeros has codes 0
    * 1/127² is 6.2000124e-05. The constant in bitsandbytes' CPU code is 6.200124e-05, so its products (and these) are 1.8e-5 too large
    * a weight is c · (s/127) where a layer multiplies by it, and (c · s)/127 where it is handed out; the last bit may differ

NumPy has no fast product of int8 matrices. A float32 product of whole numbers is exact, in any order of summation, as long as no sum
exceeds 2²⁴: that is so for 1,040 products of codes, and longer rows are cut.
"""

import numpy as np

from ..backend import array_module

#: So many products of two codes have a sum below 2²⁴, whatever they are.
EXACT = (1 << 24) // 127**2
_PER_127 = np.float32(1 / 127)
_PER_127_SQUARED = np.float32(6.200124e-05)  # bitsandbytes' constant on a CPU; 1/127² begins with 6.20001


def quantize(x, threshold=0.0):
    """(c, s, O): codes (n, k) int8, scales (n,) float32, numbers of the outlier columns, ascending.   §2.1, §3.1, §3.2.

    x           (n, k) float, n rows with a scale each; a float16 copy is quantized
    threshold   a column with an entry |x| ≥ threshold (rounded to float16 itself) is in O: its codes are 0. 0: O is empty

    The outliers are left out of the scales, but the other entries of their columns are not: s may be larger than the codes need.
    """
    xp = array_module(x)
    columns = xp.zeros(0, np.int64)
    with np.errstate(all="ignore"):
        x = x.astype(np.float16).astype(np.float32)
        scales = xp.abs(x).max(axis=1)
        limit = np.float32(np.float16(threshold))
        if threshold > 0 and not (scales < limit).all():
            outliers = xp.abs(x) >= limit
            columns = xp.flatnonzero(outliers.any(axis=0))
            x = xp.where(outliers, np.float32(0), x)
            scales = xp.abs(x).max(axis=1)
        codes = xp.rint(x * (np.float32(1) / scales * np.float32(127))[:, None])
    if len(columns):
        codes[:, columns] = 0
    if not ((scales > 0) & xp.isfinite(scales)).all():  # a row of zeros, or with something infinite
        codes[~xp.isfinite(codes)] = 0
    return codes.astype(np.int8), scales, columns


def dequantized(codes, scales):
    """(c · s)/127: what bitsandbytes' int8_vectorwise_dequant hands out. -> float32 of the codes' shape"""
    return codes.astype(np.float32) * scales[:, None] * _PER_127


def multiplied(codes, scales):
    """c · (s/127): what bitsandbytes' layer multiplies by, in training and for x̄ = ḡ Ŵ. -> float32 of the codes' shape"""
    return codes.astype(np.float32) * (scales * _PER_127)[:, None]


def whole_product(a, b):
    """a bᵀ of codes a (n, k) and b (m, k), exactly. -> (n, m) int32"""
    total = array_module(a).zeros((len(a), len(b)), np.int32)
    for start in range(0, a.shape[1], EXACT):
        part = slice(start, start + EXACT)
        total += (a[:, part].astype(np.float32) @ b[:, part].astype(np.float32).T).astype(np.int32)
    return total


def product(x, codes, scales, threshold=0.0, bias=None, rounded=lambda y: y):
    """x Ŵᵀ + b by products of whole numbers, and the outlier columns of x in its own precision.   §3.2.   x (n, k) -> (n, out) float32

    rounded   to the layer's dtype: the product of codes with the bias, the columns of the weight that meet outliers, and the sum
    """
    own, own_scales, columns = quantize(x, threshold)
    y = whole_product(own, codes).astype(np.float32)
    y *= own_scales[:, None] * scales
    y *= _PER_127_SQUARED
    if bias is not None:
        y += bias
    y = rounded(y)
    if len(columns):
        y = rounded(y + x[:, columns] @ rounded(dequantized(codes[:, columns], scales)).T)
    return y
