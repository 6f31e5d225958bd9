"""The options of `pytest notebooks`, fresh random inputs, what was handed in, whose turn it is, and the table of marks."""

import csv
import os
import re
import shutil
from pathlib import Path

# read when numpy is loaded: on a busy machine, threads that wait for each other make an answer several times slower
for _library in ("OMP", "OPENBLAS"):
    os.environ.setdefault(f"{_library}_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")  # a notebook's setup cell may import pyplot where there is no screen

import grading  # noqa: E402
import marking  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from tinylora.models.files import atomic, check_target  # noqa: E402

SEED = pytest.StashKey()


def seconds(text):
    """A time limit, such as 60."""
    if not 0 < float(text) < 1e6:
        raise ValueError(text)
    return float(text)


def gigabytes(text):
    """A memory limit, such as 4, or inf."""
    if not float(text) > 0:
        raise ValueError(text)
    return float(text)


def whole(text):
    """A seed, such as 7."""
    if not text.isdecimal():
        raise ValueError(text)
    return int(text)


def pytest_addoption(parser):
    parser.addoption(
        "--answers",
        metavar="PATH",
        help="what to grade: a notebook (.ipynb or .py) or a folder of them, whose names begin with the two digits of a "
        "notebook; or a folder of one folder a student; or the word solutions, the solutions in the sources. By "
        "default, the notebooks in notebooks/.",
    )
    parser.addoption(
        "--student",
        metavar="TEXT",
        help="grade only the students in whose name TEXT stands, accents and all, or whose id it is, as in --student 4204",
    )
    parser.addoption(
        "--limit",
        metavar="SECONDS",
        type=seconds,
        default=600,
        help="when an answer that is still running is killed and counts as not right: an endless loop must not hold up the "
        "others. Each of its cells may take so long, and each part of its check. The slowest solution takes seconds, so 60 is enough on a "
        "machine that does nothing else (600)",
    )
    parser.addoption(
        "--memory",
        metavar="GB",
        type=gigabytes,
        default=4,
        help="the memory that an answer may take (4); inf for no limit. It is not limited on Windows and macOS",
    )
    parser.addoption(
        "--table",
        metavar="FILE.csv",
        help="write the marks: a row a student, the points of each exercise, their sum, and why points are missing",
    )
    parser.addoption(
        "--seed",
        metavar="N",
        type=whole,
        help="draw the checks' inputs from this seed: it replays a run, and gives every student the same inputs (by default a new "
        "one, which is printed)",
    )
    parser.addoption(
        "--hidden",
        metavar="FOLDER",
        help="a folder of checks that the teacher keeps, written as notebooks/checks is: further parts of the exercises that they name",
    )


@pytest.fixture
def seed(request, exercise):
    """The seed of an exercise's random inputs."""
    run = [request.config.stash[SEED], *(exercise or "").encode()]
    return int(np.random.SeedSequence(run).generate_state(1)[0])


def pytest_terminal_summary(terminalreporter, config):
    if SEED in config.stash:
        terminalreporter.write_line(f"--seed {config.stash[SEED]} draws the checks' inputs of this run again")


def pytest_configure(config):
    """A table that could not be written, and hidden checks that are none, are said before the first answer is graded."""
    given = config.getoption("seed", None)
    config.stash[SEED] = int(np.random.SeedSequence().generate_state(1)[0]) if given is None else given
    if folder := config.getoption("hidden", None):
        try:
            grading.load_hidden(folder)
        except ValueError as error:
            raise pytest.UsageError(str(error)) from None
    if path := config.getoption("table", None):
        try:
            check_target(path, folder=False)
        except (OSError, ValueError) as error:
            raise pytest.UsageError(str(error)) from None


@pytest.fixture(scope="session")
def marks(request):
    """{"alice": {"05-2": Verdict}}, which the tests fill; after the last of them it is written to --table.

    An exercise that only others handed in counts as not answered; one that this run did not come to is not graded.
    """
    found, path = {}, request.config.getoption("table")
    path = path and Path(os.path.realpath(path))  # as it is before an answer runs
    for who, _, exercise in asked_for(request.session):
        row = found.setdefault(grading.row_of(who, request.config.getoption("answers")), {})
        if exercise:
            row[exercise] = grading.unseen(exercise, "not graded")
    yield found
    if path:
        try:
            _clear(path)
            # with a byte order mark, or Excel takes UTF-8 for something else
            with atomic(path) as temporary, open(temporary, "w", encoding="utf-8-sig", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows(table_of(found))
        except OSError as error:
            pytest.fail(str(error), pytrace=False)


def table_of(found):
    """The rows of the table of marks: who, the points of each exercise, their sum, the sum there is, and what is missing and why."""
    exercises = sorted({exercise for row in found.values() for exercise in row}, key=grading.place)
    rows = [["student", "id", *exercises, "points", "of", "reasons"]]
    for who, row in found.items():
        every = {exercise: row.get(exercise) or grading.unseen(exercise, "not answered yet") for exercise in exercises}
        reasons = "; ".join(
            [f"{exercise}: {one.said}" for exercise, one in every.items() if one.said != "right"]
            + [who.note] * bool(who.note)
        )
        points = [one.points for one in every.values()]
        rows.append(
            [_cell(who), _cell(who.id), *points, sum(points), sum(one.of for one in every.values()), _cell(reasons)]
        )
    return rows


def _cell(name):
    """A name as the table holds it: on one line, and no formula to a spreadsheet."""
    name = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
    return re.sub(r"(^|[;,\t|])(\s*)(?=[=+\-@])", r"\1\2'", name)  # a spreadsheet may split at a semicolon


def _clear(path):
    """Remove what an answer put in the table's place: a folder, or a link that leads elsewhere."""
    if path.is_symlink():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)


@pytest.fixture(scope="session")
def texts(request):
    """{file: its text, or why there is none}, read before the first answer runs, which could change the others' files."""
    found, solution = {}, request.config.getoption("answers") == "solutions"
    for _, file, exercise in asked_for(request.session):
        for part in grading.CHECKS.get(exercise, ()):
            if part.before:
                part.before()  # forks inherit it
        if file and file not in found:
            try:
                found[file] = solved(file) if solution else (file, grading.text_of(file))
            except (ValueError, ImportError) as error:
                found[file] = error
    return found


@pytest.fixture(scope="session")
def student_of(request, marks, texts):
    """student_of(who) grades one answer set, in processes that end when it is another's turn, and before the table is written."""
    turn = {}

    def student_of(who):
        if who not in turn:
            end()
            limit, memory = request.config.getoption("limit"), request.config.getoption("memory")
            turn[who] = marking.Student(limit, memory, request.config.getoption("hidden"))
        return turn[who]

    def end():
        for who in list(turn):
            turn.pop(who).close()

    yield student_of
    end()


def asked_for(session):
    """[(who, file, exercise)] of the tests that run."""
    ours = [item for item in session.items if item.path.name == "test_exercises.py"]
    return [tuple(item.callspec.params[name] for name in ("who", "file", "exercise")) for item in ours]


def solved(source):
    """(name, text) of the solution version of a source."""
    import build  # which students do not have
    import nbformat

    if source.stem == "build_it":
        return source, build.steps(source.read_text(encoding="utf-8"), solutions=True)
    return source.with_suffix(".ipynb"), nbformat.writes(build.make(source, solutions=True))
