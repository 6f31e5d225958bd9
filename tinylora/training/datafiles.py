"""Files of training data: running text, or records in the JSON forms that are in use.

    {"messages": [{"role": "user", "content": ...}, ...]}             a conversation, perhaps with "tools" beside it
    {"conversations": [{"from": "human", "value": ...}, ...]}         the same in ShareGPT's words, perhaps with "system"
    {"prompt": ..., "completion": ...}                                two texts, or two lists of messages
    {"prompt": ..., "answer": ...}                                    two texts; where a model has turns, one of each speaker
    {"instruction": ..., "input": ..., "output": ...}                 Alpaca's; the input may be missing or empty
    {"text": ...}                                                     a document

A message with "weight": 0 (OpenAI), "train": false (axolotl) or "loss": false is read and not learned.
A file has one form throughout; other keys are ignored. It holds one record a line (.jsonl, .ndjson), or an array, alone or under
one key (.json). A file of another name is running text, unless it is JSON or begins as records do: what is learned hangs on what
a file holds, and the braces of JSON are never trained on unsaid. Tables (.csv, .tsv) are refused.
"""

import codecs
import contextlib
import itertools
import json
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..models import files
from ..models.fields import shown
from .jsonstream import LONGEST, Array, NoJSON, Stream, TooLong, border, pieces

_FORMS = (
    ("messages",),
    ("conversations",),
    ("prompt", "completion"),
    ("prompt", "answer"),
    ("instruction", "output"),
    ("text",),
)
_FLAGS = ("weight", "train", "loss")  # of a message: whether it is learned
_LINES, _ARRAY, _TABLES = (".jsonl", ".ndjson"), (".json",), (".csv", ".tsv")
_RECORDS = re.compile(rf'\s*(\[\s*)?{{[^{{]{{0,2000}}?"({"|".join(sorted({f[0] for f in _FORMS}))})"\s*:')
_MARKS = {  # the longer ones first: UTF-32's begins as UTF-16's
    codecs.BOM_UTF32_LE: "UTF-32 (little-endian)",
    codecs.BOM_UTF32_BE: "UTF-32 (big-endian)",
    codecs.BOM_UTF16_LE: "UTF-16 (little-endian)",
    codecs.BOM_UTF16_BE: "UTF-16 (big-endian)",
}
_BEGIN = re.compile(rb"(\s*%b)+" % codecs.BOM_UTF8)
_FILLED = re.compile(rb"\S[^\n]*")  # what a line holds behind its ASCII white space
_SPEAKERS = {  # in any letter case
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "assistant", "model"), "assistant"),
}


@dataclass(frozen=True)
class Record:
    """One entry of a data file.

    where       the file and the line, for sentences about it
    messages    of a conversation, [{"role", "content"}, ...], or None; answers from message `first` on are learned, but not those
                whose places are in `unlearned`, and a template may be given `tools`
    prompt      of a pair, or None; `answer` belongs to it. An Alpaca record has its `question` too, for models with turns
    text        of a document, or None
    """

    where: str
    messages: list | None = None
    first: int = 0
    unlearned: tuple = ()
    tools: list | None = None
    prompt: str | None = None
    answer: str | None = None
    question: str | None = None
    text: str | None = None


# ---------------------------------------------------------------------------------------------------------------------- bytes
def read_text(path):
    """The bytes of a UTF-8 text file without a byte-order mark; a sentence if it is missing, empty or in another encoding."""
    path = Path(path)
    files.check_regular(path)
    with files.opened(path) as f:
        data = f.read()
    for mark, encoding in _MARKS.items():
        if data.startswith(mark):
            raise ValueError(f"{path} is {encoding} text, expected UTF-8; convert it first")
    if begin := _BEGIN.match(data):
        data = data[begin.end() :]
    if not data or data.isspace():
        raise ValueError(f"{path} is empty; expected some text")
    if data[:4096].count(0) > len(data[:4096]) // 4:
        raise ValueError(f"{path} is full of zero bytes, as UTF-16 and UTF-32 are, expected UTF-8; convert it first")
    for start, end in pieces(data):
        try:
            data[start:end].decode("utf-8")
        except UnicodeDecodeError as error:
            place = start + error.start
            line = data.count(b"\n", 0, place) + 1
            raise ValueError(
                f"{path} is not UTF-8 text (byte {place} is 0x{data[place]:02x}, in line {line}); convert it first"
            ) from None
    return data


