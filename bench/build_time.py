#!/usr/bin/env python
"""Measure a build from nothing, time and compiler memory: ``python bench/build_time.py --help``."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

TARGET_SECONDS = {"OFF": 180.0, "ON": 1200.0}
TARGET_BYTES = 8e9
PAGE = os.sysconf("SC_PAGE_SIZE")


class MemoryWatch(threading.Thread):
    """Polls the resident memory of a process and all its descendants."""

    def __init__(self, root: int, interval: float = 0.1) -> None:
        super().__init__(daemon=True)
        self.root, self.interval = root, interval
        self.peak_total, self.peak_single, self.peak_name = 0, 0, ""
        self._stop_event = threading.Event()

    def run(self) -> None:
        while not self._stop_event.wait(self.interval):
            total = 0
            for pid, name, size in family(self.root):
                if name in ("cmake", "ninja", "make"):
                    continue
                total += size
                if size > self.peak_single:
                    self.peak_single, self.peak_name = size, f"{name} {source_of(pid)}".strip()
            self.peak_total = max(self.peak_total, total)

    def stop(self) -> None:
        self._stop_event.set()
        self.join()


def family(root: int) -> list[tuple[int, str, int]]:
    """(pid, name, resident bytes) of a process and its descendants, from /proc."""
    found, children = {}, {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat") as file:
                head, _, tail = file.read().rpartition(")")
        except OSError:
            continue
        fields = tail.split()
        pid = int(entry)
        found[pid] = (head.partition("(")[2], int(fields[21]) * PAGE)
        children.setdefault(int(fields[1]), []).append(pid)
    result, waiting = [], [root]
    while waiting:
        pid = waiting.pop()
        if pid in found:
            result.append((pid, *found[pid]))
        waiting += children.get(pid, [])
    return result


def source_of(pid: int) -> str:
    """File name that a compiler process works on."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read().decode(errors="replace").split("\0")
    except OSError:
        return ""
    sources = [w for w in words if w.endswith((".cpp", ".cu", ".cc", ".ii", ".ptx")) and not w.startswith(".")]
    return Path(sources[-1]).name if sources else ""


def timed(command: list[str]) -> tuple[float, MemoryWatch]:
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    watch = MemoryWatch(process.pid)
    watch.start()
    output = process.communicate()[0]
    watch.stop()
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command[:2])} failed:\n{output[-4000:]}")
    return time.perf_counter() - started, watch


def per_file(log: Path) -> list[dict]:
    """Seconds of each output in a .ninja_log, slowest first."""
    found = {}
    for line in log.read_text().splitlines()[1:]:
        start, end, _, output, *_ = line.split("\t")
        found[output] = (int(end) - int(start)) / 1e3
    return [{"output": output, "seconds": s} for output, s in sorted(found.items(), key=lambda item: -item[1])]


def measure(args: argparse.Namespace, folder: Path) -> dict:
    import pybind11

    configure = [
        "cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", f"-DVDIT_CUDA={args.cuda}",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]  # fmt: skip
    if args.archs:
        configure.append(f"-DVDIT_CUDA_ARCHS={args.archs}")
    configure_seconds, _ = timed(configure)
    build_seconds, watch = timed(["cmake", "--build", str(folder), "-j", str(args.jobs)])
    return {
        "configure_seconds": configure_seconds,
        "build_seconds": build_seconds,
        "seconds": configure_seconds + build_seconds,
        "peak_total_bytes": watch.peak_total,
        "peak_single_bytes": watch.peak_single,
        "peak_single": watch.peak_name,
        "files": per_file(folder / ".ninja_log"),
    }


def markdown(result: dict) -> str:
    machine = result["machine"]
    cuda = (
        f"with CUDA ({result['archs'] or 'default architectures'})"
        if result["cuda"] == "ON"
        else "without CUDA"
    )
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    load = result["load_average"]
    lines = [
        f"# Build from nothing, {cuda}, {result['date'][:10]}",
        "",
        f"- Machine: {machine['cpu']}, {machine['cores']} cores, {machine['system']}; {result['jobs']} jobs",
        f"- Versions: {versions}; commit {result['commit']}",
        f"- Load average (1, 5, 15 minutes): {load['start']} at the start, {load['end']} at the end",
        "",
        "| what | measured | target | verdict |",
        "|---|---|---|---|",
    ]
    lines += [f"| {t['what']} | {t['measured']} | {t['target']} | {t['verdict']} |" for t in result["targets"]]
    lines += ["", f"Configuring took {result['configure_seconds']:.1f} s, compiling and linking "
              f"{result['build_seconds']:.1f} s. The largest process was `{result['peak_single']}`. Memory is "
              "resident memory, polled ten times a second, of all compilers at once.", "",
              "| output | seconds |", "|---|---|"]  # fmt: skip
    lines += [f"| {Path(f['output']).name} | {f['seconds']:.1f} |" for f in result["files"][:15]]
    return "\n".join(lines) + "\n"


def main() -> int:
    from machine import facts, load_average, slug

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cuda", choices=("ON", "OFF"), default="OFF")
    parser.add_argument("--archs", default="", help="as VDIT_CUDA_ARCHS; default: the project's")
    parser.add_argument("-j", "--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    args = parser.parse_args()

    load = {"start": load_average()}
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(args, Path(folder))
    load["end"] = load_average()
    seconds, limit = measured["seconds"], TARGET_SECONDS[args.cuda]
    result = {
        "schema": 1,
        "family": "build-cuda" if args.cuda == "ON" else "build-cpu",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": f"python bench/build_time.py --cuda {args.cuda} -j {args.jobs}"
        + (f" --archs '{args.archs}'" if args.archs else ""),
        **facts(),
        "cuda": args.cuda,
        "archs": args.archs,
        "jobs": args.jobs,
        "load_average": load,
        **measured,
        "targets": [
            {"what": "wall time", "measured": f"{seconds:.0f} s", "target": f"< {limit:.0f} s",
             "verdict": "pass" if seconds < limit else "fail"},
            {"what": f"peak compiler memory, {args.jobs} jobs",
             "measured": f"{measured['peak_total_bytes'] / 1e9:.2f} GB",
             "target": f"< {TARGET_BYTES / 1e9:.0f} GB",
             "verdict": "pass" if measured["peak_total_bytes"] < TARGET_BYTES else "fail"},
        ],
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    name = f"{result['date'][:10]}_{slug(result)}_{result['family']}"
    (args.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    text = markdown(result)
    (args.out / f"{name}.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
