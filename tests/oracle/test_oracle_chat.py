"""transformers as a witness for tokenizers: chat templates, what the assistant says, special tokens, and vocabularies out of GGUF.

Beside it sentencepiece, whose ids a SentencePiece vocabulary must give.
"""

import io
import itertools
import json
import os

import chats
import llm_files
import numpy as np
import pytest
from test_tokenizers import sentencepiece

from tinylora.models import chat, vocabularies
from tinylora.models.gguf import _read_header
from tinylora.models.tokenizers import BPETokenizer, load_tokenizer

pytestmark = pytest.mark.oracle

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

LETTERS = list(" \n\t\r 0123456789abcXYZ'sSéüжЖ你好か😀½.,/()_-<>&\"{}")


def nonsense(rng, n=30):
    text = "".join(rng.choice(LETTERS, int(rng.integers(1, n))))
    return text.replace("<s>", "").replace("</s>", "")  # which would be marks


def conversation(rng, system=True):
    """A random one, of a user and an assistant in turn; the user begins."""
    said = [nonsense(rng) + "x" for _ in range(int(rng.integers(1, 8)))]
    return chats.talk(*said, system=nonsense(rng) if system and rng.random() < 0.5 else None)


def theirs_of(t, folder):
    t.save(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def ids(theirs, messages, **options):
    said = theirs.apply_chat_template(messages, **options)
    return said["input_ids"] if hasattr(said, "keys") else said


# ------------------------------------------------------------------------------------------------------------------------ chats
@pytest.mark.parametrize("name", chats.MARKS)
def test_conversations_are_written_as_transformers_writes_them(name, tmp_path, rng):
    theirs = theirs_of(chats.tokenizer(name), tmp_path)
    ours, refused, tried = load_tokenizer(tmp_path, 1000), 0, 0
    talks = [*chats.CONVERSATIONS.values(), *((conversation(rng, system=i % 2 == 0), {}) for i in range(20))]
    for messages, more in talks:
        for asking in (False, True):
            options = {"add_generation_prompt": asking, **chats.ALWAYS, **more}
            tried += 1
            try:
                expected = theirs.apply_chat_template(messages, tokenize=False, **options)
            except Exception:
                refused += 1
                with pytest.raises(ValueError, match="the chat template"):
                    ours.render(messages, **options)
                continue
            assert ours.render(messages, **options) == expected
            assert ours.encode(expected) == ids(theirs, messages, **options)
    assert tried - refused > 20
    assert ours.chat_prompt("hi é") == ids(theirs, chats.talk("hi é"), add_generation_prompt=True)


def test_each_form_of_template_is_the_one_that_transformers_takes(tmp_path):
    from test_chat import FORMS, written

    for i, (settings, beside, _) in enumerate(FORMS.values()):
        folder = written(tmp_path / str(i), settings, beside)
        ours, theirs = load_tokenizer(folder, 1000), transformers.AutoTokenizer.from_pretrained(folder)
        if theirs.chat_template is not None:  # a processor's file is for AutoProcessor
            assert ours.render(chats.talk("hi")) == theirs.apply_chat_template(chats.talk("hi"), tokenize=False)


LOOSE = """{%- for m in messages %}
    {%- if m.role == 'assistant' %}<a>{% generation %}{{ m.content | trim }}{{ eos_token }}{% endgeneration %}
    {%- else %}<{{ m.role }}>{{ m.content }}{% endif %}
{%- endfor %}"""


@pytest.mark.parametrize("source", [None, LOOSE])
def test_what_is_learned_is_what_transformers_marks(source, tmp_path, rng):
    t = chats.tokenizer("marked", **({"chat_template": source} if source else {}))
    theirs, learned_somewhere = theirs_of(t, tmp_path), 0
    for _ in range(40):
        messages = conversation(rng)
        if len(messages) - (messages[0]["role"] == "system") < 2:
            continue
        said = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
        (example,) = chat.turns(t, messages)
        ours = [(i, place % 2) for place, part in enumerate(example) for i in part]
        expected = list(zip(said["input_ids"], said["assistant_masks"], strict=True))
        assert ours == expected[: len(ours)] and not any(mask for _, mask in expected[len(ours) :])
        learned_somewhere += sum(mask for _, mask in ours)
    assert learned_somewhere > 100


@pytest.mark.parametrize("name", sorted(set(chats.MARKS) - {"alpaca", "qwen-3", "marked"}))
def test_what_is_read_and_learned_are_the_tokens_of_the_conversation(name, tmp_path, rng):
    t = chats.tokenizer(name)
    theirs = theirs_of(t, tmp_path)
    for _ in range(10):
        messages = [*conversation(rng, system=False)[:4]]
        messages = messages[: len(messages) // 2 * 2]
        if messages:
            (example,) = chat.turns(t, messages, **chats.ALWAYS)
            joined = [i for part in example for i in part]
            assert joined == ids(theirs, messages, **chats.ALWAYS)[: len(joined)]
            assert len(example) == len(messages) and all(part[-1] == t.end_id for part in example[1::2])


# ------------------------------------------------------------------------------------------------------ what a file says of calls
def byte_level():
    t = llm_files.trained(template=None)
    return tokenizers.Tokenizer.from_str(t.backend.to_str())


@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "TokenizersBackend", None])
@pytest.mark.parametrize("flag", [True, False, None])
@pytest.mark.parametrize("front", [True, False])
def test_bos_stands_in_front_where_transformers_puts_it(kind, flag, front, tmp_path):
    backend = byte_level()
    if front:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )
    backend.save(str(tmp_path / "tokenizer.json"))
    settings = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "tokenizer_class": kind, "add_bos_token": flag}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    ours, theirs = load_tokenizer(tmp_path, 1000), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("a cat", "", "<|im_start|>a"):
        assert ours.encode(text, add_special_tokens=True) == theirs(text).input_ids
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids
    assert ours.front == ((1,) if front else ())


