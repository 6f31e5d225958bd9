"""Checks of notebook 06, double quantization and counting bits."""

import numpy as np
from grading import check

from tinylora import codebooks, quantize
from tinylora.kernels.rounding import CUDA
from tinylora.numerics import optimality
from tinylora.quant import quantize_constants


def _bits(size, blocksize):
    """Bits that a double-quantized tensor holds, from the tensor itself."""
    return 8 * quantize(np.zeros(size, np.float32), blocksize=blocksize, double_quant=True).nbytes


@check("06-1")
def _(answer, rng):
    "The answer's block fits the budget and the next smaller one does not, counted on real tensors."
    odd, block = int(rng.integers(150, 300)) * 2 + 1, int(rng.integers(5, 20))
    cases = [(1 << 20, 4.5), (1 << 20, 4.127), (4096, 4.127)]
    cases += [(odd, (_bits(odd, block) - 2) / odd)]  # the half byte of an odd weight decides
    cases += [(int(rng.integers(1000, 40_000)), float(rng.uniform(4.03, 6))) for _ in range(6)]
    for size, budget in cases:
        got = answer(size, budget)
        assert isinstance(got, (int, np.integer)) and got >= 1, (
            f"For {size:,} weights and {budget:.4f} bits a weight expected a block size, 1 or more, and got {got!r}."
        )
        held = _bits(size, int(got))
        assert held <= budget * size, (
            f"{size:,} weights in blocks of {got} hold {held / size:.5f} bits a weight, above the budget of {budget:.5f}."
        )
        smaller = got == 1 or _bits(size, int(got) - 1)
        assert got == 1 or smaller > budget * size, (
            f"For {size:,} weights and {budget:.5f} bits a weight, blocks smaller than {got} fit as well: "
            f"{got - 1} holds {smaller / size:.5f}."
        )
    for size, budget in ((100, 4.5), (4096, 4.0)):
        got = answer(size, budget)
        assert got is None, (
            f"{size:,} weights in a single block hold {_bits(size, size) / size:.4f} bits a weight, above {budget}: "
            f"expected None, and got {got!r}."
        )


@check("06-2")
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


def _inexact(absmax, rng, code):
    """Constants that are off by a few per cent, in several ways."""
    if code == "nf4":
        for name in ("fp8_e4m3", "fp8_e5m2"):
            yield (
                f"{name} without the mean",
                quantize_constants(absmax, 0.0, codebooks.get_nested(name), CUDA).restore(),
            )
    noise = rng.choice([-0.1, 0.1], len(absmax))
    for name, where in (("10 % off", True), ("10 % off where the scale is large", absmax > np.median(absmax))):
        yield name, np.where(where, absmax * (1 + noise), absmax).astype(np.float32)


@check("06-3")
def _(answer, rng):
    "The prediction against the measured rise, on weights that the answer does not see."
    for code, blocksize, sigma in (("nf4", 64, 1.0), ("fp4", 32, 0.02), ("int4", 128, 3.0)):
        w = (rng.standard_normal((1 << 20) // blocksize * blocksize) * sigma).astype(np.float32).reshape(-1, blocksize)
        w *= np.exp(0.3 * rng.standard_normal((len(w), 1))).astype(np.float32)
        q = quantize(w, code, blocksize)
        w_hat = q.dequantize().astype(np.float64)
        for name, other in _inexact(q.absmax, rng, code):
            changed = w_hat * (other / q.absmax.astype(np.float64))[:, None]
            rise = np.square(w - changed).mean() - np.square(w - w_hat).mean()
            got = float(answer(q, other))
            assert abs(got / rise - 1) < 0.08, (
                f"{code}, blocks of {blocksize}, scales {name}: predicted {got:.4g}, measured {rise:.4g} ({got / rise - 1:+.1%})."
            )


@check("06-4")
def _(answer, rng):
    "The block size that the answer implies has NF4's error, for fresh block sizes and widths."
    for blocksize, s in ((64, 16), (16, 32), (256, 8.125), (int(rng.integers(17, 250)), float(rng.uniform(6, 32)))):
        bits = float(answer(blocksize, s))
        assert bits > 4, f"NF4 in blocks of {blocksize}, s = {s:g}: {bits:g} bits leave nothing for the constants."
        implied = 2 * s / (bits - 4)
        assert 2 <= implied < 1 << 14, (
            f"NF4 in blocks of {blocksize}, s = {s:g}: {bits:.4f} bits would mean affine blocks of {implied:.3g}."
        )
        low = int(implied)
        near = [optimality.affine_error(b) for b in (low, low + 1)]
        cost, expected = (
            np.interp(implied, (low, low + 1), near),
            optimality.expected_error(codebooks.nf4(), blocksize),
        )
        assert abs(cost / expected - 1) < 0.002, (
            f"NF4 in blocks of {blocksize}, s = {s:g}: at {bits:.4f} bits affine int4 has blocks of {implied:.2f} "
            f"and an error of {cost:.6f}, but NF4's is {expected:.6f}."
        )
