"""Codes that are solved for: those of least expected error under a criterion. `codebooks` hands them on.

    bof4, af4     4-bit codes for normal weights in blocks of a given size
    lloyd_max     the code of a normal variable that nothing divides

`optimality` does the solving. It needs scipy, and is imported when a code is asked for.
"""

import numpy as np


def expected_max(blocksize):
    """E[M], M the largest of `blocksize` normal magnitudes."""
    from . import optimality

    return optimality.expected_max(blocksize)


def power_of(criterion):
    """The power of the error that a criterion minimizes."""
    if criterion not in ("mse", "mae"):
        raise ValueError(f"criterion {criterion!r} is unknown: expected 'mse' or 'mae'")
    return 2 if criterion == "mse" else 1


def bof4(blocksize=64, criterion="mse", signed=False, dtype=np.float32):
    """BOF4: argmin_q E|W − Ŵ|ᵖ over codes with 0 and ±1 (Blumenberg et al. 2025, 2505.06653, eq. 5 and 7). (16,), ascending.

    blocksize  of normal weights
    criterion  "mse" (p = 2) or "mae" (p = 1), of W itself and not of W/absmax
    signed     BOF4-S: the block is divided by its signed maximum, so 1 must be in the code and −1 need not be; quantize(…, signed=True)
    dtype      float64 gives the solution as found; its theoretical table (table 8) agrees to 2e-6
    """
    from . import optimality

    pins = (0, 1) if signed else (-1, 0, 1)
    return optimality.optimal_code(blocksize, power_of(criterion), pins=pins, signed=signed).astype(dtype)


def af4(blocksize=64, dtype=np.float32):
    """AF4 as released: 2F(q_i) = F(ξ_i) + F(ξ_{i+1}), F of W/absmax, with 0 as a boundary ξ (Yoshida 2023, 2306.06965). (16,), ascending.

    The stated criterion is the least E|X − q(X)| among codes with −1, 0 and 1. The released tables, for blocks of 32 to 4096, obey its
    median condition everywhere but beside 0, where the cells of both neighbours run to 0 itself instead of half-way. With that
    boundary they are reproduced to 5e-9 (dtype=np.float64); the proper optimum is
    optimality.optimal_code(blocksize, 1, of="normalized"), up to 0.045 away.
    """
    from . import optimality

    return optimality.optimal_code(blocksize, 1, of="normalized", zero_cell=False).astype(dtype)


def lloyd_max(levels=16, power=2, dtype=np.float32):
    """argmin_q E|W − q(W)|ᵖ for W ~ N(0, 1), nothing divided: Max 1960 (p = 2: D = 0.0095010 for 16 levels). (levels,) in σ, ascending."""
    from . import optimality

    if not isinstance(levels, (int, np.integer)) or not 2 <= levels <= 256:
        raise ValueError(f"lloyd_max: levels = {levels!r}, expected 2 to 256")
    return optimality.optimal_levels(levels, power).astype(dtype)
