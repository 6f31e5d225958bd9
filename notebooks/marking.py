"""Grade one student's answers in processes that can be killed; `pytest notebooks` uses it, a notebook does not.

    pytest    ──  a job: a notebook, an exercise  ──▶   checker        ──  cells, calls, arguments  ──▶   answers
    Student   ◀──  how far it is, the verdict     ──    runs checks    ◀──  what they return, as data  ──   runs cells

Only the third process runs what a student wrote. It can replace checks, patch NumPy, switch off timers or end Python as it
likes: the check and the NumPy it calls are in the second, and what comes back is rebuilt from JSON (never unpickled) as numbers,
strings, arrays and containers of them. The first waits for each step no longer than the limit. When a process dies or is late it
kills both, with whatever they started, and grades the student's next exercise in new ones.

On Linux all three are forks of pytest, so the checks are those that were loaded before any answer ran, and an answer cannot
change them on disk; and where the kernel lets it, an answer runs in a PID namespace, from which no other process can be sent a
signal. Elsewhere the processes start afresh.
"""

import base64
import collections.abc
import contextlib
import ctypes
import faulthandler
import fractions
import functools
import json
import multiprocessing
import numbers
import os
import pickle
import re
import signal
import sys
import time
import warnings
from pathlib import Path

import grading
import numpy as np

LINUX = sys.platform == "linux"
READING = 60  # seconds to start the processes and to read a notebook; what a student wrote does not run yet
LONGEST = 1 << 28  # bytes of a message
SENTENCE = 500  # characters
ENDED = "ended Python (os._exit or a signal)"
PLAIN = re.compile(r"[<>|=][biufcSUmM]\d+(\[\w+\])?")  # the dtypes that arrays may have which an answer returns
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 1, 4, 36
CLONE_NEWUSER, CLONE_NEWPID = 0x10000000, 0x20000000


# --- pytest's side


class Ended(Exception):
    """The processes died or were late. `step` is what they had said last."""

    def __init__(self, step, why):
        super().__init__(why)
        self.step = step


class Student:
    """Grades the exercises of one answer set, one after the other. Each step may take `limit` seconds, each process `memory` GB."""

    def __init__(self, limit, memory, hidden=None):
        self.limit, self.memory, self.hidden = limit, memory, hidden
        self.passed_over = {}  # {notebook: its cells that ended the processes while another exercise was graded}
        self.process = None

    def mark(self, path, text, exercise, seed):
        """The Verdict on an exercise of the notebook with this path and text."""
        grading.ready(self.hidden)
        parts, skip, found = grading.CHECKS[exercise], self.passed_over.setdefault(str(path), []), []
        while len(found) < len(parts):
            new = self.process is None
            try:
                self._ask((str(path), text, exercise, seed, len(found), skip), found)
            except Ended as ended:
                self.close()
                kind, *of = ended.step
                if kind == "reading" and not new:
                    continue  # something that an earlier exercise left behind has ended them
                if kind == "check":  # the parts after it are graded in new processes
                    found.append(f"not right: it {ended}")
                    continue
                said = f"not gradable: it {ended}"
                if kind == "cell":
                    i, whose, name = of
                    if whose == "other" and i not in skip:
                        skip.append(i)
                        continue
                    said = f"not gradable: {name} {ended}"
                found += [said] * (len(parts) - len(found))
        return grading.together([(part, plain(one)) for part, one in zip(parts, found, strict=True)])

    def _ask(self, job, found):
        """Send a job, follow its steps, and add what is said of each part that is left."""
        step, seconds = ("reading",), READING
        try:
            if self.process is None:
                self._start()
            self.connection.send(job)
            while True:
                if not self.connection.poll(seconds):
                    raise Ended(step, f"takes more than {seconds:g} seconds")
                what, *of = json.loads(self.connection.recv_bytes(LONGEST))
                if what == "said":
                    found.append(of[0])
                    if len(found) == len(grading.CHECKS[job[2]]):
                        return
                    continue
                if what == "ended":
                    raise Ended(step, ENDED)
                if what == "started":
                    self.pids.append(of[0])
                    continue
                step, seconds = (what, *of), self.limit
        except (EOFError, OSError, ValueError):  # the checker is dead, or died while it wrote
            raise Ended(step, ENDED) from None

    def _start(self):
        for name in ("jupytext", "nbformat"):  # once, and not in each fork
            with contextlib.suppress(ImportError):
                __import__(name)
        adopt_orphans(True)
        self.before = set(children()) if LINUX else set()
        self.connection, theirs = CONTEXT.Pipe()
        open_to_others(True)  # a fork inherits it
        self.process = started(checker, theirs, self.memory, self.hidden)
        open_to_others(False)
        self.pids = [self.process.pid]
        theirs.close()

    def close(self):
        """Kill the processes, and all that they started."""
        if self.process is None:
            return
        self.connection.close()
        if hasattr(os, "killpg"):
            with contextlib.suppress(OSError):
                os.killpg(self.process.pid, signal.SIGKILL)
        for pid in self.pids:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
        self.process.join()
        self.process = None
        if LINUX:
            kill_children(self.before)
            adopt_orphans(False)
            open_to_others(True)


