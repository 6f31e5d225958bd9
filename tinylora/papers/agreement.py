"""Whether the map of the papers and what is computed agree: the statements and verdicts of `tinylora count` and `memory --audit`.

    entries(audit)              the entries of the map that an audit's rows are about, each with its rows
    bears_out(claim, rows)      the verdict that the rows give: "holds", "does not follow", or "cannot be checked here"
    missing(…), miscounted(…)   what an entry has in `number`, and was not computed
    misquoted(…)                what it has in `says`, and the audit does not print
    contradictions(audit)       all of these, for all entries, as sentences
    text(audit)                 the entries as text

What is computed: from the verdicts of an entry's rows its own. One row that does not follow is enough; what only a run could tell cannot
be checked; the rest holds. "roughly" beside a printed number holds only where the statement says "roughly" or "about". Whether it holds
exactly or at toy scale is not in the numbers: the map says it.

What is compared: each number in digits of `number`, with its unit. A result is what a row computed, rounded to the digits given (cut to
them where its clause says "cut off"), a difference beside "more", "less", "fewer" or "above", or a number of a sentence that was derived
from the rows. A printed number counts after "as", "gives" and "n of" alone, and a count in "n of m" alone, where m is all rows. Below,
within, at most and at least bound all that was computed, and by a factor of at most 10. What the setting and the note of a row have may
stand beside a result, not for it; a condition such as "at r = 8" is of its result's row. Numbers stand in the order of the rows, or of the
sentence. A number before a word that the row has after a number, such as "512 tokens", is that one. In `says` each number is printed by a
row, or stands in its setting, note or name, or in a derived sentence, in any order; an equation, table or section is one that the rows or
`place` name.

What is not compared: `why`, and words; numbers in words ("four"), signs, names (GPT-3, NF4), powers of 2 in formulas, and, in `says`,
widths of 4, 8, 16 and 32 bits. A number that is another one of its own rows can pass: tests/papers/test_agreement.py changes every digit of
every `number`, and lists what is not noticed.

What is said: place, statement, verdict, number and reason are those of map.toml, which is read here and nowhere on the way to `import
tinylora`. What was derived beside the rows follows them. A map that says otherwise than the rows is named, entry by entry.
"""

import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from . import map as paper_map
from .verdict import FAILS, HOLDS, Claim

EXACTLY_OR_TOY, HOLDING, NEARLY = paper_map.VERDICTS[:2], HOLDS[True], re.compile(r"\b(roughly|about)\b")
#: How far a bound may lie from the computed number that is nearest to it.
TIGHT = 10
_UNITS = {"billion": "B", "x": ""}
#: The sources that are of one row.
_ROWS = ("computed", "difference", "setting", "note")
#: A number of a text with its unit, not the digit of a name (NF4, GPT-3).
NUMBER = re.compile(
    r"(?<!\w)(?<!\w-)(?<!\d[.,])(\d+(?:,\d{3})*(?:\.\d+)?)(e-?\d+)?([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)?"
    r"(?: ?(%|MiB|GiB|kB|MB|GB|TB|M|B|x|billion|bits|σ))?(?!\w)(?: (?!with|from|than|that|which)([a-z]{4,}))?"
)
_POWERS = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
_LIST = re.compile(r" (?:and|or|to|of) |, | … ")
_JOINED = re.compile(r" (?:and|or|to) |, ")
_BOUND = re.compile(r"\b(below|within|at most|at least) ([^\W\d]+/)?$")
_CONDITION = re.compile(r"(?:\b(?:at|with) \w+ = |\bat |blocks of )$")
_PRINTED = re.compile(r"\b(?:as|gives) $")
_QUOTED = re.compile(r"\bprinted (?:as )?[\d.,MB]*(?: and )?$")
_CUT, _APART = re.compile(r"\b(?:cut|truncated)\b"), re.compile(r"\b(?:more|less|fewer|above)\b")
_PLACE = re.compile(r"(§|\b(?:eq\.|equation|tables?|figure|footnote|appendix) )$", re.IGNORECASE)
#: What is no number of its own in a formula.
_FORMULA = re.compile(r"2\^\S*(?: \+ 1)?|\(i \+ 1\)")


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


