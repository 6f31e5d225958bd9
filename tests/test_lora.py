"""One adapted layer: what it computes, what it leaves alone, and what merging makes of it."""

import numpy as np
import pytest

from tinylora import LoRALinear, Tensor, backend, codebooks, ops, quantize
from tinylora.adapters.conv import Conv1d, Conv2d, Conv3d
from tinylora.adapters.kinds import LoRAConv, LoRAEmbedding, lora_layer
from tinylora.lora import LinearBypass
from tinylora.nn import Embedding, Linear, Linear4bit, Linear16bit

BASES = {"dense": lambda w: w, "4 bits": Linear4bit.of, "16 bits": Linear16bit.of}


def layer(kind, out=12, inn=64, **options):
    return LoRALinear(BASES[kind](Linear(inn, out)), **options)


def host(x):
    return backend.move(x, "cpu")


@pytest.mark.parametrize("kind", BASES)
def test_before_the_first_step_the_output_is_the_bases_bit_for_bit(kind, xp, rng):
    h = layer(kind).to(xp)
    x = Tensor(xp.asarray(rng.standard_normal((5, 64)).astype(np.float32)))
    assert host(h(x).data).tobytes() == host(h.base_layer(x).data).tobytes()


@pytest.mark.parametrize("kind", BASES)
def test_at_step_0_the_gradient_of_A_is_exactly_zero_and_that_of_B_is_not(kind, xp, rng):
    h = layer(kind).to(xp)
    x = Tensor(xp.asarray(rng.standard_normal((5, 64)).astype(np.float32)), requires_grad=True)
    (h(x) * h(x)).sum().backward()
    assert bool((h.lora_A.weight.grad == 0).all())
    assert bool((h.lora_B.weight.grad != 0).all())
    assert [name for name, _ in h.trainable()] == ["bypasses.default.lora_A.weight", "bypasses.default.lora_B.weight"]


