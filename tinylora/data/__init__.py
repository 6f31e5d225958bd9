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
