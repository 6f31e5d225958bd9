"""Is an answer to an exercise right? Used inside the notebooks and by `pytest notebooks`; offline, without torch.

The exercise `exercise_2` of notebook 05 is called 05-2. Its check lies in checks/nb05.py:

    @check("05-2")
    def _(answer, rng):
        "What a right answer must do. The message of an assert is shown to whoever answered, so it is a sentence."
        x = rng.standard_normal(5)
        assert np.allclose(answer(x), 2 * x), "exercise_2(x) should be twice x."

`_ = grade("05-2", exercise_2)` in a notebook prints the verdict. For pytest, `answer` takes the function out of a notebook by
running only its cells tagged "setup" and "exercise", so that grading a notebook takes a second and not its whole run. There an
answer runs in a process of its own (marking.py): a check hands it data, gets data, and asks for the rest with `there` and `peak`.
"""

import functools
import importlib
import re
import sys
import traceback
import tracemalloc
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
SPACE = "answers"  # __name__ in the namespace in which a handed-in notebook's cells run
LARGEST = 100_000_000  # bytes of a notebook; one with many figures has a few million
CHECKS = {}  # "05-2": function(answer, rng) that asserts

if str(HERE) not in sys.path:  # checks and answers import from here, wherever Python was started
    sys.path.insert(0, str(HERE))


def check(exercise):
    """Decorator that registers function(answer, rng) as the check of an exercise such as "05-2"."""

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


class Raised(Exception):
    """What an answer in another process raised, as the sentence that `complaint` made of it there."""


def verdict(exercise, function, rng):
    """What the exercise's check says of a function: "right", "not answered yet", or "not right: " and why."""
    if exercise not in load_checks():
        raise ValueError(f"exercise {exercise} has no check; expected one in notebooks/checks/nb{exercise[:2]}.py")
    returned = []  # what the last call gave; nothing if it raised

    @functools.wraps(function)
    def remembered(*args, **kwargs):
        returned.clear()
        returned.append(function(*args, **kwargs))
        return returned[0]

    try:
        CHECKS[exercise](remembered, rng)
    except NotImplementedError:
        return "not answered yet"
    except KeyboardInterrupt:
        raise
    except Raised as error:
        return f"not right: {error}"
    except BaseException as error:
        return f"not right: {complaint(exercise, function, error, returned)}"
    return "right"


def complaint(exercise, function, error, returned=(), memory=None):
    """A sentence on the error with which a check ended, or one in a call of the answer; `memory` is the limit in GB, if any."""
    if isinstance(error, SystemExit):
        return "it calls exit(), which ends Python"
    if not isinstance(error, Exception):
        return f"it raises {type(error).__name__}, which ends the run"
    if isinstance(error, MemoryError) and memory:
        return f"it {beyond(memory)}"
    frames = traceback.extract_tb(error.__traceback__)
    file = getattr(getattr(function, "__code__", None), "co_filename", None)
    lines = [at.lineno for at in frames if at.filename == file]
    checks = isinstance(error, AssertionError) and (
        not lines or frames[-1].filename == CHECKS[exercise].__code__.co_filename
    )
    if checks and str(error).strip():
        return str(error).strip()
    if returned and returned[0] is None:
        return f"exercise_{exercise[3:]} returned None; is a `return` missing?"
    if checks:
        return f"`{frames[-1].line}` does not hold"
    if isinstance(error, AssertionError) and frames[-1].filename == file:
        return own_assert(error, lines[-1])
    where = f", in line {lines[-1]} of its cell" if lines else ""
    graded = getattr(function, "__globals__", {}).get("__name__") == SPACE  # in a notebook all its cells have run
    return f"it raised {type(error).__name__}: {error}{where}{hint(error) if graded else ''}"


def beyond(memory):
    """What an answer does that is stopped for its memory."""
    return f"needs more than {memory:g} GB of memory"


def own_assert(error, line):
    """The sentence on an assert of the answer's own that failed."""
    said = f": {error}" if str(error).strip() else ""
    return f"your assert in line {line} of the cell fails{said}"


def hint(error):
    """What to add to a NameError: helpers are often defined in a cell of their own, which is not run."""
    if type(error) is not NameError:
        return ""
    return ". A name from another cell is not there when a notebook is graded; put it into the exercise's cell."


def there(answer, scene, *args):
    """scene(answer, *args), played in the process in which the answer runs. What it returns must be data, as args are.

    A check asks for what cannot be seen from outside: memory, what is alive, what becomes of objects that are not data. The scene
    is a function at the top of a checks/nbNN.py. An answer could cheat in it, since it runs beside it, so a check judges here.
    """
    return answer.there(scene, *args) if hasattr(answer, "there") else scene(answer, *args)


def peak(answer, *args):
    """The most bytes that answer(*args) takes at once. A first call warms up what is imported or cached once."""
    return there(answer, _peak, *args)


def _peak(answer, *args):
    answer(*args)
    tracemalloc.start()
    try:
        answer(*args)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def grade(exercise, function):
    """Print the verdict on an answer, as in `_ = grade("05-2", exercise_2)` in a notebook. Returns whether it is right."""
    said = verdict(exercise, function, np.random.default_rng())
    print(f"exercise {exercise}: {said}")
    return said == "right"


def sources():
    """The sources of the notebooks, NN_name.py, in order."""
    return sorted(HERE.glob("[0-9][0-9]_*.py"))


def read(path):
    """A notebook, from an .ipynb or from a .py in jupytext's percent format. ValueError if it is neither."""
    return parsed(path, text_of(path))


