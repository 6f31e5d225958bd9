"""Files of training data: how they are told apart, what their records mean, and what is said of bad ones."""

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny

from tinylora.models.tokenizers import ByteTokenizer
from tinylora.training import corpus, datafiles, jsonstream
from tinylora.training.corpus import Pairs, Text, documents, question_and_answer, read_corpus
from tinylora.training.pretrain import pretrain
from tinylora.training.train import Recipe, bits_per_byte, fit

BYTES = ByteTokenizer()
PAIRS = [{"prompt": f"q{i}", "answer": f"a{i}"} for i in range(20)]
TALK = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello."}]}


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8"))
    return path


def lines(rows, end="\n"):
    return end.join(map(json.dumps, rows)) + end


def records(path, data):
    return datafiles.read_records(write(path, data), datafiles.read_text(path))


# ---------------------------------------------------------------------------------------------------------- told apart by content
@pytest.mark.parametrize(
    "name, data",
    [
        ("a.jsonl", lines(PAIRS)),
        ("a.JSONL", lines(PAIRS)),
        ("a.ndjson", lines(PAIRS)),
        ("a.jsonl", "\n\n" + lines(PAIRS, "\r\n \r\n")),
        ("a.jsonl", b"\xef\xbb\xbf" + lines(PAIRS).encode()),
        ("a.jsonl", b"\xef\xbb\xbf\xef\xbb\xbf" + lines(PAIRS).encode()),
        ("a.txt", b" \r\n\xef\xbb\xbf\n\xef\xbb\xbf " + lines(PAIRS).encode()),
        ("a.jsonl", json.dumps(PAIRS, indent=1)),
        ("a.json", json.dumps(PAIRS)),
        ("a.Json", b"\xef\xbb\xbf" + json.dumps(PAIRS, indent=2).encode()),
        ("a.json", json.dumps({"version": 1, "data": PAIRS})),
        ("a.json", lines(PAIRS)),
        ("a.txt", lines(PAIRS)),
        ("a.txt", "\n " + json.dumps(PAIRS)),
        ("a.txt", json.dumps({"data": PAIRS})),
        ("a", lines([{"id": 1, "meta": {"x": 1}, **row} for row in PAIRS])),
    ],
)
def test_records_are_records_whatever_the_file_is_called(name, data, tmp_path):
    train, heldout = read_corpus(write(tmp_path / name, data), BYTES)
    assert isinstance(train, Pairs) and len(train.pairs) == 18 and len(heldout.pairs) == 2
    assert train.pairs[3] == (list(b"q3"), list(b"a3"))


@pytest.mark.parametrize(
    "name, data",
    [
        ("a.txt", "Once upon a time {there was} a [cat].\n" * 9),
        ("a.txt", "[1] [2] and more\n" * 9),
        ("a.txt", "[1]\n[2]\nand more\n" * 9),
        ("a.txt", '{"a": 1} is an object and this is a text.\n' * 9),
        ("a.txt", "{}\n[x]\n" * 9),
        ("a.txt", "[]\n[]\n" * 9),
        ("a.txt", "{'a': 1}\n{'a': 2}\n" * 9),
        ("a.py", '{\n  "a": 1, 2: 3}\n' * 9),
        ("a.md", "[link](x) and more text\n" * 9),
        ("a.txt", "é\u2028é\r\nü" * 20),
    ],
)
def test_running_text_stays_running_text(name, data, tmp_path):
    train, heldout = read_corpus(write(tmp_path / name, data), BYTES)
    assert isinstance(train, Text) and bytes([*train.sources[0], *heldout.sources[0]]) == data.encode("utf-8")


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    train, _ = read_corpus(write(tmp_path / "a.txt", b"\xef\xbb\xbf" + b"abcdefghij" * 9), BYTES)
    assert bytes(train.sources[0][:3].tolist()) == b"abc"


@pytest.mark.parametrize(
    "encoding, words",
    [
        ("utf-16-le", r"a.txt is UTF-16 \(little-endian\) text, expected UTF-8"),
        ("utf-16-be", r"UTF-16 \(big-endian\)"),
        ("utf-32-le", r"UTF-32 \(little-endian\)"),
        ("utf-32-be", r"UTF-32 \(big-endian\)"),
    ],
)
@pytest.mark.parametrize("marked", [True, False])
def test_another_encoding_is_named(encoding, words, marked, tmp_path):
    path = write(tmp_path / "a.txt", ("\ufeff" * marked + "plain text in another encoding\n" * 5).encode(encoding))
    with pytest.raises(ValueError, match=words if marked else "full of zero bytes, as UTF-16 and UTF-32 are"):
        read_corpus(path, BYTES)


