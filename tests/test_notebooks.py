"""The form of the notebooks, and the machinery that builds and grades them. None of the notebooks is executed here."""

import ast
import csv
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("jupytext", reason="the notebooks need jupytext: pip install -e '.[notebooks]'")

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
sys.path.insert(0, str(NOTEBOOKS))

import build  # noqa: E402
import grading  # noqa: E402
import marking  # noqa: E402
import outputs  # noqa: E402

LAST_OF_THE_CORE = "10"
REGISTRIES = r"https?://[^\s)]*(pypi|pythonhosted|npmjs|crates\.io|golang|anaconda|debian|docker|huggingface|hf\.co)"
ABSOLUTE = r"(?<![\w.~:/])/(home|root|tmp|usr|opt|var|work|mnt|etc|Users|private)/|\b[A-Z]:\\(Users|Windows|Program)"


def exercises_of(source):
    """The numbers K of the exercises of a source, in order: each is a cell tagged "exercise" that defines exercise_K."""
    cells = [cell.source for cell in grading.read(source).cells if "exercise" in grading.tags(cell)]
    return [int(k) for code in cells for k in re.findall(r"^def exercise_(\d+)\(", code, re.M)]


each = pytest.mark.parametrize("source", grading.sources(), ids=lambda source: source.stem)


def shown_open(source):
    """The names of functions and classes that are defined in cells which are not folded, exercises aside."""
    code = [
        c.source
        for c in grading.read(source).cells
        if c.cell_type == "code" and not {"hide-input", "exercise"} & set(grading.tags(c))
    ]
    return set(re.findall(r"^(?:def|class) (\w+)", "\n".join(code), re.M))


def complaints(source):
    """What is wrong with the form of a source, as sentences."""
    cells, found = grading.read(source).cells, []

    def want(condition, sentence):
        if not condition:
            found.append(sentence)

    def holds(pattern, kind):
        return any(re.search(pattern, cell.source, re.M) for cell in cells if cell.cell_type == kind)

    markdown = [cell.source for cell in cells if cell.cell_type == "markdown"]
    core, head = source.name[:2] <= LAST_OF_THE_CORE, cells[0].source
    want(
        cells[0].cell_type == "markdown" and head.startswith(f"# {source.name[:2]} · "),
        f"It begins with '# {source.name[:2]} · '.",
    )
    want(core != head.splitlines()[0].endswith("(appendix)"), "An appendix, and no other, says so in its title.")
    want("[All notebooks](README.md)" in head, "The head links to the list of all notebooks.")
    want(
        re.search(r"\*\*Question\.\*\* [^?]*\?(\n\n|$)", head),
        "The head has one Question, which ends in a question mark.",
    )
    able = head.partition("**You will be able to**")[2].partition("**Needs")[0]
    want(len(re.findall(r"^- ", able, re.M)) == 3, "You will be able to: 3 things.")
    for word in ("Needs", "Hours", "Papers"):
        want(f"**{word}:** " in head, f"The head says {word}.")
    words, hours = sum(len(text.split()) for text in markdown), re.search(r"\*\*Hours:\*\* (\d*)(½?)", head)
    if core:
        want(words <= 1500, f"It has 1,500 words at most; these are {words:,}.")
        want(hours and int(hours[1] or 0) + len(hours[2]) / 2 <= 2, "It takes two hours at most.")
    if "05" <= source.name[:2] <= LAST_OF_THE_CORE:
        want(holds(r"\]\(build_it\.md", "markdown"), "It leads to a step of build_it.md.")
    for heading in ("Where paper and code differ", "Exercises", "Summary"):
        want(holds(rf"^## {heading}$", "markdown"), f"A heading says: {heading}.")
    want(holds(r"^\s*assert\b", "code"), "A code cell asserts something.")
    exercises = [cell for cell in cells if "exercise" in grading.tags(cell)]
    want(len(exercises) >= 2, "There are at least two exercises.")
    for i, cell in enumerate(cells, 1):
        if "hide-input" in grading.tags(cell):
            first = cell.source.splitlines()[0]
            want(
                re.match(r"# (Measures|Checks|Draws): \S", first),
                f"Cell {i} is folded; it says first what it measures, checks or draws.",
            )
        if cell.cell_type == "markdown" and re.search(rf"^### {source.name[:2]}-\d", cell.source, re.M):
            wide = max(len(line) for line in cell.source.partition("### ")[2].splitlines())
            want(wide <= 90, f"Cell {i} states an exercise in lines of at most 90 columns, not {wide}.")
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
        said = ast.get_docstring(functions[0]) if len(functions) == 1 and functions[0].name == f"exercise_{k}" else None
        want(
            said and "\n" not in said,
            f"Exercise cell {k} defines one function, exercise_{k}, with a docstring of one line.",
        )
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
    exercises = {f"{s.name[:2]}-{k}" for s in grading.sources() for k in exercises_of(s)} | {
        f"my-{k}" for k in range(1, 7)
    }
    checks = set(grading.load_checks())
    assert exercises - checks == set(), "exercises without a check"
    assert checks - exercises == set(), "checks without an exercise"
    for name, parts in grading.CHECKS.items():
        assert {part.function.__module__ for part in parts} == {f"checks.nb{name[:2]}"}


