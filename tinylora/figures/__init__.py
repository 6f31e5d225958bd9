"""Pictures, drawn with matplotlib (extra `notebooks` or `dev`). One function a figure; each is seeded and carries a number.

    blocks      the law of a block's maximum; what an outlier costs, and what blocks buy
    nf4         NF4's values on the normal distribution, and how often each is used
    optimum     at which block sizes NF4 is nearly the best code
    successors  AF4 and BOF4 beside NF4
    bits        4-bit formats at equal block size, and at equal bits
    weights     every code on the weights of a checkpoint
    training    full fine-tuning, LoRA and QLoRA
    rank        which rank is enough, on planted updates and on the embedded model
    directions  shared subspaces, amplification, intrinsic dimension
    claims      the page of all experiments
    dynamics    the first step, invariances, learning rates, merging
    descendants starts for a quantized base, allocation, and what else LoRA's descendants claim
    counting    the paper's printed counts over the recomputed ones
    tape        bytes and multiply-adds of a step, with LoRA and without
    memory      where the bytes of a training step are; QLoRA's figure 6
    qlora_layer which weight the gradient meets
    paging      the timeline of a pager, and what a budget costs
    normality   how many rows are not normal, beside the power of the test

The functions return a figure, which shows itself in a notebook; `save(figure, path)` writes it as SVG, whole or not at all.
"""

from .bits import bits_against_error
from .blocks import block_maximum, price_and_gain
from .claims import claims
from .directions import amplification, intrinsic_dimension, similarity_maps, top_of_delta_in_w, two_seeds
from .dynamics import alpha_and_rate, first_step, invariance, learning_rates, merge_ulps
from .memory import account_bars, figure_6
from .nf4 import nf4_on_the_normal
from .normality import rejected_against_length
from .optimum import nf4_optimal_for
from .paging import paging_costs, timeline
from .rank import low_data, rank_one_to_d, rank_sweep, rank_table, weight_types
from .style import canvas, require_matplotlib, save
from .successors import af4_against_blocksize, code_values
from .training import comparison, loss_curves
from .weights import survey

__all__ = [
    "account_bars",
    "af4_against_blocksize",
    "alpha_and_rate",
    "amplification",
    "bits_against_error",
    "block_maximum",
    "canvas",
    "claims",
    "code_values",
    "comparison",
    "figure_6",
    "first_step",
    "intrinsic_dimension",
    "invariance",
    "learning_rates",
    "loss_curves",
    "low_data",
    "merge_ulps",
    "nf4_on_the_normal",
    "nf4_optimal_for",
    "paging_costs",
    "price_and_gain",
    "rank_one_to_d",
    "rank_sweep",
    "rank_table",
    "rejected_against_length",
    "require_matplotlib",
    "save",
    "similarity_maps",
    "survey",
    "timeline",
    "top_of_delta_in_w",
    "two_seeds",
    "weight_types",
]
