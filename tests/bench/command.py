"""Measures tinylora beside NumPy's floors, torch, PEFT, bitsandbytes and transformers on this CPU, and beside other checkouts of itself.

    python -m tests.bench                                every row but growth, with one and with two threads: 16 minutes
    python -m tests.bench quantize llama-qlora           two rows; those of one number of threads take it whatever --threads says
    python -m tests.bench --tinylora today=../main       each of tinylora's contestants twice: of this checkout, which is called
                                                         "here", and of the one in ../main, which is called "today"
    python -m tests.bench --avx2                         as on a laptop whose vectors end at AVX2: what NumPy, OpenBLAS
                                                         and torch know beyond it is switched off
    python -m tests.bench growth                         how a QLoRA step grows with width and context
    python -m tests.bench --list                         the rows, and what each measures
    python -m tests.bench --short                        that all of it runs: tiny sizes, NumPy alone, seconds

What is compared. A contestant is a process of its own, with its own libraries and OMP_NUM_THREADS, that sets up once. Then contestants take
turns: in each round everybody runs a burst of half a second, in an order that changes, after a pause in which all threads go to sleep.
A ratio is taken within a round, because times drift; the table has the median over the rounds, and the quartiles. Differences that lie
within the quartiles are noise: take more --rounds, or a quieter machine. The head of the page says how many cores other work took
meanwhile, and which BLAS kernel ran (OPENBLAS_CORETYPE chooses another). torch's threads wait for each other at every operation, so
other work on their cores slows them down out of all proportion: with two threads only a quiet machine tells anything.

What one reads. "X over Y 0.90 (0.88-0.91)": X takes 0.90 of Y's time. "here over today" is one checkout's time by the other's for the
same contestant. must and aim are the targets, for the number of threads they were set for. A library that is not installed, and a
function that a checkout does not have, is said in place of the number.

Preparation. The peers need `pip install -e '.[oracle]'`; any environment with them will do, because tinylora is taken from its folder.
In an environment without torch only checkouts and NumPy's floors are compared, and most rows take seconds. Every contestant stays below
3 GB; a case holds at most six of them at a time, and those of each further checkout.

A run of all rows writes figures/bench.md, figures/data/bench.json and figures/bench.svg, and `growth` the same under its name. With --avx2
they are bench-avx2 and growth-avx2, without a figure. Other runs print their table, and write nothing without --out. The figures can be
drawn again with `tinylora figures bench growth`.

--avx2 sets, for the contestants, OPENBLAS_CORETYPE=Haswell, NPY_DISABLE_CPU_FEATURES, ATEN_CPU_CAPABILITY=avx2 and two like it for MKL and
oneDNN. bitsandbytes' kernels ask the CPU themselves: where it has AVX-512, they take it all the same.
"""

import argparse
import contextlib
import re
import sys
import time
from pathlib import Path

from . import report, rows
from .measure import avx2, measure


def parser():
    title, _, rest = __doc__.partition("\n\n")
    made = argparse.ArgumentParser(
        "python -m tests.bench", description=title, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("rows", nargs="*", metavar="ROW", help="which rows (all but growth)")
    made.add_argument("--list", action="store_true", help="say what the rows measure, and measure nothing")
    made.add_argument(
        "--tinylora", action="append", default=[], type=checkout, metavar="NAME=PATH",
        help="another checkout of tinylora, measured beside this one; may be given several times",
    )  # fmt: skip
    made.add_argument("--threads", nargs="+", type=positive, metavar="N", help="numbers of threads (1 2)")
    made.add_argument("--rounds", type=positive, metavar="N", help="turns of each contestant (7)")
    made.add_argument("--avx2", action="store_true", help="hold NumPy, OpenBLAS and torch to AVX2")
    made.add_argument("--short", action="store_true", help="tiny sizes, NumPy alone, one thread, one round")
    made.add_argument("--out", metavar="FOLDER", help="where to write (a run of all rows, and growth: figures)")
    return made


def positive(text):
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 1 on")
    return int(text)


def checkout(text):
    """(name, folder) of "NAME=PATH"."""
    name, equals, path = text.partition("=")
    folder = Path(path).expanduser().resolve()
    if not (re.fullmatch(r"[\w.+-]+", name) and equals and path) or name == report.HERE:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected NAME=PATH, a word for the table that is not {report.HERE!r}, and the folder of a clone"
        )
    if not (folder / "tinylora" / "__init__.py").is_file():
        raise argparse.ArgumentTypeError(f"{path} is no clone of tinylora: it has no tinylora/__init__.py")
    return name, folder


