"""Builds the emulator from the source tree: the CUDA kernels compiled for the CPU."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


BUILD_SECONDS = 1800  # beyond that it hangs


class EmulatorUnavailable(Exception):
    """What is missing here to build the emulator, as a sentence."""


def skip_or_fail(reason: EmulatorUnavailable) -> None:
    """Skip the test; fail it under VDIT_REQUIRE_EMU=1, as .ci/run sets it: there nothing else runs CUDA code."""
    if os.environ.get("VDIT_REQUIRE_EMU") == "1":
        pytest.fail(f"emulator: {reason}")
    pytest.skip(f"emulator: {reason}")


def build_folder(sanitize: str) -> Path:
    """Where the build goes: VDIT_TEST_BUILD_DIR or build/emu, one folder a Python and a sanitizer."""
    base = Path(os.environ.get("VDIT_TEST_BUILD_DIR", ROOT / "build" / "emu"))
    key = hashlib.sha256(f"{sys.prefix}{sysconfig.get_platform()}".encode()).hexdigest()[:8]
    return base / f"{sanitize or 'plain'}-{key}"


def build_emulator(sanitize: str = "") -> Path:
    """Configure and build target vdit_emu, and return the library.

    ninja rebuilds only what changed, so a second session costs seconds. Raises EmulatorUnavailable when a
    tool or header is missing, and RuntimeError with the compiler's words when the build fails.
    """
    try:
        import pybind11
        from emu_toolchain import cuda_include_dirs
    except ImportError as error:
        raise EmulatorUnavailable(f'{error.name} is not installed; pip install ".[test]"') from error
    includes = cuda_include_dirs()
    if not includes:
        raise EmulatorUnavailable(
            "no CUDA headers were found; install nvidia-cuda-runtime and nvidia-cuda-cccl"
        )
    folder = build_folder(sanitize)
    configure = [
        "cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja",
        "-DVDIT_EMU=ON", "-DVDIT_CUDA=OFF", f"-DVDIT_SANITIZE={sanitize}",
        f"-DVDIT_EMU_CUDA_INCLUDE_DIRS={';'.join(map(str, includes))}",
        f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_PREFIX_PATH={pybind11.get_cmake_dir()}",
    ]  # fmt: skip
    for command in (configure, ["cmake", "--build", str(folder), "--target", "vdit_emu"]):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS)
        except FileNotFoundError as error:
            raise EmulatorUnavailable("cmake is not installed; pip install cmake ninja") from error
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return folder / "csrc" / "emu" / "libvdit_emu.so"
