"""The command line where the terminal, the numbers or the files are not what they should be."""

import argparse
import contextlib
import errno
import io
import os
import signal
import subprocess
import sys
import time
import warnings
import xml.dom.minidom

import numpy as np
import pytest
import tiny

from tinylora import cli
from tinylora.cli import main, options, terminal
from tinylora.costs import memory
from tinylora.costs.tables import aligned, escaped, printable
from tinylora.kernels.attention import QUERY_BLOCK
from tinylora.models import safetensors

POSIX = pytest.mark.skipif(os.name != "posix", reason="descriptors, signals and devices are those of POSIX")
FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")


def shell(command, **more):
    """What `tinylora COMMAND` leaves, with redirections, in a shell: status, standard output and error."""
    line = f"{sys.executable} -m tinylora.cli {command}"
    return subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=600, **more)


@pytest.fixture
def job(tmp_path):
    """The words of a finetune of two steps on a tiny model."""
    tiny.model().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("A word that means nothing else.\n" * 60)
    words = f"finetune --model {tmp_path}/model --text {tmp_path}/text.txt --steps 2 --batch-size 2 --seq-len 16 -r 2"
    return f"{words} --heldout 2 --out {tmp_path}/run"


# ------------------------------------------------------------------------------------------------------------- closed and full
@POSIX
@pytest.mark.parametrize("redirected", ["2>&-", "1>&-", "0<&-", "0<&- 1>&- 2>&-", "2>&- | head -c 1"])
def test_a_run_does_not_need_a_terminal(redirected, job, tmp_path):
    done = shell(f"{job} {redirected}")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert (tmp_path / "run" / "report.json").is_file() and (tmp_path / "run" / "adapter").is_dir()


@POSIX
@FULL
def test_a_full_standard_error_loses_no_result(job, tmp_path):
    done = shell(f"{job} 2>/dev/full")
    assert done.returncode == 0 and "held-out bits per byte, after" in done.stdout


@POSIX
@FULL
def test_a_full_standard_output_is_said_when_all_files_are_written(job, tmp_path):
    done = shell(f"{job} >/dev/full")
    assert done.returncode == 2 and (tmp_path / "run" / "report.json").is_file()
    assert "tinylora: could not write to standard output: No space left on device" in done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


@POSIX
@pytest.mark.parametrize(
    "words, status, said",
    [
        ("count 1>&-", 2, "could not write to standard output: it is closed"),
        ("--help 1>&-", 2, "could not write to standard output: it is closed"),
        ("generate --max-new-tokens 3 1>&-", 2, "could not write to standard output: it is closed"),
        ("generate --max-new-tokens 3 --out OUT 1>&-", 0, ""),
        ("count 2>&-", 0, ""),
        ("generate --max-new-tokens 3 0<&- 2>&-", 0, ""),
        ("dance 2>&-", 2, ""),
    ],
)
def test_what_was_asked_for_decides_the_status(words, status, said, tmp_path):
    done = shell(words.replace("OUT", str(tmp_path / "text")))
    assert done.returncode == status and said in done.stderr and "Traceback" not in done.stderr
    assert ("OUT" in words) == (tmp_path / "text").exists()


@POSIX
@FULL
@pytest.mark.parametrize("words", ["count", "--help", "generate --max-new-tokens 3", "generate --help"])
def test_a_full_device_is_one_sentence(words):
    done = shell(f"{words} >/dev/full")
    assert done.returncode == 2 and done.stderr.splitlines() == [
        "tinylora: could not write to standard output: No space left on device"
    ]


@POSIX
@pytest.mark.parametrize("words", ["count", "--help", "generate --max-new-tokens 100000", "experiments --list"])
def test_a_reader_who_has_seen_enough_ends_it_without_a_word(words):
    begun = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-m", "tinylora.cli", *words.split()], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as run:
        run.stdout.read(1)
        run.stdout.close()
        assert run.stderr.read() == b"" and run.wait(120) == 0
    assert time.monotonic() - begun < 120


