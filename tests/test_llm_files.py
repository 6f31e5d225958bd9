"""Real models' files: GGUF and sharded folders, read one weight at a time, and byte-pair vocabularies."""

import contextlib
import copy
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import llm_files
import numpy as np
import pytest
import tiny

import tinylora as tl
from tinylora import Llama, LlamaConfig, no_grad
from tinylora.dtypes import BFloat16Array, round_to
from tinylora.interop import bitsandbytes
from tinylora.models import files, folders, llama, rope, safetensors
from tinylora.quant import QuantizedTensor

SIZES = {"intermediate_size": 64}  # whole blocks of 32, as GGUF's types need


def logits(model, ids):
    with no_grad():
        return model(ids).data


def rewrite(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def shard(folder, parts):
    """Cut a folder's model.safetensors into several files with an index, as large models come."""
    tensors, _ = safetensors.load_safetensors(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, where = sorted(tensors), {}
    for i in range(parts):
        file = f"model-{i + 1:05d}-of-{parts:05d}.safetensors"
        safetensors.save_safetensors(folder / file, {name: tensors[name] for name in names[i::parts]})
        where |= dict.fromkeys(names[i::parts], file)
    files.write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})


# -------------------------------------------------------------------------------------------------------------- safetensors
def test_writing_one_tensor_at_a_time_gives_the_same_bytes(tmp_path, rng):
    tensors = {f"t{i}": rng.standard_normal((3, i)).astype(np.float32) for i in range(4)}
    tensors |= {f"é{i}": BFloat16Array.of(rng.standard_normal(5).astype(np.float32)) for i in range(3)}
    safetensors.save_safetensors(tmp_path / "a", tensors)
    plan = {n: ("BF16" if isinstance(w, BFloat16Array) else "F32", w.shape) for n, w in tensors.items()}
    safetensors.write_safetensors(tmp_path / "b", plan, tensors.__getitem__)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with pytest.raises(ValueError, match=r"t1 is F32 \(3, 1\), planned was F32 \(1, 3\)"):
        safetensors.write_safetensors(tmp_path / "b", plan | {"t1": ("F32", (1, 3))}, tensors.__getitem__)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_each_tensor_is_read_when_it_is_asked_for(tmp_path, rng):
    w = rng.standard_normal((40, 50)).astype(np.float32)
    stored = {"a": w, "h": w.astype(np.float16), "b": BFloat16Array.of(w), "d": w.astype(np.float64), "i": np.arange(3)}
    safetensors.save_safetensors(tmp_path / "x", stored)
    opened = safetensors.Safetensors(tmp_path / "x")
    assert sorted(opened) == sorted(stored) and opened.kind("b") == ("BF16", (40, 50)) and "c" not in opened
    for name in "ahbd":
        expected = stored[name].dequantize("float32") if name == "b" else stored[name].astype(np.float32)
        assert opened.float32(name).tobytes() == expected.tobytes() and opened.float32(name).flags.writeable
    with pytest.raises(ValueError, match="tensor i has dtype I64, expected floats"):
        opened.float32("i")
    data = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(data[:-100] + b"")
    with pytest.raises(ValueError, match="the file changed after it was opened"):
        [opened[name] for name in opened]


def test_widening_in_pieces_changes_nothing(tmp_path, rng, monkeypatch):
    w = BFloat16Array.of(rng.standard_normal((7, 9)).astype(np.float32))
    safetensors.save_safetensors(tmp_path / "x", {"w": w})
    monkeypatch.setattr(safetensors, "_PIECE", 8)
    assert safetensors.Safetensors(tmp_path / "x").float32("w").tobytes() == w.dequantize("float32").tobytes()
    dense = w.dequantize("float32") * np.float32(1.001)
    assert (folders.rounded(dense.copy(), "bfloat16") == round_to(dense, "bfloat16")).all()


def header(change):
    """Bytes of a file of two tensors whose header `change` has touched."""
    entries = {
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "U8", "shape": [3], "data_offsets": [8, 11]},
    }
    text = json.dumps(change(entries) or entries) if not isinstance(change, str) else change
    return len(text).to_bytes(8, "little") + text.encode() + bytes(11)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda e: e["a"].update(data_offsets=[0, 4]), "4 bytes are not F32"),
        (lambda e: e["b"].update(data_offsets=[7, 10]), "begins at byte 7 of the data, expected 8"),
        (lambda e: e["b"].update(data_offsets=[9, 12]), "begins at byte 9"),
        (lambda e: e.pop("b") and None, "its header speaks of"),
        (lambda e: e["a"].update(shape=[-2]), "shape"),
        (lambda e: e["a"].pop("dtype") and None, "dtype"),
        (lambda e: e.update(a=3), "not a whole safetensors file"),
        ('{"a": {}, "a": {}}', "occurs twice"),
        ("[1, 2]", "not a JSON object"),
        ("[" * 100_000, "not a whole safetensors file"),
    ],
)
def test_a_header_that_does_not_describe_its_file(change, words, tmp_path):
    (tmp_path / "x").write_bytes(header(lambda e: None))
    assert sorted(safetensors.Safetensors(tmp_path / "x")) == ["a", "b"]
    (tmp_path / "x").write_bytes(header(change))
    with pytest.raises(ValueError, match=words) as caught:
        safetensors.load_safetensors(tmp_path / "x")
    assert "is not a whole safetensors file" in str(caught.value) and str(tmp_path) in str(caught.value)


def test_whatever_is_cut_off_or_changed_gives_a_sentence(tmp_path, rng):
    """Every cut is refused; a changed byte of the header is refused or harmless, and never another kind of error."""
    safetensors.save_safetensors(tmp_path / "x", {"w": np.ones((4, 3), np.float32), "v": np.ones(5, np.uint8)})
    data = (tmp_path / "x").read_bytes()
    for n in range(len(data)):
        (tmp_path / "x").write_bytes(data[:n])
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            safetensors.Safetensors(tmp_path / "x")
    for _ in range(300):
        changed = bytearray(data)
        changed[int(rng.integers(len(data)))] = int(rng.integers(256))
        (tmp_path / "x").write_bytes(changed)
        try:
            safetensors.load_safetensors(tmp_path / "x")
        except ValueError as error:
            assert str(tmp_path) in str(error)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sharded_folder_is_one_model(dtype, tmp_path, rng):
    m, x = tiny.model(tie_word_embeddings=False), tiny.ids(rng, 1, 9)
    m.save_pretrained(tmp_path, dtype)
    whole = Llama.from_pretrained(tmp_path)
    shard(tmp_path, 3)
    assert (logits(Llama.from_pretrained(tmp_path), x) == logits(whole, x)).all()
    assert safetensors.load_folder(tmp_path).keys() == m.state_dict().keys()
    assert "of-00003" in str(safetensors.open_folder(tmp_path).where("lm_head.weight"))
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00003\.safetensors does not exist"):
        Llama.from_pretrained(tmp_path)


