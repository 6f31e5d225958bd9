"""The same job by every method and for several seeds: full fine-tuning, LoRA on the bfloat16 base, QLoRA with NF4, FP4 and Int4.

LoRA on a base in LLM.int8 takes part where it is named.

What it returns is printed by `costs.methods` and drawn by `figures.runs`.
"""

import contextlib
import sys
from dataclasses import replace
from pathlib import Path

from ..models import files
from .finetune import COMPARED, FULL_RECIPE, METHODS, finetune, finished


def compare(
    job, recipe, seeds=(0, 1, 2), out=None, methods=COMPARED, full_lr=FULL_RECIPE.lr, progress=True, eval_every=0
):
    """{method: [Report for each seed]}: the same text, steps and batches for every method; full fine-tuning at its own rate.

    Finished runs in `out` are read instead of repeated, so that a comparison can be resumed.
    """
    with files.locked(out) if out else contextlib.nullcontext():
        if out:
            files.check_target(out)
        return _each(job, recipe, seeds, out, methods, full_lr, progress, eval_every)


def _each(job, recipe, seeds, out, methods, full_lr, progress, eval_every):
    """What `compare` does, in a folder that is held for it."""
    reports = {}
    for method in methods:
        for seed in seeds:
            this = replace(job, method=method)
            plan = replace(recipe, seed=seed, lr=full_lr if method == "full" else recipe.lr)
            folder = Path(out) / f"{method}-seed{seed}" if out else None
            if progress and finished(this, plan, folder) is None:
                print(f"{METHODS[method].label}, seed {seed}", file=sys.stderr)
            report = finetune(this, plan, folder, eval_every, measure_before=seed == seeds[0], progress=progress)
            reports.setdefault(method, []).append(report)
    return reports
