"""The command line as a user types it."""

import json
import random
import re
import signal
import subprocess
import sys
import time
import types

import fake_cupy
import pytest
import tiny

from tinylora import backend
from tinylora.cli import main
from tinylora.models import safetensors

TEXT = "\n\n".join(
    f"term {i}\n  n. A word that was made for the {i}th test, and means nothing else." for i in range(60)
)
QUICK = [
    "--batch-size",
    "2",
    "--seq-len",
    "32",
    "--warmup",
    "2",
    "--page-budget",
    "8k",
    "--page-bytes",
    "2k",
    "-r",
    "2",
]


@pytest.fixture
def setup(tmp_path):
    """A tiny model folder and a small text; returns the arguments that choose them."""
    tiny.model().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    return ["--model", str(tmp_path / "model"), "--text", str(tmp_path / "text.txt")]


def test_finetune_ends_with_the_whole_account(setup, tmp_path, capsys):
    assert main(["finetune", *setup, *QUICK, "--steps", "4", "--out", str(tmp_path / "run")]) == 0
    printed, progress = capsys.readouterr()
    assert "tokens/s" in progress and "loss" in progress and "4/4" in progress
    for words in (
        "held-out bits per byte, before",
        "held-out bits per byte, after",
        "trainable parameters",
        "bits per quantized parameter",
        "bytes: frozen weights",
        "bytes: gradients",
        "bytes: optimizer state",
        "bytes: tape, peak",
        "page faults",
        "bytes moved by paging",
        "sample, before",
        "sample, after",
        "the adapter lies in",
    ):
        assert words in printed
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["paging"]["faults"] > report["paging"]["pages"] > 4
    assert report["bytes"]["optimizer state, resident at most"] <= 8192 < report["bytes"]["optimizer state"]
    assert (
        main(
            [
                "generate",
                *setup[:2],
                "--adapter",
                str(tmp_path / "run" / "adapter"),
                "--quantize",
                "nf4",
                "--prompt",
                "term",
                "--max-new-tokens",
                "8",
            ]
        )
        == 0
    )
    assert capsys.readouterr().out.startswith("term")


def test_answers_beyond_the_sequences_are_said_once(setup, tmp_path, capsys):
    rows = [{"prompt": "x" * 200, "answer": "a"}] * 18 + [{"prompt": "q", "answer": "a"}] * 22
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    args = ["finetune", *setup[:2], "--text", str(tmp_path / "pairs.jsonl"), *QUICK, "--steps", "3"]
    assert main([*args, "--out", str(tmp_path / "run")]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "answers begin beyond" in line]
    assert said == [
        "tinylora: pairs: 18 of 36 answers begin beyond sequences of 32 tokens (--seq-len) and are not learned"
    ]


def test_prompt_and_answer_files_train_too(setup, tmp_path, capsys):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(json.dumps({"prompt": f"{i}+{i}=", "answer": f"{2 * i}\n"}) for i in range(40)))
    assert (
        main(["finetune", *setup[:2], "--text", str(pairs), *QUICK, "--steps", "2", "--out", str(tmp_path / "run")])
        == 0
    )


def test_the_sample_is_of_the_users_own_text(setup, tmp_path, capsys):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(f'{{"prompt": "say {i}: ", "answer": "{i}"}}\n' for i in range(40)))
    quick = [*QUICK, "--steps", "1", "--out"]
    assert main(["finetune", *setup[:2], "--text", str(pairs), *quick, str(tmp_path / "a")]) == 0
    assert "\n    say 36: " in capsys.readouterr().out
    assert main(["finetune", *setup, *quick, str(tmp_path / "b")]) == 0
    assert json.loads((tmp_path / "b" / "report.json").read_text())["samples"]["after"][:30] in TEXT


