"""The memory account: what is predicted from sizes equals, to the byte, what is measured on arrays that exist."""

import argparse
from dataclasses import asdict, replace

import numpy as np
import pytest
import tiny

import tinylora as tl
from tinylora import backend
from tinylora.cli.costs import memory_parser
from tinylora.costs import memory, tables
from tinylora.models.llama import LlamaConfig
from tinylora.nn import quantize_linears
from tinylora.optim import AdamW
from tinylora.paging import Pager
from tinylora.papers import qlora_numbers
from tinylora.training import finetune, train
from tinylora.training.corpus import Text


def batch(rng, b, t, vocab=256):
    return rng.integers(0, vocab, (b, t)), rng.integers(0, vocab, (b, t)), np.ones((b, t), np.float32)


def agree(predicted, measured):
    """Every row, to the byte; both are printed."""
    print(memory.describe_agreement(predicted, measured))
    assert predicted.rows() == measured.rows()
    assert predicted.total == measured.total == sum(measured.rows().values())


# ------------------------------------------------------------------------------------------------------ predicted and measured
@pytest.mark.parametrize("checkpointing", [False, True], ids=["all kept", "checkpointing"])
@pytest.mark.parametrize("method", memory.METHODS)
@pytest.mark.parametrize("b, t, r", [(1, 24, 1), (3, 65, 8), (2, 150, 16)])
def test_every_row_of_the_embedded_model_is_predicted_to_the_byte(method, checkpointing, b, t, r, rng):
    model = finetune.prepare(finetune.Job(method=method, r=r, checkpointing=checkpointing)).train()
    predicted = memory.predict("base", method, r=r, batch_size=b, seq_len=t, checkpointing=checkpointing)
    agree(predicted, memory.measure(model, batch(rng, b, t)))


@pytest.mark.parametrize(
    "names",
    [["q_proj", "v_proj"], ["up_proj"], ["gate_proj"], ["down_proj", "o_proj"], ["k_proj", "up_proj", "down_proj"]],
)
def test_the_rows_follow_which_matrices_are_adapted(names, rng):
    """In the first block nothing before the first adapted matrix needs a gradient, so less is kept there."""
    b, t, r = (int(n) for n in rng.integers(1, [4, 100, 20]))
    for layers, checkpointing in ((1, False), (3, False), (1, True), (3, True)):
        model = quantize_linears(tiny.model(num_hidden_layers=layers, max_position_embeddings=100))
        tl.add_lora(model, r, target_modules=names)
        model.gradient_checkpointing = checkpointing
        options = {"r": r, "target_modules": names, "batch_size": b, "seq_len": t, "checkpointing": checkpointing}
        agree(memory.predict(model.config, **options), memory.measure(model, batch(rng, b, t)))


@pytest.mark.parametrize("method", memory.METHODS)
def test_any_llama_is_predicted_to_the_byte(method, rng):
    """Drawn widths, heads in groups or not, a head of its own or not, odd blocks, constants in 32 or 8 bits."""
    for checkpointing in (False, True):
        kv, groups, half = (int(n) for n in rng.integers(1, 4, 3))
        b, t = (int(n) for n in rng.integers(1, [5, 140]))
        config = LlamaConfig(
            int(rng.integers(30, 90)), int(rng.integers(5, 40)), int(rng.integers(5, 70)), 2, kv * groups, kv,
            t + int(rng.integers(0, 99)), tie_word_embeddings=bool(rng.integers(2)), head_dim=2 * half,
        )  # fmt: skip
        blocksize, double, r = int(rng.integers(3, 90)), bool(rng.integers(2)), int(rng.integers(1, 9))
        backend.seed(1)
        model = tl.Llama(config)
        if method != "full":
            quantize_linears(model, finetune.METHODS[method].code, blocksize, double)
            tl.add_lora(model, r)
        model.gradient_checkpointing = checkpointing
        options = {"r": r, "blocksize": blocksize, "double_quant": double, "batch_size": b, "seq_len": t}
        print(config, options)
        agree(
            memory.predict(config, method, checkpointing=checkpointing, **options),
            memory.measure(model, batch(rng, b, t, config.vocab_size)),
        )


