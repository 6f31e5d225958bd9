"""The article docs/nf4.md: every table and every number in it is computed again here; what its proofs use; its PDF; how it is cited."""

import re
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from scripts import loaded

import tinylora
from tinylora import codebooks
from tinylora.numerics import distributions, optimality
from tinylora.numerics.optimality import entropy, expected_error, optimal_code
from tinylora.papers import nf4_optimum
from tinylora.papers.nf4_construction import nf4_excess, predicted_blocksize

TOP = Path(__file__).parents[2]
TEXT = (TOP / "docs" / "nf4.md").read_text(encoding="utf-8")
NF4, BLOCKSIZES, OFFSETS = codebooks.nf4(), nf4_optimum.BLOCKSIZES, nf4_optimum.OFFSETS
BOTH = pytest.mark.parametrize("power", [1, 2])


def one_line(text):
    return re.sub(r"\s+", " ", text)


@cache
def tables():
    return nf4_optimum.tables()


@cache
def splits(blocksize, power):
    return nf4_optimum.splits(blocksize, power)


# ------------------------------------------------------------------------------------------------------------------- the numbers
@pytest.mark.parametrize("name", ["answer", "law", "errors", "codes", "offsets", "moved", "weights"])
def test_each_table_is_what_the_library_computes(name):
    found = re.findall(r"(?:^\|.*\n)+", TEXT, re.M)
    assert len(found) == 8, "seven tables of numbers, and the one of what is proven"
    assert tables()[name] + "\n" in found


def percent(x, digits):
    return f"{100 * x:.{digits}f} %"


def year():
    """The year of the article, which the licence has too."""
    return re.search(r"\(c\) (\d{4})", (TOP / "LICENSE").read_text(encoding="utf-8"))[1]


def at_least(x, digits):
    """A percentage that is rounded down."""
    return percent(np.floor(x * 10 ** (digits + 2)) / 10 ** (digits + 2), digits)


def at_most(x, digits):
    return percent(np.ceil(x * 10 ** (digits + 2)) / 10 ** (digits + 2), digits)


def over(code, best, power, law=distributions.Normal()):  # noqa: B008
    """How much a code's error at 64 lies above another's."""
    return expected_error(code, 64, power, law=law) / expected_error(best, 64, power, law=law) - 1


@cache
def at_the_corners(blocksize, power, order=20):
    """The slopes at the two corners of the box that encloses a best code."""
    q = optimal_code(blocksize, power)
    v = nf4_optimum.box(q, blocksize, power)
    return [nf4_optimum.slopes(corner, blocksize, power, order) for corner in (q + v, q - v)]


