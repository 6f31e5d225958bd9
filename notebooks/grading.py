"""Is an answer to an exercise right? Used inside the notebooks and by `pytest notebooks`; offline, without torch.

The exercise `exercise_2` of notebook 08 is called 08-2. Its check lies in checks/nb08.py:

    @check("08-2")
    def _(answer, rng):
        "What a right answer must do. The message of an assert is shown to whoever answered, so it is a sentence."
        x = rng.standard_normal(5)
        assert np.allclose(answer(x), 2 * x), "exercise_2(x) should be twice x."

`_ = grade("08-2", exercise_2)` in a notebook prints the verdict. For pytest, `answer` takes the function out of a notebook by
running only its cells tagged "setup" and "exercise", so that grading a notebook takes a second and not its whole run.
"""

import importlib
import re
import sys
import traceback
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
CHECKS = {}  # "08-2": function(answer, rng) that asserts

if str(HERE) not in sys.path:  # checks and answers import from here, wherever Python was started
    sys.path.insert(0, str(HERE))


def check(exercise):
    """Decorator that registers function(answer, rng) as the check of an exercise such as "08-2"."""

    def register(function):
        if exercise in CHECKS:
            raise ValueError(f"exercise {exercise} has two checks; expected one")
        CHECKS[exercise] = function
        return function

    return register


def load_checks():
    """Import every checks/nbNN.py, and return the registry."""
    for path in sorted((HERE / "checks").glob("nb*.py")):
        importlib.import_module(f"checks.{path.stem}")
    return CHECKS


def verdict(exercise, function, rng):
    """What the exercise's check says of a function: "right", "not answered yet", or "not right: " and why."""
    if exercise not in load_checks():
        raise ValueError(f"exercise {exercise} has no check; expected one in notebooks/checks/nb{exercise[:2]}.py")
    try:
        CHECKS[exercise](function, rng)
    except NotImplementedError:
        return "not answered yet"
    except AssertionError as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        return f"not right: {str(error).strip() or f'`{at.line}` does not hold'}"
    except Exception as error:
        file = getattr(getattr(function, "__code__", None), "co_filename", None)
        lines = [at.lineno for at in traceback.extract_tb(error.__traceback__) if at.filename == file]
        where = f", in line {lines[-1]} of its cell" if lines else ""
        return f"not right: it raised {type(error).__name__}: {error}{where}"
    return "right"


def grade(exercise, function):
    """Print the verdict on an answer, as in `_ = grade("08-2", exercise_2)` in a notebook. Returns whether it is right."""
    said = verdict(exercise, function, np.random.default_rng())
    print(f"exercise {exercise}: {said}")
    return said == "right"


def sources():
    """The sources of the notebooks, NN_name.py, in order."""
    return sorted(HERE.glob("[0-9][0-9]_*.py"))


def read(path):
    """A notebook, from an .ipynb or from a .py in jupytext's percent format. ValueError if it is neither."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    try:
        if path.suffix == ".ipynb":
            import nbformat

            return nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)
        import jupytext

        return jupytext.reads(path.read_text(encoding="utf-8"), fmt="py:percent")
    except ImportError as error:
        raise ImportError(f"reading {path.name} needs {error.name}: pip install 'tinylora[notebooks]'") from None
    except Exception as error:
        raise ValueError(f"{path} is not a notebook: {str(error)[:200]}") from None


def tags(cell):
    """The tags of a cell."""
    return cell.metadata.get("tags", [])


def exercises(notebook):
    """The numbers K of the exercises of a notebook, in order: each is a cell tagged "exercise" that defines exercise_K."""
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code" and "exercise" in tags(cell)]
    return [int(k) for code in cells for k in re.findall(r"^def exercise_(\d+)\(", code, re.M)]


def answer(notebook, k):
    """The function exercise_K of a notebook.

    In a fresh namespace, the cells tagged "setup" or "exercise" run in order up to the one that defines the function. Of
    another exercise's cell an error is passed over, since that exercise's own test reports it; any other error raises
    ValueError with a sentence.
    """
    name, space = f"exercise_{k}", {"__name__": "answers"}
    for i, cell in enumerate(notebook.cells, 1):
        if cell.cell_type != "code" or not {"setup", "exercise"} & set(tags(cell)):
            continue
        mine = "exercise" in tags(cell) and re.search(rf"^\s*def {name}\b", cell.source, re.M)
        try:
            exec(compile(cell.source, f"cell {i}", "exec"), space)
        except NotImplementedError:
            pass  # the cell itself calls an exercise that has no answer; the check will find that out
        except Exception as error:
            if mine or "setup" in tags(cell):
                what = "does not compile" if isinstance(error, SyntaxError) else f"raises {type(error).__name__}"
                raise ValueError(f"the cell {cell.source.splitlines()[0]!r} {what}: {error}") from None
        if mine and callable(space.get(name)):
            return space[name]
    raise ValueError(f'no cell tagged "exercise" defines {name}')


def collect(path, numbers):
    """{"08": file}: of a file or a folder, the .ipynb and else the .py whose names begin with one of the numbers."""
    path, found = Path(path), {}
    if not path.exists():
        raise ValueError(f"{path} does not exist; expected a notebook, or a folder of them")
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    for file in (f for suffix in (".ipynb", ".py") for f in files if f.suffix == suffix and f.name[:2] in numbers):
        first = found.setdefault(file.name[:2], file)
        if first != file and first.suffix == file.suffix:
            raise ValueError(f"{first} and {file.name} answer the same notebook; expected one of them")
    if not found:
        raise ValueError(f"{path} holds no answers; expected .ipynb or .py files whose names begin as 08_ does")
    return found
