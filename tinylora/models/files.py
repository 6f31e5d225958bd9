"""Files that are written whole or not at all, one by one or as a set; and files that are read with care.

    with atomic(path) as temporary: …          one file: written beside, synced, and renamed over the old one
    with whole_folder(folder) as new: …        files that belong together: all of them become the folder's, or none
    with locked(folder): …                     one process at a time

`whole_folder` keeps SQLite's habit. The new files are written and synced in a folder of their own, which one rename then
calls `.saved`: that is the moment at which the save has happened. Only now are they moved to their places, and the file by
which the folder is known (config.json) leaves first and comes last, so that no program ever opens a mixture. Whoever is
killed before `.saved` exists has changed nothing; whoever is killed after it is finished by the next reader (`settle`).
"""

import contextlib
import errno
import glob
import json
import os
import stat
import threading
import time
from pathlib import Path

from .fields import shown

SAVED = ".saved"  # a whole save, of which not every file is in its place yet
_PLAN = ".plan.json"  # in it: {"head": the file by which the folder is known, "remove": names that the save leaves out}
_JSON_LIMIT, _MOST_VALUES = 256 << 20, 1 << 25  # bytes; values of JSON, of which an empty one takes sixty bytes


# ---------------------------------------------------------------------------------------------------------------------- one file
@contextlib.contextmanager
def atomic(path, mode=None):
    """A temporary path beside `path` that becomes `path` if the block succeeds and disappears if it does not.

    A file that was there before keeps its permissions, and one that is reached by a link is replaced where it lies.

    mode   the permissions of a file that is not there (what the system gives to new ones)
    """
    path = Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)
    temporary, made = path.with_name(f".{path.name}.{os.getpid()}.part"), []
    try:
        _make(path.parent, made)
        if path.exists() and not path.is_file():
            raise OSError("it is a folder, a pipe or a device; expected a file, or a name that is free")
        _remove_stale(path.parent, f".{path.name}.")
        before = mode if (found := permissions(path)) is None else found
        temporary.touch(0o666 if before is None else 0o600)
        mode = stat.S_IMODE(temporary.stat().st_mode) if before is None else before
        yield str(temporary)
        _sync(temporary)
        os.chmod(temporary, mode)  # last: it may allow nobody to write
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        _remove(temporary)
        _unmake(made)
        if isinstance(error, OSError):
            raise OSError(f"could not write {path}: {error}; what was there before is untouched") from error
        raise


def permissions(path):
    """The permissions of a file; None if there is none."""
    try:
        return stat.S_IMODE(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _make(folder, made):
    """Make a folder and those above it that are not there; each that was made is put before the others in the list `made`."""
    if not folder.is_dir():
        if folder.parent != folder:
            _make(folder.parent, made)
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            made.insert(0, folder)


def _unmake(made):
    """Remove the folders that `_make` has made, as far as nothing lies in them."""
    for folder in made:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _remove_stale(folder, start):
    """Remove what processes left that were killed while they wrote: START<process>.part, a file or a folder."""
    for stale in folder.glob(f"{glob.escape(start)}*.part"):
        if not _alive(stale.name.removeprefix(start).removesuffix(".part")):
            _remove(stale)


def _remove(path):
    """Remove a file or a folder, and be content if it cannot be."""
    import shutil

    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _alive(pid):
    """Whether another process of that number runs; True where it cannot be told."""
    if os.name != "posix" or not pid.isdigit() or len(pid) > 10:
        return True
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return int(pid) != os.getpid()


def _sync(path):
    with open(path, "rb+") as f:
        os.fsync(f.fileno())


def _sync_folder(folder):
    """Make a rename survive a power cut; not every system lets a folder be opened for that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path, text, mode=None):
    """Write a UTF-8 text file atomically. See `atomic` for mode."""
    with atomic(path, mode) as temporary:
        Path(temporary).write_text(text, encoding="utf-8", newline="\n")


def write_json(path, value, mode=None):
    """Write indented JSON atomically. See `atomic` for mode."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", mode)


