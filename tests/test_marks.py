"""Marks: points for parts, seeds, checks that a teacher keeps, names as platforms write them, and what is no answer of one's own."""

import csv
import importlib.util
import multiprocessing
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("jupytext", reason="the notebooks need jupytext: pip install -e '.[notebooks]'")

from scripts import loaded
from test_notebooks import CHECKS, NOTEBOOKS, TINY, build, grading, linux, source  # noqa: F401 (source is a fixture)

PARTS = """
@check("99-3", "positive numbers", points=2)
def _(answer, rng):
    x = rng.uniform(1, 2)
    assert np.isclose(answer(x), np.sqrt(x)), f"The root of {x:.4f} should be {np.sqrt(x):.4f}."


@check("99-3", "zero")
def _(answer, rng):
    assert answer(0.0) == 0, "The root of 0 should be 0."


@check("99-3", "by oneself", without="quantize")
def _(answer, rng):
    assert answer(1.0) == 1
"""
ROOT = """

# %% tags=["exercise"]
def exercise_3(x):
    return BODY
"""


def answered(body, before=""):
    """Notebook 99 with an exercise 3 that returns this."""
    return TINY + ROOT.replace("def exercise_3", f"{before}def exercise_3").replace("BODY", body)


@pytest.fixture
def third(source):  # noqa: F811
    """The folder of notebook 99 with an exercise 3 in three parts."""
    path = source.parent / "checks" / "nb99.py"
    path.write_text(CHECKS + PARTS)
    exec(compile(PARTS, path, "exec"), {"check": grading.check, "np": np})
    return source.parent