@dataclass(frozen=True)
class Number:
    """A number of a text."""

    text: str  # as written, without its unit
    value: float
    step: float  # of its last digit
    unit: str  # "" for none; in a list all have the unit of the last
    start: int
    before: str  # of its clause
    clause: str
    between: str  # what stands between it and the number before it in its clause, or None
    word: str  # the word after it, or None
    quotient: bool  # whether it is divided, or divides


@lru_cache(2048)
def numbers(text):
    """The numbers of a text. -> (Number, …)"""
    text = _FORMULA.sub(lambda m: " " * len(m[0]), text)
    found, matches = [], list(NUMBER.finditer(text))
    ends = [m.end() if m[5] is None else m.start(5) - 1 for m in matches]
    units = [_UNITS.get(m[4], m[4]) or "" for m in matches]
    for i in reversed(range(len(matches) - 1)):
        if matches[i][4] is None and _LIST.fullmatch(text[ends[i] : matches[i + 1].start()]):
            units[i] = units[i + 1]
    for i, m in enumerate(matches):
        digits, exponent, power = m.group(1, 2, 3)
        value = float(digits.replace(",", "") + (exponent or ""))
        first = text.rfind("; ", 0, m.start()) + 1
        before = text[first : m.start()]
        inside = i and ends[i - 1] > first
        found.append(
            Number(
                text=digits + (exponent or "") + (power or ""),
                value=value ** int(power.translate(_POWERS)) if power and value else value,
                step=10.0 ** (int((exponent or "e0")[1:]) - len(digits.partition(".")[2])),
                unit=units[i],
                start=m.start(),
                before=before,
                clause=text[first:].partition("; ")[0],
                between=text[ends[i - 1] : m.start()] if inside else None,
                word=m[5],
                quotient=before.endswith(("/", "/ ")) or text.startswith(("/", " / "), ends[i]),
            )
        )
    return tuple(found)


@dataclass(frozen=True)
class Found:
    """Where a number of the map was found."""

    source: str  # a text, or all that was computed: "computed", "note 1", "said 0"
    at: int  # the position there
    part: tuple  # a row with its setting, a clause of its note, or a clause of a sentence that was derived
    own: bool  # whether it was computed, and does not just stand beside that

    @property
    def kind(self):
        """Its source, whichever row or sentence it is."""
        return self.source.partition(" ")[0]


def missing(claim, rows, said=()):
    """The numbers of the entry's `number` that its rows and what was derived from them (`said`) do not bear out, as text."""
    given = numbers(claim.number)
    found = [_places(n, claim, rows, said) for n in given]
    lacking = [n.text for n, places in zip(given, found, strict=True) if not places]
    if lacking or not given:
        return lacking
    # a setting or a note bears out what stands beside a result, and not the result
    if any(r.computed is not None for r in rows) and not any(f.own for places in found for f in places):
        return [given[0].text]
    derived = [[f for f in places if f.kind not in _ROWS] for places in found]
    by_row = [[f for f in places if f.kind != "said"] for places in found]
    reached = [_in_order(given, places, _bound_to(given), {}, None) for places in (derived, by_row)]
    return [] if None in reached else [given[max(reached)].text]


def _bound_to(given):
    """Which numbers belong to the result before them: conditions, printed numbers, and what is listed with one of these."""
    bound, condition = [], False
    for n in given:
        inside = n.between is not None
        condition = inside and bool(_CONDITION.search(n.before) or (condition and _JOINED.fullmatch(n.between)))
        bound.append(condition or (inside and bool(_PRINTED.search(n.before))))
    return bound