@pytest.mark.parametrize("method", ["full", "lora", "qlora-fp4", "qlora-int4", "int8"])
def test_other_methods(method, setup, tmp_path, capsys):
    assert main(["finetune", *setup, *QUICK, "--steps", "2", "--method", method, "--out", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / ("model" if method == "full" else "adapter")).is_dir()


def test_other_options(setup, tmp_path, capsys):
    options = "--compute-dtype bfloat16 --checkpointing --eval-every 1 --dropout 0.1 --page-budget none --accumulate 2 --shards 1"
    command = [
        "finetune",
        *setup,
        *QUICK,
        "--steps",
        "2",
        *options.split(),
        "--schedule",
        "cosine",
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(command) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [set(row) for row in report["history"]] == [{"step", "loss", "heldout"}] * 2
    assert report["paging"]["budget"] is None and report["paging"]["bytes moved"] == 0


def test_compare_prints_one_table_and_draws_one_figure(setup, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    command = [
        "finetune",
        *setup,
        *QUICK,
        "--steps",
        "2",
        "--compare",
        "--seeds",
        "0",
        "1",
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert len(re.findall(r"^(full|LoRA|QLoRA)", printed, re.M)) == 5
    figure = (tmp_path / "run" / "compare.svg").read_bytes()
    assert figure.startswith(b"<?xml")
    monkeypatch.setattr("tinylora.training.finetune.fit", None)  # finished runs are read, not repeated
    assert main(command) == 0
    assert (tmp_path / "run" / "compare.svg").read_bytes() == figure


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the system has no SIGKILL")
def test_killed_at_any_moment_and_resumed_it_ends_with_the_same_bytes(setup, tmp_path):
    def start(out):
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tinylora.cli",
                "finetune",
                *setup,
                *QUICK,
                "--dropout",
                "0.1",
                "--target-modules",
                "q_proj",
                "up_proj",
                "--steps",
                "400",
                "--checkpoint-every",
                "7",
                "--out",
                str(out),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    whole = start(tmp_path / "whole")
    assert whole.wait(1200) == 0, whole.stderr.read().decode()
    checkpoint = tmp_path / "killed" / "checkpoint.safetensors"
    for _ in range(3):
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        run, began = start(tmp_path / "killed"), time.time()
        while not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before:
            assert run.poll() is None and time.time() - began < 1200, "no checkpoint was written"
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.2))
        run.send_signal(signal.SIGKILL)
        assert run.wait(1200) == -signal.SIGKILL, "it had finished before it could be killed"
        run.stderr.close()
    last = start(tmp_path / "killed")
    assert last.wait(1200) == 0, last.stderr.read().decode()
    for file in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "checkpoint.safetensors"):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    assert not list((tmp_path / "killed").rglob("*.part"))
    for run in (whole, last):
        run.stderr.close()


def test_a_finished_run_is_reported_and_not_repeated(setup, tmp_path, capsys, monkeypatch):
    command = ["finetune", *setup, *QUICK, "--steps", "2", "--out", str(tmp_path / "run")]
    assert main(command) == 0
    first = capsys.readouterr().out
    monkeypatch.setattr("tinylora.training.finetune.fit", None)
    assert main(command) == 0
    again = capsys.readouterr()
    assert again.out == first and "has ended before" in again.err


FULL_AFTER_ONE = """
import resource, signal, sys
from tinylora.cli import main
from tinylora.training import checkpoints
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
save = checkpoints.save
def save_and_fill_the_disk(*args):
    save(*args)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
checkpoints.save = save_and_fill_the_disk
sys.exit(main(sys.argv[1:]))
"""


def test_a_disk_that_fills_up_leaves_the_last_checkpoint(setup, tmp_path):
    """A limit on the size of files stands in for a full disk; once there is room, the run goes on from the old checkpoint."""
    pytest.importorskip("resource")
    command = ["finetune", *setup, *QUICK, "--steps", "6", "--checkpoint-every", "2", "--out"]
    full = [sys.executable, "-c", FULL_AFTER_ONE, *command, str(tmp_path / "run")]
    failed = subprocess.run(full, capture_output=True, text=True, timeout=1200)
    assert failed.returncode == 2 and "what was there before is untouched" in failed.stderr, failed.stderr
    tensors, _ = safetensors.load_safetensors(tmp_path / "run" / "checkpoint.safetensors")
    assert tensors["optimizer.step"] == 2
    for name in ("run", "undisturbed"):
        assert main([*command, str(tmp_path / name)]) == 0
    adapters = [
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("run", "undisturbed")
    ]
    assert adapters[0] == adapters[1]


def test_the_job_runs_on_a_device(setup, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(backend, "cuda", lambda: fake_cupy)
    for method in ("qlora", "full"):
        command = ["finetune", *setup, *QUICK, "--steps", "2", "--method", method, "--out", str(tmp_path / method)]
        assert main([*command, "--device", "cuda"]) == 0
    assert fake_cupy.counters["to_device"] > 100
    command = ["generate", *setup[:2], "--adapter", str(tmp_path / "qlora" / "adapter"), "--max-new-tokens", "3"]
    assert main([*command, "--device", "cuda"]) == 0


def test_cupy_without_a_gpu_is_said(setup, tmp_path, capsys, monkeypatch):
    blind = types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=lambda: False))
    monkeypatch.setitem(sys.modules, "cupy", blind)
    assert main(["finetune", *setup, "--device", "cuda", "--out", str(tmp_path / "run")]) == 2
    assert "CuPy is installed but finds no GPU; use device cpu" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert main(["generate", *setup[:2], "--device", "cuda"]) == 2
    assert "CuPy is not installed" in capsys.readouterr().err


