"""Checks of notebook 03, the bypass."""

import numpy as np
from grading import check, peak

import tinylora as tl
from tinylora import ops
from tinylora.costs import flops
from tinylora.nn import Linear


def _three(found, shapes, call):
    assert isinstance(found, tuple | list) and len(found) == 3, (
        f"{call} should return three arrays; it returned {type(found).__name__}."
    )
    found = [np.asarray(f) for f in found]
    for name, f, shape in zip(("x̄", "Ā", "B̄"), found, shapes, strict=True):
        assert f.shape == shape, (
            f"{call}: {name} should have the shape {shape}, as what it belongs to; it has {f.shape}."
        )
    return found


@check("03-1")
def _(answer, rng):
    for case in range(6):
        tokens, n_in, n_out = (int(n) for n in rng.integers(3, 9, 3))
        n_out += n_out == n_in
        tokens, r, s = (1 if case == 1 else tokens), int(rng.integers(1, 4)), float(rng.uniform(0.2, 3))
        x, W0, A, B, g = (
            rng.standard_normal(shape)
            for shape in ((tokens, n_in), (n_out, n_in), (r, n_in), (n_out, r), (tokens, n_out))
        )
        if case == 2:
            B = np.zeros_like(B)
        given = [v.copy() for v in (x, W0, A, B, g)]
        call = f"With x {x.shape}, A {A.shape}, B {B.shape}{' = 0' if case == 2 else ''} and s = {s:.2f}, exercise_1"
        found = _three(answer(x, W0, A, B, s, g), (x.shape, A.shape, B.shape), call)
        for name, v, before in zip(("x", "W0", "A", "B", "g"), (x, W0, A, B, g), given, strict=True):
            assert (v == before).all(), f"exercise_1 changes its argument {name}; its inputs should stay as they are."

        def loss(x, A, B, W0=W0, s=s, g=g):
            return ((x @ W0.T + s * (x @ A.T) @ B.T) * g).sum()

        for i, name in enumerate(("x̄", "Ā", "B̄")):
            step = [np.zeros_like(v) for v in (x, A, B)]
            step[i] = 1e-5 * rng.standard_normal(step[i].shape)
            plus, minus = (loss(*(v + sign * d for v, d in zip((x, A, B), step, strict=True))) for sign in (1, -1))
            numeric, claimed = (plus - minus) / 2, (found[i] * step[i]).sum()
            size = np.linalg.norm(step[i]) * (np.linalg.norm(g) * max(np.linalg.norm(v) for v in (x, W0, A, B)) + 1)
            assert abs(numeric - claimed) < 1e-6 * max(abs(numeric), 1e-3 * size), (
                f"{call}: along a random direction the loss changes by {numeric:.3e} and {name} says {claimed:.3e}. "
                "Two paths lead from x to h, and the scale is on one of them."
            )
    n = 700
    x, W0, A, B, g = (rng.standard_normal(shape) for shape in ((3, n), (n, n), (2, n), (n, 2), (3, n)))
    taken = peak(answer, x, W0, A, B, 1.5, g)
    assert taken < W0.nbytes // 2, (
        f"With W0 {n} × {n} the call takes {taken:,} bytes, and W0 itself has {W0.nbytes:,}: something as large as W0 is formed. "
        "Which order of the products keeps the rank, or the tokens, on one side of every result?"
    )


def _counted(sizes, tokens, how, r):
    """The multiply-adds of one step of a network that is built. It would not help an answer: most sizes are too large to build."""
    x, layers = tl.Tensor(np.ones((tokens, sizes[0]), np.float32)), []
    for n, m, kind in zip(sizes[:-1], sizes[1:], how, strict=True):
        layer = tl.LoRALinear(Linear(n, m), r=r) if kind == "lora" else Linear(n, m)
        layers.append(layer.requires_grad_(False) if kind == "frozen" else layer)
    with flops.counting() as count:
        layers[1](ops.relu(layers[0](x))).backward(np.ones((tokens, sizes[2]), np.float32))
    return count.multiply_adds


@check("03-2")
def _(answer, rng):
    kinds = ("full", "lora", "frozen")
    for how in ((a, b) for a in kinds for b in kinds if (a, b) != ("frozen", "frozen")):
        for low, high in ((5, 40), (1_000_000, 2_000_000)):
            sizes, tokens = tuple(int(n) for n in rng.integers(low, high, 3)), int(rng.integers(2, 9))
            r, below, made = int(rng.integers(1, 5)), False, 0
            for n, m, kind in zip(sizes[:-1], sizes[1:], how, strict=True):
                layer = {
                    "full": flops.full(n, m, below),
                    "lora": flops.lora(n, r, m, below),
                    "frozen": n * m * (1 + below),
                }
                made, below = made + tokens * layer[kind], below or kind != "frozen"
            if high < 100:
                made = _counted(sizes, tokens, how, r)
            call = f"exercise_2({sizes}, {tokens}, {how}, {r})"
            found = answer(sizes, tokens, how, r)
            assert np.ndim(found) == 0 and found == int(found), f"{call} should be a whole number; it is {found!r}."
            more = "more" if found > made else "less"
            assert found == made, (
                f"{call} is {int(found):,}, which is {abs(int(found) - made):,} {more} than the engine makes. "
                "Ask of each value on the way back whether anything before it, towards x, is trained."
            )