def _in_order(given, found, bound, last, before, i=0):
    """None if all numbers have places that fit together, else how far such places go.

    In one text, and among what was computed, each stands after the one before it. What belongs to a result is of its row, or in its
    clause; so is the m of "n of m".
    """
    if i == len(given):
        return None
    n, furthest = given[i], i
    for place in found[i]:
        if bound[i] and before is not None:
            fits = place.part == before.part
        else:
            fits = place.at > last.get(place.source, -1)
            if n.between == " of " and before is not None:
                fits = fits and (
                    place.part == before.part or (before.own and (place.own or place.part[:1] == before.part[:1]))
                )
            elif n.between is not None and _JOINED.fullmatch(n.between) and before is not None:
                fits = fits and place.kind == before.kind
        if fits:
            now = (last, before) if bound[i] else ({**last, place.source: place.at}, place)
            reached = _in_order(given, found, bound, *now, i + 1)
            if reached is None:
                return None
            furthest = max(furthest, reached)
    return furthest


def _places(n, claim, rows, said):
    """Where a number of `number` is found. -> [Found]"""
    if re.match(r"0\d", n.text):
        return []
    if bound := _BOUND.search(n.before):
        return [Found("bound", n.start, (), True)] if _bounds(n, bound, rows) else []
    if place := _PLACE.search(n.before):
        beside = [f"{r.setting}; {r.note}" for r in rows] + list(said)
        named = _named(beside) or _named([claim.place, *(r.where for r in rows)])
        return [Found("place", n.start, (), False)] if (_kind(place), n.text) in named else []
    if _PRINTED.search(n.before):
        return [
            Found("printed", i, (i,), False)
            for i, r in enumerate(rows)
            if any(_equal(n, m, _unit(r)) for m in numbers(r.printed))
        ]
    texts = [text for r in rows for text in (r.setting, r.note)] + list(said)
    nouns = [m for text in texts for m in numbers(text) if n.word and m.word == n.word]
    if nouns and not any(_equal(n, m, n.unit) for m in nouns):
        return []
    found = []
    for i, r in enumerate(rows):
        unit = _unit(r)
        if r.computed is not None and not n.quotient and _same(n, r.computed, unit):
            found.append(Found("computed", i, (i,), True))
        if r.difference is not None and _APART.search(n.clause) and _same(n, r.difference, unit):
            found.append(Found("difference", i, (i,), True))
        if n.between == " of ":
            found += [Found("printed", i, (i,), False) for m in numbers(r.printed) if _equal(n, m, unit)]
        found += [Found(f"setting {i}", m.start, (i,), False) for m in numbers(r.setting) if _equal(n, m)]
        found += [Found(f"note {i}", m.start, (i, m.clause), False) for m in numbers(r.note) if _equal(n, m, unit)]
    for i, sentence in enumerate(said):
        own = [m for m in numbers(sentence) if _equal(n, m) and not _QUOTED.search(m.before)]
        found += [Found(f"said {i}", m.start, (m.clause,), True) for m in own]
    return found + [Found("counted", n.start, (), True)] * _counts(n, claim.number, rows)


def _named(texts):
    """The equations, tables, figures and sections that texts name: {(kind, number)}, the lists of them included."""
    found, kind = set(), None
    for text in texts:
        for n in numbers(text):
            if place := _PLACE.search(n.before):
                kind = _kind(place)
            elif n.between is None or not _JOINED.fullmatch(n.between):
                kind = None
            if kind:
                found.add((kind, n.text))
    return found


def _kind(place):
    """ "Tables " -> "table", "equation " -> "eq"."""
    return place[0].strip(" .").lower().removesuffix("s").removesuffix("uation")


def _unit(row):
    """The unit of a row's numbers: of what is printed, or at the end of its setting."""
    units = [n.unit for n in numbers(row.printed) if n.unit]
    end = re.search(r"(?:, (%|MiB|GiB|bits)|(bits) a weight)$", row.setting)
    return units[0] if units else end[1] or end[2] if end else ""


