"""Files are written whole or not at all."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tinylora.dtypes import BFloat16Array
from tinylora.models import files, safetensors


def test_safetensors_round_trip(tmp_path, rng):
    tensors = {
        "a": rng.standard_normal((2, 3)).astype(np.float32),
        "b": np.arange(4, dtype=np.uint8),
        "h": np.ones(3, np.float16),
        "c": BFloat16Array.of(rng.standard_normal((5,)).astype(np.float32)),
        "zero": np.zeros((0, 3), np.int64),
        "t": rng.standard_normal((3, 4)).astype(np.float32).T,
        "scalar": np.array(3, np.int64),
    }
    safetensors.save_safetensors(tmp_path / "x.safetensors", tensors, {"k": "v"})
    again, metadata = safetensors.load_safetensors(tmp_path / "x.safetensors")
    assert metadata == {"k": "v"} and again.keys() == tensors.keys()
    assert again["c"].bits.tobytes() == tensors["c"].bits.tobytes()
    for name in tensors.keys() - {"c"}:
        assert (
            again[name].dtype == tensors[name].dtype
            and (again[name] == tensors[name]).all()
            and again[name].shape == tensors[name].shape
        )


def test_an_error_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    files.write_text(path, "old")
    with pytest.raises(KeyError), files.atomic(path) as temporary:
        Path(temporary).write_text("half of the new")
        raise KeyError("a bug")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


FULL_DISK = """
import resource, signal, sys
import numpy as np
from tinylora import files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    files.save_safetensors(sys.argv[1], {"w": np.ones(100_000, np.float32)})
except OSError as error:
    print(error)
"""


def test_a_file_that_cannot_grow_leaves_the_old_one(tmp_path):
    """A file-size limit stands in for a full disk: the write fails half way, with the same kind of error."""
    pytest.importorskip("resource")
    path = tmp_path / "w.safetensors"
    safetensors.save_safetensors(path, {"w": np.zeros(3, np.float32)})
    before = path.read_bytes()
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, timeout=1200)
    assert "what was there before is untouched" in done.stdout, done.stdout + done.stderr
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["w.safetensors"]


def test_json_errors_are_sentences(tmp_path):
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ValueError, match="expected a JSON object, found a list"):
        files.read_json(tmp_path / "list.json")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        safetensors.load_safetensors(tmp_path / "nothing")
