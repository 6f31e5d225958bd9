"""4-bit folders in bitsandbytes' format, as far as it can be told without bitsandbytes; tests/oracle/test_oracle.py opens them there."""

import json

import numpy as np
import pytest
import tiny

import tinylora as tl
from tinylora import codebooks, quantize
from tinylora.dtypes import BFloat16Array, bfloat16_bits
from tinylora.interop import bitsandbytes as bnb
from tinylora.models import eightbit, files, fourbit, safetensors


@pytest.mark.parametrize("code", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(16, 64), (7, 13), (300, 129)])
def test_a_weight_comes_back_in_every_bit(code, double_quant, shape, rng):
    w = rng.standard_normal(shape).astype(np.float32)
    q = quantize(w, code, 32, double_quant)
    tensors = fourbit.to_tensors("a.weight", q)
    assert tensors["a.weight"].shape == ((w.size + 1) // 2, 1) and tensors["a.weight.quant_map"].shape == (16,)
    state = json.loads(tensors[f"a.weight.quant_state.bitsandbytes__{code}"].tobytes())
    order = ["quant_type", "blocksize", "dtype", "shape"] + [
        "nested_blocksize",
        "nested_dtype",
        "nested_offset",
    ] * double_quant
    assert (
        list(state) == order
        and state["shape"] == list(shape)
        and np.float32(state.get("nested_offset", 0)) == (q.offset or 0)
    )
    back = fourbit.from_tensors("a.weight", dict(tensors))
    assert back.dequantize().tobytes() == q.dequantize().tobytes() and back.code is q.code
    assert (back.code_name, back.blocksize, back.shape, back.dtype) == (code, 32, shape, "float32")


def test_both_maps_are_read_from_the_file(rng):
    """bitsandbytes up to 0.49 put −1 in front of its 8-bit map; weights it wrote mean what its own map says."""
    q = quantize(rng.standard_normal((64, 64)).astype(np.float32), double_quant=True)
    tensors = fourbit.to_tensors("a.weight", q)
    tensors["a.weight.nested_quant_map"] = tensors["a.weight.nested_quant_map"].copy()
    tensors["a.weight.nested_quant_map"][0] = -1
    tensors["a.weight.quant_map"] = tensors["a.weight.quant_map"] * np.float32(2)
    tensors["a.weight.absmax"] = np.zeros_like(tensors["a.weight.absmax"])
    back = fourbit.from_tensors("a.weight", tensors)
    assert (back.absmax == np.float32(-1) * q.nested_absmax[0] + q.offset).all()
    assert back.code.max() == 2


def test_another_nested_blocksize_is_honoured(rng):
    q = quantize(rng.standard_normal((64, 64)).astype(np.float32), double_quant=True)
    tensors = fourbit.to_tensors("a.weight", q)
    key = "a.weight.quant_state.bitsandbytes__nf4"
    state = json.loads(tensors[key].tobytes()) | {"nested_blocksize": 32}
    tensors[key] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    tensors["a.weight.nested_absmax"] = np.array([1, 2], np.float32)
    back = fourbit.from_tensors("a.weight", tensors)
    plain = codebooks.dynamic8()[q.absmax_codes] * np.repeat(np.array([1, 2], np.float32), 32) + q.offset
    assert back.absmax.tobytes() == plain.tobytes()


def test_packed_bytes_may_be_stored_as_another_dtype(rng):
    q = quantize(rng.standard_normal((64, 64)).astype(np.float32))
    tensors = fourbit.to_tensors("a.weight", q)
    for stored in (q.packed.view(np.float32), BFloat16Array(q.packed.view(np.uint16)[:, None])):
        assert fourbit.from_tensors("a.weight", {**tensors, "a.weight": stored}).packed.tobytes() == q.packed.tobytes()


def test_a_model_folder_comes_back(tmp_path):
    model = tl.quantize_linears(tiny.model(), "nf4", 32)
    ids = np.arange(12)[None] % 50
    with tl.no_grad():
        expected = model(ids).data
    bnb.save(model, tmp_path / "four")
    config = files.read_json(tmp_path / "four" / "config.json")["quantization_config"]
    assert (
        config["quant_method"] == "bitsandbytes"
        and config["bnb_4bit_quant_type"] == "nf4"
        and config["llm_int8_skip_modules"]
    )
    again = bnb.load(tmp_path / "four")
    with tl.no_grad():
        assert again(ids).data.tobytes() == expected.tobytes()
    assert all(not p.requires_grad for p in again.parameters())
    same = tl.Llama.from_pretrained(tmp_path / "four")  # the one door
    with tl.no_grad():
        assert same(ids).data.tobytes() == expected.tobytes()


def test_dense_weights_are_written_in_the_shortest_exact_form(tmp_path):
    model = tl.quantize_linears(tl.Llama.from_pretrained("base"))  # stored in bfloat16
    bnb.save(model, tmp_path / "a")
    assert isinstance(safetensors.load_folder(tmp_path / "a")["model.norm.weight"], BFloat16Array)
    model.model.norm.weight.data += np.float32(1e-5)
    bnb.save(model, tmp_path / "b")
    assert safetensors.load_folder(tmp_path / "b")["model.norm.weight"].dtype == np.float32


def test_a_folder_that_is_called_base_is_not_the_embedded_model(tmp_path, monkeypatch):
    bnb.save(tl.quantize_linears(tiny.model(), "nf4"), tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    again = bnb.load("base")
    assert again.config == tiny.model().config and isinstance(again.model.layers[0].mlp.up_proj, tl.nn.Linear4bit)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda m, f: bnb.save(m, f), "no 4-bit layers"),
        (lambda m, f: bnb.save(tl.quantize_linears(m, "int4"), f), "opens the codes nf4 and fp4"),
        (lambda m, f: bnb.save(tl.quantize_linears(m, "nf4", 48), f), "in blocks of 48"),
        (lambda m, f: bnb.save(tl.add_lora(tl.quantize_linears(m, "nf4")), f), "carries an adapter"),
        (lambda m, f: (m.save_pretrained(f), bnb.load(f)), "no config.json with bitsandbytes' quantization_config"),
        (lambda m, f: bnb.load(f / "nowhere"), "no config.json with bitsandbytes' quantization_config"),
    ],
)
def test_errors_are_sentences(call, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        call(tiny.model(), tmp_path / "x")


def changed(tensors, **entries):
    """The JSON of a weight with other entries."""
    key = "a.weight.quant_state.bitsandbytes__nf4"
    state = json.loads(tensors[key].tobytes()) | entries
    return {key: np.frombuffer(json.dumps(state).encode(), np.uint8)}


def at(array, place, value):
    """A copy with another value at one place."""
    array = array.copy()
    array[place] = value
    return array


def test_damaged_weights_are_refused_by_name(rng):
    tensors = fourbit.to_tensors("a.weight", quantize(rng.standard_normal((8, 64)).astype(np.float32)))
    for spoil, words in (
        ({"a.weight": tensors["a.weight"][:-1]}, "expected 256 uint8"),
        (
            {"a.weight.absmax": tensors["a.weight.absmax"][:-1]},
            "absmax: expected 8 float32, found float32 of shape .7,.",
        ),
        ({"a.weight.quant_state.bitsandbytes__nf4": np.frombuffer(b"{no", np.uint8)}, "damaged"),
        ({"a.weight.quant_map": tensors["a.weight.quant_map"][:15]}, "quant_map: expected 16 float32"),
        ({"a.weight.quant_map": tensors["a.weight.quant_map"].astype(np.float16)}, "quant_map: expected 16 float32"),
        ({"a.weight.absmax": tensors["a.weight.absmax"].astype(np.uint8)}, "absmax: expected 8 float32"),
        (changed(tensors, blocksize=0), "damaged"),
        (changed(tensors, blocksize=float("inf")), "blocksize = inf, expected one of"),
        (changed(tensors, shape=[10**30, 1]), "a whole number"),
        (changed(tensors, shape=[-8, -64]), r"shape\[0\] = -8, expected a whole number from 0"),
        (changed(tensors, dtype="float8"), "dtype = 'float8', expected one of"),
        (changed(tensors, quant_type="int4"), "quant_type = 'int4', expected one of"),
        (changed(tensors, quant_type="fp4"), "says fp4 inside"),
    ):
        with pytest.raises(ValueError, match=words):
            fourbit.from_tensors("a.weight", {**tensors, **spoil})
    nested = fourbit.to_tensors(
        "a.weight", quantize(rng.standard_normal((8, 64)).astype(np.float32), double_quant=True)
    )
    for spoil, words in (
        (changed(nested, nested_blocksize=2**40), "quant_state: nested_blocksize = 1099511627776"),
        (changed(nested, nested_offset=float("nan")), "quant_state: nested_offset = nan"),
        (changed(nested, nested_offset=1e300), r"quant_state: nested_offset = 1e\+300"),
        (changed(nested, shape=[2**32, 2**32]), "expected 9223372036854775808 uint8"),
        (changed(nested, blocksize=2**40), "quant_state: blocksize = 1099511627776"),
        (changed(nested, shape="x"), "quant_state: shape = 'x'"),
        ({"a.weight.quant_state.bitsandbytes__nf4": np.frombuffer(b"[" * 10**5, np.uint8)}, "damaged"),
        ({"a.weight.nested_absmax": np.full(1, np.nan, np.float32)}, "nested_absmax: holds NaN"),
        ({"a.weight.nested_absmax": np.full(1, -1, np.float32)}, "nested_absmax: holds NaN or a negative"),
        (
            {
                f"a.weight.nested_{part}": np.full(n, 3e38, np.float32)
                for part, n in (("absmax", 1), ("quant_map", 256))
            },
            "float32 does not hold",
        ),
        (
            {"a.weight.quant_map": np.full(16, 3e38, np.float32), "a.weight.nested_absmax": np.full(1, 9, np.float32)},
            "float32 does not hold",
        ),
        (
            {"a.weight.nested_quant_map": at(nested["a.weight.nested_quant_map"], 3, np.nan)},
            "nested_quant_map: holds NaN",
        ),
        ({"a.weight.quant_map": at(nested["a.weight.quant_map"], 3, np.inf)}, "quant_map: holds NaN or Inf"),
    ):
        with pytest.raises(ValueError, match=words):
            fourbit.from_tensors("a.weight", {**nested, **spoil})
    for value in (np.nan, np.inf, -1.0):
        with pytest.raises(ValueError, match=r"model.safetensors: the 4-bit weight a\.weight .*absmax"):
            spoil = {"a.weight.absmax": np.full(8, value, np.float32)}
            fourbit.from_tensors("a.weight", {**tensors, **spoil}, "model.safetensors")
    with pytest.raises(ValueError, match="found 0"):
        fourbit.from_tensors("b.weight", dict(tensors))
    del tensors["a.weight.absmax"]
    with pytest.raises(ValueError, match="incomplete"):
        fourbit.from_tensors("a.weight", tensors)


def folder(path, rng):
    """A small checkpoint of no known architecture, in two files, bfloat16."""
    tensors = {
        "embeddings.word_embeddings.weight": rng.standard_normal((50, 64)),
        "layer.0.dense.weight": rng.standard_normal((96, 64)),
        "layer.0.norm.weight": rng.standard_normal(64),
        "layer.1.dense.weight": rng.standard_normal((64, 96)),
        "layer.1.router.weight": rng.standard_normal((4, 64)),
        "lm_head.weight": rng.standard_normal((50, 64)),
    }
    tensors = {n: BFloat16Array(bfloat16_bits(w.astype(np.float32))) for n, w in tensors.items()}
    names = list(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:3], "model-00002-of-00002.safetensors": names[3:]}
    for file, inside in parts.items():
        safetensors.save_safetensors(path / file, {n: tensors[n] for n in inside})
    files.write_json(
        path / "model.safetensors.index.json", {"weight_map": {n: f for f, inside in parts.items() for n in inside}}
    )
    files.write_json(path / "config.json", {"model_type": "something", "dtype": "bfloat16"})
    files.write_text(path / "tokenizer_config.json", "{}")
    files.write_text(path / "chat_template.jinja", "{{ messages }}")
    files.write_text(path / "consolidated.00.pth", "dense weights")
    files.write_text(path / ".git" / "config", "not part of the model")
    return tensors