def test_an_index_that_is_wrong(tmp_path):
    tiny.model().save_pretrained(tmp_path)
    shard(tmp_path, 2)
    index = tmp_path / "model.safetensors.index.json"
    right = json.loads(index.read_text())
    files.write_json(index, {"weight_map": right["weight_map"] | {"more.weight": "model-00001-of-00002.safetensors"}})
    with pytest.raises(
        ValueError, match=r"weight_map says that 'more\.weight' is in model-00001-of-.*, which does not hold it"
    ):
        Llama.from_pretrained(tmp_path)
    for wrong in ({}, {"weight_map": {}}, {"weight_map": {"a": 3}}):
        files.write_json(index, wrong)
        with pytest.raises(ValueError, match=r"index\.json: weight_map"):
            Llama.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "file",
    ["..", "../in/model-00001-of-00002.safetensors", "/etc/passwd", "/dev/zero", "", "a\0b", "config.json", 3, None],
)
def test_an_index_names_files_of_its_own_folder(file, tmp_path):
    tiny.model().save_pretrained(tmp_path / "in")
    shard(tmp_path / "in", 2)
    index = tmp_path / "in" / "model.safetensors.index.json"
    listed = json.loads(index.read_text())["weight_map"]
    files.write_json(index, {"weight_map": listed | {"model.norm.weight": file}})
    with pytest.raises(ValueError, match=r"index\.json: weight_map.'model\.norm\.weight' = "):
        Llama.from_pretrained(tmp_path / "in")


def test_a_tensor_lies_where_the_index_says(tmp_path):
    tiny.model().save_pretrained(tmp_path)
    shard(tmp_path, 2)
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    index = tmp_path / "model.safetensors.index.json"
    listed = json.loads(index.read_text())["weight_map"]
    files.write_json(
        index,
        {"weight_map": listed | {"model.norm.weight": first if listed["model.norm.weight"] == second else second}},
    )
    with pytest.raises(
        ValueError, match=r"weight_map says that 'model\.norm\.weight' is in .*, which does not hold it"
    ):
        Llama.from_pretrained(tmp_path)
    files.write_json(index, {"weight_map": {n: f for n, f in listed.items() if n != "model.norm.weight"}})
    Llama.from_pretrained(tmp_path)  # a tensor that is not listed is there all the same
    for file in (first, second):
        tensors, _ = safetensors.load_safetensors(tmp_path / file)
        safetensors.save_safetensors(tmp_path / file, tensors | {"model.norm.weight": np.ones(32, np.float32)})
    with pytest.raises(ValueError, match=r"model\.norm\.weight lies in .*00001-of-00002\.safetensors too"):
        Llama.from_pretrained(tmp_path)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header, words",
    [
        ({"a": 3}, "tensor a: expected an object"),
        ({"a": ENTRY | {"dtype": ["F32"]}}, "tensor a: dtype = "),
        ({"a": ENTRY | {"dtype": "\x1b[31m"}}, r"tensor a has dtype '.x1b\[31m'"),
        ({"a": ENTRY | {"shape": "2"}}, "tensor a: shape = '2'"),
        ({"a": ENTRY | {"shape": [2.0]}}, r"tensor a: shape\[0\] = 2.0"),
        ({"a": ENTRY | {"shape": [2**63, 2**63]}}, r"tensor a: shape\[0\] = 9223372036854775808"),
        ({"a": ENTRY | {"shape": [2**32, 2**32]}}, "tensor a: 8 bytes are not F32 of shape"),
        ({"a": ENTRY | {"shape": [2] * 10**6}}, "tensor a: shape = a list of 1000000 entries"),
        ({"a": ENTRY | {"data_offsets": [8, 0]}}, "tensor a: data_offsets = "),
        ({"a": ENTRY | {"data_offsets": [0]}}, "tensor a: data_offsets = "),
        ({"a": {"dtype": "F32", "shape": [2]}}, "tensor a: data_offsets is missing"),
        ({"a\nb": ENTRY}, r"a tensor is named 'a.nb'"),
        ({"__metadata__": {"format": 3}, "a": ENTRY}, "__metadata__.'format' = 3"),
        ({"__metadata__": [1], "a": ENTRY}, r"__metadata__ = \[1\]"),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_a_header_is_checked_entry_by_entry(header, words, tmp_path):
    head = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + bytes(8))
    with pytest.raises(ValueError, match=words) as caught:
        safetensors.Safetensors(tmp_path / "x.safetensors")
    assert "x.safetensors" in str(caught.value) and str(caught.value).isprintable()


def test_a_header_takes_no_more_memory_than_a_header(tmp_path):
    import tracemalloc

    for head in (
        b" " * (17 << 20),
        b'{"a":[' + b"[]," * (4 << 20) + b"1]}",
        b'{"a":' + b"[1," * 100 + b"9," * (4 << 20),
    ):
        (tmp_path / "x").write_bytes(len(head).to_bytes(8, "little") + head)
        tracemalloc.start()
        with pytest.raises(ValueError, match=r"its header (should be|holds)"):
            safetensors.Safetensors(tmp_path / "x")
        assert tracemalloc.get_traced_memory()[1] < 2 * len(head)
        tracemalloc.stop()
    (tmp_path / "x").write_bytes((1 << 63).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="of which the header should be 9223372036854775816"):
        safetensors.Safetensors(tmp_path / "x")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without pipes")
def test_a_pipe_is_no_file(tmp_path):
    for name in ("model.safetensors", "m.gguf", "config.json"):
        tiny.model().save_pretrained(tmp_path / name)
        path = tmp_path / name / name
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        with pytest.raises((ValueError, FileNotFoundError), match=r"is a pipe|expected 'base' or a folder"):
            Llama.from_pretrained(path if name == "m.gguf" else path.parent)


def test_another_file_under_the_name_is_not_read_on(tmp_path, rng):
    w = {"a": rng.standard_normal((8, 8)).astype(np.float32)}
    safetensors.save_safetensors(tmp_path / "x", w)
    opened = safetensors.Safetensors(tmp_path / "x")
    safetensors.save_safetensors(tmp_path / "x", {"a": -w["a"]})  # of the same size
    for read in (opened.float32, opened.__getitem__, lambda name: list(opened.pieces(name))):
        with pytest.raises(ValueError, match="x: the file changed after it was opened"):
            read("a")


# ------------------------------------------------------------------------------------------------------------------- folders
def test_loading_draws_nothing_and_equals_loading_into_a_drawn_model(tmp_path):
    m = tiny.model(3, tie_word_embeddings=False)
    m.save_pretrained(tmp_path, "float32")
    tl.seed(5)
    expected = tl.backend.generator().random()
    tl.seed(5)
    again = Llama.from_pretrained(tmp_path)
    assert tl.backend.generator().random() == expected
    for (name, a), (other, b) in zip(m.named_weights(), again.named_weights(), strict=True):
        assert name == other and a.data.tobytes() == b.data.tobytes() and b.requires_grad and b.data.flags.writeable
    assert vars(again).keys() == vars(m).keys()


