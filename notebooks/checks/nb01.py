"""Checks of notebook 01, QLoRA happens."""

from numbers import Integral

import numpy as np
from grading import check, there

import tinylora as tl
from tinylora.nn import Linear, Linear4bit


def _counted(shapes, r, blocksize):
    """(trained numbers, bytes) of layers of these shapes, by building them."""
    trained = stored = 0
    for n_out, n_in in shapes:
        base = Linear4bit.of(Linear(n_in, n_out), blocksize=blocksize)
        trained += sum(p.size for _, p in tl.LoRALinear(base, r=r).trainable())
        stored += base.weight.nbytes
    return trained, stored


def _mistakes(shapes, r, blocksize):
    """{bytes: what was overlooked} of near misses."""
    sizes = [n_out * n_in for n_out, n_in in shapes]
    blocks = [-(-n // blocksize) for n in sizes]
    halves, outer = [-(-n // 2) for n in sizes], [-(-b // 256) for b in blocks]
    total = sum(halves) + sum(blocks) + 4 * sum(outer) + 4 * len(sizes)
    all_blocks = -(-sum(sizes) // blocksize)
    floors = [n // blocksize for n in sizes]
    floats = 4 * len(sizes)  # the offsets
    joined = -(-sum(sizes) // 2) + all_blocks + 4 * -(-all_blocks // 256) + 4
    down = sum(n // 2 for n in sizes) + sum(floors) + 4 * sum(b // 256 for b in floors) + floats
    return {
        sum(halves)
        + 4 * sum(blocks): "That is without double quantization: the largest magnitudes are in 8 bits here.",
        sum(halves): "The blocks' largest magnitudes are missing.",
        sum(halves) + sum(blocks): "What the magnitudes' own bytes are read from is missing: two kinds of float32.",
        total - floats: "The `offset` of each matrix is missing, a float32.",
        total - 4 * sum(outer): "One float32 for each 256 blocks is missing.",
        total - 3 * sum(outer) - 3 * len(sizes): "A float32 has 4 bytes.",
        sum(sizes) + total - sum(halves): "Two weights share a byte.",
        joined: "Each matrix has blocks and an offset of its own; do not join them.",
        down: "What does not come out even is rounded up, not down.",
        total - sum(n % 2 for n in sizes): "With an odd number of weights the last one has a byte for itself.",
        total - 4 * sum(b % 256 > 0 for b in blocks): "A last run of fewer than 256 blocks has a float32 too.",
    }


@check("01-1")
def _(answer, rng):
    some = [[(512, 192)], [(192, 512), (96, 192)], [(33, 65), (128, 128)], [(7, 9)]]
    some += [[tuple(rng.integers(5, 300, 2).tolist()) for _ in range(int(rng.integers(1, 5)))] for _ in range(4)]
    for shapes in some:
        r, blocksize = int(rng.integers(1, 17)), int(rng.choice((16, 32, 64, 128)))
        call = f"exercise_1({shapes}, r={r}, blocksize={blocksize})"
        found, (trained, stored) = answer(shapes, r, blocksize), _counted(shapes, r, blocksize)
        assert isinstance(found, tuple | list) and len(found) == 2, f"{call} should return two ints, not {found!r}."
        for what, value in zip(("first", "second"), found, strict=True):
            assert isinstance(value, Integral), f"{call}: the {what} number should be an int; it is {value!r}."
        full = sum(n_out * n_in for n_out, n_in in shapes)
        why = (
            "Those are all the weights; they are frozen." if found[0] == full else "A is (r × in), and B is (out × r)."
        )
        assert found[0] == trained, f"{call}: {trained:,} numbers are trained, not {found[0]:,}. {why}"
        why = _mistakes(shapes, r, blocksize).get(int(found[1]), "Section 3 lists the four parts of a 4-bit matrix.")
        assert found[1] == stored, f"{call}: the library holds {stored:,} bytes, not {found[1]:,}. {why}"


def _trained(answer, data, starts, leftover, steps, lr):
    """What exercise_2 makes of ½‖X₁ a + X₂ b − y‖², with new X₁, X₂, y (data[i]) for each call of the loss."""
    params = [tl.Tensor(start.copy(), requires_grad=True) for start in starts]
    for p, g in zip(params, leftover, strict=True):
        p.grad = g.copy()
    calls = 0

    def loss():
        nonlocal calls
        x1, x2, y = data[calls % len(data)]
        calls += 1
        residual = x1 @ params[0] + x2 @ params[1] - y
        return (residual * residual).sum() * 0.5

    found = answer(params, loss, steps, lr)
    if not isinstance(found, list | tuple):
        return {"kind": type(found).__name__}
    kinds = [type(value).__name__ for value in found if not isinstance(value, float | np.floating)]
    arrays = [isinstance(p.data, np.ndarray) for p in params]
    return {
        "kind": "list",
        "other": kinds[0] if kinds else "",
        "losses": [] if kinds else [float(value) for value in found],
        "arrays": all(arrays),
        "data": [p.data for p in params] if all(arrays) else [],
        "calls": calls,
    }


def _by_hand(data, starts, leftover, steps, lr, zero="before", sign=-1):
    """(losses, final numbers) of gradient descent.

    zero   when gradients are forgotten: "before" the backward pass, "after" the step, or "never"
    sign   +1 goes uphill
    """
    params, grads, losses = [s.copy() for s in starts], [g.copy() for g in leftover], []
    for x1, x2, y in data[:steps]:
        residual = x1 @ params[0] + x2 @ params[1] - y
        losses.append(0.5 * float((residual * residual).sum()))
        new = [x1.T @ residual, x2.T @ residual]
        grads = new if zero == "before" else [g + n for g, n in zip(grads, new, strict=True)]
        params = [p + sign * lr * g for p, g in zip(params, grads, strict=True)]
        if zero == "after":
            grads = [np.zeros_like(g) for g in grads]
    return losses, params


def _close(found, wanted):
    pairs = zip(found, wanted, strict=True)
    return all(np.shape(f) == np.shape(w) and np.allclose(f, w, rtol=1e-9, atol=1e-12) for f, w in pairs)


@check("01-2")
def _(answer, rng):
    for case in range(4):
        steps, lr = int(rng.integers(3, 8)), float(rng.uniform(0.01, 0.03))
        n, m, rows = (int(k) for k in rng.integers(2, 5, 3))
        data = [tuple(rng.standard_normal((rows, k)) for k in (n, m, 1)) for _ in range(steps + 3)]
        starts = [rng.standard_normal((k, 1)) for k in (n, m)]
        leftover = [rng.standard_normal((k, 1)) if case else np.zeros((k, 1)) for k in (n, m)]
        call = f"exercise_2(params, loss, steps={steps}, lr={lr:.4f})"
        seen = there(answer, _trained, data, starts, leftover, steps, lr)
        assert seen["kind"] == "list", f"{call} should return the list of losses, not {seen['kind']}."
        assert not seen["other"], (
            f"{call}: the list should hold floats, not {seen['other']}. `.item()` makes one of a Tensor."
        )
        assert seen["calls"] == steps, f"{call} calls loss() {seen['calls']} times; {steps} steps need {steps} calls."
        assert seen["arrays"], (
            f"{call}: each .data should stay an array. Subtract `lr * p.grad`, which is an array, from it."
        )

        def is_of(what="data", rate=lr, seen=seen, given=(data, starts, leftover, steps), **options):
            losses, params = _by_hand(*given, rate, **options)
            return _close(seen["data"], params) if what == "data" else _close([seen["losses"]], [losses])

        assert not _close(seen["data"], starts), (
            f"{call} leaves every .data as it was. `p = p - …` gives a new value the name p; change p.data."
        )
        assert not is_of(zero="never"), (
            f"{call}: the gradients of earlier steps are still in .grad, and add up. Set each p.grad to None before backward()."
        )
        assert not is_of(zero="after") or not case, (
            f"{call}: the first step uses a gradient that was left over from before. "
            "Forget gradients before backward(), not after the step."
        )
        assert not is_of(sign=+1), f"{call} goes uphill: the gradient is to be subtracted."
        assert not is_of(rate=1.0), f"{call} does not use lr: subtract lr times the gradient."
        assert is_of(), (
            f"{call}: the final numbers are not those of gradient descent. For each step: forget the gradients, call loss(), call "
            "backward(), then subtract lr times p.grad from the p.data of every p in params."
        )
        assert is_of("losses"), f"{call}: the losses should be those that loss() returned, one a step, in order."
