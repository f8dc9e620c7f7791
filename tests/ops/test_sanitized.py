"""The CUDA kernels under AddressSanitizer: no access outside shared or global memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from build_emu import EmulatorUnavailable, build_emulator, skip_or_fail


@pytest.mark.slow
def test_emulated_kernels_are_clean_under_address_sanitizer():
    try:
        library = build_emulator(sanitize="address")
    except EmulatorUnavailable as reason:
        skip_or_fail(reason)
    runtime = subprocess.run(
        ["c++", "-print-file-name=libasan.so"], capture_output=True, text=True
    ).stdout.strip()
    if not Path(runtime).is_file():
        pytest.skip("AddressSanitizer: this compiler comes without libasan")
    env = {
        **os.environ,
        "LD_PRELOAD": runtime,
        # Python and torch keep what they allocated at exit; fibers switch stacks on purpose.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:use_sigaltstack=0",
    }
    script = Path(__file__).with_name("sanitized_ops.py")
    done = subprocess.run(
        [sys.executable, str(script), str(library)], capture_output=True, text=True, env=env, timeout=1800
    )
    assert done.returncode == 0 and "all ran" in done.stdout, f"{done.stdout[-1000:]}\n{done.stderr[-5000:]}"
