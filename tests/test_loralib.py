"""loralib's layers: its own numbers (goldens/loralib.npz), what merging in place does to a weight, and what loralib cannot do."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
from gradcheck import check
from test_conv import plain

import tinylora as tl
from tinylora import Tensor, backend, nn, ops
from tinylora.interop import loralib

GOLDENS = dict(np.load(Path(__file__).parent / "goldens" / "loralib.npz"))
CASES = json.loads(GOLDENS["index"].tobytes())["cases"]

#: Difference over the sum of the absolute values of what is added, in every entry, in float32. Another BLAS adds in another order.
TOLERANCE = 1e-6


def arrays(case):
    return {name: GOLDENS[name][start:stop].reshape(shape) for name, (start, stop, shape) in case["at"].items()}


def agree(ours, theirs, scale, what):
    """|ours − theirs| <= TOLERANCE · scale in every entry; where nothing was added (scale 0) the two are equal."""
    assert ours.shape == theirs.shape == scale.shape and ours.dtype == theirs.dtype, what
    difference = np.abs(ours - theirs)
    assert not difference[scale == 0].any(), what
    error = (difference / np.where(scale == 0, 1, scale)).max(initial=0)
    print(f"{what}: relative error {error:.2e}")
    assert error <= TOLERANCE, f"{what}: relative error {error:.2e}"


def of_absolute_values(layer, x, g=None):
    """(y, gradient of x, {name: gradient}, merged weight) of the layer with |·| of every number in it: what each entry's terms add up to.

    All that a layer does is to add products, so this bounds what another order of adding can change.
    """
    layer = copy.deepcopy(layer.train())
    for w in layer.parameters():
        w.data, w.grad = np.abs(w.data), None
    u = x if x.dtype.kind == "i" else Tensor(np.abs(x), requires_grad=True)
    y = layer(u)
    if g is not None:
        y.backward(np.abs(g))
    gradients = {name: w.grad for name, w in layer.named_parameters()}
    return y.data, getattr(u, "grad", None), gradients, layer.eval().frozen.data


def filled(layer, rng):
    """The layer with every parameter, B included, drawn from N(0, 1)."""
    for w in layer.parameters():
        w.data = rng.standard_normal(w.shape, dtype=np.float32)
    return layer


# ------------------------------------------------------------------------------------------------------------- loralib's numbers
@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_layers_compute_what_loralib_computes(case):
    get = arrays(case)
    layer = getattr(loralib, case["kind"])(*case["arguments"], **case["options"])
    state = {name.removeprefix("state."): value for name, value in get.items() if name.startswith("state.")}
    assert list(layer.state_dict()) == list(state)  # names and order
    layer.load_state_dict(state)
    before = layer.frozen.data.copy()

    x = get["ids"] if "ids" in get else Tensor(get["x"], requires_grad=True)
    y = layer(x)
    y_scale, x_scale, scales, w_scale = of_absolute_values(layer, get["ids"] if "ids" in get else get["x"], get["g"])
    agree(y.data, get["y"], y_scale, "y")
    y.backward(get["g"])
    gradients = {f"grad.{name}": w.grad for name, w in layer.named_parameters() if w.grad is not None}
    if "x" in get:
        gradients["grad.x"], scales["x"] = x.grad, x_scale
    assert sorted(gradients) == sorted(name for name in get if name.startswith("grad."))
    for name, gradient in gradients.items():
        agree(gradient, get[name], scales[name.removeprefix("grad.")], name)

    layer.eval()
    if "merged" not in get:
        assert layer.train().frozen.data.tobytes() == before.tobytes()
        return
    merged = layer.frozen.data
    agree(merged, get["merged"], w_scale, "merged")
    agree(layer(x).data, get["y_eval"], y_scale, "y in eval mode")
    layer.train()
    agree(layer.frozen.data, get["restored"], w_scale, "restored")
    if (
        case["options"]["r"] == 1 and "Conv" not in case["kind"]
    ):  # no sum in B A, no order of adding: every bit is loralib's
        assert (merged == get["merged"]).all() and (layer.frozen.data == get["restored"]).all()
        assert (layer.frozen.data != before).any()  # and W is not what it was


def test_goldens_are_small():
    assert (Path(__file__).parent / "goldens" / "loralib.npz").stat().st_size < 200_000


# --------------------------------------------------------------------------------------------------------- merging in place
def drifted(rng, start):
    """A 256 × 256 layer with r = 8, s = 1, and a function that draws B anew."""
    layer = loralib.Linear(256, 256, r=8, lora_alpha=8)
    assert layer.merge_weights and layer.scaling == 1
    if start:
        return layer, lambda: rng.uniform(-1, 1, (256, 8)).astype(np.float32) / np.float32(math.sqrt(8))
    filled(layer, rng)
    return layer, lambda: rng.standard_normal((256, 8), dtype=np.float32)


@pytest.mark.parametrize("start, low, high, off", [(False, 0.43, 0.49, 1e-6), (True, 0.72, 0.75, 1e-8)])
def test_train_after_eval_does_not_give_the_weight_back(start, low, high, off, rng):
    for _ in range(5):
        tl.seed(int(rng.integers(2**31)))
        layer, draw = drifted(rng, start)
        layer.lora_B.data = draw()
        before = layer.weight.data.copy()
        layer.eval()
        assert layer.merged and np.abs(layer.weight.data - before).max() > 0.01
        layer.train()
        after = layer.weight.data
        exact, worst = (after == before).mean(), np.abs(after - before).max()
        print(f"{exact:.2%} exact, at most {worst:.2e}")
        assert not layer.merged and low <= exact <= high and 0 < worst <= off
        layer.eval().train().eval().train()  # with the same factors, nothing more is lost
        assert (layer.weight.data == after).all()


def test_the_second_trip_loses_nothing_whatever_the_numbers(rng):
    """Reiser & Knuth 1975, over 25 binades to either side."""
    w, d = (rng.uniform(-1, 1, 10**6).astype(np.float32) for _ in range(2))
    w = np.ldexp(w, rng.integers(-12, 13, len(w)))
    once = (w + d) - d
    assert (once != w).mean() > 0.1 and ((once + d) - d == once).all()


def test_a_second_merge_may_give_another_weight_but_its_way_back_does_not(rng):
    """((W + Δ) − Δ) + Δ = W + Δ is false: for every W whose last bit is 1 there is a Δ. Reiser and Knuth subtract once more."""

    def trips(w, d):
        once = w + d
        back = once - d
        again = back + d
        return once, back, again, again - d

    w, d = (np.float32(float.fromhex(text)) for text in ("-0x1.b39936p-5", "0x1.67326ap-6"))
    expected = ("-0x1p-5", "-0x1.b39934p-5", "-0x1.fffffep-6", "-0x1.b39934p-5")
    assert trips(w, d) == tuple(float.fromhex(text) for text in expected)

    def pairs(last):
        """W with this last bit, and the Δ with which the exact sum lies half an ulp beyond a power of two: a tie."""
        m = 1 + (2 * rng.integers(1, 2**22, 10**5) + last) * 2.0**-23
        at, sign = rng.integers(-60, 60, len(m)), rng.choice((-1, 1), len(m))
        both = [np.ldexp(sign * v, at) for v in (m, 1 + 2.0**-24 - m)]
        assert all((v == v.astype(np.float32)).all() for v in both)
        return [v.astype(np.float32) for v in both]

    for last in (0, 1):
        once, back, again, back_again = trips(*pairs(last))
        assert ((again != once) == bool(last)).all() and (back_again == back).all()
    w, d = (np.ldexp(rng.uniform(-1, 1, 10**6), rng.integers(-12, 13, 10**6)).astype(np.float32) for _ in range(2))
    once, back, again, back_again = trips(w, d)
    assert (again != once).sum() <= 2 and (back_again == back).all()  # chance finds the exception hardly ever


def test_the_loss_grows_where_the_factors_change_between_evaluations(rng):
    tl.seed(int(rng.integers(2**31)))
    layer, draw = drifted(rng, start=True)
    before, rms = layer.weight.data.copy(), []
    for _ in range(100):
        layer.lora_B.data = draw()
        layer.eval().train()
        rms.append(np.sqrt(np.square(layer.weight.data - before).mean()))
    print(f"rms error after one trip {rms[0]:.2e}, after 100 {rms[-1]:.2e}")
    assert 8.4 <= rms[-1] / rms[0] <= 9.1


def test_without_merge_weights_no_mode_changes_the_weight(rng):
    layer = filled(loralib.Linear(6, 5, r=2, merge_weights=False), rng)
    x, before = Tensor(rng.standard_normal((3, 6), dtype=np.float32)), layer.weight.data
    y = layer(x).data
    layer.eval()
    assert layer.weight.data is before and not layer.merged and (layer(x).data == y).all()
    assert layer.train().weight.data is before


def test_a_model_of_any_depth_merges_and_merges_once(rng):
    class Block(nn.Module):
        def __init__(self):
            self.layers = [filled(loralib.Linear(4, 4, r=2), rng), filled(loralib.Conv1d(4, 4, 3, r=1), rng)]

    model = nn.Module()
    model.block = Block()
    weights = [layer.frozen.data for layer in model.block.layers]
    expected = [w + layer.delta() for w, layer in zip(weights, model.block.layers, strict=True)]
    for _ in range(2):  # a second eval() adds nothing
        model.eval()
        assert all((layer.frozen.data == w).all() for layer, w in zip(model.block.layers, expected, strict=True))
    assert not model.block.layers[0].training and copy.deepcopy(model).block.layers[0].merged
    expected = [w - layer.delta() for w, layer in zip(expected, model.block.layers, strict=True)]
    model.train().train()
    assert all((layer.frozen.data == w).all() for layer, w in zip(model.block.layers, expected, strict=True))


def test_eval_between_forward_and_backward_changes_no_gradient(rng):
    layer = filled(loralib.Linear(6, 5, r=2, lora_alpha=4), rng)
    x, g = rng.standard_normal((3, 6), dtype=np.float32), rng.standard_normal((3, 5), dtype=np.float32)

    def gradient(between):
        t = Tensor(x, requires_grad=True)
        y = layer(t)
        between()
        y.backward(g)
        return t.grad

    expected = gradient(lambda: None)
    assert (gradient(layer.eval) == expected).all() and layer.merged


def test_factors_loaded_in_eval_mode_are_subtracted_without_having_been_added(rng):
    """True of loralib too, and why its factors are loaded in train mode."""
    layer = filled(loralib.Linear(6, 5, r=2), rng)
    before, old = layer.weight.data, layer.delta()
    layer.eval()
    assert (layer.state_dict()["weight"] == before + old).all()  # a state dict holds the merged weight
    layer.load_state_dict({"lora_B": layer.lora_B.data * 3}, strict=False)
    layer.train()
    np.testing.assert_allclose(layer.weight.data, before - 2 * old, rtol=1e-5, atol=1e-5)


def test_eval_and_train_mode_agree_to_rounding(rng):
    x = rng.standard_normal((4, 6), dtype=np.float32)
    for layer, data in [
        (loralib.Linear(6, 5, r=3, lora_alpha=2, fan_in_fan_out=True), x),
        (loralib.MergedLinear(6, 9, r=2, enable_lora=[True, False, True]), x),
        (loralib.Embedding(6, 5, r=3, lora_alpha=2), rng.integers(0, 6, (4, 3))),
        (loralib.Conv2d(6, 4, 3, r=2, groups=2), rng.standard_normal((2, 6, 5, 5), dtype=np.float32)),
    ]:
        scale = of_absolute_values(filled(layer, rng), data)[0]
        t = data if data.dtype.kind == "i" else Tensor(data)
        y = layer(t).data
        agree(layer.eval()(t).data, y, scale, type(layer).__name__)


# ------------------------------------------------------------------------------------------------------------------- the layers
LAYERS = {
    "Linear": (lambda: loralib.Linear(5, 4, r=2, lora_alpha=3), (2, 3, 5)),
    "Linear, turned": (lambda: loralib.Linear(5, 4, r=2, lora_alpha=3, fan_in_fan_out=True), (3, 5)),
    "MergedLinear": (lambda: loralib.MergedLinear(5, 6, r=2, enable_lora=[True, False, True]), (3, 5)),
    "MergedLinear, turned": (
        lambda: loralib.MergedLinear(5, 6, r=2, enable_lora=[False, True], fan_in_fan_out=True),
        (3, 5),
    ),
    "Embedding": (lambda: loralib.Embedding(7, 4, r=2, lora_alpha=3), None),
    "Conv1d": (lambda: loralib.Conv1d(4, 6, 3, r=2, lora_alpha=3, padding=1, groups=2), (2, 4, 5)),
    "Conv2d": (lambda: loralib.Conv2d(4, 6, 3, r=2, lora_alpha=3, stride=2), (2, 4, 5, 5)),
    "Conv3d": (lambda: loralib.Conv3d(2, 4, 2, r=2, lora_alpha=3, groups=2), (1, 2, 3, 3, 4)),
}


@pytest.mark.parametrize("make, shape", LAYERS.values(), ids=LAYERS)
def test_gradients_of_factors_inputs_and_bias(make, shape, xp, rng):
    layer = filled(make(), rng).to(xp)
    w = layer.frozen.data
    ids = None if shape else xp.asarray(rng.integers(0, 7, (3, 2)))
    home = layer.conv if isinstance(layer, loralib.ConvLoRA) else layer

    def run(a, b, *rest):
        layer.lora_A, layer.lora_B = a, b
        layer.frozen.data = w.astype(a.dtype)
        if shape:
            home.bias = rest[1]
        return layer(rest[0] if shape else ids)

    inputs = [rng.standard_normal(layer.lora_A.shape), rng.standard_normal(layer.lora_B.shape)]
    if shape:
        inputs += [rng.standard_normal(shape), rng.standard_normal(home.bias.shape)]
    check(run, *inputs, xp=xp, rng=rng)


@pytest.mark.parametrize("make, shape", LAYERS.values(), ids=LAYERS)
def test_layers_start_as_what_they_replace(make, shape, rng):
    """Δ = 0 at the start; the factor that is zero has a gradient and the other has none."""
    layer = make()
    x = Tensor(rng.standard_normal(shape, dtype=np.float32)) if shape else rng.integers(0, 7, (3, 2))
    y = layer(x)
    w, b = layer.frozen, getattr(layer, "conv", layer).bias
    if shape is None:
        base = w.data[x]
    elif isinstance(layer, loralib.ConvLoRA):
        base = layer.conv(x).data
    else:
        base = ops.linear(x, Tensor(layer._turned(w).data), b).data
    assert (y.data == base).all()
    y.backward(rng.standard_normal(y.shape, dtype=np.float32))
    random, zero = (layer.lora_B, layer.lora_A) if shape is None else (layer.lora_A, layer.lora_B)
    assert not zero.data.any() and zero.grad.any() and random.data.all() and not random.grad.any()
    assert not w.requires_grad and (b is None or b.requires_grad)  # the bias trains until it is marked


def test_the_start_is_uniform_within_loralibs_bounds():
    """Bound 1/√fan_in for weight, bias and A; an embedding's table and B come from N(0, 1)."""
    for layer, w, bound in [
        (loralib.Linear(64, 256, r=128), "weight", 1 / 8),
        (loralib.MergedLinear(64, 256, r=64, enable_lora=[True, False, True, False]), "weight", 1 / 8),
        (loralib.Conv2d(16, 64, 3, r=32), "conv.weight", 1 / 12),
    ]:
        state = layer.state_dict()
        a = 1 / math.sqrt(layer.lora_A.shape[1])
        for name, limit in ((w, bound), (w.replace("weight", "bias"), bound), ("lora_A", a)):
            assert limit * 0.95 < np.abs(state[name]).max() <= np.float32(limit), name
            assert abs(state[name].mean()) < limit / 5, name
    table = loralib.Embedding(256, 64, r=64)
    for w in (table.weight.data, table.lora_B.data):
        assert w.dtype == np.float32 and abs(w.std() - 1) < 0.1 and np.abs(w).max() > 3


