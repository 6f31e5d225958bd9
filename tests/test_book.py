"""The book: where links lead, what formulas and docstrings become, and, of a book that was built, every page.

TINYLORA_BOOK=docs/_build/html pytest tests/test_book.py
"""

import functools
import http.server
import importlib.util
import json
import os
import re
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from tinylora.papers import map as paper_map

pytest.importorskip("sphinx", reason="the book needs sphinx: pip install -e '.[book]'")
pytest.importorskip("myst_nb", reason="the book needs myst-nb: pip install -e '.[book]'")
pytest.importorskip("latex2mathml", reason="the book needs latex2mathml: pip install -e '.[book]'")

DOCS = Path(__file__).parents[1] / "docs"
sys.path.insert(0, str(DOCS / "_ext"))
import api  # noqa: E402
import check  # noqa: E402
import layout  # noqa: E402
import links  # noqa: E402
import mathml  # noqa: E402
import search  # noqa: E402

sys.path.remove(str(DOCS / "_ext"))

BUILT = Path(os.environ["TINYLORA_BOOK"]) if "TINYLORA_BOOK" in os.environ else None
built = pytest.mark.skipif(BUILT is None, reason="TINYLORA_BOOK names no built book")


@pytest.fixture
def book(tmp_path):
    """A small repository and its book."""
    files = {
        "README.md": "",
        "docs/index.md": "",
        "docs/commands.md": "",
        "docs/explorer/nf4.html": "",
        "notebooks/README.md": "",
        "notebooks/WORKED.md": "",
        "notebooks/05_building_nf4.ipynb": "",
        "notebooks/05_building_nf4.py": "",
        "notebooks/grading.py": "",
        "figures/README.md": "",
        "tests/oracle/test_oracle.py": "",
        "tests/test_quant.py": "\n\nclass TestIt:\n    def test_inner(self): ...\n\n\ndef test_ties():\n    TIES = 1\n",
        "tinylora/__init__.py": "",
        "tinylora/quant.py": "NESTED = 256\n",
        "tinylora/kernels/__init__.py": "",
        "tinylora/kernels/rounding.py": "",
    }
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return layout.Book(tmp_path)


@pytest.mark.parametrize(
    ("page", "href", "leads"),
    [
        ("README.md", "tinylora/quant.py", "tinylora/quant.py.html"),
        ("README.md", "tinylora/kernels", "api/kernels.html"),
        ("README.md", "tinylora/", "api/index.html"),
        ("README.md", "notebooks/README.md", "notebooks/index.html"),
        ("README.md", "figures/README.md#the-account", "figures/index.html#the-account"),
        ("figures/README.md", "../README.md", "readme.html"),
        ("figures/README.md", "../docs/commands.md#a-real-llm", "commands.html#a-real-llm"),
        ("tests/README.md", "oracle", "tests/oracle/index.html"),
        ("docs/index.md", "../notebooks/05_building_nf4.ipynb#section-3", "notebooks/05_building_nf4.html#section-3"),
        ("docs/index.md", "explorer/nf4.html", "explorer/nf4.html"),
        ("docs/index.md", "#where-to-start", "#where-to-start"),
        ("docs/index.md", "https://example.org/x.md", "https://example.org/x.md"),
        ("notebooks/README.md", "WORKED.md", None),
    ],
)
def test_links(book, page, href, leads):
    assert book.link(href, page) == leads


@pytest.mark.parametrize("href", ["tinylora/gone.py", "gone.md#here", "tinylora/quant.pyc", "../README.md"])
def test_a_link_that_leads_nowhere(book, href):
    with pytest.raises(layout.Unresolved, match=r"README\.md links to .*, and the book has no page for"):
        book.link(href, "README.md")