@cache
def sentences():
    """Each passage of the article that holds a number, outside of the tables, with the number as it is computed now."""
    (p1, l1, c1), (p2, l2, c2) = nf4_optimum.law(1), nf4_optimum.law(2)
    at = {(I, p): nf4_excess(I, p) for I in (32, 64) for p in (1, 2)}
    fullest = nf4_optimum.usage_blocksize(NF4)
    H = {I: f"{entropy(NF4, I):.4f} bits" for I in (64, fullest)}
    yield f"tinylora {tinylora.__version__}, {year()}.*"
    yield f"In: the book of tinylora, version {tinylora.__version__}, {year()}."
    yield f"note = {{In: the book of tinylora, version {tinylora.__version__}}}, year = {{{year()}}}"
    yield f"Its error is {percent(at[64, 1], 4)} above the least."
    yield f"its squared error is {percent(at[64, 2], 4)} above the least. NF4 is nearly optimal for the squared error in blocks of {c2}."
    yield f"its absolute error is {percent(at[32, 1], 4)} above the least, and its squared error is {percent(at[32, 2], 4)} above it."
    yield f"$s_0 = {nf4_optimum.cut():.4f}$"
    best = {(I, p): percent(nf4_excess(I, p), 4) for I, p in ((c1, 1), (c2, 2))}
    yield f"NF4 is best for the absolute error in blocks of {c1}, {best[c1, 1]} above the least, and for"
    yield f"the squared error in blocks of {c2}, {best[c2, 2]} above the least."
    assert max(1 - p1 / c1, 1 - p2 / c2) < 0.05
    yield "The law misses these two block sizes by less than 5 %."
    yield f"It is {H[64]} in blocks of 64. It is largest in blocks of {fullest}, where it is {H[fullest]}."
    yield f"$o = {codebooks.NF4_OFFSET}$"
    # section 3: all splits
    searched = (*BLOCKSIZES, c1, c2)
    for I in searched:
        for p in (1, 2):
            assert list(splits(I, p)) == list(range(7)) and sorted(splits(I, p).values(), reverse=True) == list(
                splits(I, p).values()
            )
    next_best = [min(splits(I, p)[5] / splits(I, p)[6] for I in searched) - 1 for p in (1, 2)]
    floor = [at_least(x, 2) for x in next_best]
    yield f"The next best, 5 and 8, costs at least {floor[0]} more for $p = 1$ and {floor[1]} more for $p = 2$."
    # sections 4 and 5: the law
    yield f"Its least value is at $I = {l1}$ for $p = 1$, where $R_1 - 1$ is {percent(nf4_optimum.limit_excess(l1, 1), 4)}, and at"
    yield f"$I = {l2}$ for $p = 2$, where $R_2 - 1$ is {percent(nf4_optimum.limit_excess(l2, 2), 4)}."
    assert abs(l1 - c1) <= 1 and abs(l2 - c2) <= 1
    yield f"the law's error, {p1} instead of {c1} and {p2} instead of {c2},"
    within = [I for I in range(40, 120) if nf4_excess(I, 1) < 0.001]
    assert within == list(range(within[0], within[-1] + 1))
    yield f"In blocks of {within[0]} to {within[-1]} weights, and in no others up to 4096,"
    yield f"and for $p = 1$ in blocks of {within[0]} to {within[-1]}."
    yield f"for $p = 1$ from {within[0]} to {within[-1]};"
    yield "NF4's absolute error is within 0.1 % of the least"
    away = [np.abs(NF4 - optimal_code(64, p)).max() for p in (1, 2)]
    yield f"No value of NF4 lies more than {away[0]:.4f} from the best code for the absolute error."
    yield f"values lie up to {away[1]:.4f} away."
    # section 6: other codes
    laws = {(p, o): nf4_optimum.law(p, o) for p in (1, 2) for o in OFFSETS}
    missed = max(abs(nf4_optimum.deviation(law[2], p, o)) for (p, o), law in laws.items())
    worst = max(abs(law[0] / law[2] - 1) for law in laws.values())
    yield f"from {OFFSETS[0]} to {OFFSETS[-1]} the law misses $\\text{{E}}[M]$ by at most {at_most(missed, 1)}."
    yield f"the block size is missed by at most {at_most(worst, 0)}."
    yield f"For codes with other offsets than NF4's it is up to {at_most(worst, 0)} off (Table 5)."
    yield f"less than 5 % off for NF4, up to {at_most(worst, 0)} off for the others;"
    for p in (1, 2):
        off = [nf4_optimum.deviation(laws[p, o][2], p, o) for o in OFFSETS]
        assert off == sorted(off)
        yield f"it changes its sign near $s_0 = {np.interp(0, off, [nf4_optimum.cut(o) for o in OFFSETS]):.1f}$."
    best = {(b, p): nf4_optimum.best_blocksize(lambda I, b=b, p=p: nf4_optimum.recipe_excess(I, p, bits=b), near)
            for b in (3, 5, 6) for p, near in ((1, p1), (2, p2))}  # fmt: skip
    assert best[5, 1] == best[6, 1] and best[5, 2] == best[6, 2]
    yield f"for $p = 1$ is {best[3, 1]} with 8 values, and {best[6, 1]} with 32 and with 64."
    yield f"For $p = 2$ it is {best[3, 2]} with 8 values, and {best[6, 2]} with 32 and with 64."
    many = [percent(nf4_optimum.recipe_excess(best[6, p], p, bits=6), 4) for p in (1, 2)]
    yield f"with 64 values it is {many[0]} and {many[1]}."
    yield f"NF4's entropy is largest in blocks of {fullest}, where it is {H[fullest]}, and the law says {predicted_blocksize(0)}."
    says = [predicted_blocksize(0, o) for o in OFFSETS]
    used = [nf4_optimum.usage_blocksize(codebooks.normal_float(4, o)) for o in OFFSETS]
    yield f"it says {min(says)} to {max(says)}, and the computed block sizes are {min(used)} to {max(used)}."
    excess = {
        p: max(expected_error(codebooks.closed_form(I, c), I, p) / expected_error(optimal_code(I, p), I, p) - 1
               for I in BLOCKSIZES) for p, c in ((1, "mae"), (2, "mse"))
    }  # fmt: skip
    yield f"at most {at_most(excess[1], 2)} more than the best pinned code in absolute error, and at most {at_most(excess[2], 2)} more"
    # section 7: neighbours
    below = f"{1e8 * (nf4_excess(c2 - 1, 2) - nf4_excess(c2, 2)):.1f} · 10⁻⁸"
    yield f"the closest are {c2 - 1} and {c2} for $p = 2$. The excess at {c2} is {below} below that at {c2 - 1}."
    yield f"{c1} and {c2} are the best block sizes"
    yield f"{c1} and {c2} among all from 2 to 4096"
    yield f"computed, at the block sizes of Table 1, {c1} and {c2};"
    yield f"All were computed at each block size of Table 1, and at {c1} and {c2}."
    yield f"The signs were computed for all best codes of Table 3, and at {c1} and {c2}"
    least = {(I, p): min(np.abs(slope).min() for slope in at_the_corners(I, p)) * p for I in searched for p in (1, 2)}
    (I, p), derivative = min(least.items(), key=lambda item: item[1])
    yield f"The smallest derivative there is {np.floor(1e13 * derivative) / 10:.1f} · 10⁻¹², for $p = {p}$ in blocks of {I}."
    # section 8: other laws and other codes
    student = [over(NF4, optimal_code(64, 1, law=t), 1, t) for t in map(distributions.StudentT, (5, 30, 100))]
    yield f"NF4's absolute error at 64 is at least {at_least(student[0], 2)} above the best pinned code for that law."
    yield f"With 30 degrees of freedom it is at least {at_least(student[1], 3)}, and with 100 at least {at_least(student[2], 3)}."
    findings = one_line((TOP / "figures" / "README.md").read_text(encoding="utf-8"))
    assert (
        "The test rejects 25.8 % of SmolLM2's" in findings
        and "embedded model's 8,960 rows it rejects 6.1 %" in findings
    )
    assert f"it misses the mean maximum by at most {at_most(missed, 1)} for p = 1 and p = 2" in findings
    yield "rejects 25.8 % of the rows of SmolLM2 and 6.1 % of those of tinylora's embedded model, where it would reject 5 % of normal"
    yield f"On the embedded model's {len(nf4_optimum._weights())} linear layers"
    rows = np.array([[float(x) for x in re.findall(r"[\d.]+", row)] for row in tables()["weights"].splitlines()[2:]])
    assert np.abs(rows[:, [1, 3]] - rows[:, [2, 4]]).max() < 0.5
    yield "differs from that of normal weights by less than half a percentage point."
    least, on_normal = rows[rows[:, [2, 4]].argmin(axis=0), 0], rows[rows[:, [1, 3]].argmin(axis=0), 0]
    assert (least == on_normal).all()
    yield f"On the model as on normal weights, this distance is least at {least[0]:.0f} for $p = 1$ and at {least[1]:.0f} for $p = 2$"
    free = [at_least(over(NF4, optimal_code(64, p, pins=None), p), 2) for p in (1, 2)]
    yield f"NF4 is at least {free[0]} above the best code without pins in absolute error, and at least {free[1]} in squared error."
    signed = [1 - expected_error(codebooks.bof4(64, c, True), 64, p, True) / expected_error(NF4, 64, p)
              for p, c in ((1, "mae"), (2, "mse"))]  # fmt: skip
    yield f"has an absolute error {percent(signed[0], 2)} below NF4's, and a squared error {percent(signed[1], 2)} below."


