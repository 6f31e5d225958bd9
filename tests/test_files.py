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


NUMBERS = [np.dtype(kind) for kind in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?")]


@pytest.mark.parametrize("dtype", NUMBERS, ids=lambda dtype: dtype.name)
def test_numbers_are_written_and_not_the_bytes_that_hold_them(dtype, tmp_path, rng):
    """An array may hold its bytes in either order, or its elements apart from each other: the file is the same."""
    x = (rng.standard_normal((4, 6)) * 100).clip(0, 127).astype(dtype)
    other = x.astype(dtype.newbyteorder(">"))
    wide = np.zeros((8, 12), other.dtype)
    wide[::2, ::2] = other
    held = {
        "other order": other,
        "other order, columns first": np.asfortranarray(other),
        "other order, apart": wide[::2, ::2],
        "other order, backwards": other[::-1, ::-1].copy()[::-1, ::-1],
        "columns first": np.asfortranarray(x),
    }
    safetensors.save_safetensors(tmp_path / "expected", {"w": x, "one": x[0, 0], "none": x[:0]})
    for what, array in held.items():
        safetensors.save_safetensors(tmp_path / "x", {"w": array, "one": array[:1, :1].reshape(()), "none": array[:0]})
        assert (tmp_path / "x").read_bytes() == (tmp_path / "expected").read_bytes(), what
        one_by_one = {"w": array, "one": array[:1, :1].reshape(()), "none": array[:0]}
        plan = {name: safetensors.Safetensors(tmp_path / "x").kind(name) for name in one_by_one}
        safetensors.write_safetensors(tmp_path / "x", plan, one_by_one.__getitem__)
        assert (tmp_path / "x").read_bytes() == (tmp_path / "expected").read_bytes(), what
    assert (safetensors.load_safetensors(tmp_path / "x")[0]["w"] == x).all()


def test_the_bits_of_bfloat16_are_numbers_too(tmp_path, rng):
    w = BFloat16Array.of(rng.standard_normal((3, 5)).astype(np.float32))
    for held in (w.bits.astype(">u2"), np.asfortranarray(w.bits), np.asfortranarray(w.bits.astype(">u2"))):
        safetensors.save_safetensors(tmp_path / "a", {"w": BFloat16Array(held)})
        safetensors.write_safetensors(tmp_path / "b", {"w": ("BF16", (3, 5))}, lambda name, w=held: BFloat16Array(w))
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
        assert (safetensors.load_safetensors(tmp_path / "a")[0]["w"].bits == w.bits).all()


def test_an_adapter_of_a_model_in_another_byte_order_is_the_same_adapter(tmp_path):
    import tiny

    from tinylora import add_lora
    from tinylora.interop import peft

    m = add_lora(tiny.model(), r=2)
    peft.save_adapter(m, tmp_path / "a")
    for _, p in m.named_parameters():
        p.data = p.data.astype(">f4")
    peft.save_adapter(m, tmp_path / "b")
    a, b = (safetensors.load_safetensors(tmp_path / x / "adapter_model.safetensors")[0] for x in "ab")
    assert a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)


@pytest.mark.parametrize("dtype", ["c8", "O", "S3", "M8[s]", [("a", "f4")]], ids=str)
def test_what_the_format_has_no_name_for_is_refused_before_anything_is_written(dtype, tmp_path):
    with pytest.raises(ValueError, match=r"x: w is \w+.*, expected one of float64, float32"):
        safetensors.save_safetensors(tmp_path / "x", {"w": np.zeros(3, dtype)})
    assert not os.listdir(tmp_path)


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