@pytest.mark.parametrize(
    ("text", "leads"),
    [
        ("tests/test_quant.py", "tests/test_quant.py.html"),
        ("tests/test_quant.py::test_ties", "tests/test_quant.py.html#L-7"),
        ("tests/test_quant.py::TestIt::test_inner", "tests/test_quant.py.html#L-4"),
        ("tinylora/quant.py:NESTED", "tinylora/quant.py.html#L-1"),
        ("tests/test_quant.py:3", "tests/test_quant.py.html#L-3"),
        ("quant.py", "tinylora/quant.py.html"),
        ("rounding.py", "tinylora/kernels/rounding.py.html"),
        ("05_building_nf4", "notebooks/05_building_nf4.html"),
        ("05_building_nf4#3", "notebooks/05_building_nf4.html#section-3"),
        ("05_building_nf4.ipynb", "notebooks/05_building_nf4.html"),
        ("tinylora/kernels/", "api/kernels.html"),
        # solutions are not shown, and these are no files of the book
        ("notebooks/05_building_nf4.py", None),
        ("WORKED.md", None),
        ("tinylora-run/adapter", None),
        ("quantize", None),
        ("python docs/build.py", None),
        ("1/32", None),
    ],
)
def test_mentions(book, text, leads):
    assert book.mention(text, "README.md") == leads


@pytest.mark.parametrize("text", ["tests/test_gone.py", "tests/test_quant.py::test_gone", "tinylora/quant.py:gone"])
def test_a_mention_of_what_does_not_exist(book, text):
    with pytest.raises(layout.Unresolved, match=r"README\.md mentions"):
        book.mention(text, "README.md")


def test_addresses_seen_from_a_page():
    assert layout.relative("tinylora/quant.py.html#L-3", "notebooks/05_x") == "../tinylora/quant.py.html#L-3"
    assert layout.relative("api/index.html", "index") == "api/index.html"
    assert layout.relative("#here", "a/b") == "#here" and layout.relative("mailto:a@b", "a/b") == "mailto:a@b"


