"""Checks and measures this library on one NVIDIA GPU, in at most six minutes, and writes one table: figures/gpu.json and figures/gpu.md.

What it needs is a GPU, CuPy and pytest. Where torch (with CUDA), bitsandbytes, PEFT and transformers are installed, the same work is timed
with them in the same process, on the same card; where they are not, their column says "not installed". On a bare machine, from the root
of a clone:

    python3 -m venv .venv
    .venv/bin/pip install -e '.[gpu,dev]'                        CUDA 13; '.[gpu12,dev]' for CUDA 12
    .venv/bin/pip install torch bitsandbytes peft transformers   if wanted: a large download
    .venv/bin/python -m tests.gpu

The sections, in the order in which they run (--only NAME ... runs some of them, and the table then has these alone):

    exact     the CUDA rounding rule on the device against what a GPU wrote before, in every bit; rcp.approx of all 2^23 mantissas;
              fresh random weights against bitsandbytes
    codes     quantizing and dequantizing 67 million weights, as a share of the bandwidth of a copy
    linear    a QLoRA layer of 4096 x 4096, forward and backward
    step      training steps of three shapes, with peak memory and the time that the host takes
    stops     kernels, and waits of the host, in one training step
    main      the main job as it is run from the command line
    paging    an optimizer state that does not fit, paged to the host and left to managed memory: the same bits, and the time it takes
    tests     each kernel against its array version, and the array tests on CuPy: pytest in processes of its own

A number is the median of several runs. "ms" of `codes` and `linear` is time on the device between two CUDA events, the queue being kept
full; "host" is what the host took to enqueue the same. A failure is written into the table, and the next section runs. The table is
rewritten after each row. Exit status: 0, or 1 if a check or a section failed or there was no time for it, or 2 if there is no GPU. A
target that is not met is said in the table and changes no exit status.

tests/test_gpu_script.py runs the sections on the CPU, in small.
"""

import argparse
import contextlib
import dataclasses
import datetime
import gc
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
for _folder in (ROOT, ROOT / "tests"):  # goldens and the stand-in are found as pytest finds them
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))

import numpy as np  # noqa: E402

from tinylora import AdamW, AdamW8bit, Llama, Pager, Tensor, add_lora, backend, ops, quantize  # noqa: E402
from tinylora.dtypes import from_bfloat16_bits, round_to  # noqa: E402
from tinylora.kernels import copies, cuda, products  # noqa: E402
from tinylora.kernels.reciprocal import rcp  # noqa: E402
from tinylora.lora import LoRALinear  # noqa: E402
from tinylora.models.llama import LlamaConfig  # noqa: E402
from tinylora.nn import Linear, Linear4bit, quantized_linear  # noqa: E402
from tinylora.optim import clip_grad_norm  # noqa: E402

f32 = np.float32
DTYPES = products.DTYPES
NOT_INSTALLED = "not installed"


# ----------------------------------------------------------------------------------------------------------------- the machine
@dataclass
class Timing:
    """Milliseconds on the device, and on the host until all was enqueued."""

    ms: float
    host_ms: float


class Machine:
    """What only CuPy on a GPU has: clocks, memory, names. The test puts another in its place."""

    def __init__(self, xp):
        self.xp, self.torch, self._block = xp, _torch_device(), None

    def synchronize(self):
        self.xp.cuda.Device().synchronize()

    def time(self, f, n=20, warm=3):
        """The Timing of f(): medians of n. Copies of 5 ms go before, so that the host is ahead of the device."""
        for _ in range(warm):
            f()
        x, y = (self.xp.empty(1 << 26, f32) for _ in range(2))
        events = [(self.xp.cuda.Event(), self.xp.cuda.Event()) for _ in range(n)]
        self.synchronize()
        for _ in range(40):
            self.copy(y, x)
        host = []
        for begin, end in events:
            start = time.perf_counter()
            begin.record()
            f()
            end.record()
            host.append(1e3 * (time.perf_counter() - start))
        self.synchronize()
        return Timing(median(self.xp.cuda.get_elapsed_time(*pair) for pair in events), median(host))

    def wall(self, f, n=5, warm=2):
        """The median milliseconds of f() until the device has done it."""
        found = []
        for i in range(warm + n):
            self.synchronize()
            start = time.perf_counter()
            f()
            self.synchronize()
            found += [1e3 * (time.perf_counter() - start)] * (i >= warm)
        return median(found)

    def copy(self, to, source):
        """to <- source, both on the device and in one piece."""
        to.data.copy_from_device_async(source.data, source.nbytes)

    def free(self):
        """Give unused memory back to the card, CuPy's and torch's."""
        gc.collect()
        self.xp.get_default_memory_pool().free_all_blocks()
        self.xp.get_default_pinned_memory_pool().free_all_blocks()
        if self.torch == "cuda":
            import torch

            torch.cuda.empty_cache()

    @contextlib.contextmanager
    def limit(self, more):
        """So many bytes more than now may be allocated on the device, managed memory apart."""
        self.free()
        pool = self.xp.get_default_memory_pool()
        pool.set_limit(size=pool.total_bytes() + more)
        try:
            yield
        finally:
            pool.set_limit(size=0)
            self.free()

    def held_bytes(self):
        """What CuPy has taken of the card's memory since `free`, at the most: blocks that are free again stay in its pool."""
        return self.xp.get_default_memory_pool().total_bytes()

    def about(self):
        runtime, xp = self.xp.cuda.runtime, self.xp
        free, total = xp.cuda.Device().mem_info
        name = runtime.getDeviceProperties(xp.cuda.Device().id)["name"]
        return {
            "card": name.decode() if isinstance(name, bytes) else name,
            "memory": f"{total / 2**30:.0f} GiB, of which {free / 2**30:.0f} were free",
            "driver": _driver() or str(runtime.driverGetVersion()),
            "CUDA runtime": str(runtime.runtimeGetVersion()),
            "CuPy": xp.__version__,
        }


