"""What a code costs, exactly: expected error, usage and entropy under blockwise absmax, and the codes that minimize them.

Weights W₁ … W_I of a block are independent with a symmetric law f; M = max |W_i|; X = W/M is coded by its nearest value q.
With G(m) = P(|W| ≤ m) the block's maximum has

    F_M(m) = G(m)ᴵ,    p_M(m) = 2 I f(m) G(m)ᴵ⁻¹                                 (BOF4, 2505.06653, eq. 11 and 12)

and given M = m one weight is ±m while the other I − 1 follow f cut to [−m, m]. So X has an atom of 1/(2I) at each of ±1
(with signed absmax, one of 1/I at +1), and between them its density, weighted by Mᵏ, is

    g_k(x) = 2(I−1) ∫₀^∞ m^{k+1} f(m) f(m x) G(m)^{I−2} dm.

g₀ decides usage, entropy and errors of X; g₁ the absolute error of W = M·X, and g₂ its squared error:

    E|W − Ŵ|ᵖ = ∫ |x − q(x)|ᵖ g_p(x) dx + E[Mᵖ]/(2I)·(|1 − q(1)|ᵖ + |1 + q(−1)|ᵖ).

Over a cell every inner integral is closed (`distributions`), so one Gauss–Legendre rule in log m is all the quadrature there is. Nothing is
drawn at random. Stated bound, for codes within [−1, 1]: 1e-12 absolute (1e-9 for `StudentT`, nu ≥ 3). `Outlier` has kinks and jumps in its
integrand: 1e-7 for errors, 1e-4 for usage. Tests double the nodes, for blocks of 2 to 2²⁴, and compare with mpmath.

`optimal_code` solves ∂E/∂q = 0 (the centroid condition for p = 2, the median for p = 1; BOF4 eq. 5 and 7) by Newton's method, whose
matrix is tridiagonal; the step is damped, and Lloyd's is taken instead, where Newton's would not lower the error.

This file needs arrays and scipy.special; codes come in as arrays (`codebooks.nf4()`), ascending or not.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil, log

import numpy as np

from .distributions import Normal, Outlier, ScaleMixture, StudentT

_PANEL, _ORDER = 0.1, 20  # width in log m, and Gauss–Legendre nodes within
_FINE = 0.005  # the width for `Outlier`
_NEGLIGIBLE = 1e-18


# ------------------------------------------------------------------------------------------------------- the law of a block
@dataclass(frozen=True)
class Block:
    """The law of a block as sums over nodes m_j of its maximum.

    others (J,)   for a function h:  (1/I) E Σ_{i not the maximum} h(W_i, M) = Σ_j others_j ∫_{−m_j}^{m_j} h(w, m_j) f(w) dw
    maximum (J,)  (1/I) E h(M) = Σ_j maximum_j h(m_j)
    points        (m, w, share): weights of one fixed size |w| < m among the rest, for `Outlier`
    edge          where coding ends: 1 under absmax, ∞ on the whole line
    """

    law: object
    m: np.ndarray
    others: np.ndarray
    maximum: np.ndarray
    points: tuple = ()
    edge: float = 1.0

    def density(self, x, k):
        """g_k(x), without atoms. (…) of x."""
        x = np.asarray(x, np.float64)
        return (self.others * self.m ** (k + 1)) @ self.law.pdf(np.multiply.outer(self.m, x))

    def moments(self, x, k):
        """(3, …): ∫₀ˣ yⁿ g_k(y) dy for n = 0, 1, 2."""
        A = self.law.moments(np.multiply.outer(self.m, np.asarray(x, np.float64)))  # (3, J, …)
        return np.stack([(self.others * self.m ** (k - n)) @ A[n] for n in range(3)])

    def atom(self, k):
        """E[Mᵏ]/I: the weight of the maximum itself."""
        return float(self.maximum @ self.m**k)


def block_law(blocksize, law=Normal(), order=_ORDER):  # noqa: B008 (a frozen dataclass)
    """The law of a block of I weights, as nodes and their shares -> Block. ValueError for a blocksize below 2."""
    if not isinstance(law, (Normal, StudentT, ScaleMixture)):
        raise TypeError(f"expected a law such as distributions.Normal(), got {law!r}")
    return _block_law(_blocksize(blocksize), law, int(order))


@lru_cache(maxsize=256)
def _block_law(I, law, order):
    if isinstance(law, Outlier):
        return _outlier_block(I, law, order)
    lo = _solve_log(lambda m: I * np.log1p(-law.tail(m)) - log(_NEGLIGIBLE))
    hi = _solve_log(lambda m: log(_NEGLIGIBLE) - np.log(I * law.tail(m) * max(m, 1.0) ** 2 + 1e-300))
    m, dm = _nodes(lo, hi, order)
    log_G, f = np.log1p(-law.tail(m)), law.pdf(m)
    return Block(law, m, dm * 2 * (I - 1) * f * np.exp((I - 2) * log_G), dm * 2 * f * np.exp((I - 1) * log_G))


def _outlier_block(I, law, order):
    """One weight is ±k. Either it is the maximum (m = k), or one of the I − 1 normal ones is (m > k), and it lies inside at k/m."""
    base, k = Normal(), law.k
    G = 1 - float(base.tail(k))
    m, dm = _nodes(k, max(12.0, k + 1), order, _FINE)
    log_G, f = np.log1p(-base.tail(m)), base.pdf(m)
    inside = dm * 2 * (I - 1) / I * f * np.exp((I - 2) * log_G)  # (1/I) p_M, the maximum normal
    others = inside * (I - 2) / np.exp(log_G)
    return Block(
        base,
        np.append(m, k),
        np.append(others, (I - 1) / I * G ** (I - 2)),
        np.append(inside, G ** (I - 1) / I),
        (m, k, inside),
    )


def line_law(law=Normal()):  # noqa: B008
    """The law of one weight, not divided by anything, on the whole line -> Block with one node."""
    return Block(_iid(law), np.ones(1), np.ones(1), np.zeros(1), (), np.inf)


def _blocksize(blocksize):
    if not isinstance(blocksize, (int, np.integer)) or blocksize < 2:
        raise ValueError(f"blocksize = {blocksize!r}, expected a whole number, 2 or more")
    return int(blocksize)


def _iid(law):
    """The law itself, if the weights of a block are alike under it."""
    if isinstance(law, Outlier):
        raise ValueError(
            "Outlier: expected a law under which all weights are alike; it serves for errors, usage, entropy and expected_max"
        )
    return law


def _solve_log(g):
    """The m in [1e-20, 1e20] where the increasing function g crosses 0, by bisection in log m; either end if it does not."""
    lo, hi = log(1e-20), log(1e20)
    for _ in range(100):
        middle = (lo + hi) / 2
        lo, hi = (middle, hi) if g(np.exp(middle)) < 0 else (lo, middle)
    return float(np.exp((lo + hi) / 2))


def _nodes(lo, hi, order, panel=_PANEL):
    """Composite Gauss–Legendre in log m: (nodes m, weights for ∫ dm)."""
    panels = max(ceil(log(hi / lo) / panel), 1)
    x, w = np.polynomial.legendre.leggauss(order)
    edges = np.linspace(log(lo), log(hi), panels + 1)
    half = np.diff(edges)[:, None] / 2
    m = np.exp((edges[:-1, None] + half) + half * x).reshape(-1)
    return m, (half * w).reshape(-1) * m


# --------------------------------------------------------------------------------------------------------- the block maximum
def max_cdf(m, blocksize, law=Normal()):  # noqa: B008
    """F_M(m) = P(|W| ≤ m)ᴵ (BOF4 eq. 11). m (…) -> (…)."""
    return np.exp(_blocksize(blocksize) * np.log1p(-_iid(law).tail(m)))


def max_pdf(m, blocksize, law=Normal()):  # noqa: B008
    """p_M(m) = 2 I f(m) P(|W| ≤ m)ᴵ⁻¹ (BOF4 eq. 12). m (…) -> (…)."""
    I = _blocksize(blocksize)
    return 2 * I * _iid(law).pdf(m) * np.exp((I - 1) * np.log1p(-law.tail(m)))


def max_quantile(probability, blocksize, law=Normal()):  # noqa: B008
    """F_M⁻¹(p): the m that the largest magnitude of a block stays below with probability p. -> float"""
    if not 0 < probability < 1:
        raise ValueError(f"max_quantile: probability = {probability}, expected between 0 and 1")
    return _solve_log(lambda m: max_cdf(m, blocksize, law) - probability)


def expected_max(blocksize, power=1, law=Normal()):  # noqa: B008
    """E[Mᵖ] of a block's largest magnitude M, by which QLoRA §3 rescales as if it were one number. -> float"""
    return block_law(blocksize, law).atom(power) * blocksize


