"""Grade answers, one test an exercise.

pytest notebooks                      the notebooks in this folder, answered in place
pytest notebooks --answers PATH       a notebook, a folder of them, or a folder with one folder a student
pytest notebooks --answers solutions  the solutions in the sources, as CI does
pytest notebooks -k 05                only notebook 05; -k 05-2 only its exercise 2
pytest notebooks -k my-               the six steps of build_it.md, in my_qlora.py; -k my-1 only the first
pytest notebooks --student 4204       only the students in whose name this stands, or whose id it is
pytest notebooks --table marks.csv    write the marks, too
pytest notebooks --seed 7             the same random inputs as the last time; a run prints its seed
pytest notebooks --hidden FOLDER      with further checks, which the teacher keeps
pytest notebooks --limit 60           stop an answer that runs for a minute, an endless loop perhaps; by default, for ten
pytest notebooks --memory 2           stop an answer that needs more than 2 GB; by default, 4

Which exercises there are is read from the checks, so an answer that was deleted fails, and no source is needed.
"""

import unicodedata
from pathlib import Path

import grading
import pytest

# a warning that is printed in a notebook must not be an error here
pytestmark = pytest.mark.filterwarnings("default")


def chosen(where, numbers):
    """{who: {"05": file}}, what --answers names."""
    sources, steps = {source.name[:2]: source for source in grading.sources()}, grading.HERE / "build_it.py"
    if where == "solutions":
        if Path(where).exists():
            raise ValueError(
                "there is something called solutions here: write --answers ./solutions to grade it, or remove it to grade "
                "the solutions in the sources"
            )
        if not sources:
            raise ValueError("there are no sources here, which hold the solutions; expected a notebook or a folder")
        return {"": sources | ({grading.OWN: steps} if steps.exists() else {})}
    if where is None and sources:
        own = {grading.OWN: grading.HERE / f"{grading.OWN_FILE}.py"} if steps.exists() else {}
        return {"": {number: source.with_suffix(".ipynb") for number, source in sources.items()} | own}
    return grading.collect(where or grading.HERE, numbers)


def picked(sets, text):
    """Of {who: files}, the students in whose name this text stands, or whose id it is; all if there is none."""
    if text is None:
        return sets

    def plain(name):
        return unicodedata.normalize("NFC", name).casefold()

    found = {who: files for who, files in sets.items() if plain(text) in plain(who) or text == getattr(who, "id", "")}
    if not found:
        names = ", ".join(f"{who} ({who.id})" if getattr(who, "id", "") else str(who) for who in sets)
        raise ValueError(f"--student {text} is in no student's name, and no student's id; there are {names or 'none'}")
    return found


def pytest_generate_tests(metafunc):
    """One test for each exercise of each notebook of which there are answers, and one for each set without any."""
    exercises = sorted(grading.load_checks(), key=grading.place)
    try:
        sets = chosen(metafunc.config.getoption("answers"), {grading.place(exercise)[0] for exercise in exercises})
        sets = picked(sets, metafunc.config.getoption("student"))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    cases = [
        pytest.param(who, files[number], exercise, id=f"{who}/{exercise}".lstrip("/"))
        for who, files in sets.items()
        for exercise in exercises
        if (number := grading.place(exercise)[0]) in files
    ]
    cases += [pytest.param(who, None, None, id=who) for who, files in sets.items() if not files]
    metafunc.parametrize("who, file, exercise", cases)


def test_exercise(who, file, exercise, seed, request, marks, texts, student_of):
    if file is None:
        pytest.fail(
            f"{who} holds no answers; expected files whose names begin as 05_ does, or my_qlora.py", pytrace=False
        )
    try:
        if isinstance(texts[file], Exception):
            raise texts[file]
        found = student_of(who).mark(*texts[file], exercise, seed)
    except Exception as error:  # whatever an answer did to its processes, it has a mark
        kind = "" if isinstance(error, ValueError | ImportError) else f"{type(error).__name__}: "
        found = grading.unseen(exercise, f"not gradable: {kind}{error}")
    marks[grading.row_of(who, request.config.getoption("answers"))][exercise] = found
    if found.said != "right":
        pytest.fail(f"exercise {exercise} is {grading.shown(found)}", pytrace=False)
