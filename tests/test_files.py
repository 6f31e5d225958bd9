"""Files are written whole or not at all."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

from tinylora.cli import main
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
    with pytest.raises(ValueError, match=r"x: w is \w+.*, expected one of .*float64, float32"):
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


@pytest.mark.parametrize("kind", safetensors._NUMPY)
def test_a_file_has_the_bytes_that_the_package_writes(kind, tmp_path, rng):
    """Each dtype beside every other, so that their order shows."""
    package = pytest.importorskip("safetensors")
    tensors = {"b": BFloat16Array.of(rng.standard_normal(3).astype(np.float32)), "a": np.zeros((2, 0), np.float32)}
    for i, other in enumerate({kind, *rng.choice(list(safetensors._NUMPY), 4)} - {"BF16"}):
        tensors[f"{rng.integers(100)}-{i}"] = rng.integers(0, 2, (3, 2)).astype(safetensors._NUMPY[other])
    specs = {}
    for name, x in tensors.items():
        held = x.bits if isinstance(x, BFloat16Array) else x
        dtype = "bfloat16" if isinstance(x, BFloat16Array) else x.dtype.name
        specs[name] = package.TensorSpec(dtype=dtype, shape=x.shape, data_ptr=held.ctypes.data, data_len=held.nbytes)
    package.serialize_file(specs, tmp_path / "package", metadata={"format": "pt"})
    safetensors.save_safetensors(tmp_path / "ours", tensors)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "package").read_bytes()


# ------------------------------------------------------------------------------------------------------- files that belong together
def contents(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def saved(folder, **texts):
    with files.whole_folder(folder, replaces=("config.json", "weights", "vocabulary")) as new:
        for name, text in texts.items():
            (new / name.replace("config", "config.json")).write_text(text)


def test_files_that_belong_together_become_the_folders_together(tmp_path):
    folder = tmp_path / "m"
    saved(folder, config="1", weights="1", vocabulary="1")
    (folder / "mine").write_text("mine")
    (folder / "inner").mkdir()
    (folder / "weights").chmod(0o600)
    saved(folder, config="2", weights="2")
    assert contents(folder) == {"config.json": "2", "weights": "2", "mine": "mine"}
    assert (folder / "weights").stat().st_mode & 0o777 == 0o600
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"] and (folder / "inner").is_dir()


def test_a_block_that_fails_changes_nothing_and_leaves_nothing(tmp_path):
    for before in ({}, {"config": "1", "weights": "1"}):
        if before:
            saved(tmp_path / "m", **before)
        there = contents(tmp_path)
        for error in (KeyboardInterrupt, ValueError, OSError(28, "No space left on device")):
            with (
                pytest.raises(type(error) if isinstance(error, OSError) else error),
                files.whole_folder(tmp_path / "m") as new,
            ):
                (new / "config.json").write_text("2")
                raise error
        assert contents(tmp_path) == there and len(list(tmp_path.iterdir())) == bool(before)


def test_what_fails_leaves_none_of_the_folders_that_it_made(tmp_path):
    (tmp_path / "there").mkdir()
    deep, full = tmp_path / "there" / "a" / "b" / "c", OSError(28, "No space left on device")
    for made in (files.atomic, files.whole_folder, files.locked):
        with pytest.raises(OSError, match="No space"), made(deep):
            raise full
        assert not list((tmp_path / "there").iterdir())
    files.write_text(tmp_path / "there" / "a" / "mine", "mine")
    with pytest.raises(OSError, match="No space"), files.whole_folder(deep):
        raise full
    assert (
        contents(tmp_path / "there" / "a") == {"mine": "mine"} and len(list((tmp_path / "there" / "a").iterdir())) == 1
    )


@pytest.mark.parametrize(
    "call, name, said",
    [
        ("replace", "weights", r"the new files lie in .*\.saved"),
        ("unlink", ".plan.json", "the new files are in their places"),
        ("rmdir", ".saved", "the new files are in their places"),
    ],
)
def test_what_a_failed_save_says_of_the_folder_is_true(call, name, said, tmp_path, monkeypatch):
    folder, real = tmp_path / "m", getattr(os, call)
    saved(folder, config="1", weights="1", vocabulary="1")

    def fails(path, *target, **more):
        if Path(path).name == name and (call == "rmdir" or Path(path).parent.name == ".saved"):
            raise OSError(5, "Input/output error", str(path))
        return real(path, *target, **more)

    monkeypatch.setattr(os, call, fails)
    with pytest.raises(OSError, match=said):
        saved(folder, config="2", weights="2")
    monkeypatch.undo()
    if call != "replace":
        assert {n: t for n, t in contents(folder).items() if n[0] != "."} == {"config.json": "2", "weights": "2"}
    files.settle(folder)
    assert contents(folder) == {"config.json": "2", "weights": "2"} and len(list(folder.iterdir())) == 2


def test_a_folder_in_which_nothing_can_be_removed_is_no_target(tmp_path, monkeypatch):
    real, failed = os.unlink, []

    def once(path, **more):
        if not failed:
            failed.append(path)
            raise OSError(5, "Input/output error", str(path))
        return real(path, **more)

    monkeypatch.setattr(os, "unlink", once)
    with pytest.raises(OSError, match=r"could not write .*out: .*Input/output error"):
        files.check_target(tmp_path / "out")
    assert failed and not list(tmp_path.iterdir())


def killed_at(call, run):
    """Run in a process that ends, as by SIGKILL, before this call of all that change a folder. Whether it was killed."""
    child = os.fork()
    if child == 0:
        count = iter(range(10**6))

        def shim(real):
            def called(*args, **kwargs):
                if next(count) == call:
                    os._exit(9)
                return real(*args, **kwargs)

            return called

        for name in ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync", "chmod"):
            setattr(os, name, shim(getattr(os, name)))
        try:
            run()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_a_save_that_is_killed_anywhere_leaves_the_old_files_or_the_new_ones(tmp_path):
    old, new = {"config.json": "1", "weights": "1", "vocabulary": "1"}, {"config.json": "2", "weights": "2"}
    call, found = 0, []
    while True:
        folder = tmp_path / str(call)
        saved(folder, config="1", weights="1", vocabulary="1")
        if not killed_at(call, lambda folder=folder: saved(folder, config="2", weights="2")):
            break
        raw = contents(folder)
        if "config.json" in raw:  # whoever knows nothing of `.saved`
            assert (raw["config.json"], raw["weights"], raw.get("vocabulary")) in (("1", "1", "1"), ("2", "2", None))
        files.settle(folder)
        there = {name: text for name, text in contents(folder).items() if not name.startswith(".")}
        assert there in (old, new)
        found.append(there == new)
        saved(folder, config="3", weights="3")
        assert contents(folder) == {"config.json": "3", "weights": "3"} and len(list(folder.iterdir())) == 2
        call += 1
    assert call > 10 and True in found and False in found and contents(folder) == new
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(map(str, range(call + 1)))


def test_a_stranger_s_plan_reaches_nothing_outside_of_the_folder(tmp_path):
    (tmp_path / "m" / ".saved").mkdir(parents=True)
    (tmp_path / "victim").write_text("mine")
    for plan in (
        '{"head": "config.json", "remove": ["../victim"]}',
        '{"head": "../victim", "remove": []}',
        "[]",
        "{}",
        '{"head": 1}',
    ):
        (tmp_path / "m" / ".saved" / ".plan.json").write_text(plan)
        with pytest.raises((OSError, ValueError), match=r"plan\.json"):
            files.settle(tmp_path / "m")
    assert (tmp_path / "victim").read_text() == "mine"
    (tmp_path / "m2").mkdir()
    (tmp_path / "m2" / ".saved").symlink_to(tmp_path / "m")
    with pytest.raises(OSError, match="not a folder"):
        files.settle(tmp_path / "m2")


def test_one_process_at_a_time_holds_a_folder(tmp_path):
    code = "import sys; from tinylora.models import files\nwith files.locked(sys.argv[1]): print('held')"
    run = [sys.executable, "-c", code, tmp_path / "run"]
    with files.locked(tmp_path / "run"), files.locked(tmp_path / "run"):  # whoever has it may take it again
        held = subprocess.run(run, capture_output=True, text=True)
        assert held.returncode == 1 and "is being written by another run" in held.stderr
    assert not (tmp_path / "run").exists()  # empty, and made for the lock
    assert subprocess.run(run, capture_output=True, text=True).stdout == "held\n"
    with files.locked(tmp_path / "run"):
        (tmp_path / "run" / "x").write_text("")  # somebody trains here
        asked = "import sys; from tinylora.models import files; files.check_target(sys.argv[1])"
        held = subprocess.run([sys.executable, "-c", asked, tmp_path / "run"], capture_output=True, text=True)
        assert held.returncode == 1 and "is being written by another run" in held.stderr
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="it is a file; expected a folder"), files.locked(tmp_path / "file"):
        pass


@pytest.mark.skipif(os.name != "posix", reason="folders are locked")
def test_a_lock_is_of_the_folder_that_is_there(tmp_path, monkeypatch):
    """Whoever waits for a folder that is removed meanwhile, because nothing came into it, holds the one that comes after it."""
    import fcntl

    real, removed = fcntl.flock, []

    def flock(handle, how):
        if not removed:
            removed.append((tmp_path / "run").rmdir())
        return real(handle, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with files.locked(tmp_path / "run"):
        handle = os.open(tmp_path / "run", os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            real(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(handle)
    assert removed and not (tmp_path / "run").exists()


def test_a_new_folder_does_not_take_the_place_of_an_empty_one_that_came_meanwhile(tmp_path):
    with files.whole_folder(tmp_path / "m") as new:
        (new / "config.json").write_text("1")
        (tmp_path / "m").mkdir()
        there = (tmp_path / "m").stat().st_ino
    assert (tmp_path / "m").stat().st_ino == there and contents(tmp_path / "m") == {"config.json": "1"}


# ------------------------------------------------------------------------------------------------------------------------ one file
def test_a_file_keeps_its_permissions_and_a_link_stays_one(tmp_path):
    (tmp_path / "real").write_text("{}")
    (tmp_path / "real").chmod(0o600)
    (tmp_path / "link").symlink_to("real")
    files.write_json(tmp_path / "link", {"a": 1})
    assert (tmp_path / "link").is_symlink() and files.read_json(tmp_path / "real") == {"a": 1}
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o600


def test_what_is_no_file_is_not_replaced_by_one_whatever_leads_to_it(tmp_path):
    """A rename by root would put a file in the place of a device that a link in a stranger's folder leads to."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        (tmp_path / f"to {name}").symlink_to(name)
        for path in (tmp_path / name, tmp_path / f"to {name}"):
            before = os.stat(path).st_mode
            with pytest.raises(
                OSError, match="expected a file, or a name that is free; what was there before is untouched"
            ):
                files.write_json(path, {})
            assert os.stat(path).st_mode == before
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.skipif(not hasattr(os, "fork") or os.getuid() != 0, reason="becomes an ordinary user")
def test_an_ordinary_user_s_read_only_files_are_replaced_and_stay_read_only(tmp_path):
    """A rename needs the folder's permission and not the file's."""
    os.chown(tmp_path, 65534, 65534)
    for above in tmp_path.parents[:3]:
        above.chmod(above.stat().st_mode | 0o111)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setuid(65534)
            saved(tmp_path / "m", config="1", weights="1")
            files.write_text(tmp_path / "one", "1")
            for path in (tmp_path / "m" / "weights", tmp_path / "one"):
                path.chmod(0o444)
            saved(tmp_path / "m", config="2", weights="2")
            files.write_text(tmp_path / "one", "2")
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    for path in (tmp_path / "m" / "weights", tmp_path / "one"):
        assert path.read_text() == "2" and path.stat().st_mode & 0o777 == 0o444