@pytest.mark.parametrize(
    "kind", ["LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "PreTrainedTokenizerFast"]
)
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen3"])
def test_spaces_before_a_text_are_where_transformers_puts_them(kind, model_type, tmp_path):
    texts = ("ab a", "<s>ab", " ab", "a</s>b", "  a  b", "", "<s> ab", "a\nb", "é c", "</s></s>a", "<s>", "ab ")
    for legacy, space, prefix in itertools.product((None, False, True), (None, False, True), (True, False)):
        backend = sentencepiece(prefix).backend
        backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        backend.save(str(tmp_path / "tokenizer.json"))
        settings = {"tokenizer_class": kind, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        settings |= {"legacy": legacy, "add_prefix_space": space}
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps({k: v for k, v in settings.items() if v is not None})
        )
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        ours, theirs = load_tokenizer(tmp_path, 1000), transformers.AutoTokenizer.from_pretrained(tmp_path)
        for text in texts:
            ids = ours.encode(text)
            assert ids == theirs(text, add_special_tokens=False).input_ids, (settings, text)
            assert ours.encode(text, add_special_tokens=True) == theirs(text).input_ids
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), (settings, text)


ADDED = {"content": "<x>", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False, "special": True}


@pytest.mark.parametrize(
    "settings, beside",
    [
        ({"added_tokens_decoder": {"300": ADDED, "301": {**ADDED, "content": "<y>", "special": False}}}, {}),
        ({"added_tokens_decoder": {"1": {**ADDED, "content": "<|im_start|>", "special": False}}}, {}),
        (
            {"added_tokens_decoder": {"300": ADDED}, "pad_token": "<pad>", "additional_special_tokens": ["<y>", "<x>"]},
            {},
        ),
        ({"added_tokens_decoder": {"300": ADDED}}, {"added_tokens.json": {"<y>": 300}}),
        ({"additional_special_tokens": ["<x>"], "extra_special_tokens": ["<y>"]}, {}),
        ({"extra_special_tokens": {"image_token": "<x>", "other_token": "<y>"}, "audio_token": "<z>"}, {}),
        ({}, {"added_tokens.json": {"<x>": 301, "<y>": 300}}),
        ({"additional_special_tokens": ["<x>"]}, {"added_tokens.json": {"<x>": 300, "<y>": 301}}),
        ({}, {"special_tokens_map.json": {"additional_special_tokens": ["<x>"], "pad_token": "<pad>"}}),
    ],
)
def test_tokens_beside_a_tokenizer_json_get_transformers_ids(settings, beside, tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    for name, content in {"tokenizer_config.json": {**named, **settings}, **beside}.items():
        (tmp_path / name).write_text(json.dumps(content))
    ours, theirs = load_tokenizer(tmp_path, 1000), transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "a <x>b <y> c<z><pad> <|im_start|>"
    ids = ours.encode(text)
    assert ids == theirs(text, add_special_tokens=False).input_ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_settings_of_a_call_are_not_obeyed(tmp_path):
    text, backend = "once upon a time there was a cat. " * 40, byte_level()
    backend.enable_truncation(16, stride=2, direction="left")
    backend.enable_padding(length=900, pad_id=2, direction="left")
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    ours, theirs = load_tokenizer(tmp_path, 1000), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours.encode(text) == theirs(text).input_ids and len(ours.encode(text)) > 100
    ours.save(tmp_path / "again")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "again")(text).input_ids == ours.encode(text)


