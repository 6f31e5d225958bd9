"""What the real libraries computed, read from the .npz files beside this one (see make_goldens.py for their layout)."""

import json
from pathlib import Path

import numpy as np

QUANT = dict(np.load(Path(__file__).with_name("quant.npz")))
INDEX = json.loads(QUANT["index"].tobytes())
QUANT_CUDA = dict(np.load(Path(__file__).with_name("quant_cuda.npz")))  # the same inputs, on a GPU
INDEX_CUDA = json.loads(QUANT_CUDA["index"].tobytes())


def arrays(case, of=QUANT):
    """{quantity: flat array} of one case."""
    return {name: of[name][start:stop] for name, (start, stop) in case["at"].items()}


def published():
    """Codes as their papers print them, by name (published.json says which table each is)."""
    return json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))


def optimality():
    """{(quantity, code): {blocksize: the printed digits}}: error and entropy for normal weights (optimality.csv)."""
    lines = Path(__file__).with_name("optimality.csv").read_text(encoding="utf-8").splitlines()
    head, *rows = (line.split(",") for line in lines if not line.startswith("#"))
    return {(row[0], row[1]): dict(zip(map(int, head[2:]), row[2:], strict=True)) for row in rows}
