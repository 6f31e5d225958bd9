"""How many faults, by which seed, and the table of what came out of them."""

import os
from collections import Counter

import numpy as np
import pytest

#: How a run may end, and what the table calls that. The first two columns and the sentences are as it should be, all others are faults.
ENDS = {
    "same": "same bytes",
    "another": "other valid",
    "sentences": "sentences",
    "tracebacks": "tracebacks",
    "hangs": "hangs > 20 s",
    "memory": "memory",
    "unnamed": "no name",
    "NaN": "NaN unsaid",
    "crashes": "crashes",
    "mixed": "mixed",
    "left behind": "left behind",
}
TABLE = pytest.StashKey[dict]()


def pytest_ignore_collect(collection_path):
    """Nothing here where processes cannot be forked."""
    return True if not hasattr(os, "fork") and collection_path.name.startswith("test_") else None


@pytest.fixture
def many(request):
    """many(share, least): how many faults a test does, its share of --faults; it is skipped where that is not worth its beginning."""
    n = request.config.getoption("faults")

    def many(share, least=1):
        if least < 1 and share * n < 1.5:
            pytest.skip(f"takes long; with --faults {round(1.5 / share)} or more")
        return max(int(share * n), least)

    return many


@pytest.fixture
def run_machine(many):
    """run_machine(machine, examples, steps): so many random walks of up to that many steps, or its share of --faults if that is more.

    What fails is printed as the shortest walk that fails, and is tried first the next time.
    """

    def run(machine, examples, steps):
        from hypothesis import HealthCheck, settings
        from hypothesis.stateful import run_state_machine_as_test

        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=many(1 / 10, least=examples),
                stateful_step_count=steps,
                deadline=None,
                print_blob=True,
                suppress_health_check=list(HealthCheck),
            ),
        )

    return run


@pytest.fixture
def draw(request):
    """A generator that depends on --faults-seed and on the test."""
    seed = request.config.getoption("faults_seed")
    print(f"--faults-seed {seed}")
    return np.random.default_rng([seed, *request.node.name.encode()])


@pytest.fixture
def count(request):
    """count(family, end): another run of a family, and which of ENDS it had."""
    table = request.config.stash.setdefault(TABLE, {})

    def count(family, end):
        assert end in ENDS
        table.setdefault(family, Counter()).update(["runs", end])

    return count


def pytest_terminal_summary(terminalreporter, config):
    table = config.stash.get(TABLE, {})
    if not table:
        return
    width = max(map(len, [*table, "all"]))
    seed = config.getoption("faults_seed")
    terminalreporter.section(f"faults (--faults {config.getoption('faults')} --faults-seed {seed})")
    columns = {"runs": "runs", **ENDS}
    terminalreporter.line(" " * width + "".join(f"{heading:>{len(heading) + 2}}" for heading in columns.values()))
    total = sum(table.values(), Counter())
    for family, counts in [*table.items(), ("all", total)]:
        cells = (f"{counts[end]:>{len(heading) + 2},}" for end, heading in columns.items())
        terminalreporter.line(f"{family:<{width}}" + "".join(cells))
