"""Checks of the six steps of build_it.md, on the functions of a my_qlora.py."""

import functools
import itertools
import tracemalloc
import weakref

import finale
import numpy as np
from grading import check, most_bytes, there

from tinylora import codebooks

F = np.float32
NF4 = codebooks.nf4()
MIDDLES = (NF4[:-1].astype(float) + NF4[1:]) / 2


def _array(found, name, shape, dtype):
    """found as an array, if it is one of this shape and dtype."""
    found = np.asarray(found)
    assert found.shape == shape, f"{name} should have the shape {shape}; it has {found.shape}."
    assert found.dtype == dtype, f"{name} should be {np.dtype(dtype)}; it is {found.dtype}."
    return found


def _strictly(mine, name, *args):
    """A call in which 0/0 is an error."""
    with np.errstate(all="raise"):
        return getattr(mine, name)(*args)


def _several(found, count, name):
    """found, if it is a tuple or list of so many."""
    assert isinstance(found, tuple | list) and len(found) == count, (
        f"{name} should return {count} things; it returned {type(found).__name__}{f' of {len(found)}' * hasattr(found, '__len__')}."
    )
    return found


def _apart(found, expected):
    """‖found − expected‖ / ‖expected‖."""
    expected = np.asarray(expected, float)
    return float(np.linalg.norm(np.asarray(found, float) - expected) / (np.linalg.norm(expected) or 1))


def _indices(packed, n):
    """The n indices in packed bytes, the first of a byte in the high half."""
    return np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[:n]


