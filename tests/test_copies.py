"""Freed memory of the host: what malloc keeps for the next step."""

import os
import platform
import subprocess
import sys

import pytest

STEPS = """
import resource, sys
import numpy as np
from tinylora.kernels import products

if sys.argv[1] == "returned":
    products.raise_trim_threshold = lambda: None
x, w = np.random.default_rng().standard_normal((2, 512, 512), dtype=np.float32)

def step():
    kept = [products.multiplied(x, w) for _ in range(16)]  # 1 MB each; all are freed at the end, as a tape is

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(3):
    step()
before = faults()
for _ in range(10):
    step()
print((faults() - before) // 10)
"""
OF_MALLOC = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")  # what changes malloc, or takes another


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or sys.maxsize < 1 << 32, reason="the rule is that of glibc's malloc on 64 bits"
)
def test_a_step_of_a_loop_of_ones_own_finds_its_memory_again():
    """16 MB of temporaries, of 1 MB each: without the call glibc gives them back after each step, and each page is a fault again."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(OF_MALLOC)}
    environment["NUMPY_MADVISE_HUGEPAGE"] = "0"
    kept, returned = (
        int(
            subprocess.run(
                [sys.executable, "-c", STEPS, how], stdout=subprocess.PIPE, check=True, env=environment
            ).stdout
        )
        for how in ("kept", "returned")
    )
    if returned < 100:
        pytest.skip("this system keeps the memory anyway, or gives it in huge pages")
    assert kept < returned / 20
