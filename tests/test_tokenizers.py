"""Vocabularies: what their files may carry, where a text begins and ends, and how a continuation becomes text."""

import codecs
import itertools
import json
import math
import os
import random
import time
from dataclasses import replace

import llm_files
import numpy as np
import pytest
import tiny

from tinylora import Llama
from tinylora.models import files, tokenizer_file, vocabularies
from tinylora.models.tokenizers import BPETokenizer, ByteTokenizer, fitting, load_tokenizer
from tinylora.training.corpus import Pairs, documents, question_and_answer, read_corpus, running_text, scored_bytes

tokenizers = pytest.importorskip("tokenizers")


SPECIAL = ["<unk>", "<s>", "</s>"]


def byte_level(front=(), behind=()):
    """A backend with three special tokens; `front` and `behind` are what it adds to a text."""
    described = llm_files.trained(template=None).backend.to_str()
    for theirs, ours in zip(llm_files.SPECIAL, SPECIAL, strict=True):
        described = described.replace(theirs, ours)
    backend = tokenizers.Tokenizer.from_str(described)
    named = [(token, i) for i, token in enumerate(SPECIAL)]
    if front or behind:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=[*front, "$A", *behind], special_tokens=named
        )
    return backend


def sentencepiece(prefix=True):
    """Llama 2's kind, as its tokenizer.json describes it: letters, three words, and all bytes."""
    n, d = tokenizers.normalizers, tokenizers.decoders
    words = ["\u2581", *"abcd", "\u2581a", "\u2581b", "ab"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words]
    model = tokenizers.models.BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[("\u2581", "a"), ("\u2581", "b"), ("a", "b")],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = n.Sequence([*([n.Prepend("\u2581")] if prefix else []), n.Replace(" ", "\u2581")])
    backend.decoder = d.Sequence([d.Replace("\u2581", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    backend.add_special_tokens(tokens[:3])
    return BPETokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"})


# --------------------------------------------------------------------------------------------------------- settings of a call
def test_settings_of_a_call_in_a_file_change_no_text(tmp_path):
    text, backend = "once upon a time there was a cat. " * 40, byte_level()
    expected = BPETokenizer(byte_level()).encode(text)
    backend.enable_truncation(16)
    backend.enable_padding(length=16, pad_id=2)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert '"max_length": 16' in (tmp_path / "tokenizer.json").read_text()
    t = load_tokenizer(tmp_path, 300)
    assert (
        t.encode(text) == expected and len(expected) > 100 and t.encode("a") == BPETokenizer(byte_level()).encode("a")
    )
    t.save(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "tokenizer.json").read_text())
    assert saved["truncation"] is None and saved["padding"] is None


def test_dropout_of_merges_is_off_so_that_a_text_is_always_the_same_ids(tmp_path):
    backend = byte_level()
    backend.model.dropout = 0.9
    backend.save(str(tmp_path / "tokenizer.json"))
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["dropout"] == pytest.approx(0.9)
    t, text = load_tokenizer(tmp_path, 300), "Once upon a time there was a miller."
    assert (
        [t.encode(text)] * 20 == [BPETokenizer(byte_level()).encode(text)] * 20 == [t.encode(text) for _ in range(20)]
    )


def test_the_corpus_of_such_a_file_is_whole(tmp_path):
    backend = byte_level()
    backend.enable_truncation(16)
    t = BPETokenizer(backend)
    (tmp_path / "t.txt").write_text("once upon a time there was a cat. " * 100)
    train, heldout = read_corpus(tmp_path / "t.txt", t)
    assert train.tokens + heldout.tokens > 1500


# ------------------------------------------------------------------------------------------------------------------ ids with gaps
def gappy():
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "b": 5, "</s>": 9}, merges=[]))
    return BPETokenizer(backend, {"eos_token": "</s>"})


def test_ids_may_have_gaps():
    t = gappy()
    assert t.vocab_size == 10 and t.backend.get_vocab_size() == 3 and t.encode("ab") == [0, 5]
    with pytest.raises(ValueError, match="here: 10 tokens, but the model's vocab_size is 9"):
        fitting(t, 9, "here")
    assert fitting(t, 10, "here") is t
    text = running_text(b"abab", t)
    assert text.lengths.tolist() == [1, 0, 0, 0, 0, 1, 0, 0, 0, 0]
    _, targets, mask = text.windows(3)
    assert scored_bytes(text, targets, mask) == 3
    assert question_and_answer([("a", "b")], t).pairs == [([0], [5, 9])]
    m = Llama(replace(tiny.CONFIG, vocab_size=t.vocab_size), t)
    assert m.generate("ab", 5, temperature=5, stop=()).strip("ab") == ""


def test_a_vocabulary_of_256_tokens_is_not_taken_for_bytes(tmp_path):
    vocabulary = {chr(0x4E00 + i): i for i in range(256)}  # three bytes each
    t = BPETokenizer(tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[])))
    assert t.vocab_size == 256
    (tmp_path / "t.txt").write_text(
        "一丁七" * 33 + "一", encoding="utf-8"
    )  # a tenth of the bytes ends within a character
    train, heldout = read_corpus(tmp_path / "t.txt", t)
    assert train.tokens + heldout.tokens == 100 and train.lengths.tolist() == [3] * 256


