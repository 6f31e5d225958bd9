"""The map of the papers names only what is there, and says what the tables, the experiments and the README say."""

import ast
import re
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from scripts import loaded

from tinylora.costs import memory
from tinylora.papers import claims, map

TOP = Path(__file__).parents[2]
CLAIMS = map.claims()
BY_ID = {claim.id: claim for claim in CLAIMS}


# ------------------------------------------------------------------------------------------------------------- what it points to
@cache
def names(file):
    """The functions, classes, methods and constants that a Python file defines, methods as Class.method."""
    found = set()

    def visit(body, prefix):
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(prefix + node.name)
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found.update(prefix + n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name))

    visit(ast.parse((TOP / file).read_text(encoding="utf-8")).body, "")
    return found


def test_the_map_is_about_as_large_as_the_ledger():
    assert len(CLAIMS) >= 90 and len(BY_ID) == len(CLAIMS)
    assert {claim.paper for claim in CLAIMS} == set(map.PAPERS)
    assert {claim.kind for claim in CLAIMS} == set(map.KINDS)
    assert {claim.verdict for claim in CLAIMS} == set(map.VERDICTS)


def test_every_id_begins_with_its_paper():
    for claim in CLAIMS:
        if claim.paper in ("LoRA", "QLoRA", "AF4", "BOF4"):
            assert claim.id.startswith(claim.paper.lower() + "-"), claim.id


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.id)
def test_what_an_entry_names_exists(claim):
    for place in claim.code:
        file, _, name = place.partition(":")
        assert (TOP / file).is_file(), place
        assert not name or name in names(file), place
    for place in claim.test:
        file, _, name = place.partition("::")
        assert (TOP / file).is_file() and name in names(file), place
    for place in claim.notebook:
        stem, _, section = place.partition("#")
        source = (TOP / "notebooks" / f"{stem}.py").read_text(encoding="utf-8")
        assert re.search(rf"^# ## {section} · ", source, re.M), place
    for places in (claim.code, claim.test, claim.notebook):
        assert len(set(places)) == len(places)


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.id)
def test_an_entry_is_said_in_sentences(claim):
    for text in (claim.says, claim.why):
        assert text.endswith(".") and text == text.strip() and "  " not in text, text
    assert not claim.number.endswith(".") and claim.number == claim.number.strip()
    assert not claim.erratum or claim.verdict == "does not follow"


# ---------------------------------------------------------------------------------------------------------- what it must agree with
def entries_of(function):
    """The entries whose code is this function."""
    place = f"{Path(function.__code__.co_filename).resolve().relative_to(TOP)}:{function.__name__}"
    return [claim for claim in CLAIMS if place in claim.code]


def verdicts_of_the_page():
    """{title of an experiment: the first words of its verdict}, as figures/claims/README.md has them."""
    page = (TOP / "figures" / "claims" / "README.md").read_text(encoding="utf-8")
    sections = (section.partition("\n") for section in page.split("\n## ")[1:])
    return {title: re.search(r"\* verdict: \*\*(.+?)\*\*", body)[1] for title, _, body in sections}


@pytest.mark.parametrize("name", claims.EXPERIMENTS)
def test_every_experiment_is_on_the_map_with_its_verdict(name):
    experiment = claims.EXPERIMENTS[name]
    found, word = entries_of(experiment.function), verdicts_of_the_page()[experiment.title]
    assert found and word in ("holds", "holds in part", "fails")
    for claim in found:
        in_part = claim.why.startswith("In part: ")
        if word == "holds":
            assert claim.verdict in ("holds exactly", "holds at toy scale") and not in_part
        elif word == "fails":
            assert claim.verdict == "does not follow" and not in_part
        else:  # in part: an entry may be on the part that holds, or on the part that does not
            assert claim.verdict in ("holds at toy scale", "does not follow") and in_part


