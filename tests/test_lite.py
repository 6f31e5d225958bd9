"""The page for a browser: what its copies of the notebooks hold, what it installs, and the links to Colab and Binder."""

import hashlib
import importlib.util
import json
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from tinylora.kernels import products

ROOT = Path(__file__).parents[1]


def load(name):
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "docs"))
    return module


lite = load("lite")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize("name", lite.NOTEBOOKS)
def test_a_copy_installs_first_and_has_no_dead_link(name):
    text = (ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8")
    copy = json.loads(lite.course_copy(name, text, {"02_a_small_autograd.ipynb"}))
    code = [cell for cell in copy["cells"] if cell["cell_type"] == "code"]
    assert code[0]["source"] == lite.INSTALL and "tinylora" in lite.INSTALL
    assert not any(cell["outputs"] for cell in code)
    whole = "".join(cell["source"] for cell in copy["cells"])
    assert "README.md)" not in whole and "03_the_bypass.ipynb" not in whole
    if name == "01_qlora_happens":
        assert "(02_a_small_autograd.ipynb)" in whole and "20 * 8" in whole and "60 steps" not in whole
    for cell in code[1:]:
        compile(cell["source"], name, "exec")


def test_a_notebook_that_was_rewritten_is_noticed():
    text = json.dumps({"cells": [{"cell_type": "code", "source": "60 steps"}], "metadata": {}})
    with pytest.raises(ValueError, match="expected 1, see SHORTER"):
        lite.course_copy("01_qlora_happens", text, set())


def test_the_site_carries_what_pyodide_lacks():
    carried = lite.requirements(PROJECT)
    assert [name for name in carried if name.startswith(("numpy", "scipy"))] == []
    assert any(name.startswith("tqdm>=") for name in carried) and "comm" in carried


def test_where_python_comes_from():
    settings = json.loads(lite.config("https://x/pyodide.mjs", False))["jupyter-config-data"]["litePluginSettings"]
    assert settings == {lite.KERNEL: {"pyodideUrl": "https://x/pyodide.mjs"}}
    alone = json.loads(lite.config("./p.mjs", True))["jupyter-config-data"]["litePluginSettings"][lite.KERNEL]
    assert alone["disablePyPIFallback"] is True


def test_a_folder_that_is_no_distribution(tmp_path):
    assert "pyodide.mjs" in lite.missing(tmp_path, "314.0.6")
    for name in ("pyodide.mjs", "pyodide.asm.wasm", "python_stdlib.zip", "i.whl"):
        (tmp_path / name).touch()
    lock = {name: {"file_name": "i.whl", "depends": ["Stack_Data"]} for name in (*lite.NEEDED, "stack-data")}
    (tmp_path / "pyodide-lock.json").write_text(json.dumps({"info": {"version": "314.0.6"}, "packages": lock}))
    assert lite.missing(tmp_path, "314.0.6") == []
    assert lite.missing(tmp_path, "314.0.7") == ["version 314.0.7 (its own is 314.0.6)"]
    lock["numpy"]["file_name"] = "numpy.whl"
    del lock["scipy"]
    (tmp_path / "pyodide-lock.json").write_text(json.dumps({"info": {"version": "314.0.6"}, "packages": lock}))
    assert lite.missing(tmp_path, "314.0.6") == ["numpy.whl", "the package scipy"]


@pytest.mark.parametrize("a_turned", [False, True])
@pytest.mark.parametrize("b_turned", [False, True])
def test_the_product_of_a_browser(a_turned, b_turned):
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((6, 5), (5, 7)))
    a, b = np.asfortranarray(a) if a_turned else a, np.asfortranarray(b) if b_turned else b
    y = products.by_scipy(a, b)
    assert y.dtype == np.float32 and y.flags.c_contiguous and y.shape == (6, 7)
    np.testing.assert_allclose(y, a @ b, rtol=1e-5, atol=1e-6)
    wide = a.astype(np.float64), b.astype(np.float64)
    assert (products.by_scipy(*wide) == wide[0] @ wide[1]).all()


def test_links_to_colab_and_binder():
    build = load("build")
    path = "notebooks/01_qlora_happens.ipynb"
    assert build.hosted(path, None) == ""
    links = build.hosted(path, "someone/tinylora")
    assert f"https://colab.research.google.com/github/someone/tinylora/blob/HEAD/{path}" in links
    assert f"https://mybinder.org/v2/gh/someone/tinylora/HEAD?labpath={path}" in links
    text = (ROOT / path).read_text(encoding="utf-8")
    without, with_links = (json.loads(build.prepared(text, one))["cells"] for one in ("", links))
    assert with_links[1]["source"] == links and len(with_links) == len(without) + 1
    assert "colab.research" not in json.dumps(without)


def test_binder_installs_the_extra_of_the_notebooks():
    assert "-e .[notebooks]" in (ROOT / ".binder" / "requirements.txt").read_text().splitlines()


def test_the_whole_site(tmp_path):
    constants = pytest.importorskip("jupyterlite_pyodide_kernel.constants", reason="pip install -e '.[lite]'")
    assert lite.main(["--out", str(tmp_path / "site")]) == 0
    site = tmp_path / "site"
    index = json.loads((site / "pypi" / "all.json").read_text(encoding="utf-8"))
    assert {"tinylora", "tinylora-course", "tqdm", "threadpoolctl", "comm"} == set(index)
    for package in index.values():
        (file,) = next(iter(package["releases"].values()))
        assert hashlib.sha256((site / "pypi" / file["filename"]).read_bytes()).hexdigest() == file["digests"]["sha256"]
    settings = json.loads((site / "jupyter-lite.json").read_text(encoding="utf-8"))["jupyter-config-data"]
    url = settings["litePluginSettings"][lite.KERNEL]["pyodideUrl"]
    assert url == f"https://cdn.jsdelivr.net/pyodide/v{constants.PYODIDE_VERSION}/full/pyodide.mjs"
    assert {path.name for path in (site / "files").glob("*.ipynb")} == {f"{name}.ipynb" for name in lite.NOTEBOOKS}
