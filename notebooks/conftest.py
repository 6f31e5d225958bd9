"""The options of `pytest notebooks`, fresh random inputs, and the table of marks."""

import csv
import os

import numpy as np
import pytest

from tinylora.models.files import atomic

os.environ.setdefault("MPLBACKEND", "agg")  # a notebook's setup cell may import pyplot where there is no screen


def seconds(text):
    """A time limit, such as 60."""
    if not 0 < float(text) < 1e6:
        raise ValueError(text)
    return float(text)


def pytest_addoption(parser):
    parser.addoption(
        "--answers",
        metavar="PATH",
        help="what to grade: a notebook (.ipynb or .py) or a folder of them, whose names begin with the two digits of a "
        "notebook; or a folder of one folder a student; or the word solutions, the solutions in the sources. By "
        "default, the notebooks in notebooks/.",
    )
    parser.addoption(
        "--limit",
        metavar="SECONDS",
        type=seconds,
        default=600,
        help="when an answer that is still running is stopped and counts as not right: an endless loop must not hold up the "
        "others. The slowest solution takes seconds, so 60 is enough on a machine that does nothing else (600)",
    )
    parser.addoption("--table", metavar="FILE.csv", help="write the marks: a row an answer set, a column an exercise")


@pytest.fixture
def rng():
    """Random inputs that differ from run to run; the seed is printed when a test fails."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"rng seed: {seed}")
    return np.random.default_rng(seed)


@pytest.fixture(scope="session")
def marks(request):
    """{"alice": {"08-2": "right"}}, which the tests fill; after the last of them it is written to --table.

    An exercise that only others handed in counts as not answered.
    """
    found, path = {}, request.config.getoption("table")
    yield found
    if path:
        exercises = sorted({exercise for row in found.values() for exercise in row}, key=lambda e: (e[:2], int(e[3:])))
        rows = [[who, *(row.get(exercise, "not answered") for exercise in exercises)] for who, row in found.items()]
        try:
            with atomic(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows([["answers", *exercises], *rows])
        except OSError as error:
            pytest.fail(str(error), pytrace=False)
