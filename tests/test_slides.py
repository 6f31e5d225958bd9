"""The slides: a slide for each section, all that is shown in the file itself, and no request that leaves the page."""

import html
import importlib
import re
from html.parser import HTMLParser

import pytest

pytest.importorskip("jupytext", reason="the notebooks need jupytext: pip install -e '.[notebooks]'")
pytest.importorskip("markdown_it", reason="the slides need markdown-it-py: pip install -e '.[notebooks]'")
pytest.importorskip("matplotlib", reason="the formulas are drawn by matplotlib: pip install -e '.[notebooks]'")

from test_notebooks import NOTEBOOKS, grading

slides = importlib.import_module("slides")  # notebooks/ is on the path by now

CORE = [path for path in sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb")) if int(path.name[:2]) <= slides.CORE]


class Page(HTMLParser):
    """What a deck is made of: its tags with their attributes, its visible text, and its style and script."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.code, self.within = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.within = tag

    def handle_endtag(self, tag):
        self.within = ""

    def handle_data(self, data):
        (self.code if self.within in ("style", "script") else self.text).append(data)


@pytest.fixture(scope="module")
def decks(tmp_path_factory):
    """{notebook: the text of its deck}, as the command writes them."""
    folder = tmp_path_factory.mktemp("slides")
    assert slides.main([str(folder)]) == 0
    return {path: (folder / f"{path.stem}.html").read_text(encoding="utf-8") for path in CORE}


def test_the_core_has_ten_decks(decks):
    assert [path.name[:2] for path in decks] == [f"{i:02}" for i in range(1, 11)]


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.stem)
def test_a_deck(decks, path):
    text, notebook = decks[path], grading.read(path)
    page = Page(text)
    markdown = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    headings = re.findall(r"^## (.+)$", markdown, re.M)
    assert [tag for tag, _ in page.tags].count("section") == 1 + len(headings)
    assert [tag for tag, _ in page.tags].count("h2") == len(headings)
    question = re.search(r"\*\*Question\.\*\*\s*([\w' ]+)", markdown)[1]
    assert question in "".join(page.text)

    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "a"), tag
        for name, value in attributes.items():
            if (tag, name) == ("img", "src"):
                assert re.match(r"data:image/(png|svg\+xml);base64,[A-Za-z0-9+/=]+$", value)
            else:
                assert name not in ("src", "href", "srcset", "action") and "http" not in (value or ""), (tag, name)
    for code in page.code:
        assert not re.search(r"http|url\(|@import|fetch|XMLHttpRequest|\bimport\b", code)
    figures = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert 1 <= [tag for tag, _ in page.tags].count("img") <= len(figures)
    assert all(attributes["alt"] for tag, attributes in page.tags if tag == "img")


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.stem)
def test_no_markdown_is_left_in_a_deck(decks, path):
    page = Page(re.sub(r"<code>.*?</code>|<pre.*?</pre>|<svg.*?</svg>", "", decks[path], flags=re.S))
    text = "".join(page.text)
    assert not re.search(r"\*\*|\$|\]\(|`|\0", text), re.search(r".{30}(\*\*|\$|\]\(|`).{30}", text)
    opened = [c.source for c in grading.read(path).cells if c.cell_type == "code" and not grading.tags(c)]
    shown = re.findall(r"<pre>(.*?)</pre>", decks[path], re.S)
    assert shown and {html.unescape(code) for code in shown} <= set(opened), (
        "the code of a slide is that of an open cell"
    )
    assert "<p></p>" not in decks[path] and "<li></li>" not in decks[path]


def test_the_formulas_of_the_core_are_drawn(decks):
    assert not [path.name for path, text in decks.items() if 'class="tex"' in text]


def test_a_formula_that_cannot_be_drawn_stands_as_tex():
    assert slides.formula(r"\nosuch{x < y}") == r'<span class="tex">\nosuch{x &lt; y}</span>'
    assert slides.formula("x") == "<i>x</i>"
    assert slides.formula(r"\frac{a}{b}").startswith('<svg role="img" aria-label="\\frac{a}{b}" width="')


@pytest.mark.parametrize(
    ("markdown", "shown"),
    [
        ("***a** b*", "<em><strong>a</strong> b</em>"),
        ("**a *b* c**", "<strong>a <em>b</em> c</strong>"),
        (r"\*a\* and *b*", "*a* and <em>b</em>"),
        ("``a`b`` and `$x$`", "<code>a`b</code> and <code>$x$</code>"),
        ("[a `b`](c.md) < q[i]", "a <code>b</code> &lt; q[i]"),
        ("a_b and $x$", "a_b and <i>x</i>"),
    ],
)
def test_inline(markdown, shown):
    assert slides.inline(markdown) == shown


def test_blocks():
    text = (
        "## A *title*\n`$$` opens, `$$` closes, in blocks of\n64. So\n\n$$a =\nb.$$\n\nit is:\n- one\n  more\n- two\n\n"
        "```\n# no title\n```\n\n    no text\n\n1. first\n"
    )
    assert slides.blocks(text) == [
        ("h2", "A *title*"),
        ("text", "`$$` opens, `$$` closes, in blocks of 64. So"),
        ("equation", "a =\nb"),
        ("text", "it is:"),
        ("list", ["one more", "two"]),
        ("list", ["first"]),
    ]


def test_a_table():
    [(kind, made)] = slides.blocks("| a | $x$ |\n|---|---|\n| `p \\| q` | *2* |\n")
    assert kind == "table"
    assert re.findall(r"<(t[hd])>(.*?)</t[hd]>", made) == [
        ("th", "a"),
        ("th", "<i>x</i>"),
        ("td", "<code>p | q</code>"),
        ("td", "<em>2</em>"),
    ]


def test_sentences():
    text = (
        "Eq. 6 says so (see 3.1. and on). `a. B` is code. bitsandbytes rounds. **A title.** It is $0.5. X$ wide?  Yes."
    )
    assert slides.sentences(text) == [
        "Eq. 6 says so (see 3.1. and on).",
        "`a. B` is code.",
        "bitsandbytes rounds.",
        "**A title.**",
        "It is $0.5. X$ wide?",
        "Yes.",
    ]


def test_what_is_wrong_is_said(tmp_path, capsys):
    with pytest.raises(SystemExit):
        slides.main([str(tmp_path), "99"])
    assert "no notebook begins with '99'" in capsys.readouterr().err
