"""Files that are written whole or not at all.

`atomic(path)` gives a temporary path in the same folder; only when the block ends without an error is it synced to disk
and renamed over the old file, in one step of the file system. A full disk, a bug or a SIGKILL leaves the old file as it
was.
"""

import contextlib
import glob
import json
import os
from pathlib import Path


@contextlib.contextmanager
def atomic(path):
    """A temporary path beside `path` that becomes `path` if the block succeeds and disappears if it does not."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob(f".{glob.escape(path.name)}.*.part"):  # left by a process that was killed
            if not _alive(stale.name.split(".")[-2]):
                stale.unlink(missing_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # some writers replace the file and with it its permissions
        yield str(temporary)
        os.chmod(temporary, mode)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(f"could not write {path}: {error}; what was there before is untouched") from error
        raise


def _alive(pid):
    """Whether a process of that number runs; True where it cannot be told."""
    if os.name != "posix" or not pid.isdigit():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return int(pid) != os.getpid()


def _sync_folder(folder):
    """Make a rename survive a power cut; not every system lets a folder be opened for that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path, text):
    """Write a UTF-8 text file atomically."""
    with atomic(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8", newline="\n")


def write_json(path, value):
    """Write indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path):
    """The JSON object in a file; a sentence if there is none."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value