@pytest.mark.parametrize("make, shape", LAYERS.values(), ids=LAYERS)
def test_layers_run_on_every_array_module(make, shape, xp, rng):
    host = filled(make(), rng)
    x = rng.standard_normal(shape, dtype=np.float32) if shape else rng.integers(0, 7, (3, 2))
    device, there = copy.deepcopy(host).to(xp), xp.asarray(x)
    y_scale, _, _, w_scale = of_absolute_values(host, x)
    for mode in (False, True):
        host.train(mode), device.train(mode)
        agree(backend.move(device.frozen.data, "cpu"), host.frozen.data, w_scale, f"weight after train({mode})")
        y, expected = device(Tensor(there) if shape else there), host(Tensor(x) if shape else x)
        agree(backend.move(y.data, "cpu"), expected.data, y_scale, f"y after train({mode})")


@pytest.mark.parametrize("enable", [[False], [False, False, False]])
def test_a_merged_linear_without_an_enabled_group_is_a_plain_layer(enable, rng):
    layer = loralib.MergedLinear(5, 6, r=2, enable_lora=enable)
    assert list(layer.state_dict()) == ["weight", "bias"] and layer.weight.requires_grad
    x, w = rng.standard_normal((3, 5), dtype=np.float32), layer.weight.data
    y = layer(Tensor(x))
    assert (y.data == x @ w.T + layer.bias.data).all()
    y.backward(np.ones_like(y.data))
    assert layer.weight.grad is not None
    layer.eval()
    assert layer.merged and layer.weight.data is w and (layer(Tensor(x)).data == y.data).all()
    assert loralib.MergedLinear(5, 6, r=2).enable_lora == [False]  # loralib's default


