"""The file of the six steps at work: your my_qlora.py fine-tunes the embedded model beside the library.

    python notebooks/finale.py                  notebooks/my_qlora.py
    python notebooks/finale.py FILE.py          another one

Both runs see the same batches, begin at the same A, and hold the states of AdamW in pages. It prints the bits per byte on held-out
text before and after, and draws both losses into my_qlora.svg. Everything but the layers, the optimizer and the loop is
tinylora's: the attention, the norms, the tape.
"""

import argparse
import copy
import functools
import sys
import traceback
from pathlib import Path

import grading
import numpy as np

import tinylora as tl
from tinylora import adapters, nn, ops
from tinylora.optim import clip_grad_norm

STEPS, ROWS, LENGTH, R, ALPHA, LR, MAX_NORM, PAGE = 60, 4, 128, 8, 16, 4e-3, 1.0, 1024
BUDGET = 4 * PAGE * 2 * 2  # bytes: two pages of m and of v


class Full(Exception):
    """The fast memory has no room."""


class Memory:
    """A fast memory of `budget` bytes for copies of a slow one. It counts what moves and what is held."""

    def __init__(self, budget):
        self.budget, self.held, self.most, self.moved, self.lent = budget, 0, 0, 0, {}

    def fetch(self, slow, start, stop):
        copy = slow[start:stop].copy()
        if self.held + copy.nbytes > self.budget:
            raise Full(
                f"{copy.nbytes} bytes do not fit: {self.held} of {self.budget} are taken, so put a page back first"
            )
        self.lent[id(copy)] = copy
        self.held += copy.nbytes
        self.most, self.moved = max(self.most, self.held), self.moved + copy.nbytes
        return copy

    def put_back(self, slow, start, copy):
        if self.lent.pop(id(copy), None) is None:
            raise ValueError("put_back(a, start, copy) takes an array that fetch returned, and each of them once")
        slow[start : start + len(copy)] = copy
        self.held, self.moved = self.held - copy.nbytes, self.moved + copy.nbytes


class OwnLinear(nn.Module):
    """A layer of tinylora's model whose forward and backward pass are the student's."""

    def __init__(self, mine, layer):
        self.mine, self.layer = mine, layer
        self.A, self.B = (tl.Tensor(layer[name], requires_grad=True) for name in "AB")

    def forward(self, x):
        layer = self.layer | {"A": self.A.data, "B": self.B.data}
        rows = np.ascontiguousarray(x.data.reshape(-1, x.shape[-1]))
        return _own(x, self.A, self.B, mine=self.mine, layer=layer, rows=rows)


@tl.primitive
def _own(x, A, B, mine, layer, rows):
    y, saved = mine.forward(layer, rows)

    def pullbacks(g, need):
        x_bar, A_bar, B_bar = mine.backward(layer, saved, np.ascontiguousarray(g.reshape(-1, g.shape[-1])))
        return x_bar.reshape(x.shape), A_bar, B_bar

    return y.reshape(*x.shape[:-1], -1), pullbacks


@functools.cache
def text_of(split):
    """The bytes of a split of the Jargon File, read once: what an answer does to the files afterwards changes nothing."""
    return np.frombuffer(tl.data.jargon(split), np.uint8)


@functools.cache
def _base():
    return tl.Llama.from_pretrained("base")


def base():
    """The embedded model, of which the files are read once."""
    return copy.deepcopy(_base())


def batches():
    """STEPS batches of rows of the Jargon File, each of one byte more than LENGTH."""
    text = text_of("train")
    starts = np.random.default_rng(0).integers(0, len(text) - LENGTH - 1, (STEPS, ROWS))
    return [np.stack([text[i : i + LENGTH + 1] for i in row]).astype(int) for row in starts]


def loss_on(model, rows):
    """The mean cross-entropy of the next byte, in nats."""
    return ops.softmax_cross_entropy(model(rows[:, :-1]), rows[:, 1:])


def bits_per_byte(model):
    """The mean on 48 rows of held-out text."""
    text = text_of("heldout")[: 48 * (LENGTH + 1)]
    with tl.no_grad():
        return loss_on(model, text.reshape(48, -1).astype(int)).item() / np.log(2)


def library_run():
    """(bits per byte before, after, losses) of tinylora's own QLoRA."""
    tl.seed(0)
    model = tl.add_lora(tl.quantize_linears(base()), r=R, alpha=ALPHA)
    rng = np.random.default_rng(1)
    for _, layer in adapters.lora_layers(model):
        layer.lora_A.weight.data = start(rng, *layer.lora_A.weight.shape)
    before, losses = bits_per_byte(model), []
    parameters = [p for _, p in model.trainable()]
    optimizer = tl.AdamW(parameters, lr=LR)
    for t, rows in enumerate(batches()):
        optimizer.zero_grad()
        loss = loss_on(model, rows)
        loss.backward()
        losses.append(loss.item())
        clip_grad_norm(parameters, MAX_NORM)
        optimizer.step(lr_scale=1 - t / STEPS)
    return before, bits_per_byte(model), losses


