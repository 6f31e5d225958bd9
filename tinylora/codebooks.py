"""Codes: the 16 values that a 4-bit index stands for, or the 256 of an 8-bit index, each built from its definition.

A code is a float32 vector. A weight that is stored as index i means code[i], times the largest magnitude (absmax) of
its block. NF4's values are quantiles of the normal distribution (QLoRA §3 and appendix E). Each is divided by the largest of
them, so that the last value is 1:

    above 0    Φ⁻¹(p) at 8 evenly spaced probabilities p, from o down; ½ would be the ninth
    below 0    −Φ⁻¹(p) at 7 evenly spaced probabilities p, from o down; ½ would be the eighth
    and an exact 0;      o = 0.9677083, which is 1 − ½(1/32 + 1/30) cut to seven digits

QLoRA's equation 4 is another code: taken literally, its first value is −∞.

    from quantiles       nf4, normal_float(bits), sf4(nu); closed_form(blocksize, criterion) chooses NF4's offset o for a block size
    evenly spaced        int4, int8
    small floats         fp4 (the grid of bitsandbytes, OCP's E2M1, E3M0), fp8_e4m3, fp8_e5m2
    least error          bof4(blocksize, criterion, signed), af4(blocksize), lloyd_max(levels)
    8 bits, by decades   dynamic8, which bitsandbytes uses for the absmax values that double quantization stores

The values stand in ascending order. The one exception is `fp4`, whose index is the bit pattern of a small float.

Differs from bitsandbytes: the values are computed and not listed. A test holds NF4, FP4 and dynamic8 equal to the
published float32 tables in every bit.

Leaves out: codes that are fitted to given weights. The codes of least error come from `numerics.optimality`, for weights
whose distribution is known. They and `sf4` need scipy; the others need NumPy and the standard library.
"""

from functools import cache

import numpy as np

from .numerics.solved import af4, bof4, expected_max, lloyd_max, power_of  # noqa: F401 (re-exported)

#: Where the outermost NF4 quantile lies. bitsandbytes states the number without its origin; it equals 1 − ½(1/32 + 1/30) cut to seven
#: digits: the mean of half a bin of 16 (where a symmetric code of 16 values ends) and half a bin of 15 (where one with a 0 ends).
NF4_OFFSET = 0.9677083

#: The float32 bit patterns of NF4 as published (QLoRA, appendix E; bitsandbytes' table), to compare with and never to compute from.
NF4_PUBLISHED = (
    0xBF800000, 0xBF3239B1, 0xBF066B30, 0xBECA32A0, 0xBE91A24D, 0xBE3D353F, 0xBDBA7871, 0x00000000,
    0x3DA2FAFF, 0x3E24CAE3, 0x3E7C04DD, 0x3EAD033A, 0x3EE1A4B8, 0x3F1007AB, 0x3F3913B3, 0x3F800000,
)  # fmt: skip


