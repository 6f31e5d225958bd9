"""Where each file of the repository stands in the book, and what a link or a mention of a file leads to.

A page's name is its file's path without suffix, in lower case: notebooks/TEACHING.md is notebooks/teaching. README.md is
its folder's index, docs/ is the book's root, and the repository's own README.md is the page readme. A source file keeps its
whole name: tinylora/quant.py is the page tinylora/quant.py, with an anchor L-12 at line 12.
"""

import ast
import posixpath
import re
from functools import cache
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parents[2]

MARKDOWN = (
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CHANGELOG.md",
    "docs/**/*.md",
    "docs/**/*.ipynb",
    "notebooks/README.md",
    "notebooks/build_it.md",
    "notebooks/TEACHING.md",
    "notebooks/[0-9][0-9]_*.ipynb",
    "figures/**/*.md",
    "tests/README.md",
    "tinylora/**/*.md",
)
SOURCES = (
    "tinylora/**/*.py",
    "tinylora/**/*.cu",
    "tinylora/**/*.toml",
    "tests/**/*.py",
    "tests/**/*.h",
    "notebooks/**/*.py",
    "docs/**/*.py",
    ".ci/*",
    "pyproject.toml",
    "LICENSE",
    "CITATION.cff",
)
# what the book does not show, since it holds solutions; a mention of one of these stays text, and a link too
WITHHELD = (
    "notebooks/[0-9][0-9]_*.py",
    "notebooks/build_it.py",
    "notebooks/sample_class.py",
    "notebooks/WORKED.md",
    "tests/test_build_it.py",
)
# in reading order
CORE = ("codebooks", "quant", "backend", "dtypes", "tensor", "ops", "tape", "nn", "lora", "optim", "paging")


def globbed(patterns, root=ROOT):
    """The files that patterns name, as paths from the root with slashes, in the patterns' order."""
    found = (path for pattern in patterns for path in sorted(root.glob(pattern)) if path.is_file())
    named = dict.fromkeys(path.relative_to(root).as_posix() for path in found)
    return [path for path in named if not re.search(r"(^|/)(__pycache__|_build|\.\w+_checkpoints)/", path)]


def page_of(path):
    """The page of a Markdown file or notebook of the repository."""
    if path == "README.md":
        return "readme"
    folder, name = posixpath.split(path)
    name = "index" if name == "README.md" else name.rsplit(".", 1)[0].lower()
    return posixpath.join(folder, name).removeprefix("docs/")


class Unresolved(ValueError):
    """A link or a mention that leads nowhere."""