# -------------------------------------------------------------------------------------------------------------------- records
class Records:
    """The records of a file, all of one form. They are read anew each time that they are gone through: only their number is kept."""

    def __init__(self, entries):
        """entries: a function that yields (where, entry) from the first on; ValueError if one of them is no record."""
        self._entries, self.form, self._number = entries, None, 0
        begun = None
        for where, entry in entries():
            found = _form(where, entry)
            self.form, begun = self.form or found, begun or where
            if found != self.form:
                raise ValueError(
                    f"{where} is of the form {_words(found)}, and {begun} of {_words(self.form)}; expected one form"
                )
            _record(where, entry, found)
            self._number += 1

    def __len__(self):
        return self._number

    def __iter__(self):
        return (_record(where, entry, self.form) for where, entry in self._entries())


def read_records(path, data):
    """The Records of a file's bytes; None if it is running text."""
    suffix = Path(path).suffix.lower()
    if suffix in _TABLES:
        raise ValueError(
            f'{path} is a table; write its rows as JSON lines, such as {{"prompt": ..., "answer": ...}}, in a .jsonl file, or name '
            "it .txt if it is running text"
        )
    begin = _behind_space(data)
    if suffix in _LINES and data[begin : begin + 1] != b"[":
        return Records(partial(_lines, path, data))
    value, end = _value(data, begin)
    if suffix not in (*_LINES, *_ARRAY) and not _evident(data, begin, value, end):
        return None
    return Records(_array(path, data, value, end))


def _evident(data, begin, value, end):
    """Whether a text is JSON, be it one object or array or several in turn, or begins as files of records do.

    value, end: the `_value` at its begin
    """
    if value is None:
        return _RECORDS.match(data[begin : border(data, begin + (1 << 20))].decode("utf-8")) is not None
    rest = _behind_space(data, end)
    if rest == len(data) or _known(value):
        return True
    if data[rest : rest + 1] == b",":
        rest = _behind_space(data, rest + 1)
    numbers = isinstance(value, Array) and value.numbers  # [1] [2] is how texts cite
    return type(_value(data, rest)[0]) is type(value) and not numbers


def _behind_space(data, start=0):
    """The place behind the white space that UTF-8 bytes have from a place on."""
    for begin, end in pieces(data, start):
        if rest := data[begin:end].decode("utf-8").lstrip():
            return end - len(rest.encode("utf-8"))
    return len(data)


def _value(data, place):
    """(the outline of the object or array that stands at a place, the place behind it); (None, the place) if none does."""
    try:
        if data[place : place + 1] in (b"{", b"["):
            stream = Stream(data, place)
            return stream.outline(), stream.place
    except (ValueError, RecursionError):
        pass
    return None, place


def _known(value):
    """Whether a value is a record, or has some in an array."""
    parts = value.values() if isinstance(value, dict) else [value]
    return any(isinstance(v, dict) and _keys(v) for v in [value, *(v.first for v in parts if isinstance(v, Array))])


def _parsed(text, where):
    """The value of a short text of JSON, which stands at `where`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        around = text[error.pos - 1 : error.pos], text[error.pos : error.pos + 1]
        raise ValueError(_no_json(where, error.msg, error.colno, *around)) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(_unreadable(where, error)) from None


def _no_json(where, what, column, before, behind):
    """The sentence on a mistake in JSON; before, behind: the characters around it."""
    if what == "Extra data" and behind == ",":
        what = "a comma follows the object; write one object a line without commas, or all in one array"
    elif what == "Extra data" and before == "\r":
        what = r"its lines end with a carriage return alone; convert the line ends to \n"
    return f"{where}: expected a JSON object, and it is no JSON ({what}, column {column})"


def _unreadable(where, error):
    """The sentence on JSON with a number of thousands of digits, or brackets in thousands of brackets."""
    return f"{where}: expected a JSON object, and it cannot be read ({error})"


def _too_long(where):
    return f"{where}: a record of more than {LONGEST:,} bytes; write long texts into a file of running text"


@contextlib.contextmanager
def _read_with_care(path, data, stream):
    """Turn what a stream over a file's bytes raises into a sentence with the line."""

    def line(place):
        number = data.count(b"\n", 0, place) + 1
        return f"{path} line {number}"

    try:
        yield
    except TooLong as error:
        raise ValueError(_too_long(line(error.place))) from None
    except NoJSON as error:
        at = error.place
        column = 1 + sum(len(data[a:b].decode("utf-8")) for a, b in pieces(data, data.rfind(b"\n", 0, at) + 1, at))
        around = (byte.decode("latin-1") for byte in (data[max(at - 1, 0) : at], data[at : at + 1]))
        raise ValueError(_no_json(line(at), str(error), column, *around)) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(_unreadable(line(stream.place), error)) from None