def text_of(path):
    """What stands in a notebook's file. ValueError if it cannot be read as text, or has more than LARGEST bytes."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist, or is no file")
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it has {path.stat().st_size:,} bytes, expected at most {LARGEST:,}")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a notebook: {str(error)[:200]}") from None


def parsed(path, text):
    """The notebook of a path's text."""
    path = Path(path)
    try:
        if path.suffix == ".ipynb":
            import nbformat

            return nbformat.reads(text, as_version=4)
        import jupytext

        return jupytext.reads(text, fmt="py:percent")
    except ImportError as error:
        raise ImportError(
            f"reading {path.name} needs {error.name}: pip install -e '.[notebooks]' in a clone of tinylora"
        ) from None
    except Exception as error:
        raise ValueError(f"{path} is not a notebook: {str(error)[:200]}") from None


def tags(cell):
    """The tags of a cell."""
    return cell.metadata.get("tags", [])


def compiled(code, file):
    """A cell's code, compiled; lines for IPython only, beginning as %time or !ls do, become comments if they must."""
    try:
        return compile(code, file, "exec")
    except SyntaxError:
        return compile(re.sub(r"^([ \t]*)(?=%+[A-Za-z]|!)", r"\1pass  # ", code, flags=re.M), file, "exec")


def to_run(notebook):
    """(setup cells, exercise cells) of a notebook, as sets of positions in it.

    Some editors lose the tags of a notebook. Then every cell that defines an exercise_K is an exercise, and the one that
    imports from grading the setup.
    """
    code = {i: cell for i, cell in enumerate(notebook.cells, 1) if cell.cell_type == "code"}
    setup, exercise = ({i for i, cell in code.items() if tag in tags(cell)} for tag in ("setup", "exercise"))
    if not exercise:
        exercise = {i for i, cell in code.items() if re.search(r"^def exercise_\d+\b", cell.source, re.M)}
        setup = setup or {i for i, cell in code.items() if re.search(r"^(from|import) grading\b", cell.source, re.M)}
    if not setup:
        raise ValueError("the notebook has no cell tagged setup")
    return setup, exercise


class Cells:
    """A fresh namespace in which cells run, and from which their functions are taken."""

    def __init__(self, memory=None):
        self.space, self.memory = {"__name__": SPACE}, memory

    def run(self, i, code, whose):
        """Run cell i; None, or a sentence on its error. `whose` is "setup", "mine", or "other": another exercise's."""
        file = f"cell {i}"
        try:
            exec(compiled(code, file), self.space)
        except NotImplementedError:
            pass  # the cell itself calls an exercise that has no answer; the check will find that out
        except BaseException as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            if isinstance(error, AssertionError) and at.filename == file and whose == "mine":
                return own_assert(error, at.lineno)
            what = f"raises {type(error).__name__}: {error}{hint(error) if whose == 'mine' else ''}"
            if isinstance(error, SyntaxError):
                what = f"does not compile: {error}"
            if isinstance(error, SystemExit):
                what = "calls exit(), which ends Python"
            if isinstance(error, MemoryError) and self.memory:
                what = beyond(self.memory)
            return f"{called(code)} {what}"
        return None

    def function(self, name):
        """What is called so, if it can be called, and else None."""
        found = self.space.get(name)
        return found if callable(found) else None


def called(code):
    """How a sentence names a cell."""
    return f"the cell {code.strip().splitlines()[0]!r}"


def answer(notebook, k, cells=None):
    """The function exercise_K of a notebook; where two cells define it, that of the last.

    In a fresh namespace (or in `cells`), the cells tagged "setup" or "exercise" run in order up to the one that defines the
    function. Of another exercise's cell an error is passed over, since that exercise's own test reports it; any other error
    raises ValueError with a sentence.
    """
    name, cells = f"exercise_{k}", cells or Cells()
    setup, exercise = to_run(notebook)
    defines = rf"^(def {name}\b|{name}\s*(:[^=\n]+)?=[^=])"
    mine = max((i for i in exercise if re.search(defines, notebook.cells[i - 1].source, re.M)), default=0)
    for i in (i for i in sorted(setup | exercise) if i <= mine):
        whose = "mine" if i == mine else "setup" if i in setup else "other"
        error = cells.run(i, notebook.cells[i - 1].source, whose)
        if error and whose != "other":
            raise ValueError(error)
    function = cells.function(name)
    if function is None:
        raise ValueError(f"no exercise cell defines {name}; was it renamed, or written into a new cell?")
    return function


def row_of(who, path):
    """How the table of marks calls an answer set that `collect` found; one without a name is called as its folder or file is."""
    return who or Path(path or HERE).resolve().name


def collect(path, numbers):
    """{who: {"08": file}}, the answers in a notebook or a folder: .ipynb or .py files whose names begin with a number.

    One notebook, or a folder that holds each number once, is one answer set, called "". A folder with several files of
    one number is one set a file, called as the file is: "05_alice". A folder without answers of its own holds one folder
    a student; a student's folder in which there is nothing to grade is an empty set.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist; expected a notebook, or a folder of them")

    def sets(path):
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        files = [f for f in files if f.suffix in (".ipynb", ".py") and f.name[:2] in numbers and not f.is_dir()]
        files = [f for f in files if f.suffix == ".ipynb" or f.with_suffix(".ipynb") not in files]
        one = {f.name[:2]: f for f in files}
        return {"": one} if len(one) == len(files) else {f.stem: {f.name[:2]: f} for f in files}

    found = sets(path)
    if found == {"": {}} and path.is_dir():
        folders = [f for f in sorted(path.iterdir()) if f.is_dir() and f.name[0] not in "._"]
        found = {f"{f.name}/{who}".rstrip("/"): files for f in folders for who, files in sets(f).items()}
    if not any(found.values()):
        raise ValueError(f"{path} holds no answers; expected .ipynb or .py files whose names begin as 08_ does")
    return found
