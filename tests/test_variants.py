"""The descendants of LoRA: where each starts, what it trains and holds, and that merging changes nothing."""

import math
from functools import lru_cache

import numpy as np
import pytest
import tiny
from gradcheck import check

import tinylora as tl
from tinylora import LoRALinear, Tensor, backend, codebooks, nn, ops, variants
from tinylora.nn import Linear, Linear4bit, Linear16bit
from tinylora.numerics import optimality
from tinylora.papers.claims import descendants
from tinylora.variants import (
    AdaLoRALinear,
    IECLinear,
    IntegerLinear,
    QALoRALinear,
    RankAllocator,
    VeRALinear,
    add_adalora,
    add_vera,
)

BASES = {"dense": lambda w: w, "4 bits": Linear4bit.of, "16 bits": Linear16bit.of}
OUT, IN = 24, 64


def layer(r=4, alpha=8, base="dense", out=OUT, inn=IN):
    return LoRALinear(BASES[base](Linear(inn, out)), r=r, alpha=alpha)


def f32(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def host(x):
    return backend.move(x, "cpu")


def relative(x, y):
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


def shared_pair(rng, r=6, inn=IN + 8, out=OUT + 8):
    return Tensor(f32(rng, r, inn)), Tensor(f32(rng, out, r))


def randomize(module, rng):
    """Every trained array away from where it starts."""
    for _, w in module.trainable():
        like = backend.array_module(w.data)
        w.data = w.data + backend.move((0.1 * rng.standard_normal(w.shape)).astype(w.dtype), like)


NEW_LAYERS = {
    "VeRA": lambda base, rng: VeRALinear(base, *shared_pair(rng)),
    "AdaLoRA": lambda base, rng: AdaLoRALinear(base, r=6, alpha=3),
    "IEC": lambda base, rng: IECLinear(base, r=8, alpha=16),
    "QA-LoRA": lambda base, rng: QALoRALinear(IntegerLinear.of(base, group=16), r=4, alpha=6),
}


# --------------------------------------------------------------------------------------------------- what all layers promise
@pytest.mark.parametrize("name", NEW_LAYERS)
def test_a_new_bypass_starts_at_its_base_bit_for_bit(name, xp, rng):
    h = NEW_LAYERS[name](Linear(IN, OUT, bias=True), rng).to(xp)
    x = Tensor(xp.asarray(f32(rng, 5, IN)))
    assert np.array_equal(host(h(x).data), host(h.base_layer(x).data))


@pytest.mark.parametrize("name", NEW_LAYERS)
def test_merged_and_unmerged_compute_the_same(name, xp, rng):
    h = NEW_LAYERS[name](Linear(IN, OUT, bias=True), rng).to(xp)
    randomize(h, rng)
    x = Tensor(xp.asarray(f32(rng, 3, 5, IN)))
    plain, merged = host(h(x).data), h.merge()
    assert relative(host(merged(x).data), plain) < 2e-6
    assert relative(host(h.base_layer(x).data), plain) > 1e-3


@pytest.mark.parametrize("base", ["4 bits", "16 bits"])
@pytest.mark.parametrize("name", ["VeRA", "AdaLoRA", "IEC"])
def test_merging_into_few_bits_keeps_the_kind_and_is_as_exact_as_the_kind_allows(name, base, rng):
    h = NEW_LAYERS[name](BASES[base](Linear(IN, OUT)), rng)
    randomize(h, rng)
    merged, wanted = h.merge(), h.base_layer.dense() + h.delta()
    assert type(merged) is type(h.base_layer)
    assert relative(merged.dense(), wanted) < {"4 bits": 0.13, "16 bits": 2**-8}[base]


def test_merging_a_model_leaves_plain_layers_that_compute_the_same(rng):
    m, x = tiny.model(), tiny.ids(rng, 2, 9)
    add_vera(m, r=8)
    randomize(m, rng)
    before = tiny.logits(m, x)
    assert variants.merge(m) is m
    assert not any(isinstance(layer, VeRALinear) for _, layer in m.named_modules())
    assert relative(tiny.logits(m, x), before) < 1e-5


@pytest.mark.parametrize("name", ["VeRA", "AdaLoRA", "IEC"])
def test_every_gradient_of_a_new_bypass_is_the_central_difference(name, rng):
    h = NEW_LAYERS[name](Linear(IN, OUT), rng)
    randomize(h, rng)
    names = [n for n, _ in h.trainable()]

    def run(x, *values):
        for n, v in zip(names, values, strict=True):
            setattr(h, n, v)
        h.base_layer.weight = Tensor(h.base_layer.weight.data.astype(v.dtype))
        for shared in ("vera_A", "vera_B"):
            if hasattr(h, shared):
                setattr(h, shared, Tensor(getattr(h, shared).data.astype(v.dtype)))
        return h(x)

    arrays = [rng.standard_normal((3, IN)), *(w.data.astype(np.float64) for _, w in h.trainable())]
    check(run, *arrays, rng=rng)


def test_a_layer_that_is_not_linear_or_carries_something_already_is_refused(rng):
    with pytest.raises(ValueError, match="Embedding cannot carry this bypass"):
        AdaLoRALinear(nn.Embedding(4, 4))
    m = add_adalora(tiny.model(), r=2)
    with pytest.raises(ValueError, match="carries such a bypass already"):
        add_vera(m, r=2)


# -------------------------------------------------------------------------------------------------------- LoRA+ and LoRA-FA
def test_lora_plus_trains_B_at_ratio_times_the_rate_of_A():
    m = tl.add_lora(tiny.model(), r=2)
    groups = variants.lora_plus_groups(m, lr=1e-3, ratio=4, weight_decay=0.1)
    names = [[name for name, _ in g["params"]] for g in groups]
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(1e-3, 0.1), (4e-3, 0.1)]
    assert all("lora_A" in n for n in names[0]) and all("lora_B" in n for n in names[1])
    assert sorted(names[0] + names[1]) == sorted(n for n, _ in m.trainable())
    tl.AdamW(groups)


