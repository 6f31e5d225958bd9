"""Text to token ids and back: bytes for the embedded model, byte-pair encoding for models that bring a vocabulary.

    ByteTokenizer    token i is byte i; there is nothing to learn or to download
    BPETokenizer     merges of neighbouring pieces, learned by whoever made the model (Sennrich et al. 2016), on bytes
                     (Radford et al. 2019) or on characters (SentencePiece); run by the `tokenizers` package (extra `llm`)

A BPETokenizer comes from a folder's tokenizer.json, or from the vocabulary inside a GGUF (see `vocabularies`). Conversations become
text by the model's chat template (see `templates`), or in ChatML where the vocabulary has its marks and there is no template.
"""

import codecs
import functools
import itertools
import json
import os
import re

import numpy as np

from . import files, templates, tokenizer_file, vocabularies
from .fields import check, either, flag, mapping, optional, several, shown

_NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # of special tokens, in transformers' order
_TOKEN = either(tokenizer_file.TEXT, tokenizer_file.ADDED_TOKEN)
#: What is read of tokenizer_config.json and special_tokens_map.json; chat_template is checked where it is used.
_SETTINGS = {
    **{f"{name}_token": optional(_TOKEN) for name in (*_NAMES, "eot")},
    "additional_special_tokens": optional(several(_TOKEN)),
    "extra_special_tokens": optional(either(several(_TOKEN), mapping(_TOKEN))),
    "add_prefix_space": optional(flag()),
    "legacy": optional(flag()),
}
_MOST_SETTINGS = 1 << 18  # values in tokenizer_config.json, special_tokens_map.json, added_tokens.json
_PIECE, _WORDS = 1 << 16, re.compile(rb"[A-Za-z] [A-Za-z]")
_ASKED, _ANSWERED = "Question", "Answer"  # a conversation that shows what a template writes behind an answer


