"""LoRA: what it computes, what it leaves alone, merging, switching, counting, and PEFT's files."""

import json

import numpy as np
import pytest
import tiny

import tinylora as tl
from tinylora import LoRALinear, Tensor, backend, codebooks, lora, ops, quantize
from tinylora.interop import peft
from tinylora.nn import Linear, Linear4bit, Linear16bit

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
    assert [name for name, _ in h.trainable()] == ["lora_A.weight", "lora_B.weight"]


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


def test_merge_of_a_model(xp, rng):
    m = tiny.randomize_lora(tl.add_lora(tiny.model(), r=4), rng).to(xp)
    x = tiny.ids(rng, 2, 10)
    before = tiny.logits(m, x)
    tl.merge(m)
    assert not lora.adapters(m)
    np.testing.assert_allclose(tiny.logits(m, x), before, rtol=1e-3, atol=1e-4)


def test_detach_restores_the_base_bit_for_bit_and_attach_puts_another_on(xp, rng):
    m, x = tiny.model().to(xp), tiny.ids(rng, 2, 10)
    base = tiny.logits(m, x)
    first = lora.detach(tiny.randomize_lora(tl.add_lora(m, r=4), rng))
    assert tiny.logits(m, x).tobytes() == base.tobytes()
    second = lora.detach(tiny.randomize_lora(tl.add_lora(m, r=2, target_modules=["q_proj"]), rng))
    outputs = []
    for adapter in (first, second, first):
        lora.attach(m, adapter)
        outputs.append(tiny.logits(m, x))
        lora.detach(m)
    assert outputs[0].tobytes() == outputs[2].tobytes() != outputs[1].tobytes()
    assert first.nbytes > second.nbytes > 0


# ---------------------------------------------------------------------------------------------------------- targets and counts
@pytest.mark.parametrize(
    "targets, count",
    [
        ("all-linear", 14),
        (["q_proj", "v_proj"], 4),
        (["self_attn.q_proj"], 2),
        (["model.layers.1.mlp.up_proj"], 1),
        (r".*layers\.0\.mlp\..*", 3),
    ],
)
def test_targets(targets, count):
    assert len(lora.adapters(tl.add_lora(tiny.model(), r=2, target_modules=targets))) == count


def test_all_linear_leaves_the_head_out():
    m = tl.add_lora(tiny.model(tie_word_embeddings=False), r=2)
    assert "lm_head" not in [path for path, _ in lora.adapters(m)]
    assert len(lora.adapters(tl.add_lora(tiny.model(tie_word_embeddings=False), r=2, target_modules=["lm_head"]))) == 1


