"""The house itself: the import arrows, the light import, its one version, and what a clone has to carry."""

import ast
import hashlib
import importlib
import io
import re
import shutil
import subprocess
import sys
import tokenize
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

import tinylora

ROOM = Path(tinylora.__file__).parent

#: The evening: the files at the top of the package, in the order in which they are read.
CORE = ("codebooks", "quant", "backend", "dtypes", "tensor", "ops", "tape", "nn", "lora", "optim", "paging")
MOST_CODE = 1500  # lines of code in the core; docstrings, comments and blank lines are not counted

#: Each room (a file at the top, or a folder) and the rooms below it. A room may import these, and whatever lies below them.
BELOW = {
    "backend": "",
    "data": "",
    "numerics": "",
    "codebooks": "numerics",
    "dtypes": "backend",
    "tensor": "backend",
    "tape": "tensor",
    "kernels": "dtypes",
    "quant": "codebooks kernels",
    "paging": "kernels",
    "optim": "paging tensor",
    "ops": "kernels tensor",
    "nn": "ops quant",
    "lora": "nn",
    "models": "data nn tape",
    "adapters": "lora",
    "variants": "adapters",
    "interop": "adapters models",
    "training": "interop optim",
    "costs": "training",
    "figures": "costs",
    "papers": "figures variants",  # what the papers claim: nothing but the commands and the notebooks needs it
    "cli": "papers",
}


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


def below(room, above=()):
    """Every room that lies below one; AssertionError if that is a circle."""
    assert room not in above, f"a circle: {' -> '.join((*above, room))}"
    found = set()
    for name in BELOW[room].split():
        found |= {name} | below(name, (*above, room))
    return found


def test_imports_go_down_the_table_of_rooms():
    for path in sorted(ROOM.rglob("*.py")):
        room = path.relative_to(ROOM).with_suffix("").parts[0]
        if room not in ("__init__", "__main__"):
            assert room in BELOW, f"{room} is in no row of the table of rooms"
            upwards = imports(path) - {room, "__version__"} - below(room)
            assert not upwards, f"{path.relative_to(ROOM)} imports {', '.join(upwards)}, which is not below {room}"
    assert "papers" in BELOW["cli"] and not any("papers" in rooms for room, rooms in BELOW.items() if room != "cli")
    for room in ("codebooks", "quant", "kernels", "numerics", "paging"):  # whoever only wants to know about NF4
        assert not below(room) & {"tensor", "ops", "nn"}, f"{room} knows nothing of the tensor"


def test_the_files_at_the_top_are_the_core():
    assert {path.stem for path in ROOM.glob("*.py")} == {*CORE, "__init__", "__main__"}
    folders = {path.name for path in ROOM.iterdir() if path.is_dir() and not path.name.startswith("__")}
    assert folders == set(BELOW) - set(CORE)


LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def lines_of_code(path):
    """How many lines of a file hold code: not blank, no comment, no docstring."""
    text = path.read_text(encoding="utf-8")
    documented, held = set(), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            documented.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in LAYOUT:
            held.update(range(token.start[0], token.end[0] + 1))
    return len(held - documented)


def test_the_core_is_an_evening():
    counted = {name: lines_of_code(ROOM / f"{name}.py") for name in CORE}
    total = sum(counted.values())
    print("\n".join(f"{name + '.py':<14}{n:>5}" for name, n in [*counted.items(), ("all eleven", total)]))
    assert total <= MOST_CODE, (
        f"the core has {total} lines of code; what only a format or a variant needs goes elsewhere"
    )
    readme = (ROOM.parent / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|.*\]\(tinylora/(\w+)\.py\).*\| (\d+) \|$", readme, re.M)
    assert {name: int(n) for name, n in rows} == counted, "the README's table of the core"
    assert f"{total:,} lines of code" in readme


def test_a_comment_and_a_docstring_are_no_code(tmp_path):
    path = tmp_path / "x.py"
    path.write_text('"""Two\nlines."""\n\n# no\nx = (  # yes\n    1\n)\n\ndef f():\n    "no"\n    return """a\nb"""\n')
    assert lines_of_code(path) == 6


def test_every_module_of_the_old_layout_is_in_the_table():
    """All that stood at the top of the package at commit 1c9820e, and neither stayed there nor became a room of its name."""
    old = """checkpoints corpus counting derivation experiments files finetune flops footprints gguf intrinsic laws llama memory normality
        optim8bit optimality paging_costs pretrain ranks rounding subspaces survey switching tokenizers train"""
    assert set(tinylora.MOVED) == set(old.split())
    for name in ("conv", "pools", "adapters", "variants", "interop", "figures", "data", "cli"):
        assert getattr(tinylora, name).__name__.endswith(name)


