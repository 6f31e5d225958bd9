"""Checks of notebook 07, the QLoRA layer."""

import copy
import gc
import weakref

import numpy as np
from grading import check, peak, there

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


@check("07-2")
def _(answer, rng):
    "The prediction against products of fresh matrices, for codes with and without a correlation between Ŵ and the error."
    n = 160
    coarse = np.array([-1, -0.3, 0.3, 1], np.float32)
    halves = np.array([-0.5, -0.25, 0, 0.25, 0.5], np.float32)  # cuts off what is large
    for codes, depth in (
        (["nf4"], 1),
        (["nf4"], 12),
        ([coarse], 8),
        (["int4", coarse], int(rng.integers(3, 9))),
        ([halves], 4),
        (["nf4", halves], int(rng.integers(2, 7))),
    ):
        pairs, right, wrong = [], np.eye(n), np.eye(n)
        for i in range(depth):
            w = rng.standard_normal((n, n)).astype(np.float32) / np.float32(np.sqrt(n))
            w_hat = quantize(w, codes[i % len(codes)], blocksize=(64, 1024)[i % 2]).dequantize("float32")
            pairs.append((w, w_hat))
            wrong, right = wrong @ w, right @ w_hat
        got, expected = float(answer([(w.copy(), h.copy()) for w, h in pairs])), apart(wrong, right)
        assert np.isfinite(got) and abs(got / expected - 1) < 0.06, (
            f"{depth} layers: predicted {got:.4f}, and the products of the matrices say {expected:.4f} ({got / expected - 1:+.1%})."
        )


def apart(a, b):
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def _dropout(w, masks, runs):
    """f(x, rng) → (y, pullback), tanh(x w) under a mask that is drawn. What it computes is noted in masks, its calls in runs."""

    def f(x, rng):
        hidden = np.tanh(x @ w)
        mask = (rng.random(hidden.shape) >= 0.3) / 0.7
        masks.extend((weakref.ref(hidden), weakref.ref(mask)))
        runs.append(1)
        return hidden * mask, lambda up: (up * mask * (1 - hidden * hidden)) @ w.T

    return f


def _checkpointed(answer, w, x, g, seed):
    """What exercise_3 makes of a function with a mask: y, both x̄, and what became of the rest. None if it returns no pair."""
    masks, runs, rng = [], [], np.random.default_rng(seed)
    found = answer(_dropout(w, masks, runs), x, rng)
    if not (isinstance(found, tuple | list) and len(found) == 2 and callable(found[1])):
        return None
    y, backward = found
    del found
    seen = {"y": np.array(y), "state": copy.deepcopy(rng.bit_generator.state), "runs": len(runs)}
    gc.collect()
    seen["alive"] = any(ref() is not None for ref in masks)
    rng.random(11)  # the next layers draw as well
    seen["passes"] = [
        (np.array(backward(g.copy())), copy.deepcopy(rng.bit_generator.state)) for time in ("first", "second")
    ]
    return seen | {"x": x}


@check("07-3")
def _(answer, rng):
    "Bits, the generator's state, and what is still alive between the two passes."
    for n in (7, int(rng.integers(50, 200))):
        w, x, g = rng.standard_normal((n, n)), rng.standard_normal((3, n)), rng.standard_normal((3, n))
        seed = int(rng.integers(1 << 30))
        theirs = np.random.default_rng(seed)
        y, pullback = _dropout(w, [], [])(x, theirs)
        expected = pullback(g)
        seen = there(answer, _checkpointed, w, x, g, seed)
        assert seen is not None, "exercise_3 should return (y, backward), and backward should be a function of g."
        assert np.array_equal(seen["y"], y), "y is not what f(x, rng) gives; the mask is another one."
        assert seen["state"] == theirs.bit_generator.state, (
            "After the forward pass rng is not in the state in which f(x, rng) leaves it, so the next layer would draw other numbers."
        )
        assert seen["runs"] == 1, f"The forward pass runs f {seen['runs']} times; once is enough."
        assert not seen["alive"], (
            "Between the forward and the backward pass something is alive that f computed on the way, such as its mask."
        )
        theirs.random(11)
        for time, (x_bar, state) in zip(("first", "second"), seen["passes"], strict=True):
            assert np.array_equal(x_bar, expected), (
                f"The {time} call of backward gives another x̄ than f's own pullback; was it run with the same random numbers?"
            )
            assert state == theirs.bit_generator.state, (
                "backward changes the state of rng; whoever draws from it next gets other numbers than without the checkpoint."
            )
        assert np.array_equal(seen["x"], x), "exercise_3 changes x; it should stay as it is."
