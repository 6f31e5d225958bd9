"""The Chinese pages say what the English ones say: headings, commands, code, numbers, formulas, names and links are compared."""

import ast
import json
import re
import shutil
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pytest
from scripts import loaded

from tinylora.papers import map as paper_map

TOP = Path(__file__).parents[1]
ZH = TOP / "docs" / "zh"
NOTEBOOKS = ("01_qlora_happens", "02_a_small_autograd")
TRANSLATED = {ZH / "README.md": TOP / "README.md"} | {
    ZH / f"{name}.md": TOP / "notebooks" / f"{name}.ipynb" for name in NOTEBOOKS
}
UNITS = {"billion": 10**9, "million": 10**6, "亿": 10**8, "万": 10**4, "": 1}
HALVES = dict(zip("½¼¾", map(Decimal, ("0.5", "0.25", "0.75")), strict=True))
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
each = pytest.mark.parametrize("page", TRANSLATED, ids=lambda page: page.stem)


def cells(name):
    """The cells of a built notebook, with their sources as text."""
    stored = json.loads((TOP / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    return [c | {"source": "".join(c["source"])} for c in stored]


def markdown(name):
    """All Markdown of a built notebook."""
    return "\n\n".join(c["source"] for c in cells(name) if c["cell_type"] == "markdown")


def english(page):
    """The English text that a page translates: all of a file, or the Markdown of a notebook."""
    original = TRANSLATED[page]
    if original.suffix == ".md":
        return original.read_text(encoding="utf-8")
    return markdown(original.stem)


def chinese(page):
    """The text of a page without what it adds: quotes tell where the English is and what a folded cell does."""
    text = page.read_text(encoding="utf-8")
    return "\n".join(line for line in text.splitlines() if not line.startswith((">", "本页译自")))


def fences(text, language):
    """The blocks of code of one language."""
    return [block for name, block in FENCE.findall(text) if name == language]


def prose(text):
    """What is left without blocks of code, targets of links, and HTML comments."""
    text = re.sub(r"<!--.*?-->", "", FENCE.sub("", text), flags=re.S)
    return re.sub(r"(?<=\])\([^)\s]+\)", "", text)


def levels(text):
    """The levels of all headings, in order."""
    return [len(marks) for marks in re.findall(r"^(#+) ", FENCE.sub("", text), re.M)]


def numbers(text):
    """How often each number stands in a text: 1,290, 1½, 65 billion and 650 亿 are numbers, and the 32 of float32 is none."""
    number = (
        r"(?<![A-Za-z_\d.])(\d{1,3}(?:,\d{3})+|\d+(?:\.\d+)?)?([½¼¾])?(?![A-Za-z_\d])(?: ?(billion|million|亿|万))?"
    )
    found = Counter()
    for digits, half, unit in re.findall(number, prose(text)):
        if digits or half:
            found[(Decimal(digits.replace(",", "") or 0) + HALVES.get(half, 0)) * UNITS[unit]] += 1
    return found


def spans(text):
    """Inline code and formulas, each with its count."""
    text = re.sub(r"^    .*$", "", prose(text), flags=re.M)
    formulas = re.findall(r"\$\$.+?\$\$|\$[^$]+\$", re.sub(r"`[^`]+`", "", text), re.S)
    return Counter(re.findall(r"`([^`\n]+)`", text)), Counter(re.sub(r"\s+", " ", f) for f in formulas)


def targets(text, folder):
    """Where the links of a page lead, as paths; a Chinese page stands for the English one."""
    same = {page: original for page, original in TRANSLATED.items() if page.stem != "README"}
    found = Counter()
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text)):
        file, _, anchor = target.partition("#")
        path = (folder / file).resolve()
        found[same.get(path, path), anchor] += 1
    return found


def without_comments(code):
    return ast.dump(ast.parse(code))


@each
def test_headings_are_the_same_in_number_and_order(page):
    assert levels(chinese(page)) == levels(english(page))


@each
def test_each_number_of_the_prose_is_there_and_no_other(page):
    ours, theirs = numbers(chinese(page)), numbers(english(page))
    assert ours == theirs, f"only in Chinese: {ours - theirs}; only in English: {theirs - ours}"


@each
def test_inline_code_and_formulas_are_the_same(page):
    for ours, theirs in zip(spans(chinese(page)), spans(english(page)), strict=True):
        assert ours == theirs, f"only in Chinese: {ours - theirs}; only in English: {theirs - ours}"


