"""Write quant.npz: what bitsandbytes itself computes on a CPU, for the tests to compare with, bit for bit.

Run `python tests/goldens/make_goldens.py` where torch and bitsandbytes are installed; the tests need only the
file. It holds a JSON index (as bytes) and, for each quantity, one array in which the cases lie end to end.

    z = dict(np.load("tests/goldens/quant.npz"))
    index = json.loads(z["index"].tobytes())
    for case in index["cases"]:
        get = {name: z[name][start:stop] for name, (start, stop) in case["at"].items()}
        w = get["input_" + case["dtype"]].reshape(case["shape"])

`case` has name, kind, code ("nf4" | "fp4"), blocksize, dtype ("float32" | "bfloat16" | "float16"), shape and
nested. `get` has, as flat arrays,

    input_float32 | input_bfloat16 | input_float16
                    one of the three, by dtype; bfloat16 as its 16 bits, in uint16
    packed          uint8 [(n + 1) // 2], even element in the high half
    absmax          float32 [blocks], as stored without double quantization, in nested cases too
    absmax_codes    uint8 [blocks], nested cases only
    nested_absmax   float32 [ceil(blocks / 256)], nested cases only
    offset          float32 [1], nested cases only
    dequantized_float32, dequantized_bfloat16 (uint16), dequantized_float16
                    [n]; in nested cases from the nested state

Beside the cases: `nf4`, `fp4` (the tables; fp4 by bit pattern), `dynamic_signed`, `dynamic_unsigned` (the
maps of 8 bits), `mean` (Tensor.mean() of mean_input(n), for each n in `mean_size`: it shows the order of
torch's sum of float32), and index["blockwise8"]: cases of 8 bits with kind, signed, blocksize and at =
{blockwise8_input, blockwise8_codes, blockwise8_absmax}.

How to compare:
* NaN: by isnan. Every NaN was replaced by the canonical quiet one, so its sign and payload say nothing.
* Zero: fp4 has two zeros, codes 0 and 8. Here both dequantize to +0.0 * absmax, as the published table says.
  Compare with == where a reader takes -0.0 for code 8, as one C++ loop of bitsandbytes does (even lengths not
  divisible by 16).
* torch ran on one thread. From 32768 blocks on, the last bit of offset depends on the number of threads.

Where bitsandbytes 0.50.2 disagrees with itself: its AVX-512 dequantize reads a wrong absmax if rows are a
multiple of 16 but not of the blocksize, and its C++ loops turn some bfloat16 denormals (AVX-512) and NaNs
(plain loop) into zeros. So every dequantized value is taken with the shape (n, 1), whose odd last dimension
leads to the plain torch path on every machine: table[code] * absmax in float32, then rounded once. The script
checks that the C++ path, called with the flat shape, gives the same values apart from those zeros.
"""

import itertools
import json
import os
from pathlib import Path

import numpy as np

OUT = Path(__file__).with_name("quant.npz")
DTYPES = ("float32", "bfloat16", "float16")
CODES = ("nf4", "fp4")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SHAPES = (
    *((64,), (65,), (127,), (129,)),
    *((7, 13), (4, 96), (10, 20), (1, 130), (190, 1), (9, 31)),
    *((3, 5, 11), (2, 3, 64)),
)


def mean_input(n):
    "Float32 values in [0, 1) that need no random generator."
    k = np.arange(n, dtype=np.uint64) * np.uint64(2654435761) % np.uint64(2**32)
    return (k >> np.uint64(8)).astype(np.float32) * np.float32(2.0**-24)


# ------------------------------------------------------------ contents: (rng, n, table, blocksize) -> values
def normal(rng, n, *_):
    return rng.standard_normal(n)


def uniform(rng, n, *_):
    return rng.uniform(-1, 1, n)


def heavy_tailed(rng, n, *_):
    return rng.standard_t(2, n)


def outlier(rng, n, *_):
    x = rng.standard_normal(n) * 0.02
    x[rng.integers(n)] = -37.5
    return x