# ----------------------------------------------------------------------------------------------------------------- what they mean
def test_each_form_means_what_it_means_elsewhere(tmp_path):
    def one(entry):
        (record,) = records(tmp_path / "a.jsonl", json.dumps(entry))
        return record

    asked, said = TALK["messages"]
    assert one(TALK).messages == TALK["messages"] and one(TALK).where == f"{tmp_path / 'a.jsonl'} line 1"
    shared = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "Hello."}]}
    assert one(shared).messages == one({"conversations": TALK["messages"]}).messages == TALK["messages"]
    for user, model in (("User", "Assistant"), ("human", "model"), ("HUMAN", "GPT")):
        said_by = {"role": user, "content": "hi"}, {"role": model, "content": "Hello."}
        assert one({"messages": said_by}).messages == TALK["messages"]
        said_by = {"from": user, "value": "hi"}, {"from": model, "value": "Hello."}
        assert one({"conversations": said_by}).messages == TALK["messages"]
    tool = [asked, {"role": "tool", "content": "rain"}, said]
    assert one({"messages": tool}).messages == tool
    assert one({**shared, "system": "S"}).messages == [{"role": "system", "content": "S"}, asked, said]
    for row in (
        {"prompt": [asked], "completion": [said]},
        {"prompt": "hi", "completion": [said]},
        {"prompt": [asked], "completion": "Hello."},
    ):
        assert (one(row).messages, one(row).first) == ([asked, said], 1)
    assert [getattr(one({"prompt": "p", "completion": "c"}), x) for x in ("prompt", "answer")] == ["p", "c"]
    assert [getattr(one({"prompt": "p", "answer": "a", "id": 3}), x) for x in ("prompt", "answer")] == ["p", "a"]
    assert one({"text": "a\u2028b"}).text == "a\u2028b"
    assert (
        one({**TALK, "tools": '[{"type": "function"}]'}).tools == one({**TALK, "tools": [{"type": "function"}]}).tools
    )


def test_alpacas_form_has_its_own_prompt_for_models_without_turns(tmp_path):
    rows = [
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        {"instruction": "Say hi.", "output": "hi", "text": "x"},
    ]
    first, second = records(tmp_path / "a.jsonl", lines(rows))
    assert first.prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that "
        "appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n"
    )
    assert second.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay hi.\n\n### Response:\n"
    )
    assert [first.question, second.question] == ["Add.\n\n1, 2", "Say hi."] and [first.answer, second.answer] == [
        "3",
        "hi",
    ]


def test_documents_are_apart(tmp_path):
    train, heldout = read_corpus(write(tmp_path / "a.jsonl", lines([{"text": f"doc {i}"} for i in range(10)])), BYTES)
    assert (
        bytes(train.sources[0].tolist()) == b"\n\n".join(b"doc %d" % i for i in range(9))
        and bytes(heldout.sources[0].tolist()) == b"doc 9"
    )

    class Marked(ByteTokenizer):
        front, eos_id = (1,), 2

    text = documents(["ab", "c"], Marked())
    assert text.sources[0].tolist() == [1, 97, 98, 2, 1, 99, 2]
    _, targets, mask = text.windows(6)
    assert targets[0].tolist() == [97, 98, 2, 1, 99, 2] and mask[0].tolist() == [1, 1, 1, 0, 1, 1], "BOS is given"
    _, targets, mask = text.batch(np.random.default_rng(0), 30, 3)
    assert ((targets == 1) == (mask == 0)).all() and (mask == 0).any()
    assert corpus.running_text(b"ab", Marked()).sources[0].tolist() == [1, 97, 98]


