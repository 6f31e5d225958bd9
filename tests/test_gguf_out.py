"""GGUF files written: each weight as its type has it, the vocabulary, and adapters as llama.cpp's LoRA files."""

import argparse
import os
import warnings
import weakref

import llm_files
import numpy as np
import pytest
import tiny

import tinylora as tl
from tinylora import Llama, no_grad
from tinylora.cli import models as commands
from tinylora.dtypes import BFloat16Array
from tinylora.interop import bitsandbytes, peft
from tinylora.interop import gguf as adapter_files
from tinylora.models import files, gguf_writer, safetensors
from tinylora.models.gguf import GGUF

gguf = pytest.importorskip("gguf")

SIZES = {"intermediate_size": 64}
KINDS = tuple(gguf_writer.TYPES)
STRINGS = [
    "Once upon a time there was a miller, his cat; it isn't 3.14159, is it?",
    "def f(x):\n    return x ** 2  # squared\n\n\tif f(7):\r\n        print(12345)",
    "naïve café Ωmega 你好，世界 🙂👩‍👩‍👧 “quoted”",
    "  two  spaces   three\n\n\n and more ",
    "<|im_start|>user\nTell me a story.<|im_end|>\n<|endoftext|>",
]


def logits(model, x):
    with no_grad():
        return model(x).data


def rounded(w, kind):
    """What a weight becomes in a file of this kind, by NumPy and by the package itself."""
    if w.ndim == 1 or kind == "f32":
        return w
    if kind == "f16" or (kind == "q8_0" and w.shape[-1] % 32):
        return w.astype(np.float16).astype(np.float32)
    if kind == "bf16":
        return BFloat16Array.of(w).dequantize("float32")
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    return gguf.dequantize(gguf.quantize(w, q8_0), q8_0)


def run(*words):
    parser = argparse.ArgumentParser()
    commands.convert_parser(parser.add_subparsers())
    args = parser.parse_args(["convert", *map(str, words)])
    return args.run(args)


# ---------------------------------------------------------------------------------------------------------------------- weights
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 1, "tie_word_embeddings": False},
        {"num_key_value_heads": 4, "head_dim": 16, "rope_theta": 5e5, "rms_norm_eps": 1e-6},
    ],
)
def test_each_weight_comes_back_as_its_type_has_it(kind, changes, tmp_path, rng):
    m = tiny.model(int(rng.integers(1000)), **SIZES, **changes)
    for _, p in m.named_parameters():
        if p.ndim == 1:
            p.data = rng.standard_normal(p.shape).astype(np.float32)
    written = gguf_writer.save(m, tmp_path / "m.gguf", kind)
    again = Llama.from_pretrained(tmp_path / "m.gguf")
    assert written.weights == sum(p.size for p in m.parameters()) and again.config == m.config
    for (name, w), (other, found) in zip(m.named_parameters(), again.named_parameters(), strict=True):
        assert name == other and found.data.tobytes() == rounded(w.data, kind).tobytes(), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_is_what_the_gguf_package_reads(kind, tmp_path):
    """Names, shapes, types, bytes and the order of rows, without tinylora's reader."""
    m = tiny.model(3, **SIZES, tie_word_embeddings=False)
    gguf_writer.save(m, tmp_path / "m.gguf", kind, name="a model")
    reader, heads = gguf.GGUFReader(tmp_path / "m.gguf"), {"q_proj": 4, "k_proj": 2}
    entries = {name: field.contents() for name, field in reader.fields.items()}
    assert entries["general.architecture"] == "llama" and entries["general.type"] == "model"
    assert entries["general.name"] == "a model"
    assert entries["general.file_type"] == {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}[kind]
    for name, value in {
        "vocab_size": 256,
        "context_length": 64,
        "embedding_length": 32,
        "block_count": 2,
        "feed_forward_length": 64,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 8,
        "attention.value_length": 8,
        "rope.dimension_count": 8,
        "rope.freq_base": 10000.0,
    }.items():
        assert entries[f"llama.{name}"] == value, name
    assert np.float32(entries["llama.attention.layer_norm_rms_epsilon"]) == np.float32(1e-5)
    expected = {llm_files.gguf_name(name): (name, p.data) for name, p in m.named_parameters()}
    assert {t.name for t in reader.tensors} == expected.keys()
    for tensor in reader.tensors:
        name, w = expected[tensor.name]
        turned = heads.get(name.split(".")[-2])
        w = llm_files.interleaved(w, turned) if turned else w
        matrix = w.ndim == 2
        assert tensor.tensor_type.name == (kind.upper() if matrix else "F32")
        assert list(tensor.shape) == list(reversed(w.shape)) and tensor.data_offset % 32 == 0
        assert tensor.data.tobytes() == gguf.quantize(w, tensor.tensor_type).tobytes(), name


@pytest.mark.parametrize("kind", tiny.FAMILY)
def test_the_family_comes_back(kind, tmp_path, rng):
    """Weights, biases, norms of heads, positions and windows: the logits are equal, or what has no place in a GGUF is refused."""
    m, x = tiny.of_the_family(kind, rng), tiny.ids(rng, 2, 40)
    if kind in ("dynamic", "qwen2 with windows", "qwen3 with windows"):
        with pytest.raises(ValueError, match=r"no rope scaling of type 'dynamic'|no place for a sliding window"):
            gguf_writer.save(m, tmp_path / "m.gguf", "f32")
        assert not list(tmp_path.iterdir())
        return
    written = gguf_writer.save(m, tmp_path / "m.gguf", "f32")
    again = Llama.from_pretrained(tmp_path / "m.gguf")
    for (name, w), (other, found) in zip(m.named_parameters(), again.named_parameters(), strict=True):
        assert name == other and found.data.tobytes() == w.data.tobytes(), name
    np.testing.assert_allclose(logits(again, x), logits(m, x), rtol=1e-5, atol=1e-5)
    assert again.config.model_type == m.config.model_type and again.config.sliding_window == m.config.sliding_window
    assert any("attends to every position" in note for note in written.notes) == (kind == "mistral")
    said, scaling = " ".join(written.notes), (m.config.rope_scaling or {}).get("rope_type")
    scaled = {"linear": "rope.scaling.factor", "llama3": "rope_freqs.weight", "longrope": "rope_freqs.weight", None: ""}
    assert ("scaled positions" in said) == (scaling is not None) and scaled[scaling] in said
    biased = any(name.endswith(".bias") for name, _ in m.named_parameters())
    assert ("biases of such a GGUF" in said) == (biased and m.config.model_type != "qwen2")
    assert ("without; llama.cpp and" in said) == (biased and m.config.model_type == "llama")  # which reads no qwen3's


