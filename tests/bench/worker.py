"""The process of one contestant: it sets up once, then waits on a pipe and runs a burst of k repetitions when it is told to.

    python -P -m bench.worker FD     with tests/ and the tinylora to be measured in PYTHONPATH

Commands come as lines of JSON on standard input, answers go as lines of JSON to the file descriptor FD, and what libraries print goes where
the parent has put standard output. Between two commands the process sits in read(), and ends when the pipe does.

    {"does": a function of `contestants`, "given": its arguments, "needs": [libraries], "tinylora": the folder it must come from or null}
        -> {"ready": {…}}, {"missing": sentence} (a library, or a function that this checkout does not have), or {"failed": sentence}
    {"run": k}                     -> {"times": [seconds, …]}
    {"about": true}                -> {"about": {"peak": bytes, "held": bytes, "kernels": [...], "threads": of the BLAS}}
"""

import importlib
import importlib.util
import json
import os
import sys
import time
import traceback
from pathlib import Path


class Missing(Exception):
    """What is measured does not exist here; the text says what."""


def times(call, k):
    """[seconds] of k calls. A contestant that keeps its own time has `times`; one that does its work n times a call says so in `number`."""
    if hasattr(call, "times"):
        return call.times(k)
    found, number = [], getattr(call, "number", 1)
    for _ in range(k):
        start = time.perf_counter()
        call()
        found.append((time.perf_counter() - start) / number)
    return found


def memory(field):
    """A field of /proc/self/status in bytes: VmRSS, or VmHWM, the largest so far; 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":")), 0)


def forget_peak():
    """Let VmHWM begin anew, where Linux does that."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def blas():
    """["openblas 0.3.31 SkylakeX, 2 threads"] of what is loaded."""
    if importlib.util.find_spec("threadpoolctl") is None:
        return []
    from threadpoolctl import threadpool_info

    return sorted(
        f"{pool['internal_api']} {pool['version'] or ''} {pool.get('architecture') or ''}, "
        f"{pool['num_threads']} thread{'s' * (pool['num_threads'] > 1)}".replace("  ", " ").replace(" ,", ",")
        for pool in threadpool_info()
    )


def sentence(error):
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no more is known').splitlines()[0]}"


class Host:
    """What the commands are done on."""

    def __init__(self):
        self.call, self.held = None, 0

    def setup(self, does, given, needs, tinylora):
        for name in needs:
            if importlib.util.find_spec(name) is None:
                raise Missing(f"{name} is not installed")
            importlib.import_module(name)
        if tinylora is not None:
            found = Path(importlib.import_module("tinylora").__file__).resolve().parents[1]
            if found != Path(tinylora).resolve():
                raise RuntimeError(f"import tinylora found {found}, expected {tinylora}")
        from . import contestants

        before = memory("VmRSS")
        try:
            self.call = getattr(contestants, does)(**given)
        except (ImportError, AttributeError) as error:
            if tinylora is None:
                raise
            raise Missing(f"not there ({sentence(error)})") from error
        forget_peak()
        self.held = before
        return {"ready": getattr(self.call, "facts", {})}

    def answer(self, command):
        if "does" in command:
            return self.setup(**command)
        if "run" in command:
            return {"times": times(self.call, command["run"])}
        return {"about": {"peak": memory("VmHWM"), "held": self.held, "kernels": blas()}}


def main(fd):
    host = Host()
    with os.fdopen(fd, "w", encoding="utf-8") as out:
        for line in sys.stdin:
            try:
                reply = host.answer(json.loads(line))
            except Missing as error:
                reply = {"missing": str(error)}
            except Exception as error:
                traceback.print_exc()
                reply = {"failed": sentence(error)}
            print(json.dumps(reply), file=out, flush=True)
        sys.stdout.flush()
    os._exit(0)  # a thread of a contestant may still wait for its next step


if __name__ == "__main__":
    main(int(sys.argv[1]))
