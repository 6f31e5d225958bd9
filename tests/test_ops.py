"""Every operation: its value, and its pullbacks against central differences, on every array module."""

import re
from pathlib import Path

import numpy as np
import pytest
from gradcheck import check

from tinylora import Tensor, backend, ops
from tinylora.kernels import attention


def away_from_zero(rng, *shape):
    x = rng.standard_normal(shape)
    return x + np.sign(x) * 0.3


SHAPES = {
    "same": ((3, 4), (3, 4)),
    "broadcast": ((3, 1, 4), (5, 1)),
    "scalar": ((3, 4), ()),
    "zero-size": ((0, 4), (1, 4)),
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", ["add", "sub", "mul", "div"])
def test_arithmetic(name, shapes, xp, rng):
    x, y = rng.standard_normal(shapes[0]), away_from_zero(rng, *shapes[1])
    numpy_name = {"sub": "subtract", "mul": "multiply", "div": "divide"}.get(name, name)
    check(getattr(ops, name), x, y, xp=xp, value=getattr(np, numpy_name), rng=rng)


@pytest.mark.parametrize("name", ["add", "sub", "mul", "div"])
def test_arithmetic_on_a_shared_input_and_a_python_number(name, xp, rng):
    op = getattr(ops, name)
    check(lambda x: op(x, x), away_from_zero(rng, 3, 4), xp=xp, rng=rng)
    check(lambda x: op(op(2.0, x), 3.0), away_from_zero(rng, 3, 4), xp=xp, rng=rng)


UNARY = {
    "neg": (ops.neg, np.negative),
    "exp": (ops.exp, np.exp),
    "tanh": (ops.tanh, np.tanh),
    "relu": (ops.relu, lambda x: np.maximum(x, 0)),
    "sigmoid": (ops.sigmoid, lambda x: 1 / (1 + np.exp(-x))),
    "cube": (lambda x: ops.power(x, 3), lambda x: x**3),
    "softmax": (ops.softmax, None),
    "sum": (ops.sum, np.sum),
    "sum-axis": (lambda x: ops.sum(x, axis=1), lambda x: x.sum(1)),
    "sum-keepdims": (lambda x: ops.sum(x, axis=-1, keepdims=True), lambda x: x.sum(-1, keepdims=True)),
    "sum-two-axes": (lambda x: ops.sum(x, axis=(0, 1)), lambda x: x.sum((0, 1))),
    "reshape": (lambda x: ops.reshape(x, (-1,)), lambda x: x.reshape(-1)),
    "transpose": (ops.transpose, np.transpose),
    "transpose-axes": (lambda x: ops.transpose(x, (1, -1, 0)), lambda x: x.transpose(1, -1, 0)),
    "swapaxes": (lambda x: ops.swapaxes(x, 0, 2), lambda x: x.swapaxes(0, 2)),
    "slice": (lambda x: ops.index(x, (slice(None), slice(0, 2))), lambda x: x[:, 0:2]),
}


@pytest.mark.parametrize("name", UNARY)
def test_unary(name, xp, rng):
    op, value = UNARY[name]
    x = away_from_zero(rng, 3, 4, 5)
    check(op, x, xp=xp, value=value, rng=rng)
    check(op, np.moveaxis(away_from_zero(rng, 5, 4, 3), 0, -1).transpose(1, 0, 2), xp=xp, value=value, rng=rng)
    check(op, np.zeros((0, 4, 5)), xp=xp, rng=rng)
    if name in ("neg", "exp", "tanh", "relu", "sigmoid", "cube", "sum"):
        check(op, np.asarray(0.7), xp=xp, value=value, rng=rng)
    check(lambda x: ops.mul(op(x), ops.sum(op(x))), x, xp=xp, rng=rng)  # used twice


@pytest.mark.parametrize("axis, keepdims", [(None, False), (0, False), (-1, True), ((0, 2), False)])
def test_mean_and_max(axis, keepdims, xp, rng):
    x = rng.permutation(60).reshape(3, 4, 5) / 7.0  # no two entries within the step of a central difference
    check(lambda x: ops.mean(x, axis, keepdims), x, xp=xp, value=lambda x: x.mean(axis, keepdims=keepdims), rng=rng)
    check(lambda x: ops.max(x, axis, keepdims), x, xp=xp, value=lambda x: x.max(axis, keepdims=keepdims), rng=rng)


def test_max_shares_among_ties(xp):
    x = Tensor(xp.asarray(np.array([[1.0, 3.0, 3.0]])), requires_grad=True)
    ops.max(x).backward()
    assert x.grad.tolist() == [[0, 0.5, 0.5]] if xp is np else x.grad.get().tolist() == [[0, 0.5, 0.5]]


def test_swiglu(xp, rng):
    a, b = rng.standard_normal((3, 4, 5)) * 3, rng.standard_normal((3, 4, 5))
    check(ops.swiglu, a, b, xp=xp, value=lambda a, b: a / (1 + np.exp(-a)) * b, rng=rng)
    check(ops.swiglu, a, b[:1, :, :1], xp=xp, value=lambda a, b: a / (1 + np.exp(-a)) * b, rng=rng)


def test_positive_domain(xp, rng):
    x = rng.uniform(0.5, 2, (3, 4))
    check(ops.log, x, xp=xp, value=np.log, rng=rng)
    check(ops.sqrt, x, xp=xp, value=np.sqrt, rng=rng)
    check(lambda x: ops.power(x, -0.5), x, xp=xp, value=lambda x: x**-0.5, rng=rng)


def test_index_with_repeats_adds_up(xp, rng):
    key = xp.asarray(np.array([2, 0, 2, 2]))
    check(lambda x: ops.index(x, key), rng.standard_normal((3, 4)), xp=xp, value=lambda x: x[[2, 0, 2, 2]], rng=rng)
    check(lambda x: ops.index(x, 1), rng.standard_normal((3, 4)), xp=xp, value=lambda x: x[1], rng=rng)


def test_concatenate(xp, rng):
    a, b = rng.standard_normal((2, 3, 2)), rng.standard_normal((2, 5, 2))
    check(
        lambda a, b: ops.concatenate([a, b, a], axis=1),
        a,
        b,
        xp=xp,
        value=lambda a, b: np.concatenate([a, b, a], 1),
        rng=rng,
    )
    check(lambda a, b: ops.concatenate([a, b], axis=-2), a, b[:, :0], xp=xp, rng=rng)


@pytest.mark.parametrize(
    "a, b", [((3, 4), (4, 5)), ((2, 3, 4), (4, 5)), ((2, 1, 3, 4), (6, 4, 5)), ((0, 4), (4, 5)), ((3, 0), (0, 5))]
)
def test_matmul(a, b, xp, rng):
    check(ops.matmul, rng.standard_normal(a), rng.standard_normal(b), xp=xp, value=np.matmul, rng=rng)


def test_the_zeroth_power_has_gradient_zero_everywhere(xp):
    """n xⁿ⁻¹ is 0 · 0⁻¹ at x = 0: the gradient of a constant is 0, there too, and no warning is raised."""
    x = Tensor(xp.asarray(np.array([0.0, 2.0, -1.0], np.float32)), requires_grad=True)
    (x**0).sum().backward()
    assert backend.move(x.grad, "cpu").tolist() == [0, 0, 0]
    y = Tensor(xp.asarray(np.zeros(2, np.float32)), requires_grad=True)
    (y**1 + y**2 + y**0.0).sum().backward()  # 1 · 0⁰ = 1
    assert backend.move(y.grad, "cpu").tolist() == [1, 1]


def test_an_exponent_that_is_no_number_is_refused(xp):
    x = Tensor(xp.asarray(np.ones(2, np.float32)), requires_grad=True)
    for n in (x, Tensor(xp.asarray(np.ones(2, np.float32))), xp.asarray(np.ones(2, np.float32))):
        with pytest.raises(TypeError, match="power: the exponent is a Tensor or an array, expected a number"):
            x**n


def test_methods_take_their_numbers_one_by_one_or_together(xp):
    x = Tensor(xp.asarray(np.arange(6, dtype=np.float32).reshape(2, 3)))
    y = Tensor(xp.asarray(np.arange(24, dtype=np.float32).reshape(2, 3, 4)))
    assert x.transpose(1, 0).shape == x.transpose((1, 0)).shape == x.transpose().shape == (3, 2)
    assert y.transpose(2, 0, 1).shape == (4, 2, 3) and x.reshape(3, 2).shape == x.reshape((3, 2)).shape == (3, 2)
    with pytest.raises(ValueError, match=r"transpose: axes \(1, 0\) for an array of 3 axes; .* swapaxes"):
        y.transpose(1, 0)


def test_matmul_of_a_matrix_with_its_transpose(xp, rng):
    check(
        lambda x: ops.matmul(x, ops.transpose(x)), rng.standard_normal((3, 4)), xp=xp, value=lambda x: x @ x.T, rng=rng
    )
    check(ops.matmul, rng.standard_normal((4, 3)).T, rng.standard_normal((5, 4)).T, xp=xp, value=np.matmul, rng=rng)


@pytest.mark.parametrize("lead", [(3,), (2, 3), (), (0,)])
def test_linear(lead, xp, rng):
    x, w, b = rng.standard_normal((*lead, 4)), rng.standard_normal((5, 4)), rng.standard_normal(5)
    check(ops.linear, x, w, b, xp=xp, value=lambda x, w, b: x @ w.T + b, rng=rng)
    check(ops.linear, x, w, xp=xp, value=lambda x, w: x @ w.T, rng=rng)
    check(ops.linear, np.swapaxes(rng.standard_normal((4, 6, 2)), 0, 2), w, xp=xp, rng=rng)


def test_embedding(xp, rng):
    ids = xp.asarray(rng.integers(0, 5, (3, 7)))
    check(lambda w: ops.embedding(ids, w), rng.standard_normal((5, 4)), xp=xp, rng=rng)
    check(lambda w: ops.embedding(ids[:0], w), rng.standard_normal((5, 4)), xp=xp, rng=rng)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_softmax_cross_entropy(reduction, xp, rng):
    z, t = 3 * rng.standard_normal((2, 3, 5)), rng.integers(0, 5, (2, 3))
    mask = np.array([[1, 0, 1], [0, 1, 1.0]])

    def by_hand(z):
        p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
        nats = -np.log(np.take_along_axis(p, t[..., None], -1)[..., 0]) * mask
        return nats.sum() / (mask.sum() if reduction == "mean" else 1)

    check(
        lambda z: ops.softmax_cross_entropy(z, xp.asarray(t), xp.asarray(mask), reduction=reduction),
        z,
        xp=xp,
        value=by_hand,
        rng=rng,
    )


def test_zero_size_loss_and_attention(xp, rng):
    none = xp.asarray(np.zeros((0,), np.int64))
    check(lambda z: ops.softmax_cross_entropy(z, none), np.zeros((0, 5)), xp=xp, rng=rng)
    check(ops.causal_attention, *(np.zeros((0, 3, h, 4)) for h in (2, 1, 1)), xp=xp, rng=rng)
    check(ops.causal_attention, *(np.zeros((2, 0, h, 4)) for h in (2, 1, 1)), xp=xp, rng=rng)


@pytest.mark.parametrize("lead", [(3,), (2, 3), (0,)])
def test_linear_frozen(lead, xp, rng):
    w = rng.standard_normal((5, 4))

    class Dense:  # a stored weight that is exact in every dtype, so that float64 can be checked
        shape, dtype = w.shape, "float32"
        dequantize = staticmethod(lambda dtype: weight[0])

    weight = [None]

    def op(x):
        weight[0] = xp.asarray(w.astype(x.dtype))
        return ops.linear_frozen(x, Dense)

    check(op, rng.standard_normal((*lead, 4)), xp=xp, value=lambda x: x @ w.T, rng=rng)


def test_softmax_cross_entropy_is_finite_for_huge_logits_and_empty_masks(xp):
    z = Tensor(xp.asarray(np.array([[1e4, 0.0], [0.0, 1e4]], np.float32)), requires_grad=True)
    t = xp.asarray(np.array([1, 1]))
    loss = ops.softmax_cross_entropy(z, t)
    loss.backward()
    assert loss.item() == 5000 and np.isfinite(loss.item()) and bool(xp.isfinite(z.grad).all())
    nothing = ops.softmax_cross_entropy(z, t, xp.asarray(np.zeros(2, np.float32)))
    assert nothing.item() == 0


def test_loss_is_on_the_target_tokens_only(rng):
    z, t = Tensor(rng.standard_normal((4, 5)), requires_grad=True), rng.integers(0, 5, 4)
    ops.softmax_cross_entropy(z, t, np.array([0, 0, 1, 1])).backward()
    assert (z.grad[:2] == 0).all() and (z.grad[2:] != 0).all()


def test_norms(xp, rng):
    x, w = rng.standard_normal((2, 3, 6)), rng.standard_normal(6)
    check(
        lambda x, w: ops.rms_norm(x, w, eps=1e-3),
        x,
        w,
        xp=xp,
        rng=rng,
        value=lambda x, w: w * x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-3),
    )
    check(lambda x, w: ops.rms_norm(x, w), x[:0], w, xp=xp, rng=rng)
    check(lambda x, w: ops.rms_norm(x, w), np.swapaxes(x, 0, 1), w, xp=xp, rng=rng)