def test_biases_go_with_B_and_are_not_decayed():
    m = tl.add_lora(tiny.model(), r=2)
    norm = m.get("model.norm").weight
    norm.requires_grad = True
    last = variants.lora_plus_groups(m, lr=1.0, ratio=3, weight_decay=0.1)[-1]
    assert [w for _, w in last["params"]] == [norm] and (last["lr"], last["weight_decay"]) == (3.0, 0.0)


def test_lora_plus_without_a_B_or_with_a_bad_ratio_is_refused():
    with pytest.raises(ValueError, match="no trainable lora_B"):
        variants.lora_plus_groups(tiny.model(), lr=1e-3)
    with pytest.raises(ValueError, match="ratio = 0"):
        variants.lora_plus_groups(tl.add_lora(tiny.model()), lr=1e-3, ratio=0)


@pytest.mark.parametrize("base", ["float32", "nf4"])
def test_frozen_A_holds_r_numbers_a_row_where_LoRA_holds_d_more(base, xp, rng):
    n, d, r = 40, 512, 4
    h = layer(r=r, inn=d)
    if base == "nf4":
        h.base_layer = Linear4bit.of(h.base_layer)
    h.to(xp)
    x = Tensor(xp.asarray(f32(rng, n, d)), requires_grad=True)
    weights = [w for _, w in h.named_weights()]
    lora = tl.tape_bytes(h(x), exclude=weights)
    variants.freeze_A(h)
    frozen = tl.tape_bytes(h(x), exclude=weights)
    assert (lora, frozen) == (4 * n * (d + r), 4 * n * r)
    assert (lora - frozen) / frozen == d / r
    assert [name.rpartition(".")[0].rpartition(".")[2] for name, _ in h.trainable()] == ["lora_B"]


def test_the_corrected_gradient_makes_the_update_the_projection_of_G(xp, rng):
    h = variants.freeze_A(layer(r=4, alpha=10).to(xp))
    x, g = f32(rng, 30, IN), f32(rng, 30, OUT)
    h(Tensor(xp.asarray(x))).backward(xp.asarray(g))
    variants.correct_gradients(h)
    a, big_g = host(h.lora_A.weight.data).astype(np.float64), (g.T @ x).astype(np.float64)
    projected = big_g @ np.linalg.pinv(a) @ a
    assert relative(h.scaling * host(h.lora_B.weight.grad) @ a, projected) < 1e-5


