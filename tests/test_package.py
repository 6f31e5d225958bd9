"""The house itself: the import arrows, the light import, and what a clone has to carry."""

import ast
import hashlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tinylora

ROOM = Path(tinylora.__file__).parent

#: Each module may import those before it, whether at the top or inside a function.
ARROWS = """
backend dtypes tensor tape ops numerics kernels codebooks quant paging optim nn lora adapters variants data
models interop training costs figures papers cli""".split()  # noqa: SIM905
NUMBERS_ONLY = {
    "kernels",
    "numerics",
    "codebooks",
    "quant",
    "paging",
}  # whoever only wants to know about NF4 reads three files


def imports(path):
    """The tinylora modules that a file imports, anywhere in it."""
    found, package = set(), len(path.relative_to(ROOM).parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level <= package, f"{path} reaches outside the package"
            names = [node.module] if node.module else [a.name for a in node.names]
            found.update(name.split(".")[0] for name in names if node.level == package)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
            assert not any(n.split(".")[0] == "tinylora" for n in names), (
                f"{path}: imports inside the package are relative"
            )
    return found


def test_arrows_point_one_way():
    for path in sorted(ROOM.rglob("*.py")):
        module = path.relative_to(ROOM).with_suffix("").parts[0]
        if module == "__init__":
            continue
        for name in imports(path) - {module}:
            assert ARROWS.index(name) < ARROWS.index(module), f"{path.name} imports {name}, which comes after it"
        if module in NUMBERS_ONLY:
            assert not imports(path) & {"tensor", "ops", "nn"}, path.name


def test_only_backend_knows_cupy():
    for path in ROOM.rglob("*.py"):
        if path.name != "backend.py":
            assert not re.search(r"""import cupy|["']cupy""", path.read_text(encoding="utf-8")), path.name


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


def test_the_embedded_text_is_the_one_described():
    described = (ROOM / "data" / "README.md").read_text(encoding="utf-8")
    for split in ("train", "heldout"):
        text = tinylora.data.jargon(split)
        assert f"| jargon-{split}.txt | {len(text):,} | {hashlib.sha256(text).hexdigest()[:16]} |" in described


def test_the_embedded_model_predicts_english():
    text = tinylora.corpus.Text(
        [np.frombuffer(b"And the LORD said unto Moses, Speak unto the children of Israel", np.uint8)]
    )
    assert tinylora.train.bits_per_byte(tinylora.Llama.from_pretrained("base"), text, 64) < 1.5


@pytest.mark.parametrize("name", tinylora.__all__)
def test_public_names_exist_and_are_documented(name):
    assert getattr(tinylora, name).__doc__


def test_goldens_are_small():
    assert sum(f.stat().st_size for f in (Path(__file__).parent / "goldens").glob("*.npz")) <= 2_000_000