def linspace_f32(start, stop, n):
    """n evenly spaced float32 values as torch.linspace makes them: from both ends towards the middle, with a fused multiply-add.

        xᵢ = fma(h, i, start) for i < n/2,  fma(−h, n−1−i, stop) otherwise,  h = (stop − start)/(n − 1) in float32

    A fused multiply-add rounds once. In float64 the product h·i is exact (24 + 8 bits), and the sum is rounded to 53
    bits before the rounding to 24. The two only differ where the float64 sum lies within 2⁻⁵³ of a tie between two float32 numbers.
    """
    a, b = np.float32(start), np.float32(stop)
    h = np.float32((b - a) / np.float32(n - 1))
    i = np.arange(n)
    up = np.float64(a) + np.float64(h) * i
    down = np.float64(b) - np.float64(h) * (n - 1 - i)
    return np.where(i < n // 2, up, down).astype(np.float32)


def _normal_inverse(probabilities):
    """Φ⁻¹(p) in float64, rounded to float32."""
    from statistics import NormalDist  # accurate to the last bits without scipy; slow to load, so not at the top

    inverse = NormalDist().inv_cdf
    return np.array([inverse(float(p)) for p in probabilities], np.float32)


def _quantile_code(inverse, above, below, offset):
    """`below` negative quantiles, 0, `above` positive ones, divided by the largest: NF4's recipe for any distribution, in float32."""
    positive = inverse(linspace_f32(offset, 0.5, above + 1)[:-1])
    negative = -inverse(linspace_f32(offset, 0.5, below + 1)[:-1])
    values = np.sort(np.concatenate([negative, np.zeros(1, np.float32), positive]))
    return values / values.max()


def _frozen(values):
    """The same array, read-only, so that all quantized tensors can share it."""
    values.flags.writeable = False
    return values


@cache
def _nf4():
    """NF4, computed once."""
    return _quantile_code(_normal_inverse, 8, 7, NF4_OFFSET)


def nf4():
    """NF4: Φ⁻¹ at evenly spaced probabilities on either side of an exact 0, divided by the largest. (16,) float32, ascending.

        positive: Φ⁻¹(linspace(o, ½, 9)) without its last,  negative: −Φ⁻¹(linspace(o, ½, 8)) without its last,  o = NF4_OFFSET

    7 negative values, 0, 8 positive ones. Equal in all bits to the table in bitsandbytes and in QLoRA's appendix E. It
    is not what QLoRA eq. 4 says: taken literally, that formula has −∞ as its first value.
    """
    return _nf4().copy()


def normal_float(bits=4, offset=None):
    """NormalFloat of k = 2 to 8 bits: 2^(k−1) − 1 negative quantiles, 0, and 2^(k−1) positive ones (QLoRA §3). (2^k,) float32, ascending.

    offset    the outermost probability. By default 1 − ½(1/2^(k+1) + 1/(2^(k+1) − 2)), the rule that NF4's number follows, carried
              over to k bits here; for k = 4 the published seven digits are taken, so that normal_float(4) is nf4() to the bit
    """
    if bits not in range(2, 9):
        raise ValueError(f"normal_float: bits = {bits!r}, expected 2 to 8")
    if offset is None:
        offset = NF4_OFFSET if bits == 4 else 1 - (1 / 2 ** (bits + 1) + 1 / (2 ** (bits + 1) - 2)) / 2
    if not 0.5 < np.float32(offset) < 1:
        raise ValueError(f"normal_float: offset = {offset}, expected a probability between 0.5 and 1 (in float32)")
    return _quantile_code(_normal_inverse, 2 ** (bits - 1), 2 ** (bits - 1) - 1, offset)


def closed_form(blocksize=64, criterion="mse"):
    """NF4's recipe with its offset at Φ(E[M]/√(1+p)), M the largest of `blocksize` normal magnitudes. (16,) float32, ascending.

    p = 1 ("mae") or 2 ("mse"). Let f be the density of the weights. The values of a large code that minimizes E|error|ᵖ have a density
    proportional to f^(1/(1+p)) (Panter and Dite 1951). For normal weights that is a normal density √(1+p) times as wide. In its units
    the edge of a block, E[M], lies at E[M]/√(1+p). The code's error is within 0.4 % of that of the best code with −1, 0 and 1, for
    blocks of 16 to 4096 (tests/test_optimality.py).
    """
    from statistics import NormalDist

    p = power_of(criterion)
    return normal_float(4, NormalDist().cdf(expected_max(blocksize) / (1 + p) ** 0.5))


def sf4(nu=5):
    """SF4: F_ν⁻¹ in the place of NF4's Φ⁻¹, F_ν Student's distribution (Dotzel et al. 2024, 2405.03103). (16,) float32, ascending."""
    from scipy.special import stdtrit

    if not 0.5 <= nu < np.inf:
        raise ValueError(f"sf4: nu = {nu}, expected a finite number, 0.5 or more")
    return _quantile_code(lambda p: stdtrit(nu, np.float64(p)).astype(np.float32), 8, 7, NF4_OFFSET)


def _small_floats(exponent_bits, mantissa_bits, bias):
    """The magnitudes of a small IEEE-like float by bit pattern: m·2^(1−bias) below the first normal, (1 + m)·2^(e−bias) above. float64"""
    e, m = np.divmod(np.arange(2 ** (exponent_bits + mantissa_bits)), 2**mantissa_bits)
    m = m / 2**mantissa_bits
    return np.where(e == 0, m * 2.0 ** (1 - bias), (1 + m) * 2.0 ** (e - bias))


def fp4(grid="bitsandbytes"):
    """FP4 by bit pattern: eight magnitudes, then their negatives; index 8 is a second zero. (16,) float32.

    "bitsandbytes"  {0, 1/192, 2/3, 1, 1/3, 1/2, 1/6, 1/4}: sign, two exponent bits, one mantissa bit, numbered its own way. The subnormal
                    is 0.0625/12, which is neither OCP's (1/12) nor what bitsandbytes' own create_fp8_map(2, 1) returns (1/48)
    "e2m1"          OCP's E2M1 (Microscaling formats 1.0): {0, ½, 1, 1½, 2, 3, 4, 6}/6
    "e3m0"          three exponent bits, no mantissa: {0, ¼, ½, 1, 2, 4, 8, 16}/16 (QLoRA, table 2)

    Index 8 is +0 here as in bitsandbytes' published table (−0 in one C++ loop; the product with absmax is a zero either way).
    """
    grids = {
        "bitsandbytes": lambda: np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12),
        "e2m1": lambda: (_small_floats(2, 1, 1) / 6).astype(np.float32),
        "e3m0": lambda: (_small_floats(3, 0, 3) / 16).astype(np.float32),
    }
    if grid not in grids:
        raise ValueError(f"fp4: grid {grid!r} is unknown: expected one of {', '.join(grids)}")
    magnitude = grids[grid]()
    return np.concatenate([magnitude, np.zeros(1, np.float32), -magnitude[1:]])