#: Numbers that are settings, sizes and bounds, each held by a test below or in tests/test_optimality.py, or a year, or a paper's number.
SETTINGS = ("4096", "16", "64", "32", "10⁻¹⁰", "10⁻¹²", "10⁻¹³", "13", "30")


def test_each_number_is_in_a_sentence_that_is_computed():
    prose = one_line(re.sub(r"(?:^\|.*\n)+|^!\[.*\n", "\n", TEXT.split("## References")[0], flags=re.M))
    status = one_line("".join(re.findall(r"^\|.*\n", TEXT.split("## 7")[1].split("Table 7")[0], re.M)))
    for sentence in dict.fromkeys(sentences()):
        assert sentence in prose or sentence in status, sentence
        prose = prose.replace(sentence, " ")
    rest = re.sub(r"\$[^$]*\$", lambda math: " " if not re.search(r"\d\.\d|= \d\d", math[0]) else math[0], prose)
    rest = re.sub(r"section \d|Table \d|Figure \d|NF4|BOF4|QLoRA|float32|\[[\d, a-z]+\]|\(\d\)|## \d", " ", rest)
    numbers = [n.rstrip(".,") for n in re.findall(r"\d[\d.,]*[⁻⁰¹²³⁴-⁹]*(?: %)?", rest)]
    found = [n for n in numbers if n not in SETTINGS and len(n) > 1]
    assert not found, f"numbers that nothing computes: {found}"