def main(arguments=None):
    made = parser()
    options = made.parse_intermixed_args(arguments)
    if options.list:
        width = max(map(len, rows.ROWS))
        print("\n".join(f"{name:<{width}}  {rows.about(name)}" for name in rows.ROWS))
        return 0
    try:
        names = rows.chosen(options.rows or (rows.ROWS if options.short else ()))
    except ValueError as error:
        made.error(str(error))
    versions = {report.HERE: rows.ROOT, **dict(options.tinylora)}
    if len(versions) != 1 + len(options.tinylora):
        made.error("--tinylora: two checkouts have one name; give each its own")
    threads = sorted(set(options.threads or ([1] if options.short else [1, 2])))
    rounds = options.rounds or (1 if options.short else 7)
    variables = avx2() if options.avx2 else {}
    if options.avx2 and not variables:
        made.error("--avx2: NumPy finds no AVX2 on this processor")
    try:
        found = run(names, threads, rounds, versions, options.short, variables)
    except KeyboardInterrupt:
        print("interrupted: what was printed holds, and no file was written", file=sys.stderr)
        return 130
    print("\n".join(report.not_run([entry for entries in found.values() for entry in entries])))
    whole = not options.short and not options.rows
    for name, path in files(found, options.out, whole, options.short).items():
        data = as_data(name, found[name], options, versions, rounds, variables)
        paths = report.write(name, data, path, "-avx2" * options.avx2)
        print(f"written: {', '.join(map(str, paths))}", file=sys.stderr)
    return 0


def run(names, threads, rounds, versions, short=False, variables=None):
    """Measure these rows, and print the table as it grows; -> {"bench": [entries], "growth": [entries]}"""
    found, began = {"bench": [], "growth": []}, time.perf_counter()
    print(report.head(list(versions)), flush=True)
    for name in names:
        for case in rows.ROWS[name](short):
            for n in [n for n in threads if n in (case.threads or threads)] or case.threads:
                with progress(f"{name}, {case.name}, {n} thread{'s' * (n > 1)}", began) as tell:
                    measured, others = measure(case, n, versions, rounds, short, tell, variables)
                entry = report.entry(name, case, n, measured, others, list(versions), targets=not short)
                found["growth" if name == "growth" else "bench"].append(entry)
                print("\n".join(report.lines(entry, list(versions)) or described(entry)), flush=True)
                if others is not None and others > report.NOISY and not short:
                    print(
                        f"other work took {others:.2f} cores meanwhile: these numbers are not to be quoted",
                        file=sys.stderr,
                    )
    return found


def described(entry):
    """A case that has no line in the table: what each contestant took."""
    where = f"{entry['row']}, {entry['case']}, {entry['threads']}"
    return [f"{where}: {report.label(c)}: {c['skipped'] or report.times(c['seconds'])}" for c in entry["contestants"]]


@contextlib.contextmanager
def progress(where, began):
    """A function that says on a terminal what is going on, on one line that is overwritten; else a line for each case."""
    shown = sys.stderr is not None and sys.stderr.isatty()

    def tell(text):
        if shown:
            print(f"\r\x1b[K{time.perf_counter() - began:.0f} s  {where}: {text}", end="", file=sys.stderr, flush=True)

    if not shown and sys.stderr is not None:
        print(f"{time.perf_counter() - began:.0f} s  {where}", file=sys.stderr, flush=True)
    try:
        yield tell
    finally:
        if shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def files(found, out, whole, short):
    """{"bench" or "growth": the folder it is written to}: figures for what is whole, what --out says, else nothing."""
    complete = {"bench": whole, "growth": not short}
    figures = None if short else rows.ROOT / "figures"
    return {name: out or figures for name, entries in found.items() if entries and (out or complete[name])}


def as_data(name, entries, options, versions, rounds, variables):
    """The content of data/NAME.json. The command is without folders, which are of one machine: a checkout has its commit."""
    about = report.machine() | {"rounds": str(rounds), **report.seen(entries)}
    if variables:
        about.pop("OPENBLAS_CORETYPE", None)
        about[report.HELD] = ", ".join(f"{name}={value}" for name, value in variables.items() if value)
    about |= {f"tinylora, {name}": report.commit(folder) for name, folder in versions.items()}
    words = [
        "python -m tests.bench",
        *options.rows,
        *(f"--{given}" for given in ("avx2", "short") if getattr(options, given)),
    ]
    words += [f"--{kind} {' '.join(map(str, given))}" for kind, given in
              {"threads": options.threads, "rounds": options.rounds and [options.rounds]}.items() if given]  # fmt: skip
    words += [f"--tinylora {name}=…" for name, _ in options.tinylora]
    return {
        "command": " ".join(words),
        "about": about,
        "versions": list(versions),
        "noisy": report.noisy(entries),
        "rows": entries,
    }