@pytest.mark.parametrize(
    "old",
    [
        "ops.conv",
        "ops.QUERY_BLOCK",
        "paging.WHOLE_TENSORS_FROM",
        "backend.scatter_add",
        "backend.pinned_zeros",
        "backend.keep_freed_memory",
        "tensor.checkpoint",
        "tensor.watch_rebuilds",
        "tensor.tape_bytes",
        "optim.schedule",
        "nn.store_in_16_bits",
        "nn.prepare_for_kbit_training",
        "nn.Embedding16bit",
        "lora.LoRAEmbedding",
        "lora.LoRAConv",
        "lora.bypass_for",
        "lora.lora_layer",
        "lora.Bypass",
        "adapters.adapters",
        "variants.Beside",
        "checkpoints.open_checkpoint",
        "checkpoints.Checkpoint",
        "adapters.COMBINATIONS",
    ],
)
def test_names_that_left_a_file_are_found_there(old):
    module, name = old.split(".")
    assert hasattr(getattr(tinylora, module), name)


@pytest.mark.parametrize("name", tinylora.MOVED)
def test_modules_that_moved_are_found_under_their_old_names(name):
    module = getattr(tinylora, name)
    places = [importlib.import_module(f"tinylora.{place}") for place in tinylora.MOVED[name].split()]
    for place in places:
        public = [key for key, value in vars(place).items() if getattr(value, "__module__", None) == place.__name__]
        assert public and all(getattr(module, key) is getattr(place, key) for key in public if not key.startswith("_"))
    assert getattr(tinylora, name) is module, "made once"
    exec(f"from tinylora import {name}", {})
    assert importlib.import_module(f"tinylora.{name}") is module, "also as a module of its own"


def test_only_backend_knows_cupy():
    for path in ROOM.rglob("*.py"):
        if path.name != "backend.py":
            assert not re.search(r"""import cupy|["']cupy""", path.read_text(encoding="utf-8")), path.name


def test_import_loads_numpy_and_nothing_else():
    code = (
        "import sys, numpy; before = set(sys.modules); import tinylora; "
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1200)
    assert done.stdout.strip() == "['tinylora']", done.stdout + done.stderr


def test_import_opens_no_room_before_it_is_asked_for():
    code = "import sys, tinylora; print(sorted({m.split('.')[1] for m in sys.modules if m.startswith('tinylora.')}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(sorted([*CORE, "kernels", "numerics"]))


@pytest.mark.parametrize(
    "line",
    [
        "LinearBypass(Linear(4, 4), r=2, use_dora=True).magnitude",
        "LoRALinear(Linear(4, 4), r=2, use_dora=True)(Tensor([[1.0] * 4]))",
        "LoRALinear(Linear(4, 4), r=2)(Tensor([[1.0] * 4]))",
        "assert LoRALinear(Linear(4, 4), r=2).fused_forward(Tensor([[1.0] * 4])) is None",
        "assert tinylora.lora.LoRAConv is tinylora.adapters.kinds.LoRAConv",
        "from tinylora import *; merge(add_lora(Wrapped()))",
        "assert callable(tinylora.merge) and tinylora.conv.conv",
        "assert set(tinylora.__all__) <= set(dir(tinylora)) and all(hasattr(tinylora, name) for name in tinylora.__all__)",
    ],
)
def test_whoever_begins_with_a_core_file_finds_what_the_rooms_add_to_it(line):
    """Each in a process of its own, where nothing has opened them before."""
    code = f"""
import tinylora
from tinylora.lora import LinearBypass, LoRALayer, LoRALinear
from tinylora.nn import Linear, Module
from tinylora.tensor import Tensor
class Wrapped(Module):
    def __init__(self):
        self.proj = Linear(4, 4)
import sys; assert "tinylora.adapters" not in sys.modules
{line}
assert "tinylora.adapters" in sys.modules"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert not done.returncode, done.stderr


THREADS = """
import sys, threading
import tinylora as tl
sys.setswitchinterval(1e-6)
asked = [lambda: tl.add_lora, lambda: tl.lora.KINDS, lambda: tl.nn.Embedding16bit, lambda: tl.ops.conv, lambda: tl.merge,
         lambda: tl.lora.LinearBypass.dora, lambda: tl.LoRALinear(tl.nn.Linear(4, 4), r=2)(tl.Tensor([[1.0] * 4]))]
begin, failed = threading.Barrier(len(asked)), []

def ask(what):
    begin.wait()
    try:
        what()
    except Exception as error:
        failed.append(repr(error))

threads = [threading.Thread(target=ask, args=(what,)) for what in asked]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(failed)
"""


def test_several_threads_open_a_room_at_once():
    for _ in range(8):
        done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, timeout=600)
        assert done.stdout.strip() == "[]", done.stdout + done.stderr


PATCHED = "with mock.patch.object(LoRALayer, 'fused_forward', lambda layer, x: None): import tinylora.adapters"


@pytest.mark.parametrize("before", ["", PATCHED])
def test_a_fused_forward_of_ones_own_runs_once_also_after_a_patch_that_was_taken_back(before):
    code = f"""