def test_the_divisors_of_llama3_are_those_of_llama_cpp(tmp_path):
    """Frequency by frequency, as its converter's loop says."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    m = tiny.model(**SIZES, rope_scaling=scaling, rope_theta=5e5, head_dim=64)
    gguf_writer.save(m, tmp_path / "m.gguf")
    found = next(t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors if t.name == "rope_freqs.weight")
    expected = []
    for i in range(0, 64, 2):
        wavelength = 2 * np.pi * 5e5 ** (i / 64)
        if wavelength < 8192 / 4:
            expected.append(1.0)
        elif wavelength > 8192 / 1:
            expected.append(8.0)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected.append(1 / ((1 - smooth) / 8 + smooth))
    assert found.tensor_type.name == "F32"
    np.testing.assert_allclose(found.data, expected, rtol=1e-6)
    assert len({*expected}) > 3, "all three ways are there"
    assert Llama.from_pretrained(tmp_path / "m.gguf").config.rope_scaling == scaling


def test_a_window_as_long_as_the_text_is_none(tmp_path):
    m = tiny.model(**SIZES, model_type="qwen2", sliding_window=64)
    gguf_writer.save(m, tmp_path / "m.gguf")
    assert Llama.from_pretrained(tmp_path / "m.gguf").config.sliding_window is None


def test_convert_writes_what_save_writes(tmp_path):
    m = tiny.model(5, **SIZES)
    m.save_pretrained(tmp_path / "model.v1", "float32")
    gguf_writer.convert(tmp_path / "model.v1", tmp_path / "a.gguf", "q8_0")
    gguf_writer.save(m, tmp_path / "b.gguf", "q8_0", name="model.v1")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    gguf_writer.convert(tmp_path / "a.gguf", tmp_path / "c.gguf", "f32")  # from a GGUF: dequantized, and exact
    a, c = (Llama.from_pretrained(tmp_path / f"{x}.gguf").state_dict() for x in "ac")
    assert all(a[name].tobytes() == c[name].tobytes() for name in a)


@pytest.mark.parametrize("code", ["nf4", "bfloat16", "int8_vectorwise"])
def test_a_base_in_few_bits_is_dequantized(code, tmp_path, rng):
    m = tl.quantize_linears(tiny.model(7, **SIZES), code)
    gguf_writer.save(m, tmp_path / "m.gguf", "f32")
    again = Llama.from_pretrained(tmp_path / "m.gguf")
    for path, layer in again.named_modules():
        if hasattr(layer, "dense"):
            assert layer.dense().tobytes() == m.get(path).dense().tobytes(), path
    if code != "bfloat16":
        bitsandbytes.save(m, tmp_path / "folder")
        gguf_writer.convert(tmp_path / "folder", tmp_path / "n.gguf", "f32")
        x = tiny.ids(rng, 1, 7)
        assert (logits(Llama.from_pretrained(tmp_path / "n.gguf"), x) == logits(again, x)).all()


def test_the_embedded_model_stays_a_model_of_bytes(tmp_path, rng):
    written = gguf_writer.convert("base", tmp_path / "base.gguf", "f32")
    assert "256 bytes" in written.notes[0] and len(written.notes) == 1
    base, again = Llama.from_pretrained("base"), Llama.from_pretrained(tmp_path / "base.gguf")
    assert again.config == base.config and GGUF(tmp_path / "base.gguf").fields["tokenizer.ggml.model"] == "none"
    x = tiny.ids(rng, 2, 20)
    assert (logits(base, x) == logits(again, x)).all()
    assert again.tokenizer.encode("naïve 🙂") == list("naïve 🙂".encode())


def test_rows_that_are_not_whole_blocks_are_f16_in_a_file_of_q8_0(tmp_path):
    m = tiny.model(9, intermediate_size=72)
    written = gguf_writer.save(m, tmp_path / "m.gguf", "q8_0")
    assert written.notes[1] == (
        "2 of 20 tensors are F16, because their rows are not whole blocks of 32; the first is blk.0.ffn_down.weight"
    )
    again = Llama.from_pretrained(tmp_path / "m.gguf").state_dict()
    for name, w in m.state_dict().items():
        assert again[name].tobytes() == rounded(w, "q8_0").tobytes(), name


def test_one_weight_is_in_memory_at_a_time(tmp_path):
    held = []

    def read(name):
        assert not held or held[-1]() is None, "the tensor before this one was let go"
        x = np.ones((64, 32), np.float32)
        held.append(weakref.ref(x))
        return x

    plan = {f"t{i}": ((64, 32), kind) for i, kind in enumerate(("F32", "F16", "BF16", "Q8_0"))}
    gguf_writer.write(tmp_path / "x.gguf", {"general.architecture": "llama"}, plan, read)
    assert len(held) == 4


# ----------------------------------------------------------------------------------------------------------- what is not written
@pytest.mark.parametrize(
    "kind, value, words",
    [
        ("f16", 70000.0, "70000, and F16 ends at 65504"),
        ("f16", -65505.0, "65505, and F16 ends at 65504"),
        ("q8_0", 1e7, "1e+07, and Q8_0 ends at"),
        ("bf16", 3.4e38, "and BF16 ends at"),
        ("f32", np.nan, "holds NaN"),
        ("q8_0", np.nan, "holds NaN"),
    ],
)
def test_a_number_that_the_type_does_not_have_is_refused(kind, value, words, tmp_path):
    m = tiny.model(**SIZES)
    gguf_writer.save(m, tmp_path / "m.gguf", "f32")
    before = (tmp_path / "m.gguf").read_bytes()
    m.model.layers[1].mlp.up_proj.weight.data[3, 5] = value
    with pytest.raises(ValueError) as caught:
        gguf_writer.save(m, tmp_path / "m.gguf", kind)
    assert words in str(caught.value) and "m.gguf: blk.1.ffn_up.weight holds" in str(caught.value)
    assert (tmp_path / "m.gguf").read_bytes() == before and os.listdir(tmp_path) == ["m.gguf"]


def test_the_largest_numbers_of_each_type_are_written(tmp_path):
    m = tiny.model(**SIZES)
    for kind, largest in (("f16", 65504.0), ("bf16", 255 * 2.0**120), ("q8_0", 127 * 65504.0), ("f32", 3.4e38)):
        m.model.layers[0].mlp.up_proj.weight.data[1, :2] = largest, -largest
        gguf_writer.save(m, tmp_path / "m.gguf", kind)
        found = Llama.from_pretrained(tmp_path / "m.gguf").model.layers[0].mlp.up_proj.weight.data[1, :2]
        assert found.tolist() == [np.float32(largest), -np.float32(largest)], kind


def test_an_error_half_way_leaves_the_old_file(tmp_path):
    m = tiny.model(**SIZES)
    (tmp_path / "m.gguf").write_bytes(b"old")
    names = []

    def bar(tensors):
        for name in tensors:
            yield name
            names.append(name)
            if len(names) == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gguf_writer.save(m, tmp_path / "m.gguf", bar=bar)
    assert len(names) == 5 and (tmp_path / "m.gguf").read_bytes() == b"old" and os.listdir(tmp_path) == ["m.gguf"]


def test_a_source_is_not_overwritten_by_whatever_name(tmp_path):
    gguf_writer.save(tiny.model(**SIZES), tmp_path / "m.gguf")
    before = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "soft.gguf").symlink_to("m.gguf")
    os.link(tmp_path / "m.gguf", tmp_path / "hard.gguf")
    (tmp_path / "folder.gguf").mkdir()
    for out in ("m.gguf", "soft.gguf", "hard.gguf", "folder.gguf/../m.gguf"):
        with pytest.raises(ValueError, match="would overwrite its source"):
            gguf_writer.convert(tmp_path / "m.gguf", tmp_path / out)
    with pytest.raises(ValueError, match=r"folder\.gguf is a folder; expected the name of a file"):
        gguf_writer.convert(tmp_path / "m.gguf", tmp_path / "folder.gguf")
    with pytest.raises(ValueError, match="type 'q4_0' is unknown: expected one of f32, f16, q8_0, bf16"):
        gguf_writer.convert(tmp_path / "m.gguf", tmp_path / "n.gguf", "q4_0")
    assert (tmp_path / "m.gguf").read_bytes() == before and not (tmp_path / "n.gguf").exists()


def test_a_model_with_an_adapter_is_merged_first(tmp_path, rng):
    m = tiny.randomize_lora(tl.add_lora(tiny.model(**SIZES), r=2), rng)
    with pytest.raises(ValueError, match="the model carries an adapter: merge it first"):
        gguf_writer.save(m, tmp_path / "m.gguf")
    x = tiny.ids(rng, 1, 9)
    gguf_writer.save(tl.merge(m), tmp_path / "m.gguf", "f32")
    assert (logits(Llama.from_pretrained(tmp_path / "m.gguf"), x) == logits(m, x)).all()


def test_files_of_other_kinds_are_refused_by_name(folder, tmp_path, rng):
    """A file whose numbers begin with their highest byte, and an adapter where a model is expected."""
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("token_embd.weight", np.ones((256, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    adapter_files.save_adapter(adapted(folder, rng), tmp_path / "a.gguf")
    for name, said in (("big.gguf", "it is big-endian"), ("a.gguf", "general.type is 'adapter', expected 'model'")):
        with pytest.raises(ValueError, match=said):
            Llama.from_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match="it is big-endian"):
        adapter_files.load_adapter(Llama.from_pretrained(folder), tmp_path / "big.gguf")


# ------------------------------------------------------------------------------------------------------------------- vocabularies
@pytest.fixture
def words():
    pytest.importorskip("tokenizers")


def with_words(tokenizer, **changes):
    m = tiny.model(**{**SIZES, "vocab_size": tokenizer.vocab_size, **changes})
    m.tokenizer = tokenizer
    return m


def cut_as(pre):
    """The trained vocabulary of llm_files, but with texts cut as llama3 or qwen2 or tekken cut them, in their own tokenizer.json."""
    from tokenizers import Regex, pre_tokenizers

    from tinylora.models import vocabularies

    t = llm_files.trained()
    parts = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in vocabularies.CUTS[pre]]
    t.backend.pre_tokenizer = pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(False, use_regex=False)])
    t.backend.model.ignore_merges = vocabularies.takes_whole_words(pre)
    return t


@pytest.mark.parametrize(
    "pre", ["llama-bpe", "dbrx", "qwen2", "tekken", "gpt-4o", "deepseek-coder", "falcon", "qwen35"]
)
def test_every_way_of_cutting_a_text_is_found_by_its_name(words, pre, tmp_path):
    t = cut_as(pre)
    gguf_writer.save(with_words(t), tmp_path / "m.gguf")
    again = Llama.from_pretrained(tmp_path / "m.gguf").tokenizer
    assert GGUF(tmp_path / "m.gguf").fields["tokenizer.ggml.pre"] == pre
    assert [again.encode(s) for s in STRINGS] == [t.encode(s) for s in STRINGS]


def sentencepiece(spaced="normalizer"):
    """A small SentencePiece vocabulary as Llama 2's tokenizer.json has it: every way to make a token is a merge, best token first."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    from tinylora.models.tokenizers import BPETokenizer

    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(llm_files.TEXT, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    made = [t for t, _ in sorted(trained.get_vocab().items(), key=lambda item: item[1])]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *made]
    ids = {token: i for i, token in enumerate(tokens)}
    merges = [(t[:i], t[i:]) for t in made for i in range(1, len(t)) if t[:i] in ids and t[i:] in ids]
    model = models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    if spaced == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=spaced, split=False)
    strip = [] if spaced == "never" else [decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 1)])
    return BPETokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})


