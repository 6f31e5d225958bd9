"""A tokenizer as the entries tokenizer.* of a GGUF.

    tokenizer.ggml.model         "gpt2": byte-level pieces and merges; "llama": SentencePiece pieces and scores; "none": no text
    tokenizer.ggml.pre           how a text is cut before the merges, by name ("gpt2" only): see tokenizers.PRE
    tokenizer.ggml.tokens        one string for each row of the embedding; rows without a token are [PAD12] and the like
    tokenizer.ggml.token_type    1 a piece, 2 unknown, 3 a mark (special), 4 an added word, 5 unused, 6 a byte
    tokenizer.ggml.merges        "left right", the earliest first; or .scores, of which the highest is merged first
    tokenizer.ggml.bos_token_id, eos, eot, eom, unknown, padding, ..., add_bos_token, add_eos_token; tokenizer.chat_template

What a GGUF says is less than what a tokenizer.json says. Before anything is written, the tokenizer is built from the entries as
`vocabularies` would build it from the file, and its ids are compared on PROBES: a vocabulary that the entries do not hold is refused.
What differs beside that is said in a sentence: a normalizer that composes accents, spaces at the edges of a text and of marks.

The embedded model's 256 bytes are no vocabulary that llama.cpp has: the file says "none". llama.cpp opens it and computes on ids,
without text; read here, token i is byte i again.
"""

import json
import re

from . import vocabularies
from .tokenizers import BPETokenizer, ByteTokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_SPECIAL = {"bos": "bos", "unk": "unknown", "pad": "padding", "sep": "seperator", "mask": "mask"}  # (GGUF spells it so)
_ENDS = ("eos", "eot", "eom")  # where a text may end: GGUF has three names

#: Texts on which a vocabulary and what was written of it must agree: words, numbers, code, spaces, scripts, emoji.
PROBES = (
    "Once upon a time there was a miller who had three sons; it isn't 3.14159, they'LL say, is it?",
    "In 1984 and 2001, 12345 apples cost $1,234,567.89 (or 99%).",
    "def f(x):\n    return x ** 2  # squared\n\n\tif x:\r\n        print(f(7))\n\n\n",
    "naïve café Ωmega 你好，世界 こんにちは 안녕 привет مرحبا नमस्ते “quoted” — ½ x³",
    "two  spaces   three \n \n end ",
    "🙂 👩‍👩‍👧 🇩🇪 a🙂b 1🙂2",
)


def vocabulary(tokenizer, config):
    """({key: value}, [sentences]) of a tokenizer, for a model of this config. ValueError if a GGUF cannot hold it."""
    if isinstance(tokenizer, ByteTokenizer):
        return {"tokenizer.ggml.model": "none"}, [
            "its tokens are the 256 bytes, for which llama.cpp has no vocabulary: it computes on ids there, without text"
        ]
    described = json.loads(tokenizer.backend.to_str())
    fields = _pieces(tokenizer, described, config.vocab_size)
    notes = _notes(described)
    fields |= _marks(tokenizer, config, notes)
    template = tokenizer.settings.get("chat_template")
    if isinstance(template, str):
        fields["tokenizer.chat_template"] = template
    elif template:
        fields |= _templates(template)
    _check(tokenizer, described, fields, notes)
    return fields, notes


def _pieces(tokenizer, described, size):
    """The pieces, their types, and the merges or scores that make them."""
    model, backend = described["model"], tokenizer.backend
    if model["type"] != "BPE":
        raise ValueError(f"GGUF: a vocabulary of type {model['type']} is not written, only BPE")
    tokens, types = [f"[PAD{i}]" for i in range(size)], [_UNUSED] * size
    for token, i in backend.get_vocab(with_added_tokens=True).items():
        tokens[i], types[i] = token, _NORMAL
    for token in described["added_tokens"]:
        types[token["id"]] = _CONTROL if token["special"] else _USER_DEFINED
    merges = [tuple(pair.split(" ", 1) if isinstance(pair, str) else pair) for pair in model["merges"]]
    pieces = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    if not merges:
        raise ValueError("GGUF: a vocabulary without merges is not written")
    if _byte_level(described):
        pieces["tokenizer.ggml.merges"] = [" ".join(pair) for pair in merges]
        return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": _pre(described), **pieces}
    for i, token in enumerate(tokens):
        if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            types[i] = _BYTE
    if model.get("unk_token") in model["vocab"]:
        types[model["vocab"][model["unk_token"]]] = _UNKNOWN
    pieces["tokenizer.ggml.scores"] = _scores(tokens, merges)
    spaced = "".join(backend.encode("a", add_special_tokens=False).tokens).startswith(
        "\u2581"
    )  # a text gets a space in front
    return {"tokenizer.ggml.model": "llama", **pieces, "tokenizer.ggml.add_space_prefix": spaced}


def _byte_level(described):
    """Whether the pieces are letters that stand for bytes (GPT-2), and not characters (SentencePiece)."""
    return (described.get("decoder") or {}).get("type") == "ByteLevel"


def _scores(tokens, merges):
    """Scores of which the highest is merged first, from merges of which the first is: 0 for the first piece that is made, −1, ..."""
    rank = {}
    for pair in merges:
        rank.setdefault("".join(pair), len(rank))
    return [-float(rank.get(token, len(rank))) for token in tokens]


