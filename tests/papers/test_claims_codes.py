"""What the papers on AF4 (2306.06965) and BOF4 (2505.06653) say of codes, against the law of normal weights in blocks of 64."""

import numpy as np
import pytest

from tinylora import codebooks
from tinylora.numerics.optimality import block_law, expected_error, optimal_code

NF4 = codebooks.nf4()


def ratios(code, signed):
    """A code's MAE and MSE over NF4's."""
    return [expected_error(code, 64, p, signed) / expected_error(NF4, 64, p) for p in (1, 2)]


@pytest.mark.parametrize(
    "code, signed, theory, published",
    [
        (codebooks.af4(64), False, (1.032, 1.082), [(1.030, 1.076), (1.027, 1.072), (1.030, 1.077)]),
        (codebooks.bof4(64, "mse", True), True, (0.973, 0.869), [(0.977, 0.880), (0.981, 0.889), (0.977, 0.880)]),
    ],
    ids=["AF4", "BOF4-S"],
)
def test_bof4_table_1_is_what_theory_predicts_to_2_and_a_half_percent(code, signed, theory, published):
    """Printed for Llama-3.1-8B, Qwen-2.5-7B and Mistral-7B; each ratio lies between the theory's and 1."""
    ours = ratios(code, signed)
    assert tuple(round(x, 3) for x in ours) == theory
    for model in published:
        for x, printed in zip(ours, model, strict=True):
            assert abs(printed / x - 1) < 0.025 and min(x, 1) < printed < max(x, 1)


@pytest.mark.parametrize(
    "pins, theory, published", [(None, 0.954, 0.962), ((0,), 0.966, 0.968), ((-1, 1), 0.987, 0.993)]
)
def test_bof4_table_5_the_pins_cost_what_theory_says_within_a_hundredth(pins, theory, published):
    ratio = expected_error(optimal_code(64, pins=pins), 64) / expected_error(optimal_code(64), 64)
    assert round(ratio, 3) == theory and 0 < published - ratio < 0.0085


def test_equal_usage_costs_twice_the_squared_error_of_nf4():
    """Cells that hold 1/16 of the scaled weights each, with the value that is best for each."""
    block, x = block_law(64), np.linspace(-1, 1, 4001)
    below = 0.5 + block.moments(x, 0)[0]  # P(X ≤ x) for x < 1
    cuts = np.concatenate([[-1], np.interp(np.arange(1, 16) / 16, below, x), [1]])
    mass, first, second = np.diff(block.moments(cuts, 2))
    atom = block.atom(2) / 2
    mass[[0, -1]] += atom
    first[[0, -1]] += [-atom, atom]
    second[[0, -1]] += atom
    cost = (second - first**2 / mass).sum()
    assert round(cost, 5) == 0.01713 and round(cost / expected_error(NF4, 64), 2) == 2.02