def test_in_part_is_said_of_experiments_alone():
    measured = {claim.id for e in claims.EXPERIMENTS.values() for claim in entries_of(e.function)}
    assert {claim.id for claim in CLAIMS if claim.why.startswith("In part")} <= measured


NUMBER = r"(?<![^\W\d])\d+(?:[.,]\d+)*"  # not the digit of a name: NF4


@pytest.mark.parametrize("i", range(5))
def test_the_readmes_findings_have_the_numbers_and_the_verdicts_of_the_map(i):
    section = (TOP / "README.md").read_text(encoding="utf-8").partition("## Five findings")[2].partition("\n## ")[0]
    findings = [line[2:] for line in section.splitlines() if line.startswith("- ")]
    assert len(findings) == 5
    named = re.findall(r"\[([a-z\d-]+)\]\(docs/papers\.md#([a-z\d-]+)\) ([a-z ]+)", findings[i])
    assert named and all(name == anchor and BY_ID[name].verdict == verdict for name, anchor, verdict in named)
    on_the_map = re.findall(NUMBER, " ".join(BY_ID[name].number for name, *_ in named))
    said = re.findall(NUMBER, re.sub(r"\s*\(\[.*$", "", findings[i]))
    assert said and set(said) <= set(on_the_map), findings[i]


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """docs/paper_map.py, which writes into a folder of its own."""
    found = loaded(TOP / "docs" / "paper_map.py")
    (tmp_path / "docs" / "zh").mkdir(parents=True)
    for readme in ("README.md", "docs/zh/README.md"):
        shutil.copy(TOP / readme, tmp_path / readme)
    monkeypatch.setattr(found, "DOCS", tmp_path / "docs")
    return found


def test_a_finding_follows_the_map_into_both_readmes(pages, tmp_path, monkeypatch, capsys):
    changed = tuple(
        replace(c, number="9.9999 ± 0.0001 bits per byte behind it", verdict="holds at toy scale")
        if c.id == "lora-on-par"
        else c
        for c in CLAIMS
    )
    monkeypatch.setattr(pages.paper_map, "claims", lambda: changed)
    assert pages.main(["--check"]) == 1
    said = capsys.readouterr().err
    assert (
        "\nREADME.md is not what the map gives; run `python docs/paper_map.py`\n" in said
        and "\ndocs/zh/README.md is not" in said
    )
    assert pages.main([]) == 0 and pages.main(["--check"]) == 0
    for readme, verdict in (("README.md", "holds at toy scale"), ("docs/zh/README.md", "在小规模上成立")):
        text, before = ((folder / readme).read_text(encoding="utf-8") for folder in (tmp_path, TOP))
        assert "9.9999 ± 0.0001" in text and f"papers.md#lora-on-par) {verdict}" in text
        assert sum(a != b for a, b in zip(text.splitlines(), before.splitlines(), strict=True)) == 1


