"""The loop: accumulation, shards, resuming to the byte, evaluation, and what the corpora hand out."""

import hashlib
import json
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import tiny

import tinylora as tl
from tinylora import ops
from tinylora.models.tokenizers import ByteTokenizer
from tinylora.training import train
from tinylora.training.corpus import Pairs, Text, read_corpus, read_text
from tinylora.training.train import Recipe, bits_per_byte, fit

RECIPE = Recipe(steps=6, batch_size=4, seq_len=16, lr=1e-2, warmup=2, shards=2)
TEXT = Text([np.frombuffer(b"the quick brown fox jumps over the lazy dog. " * 40, np.uint8)])


def adapted(dropout=0.0):
    m = tl.quantize_linears(tiny.model())
    tl.seed(1)
    return tl.add_lora(m, r=4, dropout=dropout)


def state(m):
    return {name: p.data.tobytes() for name, p in m.trainable()}


def test_training_lowers_the_loss():
    m = tiny.model()
    result = fit(m, TEXT, replace(RECIPE, steps=40), progress=False)
    losses = [row["loss"] for row in result.history]
    assert np.mean(losses[-5:]) < 0.8 * losses[0]
    assert result.tape_bytes > 0 and result.optimizer_bytes == 2 * result.gradient_bytes == 2 * sum(
        p.nbytes for _, p in m.trainable()
    )


def test_training_on_a_device_follows_training_on_the_host(xp):
    """Same batches, same adapters; the optimizer's pages cross between the pool and the device, and are counted."""
    m = adapted().to(xp)
    pager = tl.Pager(4096, 1024, device=xp)
    result = fit(m, TEXT, RECIPE, pager=pager, progress=False)
    host = adapted()
    expected = fit(host, TEXT, RECIPE, progress=False)
    np.testing.assert_allclose([r["loss"] for r in result.history], [r["loss"] for r in expected.history], rtol=1e-4)
    assert pager.counters.faults + pager.counters.prefetches > len(pager) and {p.device for _, p in m.trainable()} == {
        "cpu" if xp is np else "cuda"
    }


def test_the_same_seed_gives_the_same_bytes():
    runs = []
    for seed in (0, 0, 1):
        m = adapted(dropout=0.2)
        fit(m, TEXT, replace(RECIPE, seed=seed), progress=False)
        runs.append(state(m))
    assert runs[0] == runs[1] != runs[2]


def grads(m, data, recipe):
    """The gradients of one step, before the optimizer."""
    from tinylora.training.train import _backward, _Sampler, workers

    with workers(recipe.shards) as pool:
        loss, _, _ = _backward(m, _Sampler(data, recipe).batches(0), recipe, 0, pool)
    return loss, {name: p.grad for name, p in m.trainable()}


def test_shards_and_accumulation_give_the_gradient_of_the_whole_batch():
    """Masks differ from row to row, so averaging the micro-batches' means would be wrong."""
    pairs = Pairs([(list(b"12345678"[:n]), list(b"abcdefghijk"[: 12 - n])) for n in range(1, 9)])
    m = tiny.randomize_lora(adapted(), np.random.default_rng(0))
    recipe = replace(RECIPE, batch_size=2, accumulate=3)
    batches = [pairs.batch(np.random.default_rng([0, 0, i]), 2, 16) for i in range(3)]
    whole = [np.concatenate(parts) for parts in zip(*batches, strict=True)]
    loss = ops.softmax_cross_entropy(m(whole[0]), whole[1], whole[2])
    loss.backward()
    expected = {name: p.grad for name, p in m.trainable()}
    for shards in (1, 2):
        value, got = grads(m, pairs, replace(recipe, shards=shards))
        assert value == pytest.approx(loss.item(), rel=1e-5)
        for name in expected:
            np.testing.assert_allclose(got[name], expected[name], rtol=1e-3, atol=1e-5)