def _same(n, computed, unit):
    """Whether a number, with its unit, is what was computed, rounded to its digits, or cut to them where its clause says so."""
    if n.unit != unit and (n.unit, unit) != ("%", ""):
        return False
    size = abs(computed) * (100 if n.unit != unit else 1)
    cut = bool(_CUT.search(n.clause)) and 0 <= size - n.value < n.step
    return cut or abs(size - n.value) <= n.step / 2 * (1 + 1e-9)


def _equal(n, other, unit=""):
    """Whether two numbers of texts are the same, and the first has no more digits; `unit`: that of a number that has none."""
    return n.value == other.value and n.step >= other.step * (1 - 1e-9) and n.unit in (other.unit, other.unit or unit)


def _bounds(n, bound, rows):
    """Whether a number bounds all that was computed, and by a factor of no more than TIGHT."""
    sizes = [abs(r.computed) for r in rows if r.computed is not None]
    value = 1 / n.value if bound[2] and n.value else n.value
    if bound[2] and n.value not in [m.value for r in rows for m in numbers(r.printed)]:
        return False
    if not sizes or any(_unit(r) != n.unit for r in rows if r.computed is not None):
        return False
    if bound[1] == "at least":
        return value <= min(sizes) <= TIGHT * value
    return max(sizes) <= value <= TIGHT * max(sizes)


def _counts(n, text, rows):
    """Whether a number is one of "n of m", with m rows, n of which have one verdict."""
    for m in re.finditer(r"(\d+) of (\d+)\b", text):
        if m.start(1) == n.start or m.start(2) == n.start:
            return int(m[2]) == len(rows) and int(m[1]) in _tallied(rows) - {0}
    return False


def _tallied(rows):
    """How many rows do not follow, do not hold, and do neither."""
    tallied = Counter(r.verdict for r in rows)
    return {
        tallied[FAILS],
        tallied[HOLDS[False]],
        sum(n for word, n in tallied.items() if word not in (FAILS, HOLDS[False], "not derivable")),
    }


def misquoted(claim, rows, said=()):
    """The numbers of the entry's statement, `says`, that its rows neither print nor have in their settings, notes and names."""
    quoted = [m for r in rows for m in numbers(r.printed)]
    beside = [(m, _unit(r)) for r in rows for text in (r.setting, r.note, r.model.upper()) for m in numbers(text)]
    beside += [(m, "") for sentence in said for m in numbers(sentence)]
    places = _named([claim.place, *(text for r in rows for text in (r.where, r.setting, r.note))])
    lacking = []
    for n in numbers(claim.says):
        place = _PLACE.search(n.before)
        width = n.text in ("4", "8", "16", "32") and (
            n.unit == "bits" or claim.says.startswith("-bit", n.start + len(n.text))
        )
        there = any(n.value == m.value and m.unit in ("", n.unit) for m in quoted) or any(
            _equal(n, m, unit) for m, unit in beside
        )
        if not ((_kind(place), n.text) in places if place else width or there):
            lacking.append(n.text)
    return lacking


def miscounted(claim, rows):
    """What an entry on a whole audit has in `number` and `says` otherwise than its tally.

    That is n of m that do not follow, how many do not hold if any do, and m in `says`.
    """
    tallied = Counter(r.verdict for r in rows)
    wanted = [tallied[FAILS], len(rows), *filter(None, [tallied[HOLDS[False]]])]
    given = numbers(claim.number)
    wrong = [n.text for n, count in zip(given, wanted, strict=False) if n.value != count]
    wrong += [n.text for n in given[len(wanted) :]] + [str(count) for count in wanted[len(given) :]]
    return wrong + [n.text for n in numbers(claim.says) if n.value != len(rows)]


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
        said = list(filter(None, sentences))
        whole = claim.id == audit.whole
        lacking = miscounted(claim, own) if whole else missing(claim, own, said)
        found += [f"{claim.id}: the map has {n}, which was not computed" for n in lacking]
        misread = [] if whole else misquoted(claim, own, said)
        found += [f"{claim.id}: the statement has {n}, which the audit does not print" for n in misread]
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