@POSIX
def test_a_closed_descriptor_is_no_file_of_the_command(tmp_path):
    """Without the null device in its place, the next file that is opened is standard error, and gets what is said there."""
    code = (
        "import sys, os\nfrom tinylora import cli\n"
        "cli.costs.memory_parser = lambda commands: commands.add_parser('memory').set_defaults(run=own)\n"
        "def own(args):\n"
        "    with open(sys.argv[2], 'w') as f:\n"
        "        os.write(2, b'noise')\n"
        "        os.write(1, b'noise')\n"
        "        f.write('whole')\n"
        "cli.main(['memory'])\n"
    )
    line = f'exec {sys.executable} -c "$0" x {tmp_path / "file"} 0<&- 1>&- 2>&-'
    assert subprocess.run(["sh", "-c", line, code], timeout=120).returncode == 0
    assert (tmp_path / "file").read_text() == "whole"


def test_a_progress_bar_without_standard_error(monkeypatch):
    from tinylora.training.train import progress_bar

    monkeypatch.setattr(sys, "stderr", None)
    assert list(progress_bar(range(3), True)) == [0, 1, 2]


def test_the_first_error_of_a_stream_is_kept_and_the_rest_is_dropped():
    class Broken(io.StringIO):
        def write(self, text):
            raise OSError(errno.EIO, "it is gone")

    out = terminal.Output(Broken(), guarded=True)
    assert out.write("abc") == 3 and out.error.errno == errno.EIO
    out.stream = io.StringIO()
    out.write("more")
    out.flush()
    assert out.stream.getvalue() == "" and "it is gone" in terminal.lost(out, True)


# ------------------------------------------------------------------------------------------------------------------ printable
NASTY = "a\x1b[2J\x1b]0;title\x07\r\nb\u202ec\x9b31m\ud800\x00\u2028\u2066"


def test_what_a_terminal_would_obey_is_shown():
    shown = printable(NASTY)
    assert (
        shown == r"a\x1b[2J\x1b]0;title\x07\r\nb\u202ec\x9b31m\ud800\x00\u2028\u2066" and len(shown.splitlines()) == 1
    )
    assert printable("größer, 中文, ∇ and 🙂") == "größer, 中文, ∇ and 🙂"
    assert escaped("a\n\tb\r", keep="\n\t") == "a\n\tb\\r"
    long = printable(f"model.safetensors: {'x' * 10**6} has no shape")
    assert long.startswith("model.safetensors: xxx") and long.endswith("has no shape") and len(long) < 500
    assert len(printable("word " * 10**5)) < 2100


def test_no_cell_of_a_table_makes_a_line():
    lines = aligned([("name", "n"), (NASTY, "1")]).splitlines()
    assert len(lines) == 2 and "\x1b" not in lines[1]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("kind, kept", [(Terminal, False), (io.StringIO, True)])
def test_what_a_model_writes_cannot_take_the_terminal(kind, kept, monkeypatch):
    """On a terminal control characters are shown; a pipe gets what was written."""
    monkeypatch.setattr(sys, "stdout", shown := kind())
    with terminal.attached():
        terminal.stream("one\ttwo\n\x1b[2J\u202e")
    assert shown.getvalue() == ("one\ttwo\n\x1b[2J\u202e" if kept else "one\ttwo\n\\x1b[2J\\u202e")
    assert sys.stdout is shown


def test_a_name_in_a_file_cannot_take_the_terminal(tmp_path, capsys):
    """A tensor with a name that cannot be printed is refused, and shown as it would be typed."""
    folder = tmp_path / "in"
    name = "bad\x1b[2J\n\u202efake line.weight"
    w = np.random.default_rng(0).standard_normal((8, 64), dtype=np.float32)
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    safetensors.save_safetensors(folder / "model.safetensors", {name: w})
    assert main(["quantize", str(folder), "--codes", "nf4"]) == 2
    assert main(["quantize", str(folder), "--normality", "--draws", "5"]) == 2
    out, err = capsys.readouterr()
    assert err.count(r"'bad\x1b[2J\n\u202efake line") == 2
    assert not any(c in out + err.replace("\r", "") for c in ("\x1b[2J", "\u202e")) and "\nfake" not in out + err


