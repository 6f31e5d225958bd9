"""CUDA C kernels on a CPU, their source unchanged, thread by thread: what a fused kernel computes, without a GPU.

    module = RawModule(code=SOURCE, options=("-std=c++17",))          as cupy.RawModule, for extern "C" __global__ functions
    kernel = module.get_function("name")
    kernel((grid,), (block,), (x, y, np.int32(3)), shared_mem=0)      NumPy arrays or the stand-in's; scalars are NumPy's

The blocks of a grid run one after the other, and the threads of a block take turns: each runs until it waits at a barrier or for its
warp. So the result is the same each time. With `backwards` set to True the last thread and the last block come first: a kernel that
lacks a barrier gives something else then. Shared memory starts as bytes of 255 (NaN), since on a GPU it starts as anything.

It is stricter than a GPU, and each of these is an error:

    * an argument that is not of the type its parameter has, or a Python number, which CuPy would pass in 64 bits
    * a shuffle whose mask names a lane that has exited or never comes, or that reads a lane outside its mask
    * threads that wait for one another for ever
    * an address that is not a multiple of what is read there

The source finds ON_HOST defined, and in place of its PTX to_bf16, from_bf16, to_f16, from_f16 and rcp_approx (see cuda_on_host.h).

Every operation is rounded by itself: a·b + c is never fused, which nvcc does unless told --fmad=false. What CUDA's expf, logf, tanhf,
… return may differ in the last bits from the C library's, and the bits of a NaN that an operation makes are the CPU's. An address
outside an array is not noticed, nor a loop that never ends. Grids and blocks have one dimension. It needs Linux and g++.
"""

import atexit
import ctypes
import hashlib
import operator
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from functools import cache
from pathlib import Path

import fake_cupy
import numpy as np

launches = 0  # kernel calls so far
backwards = False  # the last thread of the last block first

