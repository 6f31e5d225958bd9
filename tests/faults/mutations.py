"""Files that are damaged on purpose: JSON field by field, and any file byte by byte.

damaged, what = of_json(value, rng)            one field replaced, removed, renamed, doubled, nested; or the text itself is damaged
damaged, what = of_bytes(data, rng, others)    bits, lengths, a cut, something put in, something out of another file
damaged, what = of_safetensors(data, rng, …)   the header as JSON, or the bytes
"""

import json
import os
import struct

#: What a field may hold instead of what it should. Objects that JSON cannot say are texts, see `_text_of`.
NASTY = [
    *(None, True, False, 0, 1, -1, -2, 7, 0.5, -0.0, 3.0, 1e-300, 1e300, 2**31, 2**32 - 1, 2**53, 2**63, -(2**63), 2**64),
    *("", "x", "0", "512", "nan", "none", "base", "all-linear", "..", "../../x", "/etc/hostname", "/dev/zero", "config.json"),
    *("\0", "a\nb", "\x1b[31mred", "\u202e", "\ud800", "a" * 100_000, "((a|a)+)+$", "(([a-z_.0-9]+)+)+!", "(" * 500, "[", "\\", "."),
    *([], [[]], [None], [0] * 1000, ["q_proj"] * 1000, [1, 2, 3], [-1], ["x", 1], {}, {"": ""}, {"a": {"b": {"c": []}}}, {"x": 2**63}),
    *({"rope_type": "linear", "factor": 0}, {"factor": float("nan")}, {"q_proj": -1}, {"(([a-z_.0-9]+)+)+!": 2}, {"0": "x"}),
    *(float("nan"), float("inf"), -float("inf"), "<number of 5000 digits>", "<1e400>", "<brackets>"),
]  # fmt: skip
LENGTHS = [0, 1, -1, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, -(2**63)]
FLOATS = [float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 3e38, 1e-45]
#: What stands in the place of a file.
PLACES = ("nothing", "a folder", "a pipe", "/dev/zero", "a link to itself", "an empty file", "a huge file")


def _text_of(value):
    """A value as JSON, with what Python's own writer cannot say."""
    text = json.dumps(value)
    for mark, said in (
        ("<number of 5000 digits>", "9" * 5000),
        ("<1e400>", "1e400"),
        ("<brackets>", "[" * 3000 + "]" * 3000),
    ):
        text = text.replace(json.dumps(mark), said)
    return text


def _paths(value, path=()):
    """The places in a value of JSON, by keys and indices; of long lists and objects the first few."""
    yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for i, (key, inner) in enumerate(entries):
        if i < 40:
            yield from _paths(inner, (*path, key))


def _pick(rng, things):
    return things[int(rng.integers(len(things)))]


def of_json(value, rng):
    """(bytes, what was done) of a value of JSON that was damaged; `what` begins with the name of the field."""
    if rng.random() < 0.1:
        return of_bytes(json.dumps(value).encode(), rng)
    value = json.loads(json.dumps(value))
    path = _pick(rng, [p for p in _paths(value) if p] or [()])
    if not path:
        new = _pick(rng, NASTY)
        return _text_of(new).encode("utf-8", "surrogatepass"), f"all: {new!r:.60}"
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    key, how = path[-1], _pick(rng, ("nasty",) * 6 + ("remove", "rename", "twice", "nest", "into a list"))
    field = ".".join(map(str, path))
    old = parent[key]
    if how == "nasty":
        parent[key] = _pick(rng, NASTY)
        how = f"{parent[key]!r:.60}"
    elif how == "remove":
        del parent[key]
    elif how == "nest":
        for _ in range(int(_pick(rng, (1, 50, 900)))):
            old = {"a": old}
        parent[key] = old
    elif how == "into a list":
        parent[key] = [old, old]
    elif isinstance(parent, dict):
        name = f"{key}x" if how == "rename" else "<twice>"
        parent[name] = parent.pop(key) if how == "rename" else _pick(rng, NASTY)
        if how == "twice":
            return _text_of(value).replace('"<twice>"', json.dumps(key)).encode(
                "utf-8", "surrogatepass"
            ), f"{field}: twice"
    else:
        parent.insert(0, old)
    return _text_of(value).encode("utf-8", "surrogatepass"), f"{field}: {how}"


