"""Which rank is enough? Table 6 of the LoRA paper on the embedded model.

    held-out bits per byte after fine-tuning with r = 1, 2, 4, 8, 64, on W_q and W_v alone and on every linear layer

The paper finds that r = 1 does as well as r = 64 (§7.2). α stays where it is while r changes, as in §4.1, and so does all
else: text, steps, batches, learning rate (Adam's first step is then the same size for every r). Each run is
`finetune.finetune`'s, so a sweep that was stopped goes on where it was.
"""

import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..training.finetune import LORA_RECIPE, Job, finetune, finished

RANKS = (1, 2, 4, 8, 64)
TARGETS = {"q_proj, v_proj": ("q_proj", "v_proj"), "all-linear": "all-linear"}
JOB = Job(method="lora", alpha=16)
RECIPE = replace(LORA_RECIPE, steps=200)


def sweep(job=JOB, recipe=RECIPE, ranks=RANKS, targets=TARGETS, seeds=(0, 1, 2), out=None, progress=True):
    """{(targets' label, r): [Report for each seed]}; with `out`, finished runs are read instead of repeated."""
    reports = {}
    for label, modules in targets.items():
        for r in ranks:
            for seed in seeds:
                this, plan = replace(job, r=r, target_modules=modules), replace(recipe, seed=seed)
                folder = Path(out) / f"{re.sub(r'[^a-z_-]+', '-', label)}-r{r}-seed{seed}" if out else None
                if progress and finished(this, plan, folder) is None:
                    print(f"{label}, r = {r}, seed {seed}", file=sys.stderr)
                report = finetune(this, plan, folder, measure_before=False, checkpoint_every=0, progress=progress)
                reports.setdefault((label, r), []).append(report)
    return reports


def describe(reports):
    """The table, as text: mean ± standard deviation over seeds, and how far the least rank is from the largest."""
    after = {key: np.array([r.after for r in rs]) for key, rs in reports.items()}
    ranks = sorted({r for _, r in after})
    lines = ["held-out bits per byte, mean ± standard deviation over seeds; in brackets, trained parameters"]
    for label in dict.fromkeys(label for label, _ in after):
        lines += ["", label]
        for r in ranks:
            x = after[label, r]
            spread = f" ± {x.std(ddof=1):.4f}" if len(x) > 1 else ""
            lines.append(f"  r = {r:<3d} {x.mean():.4f}{spread}   ({reports[label, r][0].trainable:,})")
        if len(ranks) > 1:
            gain = after[label, ranks[0]] - after[label, ranks[-1]]
            where, sign = ("ahead of", -1) if gain.mean() < 0 else ("behind", 1)
            each = ", ".join(f"{sign * g:.4f}" for g in gain)
            lines.append(f"  r = {ranks[0]} is {abs(gain.mean()):.4f} {where} r = {ranks[-1]} (seed by seed: {each})")
    return "\n".join(lines)
