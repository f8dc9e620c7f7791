"""Runs a CUDA compilation and prints what each kernel takes: registers, shared memory, barriers.

A compiler launcher (``CUDA_COMPILER_LAUNCHER`` in CMakeLists.txt): ``python ptxas_report.py nvcc ARGUMENTS...``
with ``-Xptxas=-v,-warn-spills,-Werror`` among them. Spills fail there; what ptxas merely notes, that it let
wgmma instructions wait for each other, fails here.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
USED = re.compile(r"Used (\d+) registers(?:, used (\d+) barriers)?")
STATIC = re.compile(r"(\d+) bytes smem")
SERIALISED = re.compile(r"\(C75\d\d\)")  # the notes on wgmma: serialised, or a wait put in
DROPPED = re.compile(r"Function properties|Compile time|bytes gmem|bytes stack frame|Used \d+ registers")


def readable(names: list[str]) -> list[str]:
    """The kernels' C++ names, without what all of them have around."""
    if names and (filt := shutil.which("c++filt")):
        done = subprocess.run([filt], input="\n".join(names), capture_output=True, text=True)
        if done.returncode == 0:
            names = done.stdout.splitlines()
    return [re.sub(r"^void vdit::detail::kernel_entry<(.*)>\(.*\)$", r"\1", name) for name in names]


def split(text: str) -> tuple[list[tuple[str, str, str]], list[str], bool]:
    """Of what a compiler said: each kernel's name, architecture, resources; the rest; is it refused?"""
    kernels, others, refused, entry = [], [], False, ("", "")
    for line in text.splitlines():
        if found := ENTRY.search(line):
            entry = found.groups()
            continue
        if found := USED.search(line):
            smem = STATIC.search(line)
            parts = [f"{found[1]:>3} registers", f"{found[2] or 0:>2} barriers"]
            parts += [f"{smem[1]} bytes of static shared memory"] if smem else []
            kernels.append((*entry, ", ".join(parts)))
        if SERIALISED.search(line):
            refused = True
        if not DROPPED.search(line) and line.strip():
            others.append(line)
    return kernels, others, refused


def main(command: list[str]) -> int:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    kernels, others, refused = split(done.stdout)
    names = readable([name for name, _, _ in kernels])
    for name, (_, arch, resources) in zip(names, kernels, strict=True):
        print(f"{arch:7} {resources}: {name}")
    for line in others:
        print(line)
    if done.returncode == 0 and refused:
        print("error: ptxas has let wgmma instructions wait for each other (above), at most of their speed")
    return done.returncode or int(refused)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
