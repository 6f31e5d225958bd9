"""What a model is trained and measured on: running text, or pairs of prompt and answer, of which a conversation is a chain.

Both hand out (inputs, targets, mask) with the targets shifted by one token. The mask marks what counts in the loss:
every token of running text, only the answer of a pair (LoRA eq. 1 sums over the target sequence, not over the prompt), and of
a conversation only what the assistant says, with the token that ends it.
"""

import hashlib
import json
import warnings

import numpy as np

from ..models.chat import turns
from .datafiles import read_records, read_text


class Text:
    """Running text from one or several sources; a batch picks a source evenly, then a place in it evenly.

    sources   arrays of token ids, each longer than the sequences that will be asked for
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
        return self.rows(self.examples(length, stride or max(length // 2, 1)), length)

    def examples(self, length, stride=None):
        """What an epoch consists of: windows side by side (or every `stride` tokens), as (source, start, first token that counts)."""
        found = []
        for i, source in enumerate(self.sources):
            width, done = min(length, len(source) - 1), 0
            for start in [*range(0, len(source) - 1 - width, stride or length), len(source) - 1 - width]:
                found.append((i, start, done - start))
                done = start + width
        return found

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
        return _hash(s.astype(np.int32).tobytes() for s in self.sources)


class Pairs:
    """What is read and what is learned of it, in turn: (prompt, answer), or (prompt, answer, prompt, answer, ...), each a list of ids.

    The loss is on the answers. lengths: as in Text. name: what errors call them.
    """

    def __init__(self, pairs, lengths=None, name="pairs"):
        self.lengths, self.name = lengths, name
        self.pairs = [tuple(list(part) for part in pair) for pair in pairs]
        self.tokens = sum(len(answer) for pair in self.pairs for answer in pair[1::2])
        if not self.tokens:
            raise ValueError(f"{name}: every answer is empty; there is nothing to predict")
        learned = [_learned(pair) for pair in self.pairs]
        self._empty = np.array([not len(places) for places in learned])
        self._first = np.array([places[0] if len(places) else np.iinfo(np.int64).max for places in learned])
        self._last = np.array([places[-1] if len(places) else 0 for places in learned])
        self._said = set()

    def batch(self, rng, size, length):
        """`size` random pairs, cut or padded to `length`: inputs, targets, mask, each (size, length).

        A pair without a token to learn within `length` is not drawn; how many there are is said in a warning, once.
        """
        within = self.within(length, "learned")
        drawn = rng.integers(len(within), size=size)
        return self.rows([self.pairs[i] for i in within[drawn]], length)

    def windows(self, length, stride=None):
        """Every pair once, cut to `length`; the mask of one without an answer within it is 0."""
        self.within(length, "scored")
        return self.rows(self.pairs, length)

    def examples(self, length):
        """What an epoch consists of: the pairs with something to learn within `length` tokens."""
        return [self.pairs[i] for i in self.within(length, "learned")]

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

    def rows(self, pairs, length):
        """Inputs, targets and mask of such pairs, each (n, length)."""
        ids, mask = np.zeros((len(pairs), length + 1), np.int64), np.zeros((len(pairs), length + 1), np.float32)
        for row, keep, pair in zip(ids, mask, pairs, strict=True):
            tokens = [i for part in pair for i in part][: length + 1]
            row[: len(tokens)] = tokens
            places = _learned(pair)
            keep[places[places <= length]] = 1
        return ids[:, :-1], ids[:, 1:], mask[:, 1:]

    def fingerprint(self):
        return _hash(json.dumps(pair).encode() for pair in self.pairs)


def _learned(pair):
    """The places of a pair's tokens that are learned; none is at 0, where there is nothing to predict it from."""
    ends = np.cumsum([len(part) for part in pair])
    places = [np.arange(max(end - len(answer), 1), end) for answer, end in zip(pair[1::2], ends[1::2], strict=True)]
    return np.concatenate(places)


def scored_bytes(data, targets, mask):
    """The bytes of text that the targets which count stand for."""
    counted = targets[mask > 0]
    return len(counted) if data.lengths is None else int(data.lengths[counted].sum())


def _hash(chunks):
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
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
        return running_text(data[:cut], tokenizer), running_text(data[cut:], tokenizer)
    cut = int(len(records) * (1 - heldout))
    if cut in (0, len(records)):
        raise ValueError(f"{path} holds {len(records)} records; too few to hold some out")
    train, heldout = (f"pairs of the {part} part of {path}" for part in ("training", "held-out"))
    return _corpus(records[:cut], tokenizer, train), _corpus(records[cut:], tokenizer, heldout)


def _corpus(records, tokenizer, name):
    """The Text or the Pairs of records in one form."""
    if records[0].text is not None:
        return documents([record.text for record in records], tokenizer)
    if records[0].messages is not None and not tokenizer.chats:
        raise ValueError(
            f"{records[0].where} is a conversation, and the model knows no turns (no chat template, no ChatML in its vocabulary); "
            'give texts as "prompt" and "answer"'
        )
    pairs = []
    for record in records:
        try:
            if record.messages is not None:
                pairs += turns(tokenizer, record.messages, record.first, record.unlearned, tools=record.tools)
            else:
                pairs += _asked_and_answered(record.prompt, record.answer, tokenizer, record.question)
        except ValueError as error:
            raise ValueError(f"{record.where}: {error}") from None
    return Pairs(pairs, _lengths(tokenizer), name)


def running_text(data, tokenizer):
    """UTF-8 bytes -> Text, with what the tokenizer puts before a text."""
    return Text([np.asarray(tokenizer.begun(tokenizer.encode(data)))], _lengths(tokenizer))


def documents(texts, tokenizer):
    """Texts -> Text, one behind the other: between BOS and EOS, or apart by a blank line where the vocabulary has neither.

    What a text writes out of them itself is there once.
    """
    end = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    if not tokenizer.front and not end:
        return running_text("\n\n".join(texts).encode("utf-8"), tokenizer)
    if tokenizer.front == end:  # one token begins a document and ends the one before it
        ids = [*end, *(i for text in texts for i in _ended(tokenizer.begun(tokenizer.encode(text))[1:], end))]
        return Text([np.asarray(ids)], _lengths(tokenizer))
    ids = [i for text in texts for i in _ended(tokenizer.begun(tokenizer.encode(text)), end)]
    return Text([np.asarray(ids)], _lengths(tokenizer), tokenizer.front)


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
    return Pairs([pair for p, a in pairs for pair in _asked_and_answered(p, a, tokenizer)], _lengths(tokenizer))


def _asked_and_answered(prompt, answer, tokenizer, question=None):
    """The pairs of one prompt and answer; `question` is the prompt where the model knows turns, if it differs."""
    if tokenizer.chats:
        asked = {"role": "user", "content": prompt if question is None else question}
        return turns(tokenizer, [asked, {"role": "assistant", "content": answer}])
    end = () if tokenizer.end_id is None else (tokenizer.end_id,)
    return [(tokenizer.begun(tokenizer.encode(prompt)), _ended(tokenizer.following(answer), end))]
