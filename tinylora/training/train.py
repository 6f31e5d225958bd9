"""The loop: batches, gradient accumulation, clipping, AdamW, held-out bits per byte, checkpoints, resuming.

Nothing random is carried from step to step. Batch and dropout of step t are drawn from a generator seeded with (seed,
t, micro-batch), so a run that was killed and resumed from its last checkpoint ends with the same bytes as one that was
left alone. That is promised for one machine and one BLAS kernel: another may add a product's terms in another order.

A micro-batch is cut into `shards` that run in threads, BLAS held to one thread each (NumPy releases the interpreter
lock while it computes; elementwise work then uses both cores too, which a threaded BLAS alone would not do). The
gradients are summed in a fixed order: the number of shards is part of the recipe, the number of cores is not. On a GPU, which
is slow at many small pieces, a micro-batch stays whole unless dropout draws masks for each shard.

Where several processes train together (`distributed`), each computes some of a step's shards, and no bit of the result changes.
"""

import contextlib
import itertools
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from .. import backend, ops
from ..backend import move, whole
from ..kernels import copies, threads
from ..optim import AdamW, clip_grad_norm
from ..tape import tape_bytes, watch_rebuilds
from ..tensor import no_grad, state
from . import checkpoints
from .corpus import Pairs, scored_bytes
from .distributed import ALONE
from .schedule import schedule

_WAITING = 1024  # batches that are handed to the threads at a time