def test_pretrain_writes_a_folder_with_a_card(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(TEXT * 4)
    command = [
        "pretrain",
        str(tmp_path / "a.txt"),
        str(tmp_path / "b.txt"),
        "--out",
        str(tmp_path / "base"),
        "--steps",
        "3",
        "--batch-size",
        "2",
        "--seq-len",
        "32",
        "--hidden-size",
        "16",
        "--intermediate-size",
        "24",
        "--num-hidden-layers",
        "1",
    ]
    assert main(command) == 0
    card = (tmp_path / "base" / "README.md").read_text()
    assert "| a |" in card and "bits per byte" in card and "| steps | 3 |" in card and "| seed | 0 |" in card
    capsys.readouterr()
    assert (
        main(
            [
                "generate",
                "--model",
                str(tmp_path / "base"),
                "--prompt",
                "x",
                "--max-new-tokens",
                "4",
                "--out",
                str(tmp_path / "t.txt"),
            ]
        )
        == 0
    )
    assert (tmp_path / "t.txt").read_text().startswith("x")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--target-modules", "query"], "target module 'query' does not exist; the layers are down_proj"),
        (["--page-budget", "1k", "--page-bytes", "2k"], "budget of 1024 bytes is smaller than one page of 2048"),
        (["--model", "nowhere"], "nowhere: expected 'base' or a folder"),
        (["--text", "nowhere"], "nowhere does not exist"),
        (["--dropout", "1"], "dropout = 1.0"),
        (["--seq-len", "5000"], "of 5000 tokens are longer than the model's max_position_embeddings = 64"),
    ],
)
def test_bad_input_is_one_sentence(arguments, words, setup, tmp_path, capsys):
    command = ["finetune", *setup, *QUICK, "--steps", "1", "--out", str(tmp_path / "run"), *arguments]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.parametrize(
    "arguments", [[], ["finetune", "--steps", "0"], ["finetune", "--page-budget", "lots"], ["dance"]]
)
def test_bad_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and "usage: tinylora" in capsys.readouterr().err