def test_the_bypass_is_equation_3(rng):
    h = layer("dense", r=4, alpha=10)
    h.lora_B.weight.data = rng.standard_normal((12, 4)).astype(np.float32)
    x = rng.standard_normal((7, 64)).astype(np.float32)
    w, a, b = (m.weight.data.astype(np.float64) for m in (h.base_layer, h.lora_A, h.lora_B))
    np.testing.assert_allclose(h(Tensor(x)).data, x @ (w + 10 / 4 * b @ a).T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(h.delta(), 10 / 4 * b @ a, rtol=1e-5, atol=1e-6)


def test_gradients_are_s_Bt_G_and_s_G_At(rng):
    h = layer("dense", r=4, alpha=10)
    h.lora_B.weight.data = rng.standard_normal((12, 4)).astype(np.float32)
    x, g = rng.standard_normal((7, 64)).astype(np.float32), rng.standard_normal((7, 12)).astype(np.float32)
    h(Tensor(x)).backward(g)
    big_g = g.T @ x  # ∂L/∂W, which is never formed
    np.testing.assert_allclose(h.lora_A.weight.grad, 2.5 * h.lora_B.weight.data.T @ big_g, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(h.lora_B.weight.grad, 2.5 * big_g @ h.lora_A.weight.data.T, rtol=1e-3, atol=1e-3)


def test_the_gradient_of_x_goes_through_the_dequantized_weight(rng):
    base = Linear(64, 12)
    q = Linear4bit.of(base)
    x, g = (
        Tensor(rng.standard_normal((5, 64)).astype(np.float32), requires_grad=True),
        rng.standard_normal((5, 12)).astype(np.float32),
    )
    q(x).backward(g)
    np.testing.assert_allclose(x.grad, g @ q.dense(), rtol=1e-5, atol=1e-5)
    assert np.abs(x.grad - g @ base.dense()).max() > 1e-3


def test_bfloat16_compute_rounds_operands_and_result(xp, rng):
    from tinylora.dtypes import round_to

    q = Linear4bit.of(Linear(64, 12), compute_dtype="bfloat16").to(xp)
    x = rng.standard_normal((5, 64)).astype(np.float32)
    w, xr = host(q.weight.dequantize("bfloat16")), round_to(x, "bfloat16")
    y = q(Tensor(xp.asarray(x))).numpy()
    assert y.tobytes() == round_to(y, "bfloat16").tobytes()
    np.testing.assert_allclose(y, xr.astype(np.float64) @ w.T, rtol=2**-8, atol=1e-6)


def test_initial_A(rng):
    a = layer("dense", inn=400, r=50).lora_A.weight.data
    assert np.abs(a).max() <= 1 / 20 and abs(a.std() - 1 / 20 / 3**0.5) < 1e-3
    a = layer("dense", inn=400, r=50, init="gaussian").lora_A.weight.data
    assert abs(a.std() - 1 / 50) < 1e-3
    with pytest.raises(ValueError, match="init 'zeros' is unknown"):
        layer("dense", init="zeros")


def test_dropout_is_for_training_only(rng):
    h = layer("dense", dropout=0.5)
    h.lora_B.weight.data = rng.standard_normal((12, 8)).astype(np.float32)
    x = Tensor(rng.standard_normal((5, 64)).astype(np.float32))
    assert (h(x).data != h(x).data).any()
    h.eval()
    assert (h(x).data == h(x).data).all()


# -------------------------------------------------------------------------------------------------------------------- merging
def test_merging_a_dense_layer_is_exact_to_rounding_and_leaves_the_base_alone(rng):
    h = layer("dense", r=4)
    h.lora_B.weight.data = rng.standard_normal((12, 4)).astype(np.float32)
    before = h.base_layer.weight.data.copy()
    merged = h.merge()
    x = Tensor(rng.standard_normal((7, 64)).astype(np.float32))
    np.testing.assert_allclose(merged(x).data, h(x).data, rtol=1e-4, atol=1e-5)
    assert (h.base_layer.weight.data == before).all() and isinstance(merged, Linear) and merged.merge_error == 0


def test_merging_into_4_bits_reports_its_error(xp, rng):
    h = layer("4 bits", r=4).to(xp)
    h.lora_B.weight.data = xp.asarray((0.1 * rng.standard_normal((12, 4))).astype(np.float32))
    merged = h.merge()
    assert isinstance(merged, Linear4bit) and merged.weight.double_quant and merged.weight.code_name == "nf4"
    wanted = host(h.base_layer.dense() + h.delta())
    error = np.linalg.norm(host(merged.dense()) - wanted) / np.linalg.norm(wanted)
    assert merged.merge_error == pytest.approx(error, rel=1e-5) and 0.01 < error < 0.2


def test_merging_into_4_bits_keeps_how_the_layer_multiplies(rng):
    q = quantize(rng.standard_normal((8, 64), dtype=np.float32))
    merged = LoRALinear(Linear4bit(q, compute_dtype="bfloat16", backward_weight="forward"), r=2).merge()
    assert (merged.compute_dtype, merged.backward_weight) == ("bfloat16", "forward")


def test_merging_into_4_bits_keeps_every_setting(rng):
    """A merge quantizes again as the base was quantized, so a zero adapter changes (almost) nothing."""
    w = rng.standard_normal((64, 256)).astype(np.float32)
    for how in (
        {"code": codebooks.bof4(64, signed=True), "signed": True},
        {"double_quant": True, "nested_code": "int8"},
        {"double_quant": True, "offset": 0.0},
        {"rule": "bitsandbytes-cuda", "code": "fp4"},
    ):
        q = quantize(w, **how)
        layer = LoRALinear(Linear4bit(q), r=2, alpha=4)
        again = layer.merge().weight
        assert (again.code == q.code).all() and (again.signed, again.rule) == (q.signed, q.rule)
        if q.double_quant:
            assert (again.constants.code == q.constants.code).all() and (again.offset == 0) == (q.offset == 0)
        assert layer.merge().merge_error < 0.004
    zeros = LoRALinear(Linear4bit(quantize(np.zeros((64, 256), np.float32), double_quant=True)), r=2, alpha=4)
    zeros.lora_B.weight.data = rng.standard_normal((64, 2)).astype(np.float32)
    assert zeros.merge().weight.offset != 0  # a weight of zeros has the mean 0, and is not one without a mean


# ------------------------------------------------------------------------------------------------- the other kinds of bypass
def trained(bypass_owner, rng):
    """Random values for every trained array of a layer, so that nothing is zero."""
    for _, p in bypass_owner.trainable():
        p.data = backend.move((0.3 * rng.standard_normal(p.shape)).astype(np.float32), backend.array_module(p.data))
    return bypass_owner


def embedding():
    return LoRAEmbedding(Embedding(11, 6), r=3, alpha=5)


def conv(axes, **options):
    kind = (Conv1d, Conv2d, Conv3d)[axes - 1]
    return LoRAConv(kind(4, 6, 3, stride=2, padding=1, dilation=2, **options), r=2, alpha=5)


SAMPLES = {
    "embedding": (embedding, lambda rng: rng.integers(0, 11, (2, 5))),
    "conv1d": (lambda: conv(1), lambda rng: rng.standard_normal((2, 4, 9)).astype(np.float32)),
    "conv2d": (lambda: conv(2), lambda rng: rng.standard_normal((2, 4, 9, 8)).astype(np.float32)),
    "conv3d": (lambda: conv(3, bias=False), lambda rng: rng.standard_normal((2, 4, 5, 6, 7)).astype(np.float32)),
    "linear": (lambda: layer("dense", r=3, alpha=5), lambda rng: rng.standard_normal((4, 64)).astype(np.float32)),
}


@pytest.mark.parametrize("kind", SAMPLES)
def test_every_kind_starts_as_its_base_bit_for_bit_and_merges_to_what_it_computes(kind, xp, rng):
    make, draw = SAMPLES[kind]
    h, x = make().to(xp), xp.asarray(draw(rng))
    assert h(x).numpy().tobytes() == h.base_layer(x).numpy().tobytes()
    h = trained(h, rng)
    y = h(x).numpy()
    assert np.abs(y - h.base_layer(x).numpy()).max() > 0.01
    np.testing.assert_allclose(h.merge()(x).numpy(), y, rtol=1e-4, atol=1e-4)
    b, a = h.bypasses["default"].factors()
    assert (
        np.linalg.matrix_rank(host(h.delta()).reshape(len(h.delta()), -1))
        == h.r
        == host(a).shape[0]
        == host(b).shape[1]
    )


def test_an_embeddings_bypass_is_the_other_way_round():
    """loralib's and PEFT's embedding: A zero, B random. At the first step A has a gradient and B has none."""
    h = LoRAEmbedding(Embedding(11, 600), r=100)
    assert (h.lora_A.weight.data == 0).all() and abs(h.lora_B.weight.data.std() - 1) < 0.02
    h(np.array([[3, 4]])).sum().backward()
    assert (h.lora_B.weight.grad == 0).all()
    assert {j for j in range(11) if (h.lora_A.weight.grad[:, j] != 0).any()} == {3, 4}


def test_a_grouped_convolution_runs_but_cannot_be_merged(rng):
    h = trained(LoRAConv(Conv2d(4, 6, 3, groups=2), r=2), rng)
    x = rng.standard_normal((2, 4, 5, 5)).astype(np.float32)
    assert h(x).shape == (2, 6, 3, 3)
    with pytest.raises(ValueError, match="2 groups, so B A has no place in its weight"):
        h.merge()
    with pytest.raises(ValueError, match="r = 3 must be a multiple of the convolution's groups = 2"):
        LoRAConv(Conv2d(4, 6, 3, groups=2), r=3)


def test_rslora_scales_by_alpha_over_the_root_of_r():
    assert layer("dense", r=16, alpha=8).scaling == 0.5
    assert layer("dense", r=16, alpha=8, use_rslora=True).scaling == 2.0


def test_doubling_r_at_fixed_alpha_halves_the_scale():
    assert layer("dense", r=8, alpha=10).scaling == 2 * layer("dense", r=16, alpha=10).scaling


def test_the_bias_of_B_is_scaled_in_the_forward_and_in_the_merge(rng):
    for kind in BASES:
        h = trained(layer(kind, r=4, alpha=12, lora_bias=True), rng)
        x = Tensor(rng.standard_normal((5, 64)).astype(np.float32))
        bias = h.lora_B.bias.data
        np.testing.assert_allclose(h(Tensor(np.zeros((1, 64), np.float32))).data[0], 3 * bias, rtol=1e-6)
        np.testing.assert_allclose(h.merge().bias.data, 3 * bias, rtol=1e-6)
        if kind == "dense":
            np.testing.assert_allclose(h.merge()(x).data, h(x).data, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="use_dora and lora_bias do not go together"):
        layer("dense", use_dora=True, lora_bias=True)
    with pytest.raises(ValueError, match="lora_bias is for linear layers"):
        LoRAEmbedding(Embedding(4, 4), lora_bias=True)


# ------------------------------------------------------------------------------------------------------------------------ DoRA
@pytest.mark.parametrize("kind", SAMPLES)
def test_dora_starts_as_its_base_and_is_equation_5(kind, xp, rng):
    """DoRA eq. 5: W' = m (W₀ + s B A)/‖W₀ + s B A‖, one norm for each output."""
    make, draw = SAMPLES[kind]
    plain = make()
    h = lora_layer(plain.base_layer, r=2, alpha=6, use_dora=True).to(xp)
    x = xp.asarray(draw(rng))
    np.testing.assert_allclose(h(x).numpy(), h.base_layer(x).numpy(), rtol=2e-6, atol=2e-6)
    h = trained(h, rng)
    w = host(h.base_layer.dense()) + host(h.delta())
    axes = 0 if kind == "embedding" else tuple(range(1, w.ndim))
    direction = w / np.sqrt((w * w).sum(axes, keepdims=True))
    m = host(h.magnitude.data)
    expected = direction * (m if kind == "embedding" else m.reshape(-1, *[1] * (w.ndim - 1)))
    np.testing.assert_allclose(host(h.merged()), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(h.merge()(x).numpy(), h(x).numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [[2], [0, 11], list(range(12))])
def test_dora_leaves_a_row_of_zeros_as_it_is(rows, xp, rng):
    """A pruned or padded output has no direction: output, merged weight and gradients stay finite, and the first output is the base's."""
    base = Linear(64, 12, bias=True)
    base.weight.data[rows] = 0
    base.bias.data[:] = rng.standard_normal(12)
    x = Tensor(xp.asarray(rng.standard_normal((5, 64)).astype(np.float32)))
    h = lora_layer(base, r=2, use_dora=True).to(xp)
    assert host(h(x).data).tobytes() == host(h.base_layer(x).data).tobytes()
    assert not host(h.merge().dense())[rows].any()
    h(x).sum().backward()
    assert all(np.isfinite(host(p.grad)).all() for _, p in h.trainable())


def test_dora_on_an_embedding_with_a_column_of_zeros(rng):
    table = Embedding(7, 4)
    table.weight.data[:, 1] = 0
    h = lora_layer(table, r=2, use_dora=True)
    ids = np.arange(7)
    assert h(ids).data.tobytes() == table(ids).data.tobytes() and np.isfinite(h.merge().dense()).all()


def test_doras_norm_gets_no_gradient_and_its_parts_the_ones_of_the_paper(rng):
    """DoRA §4.3, with n held constant: ∂L/∂m = Σ ḡ ⊙ (V x)/n, and B's gradient is LoRA's times m/n."""
    h = trained(layer("dense", r=4, alpha=4, use_dora=True), rng)
    x, g = rng.standard_normal((7, 64)).astype(np.float32), rng.standard_normal((7, 12)).astype(np.float32)
    h(Tensor(x)).backward(g)
    v = h.base_layer.dense() + h.delta()
    n, m = np.linalg.norm(v, axis=1), h.magnitude.data
    np.testing.assert_allclose(h.magnitude.grad, (g * (x @ v.T) / n).sum(0), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(
        h.lora_B.weight.grad, ((g * (m / n)).T @ x) @ h.lora_A.weight.data.T, rtol=1e-3, atol=1e-3
    )


def test_dora_with_dropout_scales_the_base_of_the_dropped_input(rng):
    h = trained(layer("dense", r=4, dropout=0.5, use_dora=True), rng)
    x = Tensor(rng.standard_normal((5, 64)).astype(np.float32))
    with backend.using_generator(np.random.default_rng(3)):
        y = h(x).data
    with backend.using_generator(np.random.default_rng(3)):
        dropped = ops.dropout(x, 0.5).data
    w, factor = h.base_layer.dense(), h.magnitude.data / h.bypasses["default"].norm(h.base_layer)
    low = dropped @ h.lora_A.weight.data.T @ h.lora_B.weight.data.T * h.scaling
    np.testing.assert_allclose(y, x.data @ w.T + (factor - 1) * (dropped @ w.T) + factor * low, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------- several bypasses on one base
def test_active_bypasses_add_up(rng):
    h = layer("dense", r=2, alpha=4)
    h.bypasses["b"] = LinearBypass(h.base_layer, r=3, alpha=6)
    h.bypasses["c"] = LinearBypass(h.base_layer, r=3, alpha=6, use_dora=True)
    for bypass in h.bypasses.values():
        trained(bypass, rng)
    x = Tensor(rng.standard_normal((5, 64)).astype(np.float32))
    base = h.base_layer(x).data
    alone = {}
    for name in h.bypasses:
        h.active = (name,)
        alone[name] = h(x).data - base
    for names in (("default", "b"), ("b", "default"), ("default", "c"), ("default", "b", "c"), ()):
        h.active = names
        total = base + sum(alone[n] for n in names)
        np.testing.assert_allclose(h(x).data, total, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(h.merge()(x).data, total, rtol=1e-4, atol=1e-4)
    with pytest.raises(AttributeError, match="0 adapters are active here"):
        h.lora_A  # noqa: B018