def children():
    """The process ids of this process's children and of theirs, in Linux's /proc, each before its own children."""
    parent = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            parent[int(stat.parent.name)] = int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
    found = [os.getpid()]
    for pid in found:  # the list grows while it is walked
        found += [child for child, of in parent.items() if of == pid]
    return found[1:]


def kill_children(but):
    """Kill what has this process as its parent or grandparent, until nothing is left but those in `but`."""
    until = time.monotonic() + 10
    while (left := set(children()) - but) and time.monotonic() < until:
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(OSError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.002)


# --- the checker's side


def checker(connection, memory, hidden):
    """Grade jobs as they come, in a process that runs no line of a student's."""
    settle(connection)
    grading.ready(hidden)
    if hasattr(os, "setsid"):
        os.setsid()  # a group of its own with what it starts, and no Ctrl-C
    bound(memory)
    ours, theirs = CONTEXT.Pipe()
    process = started(answers, theirs, memory, hidden)
    theirs.close()

    def say(*message):
        connection.send_bytes(json.dumps(message).encode())

    say("started", process.pid)
    open_to_others(False)
    remote, parsed = Remote(ours, process, say), functools.cache(grading.parsed)
    while True:
        try:
            path, text, exercise, seed, done, skip = connection.recv()
        except EOFError:  # pytest is gone
            process.kill()
            return
        parts, cells = grading.CHECKS[exercise], RemoteCells(remote, exercise, skip)
        rngs = np.random.default_rng(seed).spawn(len(parts))
        try:
            if exercise.startswith(grading.OWN):
                function = grading.own_answer(text, cells)
            else:
                function = grading.answer(parsed(path, text), int(exercise[3:]), cells)
        except (ValueError, ImportError, grading.Raised) as error:
            function, wrong = None, f"not gradable: {error}"
        except Exception as error:
            function, wrong = None, f"not gradable: reading it raised {type(error).__name__}: {error}"
        for part, rng in list(zip(parts, rngs, strict=True))[done:]:
            if function:
                say("check")
            say("said", grading.said(exercise, part, function, rng) if function else wrong)


class Remote:
    """The checker's end of the answers: sends a request, returns the reply."""

    def __init__(self, connection, process, say):
        self.connection, self.process, self.say = connection, process, say

    def ask(self, *request):
        sent = pickle.dumps(request)
        try:
            self.connection.send_bytes(sent)
            while not self.connection.poll(0.5):
                if not self.process.is_alive():  # a process that it left behind may hold the connection open
                    raise EOFError
            reply = self.connection.recv_bytes(LONGEST)
        except (EOFError, OSError):
            self.say("ended")
            os._exit(0)
        try:
            kind, *of = json.loads(reply)
            if kind == "returned":
                return decoded(of[0]), {int(i): decoded(new) for i, new in of[1]}
        except Exception:  # whatever: these bytes are a stranger's
            kind, of = "raised", ["what it returns cannot be read"]
        if kind == "unanswered":
            error = NotImplementedError()
            error.function = re.sub(r".*\((\w+)\)|.*", r"\1", plain(of[0]))
            raise error
        raise grading.Raised(str(of[0]))