from unittest import mock
from tinylora import LoRALinear, Tensor
from tinylora.lora import LoRALayer
from tinylora.nn import Linear
ran = []
class Mine(LoRALinear):
    def fused_forward(self, x):
        ran.append(x)
        return super().fused_forward(x)
{before}
Mine(Linear(4, 4), r=2)(Tensor([[1.0] * 4]))
LoRALinear(Linear(4, 4), r=2)(Tensor([[1.0] * 4]))
print(len(ran))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "1", done.stderr


def test_files_of_training_are_found_without_an_import():
    """Two of them were, while tinylora imported them."""
    code = """import tinylora as tl
print(tl.training.adamw8bit.AdamW8bit is tl.AdamW8bit, tl.training.schedule.schedule is tl.optim.schedule)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "True True", done.stderr
    assert not hasattr(tinylora.training, "adamw9bit") and not hasattr(tinylora.training, "__wrapped__")


def stated(name, pattern):
    """What the one match of a pattern in a file at the top of the repository says."""
    (found,) = re.findall(pattern, (ROOM.parent / name).read_text(encoding="utf-8"), re.M)
    return found


def test_the_version_is_one_and_the_same():
    assert re.fullmatch(r"\d+\.\d+\.\d+", tinylora.__version__)
    assert stated("CITATION.cff", r"^version: (.*)$") == tinylora.__version__
    teaching = (ROOM.parent / "notebooks" / "TEACHING.md").read_text(encoding="utf-8")
    assert set(re.findall(r"tinylora-([\w.]+)-py3-none-any\.whl", teaching)) == {tinylora.__version__}
    headings = re.findall(r"^## (.*)$", (ROOM.parent / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert headings[0] == "[Unreleased]"
    assert headings[1].split(" - ")[0] == f"[{tinylora.__version__}]", "the newest version of CHANGELOG.md"
    assert stated("pyproject.toml", r"^dynamic = (.*)$") == '["version"]'
    assert stated("pyproject.toml", r'^\[tool\.hatch\.version\]\npath = "(.*)"$') == "tinylora/__init__.py"


def tags(folder):
    """The release tags of HEAD, vX.Y.Z; a sentence where there are none to be had."""
    git = shutil.which("git")
    if git is None:
        return "git is not installed"
    ask = [git, "-C", str(folder)]
    top = subprocess.run([*ask, "rev-parse", "--show-toplevel"], capture_output=True, text=True)
    if top.returncode or not Path(top.stdout.strip()).samefile(folder):
        return "this is no clone, but a copy of the files"
    found = subprocess.run([*ask, "tag", "--points-at", "HEAD"], capture_output=True, text=True, check=True).stdout
    return [tag for tag in found.split() if re.fullmatch(r"v\d.*", tag)] or "the commit carries no tag of a release"


def test_a_tag_names_the_version():
    found = tags(ROOM.parent)
    if isinstance(found, str):
        pytest.skip(found)
    assert found == [f"v{tinylora.__version__}"], "a commit is tagged with the version that it holds, and with no other"


def test_the_tags_of_a_commit_are_found(tmp_path):
    assert tags(tmp_path) in ("this is no clone, but a copy of the files", "git is not installed")
    if not shutil.which("git"):
        pytest.skip("git is not installed")

    def git(*words):
        about = ("-c", "user.name=x", "-c", "user.email=x", "-c", "commit.gpgsign=false", "-c", "tag.gpgsign=false")
        subprocess.run(["git", "-C", str(tmp_path), *about, *words], check=True, capture_output=True)

    git("init")
    git("commit", "--allow-empty", "-m", "one")
    git("tag", "before")
    assert tags(tmp_path) == "the commit carries no tag of a release"
    git("tag", "v0.2.0")
    git("tag", "-a", "v0.3.0rc1", "-m", "another")
    assert tags(tmp_path) == ["v0.2.0", "v0.3.0rc1"]
    (tmp_path / "inside").mkdir()
    assert tags(tmp_path / "inside") == "this is no clone, but a copy of the files"


def test_the_embedded_model_and_its_card():
    folder = tinylora.data.base_folder()
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 8_000_000
    card = (folder / "README.md").read_text()
    for word in ("shakespeare", "bible", "factbook", "seed", "steps", "bits per byte"):
        assert word in card
    recipe = asdict(tinylora.pretrain.RECIPE)
    assert all(f"\n| {key} | {value} |\n" in card for key, value in recipe.items()), "the command's defaults made it"
    measured = card.split("| source |")[1].split("\n\n")[0]
    *sources, mean = (float(bits) for bits in re.findall(r"\d\.\d{4}", measured))
    assert len(sources) == 3 and round(sum(sources) / 3, 4) == mean


def test_the_embedded_texts_are_those_described():
    described = (ROOM / "data" / "README.md").read_text(encoding="utf-8")
    texts = {f"jargon-{split}": tinylora.data.jargon(split) for split in ("train", "heldout")}
    for name, text in (texts | {"source": tinylora.data.source()}).items():
        assert f"| {name}.txt | {len(text):,} | {hashlib.sha256(text).hexdigest()[:16]} |" in described


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
