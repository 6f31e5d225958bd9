"""A tokenizer.json, believed in nothing, and the backend that the tokenizers package builds of it.

    {"model": {"type": "BPE", "vocab": {"a": 0, ...}, "merges": [["a", "b"], ...]}, "added_tokens": [{"id", "content", ...}, ...],
     "normalizer", "pre_tokenizer", "post_processor", "decoder": {"type": ...} or null, "truncation", "padding"}

The parts are programs of a kind, and the package runs whatever they say. Refused before that is what would

- grow a text without end          Replace and Prepend, several times; a template that holds the text twice
- search a text for hours          a regular expression whose time grows faster than the text: each is tried on short texts
- end Python as a whole            lengths and ids that nothing in the file bears out

`quiet` keeps back what the package's Rust writes to the terminal when it panics, and `failed` tells its panics from other errors.
"""

import base64
import contextlib
import json
import math
import os
import re
import threading
import time

from . import files, vocabularies
from .fields import Kind, anything, check, either, fields, flag, number, optional, several, shown, text, whole

ID = whole(0, 2**31 - 1)
TEXT = Kind("a text of at most 10000 characters", lambda v: text().fits(v) and _is_unicode(v))
_FLAGS = {name: flag() for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}
ADDED_TOKEN = fields({"content": TEXT, **_FLAGS})
_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_INSIDE = ("normalizers", "pretokenizers", "processors", "decoders")  # the lists of parts in a Sequence
_FIELDS = {
    "added_tokens": optional(several(fields({"id": ID, "content": TEXT, **_FLAGS}))),
    **{name: optional(fields({"type": text()})) for name in _PARTS},
    "model": fields(
        {
            "type": text(),
            "vocab": either(fields({}), several(anything())),
            "merges": several(anything(), most=10_000_000),
            "dropout": optional(number(0, 1)),
            **{n: optional(text()) for n in ("unk_token", "continuing_subword_prefix", "end_of_word_suffix")},
            **{name: flag() for name in ("fuse_unk", "byte_fallback", "ignore_merges")},
        }
    ),
}
_KNOWN = {*_FIELDS, "version", "truncation", "padding"}
_MOST_PARTS, _MOST_GROWTH = 100, 100  # parts of a Sequence; characters that one character may become
_LONGEST = 8192  # characters that a regular expression is tried on
_SECONDS, _TIMES = 0.02, 6  # what that may take: this, or so often what cutting them into single ones takes
_QUIET = threading.RLock()
_MOST_PATTERNS = 20  # of regular expressions in a part

#: Texts that a regular expression is tried on, over and over: each kind of character, and words.
_UNITS = ("a", "A", "1", " ", "\n", "\r\n", "!", "é", "中", "aA", "a1", "a ", "It's 12 mills, he said.\n")
#: Regular expressions that are fast; the last, which some models count digits in threes from the right with, is slow on thousands of
#: digits alone.
_TRIED = {cut for cuts in vocabularies.CUTS.values() for cut in cuts} | {r"(?=(\d{3})+(?!\d))"}


def _is_unicode(value):
    """Whether a text holds no half of a surrogate pair, which JSON can say and no file of text."""
    return value.isascii() or not any("\ud800" <= c <= "\udfff" for c in value)


def read(path):
    """A tokenizers.Tokenizer from a tokenizer.json. ValueError names the file and the field that is wrong."""
    vocabularies.package()  # or a sentence that it is not installed
    described = check(files.read_json(path), _FIELDS, path)
    if unknown := described.keys() - _KNOWN:
        raise ValueError(f"{path}: {shown(min(unknown))} is none of its parts; expected {', '.join(sorted(_KNOWN))}")
    _check_vocabulary(described.get("model", {}), path)
    for name in _PARTS:
        _check_part(described.get(name), path, name)
    with quiet():
        backend = _built(described, path)
    for i, token in enumerate(described.get("added_tokens") or ()):
        if (found := backend.token_to_id(token.get("content", ""))) != token.get("id"):
            raise ValueError(
                f"{path}: added_tokens[{i}].id = {token.get('id')} of {shown(token.get('content'))}, and behind the tokens of the "
                f"model it gets {found}"
            )
    return backend


