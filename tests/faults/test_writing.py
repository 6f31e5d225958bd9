"""Whatever writes is killed, or told that the disk is full, at its calls one by one: the old or the new is there then, never a mixture."""

import os

import pytest
from injector import KILLS, Fault, forked
from operations import MODEL, OPERATIONS, Operation, old_model
from workplace import Workplace, wrong


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_fault_at_any_call_leaves_the_old_or_the_new(name, many, draw, count, tmp_path):
    operation = OPERATIONS[name]
    if operation.missing():
        pytest.skip(f"needs {', '.join(operation.missing())}")
    some = many(operation.share / 15, least=0 if operation.share < 0.3 else 3)
    work = Workplace(operation, tmp_path)
    faults = Fault.all(work.calls)
    assert len(faults) > 20, "the calls of this command are not counted"
    some = min(some, len(faults))
    problems = []
    for i in sorted(draw.choice(len(faults), some, replace=False)):
        fault = faults[i]
        work.restore()
        found = forked(work.run, work.root, fault)
        column, problem = wrong(work, fault, found)
        count("writing: " + name, column)
        if problem:
            problems.append(f"{fault} at {found.fired}: {problem}")
    assert not problems, f"{len(problems)} of {some} faults:\n" + "\n".join(problems[:20])


def careless(root):
    """Writes as nobody should: a file on the way that another process does not know, then the weights, then the config."""
    on_the_way = root / "out" / f".tmp{os.getpid()}"
    on_the_way.write_text("on the way")
    on_the_way.unlink()
    for name in ("model.safetensors", "config.json"):
        (root / "out" / name).write_bytes((root / "model" / name).read_bytes())
    (root / "out" / "generation_config.json").unlink(missing_ok=True)


def test_the_injector_finds_what_is_wrong_with_careless_writing(tmp_path):
    """Were nothing found, the other tests would be worth nothing."""
    work, ends = Workplace(Operation(old_model, careless, {"out": MODEL}), tmp_path), {}
    for fault in Fault.all(work.calls):
        work.restore()
        found = forked(work.run, work.root, fault)
        assert found.fired[0] == work.calls[fault.at][0]
        end, problem = wrong(work, fault, found)
        ends.setdefault(end, []).append((fault.kind, problem))
    assert {kind for kind, _ in ends["mixed"]} >= {*KILLS, "EIO", "ENOSPC", "half", "full"}
    assert ends["left behind"]
