"""What an experiment is, how all of them run, and the table that says what came out."""

import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Experiment:
    """One claim of a paper, and the toy that puts it to the test.

    title      a few words
    claim      what the paper says, in one sentence
    source     where it says so
    paper      the published number, or "" if the claim has none
    function   (seed=…) -> {name: float, or list of floats}
    measured   ((label, key), …): the numbers of a seed that the table shows
    verdict    [one result a seed] -> a sentence that begins with "holds", "holds in part" or "fails", worked out from the numbers
    """

    title: str
    claim: str
    source: str
    paper: str
    function: Callable
    measured: tuple
    verdict: Callable


def values(results, key):
    """The number `key` of every seed, as an array (seeds,), or (seeds, n) where it is a list."""
    return np.array([result[key] for result in results], dtype=float)


def judge(sentence, *conditions):
    """ "holds: …" if every condition is true, "fails: …" if none is, else "holds in part: …"."""
    conditions = [bool(c) for c in conditions]
    word = "holds" if all(conditions) else "holds in part" if any(conditions) else "fails"
    return f"{word}: {sentence}"


def run_all(registry, names=None, seeds=(0, 1, 2), progress=None):
    """{name: [result of each seed]}. progress(name, seed, seconds) is called after each run, if given."""
    names = list(registry) if names is None else [names] if isinstance(names, str) else list(names)
    unknown = [name for name in names if name not in registry]
    if unknown:
        raise ValueError(f"experiments: there is no {unknown[0]!r}; they are {', '.join(registry)}")
    if not len(seeds):
        raise ValueError("experiments: no seed was given; expected one or more whole numbers")
    results = {}
    for name in names:
        results[name] = []
        for seed in seeds:
            start = time.perf_counter()
            results[name].append(registry[name].function(seed=seed))
            if progress is not None:
                progress(name, seed, time.perf_counter() - start)
    return results


def table(registry, results, widths=(38, 24, 44, 40)):
    """claim | paper | measured: mean [least … most] over the seeds | verdict, wrapped to columns of these widths. -> str"""
    unknown = [name for name in results if name not in registry]
    if unknown:
        raise ValueError(f"experiments: there is no {unknown[0]!r}; they are {', '.join(registry)}")
    rows = [("claim", "paper", "measured: mean [range over seeds]", "verdict")]
    rows += [row(registry[name], found) for name, found in results.items()]
    lines = []
    for i, texts in enumerate(rows):
        cells = [textwrap.wrap(cell, width) for cell, width in zip(texts, widths, strict=True)]
        for k in range(max(map(len, cells))):
            parts = (cell[k] if k < len(cell) else "" for cell in cells)
            lines.append("  ".join(p.ljust(w) for p, w in zip(parts, widths, strict=True)).rstrip())
        lines.append("  ".join(("=" if i == 0 else "-") * w for w in widths))
    return "\n".join(lines)


def row(e, found):
    """(claim with its source, the paper's number, what was measured, verdict) of one experiment's results, as text."""
    measured = "; ".join(f"{label} {spread(values(found, key))}" for label, key in e.measured)
    return f"{e.claim} ({e.source})", e.paper or "no number", measured, e.verdict(found)


def spread(x):
    """ "mean [least … most]" of one number over the seeds; of a list, its means."""
    if x.ndim > 1:
        return " ".join(short(v) for v in x.mean(axis=0))
    return short(x[0]) if x.min() == x.max() else f"{short(x.mean())} [{short(x.min())} … {short(x.max())}]"


def short(v):
    """Three significant digits, without zeros that say nothing."""
    return f"{v:.3g}"


SEEDS = (0, 1, 2)


def given_or_run(given, function):
    return [function(seed=seed) for seed in SEEDS] if given is None else given
