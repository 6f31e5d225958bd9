"""Write what comes from tinylora/papers/map.toml: docs/papers.md, docs/errata.md, docs/zh/papers.md, and the findings of both READMEs.

    python docs/paper_map.py            write the five
    python docs/paper_map.py --check    write nothing; say which of them is not what the map gives

The book adds a filter to papers.md (docs/_static/map.js). It reads the lines that are written here: an entry is an item of a list,
which begins with its place in bold and its verdict in italics, ends its first line with a link to itself, and folds where it is
computed, tested and derived. The Chinese page has its statements from docs/zh/map.toml, and the findings have their words from
docs/findings.toml.
"""

import argparse
import re
import sys
import tomllib
from collections import Counter
from pathlib import Path

from tinylora.models.files import atomic
from tinylora.papers import map as paper_map

DOCS = Path(__file__).resolve().parent
NOTE = "<!-- written by docs/paper_map.py from tinylora/papers/map.toml -->"
STATEMENTS = DOCS / "zh" / "map.toml"
FINDINGS = DOCS / "findings.toml"
READMES = ("../README.md", "zh/README.md")
#: A number of an entry, with its spread and a unit that a finding repeats.
QUANTITY = r"(?<![\w.,])\d+(?:[.,]\d+)*(?: ± \d+(?:[.,]\d+)*)?(?: (?:%|MB))?"
#: What `why` says of a statement that is imprecise and no slip.
NEARLY = re.compile(r"\b(?:roughly|nearly) right\b")
CHINESE = {
    "holds exactly": "完全成立",
    "holds at toy scale": "在小规模上成立",
    "does not follow": "不成立",
    "cannot be checked here": "这里无法检验",
    "all": "合计",
    "descendants": "后续方法",
    "the papers that came after LoRA": "LoRA 之后的论文",
    "code": "代码",
    "bitsandbytes, PEFT, loralib, and the authors' script": "bitsandbytes、PEFT、loralib 和论文作者的脚本",
}


def places(claim):
    """The line of an entry that names its code, its tests and its sections, of which the book makes links."""
    named = [("Code", claim.code), ("Tests", claim.test), ("Derived in", claim.notebook)]
    return " · ".join(f"{what}: " + ", ".join(f"`{place}`" for place in found) for what, found in named if found)


def fold(claim):
    """What the line of `places` folds to, such as "code, 2 tests, notebook 03"."""
    tests, sections = len(claim.test), dict.fromkeys(place[:2] for place in claim.notebook)
    parts = ["code"] * bool(claim.code) + [f"{tests} test{'s' * (tests > 1)}"] * bool(tests)
    return ", ".join([*parts, *(f"notebook {name}" for name in sections)])


def entry(claim, verdict=True, page="papers.md"):
    """An entry as an item of a list, with its id as an anchor and as a link to itself."""
    head = f'<a id="{claim.id}"></a>**{claim.place}** · {claim.kind}' + f" · *{claim.verdict}*" * verdict
    found = f"Found: {claim.number}. {claim.why}" if claim.number else claim.why
    text = "\\\n  ".join([f"- {head} · [{claim.id}]({page}#{claim.id})", claim.says, found])
    if not (line := places(claim)):
        return text
    return f"{text}\n\n  <details><summary>{fold(claim)}</summary>\n\n  {line}\n\n  </details>"


def chinese(word):
    """A verdict or the name of a paper in Chinese; names such as LoRA stay."""
    return CHINESE.get(word, word)


def statements(claims, path=STATEMENTS):
    """{id: what the claim says, in Chinese}; ValueError, in a sentence, where one is missing or belongs to no claim."""
    name = f"docs/zh/{path.name}"
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{name}: expected TOML: {error}") from None
    found = table.pop("statements", None)
    if table or not isinstance(found, dict):
        raise ValueError(f"{name}: expected one table, [statements], and nothing else")
    ids = [claim.id for claim in claims]
    for one in ids:
        if not isinstance(found.get(one), str) or not found[one].strip():
            raise ValueError(
                f"{name}: {one}: expected the statement in Chinese" + " (it is missing)" * (one not in found)
            )
    for one in found:
        if one not in ids:
            raise ValueError(f"{name}: {one}: the map has no entry of this id")
    return found


