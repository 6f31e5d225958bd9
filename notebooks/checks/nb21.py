"""Checks of notebook 21, the same equation on a GPU."""

import numpy as np
from grading import check, there

from tinylora import codebooks, quantize

f32 = np.float32
BOUNDS = codebooks.midpoints(codebooks.nf4())
LANES = np.arange(32)


def _exchanging(seen):
    """The function exchange(v, mask), which writes down the mask and whether the lanes differed before."""

    def exchange(v, mask):
        v = np.asarray(v)
        assert v.shape == (32,), f"exchange(v, mask): v has one number for each of 32 lanes; got shape {v.shape}."
        assert np.ndim(mask) == 0 and 0 < mask < 32, f"exchange(v, mask): mask lies between 1 and 31; got {mask!r}."
        seen.append((int(mask), bool((v != v[0]).any())))
        return v[LANES ^ int(mask)]

    return exchange


def _block(answer, x, bounds):
    seen = []
    return answer(x, bounds, _exchanging(seen)), seen


def _row(answer, x):
    seen = []
    return answer(x, _exchanging(seen)), seen


def _indices(y):
    return (y[..., None] > BOUNDS).sum(axis=-1)


def _where_it_matters(rng):
    """A block for which a quotient x / m gives another index than the product x (1 / m)."""
    while True:
        m = rng.uniform(0.01, 4, (200, 1)).astype(f32)
        x = (m * rng.choice(BOUNDS, (200, 64))).astype(f32)
        x = (x.view(np.int32) + rng.integers(-1, 2, x.shape, dtype=np.int32)).view(f32)
        x[:, :1] = m
        odd = np.flatnonzero((_indices(x / m) != _indices(x * (f32(1) / m))).any(axis=1))
        if len(odd):
            return x[odd[0]][rng.permutation(64)]


def _blocks(rng):
    """(what it is, 64 float32) of blocks, hard ones first."""
    x = rng.standard_normal(64).astype(f32)
    yield "a block of normal weights", x
    largest = -x.copy()
    largest[rng.integers(64)] = -9
    yield "a block whose largest magnitude is negative", largest
    for at in (0, 31, 32, 63):
        x = rng.standard_normal(64).astype(f32) * f32(0.1)
        x[at] = rng.choice([-3, 3])
        yield f"a block whose largest magnitude is weight {at}", x
    yield "a block of zeros", np.zeros(64, f32)
    ties = rng.choice(BOUNDS, 64)
    ties[rng.integers(64)] = 1
    yield "a block of ties (weights at the midpoint between two values)", ties * f32(2.0 ** rng.integers(-20, 20))
    some = rng.standard_normal(64).astype(f32)
    some[rng.permutation(64)[:40]] = 0
    yield "a block with many zeros", some
    yield "a block with magnitudes below 1e-38", rng.standard_normal(64).astype(f32) * f32(1e-39)
    yield "a block with one weight that is not 0", np.where(np.arange(64) == rng.integers(64), f32(-0.3), f32(0))
    yield "a block of weights close to midpoints", _where_it_matters(rng)
    for _ in range(8):
        scale = f32(10.0 ** rng.uniform(-6, 6))
        yield "a block of normal weights", rng.standard_normal(64).astype(f32) * scale


def _five(seen, times, what):
    masks = [mask for mask, _ in seen]
    assert len(masks) == 5 * times, (
        f"{what}: exchange was called {len(masks)} times; with masks of one bit each, {5 * times} calls are needed and enough."
    )


@check("21-1")
def _(answer, rng):
    "Fresh blocks against tl.quantize, bit for bit; the five exchanges are counted."
    for what, x in _blocks(rng):
        q = quantize(x.copy())
        found, seen = there(answer, _block, x.copy(), BOUNDS.copy())
        assert isinstance(found, tuple | list) and len(found) == 2, "exercise_1 should return (packed, absmax)."
        packed, m = np.asarray(found[0]), np.asarray(found[1])
        assert m.shape == (), f"{what}: absmax should be one number, the same in all lanes; its shape is {m.shape}."
        assert packed.shape == (32,), f"{what}: packed should have 32 bytes; its shape is {packed.shape}."
        assert packed.dtype.kind in "iu" and packed.min() >= 0 and packed.max() <= 255, (
            f"{what}: packed should hold whole numbers from 0 to 255; it holds {packed.dtype} from {packed.min()} to {packed.max()}."
        )
        assert float(m) == float(q.absmax[0]), (
            f"{what}: absmax should be {q.absmax[0]!s}, the largest of the 64 magnitudes; it is {m!s}."
        )
        _five(seen, 1, what)
        pairs = np.abs(x.reshape(32, 2)).max(axis=1)
        assert seen[0][1] or (pairs == pairs[0]).all(), (
            f"{what}: before the first exchange all lanes hold the same number, so something else has carried it between them."
        )
        if np.array_equal(packed, q.packed):
            continue
        swapped = (q.packed << 4 | q.packed >> 4).astype(np.uint8)
        assert not np.array_equal(packed, swapped), (
            f"{what}: the halves of the bytes are swapped; the lane's first weight goes into the high half."
        )
        at = int(np.flatnonzero(packed != q.packed)[0])
        said = (
            f"{what}: byte {at} should be {q.packed[at]:#04x} and is {int(packed[at]):#04x}, for the weights {x[2 * at]!s} and "
            f"{x[2 * at + 1]!s} of absmax {m!s}."
        )
        if "ties" in what:
            said += " At a midpoint the lower value is taken: only bounds that are less than y count."
        elif "close" in what:
            said += " y is a product with 1 / m, each rounded to float32; a quotient, or float64, may fall on the other side."
        elif "zeros" in what or "below" in what:
            said += (
                " Here m is smaller than 1e-38, or weights are 0: mind the smallest m, and count the bounds below 0."
            )
        raise AssertionError(said)


