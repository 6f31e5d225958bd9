"""The model: gradients, the cache, folders on disk, generation."""

import copy
import json
import math
import pickle
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import tiny
from gradcheck import check

import tinylora as tl
from tinylora import KVCache, Llama, LlamaConfig, no_grad, ops
from tinylora.cli import main
from tinylora.dtypes import BFloat16Array
from tinylora.interop import bitsandbytes
from tinylora.models import folders, fourbit, llama, rope, safetensors
from tinylora.models.tokenizers import ByteTokenizer


def loss(m, x, t):
    return ops.softmax_cross_entropy(m(x), t)


def rewrite(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("kind", [None, *tiny.FAMILY])
def test_gradients_of_the_whole_model_against_central_differences(kind, rng):
    m = tiny.of_the_family(kind, rng) if kind else tiny.model()
    x, t = tiny.ids(rng, 2, 7), tiny.ids(rng, 2, 7)
    places = [name.rpartition(".")[::2] for name, _ in m.named_parameters()]

    def with_weights(*tensors):
        for (path, name), w in zip(places, tensors, strict=True):
            setattr(m.get(path), name, w)
        return loss(m, x, t)

    check(with_weights, *(p.data.astype(np.float64) for p in m.parameters()), rng=rng)


def test_names_are_hugging_faces():
    names = [name for name, _ in tiny.model(tie_word_embeddings=False).named_parameters()]
    assert names[0] == "model.embed_tokens.weight" and names[-2:] == ["model.norm.weight", "lm_head.weight"]
    assert {n.removeprefix("model.layers.1.") for n in names if ".1." in n} == {
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
        "self_attn.o_proj.weight",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    }


def test_a_device_model_computes_what_the_host_model_computes(xp, rng):
    m, x, t = tiny.model(), tiny.ids(rng, 2, 7), tiny.ids(rng, 2, 7)
    expected = loss(m, x, t)
    expected.backward()
    grads = [p.grad for p in m.parameters()]
    m.zero_grad()
    m.to(xp)
    got = loss(m, x, xp.asarray(t))
    got.backward()
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    for p, g in zip(m.parameters(), grads, strict=True):
        np.testing.assert_allclose(p.grad if xp is np else p.grad.get(), g, rtol=1e-3, atol=1e-6)


def test_gradient_checkpointing_changes_memory_and_nothing_else(rng):
    x, t = tiny.ids(rng, 2, 33), tiny.ids(rng, 2, 33)
    results = []
    for on in (False, True):
        m = tl.add_lora(tl.quantize_linears(tiny.model()), r=2, dropout=0.5)
        tiny.randomize_lora(m, np.random.default_rng(5))
        m.gradient_checkpointing = on
        tl.seed(3)
        y = loss(m, x, t)
        held = tl.tape_bytes(y, exclude=m.parameters())
        y.backward()
        results.append((held, [p.grad.tobytes() for _, p in m.trainable()]))
    assert results[0][1] == results[1][1]
    assert results[1][0] < 0.3 * results[0][0]


@pytest.mark.parametrize("steps", [(10,), (1,) * 10, (4, 1, 5)])
@pytest.mark.parametrize("kind", [None, *tiny.FAMILY])
def test_the_cache_changes_nothing(kind, steps, rng):
    m, x = tiny.of_the_family(kind, rng) if kind else tiny.model(), tiny.ids(rng, 2, 10)
    whole, cache, start, parts = tiny.logits(m, x), KVCache(10), 0, []
    for n in steps:
        with no_grad():
            parts.append(m(x[:, start : start + n], cache).data)
        start += n
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0}, {"temperature": 0.9}, {"temperature": 0.9, "top_k": 5}, {"temperature": 1.0, "top_p": 0.7}],
)
def test_generation_with_a_cache_equals_generation_without(options, xp):
    m = tiny.model().to(xp)
    with_cache, without = (list(m.stream("Hello", 100, use_cache=c, seed=4, **options)) for c in (True, False))
    assert with_cache == without and len(with_cache) == 100  # 105 tokens: past the window of 64