def test_rope_turns_pairs_and_keeps_lengths(xp, rng):
    cos, sin = (xp.asarray(a) for a in ops.rope_table(np.arange(3, 8), 6, dtype=np.float64))
    cos32, sin32 = cos.astype(np.float32), sin.astype(np.float32)
    x = rng.standard_normal((2, 5, 3, 6))

    def op(x):
        return ops.rope(x, cos, sin) if x.dtype == np.float64 else ops.rope(x, cos32, sin32)

    check(op, x, xp=xp, rng=rng)
    y = op(Tensor(xp.asarray(x))).numpy()
    np.testing.assert_allclose((y**2).sum(-1), (x**2).sum(-1), rtol=1e-12)


def test_rope_has_the_bits_of_the_two_equations_of_a_pair(rng):
    """Zeros, of either sign, and angles of 0 among them."""
    x = rng.standard_normal((2, 70, 3, 10)).astype(np.float32)
    x[rng.random(x.shape) < 0.2] *= 0
    cos, sin = ops.rope_table(np.arange(70), 10)
    (a, b), c, s = np.split(x, 2, axis=-1), cos[:, None], sin[:, None]
    for y, sign in ((ops.rope(x, cos, sin).data, 1), (ops.rope(x, cos, -sin).data, -1)):
        assert y.tobytes() == np.concatenate([a * c - b * (sign * s), b * c + a * (sign * s)], axis=-1).tobytes()


