"""loralib as a witness: its layers compute the same thing from the same random numbers, forward, backward and merged.

Whatever goes through a matrix product is compared within a tolerance, since another BLAS adds in another order: in every entry, relative
to the absolute values that are added up there, so that it means something where terms cancel; it is printed (pytest -s shows it). What
follows the product, W + s B A and back, is compared bit for bit: with torch's own B A in place of NumPy's, with one-term products (r = 1),
and with factors whose products are exact.

Where loralib fails, the test says how: a convolution over one or three axes with a kernel above 1, a MergedLinear whose groups are all
disabled, an unknown `bias`.
"""

import inspect

import numpy as np
import pytest
from test_loralib import of_absolute_values

from tinylora import Tensor, nn
from tinylora.interop import loralib

pytestmark = pytest.mark.oracle

torch = pytest.importorskip("torch")
theirs = pytest.importorskip("loralib")

#: Difference over the sum of the absolute values of what is added, in every entry, in float32. Measured on a CPU: up to 3e-7.
TOLERANCE = 1e-6


@pytest.fixture(autouse=True)
def one_thread():
    """torch adds in another order on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def agree(ours, tensor, scale, what):
    """|ours − theirs| <= TOLERANCE · scale in every entry; where nothing was added (scale 0) the two are equal."""
    expected = tensor.detach().numpy()
    assert ours.shape == expected.shape == scale.shape and ours.dtype == expected.dtype, what
    difference = np.abs(ours - expected)
    assert not difference[scale == 0].any(), what
    error = (difference / np.where(scale == 0, 1, scale)).max(initial=0)
    print(f"{what}: relative error {error:.2e} (allowed {TOLERANCE:.0e})")
    assert error <= TOLERANCE, f"{what}: relative error {error:.2e}"


def same_bits(ours, tensor):
    expected = np.ascontiguousarray(tensor.detach().numpy())
    return ours.shape == expected.shape and np.ascontiguousarray(ours).tobytes() == expected.tobytes()


def frozen(layer):
    return layer.conv.weight if hasattr(layer, "conv") else layer.weight


def pair(kind, arguments, options, draw):
    """loralib's layer and ours with the same numbers, every parameter drawn anew."""
    a, b = (getattr(library, kind)(*arguments, **options) for library in (theirs, loralib))
    with torch.no_grad():
        for p in a.parameters():
            p.copy_(torch.from_numpy(draw(tuple(p.shape))))
    state = a.state_dict()
    assert list(state) == list(b.state_dict())
    b.load_state_dict({name: value.numpy().copy() for name, value in state.items()})
    assert {n: p.requires_grad for n, p in a.named_parameters()} == {
        n: p.requires_grad for n, p in b.named_parameters()
    }
    return a, b


def normal(rng):
    return lambda shape: rng.standard_normal(shape, dtype=np.float32)


def arbitrary(kind, rng):
    """(arguments, options, input) of a layer of this kind, all drawn."""

    def n(low, high):
        return int(rng.integers(low, high))

    options = {"r": n(0, 9), "lora_alpha": n(1, 20), "merge_weights": bool(rng.random() < 0.8)}
    if kind == "Embedding":
        arguments = n(2, 40), n(1, 30)
        return arguments, options, rng.integers(0, arguments[0], (n(1, 5), n(1, 9)))
    options["bias"] = bool(rng.random() < 0.7)
    if kind in ("Linear", "MergedLinear"):
        options["fan_in_fan_out"] = bool(rng.random() < 0.5)
        groups = n(1, 5)
        if kind == "MergedLinear":
            enable = [bool(on) for on in rng.random(groups) < 0.6]
            enable[n(0, groups)] = True
            options["enable_lora"] = enable
        arguments = n(1, 40), groups * n(1, 15)
        return arguments, options, rng.standard_normal((n(1, 4), n(1, 6), arguments[0]), dtype=np.float32)
    axes, groups = int(kind[4]), n(1, 4)
    k = n(1, 4) if axes == 2 else 1
    options |= {"groups": groups, "stride": n(1, 3), "padding": n(0, 3), "dilation": n(1, 3)}
    arguments = groups * n(1, 4), groups * n(1, 4), k
    space = [options["dilation"] * (k - 1) + n(1, 6) for _ in range(axes)]
    return arguments, options, rng.standard_normal((n(1, 3), arguments[0], *space), dtype=np.float32)


