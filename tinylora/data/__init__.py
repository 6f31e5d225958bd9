"""The embedded base model and texts: where they lie, and how to read them."""

import lzma
from pathlib import Path

_HERE = Path(__file__).parent


def base_folder():
    """The folder of the embedded byte-level Llama: config.json, model.safetensors, README.md (its model card)."""
    return _HERE / "base"


def jargon(split):
    """The Jargon File as bytes: split "train" or "heldout". Entries are separated by a blank line; none is in both."""
    if split not in ("train", "heldout"):
        raise ValueError(f"jargon: split {split!r} is unknown: expected 'train' or 'heldout'")
    return lzma.decompress((_HERE / f"jargon-{split}.txt.xz").read_bytes())


def source():
    """tinylora's own source as bytes, as it stood at one commit (README.md says which): it stays when the package changes."""
    return lzma.decompress((_HERE / "source.txt.xz").read_bytes())


def jargon_pairs(split):
    """The Jargon File as [(question, answer)]: 'What does "…" mean to a hacker?', and the entry's text without its indentation."""
    pairs = []
    for entry in jargon(split).decode("utf-8").split("\n\n"):
        term, _, text = entry.strip("\n").partition("\n")
        answer = "\n".join(line.strip() for line in text.splitlines()).strip()
        if term.strip() and not term.startswith(" ") and answer:
            pairs.append((f'What does "{term.strip()}" mean to a hacker?', answer))
    return pairs
