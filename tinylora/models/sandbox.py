"""A process with limits, in which a program that came with a stranger's file is run: it may fail, hang, or ask for memory without end.

    parent    run(template, conversations)    their texts; or Stopped, which says what the template did
    child     python sandbox.py               reads templates and conversations and writes texts, each as a length and so much JSON

The child holds Python and jinja2, and nothing of the parent's. It ends when a text takes longer than SECONDS or the parent is gone,
gets no more than MEMORY (where the system obeys RLIMIT_AS, as Linux does), and opens and writes no file once it has begun. The first
template starts it, in about 0.1 s, and the next ones go to the same. Where no process can be started, as in a browser, the parent
runs a template by itself, without limits.

What the child does with a chat template is what transformers does (utils/chat_template_utils.py there): jinja2's immutable sandbox,
blocks trimmed, `break` and `continue`, `tojson` without HTML's escapes, `raise_exception`, `strftime_now`, and `{% generation %}`
around what the assistant says.
"""

import atexit
import contextlib
import functools
import json
import os
import sys
import threading
import time
from datetime import datetime

SECONDS = 5  # that one text may take
MEMORY = 2**30  # bytes that the child may have
LEAST, GROWTH = 2**16, 20  # characters that a text may have, and how many for each of what its conversation has as JSON
MOST = 2**26  # bytes that an answer may have, of all texts that were asked for at once
_TOO_MUCH = 77  # the exit status of a child that has used up one or the other


class Stopped(Exception):
    """A template that gave no answer; says what it did."""


# ---------------------------------------------------------------------------------------------------------------- in the parent
class _Child:
    """The process, and the pipes to it."""

    def __init__(self):
        import subprocess

        command = [sys.executable, "-I", "-S", __file__, str(SECONDS), *filter(None, sys.path)]
        pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nowhere)
        self.template = None  # the one that it was sent last

    def answer(self, template, conversations):
        source = b"" if template == self.template else json.dumps(template).encode("ascii")
        self.template = template
        _send(self.process.stdin, source, conversations)
        return json.loads(_receive(self.process.stdout, MOST))

    def end(self, patience=0):
        """Its exit status. It is ended if it has not ended by itself after so many seconds."""
        with contextlib.suppress(Exception):
            self.process.wait(patience)
        self.process.kill()
        self.process.communicate()
        return self.process.returncode


_child, _lock = None, threading.Lock()


def run(template, conversations):
    """[{"text", "spans"} or {"error", "line"}]: what `_render` makes of a template's text and each of some conversations.

    Stopped if it takes too long or too much memory; OSError if no process can be started.
    """
    global _child
    if sys.platform in ("emscripten", "wasi") or not sys.executable:
        return [_render(template, conversation) for conversation in conversations]
    conversations = json.dumps(conversations).encode("ascii")
    with _lock:
        if _child is None or _child.process.poll() is not None:
            _child = _Child()
        child, began = _child, time.monotonic()
        try:
            return child.answer(template, conversations)
        except (OSError, EOFError):
            _child, waited, status = None, time.monotonic() - began, child.end(patience=1)
        except BaseException:  # an interrupted answer may still come, and is no one's
            _child = None
            child.end()
            raise
    if waited >= SECONDS:
        raise Stopped(f"takes longer than {SECONDS} seconds")
    if status == _TOO_MUCH:
        raise Stopped(
            f"needs more than {MEMORY >> 20} MiB of memory, or writes more than {GROWTH} times the conversation"
        )
    raise Stopped(f"ends the process that runs it (exit status {status})")


@atexit.register
def _end():
    global _child
    if _child is not None:
        _child.end()
    _child = None


def _forget():
    """In a process that was forked from this one: the child is the other's."""
    global _child, _lock
    _child, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


# --------------------------------------------------------------------------------------------------------------------- the pipes
def _send(pipe, *messages):
    for data in messages:
        pipe.write(b"%d\n" % len(data) + data)
    pipe.flush()


def _receive(pipe, most=sys.maxsize):
    """The bytes of the next message. EOFError at the end of the pipe, and if it has more than `most`."""
    size = int(pipe.readline(20) or -1)
    data = pipe.read(size) if 0 <= size <= most else b""
    if len(data) != size:
        raise EOFError
    return data


# ----------------------------------------------------------------------------------------------------------------- in the child
def _serve():
    """Answer until the parent closes its pipe."""
    asked, answers, template = sys.stdin.buffer, sys.stdout.buffer, None
    start, stop = _clock(float(sys.argv[1]))
    sys.path += sys.argv[2:]
    _limit()
    while True:
        try:
            source, conversations = _receive(asked), _receive(asked)
        except EOFError:
            return
        start()
        try:
            template, texts = json.loads(source) if source else template, []
            for conversation in json.loads(conversations):
                texts.append(_render(template, conversation))
                start()
            answer = json.dumps(texts).encode("ascii")
        except MemoryError:
            os._exit(_TOO_MUCH)
        if len(answer) > MOST:
            os._exit(_TOO_MUCH)
        _send(answers, answer)
        stop()


