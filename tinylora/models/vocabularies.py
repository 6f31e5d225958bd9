"""The vocabulary inside a GGUF, built anew for the tokenizers package.

    tokenizer.ggml.model "gpt2"     byte-level BPE: tokens and merges; `pre` names how a text is cut before them
    tokenizer.ggml.model "llama"    SentencePiece: tokens with scores; of all neighbours that make a token, those merge first
                                    whose token has the highest score. Spaces are ▁, and what is no token becomes bytes, <0x0A>

A GGUF names the way of cutting only. CUTS writes the names out as regular expressions, each applied to what the one before it left:
llama.cpp's (src/llama-vocab.cpp), in the spelling of the models' own tokenizer.json. A name that is not there is refused, and so is
a file without one: llama.cpp then cuts as no model was trained, and transformers as GPT-2.

Differs from transformers' GGUF reader, which
- cuts as GPT-2 wherever it does not know `pre` (smollm, falcon, deepseek-coder, ...);
- merges also what Llama 3's and Mistral's own vocabularies look up whole (`ignore_merges`), and puts no BOS before Llama 3's texts
  in a file that leaves add_bos_token out;
- leaves control tokens with letters outside of the byte alphabet (DeepSeek's) out;
- puts one space before every SentencePiece text, but none before one that begins with a space or stands behind a special token;
  SentencePiece itself and llama.cpp put one wherever a text begins, unless the file says otherwise (add_space_prefix).
"""

import json
import math
import re

