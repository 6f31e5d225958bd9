"""The option --answers of `pytest notebooks`, and fresh random inputs."""

import os

import numpy as np
import pytest

os.environ.setdefault("MPLBACKEND", "agg")  # a notebook's setup cell may import pyplot where there is no screen


def pytest_addoption(parser):
    parser.addoption(
        "--answers",
        metavar="PATH",
        help="what to grade: a notebook (.ipynb or .py) or a folder of them, whose names begin with the two digits of a "
        'notebook; or the word "solutions", the solutions in the sources. By default, the notebooks in notebooks/.',
    )


@pytest.fixture
def rng():
    """Random inputs that differ from run to run; the seed is printed when a test fails."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"rng seed: {seed}")
    return np.random.default_rng(seed)