def test_an_adapter_is_trained_further(setup, tmp_path, capsys):
    """On its own base, held as it was then, with its own settings: it begins where the first run ended."""
    first, then = tmp_path / "first", tmp_path / "then"
    quick = ["--batch-size", "2", "--seq-len", "32", "--warmup", "0", "--steps", "3", "--text", setup[3]]
    own = ["-r", "3", "--alpha", "9", "--blocksize", "32", "--target-modules", "q_proj", "up_proj", "--rslora"]
    narrow = ["--exclude-modules", "model.layers.0.mlp.up_proj", "--layers-to-transform", "0", "1"]
    assert main(["finetune", *setup[:2], *quick, *own, *narrow, "--out", str(first)]) == 0
    one = json.loads((first / "report.json").read_text())
    assert main(["finetune", "--adapter", str(first / "adapter"), *quick, "-r", "8", "--out", str(then)]) == 0
    assert f"-r has no effect here: the adapter {first / 'adapter'} has its own settings" in capsys.readouterr().err
    two = json.loads((then / "report.json").read_text())
    assert two["before"] == one["after"] != two["after"] and two["trainable"] == one["trainable"]
    settled = [
        "r",
        "alpha",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "blocksize",
        "use_rslora",
        "method",
    ]
    assert {name: two["job"][name] for name in settled} == {name: one["job"][name] for name in settled}
    configs = [json.loads((run / "adapter" / "adapter_config.json").read_text()) for run in (first, then)]
    assert configs[0] == configs[1] and configs[1]["r"] == 3
    capsys.readouterr()
    assert main(["finetune", "--adapter", str(first / "adapter"), *quick, "--out", str(then)]) == 0
    assert "this run has ended before" in capsys.readouterr().err
    before = (first / "adapter" / "adapter_model.safetensors").read_bytes()
    assert main(["finetune", "--adapter", str(first / "adapter"), *quick, "--out", str(first)]) == 2
    assert "would overwrite the adapter that is trained further" in capsys.readouterr().err
    assert (first / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_an_adapter_of_another_base_is_not_trained_further(setup, tmp_path, capsys):
    quick = ["--batch-size", "1", "--seq-len", "16", "--warmup", "0", "--steps", "1", "--text", setup[3]]
    assert main(["finetune", *setup[:2], *quick, "-r", "2", "--out", str(tmp_path / "a")]) == 0
    tiny.model(seed=1).save_pretrained(tmp_path / "other")
    command = ["finetune", *quick, "--adapter", str(tmp_path / "a" / "adapter"), "--out", str(tmp_path / "b")]
    capsys.readouterr()
    assert main([*command, "--model", str(tmp_path / "other")]) == 2
    assert "was trained on another base" in capsys.readouterr().err
    assert main([*command, "--method", "full"]) == 2
    assert "an adapter needs a method that trains one, and 'full' does not" in capsys.readouterr().err
    assert main([*command, "--method", "lora"]) == 0  # in 16 bits: the same base, held otherwise
    assert "here it is held in bfloat16" in capsys.readouterr().err


def test_a_head_that_is_the_embedding_is_parted_from_it_where_it_is_adapted(setup, tmp_path, capsys):
    quick = ["--batch-size", "1", "--seq-len", "16", "--warmup", "0", "--steps", "2", "-r", "2"]
    command = ["finetune", *setup, *quick, "--target-modules", "q_proj", "lm_head", "--out", str(tmp_path / "run")]
    assert main(command) == 0
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["lm_head", "q_proj"]
    words = ["--adapter", str(tmp_path / "run" / "adapter"), "--max-new-tokens", "4"]
    assert main(["generate", *words]) == 0


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("finetune --seed -1", "argument --seed: '-1' is not a whole number, 0 or more"),
        ("finetune --seed 1.5", "argument --seed: '1.5' is not a whole number, 0 or more"),
        ("finetune --compare --seeds 0 -2", "argument --seeds: '-2' is not a whole number, 0 or more"),
        ("finetune --lr nan", "argument --lr: 'nan' is not a finite number, 0 or more"),
        ("finetune --alpha inf", "argument --alpha: 'inf' is not a finite number"),
        ("finetune -r 0", "argument -r: '0' is not a whole number, 1 or more"),
        ("finetune --checkpoint-every -1", "argument --checkpoint-every: '-1' is not a whole number, 0 or more"),
        ("finetune --page-budget -1k", "argument --page-budget: '-1k' is not a size"),
        ("finetune --page-bytes infk", "argument --page-bytes: 'infk' is not a size"),
        ("generate --temperature nan", "argument --temperature: 'nan' is not a finite number, 0 or more"),
        ("generate --top-k 0", "argument --top-k: '0' is not a whole number, 1 or more"),
        *(
            (f"generate --top-p={p}", f"argument --top-p: '{p}' is not a number, more than 0 and at most 1")
            for p in ("nan", "0", "1.5", "-0.1", "inf")
        ),
        *(
            (f"finetune --epochs={n}", f"argument --epochs: '{n}' is not a finite number, more than 0")
            for n in ("0", "0.0", "-1", "nan", "inf")
        ),
        ("pretrain text --out x --epochs 0", "argument --epochs: '0' is not a finite number, more than 0"),
        ("experiments --seeds -1", "argument --seeds: '-1' is not a whole number, 0 or more"),
        ("memory --seq-len x", "argument --seq-len: 'x' is not a whole number, 1 or more"),
    ],
)
def test_a_number_that_cannot_be_is_said_with_its_option(words, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words.replace(" -1k", "=-1k").split())
    assert stop.value.code == 2 and sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("--method full -r 2", "-r has no effect here: full fine-tuning has no bypass"),
        ("--method lora --blocksize 32", "--blocksize has no effect here: no layer is quantized in blocks"),
        ("--page-budget none --pool file", "--pool has no effect here: with --page-budget none nothing is paged"),
        ("--epochs 0.01 --steps 3", "--steps has no effect here: --epochs says how many there are"),
        ("--full-lr 0.1", "--full-lr has no effect here: it is for --compare"),
    ],
)
def test_an_option_without_effect_is_said(words, sentence, setup, tmp_path, capsys):
    command = ["finetune", *setup, "--batch-size", "1", "--seq-len", "16", "--steps", "1", "--warmup", "0"]
    assert main([*command, "--out", str(tmp_path / "run"), *words.split()]) == 0
    said = capsys.readouterr().err
    assert f"tinylora: finetune: {sentence}\n" in said and "Warning" not in said