def _clock(seconds):
    """(start, stop) of a clock that ends this process after so many seconds, whatever it is doing then."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
        return functools.partial(signal.setitimer, signal.ITIMER_REAL, seconds), functools.partial(signal.alarm, 0)
    import faulthandler

    nowhere = open(os.devnull, "w")  # noqa: SIM115 (it stays open)
    return (
        functools.partial(faulthandler.dump_traceback_later, seconds, exit=True, file=nowhere),
        faulthandler.cancel_dump_traceback_later,
    )


def _limit():
    """No more memory than MEMORY, no new file, no core dump. What Python opens late is opened now."""
    import html.entities  # noqa: F401 (for the filter striptags)
    import pprint  # noqa: F401 (for pprint)
    import textwrap  # noqa: F401 (for wordwrap)

    import jinja2.constants  # (for lipsum)
    import jinja2.debug  # noqa: F401 (for errors)

    _compiled("{{ 'a' }}")  # which opens the codec of texts in templates

    with contextlib.suppress(ImportError):  # Windows has none
        import resource

        for name, most in (("AS", MEMORY), ("CORE", 0), ("FSIZE", 0), ("NOFILE", 3)):
            with contextlib.suppress(AttributeError, OSError, ValueError):
                resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))


def _render(template, conversation):
    """{"text", "spans"} of a conversation, or {"error", "line"}.

    conversation    {"messages", "variables", "now": the time that strftime_now writes, as ISO 8601}
    text            of no more than LEAST characters beside the template's own, and GROWTH for each of the conversation's
    spans           (start, end) of what {% generation %} marks; none where that stands in a macro or in a text that is set aside
    """
    pieces, marked, room = [], [], LEAST + len(template) + GROWTH * len(json.dumps(conversation))
    try:
        compiled = _compiled(template)
        compiled.environment.generation.watch(pieces, marked)
        now = datetime.fromisoformat(conversation["now"])
        variables = {"strftime_now": lambda form: now.strftime(form), **conversation["variables"]}
        for piece in compiled.generate(messages=conversation["messages"], **variables):
            pieces.append(piece)
            room -= len(piece)
            if room < 0:
                raise MemoryError
    except MemoryError:
        raise
    except Exception as error:  # a template is a program and may fail in any way
        what = " ".join(str(error)[:1000].split()) or type(error).__name__
        return {"error": what, "line": getattr(error, "lineno", None)}
    text = "".join(pieces)
    found = all(text.startswith(said, start) for start, said in marked)
    return {"text": text, "spans": [(start, start + len(said)) for start, said in marked] if found else []}


@functools.cache
def _environment():
    """The sandbox in which templates run."""
    import jinja2
    from jinja2 import ext, nodes, sandbox

    class Generation(ext.Extension):
        """{% generation %}…{% endgeneration %}: notes where in the output it begins, and what it is."""

        tags = {"generation"}  # noqa: RUF012 (jinja2's way to name them)

        def __init__(self, environment):
            super().__init__(environment)
            environment.extend(generation=self)
            self.pieces = self.marked = None

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.CallBlock(self.call_method("note"), [], [], body).set_lineno(line)

        def note(self, caller):
            self.marked.append((sum(map(len, self.pieces)), text := caller()))
            return text

        def watch(self, pieces, marked):
            self.pieces, self.marked = pieces, marked

    class Namespace(jinja2.utils.Namespace):
        """jinja2's, without names that begin with an underscore: they reach into the interpreter."""

        def __init__(*args, **values):
            self, *positional = args
            for name in (values := dict(*positional, **values)):
                Namespace.check(name)
            jinja2.utils.Namespace.__init__(self, values)

        def __setitem__(self, name, value):
            Namespace.check(name)
            super().__setitem__(name, value)

        @staticmethod
        def check(name):
            if isinstance(name, str) and name.startswith("_"):
                raise jinja2.exceptions.SecurityError(
                    f"a namespace holds no name with an underscore in front: {name!r}"
                )

    class Dict:
        """dict without its attributes."""

        def __call__(self, *args, **values):
            return dict(*args, **values)

        def fromkeys(self, *args):
            return dict.fromkeys(*args)

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "namespace": Namespace, "dict": Dict()}
    return environment


@functools.lru_cache(maxsize=32)
def _compiled(source):
    return _environment().from_string(source)


if __name__ == "__main__":
    _serve()