@pytest.mark.parametrize("checkpointing", [False, True], ids=["all kept", "checkpointing"])
@pytest.mark.parametrize("kind", tiny.FAMILY)
def test_the_family_is_predicted_to_the_byte(kind, checkpointing, rng):
    """Biases, norms of heads, and windows, which leave blocks of scores out."""
    model = tiny.model(max_position_embeddings=200, **tiny.FAMILY[kind])
    assert memory.parameters(model.config) == sum(w.size for w in model.parameters())
    codes = {"qlora": "nf4", "int8": "int8_vectorwise"}
    for method, names in (*((m, "all-linear") for m in ("full", *codes)), ("qlora", ["v_proj", "up_proj"])):
        model = tiny.model(max_position_embeddings=200, **tiny.FAMILY[kind])
        if method in codes:
            tl.add_lora(quantize_linears(model, codes[method]), 3, target_modules=names)
        model.gradient_checkpointing = checkpointing
        options = {"r": 3, "target_modules": names, "batch_size": 2, "seq_len": 150, "checkpointing": checkpointing}
        agree(memory.predict(model.config, method, **options), memory.measure(model, batch(rng, 2, 150)))


def test_dropout_gives_each_bypass_a_copy_of_its_input_and_a_mask(rng):
    plain = memory.predict("base", r=4, seq_len=40)
    for checkpointing in (False, True):
        model = finetune.prepare(finetune.Job(r=4, dropout=0.1, checkpointing=checkpointing)).train()
        predicted = memory.predict("base", r=4, seq_len=40, dropout=0.1, checkpointing=checkpointing)
        agree(predicted, memory.measure(model, batch(rng, 1, 40)))
        if not checkpointing:
            assert f"{predicted.activations / plain.activations:.2f}" == "1.26"


@pytest.mark.parametrize("method", memory.METHODS)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["all kept", "checkpointing"])
def test_the_training_loop_reports_what_was_predicted(method, checkpointing, rng):
    """fit cuts a batch into shards. To the byte, but that in full fine-tuning a shard's token ids are a view of the whole batch's."""
    model = finetune.prepare(finetune.Job(method=method, r=4, checkpointing=checkpointing))
    recipe = train.Recipe(steps=1, batch_size=4, seq_len=64, shards=2)
    result = train.fit(model, Text([rng.integers(0, 256, 2000)]), recipe, progress=False)
    predicted = memory.predict("base", method, r=4, batch_size=4, seq_len=64, shards=2, checkpointing=checkpointing)
    print(predicted, result.tape_bytes)
    assert (predicted.gradients, predicted.optimizer) == (result.gradient_bytes, result.optimizer_bytes)
    extra = 2 * 8 * (4 * 65 - 2 * 64) if method == "full" else 0
    assert result.tape_bytes == predicted.activations + extra
    assert extra < 1e-3 * predicted.activations


