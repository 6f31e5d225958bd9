"""Write quant_cuda.npz, optim8bit_cuda.npz and rcp_approx.npz: what bitsandbytes, and the instruction it divides with, compute on a GPU.

Run `python tests/goldens/make_cuda_goldens.py FOLDER` on a machine with an NVIDIA GPU, torch, bitsandbytes and CuPy; the files of the
tests came from an H200 (driver 580.159, CUDA 13.0, torch 2.11.0, CuPy 14.2.0, bitsandbytes 0.50.2), and rcp_approx.npz lies in
tinylora/kernels. The tests need the files alone.

quant_cuda.npz       the cases of make_goldens.plan(), whose inputs quant.npz holds. `index` (JSON, uint8) has versions, cases and
                     blockwise8; `at` names [start, stop] in packed, absmax, deq_float32, deq_bfloat16 (uint16), deq_float16, all of them
                     without double quantization, and for nested cases in codes, nested and offset; cases of 8 bits in b8_codes, b8_absmax
optim8bit_cuda.npz   the cases of make_optim8bit_goldens.plan(), laid out as optim8bit.npz is
rcp_approx.npz       delta: two rows of 2²³ bits (packbits): where rcp.approx.ftz.f32 of the float32 with that mantissa is one ulp above
                     (row 0) or below (row 1) the correctly rounded reciprocal
"""

import itertools
import json
import sys
from pathlib import Path

import make_goldens
import make_optim8bit_goldens
import numpy as np

BLOCKSIZES_8BIT, LENGTHS_8BIT = (256, 64, 128), (300, 512, 257, 200)


class Ends:
    """Arrays in which the cases lie end to end."""

    def __init__(self):
        self.parts, self.length = {}, {}

    def put(self, name, array):
        """Append to the array called name; return [start, stop]."""
        array = np.ascontiguousarray(array).reshape(-1)
        start = self.length.get(name, 0)
        self.parts.setdefault(name, []).append(array)
        self.length[name] = start + len(array)
        return [start, start + len(array)]

    def save(self, path, index):
        arrays = {name: np.concatenate(parts) for name, parts in self.parts.items()}
        arrays["index"] = np.frombuffer(json.dumps(index, separators=(",", ":")).encode(), np.uint8)
        np.savez_compressed(path, **arrays)
        print(f"{path}: {len(index['cases'])} cases, {path.stat().st_size:,d} bytes")


def host(t):
    import torch

    return (t.view(torch.uint16) if t.dtype == torch.bfloat16 else t).cpu().numpy()