def of_bytes(data, rng, others=()):
    """(bytes, what was done) of any file; `others` are files of which a part may come in."""
    b = bytearray(data)
    early = int(rng.integers(min(len(b), 4096) + 1)) if rng.random() < 0.6 else int(rng.integers(len(b) + 1))
    how = _pick(
        rng, ("bit",) * 3 + ("cut", "insert", "length", "length", "float", "splice", "zeros", "double", "noise")
    )
    if not b:
        how = "insert"
    if how == "bit":
        for _ in range(int(_pick(rng, (1, 1, 8)))):
            at = early if rng.random() < 0.7 else int(rng.integers(len(b)))
            b[min(at, len(b) - 1)] ^= 1 << int(rng.integers(8))
    elif how == "cut":
        del b[early:]
    elif how == "insert":
        b[early:early] = rng.bytes(int(_pick(rng, (1, 2, 8, 100))))
    elif how in ("length", "float"):
        size = int(_pick(rng, (4, 8)))
        new = struct.pack("<f" if size == 4 else "<d", _pick(rng, FLOATS)) if how == "float" else None
        new = new or (int(_pick(rng, LENGTHS)) % 2 ** (8 * size)).to_bytes(size, "little")
        b[early : early + size] = new
    elif how == "splice" and others:
        other = _pick(rng, others)
        at = int(rng.integers(len(other) + 1))
        b = b[:early] + other[at:]
    elif how == "zeros":
        n = min(int(_pick(rng, (4, 64, 1000))), len(b) - early)
        b[early : early + n] = bytes(n)
    elif how == "double":
        b[early:early] = b[early : early + int(_pick(rng, (16, 300)))]
    else:
        n = min(int(_pick(rng, (4, 64))), len(b) - early)
        b[early : early + n] = rng.bytes(n)
    return bytes(b), f"{how} at {early}"


def of_safetensors(data, rng, others=()):
    """(bytes, what was done): half of them in the header's JSON, whose length is then right."""
    if rng.random() < 0.5:
        return of_bytes(data, rng, others)
    n = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:n])
    about = header.get("__metadata__", {})
    inner = next((key for key, text in about.items() if text.startswith("{")), None)
    if inner is not None and rng.random() < 0.5:
        text, what = of_json(json.loads(about[inner]), rng)
        about[inner] = text.decode("utf-8", "replace")
        head, what = json.dumps(header).encode(), f"__metadata__.{inner}: {what}"
    else:
        head, what = of_json(header, rng)
    return len(head).to_bytes(8, "little") + head + data[n:], f"header, {what}"


def of_gguf(data, rng, others=(), keys=()):
    """(bytes, what was done): half of them in the value or the type of an entry of the header."""
    if not keys or rng.random() < 0.5:
        return of_bytes(data, rng, others)
    b, key = bytearray(data), _pick(rng, keys)
    at = b.find(key.encode()) + len(key)
    how = _pick(rng, ("type", "whole", "float", "length", "name"))
    if how == "type":
        b[at : at + 4] = int(rng.integers(14)).to_bytes(4, "little")
    elif how == "whole":
        b[at + 4 : at + 8] = (int(_pick(rng, LENGTHS)) % 2**32).to_bytes(4, "little")
    elif how == "float":
        b[at + 4 : at + 8] = struct.pack("<f", _pick(rng, FLOATS))
    elif how == "length":
        b[at + 4 : at + 12] = (int(_pick(rng, LENGTHS)) % 2**64).to_bytes(8, "little")
    else:
        b[at - 1] ^= 1
    return bytes(b), f"{key}: {how}"


def of_lines(data, rng, others=()):
    """(bytes, what was done) of lines of JSON: one of them as JSON, or the bytes."""
    lines = data.split(b"\n")
    i = int(rng.integers(len(lines)))
    if rng.random() < 0.3 or not lines[i].startswith(b"{"):
        return of_bytes(data, rng, others)
    lines[i], what = of_json(json.loads(lines[i]), rng)
    return b"\n".join(lines), f"line {i + 1}, {what}"


def of_cells(data, rng, others=()):
    """(bytes, what was done) of a table: one cell, or the bytes."""
    if rng.random() < 0.4:
        return of_bytes(data, rng, others)
    rows = [line.split(b",") for line in data.split(b"\n")]
    row = _pick(rng, rows)
    i = int(rng.integers(len(row)))
    row[i] = _pick(
        rng, (b"", b"-1", b"1e5", b"9" * 5000, b"nan", b'"', b"\0", b"\xff", b"hit", b"\x1b[2J", b"1,2", "٣".encode())
    )
    return b"\n".join(map(b",".join, rows)), f"a cell: {row[i][:20]!r}"


def put(path, place):
    """Put one of PLACES where a file was."""
    path.unlink()
    if place == "a folder":
        path.mkdir()
    elif place == "a pipe":
        os.mkfifo(path)
    elif place == "/dev/zero":
        path.symlink_to("/dev/zero")
    elif place == "a link to itself":
        path.symlink_to(path.name)
    elif place != "nothing":
        with open(path, "wb") as f:
            f.truncate(1 << 42 if place == "a huge file" else 0)
