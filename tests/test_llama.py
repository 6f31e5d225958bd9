"""The model: gradients, the cache, folders on disk, generation."""

import json

import numpy as np
import pytest
import tiny
from gradcheck import check

import tinylora as tl
from tinylora import KVCache, Llama, LlamaConfig, no_grad, ops
from tinylora.dtypes import BFloat16Array
from tinylora.interop import bitsandbytes
from tinylora.models import folders, fourbit, llama, safetensors
from tinylora.models.tokenizers import ByteTokenizer


def loss(m, x, t):
    return ops.softmax_cross_entropy(m(x), t)


def rewrite(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_gradients_of_the_whole_model_against_central_differences(rng):
    m, x, t = tiny.model(), tiny.ids(rng, 2, 7), tiny.ids(rng, 2, 7)
    paths = [name.rpartition(".")[0] for name, _ in m.named_parameters()]

    def with_weights(*tensors):
        for path, w in zip(paths, tensors, strict=True):
            m.get(path).weight = w
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
def test_the_cache_changes_nothing(steps, rng):
    m, x = tiny.model(), tiny.ids(rng, 2, 10)
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


def test_generation_is_without_dropout_and_leaves_the_mode_alone():
    m = tiny.randomize_lora(tl.add_lora(tiny.model(), r=4, dropout=0.5), np.random.default_rng(0)).train()
    assert m.generate("a", 30, seed=1) == m.generate("a", 30, seed=1) and m.training


def test_two_streams_can_take_turns():
    m = tiny.randomize_lora(tl.add_lora(tiny.model(), r=4, dropout=0.5), np.random.default_rng(0)).train()
    alone = list(m.stream("a", 20, seed=1))
    assert [
        a for a, _ in zip(m.stream("a", 20, seed=1), m.stream("b", 30, seed=2), strict=False)
    ] == alone and m.training


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
        ({"top_p": 0}, "top_p = 0"),
        ({"top_k": 0}, "top_k = 0"),
        ({"prompt": ""}, "prompt is empty"),
    ],
)
def test_bad_generation_options(options, words):
    with pytest.raises(ValueError, match=words):
        tiny.model().generate(**({"prompt": "a"} | options))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_round_trip(tied, dtype, tmp_path, rng):
    m = tiny.model(tie_word_embeddings=tied)
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
        ({"attention_bias": True}, "attention_bias"),
        (
            {"intermediate_size": 64},
            r"does not fit its config\.json: .*has shape \(48, 32\), the model's is \(64, 32\)",
        ),
        ({"num_hidden_layers": 3}, "does not fit its config.json: .*missing"),
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
