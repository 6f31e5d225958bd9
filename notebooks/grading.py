"""Is an answer to an exercise right? Used inside the notebooks and by `pytest notebooks`; offline, without torch.

The exercise `exercise_2` of notebook 05 is called 05-2. Its check lies in checks/nb05.py, in one part or several:

    @check("05-2", "a code of few values", points=2)
    def _(answer, rng):
        "What a right answer must do. The message of an assert is shown to whoever answered, so it is a sentence."
        x = rng.standard_normal(5)
        assert np.allclose(answer(x), 2 * x), "exercise_2(x) should be twice x."

An answer has the points of the parts that are right. `_ = grade("05-2", exercise_2)` in a notebook prints the verdict. For pytest,
`answer` takes the function out of a notebook by running only its cells tagged "setup" and "exercise", so that grading a notebook
takes a second and not its whole run. There an answer runs in a process of its own (marking.py): a check hands it data, gets data,
and asks for the rest with `there` and `peak`.

The steps of build_it.md are called my-1 to my-6. They are answered in one file, my_qlora.py, and their checks (checks/nbmy.py) get
an `answer` that has the file's functions as attributes.
"""

import ast
import contextlib
import functools
import importlib
import importlib.util
import inspect
import re
import sys
import threading
import traceback
import tracemalloc
import types
from pathlib import Path
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).resolve().parent
SPACE = "answers"  # __name__ in the namespace in which a handed-in notebook's cells run
LARGEST = 100_000_000  # bytes of a notebook; one with many figures has a few million
CHECKS = {}  # "05-2": [Part, …]
FILES = set()  # in which checks are defined
OWN = "my"  # what the number of a notebook is to the file of the six steps
OWN_FILE = "my_qlora"  # how its name begins
BLANK = "not answered yet"  # what is said of an answer that raises NotImplementedError
SHOWN = 5  # names that a note has at the most
HANDED_OUT = {
    "grading.py",
    "marking.py",
    "conftest.py",
    "test_exercises.py",
    "finale.py",
    "README.md",
    "build_it.md",
    "my_qlora.svg",
}
HANDED_OUT |= {"checks", "drawings", "onlinetext.html"}  # and what Moodle itself puts there
OWN_MODULES = sys.stdlib_module_names | {"numpy", "scipy"}  # what it may import

if str(HERE) not in sys.path:  # checks and answers import from here, wherever Python was started
    sys.path.insert(0, str(HERE))


class Part(NamedTuple):
    """One part of an exercise's check."""

    name: str  # what it looks at; may be empty if it is the only one
    points: int
    function: object  # function(answer, rng), which asserts
    without: tuple  # functions of tinylora that are the answer itself: an answer must not call them; "*" are all
    before: object = None  # called once before the first answer runs, if what the check compares with takes long


class Verdict(NamedTuple):
    """What the checks say of an answer."""

    points: int
    of: int
    said: str  # "right", "not answered yet", or "not right: " and why
    parts: tuple = ()  # (name, points, said) of each part


def check(exercise, part="", points=1, without=(), before=None):
    """Decorator that registers function(answer, rng) as the check, or one part of the check, of an exercise such as "05-2"."""

    def register(function):
        FILES.add(getattr(getattr(function, "__code__", None), "co_filename", ""))
        parts = CHECKS.setdefault(exercise, [])
        if part in {one.name for one in parts}:
            raise ValueError(f"exercise {exercise} has two checks{f' of {part!r}' if part else ''}; expected one")
        parts.append(Part(part, points, function, (without,) if isinstance(without, str) else tuple(without), before))
        return function

    return register


def load_checks():
    """Import every checks/nbNN.py, and return the registry."""
    for path in sorted((HERE / "checks").glob("nb*.py")):
        importlib.import_module(f"checks.{path.stem}")
    return CHECKS


