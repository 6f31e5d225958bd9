"""What a run found: as data, as Markdown, and as files.

entry      a measured case as data
lines      its numbers as rows of the table of ratios
page       figures/bench.md; `growth_page` is figures/growth.md
write      NAME.md, data/NAME.json and, where matplotlib is installed, NAME.svg
"""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

from .measure import beside, missing, number, quartiles, reached, three

NOISY = 0.1  # cores taken by other work from which a number says more of that work than of the libraries
HELD = "held to AVX2"  # what a page says of the variables that `measure.avx2` set
HERE = "here"  # the checkout that this file belongs to
LIBRARIES = ("numpy", "torch", "bitsandbytes", "peft", "transformers")
INTRODUCTION = (
    "Each contestant is a process of its own; they take turns, and a value is the median of the rounds' values, with its quartiles. "
    "`X over Y` is X's time by Y's in the same round: below 1, X is faster. must and aim are what was asked for, and "
    "reached says which of them the first checkout meets."
)


def entry(row, case, threads, measured, others, versions, targets=True):
    """A measured case as JSON's values. targets: False where the sizes are not those that these were set for."""
    first, *more = versions
    return {
        "row": row,
        "case": case.name,
        "threads": threads,
        "others": _short(others),
        "contestants": [
            {
                "name": m.name,
                "version": m.version,
                "threads": m.threads,
                "skipped": m.skipped,
                "seconds": [*map(_short, quartiles(m.rounds))] if m.rounds and m.skipped is None else None,
                "rounds": [*map(_short, m.rounds)],
                "repetitions": m.k,
                "peak": m.peak,
                "held": m.held,
                "waiting": _short(m.waiting),
                "kernels": m.kernels,
                "facts": m.facts,
            }
            for m in measured
        ],
        "lines": [
            {
                "name": line.name,
                "kind": line.kind,
                "more": line.more,
                "must": line.must.get(threads) if targets else None,
                "aim": line.aim.get(threads) if targets else None,
                "values": {v: _three_of(number(line, measured, v)) for v in versions},
                "why": {v: why for v in versions if (why := missing(line, measured, v))},
                "over": {v: _three_of(beside(line, measured, first, v)) for v in more},
                "reached": reached(line, threads, number(line, measured, first)) if targets else "",
            }
            for line in _asked(case, measured)
        ],
    }


def _asked(case, measured):
    """The lines whose contestants take part with this number of threads."""
    names = {m.name for m in measured}
    return [line for line in case.lines if {line.of, line.against or line.of} <= names]


def _short(x):
    return None if x is None else float(f"{x:.5g}")


def _three_of(found):
    return None if found is None else [*map(_short, found)]


# ------------------------------------------------------------------------------------------------------------------- the tables
def head(versions):
    """The first two lines of the table of ratios."""
    first, *more = versions
    columns = ["row", "threads", "what", "must", "aim", first, "reached", *more, *(f"{first} over {v}" for v in more)]
    return f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|"


def lines(found, versions):
    """The table's rows of one `entry`."""
    first, *more = versions
    rows = []
    for line in found["lines"]:
        unit = "" if line["kind"] == "ratio" else f", {line['kind']}"
        bounds = ["–" if line[b] is None else f"{line[b]:g}" for b in ("must", "aim")]
        values = {v: spread(line["values"][v]) or line["why"][v] for v in versions}
        over = [spread(line["over"][v]) or "–" for v in more]
        cells = [f"{found['row']}, {found['case']}", str(found["threads"]), line["name"] + unit, *bounds, values[first]]
        rows.append(f"| {' | '.join([*cells, line['reached'] or '–', *(values[v] for v in more), *over])} |")
    return rows


def spread(values):
    """ "0.098 (0.096–0.101)", the median and its quartiles; "" for None."""
    return "" if values is None else f"{three(values[1])} ({three(values[0])}–{three(values[2])})"


def page(data):
    """figures/bench.md: the machine, the ratios, the times, and what was not run."""
    text = [
        f"# Speed on a CPU{_held(data)}",
        "",
        f"Written by `{data['command']}`, whose `--help` says how to run it again. {INTRODUCTION}",
        "",
    ]
    text += [*_about(data), "## Ratios", "", head(data["versions"])]
    text += [row for found in data["rows"] for row in lines(found, data["versions"])]
    text += ["", "## Times", "", "| row | threads | contestant | time | memory, at most |", "|---" * 5 + "|"]
    for found in data["rows"]:
        for c in found["contestants"]:
            if c["seconds"] is not None:
                cells = (
                    f"{found['row']}, {found['case']}",
                    c["threads"],
                    label(c),
                    times(c["seconds"]),
                    megabytes(c["peak"]),
                )
                text.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*text, *not_run(data["rows"])]) + "\n"


def _held(data):
    return f", {HELD}" * (HELD in data["about"])


def _about(data):
    warning = ["**Other work ran on this machine meanwhile: no number here is to be quoted.**", ""] * data["noisy"]
    return [
        *warning,
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in data["about"].items()),
        "",
        *["bitsandbytes' kernels ask the processor what it has, and are not held.", ""] * (HELD in data["about"]),
    ]


def not_run(entries):
    """What was skipped and why, each sentence once, with its rows."""
    rows = {}
    for found in entries:
        for c in found["contestants"]:
            if c["skipped"]:
                rows.setdefault((label(c), c["skipped"]), []).append(f"{found['row']}, {found['case']}")
    said = [f"- {name}: {why}. ({'; '.join(dict.fromkeys(where))})" for (name, why), where in rows.items()]
    return ["", "## Not run", "", *said] if said else []


