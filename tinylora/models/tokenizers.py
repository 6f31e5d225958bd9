"""Text to token ids and back: bytes for the embedded model, byte-pair encoding for models that bring a vocabulary.

    ByteTokenizer    token i is byte i; there is nothing to learn or to download
    BPETokenizer     merges of neighbouring pieces, learned by whoever made the model (Sennrich et al. 2016), on bytes
                     (Radford et al. 2019); run by the `tokenizers` package (extra `llm`)

A BPETokenizer comes from a folder's tokenizer.json, or from the vocabulary and the merges inside a GGUF. A GGUF only names how
text is cut before the merges (`tokenizer.ggml.pre`); PRE lists the names that are known here:

    gpt-2     words, numbers, punctuation and runs of spaces, each with the one space before it
    smollm    the same, after every digit was cut off by itself

Differs from transformers in that its GGUF reader does not look at `pre` and cuts every text as gpt-2: for a smollm vocabulary the
ids differ where a digit follows several white spaces, or is none of 0 to 9. Here digits are cut off, as the file says.
"""

import json
import re

from . import files

PRE = ("gpt-2", "smollm")
_CONTROL, _USER_DEFINED = 3, 4  # GGUF's token types
_START, _END = "<|im_start|>", "<|im_end|>"


class ByteTokenizer:
    """ids = the UTF-8 bytes of the text; 256 tokens."""

    vocab_size = 256
    end_id = None

    def encode(self, text):
        """str or bytes -> list of ints below 256."""
        return list(text.encode("utf-8") if isinstance(text, str) else text)

    def decode(self, ids):
        """ints -> str; bytes that are not UTF-8 (a cut character) become U+FFFD."""
        return bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self, token):
        """The bytes that one token stands for, for printing a text while it grows."""
        return bytes([token])

    def save(self, folder):
        """Nothing: a folder of 256 tokens without a tokenizer.json is read as bytes."""