class RemoteCells:
    """grading.Cells in the process of the answers. Another exercise's cell in `skip` is passed over; it ended Python before."""

    def __init__(self, remote, exercise, skip):
        self.remote, self.exercise, self.skip = remote, exercise, skip
        remote.ask("fresh")

    def run(self, i, code, whose):
        if i in self.skip and whose == "other":
            return None
        self.remote.say("cell", i, whose, grading.called(code) if isinstance(i, int) else i)
        try:
            return self.remote.ask("run", i, code, whose)[0]
        except grading.Raised as error:
            return str(error)

    def function(self, name):
        return remote_function(self.remote, self.exercise, name) if self.remote.ask("has", name)[0] is True else None

    def names(self):
        return grading.Names(
            self.function,
            lambda without, scene, *args: self.remote.ask("scene", self.exercise, None, without, scene, args)[0],
        )


def remote_function(remote, exercise, name, without=()):
    """A student's function as a check calls it. An array that it changes in place is changed here."""

    def call(*args, **kwargs):
        value, changed = remote.ask("call", exercise, name, without, args, kwargs)
        for i, new in changed.items():
            old = arrays((args, kwargs))[i]
            if (getattr(new, "shape", None), getattr(new, "dtype", None)) != (old.shape, old.dtype):
                raise grading.Raised("it changes the shape or the type of an argument")
            old[...] = new
        return value

    call.there = lambda without, scene, *args: remote.ask("scene", exercise, name, without, scene, args)[0]
    call.without = lambda names: remote_function(remote, exercise, name, names)
    return call


def arrays(value):
    """The arrays in nested tuples, lists and dicts, in order."""
    if isinstance(value, np.ndarray):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return [found for one in inner for found in arrays(one)]


# --- the answers' side


def answers(connection, memory, hidden):
    """Run cells, and call the functions in them, in a process that is theirs."""
    settle(connection)
    grading.ready(hidden)
    if LINUX:
        hide()
    cells = exercise = function = None
    while True:
        try:
            what, *of = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        value, changed = None, ()
        try:
            if what == "fresh":
                cells = grading.Cells(memory)
            elif what == "run":
                value = cells.run(*of)
            elif what == "has":
                value = cells.function(*of) is not None
            else:
                exercise, name, *of = of
                function = cells.function(name) if name else cells.names()
                value, changed = called(function, *of) if what == "call" else (played(function, *of), ())
            reply = ["returned", encoded(value), [[i, encoded(new)] for i, new in changed]]
        except NotImplementedError as error:
            reply = ["unanswered", grading.unanswered(exercise or "", error)]
        except grading.Raised as error:
            reply = ["raised", str(error)]
        except BaseException as error:
            reply = ["raised", grading.complaint(exercise, function, error, memory=memory)]
        connection.send_bytes(json.dumps(reply).encode())


def called(function, without, args, kwargs):
    """What function(*args, **kwargs) returns, and [(i, new)] for the arrays among its arguments that it changed."""
    before = [array.copy() for array in arrays((args, kwargs))]
    value = grading.noticed(function, without)(*args, **kwargs)
    after = enumerate(zip(before, arrays((args, kwargs)), strict=False))
    return value, [(i, new) for i, (old, new) in after if old.tobytes() != new.tobytes()]


def played(function, without, scene, args):
    """What scene(function, *args) returns."""
    return scene(grading.in_scene(function, without), *args)


# --- data


def encoded(value):
    """A value as JSON can hold it. What is neither number, string, array nor a container is only named."""
    if isinstance(value, np.ndarray | np.generic):
        array = np.asarray(value)
        if array.dtype == object:
            return ["objects", array.shape, [encoded(one) for one in array.reshape(-1)]]
        if PLAIN.fullmatch(array.dtype.str):
            kind = "array" if isinstance(value, np.ndarray) else "scalar"
            return [kind, array.dtype.str, array.shape, base64.b64encode(array.tobytes()).decode()]
    elif value is None or isinstance(value, bool | str):
        return value
    elif isinstance(value, int):
        return ["int", hex(value)]
    elif isinstance(value, float):
        return float(value)
    elif isinstance(value, complex):
        return ["complex", value.real, value.imag]
    elif isinstance(value, numbers.Rational):
        return ["fraction", hex(value.numerator), hex(value.denominator)]
    elif isinstance(value, dict):
        return ["dict", [[encoded(key), encoded(one)] for key, one in value.items()]]
    else:
        for kind in CONTAINERS:
            if isinstance(value, kind):
                return [CONTAINERS[kind], [encoded(one) for one in value]]
    return ["other", type(value).__name__, repr(value)[:SENTENCE]]