def _pre(described):
    """The name under which a text is cut as this tokenizer cuts it, and whole words are looked up before the merges or not."""
    cuts, whole = _cuts(described.get("pre_tokenizer")), bool(described["model"].get("ignore_merges"))
    for name in ("llama-bpe", *vocabularies.CUTS):  # of several names the one that llama.cpp's converter writes
        if vocabularies.CUTS[name] == cuts and vocabularies.takes_whole_words(name) == whole:
            return name
    raise ValueError("GGUF has no name for the way in which this pre_tokenizer cuts a text")


def _cuts(part):
    """The regular expressions of a byte-level pre_tokenizer, as `vocabularies` writes them; other ways of cutting are themselves."""
    if part is None:
        return ()
    if part["type"] == "Sequence":
        return tuple(cut for inner in part["pretokenizers"] for cut in _cuts(inner))
    if part["type"] == "ByteLevel" and not part["add_prefix_space"]:
        return vocabularies.CUTS["gpt-2"] if part["use_regex"] else ()
    if part["type"] == "Digits" and part["individual_digits"]:
        return (r"\p{N}",)
    if part["type"] == "Split" and (part["behavior"], part["invert"]) in (("Isolated", False), ("Removed", True)):
        return (part["pattern"].get("Regex"),)
    return (part,)


def _marks(tokenizer, config, notes):
    """The ids of marks: what begins and ends a text, what is put around it by itself, and the rest by name."""
    named = {name: tokenizer._named(f"{name}_token") for name in ("eos", *_SPECIAL)}
    front, back = _around(tokenizer.backend)
    named["bos"] = front[0] if front else named["bos"] if named["bos"] is not None else config.bos_token_id
    if named["pad"] is None:
        named["pad"] = config.pad_token_id
    ends = config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    ends = list(dict.fromkeys([named["eos"], *ends] if named["eos"] is not None else ends))
    if back not in ([], ends[:1]):
        raise ValueError(
            f"GGUF: the tokenizer puts the tokens {back} behind a text, of which GGUF can say only the end token"
        )
    if len(ends) > len(_ENDS):
        notes.append(f"GGUF names {len(_ENDS)} tokens that end a text; {ends[len(_ENDS) :]} end one here and not there")
    ids = {_SPECIAL[name]: named[name] for name in _SPECIAL} | dict(zip(_ENDS, ends, strict=False))
    fields = {f"tokenizer.ggml.{name}_token_id": int(i) for name, i in ids.items() if i is not None}
    return fields | {"tokenizer.ggml.add_bos_token": bool(front), "tokenizer.ggml.add_eos_token": bool(back)}


def _around(backend):
    """The ids that the tokenizer puts before a text and behind it. ValueError if it is not at most one before."""
    plain = backend.encode("a", add_special_tokens=False).ids
    full = backend.encode("a", add_special_tokens=True).ids
    start = next(i for i in range(len(full)) if full[i : i + len(plain)] == plain)
    if start > 1:
        raise ValueError(
            f"GGUF: the tokenizer puts the tokens {full[:start]} before a text, of which GGUF can say only one"
        )
    return full[:start], full[start + len(plain) :]


def _templates(named):
    """Several chat templates, [{"name", "template"}, ...]: the one called default, and the others by their names."""
    templates = {choice["name"]: choice["template"] for choice in named}
    fields = {"tokenizer.chat_templates": others} if (others := [n for n in templates if n != "default"]) else {}
    for name, template in templates.items():
        fields["tokenizer.chat_template" + ("" if name == "default" else f".{name}")] = template
    return fields


def _notes(described):
    """Sentences about what a tokenizer does and GGUF does not say."""
    notes = []
    if _byte_level(described) and described.get("normalizer"):
        kind = described["normalizer"]["type"]
        notes.append(
            f"the tokenizer normalizes a text first ({kind}), which GGUF does not say: é as e and U+0301 stays that"
        )
    if greedy := [token["content"] for token in described["added_tokens"] if _greedy(token)]:
        notes.append(f"{', '.join(greedy[:3])} take spaces beside them along, or stand alone, which GGUF does not say")
    return notes


def _greedy(token):
    return token["lstrip"] or token["rstrip"] or token["single_word"]


def _check(tokenizer, described, fields, notes):
    """ValueError if the tokenizer that is read from these entries gives other ids; a sentence if it does so beside marks and edges."""
    again = BPETokenizer.from_gguf(fields)
    for text in PROBES:
        ours, theirs = tokenizer.encode(text), again.encode(text)
        if ours != theirs:
            raise ValueError(
                f"GGUF: read back from the file, the vocabulary would cut {text[:20]!r}... into {len(theirs)} tokens, "
                f"{theirs[:5]}..., and not into {len(ours)}, {ours[:5]}...: GGUF cannot hold this tokenizer"
            )
    unknown = described["model"].get("unk_token")  # a text does not spell it
    marks = [t["content"] for t in described["added_tokens"] if not _greedy(t) and t["content"] != unknown][:8]
    if any(tokenizer.encode(text) != again.encode(text) for text in (" a", "  a", *(f"a{m}b {m} c" for m in marks))):
        notes.append("a text that begins with a space, or stands behind a mark, has other ids there than here")