def _torch_device():
    """The device of the other libraries: "cuda", or None where torch is missing or has no CUDA."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    return "cuda" if torch.cuda.is_available() else None


def _driver():
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0]


def commit():
    """The commit that is measured, and whether files differ from it; "unknown" where there is no repository."""
    found = []
    for what in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            asked = ["git", "-C", str(ROOT), *what]
            found.append(subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout.strip())
    return "unknown" if len(found) < 2 else found[0] + (", with changes" if found[1] else "")


def versions():
    """{library: version} of what the numbers depend on."""
    found = {"Python": platform.python_version()}
    for name in ("numpy", "torch", "bitsandbytes", "peft", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = NOT_INSTALLED
    return found


# ------------------------------------------------------------------------------------------------------------------- the table
@dataclass
class Section:
    """One table, sentences about it, and what was checked. `failed` says in a sentence why the section ended early."""

    name: str
    title: str
    about: str
    columns: list = field(default_factory=list)
    rows: list = field(default_factory=list)
    checks: list = field(default_factory=list)
    notes: list = field(default_factory=list)
    failed: str | None = None
    seconds: float = 0.0
    report: object = field(default=None, repr=False)

    def row(self, *values):
        """Add a row and write the table. Values: numbers, text, or None for what was not measured."""
        self.rows.append([v.item() if isinstance(v, np.generic) else v for v in values])
        assert len(values) == len(self.columns), (values, self.columns)
        say(f"  {self.name}: " + ", ".join(map(shown, self.rows[-1])))
        self.report.write()

    def check(self, what, held, found=""):
        """Enter a check: what has to hold, whether it did, and what was found."""
        self.checks.append({"what": what, "held": bool(held), "found": str(found)})
        say(f"  {self.name}: {'held' if held else 'FAILED'}: {what}{f' ({found})' if found else ''}")
        self.report.write()

    def as_dict(self):
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "report"}


class Report:
    """All sections of a run, written as JSON and as Markdown."""

    def __init__(self, folder, about):
        self.folder, self.about, self.sections, self.began = Path(folder), about, [], time.perf_counter()

    def write(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        seconds = round(time.perf_counter() - self.began, 1)
        data = {"about": self.about, "seconds": seconds, "sections": [s.as_dict() for s in self.sections]}
        self._put("gpu.json", json.dumps(data, indent=1, ensure_ascii=False) + "\n")
        self._put("gpu.md", self.markdown())

    def _put(self, name, text):
        """The old file or the new one, whenever the process ends."""
        new = self.folder / f".{name}.new"
        new.write_text(text, encoding="utf-8")
        os.replace(new, self.folder / name)

    def markdown(self):
        lines = ["# On a GPU", "", "Written by `python -m tests.gpu`, whose first lines say how to run it again.", ""]
        lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in self.about.items()), ""]
        for s in self.sections:
            lines += [f"## {s.title}", "", s.about, ""]
            if s.rows:
                lines += ["| " + " | ".join(s.columns) + " |", "|---" * len(s.columns) + "|"]
                lines += ["| " + " | ".join(map(shown, row)) + " |" for row in s.rows] + [""]
            lines += [f"- {'Held' if c['held'] else '**Failed**'}: {c['what']}{_found(c['found'])}" for c in s.checks]
            lines += [""] * bool(s.checks) + [line for note in s.notes for line in (note, "")]
            lines += [f"**failed: {s.failed}**", ""] if s.failed else []
            lines += [f"This took {s.seconds:.0f} s.", ""]
        return "\n".join(lines[:-1]) + "\n"

    @property
    def sound(self):
        """Whether every section ended and every check held."""
        return all(not s.failed and all(c["held"] for c in s.checks) for s in self.sections)


def _found(text):
    return f" ({text})" if text else ""


def shown(x):
    """A value of the table as text: three digits of a number."""
    if x is None:
        return "–"
    if isinstance(x, float):
        return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}" if math.isfinite(x) else str(x)
    return f"{x:,}" if isinstance(x, int) else str(x).replace("|", "/")


def say(line):
    print(line, file=sys.stderr, flush=True)


def sentence(error):
    """An error in one line."""
    first = str(error).strip().split("\n")[0] or "no more is known"
    return f"{type(error).__name__}: {first}"


def target(wanted, met):
    """The text of a column "target": met is True, False or None for what could not be compared."""
    return f"{wanted}: {'not compared' if met is None else 'met' if met else 'not met'}"


def ratio(a, b):
    """a / b, or None where one of them is no number."""
    return a / b if isinstance(a, (int, float)) and isinstance(b, (int, float)) and b else None


def at_least(x, bound):
    return None if x is None else x >= bound


def at_most(x, bound):
    return None if x is None else x <= bound


def both(*conditions):
    """False if one is False, else None if one is None, else True."""
    return False if False in conditions else None if None in conditions else True


def theirs(machine, f, *needs):
    """What f() gives with the other libraries; "not installed", or "failed: ..." where it raises."""
    if machine.torch is None or any(importlib.util.find_spec(name) is None for name in ("torch", *needs)):
        return NOT_INSTALLED
    try:
        return f()
    except Exception as error:
        traceback.print_exc()
        return f"failed: {sentence(error)}"
    finally:
        machine.free()


# ----------------------------------------------------------------------------------------------------------------------- tools
def host(x):
    """An array on the host, two-byte numbers but float16 as float32."""
    x = np.asarray(backend.move(x, "cpu"))
    return x.astype(f32) if x.dtype.itemsize == 2 and x.dtype.kind not in "iuf" else x


def same(a, b):
    """Equal values of one shape: NaN equals NaN, and zeros of either sign are equal."""
    a, b = host(a), host(b)
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def numbers(machine, shape, std=1.0):
    """Random float32 numbers on the device: a normal block drawn once on the host, repeated and scaled."""
    if machine._block is None:
        machine._block = machine.xp.asarray(np.random.default_rng(0).standard_normal((1 << 20) - 3, dtype=f32))
    block, n = machine._block, math.prod(shape)
    y = machine.xp.empty((-(-n // len(block)), len(block)), f32)
    y[...] = block
    y *= f32(std)
    return machine.xp.ascontiguousarray(y.reshape(-1)[:n].reshape(shape))


@contextlib.contextmanager
def launches():
    """A Counter of the kernels of cuda.cu that are started meanwhile."""
    found, launch = Counter(), cuda.launch

    def counting(xp, name, *arguments, **options):
        found[name] += 1
        return launch(xp, name, *arguments, **options)

    cuda.launch = counting
    try:
        yield found
    finally:
        cuda.launch = launch


def subprocess_output(command, seconds, **environment):
    """(exit status or None if the time was up, stdout and stderr together) of a command run from the root, with all that it starts."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment}
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT, "env": env}
    process = subprocess.Popen([sys.executable, *command], start_new_session=True, **how)
    try:
        text = process.communicate(timeout=max(seconds, 1))[0]
        return process.returncode, text
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[0]


