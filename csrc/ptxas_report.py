"""Runs a CUDA compilation and prints what each kernel takes: registers, shared memory, barriers.

A compiler launcher (``CUDA_COMPILER_LAUNCHER`` in CMakeLists.txt), for compilations with
``-Xptxas=-v,-warn-spills``:

    python ptxas_report.py [--refuse] nvcc ARGUMENTS...

Registers that are spilled, and wgmma instructions that ptxas let wait for each other, get a warning; with
``--refuse`` they fail the compilation.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
USED = re.compile(r"Used (\d+) registers(?:, used (\d+) barriers)?")
STATIC = re.compile(r"(\d+) bytes smem")
# What ptxas says of spills, and its notes on wgmma: serialised, or a wait put in.
SLOW = re.compile(r"Registers are spilled to local memory|\(C75\d\d\)")
DROPPED = re.compile(r"Function properties|Compile time|bytes gmem|bytes stack frame|Used \d+ registers")


def readable(names: list[str]) -> list[str]:
    """The kernels' C++ names, without what all of them have around."""
    if names and (filt := shutil.which("c++filt")):
        done = subprocess.run([filt], input="\n".join(names), capture_output=True, text=True)
        if done.returncode == 0:
            names = done.stdout.splitlines()
    return [re.sub(r"^void vdit::detail::kernel_entry<(.*)>\(.*\)$", r"\1", name) for name in names]


def split(text: str) -> tuple[list[tuple[str, str, str]], list[str], bool]:
    """Of what a compiler said: each kernel's name, architecture, resources; the rest; is some kernel slow?"""
    kernels, others, slow, entry = [], [], False, ("", "")
    for line in text.splitlines():
        if found := ENTRY.search(line):
            entry = found.groups()
            continue
        if found := USED.search(line):
            smem = STATIC.search(line)
            parts = [f"{found[1]:>3} registers", f"{found[2] or 0:>2} barriers"]
            parts += [f"{smem[1]} bytes of static shared memory"] if smem else []
            kernels.append((*entry, ", ".join(parts)))
        slow = slow or SLOW.search(line) is not None
        if not DROPPED.search(line) and line.strip():
            others.append(line)
    return kernels, others, slow


def main(command: list[str]) -> int:
    refuse = command[:1] == ["--refuse"]
    done = subprocess.run(command[refuse:], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    kernels, others, slow = split(done.stdout)
    names = readable([name for name, _, _ in kernels])
    for name, (_, arch, resources) in zip(names, kernels, strict=True):
        print(f"{arch:7} {resources}: {name}")
    for line in others:
        print(line)
    if done.returncode == 0 and slow:
        print(f"{'error' if refuse else 'warning'}: a kernel lost much of its speed (above): registers were")
        print("spilled, or wgmma instructions wait for each other")
    return done.returncode or int(slow and refuse)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
