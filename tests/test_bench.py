"""tests/bench: the order of turns, medians within rounds, names of rows, what is skipped, and a short run. No time is asserted."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from bench import command, contestants, measure, report, rows, worker
from bench.measure import Measured
from bench.rows import Case, Line, ours, theirs

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_spawn"), reason="workers are given a pipe by its number")


# --------------------------------------------------------------------------------------------------------------------- numbers
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_everybody_has_one_turn_a_round_and_the_order_changes(n):
    orders = [measure.turns(n, i) for i in range(2 * n)]
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert {order[0] for order in orders} == set(range(n)), "each begins at times"
    if n > 1:
        followed = {pair for order in orders for pair in itertools.pairwise(order)}
        assert {(a, b) for a, b in followed} == {(b, a) for a, b in followed}, (
            "whoever ran before another runs after it as well"
        )


def test_a_ratio_is_taken_within_its_round():
    """The second round was twice as slow for both: the ratio does not see it."""
    line = Line("a", "b")
    found = [Measured("a", "here", 1, [1.0, 2.0, 1.2]), Measured("b", None, 1, [2.0, 4.0, 2.0])]
    assert measure.number(line, found, "here") == (0.5, 0.5, 0.55)
    assert Line("a", kind="ns a weight", per=1e9).value(2.0) == 2 and Line("a", kind="µs").value(2e-6) == 2
    assert measure.quartiles([3.0]) == (3.0, 3.0, 3.0) and measure.quartiles([1, 2, 3, 4, 5]) == (2, 3, 4)


def test_a_checkout_is_compared_with_its_own_and_with_the_first():
    found = [Measured("paged", "here", 1, [2.0]), Measured("paged", "old", 1, [6.0]), Measured("unpaged", "here", 1, [1.0]),
             Measured("unpaged", "old", 1, [4.0])]  # fmt: skip
    line = Line("paged", "unpaged")
    assert measure.number(line, found, "here")[1] == 2 and measure.number(line, found, "old")[1] == 1.5
    assert measure.beside(line, found, "here", "old")[1] == pytest.approx(1 / 3)
    found[1].skipped = "not there (AttributeError: no)"
    assert measure.number(line, found, "old") is None and measure.beside(line, found, "here", "old") is None
    assert measure.missing(line, found, "old") == "not there" and measure.missing(line, found, "here") == ""


def test_targets_hold_for_their_number_of_threads():
    line = Line("a", "b", {2: 0.9}, {2: 0.8})
    said = [measure.reached(line, 2, (0, x, 9)) for x in (0.7, 0.8, 0.85, 0.9, 0.95)]
    assert said == ["aim", "aim", "must", "must", "no"]
    assert measure.reached(line, 1, (0, 0.7, 9)) == "" and measure.reached(line, 2, None) == ""
    more = Line("a", "b", {2: 1.8}, {2: 1.9}, more=True)
    assert [measure.reached(more, 2, (0, x, 9)) for x in (1.7, 1.8, 1.95)] == ["no", "must", "aim"]


def test_a_burst_is_about_as_long_whatever_is_measured():
    assert [measure.repetitions(s, 0.5) for s in (0.1, 2.0, 0.2, 1e-6, 0.0)] == [5, 1, 2, measure.MOST, measure.MOST]


def test_numbers_have_three_digits_and_a_unit():
    assert [measure.three(x) for x in (0.0981, 1.234, 12.34, 1234.5, 0)] == ["0.0981", "1.23", "12.3", "1,234", "0"]
    assert (
        report.times([0.011, 0.0123, 0.02]) == "12.3 ms (11.0–20.0)"
        and report.times([2e-6] * 3) == "2.00 µs (2.00–2.00)"
    )


def test_a_noisy_machine_is_said_on_the_page():
    assert not report.noisy([{"others": None}, {"others": 0.05}]) and report.noisy([{"others": 0.0}, {"others": 0.2}])
    data = {"command": "c", "about": {}, "versions": ["here"], "rows": [], "noisy": True}
    assert "no number here is to be quoted" in report.page(data)
    assert "to be quoted" not in report.page({**data, "noisy": False})


# ------------------------------------------------------------------------------------------------------------------------ rows
def test_names_of_rows(capsys):
    assert rows.chosen([]) == [name for name in rows.ROWS if name != "growth"]
    assert rows.chosen(["op", "quantize", "op"]) == ["quantize", "op"], "each once, in the table's order"
    with pytest.raises(ValueError, match="no row 'opp'; the rows are quantize, dequantize"):
        rows.chosen(["opp"])
    assert command.main(["--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == list(rows.ROWS) and all(len(line.split()) > 8 for line in listed)


@pytest.mark.parametrize("short", [True, False])
@pytest.mark.parametrize("name", rows.ROWS)
def test_every_row_is_sound(name, short):
    """Lines name contestants of their case, each function exists and takes what it is given, and bounds are those of real sizes."""
    for case in rows.ROWS[name](short):
        names = [c.name for c in case.contestants]
        assert len(set(names)) == len(names)
        for line in case.lines:
            assert {line.of, line.against or line.of} <= set(names)
            assert any(c.ours for c in case.contestants if c.name == line.of)
            better = (lambda a, b: a >= b) if line.more else (lambda a, b: a <= b)
            assert all(better(line.aim[t], line.must[t]) for t in line.must if line.must[t])
        for c in case.contestants:
            code = getattr(contestants, c.does).__code__
            takes = set(code.co_varnames[: code.co_argcount])
            assert set(c.given) <= takes or c.does == "torch_adamw"
            json.dumps(c.given)


def test_a_contestant_with_more_threads_than_its_case_is_left_out_and_each_checkout_has_its_own():
    case = Case("x", (ours("f"), ours("f", "two", threads=2), theirs("peer", "g")), ())
    versions = {"here": Path("a"), "old": Path("b")}

    def names(threads):
        return [(c.name, v) for c, v in measure.entries(case, threads, versions)]

    assert names(1) == [("tinylora", "here"), ("tinylora", "old"), ("peer", None)]
    assert names(2) == [("tinylora", "here"), ("tinylora", "old"), ("two", "here"), ("two", "old"), ("peer", None)]


def test_the_environment_of_a_worker():
    env = measure.environment(2, Path("clone"))
    assert env["OMP_NUM_THREADS"] == env["OPENBLAS_NUM_THREADS"] == env["MKL_NUM_THREADS"] == "2"
    assert env["PYTHONPATH"].split(os.pathsep) == ["clone", str(rows.ROOT / "tests")]
    assert str(rows.ROOT) not in measure.environment(1)["PYTHONPATH"].split(os.pathsep), "a peer sees no checkout"


# ------------------------------------------------------------------------------------------------------------------- processes
def test_what_is_not_there_is_said_and_the_others_run():
    """An uninstalled library, a function that a checkout lacks, a failure while setting up, and one process that runs."""
    case = Case(
        "x",
        (
            ours("whole_process", "runs", code="pass"),
            ours("tinylora_generate", "no option", tokens=1, more={"no_such": True}),
            theirs("no library", "copy", "no_such_library", n=4),
            theirs("fails", "copy", n="four"),
            theirs("ends", "whole_process", code="import sys; sys.exit(3)"),
        ),
        (Line("runs", "no library"),),
    )
    found, _ = measure.measure(case, 1, {"here": rows.ROOT}, rounds=2, short=True)
    said = {m.name: m.skipped for m in found}
    assert said["runs"] is None and len(found[0].rounds) == 2
    assert said["no option"].startswith("not there (AttributeError: generate has no option no_such")
    assert said["no library"] == "left out in a short run"
    assert said["fails"].startswith("failed: TypeError") and said["ends"].startswith("failed: CalledProcessError")
    entry = report.entry("row", case, 1, found, None, ["here"])
    assert "| left out in a short run |" in report.lines(entry, ["here"])[0]
    assert "- no option, here: not there (AttributeError" in "\n".join(report.not_run([entry]))
    with pytest.raises(worker.Missing, match="no_such_library is not installed"):
        worker.Host().setup("copy", {"n": 4}, ["no_such_library"], None)


def test_a_checkout_is_measured_and_not_what_is_installed(tmp_path, capsys):
    clone = tmp_path / "tinylora"
    clone.mkdir()
    (clone / "__init__.py").write_text("quantize = lambda w, *a, **o: None\n")
    case = Case("x", (ours("tinylora_quantize", shape=[4, 4]), ours("tinylora_adamw", "adamw", n=4, tensors=1)), ())
    found, _ = measure.measure(case, 1, {"old": tmp_path}, rounds=1, short=True)
    assert found[0].skipped is None, "the stand-in's own function ran"
    assert found[1].skipped.startswith("not there (ImportError: cannot import name 'P")
    assert command.checkout(f"old={tmp_path}") == ("old", tmp_path.resolve())
    for wrong, why in {
        "old": "expected NAME=PATH",
        "here=.": "not 'here'",
        f"x={clone}": "no clone of tinylora",
    }.items():
        with pytest.raises(SystemExit):
            command.main(["op", "--tinylora", wrong])
        assert why in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["op", "--tinylora", f"a={tmp_path}", "--tinylora", f"a={tmp_path}"])
    assert "two checkouts have one name" in capsys.readouterr().err


def test_a_process_that_ends_is_said():
    process = measure.Process(1)
    process.child.terminate()
    process.tell(run=1)
    with pytest.raises(measure.Gone, match=r"the process ended \(status -15\)"):
        process.answer()
    process.close()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc here")
def test_what_a_contestant_starts_is_counted_as_its_own():
    """Else a row that measures whole processes calls them other work."""
    before = measure._cpu_of(os.getpid())
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.3: pass"], check=True)
    assert measure._cpu_of(os.getpid()) - before > 0.25


# ------------------------------------------------------------------------------------------------------------------ the command
def test_a_short_run_writes_its_files(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    names = ["dequantize", "growth"]
    assert command.main([*names, "--short", "--tinylora", f"again={rows.ROOT}", "--out", str(tmp_path)]) == 0
    table = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert table[0] == ["| row", "threads", "what", "must", "aim", "here", "reached", "again", "here over again |"]
    assert ["| dequantize, tiny", "1", "tinylora over copy", "–", "–"] in [row[:5] for row in table], (
        "no target at a tiny size"
    )
    for name in ("bench", "growth"):
        data = json.loads((tmp_path / "data" / f"{name}.json").read_text(encoding="utf-8"))
        assert (
            data["versions"] == ["here", "again"]
            and data["command"] == f"python -m tests.bench {' '.join(names)} --short --tinylora again=…"
        )
        assert {"date", "CPU", "vectors", "numpy", "kernels", "tinylora, here", "tinylora, again"} <= set(data["about"])
        assert (tmp_path / f"{name}.svg").stat().st_size > 1000
        page = (tmp_path / f"{name}.md").read_text(encoding="utf-8")
        assert (
            data["about"]["CPU"] in page
            and str(Path(sys.prefix)) not in page
            and str(rows.ROOT) not in json.dumps(data)
        )
    page = (tmp_path / "bench.md").read_text(encoding="utf-8")
    assert "## Times" in page and "bitsandbytes' kernel: left out in a short run. (dequantize, tiny)" in page


has_avx2 = pytest.mark.skipif(not measure.avx2(), reason="this processor has no AVX2")


@has_avx2
def test_a_run_that_is_held_to_avx2_has_files_of_its_own_and_says_by_what(tmp_path, monkeypatch):
    pytest.importorskip("threadpoolctl")
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Nehalem")
    assert command.main(["dequantize", "--short", "--avx2", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.rglob("*.*")} == {"bench-avx2.md", "bench-avx2.json"}
    assert "# Speed on a CPU, held to AVX2\n" in (tmp_path / "bench-avx2.md").read_text(encoding="utf-8")
    data = json.loads((tmp_path / "data" / "bench-avx2.json").read_text(encoding="utf-8"))
    assert data["command"] == "python -m tests.bench dequantize --avx2 --short"
    about = data["about"]
    assert "OPENBLAS_CORETYPE=Haswell, NPY_DISABLE_CPU_FEATURES=" in about["held to AVX2"]
    assert "OPENBLAS_CORETYPE" not in about and "openblas" in about["kernels"]
    assert all("Haswell" in kernel for kernel in about["kernels"].split("; ") if "openblas" in kernel)


@has_avx2
@pytest.mark.parametrize("name", ["NPY_DISABLE_CPU_FEATURES", "NPY_ENABLE_CPU_FEATURES"])
def test_numpy_does_without_what_lies_beyond_avx2(name, monkeypatch):
    """Whatever the variables said before."""
    monkeypatch.setenv(name, "AVX512_ICL")
    code = """if True:
        from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__
        assert __cpu_features__["AVX2"]
        print([n for n in __cpu_dispatch__ if n.startswith(("AVX512", "X86_V4")) and __cpu_features__[n]])"""
    environment = measure.environment(1, variables=measure.avx2())
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"


def test_without_avx2_nothing_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(command, "avx2", dict)
    with pytest.raises(SystemExit):
        command.main(["dequantize", "--short", "--avx2"])
    assert "--avx2: NumPy finds no AVX2 on this processor" in capsys.readouterr().err


def test_a_run_of_some_rows_writes_nothing_unless_it_is_asked_to(capsys):
    before = {path: path.stat().st_mtime_ns for path in (rows.ROOT / "figures").rglob("*")}
    assert command.main(["import", "--short"]) == 0
    assert {path: path.stat().st_mtime_ns for path in (rows.ROOT / "figures").rglob("*")} == before
    assert "written" not in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------------ what was found
def found(name="bench"):
    """{(row, case, threads, line): its numbers} of a file in figures/data."""
    data = json.loads((rows.ROOT / "figures" / "data" / f"{name}.json").read_text(encoding="utf-8"))
    assert not data["noisy"], "the committed numbers are those of a quiet machine"
    return {
        (row["row"], row["case"], row["threads"], line["name"]): line for row in data["rows"] for line in row["lines"]
    }


@pytest.mark.parametrize("name", ["bench", "bench-avx2", "growth"])
def test_the_pages_are_those_of_their_numbers(name):
    text = (rows.ROOT / "figures" / "data" / f"{name}.json").read_text(encoding="utf-8")
    data = json.loads(text)
    page = report.growth_page if name == "growth" else report.page
    assert page(data) == (rows.ROOT / "figures" / f"{name}.md").read_text(encoding="utf-8")
    assert report.as_json(data) == text and "with changes" not in str(data["about"])


def test_the_sentences_on_speed_are_rows_of_the_table():
    median, three = {key: line["values"]["here"][1] for key, line in found().items()}, measure.three
    step = three(median["llama-qlora", "base", 2, "tinylora over bitsandbytes + PEFT"])
    quantized = three(median["quantize", "64M", 2, "tinylora over bitsandbytes"])
    said = f"takes {step} of the time of bitsandbytes and PEFT, and quantizing to NF4 {quantized} of bitsandbytes'"
    assert said in " ".join((rows.ROOT / "README.md").read_text(encoding="utf-8").split())
    chinese = (rows.ROOT / "docs" / "zh" / "README.md").read_text(encoding="utf-8")
    assert step in chinese and quantized in chinese
    text = (rows.ROOT / "figures" / "README.md").read_text(encoding="utf-8")
    text = text.split("## On a CPU\n")[1].split("## On a GPU\n")[0]
    pages = "".join(
        (rows.ROOT / "figures" / f"{name}.md").read_text(encoding="utf-8") for name in ("bench", "bench-avx2", "growth")
    )
    numbers = re.findall(r"\d+\.\d+", text)
    assert len(numbers) > 20 and not set(numbers) - set(re.findall(r"\d+\.\d+", pages))


def test_the_targets_are_counted_as_the_tables_have_them():
    wide, narrow = ({key: line["reached"] != "no" for key, line in found(name).items() if line["reached"]}
                    for name in ("bench", "bench-avx2"))  # fmt: skip
    text = " ".join((rows.ROOT / "figures" / "README.md").read_text(encoding="utf-8").split())
    n, some = len(wide), sum(wide[key] or narrow[key] for key in wide)
    assert wide.keys() == narrow.keys()
    said = f"Of the {n} targets, {sum(wide.values())} are reached with AVX-512, and {sum(narrow.values())} with AVX2."
    assert f"{said} They are not the same ones: {some} are reached in one of the two tables at least." in text
    assert {key[0] for key in wide if not (wide[key] or narrow[key])} == {"paged-adamw"}
    readme = (rows.ROOT / "README.md").read_text(encoding="utf-8")
    missed = f"{n - sum(wide.values())} are not reached with AVX-512, and {n - sum(narrow.values())} with AVX2"
    assert f"Of the {n} targets set for it, {missed}" in readme
    assert f"Of the {n} targets, {sum(wide.values())} are reached." in (rows.ROOT / "docs" / "gallery.md").read_text(
        encoding="utf-8"
    )