@pytest.mark.slow
def test_the_best_block_sizes_are_the_best_of_all_up_to_4096():
    for power, best in ((1, 69), (2, 453)):
        step = np.diff([nf4_excess(I, power) for I in range(2, 4097)])
        assert (step[: best - 2] < 0).all() and (step[best - 2 :] > 0).all() and np.abs(step).min() > 2e-8
    for power, best in ((1, 69), (2, 452)):
        step = np.diff([nf4_optimum.limit_excess(I, power) for I in range(2, 4097)])
        assert (step[: best - 2] < 0).all() and (step[best - 2 :] > 0).all()
    assert max(range(2, 4097), key=lambda I: entropy(NF4, I)) == 12


@pytest.mark.slow
def test_nf4s_split_is_the_best_wherever_the_text_says():
    """At the computed block sizes of Table 5 for each error, and from 52 to 93 for p = 1, by as much as at those of Table 1."""
    sizes = [(nf4_optimum.law(p, o)[2], p) for p in (1, 2) for o in OFFSETS] + [(I, 1) for I in range(52, 94)]
    for I, p in sizes:
        least = splits(I, p)
        assert min(least, key=least.get) == 6 and sorted(least.values(), reverse=True) == list(least.values())
        assert least[5] / least[6] - 1 > {1: 0.0372, 2: 0.114}[p], (I, p)


# --------------------------------------------------------------------------------------------------------------- what proofs use
@pytest.mark.parametrize("k", [0, 1, 2, 3.5])
@pytest.mark.parametrize("blocksize", [2, 3, 64, 4096])
def test_theorem_1(k, blocksize):
    """(log g)″ by the moments of s = m² in (3), by differences of log g, and its bound; Cov(s, L) ≤ 0 and the identity it comes from."""
    block = optimality.block_law(blocksize)
    x, s = np.linspace(-0.999, 0.999, 41), block.m**2
    rho = block.others[:, None] * block.m[:, None] ** (k + 1) * np.exp(-np.multiply.outer(s, x**2) / 2)
    rho /= rho.sum(axis=0)
    mean, second = s @ rho, (s**2) @ rho
    curvature = x**2 * (second - mean**2) - mean
    h = 1e-3
    log_g = [np.log(block.density(x + d, k)) for d in (-h, 0, h)]
    assert np.allclose((log_g[0] - 2 * log_g[1] + log_g[2]) / h**2, curvature, rtol=1e-4, atol=1e-4)
    assert (curvature <= -(1 - x**2) / (1 + x**2) * mean + 1e-9).all() and (curvature < 0).all()
    phi = np.exp(-s / 2) / np.sqrt(2 * np.pi)
    L = (blocksize - 2) * block.m * phi / (1 - distributions.Normal().tail(block.m))
    covariance = (s * L) @ rho - mean * (L @ rho)
    assert (covariance <= 1e-12).all()
    assert np.allclose((1 + x**2) / 2 * (second - mean**2), mean + covariance, rtol=1e-8)