@pytest.mark.parametrize("where", ["tokenizer_config.json", "special_tokens_map.json"])
def test_tokens_that_only_the_settings_call_special_are(where, tmp_path):
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3, "s": 4, "<": 5, ">": 6, "/": 7}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.save(str(tmp_path / "tokenizer.json"))
    token = {"content": "</s>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    named = {"bos_token": "<s>", "eos_token": token if where == "special_tokens_map.json" else "</s>"}
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    settings = json.loads((tmp_path / where).read_text()) if (tmp_path / where).exists() else {}
    (tmp_path / where).write_text(json.dumps(settings | named))
    ours, theirs = load_tokenizer(tmp_path, 100), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("<s>a</s>", "a<s", "</s></s>"):
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids
    assert ours.end_id == theirs.eos_token_id == 1 and ours.continuation([0, 3, 1]) == "a"


# ------------------------------------------------------------------------------------------------------- vocabularies out of GGUF
CORPUS = [
    "Once upon a time, in 1984, there were 12345 apples; it isn't 3.14159, IT'S it? They'LL",
    "def f(x):\n    return x ** 2  # squared\n\n\tif __name__ == '__main__':\r\n        print(f(7))/*a*/\n\n\n",
    "naïve café Ωmega 你好，世界 — “quoted” e\u0301 текст ДОМ camelCase HTTPServer 123456789",
    "🙂👩‍👩‍👧 🇩🇪 emoji 🚀🚀 x",
    "a  two  spaces   three\n \n  5\n\n 6 \u00a0 more \t\t  ",
    "汉字 かな カナ 한국어 ٣٤ ½ ³ ९",
    "",
    "it's'll 's 'S",
]
SPACES = ["  two in front", " one", " ", "\n", "   \n  x  "]


def read(path):
    with open(path, "rb") as f:
        fields = _read_header(f)[0]
    return BPETokenizer.from_gguf(fields, path), transformers.AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name
    )


def apart(ours, theirs, texts):
    return [text for text in texts if ours.encode(text) != theirs.encode(text, add_special_tokens=False)]