@pytest.fixture(scope="module")
def build():
    """docs/build.py."""
    sys.path.insert(0, str(DOCS))
    try:
        spec = importlib.util.spec_from_file_location("build_book", DOCS / "build.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(DOCS))
    return module


#: What a line may not be where MyST reads Markdown: it would vanish from its page, or become something else than prose.
LOST = {
    "a comment": r" {0,3}%",
    "a break between cells": r" {0,3}\+\+\+",
    "a target": r" {0,3}\([^)\n]*\)=\s*$",
    "the address of a link": r" {0,3}\[[^\]\n]+\]:\s",
    "a directive": r" {0,3}:::",
    "a heading with a number and no words": r" {0,3}#{1,6}\s+[−-]?\d[\d.,]*(\s*%)?(\s[^·\s].*)?$",
}
#: What ends a paragraph if a line of its prose happens to begin so.
CUT = r" {0,3}(#{1,6}(\s|$)|1[.)]\s|[-+*]\s|=+\s*$|-+\s*$|>)"


def lost(text):
    """The lines of a page of Markdown that MyST takes for something else than the prose that they are. -> [(what, line)]"""
    found, before, fence, display = [], "", False, False
    for line in text.splitlines():
        if re.match(r"\s*(```|~~~)", line):
            before, fence = "", not fence
            continue
        opened, display = display, display ^ (line.count("$$") % 2 == 1)
        if fence or opened:
            continue
        found += [(what, line) for what, form in LOST.items() if re.match(form, line)]
        if before and not re.match(r"\s|([-*+]|\d+[.)]|>|\||#)", before) and re.match(CUT, line):
            found.append(("no part of the paragraph before it", line))
        before = "" if display else line.strip() and line
    return found


def test_no_line_of_a_page_vanishes_or_is_taken_for_something_else(build):
    book, seen = layout.book(), 0
    for path in book.pages:
        text = (book.root / path).read_text(encoding="utf-8")
        if path.endswith(".ipynb"):
            cells = json.loads(build.prepared(text))["cells"]
            parts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
        else:
            parts = [text]
        for part in parts:
            assert lost(part) == [], path
            seen += part.count("\n")
    assert seen > 9000


@pytest.mark.parametrize(
    "text, what",
    [
        ("it is 0.0258\n% and 0.0413 %.", "a comment"),
        ("one\n+++ two", "a break between cells"),
        ("one\n\n(name)=\n\ntwo", "a target"),
        ("one\n\n[two]: three", "the address of a link"),
        ("as in issue\n# 299 of qlora", "a heading with a number and no words"),
        ("a sum\n+ b", "no part of the paragraph before it"),
        ("there are\n1. two", "no part of the paragraph before it"),
    ],
)
def test_a_line_that_would_vanish_is_named(text, what):
    assert what in [found for found, _ in lost(text)]
    assert lost(f"```text\n{text}\n```") == lost(f"$$\n{text}\n$$") == []


def test_no_solution_has_a_page():
    book = layout.book()
    shown = {*book.pages, *book.sources}
    assert {"notebooks/05_building_nf4.ipynb", "notebooks/my_qlora.py", "tests/test_quant.py"} <= shown
    assert {"notebooks/05_building_nf4.py", "notebooks/build_it.py", "notebooks/WORKED.md"} <= book.withheld
    assert not shown & book.withheld
    # machinery and its tests name the marker; a solution stands between two of them that are lines of their own, as in the sources
    begins = [path for path in shown if path.startswith("notebooks/") and _holds_a_solution(book.root / path)]
    assert begins == []


def _holds_a_solution(path):
    return any(line.strip() == "# BEGIN SOLUTION" for line in path.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize(
    ("tex", "holds"),
    [
        (r"\tfrac12\big(\tfrac1{32}\big)", ["<mfrac><mn>1</mn><mn>2</mn></mfrac>", 'minsize="1.2em"']),
        (r"\lVert W \rVert", ["‖"]),
        (r"a \qquad \text{if } b", ['width="2em"', "if"]),
        (r"\max(i, j)", [">max</mo>", 'lspace="0"', 'rspace="0"']),
        (r"d \operatorname{tr} M", ['lspace="0.1667em"']),
        (r"|x - y|", ['lspace="0" rspace="0"']),
        (r"65{,}285", ['lspace="0" rspace="0"']),
        (r"\mathrm{round}(x)\quad(1)", [">r</mi>", "<mn>1</mn>", 'width="1em"']),
    ],
)
def test_mathematics(tex, holds):
    written = mathml.mathml(tex, True)
    assert written.startswith("<math") and 'display="block"' in written
    assert "\\" not in written.partition(">")[2]
    for part in holds:
        assert part in written, written


@pytest.mark.parametrize("tex", [r"\frac{1", r"\notacommand x", r"\left( x"])
def test_a_formula_that_cannot_be_converted(tex):
    with pytest.raises(ValueError, match="cannot be converted to MathML"):
        mathml.mathml(tex, False)


def test_docstrings_stand_as_they_are():
    text = "Ŵ = c[q] * |m|_b, in `float32`.\n\nThen\n\n    q_i = x   `y`\n\npacked      uint8\nconstants   float32"
    lines = text.splitlines()
    shown = "\n".join(api.restructured(lines))
    assert r"Ŵ = c\[q\] \* \|m\|\_b, in ``float32``\ ." in shown
    assert "   q_i = x   `y`" in shown and "   packed      uint8\n   constants   float32" in shown
    assert shown.count("code-block") == 2
    listed = "\n".join(api.restructured(["* one", "  more", "* two"]))
    assert "* one more" in listed and "* two" in listed


def test_search_cuts_numbers_as_words():
    cut = search.Search({}).split("NF4's offset 0.9677083, of 5,366,016 bytes; 量化 x_1.")
    assert cut == ["NF4", "s", "offset", "0.9677083", "of", "5,366,016", "bytes", "量", "化", "x_1"]
    assert search.Search({}).split("5366016 bytes, 1024 in 64.") == ["5,366,016", "bytes", "1,024", "in", "64,"]


def test_a_page_gets_the_box_of_the_downloads_before_its_mark(build):
    text = build.with_box("before\n\n<!-- get it -->\nafter", "notebooks/build_it.md", "notebooks/build_it", 6_900_000)
    before, _, after = text.partition("<!-- get it -->\n")
    assert before.startswith("before\n\n:::{admonition} Get it") and after == "after"
    assert '<a download href="../downloads/tinylora.zip">tinylora.zip</a> (6.9 MB)' in before
    with pytest.raises(ValueError, match=r"notebooks/README\.md has no line <!-- get it -->, before which"):
        build.with_box("no mark", "notebooks/README.md", "notebooks/index", 1)
    for path, mark in build.GET.items():
        assert f"{mark}\n" in (layout.ROOT / path).read_text(encoding="utf-8")


def test_a_file_with_answers_is_not_given_away(build):
    own = (layout.ROOT / "notebooks" / "my_qlora.py").read_text(encoding="utf-8")
    build.refuse_answers(own)
    with pytest.raises(ValueError, match=r"holds an answer, nearest, which the book would give away"):
        build.refuse_answers(own.replace('raise NotImplementedError("your answer")', "return x", 1))
    given = layout.globbed(build.ARCHIVE)
    assert not [
        path for path in given if path.startswith("notebooks/") and path.count("/") > 1 and not path.endswith(".py")
    ]
    assert not [path for path in given if "for-teachers" in path]


def test_the_gallery_begins_with_its_contents():
    contents, *parts = re.split(r"^##+ (.+)$", (DOCS / "gallery.md").read_text(encoding="utf-8"), flags=re.M)
    assert re.findall(r"\[([^]]+)\]\(#", contents) == parts[::2]


def test_folded_cells_and_drawings(build):
    drawn = [{"output_type": "execute_result", "data": {"image/png": ""}, "metadata": {}}]
    cells = [
        {"cell_type": "markdown", "source": ["costs $a\n", "+ b$, and `$x\n$`"], "metadata": {}},
        {"cell_type": "code", "source": ["# Draws: a curve\n", "draw()"], "metadata": {}, "outputs": drawn},
    ]
    text, code = json.loads(build.prepared(json.dumps({"cells": cells})))["cells"]
    assert text["source"] == "costs $a + b$, and `$x\n$`"
    assert code["metadata"]["mystnb"]["image"] == {"alt": "a curve"}
    assert code["metadata"]["mystnb"]["code_prompt_show"] == "Draws: a curve"
    cells[1]["source"] = ["draw()"]
    with pytest.raises(ValueError, match="alt text"):
        build.prepared(json.dumps({"cells": cells}))


def test_the_check_finds_what_is_wrong(tmp_path):
    (tmp_path / "a.html").write_text(
        '<script src="https://cdn.example/x.js"></script><img src="a.html"><p id="here">$$x$$</p>'
        '<a href="b.html">gone</a><a href="#nowhere">x</a><a href="a.html#here">fine</a><a href="https://example.org">out</a>'
    )
    (tmp_path / "a.css").write_text("@import '//fonts.example/a.css'; a { background: url(data:x) }")
    found, pages, links = check.problems(tmp_path)
    assert pages == 1 and links == 4
    for words in (
        "<script> loads",
        "has no alt",
        "TeX is left",
        "b.html leads to no file",
        "#nowhere leads to no anchor",
        "a.css loads",
    ):
        assert sum(words in line for line in found) == 1, found
    assert len(found) == 6


@built
def test_every_built_page():
    found, pages, links = check.problems(BUILT)
    print(f"{pages} pages, {links} links and resources")
    assert found == [] and pages > 60


@built
def test_the_number_is_a_word_of_the_search():
    assert "0.9677083" in check.terms(BUILT)


def _page(name):
    return (BUILT / f"{name}.html").read_text(encoding="utf-8")


@built
def test_the_archive_holds_what_students_need_and_no_solution(build):
    known = layout.book()
    with zipfile.ZipFile(BUILT / "downloads" / "tinylora.zip") as archive:
        held = {name.removeprefix("tinylora/"): archive.read(name) for name in archive.namelist()}
    assert held.keys() >= {
        "pyproject.toml",
        "tinylora/data/base/model.safetensors",
        "notebooks/conftest.py",
        "notebooks/my_qlora.py",
    }
    assert not held.keys() & known.withheld
    assert not [name for name, inside in held.items() if re.search(rb"^\s*# BEGIN SOLUTION\s*$", inside, re.M)]
    for path in build.SINGLE:
        assert (BUILT / "downloads" / Path(path).name).read_bytes() == (known.root / path).read_bytes()
    for path in build.GET:
        assert "downloads/tinylora.zip" in _page(known.pages[path]), path


@built
def test_the_first_page_says_what_it_is_about_and_leads_to_the_explorers():
    text = _page("index").partition('role="main"')[2]
    first = text.partition("</p>")[0]
    assert "LoRA fine-tunes a large language model" in first and "QLoRA" in first
    assert text.index('href="explorer.html"') < text.index("<table")
    assert re.search(r'class="next-page" href="readme.html">.*?class="title">The README<', text, re.S)


@built
@pytest.mark.parametrize("name", ["papers", "errata"])
def test_each_entry_shows_its_address_and_folds_its_tests(name):
    text = _page(name)
    ids = [claim.id for claim in paper_map.claims() if name == "papers" or claim.erratum]
    for one in ids:
        entry = text.partition(f'<a id="{one}"></a>')[2].partition("</li>")[0]
        assert re.search(rf'<a [^>]*href="{name}\.html#{one}">{one}</a>', entry), one
        assert "::test_" not in entry.partition("<details>")[0], one


@built
def test_each_test_of_the_questions_leads_to_its_line():
    named = re.findall(r"(<a [^>]*>)?<code[^>]*><span class=\"pre\">(test_\w+)</span>", _page("questions"))
    assert len(named) > 20
    for link, name in named:
        assert re.search(r'href="tests/[\w/]+\.py\.html#L-\d+"', link), name


@built
def test_chinese_pages_say_so():
    assert all('lang="zh-Hans"' in _page(page)[:200] for page in layout.book().pages.values() if page.startswith("zh/"))
    assert 'lang="en"' in _page("index")[:200]


@pytest.fixture
def server():
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(BUILT))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


# written out here once more, so that a wrong row of the book's own table is noticed
REPOSITORIES = {
    "bitsandbytes": "bitsandbytes-foundation/bitsandbytes",
    "peft": "huggingface/peft",
    "qlora": "artidoro/qlora",
    "lora": "microsoft/LoRA",
    "trl": "huggingface/trl",
    "micrograd": "karpathy/micrograd",
    "llms-from-scratch": "rasbt/LLMs-from-scratch",
}


def mentioned(text):
    """The addresses of the issues and preprints that a page mentions, found by reading it word by word."""
    text = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", " ", text, flags=re.S)
    words = re.findall(r"[\w-]+(?:[.,][\w-]+)*|\S", text)
    found, named, open_, issue, where = set(), None, False, False, {}
    for i, word in enumerate(words):
        after, before = (words[i + 1] if i + 1 < len(words) else ""), words[i - 1] if i else ""
        if word.lower() in REPOSITORIES:
            named, open_, issue = word.lower(), True, False
        elif word.lower() in ("issue", "issues") or (before, word) == ("pull", "request"):
            open_ = issue = True
        elif word.isdigit() and open_ and (issue or re.fullmatch(r'[;,.:)|"-]|and', after) or not after):
            tracker = named if words[i - 2].lower() == named else where.get(word, named)
            where[word] = tracker
            found.add(f"https://github.com/{REPOSITORIES[tracker]}/issues/{word}")
        elif not (before.isdigit() and open_ and word in (",", "and", "、", "和")):
            open_ = issue = False
    return found | {f"https://arxiv.org/abs/{number}" for number in re.findall(r"\b\d{4}\.\d{5}\b", text)}


@built
def test_mentions_of_issues_and_preprints_are_links():
    known, total = layout.book(), 0
    for path, page in known.pages.items():
        text = (known.root / path).read_text(encoding="utf-8")
        if path.endswith(".ipynb"):
            cells = json.loads(text)["cells"]
            text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        links = re.findall(r'href="(https://[^"]*)"', (BUILT / f"{page}.html").read_text(encoding="utf-8"))
        written = set(re.findall(r"\]\((https://[^)]*)\)", text))
        assert set(links) - written == mentioned(text), path
        total += len(links)
    assert total > 150


def test_an_issue_of_no_tracker_is_noticed():
    with pytest.raises(ValueError, match="issue 12 is an issue of no tracker that is named before it"):
        links.outside("See issue 12.")
    # versions, counts and other names are no issues
    assert links.outside("bitsandbytes 0.50.2, LoRA 63 %, LoRA 16 bits, QLoRA 3; LoRA 18,874,368; 1234.56789") == []


@built
def test_the_explorers_lead_back_and_keep_the_theme(open_page, server):
    for name in ("nf4", "pager"):
        page, wrong, _ = open_page(f"{server}explorer/{name}.html")
        page.evaluate("localStorage.setItem('theme', 'dark')")
        page.reload()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 26)"
        assert page.locator("main code").count() > 2 and page.locator("main a code").count() > 2
        page.click("text=Explore by hand")
        assert page.url == f"{server}explorer.html" and page.inner_text("h1").startswith("Explore by hand")
        assert wrong == []


