"""The page of claims: every experiment's table row and figure, as files beside each other, with the numbers of each seed."""

import json
from pathlib import Path

from ...figures.style import one_column, save
from ...models import files
from . import EXPERIMENTS, row

INTRODUCTION = """# The papers' qualitative claims, on toys

Written by `tinylora experiments --out FOLDER`, seeds {seeds}: the mean over the seeds, and their range in brackets; in a list, ± half the
range. A toy can refute a claim's generality; it cannot confirm what a claim says of language models. A condition is undecided if its limit
lies within the 90 % interval of its mean (`registry.above`). What was tuned stands in each experiment's docstring
(`tinylora/papers/claims`).

"""


def write_page(results, seeds, folder, pictures=True):
    """Write README.md (`text`), the numbers that it is made from (results.json: {experiment: [one result a seed]}) and the figures."""
    folder = Path(folder)
    drawn = _draw(results, folder) if pictures else {}
    stored = ",\n".join(f"{json.dumps(name)}: {json.dumps(found)}" for name, found in results.items())
    files.write_text(folder / "results.json", f"{{\n{stored}\n}}\n")
    files.write_text(folder / "README.md", text(results, seeds, drawn))


def text(results, seeds, drawn):
    """The page: one section an experiment with claim, paper, measured, verdict and figure. drawn: {experiment: its figure's name}"""
    sections = "".join(_section(name, found, drawn.get(name)) for name, found in results.items())
    return (INTRODUCTION.format(seeds=", ".join(map(str, seeds))) + sections).rstrip() + "\n"


def _draw(results, folder):
    """Draw every figure whose experiments are all among the results. -> {experiment: the name of the file it is drawn in}"""
    drawn = {}
    for name, e in EXPERIMENTS.items():
        needed = (name, *e.draw.beside) if e.draw else ()
        if needed and all(n in results for n in needed):
            with one_column():
                save(e.draw.function(*(results[n] for n in needed)), folder / f"{e.draw.file}.svg")
            drawn |= dict.fromkeys(needed, e.draw.file)
    return drawn


def _section(name, found, figure):
    """The section of one experiment, with its figure if there is one."""
    title = EXPERIMENTS[name].title
    claim, paper, measured, verdict = row(name, found)
    word, _, why = verdict.partition(":")
    text = f"## {title}\n\n{claim}\n\n* paper: {paper}\n* measured: {measured}\n* verdict: **{word}**:{why}\n\n"
    return f"{text}![{title}]({figure}.svg)\n\n" if figure else text