# ------------------------------------------------------------------------------------------------------------ cost of a code
def expected_error(code, blocksize, power=2, signed=False, of="weights", law=Normal(), order=_ORDER):  # noqa: B008
    """E|W − Ŵ|ᵖ of a code under blockwise absmax (BOF4 eq. 2 and 3), by quadrature, to 1e-12. -> float

    code       its values, any order; blocksize  I ≥ 2
    power      2: mean squared error, 1: mean absolute error
    signed     divide by the signed maximum (BOF4-S), so that it is always +1
    of         "weights": of W, what a layer feels. "normalized": of X = W/M, which is what AF4 (2306.06965) minimizes
    law        of one weight, see `distributions`; order: Gauss–Legendre nodes a panel, for those who want to double them
    """
    return _error(_values(code), block_law(blocksize, law, order), _power(power), signed, _weighting(of, power))


def distortion(code, power=2, law=Normal()):  # noqa: B008
    """E|W − q(W)|ᵖ where W itself is coded and not W/absmax: Max's (1960) distortion D. -> float"""
    return _error(_values(code), line_law(law), _power(power), False, power)


def usage(code, blocksize, signed=False, law=Normal()):  # noqa: B008
    """P(q(X) = c) for each distinct value c of the code, ascending; QLoRA §3 claims them equal for NF4. (n,) float64, sum 1."""
    q, block = _values(code), block_law(blocksize, law)
    p = np.diff(block.moments(_edges(q, block.edge), 0)[0])
    for position, share in _atoms(block, signed):
        np.add.at(p, _cell(q, position), np.broadcast_to(share, np.shape(position)))
    return p