CONTAINERS = {
    tuple: "tuple",
    list: "list",
    set: "set",
    frozenset: "set",
    range: "list",
    collections.abc.Iterator: "iterator",
    collections.abc.KeysView: "list",
    collections.abc.ValuesView: "list",
    collections.abc.ItemsView: "list",
}


class Other:
    """Stands for an object that is not data."""

    def __init__(self, shown):
        self.shown = shown

    def __repr__(self):
        return self.shown


def decoded(value):
    """The value that was encoded; some exception if it is none."""
    if not isinstance(value, list):
        return value
    kind, *of = value
    if kind in ("array", "scalar"):
        dtype, shape, data = of
        if not PLAIN.fullmatch(dtype):
            raise ValueError(dtype)
        array = np.ndarray(shape, np.dtype(dtype), bytearray(base64.b64decode(data)))
        return array if kind == "array" else array[()]
    if kind == "objects":
        array = np.empty(len(of[1]), object)
        for i, one in enumerate(of[1]):
            array[i] = decoded(one)
        return array.reshape(of[0])
    if kind == "int":
        return int(of[0], 16)
    if kind == "fraction":
        return fractions.Fraction(*(int(n, 16) for n in of))
    if kind == "complex":
        return complex(*of)
    if kind == "dict":
        return {decoded(key): decoded(one) for key, one in of[0]}
    if kind == "other":
        return type(plain(of[0]), (Other,), {})(plain(of[1]))
    return {"tuple": tuple, "list": list, "set": set, "iterator": iter}[kind]([decoded(one) for one in of[0]])


def plain(text):
    """A text on one line, without control characters, of at most SENTENCE characters."""
    text = " ".join(str(text)[:SENTENCE].split())
    return "".join(c if c.isprintable() else "?" for c in text)


# --- processes


CONTEXT = multiprocessing.get_context("fork" if LINUX else "spawn")


def started(target, *args):
    """A new process that runs target(*args)."""
    process = CONTEXT.Process(target=target, args=args)
    with warnings.catch_warnings(action="ignore"):  # BLAS has threads, of which Python 3.12 warns; they survive a fork
        process.start()
    return process


def settle(connection):
    """In a new process: no terminal, no file of its parent's but one connection, and an end with its parent's."""
    faulthandler.disable()  # it would write to pytest's terminal
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    if LINUX:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        for fd in map(int, os.listdir("/proc/self/fd")):
            if fd > 2 and fd != connection.fileno():
                with contextlib.suppress(OSError):  # the folder's own is closed already
                    os.close(fd)
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        setattr(sys, name, os.fdopen(fd, "w" if fd else "r", encoding="utf-8", closefd=False))


def bound(memory):
    """At most so many GB more than this process has now, for it and for each that it starts; and no core dumps."""
    try:
        import resource
    except ImportError:  # on Windows
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if LINUX else 0
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    if memory != float("inf"):
        wanted = used + int(memory * 2**30)
        wanted = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
        with contextlib.suppress(OSError, ValueError):  # macOS refuses
            resource.setrlimit(resource.RLIMIT_AS, (wanted, wanted))


def prctl(option, value):
    """Linux's prctl of one number."""
    ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), 0, 0, 0)


def adopt_orphans(on):
    """Whether a process whose parent has ended becomes a child of this one, if it descends from it."""
    if LINUX:
        prctl(PR_SET_CHILD_SUBREAPER, int(on))


def open_to_others(on):
    """Whether other processes of the same user may reach into this one: its memory, its files, its calls (see ptrace(2))."""
    if LINUX:
        prctl(PR_SET_DUMPABLE, int(on))


def hide():
    """Go on in a child that is the first process of new PID and user namespaces, if the kernel makes them.

    To send a signal it can name no process but its own, and all of those end with it. Root is root there only: it may not reach into
    the processes outside.
    """
    user, group = os.getuid(), os.getgid()
    unshare = ctypes.CDLL(None).unshare
    if not unshare(CLONE_NEWPID | CLONE_NEWUSER):
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with contextlib.suppress(OSError):  # then it does not know its own name, and may do what it might before
                Path(f"/proc/self/{name}").write_text(text)
    elif user or unshare(CLONE_NEWPID):
        return
    if child := os.fork():
        os.closerange(3, 1 << 16)
        os.waitpid(child, 0)
        os._exit(1)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