class Tokenizer:
    """What is common to both.

    vocab_size    the rows that a model needs for it: the largest id + 1
    front         the ids that it puts before a text (BOS), if any
    chats         whether the model knows turns
    eos_id        the token that ends a text, or None
    end_id        the token that ends an answer, or None
    end_ids       all tokens that end one or the other; `end_marks` are their texts
    """

    front, chats, eos_id, end_id, end_ids, end_marks = (), False, None, None, (), ()

    def begun(self, ids):
        """The ids of a text with `front` before them; some texts write it out themselves, and then it is there once."""
        return [*(() if tuple(ids[: len(self.front)]) == self.front else self.front), *ids]

    def in_pieces(self, data):
        """Yield the ids of UTF-8 bytes: a list, or one for each piece of a long text where it can be cut exactly."""
        yield self.encode(bytes(data))

    def following(self, text):
        """The ids of a text that stands behind another one."""
        return self.encode(text)

    def renderings(self, conversations, **more):
        """[(text, spans) or the ValueError in which it ends] for several conversations, (messages, add_generation_prompt) each."""
        outcomes = []
        for messages, asking in conversations:
            try:
                outcomes.append(self.spoken(messages, add_generation_prompt=asking, **more))
            except ValueError as error:
                outcomes.append(error)
        return outcomes

    def pieces(self, tokens):
        """Yield what each token adds to the text before it: "" within a character, and U+FFFD at the end for one that was cut."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in tokens:
            yield decoder.decode(self.token_bytes(token))
        yield decoder.decode(b"", final=True)

    def continuation(self, tokens):
        """The `pieces` as one text. `decode` reads tokens as a text of their own, which for SentencePiece begins without its space."""
        return "".join(self.pieces(tokens))


class ByteTokenizer(Tokenizer):
    """ids = the UTF-8 bytes of the text; 256 tokens."""

    vocab_size = 256

    def encode(self, text, add_special_tokens=False):
        """str or bytes -> list of ints below 256. There are no special tokens to add."""
        return list(checked(text).encode("utf-8") if isinstance(text, str) else text)

    def decode(self, ids):
        """ints -> str; bytes that are not UTF-8 (a cut character) become U+FFFD."""
        return bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self, token):
        """The bytes that one token stands for, for printing a text while it grows."""
        return bytes([token])

    def save(self, folder):
        """Nothing: a folder of 256 tokens without a tokenizer.json is read as bytes."""


class BPETokenizer(Tokenizer):
    """Byte-pair encoding as the model's maker trained it.

    backend    a tokenizers.Tokenizer. What its file sets for single calls (truncation, padding, dropout of merges) is switched off:
               a text is read whole, and each time alike. `save` leaves it out as well
    settings   what tokenizer_config.json says: bos_token, eos_token, ..., chat_template
    where      the file that the chat template stands in, for sentences about it
    """

    def __init__(self, backend, settings=None, where="the tokenizer"):
        self._given, self.settings, self.where = backend, dict(settings or {}), where

    # What is asked of the backend is asked when it is needed.
    @functools.cached_property
    def backend(self):
        """The tokenizers.Tokenizer, without settings for single calls."""
        backend = self._given
        backend.no_truncation()
        backend.no_padding()
        if getattr(backend.model, "dropout", None) is not None:
            backend.model.dropout = None
        # What the vocabulary has as a word and only the settings call special is special.
        added = {token.content for token in backend.get_added_tokens_decoder().values()}
        named = {token for token in _special_tokens(self.settings).values() if backend.token_to_id(token) is not None}
        backend.add_special_tokens(sorted(named - added))
        return backend

    @functools.cached_property
    def vocab_size(self):
        return max(self.backend.get_vocab().values(), default=-1) + 1

    @functools.cached_property
    def _added(self):
        """{id: text} of tokens that were added to the vocabulary's."""
        return {i: token.content for i, token in self.backend.get_added_tokens_decoder().items()}

    @functools.cached_property
    def _special(self):
        """The ids of tokens that are marks and no text."""
        return {i for i, token in self.backend.get_added_tokens_decoder().items() if token.special}

    @functools.cached_property
    def _words(self):
        """The ids of added tokens that are written as they are."""
        known = self.backend.get_vocab(with_added_tokens=False)
        return {i for i, content in self._added.items() if content not in known}

    @functools.cached_property
    def _bytes(self):
        """{letter: byte} of a byte-level vocabulary, None of another."""
        return _byte_of_letter() if "ByteLevel" in _kinds(self.backend) else None

    @functools.cached_property
    def front(self):
        text = next((t for t in ("a", *self.backend.get_vocab()) if self.encode(t)), "")
        marked = self.backend.encode(text, add_special_tokens=True)
        pairs = zip(marked.ids, marked.special_tokens_mask, strict=True)
        return tuple(i for i, _ in itertools.takewhile(lambda pair: pair[1], pairs))

    @functools.cached_property
    def _prefixed(self):
        """Whether a text gets a space in front."""
        return self.continuation(self.encode("a")) == " a"

    @classmethod
    def from_file(cls, path):
        """From a tokenizer.json and what lies beside it: tokenizer_config.json, special_tokens_map.json, added_tokens.json, and chat
        templates."""
        backend = tokenizer_file.read(path)
        _check_marks(backend, path)
        settings, where = _settings(path.parent)
        _cut_as_llama(backend, settings, path.parent)
        _add_listed(backend, settings, path.parent)
        if _text(settings.get("eos_token")) is None and (end := _end_of_text(path.parent)) is not None:
            settings["eos_token"] = backend.id_to_token(end)
        tokenizer = cls(backend, settings, where)
        if beyond := [i for i in tokenizer.front if i >= tokenizer.vocab_size]:
            raise ValueError(f"{path}: post_processor puts the id {beyond[0]} before a text, and no token has it")
        return tokenizer

    @classmethod
    def from_gguf(cls, fields, where="the GGUF file"):
        """From the entries tokenizer.* of a GGUF."""
        return cls(*vocabularies.from_gguf(fields, where), where)

    def encode(self, text, add_special_tokens=False):
        """str (or UTF-8 bytes) -> list of ints. "<|im_end|>" and its like are one token.

        add_special_tokens    True: with `front` before them. What a tokenizer would put behind a text (EOS) is never added
        """
        text = checked(text) if isinstance(text, str) else bytes(text).decode("utf-8")
        ids = self._encoded(text).ids
        return [*self.front, *ids] if add_special_tokens else ids

    def _encoded(self, text):
        """The package's Encoding of a text."""
        try:
            return self.backend.encode(text, add_special_tokens=False)
        except BaseException as error:  # a regular expression of the file's that gives up, for one
            if not tokenizer_file.failed(error):
                raise
            raise ValueError(
                f"{self.where}: its tokenizer fails on a text of {len(text)} characters ({error})"
            ) from None

    def in_pieces(self, data):
        """As `encode`, in pieces: the tokenizers package takes over a hundred bytes a token while it encodes.

        A piece begins with the space before a word. It is encoded behind the letter that stands before it, whose ids are left out.
        """
        begin, ends = 0, [len(data)]
        if len(data) > _PIECE and vocabularies.splits_before_words(self.backend):
            ends = _before_words(data)
        for end in ends:
            letter = bytes(data[max(begin - 1, 0) : begin])
            yield self.encode(letter + bytes(data[begin:end]))[len(self.encode(letter)) :]
            begin = end

    def following(self, text):
        """The ids of a text that stands behind another one: without the space that some vocabularies put before a text."""
        text = checked(text)
        line = self.encode("\n") if self._prefixed else []
        ids = self.encode("\n" + text) if self._prefixed else []
        return ids[len(line) :] if line and ids[: len(line)] == line else self.encode(text)

    def decode(self, ids):
        """ints -> str, without the special tokens, which are marks and not text; a cut character becomes U+FFFD."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def token_bytes(self, token):
        """The bytes that one token stands for; it may end in the middle of a character. None for a special token: b""."""
        if token in self._special:
            return b""
        piece = self.backend.id_to_token(int(token))
        if piece is None:  # an id that no token has, up to the size of the embedding
            return b""
        if self._bytes is not None:
            spelled = token not in self._words and all(letter in self._bytes for letter in piece)
            return bytes(self._bytes[letter] for letter in piece) if spelled else piece.encode("utf-8")
        if match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece):  # the byte of a SentencePiece vocabulary
            return bytes([int(match[1], 16)])
        return piece.replace("\u2581", " ").encode("utf-8")

    # ----------------------------------------------------------------------------------------------------------------- chat
    @property
    def chatml(self):
        """Whether the vocabulary has ChatML's marks, <|im_start|> and <|im_end|>."""
        return all(self.backend.token_to_id(mark) is not None for mark in (templates.START, templates.END))

    @property
    def chats(self):
        """Whether the model knows turns: it has a chat template, or ChatML's marks."""
        return bool(self.settings.get("chat_template")) or self.chatml

    @property
    def eos_id(self):
        """The id of the eos_token; None if the vocabulary has none."""
        return self._named("eos_token")

    @property
    def end_id(self):
        """The token that ends an answer: the one that the chat template writes behind it, else the eos_token, else None."""
        mark = self.ending[0] if self.chats else ""
        return self.encode(mark)[-1] if mark else self.eos_id

    @property
    def end_ids(self):
        """The ids of end_id and of the tokens that end a text or, as a GGUF says, a turn."""
        ids = (self.end_id, self.eos_id, self._named("eot_token"))
        return tuple(dict.fromkeys(i for i in ids if i is not None))

    @property
    def end_marks(self):
        """The texts of end_ids."""
        return tuple(self.backend.id_to_token(i) for i in self.end_ids)

    @functools.cached_property
    def ending(self):
        """(mark, rest): what the template writes behind an answer, up to the token that ends it ("" if there is none), and after it."""
        text = self.render([{"role": "user", "content": _ASKED}, {"role": "assistant", "content": _ANSWERED}])
        behind = text.rpartition(_ANSWERED)[2]
        for i in self.encode(behind):
            if not self._added.get(i, " ").replace("\u2581", " ").isspace():
                before, mark, rest = behind.partition(self._added[i])
                return before + mark, rest
        return "", behind

    def _named(self, name):
        """The id of a special token by its name in the settings; None if there is none."""
        token = _text(self.settings.get(name))
        return None if token is None else self.backend.token_to_id(token)

    def render(self, messages, add_generation_prompt=False, **more):
        """The text of [{"role", "content"}, ...], as the model's chat template writes it; see `spoken`."""
        return self.spoken(messages, add_generation_prompt, **more)[0]

    def spoken(self, messages, add_generation_prompt=False, **more):
        """(text, spans): the rendered conversation, and where the template's {% generation %} marks an answer, (start, end) each.

        add_generation_prompt    whether the text ends with what stands before an answer
        more                     as in `renderings`
        """
        return templates.said(self.renderings([(messages, add_generation_prompt)], **more)[0])

    def renderings(self, conversations, tools=None, documents=None, chat_template=None, **more):
        """[(text, spans) or the ValueError in which it ends] for several conversations, which is faster than one by one.

        conversations            (messages, add_generation_prompt) each
        chat_template            the name of one of several templates; by default "tool_use" if there are tools, else "default"
        tools, documents, more   further variables of the template
        """
        for messages, _ in conversations:
            if not messages:
                raise ValueError("chat: the conversation is empty; give at least one message")
            for message in messages:  # a place in the rendered text would say nothing to who wrote them
                if isinstance(message.get("content"), str):
                    checked(message["content"])
        found = templates.named(self.settings.get("chat_template"), self.where)
        if not found:
            self._knows_turns()
            return [(templates.chatml(messages, asking), []) for messages, asking in conversations]
        template = templates.chosen(found, chat_template, tools, self.where)
        asked = [(messages, {"add_generation_prompt": asking}) for messages, asking in conversations]
        named = {"tools": tools, "documents": documents, **_special_tokens(self.settings), **more}
        return template.renderings(asked, **named)

    def _knows_turns(self):
        if not self.chats:
            raise ValueError(
                f"chat: {self.where} has no chat template, and the vocabulary no {templates.START} and {templates.END}; "
                "the model knows no turns"
            )

    def chat_prompt(self, messages, system=None):
        """The ids before an answer.

        messages   what the user says, or a whole conversation, [{"role", "content"}, ...]
        system     the system's words before it; None leaves them to the template, which may have some of its own
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if system is not None:
            messages = [{"role": "system", "content": system}, *messages]
        ids = self.encode(self.render(messages, add_generation_prompt=True))
        if not ids:
            raise ValueError(f"{self.where}: the chat template writes nothing for this conversation")
        return ids

    def _default_system(self):
        """The system's words that stand as they are in a template of ChatML's, "" if none do. Their time grows as the text does."""
        template = self.settings.get("chat_template")
        for turn in template.split(templates.END)[:-1] if isinstance(template, str) else ():
            words = re.split(r"['\"{}]", turn)[-1]  # behind what is of jinja2 and no text
            if opening := re.search(rf"{re.escape(templates.START)}system(\n|\\n)", words):
                return words[opening.end() :].replace("\\n", "\n")
        return ""

    def segments(self, text, spans):
        """(read, learned, read, learned, ...), lists of ids: the tokens of a text outside and inside of spans of it.

        spans    (start, end) each; a token that reaches into one belongs to it
        """
        inside = np.zeros(len(text) + 1, bool)
        for start, end in spans:
            inside[start:end] = True
        found = self._encoded(text)
        learned = [bool(inside[a : max(b, a + 1)].any()) for a, b in found.offsets]
        parts = []
        for said, group in itertools.groupby(zip(found.ids, learned, strict=True), lambda token: token[1]):
            parts += [[]] if said and not parts else []
            parts.append([i for i, _ in group])
        if len(parts) % 2:  # it ends with what is only read
            parts = parts[:-1] or [*parts, []]
        return tuple(parts)

    # --------------------------------------------------------------------------------------------------------------- folders
    def save(self, folder):
        """Write tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer opens."""
        files.write_text(folder / "tokenizer.json", self.backend.to_str(pretty=True))
        files.write_json(folder / "tokenizer_config.json", self.settings)


def load_tokenizer(folder, vocab_size):
    """The tokenizer of a model folder: its tokenizer.json, or bytes for a vocabulary of 256 without one."""
    path = folder / "tokenizer.json"
    if os.path.lexists(path):
        return fitting(BPETokenizer.from_file(path), vocab_size, path, f" ({folder / 'config.json'})")
    if vocab_size == 256:
        return ByteTokenizer()
    raise ValueError(
        f"{folder}: vocab_size is {vocab_size} and there is no tokenizer.json; without one, tinylora reads bytes (256 tokens)"
    )


def fitting(tokenizer, vocab_size, where, said=""):
    """The tokenizer, if the model has a row for each of its tokens; `said` is where the size stands, for the sentence if it has not."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(f"{where}: {tokenizer.vocab_size} tokens, but the model's vocab_size is {vocab_size}{said}")
    return tokenizer