def load_hidden(folder):
    """Add the checks in a teacher's folder, files as checks/nbNN.py, as further parts of the exercises."""
    own = {exercise: list(parts) for exercise, parts in load_checks().items()}
    files = sorted(Path(folder).glob("*.py"))
    if not files:
        raise ValueError(f"{folder} holds no .py file; expected a folder of checks, as notebooks/checks is")
    CHECKS.clear()  # so that a part may be called as one of ours is
    try:
        for i, path in enumerate(files):
            spec = importlib.util.spec_from_file_location(f"hidden_checks_{i}", path)
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module  # so that a scene in it can be named
            try:
                spec.loader.exec_module(module)
            except Exception as error:
                raise ValueError(f"{path} cannot be loaded: {type(error).__name__}: {error}") from None
        hidden = {exercise: list(parts) for exercise, parts in CHECKS.items()}
    finally:
        CHECKS.clear()
        CHECKS.update(own)
    for exercise, parts in hidden.items():
        if exercise not in own:
            raise ValueError(f"{folder} has a check of exercise {exercise}, which does not exist")
        CHECKS[exercise] = own[exercise] + [one._replace(name=f"hidden: {one.name}".rstrip(": ")) for one in parts]


def ready(hidden=None):
    """Load all checks in a process that has none yet; a fork has its parent's."""
    if not CHECKS:
        load_hidden(hidden) if hidden else load_checks()


def number_of(name):
    """The number of the notebook that a file's name begins with, "05", or OWN for my_qlora.py, or ""."""
    return OWN if name.startswith(OWN_FILE) else name[:2] if re.match(r"\d\d(?!\d)", name) else ""


def place(exercise):
    """Where an exercise stands in the order of all: by notebook and by number."""
    number, _, k = exercise.partition("-")
    return number, int(k)


class Raised(Exception):
    """What an answer in another process raised, as the sentence that `complaint` made of it there."""


class Names:
    """The functions of my_qlora.py as attributes. `get(name)` finds one, or None; `there(without, scene, …)` plays one where they are."""

    def __init__(self, get, there=None):
        self._get = get
        if there:
            self.there = there

    def __getattr__(self, name):
        if name == "there" or name.startswith("__"):  # which it has as an attribute, if at all
            raise AttributeError(name)
        function = self._get(name)
        if function is None:
            raise Raised(f"{OWN_FILE}.py defines no function {name}; was it renamed?")
        return function


def verdict(exercise, function, rng):
    """The Verdict on a function, or on the Names of a file, all parts taken together."""
    if exercise not in load_checks():
        raise ValueError(
            f"exercise {exercise} has no check; expected one in notebooks/checks/nb{place(exercise)[0]}.py"
        )
    return together([(part, said(exercise, part, function, rng.spawn(1)[0])) for part in CHECKS[exercise]])


def together(found):
    """The Verdict of [(part, what was said of it), …]."""
    of, points = sum(part.points for part, _ in found), sum(part.points for part, one in found if one == "right")
    parts = tuple((part.name, part.points, one) for part, one in found)
    every = {one for *_, one in parts}
    first = parts[0][2]
    if all(one.startswith(BLANK) for one in every) or (
        len(every) == 1 and (len(parts) == 1 or not first.startswith("not right"))
    ):
        return Verdict(points, of, first, parts)
    wrong = "; ".join(f"{name}: {one.removeprefix('not right: ')}" for name, _, one in parts if one != "right")
    return Verdict(points, of, f"not right: {points} of {of} points; {wrong}", parts)


def unseen(exercise, why):
    """The Verdict on an exercise of which no part was looked at."""
    return Verdict(0, sum(part.points for part in CHECKS[exercise]), why)