def merged(pre, size=600):
    """The entries of a byte-level vocabulary that was trained on the corpus, cut as `pre` says."""
    parts = tokenizers.pre_tokenizers
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    cuts = [parts.Split(tokenizers.Regex(cut), "isolated") for cut in vocabularies.CUTS[pre]]
    backend.pre_tokenizer = parts.Sequence([*cuts, parts.ByteLevel(add_prefix_space=False, use_regex=False)])
    special = ["<s>", "</s>", "<｜end▁of▁sentence｜>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=parts.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator((CORPUS + SPACES) * 20, trainer)
    tokens = sorted(backend.get_vocab(), key=backend.get_vocab().get)
    merges = [" ".join(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    types = [3 if token in special else 1 for token in tokens]
    return {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types, "merges": merges, "bos_token_id": 0}


#: The ways of cutting that transformers takes from the file; all others it cuts as GPT-2, which is one of them.
THEIRS = "gpt-2 llama3 llama-bpe falcon3 pixtral lfm2 dbrx smaug-bpe tekken qwen2 deepseek-r1-qwen megrez qwen35 gpt-4o llama4 minimax-m2"


@pytest.mark.parametrize("pre", THEIRS.split())
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_a_byte_level_vocabulary_is_cut_as_its_name_says(pre, architecture, tmp_path, rng):
    llm_files.write_vocabulary(tmp_path / "m.gguf", architecture, **merged(pre), add_bos_token=bool(rng.random() < 0.5))
    ours, theirs = read(tmp_path / "m.gguf")
    texts = [*CORPUS, *SPACES, *(nonsense(rng, 60) for _ in range(100))]
    assert not apart(ours, theirs, texts)
    assert all(ours.encode(text, add_special_tokens=True) == theirs(text).input_ids for text in texts)
    assert all(ours.decode(ours.encode(text)) == ours.continuation(ours.encode(text)) == text for text in texts)


def test_every_name_that_transformers_knows_is_known():
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as splits

    assert splits.keys() < vocabularies.CUTS.keys() and len(splits) > 20
    assert all(len(vocabularies.CUTS[name]) == 1 for name in splits)
    same = {name: vocabularies.CUTS[name] == (split,) for name, split in splits.items()}
    assert all(same[name] for name in ("llama-bpe", "tekken", "qwen2", "gpt-4o")), "to the letter"


@pytest.mark.parametrize("pre", ["smollm", "falcon", "deepseek-coder", "default", "stablelm2"])
def test_where_transformers_does_not_know_the_name_it_cuts_as_gpt2(pre, tmp_path):
    """llama.cpp's expressions, checked against the piece boundaries that they were written for; transformers differs, as documented."""
    entries = merged(pre)
    llm_files.write_vocabulary(tmp_path / "m.gguf", **entries)
    ours, theirs = read(tmp_path / "m.gguf")
    assert apart(ours, theirs, CORPUS)
    llm_files.write_vocabulary(tmp_path / "m.gguf", **{**entries, "pre": "gpt-2"})
    as_gpt2, _ = read(tmp_path / "m.gguf")
    assert not apart(as_gpt2, theirs, CORPUS)
    pieces = [piece for piece, _ in ours.backend.pre_tokenizer.pre_tokenize_str("x, 1234 ab\n\n  c")]
    expected = {
        "smollm": ["x", ",", "Ġ", "1", "2", "3", "4", "Ġab", "ĊĊĠ", "Ġc"],
        "falcon": ["x", ",", "Ġ", "123", "4", "Ġab", "ĊĊĠ", "Ġc"],
        "deepseek-coder": ["x", ",", "Ġ", "1", "2", "3", "4", "Ġab", "Ċ", "Ċ", "Ġ", "Ġc"],
        "default": ["x", ",", "Ġ", "123", "4", "Ġab", "ĊĊĠ", "Ġc"],
        "stablelm2": ["x", ",", "Ġ", "1", "2", "3", "4", "Ġab", "ĊĊ", "Ġ", "Ġc"],
    }
    assert pieces == expected[pre]


def test_llama_3s_vocabulary_is_looked_up_whole_and_gets_its_bos(tmp_path):
    """A documented difference: llama.cpp and Llama 3's own tokenizer.json do both; transformers' GGUF reader does neither."""
    entries = merged("llama-bpe")
    entries["tokens"], entries["token_type"] = [*entries["tokens"], "zebra"], [*entries["token_type"], 1]
    llm_files.write_vocabulary(tmp_path / "m.gguf", **entries)
    ours, theirs = read(tmp_path / "m.gguf")
    assert ours.encode("zebra") == [len(entries["tokens"]) - 1] and len(theirs.encode("zebra")) > 1
    assert ours.front == (0,) and theirs("a").input_ids[0] != 0
    llm_files.write_vocabulary(tmp_path / "m.gguf", **{**entries, "pre": "qwen2"})
    other, _ = read(tmp_path / "m.gguf")
    assert len(other.encode("zebra")) > 1 and other.front == ()


def test_control_tokens_in_other_letters_are_kept(tmp_path):
    llm_files.write_vocabulary(tmp_path / "m.gguf", **merged("llama-bpe"))
    ours, theirs = read(tmp_path / "m.gguf")
    assert ours.encode("a<｜end▁of▁sentence｜>")[-1] == 2 and len(theirs.encode("a<｜end▁of▁sentence｜>")) > 3


def pieces_of(model):
    """(tokens, scores, types) of a sentencepiece model, as llama.cpp's converter writes them."""
    n = model.get_piece_size()

    def kind(i):
        tests = {2: model.is_unknown, 3: model.is_control, 6: model.is_byte, 5: model.is_unused}
        return next((code for code, test in tests.items() if test(i)), 1)

    return {
        "tokens": [model.id_to_piece(i) for i in range(n)],
        "scores": [float(model.get_score(i)) for i in range(n)],
        "token_type": [kind(i) for i in range(n)],
    }


def sentencepiece_model(**options):
    sp = pytest.importorskip("sentencepiece")
    out = io.BytesIO()
    sp.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in CORPUS * 20 for line in text.split("\n") if line]),
        model_writer=out,
        model_type="bpe",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
        **{"vocab_size": 560, "byte_fallback": True, "split_digits": True, "character_coverage": 0.99, **options},
    )
    return sp.SentencePieceProcessor(model_proto=out.getvalue())


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_vocabulary_gives_sentencepieces_ids(prefix, tmp_path, rng):
    model = sentencepiece_model(add_dummy_prefix=prefix)
    known = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "add_space_prefix": prefix, "pre": "default"}
    llm_files.write_vocabulary(tmp_path / "m.gguf", model="llama", **pieces_of(model), **known)
    ours, theirs = read(tmp_path / "m.gguf")
    texts = [*CORPUS, *SPACES, *(nonsense(rng, 60) for _ in range(200))]
    assert all(ours.encode(text) == model.encode(text) for text in texts)
    assert all(ours.decode(ours.encode(text)) == text for text in texts)
    assert all(ours.continuation(ours.encode(text)) == (" " * prefix + text if text else "") for text in texts)
    # Documented: transformers' reader puts a space before every text, and none before one that begins with a space.
    assert apart(ours, theirs, ["a", "  a"]) == (["  a"] if prefix else ["a"])
    assert not prefix or not [text for text in apart(ours, theirs, texts) if not text.startswith(" ")]
    assert ours.front == (1,) and theirs("a").input_ids[0] == 1
    ours.save(tmp_path / "folder")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert all(again(text).input_ids == [1, *model.encode(text)] for text in texts)


