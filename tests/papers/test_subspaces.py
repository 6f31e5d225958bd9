"""Subspaces: φ and its baseline, the projection metric and its erratum, amplification, and ranks of several kinds."""

import numpy as np
import pytest

from tinylora import Tensor
from tinylora.papers import subspaces


def rotation(rng, n):
    return np.linalg.qr(rng.standard_normal((n, n)))[0]


def with_directions(rng, columns, sigma):
    """A (len(sigma), k) matrix whose right singular vectors are the given columns, with these singular values."""
    return rotation(rng, len(sigma)) @ np.diag(sigma) @ columns.T


# ------------------------------------------------------------------------------------------------------------------ similarity
def test_equal_spans_have_similarity_1_and_orthogonal_ones_0(rng):
    q = rotation(rng, 20)
    a = with_directions(rng, q[:, :4], [4, 3, 2, 1])
    same = with_directions(rng, q[:, :4] @ rotation(rng, 4), [9, 5, 2, 1])  # the same span, other vectors
    apart = with_directions(rng, q[:, 4:8], [4, 3, 2, 1])
    assert subspaces.similarity(a, same, 4, 4) == pytest.approx(1, abs=1e-12)
    assert subspaces.similarity(a, apart, 4, 4) == pytest.approx(0, abs=1e-12)
    assert subspaces.similarity(a, np.vstack([a, apart]), 4, 8) == pytest.approx(1, abs=1e-12)  # contained


def test_similarity_is_symmetric_and_ignores_the_basis_and_the_other_side(rng):
    a, b = rng.standard_normal((6, 30)), rng.standard_normal((9, 30))
    phi = subspaces.similarity(a, b, 3, 7)
    q = rotation(rng, 30)
    assert subspaces.similarity(b, a, 7, 3) == pytest.approx(phi, abs=1e-12)
    assert subspaces.similarity(rotation(rng, 6) @ a @ q, b @ q, 3, 7) == pytest.approx(phi, abs=1e-12)
    assert subspaces.similarity(a.T, b.T, 3, 7, side="left") == pytest.approx(phi, abs=1e-12)


def test_left_singular_vectors_of_a_wide_A_are_no_measure(rng):
    """The paper's appendix G says left; for r × k matrices that is 1 for any two runs."""
    a, b = rng.standard_normal((4, 300)), rng.standard_normal((4, 300))
    assert subspaces.similarity(a, b, 4, 4, side="left") == pytest.approx(1, abs=1e-12)
    assert subspaces.similarity(a, b, 4, 4) < 0.1


def test_the_grid_is_equation_4_cell_by_cell(rng):
    a, b = rng.standard_normal((5, 24)), rng.standard_normal((8, 24))
    grid = subspaces.similarity_grid(a, b, 5, 8)
    assert grid.shape == (5, 8)
    for i in range(1, 6):
        for j in range(1, 9):
            ua, ub = (np.linalg.svd(m)[2][:n].T for m, n in ((a, i), (b, j)))
            assert grid[i - 1, j - 1] == pytest.approx(np.linalg.norm(ua.T @ ub) ** 2 / min(i, j), abs=1e-12)


def test_random_subspaces_share_max_i_j_over_d(rng):
    d, i, j, draws = 64, 4, 16, 200
    phis = [subspaces.similarity(rng.standard_normal((i, d)), rng.standard_normal((j, d)), i, j) for _ in range(draws)]
    expected = subspaces.expected_similarity(i, j, d)
    assert expected == 0.25
    assert abs(np.mean(phis) - expected) < 6 * np.std(phis) / draws**0.5