@built
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_in_a_browser(open_page, server, width, scheme):
    """No error in the console, no request that fails or leaves, nothing to scroll sideways, and formulas have a size."""
    page, wrong, asked = open_page(server, viewport={"width": width, "height": 900}, color_scheme=scheme)
    names = ["index", "readme", "figures/index", "notebooks/05_building_nf4", "notebooks/16_what_is_nf4_optimal_for"]
    names += [
        "papers",
        "errata",
        "questions",
        "nf4",
        "gallery",
        "explorer",
        "explorer/nf4",
        "explorer/pager",
        "zh/index",
    ]
    for name in [*names, "api/quant", "api/adapters", "tinylora/quant.py", "tests/index"]:
        page.goto(f"{server}{name}.html")
        scrolled = page.evaluate("document.documentElement.scrollWidth")
        assert scrolled <= width, f"{name} is {scrolled} pixels wide at {width}"
        if name.startswith("notebooks"):
            sizes = page.evaluate("[...document.querySelectorAll('math')].map(x => x.getBoundingClientRect().height)")
            assert len(sizes) > 10 and min(sizes) > 5
    assert wrong == [] and [url for url in asked if not url.startswith((server, "data:"))] == []


@built
@pytest.mark.parametrize(
    ("asked_for", "title", "shown"),
    [
        ("0.9677083", "05 · Building NF4", "0.9677083"),
        # with its commas and without them, whichever way the page writes it
        ("18874368", "11 · Counting LoRA", "18,874,368"),
        ("18,874,368", "11 · Counting LoRA", "18,874,368"),
        ("13020", "GPU", "13020"),
        ("13,020", "GPU", "13020"),
        ("bitsandbytes 2086", "18 · Int4 and NF4 at equal bits", "2086"),
        ("bitsandbytes 968", "Questions", "968"),
    ],
)
def test_search_in_a_browser(open_page, server, asked_for, title, shown):
    page, wrong, _ = open_page(f"{server}search.html?q={asked_for}")
    found = page.locator("#search-results li", has=page.locator(f"a:text('{title}')")).first
    found.locator("p.context", has_text=shown).wait_for(timeout=20000)
    assert wrong == []


