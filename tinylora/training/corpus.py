"""What a model is trained and measured on: running text, or pairs of prompt and answer, of which a conversation is a chain.

Both hand out (inputs, targets, mask) with the targets shifted by one token. The mask marks what counts in the loss:
every token of running text, only the answer of a pair (LoRA eq. 1 sums over the target sequence, not over the prompt), and of
a conversation only what the assistant says, with the token that ends it.
"""

import bisect
import hashlib
import itertools
import json
import warnings
from array import array
from collections.abc import Sequence

import numpy as np

from ..models.chat import turns
from ..models.tokenizers import ByteTokenizer
from .datafiles import read_records, read_text

_WIDER = {"B": "H", "H": "I", "I": "q"}  # types of ids, as `array` names them
_NOWHERE = np.iinfo(np.int64).max  # where a pair without an answer begins to be learned
_PIECE = 1 << 20


class Text:
    """Running text from one or several sources; a batch picks a source evenly, then a place in it evenly.

    sources   arrays of token ids of any integer type, each longer than the sequences that will be asked for
    lengths   the bytes of text that each token of the vocabulary stands for (bits per byte divides by them), or None: one
    given     ids that are never predicted: what stands before each document (BOS)
    """

    def __init__(self, sources, lengths=None, given=()):
        self.lengths, self._given = lengths, list(given)
        self.sources = [np.asarray(s) for s in sources]
        self.tokens = sum(map(len, self.sources))
        if not self.sources or min(map(len, self.sources)) < 2:
            raise ValueError("text: a source has fewer than two tokens; there is nothing to predict")

    def batch(self, rng, size, length):
        """`size` random crops: inputs, targets and mask, each (size, length)."""
        rows = []
        for _ in range(size):
            source = self.sources[int(rng.integers(len(self.sources)))]
            if len(source) <= length:
                raise ValueError(
                    f"text: a source of {len(source)} tokens is too short for sequences of {length}; "
                    "choose a smaller --seq-len or give more text"
                )
            start = int(rng.integers(len(source) - length))
            rows.append(source[start : start + length + 1])
        ids = np.stack(rows).astype(np.int64)
        return ids[:, :-1], ids[:, 1:], self._counted(ids[:, 1:])

    def _counted(self, targets):
        """1 for each target that counts."""
        return (~np.isin(targets, self._given)).astype(np.float32)

    def windows(self, length, stride=None):
        """Every token but each source's first, predicted exactly once: (inputs, targets, mask), each (n, length).

        Windows start every `stride` tokens (half a window by default) and a token is scored in the first window that
        reaches it, so that it is predicted from at least length − stride tokens of context, except near the start.
        """
        return self.rows(self.scored(length, stride), length)

    def scored(self, length, stride=None):
        """The places of `windows`."""
        return self.examples(length, stride or max(length // 2, 1))

    def examples(self, length, stride=None):
        """What an epoch consists of: windows side by side (or every `stride` tokens), as (source, start, first token that counts)."""
        return Places(list(map(len, self.sources)), length, stride or length)

    def rows(self, examples, length):
        """Inputs, targets and mask of such windows, each (n, length)."""
        ids, mask = np.zeros((len(examples), length + 1), np.int64), np.zeros((len(examples), length), np.float32)
        for row, counted, (i, start, first) in zip(ids, mask, examples, strict=True):
            tokens = self.sources[i][start : start + length + 1]
            row[: len(tokens)] = tokens
            counted[first : len(tokens) - 1] = 1
        return ids[:, :-1], ids[:, 1:], mask * self._counted(ids[:, 1:])

    def fingerprint(self):
        """A short hash of the content, by which a resumed run knows that the text is the same."""
        return _hash(_as_int32(s) for s in self.sources)


class Places(Sequence):
    """(source, start, first token that counts) of the windows of sources of these sizes; what they are is worked out when asked for."""

    def __init__(self, sizes, length, stride):
        self._widths, self._lasts = zip(*((min(length, n - 1), max(n - 1 - length, 0)) for n in sizes), strict=True)
        self._stride = stride
        self._ends = list(itertools.accumulate(-(-last // stride) + 1 for last in self._lasts))

    def __len__(self):
        return self._ends[-1]

    def __getitem__(self, place):
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        place = range(len(self))[place]
        source = bisect.bisect_right(self._ends, place)
        i = place - (self._ends[source - 1] if source else 0)
        start = min(i * self._stride, self._lasts[source])
        return source, start, (i - 1) * self._stride + self._widths[source] - start if i else -start


class Packed(Sequence):
    """Tuples of lists of ids, kept behind each other in one array of the narrowest type that holds them."""

    def __init__(self, tuples):
        self._ids, self._ends, self._first = array("B"), array("q", [0]), array("q", [0])
        for parts in tuples:
            for part in parts:
                self._ids = _extended(self._ids, part)
                self._ends.append(len(self._ids))
            self._first.append(len(self._ends) - 1)

    def __len__(self):
        return len(self._first) - 1

    def __getitem__(self, place):
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        place = range(len(self))[place]
        ends = self._ends[self._first[place] : self._first[place + 1] + 1]
        return tuple(self._ids[a:b].tolist() for a, b in itertools.pairwise(ends))

    def __eq__(self, other):
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None


def _extended(ids, more):
    """An array with more ids behind its own; one of the next wider type if one of them does not fit."""
    while True:
        try:
            ids.extend(array(ids.typecode, more))
        except OverflowError:
            ids = array(_WIDER[ids.typecode], ids)
        else:
            return ids


class Pairs:
    """What is read and what is learned of it, in turn: (prompt, answer), or (prompt, answer, prompt, answer, ...), each a list of ids.

    The loss is on the answers. lengths: as in Text. name: what errors call them.
    """

    def __init__(self, pairs, lengths=None, name="pairs"):
        self.lengths, self.name = lengths, name
        self.tokens, first, last = 0, array("q"), array("q")
        self.pairs = Packed(self._counted(pairs, first, last))
        if not self.tokens:
            raise ValueError(f"{name}: every answer is empty; there is nothing to predict")
        self._first, self._last = np.frombuffer(first, np.int64), np.frombuffer(last, np.int64)
        self._empty = self._first == _NOWHERE
        self._said = set()

    def _counted(self, pairs, first, last):
        """Yield the pairs; what they have to learn is counted, and where it begins and ends is put behind `first` and `last`."""
        for pair in pairs:
            pair = tuple(list(part) for part in pair)
            self.tokens += sum(map(len, pair[1::2]))
            spans = [(a, b) for a, b in _learned(pair) if a < b]
            first.append(spans[0][0] if spans else _NOWHERE)
            last.append(spans[-1][1] - 1 if spans else 0)
            yield pair

    def batch(self, rng, size, length):
        """`size` random pairs, cut or padded to `length`: inputs, targets, mask, each (size, length).

        A pair without a token to learn within `length` is not drawn; how many there are is said in a warning, once.
        """
        within = self.within(length, "learned")
        drawn = rng.integers(len(within), size=size)
        return self.rows(within[drawn], length)

    def windows(self, length, stride=None):
        """Every pair once, cut to `length`; the mask of one without an answer within it is 0."""
        return self.rows(self.scored(length), length)

    def scored(self, length):
        """The places of `windows`."""
        self.within(length, "scored")
        return range(len(self.pairs))

    def examples(self, length):
        """What an epoch consists of: the places of the pairs with something to learn within `length` tokens."""
        return self.within(length, "learned")

    def within(self, length, purpose):
        """The indices of the pairs with something to learn within `length`; a warning if others are left out, or cut."""
        within = np.flatnonzero(self._first <= length)
        if not len(within):
            raise ValueError(
                f"{self.name}: no answer begins within sequences of {length} tokens; choose a larger --seq-len"
            )
        empty, cut = int(self._empty.sum()), int((self._last[within] > length).sum())
        lost = len(self.pairs) - len(within) - empty
        if (empty or lost or cut) and (length, purpose) not in self._said:
            self._said.add((length, purpose))
            beyond = f"of {len(self.pairs)} answers %s beyond sequences of {length} tokens (--seq-len) and are"
            said = [f"{empty} of {len(self.pairs)} answers are empty and are not {purpose}"] if empty else []
            said += [f"{lost} {beyond % 'begin'} not {purpose}"] if lost else []
            said += [f"{cut} {beyond % 'end'} cut"] if cut else []
            warnings.warn(f"pairs: {'; '.join(said)}", stacklevel=3)
        return within

    def rows(self, places, length):
        """Inputs, targets and mask of the pairs at these places, each (n, length)."""
        ids, mask = np.zeros((len(places), length + 1), np.int64), np.zeros((len(places), length + 1), np.float32)
        for row, keep, place in zip(ids, mask, places, strict=True):
            pair = self.pairs[place]
            tokens = [i for part in pair for i in part][: length + 1]
            row[: len(tokens)] = tokens
            for start, end in _learned(pair):
                keep[start:end] = 1
        return ids[:, :-1], ids[:, 1:], mask[:, 1:]

    def fingerprint(self):
        """A short hash of the content, by which a resumed run knows that the pairs are the same."""
        return _hash([json.dumps(pair).encode()] for pair in self.pairs)


def _learned(pair):
    """(start, end) of what is learned of each answer of a pair, empty or not; never the place 0, where there is nothing to predict
    it from."""
    ends = list(itertools.accumulate(map(len, pair)))
    return [(max(end - len(answer), 1), end) for answer, end in zip(pair[1::2], ends[1::2], strict=True)]


def scored_bytes(data, targets, mask):
    """The bytes of text that the targets which count stand for."""
    counted = targets[mask > 0]
    return len(counted) if data.lengths is None else int(data.lengths[counted].sum())


def _as_int32(ids):
    """Yield the bytes of ids as int32, piece by piece."""
    for i in range(0, len(ids), _PIECE):
        yield ids[i : i + _PIECE].astype(np.int32).tobytes()


def _hash(parts):
    """A short hash of parts, each of them an iterable of pieces."""
    digest = hashlib.sha256()
    for pieces in parts:
        for piece in pieces:
            digest.update(piece)
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def read_corpus(path, tokenizer, heldout=0.1):
    """(train, held-out) of a data file: its last part, or its last records, are held out. See `datafiles` for what a file may hold."""
    data = read_text(path)
    records = read_records(path, data)
    if records is None:
        cut, in_bytes = int(len(data) * (1 - heldout)), _lengths(tokenizer) is None
        while 0 < cut < len(data) and data[cut] & 0xC0 == 0x80 and not in_bytes:
            cut += 1  # not within a character
        data = memoryview(data)
        return running_text(data[:cut], tokenizer), running_text(data[cut:], tokenizer)
    cut = int(len(records) * (1 - heldout))
    if cut in (0, len(records)):
        raise ValueError(f"{path} holds {len(records)} records; too few to hold some out")
    train, heldout = (f"pairs of the {part} part of {path}" for part in ("training", "held-out"))
    each = iter(records)
    return _corpus(itertools.islice(each, cut), tokenizer, train), _corpus(each, tokenizer, heldout)


def _corpus(records, tokenizer, name):
    """The Text or the Pairs of records in one form."""
    first = next(records)
    records = itertools.chain([first], records)
    if first.text is not None:
        return documents((record.text for record in records), tokenizer)
    if first.messages is not None and not tokenizer.chats:
        raise ValueError(
            f"{first.where} is a conversation, and the model knows no turns (no chat template, no ChatML in its vocabulary); "
            'give texts as "prompt" and "answer"'
        )
    return Pairs((pair for record in records for pair in _pairs(record, tokenizer)), _lengths(tokenizer), name)


def _pairs(record, tokenizer):
    """The pairs of a conversation, or of a prompt and its answer."""
    try:
        if record.messages is not None:
            return turns(tokenizer, record.messages, record.first, record.unlearned, tools=record.tools)
        return _asked_and_answered(record.prompt, record.answer, tokenizer, record.question)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{record.where}: {error}") from None


def running_text(data, tokenizer):
    """UTF-8 bytes -> Text, with what the tokenizer puts before a text. Where bytes are the tokens, they are not copied."""
    lengths = _lengths(tokenizer)
    if lengths is None and isinstance(tokenizer, ByteTokenizer) and not tokenizer.front:
        return Text([np.frombuffer(data, np.uint8)])
    parts = tokenizer.in_pieces(data)
    return Text([_joined(itertools.chain([tokenizer.begun(next(parts))], parts))], lengths)


def documents(texts, tokenizer):
    """Texts -> Text, one behind the other: between BOS and EOS, or apart by a blank line where the vocabulary has neither.

    What a text writes out of them itself is there once.
    """
    end = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    if not tokenizer.front and not end:
        data = bytearray()
        for i, text in enumerate(texts):
            data += (b"\n\n" if i else b"") + text.encode("utf-8")
        return running_text(data, tokenizer)
    each = (tokenizer.begun(tokenizer.encode(text)) for text in texts)
    if tokenizer.front == end:  # one token begins a document and ends the one before it
        return Text([_joined(itertools.chain([end], (_ended(ids[1:], end) for ids in each)))], _lengths(tokenizer))
    return Text([_joined(_ended(ids, end) for ids in each)], _lengths(tokenizer), tokenizer.front)


def _joined(parts):
    """Lists of ids -> one array."""
    ids = array("B")
    for part in parts:
        ids = _extended(ids, part)
    return np.asarray(ids)


def _ended(ids, end):
    """The ids with `end` behind them, unless they end so."""
    return ids if end and tuple(ids[-1:]) == end else [*ids, *end]


def _lengths(tokenizer):
    """Bytes of each token; None where every token is a byte."""
    lengths = np.array([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)])
    return None if (lengths == 1).all() else lengths


def question_and_answer(pairs, tokenizer):
    """[(prompt, answer)] of texts -> Pairs. Where the model knows turns, the prompt is the user's, and the answer the assistant's. An
    answer ends with the token that ends one, which is learned too."""
    return Pairs((pair for p, a in pairs for pair in _asked_and_answered(p, a, tokenizer)), _lengths(tokenizer))


def _asked_and_answered(prompt, answer, tokenizer, question=None):
    """The pairs of one prompt and answer; `question` is the prompt where the model knows turns, if it differs."""
    if tokenizer.chats:
        asked = {"role": "user", "content": prompt if question is None else question}
        return turns(tokenizer, [asked, {"role": "assistant", "content": answer}])
    end = () if tokenizer.end_id is None else (tokenizer.end_id,)
    return [(tokenizer.begun(tokenizer.encode(prompt)), _ended(tokenizer.following(answer), end))]
