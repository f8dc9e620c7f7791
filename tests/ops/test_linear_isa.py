"""Every instruction set gives the bits that the best one here gives, which the other tests hold to numpy's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER))

from linear_digest import digest  # noqa: E402

LEVELS = ("portable", "avx2", "avx512", "avx512_vnni")


@pytest.fixture(scope="module")
def here() -> str:
    return digest()


@pytest.mark.parametrize("level", LEVELS)
def test_exact_results_are_those_of_every_instruction_set(level, here):
    done = subprocess.run(
        [sys.executable, FOLDER / "linear_digest.py"],
        capture_output=True,
        text=True,
        env=os.environ | {"VDIT_CPU_ISA": level, "OMP_NUM_THREADS": "1"},
    )
    if "is not supported by this CPU" in done.stderr:
        pytest.skip(f"this CPU has no {level}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == here