@pytest.mark.parametrize("window", [1, 2, 8])
def test_a_prompt_that_is_too_long_loses_its_beginning_and_it_is_said(window):
    m, text = tiny.model(max_position_embeddings=window), "the lazy dogs"
    for prompt in (text, list(text.encode())):
        with pytest.warns(UserWarning) as caught:
            tokens = list(m.stream(prompt, 9, temperature=0))
        seen = max(window - 1, 1)
        assert [str(w.message) for w in caught] == [
            f"generate: the model does not see the first {13 - seen} of the prompt's 13 tokens; it reads {window} at a time "
            "(max_position_embeddings)"
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert list(m.stream(text[-seen:], 9, temperature=0)) == tokens
            list(m.stream(text[:window], 9))


@pytest.mark.parametrize("code", ["nf4", "bfloat16", "int8_vectorwise"])
def test_generation_on_dense_weights_is_the_same_and_leaves_the_model_as_it_was(code, rng, monkeypatch):
    m = tl.add_lora(tl.quantize_linears(tiny.model(), code, **({"blocksize": 16} if code == "nf4" else {})), r=2)
    stored = held(m)
    prompt, made = tiny.ids(rng, 1, 5)[0].tolist(), []
    for kind in {type(w) for w in stored}:
        own = kind.dequantize
        monkeypatch.setattr(
            kind, "dequantize", lambda q, dtype=None, own=own, **to: made.append(q) or own(q, dtype, **to)
        )
    expected, each_time = list(m.stream(prompt, 12, temperature=0.7)), len(made)
    made.clear()
    tokens = m.stream(prompt, 12, temperature=0.7, dense=True)
    assert next(tokens) == expected[0]
    assert all(layer is w for layer, w in zip(held(m), stored, strict=True)), "between two tokens"
    assert list(tokens) == expected[1:] and [id(q) for q in held(m)] == [id(q) for q in stored]
    assert each_time in (0, 12 * len(stored)) and len(made) in (0, len(stored))  # LLM.int8 multiplies whole numbers
    with pytest.raises(ValueError, match="logits hold NaN"):
        m.model.embed_tokens.weight.data[:] = np.nan
        list(m.stream(prompt, 3, dense=True))
    assert [id(q) for q in held(m)] == [id(q) for q in stored]


def test_the_command_generates_the_same_text_on_dense_weights(capsys):
    command = ["generate", "--quantize", "nf4", "--max-new-tokens", "6"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert main([*command, "--dense"]) == 0 and capsys.readouterr().out == text and len(text) > 6


def held(m):
    return [layer.weight for _, layer in m.named_modules() if isinstance(layer, tl.nn.FrozenLinear)]


def test_generation_is_without_dropout_and_leaves_the_mode_alone():
    m = tiny.randomize_lora(tl.add_lora(tiny.model(), r=4, dropout=0.5), np.random.default_rng(0)).train()
    assert m.generate("a", 30, seed=1) == m.generate("a", 30, seed=1) and m.training


def test_two_streams_can_take_turns():
    m = tiny.randomize_lora(tl.add_lora(tiny.model(), r=4, dropout=0.5), np.random.default_rng(0)).train()
    alone = list(m.stream("a", 20, seed=1))
    assert [
        a for a, _ in zip(m.stream("a", 20, seed=1), m.stream("b", 30, seed=2), strict=False)
    ] == alone and m.training


# ---------------------------------------------------------------------------------------------------------------- the family
@pytest.mark.parametrize("window", [1, 3, 40])
def test_what_a_layer_sees_is_its_last_tokens(window, rng):
    """Rotary positions tell distances only: one layer with a window computes what it computes of the last tokens alone."""
    changes = {"num_hidden_layers": 1, "model_type": "mistral"}
    slides, sees_all = (tiny.model(3, **changes, sliding_window=w) for w in (window, None))
    x = tiny.ids(rng, 1, 33)
    whole = tiny.logits(slides, x)
    for i in rng.integers(0, 33, 8):
        alone = tiny.logits(sees_all, x[:, max(i + 1 - window, 0) : i + 1])[:, -1]
        np.testing.assert_allclose(whole[:, i], alone, rtol=1e-4, atol=1e-5)
    assert np.allclose(whole, tiny.logits(sees_all, x), rtol=1e-4, atol=1e-5) == (window == 40)


def test_a_window_at_its_edge_and_in_some_layers_only(rng):
    """A token more than (window − 1) · layers back changes nothing, one that is so far back does; full layers see everything."""
    x = tiny.ids(rng, 1, 20)
    other = x.copy()
    other[0, 0] = (x[0, 0] + 1) % 256
    for kinds, reach in ((("sliding_attention",) * 2, 6), (("sliding_attention", "full_attention"), 20)):
        m = tiny.model(model_type="qwen3", sliding_window=4, layer_types=kinds)
        changed = np.abs(tiny.logits(m, x) - tiny.logits(m, other)).max(axis=(0, 2)) > 0
        assert changed[: reach + 1].all() and not changed[reach + 1 :].any()


def test_generation_slides_with_a_window_in_the_layers(rng):
    m = tiny.of_the_family("mistral", rng)
    with_cache, without = (list(m.stream("Hello", 100, use_cache=c, seed=4)) for c in (True, False))
    assert with_cache == without and len(with_cache) == 100


def llama3_frequency(omega, factor, low_freq_factor, high_freq_factor, old_context_len):
    """Llama 3.1's own lines (apply_scaling in its model.py), for one frequency."""
    low_freq_wavelen, high_freq_wavelen = old_context_len / low_freq_factor, old_context_len / high_freq_factor
    wavelen = 2 * math.pi / omega
    if wavelen < high_freq_wavelen:
        return omega
    if wavelen > low_freq_wavelen:
        return omega / factor
    smooth = (old_context_len / wavelen - low_freq_factor) / (high_freq_factor - low_freq_factor)
    return (1 - smooth) * omega / factor + smooth * omega


def test_frequencies_are_scaled_as_their_papers_say(rng):
    for d, theta, factor, low, high, n in (
        (128, 5e5, 8.0, 1.0, 4.0, 8192),
        (64, 5e5, 32.0, 1.0, 4.0, 8192),
        (16, 1e4, 3.5, 1.5, 9.0, 300),
    ):
        numbers = {
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": n,
        }
        expected = [llama3_frequency(theta ** (-2 * i / d), factor, low, high, n) for i in range(d // 2)]
        got = rope.frequencies(d, theta, {"rope_type": "llama3", **numbers})
        np.testing.assert_allclose(got, expected, rtol=1e-14)
        assert len({round(g / theta ** (-2 * i / d), 9) for i, g in enumerate(got)}) > 2, "some are between"

    d, theta, positions = 8, 1e4, np.arange(64)
    c = replace(tiny.CONFIG, rope_scaling={"rope_type": "linear", "factor": 4.0})
    for a, b in zip(rope.Tables()(c, 0, 64, np), ops.rope_table(positions / 4, d, theta), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-7)
    c = replace(tiny.CONFIG, rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    for tokens in (10, 64, 65, 200):
        base = theta * (2.0 * max(tokens, 64) / 64 - 1) ** (d / (d - 2))
        for a, b in zip(rope.Tables()(c, 3, tokens, np), ops.rope_table(np.arange(3, tokens), d, base), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-7)
    for a, b in zip(rope.Tables()(tiny.CONFIG, 5, 64, np), ops.rope_table(positions[5:], d, theta), strict=True):
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("kind", [None, *tiny.FAMILY])
def test_positions_end_at_max_position_embeddings(kind, rng):
    m = tiny.of_the_family(kind, rng) if kind else tiny.model()
    x, cache = tiny.ids(rng, 1, 65), KVCache(100)
    m(x[:, :64], cache)
    if kind == "dynamic":
        assert m.config.positions == math.inf
        assert np.isfinite(tiny.logits(m, x)).all() and np.isfinite(m(x[:, 64:], cache).data).all()
        return
    assert m.config.positions == 64 and m(x[:, :64])
    for run in (lambda: m(x), lambda: m(x[:, 64:], cache)):
        with pytest.raises(ValueError, match="65 tokens is longer than max_position_embeddings = 64"):
            run()
    assert cache.length == 64


def test_a_dynamic_table_depends_on_the_text_and_not_on_what_was_read_before(rng):
    m, x = tiny.of_the_family("dynamic", rng), tiny.ids(rng, 1, 90)
    first = tiny.logits(m, x[:, :70])
    tiny.logits(m, x)
    assert (tiny.logits(m, x[:, :70]) == first).all()
    assert not np.allclose(tiny.logits(m, x)[:, :70], first, atol=1e-3)


def sized(**changes):
    """A config.json of the smallest kind."""
    sizes = {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    return {"model_type": "llama", **sizes, "num_key_value_heads": 2, **changes}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model_type": "gemma2"}, "model_type is 'gemma2', tinylora reads 'llama', 'mistral', 'qwen2', 'qwen3'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling of type 'yarn' is not supported"),
        ({"rope_scaling": {"type": "su", "factor": 4.0}}, "rope_scaling of type 'su' is not supported"),
        ({"rope_parameters": {"rope_type": "proportional", "factor": 1.0}}, "of type 'proportional' is not supported"),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}},
            "'longrope' is supported only",
        ),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling of type None is not supported"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": "2"}},
            "rope_scaling.factor = '2', expected a finite number, 1e-30 or more",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "of type 'llama3': low_freq_factor is None"),
        ({"rope_scaling": "linear"}, "rope_scaling = 'linear', expected an object, or null"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "expected one rotary table for all layers"),
        ({"rope_theta": -1}, "rope_theta = -1, expected a finite number, 1e-30 or more"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"is_causal": False}, "is_causal = False is not supported"),
        ({"sliding_window": 8}, "sliding_window = 8 is not supported for model_type 'llama'"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window = 0, expected a whole number"),
        (
            {"model_type": "mistral", "attention_bias": True},
            "attention_bias = True is not supported for model_type 'mistral'",
        ),
        ({"model_type": "qwen2", "mlp_bias": True}, "mlp_bias = True is not supported for model_type 'qwen2'"),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 4}, "layer_types that differ are not supported"),
        ({"model_type": "qwen2", "layer_types": ["chunked_attention"] * 4}, r"layer_types = \['chunked_attention'"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"] * 3}, "expected 4 times 'full_attention' or"),
        ({"model_type": "qwen3", "layer_types": ["sliding_attention"] * 4}, "there is no sliding_window"),
        ({"model_type": "qwen2", "num_key_value_heads": 2.0}, "num_key_value_heads = 2.0, expected a whole number"),
        ({"hidden_size": None}, "hidden_size is missing"),
    ],
)
def test_what_is_not_computed_is_refused_by_its_name(changes, words, tmp_path):
    tiny.model().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(sized(**changes)))
    with pytest.raises(ValueError, match=words) as caught:
        Llama.from_pretrained(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_what_is_not_said_means_what_transformers_makes_of_it():
    mistral = LlamaConfig.from_dict(sized(model_type="mistral"))
    assert (mistral.sliding_window, mistral.max_position_embeddings, mistral.head_dim) == (4096, 131072, 8)
    assert LlamaConfig.from_dict(sized(model_type="mistral", sliding_window=None)).sliding_window is None
    assert LlamaConfig.from_dict(sized(model_type="qwen2", sliding_window=7)).sliding_window is None
    slides = sized(model_type="qwen2", use_sliding_window=True, max_window_layers=3)
    c = LlamaConfig.from_dict(slides)
    assert (c.sliding_window, [c.window(i) for i in range(4)]) == (4096, [None, None, None, 4096])
    c = LlamaConfig.from_dict(slides | {"sliding_window": 9, "layer_types": ["sliding_attention"] * 4})
    assert (c.sliding_window, c.layer_types, c.window(0)) == (9, None, 9)
    assert LlamaConfig.from_dict(slides | {"max_window_layers": 28}).sliding_window is None
    assert LlamaConfig.from_dict(sized(model_type="qwen3")).head_dim == 128
    assert LlamaConfig.from_dict(sized(num_key_value_heads=None, max_position_embeddings=None)).num_key_value_heads == 4
    assert LlamaConfig.from_dict(sized(max_position_embeddings=None)).max_position_embeddings == 2048
    assert LlamaConfig.from_dict(sized(model_type="qwen2", attention_bias=True)).biased == {
        "q_proj",
        "k_proj",
        "v_proj",
    }
    assert LlamaConfig.from_dict(sized(hidden_act="swish", rope_parameters={"rope_theta": 7.0})).rope_theta == 7


def test_both_spellings_of_scaled_positions():
    new = {"rope_type": "linear", "factor": 4.0, "rope_theta": 3e4}
    expected = ({"rope_type": "linear", "factor": 4.0}, 3e4)
    for spelled in (
        {"rope_parameters": new},
        {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 3e4},
        {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 4.0}, "rope_theta": 3e4},
        {
            "rope_scaling": new,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5.0},
        },  # as transformers decides
    ):
        c = LlamaConfig.from_dict(sized(**spelled))
        assert (c.rope_scaling, c.rope_theta) == expected, spelled
        assert LlamaConfig.from_dict(json.loads(json.dumps(c.to_dict()))) == c
    numbers = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    c = LlamaConfig.from_dict(sized(rope_scaling=numbers, max_position_embeddings=77))
    assert c.rope_scaling["original_max_position_embeddings"] == 77
    c = LlamaConfig.from_dict(
        sized(rope_scaling={**numbers, "original_max_position_embeddings": 9}, original_max_position_embeddings=8)
    )
    assert c.rope_scaling["original_max_position_embeddings"] == 8
    one = rope.divided([1.0, 1.5, 2.0, 2.0])
    c = LlamaConfig.from_dict(sized(rope_parameters=one))
    assert c.rope_scaling == one and LlamaConfig.from_dict(c.to_dict()) == c
    np.testing.assert_allclose(rope.divisors(8, 1e4, one), [1.0, 1.5, 2.0, 2.0])