@pytest.mark.parametrize(
    "data, words",
    [
        (lines(PAIRS[:2]) + "{}\n", r"line 3: expected a JSON object with \"messages\", or .*; found keys $"),
        (lines(PAIRS[:2]) + "3\n", "line 3: expected a JSON object .* found a int"),
        ('\r\n{"prompt": "a", "answer": "b"}\r\n\r\n{"prompt": \r\n', r"line 4: .*no JSON \(Expecting value"),
        ('{"text": "a\u2028b\u0085c"}\n{"text": 3}\n', 'line 2: "text" is a int, expected a text'),
        (
            lines([*PAIRS[:2], TALK]),
            r'line 3 is of the form "messages", and .* line 1 of "prompt" and "answer"; expected one',
        ),
        (lines([PAIRS[0], {"prompt": "a", "completion": "b"}]), 'line 2 is of the form "prompt" and "completion"'),
        ('{"prompt": "a", "answer": "\\ud800"}\n', r"line 1: it holds '\\ud800', half of a surrogate pair"),
        ('{"text": "ok"}\n{"text": "x \\udc00 y"}\n', "line 2: it holds .*half of a surrogate pair"),
        ('{"prompt": "a", "answer": null}\n', 'line 1: expected a JSON object with the texts "prompt" and "answer"'),
        (
            '{"prompt": "a", "completion": 3}\n',
            'line 1: expected a JSON object with the texts "prompt" and "completion"',
        ),
        ('{"instruction": "a", "output": 3}\n', 'line 1: "output" is a int, expected a text'),
        ('{"messages": "hi"}\n', "line 1: expected a list of messages"),
        ('{"messages": []}\n', "line 1: expected a list of messages"),
        ('{"messages": [{"role": "user"}]}\n', 'message 1 is no object with the texts "role" and "content"'),
        ('{"messages": [{"role": 3, "content": "a"}]}\n', "message 1 is no object"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', "line 1: the assistant says nothing"),
        (
            '{"prompt": [{"role": "assistant", "content": "a"}], "completion": [{"role": "user", "content": "a"}]}\n',
            "says nothing",
        ),
        ('{"conversations": [{"from": "cat", "value": "a"}]}\n', "turn 1 is from 'cat', expected one of system, human"),
        ('{"conversations": [{"from": "human"}]}\n', "turn 1 is no object"),
        ('{"messages": [{"role": "bot", "content": "a"}]}\n', r"says nothing; .* \(the roles are 'bot'\)"),
        (
            '{"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}',
            '"weight" of message 1 is 0.5, expected 0',
        ),
        (
            '{"messages": [{"role": "user", "content": "a", "train": true}, {"role": "assistant", "content": "a"}]}',
            "user says",
        ),
        (
            '{"conversations": [{"from": "gpt", "value": "a", "train_detail": [{"train": false}]}]}',
            'message 1 has "train_d',
        ),
        ('{"conversations": []}\n', "expected a list of messages"),
        ('{"text": ' + "[" * 100_000 + "\n", "line 1: .*cannot be read"),
        (json.dumps({**TALK, "tools": "x"}) + "\n", 'line 1, "tools": .*no JSON'),
        (json.dumps({**TALK, "tools": 3}) + "\n", 'line 1: "tools" is a int, expected a list'),
    ],
)
def test_a_bad_record_is_named_by_its_line(data, words, tmp_path):
    with pytest.raises(ValueError, match=words) as caught:
        records(tmp_path / "a.jsonl", data)
    assert str(tmp_path / "a.jsonl") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, data, words",
    [
        ("a.json", '[{"prompt": "a",\n "answer": }]', "a.json line 2: .*no JSON"),
        ("a.json", '[{"prompt": "a", "answer": "b"}, {"prompt": 3, "answer": "b"}]', "a.json entry 2: expected"),
        ("a.json", '{"a": [1], "b": [2]}', "it has 2 arrays"),
        ("a.json", '{"a": 1}', "it has 0 arrays"),
        ("a.json", "[]", "holds 0 records; too few"),
        ("a.json", json.dumps(PAIRS[0]), "holds 1 records; too few"),
        ("a.json", "3", "entry 1: expected a JSON object"),
        ("a.json", lines(PAIRS) + "x", "line 21: .*no JSON"),
        ("a.txt", lines(PAIRS) + "and a text", "line 21: .*no JSON"),
        ("a.txt", '[{"prompt": "a", "answer": "b"},\n{"prompt": "a" "answer": "b"}]', "line 2: .*no JSON"),
        ("a.txt", '{"prompt": "a", "answer": "b" "c"}\n' * 20, "line 1: .*no JSON"),
        (
            "a.csv",
            "prompt,answer\na,b\n",
            "a.csv is a table; write its rows as JSON lines.* name it .txt if it is running",
        ),
        ("a.Csv", "a,b,c\n1,2,3\n" * 9, "a.Csv is a table"),
        ("a.tsv", "Once upon a time\n" * 9, "a.tsv is a table"),
        (
            "a.txt",
            '{"name": "package", "version": "1.0"}\n' * 9,
            "a.txt line 1: expected .* found keys 'name', 'version'",
        ),
        ("a.bak", '{"question": "a"},\n{"question": "b"}\n', "a.bak line 1: .*a comma follows the object"),
        ("a", '{"question": "a", "reply": "b"}', "it has 0 arrays, and the keys 'question', 'reply'"),
        ("a.txt", json.dumps([{"q": "a"}] * 9, indent=1), "a.txt entry 1: .* found keys 'q'"),
        ("a.txt", json.dumps({"rows": [{"q": "a"}] * 9}), "a.txt entry 1: .* found keys 'q'"),
        ("a.txt", '["a", "b"]\n["c", "d"]\n', "line 2.*no JSON"),
        (
            "a.jsonl",
            ",\n".join(map(json.dumps, PAIRS)),
            "line 1: .*a comma follows the object; write one object a line",
        ),
        ("a.jsonl", lines(PAIRS, "\r"), r"line 1: .*lines end with a carriage return alone; convert the line ends to"),
        ("a.txt", lines(PAIRS, "\r"), "carriage return alone"),
        ("a.TSV", '"instruction"\t"output"\na\tb\n', "a.TSV is a table"),
        ("a.txt", b"ab\ncd\xff\n", r"is not UTF-8 text \(byte 5 is 0xff, in line 2\)"),
        ("a.jsonl", b"\xff\xfe{\x00}\x00", "UTF-16"),
        ("a.jsonl", json.dumps(TALK), "too few"),
        ("a.jsonl", lines([TALK] * 9), "line 1 is a conversation, and the model knows no turns"),
    ],
)
def test_a_bad_file_gets_a_sentence(name, data, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        read_corpus(write(tmp_path / name, data), BYTES)


def test_pretrain_refuses_records(tmp_path):
    path = write(tmp_path / "a.txt", lines(PAIRS))
    with pytest.raises(ValueError, match=r"a\.txt holds records; pretrain reads running text"):
        pretrain([path], tmp_path / "out", progress=False)


def test_a_text_with_half_a_surrogate_pair_is_refused_before_it_is_encoded():
    with pytest.raises(ValueError, match=r"the text holds '\\ud83d' at character 2: half of a surrogate pair"):
        BYTES.encode("ab\ud83d")
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        next(tiny.model().stream("\udc00"))


# ------------------------------------------------------------------------------------------------------------- conversations
def test_every_answer_of_a_conversation_is_learned_and_nothing_else(tmp_path):
    talk = [
        {"role": r, "content": c}
        for r, c in (("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "de"))
    ]
    train, _ = read_corpus(write(tmp_path / "a.jsonl", lines([{"messages": talk}] * 10)), tiny.Turns())
    assert train.pairs[0] == (list(b"\x04s\x02\x01a\x02"), list(b"b\x03"), list(b"\x01c\x02"), list(b"de\x03"))
    assert train.tokens == 9 * 5
    _, targets, mask = train.windows(20)
    assert bytes(targets[0][mask[0] == 1].tolist()) == b"b\x03de\x03"
    half = [{"prompt": talk[:3], "completion": talk[3:]}] * 10
    train, _ = read_corpus(write(tmp_path / "b.jsonl", lines(half)), tiny.Turns())
    assert train.pairs[0] == (list(b"\x04s\x02\x01a\x02b\x03\x01c\x02"), list(b"de\x03"))
    train, _ = read_corpus(
        write(tmp_path / "c.jsonl", lines([{"instruction": "a", "input": "", "output": "b"}] * 10)), tiny.Turns()
    )
    assert train.pairs[0] == (list(b"\x01a\x02"), list(b"b\x03"))


def test_what_a_template_refuses_is_named_by_its_line(tmp_path):
    wrong = {"messages": [{"role": "assistant", "content": "b"}]}
    with pytest.raises(ValueError, match=r"a\.jsonl line 2: chat: the user begins"):
        read_corpus(write(tmp_path / "a.jsonl", lines([TALK, wrong, *[TALK] * 9])), tiny.Turns())


def test_an_answer_ends_with_the_token_that_ends_one():
    class Ended(ByteTokenizer):
        front, end_id = (1,), 2

    assert question_and_answer([("a", "b")], Ended()).pairs == [([1, 97], [98, 2])]


# ------------------------------------------------------------------------------------------------ pairs beyond the sequences
def said(call):
    """What `call` warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if w.category is UserWarning]


def test_pairs_without_an_answer_within_the_sequences_are_not_drawn_and_it_is_said():
    rows = [("x" * 200, "answer")] * 9 + [("q", "a" * 50), ("q", "a")]
    data, rng = question_and_answer(rows, BYTES), np.random.default_rng(0)
    (words,) = said(lambda: [data.batch(rng, 8, 32) for _ in range(5)])
    assert words == (
        "pairs: 9 of 11 answers begin beyond sequences of 32 tokens (--seq-len) and are not learned; "
        "1 of 11 answers end beyond sequences of 32 tokens (--seq-len) and are cut"
    )
    for _ in range(20):
        _, _, mask = data.batch(rng, 3, 32)
        assert (mask.sum(axis=1) > 0).all()
    assert said(lambda: data.batch(rng, 8, 300)) == []
    (words,) = said(lambda: bits_per_byte(tiny.model(), data, 32))
    assert "9 of 11 answers begin beyond sequences of 32 tokens (--seq-len) and are not scored; 1 of 11" in words


def test_no_step_shows_a_loss_of_zero():
    data = question_and_answer([("x" * 200, "answer")] * 9 + [("q", "a")], BYTES)
    result = []
    recipe = Recipe(steps=6, batch_size=1, seq_len=32, shards=1)
    assert len(said(lambda: result.append(fit(tiny.model(), data, recipe, progress=False)))) == 1
    assert all(row["loss"] > 0 for row in result[0].history)


def test_without_such_pairs_nothing_is_said_and_the_draws_are_what_they_were():
    pairs = [(list(b"ab") * (i + 1), list(b"cd")) for i in range(7)]
    data, length = Pairs(pairs), 20
    assert said(lambda: data.batch(np.random.default_rng(5), 9, length)) == []
    inputs, _, mask = data.batch(np.random.default_rng(5), 9, length)
    for row, keep, i in zip(inputs, mask, np.random.default_rng(5).integers(7, size=9), strict=True):
        whole = [*pairs[i][0], *pairs[i][1]]
        assert row[: len(whole)].tolist() == whole[: len(row)] and keep.sum() == 2
    edge = Pairs([(list(b"a" * 20), list(b"bc"))])  # the first token of the answer is the last target
    with pytest.warns(UserWarning, match="1 of 1 answers end beyond sequences of 20 tokens"):
        assert edge.batch(np.random.default_rng(0), 1, 20)[2].sum() == 1
    for lost in ([([], [1])], [([1], [])]):
        (words,) = said(lambda lost=lost: Pairs([*lost, ([1], [2])]).windows(4))
        assert words == "pairs: 1 of 2 answers are empty and are not scored"
    (words,) = said(lambda: Pairs([([1], []), ([1] * 9, [2]), ([1], [2])]).windows(4))
    assert "1 of 3 answers are empty and are not scored; 1 of 3 answers begin beyond" in words


def test_it_is_said_in_which_part_no_answer_is_learned(tmp_path):
    short, long = {"prompt": "q", "answer": "a"}, {"prompt": "q" * 99, "answer": "a"}
    for rows, part in (([long] * 9 + [short], "training"), ([short] * 9 + [long], "held-out")):
        train, heldout = read_corpus(write(tmp_path / "a.jsonl", lines(rows)), BYTES)
        with pytest.raises(ValueError, match=f"^pairs of the {part} part of .*a.jsonl: no answer begins within"):
            (train.examples if part == "training" else heldout.windows)(20)
    empty = [{"prompt": "q", "answer": ""}]
    with pytest.raises(ValueError, match=r"pairs of the held-out part of .*every answer is empty"):
        read_corpus(write(tmp_path / "b.jsonl", lines([short] * 9 + empty)), BYTES)


@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}, {"loss": False}, {"weight": 0.0}])
def test_an_answer_may_be_read_and_not_learned(flag, tmp_path):
    talk = [
        {"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    first, last = [{**m, **flag} if i == 1 else m for i, m in enumerate(talk)], [*talk[:3], {**talk[3], **flag}]
    shared = [{"from": m["role"], "value": m["content"], **{k: m[k] for k in flag if k in m}} for m in first]
    for row in ({"messages": first}, {"conversations": shared}):
        train, _ = read_corpus(write(tmp_path / "a.jsonl", lines([row] * 10)), tiny.Turns())
        assert train.pairs[0] == (list(b"\x01a\x02b\x03\x01c\x02"), list(b"d\x03"))
    kept = {next(iter(flag)): 1}
    rows = [{"messages": [{**m, **kept} for m in last]}, {"messages": [*last[:3], {**last[3], **flag}]}]
    train, _ = read_corpus(write(tmp_path / "b.jsonl", lines([rows[1]] * 10)), tiny.Turns())
    assert train.pairs[0] == (list(b"\x01a\x02"), list(b"b\x03"))
    train, _ = read_corpus(write(tmp_path / "c.jsonl", lines([rows[0]] * 10)), tiny.Turns())
    assert train.pairs[0][3] == list(b"d\x03")
    neither = {"messages": [{**m, **flag} for m in talk]}
    train, _ = read_corpus(write(tmp_path / "d.jsonl", lines([rows[0], *[neither] * 8, rows[0]])), tiny.Turns())
    assert len(train.pairs) == 1


# ------------------------------------------------------------------------------------------------------ long and hostile files
@pytest.mark.parametrize(
    "name, data, words",
    [
        ("a.jsonl", b'{"text": "' + b"a" * (17 << 20) + b'"}\n', r"a\.jsonl line 1: a record of more than 16,777,216 bytes"),
        ("a.json", b'[{"text": "b"},\n{"text": "' + b"a" * (17 << 20) + b'"}]', r"a\.json line 2: a record of more than"),
        ("a.jsonl", b'{"text": "a"}\n' + b"\n" * 5_000_000 + b"[", "line 5000002: .*no JSON"),
        ("a.jsonl", b'{"text": "a"}\n' + b" \n" * 2_000_000 + b"[", "line 2000002: .*no JSON"),
        ("a.jsonl", b"\n" * 5_000_000, "is empty"),
        ("a.json", b'[{"text": "a"},\n{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}]", "line 2: .*cannot be read"),
        ("a.json", b'{"a":' * 100_000, "line 1: .*cannot be read"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "a", "n": ' + b"9" * 10_000 + b"}", "line 2: .*cannot be read"),
        ("a.json", b'[{"text": "a"},\n{"text": "a", "n": ' + b"9" * 10_000 + b"}]", "line 2: .*cannot be read"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "a\0"}', r"line 2: .*no JSON \(Invalid control character"),
        ("a.txt", b"abc\n" * 300_000 + b"\xff" + b"abc\n" * 9, r"byte 1200000 is 0xff, in line 300001"),
        ("a.txt", b"abc\n" * 300_000 + "é".encode()[:1], r"byte 1200000 is 0xc3, in line 300001"),
        ("a.jsonl", json.dumps({"\n" * 10_000: 1, **{f"k{i}": 1 for i in range(1000)}}), "line 1: .*and 981 more$"),
    ],
)  # fmt: skip
def test_what_is_too_long_too_deep_or_torn_is_one_short_sentence(name, data, words, tmp_path):
    with pytest.raises(ValueError, match=words) as caught:
        read_corpus(write(tmp_path / name, data), BYTES)
    assert len(str(caught.value)) < 3000 and "\n" not in str(caught.value)


@pytest.mark.parametrize("depth", range(300, 1000, 50))
def test_a_record_of_any_depth_is_read_or_refused(depth, tmp_path):
    deep = '{"text": "ab", "more": ' + "[" * depth + "]" * depth + "}\n"
    path = write(tmp_path / "a.jsonl", '{"text": "ab"}\n' + deep)
    try:
        train, _ = read_corpus(path, BYTES)
        assert bytes(train.sources[0]) == b"ab"
    except ValueError as error:
        assert f"{path} line 2: " in str(error) and "cannot be read" in str(error)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes in folders")
def test_what_is_no_file_is_said_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(ValueError, match=f"{path} is .*; expected a file"):
            read_corpus(path, BYTES)


def test_records_are_the_same_however_the_file_is_decoded(tmp_path, rng, monkeypatch):
    """Windows of a few bytes: numbers, words, escapes and characters are torn everywhere."""
    signs = ["a", "é", "日", "😀", '"', "\\", "\n", "{", "[", ",", " "]

    def word():
        return "".join(rng.choice(signs, rng.integers(9)))

    def entry():
        more = [1, 2.5, -3e-5, True, None, [], {}, word(), [word()], {word(): 1.25}]
        return {"x": more[rng.integers(len(more))], "prompt": word(), "answer": word()}

    for i in range(60):
        rows = [entry() for _ in range(rng.integers(1, 6))]
        plain = {"v": 2.5, "data": rows, "w": word()} if i % 3 == 0 else rows
        path = tmp_path / "a.json"
        path.write_text(json.dumps(plain, ensure_ascii=i % 2 == 0, indent=i % 4 or None), encoding="utf-8")
        monkeypatch.setattr(jsonstream, "_PIECE", int(rng.integers(4, 40)))
        found = datafiles.read_records(path, datafiles.read_text(path))
        for _ in range(2):  # they can be gone through again
            assert [(r.prompt, r.answer) for r in found] == [(row["prompt"], row["answer"]) for row in rows]
        assert len(found) == len(rows)


def test_mistakes_are_where_json_says_they_are(tmp_path, rng, monkeypatch):
    text = json.dumps({"a": [{"text": "é日"}, {"text": 'a"b'}], "b": 2.5}, ensure_ascii=False, indent=1)
    for i in range(1, len(text) - 1):
        broken = text[:i] + text[i + 1 :]
        try:
            json.loads(broken)
            continue
        except json.JSONDecodeError as error:
            place = f"a.json line {error.lineno}: .*{re.escape(error.msg)}, column {error.colno}"
        monkeypatch.setattr(jsonstream, "_PIECE", int(rng.integers(4, 40)))
        path = write(tmp_path / "a.json", broken)
        with pytest.raises(ValueError, match=place):
            datafiles.read_records(path, datafiles.read_text(path))


# ---------------------------------------------------------------------------------------------------------------------- memory
PEAK = """
import sys
import tiny
from tinylora.models.tokenizers import ByteTokenizer
from tinylora.training import corpus, finetune, train

def peak():
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

path, turns = sys.argv[1], sys.argv[2] == "turns"
small = corpus.Text([list(range(100))])
model, recipe = tiny.model(), train.Recipe(steps=1, batch_size=2, seq_len=16)
train.fit(model, small, recipe, heldout=small, eval_every=1, progress=False)
base = peak()
job = finetune.Job(text=path)
finetune.inputs(job)
data, heldout = corpus.read_corpus(path, tiny.Turns() if turns else ByteTokenizer())
train.fit(model, data, recipe, heldout=heldout, eval_every=1, heldout_limit=8, progress=False)
train.bits_per_byte(model, heldout, 16, limit=8)
print(peak() - base)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak of a process, as Linux tells it")
@pytest.mark.parametrize("kind", ["text", "texts", "pairs", "array", "turns"])
def test_a_corpus_takes_at_most_three_times_its_file(kind, tmp_path):
    words = "Once upon a time there was a naïve miller 😀 who had three sons, a mill, a donkey and a cat. "
    row = {
        "text": words,
        "texts": {"text": words * 3},
        "pairs": {"prompt": "Who was there?", "answer": words},
        "array": {"prompt": "Who was there?", "answer": words},
        "turns": {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": words}]},
    }[kind]
    line = (words if kind == "text" else json.dumps(row, ensure_ascii=False)).encode()
    n = 30_000_000 if kind == "text" else 6_000_000
    path = tmp_path / f"a.{'txt' if kind == 'text' else 'json' if kind == 'array' else 'jsonl'}"
    comma = b",\n" if kind == "array" else b"\n"
    lines = comma.join([line] * (n // len(line)))
    path.write_bytes(b"[" + lines + b"]" if kind == "array" else lines)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run([sys.executable, "-c", PEAK, path, kind], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    size = path.stat().st_size
    assert int(done.stdout) < 3 * size + (8 << 20), "the second for what does not grow with the file"