def test_checkpointing_trades_the_tape_for_the_blocks_inputs():
    """The main job's tape, 172,056,576 bytes as docs/commands.md has it, would be 45,744,128 with checkpointing."""
    kept, rebuilt = (
        memory.predict("base", batch_size=8, seq_len=256, shards=2, checkpointing=c) for c in (False, True)
    )
    assert (kept.activations, rebuilt.activations) == (172_056_576, 45_744_128)
    inputs = memory.tape(memory.config_of("base"), 8, 256, r=16, checkpointing=True)["inputs of blocks"]
    assert inputs == 5 * 8 * 256 * 192 * 4
    lines = memory.block_tape(memory.config_of("base"), 8, 256, memory.MATRICES, r=16)
    assert lines["⊙: u"] == 8 * 256 * 512 * 4 and lines["silu: σ, y"] == 2 * lines["⊙: u"] and lines["⊙: y"] == 0
    assert lines["attention: P"] == 8 * 4 * (256 * 256 // 2 + 32 * 256) * 4


def test_all_bytes_but_the_tapes_are_the_same_on_every_device(xp, rng):
    """`predict` says what NumPy's operations keep, and a device's kernels keep something else (kernels.device)."""
    for method in memory.METHODS:
        model = tiny.model().to(xp)
        if method != "full":
            quantize_linears(model, finetune.METHODS[method].code)
            tl.add_lora(model, r=3)
        optimizer = AdamW(model.trainable(), pager=Pager(device=xp))
        measured = memory.measure(model, batch(rng, 2, 9), optimizer)
        predicted = memory.predict(model.config, method, r=3, batch_size=2, seq_len=9)
        if xp is not np:
            measured = replace(measured, activations=predicted.activations)
        agree(predicted, measured)


def test_measuring_changes_nothing(rng):
    model = finetune.prepare(finetune.Job(r=2))
    before = {name: w.data.tobytes() for name, w in model.trainable()}
    memory.measure(model, batch(rng, 2, 16))
    assert before == {name: w.data.tobytes() for name, w in model.trainable()}
    assert all(w.grad is None for w in model.parameters()) and model.training
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        memory.measure(model.requires_grad_(False), batch(rng, 1, 8))


def test_a_batch_may_be_a_view_and_the_mask_left_out_and_the_optimizer_given(rng):
    model = finetune.prepare(finetune.Job(r=2))
    ids = rng.integers(0, 256, (2, 30))
    optimizer = AdamW(model.trainable(), pager=Pager(1 << 16, 1 << 12))
    measured = memory.measure(model, (ids[:, :-1], ids[:, 1:], None), optimizer, label="mine")
    agree(memory.predict("base", r=2, batch_size=2, seq_len=29), measured)
    assert measured.label == "mine" and measured.optimizer == optimizer.state_bytes


# ----------------------------------------------------------------------------------------------------------------- single parts
def test_the_named_llamas_have_the_published_numbers_of_weights():
    counts = {name: memory.parameters(config) for name, config in memory.MODELS.items()}
    assert counts == {
        "llama-7b": 6_738_415_616,
        "llama-13b": 13_015_864_320,
        "llama-33b": 32_528_943_616,
        "llama-65b": 65_285_660_672,
        "smollm2-135m": 134_515_008,
    }
    model = tl.Llama.from_pretrained("base")
    assert memory.parameters(memory.config_of("base")) == sum(w.size for w in model.parameters())


def test_sizes_come_from_a_name_a_folder_a_config_or_a_model(tmp_path):
    model = tiny.model()
    model.save_pretrained(tmp_path / "m")
    assert (
        memory.config_of(tmp_path / "m")
        == memory.config_of(str(tmp_path / "m"))
        == memory.config_of(model)
        == model.config
    )
    assert memory.config_of(model.config) is model.config and memory.config_of("llama-7b").intermediate_size == 11008
    with pytest.raises(
        FileNotFoundError, match=r"expected 'base', one of llama-7b, .*, a folder with config.json, or FILE.gguf"
    ):
        memory.config_of(tmp_path / "nothing")


@pytest.mark.parametrize("double_quant", [False, True])
def test_constants_and_codes_are_those_of_a_quantized_weight(double_quant, rng):
    for n, blocksize in (
        (1, 64),
        (64, 64),
        (65, 64),
        (64 * 256 + 1, 64),
        tuple(int(i) for i in rng.integers(1, [9000, 100])),
    ):
        q = tl.quantize(rng.standard_normal(n).astype(np.float32), blocksize=blocksize, double_quant=double_quant)
        assert memory.codes_bytes(n) == q.packed.nbytes
        assert memory.constants_bytes(n, blocksize, double_quant) == q.constants.nbytes, (n, blocksize)


def test_optimizer_state_takes_8_bytes_a_parameter_or_2_and_the_blocks_absmax():
    sizes = [4095, 4096, 4097]
    assert memory.optimizer_bytes(sizes) == 8 * sum(sizes)
    assert memory.optimizer_bytes(sizes, "adamw8bit") == 8 * 4095 + (2 * 4096 + 2 * 4 * 16) + (2 * 4097 + 2 * 4 * 17)
    assert memory.optimizer_bytes(sizes, precision=memory.MASTER) == 12 * sum(sizes)
    plain, eight = (memory.predict("llama-7b", r=64, optimizer=o) for o in ("adamw", "adamw8bit"))
    # No tensor is small, and all are whole blocks.
    assert eight.optimizer / plain.optimizer == pytest.approx((2 + 8 / 256) / 8)
    assert replace(plain, optimizer=0) == replace(eight, optimizer=0)
    with pytest.raises(ValueError, match="optimizer 'sgd' is unknown"):
        memory.predict("base", optimizer="sgd")


def test_full_fine_tuning_takes_12_or_16_bytes_a_parameter_and_here_16():
    for precision, bytes_each in ((memory.PAPER, 12), (memory.MASTER, 16), (memory.ENGINE, 16)):
        a = memory.predict("llama-7b", "full", precision=precision)
        assert a.total - a.activations == bytes_each * 6_738_415_616 and a.codes == a.constants == a.adapters == 0
    with pytest.raises(ValueError, match="precision: weights = 'int3'"):
        memory.Precision(weights="int3")


def test_16_bit_activations_are_half_but_for_ids_and_tables():
    c = memory.MODELS["llama-7b"]
    wide, narrow = (memory.tape(c, 2, 100, r=8, number=number) for number in (4, 2))
    assert {k for k in wide if wide[k] == narrow[k] > 0} == {"rotary table"}
    assert wide["blocks"] == 2 * narrow["blocks"]
    loss = "loss: p, weights, targets, rows"
    assert wide[loss] - 16 * 200 == 2 * (narrow[loss] - 16 * 200)


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"method": "prefix"}, "method 'prefix' is unknown: expected one of full, lora, qlora"),
        ({"r": 0}, "r = 0, expected a whole number, 1 or more"),
        ({"seq_len": 1.5}, "seq_len = 1.5, expected a whole number"),
        ({"blocksize": True}, "blocksize = True, expected a whole number"),
        ({"target_modules": "q_proj"}, "target_modules = 'q_proj', expected 'all-linear' or a list"),
        ({"target_modules": ["query"]}, "'query' does not exist"),
        ({"target_modules": []}, r"target_modules is empty"),
    ],
)
def test_wrong_options_are_said_in_a_sentence(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        memory.predict("base", **wrong)


def test_an_account_is_printed_with_its_parts_and_its_sum():
    accounts = [memory.predict("base", m, batch_size=2, seq_len=32) for m in memory.METHODS]
    text = memory.describe(accounts)
    for name in memory.ROWS.values():
        assert name in text
    for a in accounts:
        assert f"{a.total:,}" in text and a.label in text
        assert a.total == sum(v for k, v in asdict(a).items() if k != "label")
    assert [tables.in_units(n) for n in (7, 1500, 12_345_678, 783_427_928_064)] == [
        "7 bytes",
        "1.50 kB",
        "12.3 MB",
        "783 GB",
    ]
    lost = memory.describe_agreement(accounts[2], replace(accounts[2], adapters=accounts[2].adapters * 2))
    assert "-50.0000 %" in lost


# ------------------------------------------------------------------------------------------------------- the command and the figures
def command(*words):
    parser = argparse.ArgumentParser()
    memory_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["memory", *words])
    args.run(args)


