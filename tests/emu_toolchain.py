"""Finds what the emulator is compiled with, and compiles small programs over it for the tests.

A newcomer without nvcc needs g++ 11 or newer and four packages from PyPI: HEADER_PACKAGES.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
CORE = ("block.cpp", "copies.cpp", "fiber.cpp", "hopper.cpp", "mma.cpp", "wgmma.cpp")
HEADER_PACKAGES = ("nvidia-cutlass", "nvidia-cuda-runtime", "nvidia-cuda-crt", "nvidia-cuda-cccl")


class MissingTool(Exception):
    """What is not installed here, as a sentence."""


def cuda_include_dirs() -> list[Path]:
    """CUDA's include folders, or [] without any.

    From the first of CUDA_HOME, the toolkit of the nvcc on PATH, /usr/local/cuda and the PyPI packages that
    has cuda_runtime.h; the folder of libcu++ (cccl) follows where it is a separate one.
    """
    roots = []
    if os.environ.get("CUDA_HOME"):
        roots.append(Path(os.environ["CUDA_HOME"]) / "include")
    if nvcc := shutil.which("nvcc"):
        roots.append(Path(nvcc).resolve().parent.parent / "include")
    roots.append(Path("/usr/local/cuda/include"))
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or [] if spec else []:
        roots += sorted(Path(folder).glob("cu*/include"), reverse=True)
    for root in roots:
        if (root / "cuda_runtime.h").is_file():
            return [folder for folder in (root, root / "cccl") if folder.is_dir()]
    return []


def cutlass_include_dir() -> Path | None:
    """The headers inside the PyPI package nvidia-cutlass, or None."""
    spec = importlib.util.find_spec("cutlass_library")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "source" / "include"


def header_flags(*, with_cuda: bool = True) -> list[str]:
    """-I and -isystem flags for a kernel source; nvcc brings CUDA's own. Raises MissingTool."""
    cutlass, cuda = cutlass_include_dir(), cuda_include_dirs()
    if cutlass is None or not cuda:
        what = "CUTLASS" if cutlass is None else "CUDA"
        raise MissingTool(f"No {what} headers were found: pip install {' '.join(HEADER_PACKAGES)}.")
    folders = (cutlass, *cuda) if with_cuda else (cutlass,)
    return [f"-I{CSRC}", f"-I{CSRC / 'include'}", *(f"-isystem{folder}" for folder in folders)]


def cache_dir() -> Path:
    """VDIT_TEST_BUILD_DIR, else a folder of this user's under the system's temporary one."""
    base = os.environ.get("VDIT_TEST_BUILD_DIR") or Path(tempfile.gettempdir()) / f"vdit-emu-{os.getuid()}"
    folder = Path(base) / "programs"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _key(command: list[str], source: Path) -> str:
    """Names a build by all that goes into it: the command, the compiler, the source and our headers."""
    compiler = subprocess.run([command[0], "--version"], capture_output=True, text=True).stdout
    digest = hashlib.sha256("\0".join([*command, compiler]).encode())
    families = tuple(CSRC / name for name in ("attention", "linear", "vq"))
    for folder in (CSRC / "common", CSRC / "emu", *families, CSRC / "include" / "vdit", source.parent):
        sources = folder.glob("*.cu") if folder in families else ()  # a program may be made of them
        for header in sorted((*folder.glob("*.h"), *folder.glob("*.cuh"), *sources)):
            digest.update(header.read_bytes())
    digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _run(command: list[str], output: Path) -> None:
    # Written under another name first, so that two test processes may build the same thing.
    partial = output.with_name(f"{output.name}.{os.getpid()}")
    done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[:4000]}")
    partial.rename(output)


def compile_object(source: Path, flags: list[str], compiler: str = "g++") -> Path:
    """Compile `source` with `flags`, unless the cache has it."""
    if shutil.which(compiler) is None:
        raise MissingTool(f"{compiler} is not installed.")
    command = [compiler, *flags, "-c", str(source)]
    output = cache_dir() / f"{source.stem}-{_key(command, source)}.o"
    if not output.exists():
        _run(command, output)
    return output


def build_emulated(source: Path, *, sanitize: str = "", flags: tuple[str, ...] = ()) -> Path:
    """Compile one .cu for the emulator and link it with the core; returns the program.

    `sanitize` is "", "address" or "thread"; the core is never instrumented (csrc/emu/fiber.cpp says why).
    """
    core = [compile_object(CSRC / "emu" / name, ["-std=c++20", "-O3", "-Wall", "-Wextra"]) for name in CORE]
    sanitizer = [f"-fsanitize={sanitize}", "-g", "-fno-omit-frame-pointer"] if sanitize else []
    kernel_flags = ["-std=c++20", "-O1", "-xc++", "-DVDIT_EMU", "-Wall", "-Wno-unknown-pragmas"]
    kernel = compile_object(source, [*kernel_flags, *sanitizer, *flags, *header_flags()])
    objects = [kernel, *core]
    name = hashlib.sha256("".join(map(str, [*objects, *sanitizer])).encode()).hexdigest()[:16]
    program = cache_dir() / f"{source.stem}-{name}"
    if not program.exists():
        _run(["g++", *sanitizer, *map(str, objects)], program)
    return program


def run_emulated(
    program: Path, *arguments: str, order: str = "forward", timeout: float = 60, **environment: str
):
    """Run a built program in a fiber order; stdout and stderr are captured as text."""
    env = {**os.environ, "VDIT_EMU_ORDER": order, **environment}
    return subprocess.run([str(program), *arguments], env=env, capture_output=True, text=True, timeout=timeout)
