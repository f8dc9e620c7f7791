"""The emulator's own test programs: built once, run in several orders and under sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from emu_toolchain import MissingTool, build_emulated, run_emulated

KERNELS = Path(__file__).resolve().parent / "emu" / "kernels"
ORDERS = ["forward", "reverse", "random:1", "random:2"]


def built(name: str, **options) -> Path:
    """A program of KERNELS; skips without the tools for it, or fails under VDIT_REQUIRE_EMU=1."""
    try:
        return build_emulated(KERNELS / name, **options)
    except MissingTool as reason:
        if os.environ.get("VDIT_REQUIRE_EMU") == "1":
            pytest.fail(str(reason))
        pytest.skip(str(reason))


def run_sanitized(program: Path, *arguments: str, order: str = "forward"):
    done = run_emulated(
        program, *arguments, order=order, TSAN_OPTIONS="exitcode=66", ASAN_OPTIONS="exitcode=66"
    )
    if "unexpected memory mapping" in done.stderr and shutil.which("setarch"):
        # gcc 12's ThreadSanitizer does not know newer kernels' address layout; without randomisation it fits.
        command = ["setarch", "-R", str(program), *arguments]
        env = {**os.environ, "VDIT_EMU_ORDER": order, "TSAN_OPTIONS": "exitcode=66"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer does not run under this kernel's address layout")
    return done
