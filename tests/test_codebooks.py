"""The codes against the published tables, bit for bit."""

import math

import numpy as np
import pytest
from goldens import QUANT

from tinylora import codebooks


def bits(x):
    return x.view(np.uint32).tolist()


#: QLoRA appendix E as bitsandbytes holds it, float32 bit patterns
NF4_BITS = [
    0xBF800000,
    0xBF3239B1,
    0xBF066B30,
    0xBECA32A0,
    0xBE91A24D,
    0xBE3D353F,
    0xBDBA7871,
    0x00000000,
    0x3DA2FAFF,
    0x3E24CAE3,
    0x3E7C04DD,
    0x3EAD033A,
    0x3EE1A4B8,
    0x3F1007AB,
    0x3F3913B3,
    0x3F800000,
]


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