@pytest.mark.parametrize("spaced", ["normalizer", "first", "never"])
def test_a_sentencepiece_vocabulary_comes_back_with_its_ids(words, spaced, tmp_path):
    t = sentencepiece(spaced)
    written = gguf_writer.save(with_words(t, vocab_size=t.vocab_size + 3), tmp_path / "m.gguf")
    again, fields = Llama.from_pretrained(tmp_path / "m.gguf").tokenizer, GGUF(tmp_path / "m.gguf").fields
    assert fields["tokenizer.ggml.model"] == "llama" and fields["tokenizer.ggml.add_space_prefix"] == (
        spaced != "never"
    )
    assert (
        fields["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6] and fields["tokenizer.ggml.token_type"][-3:] == [5] * 3
    )
    assert fields["tokenizer.ggml.add_bos_token"] and again.front == t.front == (1,)
    edges = ["  two  spaces", "a</s> b"] if spaced != "first" else []
    texts = [*(s for s in STRINGS if not s.startswith(" ")), *edges]
    assert [again.encode(s) for s in texts] == [t.encode(s) for s in texts]
    assert again.decode(t.encode(STRINGS[1])) == STRINGS[1]
    assert written.notes == (
        ("a text that begins with a space, or stands behind a mark, has other ids there than here",)
        if spaced == "first"
        else ()
    )


@pytest.mark.parametrize("digits", [True, False])
def test_a_vocabulary_comes_back_with_its_ids(words, digits, tmp_path):
    t = llm_files.trained(digits=digits)
    written = gguf_writer.save(with_words(t), tmp_path / "m.gguf")
    again, fields = Llama.from_pretrained(tmp_path / "m.gguf"), GGUF(tmp_path / "m.gguf").fields
    assert not written.notes and fields["tokenizer.ggml.pre"] == ("smollm" if digits else "gpt-2")
    assert [again.tokenizer.encode(s) for s in STRINGS] == [t.encode(s) for s in STRINGS]
    assert again.tokenizer.settings == t.settings and again.tokenizer.end_id == t.end_id
    assert again.tokenizer.chat_prompt("hi") == t.chat_prompt("hi")
    assert (again.config.bos_token_id, again.config.eos_token_id, again.config.pad_token_id) == (1, 2, 2)
    assert fields["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]


def test_rows_without_a_token_are_written_as_unused(words, tmp_path):
    t = llm_files.trained()
    gguf_writer.save(with_words(t, vocab_size=320), tmp_path / "m.gguf")
    again, fields = Llama.from_pretrained(tmp_path / "m.gguf"), GGUF(tmp_path / "m.gguf").fields
    assert again.config.vocab_size == len(fields["tokenizer.ggml.tokens"]) == 320
    assert fields["tokenizer.ggml.tokens"][-1] == "[PAD319]" and set(fields["tokenizer.ggml.token_type"][300:]) == {5}
    assert [again.tokenizer.encode(s) for s in [*STRINGS, "[PAD319]"]] == [t.encode(s) for s in [*STRINGS, "[PAD319]"]]


def test_a_token_before_each_text_is_said(words, tmp_path):
    from tokenizers.processors import TemplateProcessing

    t = llm_files.trained()
    t.backend.post_processor = TemplateProcessing(single=["<|im_start|>", "$A"], special_tokens=[("<|im_start|>", 1)])
    gguf_writer.save(with_words(t), tmp_path / "m.gguf")
    fields = GGUF(tmp_path / "m.gguf").fields
    assert fields["tokenizer.ggml.add_bos_token"] is True and fields["tokenizer.ggml.add_eos_token"] is False
    assert fields["tokenizer.ggml.bos_token_id"] == 1
    t.backend.post_processor = TemplateProcessing(
        single=["<|im_start|>", "<|endoftext|>", "$A"], special_tokens=[("<|im_start|>", 1), ("<|endoftext|>", 0)]
    )
    with pytest.raises(ValueError, match=r"puts the tokens \[1, 0\] before a text, of which GGUF can say only one"):
        gguf_writer.save(with_words(t), tmp_path / "m.gguf")


def test_several_tokens_that_end_a_text(words, tmp_path):
    t = llm_files.trained()
    gguf_writer.save(with_words(t, eos_token_id=(0, 2)), tmp_path / "m.gguf")  # the tokenizer's own, 2, comes first
    assert Llama.from_pretrained(tmp_path / "m.gguf").config.eos_token_id == (2, 0)
    written = gguf_writer.save(with_words(t, eos_token_id=(2, 0, 5, 7)), tmp_path / "m.gguf")
    fields = GGUF(tmp_path / "m.gguf").fields
    assert [fields[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")] == [2, 0, 5]
    assert written.notes == ("GGUF names 3 tokens that end a text; [7] end one here and not there",)


def test_several_chat_templates(words, tmp_path):
    t = llm_files.trained()
    named = [{"name": "default", "template": llm_files.TEMPLATE}, {"name": "tool_use", "template": "{{ messages }}"}]
    t.settings["chat_template"] = named
    gguf_writer.save(with_words(t), tmp_path / "m.gguf")
    fields = GGUF(tmp_path / "m.gguf").fields
    assert fields["tokenizer.chat_template"] == llm_files.TEMPLATE and fields["tokenizer.chat_templates"] == [
        "tool_use"
    ]
    assert fields["tokenizer.chat_template.tool_use"] == "{{ messages }}"


def test_what_gguf_does_not_say_of_a_tokenizer_is_a_note(words, tmp_path):
    from tokenizers import AddedToken, normalizers

    t = llm_files.trained()
    t.backend.normalizer = normalizers.NFC()
    t.backend.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    written = gguf_writer.save(with_words(t, vocab_size=301), tmp_path / "m.gguf")
    assert "normalizes a text first (NFC)" in written.notes[0] and written.notes[1].startswith("<mask> take spaces")
    again = Llama.from_pretrained(tmp_path / "m.gguf").tokenizer
    assert [again.encode(s) for s in STRINGS] == [t.encode(s) for s in STRINGS]


def test_a_vocabulary_that_gguf_cannot_hold_is_refused(words, tmp_path):
    import tokenizers
    from tokenizers import models, pre_tokenizers

    from tinylora.models.tokenizers import BPETokenizer

    other = tokenizers.Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    strange = llm_files.trained().backend
    strange.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), strange.pre_tokenizer])
    for backend, said in (
        (other, "a vocabulary of type WordLevel is not written, only BPE"),
        (strange, "GGUF has no name for the way in which this pre_tokenizer cuts a text"),
    ):
        with pytest.raises(ValueError, match=said):
            gguf_writer.save(with_words(BPETokenizer(backend), vocab_size=300), tmp_path / "m.gguf")
    assert not os.listdir(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------- adapters
ADAPTERS = [
    {},
    {"alpha": 0.1, "target_modules": ["q_proj", "v_proj"]},
    {"use_rslora": True},
    {"rank_pattern": {"v_proj": 3, r"layers\.1\..*up_proj": 5}},
    {"alpha_pattern": {"k_proj": 64, "down_proj": 3.0}, "rank_pattern": {"k_proj": 2}},
    {"use_rslora": True, "rank_pattern": {"q_proj": 7}},
    {"alpha": 0},
    {"alpha": -8, "target_modules": r".*layers\.1.*(k|up)_proj"},
    {"target_modules": ["embed_tokens", "q_proj", "lm_head"]},
]


def adapted(folder, rng, **options):
    """An adapter with random factors on the model of a folder."""
    return tiny.randomize_trainable(tl.add_lora(Llama.from_pretrained(folder), r=4, **options), rng)


@pytest.fixture
def folder(tmp_path):
    tiny.model(11, **SIZES, tie_word_embeddings=False).save_pretrained(tmp_path / "base", "float32")
    return tmp_path / "base"


def llama_cpp(path, weights):
    """{llama.cpp's name: W + scale B A}, from the file as the gguf package reads it, by the rule in llama.cpp's source."""
    reader = gguf.GGUFReader(path)
    alpha = reader.fields["adapter.lora.alpha"].contents() if "adapter.lora.alpha" in reader.fields else 0.0
    read = {t.name: gguf.dequantize(t.data, t.tensor_type).astype(np.float64) for t in reader.tensors}
    assert reader.fields["general.type"].contents() == "adapter" and reader.fields["adapter.type"].contents() == "lora"
    done = dict(weights)
    for name in {n.rpartition(".")[0] for n in read}:
        a, b = read[f"{name}.lora_a"], read[f"{name}.lora_b"]
        scale = alpha / b.shape[1] if alpha else 1.0
        done[name] = weights[name] + (scale * (a @ b.T) if name == "token_embd.weight" else scale * (b @ a))
    return done


@pytest.mark.parametrize("options", ADAPTERS, ids=str)
def test_an_adapter_is_what_llama_cpp_computes_with(options, folder, tmp_path, rng):
    """W + s B A for every matrix, from the file's own tensors and the base's own file, equals the merged model's weights."""
    m = adapted(folder, rng, **options)
    adapter_files.save_adapter(m, tmp_path / "a.gguf")
    gguf_writer.convert(folder, tmp_path / "base.gguf", "f32")
    base = {t.name: t.data.astype(np.float64) for t in gguf.GGUFReader(tmp_path / "base.gguf").tensors}
    gguf_writer.save(tl.merge(m), tmp_path / "merged.gguf", "f32")
    got, merged = llama_cpp(tmp_path / "a.gguf", base), gguf.GGUFReader(tmp_path / "merged.gguf")
    changed = 0
    for tensor in merged.tensors:
        np.testing.assert_allclose(got[tensor.name], tensor.data, rtol=0, atol=3e-6 * np.abs(tensor.data).max())
        changed += (tensor.data != base[tensor.name]).any()
    assert changed == (0 if options.get("alpha") == 0 else len(gguf.GGUFReader(tmp_path / "a.gguf").tensors) // 2)


@pytest.mark.parametrize("options", ADAPTERS, ids=str)
def test_an_adapter_comes_back(options, folder, tmp_path, rng):
    m = adapted(folder, rng, **options)
    written = adapter_files.save_adapter(m, tmp_path / "f32.gguf")
    again = adapter_files.load_adapter(Llama.from_pretrained(folder), tmp_path / "f32.gguf")
    before, after = tl.adapters.adapter_of(m).weights, tl.adapters.adapter_of(again).weights
    folded = any("multiplied into their lora_b" in note for note in written.notes)
    patterned = "alpha_pattern" in options or {"use_rslora", "rank_pattern"} <= set(options)
    assert folded == (patterned or options.get("alpha") == 0) and list(before) == list(after)
    if not folded:
        assert all(after[path][x].tobytes() == w.tobytes() for path, ws in before.items() for x, w in ws.items())
    for path, layer in tl.adapters.lora_layers(again):  # s B, with one float32 rounding where s has changed hands
        expected = np.float64(m.get(path).scaling) * m.get(path).lora_B.weight.data
        np.testing.assert_allclose(np.float64(layer.scaling) * layer.lora_B.weight.data, expected, rtol=2e-7, atol=0)
    x = tiny.ids(rng, 2, 9)
    if not folded and "use_rslora" not in options:
        assert (logits(m, x) == logits(again, x)).all()
    for kind in ("f16", "bf16", "q8_0"):
        adapter_files.save_adapter(m, tmp_path / f"{kind}.gguf", kind=kind)
        read = adapter_files.read_adapter(tmp_path / f"{kind}.gguf", m).weights
        for path, factors in after.items():
            a, b = factors["lora_A"], factors["lora_B"]
            a = rounded(a.T, kind).T if "embed" in path else rounded(a, kind)
            assert (read[path]["lora_A"] == a).all() and (read[path]["lora_B"] == rounded(b, kind)).all(), (kind, path)


def test_a_plain_adapter_comes_back_with_its_settings(folder, tmp_path, rng):
    for options in ({"target_modules": ("q_proj", "v_proj")}, {"target_modules": ("down_proj",), "alpha": 0.3}):
        m = adapted(folder, rng, **options)
        adapter_files.save_adapter(m, tmp_path / "a.gguf")
        assert adapter_files.read_adapter(tmp_path / "a.gguf", m).config == tl.adapters.configs(m)["default"]


def test_a_folder_becomes_the_same_file(folder, tmp_path, rng):
    m = adapted(folder, rng, use_rslora=True)
    peft.save_adapter(m, tmp_path / "adapter", base_model=str(folder))
    adapter_files.save_adapter(m, tmp_path / "a.gguf", base_model=str(folder))
    for i, base in enumerate((None, folder)):
        written = adapter_files.convert_adapter(tmp_path / "adapter", tmp_path / f"{i}.gguf", base)
        assert (tmp_path / f"{i}.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes() and not written.notes


def test_the_factors_that_were_multiplied_in_are_exact_where_they_are_powers_of_two(folder, tmp_path, rng):
    m = adapted(folder, rng, alpha_pattern={"k_proj": 64, "o_proj": 4})
    written = adapter_files.save_adapter(m, tmp_path / "a.gguf")
    assert written.notes == (
        "4 of 14 layers have another scale than alpha / r = 16 / r, which is multiplied into their lora_b; the first is "
        "model.layers.0.self_attn.k_proj",
    )
    again = adapter_files.load_adapter(Llama.from_pretrained(folder), tmp_path / "a.gguf")
    x = tiny.ids(rng, 1, 9)
    assert (logits(again, x) == logits(m, x)).all()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"use_dora": True}, "the adapter has DoRA's magnitudes"),
        ({"lora_bias": True}, "the adapter has biases of lora_B"),
        ({"modules_to_save": ["lm_head"]}, r"the adapter has a whole lm_head\.weight"),
        ({"modules_to_save": ["model.norm"]}, r"the adapter has a whole model\.norm\.weight"),
    ],
)
def test_what_the_format_has_no_place_for_is_refused(options, words, folder, tmp_path, rng):
    m = adapted(folder, rng, **options)
    peft.save_adapter(m, tmp_path / "adapter", base_model=str(folder))
    for write in (
        lambda: adapter_files.save_adapter(m, tmp_path / "a.gguf"),
        lambda: adapter_files.convert_adapter(tmp_path / "adapter", tmp_path / "a.gguf"),
    ):
        with pytest.raises(ValueError, match=words + ".* have no place for that: merge the adapter and convert"):
            write()
    assert not (tmp_path / "a.gguf").exists()


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head", "q_proj"]])
def test_an_adapter_of_one_weight_that_is_two_is_refused(targets, folder, tmp_path, rng):
    """Embedding and head of the base are one weight; llama.cpp would adapt both, or neither."""
    tiny.model(11, **SIZES).save_pretrained(tmp_path / "tied", "float32")
    peft.save_adapter(adapted(folder, rng, target_modules=targets), tmp_path / "adapter")
    with pytest.raises(ValueError, match=f"changes .*{targets[0]} alone where embedding and head are one weight"):
        adapter_files.convert_adapter(tmp_path / "adapter", tmp_path / "a.gguf", tmp_path / "tied")