QUANTIZE = [
    ("nf4", {"code": "nf4"}),
    ({"code": "fp4", "blocksize": 128, "double_quant": False},) * 2,
    ({"code": "bfloat16", "compute_dtype": "bfloat16"},) * 2,
    ({"code": "nf4", "skip": ("lm_head", "down_proj")},) * 2,
    ({"code": "nf4", "skip": ()},) * 2,
    ({},) * 2,
]


@pytest.mark.parametrize("quantize, options", QUANTIZE)
@pytest.mark.parametrize("tied", [True, False])
def test_quantizing_while_reading_equals_quantizing_afterwards(quantize, options, tied, tmp_path, rng):
    tiny.model(tie_word_embeddings=tied).save_pretrained(tmp_path)
    expected = tl.quantize_linears(Llama.from_pretrained(tmp_path), **options)
    got = Llama.from_pretrained(tmp_path, quantize=quantize)
    for (name, a), (other, b) in zip(expected.named_weights(), got.named_weights(), strict=True):
        assert name == other and type(a) is type(b), name
        if isinstance(a, QuantizedTensor):
            assert a.packed.tobytes() == b.packed.tobytes() and a.absmax.tobytes() == b.absmax.tobytes()
            assert (a.blocksize, a.dtype, a.double_quant) == (b.blocksize, b.dtype, b.double_quant)
        elif isinstance(a, BFloat16Array):
            assert a.bits.tobytes() == b.bits.tobytes()
        else:
            assert a.data.tobytes() == b.data.tobytes() and not b.requires_grad
    for (name, a), (_, b) in zip(expected.named_modules(), got.named_modules(), strict=True):
        assert type(a) is type(b) and getattr(a, "compute_dtype", 0) == getattr(b, "compute_dtype", 0), name
    x = tiny.ids(rng, 1, 5)
    assert (logits(expected, x) == logits(got, x)).all()


def test_weights_rounded_to_bfloat16_say_so_when_quantized(tmp_path):
    m = tiny.model()
    m.save_pretrained(tmp_path, "float32")
    rounded = Llama.from_pretrained(tmp_path, dtype="bfloat16")
    for (name, a), (_, b) in zip(m.named_parameters(), rounded.named_parameters(), strict=True):
        assert (round_to(a.data, "bfloat16") == b.data).all(), name
    four, path = Llama.from_pretrained(tmp_path, "bfloat16", "nf4"), "model.layers.1.mlp.up_proj"
    q = four.get(path).weight
    expected = tl.quantize(BFloat16Array.of(m.get(path).weight.data), "nf4", double_quant=True)
    assert q.dtype == expected.dtype == "bfloat16" and q.packed.tobytes() == expected.packed.tobytes()
    with pytest.raises(ValueError, match="dtype 'float8' is unknown: expected 'float32' or 'bfloat16'"):
        Llama.from_pretrained(tmp_path, dtype="float8")


def test_a_weight_that_cannot_be_quantized_is_named(tmp_path):
    m = tiny.model()
    m.model.layers[1].mlp.up_proj.weight.data[0, 0] = np.inf
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN, Inf or numbers that"):
        m.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    tiny.model().save_pretrained(tmp_path)
    tensors = {name: w.data for name, w in m.named_parameters()}
    safetensors.save_safetensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(ValueError, match=r"model\.safetensors: model\.layers\.1\.mlp\.up_proj\.weight holds Inf"):
        Llama.from_pretrained(tmp_path, quantize="nf4")


def test_one_door_takes_the_options_and_refuses_to_quantize_twice(tmp_path):
    tiny.model().save_pretrained(tmp_path / "dense")
    four = Llama.from_pretrained(tmp_path / "dense", quantize="nf4")
    bitsandbytes.save(four, tmp_path / "four")
    again = Llama.from_pretrained(tmp_path / "four")
    path = "model.layers.0.self_attn.q_proj"
    assert again.get(path).weight.packed.tobytes() == four.get(path).weight.packed.tobytes()
    with pytest.raises(ValueError, match="in 4 bits already"):
        Llama.from_pretrained(tmp_path / "four", quantize="nf4")


def test_tensors_that_may_and_may_not_be_there(tmp_path):
    m = tiny.model()
    m.save_pretrained(tmp_path, "float32")
    tensors = safetensors.load_folder(tmp_path)
    spare = {
        "lm_head.weight": tensors["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": (10000.0 ** (-np.arange(4) / 4)).astype(np.float16),
    }
    safetensors.save_safetensors(tmp_path / "model.safetensors", tensors | spare)
    assert Llama.from_pretrained(tmp_path).lm_head is None
    safetensors.save_safetensors(tmp_path / "model.safetensors", tensors | {"model.bias": np.ones(4, np.float32)})
    with pytest.raises(ValueError, match=r"it holds model\.bias, which the model does not have"):
        Llama.from_pretrained(tmp_path)
    whole = {"model.norm.weight": np.ones(32, np.int32)}
    safetensors.save_safetensors(tmp_path / "model.safetensors", tensors | whole)
    with pytest.raises(ValueError, match=r"model\.norm\.weight has dtype I32, expected floats"):
        Llama.from_pretrained(tmp_path)


def test_configs_of_real_folders():
    c = {
        "model_type": "llama",
        "vocab_size": 10,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": None,
        "rope_scaling": None,
        "rope_theta": None,
        "rope_parameters": {"rope_theta": 3e4, "rope_type": "default"},
        "pretraining_tp": 1,
        "transformers.js_config": {},
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
    }
    config = LlamaConfig.from_dict(c)
    assert (config.rope_theta, config.head_dim, config.eos_token_id, config.bos_token_id) == (3e4, 4, (2, 3), 1)
    assert LlamaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="rope_interleaved = True is not supported"):
        LlamaConfig.from_dict(c | {"rope_interleaved": True})


def test_a_text_ends_where_the_config_says(tmp_path):
    m = tiny.model()
    tokens = list(m.stream("a", 9, temperature=1))
    first, second = tokens[:2]
    assert len(set(tokens[:3])) == 3, "the first tokens should differ"
    m.config = tl.llama.replace(m.config, bos_token_id=1, eos_token_id=second)
    m.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": second}
    again = Llama.from_pretrained(tmp_path)
    assert again.config == m.config
    assert list(m.stream("a", 9, temperature=1)) == [first, second]
    assert list(m.stream("a", 9, temperature=1, stop=())) == tokens
    assert list(m.stream("a", 9, temperature=1, stop=(first, 7))) == [first]
    files.write_json(tmp_path / "generation_config.json", {"eos_token_id": [second, 9]})
    assert Llama.from_pretrained(tmp_path).config.eos_token_id == (second, 9)


# ---------------------------------------------------------------------------------------------------------------------- GGUF
SHAPES = [
    {},
    {"num_key_value_heads": 4},
    {"num_key_value_heads": 1, "tie_word_embeddings": False},
    {"head_dim": 16, "rope_theta": 1e5, "rms_norm_eps": 1e-6},
]


