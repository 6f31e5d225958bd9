"""Faults on purpose: a process that is killed, or told that the disk is full, at the k-th call that changes files under a folder.

    found = forked(run, root=folder)                              undisturbed: found.calls = [("open", path), ("write", path), …]
    found = forked(run, root=folder, fault=Fault(3, "inside"))    the same, killed within the fourth of them

Everything that Python writes goes through these calls: pathlib calls `os` and `io.open`, and a file is a `File` here, whose `write` is the
system call (after the buffer). What writes in C goes around it: of what tinylora uses, only `ndarray.tofile` in the gguf package, whose
arrays get a `tofile` of Python's. The process is a fork of this one, so that a thousand of them take seconds.
"""

import contextlib
import errno
import io
import json
import os
import select
import signal
import sys
import threading
import time
from dataclasses import dataclass, field

import tqdm

KILLS = ("before", "inside", "after")  # SIGKILL before the call, when half of what it writes is written, and after it
ERRORS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "half": errno.ENOSPC, "full": errno.ENOSPC}
ROOM = ("open", "write", "mkdir", "truncate", "fallocate", "tofile")  # calls that a full disk refuses


@dataclass(frozen=True)
class Fault:
    """What happens at the call of this number: one of KILLS or of ERRORS.

    half   half of what is to be written is, and then the disk is full
    full   the disk is full from here on
    """

    at: int
    kind: str

    @staticmethod
    def all(calls):
        """Every fault that can be done at these calls."""
        kinds = {True: (*KILLS, *ERRORS), False: ("before", "after", "EIO", "ENOSPC")}
        room = {True: ("full",), False: ()}
        return [
            Fault(at, kind)
            for at, (name, _) in enumerate(calls)
            for kind in dict.fromkeys(kinds[name == "write"] + room[name in ROOM])
        ]


@dataclass
class Found:
    """How a forked process ended.

    ended    "returned", "raised" (an exception came out), "killed" (by a signal), "hung" (past its deadline)
    value    what it returned, if JSON can say it, or the exception's text; the number of the signal
    error    the name of the exception's class, and of those that it is derived from
    printed  what it wrote to the terminal
    calls    [(call, path)] that it made under the root
    fired    the call at which the fault happened, None if it ended before
    """

    ended: str
    value: object = None
    error: list = field(default_factory=list)
    printed: str = ""
    calls: list = field(default_factory=list)
    fired: list | None = None