def test_a_base_that_is_not_there_or_does_not_fit(folder, tmp_path, rng):
    peft.save_adapter(adapted(folder, rng), tmp_path / "adapter", base_model="meta/some-model")
    with pytest.raises(
        ValueError,
        match=r"was trained on 'meta/some-model', which is no folder or file here; give the base with --model",
    ):
        adapter_files.convert_adapter(tmp_path / "adapter", tmp_path / "a.gguf")
    with pytest.raises(ValueError, match=r"adapter does not fit the model base: lora: the adapter's arrays for"):
        adapter_files.convert_adapter(tmp_path / "adapter", tmp_path / "a.gguf", "base")
    assert not (tmp_path / "a.gguf").exists()


def test_the_base_of_an_adapter_comes_along_and_is_checked(folder, tmp_path, rng):
    m = tl.quantize_linears(Llama.from_pretrained(folder), "nf4")
    m = tiny.randomize_trainable(tl.add_lora(m, r=4), rng)
    peft.save_adapter(m, tmp_path / "adapter", base_model=str(folder))
    written = adapter_files.convert_adapter(tmp_path / "adapter", tmp_path / "a.gguf")
    assert written.notes[0].startswith("it was trained on its base in nf4 (blocks of 64, double quantization); beside")
    again = adapter_files.load_adapter(Llama.from_pretrained(folder, quantize="nf4"), tmp_path / "a.gguf")
    x = tiny.ids(rng, 1, 9)
    assert (logits(again, x) == logits(m, x)).all()
    with pytest.warns(UserWarning, match=r"a\.gguf was trained on this base in nf4 .*, and here it is held in float32"):
        adapter_files.load_adapter(Llama.from_pretrained(folder), tmp_path / "a.gguf")
    other = tiny.model(12, **SIZES, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"a\.gguf was trained on another base"):
        adapter_files.load_adapter(other, tmp_path / "a.gguf")
    assert not tl.adapters.configs(other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter_files.load_adapter(other, tmp_path / "a.gguf", check_base=False)


@pytest.mark.parametrize("code", [None, "nf4", "int8_vectorwise"])
def test_an_adapter_is_not_written_for_another_base(code, folder, tmp_path, rng, capsys):
    """Dense bases, GGUF files and folders in few bits; the base itself in other forms is taken."""
    base = Llama.from_pretrained(folder)
    m = tiny.randomize_trainable(tl.add_lora(tl.quantize_linears(base, code) if code else base, r=4), rng)
    peft.save_adapter(m, tmp_path / "adapter", base_model=str(folder))
    adapter_files.convert_adapter(tmp_path / "adapter", tmp_path / "wanted.gguf", folder)
    other = Llama.from_pretrained(folder)
    other.model.layers[0].mlp.up_proj.weight.data[:] *= rng.standard_normal(32).astype(np.float32)
    for at, model in (("same", Llama.from_pretrained(folder)), ("other", other)):
        model.save_pretrained(tmp_path / at)
        gguf_writer.save(model, tmp_path / f"{at}.f16.gguf", "f16")
        if code:
            bitsandbytes.save(tl.quantize_linears(model, code), tmp_path / f"{at}.few")
    forms = ["", ".f16.gguf", *([".few"] if code else [])]
    for form in forms:
        adapter_files.convert_adapter(tmp_path / "adapter", tmp_path / "a.gguf", tmp_path / f"same{form}")
        assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "wanted.gguf").read_bytes()
        with pytest.raises(
            ValueError, match=r"adapter was trained on another base .*: this model's weights are others"
        ):
            run(tmp_path / "adapter", "--out", tmp_path / "b.gguf", "--model", tmp_path / f"other{form}")
        assert not (tmp_path / "b.gguf").exists()
    run(tmp_path / "adapter", "--out", tmp_path / "b.gguf", "--model", tmp_path / "other", "--force")
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "wanted.gguf").read_bytes()
    with pytest.raises(ValueError, match="--force is for an adapter"):
        run("base", "--out", tmp_path / "c.gguf", "--force")


