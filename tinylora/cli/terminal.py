"""What reaches the terminal, and what happens where there is none.

    attached()     standard input, output and error for as long as a command runs: those that are closed lead to the null device,
                   those that fail are remembered and what is printed after that is dropped, and a real terminal sees no control characters
    say(text)      a sentence on standard error, printable and on one line
    stream(text)   a piece of a text as it grows; Lost if nobody can read it any more
    signals()      Ctrl-C and SIGTERM end a command as exceptions, which its `finally` blocks see

A command goes on when standard output fails, because what it writes to files is still wanted; its exit status says afterwards
what was lost. What fails on standard error is lost without a word: there is no other place to say it.
"""

import contextlib
import errno
import os
import signal
import sys
import threading

from ..costs.tables import escaped, printable


class Lost(Exception):
    """Nobody reads what is printed; `lost` knows why."""


class Terminated(BaseException):
    """SIGTERM, as KeyboardInterrupt is Ctrl-C."""


class Output:
    """A stream that does not fail: its first error is kept as `error`, and what is written after it is dropped.

    On a terminal control characters other than newline and tab are written as escapes ("\\x1b"), so that no name in a file and
    no model can clear the screen or rename the window. Into a file or a pipe everything goes as it is. Progress bars move the
    cursor, so that standard error is not `guarded`; what is said there goes through `say`.
    """

    def __init__(self, stream, guarded, closed=False):
        self.stream, self.closed_before, self.error = stream, closed, None
        self.guarded = guarded and stream.isatty()

    def write(self, text):
        if text and self.closed_before:
            self.error = self.error or OSError(errno.EBADF, "it is closed")
        self._try(lambda: self.stream.write(escaped(text, keep="\n\t") if self.guarded else text))
        return len(text)

    def flush(self):
        self._try(self.stream.flush)

    def _try(self, act):
        if self.error is None:
            try:
                act()
            except OSError as error:
                self.error = error
                _drop(self.stream)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def _drop(stream):
    """Let what is still in the buffer of a standard stream go to the null device, where Python's last flush cannot fail."""
    with contextlib.suppress(OSError, ValueError):
        if (number := stream.fileno()) in (1, 2):
            with open(os.devnull, "w") as null:
                os.dup2(null.fileno(), number)


@contextlib.contextmanager
def attached():
    """Put the two Outputs in the place of standard output and error, and open what is closed; gives that of standard output."""
    closed = _open_closed()
    before = sys.stdout, sys.stderr
    for stream in before:  # a terminal may not know the character
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    if hasattr(sys.stdin, "reconfigure"):  # what is no text is refused where it is read, with the line that holds it
        sys.stdin.reconfigure(errors="surrogateescape")
    sys.stdout, sys.stderr = out, err = Output(before[0], True, "stdout" in closed), Output(before[1], False)
    try:
        yield out
    finally:
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = before


def _open_closed():
    """Open the null device where descriptors 0 to 2 are closed, or else the next file that is opened is standard error."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
    closed = [name for name in ("stdin", "stdout", "stderr") if getattr(sys, name) is None]
    for name in closed:
        setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115
    return closed


def say(text):
    """A sentence on standard error."""
    print(f"tinylora: {printable(text)}", file=sys.stderr, flush=True)


def stream(text):
    """Print a piece of a text that grows; Lost once that has failed."""
    print(text, end="", flush=True)
    if getattr(sys.stdout, "error", None):
        raise Lost


def lost(out, in_files):
    """Why what was printed is lost, or None: a reader who has seen enough of a pipe lost nothing.

    in_files    the command's result lies in files: then a standard output that was closed from the beginning was not wanted
    """
    out.flush()
    if out.error is None or isinstance(out.error, BrokenPipeError) or (out.closed_before and in_files):
        return None
    return f"could not write to standard output: {out.error.strerror or out.error}"


# ------------------------------------------------------------------------------------------------------------------ signals
PATIENCE = 5.0  # seconds after which a command that still runs is told once more


@contextlib.contextmanager
def signals():
    """Ctrl-C raises KeyboardInterrupt, SIGTERM Terminated, where nobody else has decided what they do (or to ignore them).

    An exception that comes while an object is being deleted goes nowhere, and a library may swallow it: it comes again.
    An object whose `__init__` it cut short may fail when it is deleted: that is the signal's doing, and is not reported.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stopping = []  # the signals that came

    def stop(number, frame):
        stopping.append(number)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        _raise_later(Terminated, PATIENCE)
        raise Terminated

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ours = [number for number, handler in before.items() if handler in (signal.SIG_DFL, signal.default_int_handler)]
    hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: _unraised(unraisable, bool(stopping))
    for number in ours:
        signal.signal(number, stop)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        if hasattr(signal, "SIGALRM") and isinstance(signal.getsignal(signal.SIGALRM), _Again):
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
        for number in ours:
            signal.signal(number, before[number])


def _raise_later(kind, seconds):
    """Raise an exception in the main thread after so many seconds, and again; not where somebody else has a use for the alarm."""
    if not hasattr(signal, "SIGALRM"):  # Windows
        return
    now = signal.getsignal(signal.SIGALRM)
    if now == signal.SIG_DFL or isinstance(now, _Again):
        signal.signal(signal.SIGALRM, _Again(kind))
        signal.setitimer(signal.ITIMER_REAL, seconds)


class _Again:
    """The alarm's handler: raises an exception, and arms the alarm once more."""

    def __init__(self, kind):
        self.kind = kind

    def __call__(self, number, frame):
        _raise_later(self.kind, PATIENCE)
        raise self.kind


def _unraised(unraisable, stopping):
    """Python's report of an exception that went nowhere, but for those of a signal and of the objects that it left half built."""
    if issubclass(unraisable.exc_type, (KeyboardInterrupt, Terminated)):
        _raise_later(unraisable.exc_type, 0.01)
    elif not (stopping and getattr(unraisable.object, "__name__", None) == "__del__"):
        sys.__unraisablehook__(unraisable)
