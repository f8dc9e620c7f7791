"""The build tells each kernel's registers, and refuses spills and serialised wgmma."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "csrc" / "ptxas_report.py"

SAID = """\
ptxas info    : 11 bytes gmem
ptxas info    : Compiling entry function '_ZN4vdit6detail12kernel_entryINS_14ToppRowsKernelEEEvNT_6ParamsE' for 'sm_80'
ptxas info    : Function properties for _ZN4vdit6detail12kernel_entryINS_14ToppRowsKernelEEEvNT_6ParamsE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 50 registers, used 1 barriers, 1024 bytes smem
ptxas info    : Compile time = 22.150 ms
"""
SERIALISED = (
    "ptxas info    : (C7512) Potential Performance Loss: wgmma.mma_async instructions are serialized due to "
    "insufficient register resources for the function 'k'\n"
)


SPILLED = "ptxas warning : Registers are spilled to local memory in function 'k', 160 bytes spill stores\n"


def report(tmp_path, said: str, status: int = 0, *options: str):
    compiler = tmp_path / "compiler.py"
    compiler.write_text(f"import sys\nsys.stderr.write({said!r})\nsys.exit({status})\n")
    command = [sys.executable, str(SCRIPT), *options, sys.executable, str(compiler), "-c", "kernel.cu"]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_kernel_is_one_line(tmp_path):
    done = report(tmp_path, SAID)
    assert done.returncode == 0, done.stdout
    (line,) = done.stdout.splitlines()
    assert line.startswith("sm_80    50 registers,  1 barriers, 1024 bytes of static shared memory: ")
    assert "ToppRowsKernel" in line


def test_warnings_are_passed_on(tmp_path):
    warning = "kernel.cu(7): warning #177-D: variable declared but never referenced"
    done = report(tmp_path, f"{warning}\n\n{SAID}")
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == warning


@pytest.mark.parametrize("status", [1, 255])
def test_a_failed_compilation_fails(tmp_path, status):
    error = "ptxas error   : Registers are spilled to local memory in function 'k', 160 bytes spill stores"
    done = report(tmp_path, f"{error}\n", status)
    assert done.returncode == status and error in done.stdout


@pytest.mark.parametrize("slow", [SERIALISED, SPILLED], ids=["serialised", "spilled"])
def test_slow_kernels_get_a_warning_and_are_refused_on_request(tmp_path, slow):
    warned = report(tmp_path, SAID + slow)
    assert warned.returncode == 0 and slow in warned.stdout and "\nwarning: a kernel lost" in warned.stdout
    refused = report(tmp_path, SAID + slow, 0, "--refuse")
    assert refused.returncode == 1 and slow in refused.stdout and "\nerror: a kernel lost" in refused.stdout
    fine = report(tmp_path, SAID, 0, "--refuse")
    assert fine.returncode == 0 and "lost" not in fine.stdout