class Shim:
    """Counts the calls of this process that change something under `root`, and does the fault at one of them."""

    def __init__(self, root, fault, tell, reads=False):
        self.root, self.fault, self.tell, self.reads, self.calls = os.path.realpath(root), fault, tell, reads, []
        self.handles = set()  # of files under the root

    def install(self):
        """From now on, in this process; there is no way back."""
        real = {name: getattr(os, name) for name in ("open", "write")}
        io.open = self._opened(io.open)
        sys.modules["builtins"].open = io.open
        os.open = self._os_open(real["open"])
        os.fsync = lambda handle: self.call("fsync", handle, lambda: None)  # no power is cut here: the disk is spared
        os.write = self._os_write(real["write"])
        for name in ("rename", "replace", "link", "symlink"):
            setattr(os, name, self._counted(name, getattr(os, name), place=1))
        for name in ("unlink", "remove", "rmdir", "mkdir", "chmod", "utime", "truncate"):
            setattr(os, name, self._counted(name, getattr(os, name)))
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate = self._counted("fallocate", os.posix_fallocate)
        import shutil

        shutil._USE_CP_SENDFILE = shutil._HAS_FCOPYFILE = False  # copies are written by `write`
        return self

    def under(self, path):
        """Whether a path, or an open file, lies under the root."""
        if isinstance(path, int):
            return path in self.handles
        path = os.path.abspath(os.fsdecode(path))
        return path == self.root or path.startswith(self.root + os.sep)

    def call(self, name, path, real, half=None):
        """Count a call and make it, or do the fault."""
        at = len(self.calls)
        self.calls.append((name, os.fsdecode(path) if not isinstance(path, int) else f"handle {path}"))
        kind = None
        if self.fault is not None and at >= self.fault.at:
            kind = self.fault.kind if at == self.fault.at or (self.fault.kind == "full" and name in ROOM) else None
        if kind is None:
            return real()
        if at == self.fault.at:
            self.tell(fired=self.calls[-1])
        if kind in ("inside", "half") and half is not None:
            half()
        if kind in ("before", "inside"):
            os.kill(os.getpid(), signal.SIGKILL)
        if kind in ERRORS:
            named = [] if isinstance(path, int) or name in ("write", "read") else [os.fsdecode(path)]
            raise OSError(ERRORS[kind], os.strerror(ERRORS[kind]), *named)
        result = real()
        os.kill(os.getpid(), signal.SIGKILL)
        return result

    def _counted(self, name, real, place=0):
        def called(*args, **kwargs):
            inside = any(kwargs.get(k) is not None for k in ("dir_fd", "src_dir_fd", "dst_dir_fd"))
            if not (inside or self.under(args[place])):
                return real(*args, **kwargs)
            return self.call(name, args[place], lambda: real(*args, **kwargs))

        return called

    def _os_open(self, real):
        def opened(path, flags, *args, **kwargs):
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if not writes or not (kwargs.get("dir_fd") is not None or self.under(path)):
                return real(path, flags, *args, **kwargs)
            handle = self.call("open", path, lambda: real(path, flags, *args, **kwargs))
            self.handles.add(handle)
            return handle

        return opened

    def _os_write(self, real):
        def written(handle, data):
            if handle not in self.handles:
                return real(handle, data)
            half = memoryview(data).cast("B")[: len(data) // 2]
            return self.call("write", handle, lambda: real(handle, data), lambda: real(handle, half))

        return written

    def _opened(self, real):
        """io.open, whose files under the root are Files when they are written."""

        def opened(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None):
            writes = set(mode) & set("wxa+")
            if not (writes or self.reads) or not self.under(file):
                return real(file, mode, buffering, encoding, errors, newline, closefd, opener)
            plain = mode.replace("b", "").replace("t", "")
            raw = self.call("open", file, lambda: File(self, file, plain, closefd, opener))
            if buffering == 0:
                return raw
            buffered = (io.BufferedRandom if "+" in mode else io.BufferedWriter if writes else io.BufferedReader)(raw)
            if "b" in mode:
                return buffered
            text = io.TextIOWrapper(buffered, encoding, errors, newline, buffering == 1)
            text.mode = mode
            return text

        return opened


class File(io.FileIO):
    """A file whose writes are counted, and its reads where the shim counts those."""

    def __init__(self, shim, path, mode, closefd, opener):
        super().__init__(path, mode, closefd=closefd, opener=opener)
        self.shim, self.path = shim, path
        shim.handles.add(self.fileno())

    def write(self, data):
        view = memoryview(data).cast("B")
        whole, half = (lambda: io.FileIO.write(self, view)), (lambda: io.FileIO.write(self, view[: len(view) // 2]))
        return self.shim.call("write", self.path, whole, half)

    def readinto(self, buffer):
        return self._counted(lambda: io.FileIO.readinto(self, buffer))

    def readall(self):
        return self._counted(lambda: io.FileIO.readall(self))

    def read(self, size=-1):
        return self._counted(lambda: io.FileIO.read(self, size))

    def _counted(self, real):
        return self.shim.call("read", self.path, real) if self.shim.reads else real()

    def truncate(self, size=None):
        return self.shim.call("truncate", self.path, lambda: io.FileIO.truncate(self, size))


def _python_writes_ggufs():
    """Let the gguf package write its tensors with the file's `write`."""
    import numpy as np

    from tinylora.models import gguf_writer

    class Written(np.ndarray):
        def tofile(self, file):
            file.write(self.tobytes())

    packed = gguf_writer._packed
    gguf_writer._packed = lambda *args: packed(*args).view(Written)


class Process:
    """A fork of this process in which `run()` is called, after `before()`; `wait` says how it ended.

    root, fault   see the module; without a root nothing is counted
    reads         count what is read, too
    """

    def __init__(self, run, root=None, fault=None, before=None, reads=False):
        self.reader, writer = os.pipe()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self.id = os.fork()
        if self.id == 0:
            os.close(self.reader)
            _child(run, root, fault, before, reads, writer, os.write)
        os.close(writer)

    def lines(self, deadline=20):
        """What the process tells, one object at a time; TimeoutError if it has not told the next one within so many seconds."""
        rest = b""
        while True:
            if not select.select([self.reader], [], [], deadline)[0]:
                raise TimeoutError
            more = os.read(self.reader, 1 << 16)
            if not more:
                return
            *whole, rest = (rest + more).split(b"\n")
            yield from map(json.loads, whole)

    def send(self, number):
        """Send a signal, if the process is still there."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.id, number)

    def wait(self, deadline=60):
        """The Found; a process that takes longer than its deadline is killed and has hung."""
        found, until = Found("killed"), time.monotonic() + deadline
        try:
            for told in self.lines(deadline):
                vars(found).update(told)
                if time.monotonic() > until:
                    raise TimeoutError
        except TimeoutError:
            self.send(signal.SIGKILL)
            found.ended = "hung"
        os.close(self.reader)
        status = os.waitstatus_to_exitcode(os.waitpid(self.id, 0)[1])
        if found.ended == "killed":
            found.value = -status
        return found


def forked(run, root=None, fault=None, before=None, reads=False, deadline=60):
    """How `run()` ends in a process of its own; see Process."""
    return Process(run, root, fault, before, reads).wait(deadline)


def _child(run, root, fault, before, reads, writer, write):
    """Run, tell how it ended, and leave without anything that Python does at the end of a process."""
    printed = sys.stdout = sys.stderr = io.StringIO()
    # tqdm's own lock is one for all forks together: a fork that is killed while it holds it stops the others, and their parent, for ever
    tqdm.tqdm.set_lock(threading.RLock())
    shim = None

    def tell(**what):
        line = json.dumps(what, default=str).encode("utf-8", "replace") + b"\n"
        while line:
            line = line[write(writer, line) :]

    try:
        if before is not None:
            before()
        if root is not None:
            if "gguf" in sys.modules:
                _python_writes_ggufs()
            shim = Shim(root, fault, tell, reads)
            shim.install()
        try:
            value = run(tell) if getattr(run, "tells", False) else run()
            how = {"ended": "returned", "value": value}
        except BaseException as error:
            names = [c.__name__ for c in type(error).__mro__]
            how = {"ended": "raised", "value": str(error), "error": names}
        tell(**how, printed=printed.getvalue(), calls=shim.calls if shim else [])
        os._exit(0)
    finally:
        os._exit(70)
