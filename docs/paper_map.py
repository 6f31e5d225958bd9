"""Write the pages of the paper map, docs/papers.md and docs/errata.md, from tinylora/papers/map.toml.

    python docs/paper_map.py            write both
    python docs/paper_map.py --check    write nothing; say which of them is not what the map gives

The book adds a filter to papers.md (docs/_static/map.js). It reads the lines that are written here: an entry is an item of a list,
which begins with its place in bold and its verdict in italics.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

from tinylora.models.files import atomic
from tinylora.papers import map as paper_map

DOCS = Path(__file__).resolve().parent
NOTE = "<!-- written by docs/paper_map.py from tinylora/papers/map.toml -->"


def places(claim):
    """The line of an entry that names its code, its tests and its sections, of which the book makes links."""
    named = [("Code", claim.code), ("Tests", claim.test), ("Derived in", claim.notebook)]
    return " · ".join(f"{what}: " + ", ".join(f"`{place}`" for place in found) for what, found in named if found)


def entry(claim, verdict=True):
    """An entry as an item of a list, with its id as an anchor."""
    head = f'<a id="{claim.id}"></a>**{claim.place}** · {claim.kind}' + f" · *{claim.verdict}*" * verdict
    found = f"Found: {claim.number}. {claim.why}" if claim.number else claim.why
    return "\\\n  ".join(["- " + head, claim.says, found, *([line] if (line := places(claim)) else [])])


def counts(claims):
    """The table of how many entries of each paper have each verdict."""
    found = Counter((claim.paper, claim.verdict) for claim in claims)
    papers = [paper for paper in paper_map.PAPERS if any(claim.paper == paper for claim in claims)]
    rows = [["", *paper_map.VERDICTS, "all"], ["---"] * (len(paper_map.VERDICTS) + 2)]
    for name, chosen in [*((paper, (paper,)) for paper in papers), ("**all**", papers)]:
        numbers = [sum(found[paper, verdict] for paper in chosen) for verdict in paper_map.VERDICTS]
        rows.append([name, *map(str, numbers), str(sum(numbers))])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def listed(claims, verdict=True):
    """The entries in lists, one below the heading of each paper."""
    parts = []
    for paper, what in paper_map.PAPERS.items():
        own = [entry(claim, verdict) for claim in claims if claim.paper == paper]
        if own:
            name = paper[0].upper() + paper[1:]
            parts += [f"## {name} ({what})", "\n".join(own)]
    return parts


def papers(claims):
    """The text of docs/papers.md."""
    return page(
        "# The paper map",
        f"The map has {len(claims)} equations, tables, figures and claims of the two papers, of what came after them, and of the "
        "code, each with its verdict. A verdict is held by the tests that the entry names. The statements are in our words.",
        "- *Holds exactly*: it is arithmetic or algebra, and it comes out, to the printed digits or to a float's rounding.\n"
        "- *Holds at toy scale*: it was seen on a toy or on a small model, which cannot confirm what is said of a large one. "
        'An entry whose explanation begins with "In part" was seen in part.\n'
        "- *Does not follow*: it comes out otherwise, here or by the paper's own numbers. "
        "Slips among these are listed under [errata](errata.md).\n"
        "- *Cannot be checked here*: no test decides it. The entry says what is missing, and what was measured.",
        counts(claims),
        *listed(claims),
    )


def errata(claims):
    """The text of docs/errata.md."""
    slips = [claim for claim in claims if claim.erratum]
    return page(
        "# Errata",
        f"These {len(slips)} statements of the papers, and of the code that came with them, are slips. Each says what stands there, "
        "what comes out instead, and which test shows it. An entry is cited by its address, which does not change. "
        "All of them are on [the paper map](papers.md), too.",
        *listed(slips, verdict=False),
    )


def page(title, *parts):
    """A page of Markdown."""
    return "\n\n".join([title, NOTE, *parts]) + "\n"


def main(argv=None):
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a page is stale")
    args = parser.parse_args(argv)
    stale = 0
    try:
        claims = paper_map.claims()
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    for name, text in (("papers.md", papers(claims)), ("errata.md", errata(claims))):
        target = DOCS / name
        if args.check:
            if not target.exists() or target.read_text(encoding="utf-8") != text:
                print(f"docs/{name} is not what the map gives; run `python docs/paper_map.py`", file=sys.stderr)
                stale = 1
            continue
        with atomic(target) as temporary:
            Path(temporary).write_text(text, encoding="utf-8", newline="\n")
        print(f"docs/{name}: {text.count('<a id=')} entries")
    return stale


if __name__ == "__main__":
    sys.exit(main())