def test_an_option_is_noticed_however_it_is_written(setup, tmp_path, capsys):
    """Abbreviated, attached, or with "=": what was given is what argparse read."""
    command = ["finetune", *setup, "--batch-size", "1", "--seq-len", "16", "--steps", "1", "--warmup", "0"]
    command += ["--method", "full", "--out", str(tmp_path / "run")]
    assert main([*command, "-r3", "--alp", "2", "--target-modules=q_proj"]) == 0
    said = capsys.readouterr().err
    assert all(f"finetune: {option} has no effect here" in said for option in ("-r", "--alpha", "--target-modules"))


def test_the_block_size_of_a_4_bit_folder_is_its_own(setup, tmp_path, capsys):
    four = tmp_path / "four"
    assert main(["quantize", setup[1], "--out", str(four), "--blocksize", "32"]) == 0
    command = ["finetune", *setup, "--model", str(four), "--steps", "1", "--seq-len", "16", "--warmup", "0"]
    assert main([*command, "--blocksize", "64", "--out", str(tmp_path / "run")]) == 0
    assert f"--blocksize has no effect here: {four} is in 4 bits already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, words",
    [
        ("--code int8", "--code has no effect without --out"),
        ("--code nf4", "--code has no effect without --out"),
        ("--force", "--force has no effect without --out"),
        ("--draws 5", "--draws has no effect without --normality"),
        ("--code int8 --no-double --out OUT", "--no-double-quant is for the 4-bit codes that are measured"),
        ("--code int8 --blocksize 32 --out OUT", "--blocksize is for the 4-bit codes that are measured"),
        ("--code fp4 --no-double-quant --blocksize 32 --force --out OUT", None),
        ("--no-double-quant --blocksize 32", None),
    ],
)
def test_an_option_of_quantize_that_has_no_effect_is_said(options, words, setup, tmp_path, capsys):
    options = options.replace("OUT", str(tmp_path / "out"))
    assert main(["quantize", setup[1], "--codes", "nf4", *options.split()]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tinylora: ")]
    assert said == [] if words is None else len(said) == 1 and f"tinylora: quantize: {words}" in said[0]


def test_epochs_on_the_command_line(setup, tmp_path, capsys):
    """Half an epoch, finished and asked for again; then a whole one, which goes on."""
    command = ["finetune", *setup, *QUICK, "--out", str(tmp_path / "run"), "--schedule", "constant"]
    assert main([*command, "--epochs", "0.5"]) == 0
    half = json.loads((tmp_path / "run" / "report.json").read_text())
    capsys.readouterr()
    assert main([*command, "--epochs", "0.5"]) == 0
    assert "this run has ended before" in capsys.readouterr().err
    assert main([*command, "--epochs", "1"]) == 0
    whole = json.loads((tmp_path / "run" / "report.json").read_text())
    assert half["recipe"]["steps"] == len(half["history"]) and whole["first_step"] == len(half["history"])
    assert len(whole["history"]) == whole["recipe"]["steps"] >= 2 * len(half["history"]) - 1
    assert whole["history"][: len(half["history"])] == half["history"]


@pytest.mark.parametrize("command", ["finetune", "generate", "pretrain"])
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "example" in printed and "--seed" in printed and "--device" in printed and len(printed.splitlines()) > 25