def test_generate_and_merge_take_a_lora_file(tmp_path, rng, capsys):
    """As they take a folder: the base is the one that the file tells, held as it was in training."""
    from tinylora import cli

    m = tl.quantize_linears(Llama.from_pretrained("base"), "nf4")
    m = tiny.randomize_trainable(tl.add_lora(m, r=2, target_modules=["q_proj", "v_proj"]), rng)
    peft.save_adapter(m, tmp_path / "adapter", base_model="base")
    assert cli.main(["convert", str(tmp_path / "adapter"), "--out", str(tmp_path / "a.gguf")]) == 0
    capsys.readouterr()
    said = []
    for adapter in ("adapter", "a.gguf"):
        words = ["--prompt", "KING", "--max-new-tokens", "20", "--temperature", "0"]
        assert cli.main(["generate", "--adapter", str(tmp_path / adapter), *words]) == 0
        said.append(capsys.readouterr().out)
        assert cli.main(["merge", "--adapter", str(tmp_path / adapter), "--out", str(tmp_path / f"{adapter}.m")]) == 0
        capsys.readouterr()
    assert said[0] == said[1] and len(said[0]) > 10
    merged = [(tmp_path / f"{adapter}.m" / "model.safetensors").read_bytes() for adapter in ("adapter", "a.gguf")]
    assert merged[0] == merged[1]