# the entries of the map that are seen; playwright's own selectors take a second for it
SHOWN = "[...document.querySelectorAll('li > p > a[id]')].filter(anchor => anchor.parentElement.offsetParent).map(anchor => anchor.id)"


@built
def test_the_map_is_filtered_in_a_browser(open_page, server):
    """By paper, verdict and words; the address keeps the choice, and a link to an entry leads to it."""
    claims = [claim for claim in paper_map.claims() if (claim.paper, claim.verdict) == ("QLoRA", "does not follow")]
    page, _, _ = open_page(f"{server}papers.html")
    assert len(page.evaluate(SHOWN)) == len(paper_map.claims())
    page.select_option(".map-filter select[aria-label=paper]", "QLoRA")
    page.select_option(".map-filter select[aria-label=verdict]", "does not follow")
    assert page.evaluate(SHOWN) == [claim.id for claim in claims]
    assert page.inner_text(".map-filter p") == f"{len(claims)} of {len(paper_map.claims())} entries"
    page.fill(".map-filter input", "eq. 4")
    assert "qlora-eq-4" in page.evaluate(SHOWN) and "words=eq.+4" in page.url
    page.goto(page.url)  # anew
    assert "qlora-eq-4" in page.evaluate(SHOWN)
    page.goto(f"{server}errata.html#{next(claim.id for claim in claims if claim.erratum)}")
    page.wait_for_function(
        "Math.abs(document.querySelector(location.hash).getBoundingClientRect().top) < 900", timeout=20000
    )