@pytest.mark.parametrize("kind", tiny.FAMILY)
def test_the_family_in_4_bits_with_adapters_on_every_linear_layer(kind, tmp_path, rng):
    m, x = tiny.of_the_family(kind, rng), tiny.ids(rng, 2, 9)
    m.save_pretrained(tmp_path / "dense", "float32")
    four = Llama.from_pretrained(tmp_path / "dense", quantize="nf4")
    for name, layer in four.named_modules():
        if isinstance(layer, tl.nn.Linear4bit):
            assert (layer.bias is None) == (m.get(name).bias is None)
    bitsandbytes.save(four, tmp_path / "four")
    again = bitsandbytes.load(tmp_path / "four")
    assert again.config == m.config and (tiny.logits(again, x) == tiny.logits(four, x)).all()
    same = Llama.from_pretrained(tmp_path / "dense")
    for name, layer in four.named_modules():
        if isinstance(layer, tl.nn.Linear4bit):
            same.get(name).weight.data = layer.dense()
    np.testing.assert_allclose(tiny.logits(same, x), tiny.logits(four, x), rtol=1e-5, atol=1e-5)
    for base in (again, same):
        tiny.randomize_lora(tl.add_lora(base, r=2), rng)
        assert len(tl.adapters.adapters(base)) == 14  # two layers
        loss(base, x, x).backward()
        assert all(np.abs(p.grad).max() > 0 for _, p in base.trainable())
    expected = tiny.logits(same, x)
    np.testing.assert_allclose(tiny.logits(tl.merge(same), x), expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------------- spare tensors
def rewritten(folder, change):
    """The folder's tensors, changed."""
    tensors = safetensors.load_folder(folder)
    change(tensors)
    safetensors.save_safetensors(folder / "model.safetensors", tensors)


#: A dense folder, and one of each way in which a folder may hold few bits.
HELD = pytest.mark.parametrize("code", [None, "nf4", "int8_vectorwise"])


def write(m, folder, code, dtype="float32"):
    """Write a model as one of HELD; it is then what was written."""
    bitsandbytes.save(tl.quantize_linears(m, code), folder) if code else m.save_pretrained(folder, dtype)


@HELD
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_head_of_its_own_beside_a_tied_embedding_is_the_head(code, dtype, tmp_path, rng):
    m, x = tiny.model(tie_word_embeddings=False), tiny.ids(rng, 1, 9)
    write(m, tmp_path, code, dtype)
    expected = tiny.logits(Llama.from_pretrained(tmp_path), x)
    rewrite(tmp_path, tie_word_embeddings=True)
    again = Llama.from_pretrained(tmp_path)
    assert (
        (tiny.logits(again, x) == expected).all() and not again.config.tie_word_embeddings and not again.tied_parameters
    )
    if not code:
        llama.convert(tmp_path, tmp_path / "out", "float32")
        assert (tiny.logits(Llama.from_pretrained(tmp_path / "out"), x) == expected).all()


@HELD
def test_a_head_that_is_the_embedding_over_again_is_spare(code, tmp_path, rng, monkeypatch):
    monkeypatch.setattr(safetensors, "_PIECE", 1000)
    m, x = tiny.model(), tiny.ids(rng, 1, 9)
    for w in m.parameters():
        w.data = tl.dtypes.round_to(w.data, "bfloat16")
    write(m, tmp_path, code, "bfloat16")
    embedding = safetensors.load_folder(tmp_path)["model.embed_tokens.weight"]
    wide = embedding.dequantize("float32") if isinstance(embedding, BFloat16Array) else embedding
    for head in (embedding, wide):  # the same numbers in two dtypes
        rewritten(tmp_path, lambda tensors, head=head: tensors.update({"lm_head.weight": head}))
        again = Llama.from_pretrained(tmp_path)
        assert again.lm_head is None and (tiny.logits(again, x) == tiny.logits(m, x)).all()
    other = wide.copy()
    other[-1, -1] += 1e-3  # one number in the last piece
    rewritten(tmp_path, lambda tensors: tensors.update({"lm_head.weight": other}))
    assert (Llama.from_pretrained(tmp_path).lm_head.weight.data == other).all()
    rewritten(tmp_path, lambda tensors: tensors.update({"lm_head.weight": wide[:-1]}))
    with pytest.raises(ValueError, match=r"lm_head\.weight has shape \(255, 32\)"):
        Llama.from_pretrained(tmp_path)


@pytest.mark.parametrize("code", ["nf4", "int8_vectorwise"])
def test_a_head_in_few_bits_beside_a_tied_embedding(code, tmp_path, rng):
    m, x = tl.quantize_linears(tiny.model(tie_word_embeddings=False), code, skip=()), tiny.ids(rng, 1, 9)
    bitsandbytes.save(m, tmp_path)
    rewrite(tmp_path, tie_word_embeddings=True)
    assert (tiny.logits(Llama.from_pretrained(tmp_path), x) == tiny.logits(m, x)).all()


def test_an_untied_model_without_a_head_is_refused(tmp_path):
    tiny.model().save_pretrained(tmp_path)
    rewrite(tmp_path, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"the first is lm_head\.weight, and tie_word_embeddings is false"):
        Llama.from_pretrained(tmp_path)


@HELD
def test_rotary_tables_that_a_folder_carries_must_be_the_configs(code, tmp_path):
    write(tiny.model(rope_scaling={"rope_type": "linear", "factor": 4.0}), tmp_path, code)
    name, right = "model.layers.1.self_attn.rotary_emb.inv_freq", 10000.0 ** (-np.arange(4) / 4)
    for table in (
        right.astype(np.float32),
        right.astype(np.float16),
        (right / 4).astype(np.float32),
        BFloat16Array.of(right.astype("f")),
    ):
        rewritten(tmp_path, lambda tensors, table=table: tensors.update({name: table}))
        Llama.from_pretrained(tmp_path)
    for table in (500000.0 ** (-np.arange(4) / 4), right / 2, np.ones(4), right[:3]):
        rewritten(tmp_path, lambda tensors, table=table: tensors.update({name: table.astype(np.float32)}))
        with pytest.raises(ValueError, match=r"inv_freq holds other frequencies than config\.json asks for"):
            Llama.from_pretrained(tmp_path)


# ----------------------------------------------------------------------------------------------------------- other ways of quantizing
METHODS = [
    ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}, "gptq"),
    ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
    ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "fp8"),
    ({"quantization_config": {"quant_method": "hqq", "quant_config": {}}}, "hqq"),
    ({"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}}, "compressed-tensors"),
    ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
    ({"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4"),
    ({"quantization": {"group_size": 64, "bits": 4}}, "mlx"),
    ({"quantization_config": "aqlm"}, "aqlm"),
    ({"quantization_config": {"bits": 4}}, "a method without a name"),
    ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": False}}, "bitsandbytes"),
]


@pytest.mark.parametrize("changes, method", METHODS, ids=[f"{m} {i}" for i, (_, m) in enumerate(METHODS)])
def test_every_door_names_the_method_that_it_does_not_open(changes, method, tmp_path):
    tiny.model().save_pretrained(tmp_path / "m")
    rewrite(tmp_path / "m", **changes)
    doors = {
        "from_pretrained": Llama.from_pretrained,
        "interop": bitsandbytes.load,
        "its old name": bitsandbytes.open_model,
        "quantize": lambda path: bitsandbytes.quantize_folder(path, tmp_path / "out", progress=False),
        "convert": lambda path: llama.convert(path, tmp_path / "out"),
        "finetune": lambda path: tl.finetune.prepare(tl.finetune.Job(model=str(path))),
    }
    said = {}
    for name, opens in doors.items():
        with pytest.raises(ValueError, match=f"quantized by '{method}'; tinylora opens dense folders, ") as caught:
            opens(tmp_path / "m")
        said[name] = str(caught.value)
    assert len(set(said.values())) == 1 and str(tmp_path / "m") in said["interop"], "all doors say the same"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "file, method",
    [("quantize_config.json", "gptq"), ("quant_config.json", "awq"), ("hf_quant_config.json", "modelopt")],
)
def test_older_folders_name_their_method_in_a_file_beside(file, method, tmp_path):
    tiny.model().save_pretrained(tmp_path)
    (tmp_path / file).write_text("{}")
    for opens in (Llama.from_pretrained, bitsandbytes.load):
        with pytest.raises(ValueError, match=f"quantized by '{method}'"):
            opens(tmp_path)


def test_4_bits_that_are_not_there_and_not_wanted(tmp_path):
    tiny.model().save_pretrained(tmp_path / "dense")
    rewrite(
        tmp_path / "dense", quantization_config={"load_in_4bit": True}
    )  # as transformers wrote it first, without a method
    assert fourbit.held(tmp_path / "dense") == "4bit"
    with pytest.raises(ValueError, match="says load_in_4bit, and none of the folder's weights is in 4 bits"):
        Llama.from_pretrained(tmp_path / "dense")
    bitsandbytes.save(tl.quantize_linears(tiny.model()), tmp_path / "four")
    with pytest.raises(ValueError, match="its weights are in bitsandbytes' 4 bits; expected a model that is dense"):
        llama.convert(tmp_path / "four", tmp_path / "out")
    with pytest.raises(ValueError, match="quantized already"):
        bitsandbytes.quantize_folder(tmp_path / "four", tmp_path / "out", progress=False)
    assert folders.open_model(tmp_path / "four", held="4bit").config["vocab_size"] == 256


@HELD
def test_a_folder_ends_its_texts_where_generation_config_says(code, tmp_path):
    write(tiny.model(), tmp_path, code)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9], "bos_token_id": 1}))
    c = Llama.from_pretrained(tmp_path).config
    assert (c.eos_token_id, c.bos_token_id) == ((7, 9), 1)


