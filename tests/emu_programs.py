"""The emulator's own test programs: built once, run in several orders and under sanitizers."""

from __future__ import annotations

import os
import re
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


def assert_right(program: Path, case: str, order: str) -> None:
    done = run_emulated(program, case, order=order)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stdout + done.stderr


def assert_names_mistake(program: Path, case: str, sentence: str, order: str, starts: str) -> None:
    """A wrong kernel ends, never hangs, with one line that holds ``sentence`` and begins with ``starts``."""
    done = run_emulated(program, case, order=order, timeout=20)
    assert done.returncode == 1 and re.search(sentence, done.stdout), done.stdout
    assert re.match(starts, done.stdout)
    assert done.stdout.count("\n") == 1


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


def assert_silent_under_sanitizer(program: Path, cases: list[str]) -> None:
    for case in cases:
        for order in ("forward", "random:1"):
            done = run_sanitized(program, case, order=order)
            assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", ""), case