def quant(path, versions):
    import bitsandbytes.functional as bnb
    import torch

    ends, cases, eight = Ends(), [], []
    tables = {code: bnb.get_4bit_type(code, device="cpu").numpy() for code in make_goldens.CODES}
    for i, (kind, code, blocksize, dtype, shape, nested) in enumerate(make_goldens.plan()):
        rng, n = np.random.default_rng([2305, 14314, i]), int(np.prod(shape))
        with np.errstate(all="ignore"):
            values = kind(rng, n, tables[code], blocksize).astype(np.float32)
        w = torch.from_numpy(values).to(getattr(torch, dtype)).reshape(shape).cuda()
        packed, state = bnb.quantize_4bit(w, blocksize=blocksize, quant_type=code)
        at = {"packed": ends.put("packed", host(packed)), "absmax": ends.put("absmax", host(state.absmax))}
        for name in make_goldens.DTYPES:
            state.dtype = getattr(torch, name)
            at["deq_" + name] = ends.put("deq_" + name, host(bnb.dequantize_4bit(packed, state)))
        if nested:
            again, state = bnb.quantize_4bit(w, blocksize=blocksize, quant_type=code, compress_statistics=True)
            assert torch.equal(packed, again)
            for name, x in (("codes", state.absmax), ("nested", state.state2.absmax), ("offset", state.offset)):
                at[name] = ends.put(name, host(x))
        cases.append({"i": i, "kind": kind.__name__, "code": code, "blocksize": blocksize, "dtype": dtype,
                      "shape": shape, "nested": nested, "at": at})  # fmt: skip

    maps = {signed: bnb.create_dynamic_map(signed=signed).cuda() for signed in (True, False)}
    names = ("normal", "heavy_tailed", "uniform", "scaled_blocks", "zero_blocks")
    names += ("denormal", "tiny_absmax", "huge", "infinity_and_nan", "all_nan")
    for i, (name, signed) in enumerate(itertools.product(names, (True, False))):
        blocksize, n = BLOCKSIZES_8BIT[i % 3], LENGTHS_8BIT[i % 4]
        x = getattr(make_goldens, name)(np.random.default_rng([2110, 2861, i]), n, None, blocksize).astype(np.float32)
        x = torch.from_numpy(x if signed or name == "normal" else np.abs(x)).cuda()
        codes, state = bnb.quantize_blockwise(x, code=maps[signed], blocksize=blocksize)
        at = {"b8_codes": ends.put("b8_codes", host(codes)), "b8_absmax": ends.put("b8_absmax", host(state.absmax))}
        eight.append({"i": i, "kind": name, "signed": signed, "blocksize": blocksize, "at": at})
    ends.save(path, {"versions": versions, "cases": cases, "blockwise8": eight})


def optim8bit(path, versions):
    import bitsandbytes
    import torch

    ends, cases = Ends(), []
    eight = {"state1": "codes_m", "state2": "codes_v", "absmax1": "absmax_m", "absmax2": "absmax_v"}
    for case in make_optim8bit_goldens.plan():
        p = torch.nn.Parameter(torch.from_numpy(make_optim8bit_goldens.start(case)).cuda())
        options = {name: case[name] for name in ("lr", "betas", "eps", "weight_decay", "min_8bit_size")}
        optimizer, seen = bitsandbytes.optim.AdamW8bit([p], **options), {}
        for t in range(1, case["steps"] + 1):
            p.grad = torch.from_numpy(make_optim8bit_goldens.gradient(case, t)).cuda()
            optimizer.step()
            state = optimizer.state[p]
            names = eight if state["state1"].dtype == torch.uint8 else {"state1": "m", "state2": "v"}
            for theirs, ours in names.items():
                seen.setdefault(ours, []).append(host(state[theirs]))
            seen.setdefault("p", []).append(host(p.detach()))
        cases.append(case | {"at": {name: ends.put(name, np.concatenate(x)) for name, x in seen.items()}})
    ends.save(path, {"versions": versions, "cases": cases})


def reciprocals(path):
    import cupy

    kernel = cupy.ElementwiseKernel(
        "float32 x", "float32 y", 'asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));', "rcp_approx"
    )
    rows = None
    for exponent in (0, -27, 1, 23):
        mantissa = np.arange(1 << 23, dtype=np.uint32)
        x = (mantissa | np.uint32((127 + exponent) << 23)).view(np.float32)
        ulps = kernel(cupy.asarray(x)).get().view(np.int32) - (np.float32(1) / x).view(np.int32)
        assert np.abs(ulps).max() == 1
        found = np.concatenate([np.packbits(ulps == 1), np.packbits(ulps == -1)])
        assert rows is None or np.array_equal(rows, found), "one table for every exponent"
        rows = found
    np.savez_compressed(path, delta=rows)
    print(f"{path}: {path.stat().st_size:,d} bytes")


def main(folder):
    import bitsandbytes
    import cupy
    import torch

    versions = {m.__name__: m.__version__ for m in (torch, bitsandbytes, cupy)}
    versions["device"] = torch.cuda.get_device_name()
    quant(folder / "quant_cuda.npz", versions)
    optim8bit(folder / "optim8bit_cuda.npz", versions)
    reciprocals(folder / "rcp_approx.npz")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