def _rms_norm(rows, d):
    x, r = 4 * rows * d, 4 * rows
    sizes = {"x": x, "w": 4 * d, "xx": x, "sum": r, "mean": r, "more": r, "root": r, "rho": r, "xh": x, "y": x}
    steps = [("xx", ("x", "x")), ("sum", ("xx",)), ("mean", ("sum",)), ("more", ("mean",)), ("root", ("more",))]
    steps += [("rho", ("root",)), ("xh", ("x", "rho")), ("y", ("xh", "w"))]
    return (
        f"RMSNorm of {rows} rows of {d}",
        sizes,
        steps,
        ("y", "rho"),
        (28 * rows * d + 40 * rows + 4 * d, 2 * x + 4 * d + r),
    )


def _swiglu(rows, d):
    x = 4 * rows * d
    steps = [("h", ("a",)), ("h", ("h",)), ("h", ("h",)), ("s", ("h",)), ("z", ("a", "s")), ("y", ("z", "b"))]
    return f"SwiGLU of {rows} rows of {d}", dict.fromkeys("abhszy", x), steps, ("y",), (14 * x, 3 * x)


def _random(rng):
    """A chain of random operations, of which some overwrite an argument. Every result is used or wanted."""
    names = [f"x{i}" for i in range(int(rng.integers(1, 4)))]
    steps, unused = [], set()
    for i in range(int(rng.integers(2, 8))):
        arguments = tuple(str(name) for name in rng.choice(names, int(rng.integers(1, 4))))
        unused -= set(arguments)
        result = arguments[0] if rng.random() < 0.3 else f"t{i}"
        steps.append((result, arguments))
        unused.add(result)
        if result not in names:
            names.append(result)
    sizes = {name: 4 * int(rng.integers(1, 1000)) for name in names}
    read, made, chain = {}, set(), 0
    for result, arguments in steps:
        for name in dict.fromkeys(arguments):
            chain += sizes[name]
            if name not in made:
                read[name] = sizes[name]
        made.add(result)
        chain += sizes[result]
    wanted = tuple(sorted(unused))
    return (
        "a chain of random operations",
        sizes,
        steps,
        wanted,
        (chain, sum(read.values()) + sum(sizes[w] for w in wanted)),
    )


@check("21-2")
def _(answer, rng):
    "RMSNorm and SwiGLU for fresh shapes, the example, and random chains."
    example = dict.fromkeys("xsyw", 8), [("s", ("x", "x")), ("y", ("s", "w"))], ("y",), (40, 24)
    cases = [("the example", *example)]
    cases += [make(*map(int, rng.integers(2, 400, 2))) for make in (_rms_norm, _swiglu) for _ in range(3)]
    cases += [_random(rng) for _ in range(20)]
    for what, sizes, operations, wanted, (chain, kernel) in cases:
        found = answer(dict(sizes), list(operations), wanted)
        assert isinstance(found, tuple | list) and len(found) == 2, "exercise_2 should return (chain, kernel)."
        how = f"{what}: {operations}, wanted {wanted}" if len(operations) < 4 else what
        assert found[0] == chain, (
            f"{how}: the chain moves {chain:,} bytes, and the answer says {found[0]:,}. Each operation reads each of its "
            "arguments once, and writes its result."
        )
        assert found[1] == kernel, (
            f"{how}: one kernel moves {kernel:,} bytes, and the answer says {found[1]:,}. It reads each array once that no "
            "operation before has computed, and writes only what is wanted."
        )


@check("21-3")
def _(answer, rng):
    "Rows of all lengths, large numbers, and masked keys; ten exchanges."
    lengths = [200, 64, 32, 33, 31, 5, 1, *rng.integers(2, 200, 5).tolist()]
    for case, length in enumerate(lengths):
        for kind in ("plain", "large", "masked"):
            x = rng.standard_normal(length).astype(f32)
            what = f"a row of {length} numbers"
            if kind == "large":
                x = x + f32(10_000)
                what += " near 10,000"
            elif kind == "masked":
                x[rng.permutation(length)[: int(rng.integers(0, length))]] = -np.inf
                what += f", {int(np.isinf(x).sum())} of them −∞"
            found, seen = there(answer, _row, x.copy())
            found = np.asarray(found)
            assert found.shape == (length,), f"{what}: expected {length} numbers, got the shape {found.shape}."
            e = np.exp((x - x.max()).astype(float))
            right = e / e.sum()
            assert not np.isnan(found).any(), (
                f"{what}: the result holds NaN. Subtract the row's largest number, not a lane's; a lane without numbers holds −∞ for "
                "the maximum, and 0 for the sum."
            )
            off = np.abs(found - right) > 1e-5 * right + 1e-37
            at = int(np.argmax(off))
            assert not off.any(), (
                f"{what}: number {at} should be {right[at]:.7g} and is {found[at]:.7g}; the numbers add up to {found.sum():.7g}."
            )
            if case < 2:
                _five(seen, 2, what)
