"""One fixture, three array modules: every array test runs on NumPy, on the stand-in, and on CuPy where there is a GPU."""

import importlib.util
import os

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes (pytest -n), which share the cores that there are
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import fake_cupy
import numpy as np
import pytest

from tinylora import backend


def pytest_addoption(parser):
    group = parser.getgroup("faults", "tests/faults: kills, full disks and damaged files")
    group.addoption(
        "--faults",
        type=int,
        default=50,
        metavar="N",
        help="about so many faults of each sort (50; CI takes 500, a night 20000)",
    )
    group.addoption("--faults-seed", type=int, default=0, metavar="N", help="which of them (0)")


def _modules():
    yield pytest.param("numpy", id="numpy")
    yield pytest.param("fake_cupy", id="stand-in")
    if importlib.util.find_spec("cupy"):
        import cupy

        if cupy.cuda.is_available():
            yield pytest.param("cupy", id="cupy")


@pytest.fixture(params=_modules())
def xp(request):
    """The array module under test."""
    return importlib.import_module(request.param)


@pytest.fixture(autouse=True)
def fresh_state(monkeypatch):
    """Each test starts with the same generator, no memory limit and counters at zero."""
    backend.seed(0)
    monkeypatch.setattr(backend, "transfers", backend.Transfers())
    fake_cupy.memory["limit"] = None
    fake_cupy.counters.update(dict.fromkeys(fake_cupy.counters, 0))


@pytest.fixture
def rng(request):
    """Random inputs that differ from test to test and from run to run; the seed is printed when a test fails."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"rng seed: {seed}")
    return np.random.default_rng(seed)
