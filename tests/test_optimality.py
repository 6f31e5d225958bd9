"""What codes cost: the quadrature against published tables, node doubling, mpmath, simulation; and the findings about NF4, AF4 and BOF4."""

from functools import cache
from itertools import pairwise

import mpmath
import numpy as np
import pytest
from goldens import optimality as printed
from goldens import published

from tinylora import codebooks, quantize
from tinylora.numerics import distributions, optimality
from tinylora.numerics.optimality import entropy, expected_error, expected_max, optimal_code, usage

BLOCKSIZES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
NF4 = codebooks.nf4()

#: {name in optimality.csv: (code of a block size, signed)}
CODES = {
    **{name: (lambda _, make=make: make(), False) for name, make in codebooks.NAMED.items()},
    **{
        f"bof4{'_s' * s}_{c}": (lambda I, c=c, s=s: codebooks.bof4(I, c, s), s)
        for c in ("mse", "mae")
        for s in (False, True)
    },
    **{f"closed_form_{c}": (lambda I, c=c: codebooks.closed_form(I, c), False) for c in ("mse", "mae")},
    "af4": (codebooks.af4, False),
    "lloyd_max": (lambda _: codebooks.lloyd_max(16) / codebooks.lloyd_max(16).max(), False),
    "pinned_mae_of_x": (lambda I: optimal_code(I, 1, of="normalized"), False),
    "unpinned_mse": (lambda I: optimal_code(I, 2, pins=None), False),
}


# ------------------------------------------------------------------------------------------------------------------- the numbers
@cache
def code_of(name, blocksize):
    return CODES[name][0](blocksize)


@pytest.mark.parametrize("quantity, name", printed())
def test_errors_and_entropies_to_the_last_printed_digit(quantity, name):
    signed = CODES[name][1]
    for blocksize, digits in printed()[quantity, name].items():
        if digits:
            code = code_of(name, blocksize)
            value = {
                "MSE_W": lambda: expected_error(code, blocksize, 2, signed),  # noqa: B023
                "MAE_W": lambda: expected_error(code, blocksize, 1, signed),  # noqa: B023
                "MAE_X": lambda: expected_error(code, blocksize, 1, signed, of="normalized"),  # noqa: B023
                "H": lambda: entropy(code, blocksize, signed),  # noqa: B023
            }[quantity]()
            assert f"{value:.{len(digits) - 2}f}" == digits, blocksize


@pytest.mark.parametrize(
    "law", [distributions.Normal(), distributions.StudentT(3), distributions.ScaleMixture((1, 3), (0.9, 0.1))], ids=str
)
@pytest.mark.parametrize("blocksize", [2, 3, 16, 64, 4096, 1 << 24])
def test_doubling_the_nodes_changes_nothing(blocksize, law):
    for power, signed in ((1, False), (2, True)):
        once, twice = (expected_error(NF4, blocksize, power, signed, law=law, order=n) for n in (20, 40))
        assert abs(once - twice) < (1e-9 if isinstance(law, distributions.StudentT) else 1e-12)


def test_an_outlier_s_kinks_and_jumps_stay_within_their_bounds(rng):
    for k, I in zip((*rng.uniform(0.3, 8, 8), 20.0), (*rng.integers(2, 200, 8), 64), strict=True):
        law = distributions.Outlier(float(k))
        for power in (1, 2):
            once, more = (expected_error(NF4, int(I), power, law=law, order=n) for n in (20, 80))
            assert abs(once - more) < 1e-7
        # the share of weights at ±1, the maximum's apart: exact from F_M, since a weight of size k is coded as ±1 if k/M is near enough
        block, at = optimality.block_law(int(I), law), 2 * k / (1 + float(NF4[14]))
        reaches = max_of_normals(at, int(I) - 1) - max_of_normals(k, int(I) - 1)
        exact = (
            reaches / (2 * I) + block.atom(0) / 2 + np.diff(block.moments([(1 + float(NF4[14])) / 2, 1.0], 0)[0]).item()
        )
        assert abs(usage(NF4, int(I), law=law)[-1] - exact) < 1e-4


