"""Two processes in one folder: one of them waits or is refused, and what lies there in the end is one of the two, whole."""

import signal
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny
from injector import Process, forked
from operations import ADAPTER, MODEL, Operation, contents, finetune, model, old_model, save_adapter, sources
from workplace import BUG, TEMPORARY, Workplace

from tinylora import Llama, adapters
from tinylora.interop import peft
from tinylora.models import files, folders, gguf_writer


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


def in_every_tensor(seed):
    """A model that differs from those of other seeds in its config and in every tensor."""
    m = model(seed)
    m.model.norm.weight.data += seed
    return m


def of_model(m):
    return m.config.rope_theta, m.model.norm.weight.data.tobytes(), m.model.embed_tokens.weight.data.tobytes()


def adapted(seed):
    """A model with an adapter whose settings and factors depend on the seed, as many as in the others."""
    m = adapters.add_lora(model(3), r=2, alpha=seed, target_modules=["q_proj"])
    return tiny.randomize_lora(m, np.random.default_rng(seed))


def of_adapter(adapter):
    return adapter.config.alpha, *(a.tobytes() for arrays in adapter.weights.values() for a in arrays.values())


ALTERNATING = {  # name: (what is saved in turn, how, how it is read)
    "model": (
        lambda: [of_model(m) for m in map(in_every_tensor, (1, 2))],
        lambda path: [in_every_tensor(seed).save_pretrained(path, dtype="float32") for seed in (1, 2)],
        lambda path: of_model(Llama.from_pretrained(path)),
    ),
    "adapter": (
        lambda: [of_adapter(adapters.adapter_of(adapted(seed))) for seed in (1, 2)],
        lambda path: [peft.save_adapter(adapted(seed), path) for seed in (1, 2)],
        lambda path: of_adapter(peft.read_adapter(path)),
    ),
    "x.gguf": (
        lambda: [of_model(m) for m in map(in_every_tensor, (1, 2))],
        lambda path: [gguf_writer.save(in_every_tensor(seed), path, "f32") for seed in (1, 2)],
        lambda path: of_model(Llama.from_pretrained(path)),
    ),
}


@pytest.mark.parametrize("name", ALTERNATING)
def test_a_reader_beside_a_writer_never_sees_a_mixture(name, many, count, tmp_path):
    """Two of the same shapes take turns in one place; whoever opens it gets one of them whole, or a sentence."""
    if name.endswith(".gguf"):
        pytest.importorskip("gguf")
    whole, write, read = ALTERNATING[name]
    whole, path = whole(), tmp_path / name
    write(path)
    assert read(path) in whole

    def writing():
        while True:
            write(path)

    writer, seen = Process(writing), Counter()
    until = time.monotonic() + min(many(1 / 200, least=1), 30)
    try:
        while time.monotonic() < until:
            try:
                end = "same" if read(path) in whole else "mixed"
            except (ValueError, OSError) as error:
                assert name in str(error)
                end = "sentences"
            seen[end] += 1
            count("a reader beside a writer: " + name, end)
    finally:
        writer.send(signal.SIGKILL)
        writer.wait()
    assert seen["same"] and not seen["mixed"], seen


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
