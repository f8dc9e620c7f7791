"""The kernels for compute capability 9.0 in other orders of their threads.

Their warps wait for each other in many ways, and a missing synchronisation may show in one order only. Each order
takes a process: the emulator reads it once.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
FILES = (
    "test_block_sparse_attention.py",
    "test_kmeans_assign.py",
    "test_block_mass.py",
    "test_linear.py",
    "test_vq.py",
)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["reverse", "random:1"])
def test_kernels_of_compute_capability_90(emulator, order):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "emu_sm90"]
    done = subprocess.run(
        [*command, *(str(HERE / name) for name in FILES)],
        env={**os.environ, "VDIT_EMU_ORDER": order},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]