def test_any_folder_can_be_quantized(tmp_path, rng):
    tensors = folder(tmp_path / "in", rng)
    with pytest.raises(ValueError, match="copies of 'something' were not tried in transformers"):
        bnb.quantize_folder(tmp_path / "in", tmp_path / "out", progress=False)
    done = bnb.quantize_folder(
        tmp_path / "in", tmp_path / "out", "nf4", 32, skip=("router",), progress=False, force=True
    )
    assert sorted(done) == ["layer.0.dense.weight", "layer.1.dense.weight"]
    written = safetensors.load_folder(tmp_path / "out")
    for name, w in tensors.items():
        if name in done:
            q = fourbit.from_tensors(name, written)
            assert q.dtype == "bfloat16" and q.packed.tobytes() == quantize(w, blocksize=32).packed.tobytes()
        else:
            assert written[name].bits.tobytes() == w.bits.tobytes()
    config = files.read_json(tmp_path / "out" / "config.json")
    kept = set(config["quantization_config"]["llm_int8_skip_modules"])
    assert {"embeddings.word_embeddings", "layer.1.router", "lm_head"} <= kept and "layer.0.dense" not in kept
    assert (tmp_path / "out" / "tokenizer_config.json").is_file()
    assert (tmp_path / "out" / "chat_template.jinja").is_file()
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    tiny.model().save_pretrained(tmp_path / "precious")
    before = (tmp_path / "precious" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="holds another, dense model"):
        bnb.quantize_folder(tmp_path / "in", tmp_path / "precious", progress=False, force=True)
    assert (tmp_path / "precious" / "model.safetensors").read_bytes() == before
    for source, target, words in (("in", "in", "overwrite"), ("out", "twice", "quantized already")):
        with pytest.raises(ValueError, match=words):
            bnb.quantize_folder(tmp_path / source, tmp_path / target, progress=False, force=True)


