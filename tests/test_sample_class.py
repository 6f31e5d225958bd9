"""The sample class: it is written as a platform hands it out, and its students have the marks that TEACHING.md tells of."""

import csv
import importlib
import subprocess
import sys

import pytest

pytest.importorskip("jupytext", reason="the notebooks need jupytext: pip install -e '.[notebooks]'")

from test_notebooks import NOTEBOOKS, build, grading

sample_class = importlib.import_module("sample_class")  # notebooks/ is on the path by now

NAMES = [name for name, *_ in sample_class.CLASS]


@pytest.mark.parametrize("form", [[], ["--canvas"]], ids=["moodle", "canvas"])
def test_eight_students_with_their_files(tmp_path, form, capsys):
    folder = tmp_path / "sample class"
    assert sample_class.main([str(folder), *form]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in NAMES) and f"--answers '{folder}'" in said
    sets = grading.collect(folder, {"05", "07", "my"})
    assert sorted(who.id for who in sets) == [str(number) for _, number, *_ in sample_class.CLASS]
    assert sorted(map(len, sets.values())) == [2, 2, 2, 2, 3, 3, 3, 3]
    with pytest.raises(SystemExit):
        sample_class.main([str(folder)])
    assert "name a new folder" in capsys.readouterr().err


def test_two_students_are_graded(tmp_path):
    folder = tmp_path / "class"
    sample_class.main([str(folder)])
    command = [sys.executable, "-m", "pytest", str(NOTEBOOKS), "-p", "no:cacheprovider", "--answers", str(folder)]
    command += ["-k", "(Amara or Farid) and (my-1 or my-2)", "--seed", "7", "--table", str(tmp_path / "marks.csv")]
    done = subprocess.run(command, cwd=NOTEBOOKS.parent, capture_output=True, text=True, timeout=600)
    with open(tmp_path / "marks.csv", newline="", encoding="utf-8-sig") as file:
        head, amara, farid = csv.reader(file)
    assert head == ["student", "id", "my-1", "my-2", "points", "of", "reasons"], done.stdout
    assert amara == ["Amara Okafor", "4101", "7", "6", "13", "13", ""], amara
    assert farid[:2] == ["Farid Haddad", "4106"] and int(farid[4]) < 13
    assert "it calls tinylora's quantize, which is what is to be built here" in farid[-1]


def test_the_guide_shows_these_students():
    rows = [line.split(" | ") for line in (NOTEBOOKS / "TEACHING.md").read_text(encoding="utf-8").splitlines()]
    shown = [(row[0].removeprefix("| "), int(row[1])) for row in rows if len(row) > 10 and row[1].isdecimal()]
    assert shown == [(name, number) for name, number, *_ in sample_class.CLASS]
    for row in (row for row in rows if len(row) > 10 and row[1].isdecimal()):
        assert sum(map(int, row[2:12])) == int(row[12]) and row[13].startswith("45"), row


def test_a_file_for_one_day(tmp_path, rng):
    target = tmp_path / "my_qlora.py"
    assert sample_class.main([str(target), "--open", "1", "3"]) == 0
    text = target.read_text(encoding="utf-8")
    assert text.count(build.BLANK) == 6 and build.BEGIN not in text and build.END not in text
    grading.load_checks()
    parts = {k: grading.CHECKS[f"my-{k}"][0] for k in (1, 3, 4)}
    said = {k: grading.said(f"my-{k}", part, grading.own_answer(text), rng) for k, part in parts.items()}
    assert said == {1: "not answered yet (nearest)", 3: "not answered yet (new_layer)", 4: "right"}
    with pytest.raises(SystemExit):
        sample_class.main([str(target), "--open", "1"])


def test_a_line_that_is_no_longer_in_the_solution_is_named():
    with pytest.raises(ValueError, match=r"my_qlora\.py: 'no such line' stands there 0 times"):
        sample_class.steps([("no such line", "")])
    with pytest.raises(ValueError, match=r"05_building_nf4\.ipynb: 'no such line' stands in 0 exercises"):
        sample_class.notebook("05_building_nf4.ipynb", [("no such line", "")])


def test_students_do_not_get_it(tmp_path):
    for source in sorted(NOTEBOOKS.glob("05_*.py")):
        build.hand_out(source, tmp_path)
    kept = {"sample_class.py", "slides.py", "seeds.py", "build.py", "build_it.py", "TEACHING.md", "WORKED.md"}
    assert not kept & {path.name for path in tmp_path.rglob("*")}
