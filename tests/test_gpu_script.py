"""tests/gpu.py without a GPU: its sections in small on the stand-in for CuPy, and the table that it writes."""

import contextlib
import gc
import importlib.util
import json
import subprocess
import sys
import time

import cuda_on_host
import fake_cupy
import gpu
import numpy as np
import pytest

needs_compiler = pytest.mark.skipif(not cuda_on_host.available(), reason="needs Linux and g++")


class Small(gpu.Machine):
    """The stand-in as a machine: what is CuPy's alone in gpu.Machine, done otherwise."""

    def __init__(self):
        self.xp, self.torch, self._block = fake_cupy, None, None

    def synchronize(self):
        fake_cupy.cuda.get_current_stream().synchronize()

    def time(self, f, n=20, warm=3):
        start = time.perf_counter()
        f()
        ms = 1e3 * (time.perf_counter() - start)
        return gpu.Timing(ms, ms)

    def copy(self, to, source):
        to[...] = source

    def free(self):
        gc.collect()

    @contextlib.contextmanager
    def limit(self, more):
        gc.collect()
        fake_cupy.memory["limit"] = fake_cupy.memory["used"] + more
        try:
            yield
        finally:
            fake_cupy.memory["limit"] = None

    def held_bytes(self):
        return fake_cupy.memory["used"]


SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}
TINY = {
    "one": ({**SIZES, "tie_word_embeddings": True}, 2, 16, ("float32", "bfloat16")),
    "1.1B": ({**SIZES, "tie_word_embeddings": False}, 2, 16, ("bfloat16",)),
}
ARGUMENTS = {
    "exact": {"cases": 60, "mantissas": 4096},
    "codes": {"shape": (64, 512)},
    "linear": {"size": 64, "rows": 32, "r": 4},
    "step": {"shapes": TINY, "n": 2},
    "stops": {},
    "paging": {"n": 1 << 16, "page_bytes": 1 << 13, "copied": 1 << 12},
}


@pytest.fixture
def machine(request):
    fake_cupy.compile_kernels(True)
    request.addfinalizer(lambda: fake_cupy.compile_kernels(False))
    return Small()


@needs_compiler
@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_section_runs_on_the_stand_in(name, machine, tmp_path, capsys):
    report = gpu.Report(tmp_path, {"card": "none"})
    status = gpu.run(machine, report, [name], arguments=ARGUMENTS)
    (s,) = report.sections
    assert s.failed is None, capsys.readouterr().err
    assert s.rows and [c for c in s.checks if not c["held"]] == [] and status == 0
    written = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert written["sections"][0]["rows"] == s.rows and written["sections"][0]["checks"] == s.checks
    text = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert text.count("| " + " | ".join(s.columns) + " |") == 1 and text.count("- Held: ") == len(s.checks)
    widths = {line.count("|") for line in text.split("## ")[1].splitlines() if line.startswith("|")}
    assert widths == {len(s.columns) + 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json", "gpu.md"]


@needs_compiler
def test_the_sections_measure_what_they_say(machine, tmp_path):
    report = gpu.Report(tmp_path, {})
    gpu.run(machine, report, ["exact", "paging", "step"], arguments=ARGUMENTS)
    exact, step, paging = report.sections
    cases = {row[0]: row[1:] for row in exact.rows}
    assert cases["packed and absmax"][:2] == [60, 60] and 0 < cases["packed and absmax"][2] < 60
    assert cases["dequantized bfloat16"][2] > 0 and "NaN to NaN" in exact.checks[0]["what"]
    assert any(gpu.NOT_INSTALLED in note for note in exact.notes)
    assert [row[-1] for row in step.rows] == [None, None, "at most 1.2 times: not compared"]
    moved = {row[0]: row[2] for row in paging.rows if "pool" in row[0]}
    assert len(moved) == 6 and min(moved.values()) > 0
    assert {row[6] for row in paging.rows if "pool" in row[0]} == {"yes"}


@needs_compiler
def test_a_wrong_bit_is_found(machine, tmp_path, monkeypatch):
    """In what a kernel packs, and in what a paged run leaves: the check fails, and the exit status says so."""
    launch = gpu.cuda.launch

    def spoiled(xp, name, n, *arguments, **options):
        launch(xp, name, n, *arguments, **options)
        if name == "quantize":
            arguments[1][0] = np.uint8(17)
        if name == "adamw8bit":
            arguments[0][0] = np.float32(time.perf_counter())

    monkeypatch.setattr(gpu.cuda, "launch", spoiled)
    report = gpu.Report(tmp_path, {})
    assert gpu.run(machine, report, ["exact", "paging"], arguments=ARGUMENTS) == 1
    failed = [c["what"] for s in report.sections for c in s.checks if not c["held"]]
    assert any("stored cases" in what for what in failed) and any("AdamW8bit, pool 'host'" in what for what in failed)
    assert "**Failed**" in (tmp_path / "gpu.md").read_text(encoding="utf-8")


def test_a_section_that_fails_leaves_the_others(tmp_path, monkeypatch, capsys):
    def broken(machine, s, left):
        s.columns = ["a", "ms"]
        s.row("one", 1.5)
        raise RuntimeError("a sentence\nand more")

    def whole(machine, s, left):
        s.columns = ["b"]
        s.row("two")

    table = {"broken": (broken, "Broken", "It fails."), "whole": (whole, "Whole", "It does not.")}
    monkeypatch.setattr(gpu, "SECTIONS", table)
    report = gpu.Report(tmp_path, {"card": "none"})
    assert gpu.run(Small(), report, list(table)) == 1
    text = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert "**failed: RuntimeError: a sentence**" in text and "| one | 1.5 |" in text and "| two |" in text
    assert gpu.run(Small(), gpu.Report(tmp_path, {}), ["whole"], limit=0) == 1, "what is not run is no success"
    assert "not run: the time was up" in (tmp_path / "gpu.md").read_text(encoding="utf-8")


def test_numbers_are_shown_short():
    values = [None, 0.05483, 1234567, 1234.5, "a|b", float("nan"), 3.14159, 0.0]
    assert list(map(gpu.shown, values)) == ["–", "0.0548", "1,234,567", "1,234", "a/b", "nan", "3.14", "0"]
    assert gpu.ratio(3, "not installed") is None and gpu.ratio(3.0, 2) == 1.5 and gpu.ratio(1, None) is None
    assert gpu.target("fast", gpu.both(True, None)) == "fast: not compared"
    assert gpu.target("fast", gpu.both(None, False)) == "fast: not met" and gpu.both(True, True) is True


def test_what_pytest_and_the_profiler_say_is_read():
    assert gpu.outcome("...\n3 failed, 120 passed, 4 skipped in 9.01s\n") == (120, 3)
    assert gpu.outcome("81 passed in 1s") == (81, 0) and gpu.outcome("Killed") == (None, None)
    trace = [
        {"cat": "kernel", "name": "adamw"},
        {"cat": "Kernel", "name": "gemm"},
        {"cat": "cuda_runtime", "name": "cudaStreamSynchronize"},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel"},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoH (Device -> Pageable)"},
        {"name": "metadata"},
    ]
    assert gpu.counted(trace) == {"kernel": 2, "waits": 1, "to host": 1}