def entropy(code, blocksize, signed=False, law=Normal()):  # noqa: B008
    """H = −Σ P log₂ P of the code's usage, in bits; 4 would be equal usage of 16 values. -> float"""
    p = usage(code, blocksize, signed, law)
    return float(-(p[p > 0] @ np.log2(p[p > 0]))) + 0.0


def affine_error(blocksize, power=2, levels=16, law=Normal(), order=6):  # noqa: B008
    """E|W − Ŵ|ᵖ of affine integers: `levels` evenly spaced values from a block's minimum to its maximum, both stored exactly. -> float

    The joint density of minimum a and maximum b is I(I−1) f(a) f(b) [F(b) − F(a)]^{I−2}; both are coded without error, and the
    others follow f cut to [a, b]. A double quadrature; an absolute error below 1e-8 at blocks of 8 to 4096 (tests double the nodes).
    """
    I = _blocksize(blocksize)
    _levels(levels, 2)
    hi = _solve_log(lambda m: log(1e-12) - np.log(I * _iid(law).tail(m) + 1e-300))
    x, w = np.polynomial.legendre.leggauss(order)
    end = np.arcsinh(hi)  # nodes in u = arcsinh s, which reach far tails
    edges = np.linspace(-end, end, 2 * ceil(end / 0.1) + 1)
    half = np.diff(edges)[:, None] / 2
    u = ((edges[:-1, None] + half) + half * x).reshape(-1)
    s, ds = np.sinh(u), (half * w).reshape(-1) * np.cosh(u)
    a, b = np.meshgrid(s, s, indexing="ij")
    keep = b > a
    a, b, area = a[keep], b[keep], np.outer(ds, ds)[keep]
    F = law.moments(s)[0] + 0.5
    inside = (F[None, :] - F[:, None])[keep]
    with np.errstate(divide="ignore"):
        density = area * (I - 1) * law.pdf(a) * law.pdf(b) * (I - 2) * np.exp((I - 3) * np.log(inside))
    keep = density > 1e-18
    a, b, density = a[keep], b[keep], density[keep]
    q = a[:, None] + (b - a)[:, None] * np.arange(levels) / (levels - 1)
    cells = np.concatenate([a[:, None], (q[:, 1:] + q[:, :-1]) / 2, b[:, None]], axis=1)
    return float(density @ _cell_errors(law.moments(cells), law.moments(q), q, _power(power)))