def chinese_entry(claim, statement):
    """An entry of the Chinese page, with a link to the English one, where its code, tests and sections stand."""
    head = f'<a id="{claim.id}"></a>**{claim.place}** · *{chinese(claim.verdict)}*'
    found = [f"结果：{claim.number}"] if claim.number else []
    if nearly(claim):
        found.append("这一陈述大致正确，只是不精确，不算笔误。")
    return "\\\n  ".join(["- " + head, statement, *found, f"[英文条目](../papers.md#{claim.id})"])


def nearly(claim):
    """Whether an entry does not follow and is nearly right all the same, as `why` says."""
    return claim.verdict == "does not follow" and NEARLY.search(claim.why) is not None


def counts(claims, say=str):
    """The table of how many entries of each paper have each verdict; `say` translates its words."""
    found = Counter((claim.paper, claim.verdict) for claim in claims)
    papers = [paper for paper in paper_map.PAPERS if any(claim.paper == paper for claim in claims)]
    rows = [["", *map(say, paper_map.VERDICTS), say("all")], ["---"] * (len(paper_map.VERDICTS) + 2)]
    for name, chosen in [*((say(paper), (paper,)) for paper in papers), (f"**{say('all')}**", papers)]:
        numbers = [sum(found[paper, verdict] for paper in chosen) for verdict in paper_map.VERDICTS]
        rows.append([name, *map(str, numbers), str(sum(numbers))])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def listed(claims, item=entry, heading="## {} ({})", say=str):
    """The entries in lists, each written by `item`, one list below the heading of each paper; `say` translates the heading."""
    parts = []
    for paper, what in paper_map.PAPERS.items():
        own = [item(claim) for claim in claims if claim.paper == paper]
        if own:
            name = say(paper)
            parts += [heading.format(name[0].upper() + name[1:], say(what)), "\n".join(own)]
    return parts


def papers(claims):
    """The text of docs/papers.md."""
    return page(
        "# The paper map",
        f"The map has {len(claims)} equations, tables, figures and claims of the two papers, of what came after them, and of the "
        "code, each with its verdict. A verdict is held by the tests that the entry names. The statements are in our words.",
        "<details><summary>What the four verdicts mean, and how often each is given</summary>",
        "- *Holds exactly*: it is arithmetic or algebra, and it comes out, to the printed digits or to a float's rounding.\n"
        "- *Holds at toy scale*: it was seen on a toy or on a small model, which cannot confirm what is said of a large one. "
        'An entry whose explanation begins with "In part" was seen in part.\n'
        "- *Does not follow*: it comes out otherwise, here or by the paper's own numbers. "
        "Slips among these are listed under [errata](errata.md). "
        'An entry whose explanation has "roughly right" or "nearly right" is imprecise and no slip, and is not listed there.\n'
        "- *Cannot be checked here*: no test decides it. The entry says what is missing, and what was measured.",
        counts(claims),
        "</details>",
        *listed(claims),
    )


def errata(claims):
    """The text of docs/errata.md."""
    slips = [claim for claim in claims if claim.erratum]
    return page(
        "# Errata",
        f"These {len(slips)} statements of the papers, and of the code that came with them, are slips. Each says what stands there, "
        "what comes out instead, and which test shows it. An entry is cited by the address of its link, which does not change. "
        "All of them are on [the paper map](papers.md), too.",
        *listed(slips, lambda claim: entry(claim, verdict=False, page="errata.md")),
    )


def chinese_papers(claims):
    """The text of docs/zh/papers.md."""
    found = statements(claims)
    return page(
        "# 论文地图",
        f"本页列出 {len(claims)} 个公式、表、图和论断，它们出自两篇论文、后续的论文和代码，每一条都附有结论。陈述用的是我们自己的话，"
        "结论由测试保证。位置和结果保留英文。每一条都链接到[英文论文地图](../papers.md)中的同一条，"
        "那里有理由、代码、测试和推导它的章节。[返回中文 README](README.md)。",
        "- *完全成立*：这是算术或代数，结果相符，精确到印出的数位或浮点数的舍入。\n"
        "- *在小规模上成立*：在玩具问题或小模型上观察到了，这不能证实关于大模型的说法。"
        "如果英文条目的说明以“In part”开头，就只观察到了一部分。\n"
        "- *不成立*：得出的结果不同，可能是在这里的计算中，也可能是按论文自己的数字。其中的笔误和差错列在[勘误](../errata.md)中（英文）。"
        "标明“大致正确”的陈述只是不精确，不算笔误，也不列在勘误中。\n"
        "- *这里无法检验*：没有测试能够判定它。英文条目说明缺少什么，以及测量了什么。",
        counts(claims, chinese),
        *listed(claims, lambda claim: chinese_entry(claim, found[claim.id]), "## {}（{}）", chinese),
    )


