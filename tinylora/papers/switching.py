"""One base, two tasks: train an adapter on each of two texts, and swap them while generating.

    W₀ + s B A  →  W₀  →  W₀ + s B' A'                                                        (LoRA §4.1, and §1's promise)

The base stays where it is, once, and a switch moves the adapter's bytes at most. What is measured beside the text: which
adapter predicts which text (bits per byte), what each way of switching moves and takes, and that the base's bits are the
same in the end. The default texts are the embedded Jargon File and this package's own source, frozen at one commit: were it
the source as it stands, every change of the package would change the numbers.
"""

import hashlib
import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from .. import adapters, data
from ..backend import move
from ..interop import peft
from ..models import files
from ..nn import is_adapter_weight
from ..tensor import Tensor
from ..training.finetune import LORA_RECIPE, Job, corpus, finetune, prepare
from ..training.train import bits_per_byte

JOB = Job(r=8, alpha=16)
RECIPE = replace(LORA_RECIPE, steps=150)
PROMPTS = {"jargon": "\nhacker\n  n. ", "source": "\n    return "}


@dataclass
class Switching:
    """What the demonstration measured; times in seconds, medians."""

    scores: dict  # {(adapter or "base", text): held-out bits per byte}
    pieces: list  # [(adapter, text generated under it)]
    moved: dict  # {way of switching: (bytes, seconds)}
    batch: dict = field(default_factory=dict)
    restored: float = 1.0  # share of the merged layers' weights that merging and un-merging by subtraction gives back


def own_source(folder):
    """Write tinylora's own source, as `data.source` keeps it, to source.txt in a folder: a text that is always there. -> its path"""
    path = Path(folder) / "source.txt"
    files.write_text(path, data.source().decode("utf-8"))
    return path


def train(texts, out, job=JOB, recipe=RECIPE, progress=True):
    """{name: adapter folder}: one adapter for each of texts = {name: file, or None for the Jargon File}, all on the same base."""
    return {
        name: Path(
            finetune(
                replace(job, text=path and str(path)), recipe, Path(out) / name, measure_before=False, progress=progress
            ).adapter
        )
        for name, path in texts.items()
    }


def demonstrate(
    texts,
    folders,
    job=JOB,
    recipe=RECIPE,
    prompts=PROMPTS,
    tokens=120,
    pieces=4,
    temperature=0.6,
    seed=0,
    progress=True,
):
    """Switching: generate `pieces` pieces of one text, each under the next adapter and begun with its prompt, and measure.

    prompts   {name: what a piece of that adapter begins with}; without one, the first words of the adapter's held-out text
    """
    names = list(texts)
    model = prepare(job, recipe.seed)
    adapters.detach(model)  # the fresh one: what is left is the base as the adapters knew it
    before = fingerprint(model)
    for name, folder in folders.items():
        peft.load_adapter(model, folder, name)
    model.eval()

    heldout = {name: corpus(replace(job, text=path and str(path)), model.tokenizer)[1] for name, path in texts.items()}
    scores = {}
    for who in ("base", *names):
        adapters.set_adapter(model, () if who == "base" else who)
        for text in names:
            scores[who, text] = bits_per_byte(
                model, heldout[text], recipe.seq_len, shards=recipe.shards, progress=progress
            )

    ids, written = [], []
    for i in range(pieces):
        name = names[i % len(names)]
        begin = list(model.tokenizer.encode(prompts[name]) if name in prompts else _first(heldout[name], 24))
        adapters.set_adapter(model, name)  # the context is read again: its keys and values were another adapter's
        new = begin + list(model.stream(ids + begin, tokens, temperature, seed=[seed, i]))
        written.append((name, model.tokenizer.continuation(new)))
        ids += new

    result = Switching(scores, written, {})
    result.moved = _ways(model, names, folders)
    result.batch = _batch(model, names, heldout)
    result.restored = _restored(model)
    for name in names:
        adapters.detach(model, name)
    if fingerprint(model) != before:
        raise RuntimeError("switching: the base's bits have changed")
    return result