def max_of_normals(m, n):
    """P(the largest of n normal magnitudes is at most m)."""
    from scipy.special import erf

    return erf(m / 2**0.5) ** n


def by_mpmath(q, I, power):
    """E|W − Ŵ|ᵖ at 30 digits: the outer integral by mpmath's own adaptive rule, the inner ones from its own erf."""
    mpmath.mp.dps = 30
    q = [mpmath.mpf(float(x)) for x in q]
    cuts = [mpmath.mpf(-1), *[(a + b) / 2 for a, b in pairwise(q)], mpmath.mpf(1)]

    def phi(x):
        return mpmath.exp(-x * x / 2) / mpmath.sqrt(2 * mpmath.pi)

    def moments(a, b):
        mass = (mpmath.erf(b / mpmath.sqrt(2)) - mpmath.erf(a / mpmath.sqrt(2))) / 2
        return mass, phi(a) - phi(b), mass + a * phi(a) - b * phi(b)

    def others(m):
        total = mpmath.mpf(0)
        for level, a, b in zip(q, cuts[:-1], cuts[1:], strict=True):
            c = m * level
            if power == 2:
                m0, m1, m2 = moments(m * a, m * b)
                total += m2 - 2 * c * m1 + c * c * m0
            else:
                (l0, l1, _), (r0, r1, _) = moments(m * a, c), moments(c, m * b)
                total += c * l0 - l1 + r1 - c * r0
        return 2 * (I - 1) * phi(m) * mpmath.erf(m / mpmath.sqrt(2)) ** (I - 2) * total

    return float(mpmath.quad(others, [0.25, 1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10]))


@pytest.mark.parametrize("I, power", [(16, 2), (64, 1), (1024, 2)])
def test_mpmath_agrees(I, power):
    assert abs(expected_error(NF4, I, power) - by_mpmath(NF4, I, power)) < 1e-12


@pytest.mark.parametrize("blocksize", [2, 16, 64, 4096])
@pytest.mark.parametrize(
    "law",
    [distributions.Normal(), distributions.StudentT(3), distributions.ScaleMixture.lognormal(0.4)],
    ids=lambda law: type(law).__name__,
)
def test_shares_and_moments_add_up(blocksize, law):
    block = optimality.block_law(blocksize, law)
    whole = 2 * block.moments(1.0, 0)[0] + block.atom(0)
    assert abs(whole - 1) < 1e-13 and abs(usage(NF4, blocksize, law=law).sum() - 1) < 1e-13
    assert abs(2 * block.moments(1.0, 2)[2] + block.atom(2) - 1) < (
        1e-9 if isinstance(law, distributions.StudentT) else 1e-12
    )  # E W² = 1
    x = np.linspace(-0.999, 0.999, 2001)
    assert np.isclose(np.trapezoid(block.density(x, 1), x), 2 * block.moments(0.999, 1)[0], rtol=2e-4)  # a coarse grid


def test_laws_agree_with_scipy_stats():
    from scipy import integrate, stats

    scale = np.sqrt(3 / 5)
    student = distributions.StudentT(5)
    for x in (0.1, 1.0, 4.0):
        assert np.isclose(student.pdf(x), stats.t.pdf(x / scale, 5) / scale, rtol=1e-12)
        assert np.isclose(student.tail(x), 2 * stats.t.sf(x / scale, 5), rtol=1e-12)
    for law in (distributions.Normal(), student, distributions.ScaleMixture((0.5, 2), (0.7, 0.3))):
        for z in (0.3, 2.0, -1.1):
            for n, value in enumerate(law.moments(z)):
                assert abs(value - integrate.quad(lambda w, n=n, law=law: w**n * law.pdf(w), 0, z)[0]) < 1e-9