def test_the_main_job_is_read_from_its_report(tmp_path):
    """On the CPU and with a single step: what it ends with is not what the section expects, and the check says so."""
    options = ("--steps", "1", "--heldout", "1", "--batch-size", "1", "--seq-len", "32")
    report = gpu.Report(tmp_path, {})
    status = gpu.run(Small(), report, ["main"], arguments={"main": {"options": options}})
    (s,) = report.sections
    assert s.failed is None and status == 1 and not s.checks[0]["held"]
    assert s.rows[0][1] > 0 and float(s.rows[0][4]) > 1


def test_a_subprocess_that_takes_too_long_is_ended(tmp_path):
    start = time.perf_counter()
    status, text = gpu.subprocess_output(["-c", "import time; print('begun', flush=True); time.sleep(60)"], 1)
    assert status is None and text == "begun\n" and time.perf_counter() - start < 30
    assert gpu.subprocess_output(["-c", "import tinylora, sys; sys.exit(3)"], 60)[0] == 3


def test_pytest_runs_in_a_process_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "_workers", list)
    commands = []

    def answer(command, seconds):
        commands.append(command)
        return (
            (0, "7 passed in 1s") if len(commands) == 1 else (1, "FAILED tests/test_a.py::b - no\n1 failed, 2 passed")
        )

    monkeypatch.setattr(gpu, "subprocess_output", answer)
    report = gpu.Report(tmp_path, {})
    assert gpu.run(Small(), report, ["tests"]) == 1
    assert [row[1:3] for row in report.sections[0].rows] == [[7, 0], [2, 1]]
    assert "test_a.py::b" in report.sections[0].checks[1]["found"] and len(commands) == 2


