"""docs/questions.md: the questions in their order, what each names exists, its numbers stand there, and the notebooks lead back to it."""

import ast
import re
from pathlib import Path
from typing import NamedTuple

import pytest

TOP = Path(__file__).parents[1]
PAGE = TOP / "docs" / "questions.md"
TABLE = (
    (TOP / "notebooks" / "README.md").read_text(encoding="utf-8").partition("## Questions that readers have asked")[2]
)

# the fifteen that had no full answer where they were asked, in order: an anchor never changes
FIFTEEN = (
    "offset", "exact-values", "equation-4", "nf4", "int4", "cpu", "merging", "paging", "five-gigabytes", "halved-counts",
    "a-and-b", "alpha-over-r", "gradients", "speed", "order",
)  # fmt: skip
NUMBER = re.compile(r"(?<![\w.])\d{1,3}(?:,\d{3})+(?!\w)|(?<![\w.,])\d+(?:\.\d+)?(?!\w)")


class Question(NamedTuple):
    """One question of the page: `shown` has a file and its sections, `held` a file and its functions."""

    anchor: str
    number: int
    title: str
    answer: str
    asked: list
    shown: list
    held: list


def read(text):
    """The questions of a page, in order."""
    found = []
    form = (
        r'<a id="([a-z\d-]+)"></a>\n\n## (\d+) · ([^\n]+)\n\n(.+?)\n\n'
        r"- Asked in: (.+?)\n- Shown in: (.+?)\n- Held by: (.+?)(?=\n\n<a|\s*\Z)"
    )
    for anchor, number, title, answer, asked, shown, held in re.findall(form, text, re.S):
        shown = [
            (file, [int(k) for k in re.findall(r"\d+", sections)])
            for file, sections in re.findall(r"\[notebook \d\d\]\(\.\./([^)]+)\),\s+sections?([^;]+)", shown)
        ]
        held = [
            (file, re.findall(r"`(test_\w+)`", names))
            for file, names in re.findall(r"\[[^\]]+\]\(\.\./([^)]+)\),([^;]+)", held)
        ]
        found.append(Question(anchor, int(number), title, answer, re.findall(r"\d+", asked), shown, held))
    return found


QUESTIONS = read(PAGE.read_text(encoding="utf-8"))
each = pytest.mark.parametrize("q", QUESTIONS, ids=lambda q: q.anchor)


def source(file):
    """The source of a notebook that a page links to."""
    return (TOP / file).with_suffix(".py").read_text(encoding="utf-8")


def sections(text):
    """{number: all of a section, prose and code}, without the marks of comments."""
    parts = re.split(r"^# ## ", text, flags=re.M)[1:]
    return {int(p.split(" ")[0]): re.sub(r"^# ?", "", p, flags=re.M) for p in parts if re.match(r"\d+ · ", p)}


def functions(file):
    """{name: source} of a test file."""
    text = (TOP / file).read_text(encoding="utf-8")
    lines = text.splitlines()
    return {
        node.name: "\n".join(lines[node.lineno - 1 : node.end_lineno])
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef)
    }


def numbers(text):
    """The numbers of a text or of code, without thousands separators. Those inside of words (float32, 7B) are none."""
    return {n.replace(",", "") for n in NUMBER.findall(re.sub(r"(?<=\d)_(?=\d)", "", text))}


def test_the_fifteen_come_first_and_in_order():
    headings = re.findall(r"^## ", PAGE.read_text(encoding="utf-8"), re.M)
    assert [q.number for q in QUESTIONS] == list(range(1, len(headings) + 1)) and 20 <= len(headings) <= 24
    assert tuple(q.anchor for q in QUESTIONS[:15]) == FIFTEEN
    assert len({q.anchor for q in QUESTIONS}) == len(QUESTIONS)


@each
def test_an_answer_is_short_and_ends_with_its_number(q):
    sentences = re.split(r"(?<=[.:?])\s+(?=[A-Z\"`])", q.answer)
    assert q.title.endswith("?") and 2 <= len(sentences) <= 6 and len(q.answer.split()) <= 110
    assert re.search(r"\d|⁻³⁸", sentences[-1]), sentences[-1]


@each
def test_each_section_and_test_that_is_named_exists(q):
    assert q.shown and q.held and q.asked
    for file, numbers_ in q.shown:
        assert (TOP / file).is_file() and numbers_ and set(numbers_) <= set(sections(source(file))), (file, numbers_)
    for file, names in q.held:
        assert names and set(names) <= set(functions(file)), (file, names)


@each
def test_each_number_of_an_answer_stands_in_its_section_or_its_test(q):
    there = set()
    for file, which in q.shown:
        for k in which:
            there |= numbers(sections(source(file))[k])
    for file, names in q.held:
        for name in names:
            there |= numbers(functions(file)[name])
    missing = numbers(q.answer) - there
    assert not missing, missing


@each
def test_the_notebooks_lead_back(q):
    row = next((line for line in TABLE.splitlines() if f"](../docs/questions.md#{q.anchor})" in line), None)
    assert row and q.title in row and all(re.search(rf"\b{n}\b", row) for n in q.asked)
    for file, which in q.shown:
        assert f"({Path(file).name})" in row and all(re.search(rf"section.*\b{k}\b", row) for k in which)
    assert all(f"`{file}`" in row for file, _ in q.held)


@pytest.mark.parametrize("q", QUESTIONS[:16], ids=lambda q: q.anchor)
def test_a_notebook_names_the_issues_that_it_settles(q):
    text = "\n".join(source(file) for file, _ in q.shown)
    named = [n for n in q.asked if re.search(rf"\b{n}\b", text)]
    assert named and "issue" in text, q.asked


def test_a_page_that_says_too_much_is_noticed():
    page = (
        '<a id="x"></a>\n\n## 1 · Why?\n\nIt is 0.9677083. It is not 0.123456.\n\n- Asked in: qlora 94\n'
        "- Shown in: [notebook 05](../notebooks/05_building_nf4.ipynb), sections 3 and 99\n"
        "- Held by: [t](../tests/test_codebooks.py), `test_nothing_of_this_name`\n"
    )
    (q,) = read(page)
    assert (q.anchor, q.shown, q.asked) == ("x", [("notebooks/05_building_nf4.ipynb", [3, 99])], ["94"])
    with pytest.raises(AssertionError, match="99"):
        test_each_section_and_test_that_is_named_exists(q)
    with pytest.raises(AssertionError, match="test_nothing"):
        test_each_section_and_test_that_is_named_exists(q._replace(shown=[("notebooks/05_building_nf4.ipynb", [3])]))
    short = q._replace(shown=[("notebooks/05_building_nf4.ipynb", [3])], held=[])
    with pytest.raises(AssertionError, match=r"0\.123456"):
        test_each_number_of_an_answer_stands_in_its_section_or_its_test(short)
    assert numbers("1,290 of 12, 3.5 and float32, 7B") == {"1290", "12", "3.5"}
