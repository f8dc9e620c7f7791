"""The kernels without torch: a C++ program built against what the wheel installs."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import vdit_ext

INSTALLED = vdit_ext.ops.library_dir().parent


def run(*command, **kwargs):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_program_without_torch_calls_a_kernel(tmp_path):
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("cmake and a C++ compiler are needed to build a program")
    if not (INSTALLED / "cmake" / "vditConfig.cmake").exists():
        pytest.skip("the package runs from a build folder, not from an installation")
    source = Path(__file__).parent
    run("cmake", "-S", source, "-B", tmp_path, "-G", "Ninja", f"-Dvdit_DIR={INSTALLED / 'cmake'}")
    run("cmake", "--build", tmp_path)
    assert run(tmp_path / "embed").strip() == "ok"
    # Nothing of torch is linked, neither here nor behind the kernel library.
    clean = {**os.environ, "LD_LIBRARY_PATH": ""}
    assert "torch" not in run("ldd", tmp_path / "embed", env=clean)


@pytest.mark.parametrize("header", ["attention.h", "epilogue.h", "linear.h", "types.h", "threads.h"])
def test_public_headers_stand_alone(header, tmp_path):
    include = INSTALLED / "include"
    if not include.is_dir():
        pytest.skip("the package runs from a build folder, not from an installation")
    if shutil.which("c++") is None:
        pytest.skip("a C++ compiler is needed")
    program = tmp_path / "only.cpp"
    program.write_text(f'#include "vdit/{header}"\n')
    run("c++", "-std=c++17", "-fsyntax-only", "-Wall", "-Werror", f"-I{include}", program)