@pytest.mark.parametrize(
    "old, new, words",
    [
        (
            "{lora-on-par: # bits",
            "{lora-on-par: # bytes",
            r"\{lora-on-par: # bytes .*\}: expected an entry of the map, and words that fit .* \(they fit 0\)$",
        ),
        ("{lora-on-par: #", "{lora-no: #", r"\{lora-no: # .*\}: expected an entry of the map, and words that fit"),
        (
            "{lora-on-par: # bits per byte behind}",
            "{lora-on-par: so}",
            r"\{lora-on-par: so\}: expected .* \(they fit 0\)$",
        ),
        ("{lora-table-6-embedded: least r = #}", "{lora-table-6-embedded: r = #}", r".* \(they fit 2\)$"),
        ('["lora-table-6-embedded"]', '["lora-no"]', "lora-no: expected entries of the map$"),
    ],
)
def test_a_finding_that_the_map_does_not_give_is_refused_in_a_sentence(old, new, words, pages, tmp_path):
    path = tmp_path / "findings.toml"
    path.write_text(pages.FINDINGS.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    with pytest.raises(ValueError, match=r"^findings\.toml: " + words):
        pages.findings(CLAIMS, path)


def test_a_finding_follows_its_words_and_fails_without_them(pages):
    one = BY_ID["lora-table-6-embedded"]
    turned = "2.4601 ± 0.0068 bits per byte at the largest r = 64, and 2.5931 ± 0.0019 at the least r = 1"
    altered = [
        tuple(replace(c, number=number) if c is one else c for c in CLAIMS) for number in (turned, "0.0035 at r = 1")
    ]
    assert pages.findings(altered[0]) == pages.findings(CLAIMS)
    with pytest.raises(ValueError, match="they fit 0"):
        pages.findings(altered[1])


def test_what_is_nearly_right_is_no_erratum_and_the_pages_say_so(pages):
    found = [claim for claim in CLAIMS if pages.nearly(claim)]
    assert {"lora-unmerge", "lora-abstract-10000", "qlora-elo"} <= {claim.id for claim in found}
    assert not any(claim.erratum for claim in found)
    text, chinese = (pages.papers(CLAIMS), pages.chinese_papers(CLAIMS))
    assert '"roughly right" or "nearly right" is imprecise and no slip' in text
    assert chinese.count("  这一陈述大致正确") == len(found)


def test_a_readme_without_the_list_is_refused(pages):
    with pytest.raises(ValueError, match="expected a heading, 'Five findings', with a paragraph and a list below it"):
        pages.with_findings("# x\n\n## Findings\n\n- a\n\n## y\n", "Five findings", ["- b"])
    assert (
        pages.with_findings("\n## F\n\nx\n\n- a\n\n## y\n", "F", ["- b", "- c"]) == "\n## F\n\nx\n\n- b\n- c\n\n## y\n"
    )


@pytest.mark.parametrize("name", ["qlora-16-bit", "lora-on-par", "lora-table-6-embedded", "qlora-fig-2", "qlora-fig-4"])
def test_what_no_test_repeats_has_the_numbers_of_the_figures(name):
    page = (TOP / "figures" / "README.md").read_text(encoding="utf-8")
    printed = re.findall(r"\d\.\d{4} ± \d\.\d{4}", BY_ID[name].number)
    assert printed and all(number in page for number in printed)


def test_the_activations_of_finding_4_are_those_that_the_account_predicts():
    """8 × 256 tokens of the embedded model: QLoRA, full fine-tuning, QLoRA with checkpointing."""
    setting = {"batch_size": 8, "seq_len": 256, "r": 16}
    lora, qlora, full = (memory.predict("base", method, **setting).activations for method in ("lora", "qlora", "full"))
    rebuilt = memory.predict("base", "qlora", checkpointing=True, **setting).activations
    assert (qlora, lora, rebuilt) == (172_007_424, 172_007_424, 45_645_824)
    number = BY_ID["qlora-activations"].number
    assert (
        number.startswith(f"{qlora / 1e6:.0f} MB")
        and f" {full / 1e6:.0f} MB" in number
        and f" {rebuilt / 1e6:.1f} MB" in number
    )


# ------------------------------------------------------------------------------------------------------------------------ reading
GOOD = {
    "id": '"lora-eq-1"', "paper": '"LoRA"', "place": '"eq. 1"', "kind": '"equation"', "says": '"It holds."',
    "test": '["tests/test_ops.py::test_x"]', "verdict": '"holds exactly"', "number": '""', "why": '"It does."',
}  # fmt: skip


def written(tmp_path, *entries):
    tables = ["[[claim]]\n" + "\n".join(f"{key} = {value}" for key, value in entry.items()) for entry in entries]
    path = tmp_path / "map.toml"
    path.write_text("\n\n".join(tables), encoding="utf-8")
    return path


def test_a_map_is_read_in_its_order_and_missing_lists_are_empty(tmp_path):
    other = {**GOOD, "id": '"a-2"', "verdict": '"cannot be checked here"', "test": "[]", "erratum": "true"}
    first, second = map.read(written(tmp_path, GOOD, other))
    assert (first.id, first.test, first.code, first.erratum) == ("lora-eq-1", ("tests/test_ops.py::test_x",), (), False)
    assert (second.id, second.test, second.erratum) == ("a-2", (), True)
    assert map.claims() is CLAIMS


@pytest.mark.parametrize(
    "change, words",
    [
        ({"verdict": '"maybe"'}, "lora-eq-1: verdict = 'maybe', expected one of holds exactly, holds at toy scale"),
        ({"paper": '"GPT"'}, "lora-eq-1: paper = 'GPT', expected one of LoRA, QLoRA"),
        ({"kind": '"lemma"'}, "lora-eq-1: kind = 'lemma', expected one of equation"),
        ({"why": None}, r"lora-eq-1: why: expected a text \(it is missing\)"),
        ({"number": None}, r"lora-eq-1: number: expected a text \(it is missing\)"),
        ({"says": '" "'}, "lora-eq-1: says: expected a text$"),
        ({"number": "3"}, "lora-eq-1: number: expected a text$"),
        ({"remark": '"x"'}, "lora-eq-1: remark: there is no such field; they are id, paper"),
        ({"erratum": '"yes"'}, "lora-eq-1: erratum = 'yes', expected true or false"),
        ({"test": "[]"}, "lora-eq-1: test: expected one or more, as the verdict is 'holds exactly'"),
        ({"test": '"tests/test_ops.py::test_x"'}, "lora-eq-1: test = .*, expected a list, each of it tests/"),
        ({"test": '["test_ops.py"]'}, "lora-eq-1: test = .*, expected a list"),
        ({"code": '["tinylora.ops"]'}, r"lora-eq-1: code = \['tinylora.ops'\], expected a list, each of it a file"),
        ({"notebook": '["05"]'}, "lora-eq-1: notebook = .*, each of it NN_name#section"),
        ({"id": '"Eq 1"'}, "claim 1: id: expected lower-case letters"),
        ({"id": None}, "claim 1: id: expected lower-case letters"),
    ],
)
def test_a_bad_entry_gets_a_sentence_with_its_id_and_field(change, words, tmp_path):
    entry = {key: value for key, value in {**GOOD, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=words):
        map.read(written(tmp_path, entry))


def test_an_id_that_stands_twice_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"map\.toml: lora-eq-1: the id stands twice"):
        map.read(written(tmp_path, GOOD, GOOD))


@pytest.mark.parametrize("text", ["", "x = 1", "[[claim", "claim = 3", "[claim]\nid = 'a'", "claim = [1]"])
def test_what_is_no_map_is_refused(text, tmp_path):
    path = tmp_path / "map.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"^map\.toml: .*expected"):
        map.read(path)


def test_the_pages_are_what_the_map_gives(capsys):
    pages = loaded(TOP / "docs" / "paper_map.py")
    assert pages.main(["--check"]) == 0, capsys.readouterr().err
    text = (TOP / "docs" / "papers.md").read_text(encoding="utf-8")
    assert re.findall(r'<a id="([\w-]+)"></a>', text) == [
        claim.id for paper in map.PAPERS for claim in map.claims() if claim.paper == paper
    ]
    slips = re.findall(r'<a id="([\w-]+)"></a>', (TOP / "docs" / "errata.md").read_text(encoding="utf-8"))
    assert len(slips) == len(set(slips)) == sum(claim.erratum for claim in map.claims())
    one = map.Claim(
        "a-b", "LoRA", "eq. 1", "equation", "It is so.", "holds exactly", "2 bits", "It came out.", ("a/b.py:c",)
    )
    assert pages.entry(one) == (
        '- <a id="a-b"></a>**eq. 1** · equation · *holds exactly* · [a-b](papers.md#a-b)\\\n  It is so.\\\n  Found: 2 bits. It came out.'
        "\n\n  <details><summary>code</summary>\n\n  Code: `a/b.py:c`\n\n  </details>"
    )
