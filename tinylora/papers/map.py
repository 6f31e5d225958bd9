"""The map of the papers: what each of their statements came to, and where it is computed, tested and derived.

    claims()       the entries of map.toml, in its order
    read(path)     those of another file of this form

What is computed: nothing. map.toml is the one source; what it names is opened by tests/papers/test_map.py. What is said: a file that
is not of this form is refused with a sentence that names the entry and the field.
"""

import re
import tomllib
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

PATH = Path(__file__).with_name("map.toml")

PAPERS = {
    "LoRA": "arXiv 2106.09685",
    "QLoRA": "arXiv 2305.14314",
    "AF4": "arXiv 2306.06965",
    "BOF4": "arXiv 2505.06653",
    "descendants": "the papers that came after LoRA",
    "code": "bitsandbytes, PEFT, loralib, and the authors' script",
}
KINDS = ("equation", "table", "figure", "claim")
CANNOT = "cannot be checked here"
VERDICTS = ("holds exactly", "holds at toy scale", "does not follow", CANNOT)

_ID = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_PLACES = {  # what the entries of a list look like, and how that is said
    "code": (re.compile(r"\w[\w.]*(/\w[\w.]*)+(:[A-Za-z_][\w.]*)?"), "a file, or file:name"),
    "test": (re.compile(r"tests/[\w./]+\.py::\w+"), "tests/…/test_….py::test_…"),
    "notebook": (re.compile(r"\d\d_\w+#\d+"), "NN_name#section"),
}


@dataclass(frozen=True)
class Claim:
    """One entry of the map."""

    id: str  # the anchor: lower case, digits, hyphens
    paper: str  # one of PAPERS
    place: str  # where the paper says it: "eq. 4, §3"
    kind: str  # one of KINDS
    says: str  # the statement, in our words
    verdict: str  # one of VERDICTS
    number: str  # what decides it, with its unit; "" where no number does
    why: str  # why the verdict is what it is
    code: tuple = ()  # "tinylora/quant.py:quantize", or a file alone
    test: tuple = ()  # "tests/test_quant.py::test_golden", each of which fails if the verdict is wrong
    notebook: tuple = ()  # "05_building_nf4#1": the notebook and the number of its section
    erratum: bool = False  # whether it is a slip of the paper or of the code


@cache
def claims():
    """The entries of map.toml. -> (Claim, …)"""
    return read(PATH)


def read(path):
    """The entries of a map, in its order -> (Claim, …); ValueError, in a sentence, for what is not of this form."""
    name = Path(path).name
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}: expected TOML: {error}") from None
    entries = table.pop("claim", None)
    if table or not isinstance(entries, list) or not entries:
        raise ValueError(f"{name}: expected one or more [[claim]], and nothing else")
    found = {}
    for i, entry in enumerate(entries, 1):
        claim = _claim(entry, f"{name}: claim {i}", name)
        if claim.id in found:
            raise ValueError(f"{name}: {claim.id}: the id stands twice")
        found[claim.id] = claim
    return tuple(found.values())


def _claim(entry, where, name):
    """The Claim of a table of the file."""
    if not isinstance(entry, dict) or not _is(entry.get("id"), _ID):
        raise ValueError(f"{where}: id: expected lower-case letters, digits and single hyphens")
    where = f"{name}: {entry['id']}"
    types = {field.name: field.type for field in fields(Claim)}
    for key in entry:
        if key not in types:
            raise ValueError(f"{where}: {key}: there is no such field; they are {', '.join(types)}")
    for key, kind in types.items():
        value = entry.get(key)
        if kind is str and not (isinstance(value, str) and (value.strip() or (key == "number" and key in entry))):
            raise ValueError(f"{where}: {key}: expected a text" + " (it is missing)" * (key not in entry))
        if kind is bool and not isinstance(value, bool | None):
            raise ValueError(f"{where}: {key} = {value!r}, expected true or false")
        if kind is tuple and value is not None:
            form, words = _PLACES[key]
            if not isinstance(value, list) or not all(_is(place, form) for place in value):
                raise ValueError(f"{where}: {key} = {value!r}, expected a list, each of it {words}")
    for key, allowed in (("paper", PAPERS), ("kind", KINDS), ("verdict", VERDICTS)):
        if entry[key] not in allowed:
            raise ValueError(f"{where}: {key} = {entry[key]!r}, expected one of {', '.join(allowed)}")
    if entry["verdict"] != CANNOT and not entry.get("test"):
        raise ValueError(f"{where}: test: expected one or more, as the verdict is {entry['verdict']!r}")
    return Claim(**{key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()})


def _is(value, form):
    return isinstance(value, str) and form.fullmatch(value) is not None
