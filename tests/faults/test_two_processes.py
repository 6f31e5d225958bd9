"""Two processes in one folder: one of them waits or is refused, and what lies there in the end is one of the two, whole."""

import signal
import time
import warnings
from pathlib import Path

import pytest
from injector import Process, forked
from operations import ADAPTER, MODEL, Operation, contents, finetune, model, old_model, save_adapter, sources
from workplace import BUG, TEMPORARY, Workplace

from tinylora import Llama
from tinylora.models import files, folders


def pair(first, second, root):
    """How two runs end that begin together."""
    processes = [Process(lambda run=run: run(root)) for run in (first, second)]
    return [p.wait() for p in processes]


def statuses(found):
    assert all(f.ended == "returned" and not BUG.search(f.printed) for f in found), found
    return sorted(f.value for f in found)


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_two_different_runs_with_one_out(method, many, draw, count, tmp_path):
    """One trains, and the other is told; the result is that of the one that was not told."""
    runs = [finetune(method, "--lr", rate) for rate in ("1e-3", "5e-3")]
    work = Workplace(Operation(sources, runs[0], {}), tmp_path)
    whole = []
    for run in runs:
        work.restore()
        forked(lambda run=run: run(work.root))
        whole.append(contents(work.root))
    for _ in range(many(1 / 100, least=2)):
        work.restore()
        first = bool(draw.integers(2))
        found = pair(*(runs if first else runs[::-1]), work.root)
        assert statuses(found) == [0, 2]
        assert "another run" in next(f.printed for f in found if f.value == 2)
        winner = [f.value for f in (found if first else found[::-1])].index(0)
        assert contents(work.root) == whole[winner]
        count("two runs, one --out", "sentences")


def test_the_same_run_twice_at_once(many, count, tmp_path):
    work = Workplace(Operation(sources, finetune("qlora"), {}), tmp_path)
    for _ in range(many(1 / 100, least=2)):
        work.restore()
        found = pair(work.operation.run, work.operation.run, work.root)
        assert statuses(found) in ([0, 0], [0, 2])
        assert not work.unlike()
        count("the same run twice at once", "same" if statuses(found) == [0, 0] else "sentences")


def test_a_reader_beside_a_writer_never_sees_a_mixture(many, count, tmp_path):
    """Two models of the same shapes take turns in a folder; whoever opens it gets one of them, or a sentence."""
    folder, models = tmp_path / "m", [model(1), model(2)]

    def found(m):
        return m.config.rope_theta, m.model.norm.weight.data.tobytes(), m.model.embed_tokens.weight.data.tobytes()

    for m in models:
        m.model.norm.weight.data += m.config.rope_theta / 1e4  # they differ in every tensor
        m.save_pretrained(folder, dtype="float32")
    whole = [found(m) for m in models]

    def write():
        while True:
            for m in models:
                m.save_pretrained(folder, dtype="float32")

    writer, seen = Process(write), {}
    until = time.monotonic() + min(many(1 / 200, least=1), 30)
    try:
        while time.monotonic() < until:
            try:
                end = "same" if found(Llama.from_pretrained(folder)) in whole else "mixed"
            except (ValueError, OSError) as error:
                assert str(folder) in str(error)
                end = "sentences"
            seen[end] = seen.get(end, 0) + 1
            count("a reader beside a writer", end)
    finally:
        writer.send(signal.SIGKILL)
        writer.wait()
    assert seen.get("same") and not seen.get("mixed"), seen


@pytest.mark.parametrize("sets, run, before", [
    (MODEL, lambda root: model(1).save_pretrained(root / "out"), sources),
    (MODEL, lambda root: model(1).save_pretrained(root / "out"), old_model),
    (ADAPTER, save_adapter, sources),
], ids=["a new folder", "an old folder", "an adapter"])  # fmt: skip
def test_two_saves_at_once_leave_one_of_the_two(sets, run, before, many, count, tmp_path):
    def other(root):
        if sets is ADAPTER:
            return save_adapter(root, r=3)
        return model(5).save_pretrained(root / "out", dtype="float32")

    work, whole = Workplace(Operation(before, run, {"out": sets}), tmp_path), []
    for save in (run, other):
        work.restore()
        save(work.root)
        whole.append(contents(work.root))
    assert whole[0] != whole[1]
    for _ in range(many(1 / 30, least=3)):
        work.restore()
        found = pair(run, other, work.root)
        assert all(f.ended == "returned" for f in found), found
        assert contents(work.root) in whole
        count("two saves at once", "same")


def test_a_save_that_was_killed_is_finished_by_two_readers_at_once(many, count, tmp_path):
    """Both find the new model, whole, whichever of them puts it in its place."""
    work = Workplace(
        Operation(old_model, lambda root: model(1).save_pretrained(root / "out"), {"out": MODEL}), tmp_path
    )
    for _ in range(many(1 / 50, least=2)):
        work.restore()
        real = files._move_in
        files._move_in = lambda folder: (_ for _ in ()).throw(KeyboardInterrupt)
        try:
            with warnings.catch_warnings(), pytest.raises(KeyboardInterrupt):
                work.operation.run(work.root)
        finally:
            files._move_in = real
        assert (work.root / "out" / files.SAVED).exists()

        def look(root):
            return Llama.from_pretrained(root / "out").config.rope_theta, str(folders.open_model(root / "out").path)

        found = pair(look, look, work.root)
        assert [f.ended for f in found] == ["returned"] * 2, found
        assert [f.value[0] for f in found] == [10000.0] * 2
        assert not work.unlike()
        assert not [p for p in Path(work.root).rglob(".*") if TEMPORARY.search("/" + p.name)]
        count("two readers of an unfinished save", "same")