def test_the_command_prints_an_account(capsys):
    command("--model", "llama-65b", "--method", "full", "--out", "none")
    out = capsys.readouterr().out
    assert "65,285,660,672 parameters" in out and "precision: paper" in out and "522,285,285,376" in out
    words = "--model smollm2-135m --method all -r 8 --optimizer adamw8bit --no-double-quant --out none"
    command(*words.split())
    out = capsys.readouterr().out
    wanted = memory.predict("smollm2-135m", r=8, optimizer="adamw8bit", double_quant=False, checkpointing=True)
    assert f"{wanted.total:,}" in out and "precision: engine" in out and out.count("\n") == 12


@pytest.mark.parametrize("model", ["llama-65b", "base"])
def test_the_command_says_whether_blocks_are_rebuilt(model, capsys):
    """58.2 GB above a table in which < 48 GB holds: the second is with checkpointing."""
    precision = memory.PRECISIONS["paper" if model.startswith("llama-") else "engine"]
    step = {"r": 64, "precision": precision, "seq_len": 256 if model == "base" else 512}  # as many as it has positions
    without, with_ = (tables.in_units(memory.predict(model, checkpointing=c, **step).total) for c in (False, True))
    command("--model", model, "--out", "none")
    said = capsys.readouterr().out.splitlines()[1]
    assert said == f"without checkpointing: {without} in all; with it: {with_}"
    command("--model", model, "--checkpointing", "--out", "none")
    said = capsys.readouterr().out.splitlines()[1]
    assert said == f"with checkpointing: {with_} in all; without it: {without}"