@built
@pytest.mark.parametrize("width", [1280, 390])
def test_the_map_begins_with_its_filter(open_page, server, width):
    """It stands above the first entry, both on the first screen, and stays while one reads."""
    page, _, _ = open_page(f"{server}papers.html", viewport={"width": width, "height": 800})
    top = "document.querySelector({!r}).getBoundingClientRect().top"
    assert page.evaluate(top.format(".map-filter")) < page.evaluate(top.format("#lora-eq-1")) < 700
    assert page.eval_on_selector_all("details[open]", "x => x.length") == 0
    page.evaluate("scrollTo({top: 9000, behavior: 'instant'})")
    assert 0 <= page.evaluate(top.format(".map-filter")) < 60
    page.goto(f"{server}papers.html?words=eq#qlora-eq-4")
    page.wait_for_function("scrollY > 0")
    box = page.evaluate("document.querySelector('.map-filter').getBoundingClientRect().bottom")
    assert box <= page.evaluate("document.querySelector('#qlora-eq-4').parentElement.getBoundingClientRect().top") < 400


@built
def test_the_map_finds_places_and_numbers_as_they_are_written(open_page, server):
    page, _, _ = open_page(f"{server}papers.html")

    def found(words):
        page.fill(".map-filter input", words)
        return page.evaluate(SHOWN)

    places = {claim.id: claim.place for claim in paper_map.claims()}
    for ways, stands in [
        (("figure 2", "fig. 2"), r"figure 2\b"),
        (("eq. 4", "equation 4"), r"eq\. 4\b"),
        (("section 4.2", "§4.2"), r"§4\.2\b"),
        (("appendix D", "appendix d"), r"appendix D|D\.\d"),
    ]:
        assert {tuple(found(words)) for words in ways} == {tuple(found(ways[0]))}
        assert set(found(ways[0])) == {one for one, place in places.items() if re.search(stands, place)}, ways
    assert {"lora-table-3-full", "lora-eq-1"} & set(found("table 3")) == {"lora-table-3-full"}
    assert "tables 2 to 4" in {places[one][:13] for one in found("table 3")}
    for one, other in [("1.2TB", "1.2 TB"), ("18874368", "18,874,368")]:
        assert found(one) == found(other) != []
    assert found("figure 99") == [] and page.inner_text(".map-filter p").startswith("0 of ")
    assert page.get_attribute(".map-filter p", "aria-live") == "polite"
    page.click("text=show all")
    assert len(page.evaluate(SHOWN)) == len(places) and "?" not in page.url


