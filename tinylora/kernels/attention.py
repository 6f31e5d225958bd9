"""Attention in blocks of queries: the same numbers, and a third less work.

    y[rows] = attend(q[rows], k[: end], v[: end]),      end = the last key that a query of the block may see

A query sees no key after it, so a block of queries needs no key after its last. `ops.causal_attention` hands in the equation
(`attend`), which is about one block; a block of 64 is long enough for fast products and short enough to leave a third of a long
sequence's products out. Up to 64 queries are one block: nothing is done but the equation.
"""

from ..backend import array_module

QUERY_BLOCK = 64


def in_blocks(attend, q, k, v, block=None):
    """(y, pullback) of attend(q, k, v), block by block. q (b, t, heads, d); k, v (b, s, kv_heads, d), s ≥ t."""
    t, s, block = q.shape[1], k.shape[1], block or QUERY_BLOCK
    if t <= block:
        return attend(q, k, v)
    xp, y, pulls = array_module(q), array_module(q).empty_like(q), []
    shapes, dtype = (q.shape, k.shape, v.shape), q.dtype  # the pullback needs the shapes and not the arrays
    for start in range(0, t, block):
        rows = slice(start, min(start + block, t))
        end = s - t + rows.stop
        y[:, rows], pull = attend(q[:, rows], k[:, :end], v[:, :end])
        pulls.append((rows, end, pull))

    def pull_all(g, need):
        gq, gk, gv = (xp.zeros(shape, dtype) if n else None for shape, n in zip(shapes, need, strict=True))
        for rows, end, pull in pulls:
            dq, dk, dv = pull(g[:, rows], need)
            if need[0]:
                gq[:, rows] = dq
            if need[1]:
                gk[:, :end] += dk
            if need[2]:
                gv[:, :end] += dv
        return gq, gk, gv

    return y, pull_all
