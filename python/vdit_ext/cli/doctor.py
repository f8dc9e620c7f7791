"""``vdit doctor``: what is installed, what runs here, and why something does not."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

import typer

from . import machine, options
from .console import print_json, stdout
from .errors import FAILED, command

PACKAGES = ("diffusers", "transformers", "accelerate", "av", "pillow", "matplotlib", "torchmetrics")
# CUDA serves these; the CPU's are wider. Shown in the notes of the table.
_CUDA_NEEDS = "head_dim 64, 96 or 128, float16 or bfloat16"
_CPU_NEEDS = "head_dim a multiple of 8 up to 256, float32, float16 or bfloat16"
# What csrc/common/cpu/isa.cpp asks of a processor for each level, beyond the level before it.
_LEVELS = {
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx512_vnni": {"avx512_vnni"},
    "avx512_bf16": {"avx512_bf16"},
}


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Attributes:
        what: its name.
        state: "ok", "missing" (something optional), or "broken".
        detail: a phrase; for what is not ok, why and what to do.
    """

    what: str
    state: str
    detail: str


@command
def doctor(as_json: options.Json = False) -> None:
    """Show versions, devices, op libraries and which kernels run here, and why others do not.

    Works on any machine. Ends with 0 also where there is no GPU and with 1 when the CPU op library, without
    which nothing runs, cannot be loaded or gives a wrong result.
    """
    report = examine()
    if as_json:
        print_json(report)
    else:
        _show(report)
    if not report["healthy"]:
        raise typer.Exit(FAILED)


def examine() -> dict[str, Any]:
    """Everything that ``vdit doctor`` shows, as plain data."""
    ops, failure = _load_ops()
    build, build_note = _build_info()
    libraries = (
        dict(ops.LIBRARIES) if ops else {"cpu": failure, "cuda": "not loaded: the CPU library comes first"}
    )
    check = _self_check() if ops else failure
    gpus = _gpus(build)
    return {
        "healthy": ops is not None and check == "ok",
        "machine": machine.machine() if _has_torch() else f"{machine.cpu_name()}, {machine.num_cores()} cores",
        "versions": machine.versions(),
        "torch": _torch_facts(),
        "driver": _driver(),
        "cpu": _cpu_facts(),
        "gpus": gpus,
        "build": build if build is not None else {"note": build_note},
        "libraries": libraries,
        "self_check": check,
        "kernels": _kernels(ops, libraries, gpus),
        "packages": {name: machine.version_of(name) for name in PACKAGES},
        "toy_weights": asdict(_toy_weights()),
    }


def _has_torch() -> bool:
    try:
        import torch  # noqa: F401
    except ImportError:
        return False
    return True


def _load_ops() -> tuple[Any, str]:
    try:
        ops = import_module("vdit_ext.ops")
    except (ImportError, OSError, RuntimeError) as error:
        return None, " ".join(str(error).split())
    return ops, ""


def _build_info() -> tuple[dict[str, Any] | None, str]:
    try:
        facts = import_module("vdit_ext._C")
    except ImportError as error:
        return None, f"vdit_ext._C could not be imported: {error}"
    return dict(facts.build_info()), ""


def _torch_facts() -> dict[str, Any]:
    if not _has_torch():
        return {"version": None, "cuda": None, "devices": 0}
    import torch

    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "devices": torch.cuda.device_count() if torch.cuda.is_available() else 0,
    }


