"""The house itself: the import arrows, the light import, and what a clone has to carry."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tinylora

ROOM = Path(tinylora.__file__).parent

#: Each module may import those above it (its own level excluded, except where a line names several).
ARROWS = [
    "backend",
    "dtypes",
    "tensor",
    "ops",
    "codebooks",
    "quant",
    "paging",
    "optim",
    "nn",
    "lora",
    "files",
    "data",
    "tokenizers",
    "llama",
    "interop",
    "corpus",
    "train",
    "pretrain",
    "finetune",
    "figures",
    "cli",
]
NUMBERS_ONLY = {"quant", "codebooks", "paging"}  # whoever only wants to know about NF4 reads two files


def imports(path):
    """(top-level, inside functions): the tinylora modules that a file imports."""
    tree, package = ast.parse(path.read_text()), len(path.relative_to(ROOM).parts)
    outer, inner = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == package:
            names = {node.module.split(".")[0]} if node.module else {a.name for a in node.names}
            (outer if node in tree.body else inner).update(names)
    return outer, inner


def test_arrows_point_one_way():
    for path in sorted(ROOM.rglob("*.py")):
        module = path.relative_to(ROOM).with_suffix("").parts[0]
        if module in ("__init__", "__main__"):
            continue
        outer, inner = imports(path)
        for name in outer - {module}:
            assert ARROWS.index(name) < ARROWS.index(module), f"{path.name} imports {name}, which comes after it"
        if module in NUMBERS_ONLY:
            assert not (outer | inner) & {"tensor", "ops", "nn"}, path.name


def test_only_backend_knows_cupy():
    for path in ROOM.rglob("*.py"):
        if path.name != "backend.py":
            assert "import cupy" not in path.read_text(), path.name


def test_import_loads_numpy_and_nothing_else():
    code = (
        "import sys, numpy; before = set(sys.modules); import tinylora; "
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "['tinylora']", done.stdout + done.stderr


def test_the_embedded_model_and_its_card():
    folder = tinylora.data.base_folder()
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 8_000_000
    card = (folder / "README.md").read_text()
    for word in ("shakespeare", "bible", "factbook", "seed", "steps", "bits per byte"):
        assert word in card


@pytest.mark.parametrize("name", tinylora.__all__)
def test_public_names_exist_and_are_documented(name):
    assert getattr(tinylora, name).__doc__


def test_goldens_are_small():
    assert sum(f.stat().st_size for f in (Path(__file__).parent / "goldens").glob("*.npz")) <= 2_000_000