def equal(rng, n, *_):
    return np.full(n, rng.choice([0.3, -1.7, 1.0]))


def scaled_blocks(rng, n, table, blocksize):
    "Every block has its own scale: work for the double quantization."
    scale = 10.0 ** rng.uniform(-3, 1, -(-n // blocksize))
    return rng.standard_normal(n) * np.repeat(scale, blocksize)[:n]


def coarse_blocks(rng, n, table, blocksize):
    "The same on a coarse grid, which compresses well."
    scale = np.round(rng.lognormal(0, 0.7, -(-n // blocksize)) * 64) / 64 + 1 / 64
    return rng.integers(-7, 8, n) * np.repeat(scale, blocksize)[:n]


def sparse_blocks(rng, n, table, blocksize):
    "One value in each block, and zeros: many blocks in few bytes."
    blocks = -(-n // blocksize)
    x = np.zeros((blocks, blocksize))
    column = rng.integers(n - (blocks - 1) * blocksize, size=blocks)
    x[np.arange(blocks), column] = rng.lognormal(-3, 0.5, blocks)
    return x.reshape(-1)[:n]


def bit_patterns(rng, n, *_):
    x = rng.integers(0, 2**32, n, dtype=np.uint64).astype(np.uint32).view(np.float32)
    return np.where(np.isfinite(x), x, np.float32(0.5))


def around(rng, n, table, ulps):
    "Table values and the midpoints between them, a few units in the last place to either side."
    t = np.sort(table)
    points = np.concatenate([t, -t, (t[1:] + t[:-1]) / np.float32(2)]).astype(np.float32)
    points = points[(points != 0) & (np.abs(points) < 1)]
    x = rng.permutation(np.resize(points, n)).view(np.int32) + rng.integers(-ulps, ulps + 1, n)
    return x.astype(np.int32).view(np.float32)


def ties(rng, n, table, blocksize):
    "The scale is a power of two and the absmax of every block: scaling is exact, so ties are ties."
    x = around(rng, n, table, 1)
    x[:: min(blocksize, 32)] = 1
    return x * np.float32(2.0 ** rng.integers(-30, 30))


def ties_any_scale(rng, n, table, blocksize):
    "Here the reciprocal and the division round to different sides."
    scale = np.float32(10 ** rng.uniform(-4, 4))
    x = around(rng, n, table, 1) * scale
    x[:: min(blocksize, 32)] = scale
    return x


def denormal(rng, n, *_):
    return rng.standard_normal(n) * 1e-40


def tiny_absmax(rng, n, table, blocksize):
    "Around 1e-38, where the scale is clamped."
    scale = 10.0 ** rng.uniform(-40, -37, -(-n // blocksize))
    return rng.standard_normal(n) * np.repeat(scale, blocksize)[:n]


def huge(rng, n, *_):
    return np.clip(rng.standard_normal(n), -1, 1) * 3.4e38


def zeros(rng, n, *_):
    return np.where(rng.integers(2, size=n), 0.0, -0.0)


def zero_blocks(rng, n, table, blocksize):
    "Every other block is zero; so is the last."
    x = rng.standard_normal(n)
    x[(np.arange(n) // blocksize) % 2 == ((n - 1) // blocksize) % 2] = 0
    return x


def one_nan(rng, n, *_):
    x = rng.standard_normal(n)
    x[n // 3] = np.nan
    return x


def all_nan(rng, n, *_):
    return np.full(n, np.nan)


def infinity(rng, n, *_):
    x = rng.standard_normal(n)
    x[n // 3] = np.inf
    return x


def minus_infinity(rng, n, *_):
    x = rng.standard_normal(n)
    x[-1], x[n // 2] = -np.inf, 0
    return x


def infinity_and_nan(rng, n, *_):
    x = rng.standard_normal(n)
    x[[n // 4, n // 3, n // 2]] = np.nan, -np.inf, np.inf
    return x


# ------------------------------------------------------------ kind, code, blocksize, dtype, shape, nested
def plan():
    turn = itertools.count()

    def pick(options, stride=1):
        return options[next(turn) // stride % len(options)]

    for n, code, kind in itertools.product((1, 2, 3, 5), CODES, (normal, zeros, equal, infinity)):
        yield kind, code, pick((64, 4096, 32)), pick(DTYPES, 2), (n,), n % 2 == 1
    ordinary = (normal, uniform, heavy_tailed, outlier, equal, scaled_blocks)
    for kind, dtype, code, nested in itertools.product(ordinary, DTYPES, CODES, (False, True)):
        yield kind, code, pick(BLOCKSIZES[:4]), dtype, pick(SHAPES), nested
    for blocksize, code, nested in itertools.product(BLOCKSIZES[4:], CODES, (False, True)):
        shape = pick(((13, 17), (300,), (2, 11, 9), (511,)))
        yield scaled_blocks, code, blocksize, pick(DTYPES), shape, nested
        yield coarse_blocks, code, blocksize, pick(DTYPES), (blocksize + pick((37, 0, 64)),), nested
    for code, n, blocksize, nested in itertools.product(CODES, (64, 160, 257), (32, 64, 256), (False, True)):
        yield ties, code, blocksize, "float32", (n,), nested
    for code, n, blocksize in itertools.product(CODES, (128, 200, 333), (32, 64, 128)):
        yield ties_any_scale, code, blocksize, "float32", (n,), False
    for code, dtype, n in itertools.product(CODES, DTYPES[1:], (96, 101)):
        yield ties, code, 32, dtype, (n,), False
    small_and_large = (denormal, tiny_absmax, huge, zeros, zero_blocks)
    special = (*small_and_large, one_nan, all_nan, infinity, minus_infinity, infinity_and_nan)
    for kind, code, nested in itertools.product(special, CODES, (False, True)):
        yield kind, code, 64, "float32", (150,), nested
        yield kind, code, 32, "float32", (8, 16), nested
        yield kind, code, pick((32, 64)), pick(DTYPES[1:]), pick(((97,), (5, 20), (3, 4, 16))), nested
    for code, n, blocksize in itertools.product(CODES, (96, 143), (32, 64, 4096)):
        yield bit_patterns, code, blocksize, "float32", (n,), n == 143
    for blocks, code in itertools.product((4, 7, 8, 9, 31, 33, 40), CODES):
        yield pick((scaled_blocks, coarse_blocks, uniform)), code, 32, pick(DTYPES), (blocks, 32), True
    for blocks, code in itertools.product((255, 256, 257, 300, 513), CODES):
        yield sparse_blocks, code, 32, pick(DTYPES), (blocks * 32 - pick((0, 5, 16)),), True


# ------------------------------------------------------------ running bitsandbytes
def main():
    os.environ["TORCH_COMPILE_DISABLE"] = "1"  # the same arithmetic, without a compiler
    import bitsandbytes
    import bitsandbytes.functional as bnb
    import torch

    torch.set_num_threads(1)
    parts, length = {}, {}

    def put(name, array):
        "Append to the array called name; return [start, stop]."
        array = (array.view(torch.uint16) if array.dtype == torch.bfloat16 else array).numpy().reshape(-1)
        start = length.get(name, 0)
        parts.setdefault(name, []).append(array)
        length[name] = start + array.size
        return [start, start + array.size]

    def canonical(t):
        return torch.where(torch.isnan(t), torch.tensor(float("nan"), dtype=t.dtype), t)

    def dequantize(packed, state, dtype, shape):
        state.dtype, state.shape = dtype, torch.Size(shape)
        return canonical(bnb.dequantize_4bit(packed, state).reshape(-1))

    def check_compiled_path(packed, state, n, plain):
        "The C++ path agrees, but for some zeros in bfloat16 (and the signs of zeros)."
        fast = dequantize(packed, state, plain.dtype, (n,))
        same = (fast == plain) | (fast.isnan() & plain.isnan())
        if plain.dtype == torch.bfloat16:
            same |= (fast == 0) & ((plain.abs() <= 2.0**-126) | plain.isnan())
        assert bool(same.all())

    tables = {code: bnb.get_4bit_type(code, device="cpu") for code in CODES}
    cases = []
    for i, (kind, code, blocksize, dtype, shape, nested) in enumerate(plan()):
        rng = np.random.default_rng([2305, 14314, i])
        n = int(np.prod(shape))
        with np.errstate(all="ignore"):
            values = kind(rng, n, tables[code].numpy(), blocksize).astype(np.float32)
        w = torch.from_numpy(values).to(getattr(torch, dtype)).reshape(shape)
        at = {"input_" + dtype: put("input_" + dtype, canonical(w))}

        packed, state = bnb.quantize_4bit(canonical(w), blocksize=blocksize, quant_type=code)
        at["packed"] = put("packed", packed)
        at["absmax"] = put("absmax", canonical(state.absmax))
        if nested:
            again, state = bnb.quantize_4bit(
                canonical(w), blocksize=blocksize, quant_type=code, compress_statistics=True
            )
            assert torch.equal(packed, again)
            at["absmax_codes"] = put("absmax_codes", state.absmax)
            at["nested_absmax"] = put("nested_absmax", canonical(state.state2.absmax))
            at["offset"] = put("offset", canonical(state.offset))
        for name in DTYPES:
            plain = dequantize(packed, state, getattr(torch, name), (n, 1))
            check_compiled_path(packed, state, n, plain)
            at["dequantized_" + name] = put("dequantized_" + name, plain)
        words = [f"{i:03d}", kind.__name__, code, str(blocksize), dtype, "x".join(map(str, shape))]
        case = {"name": "-".join(words + ["nested"] * nested), "kind": kind.__name__, "code": code}
        case |= {"blocksize": blocksize, "dtype": dtype, "shape": shape, "nested": nested, "at": at}
        cases.append(case)

    maps = {signed: bnb.create_dynamic_map(signed=signed) for signed in (True, False)}
    blockwise8 = []
    kinds = (normal, heavy_tailed, uniform, scaled_blocks, zero_blocks)
    kinds += (denormal, tiny_absmax, huge, infinity_and_nan, all_nan)
    for i, (kind, signed) in enumerate(itertools.product(kinds, (True, False))):
        rng = np.random.default_rng([2110, 2861, i])
        blocksize, n = (256, 64, 100)[i % 3], (300, 512, 257, 200)[i % 4]
        x = kind(rng, n, None, blocksize).astype(np.float32)
        x = canonical(torch.from_numpy(x if signed or kind is normal else np.abs(x)))
        codes, state = bnb.quantize_blockwise(x, code=maps[signed], blocksize=blocksize)
        values = {"input": x, "codes": codes, "absmax": canonical(state.absmax)}
        at = {"blockwise8_" + name: put("blockwise8_" + name, value) for name, value in values.items()}
        blockwise8.append({"kind": kind.__name__, "signed": signed, "blocksize": blocksize, "at": at})

    sizes = [*range(1, 300), 511, 513, 1000, 2047, 2049, 4095, 4099, 8191, 16387, 32767, 32768]
    sizes += [65537, 262145, 1000003]
    arrays = {name: np.concatenate(part) for name, part in parts.items()}
    arrays |= {code: table.numpy() for code, table in tables.items()}
    arrays["dynamic_signed"], arrays["dynamic_unsigned"] = maps[True].numpy(), maps[False].numpy()
    arrays["mean_size"] = np.array(sizes, np.int32)
    arrays["mean"] = np.array([torch.from_numpy(mean_input(n)).mean().item() for n in sizes], np.float32)
    versions = {m.__name__: m.__version__ for m in (torch, bitsandbytes, np)}
    index = {"versions": versions, "cases": cases, "blockwise8": blockwise8}
    arrays["index"] = np.frombuffer(json.dumps(index, separators=(",", ":")).encode(), np.uint8)
    np.savez_compressed(OUT, **arrays)
    print(f"{OUT.name}: {len(cases)} cases, {len(blockwise8)} of 8 bits, {OUT.stat().st_size:,d} bytes")


if __name__ == "__main__":
    main()
