"""A run's folder: one process at a time, said early, and nothing in it is believed."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import tiny

from tinylora.cli import main
from tinylora.models import safetensors
from tinylora.training import finetune as finetune_module
from tinylora.training.finetune import read_trace

QUICK = ["--seq-len", "32", "--batch-size", "2", "--heldout", "2", "-r", "2"]


@pytest.fixture
def setup(tmp_path):
    tiny.model().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 60)
    return ["--model", str(tmp_path / "model"), "--text", str(tmp_path / "text.txt"), *QUICK]


def finetune(setup, out, *more, steps=3):
    return ["finetune", *setup, "--steps", str(steps), "--checkpoint-every", "1", "--out", str(out), *more]


def said(command, capsys):
    """What a command that fails says, in one sentence."""
    capsys.readouterr()
    assert main(command) == 2
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence.startswith("tinylora: ")
    return sentence


def test_an_out_that_cannot_be_written_is_said_before_the_first_step(setup, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "inner"):
        command = finetune(setup, out)
        assert "could not write" in said(command, capsys)
        assert "could not write" in said(
            ["pretrain", str(tmp_path / "text.txt"), "--steps", "1", "--out", str(out)], capsys
        )
    assert (tmp_path / "file").read_text() == "mine"
    done = subprocess.run([sys.executable, "-m", "tinylora.cli", *command], capture_output=True, text=True)
    assert done.returncode == 2 and "step" not in done.stderr


def test_two_runs_on_one_folder_are_kept_apart(setup, tmp_path):
    """The second one is refused, whichever it is, and the first one's result is that of a run that was alone."""
    commands = [finetune(setup, tmp_path / "run", "--seed", seed, steps=40) for seed in "12"]
    both = [
        subprocess.Popen([sys.executable, "-m", "tinylora.cli", *c], stderr=subprocess.PIPE, text=True)
        for c in commands
    ]
    ended = [(p.communicate()[1], p.returncode) for p in both]
    codes = [code for _, code in ended]
    assert sorted(codes) == [0, 2], ended
    refused = ended[codes.index(2)][0]
    assert "is being written by another run" in refused or "is the checkpoint of another run" in refused
    assert main(finetune(setup, tmp_path / "alone", "--seed", "12"[codes.index(0)], steps=40)) == 0
    adapters = [(tmp_path / run / "adapter" / "adapter_model.safetensors").read_bytes() for run in ("run", "alone")]
    assert adapters[0] == adapters[1]


@pytest.mark.parametrize("more", [[], ["--normality", "--draws", "1"]], ids=["codes", "normality"])
def test_a_report_of_another_kind_takes_no_runs_place(more, setup, tmp_path, capsys):
    """Both are called report.json: quantize leaves a run's alone, and finetune that of quantize."""
    assert main(finetune(setup, tmp_path / "run")) == 0
    report = (tmp_path / "run" / "report.json").read_bytes()
    quantize = ["quantize", str(tmp_path / "model"), *more, "--out"]
    assert "whose report.json would be lost" in said([*quantize, str(tmp_path / "run")], capsys)
    assert (tmp_path / "run" / "report.json").read_bytes() == report
    assert not (tmp_path / "run" / "config.json").exists()
    assert main([*quantize, str(tmp_path / "measured")]) == 0
    assert "report.json" in said(finetune(setup, tmp_path / "measured"), capsys)


