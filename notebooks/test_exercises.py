"""Grade answers, one test an exercise.

pytest notebooks                      the notebooks in this folder, answered in place
pytest notebooks --answers PATH       a notebook, a folder of them, or a folder with one folder a student
pytest notebooks --answers solutions  the solutions in the sources, as CI does
pytest notebooks -k 05                only notebook 05; -k 05-2 only its exercise 2
pytest notebooks --table marks.csv    write the marks, too
pytest notebooks --limit 60           stop an answer that runs for a minute, an endless loop perhaps; by default, for ten
pytest notebooks --memory 2           stop an answer that needs more than 2 GB; by default, 4

Which exercises there are is read from the checks, so an answer that was deleted fails, and no source is needed.
"""

from pathlib import Path

import grading
import pytest

# a warning that is printed in a notebook must not be an error here
pytestmark = pytest.mark.filterwarnings("default")


def chosen(where, numbers):
    """{who: {"08": file}}, what --answers names."""
    sources = {source.name[:2]: source for source in grading.sources()}
    if where == "solutions":
        if Path(where).exists():
            raise ValueError(
                "there is something called solutions here: write --answers ./solutions to grade it, or remove it to grade "
                "the solutions in the sources"
            )
        if not sources:
            raise ValueError("there are no sources here, which hold the solutions; expected a notebook or a folder")
        return {"": sources}
    if where is None and sources:
        return {"": {number: source.with_suffix(".ipynb") for number, source in sources.items()}}
    return grading.collect(where or grading.HERE, numbers)


def pytest_generate_tests(metafunc):
    """One test for each exercise of each notebook of which there are answers, and one for each set without any."""
    exercises = sorted(grading.load_checks(), key=lambda exercise: (exercise[:2], int(exercise[3:])))
    try:
        sets = chosen(metafunc.config.getoption("answers"), {exercise[:2] for exercise in exercises})
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    cases = [
        pytest.param(who, files[exercise[:2]], exercise, id=f"{who}/{exercise}".lstrip("/"))
        for who, files in sets.items()
        for exercise in exercises
        if exercise[:2] in files
    ]
    cases += [pytest.param(who, None, None, id=who) for who, files in sets.items() if not files]
    metafunc.parametrize("who, file, exercise", cases)


def test_exercise(who, file, exercise, seed, request, marks, texts, student_of):
    if file is None:
        pytest.fail(f"{who} holds no answers; expected files whose names begin as 08_ does", pytrace=False)
    found = texts[file]
    unread = isinstance(found, Exception)
    try:
        said = f"not gradable: {found}" if unread else student_of(who).mark(*found, exercise, seed)
    except Exception as error:  # whatever an answer did to its processes, it has a mark
        said = f"not gradable: {type(error).__name__}: {error}"
    row = marks[grading.row_of(who, request.config.getoption("answers"))]
    row[exercise] = {"right": "right", "not answered yet": "not answered"}.get(said, "not right")
    if said != "right":
        pytest.fail(f"exercise {exercise} is {said}", pytrace=False)