def test_in_float16_the_loss_is_scaled_so_that_small_gradients_live(monkeypatch):
    """Without a scale a gradient below 6e-8 is 0 in a product; where the scale makes one infinite, it is halved until none is."""
    data = Pairs([(list(b"12345678"), list(b"abcdefg"))])

    def gradients(dtype, backward=train._scaled_backward, size=1.0):
        m = tiny.randomize_lora(adapted(), np.random.default_rng(0)).compute_in(dtype)
        norm = m.model.norm.weight
        norm.data = norm.data * np.float32(size)  # and with it all gradients
        with train.workers(1) as pool:
            batches = train._Sampler(data, RECIPE).batches(0)
            loss, *_ = backward(m, batches, RECIPE, 0, pool)
        return loss, np.concatenate([p.grad.reshape(-1) for _, p in m.trainable()])

    for size in (1.0, 1e-6, 1e3):
        loss, exact = gradients("float32", size=size)
        halves, ours = gradients("float16", size=size)
        assert abs(halves / loss - 1) < 0.01 and np.linalg.norm(ours - exact) < 0.02 * np.linalg.norm(exact), size
        _, unscaled = gradients("float16", train._backward, size)
        assert size != 1e-6 or np.linalg.norm(unscaled - exact) > 0.2 * np.linalg.norm(exact)
    scales = []
    monkeypatch.setattr(
        train, "_backward", lambda m, *a, scale, f=train._backward: scales.append(scale) or f(m, *a, scale=scale)
    )
    gradients("float16", size=1e3)
    assert scales == [2.0 ** (16 - i) for i in range(len(scales))] and 1 < len(scales) < 17
    scales.clear()
    gradients("bfloat16")
    assert scales == [1.0]


class Stop(Exception):
    pass


@pytest.mark.parametrize("pager", [None, 4096])
def test_a_run_that_stops_anywhere_resumes_to_the_same_bytes(pager, tmp_path):
    def run(out, steps_until_stop=None):
        m = adapted(dropout=0.1)
        data = TEXT
        if steps_until_stop is not None:
            data = Text(TEXT.sources)
            calls = iter(range(steps_until_stop))
            original = data.batch

            def batch(*args):
                if next(calls, None) is None:
                    raise Stop
                return original(*args)

            data.batch = batch
        fit(
            m, data, RECIPE, out=out, checkpoint_every=2, progress=False, pager=tl.Pager(pager, 1024) if pager else None
        )
        return state(m), (out / "checkpoint.safetensors").read_bytes()

    undisturbed = run(tmp_path / "a")
    for stop in (1, 3, 3):  # batches drawn before it stops: at steps 1, 3 and, from the checkpoint at 2, 5
        with pytest.raises(Stop):
            run(tmp_path / "b", stop)
    assert run(tmp_path / "b") == undisturbed


@pytest.mark.parametrize("change", [{"steps": 9}, {"epochs": 0.75}])
def test_more_steps_than_a_finished_run_had_end_as_if_they_had_been_planned(change, tmp_path):
    """With a constant rate, to the byte: a finished run of 6 steps (or half an epoch) goes on."""
    first = replace(RECIPE, **({"epochs": 0.5} if "epochs" in change else {}))

    def run(out, recipe):
        m = adapted(dropout=0.1)
        result = fit(m, TEXT, recipe, out=out, progress=False)
        return state(m), (out / "checkpoint.safetensors").read_bytes(), [row["step"] for row in result.history]

    whole = run(tmp_path / "a", replace(first, **change))
    run(tmp_path / "b", first)
    assert run(tmp_path / "b", replace(first, **change)) == whole
    with pytest.raises(ValueError, match=r"checkpoint of another run: its recipe\.(steps|epochs) is"):
        run(tmp_path / "b", first)  # fewer than it has gone


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_schedule_that_is_laid_out_anew_is_said(kind, tmp_path):
    fit(adapted(), TEXT, replace(RECIPE, schedule=kind), out=tmp_path, progress=False)
    with pytest.warns(UserWarning, match=f"planned for 6 steps and goes on to 8: the {kind} schedule is laid"):
        result = fit(adapted(), TEXT, replace(RECIPE, schedule=kind, steps=8), out=tmp_path, progress=False)
    assert (result.first_step, len(result.history)) == (6, 8)