def test_a_model_of_one_weight_for_two_is_untied_if_asked(tmp_path, folder, rng):
    m = adapted(folder, rng, target_modules=["embed_tokens", "lm_head"])
    adapter_files.save_adapter(m, tmp_path / "a.gguf")
    tied = tiny.model(11, **SIZES)
    with pytest.raises(ValueError, match=r"a\.gguf does not fit this model: it holds .*"):
        adapter_files.load_adapter(tied, tmp_path / "a.gguf", check_base=False)
    assert tied.lm_head is None
    adapter_files.load_adapter(tied, tmp_path / "a.gguf", check_base=False, untie=True)
    assert tied.lm_head is not None and len(tl.adapters.lora_layers(tied)) == 2


def test_an_embedding_that_comes_along_is_refused_if_it_is_not_the_bases_own(folder, tmp_path, rng):
    """As PEFT writes it: the base's embedding and head beside factors of the head, and rows of tokens that were added."""
    m = adapted(folder, rng, target_modules=["lm_head", "q_proj"])
    peft.save_adapter(m, tmp_path / "adapter", base_model=str(folder))
    path, start = tmp_path / "adapter" / "adapter_model.safetensors", "base_model.model."
    tensors, _ = safetensors.load_safetensors(path)
    head, embedding = m.get("lm_head").base_layer.weight.data, m.model.embed_tokens.weight.data
    own = {f"{start}lm_head.base_layer.weight": head, f"{start}model.embed_tokens.weight": embedding}
    safetensors.save_safetensors(path, tensors | own)
    adapter_files.convert_adapter(tmp_path / "adapter", tmp_path / "a.gguf")
    adapter_files.save_adapter(m, tmp_path / "b.gguf", base_model=str(folder))
    a, b = (gguf.GGUFReader(tmp_path / name).tensors for name in ("a.gguf", "b.gguf"))
    assert [(t.name, t.data.tobytes()) for t in a] == [(t.name, t.data.tobytes()) for t in b]
    grown = {f"{start}model.embed_tokens.weight": np.concatenate([embedding, embedding[:2]])}
    changed = {f"{start}model.embed_tokens.weight": embedding + (np.arange(256) == 7)[:, None].astype(np.float32)}
    for more in (grown, changed):
        safetensors.save_safetensors(path, tensors | more)
        with pytest.raises(ValueError, match=r"adapter brings model\.embed_tokens along, which is not the base's own"):
            adapter_files.convert_adapter(tmp_path / "adapter", tmp_path / "c.gguf")
    rows = {f"{start}model.embed_tokens.token_adapter.trainable_tokens_delta": embedding[:2] + 1}
    safetensors.save_safetensors(path, tensors | rows)
    settings = files.read_json(tmp_path / "adapter" / "adapter_config.json")
    files.write_json(
        tmp_path / "adapter" / "adapter_config.json",
        settings | {"trainable_token_indices": {"embed_tokens": [3, 5]}},
    )
    with pytest.raises(ValueError, match=r"adapter has rows of its own for model\.embed_tokens"):
        adapter_files.convert_adapter(tmp_path / "adapter", tmp_path / "c.gguf")
    assert not (tmp_path / "c.gguf").exists()


