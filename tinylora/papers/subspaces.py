"""How much two subspaces share, how much an update amplifies, and how many directions a matrix has.

    φ(A, B, i, j) = ‖U_iᵀ U_j‖²_F / min(i, j) ∈ [0, 1]      what the top i directions of A and the top j of B share   (LoRA eq. 4)
    E φ = max(i, j) / d                                     for random subspaces of d dimensions
    φ = 1 − d²/p,   d = √(p − Σσ²),   p = min(i, j)         the projection metric                                     (appendix G)
    ‖ΔW‖_F / ‖Uᵀ W V‖_F                                     U, V: the top r singular vectors of ΔW                    (§7.3, H.4)

Which singular vectors? The paper says it in three ways: right in §7.2 (A is r × k, and what it adapts to is its row space in R^k), left in
appendix G (whose matrices are d × i, so that columns are meant), and "column vectors" under figures 3, 4, 6 and 7. Only the right ones of A
live in a space of more than r dimensions: the left ones of an r × k matrix of full rank span all of R^r, and φ(r, r) would be 1 for any
two runs. So `side="right"` is the default, for A; `side="left"` is for B (d × r), whose column space is what the layer writes to.
Appendix G's inline formula loses the j of U_j, and its identity is printed as φ = (1/p)(1 − d²), which is below φ by exactly 1 − 1/p and
negative for unrelated subspaces; with 1 − d²/p it holds.

Everything is computed in float64 on the host; NumPy arrays, device arrays and Tensors are taken. PEFT and loralib have none of this.
"""

import math
from dataclasses import dataclass

import numpy as np

from .. import backend
from ..tensor import Tensor