def test_float32_arrays_and_tensors_give_what_float64_gives(rng, xp):
    a, b = (rng.standard_normal((4, 32)).astype(np.float32) for _ in range(2))
    phi = subspaces.similarity(a.astype(np.float64), b.astype(np.float64), 2, 3)
    assert subspaces.similarity(Tensor(xp.asarray(a)), xp.asarray(b), 2, 3) == pytest.approx(phi, abs=1e-12)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda a: subspaces.similarity(a, a[:, :5], 1, 1), "a and b have 8 and 5 columns"),
        (lambda a: subspaces.similarity(a, a[:2], 1, 1, side="left"), "a and b have 3 and 2 rows"),
        (lambda a: subspaces.similarity(a, a, 4, 1), "i = 4, expected 1 to 3, the rank of a"),
        (lambda a: subspaces.similarity(a, a, 1, 0), "j = 0, expected 1 to 3, the rank of b"),
        (lambda a: subspaces.similarity(a, 0 * a, 1, 1), "j = 1, expected 1 to 0, the rank of b"),
        (lambda a: subspaces.similarity(a[0], a, 1, 1), "a must be a matrix with two axes"),
        (lambda a: subspaces.similarity(a * np.nan, a, 1, 1), "a holds NaN"),
        (lambda a: subspaces.similarity(a, a, 1, 1, side="top"), "side 'top' is unknown"),
        (lambda a: subspaces.expected_similarity(3, 9, 8), "i = 3 and j = 9, expected 1 to d = 8"),
        (lambda a: subspaces.amplification(a, a.T, 1), r"delta has shape \(3, 8\) and w \(8, 3\)"),
        (lambda a: subspaces.amplification(np.outer(a[:, 0], a[0]), a, 2), "r = 2, expected 1 to 1, the rank of delta"),
        (lambda a: subspaces.expected_projection(a, 4), "r = 4, expected 1 to 3"),
        (lambda a: subspaces.effective_rank(a, "trace"), "kind 'trace' is unknown"),
        (lambda a: subspaces.effective_rank(a, "energy", 0), "energy = 0"),
        (lambda a: subspaces.best_rank_error(a, 4), "r = 4, expected 0 to 3"),
    ],
)
def test_bad_input_gets_a_sentence(call, words, rng):
    with pytest.raises(ValueError, match=words):
        call(rng.standard_normal((3, 8)))


def test_directions_beyond_the_rank_are_refused_in_float32_too(rng):
    low = (rng.standard_normal((40, 2)) @ rng.standard_normal((2, 30))).astype(np.float32)
    with pytest.raises(ValueError, match="i = 3, expected 1 to 2"):
        subspaces.similarity(low, low, 3, 1)


# ------------------------------------------------------------------------------------------------------- the projection metric
def test_appendix_G_holds_as_1_minus_d2_over_p_and_not_as_printed(rng):
    a, b = rng.standard_normal((5, 25)), rng.standard_normal((7, 25))
    for i, j in ((5, 7), (5, 2), (1, 1)):
        phi, distance, p = subspaces.similarity(a, b, i, j), subspaces.projection_distance(a, b, i, j), min(i, j)
        assert subspaces.similarity_from_distance(distance, p) == pytest.approx(phi, abs=1e-12)
        printed = (1 - distance**2) / p
        assert printed - phi == pytest.approx(1 / p - 1, abs=1e-12)  # right for p = 1 only
    assert (1 - subspaces.projection_distance(a, b, 5, 7) ** 2) / 5 < 0  # no similarity is negative


def test_appendix_G_with_numbers():
    """A seeded example: φ, 1 − d²/p and the printed formula."""
    rng = np.random.default_rng(12)
    a, b = rng.standard_normal((5, 25)), rng.standard_normal((5, 25))
    phi, distance = subspaces.similarity(a, b, 5, 5), subspaces.projection_distance(a, b, 5, 5)
    print(f"φ = {phi:.6f}, 1 − d²/p = {1 - distance**2 / 5:.6f}, (1/p)(1 − d²) = {(1 - distance**2) / 5:.6f}")
    assert (1 - distance**2) / 5 == pytest.approx(phi - 0.8, abs=1e-12)


