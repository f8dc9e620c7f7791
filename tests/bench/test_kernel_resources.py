"""The table of registers and spills, from what the tools print."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
if str(BENCH) not in sys.path:
    sys.path.insert(0, str(BENCH))

import kernel_resources  # noqa: E402

ATTENTION = "_ZN4vdit6detail12kernel_entryINS_4sm9026BlockSparseAttentionKernelIN7cutlass10bfloat16_tELi128ELi2ELi128EEEEEvNT_6ParamsE"
MEAN = "_ZN4vdit6detail12kernel_entryINS_17SegmentMeanKernelIfLi1EEEEEvNT_6ParamsE"
RES_USAGE = f"""
Fatbin elf code:
================
arch = sm_90a
code version = [1,8]
host = linux
compile_size = 64bit

Resource usage:
 Common:
  GLOBAL:11 CONSTANT[4]:88
 Function {ATTENTION}:
  REG:168 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:3200 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_80
 Function {MEAN}:
  REG:46 STACK:16 SHARED:0 LOCAL:0 CONSTANT[0]:480 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
PTXAS = f"""
[3/9] Building CUDA object csrc/thing.cu.o
ptxas info    : 11 bytes gmem
ptxas info    : Compiling entry function '{ATTENTION}' for 'sm_90a'
ptxas info    : Function properties for {ATTENTION}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers
ptxas info    : Compiling entry function '{MEAN}' for 'sm_80'
ptxas info    : Function properties for {MEAN}
    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 2048 bytes smem, 480 bytes cmem[0]
"""


def test_short_names():
    assert kernel_resources.short_name(ATTENTION) == "sm90::BlockSparseAttentionKernel<bfloat16_t, 128, 2, 128>"
    assert kernel_resources.short_name(MEAN) == "SegmentMeanKernel<float, 1>"
    assert kernel_resources.short_name("plain_name") == "plain_name"


def test_res_usage():
    attention, mean = kernel_resources.parse_res_usage(RES_USAGE)
    assert (attention.arch, attention.registers, attention.shared) == ("sm_90a", 168, 1024)
    assert not attention.leaves_registers and attention.spill_stores is None
    assert (mean.arch, mean.registers, mean.stack) == ("sm_80", 46, 16) and mean.leaves_registers


def test_ptxas_log():
    attention, mean = kernel_resources.parse_ptxas(PTXAS)
    assert (attention.registers, attention.spill_stores, attention.shared) == (168, 0, 0)
    assert not attention.leaves_registers
    assert (mean.registers, mean.spill_stores, mean.spill_loads, mean.shared) == (255, 12, 16, 2048)
    assert mean.leaves_registers


@pytest.mark.parametrize(
    ("text", "code"), [(PTXAS, 1), (PTXAS.split("ptxas info    : Compiling entry function '" + MEAN)[0], 0)]
)
def test_log_command(tmp_path, capsys, text, code):
    (tmp_path / "build.log").write_text(text)
    page = tmp_path / "kernels.md"
    assert kernel_resources.main(["--log", str(tmp_path / "build.log"), "--markdown", str(page)]) == code
    shown = capsys.readouterr().out
    assert (
        "sm90::BlockSparseAttentionKernel<bfloat16_t, 128, 2, 128>" in shown
        and f"{code} of them spill" in shown
    )
    assert page.read_text().count("\n") == 2 + text.count("Compiling entry")


def test_binary_command(tmp_path, capsys, monkeypatch):
    tool = tmp_path / "cuobjdump"
    tool.write_text(f"#!/bin/sh\ncat <<'EOF'\n{RES_USAGE}\nEOF\n")
    tool.chmod(0o755)
    assert kernel_resources.main([str(tmp_path / "lib.so"), "--cuobjdump", str(tool)]) == 1
    assert "2 kernels, 1 of them spill or use local memory" in capsys.readouterr().out
    tool.write_text("#!/bin/sh\necho no such file >&2; exit 1\n")
    assert kernel_resources.main([str(tmp_path / "lib.so"), "--cuobjdump", str(tool)]) == 2
    monkeypatch.setattr(kernel_resources, "find_cuobjdump", lambda: None)
    assert kernel_resources.main([str(tmp_path / "lib.so")]) == kernel_resources.NO_TOOL
    assert "cuobjdump is not here" in capsys.readouterr().out