@pytest.mark.parametrize("data", ["text", "pairs"])
def test_an_epoch_shows_every_sequence_once(data):
    """Two and a half epochs: the first two show each target token exactly twice, in two orders, and no step is empty."""
    if data == "text":
        data = Text([np.arange(1, 84), np.arange(100, 150)])
        wanted = sorted([*range(2, 84), *range(101, 150)])
    else:
        data = Pairs([([1, 2], [i]) for i in range(10, 20)])
        wanted = list(range(10, 20))
    recipe = replace(RECIPE, epochs=2.5, batch_size=2, accumulate=2).planned(data)
    n = len(data.examples(16))
    assert recipe.steps == -(-round(2.5 * n) // 4)
    sampler, seen = train._Sampler(data, recipe), []
    for step in range(recipe.steps):
        for inputs, targets, mask in sampler.batches(step):
            assert mask.any() and len(inputs) <= 2
            seen += [sorted(row[m > 0].tolist()) for row, m in zip(targets, mask, strict=True)]
    assert len(seen) == round(2.5 * n)
    epochs = [[t for row in seen[i * n : (i + 1) * n] for t in row] for i in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == wanted and epochs[0] != epochs[1]
    again = train._Sampler(data, recipe).batches(recipe.steps - 1)  # what a resumed run sees
    assert all(
        (a == b).all()
        for x, y in zip(again, sampler.batches(recipe.steps - 1), strict=True)
        for a, b in zip(x, y, strict=True)
    )


def test_sequences_beyond_the_models_positions_are_refused():
    words = (
        "sequences of 65 tokens are longer than the model's max_position_embeddings = 64; choose a smaller --seq-len"
    )
    with pytest.raises(ValueError, match=words):
        fit(adapted(), TEXT, replace(RECIPE, seq_len=65), progress=False)
    with pytest.raises(ValueError, match=words):
        train.bits_per_byte(adapted(), TEXT, 65)


@pytest.mark.parametrize(
    "change, words", [({"lr": 0.5}, r"its recipe\.lr is 0\.01, this run's is 0\.5"), ({"seed": 3}, r"recipe\.seed")]
)
def test_a_checkpoint_of_another_run_is_refused(change, words, tmp_path):
    fit(adapted(), TEXT, RECIPE, out=tmp_path, progress=False)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    with pytest.raises(ValueError, match=words):
        fit(adapted(), TEXT, replace(RECIPE, **change), out=tmp_path, progress=False)
    with pytest.raises(ValueError, match="its data is"):
        fit(adapted(), Text([TEXT.sources[0][:300]]), RECIPE, out=tmp_path, progress=False)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_diverging_run_says_so():
    m = tiny.model()
    m.model.norm.weight.data[...] = np.inf
    with pytest.raises(FloatingPointError, match=r"the loss is nan and .* lower the learning rate"):
        fit(m, TEXT, RECIPE, progress=False)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_gradient_that_is_not_finite_reaches_neither_weights_nor_checkpoint(tmp_path, monkeypatch):
    m = adapted()
    before = state(m)
    monkeypatch.setattr("tinylora.training.train.clip_grad_norm", lambda *given: math.nan)
    with pytest.raises(FloatingPointError, match="norm of its gradient nan"):
        fit(m, TEXT, RECIPE, out=tmp_path, checkpoint_every=1, progress=False)
    assert state(m) == before and not (tmp_path / "checkpoint.safetensors").exists()


def test_the_peak_of_the_tape_counts_what_checkpoints_rebuild_and_no_weights():
    peaks = {}
    for checkpointing in (False, True):
        m = adapted()
        m.gradient_checkpointing = checkpointing
        peaks[checkpointing] = fit(m, TEXT, replace(RECIPE, steps=1), progress=False).tape_bytes
    assert 0.2 < peaks[True] / peaks[False] < 0.8
    dense = tl.add_lora(tiny.model(), r=4)  # the same activations, whatever the frozen weights are stored in
    assert fit(dense, TEXT, replace(RECIPE, steps=1), progress=False).tape_bytes == peaks[False]


def test_a_tuple_in_what_identifies_a_run_resumes(tmp_path):
    for _ in range(2):
        fit(adapted(), TEXT, RECIPE, out=tmp_path, about={"job": {"targets": ("q_proj", "v_proj")}}, progress=False)


# ------------------------------------------------------------------------------------------------------------------ evaluation
def test_bits_per_byte_of_a_uniform_model_is_8(xp):
    m = tiny.model().to(xp)
    m.model.norm.weight.data[...] = 0
    assert bits_per_byte(m, TEXT, 16) == pytest.approx(8, rel=1e-6)


def test_bits_per_byte_is_the_mean_over_every_byte_but_the_first():
    m, text = tiny.model(), TEXT.sources[0][:50]
    z = tiny.logits(m, text[None, :-1].astype(np.int64))[0].astype(np.float64)
    logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
    expected = -logp[np.arange(49), text[1:]].mean() / math.log(2)
    assert bits_per_byte(m, Text([text]), seq_len=64) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "n, length, stride", [(50, 16, None), (50, 16, 5), (17, 16, 8), (18, 16, 16), (2, 16, None), (100, 7, 3)]
)
def test_windows_score_every_token_once_and_with_context(n, length, stride):
    source = np.arange(n)
    inputs, targets, mask = Text([source, source]).windows(length, stride)
    scored = sorted(targets[mask == 1].tolist())
    assert scored == sorted([*range(1, n)] * 2)
    assert (targets[mask == 1] == inputs[mask == 1] + 1).all()
    position = np.nonzero(mask)[1]
    late = targets[mask == 1] > length
    assert (position[late] >= length - (stride or length // 2)).all()


# --------------------------------------------------------------------------------------------------------------------- corpora
def test_a_batch_is_shifted_by_one(rng):
    inputs, targets, mask = TEXT.batch(rng, 5, 20)
    assert (
        inputs.shape == targets.shape == mask.shape == (5, 20)
        and (inputs[:, 1:] == targets[:, :-1]).all()
        and (mask == 1).all()
    )


def test_pairs_put_the_loss_on_the_answer():
    inputs, targets, mask = Pairs([(list(b"ab"), list(b"cde"))]).windows(6)
    assert bytes(inputs[0, :4].tolist()) == b"abcd" and bytes(targets[0, :4].tolist()) == b"bcde"
    assert mask[0].tolist() == [0, 1, 1, 1, 0, 0]


def test_prompts_that_fill_the_window_get_a_sentence():
    pairs = Pairs([(list(b"a long prompt"), list(b"x"))])
    for call in (lambda: pairs.windows(5), lambda: pairs.batch(np.random.default_rng(0), 2, 5)):
        with pytest.raises(ValueError, match="no answer begins within sequences of 5"):
            call()


def write(path, data):
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "name, data, words",
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n", "is empty"),
        ("a.txt", b"abc\xff", "is not UTF-8 text .byte 3 is 0xff"),
        ("a.jsonl", b'{"prompt": "a"}\n', "line 1: expected a JSON object"),
        ("a.jsonl", b'{"prompt": "a", "answer": "b"}\nx\n', "line 2"),
        ("a.jsonl", b'{"prompt": "a", "answer": "b"}\n', "too few"),
    ],
)
def test_bad_files_get_a_sentence(name, data, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        read_corpus(write(tmp_path / name, data), ByteTokenizer())


def test_good_files_are_split(tmp_path):
    train, heldout = read_corpus(write(tmp_path / "a.txt", b"abcdefghij" * 10), ByteTokenizer())
    assert (train.tokens, heldout.tokens) == (90, 10)
    line = b'{"prompt": "Q", "answer": "A"}\n'
    train, heldout = read_corpus(write(tmp_path / "a.jsonl", line * 10), ByteTokenizer())
    assert (len(train.pairs), len(heldout.pairs)) == (9, 1)
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "none")
    with pytest.raises(ValueError, match="too short for sequences of 200"):
        train_text = Text([np.arange(100)])
        train_text.batch(np.random.default_rng(0), 1, 200)


def test_the_embedded_text_is_split_by_entries():
    from tinylora.data import jargon

    train, heldout = (jargon(split).decode().split("\n\n") for split in ("train", "heldout"))
    heads = [{entry.split("\n", 1)[0] for entry in part} for part in (train, heldout)]
    assert not heads[0] & heads[1] and len(heads[1]) > 200
    with pytest.raises(ValueError, match="split 'test' is unknown"):
        jargon("test")


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"steps": 1.5},
        {"batch_size": -1},
        {"shards": 0},
        {"clip": -1},
        {"lr": float("nan")},
        {"schedule": "linaer"},
        {"epochs": 0},
        {"epochs": float("nan")},
    ],
)
def test_bad_recipes(change):
    with pytest.raises(ValueError, match="expected"):
        replace(RECIPE, **change)


