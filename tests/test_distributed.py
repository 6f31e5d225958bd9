"""Several processes that train together: the ordered sum, the same bytes from any number of them, and what ends them.

Without MPI the ranks are threads with a communicator of their own. The tests of mpirun are skipped where it or mpi4py is not installed.
"""

import contextlib
import importlib.util
import json
import os
import pickle
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny

import tinylora as tl
from tinylora.adapters import count_parameters
from tinylora.cli import main
from tinylora.cli import together as together_module
from tinylora.costs import communication, flops, memory
from tinylora.costs.parameters import llama_shapes
from tinylora.training import distributed, train
from tinylora.training.corpus import Text
from tinylora.training.distributed import ALONE, Ranks, sent_bytes
from tinylora.training.train import Recipe, bits_per_byte, fit

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "many_machines.md").read_text(encoding="utf-8")
TEXT = Text([np.frombuffer(b"the quick brown fox jumps over the lazy dog. " * 40, np.uint8)])
RECIPE = Recipe(steps=3, batch_size=4, seq_len=16, lr=1e-2, warmup=1, shards=3, accumulate=2)


# --------------------------------------------------------------------------------------------------- ranks that are threads
class Threads:
    """What mpi4py's communicator does, between threads: one of these for each rank, over shared queues."""

    def __init__(self, rank, size, shared):
        self.rank, self.size, self.shared = rank, size, shared

    def Get_rank(self):
        return self.rank

    def Get_size(self):
        return self.size

    def Send(self, array, dest):
        self.shared["queues"][self.rank, dest].put(array.copy())

    def Recv(self, array, source):
        array[...] = self.shared["queues"][source, self.rank].get(timeout=60)

    def allgather(self, value):
        self.shared["told"][self.rank] = pickle.dumps(value)
        self.shared["barrier"].wait(60)
        told = [pickle.loads(self.shared["told"][k]) for k in range(self.size)]
        self.shared["barrier"].wait(60)
        return told

    def Bcast(self, array, root):
        array[...] = np.frombuffer(self.allgather(array.tobytes())[root], array.dtype).reshape(array.shape)


def on_ranks(n, f):
    """[f(ranks) of each of n ranks]; what one raises is raised."""
    pairs = [(a, b) for a in range(n) for b in range(n)]
    shared = {"told": {}, "barrier": threading.Barrier(n), "queues": {pair: queue.Queue() for pair in pairs}}
    found, errors = [None] * n, []

    def run(rank):
        try:
            found[rank] = f(Ranks(Threads(rank, n, shared)))
        except BaseException as error:
            errors.append((rank, error))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    if errors:
        raise min(errors, key=lambda pair: pair[0])[1]
    return found


# ------------------------------------------------------------------------------------------------------------ the ordered sum
def slow_sum(shards, p):
    """The gradients of p, added one after the other, element by element; None where no shard has one."""
    given = [g[p] for g in shards if p in g]
    if not given:
        return None
    total = given[0].copy()
    for g in given[1:]:
        for place in np.ndindex(total.shape):
            total[place] = np.float32(total[place] + g[place])
    return total


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
def test_the_sum_is_that_of_one_process_in_every_bit(n, rng, monkeypatch):
    """Whatever the ranks: numbers whose sum depends on the order, parameters that only some shards have, pieces of a message."""
    monkeypatch.setattr(distributed, "PIECE", 4 * int(rng.integers(1, 9)))
    for count in (1, 2, 3, 8):
        parameters = [tl.Tensor(np.zeros(shape, np.float32)) for shape in ((3, 4), (5,), (1, 1), (2, 7))]
        shards = []
        for i in range(count):
            some = [p for p in parameters[:2] if rng.random() < 0.7] + parameters[2:3] * (i == count - 1)
            scale = 10.0 ** rng.integers(-6, 6, 1)
            shards.append({p: (rng.standard_normal(p.shape) * scale).astype(np.float32) for p in some})
        shards[-1][parameters[2]][...] = -0.0  # which is no longer -0 once it has been added to 0
        expected = {p: slow_sum(shards, p) for p in parameters}

        def summed(ranks, shards=shards, parameters=parameters):
            mine = [({p: g.copy() for p, g in shards[i].items()}, i) for i in ranks.own(len(shards))]
            return *ranks.summed(iter(mine), parameters), ranks.sent

        present = sum(p.size for p in parameters if expected[p] is not None)
        found = on_ranks(n, summed)
        for total, told, _ in found:
            assert told == list(range(count))
            for p in parameters:
                assert (p in total) == (expected[p] is not None)
                assert p not in total or total[p].tobytes() == expected[p].tobytes()
        sent = [nbytes for *_, nbytes in found]
        assert (max(sent), sum(sent)) == sent_bytes(present, n)


