"""Instructions of a stage in the main loops for compute capability 9.0, by pipe: block_sparse_attention, and
the products of the linear and the vq family.

    python bench/loop_cost.py LIBRARY_OR_OBJECT [--cuobjdump PATH]

Reads the machine code (cuobjdump -sass, which comes with the CUDA toolkit; no GPU is needed). Attention's loop
is the one around the second product's wgmma; what it jumps over in the usual case (the scores' sign, the last
stage's mask, raised maxima) is left out. The loop of an int8 product is the one around all of its wgmma. A
scheduler issues one instruction a cycle, for a quarter of the consumers' warps; integer ones take its ALU for
two cycles.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from kernel_resources import NO_TOOL, find_cuobjdump, short_name

LINE = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);")
BRANCH = re.compile(r"BRA (?:\S+, )?0x([0-9a-f]+)")
RARE = 30  # a branch over more instructions than this skips a rare case
SLOT = 16  # bytes an instruction


def functions(sass: str) -> dict[str, list[tuple[int, str]]]:
    """Address and text of the instructions, by function."""
    found = {}
    for part in sass.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        found[name.strip()] = [(int(m[1], 16), m[2]) for line in body.splitlines() if (m := LINE.search(line))]
    return found


def main_loop(code: list[tuple[int, str]]) -> list[tuple[int, str]] | None:
    """The instructions of the loop around the second product, whose operand is transposed."""
    products = [at for at, text in code if text.startswith("HGMMA") and "tnspB" in text]
    for at, text in code:
        branch = BRANCH.search(text)
        if products and branch and int(branch[1], 16) < products[0] < at:
            return [entry for entry in code if int(branch[1], 16) <= entry[0] <= at]
    return None


def usual(loop: list[tuple[int, str]]) -> list[str]:
    """Opcodes of the loop without what it usually jumps over."""
    skipped, last = set(), loop[-1][0]
    for at, text in loop:
        branch = BRANCH.search(text)
        if not branch or not text.startswith("@"):
            continue
        target = int(branch[1], 16)
        if at < target <= last and target - at > RARE * SLOT:
            skipped.update(range(at + SLOT, target, SLOT))
    kept = [re.sub(r"^@\S+ ", "", text) for at, text in loop if at not in skipped]
    return [text.split()[0].split(".")[0] for text in kept]


def overlapped(loop: list[tuple[int, str]]) -> tuple[int, int]:
    """Exponentials between the waits for the scores and for the outputs' product, and all of them: what is left
    behind the second wait does not overlap with that product."""
    waits = [at for at, text in loop if "DEPBAR" in text]
    exponentials = [at for at, text in loop if "MUFU.EX2" in text]
    return sum(waits[0] < at < waits[-1] for at in exponentials) if waits else 0, len(exponentials)


INTEGER = {"LOP3", "SHF", "PRMT", "IADD3", "ISETP", "SEL", "LEA", "VIADD", "IMNMX", "POPC"}  # on the ALU
PRODUCT = re.compile(r"IGMMA\.64x(\d+)x32")
WARPS = 2  # of the consumers, a scheduler
PRODUCT_FLOP = 8192  # of int8, a cycle and SM


def product_loop(code: list[tuple[int, str]]) -> list[tuple[int, str]] | None:
    """The instructions of the smallest loop around all int8 wgmma."""
    products = [at for at, text in code if PRODUCT.search(text)]
    if not products:
        return None
    loops = []
    for at, text in code:
        branch = BRANCH.search(text)
        if branch and int(branch[1], 16) <= products[0] and products[-1] < at:
            loops.append([entry for entry in code if int(branch[1], 16) <= entry[0] <= at])
    return min(loops, key=len, default=None)


def product_cost(loop: list[tuple[int, str]]) -> tuple[int, int, int]:
    """Of a scheduler and a stage: cycles of the tensor cores for both consumers, of issue, and of the ALU."""
    columns = [int(found[1]) for _, text in loop if (found := PRODUCT.search(text))]
    cycles = sum(2 * 64 * n * 32 for n in columns) * WARPS // PRODUCT_FLOP
    opcodes = [re.sub(r"^@\S+ ", "", text).split()[0].split(".")[0] for _, text in loop]
    return cycles, WARPS * len(opcodes), WARPS * 2 * sum(opcode in INTEGER for opcode in opcodes)


def show_attention(name: str, loop: list[tuple[int, str]]) -> None:
    counts = Counter(usual(loop))
    kinds = ", ".join(f"{kind} {n}" for kind, n in counts.most_common(8))
    before, exponentials = overlapped(loop)
    print(f"{short_name(name)}: {sum(counts.values())} instructions a warp and stage ({kinds})")
    print(f"  {before} of {exponentials} exponentials while the outputs' product runs")


def show_product(name: str, loop: list[tuple[int, str]]) -> None:
    cycles, issue, alu = product_cost(loop)
    print(f"{short_name(name)}: {len(loop)} instructions a warp and stage")
    print(f"  products {cycles} cycles, issue {issue} ({issue / cycles:.0%}), ALU {alu} ({alu / cycles:.0%})")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("code", type=Path, help="libvdit_kernels_cuda.so, or an object file")
    parser.add_argument("--cuobjdump", default=find_cuobjdump(), help="the tool, where it is not found")
    args = parser.parse_args()
    if args.cuobjdump is None:
        print("loop_cost: cuobjdump is not here; install the CUDA toolkit or give --cuobjdump", file=sys.stderr)
        return NO_TOOL
    done = subprocess.run([args.cuobjdump, "-sass", str(args.code)], capture_output=True, text=True)
    if done.returncode != 0:
        print(f"loop_cost: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return 1
    shown = 0
    for name, code in functions(done.stdout).items():
        attention = "BlockSparseAttentionKernel" in name
        loop = main_loop(code) if attention else product_loop(code)
        if loop is None:
            continue
        (show_attention if attention else show_product)(name, loop)
        shown += 1
    if shown == 0:
        print("loop_cost: no kernel of compute capability 9.0 was found there", file=sys.stderr)
    return int(shown == 0)


if __name__ == "__main__":
    sys.exit(main())