@pytest.mark.parametrize("code", ["nf4", eightbit.CODE])
@pytest.mark.parametrize(
    "name, value", [("layer.0.dense.weight", np.nan), ("layer.0.dense.weight", 3e38), ("layer.0.norm.weight", np.inf)]
)
def test_numbers_that_do_not_fit_are_found_before_anything_is_written(name, value, code, tmp_path, rng):
    folder(tmp_path / "in", rng)
    for path in (tmp_path / "in").glob("*.safetensors"):
        tensors, _ = safetensors.load_safetensors(path)
        if name in tensors:
            w = tensors[name].dequantize("float32").copy()
            w.reshape(-1)[::2] = value
            safetensors.save_safetensors(path, tensors | {name: w})
    with pytest.raises(ValueError, match=rf"in.model-\d+-of-00002\.safetensors: {name}"):
        bnb.quantize_folder(tmp_path / "in", tmp_path / "out", code, progress=False, force=True)
    assert not (tmp_path / "out").exists()


def test_a_model_with_nan_is_not_saved_in_4_bits(tmp_path):
    model = tl.quantize_linears(tiny.model())
    model.model.norm.weight.data[0] = np.nan
    with pytest.raises(ValueError, match=r"save: model\.norm\.weight holds NaN"):
        bnb.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