def said(exercise, part, function, rng):
    """What one part says: "right", "not answered yet", or "not right: " and why."""
    returned = []  # what the last call gave; nothing if it raised

    def watch(function):
        honest = function.without(part.without) if hasattr(function, "without") else noticed(function, part.without)

        @functools.wraps(function)
        def remembered(*args, **kwargs):
            returned.clear()
            value = honest(*args, **kwargs)
            returned[:] = [value]  # a call within this one has left its own
            return value

        return remembered

    seen = (
        Names(lambda name: (one := function._get(name)) and watch(one))
        if isinstance(function, Names)
        else watch(function)
    )
    play = getattr(function, "there", None) or (lambda without, scene, *args: scene(in_scene(function, without), *args))
    seen.there = functools.partial(play, part.without)
    try:
        part.function(seen, rng)
    except NotImplementedError as error:
        return unanswered(exercise, error)
    except KeyboardInterrupt:
        raise
    except Raised as error:
        return f"not right: {error}"
    except BaseException as error:
        return f"not right: {complaint(exercise, function, error, returned)}"
    return "right"


def unanswered(exercise, error):
    """The sentence on a NotImplementedError; of a step it names the function, which may be one of an earlier step."""
    names = [at.name for at in traceback.extract_tb(error.__traceback__) if at.filename == f"{OWN_FILE}.py"]
    name = names[-1] if names else getattr(error, "function", None)
    return f"{BLANK} ({name})" if exercise.startswith(OWN) and name else BLANK


def noticed(function, without, checks=True):
    """function, which raises Raised with a sentence if it calls what would be no answer of its own.

    That is a function of the checks, or one of tinylora's in `without` ("*": any of them), or a look at the frame of its caller. Without
    `checks` it may call functions that it was given, whatever they call: only tinylora's are noticed, called from the answer's own file.
    """
    package = str(Path(importlib.import_module("tinylora").__file__).parent)
    file, found = getattr(getattr(function, "__code__", None), "co_filename", None), []
    ours = tuple({str(HERE / "checks"), str(HERE / "build_it.py"), *FILES} - {file, ""}) if checks else ()

    def notice(frame, event, called):
        code, before = frame.f_code, frame.f_back
        if event == "c_call" and called is sys._getframe:
            through = code.co_filename == inspect.__file__ and before and before.f_code.co_filename == file
            if code.co_filename == file or through:
                found.append(
                    "it looks at the frame of its caller, which knows the answer; the arguments are all that is needed"
                )
        if event != "call" or found or not code.co_filename.startswith((*ours, package)):
            return
        if not checks and file and before.f_code.co_filename != file:
            return
        name = code.co_qualname.split(".<")[0]
        if code.co_filename.startswith(ours):
            found.append(f"it calls {name} of the checks, which knows the answer; write your own")
        elif name in without or ("*" in without and not name.startswith("<")):
            found.append(f"it calls tinylora's {name}, which is what is to be built here; write it yourself")

    def honest(*args, **kwargs):
        before = sys.getprofile()
        threading.setprofile(notice)
        sys.setprofile(notice)
        try:
            return function(*args, **kwargs)
        finally:
            if sys.getprofile() is not notice:
                found.append("it switches off what watches for calls of the library")
            sys.setprofile(before)
            threading.setprofile(before)
            if found:  # whatever it returned or raised
                raise Raised(found.pop())

    return honest


def in_scene(function, without):
    """A function, or the Names of a file, as a scene gets it: it may call what the scene passes in, and itself nothing of `without`."""
    if not without:
        return function
    if isinstance(function, Names):
        return Names(lambda name: (one := function._get(name)) and noticed(one, without, checks=False))
    return noticed(function, without, checks=False)


