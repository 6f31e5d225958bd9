"""A page for each source file, highlighted, with an anchor at each line, and a list for each folder that has no page of its own."""

import html
import posixpath
import re

from layout import book
from sphinx.util.display import status_iterator

LANGUAGES = {".py": "python", ".cu": "cuda", ".h": "cuda", ".toml": "toml", ".cff": "yaml"}

SIDEBARS = {}  # by folder


def pages(app):
    """What Sphinx writes beside the pages it has read: name, context and template of each."""
    shown, highlighter = book(), app.builder.highlighter
    named = status_iterator(
        sorted(shown.sources.items()), "source pages… ", "blue", len(shown.sources), app.verbosity, lambda x: x[0]
    )
    for path, page in named:
        text = (shown.root / path).read_text(encoding="utf-8")
        language = LANGUAGES.get(posixpath.splitext(path)[1], "bash" if path == ".ci/run" else "text")
        code = highlighter.highlight_block(
            text, language, linenos="inline", lineanchors="L", anchorlinenos=True, linespans="S"
        )
        code = re.sub(r'<span id="S-\d+">', "<span>", code)  # around each line, which wraps by itself
        title = html.escape(path)
        yield (
            page,
            {"title": title, "body": f'<h1 class="source">{title}</h1>\n<div class="source">{code}</div>'},
            "page.html",
        )
    for folder, page in sorted(shown.shelves.items()):
        inside = [path for path in (*shown.pages, *shown.sources) if posixpath.dirname(path) == folder]
        deeper = [path for path in sorted(shown.folders) if posixpath.dirname(path) == folder]
        rows = []
        for path in [*deeper, *sorted(inside)]:
            url = posixpath.relpath(shown.url(path), posixpath.dirname(page))
            rows.append(
                f'<li><a class="reference internal" href="{url}"><code>{html.escape(posixpath.basename(path))}</code></a></li>'
            )
        title = f"{html.escape(folder)}/"
        yield page, {"title": title, "body": f'<h1 class="source">{title}</h1>\n<ul>{"".join(rows)}</ul>'}, "page.html"


def one_sidebar(app, page, template, context, doctree):
    """The source pages of a folder share their sidebar, which takes longer to make than the page."""
    if doctree is None and page.partition("/")[0] in ("tinylora", "tests", "notebooks"):
        make, key = context["toctree"], posixpath.dirname(page)
        context["toctree"] = lambda **options: SIDEBARS.get(key) or SIDEBARS.setdefault(key, make(**options))


def setup(app):
    app.connect("html-page-context", one_sidebar, priority=400)  # before the theme asks for it
    app.connect("html-collect-pages", pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
