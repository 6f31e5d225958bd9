"""Convolution: its value against a plain loop, its pullbacks against central differences, and what its tape holds."""

import itertools
import math

import numpy as np
import pytest
from gradcheck import check

import tinylora as tl
from tinylora import Tensor, backend
from tinylora.adapters import conv


def each_axis(value, n):
    return tuple(value) if isinstance(value, tuple) else (value,) * n


def plain(x, w, stride=1, padding=0, dilation=1, groups=1):
    """One output at a time, straight from the equation; x is zero outside."""
    n = w.ndim - 2
    stride, padding, dilation = (each_axis(v, n) for v in (stride, padding, dilation))
    space, kernel = x.shape[2:], w.shape[2:]
    places = [(space[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(n)]
    y = np.zeros((len(x), len(w), *places), np.result_type(x, w))
    for b, o, *p in np.ndindex(*y.shape):
        first = o // (len(w) // groups) * w.shape[1]
        for c, *k in np.ndindex(*w.shape[1:]):
            q = tuple(s * i + d * j - m for s, i, d, j, m in zip(stride, p, dilation, k, padding, strict=True))
            if all(0 <= i < m for i, m in zip(q, space, strict=True)):
                y[(b, o, *p)] += x[(b, first + c, *q)] * w[(o, c, *k)]
    return y


CASES = {  # x, w, options
    "1d": ((2, 3, 7), (4, 3, 3), {}),
    "1d-kernel-1": ((2, 3, 5), (4, 3, 1), {}),
    "1d-all": ((2, 4, 9), (6, 2, 3), {"stride": 2, "padding": 3, "dilation": 2, "groups": 2}),
    "1d-kernel-as-long-as-x": ((1, 2, 4), (3, 2, 4), {}),
    "2d": ((2, 3, 5, 6), (4, 3, 3, 2), {}),
    "2d-stride": ((1, 2, 7, 8), (3, 2, 3, 3), {"stride": (2, 3)}),
    "2d-padding": ((1, 2, 3, 4), (3, 2, 3, 3), {"padding": (2, 1)}),
    "2d-dilation": ((1, 2, 7, 6), (3, 2, 3, 2), {"dilation": (2, 3)}),
    "2d-groups": ((2, 6, 4, 4), (9, 2, 3, 3), {"groups": 3, "padding": 1}),
    "2d-depthwise": ((2, 4, 5, 5), (8, 1, 3, 3), {"groups": 4, "stride": 2}),
    "2d-stride-over-kernel": ((1, 2, 9, 9), (3, 2, 2, 2), {"stride": 4}),
    "2d-all": ((2, 4, 8, 7), (6, 2, 2, 3), {"stride": (2, 1), "padding": (1, 2), "dilation": (3, 2), "groups": 2}),
    "3d": ((2, 2, 4, 3, 5), (3, 2, 2, 2, 3), {}),
    "3d-all": (
        (1, 4, 5, 6, 4),
        (4, 2, 2, 3, 2),
        {"stride": (2, 1, 3), "padding": (1, 0, 2), "dilation": (2, 1, 3), "groups": 2},
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_value_and_gradients(case, xp, rng):
    x, w, options = case
    x, w = rng.standard_normal(x), rng.standard_normal(w)
    check(lambda x, w: conv.conv(x, w, **options), x, w, xp=xp, value=lambda x, w: plain(x, w, **options), rng=rng)


def test_options_drawn_at_random(rng):
    """Any combination that torch would take, x a whole number of strides or not."""
    for _ in range(40):
        n, groups = int(rng.integers(1, 4)), int(rng.integers(1, 4))
        kernel, stride, padding, dilation = (tuple(map(int, rng.integers(low, 4, n))) for low in (1, 1, 0, 1))
        space = [
            max(1, d * (k - 1) + 1 - 2 * p) + int(rng.integers(0, 4))
            for d, k, p in zip(dilation, kernel, padding, strict=True)
        ]
        x = rng.standard_normal((int(rng.integers(1, 3)), groups * int(rng.integers(1, 3)), *space))
        w = rng.standard_normal((groups * int(rng.integers(1, 3)), x.shape[1] // groups, *kernel))
        options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        y = conv.conv(Tensor(x), Tensor(w), **options).data
        np.testing.assert_allclose(y, plain(x, w, **options), rtol=1e-12, atol=1e-12, err_msg=str(options))


@pytest.mark.parametrize("options", [{}, {"padding": 1, "stride": 2}])
def test_inputs_that_are_not_contiguous(options, xp, rng):
    x, w = rng.standard_normal((6, 5, 3, 2)).T, rng.standard_normal((3, 2, 3, 4)).T
    assert not x.flags.c_contiguous and not w.flags.c_contiguous
    check(lambda x, w: conv.conv(x, w, **options), x, w, xp=xp, value=lambda x, w: plain(x, w, **options), rng=rng)
    strided = rng.standard_normal((2, 6, 10, 6))[:, ::2, ::-1, 1:]
    y, expected = conv.conv(Tensor(strided), Tensor(w), **options), plain(strided, w, **options)
    np.testing.assert_allclose(y.data, expected, rtol=1e-12, atol=1e-12)


def test_an_empty_batch_and_a_shared_input(xp, rng):
    w = rng.standard_normal((3, 2, 3))
    check(conv.conv, np.zeros((0, 2, 5)), w, xp=xp, value=plain, rng=rng)
    check(lambda x: conv.conv(x, x), rng.standard_normal((3, 3, 3)), xp=xp, rng=rng)


def test_options_may_stand_by_position(rng):
    x, w = Tensor(rng.standard_normal((1, 4, 8)), True), Tensor(rng.standard_normal((4, 2, 3)), True)
    a, b = conv.conv(x, w, 2, (1,), 2, 2), conv.conv(x, w, stride=2, padding=1, dilation=2, groups=2)
    assert (a.data == b.data).all()
    a.backward(np.ones_like(a.data))
    assert x.grad.shape == x.shape and w.grad.shape == w.shape


def test_the_tape_does_not_hold_x_when_w_is_frozen(rng):
    """LoRA's saving: x̄ needs w alone, w̄ needs x alone; nothing else, no padded and no unfolded copy, is kept."""
    x = Tensor(rng.standard_normal((2, 4, 9, 9), dtype=np.float32), requires_grad=True)
    w = Tensor(rng.standard_normal((8, 2, 3, 3), dtype=np.float32))
    options = {"padding": 1, "stride": 2, "dilation": 2, "groups": 2}
    assert tl.tape_bytes(conv.conv(x, w, **options)) == w.nbytes
    w.requires_grad = True
    assert tl.tape_bytes(conv.conv(x, w, **options)) == w.nbytes + x.nbytes
    assert tl.tape_bytes(conv.conv(x.detach(), w, **options)) == x.nbytes
    x.requires_grad = w.requires_grad = False
    assert not conv.conv(x, w, **options).requires_grad


@pytest.mark.parametrize(
    "x, w, options, words",
    [
        ((2, 3, 4), (5, 3, 2, 2), {}, "x is (2, 3, 4) and w is (5, 3, 2, 2)"),
        ((2, 3), (5, 3), {}, "1, 2 or 3 spatial axes"),
        ((1, 2, 3, 3, 3, 3), (1, 2, 3, 3, 3, 3), {}, "1, 2 or 3 spatial axes"),
        ((2, 3, 4), (5, 2, 2), {}, "x has 3 channels"),
        ((2, 4, 4), (5, 2, 2), {"groups": 2}, "out a multiple of groups"),
        ((2, 3, 4), (5, 3, 5), {}, "the kernel (5,) spans (5,) with dilation (1,), and x has only (4,)"),
        ((2, 3, 4, 9), (5, 3, 3, 3), {"dilation": 2}, "spans (5, 5) with dilation (2, 2), and x has only (4, 9)"),
        ((2, 3, 4), (5, 3, 0), {}, "the kernel (0,)"),
        ((2, 3, 4), (5, 3, 2), {"stride": 0}, "stride = 0, expected a whole number, 1 or more"),
        ((2, 3, 4), (5, 3, 2), {"padding": -1}, "padding = -1, expected a whole number, 0 or more"),
        ((2, 3, 4), (5, 3, 2), {"padding": "same"}, "padding = 'same', expected a whole number"),
        (
            (2, 3, 4),
            (5, 3, 2),
            {"dilation": (1, 1)},
            "dilation = (1, 1), expected a whole number, 1 or more, or a tuple of 1",
        ),
        ((2, 3, 4), (5, 3, 2), {"groups": 1.0}, "groups = 1.0, expected a whole number"),
    ],
)
def test_errors_are_sentences(x, w, options, words):
    with pytest.raises(ValueError) as error:
        conv.conv(Tensor(np.zeros(x)), Tensor(np.zeros(w)), **options)
    assert words in str(error.value)


# --------------------------------------------------------------------------------------------------------------- the layers
LAYERS = {1: conv.Conv1d, 2: conv.Conv2d, 3: conv.Conv3d}


@pytest.mark.parametrize("n, groups, bias", list(itertools.product(LAYERS, (1, 2), (True, False))))
def test_layers_convolve_and_add_their_bias(n, groups, bias, rng):
    layer = LAYERS[n](4, 6, 3, stride=2, padding=1, dilation=(1, 2, 1)[:n], groups=groups, bias=bias)
    assert (layer.in_channels, layer.out_channels, layer.kernel_size) == (4, 6, (3,) * n)
    assert layer.dense() is layer.weight.data and layer.weight.shape == (6, 4 // groups, *(3,) * n)
    x = rng.standard_normal((2, 4, *(7, 6, 8)[:n]), dtype=np.float32)
    expected = plain(x.astype(np.float64), layer.dense().astype(np.float64), 2, 1, (1, 2, 1)[:n], groups)
    if bias:
        expected += layer.bias.data.reshape(-1, *(1,) * n)
    y = layer(Tensor(x))
    assert y.dtype == np.float32
    np.testing.assert_allclose(y.data, expected, rtol=1e-5, atol=1e-5)
    y.backward(np.ones_like(y.data))
    assert [name for name, p in layer.named_parameters() if p.grad is not None] == ["weight", "bias"][: 1 + bias]
    if bias:
        np.testing.assert_allclose(layer.bias.grad, math.prod(y.shape) / y.shape[1])


@pytest.mark.parametrize("n", LAYERS)
def test_layers_start_uniform_within_one_over_the_root_of_the_fan_in(n):
    """4000 weights and more: the greatest comes within 1 % of the bound, and the variance is bound²/3."""
    layer = LAYERS[n](8, 4096 // 3**n * 2, 3, groups=2)
    bound = 1 / math.sqrt(4 * 3**n)
    w, b = layer.weight.data, layer.bias.data
    assert w.size >= 4000 and w.dtype == b.dtype == np.float32
    assert bound * 0.99 < np.abs(w).max() <= np.float32(bound)
    assert w.var() == pytest.approx(bound**2 / 3, rel=0.1)
    assert bound * 0.9 < np.abs(b).max() <= np.float32(bound)


def test_layers_run_on_every_array_module(xp, rng):
    layer, x = conv.Conv2d(3, 4, (3, 2), padding=(1, 0)), rng.standard_normal((2, 3, 5, 5), dtype=np.float32)
    host = layer(Tensor(x)).data
    y = layer.to(xp)(Tensor(xp.asarray(x)))
    np.testing.assert_allclose(backend.move(y.data, "cpu"), host, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((3, 4, (3, 3)), "Conv1d: kernel_size = (3, 3)"),
        ((3, 4, 0), "Conv1d: kernel_size = 0"),
        ((3, 4, 3, 1, 0, 1, 2), "Conv1d: groups = 2 must divide in_channels = 3 and out_channels = 4"),
    ],
)
def test_layers_refuse_what_does_not_fit(arguments, words):
    with pytest.raises(ValueError) as error:
        conv.Conv1d(*arguments)
    assert words in str(error.value)
