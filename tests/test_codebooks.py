"""The codes against the published tables, bit for bit."""

import math

import numpy as np
import pytest
from goldens import QUANT

from tinylora import codebooks
from tinylora.papers import nf4_construction


def bits(x):
    return x.view(np.uint32).tolist()


NF4_BITS = list(codebooks.NF4_PUBLISHED)


def test_nf4_equals_the_published_table_in_all_16_entries():
    assert bits(codebooks.nf4()) == NF4_BITS == bits(QUANT["nf4"])


def test_nf4_has_seven_negatives_a_zero_and_eight_positives():
    code = codebooks.nf4()
    assert ((code < 0).sum(), (code == 0).sum(), (code > 0).sum()) == (7, 1, 8)


def test_the_offset_is_half_a_bin_of_16_averaged_with_half_a_bin_of_15():
    exact = 1 - (1 / 32 + 1 / 30) / 2
    assert math.isclose(exact, 929 / 960, rel_tol=1e-15)
    assert int(exact * 1e7) / 1e7 == codebooks.NF4_OFFSET


def test_other_grids_would_miss_the_table():
    """np.linspace in float32 differs in one entry (index 1, 4 ULP), so it is torch's grid that is emulated."""
    grid = [np.linspace(codebooks.NF4_OFFSET, 0.5, n, dtype=np.float32)[:-1] for n in (9, 8)]
    positive, negative = map(codebooks._normal_inverse, grid)
    values = np.sort(np.concatenate([-negative, [0], positive])).astype(np.float32)
    ulps = np.array(bits(values / values.max())) - np.array(NF4_BITS)
    assert np.flatnonzero(ulps).tolist() == [1] and abs(ulps[1]) == 4


def test_fp4_equals_the_published_table():
    assert bits(codebooks.fp4()) == bits(QUANT["fp4"])


@pytest.mark.parametrize("signed, name", [(True, "dynamic_signed"), (False, "dynamic_unsigned")])
def test_dynamic_maps_equal_the_published_tables(signed, name):
    assert bits(codebooks.dynamic8(signed)) == bits(QUANT[name])


def test_int4_is_even():
    code = codebooks.int4()
    assert len(code) == 15 and code[7] == 0 and (code == -code[::-1]).all()


def test_a_caller_cannot_spoil_a_code():
    codebooks.nf4()[0] = 7
    assert codebooks.nf4()[0] == -1


@pytest.mark.parametrize("code", ["nf5", [3, 1, 2], [1.0], np.arange(17.0), [0, np.nan]])
def test_bad_codes_get_a_sentence(code):
    with pytest.raises(ValueError, match="code"):
        codebooks.get(code)


# ------------------------------------------------------------------------------------------------ what breaks the published table
@pytest.mark.parametrize(
    "change, expected",
    [
        ({"grid": codebooks.linspace_f32}, [0] * 16),
        ({"grid": lambda a, b, n: np.linspace(a, b, n, dtype=np.float32)}, [0, -4, *[0] * 14]),
        ({"grid": np.linspace}, [0, -2, 0, 0, 0, 0, 5, 0, 4, -2, 0, -1, -1, -1, -2, 0]),
        ({"precision": np.float64}, [0, -1, -1, 0, -1, 0, 1, 0, 0, 0, 0, 1, 0, -1, 0, 0]),
        ({"offset": 929 / 960}, [0, 2, 4, 3, 4, 0, 6, 0, 7, -5, -8, -5, -2, -2, -5, 0]),
    ],
    ids=["as published", "np.linspace in float32", "np.linspace in float64", "divided in float64", "929/960 exactly"],
)
def test_each_deviation_from_the_recipe_misses_the_table(change, expected):
    probabilities, quantiles, values = nf4_construction.recipe(**change)
    assert nf4_construction.ulps(values) == expected
    assert len(probabilities) == len(quantiles) == 16


def test_equation_4_as_printed_is_another_code():
    """q_i = ½(Q(i/(2^k+1)) + Q((i+1)/(2^k+1))): its first value is −∞; the 15 others are symmetric, with an exact 0."""
    q = nf4_construction.equation_4()
    assert q[0] == -np.inf and np.isfinite(q[1:]).all()
    assert np.abs(q[1:] + q[:0:-1]).max() < 1e-15 and abs(q[8]) < 1e-15 and round(float(q[15]), 3) == 1.376
    gap = np.abs(q[1:9] / q[15] - codebooks.nf4()[:8]).max()  # the 7 negatives and the 0 compare one to one
    assert round(float(gap), 3) == 0.075


@pytest.mark.parametrize("name, count", [("fp8_e4m3", 253), ("fp8_e5m2", 247)])
def test_8_bit_floats_are_those_of_ml_dtypes(name, count):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    dtype = {"fp8_e4m3": ml_dtypes.float8_e4m3fn, "fp8_e5m2": ml_dtypes.float8_e5m2}[name]
    values = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float64)
    values = np.unique(values[np.isfinite(values)])
    code = codebooks.NESTED[name]()
    assert len(code) == count and (code == (values / values.max()).astype(np.float32)).all()


def test_4_bit_floats_by_bit_pattern():
    assert (codebooks.fp4("e2m1") * 6).tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
    assert (codebooks.fp4("e3m0")[:8] * 16).tolist() == [0, 0.25, 0.5, 1, 2, 4, 8, 16]
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = np.arange(16, dtype=np.uint8).astype(ml_dtypes.float4_e2m1fn, copy=False)
    patterns = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert values.shape == (16,) and (patterns == codebooks.fp4("e2m1") * 6).all()


def test_normal_float_has_the_form_of_nf4_in_any_width():
    assert bits(codebooks.normal_float(4)) == NF4_BITS
    for k in range(2, 9):
        code = codebooks.normal_float(k)
        assert ((code < 0).sum(), (code == 0).sum(), (code > 0).sum()) == (2 ** (k - 1) - 1, 1, 2 ** (k - 1))
        assert (np.diff(code) > 0).all() and code[0] == -1 and code[-1] == 1


def test_every_named_code_has_16_values_or_fewer_and_reaches_one():
    for name, make in codebooks.NAMED.items():
        code = make()
        assert code.dtype == np.float32 and len(code) <= 16 and code.max() == 1 and 0 in code, name
    for name, make in codebooks.NESTED.items():
        code = make()
        assert code.dtype == np.float32 and len(code) <= 256 and code.max() == 1 and (np.diff(code) > 0).all(), name
