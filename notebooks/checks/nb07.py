"""Checks of notebook 07, the QLoRA layer."""

import numpy as np
from grading import check, peak

from tinylora import codebooks, quantize


def _layer(rng, n_out, n_in, tokens, **how):
    w, x, g = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((n_out, n_in), (tokens, n_in), (tokens, n_out))
    )
    return quantize(w, **how), x, g


@check("07-1")
def _(answer, rng):
    "Both products against the dense weight, where blocks cross rows and rows cross groups; and the memory of a large one."
    cases = [
        (64, 128, 5, 16, {"double_quant": True}),
        (int(rng.integers(5, 40)), 2 * int(rng.integers(20, 60)) + 64, 3, int(rng.integers(2, 9)), {"double_quant": True}),
        (17, 50, 2, 4, {"blocksize": int(rng.integers(33, 300))}),
        (9, 130, 1, 100, {"code": "fp4"}),
        (6, 22, 4, 1, {"code": codebooks.bof4(16, signed=True), "signed": True, "blocksize": 16}),
    ]  # fmt: skip
    for n_out, n_in, tokens, rows, how in cases:
        q, x, g = _layer(rng, n_out, n_in, tokens, **how)
        found = answer(q, x.copy(), g.copy(), rows)
        assert isinstance(found, tuple | list) and len(found) == 2, "exercise_1 should return the pair (y, x̄)."
        w = q.dequantize("float32").astype(np.float64)
        of = f"A weight of {n_out} × {n_in} in blocks of {q.blocksize}, {rows} rows at a time"
        for name, got, expected in zip(("y", "x̄"), found, (x @ w.T, g @ w), strict=True):
            got = np.asarray(got)
            assert got.shape == expected.shape, f"{of}: {name} has the shape {got.shape}, expected {expected.shape}."
            error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
            assert error < 1e-5, (
                f"{of}: {name} is off by {error:.1e} of its norm. Which block does the first weight of a row belong to, "
                "and which rows of Ŵ does an entry of y need, which an entry of x̄?"
            )
    q, x, g = _layer(rng, 2048, 1024, 4, double_quant=True)
    taken = peak(answer, q, x, g, 16)
    assert taken < q.size, (
        f"For a weight of 2048 × 1024 and 16 rows at a time the call takes {taken:,} bytes at its peak; a quarter of the dense Ŵ is "
        f"{q.size:,}. Something is made for the whole weight."
    )


def _expected(pairs, rng):
    """The mean of ‖P − P̂‖ / ‖P̂‖ over 16 products of all W and of all Ŵ, in random orders.

    A product of L random matrices lies in about n / (L + 1) directions, so ‖P‖² fluctuates by L / n and not by √L / n: one
    quotient of eight NF4 layers of 128 × 128 by 2.2 %. To renumber the neurons between two layers leaves what a layer has by
    itself alone, and makes another product. Of the mean over 16 the standard deviation is 0.6 % in that case, 0.3 % in the others.
    """
    n, found = len(pairs[0][0]), []
    for _ in range(16 if len(pairs) > 1 else 1):
        wrong = right = None
        for i in rng.permutation(len(pairs)):
            renumbered = rng.permutation(n)
            w, w_hat = (part[:, renumbered] for part in pairs[i])
            wrong, right = (w, w_hat) if wrong is None else (wrong @ w, right @ w_hat)
        found.append(np.linalg.norm(wrong - right) / np.linalg.norm(right))
    return float(np.mean(found))


@check("07-2")
def _(answer, rng):
    "The prediction against products of fresh matrices, for codes with and without a correlation between Ŵ and the error."
    n = 128
    coarse = np.array([-1, -0.3, 0.3, 1], np.float32)
    halves = np.array([-0.5, -0.25, 0, 0.25, 0.5], np.float32)  # cuts off what is large
    for codes, depth in (
        ([halves], 1),
        (["nf4"], 8),
        ([coarse], 6),
        ([halves], 4),
        (["int4", coarse], int(rng.integers(3, 9))),
    ):
        pairs = []
        for i in range(depth):
            w = rng.standard_normal((n, n)).astype(np.float32) / np.float32(np.sqrt(n))
            pairs.append((w, quantize(w, codes[i % len(codes)], blocksize=(64, 1024)[i % 2]).dequantize("float32")))
        got, expected = float(answer([(w.copy(), w_hat.copy()) for w, w_hat in pairs])), _expected(pairs, rng)
        assert np.isfinite(got) and abs(got / expected - 1) < 0.04, (
            f"{depth} layer{'s' * (depth > 1)}: predicted {got:.4f}, and the products of the matrices say {expected:.4f} "
            f"({got / expected - 1:+.1%})."
        )