# ------------------------------------------------------------------------------------------------------ where a text begins and ends
@pytest.mark.parametrize(
    "front, behind",
    [([], []), (["<s>"], []), (["<s>", "<unk>"], ["</s>"]), ([], ["</s>"])],
)
def test_a_text_gets_what_its_tokenizer_puts_in_front_and_never_what_behind(front, behind, rng):
    t = BPETokenizer(byte_level(front, behind), {"eos_token": "</s>"})
    ids = [SPECIAL.index(token) for token in front]
    assert list(t.front) == ids and t.encode("a cat", add_special_tokens=True) == ids + t.encode("a cat")
    assert t.encode("", add_special_tokens=True) == ids and t.encode("a cat") == t.encode(b"a cat")
    assert running_text(b"a cat", t).sources[0].tolist() == ids + t.encode("a cat")
    ((prompt, answer),) = question_and_answer([("who?", "a cat")], t).pairs
    assert prompt == ids + t.encode("who?") and answer == [*t.encode("a cat"), 2]
    assert question_and_answer([("who?", "a cat</s>")], t).pairs == [(prompt, answer)], (
        "written out or not, it ends once"
    )
    m = Llama(replace(tiny.CONFIG, vocab_size=t.vocab_size), t)
    by_text, by_ids = (list(m.stream(prompt, 4, 0)) for prompt in ("a cat", ids + t.encode("a cat")))
    assert by_text == by_ids
    if ids:
        assert list(m.stream("", 1, 0)) == list(m.stream(ids, 1, 0))


@pytest.mark.parametrize("front", [("<s>",), ("</s>",), ()])
def test_marks_that_the_data_write_out_are_there_once(front):
    t = BPETokenizer(byte_level(front=front), {"eos_token": "</s>"})
    begin, text = "".join(front), "a cat"
    written = [begin + text, text + "</s>", begin + text + "</s>", text]
    once = documents([text] * 4, t).sources[0].tolist()
    assert documents(written, t).sources[0].tolist() == once and once.count(2) == 4 + (front == ("</s>",))
    assert (
        running_text((begin + text).encode(), t).sources[0].tolist()
        == running_text(text.encode(), t).sources[0].tolist()
    )
    plain = question_and_answer([(text, text)], t).pairs
    assert question_and_answer([(begin + text, text + "</s>")], t).pairs == plain
    m = Llama(replace(tiny.CONFIG, vocab_size=t.vocab_size), t)
    assert list(m.stream(begin + text, 5, 0)) == list(m.stream(text, 5, 0))


def test_bos_counts_no_byte_and_is_never_a_target():
    t = BPETokenizer(byte_level(["<s>"]))
    text = running_text(b"a cat is a cat", t)
    inputs, targets, mask = text.windows(100)
    assert inputs[0, 0] == 1 and 1 not in targets[mask > 0] and text.lengths[1] == 0
    assert scored_bytes(text, targets, mask) == len(b"a cat is a cat")


def test_a_vocabulary_that_cannot_write_a_still_knows_its_front():
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"<s>": 0, "</s>": 1, "x": 2}, merges=[]))
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert BPETokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"}).front == (0,)


@pytest.mark.parametrize(
    "name, content",
    [
        ("tokenizer_config.json", {"eos_token": "</s>"}),
        ("tokenizer_config.json", {"eos_token": {"content": "</s>", "special": True}}),
        ("special_tokens_map.json", {"eos_token": {"content": "</s>"}}),
        ("generation_config.json", {"eos_token_id": [2, 0]}),
        ("config.json", {"eos_token_id": 2}),
    ],
)
def test_the_end_of_a_text_is_found_where_it_is_named(name, content, tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    files.write_json(tmp_path / name, content)
    t = load_tokenizer(tmp_path, 300)
    assert t.eos_id == 2 and 2 in t.end_ids
    t.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again", 300).eos_id == 2


def test_a_tokenizer_that_cannot_encode_is_a_sentence(tmp_path):
    model = tokenizers.models.BPE(vocab={"b": 0}, merges=[], unk_token="<unk>")
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(
        ValueError, match=r"tokenizer\.json is not a tokenizer that the tokenizers package reads \(.*<unk>"
    ):
        load_tokenizer(tmp_path, 10)


def listing(folder, settings=(), **others):
    """A folder whose tokenizer.json has three special tokens and 300 in all, and further ones in the files beside it."""
    byte_level().save(str(folder / "tokenizer.json"))
    others = {"tokenizer_config": {"bos_token": "<s>", "eos_token": "</s>", **dict(settings)}, **others}
    for name, content in others.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "settings, one, behind",
    [
        ({"tokenizer_class": "LlamaTokenizer"}, ["\u2581a"], ["<s>", "a"]),
        ({"tokenizer_class": "LlamaTokenizerFast", "legacy": False}, ["\u2581a"], ["<s>", "a"]),
        ({"tokenizer_class": "LlamaTokenizer", "legacy": True}, ["\u2581a"], ["<s>", "\u2581a"]),
        ({"tokenizer_class": "LlamaTokenizerFast", "add_prefix_space": False, "legacy": True}, ["a"], ["<s>", "a"]),
        ({"tokenizer_class": "CodeLlamaTokenizer", "legacy": True}, ["\u2581a"], ["<s>", "a"]),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, ["\u2581a"], ["<s>", "\u2581a"]),
        ({}, ["\u2581a"], ["<s>", "\u2581a"]),
    ],
)
def test_llamas_classes_say_where_a_text_gets_a_space(settings, one, behind, tmp_path):
    sentencepiece().backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", **settings}))
    load_tokenizer(tmp_path, 1000).save(tmp_path / "again")
    for t in (load_tokenizer(tmp_path, 1000), load_tokenizer(tmp_path / "again", 1000)):
        assert [t.backend.id_to_token(i) for i in t.encode("a")] == one
        assert [t.backend.id_to_token(i) for i in t.encode("<s>a")] == behind
        assert t.decode(t.encode("a b")) == "a b" and t.continuation(t.following("ab")) == "ab"
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')  # there the file counts
    assert [t.backend.id_to_token(i) for i in load_tokenizer(tmp_path, 1000).encode("<s>a")] == ["<s>", "\u2581a"]