class Book:
    """The pages, source pages and files of the book, by their path in the repository."""

    def __init__(self, root=ROOT):
        withheld = set(globbed(WITHHELD, root))
        self.root, self.withheld = root, withheld
        self.pages = {path: page_of(path) for path in globbed(MARKDOWN, root) if path not in withheld}
        # ".ci" would be a hidden folder, which some servers do not show
        self.sources = {path: path.lstrip(".") for path in globbed(SOURCES, root) if path not in withheld}
        # an explorer, a drawing: copied as it is
        extra = [path for path in globbed(["docs/**/*"], root) if path not in self.pages and path not in self.sources]
        self.files = {path: path.removeprefix("docs/") for path in extra if not path.startswith("docs/_")}
        rooms = sorted(
            path.removesuffix("/__init__.py") for path in self.sources if re.match(r"tinylora/\w+/__init__", path)
        )
        self.rooms = {room: f"api/{posixpath.basename(room)}" for room in rooms}
        folders = {posixpath.dirname(path) for path in (*self.sources, *self.pages)}
        self.folders = (folders | {posixpath.dirname(folder) for folder in folders}) - {""}
        self.places = {"tinylora": "api/index", **self.rooms}
        self.shelves = {}  # folders without a page of their own get a list of their files
        for folder in sorted(self.folders - set(self.places)):
            own = [path for path in (f"{folder}/README.md", f"{folder}/index.md") if path in self.pages]
            if not own:
                self.shelves[folder] = f"{folder.lstrip('.')}/index"
            self.places[folder] = self.pages[own[0]] if own else self.shelves[folder]
        self.names = {}  # a file's bare name, where only one has it
        for path in self.sources:
            self.names.setdefault(posixpath.basename(path), []).append(path)

    def url(self, path):
        """The address from the book's root of a path in the repository, or None if it has none."""
        if path in self.pages:
            return f"{self.pages[path]}.html"
        if path in self.sources:
            return f"{self.sources[path]}.html"
        if path in self.files:
            return self.files[path]
        if f"{path}/index.html" in self.files:
            return self.files[f"{path}/index.html"]
        if path in self.places:
            return f"{self.places[path]}.html"
        return None

    def link(self, href, page):
        """What a link of a page (its path in the repository) becomes: an address from the book's root, or None for one that stays text.

        A link to a host, and one into the page itself, stay as they are. Unresolved if it leads nowhere.
        """
        if href.startswith("#") or re.match(r"[a-z][a-z0-9+.-]*:", href):
            return href
        target, _, anchor = href.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page), unquote(target)))
        url = self.url(path)
        if url is None:
            if path in self.withheld:
                return None
            raise Unresolved(f"{page} links to {href}, and the book has no page for {path}")
        return f"{url}#{anchor}" if anchor else url

    def mention(self, text, page):
        """What a mention of a file in a page leads to: an address from the book's root, or None if it names no file of the book.

        `quant.py`, `tests/test_quant.py`, `tests/test_quant.py::test_name`, `tinylora/quant.py:quantize`, `05_building_nf4` and
        `05_building_nf4#3` (its section 3) are mentions. Unresolved if a test or a module of tinylora is named that does not exist.
        """
        if notebook := re.fullmatch(r"(\d\d_\w+?)(?:\.ipynb)?(?:#(\d+))?", text):
            url = self.url(f"notebooks/{notebook[1]}.ipynb")
            return f"{url}#section-{notebook[2]}" if url and notebook[2] else url
        named = re.fullmatch(r"([\w./-]+?)/?(?:::?([\w.]+(?:::\w+)*))?", text)
        if not named or not re.search(r"/|\.(py|cu|md|toml|ipynb|h)$", named[1]):
            return None
        path, name = named[1], named[2]
        here = posixpath.dirname(page)
        places = [posixpath.normpath(posixpath.join(folder, path)) for folder in (here, "", "tinylora", "notebooks")]
        found = next((place for place in places if self.url(place)), None)
        if found is None and len(self.names.get(path, ())) == 1:
            (found,) = self.names[path]
        if found is None:
            if re.match(r"(tests|tinylora)/.*\.py$", path) and path not in self.withheld:
                raise Unresolved(f"{page} mentions {text}, and there is no such file")
            return None
        if name is None:
            return self.url(found)
        line = int(name) if name.isdigit() else lines_of(self.root / found).get(name.replace("::", "."))
        if line is None:
            raise Unresolved(f"{page} mentions {text}, and {found} defines no {name}")
        return f"{self.url(found)}#L-{line}"


@cache
def book():
    """The book of this repository."""
    return Book()


@cache
def lines_of(path):
    """The line of each name that a Python file defines: functions, classes, Class.method, and what is assigned at its top."""
    if path.suffix != ".py":
        return {}
    lines = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            lines[node.name] = node.lineno
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
                    lines[f"{node.name}.{inner.name}"] = inner.lineno
        for target in ast.walk(node) if isinstance(node, ast.Assign | ast.AnnAssign) else ():
            if isinstance(target, ast.Name) and isinstance(target.ctx, ast.Store):
                lines.setdefault(target.id, target.lineno)
    return lines


def relative(url, page):
    """An address from the book's root, as seen from a page of the book (its name, such as notebooks/index)."""
    if url.startswith("#") or re.match(r"[a-z][a-z0-9+.-]*:", url):
        return url
    target, hash_, anchor = url.partition("#")
    return posixpath.relpath(target, posixpath.dirname(page) or ".") + hash_ + anchor