def test_freezing_A_needs_a_LoRALinear():
    for f in (variants.freeze_A, variants.correct_gradients):
        with pytest.raises(ValueError, match="no active LoRALinear"):
            f(tiny.model())


# -------------------------------------------------------------------------------------------------------------------- PiSSA
def test_pissa_starts_at_its_base_although_B_is_not_zero(xp, rng):
    h = layer(r=4, alpha=10).to(xp)
    x, w = Tensor(xp.asarray(f32(rng, 9, IN))), host(h.base_layer.dense())
    before, old = host(h(x).data), h.base_layer
    variants.pissa(h)
    assert relative(host(h(x).data), before) < 2e-6
    assert np.array_equal(host(old.dense()), w) and h.base_layer is not old
    assert np.abs(host(h.lora_B.weight.data)).max() > 0.01


def test_pissa_takes_the_r_largest_singular_values_and_splits_them_evenly(rng):
    h = layer(r=4, alpha=10)
    s = np.linalg.svd(h.base_layer.dense().astype(np.float64), compute_uv=False)
    variants.pissa(h)
    left = np.linalg.svd(h.base_layer.dense().astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(left[: OUT - 4], s[4:], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.linalg.svd(h.delta(), compute_uv=False)[:4], s[:4], rtol=1e-5)
    for factor in (h.lora_A.weight.data, h.lora_B.weight.data.T):
        np.testing.assert_allclose(np.linalg.norm(factor, axis=1), np.sqrt(s[:4] / h.scaling), rtol=1e-5)


def test_quantized_pissa_starts_with_the_error_of_its_residual_and_merges(rng):
    h = layer(r=4, alpha=10)
    w = h.base_layer.dense()
    variants.pissa(h, code="nf4", blocksize=32)
    residual = w - h.delta()
    assert isinstance(h.base_layer, Linear4bit) and h.base_layer.weight.blocksize == 32
    assert not h.base_layer.weight.double_quant
    np.testing.assert_allclose(
        h.base_layer.dense() + h.delta() - w, h.base_layer.dense() - residual, rtol=1e-4, atol=1e-6
    )
    assert relative(h.base_layer.dense(), residual) < 0.12


def test_a_quantized_base_is_refused_by_the_starts_that_need_the_weight(rng):
    for start in (variants.pissa, lambda h: variants.lora_ga(h, f32(rng, OUT, IN))):
        with pytest.raises(ValueError, match="around a dense Linear, got Linear4bit"):
            start(layer(base="4 bits"))
    with pytest.raises(ValueError, match="r = 25 exceeds the rank"):
        variants.pissa(layer(r=25))


# -------------------------------------------------------------------------------------------------------------------- LoftQ
def test_one_step_of_loftq_repairs_the_error_of_quantization_by_its_best_rank_r(rng):
    linear = Linear(IN, OUT)
    w = linear.dense().astype(np.float64)
    h = variants.loftq(linear, r=4, steps=1)
    q = Linear4bit.of(linear, double_quant=False).dense()
    assert np.array_equal(h.base_layer.dense(), q)
    tail = np.linalg.svd(w - q, compute_uv=False)[4:]
    np.testing.assert_allclose(np.linalg.norm(w - h.base_layer.dense() - h.delta()), np.linalg.norm(tail), rtol=1e-4)


@pytest.mark.parametrize("alpha", [None, 4, 64])
def test_loftq_is_nearer_to_W_than_quantization_alone_whatever_alpha_is(alpha, rng):
    linear = Linear(128, 96)
    w, h = linear.dense(), variants.loftq(linear, r=8, alpha=alpha, steps=5)
    plain = relative(Linear4bit.of(linear, double_quant=False).dense(), w)
    assert relative(h.base_layer.dense() + h.delta(), w) < 0.9 * plain
    assert h.scaling == (1 if alpha is None else alpha / 8)


def test_loftq_without_a_step_is_refused():
    with pytest.raises(ValueError, match="steps = 0"):
        variants.loftq(Linear(IN, OUT), r=4, steps=0)


# ------------------------------------------------------------------------------------------------------------------ LoRA-GA
def test_lora_ga_starts_at_its_base_with_orthonormal_factors_times_c(xp, rng):
    h, g = layer(r=4, alpha=8).to(xp), xp.asarray(f32(rng, OUT, IN))
    x = Tensor(xp.asarray(f32(rng, 9, IN)))
    before = host(h(x).data)
    variants.lora_ga(h, g, gamma=16)
    assert relative(host(h(x).data), before) < 5e-6
    c2 = math.sqrt(OUT) / 16
    a, b = host(h.lora_A.weight.data), host(h.lora_B.weight.data)
    np.testing.assert_allclose(a @ a.T, c2 * np.eye(4), atol=1e-5)
    np.testing.assert_allclose(b.T @ b, c2 * np.eye(4), atol=1e-5)


def test_the_first_step_after_lora_ga_is_the_best_rank_2r_of_the_gradient(rng):
    h, x, g = layer(r=4, alpha=8), f32(rng, 50, IN), f32(rng, 50, OUT)
    big_g = (g.T @ x).astype(np.float64)
    variants.lora_ga(h, big_g)
    h(Tensor(x)).backward(g)
    a, b = (m.weight.data.astype(np.float64) for m in (h.lora_A, h.lora_B))
    step = h.scaling * (h.lora_B.weight.grad @ a + b @ h.lora_A.weight.grad)  # first order in the learning rate
    u, s, vt = np.linalg.svd(big_g)
    best = (u[:, :8] * s[:8]) @ vt[:8]
    assert relative(step / (h.scaling**2 * math.sqrt(OUT) / 16), best) < 1e-5


def test_lora_ga_says_what_it_needs(rng):
    with pytest.raises(ValueError, match="the gradient is"):
        variants.lora_ga(layer(), f32(rng, IN, OUT))
    with pytest.raises(ValueError, match="r = 13 needs 2 r singular vectors"):
        variants.lora_ga(layer(r=13), f32(rng, OUT, IN))


# --------------------------------------------------------------------------------------------------------------------- VeRA
def test_vera_trains_out_plus_r_numbers_a_layer_and_shares_one_pair(rng):
    m = add_vera(tiny.model(), r=16, seed=3)
    layers = [layer for _, layer in m.named_modules() if isinstance(layer, VeRALinear)]
    assert sum(w.size for _, w in m.trainable()) == sum(h.out_features + 16 for h in layers)
    a, b = layers[0].vera_A, layers[0].vera_B
    assert a.shape == (16, 48) and b.shape == (48, 16)  # the largest layer of the model
    assert all(h.vera_A is a and h.vera_B is b for h in layers) and not a.requires_grad
    assert np.abs(a.data).max() <= math.sqrt(6 / 48) and np.abs(b.data).max() <= math.sqrt(6 / 16)
    again = add_vera(tiny.model(), r=16, seed=3)
    assert np.array_equal(next(h for _, h in again.named_modules() if isinstance(h, VeRALinear)).vera_A.data, a.data)


def test_at_the_first_step_of_vera_only_lambda_b_has_a_gradient(rng):
    h = NEW_LAYERS["VeRA"](Linear(IN, OUT), rng)
    h(Tensor(f32(rng, 5, IN))).backward(f32(rng, 5, OUT))
    assert (h.lambda_d.grad == 0).all() and (h.lambda_b.grad != 0).all()
    assert (h.lambda_d.data == np.float32(0.1)).all()


def test_vera_is_its_equation(rng):
    h = NEW_LAYERS["VeRA"](Linear(IN, OUT), rng)
    randomize(h, rng)
    a, b = h.vera_A.data[:, :IN].astype(np.float64), h.vera_B.data[:OUT].astype(np.float64)
    x = f32(rng, 5, IN)
    w = h.base_layer.dense() + np.diag(h.lambda_b.data) @ b @ np.diag(h.lambda_d.data) @ a
    assert relative(h(Tensor(x)).data, x @ w.T) < 1e-5


def test_vera_refuses_a_pair_that_is_too_small(rng):
    with pytest.raises(ValueError, match="too small for a layer of 64 inputs"):
        VeRALinear(Linear(IN, OUT), *shared_pair(rng, inn=IN - 1))
    with pytest.raises(ValueError, match="r = 0"):
        add_vera(tiny.model(), r=0)


# ------------------------------------------------------------------------------------------------------------------ AdaLoRA
def test_adalora_is_its_equation_and_the_regularizer_is_zero_for_orthogonal_factors(xp, rng):
    h = AdaLoRALinear(Linear(IN, OUT), r=6, alpha=3).to(xp)
    randomize(h, rng)
    p, lam, q = (host(getattr(h, n).data).astype(np.float64) for n in ("P", "Lambda", "Q"))
    x = f32(rng, 5, IN)
    w = host(h.base_layer.dense()) + 0.5 * p @ np.diag(lam) @ q
    assert relative(host(h(Tensor(xp.asarray(x))).data), x @ w.T) < 1e-5
    norms = [np.linalg.norm(p.T @ p - np.eye(6)), np.linalg.norm(q @ q.T - np.eye(6))]
    np.testing.assert_allclose(variants.orthogonality(h).item(), np.square(norms).sum(), rtol=1e-4)
    np.testing.assert_allclose(variants.orthogonality(h, squared=False).item(), np.mean(norms), rtol=1e-4)
    h.P.data = xp.asarray(np.linalg.qr(rng.standard_normal((OUT, 6)))[0].astype(np.float32))
    h.Q.data = xp.asarray(np.linalg.qr(rng.standard_normal((IN, 6)))[0].T.astype(np.float32))
    assert variants.orthogonality(h).item() < 1e-10


def test_the_gradient_of_the_regularizer_is_4_P_of_PtP_minus_I(rng):
    h = AdaLoRALinear(Linear(IN, OUT), r=6)
    variants.orthogonality(h).backward()
    p, q = h.P.data.astype(np.float64), h.Q.data.astype(np.float64)
    np.testing.assert_allclose(h.P.grad, 4 * p @ (p.T @ p - np.eye(6)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(h.Q.grad, 4 * (q @ q.T - np.eye(6)) @ q, rtol=1e-4, atol=1e-6)


def two_layers(r=4):
    m = nn.Module()
    m.first, m.second = AdaLoRALinear(Linear(IN, OUT), r), AdaLoRALinear(Linear(OUT, IN), r)
    return m


def test_the_budget_falls_along_a_cubic_between_warmup_and_the_final_phase():
    a = RankAllocator(two_layers(), target=3, steps=100, warmup=10, final=20, interval=5)
    assert [a.budget(t) for t in (1, 10, 81, 100)] == [8, 8, 3, 3]
    assert [a.budget(t) for t in (11, 45, 79, 80)] == [int(3 + 5 * (1 - (t - 10) / 70) ** 3) for t in (11, 45, 79, 80)]
    assert sorted((a.budget(t) for t in range(101)), reverse=True) == [a.budget(t) for t in range(101)]


def test_scores_are_sensitivity_times_uncertainty_by_hand(rng):
    m = two_layers()
    randomize(m, rng)
    a = RankAllocator(m, target=3, steps=100, warmup=0, final=0, beta1=0.7, beta2=0.6)
    mean = spread = 0.0
    for _ in range(3):
        for _, w in m.trainable():
            w.grad = f32(rng, *w.shape)
        a.update()
        now = np.abs(m.first.P.data * m.first.P.grad)
        mean = 0.7 * mean + 0.3 * now
        spread = 0.6 * spread + 0.4 * np.abs(now - mean)
    rest = {k: v[0] * v[1] for k, v in a._smooth.items()}
    by_hand = (mean * spread).mean(axis=0) + rest["first", "Lambda"] + rest["first", "Q"].mean(axis=1)
    np.testing.assert_allclose(a.scores()["first"], by_hand, rtol=1e-5)


def test_masked_triplets_can_come_back_until_the_final_phase_fixes_them(xp, rng):
    m = two_layers().to(xp)
    a = RankAllocator(m, target=3, steps=20, warmup=2, final=5, interval=3)
    for t in range(1, 21):
        for _, w in m.trainable():
            w.data, w.grad = xp.asarray(f32(rng, *w.shape)), xp.asarray(f32(rng, *w.shape))
        b = a.step(t)
        kept = sum(int((host(h.Lambda.data) != 0).sum()) for h in (m.first, m.second))
        if t < 15 and not (t > 2 and t % 3 == 0):
            assert kept == 8, "between two masks every triplet may move"
        else:
            assert kept == b == sum(a.ranks.values())
        if t == 15:
            fixed = {k: v.copy() for k, v in a.kept.items()}
    assert all(np.array_equal(fixed[k], a.kept[k]) for k in fixed) and sum(a.ranks.values()) == 3


def test_the_allocator_says_what_it_needs(rng):
    m = two_layers()
    with pytest.raises(ValueError, match="target = 9, expected 1 to 8"):
        RankAllocator(m, target=9, steps=10, warmup=1, final=1)
    with pytest.raises(ValueError, match="leave no step"):
        RankAllocator(m, target=3, steps=10, warmup=6, final=4)
    with pytest.raises(ValueError, match=r"first\.P has no gradient"):
        RankAllocator(m, target=3, steps=10, warmup=1, final=1).step(1)
    with pytest.raises(ValueError, match="no AdaLoRALinear"):
        variants.orthogonality(tiny.model())


# ------------------------------------------------------------------------------------------------------------------ QA-LoRA
def test_merging_qa_lora_into_the_zero_points_is_exact_in_float64(rng):
    linear = Linear(256, 48, bias=True)
    linear.weight, linear.bias = Tensor(rng.standard_normal((48, 256))), Tensor(rng.standard_normal(48))
    h = QALoRALinear(IntegerLinear.of(linear, group=32), r=8, alpha=20)
    randomize(h, rng)
    x = Tensor(rng.standard_normal((10, 256)))
    plain, merged = h(x).data, h.merge()
    assert plain.dtype == np.float64
    assert np.abs(merged(x).data - plain).max() / np.abs(plain).max() < 1e-13
    assert merged.codes is h.base_layer.codes and merged.scale is h.base_layer.scale
    assert np.abs(merged.zero.data - np.round(merged.zero.data)).max() > 0.1, "zero points are no integers any more"


def test_a_pooled_bypass_is_a_lora_whose_A_is_constant_within_a_group(rng):
    h = NEW_LAYERS["QA-LoRA"](Linear(IN, OUT), rng)
    randomize(h, rng)
    x = f32(rng, 5, IN)
    wide = np.repeat(h.lora_A.data, 16, axis=1)
    by_hand = x @ (h.base_layer.dense() + h.scaling * h.lora_B.data @ wide).T
    assert relative(h(Tensor(x)).data, by_hand) < 1e-5
    assert h.lora_A.shape == (4, IN // 16)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_integers_hit_the_ends_of_each_group_and_err_by_half_a_step_at_most(bits, xp, rng):
    linear = Linear(IN, OUT).to(xp)
    q = IntegerLinear.of(linear, bits=bits, group=16)
    w, d = (host(a).reshape(OUT, -1, 16) for a in (linear.dense(), q.dense()))
    assert host(q.codes.data).max() == 2**bits - 1
    assert (np.abs(w - d) <= host(q.scale.data)[..., None] * 0.5001).all()
    for end in (np.min, np.max):
        np.testing.assert_allclose(end(d, axis=2), end(w, axis=2), rtol=1e-4, atol=1e-6)
    linear.weight.data = xp.asarray(np.full((OUT, IN), 0.3, np.float32))
    np.testing.assert_allclose(host(IntegerLinear.of(linear, group=16).dense()), 0.3, rtol=1e-6)


def test_bad_groups_and_bits_are_refused(rng):
    with pytest.raises(ValueError, match="64 inputs do not split into groups of 24"):
        IntegerLinear.of(Linear(IN, OUT), group=24)
    with pytest.raises(ValueError, match="bits = 9"):
        IntegerLinear.of(Linear(IN, OUT), bits=9)
    with pytest.raises(ValueError, match="expected an IntegerLinear, got Linear"):
        QALoRALinear(Linear(IN, OUT))


# ----------------------------------------------------------------------------------------------------------------- IR-QLoRA
def test_calibration_raises_the_entropy_of_no_block_below_that_of_its_median(rng):
    w = f32(rng, 64, 256)
    median = variants.information_calibration(w, n=0)
    best = variants.information_calibration(w, n=20)
    before, after = (variants.block_entropy(c.quantized.indices(), 64) for c in (median, best))
    assert (after >= before - 1e-12).all() and after.mean() > before.mean() + 0.03
    np.testing.assert_array_equal(median.tau, np.median(w.reshape(-1, 64), axis=1).astype(np.float32))


def test_a_calibrated_weight_is_the_quantized_rest_plus_tau(rng):
    w = f32(rng, 8, 64) + 3
    c = variants.information_calibration(w, n=3)
    by_hand = tl.quantize(w.reshape(-1, 64) - c.tau[:, None], "nf4", 64).dequantize() + c.tau[:, None]
    np.testing.assert_array_equal(c.dequantize(), by_hand.reshape(8, 64))
    x = Tensor(f32(rng, 2, 64))
    np.testing.assert_allclose(ops.linear_frozen(x, c).data, x.data @ c.dequantize().T, rtol=1e-6)


def test_a_block_shows_a_fifth_of_a_bit_less_entropy_than_the_law(rng):
    indices = tl.quantize(f32(rng, 4096, 64), "nf4", 64).indices()
    law = optimality.entropy(codebooks.nf4(), 64)
    pooled = variants.block_entropy(indices, indices.size)[0]
    assert abs(pooled - law) < 0.01
    assert abs(pooled - variants.block_entropy(indices, 64).mean() - 0.20) < 0.012


def test_a_size_that_is_no_multiple_of_the_block_is_refused(rng):
    with pytest.raises(ValueError, match="100 weights do not split into blocks of 64"):
        variants.information_calibration(f32(rng, 10, 10))


def test_the_elastic_connection_is_its_equation_and_refuses_what_does_not_divide(rng):
    h = IECLinear(Linear(IN, OUT), r=8, alpha=16)
    randomize(h, rng)
    x = f32(rng, 5, IN)
    runs = x.reshape(5, 8, IN // 8).mean(axis=2)
    low = x @ h.lora_A.data.T + h.beta1.data * runs
    high = low @ h.lora_B.data.T + h.beta2.data * np.repeat(low, OUT // 8, axis=1)
    assert relative(h(Tensor(x)).data - h.base_layer(Tensor(x)).data, 2 * high) < 1e-4
    assert np.linalg.matrix_rank(h.delta()) == 8
    assert sum(w.size for _, w in h.trainable()) == 8 * (IN + OUT) + 2
    with pytest.raises(ValueError, match="r = 5 must divide"):
        IECLinear(Linear(IN, OUT), r=5)


# ------------------------------------------------------------------------------------------------- what the experiments found
@lru_cache
def outcome(name, seed):
    return getattr(descendants, name)(seed=seed)


#: What each docstring says came out at seeds 0, 1, 2: (experiment, key, value, how far a seed may be from it).
FOUND = [
    ("quantized_starts", "gauss_nf4", 0.092, 0.0006),
    ("quantized_starts", "gauss_pissa", 0.087, 0.0006),
    ("quantized_starts", "gauss_loftq_1", 0.087, 0.0008),
    ("quantized_starts", "gauss_loftq_5", 0.079, 0.0006),
    ("quantized_starts", "power_nf4", 0.092, 0.0008),
    ("quantized_starts", "power_pissa", 0.042, 0.0006),
    ("quantized_starts", "power_loftq_1", 0.085, 0.0008),
    ("quantized_starts", "power_loftq_5", 0.078, 0.0006),
    ("quantized_starts", "outliers_nf4", 0.14, 0.01),
    ("quantized_starts", "outliers_pissa", 0.066, 0.001),
    ("quantized_starts", "outliers_loftq_1", 0.12, 0.01),
    ("quantized_starts", "outliers_loftq_5", 0.11, 0.01),
    ("aligned_first_step", "lora", 0.16, 0.01),
    ("aligned_first_step", "lora_ga", 0.90, 0.005),
    ("aligned_first_step", "bound", 0.90, 0.005),
    ("aligned_first_step", "peft", 0.85, 0.005),
    ("lora_plus_start", "descent", 0.0, 0.0),
    ("adalora_allocation", "rank_one", 1, 0),
    ("adalora_allocation", "rank_two", 6, 0),
    ("adalora_allocation", "error", 0.01, 0.005),
    ("adalora_allocation", "error_lora", 0.41, 0.005),
    ("calibrated_entropy", "entropy_nf4", 3.69, 0.01),
    ("calibrated_entropy", "entropy_median", 3.69, 0.01),
    ("calibrated_entropy", "entropy_best", 3.76, 0.01),
    ("calibrated_entropy", "error_median", 0.99, 0.015),
    ("calibrated_entropy", "error_best", 1.00, 0.015),
    ("vera_counts", "vera", 2.41, 0.005),
    ("vera_counts", "lora", 4.72, 0.005),
    ("vera_counts", "excess", 0, 0),
]


@pytest.mark.parametrize(("name", "key", "value", "within"), FOUND, ids=[f"{n}-{k}" for n, k, *_ in FOUND])
def test_what_came_out_is_what_the_docstring_says(name, key, value, within):
    assert abs(outcome(name, 1)[key] - value) <= within


def test_a_ratio_of_16_leaves_less_error_at_seeds_0_to_2(rng):
    """Fixed seeds, which kernels move by 2e-8. The gain is 1.7 to 2.9 there, and 0.8 to 3.1 over seeds 0 to 7: its size is not claimed."""
    found = outcome("lora_plus_ratio", int(rng.integers(3)))
    assert all(1.3 < found[f"width_{n}_ratio_1"] / found[f"width_{n}_ratio_16"] < 4 for n in (32, 128))
    assert outcome("lora_plus_start", 1)["sign"] > 0.1


def test_a_ratio_of_16_leaves_what_16_times_the_alpha_leaves_with_equal_rates():
    results = [outcome("lora_plus_ratio", seed) for seed in range(3)]
    mean = {key: np.mean([found[key] for found in results]) for key in results[0]}
    for key, errors in (("ratio_1", [0.078, 0.061]), ("ratio_16", [0.033, 0.034]), ("alpha_64", [0.033, 0.034])):
        assert np.allclose([mean[f"width_{n}_{key}"] for n in (32, 128)], errors, rtol=0, atol=1e-3)
    for found in results:
        assert all(abs(found[f"width_{n}_alpha_64"] / found[f"width_{n}_ratio_16"] - 1) < 0.02 for n in (32, 128))
    sentence = descendants.EXPERIMENTS["lora_plus_ratio"].verdict(results)
    assert sentence.startswith("holds in part: ") and "16 times the α leaves what λ = 16 does, to" in sentence


def test_lora_and_dora_scatter_as_published(rng):
    found = outcome("magnitude_and_direction", int(rng.integers(3)))
    assert found["lora_rows"] > 0.8 and -0.6 < found["dora_rows"] < 0 and found["lora_columns"] > 0.6
    assert abs(found["lora_accuracy"] - found["dora_accuracy"]) < 0.03


def test_lora_forgets_more_than_full_fine_tuning_that_has_learned_as_much(rng):
    """kept_more is −.013 to −.099 over seeds 0 to 7, learned_full − learned_lora .007 to .028; kernels change neither at seeds 0 to 2."""
    found = outcome("learns_less_forgets_less", int(rng.integers(3)))
    assert found["kept_more"] < 0 < found["learned_full"] - found["learned_lora"] < 0.1
    assert 3 < found["rank_full"] / found["rank_lora"] < 6


def test_every_experiment_has_a_verdict_in_words():
    for name, e in descendants.EXPERIMENTS.items():
        for results in ([outcome(name, 1)], [outcome(name, 1)] * 3):
            sentence = e.verdict(results)
            assert sentence.split(":")[0] in ("holds", "holds in part", "fails", "fails in part", "undecided")
            assert ("undecided" in sentence) <= (
                len(results) == 1
            )  # equal seeds decide all, one decides no measurement
        assert all(key in outcome(name, 1) for _, key in e.measured)


def test_a_bypass_of_another_kind_inside_is_said_before_anything_is_merged():
    import tiny

    m = variants.add_vera(tiny.model(), r=4, target_modules=["q_proj"])
    tl.add_lora(m, r=2, target_modules=["base_layer"])
    with pytest.raises(ValueError, match="carries a LoRA adapter inside"):
        variants.merge(m)
    assert sum(isinstance(layer, variants.VeRALinear) for _, layer in m.named_modules()) == 2
    variants.merge(tl.merge(m))