#: A GGUF has no dynamic scaling, and only a llama's and no Qwen's window.
FAMILY = [kind for kind in tiny.FAMILY if kind not in ("dynamic", "qwen2 with windows")]


@pytest.mark.parametrize("changes", [*SHAPES, *FAMILY], ids=str)
def test_a_gguf_is_the_model_that_was_written(changes, tmp_path, rng):
    pytest.importorskip("gguf")
    family = changes in FAMILY
    m = tiny.of_the_family(changes, rng) if family else tiny.model(int(rng.integers(1000)), **SIZES, **changes)
    x = tiny.ids(rng, 2, 11)
    llm_files.write_gguf(tmp_path / "m.gguf", m)
    if changes == "llama3":  # the header holds divisors, and not what they were computed from
        d, theta, scaling = m.config.head_dim, m.config.rope_theta, m.config.rope_scaling
        m.config = replace(m.config, rope_scaling=rope.divided(rope.divisors(d, theta, scaling).astype(np.float32)))
    again = Llama.from_pretrained(tmp_path / "m.gguf")
    assert again.config == m.config
    for (name, a), (other, b) in zip(m.named_weights(), again.named_weights(), strict=True):
        assert name == other and a.data.tobytes() == b.data.tobytes(), name
    assert (logits(m, x) == logits(again, x)).all()


def test_scaled_positions_of_a_gguf_are_a_folders(tmp_path, rng):
    """Llama 3.1's numbers are known again in its divisors; others stay divisors, which transformers has a name for, too."""
    pytest.importorskip("gguf")
    numbers = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    large = {"head_dim": 64, "rope_theta": 5e5, "num_attention_heads": 2, "max_position_embeddings": 300}
    for factor in (8.0, 32.0):
        m = tiny.model(**SIZES, **large, rope_scaling={"rope_type": "llama3", "factor": factor, **numbers})
        llm_files.write_gguf(tmp_path / "m.gguf", m)
        again, x = Llama.from_pretrained(tmp_path / "m.gguf"), tiny.ids(rng, 1, 290)
        assert again.config == m.config and (logits(again, x) == logits(m, x)).all()
    m = tiny.model(**SIZES)
    for value, expected in ((0.0, None), (4.0, {"rope_type": "linear", "factor": 4.0}), (1.0, None)):
        for name in ("rope.scaling.factor", "rope.scale_linear"):  # the second is what older files say
            llm_files.write_gguf(tmp_path / "m.gguf", m, more={f"llama.{name}": value})
            assert Llama.from_pretrained(tmp_path / "m.gguf").config.rope_scaling == expected
    off = {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}  # llama.cpp: none is none
    for more, tensors in ((off, {}), ({}, {"rope_freqs.weight": np.ones(4, np.float32)})):
        llm_files.write_gguf(tmp_path / "m.gguf", m, more=more, extra_tensors=tensors)
        assert Llama.from_pretrained(tmp_path / "m.gguf").config == m.config
    divisors = rng.uniform(1, 9, 4).astype(np.float32)
    llm_files.write_gguf(tmp_path / "m.gguf", m, extra_tensors={"rope_freqs.weight": divisors})
    again, x = Llama.from_pretrained(tmp_path / "m.gguf"), tiny.ids(rng, 1, 30)
    llama.convert(tmp_path / "m.gguf", tmp_path / "out", "float32")
    assert (logits(again, x) == logits(Llama.from_pretrained(tmp_path / "out"), x)).all()
    assert not np.allclose(logits(again, x), logits(m, x), atol=1e-3)


def test_windows_of_a_gguf(tmp_path):
    pytest.importorskip("gguf")
    m = tiny.model(**SIZES, model_type="mistral", sliding_window=9)
    for window, expected in ((9, ("mistral", 9)), (64, ("llama", None)), (0, ("llama", None))):
        llm_files.write_gguf(tmp_path / "m.gguf", m, **{"attention.sliding_window": window})
        c = Llama.from_pretrained(tmp_path / "m.gguf").config
        assert (c.model_type, c.sliding_window) == expected
    m = tiny.model(**SIZES, model_type="qwen2")
    llm_files.write_gguf(tmp_path / "m.gguf", m, **{"attention.sliding_window": 9})
    with pytest.raises(ValueError, match=r"qwen2\.attention\.sliding_window is 9; expected none"):
        Llama.from_pretrained(tmp_path / "m.gguf")


def dequantizable():
    """The types that the gguf package dequantizes."""
    gguf = pytest.importorskip("gguf")
    found = []
    for kind in gguf.GGMLQuantizationType:
        with contextlib.suppress(NotImplementedError):
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
            found.append(kind)
    return found