# ------------------------------------------------------------------------------------------------------------------------- copies
def after_a_step(m, rng):
    """The model after a training step and a forward pass: with gradients, tables and whatever else these leave behind."""
    if m.trainable():
        loss(m, tiny.ids(rng, 2, 7), tiny.ids(rng, 2, 7)).backward()
    m.generate("a", 3)
    return m


def adapted(rng, base=None, **options):
    m = tl.add_lora(base or tiny.model(), r=2, **options)
    return tiny.randomize_lora(m, rng)


def several(rng):
    m = adapted(rng)
    tl.add_lora(m, r=3, name="second", target_modules=["q_proj", "down_proj"], init="gaussian")
    for _, layer in tl.adapters.adapters(m):
        for name, bypass in layer.bypasses.items():
            bypass.lora_B.weight.data += 0.1 * (name == "second")
    tl.set_adapter(m, ["default", "second"])
    return m


def merged(rng):
    m = adapted(rng)
    tl.merge(m, keep=True)
    return m


def checkpointed(rng):
    m = adapted(rng, dropout=0.1)
    m.gradient_checkpointing = True
    return m


COPIED = {
    "dense": lambda rng: tiny.model(),
    "untied": lambda rng: tiny.model().untie(),
    "adapter": adapted,
    "DoRA": lambda rng: adapted(rng, use_dora=True),
    "several adapters": several,
    "merged, and kept": merged,
    "4 bits": lambda rng: adapted(rng, tl.quantize_linears(tiny.model())),
    "8 bits": lambda rng: adapted(rng, tl.quantize_linears(tiny.model(), "int8_vectorwise")),
    "16 bits": lambda rng: adapted(rng, tl.quantize_linears(tiny.model(), "bfloat16")),
    "checkpointed": checkpointed,
    **{
        kind: lambda rng, kind=kind: adapted(rng, tiny.of_the_family(kind, rng))
        for kind in ("dynamic", "mistral", "qwen3")
    },
}


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("kind", COPIED)
def test_a_copy_computes_the_same_and_is_its_own(kind, how, rng):
    m, x = after_a_step(COPIED[kind](rng), rng), tiny.ids(rng, 2, 9)
    m.eval()
    again = how(m)
    expected = tiny.logits(m, x)
    assert (tiny.logits(again, x) == expected).all() and again.generate("a", 5) == m.generate("a", 5)
    assert [n for n, _ in again.named_weights()] == [n for n, _ in m.named_weights()]
    assert again.tied_parameters == m.tied_parameters and again.training == m.training
    for w in again.parameters():
        w.data += 1
    assert (tiny.logits(m, x) == expected).all(), "the original is as it was"
    assert not (tiny.logits(again, x) == expected).all()
    if kind == "merged, and kept":
        tl.unmerge(m)
        assert not (tiny.logits(m, x) == expected).all()


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copied_cache_goes_on_with_any_of_the_models(how, rng):
    m, x, cache = tiny.model(), tiny.ids(rng, 1, 12), KVCache(12)
    whole = tiny.logits(m, x)
    m(x[:, :5], cache)
    model, other = how((m, cache))
    for who, held in ((m, how(cache)), (model, other), (model, how(cache)), (m, cache)):
        np.testing.assert_allclose(who(x[:, 5:], held).data, whole[:, 5:], rtol=1e-4, atol=1e-5)