KINDS = ("Linear", "MergedLinear", "Embedding", "Conv1d", "Conv2d", "Conv3d")


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_gradients_and_merged_weights_are_loralibs(kind, rng):
    for _ in range(30):
        arguments, options, x = arbitrary(kind, rng)
        if not options["r"]:
            options["merge_weights"] = True
        a, b = pair(kind, arguments, options, normal(rng))
        print(kind, arguments, options, x.shape)
        t = torch.from_numpy(x).requires_grad_(kind != "Embedding")
        u = x if kind == "Embedding" else Tensor(x, requires_grad=True)
        y, z = a(t), b(u)
        g = rng.standard_normal(z.shape, dtype=np.float32)
        y_scale, x_scale, scales, w_scale = of_absolute_values(b, x, g)
        agree(z.data, y, y_scale, "y")
        y.backward(torch.from_numpy(g))
        z.backward(g)
        if kind != "Embedding":
            agree(u.grad, t.grad, x_scale, "gradient of x")
        gradients = {name: w.grad for name, w in b.named_parameters()}
        for name, p in a.named_parameters():
            assert (p.grad is None) == (gradients[name] is None), name
            if p.grad is not None:
                agree(gradients[name], p.grad, scales[name], f"gradient of {name}")
        for mode in (False, True, True, False):
            a.train(mode), b.train(mode)
            assert (a.merged, a.training) == (b.merged, b.training)
            agree(frozen(b).data, frozen(a), w_scale, f"weight after train({mode})")
            agree(b(u).data, a(t), y_scale, f"y after train({mode})")


@pytest.mark.parametrize("kind", KINDS)
def test_merging_and_unmerging_is_loralibs_in_every_bit(kind, rng):
    """An entry of B A is a sum of r terms (of r k in a convolution), which torch rounds in another way where matrices are small."""

    def exact(shape):  # small whole numbers over 4: sums of their products have no rounding
        return (rng.integers(-8, 9, shape) / 4).astype(np.float32)

    for trial in range(30):
        arguments, options, _ = arbitrary(kind, rng)
        way = ("one term", "exact", "torch's product")[trial % 3]
        options |= {"r": 1 if way == "one term" else int(rng.integers(1, 9)), "merge_weights": True}
        if way == "one term" and kind.startswith("Conv"):
            arguments = *arguments[:2], 1
        a, b = pair(kind, arguments, options, exact if way == "exact" else normal(rng))
        with torch.no_grad():  # no matter how W was drawn, it must round
            frozen(a).copy_(torch.from_numpy(rng.standard_normal(tuple(frozen(a).shape), dtype=np.float32)))
        frozen(b).data = frozen(a).detach().numpy().copy()
        if way == "torch's product":
            b.update = lambda a=a: Tensor(product(a).detach().numpy().copy())
        for _ in range(2):
            a.eval(), b.eval()
            assert same_bits(frozen(b).data, frozen(a)), (way, "merged", arguments, options)
            a.train(), b.train()
            assert same_bits(frozen(b).data, frozen(a)), (way, "restored", arguments, options)


def product(layer):
    """B A as loralib adds it, in the layout of its weight."""
    if isinstance(layer, theirs.MergedLinear):
        return layer.merge_AB()
    ba = layer.lora_B @ layer.lora_A
    if isinstance(layer, theirs.Embedding) or getattr(layer, "fan_in_fan_out", False):
        return ba.T
    return ba.view(frozen(layer).shape)


def test_loralib_does_not_give_the_weight_back_either(rng):
    a, b = pair("Linear", (256, 256), {"r": 8, "lora_alpha": 8}, normal(rng))
    before = a.weight.detach().clone()
    a.eval(), b.eval()
    a.train(), b.train()
    exact = (a.weight == before).float().mean().item()
    print(
        f"{exact:.2%} of the entries exact; the same bits as ours: {(a.weight.detach().numpy() == b.weight.data).mean():.2%}"
    )
    assert 0.43 <= exact <= 0.49 and 0 < (a.weight - before).abs().max() <= 1e-6


def test_a_dropped_input_reaches_the_bypass_alone(rng):
    options = {"r": 3, "lora_alpha": 6, "enable_lora": [True, False]}
    a, b = pair("MergedLinear", (8, 10), options, normal(rng))
    mask = (rng.random((5, 8)) < 0.6).astype(np.float32) / np.float32(0.6)
    a.lora_dropout = lambda x: x * torch.from_numpy(mask)
    b._dropped = lambda x: x * Tensor(mask)
    x = rng.standard_normal((5, 8), dtype=np.float32)
    y, *_ = of_absolute_values(b, x)
    agree(b(Tensor(x)).data, a(torch.from_numpy(x)), 2 * y, "y")  # 1/0.6 < 2: what the mask multiplies by


# -------------------------------------------------------------------------------------------------------- where loralib fails
@pytest.mark.parametrize("kind, space", [("Conv1d", (5,)), ("Conv3d", (4, 4, 4))])
def test_loralibs_other_convolutions_fail_with_a_kernel_above_1_and_ours_have_its_first_factor(kind, space, rng):
    a, b = (getattr(library, kind)(4, 6, 3, r=2) for library in (theirs, loralib))
    x = rng.standard_normal((1, 4, *space), dtype=np.float32)
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        a(torch.from_numpy(x))
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        a.eval()
    assert tuple(a.lora_A.shape) == b.lora_A.shape and tuple(a.lora_B.shape) == (18, 6)
    assert b.lora_B.shape == {"Conv1d": (6, 6), "Conv3d": (54, 6)}[kind] and b(Tensor(x)).shape[:2] == (1, 6)