@pytest.mark.parametrize(
    "code, signed, law",
    [
        ("nf4", False, distributions.Normal()),
        ("bof4", True, distributions.Normal()),
        ("nf4", False, distributions.StudentT(5)),
        ("nf4", False, distributions.Outlier(4)),
    ],
)
def test_quantizing_drawn_weights_costs_what_the_quadrature_says(code, signed, law, rng):
    """Half a million weights through `quantize`; the deviation is measured in standard errors over the blocks."""
    I, blocks = 64, 8192
    w = (
        rng.standard_t(5, (blocks, I)) * np.sqrt(3 / 5)
        if isinstance(law, distributions.StudentT)
        else rng.standard_normal((blocks, I))
    )
    if isinstance(law, distributions.Outlier):
        w[:, 7] = law.k * rng.choice([-1, 1], blocks)
    values = codebooks.bof4(I, "mse", True) if code == "bof4" else NF4
    w = w.astype(np.float32)
    q = quantize(w, values, I, signed=signed)
    for power in (1, 2):
        cost = (np.abs(q.dequantize().astype(np.float64) - w) ** power).mean(axis=1)
        off = (cost.mean() - expected_error(values, I, power, signed, law=law)) / (cost.std() / np.sqrt(blocks))
        assert abs(off) < 5
    if not isinstance(law, distributions.Outlier):
        share = np.bincount(q.indices().ravel(), minlength=16) / w.size
        assert np.abs(share - usage(values, I, signed, law=law)).max() < 5 * 0.5 / np.sqrt(w.size)


def test_affine_integers_against_drawn_weights_and_more_nodes(rng):
    w = rng.standard_normal((20_000, 32))
    lo, hi = w.min(axis=1, keepdims=True), w.max(axis=1, keepdims=True)
    step = (hi - lo) / 15
    cost = (np.square(lo + np.round((w - lo) / step) * step - w)).mean(axis=1)
    assert abs(cost.mean() - optimality.affine_error(32)) < 5 * cost.std() / np.sqrt(len(w))
    for I in (8, 64, 1024):
        assert abs(optimality.affine_error(I) - optimality.affine_error(I, order=10)) < 1e-8


# ------------------------------------------------------------------------------------------------------------------- optimal codes
def gradient(q, blocksize, power, signed, of="weights"):
    """Central differences of the expected error."""
    h, out = 1e-5, []
    for i in range(len(q)):
        e = np.zeros(len(q))
        e[i] = h
        out.append(
            (expected_error(q + e, blocksize, power, signed, of) - expected_error(q - e, blocksize, power, signed, of))
            / (2 * h)
        )
    return np.array(out)


@pytest.mark.parametrize(
    "power, pins, signed, of",
    [
        (2, (-1, 0, 1), False, "weights"),
        (1, (0, 1), True, "weights"),
        (1, None, False, "normalized"),
        (2, (), False, "weights"),
    ],
)
def test_an_optimal_code_is_stationary_and_no_neighbour_is_better(power, pins, signed, of, rng):
    blocksize = int(
        rng.integers(64 if (power, pins) == (1, None) else 8, 600)
    )  # below, the medians lie on the atoms: next test
    q = optimal_code(blocksize, power, pins, signed, of)
    free = ~np.isin(q, pins or ())
    assert np.abs(gradient(q, blocksize, power, signed, of)[free]).max() < 1e-8
    best = expected_error(q, blocksize, power, signed, of)
    for _ in range(20):
        other = q + np.where(free, rng.normal(0, 0.003, len(q)), 0)
        assert expected_error(other, blocksize, power, signed, of) > best


def test_in_small_blocks_the_outer_medians_lie_on_the_atoms():
    q = optimal_code(16, 1, pins=None, of="normalized")
    assert q[0] == -1 and q[-1] == 1
    inner = np.where(np.abs(q) < 1, q, q * (1 - 1e-6))  # the error rises from there inwards
    cost = [expected_error(x, 16, 1, of="normalized") for x in (q, inner)]
    assert cost[0] < cost[1] and np.abs(gradient(q, 16, 1, False, "normalized")[1:-1]).max() < 1e-8


def test_any_pins_and_any_number_of_levels():
    for pins in ((-1, -0.5, 0, 1), (-1, 1), (0.3,), (-1, 0, 0.5, 1)):
        q = optimal_code(64, 2, pins)
        free = ~np.isin(q, pins)
        assert set(pins) <= set(q.tolist()) and np.abs(gradient(q, 64, 2, False)[free]).max() < 1e-8
    assert optimal_code(64, levels=3).tolist() == [-1, 0, 1]
    assert optimal_code(2, 1, pins=(0,), levels=3).tolist() == [
        -1,
        0,
        1,
    ]  # the medians are the atoms, nothing is left to move
    assert len(optimal_code(64, pins=None, levels=2)) == 2 and len(optimal_code(64, levels=32)) == 32