# ------------------------------------------------------------------------------------------------------- files that belong together
@contextlib.contextmanager
def whole_folder(folder, head="config.json", replaces=()):
    """An empty folder; the files that the block writes there become `folder`'s together if it succeeds, and none of them if not.

    head       the file by which the folder is known: a reader without it refuses the folder
    replaces   names of files that belong to what is saved: those that the block does not write are removed with the old ones

    Other files of `folder` stay as they are.
    """
    folder, made = Path(os.path.realpath(folder)), []
    try:
        new = not folder.exists()
        beside, start = (folder.parent, f".{folder.name}.") if new else (folder, ".saving.")
        _make(beside, made)
        settle(folder)
        _remove_stale(folder.parent, f".{folder.name}.")
        _remove_stale(beside, start)
    except OSError as error:
        _unmake(made)
        raise _unwritten(folder, error, saved=False) from error
    prepared, saved = beside / f"{start}{os.getpid()}.part", False
    try:
        prepared.mkdir()
        yield prepared
        names = [entry.name for entry in prepared.iterdir()]
        for name in names:
            _sync(prepared / name)
        if new:
            _sync_folder(prepared)
            new = _renamed(prepared, folder)
        if not new:
            remove = sorted(set(replaces) - set(names))
            (prepared / _PLAN).write_text(json.dumps({"head": head, "remove": remove}), encoding="utf-8")
            _sync(prepared / _PLAN)
            _sync_folder(prepared)
            with locked(folder, wait=30):
                settle(folder)
                for name in names:  # not before: another save takes the head away for a moment
                    if (mode := permissions(folder / name)) is not None:
                        os.chmod(prepared / name, mode)
                os.replace(prepared, folder / SAVED)
                saved = True
                _sync_folder(folder)
                _move_in(folder)
    except BaseException as error:
        _remove(prepared)
        _unmake(made)
        if isinstance(error, OSError):
            raise _unwritten(folder, error, saved) from error
        raise


def _unwritten(folder, error, saved):
    """The sentence on a save that failed, which says how the folder is now. saved: whether it had happened all the same."""
    left = "what was there before is untouched"
    if saved and not set(_listed(folder / SAVED)) - {_PLAN}:
        left = f"the new files are in their places, and {folder / SAVED} is no longer needed"
    elif saved:
        left = (
            f"the new files lie in {folder / SAVED}, and what opens or writes the folder next puts them in their places"
        )
    # `atomic` says of its file what this sentence says of the folder.
    first = error.__cause__ if isinstance(error.__cause__, OSError) else error
    return OSError(f"could not write {folder}: {first}; {left}")


def _listed(folder):
    """The names in a folder, or none if it cannot be read."""
    with contextlib.suppress(OSError):
        return os.listdir(folder)
    return []


def _renamed(prepared, folder):
    """Whether a folder that is prepared has become `folder`; False if another process has made it meanwhile."""
    if folder.exists():  # even an empty one: a rename would take it from the process that holds it
        return False
    try:
        os.rename(prepared, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EACCES) or not folder.is_dir():
            raise
        return False
    _sync_folder(folder.parent)
    return True


def settle(folder):
    """Finish a save of this folder that was killed after all of it was written. Every reader of a folder calls it first."""
    folder = Path(folder)
    if not os.path.lexists(folder / SAVED):
        return
    try:
        with locked(folder, wait=30):
            if os.path.lexists(folder / SAVED):
                _move_in(folder)
    except OSError as error:
        raise OSError(
            f"{folder}: a save was interrupted after its files were written to {folder / SAVED}, and they could not be put in "
            f"their places: {error}"
        ) from error


def _move_in(folder):
    """Put the files of `.saved` in their places. It may be killed at any point and done again."""
    saved = folder / SAVED
    if saved.is_symlink() or not saved.is_dir():
        raise OSError(f"{saved} is not a folder; expected one that a save left")
    names = sorted(entry.name for entry in saved.iterdir())
    if _PLAN in names:
        plan = read_json(saved / _PLAN)
        head, remove = plan.get("head"), plan.get("remove")
        if not (isinstance(remove, list) and all(map(is_plain_name, [head, *remove]))):
            raise OSError(f"{saved / _PLAN} is damaged: expected names of files, found {shown(plan)}")
        names.remove(_PLAN)
        for name in ([head] if head in names else []) + remove:
            (folder / name).unlink(missing_ok=True)
        for name in sorted(names, key=head.__eq__):  # the head comes last
            os.replace(saved / name, folder / name)
        _sync_folder(folder)
        (saved / _PLAN).unlink()
    saved.rmdir()
    _sync_folder(folder)


def is_plain_name(name):
    """Whether this is the name of a file in a folder, and not a way out of it, on any system."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\\", ":", "\0"}


# -------------------------------------------------------------------------------------------------------------------------- locks
_held = {}  # {folder: thread} of this process; a thread that has the lock may take it again
_guard = threading.Lock()


@contextlib.contextmanager
def locked(folder, wait=0):
    """Hold a folder against other processes (and threads), and make it if it is not there. An empty one is not left behind.

    wait   seconds for which to try; then BlockingIOError with a sentence. The system lets go of the lock of a process that ends,
           however it ends. Where there is no flock (Windows, some network file systems), nothing is held.
    """
    folder = Path(os.path.realpath(folder))
    with _guard:
        again = _held.get(folder) == threading.get_ident()
    if again:
        yield
        return
    made = []
    try:
        handle = _flocked(folder, time.monotonic() + wait, made)
    except BaseException:
        _unmake(made)
        raise
    try:
        with _guard:
            _held[folder] = threading.get_ident()
        yield
    finally:
        with _guard:
            _held.pop(folder, None)
        _unmake(made)
        if handle is not None:
            os.close(handle)


def _flocked(folder, until, made):
    """An open handle on a folder that this process alone has locked; None where folders cannot be locked. See `_make` for `made`."""
    try:
        import fcntl
    except ImportError:
        fcntl = None
    while True:
        _make_target(folder, made)
        if fcntl is None:
            return None
        try:
            handle = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # the process that had made it has removed it just now
            continue
        locked = False
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = _is_at(handle, folder)
        except BlockingIOError:
            if time.monotonic() >= until:
                raise BlockingIOError(
                    f"{folder} is being written by another run; wait until it has ended, or choose another folder"
                ) from None
            time.sleep(0.05)
        except OSError:  # a file system without locks
            return None
        finally:
            if not locked:
                os.close(handle)
        if locked:
            return handle


def _is_at(handle, folder):
    """Whether a folder is the one that is open, and no other that was made in its place."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(folder))
    except FileNotFoundError:
        return False


