"""What the real libraries computed, read from the .npz files beside this one (see make_goldens.py for their layout)."""

import json
from pathlib import Path

import numpy as np

QUANT = dict(np.load(Path(__file__).with_name("quant.npz")))
INDEX = json.loads(QUANT["index"].tobytes())


def arrays(case):
    """{quantity: flat array} of one case."""
    return {name: QUANT[name][start:stop] for name, (start, stop) in case["at"].items()}


def published():
    """Codes as their papers print them, by name (published.json says which table each is)."""
    return json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))


def optimality():
    """{(quantity, code): {blocksize: the printed digits}}: error and entropy for normal weights (optimality.csv)."""
    lines = Path(__file__).with_name("optimality.csv").read_text(encoding="utf-8").splitlines()
    head, *rows = (line.split(",") for line in lines if not line.startswith("#"))
    return {(row[0], row[1]): dict(zip(map(int, head[2:]), row[2:], strict=True)) for row in rows}
