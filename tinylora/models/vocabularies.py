"""The vocabulary inside a GGUF, built again for the tokenizers package."""

PRE = ("gpt-2", "smollm")
_CONTROL, _USER_DEFINED = 3, 4  # GGUF's token types


def from_gguf(fields, where="the GGUF file"):
    """(a tokenizers.Tokenizer, settings) from the entries tokenizer.ggml.*: tokens, token_type, merges, pre, the ids of bos, eos, ..."""
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
    parts = package().pre_tokenizers
    try:
        vocabulary = {token: i for i, token in enumerate(tokens)}
        pairs = [tuple(merge.split(" ", 1)) for merge in merges]
        backend = package().Tokenizer(package().models.BPE(vocab=vocabulary, merges=pairs))
    except Exception as error:
        raise ValueError(f"{where}: the merges do not fit the vocabulary ({error})") from None
    cut = parts.ByteLevel(add_prefix_space=bool(fields.get("tokenizer.ggml.add_space_prefix", False)))
    digits = [parts.Digits(individual_digits=True)] if pre == "smollm" else []
    backend.pre_tokenizer = parts.Sequence([*digits, cut])
    backend.decoder = package().decoders.ByteLevel()
    for special, code in ((True, _CONTROL), (False, _USER_DEFINED)):
        added = [
            package().AddedToken(token, special=special, normalized=False)
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
    return backend, settings


def package():
    """The tokenizers package; a sentence if it is not installed."""
    try:
        import tokenizers
    except ModuleNotFoundError:
        raise ValueError(
            "this model's vocabulary needs the tokenizers package: pip install -e '.[llm]' in a clone of tinylora"
        ) from None
    return tokenizers