def rewritten(path, change):
    """The adapter file with its entries and tensors changed, by the gguf package."""
    reader = gguf.GGUFReader(path)
    fields = {n: f.contents() for n, f in reader.fields.items() if not n.startswith("GGUF.")}
    tensors = {t.name: np.array(t.data) for t in reader.tensors}
    change(fields, tensors)
    gguf_writer.write(path, fields, {n: (w.shape, "F32") for n, w in tensors.items()}, tensors.__getitem__)


def with_entries(path, changes):
    """A model's file with some entries changed; None leaves one out."""
    rewritten(path, lambda f, t: f.update({"tokenizer.ggml.model": "none", **changes}))


@pytest.mark.parametrize("name", ["bos", "eos", "eot", "eom", "padding"])
def test_a_special_token_that_the_vocabulary_does_not_have_is_refused(name, tmp_path):
    """A text would never end there; −1 is llama.cpp's word for none."""
    gguf_writer.save(tiny.model(**SIZES), tmp_path / "m.gguf", "f32")
    entry = f"tokenizer.ggml.{name}_token_id"
    for wrong in (256, 99999):
        with_entries(tmp_path / "m.gguf", {entry: wrong})
        with pytest.raises(ValueError, match=rf"m\.gguf: {entry} is {wrong}, and there are 256 tokens"):
            Llama.from_pretrained(tmp_path / "m.gguf")
    for fine, said in ((255, 255), (2**32 - 1, None)):
        with_entries(tmp_path / "m.gguf", {entry: fine})
        config = Llama.from_pretrained(tmp_path / "m.gguf").config
        ours = {"bos": "bos", "padding": "pad"}.get(name, "eos")
        assert getattr(config, f"{ours}_token_id") == said
    with_entries(tmp_path / "m.gguf", {entry: 7, "tokenizer.ggml.tokens": ["a", "b"]})
    with pytest.raises(ValueError, match=rf"{entry} is 7, and there are 2 tokens"):
        Llama.from_pretrained(tmp_path / "m.gguf")


@pytest.mark.parametrize("code, name", [(24, "I8"), (28, "F64"), (26, "I32"), (99, "99")])
def test_a_type_that_is_not_dequantized_is_called_by_its_name(code, name, tmp_path):
    gguf_writer.save(tiny.model(**SIZES), tmp_path / "m.gguf", "f32")
    data = (tmp_path / "m.gguf").read_bytes()
    at = data.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8  # one dimension, then the type
    assert data[at : at + 4] == bytes(4)
    (tmp_path / "m.gguf").write_bytes(data[:at] + code.to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(
        ValueError, match=rf"tensor model\.norm\.weight is of type {name}, which the gguf package cannot"
    ):
        Llama.from_pretrained(tmp_path / "m.gguf")


def test_a_file_without_a_vocabulary_says_so(tmp_path):
    m = tiny.model(**SIZES, vocab_size=300)
    m.save_pretrained(tmp_path / "m", "float32")
    gguf_writer.save(m, tmp_path / "m.gguf", "f32")
    with pytest.raises(
        ValueError, match=r"m\.gguf holds no vocabulary \(tokenizer\.ggml\.tokens\), and .* has 300 tokens"
    ):
        Llama.from_pretrained(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda f, t: f.update({"general.type": "model"}), "general.type is 'model', expected 'adapter'"),
        (lambda f, t: f.update({"adapter.type": "aora"}), "adapter.type is 'aora', expected 'lora'"),
        (lambda f, t: t.pop("blk.0.attn_q.weight.lora_b"), "self_attn.q_proj has lora_A but not its partner"),
        (lambda f, t: t.update({"blk.7.attn_q.weight.lora_a": np.ones((4, 32))}), "for which the model has no layer"),
        (
            lambda f, t: t.update({"blk.0.attn_norm.weight": np.ones(32)}),
            "attn_norm.weight, for which the model has no",
        ),
        (lambda f, t: t.update({"blk.0.attn_v.weight.lora_a": np.ones((4, 30))}), "a.gguf does not fit this model"),
        (lambda f, t: f.update({"adapter.alora.invocation_tokens": [1, 2]}), "waits for its invocation tokens"),
        (lambda f, t: f.update({"adapter.type": "\x1b[31m\n"}), r"adapter.type is '\\x1b\[31m\\n', expected 'lora'"),
        (lambda f, t: f.update({"adapter.lora.alpha": "16"}), "adapter.lora.alpha is '16', expected a finite number"),
        (
            lambda f, t: f.update({"adapter.lora.alpha": float("nan")}),
            "adapter.lora.alpha holds NaN; expected a number",
        ),
        (lambda f, t: f.update({"adapter.lora.alpha": float("-inf")}), "adapter.lora.alpha is -inf, expected a finite"),
        (lambda f, t: f.update({"tinylora": "["}), "its description of the adapter's base is damaged"),
        (lambda f, t: f.update({"tinylora": 7}), "its description of the adapter's base is damaged"),
        (
            lambda f, t: t.update({"blk.0.attn_q.weight.lora_b": np.ones((31, 4))}),
            r"lora_b has shape \(31, 4\), which fits no",
        ),
        (
            lambda f, t: t.update({"blk.0.attn_q.weight.lora_a": np.ones(32)}),
            r"lora_a has shape \(32,\), which fits no layer",
        ),
    ],
)
def test_a_lora_file_that_is_not_understood_is_refused(change, words, folder, tmp_path, rng):
    adapter_files.save_adapter(adapted(folder, rng), tmp_path / "a.gguf")
    rewritten(tmp_path / "a.gguf", lambda f, t: None)
    adapter_files.load_adapter(Llama.from_pretrained(folder), tmp_path / "a.gguf")
    rewritten(tmp_path / "a.gguf", change)
    m = Llama.from_pretrained(folder)
    with pytest.raises(ValueError, match=words) as caught:
        adapter_files.load_adapter(m, tmp_path / "a.gguf")
    assert "a.gguf" in str(caught.value) and not tl.adapters.configs(m)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tensor", ["blk.0.attn_q.weight.lora_a", "blk.1.ffn_down.weight.lora_b"])
