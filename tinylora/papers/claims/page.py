"""The page of claims: every experiment's table row and figure, as files beside each other."""

from pathlib import Path

from ...figures.style import save
from ...models import files
from . import EXPERIMENTS, descendants, directions, dynamics, planted, row

#: figure file: (what it shows, which experiments' results it takes, how it is drawn from them)
FIGURES = {
    "rank_sweep": (("rank_sweep", "full_rank_target"), planted.draw_rank_sweep),
    "rank_one_to_d": (("table18_shape",), planted.draw_rank_one_to_d),
    "low_data": (("low_data",), planted.draw_low_data),
    "weight_types": (("weight_types",), planted.draw_weight_types),
    "similarity_maps": (("subspace_overlap",), lambda results: directions.draw_similarity_maps()),
    "two_seeds": (("two_seeds",), lambda results: directions.draw_two_seeds()),
    "top_of_delta_in_w": (("top_of_delta_in_w",), directions.draw_top_of_delta_in_w),
    "amplification": (("amplification",), directions.draw_amplification),
    "intrinsic_dimension": (("intrinsic_dimension",), directions.draw_intrinsic_dimension),
    "first_step": (("first_step",), dynamics.draw_first_step),
    "invariance": (("invariance",), lambda results: dynamics.draw_invariance(results[0])),
    "alpha_and_rate": (("alpha_is_like_lr",), lambda results: dynamics.draw_alpha_and_rate(results[0])),
    "learning_rates": (("learning_rate_ratio",), dynamics.draw_learning_rates),
    "merge_ulps": (("merge_restores",), dynamics.draw_merge_ulps),
    "quantization_starts": (("quantized_starts",), descendants.draw_quantization_starts),
    "aligned_first_step": (("aligned_first_step",), descendants.draw_aligned_first_step),
    "rate_ratio": (("lora_plus_ratio",), descendants.draw_rate_ratio),
    "rank_allocation": (("adalora_allocation",), descendants.draw_rank_allocation),
    "magnitude_and_direction": (("magnitude_and_direction",), descendants.draw_magnitude_and_direction),
    "entropy_and_error": (("calibrated_entropy",), descendants.draw_entropy_and_error),
    "learning_and_forgetting": (("learns_less_forgets_less",), descendants.draw_learning_and_forgetting),
}

INTRODUCTION = """# The papers' qualitative claims, on toys

Written by `tinylora experiments --out FOLDER`, seeds {seeds}: the mean over the seeds, and their range in brackets; in a list, ± half the
range. A toy can refute a claim's generality; it cannot confirm what a claim says of language models. A condition is undecided if its limit
lies within the 90 % interval of its mean (`registry.above`). What was tuned stands in each experiment's docstring
(`tinylora/papers/claims`).

"""


def write_page(results, folder, pictures=True):
    """Write README.md (one section an experiment: claim, paper, measured, verdict, figure) and the figures to a folder."""
    folder, seeds = Path(folder), len(next(iter(results.values())))
    drawn = {}
    for name, (needed, draw) in FIGURES.items():
        if pictures and all(n in results for n in needed):
            save(draw(*(results[n] for n in needed)), folder / f"{name}.svg")
            drawn |= dict.fromkeys(needed, name)
    text = INTRODUCTION.format(seeds=", ".join(map(str, range(seeds))))
    for name, found in results.items():
        e = EXPERIMENTS[name]
        claim, paper, measured, verdict = row(name, found)
        word, _, why = verdict.partition(":")
        text += f"## {e.title}\n\n{claim}\n\n* paper: {paper}\n* measured: {measured}\n* verdict: **{word}**:{why}\n\n"
        if name in drawn:
            text += f"![{e.title}]({drawn[name]}.svg)\n\n"
    files.write_text(folder / "README.md", text.rstrip() + "\n")