def test_every_type_that_can_be_dequantized_is_read(tmp_path, rng):
    """IQ4_NL and its like begin with the letter of an integer type and are floats in few bits."""
    gguf, kinds = pytest.importorskip("gguf"), dequantizable()
    assert {"IQ4_NL", "IQ2_XXS", "IQ3_S", "TQ1_0", "Q6_K", "F16"} <= {kind.name for kind in kinds}
    for kind in kinds:
        width = max(gguf.GGML_QUANT_SIZES[kind][0], 32)
        sizes = {"hidden_size": width, "intermediate_size": width, "head_dim": width // 4}
        m = tiny.model(**sizes, num_hidden_layers=1)
        raw, written = {}, {}
        for name, w in m.named_parameters():
            if w.ndim == 2:
                shape = (len(w.data), width // gguf.GGML_QUANT_SIZES[kind][0] * gguf.GGML_QUANT_SIZES[kind][1])
                raw[name] = rng.integers(0, 60, shape, dtype=np.uint8)  # no scale in it is NaN or Inf
                written[name] = gguf.dequantize(raw[name], kind)
        writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
        sizes = {"context_length": 64, "embedding_length": width, "block_count": 1, "feed_forward_length": width}
        for name, value in (sizes | {"attention.head_count": 4, "attention.head_count_kv": 2}).items():
            writer.add_uint32(f"llama.{name}", value)
        writer.add_layer_norm_rms_eps(1e-5)
        for name, w in m.named_parameters():
            if w.ndim == 2:
                writer.add_tensor(llm_files.gguf_name(name), raw[name], raw_dtype=kind)
            else:
                writer.add_tensor(llm_files.gguf_name(name), w.data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        again = dict(Llama.from_pretrained(tmp_path / "m.gguf").named_parameters())
        for name, w in written.items():
            heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
            found = again[name].data
            assert (llm_files.interleaved(found, heads) if heads else found).tobytes() == w.tobytes(), (kind.name, name)


@pytest.mark.parametrize("kinds", [("Q4_0",), ("Q4_1", "Q8_0"), ("F16", "BF16", "F32"), ("Q5_0", "Q5_1")])
def test_a_gguf_in_few_bits_is_what_the_bits_stand_for(kinds, tmp_path, rng, monkeypatch):
    pytest.importorskip("gguf")
    from tinylora.models import gguf

    monkeypatch.setattr(gguf, "_PIECE", int(rng.integers(1, 2000)))
    m = tiny.model(int(rng.integers(1000)), **SIZES)
    written = llm_files.write_gguf(tmp_path / "m.gguf", m, kinds)
    again = dict(Llama.from_pretrained(tmp_path / "m.gguf").named_parameters())
    for name, w in written.items():
        assert again[name].data.tobytes() == w.astype(np.float32).tobytes(), name
    assert gguf.GGUF(tmp_path / "m.gguf").kind("model.embed_tokens.weight") == (kinds[0], (256, 32))


def test_a_permutation_that_is_not_undone_would_be_seen(tmp_path, rng, monkeypatch):
    pytest.importorskip("gguf")
    from tinylora.models import gguf
    from tinylora.models.gguf import halves

    m, x = tiny.model(**SIZES), tiny.ids(rng, 1, 20)
    llm_files.write_gguf(tmp_path / "m.gguf", m)
    with monkeypatch.context() as patch:
        patch.setattr(gguf, "halves", lambda w, heads: w)
        wrong = logits(Llama.from_pretrained(tmp_path / "m.gguf"), x)
    assert np.abs(wrong - logits(m, x)).max() > 0.01 * np.abs(wrong).max()

    w = rng.standard_normal((24, 5)).astype(np.float32)
    for heads in (1, 2, 3, 6):
        assert (halves(llm_files.interleaved(w, heads), heads) == w).all()
    assert not (llm_files.interleaved(w, 2) == w).all()
    with pytest.raises(ValueError, match="24 rows are not 8 heads of an even size"):
        halves(w, 8)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"more": {"llama.rope.scaling.type": "yarn"}}, "rope.scaling.type is 'yarn'; expected 'linear' or 'none'"),
        (
            {"more": {"llama.rope.scaling.factor": -2.0}},
            "rope.scaling.factor = -2.0, expected a finite number, 1e-30 or more",
        ),
        (
            {"more": {"llama.rope.scaling.attn_factor": 2.0}},
            "attn_factor is 2.0; expected attention that is not scaled",
        ),
        ({"more": {"llama.attention.scale": 1.0}}, "llama.attention.scale is 1.0, expected 1/√8"),
        ({"more": {"llama.logit_scale": 16.0}}, "llama.logit_scale is 16.0; expected logits that are not scaled"),
        (
            {"more": {"llama.rope.scaling.factor": 2.0}, "extra_tensors": {"rope_freqs.weight": np.full(4, 2, "f")}},
            "rope.scaling.factor is 2.0 beside rope_freqs.weight; expected one of the two",
        ),
        ({"rope.dimension_count": 4}, "rope.dimension_count is 4; expected every dimension"),
        ({"attention.value_length": 4}, "attention.value_length is 4"),
        ({"expert_count": 8}, "expert_count is 8; expected no experts"),
        (
            {"extra_tensors": {"rope_freqs.weight": np.ones(3, np.float32)}},
            r"rope_freqs.weight is \[.*expected 4 positive",
        ),
        (
            {"extra_tensors": {"rope_freqs.weight": np.zeros(4, np.float32)}},
            r"rope_freqs.weight is \[.*expected 4 positive",
        ),
        (
            {"extra_tensors": {"rope_factors_long.weight": np.ones(4, "f")}},
            "a tensor is named rope_factors_long.weight",
        ),
        (
            {"extra_tensors": {"blk.0.attn_q.bias": np.ones(32, np.float32)}},
            r"7 tensors are missing, the first is model\.layers\.0\.self_attn\.k_proj\.bias",
        ),
        (
            {"extra_tensors": {"blk.0.attn_q_norm.weight": np.ones(8, np.float32)}},
            r"it holds model\.layers\.0\.self_attn\.q_norm\.weight, which the model does not have",
        ),
        ({"extra_tensors": {"blk.0.attn_q.scale": np.ones(1, np.float32)}}, "a tensor is named blk.0.attn_q.scale"),
        ({"extra_tensors": {"blk.0.output.weight": np.ones(4, np.float32)}}, "a tensor is named blk.0.output.weight"),
        ({"extra_tensors": {"attn_q.weight": np.ones(4, np.float32)}}, "a tensor is named attn_q.weight"),
        ({"extra_tensors": {"output.weight": np.ones((2, 2), np.int32)}}, "lm_head.weight is of type I32"),
        ({"extra_tensors": {"output.weight": np.ones((2, 2), np.float32)}}, r"lm_head.weight has shape \(2, 2\)"),
        ({"block_count": 3}, "its block_count is 3, it holds tensors of 2 blocks"),
        ({"block_count": None}, "llama.block_count = None, expected a whole number from 1"),
        ({"feed_forward_length": 96}, r"does not fit its header: .*has shape \(64, 32\), the model's is \(96, 32\)"),
    ],
)
def test_a_gguf_that_is_not_quite_a_llama(options, words, tmp_path):
    pytest.importorskip("gguf")
    llm_files.write_gguf(tmp_path / "m.gguf", tiny.model(**SIZES), **options)
    with pytest.raises(ValueError, match=words) as caught:
        Llama.from_pretrained(tmp_path / "m.gguf")
    assert str(tmp_path / "m.gguf") in str(caught.value)