def _check_vocabulary(model, path):
    """Each token an id of its own, or a finite score."""
    vocabulary = model.get("vocab", {})
    if isinstance(vocabulary, dict):
        ids = list(vocabulary.values())
        for token, i in vocabulary.items():
            if not ID.fits(i):
                raise ValueError(f"{path}: model.vocab[{shown(token)}] = {shown(i)}, expected {ID.expected}")
        if len(set(ids)) < len(ids):
            named = {i: token for token, i in vocabulary.items()}
            i, token = next((i, token) for token, i in vocabulary.items() if named[i] != token)
            raise ValueError(f"{path}: model.vocab gives the id {i} to {shown(token)} and to {shown(named[i])}")
    else:
        for i, entry in enumerate(vocabulary):
            fits = type(entry) is list and len(entry) == 2 and type(entry[0]) is str
            if not (fits and type(entry[1]) in (int, float) and math.isfinite(entry[1])):
                raise ValueError(f"{path}: model.vocab[{i}] = {shown(entry)}, expected [a text, a finite score]")
    for i, merge in enumerate(model.get("merges", ())):
        pair = merge.split(" ") if type(merge) is str else merge
        if type(pair) is not list or len(pair) != 2 or not all(type(side) is str for side in pair):
            raise ValueError(f"{path}: model.merges[{i}] = {shown(merge)}, expected two tokens")


def _parts(part, name):
    """[(part, its name)], with those in a Sequence one by one."""
    found = [(check(part, {"type": text()}, name, required=("type",)), name)]
    for kind in _INSIDE:
        for i, inner in enumerate(part[kind] if type(part.get(kind)) is list else ()):
            found += _parts(inner, f"{name}.{kind}[{i}]")
    return found


def _check_part(part, path, name):
    """Refuse a normalizer, pre_tokenizer, post_processor or decoder that could run without end."""
    if part is None:
        return
    try:
        parts, growth = _parts(part, name), 1
        if len(parts) > _MOST_PARTS:
            raise ValueError(f"{name} has {len(parts)} parts, expected at most {_MOST_PARTS}")
        if sum(type(part.get("pattern")) is dict and "Regex" in part["pattern"] for part, _ in parts) > _MOST_PATTERNS:
            raise ValueError(f"{name} has more than {_MOST_PATTERNS} regular expressions")
        for part, field in parts:
            growth *= _CHECKS.get(part["type"], _growth_of_none)(part, field) or 1
            if growth > _MOST_GROWTH:
                raise ValueError(f"{field} makes {growth} characters of one, expected at most {_MOST_GROWTH}")
            _check_pattern(part.get("pattern"), f"{field}.pattern")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _growth_of_none(part, field):
    """Parts that leave a text as long as it is."""


def _growth_of_replace(part, field):
    check(part, {"content": text()}, field, required=("content", "pattern"))
    return len(part["content"])


def _growth_of_prepend(part, field):
    check(part, {"prepend": text(_MOST_GROWTH)}, field, required=("prepend",))


def _check_template(part, field):
    """The template puts special tokens, which it names, around the text, which it holds once."""
    pieces = part.get("single")
    names = part.get("special_tokens")
    if type(pieces) is not list or not all(type(piece) is dict and len(piece) == 1 for piece in pieces):
        raise ValueError(f"{field}.single = {shown(pieces)}, expected a list of pieces")
    if type(names) is not dict:
        raise ValueError(f"{field}.special_tokens = {shown(names)}, expected an object")
    inner = [
        (kind, value.get("id") if type(value) is dict else None) for piece in pieces for kind, value in piece.items()
    ]
    if [i for kind, i in inner if kind != "SpecialToken"] != ["A"] or ("Sequence", "A") not in inner:
        raise ValueError(f"{field}.single holds the text (the sequence A) other than once")
    for kind, i in inner:
        if kind == "SpecialToken":
            token = names.get(i) if type(i) is str else None
            ids = token.get("ids") if type(token) is dict else None
            if type(ids) is not list or not ids or not all(map(ID.fits, ids)):
                raise ValueError(f"{field}.special_tokens has no ids for {shown(i)}, which single names")


def _check_fixed_length(part, field):
    check(part, {"length": whole(1)}, field, required=("length",))


def _check_precompiled(part, field):
    """SentencePiece's table of replacements: the length of a trie, the trie in words of 4 bytes, and the texts that it leads to."""
    check(part, {"precompiled_charsmap": text(2**24)}, field, required=("precompiled_charsmap",))
    try:
        table = base64.b64decode(part["precompiled_charsmap"], validate=True)
    except ValueError:
        table = b""
    size = int.from_bytes(table[:4], "little")
    if size == 0 or size % 4 or size > len(table) - 4:
        raise ValueError(f"{field}.precompiled_charsmap is no table of SentencePiece's")
    return max(map(len, table[4 + size :].split(b"\0")))