@built
def test_what_is_wide_says_so(open_page, server):
    """On a phone, what scrolls is reached by the keyboard and has a name and a shadow; on a screen no line of code is cut."""
    page, _, _ = open_page(f"{server}index.html", viewport={"width": 390, "height": 800})
    for name in ["notebooks/build_it", "notebooks/05_building_nf4", "api/quant", "tinylora/quant.py"]:
        page.goto(f"{server}{name}.html")
        page.eval_on_selector_all("details", "all => all.forEach(one => { one.open = true; })")
        page.wait_for_selector("article [role=region]")
        page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        wide = page.eval_on_selector_all(
            "article .table-wrapper, article pre",
            """boxes => boxes.filter(box => box.scrollWidth > box.clientWidth + 1).map(box =>
            [box.tabIndex, box.getAttribute("role"), !!box.getAttribute("aria-label"), getComputedStyle(box).boxShadow !== "none"])""",
        )
        assert wide and set(map(tuple, wide)) == {(0, "region", True, True)}, name
    page.set_viewport_size({"width": 1280, "height": 800})
    for name in ["api/quant", "tinylora/quant.py", "tinylora/kernels/rounding.py", "notebooks/05_building_nf4"]:
        page.goto(f"{server}{name}.html")
        cut = page.eval_on_selector_all(
            "article pre", "boxes => boxes.filter(box => box.scrollWidth > box.clientWidth + 1).length"
        )
        assert cut == 0, name


@built
def test_a_folded_cell_looks_as_the_notebooks_call_it(open_page, server):
    page, _, _ = open_page(f"{server}notebooks/05_building_nf4.html")
    assert "Click •••" in page.inner_text("article")
    assert (
        page.evaluate("getComputedStyle(document.querySelector('details.hide > summary'), '::before').content")
        == '"•••"'
    )
