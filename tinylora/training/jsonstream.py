"""A JSON text of any length, read value by value: of what it holds, one value at a time is in memory.

    json = Stream(data)       at the begin of UTF-8 bytes
    json.peek()               the next character that is no white space; "" at the end
    json.value()              the value that begins there
    json.elements()           of an array that begins there, one value after the other
    json.outline()            the value, with an Array in the place of each array that is it, or that one of its keys holds

`pieces` cuts UTF-8 at the borders of characters.
"""

import json
import re
from dataclasses import dataclass

#: The most bytes of one value, and of one line of a file that holds one a line.
LONGEST = 16 << 20
_PIECE = 1 << 18
_TORN = len("-Infinity")  # so near to the end of what is decoded, a word or a number may be torn
_SPACE, _COMMA = re.compile(r"[ \t\n\r]*"), re.compile(r"[ \t\n\r]*,[ \t\n\r]*")
_DECODER = json.JSONDecoder()


class NoJSON(ValueError):
    """What is wrong, and at which byte."""

    def __init__(self, what, place):
        super().__init__(what)
        self.place = place


class TooLong(NoJSON):
    """A value of more than LONGEST bytes begins there."""


@dataclass
class Array:
    """An array that was read over: the byte at which it begins, its first element (None without), and whether all are numbers."""

    place: int
    first: object = None
    numbers: bool = True


class Stream:
    """A place in the UTF-8 bytes of a JSON text. What is no JSON there raises NoJSON, a long value TooLong; brackets in
    thousands of brackets raise RecursionError, and a number of thousands of digits ValueError."""

    def __init__(self, data, place=0):
        self._data = data
        self._load(place, _PIECE)

    def _load(self, place, size):
        """Decode `size` bytes from a place on; the next value begins there."""
        end = border(self._data, place + size)
        self._text, self._start, self._next = bytes(self._data[place:end]).decode("utf-8"), place, 0
        self._size, self._last = size, end == len(self._data)

    def _byte(self, i):
        """The byte at which character i of the decoded text begins."""
        return self._start + len(self._text[:i].encode("utf-8"))

    @property
    def place(self):
        """The byte at which the next character stands."""
        return self._byte(self._next)

    def peek(self):
        """The next character that is no white space; "" at the end."""
        while True:
            self._next = _SPACE.match(self._text, self._next).end()
            if self._next < len(self._text) or self._last:
                return self._text[self._next : self._next + 1]
            self._load(self.place, _PIECE)

    def value(self):
        """The value that begins at the next character."""
        if self._text[self._next : self._next + 1] in " \t\n\r":  # or nothing is left of what is decoded
            self.peek()
        while True:
            end, mistake = len(self._text), None
            try:
                value, end = _DECODER.raw_decode(self._text, self._next)
            except json.JSONDecodeError as error:
                mistake = NoJSON(error.msg, self._byte(error.pos))
                if error.pos < len(self._text) - _TORN and not error.msg.startswith("Unterminated string"):
                    raise mistake from None
            if self._last and mistake is not None:
                raise mistake
            if self._last or end < len(self._text) - _TORN:  # far enough for "2." not to be the begin of "2.5"
                self._next = end
                return value
            # It may go on behind what is decoded: that is decoded from its first character on, and then twice as much.
            if self._next == 0 and self._size >= LONGEST:
                raise TooLong("a long value", self._start)
            self._load(self.place, _PIECE if self._next else 2 * self._size)

    def elements(self):
        """Yield the values of the array that begins at the next character; afterwards the stream is behind it."""
        self._expect("[", "Expecting value")
        if self._goes_on("]"):
            return
        while True:
            yield self.value()
            comma = _COMMA.match(self._text, self._next)
            if comma and comma.end() < len(self._text):  # the short way, for arrays of millions
                self._next = comma.end()
            elif self._goes_on("]"):
                return
            else:
                self._expect(",", "Expecting ',' delimiter")

    def outline(self):
        """The value at the next character: an Array for an array, {key: value or Array} for an object."""
        if self.peek() == "[":
            return self._array()
        if self.peek() != "{":
            return self.value()
        self._expect("{", "")
        found = {}
        if self._goes_on("}"):
            return found
        while True:
            if self.peek() != '"':
                raise NoJSON("Expecting property name enclosed in double quotes", self.place)
            key = self.value()
            self._expect(":", "Expecting ':' delimiter")
            found[key] = self._array() if self.peek() == "[" else self.value()
            if self._goes_on("}"):
                return found
            self._expect(",", "Expecting ',' delimiter")

    def _array(self):
        found = Array(self.place)
        for i, element in enumerate(self.elements()):
            if i == 0:
                found.first = element
            if found.numbers and not isinstance(element, (int, float)):
                found.numbers = False
        return found

    def _goes_on(self, sign):
        """Whether the next character is this one; it is then read."""
        found = self.peek() == sign
        self._next += found
        return found

    def _expect(self, sign, otherwise):
        if not self._goes_on(sign):
            raise NoJSON(otherwise, self.place)


def border(data, end):
    """`end`, or the begin of the character that UTF-8 bytes have there."""
    if end >= len(data):
        return len(data)
    return next((i for i in range(end, max(end - 4, 0), -1) if data[i] & 0xC0 != 0x80), end)


def pieces(data, start=0, stop=None):
    """Yield (start, end) of pieces of UTF-8 bytes, one behind the other, no character in two of them."""
    stop = len(data) if stop is None else stop
    while start < stop:
        end = min(border(data, start + _PIECE), stop)
        yield start, end
        start = end
