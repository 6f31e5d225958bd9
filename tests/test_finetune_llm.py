"""finetune on questions and answers, on a GGUF, with pages in a file, with a trace and with 8-bit states; 16-bit storage and prepare."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny

from tinylora import Llama, Tensor, cli, data, dtypes, nn
from tinylora.adapters import kbit
from tinylora.costs import memory, parameters
from tinylora.models.tokenizers import ByteTokenizer
from tinylora.training.corpus import question_and_answer, read_corpus, scored_bytes
from tinylora.training.finetune import Job, finetune, read_trace
from tinylora.training.train import Recipe, bits_per_byte

FAST = Recipe(steps=3, batch_size=2, seq_len=32, lr=1e-2, warmup=0)


@pytest.fixture
def folder(tmp_path):
    tiny.model(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    return str(tmp_path / "text.txt")


# ------------------------------------------------------------------------------------------------------ questions and answers
def test_a_question_is_asked_in_turns_and_the_end_of_the_answer_is_learned():
    pairs = question_and_answer([("ab", "xy"), ("c", "é")], tiny.Turns())
    assert pairs.pairs == [([1, 97, 98, 2], [120, 121, 3]), ([1, 99, 2], [195, 169, 3])]
    assert pairs.tokens == 6
    inputs, targets, mask = pairs.windows(8)
    assert targets[0][mask[0] == 1].tolist() == [120, 121, 3], "the loss is on the answer only"
    assert inputs[0][:4].tolist() == [1, 97, 98, 2]


def test_pairs_without_turns_stay_as_they_were():
    pairs = question_and_answer([("ab", "xy")], ByteTokenizer())
    assert pairs.pairs == [([97, 98], [120, 121])]


def test_the_jargon_file_as_pairs_loses_no_definition():
    for split in ("train", "heldout"):
        pairs = data.jargon_pairs(split)
        entries = [e for e in data.jargon(split).decode().split("\n\n") if e.strip()]
        assert len(pairs) == len(entries) > 200
        assert all(question.endswith('" mean to a hacker?') and answer for question, answer in pairs)
    assert {q for q, _ in data.jargon_pairs("train")}.isdisjoint(q for q, _ in data.jargon_pairs("heldout"))


def test_a_text_of_tokens_knows_its_bytes(tmp_path):
    class Pairs(ByteTokenizer):  # two bytes a token
        vocab_size = 1 << 16

        def encode(self, text):
            raw = text if isinstance(text, bytes) else text.encode()
            return [int.from_bytes(raw[i : i + 2], "big") for i in range(0, len(raw), 2)]

        def token_bytes(self, token):
            return token.to_bytes(2, "big")

    (tmp_path / "t.txt").write_text("é" * 500, encoding="utf-8")
    train, heldout = read_corpus(tmp_path / "t.txt", Pairs())
    assert train.tokens == 450 and heldout.tokens == 50
    _, targets, mask = heldout.windows(16)
    assert scored_bytes(heldout, targets, mask) == 98, "all but the first token, two bytes each"
    _, targets, mask = (a[:1] for a in heldout.windows(16))
    assert scored_bytes(heldout, targets, mask) == 32


def test_a_limit_scores_the_first_windows_only():
    m, corpus = tiny.model(), question_and_answer([("a", "bcd"), ("e", "fghijk"), ("l", "mn")], ByteTokenizer())
    first = question_and_answer([("a", "bcd")], ByteTokenizer())
    assert bits_per_byte(m, corpus, 16, limit=1) == pytest.approx(bits_per_byte(m, first, 16), rel=1e-6)


# ------------------------------------------------------------------------------------------------------------- how state is held
def test_pools_prefetching_and_whole_tensors_change_no_bit(folder, text):
    job = Job(model=folder, text=text, r=4, page_budget=2048, page_bytes=1024)
    losses = [
        [row["loss"] for row in finetune(replace(job, **change), FAST, progress=False).history]
        for change in ({"page_budget": None}, {}, {"pool": "file"}, {"whole_tensors": True})
    ]
    assert all(row == losses[0] for row in losses)


def test_eight_bit_states_are_smaller_and_learn(folder, text):
    recipe = replace(FAST, steps=12)
    wide = finetune(Job(model=folder, text=text, r=64), recipe, progress=False)
    narrow = finetune(Job(model=folder, text=text, r=64, optimizer="adamw8bit"), recipe, progress=False)
    sizes = [64 * n for block in range(2) for o, i in parameters.llama_shapes(tiny.model(hidden_size=64, intermediate_size=64).config)[:7]
             for n in (i, o)]  # fmt: skip
    assert (
        narrow.bytes["optimizer state"]
        == memory.optimizer_bytes(sizes, "adamw8bit")
        < wide.bytes["optimizer state"] / 2
    )
    assert narrow.after < narrow.before and abs(narrow.after - wide.after) < 0.3 * (wide.before - wide.after)


def test_an_interrupted_run_with_eight_bit_states_ends_with_the_same_bits(folder, text, tmp_path):
    job, recipe = Job(model=folder, text=text, r=64, optimizer="adamw8bit"), replace(FAST, steps=4)
    whole = finetune(job, recipe, tmp_path / "whole", progress=False)

    class Stopped(Exception):
        pass

    from tinylora.training import checkpoints

    save, calls = checkpoints.save, []

    def stop_after_two(*args):
        save(*args)
        calls.append(1)
        if len(calls) == 2:
            raise Stopped

    checkpoints.save = stop_after_two
    try:
        with pytest.raises(Stopped):
            finetune(job, recipe, tmp_path / "cut", checkpoint_every=1, progress=False)
    finally:
        checkpoints.save = save
    resumed = finetune(job, recipe, tmp_path / "cut", checkpoint_every=1, progress=False)
    assert resumed.first_step == 2
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    assert [r["loss"] for r in whole.history] == [r["loss"] for r in resumed.history]


def test_trace_writes_every_event_and_draws_the_timeline(folder, text, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "run"
    assert cli.main(["finetune", "--model", folder, "--text", text, "--out", str(out), "--steps", "3", "--batch-size", "2",
                     "--seq-len", "32", "-r", "4", "--page-budget", "4k", "--page-bytes", "1k", "--trace"]) == 0  # fmt: skip
    trace, report = read_trace(out), json.loads((out / "report.json").read_text())
    events = [event for _, _, event, _ in trace]
    assert (
        events.count("fault") == report["paging"]["faults"] and events.count("evict") == report["paging"]["evictions"]
    )
    assert {step for step, *_ in trace} == {1, 2, 3}
    assert (out / "paging.svg").stat().st_size > 1000 and "paging.svg" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="run finetune with --trace"):
        read_trace(tmp_path)
    again = ["finetune", "--model", folder, "--text", text, "--out", str(out), "--steps", "3", "--batch-size", "2",
             "--seq-len", "32", "-r", "4", "--page-budget", "4k", "--page-bytes", "1k", "--trace"]  # fmt: skip
    (out / "paging.csv").unlink()
    capsys.readouterr()
    assert cli.main(again) == 0, "a run that has ended is no error"
    assert "no timeline" in capsys.readouterr().out


@pytest.mark.parametrize(
    "option, words", [(["--page-budget", "none"], "nothing is paged"), (["--compare"], "--compare")]
)
def test_a_trace_of_nothing_is_refused_before_the_work(option, words, folder, text, tmp_path, capsys):
    args = [
        "finetune",
        "--model",
        folder,
        "--text",
        text,
        "--out",
        str(tmp_path / "o"),
        "--steps",
        "1",
        "--trace",
        *option,
    ]
    assert cli.main(args) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "o").exists()


def test_a_run_goes_on_with_another_pool_and_budget(folder, text, tmp_path):
    """What changes no bit does not make it another run; nor does an option that the checkpoint is too old to name."""
    from tinylora.models import safetensors

    job, plan = Job(model=folder, text=text, r=4, page_budget=2048, page_bytes=1024), replace(FAST, steps=2)
    finetune(job, plan, tmp_path / "run", checkpoint_every=1, progress=False)
    (tmp_path / "run" / "report.json").unlink()
    path = tmp_path / "run" / "checkpoint.safetensors"
    tensors, metadata = safetensors.load_safetensors(path)
    about = json.loads(metadata["tinylora"])
    for name in ("optimizer", "use_dora"):
        del about["identity"]["job"][name]
    about["identity"]["job"]["heldout"] = 5  # written by a version that named it
    safetensors.save_safetensors(path, tensors, {"tinylora": json.dumps(about)})
    report = finetune(replace(job, pool="file", page_budget=None, heldout=1), plan, tmp_path / "run", progress=False)
    assert report.first_step == 2
    (tmp_path / "run" / "report.json").unlink()
    with pytest.raises(ValueError, match=r"its job.optimizer is 'adamw', this run's is 'adamw8bit'"):
        finetune(replace(job, optimizer="adamw8bit"), plan, tmp_path / "run", progress=False)


def test_a_pool_that_cannot_be_is_said_before_anything_is_evaluated(folder, text, monkeypatch):
    monkeypatch.setattr("tinylora.training.finetune.bits_per_byte", lambda *a, **k: pytest.fail("evaluated first"))
    with pytest.raises(ValueError, match="'managed' is CUDA managed memory"):
        finetune(Job(model=folder, text=text, pool="managed"), FAST, progress=False)


def test_resident_bytes_count_what_is_not_paged(folder, text):
    job = Job(model=folder, text=text, r=64, optimizer="adamw8bit", whole_tensors=True)
    report = finetune(job, FAST, progress=False)
    assert report.bytes["optimizer state, resident at most"] == report.bytes["optimizer state"], "all are below 100,000"


def test_an_answer_out_of_reach_is_a_sentence(folder):
    corpus = question_and_answer([("a" * 40, "b"), ("c", "d")], ByteTokenizer())
    with (
        pytest.warns(UserWarning, match="1 of 2 answers begin beyond"),
        pytest.raises(ValueError, match="no answer begins within 16 tokens"),
    ):
        bits_per_byte(tiny.model(), corpus, 16, limit=1)


# ----------------------------------------------------------------------------------------------------------- 16 bits, and prepare
def test_a_sixteen_bit_embedding_checks_its_ids_and_can_be_untied(rng):
    m = kbit.store_in_16_bits(tiny.model())
    ids = tiny.ids(rng, 1, 5)
    before = tiny.logits(m, ids)
    for bad in (-1, 256):
        with pytest.raises(IndexError, match="the table has rows 0 to 255"):
            m(np.array([[0, bad]]))
    assert tiny.logits(m.untie(), ids).tobytes() == before.tobytes()


def test_sixteen_bits_hold_half_the_bytes_and_give_the_same_logits(xp, rng):
    m = tiny.model()
    for w in m.parameters():
        w.data = dtypes.BFloat16Array.of(w.data).dequantize("float32")
    ids = tiny.ids(rng, 2, 9)
    before, dense = tiny.logits(m, ids), sum(w.nbytes for _, w in m.named_weights())
    kbit.store_in_16_bits(m).to(xp)
    held, norms = sum(w.nbytes for _, w in m.named_weights()), sum(w.nbytes for w in m.parameters())
    assert held - norms == (dense - norms) / 2 and not m.trainable()
    np.testing.assert_allclose(tiny.logits(m, ids), before, rtol=1e-5, atol=1e-5)


def test_prepare_makes_16_bits_32_again_and_checkpoints(rng):
    m = kbit.store_in_16_bits(nn.quantize_linears(tiny.model(hidden_size=64, intermediate_size=64)))
    held = sum(w.nbytes for _, w in m.named_weights())
    ids = tiny.ids(rng, 1, 9)
    before = tiny.logits(m, ids)
    kbit.prepare_for_kbit_training(m)
    assert m.gradient_checkpointing and not m.trainable()
    assert isinstance(m.model.embed_tokens.weight, Tensor) and isinstance(m.model.layers[0].mlp.up_proj, nn.Linear4bit)
    assert sum(w.nbytes for _, w in m.named_weights()) - held == 2 * 256 * 64, (
        "the embedding takes two bytes a weight more"
    )
    np.testing.assert_allclose(tiny.logits(m, ids), before, rtol=1e-5, atol=1e-5)
    assert not kbit.prepare_for_kbit_training(m, gradient_checkpointing=False).gradient_checkpointing


# ------------------------------------------------------------------------------------------------------------------ a real LLM
needs_llm = pytest.mark.skipif(not os.environ.get("TINYLORA_LLM"), reason="TINYLORA_LLM names no GGUF of SmolLM2-135M")
SMOL = [
    "--compute-dtype",
    "bfloat16",
    "--checkpointing",
    "--pool",
    "file",
    "--page-budget",
    "8M",
    "--page-bytes",
    "256k",
]


def run_smol(out, *args):
    """finetune in a process of its own -> its report."""
    command = [sys.executable, "-m", "tinylora.cli", "finetune", "--model", os.environ["TINYLORA_LLM"], *SMOL, *args]
    subprocess.run([*command, "--out", str(out)], check=True, stdout=subprocess.DEVNULL)
    return json.loads((Path(out) / "report.json").read_text())


@needs_llm
def test_three_steps_on_smollm2_stay_within_memory_and_the_account(tmp_path):
    """NF4 with double quantization, all linear layers, bfloat16, paged AdamW, checkpointing; on running text, every sequence full."""
    (tmp_path / "text.txt").write_bytes(data.jargon("heldout"))
    report = run_smol(tmp_path, "--text", str(tmp_path / "text.txt"), "--steps", "3", "--batch-size", "1", "--shards", "1",
                      "--seq-len", "256", "--heldout", "2", "--lr", "5e-4", "--warmup", "0")  # fmt: skip
    assert report["bytes"]["process, peak resident"] < 1.2e9
    assert report["trainable"] == 4_884_480 and report["bits_per_param"] < 4.13
    assert report["bytes"]["optimizer state, resident at most"] <= 8 << 20
    expected = memory.predict("smollm2-135m", batch_size=1, seq_len=256, checkpointing=True)
    assert report["bytes"]["tape, peak"] == pytest.approx(expected.activations, rel=0.02)
    assert report["bytes"]["frozen weights"] == expected.weights + expected.codes + expected.constants
    assert np.isfinite([row["loss"] for row in report["history"]]).all()


@pytest.mark.slow
@needs_llm
def test_a_hundred_steps_on_smollm2_lower_the_held_out_loss_within_1200_mb(tmp_path):
    """The whole of it: 100 steps of two questions and answers of up to 256 tokens. How long it takes is printed, not asserted."""
    report = run_smol(
        tmp_path, "--steps", "100", "--batch-size", "2", "--seq-len", "256", "--heldout", "24", "--lr", "5e-4"
    )
    tokens = report["tokens_per_second"] * report["seconds"] / 100
    assert tokens > 256, "a step of fewer tokens than was promised"
    print(f"{report['seconds']:.0f} s, {tokens:.0f} tokens a step; held out "
          f"{report['before']:.4f} -> {report['after']:.4f}; peak {report['bytes']['process, peak resident']:,} bytes")  # fmt: skip
    assert report["after"] < report["before"] - 0.05
    assert report["bytes"]["process, peak resident"] < 1.2e9


@pytest.mark.oracle
@needs_llm
def test_an_adapter_of_smollm2_opens_in_peft_and_transformers(tmp_path, rng):
    """Trained here on NF4, opened there on the dense base that `convert` wrote, compared with the adapter on the dense base here."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    from tinylora.interop.peft import load_adapter
    from tinylora.models.llama import convert

    gguf = os.environ["TINYLORA_LLM"]
    run_smol(tmp_path / "run", "--steps", "2", "--batch-size", "1", "--shards", "1", "--seq-len", "64", "--heldout", "1",
             "--lr", "1e-3", "--warmup", "0")  # fmt: skip
    convert(gguf, tmp_path / "dense", "float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "run" / "adapter")).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "dense")
    ids = np.array([tokenizer.encode("A hacker is a person who enjoys exploring the details of programmable systems.")])
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).logits.numpy()
        plain = theirs.get_base_model()
        with theirs.disable_adapter():
            plain = theirs(torch.from_numpy(ids)).logits.numpy()
    own = load_adapter(Llama.from_pretrained(gguf), tmp_path / "run" / "adapter").eval()
    assert own.tokenizer.encode(tokenizer.decode(ids[0])) == ids[0].tolist()
    error = np.abs(own(ids).data - expected).max() / np.abs(expected).max()
    print(f"largest relative difference of the logits: {error:.1e}")
    assert error < 1e-3 and np.abs(plain - expected).max() > 1e-2, "the adapter does something"