def complaint(exercise, function, error, returned=(), memory=None):
    """A sentence on the error with which a check ended, or one in a call of the answer; `memory` is the limit in GB, if any."""
    if isinstance(error, SystemExit):
        return "it calls exit(), which ends Python"
    if not isinstance(error, Exception):
        return f"it raises {type(error).__name__}, which ends the run"
    if isinstance(error, MemoryError) and memory:
        return f"it {beyond(memory)}"
    frames = traceback.extract_tb(error.__traceback__)
    own = exercise.startswith(OWN)
    file = f"{OWN_FILE}.py" if own else getattr(getattr(function, "__code__", None), "co_filename", None)
    lines = [at.lineno for at in frames if at.filename == file]
    checks = isinstance(error, AssertionError) and (not lines or frames[-1].filename in FILES)
    if checks and str(error).strip():
        return str(error).strip()
    if returned and returned[0] is None:
        name = "a function of the step" if own else f"exercise_{exercise[3:]}"
        return f"{name} returned None; is a `return` missing?"
    if checks:
        return f"`{frames[-1].line}` does not hold"
    if isinstance(error, AssertionError) and frames[-1].filename == file:
        return own_assert(error, lines[-1], file if own else "the cell")
    where = f", in line {lines[-1]} of {file if own else 'its cell'}" if lines else ""
    graded = getattr(function, "__globals__", {}).get("__name__") == SPACE  # in a notebook all its cells have run
    return f"it raised {type(error).__name__}: {error}{where}{hint(error) if graded else ''}"


def beyond(memory):
    """What an answer does that is stopped for its memory."""
    return f"needs more than {memory:g} GB of memory"


def own_assert(error, line, where):
    """The sentence on an assert of the answer's own that failed."""
    said = f": {error}" if str(error).strip() else ""
    return f"your assert in line {line} of {where} fails{said}"


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
    return answer.there(scene, *args)


def peak(answer, *args):
    """The most bytes that answer(*args) takes at once. A first call warms up what is imported or cached once.

    It is the median of three calls: what another thread takes meanwhile would count as the answer's.
    """
    return there(answer, most_bytes, *args)


def most_bytes(answer, *args):
    """The scene of `peak`."""
    answer(*args)
    found = []
    for _ in range(3):
        tracemalloc.start()
        try:
            answer(*args)
            found.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    return sorted(found)[1]


def grade(exercise, function):
    """Print the verdict on an answer, as in `_ = grade("05-2", exercise_2)` in a notebook. Returns whether it is right."""
    found = verdict(exercise, function, np.random.default_rng())
    print(f"exercise {exercise}: {shown(found)}")
    return found.said == "right"


def shown(found):
    """A Verdict as text: one line, and one more for each of several parts of which not all are alike."""
    if len(found.parts) == 1 or not found.said.startswith("not right: "):
        return found.said
    lines = [f"{found.points} of {found.of} points"]
    for name, points, one in found.parts:
        lines.append(f"    {points if one == 'right' else 0} of {points}  {name}{'' if one == 'right' else f': {one}'}")
    return "\n".join(lines)


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
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        why = "it is no UTF-8 text: " if isinstance(error, UnicodeDecodeError) else ""
        raise ValueError(f"{path.name} cannot be read: {why}{str(error)[:200]}") from None


def parsed(path, text):
    """The notebook of a path's text."""
    path = Path(path)
    if not text.strip():
        raise ValueError(f"{path.name} is empty")
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
        raise ValueError(f"{path.name} is not a notebook, or a damaged one: {str(error)[:200]}") from None


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
        module = sys.modules[SPACE] = types.ModuleType(SPACE)  # in which a dataclass looks for its annotations
        self.space, self.memory = vars(module), memory

    def run(self, i, code, whose):
        """Run cell i, or a whole file of the name i; None, or a sentence on its error.

        `whose` is "setup", "mine", or "other": another exercise's.
        """
        file = f"cell {i}" if isinstance(i, int) else i
        try:
            exec(compiled(code, file), self.space)
        except NotImplementedError:
            pass  # the cell itself calls an exercise that has no answer; the check will find that out
        except BaseException as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            if isinstance(error, AssertionError) and at.filename == file and whose == "mine":
                return own_assert(error, at.lineno, "the cell" if isinstance(i, int) else file)
            what = f"raises {type(error).__name__}: {error}{hint(error) if whose == 'mine' else ''}"
            if isinstance(error, SyntaxError):
                what = f"does not compile: {error}"
            if isinstance(error, SystemExit):
                what = "calls exit(), which ends Python"
            if isinstance(error, MemoryError) and self.memory:
                what = beyond(self.memory)
            return f"{called(code) if isinstance(i, int) else file} {what}"
        return None

    def function(self, name):
        """What is called so, if it can be called, and else None."""
        found = self.space.get(name)
        return found if callable(found) else None

    def names(self):
        """All of them, as the check of a step gets them."""
        return Names(self.function)


