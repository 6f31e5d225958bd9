"""The pages are promises: the README's example prints the numbers that stand beside it, and every link leads somewhere."""

import io
import re
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import pytest

TOP = Path(__file__).parents[1]
README = (TOP / "README.md").read_text(encoding="utf-8")
ROOMS = ("docs", "figures", "notebooks", "tests", "tinylora")
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *(str(p.relative_to(TOP)) for room in ROOMS for p in sorted((TOP / room).rglob("*.md")) if "_build" not in p.parts),
]


def test_the_example_prints_the_numbers_beside_it():
    source = re.search(r"```python\n(.*?)```", README, re.S)[1]
    expected = [line.split("# ", 1)[1].strip() for line in source.splitlines() if re.match(r"(tl\.)?print", line)]
    out = io.StringIO()
    with redirect_stdout(out):
        exec(compile(source, "README.md", "exec"), {})
    assert out.getvalue().splitlines() == expected and len(expected) > 4


def test_the_readme_is_read_in_one_go():
    assert len(README.splitlines()) <= 130


@cache
def anchors(page):
    """The anchors of a page's headings, as GitHub makes them, and those that it sets itself at the start of a line or an item."""
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    own = re.findall(r'^(?:- )?<a id="([a-z\d-]+)"></a>', text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings} | set(own)


@pytest.mark.parametrize("name", PAGES)
def test_pictures_links_and_anchors_exist(name):
    page = TOP / name
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        if name == "docs/explorer.md" and there.parent == TOP / "docs" / "explorer":  # which docs/explorers.py writes
            there = TOP / "docs" / "_explorer" / there.name
        assert there.exists(), f"{name}: {target}"
        assert not anchor or anchor in anchors(there), f"{name}: {target}"


@pytest.mark.parametrize("name", PAGES)
def test_files_that_the_pages_name_exist(name):
    for path in re.findall(
        r"`((?:tests|tinylora|notebooks|figures|docs)/[\w./-]+\.(?:py|md|svg|npz|csv|json))`",
        (TOP / name).read_text(encoding="utf-8"),
    ):
        assert "NN" in path or (TOP / path).exists(), f"{name} names {path}"