@BOTH
def test_a_shift_moves_a_centroid_or_a_median_by_less(power, rng):
    """The two facts about c(a, b) in the proof of Theorem 2."""
    block = optimality.block_law(int(rng.integers(2, 500)))

    def c(a, b):
        at_a, at_b = block.moments(np.array([a, b]), power).T
        if power == 2:
            return (at_b[1] - at_a[1]) / (at_b[0] - at_a[0])
        lo, hi = a, b
        for _ in range(60):
            middle = (lo + hi) / 2
            lo, hi = (middle, hi) if 2 * block.moments(middle, 1)[0] < at_a[0] + at_b[0] else (lo, middle)
        return lo

    for _ in range(30):
        a, b = np.sort(rng.uniform(-1, 0.9, 2))
        t = rng.uniform(0, 1 - b)
        assert c(a, b) < c(a + t, b + t) < c(a, b) + t


@BOTH
def test_a_mirror_image_costs_the_same(power):
    q = optimal_code(64, power)
    assert abs(expected_error(-q[::-1], 64, power) - expected_error(q, 64, power)) < 1e-15


@BOTH
def test_slopes_are_derivatives(power, rng):
    q = np.sort(np.concatenate([[-1, 0, 1], -rng.uniform(0.05, 0.95, 6), rng.uniform(0.05, 0.95, 7)]))
    free = np.flatnonzero(~np.isin(q, (-1, 0, 1)))
    differences = []
    for i in free:
        e = np.zeros(16)
        e[i] = 1e-6
        differences.append((expected_error(q + e, 64, power) - expected_error(q - e, 64, power)) / 2e-6)
    assert np.allclose(nf4_optimum.slopes(q, 64, power) * power, differences, atol=1e-8)


@BOTH
@pytest.mark.parametrize("blocksize", [*BLOCKSIZES, 69, 453])
def test_the_best_codes_are_enclosed_to_1e_10_and_their_errors_hold_with_twice_the_nodes(blocksize, power):
    q = optimal_code(blocksize, power)
    assert nf4_optimum.enclosed(q, blocksize, power, 1e-10)
    moved = q + np.where(np.isin(q, (-1, 0, 1)), 0, 1e-9)
    assert not nf4_optimum.enclosed(moved, blocksize, power, 1e-10), "the box does not reach it"
    for code in (q, NF4):
        assert abs(expected_error(code, blocksize, power) - expected_error(code, blocksize, power, order=40)) < 1e-13
    least = expected_error(q, blocksize, power)
    assert 1e-12 / least * (1 + expected_error(NF4, blocksize, power) / least) < 4e-10, "the bound on an excess"


@BOTH
@pytest.mark.parametrize("blocksize", [*BLOCKSIZES, 69, 453])
def test_twice_the_nodes_change_no_derivative_by_more_than_the_text_says(blocksize, power):
    for once, twice in zip(at_the_corners(blocksize, power), at_the_corners(blocksize, power, 40), strict=True):
        assert power * np.abs(once - twice).max() < 1e-13 < power * np.abs(once).min() / 10