def _values(code):
    if isinstance(code, str):
        raise TypeError(f"expected a code's values, such as codebooks.nf4(), and got the name {code!r}")
    q = np.asarray(code, np.float64)
    distinct = np.unique(q)  # fp4 has two zeros
    if q.ndim != 1 or len(distinct) < 2 or not np.isfinite(q).all():
        raise ValueError("a code is a vector of 2 or more distinct finite values")
    return distinct


def _levels(levels, least):
    if not isinstance(levels, (int, np.integer)) or levels < least:
        raise ValueError(f"levels = {levels!r}, expected a whole number, {least} or more")


def _power(power):
    if power not in (1, 2):
        raise ValueError(f"power = {power!r}, expected 1 (absolute error) or 2 (squared error)")
    return power


def _weighting(of, power):
    """k of g_k."""
    if of not in ("weights", "normalized"):
        raise ValueError(f"of = {of!r}, expected 'weights' or 'normalized'")
    return power if of == "weights" else 0


def _edges(q, edge):
    """The ends of the cells: −edge, the midpoints, edge. (n + 1,)"""
    return np.concatenate([[-edge], np.clip((q[1:] + q[:-1]) / 2, -edge, edge), [edge]])


def _cell(q, x):
    """The index of the value nearest to x."""
    return np.searchsorted((q[1:] + q[:-1]) / 2, x)


def _atoms(block, signed, k=0):
    """(positions, shares weighted by Mᵏ) of what lies at a point: the maximum, and an outlier inside a block."""
    share = block.atom(k)
    yield from [(1.0, share)] if signed else [(1.0, share / 2), (-1.0, share / 2)]
    if block.points:
        m, w, inside = block.points
        for sign in (1, -1):
            yield sign * w / m, inside * m**k / 2


def _error(q, block, power, signed, k):
    edges = _edges(q, block.edge)
    total = _cell_errors(block.moments(edges, k), block.moments(np.clip(q, edges[:-1], edges[1:]), k), q, power).sum()
    for x, share in _atoms(block, signed, k) if block.edge == 1 else ():
        total += np.sum(share * np.abs(x - q[_cell(q, x)]) ** power)
    return float(total)


def _cell_errors(at_edges, at_values, q, power):
    """Σ over cells of ∫ |y − q|ᵖ from the moments at the cells' ends and at the values themselves. (…) summed over the last axis."""
    if power == 2:
        mass, first, second = np.diff(at_edges, axis=-1)
        return (second - 2 * q * first + q * q * mass).sum(axis=-1)
    below, above = at_values[:2] - at_edges[:2, ..., :-1], at_edges[:2, ..., 1:] - at_values[:2]
    return (q * below[0] - below[1] + above[1] - q * above[0]).sum(axis=-1)