TINY = '''\
# %% [markdown]
# # 99 · Tiny (appendix)
#
# [← 98 Small](98_small.ipynb) · [All notebooks](README.md)
#
# **Question.** What is twice x?
#
# **You will be able to**
#
# - double;
# - square;
# - add.
#
# **Needs:** nothing.
#
# **Hours:** 1.
#
# **Papers:** none.

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
# Draws: a line
import matplotlib.pyplot as plt

plt.plot([0, 1])

# %% [markdown]
# ## Exercises
#
# ### 99-1 Twice
#
# Double it.


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


# %% [markdown]
# ## Summary
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
    shutil.copytree(
        NOTEBOOKS, folder, ignore=shutil.ignore_patterns("[0-9][0-9]_*", "nb*.py", "build_it.py", "__pycache__", ".*")
    )
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
    assert solution[6].source.splitlines()[2:] == ["    y = TWO * x", "    return y"]
    assert student[6].source.splitlines()[2:] == ['    raise NotImplementedError("your answer")']
    assert student[8].source.splitlines()[4:] == [
        "    for square in squares:",
        '        raise NotImplementedError("your answer")',
        "    return total",
    ]
    different = [i for i in range(len(student)) if student[i] != solution[i]]
    assert different == [6, 8] and exercises_of(source) == [1, 2]


def test_a_source_in_good_form_has_no_complaints(source):
    assert complaints(source) == []


@pytest.mark.parametrize(
    "old, new, sentence",
    [
        ("# # 99 · Tiny", "# # Tiny", "begins with"),
        (" (appendix)", "", "An appendix, and no other"),
        ("Hours", "Days", "Hours"),
        ("twice x?", "twice x.", "question mark"),
        ("# - add.", "# and add.", "You will be able to: 3 things"),
        ("[All notebooks](README.md)", "", "list of all"),
        ("# Draws: a line", "# a line", "is folded"),
        ("# Double it.", "# Double" + " it" * 40, "at most 90 columns"),
        ('"""Return twice x."""', '"""Return twice x.\n\n    x   a number\n    """', "a docstring of one line"),
        ("# ## Where paper and code differ", "# Where", "Where paper"),
        ("assert TWO", "TWO", "asserts"),
        ('# %% tags=["exercise"]\ndef exercise_1', "# %%\ndef exercise_1", "two exercises"),
        ("def exercise_1", "def exercise_3", "exercise_1, with"),
        ('    """Return twice x."""\n', "", "docstring"),
        ("raise_here = TWO", "\n" * 20 + "raise_here = TWO", "20 lines"),
        ("    # END SOLUTION\n\n\n# %%\n_", "\n\n# %%\n_", "END SOLUTION"),
        ("total = 0", "total = 0\n    # BEGIN SOLUTION", "BEGIN SOLUTION"),
        ('"""Return twice x."""', '"""\n    y = TWO * x\n    """', "the solution's line"),
        ("**Needs:** nothing", "**Needs:** https://pypi.org/simple", "registry"),
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
    assert grading.verdict("99-2", grading.answer(solution, 2), rng).said == "right"
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
            "the cell 'def exercise_1(x):' does not compile: unmatched ')' (cell 7, line 5)",
        ),
        ("def exercise_1", "1 / 0\n\n\ndef exercise_1", "the cell '1 / 0' raises ZeroDivisionError: division by zero"),
        ("TWO = 2", "TWO = two", "the cell 'import numpy as np' raises NameError: name 'two' is not defined"),
        ("def exercise_1", "def exercise_one", "no exercise cell defines exercise_1; was it renamed, or written into"),
        ('tags=["exercise"]\ndef exercise_1', "\ndef exercise_1", "no exercise cell defines exercise_1; was it"),
        ("def exercise_1", "half\n\n\ndef exercise_1", "name 'half' is not defined. A name from another cell is not"),
        ("def exercise_1", "raise SystemExit\n\n\ndef exercise_1", "the cell 'raise SystemExit' calls exit()"),
        (
            "    # END SOLUTION\n\n\n# %%\n",
            "\n\nassert exercise_1(1) == 3\n\n# %%\n",
            "your assert in line 8 of the cell fails",
        ),
    ],
)
def test_a_cell_that_fails_is_one_sentence(source, old, new, sentence):
    change(source, old, new)
    notebook = grading.read(source)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        grading.answer(notebook, 1)
    if "import" not in sentence:  # the other exercise is graded all the same
        assert grading.answer(notebook, 2)(np.array([1, 2])) == 5


def test_a_notebook_without_its_setup_cell(source):
    change(source, 'tags=["setup"]', "")
    with pytest.raises(ValueError, match="the notebook has no cell tagged setup"):
        grading.answer(grading.read(source), 1)


def test_a_notebook_that_lost_its_tags(source):
    for tag in ("setup", "exercise"):
        change(source, f'tags=["{tag}"]', "")
    change(source, "raise_here = TWO", "1 / 0")
    assert grading.answer(grading.read(source), 1)(3) == 6


def test_the_last_of_two_answers_counts(source):
    with source.open("a", encoding="utf-8") as file:
        file.write('\n\n# %% tags=["exercise"]\ndef exercise_1(x):\n    return 7\n')
    assert grading.answer(grading.read(source), 1)(3) == 7


def test_lines_for_ipython_are_passed_over(source):
    change(source, "import numpy as np", "%matplotlib inline\nif True:\n    !ls\nimport numpy as np")
    change(source, "    y = TWO * x", "    y = (7 * x\n% 5)\n    %time y")
    assert grading.answer(grading.read(source), 1)(1) == 2


@pytest.mark.parametrize(
    "old, new, sentence",
    [
        (
            "y = TWO * x",
            "y = double(x)",
            "'double' is not defined, in line 4 of its cell. A name from another cell is not",
        ),
        ("y = TWO * x", "assert x is None", "not right: your assert in line 4 of the cell fails"),
        ("y = TWO * x", "raise SystemExit", "not right: it calls exit(), which ends Python"),
        ("    return y\n", "", "not right: exercise_1 returned None; is a `return` missing?"),
    ],
)
def test_verdict_on_an_answer_that_fails(source, rng, old, new, sentence):
    change(source, old, new)
    assert sentence in grading.verdict("99-1", grading.answer(grading.read(source), 1), rng).said


def test_a_sentence_of_the_check_comes_before_a_missing_return(source, rng):
    @grading.check("99-3")
    def _(answer, rng):
        if answer() != 0:
            raise AssertionError("exercise_3() should be 0.")  # to an assert here, pytest would add what it compared

    assert grading.verdict("99-3", lambda: None, rng).said == "not right: exercise_3() should be 0."


def test_a_name_error_in_a_notebook_has_no_hint(source, rng):
    assert "is not defined" in (said := grading.verdict("99-1", lambda x: no_such_name, rng).said)  # noqa: F821
    assert "another cell" not in said


def test_collecting_answers(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("99_tiny.py", "99_tiny.ipynb", "notes.py", "98_other.ipynb"):
        (folder / name).write_text("{")
    assert grading.collect(folder, {"99"}) == {"": {"99": folder / "99_tiny.ipynb"}}
    assert grading.collect(folder / "99_tiny.py", {"99"}) == {"": {"99": folder / "99_tiny.py"}}
    with pytest.raises(ValueError, match="is not a notebook"):
        grading.read(folder / "99_tiny.ipynb")
    with pytest.raises(ValueError, match="holds no answers"):
        grading.collect(folder / "notes.py", {"99"})
    with pytest.raises(ValueError, match="does not exist"):
        grading.collect(folder / "nothing", {"99"})
    (tmp_path / "none").mkdir()
    assert grading.collect(tmp_path, {"99"}) == {"mine": {"99": folder / "99_tiny.ipynb"}, "none": {}}
    (folder / "99-again.ipynb").write_text("{")
    two = {"again": {"99": folder / "99-again.ipynb"}, "tiny": {"99": folder / "99_tiny.ipynb"}}
    assert grading.collect(folder, {"99"}) == two
    os.utime(folder / "99-again.ipynb", (1, 1))
    found = grading.collect(tmp_path, {"99"})  # of one student the newest counts, which the table says
    assert found == {"mine": {"99": folder / "99_tiny.ipynb"}, "none": {}}
    assert next(iter(found)).note == (
        "not graded, since there is a newer file: 99-again.ipynb; "
        "not graded: 98_other.ipynb, notes.py (an answer is called as 05_mine.ipynb or my_qlora.py is)"
    )


def test_pytest_grades(source, tmp_path):
    """One run over the solutions, and one over a class."""

    def run(*arguments):
        command = [sys.executable, "-m", "pytest", "notebooks", "-p", "no:cacheprovider", "-rA", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1200)

    done = run("--answers", "solutions", "-k", "99-2")
    assert done.returncode == 0 and "1 passed, 1 deselected" in done.stdout, done.stdout + done.stderr
    for who in ("alice", "bob", "carol"):
        (tmp_path / "class" / who).mkdir(parents=True)
    for name in ("alice/99.py", "bob/99_b.py"):
        shutil.copy(source, tmp_path / "class" / name)
    answers = tmp_path / "class" / "bob" / "99_b.py"
    change(answers, "total = total + square", "total +")
    change(
        answers, "    y = TWO * x\n    return y\n", '    print("loud")\n    raise NotImplementedError("your answer")\n'
    )
    done = run("--answers", "class", "--table", "marks.csv")
    assert done.returncode == 1 and "3 failed, 2 passed" in done.stdout, done.stdout + done.stderr
    assert "[alice/99-2]" in done.stdout and "carol holds no answers" in done.stdout
    assert "exercise 99-1 is not answered yet" in done.stdout and "--seed " in done.stdout
    assert "loud" not in done.stdout
    said = re.search(
        r"exercise 99-2 is not gradable: (the cell 'def exercise_2.* does not compile: invalid.*)", done.stdout
    )[1]
    assert (tmp_path / "marks.csv").read_text(encoding="utf-8-sig").splitlines() == [
        "student,id,99-1,99-2,points,of,reasons",
        "alice,,1,1,2,2,",
        f'bob,,0,0,0,2,"99-1: not answered yet; 99-2: not gradable: {said}"',  # there is a comma in what Python says
        "carol,,0,0,0,2,99-1: not answered yet; 99-2: not answered yet",
    ]


IMPORTS = """\
# %% tags=["setup"]
import os, signal, sys, threading, time
import numpy as np
import checks.nb99, grading

# %% tags=["exercise"]
"""
RIGHT = "def exercise_2(x):\n    return x @ x\n"
TURN = "in_its_cell ="  # what a hostile student does before its function is called
HOSTILE = {  # what a class of students does in exercise 1, before it returns something wrong; exercise 2 is right
    "replaces the checks": f"{TURN} [grading.CHECKS.update({{k: lambda answer, rng: None}}) for k in grading.CHECKS]",
    "replaces the verdict": f"{TURN} grading.verdict = grading.complaint = lambda *_, **__: 'right'",
    "patches NumPy": f"{TURN} np.allclose = np.isclose = np.testing.assert_allclose = lambda *_, **__: True",
    "patches a check's module": f"{TURN} checks.nb99.np = None",
    "os._exit": "os._exit(0)",
    "os._exit in the cell": f"{TURN} os._exit(0)",
    "sys.exit": "sys.exit(0)",
    "KeyboardInterrupt": "raise KeyboardInterrupt",
    "KeyboardInterrupt in the cell": f"{TURN} signal.raise_signal(signal.SIGINT)",
    "a thread that lives": "threading.Thread(target=time.sleep, args=(1000,)).start()",
    "SIGKILL": "signal.raise_signal(signal.SIGKILL); os.abort()",
    "kills its parent": "os.kill(os.getppid(), 9); time.sleep(0.1)",
    "kills its group": "os.killpg(0, 9); time.sleep(0.1)",
    "stops itself and its parent": "os.kill(os.getppid(), signal.SIGSTOP); os.kill(os.getpid(), signal.SIGSTOP)",
    "leaves children": """\
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        while os.fork() == 0:
            time.sleep(0.05)
            open("alive", "a").write(".")
        os._exit(0)
time.sleep(0.5)
""",
    "leaves a child and ends": "os.fork() == 0 and time.sleep(1000) or os._exit(0)",
    "writes into pytest's memory": """\
for process in __import__("glob").glob("/proc/[0-9]*"):
    try:
        if b"--answers" in open(f"{process}/cmdline", "rb").read() and os.getcwd() == os.readlink(f"{process}/cwd"):
            start, end = (int(n, 16) for n in next(m for m in open(f"{process}/maps") if "[heap]" in m).split()[0].split("-"))
            with open(f"{process}/mem", "r+b", 0) as memory:
                memory.seek(start + 4096)
                memory.write(b"x" * (end - start - 8192))
    except (OSError, StopIteration): pass
""",
    "puts a folder in the table's place": "os.makedirs('marks.csv/x')",
    "writes the marks": "open('marks.csv', 'w').write('student,id,99-1,99-2,points,of,reasons\\nall,,1,1,2,2,\\n')",
    "writes the others' answers": f"{TURN} [open(f'class/99_z_{{who}}.py', 'w') for who in ('wrong', 'honest')]",
    "writes a verdict": """\
for fd in range(3, 50):
    try: os.write(fd, b'\\0\\0\\0\\x11["said", "right"]')
    except OSError: pass
""",
    "takes memory": "np.ones(1 << 40)",
    "switches off the timer": """\
signal.setitimer(signal.ITIMER_REAL, 0)
signal.signal(signal.SIGALRM, signal.SIG_IGN)
while True:
    try: time.sleep(1)
    except BaseException: pass
""",
    "one long C call": "sum(range(10**15))",
    "an object that equals all": "return type('X', (), {'__eq__': lambda *_: True, '__array__': lambda *_, **__: 2 * x})()",
    "a result without end": "return itertools.count() if (itertools := __import__('itertools')) else 0",
}


def hostile(act):
    """A notebook of both exercises, of which the first has this act."""
    before, indented = (act, "") if act.startswith(TURN) else ("", act.strip().replace("\n", "\n    "))
    return f'{IMPORTS}{before}\ndef exercise_1(x):\n    {indented}\n    return 3 * x\n\n# %% tags=["exercise"]\n{RIGHT}'


linux = pytest.mark.skipif(
    not marking.LINUX, reason="elsewhere less is promised, and a process does not inherit the checks"
)


@linux
def test_what_a_student_does_changes_nobody_elses_marks(source, tmp_path):
    """Many hostile students in one class run: they are not right, the two after them have their marks, and nothing lives on."""
    folder, names = tmp_path / "class", [f"{i:02d}" for i in range(len(HOSTILE))]
    folder.mkdir()
    for name, act in zip(names, HOSTILE.values(), strict=True):
        (folder / f"99_{name}.py").write_text(hostile(act))
    (folder / "99_z_honest.py").write_text(hostile("return 2 * x"))
    (folder / "99_z_wrong.py").write_text(hostile("pass"))
    command = [sys.executable, "-m", "pytest", "notebooks", "-p", "no:cacheprovider", "-q", "--answers", "class"]
    command += ["--limit", "2", "--memory", "1", "--table", "marks.csv"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1, done.stdout + done.stderr
    with open(tmp_path / "marks.csv", newline="", encoding="utf-8-sig") as file:
        table = list(csv.reader(file))
    assert table[0] == ["student", "id", "99-1", "99-2", "points", "of", "reasons"]
    assert table[-2] == ["z_honest", "", "1", "1", "2", "2", ""]
    assert table[-1] == ["z_wrong", "", "0", "1", "1", "2", "99-1: not right: exercise_1(x) should be twice x."]
    found = dict(zip(HOSTILE, table[1:-2], strict=True))
    assert [row[0] for row in found.values()] == names
    assert {what: row[2] for what, row in found.items()} == dict.fromkeys(HOSTILE, "0")
    # a death or a long run in exercise 1 does not lose exercise 2; what an answer patches may, since it is its own process
    lost = {what for what, row in found.items() if row[3] != "1"}
    assert lost <= {"writes a verdict", "patches NumPy"}, done.stdout
    for sentence in (
        "it takes more than 2 seconds",
        "it ended Python (os._exit or a signal)",
        "it needs more than 1 GB of memory",
        "it calls exit(), which ends Python",
        "it raises KeyboardInterrupt, which ends the run",
    ):
        assert f"exercise 99-1 is not right: {sentence}\n" in done.stdout
    assert "is not gradable: the cell 'in_its_cell = os._exit(0)' ended Python (os._exit or a signal)\n" in done.stdout
    alive = tmp_path / "alive"
    assert alive.exists() and (size := alive.stat().st_size)
    time.sleep(0.3)
    assert alive.stat().st_size == size, "a child of an answer is still alive"


@linux
def test_every_name_has_its_row(source, tmp_path):
    """Names that no spreadsheet, no line and no UTF-8 holds, and files that are none."""
    folder = tmp_path / "class"
    names = {
        "=1+1": "'=1+1",
        "@sum": "'@sum",
        "new\nline": "new\\nline",
        'a,"b': 'a,"b',
        os.fsdecode(b"\xff"): "\\udcff",
    }
    for name in [*names, "pipe", "link"]:
        (folder / name).mkdir(parents=True)
        if name in names:
            (folder / name / "99.py").write_text(hostile("return 2 * x"))
    os.mkfifo(folder / "pipe" / "99.py")
    (folder / "link" / "99.ipynb").symlink_to("nowhere")
    command = [sys.executable, "-m", "pytest", "notebooks", "-p", "no:cacheprovider", "-q", "--answers", "class"]
    done = subprocess.run([*command, "--table", "marks.csv"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr
    with open(tmp_path / "marks.csv", newline="", encoding="utf-8-sig") as f:
        rows = {row[0]: row[2:4] for row in csv.reader(f)}
    assert rows == {
        "student": ["99-1", "99-2"],
        **{name: ["0", "0"] for name in ("pipe", "link")},
        **{name: ["1", "1"] for name in names.values()},
    }


def test_a_table_that_cannot_be_written_is_said_first(source, tmp_path):
    (tmp_path / "marks.csv").mkdir()
    command = [sys.executable, "-m", "pytest", "notebooks", "-p", "no:cacheprovider", "-q", "--answers", "solutions"]
    done = subprocess.run([*command, "--table", "marks.csv"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 4 and "marks.csv is a folder; expected the name of a file" in done.stderr


@pytest.fixture
def graded(source):
    """graded(text, exercise, limit) of one student, or of several with different limits."""
    students = {}

    def graded(text, exercise, limit=60):
        student = students.setdefault(limit, marking.Student(limit, memory=1))
        return student.mark("99_tiny.py", text, exercise, 0).said

    yield graded
    for student in students.values():
        student.close()


@linux
def test_an_endless_loop(graded):
    loop = TINY.replace("y = TWO * x", "while True: pass")
    assert graded(loop, "99-1", 0.3) == "not right: it takes more than 0.3 seconds"
    called = loop.replace("    # END SOLUTION\n\n\n# %%\n", "\n\nexercise_1(1)\n\n# %%\n")
    said = "not gradable: the cell 'def exercise_1(x):' takes more than 0.3 seconds"
    assert called != loop and graded(called, "99-1", 0.3) == said
    assert graded(called, "99-2", 0.3) == "right"  # another exercise's cell is passed over
    assert graded(called, "99-1", 0.3) == said  # and its own is not
    said = "not gradable: the cell 'import numpy as np' takes more than 0.3 seconds"
    assert graded(TINY.replace("TWO = 2", "while True: pass"), "99-2", 0.3) == said


@linux
def test_what_ends_python_between_two_exercises_is_in_nobodys_way(graded):
    later = "import os, threading; threading.Timer(0.2, os.killpg, (0, 9)).start(); y = 2 * x"
    text = TINY.replace("y = TWO * x", later)
    assert graded(text, "99-1") == "right"
    time.sleep(1)
    assert graded(text, "99-2") == "right"


@linux
@pytest.mark.parametrize(
    "answer, sentence",
    [
        ("y = TWO * x", "right"),
        ("y = [2 * float(one) for one in x]", "right"),
        ("y = (2 * one for one in x)", "not right: it raised TypeError: "),
        ("y = 3 * x", "not right: exercise_1(x) should be twice x."),
        ("raise NotImplementedError", "not answered yet"),
        ("raise ValueError('right')", "not right: it raised ValueError: right, in line 4 of its cell"),
        ("y = double(x)", "'double' is not defined, in line 4 of its cell. A name from another cell is not"),
        ("assert x is None", "not right: your assert in line 4 of the cell fails"),
        ("y = None", "not right: exercise_1 returned None; is a `return` missing?"),
        ("y = 'red\\x1b[31m\\n'", "not right: it raised "),
    ],
)
def test_verdict_from_another_process(graded, answer, sentence):
    said = graded(TINY.replace("y = TWO * x", answer), "99-1")
    assert sentence in said and said.isprintable()


@linux
def test_a_check_sees_what_an_answer_does_to_its_arguments(graded):
    @grading.check("99-3")
    def _(answer, rng):
        x, rows = np.arange(3.0), [np.zeros(2), {"a": np.ones(2)}]
        answer(x, rows)
        grading.there(answer, _seen)
        raise AssertionError(
            f"{x.tolist()} {rows[0].tolist()} {rows[1]['a'].tolist()} {grading.peak(answer, x, rows) > 8e6}"
        )

    text = TINY.replace("exercise_1(x):", "exercise_3(x, rows):").replace(
        "TWO * x", "np.ones(1 << 20)[:3]; x[1] = 7; rows[1]['a'] += 1"
    )
    assert graded(text, "99-3") == "not right: [0.0, 7.0, 2.0] [0.0, 0.0] [2.0, 2.0] True"


def _seen(answer):
    assert callable(answer)


VALUES = [
    *(
        None,
        True,
        3,
        -(10**30),
        1.5,
        float("inf"),
        2 + 1j,
        "ß\n",
        Fraction(1, 3),
        np.float32(0.1),
        np.int64(-4),
        np.bool_(True),
    ),
    *((1, (2.0,)), [], {"a": [1], 2: (3,)}, {1, 2}, np.arange(6, dtype=np.int16).reshape(2, 3).T, np.zeros((0, 3))),
    *(np.array([1, None], dtype=object), np.array("text"), np.array(2.0)),
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_data_comes_back_as_it_was(value):
    found = marking.decoded(json.loads(json.dumps(marking.encoded(value))))
    assert type(found) is type(value)
    assert np.array_equal(found, value) if isinstance(value, np.ndarray) else found == value
    assert getattr(found, "dtype", None) == getattr(value, "dtype", None)
    assert getattr(found, "shape", None) == getattr(value, "shape", None)


def test_what_is_not_data_is_only_named():
    class Evil:
        def __reduce__(self):
            raise AssertionError("it was pickled")

        def __eq__(self, other):
            return True

        __hash__ = None

        def __repr__(self):
            return "evil\x1b[31m\n"

    found = marking.decoded(marking.encoded([Evil(), iter("ab"), range(2), {1: 2}.keys()]))
    assert type(found[0]).__name__ == "Evil" and repr(found[0]) == "evil?[31m" and found[0] != 1
    assert [*found[1]] == ["a", "b"] and found[2:] == [[0, 1], [1]]


def test_a_notebook_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(grading, "LARGEST", 10)
    (tmp_path / "99.py").write_text("# %%\n" * 3)
    with pytest.raises(ValueError, match=r"99\.py cannot be read: it has 15 bytes, expected at most 10"):
        grading.read(tmp_path / "99.py")


def test_a_folder_called_solutions_is_not_the_word(source, tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("graded", source.parent / "test_exercises.py")
    graded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(graded)
    monkeypatch.chdir(tmp_path)
    assert graded.chosen("solutions", {"99"}) == {"": {"99": source}}
    (tmp_path / "solutions").mkdir()
    with pytest.raises(ValueError, match=r"write --answers \./solutions to grade it, or remove it"):
        graded.chosen("solutions", {"99"})


def test_what_students_get(source, tmp_path, capsys):
    """A folder without the sources in which pytest grades; not with answers in it, nor over what is there."""
    import nbformat

    built, folder = source.with_suffix(".ipynb"), tmp_path / "students"
    nbformat.write(build.make(source, solutions=True), built)
    assert build.main(["--student", str(folder)]) == 1
    assert "99_tiny.ipynb is not the student version of its source" in capsys.readouterr().err and not folder.exists()
    nbformat.write(build.make(source), built)
    assert build.main(["--student", str(folder)]) == 0
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*")) == [
        *(
            "99_tiny.ipynb",
            "checks/__init__.py",
            "checks/nb99.py",
            "conftest.py",
            "grading.py",
            "marking.py",
            "test_exercises.py",
        ),
    ]
    change(folder / "99_tiny.ipynb", 'raise NotImplementedError(\\"your answer\\")', "return TWO * x")
    command = [sys.executable, "-m", "pytest", str(folder), "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1200)
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    with pytest.raises(SystemExit):
        build.main(["--student", str(folder)])


def said(*texts, margin=0.0):
    """What `outputs` says of a notebook of two cells that prints the one text, and then the other."""
    import nbformat.v4 as v4

    def notebook(text):
        stream = [v4.new_output("stream", name="stdout", text=text)] if text else []
        return v4.new_notebook(cells=[v4.new_markdown_cell("# Title"), v4.new_code_cell("\na = 1\na", outputs=stream)])

    return outputs.differences(*map(notebook, texts), {1: margin})


@pytest.mark.parametrize("decimals", [0, 1, 2, 4, 7])
def test_numbers_may_move_in_the_last_digit(rng, decimals):
    """By two units of it where it has decimals; whole numbers not at all."""
    for _ in range(20):
        x, allowed = int(rng.integers(-(10**9), 10**9)), 2 if decimals else 0
        lines = [f"a line\n‖x‖₂ = {(x + units) / 10**decimals:,.{decimals}f}% of W0" for units in (0, 1, 2, 3)]
        for units, line in enumerate(lines):
            for pair in ((lines[0], line), (line, lines[0])):
                found = said(*pair)
                if units <= allowed:
                    assert found == []
                    continue
                (text,) = found
                for expected in ("cell 2, 'a = 1':", *(f"{text.splitlines()[1]}" for text in pair), "apart"):
                    assert expected in text
                assert "a line" not in text  # only the line that differs


def test_a_margin_holds_for_every_number_of_its_cell(rng):
    for _ in range(20):
        n, margin = int(rng.integers(1000, 10**9)), float(rng.uniform(0.01, 0.2))
        near, far = (round(n * (1 + by * margin)) for by in (0.9, 1.5))
        assert said(f"{n:,} bytes", f"{near:,} bytes", margin=margin) == [] != said(f"{n:,} bytes", f"{near:,} bytes")
        assert said(f"{n:,} bytes", f"{far:,} bytes", margin=margin)


@pytest.mark.parametrize(
    "before, after, agree",
    [
        ("[ 0.31  0.293 1.   ]", "[0.309  0.292 0.999]", True),  # numpy's columns are as wide as the widest number
        ("from 9.95 on", "from  10.00 on", False),
        ("from 9.99 on", "from 10.01 on", True),
        ("rate 2^-10", "rate 2^-9", False),
        ("−0.01", "+0.01", True),
        ("-0.02", "+0.01", False),
        ("off by 0e+00 and 9e-08", "off by 4e-07 and 1e-09", True),
        ("off by 9e-08", "off by 9e-06", False),
        ("off by 3.0e-03", "off by 3.2e-03", True),
        ("off by 3.0e-03", "off by 3.3e-03", False),
        ("exercise 08-2: right", "exercise 08-1: right", False),
        ("bits be91a24d", "bits be91a24e", False),
        ("shape (4, 48)", "shape (4, 4.8)", False),
        ("it holds: 0.5", "it fails: 0.5", False),
        ("1.5 nan", "1.5 2.5", False),
        ("a\n0.5\nb", "a\nb", False),
        ("a\n0.5", "", False),
    ],
)
def test_what_agrees(before, after, agree):
    assert said(before, before) == said(after, after) == []
    assert bool(said(before, after)) is not agree and bool(said(after, before)) is not agree


def test_a_missing_line_is_told_alone():
    (text,) = said("a 1\nb 2\nc 3\nd 4.5", "a 1\nc 3\nd 4.6")
    assert text.splitlines() == ["cell 2, 'a = 1':", "    committed  b 2", f"    {'':<10} (a line more or less)"]
    (text,) = said("".join(f"{i}\n" for i in range(20)), "".join(f"{i + 1}\n" for i in range(20)))
    assert text.endswith("and 15 more") and text.count("committed") == outputs.SHOWN


def test_pictures_agree_in_size():
    import base64
    import struct

    import nbformat.v4 as v4

    def notebook(*sizes):
        png = [b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + struct.pack(">II", *size) + b"..." for size in sizes]
        shown = [v4.new_output("display_data", {"image/png": base64.b64encode(data).decode()}) for data in png]
        return v4.new_notebook(cells=[v4.new_code_cell("plot()", outputs=shown)])

    assert outputs.differences(notebook((640, 480)), notebook((640, 480))) == []
    (text,) = outputs.differences(notebook((640, 480)), notebook((640, 479)))
    assert "cell 1, 'plot()'" in text and "(640, 480)" in text and "(640, 479)" in text
    (text,) = outputs.differences(notebook((640, 480)), notebook())
    assert text.splitlines()[1:] == ["    committed  image/png", "    this run   no output"]


def test_build(source, tmp_path, capsys):
    """Building twice gives the same bytes; a stale, answered, hanging or raising notebook is refused and left as it was."""
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

    change(built, "object object", "subject subject")
    status, printed = main("--check")
    assert status == 1 and "cell 4, 'import warnings'" in printed and "committed" in printed and "subject" in printed
    assert "student" in printed and "the words differ" in printed and "cell 5" not in printed
    built.write_bytes(before)

    change(source, "raise_here = TWO", "while True:\n    pass")
    status, printed = main("--limit", "0.1")  # whichever cell a machine has come to by then
    assert status == 1
    assert re.fullmatch(
        r"99_tiny: after 0\.1 seconds cell \d+, '.*' has not ended: does it hang\? \(--limit\)\n", printed
    )
    change(source, "while True:\n    pass", "1 / 0")
    status, printed = main()
    assert status == 1
    assert printed.startswith("99_tiny: cell 4, 'import warnings' raised ZeroDivisionError: division by zero\n")
    command = "run `python notebooks/build.py notebooks/99_tiny.py`"
    stale = "99_tiny.ipynb is stale: in its source cell 4, 'import warnings' is another"
    assert main("--check") == (1, f"99_tiny: {stale}; {command}\n")
    assert built.read_bytes() == before and len(complaints_about_built(source)) == 1
    change(built, 'raise NotImplementedError(\\"your answer\\")', "return 2 * x")
    assert main() == (1, "99_tiny: 99_tiny.ipynb holds answers, which would be lost; move it away first\n")
    with pytest.raises(SystemExit):
        main("98")