def test_padding_behind_the_last_target_is_not_computed(rng):
    """Trimmed or not, the loss and the gradients are the same; only the columns that count are read."""
    from tinylora.training.train import trimmed

    pairs = Pairs([(rng.integers(0, 256, 5).tolist(), rng.integers(0, 256, 4).tolist()) for _ in range(3)])
    whole = pairs.windows(30)
    short = trimmed(*whole)
    assert [a.shape for a in short] == [(3, 8)] * 3 and short[2].sum() == whole[2].sum() == 12
    grads = []
    for inputs, targets, mask in (whole, short):
        m = tiny.model()
        loss = ops.softmax_cross_entropy(m(inputs), targets, mask)
        loss.backward()
        grads.append((loss.item(), {name: p.grad for name, p in m.trainable()}))
    assert grads[0][0] == pytest.approx(grads[1][0], rel=1e-6)
    for name, g in grads[0][1].items():
        np.testing.assert_allclose(g, grads[1][1][name], rtol=1e-4, atol=1e-6, err_msg=name)
    nothing = trimmed(whole[0], whole[1], np.zeros_like(whole[2]))
    assert nothing[0].shape == (3, 1), "a shard without a target is still run"


# ------------------------------------------------------------------------------- the same numbers as the plain way, kept narrowly
def plain_windows(sources, length, stride):
    """Every window of every source, made at once from lists: (inputs, targets, mask)."""
    rows = []
    for source in sources:
        width, done = min(length, len(source) - 1), 0
        for start in [*range(0, len(source) - 1 - width, stride), len(source) - 1 - width]:
            ids = source[start : start + length + 1]
            counted = [float(done - start <= i < len(ids) - 1) for i in range(length)]
            rows.append(([*ids, *[0] * (length + 1 - len(ids))], counted))
            done = start + width
    ids = np.array([ids for ids, _ in rows])
    return ids[:, :-1], ids[:, 1:], np.array([counted for _, counted in rows], np.float32)