MARK = {"content": "<x>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}


@pytest.mark.parametrize(
    "settings, others",
    [
        ({"added_tokens_decoder": {"300": MARK, "301": {**MARK, "content": "<y>"}}}, {}),
        ({"additional_special_tokens": ["<x>", "<y>"]}, {}),
        ({"additional_special_tokens": [MARK, {**MARK, "content": "<y>"}]}, {}),
        ({"extra_special_tokens": ["<x>", "<y>"]}, {}),
        ({"extra_special_tokens": {"image_token": "<x>", "end": "<y>"}}, {}),
        ({}, {"special_tokens_map": {"additional_special_tokens": ["<x>", "<y>"]}}),
        ({}, {"added_tokens": {"<y>": 301, "<x>": 300, "</s>": 2}}),
    ],
)
def test_tokens_that_lie_beside_a_tokenizer_json_are_added(settings, others, tmp_path):
    t = load_tokenizer(listing(tmp_path, settings, **others), 302)
    assert t.vocab_size == 302 and [t.encode(text) for text in ("<x>", "<y>")] == [[300], [301]]
    assert (t.decode([300]) == "") == ("added_tokens" not in others)
    t.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again", 302).encode("a<x>b<y>") == t.encode("a<x>b<y>")
    with pytest.raises(ValueError, match="302 tokens, but the model's vocab_size is 300"):
        load_tokenizer(tmp_path, 300)


def test_the_end_of_a_text_may_be_an_added_token(tmp_path):
    listing(tmp_path, {"eos_token": None, "added_tokens_decoder": {"300": MARK}}, config={"eos_token_id": 300})
    t = load_tokenizer(tmp_path, 301)
    assert t.eos_id == t.end_id == 300 and t.settings["eos_token"] == "<x>"


@pytest.mark.parametrize(
    "settings, others, words",
    [
        (
            {"added_tokens_decoder": {"305": MARK}},
            {},
            "_config.json gives the added token '<x>' the id 305, .* gets 300",
        ),
        ({"added_tokens_decoder": {"7": MARK}}, {}, "_config.json gives the added token '<x>' the id 7, .* gets 300"),
        ({}, {"added_tokens": {"<x>": 2}}, "added_tokens.json gives the added token '<x>' the id 2, .* gets 300"),
        ({"added_tokens_decoder": {"300": "<x>"}}, {}, "_config.json: the added tokens are not {id: token}"),
        ({"added_tokens_decoder": {"a": MARK}}, {}, "_config.json: the added tokens are not {id: token}"),
        ({"added_tokens_decoder": [MARK]}, {}, "_config.json: the added tokens are not {id: token}"),
    ],
)
def test_an_added_token_whose_id_does_not_fit_is_refused(settings, others, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        load_tokenizer(listing(tmp_path, settings, **others), 400)


@pytest.mark.parametrize(
    "kind, decoder, words",
    [
        ("word", None, "its model is WordLevel; tinylora reads"),
        ("piece", "WordPiece", "its model is WordPiece and its decoder is WordPiece; tinylora reads"),
        ("suffix", "BPEDecoder", "its BPE model has end_of_word_suffix '</w>' and its decoder is BPEDecoder"),
        ("suffix", "ByteLevel", "its BPE model has end_of_word_suffix '</w>'; tinylora"),
        ("prefix", None, "its BPE model has continuing_subword_prefix '##'; tinylora"),
        ("plain", "CTC", "its decoder is CTC"),
    ],
)
def test_vocabularies_with_other_marks_of_words_are_refused(kind, decoder, words, tmp_path):
    m, d = tokenizers.models, tokenizers.decoders
    model = {
        "word": lambda: m.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"),
        "piece": lambda: m.WordPiece({"a": 0, "##b": 1, "[UNK]": 2}, unk_token="[UNK]"),
        "suffix": lambda: m.BPE({"a": 0, "a</w>": 1}, [], end_of_word_suffix="</w>"),
        "prefix": lambda: m.BPE({"a": 0, "##a": 1}, [], continuing_subword_prefix="##"),
        "plain": lambda: m.BPE({"a": 0}, []),
    }[kind]()
    backend = tokenizers.Tokenizer(model)
    if decoder is not None:
        backend.decoder = d.Sequence([d.Fuse(), getattr(d, decoder)()])
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=rf"tokenizer\.json: {words}"):
        load_tokenizer(tmp_path, 10)


# --------------------------------------------------------------------------------------------------------- files that lie
def described():
    """What a tokenizer.json says."""
    return json.loads(byte_level(front=["<s>"]).to_str())


def grown(times):
    """A normalizer that doubles a text so often."""
    return {
        "type": "Sequence",
        "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * times,
    }


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def template(*pieces, **special):
    return {"type": "TemplateProcessing", "single": list(pieces), "pair": [], "special_tokens": special}


TEXT = {"Sequence": {"id": "A", "type_id": 0}}


def mark(name, i=0):
    return {"SpecialToken": {"id": name, "type_id": i}}


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("model", None, "model = None, expected an object"),
        ("model.vocab", "abc", "model.vocab = 'abc', expected"),
        ("model.vocab.a", -1, r"model.vocab\['a'\] = -1, expected a whole number"),
        ("model.vocab.a", 2**31, r"model.vocab\['a'\] = 2147483648, expected"),
        ("model.vocab.a", 10**400, r"model.vocab\['a'\] = a whole number of 1329 bits, expected"),
        ("model.vocab.a", True, r"model.vocab\['a'\] = True, expected"),
        ("model.vocab.a", 8, r"model.vocab gives the id 8 to '.*' and to '.*'"),
        ("model.merges", [["a"]], r"model.merges\[0\] = \['a'\], expected two tokens"),
        ("model.merges", ["a b c"], r"model.merges\[0\] = 'a b c', expected two tokens"),
        ("model.merges", {"a": "b"}, "model.merges = .*, expected a list"),
        ("model.merges", [["a", "nowhere"]], r"model: .*`nowhere` out of vocabulary"),
        ("model.unk_token", 3, "model.unk_token = 3, expected a text"),
        ("model.dropout", float("nan"), "model.dropout = nan, expected a finite number"),
        ("model", {"type": "Unigram", "unk_id": 0, "vocab": [["a", float("nan")]]}, r"model.vocab\[0\] = \['a', nan\]"),
        ("model", {"type": "Unigram", "unk_id": 9, "vocab": [["a", 0.0]]}, "model: "),
        ("added_tokens", 3, "added_tokens = 3, expected a list"),
        ("added_tokens.0.id", -1, r"added_tokens\[0\].id = -1, expected"),
        ("added_tokens.0.id", 4_000_000_000, r"added_tokens\[0\].id = 4000000000, expected"),
        ("added_tokens.0.id", 2_000_000_000, r"added_tokens\[0\].id = 2000000000 of '<unk>', and behind .* it gets 0"),
        ("added_tokens.1.content", "<unk>", r"added_tokens\[1\].id = 1 of '<unk>', and behind .* it gets 0"),
        ("added_tokens.0.content", "", r"added_tokens\[0\].id = 0 of '', and behind .* it gets None"),
        ("added_tokens.0.content", "\ud800", r"added_tokens\[0\].content = '\\ud800', expected a text"),
        ("normalizer", 3, "normalizer = 3, expected an object"),
        ("normalizer", {}, "normalizer: type is missing"),
        ("normalizer", {"type": "Magic"}, r"\(normalizer: "),
        ("normalizer", grown(40), r"normalizer.normalizers\[6\] makes 128 characters of one"),
        ("normalizer", grown(200), "normalizer has 201 parts"),
        ("normalizer", {"type": "Prepend", "prepend": "a" * 10**6}, "normalizer: prepend = 'a"),
        (
            "normalizer",
            {"type": "Sequence", "normalizers": [{"type": "ByteLevel"}] * 30},
            "makes 128 characters of one",
        ),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "/////w=="}, "is no table of SentencePiece's"),
        (
            "normalizer",
            {"type": "Precompiled", "precompiled_charsmap": "BAAAAP////8="},
            r"\(normalizer: .*out of bounds",
        ),
        ("pre_tokenizer", split("(a+)+b"), r"pre_tokenizer.pattern.Regex = '\(a\+\)\+b' takes more than 0.02 s on"),
        ("pre_tokenizer", split("(?:a|a)*b"), "pre_tokenizer.pattern.Regex = .* takes more than"),
        ("pre_tokenizer", split(r"(\w+\s?)+!"), "pre_tokenizer.pattern.Regex = .* takes more than"),
        ("pre_tokenizer", split(r"\s+$"), "pre_tokenizer.pattern.Regex = .* takes more than"),
        ("pre_tokenizer", split("a*a*b"), "pre_tokenizer.pattern.Regex = .* takes more than"),
        ("pre_tokenizer", split("(?:(?:a{999}){999}){999}"), "pre_tokenizer.pattern.Regex = .* repeats too often"),
        ("pre_tokenizer", split("("), r"pre_tokenizer.pattern.Regex = '\(' is no regular expression"),
        ("pre_tokenizer", split(3), "pre_tokenizer.pattern: Regex = 3, expected a text"),
        ("pre_tokenizer", split([]), r"pre_tokenizer.pattern: Regex = \[\], expected a text"),
        (
            "pre_tokenizer",
            {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, split("(a|aa)+$")]},
            r"pre_tokenizer.pretokenizers\[1\].pattern.Regex = .* takes more than",
        ),
        (
            "pre_tokenizer",
            {"type": "Sequence", "pretokenizers": [split("a" * i) for i in range(1, 30)]},
            "more than 20",
        ),
        ("pre_tokenizer", {"type": "FixedLength", "length": 0}, "pre_tokenizer: length = 0, expected a whole number"),
        ("post_processor", template(TEXT, TEXT), "post_processor.single holds the text .* other than once"),
        ("post_processor", template(mark("<s>")), "post_processor.single holds the text .* other than once"),
        ("post_processor", template(mark("<q>"), TEXT), "post_processor.special_tokens has no ids for '<q>'"),
        (
            "post_processor",
            template(mark("<s>"), TEXT, **{"<s>": {"id": "<s>", "ids": [99_999], "tokens": ["<s>"]}}),
            "post_processor puts the id 99999 before a text, and no token has it",
        ),
        ("post_processor", template(1, TEXT), "post_processor.single = .*, expected a list of pieces"),
        ("decoder", {"type": "Sequence", "decoders": [3]}, r"decoder.decoders\[0\]: expected an object, found 3"),
    ],
)
def test_what_a_tokenizer_json_must_not_say_is_a_sentence_with_file_and_field(name, value, words, tmp_path, capfd):
    content = described()
    *outer, last = [int(key) if key.isdigit() else key for key in name.split(".")]
    inner = content
    for key in outer:
        inner = inner[key]
    inner[last] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    began = time.process_time()
    with pytest.raises(ValueError, match=rf"tokenizer\.json.*{words}"):
        load_tokenizer(tmp_path, 300)
    assert time.process_time() - began < 30 and capfd.readouterr().err == "", "a panic of Rust's is not shown"


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("tokenizer_config", {"eos_token": 5}, "eos_token = 5, expected a text"),
        ("tokenizer_config", {"bos_token": {"content": ["<s>"]}}, "bos_token = .*, expected a text"),
        ("tokenizer_config", {"pad_token": "\ud800"}, r"pad_token = '\\ud800', expected a text"),
        (
            "tokenizer_config",
            {"additional_special_tokens": "<x>"},
            "additional_special_tokens = '<x>', expected a list",
        ),
        ("tokenizer_config", {"additional_special_tokens": [None]}, r"additional_special_tokens\[0\] = None, expected"),
        ("tokenizer_config", {"extra_special_tokens": {"a": 1}}, "extra_special_tokens = .*, expected"),
        ("tokenizer_config", {"legacy": "false"}, "legacy = 'false', expected true or false"),
        (
            "tokenizer_config",
            {"model_max_length": float("nan")},
            "holds what no JSON file should, in 'model_max_length'",
        ),
        ("tokenizer_config", {"note": "\udfff"}, "holds what no JSON file should, in 'note'"),
        (
            "tokenizer_config",
            {"added_tokens_decoder": {"4000000000": {"content": "<x>"}}},
            "the id 4000000000, .* gets 300",
        ),
        ("special_tokens_map", {"eos_token": ["</s>"]}, r"eos_token = \['</s>'\], expected a text"),
        ("added_tokens", {"<x>": -1}, "gives the added token '<x>' the id -1"),
    ],
)
def test_what_lies_beside_it_must_not_lie_either(name, content, words, tmp_path):
    with pytest.raises(ValueError, match=rf"{name}\.json.*{words}"):
        load_tokenizer(listing(tmp_path, **{name: content}), 400)