def label(c):
    """A contestant's name, with its checkout where it is tinylora's."""
    return c["name"] if c["version"] is None else f"{c['name']}, {c['version']}"


def times(seconds):
    """ "12.3 ms (12.1–12.9)" in the unit that fits the median."""
    scale, unit = next(((s, u) for s, u in ((1, "s"), (1e3, "ms")) if seconds[1] * s >= 1), (1e6, "µs"))
    low, middle, high = (three(s * scale) for s in seconds)
    return f"{middle} {unit} ({low}–{high})"


def megabytes(nbytes):
    return f"{nbytes / 1e6:,.0f} MB" if nbytes else "–"


def growth_page(data):
    """figures/growth.md: what a QLoRA step takes, by width and by context."""
    text = [f"# How a QLoRA step grows{_held(data)}", ""]
    text += [f"Written by `{data['command']}`, whose `--help` says how to run it again. FLOPs are "
            "those of the products, counted; the share is of the rate of two bare products of 512 × 2048 × 2048 in the same rounds. "
            "Predicted are the bytes of `tinylora.costs.memory`; measured is the process's peak over what it held before it set up, "
            "which has the working memory of operations too.", ""]  # fmt: skip
    text += [
        *_about(data),
        "| step | threads | checkout | time | GFLOP | GFLOP/s | of sgemm | predicted | measured |",
        "|---" * 9 + "|",
    ]
    for found in data["rows"]:
        floor = next((c for c in found["contestants"] if c["name"] == "sgemm" and c["seconds"]), None)
        for c in found["contestants"]:
            if c["seconds"] is None or not c["version"]:
                continue
            rate = c["facts"]["flops"] / c["seconds"][1]
            share = "–" if floor is None else f"{rate / (floor['facts']['flops'] / floor['seconds'][1]):.2f}"
            cells = (
                found["case"], c["threads"], c["version"], times(c["seconds"]), three(c["facts"]["flops"] / 1e9), three(rate / 1e9),
                share, megabytes(c["facts"]["bytes"]), megabytes(c["peak"] - c["held"]),
            )  # fmt: skip
            text.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*text, *not_run(data["rows"])]) + "\n"


# ------------------------------------------------------------------------------------------------------------------ the machine
def machine():
    """{what: text}: date, CPU, memory, versions; what a run adds itself comes later."""
    found = {"date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"), **_cpu()}
    found["Python"] = platform.python_version()
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    if chosen := os.environ.get("OPENBLAS_CORETYPE"):
        found["OPENBLAS_CORETYPE"] = chosen
    return found


def _cpu():
    """The processor's name, what it knows of vectors, its cores, and the memory."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        text = ""
    fields = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in text.splitlines())}
    name = fields.get("model name", platform.processor() or platform.machine())
    if "cpu family" in fields:
        name += f" (family {fields['cpu family']}, model {fields['model']})"
    known = [flag for flag in fields.get("flags", "").split() if flag.startswith(("avx", "fma", "amx"))]
    found = {"CPU": name, "vectors": " ".join(known) or "unknown", "cores": str(os.cpu_count())}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory"] = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB"
    return found


def commit(folder):
    """The commit of a checkout and whether files differ from it; "unknown" where there is no repository."""
    try:
        asked = ["git", "-C", str(folder), "describe", "--always", "--dirty=, with changes", "--exclude=*"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def noisy(rows):
    """Whether other work took so much of the machine in some case that the numbers are not to be quoted."""
    return any(found["others"] is not None and found["others"] > NOISY for found in rows)


def seen(rows):
    """What a run saw: the BLAS kernels that ran, and how quiet the machine and the waiting processes were."""
    contestants = [c for found in rows for c in found["contestants"] if c["seconds"]]
    kernels = sorted({k.rpartition(",")[0] for c in contestants for k in c["kernels"]})
    others = [found["others"] for found in rows if found["others"] is not None]
    waiting = [c["waiting"] for c in contestants if c["waiting"] is not None]
    found = {"kernels": "; ".join(kernels) or "unknown (threadpoolctl is not installed)"}
    if others:
        found["cores taken by other work"] = (
            f"{sorted(others)[len(others) // 2]:.2f} (median of the cases), at most {max(others):.2f}"
        )
    if waiting:
        found["cores taken by a waiting contestant"] = f"at most {max(waiting):.3f}"
    return found


# -------------------------------------------------------------------------------------------------------------------- the files
def as_json(data):
    """The data as JSON, a row on a line."""
    head = json.dumps({key: value for key, value in data.items() if key != "rows"}, indent=1, ensure_ascii=False)
    rows = ",\n  ".join(json.dumps(row, ensure_ascii=False, allow_nan=False) for row in data["rows"])
    return f'{head[:-2]},\n "rows": [\n  {rows}\n ]\n}}\n'


def write(name, data, folder, suffix=""):
    """Write NAME.md, data/NAME.json and NAME.svg; -> their paths. suffix: of the names "bench" and "growth"; with one there is no figure.

    Without matplotlib the figure is left out, which is said.
    """
    from tinylora.models import files

    folder = Path(folder)
    paths = [folder / "data" / f"{name}{suffix}.json", folder / f"{name}{suffix}.md"]
    files.write_text(paths[0], as_json(data))
    files.write_text(paths[1], (growth_page if name == "growth" else page)(data))
    if suffix:
        return paths
    try:
        from tinylora.figures import speed
        from tinylora.papers import gallery

        drawn = {name: gallery.as_svg(speed.growth if name == "growth" else speed.ratios, data)}
    except RuntimeError as error:
        print(f"no figure: {error}", file=sys.stderr)
        return paths
    gallery.write(drawn, folder)
    return [*paths, folder / f"{name}.svg"]