@pytest.mark.parametrize(
    "layer",
    [
        loralib.Linear(4, 3),
        loralib.Embedding(4, 3),
        loralib.Conv3d(2, 2, 2),
        loralib.MergedLinear(4, 3, enable_lora=[True]),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_with_r_0_a_layer_is_plain_and_its_weight_trains(layer):
    assert [name for name, _ in layer.trainable()] == list(layer.state_dict()) and layer.scaling == 0
    w = layer.frozen.data
    assert layer.eval().frozen.data is w and layer.merged
    assert layer.train().frozen.data is w and not layer.merged
    assert "lora_A" not in layer.state_dict()


def test_disabled_rows_are_left_alone_and_enabled_ones_have_factors_of_their_own(rng):
    layer = filled(loralib.MergedLinear(5, 9, r=2, lora_alpha=4, enable_lora=[True, False, True]), rng)
    a, b, delta = layer.lora_A.data, layer.lora_B.data, layer.delta()
    assert a.shape == (4, 5) and b.shape == (6, 2)
    np.testing.assert_allclose(delta[:3], 2 * b[:3] @ a[:2], rtol=1e-5)
    np.testing.assert_allclose(delta[6:], 2 * b[3:] @ a[2:], rtol=1e-5)
    assert not delta[3:6].any()


def test_dropout_falls_on_the_bypass_alone_and_a_convolution_ignores_it(rng):
    x = rng.standard_normal((50, 6), dtype=np.float32)
    layer = filled(loralib.Linear(6, 4, r=3, lora_alpha=6, lora_dropout=0.25, merge_weights=False), rng)
    w, b, A, B = (t.data for t in (layer.weight, layer.bias, layer.lora_A, layer.lora_B))
    tl.seed(3)
    y = layer(Tensor(x)).data
    tl.seed(3)
    dropped = x * (backend.generator().random(x.shape, dtype=np.float32) >= 0.25) / np.float32(0.75)
    np.testing.assert_allclose(y, x @ w.T + b + 2 * dropped @ A.T @ B.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(layer.eval()(Tensor(x)).data, x @ w.T + b + 2 * x @ A.T @ B.T, rtol=1e-4, atol=1e-4)
    conv = filled(loralib.Conv1d(6, 4, 3, r=2, lora_dropout=0.9), rng)
    t = Tensor(x.reshape(5, 6, 10))
    assert conv.lora_dropout == 0.9 and (conv(t).data == conv(t).data).all()


def test_quantizing_a_model_passes_by_what_holds_its_own_factors():
    model = nn.Module()
    model.plain, model.adapted = nn.Linear(8, 8), loralib.Linear(8, 8, r=2)
    nn.quantize_linears(model)
    assert isinstance(model.plain, nn.Linear4bit) and isinstance(model.adapted, loralib.Linear)


# --------------------------------------------------------------------------------------------------- convolutions over 1, 2, 3 axes
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_b_a_has_as_many_numbers_as_the_weight_whatever_the_axes(n, k, groups, rng):
    layer = filled(getattr(loralib, f"Conv{n}d")(4, 8, k, r=3, lora_alpha=6, groups=groups), rng)
    a, b, w = layer.lora_A.data, layer.lora_B.data, layer.conv.weight.data
    assert a.shape == (3 * k, 4 * k) and b.shape == (8 // groups * k ** (n - 1), 3 * k)
    assert (b @ a).size == w.size == math.prod((8, 4 // groups, *[k] * n))
    if n == 2 or k == 1:
        assert b.shape == (8 // groups * k, 3 * k)  # what loralib has for every n
    assert (layer.delta() == (b @ a).reshape(w.shape) * np.float32(2)).all()

    x = rng.standard_normal((2, 4, *(3, 4, 3)[:n]), dtype=np.float32)
    full = (w.astype(np.float64) + 2 * (b.astype(np.float64) @ a).reshape(w.shape), x.astype(np.float64))
    expected = plain(full[1], full[0], groups=groups) + layer.conv.bias.data.reshape(-1, *[1] * n)
    np.testing.assert_allclose(layer(Tensor(x)).data, expected, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(layer.eval()(Tensor(x)).data, expected, rtol=1e-4, atol=1e-3)


def test_a_row_of_b_a_is_a_stretch_of_the_weight_and_its_rank_may_exceed_r(rng):
    layer = filled(loralib.Conv3d(4, 5, 3, r=1), rng)
    product = layer.lora_B.data @ layer.lora_A.data
    assert (layer.delta().reshape(5, 9, 12) == product.reshape(5, 9, 12)).all()  # 3² rows of 4 · 3 for each filter
    assert np.linalg.matrix_rank(layer.delta().reshape(5, -1).astype(np.float64), tol=1e-4) > layer.r


# ------------------------------------------------------------------------------------------------------- what trains, what is saved
class Composite(nn.Module):
    def __init__(self):
        self.table = loralib.Embedding(7, 4, r=2)
        self.first = loralib.Linear(4, 6, r=2)
        self.bare = loralib.Linear(6, 6, r=2, bias=False)
        self.plain = nn.Linear(6, 6, bias=True)
        self.convs = [loralib.Conv1d(4, 4, 3, r=1), loralib.MergedLinear(4, 4, r=1, enable_lora=[True, False])]
        self.lora_head = nn.Linear(6, 2, bias=True)
        self.bias_net = nn.Linear(6, 2)


FACTORS = ["table.lora_A", "table.lora_B", "first.lora_A", "first.lora_B", "bare.lora_A", "bare.lora_B"]
FACTORS += ["convs.0.lora_A", "convs.0.lora_B", "convs.1.lora_A", "convs.1.lora_B"]
HEAD = ["lora_head.weight", "lora_head.bias"]  # "lora_" is looked for anywhere in the path, and so is "bias"
BIASES = {
    "none": [],
    "all": ["first.bias", "plain.bias", "convs.0.conv.bias", "convs.1.bias", "bias_net.weight"],
    "lora_only": ["first.bias", "convs.1.bias"],
}


@pytest.mark.parametrize("bias", BIASES)
def test_what_trains_is_what_is_saved(bias):
    model = Composite()
    model.plain.weight.grad = np.zeros((6, 6), np.float32)
    loralib.mark_only_lora_as_trainable(model, bias)
    expected = sorted(FACTORS + HEAD + BIASES[bias])
    assert sorted(name for name, _ in model.trainable()) == expected
    state = loralib.lora_state_dict(model, bias)
    assert sorted(state) == expected and state["first.lora_A"] is model.first.lora_A.data
    assert model.plain.weight.grad is None
    other = Composite()
    other.load_state_dict(state, strict=False)
    assert all((value == other.state_dict()[name]).all() for name, value in state.items())


def test_lora_only_puts_a_bias_behind_its_first_factor():
    keys = list(loralib.lora_state_dict(Composite(), "lora_only"))
    at = keys.index("first.lora_A")
    assert keys[at : at + 3] == ["first.lora_A", "first.bias", "first.lora_B"]


def test_a_factor_that_was_frozen_by_hand_stays_frozen():
    model = Composite()
    model.first.lora_A.requires_grad = False
    loralib.mark_only_lora_as_trainable(model)
    assert not model.first.lora_A.requires_grad and model.first.lora_B.requires_grad


# --------------------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: loralib.Linear(4, 3, r=-1), "loralib.Linear: r = -1, expected a whole number, 0 or more"),
        (lambda: loralib.Embedding(4, 3, r=1.5), "loralib.Embedding: r = 1.5"),
        (lambda: loralib.Linear(4, 3, lora_dropout=1), "expected 0 <= lora_dropout < 1"),
        (
            lambda: loralib.MergedLinear(4, 6, enable_lora=[True] * 4),
            "4 entries, expected a number that divides out_features = 6",
        ),
        (lambda: loralib.MergedLinear(4, 6, enable_lora=[]), "0 entries"),
        (lambda: loralib.Conv2d(4, 6, (3, 3)), "loralib.Conv2d: kernel_size = (3, 3), expected one whole number"),
        (lambda: loralib.Conv2d(4, 6, 3, groups=3), "groups = 3 must divide"),
        (lambda: loralib.lora_state_dict(nn.Module(), "some"), "bias = 'some', expected 'none', 'all' or 'lora_only'"),
    ],
)
def test_bad_input_gets_a_sentence(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert words in str(error.value)


def test_an_unknown_bias_changes_nothing():
    model = Composite()
    before = [w.requires_grad for w in model.parameters()]
    with pytest.raises(ValueError, match="bias = 'lora'"):
        loralib.mark_only_lora_as_trainable(model, "lora")
    assert [w.requires_grad for w in model.parameters()] == before
