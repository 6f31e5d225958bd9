"""Pictures, drawn with matplotlib (extra `notebooks` or `dev`). One function a figure; each is seeded and carries a number.

    blocks      the law of a block's maximum; what an outlier costs, and what blocks buy
    nf4         NF4's values on the normal distribution, and how often each is used
    optimum     at which block sizes NF4 is nearly the best code
    successors  AF4 and BOF4 beside NF4
    bits        4-bit formats at equal block size, and at equal bits
    weights     every code on the weights of a checkpoint
    training    full fine-tuning, LoRA and QLoRA

The functions return a figure, which shows itself in a notebook; `save(figure, path)` writes it as SVG, whole or not at all.
"""

from .bits import bits_against_error
from .blocks import block_maximum, price_and_gain
from .nf4 import nf4_on_the_normal
from .optimum import nf4_optimal_for
from .style import canvas, require_matplotlib, save
from .successors import af4_against_blocksize, code_values
from .training import comparison
from .weights import survey

__all__ = [
    "af4_against_blocksize",
    "bits_against_error",
    "block_maximum",
    "canvas",
    "code_values",
    "comparison",
    "nf4_on_the_normal",
    "nf4_optimal_for",
    "price_and_gain",
    "require_matplotlib",
    "save",
    "survey",
]