@pytest.mark.parametrize(
    "words", [["generate", "--model", NASTY], ["finetune", "--" + NASTY], [NASTY], ["memory", NASTY]]
)
def test_what_was_typed_cannot_take_the_terminal_either(words, capsys):
    try:
        status = main([w.replace("\0", "") for w in words])
    except SystemExit as stop:
        status = stop.code
    err = capsys.readouterr().err
    assert status == 2 and "\x1b" not in err and "\u202e" not in err and r"\x1b[2J" in err


def test_a_warning_is_one_printable_sentence(monkeypatch, capsys):
    def warn(args):
        warnings.warn(f"tensor {NASTY} is odd", stacklevel=1)

    monkeypatch.setattr("tinylora.cli.papers._count", warn)
    assert main(["count"]) == 0
    assert capsys.readouterr().err == f"tinylora: tensor {printable(NASTY)} is odd\n"


# -------------------------------------------------------------------------------------------------------------------- numbers
def typed_options():
    """Every (command, option, type) of the parser whose value is no plain text."""
    commands = cli._parser()._subparsers._group_actions[0].choices
    for name, parser in commands.items():
        for action in parser._actions:
            if action.type is not None:
                yield pytest.param(action, id=f"{name} {action.option_strings[-1]}")


NO_NUMBER = (
    "nan",
    "inf",
    "-inf",
    "infG",
    "1e999",
    "1e400k",
    "nank",
    "0x10",
    "1_000",
    " 5",
    "5 ",
    "１２",
    "٣",
    "",
    "k",
    "-",
    "1e",
)


@pytest.mark.parametrize("action", list(typed_options()))
def test_every_option_of_every_command_takes_numbers_only_and_within_bounds(action):
    """What is refused is refused by the type, before any work; only an argparse type's own error becomes a sentence."""
    for text in (*NO_NUMBER, "-1" if action.dest not in ("alpha", "weights") else "x", "9" * 5000, "9" * 100_000):
        with pytest.raises(argparse.ArgumentTypeError):
            action.type(text)
    if isinstance(action.type("1"), int):
        for text in (str(2**70), "10" * 20, "1" + "0" * 30):
            with pytest.raises(argparse.ArgumentTypeError):
                action.type(text)


def test_the_numbers_that_are_meant_are_taken():
    assert [options.size(s) for s in ("1048576", "64k", "1M", "0.5k", "2G", "1e3k")] == [
        1 << 20,
        1 << 16,
        1 << 20,
        512,
        1 << 31,
        1024000,
    ]
    assert options.positive("+5") == 5 and options.rate(".5") == options.rate("5e-1") == 0.5
    assert options.any_seed(str(2**63 - 1)) == 2**63 - 1


@pytest.mark.parametrize(
    "words",
    [
        "finetune --page-budget infG",
        "finetune --page-bytes 1e400k",
        "paging --page-bytes 0.0001k",
        "finetune --shards 1000000",
        "generate --seed -1",
        "generate --max-new-tokens 1000000000000000000",
        "quantize base --normality --draws 1000000000000",
        "quantize base --blocksize 4611686018427387904",
        "pretrain x --out y --num-hidden-layers 2147483648",
        "finetune --steps 1000000000000000000000000000000",
        "memory --seq-len １２",
    ],
)
def test_a_number_out_of_bounds_is_one_sentence_that_names_the_option(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words.split())
    option = next(w for w in reversed(words.split()) if w.startswith("--"))
    assert stop.value.code == 2 and f"error: argument {option}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, said",
    [
        ("finetune --batch-size 1000000", "finetune: a step of 1 x 1000000 x 256 tokens takes about"),
        ("finetune --accumulate 1000000 --batch-size 1000000", "tokens takes about"),
        ("finetune --method full -r 8 --batch-size 1000000 --checkpointing", "tokens takes about"),
        (
            "pretrain x --out y --hidden-size 1048576 --num-attention-heads 8 --num-key-value-heads 8",
            "pretrain: a step of",
        ),
        ("memory --measure --batch-size 1000000000000", "memory: a step of 1000000000000 x 256 tokens takes about"),
        ("paging --elements 1000000000000", "paging: the state of 1,000,000,000,000 parameters takes about"),
    ],
)
def test_what_no_machine_can_hold_is_said_before_it_is_begun(words, said, tmp_path, monkeypatch, capsys):
    if not hasattr(os, "sysconf"):
        pytest.skip("the system does not say how much memory it has")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 1 << 22, "SC_PAGE_SIZE": 4096}.get)  # 16 GiB
    assert main(words.split()) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert said in err and err.endswith("and this machine has 17.2 GB of memory") and not list(tmp_path.iterdir())