@BOTH
def test_mpmath_agrees_with_the_slopes_at_the_corners(power):
    """An adaptive integration with 30 digits, where the slopes are smallest: at the corner above, and at the one below."""
    mpmath = pytest.importorskip("mpmath")
    I, q = 16, optimal_code(16, power)
    v = nf4_optimum.box(q, I, power)
    with mpmath.workdps(30):
        root, phi = mpmath.sqrt(2), mpmath.npdf

        def slope(code, i):
            a, x, b = map(mpmath.mpf, ((code[i - 1] + code[i]) / 2, code[i], (code[i] + code[i + 1]) / 2))

            def given(m):
                at = [mpmath.erf(m * y / root) / 2 for y in (a, x, b)]
                inner = {1: 2 * at[1] - at[0] - at[2], 2: m * x * (at[2] - at[0]) - phi(m * a) + phi(m * b)}[power]
                return 2 * (I - 1) * m * phi(m) * mpmath.erf(m / root) ** (I - 2) * inner

            return mpmath.quad(given, [0, 1, 2, 3, 4, 6, 10])

        for code, sign in ((q + v, 1), (q - v, -1)):
            found = dict(zip(np.flatnonzero(~np.isin(q, (-1, 0, 1))), nf4_optimum.slopes(code, I, power), strict=True))
            for i in (1, 8):
                exact = slope(code, i)
                assert power * abs(found[i] - exact) < 1e-13 and power * sign * exact > 1e-12


def test_twice_the_nodes_change_no_entropy_no_mean_maximum_and_no_limit_that_is_printed(monkeypatch):
    def numbers():
        yield from (entropy(NF4, I) for I in (*BLOCKSIZES, 12))
        yield from map(optimality.expected_max, BLOCKSIZES)
        yield from (nf4_optimum.limit_excess(I, p) for I, p in ((69, 1), (452, 2), (451, 2), (453, 2)))

    once, block_law = list(numbers()), optimality.block_law
    monkeypatch.setattr(optimality, "block_law", lambda I, law=distributions.Normal(): block_law(I, law, order=40))  # noqa: B008
    assert np.abs(np.subtract(once, list(numbers()))).max() < 1e-13


@pytest.mark.parametrize("power", [0.5, 1, 2, 3])
def test_proposition_3_holds_for_other_powers_too(power):
    """n^p·D_p of codes with the point density λ, by integration of |x − q|ᵖ g over each cell: (1 + p)·2ᵖ times it tends to ∫g λ⁻ᵖ."""
    block = optimality.block_law(64)
    x, w = (np.polynomial.legendre.leggauss(12)[0] + 1) / 2, np.polynomial.legendre.leggauss(12)[1] / 2
    off = []
    for bits in (4, 6, 8):
        q = codebooks.normal_float(bits, codebooks.NF4_OFFSET).astype(np.float64)
        middle = (q[1:] + q[:-1]) / 2
        total = 0
        for side, ends in ((q[:-1], middle), (q[1:], middle)):
            h = np.abs(ends - side)[:, None]
            at = side[:, None] + (ends - side)[:, None] * x
            total += (w * h * (h * x) ** power * block.density(at.ravel(), power).reshape(at.shape)).sum()
        y, weights = nf4_optimum._POINTS, nf4_optimum._WEIGHTS
        density = np.exp(-((nf4_optimum.cut() * y) ** 2) / 2)
        density /= 2 * weights @ density
        limit = 2 * weights @ (block.density(y, power) * density**-power)
        off.append(abs((1 + power) * (2.0 * len(q)) ** power * total / limit - 1))
    assert off[0] > 2 * off[1] > 4 * off[2] and off[2] < 0.02


@BOTH
def test_the_limit_is_1_for_one_fixed_maximum_at_the_law_and_nowhere_else(power, monkeypatch):
    """Proposition 3 for blocks that all have the same maximum m: g ∝ exp(−m²x²/2)."""

    def excess_of(m):
        density = lambda x, k: np.exp(-(m**2) * x**2 / 2)  # noqa: E731
        monkeypatch.setattr(optimality, "block_law", lambda I: type("Fixed", (), {"density": staticmethod(density)}))
        return nf4_optimum.limit_excess(64, power)

    edge = nf4_optimum.cut() * (1 + power) ** 0.5
    assert abs(excess_of(edge)) < 1e-12 and min(excess_of(0.99 * edge), excess_of(1.01 * edge)) > 1e-7


