r"""Regular expressions for names of layers, matched in bounded time.

They come from files that others wrote, and `re` takes 2ⁿ steps for (a+)+! on n letters a, because it tries one way after the other.
Here every way is followed at once, as a set of positions in the text:

    ends(abc, S)             {i + 3 : i in S, text[i:] begins with abc}
    ends(XY, S)              ends(Y, ends(X, S))
    ends(X|Y, S)             ends(X, S) and ends(Y, S)
    ends(X*, S)              the least set that holds S and what X makes of it
    ends((?=X) ^ $ \b, S)    the i of S at which it holds

A part is followed once from each position: for a text of n characters that is at most parts · n² steps, and beyond WORK steps a ValueError.
Each set is a list, in the order in which `re` would try its positions: a greedy repetition has the longest way first. So the first position
is where a match of `re` ends.

The expression is parsed by Python itself. Refused, since a set of positions does not tell which way was taken: backreferences,
conditions on a group, atomic groups and possessive repetitions.
"""

import functools
import re
import warnings
from re import _constants, _parser

WORK = 10_000  # positions that may be followed for one text
_MOST_TIMES = 1000  # of a counted repetition
_DEEPEST = 50  # groups inside of each other
_ONE = ("LITERAL", "NOT_LITERAL", "ANY", "IN")  # parts that mean one character
_PLACES = {"AT_BEGINNING": "^", "AT_BEGINNING_STRING": r"\A", "AT_BOUNDARY": r"\b", "AT_NON_BOUNDARY": r"\B", "AT_END": "$",
           "AT_END_STRING": r"\Z"}  # fmt: skip
_CLASSES = {f"CATEGORY_{no}{name}": rf"\{letter.upper() if no else letter}"
            for name, letter in (("DIGIT", "d"), ("SPACE", "s"), ("WORD", "w")) for no in ("", "NOT_")}  # fmt: skip
_ALSO = {"i": "İı", "k": "\u212a", "s": "ſ"}  # what `re` takes for these letters beside them where case is ignored


class Work:
    """How many more positions may be followed; several patterns may share it."""

    def __init__(self, left=WORK):
        self.left = left

    def spend(self, positions):
        self.left -= positions
        if self.left < 0:
            raise ValueError("it takes too long to match; a shorter expression, or a list of names, does not")


class Pattern:
    """A regular expression. ValueError, which does not repeat it, if it is none or asks for what is refused here.

    tail      the letters in which every match ends ("" if that is not known)
    flagged   whether it sets flags for all of itself, (?i), and so cannot be a part of another expression
    parted    whether it is alternatives and nothing else, which a part before or behind it would join
    """

    def __init__(self, source):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what a later Python may read otherwise
                tree = _parser.parse(source)
        except RecursionError:
            raise ValueError(f"its groups are more than {_DEEPEST} deep") from None
        except (re.error, OverflowError, ValueError) as error:
            said = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(error)[:200])
            raise ValueError(said) from None
        self.flags = tree.state.flags
        self.flagged = self.flags != re.UNICODE.value
        self.parted = len(tree) == 1 and tree[0][0].name == "BRANCH"
        self._ends = _sequence(tree, self.flags, 0)
        letters = [chr(value) if op.name == "LITERAL" and not self.flags & re.I else "" for op, value in tree]
        self.tail = "".join(letters[max((i + 1 for i, c in enumerate(letters) if not c), default=0) :])

    def ends(self, text, starts=(0,), work=None):
        """Where matches of a text that begin at these positions may end, in the order in which `re` would find them."""
        return list(self._ends(_Text(text, work or Work()), list(starts)))

    def matches(self, text, work=None):
        """Whether it matches the text's beginning."""
        return bool(self.ends(text, work=work))

    def fullmatch(self, text, work=None):
        """Whether it matches the whole text."""
        return text.endswith(self.tail) and len(text) in self.ends(text, work=work)


@functools.lru_cache(maxsize=1 << 15)
def compiled(source):
    """The Pattern of an expression, made once."""
    return Pattern(source)


class _Text:
    """A text that is being matched, and what is known of it: {(part, position): where the part may end}."""

    def __init__(self, text, work):
        self.text, self.work, self.known = text, work, {}


def _sequence(nodes, flags, depth):
    """(text, starts) -> ends of parts that follow each other; letters in a row are one part."""
    if depth > _DEEPEST:
        raise ValueError(f"its groups are more than {_DEEPEST} deep")
    parts, letters = [], ""
    for op, value in nodes:
        if op.name == "LITERAL" and not flags & re.I:
            letters += chr(value)
            continue
        if letters:
            parts.append(_letters(letters))
            letters = ""
        parts.append(_part(op.name, value, flags, depth))
    if letters:
        parts.append(_letters(letters))
    if len(parts) == 1:
        return parts[0]

    def ends(m, starts):
        for part in parts:
            m.work.spend(len(starts))
            starts = part(m, starts)
            if not starts:
                break
        return starts

    return ends