BESIDE = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")


@pytest.mark.skipif(os.name != "posix", reason="pipes and devices")
@pytest.mark.parametrize("name", [*BESIDE, "generation_config.json", "chat_template.jinja", "chat_template.json"])
def test_a_path_at_which_no_file_lies_is_named(name, tmp_path):
    makers = {
        "is a pipe": os.mkfifo,
        "is a pipe, a socket or a device": lambda path: path.symlink_to("/dev/zero"),
        "is a folder": os.mkdir,
        "expected at most": lambda path: path.touch() or os.truncate(path, 10 << 30),
    }
    for i, (words, make) in enumerate(makers.items()):
        (tmp_path / str(i)).mkdir()
        folder = listing(tmp_path / str(i), {"eos_token": None, "tokenizer_class": "LlamaTokenizer"})
        if name != "tokenizer.json":
            sentencepiece().backend.save(str(folder / "tokenizer.json"))
        (folder / name).unlink(missing_ok=True)
        make(folder / name)
        with pytest.raises(ValueError, match=f"{name} .*{words}"):
            load_tokenizer(folder, 1000)


def test_a_text_on_which_the_package_gives_up_is_a_sentence(monkeypatch):
    t = BPETokenizer(byte_level(), where="HERE")
    t.backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("(a+)+b"), "isolated")
    with pytest.raises(ValueError, match=r"HERE: its tokenizer fails on a text of 41 characters \(.*retry-limit"):
        t.encode("a" * 40 + "c")


