"""The same job by every method and for several seeds: full fine-tuning, LoRA on the bfloat16 base, QLoRA with NF4, FP4 and Int4."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from .finetune import FULL_RECIPE, METHODS, finetune, finished


# ------------------------------------------------------------------------------------------------------------------- comparing
def compare(
    job, recipe, seeds=(0, 1, 2), out=None, methods=tuple(METHODS), full_lr=FULL_RECIPE.lr, progress=True, eval_every=0
):
    """{method: [Report for each seed]}: the same text, steps and batches for every method; full fine-tuning at its own rate.

    Finished runs in `out` are read instead of repeated, so that a comparison can be resumed.
    """
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


def describe_comparison(reports):
    """One line a method, as text. ± is the standard deviation over seeds; differences are taken seed by seed.

    before: the base as the method holds it, not yet fine-tuned. weights, optimizer, tape: bytes.
    """

    def spread(values):
        return f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else f"{values[0]:.4f}"

    def against(method, other):
        if other not in reports or other == method:
            return ""
        pairs = zip(reports[method], reports[other], strict=False)
        text = spread([a.after - b.after for a, b in pairs])
        return text if text.startswith("-") else "+" + text

    rows = [("method", "seeds", "before", "after", "minus LoRA's", "minus full's", "weights", "optimizer", "tape")]
    for method, rs in reports.items():
        b = rs[0].bytes
        rows.append(
            (
                METHODS[method].label,
                str(len(rs)),
                "" if rs[0].before is None else f"{rs[0].before:.4f}",
                spread([r.after for r in rs]),
                against(method, "lora"),
                against(method, "full"),
                f"{b['frozen weights'] + b['trained weights']:,}",
                f"{b['optimizer state']:,}",
                f"{b['tape, peak']:,}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
