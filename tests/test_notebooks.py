"""The form of the notebooks, and the machinery that builds and grades them. None of the notebooks is executed here."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("jupytext", reason="the notebooks need jupytext: pip install -e '.[notebooks]'")

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
sys.path.insert(0, str(NOTEBOOKS))

import build  # noqa: E402
import grading  # noqa: E402

REGISTRIES = r"https?://[^\s)]*(pypi|pythonhosted|npmjs|crates\.io|golang|anaconda|debian|docker|huggingface|hf\.co)"
ABSOLUTE = r"(?<![\w.~:/])/(home|root|tmp|usr|opt|var|work|mnt|etc|Users|private)/|\b[A-Z]:\\(Users|Windows|Program)"

each = pytest.mark.parametrize("source", grading.sources(), ids=lambda source: source.stem)


def complaints(source):
    """What is wrong with the form of a source, as sentences."""
    cells, found = grading.read(source).cells, []

    def want(condition, sentence):
        if not condition:
            found.append(sentence)

    def holds(pattern, kind):
        return any(re.search(pattern, cell.source, re.M) for cell in cells if cell.cell_type == kind)

    markdown = [cell.source for cell in cells if cell.cell_type == "markdown"]
    title = f"# {source.name[:2]} · "
    want(cells[0].cell_type == "markdown" and re.match(title + r"\S", cells[0].source), f"It begins with {title!r}.")
    for word in ("Hours", "Prerequisites"):
        want(word in "\n".join(markdown[:2]), f"The word {word} stands in the first two markdown cells.")
    want(holds(r"^#+ Where paper and code differ$", "markdown"), "A heading says: Where paper and code differ.")
    want(holds(r"^\s*assert\b", "code"), "A code cell asserts something.")
    exercises = [cell for cell in cells if "exercise" in grading.tags(cell)]
    want(len(exercises) >= 2, "There are at least two exercises.")
    for i, cell in enumerate(cells, 1):
        want(not re.search(REGISTRIES, cell.source), f"Cell {i} names no package registry.")
        want(not re.search(ABSOLUTE, cell.source), f"Cell {i} holds no absolute path.")
        if cell.cell_type == "code" and not {"exercise", "hide-input"} & set(grading.tags(cell)):
            want(len(cell.source.splitlines()) <= 20, f"Cell {i} has at most 20 lines.")
    try:
        student = [cell.source.splitlines() for cell in build.make(source).cells]
    except ValueError as error:
        return [*found, str(error)]
    for k, cell in enumerate(exercises, 1):
        functions = [node for node in ast.parse(cell.source).body if isinstance(node, ast.FunctionDef)]
        right = len(functions) == 1 and functions[0].name == f"exercise_{k}" and ast.get_docstring(functions[0])
        want(right, f"Exercise cell {k} defines one function, exercise_{k}, with a docstring.")
        lines = cell.source.splitlines()
        begin, end = ([line.strip() for line in lines].index(mark) for mark in (build.BEGIN, build.END))
        given = student[cells.index(cell)]
        for line in filter(str.strip, lines[begin + 1 : end]):
            shown = any(line.strip() in (other.strip() for other in code) for code in student)
            leaks = line.strip() in (other.strip() for other in given) or (len(line.strip()) >= 40 and shown)
            want(not leaks, f"The student version does not hold the solution's line {line.strip()!r}.")
    return found


def complaints_about_built(source):
    """What is wrong with the executed notebook beside a source, as sentences."""
    path = source.with_suffix(".ipynb")
    redo = f"run `python notebooks/build.py notebooks/{source.name}`"
    if not path.exists():
        return [f"{path.name} does not exist: {redo}"]
    notebook = grading.read(path)
    if build.form(notebook) != build.form(build.make(source)):
        return [f"{path.name} is not that of its source: {redo}, after moving away answers that you wrote into it"]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    data = [
        (kind, value)
        for output in outputs
        for kind, value in output.get("data", {"text/": output.get("text", "")}).items()
    ]
    wrong = {
        "has cells that were not executed": not all(cell.execution_count for cell in code),
        "holds an error": any(output.output_type == "error" for output in outputs),
        "shows no picture": not any(kind.startswith("image/") for kind, _ in data),
        "shows an absolute path": any(kind.startswith("text/") and re.search(ABSOLUTE, value) for kind, value in data),
        "has other metadata than build.py writes": notebook.metadata != build.METADATA,
    }
    return [f"{path.name} {what}: {redo}" for what, is_so in wrong.items() if is_so]


@each
def test_the_form_of_a_source(source):
    assert complaints(source) == []


@each
def test_the_built_notebook_is_that_of_its_source(source):
    assert complaints_about_built(source) == []


def test_every_exercise_has_a_check_and_every_check_an_exercise():
    exercises = {f"{s.name[:2]}-{k}" for s in grading.sources() for k in grading.exercises(grading.read(s))}
    checks = set(grading.load_checks())
    assert exercises - checks == set(), "exercises without a check"
    assert checks - exercises == set(), "checks without an exercise"
    assert all(f"nb{name[:2]}" == check.__module__.split(".")[-1] for name, check in grading.CHECKS.items())


TINY = '''\
# %% [markdown]
# # 99 · Tiny
#
# Hours: 1. Prerequisites: none.

# %% tags=["setup"]
import numpy as np
from grading import grade

TWO = 2

# %% [markdown]
# ## Where paper and code differ

# %%
import warnings

raise_here = TWO
assert TWO == 2
warnings.warn("careful")
print(np.__file__, object())

# %% tags=["hide-input"]
import matplotlib.pyplot as plt

plt.plot([0, 1])


# %% tags=["exercise"]
def exercise_1(x):
    """Return twice x."""
    # BEGIN SOLUTION
    y = TWO * x
    return y
    # END SOLUTION


# %%
_ = grade("99-1", exercise_1)


# %% tags=["exercise"]
def exercise_2(x):
    """Return the sum of the squares of x."""
    squares = x * x
    total = 0
    for square in squares:
        # BEGIN SOLUTION
        total = total + square
        # END SOLUTION
    return total
'''
CHECKS = """\
import numpy as np
from grading import check


