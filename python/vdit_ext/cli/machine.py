"""What a result was made on: hardware in one line, versions."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata


def cpu_name() -> str:
    """The processor's model name as the system gives it."""
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.lower().startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpu_names() -> list[str]:
    """CUDA devices that torch sees, with compute capability."""
    import torch

    if not torch.cuda.is_available():
        return []
    names = []
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        names.append(f"{torch.cuda.get_device_name(i)} (sm_{major}{minor})")
    return names


def version_of(package: str) -> str | None:
    """Installed version of a distribution, None where there is none."""
    # A loaded module knows better: torch's version names the CUDA that it was built for, its distribution's
    # need not.
    if own := getattr(sys.modules.get(package.replace("-", "_")), "__version__", None):
        return str(own)
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape a result; absent ones are left out."""
    found = {"python": platform.python_version()}
    for package in ("vdit-ext", "torch", "diffusers"):
        if version := version_of(package):
            found[package] = version
    return found


def machine() -> str:
    """One line: processor, cores, GPUs, system."""
    gpus = ", ".join(gpu_names()) or "no GPU"
    return f"{cpu_name()}, {num_cores()} cores, {gpus}, {platform.system()} {platform.machine()}"