def int4():
    """Int4: −7/7 … 7/7, evenly spaced. (15,) float32, ascending; a sixteenth value would break the symmetry and is unused."""
    return np.arange(-7, 8, dtype=np.float32) / np.float32(7)


# ---------------------------------------------------------------------------------------------------------------------- 8 bits
def int8():
    """Int8: −127/127 … 127/127 (QLoRA eq. 1). (255,) float32, ascending."""
    return np.arange(-127, 128, dtype=np.float32) / np.float32(127)


def _symmetric(magnitudes):
    """The magnitudes, divided by their largest, with both signs: float32, ascending."""
    positive = np.unique(magnitudes / magnitudes.max())
    return np.concatenate([-positive[:0:-1], positive]).astype(np.float32)


def fp8_e4m3():
    """FP8 E4M3 (OCP, 1 sign, 4 exponent, 3 mantissa bits, largest 448, no infinity), divided by 448. (253,) float32, ascending."""
    return _symmetric(_small_floats(4, 3, 7)[:-1])  # the last pattern is NaN


def fp8_e5m2():
    """FP8 E5M2 (OCP, 1 sign, 5 exponent, 2 mantissa bits, largest finite 57,344), divided by it. (247,) float32, ascending."""
    return _symmetric(_small_floats(5, 2, 15)[:-4])  # the last four patterns are infinity and NaN


@cache
def _dynamic8(signed):
    """`dynamic8`, computed once and read-only."""
    values = [0.0, 1.0]
    for i in range(7):  # decade 10^(i−6): 2^i (signed) or 2^(i+1) (unsigned) bins between 0.1 and 1, each at its middle
        boundaries = linspace_f32(0.1, 1, (2**i if signed else 2 ** (i + 1)) + 1)
        middle = ((boundaries[:-1] + boundaries[1:]) / np.float32(2)) * np.float32(10.0 ** (i - 6))
        values += middle.tolist()
        if signed:
            values += (-middle).tolist()
    return _frozen(np.sort(np.array(values, np.float32)))


def dynamic8(signed=True):
    """bitsandbytes' dynamic 8-bit map: seven decades, each with twice as many evenly spaced values as the one below. (256,) float32.

    Signed: −0.99297 … 0 … 1 (there is no −1; index 127 is 0). Unsigned: 0 … 1. Not an IEEE-like float8, although QLoRA
    §3 calls the constants FP8. Source: Dettmers et al. 2022 (8-bit optimizers), §2.2; bitsandbytes' create_dynamic_map.
    """
    return _dynamic8(bool(signed)).copy()


# fmt: off
NAMED = {"nf4": nf4, "fp4": fp4, "int4": int4, "sf4": sf4, "fp4_e2m1": lambda: fp4("e2m1"), "fp4_e3m0": lambda: fp4("e3m0")}
# fmt: on
NESTED = {"dynamic8": dynamic8, "fp8_e4m3": fp8_e4m3, "fp8_e5m2": fp8_e5m2, "int8": int8}


@cache
def _shared(name):
    """The one read-only array that all tensors of a named code share."""
    return _frozen((NAMED | NESTED)[name]())


def get(code):
    """(name, values by index) of a 4-bit code given by name, or of a custom code: 2 to 16 ascending values."""
    if isinstance(code, str):
        if code not in NAMED:
            raise ValueError(f"code {code!r} is unknown: expected one of {', '.join(NAMED)}, or 2 to 16 sorted values")
        return code, _shared(code)
    values = np.array(code, np.float32)
    if values.ndim != 1 or not 2 <= len(values) <= 16 or not np.isfinite(values).all() or (np.diff(values) <= 0).any():
        raise ValueError("a custom code must be a vector of 2 to 16 finite values in ascending order")
    return "custom", _frozen(values)


def get_nested(code):
    """The values of an 8-bit code for the absmax values of double quantization, read-only and shared."""
    if code not in NESTED:
        raise ValueError(f"nested_code {code!r} is unknown: expected one of {', '.join(NESTED)}")
    return _shared(code)


def sorted_order(values):
    """The indices of a code in ascending order of value; of fp4's two zeros, index 0 comes before index 8."""
    return np.argsort(values, kind="stable")


def midpoints(values):
    """The boundaries between neighbours: float32((cᵢ + cᵢ₊₁)/2) of the sorted code. (n − 1,)"""
    ordered = values[sorted_order(values)]
    return (ordered[:-1] + ordered[1:]) / np.float32(2)