def test_what_quantize_measured_keeps_its_permissions(tmp_path):
    """It is removed with the weights of which it speaks, and written anew."""
    tiny.model().save_pretrained(tmp_path / "model")
    command = ["quantize", str(tmp_path / "model"), "--codes", "nf4", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    for path in (tmp_path / "out").iterdir():
        path.chmod(0o600)
    assert main(command) == 0
    found = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert "report.json" in found and set(found.values()) == {0o600}, found


@pytest.mark.parametrize(
    "text, said",
    [
        (b'{"a":' * 200_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"[]", "found a list"),
    ],
    ids=["deep", "long number", "no UTF-8", "empty", "list"],
)
def test_json_that_is_none_is_said_with_its_file(text, said, tmp_path):
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(ValueError, match=rf"x\.json.*{said}"):
        files.read_json(tmp_path / "x.json")


def test_only_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name, said in {
        "pipe": "a pipe",
        "zero": "a device",
        ".": "a folder",
        "none": "does not exist",
        "a\0": "no path",
    }.items():
        with pytest.raises((OSError, ValueError), match=said):
            files.read_json(tmp_path / name)
    with open(tmp_path / "large", "wb") as f:
        f.truncate(1 << 40)
    with pytest.raises(ValueError, match="expected at most"):
        files.read_json(tmp_path / "large")


def test_a_read_that_fails_is_said_with_the_file(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(OSError, match=r"Input/output error: .*x\.json") as caught, files.opened(tmp_path / "x.json"):
        raise OSError(5, "Input/output error")
    assert caught.value.errno == 5
    with pytest.raises(OSError, match=r"^a sentence$"), files.opened(tmp_path / "x.json"):
        raise OSError("a sentence")


@pytest.mark.parametrize("junk", ["[" + ",".join(["{}"] * 300_000) + "]", "[" * 200_000])
def test_json_has_no_more_values_than_its_reader_expects(tmp_path, junk):
    """An empty object is three bytes in the file and sixty in memory."""
    (tmp_path / "x.json").write_text(f'{{"a": {junk}}}')
    with pytest.raises(ValueError, match=r"x\.json holds more than 131072 values"):
        files.read_json(tmp_path / "x.json", most=1 << 17)


def test_metadata_of_many_entries_are_refused(tmp_path):
    head = ('{"__metadata__":{' + ",".join(f'"{i}":""' for i in range(400_000)) + "}}").encode()
    (tmp_path / "x.safetensors").write_bytes(len(head).to_bytes(8, "little") + head)
    with pytest.raises(ValueError, match=r"x\.safetensors is not a whole .*its header holds : 400001 times"):
        safetensors.Safetensors(tmp_path / "x.safetensors")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes of that kind here")
def test_an_index_that_is_no_file_is_said(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors.index.json")
    with pytest.raises(ValueError, match=r"index\.json is a pipe, a socket or a device; expected a file"):
        safetensors.open_folder(tmp_path)