def test_a_full_cache_says_so(rng):
    with pytest.raises(ValueError, match="4 tokens are held and 2 come in; its capacity is 5"):
        m, cache = tiny.model(), KVCache(5)
        for n in (4, 2):
            m(tiny.ids(rng, 1, n), cache)


def test_a_model_that_is_not_dense_is_not_saved_in_part(tmp_path):
    for m in (tl.quantize_linears(tiny.model()), tl.add_lora(tiny.model(), r=2)):
        with pytest.raises(ValueError, match="merge the adapter first"):
            m.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_generation_depends_on_the_seed_only_through_the_seed():
    m = tiny.model()
    assert m.generate("a", 30, seed=1) == m.generate("a", 30, seed=1) != m.generate("a", 30, seed=2)
    assert list(m.stream("a", 50, temperature=0, stop=int(next(m.stream("a", 1, temperature=0)))))[1:] == []


@pytest.mark.parametrize(
    "options, words",
    [
        ({"temperature": -1}, "temperature = -1"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": float("inf")}, "temperature = inf"),
        ({"top_p": 0}, "top_p = 0"),
        ({"top_k": 0}, "top_k = 0"),
        ({"prompt": ""}, "prompt is empty"),
    ],
)
def test_bad_generation_options(options, words):
    with pytest.raises(ValueError, match=words):
        tiny.model().generate(**({"prompt": "a"} | options))


@pytest.mark.parametrize("kind", ["tied", "untied", *tiny.FAMILY])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_round_trip(kind, dtype, tmp_path, rng):
    m = tiny.of_the_family(kind, rng) if kind in tiny.FAMILY else tiny.model(tie_word_embeddings=kind == "tied")
    m.save_pretrained(tmp_path, dtype)
    again = Llama.from_pretrained(tmp_path)
    assert again.config == m.config
    for (name, a), (_, b) in zip(m.named_parameters(), again.named_parameters(), strict=True):
        expected = a.data if dtype == "float32" else tl.dtypes.round_to(a.data, "bfloat16")
        assert b.data.tobytes() == expected.tobytes(), name
    assert (tmp_path / "model.safetensors").stat().st_size < sum(p.size for p in m.parameters()) * (
        4 if dtype == "float32" else 2
    ) + 4000


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2', tinylora reads 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling"),
        ({"attention_bias": True}, r"8 tensors are missing, the first is model\.layers\.0\.self_attn\.k_proj\.bias"),
        (
            {"intermediate_size": 64},
            r"does not fit its config\.json: .*has shape \(48, 32\), the model's is \(64, 32\)",
        ),
        ({"num_hidden_layers": 3}, r"config\.json: num_hidden_layers = 3, and .* holds the weights of 2 layers"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"vocab_size": 300}, "vocab_size is 300"),
    ],
)
def test_a_config_that_does_not_fit(changes, words, tmp_path):
    tiny.model().save_pretrained(tmp_path)
    rewrite(tmp_path, **changes)
    with pytest.raises(ValueError, match=words):
        Llama.from_pretrained(tmp_path)