from .fields import check, flag, optional, shown, text

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6  # GGUF's token types
_SPACE = "\u2581"
#: Entries tokenizer.ggml.* whose kind is checked; ids of marks that are none count as absent.
_ENTRIES = {
    **dict.fromkeys(("model", "pre"), optional(text())),
    **dict.fromkeys(("add_bos_token", "add_space_prefix", "remove_extra_whitespaces"), optional(flag())),
}
_LONGEST = 1000  # characters of a SentencePiece token: all ways to cut one in two are looked at
_INTO_A_WORD = re.compile("[A-Za-z][ \u2581]")

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENDS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # signs with the line breaks behind them, and white space
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_ENDS}"
_QWEN2 = rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_ENDS}"
_QWEN35 = (
    rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_TEKKEN = rf"{_WORDS % ('', '')}|\p{{N}}|{_SLASHES}"
_GPT4O = rf"{_WORDS % (_SHORT + '?', _SHORT + '?')}|\p{{N}}{{1,3}}|{_SLASHES}"

#: Lists of regular expressions, and the names that mean them.
_NAMES = {
    (_GPT2,): "gpt-2 phi-2 mpt olmo jais trillion exaone4 mellum gigachat a.x-4.0 granite-docling",
    (r"\p{N}", _GPT2): "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
    (
        _LLAMA3,
    ): "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano dbrx smaug-bpe glm4 chatglm-bpe",
    (_QWEN2,): "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2",
    (_QWEN35,): "qwen35",
    (_TEKKEN,): "tekken",
    (_GPT4O,): "gpt-4o llama4 kanana2 talkie minimax-m2",
    (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"): "deepseek-coder",
    (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"): "falcon",
    (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"): "default",
}
CUTS = {name: cuts for cuts, names in _NAMES.items() for name in names.split()}
#: A word that is a token is taken whole, whatever the merges say; and a text begins with BOS unless the file says otherwise.
_WHOLE_WORDS = {"tekken", *_NAMES[(_LLAMA3,)].split()} - {"dbrx", "smaug-bpe", "glm4", "chatglm-bpe"}


def takes_whole_words(name):
    """Whether a word that is a token is taken whole under this way of cutting (`ignore_merges`)."""
    return name in _WHOLE_WORDS


def from_gguf(fields, where="the GGUF file"):
    """(a tokenizers.Tokenizer, what its tokenizer_config.json would say) from the entries tokenizer.* of a GGUF."""
    entries = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items()}
    tokens = entries.get("tokens")
    if not _texts(tokens) or not tokens or len(set(tokens)) != len(tokens):
        raise ValueError(f"{where}: tokenizer.ggml.tokens is no list of different texts")
    types = entries.get("token_type") or [_NORMAL] * len(tokens)
    if not isinstance(types, list) or len(types) != len(tokens):
        raise ValueError(f"{where}: tokenizer.ggml.tokens and token_type do not belong together")
    check(entries, _ENTRIES, where)
    kind = entries.get("model")
    if kind not in ("gpt2", "llama"):
        raise ValueError(
            f"{where}: its tokenizer is {kind!r}; tinylora builds 'gpt2' (byte-level BPE) and 'llama' (SentencePiece), and reads "
            "others from the tokenizer.json of a model folder"
        )
    build = _byte_level if kind == "gpt2" else _sentencepiece
    backend = build(package(), tokens, types, entries, where)
    for special, code in ((True, _CONTROL), (False, _USER_DEFINED)):
        found = [token for token, t in zip(tokens, types, strict=True) if t == code]
        added = [package().AddedToken(token, special=special, normalized=False) for token in found]
        (backend.add_special_tokens if special else backend.add_tokens)(added)
    settings = _settings(tokens, entries, fields)
    begins = entries.get("add_bos_token", kind == "llama" or entries.get("pre") in _WHOLE_WORDS)
    if begins and (bos := settings.get("bos_token")) is not None:
        backend.post_processor = _after(bos, tokens.index(bos), where)
    return backend, settings


def _after(bos, i, where):
    """What puts a token before a text."""
    try:
        if bos.startswith("$"):
            raise ValueError("the package reads it as a place for a text")
        return package().processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B:1"], special_tokens=[(bos, i)]
        )
    except Exception as error:
        raise ValueError(
            f"{where}: tokenizer.ggml.bos_token_id is {shown(bos)}, which cannot begin a text ({error})"
        ) from None


def _byte_level(package, tokens, types, entries, where):
    """Byte-level BPE (Radford et al. 2019)."""
    pre, merges = entries.get("pre"), entries.get("merges")
    if pre is None:
        raise ValueError(
            f"{where} names no way of cutting text before the merges (tokenizer.ggml.pre), so the tokens cannot be told; convert the "
            "model anew with a current llama.cpp, or open its folder with tokenizer.json"
        )
    if pre not in CUTS:
        raise ValueError(
            f"{where}: the way of cutting text before the merges is {pre!r}; tinylora knows {', '.join(sorted(CUTS))}, and "
            "reads others from the tokenizer.json of a model folder"
        )
    if not _texts(merges):
        raise ValueError(f"{where}: tokenizer.ggml.tokens and merges do not belong together")
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    parts, byte_level = package.pre_tokenizers, package.pre_tokenizers.ByteLevel
    backend = _model(package, tokens, pairs, where, ignore_merges=pre in _WHOLE_WORDS)
    cuts = [parts.Split(package.Regex(cut), "isolated") for cut in CUTS[pre]]
    backend.pre_tokenizer = parts.Sequence([*cuts, byte_level(add_prefix_space=False, use_regex=False)])
    backend.decoder = package.decoders.ByteLevel()
    return backend


def _sentencepiece(package, tokens, types, entries, where):
    """SentencePiece's BPE (Kudo and Richardson 2018)."""
    scores = entries.get("scores")
    if (
        not isinstance(scores, list)
        or len(scores) != len(tokens)
        or not all(isinstance(x, (int, float)) and math.isfinite(x) for x in scores)
    ):
        raise ValueError(
            f"{where}: tokenizer.ggml.tokens and scores do not belong together: expected a finite score for each"
        )
    if long := next((token for token in tokens if len(token) > _LONGEST), None):
        raise ValueError(
            f"{where}: tokenizer.ggml.tokens has one of {len(long)} characters, expected at most {_LONGEST}: {shown(long)}"
        )
    if entries.get("remove_extra_whitespaces") or entries.get("precompiled_charsmap"):
        raise ValueError(
            f"{where}: its SentencePiece vocabulary changes a text before cutting it; tinylora reads none that does"
        )
    ids = {t: i for i, (t, kind) in enumerate(zip(tokens, types, strict=True)) if kind in (_NORMAL, _USER_DEFINED)}
    merges = []
    for token in ids:
        pairs = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ids and token[i:] in ids]
        merges += sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    merges.sort(key=lambda pair: (-scores[ids[pair[0] + pair[1]]], -len(pair[0]), -len(pair[1])))
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN), None)
    backend = _model(package, tokens, merges, where, unk_token=unknown, fuse_unk=True, byte_fallback=_BYTE in types)
    n, d, spaced = package.normalizers, package.decoders, entries.get("add_space_prefix", True)
    backend.normalizer = n.Sequence([*([n.Prepend(_SPACE)] if spaced else []), n.Replace(" ", _SPACE)])
    strip = [d.Strip(" ", 1, 0)] if spaced else []
    backend.decoder = d.Sequence([d.Replace(_SPACE, " "), d.ByteFallback(), d.Fuse(), *strip])
    return backend