def called(code):
    """How a sentence names a cell."""
    return f"the cell {(code.strip().splitlines() or [''])[0]!r}"


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


def own_answer(text, cells=None):
    """The Names of a my_qlora.py with this text. ValueError says what it must not import, or on what it fails."""
    cells, file = cells or Cells(), f"{OWN_FILE}.py"
    with contextlib.suppress(SyntaxError):  # of which running it says more
        for node in ast.walk(ast.parse(text)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or "."] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                if name.split(".")[0] not in OWN_MODULES:
                    raise ValueError(
                        f"{file} imports {name} in line {node.lineno}, and what it does is to be built here: "
                        "use NumPy and Python's own library"
                    )
    if error := cells.run(file, text, "mine"):
        raise ValueError(error)
    return cells.names()


class Student(str):
    """The name of a row of marks; `id` is the number that Canvas or Moodle gives the student, `note` what a teacher should know."""

    id = note = ""

    @classmethod
    def of(cls, name, number="", note=""):
        """The student of this name and number."""
        student = cls(name)
        student.id, student.note = number, note
        return student


def row_of(who, path):
    """How the table of marks calls an answer set that `collect` found; one without a name is called as its folder or file is."""
    return who or Student(Path(path or HERE).resolve().name)


# A name as a learning platform writes it: of a file that Canvas hands out (lovelaceada_LATE_4217_99_05_mine-1.ipynb, where -1 is the
# second attempt), and of a folder or a file that Moodle does (Ada Lovelace_4217_assignsubmission_file_).
CANVAS = re.compile(r"(?P<name>[^_]+)_(?:LATE_)?(?P<id>\d+)_(?P<submission>\d+)_(?P<file>.+)")
# the same of a file that is no answer, strictly: a teacher's own marks_2026_11_27.csv is no student's
UPLOADED = re.compile(r"(?P<name>[^\W\d_A-Z]+)_(?:LATE_)?(?P<id>\d{3,})_\d{4,}_(?P<file>.+)")
MOODLE = re.compile(r"(?P<name>.+?)_(?P<id>\d+)_assignsubmission_(?:file|onlinetext)_?(?P<file>.*)")


def handed_in(name):
    """(Student, the name that the student gave the file, which attempt) of a file's or folder's name; the student may be None."""
    if found := MOODLE.fullmatch(name):
        return Student.of(found["name"].strip(), found["id"]), found["file"], (0, 0)
    found = None if number_of(name) else CANVAS.fullmatch(name)
    if found and number_of(found["file"]):
        again = re.search(r"-(\d+)\.\w+$", found["file"])
        return (
            Student.of(found["name"], found["id"]),
            found["file"],
            (int(again[1]) if again else 0, int(found["submission"])),
        )
    return None, name, (0, 0)