@dataclass(frozen=True)
class Recipe:
    """All that decides how a run goes, apart from the model and the data.

    lr follows `schedule` ("constant", "linear" down to 0, or "cosine" down to `floor` times lr) after `warmup` steps; `clip` bounds
    the norm of all gradients together (0: off); weight decay is for matrices only. A step sees accumulate × batch_size sequences
    of seq_len tokens. Without `epochs` each is drawn at random from all of the data. With it they are drawn without replacement:
    each once an epoch, in an order of the epoch's own, and `steps` follows from the data (see `planned`).
    """

    steps: int = 300
    epochs: float | None = None
    batch_size: int = 8
    seq_len: int = 256
    accumulate: int = 1
    shards: int = 2
    lr: float = 2e-3
    schedule: str = "constant"
    warmup: int = 10
    floor: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch_size", "seq_len", "accumulate", "shards"):
            whole(f"recipe: {name}", getattr(self, name))
        for name in ("lr", "warmup", "weight_decay", "clip", "eps"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"recipe: {name} = {getattr(self, name)}, expected 0 or more")
        if self.epochs is not None and not (math.isfinite(self.epochs) and self.epochs > 0):
            raise ValueError(f"recipe: epochs = {self.epochs}, expected more than 0, or None")
        schedule(self.schedule, 0, 1)  # an unknown name is said now, not after the first step

    def planned(self, data):
        """This recipe with the `steps` that its `epochs` take on these data; without epochs, itself."""
        if self.epochs is None:
            return self
        sequences = max(round(self.epochs * len(data.examples(self.seq_len))), 1)
        return replace(self, steps=-(-sequences // (self.batch_size * self.accumulate)))


@dataclass
class Result:
    """What a run measured. `history`: {"step", "loss"} rows (nats a token), with "heldout" (bits per byte) where evaluated.

    tape_bytes: what all shards' tapes hold beside the weights after the forward, plus, with checkpointing, the largest
    block that the backward pass rebuilds (an upper bound of the peak: some of the tape is gone by then).
    """

    history: list = field(default_factory=list)
    tape_bytes: int = 0
    gradient_bytes: int = 0
    optimizer_bytes: int = 0
    first_step: int = 0  # where this process began: more than 0 if the run was resumed
    seconds: float = 0.0
    tokens_per_second: float = 0.0


@contextlib.contextmanager
def workers(n):
    """A thread pool of n with BLAS held to one thread, and freed memory kept by the allocator. Who counts here, counts in it too."""
    from threadpoolctl import threadpool_limits

    copies.keep_freed_memory()
    around = state.around

    def begin():
        threads.stay()
        state.around = around

    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(n, initializer=begin) as pool:
        yield pool


def progress_bar(iterable, enabled, **options):
    """tqdm that redraws twice a second on a terminal, prints a line every half minute into a file, and nothing where stderr is closed."""
    from tqdm import tqdm

    shown = enabled and sys.stderr is not None
    return tqdm(iterable, disable=not shown, mininterval=0.5 if shown and sys.stderr.isatty() else 30, **options)


def check_length(model, seq_len):
    """ValueError if the model has fewer positions than a sequence has tokens."""
    if seq_len > model.config.positions:
        raise ValueError(
            f"sequences of {seq_len} tokens are longer than the model's max_position_embeddings = {model.config.positions}; "
            "choose a smaller --seq-len"
        )


def trimmed(inputs, targets, mask):
    """The three arrays without the columns after the last one that counts: in a causal model nothing before them depends on them."""
    counted = np.flatnonzero(mask.any(axis=0))
    end = int(counted[-1]) + 1 if len(counted) else 1
    return inputs[:, :end], targets[:, :end], mask[:, :end]


def _check_targets(targets, n):
    """IndexError if a target is none of n tokens: asked here, where it is known; a device would have to be waited for."""
    if targets.size and not 0 <= int(targets.min()) <= int(targets.max()) < n:
        raise IndexError(f"targets run from {targets.min()} to {targets.max()}; the model knows tokens 0 to {n - 1}")


def bits_per_byte(model, data, seq_len=256, batch_size=16, shards=2, progress=False, limit=None, ranks=ALONE):
    """−Σ log₂ p(target | context) / the bytes that the targets stand for, each token of `data` scored once (see `windows`).

    limit: the first so many windows only. The token that ends an answer costs bits and stands for no byte. Each of the `ranks` scores a
    part of the batches.
    """
    check_length(model, seq_len)
    places = data.scored(seq_len)
    n = len(range(len(places))[:limit])
    ranks.of_one_run({"number of held-out windows": n})
    # Logits of more than 4 MB are not piled up.
    batch_size = max(min(batch_size, (1 << 20) // model.config.vocab_size // seq_len), 1)
    starts = range(0, n, batch_size)
    mine = [starts[i] for i in ranks.own(len(starts))]
    training = model.training

    def score(start):
        """(nats, bytes) of a batch."""
        inputs, targets, mask = data.rows(places[start : min(start + batch_size, n)], seq_len)
        ids, wanted, counted = trimmed(inputs, targets, mask)
        with no_grad():
            z = model(ids)
            _check_targets(wanted, z.shape[-1])
            xp = backend.array_module(z.data)
            nats = ops.softmax_cross_entropy(z, move(wanted, xp), move(counted, xp), reduction="sum").item()
        return nats, scored_bytes(data, targets, mask)

    def scored():
        with workers(shards) as pool:
            groups = (mine[i : i + _WAITING] for i in range(0, len(mine), _WAITING))
            done = itertools.chain.from_iterable(pool.map(score, group) for group in groups)
            return list(progress_bar(done, progress, total=len(mine), desc="held-out", leave=False))

    model.eval()
    try:
        scores = list(itertools.chain.from_iterable(ranks.gathered(scored)))
    finally:
        model.train(training)
    nbytes = sum(counted for _, counted in scores)
    if not nbytes:
        raise ValueError(
            f"held-out text: no answer begins within {seq_len} tokens of what is scored; choose a larger --seq-len"
        )
    total = math.fsum(nats for nats, _ in scores)
    if not math.isfinite(total):
        raise FloatingPointError(
            f"held-out text: the loss is {total}; the model's weights are too large, or not finite"
        )
    return total / math.log(2) / nbytes


def fit(
    model,
    data,
    recipe,
    *,
    heldout=None,
    eval_every=0,
    heldout_limit=None,
    out=None,
    checkpoint_every=0,
    about=None,
    defaults=None,
    optimizer=AdamW,
    pager=None,
    progress=True,
    ranks=ALONE,
):
    """Train the model's parameters that require a gradient, in place; returns a Result.

    heldout, eval_every       a corpus to evaluate every so many steps (0: never)
    heldout_limit             evaluate on the first so many windows only
    out, checkpoint_every     a folder for checkpoint.safetensors, written atomically every so many steps (0: only at the end); a
                              checkpoint that lies there is resumed if it is of the same run, refused with a sentence if
                              it is not
    about                     what identifies the run besides the recipe (base model, adapters), compared on resuming
    defaults                  {"job": {option: value}}: what a checkpoint that does not name an option had
    optimizer, pager          AdamW or AdamW8bit, and where its state lives
    ranks                     the processes that train together, each with this model and these data; the first has `out`
    """
    recipe = recipe.planned(data)
    check_length(model, recipe.seq_len)
    sampler = _Sampler(data, recipe)
    trainable = model.trainable()
    optimizer = _optimizer(optimizer, trainable, recipe, pager)
    result = Result(gradient_bytes=sum(p.nbytes for _, p in trainable), optimizer_bytes=optimizer.state_bytes)
    checked = ranks.each(lambda: checkpoints.check_run(None if ranks.rank else out, data, recipe, about, defaults))
    ranks.of_one_run(checked[0] | {"eval_every": eval_every, "checkpoint_every": checkpoint_every})
    identity, path, resuming = ranks.first(lambda: checked)
    if isinstance(data, Pairs):
        data.within(recipe.seq_len, "learned")  # says what is left out, before the first step
    if resuming:
        result.first_step = ranks.first(lambda: checkpoints.resume(path, recipe, trainable, optimizer, result))
        result.history, result.tape_bytes = ranks.first(lambda: (result.history, result.tape_bytes))
    ranks.spread_state(trainable, optimizer if resuming else None)
    first = result.first_step
    evaluated = eval_every if heldout is not None else 0
    weights = [w for _, w in model.named_weights()]

    def evaluate():
        return bits_per_byte(model, heldout, recipe.seq_len, shards=recipe.shards, limit=heldout_limit, ranks=ranks)

    model.train()
    pace = _Pace()
    with (
        workers(recipe.shards) as pool,
        progress_bar(range(first, recipe.steps), progress, initial=first, total=recipe.steps, unit="step") as bar,
    ):
        for step in bar:
            done, last = step + 1, step + 1 == recipe.steps
            optimizer.pager.step = done
            measured = weights if step == first else None
            batches = sampler.batches(step)
            loss, tape, tokens = _scaled_backward(model, batches, recipe, step, pool, optimizer.pager, measured, ranks)
            _clip_and_step(optimizer, trainable, recipe, step, loss, path, ranks)
            row = {"step": done, "loss": loss}
            if evaluated and (last or done % evaluated == 0):
                row["heldout"] = optimizer.pager.yielding(evaluate)
                model.train()
            result.history.append(row)
            result.tape_bytes = max(result.tape_bytes, tape)
            result.seconds, result.tokens_per_second = pace.after(loss, tokens)
            bar.set_postfix_str(pace.text(row), refresh=False)
            if path and (last or (checkpoint_every and done % checkpoint_every == 0)):
                ranks.check_equal(trainable)
                ranks.first(lambda: checkpoints.save(path, identity, trainable, optimizer, result))
            elif last:
                checkpoints.check_finite([(name, p.data) for name, p in trainable], asdict(recipe), result)
    model.eval()
    return result


def _optimizer(kind, trainable, recipe, pager):
    """An AdamW of this kind for the (name, parameter) pairs, matrices with weight decay and vectors without."""
    matrices = {"params": [(n, p) for n, p in trainable if p.ndim >= 2], "weight_decay": recipe.weight_decay}
    vectors = {"params": [(n, p) for n, p in trainable if p.ndim < 2], "weight_decay": 0.0}
    betas = recipe.beta1, recipe.beta2
    return kind([matrices, vectors], lr=recipe.lr, betas=betas, eps=recipe.eps, pager=pager)


def _norm(parameters, ranks):
    """‖g‖₂ as the first rank adds it, on every rank: its sum depends on the BLAS kernel, and so would what is clipped."""
    return ranks.first(lambda: clip_grad_norm(parameters, math.inf))


def _clip_and_step(optimizer, trainable, recipe, step, loss, checkpoint, ranks=ALONE):
    """Clip the gradients, step at the schedule's rate and drop them; FloatingPointError if loss or norm is not finite."""
    parameters = [p for _, p in trainable]
    norm = _norm(parameters, ranks)
    clip_grad_norm(parameters, recipe.clip or math.inf, norm)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise FloatingPointError(
            f"step {step + 1}: the loss is {loss} and the norm of its gradient {norm}; lower the learning rate "
            f"(lr = {recipe.lr}){checkpoints.kept(checkpoint)}"
        )
    optimizer.step(schedule(recipe.schedule, step, recipe.steps, recipe.warmup, recipe.floor))
    optimizer.zero_grad()


class _Pace:
    """What the progress bar says: the smoothed loss and the tokens a second, since this process began."""

    def __init__(self):
        self.began, self.loss, self.tokens, self.rate = time.perf_counter(), None, 0, 0.0

    def after(self, loss, tokens):
        """Count a step; -> (seconds, tokens per second) so far."""
        self.loss = loss if self.loss is None else 0.95 * self.loss + 0.05 * loss
        self.tokens += tokens
        seconds = time.perf_counter() - self.began
        self.rate = self.tokens / seconds
        return seconds, self.rate

    def text(self, row):
        heldout = f", held-out {row['heldout']:.3f}" if "heldout" in row else ""
        return f"loss {self.loss:.3f}, {self.rate:,.0f} tokens/s{heldout}"


class _Sampler:
    """The micro-batches of each step: drawn with replacement, or with `epochs` without, every sequence once an epoch."""

    def __init__(self, data, recipe):
        self.data, self.recipe, self.order = data, recipe, (None, None)
        self.examples = None if recipe.epochs is None else data.examples(recipe.seq_len)

    def batches(self, step):
        """[(inputs, targets, mask)] of a step; what they are depends on the step alone, so that a run can be resumed there."""
        r = self.recipe
        if r.epochs is None:
            draws = (np.random.default_rng([r.seed, step, i]) for i in range(r.accumulate))
            return [self.data.batch(rng, r.batch_size, r.seq_len) for rng in draws]
        size = r.batch_size * r.accumulate
        last = max(round(r.epochs * len(self.examples)), 1)
        examples = [self._example(place) for place in range(step * size, min((step + 1) * size, last))]
        return [
            self.data.rows(examples[i : i + r.batch_size], r.seq_len) for i in range(0, len(examples), r.batch_size)
        ]

    def _example(self, place):
        """The sequence at a place in the sequence of all epochs."""
        epoch, i = divmod(place, len(self.examples))
        if self.order[0] != epoch:
            self.order = epoch, np.random.default_rng([self.recipe.seed, epoch]).permutation(len(self.examples))
        return self.examples[self.order[1][i]]


# --------------------------------------------------------------------------------------------------------------- one backward pass
@dataclass
class _Shard:
    """What one part of a micro-batch gave: its share of the loss, {parameter: gradient}, bytes of its tape, tokens read."""

    loss: float
    gradients: dict
    tape_bytes: int
    tokens: int


def _scaled_backward(model, batches, recipe, step, pool, pager=None, measure=None, ranks=ALONE):
    """`_backward` with a loss scale (Micikevicius et al. 2018) where the model multiplies in float16, whose smallest number is 6e-8.

    Gradients of 2¹⁶ times the loss are divided by 2¹⁶ again. Where one is not finite, the step is done anew with half the scale; every
    step begins at 2¹⁶, so that nothing is carried from step to step.
    """
    narrow = any(getattr(module, "compute_dtype", "") == "float16" for _, module in model.named_modules())
    for exponent in range(16, -1, -1) if narrow else (0,):
        found = _backward(model, batches, recipe, step, pool, pager, measure, ranks, scale=2.0**exponent)
        if exponent == 0 or math.isfinite(_norm([p for _, p in model.trainable()], ranks)):
            return found


def _backward(model, batches, recipe, step, pool, pager=None, measure=None, ranks=ALONE, scale=1.0):
    """Set .grad of the mean loss over the step's target tokens; returns (loss, tape bytes if measure lists the weights, tokens read).

    scale: of the loss during the backward pass. Where memory runs out, the pager's pages make room (QLoRA §3) and the shard that failed is
    run once more.
    """
    count = sum(float(mask.sum()) for _, _, mask in batches)
    if not count:
        raise ValueError(
            f"step {step + 1}: none of its tokens counts in the loss; give more text, or a larger --seq-len"
        )
    pieces, trained = _pieces(model, recipe), [p for _, p in model.trainable()]
    parts = [list(zip(*(np.array_split(a, min(pieces, len(a))) for a in batch), strict=True)) for batch in batches]
    places = [(i, j) for i, batch in enumerate(parts) for j in range(len(batch))]

    def shard(place):
        trying = np.errstate(all="ignore" if scale != 1 else None)  # a gradient that overflows has the scale halved
        i, j = place
        with backend.using_generator(np.random.default_rng([recipe.seed, step, i, j])), trying:
            return _shard(model, parts[i][j], count / scale, measure)

    def computed():
        """Of each shard of this process ({parameter: gradient}, [micro-batch, loss, bytes of its tape, tokens])."""
        mine = [places[n] for n in ranks.own(len(places))]
        for i, batch in itertools.groupby(mine, lambda place: place[0]):
            for found in _side_by_side(pool, shard, list(batch), pager):
                yield found.gradients, (i, found.loss / scale, found.tape_bytes, found.tokens)

    gradients, told = ranks.summed(computed(), trained)
    loss, tapes = 0.0, [0] * len(batches)
    for i, share, nbytes, _ in told:
        loss += share
        tapes[i] += nbytes
    for p in trained:
        p.grad = gradients.get(p)
        if scale != 1 and p.grad is not None:
            p.grad *= 1 / scale
    return loss, max(tapes), sum(read for *_, read in told)


def _pieces(model, recipe):
    """Into how many shards a micro-batch is cut: on a device none, but for dropout, whose masks are drawn for each shard."""
    on_host = all(backend.array_module(p.data) is np for _, p in model.trainable())
    dropout = any(getattr(module, "dropout", 0) for _, module in model.named_modules())
    return recipe.shards if on_host or dropout else 1


def _shard(model, part, count, measure):
    """The _Shard of (inputs, targets, mask): the loss is summed over its targets and divided by all the step's, `count`."""
    inputs, targets, mask = trimmed(*part)
    logits = model(inputs)
    _check_targets(targets, logits.shape[-1])
    xp = backend.array_module(logits.data)
    loss = ops.softmax_cross_entropy(logits, move(targets, xp), move(mask, xp), reduction="sum") * (1 / count)
    del logits  # the loss has what it needs of it

    def held(y):
        return tape_bytes(y, exclude=measure) if measure else 0

    tape, rebuilt, gradients = held(loss), [0], {}
    if loss.requires_grad:
        with watch_rebuilds(lambda y: rebuilt.append(held(y))):
            loss.backward(into=gradients)
    return _Shard(loss.item(), gradients, tape + max(rebuilt), inputs.size)


def _side_by_side(pool, shard, places, pager):
    """[shard(place), …]; those that ran out of memory again, one after the other and with no page resident."""
    futures, results = [pool.submit(shard, place) for place in places], []
    for future in futures:
        try:
            results.append(future.result())
        except MemoryError:
            results.append(None)
    del futures, future  # and with them the errors, which hold what had been allocated
    for j in (j for j, result in enumerate(results) if result is None):
        if pager is not None and pager.evict_all():
            pager.counters.rescues += 1
        results[j] = shard(places[j])
    return results