def test_the_distance_of_a_span_to_itself_is_0_and_to_an_orthogonal_one_sqrt_p(rng):
    q = rotation(rng, 12)
    a, b = with_directions(rng, q[:, :3], [3, 2, 1]), with_directions(rng, q[:, 3:6], [3, 2, 1])
    assert subspaces.projection_distance(a, a, 3, 3) < 1e-6
    assert subspaces.projection_distance(a, b, 3, 3) == pytest.approx(3**0.5, abs=1e-12)


# ---------------------------------------------------------------------------------------------------------------- amplification
def test_amplification_of_a_planted_update(rng):
    """ΔW stands on W's weakest directions: each of them is amplified by a known factor."""
    u, v = rotation(rng, 30), rotation(rng, 20)
    sigma = np.linspace(10, 0.1, 20)
    w = u[:, :20] @ np.diag(sigma) @ v.T
    delta = u[:, 18:20] @ np.diag([4.0, 3.0]) @ v[:, 18:].T
    found = subspaces.amplification(delta, w, 2)
    assert found.delta_norm == pytest.approx(5) and found.w_norm == pytest.approx(np.linalg.norm(sigma))
    assert found.projected == pytest.approx(np.linalg.norm(sigma[18:]), rel=1e-10)
    assert found.top == pytest.approx(np.linalg.norm(sigma[:2])) and found.factor == pytest.approx(5 / found.projected)
    assert found.random == pytest.approx(np.linalg.norm(sigma) * 2 / 600**0.5)
    assert found.projected < found.random < found.top


def test_an_update_that_w_lacks_altogether_is_amplified_without_bound(rng):
    w, delta = np.diag([1.0, 0.0]), np.diag([0.0, 1.0])
    assert subspaces.amplification(delta, w, 1).factor == np.inf


def test_random_frames_see_w_r_over_sqrt_dk_of_a_matrix(rng):
    w, r, draws = rng.standard_normal((24, 40)) @ np.diag(np.linspace(0, 3, 40)), 5, 300
    squares = []
    for _ in range(draws):
        u, v = (np.linalg.qr(rng.standard_normal((n, r)))[0] for n in w.shape)
        squares.append(np.linalg.norm(u.T @ w @ v) ** 2)
    assert abs(np.mean(squares) - subspaces.expected_projection(w, r) ** 2) < 6 * np.std(squares) / draws**0.5


# ----------------------------------------------------------------------------------------------------------------------- ranks
@pytest.mark.parametrize("kind", ["entropy", "stable", "energy"])
def test_r_equal_singular_values_have_effective_rank_r(kind, rng):
    q = rotation(rng, 9)
    assert subspaces.effective_rank(7.5 * q[:, :6], kind, energy=1.0) == pytest.approx(6)
    assert subspaces.effective_rank(np.outer(q[0], q[1]), kind) == pytest.approx(1)
    assert subspaces.effective_rank(np.zeros((3, 4)), kind) == 0


def test_effective_ranks_by_hand():
    w = np.diag([3.0, 2.0, 1.0])
    p = np.array([3, 2, 1]) / 6
    assert subspaces.effective_rank(w) == pytest.approx(np.prod(p**-p))
    assert subspaces.effective_rank(w, "stable") == pytest.approx(14 / 9)
    assert [subspaces.effective_rank(w, "energy", e) for e in (0.5, 0.9, 0.95, 1.0)] == [1, 2, 3, 3]


def test_the_best_error_at_rank_r_is_the_tail_and_truncation_reaches_it(rng):
    w = rng.standard_normal((9, 14))
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    for r in (0, 3, 9):
        assert subspaces.best_rank_error(w, r) == pytest.approx(
            np.linalg.norm(w - u[:, :r] * s[:r] @ vt[:r]) ** 2, abs=1e-12
        )
    other = rng.standard_normal((9, 3)) @ np.linalg.lstsq(rng.standard_normal((9, 3)), w, rcond=None)[0]
    assert np.linalg.norm(w - other) ** 2 > subspaces.best_rank_error(w, 3)