@pytest.mark.parametrize("top", [256, 40_000, 3_000_000_000])
def test_texts_of_any_type_give_the_windows_and_batches_of_plain_lists(top, rng):
    for _ in range(12):
        sources = [rng.integers(0, top, rng.integers(2, 90)).tolist() for _ in range(rng.integers(1, 4))]
        length = int(rng.integers(1, 40))
        stride = int(rng.integers(1, length + 1))
        narrow = Text([np.array(s, np.min_scalar_type(top - 1)) for s in sources])
        wide = Text([np.array(s, np.int64) for s in sources])
        for got, expected in zip(narrow.windows(length, stride), plain_windows(sources, length, stride), strict=True):
            np.testing.assert_array_equal(got, expected)
        places = narrow.examples(length)
        assert [places[i] for i in range(len(places))] == places[:] and places[-1] == places[len(places) - 1]
        short = min(map(len, sources)) - 1
        if short >= 1:
            one, other = (t.batch(np.random.default_rng(3), 5, short) for t in (narrow, wide))
            assert all((a == b).all() and a.dtype == b.dtype for a, b in zip(one, other, strict=True))
        if top < 1 << 31:
            hashed = hashlib.sha256(b"".join(np.array(s, np.int32).tobytes() + b"\0" for s in sources)).hexdigest()
            assert narrow.fingerprint() == hashed[:16]


@pytest.mark.parametrize("top", [256, 40_000, 100_000, 1 << 40])
def test_pairs_in_one_array_are_the_pairs_in_lists(top, rng):
    for _ in range(12):
        n = rng.integers(1, 9)
        pairs = [
            tuple(rng.integers(0, top, rng.integers(0, 12)).tolist() for _ in range(2 * rng.integers(1, 3)))
            for _ in range(n)
        ]
        pairs.append(([1], [top - 1]))
        data = Pairs(iter(pairs))
        assert data.pairs == pairs and list(data.pairs) == pairs and data.pairs[1:] == pairs[1:]
        assert data.pairs != pairs[1:] and data.pairs[-1] == pairs[-1]
        hashed = hashlib.sha256(b"".join(json.dumps(pair).encode() + b"\0" for pair in pairs)).hexdigest()
        assert data.fingerprint() == hashed[:16]
        length = int(rng.integers(2, 30))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inputs, targets, mask = data.windows(length)
        for row, shifted, counted, pair in zip(inputs, targets, mask, pairs, strict=True):
            ids = [i for part in pair for i in part]
            learned = [k % 2 for k, part in enumerate(pair) for _ in part]
            full = [*ids, *[0] * (length + 1)][: length + 1]
            wanted = [*learned, *[0] * (length + 1)][1 : length + 1]
            assert (row.tolist(), shifted.tolist(), counted.tolist()) == (full[:-1], full[1:], wanted)


def test_a_score_is_the_same_to_the_bit_in_batches_and_from_all_windows_at_once(rng):
    m, text = tiny.model(), Text([rng.integers(0, 256, n).astype(np.uint8) for n in (500, 40, 7)])
    for limit in (None, 1, 17, 10_000):
        inputs, targets, mask = (a[:limit] for a in text.windows(16))
        nats = []
        for i in range(0, len(inputs), 16):
            part = train.trimmed(*(a[i : i + 16] for a in (inputs, targets, mask)))
            nats.append(ops.softmax_cross_entropy(m(part[0]), part[1], part[2], reduction="sum").item())
        expected = math.fsum(nats) / math.log(2) / int(mask.sum())
        assert bits_per_byte(m, text, 16, limit=limit) == expected