@BOTH
def test_more_values_come_nearer_to_the_limit(power):
    off = [
        abs(nf4_optimum.recipe_excess(64, power, bits=b) - nf4_optimum.limit_excess(64, power)) for b in (3, 4, 5, 6)
    ]
    assert all(b < a / 2 for a, b in pairwise(off))


def test_the_figure_draws_each_offset_once_for_each_error():
    pytest.importorskip("matplotlib")
    left, right = nf4_optimum.nf4_law().axes
    marks = [line for line in left.lines if line.get_marker() in "os"]
    assert [len(line.get_xdata()) for line in marks] == [len(OFFSETS)] * 2
    assert np.allclose(marks[0].get_ydata(), [optimality.expected_max(nf4_optimum.law(1, o)[2]) for o in OFFSETS])
    assert len(right.lines) == 4


# ------------------------------------------------------------------------------------------------------------- printed and cited
@pytest.fixture(scope="module")
def pdf():
    for module in ("markdown_it", "mdit_py_plugins", "latex2mathml"):
        pytest.importorskip(module)
    return loaded(TOP / "docs" / "pdf.py")


def test_the_page_that_is_printed_loads_nothing_and_typesets_all_mathematics(pdf):
    page = pdf.render()
    assert not re.search(r"""(?:src|href)="(?!data:|#)|url\(|@import|<script""", page)
    body = re.sub(r"<math.*?</math>", "", page.split("</style>")[1], flags=re.S)
    assert "$" not in body and "\\" not in body and page.count("<math") > 150
    assert page.count("<figcaption>") == 10, "eight tables and two figures"
    assert re.findall(r"<figcaption>(?:Table|Figure) (\d)", page).count("1") == 2


def test_chromium_prints_it(pdf, chromium, tmp_path, capsys):
    assert pdf.main(["--out", str(tmp_path / "nf4.pdf")]) == 0
    printed = (tmp_path / "nf4.pdf").read_bytes()
    assert printed.startswith(b"%PDF-") and len(re.findall(rb"/Type\s*/Page\b", printed)) in range(6, 10)
    assert [p.name for p in tmp_path.iterdir()] == ["nf4.pdf"]


def test_without_chromium_a_sentence_says_so(pdf, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pdf, "BROWSERS", ("no-such-browser",))
    assert pdf.main(["--out", str(tmp_path / "nf4.pdf")]) == 2
    assert "prints with Chromium, and found none of no-such-browser" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_citation_is_a_citation():
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((TOP / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and citation["authors"] == [{"name": "The tinylora authors"}]
    assert citation["license"] == "MIT" and citation["message"] and citation["title"]
    assert citation["version"] == tinylora.__version__, "which YAML would read as a number if it had one point"
    (article,) = citation["references"]
    assert str(article["year"]) == year() and f"# {article['title']}\n" in TEXT


def test_what_can_be_cited_has_an_anchor_before_it():
    places = re.findall(r'<a id="([a-z]+-\d|law)"></a>\**(.*)\n\n?(.*)', TEXT)
    named = {anchor: first for anchor, first, _ in places}
    for anchor in ("theorem-1", "theorem-2", "proposition-3", "law"):
        assert named[anchor].lower().startswith(anchor.replace("-", " ") if "-" in anchor else "the law.")
    tables_of = re.findall(r'<a id="table-(\d)"></a>\n\n(?:\|.*\n)+\n\*Table (\d)\.', TEXT)
    assert tables_of == [(str(n), str(n)) for n in range(1, 9)] and len(places) == 12
    linked = set(re.findall(r"\]\(#([^)]+)\)", TEXT))
    assert linked <= set(named) and {*named} - linked == {f"table-{n}" for n in range(2, 8)}