def _before_words(data):
    """Yield the ends of pieces of about _PIECE bytes, each between a letter and the space before the next word; last, that of all."""
    begin = 0
    while cut := _WORDS.search(data, begin + _PIECE):
        begin = cut.start() + 1
        yield begin
    yield len(data)


def checked(text):
    """A str that can be written as UTF-8; ValueError if it holds half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise ValueError(
            f"the text holds {half} at character {error.start}: half of a surrogate pair, no character"
        ) from None
    return text


def _beside(path):
    """The JSON object in a file that may be missing."""
    return files.read_json(path, most=_MOST_SETTINGS) if os.path.lexists(path) else {}


def _checked_settings(path):
    """What a tokenizer_config.json or special_tokens_map.json says, which `save` can write again."""
    settings = check(_beside(path), _SETTINGS, path)
    for name, value in settings.items():
        try:
            json.dumps({name: value}, allow_nan=False, ensure_ascii=False).encode("utf-8")
        except ValueError as error:  # JSON as Python reads it has NaN, and halves of surrogate pairs
            raise ValueError(f"{path} holds what no JSON file should, in {shown(name)}: {error}") from None
    return settings


def _settings(folder):
    """(settings, the file of the chat template): what tokenizer_config.json and the files beside it say.

    special_tokens_map.json counts where tokenizer_config.json names no added tokens, as an old one does not.
    """
    path, old = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    settings = _checked_settings(path)
    if "added_tokens_decoder" not in settings:
        settings |= _checked_settings(old)
    found = [*templates.beside(folder), (settings.get("chat_template"), path), *templates.of_processor(folder)]
    template, where = next(((text, file) for text, file in found if text), (None, folder / "tokenizer.json"))
    return settings | ({"chat_template": template} if template else {}), where


def _cut_as_llama(backend, settings, folder):
    """Give a SentencePiece vocabulary of the class LlamaTokenizer or CodeLlamaTokenizer the space before a text that its settings say.

    transformers (5.23, models/llama and code_llama) builds these two anew around the words and merges of tokenizer.json:

        add_prefix_space false    no space in front
        legacy true               Llama's alone: one before each stretch of text, behind a special token as well
        otherwise                 one where the text begins

    It does not in the folder of a Mistral model.
    """
    kind = str(settings.get("tokenizer_class")).removesuffix("Fast")
    if (
        kind not in ("LlamaTokenizer", "CodeLlamaTokenizer")
        or backend.token_to_id("\u2581") is None
        or "ByteLevel" in _kinds(backend)
    ):
        return
    if _beside(folder / "config.json").get("model_type") == "mistral":
        return
    package, spaced = vocabularies.package(), settings.get("add_prefix_space") in (None, True)
    again = "always" if settings.get("legacy") and kind == "LlamaTokenizer" else "first"
    backend.normalizer = None
    backend.pre_tokenizer = package.pre_tokenizers.Metaspace(
        replacement="\u2581", prepend_scheme=again if spaced else "never", split=False
    )
    d = package.decoders
    strip = [d.Strip(" ", 1, 0)] if spaced or kind == "CodeLlamaTokenizer" else []
    backend.decoder = d.Sequence([d.Replace("\u2581", " "), d.ByteFallback(), d.Fuse(), *strip])


def _add_listed(backend, settings, folder):
    """Add the tokens that the files beside a tokenizer.json list and it lacks, in the order in which transformers adds them."""
    added = [token.content for token in backend.get_added_tokens_decoder().values()]
    special = _special_tokens(settings)
    named = [
        special[name] for name in dict.fromkeys((*(f"{name}_token" for name in _NAMES), *special)) if name in special
    ]
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    extra = [_text(token) for token in (extra.values() if isinstance(extra, dict) else extra)]
    extra = [token for token in extra if token is not None]
    where, old, listed = folder / "tokenizer_config.json", folder / "added_tokens.json", {}
    named_in = "added_tokens_decoder: " if "added_tokens_decoder" in settings else ""
    try:
        if named_in:
            listed = {int(i): dict(token) for i, token in settings["added_tokens_decoder"].items()}
        else:
            where, marks = old, {*named, *extra}
            listed = {i: {"content": t, "special": t in marks} for t, i in _beside(old).items() if t not in added}
        tokens = {i: _added_token(token, token["content"] in named) for i, token in sorted(listed.items())}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where}: the added tokens are not {{id: token}} as transformers writes them ({named_in}{error!r})"
        ) from None
    backend.add_tokens(list(tokens.values()))
    for i, token in tokens.items():
        if (found := backend.token_to_id(token.content)) != i:
            raise ValueError(
                f"{where} gives the added token {token.content!r} the id {i}, and behind the tokens of tokenizer.json it gets {found}"
            )
    added += [token.content for token in tokens.values()]
    if any(backend.token_to_id(token) is None for token in extra):
        backend.add_special_tokens([token for token in dict.fromkeys((*named, *extra)) if token not in added])


def _added_token(token, special):
    """An AddedToken of what a file says of it; `special` if it is named as such elsewhere."""
    known = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    token = {name: token[name] for name in known if name in token}
    return vocabularies.package().AddedToken(**{**token, "special": special or token.get("special", False)})


def _end_of_text(folder):
    """The first eos_token_id that generation_config.json or config.json names; None if there is none."""
    for path in (folder / "generation_config.json", folder / "config.json"):
        named = _beside(path).get("eos_token_id")
        if ids := [i for i in (named if isinstance(named, list) else [named]) if tokenizer_file.ID.fits(i)]:
            return ids[0]
    return None


def _special_tokens(settings):
    """{name: text} of the special tokens that tokenizer_config.json names: bos_token, ..., and further ones of the model."""
    extra = settings.get("extra_special_tokens")
    named = settings | (extra if isinstance(extra, dict) else {})
    texts = {name: _text(token) for name, token in named.items() if name.endswith("_token")}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _kinds(backend):
    """The types of a backend's decoder, as the tokenizers package writes it, and of its parts."""

    def types(decoder):
        return {decoder["type"]}.union(*map(types, decoder.get("decoders", ())))

    return set() if backend.decoder is None else types(json.loads(backend.decoder.__getstate__()))


def _check_marks(backend, where):
    """Refuse a vocabulary whose tokens say in other ways than GPT-2's and SentencePiece's where a word begins or ends."""
    model, found = backend.model, []
    if type(model).__name__ in ("WordLevel", "WordPiece"):
        found = [f"model is {type(model).__name__}"]
    for name in ("end_of_word_suffix", "continuing_subword_prefix"):
        if getattr(model, name, None) and not found:
            found = [f"{type(model).__name__} model has {name} {getattr(model, name)!r}"]
    found += [f"decoder is {kind}" for kind in sorted(_kinds(backend) & {"BPEDecoder", "CTC", "WordPiece"})]
    if found:
        raise ValueError(
            f"{where}: its {' and its '.join(found)}; tinylora reads vocabularies of bytes (GPT-2's kind) or with spaces as \u2581 "
            "(SentencePiece's kind)"
        )


def _text(token):
    """A token of tokenizer_config.json: a string, or an object with its content."""
    return token.get("content") if isinstance(token, dict) else token


def _byte_of_letter():
    """{letter: byte} of byte-level vocabularies: printable Latin-1 stands for itself, the other bytes for U+0100, U+0101, ..."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(0x100 + i): b for i, b in enumerate(others)}