def run(folder, *arguments):
    """pytest on the notebooks in a folder; (what it printed, the rows of marks.csv)."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "notebooks",
        "-p",
        "no:cacheprovider",
        "-rA",
        "--table",
        "marks.csv",
        *arguments,
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    table = folder / "marks.csv"
    if not table.exists():
        return done.stdout + done.stderr, []
    with open(table, newline="", encoding="utf-8-sig") as file:
        return done.stdout + done.stderr, list(csv.reader(file))


def hand_in(folder, answers):
    """Write {name: text}, files below a folder."""
    for name, text in answers.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_an_answer_has_the_points_of_the_parts_that_are_right(third, rng, capsys):
    for body, points, sentences in (
        ("float(x) ** 0.5", 4, ["exercise 99-3: right"]),
        (
            "np.sqrt(x + 1e-300) + (x == 0)",
            3,
            ["3 of 4 points", "2 of 2  positive numbers", "0 of 1  zero: not right: The root of 0"],
        ),
        ("7", 0, ["0 of 4 points", "should be", "by oneself: not right: `"]),
        (
            "__import__('tinylora').quantize(np.ones(64, 'f4')).absmax[0] * x ** 0.5",
            3,
            ["calls tinylora's quantize, which is what"],
        ),
    ):
        function = grading.answer(grading.parsed("99.py", answered(body)), 3)
        assert grading.verdict("99-3", function, rng)[:2] == (points, 4)
        grading.grade("99-3", function)
        printed = capsys.readouterr().out
        assert all(sentence in printed for sentence in sentences), printed


@linux
def test_a_part_in_which_an_answer_dies_costs_that_part(third, tmp_path):
    deaths = {
        "os": "x ** 0.5 if x else __import__('os')._exit(0)",
        "loop": "x ** 0.5 if x else exec('while True: pass')",
    }
    hand_in(
        tmp_path / "class",
        {f"{who}/99.py": answered(body) for who, body in deaths.items()} | {"sound/99.py": answered("x ** 0.5")},
    )
    out, rows = run(tmp_path, "--answers", "class", "--limit", "2", "-k", "99-3")
    assert rows[0] == ["student", "id", "99-3", "points", "of", "reasons"]
    assert [row[:5] for row in rows[1:]] == [
        ["loop", "", "3", "3", "4"],
        ["os", "", "3", "3", "4"],
        ["sound", "", "4", "4", "4"],
    ], out
    assert rows[1][5] == "99-3: not right: 3 of 4 points; zero: it takes more than 2 seconds"
    assert rows[2][5] == "99-3: not right: 3 of 4 points; zero: it ended Python (os._exit or a signal)"


def test_a_seed_replays_a_run(third, tmp_path):
    hand_in(tmp_path / "class", {"one/99.py": answered("x"), "two/99.py": answered("x")})
    out, first = run(tmp_path, "--answers", "class", "-k", "99-3")
    assert run(tmp_path, "--answers", "class", "-k", "99-3")[1] != first, "without a seed the inputs are drawn anew"
    assert first[1][1:] == first[2][1:], "two students have the same inputs"
    seed = out.split("--seed ")[1].split()[0]
    assert run(tmp_path, "--answers", "class", "-k", "99-3", "--seed", seed)[1] == first
    assert run(tmp_path, "--answers", "class", "-k", "99-3", "--seed", "7")[1] != first
    assert "argument --seed" in run(tmp_path, "--answers", "class", "--seed", "x")[0]


def test_checks_that_the_teacher_keeps(third, tmp_path):
    hand_in(
        tmp_path / "class", {"one/99.py": answered("x ** 0.5"), "two/99.py": answered("x ** 0.5 if x < 3 else 1.5")}
    )
    kept = 'from grading import check\n\n\n@check("99-3", "large numbers", points=3)\ndef _(answer, rng):\n'
    hand_in(tmp_path, {"kept/mine.py": kept + '    assert answer(9.0) == 3, "The root of 9 should be 3."\n'})
    _, rows = run(tmp_path, "--answers", "class", "-k", "99-3", "--hidden", "kept")
    assert [row[2:5] for row in rows[1:]] == [["7", "7", "7"], ["4", "4", "7"]]
    assert rows[2][5] == "99-3: not right: 4 of 7 points; hidden: large numbers: The root of 9 should be 3."
    (tmp_path / "kept" / "mine.py").write_text(
        'from grading import check\n@check("99-3")\ndef _(answer, rng):\n    assert answer(1.0) == 1\n'
    )
    assert "hidden" not in str(run(tmp_path, "--answers", "class", "-k", "99-3", "--hidden", "kept")[1])
    for text, sentence in (
        ("1 / 0", "cannot be loaded: ZeroDivisionError"),
        ('from grading import check\ncheck("98-1")(len)', "has a check of exercise 98-1, which does not exist"),
    ):
        (tmp_path / "kept" / "mine.py").write_text(text)
        assert sentence in run(tmp_path, "--answers", "class", "--hidden", "kept")[0]
    assert "holds no .py file" in run(tmp_path, "--answers", "class", "--hidden", "class")[0]


@pytest.mark.parametrize(
    "names, found",
    [
        (["ada/99_mine.py", "bo/99.py"], {("ada", ""): "99_mine.py", ("bo", ""): "99.py"}),
        (["99_ada.py", "99_bo.py"], {("ada", ""): "99_ada.py", ("bo", ""): "99_bo.py"}),
        (  # Canvas: name, LATE, user, submission, the file; -1 is the second attempt
            ["lovelaceada_4217_99_99_tiny.py", "lovelaceada_4217_120_99_tiny-1.py", "bobo_LATE_7_98_99_tiny.py"],
            {("lovelaceada", "4217"): "lovelaceada_4217_120_99_tiny-1.py", ("bobo", "7"): "bobo_LATE_7_98_99_tiny.py"},
        ),
        (  # Moodle, in folders, and without them
            ["Ada Lovelace_4217_assignsubmission_file_/99_tiny.py", "Bo O'Neil_7_assignsubmission_file_/99.py"],
            {("Ada Lovelace", "4217"): "99_tiny.py", ("Bo O'Neil", "7"): "99.py"},
        ),
        (
            ["Ada Lovelace_4217_assignsubmission_file_99_tiny.py", "Bo O'Neil_7_assignsubmission_file_99.py"],
            {
                ("Ada Lovelace", "4217"): "Ada Lovelace_4217_assignsubmission_file_99_tiny.py",
                ("Bo O'Neil", "7"): "Bo O'Neil_7_assignsubmission_file_99.py",
            },
        ),
        (  # two of one name are two
            ["Jo Li_1_assignsubmission_file_/99.py", "Jo Li_2_assignsubmission_file_/99.py"],
            {("Jo Li", "1"): "99.py", ("Jo Li (2)", "2"): "99.py"},
        ),
        (
            ["liwei_1_10_99_a.py", "liwei_2_11_99_b.py"],
            {("liwei", "1"): "liwei_1_10_99_a.py", ("liwei (2)", "2"): "liwei_2_11_99_b.py"},
        ),
        (  # an online text beside the files, and a name with an underscore
            ["Jo_B_1_assignsubmission_file_/99.py", "Jo_B_1_assignsubmission_onlinetext_/text.html"],
            {("Jo_B", "1"): "99.py"},
        ),
        (["99_2024_1_ada.py", "99_bo.py"], {("2024_1_ada", ""): "99_2024_1_ada.py", ("bo", ""): "99_bo.py"}),
    ],
)
def test_names_as_platforms_and_folders_give_them(tmp_path, names, found):
    hand_in(tmp_path, dict.fromkeys(names, TINY))
    sets = grading.collect(tmp_path, {"99"})
    assert {(str(who), who.id): files["99"].name for who, files in sets.items()} == found


def test_several_notebooks_of_one_student_are_one_row(tmp_path):
    hand_in(tmp_path, dict.fromkeys(["98_ada.py", "99_ada.py", "99_bo.py", "my_qlora_bo.py", "my_qlora_ada.py"], ""))
    sets = grading.collect(tmp_path, {"98", "99", "my"})
    assert {who: sorted(files) for who, files in sets.items()} == {"ada": ["98", "99", "my"], "bo": ["99", "my"]}
    canvas = tmp_path / "canvas"
    hand_in(
        canvas,
        dict.fromkeys(["ada_1_10_98_x.py", "ada_1_11_my_qlora.py", "bo_2_12_my_qlora-2.py", "bo_2_11_my_qlora.py"], ""),
    )
    sets = grading.collect(canvas, {"98", "99", "my"})
    assert {who: {n: f.name for n, f in files.items()} for who, files in sets.items()} == {
        "ada": {"98": "ada_1_10_98_x.py", "my": "ada_1_11_my_qlora.py"},
        "bo": {"my": "bo_2_12_my_qlora-2.py"},
    }


@linux
def test_a_student_with_two_files_of_one_number_has_one_row(third, tmp_path):
    hand_in(
        tmp_path / "class" / "Jo_1_assignsubmission_file_",
        {"99_a.py": answered("7"), "99_a (1).py": answered("x ** 0.5")},
    )
    os.utime(tmp_path / "class" / "Jo_1_assignsubmission_file_" / "99_a.py", (1, 1))
    out, rows = run(tmp_path, "--answers", "class", "-k", "99-3")
    assert rows[1:] == [["Jo", "1", "4", "4", "4", "not graded, since there is a newer file: 99_a.py"]], out


def test_only_a_py_file_is_the_file_of_the_steps(tmp_path):
    hand_in(tmp_path, {"ada/my_qlora.py": "", "ada/my_qlora.ipynb": "{}", "bo/my_qlora.ipynb": "{}"})
    assert grading.collect(tmp_path, {"my"}) == {"ada": {"my": tmp_path / "ada" / "my_qlora.py"}, "bo": {}}
    (tmp_path / "ada" / "my_qlora.py").write_text("def f(): return 1", encoding="utf-8-sig")
    assert grading.own_answer(grading.text_of(tmp_path / "ada" / "my_qlora.py")).f() == 1
    (tmp_path / "ada" / "my_qlora.py").write_bytes(b"# \xe9")
    with pytest.raises(ValueError, match=r"my_qlora\.py cannot be read: it is no UTF-8 text"):
        grading.text_of(tmp_path / "ada" / "my_qlora.py")


@linux
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_the_processes_know_the_checks_however_they_start(context, monkeypatch):
    """On Windows and macOS they start afresh; here only the checker does."""
    import marking

    grading.load_checks()
    monkeypatch.setattr(marking, "CONTEXT", multiprocessing.get_context(context))
    student = marking.Student(60, 4)
    try:
        solved = build.steps((grading.HERE / "build_it.py").read_text(encoding="utf-8"), solutions=True)
        assert student.mark("my_qlora.py", solved, "my-1", 0)[:3] == (7, 7, "right")
        assert student.mark("my_qlora.py", solved.replace("np.searchsorted(", "np.searchsort("), "my-1", 0).points == 1
        assert student.mark("my_qlora.py", "", "my-1", 0).said.endswith(
            "my_qlora.py defines no function quantize; was it renamed?"
        )
    finally:
        student.close()


@pytest.mark.parametrize(
    "before, call, sentence",
    [
        (
            "",
            "__import__('sys').setprofile(None) or quantize(np.ones(64, 'f4')).absmax[0] * x ** 0.5",
            "switches off what watches",
        ),
        ("", "[quantize(np.ones(64, 'f4')) for _ in range(2)] and x ** 0.5", "it calls tinylora's quantize"),
        ("import collections\n", "collections.namedtuple('Pair', 'a b')(x, 1).a ** 0.5", "right"),
        ("import dataclasses\n@dataclasses.dataclass\nclass One:\n    a: float\n\n", "One(x).a ** 0.5", "right"),
    ],
)
def test_what_is_noticed_and_what_is_not(third, rng, before, call, sentence):
    text = answered(call, f"from __future__ import annotations\n{before}" if "dataclass" in before else before)
    text = text.replace("TWO = 2", "TWO = 2\nfrom tinylora import quantize")
    said = grading.verdict("99-3", grading.answer(grading.parsed("99.py", text), 3), rng).said
    assert sentence in said, said


def test_a_cell_of_the_table_is_no_formula():
    spec = importlib.util.spec_from_file_location("conftest_of_notebooks", grading.HERE / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (
        module._cell('a;=HYPERLINK("x")') == 'a;\'=HYPERLINK("x")'
        and module._cell("=1") == "'=1"
        and module._cell("a=1") == "a=1"
    )


BAD = {  # what item after item has been seen to take a class run with it
    "attacker": answered("2", "import grading\ngrading.CHECKS.clear()\ngrading.verdict = lambda *_: 'right'\n"),
    "infinite loop": answered("exec('while True: pass')"),
    "sys.exit": answered("__import__('sys').exit(0)"),
    "os._exit": answered("__import__('os')._exit(0)"),
    "syntax error": answered("x **"),
    "memory bomb": answered("np.ones(1 << 40)"),
    "forged marks": answered("open('marks.csv', 'w').write('student,id,99-1\\nall,,9\\n')"),
}


@linux
def test_honest_students_have_the_marks_of_a_run_without_the_others(third, tmp_path):
    honest = {"ada": "x ** 0.5", "bo": "x ** 0.5 + (x == 0)", "cy": "raise_"}
    hand_in(tmp_path / "few", {f"{who}/99.py": answered(body) for who, body in honest.items()})
    shutil.copytree(tmp_path / "few", tmp_path / "class")
    hand_in(tmp_path / "class", {f"{who}/99.py": text for who, text in BAD.items()})
    arguments = ("--limit", "2", "--memory", "1", "--seed", "3")
    few = run(tmp_path, "--answers", "few", *arguments)[1]
    out, rows = run(tmp_path, "--answers", "class", *arguments)
    assert [row for row in rows if row[0] in ("student", *honest)] == few, out
    assert {row[0]: row[4] for row in rows if row[0] in BAD} == dict.fromkeys(BAD, "0"), out
    assert [row[5] for row in few[1:]] == ["6", "5", "2"]


def test_a_call_of_the_checks_is_noticed(third, rng):
    body = "__import__('sys').modules['checks.nb99'].half(x)"
    path = grading.HERE / "checks" / "nb99.py"
    module = type(sys)("checks.nb99")
    exec(compile("def half(x):\n    return x ** 0.5\n", path, "exec"), module.__dict__)
    sys.modules["checks.nb99"] = module
    try:
        found = grading.verdict("99-3", grading.answer(grading.parsed("99.py", answered(body)), 3), rng)
    finally:
        del sys.modules["checks.nb99"]
    assert found.points == 0 and "it calls half of the checks, which knows the answer" in found.said


def test_the_file_of_the_steps_imports_numpy_and_no_library_that_has_the_answer():
    for text in (
        "import tinylora",
        "from tinylora.quant import quantize",
        "def f():\n    import bitsandbytes as b",
        "from . import x",
    ):
        with pytest.raises(
            ValueError, match=r"my_qlora\.py imports .* in line \d, and what it does is to be built here"
        ):
            grading.own_answer(text)
    names = grading.own_answer("import numpy as np\nfrom math import sqrt\n\n\ndef root(x):\n    return sqrt(x)\n")
    assert names.root(4) == 2
    with pytest.raises(grading.Raised, match="defines no function other"):
        names.other(4)
    with pytest.raises(ValueError, match=r"my_qlora\.py does not compile: .*line 1"):
        grading.own_answer("def f(:")
    assert build.steps("a\n    # BEGIN SOLUTION\n    b\n    # END SOLUTION\n", True) == "a\n    b\n"
    assert build.steps("a\n    # BEGIN SOLUTION\n    b\n    # END SOLUTION\n") == f"a\n    {build.BLANK}\n"


def test_what_is_no_answer_is_named(tmp_path):
    """A student of whom nothing can be graded has a row, and the table says what was passed over."""
    canvas = tmp_path / "canvas"
    canvas.mkdir()
    for name in (
        "wangxiaoming_4300_90017_report.pdf",
        "moreaulea_LATE_4301_90018_course.zip",
        "kimjo_4302_90019_nf4.ipynb",
        "smithjohn_4303_90020_my_qlora.py",
        "smithjohn_4303_90021_notes.txt",
        "smithjohn_4303_90022_grading.py",
        "list_of_students.txt",
        "marks_2026_11_27.csv",
        "week_2_1_notes.md",
    ):
        (canvas / name).write_text("{}")
    found = grading.collect(canvas, {"my"})
    assert {(who, who.id): sorted(files) for who, files in found.items()} == {
        ("wangxiaoming", "4300"): [],
        ("moreaulea", "4301"): [],
        ("kimjo", "4302"): [],
        ("smithjohn", "4303"): ["my"],
    }
    notes = {who.id: who.note for who in found}
    called = "(an answer is called as 05_mine.ipynb or my_qlora.py is)"
    assert notes["4301"] == f"not graded: course.zip {called}" and notes["4303"] == f"not graded: notes.txt {called}"

    one = canvas / "smithjohn_4303_90020_my_qlora.py"
    assert list(grading.collect(one, {"my"}).values()) == [{"my": one}]

    moodle = tmp_path / "moodle"
    for name in ("Zoë Müller_1_assignsubmission_file_", "林 美玲_2_assignsubmission_file_"):
        (moodle / name).mkdir(parents=True)
    (moodle / "Zoë Müller_1_assignsubmission_file_" / "My_QLoRA.py").write_text("")
    (moodle / "林 美玲_2_assignsubmission_file_" / "course").mkdir()
    (moodle / "林 美玲_2_assignsubmission_file_" / "my_qlora.py").write_text("")
    found = grading.collect(moodle, {"my"})
    assert [(who, who.note) for who in found] == [
        ("Zoë Müller", f"not graded: My_QLoRA.py {called}"),
        ("林 美玲", f"not graded: course/ {called}"),
    ]
    graded = loaded(NOTEBOOKS / "test_exercises.py")
    assert graded.picked(found, "mu\u0308ller") == {"Zoë Müller": {}} and list(graded.picked(found, "2")) == ["林 美玲"]
    assert list(graded.picked(found, None)) == list(found)
    with pytest.raises(
        ValueError,
        match=r"--student Ada is in no student's name, and no student's id; there are Zoë Müller \(1\), 林 美玲 \(2\)",
    ):
        graded.picked(found, "Ada")


@pytest.mark.parametrize(
    "text, said", [(" \n", "05_x.ipynb is empty"), ("{", "05_x.ipynb is not a notebook, or a damaged one: ")]
)
def test_a_damaged_notebook_is_said_to_be_one(tmp_path, text, said):
    (tmp_path / "05_x.ipynb").write_text(text)
    with pytest.raises(ValueError, match=said):
        grading.read(tmp_path / "05_x.ipynb")
