"""The table of registers and spills, from what the tools print."""

from __future__ import annotations

import kernel_resources

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


def test_short_names():
    assert kernel_resources.short_name(ATTENTION) == "sm90::BlockSparseAttentionKernel<bfloat16_t, 128, 2, 128>"
    assert kernel_resources.short_name(MEAN) == "SegmentMeanKernel<float, 1>"
    assert kernel_resources.short_name("plain_name") == "plain_name"


def test_res_usage():
    attention, mean = kernel_resources.parse_res_usage(RES_USAGE)
    assert (attention.arch, attention.registers, attention.shared) == ("sm_90a", 168, 1024)
    assert not attention.leaves_registers
    assert (mean.arch, mean.registers, mean.stack) == ("sm_80", 46, 16) and mean.leaves_registers


def test_binary_command(tmp_path, capsys, monkeypatch):
    tool = tmp_path / "cuobjdump"
    tool.write_text(f"#!/bin/sh\ncat <<'EOF'\n{RES_USAGE}\nEOF\n")
    tool.chmod(0o755)
    page = tmp_path / "kernels.md"
    command = [str(tmp_path / "lib.so"), "--cuobjdump", str(tool)]
    assert kernel_resources.main([*command, "--markdown", str(page)]) == 1
    assert page.read_text().count("\n") == 2 + 2
    assert "2 kernels, 1 of them use local memory" in capsys.readouterr().out
    tool.write_text("#!/bin/sh\necho no such file >&2; exit 1\n")
    assert kernel_resources.main([str(tmp_path / "lib.so"), "--cuobjdump", str(tool)]) == 2
    monkeypatch.setattr(kernel_resources, "find_cuobjdump", lambda: None)
    assert kernel_resources.main([str(tmp_path / "lib.so")]) == kernel_resources.NO_TOOL
    assert "cuobjdump is not here" in capsys.readouterr().out
