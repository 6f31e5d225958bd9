"""Checks of notebook 02, a small autograd."""

import numpy as np
from grading import check, peak, there


class _Value:
    """A value without an age."""

    def __init__(self):
        self.parents = []


def _walked(answer, edges, n, g):
    """What exercise_1 makes of a graph of n values: the last is the root, edges [(i, j, factor), …] say that i uses j.

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


@check("02-1")
def _(answer, rng):
    small = [(1, 0, 1.0), (1, 0, 1.0), (2, 1, 1.0), (2, 1, 1.0)]
    seen = there(answer, _walked, small, 3, 1.0)
    assert seen["kind"] == "dict", f"exercise_1 should return a dict from values to gradients, not {seen['kind']}."
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
        assert seen["same graph"], "exercise_1 changes the graph; it should stay as it is."
        assert seen["bare values"], "exercise_1 leaves attributes on the values of the graph."
    seen = there(answer, _walked_chain, 5001, 3.0)
    assert seen is not None, "A chain of 5,000 operations is deeper than Python's stack; walk it with a loop."
    assert seen["gradients"][0] == 3.0, (
        "At the end of a chain of 5,000 operations y = x the gradient should be the root's."
    )


def _loss(x, g):
    """⟨g, the softmax of each row of x⟩."""
    y = np.exp(x - x.max(axis=1, keepdims=True))
    return float((g * y / y.sum(axis=1, keepdims=True)).sum())


@check("02-2")
def _(answer, rng):
    for case in range(8):
        rows, n = int(rng.integers(2, 7)), 1 if case == 1 else int(rng.integers(2, 12))
        x, g = rng.standard_normal((2, rows, n))
        if case >= 6:  # two columns of about 1,000, and the others of about -1,000, as is all of the first row
            x += np.where((np.arange(n) < 2) & (np.arange(rows) > 0)[:, None], 1000, -1000)
        call = f"For x {x.shape}{' with entries of ±1,000' if case >= 6 else ''}, exercise_2"
        given = x.copy(), g.copy()
        with np.errstate(all="ignore"):
            found = np.asarray(answer(x, g))
        assert (x == given[0]).all() and (g == given[1]).all(), (
            "exercise_2 changes an argument; its inputs should stay as they are."
        )
        assert found.shape == x.shape, f"{call} should return the shape of x, {x.shape}; it returned {found.shape}."
        assert np.isfinite(found).all(), (
            f"{call} returns values that are not finite. e to the 1,000 overflows; what can be subtracted from a row?"
        )
        for _ in range(3):
            step = 1e-5 * rng.standard_normal(x.shape)
            numeric, claimed = (_loss(x + step, g) - _loss(x - step, g)) / 2, (found * step).sum()
            # x + step is rounded to 1e-13 where x is 1,000, which is 1e-8 of a step
            assert abs(numeric - claimed) < 1e-6 * max(abs(numeric), np.linalg.norm(step) * np.linalg.norm(g)), (
                f"{call}: along a random direction the loss changes by {numeric:.3e} and x̄ says {claimed:.3e}. "
                "Every output of a row depends on every input of that row, through the sum in the denominator."
            )
    x, g = rng.standard_normal((2, 2, 1500))
    taken = peak(answer, x, g)
    assert taken < 1500 * 1500 * 2, (
        f"For x {x.shape} the call takes {taken:,} bytes, and x has {x.nbytes:,}: something like a Jacobian is formed. "
        "A pullback needs only the product with it."
    )