def collect(path, numbers):
    """{who: {"05": file}}, the answers in a notebook or a folder: .ipynb or .py files whose names begin with a number, or my_qlora.py.

    One notebook, or a folder that holds each number once, is one answer set, called "". A folder with several files of
    one number holds several students: files as Canvas or Moodle names them belong to whom they name, and others to what follows the
    number: 05_alice.ipynb and 06_alice.ipynb to alice. A folder without answers of its own holds one folder
    a student; a student's folder in which there is nothing to grade is an empty set. Of two files of one number and one student the
    last attempt counts, or else the newest file, and the student's note says so. It names what could not be graded, too.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist; expected a notebook, or a folder of them")

    def answers(path):
        """[(student or None, number, file, attempt)], of which an .ipynb counts before the .py of its name."""
        found = []
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            student, name, attempt = handed_in(file.name)
            number = number_of(name)
            kinds = (".py",) if number == OWN else (".ipynb", ".py")
            if file.suffix in kinds and number in numbers and not file.is_dir():
                found.append((student, number, file, attempt))
        files = {file for _, _, file, _ in found}
        return [one for one in found if one[2].suffix == ".ipynb" or one[2].with_suffix(".ipynb") not in files]

    def last(found, student, left):
        """(the student, with a note if files were passed over; {number: file}) of one student's answers and what lies beside them."""
        files, passed = {}, []
        for _, number, file, _ in sorted(
            found, key=lambda one: (one[3], one[2].stat().st_mtime if one[2].exists() else 0)
        ):
            if number in files and not handed_in(file.name)[0]:
                passed.append(files[number].name)
            files[number] = file
        notes = [f"not graded, since there is a newer file: {', '.join(passed)}"] if passed else []
        if left:
            names = ", ".join(left[:SHOWN] + ["…"] * (len(left) > SHOWN))
            notes.append(f"not graded: {names} (an answer is called as 05_mine.ipynb or my_qlora.py is)")
        return Student.of(student, getattr(student, "id", ""), "; ".join(notes)), files

    found = answers(path)
    result, numbered = {}, [number for _, number, _, _ in found]
    if found and not any(student for student, *_ in found) and len(set(numbered)) == len(numbered):
        return {"": {number: file for _, number, file, _ in found}}
    groups, left = {}, {}  # {(name, number of the platform): the answers, the names of what is none}
    unnamed = [file for student, _, file, _ in found if not student]
    for one in found:
        student = one[0] or of_file(one[2], one[1], unnamed)
        groups.setdefault((str(student), student.id), []).append(one)
    if path.is_dir() and any(student for student, *_ in found):  # a platform's files, of which some may be no answers
        for file in beside(path, found):
            other = MOODLE.fullmatch(file.name) or UPLOADED.fullmatch(file.name)
            if other and other["file"] not in HANDED_OUT:
                who = other["name"].strip(), other["id"]
                groups.setdefault(who, [])
                left.setdefault(who, []).append(other["file"] or file.name)
    if not found and path.is_dir():
        for folder in (f for f in sorted(path.iterdir()) if f.is_dir() and f.name[0] not in "._"):
            student = handed_in(folder.name)[0] or Student(folder.name)
            theirs = answers(folder)
            groups.setdefault((str(student), student.id), []).extend(theirs)
            names = [file.name + "/" * file.is_dir() for file in beside(folder, theirs)]
            left.setdefault((str(student), student.id), []).extend(names)
    for (name, number), theirs in sorted(groups.items()):
        student, files = last(theirs, Student.of(name, number), left.get((name, number)))
        result[
            student if student not in result else Student.of(f"{name} ({number or len(result)})", number, student.note)
        ] = files
    if not any(result.values()):
        raise ValueError(
            f"{path} holds no answers; expected .ipynb or .py files whose names begin as 05_ does, or my_qlora.py"
        )
    return result


def beside(folder, found):
    """The files and folders in a folder that hold no answer and were not handed out; `found` are the answers there."""
    taken = {name for _, _, file, _ in found for name in (file.name, file.with_suffix(".py").name)}
    return [f for f in sorted(folder.iterdir()) if f.name[0] not in "._" and f.name not in taken | HANDED_OUT]


def of_file(file, number, others):
    """Whose file it is, by its name: what follows the number, if two files of one number have it not; else the whole name."""
    rest = lambda f: f.stem.removeprefix(OWN_FILE if number_of(f.name) == OWN else number_of(f.name)).strip(" _-")  # noqa: E731
    same = [f for f in others if number_of(f.name) == number and rest(f) == rest(file)]
    return Student(rest(file) if rest(file) and len(same) == 1 else file.stem)