def test_a_sentencepiece_vocabulary_without_bytes_has_an_unknown_token(tmp_path):
    model = sentencepiece_model(byte_fallback=False, vocab_size=300)
    llm_files.write_vocabulary(tmp_path / "m.gguf", model="llama", **pieces_of(model), unknown_token_id=0)
    ours, _ = read(tmp_path / "m.gguf")
    for text in ("a 犬猫 b", "犬x"):
        assert ours.encode(text) == model.encode(text) and 0 in ours.encode(text)


def test_an_answer_stands_behind_its_prompt_without_a_space_of_its_own(tmp_path):
    from tinylora.training.corpus import question_and_answer

    model = sentencepiece_model()
    llm_files.write_vocabulary(tmp_path / "m.gguf", model="llama", **pieces_of(model), bos_token_id=1, eos_token_id=2)
    t, _ = read(tmp_path / "m.gguf")
    prompt, answer = "Once upon a", " time, in\n1984"
    ((read_first, learned),) = question_and_answer([(prompt, answer)], t).pairs
    assert read_first == [1, *model.encode(prompt)] and learned[-1] == 2
    assert t.decode([*read_first, *learned]) == prompt + answer and t.continuation(learned) == answer
    assert np.array_equal([*read_first[1:], *learned[:-1]], model.encode(prompt + answer))
