"""Contestants take turns: each in a process of its own, which waits while the others run.

    for each round:  for each contestant, in an order that changes:  a pause, then a burst of k repetitions

What is compared is what happened in the same round: a ratio is taken in each round, of the medians of two bursts, and what is reported is
the median of these with its quartiles. So what slows the machine down for some seconds meets both sides.

No thread pool disturbs another: a process has its own libraries and its own OMP_NUM_THREADS, and the pause before each burst is longer than
the threads of OpenBLAS (25 ms) and of GNU's OpenMP (a few ms) spin when their work has ended. The CPU time that waiting processes take is
measured and reported, and so is what the rest of the machine takes meanwhile.
"""

import contextlib
import json
import math
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from .rows import ROOT, THREADS

PAUSE, BURST = 0.1, 0.5  # seconds before a burst, and of a burst, about
MOST = 500  # repetitions in a burst
PATIENCE = 900  # seconds until a process that does not answer is given up
_TICK = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


# ------------------------------------------------------------------------------------------------------------- a process
class Gone(Exception):
    """The process ended, or did not answer in time."""


class Process:
    """The parent's end of one `worker`."""

    def __init__(self, threads, tinylora=None, variables=None):
        read, write = os.pipe()
        self.log, self._buffer, self._read = tempfile.TemporaryFile(), b"", read  # noqa: SIM115 (closed in `close`)
        self.child = subprocess.Popen(
            [sys.executable, "-P", "-m", "bench.worker", str(write)],
            stdin=subprocess.PIPE,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            pass_fds=(write,),
            env=environment(threads, tinylora, variables),
            cwd=tempfile.gettempdir(),
        )
        os.close(write)

    def tell(self, **command):
        """Send a command, and do not wait for the answer."""
        with contextlib.suppress(BrokenPipeError):  # `answer` then says that it has ended
            self.child.stdin.write(json.dumps(command).encode() + b"\n")
            self.child.stdin.flush()

    def answer(self, patience=PATIENCE):
        """The answer to the oldest command."""
        end = time.monotonic() + patience
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(end - time.monotonic(), 0))
            piece = os.read(self._read, 1 << 16) if ready else None
            if not piece:
                raise Gone("it gave no answer in time" if piece is None else f"the process ended{self._last_line()}")
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def ask(self, **command):
        self.tell(**command)
        return self.answer()

    def _last_line(self):
        """What the process printed last, as ": …"."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.child.wait(5)
        self.log.seek(0)
        lines = self.log.read().decode("utf-8", "replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f" (status {self.child.returncode}){': ' * bool(said)}{said[:200]}"

    def cpu(self):
        """Seconds of CPU time so far; None where the system does not say."""
        return _cpu_of(self.child.pid)

    def close(self):
        with contextlib.suppress(OSError):
            self.child.stdin.close()
        try:
            self.child.wait(5)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        os.close(self._read)
        self.log.close()


def environment(threads, tinylora=None, variables=None):
    """The environment of a worker: so many threads, this tinylora (a folder) before any that is installed, and these variables."""
    env = {**os.environ, **{f"{name}_NUM_THREADS": str(threads) for name in ("OMP", "OPENBLAS", "MKL")}}
    env |= variables or {}
    paths = [str(ROOT / "tests")] if tinylora is None else [str(tinylora), str(ROOT / "tests")]
    return {**env, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def avx2():
    """{variable: value}: with these NumPy, its OpenBLAS and torch go no further than AVX2; {} where the processor has no AVX2.

    bitsandbytes' kernels ask the processor themselves.
    """
    from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

    if not __cpu_features__.get("AVX2"):
        return {}
    beyond = [name for name in __cpu_dispatch__ if name.startswith(("AVX512", "X86_V4"))]
    numpy = {"NPY_DISABLE_CPU_FEATURES": " ".join(beyond), "NPY_ENABLE_CPU_FEATURES": ""}
    torch = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    return {"OPENBLAS_CORETYPE": "Haswell", **numpy, **torch}


def _cpu_of(pid):
    """Seconds of CPU time of a process and of those that it started and that have ended; None where the system does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return sum(map(int, fields[11:15])) / _TICK


