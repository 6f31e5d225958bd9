"""Checks of notebook 06, double quantization."""

import numpy as np
from grading import check

from tinylora import codebooks, quantize
from tinylora.kernels.rounding import CUDA
from tinylora.quant import quantize_constants


def _held(size, blocksize):
    """Bytes of a double-quantized tensor: a real one's where an array can hold it."""
    if size <= 1 << 16:
        return quantize(np.zeros(size, np.float32), blocksize=blocksize, double_quant=True).nbytes
    blocks = -(-size // blocksize)
    return -(-size // 2) + blocks + 4 * -(-blocks // 256) + 4


@check("06-1")
def _(answer, rng):
    "The answer's block fits the budget and the next smaller one does not, on real tensors and on sizes that none can have."
    odd, block = int(rng.integers(150, 300)) * 2 + 1, int(rng.integers(5, 20))
    cases = [(1 << 20, (1 << 20) * 9 // 16), (4096, 2113), (odd, _held(odd, block)), (odd, _held(odd, block) - 1)]
    cases += [(size, int(size * rng.uniform(4.2, 6) / 8)) for size in rng.integers(1000, 40_000, 4).tolist()]
    for _ in range(3):  # one byte more or less decides
        size, block = int(10 ** rng.uniform(10, 12)), int(rng.integers(8, 300))
        cases += [(size, _held(size, block)), (size, _held(size, block) - 1)]
    for size, budget in cases:
        got = answer(size, budget)
        assert isinstance(got, (int, np.integer)) and got >= 1, (
            f"For {size:,} weights and {budget:,} bytes expected a block size, 1 or more, and got {got!r}."
        )
        got = int(got)
        held = _held(size, got)
        assert held <= budget, (
            f"{size:,} weights in blocks of {got} hold {held:,} bytes, above the budget of {budget:,}."
        )
        smaller = budget + 1 if got == 1 else _held(size, got - 1)
        assert smaller > budget, (
            f"For {size:,} weights and {budget:,} bytes, blocks smaller than {got} fit as well: {got - 1} holds {smaller:,}."
        )
    for size, budget in ((100, 56), (4096, 2048)):
        got = answer(size, budget)
        assert got is None, (
            f"{size:,} weights in a single block hold {_held(size, size):,} bytes, above {budget:,}: "
            f"expected None, and got {got!r}."
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


@check("06-2")
def _(answer, rng):
    "The prediction against the measured rise, on weights that the answer does not see. The right one is off by 4 % at most."
    for code, size, blocksize, sigma in (
        ("nf4", 1 << 20, 64, 1.0),
        ("fp4", 1 << 19, 32, 0.02),
        ("int4", 1 << 19, 128, 3.0),
    ):
        w = (rng.standard_normal(size) * sigma).astype(np.float32).reshape(-1, blocksize)
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