def test_loralibs_default_merged_linear_fails_in_train_mode_and_works_in_eval_mode(rng):
    a, b = theirs.MergedLinear(5, 6, r=2), loralib.MergedLinear(5, 6, r=2)
    x = rng.standard_normal((3, 5), dtype=np.float32)
    with pytest.raises(AttributeError):
        a(torch.from_numpy(x))
    b.load_state_dict({name: value.numpy() for name, value in a.state_dict().items()})
    assert a.eval() is None and a.train() is None  # loralib's layers return nothing where torch's return themselves
    a.eval()
    agree(b(Tensor(x)).data, a(torch.from_numpy(x)), of_absolute_values(b, x)[0], "y")


def test_the_comment_over_the_start_of_loralibs_embedding_says_the_opposite():
    said = "initialize A the same way as the default for nn.Linear and B to zero"
    for kind, shape in (("Linear", (5, 6)), ("Embedding", (5, 6))):
        layer = getattr(theirs, kind)(*shape, r=2)
        assert said in inspect.getsource(type(layer).reset_parameters)
        a, b = bool(layer.lora_A.any()), bool(layer.lora_B.any())
        assert (a, b) == ((True, False) if kind == "Linear" else (False, True)), kind


def test_the_mask_of_enabled_rows_is_no_buffer():
    a = theirs.MergedLinear(5, 6, r=2, enable_lora=[True, False])
    assert a.lora_ind.dtype == torch.bool and not list(a.buffers()) and "lora_ind" not in a.state_dict()


def test_eval_between_forward_and_backward_spoils_loralibs_gradient_and_not_ours(rng):
    """loralib writes into `weight.data`, which autograd does not see: x̄ comes out with the merged weight."""
    a, b = pair("Linear", (6, 5), {"r": 2}, normal(rng))
    x, g = rng.standard_normal((3, 6), dtype=np.float32), rng.standard_normal((3, 5), dtype=np.float32)

    def gradients(spoil):
        t, u = torch.from_numpy(x).requires_grad_(), Tensor(x, requires_grad=True)
        a.train(), b.train()
        y, z = a(t), b(u)
        if spoil:
            a.eval(), b.eval()
        y.backward(torch.from_numpy(g))
        z.backward(g)
        return t.grad, u.grad

    right, ours = gradients(False)
    spoiled, same = gradients(True)
    scale = of_absolute_values(b, x, g)[1]
    agree(ours, right, scale, "gradient of x")
    agree(same, right, scale, "gradient of x with eval() in between")
    assert (spoiled - right).abs().max() > 0.01


# ------------------------------------------------------------------------------------------------------- what trains, what is saved
def composite(library, base, linear, listed):
    class Model(base):
        def __init__(self):
            super().__init__()
            self.table = library.Embedding(7, 4, r=2)
            self.first = library.Linear(4, 6, r=2)
            self.bare = library.Linear(6, 6, r=2, bias=False)
            self.without = library.Linear(6, 6)
            self.plain = linear(6, 6, bias=True)
            self.merged = library.MergedLinear(6, 6, r=1, enable_lora=[True, False])
            self.convs = listed([library.Conv1d(4, 4, 1, r=1), library.Conv2d(4, 4, 3, r=1, bias=False)])
            self.lora_head = linear(6, 2, bias=True)
            self.bias_net = linear(6, 2, bias=False)

    return Model()


def models():
    a = composite(theirs, torch.nn.Module, torch.nn.Linear, torch.nn.ModuleList)
    b = composite(loralib, nn.Module, nn.Linear, list)
    assert list(a.state_dict()) == list(b.state_dict())
    b.load_state_dict({name: value.numpy().copy() for name, value in a.state_dict().items()})
    return a, b


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_what_trains_and_what_is_saved_is_loralibs(bias):
    a, b = models()
    theirs.mark_only_lora_as_trainable(a, bias)
    loralib.mark_only_lora_as_trainable(b, bias)
    trainable = [name for name, p in a.named_parameters() if p.requires_grad]
    assert [name for name, _ in b.trainable()] == trainable
    expected, state = theirs.lora_state_dict(a, bias), loralib.lora_state_dict(b, bias)
    assert list(state) == list(expected) and all(same_bits(state[name], expected[name]) for name in state)
    assert ("bias_net.weight" in state) == (bias == "all") and "lora_head.weight" in state
    assert ("without.bias" in trainable, "without.bias" in state) == (
        bias != "none",
        bias == "all",
    )  # no factor, no bias saved


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_loralib_opens_what_is_saved_here(bias, rng):
    a, b = models()
    for w in b.parameters():
        w.data = rng.standard_normal(w.shape, dtype=np.float32)
    state = loralib.lora_state_dict(b, bias)
    result = a.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()}, strict=False)
    assert not result.unexpected_keys
    assert all(same_bits(value, a.state_dict()[name]) for name, value in state.items())


def test_loralib_freezes_everything_before_it_refuses_an_unknown_bias():
    a, b = models()
    with pytest.raises(NotImplementedError):
        theirs.mark_only_lora_as_trainable(a, "some")
    assert not a.first.bias.requires_grad
    with pytest.raises(ValueError, match="bias = 'some'"):
        loralib.mark_only_lora_as_trainable(b, "some")
    assert b.first.bias.requires_grad
