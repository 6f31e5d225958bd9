"""Attention in blocks of queries: the same numbers, and a third less work.

    y[rows] = attend(q[rows], k[begin : end], v[begin : end]),      begin … end − 1 = the keys that some query of the block may see

A query sees no key after it, so a block of queries needs no key after its last, and with a sliding window (Mistral) no key further
back than its first query sees. `ops.causal_attention` hands in the equation (`attend`), which is about one block; a block of 64 is
long enough for fast products and short enough to leave a third of a long sequence's products out. Up to 64 queries are one block:
nothing is done but the equation. `unseen` is what the equation adds to the scores of a block.
"""

import numpy as np

from ..backend import array_module

QUERY_BLOCK = 64


def unseen(xp, t, s, window, dtype):
    """0 where query i of the last t sees key j of s, else −∞: it sees s − t + i and what is before it, `window` keys at the most. (t, s)"""
    hidden = xp.triu(xp.full((t, s), -np.inf, dtype=dtype), k=s - t + 1)
    return hidden if window is None else hidden + xp.tril(xp.full((t, s), -np.inf, dtype=dtype), k=s - t - window)


def in_blocks(attend, q, k, v, window=None, block=None):
    """(y, pullback) of attend(q, k, v, window), block by block. q (b, t, heads, d); k, v (b, s, kv_heads, d), s ≥ t."""
    t, s, block = q.shape[1], k.shape[1], block or QUERY_BLOCK
    if t <= block and (window is None or s < t + window):
        return attend(q, k, v, window)
    xp, y, pulls = array_module(q), array_module(q).empty_like(q), []
    shapes, dtype = (q.shape, k.shape, v.shape), q.dtype  # the pullback needs the shapes and not the arrays
    for start in range(0, t, block):
        rows = slice(start, min(start + block, t))
        seen = slice(0 if window is None else max(s - t + start + 1 - window, 0), s - t + rows.stop)
        y[:, rows], pull = attend(q[:, rows], k[:, seen], v[:, seen], window)
        pulls.append((rows, seen, pull))

    def pull_all(g, need):
        gq, gk, gv = (xp.zeros(shape, dtype) if n else None for shape, n in zip(shapes, need, strict=True))
        for rows, seen, pull in pulls:
            dq, dk, dv = pull(g[:, rows], need)
            if need[0]:
                gq[:, rows] = dq
            if need[1]:
                gk[:, seen] += dk
            if need[2]:
                gv[:, seen] += dv
        return gq, gk, gv

    return y, pull_all
