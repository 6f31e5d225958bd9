"""Every figure of the folder figures/, drawn again with the same bytes: `tinylora figures`.

A figure of what takes seconds is computed anew. One of a long run, or of one that needs a download, is drawn from the run's numbers,
which lie beside it: figures/data/NAME.json names the command that measured them. They have seven digits or
so, because they were read back from the coordinates of the files that the runs had drawn. What such a file has to hold is declared here
and checked before anything is drawn. The claims' figures are computed anew as well (`claims`, about a minute for all of them).

    PICTURES            {name: Picture}, the name that of the file without .svg
    draw(names, …)      yields (name, the bytes of its file, seconds)

The same matplotlib gives the same bytes. Another version places letters otherwise, and what a claim's toy trains may end otherwise in its
last digits with another BLAS kernel.
"""

import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..costs import memory
from ..costs.paging import Cost
from ..figures import runs, speed
from ..figures.memory import account_bars
from ..figures.paging import paging_costs
from ..figures.style import one_column, require_matplotlib, save
from ..models import fields, files
from ..training.finetune import METHODS, Report
from . import claims, nf4_construction, nf4_optimum, normality, qlora_numbers

SEEDS = (0, 1, 2)
FOLDER = "figures"  # where the files are in a clone
DATA = f"{FOLDER}/data"  # where the numbers of long runs are


@dataclass(frozen=True)
class Picture:
    """How a file of figures/ is drawn.

    function   () -> figure; (what its file of numbers holds) -> figure if its numbers are `stored`
    stored     None, or what data/NAME.json has to hold: (its content) -> yields (name, kind), each checked before the next is asked for
    """

    function: Callable
    stored: Callable | None = None


# ------------------------------------------------------------------------------------------------------------- from stored numbers
def _list(each, length=None):
    """A list of so many entries of one kind; of at least one where no length is given."""
    what = f"a list of {length or 'at least one'}, each {each.expected}"
    return fields.Kind(what, lambda v: type(v) is list and (len(v) == length if length else len(v) > 0), each=each)


def _object(declared):
    """An object that has all of these fields."""
    what = f"an object with {', '.join(declared)}"
    return fields.Kind(what, lambda v: type(v) is dict and declared.keys() <= v.keys(), inside=declared)


def _named(what, allowed, each):
    """An object of at least one entry, whose names are `allowed`."""
    return fields.Kind(
        f"an object of at least one entry, whose names are {what}",
        lambda v: type(v) is dict and len(v) > 0 and all(map(allowed, v)),
        each=each,
    )


def _methods(each):
    return _named(f"among {', '.join(METHODS)}", METHODS.__contains__, each)


_BITS = fields.number(above=0, high=1000)  # bits per byte
_SEEDS = _list(fields.whole())
_COUNTS = _list(fields.whole(1, 1 << 30))
_RISING = fields.Kind("whole numbers, each larger than the one before it", lambda v: v == sorted(set(v)))


def _compare_holds(data):
    yield "seeds", _SEEDS
    held = _object(dict.fromkeys(("frozen weights", "trained weights", "gradients", "optimizer state"), fields.whole()))
    yield "methods", _methods(_object({"after": _list(_BITS, len(data["seeds"])), "bytes": held}))


def _compare(data):
    def report(run, after):
        return Report({}, {}, after=after, bytes=run["bytes"])

    return runs.comparison({m: [report(run, after) for after in run["after"]] for m, run in data["methods"].items()})


def _curves_holds(data):
    yield "seeds", _SEEDS
    yield "steps", _COUNTS
    yield "steps", _RISING
    heldout = _list(_list(_BITS, len(data["steps"])), len(data["seeds"]))
    yield "methods", _methods(_object({"before": _BITS, "heldout": heldout}))


def _curves(data):
    def report(before, values):
        history = [{"step": s, "heldout": v} for s, v in zip(data["steps"], values, strict=True)]
        return Report({}, {}, before=before, after=values[-1], history=history)

    methods = data["methods"].items()
    return runs.loss_curves({m: [report(run["before"], values) for values in run["heldout"]] for m, run in methods})


def _ranks_holds(data):
    def rank(name):
        return name.isascii() and name.isdigit() and len(name) < 8 and name == str(int(name)) != "0"

    yield "seeds", _SEEDS
    by_rank = _named("ranks, whole numbers from 1", rank, _list(_BITS, len(data["seeds"])))
    yield "targets", _named("layers", lambda name: name and "$" not in name, by_rank)


def _ranks(data):
    return runs.rank_table(
        {(t, int(r)): after for t, by_rank in data["targets"].items() for r, after in by_rank.items()}
    )


def _paging_holds(data):
    orders = ("around", "back and forth")
    row = {
        "order": fields.one_of(*orders),
        "prefetch": fields.flag(),
        "fraction": fields.number(above=0, high=1),
        "moved": fields.number(0, 1000),
        "time_ratio": fields.number(above=0, high=1e6),
    }
    yield "state", fields.whole(1)
    yield "costs", _list(_object(row))
    yield (
        "costs",
        fields.Kind(
            f"a list that has rows without prefetch for both orders, {' and '.join(orders)}",
            lambda costs: {c["order"] for c in costs if not c["prefetch"]} == set(orders),
        ),
    )


def _paging(data):
    state = data["state"]
    costs = [
        Cost(c["fraction"], c["order"], c["prefetch"], c["moved"] * state, 0.0, c["time_ratio"], "")
        for c in data["costs"]
    ]
    return paging_costs(costs, state)