def test_the_command_measures_what_it_predicts(capsys):
    command(
        "--measure", "--method", "all", "--seq-len", "20", "--batch-size", "2", "--blocksize", "50", "-r", "3",
        "--target-modules", "q_proj", "down_proj", "--out", "none",
    )  # fmt: skip
    out = capsys.readouterr().out
    lines = [line.split() for line in out.partition("predicted and measured")[2].splitlines()]
    numbers = [words[-3:] for words in lines if len(words) > 3 and words[-1] == "0"]
    assert len(numbers) == 4 * 8 and all(p == m for p, m, _ in numbers) and "%" not in out
    for words, sentence in (
        (("--model", "llama-7b"), "--measure runs a step of the embedded model, and --model is 'llama-7b'"),
        (("--precision", "paper"), "--precision must be engine, not paper"),
    ):
        with pytest.raises(ValueError, match=sentence):
            command("--measure", *words)
    command("--measure", "--optimizer", "adamw8bit", "--out", "none", "--seq-len", "16")
    out = capsys.readouterr().out
    assert "optimizer state" in out and "%" not in out, "8-bit states are predicted to the byte as well"


def test_the_command_prints_the_audit_and_draws(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    command("--audit", "--out", str(tmp_path / "six.svg"))
    assert qlora_numbers.describe() in capsys.readouterr().out
    command("--model", "base", "--method", "all", "--out", str(tmp_path / "bars.svg"))
    assert all((tmp_path / name).read_text().startswith("<?xml") for name in ("six.svg", "bars.svg"))


def words_of(figure):
    figure.canvas.draw()
    return figure.axes[0], " ".join(t.get_text() for t in figure.axes[0].texts)


def test_the_bars_are_the_accounts_and_carry_their_numbers():
    pytest.importorskip("matplotlib")
    from tinylora.figures.memory import account_bars

    accounts = [memory.predict("base", m, batch_size=8, seq_len=256, label=m) for m in memory.METHODS]
    ax, text = words_of(account_bars(accounts))
    for i, a in enumerate(accounts):
        widths = [p.get_width() for p in ax.patches if abs(p.get_y() + p.get_height() / 2 - i) < 1e-9]
        assert sum(widths) == pytest.approx(a.total / 1e6)
        for n in [a.total, *a.rows().values()]:
            assert not n or tables.in_units(n) in text
    assert f"{accounts[0].total / accounts[2].total:.1f} times" in ax.get_title()


def test_figure_6_carries_the_papers_labels_and_ours_and_no_texts_overlap():
    pytest.importorskip("matplotlib")
    from tinylora.papers.qlora_numbers import figure_6

    figure = figure_6()
    ax, text = words_of(figure)
    for size, (model, adapters, optimizer, total) in qlora_numbers.FIGURE_6.items():
        assert (
            f"model {model}   adapters {adapters}   optimizer {optimizer} MiB" in text
            and f"{total} GiB printed" in text
        )
        assert f"{qlora_numbers.account(size, checkpointing=True).total / 1e9:.1f} GB" in text
    for i, (_, _, _, total) in enumerate(qlora_numbers.FIGURE_6.values()):
        at = 2.6 * i + 0.95
        parts = [p.get_width() for p in ax.patches if p.get_fill() and abs(p.get_y() + p.get_height() / 2 - at) < 1e-9]
        assert len(parts) == 4 and sum(parts) == pytest.approx(float(total) * 2**30 / 1e9)
    boxes = [t.get_window_extent() for t in ax.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert "13 to 37 %" in ax.get_title()
