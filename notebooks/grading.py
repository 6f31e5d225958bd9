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

import contextlib
import functools
import importlib
import re
import signal
import sys
import threading
import traceback
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
SPACE = "answers"  # __name__ in the namespace in which a handed-in notebook's cells run
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


class Slow(BaseException):
    """The time is up. Not an Exception, so that an `except Exception` in an answer does not swallow it."""


@contextlib.contextmanager
def limited(seconds):
    """Raise Slow in a block that takes longer, and again every second in case an answer's bare `except` catches it.

    Without a limit if seconds is None, and where there is no SIGALRM: on Windows, or outside the main thread. It cannot
    interrupt one long call into C, nor a loop around a bare `except`.
    """
    main = threading.current_thread() is threading.main_thread()
    if seconds is None or not main or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number, frame):
        raise Slow(f"takes more than {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds, 1)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def verdict(exercise, function, rng, limit=None):
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
        with limited(limit):
            CHECKS[exercise](remembered, rng)
    except NotImplementedError:
        return "not answered yet"
    except Slow as error:
        return f"not right: it {error}"
    except SystemExit:
        return "not right: it calls exit(), which ends Python"
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        file = getattr(getattr(function, "__code__", None), "co_filename", None)
        lines = [at.lineno for at in frames if at.filename == file]
        checks = isinstance(error, AssertionError) and (
            not lines or frames[-1].filename == CHECKS[exercise].__code__.co_filename
        )
        if checks and str(error).strip():
            return f"not right: {str(error).strip()}"
        if returned and returned[0] is None:
            return f"not right: exercise_{exercise[3:]} returned None; is a `return` missing?"
        if checks:
            return f"not right: `{frames[-1].line}` does not hold"
        if isinstance(error, AssertionError) and frames[-1].filename == file:
            return f"not right: {own_assert(error, lines[-1])}"
        where = f", in line {lines[-1]} of its cell" if lines else ""
        graded = getattr(function, "__globals__", {}).get("__name__") == SPACE  # in a notebook all its cells have run
        return f"not right: it raised {type(error).__name__}: {error}{where}{hint(error) if graded else ''}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"not right: it raises {type(error).__name__}, which ends the run"
    return "right"


def own_assert(error, line):
    """The sentence on an assert of the answer's own that failed."""
    said = f": {error}" if str(error).strip() else ""
    return f"your assert in line {line} of the cell fails{said}"


def hint(error):
    """What to add to a NameError: helpers are often defined in a cell of their own, which is not run."""
    if type(error) is not NameError:
        return ""
    return ". A name from another cell is not there when a notebook is graded; put it into the exercise's cell."


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


def answer(notebook, k, limit=None):
    """The function exercise_K of a notebook; where two cells define it, that of the last.

    In a fresh namespace, the cells tagged "setup" or "exercise" run in order up to the one that defines the function. Of
    another exercise's cell an error is passed over, since that exercise's own test reports it; any other error raises
    ValueError with a sentence. Each cell may take `limit` seconds.
    """
    name, space = f"exercise_{k}", {"__name__": SPACE}
    setup, exercise = to_run(notebook)
    defines = rf"^(def {name}\b|{name}\s*(:[^=\n]+)?=[^=])"
    mine = max((i for i in exercise if re.search(defines, notebook.cells[i - 1].source, re.M)), default=0)
    for i in (i for i in sorted(setup | exercise) if i <= mine):
        code, file = notebook.cells[i - 1].source, f"cell {i}"
        try:
            with limited(limit):
                exec(compiled(code, file), space)
        except NotImplementedError:
            pass  # the cell itself calls an exercise that has no answer; the check will find that out
        except (Exception, Slow, SystemExit) as error:
            if i != mine and i not in setup:
                continue
            at = traceback.extract_tb(error.__traceback__)[-1]
            if isinstance(error, AssertionError) and at.filename == file and i == mine:
                raise ValueError(own_assert(error, at.lineno)) from None
            what = f"raises {type(error).__name__}: {error}{hint(error) if i == mine else ''}"
            if isinstance(error, SyntaxError):
                what = f"does not compile: {error}"
            if isinstance(error, Slow | SystemExit):
                what = error if isinstance(error, Slow) else "calls exit(), which ends Python"
            raise ValueError(f"the cell {code.strip().splitlines()[0]!r} {what}") from None
    if not callable(space.get(name)):
        raise ValueError(f"no exercise cell defines {name}; was it renamed, or written into a new cell?")
    return space[name]


def collect(path, numbers):
    """{who: {"08": file}}, the answers in a notebook or a folder: .ipynb or .py files whose names begin with a number.

    One notebook, or a folder that holds each number once, is one answer set, called "". A folder with several files of
    one number is one set a file, called as the file is: "08_alice". A folder without answers of its own holds one folder
    a student; a student's folder in which there is nothing to grade is an empty set.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist; expected a notebook, or a folder of them")

    def sets(path):
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        files = [f for f in files if f.suffix in (".ipynb", ".py") and f.name[:2] in numbers and f.is_file()]
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
