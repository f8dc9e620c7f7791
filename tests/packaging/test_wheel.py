"""A wheel built once installs and runs where there is no compiler."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

RUNS_AN_OP = """
import torch, vdit_ext, vdit_ext._C as c
x = torch.randn(1, 2, 300, 64)
labels = torch.ops.vdit.kmeans_assign(x, x[:, :, :7].contiguous())
assert labels.shape == (1, 2, 300)
print(vdit_ext.__file__, vdit_ext.ops.LIBRARIES["cpu"], c.build_info()["cuda_archs"])
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel without CUDA: with it the same files are built by the installation that these tests run on."""
    pytest.importorskip("scikit_build_core", reason='scikit-build-core is not installed; pip install ".[test]"')
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(ROOT),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "VDIT_CUDA": "OFF"})
    assert done.returncode == 0, done.stderr[-4000:]
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_libraries_headers_and_weights(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for expected in (
        "vdit_ext/lib/libvdit_cpu.so",
        "vdit_ext/lib/libvdit_kernels_cpu.so",
        "vdit_ext/include/vdit/attention.h",
        "vdit_ext/cmake/vditConfig.cmake",
    ):
        assert expected in names
    assert any(n.startswith("vdit_ext/weights/") and n.endswith(".safetensors") for n in names)
    assert not [n for n in names if "__pycache__" in n or n.startswith("tests") or "/emu/" in n]


def test_wheel_runs_without_a_compiler(wheel, tmp_path):
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    no_tools = {**os.environ, "PYTHONPATH": str(target), "PATH": str(tmp_path / "nothing")}
    done = subprocess.run(
        [sys.executable, "-c", RUNS_AN_OP], capture_output=True, text=True, env=no_tools, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert str(target) in done.stdout and "loaded []" in done.stdout