def test_an_account_is_a_formula_at_any_length(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    begun = time.monotonic()
    for options_ in (
        "--seq-len 1000000000000",
        "--batch-size 1000000000000",
        "--seq-len 1000000000000000 --checkpointing",
    ):
        assert main(["memory", "--out", "none", *options_.split()]) == 0
    assert "1 × 1000000000000 tokens" in capsys.readouterr().out and time.monotonic() - begun < 60


def test_the_scores_of_all_blocks_in_closed_form():
    def counted(t, window):
        begin = [0 if window is None else max(i + 1 - window, 0) for i in range(0, t, QUERY_BLOCK)]
        ends = (min((i + 1) * QUERY_BLOCK, t) for i in range(len(begin)))
        return sum(
            (end - i * QUERY_BLOCK) * (end - first) for i, (first, end) in enumerate(zip(begin, ends, strict=True))
        )

    q = QUERY_BLOCK
    for t in (1, 2, q - 1, q, q + 1, 2 * q, 3 * q + 7, 500, 1024):
        for window in (None, 1, 2, q - 1, q, q + 1, q + 2, 2 * q + 1, 300, 499, 5000):
            assert memory._pairs(t, window) == counted(t, window), (t, window)


# ------------------------------------------------------------------------------------------------------------ figures and files
@pytest.mark.parametrize(
    "words, said", [("memory", "65,"), ("nf4 --blocksizes 64", "16 of 16"), ("memory --audit", "verdict")]
)
def test_a_figure_that_nobody_asked_for_fails_nothing(words, said, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tinylora.figures.style.save", full)
    assert main(words.split()) == 0
    out, err = capsys.readouterr()
    assert said in out and "figure:" not in out and err == "tinylora: no figure: [Errno 28] No space left on device\n"


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the owner of everything may write anywhere"
)
def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o500)
    assert main(["memory"]) == 0 and main(["memory", "--out", "x.svg"]) == 2


