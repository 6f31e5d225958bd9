"""Copy the numbers of long runs into figures/data, and print the rows of the tables in figures/README.md that show them.

    python figures/from_runs.py compare compare        # after: tinylora finetune --compare --out compare
    python figures/from_runs.py curves-base curves
    python figures/from_runs.py ranks ranks

The first argument is a file figures/data/NAME.json, whose methods, ranks and seeds are looked for; the second is the folder that its
"command" wrote. Nothing is written unless each of the runs has ended, had the steps of that command, and trained the embedded
model that is here.
"""

import argparse
import json
import re
import shlex
import sys
from pathlib import Path
from statistics import mean, stdev

from tinylora.cli import parsed
from tinylora.models import files
from tinylora.training.finetune import Job, inputs

DATA = Path(__file__).parent / "data"


def report(data, folder, run):
    """A run's report; SystemExit with a sentence where the run has not ended, or was not one of the command's."""
    path, steps = folder / run / "report.json", parsed(shlex.split(data["command"])[1:]).steps
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        sys.exit(f"{path} is not there: that run has not ended")
    if found["after"] is None:
        sys.exit(f"{path} has no bits per byte after training")
    if found["recipe"]["steps"] != steps:
        sys.exit(f"{path} is of {found['recipe']['steps']} steps, and `{data['command']}` takes {steps}")
    if found["job"]["model"] == "base" and found["inputs"] != inputs(Job()):
        sys.exit(f"{path} is of another embedded model or text than those that are here")
    return found


def spread(values, sign=""):
    """Mean and standard deviation as the tables have them; sign "+" for a difference."""
    return f"{mean(values):{sign}.4f} ± {stdev(values):.4f}".replace("-", "−")


def compare(data, folder):
    """{method: after of each seed, and bytes}; rows of the table of methods: before, after, minus LoRA's, minus full's."""
    rows, methods = [], data["methods"]
    for method, run in methods.items():
        found = [report(data, folder, f"{method}-seed{seed}") for seed in data["seeds"]]
        run["after"] = [round(r["after"], 7) for r in found]
        run["bytes"] = {name: found[0]["bytes"][name] for name in run["bytes"]}
        rows.append([method, f"{found[0]['before']:.4f}", spread(run["after"])])
    for row in rows:
        for other in ("lora", "full"):
            pairs = zip(methods[row[0]]["after"], methods[other]["after"], strict=True)
            row.append("" if row[0] == other else spread([a - b for a, b in pairs], "+"))
    return rows


def curves(data, folder):
    """{method: before, and what was held out at each of the steps, a row for each seed}; rows of the table of curves."""
    rows = []
    for method, run in data["methods"].items():
        found = [report(data, folder, f"{method}-seed{seed}") for seed in data["seeds"]]
        run["before"] = round(found[0]["before"], 7)
        run["heldout"] = []
        for r in found:
            measured = {row["step"]: row["heldout"] for row in r["history"] if "heldout" in row}
            if sorted(measured) != data["steps"]:
                sys.exit(f"{method}: measured at the steps {sorted(measured)}, expected {data['steps']}")
            run["heldout"].append([round(measured[step], 7) for step in data["steps"]])
        rows.append([method, f"{run['before']:.4f}", spread([row[-1] for row in run["heldout"]])])
    return rows


def ranks(data, folder):
    """{layers: {rank: after of each seed}}; rows of the table of ranks."""
    rows = []
    for label, by_rank in data["targets"].items():
        for r in by_rank:
            name = re.sub(r"[^a-z_-]+", "-", label)
            found = [report(data, folder, f"{name}-r{r}-seed{seed}") for seed in data["seeds"]]
            by_rank[r] = [round(f["after"], 7) for f in found]
        rows.append([label, *map(spread, by_rank.values())])
    return rows


def in_lines(data):
    """JSON in which a list of numbers, and a table of names and numbers, takes one line."""
    text = json.dumps(data, indent=1, ensure_ascii=False)
    innermost = r"\[[^\[\]{}]*\]|\{[^\[\]{}]*\}"
    return re.sub(innermost, lambda found: json.dumps(json.loads(found[0]), ensure_ascii=False), text) + "\n"


KINDS = {"compare": compare, "curves-base": curves, "curves-smollm2": curves, "ranks": ranks}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=KINDS)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args(arguments)
    path = DATA / f"{given.name}.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    rows = KINDS[given.name](data, given.folder)
    files.write_text(path, in_lines(data))
    print(*(f"| {' | '.join(row)} |" for row in rows), sep="\n")


if __name__ == "__main__":
    main()