def _near(x, index, what):
    """Assert that each index is that of a value of NF4 as near to x as any, up to a rounding."""
    distance = np.abs(x.astype(float).reshape(-1, 1) - NF4.astype(float))
    chosen, best = distance[np.arange(x.size), index.reshape(-1)], distance.min(axis=1)
    wrong = np.flatnonzero(chosen > best + 1e-6)
    if len(wrong):
        pairs, right = (
            index.reshape(-1)[: x.size // 2 * 2].reshape(-1, 2),
            np.searchsorted(MIDDLES, x.reshape(-1)[: x.size // 2 * 2]),
        )
        if x.size > 3 and (pairs[:, ::-1].reshape(-1) == right).mean() > 0.99:
            raise AssertionError(f"{what}: the two halves of each byte are swapped; the even element is the high one.")
        i = wrong[0]
        raise AssertionError(
            f"{what}: {len(wrong)} of {x.size} indices are not those of the nearest value; the first is element {i}: "
            f"{x.reshape(-1)[i]:.5f} has index {index.reshape(-1)[i]} ({NF4[index.reshape(-1)[i]]:.5f}), and index "
            f"{distance[i].argmin()} ({NF4[distance[i].argmin()]:.5f}) is nearer."
        )


# --- step 1


@check("my-1", "warm-up: the nearest value", without="*")
def _(mine, rng):
    assert _array(mine.nearest(NF4.copy()), "nearest(NF4)", (16,), np.uint8).tolist() == list(range(16)), (
        "nearest of the 16 values themselves should be 0 … 15."
    )
    x = rng.uniform(-1, 1, (7, int(rng.integers(3, 30)))).astype(F)
    _near(x, _array(mine.nearest(x.copy()), "nearest(x)", x.shape, np.uint8), "Random x between −1 and 1")


def _quantized(mine, w, blocksize, strict=False):
    """(indices, absmax in float64 for each element) of what mine.quantize makes of w, after the shapes are checked."""
    what = f"quantize(w of shape {w.shape}, blocksize {blocksize})"
    found = there(mine, _strictly, "quantize", w.copy(), blocksize) if strict else mine.quantize(w.copy(), blocksize)
    packed, absmax = _several(found, 2, what)
    packed = _array(packed, f"{what}: packed", (-(-w.size // 2),), np.uint8)
    absmax = _array(absmax, f"{what}: absmax", (-(-w.size // blocksize),), F)
    flat = w.reshape(-1)
    largest = [np.abs(flat[i : i + blocksize]).max() for i in range(0, w.size, blocksize)]
    for b, (found, expected) in enumerate(zip(absmax, largest, strict=True)):
        assert found == expected, (
            f"{what}: the largest magnitude of block {b} is {expected:.6g}, and absmax[{b}] is {found:.6g}."
        )
    return _indices(packed, w.size), np.repeat(absmax, blocksize)[: w.size], what


@check("my-1", "whole blocks", points=2, without="*")
def _(mine, rng):
    for shape, blocksize in (((4, 64), 64), ((2 * int(rng.integers(1, 9)), 96), 32)):
        w = (rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 3)).astype(F)
        index, absmax, what = _quantized(mine, w, blocksize)
        _near(w.reshape(-1) / absmax, index, what)


@check("my-1", "a partial block, an odd number of weights, a block of zeros", points=2, without="*")
def _(mine, rng):
    for shape, blocksize in (
        ((5, 133), 64),
        ((int(rng.integers(1, 30)) * 2 + 1,), 16),
        ((1,), 64),
        ((3, 5, 7), int(rng.integers(2, 99))),
    ):
        w = rng.standard_normal(shape).astype(F)
        w.reshape(-1)[:blocksize] *= w.size > blocksize  # zeros in the first block, if there are others
        index, absmax, what = _quantized(mine, w, blocksize)
        zero = absmax == 0
        assert (index[zero] == 7).all(), f"{what}: in a block of zeros each index should be 7, that of the value 0."
        _near(w.reshape(-1)[~zero] / absmax[~zero], index[~zero], what)
    _quantized(mine, np.zeros((3, 64), F), 64, strict=True)


@check("my-1", "back again", without="*")
def _(mine, rng):
    for shape, blocksize in (((6, 64), 64), ((5, 27), 32), ((3, 4, 11), int(rng.integers(2, 99)))):
        n = int(np.prod(shape))
        index, absmax = rng.integers(0, 16, n + n % 2).astype(np.uint8), rng.uniform(0, 5, -(-n // blocksize)).astype(F)
        what = f"dequantize(…, {shape}, blocksize {blocksize})"
        found = _array(mine.dequantize(index[0::2] << 4 | index[1::2], absmax, shape, blocksize), what, shape, F)
        expected = (NF4[index[:n]] * np.repeat(absmax, blocksize)[:n]).reshape(shape)
        wrong = np.flatnonzero(np.abs(found - expected) > 1e-6 * absmax.max())
        assert len(wrong) == 0, (
            f"{what}: {len(wrong)} of {n} weights are wrong; the first is element {wrong[0]}, in block {wrong[0] // blocksize}: "
            f"{found.reshape(-1)[wrong[0]]:.5f} instead of {expected.reshape(-1)[wrong[0]]:.5f}."
        )


def _most(mine, w):
    """The most bytes that quantize takes at once, and the bytes that it packs."""
    packed, _ = mine.quantize(w)
    return most_bytes(mine.quantize, w), packed.nbytes


@check("my-1", "memory: no table of all distances", without="*")
def _(mine, rng):
    w = rng.standard_normal((256, 1024)).astype(F)
    taken, packed = there(mine, _most, w)
    assert packed == w.size // 2, (
        f"quantize packs {w.size:,} weights into {packed:,} bytes; two share one, so there should be {w.size // 2:,}."
    )
    assert taken < 48 * w.size, (
        f"quantize takes {taken / w.size:.0f} bytes for each weight at its peak, and 48 are allowed. The distances to all 16 values "
        "are 64 bytes for each weight. The values are sorted: which boundaries does x lie between?"
    )


# --- step 2


def _constants(rng, n):
    return np.abs(rng.standard_normal((n, 64))).max(axis=1).astype(F) * F(0.02)


def _doubled(mine, absmax, what):
    """(codes, nested, mean) of double_quantize, after shapes and dtypes are checked."""
    codes, nested, mean = _several(mine.double_quantize(absmax.copy()), 3, what)
    groups = -(-absmax.size // 256)
    return (
        _array(codes, f"{what}: codes", absmax.shape, np.int8),
        _array(nested, f"{what}: nested", (groups,), F),
        float(mean),
    )


@check("my-2", "warm-up: around the mean, in 8 bits", points=2, without="*")
def _(mine, rng):
    for n in (512, 256 * int(rng.integers(1, 5))):
        absmax = _constants(rng, n)
        what = f"double_quantize({n} constants)"
        codes, nested, mean = _doubled(mine, absmax, what)
        assert abs(mean - absmax.mean(dtype=float)) < 1e-6 * absmax.mean(), (
            f"{what}: the mean is {absmax.mean():.6f}, not {mean:.6f}."
        )
        off = (absmax - absmax.mean(dtype=F)).reshape(-1, 256)
        largest = np.abs(off).max(axis=1)
        assert np.abs(nested / largest - 1).max() < 1e-4, (
            f"{what}: nested[0] should be the largest |absmax − mean| of the first 256, {largest[0]:.6f}; it is {nested[0]:.6f}."
        )
        worst = np.abs(codes.reshape(-1, 256) - 127 * off / largest[:, None]).max()
        hint = (
            "Is it cut instead?" if worst < 2 else "An int8 holds −128 to 127, and 128 wraps around: is the factor 127?"
        )
        assert worst < 0.51, (
            f"{what}: a code is {worst:.2f} from 127 (absmax − mean) / nested; rounded it is within 0.5. {hint}"
        )


@check("my-2", "restored", without="*")
def _(mine, rng):
    codes, nested = rng.integers(-127, 128, 600).astype(np.int8), rng.uniform(0.1, 1, 3).astype(F)
    found = _array(mine.restore(codes, nested, F(2)), "restore(codes, nested, mean)", (600,), F)
    expected = codes / 127 * np.repeat(nested, 256)[:600] + 2
    assert np.abs(found - expected).max() < 1e-5, (
        f"restore is off by {np.abs(found - expected).max():.4f}: a code k of group j stands for k/127 · nested[j] + mean."
    )


@check("my-2", "a partial group, and constants that are all alike", without="*")
def _(mine, rng):
    for absmax in (
        _constants(rng, int(rng.integers(2, 255))),
        _constants(rng, 700),
        np.full(300, F(0.5)),
        np.ones(1, F),
    ):
        what = f"double_quantize({absmax.size} constants{', all alike' if np.ptp(absmax) == 0 else ''})"
        codes, nested, mean = _doubled(mine, absmax, what)
        back = _array(mine.restore(codes, nested, F(mean)), f"restore({absmax.size} codes)", absmax.shape, F)
        error, allowed = np.abs(back - absmax).max(), np.ptp(absmax) / 127 + 1e-6
        assert error <= allowed, (
            f"{what}: a constant comes back {error:.5f} off, and half a step is {allowed / 2:.5f} at most."
        )


@check("my-2", "memory: 4.127 bits a weight", without="*")
def _(mine, rng):
    w = rng.standard_normal((512, 1024)).astype(F)
    stored = mine.store(w)
    assert isinstance(stored, dict) and {"shape", "packed", "codes", "nested", "mean"} <= stored.keys(), (
        'store(w) should return a dict of "shape", "packed", "codes", "nested" and "mean".'
    )
    error = _apart(mine.rebuild(stored), w)
    assert error < 0.13, (
        f"What store keeps stands for a weight that is {error:.1%} of ‖w‖ away, so its size says nothing."
    )
    held = sum(np.asarray(part).nbytes for name, part in stored.items() if name != "shape")
    bits, expected = 8 * held / w.size, 4 + 8 / 64 + 32 / (64 * 256)
    assert bits <= expected + 1e-3, (
        f"What store keeps of 512 × 1024 weights takes {bits:.4f} bits a weight; {expected:.4f} are enough. "
        + ", ".join(
            f"{name}: {8 * np.asarray(part).nbytes / w.size:.4f}" for name, part in stored.items() if name != "shape"
        )
        + "."
    )


@check("my-2", "the weight that it stands for", without="*")
def _(mine, rng):
    for shape in ((64, 256), (int(rng.integers(3, 40)), int(rng.integers(10, 90)))):
        w = (0.02 * rng.standard_normal(shape)).astype(F)
        found = _array(mine.rebuild(mine.store(w.copy())), "rebuild(store(w))", shape, F)
        error = _apart(found, w)
        assert error < 0.13, (
            f"rebuild(store(w)) is {error:.1%} of ‖w‖ away from w, of shape {shape}; NF4's own error is about 9 %."
        )


# --- step 3


def _layer(mine, rng, n_out=None, n_in=None, r=None):
    """(layer, Ŵ) of a random weight, its B not 0."""
    n_out, n_in = n_out or int(rng.integers(8, 60)), n_in or int(rng.integers(8, 60))
    r = r or int(rng.integers(1, 8))
    layer = mine.new_layer(
        rng.standard_normal((n_out, n_in)).astype(F),
        r,
        float(rng.uniform(1, 20)),
        np.random.default_rng(int(rng.integers(1 << 30))),
    )
    assert isinstance(layer, dict) and {"stored", "A", "B", "s"} <= layer.keys(), (
        'new_layer should return a dict of "stored", "A", "B" and "s".'
    )
    layer = layer | {"B": rng.standard_normal((n_out, r)).astype(F)}
    return layer, np.asarray(mine.rebuild(layer["stored"]), float)


@check("my-3", "warm-up: a new layer", without="*")
def _(mine, rng):
    n_out, n_in, r, alpha = 24, 100, 16, float(rng.uniform(1, 40))
    w, seed = rng.standard_normal((n_out, n_in)).astype(F), int(rng.integers(1 << 30))
    layer = mine.new_layer(w, r, alpha, np.random.default_rng(seed))
    assert isinstance(layer, dict) and {"stored", "A", "B", "s"} <= layer.keys(), (
        'new_layer should return a dict of "stored", "A", "B" and "s".'
    )
    A, B = _array(layer["A"], "A", (r, n_in), F), _array(layer["B"], "B", (n_out, r), F)
    assert not B.any(), "B should be 0 at the start, so that the layer computes what its weight does."
    assert np.abs(A).max() <= n_in**-0.5 * (1 + 1e-6) and abs(A.var() * 3 * n_in - 1) < 0.25, (
        f"A should be uniform between ±1/√{n_in} = ±0.1; it lies between {A.min():.3f} and {A.max():.3f}, with a variance of {A.var():.5f} "
        f"where 1/300 = 0.00333 is expected."
    )
    same, other = (mine.new_layer(w, r, alpha, np.random.default_rng(seed + i))["A"] for i in (0, 1))
    assert (same == A).all() and (other != A).any(), (
        "A should be drawn from rng: the same for one seed, and another for another."
    )
    assert abs(float(layer["s"]) - alpha / r) < 1e-6, (
        f"s should be alpha / r = {alpha / r:.4f}; it is {float(layer['s']):.4f}."
    )


@check("my-3", "forward", points=2, without="*")
def _(mine, rng):
    for _ in range(3):
        layer, w = _layer(mine, rng)
        x = rng.standard_normal((int(rng.integers(1, 9)), w.shape[1])).astype(F)
        y, _ = _several(mine.forward(layer, x.copy()), 2, "forward(layer, x)")
        frozen, bypass = x @ w.T, x.astype(float) @ layer["A"].T @ layer["B"].T
        y = _array(y, "y", frozen.shape, F)
        known = {
            "the bypass is missing": frozen,
            "the scale s is missing": frozen + bypass,
            "the frozen weight is missing": layer["s"] * bypass,
        }
        hint = next((f": {what}" for what, wrong in known.items() if _apart(y, wrong) < 1e-4), "")
        error = _apart(y, frozen + layer["s"] * bypass)
        assert error < 1e-4, f"y is {error:.1%} of its norm away from x Ŵᵀ + s (x Aᵀ) Bᵀ{hint}."


@check("my-3", "backward", points=3, without="*")
def _(mine, rng):
    for _ in range(3):
        layer, w = _layer(mine, rng)
        tokens, s = int(rng.integers(1, 9)), float(layer["s"])
        x, g = rng.standard_normal((tokens, w.shape[1])).astype(F), rng.standard_normal((tokens, len(w))).astype(F)
        _, saved = _several(mine.forward(layer, x.copy()), 2, "forward(layer, x)")
        found = _several(mine.backward(layer, saved, g.copy()), 3, "backward(layer, saved, g)")
        A, B = layer["A"].astype(float), layer["B"].astype(float)
        G = g.T.astype(float) @ x
        expected = {
            "x̄": (g @ w + s * (g @ B @ A), "ḡ Ŵ + s (ḡ B) A"),
            "Ā": (s * B.T @ G, "s (ḡ B)ᵀ x"),
            "B̄": (s * G @ A.T, "s ḡᵀ (x Aᵀ)"),
        }
        for (name, (right, formula)), got in zip(expected.items(), found, strict=True):
            got = _array(got, name, right.shape, F)
            error = _apart(got, right)
            hint = " The scale s is missing." if name != "x̄" and _apart(got, right / s) < 1e-4 else ""
            hint = (
                " The part that goes through the bypass is missing."
                if name == "x̄" and _apart(got, g @ w) < 1e-4
                else hint
            )
            assert error < 1e-4, (
                f"{name} is {error:.1%} of its norm away from {formula}, what the chain rule gives.{hint}"
            )


def _held(mine, w, tokens):
    """(bytes in `saved` that the layer does not hold itself, whether some are float64, bytes alive after forward beside y).

    The bytes alive are the median of three layers with weights of their own, each called twice: another thread may take memory meanwhile.
    """
    x = np.ones((tokens, w.shape[1]), F)
    layers, found = [mine.new_layer(np.roll(w, i, axis=0), 4, 8.0, np.random.default_rng(0)) for i in range(4)], []
    mine.forward(layers[0], x)  # what is made once
    for layer in layers[1:]:
        tracemalloc.start()
        for _ in range(2):
            y, saved = mine.forward(layer, x)
        found.append(tracemalloc.get_traced_memory()[0] - y.nbytes)
        tracemalloc.stop()
    own = [layer["A"], layer["B"], *(part for part in layer["stored"].values() if isinstance(part, np.ndarray))]
    kept = [
        one
        for one in saved
        if isinstance(one, np.ndarray) and one.ndim and not any(np.may_share_memory(one, part) for part in own)
    ]
    right = np.allclose(y, x @ mine.rebuild(layer["stored"]).T, atol=1e-3)
    return sum(one.nbytes for one in kept), any(one.dtype == np.float64 for one in kept), sorted(found)[1], right


@check("my-3", "memory: what is kept for the way back", points=2, without="*")
def _(mine, rng):
    w, tokens = rng.standard_normal((400, 300)).astype(F), 5
    kept, double, alive, right = there(mine, _held, w, tokens)
    assert right, "With B = 0 y should be x Ŵᵀ; it is not, so what is kept says nothing."
    allowed = 4 * tokens * (300 + 4)
    hint = (
        "Some of it is float64: are A, B and s float32?"
        if double
        else f"Ŵ in float32 has {w.nbytes:,}: it can be rebuilt."
    )
    assert kept <= allowed, (
        f"`saved` holds {kept:,} bytes for 5 tokens and a weight of 400 × 300; x and x Aᵀ have {allowed:,}. {hint}"
    )
    assert alive < w.nbytes // 4, (
        f"Between forward and backward {alive:,} bytes are alive that forward made, beside y. Ŵ has {w.nbytes:,}: is it kept somewhere?"
    )


# --- step 4


def _adamw(p, g, m, v, t, lr, decay, kind=""):
    """AdamW in float64; a `kind` is a mistake."""
    g = g + decay * p * (kind == "coupled")
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
    first = 1 if kind in ("uncorrected", "m") else 1 - 0.9**t
    second = 1 if kind in ("uncorrected", "v") else 1 - 0.999**t
    root = np.sqrt(v / second + 1e-8) if kind == "inside" else np.sqrt(v / second) + 1e-8
    shrink = {"coupled": 1, "undecayed": 1, "unscaled": 1 - decay}.get(kind, 1 - lr * decay)
    return p * shrink - lr * m / first / root, m, v


MISTAKES = {
    "uncorrected": "m and v are not divided by 1 − βᵗ",
    "m": "m is not divided by 1 − β₁ᵗ",
    "v": "v is not divided by 1 − β₂ᵗ",
    "inside": "ε stands inside the root",
    "coupled": "the decay is added to the gradient, as in Adam with L2; AdamW takes it from p itself",
    "undecayed": "the weight decay is missing",
    "unscaled": "the weight decay is not multiplied by lr",
}


@check("my-4", "warm-up: AdamW", points=3, without="*")
def _(mine, rng):
    n, lr, decay = int(rng.integers(30, 80)), float(rng.uniform(0.01, 0.1)), float(rng.uniform(0.05, 0.5))
    p, m, v = rng.standard_normal(n).astype(F), np.zeros(n, F), np.zeros(n, F)
    exact = {kind: (p.astype(float), np.zeros(n), np.zeros(n)) for kind in ("", *MISTAKES)}
    wrong, apart = None, dict.fromkeys(MISTAKES, 0.0)  # the first array that is off; how far p is from each mistake's
    for t in range(1, 6):
        g = (rng.standard_normal(n) * 10.0 ** rng.uniform(-5, 0, n)).astype(F)
        before = {"m": m.copy(), "v": v.copy(), "p": p.copy()}
        mine.adamw(p, g.copy(), m, v, t, lr, weight_decay=decay)
        exact = {kind: _adamw(*one[:1], g.astype(float), *one[1:], t, lr, decay, kind) for kind, one in exact.items()}
        assert p.dtype == F, f"p should stay float32; it is {p.dtype}."
        for name, found, right in (("m", m, exact[""][1]), ("v", v, exact[""][2]), ("p", p, exact[""][0])):
            error = np.abs(found - right).max() / np.abs(right).max()
            same = " It did not change; it should be changed in place." * bool((found == before[name]).all())
            if wrong is None and not error < 1e-5:
                wrong = f"After step {t} {name} is off by {error:.1e} of its largest element", same
        scale = np.abs(exact[""][0]).max()
        apart = {kind: np.maximum(far, np.abs(p - exact[kind][0]).max() / scale) for kind, far in apart.items()}
    # After one step some mistakes look alike: of g + λp Adam's first step keeps little but the sign.
    kind = min(apart, key=apart.get)
    hint = f": {MISTAKES[kind]}" if apart[kind] < 1e-5 else ""
    assert wrong is None, f"{wrong[0]}{hint}.{wrong[1]}"


def _paged(mine, p, gradients, page, budget):
    """What paged_adamw makes of p, and adamw, and how the memory was used."""
    n, memory = len(p), finale.Memory(budget)
    own, plain = (p.copy(), np.zeros(n, F), np.zeros(n, F)), (p.copy(), np.zeros(n, F), np.zeros(n, F))
    for t, g in enumerate(gradients, 1):
        mine.paged_adamw(own[0], g, own[1], own[2], t, 0.01, memory, page, weight_decay=0.1)
        mine.adamw(plain[0], g, plain[1], plain[2], t, 0.01, weight_decay=0.1)
    return {"own": own, "plain": plain, "moved": memory.moved, "held": memory.held, "most": memory.most}


def _pages(mine, rng):
    page = int(rng.integers(5, 20))
    n = page * int(rng.integers(3, 9)) + int(rng.integers(1, page))
    gradients = [rng.standard_normal(n).astype(F) for _ in range(3)]
    return page, n, there(mine, _paged, rng.standard_normal(n).astype(F), gradients, page, 8 * page)


@check("my-4", "paged: the same bits", points=2, without="*")
def _(mine, rng):
    page, n, seen = _pages(mine, rng)
    assert any(seen["plain"][1]), "adamw leaves m as it was, so there is nothing to compare with."
    for name, own, plain in zip(("p", "m", "v"), seen["own"], seen["plain"], strict=True):
        wrong = np.flatnonzero(own != plain)
        assert len(wrong) == 0, (
            f"{n} elements in pages of {page}: {len(wrong)} of {name} differ from those of adamw on the whole, the first at {wrong[0]}. "
            "No element depends on another, so the bits must be the same."
        )


@check("my-4", "memory: two pages at a time, each in once and out once", points=2, without="*")
def _(mine, rng):
    _, n, seen = _pages(mine, rng)
    assert seen["held"] == 0, (
        f"After the step {seen['held']} bytes are still in the fast memory; each page should be put back."
    )
    state = 3 * 2 * 8 * n
    assert seen["moved"] == state, (
        f"In 3 steps of {n} elements {seen['moved']:,} bytes moved. m and v have {8 * n:,}, each in and out once a step: {state:,}. "
        + ("Did m and v go through memory.fetch?" if seen["moved"] < state else "Some page goes in twice.")
    )


# --- step 5


class _Parameter:
    def __init__(self, data):
        self.data, self.grad = data, None


class _Loss:
    """½ mean (x W + b − y)², whose backward adds to the gradients."""

    def __init__(self, parameters, x, y):
        self.parameters, self.x = parameters, x
        self.off = x @ parameters[0].data + parameters[1].data - y

    def item(self):
        return float((self.off**2).mean() / 2)

    def backward(self):
        g = self.off / F(self.off.size)
        for p, new in zip(self.parameters, (self.x.T @ g, g.sum(axis=0)), strict=True):
            p.grad = new if p.grad is None else p.grad + new


def _trained(mine, W, b, batches, lr, max_norm):
    """What train makes of a small linear model: losses, parameters, the most losses alive, what the memory saw."""
    parameters, alive, most = [_Parameter(W.copy()), _Parameter(b.copy())], [], []
    data, memory = [p.data for p in parameters], finale.Memory(8 * 4)

    def loss_of(batch):
        most.append(sum(one() is not None for one in alive))
        loss = _Loss(parameters, *batch)
        alive.append(weakref.ref(loss))
        return loss

    losses = mine.train(parameters, loss_of, batches, lr, max_norm, memory, 4)
    if isinstance(losses, list):  # what is no number is only named
        losses = [one if isinstance(one, float) else type(one).__name__ for one in losses]
    same = all(p.data is before for p, before in zip(parameters, data, strict=True))
    found = {"losses": losses, "W": parameters[0].data, "b": parameters[1].data, "in place": same}
    return found | {"alive": max(most), "calls": len(most), "moved": memory.moved}


LOOPS = {
    "kept": "the gradients of the steps before are not cleared",
    "kept scaled": "the gradients of the steps before are not cleared",
    "unclipped": "the gradients are not scaled to max_norm",
    "apart": "each parameter's gradient is scaled by its own norm; the norm is that of all together",
    "constant": "the rate does not fall",
    "late": "the rate falls one step too early: the first is lr itself",
    "first": "t does not count the steps; AdamW's corrections need it",
    "anew": "m and v begin anew at each step",
    "always": "the gradients are scaled to max_norm although their norm is below it",
}


def _loop(W, b, batches, lr, max_norm, kind=""):
    """The losses and parameters of the loop in float64; a `kind` is a mistake."""
    ps, states, losses, gs = [W.astype(float), b.astype(float)], [[0, 0], [0, 0]], [], [0, 0]
    for t, (x, y) in enumerate(batches, 1):
        off = x @ ps[0] + ps[1] - y
        losses.append((off**2).mean() / 2)
        new = [x.T @ off / off.size, off.sum(axis=0) / off.size]
        gs = [g * kind.startswith("kept") + one for g, one in zip(gs, new, strict=True)]
        norms = [np.linalg.norm(g) for g in gs]
        norms = norms if kind == "apart" else [np.hypot(*norms)] * 2
        least = np.inf if kind == "always" else 1
        scaled = [
            g * (1 if kind == "unclipped" else min(least, max_norm / norm)) for g, norm in zip(gs, norms, strict=True)
        ]
        states = [[0, 0], [0, 0]] if kind == "anew" else states
        gs = scaled if kind == "kept scaled" else gs
        rate = lr * (1 if kind == "constant" else 1 - (t - (kind != "late")) / len(batches))
        for i, g in enumerate(scaled):
            ps[i], *states[i] = _adamw(ps[i], g, *states[i], 1 if kind == "first" else t, rate, 0.0)
    return losses, *ps


@check("my-5", "the loop on a small problem", points=4, without="*")
def _(mine, rng):
    n, m, T, lr = 6, 3, 8, 0.05
    W, b = rng.standard_normal((n, m)).astype(F), np.zeros(m, F)
    batches = [(rng.standard_normal((5, n)).astype(F), rng.standard_normal((5, m)).astype(F)) for _ in range(T)]
    norm = float(np.median([np.linalg.norm((x.T @ (x @ W + b - y)) / 15) for x, y in batches]))
    for max_norm in (0.5 * norm, 50 * norm):  # that all gradients exceed, or most; and that none does
        seen = there(mine, _trained, W, b, batches, lr, max_norm)
        found, (losses, *_) = seen["losses"], _loop(W, b, batches, lr, max_norm)
        assert isinstance(found, list) and len(found) == T, (
            f"train should return a list of {T} floats, a loss for each batch; it returned {type(found).__name__}."
        )
        strange = next((one for one in found if not isinstance(one, float)), None)
        assert strange is None, f"train should return floats; its list holds {strange}. loss.item() is a float."

        def off(kind, found=found, seen=seen, max_norm=max_norm):
            first, *ends = _loop(W, b, batches, lr, max_norm, kind)
            return max(_apart(found, first), *(_apart(seen[name], end) for name, end in zip("Wb", ends, strict=True)))

        assert _apart(found[:1], losses[:1]) < 1e-4, (
            f"The first loss should be {losses[0]:.5f}; it is {found[0]:.5f}. Was something changed before?"
        )
        assert seen["in place"], (
            "The parameters' .data should be changed in place, and not be replaced by other arrays."
        )
        assert (seen["W"] != W).any(), (
            "After training the parameters are what they were: is a copy trained? .flatten() makes one."
        )
        hint = next((f" Perhaps {what}." for kind, what in LOOPS.items() if off(kind) < 1e-4), "")
        error = off("")
        assert error < 1e-4, f"After {T} steps losses and parameters are off by {error:.1e} of their norm.{hint}"
        assert seen["calls"] == T, f"loss_of was called {seen['calls']} times for {T} batches; once for each is enough."
        state = T * 2 * 8 * (W.size + b.size)
        assert seen["moved"] == state, (
            f"The memory moved {seen['moved']:,} bytes; in {T} steps the states move {state:,}. Are m and v float32, and paged?"
        )


@check("my-5", "memory: one tape at a time", without="*")
def _(mine, rng):
    batches = [(rng.standard_normal((5, 6)).astype(F), rng.standard_normal((5, 3)).astype(F)) for _ in range(5)]
    seen = there(mine, _trained, np.zeros((6, 3), F), np.zeros(3, F), batches, 0.01, 1.0)
    assert seen["alive"] <= 1, (
        f"When a loss is computed, {seen['alive']} earlier ones are alive, with their tapes. Keep the number loss.item(), not the loss."
    )


@functools.cache
def _library():
    return finale.library_run()


@check("my-5", "the embedded model, within 0.01 bits per byte of the library", points=3, before=_library)
def _(mine, rng):
    before, after, *_ = there(mine, finale.own_run)
    expected, best, _ = _library()
    assert abs(before - expected) < 0.01, (
        f"Before the first step your 4-bit model has {before:.4f} bits per byte, and the library's {expected:.4f}: look at steps 1 to 3."
    )
    assert abs(after - best) < 0.01, (
        f"After {finale.STEPS} steps your model has {after:.4f} held-out bits per byte, and the library's {best:.4f}; 0.01 is allowed."
    )


# --- step 6


@check("my-6", "merged", points=2, without="*")
def _(mine, rng):
    for _ in range(3):
        layer, w = _layer(mine, rng)
        bypass = layer["B"].astype(float) @ layer["A"]
        found = _array(mine.merge(layer), "merge(layer)", w.shape, F)
        hint = next(
            (
                f": {what}"
                for what, wrong in (("the scale s is missing", w + bypass), ("the bypass is missing", w))
                if _apart(found, wrong) < 1e-5
            ),
            "",
        )
        error = _apart(found, w + layer["s"] * bypass)
        assert error < 1e-5, f"merge(layer) is {error:.1%} of its norm away from Ŵ + s B A{hint}."


def _touched(mine, w, B):
    """Whether merging leaves a layer as it was, its dict and its arrays."""
    layer = mine.new_layer(w, B.shape[1], 4.0, np.random.default_rng(0)) | {"B": B}

    def bits():
        return [np.asarray(layer[name]).tobytes() for name in "ABs"] + [
            np.asarray(v).tobytes() for v in layer["stored"].values()
        ]

    before = bits()
    merged, (stored, _) = mine.merge(layer), mine.merge_into_nf4(layer)
    return bits() != before, _apart(merged, w + layer["s"] * (B @ layer["A"])) < 0.2 and _apart(
        mine.rebuild(stored), merged
    ) < 0.2


@check("my-6", "the layer stays as it is", without="*")
def _(mine, rng):
    touched, right = there(
        mine, _touched, rng.standard_normal((20, 30)).astype(F), rng.standard_normal((20, 3)).astype(F)
    )
    assert right, "What is merged is far from Ŵ + s B A, so that the layer stays says nothing."
    assert not touched, (
        "merge or merge_into_nf4 changes the layer's own arrays; whoever merges may still want the adapter."
    )


@check("my-6", "into 4 bits, and what that loses", points=2, without="*")
def _(mine, rng):
    for size, _ in itertools.product((0.02, 0.5), range(2)):
        layer, w = _layer(mine, rng)
        layer["B"] *= F(size * np.linalg.norm(w) / np.linalg.norm(layer["s"] * (layer["B"] @ layer["A"])))
        merged = w + layer["s"] * (layer["B"].astype(float) @ layer["A"])
        stored, error = _several(mine.merge_into_nf4(layer), 2, "merge_into_nf4(layer)")
        assert isinstance(stored, dict) and "packed" in stored, (
            "merge_into_nf4 should return what `store` returns, and the error."
        )
        new = np.asarray(mine.rebuild(stored), float)
        true = _apart(new, merged)
        assert new.shape == w.shape and true < 0.13, (
            f"The merged weight in 4 bits is {true:.1%} of its norm away from Ŵ + s B A; NF4's own error is about 9 %."
        )
        assert abs(float(error) / true - 1) < 1e-4, (
            f"The error is {true:.6f} of ‖Ŵ + s B A‖, and {float(error):.6f} was returned."
        )