def test_another_architecture_and_another_file(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gpt2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        ValueError, match=r"the architecture is 'gpt2' \(general\.architecture\), tinylora reads 'llama'"
    ):
        Llama.from_pretrained(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_bytes(b"GGML" + bytes(100))
    with pytest.raises(ValueError, match=r"not a whole GGUF file \(it does not begin with GGUF\)"):
        Llama.from_pretrained(tmp_path / "m.gguf")
    with pytest.raises(FileNotFoundError, match=r"nothing\.gguf does not exist"):
        Llama.from_pretrained(tmp_path / "nothing.gguf")


def test_a_gguf_that_is_cut_or_changed_gives_a_sentence(tmp_path, rng):
    """Every cut of the header and of the data is refused; a changed byte is refused or harmless, and no other error comes."""
    pytest.importorskip("gguf")
    pytest.importorskip("tokenizers")
    from tinylora.models.gguf import GGUF

    m, path = tiny.model(**SIZES, num_hidden_layers=1, vocab_size=300), tmp_path / "m.gguf"
    llm_files.write_gguf(path, m, ("Q8_0",), llm_files.trained())
    data, opened = path.read_bytes(), GGUF(path)
    begin = min(place for _, _, place in opened._tensors.values())
    end = len(data)
    while data[end - 1] == 0:  # the last padding may be missing
        end -= 1
    for n in [*rng.integers(0, begin, 60), *rng.integers(begin, end, 20), 0, 1, 4, 8, 24, end - 1]:
        path.write_bytes(data[:n])
        with pytest.raises(ValueError, match="is not a whole GGUF file"):
            Llama.from_pretrained(path)
    for _ in range(300):
        changed = bytearray(data)
        place = int(rng.integers(1000 if rng.random() < 0.5 else begin))
        changed[place] = int(rng.integers(256))
        path.write_bytes(changed)
        with contextlib.suppress(ValueError):
            Llama.from_pretrained(path)


def gguf_header(entries, tensors=(), counts=None, version=3):
    """The bytes of a GGUF without data: entries {name: (type, bytes)}, tensors [(name, shape, type, offset)]."""

    def text(x):
        return struct.pack("<Q", len(x)) + x

    n, m = counts or (len(tensors), len(entries))
    out = b"GGUF" + struct.pack("<IQQ", version, n, m)
    for name, (kind, raw) in entries.items():
        out += text(name.encode()) + struct.pack("<I", kind) + raw
    for name, shape, kind, offset in tensors:
        out += text(name.encode()) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return out


Q, ARCH = struct.Struct("<Q").pack, (8, struct.pack("<Q", 5) + b"llama")


@pytest.mark.parametrize(
    "data, words",
    [
        (gguf_header({}, counts=(2**60, 0)), "expected at most 65536 of each"),
        (gguf_header({}, counts=(0, 2**60)), "expected at most 65536 of each"),
        (gguf_header({"a": (8, Q(2**62))}), "cut short"),
        (gguf_header({"a": (9, struct.pack("<IQ", 4, 2**61))}), "cut short"),
        (gguf_header({"a": (9, struct.pack("<IQ", 8, 2**61))}), "cut short"),
        (gguf_header({"a": (9, struct.pack("<IQ", 9, 2))}), "a is of type 9, which is none that is read"),
        (gguf_header({"a": (99, b"")}), "a is of type 99"),
        (gguf_header({"a\nb": (4, bytes(4))}), "the entry 'a.nb' has a name that cannot be printed"),
        (gguf_header({"a": (6, struct.pack("<f", np.nan))}), "a holds NaN"),
        (gguf_header({"a": (9, struct.pack("<IQ2d", 12, 2, 1.0, np.nan))}), "a holds NaN"),
        (gguf_header({"a": (9, struct.pack("<IQ", 0, 1 << 22) + bytes(1 << 22))}), "a brings the values of its arrays"),
        (gguf_header({"general.alignment": (4, struct.pack("<I", 0))}), "general.alignment = 0"),
        (gguf_header({"general.alignment": (4, struct.pack("<I", 48))}), "general.alignment = 48"),
        (gguf_header({"general.architecture": (9, struct.pack("<IQ", 4, 0))}), r"general\.architecture"),
        (
            gguf_header({"general.architecture": ARCH}, [("blk.0.attn_q.weight", (0, 4), 0, 0)]),
            r"of shape \(4, 0\) is not made of",
        ),
        (gguf_header({"general.architecture": ARCH}, [("blk.0.attn_q.weight", (2**62, 2**62), 0, 0)]), "truncated"),
        (gguf_header({"general.architecture": ARCH}, [("blk.0.attn_q.weight", (2,), 0, 2**63)]), "truncated"),
        (gguf_header({"general.architecture": ARCH}, [("blk.0.attn_q.weight", (2,), 77, 0)]), "is of type 77"),
        (
            gguf_header({"general.architecture": ARCH}, [(f"blk.{'9' * 5000}.attn_q.weight", (2,), 0, 0)]),
            "which tinylora's",
        ),
        (
            gguf_header({"general.architecture": ARCH}, [("a", (2,), 0, 0), ("a", (2,), 0, 0)]),
            "the tensor 'a' occurs twice",
        ),
        (gguf_header({"general.architecture": ARCH}), "llama.attention.head_count = None"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_gguf_header_that_a_stranger_wrote(data, words, tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=words) as caught:
        Llama.from_pretrained(tmp_path / "m.gguf")
    assert "m.gguf" in str(caught.value)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1.0, 0.0])
@pytest.mark.parametrize(
    "key", ["rope.freq_base", "attention.layer_norm_rms_epsilon", "attention.scale", "rope.scaling.factor"]
)
def test_a_number_of_a_gguf_that_is_none_is_refused_and_nothing_written(key, value, tmp_path):
    pytest.importorskip("gguf")
    own = key in ("rope.freq_base", "attention.layer_norm_rms_epsilon")
    llm_files.write_gguf(tmp_path / "m.gguf", tiny.model(), more=None if own else {f"llama.{key}": 1.25})
    data = bytearray((tmp_path / "m.gguf").read_bytes())
    at = data.index(key.encode()) + len(key) + 4
    data[at : at + 4] = struct.pack("<f", value)
    (tmp_path / "m.gguf").write_bytes(data)
    if value == 0 and not own:
        return  # 0 says nothing there
    with pytest.raises(ValueError, match=rf"m\.gguf.*llama\.{key}"):
        llama.convert(tmp_path / "m.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind, bad", [("F32", b"\x00\x00\xc0\x7f"), ("F16", b"\x00\x7c"), ("Q8_0", b"\x00\x7e")])
def test_weights_of_a_gguf_with_nan_are_refused_by_name(kind, bad, tmp_path):
    pytest.importorskip("gguf")
    from tinylora.models.gguf import GGUF

    path = tmp_path / "m.gguf"
    llm_files.write_gguf(path, tiny.model(**SIZES), (kind,))
    name = "model.layers.1.mlp.down_proj.weight"
    data, place = bytearray(path.read_bytes()), GGUF(path)._tensors[name][2]
    data[place : place + len(bad)] = bad
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"m\.gguf: {name} holds (NaN|Inf)"):
        Llama.from_pretrained(path)


# ------------------------------------------------------------------------------------------------------------- the vocabulary
STRINGS = [
    "Once upon a time, in 1984, 12345 mills.",
    "isn't it? they'll we've I'd; (x + y) * z == 3.14e-5\n\n\n    return\t7\r\n",
    "  two  spaces,   three    four\n \n  5\n\n 6",
    "naïve café Ωmega 你好 — “quoted” ½ ³ \u0663\u0664 e\u0301",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>x<|im_star",
    "\x00\x7f\u00ad\u200b \u00a0\ufeff",
    "",
]


@pytest.mark.parametrize("digits", [True, False])
def test_a_vocabulary_from_a_gguf_is_the_one_that_was_written(digits, tmp_path, rng):
    pytest.importorskip("gguf")
    pytest.importorskip("tokenizers")
    t = llm_files.trained(digits=digits)
    m = tiny.model(**SIZES, vocab_size=t.vocab_size + 4)  # rows beyond the vocabulary, as padded embeddings have
    llm_files.write_gguf(tmp_path / "m.gguf", m, tokenizer=t, pre="smollm" if digits else "gpt-2")
    model = Llama.from_pretrained(tmp_path / "m.gguf")
    again = model.tokenizer
    assert again.vocab_size == t.vocab_size and again.settings == t.settings and again.end_id == 2
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (1, 2, 2)
    for text in [*STRINGS, "".join(chr(int(i)) for i in rng.integers(1, 0xD7FF, 50))]:
        ids = t.encode(text)
        assert again.encode(text) == again.encode(text.encode()) == ids == t.backend.encode(text).ids
        plain = "".join(part for part in [text] if "<|" not in part) or None
        if plain is not None:
            assert again.decode(ids) == plain and b"".join(map(again.token_bytes, ids)) == plain.encode()
    assert again.token_bytes(2) == b"" and again.decode([2]) == "" and again.token_bytes(again.vocab_size + 1) == b""
    assert all(len(again.encode(mark)) == 1 for mark in llm_files.SPECIAL)


def test_digits_after_white_space_are_what_pre_decides(tmp_path):
    pytest.importorskip("tokenizers")
    cut, whole = llm_files.trained(digits=True), llm_files.trained(digits=False)
    assert whole.encode(" 12345") != cut.encode(" 12345") and len(cut.encode("12345")) == 5


def test_a_text_grows_token_by_token_through_cut_characters():
    import codecs

    pytest.importorskip("tokenizers")
    t, text = llm_files.trained(), "日本 naïve"
    ids = t.encode(text)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pieces = [decoder.decode(t.token_bytes(i)) for i in ids]
    assert "" in pieces and "".join(pieces) == text  # a token that ends inside a character shows nothing yet
    assert t.decode(ids[:1]) == "\ufffd"


def test_the_chat_prompt_is_chatml():
    pytest.importorskip("tokenizers")
    t = llm_files.trained()
    expected = (
        "<|im_start|>system\nYou are a miller.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert t.chat_prompt("hi") == t.encode(expected) and t.chatml
    assert t.chat_prompt("hi", system="Be short.") == t.encode(expected.replace("You are a miller.", "Be short."))
    assert t.chat_prompt("hi", system="") == t.encode(expected.replace("You are a miller.", "")), "as the template does"
    plain, alone = llm_files.trained(template=None), expected[expected.index("<|im_start|>user") :]
    assert plain.chats and plain.chat_prompt("hi") == plain.chat_prompt("hi", system="") == t.encode(alone)


def test_a_vocabulary_without_marks_has_no_chat_prompt():
    tokenizers = pytest.importorskip("tokenizers")
    from tinylora.models.tokenizers import BPETokenizer

    t = BPETokenizer(
        tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "</s>": 1}, merges=[])),
        {"eos_token": {"content": "</s>"}},
    )
    assert not t.chatml and t.end_id == 1
    with pytest.raises(ValueError, match="no <|im_start|> and <|im_end|>".replace("|", r"\|")):
        t.chat_prompt("a")