def test_rope_depends_on_the_distance_only(rng):
    q, k = rng.standard_normal((2, 1, 1, 1, 8))
    dot = []
    for m, n in [(3, 1), (13, 11)]:
        turned = [ops.rope(x, *ops.rope_table([p], 8, dtype=np.float64)).data for x, p in ((q, m), (k, n))]
        dot.append(float((turned[0] * turned[1]).sum()))
    assert abs(dot[0] - dot[1]) < 1e-12


def attention_by_hand(q, k, v, window=None):
    b, t, heads, d = q.shape
    s, groups = k.shape[1], k.shape[2]
    y = np.zeros_like(q)
    for i in range(b):
        for h in range(heads):
            for j in range(t):
                seen = s - t + j + 1
                first = 0 if window is None else max(seen - window, 0)
                score = k[i, first:seen, h * groups // heads] @ q[i, j, h] / np.sqrt(d)
                p = np.exp(score - score.max())
                y[i, j, h] = (p / p.sum()) @ v[i, first:seen, h * groups // heads]
    return y


@pytest.mark.parametrize("t, s, heads, groups", [(5, 5, 4, 2), (1, 6, 2, 2), (3, 7, 4, 1), (70, 70, 2, 1)])
def test_causal_attention(t, s, heads, groups, xp, rng):
    q, k, v = (
        rng.standard_normal((2, t, heads, 4)),
        rng.standard_normal((2, s, groups, 4)),
        rng.standard_normal((2, s, groups, 4)),
    )
    check(ops.causal_attention, q, k, v, xp=xp, value=attention_by_hand, rng=rng)
    check(lambda k: ops.causal_attention(k, k, k), rng.standard_normal((1, 4, 2, 4)), xp=xp, rng=rng)
    check(ops.causal_attention, *(np.swapaxes(a, 1, 2).copy().swapaxes(1, 2) for a in (q, k, v)), xp=xp, rng=rng)


@pytest.mark.parametrize("t, s", [(5, 5), (1, 6), (3, 7), (70, 70), (66, 80)])
@pytest.mark.parametrize("window", [1, 2, 5, 64, 200])
def test_a_sliding_window(t, s, window, xp, rng):
    q, k, v = (rng.standard_normal((1, n, h, 4)) for n, h in ((t, 4), (s, 2), (s, 2)))
    expected = attention_by_hand(q, k, v, window)
    check(
        lambda q, k, v: ops.causal_attention(q, k, v, window=window), q, k, v, xp=xp, value=lambda *_: expected, rng=rng
    )


@pytest.mark.parametrize("window", [None, 1, 5, 20, 49])
def test_attention_blocks_change_nothing(window, monkeypatch, rng):
    arrays = [rng.standard_normal((2, 50, h, 8)) for h in (4, 2, 2)]
    g = rng.standard_normal(arrays[0].shape)
    results = []
    for block in (7, 1000):
        monkeypatch.setattr(attention, "QUERY_BLOCK", block)
        tensors = [Tensor(a, requires_grad=True) for a in arrays]
        y = ops.causal_attention(*tensors, window=window)
        y.backward(g)
        results.append([y.data, *(t.grad for t in tensors)])
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_dropout_against_central_differences(xp, rng):
    def op(x):
        with backend.using_generator(np.random.default_rng(5)):  # the same mask at every evaluation
            return ops.dropout(x, 0.4)

    check(op, rng.standard_normal((6, 7)), xp=xp, rng=rng)


def test_dropout_keeps_the_mean_and_its_mask_goes_back(xp):
    x = Tensor(xp.ones((200, 200), dtype=np.float32), requires_grad=True)
    y = ops.dropout(x, 0.25)
    y.sum().backward()
    assert abs(float(y.data.mean()) - 1) < 0.02
    assert bool((x.grad == y.data).all())
    assert ops.dropout(x, 0.0) is x


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: ops.linear(Tensor(np.ones((2, 5))), Tensor(np.ones((3, 4)))), "x has 5 features, w expects 4"),
        (lambda: ops.matmul(Tensor(np.ones((2, 3))), Tensor(np.ones((2, 3)))), "x is (2, 3) and w is (2, 3)"),
        (
            lambda: ops.embedding(np.array([0, 9]), Tensor(np.ones((5, 2)))),
            "ids run from 0 to 9, the table has rows 0 to 4",
        ),
        (lambda: ops.embedding(np.array([0.5]), Tensor(np.ones((5, 2)))), "ids must be integers"),
        (lambda: ops.softmax_cross_entropy(Tensor(np.ones((2, 3))), np.array([1])), "targets must be (2,)"),
        (lambda: ops.dropout(Tensor(np.ones(2)), 1.0), "expected 0 <= p < 1"),
        (
            lambda: ops.causal_attention(*(Tensor(np.ones((1, 2, h, 4))) for h in (3, 2, 2))),
            "heads a multiple of kv_heads",
        ),
    ],
)
def test_errors_are_sentences(call, words):
    with pytest.raises((ValueError, TypeError, IndexError), match=words.replace("(", r"\(").replace(")", r"\)")):
        call()


def test_every_operation_is_checked_here():
    here = Path(__file__)
    named = set(re.findall(r"ops\.(\w+)", here.read_text(encoding="utf-8"))) | {"add", "sub", "mul", "div"}
    operations = {name for name, f in vars(ops).items() if hasattr(f, "__wrapped__") and f.__module__ == ops.__name__}
    assert {name for name in operations | {"concatenate", "dropout"} if not name.startswith("_")} <= named | {"conv"}


@pytest.mark.parametrize("op", [ops.sum, ops.max])
def test_a_single_number_reduced_over_its_last_axis_is_itself(op):
    x = Tensor(np.float64(3.0), requires_grad=True)
    y = op(x, axis=-1)
    y.backward()
    assert y.item() == 3.0 and x.grad == 1.0