def test_a_mixture_of_far_apart_scales_is_solved_too(rng):
    law = distributions.ScaleMixture((1, 30), (0.95, 0.05))
    q = optimal_code(4096, law=law)
    assert expected_error(q, 4096, law=law) < 0.0162 < expected_error(codebooks.bof4(4096), 4096, law=law)


def test_a_saddle_is_left():
    """For widely mixed scales the symmetric code is stationary, and a lopsided one and its mirror image are better."""
    law = distributions.ScaleMixture.lognormal(1.0)
    q = optimality.optimal_levels(16, 2, law)
    assert (
        abs(q[0] + q[-1]) > 1
        and abs(optimality.distortion(q, 2, law) - optimality.distortion(-q[::-1], 2, law)) < 1e-12
    )
    assert optimality.distortion(q, 2, law) < optimality.distortion((q - q[::-1]) / 2, 2, law)
    assert round(optimality.distortion(q, 2, law) / expected_error(NF4, 64), 3) == 4.999


@pytest.mark.parametrize("power", [1, 2])
def test_the_same_code_is_found_from_random_starts(power, rng):
    expected = optimal_code(64, power)
    for _ in range(5):
        start = np.sort(np.concatenate([[-1, 0, 1], -rng.uniform(0.01, 0.99, 6), rng.uniform(0.01, 0.99, 7)]))
        assert np.abs(optimal_code(64, power, start=start) - expected).max() < 1e-9


def test_six_values_below_zero_and_seven_above_are_the_best_split():
    costs = {}
    for below in range(4, 10):
        start = np.concatenate([-np.linspace(1, 0, below + 2)[:-1], [0], np.linspace(0, 1, 15 - below)[1:]])
        costs[below] = expected_error(optimal_code(64, 2, start=start), 64, 2)
    assert min(costs, key=costs.get) in (6, 7) and abs(costs[6] - costs[7]) < 1e-13  # mirror images
    assert costs[5] > 1.005 * costs[6]


def test_lloyd_max():
    """Max's 16 levels: D = 0.0095010. The often quoted 0.009497 is Max's rounding of 1960."""
    q = codebooks.lloyd_max(16, dtype=np.float64)
    assert abs(optimality.distortion(q) - 0.0095010) < 1e-7 and abs(optimality.distortion(q) - 0.009497) > 3e-6
    assert round(float(-10 * np.log10(optimality.distortion(q))), 3) == 20.222 and round(float(q.max()), 4) == 2.7326
    assert round(optimality.distortion(codebooks.lloyd_max(16, 1, np.float64), 1), 6) == 0.074548
    assert np.allclose(codebooks.lloyd_max(2), [-np.sqrt(2 / np.pi), np.sqrt(2 / np.pi)])
    from scipy.optimize import minimize_scalar

    even = minimize_scalar(
        lambda step: optimality.distortion((np.arange(16) - 7.5) * step), bounds=(0.1, 1), method="bounded"
    )
    assert abs(even.x - 0.33520) < 1e-5 and abs(even.fun - 0.011543) < 1e-6


# ---------------------------------------------------------------------------------------------------------------- published codes
def test_bof4_is_its_theoretical_table_to_2e_6():
    assert np.abs(codebooks.bof4(64, "mse", dtype=np.float64) - published()["bof4_table_8"]).max() < 2e-6


def test_bof4_is_near_its_monte_carlo_tables():
    for name, expected in published()["bof4_table_6"].items():
        criterion, signed = name.split("_")[-1], "_s_" in name
        assert np.abs(codebooks.bof4(64, criterion, signed) - expected).max() < 3.3e-4, name  # their sampling error
    for blocksize, expected in published()["bof4_table_7"].items():
        assert np.abs(codebooks.bof4(int(blocksize), "mse", True) - expected).max() < 3.3e-4, blocksize


