"""Checks of notebook 18, Int4 and NF4 at equal bits."""

import functools

import numpy as np
from grading import check

from tinylora import codebooks
from tinylora.numerics import optimality
from tinylora.quant import quantize_constants


@functools.cache
def _affine():
    """{block size: expected squared error of affine int4 on normal weights}."""
    return {b: optimality.affine_error(b) for b in (256, 128, 64, 32, 16)}


@check("18-1")
def _(answer, rng):
    "The block size that the answer implies has NF4's error, for fresh block sizes and widths."
    affine = dict(sorted(_affine().items()))
    sizes, errors = np.log2(list(affine)), list(affine.values())
    for blocksize, s in ((64, 16), (16, 32), (256, 8.125), (int(rng.integers(17, 250)), float(rng.uniform(6, 32)))):
        bits = float(answer(blocksize, s, dict(affine)))
        assert bits > 4, f"NF4 in blocks of {blocksize}, s = {s:g}: {bits:g} bits leave nothing for the constants."
        implied = 2 * s / (bits - 4)
        assert 16 <= implied <= 256, (
            f"NF4 in blocks of {blocksize}, s = {s:g}: {bits:.4f} bits would mean affine blocks of {implied:.4g}; "
            "expected 16 to 256, as in the table."
        )
        cost, expected = (
            np.interp(np.log2(implied), sizes, errors),  # within 0.02 % of the quadrature where the right answers lie
            optimality.expected_error(codebooks.nf4(), blocksize),
        )
        assert abs(cost / expected - 1) < 0.002, (
            f"NF4 in blocks of {blocksize}, s = {s:g}: at {bits:.4f} bits affine int4 has blocks of {implied:.2f} "
            f"and an error of {cost:.6f}, but NF4's is {expected:.6f}."
        )


@check("18-2")
def _(answer, rng):
    "Signs, bytes and magnitudes, for lengths that fill neither a byte nor a block of 256."
    for blocks in (4096, 1, 7, 256, int(rng.integers(257, 2000))):
        m = np.abs(rng.standard_normal((blocks, 64))).max(axis=1).astype(np.float32)
        m *= rng.choice([-1, 1], blocks).astype(np.float32)
        with np.errstate(all="ignore"):  # a single scale is its own mean, and 0/0 follows
            (restored, nbytes), expected = answer(m.copy()), quantize_constants(np.abs(m))
        restored = np.asarray(restored)
        assert restored.shape == m.shape and restored.dtype == np.float32, (
            f"{blocks} scales should come back as {blocks} float32 numbers; "
            f"these have the shape {restored.shape} and the dtype {restored.dtype}."
        )
        wrong = int((np.sign(restored) != np.sign(m)).sum())
        assert wrong == 0, f"{wrong} of {blocks} scales came back with the wrong sign."
        off, least = (np.abs(np.abs(x) - np.abs(m)).max() for x in (restored, expected.restore()))
        assert blocks < 8 or off > 0, "The scales came back without any error, so they were not stored in 8 bits."
        assert off <= 1.5 * least + 1e-6, (
            f"The magnitudes of {blocks} scales come back with an error of up to {off:.4f}; {least:.4f} can be had."
        )
        held = expected.nbytes + -(-blocks // 8)
        assert nbytes == held, (
            f"{blocks} scales: counted {nbytes} bytes, expected {held} (8-bit indices, nested constants, mean, and the signs)."
        )