class BPETokenizer:
    """Byte-pair encoding as the model's maker trained it.

    backend    a tokenizers.Tokenizer
    settings   what tokenizer_config.json says: bos_token, eos_token, ..., chat_template
    """

    def __init__(self, backend, settings=None):
        self.backend, self.settings = backend, dict(settings or {})
        self.vocab_size = backend.get_vocab_size()
        self._special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        decoder = (json.loads(backend.to_str()).get("decoder") or {}).get("type")
        self._bytes = _byte_of_letter() if decoder == "ByteLevel" else None

    @classmethod
    def from_file(cls, path):
        """From a tokenizer.json; tokenizer_config.json and chat_template.jinja are read if they lie beside it."""
        package = _package()
        try:
            backend = package.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the package raises plain Exceptions
            raise ValueError(f"{path} is not a tokenizer that the tokenizers package reads ({error})") from None
        beside, template = path.parent / "tokenizer_config.json", path.parent / "chat_template.jinja"
        settings = files.read_json(beside) if beside.is_file() else {}
        if template.is_file():
            settings["chat_template"] = template.read_text(encoding="utf-8")
        return cls(backend, settings)

    @classmethod
    def from_gguf(cls, fields, where="the GGUF file"):
        """From the entries tokenizer.ggml.* of a GGUF: tokens, token_type, merges, pre, the ids of bos, eos, ...."""
        tokens, merges = fields.get("tokenizer.ggml.tokens"), fields.get("tokenizer.ggml.merges")
        kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "gpt-2")
        if kind != "gpt2" or pre not in PRE:
            raise ValueError(
                f"{where}: its tokenizer is {kind!r} with pre {pre!r}; tinylora builds 'gpt2' (byte-level BPE) with pre "
                f"{' or '.join(map(repr, PRE))}, and reads all others from the tokenizer.json of a model folder"
            )
        types = fields.get("tokenizer.ggml.token_type") or [1] * len(tokens or ())
        if not tokens or not isinstance(merges, list) or len(types) != len(tokens) or len(set(tokens)) != len(tokens):
            raise ValueError(f"{where}: tokenizer.ggml.tokens, token_type and merges do not belong together")
        package = _package()
        parts = package.pre_tokenizers
        try:
            vocabulary = {token: i for i, token in enumerate(tokens)}
            pairs = [tuple(merge.split(" ", 1)) for merge in merges]
            backend = package.Tokenizer(package.models.BPE(vocab=vocabulary, merges=pairs))
        except Exception as error:
            raise ValueError(f"{where}: the merges do not fit the vocabulary ({error})") from None
        cut = parts.ByteLevel(add_prefix_space=bool(fields.get("tokenizer.ggml.add_space_prefix", False)))
        digits = [parts.Digits(individual_digits=True)] if pre == "smollm" else []
        backend.pre_tokenizer = parts.Sequence([*digits, cut])
        backend.decoder = package.decoders.ByteLevel()
        for special, code in ((True, _CONTROL), (False, _USER_DEFINED)):
            added = [
                package.AddedToken(token, special=special, normalized=False)
                for token, kind in zip(tokens, types, strict=True)
                if kind == code
            ]
            (backend.add_special_tokens if special else backend.add_tokens)(added)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
            i = fields.get(f"tokenizer.ggml.{theirs}_token_id")
            if i is not None and 0 <= i < len(tokens):
                settings[f"{ours}_token"] = tokens[i]
        if "tokenizer.chat_template" in fields:
            settings["chat_template"] = fields["tokenizer.chat_template"]
        return cls(backend, settings)

    def encode(self, text):
        """str (or UTF-8 bytes) -> list of ints; no token is added in front or behind. "<|im_end|>" and its like are one token."""
        text = text if isinstance(text, str) else bytes(text).decode("utf-8")
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        """ints -> str, without the special tokens, which are marks and not text; a cut character becomes U+FFFD."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def token_bytes(self, token):
        """The bytes that one token stands for; it may end in the middle of a character. None for a special token: b""."""
        if token in self._special:
            return b""
        piece = self.backend.id_to_token(int(token))
        if piece is None:  # an id between the vocabulary's end and the size of the embedding
            return b""
        if self._bytes is not None and all(letter in self._bytes for letter in piece):
            return bytes(self._bytes[letter] for letter in piece)
        if match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece):  # the byte of a SentencePiece vocabulary
            return bytes([int(match[1], 16)])
        return piece.replace("\u2581", " ").encode("utf-8")

    # ----------------------------------------------------------------------------------------------------------------- chat
    @property
    def end_id(self):
        """The token that ends an answer: <|im_end|> if there is one, else the tokenizer's eos_token, else None."""
        for token in (_END, _text(self.settings.get("eos_token"))):
            if token is not None and (i := self.backend.token_to_id(token)) is not None:
                return i
        return None

    @property
    def chatml(self):
        """Whether the vocabulary has ChatML's marks, <|im_start|> and <|im_end|>."""
        return all(self.backend.token_to_id(mark) is not None for mark in (_START, _END))

    def chat_prompt(self, text, system=None):
        """The ids before an answer, in ChatML: <|im_start|>user⏎text<|im_end|>⏎<|im_start|>assistant⏎.

        system   what stands before it as the system's words; by default what the model's chat template says by itself,
                 if it does; "" for none
        """
        if not self.chatml:
            raise ValueError(f"chat: the vocabulary has no {_START} and {_END}; tinylora writes ChatML prompts only")
        system = self._default_system() if system is None else system
        turns = ([("system", system)] if system else []) + [("user", text)]
        written = "".join(f"{_START}{who}\n{words}{_END}\n" for who, words in turns)
        return self.encode(f"{written}{_START}assistant\n")

    def _default_system(self):
        """The system's words that stand literally in the chat template."""
        template = self.settings.get("chat_template")
        template = template if isinstance(template, str) else ""
        match = re.search(rf"{re.escape(_START)}system(?:\n|\\n)([^'\"{{}}]*?){re.escape(_END)}", template)
        return match[1].replace("\\n", "\n") if match else ""

    # --------------------------------------------------------------------------------------------------------------- folders
    def save(self, folder):
        """Write tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer opens."""
        files.write_text(folder / "tokenizer.json", self.backend.to_str(pretty=True))
        files.write_json(folder / "tokenizer_config.json", self.settings)


def load_tokenizer(folder, vocab_size):
    """The tokenizer of a model folder: its tokenizer.json, or bytes for a vocabulary of 256 without one."""
    path = folder / "tokenizer.json"
    if path.exists():
        return fitting(BPETokenizer.from_file(path), vocab_size, path)
    if vocab_size == 256:
        return ByteTokenizer()
    raise ValueError(
        f"{folder}: vocab_size is {vocab_size} and there is no tokenizer.json; without one, tinylora reads bytes (256 tokens)"
    )


def fitting(tokenizer, vocab_size, where):
    """The tokenizer, if the model has a row for each of its tokens."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(f"{where}: {tokenizer.vocab_size} tokens, but the model's vocab_size is {vocab_size}")
    return tokenizer


def _text(token):
    """A token of tokenizer_config.json: a string, or an object with its content."""
    return token.get("content") if isinstance(token, dict) else token


def _byte_of_letter():
    """{letter: byte} of byte-level vocabularies: printable Latin-1 stands for itself, the other bytes for U+0100, U+0101, ..."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(0x100 + i): b for i, b in enumerate(others)}


def _package():
    try:
        import tokenizers
    except ModuleNotFoundError:
        raise ValueError(
            "this model's vocabulary needs the tokenizers package: pip install -e '.[llm]' in a clone of tinylora"
        ) from None
    return tokenizers
