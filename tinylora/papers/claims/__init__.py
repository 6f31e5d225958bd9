"""The papers' qualitative claims, each put to the test on a toy that runs in a second or two on one core.

    planted      which rank is enough, scarce data, which weights to adapt
    directions   what two runs share, what ΔW amplifies, how many random directions are enough
    dynamics     the first step against r, exchanges among α, rates and initialization, learning rates, merging
    descendants  what the methods that came after LoRA claim

    results = claims.run(["rank_sweep", "first_step"], seeds=(0, 1, 2))
    print(claims.describe(results))

An experiment is one function of a seed that returns plain numbers; everything is trained with tinylora's own layers, operations and AdamW.
Its docstring says what is claimed and where, what is measured, what was expected, and what was tuned. The verdict is worked out from the
numbers of all seeds, and says "fails" where they say so, and what is undecided where they differ too much among each other. A toy can
refute a claim's generality; it cannot confirm what a claim says of language models.

An experiment also names how it is drawn (`Experiment.draw`); `page` writes the table and the figures beside each other. A file joins by
defining `EXPERIMENTS`, a dict {name: Experiment}.
"""

from . import descendants, directions, dynamics, planted, registry
from .registry import Drawing, Experiment

__all__ = ["EXPERIMENTS", "Drawing", "Experiment", "describe", "row", "run"]

#: {name: Experiment}, in the order of the page
EXPERIMENTS = {
    **planted.EXPERIMENTS,
    **directions.EXPERIMENTS,
    **dynamics.EXPERIMENTS,
    **descendants.EXPERIMENTS,
}
assert len(EXPERIMENTS) == sum(len(m.EXPERIMENTS) for m in (planted, directions, dynamics, descendants)), (
    "a name stands twice"
)


def run(names=None, seeds=(0, 1, 2), progress=None):
    """Run the named experiments, or all, once a seed. progress(name, seed, seconds) is called after each. -> {name: [result of each seed]}

    ValueError for a name that does not exist, and for no seeds; it comes before anything runs.
    """
    return registry.run_all(EXPERIMENTS, names, seeds, progress)


def describe(results, widths=(38, 24, 44, 40)):
    """claim | paper | measured: mean [least … most] over the seeds | verdict, as an aligned text. `results` as `run` gives them. -> str"""
    return registry.table(EXPERIMENTS, results, widths)


def row(name, found):
    """(claim, the paper's number, what was measured, verdict) of one experiment's results, as text."""
    return registry.row(EXPERIMENTS[name], found)
