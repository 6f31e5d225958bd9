"""Pretrain a byte-level Llama on text files: how the embedded base model was made.

Each file is one source. Its last 5 % is never trained on; at the end the finished bfloat16 weights are measured on it,
and the folder gets a model card with the recipe and the bits per byte of each source.
"""

import contextlib
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from .. import backend
from ..models import files
from ..models.llama import Llama, LlamaConfig
from .corpus import Text
from .datafiles import read_records, read_text
from .distributed import ALONE
from .train import Recipe, bits_per_byte, fit

HELD_OUT = 0.05
RECIPE = Recipe(
    steps=55000,
    batch_size=8,
    seq_len=256,
    lr=1.5e-3,
    schedule="cosine",
    warmup=200,
    floor=0.02,
    beta2=0.99,
    weight_decay=0.1,
    clip=1.0,
)


def pretrain(paths, out, recipe=RECIPE, config=None, checkpoint_every=200, device="cpu", progress=True, ranks=ALONE):
    """Train a Llama on the files and write a Hugging Face folder `out`. Returns {source: bits per byte held out}.

    Killed and started again with the same arguments, it goes on from the last checkpoint in `out`, and on the same machine, with the
    same BLAS kernel, it ends with the same bytes. `ranks` are the processes that train together (see `finetune`).
    """

    def hold():
        held.enter_context(files.locked(out))
        files.check_target(out)

    with contextlib.ExitStack() as held:
        ranks.first(hold)
        progress = progress and ranks.rank == 0
        return _run(paths, out, recipe, config or LlamaConfig(), checkpoint_every, device, progress, ranks)


def _run(paths, out, recipe, config, checkpoint_every, device, progress, ranks):
    """What `pretrain` does, in a folder that is held for it."""
    backend.module_for(device)
    texts = ranks.each(lambda: _sources(paths))
    cut = {name: int(len(t) * (1 - HELD_OUT)) for name, t in texts.items()}
    train = Text([t[: cut[name]] for name, t in texts.items()])
    recipe = recipe.planned(train)
    config = replace(config, max_position_embeddings=max(config.max_position_embeddings, recipe.seq_len))
    backend.seed(recipe.seed)
    model = Llama(config).to(device)
    about = {"config": asdict(config)}
    fit(model, train, recipe, out=out, checkpoint_every=checkpoint_every, about=about, progress=progress, ranks=ranks)
    return ranks.first(lambda: _finish(model, out, recipe, config, texts, cut, progress))


def _sources(paths):
    """{name of a file: its bytes as an array}."""
    names = [Path(p).stem for p in paths]
    if len(set(names)) < len(names):
        raise ValueError(f"pretrain: two sources have the same name ({', '.join(names)}); rename a file")
    return {Path(p).stem: np.frombuffer(_running_text(p), np.uint8) for p in paths}


def _finish(model, out, recipe, config, texts, cut, progress):
    """Write the finished model and its card; {source: bits per byte held out}."""
    # Positions that were never trained are no part of the finished model.
    model.config = replace(config, max_position_embeddings=min(config.max_position_embeddings, recipe.seq_len))
    model.save_pretrained(out)
    finished = Llama.from_pretrained(out)
    scores = {
        name: bits_per_byte(finished, Text([t[cut[name] :]]), recipe.seq_len, progress=progress)
        for name, t in texts.items()
    }
    files.write_text(Path(out) / "README.md", _card(finished, recipe, texts, cut, scores))
    return scores


def _running_text(path):
    """The bytes of a text file; ValueError for a file of records, whose braces would be learned."""
    data = read_text(path)
    if read_records(path, data) is not None:
        raise ValueError(f"{path} holds records; pretrain reads running text")
    return data


def _card(model, recipe, texts, cut, scores):
    parameters = sum(p.size for p in model.parameters())
    tokens = recipe.steps * recipe.accumulate * recipe.batch_size * recipe.seq_len
    rows = "\n".join(
        f"| {name} | {len(t):,} | {len(t) - cut[name]:,} | {scores[name]:.4f} |" for name, t in texts.items()
    )
    recipe_rows = "\n".join(f"| {key} | {value} |" for key, value in asdict(recipe).items())
    config_rows = "\n".join(f"| {key} | {value} |" for key, value in asdict(model.config).items())
    return f"""# A byte-level Llama, pretrained by tinylora on NumPy

{parameters:,} parameters, stored in bfloat16. Tokens are bytes: no tokenizer. Pretrained from scratch with `tinylora pretrain` on
{tokens:,} bytes drawn evenly from the sources below; the last {100 * HELD_OUT:.0f} % of each was held out and never trained on.

| source | bytes | held out | bits per byte, held out |
|---|---|---|---|
{rows}
| mean | | | {np.mean(list(scores.values())):.4f} |

Bits per byte: −log₂ of the probability of the held-out bytes, each predicted once from {recipe.seq_len // 2} to
{recipe.seq_len} bytes of context, by the weights in this folder.

It writes in the manner of its sources and knows nothing else. It is made to be fine-tuned in a lesson, not to be believed.

## Recipe

| | |
|---|---|
{recipe_rows}

## Architecture

| | |
|---|---|
{config_rows}
"""