def test_a_missing_folder_and_a_broken_config(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected 'base' or a folder"):
        Llama.from_pretrained(tmp_path / "nowhere")
    tiny.model().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        Llama.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b[:20], lambda b: b"", lambda b: b"\xff" * 8 + b[8:]]
)
def test_a_damaged_weights_file(damage, tmp_path):
    tiny.model().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        Llama.from_pretrained(tmp_path)


def test_older_configs_are_read():
    c = LlamaConfig.from_dict(
        {
            "model_type": "llama",
            "vocab_size": 10,
            "hidden_size": 8,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "rope_theta": 5e5,
        }
    )
    assert (c.num_key_value_heads, c.rope_theta, c.tie_word_embeddings, c.head_dim) == (2, 5e5, False, 4)
    assert LlamaConfig.from_dict(c.to_dict()) == c


def test_bytes_are_tokens():
    t = ByteTokenizer()
    assert t.encode("é") == [0xC3, 0xA9] and t.decode([0xC3, 0xA9, 0xC3]) == "é\ufffd"


# ------------------------------------------------------------------------------------------------- a config that a stranger wrote
@pytest.mark.parametrize(
    "name, value",
    [
        ("num_hidden_layers", 2**31),
        ("num_hidden_layers", 4000),
        ("num_hidden_layers", -2),
        ("num_key_value_heads", -2),
        ("head_dim", "48"),
        ("vocab_size", 2**63),
        ("hidden_size", True),
        ("max_position_embeddings", "512"),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", "1e-5"),
        ("rope_theta", float("inf")),
        ("rope_theta", 10**30),
        ("tie_word_embeddings", "yes"),
        ("attention_bias", 1),
        ("model_type", ["llama"]),
        ("eos_token_id", [2, "x"]),
        ("bos_token_id", 1.5),
        ("rope_parameters", "x"),
        ("rope_scaling", {"rope_type": "linear", "factor": float("nan")}),
        ("rope_scaling", {"rope_type": ["linear"], "factor": 2.0}),
        ("sliding_window", -1),
        ("layer_types", [["full_attention"], 3]),
        ("max_window_layers", -5),
        ("use_sliding_window", {}),
        ("quantization_config", "x"),
        ("quantization_config", [1]),
        ("quantization_config", {"load_in_4bit": "yes"}),
        ("quantization_config", {"load_in_8bit": True, "llm_int8_threshold": float("nan")}),
        ("quantization_config", {"load_in_4bit": True, "llm_int8_skip_modules": "lm_head"}),
    ],
)
def test_a_field_of_a_config_is_checked_before_anything_is_built(name, value, tmp_path, monkeypatch):
    tiny.model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {name: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(llama, "Stack", None)  # nothing is built
    with pytest.raises(ValueError, match=rf"config\.json: (rope_parameters|{name})"):
        Llama.from_pretrained(tmp_path)


def test_a_config_without_weights_has_ranges():
    for changes in ({"num_hidden_layers": 10**6}, {"hidden_size": -32}, {"rms_norm_eps": float("nan")}):
        with pytest.raises(ValueError, match=rf"^config: {next(iter(changes))} = "):
            replace(tiny.CONFIG, **changes)
    assert type(replace(tiny.CONFIG, hidden_size=np.int64(32)).hidden_size) is int


def test_generation_config_is_checked_by_its_own_name(tmp_path):
    tiny.model().save_pretrained(tmp_path)
    for wrong in ("2", [2, None], -1, float("nan")):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
        with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id"):
            Llama.from_pretrained(tmp_path)


def test_a_config_is_no_larger_than_a_config(tmp_path):
    tiny.model().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"a": [' + "[]," * (3 << 20) + "1]}")
    with pytest.raises(ValueError, match=r"config\.json has \d+ bytes; expected at most 8388608"):
        Llama.from_pretrained(tmp_path)


def test_a_table_of_many_positions_is_made_as_far_as_it_is_asked_for(rng, monkeypatch):
    short, long = tiny.model(), tiny.model(max_position_embeddings=2**31)
    ids = tiny.ids(rng, 1, 60)
    assert (tiny.logits(short, ids) == tiny.logits(long, ids)).all()
    assert len(long._rope._made[1][np][0]) == rope.table_length(2**31, 60) == 1 << 15
    monkeypatch.setattr(rope, "_MADE_WHOLE", 8)
    again = tiny.model(max_position_embeddings=2**31)
    for end in (5, 9, 60):  # the table grows
        assert (tiny.logits(again, ids[:, :end]) == tiny.logits(short, ids[:, :end])).all()
        assert len(again._rope._made[1][np][0]) == {5: 8, 9: 16, 60: 64}[end]


# --------------------------------------------------------------------------------------------------------------- NaN and Inf
@pytest.mark.parametrize("held", ["bfloat16", "float32", "4bit"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_with_nan_are_refused_on_loading_by_file_and_tensor(held, value, tmp_path):
    if held == "4bit":
        bitsandbytes.save(tl.quantize_linears(tiny.model()), tmp_path)
    else:
        tiny.model().save_pretrained(tmp_path, held)
    tensors = safetensors.load_folder(tmp_path)
    name = "model.layers.1.input_layernorm.weight"
    w = tensors[name]
    wide = (w.dequantize("float32") if isinstance(w, BFloat16Array) else w).copy()
    wide[5] = value
    tensors[name] = BFloat16Array.of(wide) if held == "bfloat16" else wide
    safetensors.save_safetensors(tmp_path / "model.safetensors", tensors)
    what = "NaN" if np.isnan(value) else "Inf"
    with pytest.raises(ValueError, match=rf"model\.safetensors: {name} holds {what}; expected finite numbers"):
        Llama.from_pretrained(tmp_path)


def test_large_numbers_are_finite(tmp_path):
    m = tiny.model()
    m.model.norm.weight.data[:] = 3e38  # whose squares are not
    m.save_pretrained(tmp_path, "float32")
    assert (Llama.from_pretrained(tmp_path).model.norm.weight.data == np.float32(3e38)).all()
    with pytest.raises(ValueError, match=r"generate: the model's logits hold (NaN|Inf) at token 3: its weights, or"):
        next(m.stream([1, 2, 3], 1, temperature=0))


@pytest.mark.parametrize(
    "name, held",
    [
        ("model.embed_tokens.weight", "nothing but zeros"),
        ("mlp.up_proj.weight", "NaN|Inf|nothing.*"),
    ],
)
def test_what_overflows_is_said_with_the_file_and_not_by_numpy(tmp_path, capsys, name, held):
    """RMSNorm makes zeros of numbers whose squares overflow, and a model of zeros draws from all tokens alike."""
    m = tiny.model()
    for path, w in m.named_parameters():
        if path.endswith(name):
            w.data[:] = np.sign(w.data) * np.float32(1e38)
    m.save_pretrained(tmp_path, "float32")
    assert main(["generate", "--model", str(tmp_path), "--max-new-tokens", "1", "--prompt", "abc"]) == 2
    said = capsys.readouterr().err
    assert re.search(rf"logits hold ({held}) at token 3: its weights \(.*model\.safetensors\)", said), said
    assert "encountered" not in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"rope_parameters": {"rope_type": "x"}}, "rope_parameters of type 'x' is not supported .*rope_type"),
        ({"rope_scaling": {"a": {"b": []}}}, "rope_scaling = .*expected one rotary table"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 5e-324}}, "rope_parameters.factor = 5e-324"),
        ({"rope_theta": 1e-300}, "rope_theta = 1e-300"),
        ({"eos_token_id": 2**63 - 1}, "eos_token_id = 9223372036854775807"),
        ({"bos_token_id": [1, 2]}, r"bos_token_id = \[1, 2\]"),
        ({"pad_token_id": []}, r"pad_token_id = \[\]"),
    ],
)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_the_sentence_names_the_file_and_the_spelling_that_stands_there(tmp_path, changes, sentence, file):
    if file == "generation_config.json" and not changes.keys() <= {"eos_token_id", "bos_token_id", "pad_token_id"}:
        pytest.skip("this stands in config.json alone")
    tiny.model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) if file == "config.json" else {}
    config |= {"rope_parameters": None, "rope_scaling": None} if file == "config.json" else {}
    (tmp_path / file).write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=rf"/{file}: {sentence}"):
        Llama.from_pretrained(tmp_path)


