"""How long the state machines of this folder run."""

import os

import pytest


@pytest.fixture
def run_machine(request):
    """run_machine(machine, examples, steps): that many random walks of up to that many steps, or as many as --faults asks for.

    What fails is printed as the shortest walk that fails, and is tried first the next time.
    """

    def run(machine, examples, steps):
        from hypothesis import HealthCheck, settings
        from hypothesis.stateful import run_state_machine_as_test

        asked = request.config.getoption("--faults", default=None) or os.environ.get("TINYLORA_FAULTS")
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=max(examples, int(asked or 0)),
                stateful_step_count=steps,
                deadline=None,
                print_blob=True,
                suppress_health_check=list(HealthCheck),
            ),
        )

    return run
