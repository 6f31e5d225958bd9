"""The folder in which something is written over and over, disturbed each time; and what is wrong with what lies there then.

What is looked at: what a program that knows nothing of tinylora sees, what tinylora's readers find, what the sentence on an error claims,
and that the same command, given again, ends with the bytes of a run that nothing disturbed and leaves nothing behind.
"""

import contextlib
import hashlib
import io
import os
import re
import shutil
import tempfile
import warnings
from collections import defaultdict
from pathlib import Path

from injector import KILLS, forked
from operations import contents, normal, read

BUG = re.compile("Traceback|a fault of tinylora's own")
TEMPORARY = re.compile(r"\.part\b|\.tmp|/\.saving|/\.saved")


class Workplace:
    """The folder in which an operation is done over and over, as it was before each time; and what it should look like."""

    def __init__(self, operation, folder):
        self.operation, self.root, self.before = operation, folder / "work", folder / "before"
        self.root.mkdir()
        operation.before(self.root)
        (self.root / "tmp").mkdir()
        shutil.copytree(self.root, self.before)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            operation.run(self.root)  # in this process, so that the forked ones find all modules loaded
        self.restore()
        self.old = contents(self.root), self.read()
        self.states = defaultdict(set)  # {file: its contents, one after the other, in a run that nothing disturbs}
        undisturbed = forked(self.run, self.root, before=self._notice)
        assert undisturbed.ended == "returned", undisturbed
        (_, renamed), self.calls = undisturbed.value, undisturbed.calls
        self.new = contents(self.root), self.read()
        for name, digest in [*self.old[0].items(), *self.new[0].items(), *renamed]:
            self.states[name].add(digest)

    def _notice(self):
        """Let the run return, beside its value, each file that was renamed to its place."""
        self.renamed = []
        for name in ("replace", "rename"):
            setattr(os, name, self._noticing(getattr(os, name)))

    def _noticing(self, real):
        def moved(source, target, **more):
            real(source, target, **more)
            if os.path.isfile(target):
                name = os.path.relpath(target, self.root)
                content = normal(name, Path(target).read_bytes())
                self.renamed.append((name, hashlib.sha256(content).hexdigest()[:16]))

        return moved

    def run(self):
        tempfile.tempdir = str(self.root / "tmp")
        value = self.operation.run(self.root)
        return (value if isinstance(value, int) else None), getattr(self, "renamed", [])

    def contents(self):
        return contents(self.root)

    def restore(self):
        shutil.rmtree(self.root)
        shutil.copytree(self.before, self.root)

    def read(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return read(self.root, self.operation)

    def mixed(self):
        """What a program that knows nothing of tinylora finds in the place of the old files or the new ones; "" if all is well."""
        here, own = contents(self.root), set()
        for folder, (head, names) in self.operation.sets.items():
            paths = [f"{folder}/{name}" for name in names]
            own.update(paths)
            states = [{p: s[p] for p in paths if p in s} for s in (self.old[0], self.new[0])]
            there = {p: here[p] for p in paths if p in here}
            if f"{folder}/{head}" in there and there not in states:
                return f"{folder}: {sorted(there)}"
        for name, digest in here.items():
            hidden = any(part.startswith(".") for part in Path(name).parts)
            if not (hidden or name in own or digest in self.states[name] or digest == "an empty folder"):
                return f"{name}, half written or of another run"
        return ""

    def unread(self):
        """A set of files that its reader finds neither as it was nor as it should become; "" if there is none."""
        for folder, found in self.read().items():
            if not (self.root / folder / self.operation.sets[folder][0]).exists():
                found = None  # no reader opens it
            if found not in (self.old[1][folder], self.new[1][folder]):
                return f"{folder}: {found}"
        return ""

    def unlike(self, skip=()):
        """The files that differ from those of a run that nothing disturbed; none if all is well."""
        here, new = ({n: d for n, d in c.items() if n not in skip} for c in (contents(self.root), self.new[0]))
        return sorted(n for n in here.keys() | new.keys() if here.get(n) != new.get(n))


def _sentence(found, work, fault):
    """What is wrong with how a run ended that was told of an error; "" if all is well."""
    said, whole = str(found.value), str(work.root)
    if work.operation.cli:
        status, said = found.value[0] if found.ended == "returned" else None, found.printed
        if found.ended == "raised" or BUG.search(said):
            return f"a traceback: {found.error} {said[-300:]}"
        if status == 0:  # what failed was no part of the result
            return _unlike(work, found)
        if status != 2:
            return f"status {status}: {said[-300:]}"
        said = next((line for line in reversed(said.splitlines()) if line.startswith("tinylora: ")), "")
    elif found.ended == "returned":
        return _unlike(work, found)
    elif "OSError" not in found.error:
        return f"{found.error[0]}: {said}"
    if whole not in said:
        return f"a sentence that names no path: {said!r}"
    if fault.kind in ("EIO", "ENOSPC", "half", "full") and found.fired[0] not in ("unlink", "rmdir"):
        left = [n for n in contents(work.root) if TEMPORARY.search("/" + n)]
        if left and not (".saved" in said and all("/.saved" in "/" + n for n in left)):
            return f"{left} left behind, and said is {said!r}"
    claim = re.search(r"could not write (.+?): .*what was there before is untouched", said)
    if claim and (untouched := _changed(work, claim[1])):
        return f"{untouched} changed, and said is {said!r}"
    return ""


def _unlike(work, found):
    """What differs after a run that ended well; what it could not remove, the next one does."""
    unlike = work.unlike((*work.operation.resumed, *work.operation.asides))
    if found.fired[0] in ("unlink", "rmdir"):
        unlike = [name for name in unlike if not TEMPORARY.search("/" + name)]
    return f"no error, and {unlike} differ" if unlike else ""


def _changed(work, path):
    """The files at a path, or in a folder, that are neither what was there before nor what an earlier step of the run wrote."""
    name = os.path.relpath(path, work.root)
    here = {n: d for n, d in contents(work.root).items() if n == name or n.startswith(name + "/")}
    if name in work.operation.sets:
        names = {f"{name}/{n}" for n in work.operation.sets[name][1]}
        old = {n: d for n, d in work.old[0].items() if n in names}
        return [] if {n: d for n, d in here.items() if n in names} == old else sorted(here)
    if work.states[name] == {work.old[0].get(name), work.new[0].get(name)} - {None}:  # written once
        return [] if here.get(name) == work.old[0].get(name) else [name]
    return []


def wrong(work, fault, found):
    """(the column of the table, what went wrong), or (column, "")."""
    if found.ended == "hung":
        return "hangs", "it hung"
    if found.ended == "killed" and fault.kind not in KILLS:
        return "crashes", f"ended by signal {found.value}"
    column = "same"
    if mixed := work.mixed():
        return "mixed", mixed
    if fault.kind not in KILLS:
        column = "sentences"
        if problem := _sentence(found, work, fault):
            return "left behind" if "left behind" in problem else "tracebacks", problem
    end, problem = given_again(work)
    return (end, problem) if problem else (column, "")


def given_again(work):
    """(how it ended, what is wrong) with what readers find, and with what lies there once the command has been given again."""
    if unread := work.unread():
        return "mixed", unread
    again = forked(work.run, work.root)
    if again.ended != "returned" or again.value[0] not in (None, 0):
        return "tracebacks", f"given again: {again}"
    if unlike := work.unlike(work.operation.resumed):
        what = "left behind" if any(n not in work.new[0] for n in unlike) else "mixed"
        return what, f"given again, {unlike} are not those of a run that nothing disturbed"
    return "same", ""