def _normality_holds(data):
    row = {
        "name": fields.text(100),
        "length": fields.whole(1, 1 << 30),
        "rows": fields.whole(1),
        "rejected": fields.whole(),
    }
    yield "model", fields.text(100)
    yield "kinds", _list(_object(row))
    no_more = fields.Kind(
        "rows of which no more are rejected than there are", lambda kind: kind["rejected"] <= kind["rows"]
    )
    yield "kinds", _list(no_more)
    yield "draws", fields.whole(1)
    yield "lengths", _COUNTS
    yield "lengths", _RISING
    found = _list(fields.whole(0, data["draws"]), len(data["lengths"]))
    yield "rejected", _object(dict.fromkeys(normality.LAWS, found))


def _normality(data):
    def group(name, length, rows, rejected):
        unknown = float("nan")
        return normality.Group(name, length, rows, rejected / rows, unknown, (unknown,) * 3, *(unknown,) * 3)

    power = {
        n: {law: group(law, n, data["draws"], data["rejected"][law][i]) for law in normality.LAWS}
        for i, n in enumerate(data["lengths"])
    }
    kinds = [group(k["name"], k["length"], k["rows"], k["rejected"]) for k in data["kinds"]]
    return normality.rejected_against_length({data["model"]: kinds}, power)


_TAKEN = fields.optional(_list(fields.number(above=0, high=1e9), 3))  # a median between its quartiles
_BOUND = fields.optional(fields.number(above=0, high=1e9))


def _bench_holds(data):
    """What both files of `python -m tests.bench` begin with."""
    yield "about", _object({"CPU": fields.text(), "date": fields.text(100)})
    yield "versions", _list(fields.text(100))
    yield "noisy", fields.flag()


def _ratios_holds(data):
    yield from _bench_holds(data)
    line = {"name": fields.text(), "kind": fields.text(), "more": fields.flag(), "must": _BOUND, "aim": _BOUND}
    line |= {"reached": fields.one_of("aim", "must", "no", "")}
    line["values"] = fields.mapping(_TAKEN)
    row = {"row": fields.text(), "case": fields.text(), "threads": fields.whole(1), "lines": _list(_object(line))}
    yield "rows", _list(_object(row))

    def measured(row):
        return any(s["kind"] == "ratio" and not s["more"] and any(s["values"].values()) for s in row["lines"])

    there = fields.Kind(
        f"an object with {', '.join(data['versions'])}", lambda values: set(data["versions"]) <= values.keys()
    )
    yield "rows", _list(_object({"lines": _list(_object({"values": there}))}))
    yield "rows", fields.Kind("a list with a ratio that was measured", lambda rows: any(map(measured, rows)))


def _growth_holds(data):
    yield from _bench_holds(data)
    size, ours = fields.whole(), data["versions"][0]
    contestant = {"name": fields.text(), "version": fields.optional(fields.text()), "threads": fields.whole(1)}
    contestant |= {"seconds": _TAKEN, "peak": size, "held": size, "facts": fields.mapping(fields.number(1, 1e18))}
    row = {"case": fields.text(100), "threads": fields.whole(1), "contestants": _list(_object(contestant))}
    yield "rows", _list(_object(row))
    named = fields.Kind('"d = " or "context ", and a number', re.compile(r"(d = |context )\d+").fullmatch)
    yield "rows", _list(_object({"case": named}))

    def right(c):
        if not c["seconds"] or c["version"] not in (ours, None):
            return True
        return "flops" in c["facts"] and (c["version"] is None or ("bytes" in c["facts"] and c["peak"] > c["held"]))

    def measured(rows):
        most = max(row["threads"] for row in rows)
        found = [c for row in rows for c in row["contestants"] if c["seconds"] and c["threads"] == most]
        return any(c["version"] == ours for c in found) and any(c["name"] == "sgemm" for c in found)

    what = "of a step its flops, its bytes and a peak above what was held, and of sgemm its flops"
    yield "rows", _list(_object({"contestants": _list(fields.Kind(what, right))}))
    yield (
        "rows",
        fields.Kind(f"a list with a step of {ours!r} and sgemm, both measured with the most threads", measured),
    )


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
    "compare": Picture(_compare, _compare_holds),
    "curves-base": Picture(_curves, _curves_holds),
    "ranks": Picture(_ranks, _ranks_holds),
    "figure6": Picture(qlora_numbers.figure_6),
    "tape": Picture(_tape),
    "paging": Picture(_paging, _paging_holds),
    "normality": Picture(_normality, _normality_holds),
    "curves-smollm2": Picture(_curves, _curves_holds),
    "bench": Picture(speed.ratios, _ratios_holds),
    "growth": Picture(speed.growth, _growth_holds),
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

    Before anything is drawn: OSError if numbers are not there, ValueError if a file does not hold what its figure is drawn from.
    """
    stored = {name: Path(data, f"{name}.json") for name in names if PICTURES[name].stored}
    for name, path in stored.items():
        if not path.is_file():
            raise OSError(
                f"{name}.svg is drawn from the numbers of a long run, and {path} is not there; a clone has it"
            )
    given = {name: (_numbers(path, PICTURES[name].stored),) for name, path in stored.items()}
    for name in names:
        start = time.perf_counter()
        svg = as_svg(PICTURES[name].function, *given.get(name, ()))
        yield name, svg, time.perf_counter() - start


def _numbers(path, holds):
    """What a file of numbers holds, once all of it is of its kind; ValueError names the file, the value and what was expected."""
    data = files.read_json(path)
    fields.check(data, {"command": fields.text()}, path, required=("command",))
    for name, kind in holds(data):
        fields.check(data, {name: kind}, path, required=(name,))
    return data


def as_svg(function, *data):
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
