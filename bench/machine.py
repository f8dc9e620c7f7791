"""What a result was made on, and the ceilings that its floors are computed from."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent

# Best sustained rates seen by others on these parts (not data-sheet peaks), after which floors are called
# physical: matrix FLOP/s in bf16 and fp16, bytes/s of HBM, exponentials/s of the special-function units.
KNOWN_GPUS = {
    "H200": {"matmul": 790e12, "bandwidth": 4.3e12, "exp": 3.87e12},
    "H100": {"matmul": 790e12, "bandwidth": 3.0e12, "exp": 3.87e12},
}


def output_of(*command: str) -> str:
    """What a command prints, "" when it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def cpu_name() -> str:
    for line in output_of("lscpu").splitlines():
        if line.startswith("Model name:"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpu_facts() -> dict | None:
    """Name, capability, memory, clocks and power of the first GPU; None without one."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    facts = {
        "name": torch.cuda.get_device_name(),
        "capability": f"{major}.{minor}",
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory,
    }
    fields = (
        "clocks.sm",
        "clocks.max.sm",
        "clocks.mem",
        "power.draw",
        "power.limit",
        "temperature.gpu",
        "driver_version",
    )
    found = output_of("nvidia-smi", "--id=0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    if found:
        facts |= dict(zip(fields, (part.strip() for part in found.splitlines()[0].split(",")), strict=False))
    return facts


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda:
        found["cuda of torch"] = torch.version.cuda
        found["cudnn"] = str(torch.backends.cudnn.version())
    peers = ("flash-attn", "flash-attn-3", "flash-attn-4", "flashinfer-python", "block-sparse-attn", "svg")
    for package in ("vdit-ext", "triton", *peers, "diffusers", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if compiler := output_of("c++", "--version"):
        found["c++"] = compiler.splitlines()[0]
    return found


def libraries() -> dict[str, str]:
    """When each library in use was built: the commit is that of the tree, which may have moved on."""
    from vdit_ext import ops

    return {
        path.name: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(path.stat().st_mtime))
        for path in sorted(ops.library_dir().glob("libvdit_*.so"))
    }


def facts() -> dict:
    """Machine, versions, commit and load, for the head of a result."""
    return {
        "machine": {
            "cpu": cpu_name(),
            "cores": num_cores(),
            "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "gpu": gpu_facts(),
            "niceness": os.nice(0),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": versions(),
        "commit": output_of("git", "rev-parse", "--short=12", "HEAD") or "unknown",
        "uncommitted_changes": bool(
            output_of("git", "status", "--porcelain", "--untracked-files=no", "csrc", "python", "bench")
        ),
    }


def slug(facts: dict) -> str:
    """Short name of the machine for file names."""
    machine = facts["machine"]
    name = machine["gpu"]["name"] if machine["gpu"] else f"{machine['cpu']} {machine['cores']}c"
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("nvidia", "")).strip("-")


def load_average() -> list[float]:
    return [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else []


class Ceilings:
    """The rates that nothing here can exceed: known ones on a known GPU, else the best measured in this run."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.known: dict[str, float] = {}
        if device.startswith("cuda"):
            name = torch.cuda.get_device_name()
            self.known = next((rates for key, rates in KNOWN_GPUS.items() if key in name), {})
        self._measured: dict[str, float] = {}

    def measure(self, dtypes: set[torch.dtype], seconds: float = 0.6) -> None:
        """Measure what is not known; called before and after the timings, and the better figure stays."""
        if "bandwidth" not in self.known:
            self._keep("bandwidth", self._copy_rate(seconds))
        for dtype in dtypes:
            if not (dtype in (torch.bfloat16, torch.float16) and "matmul" in self.known):
                self._keep(f"matmul {_name(dtype)}", self._matmul_rate(dtype, seconds))

    def matmul(self, dtype: torch.dtype) -> float | None:
        if dtype in (torch.bfloat16, torch.float16) and "matmul" in self.known:
            return self.known["matmul"]
        return self._measured.get(f"matmul {_name(dtype)}")

    def floor(self, row: dict, dtype: torch.dtype) -> tuple[float, str]:
        """Least microseconds for a row, and what binds: "compute", "memory" or "exp"."""
        bounds = {"compute": (row["flops"], self.matmul(dtype)),
                  "memory": (row["bytes"], self.known.get("bandwidth") or self._measured.get("bandwidth")),
                  "exp": (row["exps"], self.known.get("exp"))}  # fmt: skip
        times = {name: work / rate * 1e6 for name, (work, rate) in bounds.items() if rate and work}
        if not times:
            return 0.0, "unknown"
        binding = max(times, key=times.get)
        return times[binding], binding

    def describe(self) -> dict:
        return {"device": self.device, "known": self.known, "measured": self._measured}

    def _keep(self, name: str, rate: float) -> None:
        self._measured[name] = max(rate, self._measured.get(name, 0.0))

    def _matmul_rate(self, dtype: torch.dtype, seconds: float) -> float:
        """Best of several sizes and of the two ways in which torch multiplies matrices.

        A product and a 1x1 convolution reach different libraries on a CPU, of which neither is always the
        faster; and products of a millisecond fit between two disturbances of a busy machine.
        """
        gpu = self.device.startswith("cuda")
        best = 0.0
        for n in (4096, 8192) if gpu else (256, 512, 1024):
            a, b = (torch.randn(n, n, device=self.device).to(dtype) for _ in range(2))
            calls = [lambda a=a, b=b: a @ b]
            if not gpu:
                image = a.view(1, n, n // 32, 32).contiguous(memory_format=torch.channels_last)
                calls.append(lambda x=image, w=b[:, :, None, None]: torch.nn.functional.conv2d(x, w))
            for call in calls:
                best = max(best, 2 * n**3 / self._best_seconds(call, seconds / (2 * len(calls))))
        return best

    def _copy_rate(self, seconds: float) -> float:
        size = 2**31 if self.device.startswith("cuda") else 2**27
        a = torch.ones(size // 4, device=self.device)
        b = torch.empty_like(a)
        return 2 * size / self._best_seconds(lambda: b.copy_(a), seconds)

    def _best_seconds(self, call, seconds: float) -> float:
        sync = torch.cuda.synchronize if self.device.startswith("cuda") else lambda: None
        call()
        sync()
        best, begun = float("inf"), time.perf_counter()
        while time.perf_counter() - begun < seconds or best == float("inf"):
            start = time.perf_counter()
            call()
            sync()
            best = min(best, time.perf_counter() - start)
        return best


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