def _make_target(folder, made):
    """`_make` a folder that is to be written; OSError with a sentence where that cannot be."""
    try:
        _make(folder, made)
    except OSError as error:
        raise OSError(f"could not write {folder}: {error}") from error
    if not folder.is_dir() and folder.exists():
        raise OSError(f"could not write {folder}: it is a file; expected a folder, or a name that is free")


def check_target(path, *sources, folder=True):
    """Asked before long work: ValueError or OSError if `path` is one of the sources, or if a folder (or a file) could not be written there.

    A folder that another run holds could not. Nothing is made, and nothing is left behind.
    """
    for source in sources:
        if same(path, source):
            raise ValueError(f"{path} would overwrite its source ({source}); choose another place")
    path = Path(os.path.realpath(path))
    nearest = next(p for p in (path, *path.parents) if p.exists())
    if not nearest.is_dir() and (folder or nearest != path):
        raise OSError(f"could not write {path}: {nearest} is a file; expected a folder, or a name that is free")
    if nearest == path and not folder and not nearest.is_file():
        kind = "a folder" if nearest.is_dir() else "a pipe, a socket or a device"
        raise ValueError(f"{path} is {kind}; expected the name of a file")
    if nearest == path and folder:
        with locked(path):
            pass
    beside = nearest if nearest.is_dir() else nearest.parent
    trial = beside / f".{path.name}.{os.getpid()}.part"
    try:
        _remove_stale(beside, f".{path.name}.")
        trial.touch(0o600)
        trial.unlink()  # a file that cannot be removed cannot be replaced
    except OSError as error:
        raise OSError(f"could not write {path}: {error}") from error
    finally:
        _remove(trial)


def same(one, other):
    """Whether two paths lead to the same file or folder, by whatever links."""
    if os.path.exists(one) and os.path.exists(other):
        return os.path.samefile(one, other)
    return os.path.realpath(one) == os.path.realpath(other)


# ------------------------------------------------------------------------------------------------------------------------ reading
def check_regular(path, limit=None):
    """The size in bytes of a regular file; a sentence for a path at which there is none: nothing, a folder, a pipe, a device.

    limit   ValueError if the file is larger
    """
    path = Path(path)
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path} does not exist") from None
    except ValueError as error:  # a zero byte in the name
        raise ValueError(f"{shown(str(path))} is no path: {error}") from None
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe, a socket or a device"
        raise ValueError(f"{path} is {kind}; expected a file")
    if limit is not None and found.st_size > limit:
        raise ValueError(f"{path} has {found.st_size} bytes; expected at most {limit}")
    return found.st_size


@contextlib.contextmanager
def opened(path):
    """A file to read bytes from. What the system says of a read that fails has no name in it, and gets the file's."""
    with open(path, "rb") as f:
        try:
            yield f
        except OSError as error:
            if error.errno is None or error.filename is not None:  # a sentence of ours, or another file's
                raise
            raise OSError(error.errno, error.strerror, str(path)) from error


def stamp(path):
    """What tells a file from every other that takes its place; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def check_unchanged(head, before):
    """OSError if the file by which a folder is known is not the one any more whose `stamp` was `before`.

    A save takes it away first and puts it back last (see `whole_folder`): what was read in between may be of two saves.
    """
    if stamp(head) != before:
        raise OSError(f"{Path(head).parent} was written while it was read ({Path(head).name} changed); open it again")


def read_json(path, limit=_JSON_LIMIT, most=_MOST_VALUES):
    """The JSON object in a file, of at most `most` values; a sentence that names the file if there is none."""
    check_regular(path, limit)
    with opened(path) as f:
        data = f.read()
    if (n := sum(data.count(mark) for mark in b",[{")) > most:
        raise ValueError(f"{path} holds more than {most} values ({n} commas and brackets); expected a shorter file")
    try:
        value = json.loads(data.decode("utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply; expected a JSON object") from None
    except ValueError as error:  # no JSON, no UTF-8, or a number of thousands of digits
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value
