"""Text to token ids and back. The embedded model reads bytes: token i is byte i, and there is nothing to learn or to download."""


class ByteTokenizer:
    """ids = the UTF-8 bytes of the text; 256 tokens."""

    vocab_size = 256

    def encode(self, text):
        """str or bytes -> list of ints below 256."""
        return list(text.encode("utf-8") if isinstance(text, str) else text)

    def decode(self, ids):
        """ints -> str; bytes that are not UTF-8 (a cut character) become U+FFFD."""
        return bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self, token):
        """The bytes that one token stands for, for printing a text while it grows."""
        return bytes([token])


def load_tokenizer(folder, vocab_size):
    """The tokenizer of a model folder: bytes for a vocabulary of 256."""
    if vocab_size == 256 and not (folder / "tokenizer.json").exists():
        return ByteTokenizer()
    raise ValueError(
        f"{folder}: vocab_size is {vocab_size}; tinylora reads byte-level models (256 tokens, no tokenizer.json)"
    )