def _driver() -> str:
    """NVIDIA driver version, or why none is known."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "none found (no nvidia-smi)"
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi failed ({type(error).__name__})"
    return answer[0] if answer else "nvidia-smi lists no GPU"


def _cpu_facts() -> dict[str, Any]:
    try:
        used = import_module("vdit_ext._C").cpu_isa()
    except (ImportError, RuntimeError) as error:
        used = f"unknown: {error}"
    return {
        "name": machine.cpu_name(),
        "cores": machine.num_cores(),
        "isa_used": used,
        "isa_available": _isa_levels(_cpu_flags()),
    }


def _isa_levels(flags: set[str]) -> list[str]:
    """Names of the levels that a processor with these flags has; each contains the one before it."""
    return ["portable", *itertools.takewhile(lambda name: flags >= _LEVELS[name], _LEVELS)]


def _cpu_flags() -> set[str]:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("flags"):
                    return set(line.split(":", 1)[1].split())
    except OSError:
        pass
    return set()


def _gpus(build: dict[str, Any] | None) -> list[dict[str, Any]]:
    if not _has_torch():
        return []
    import torch

    if not torch.cuda.is_available():
        return []
    archs = [str(arch) for arch in (build or {}).get("cuda_archs", [])]
    found = []
    for i in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(i)
        gap = arch_gap(capability, archs)
        found.append(
            {
                "device": f"cuda:{i}",
                "name": torch.cuda.get_device_name(i),
                "capability": f"{capability[0]}.{capability[1]}",
                "memory_gib": round(torch.cuda.get_device_properties(i).total_memory / 2**30, 1),
                "served": gap is None,
                "reason": gap or "ok",
            }
        )
    return found


def arch_gap(capability: tuple[int, int], archs: list[str]) -> str | None:
    """Why a GPU cannot run what was compiled, or None.

    Args:
        capability: of the GPU, as in (9, 0).
        archs: compiled architectures as CMake writes them: "80" (code and PTX), "90a-real", "80-virtual".
    """
    if not archs:
        return "this build has no CUDA kernels"
    device = capability[0] * 10 + capability[1]
    for arch in archs:
        number, _, kind = arch.partition("-")
        digits = int("".join(c for c in number if c.isdigit()) or 0)
        exact = number.endswith("a")
        if exact and digits == device and kind != "virtual":
            return None
        if exact:
            continue
        if kind != "virtual" and digits // 10 == capability[0] and digits <= device:
            return None
        if kind != "real" and digits <= device:
            return None
    return f"compute capability {capability[0]}.{capability[1]} is not served by {', '.join(archs)}"


def _self_check() -> str:
    """ "ok" when a small attention on the CPU agrees with the definition, else what is wrong."""
    import torch

    from ..ops import attention

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 100, 64, generator=generator) for _ in range(3))
    counts, lists = attention.lists_from_mask(torch.rand(1, 2, 4, 4, generator=generator) < 0.6)
    sizes = {"q_block_size": 32, "kv_block_size": 32}
    try:
        got, _ = attention.block_sparse_attention(q, k, v, counts, lists, **sizes)
    except RuntimeError as error:
        return f"block_sparse_attention failed: {' '.join(str(error).split())}"
    expected, _ = attention.block_sparse_attention_naive(q, k, v, counts, lists, **sizes)
    worst = float((got - expected).abs().max())
    return "ok" if worst < 1e-4 else f"block_sparse_attention is off by {worst:.2e} from its definition"


def _kernels(ops: Any, libraries: dict[str, str], gpus: list[dict[str, Any]]) -> list[dict[str, str]]:
    """One row an op: for each backend "yes" with what it needs, or why not."""
    if ops is None:
        return []
    import torch

    names = sorted(
        {
            s.name.split("::")[1]
            for s in torch._C._jit_get_all_schemas()
            if s.name.startswith(f"{ops.NAMESPACE}::")
        }
    )
    rows = []
    for name in names:
        full = f"{ops.NAMESPACE}::{name}"
        has = {key: torch._C._dispatch_has_kernel_for_dispatch_key(full, key) for key in ("CPU", "CUDA")}
        composite = torch._C._dispatch_has_kernel_for_dispatch_key(full, "CompositeImplicitAutograd")
        if not (has["CPU"] or has["CUDA"] or composite) and name.startswith("_"):
            continue
        row = {"op": name, "cpu": "yes" if has["CPU"] else "no CPU kernel"}
        rows.append(row | {"cuda": _cuda_state(has["CUDA"], libraries["cuda"], gpus)})
    return rows


def _cuda_state(registered: bool, library: str, gpus: list[dict[str, Any]]) -> str:
    if library != "loaded":
        return library
    if not registered:
        return "no CUDA kernel"
    if not gpus:
        return "loaded, but there is no GPU"
    served = [gpu["device"] for gpu in gpus if gpu["served"]]
    return f"yes ({', '.join(served)})" if served else gpus[0]["reason"]


def _toy_weights() -> Finding:
    try:
        from ..toyworld import load_pipeline
        from ..toyworld.pipeline import read_card
    except ImportError as error:
        return Finding("toy weights", "missing", f"not checked: {error}")
    try:
        card = read_card()
        load_pipeline()
    except ValueError as error:
        return Finding("toy weights", "missing", str(error))
    return Finding(
        "toy weights", "ok", f"valid, trained for {card.get('steps')} steps, sha256 {card['sha256'][:12]}"
    )


def _show(report: dict[str, Any]) -> None:
    console = stdout()
    console.print(_facts(report))
    if report["gpus"]:
        console.print(_gpu_table(report["gpus"]))
    if report["kernels"]:
        console.print(_kernel_table(report))
        console.print(f"cpu serves {_CPU_NEEDS}; cuda serves {_CUDA_NEEDS} in attention.", style="dim")
    if report["healthy"]:
        console.print("Healthy: the CPU kernels run and agree with their definition.", style="green")
    else:
        console.print(f"Broken: {report['self_check']}.", style="red", soft_wrap=True)


def _facts(report: dict[str, Any]):
    from rich.table import Table

    torch, build, cpu = report["torch"], report["build"], report["cpu"]
    absent = [name for name, version in report["packages"].items() if version is None]
    present = [f"{name} {version}" for name, version in report["packages"].items() if version is not None]
    lines = {
        "vdit-ext": report["versions"].get("vdit-ext", "not installed, run from its source tree"),
        "python": report["versions"]["python"],
        "torch": f"{torch['version']}, " + (f"CUDA {torch['cuda']}" if torch["cuda"] else "built without CUDA"),
        "driver": report["driver"],
        "processor": f"{cpu['name']}, {cpu['cores']} cores",
        "instruction set": f"{cpu['isa_used']} in use; this processor has {', '.join(cpu['isa_available'])}",
        "build": _build_line(build),
        "cuda archs": ", ".join(build.get("cuda_archs", [])) or "none",
        "cpu library": report["libraries"]["cpu"],
        "cuda library": report["libraries"]["cuda"],
        "self check": report["self_check"],
        "packages": ", ".join(present) or "none",
        "toy weights": report["toy_weights"]["detail"],
    }
    if absent:
        lines["not installed"] = f"{', '.join(absent)} (optional; pip install 'vdit-ext\\[video]')"
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in lines.items():
        table.add_row(name, value)
    return table


def _build_line(build: dict[str, Any]) -> str:
    if "note" in build:
        return build["note"]
    cuda = f"CUDA {build['cuda']}, CUTLASS {build['cutlass']}" if build.get("cuda") else "without CUDA"
    return f"{build['build_type']}, {build['compiler']}, {cuda}, namespace {build['op_namespace']}"


def _gpu_table(gpus: list[dict[str, Any]]):
    from rich.table import Table

    table = Table()
    for column in ("device", "name", "capability", "memory", "kernels"):
        table.add_column(column)
    for gpu in gpus:
        memory = f"{gpu['memory_gib']} GiB"
        table.add_row(gpu["device"], gpu["name"], gpu["capability"], memory, gpu["reason"])
    return table


def _kernel_table(report: dict[str, Any]):
    from rich.table import Table

    table = Table()
    for column in ("op", "cpu", "cuda"):
        table.add_column(column)
    for row in report["kernels"]:
        table.add_row(row["op"], row["cpu"], row["cuda"])
    return table
