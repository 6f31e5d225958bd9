"""Freed memory of the host: what malloc keeps for the next step."""

import platform
import subprocess
import sys

import pytest

STEPS = """
import resource, sys
import numpy as np
import tinylora as tl
from tinylora.kernels import products

if sys.argv[1] == "returned":
    products.keep_small_blocks = lambda: None
rng = np.random.default_rng()
x, w, g = (rng.standard_normal(shape, dtype=np.float32) for shape in ((512, 1024), (1024, 1024), (512, 1024)))
w = tl.Tensor(w, requires_grad=True)

def step():
    w.grad = None
    tl.ops.linear(tl.Tensor(x, requires_grad=True), w).backward(g)

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(3):
    step()
before = faults()
for _ in range(10):
    step()
print((faults() - before) // 10)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the rule is glibc's malloc's")
def test_a_step_of_a_users_own_loop_finds_its_memory_again():
    """Ten steps, after three, of a layer with temporaries of 2 and 4 MB; each page of 4 kB that is new to the process is a fault."""
    kept, returned = (
        int(subprocess.run([sys.executable, "-c", STEPS, how], capture_output=True, text=True, check=True).stdout)
        for how in ("kept", "returned")
    )
    assert kept < 100 and returned > 500
