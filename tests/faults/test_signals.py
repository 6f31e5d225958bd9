"""Runs that are stopped from outside, or run out of memory, at a random moment: nothing is lost, half written or left behind."""

import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from injector import Process, forked
from operations import OPERATIONS, QUICK, sources
from workplace import BUG, TEMPORARY, Workplace, given_again

from tinylora.models import safetensors

RUNS = ("finetune", "finetune, all weights", "pretrain", "quantize --out")
QUICKEST = ("finetune", "convert to a folder")  # those that are always run
SAID = {
    signal.SIGINT: 130,
    signal.SIGTERM: 143,
}  # the exit status where a signal is heard; SIGTERM may also just end the process
SIGNALS = (signal.SIGKILL, *SAID)


def stopped(work, number, moment):
    """How a run ends that gets a signal so many seconds after its beginning."""

    def run(tell):
        tell(began=True)
        return work.run()

    run.tells = True
    process = Process(run, work.root)
    next(process.lines())
    time.sleep(moment)
    process.send(number)
    return process.wait()


def left(work):
    return [name for name in work.contents() if TEMPORARY.search("/" + name)]


def wrong_end(work, found, number):
    """(how a run ended that got a signal, what is wrong with that)"""
    if found.ended == "hung":
        return "hangs", "it goes on 60 s after the signal"
    if found.ended == "killed" and found.value not in (number, 0):
        return "crashes", f"ended by signal {found.value}"
    if mixed := work.mixed():
        return "mixed", mixed
    status = found.value[0] if found.ended == "returned" else None
    if (found.ended != "killed" and status not in (0, SAID.get(number))) or BUG.search(found.printed):
        return "tracebacks", f"{found.ended} {found.value}: {found.printed[-300:]}"
    if number == signal.SIGINT and found.ended == "killed":
        return "crashes", "it was killed by SIGINT, which it should hear"
    if status is not None and status == SAID.get(number) and left(work):
        return "left behind", f"{left(work)}"
    end, problem = given_again(work)
    return (end, problem) if problem else ("same" if status in (0, None) else "sentences", "")


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_is_stopped_at_any_moment_ends_with_the_same_bytes(name, many, draw, count, tmp_path):
    some = many(1 / 100, least=int(name in QUICKEST))
    work, problems = Workplace(OPERATIONS[name], tmp_path), []
    work.restore()
    began = time.monotonic()
    forked(work.run, work.root)
    takes = time.monotonic() - began
    for number in SIGNALS:
        for moment in draw.uniform(0, takes, some):
            work.restore()
            end, problem = wrong_end(work, stopped(work, number, moment), number)
            count("stopped: " + name, end)
            if problem:
                problems.append(f"{signal.Signals(number).name} after {moment:.3f} s: {problem}")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_process_of_its_own_is_stopped_between_its_steps(number, count, tmp_path):
    """The same with a new Python, as a terminal starts one: it is stopped once its first checkpoint lies there."""
    sources(tmp_path)
    argv = [
        sys.executable,
        "-m",
        "tinylora.cli",
        "finetune",
        "--model",
        "model",
        "--text",
        "one.txt",
        "-r",
        "2",
        *QUICK,
        "--steps",
        "400",
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    process = subprocess.Popen(
        [*argv, "--out", "out"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's background job ignores
    )
    until, checkpoint = time.monotonic() + 60, tmp_path / "out" / "checkpoint.safetensors"
    while not checkpoint.exists() and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode in ({130} if number == signal.SIGINT else {-number, SAID.get(number)}), said
    assert not BUG.search(said)
    assert all(np.isfinite(a).all() for a in safetensors.load_safetensors(checkpoint)[0].values())
    if process.returncode >= 0:
        assert not [p for p in tmp_path.rglob(".*") if TEMPORARY.search("/" + p.name)]
    count("stopped: a process of its own", "sentences" if number == signal.SIGINT else "same")


# ------------------------------------------------------------------------------------------------------------------ out of memory
MAKERS = (
    "empty",
    "zeros",
    "ones",
    "full",
    "empty_like",
    "zeros_like",
    "ones_like",
    "array",
    "asarray",
    "ascontiguousarray",
)
MAKERS += ("concatenate", "stack", "arange", "where", "exp", "matmul")


def counted(at=None, message=""):
    """From now on NumPy's makers of arrays are counted, in the list that is returned, and the one of this number finds no memory."""
    calls = []

    def shim(real):
        def make(*args, **kwargs):
            calls.append(real.__name__)
            if len(calls) - 1 == at:
                raise MemoryError(*([message] if message else []))
            return real(*args, **kwargs)

        return make

    for name in MAKERS:
        setattr(np, name, shim(getattr(np, name)))
    return calls


def wrong_without_memory(work, found):
    """(how a run ended that found no memory, what is wrong with that)"""
    if found.ended != "returned":
        return {"hung": "hangs", "killed": "crashes"}.get(found.ended, "tracebacks"), f"{found}"
    if mixed := work.mixed():
        return "mixed", mixed
    if found.value[0] == 0:
        unlike = work.unlike((*work.operation.resumed, *work.operation.asides))
        return ("mixed", f"status 0, and {unlike} differ") if unlike else ("same", "")
    said = re.findall(r"tinylora: (.*)", found.printed)
    if found.value[0] != 2 or BUG.search(found.printed) or not said or not said[-1].strip():
        return "tracebacks", f"status {found.value[0]}: {found.printed[-300:]!r}"
    if left(work):
        return "left behind", f"{left(work)}"
    end, problem = given_again(work)
    return (end, problem) if problem else ("sentences", "")


@pytest.mark.parametrize("name", [*RUNS, "merge", "convert to a folder"])
def test_an_allocation_that_fails_is_said_or_made_room_for(name, many, draw, count, tmp_path):
    some = many(1 / 40, least=2 * (name in QUICKEST))
    work, problems = Workplace(OPERATIONS[name], tmp_path), []

    def run():
        calls = counted()
        work.run()
        return len(calls)

    work.restore()
    calls = forked(run, work.root).value
    assert calls > 20
    for at in draw.choice(calls, min(some, calls), replace=False):
        work.restore()
        message = "Unable to allocate 1.00 GiB" if at % 2 else ""
        found = forked(work.run, work.root, before=lambda at=at, message=message: counted(at, message))
        end, problem = wrong_without_memory(work, found)
        count("no memory: " + name, end)
        if problem:
            problems.append(f"allocation {at} of {calls}: {problem}")
    assert not problems, "\n".join(problems)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux says how many addresses a process has")
@pytest.mark.parametrize("name", ["finetune", "quantize --out"])
def test_a_limit_of_memory_is_said_or_kept(name, many, draw, count, tmp_path):
    import resource

    some = many(1 / 100, least=2 * (name in QUICKEST))
    work, problems = Workplace(OPERATIONS[name], tmp_path), []

    def limit(more):
        with open("/proc/self/statm") as f:
            now = int(f.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + more, now + more))

    for megabytes in draw.uniform(0, 40, some):
        work.restore()
        found = forked(work.run, work.root, before=lambda m=megabytes: limit(int(m * (1 << 20))))
        end, problem = wrong_without_memory(work, found)
        count("a limit of memory: " + name, end)
        if problem:
            problems.append(f"{megabytes:.1f} MB more: {problem}")
    assert not problems, "\n".join(problems)