def _lines(path, data):
    """(where, entry) of JSON lines. Only "\n" ends one: other separators of lines may stand inside a text."""
    number, end = 1, 0
    for match in _FILLED.finditer(data):
        begin = max(data.rfind(b"\n", end, match.start()) + 1, end)
        number += data.count(b"\n", end, begin)
        end = match.end()
        where = f"{path} line {number}"
        if end - begin > LONGEST:
            raise ValueError(_too_long(where))
        line = data[begin:end].decode("utf-8")
        if line.strip():
            yield where, _parsed(line, where)


def _array(path, data, value, end):
    """A function that yields (where, entry) of an array, alone or under one key of an object; also of JSON lines in a file that is
    named otherwise. value, end: the `_value` at its begin."""
    stream = Stream(data, end)
    if (
        value is None or Stream(data).peek() not in "[{"
    ):  # no array or object, or no JSON: that is read again for the sentence
        stream, value = Stream(data), None
    with _read_with_care(path, data, stream):
        value = stream.outline() if value is None else value
        if isinstance(value, dict) and _behind_space(data, stream.place) < len(data):
            return partial(_lines, path, data)
        if stream.peek():
            raise NoJSON("Extra data", stream.place)
    if isinstance(value, dict) and _keys(value) is None:
        lists = [v for v in value.values() if isinstance(v, Array)]
        if len(lists) != 1:
            raise ValueError(
                f"{path}: expected records, an array of them, or an object with one under one key; it has {len(lists)} arrays, and "
                f"the keys {_quoted(value)}"
            )
        value = lists[0]
    return partial(_entries, path, data, value.place if isinstance(value, Array) else None)


def _entries(path, data, place):
    """(where, entry) of the array that begins at a place, or of the one value that the file is."""
    stream = Stream(data, place or 0)
    with _read_with_care(path, data, stream):
        entries = [stream.value()] if place is None else stream.elements()
        for i, entry in enumerate(entries, 1):
            yield f"{path} entry {i}", entry


def _quoted(keys):
    """The first few of many keys, shortened."""
    few = list(itertools.islice(keys, 20))
    return ", ".join(map(shown, few)) + (f" and {len(keys) - len(few)} more" if len(keys) > len(few) else "")


def _keys(entry):
    """The keys by which the form of an entry is known; None if it has none of them."""
    return next((keys for keys in _FORMS if all(key in entry for key in keys)), None)


def _words(form):
    return " and ".join(f'"{key}"' for key in form)


