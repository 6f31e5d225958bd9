"""The book: where links lead, what formulas and docstrings become, and, of a book that was built, every page.

TINYLORA_BOOK=docs/_build/html pytest tests/test_book.py
"""

import functools
import http.server
import json
import os
import shutil
import sys
import threading
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


def test_folded_cells_and_drawings(tmp_path):
    sys.path.insert(0, str(DOCS))
    try:
        import importlib.util

        spec = importlib.util.spec_from_file_location("build_book", DOCS / "build.py")
        build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build)
    finally:
        sys.path.remove(str(DOCS))
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


@pytest.fixture
def browser():
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("Chromium is not installed")
    api = pytest.importorskip(
        "playwright.sync_api", reason="looking at pages needs playwright: pip install -e '.[book]'"
    )
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def server():
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(BUILT))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@built
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_in_a_browser(browser, server, width, scheme):
    """No error in the console, no request that fails or leaves, nothing to scroll sideways, and formulas have a size."""
    said = []
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.on("console", lambda message: message.type == "error" and said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    # what the next page cuts short, such as an icon, did not fail
    page.on("requestfailed", lambda request: "ABORTED" in request.failure or said.append(f"failed: {request.url}"))
    page.on("request", lambda request: request.url.startswith((server, "data:")) or said.append(f"left: {request.url}"))
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
    assert said == []


@built
def test_search_in_a_browser(browser, server):
    page = browser.new_page()
    page.goto(f"{server}search.html?q=0.9677083")
    page.wait_for_selector("#search-results li a", timeout=20000)
    page.wait_for_selector("text=05 · Building NF4 >> visible=true", timeout=20000)
    titles = page.eval_on_selector_all("#search-results li > a", "links => links.map(x => x.textContent)")
    assert any("05 · Building NF4" in title for title in titles)


@built
def test_the_map_is_filtered_in_a_browser(browser, server):
    """By paper, verdict and words; the address keeps the choice, and a link to an entry leads to it."""
    claims = [claim for claim in paper_map.claims() if (claim.paper, claim.verdict) == ("QLoRA", "does not follow")]
    page = browser.new_page()
    page.goto(f"{server}papers.html")
    shown = "items => items.filter(item => item.offsetParent).map(item => item.querySelector('a[id]').id)"
    entries = "li:has(> p a[id], > a[id])"
    assert len(page.eval_on_selector_all(entries, shown)) == len(paper_map.claims())
    page.select_option(".map-filter select[aria-label=paper]", "QLoRA")
    page.select_option(".map-filter select[aria-label=verdict]", "does not follow")
    assert page.eval_on_selector_all(entries, shown) == [claim.id for claim in claims]
    assert page.inner_text(".map-filter p") == f"{len(claims)} of {len(paper_map.claims())} entries"
    page.fill(".map-filter input", "eq. 4")
    assert "qlora-eq-4" in page.eval_on_selector_all(entries, shown) and "words=eq.+4" in page.url
    page.goto(page.url)  # anew
    assert "qlora-eq-4" in page.eval_on_selector_all(entries, shown)
    page.goto(f"{server}errata.html#{next(claim.id for claim in claims if claim.erratum)}")
    page.wait_for_function(
        "Math.abs(document.querySelector(location.hash).getBoundingClientRect().top) < 900", timeout=20000
    )