def findings(claims, path=FINDINGS):
    """The findings in English and in Chinese: ([item of a list, …], […]); ValueError, in a sentence, for one that the map does not give."""
    by_id = {claim.id: claim for claim in claims}

    def quantity(match):
        entry, words = match.groups()
        pattern = words.replace("#", f"({QUANTITY})")
        found = re.findall(pattern, by_id[entry].number) if entry in by_id else []
        if "#" not in words or len(found) != 1:
            raise ValueError(
                f"{path.name}: {match[0]}: expected an entry of the map, and words that fit one of its quantities "
                f"(they fit {len(found)})"
            )
        return found[0]

    english, chinese_ones = [], []
    for finding in tomllib.loads(path.read_text(encoding="utf-8"))["finding"]:
        named = [by_id[entry] for entry in finding["entries"] if entry in by_id]
        if len(named) < len(finding["entries"]):
            raise ValueError(f"{path.name}: {', '.join(finding['entries'])}: expected entries of the map")
        says, says_chinese = (
            re.sub(r"\{([a-z\d-]+): ([^{}]+)\}", quantity, finding[of]) for of in ("english", "chinese")
        )
        links = ", ".join(f"[{text}]({target})" for text, _, target in finding["links"])
        links_chinese = "，".join(f"[{text}](../../{target})" for _, text, target in finding["links"])
        verdicts = ", ".join(f"[{c.id}](docs/papers.md#{c.id}) {c.verdict}" for c in named)
        verdicts_chinese = "，".join(f"[{c.id}](../papers.md#{c.id}) {chinese(c.verdict)}" for c in named)
        whose = "the paper's claim" if len(named) == 1 else "the papers' claims"
        english.append(f"- {says} ({links}; {whose}: {verdicts})")
        chinese_ones.append(f"- {says_chinese}（{links_chinese}；论文的论断：{verdicts_chinese}）")
    return english, chinese_ones


def with_findings(readme, heading, items):
    """A README in which the list below this heading has these items."""
    before, mark, rest = readme.partition(f"\n## {heading}\n")
    section, end, after = rest.partition("\n## ")
    kept = [line for line in section.splitlines() if not line.startswith("- ")]
    if not mark or not end or kept[-1:] != [""]:
        raise ValueError(f"README: expected a heading, {heading!r}, with a paragraph and a list below it")
    return before + mark + "\n".join([*kept, *items, ""]) + end + after


def page(title, *parts):
    """A page of Markdown."""
    return "\n\n".join([title, NOTE, *parts]) + "\n"


def _said(name):
    """A page's path from the top of the repository."""
    return f"docs/{name}".replace("docs/../", "")


def main(argv=None):
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a page is stale")
    args = parser.parse_args(argv)
    stale = 0
    try:
        claims = paper_map.claims()
        pages = {"papers.md": papers(claims), "errata.md": errata(claims), "zh/papers.md": chinese_papers(claims)}
        for name, heading, items in zip(READMES, ("Five findings", "五个发现"), findings(claims), strict=True):
            pages[name] = with_findings((DOCS / name).read_text(encoding="utf-8"), heading, items)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    for name, text in pages.items():
        target = DOCS / name
        if args.check:
            if not target.exists() or target.read_text(encoding="utf-8") != text:
                print(f"{_said(name)} is not what the map gives; run `python docs/paper_map.py`", file=sys.stderr)
                stale = 1
            continue
        with atomic(target) as temporary:
            Path(temporary).write_text(text, encoding="utf-8", newline="\n")
        what = "5 findings" if name in READMES else f"{text.count('<a id=')} entries"
        print(f"{_said(name)}: {what}")
    return stale


if __name__ == "__main__":
    sys.exit(main())