def _model(package, tokens, merges, where, **options):
    try:
        vocabulary = {token: i for i, token in enumerate(tokens)}
        return package.Tokenizer(package.models.BPE(vocab=vocabulary, merges=merges, **options))
    except Exception as error:  # the package raises plain Exceptions
        raise ValueError(f"{where}: the merges do not fit the vocabulary ({error})") from None


def _settings(tokens, entries, fields):
    """The special tokens by name, and the chat templates."""
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"), ("eot", "eot")):
        i = entries.get(f"{theirs}_token_id")
        if isinstance(i, int) and 0 <= i < len(tokens):
            settings[f"{ours}_token"] = tokens[i]
    start = "tokenizer.chat_template."
    templates = {name.removeprefix(start): text for name, text in fields.items() if name.startswith(start)}
    if "tokenizer.chat_template" in fields:
        templates = {"default": fields["tokenizer.chat_template"], **templates}
    if templates:
        several = [{"name": name, "template": text} for name, text in templates.items()]
        settings["chat_template"] = templates["default"] if set(templates) == {"default"} else several
    return settings


def _texts(value):
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def package():
    """The tokenizers package; a sentence if it is not installed."""
    try:
        import tokenizers
    except ModuleNotFoundError:
        raise ValueError(
            "this model's vocabulary needs the tokenizers package: pip install -e '.[llm]' in a clone of tinylora"
        ) from None
    return tokenizers


# ------------------------------------------------------------------------------------------------------------------ long texts
def splits_before_words(backend):
    """Whether no token reaches over the place between a letter and the space before the next word, or depends on what is beyond it.

    So it is for byte-level vocabularies that cut as GPT-2 or in a way of CUTS, and for SentencePiece's without a token like "a\u2581".
    """
    model, words = backend.model, backend.get_vocab(with_added_tokens=False)
    added = (token.content for token in backend.get_added_tokens_decoder().values())
    if type(model).__name__ != "BPE" or any(re.search("^[A-Za-z]|[A-Za-z] [A-Za-z]|[A-Za-z]$", t) for t in added):
        return False
    cuts, changes = _parts(backend.pre_tokenizer, "pretokenizers"), _parts(backend.normalizer, "normalizers")
    kinds = {cut["type"] for cut in cuts}
    if kinds <= {"Metaspace"}:
        known = {"Prepend": {"prepend": _SPACE}, "Replace": {"pattern": {"String": " "}, "content": _SPACE}}
        plain = all({"type": part["type"], **known.get(part["type"], {})} == part for part in changes)
        return plain and not model.ignore_merges and _SPACE in words and not any(map(_INTO_A_WORD.search, words))
    splits = [cut for cut in cuts if cut["type"] == "Split"]
    ways = tuple(split["pattern"].get("Regex") for split in splits)
    return (
        kinds <= {"ByteLevel", "Digits", "Split"}
        and all(part["type"] == "NFC" for part in changes)
        and all((split["behavior"], split["invert"]) == ("Isolated", False) for split in splits)
        and (ways in _NAMES or (not ways and any(cut.get("use_regex") for cut in cuts)))
    )


def _parts(component, name):
    """What a normalizer or a pre-tokenizer is made of, as the tokenizers package writes it; nothing of None."""
    if component is None:
        return []

    def parts(part):
        return [p for inner in part[name] for p in parts(inner)] if part["type"] == "Sequence" else [part]

    return parts(json.loads(component.__getstate__()))