def test_without_a_gpu_it_says_so(tmp_path):
    if importlib.util.find_spec("cupy"):
        import cupy

        if cupy.cuda.is_available():
            pytest.skip("there is a GPU")
    command = [sys.executable, "-m", "tests.gpu", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("device cuda: CuPy") and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()
    done = subprocess.run([*command[:3], "--help"], cwd=gpu.ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "pip install -e '.[gpu,dev]'" in done.stdout
    assert all(f"    {name} " in done.stdout for name in gpu.SECTIONS)


def test_the_readme_and_the_notebook_say_what_the_table_says():
    """figures/gpu.md is written by the script; the sentences in prose are rows of it."""
    table = json.loads((gpu.ROOT / "figures" / "gpu.json").read_text(encoding="utf-8"))
    rows = {row[0]: row for section in table["sections"] for row in section["rows"]}
    about = table["about"]["card"]
    step, main = rows["1.1B, 4 × 1024, bfloat16"], rows["tinylora finetune --device cuda"]
    bfloat16 = rows["dequantize NF4, double quantization, to bfloat16"]
    assert all(c["held"] for section in table["sections"] for c in section["checks"]) and main[4:6] == [
        "3.0710",
        "2.1450",
    ]
    readme = " ".join((gpu.ROOT / "README.md").read_text(encoding="utf-8").split())
    for said in (
        f"On an {about} the main job printed the CPU's digits in {main[1]:.1f} s, with the model that was embedded before.",
        f"in bfloat16 takes {step[1]:.0f} ms there, and {step[6]:.0f} ms with torch, PEFT and bitsandbytes",
        f"with torch, PEFT and bitsandbytes, which need {step[7]:.1f} GB instead of {step[3]:.1f} GB",
        f"takes {bfloat16[1] / bfloat16[3]:.2f} times as long as a copy of as many bytes, and is {bfloat16[6]:.2f} times",
        f"in all {rows['packed and absmax'][1]} stored cases of 4 bits",
    ):
        assert said in readme, said
    findings = " ".join(
        (gpu.ROOT / "figures" / "README.md").read_text(encoding="utf-8").split("## On a GPU")[1].split()
    )
    checked, plain, double = (
        rows[f"quantize to NF4, {how} looked for"]
        for how in (
            "float32 constants, NaN and Inf",
            "float32 constants, NaN and Inf not",
            "double quantization, NaN and Inf not",
        )
    )
    small, paged, managed = (
        rows["embedded, 8 × 256, bfloat16"],
        rows["AdamW, pool 'host', prefetch on"],
        rows["AdamW, pool 'managed'"],
    )
    for said in (
        f"takes {bfloat16[1]:.4f} ms for 67 million weights in bfloat16 and is {bfloat16[6]:.2f} times faster",
        f"takes {bfloat16[3]:.4f} ms, and",
        f"would be {bfloat16[5] / bfloat16[3]:.2f} times faster",
        f"It takes {checked[1]:.3f} ms, and bitsandbytes takes {checked[5]:.3f} ms",
        f"it takes {plain[1]:.3f} ms, {plain[6]:.2f} times faster",
        f"it takes {double[1]:.1f} ms, and bitsandbytes takes {double[5]:.3f} ms",
        f"takes {small[1]:.1f} ms in bfloat16",
        f"for nearly as long, {small[5]:.1f} ms",
        f"the step takes {rows['embedded, 8 × 256, float32'][1]:.1f} ms",
        f"takes {step[1]:.0f} ms, {step[8]:.2f} times as long",
        f"needs {step[3]:.1f} GB where they need {step[7]:.1f} GB",
        f"takes {paged[1]:.1f} ms instead of {rows['AdamW, all on the device'][1]:.2f} ms",
        f"moves {paged[2]:.2f} GB at {paged[3]:.1f} GB/s",
        f"reaches {rows['a copy to page-locked memory'][3]:.0f} GB/s",
        f"takes {managed[1]:.1f} ms.",
    ):
        assert said in findings, said
    report = gpu.Report("", table["about"])
    report.sections = [gpu.Section(**section) for section in table["sections"]]
    assert report.markdown() == (gpu.ROOT / "figures" / "gpu.md").read_text(encoding="utf-8"), (
        "gpu.md is not gpu.json's"
    )
    notebook = gpu.ROOT / "notebooks" / "21_the_same_equation_on_a_gpu.py"
    assert f"Measured were {bfloat16[1]:.4f} ms" in notebook.read_text(encoding="utf-8")


def test_the_names_that_cupy_has_are_the_ones_used():
    """Where CuPy is installed; a GPU is not needed for it."""
    cupy = pytest.importorskip("cupy")
    assert cupy.cuda.Event.record and cupy.cuda.get_elapsed_time and cupy.cuda.Device.synchronize
    assert cupy.cuda.Device.mem_info and cupy.cuda.runtime.getDeviceProperties and cupy.cuda.runtime.driverGetVersion
    pool, pinned = cupy.get_default_memory_pool(), cupy.get_default_pinned_memory_pool()
    assert pool.set_limit and pool.total_bytes and pool.free_all_blocks and pinned.free_all_blocks
    assert cupy.cuda.MemoryPointer.copy_from_device_async and cupy.RawModule
