"""Loading of the op libraries and access to their namespace."""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache
from pathlib import Path

import torch


@lru_cache(maxsize=1)
def library_dir() -> Path:
    """Folder that holds libvdit_cpu.so and, where it was built, libvdit_cuda.so.

    ``VDIT_LIBRARY_DIR`` overrides it, to try a build without installing it.
    """
    if override := os.environ.get("VDIT_LIBRARY_DIR"):
        return Path(override)
    here = Path(__file__).resolve().parent.parent / "lib"
    if here.is_dir():
        return here
    # An editable install keeps compiled files beside the pybind module, away from the sources.
    spec = importlib.util.find_spec("vdit_ext._C")
    if spec is not None and spec.origin:
        return Path(spec.origin).parent / "lib"
    return here


def op_namespace() -> str:
    """Namespace of the ops under ``torch.ops``, as the build wrote it down beside the libraries."""
    path = library_dir() / "namespace.txt"
    return path.read_text().strip() if path.is_file() else "vdit"


NAMESPACE = op_namespace()


def load_libraries() -> dict[str, str]:
    """Load the op libraries into torch.

    Returns what happened to each as ``{"cpu": "loaded", "cuda": "loaded" | reason}``; the reason is shown by
    ``vdit doctor``. Raises ImportError when the CPU library, which holds the schemas, cannot be loaded.
    """
    cpu = library_dir() / "libvdit_cpu.so"
    if not cpu.exists():
        raise ImportError(
            f"vdit_ext: the op library was expected at {cpu}, it is not there; install the package with "
            "`pip install .` or set VDIT_LIBRARY_DIR"
        )
    torch.ops.load_library(str(cpu))
    return {"cpu": "loaded", "cuda": _load_cuda(library_dir() / "libvdit_cuda.so")}


def _load_cuda(path: Path) -> str:
    if not path.exists():
        return "not built: this wheel was made without nvcc"
    if torch.version.cuda is None:
        return "not loaded: this torch was built without CUDA"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"not loaded: {str(error).splitlines()[0]}"
    return "loaded"