HEADER = Path(__file__).with_name("cuda_on_host.h")
MOST_THREADS, MOST_SHARED = 1024, 227 << 10
FLAGS = [
    *("-O2", "-shared", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-w", "-fmax-errors=5"),
    *("-fno-strict-aliasing", "-fwrapv"),  # kernels read bytes as other types, and integers wrap around
    *("-fno-exceptions", "-fno-asynchronous-unwind-tables", "-fcf-protection=none"),  # stacks are swapped by hand
    *("-fvisibility=hidden", "-fno-gnu-unique"),  # one module's names are not another's
    "-fsanitize=alignment",  # calls a function of the header, so the sanitizer's own library is left out:
]
LIBRARIES = ["-nodefaultlibs", "-lm", "-lc", "-lgcc"]

_lock = threading.Lock()  # a compiled module holds one running grid


@cache
def available():
    "Is there a compiler?"
    return sys.platform == "linux" and shutil.which("g++") is not None


class RawModule:
    """Compiled when its first function is asked for, and once for the same source. Options: -D…, -U… and -std=… count."""

    def __init__(self, *, code, options=(), **ignored):
        if not available():
            raise RuntimeError("CUDA sources run on the host on Linux with g++, and it was not found")
        if isinstance(options, str):
            raise TypeError("options is a tuple of strings")
        for option in options:
            if "fast_math" in option or ("ftz" in option and not option.endswith("=false")):
                raise ValueError(f"the host computes as IEEE 754 has it, without {option}")
        kept = [o.replace("--std", "-std") for o in options if o.startswith(("-D", "-U", "-std", "--std"))]
        self.code, self.options = code, tuple(kept)

    def get_function(self, name):
        library, kernels = _compiled(self.code, self.options)
        if name not in kernels:
            raise RuntimeError(f'the source has no extern "C" __global__ function named {name}')
        return Kernel(name, getattr(library, f"on_host_launch_{name}"), kernels[name])


class Kernel:
    """kernel((grid,), (block,), arguments, shared_mem=bytes)"""

    def __init__(self, name, launch, parameters):
        self.name, self._launch, self._parameters = name, launch, parameters
        self.max_dynamic_shared_size_bytes = 48 << 10  # as in CuPy: more must be asked for

    def __call__(self, grid, block, args, *, shared_mem=0, **ignored):
        global launches
        grid, block = self._extent("grid", grid, 2**31 - 1), self._extent("block", block, MOST_THREADS)
        if not 0 <= shared_mem <= min(self.max_dynamic_shared_size_bytes, MOST_SHARED):
            raise ValueError(f"{self.name} cannot have {shared_mem:,} bytes of dynamic shared memory")
        if len(args) != len(self._parameters):
            raise TypeError(f"{self.name} takes {len(self._parameters)} arguments, got {len(args)}")
        values = [self._value(parameter, x) for parameter, x in zip(self._parameters, args, strict=True)]
        addresses = (ctypes.c_void_p * max(len(values), 1))(*(v.ctypes.data for v in values))
        message = ctypes.create_string_buffer(400)
        launches += 1
        with _lock:
            failed = self._launch(
                *map(ctypes.c_uint, (grid, block, shared_mem)), int(backwards), addresses, message, len(message)
            )
        if failed:
            raise RuntimeError(f"{self.name}: {message.value.decode()}")

    def _extent(self, what, shape, most):
        if not isinstance(shape, tuple):
            raise TypeError(f"{self.name}: the {what} is a tuple, got {type(shape).__name__}")
        n, *rest = map(operator.index, shape)
        if any(d != 1 for d in rest):
            raise ValueError(f"{self.name}: the {what} has one dimension on the host, got {shape}")
        if not 1 <= n <= most:
            raise ValueError(f"{self.name}: the {what} has 1 to {most:,} members, got {n:,}")
        return n

    def _value(self, parameter, x):
        """The argument's bytes as a launch wants them, in an array: a pointer, or the number itself."""
        kind, name, pointer, accepted = parameter
        what = f"{self.name}: parameter {name} is {kind}"
        if isinstance(x, (np.ndarray, fake_cupy.ndarray)):
            a = x if isinstance(x, np.ndarray) else x._a
            if not pointer:
                raise TypeError(f"{what} and wants a NumPy scalar, got an array")
            wrong = a.dtype.itemsize != 2 if accepted == "uint16" else accepted and a.dtype != accepted
            if wrong:
                wanted = "2 bytes" if accepted == "uint16" else accepted
                raise TypeError(f"{what} and wants an array of {wanted}, got {a.dtype}")
            return np.array(a.ctypes.data, np.uintp)
        if not isinstance(x, np.generic):
            wanted = "an array" if pointer else f"numpy.{accepted}"
            raise TypeError(f"{what} and wants {wanted}, got {x!r} of type {type(x).__name__}")
        if pointer or x.dtype != accepted:
            raise TypeError(f"{what} and wants {'an array' if pointer else f'numpy.{accepted}'}, got numpy.{x.dtype}")
        return np.array(x)


# --------------------------------------------------------------------------------------------------- reading the source
def _parameter(kernel, text):
    """(type, name) of one parameter."""
    match = re.fullmatch(r"(.*[\s*])(\w+)", text.strip(), re.S)
    if not match or "&" in text:
        raise ValueError(f"{kernel}: the parameter {text.strip()!r} is neither a pointer nor a number")
    kind = re.sub(r"\b(__restrict__|__restrict|__grid_constant__)(?!\w)", "", match[1])
    return re.sub(r"\s*\*\s*", "*", " ".join(kind.split())), match[2]


def _kernels(text):
    """{name: [(type, name) of each parameter]} of the kernels in a source without comments and with its macros expanded."""
    bounds = r"(?:__launch_bounds__\s*\([^()]*(?:\([^()]*\)[^()]*)*\)\s*)?"
    linkage = "" if re.search(r'extern\s*"C"\s*\{', text) else r'extern\s*"C"\s*'
    found = re.findall(rf"{linkage}\b__global__\s+{bounds}void\s+{bounds}(\w+)\s*\(([^()]*)\)", text)
    return {
        name: [_parameter(name, p) for p in parameters.split(",") if p.strip() not in ("", "void")]
        for name, parameters in found
    }


def _launchers(kernels):
    """For each kernel a function that calls it with arguments found at addresses, one that runs a grid of those calls, and the
    dtypes that it takes."""
    for name, parameters in kernels.items():
        values = ", ".join(f"*({kind} *)args[{i}]" for i, (kind, _) in enumerate(parameters))
        dtypes = "".join(f"on_host::parameter<{kind}>::value, " for kind, _ in parameters)
        yield f"static void on_host_call_{name}(void **args) {{ {name}({values}); }}"
        yield (
            f'extern "C" __attribute__((visibility("default"))) int on_host_launch_{name}(unsigned grid, unsigned block,'
            " unsigned shared, int backwards, void **args, char *text, int length) {"
            f" return on_host::launch(on_host_call_{name}, grid, block, shared, backwards, args, text, length); }}"
        )
        export = 'extern "C" __attribute__((visibility("default"))) const char *const'
        yield f"{export} on_host_dtypes_{name}[] = {{{dtypes}nullptr}};"


def _dtypes(library, name, parameters):
    """(type, name, is a pointer, the dtype it takes; None for any) of each parameter."""
    found = (ctypes.c_char_p * len(parameters)).in_dll(library, f"on_host_dtypes_{name}")
    for (kind, parameter), dtype in zip(parameters, found, strict=True):
        dtype = dtype.decode()
        if not dtype:
            raise ValueError(f"{name}: parameter {parameter} is {kind}, which is neither a pointer nor a number")
        yield kind, parameter, dtype[0] == "*", dtype.lstrip("*") or None


# --------------------------------------------------------------------------------------------------- compiling it
@cache
def _folder():
    path = tempfile.mkdtemp(prefix="cuda_on_host_")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return Path(path)


@cache
def _rcp_table():
    from tinylora.kernels import reciprocal

    with np.load(Path(reciprocal.__file__).with_name("rcp_approx.npz")) as stored:
        return np.ascontiguousarray(stored["delta"]).reshape(2, -1)


def _gxx(*arguments):
    done = subprocess.run(["g++", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"g++ does not take the source:\n{done.stderr}")
    return done.stdout


@cache
def _compiled(code, options):
    """(library, {name: parameters}) of a source."""
    standard = () if any(o.startswith("-std") for o in options) else ("-std=c++17",)
    stem = _folder() / hashlib.sha256(repr((code, options)).encode()).hexdigest()[:24]
    source, library = stem.with_suffix(".cpp"), stem.with_suffix(".so")
    for header in re.findall(r"^[ \t]*#[ \t]*include\b\s*(.*?)\s*$", code, re.M):
        if header not in ("<cmath>", "<cstdint>", "<math.h>", "<stdint.h>"):
            raise ValueError(f"the source includes {header}, which the host lacks")
    code = re.sub(r"^[ \t]*#[ \t]*include\b.*$", "", code, flags=re.M)  # cuda_on_host.h has what those have
    source.write_text(code)
    kernels = _kernels(_gxx("-E", "-P", "-DON_HOST", *standard, *options, source))
    dynamic = re.compile(
        r"\bextern\s+__shared__\s+((?:__align__|alignas)\s*\(\s*\d+\s*\)\s*)?([\w\s]+?)\s*(\w+)\s*\[\s*\]"
    )
    body = dynamic.sub(
        lambda m: f"{m[2]} *const {m[3]} = ({m[2]} *)on_host::dynamic_shared" + "\n" * m[0].count("\n"), code
    )
    # In a nameless namespace a static variable belongs to this module alone, even in a template or an inline function.
    lines = [f'#include "{HEADER}"', "namespace {", '#line 1 "source.cu"', body, "}", *_launchers(kernels)]
    source.write_text("\n".join(lines) + "\n")
    _gxx(*FLAGS, *standard, *options, source, "-o", library, *LIBRARIES)
    loaded = ctypes.CDLL(str(library))
    ctypes.c_void_p.in_dll(loaded, "on_host_rcp_table").value = _rcp_table().ctypes.data
    return loaded, {name: list(_dtypes(loaded, name, parameters)) for name, parameters in kernels.items()}