def test_the_ways_of_cutting_that_are_known_are_not_tried_again(monkeypatch):
    monkeypatch.setattr(tokenizer_file, "_seconds", None)
    for name, cuts in vocabularies.CUTS.items():
        for cut in cuts:
            tokenizer_file._check_pattern({"Regex": cut}, name)


def test_an_expression_is_slow_only_if_it_is_every_time_and_not_if_the_machine_is(monkeypatch):
    takes = {"fast": 0.004, "single": 0.003, "quadratic": 0.2}  # seconds for as many characters as are tried at most

    def slow(which, machine):
        """Whether it is refused on a machine: a generator of how many times longer each measurement takes than it should."""

        def seconds(split, searched):
            name = "single" if repr(split).count(ANY) else which
            share = len(searched) / tokenizer_file._LONGEST
            return takes[name] * share ** (2 if name == "quadratic" else 1) * next(machine)

        monkeypatch.setattr(tokenizer_file, "_seconds", seconds)
        return tokenizer_file._slow(r"\p{N}+", "HERE")

    ANY = r"[\s\S]"
    assert slow("fast", itertools.repeat(1)) == 0 and 0 < slow("quadratic", itertools.repeat(1)) <= 8192
    assert (
        slow("fast", itertools.repeat(20)) == 0 and 0 < slow("quadratic", itertools.repeat(20)) <= 8192
    )  # a slow machine
    hiccups = (100 if i % 5 else 1 for i in itertools.count())  # four measurements of five are no measurements
    assert slow("fast", hiccups) == 0


def test_a_tokenizer_of_bytes_that_changes_a_text_is_read_as_before(tmp_path):
    content = described()
    three = split(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+")
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [three, content["pre_tokenizer"]]}
    content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "StripAccents"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    expected = tokenizers.Tokenizer.from_str(json.dumps(content)).encode("ﬁne café 12345", add_special_tokens=False)
    assert load_tokenizer(tmp_path, 300).encode("ﬁne café 12345") == expected.ids