def _growth_of_bytes(part, field):
    return 2  # a letter of two bytes may stand for one


_CHECKS = {
    "Replace": _growth_of_replace,
    "Prepend": _growth_of_prepend,
    "TemplateProcessing": _check_template,
    "FixedLength": _check_fixed_length,
    "ByteLevel": _growth_of_bytes,
    "Precompiled": _check_precompiled,
}


# ------------------------------------------------------------------------------------------------------------ regular expressions
def _check_pattern(pattern, field):
    """Refuse a regular expression that does not compile, or that searches a text for longer the longer it is, and more than that."""
    if type(pattern) is dict and "" in pattern.values():
        raise ValueError(f"{field} = {shown(pattern)}, expected what is not found everywhere")
    pattern = pattern.get("Regex") if type(pattern) is dict else None
    check({"Regex": pattern}, {"Regex": optional(TEXT)}, field)
    if pattern is None or pattern in _TRIED:
        return
    if math.prod(max(1, int(n)) for n in re.findall(r"\d{1,9}(?=[,}])", pattern)) > 100_000:
        raise ValueError(
            f"{field}.Regex = {shown(pattern)} repeats too often; expected counts whose product is at most 100000"
        )
    with quiet():
        slow = _slow(pattern, field)
    if slow:
        raise ValueError(
            f"{field}.Regex = {shown(pattern)} takes more than {_SECONDS} s on {slow} characters, and more than {_TIMES} times as "
            "long as cutting them into single ones"
        )
    _TRIED.add(pattern)


def _slow(pattern, field):
    """The length of a text on which a regular expression takes too long; 0 if none is found."""
    package = vocabularies.package()
    single = package.pre_tokenizers.Split(package.Regex(r"[\s\S]"), "isolated")
    try:
        split = package.pre_tokenizers.Split(package.Regex(pattern), "isolated")
    except Exception as error:
        raise ValueError(f"{field}.Regex = {shown(pattern)} is no regular expression ({error})") from None
    letters = "".join(dict.fromkeys(c for c in pattern if c.isprintable()))[:20]
    for unit in (*_UNITS, *letters):
        for n in (16 << k for k in range((_LONGEST // 16).bit_length())):
            searched = (unit * n)[:n] + "\x01" + letters  # behind it, what the expression may wait for
            try:
                slow = all(_takes_long(split, single, searched) for _ in range(5))
            except BaseException as error:
                if not failed(error):
                    raise
                slow = True  # the package gives a match up after ten million steps
            if slow:
                return n
    return 0


def _takes_long(split, single, searched):
    """Whether cutting a text takes too long, on a machine of whatever speed; now and then it does because the machine is busy."""
    seconds = _seconds(split, searched)
    return seconds > _SECONDS and seconds > _TIMES * _seconds(single, searched)


def _seconds(split, searched):
    """What cutting a text takes of this thread's time."""
    began = time.thread_time()
    split.pre_tokenize_str(searched)
    return time.thread_time() - began


# ------------------------------------------------------------------------------------------------------------------- the package
def _built(described, path):
    """The backend, and that it encodes."""
    described = {**described, "truncation": None, "padding": None}
    try:
        return _encoding(described)
    except BaseException as error:
        if not failed(error):
            raise
        field = next((name for name in (*_PARTS, "added_tokens") if _fails(name, described)), "model")
        what = " ".join(str(error).split())
        raise ValueError(f"{path} is not a tokenizer that the tokenizers package reads ({field}: {what})") from None


def _encoding(described):
    backend = vocabularies.package().Tokenizer.from_str(json.dumps(described))
    backend.encode("a")
    return backend


def _fails(name, described):
    """Whether a part fails beside the plainest of models."""
    plain = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
    try:
        _encoding({**plain, **dict.fromkeys(_PARTS), name: described.get(name)})
    except BaseException as error:
        return failed(error)
    return False


def failed(error):
    """Whether this is the package's: it raises plain Exceptions, and a BaseException of its own where its Rust panics."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


@contextlib.contextmanager
def quiet():
    """What is written to the terminal's second stream below Python, as a panic is, goes nowhere. One thread at a time does this."""
    with _QUIET:
        try:
            kept = os.dup(2)
        except OSError:  # there is none
            yield
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            os.close(nowhere)