def _first(data, length):
    """The inputs of the first window of a corpus."""
    return data.rows(data.scored(length)[:1], length)[0][0]


def fingerprint(model):
    """A hash of every weight's bits, block constants included."""
    digest = hashlib.sha256()

    def take(array):
        digest.update(np.ascontiguousarray(move(array, "cpu")).tobytes())
        return array

    for name, w in model.named_weights():
        digest.update(name.encode())
        take(w.data) if isinstance(w, Tensor) else w.to(take)
    return digest.hexdigest()


def _median(fn, repeats=7):
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        fn()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _ways(model, names, folders):
    """{way: (bytes moved, seconds)} of a switch from the first adapter to the second."""
    b, turn = names[1], [0]

    def between():
        turn[0] ^= 1
        adapters.set_adapter(model, names[turn[0]])

    def from_disk():
        adapters.delete_adapter(model, b)
        peft.load_adapter(model, folders[b], b)

    def by_merging():
        adapters.set_adapter(model, b)
        merged.extend(layer.merge() for _, layer in adapters.lora_layers(model))

    adapter = adapters.adapter_of(model, b)
    moved = {
        "set_adapter, both on the base": (0, _median(between)),
        "A and B read from disk": (adapter.nbytes, _median(from_disk)),
    }
    merged = []
    seconds = _median(by_merging, 3)
    one = merged[: len(merged) // 3]
    moved["merged anew, W₀ + s B A"] = (sum(layer.weight.nbytes for layer in one), seconds)
    whole = sum(w.nbytes for path, w in model.named_weights() if not is_adapter_weight(path))
    moved["a whole fine-tuned model"] = (whole, None)
    return moved


def _batch(model, names, heldout):
    """Rows of a batch through their own adapters: the largest difference from one at a time, and the seconds of each way."""
    rows = np.stack([_first(heldout[n], min(128, model.config.positions)) for n in names for _ in range(4)])
    owners = [n for n in names for _ in range(4)]

    def together():
        with adapters.adapter_rows(model, owners):
            return move(model(rows).data, "cpu")

    def apart():
        parts = []
        for n in names:
            adapters.set_adapter(model, n)
            parts.append(move(model(rows[[o == n for o in owners]]).data, "cpu"))
        return np.concatenate(parts)

    error = float(np.abs(together() - apart()).max())
    return {"error": error, "together": _median(together), "apart": _median(apart)}


def _restored(model):
    """The share of weights that float32 W₀ + ΔW − ΔW gives back exactly, over all adapted layers."""
    same = total = 0
    for _, layer in adapters.lora_layers(model):
        w, delta = layer.base_layer.dense(), layer.delta()
        same += int(((w + delta) - delta == w).sum())
        total += w.size
    return same / total


def describe(s, names):
    """The demonstration as text."""
    width = max(map(len, (*names, "base"))) + 2
    lines = ["held-out bits per byte", " " * 12 + "".join(f"{n:>{max(width, 10)}}" for n in names)]
    for who in ("base", *names):
        lines.append(f"{who:<12}" + "".join(f"{s.scores[who, n]:>{max(width, 10)}.4f}" for n in names))
    lines += ["", "one base, the adapter swapped after each piece"]
    for name, text in s.pieces:
        lines += [f"--- {name}", *("    " + line for line in text.strip("\n").rstrip().splitlines())]
    lines += ["", f"{'a switch':<32}{'bytes moved':>14}{'milliseconds':>14}"]
    for way, (n, seconds) in s.moved.items():
        lines.append(f"{way:<32}{n:>14,}{'' if seconds is None else f'{1000 * seconds:.2f}':>14}")
    together, apart = 1000 * s.batch["together"], 1000 * s.batch["apart"]
    lines += [
        "",
        f"a batch of 8 rows, 4 for each adapter: {together:.1f} ms together, {apart:.1f} ms one adapter at a time; "
        f"largest difference {s.batch['error']:.1e}",
        f"the base's bits are unchanged; adding and subtracting ΔW would have restored {100 * s.restored:.1f} % of its weights exactly",
    ]
    return "\n".join(lines)
