"""Write optim8bit.npz: what bitsandbytes' AdamW8bit itself computes on a CPU, for tests/test_optim8bit.py to compare with.

Run `python tests/goldens/make_optim8bit_goldens.py` where torch and bitsandbytes are installed; the tests need the file, and from
this one `start` and `gradient`: both are integer arithmetic and powers of two, the same everywhere, so the file does not hold them.

    z = dict(np.load("tests/goldens/optim8bit.npz"))
    for case in json.loads(z["index"].tobytes())["cases"]:
        get = {name: z[name][start:stop] for name, (start, stop) in case["at"].items()}

`case` has kind (of the gradients), n, steps, lr, betas, eps, weight_decay and min_8bit_size, as they were given. `get` has, after each
step, one step after the other,

    p                      float32 (steps · n), NaN as one and the same
    codes_m, codes_v       uint8 (steps · n), where the state has 8 bits
    absmax_m, absmax_v     float32 (steps · ⌈n/256⌉), where the state has 8 bits
    m, v                   float32 (steps · n), where it has not

Most cases set min_8bit_size = 1, so that few numbers do; those around 4,096 elements leave the default.
"""

import json
import os
from pathlib import Path

import numpy as np

OUT = Path(__file__).with_name("optim8bit.npz")


def noise(n, *key):
    """uint32 (n,): a hash of the position and of the key's integers (multiply, add, fold, multiply, fold)."""
    x = np.arange(n, dtype=np.uint64)
    for k in key:
        x = x * np.uint64(0x9E3779B97F4A7C15) + np.uint64((k + 1) * 0xD1B54A32D192ED03 % 2**64)
        x = (x ^ (x >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        x ^= x >> np.uint64(32)
    return x.astype(np.uint32)


def spread(n, low, high, *key):
    """float32 of either sign, 24 random bits between ±1, times 2^e, e from low to high - 1."""
    mantissa = (noise(n, *key, 0) >> np.uint32(7)).astype(np.int32) - (1 << 24)
    exponent = low + (noise(n, *key, 1) % np.uint32(high - low)).astype(np.int32)
    return np.ldexp(mantissa.astype(np.float32), exponent - 24)


def start(case):
    """p before the first step."""
    return spread(case["n"], -3, 2, case["n"], 7)


def gradient(case, t):
    """The gradient of step t = 1, 2, …"""
    n, kind = case["n"], case["kind"]
    g = spread(n, *RANGES.get(kind, (-12, -7)), n, t)
    if kind == "some_zero":
        g[noise(n, n, 3) % 2 == 0] = 0  # the same ones at every step
    elif kind == "zero_blocks":
        g[(np.arange(n) // 256) % 2 == 0] = 0
        g[noise(n, n, t) % 8 != 0] = 0
    elif kind == "coarse":
        g = np.round(g * 2**12) / np.float32(2**12)
    elif kind == "no_numbers" and t == 2:
        g[[3, n // 2, n - 1]] = np.nan, np.inf, -np.inf
    return g


RANGES = {
    "many_scales": (-60, 20),
    "tiny": (-80, -60),  # the squares are denormal, or 0
    "tiniest": (-149, -120),  # the gradients themselves are
    "huge": (20, 60),
    "overflowing": (40, 100),  # squares beyond float32
}


def plan():
    ordinary = {"steps": 4, "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2, "min_8bit_size": 1}
    for n in (1, 255, 256, 257, 600):
        yield ordinary | {"kind": "ordinary", "n": n}
    for kind in ("some_zero", "zero_blocks", "coarse", "no_numbers", *RANGES):
        yield ordinary | {"kind": kind, "n": 520, "steps": 3}
    yield ordinary | {"kind": "many_scales", "n": 700, "weight_decay": 0.0}
    yield ordinary | {"kind": "ordinary", "n": 300, "lr": 0.03, "weight_decay": 0.1}
    yield ordinary | {"kind": "some_zero", "n": 300, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.0}
    yield ordinary | {"kind": "some_zero", "n": 256, "steps": 12, "weight_decay": 0.0}
    for n in (4095, 4096, 4097):
        yield ordinary | {"kind": "zero_blocks", "n": n, "steps": 2, "weight_decay": 0.0, "min_8bit_size": 4096}


def main():
    os.environ["TORCH_COMPILE_DISABLE"] = "1"  # the same arithmetic, without a compiler
    import bitsandbytes
    import torch

    torch.set_num_threads(1)
    parts, length, cases = {}, {}, []

    def put(name, arrays):
        """Append to the array called name; return [start, stop]."""
        array = np.concatenate(arrays)
        if array.dtype == np.float32:
            array[np.isnan(array)] = np.nan
        begin = length.get(name, 0)
        parts.setdefault(name, []).append(array)
        length[name] = begin + len(array)
        return [begin, begin + len(array)]

    for case in plan():
        p = torch.nn.Parameter(torch.from_numpy(start(case)))
        options = {name: case[name] for name in ("lr", "betas", "eps", "weight_decay", "min_8bit_size")}
        optimizer = bitsandbytes.optim.AdamW8bit([p], **options)
        seen = {}
        for t in range(1, case["steps"] + 1):
            p.grad = torch.from_numpy(gradient(case, t))
            optimizer.step()
            state = optimizer.state[p]
            names = {"state1": "m", "state2": "v"}
            if state["state1"].dtype == torch.uint8:
                names = {"state1": "codes_m", "state2": "codes_v", "absmax1": "absmax_m", "absmax2": "absmax_v"}
            for theirs, ours in names.items():
                seen.setdefault(ours, []).append(state[theirs].numpy().copy())
            seen.setdefault("p", []).append(p.detach().numpy().copy())
        cases.append(case | {"at": {name: put(name, arrays) for name, arrays in seen.items()}})

    arrays = {name: np.concatenate(part) for name, part in parts.items()}
    versions = {m.__name__: m.__version__ for m in (torch, bitsandbytes, np)}
    index = {"versions": versions, "cases": cases}
    arrays["index"] = np.frombuffer(json.dumps(index, separators=(",", ":")).encode(), np.uint8)
    np.savez_compressed(OUT, **arrays)
    print(f"{OUT.name}: {len(cases)} cases, {OUT.stat().st_size:,d} bytes")


if __name__ == "__main__":
    main()
