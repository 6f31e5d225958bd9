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
import json
import re
from dataclasses import dataclass
from pathlib import Path

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
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file")
    data = path.read_bytes()
    for mark, encoding in _MARKS.items():
        if data.startswith(mark):
            raise ValueError(f"{path} is {encoding} text, expected UTF-8; convert it first")
    data = re.sub(rb"\A(\s*%b)+" % codecs.BOM_UTF8, b"", data)
    if not data.strip():
        raise ValueError(f"{path} is empty; expected some text")
    if data[:4096].count(0) > len(data[:4096]) // 4:
        raise ValueError(f"{path} is full of zero bytes, as UTF-16 and UTF-32 are, expected UTF-8; convert it first")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path} is not UTF-8 text (byte {error.start} is 0x{data[error.start]:02x}, in line {line}); convert it first"
        ) from None
    return data


# -------------------------------------------------------------------------------------------------------------------- records
def read_records(path, data):
    """[Record] of a file's bytes; None if it is running text."""
    text, suffix = data.decode("utf-8"), Path(path).suffix.lower()
    if suffix in _TABLES:
        raise ValueError(
            f'{path} is a table; write its rows as JSON lines, such as {{"prompt": ..., "answer": ...}}, in a .jsonl file, or name '
            "it .txt if it is running text"
        )
    if suffix not in (*_LINES, *_ARRAY) and not _evident(text):
        return None
    one_a_line = suffix in _LINES and not text.lstrip().startswith("[")
    entries = _lines(path, text) if one_a_line else _array(path, text)
    form, begun = None, None
    records = []
    for where, entry in entries:
        found = _form(where, entry)
        form, begun = form or found, begun or where
        if found != form:
            raise ValueError(
                f"{where} is of the form {_words(found)}, and {begun} of {_words(form)}; expected one form"
            )
        records.append(_record(where, entry, found))
    return records


def _evident(text):
    """Whether a text is JSON, be it one object or array or several in turn, or begins as files of records do."""
    text = text.lstrip()
    value, rest = _value(text)
    if value is None:
        return _RECORDS.match(text) is not None
    if not rest or _known(value):
        return True
    later = _value(rest.removeprefix(",").lstrip())[0]
    numbers = isinstance(value, list) and all(isinstance(v, (int, float)) for v in value)  # [1] [2] is how texts cite
    return type(later) is type(value) and not numbers


def _value(text):
    """(the object or array that a text begins with, what follows it); (None, the text) if it begins with none."""
    try:
        value, end = json.JSONDecoder().raw_decode(text) if text.startswith(("{", "[")) else (None, 0)
    except (ValueError, RecursionError):
        return None, text
    return value, text[end:].lstrip()


def _known(value):
    """Whether a value is a record, or has some in an array."""
    values = [value, *value.values()] if isinstance(value, dict) else [value]
    return any(isinstance(v, dict) and _keys(v) for v in [value, *(v[0] for v in values if isinstance(v, list) and v)])


def _parsed(text, where):
    """The value of a text of JSON; `where(line)` names the place of a mistake."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        found = f"it is no JSON ({_cause(text, error)}, column {error.colno})"
        raise ValueError(f"{where(error.lineno)}: expected a JSON object, and {found}") from None
    except (
        ValueError,
        RecursionError,
    ) as error:  # a number of thousands of digits, or brackets in thousands of brackets
        raise ValueError(f"{where(1)}: expected a JSON object, and it cannot be read ({error})") from None


def _cause(text, error):
    """What is wrong with a text of JSON."""
    if error.msg == "Extra data" and text.startswith(",", error.pos):
        return "a comma follows the object; write one object a line without commas, or all in one array"
    if error.msg == "Extra data" and text[: error.pos].endswith("\r"):
        return r"its lines end with a carriage return alone; convert the line ends to \n"
    return error.msg


def _lines(path, text):
    """(where, entry) of JSON lines. Only "\n" ends one: other separators of lines may stand inside a text."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path} line {number}"
            yield where, _parsed(line, lambda _, where=where: where)


def _array(path, text):
    """(where, entry) of an array, alone or under one key of an object; also of JSON lines in a file that is named otherwise."""
    if _several(text):
        return _lines(path, text)
    value = _parsed(text, lambda line: f"{path} line {line}")
    if isinstance(value, dict) and _keys(value) is None:
        lists = [v for v in value.values() if isinstance(v, list)]
        if len(lists) != 1:
            raise ValueError(
                f"{path}: expected records, an array of them, or an object with one under one key; it has {len(lists)} arrays, and "
                f"the keys {', '.join(map(repr, value))}"
            )
        value = lists[0]
    return [(f"{path} entry {i}", entry) for i, entry in enumerate(value if isinstance(value, list) else [value], 1)]


def _several(text):
    """Whether an object is the first of several, one behind the other."""
    value, rest = _value(text.lstrip())
    return isinstance(value, dict) and bool(rest)


def _keys(entry):
    """The keys by which the form of an entry is known; None if it has none of them."""
    return next((keys for keys in _FORMS if all(key in entry for key in keys)), None)


def _words(form):
    return " and ".join(f'"{key}"' for key in form)


def _form(where, entry):
    form = _keys(entry) if isinstance(entry, dict) else None
    if form is None:
        found = f"keys {', '.join(map(repr, entry))}" if isinstance(entry, dict) else f"a {type(entry).__name__}"
        raise ValueError(f"{where}: expected a JSON object with {', or '.join(map(_words, _FORMS))}; found {found}")
    try:
        json.dumps(entry, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise ValueError(f"{where}: it holds {half}, half of a surrogate pair, which is no character") from None
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
            raise ValueError(f"{where}: turn {i} is from {turn.get('from')!r}, expected one of {', '.join(_SPEAKERS)}")
        flags = {name: turn[name] for name in (*_FLAGS, "train_detail") if name in turn}
        messages.append({"role": role, "content": turn["value"], **flags})
    return _messages(where, messages)


def _tools(where, entry):
    """The list of tools that a record gives its conversation, also where it stands as a text of JSON; None without."""
    tools = entry.get("tools")
    if isinstance(tools, str) and tools:
        tools = _parsed(tools, lambda _: f'{where}, "tools"')
    if tools and not isinstance(tools, list):
        raise ValueError(f'{where}: "tools" is a {type(tools).__name__}, expected a list')
    return tools or None


def _conversation(where, messages, first=0, tools=None):
    if not any(message["role"] == "assistant" for message in messages[first:]):
        roles = ", ".join(repr(role) for role in dict.fromkeys(message["role"] for message in messages[first:]))
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
            raise ValueError(f'{where}: "{name}" of message {i + 1} is {value!r}, expected 0 or 1, or false or true')
        if value is True and message["role"] != "assistant":
            raise ValueError(
                f'{where}: "{name}" of message {i + 1} is true, and the {message["role"]} says it; only what the assistant says is learned'
            )
    return all(flags.values())
