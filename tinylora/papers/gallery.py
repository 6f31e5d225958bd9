"""Every figure of the folder figures/, drawn again with the same bytes: `tinylora figures`.

A figure of what takes seconds is computed anew. One of a long run, or of one that needs a download, is drawn from the run's numbers,
which lie beside it: figures/data/NAME.json names the command that measured them. They have seven digits or
so, because they were read back from the coordinates of the files that the runs had drawn. The claims' figures are computed anew as well
(`claims`, about a minute for all of them).

    PICTURES            {name: Picture}, the name that of the file without .svg
    draw(names, …)      yields (name, the bytes of its file, seconds)

The same matplotlib gives the same bytes. Another version places letters otherwise, and what a claim's toy trains may end otherwise in its
last digits with another BLAS kernel.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..costs import memory
from ..costs.paging import Cost
from ..figures import runs
from ..figures.memory import account_bars
from ..figures.paging import paging_costs
from ..figures.style import one_column, require_matplotlib, save
from ..models import files
from ..training.finetune import Report
from . import claims, nf4_construction, nf4_optimum, normality, qlora_numbers

SEEDS = (0, 1, 2)
FOLDER = "figures"  # where the files are in a clone
DATA = f"{FOLDER}/data"  # where the numbers of long runs are


@dataclass(frozen=True)
class Picture:
    """How a file of figures/ is drawn.

    function   () -> figure; (what its file of numbers holds) -> figure if it is `stored`
    stored     its numbers lie in data/NAME.json
    """

    function: Callable
    stored: bool = False


# ------------------------------------------------------------------------------------------------------------- from stored numbers
def _compare(data):
    def report(run, after):
        return Report({}, {}, after=after, bytes=run["bytes"])

    return runs.comparison({m: [report(run, after) for after in run["after"]] for m, run in data["methods"].items()})


def _curves(data):
    def report(before, values):
        history = [{"step": s, "heldout": v} for s, v in zip(data["steps"], values, strict=True)]
        return Report({}, {}, before=before, after=values[-1], history=history)

    methods = data["methods"].items()
    return runs.loss_curves({m: [report(run["before"], values) for values in run["heldout"]] for m, run in methods})


def _ranks(data):
    return runs.rank_table(
        {(t, int(r)): after for t, by_rank in data["targets"].items() for r, after in by_rank.items()}
    )


def _paging(data):
    state = data["state"]
    costs = [
        Cost(c["fraction"], c["order"], c["prefetch"], c["moved"] * state, 0.0, c["time_ratio"], "")
        for c in data["costs"]
    ]
    return paging_costs(costs, state)


def _normality(data):
    def group(name, length, rows, rejected):
        unknown = float("nan")
        return normality.Group(name, length, rows, rejected / rows, unknown, (unknown,) * 3, *(unknown,) * 3)

    power = {
        n: {law: group(law, n, data["draws"], found[i]) for law, found in data["rejected"].items()}
        for i, n in enumerate(data["lengths"])
    }
    return normality.rejected_against_length({data["model"]: [group(**kind) for kind in data["kinds"]]}, power)


# ------------------------------------------------------------------------------------------------------------------ computed anew
def _tape():
    """`tinylora memory --model base --method all --batch-size 8 --seq-len 256 -r 16`."""
    plans = (("full", False), ("lora", False), ("qlora", False), ("qlora", True))
    about = {"r": 16, "batch_size": 8, "seq_len": 256, "precision": memory.PRECISIONS["engine"]}
    config = memory.config_of("base")
    return account_bars([memory.predict(config, method, checkpointing=c, **about) for method, c in plans])


def _claim(name):
    drawing = claims.EXPERIMENTS[name].draw
    found = claims.run((name, *drawing.beside), SEEDS)
    return drawing.function(*found.values())


PICTURES = {
    "compare": Picture(_compare, stored=True),
    "curves-base": Picture(_curves, stored=True),
    "ranks": Picture(_ranks, stored=True),
    "figure6": Picture(qlora_numbers.figure_6),
    "tape": Picture(_tape),
    "paging": Picture(_paging, stored=True),
    "normality": Picture(_normality, stored=True),
    "curves-smollm2": Picture(_curves, stored=True),
    "nf4": Picture(nf4_construction.nf4_optimal_for),
    "nf4-law": Picture(nf4_optimum.nf4_law),
    **{
        f"claims/{e.draw.file}": Picture(lambda name=name: _claim(name))
        for name, e in claims.EXPERIMENTS.items()
        if e.draw
    },
}


def chosen(names=()):
    """The names that were given, or all; ValueError for one that does not exist. "claims" stands for all of the claims'."""
    found = []
    for name in names or PICTURES:
        some = [n for n in PICTURES if name in (n, n.partition("/")[0])]
        if not some:
            raise ValueError(f"figures: there is no {name!r}; they are claims (all of them), {', '.join(PICTURES)}")
        found += some
    return list(dict.fromkeys(found))


def draw(names, data=DATA):
    """Draw the named figures, one after another. data: the folder with the numbers of long runs. -> yields (name, SVG as bytes, seconds)

    OSError before anything is drawn if numbers are not there.
    """
    stored = {name: Path(data, f"{name}.json") for name in names if PICTURES[name].stored}
    for name, path in stored.items():
        if not path.is_file():
            raise OSError(
                f"{name}.svg is drawn from the numbers of a long run, and {path} is not there; a clone has it"
            )
    given = {name: (files.read_json(path),) for name, path in stored.items()}
    for name in names:
        start = time.perf_counter()
        svg = _file(PICTURES[name].function, *given.get(name, ()))
        yield name, svg, time.perf_counter() - start


def _file(function, *data):
    """The figure that function(*data) draws as a file's bytes, whatever a matplotlibrc of this machine says."""
    require_matplotlib()
    from matplotlib import style

    with style.context("default"), one_column(), tempfile.TemporaryDirectory() as room:
        path = Path(room, "figure.svg")
        save(function(*data), path)
        return path.read_bytes()


def write(drawn, folder):
    """Write {name: SVG as bytes} to a folder, each file whole or not at all."""
    for name, svg in drawn.items():
        with files.atomic(Path(folder, f"{name}.svg")) as temporary:
            Path(temporary).write_bytes(svg)
