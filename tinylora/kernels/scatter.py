"""The gradient of a table look-up, faster than element by element on the host.

W̄[index[i]] += rows[i]           xp.add.at(W̄, index, rows), the plain way and CuPy's
"""

import numpy as np

from ..backend import array_module


def scatter_add(rows, index, n):
    """W̄[index[i]] += rows[i]: the adjoint of a table look-up. rows (m, d), index (m,) -> (n, d).

    `np.add.at` walks element by element; sorting the index first and adding runs with `reduceat` is about ten times as
    fast and adds in the same order every time. On a GPU the additions are atomic and their order is not fixed: training an embedding
    there is not reproducible to the last bit.
    """
    xp = array_module(rows)
    out = xp.zeros((n, *rows.shape[1:]), dtype=rows.dtype)
    if xp is not np:
        xp.add.at(out, index, rows)
        return out
    if len(index) == 0:
        return out
    order = np.argsort(index, kind="stable")
    ordered = index[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    out[ordered[starts]] = np.add.reduceat(rows[order], starts, axis=0)
    return out
