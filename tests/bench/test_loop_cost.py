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


def test_a_products_loop_is_the_smallest_around_all_of_them():
    text = {
        0x10: "MOV R1, R2",
        0x20: "LOP3.LUT R3, R3, 0xf, RZ, 0xc0, !PT",
        0x30: "IGMMA.64x128x32.U8.S8 R24, R4, gdesc[UR28], R24, !UPT",
        0x40: "@P1 BRA 0x30",
        0x50: "IGMMA.64x128x32.U8.S8 R88, R8, gdesc[UR28], R88, gsb0",
        0x60: "@P0 PRMT R4, R5, 0x5410, R6",
        0x70: "@P0 BRA 0x20",
        0x80: "BRA 0x10",
    }
    (code,) = loop_cost.functions(sass(text)).values()
    loop = loop_cost.product_loop(code)
    assert [at for at, _ in loop] == [0x20, 0x30, 0x40, 0x50, 0x60, 0x70]
    # 64 cycles a product and consumer; two warps a scheduler; LOP3 and PRMT take the ALU for two cycles.
    assert loop_cost.product_cost(loop) == (256, 12, 8)
    assert loop_cost.product_loop(code[:1]) is None
