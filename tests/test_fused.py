"""A layer and its bypass as one operation on the host: the bits of the composed layer, and where a layer is composed."""

import dataclasses

import numpy as np
import pytest
import tiny

from tinylora import Tensor, add_lora, no_grad, ops, quantize, quantize_linears, tape_bytes
from tinylora.lora import LoRALayer, LoRALinear
from tinylora.models.eightbit import Linear8bit
from tinylora.nn import Linear, Linear4bit, Linear16bit
from tinylora.tape import checkpoint
from tinylora.tensor import setting

f32 = np.float32


@pytest.fixture
def both(monkeypatch):
    """both(f) = (f() in one operation a layer, f() composed)"""

    def run(f):
        in_one = f()
        with monkeypatch.context() as patch:
            patch.setattr(LoRALayer, "fused_forward", lambda layer, x: None)
            return in_one, f()

    return run


def same(ours, theirs):
    """Whether the arrays are equal in every bit, the signs of zeros included; None equals None."""

    def bits(x):
        return x if x is None else (x.shape, x.dtype, x.tobytes())

    return list(map(bits, ours)) == list(map(bits, theirs))


def base_of(kind, out, n, rng, backward):
    """A frozen layer whose weight is in bfloat16, or in NF4 and comes from a weight of that dtype."""
    dense = Linear(n, out)
    dense.weight.data = rng.standard_normal((out, n)).astype(f32)
    if kind == "bfloat16":
        return Linear16bit.of(dense)
    q = quantize(dense.weight.data, double_quant=True)
    return Linear4bit(dataclasses.replace(q, dtype=kind), backward_weight=backward)


@pytest.mark.parametrize("kind", ["in rows", "in columns", "float64", "one number"])
@pytest.mark.parametrize("trained", ["x A B", "A B", "x A", "x B", "B"])
@pytest.mark.parametrize("rows, n, out", [((2, 7), 64, 24), ((5,), 21, 13), ((1, 1), 32, 7), ((0, 3), 16, 4)])
def test_one_operation_has_the_bits_of_the_composed_layers(rows, n, out, trained, kind, both, rng):
    """Several layers on one x, whose gradient is the sum over them; ranks, scales and bases differ; a checkpoint makes them again.

    kind: how x and the output's gradient lie. With a frozen factor both are composed.
    """
    kinds = [
        ("float32", "stored", 4, 8),
        ("bfloat16", "stored", 1, 1),
        ("float16", "stored", 8, 2),  # the backward pass multiplies by a weight that is rounded to float16
        ("float16", "forward", 4, 2),
    ]
    bases = [base_of(kind, out, n, rng, backward) for kind, backward, _, _ in kinds]
    factors = [[rng.standard_normal(s).astype(f32) for s in ((r, n), (out, r))] for _, _, r, _ in kinds]
    x, g = rng.standard_normal((*rows, n)).astype(f32), rng.standard_normal((*rows, out)).astype(f32)
    if kind == "in columns":
        x, g = np.asfortranarray(x), np.asfortranarray(g)
    elif kind == "one number":
        g = np.broadcast_to(g.dtype.type(rng.standard_normal()), g.shape)
    elif kind == "float64":
        g = g + rng.standard_normal(g.shape) * 1e-9

    def run(around):
        """([outputs, gradients of x and of A and B of each layer], the operations that made the outputs, bytes of the tape)"""
        given, made, names = Tensor(x, requires_grad="x" in trained), [], set()
        for base, (a, b), (_, _, r, alpha) in zip(bases, factors, kinds, strict=True):
            made.append(layer := LoRALinear(base, r=r, alpha=alpha))
            layer.lora_A.weight.data, layer.lora_B.weight.data = a, b
            layer.lora_A.requires_grad_("A" in trained)
            layer.lora_B.requires_grad_("B" in trained)

        def total(given):
            outputs = [layer(given) for layer in made]
            names.update(h._node.name for h in outputs if h._node)
            return sum(outputs[2:], outputs[0]) + outputs[1] * outputs[1]

        y = around(total, given)
        kept = tape_bytes(y, exclude=[given, *(w for layer in made for _, w in layer.named_weights())])
        y.backward(g)
        gradients = [factor.weight.grad for layer in made for factor in (layer.lora_A, layer.lora_B)]
        return [y.data, given.grad, *gradients], names, kept

    for around in (lambda f, given: f(given), checkpoint):
        (ours, mine, ours_kept), (theirs, composed, theirs_kept) = both(lambda around=around: run(around))
        assert same(ours, theirs) and ours_kept == theirs_kept
        assert (mine, composed) == ({"lora_linear_on_host" if "A B" in trained else "add"}, {"add"})


@pytest.mark.parametrize("method", ["bfloat16", "nf4"])
def test_a_model_has_the_same_loss_and_gradients_in_every_bit(method, both, rng):
    ids = rng.integers(0, 256, (3, 17))

    def run():
        model = tiny.model(seed=3)
        quantize_linears(model, code=method)
        add_lora(model, r=4, alpha=8, target_modules="all-linear")
        draw = np.random.default_rng(5)
        for name, factor in model.trainable():
            if "lora_B" in name:
                factor.data = draw.standard_normal(factor.shape).astype(f32) / 10
        loss = ops.softmax_cross_entropy(model(ids[:, :-1]), ids[:, 1:])
        kept = tape_bytes(loss, exclude=[w for _, w in model.named_weights()])
        loss.backward()
        with no_grad():
            answer = model(ids)
        return [loss.data, answer.data, *(p.grad for _, p in model.trainable())], kept

    (ours, kept), (theirs, composed) = both(run)
    assert same(ours, theirs) and all(x is not None for x in ours)
    assert kept == composed


def test_what_is_not_one_operation_is_composed(rng):
    """What `tiny.composed` lists, and on the host another compute dtype or scale, float64, and bases of other kinds."""
    x, layer = Tensor(rng.standard_normal((3, 64)).astype(f32)), tiny.adapted
    assert layer().fused_forward(x) is not None and layer(dropout=0.5).eval().fused_forward(x) is not None
    in_bfloat16 = layer(compute_dtype="bfloat16")
    in_bfloat16.lora_A.compute_dtype = in_bfloat16.lora_B.compute_dtype = "bfloat16"
    scaled = [layer(r=3), layer(use_rslora=True), layer(alpha=0), layer(alpha=-2)]
    based = [LoRALinear(base, r=2) for base in (Linear(64, 8), Linear8bit.of(Linear(64, 8)))]
    for one in (*tiny.composed(), in_bfloat16, *scaled, *based):
        assert one.fused_forward(x) is None
        one(x)
    frozen = tiny.composed()[0]
    with no_grad():
        assert frozen.fused_forward(x) is not None
    assert layer().fused_forward(x.data) is None and layer().fused_forward(Tensor(x.data[0])) is None
    assert layer().fused_forward(Tensor(x.data.astype(np.float64))) is None
    with setting("around", lambda f, *arguments, **options: f(*arguments, **options)):
        assert layer().fused_forward(x) is None
    with pytest.raises(ValueError, match="linear: x has"):
        layer()(Tensor(np.ones((3, 32), f32)))