def _form(where, entry):
    form = _keys(entry) if isinstance(entry, dict) else None
    if form is None:
        found = f"keys {_quoted(entry)}" if isinstance(entry, dict) else f"a {type(entry).__name__}"
        raise ValueError(f"{where}: expected a JSON object with {', or '.join(map(_words, _FORMS))}; found {found}")
    try:
        json.dumps(entry, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise ValueError(f"{where}: it holds {half}, half of a surrogate pair, which is no character") from None
    except RecursionError as error:
        raise ValueError(_unreadable(where, error)) from None
    return form


def _record(where, entry, form):
    """The Record of an entry in this form."""
    if form == ("messages",):
        return _conversation(where, _messages(where, entry["messages"]), tools=_tools(where, entry))
    if form == ("conversations",):
        return _conversation(where, _shared(where, entry), tools=_tools(where, entry))
    if form == ("text",):
        return Record(where, text=_text(where, entry, "text"))
    if form == ("instruction", "output"):
        asked, given = (
            _text(where, entry, "instruction"),
            _text(where, {"input": "", **entry}, "input", (str, type(None))),
        )
        question = f"{asked}\n\n{given}" if given else asked
        return Record(where, prompt=_alpaca(asked, given), question=question, answer=_text(where, entry, "output"))
    prompt, answer = (entry[key] for key in form)
    if isinstance(prompt, str) and isinstance(answer, str):
        return Record(where, prompt=prompt, answer=answer)
    if form == ("prompt", "answer") or not all(isinstance(x, (str, list)) for x in (prompt, answer)):
        raise ValueError(f"{where}: expected a JSON object with the texts {_words(form)}")
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _messages(where, prompt)
    said = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else _messages(where, answer)
    return _conversation(where, [*asked, *said], len(asked), _tools(where, entry))


def _text(where, entry, key, kinds=str):
    if not isinstance(entry[key], kinds):
        raise ValueError(f'{where}: "{key}" is a {type(entry[key]).__name__}, expected a text')
    return entry[key]


def _alpaca(instruction, given):
    """The prompt of Stanford's Alpaca, for models without turns (github.com/tatsu-lab/stanford_alpaca)."""
    context = ", paired with an input that provides further context" if given else ""
    inputs = f"### Input:\n{given}\n\n" if given else ""
    return (
        f"Below is an instruction that describes a task{context}. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n{inputs}### Response:\n"
    )


def _messages(where, messages):
    """A list of {"role", "content"}; the content is a text, a list of parts, or missing beside "tool_calls"."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: expected a list of messages")
    for i, message in enumerate(messages, 1):
        content = message.get("content") if isinstance(message, dict) else None
        whole = isinstance(content, (str, list)) or (isinstance(message, dict) and message.get("tool_calls"))
        if not whole or not isinstance(message.get("role"), str):
            raise ValueError(f'{where}: message {i} is no object with the texts "role" and "content"')
    return [{**message, "role": _SPEAKERS.get(message["role"].lower(), message["role"])} for message in messages]


def _shared(where, entry):
    """ShareGPT's turns as messages."""
    turns = entry["conversations"]
    if isinstance(turns, list) and turns and isinstance(turns[0], dict) and "role" in turns[0]:
        return _messages(where, turns)
    messages = (
        [{"role": "system", "content": entry["system"]}]
        if isinstance(entry.get("system"), str) and entry["system"]
        else []
    )
    for i, turn in enumerate(turns if isinstance(turns, list) else [], 1):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise ValueError(f'{where}: turn {i} is no object with the texts "from" and "value"')
        role = _SPEAKERS.get(str(turn.get("from")).lower())
        if role is None:
            raise ValueError(
                f"{where}: turn {i} is from {shown(turn.get('from'))}, expected one of {', '.join(_SPEAKERS)}"
            )
        flags = {name: turn[name] for name in (*_FLAGS, "train_detail") if name in turn}
        messages.append({"role": role, "content": turn["value"], **flags})
    return _messages(where, messages)


def _tools(where, entry):
    """The list of tools that a record gives its conversation, also where it stands as a text of JSON; None without."""
    tools = entry.get("tools")
    if isinstance(tools, str) and tools:
        tools = _parsed(tools, f'{where}, "tools"')
    if tools and not isinstance(tools, list):
        raise ValueError(f'{where}: "tools" is a {type(tools).__name__}, expected a list')
    return tools or None


def _conversation(where, messages, first=0, tools=None):
    if not any(message["role"] == "assistant" for message in messages[first:]):
        roles = _quoted(dict.fromkeys(message["role"] for message in messages[first:]))
        raise ValueError(f"{where}: the assistant says nothing; there is nothing to learn (the roles are {roles})")
    unlearned = tuple(i for i, message in enumerate(messages) if not _is_learned(where, i, message))
    messages = [{name: value for name, value in message.items() if name not in _FLAGS} for message in messages]
    return Record(where, messages=messages, first=first, unlearned=unlearned, tools=tools)


def _is_learned(where, i, message):
    """Whether the flags of message i let it be learned."""
    if message.get("train_detail"):
        raise ValueError(
            f'{where}: message {i + 1} has "train_detail"; tinylora learns a message whole or, by "train", not'
        )
    flags = {name: message[name] for name in _FLAGS if message.get(name) is not None}
    for name, value in flags.items():
        if value not in (0, 1):
            raise ValueError(
                f'{where}: "{name}" of message {i + 1} is {shown(value)}, expected 0 or 1, or false or true'
            )
        if value is True and message["role"] != "assistant":
            speaker = shown(message["role"])[1:-1]
            raise ValueError(
                f'{where}: "{name}" of message {i + 1} is true, and the {speaker} says it; only what the assistant says is learned'
            )
    return all(flags.values())