def test_a_sentencepiece_vocabulary_in_a_tokenizer_json(tmp_path):
    """Llama 2's kind: a mark for spaces, and bytes for what is not in the vocabulary."""
    tokenizers = pytest.importorskip("tokenizers")
    from tinylora.models.tokenizers import load_tokenizer

    letters = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581", "a", "b", "\u2581a"]
    model = tokenizers.models.BPE(
        vocab={t: i for i, t in enumerate(letters)}, merges=[("\u2581", "a")], unk_token="<unk>", byte_fallback=True
    )
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    d = tokenizers.decoders
    backend.decoder = d.Sequence([d.Replace("\u2581", " "), d.ByteFallback(), d.Fuse()])
    backend.save(str(tmp_path / "tokenizer.json"))
    t, text = load_tokenizer(tmp_path, 300), "ab a é b"
    assert t.decode(t.encode(text)) == text and b"".join(map(t.token_bytes, t.encode(text))) == text.encode()


def test_a_folder_carries_its_vocabulary(tmp_path):
    pytest.importorskip("tokenizers")
    t = llm_files.trained()
    m = Llama(tl.llama.replace(tiny.CONFIG, vocab_size=t.vocab_size, bos_token_id=1, eos_token_id=2), t)
    m.save_pretrained(tmp_path, "float32")
    again = Llama.from_pretrained(tmp_path)
    assert again.config == m.config and again.tokenizer.settings == t.settings
    assert [again.tokenizer.encode(s) for s in STRINGS] == [t.encode(s) for s in STRINGS]
    assert again.generate("Once upon", 8, seed=3, stop=()) == m.generate("Once upon", 8, seed=3, stop=())
    four = bitsandbytes.load(_four(m, tmp_path / "four"))
    assert four.tokenizer.encode("In 1984") == t.encode("In 1984")
    (tmp_path / "chat_template.jinja").write_text(llm_files.TEMPLATE.replace("You are a miller.", "Other words."))
    other = Llama.from_pretrained(tmp_path).tokenizer
    assert other.chat_prompt("hi") == t.chat_prompt("hi", system="Other words.")


def _four(model, folder):
    bitsandbytes.save(tl.quantize_linears(model), folder)
    return folder


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copied_model_has_its_vocabulary(how):
    pytest.importorskip("tokenizers")
    t = llm_files.trained()
    m = Llama(replace(tiny.CONFIG, vocab_size=t.vocab_size, eos_token_id=2), t)
    m.generate("Once upon", 3)
    again = how(m)
    assert again.tokenizer is not t and again.tokenizer.settings == t.settings
    for text in STRINGS:
        ids = again.tokenizer.encode(text)
        assert ids == t.encode(text) and again.tokenizer.decode(ids) == t.decode(ids)
    assert again.tokenizer.chat_prompt("hi") == t.chat_prompt("hi")
    assert again.generate("Once upon", 8, seed=3, stop=()) == m.generate("Once upon", 8, seed=3, stop=())


def test_a_vocabulary_that_does_not_fit(tmp_path):
    pytest.importorskip("tokenizers")
    t = llm_files.trained()
    Llama(tl.llama.replace(tiny.CONFIG, vocab_size=t.vocab_size), t).save_pretrained(tmp_path)
    rewrite(tmp_path, vocab_size=t.vocab_size - 1)
    with pytest.raises(ValueError, match=r"tokenizer\.json: 300 tokens, but the model's vocab_size is 299"):
        Llama.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="not a tokenizer that the tokenizers package reads"):
        Llama.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"vocab_size is 299 and there is no tokenizer\.json"):
        Llama.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model": "t5"}, "its tokenizer is 't5'; tinylora builds 'gpt2'"),
        ({"model": "llama"}, "tokens and scores do not belong together"),
        ({"model": "llama", "scores": [0.0, 0.0, "a"]}, "tokens and scores do not belong together"),
        ({"model": "llama", "scores": [0.0, 0.0, 0.0], "remove_extra_whitespaces": True}, "changes a text before"),
        ({"pre": "viking"}, "is 'viking'; tinylora knows a.x-4.0, chatglm-bpe"),
        ({"pre": None}, r"names no way of cutting text before the merges \(tokenizer.ggml.pre\)"),
        ({"tokens": ["a", "a", "ab"]}, "no list of different texts"),
        ({"tokens": [1, 2, 3]}, "no list of different texts"),
        ({"merges": None}, "do not belong together"),
        ({"token_type": [1]}, "do not belong together"),
        ({"merges": ["zz yy"]}, "the merges do not fit the vocabulary"),
    ],
)
def test_a_gguf_vocabulary_that_is_not_known(changes, words):
    pytest.importorskip("tokenizers")
    from tinylora.models.tokenizers import BPETokenizer

    entries = {"model": "gpt2", "pre": "smollm", "tokens": ["a", "b", "ab"], "token_type": [1, 1, 1], "merges": ["a b"]}
    named = {f"tokenizer.ggml.{name}": value for name, value in (entries | changes).items()}
    with pytest.raises(ValueError, match=words):
        BPETokenizer.from_gguf(named)