@each
def test_each_link_is_there_and_leads_somewhere(page):
    ours, theirs = targets(chinese(page), ZH), targets(english(page), TRANSLATED[page].parent)
    # in the place of the link to the translation stands one to the original
    theirs = Counter({(TRANSLATED[page] if path == page else path, a): count for (path, a), count in theirs.items()})
    assert not theirs - ours, theirs - ours
    assert not ours - theirs, ours - theirs
    assert all(path.exists() for path, _ in targets(page.read_text(encoding="utf-8"), ZH))


def test_the_readmes_commands_and_example_are_the_same():
    ours, theirs = chinese(ZH / "README.md"), english(ZH / "README.md")
    assert fences(ours, "bash") == fences(theirs, "bash") and len(fences(ours, "bash")) == 2
    (example,), (original,) = fences(ours, "python"), fences(theirs, "python")
    assert without_comments(example) == without_comments(original)
    printed = [[line for line in code.splitlines() if "print" in line] for code in (example, original)]
    assert printed[0] == printed[1], "what the example prints stands beside it"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_code_and_outputs_are_those_of_the_notebook(name):
    text = (ZH / f"{name}.md").read_text(encoding="utf-8")
    code = [c for c in cells(name) if c["cell_type"] == "code"]
    visible = [c["source"] for c in code if "hide-input" not in c["metadata"].get("tags", [])]
    ours = fences(text, "python")
    assert [without_comments(c) for c in ours] == [without_comments(c) for c in visible]
    comments = [re.findall(r"(?<=  )# .+$", c, re.M) for c in (*ours, *visible)]
    assert [len(c) for c in comments[: len(ours)]] == [len(c) for c in comments[len(ours) :]]
    said = ["".join(o["text"]) for c in code for o in c["outputs"] if o["output_type"] == "stream"]
    assert [block.rstrip("\n") for block in fences(text, "text")] == [block.rstrip("\n") for block in said]
    assert text.count("> 折叠的单元。") == len(code) - len(visible)


def test_each_term_of_the_glossary_stands_where_the_glossary_says():
    text = (ZH / "glossary.md").read_text(encoding="utf-8")
    rows = [line[2:-2].split(" | ") for line in text.splitlines() if re.match(r"\| (?!术语)\S+ ", line)]
    assert 60 <= len(rows) <= 80 and all(len(row) == 4 for row in rows)
    terms = [row[0] for row in rows]
    assert terms == sorted(set(terms), key=str.casefold)
    for term, name, definition, where in rows:
        assert re.search("[\u4e00-\u9fff]", name) and re.fullmatch(r"[^。]+。", definition), term
        file = (ZH / re.fullmatch(r"\[[^\]]+\]\(([^)#]+)\)", where)[1]).resolve()
        words = file.read_text(encoding="utf-8") if file.suffix == ".md" else markdown(file.stem)
        assert re.search(r"(?<![A-Za-z])" + r"[\s-]+".join(re.split("[ -]", term)), words, re.I), f"{term}: {file}"


@pytest.mark.parametrize("page", sorted(ZH.glob("*.md")), ids=lambda page: page.stem)
def test_punctuation_is_chinese_beside_chinese(page):
    text = re.sub(r"`[^`\n]*`|\$[^$]+\$|\]\([^)\s]+\)", "", FENCE.sub("", page.read_text(encoding="utf-8")))
    assert not re.findall(r".{0,9}[\u4e00-\u9fff][,;:?!.(].{0,9}", text)
    assert not re.findall(r".{0,9}(?:[\u4e00-\u9fff][A-Za-z\d]|[A-Za-z\d][\u4e00-\u9fff]).{0,9}", text), (
        "a space is missing"
    )


@pytest.fixture(scope="module")
def generator():
    """docs/paper_map.py, which writes the pages of the map."""
    return loaded(TOP / "docs" / "paper_map.py")


def test_each_statement_of_the_map_is_translated_in_its_order_with_its_numbers(generator):
    claims = paper_map.claims()
    found = generator.statements(claims)
    assert list(found) == [claim.id for claim in claims]
    for claim in claims:
        text = found[claim.id]
        # "7, 13 and 65 billion" are three numbers of billions, each of which has its own unit in Chinese
        says = re.sub(r"\b(\d+)(?=(?:(?:,| and) \d+)+ billion)", r"\1 billion", claim.says)
        assert numbers(text) == numbers(says), claim.id
        assert re.search("[\u4e00-\u9fff].*。$", text) and text == text.strip(), claim.id


