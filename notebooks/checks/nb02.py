"""Checks of notebook 02, a small autograd and the bypass."""

import numpy as np
from grading import check, peak, there

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


@check("02-1")
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


class _Net(tl.nn.Module):
    def __init__(self, sizes, how, r):
        self.layers = []
        for n, m, kind in zip(sizes[:-1], sizes[1:], how, strict=True):
            layer = tl.LoRALinear(Linear(n, m), r=r) if kind == "lora" else Linear(n, m)
            self.layers.append(layer.requires_grad_(False) if kind == "frozen" else layer)

    def forward(self, x):
        return self.layers[1](ops.relu(self.layers[0](x)))


@check("02-2")
def _(answer, rng):
    kinds = ("full", "lora", "frozen")
    for how in ((a, b) for a in kinds for b in kinds if (a, b) != ("frozen", "frozen")):
        sizes, tokens = tuple(int(n) for n in rng.integers(5, 40, 3)), int(rng.integers(2, 9))
        r = int(rng.integers(1, 5))
        net = _Net(sizes, how, r)
        with flops.counting() as count:
            net(tl.Tensor(np.ones((tokens, sizes[0]), np.float32))).backward(np.ones((tokens, sizes[2]), np.float32))
        call = f"exercise_2({sizes}, {tokens}, {how}, {r})"
        found = answer(sizes, tokens, how, r)
        assert np.ndim(found) == 0 and found == int(found), f"{call} should be a whole number; it is {found!r}."
        more = "more" if found > count.multiply_adds else "less"
        assert found == count.multiply_adds, (
            f"{call} is {int(found):,}, which is {abs(int(found) - count.multiply_adds):,} {more} than the engine makes. "
            "Ask of each value on the way back whether anything below it is trained."
        )


class _Value:
    """A value without an age."""

    def __init__(self):
        self.parents = []


def _walked(answer, edges, n, g):
    """What exercise_3 makes of a graph of n values: the last is the root, edges [(i, j, factor), …] say that i uses j.

    A dict of the gradients in order (None where one is missing), of how often a pullback was called at most, and of what became of
    the graph. "kind" is the type of what was returned; if it is no dict, that is all.
    """
    values, calls = [_Value() for _ in range(n)], [0] * len(edges)
    for number, (i, j, factor) in enumerate(edges):

        def pull(g, factor=factor, number=number):
            calls[number] += 1
            return g * factor

        values[i].parents.append((values[j], pull))
    parents = [list(v.parents) for v in values]
    found = answer(values[-1], g)
    if not isinstance(found, dict):
        return {"kind": type(found).__name__}
    return {
        "kind": "dict",
        "gradients": [found.get(v) for v in values],
        "calls": max(calls),
        "same graph": [v.parents for v in values] == parents,
        "bare values": all(vars(v).keys() == {"parents"} for v in values),
    }


def _walked_chain(answer, n, g):
    """The same of a chain of n values; None if it is deeper than Python's stack."""
    try:
        return _walked(answer, [(i, i - 1, 1.0) for i in range(1, n)], n, g)
    except RecursionError:
        return None


def _graph(rng, n):
    """The edges of a random graph of n values and one leaf, in an order in which each uses earlier ones."""
    edges = []
    for i in range(1, n):
        chosen = rng.integers(max(0, i - 6), i, int(rng.integers(1, 4))).tolist()
        chosen.append(i - 1)  # so that all are reached
        edges += [(i, chosen[k], float(rng.uniform(-1, 1))) for k in rng.permutation(len(chosen)).tolist()]
    return edges


@check("02-3")
def _(answer, rng):
    small = [(1, 0, 1.0), (1, 0, 1.0), (2, 1, 1.0), (2, 1, 1.0)]
    seen = there(answer, _walked, small, 3, 1.0)
    assert seen["kind"] == "dict", f"exercise_3 should return a dict from values to gradients, not {seen['kind']}."
    for name, found, wanted in zip("cba", seen["gradients"][::-1], (1, 2, 4), strict=True):
        assert found is not None, f"b = a + a; c = b + b: the gradient of {name} is missing from the dict."
        assert found == wanted, (
            f"b = a + a; c = b + b: the gradient of {name} should be {wanted}; it is {found}. "
            "A value's gradient is complete when all that used it have passed theirs on."
        )
    for n in (5, 12, *rng.integers(20, 60, 4).tolist()):
        edges = _graph(rng, n)
        wanted = np.zeros(n)
        wanted[-1] = g = float(rng.uniform(1, 2))
        for i, j, factor in reversed(edges):
            wanted[j] += wanted[i] * factor
        seen = there(answer, _walked, edges, n, g)
        for i, found in enumerate(seen["gradients"]):
            assert found is not None, f"In a random graph of {n} values the gradient of one below the root is missing."
            assert abs(found - wanted[i]) <= 1e-9 * (1 + abs(wanted[i])), (
                f"In a random graph of {n} values a gradient should be {wanted[i]:.6f} and is {found:.6f}. "
                "Paths of different lengths may lead to one value; the longest decides when it is complete."
            )
        most = seen["calls"]
        assert most == 1, f"In a random graph of {n} values a pullback is called {most} times; once is enough."
        assert seen["same graph"], "exercise_3 changes the graph; it should stay as it is."
        assert seen["bare values"], "exercise_3 leaves attributes on the values of the graph."
    seen = there(answer, _walked_chain, 5001, 3.0)
    assert seen is not None, "A chain of 5,000 operations is deeper than Python's stack; walk it with a loop."
    assert seen["gradients"][0] == 3.0, (
        "At the end of a chain of 5,000 operations y = x the gradient should be the root's."
    )