@check("99-1")
def _(answer, rng):
    x = rng.standard_normal(3)
    assert np.allclose(answer(x), 2 * x), "exercise_1(x) should be twice x."


@check("99-2")
def _(answer, rng):
    x = rng.standard_normal(3)
    assert np.isclose(answer(x), x @ x)
"""


@pytest.fixture
def source(tmp_path, monkeypatch):
    """The source of a tiny notebook 99, in a folder that holds the machinery and nothing else."""
    folder = tmp_path / "notebooks"
    shutil.copytree(NOTEBOOKS, folder, ignore=shutil.ignore_patterns("[0-9][0-9]_*", "nb*.py", "__pycache__", ".*"))
    (folder / "99_tiny.py").write_text(TINY, encoding="utf-8")
    (folder / "checks" / "nb99.py").write_text(CHECKS)
    shutil.copy(NOTEBOOKS.parent / "pyproject.toml", tmp_path)
    for module in (grading, build):
        monkeypatch.setattr(module, "HERE", folder)
    monkeypatch.setattr(grading, "CHECKS", {})
    monkeypatch.setattr(grading, "load_checks", lambda: grading.CHECKS)
    exec(compile(CHECKS, folder / "checks" / "nb99.py", "exec"), {})
    return folder / "99_tiny.py"


def change(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_student_and_solution_versions(source):
    solution, student = (build.make(source, solutions).cells for solutions in (True, False))
    assert [cell.id for cell in student] == [f"cell-{i:03d}" for i in range(len(student))]
    assert [cell.metadata for cell in student][:2] == [{}, {"tags": ["setup"]}]
    assert solution[5].source.splitlines()[2:] == ["    y = TWO * x", "    return y"]
    assert student[5].source.splitlines()[2:] == ['    raise NotImplementedError("your answer")']
    assert student[7].source.splitlines()[4:] == [
        "    for square in squares:",
        '        raise NotImplementedError("your answer")',
        "    return total",
    ]
    different = [i for i in range(len(student)) if student[i] != solution[i]]
    assert different == [5, 7] and grading.exercises(grading.read(source)) == [1, 2]


def test_a_source_in_good_form_has_no_complaints(source):
    assert complaints(source) == []


@pytest.mark.parametrize(
    "old, new, sentence",
    [
        ("# # 99 · Tiny", "# # Tiny", "begins with"),
        ("Hours", "Days", "Hours"),
        ("# ## Where paper and code differ", "# Where", "Where paper"),
        ("assert TWO", "TWO", "asserts"),
        ('# %% tags=["exercise"]\ndef exercise_1', "# %%\ndef exercise_1", "two exercises"),
        ("def exercise_1", "def exercise_3", "exercise_1, with"),
        ('    """Return twice x."""\n', "", "docstring"),
        ("raise_here = TWO", "\n" * 20 + "raise_here = TWO", "20 lines"),
        ("    # END SOLUTION\n\n\n# %%\n_", "\n\n# %%\n_", "END SOLUTION"),
        ("total = 0", "total = 0\n    # BEGIN SOLUTION", "BEGIN SOLUTION"),
        ('"""Return twice x."""', '"""\n    y = TWO * x\n    """', "the solution's line"),
        ("Prerequisites: none", "Prerequisites: https://pypi.org/simple", "registry"),
        ("TWO = 2", 'TWO = len("/home")\nopen("/home/me/x")', "absolute path"),
    ],
)
def test_a_source_in_bad_form_has(source, old, new, sentence):
    change(source, old, new)
    assert any(sentence in complaint for complaint in complaints(source))


def test_grading_right_wrong_unanswered(source, rng, capsys):
    solution, student = grading.read(source), build.make(source)
    assert grading.grade("99-1", grading.answer(solution, 1)) is True
    assert grading.grade("99-1", grading.answer(student, 1)) is False
    assert grading.grade("99-1", lambda x: x) is False
    assert grading.grade("99-2", lambda x: 1 + x @ x) is False
    assert grading.grade("99-2", lambda x: x.no_such_thing) is False
    printed = capsys.readouterr().out.splitlines()
    assert printed[:4] == [
        "exercise 99-1: right",
        "exercise 99-1: not answered yet",
        "exercise 99-1: not right: exercise_1(x) should be twice x.",
        "exercise 99-2: not right: `assert np.isclose(answer(x), x @ x)` does not hold",
    ]
    assert re.match(r"exercise 99-2: not right: it raised AttributeError: .* in line \d+ of its cell", printed[4])
    assert grading.verdict("99-2", grading.answer(solution, 2), rng) == "right"
    with pytest.raises(ValueError, match="exercise 99-7 has no check"):
        grading.grade("99-7", len)
    with pytest.raises(ValueError, match="two checks"):
        grading.check("99-1")(len)


def test_only_setup_and_exercise_cells_run(source):
    change(source, "raise_here = TWO", "1 / 0")
    assert grading.answer(grading.read(source), 2)(np.array([1, 2])) == 5


@pytest.mark.parametrize(
    "old, new, sentence",
    [
        (
            "    return y",
            "    return y)",
            "the cell 'def exercise_1(x):' does not compile: unmatched ')' (cell 6, line 5)",
        ),
        ("def exercise_1", "1 / 0\n\n\ndef exercise_1", "the cell '1 / 0' raises ZeroDivisionError: division by zero"),
        ("TWO = 2", "TWO = two", "the cell 'import numpy as np' raises NameError: name 'two' is not defined"),
        ("def exercise_1", "def exercise_one", 'no cell tagged "exercise" defines exercise_1'),
        ('tags=["exercise"]\ndef exercise_1', "\ndef exercise_1", 'no cell tagged "exercise" defines exercise_1'),
    ],
)
def test_a_cell_that_fails_is_one_sentence(source, old, new, sentence):
    change(source, old, new)
    notebook = grading.read(source)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        grading.answer(notebook, 1)
    if "import" not in sentence:  # the other exercise is graded all the same
        assert grading.answer(notebook, 2)(np.array([1, 2])) == 5


def test_collecting_answers(source, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("99_tiny.py", "99 tiny.ipynb", "notes.py", "98_other.ipynb"):
        (folder / name).write_text("{")
    assert grading.collect(folder, {"99"}) == {"99": folder / "99 tiny.ipynb"}
    assert grading.collect(folder / "99_tiny.py", {"99"}) == {"99": folder / "99_tiny.py"}
    with pytest.raises(ValueError, match="is not a notebook"):
        grading.read(folder / "99 tiny.ipynb")
    with pytest.raises(ValueError, match="holds no answers"):
        grading.collect(folder / "notes.py", {"99"})
    with pytest.raises(ValueError, match="does not exist"):
        grading.collect(folder / "nothing", {"99"})
    (folder / "99-again.ipynb").write_text("{")
    with pytest.raises(ValueError, match="expected one of them"):
        grading.collect(folder, {"99"})


def test_pytest_grades(source, tmp_path):
    """One run over answers of which one is right and one does not compile, and one over the solutions."""

    def run(*arguments):
        command = [sys.executable, "-m", "pytest", "notebooks", "-p", "no:cacheprovider", "-rA", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    done = run("--answers", "solutions", "-k", "99-2")
    assert done.returncode == 0 and "1 passed, 1 deselected" in done.stdout, done.stdout + done.stderr
    answers = tmp_path / "mine" / "99.py"
    answers.parent.mkdir()
    shutil.copy(source, answers)
    change(answers, "total = total + square", "total +")
    change(answers, "    y = TWO * x\n    return y\n", '    raise NotImplementedError("your answer")\n')
    done = run("--answers", str(answers.parent))
    assert done.returncode == 1 and "2 failed" in done.stdout, done.stdout + done.stderr
    assert "exercise 99-1 is not answered yet" in done.stdout and "rng seed: " in done.stdout
    assert re.search(
        r"exercise 99-2 is not gradable: the cell 'def exercise_2.* does not compile: invalid", done.stdout
    )


def test_build(source, tmp_path, capsys):
    """Building twice gives the same bytes; a stale, answered, slow or raising notebook is refused and left as it was."""
    for module in ("nbclient", "ipykernel", "matplotlib"):
        pytest.importorskip(module)
    built = source.with_suffix(".ipynb")

    def main(*arguments):
        status = build.main(arguments)
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    status, printed = main()
    assert status == 0 and re.fullmatch(r"99_tiny: [\d.]+ s\n", printed), printed
    assert complaints_about_built(source) == []
    before = built.read_bytes()
    text = before.decode()
    assert "exercise 99-1: not answered yet" in text and '"cell.py:5: UserWarning: careful' in text
    assert "<object object at 0x…>" in text
    assert main("99")[0] == 0 and built.read_bytes() == before
    status, printed = main("--check")
    assert status == 0 and re.fullmatch(r"99_tiny: student [\d.]+ s, solutions [\d.]+ s\n", printed), printed
    assert main("--solutions", str(tmp_path / "solved"))[0] == 0
    assert "exercise 99-1: right" in (tmp_path / "solved" / "99_tiny.ipynb").read_text(encoding="utf-8")

    assert main("--limit", "0.1") == (1, "99_tiny: it takes more than 0.1 seconds\n")
    change(source, "raise_here = TWO", "1 / 0")
    status, printed = main()
    assert status == 1 and printed.startswith("99_tiny: a cell raised ZeroDivisionError: division by zero\n")
    command = "run `python notebooks/build.py notebooks/99_tiny.py`"
    assert main("--check") == (1, f"99_tiny: 99_tiny.ipynb is stale: {command}\n")
    assert built.read_bytes() == before and len(complaints_about_built(source)) == 1
    change(built, 'raise NotImplementedError(\\"your answer\\")', "return 2 * x")
    assert main() == (1, "99_tiny: 99_tiny.ipynb holds answers, which would be lost; move it away first\n")
    with pytest.raises(SystemExit):
        main("98")
