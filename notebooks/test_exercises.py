"""Grade answers, one test an exercise.

pytest notebooks                      the notebooks in this folder, answered in place
pytest notebooks --answers PATH       a notebook, or a folder of them
pytest notebooks --answers solutions  the solutions in the sources, as CI does
pytest notebooks -k 08                only notebook 08; -k 08-2 only its exercise 2

Which exercises there are is read from the sources, so an answer that was deleted fails.
"""

import build
import grading
import pytest

# a warning that is printed in a notebook must not be an error here
pytestmark = pytest.mark.filterwarnings("default")


def pytest_generate_tests(metafunc):
    """One test for each exercise of each notebook of which there are answers."""
    where = metafunc.config.getoption("answers")
    sources = {source.name[:2]: source for source in grading.sources()}
    try:
        if where in (None, "solutions"):
            files = sources if where else {n: source.with_suffix(".ipynb") for n, source in sources.items()}
        else:
            files = grading.collect(where, sources)
        cases = [
            pytest.param(files[n], k, id=f"{n}-{k}")
            for n in sorted(files)
            for k in grading.exercises(grading.read(sources[n]))
        ]
    except (ValueError, ImportError) as error:
        raise pytest.UsageError(str(error)) from None
    metafunc.parametrize("file, k", cases)


def test_exercise(file, k, rng, request):
    exercise = f"{file.name[:2]}-{k}"
    try:
        solved = request.config.getoption("answers") == "solutions"
        notebook = build.make(file, solutions=True) if solved else grading.read(file)
        said = grading.verdict(exercise, grading.answer(notebook, k), rng)
    except ValueError as error:
        said = f"not gradable: {error}"
    if said != "right":
        pytest.fail(f"exercise {exercise} is {said}", pytrace=False)