@pytest.mark.parametrize("seed", range(4))
def test_mutated_files_end_in_a_tokenizer_or_a_sentence(seed, tmp_path):
    """Any value anywhere becomes another, disappears or appears; no traceback, and every sentence names a file."""
    draw = random.Random(seed)
    odd = [
        None,
        True,
        -1,
        2**31,
        10**30,
        1.5,
        math.nan,
        math.inf,
        "",
        "\ud800",
        "$A",
        "Sequence",
        [],
        {},
        ["a", "b"],
        {"a": 0},
    ]
    settings = {"bos_token": "<s>", "eos_token": MARK | {"content": "</s>"}, "tokenizer_class": "LlamaTokenizer"}
    settings |= {"additional_special_tokens": ["<x>"], "added_tokens_decoder": {"300": MARK}, "legacy": False}
    sources = {"tokenizer.json": described(), "tokenizer_config.json": settings}
    outcomes = set()
    for i in range(150):
        folder = tmp_path / str(i)
        folder.mkdir()
        contents = json.loads(json.dumps(sources))
        inner, depth = contents[draw.choice(["tokenizer.json", "tokenizer_config.json"])], 0
        while True:
            key = draw.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
            if not isinstance(inner[key], (dict, list)) or not inner[key] or draw.random() < 0.2:
                break
            inner, depth = inner[key], depth + 1
        if draw.random() < 0.2:
            del inner[key]
        else:
            inner[key] = draw.choice(odd)
        for name, content in contents.items():
            (folder / name).write_text(json.dumps(content))
        try:
            t = load_tokenizer(folder, 400)
            ids = t.encode("a cat <s> é", add_special_tokens=True)
            assert t.continuation(ids) is not None and all(0 <= i < t.vocab_size for i in ids) and t.end_ids is not None
            t.save(folder / "again")
            outcomes.add("read")
        except ValueError as error:
            assert str(folder) in str(error)
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_special_tokens_map_counts_only_beside_an_old_config(tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    files.write_json(tmp_path / "special_tokens_map.json", {"eos_token": "<unk>"})
    files.write_json(tmp_path / "tokenizer_config.json", {"eos_token": "</s>", "added_tokens_decoder": {}})
    assert load_tokenizer(tmp_path, 300).eos_id == 2
    files.write_json(tmp_path / "tokenizer_config.json", {"eos_token": "</s>"})
    assert load_tokenizer(tmp_path, 300).eos_id == 0


def test_a_text_stops_at_the_tokenizers_end_where_the_config_names_none():
    t = gappy()
    m = Llama(replace(tiny.CONFIG, vocab_size=t.vocab_size), t)
    tokens = list(m.stream("a", 200, temperature=3, seed=1, stop=()))
    assert 9 in tokens[:-1], "at this temperature each token comes"
    assert list(m.stream("a", 200, temperature=3, seed=1)) == tokens[: tokens.index(9) + 1]
    m.config = replace(m.config, eos_token_id=5)
    assert list(m.stream("a", 200, temperature=3, seed=1))[-1] == 5


# ------------------------------------------------------------------------------------------------- a continuation becomes text
@pytest.mark.parametrize("prefix", [True, False])
def test_a_continuation_keeps_its_first_space(prefix):
    t = sentencepiece(prefix)
    m = Llama(replace(tiny.CONFIG, vocab_size=t.vocab_size), t)
    for prompt, more in (("a", " b"), ("a", "b"), ("a b", "\n b a"), ("d", " é 你好")):
        tokens = t.following(more)
        m.stream = lambda *args, tokens=tokens, **options: iter(tokens)
        streamed = codecs.decode(b"".join(map(t.token_bytes, tokens)), "utf-8")
        assert m.generate(prompt) == "".join(t.pieces(tokens)) == streamed == more
        assert t.decode([*t.encode(prompt), *tokens]) == prompt + more


def test_an_answer_behind_its_prompt_gets_no_space_of_its_own():
    t = sentencepiece()
    assert t.encode("a") != t.following("a") == [t.backend.token_to_id("a")]
    ((prompt, answer),) = question_and_answer([("a: ", "b a")], t).pairs
    assert t.decode([*prompt, *answer]) == "a: b a"
    plain = BPETokenizer(byte_level())
    for text in ("a", " a", "\na", "", "12"):
        assert plain.following(text) == plain.encode(text), "nothing is put in front of a byte-level text"
    spaced = byte_level()
    spaced.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    spaced = BPETokenizer(spaced)
    assert spaced.continuation(spaced.encode("cat")) == " cat" and spaced.continuation(spaced.following("cat")) == "cat"


def test_pieces_wait_for_whole_characters_and_show_cut_ones_at_the_end():
    for t in (sentencepiece(), BPETokenizer(byte_level()), ByteTokenizer()):
        tokens = t.following("é你🙂")
        pieces = list(t.pieces(tokens))
        assert "".join(pieces) == "é你🙂" and "" in pieces and "\ufffd" not in "".join(pieces)
        cut = list(t.pieces(tokens[:-1]))
        assert cut[-1] == "\ufffd" and "".join(cut) == "é你\ufffd" == t.continuation(tokens[:-1])
        assert t.continuation([]) == ""
    assert sentencepiece().continuation([3 + 0xFF, 3 + 0x41]) == "\ufffdA", "a byte that is no text"


def test_added_tokens_within_a_text_are_their_own_words():
    backend = byte_level()
    words = ["fés", "<think>", "<｜a\u2581b｜>", "   "]
    backend.add_tokens([tokenizers.AddedToken(word, normalized=False) for word in words])
    t, text = BPETokenizer(backend), "cafés <think> <｜a\u2581b｜>\n   x"
    ids = t.encode(text)
    assert {300, 301, 302, 303} <= set(ids) and t.continuation(ids) == text
    assert len(running_text(text.encode(), t).lengths) == 304 and sum(len(t.token_bytes(i)) for i in ids) == len(
        text.encode()
    )
    assert t.continuation([*t.encode("a"), 2, *t.encode("b"), 999]) == "ab", "marks are no text"


# ----------------------------------------------------------------------------------------------------------- vocabularies in GGUF
def entries(**more):
    base = {"model": "gpt2", "pre": "smollm", "tokens": ["a", "b", "ab", "<s>", "</s>", "<t>"], "merges": ["a b"]}
    named = {**base, "token_type": [1, 1, 1, 3, 3, 4], "bos_token_id": 3, "eos_token_id": 4, **more}
    return {f"tokenizer.ggml.{name}": value for name, value in named.items() if value is not None}


def test_marks_of_a_gguf_are_what_it_says():
    t = BPETokenizer.from_gguf(entries(eot_token_id=5))
    assert t.encode("ab<s><t>ba") == [2, 3, 5, 1, 0] and t.front == () and t.vocab_size == 6
    assert (t.eos_id, t.end_id, t.end_ids) == (4, 4, (4, 5)) and t.continuation([2, 3, 5]) == "ab<t>"
    assert BPETokenizer.from_gguf(entries(add_bos_token=True)).front == (3,)
    assert BPETokenizer.from_gguf(entries(add_bos_token=True, bos_token_id=None)).front == ()
    assert BPETokenizer.from_gguf(entries(pre="llama-bpe")).front == (3,), (
        "as llama.cpp takes it where the file is silent"
    )
    assert BPETokenizer.from_gguf(entries(pre="llama-bpe", add_bos_token=False)).front == ()
    odd = entries(bos_token_id=99, eos_token_id="x", token_type=None)
    assert BPETokenizer.from_gguf(odd).eos_id is None


def test_chat_templates_of_a_gguf():
    pytest.importorskip("jinja2")
    one = BPETokenizer.from_gguf({**entries(), "tokenizer.chat_template": "one"})
    both = BPETokenizer.from_gguf(
        {**entries(), "tokenizer.chat_template": "one", "tokenizer.chat_template.tool_use": "two"}
    )
    hi = [{"role": "user", "content": "hi"}]
    assert one.chats and one.render(hi) == both.render(hi) == "one" and both.render(hi, tools=[]) == "two"
    assert not BPETokenizer.from_gguf(entries()).chats


def test_a_file_that_names_no_way_of_cutting_is_refused_and_default_is_llama_cpps():
    with pytest.raises(ValueError, match=r"m\.gguf names no way of cutting text before the merges"):
        BPETokenizer.from_gguf(entries(pre=None), "m.gguf")
    with pytest.raises(ValueError, match=r"is 'mine'; tinylora knows a\.x-4\.0, "):
        BPETokenizer.from_gguf(entries(pre="mine"), "m.gguf")

    def pieces(pre):
        cut = BPETokenizer.from_gguf(entries(pre=pre)).backend.pre_tokenizer
        return [piece.replace("Ġ", " ") for piece, _ in cut.pre_tokenize_str("a, 1234+b IT'S")]

    assert pieces("gpt-2") == ["a", ",", " 1234", "+", "b", " IT", "'", "S"]
    assert pieces("smollm") == pieces("refact") == ["a", ",", " ", "1", "2", "3", "4", "+", "b", " IT", "'", "S"]
    assert pieces("llama-bpe") == pieces("dbrx") == ["a", ",", " ", "123", "4", "+b", " IT", "'S"]
    assert pieces("qwen2") == ["a", ",", " ", "1", "2", "3", "4", "+b", " IT", "'S"]
    assert pieces("default") == ["a", ",", " ", "123", "4", "+", "b", " IT", "'", "S"]


@pytest.mark.parametrize(
    "more, words",
    [
        ({"pre": ["gpt-2"]}, r"pre = \['gpt-2'\], expected a text"),
        ({"model": {}}, "model = {}, expected a text"),
        ({"add_bos_token": "false"}, "add_bos_token = 'false', expected true or false"),
        (
            {"tokens": ["a", "b", "ab", "$A", "</s>", "<t>"], "add_bos_token": True},
            r"bos_token_id is '\$A', which cannot",
        ),
        ({"merges": ["a"]}, "the merges do not fit"),
        ({"merges": ["a z"]}, "the merges do not fit"),
        ({"model": "llama", "scores": [0, 0, 0, math.nan, 0, 0]}, "expected a finite score for each"),
        (
            {"model": "llama", "scores": [0] * 6, "tokens": [*"abcde", "f" * 2000]},
            "one of 2000 characters, expected at most",
        ),
    ],
)
def test_entries_of_a_gguf_that_lie_are_named(more, words):
    with pytest.raises(ValueError, match=rf"^m\.gguf.*{words}"):
        BPETokenizer.from_gguf(entries(**more), "m.gguf")


def test_every_way_of_cutting_loses_nothing(rng):
    letters = np.array(list(" \n\t\r  0123456789aBcd'sSéüЖ你好か😀½.,/()_-+<>`|"))
    for pre in vocabularies.CUTS:
        cut = BPETokenizer.from_gguf(entries(pre=pre)).backend.pre_tokenizer
        text = "".join(rng.choice(letters, 80))
        byte_of = {letter: bytes([b]) for b, letter in enumerate(map(_letter, range(256)))}
        spelled = "".join(piece for piece, _ in cut.pre_tokenize_str(text))
        assert b"".join(byte_of[letter] for letter in spelled) == text.encode(), pre


def _letter(byte):
    """The letter that stands for a byte in byte-level vocabularies."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return chr(byte) if byte in plain else chr(0x100 + sum(b not in plain for b in range(byte)))


def test_a_sentencepiece_vocabulary_of_a_gguf_merges_the_best_first():
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "\u2581",
        *"abc",
        "ab",
        "bc",
        "\u2581ab",
    ]
    scores = [0.0] * 259 + [-9.0, -9.0, -9.0, -9.0, -2.0, -1.0, -3.0]
    types = [2, 3, 3, *[6] * 256, *[1] * 7]
    named = {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "scores": scores,
        "token_type": types,
        "merges": None,
    }
    fields = entries(**named, bos_token_id=1, eos_token_id=2)
    t = BPETokenizer.from_gguf(fields)

    def words(text):
        return [tokens[i] for i in t.encode(text)]

    assert words("abc") == ["\u2581", "a", "bc"], "bc has the higher score, though ab comes first"
    assert words("ab") == ["\u2581ab"] and words("  ab") == ["\u2581", "\u2581", "\u2581ab"]
    assert words("é\n") == ["\u2581", "<0xC3>", "<0xA9>", "<0x0A>"] and words("") == []
    assert words("<s>ab</s>") == ["<s>", "\u2581ab", "</s>"] and t.front == (1,) and t.end_id == 2
    assert t.decode(t.encode("abc é")) == "abc é" and t.continuation(t.encode("ab")) == " ab"
    bare = BPETokenizer.from_gguf({**fields, "tokenizer.ggml.add_space_prefix": False})
    assert bare.encode("ab") == [tokens.index("ab")] and bare.decode(bare.encode(" ab")) == " ab"
    assert BPETokenizer.from_gguf({**fields, "tokenizer.ggml.add_bos_token": False}).front == ()


def test_pairs_of_an_embedded_model_are_what_they_were():
    assert question_and_answer([("ab", "xy")], ByteTokenizer()).pairs == [([97, 98], [120, 121])]
    assert isinstance(question_and_answer([("", "xy")], ByteTokenizer()), Pairs)


# ------------------------------------------------------------------------------------------------------------------ long texts
def cut_as(*cuts, add_prefix_space=False, **options):
    """A byte-level backend that cuts by these regular expressions."""
    backend, p = byte_level(), tokenizers.pre_tokenizers
    splits = [p.Split(tokenizers.Regex(cut), "isolated") for cut in cuts]
    last = p.ByteLevel(add_prefix_space=add_prefix_space, use_regex=options.get("use_regex", not cuts))
    backend.pre_tokenizer = p.Sequence([*splits, last])
    return BPETokenizer(backend)


def metaspace(scheme, split):
    """SentencePiece's kind with the space put in front by the pre-tokenizer."""
    t = sentencepiece()
    t.backend.normalizer = None
    t.backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace("\u2581", scheme, split)
    return t


LONG = {
    **{name: lambda name=name: cut_as(*vocabularies.CUTS[name]) for name in ("gpt-2", "llama-bpe", "qwen2", "tekken", "gpt-4o")},
    **{name: lambda name=name: cut_as(*vocabularies.CUTS[name]) for name in ("smollm", "falcon", "default", "deepseek-coder")},
    "digits": lambda: llm_files.trained(),
    "prefix": lambda: cut_as(add_prefix_space=True),
    "sentencepiece": sentencepiece,
    "sentencepiece without prefix": lambda: sentencepiece(prefix=False),
    **{f"metaspace {s} {x}": lambda s=s, x=x: metaspace(s, x) for s in ("always", "first", "never") for x in (True, False)},
}  # fmt: skip


@pytest.mark.parametrize("kind", LONG)
def test_a_long_text_in_pieces_has_the_ids_of_the_whole(kind, rng, monkeypatch):
    t = LONG[kind]()
    assert vocabularies.splits_before_words(t.backend)
    monkeypatch.setattr("tinylora.models.tokenizers._PIECE", 20)
    words = [
        "a",
        "b",
        "ab",
        "cab",
        "Once",
        "upon",
        "it's",
        "naïve",
        "你好",
        "12345",
        "  ",
        "\n",
        "\t",
        ".",
        "e\u0301",
        "'s",
        "<s>",
        "\u2581a",
    ]
    pieces = 0
    for _ in range(40):
        text = "".join(
            str(w) + str(rng.choice([" ", " ", " ", "", "\n", "  "])) for w in rng.choice(words, rng.integers(1, 80))
        )
        parts = list(t.in_pieces(text.encode()))
        assert [i for part in parts for i in part] == t.encode(text)
        pieces += len(parts)
        ids = running_text(text.encode() + b"ab", t).sources[0]
        assert ids.tolist() == t.begun(t.encode(text + "ab")) and ids.dtype in (np.uint8, np.uint16)
    assert pieces > 60


def test_what_may_not_be_cut_is_encoded_whole(monkeypatch):
    monkeypatch.setattr("tinylora.models.tokenizers._PIECE", 8)
    over, n = sentencepiece(), tokenizers.normalizers
    added = BPETokenizer(byte_level())
    added.backend.add_tokens([tokenizers.AddedToken("an apple")])
    eats = BPETokenizer(byte_level())
    eats.backend.add_tokens([tokenizers.AddedToken("word", rstrip=True)])
    lowered = BPETokenizer(byte_level())
    lowered.backend.normalizer = n.Lowercase()
    over.backend.normalizer = n.Sequence([n.Strip(), n.Replace(" ", "\u2581")])
    crossing = tokenizers.models.BPE(vocab={"\u2581": 0, "a": 1, "a\u2581": 2}, merges=[("a", "\u2581")])
    crossing = tokenizers.Tokenizer(crossing)
    crossing.normalizer = n.Replace(" ", "\u2581")
    for t in (over, added, eats, lowered, BPETokenizer(crossing), cut_as("unknown"), cut_as(use_regex=False)):
        text = "a a an apple a word a a a"
        assert not vocabularies.splits_before_words(t.backend)
        assert list(t.in_pieces(text.encode())) == [t.encode(text)]


@pytest.mark.parametrize(
    "part, sentence",
    [
        ({"junk": [1]}, "'junk' is none of its parts"),
        ({"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "ab"}}, "normalizer.pattern = "),
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": ""}, "content": "ab"}}, "normalizer.pattern = "),
    ],
)
def test_a_part_that_no_tokenizer_has_is_named(tmp_path, part, sentence):
    llm_files.trained().save(tmp_path)
    described = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**described, **part}))
    with pytest.raises(ValueError, match=rf"tokenizer\.json: {sentence}"):
        load_tokenizer(tmp_path, 300)


def test_a_template_that_writes_nothing_is_named(tmp_path):
    pytest.importorskip("jinja2")
    llm_files.trained(template="{# nothing #}").save(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: the chat template writes nothing"):
        load_tokenizer(tmp_path, 300).chat_prompt("hi")


def test_a_vocabulary_larger_than_the_model_names_both_files(tmp_path):
    llm_files.trained().save(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer\.json: 300 tokens, but .* vocab_size is 2 \(.*config\.json\)"):
        load_tokenizer(tmp_path, 2)