@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_af4_as_released_is_reproduced_to_5e_9_by_a_boundary_at_zero(blocksize):
    released = np.array(published()["af4"][str(blocksize)])
    assert np.abs(codebooks.af4(blocksize, np.float64) - released).max() <= 5e-9
    proper = optimal_code(blocksize, 1, of="normalized")
    assert 0.03 < np.abs(proper - released).max() < 0.0455
    cost = [expected_error(q, blocksize, 1, of="normalized") for q in (proper, released, NF4)]
    assert cost[0] < cost[1]
    assert (cost[1] > cost[2]) == (blocksize <= 512)  # AF4 as released loses to NF4 on its own criterion up to 512


def test_sf4_is_its_printed_table():
    assert np.abs(codebooks.sf4(5) - published()["sf4"]).max() < 5.1e-4


# ------------------------------------------------------------------------------------- the finding: one codebook, three near-optima
@cache
def excess(blocksize, power):
    """How much more NF4 costs than the best code with the same pins."""
    return expected_error(NF4, blocksize, power) / expected_error(optimal_code(blocksize, power), blocksize, power) - 1


def test_nf4_is_nearly_optimal_at_three_block_sizes():
    assert max(range(2, 64), key=lambda I: entropy(NF4, I)) == 12 and round(entropy(NF4, 12), 4) == 3.9964
    best = {p: min(span, key=lambda I: excess(I, p)) for p, span in ((1, range(50, 90)), (2, range(400, 500)))}
    assert best == {1: 69, 2: 453}
    assert f"{excess(69, 1):.4%}" == "0.0194%" and f"{excess(68, 1):.4%}" == "0.0197%"
    assert f"{excess(453, 2):.4%}" == "0.0299%" and f"{excess(448, 2):.4%}" == "0.0300%"


def test_the_three_are_predicted_by_the_offset_times_sqrt_1_plus_p():
    from statistics import NormalDist

    s0 = NormalDist().inv_cdf(codebooks.NF4_OFFSET)
    assert round(s0, 4) == 1.8481
    for p, predicted in ((0, 9), (1, 67), (2, 434)):
        assert expected_max(predicted) <= s0 * (1 + p) ** 0.5 < expected_max(predicted + 1)


def test_at_its_own_block_size_nf4_is_best_in_absolute_and_not_in_squared_error():
    assert f"{excess(64, 1):.3%}" == "0.025%" and f"{excess(64, 2):.2%}" == "5.86%"
    assert round(entropy(NF4, 64), 4) == 3.8847
    p = usage(NF4, 64)
    assert (
        round(p.min(), 4) == 0.0173 and round(p.max(), 4) == 0.0924
    )  # "equal expected number of values" (QLoRA §3) does not hold


def test_in_blocks_of_32_nf4_is_further_from_the_best_code_and_still_errs_less():
    """docs/questions.md: excess and entropy at 32 beside those at 64, and NF4's own squared error."""
    assert [f"{excess(32, p):.4%}" for p in (1, 2)] == ["0.5697%", "10.9806%"]
    assert [f"{excess(64, p):.4%}" for p in (1, 2)] == ["0.0250%", "5.8628%"]
    assert f"{entropy(NF4, 32):.4f}" == "3.9473" and min(excess(32, p) - excess(64, p) for p in (1, 2)) > 0
    assert f"{1 - expected_error(NF4, 32, 2) / expected_error(NF4, 64, 2):.1%}" == "9.9%"


def test_fp4_and_int4_against_nf4_and_the_best_code_in_blocks_of_64():
    """What each costs above the best code with −1, 0 and 1 and 16 values; `fp4` is bitsandbytes', and `fp4_e2m1` is OCP's."""
    above = {
        name: [f"{expected_error(CODES[name][0](64), 64, p) / expected_error(optimal_code(64, p), 64, p) - 1:.1%}"
               for p in (1, 2)] for name in ("fp4", "int4", "fp4_e2m1", "nf4")
    }  # fmt: skip
    assert above == {
        "fp4": ["32.7%", "86.1%"],
        "int4": ["25.4%", "44.9%"],
        "fp4_e2m1": ["10.3%", "39.8%"],
        "nf4": ["0.0%", "5.9%"],
    }
    assert excess(64, 1) < 0.1 / 100


