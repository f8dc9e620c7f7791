"""bench/loop_cost.py finds the loop and leaves out what it jumps over."""

from __future__ import annotations

import loop_cost


def sass(lines: dict[int, str]) -> str:
    code = "\n".join(f"        /*{at:04x}*/                   {text} ;" for at, text in lines.items())
    return f"Function : _ZN26BlockSparseAttentionKernelILi64E\n{code}\n"


LOOP = {
    0x100: "HGMMA.64x112x16.F32.BF16 R24, gdesc[UR28], RZ, !UPT",
    0x110: "HGMMA.64x64x16.F32.BF16 R80, R112, gdesc[UR12].tnspB, R80",
    0x120: "@P1 BRA 0x400",  # over a rare case
    **{at: "FMUL R1, R1, R2" for at in range(0x130, 0x400, 0x10)},
    0x400: "MUFU.EX2 R3, R3",
    0x410: "@!P0 BRA 0x430",  # over one instruction, which counts
    0x420: "FADD R4, R4, R3",
    0x430: "@!P1 BRA 0x100",
    0x440: "EXIT",
}


def test_the_loop_is_around_the_second_product_without_the_rare_case():
    (code,) = loop_cost.functions(sass({0x10: "MOV R1, R2", **LOOP})).values()
    loop = loop_cost.main_loop(code)
    assert (loop[0][0], loop[-1][0]) == (0x100, 0x430)
    assert loop_cost.usual(loop) == ["HGMMA", "HGMMA", "BRA", "MUFU", "BRA", "FADD", "BRA"]


def test_exponentials_behind_the_wait_for_the_outputs_do_not_overlap():
    loop = [
        (0x00, "WARPGROUP.DEPBAR.LE gsb0, 0x1"),
        (0x10, "MUFU.EX2 R1, R1"),
        (0x20, "WARPGROUP.DEPBAR.LE gsb0, 0x0"),
        (0x30, "MUFU.EX2 R2, R2"),
        (0x40, "MUFU.EX2 R3, R3"),
    ]
    assert loop_cost.overlapped(loop) == (1, 3)
    assert loop_cost.overlapped(loop[1:2]) == (0, 1)


def test_a_kernel_without_wgmma_has_no_such_loop():
    assert loop_cost.main_loop([(0x10, "FADD R1, R1, R2"), (0x20, "@P0 BRA 0x10")]) is None
