"""Files that are written whole or not at all, and safetensors with sixteen-bit floats.

`atomic(path)` gives a temporary path in the same folder; only when the block ends without an error is it synced to disk
and renamed over the old file, in one step of the file system. A full disk, a bug or a SIGKILL leaves the old file as it
was.

The safetensors package reads and writes NumPy arrays but no bfloat16; here a bfloat16 tensor is a BFloat16Array.
"""

import contextlib
import glob
import json
import os
from pathlib import Path

import numpy as np

from .dtypes import BFloat16Array

_NUMPY = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


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


def save_safetensors(path, tensors, metadata=None):
    """Write {name: array or BFloat16Array} atomically. Metadata: strings to strings, {"format": "pt"} by default, as torch's tools ask."""
    import safetensors

    specs, alive = {}, []  # the specs hold bare addresses, so the arrays must outlive the call
    for name, x in tensors.items():
        bf16 = isinstance(x, BFloat16Array)
        a = np.ascontiguousarray(x.bits if bf16 else x)
        alive.append(a)
        specs[name] = safetensors.TensorSpec(
            dtype="bfloat16" if bf16 else a.dtype.name, shape=x.shape, data_ptr=a.ctypes.data, data_len=a.nbytes
        )
    with atomic(path) as temporary:
        try:
            safetensors.serialize_file(specs, temporary, metadata={"format": "pt"} if metadata is None else metadata)
        except safetensors.SafetensorError as error:  # the package's own type, also where the disk is full
            raise OSError(str(error)) from None


def load_safetensors(path):
    """({name: array or BFloat16Array}, metadata). A truncated or corrupted file raises ValueError with a sentence."""
    import safetensors

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    data = path.read_bytes()
    try:
        entries = safetensors.deserialize(data)
    except Exception as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}); it may be truncated or corrupted"
        ) from None
    tensors = {}
    for name, entry in sorted(entries, key=lambda item: item[0]):  # the package's own order varies from run to run
        kind, shape = entry["dtype"], tuple(entry["shape"])
        if kind == "BF16":
            tensors[name] = BFloat16Array(np.frombuffer(entry["data"], np.uint16).reshape(shape))
        elif kind in _NUMPY:
            tensors[name] = np.frombuffer(entry["data"], _NUMPY[kind]).reshape(shape)
        else:
            raise ValueError(f"{path}: tensor {name} has dtype {kind}, which NumPy cannot hold")
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return tensors, header.get("__metadata__", {})


def load_folder(folder):
    """{name: array or BFloat16Array} of a model folder: model.safetensors, or the files that model.safetensors.index.json lists."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return load_safetensors(folder / "model.safetensors")[0]
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{index}: expected a weight_map from names to files")
    tensors = {}
    for name in sorted(set(where.values())):
        tensors |= load_safetensors(folder / name)[0]
    if missing := sorted(set(where) - set(tensors)):
        raise ValueError(
            f"{folder}: {len(missing)} tensors of the index are in none of its files, the first is {missing[0]}"
        )
    return tensors