def test_the_order_decides_the_bits(rng):
    """Or else the test above could not fail: the same shards added as a tree, or backwards, give other bytes."""
    shards = rng.standard_normal((4, 1000)).astype(np.float32)
    forwards = ((shards[0] + shards[1]) + shards[2]) + shards[3]
    assert forwards.tobytes() != ((shards[3] + shards[2]) + shards[1] + shards[0]).tobytes()
    assert forwards.tobytes() != ((shards[0] + shards[1]) + (shards[2] + shards[3])).tobytes()


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_every_part_is_one_ranks(n):
    for parts in range(20):
        owned = [Ranks(Threads(k, n, None)).own(parts) for k in range(n)]
        assert [i for own in owned for i in own] == list(range(parts))
        assert max(map(len, owned)) == -(-parts // n)


def test_an_error_on_one_rank_is_raised_on_all():
    def run(ranks):
        def f():
            if ranks.rank > 0:
                raise FileNotFoundError(f"no file {ranks.rank}")
            return 7

        with pytest.raises(FileNotFoundError) as caught:
            ranks.gathered(f)
        odd = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad")
        with pytest.raises((RuntimeError, UnicodeDecodeError), match="bad"):
            ranks.gathered(lambda: (_ for _ in ()).throw(odd) if ranks.rank == 2 else None)
        return str(caught.value), ranks.first(lambda: ranks.rank), ranks.each(lambda: ranks.rank)

    assert on_ranks(3, run) == [
        ("rank 1: no file 1", 0, 0),
        ("no file 1", 0, 1),
        ("rank 1: no file 1", 0, 2),
    ]


def test_ranks_with_other_files_or_other_parameters_are_found():
    def run(ranks):
        ranks.of_one_run({"recipe": {"steps": 3}, "data": "a"})
        with pytest.raises(ValueError, match=r"rank 2 .* its recipe\.steps is 2, rank 0's is 0"):
            ranks.of_one_run({"recipe": {"steps": ranks.rank // 2 * 2}, "data": "a"})
        p = tl.Tensor(np.full(3, ranks.rank // 2, np.float32))
        with pytest.raises(RuntimeError, match=r"rank 2 no longer holds rank 0's w: .*OPENBLAS_CORETYPE"):
            ranks.check_equal([("w", p)])
        ranks.spread_state([("w", p)])
        ranks.check_equal([("w", p)])

    on_ranks(3, run)


# ---------------------------------------------------------------------------------------------------------------- training
def start(method):
    m = tiny.model()
    if method == "full":
        return m
    if method == "qlora":
        tl.quantize_linears(m)
    tl.seed(1)
    return tl.add_lora(m, r=2, dropout=0.2)


def trained(method, recipe=RECIPE, ranks=ALONE, out=None, **options):
    """(losses, trained bytes, bytes of the checkpoint, bytes of gradients sent) of a run."""
    m = start(method)
    result = fit(m, TEXT, recipe, progress=False, ranks=ranks, out=out, **options)
    saved = (out / "checkpoint.safetensors").read_bytes() if out is not None and ranks.rank == 0 else None
    return result.history, {name: p.data.tobytes() for name, p in m.trainable()}, saved, ranks.sent


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_any_number_of_ranks_ends_with_the_bytes_of_one_process(method, tmp_path):
    (tmp_path / "alone").mkdir()
    history, weights, saved, _ = trained(method, out=tmp_path / "alone")
    numbers = count_parameters(start(method))[0]
    for n in (1, 2, 3, 4):
        out = tmp_path / str(n)
        out.mkdir()
        found = on_ranks(n, lambda ranks, out=out: trained(method, ranks=ranks, out=out))
        assert all(each[:2] == (history, weights) for each in found)
        assert found[0][2] == saved, "the checkpoint"
        sent = [nbytes for *_, nbytes in found]
        assert (max(sent), sum(sent)) == tuple(RECIPE.steps * b for b in sent_bytes(numbers, n))


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path):
    """From a checkpoint of two ranks with three, then with one process: the bytes of a run that was left alone."""
    longer = replace(RECIPE, steps=9)
    expected = trained("qlora", longer)[:2]
    out = tmp_path / "run"
    out.mkdir()
    on_ranks(2, lambda ranks: trained("qlora", ranks=ranks, out=out))
    on_ranks(3, lambda ranks: trained("qlora", replace(RECIPE, steps=6), ranks=ranks, out=out))
    assert trained("qlora", longer, out=out)[:2] == expected


def test_a_parameter_that_lies_by_columns_is_spread_too():
    def run(ranks):
        p = tl.Tensor(np.asfortranarray(np.full((3, 4), ranks.rank, np.float32)))
        ranks.spread_state([("w", p)])
        return p.data.tolist()

    assert on_ranks(2, run) == [np.zeros((3, 4)).tolist()] * 2


@pytest.mark.parametrize("option", ["eval_every", "checkpoint_every", "heldout_limit"])
def test_ranks_that_were_told_to_look_at_other_times_are_found(option, tmp_path):
    def run(ranks):
        options = {"heldout": TEXT, "eval_every": 1, "checkpoint_every": 1, "heldout_limit": 2} | {
            option: 2 + ranks.rank
        }
        with pytest.raises(ValueError, match=r"rank 1 was given another run than rank 0"):
            fit(start("lora"), TEXT, RECIPE, progress=False, ranks=ranks, **options)

    on_ranks(2, run)


def test_all_ranks_clip_by_the_first_ones_norm(monkeypatch):
    """Its last bit depends on the BLAS kernel: here each rank's is another one."""
    here, own = threading.local(), train.clip_grad_norm

    def wrong(parameters, limit, norm=None):
        return own(parameters, limit, norm) * (1 + 1e-3 * getattr(here, "rank", 0))

    monkeypatch.setattr(train, "clip_grad_norm", wrong)
    expected = trained("lora", replace(RECIPE, clip=1e-3))[:2]

    def run(ranks):
        here.rank = ranks.rank
        return trained("lora", replace(RECIPE, clip=1e-3), ranks=ranks)[:2]

    assert on_ranks(3, run) == [expected] * 3


def test_the_evaluation_is_shared_out():
    m = start("lora")
    alone = bits_per_byte(m, TEXT, 16, batch_size=2)
    assert on_ranks(3, lambda ranks: bits_per_byte(m, TEXT, 16, batch_size=2, ranks=ranks)) == [alone] * 3


def test_a_failing_shard_ends_every_rank(monkeypatch):
    def run(ranks):
        bad = [(np.full((2, 4), 300), np.zeros((2, 4), int), np.ones((2, 4)))]
        good = [(np.zeros((2, 4), int),) * 2 + (np.ones((2, 4)),)]
        with train.workers(1) as pool, pytest.raises(IndexError, match="300"):
            batches = bad if ranks.rank == 1 else good
            train._backward(start("lora"), batches, replace(RECIPE, shards=2), 0, pool, None, None, ranks)

    on_ranks(2, run)


# ---------------------------------------------------------------------------------------------------------------- the account
def test_what_a_step_sends_is_predicted_from_the_sizes():
    for method, m in (("full", start("full")), ("lora", start("lora")), ("qlora", start("qlora"))):
        assert communication.trained(tiny.CONFIG, method, r=2) == count_parameters(m)[0]
    assert sent_bytes(10, 1) == (0, 0)
    assert sent_bytes(10, 2) == (40, 80)
    assert sent_bytes(10, 5) == (80, 320)
    assert communication.seconds(10**9, 10) == pytest.approx(6.4)


def test_the_flops_of_a_token_are_those_that_are_counted():
    """To the unit, but for attention's scores, and for what the first block of a model with adapters leaves out: gradients of its input."""
    ids, config = np.zeros((1, 1), int), tiny.CONFIG
    scores = (
        2 * 6 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    )  # one key; q k and p v, each three times
    first = 2 * sum(o * i + 2 * i for o, i in llama_shapes(config, ("q_proj", "k_proj", "v_proj"))[:3])
    for method, left_out in (("full", 0), ("lora", first)):
        m = start(method).train()
        with flops.counting() as count:
            tl.ops.softmax_cross_entropy(m(ids), ids).backward()
        assert count.flops == communication.flops_a_token(config, method, r=2) + scores - left_out


def test_the_page_prints_what_the_command_prints(capsys):
    for precision in ("paper", "engine"):
        options = ["--precision", precision, "--machines", "8", "--checkpointing", "--out", "none"]
        assert main(["memory", "--model", "llama-65b", *options]) == 0
        printed = capsys.readouterr().out
        table = communication.describe(
            "llama-65b", 8, checkpointing=True, seq_len=512, precision=memory.PRECISIONS[precision]
        )
        assert table in printed
        assert all(part in PAGE for part in table.split("\n\n")[1::2])


def test_the_pages_numbers_are_computed():
    full, theta = (communication.trained(memory.MODELS["llama-65b"], method) for method in ("full", "lora"))
    assert f"{full / theta:.2f} times" in PAGE
    for numbers in (full, theta):
        assert f"has {numbers:,}" in PAGE
    held = {
        method: memory.predict("llama-65b", method, r=64, checkpointing=True).total for method in communication.METHODS
    }
    assert (
        f"needs {held['full'] / 1e9:,.0f} GB" in PAGE.replace("\n", " ")
        and f"{held['qlora'] / 1e9:.1f} GB for QLoRA" in PAGE
    )
    for method, words in (("full", "a step of {:,.0f} tokens"), ("lora", "With LoRA {:,.0f} tokens")):
        work = communication.flops_a_token(memory.MODELS["llama-65b"], method)
        tokens = communication.seconds(communication.trained(memory.MODELS["llama-65b"], method), 10) * 1e14 / work
        assert words.format(tokens) in PAGE


def test_the_page_shows_what_a_run_of_four_ranks_prints():
    """The numbers of the embedded model; a test of mpirun holds what is sent to what is predicted."""
    config = memory.config_of("base")
    theta, base = (communication.trained(config, method, r=16) for method in ("lora", "full"))

    def traffic(ranks):
        ranks.sent = 2 * sent_bytes(theta, 4)[0] // (1 if 0 < ranks.rank < 3 else 2)
        return ranks.traffic(theta, base, steps=2)

    rows = distributed.describe_traffic(on_ranks(4, traffic)[0])
    assert "\n".join(f"{name:<40}  {text}" for name, text in rows) in PAGE
    assert f"the second line says {sent_bytes(base, 4)[0]:,} bytes" in PAGE


# ----------------------------------------------------------------------------------------------------------------- the command
@pytest.mark.parametrize(
    "words, asked", [("--distributed", True), ("--distr", True), ("--device", False), ("--", False)]
)
def test_the_option_is_seen_before_the_command_line_is_read(words, asked):
    assert together_module.asked(["finetune", words]) is asked


def test_without_mpi_a_sentence_says_what_to_install(tmp_path):
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py" / "__init__.py").write_text("raise ImportError('no such library')\n")
    for number, said in (("0", True), ("1", False)):
        environment = os.environ | {
            "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}",
            "OMPI_COMM_WORLD_RANK": number,
        }
        command = [sys.executable, "-m", "tinylora.cli", "finetune", "--distributed"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        assert done.returncode == 2 and not done.stdout
        assert ("pip install" in done.stderr and "tinylora[mpi]" in done.stderr) is said
        assert len(done.stderr.splitlines()) == said


MPIRUN = next(
    filter(None, [shutil.which("mpirun", path=str(Path(sys.executable).parent)), shutil.which("mpirun")]), None
)
mpi = pytest.mark.skipif(
    MPIRUN is None or importlib.util.find_spec("mpi4py") is None, reason="needs mpirun and mpi4py (extra mpi)"
)
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",  # more ranks than cores
    "PYTHONPATH": str(ROOT),
}


@pytest.fixture
def setup(tmp_path):
    tiny.model().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 60)
    quick = "--seq-len 32 --batch-size 4 --heldout 3 -r 2 --shards 4 --checkpoint-every 2 --steps 6 --dropout 0.1"
    return ["finetune", "--model", str(tmp_path / "model"), "--text", str(tmp_path / "text.txt"), *quick.split()]


def started(n, *command):
    """The line that starts n ranks of each command."""
    each = [part for one in command for part in (":", "-n", str(n), sys.executable, "-m", "tinylora.cli", *one)]
    return [MPIRUN, "--bind-to", "none", *each[1:]]


def run(n, *command, timeout=120):
    done = subprocess.run(started(n, *command), capture_output=True, text=True, env=ENVIRONMENT, timeout=timeout)
    said = [line for line in done.stderr.splitlines() if line.startswith("tinylora: ")]
    return done.returncode, done.stdout, said


def result(out):
    return [(out / name).read_bytes() for name in ("adapter/adapter_model.safetensors", "checkpoint.safetensors")]


@mpi
def test_mpirun_with_one_two_and_four_ranks_ends_with_the_same_bytes(setup, tmp_path):
    assert main([*setup, "--out", str(tmp_path / "alone")]) == 0
    expected = result(tmp_path / "alone")
    for n in (1, 2, 4):
        out = tmp_path / str(n)
        status, printed, said = run(n, [*setup, "--distributed", "--out", str(out)])
        assert (status, said) == (0, []), said
        assert printed.count("held-out bits per byte, after") == 1
        assert result(out) == expected
        traffic = json.loads((out / "report.json").read_text())["traffic"]
        assert (traffic["a rank, sent"], traffic["all, sent"]) == sent_bytes(traffic["trained"], n)
        assert traffic["ranks"] == n and traffic["base"] > 10 * traffic["trained"]
        assert n == 1 or f"{traffic['a rank, predicted']:,} bytes" in printed


@mpi
def test_mpirun_pretrains_to_the_same_bytes(tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 60)
    small = (
        "--hidden-size 16 --intermediate-size 16 --num-hidden-layers 1 --num-attention-heads 2 --num-key-value-heads 1"
    )
    command = [
        "pretrain",
        str(tmp_path / "text.txt"),
        *small.split(),
        "--steps",
        "3",
        "--seq-len",
        "16",
        "--shards",
        "4",
    ]
    assert main([*command, "--out", str(tmp_path / "alone")]) == 0
    assert run(2, [*command, "--distributed", "--out", str(tmp_path / "two")])[0] == 0
    for name in ("model.safetensors", "checkpoint.safetensors", "README.md"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


@mpi
@pytest.mark.parametrize("victim, others", [(0, 2), (1, 4)])
def test_a_run_whose_rank_is_killed_goes_on_with_more_or_fewer(victim, others, setup, tmp_path):
    setup = [*setup, "--steps", "40"]
    assert main([*setup, "--out", str(tmp_path / "alone")]) == 0
    out = tmp_path / "run"
    command = [*setup, "--distributed", "--out", str(out)]
    process = subprocess.Popen(started(3, command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)
    deadline = time.monotonic() + 60
    while not (out / "checkpoint.safetensors").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    os.kill(children(process.pid)[victim], signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0 and not (out / "adapter").exists()
    until = time.monotonic() + 30
    while time.monotonic() < until:  # the folder is another's until the last rank is gone
        status, _, said = run(others, command)
        if status == 0:
            break
        assert "is being written by another run" in said[0]
    assert result(out) == result(tmp_path / "alone")
    assert json.loads((out / "report.json").read_text())["first_step"] > 0


def children(pid):
    """The processes that a process has started, in the order of their ranks."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1]) == pid:
                variables = (folder / "environ").read_bytes().split(b"\0")
                number = next(v for v in variables if re.match(rb"(OMPI_COMM_WORLD_RANK|PMI_RANK)=", v))
                found.append((int(number.split(b"=")[1]), int(folder.name)))
    return [process for _, process in sorted(found)]


@mpi
def test_an_error_ends_all_ranks_with_one_sentence(setup, tmp_path):
    (tmp_path / "other.txt").write_text("another text, which is as long as it has to be; " * 60)
    common = [*setup, "--distributed", "--out", str(tmp_path / "run")]
    other = ["--text", str(tmp_path / "other.txt")]
    for commands, words in (
        ([[*common, "--text", str(tmp_path / "nowhere.txt")]], "nowhere.txt does not exist"),
        ([[*common, "--lr", "1e30", "--warmup", "0", "--schedule", "constant"]], "lower the learning rate"),
        ([[*common, "--no-such-option"]], "unrecognized arguments: --no-such-option"),
        ([common, [*common, *other]], "rank 2 was given another run than rank 0: its job.text"),
        ([common, [*common, "--no-such-option"]], "rank 2: error: unrecognized arguments"),
    ):
        status, printed, said = run(2, *commands)
        assert status == 2 and len(said) == 1 and words in said[0], (status, said)
        assert "bits per byte" not in printed
    assert not (tmp_path / "run" / "adapter").exists()


@mpi
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_one_rank_ends_all(number, status, setup, tmp_path):
    out = tmp_path / "run"
    command = [*setup, "--steps", "4000", "--distributed", "--out", str(out)]
    process = subprocess.Popen(
        started(2, command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT, text=True
    )
    deadline = time.monotonic() + 60
    while not (out / "checkpoint.safetensors").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    ranks = children(process.pid)
    os.kill(ranks[1], number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == status
    assert len(re.findall("the same command goes on from there", told)) == 1
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in ranks):
        assert time.monotonic() < deadline, "a rank is left"
        time.sleep(0.05)