def test_no_token_is_drawn_from_nan(tmp_path):
    m = tiny.model()
    m.model.layers[0].mlp.up_proj.weight.data[0, 0] = np.nan
    for heat in (0, 0.7):
        with pytest.raises(ValueError, match="generate: the model's logits hold NaN at token 1"):
            m.generate("a", 3, temperature=heat)
    assert list(tiny.model().stream("a", 3, temperature=1e-320)) == list(tiny.model().stream("a", 3, temperature=0))


@pytest.mark.parametrize("value, dtype", [(3.4e38, "bfloat16"), (np.nan, "float32"), (np.inf, "bfloat16")])
def test_what_the_dtype_does_not_hold_is_not_written(value, dtype, tmp_path):
    m = tiny.model()
    m.save_pretrained(tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    m.model.norm.weight.data[3] = value
    with pytest.raises(
        ValueError, match=rf"out: model\.norm\.weight holds NaN, Inf or numbers that {dtype} does not hold"
    ):
        m.save_pretrained(tmp_path / "out", dtype)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    if value == 3.4e38:  # float32 holds it, and the file that it comes from is named
        m.save_pretrained(tmp_path / "in", "float32")
        for opens in (
            lambda: llama.convert(tmp_path / "in", tmp_path / "new"),
            lambda: Llama.from_pretrained(tmp_path / "in", "bfloat16"),
        ):
            with pytest.raises(ValueError, match=r"in.model\.safetensors: model\.norm\.weight holds .* that bfloat16"):
                opens()
        assert not (tmp_path / "new").exists()