def test_closed_forms_stay_within_four_tenths_of_a_percent():
    for I in BLOCKSIZES:
        for p, criterion, bound in ((1, "mae", 0.0008), (2, "mse", 0.0034)):
            best = expected_error(optimal_code(I, p), I, p)
            assert 0 < expected_error(codebooks.closed_form(I, criterion), I, p) / best - 1 < bound


def test_the_maximum_of_a_block():
    mean = {I: expected_max(I) for I in (16, 64, 256, 4096)}
    assert [round(m, 3) for m in mean.values()] == [2.077, 2.596, 3.044, 3.802]
    assert round((expected_max(64, 2) - mean[64] ** 2) ** 0.5 / mean[64], 2) == 0.16
    m = np.linspace(0.5, 6, 20001)
    assert abs(np.trapezoid(optimality.max_pdf(m, 64), m) - 1) < 1e-6
    assert abs(np.trapezoid(1 - optimality.max_cdf(m, 64), m) + 0.5 - mean[64]) < 1e-6


def test_student_weights_rank_the_codes_otherwise():
    law = distributions.StudentT(5)
    cost = {name: expected_error(code(64), 64, 2, signed, law=law) for name, (code, signed) in CODES.items()}
    assert [f"{cost[n]:.5f}" for n in ("nf4", "sf4", "af4", "bof4_mse", "bof4_s_mse")] == [
        "0.01097",
        "0.01111",
        "0.01124",
        "0.01183",
        "0.01089",
    ]


# ------------------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: expected_error("nf4", 64), "codebooks.nf4"),
        (lambda: expected_error([1.0], 64), "2 or more distinct"),
        (lambda: expected_error(NF4, 1), "blocksize = 1, expected a whole number, 2 or more"),
        (lambda: expected_error(NF4, 64, 3), "power = 3"),
        (lambda: expected_error(NF4, 64, of="x"), "'weights' or 'normalized'"),
        (lambda: optimal_code(64, start=NF4, pins=(0.5,)), "contain the pins"),
        (lambda: optimal_code(64, pins=None, zero_cell=False), "needs 0 among the pins"),
        (lambda: optimal_code(64, law=distributions.Outlier(6)), "all weights are alike"),
        (lambda: optimality.affine_error(64, law=distributions.Outlier(6)), "all weights are alike"),
        (lambda: distributions.StudentT(2), "3 or more"),
        (lambda: distributions.ScaleMixture((1, 2), (1,)), "as many probabilities"),
        (lambda: distributions.Outlier(0), "k = 0"),
        (lambda: codebooks.bof4(64, "rmse"), "criterion 'rmse'"),
        (lambda: codebooks.lloyd_max(1), "levels = 1"),
        (lambda: codebooks.normal_float(9), "bits = 9"),
        (lambda: codebooks.normal_float(4, 0.4), "offset = 0.4"),
        (lambda: codebooks.sf4(0), "nu = 0"),
        (lambda: expected_error(NF4, 64, law="normal"), "expected a law"),
        (lambda: expected_error(NF4.reshape(4, 4), 64), "2 or more distinct"),
        (lambda: optimal_code(64, levels=2), "levels = 2, expected a whole number, 3 or more"),
        (lambda: optimal_code(64, pins=(0, 2)), "within"),
        (lambda: optimal_code(64, start=NF4 * 2, pins=(0,)), "within"),
        (lambda: optimality.affine_error(64, levels=1), "levels = 1"),
        (lambda: distributions.ScaleMixture((np.nan, 1), (1, 1)), "as many probabilities"),
        (lambda: distributions.StudentT(np.inf), "finite"),
        (lambda: codebooks.normal_float(4, 1 - 1e-9), "in float32"),
        (lambda: codebooks.fp4("e4m3"), "grid 'e4m3'"),
    ],
)
def test_errors_are_sentences(call, words):
    with pytest.raises((ValueError, TypeError), match=words):
        call()