@pytest.mark.parametrize(
    "words", ["memory --out", "nf4 --figure", "paging --out", "generate --out", "experiments --out"]
)
@pytest.mark.parametrize("place", ["file/x.svg", "folder.svg", "pipe.svg"])
def test_a_place_that_cannot_be_written_is_said_before_the_work(words, place, tmp_path, monkeypatch, capsys):
    if not words.startswith(("generate", "experiments")):
        pytest.importorskip("matplotlib")
    if words.startswith("experiments") and place != "file/x.svg":
        return  # it writes a folder
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder.svg").mkdir()
    os.mkfifo(tmp_path / "pipe.svg") if hasattr(os, "mkfifo") else (tmp_path / "pipe.svg").mkdir()
    for work in (
        "costs.memory.describe",
        "papers.nf4_construction.construction",
        "costs.paging.measure",
        "papers.claims.run",
    ):
        monkeypatch.setattr(f"tinylora.{work}", None)
    monkeypatch.setattr("tinylora.cli.models._open", None)
    assert main([*words.split(), str(tmp_path / place)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "fault" not in err and len(err.splitlines()) == 1 and (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize(
    "words", ["finetune --out", "pretrain one.txt --out", "merge --adapter a --out", "generate --out", "nf4 --figure"]
)
def test_an_empty_name_of_what_is_written_is_refused(words, tmp_path, monkeypatch, capsys):
    """Whoever asks for a file named by a variable that is not set shall not wait for it in vain."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main([*words.split(), ""])
    assert left.value.code == 2 and f"argument {words.split()[-1]}: expected a name" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_name_in_a_figure_is_no_formula_and_no_control_character(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "a$^$\x1b[2J\n_{"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    w = np.random.default_rng(0).standard_normal((8, 64), dtype=np.float32)
    safetensors.save_safetensors(folder / "model.safetensors", {"x$\\frac$.weight": w, "y.weight": w})
    assert main(["quantize", str(folder), "--normality", "--draws", "5", "--out", str(tmp_path / "out")]) == 0
    assert xml.dom.minidom.parse(str(tmp_path / "out" / "normality.svg"))


@pytest.mark.parametrize("words", ["memory --out", "nf4 --figure", "paging --out"])
def test_a_figure_of_no_known_format_is_said_before_the_work(words, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main([*words.split(), str(tmp_path / "x.xyz")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "no figure is written as .xyz; expected one of" in err


# ------------------------------------------------------------------------------------------------------------- errors and signals
class Panic(BaseException):
    """As the libraries in Rust raise it."""


@pytest.mark.parametrize(
    "error, said",
    [
        (
            AttributeError("'str' object has no attribute 'get'"),
            "a fault of tinylora's own, which --traceback shows: AttributeError: 'str'",
        ),
        (KeyError("model.norm"), "--traceback shows: KeyError: 'model.norm'"),
        (AssertionError(), "--traceback shows: AssertionError"),
        (RecursionError("maximum recursion depth exceeded"), "--traceback shows: RecursionError"),
        (OverflowError("Python int too large to convert to C long"), "--traceback shows: OverflowError"),
        (Panic("called `Option::unwrap()`\n\x1b[0m"), r"--traceback shows: Panic: called `Option::unwrap()`\n\x1b[0m"),
        (MemoryError(), "tinylora: out of memory\n"),
        (MemoryError("Unable to allocate 3. TiB"), "out of memory: Unable to allocate 3. TiB"),
        (ValueError(), "--traceback shows: ValueError\n"),
        (ImportError("No module named 'jinja2'"), "tinylora: No module named 'jinja2'\n"),
        (ValueError("config.json: hidden_size = 'x'"), "tinylora: config.json: hidden_size = 'x'\n"),
    ],
)
def test_an_error_of_any_type_is_one_sentence(error, said, monkeypatch, capsys):
    def fails(args):
        raise error

    monkeypatch.setattr("tinylora.cli.papers._count", fails)
    assert main(["count"]) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) == 1
    with pytest.raises(type(error)):
        main(["count", "--traceback"])


@pytest.mark.parametrize(
    "command, said",
    [
        (
            ["finetune"],
            "interrupted; the last checkpoint, if there was one, is kept, and the same command goes on from there",
        ),
        (["ranks"], "interrupted; the runs that had ended are kept, and the same command goes on from there"),
        (["count"], "interrupted\n"),
        (["generate"], "interrupted\n"),
        (["merge", "--adapter", "x", "--out", "y"], "interrupted\n"),
    ],
)
def test_an_interrupted_command_says_what_is_true_of_it(command, said, monkeypatch, capsys):
    def stopped(*_):
        raise KeyboardInterrupt

    for name in ("training._finetune", "papers._ranks", "papers._count", "models._generate", "models._merge"):
        monkeypatch.setattr(f"tinylora.cli.{name}", stopped)
    assert main(command) == 130
    assert f"tinylora: {said}" in capsys.readouterr().err


SAYS_WHEN = """
import sys
class Finder:
    def find_spec(name, path=None, target=None):
        if name == "numpy":
            print("up", flush=True)
sys.meta_path.insert(0, Finder)
from tinylora.cli import main
sys.exit(main())
"""


@POSIX
@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("after", [0, 0.1, 0.2, 0.5, 1.0])
def test_a_signal_at_any_moment_leaves_no_traceback(number, status, after, job, tmp_path):
    """From the package's first import on; how Python itself starts is not ours."""
    command = tmp_path / "tinylora"  # as the installed command is called
    command.write_text(SAYS_WHEN)
    words = [sys.executable, str(command), *job.split(), "--steps", "100000"]
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # a shell's background job ignores it
    run = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **heard)
    assert run.stdout.read(3) == b"up\n"
    time.sleep(after)
    run.send_signal(number)
    _, err = run.communicate(timeout=120)
    assert run.returncode in (status, -number), err
    assert b"Traceback" not in err, err


@POSIX
def test_a_terminated_run_cleans_up_and_goes_on(job, tmp_path):
    words = [sys.executable, "-m", "tinylora.cli", *job.split(), "--steps", "100000", "--checkpoint-every", "5"]
    run = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while run.poll() is None and not (tmp_path / "run" / "checkpoint.safetensors").exists():
        time.sleep(0.02)
    run.terminate()
    _, err = run.communicate(timeout=120)
    assert run.returncode == 143 and b"terminated; the last checkpoint, if there was one, is kept" in err
    assert not list(tmp_path.rglob("*.part"))


@pytest.fixture
def heard():
    """Ctrl-C is heard, as in a terminal: a shell's background job ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Deleted:
    """Its deletion is where a signal comes."""

    def __del__(self):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="the system has no timer of signals")
def test_a_signal_that_was_swallowed_comes_again(monkeypatch, capsys, heard):
    def stubborn(args):
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGTERM)
        time.sleep(60)

    def deleting(args):
        Deleted()
        time.sleep(60)

    begun = time.monotonic()
    monkeypatch.setattr(terminal, "PATIENCE", 0.1)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGALRM)
    monkeypatch.setattr("tinylora.cli.papers._count", stubborn)
    assert main(["count"]) == 143
    monkeypatch.setattr("tinylora.cli.papers._count", deleting)
    assert main(["count"]) == 130
    assert capsys.readouterr().err == "tinylora: terminated\ntinylora: interrupted\n"
    assert time.monotonic() - begun < 30 and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGALRM)) == before


class HalfBuilt:
    """A signal comes before its `__init__` is over, and its deletion needs what was to come."""

    def __init__(self, number=None):
        if number:
            signal.raise_signal(number)
        else:
            raise ValueError("no signal came")

    def __del__(self):
        self.stream.close()


@pytest.mark.parametrize(
    "number, status, said", [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_an_object_that_a_signal_left_half_built_is_no_fault_of_the_command(
    number, status, said, monkeypatch, capsys, heard
):
    monkeypatch.setattr("tinylora.cli.papers._count", lambda args: HalfBuilt(number))
    assert main(["count"]) == status
    assert capsys.readouterr().err == f"tinylora: {said}\n"


def test_a_progress_bar_that_a_signal_cuts_short(monkeypatch, capsys, heard):
    """tqdm's deletion asks for the bar's position; the signal comes where it would have been given one."""
    tqdm = pytest.importorskip("tqdm")
    monkeypatch.setattr(tqdm.tqdm, "_get_free_pos", lambda *bars: signal.raise_signal(signal.SIGTERM))
    monkeypatch.setattr("tinylora.cli.papers._count", lambda args: tqdm.tqdm(range(9)))
    assert main(["count"]) == 143
    assert capsys.readouterr().err == "tinylora: terminated\n"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_without_a_signal_a_deletion_that_fails_is_reported(monkeypatch, capsys, heard):
    monkeypatch.setattr("tinylora.cli.papers._count", lambda args: HalfBuilt())
    assert main(["count"]) == 2
    err = capsys.readouterr().err
    assert "no attribute 'stream'" in err and "no signal came" in err


def test_signals_are_put_back_and_ignored_ones_stay_ignored(monkeypatch):
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with terminal.signals():
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with pytest.raises(terminal.Terminated), terminal.signals():
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------------------- the program
def test_the_program_itself(capsys):
    from tinylora import __version__

    for words in (["-m", "tinylora", "--version"], ["-m", "tinylora.cli", "--version"]):
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and done.stdout == f"tinylora {__version__}\n"
    for words, hint in ((["fintune"], "did you mean finetune?"), (["dance"], "the commands are finetune, generate")):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2 and f"there is no command {words[0]!r}; {hint}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings",
    [{"COLUMNS": "1", "TERM": "dumb"}, {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}, {"HOME": "/nonexistent"}],
)
def test_a_poor_environment(settings):
    for words in ("count", "finetune --help"):
        done = shell(words, env={**os.environ, **settings})
        assert done.returncode == 0 and done.stderr == "" and len(done.stdout) > 1000
