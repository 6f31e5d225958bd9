"""What an experiment is, how all of them run, and the table that says what came out."""

import math
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Drawing:
    """How the results of an experiment are drawn.

    file       the name of the figure's file, without .svg
    function   (results of the experiment, results of each in `beside`, …) -> figure
    beside     the names of other experiments whose results the same figure takes
    """

    file: str
    function: Callable
    beside: tuple = ()


@dataclass(frozen=True)
class Experiment:
    """One claim of a paper, and the toy that puts it to the test.

    title      a few words
    claim      what the paper says, in one sentence
    source     where it says so
    paper      the published number, or "" if the claim has none
    function   (seed=…) -> {name: float, or list of floats}
    measured   ((label, key), …): the numbers of a seed that the table shows
    verdict    [one result a seed] -> a sentence, worked out from the numbers: see `judge` for how it begins
    draw       its Drawing; None where it has no figure, or where it is drawn beside another
    """

    title: str
    claim: str
    source: str
    paper: str
    function: Callable
    measured: tuple
    verdict: Callable
    draw: Drawing | None = None


def values(results, key):
    """The number `key` of every seed, as an array (seeds,), or (seeds, n) where it is a list."""
    return np.array([result[key] for result in results], dtype=float)


def above(x, limit=0.0, least=0.0):
    """Does x, one number a seed, lie above the limit? -> True, False, or None: undecided

    Decided is what the mean lies farther from the limit than the half-width of its 90 % interval (Student's t) over the seeds, which for
    three seeds is about their range, and no less than `least`. That is for what the seeds at hand need not show: the grid that x was
    measured on, or what another BLAS kernel, which sums in another order, makes of one seed. One seed decides nothing. Ratios go in as
    logarithms.

    Kernels were compared on seeds 0, 1, 2 (OpenBLAS's Nehalem, Sandybridge, Haswell, SkylakeX). They move the numbers of an experiment
    by 1e-3 of their spread over the seeds or less, but for three: one of 1,024 points is classified otherwise (`intrinsic_dimension`),
    training at the largest rates is chaotic (`learning_rate_ratio`), and what is counted is rounding itself (`merge_restores`).
    """
    from scipy.special import stdtrit

    away = np.asarray(x, float) - limit
    n, mean = len(away), away.mean()
    if n < 2 or not np.isfinite(away).all():
        return None
    half = stdtrit(n - 1, 0.95) * away.std(ddof=1) / math.sqrt(n)
    return None if abs(mean) <= max(half, least) else bool(mean > 0)


def below(x, limit=0.0, least=0.0):
    """Does x lie below the limit? True, False, or None as in `above`."""
    return above(-np.asarray(x, float), -limit, least)


def judge(sentence, conditions):
    """A verdict.   conditions    {what is claimed: True, False, or None if it is undecided}

    "holds: …" if every condition is true, "fails: …" if none is, "undecided: …" if none is decided, "holds in part: …" if some are
    true, "fails in part: …" if some are false and the others undecided. What is undecided is named at the end.
    """
    outcomes = [None if c is None else bool(c) for c in conditions.values()]
    if None not in outcomes:
        word = "holds" if all(outcomes) else "holds in part" if any(outcomes) else "fails"
    else:
        word = "holds in part" if True in outcomes else "fails in part" if False in outcomes else "undecided"
    open_ = [what for what, outcome in zip(conditions, outcomes, strict=True) if outcome is None]
    return f"{word}: {sentence}" + (f"; undecided over these seeds: {'; '.join(open_)}" if open_ else "")


def run_all(registry, names=None, seeds=SEEDS, progress=None):
    """{name: [result of each seed]}. progress(name, seed, seconds) is called after each run, if given."""
    if names is None:
        names = registry
    names = [names] if isinstance(names, str) else list(names)
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
    """claim | paper | measured: mean and range over the seeds | verdict, wrapped to columns of these widths. -> str"""
    unknown = [name for name in results if name not in registry]
    if unknown:
        raise ValueError(f"experiments: there is no {unknown[0]!r}; they are {', '.join(registry)}")
    rows = [("claim", "paper", "measured: mean [range over seeds], in lists mean±half of it", "verdict")]
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
    """ "mean [least … most]" of one number over the seeds; of a list "mean±half the range" of each, the latter if three digits show it."""
    if x.ndim > 1:
        pairs = zip(x.mean(axis=0), np.ptp(x, axis=0) / 2, strict=True)
        return " ".join(short(mean) + (f"±{half:.1g}" if half > 5e-4 * abs(mean) else "") for mean, half in pairs)
    return short(x[0]) if x.min() == x.max() else f"{short(x.mean())} [{short(x.min())} … {short(x.max())}]"


def short(v):
    """Three significant digits, without zeros that say nothing."""
    return f"{v:.3g}"