# ------------------------------------------------------------------------------------------------------------- optimal codes
def optimal_code(
    blocksize,
    power=2,
    pins=(-1, 0, 1),
    signed=False,
    of="weights",
    law=Normal(),  # noqa: B008
    levels=16,
    start=None,
    zero_cell=True,
):
    """argmin_q E|W − Ŵ|ᵖ among codes of `levels` values that contain `pins`: BOF4's criterion (eq. 5 and 7). (levels,) float64, ascending.

    pins       values that stay: (−1, 0, 1) by default, (0, 1) for BOF4-S, None or () for none
    signed, of, law  as in `expected_error`; of="normalized" with power=1 is the criterion that AF4 states
    start      a code to start from, within [−1, 1], which also fixes how many values lie between two pins; by default quantiles of the
               point density g^(1/(1+p)) that many values would have (Panter and Dite 1951), the nearest moved to each pin. With 0
               pinned and 16 values that leaves one more above 0 than below
    zero_cell  False: 0 has no cell of its own, its neighbours' cells meet there. With power=1, of="normalized" this is AF4 as released

    For normal weights, and a given number of values between the pins, the optimum found does not depend on the start (a test tries random
    ones). Other laws can have several stationary codes; the one found is then a local optimum that depends on the start.
    ValueError for pins or a start that do not fit; ArithmeticError if 200 steps do not converge.
    """
    pins = sorted({float(p) for p in pins or ()})
    _levels(levels, max(2, len(pins)))
    if not all(-1 <= p <= 1 for p in pins):
        raise ValueError(f"optimal_code: pins {pins}, expected numbers within [-1, 1]")
    if not zero_cell and 0.0 not in pins:
        raise ValueError("optimal_code: zero_cell=False needs 0 among the pins")
    block, k = block_law(blocksize, _iid(law)), _weighting(of, _power(power))
    if start is None:
        q = _default_start(levels, pins, lambda x: block.density(x, k), 1.0, power)
    else:
        q = np.unique(np.asarray(start, np.float64))
        if len(q) != levels or not set(pins) <= set(q.tolist()) or not (np.abs(q) <= 1).all():
            raise ValueError(
                f"optimal_code: expected a start of {levels} distinct values within [-1, 1] that contain the pins {pins}"
            )
    return _minimize(q, ~np.isin(q, pins), block, power, signed, k, zero_cell)


def optimal_levels(levels, power=2, law=Normal()):  # noqa: B008
    """argmin_q E|W − q(W)|ᵖ on the whole line: Lloyd's and Max's quantizer. (levels,) float64, ascending; ArithmeticError as above."""
    _levels(levels, 2)
    far = _solve_log(lambda m: log(1e-9) - np.log(_iid(law).tail(m) + 1e-300))
    start = _default_start(levels, [], law.pdf, far, _power(power))
    return _minimize(start, np.ones(levels, bool), line_law(law), power, False, power, True)


def _default_start(levels, pins, density, end, power):
    """Quantiles of density^(1/(1+p)) on [−end, end] at (i + ½)/levels; then each pin takes the place of the value nearest to it."""
    u = np.linspace(-np.arcsinh(1e3), np.arcsinh(1e3), 1001)
    x = end * np.sinh(u) / 1e3  # fine near 0
    point_density = density(x) ** (1 / (1 + power))
    share = np.concatenate([[0], np.cumsum((point_density[1:] + point_density[:-1]) / 2 * np.diff(x))])
    q = np.interp((np.arange(levels) + 0.5) / levels, share / share[-1], x)
    q = (q - q[::-1]) / 2  # symmetric to the last bit, as the density is
    taken = np.zeros(levels, bool)
    for i, pin in enumerate(pins):
        room = slice(i, levels - (len(pins) - 1 - i))  # the pins before and after it need places too
        distance = np.where(taken[room], np.inf, np.abs(q[room] - pin))
        nearest = i + int(np.argmin(distance))
        q[nearest], taken[nearest] = pin, True
    if (np.diff(q) <= 0).any():
        raise ValueError(f"optimal_code: the pins {pins} lie too close together for {levels} values; give a start")
    return q


