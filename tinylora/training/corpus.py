"""What a model is trained and measured on: running text, or pairs of prompt and answer.

Both hand out (inputs, targets, mask) with the targets shifted by one token. The mask marks what counts in the loss:
every token of running text, only the answer of a pair (LoRA eq. 1 sums over the target sequence, not over the prompt).
"""

import hashlib
import json
from pathlib import Path

import numpy as np


class Text:
    """Running text from one or several sources; a batch picks a source evenly, then a place in it evenly.

    sources   arrays of token ids, each longer than the sequences that will be asked for
    lengths   the bytes of text that each token of the vocabulary stands for (bits per byte divides by them), or None: one
    """

    def __init__(self, sources, lengths=None):
        self.lengths = lengths
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
        return ids[:, :-1], ids[:, 1:], np.ones((size, length), np.float32)

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
        return ids[:, :-1], ids[:, 1:], mask

    def fingerprint(self):
        """A short hash of the content, by which a resumed run knows that the text is the same."""
        return _hash(s.astype(np.int32).tobytes() for s in self.sources)


class Pairs:
    """(prompt, answer) pairs of token ids; the loss is on the answer. lengths: as in Text."""

    def __init__(self, pairs, lengths=None):
        self.lengths = lengths
        self.pairs = [(list(p), list(a)) for p, a in pairs]
        self.tokens = sum(len(a) for _, a in self.pairs)
        self._shortest_prompt = min((len(p) for p, a in self.pairs if a), default=0)
        if not self.tokens:
            raise ValueError("pairs: every answer is empty; there is nothing to predict")

    def batch(self, rng, size, length):
        """`size` random pairs, cut or padded to `length`: inputs, targets, mask, each (size, length)."""
        return self.rows([self.pairs[int(i)] for i in rng.integers(len(self.pairs), size=size)], length)

    def windows(self, length, stride=None):
        """Every pair once, cut to `length`."""
        return self.rows(self.pairs, length)

    def examples(self, length):
        """What an epoch consists of: the pairs whose answer begins within `length` tokens."""
        return [(prompt, answer) for prompt, answer in self.pairs if answer and len(prompt) <= length]

    def rows(self, pairs, length):
        if self._shortest_prompt > length:
            raise ValueError(f"pairs: no answer begins within sequences of {length} tokens; choose a larger --seq-len")
        ids, mask = np.zeros((len(pairs), length + 1), np.int64), np.zeros((len(pairs), length + 1), np.float32)
        for row, keep, (prompt, answer) in zip(ids, mask, pairs, strict=True):
            tokens = (prompt + answer)[: length + 1]
            row[: len(tokens)] = tokens
            keep[max(len(prompt), 1) : len(tokens)] = 1
        return ids[:, :-1], ids[:, 1:], mask[:, 1:]

    def fingerprint(self):
        return _hash(json.dumps(pair).encode() for pair in self.pairs)


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


def read_text(path):
    """The bytes of a UTF-8 text file; a sentence if it is missing, empty or not UTF-8."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file")
    data = path.read_bytes()
    if not data.strip():
        raise ValueError(f"{path} is empty; expected some text")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text (byte {error.start} is 0x{data[error.start]:02x}); convert it first"
        ) from None
    return data


def read_corpus(path, tokenizer, heldout=0.1):
    """(train, held-out) from a .txt file (the last part is held out) or a .jsonl file of {"prompt", "answer"} objects."""
    data = read_text(path)
    if Path(path).suffix != ".jsonl":
        cut = int(len(data) * (1 - heldout))
        while 0 < cut < len(data) and data[cut] & 0xC0 == 0x80 and tokenizer.vocab_size > 256:
            cut += 1  # not within a character
        return running_text(data[:cut], tokenizer), running_text(data[cut:], tokenizer)
    pairs = []
    for number, line in enumerate(data.decode("utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            pairs.append((entry["prompt"], entry["answer"]))
            if not all(isinstance(text, str) for text in pairs[-1]):
                raise TypeError
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            raise ValueError(
                f'{path} line {number}: expected a JSON object with the texts "prompt" and "answer"'
            ) from None
    cut = int(len(pairs) * (1 - heldout))
    if cut in (0, len(pairs)):
        raise ValueError(f"{path} holds {len(pairs)} pairs; too few to hold some out")
    return question_and_answer(pairs[:cut], tokenizer), question_and_answer(pairs[cut:], tokenizer)


def running_text(data, tokenizer):
    """UTF-8 bytes -> Text."""
    return Text([np.asarray(tokenizer.encode(data))], _lengths(tokenizer))


def _lengths(tokenizer):
    """Bytes of each token; None where every token is a byte."""
    if tokenizer.vocab_size == 256:
        return None
    return np.array([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)])


def question_and_answer(pairs, tokenizer):
    """[(prompt, answer)] of texts -> Pairs. Where the vocabulary knows turns (ChatML), the prompt is the user's, and the answer ends as
    an answer does: the token that ends it is learned too."""
    if getattr(tokenizer, "chatml", False):
        ids = [(tokenizer.chat_prompt(p), [*tokenizer.encode(a), tokenizer.end_id]) for p, a in pairs]
    else:
        ids = [(tokenizer.encode(p), tokenizer.encode(a)) for p, a in pairs]
    return Pairs(ids, _lengths(tokenizer))