def test_the_chinese_map_has_each_entry_with_its_verdict_and_a_link_to_the_english_one(generator):
    text = (ZH / "papers.md").read_text(encoding="utf-8")
    assert text == generator.chinese_papers(paper_map.claims())
    claims = [claim for paper in paper_map.PAPERS for claim in paper_map.claims() if claim.paper == paper]
    ids = [claim.id for claim in claims]
    assert re.findall(r'<a id="([\w-]+)"></a>', text) == re.findall(r"\]\(\.\./papers\.md#([\w-]+)\)", text) == ids
    verdicts = re.findall(r"^- <a id=.+ · \*(.+)\*\\$", text, re.M)
    assert verdicts == [generator.CHINESE[claim.verdict] for claim in claims]
    assert re.findall(r"^  结果：(.+)\\$", text, re.M) == [claim.number for claim in claims if claim.number]
    headings = [(generator.chinese(paper), generator.chinese(what)) for paper, what in paper_map.PAPERS.items()]
    assert re.findall(r"^## (.+)（(.+)）$", text, re.M) == headings
    assert all("arXiv" in what or re.search("[\u4e00-\u9fff]", name + what) for name, what in headings)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda text: text.replace("lora-eq-1 =", "lora-eq-0 ="), r"lora-eq-1: expected .* \(it is missing\)$"),
        (lambda text: text + 'lora-eq-0 = "一"\n', "lora-eq-0: the map has no entry of this id$"),
        (
            lambda text: re.sub("lora-eq-1 = .*", 'lora-eq-1 = " "', text),
            "lora-eq-1: expected the statement in Chinese$",
        ),
        (lambda text: re.sub("lora-eq-1 = .*", "lora-eq-1 = 3", text), "lora-eq-1: expected the statement in Chinese$"),
        (lambda text: text + "[other]\n", r"expected one table, \[statements\], and nothing else$"),
        (lambda text: "", r"expected one table, \[statements\], and nothing else$"),
        (lambda text: "[statements", "expected TOML: "),
    ],
)
def test_statements_that_do_not_fit_the_map_are_refused_in_a_sentence(change, words, generator, tmp_path):
    path = tmp_path / "map.toml"
    path.write_text(change((ZH / "map.toml").read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(ValueError, match=r"^docs/zh/map\.toml: " + words):
        generator.statements(paper_map.claims(), path)


def test_a_stale_or_refused_chinese_page_is_said(generator, tmp_path, monkeypatch, capsys):
    shutil.copy(TOP / "README.md", tmp_path)
    tmp_path = tmp_path / "docs"
    (tmp_path / "zh").mkdir(parents=True)
    shutil.copy(ZH / "README.md", tmp_path / "zh")
    monkeypatch.setattr(generator, "DOCS", tmp_path)
    assert generator.main([]) == 0 and generator.main(["--check"]) == 0
    assert (tmp_path / "zh" / "papers.md").read_bytes() == (ZH / "papers.md").read_bytes()
    (tmp_path / "zh" / "papers.md").write_text("# 论文地图\n", encoding="utf-8")
    capsys.readouterr()
    assert generator.main(["--check"]) == 1
    assert capsys.readouterr().err == "docs/zh/papers.md is not what the map gives; run `python docs/paper_map.py`\n"
    claims = paper_map.claims()
    monkeypatch.setattr(generator.paper_map, "claims", lambda: claims[1:])
    assert generator.main([]) == 1
    assert capsys.readouterr().err == f"docs/zh/map.toml: {claims[0].id}: the map has no entry of this id\n"


def test_what_differs_is_noticed():
    assert numbers("65 billion weights, 1½ hours, 1,290 bytes in float32") == numbers(
        "650 亿个权重，1½ 小时，float32 的 1,290 字节"
    )
    assert numbers("0.0321 ± 0.0020") != numbers("0.0321 ± 0.0021") and numbers("2 steps") != numbers("两步")
    assert numbers("98,304 of 98,304") == {Decimal(98304): 2} and not numbers("[x](a/12.md)\n```text\n3\n```\n")
    assert levels("# a\n\n## b\n\n```bash\n# c\n```\n") == [1, 2]
    assert without_comments("a = 1  # one") == without_comments("a = 1") != without_comments("a = 2")
    assert spans("`a` and $x$ and $x$") == (Counter(["a"]), Counter({"$x$": 2}))