def start(rng, r, d_in):
    """A as both runs begin."""
    return rng.uniform(-(d_in**-0.5), d_in**-0.5, (r, d_in)).astype(np.float32)


def own_run(mine):
    """The same of a student's functions, the merged model's bits per byte, and how many bytes of the fast memory were taken."""
    model, rng = base().requires_grad_(False), np.random.default_rng(1)
    layers = [
        (path, layer) for path, layer in model.named_modules() if isinstance(layer, nn.Linear) and path != "lm_head"
    ]
    for path, layer in layers:
        model.replace(path, OwnLinear(mine, mine.new_layer(layer.weight.data, R, ALPHA, rng)))
    before, memory = bits_per_byte(model), Memory(BUDGET)
    parameters = [p for _, p in model.trainable()]
    losses = mine.train(parameters, lambda rows: loss_on(model, rows), batches(), LR, MAX_NORM, memory, PAGE)
    if len(losses) != STEPS:
        raise grading.Raised(f"train returned {len(losses)} losses for {STEPS} batches")
    after = bits_per_byte(model)
    for path, _ in layers:
        own = model.get(path)
        weight = mine.merge(own.layer | {"A": own.A.data, "B": own.B.data})
        dense = nn.Linear(*weight.shape[::-1])
        dense.weight.data = np.asarray(weight, np.float32)
        model.replace(path, dense)
    return before, after, [float(loss) for loss in losses], bits_per_byte(model), memory.most


def draw(path, library, own):
    """Both losses against the step, into an SVG file."""
    from tinylora.figures.style import COLOURS, canvas, save

    figure, ax = canvas(7, 3.4)
    for (_, after, losses, *_), name, style, colour in (
        (library, "tinylora", "-", COLOURS[0]),
        (own, "my_qlora.py", "--", COLOURS[1]),
    ):
        ax.plot(
            np.arange(1, STEPS + 1),
            np.array(losses) / np.log(2),
            style,
            color=colour,
            lw=1.5,
            label=f"{name}: {after:.4f} held out",
        )
    ax.set(xlabel="step", ylabel="bits per byte of the batch")
    ax.set_title(f"my_qlora.py ends {own[1] - library[1]:+.4f} bits per byte from the library, held out", fontsize=10)
    ax.legend(frameon=False)
    save(figure, path)


def main(argv=None):
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "file", nargs="?", type=Path, default=grading.HERE / f"{grading.OWN_FILE}.py", help="your file (my_qlora.py)"
    )
    args = parser.parse_args(argv)
    try:
        mine = grading.own_answer(args.file.read_text(encoding="utf-8-sig"))
        own = own_run(mine)
    except NotImplementedError as error:
        said = grading.unanswered(grading.OWN, error)
        print(f"{args.file.name}: a step is {said}; `pytest notebooks -k my-` grades them all", file=sys.stderr)
        return 1
    except Exception as error:
        lines = [
            at.lineno for at in traceback.extract_tb(error.__traceback__) if at.filename == f"{grading.OWN_FILE}.py"
        ]
        where = f"{type(error).__name__} in line {lines[-1]}: " if lines else ""
        print(f"{args.file.name}: {where}{error}", file=sys.stderr)
        return 1
    library = library_run()
    print(f"{STEPS} steps of {ROWS} × {LENGTH} bytes, rank {R}; bits per byte of held-out text")
    print(f"{'':14}{'in 4 bits':>11}{'fine-tuned':>12}{'merged':>10}")
    print(f"{'tinylora':14}{library[0]:11.4f}{library[1]:12.4f}{'–':>10}")
    print(f"{'my_qlora.py':14}{own[0]:11.4f}{own[1]:12.4f}{own[3]:10.4f}")
    print(f"difference after fine-tuning: {own[1] - library[1]:+.4f}, and 0.01 is allowed")
    print(f"difference that merging makes: {own[3] - own[1]:+.4f}, and 0.001 is allowed")
    draw(f"{grading.OWN_FILE}.svg", library, own)
    print(f"drawn: {grading.OWN_FILE}.svg")
    right = abs(own[1] - library[1]) <= 0.01 and abs(own[3] - own[1]) <= 0.001
    if not right:
        print("`pytest notebooks -k my-` says which step is off", file=sys.stderr)
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())