def test_without_the_packages_a_sentence_says_which(tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(
        ValueError, match=r"reading a GGUF file needs the gguf package: pip install -e '\.\[llm\]' in a clone"
    ):
        Llama.from_pretrained(tmp_path / "m.gguf")
    tiny.model().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"needs the tokenizers package: pip install -e '\.\[llm\]' in a clone"):
        Llama.from_pretrained(tmp_path)


# ----------------------------------------------------------------------------------------------------------------- converting
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gguf_becomes_a_folder(dtype, tmp_path, rng):
    pytest.importorskip("gguf")
    pytest.importorskip("tokenizers")
    t, x = llm_files.trained(), tiny.ids(rng, 1, 9)
    source = tmp_path / "m.gguf"
    llm_files.write_gguf(source, tiny.model(**SIZES, vocab_size=t.vocab_size), ("Q4_1", "Q8_0"), t)
    written = llama.convert(source, tmp_path / "out", dtype)
    expected, again = Llama.from_pretrained(source, dtype), Llama.from_pretrained(tmp_path / "out")
    assert written == sum(p.size for p in expected.parameters()) and again.config == expected.config
    assert (logits(expected, x) == logits(again, x)).all()
    assert [again.tokenizer.encode(s) for s in STRINGS] == [t.encode(s) for s in STRINGS]
    assert again.tokenizer.chat_prompt("hi") == t.chat_prompt("hi")
    expected.save_pretrained(tmp_path / "saved", dtype)
    for name in os.listdir(tmp_path / "saved"):
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


def test_the_command_converts(tmp_path, capsys):
    import argparse

    pytest.importorskip("gguf")
    from tinylora.cli import models

    m = tiny.model(**SIZES)
    llm_files.write_gguf(tmp_path / "m.gguf", m)
    parser = argparse.ArgumentParser()
    models.convert_parser(parser.add_subparsers())
    args = parser.parse_args(
        ["convert", str(tmp_path / "m.gguf"), "--out", str(tmp_path / "out"), "--dtype", "float32"]
    )
    args.run(args)
    size = sum(w.size for w in m.parameters())
    assert capsys.readouterr().out == f"{size:,} weights written to {tmp_path / 'out'} in float32\n"
    assert Llama.from_pretrained(tmp_path / "out").state_dict().keys() == m.state_dict().keys()


def test_a_folder_is_not_converted_into_itself(tmp_path):
    tiny.model().save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="would overwrite its source"):
        llama.convert(tmp_path, tmp_path)
    with pytest.raises(ValueError, match="dtype 'int8' is unknown"):
        llama.convert(tmp_path, tmp_path / "other", "int8")
    assert (tmp_path / "model.safetensors").read_bytes() == before and not (tmp_path / "other").exists()


# --------------------------------------------------------------------------------------------------------------------- memory
PEAK = """
import sys
import numpy as np
import tinylora
from tinylora import quant

def peak():  # of this process alone; ru_maxrss would begin with the parent's
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

quant.quantize(np.ones((512, 512), np.float32), "nf4", double_quant=True)  # what quantizing needs once
before = peak()
model = tinylora.Llama.from_pretrained(sys.argv[1], quantize="nf4")
print(peak() - before, sum(w.nbytes for _, w in model.named_weights()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of a process")
def test_loading_never_holds_more_than_one_dense_matrix(tmp_path):
    """20 million weights: 79 MB in float32, 11 MB quantized. The largest matrix has 4 MB, and quantizing one needs a few of its size."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 5, "max_position_embeddings": 64}
    config = tl.llama.replace(tiny.CONFIG, **sizes, head_dim=128)
    m = Llama(config, draw=False)
    noise = np.random.default_rng(0).standard_normal(1 << 20, dtype=np.float32)
    for w in m.parameters():
        w.data = np.resize(noise, w.shape)
    m.save_pretrained(tmp_path)
    dense = sum(w.nbytes for w in m.parameters())
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, timeout=1200, env=environment
    )
    grown, held = map(int, done.stdout.split())
    print(f"dense {dense / 1e6:.1f} MB, held {held / 1e6:.1f} MB, peak grew by {grown / 1e6:.1f} MB")
    assert grown < held + 4 * 4 * 512 * 2048 < 0.4 * dense


@pytest.mark.skipif(
    "TINYLORA_LLM" not in os.environ, reason="TINYLORA_LLM points to no SmolLM2-135M-Instruct.Q4_1.gguf"
)
def test_a_real_model_is_quantized_in_less_memory_than_it_has_in_float32():
    """SmolLM2-135M has 538 MB in float32; its embedding, which stays, has 113 MB. The interpreter and the packages count here."""
    script = PEAK.replace("before = peak()", "before = 0")
    done = subprocess.run(
        [sys.executable, "-c", script, os.environ["TINYLORA_LLM"]], capture_output=True, text=True, timeout=1200
    )
    grown, held = map(int, done.stdout.split())
    print(f"held {held / 1e6:.1f} MB, peak {grown / 1e6:.1f} MB")
    assert held < 170e6 and grown < 400e6


def test_the_folder_can_go_when_the_model_is_open(tmp_path):
    tiny.model().save_pretrained(tmp_path / "m")
    m = Llama.from_pretrained(tmp_path / "m")
    shutil.rmtree(tmp_path / "m")
    assert m.generate("a", 3)


def test_dtypes_are_checked_at_the_one_door():
    nested = {"quantize": {"code": "nf4", "compute_dtype": "float64"}}
    for options in ({"compute_dtype": "nonsense"}, {"dtype": "float16"}, nested):
        with pytest.raises(ValueError, match="is unknown: expected 'float32' or 'bfloat16'"):
            Llama.from_pretrained("base", **options)
    model = Llama.from_pretrained("base", quantize="nf4", compute_dtype="bfloat16")
    assert model.model.layers[0].mlp.up_proj.compute_dtype == "bfloat16"
    with pytest.raises(ValueError, match="dtype 'float16', expected 'float32' or 'bfloat16'"):
        tl.quantize_linears(Llama.from_pretrained("base"), dtype="float16")
    with pytest.raises(ValueError, match="dtype 'float16', expected 'float32' or 'bfloat16'"):
        tl.quantize_linears(Llama.from_pretrained("base"), code="bfloat16", dtype="float16")
