"""What each method of fine-tuning costs beside what it reaches, as `training.compare` measured it."""

import numpy as np

from ..training.finetune import METHODS
from .tables import aligned


def describe_comparison(reports):
    """One line a method, as text. ± is the standard deviation over seeds; differences are taken seed by seed.

    bits: of a frozen linear weight, its constants counted. error: Σ (ŵ − w)² / Σ w² of these weights.
    before: the base as the method holds it, not yet fine-tuned. weights, optimizer, tape: bytes.
    """
    table = [
        (
            "method",
            "seeds",
            "bits",
            "error",
            "before",
            "after",
            "minus LoRA's",
            "minus full's",
            "weights",
            "optimizer",
            "tape",
        )
    ]
    for method, runs in reports.items():
        first, held = runs[0], runs[0].bytes
        table.append(
            (
                METHODS[method].label,
                str(len(runs)),
                "" if first.bits_per_param is None else f"{first.bits_per_param:.3f}",
                "" if first.weight_error is None else f"{first.weight_error:.2e}",
                "" if first.before is None else f"{first.before:.4f}",
                _spread([run.after for run in runs]),
                _difference(reports, method, "lora"),
                _difference(reports, method, "full"),
                f"{held['frozen weights'] + held['trained weights']:,}",
                f"{held['optimizer state']:,}",
                f"{held['tape, peak']:,}",
            )
        )
    return aligned(table)


def _spread(values):
    return f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else f"{values[0]:.4f}"


def _difference(reports, method, other):
    if other not in reports or other == method:
        return ""
    pairs = zip(reports[method], reports[other], strict=False)
    text = _spread([mine.after - theirs.after for mine, theirs in pairs])
    return text if text.startswith("-") else "+" + text