def _matrix(x, name):
    """x as a float64 matrix on the host, and the machine epsilon of the dtype it came in."""
    x = x.data if isinstance(x, Tensor) else x
    x = backend.move(x, "cpu") if backend.is_array(x) else np.asarray(x, np.float64)
    if x.ndim != 2 or not x.size:
        raise ValueError(f"{name} must be a matrix with two axes and at least one element, got shape {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError(f"{name} holds NaN or Inf")
    return x.astype(np.float64), float(np.finfo(x.dtype).eps if x.dtype.kind == "f" else np.finfo(np.float64).eps)


def _frame(x, name, side):
    """The singular vectors of x on one side that belong to nonzero singular values, as columns, the largest first."""
    if side not in ("right", "left"):
        raise ValueError(f"side {side!r} is unknown: expected 'right' (row space) or 'left' (column space)")
    x, eps = _matrix(x, name)
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    rank = int((s > s[0] * max(x.shape) * eps).sum()) if s[0] > 0 else 0
    return (vt[:rank].T, s) if side == "right" else (u[:, :rank], s)


def _products(a, b, i, j, side):
    """U_iᵀ U_j, after checking that both frames live in one space and have i and j directions."""
    frames = [_frame(x, name, side)[0] for x, name in ((a, "a"), (b, "b"))]
    if len(frames[0]) != len(frames[1]):
        axis = "columns" if side == "right" else "rows"
        raise ValueError(
            f"a and b have {len(frames[0])} and {len(frames[1])} {axis}; their {side} singular vectors share no space"
        )
    for name, letter, n, frame in (("a", "i", i, frames[0]), ("b", "j", j, frames[1])):
        if not 1 <= n <= frame.shape[1]:
            raise ValueError(
                f"{letter} = {n}, expected 1 to {frame.shape[1]}, the rank of {name}: beyond it singular vectors are arbitrary"
            )
    return frames[0][:, :i].T @ frames[1][:, :j]


def similarity(a, b, i, j, side="right"):
    """φ(A, B, i, j) = ‖U_iᵀ U_j‖²_F / min(i, j), U_i and U_j the top i and j singular vectors of A and B.   LoRA eq. 4, §7.2.

    side="right": a (·, k) and b (·, k), row spaces, for A matrices; side="left": a (d, ·) and b (d, ·), column spaces, for B matrices.
    1 if one subspace contains the other, 0 if they are orthogonal. ValueError if i or j exceeds the rank. -> float
    """
    return float(np.square(_products(a, b, i, j, side)).sum() / min(i, j))


def similarity_grid(a, b, i_max, j_max, side="right"):
    """φ(A, B, i, j) for i = 1 … i_max, j = 1 … j_max: one product and two cumulative sums. -> (i_max, j_max) float64.   Figures 3, 4."""
    squares = np.square(_products(a, b, i_max, j_max, side))
    return squares.cumsum(0).cumsum(1) / np.minimum.outer(np.arange(1, i_max + 1), np.arange(1, j_max + 1))


def expected_similarity(i, j, d):
    """E φ = max(i, j) / d for independent random subspaces of R^d: the baseline that φ has to beat, and not 0.

    ‖U_iᵀ U_j‖²_F = tr(P_i P_j), P the projections. If P_i is turned by a uniformly random rotation, its mean is the multiple of the
    identity that has its trace, (i/d) I, so E tr(P_i P_j) = (i/d) tr P_j = i j/d; division by min(i, j) leaves max(i, j)/d.
    """
    if not (1 <= i <= d and 1 <= j <= d):
        raise ValueError(f"i = {i} and j = {j}, expected 1 to d = {d}")
    return max(i, j) / d


def projection_distance(a, b, i, j, side="right"):
    """d = √(p − Σσ²) ∈ [0, √p], σ the singular values of U_iᵀ U_j, p = min(i, j).   Appendix G, after Ham & Lee 2008. -> float"""
    sigma = np.linalg.svd(_products(a, b, i, j, side), compute_uv=False)
    return math.sqrt(max(min(i, j) - float(np.square(sigma).sum()), 0.0))


def similarity_from_distance(distance, p):
    """φ = 1 − d²/p.   Appendix G prints (1/p)(1 − d²), which is φ − (1 − 1/p)."""
    return 1 - distance**2 / p


# -------------------------------------------------------------------------------------------------- the update beside the weight
@dataclass(frozen=True)
class Amplification:
    """What table 7 shows for one layer and one r. All are Frobenius norms, but for `factor`."""

    r: int
    delta_norm: float  # ‖ΔW‖
    w_norm: float  # ‖W‖
    projected: float  # ‖Uᵀ W V‖, U and V of ΔW
    top: float  # ‖Uᵀ W V‖, U and V of W: √(σ₁² + … + σ_r²)
    random: float  # ‖Uᵀ W V‖ expected of random U and V: `expected_projection`
    factor: float  # ‖ΔW‖ / projected


def amplification(delta, w, r):
    """‖ΔW‖_F / ‖Uᵀ W V‖_F, U (d, r) and V (k, r) the top r singular vectors of ΔW.   LoRA §7.3, table 7, appendix H.4.

    delta, w (d, k); the paper writes Uᵀ W Vᵀ, its V having the vectors as rows. r at most the rank of ΔW. -> Amplification
    """
    (w, _), (delta64, _) = _matrix(w, "w"), _matrix(delta, "delta")
    if w.shape != delta64.shape:
        raise ValueError(f"delta has shape {delta64.shape} and w {w.shape}; both must be (d, k)")
    u, v = (_frame(delta, "delta", side)[0] for side in ("left", "right"))
    if not 1 <= r <= u.shape[1]:
        raise ValueError(f"r = {r}, expected 1 to {u.shape[1]}, the rank of delta")
    projected = float(np.linalg.norm(u[:, :r].T @ w @ v[:, :r]))
    sigma, norm = np.linalg.svd(w, compute_uv=False), float(np.linalg.norm(delta64))
    return Amplification(
        r,
        norm,
        float(np.linalg.norm(w)),
        projected,
        float(np.linalg.norm(sigma[:r])),
        expected_projection(w, r),
        norm / projected if projected else math.inf,
    )


def expected_projection(w, r):
    """√E‖Uᵀ W V‖²_F = ‖W‖_F r/√(d k) for random U (d, r) and V (k, r); ‖W‖_F r/d for a square W.   Table 7's column "Random".

    E‖Uᵀ W V‖² = E tr(Wᵀ P_U W P_V) = (r/d)(r/k)‖W‖², by the argument of `expected_similarity` on each side. w (d, k). -> float
    """
    w, _ = _matrix(w, "w")
    if not 1 <= r <= min(w.shape):
        raise ValueError(f"r = {r}, expected 1 to {min(w.shape)}, the smaller side of w")
    return float(np.linalg.norm(w)) * r / math.sqrt(w.shape[0] * w.shape[1])


# ------------------------------------------------------------------------------------------------------------- how many directions
def effective_rank(w, kind="entropy", energy=0.9):
    """How many directions a matrix has, by its singular values σ.

    "entropy"   exp(−Σ p log p), p = σ/Σσ                        Roy & Vetterli 2007
    "stable"    ‖W‖²_F / σ₁² = Σσ²/σ₁²                           Rudelson & Vershynin 2007; never more than the rank
    "energy"    the smallest n with Σ_{i ≤ n} σ_i² ≥ energy·Σσ²  an int: "the rank for 90 % of the variance"
    For r equal singular values the first two are r, and "energy" is ⌈energy·r⌉. A matrix of zeros has 0.
    """
    if kind not in ("entropy", "stable", "energy"):
        raise ValueError(f"effective_rank: kind {kind!r} is unknown: expected 'entropy', 'stable' or 'energy'")
    if not 0 < energy <= 1:
        raise ValueError(f"effective_rank: energy = {energy}, expected 0 < energy <= 1")
    sigma = np.linalg.svd(_matrix(w, "w")[0], compute_uv=False)
    if sigma[0] == 0:
        return 0
    if kind == "entropy":
        p = sigma[sigma > 0] / sigma.sum()
        return float(np.exp(-(p @ np.log(p))))
    squares = np.square(sigma / sigma[0])
    if kind == "stable":
        return float(squares.sum())
    return int(np.searchsorted(squares.cumsum(), energy * squares.sum() * (1 - 1e-12))) + 1


def best_rank_error(w, r):
    """min_{rank X ≤ r} ‖W − X‖²_F = Σ_{i > r} σ_i².   Eckart & Young 1936: what no LoRA of rank r can get below when W is the wanted ΔW."""
    w, _ = _matrix(w, "w")
    if not 0 <= r <= min(w.shape):
        raise ValueError(f"r = {r}, expected 0 to {min(w.shape)}, the smaller side of w")
    return float(np.square(np.linalg.svd(w, compute_uv=False)[r:]).sum())