def _minimize(q, free, block, power, signed, k, zero_cell):
    """Newton's method on the free values, damped where a whole step would leave the order or raise the error, else Lloyd's step."""
    q, before = q.copy(), np.inf
    for _ in range(200):
        gradient, hessian, lloyd, error = _derivatives(q, block, power, signed, k, zero_cell)
        move = free & ~((np.abs(q) == block.edge) & (q * gradient <= 0))  # the median may be the atom at ±1 itself
        if not move.any():
            return q
        newton, step, whole = np.zeros_like(q), np.where(move, lloyd - q, 0.0), False
        newton[move] = np.linalg.solve(_positive(hessian[np.ix_(move, move)]), -gradient[move])
        for damping in (1.0, 0.5, 0.25, 0.125):
            new = q + damping * newton
            if _ascending(new, block.edge) and (
                not zero_cell or _error(new, block, power, signed, k) <= error * (1 + 1e-10)
            ):
                step, whole = new - q, damping == 1
                break
        q = q + step
        size = np.abs(step / np.maximum(np.abs(q), 1)).max()
        if size < 1e-13 or (whole and before / 2 < size < 1e-7):  # converged, or down to rounding errors
            values, vectors = np.linalg.eigh(hessian[np.ix_(move, move)])
            if values[0] > -1e-9 * np.abs(values).max():
                return q
            away = np.zeros_like(q)  # a saddle, such as a symmetric code where two lopsided ones are better: leave it
            away[move] = vectors[:, 0]
            q = q + 0.05 * away / np.abs(away / np.gradient(q)).max()
            size = np.inf
        before = size if whole else np.inf
    raise ArithmeticError("optimal_code: no convergence in 200 steps; try another start")


def _positive(H):
    """H with its eigenvalues replaced by their magnitudes, so that Newton's step goes down also where the error is not convex."""
    values, vectors = np.linalg.eigh(H)
    if values[0] > 0:
        return H
    return (vectors * np.maximum(np.abs(values), 1e-6 * np.abs(values).max())) @ vectors.T


def _ascending(q, edge):
    return bool((np.diff(q) > 0).all() and abs(q[0]) <= edge and abs(q[-1]) <= edge)


def _derivatives(q, block, power, signed, k, zero_cell):
    """Half the gradient and half the Hessian of the error (p = 2), or both whole (p = 1); Lloyd's update; the error."""
    edges = _edges(q, block.edge)
    moves = np.full(len(q) - 1, 0.5)  # ∂ boundary / ∂ each of its two values
    if not zero_cell:
        zero = int(np.flatnonzero(q == 0)[0])
        edges[zero : zero + 2], moves[zero - 1 : zero + 1] = 0.0, 0.0
    at_edges, at_values = block.moments(edges, k), block.moments(q, k)
    density = block.density(edges[1:-1], k)
    top = block.atom(k) if block.edge == 1 else 0.0
    top, bottom = (top, 0.0) if signed else (top / 2, top / 2)
    gap = np.diff(q)
    if power == 2:
        mass, first, _ = np.diff(at_edges, axis=1)
        mass[-1], first[-1] = mass[-1] + top, first[-1] + top
        mass[0], first[0] = mass[0] + bottom, first[0] - bottom
        gradient = q * mass - first
        lloyd = np.divide(first, mass, out=q.copy(), where=mass > 0)
        diagonal, beside = mass, -moves * gap / 2 * density  # the boundary lies gap/2 from either value
    else:
        below, above = at_values[0] - at_edges[0, :-1], at_edges[0, 1:] - at_values[0]
        gradient = below - above
        gradient[-1] -= top  # from the left; at 1 itself the atom pulls no further
        gradient[0] += bottom
        own = block.density(q, k)
        low, high = (q + edges[:-1]) / 2, (q + edges[1:]) / 2
        low[0], high[-1] = edges[0], edges[-1]
        lloyd = np.clip(q - gradient / (2 * own), low, high)
        diagonal, beside = 2 * own, -moves * density
    hessian = np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
    hessian[np.arange(len(q) - 1), np.arange(len(q) - 1)] += beside
    hessian[np.arange(1, len(q)), np.arange(1, len(q))] += beside
    return gradient, hessian, lloyd, _error(q, block, power, signed, k)
