"""Whether the map of the papers and what is computed agree: the statements and verdicts of `tinylora count` and `memory --audit`.

    entries(audit)              the entries of the map that an audit's rows are about, each with its rows
    bears_out(claim, rows)      the verdict that the rows give: "holds", "does not follow", or "cannot be checked here"
    missing(…), miscounted(…)   the numbers of an entry that were not computed
    contradictions(audit)       both, for all entries, as sentences
    text(audit)                 the entries as text

What is computed: from the verdicts of an entry's rows its own. One row that does not follow is enough; what only a run could tell cannot
be checked; the rest holds. "roughly" beside a printed number holds only where the statement says "roughly" or "about". Whether it holds
exactly or at toy scale is not in the numbers: the map says it. Then each number that the map prints is looked for among what was computed.

What is said: place, statement, verdict, number and reason are those of map.toml, which is read here and nowhere on the way to `import
tinylora`. What was derived beside the rows follows them. A map that says otherwise than the rows is named, entry by entry.
"""

import re
from collections import Counter
from dataclasses import dataclass

from . import map as paper_map
from .verdict import FAILS, HOLDS, Claim

EXACTLY_OR_TOY, HOLDING, NEARLY = paper_map.VERDICTS[:2], HOLDS[True], re.compile(r"\b(roughly|about)\b")
#: A number of a text, not the digit of a name (NF4), with the word before it where that makes it a bound.
NUMBER = re.compile(r"(below |within |at most |at least )?(?<![^\W\d])(\d+(?:[.,]\d+)*(?:e-?\d+)?)")


@dataclass(frozen=True)
class Audit:
    """The rows of an audit, and what belongs to them."""

    rows: list  # of verdict.Row, each with the id of its entry
    whole: str  # the id of the entry that is about all of them
    derived: list = ()  # [(ids of entries, sentence, or None where the rows do not bear it out)]
    beside: list = ()  # rows that are not counted with the others


def entries(audit):
    """[(entry, its rows)] in the map's order. ValueError for an id that the map lacks."""
    claims, rows = paper_map.claims(), [*audit.rows, *audit.beside]
    lacking = {row.claim for row in rows} | {audit.whole, *(one for ids, _ in audit.derived for one in ids)}
    if lacking := lacking - {"", *(claim.id for claim in claims)}:
        raise ValueError(f"map.toml: expected an entry {', '.join(sorted(lacking))}, which rows of the audit are about")
    found = [(c, list(audit.rows) if c.id == audit.whole else [r for r in rows if r.claim == c.id]) for c in claims]
    return [(claim, own) for claim, own in found if own]


def bears_out(claim, rows):
    """The verdict of an entry by its rows."""
    found = {_by_row(row, claim) for row in rows}
    return next(word for word in (FAILS, paper_map.CANNOT, HOLDING) if word in found)


def _by_row(row, claim):
    if row.verdict == "not derivable":
        return paper_map.CANNOT
    rough = row.verdict == "roughly" and not isinstance(row, Claim) and not NEARLY.search(claim.says)
    return FAILS if rough or row.verdict in (FAILS, HOLDS[False]) else HOLDING


def missing(claim, rows, said=""):
    """The numbers that the map prints for an entry, and that neither its rows, nor its statement, nor what is `said` of them have."""
    text = " ".join([claim.place, claim.says, said, *(f"{r.printed} {r.setting} {r.note}" for r in rows)])
    there = {number for _, number in NUMBER.findall(text)}
    computed = [r.computed for r in rows if r.computed is not None]
    apart = [r.difference for r in rows if r.difference is not None]
    several = [len(rows), *Counter(r.verdict for r in rows).values()]
    return [
        number
        for bound, number in NUMBER.findall(claim.number)
        if number not in there and not _among(bound, number, [*computed, *([] if bound else (*apart, *several))])
    ]


def miscounted(claim, rows):
    """The numbers of the entry on a whole audit that are neither its rows nor those that do not follow, or do not hold."""
    tallied = Counter(r.verdict for r in rows)
    counted = {len(rows), tallied[FAILS], tallied[HOLDS[False]]}
    return [number for _, number in NUMBER.findall(claim.number) if float(number.replace(",", "")) not in counted]


def _among(bound, number, computed):
    """Whether a number is one of those that were computed, rounded or cut to its digits, or bounds one of them."""
    value = float(number.replace(",", ""))
    sizes = [abs(x) for x in computed]
    if bound:
        return any(x >= value if "least" in bound else x <= value for x in sizes)
    step = 10.0 ** -len(number.partition(".")[2])
    return any(abs(x - value) <= step / 2 * (1 + 1e-9) or 0 <= x - value < step for x in sizes)


def contradictions(audit):
    """What the map says and the rows do not bear out, as sentences. -> [str]"""
    found = []
    for claim, own in entries(audit):
        sentences = [sentence for ids, sentence in audit.derived if claim.id in ids]
        computed = bears_out(claim, own)
        if claim.verdict not in (EXACTLY_OR_TOY if computed == HOLDING else (computed,)):
            found.append(f"{claim.id}: the map says {claim.verdict!r}, and what is computed gives {computed!r}")
        if None in sentences:
            found.append(f"{claim.id}: what was derived from its rows does not come out")
        said = " ".join(filter(None, sentences))
        lacking = miscounted(claim, own) if claim.id == audit.whole else missing(claim, own, said)
        found += [f"{claim.id}: the map has {n}, which was not computed" for n in lacking]
    return found


def text(audit):
    """Each entry with its place, statement, verdict, number and reason; a derived sentence stands below the first of its entries."""
    found = entries(audit)
    verdicts = Counter(claim.verdict for claim, _ in found)
    counted = ", ".join(f"{verdicts[word]} {word}" for word in paper_map.VERDICTS if verdicts[word])
    lines = [f"{len(found)} entries of the paper map (docs/papers.md) are about these numbers: {counted}"]
    for claim, _ in found:
        reason = f"{claim.number}. {claim.why}" if claim.number else claim.why
        lines += ["", f"{claim.place} [{claim.id}]: {claim.says}", f"  {claim.verdict}: {reason}"]
        lines += [f"  computed: {s}" for ids, s in audit.derived if s and ids[0] == claim.id]
    return "\n".join(lines)