@pytest.mark.parametrize(
    "options, words",
    [
        (
            {"target_modules": ["q_proj", "query"]},
            "'query' does not exist; the linear layers are down_proj, gate_proj, k_proj, o_proj",
        ),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": "(q"}, "is no regular expression"),
        ({"target_modules": "query.*"}, "matches no layer; the layers are named down_proj"),
        ({"r": 0}, "r = 0, expected a whole number, 1 or more"),
        ({"r": 2.5}, "r = 2.5"),
        ({"dropout": 1.0}, "dropout = 1.0"),
    ],
)
def test_bad_choices_get_a_sentence_and_change_nothing(options, words):
    m = tiny.model()
    with pytest.raises(ValueError, match=words):
        tl.add_lora(m, **options)
    assert not lora.adapters(m) and all(p.requires_grad for p in m.parameters()) and len(m.parameters()) == 20


def test_a_second_adapter_is_refused():
    m = tl.add_lora(tiny.model(), r=2)
    with pytest.raises(ValueError, match="carries an adapter already"):
        tl.add_lora(m, r=2)
    lora.detach(m)
    with pytest.raises(ValueError, match="carries no adapter"):
        lora.detach(m)


def test_counts_are_of_weights_and_not_of_bytes():
    plain, m = tiny.model(), tiny.model()
    total = sum(p.size for p in plain.parameters())
    tl.add_lora(tl.quantize_linears(m), r=2)
    added = sum(2 * (layer.in_features + layer.out_features) for _, layer in lora.adapters(m))
    assert lora.count_parameters(m) == (added, total + added)
    assert tl.trainable_parameters(m) == (
        f"trainable params: {added:,d} || all params: {total + added:,d} || "
        f"trainable%: {100 * added / (total + added):.4f}"
    )


def test_quantizing_leaves_embeddings_norms_and_head_alone():
    m = tl.quantize_linears(tiny.model(tie_word_embeddings=False))
    kinds = {path: type(layer).__name__ for path, layer in m.named_modules()}
    assert kinds["lm_head"] == "Linear" and kinds["model.embed_tokens"] == "Embedding"
    assert sum(kind == "Linear4bit" for kind in kinds.values()) == 14
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight holds 1 NaN"):
        bad = tiny.model()
        bad.model.layers[0].self_attn.q_proj.weight.data[3, 4] = np.nan
        tl.quantize_linears(bad)


def test_quantizing_is_all_or_nothing_and_comes_before_the_adapter():
    m = tiny.model()
    m.model.layers[1].mlp.down_proj.weight.data[0, 0] = np.inf
    with pytest.raises(ValueError, match="down_proj"):
        tl.quantize_linears(m)
    assert not any(isinstance(layer, Linear4bit) for _, layer in m.named_modules()) and len(m.trainable()) == 20
    with pytest.raises(ValueError, match="quantize first, then add_lora"):
        tl.quantize_linears(tl.add_lora(tiny.model(), r=2))


def test_a_quantized_models_state_can_be_loaded_into_another(rng):
    x, (a, b) = tiny.ids(rng, 1, 9), (tl.add_lora(tl.quantize_linears(tiny.model(seed)), r=2) for seed in (0, 1))
    assert tiny.logits(a, x).tobytes() != tiny.logits(b, x).tobytes()
    b.load_state_dict(a.state_dict())
    assert tiny.logits(a, x).tobytes() == tiny.logits(b, x).tobytes()
    with pytest.raises(ValueError, match="dense on one side and quantized on the other"):
        tiny.model().load_state_dict(tl.quantize_linears(tiny.model()).state_dict())


def test_only_the_adapter_is_on_the_tape_beside_activations(rng):
    """LoRA's saving, seen in the engine: full fine-tuning keeps the input of every layer for ∂L/∂W, LoRA not that of frozen layers."""
    x, t = tiny.ids(rng, 4, 32), tiny.ids(rng, 4, 32)

    def held(m):
        return tl.tape_bytes(ops.softmax_cross_entropy(m(x), t), exclude=m.parameters())

    full, frozen = held(tiny.model()), held(tl.add_lora(tiny.model(), r=2, target_modules=["q_proj", "v_proj"]))
    tokens, c = x.size, tiny.CONFIG
    inputs_of_frozen_layers = (
        4 * tokens * c.num_hidden_layers * (c.hidden_size + c.hidden_size + c.intermediate_size)
    )  # o, gate and up, down
    assert full - frozen > inputs_of_frozen_layers


# ---------------------------------------------------------------------------------------------------------------- PEFT's files
def test_an_adapter_survives_the_disk(tmp_path, rng):
    m, x = (
        tiny.randomize_lora(tl.add_lora(tiny.model(), r=4, alpha=6, target_modules=["q_proj", "down_proj"]), rng),
        tiny.ids(rng, 1, 9),
    )
    peft.save_adapter(m, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["target_modules"]) == (
        "LORA",
        4,
        6,
        ["down_proj", "q_proj"],
    )
    again = peft.load_adapter(tiny.model(), tmp_path)
    assert tiny.logits(again, x).tobytes() == tiny.logits(m, x).tobytes()
    assert again.lora_config == m.lora_config


def test_names_that_would_mean_more_layers_are_saved_as_paths(tmp_path):
    """As after loading an adapter whose PEFT config restricted it to some layers."""
    m = tl.add_lora(tiny.model(), r=4, target_modules=["q_proj"])
    adapter = lora.detach(m)
    del adapter.weights["model.layers.0.self_attn.q_proj"]
    peft.save_adapter(lora.attach(m, adapter), tmp_path)
    assert peft.read_adapter(tmp_path).config.target_modules == ("model.layers.1.self_attn.q_proj",)


def test_saving_twice_gives_the_same_bytes(tmp_path, rng):
    m = tiny.randomize_lora(tl.add_lora(tiny.model(), r=4), rng)
    for name in ("a", "b"):
        peft.save_adapter(m, tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_an_adapter_that_does_not_fit_changes_nothing(tmp_path, rng):
    peft.save_adapter(tl.add_lora(tiny.model(), r=4), tmp_path)
    for changes, words in (
        ({"intermediate_size": 64}, r"needs \(4, 64\) and \(32, 4\)"),
        ({"num_hidden_layers": 1}, "which the model lacks"),
    ):
        other = tiny.model(**changes)
        with pytest.raises(ValueError, match=words):
            peft.load_adapter(other, tmp_path)
        assert not lora.adapters(other)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    ],
)
def test_what_is_not_read_is_refused(change, words, tmp_path):
    peft.save_adapter(tl.add_lora(tiny.model(), r=4), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=words):
        peft.load_adapter(tiny.model(), tmp_path)


def test_a_config_without_r_and_alpha_means_8(tmp_path):
    peft.save_adapter(tl.add_lora(tiny.model(), r=8, alpha=8), tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["r"], config["lora_alpha"]
    path.write_text(json.dumps(config))
    assert peft.read_adapter(tmp_path).config.alpha == peft.read_adapter(tmp_path).config.r == 8


def test_missing_files_get_a_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_config\.json"):
        peft.load_adapter(tiny.model(), tmp_path)
    with pytest.raises(ValueError, match="carries no adapter"):
        peft.save_adapter(tiny.model(), tmp_path)


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