def test_a_factor_that_is_no_number_is_refused_by_name(tensor, number, folder, tmp_path, rng):
    adapter_files.save_adapter(adapted(folder, rng), tmp_path / "a.gguf")
    mark = np.float32(1234.5).tobytes()
    rewritten(tmp_path / "a.gguf", lambda f, t: t[tensor].__setitem__((0, 0), 1234.5))
    raw = (tmp_path / "a.gguf").read_bytes()
    assert raw.count(mark) == 1
    (tmp_path / "a.gguf").write_bytes(raw.replace(mark, np.float32(number).tobytes()))
    m = Llama.from_pretrained(folder)
    with pytest.raises(ValueError, match=rf"a\.gguf.*{tensor} holds .*(NaN|Inf)"):
        adapter_files.load_adapter(m, tmp_path / "a.gguf")
    assert not tl.adapters.configs(m)


@pytest.mark.parametrize(
    "change", [lambda f, t: f.update({"adapter.lora.alpha": 0.0}), lambda f, t: f.pop("adapter.lora.alpha")]
)
def test_no_alpha_means_a_scale_of_1(change, folder, tmp_path, rng):
    """So llama.cpp reads a file whose alpha is 0 or left out, whatever the ranks are."""

    def narrower(fields, tensors):
        change(fields, tensors)
        tensors["blk.1.ffn_up.weight.lora_a"] = tensors["blk.1.ffn_up.weight.lora_a"][:3]
        tensors["blk.1.ffn_up.weight.lora_b"] = tensors["blk.1.ffn_up.weight.lora_b"][:, :3]

    adapter_files.save_adapter(adapted(folder, rng, alpha=12), tmp_path / "a.gguf")
    rewritten(tmp_path / "a.gguf", narrower)
    gguf_writer.convert(folder, tmp_path / "base.gguf", "f32")
    expected = llama_cpp(tmp_path / "a.gguf", {t.name: t.data for t in gguf.GGUFReader(tmp_path / "base.gguf").tensors})
    m = adapter_files.load_adapter(Llama.from_pretrained(folder), tmp_path / "a.gguf")
    gguf_writer.save(tl.merge(m), tmp_path / "merged.gguf", "f32")
    for tensor in gguf.GGUFReader(tmp_path / "merged.gguf").tensors:
        np.testing.assert_allclose(tensor.data, expected[tensor.name], rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------------- the command
def test_the_command_writes_models(tmp_path, capsys):
    m = tiny.model(**SIZES)
    m.save_pretrained(tmp_path / "m", "float32")
    size, notes = sum(p.size for p in m.parameters()), "note: its tokens are the 256 bytes"
    for out, kind in (("a.gguf", None), ("b.GGUF", "q8_0"), ("c.Gguf", "bf16"), ("d.gguf", "f32")):
        run(tmp_path / "m", "--out", tmp_path / out, *(["--type", kind] if kind else []))
        said, note = capsys.readouterr().out.splitlines()
        assert said == f"{size:,} weights written to {tmp_path / out} in {kind or 'f16'}" and note.startswith(notes)
        kinds = {t.tensor_type.name for t in gguf.GGUFReader(tmp_path / out).tensors}
        assert kinds == {"F32", (kind or "f16").upper()}
    run(tmp_path / "d.gguf", "--out", tmp_path / "again", "--dtype", "float32")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "m/model.safetensors").read_bytes()


def test_a_gguf_is_told_by_its_name_in_any_letters(tmp_path):
    from tinylora.costs import memory

    m = tiny.model(**SIZES)
    gguf_writer.save(m, tmp_path / "M.GGUF", "f32")
    again = Llama.from_pretrained(tmp_path / "M.GGUF")
    assert again.config == m.config == memory.config_of(tmp_path / "M.GGUF")
    run(tmp_path / "M.GGUF", "--out", tmp_path / "m.Gguf", "--type", "f32")
    assert GGUF(tmp_path / "m.Gguf").fields["general.name"] == "M"
    (tmp_path / "folder.gguf").mkdir()
    m.save_pretrained(tmp_path / "folder.gguf", "float32")  # a folder may have such a name
    assert Llama.from_pretrained(tmp_path / "folder.gguf").config == m.config
    args = argparse.Namespace(path=str(tmp_path / "M.GGUF"), skip=())
    names, _, quantized = commands._weights_to_test(args)
    assert len(names) == 14 and not quantized


def test_the_command_writes_adapters(folder, tmp_path, rng, capsys):
    m = adapted(folder, rng, alpha_pattern={"q_proj": 5})
    peft.save_adapter(m, tmp_path / "adapter")
    run(tmp_path / "adapter", "--out", tmp_path / "a.gguf", "--model", folder)
    said, note = capsys.readouterr().out.splitlines()
    assert said.endswith("a.gguf in f32") and note.startswith("note: 2 of 14 layers have another scale")
    adapter_files.save_adapter(m, tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@pytest.mark.parametrize(
    "words, said",
    [
        (["m", "--out", "x", "--type", "f16"], "--type is for a GGUF: let --out end in .gguf; a folder takes --dtype"),
        (["m", "--out", "x.gguf", "--dtype", "float32"], "--dtype is for a folder; a GGUF takes --type"),
        (["m", "--out", "x.gguf", "--model", "base"], "--model names the base of an adapter, and m is none"),
        (["adapter", "--out", "x"], "adapter is an adapter: let --out end in .gguf"),
        (["adapter", "--out", "x.gguf"], "does not name its base; give the base with --model"),
        (["nothing", "--out", "x.gguf"], "nothing"),
    ],
)
def test_the_command_says_what_does_not_go_together(words, said, folder, tmp_path, rng, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.model(**SIZES).save_pretrained(tmp_path / "m")
    peft.save_adapter(adapted(folder, rng), tmp_path / "adapter")
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        run(*words)
    assert said in str(caught.value) and not any(p.name.startswith("x") for p in tmp_path.iterdir())


def test_the_command_shows_its_progress_on_a_terminal(tmp_path, monkeypatch):
    tqdm = pytest.importorskip("tqdm")
    seen = []

    def bar(names, **options):
        seen.append((len(names), options["disable"]))
        return iter(names)

    monkeypatch.setattr(tqdm, "tqdm", bar)
    run("base", "--out", tmp_path / "b.gguf")
    run("base", "--out", tmp_path / "folder")
    n = len(Llama.from_pretrained("base").state_dict())
    assert seen == [(n, None)] * 2  # None: shown where the output is a terminal
