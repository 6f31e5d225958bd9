"""One fixture, three array modules: every array test runs on NumPy, on the stand-in, and on CuPy where there is a GPU.

And one for the tests that look at pages: they are opened in Chromium.
"""

import importlib.util
import os
import shutil

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes (pytest -n), which share the cores that there are
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")

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


@pytest.fixture(scope="module")
def chromium():
    """The path of an installed Chromium that playwright can drive; skips where one of the two is missing."""
    pytest.importorskip("playwright.sync_api", reason="looking at pages needs playwright: pip install -e '.[book]'")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    return path or pytest.skip("Chromium is not installed")


@pytest.fixture(scope="module")
def browser(chromium):
    """A headless Chromium. It runs an event loop while it is open, which other modules may not meet."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """open_page(address, **options of the window) -> the page, what went wrong in it, and the addresses that it asked for."""
    windows = []

    def open_page(address, **options):
        windows.append(browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options}))
        page, wrong, asked = windows[-1].new_page(), [], []
        page.on("console", lambda message: message.type in ("error", "warning") and wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        # what the next page cuts short, such as an icon, did not fail
        page.on("requestfailed", lambda request: "ABORTED" in request.failure or wrong.append(f"failed: {request.url}"))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        return page, wrong, asked

    yield open_page
    for window in windows:
        window.close()