def machine_cpu():
    """Seconds of CPU time that all cores have been busy; None where the system does not say."""
    try:
        numbers = Path("/proc/stat").read_text(encoding="utf-8").split("\n")[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _, _, irq, soft, steal = map(int, numbers)
    return (user + nice + system + irq + soft + steal) / _TICK


# ------------------------------------------------------------------------------------------------------------- a case
@dataclass
class Measured:
    """A contestant of one checkout in one case. rounds: the median seconds of each burst; skipped: why there are none."""

    name: str
    version: str | None
    threads: int
    rounds: list = field(default_factory=list)
    skipped: str | None = None
    k: int = 0
    peak: int = 0  # bytes, after it had set up
    held: int = 0  # bytes, before it set up
    waiting: float | None = None  # cores that it took while others ran
    kernels: list = field(default_factory=list)
    facts: dict = field(default_factory=dict)

    @property
    def label(self):
        return self.name if self.version is None else f"{self.name} ({self.version})"


def entries(case, threads, versions):
    """[(contestant, version or None)] of a case: each checkout has its own of tinylora's contestants."""
    found = []
    for c in case.contestants:
        if c.threads is None or c.threads <= threads:
            found += [(c, version) for version in (versions if c.ours else (None,))]
    return found


def turns(n, i):
    """The order of n contestants in round i: every second round goes backwards, and another begins after it. Of two: ab, ba, ba, ab."""
    order = [(j + i // 2) % n for j in range(n)]
    return order[::-1] if i % 2 else order


def repetitions(seconds, burst=BURST):
    """How often something of so many seconds is done in a burst."""
    return max(1, min(MOST, round(burst / seconds))) if seconds > 0 else MOST


def measure(case, threads, versions, rounds, short=False, tell=lambda text: None, variables=None):
    """Run a case. versions: {name: folder of a checkout}. -> ([Measured], cores that other work took meanwhile or None)

    short: contestants that need nothing but NumPy, one repetition each, and no pauses. variables: of all workers' environment
    """
    found, processes = [], []
    try:
        for contestant, version in entries(case, threads, versions):
            own = contestant.threads or threads
            found.append(Measured(contestant.name, version, own))
            if short and contestant.needs:
                found[-1].skipped = "left out in a short run"
                processes.append(None)
                continue
            folder = None if version is None else versions[version]
            processes.append(Process(own, folder, variables))
            given = {k: own if v == THREADS and k == "shards" else v for k, v in contestant.given.items()}
            processes[-1].tell(
                does=contestant.does, given=given, needs=contestant.needs, tinylora=folder and str(folder)
            )
        for m, process in zip(found, processes, strict=True):
            if process is not None:
                tell(f"{m.label} sets up")
                _ready(m, process, short)
        running = [(m, p) for m, p in zip(found, processes, strict=True) if m.skipped is None]
        others = _rounds(running, rounds, 0 if short else PAUSE, tell)
        for m, process in running:
            _about(m, process)
    finally:
        for process in processes:
            if process is not None:
                process.close()
    return found, others


def _ready(m, process, short):
    """Wait until a contestant has set up, and warm it up; on any failure it is skipped with a sentence."""
    try:
        reply = process.answer()
        m.skipped = reply.get("missing") or (f"failed: {reply['failed']}" if "failed" in reply else None)
        if m.skipped is None:
            m.facts = reply["ready"]
            _burst(m, process, 1)
            m.k = 1 if short else repetitions(_burst(m, process, 1))
    except Gone as error:
        m.skipped = f"failed: {error}"


def _burst(m, process, k):
    """The median seconds of k repetitions; None, and the contestant is out, if they fail."""
    reply = process.ask(run=k)
    if "failed" in reply:
        raise Gone(reply["failed"])
    return statistics.median(reply["times"])


def _rounds(running, rounds, pause, tell):
    """Let the contestants take turns; -> the cores that other work took, or None."""
    waiting, busy = {id(m): [0.0, 0.0] for m, _ in running}, [0.0, 0.0]
    for i in range(rounds):
        tell(f"round {i + 1} of {rounds}")
        for j in turns(len(running), i):
            m, process = running[j]
            if m.skipped is not None:
                continue
            time.sleep(pause)
            before, start = _clocks(running), time.perf_counter()
            try:
                m.rounds.append(_burst(m, process, m.k))
            except Gone as error:
                m.skipped = f"failed: {error}"
                continue
            seconds, after = time.perf_counter() - start, _clocks(running)
            _enter(m, before, after, seconds, waiting, busy)
    for m, _ in running:
        cpu, seconds = waiting[id(m)]
        m.waiting = cpu / seconds if seconds else None
    return busy[0] / busy[1] if busy[1] else None


def _clocks(running):
    """(CPU seconds of the machine, of this process, {contestant: of its process})"""
    return machine_cpu(), time.process_time(), {id(m): process.cpu() for m, process in running}


def _enter(m, before, after, seconds, waiting, busy):
    """Add up what waiting contestants and other work took during a burst."""
    if before[0] is None or None in before[2].values() or None in after[2].values():
        return
    used = {key: after[2][key] - before[2][key] for key in before[2]}
    for key, cpu in used.items():
        if key != id(m):
            waiting[key][0] += cpu
            waiting[key][1] += seconds
    busy[0] += max(after[0] - before[0] - (after[1] - before[1]) - sum(used.values()), 0.0)
    busy[1] += seconds


def _about(m, process):
    """What a process says of itself at the end."""
    if m.skipped is None:
        with contextlib.suppress(Gone):
            about = process.ask(about=True).get("about", {})
            m.peak, m.held, m.kernels = about.get("peak", 0), about.get("held", 0), about.get("kernels", [])


# ------------------------------------------------------------------------------------------------------------- numbers
def quartiles(values):
    """(lower quartile, median, upper quartile)"""
    if len(values) == 1:
        return values[0], values[0], values[0]
    return tuple(statistics.quantiles(values, n=4, method="inclusive"))


def number(line, measured, version):
    """The quartiles of a line for one checkout, or None if one of its contestants was skipped."""
    if missing(line, measured, version):
        return None
    return quartiles(_values(line, measured, version))


def missing(line, measured, version):
    """Why there is no number of a line for one checkout, in a word or two; "" if there is one."""
    said = next((m.skipped for m in _sides(line, measured, version) if m.skipped is not None), "")
    return said.partition(" (")[0].partition(":")[0]


def _sides(line, measured, version):
    """The contestants that a line compares."""
    return [_find(measured, name, version) for name in (line.of, line.against) if name]


def beside(line, measured, first, other):
    """The quartiles of one checkout over another: of `line.of`'s time, or of what a line that is no ratio says; None if one was skipped."""
    if line.kind != "ratio":
        if missing(line, measured, first) or missing(line, measured, other):
            return None
        a, b = (_values(line, measured, version) for version in (first, other))
    else:
        sides = [_find(measured, line.of, version) for version in (first, other)]
        if any(m.skipped is not None for m in sides):
            return None
        a, b = (m.rounds for m in sides)
    return quartiles([x / y for x, y in zip(a, b, strict=True)])


def _values(line, measured, version):
    """What a line says in each round."""
    return [line.value(*pair) for pair in zip(*(m.rounds for m in _sides(line, measured, version)), strict=True)]


def _find(measured, name, version):
    """The contestant of this name, of this checkout if it is tinylora's."""
    return next(m for m in measured if m.name == name and m.version in (None, version))


def reached(line, threads, values):
    """ "aim", "must", "no", or "" where nothing was asked for or nothing was found. values: the quartiles of a line, or None"""
    bounds = {"aim": line.aim.get(threads), "must": line.must.get(threads)}
    if values is None or not any(bounds.values()):
        return ""
    for name, bound in bounds.items():
        if bound is not None and (values[1] >= bound if line.more else values[1] <= bound):
            return name
    return "no"


def three(x):
    """Three digits of a number."""
    if x == 0 or not math.isfinite(x):
        return f"{x:g}"
    digits = max(2 - math.floor(math.log10(abs(x))), 0)
    return f"{x:,.{digits}f}"