def _part(op, value, flags, depth):
    """(text, starts) -> ends of one node of the parser's tree."""
    if op in _ONE:
        test = _test(op, value, flags)
        return lambda m, starts: [i + 1 for i in starts if i < len(m.text) and test(m.text[i])]
    if op == "AT" and value.name in _PLACES:
        holds = re.compile(_PLACES[value.name], flags & (re.M | re.A)).match
        return lambda m, starts: [i for i in starts if holds(m.text, i)]
    if op == "SUBPATTERN":
        _, more, fewer, inner = value
        if more & (re.A | re.U).value:
            flags &= ~(re.A | re.U).value
        return _sequence(inner, (flags | more) & ~fewer, depth + 1)
    if op == "BRANCH":
        ways = [_sequence(way, flags, depth + 1) for way in value[1]]
        return _branch(ways)
    if op in ("MAX_REPEAT", "MIN_REPEAT"):
        return _repetition(*value, op == "MIN_REPEAT", flags, depth)
    if op in ("ASSERT", "ASSERT_NOT"):
        return _around(*value, op == "ASSERT", flags, depth)
    if op == "FAILURE":
        return lambda m, starts: []
    raise ValueError(f"{op.replace('_', ' ').lower()} is not supported here")


def _letters(letters):
    return lambda m, starts: [i + len(letters) for i in starts if m.text.startswith(letters, i)]


def _branch(ways):
    def one(m, i):
        m.work.spend(len(ways))
        return _distinct(way(m, [i]) for way in ways)

    return _from_each(one)


def _from_each(one):
    """(text, starts) -> ends of a part that tells them for one position; it is asked once."""

    def ends(m, starts):
        for i in starts:
            if (one, i) not in m.known:
                m.known[one, i] = one(m, i)
            m.work.spend(len(m.known[one, i]))
        return m.known[one, starts[0]] if len(starts) == 1 else _distinct(m.known[one, i] for i in starts)

    return ends


def _distinct(several):
    """The positions in several lists, each once, in their order."""
    return list(dict.fromkeys(i for positions in several for i in positions))


def _test(op, value, flags):
    """character -> whether a part that means one character means this one."""
    if op == "ANY":
        return (lambda c: True) if flags & re.S else (lambda c: c != "\n")
    items = value if op == "IN" else [(_constants.LITERAL, value)]
    wanted = op != "NOT_LITERAL" and items[0][0].name != "NEGATE"
    tests = [_member(item.name, x, flags) for item, x in items if item.name != "NEGATE"]

    @functools.lru_cache(maxsize=256)
    def test(c):
        forms = _forms(c, flags) if flags & re.I else c
        return any(member(form) for member in tests for form in forms) == wanted

    return test


def _member(op, value, flags):
    """character -> whether it is in an item of a set."""
    if op == "RANGE":
        return lambda c: value[0] <= ord(c) <= value[1]
    if op == "CATEGORY":
        return re.compile(_CLASSES[value.name], flags & re.A).match
    return lambda c: ord(c) == value


def _forms(c, flags):
    """A character as it may stand where case is ignored."""
    if not c.isascii():
        raise ValueError("it ignores case, which is done for names in ASCII only")
    return {c.lower(), c.upper(), *("" if flags & re.A else _ALSO.get(c.lower(), ""))}


def _repetition(least, most, inner, lazy, flags, depth):
    """(text, starts) -> ends of X{least,most}."""
    if least > _MOST_TIMES or _MOST_TIMES < most < _constants.MAXREPEAT:
        raise ValueError(f"it repeats a part more than {_MOST_TIMES} times")
    if len(inner) == 1 and inner[0][0].name in _ONE:
        return _run(_test(inner[0][0].name, inner[0][1], flags), least, most, lazy)
    once = _sequence(inner, flags, depth + 1)
    step = _from_each(lambda m, i: once(m, [i]))
    optional = _optional(step, most - least, lazy)

    def ends(m, starts):
        for _ in range(least):
            starts = step(m, starts) if starts else starts
        return optional(m, starts)

    return ends


def _run(test, least, most, lazy):
    """(text, starts) -> ends of a repetition of one character."""

    def one(m, i):
        stop = i
        while stop < len(m.text) and stop - i < most and test(m.text[stop]):
            stop += 1
        found = range(i + least, stop + 1)
        return found if lazy else found[::-1]

    return _from_each(one)


def _optional(step, most, lazy):
    """(text, starts) -> ends of X{0,most}. As in `re`, an X that takes no letter is not repeated."""

    def ends(m, starts):
        after, todo = {}, list(starts)  # {position: where one more X may end} of all that can be reached
        while todo:
            if (i := todo.pop()) not in after:
                after[i] = step(m, [i])
                todo += after[i]
        endless = most >= len(m.text)
        found = {i: (i,) for i in after}  # without any X
        for _ in range(1 if endless else most):
            before, found = found, {}
            for i in sorted(after, reverse=True):  # an X ends behind its start: what follows it is known
                then = [((end,) if end == i else (found if endless else before)[end]) for end in after[i]]
                found[i] = _distinct([(i,), *then] if lazy else [*then, (i,)])
                m.work.spend(len(found[i]))
        return _distinct(found[i] for i in starts)

    return ends


def _around(direction, inner, wanted, flags, depth):
    """(text, starts) -> those of the starts that X follows (or precedes), or does not."""
    shortest, longest = inner.getwidth() if direction < 0 else (0, 0)
    if shortest != longest:
        raise ValueError("look-behind requires a fixed width")
    once = _sequence(inner, flags, depth + 1)

    def one(m, i):
        holds = i >= shortest and bool(once(m, [i - shortest]))
        return [i] if holds == wanted else []

    return _from_each(one)
