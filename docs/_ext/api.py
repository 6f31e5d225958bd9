"""The reference: one page for each file of the core and for each room, from docstrings.

The docstrings are plain text with equations, tables and code set by spaces. What is indented, or holds columns, is shown as it stands;
the rest is prose.
"""

import posixpath
import re
import sys
from pathlib import Path

from docutils import nodes
from layout import CORE, book, lines_of
from sphinx import addnodes

# made with other packages, or a command's entrance
WITHOUT_DOCS = {"tinylora.data.make_texts", "tinylora.cli.__main__"}


def restructured(lines):
    """The lines of a docstring as reStructuredText that shows them unchanged: prose, lists, and the rest as it stands."""
    out = []
    for block in re.split(r"\n\s*\n", "\n".join(lines).strip("\n")):
        rows = block.split("\n")
        out += ["", *(shown(rows) if columns(rows) else mixed(rows)), ""]
    return out


def columns(rows):
    """Whether rows are a table: several, with a gap in one of them."""
    return len(rows) > 1 and any(re.search(r"\S {3,}\S", row) for row in rows)


def mixed(rows):
    """A block's prose and lists, and what of it is indented. What is indented below an item of a list belongs to it."""
    parts = []  # kind and rows: prose, item, or indented
    for row in rows:
        if item := re.match(r"([*-]|\d+\.) ", row):
            parts.append(("item", [row[item.end() :]]))
        elif row.startswith("  ") and not (parts and parts[-1][0] == "item"):
            kind_is(parts, "indented").append(row)
        elif row.startswith("  "):
            parts[-1][1].append(row.strip())
        else:
            kind_is(parts, "prose").append(row)
    out = []
    for kind, inside in parts:
        if kind == "indented":
            out += ["", *shown(inside)]
        else:
            out += ["", ("* " if kind == "item" else "") + prose(" ".join(inside))]
    return out


def kind_is(parts, kind):
    """The rows of the last part, if it is of a kind; of a new one otherwise."""
    if not parts or parts[-1][0] != kind:
        parts.append((kind, []))
    return parts[-1][1]


def shown(rows):
    """Rows as they stand, in a fixed-width font."""
    margin = min(len(row) - len(row.lstrip()) for row in rows)
    return [".. code-block:: text", "", *(f"   {row[margin:]}" for row in rows)]


def prose(text):
    r"""Prose: code in single backticks is code, and every other character stands for itself."""
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(
        f"`{part}`\\ " if i % 2 else re.sub(r"([\\`*_|<>:\[\]])", r"\\\1", part) for i, part in enumerate(parts)
    )


def on_docstring(app, what, name, thing, options, lines):
    lines[:] = restructured(lines)


def stubs():
    """The reference's pages, by name: reStructuredText that asks Sphinx for the docstrings."""
    known = book()
    pages = {f"api/{name}": titled(f"{name}.py", module(f"tinylora.{name}")) for name in CORE}
    for room, page in known.rooms.items():
        own = [path for path in known.sources if path.startswith(f"{room}/") and path.endswith(".py")]
        names = sorted(path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in own)
        names.sort(key=lambda name: name != room.replace("/", "."))  # the room's own docstring first
        names = [name for name in names if name not in WITHOUT_DOCS]
        parts = [
            module(name) if i == 0 else titled(name.removeprefix("tinylora."), module(name), "-")
            for i, name in enumerate(names)
        ]
        pages[page] = titled(f"{posixpath.basename(room)}/", "\n".join(parts))
    lists = {
        "The core, in reading order": [f"/api/{name}" for name in CORE],
        "The rooms": [f"/{page}" for page in known.rooms.values()],
    }
    body = [
        "What each file and each room of tinylora offers, from its docstrings. A name's [source] leads to its line.",
        *(
            f".. toctree::\n   :caption: {caption}\n   :maxdepth: 1\n\n" + "\n".join(f"   {p}" for p in ps)
            for caption, ps in lists.items()
        ),
    ]
    pages["api/index"] = titled("Reference", "\n\n".join(body))
    return pages


def titled(title, body, line="="):
    return f"{title}\n{line * len(title)}\n\n{body}\n"


def module(name):
    return f".. automodule:: {name}\n   :members:\n   :ignore-module-all:\n   :member-order: bysource\n"


def linkcode_resolve(domain, info):
    """The address of a name's line, as seen from a page of the reference."""
    known, file = book(), Path(sys.modules[info["module"]].__file__).resolve()
    path = file.relative_to(known.root).as_posix()
    line = lines_of(file).get(info["fullname"])
    return f"../{known.url(path)}#L-{line}" if line else None


def short_values(app, domain, kind, content):
    """A table of data is in the source; beside its name it would fill a page."""
    for annotation in list(content.parent.findall(addnodes.desc_annotation)):
        if kind == "data" and annotation.astext().startswith(" = ") and len(annotation.astext()) > 80:
            annotation.parent.remove(annotation)


CONTENTS = {}  # a page's list of its sections and names


def short_contents(app, env):
    """Take the names out of the book's contents, which every sidebar is made from; each page keeps its own."""
    for page, contents in env.tocs.items():
        if page.startswith("api/"):
            CONTENTS[page] = contents.deepcopy()
            for reference in CONTENTS[page].findall(nodes.reference):
                reference["refuri"] = reference["anchorname"] or "#"
            for item in list(contents.findall(nodes.list_item)):
                if item.next_node(nodes.reference)["anchorname"].startswith("#tinylora."):
                    item.parent.remove(item)
            for empty in [
                inside for inside in contents.findall(nodes.bullet_list) if not inside.children and inside.parent
            ]:
                empty.parent.remove(empty)


def own_contents(app, page, template, context, doctree):
    if page in CONTENTS:
        context["toc"] = app.builder.render_partial(CONTENTS[page])["fragment"]
        context["furo_hide_toc"] = False


def setup(app):
    app.connect("object-description-transform", short_values)
    app.connect("env-updated", short_contents)
    app.connect("html-page-context", own_contents, priority=900)  # after the theme, which looks at the book's contents
    app.connect("autodoc-process-docstring", on_docstring)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