@pytest.mark.skipif(os.name != "posix", reason="folders are locked")
def test_whatever_writes_a_folder_holds_it_for_as_long_as_it_works(setup, tmp_path, capsys):
    import fcntl

    assert main(finetune(setup, tmp_path / "run")) == 0
    out, model, text = tmp_path / "out", str(tmp_path / "model"), str(tmp_path / "text.txt")
    out.mkdir()
    handle = os.open(out, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    for command in (
        finetune(setup, out),
        ["finetune", "--compare", *setup],
        ["pretrain", text],
        ["switch", "--model", model, "--texts", text, str(tmp_path / "other.txt")],
        ["merge", "--model", model, "--adapter", str(tmp_path / "run" / "adapter")],
        ["convert", model],
        ["quantize", model],
        ["quantize", model, "--normality"],
    ):
        assert "is being written by another run" in said([*command, "--out", str(out)], capsys)
        assert not list(out.iterdir())
    os.close(handle)
    assert main(["convert", model, "--out", str(out)]) == 0


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # which NumPy gives on the way
@pytest.mark.parametrize("rate, every", [("6e38", "1"), ("1e30", "2")])
def test_numbers_that_are_not_finite_never_become_a_checkpoint(rate, every, setup, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(finetune(setup, out, steps=2)) == 0
    before = (out / "checkpoint.safetensors").read_bytes()
    more = ["--lr", rate, "--schedule", "constant", "--warmup", "0", "--checkpoint-every", every]
    sentence = said([*finetune(setup, tmp_path / "new", steps=5), *more], capsys)
    assert "lower the learning rate" in sentence and "checkpoint is" not in sentence
    assert not (tmp_path / "new").exists() or not list((tmp_path / "new").iterdir())
    assert (out / "checkpoint.safetensors").read_bytes() == before


def damaged(path, change):
    """Rewrite a checkpoint with its tensors or what it says of itself changed."""
    tensors, metadata = safetensors.load_safetensors(path)
    tensors, about = {k: v.copy() for k, v in tensors.items()}, json.loads(metadata["tinylora"])
    change(tensors, about)
    safetensors.save_safetensors(path, tensors, {"tinylora": json.dumps(about)})


def set_nan(tensors, about):
    next(a for n, a in tensors.items() if n.startswith("param."))[...] = np.nan


CHANGES = {
    "holds NaN or Inf": set_nan,
    r"optimizer\.step is 4, expected a count of 0 to 3": lambda t, a: t.update({"optimizer.step": np.array(4)}),
    r"optimizer\.step is -1": lambda t, a: t.update({"optimizer.step": np.array(-1)}),
    r"optimizer\.step is 2\.0": lambda t, a: t.update({"optimizer.step": np.array(2.0)}),
    "has no optimizer.step": lambda t, a: t.pop("optimizer.step"),
    r"history\[0\]\.loss = 'low'": lambda t, a: a["history"][0].update(loss="low"),
    r"history = \{\}": lambda t, a: a.update(history={}),
    "its history has 1 steps": lambda t, a: a.update(history=a["history"][:1]),
    "identity = 3, expected an object": lambda t, a: a.update(identity=3),
    "tape_bytes is missing": lambda t, a: a.pop("tape_bytes"),
    "has no parameter": lambda t, a: [t.pop(n) for n in list(t) if n.startswith("param.")],
    "holds negative numbers": lambda t, a: [x.fill(-1) for n, x in t.items() if n.endswith(".v")],
}


@pytest.mark.parametrize("words", CHANGES)
def test_a_checkpoint_is_believed_in_nothing(words, setup, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(finetune(setup, out, steps=2)) == 0
    damaged(out / "checkpoint.safetensors", CHANGES[words])
    capsys.readouterr()
    assert main(finetune(setup, out, steps=3)) == 2
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert "checkpoint.safetensors" in sentence and re.search(words, sentence), sentence


@pytest.mark.parametrize(
    "change, words",
    [
        ({"trainable": "many"}, "trainable = 'many'"),
        ({"job": [1]}, r"job = [1], expected an object"),
        ({"recipe": {"steps": "2"}}, "recipe.steps = '2'"),
        ({"history": [{"loss": None}]}, "history[0].loss = None"),
        ({"samples": {"after": 3}}, "samples.'after' = 3"),
        ({"adapter": 7}, "adapter = 7"),
        ({"paging": {"budget": None, "pages": 3}}, "paging: faults is missing"),
        ({"after": None}, "after = None"),
        ({"bytes": {"tape, peak": -1}}, "bytes.'tape, peak' = -1"),
    ],
)
def test_a_report_is_believed_in_nothing(change, words, setup, tmp_path, capsys):
    assert main(finetune(setup, tmp_path / "run")) == 0
    path = tmp_path / "run" / "report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    sentence = said(finetune(setup, tmp_path / "run"), capsys)
    assert "report.json" in sentence and words in sentence


def test_a_report_is_of_the_adapter_that_lies_beside_it(setup, tmp_path, capsys):
    """Killed between the adapter and the report of a longer run, the shorter run's report speaks of weights that are gone."""
    out = tmp_path / "run"
    assert main(finetune(setup, out, steps=2)) == 0
    report = (out / "report.json").read_bytes()
    assert main(finetune(setup, out, steps=3)) == 0
    (out / "report.json").write_bytes(report)
    assert "another run" in said(finetune(setup, out, steps=2), capsys)


def test_a_report_that_names_no_adapter_is_of_no_run(setup, tmp_path):
    out = tmp_path / "run"
    assert main(finetune(setup, out)) == 0
    whole = json.loads((out / "report.json").read_text())
    for report in (whole | {"adapter": None}, {name: v for name, v in whole.items() if name != "adapter"}):
        (out / "report.json").write_text(json.dumps(report))
        assert main(finetune(setup, out)) == 0
        assert json.loads((out / "report.json").read_text())["adapter"] == whole["adapter"]


@pytest.mark.parametrize(
    "text, words",
    [
        ("step,page,event,bytes\n1,2,hit\n", "line 2: 3 values"),
        ("step,page,event,bytes\n1,2,hit,0\n1,-2,hit,0\n", "line 3: page = '-2'"),
        ("step,page,event,bytes\n1,2,miss,0\n", "line 2: event = 'miss'"),
        ("step,page,event,bytes\n1,2,hit,1e9\n", "line 2: bytes = '1e9'"),
        ("1,2,hit,0\n", "its first line is"),
        ("", "its first line is None"),
        ("\0\0\0", "its first line is"),
    ],
)
def test_a_trace_is_believed_in_nothing(text, words, tmp_path):
    (tmp_path / "paging.csv").write_text(text)
    with pytest.raises(ValueError) as caught:
        read_trace(tmp_path)
    assert "paging.csv" in str(caught.value) and words in str(caught.value)


def test_a_report_is_read_with_all_that_is_written():
    assert finetune_module._REPORT.keys() == {f.name for f in dataclasses.fields(finetune_module.Report)}
