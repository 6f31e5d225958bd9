"""What the real libraries computed, read from the .npz files beside this one (see make_goldens.py for their layout)."""

import json
from pathlib import Path

import numpy as np

QUANT = dict(np.load(Path(__file__).with_name("quant.npz")))
INDEX = json.loads(QUANT["index"].tobytes())


def arrays(case):
    """{quantity: flat array} of one case."""
    return {name: QUANT[name][start:stop] for name, (start, stop) in case["at"].items()}