# ----------------------------------------------------------------------------------------------------------------------- exact
RCP = r"""
#ifndef ON_HOST  // the CPU stand-in has its own
__device__ float rcp_approx(float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
#endif
extern "C" __global__ void reciprocals(const float* x, float* y, long long n) {
    long long i = blockIdx.x * 256LL + threadIdx.x;
    if (i < n) y[i] = rcp_approx(x[i]);
}
"""


def exact(machine, s, left, cases=None, mantissas=1 << 23, shape=(1024, 4096)):
    """The CUDA rule against stored results of a GPU, and against bitsandbytes here."""
    s.columns = ["what", "equal", "of", "of them by a kernel"]
    _stored_cases(machine, s, cases)
    x = (np.arange(mantissas, dtype=np.uint32) | np.uint32(0x3F800000)).view(f32)
    ours, given = machine.xp.empty(mantissas, f32), machine.xp.asarray(x)
    kernel = machine.xp.RawModule(code=RCP, options=("-std=c++17",)).get_function("reciprocals")
    kernel((-(-mantissas // 256),), (256,), (given, ours, np.int64(mantissas)))
    equal = int((host(ours).view(np.int32) == rcp(x).view(np.int32)).sum())
    s.row("rcp.approx of every mantissa", equal, mantissas, mantissas)
    s.check("rcp.approx on this card is kernels.reciprocal.rcp, in every bit", equal == mantissas)
    live = theirs(machine, lambda: _live(machine, s, shape), "bitsandbytes")
    if isinstance(live, str):
        s.notes.append(f"Fresh weights against bitsandbytes: {live}.")
        if live != NOT_INSTALLED:
            s.check("fresh weights could be compared with bitsandbytes", False, live)


def _stored_cases(machine, s, cases):
    from goldens import INDEX, INDEX_CUDA, QUANT_CUDA, arrays

    pairs = list(zip(INDEX["cases"], INDEX_CUDA["cases"], strict=True))[:cases]
    counts = {what: [0, 0, 0] for what in ("packed and absmax", *DTYPES, "double quantization")}
    wrong = []

    def enter(what, equal, name, by_kernel):
        found = counts[what]
        found[0], found[1], found[2] = found[0] + equal, found[1] + 1, found[2] + by_kernel
        if not equal:
            wrong.append(f"{name}: {what}")

    for given, case in pairs:
        w, theirs_ = arrays(given)["input_" + case["dtype"]].reshape(case["shape"]), arrays(case, QUANT_CUDA)
        w = machine.xp.asarray(from_bfloat16_bits(w) if case["dtype"] == "bfloat16" else w)
        how = {"rule": "bitsandbytes-cuda", "check_finite": False}
        with launches() as kernels:
            q = quantize(w, case["code"], case["blocksize"], **how)
        equal = same(q.packed, theirs_["packed"]) and same(q.absmax, theirs_["absmax"])
        enter("packed and absmax", equal, given["name"], kernels["quantize"])
        for dtype in DTYPES:
            with launches() as kernels:
                ours = q.dequantize(dtype)
            wanted = theirs_["deq_" + dtype]
            wanted = from_bfloat16_bits(wanted) if dtype == "bfloat16" else wanted
            enter(dtype, same(ours.reshape(-1), wanted), given["name"], kernels[f"dequantize_{dtype}"])
        if case["nested"]:
            nested = {**how, "double_quant": True, "offset": theirs_["offset"][0]}
            q = quantize(w, case["code"], case["blocksize"], **nested)
            equal = same(q.absmax_codes, theirs_["codes"]) and same(q.nested_absmax, theirs_["nested"])
            enter("double quantization", equal, given["name"], 0)
    for what, found in counts.items():
        s.row(f"dequantized {what}" if what in DTYPES else what, *found)
    s.check("the stored cases are equal: NaN to NaN, zeros of either sign", not wrong, "; ".join(wrong[:4]))


def _live(machine, s, shape):
    """Fresh weights: packed bytes, constants, and what bfloat16 comes back, against bitsandbytes' own."""
    import bitsandbytes.functional as bnb
    import torch

    values = np.random.default_rng().standard_normal(shape).astype(f32)
    values[::7] *= f32(1e-3)
    for code in ("nf4", "fp4"):
        w = torch.from_numpy(values).to(machine.torch)
        packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type=code, compress_statistics=True)
        state.dtype = torch.bfloat16
        back = bnb.dequantize_4bit(packed, state).view(torch.int16).cpu().numpy().view(np.uint16)
        offset = state.offset.cpu().numpy().reshape(-1)[0]
        rule = "bitsandbytes-cuda" if machine.torch == "cuda" else "bitsandbytes-cpu"
        given = machine.xp.asarray(values)
        with launches() as kernels:
            q = quantize(given, code, 64, double_quant=True, rule=rule, offset=offset)
            ours = q.dequantize("bfloat16")
        parts = ((q.packed, packed), (q.absmax_codes, state.absmax), (q.nested_absmax, state.state2.absmax))
        equal = [same(x, y.cpu().numpy().reshape(-1)) for x, y in parts]
        equal.append(same(ours.reshape(-1), from_bfloat16_bits(back.reshape(-1))))
        by_kernel = (kernels["quantize"] > 0) + (kernels["dequantize_bfloat16"] > 0)
        s.row(f"fresh {code}: packed, both constants, bfloat16", sum(equal), len(equal), by_kernel)
        s.check(f"fresh {code} weights are bitsandbytes' bits, quantized and dequantized", all(equal), equal)


# ----------------------------------------------------------------------------------------------------------------------- codes
def codes(machine, s, left, shape=(8192, 8192)):
    """Quantizing and dequantizing, against a copy and against bitsandbytes."""
    columns = (
        "ms | host ms | copy of as many bytes, ms | % of copy bandwidth | bitsandbytes, ms | times faster | target"
    )
    s.columns = [f"{math.prod(shape):,} weights", *columns.split(" | ")]
    w = numbers(machine, shape, 0.02)
    _dequantize(machine, s, quantize(w, double_quant=True))
    for nested in (False, True):
        other = theirs(machine, lambda nested=nested: _their_quantize(machine, shape, nested), "bitsandbytes")
        for checked in (True, False):
            how = {"double_quant": nested, "check_finite": checked}
            ours = machine.time(lambda how=how: quantize(w, **how), n=3 if nested else 10, warm=1)
            words = "double quantization" if nested else "float32 constants"
            words += ", NaN and Inf looked for" if checked else ", NaN and Inf not looked for"
            faster = ratio(other, ours.ms)
            wanted = None if nested else target("faster", at_least(faster, 1))
            s.row(f"quantize to NF4, {words}", ours.ms, ours.host_ms, None, None, other, faster, wanted)
    s.notes.append("The constants of double quantization are quantized on the host: a device has no kernel for them.")


def _dequantize(machine, s, q):
    n, constants = q.size, q.constants.codes.nbytes + q.constants.absmax.nbytes
    for dtype in DTYPES:
        ours = machine.time(lambda dtype=dtype: q.dequantize(dtype))
        moved = n // 2 + constants + n * (4 if dtype == "float32" else 2)
        source, to = (machine.xp.empty(moved // 2, np.uint8) for _ in range(2))
        copy = machine.time(lambda source=source, to=to: machine.copy(to, source)).ms
        del source, to
        other = theirs(machine, lambda dtype=dtype: _their_dequantize(machine, q.shape, dtype), "bitsandbytes")
        share, faster = 100 * copy / ours.ms, ratio(other, ours.ms)
        if dtype == "bfloat16":
            other_bf16, copy_bf16 = other, copy
        wanted = target("70 % and 2 times faster", both(at_least(share, 70), at_least(faster, 2)))
        row = f"dequantize NF4, double quantization, to {dtype}", ours.ms, ours.host_ms, copy, share, other, faster
        s.row(*row, wanted if dtype == "bfloat16" else None)
    expected = round_to(q.to(lambda a: backend.move(a, "cpu")).dequantize("float32"), "bfloat16")
    if beyond := ratio(other_bf16, copy_bf16):
        s.notes.append(
            f"A kernel to bfloat16 that took no longer than this copy would be {beyond:.2f} times faster than bitsandbytes'."
        )
    s.check("bfloat16 from the device is the host's, in every bit", same(q.dequantize("bfloat16"), expected))


def _their_quantize(machine, shape, nested):
    import bitsandbytes.functional as bnb
    import torch

    w = torch.randn(shape, device=machine.torch) * 0.02
    how = {"blocksize": 64, "quant_type": "nf4", "compress_statistics": nested}
    return machine.time(lambda: bnb.quantize_4bit(w, **how)).ms


def _their_dequantize(machine, shape, dtype):
    import bitsandbytes.functional as bnb
    import torch

    w = torch.randn(shape, device=machine.torch) * 0.02
    packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    state.dtype = getattr(torch, dtype)
    return machine.time(lambda: bnb.dequantize_4bit(packed, state)).ms


# ---------------------------------------------------------------------------------------------------------------------- linear
def linear(machine, s, left, size=4096, rows=2048, r=16):
    """One adapted layer: y, then the gradients of x, A and B."""
    columns = "ms | host ms | TFLOP/s | bitsandbytes + LoRA in torch, ms | times faster | target"
    s.columns = ["compute dtype", *columns.split(" | ")]
    flops, outputs = 4 * rows * size * size + 12 * rows * size * r, {}
    weight = numbers(machine, (size, size), 1 / math.sqrt(size))
    q, x = quantize(weight, double_quant=True), numbers(machine, (rows, size))
    del weight
    for dtype in DTYPES:
        layer = LoRALinear(Linear4bit(q, compute_dtype=dtype), r=r, alpha=2 * r)
        factors = [layer.lora_A.weight, layer.lora_B.weight]
        for factor, std in zip(factors, (1 / math.sqrt(size), 0.1), strict=True):
            factor.data = numbers(machine, factor.shape, std)
        for _, module in layer.named_modules():
            if hasattr(module, "compute_dtype"):
                module.compute_dtype = dtype

        def run(layer=layer, factors=factors):
            given = Tensor(x, requires_grad=True)
            for factor in factors:
                factor.grad = None
            y = layer(given)
            y.backward(x)
            return y, given.grad, *(factor.grad for factor in factors)

        outputs[dtype] = [host(a.data if isinstance(a, Tensor) else a) for a in run()]
        ours = machine.time(run)
        other = theirs(machine, lambda dtype=dtype: _their_linear(machine, size, rows, r, dtype), "bitsandbytes")
        faster = ratio(other, ours.ms)
        wanted = target("2 times faster", at_least(faster, 2)) if dtype == "bfloat16" else None
        s.row(dtype, ours.ms, ours.host_ms, flops / ours.ms / 1e9, other, faster, wanted)
    for dtype, bound in (("bfloat16", 2.0**-5), ("float16", 2.0**-8)):
        pairs = zip(outputs[dtype], outputs["float32"], strict=True)
        apart = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)
        s.check(
            f"output and gradients in {dtype} are float32's to {bound:.2g} of the largest",
            apart <= bound,
            f"{apart:.2g}",
        )
    s.notes.append(
        f"{flops / 1e9:,.0f} GFLOP: the products with the 4-bit weight and those of the factors, r = {r}. "
        "In torch the adapters are held and multiplied in the compute dtype."
    )


def _their_linear(machine, size, rows, r, dtype):
    import bitsandbytes
    import torch

    how = {"device": machine.torch, "dtype": getattr(torch, dtype)}
    base = bitsandbytes.nn.Linear4bit(size, size, bias=False, compute_dtype=how["dtype"], quant_type="nf4")
    base.weight.requires_grad = False
    base = base.to(machine.torch)
    a, b = torch.nn.Linear(size, r, bias=False, **how), torch.nn.Linear(r, size, bias=False, **how)
    x, g = torch.randn(rows, size, **how).requires_grad_(), torch.randn(rows, size, **how)

    def run():
        x.grad = a.weight.grad = b.weight.grad = None
        (base(x) + b(a(x)) * 2.0).backward(g)

    return machine.time(run).ms


# ------------------------------------------------------------------------------------------------------------------------ step
#: {name: (config of a Llama; None for the embedded model, sequences, tokens each, compute dtypes)}
SHAPES = {
    "embedded": (None, 8, 256, ("float32", "bfloat16")),
    "135M": (
        {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
        | {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
        *(8, 512, ("float32", "bfloat16")),
    ),
    "1.1B": (
        {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22}
        | {"num_attention_heads": 32, "num_key_value_heads": 4, "tie_word_embeddings": False},
        *(4, 1024, ("bfloat16",)),
    ),
}


def filled(machine, sizes, tokens):
    """A model of these sizes with random weights that are on the device from the start, its linear layers in NF4."""
    model = Llama(LlamaConfig(**sizes, max_position_embeddings=max(tokens, 64)), draw=False)
    for name in [name for name, _ in model.named_parameters()]:
        path, _, part = name.rpartition(".")
        layer = model.get(path)
        shape = getattr(layer, part).shape
        std = 1 / math.sqrt(shape[-1]) if isinstance(layer, Linear) else 0.02
        one = len(shape) == 1
        getattr(layer, part).data = machine.xp.ones(shape, f32) if one else numbers(machine, shape, std)
        if isinstance(layer, Linear):
            model.replace(path, quantized_linear(path, layer))
    return model.requires_grad_(False)


def adapted(machine, sizes, tokens, dtype, r=16):
    """The model of a shape with LoRA on its linear layers, on the device."""
    backend.seed(1)
    model = Llama.from_pretrained("base", quantize="nf4") if sizes is None else filled(machine, sizes, tokens)
    add_lora(model.to(machine.xp), r=r, alpha=2 * r, target_modules="all-linear")
    return model.compute_in(dtype)


class Training:
    """A model, its optimizer and one batch; called, it does a step and waits for the loss, as training.train does."""

    def __init__(self, machine, sizes, batch, tokens, dtype):
        self.machine, self.model, self.losses = machine, adapted(machine, sizes, tokens, dtype), []
        vocabulary = self.model.config.vocab_size
        self.ids = np.random.default_rng(2).integers(0, vocabulary, (batch, tokens + 1))
        self.optimizer = AdamW(self.model.trainable(), lr=2e-4, pager=Pager(device=machine.xp))

    def __call__(self, wait=True, ids=None):
        ids = self.ids if ids is None else ids
        targets = self.machine.xp.asarray(ids[:, 1:])
        loss = ops.softmax_cross_entropy(self.model(ids[:, :-1]), targets)
        loss.backward()
        if wait:
            clip_grad_norm([p for _, p in self.model.trainable()], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if wait:
            self.losses.append(loss.item())

    def enqueue_ms(self, ids):
        """Host time of a step that waits for nothing: the median of 3."""
        found = []
        for _ in range(3):
            self.machine.synchronize()
            start = time.perf_counter()
            self(wait=False, ids=ids)
            found.append(1e3 * (time.perf_counter() - start))
        self.machine.synchronize()
        return median(found)


def step(machine, s, left, shapes=SHAPES, n=5):
    """Training steps, against torch with PEFT and bitsandbytes."""
    columns = "ms | tokens/s | memory, GB | host ms | host ms, 1 × 16 | torch, PEFT, bitsandbytes: ms | memory, GB | times as long | target"
    s.columns = ["shape, compute dtype", *columns.split(" | ")]
    for name, (sizes, batch, tokens, dtypes) in shapes.items():
        first = {}
        for dtype in dtypes:
            row = f"{name}, {batch} × {tokens}, {dtype}"
            if left() < 30:
                s.row(row, "no time left", *[None] * (len(s.columns) - 2))
                s.check(f"{name}, {dtype}: there was time to measure it", False)
                continue
            machine.free()
            training = Training(machine, sizes, batch, tokens, dtype)
            machine.free()
            ms = machine.wall(training, n)
            held, loss, config = machine.held_bytes() / 1e9, training.losses, training.model.config
            host_ms, small = training.enqueue_ms(training.ids), training.enqueue_ms(training.ids[:1, :17])
            first[dtype] = loss[0]
            del training
            machine.free()
            other = theirs(machine, lambda a=(config, batch, tokens, dtype, n): _their_step(machine, *a),
                           "bitsandbytes", "peft", "transformers")  # fmt: skip
            their_ms, their_gb = other if isinstance(other, tuple) else (other, None)
            longer = ratio(ms, their_ms)
            aimed = name in ("135M", "1.1B") and dtype == "bfloat16"
            wanted = target("at most 1.2 times", at_most(longer, 1.2)) if aimed else None
            s.row(row, ms, batch * tokens / ms * 1e3, held, host_ms, small, their_ms, their_gb, longer, wanted)
            sound = all(map(math.isfinite, loss)) and loss[-1] < loss[0]
            s.check(
                f"{name}, {dtype}: the loss of one batch is finite and falls", sound, f"{loss[0]:.4f} to {loss[-1]:.4f}"
            )
        if len(first) == 2:
            a, b = first.values()
            s.check(f"{name}: the first losses agree to 2 %", abs(a - b) <= 0.02 * a, f"{a:.4f} and {b:.4f}")
    s.notes += [
        "Memory is what the allocator took from the card, free blocks included (CuPy's pool; torch's max_memory_reserved). "
        '"host ms" is the time until a step that waits for nothing is enqueued; where the queue is full, that contains '
        "waiting. The same for one sequence of 16 tokens is the time of Python and of the launches.",
        "In torch the model, the adapters and the optimizer are in the compute dtype (autocast_adapter_dtype=False), and "
        "attention is sdpa. Here adapters, norms and sums are in float32. Neither recomputes in the backward pass.",
    ]


def _their_step(machine, config, batch, tokens, dtype, n):
    """(ms, GB reserved) of the same step in torch."""
    import bitsandbytes
    import peft
    import torch
    import transformers

    kind, cuda_memory = getattr(torch, dtype), machine.torch == "cuda"
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
    sizes = {name: getattr(config, name) for name in (*names.split(), "tie_word_embeddings", "max_position_embeddings")}
    torch.set_default_dtype(kind)
    try:
        with torch.device(machine.torch):
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, use_cache=False))
        for path, layer in list(model.named_modules()):
            if isinstance(layer, torch.nn.Linear) and path != "lm_head":
                size = layer.in_features, layer.out_features
                how = {"bias": False, "compute_dtype": kind, "quant_type": "nf4", "device": "meta"}
                new = bitsandbytes.nn.Linear4bit(*size, **how)
                new.weight = bitsandbytes.nn.Params4bit(
                    layer.weight.data, requires_grad=False, quant_type="nf4", module=new
                )
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, new.to(machine.torch))
        model.requires_grad_(False)
        model.is_loaded_in_4bit = True  # which PEFT asks for
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, lora, autocast_adapter_dtype=False)
    finally:
        torch.set_default_dtype(torch.float32)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0)
    ids = torch.randint(0, sizes["vocab_size"], (batch, tokens), device=machine.torch)
    model.train()

    def run():
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    machine.free()
    if cuda_memory:
        torch.cuda.reset_peak_memory_stats()
    ms = machine.wall(run, n)
    return ms, torch.cuda.max_memory_reserved() / 1e9 if cuda_memory else None


# ----------------------------------------------------------------------------------------------------------------------- stops
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cuStreamSynchronize")


def stops(machine, s, left, shape=SHAPES["135M"]):
    """What a step starts on the device, and how often the host waits for it."""
    s.columns = ["step", "launches", "of them kernels of cuda.cu", "waits of the host", "copies to the host"]
    sizes, batch, tokens, _ = shape
    words = f"135M, {batch} × {tokens}, bfloat16, on the card"
    if machine.torch is None:
        s.row(words, "not counted (torch is not installed)", None, None, None)
    else:
        machine.free()
        training = Training(machine, sizes, batch, tokens, "bfloat16")
        training()
        training()
        idle = profiled(machine, lambda: None)
        with launches() as kernels:
            found = profiled(machine, training)
        found -= idle
        s.row(words, found["kernel"], sum(kernels.values()), found["waits"], found["to host"])
        s.notes.append(
            "Counted by torch.profiler (CUPTI), which sees the whole process; the profiler's own waits are subtracted. "
            "A copy to pageable memory on the host waits as well."
        )
        del training
        machine.free()
    _on_stand_in(s)


def profiled(machine, f):
    """A Counter of the kernels, waits and copies to the host while f runs, from torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (machine.torch == "cuda")
    machine.synchronize()
    with profile(activities=kinds) as seen:
        f()
        machine.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        return counted(json.loads(path.read_text(encoding="utf-8"))["traceEvents"])


def counted(events):
    """A Counter of what a trace in Chrome's format holds."""
    found = Counter()
    for event in events:
        kind, name = str(event.get("cat", "")).lower(), str(event.get("name", ""))
        found["kernel"] += kind == "kernel"
        found["waits"] += kind in ("cuda_runtime", "cuda_driver") and name.startswith(WAITS)
        found["to host"] += kind == "gpu_memcpy" and "DtoH" in name
    return found


def _on_stand_in(s):
    """The same counts of a small model on the CPU: array operations, kernels and waits, with kernels and without."""
    import cuda_on_host
    import fake_cupy

    had = hasattr(fake_cupy, "RawModule")
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    for kernels in (True, False) if cuda_on_host.available() else (False,):
        fake_cupy.compile_kernels(kernels)
        try:
            training = Training(Counting(fake_cupy), sizes, 2, 19, "bfloat16")
            training()
            before, fake = cuda_on_host.launches, fake_cupy.counters
            fake.update(dict.fromkeys(fake, 0))
            training()
            by_kernel = cuda_on_host.launches - before
            words = f"2 layers of 64, 2 × 19, bfloat16, on the stand-in {'with' if kernels else 'without'} kernels"
            s.row(words, fake["launches"] + by_kernel, by_kernel, fake["stops"], fake["to_host"])
            if kernels:
                s.check("a step waits twice: for the norm and for the loss", fake["stops"] == 2, fake["stops"])
        finally:
            fake_cupy.compile_kernels(had)


class Counting(Machine):
    """The stand-in's array module as a machine: only arrays are asked of it."""

    def __init__(self, xp):
        self.xp, self.torch, self._block = xp, None, None


# ------------------------------------------------------------------------------------------------------------------------ main
def main_job(machine, s, left, options=("--device", "cuda"), before=3.2085, after=2.1099):
    """The main job in a process of its own, as a user runs it."""
    columns = "seconds | of them training | tokens/s | bits per byte before | after | target"
    s.columns = ["command", *columns.split(" | ")]
    machine.free()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        start = time.perf_counter()
        status, text = subprocess_output(["-m", "tinylora.cli", "finetune", *options, "--out", str(out)], left())
        seconds = time.perf_counter() - start
        if status != 0:
            said = "it was not done in time" if status is None else f"exit status {status}"
            raise RuntimeError(f"finetune: {said}: {text.strip()[-300:]}")
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    wanted = target("at most 25 s", seconds <= 25)
    bits = f"{report['before']:.4f}", f"{report['after']:.4f}"
    s.row(
        f"tinylora finetune {' '.join(options)}", seconds, report["seconds"], report["tokens_per_second"], *bits, wanted
    )
    near = abs(report["before"] - before) < 0.0005 and abs(report["after"] - after) < 0.005
    s.check(
        f"held-out bits per byte go from {before:.4f} to {after:.4f}, within 0.0005 and 0.005", near, " to ".join(bits)
    )


# ---------------------------------------------------------------------------------------------------------------------- paging
def paging(machine, s, left, n=1 << 26, tensors=4, page_bytes=4 << 20, copied=1 << 28):
    """An optimizer state that does not fit under a limit, against the same steps with all of it on the device."""
    columns = "ms a step | GB moved a step | GB/s of copies | faults | prefetches | same bits"
    s.columns = [f"{n:,} parameters, 3 steps", *columns.split(" | ")]
    _copies(machine, s, copied)
    for kind, state, budget in ((AdamW, 8 * n, 2 * n), (AdamW8bit, 2 * n, n // 2)):
        name, times = kind.__name__, {}
        expected, ms, _ = _steps(machine, kind, n, tensors, {"page_bytes": page_bytes, "device": machine.xp})
        s.row(f"{name}, all on the device", ms, None, None, None, None, None)
        fits = _fits(machine, kind, n, tensors, budget + n)
        s.check(f"{name}: unpaged, {state:,} bytes of state do not fit the limit", not fits)
        for pool, prefetch in (("host", False), ("host", True), ("managed", None)):
            words = f"{name}, pool {pool!r}" + ("" if prefetch is None else f", prefetch {'on' if prefetch else 'off'}")
            how = {"budget": budget, "page_bytes": page_bytes, "pool": pool, "prefetch": prefetch, "device": machine.xp}
            try:
                found, ms, pager = _steps(machine, kind, n, tensors, how, budget + n)
            except Exception as error:
                traceback.print_exc()
                s.row(words, f"failed: {sentence(error)}", *[None] * 5)
                s.check(f"{words}: it runs", False, sentence(error))
                continue
            equal, c, times[pool, prefetch] = same(found, expected), pager.counters, ms
            moved = c.bytes_moved / 3 / 1e9
            s.row(words, ms, moved, moved / ms * 1e3, c.faults, c.prefetches, "yes" if equal else "no")
            s.check(f"{words}: the parameters of the unpaged run, in every bit", equal)
            del pager, found
        off, on = times.get(("host", False)), times.get(("host", True))
        if off and on:
            s.notes.append(f"{name}: bringing the next page beside the work on this one took {on:,.1f} ms a step instead of {off:,.1f}, "
                           f"{100 * (off - on) / off:.0f} % less.")  # fmt: skip
        del expected
    s.notes.append("Parameters and gradients stay on the device. CuPy's pool is limited to them, the budget of resident pages and "
                   f"{n / 2**20:g} MiB; managed memory lies outside of the pool, and its budget is kept by prefetching back. "
                   f"A page has {page_bytes / 2**20:g} MiB; moved is both directions together.")  # fmt: skip


def _copies(machine, s, nbytes):
    """What copies from and to page-locked memory reach when nothing else is done."""
    page = copies.pinned_zeros(machine.xp, (nbytes,), np.uint8)
    frame, stream = machine.xp.empty(nbytes, np.uint8), machine.xp.cuda.get_current_stream()
    for words, copy in (
        ("a copy from page-locked memory", lambda: copies.copy_to_device(page, frame, stream)),
        ("a copy to page-locked memory", lambda: copies.copy_to_host(frame, page, stream)),
    ):
        ms = machine.wall(copy, 5, 1)
        s.row(words, ms, nbytes / 1e9, nbytes / ms / 1e6, None, None, None)


def _parameters(machine, n, tensors):
    """Parameters and their gradients on the device."""
    shape = (n // tensors,)
    params = [Tensor(numbers(machine, shape, 1 + i), requires_grad=True) for i in range(tensors)]
    for i, p in enumerate(params):
        p.grad = numbers(machine, shape, 0.01 * (i + 1))
    machine.synchronize()
    return params


def _steps(machine, kind, n, tensors, how, room=None):
    """(the parameters on the host after 3 steps, median ms of a step, the pager). how: of the Pager. room: bytes to spare"""
    machine.free()
    params, times = _parameters(machine, n, tensors), []
    with machine.limit(room) if room else contextlib.nullcontext():
        pager = Pager(**how)
        optimizer = kind(params, lr=1e-2, weight_decay=0.01, pager=pager)
        for _ in range(3):
            machine.synchronize()
            start = time.perf_counter()
            optimizer.step()
            pager.pool.finish()
            machine.synchronize()
            times.append(1e3 * (time.perf_counter() - start))
        found = np.concatenate([host(p.data) for p in params])
        del optimizer
    return found, median(times), pager


def _fits(machine, kind, n, tensors, room):
    """Whether the unpaged optimizer runs in so many bytes beside parameters and gradients."""
    machine.free()
    params = _parameters(machine, n, tensors)
    with machine.limit(room):
        try:
            kind(params, pager=Pager(device=machine.xp)).step()
        except MemoryError:
            return False
        return True


# ----------------------------------------------------------------------------------------------------------------------- tests
def tests(machine, s, left, quick=False):
    """pytest on the GPU, in processes of their own."""
    s.columns = ["command", "passed", "failed", "seconds"]
    machine.free()
    runs = [["tests/test_cuda.py", "-k", "cupy"]]
    if not quick:
        runs.append(["tests", "-k", "cupy", "--ignore=tests/test_cuda.py", *_workers()])
    for arguments in runs:
        start = time.perf_counter()
        command = ["-m", "pytest", *arguments, "-p", "no:cacheprovider"]
        status, text = subprocess_output(command, min(left(), 120))
        seconds = time.perf_counter() - start
        passed, failed = outcome(text)
        words = f"pytest {' '.join(arguments)}"
        s.row(words, passed, failed, seconds)
        said = "it was not done in time" if status is None else f"exit status {status}"
        which = ", ".join(re.findall(r"^(?:FAILED|ERROR) (?:tests/)?(\S+)", text, re.M)[:6])
        s.check(
            f"{words}: all pass", status == 0 and passed, "" if status == 0 and passed else f"{said}{_found(which)}"
        )


def _workers():
    """As many processes as share a card well, where pytest-xdist is installed."""
    n = min(4, os.cpu_count() or 1)
    return ["-n", str(n)] if importlib.util.find_spec("xdist") and n > 1 else []


def outcome(text):
    """(passed, failed) of pytest's last line; None for what it does not say."""
    found = {word: int(number) for number, word in re.findall(r"\b(\d+) (passed|failed|error)", text[-2000:])}
    return (found.get("passed", 0), found.get("failed", 0) + found.get("error", 0)) if found else (None, None)


# ------------------------------------------------------------------------------------------------------------------- the whole
SECTIONS = {
    "exact": (
        exact,
        "The CUDA rule, in every bit",
        "Packed bytes, constants and dequantized values made on this card, against those that an H200 wrote (tests/goldens). "
        "What no kernel can do (FP4 under this rule, partial blocks) is done by array operations or on the host.",
    ),
    "codes": (
        codes,
        "Quantizing and dequantizing",
        "Time on the device. The copy moves, read and written together, as many bytes as dequantizing reads and writes.",
    ),
    "linear": (
        linear,
        "A QLoRA layer of 4096 × 4096",
        "2,048 rows, r = 16, NF4 with double quantization: forward, and the gradients of the input and of both factors.",
    ),
    "step": (
        step,
        "Training steps",
        "QLoRA, r = 16, on all linear layers, NF4 with double quantization, AdamW with its state on the device, gradients "
        "clipped, random weights and tokens (the embedded model has its own weights). Time until the device is done.",
    ),
    "stops": (
        stops,
        "Launches and waits in a step",
        "What is started on the device, and how often the host waits for it.",
    ),
    "main": (
        main_job,
        "The main job",
        "QLoRA of the embedded model of this commit on the embedded text, in a process of its own; Python's start is counted.",
    ),
    "paging": (paging, "Paging an optimizer", "The state of AdamW is 8 bytes a parameter; in 8 bits it is 2."),
    "tests": (tests, "The tests on CuPy", "Each kernel against its array version, and every array test on CuPy."),
}

#: --quick: {section: its arguments}
QUICK = {
    "codes": {"shape": (2048, 8192)},
    "step": {"shapes": {name: SHAPES[name] for name in ("embedded", "135M")}, "n": 3},
    "paging": {"n": 1 << 24},
    "tests": {"quick": True},
}


def run(machine, report, names, limit=350, arguments=None):
    """Run these sections one after the other, whatever happens to each."""
    began = time.perf_counter()

    def left():
        return limit - (time.perf_counter() - began)

    for name in (name for name in SECTIONS if name in names):
        function, title, about = SECTIONS[name]
        s = Section(name, title, about, report=report)
        report.sections.append(s)
        say(f"{name}: {title}")
        start = time.perf_counter()
        if left() < 10:
            s.failed = "not run: the time was up"
        else:
            try:
                function(machine, s, left, **(arguments or {}).get(name, {}))
            except Exception as error:
                traceback.print_exc()
                s.failed = sentence(error)
        s.seconds = round(time.perf_counter() - start, 1)
        say(f"  {name}: {f'failed: {s.failed}' if s.failed else 'done'}, {s.seconds:.0f} s; {left():.0f} s are left")
        report.write()
        with contextlib.suppress(Exception):
            machine.free()
    return 0 if report.sound else 1


def parser():
    head, _, rest = __doc__.partition("\n\n")
    made = argparse.ArgumentParser("python -m tests.gpu", description=head, epilog=rest,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    made.add_argument(
        "--out", default="figures", metavar="FOLDER", help="where gpu.json and gpu.md are written (figures)"
    )
    made.add_argument("--only", nargs="+", choices=SECTIONS, metavar="NAME", help="run these sections alone")
    made.add_argument(
        "--quick", action="store_true", help="smaller sizes, and not the largest shape: about two minutes"
    )
    made.add_argument("--limit", type=float, default=350, metavar="S", help="begin nothing after so many seconds (350)")
    return made


def main(arguments=None):
    options = parser().parse_args(arguments)
    try:
        xp = backend.cuda()
    except RuntimeError as error:
        say(f"{error}. Nothing was measured.")
        return 2
    machine = Machine(xp)
    about = machine.about() | versions()
    about["commit"] = commit()
    about["date"] = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    about["host"] = f"{os.cpu_count()} cores"
    for line in about.items():
        say("{}: {}".format(*line))
    report = Report(options.out, about)
    return run(machine, report, options.only or list(SECTIONS), options.limit, QUICK if options.quick else None)


if __name__ == "__main__":
    sys.exit(main())
