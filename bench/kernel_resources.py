#!/usr/bin/env python
"""What every CUDA kernel of a build takes: registers, stack, local and static shared memory.

    python bench/kernel_resources.py                      # the installed library, or VDIT_LIBRARY_DIR's
    python bench/kernel_resources.py kernel.o lib.so --markdown kernels.md

Reads binaries with ``cuobjdump -res-usage``, which needs no GPU. Ends with 1 when a kernel keeps registers in
local memory (spills are seen as its stack), with 77 when there is no cuobjdump. Shared memory that a launch
asks for on top is in no binary.
"""

from __future__ import annotations

import argparse
import ctypes
import ctypes.util
import importlib.util
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NO_TOOL = 77


@dataclass
class Kernel:
    """One kernel for one architecture; sizes in bytes, a thread's but for ``shared``."""

    name: str
    arch: str
    registers: int
    stack: int
    local: int
    shared: int

    @property
    def leaves_registers(self) -> bool:
        """Whether it keeps anything of a thread in memory."""
        return self.stack > 0 or self.local > 0


# ---------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------


def parse_res_usage(text: str) -> list[Kernel]:
    """Kernels in what ``cuobjdump -res-usage`` prints."""
    kernels, arch, name = [], "", ""
    for line in text.splitlines():
        if found := re.match(r"\s*arch = (\S+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function (\S+):\s*$", line):
            name = found[1]
        elif name and (sizes := dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line))):
            numbers = (int(sizes.get(key, 0)) for key in ("REG", "STACK", "LOCAL", "SHARED"))
            kernels.append(Kernel(short_name(name), arch, *numbers))
            name = ""
    return kernels


def short_name(mangled: str) -> str:
    """The kernel functor of an entry point, without the namespaces that all share."""
    name = demangle(mangled)
    if found := re.search(r"kernel_entry<(.*)>\(", name):
        name = found[1].strip()
    return re.sub(r"\b(vdit|cutlass)::", "", name)


def demangle(name: str) -> str:
    """A C++ name as it is written; the name itself where the C++ runtime is not found."""
    runtime = _runtime()
    if runtime is None:
        return name
    status = ctypes.c_int()
    pointer = runtime.__cxa_demangle(name.encode(), None, None, ctypes.byref(status))
    if status.value != 0 or not pointer:
        return name
    text = ctypes.string_at(pointer).decode()
    ctypes.CDLL(None).free(ctypes.c_void_p(pointer))
    return text


@lru_cache(maxsize=1)
def _runtime():
    try:
        runtime = ctypes.CDLL(ctypes.util.find_library("stdc++") or "libstdc++.so.6")
        runtime.__cxa_demangle.restype = ctypes.c_void_p
    except (OSError, AttributeError):
        return None
    return runtime


def find_cuobjdump() -> str | None:
    """On the path, beside nvcc, in the usual folder, or in Triton's package."""
    places = [shutil.which("cuobjdump"), "/usr/local/cuda/bin/cuobjdump"]
    if nvcc := shutil.which("nvcc"):
        places.append(str(Path(nvcc).resolve().with_name("cuobjdump")))
    if (triton := importlib.util.find_spec("triton")) is not None and triton.origin:
        places.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"))
    return next((place for place in places if place and Path(place).is_file()), None)


def default_library() -> Path:
    """Where the kernels of the build in use are."""
    if importlib.util.find_spec("vdit_ext") is None:
        sys.path.insert(0, str(ROOT / "python"))
    from vdit_ext.ops import library_dir

    return library_dir() / "libvdit_kernels_cuda.so"


# ---------------------------------------------------------------------------------------------------------
# Showing
# ---------------------------------------------------------------------------------------------------------

HEAD = ["kernel", "arch", "registers", "stack", "local", "static shared"]


def rows(kernels: list[Kernel]) -> list[list[str]]:
    """Cells below :data:`HEAD`."""
    return [
        [k.name, k.arch, *map(str, (k.registers, k.stack, k.local, k.shared))]
        for k in sorted(kernels, key=lambda kernel: (kernel.arch, kernel.name))
    ]


def aligned(kernels: list[Kernel]) -> str:
    table = [HEAD, *rows(kernels)]
    widths = [max(len(line[i]) for line in table) for i in range(len(HEAD))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table)
    return "\n".join(line.rstrip() for line in lines)


def markdown(kernels: list[Kernel]) -> str:
    table = [HEAD, ["---"] * len(HEAD), *rows(kernels)]
    return "\n".join(f"| {' | '.join(line)} |" for line in table) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="libraries or objects; default: the one in use")
    parser.add_argument("--markdown", type=Path, help="also write the table there")
    parser.add_argument("--cuobjdump", default="", help="the tool, where it is not found by itself")
    args = parser.parse_args(argv)
    tool = args.cuobjdump or find_cuobjdump()
    if tool is None:
        print("kernel_resources: cuobjdump is not here; install the CUDA toolkit or give --cuobjdump")
        return NO_TOOL
    kernels = []
    for file in args.files or [default_library()]:
        done = subprocess.run([tool, "-res-usage", str(file)], capture_output=True, text=True)
        if done.returncode != 0:
            print(f"kernel_resources: {(done.stderr or done.stdout).strip()}", file=sys.stderr)
            return 2
        kernels += parse_res_usage(done.stdout)
    if not kernels:
        print("kernel_resources: no kernel was found", file=sys.stderr)
        return 2
    print(aligned(kernels))
    if args.markdown:
        args.markdown.write_text(markdown(kernels))
    bad = [kernel for kernel in kernels if kernel.leaves_registers]
    print(f"{len(kernels)} kernels, {len(bad)} of them use local memory")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
