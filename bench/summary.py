#!/usr/bin/env python
"""The short table at the end of gpu.sh: ``python bench/summary.py FOLDER``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from report import table_lines


def check_lines(folder: Path) -> list[str]:
    """Passed and failed cases of each op, then the first failures."""
    lines, faults = [], []
    for path in sorted(folder.glob("check_*.json")):
        ops: dict[str, list[int]] = {}
        for result in json.loads(path.read_text())["results"]:
            ops.setdefault(result["op"], [0, 0])[bool(result["fault"])] += 1
            if result["fault"]:
                faults.append(f"  FAIL {result['op']} {result['case']}: {result['fault']}"[:200])
        lines += [f"{op:<24} {good:4d} passed {bad:4d} failed" for op, (good, bad) in ops.items()]
    return lines + faults[:12] + ([f"  and {len(faults) - 12} more"] if len(faults) > 12 else [])


def sanitizer_lines(folder: Path) -> list[str]:
    """The last word of each of NVIDIA's checkers."""
    lines = []
    for path in sorted(folder.glob("sanitizer_*.log")):
        words = [line for line in path.read_text(errors="replace").splitlines() if "SUMMARY:" in line]
        lines += [f"{path.stem:<24} {words[-1].strip('= ')}"] if words else []
    return lines


def timing_lines(folder: Path) -> list[str]:
    """One line for each timed case of a GPU run, with the best peer."""
    lines = []
    for path in sorted(folder.glob("*_gpu_*.json")):
        result = json.loads(path.read_text())
        if result.get("tables"):
            continue  # they come last
        for row in result["rows"]:
            label = f"{row['op'][:22]:<22} {row['case'][:30]:<30}"
            if row["status"] != "timed":
                lines.append(f"{label} {row['status']}: {row['check']}"[:160])
                continue
            ratios = {name: peer["ratio"] for name, peer in row["peers"].items() if "ratio" in peer}
            worst = max(ratios, key=ratios.get, default="")
            share = f"{100 * row['floor_share']:3.0f} % of floor" if row.get("floor_share") else ""
            peer = f"{ratios[worst]:.2f} x {worst} (fastest peer)" if worst else ""
            lines.append(f"{label} {row['us']:>12,.1f} us {row['tflops']:7.1f} TF {share:<16} {peer}")
    return lines


def last_lines(folder: Path) -> list[str]:
    """The tables of the runs that make one: what a transformer layer takes, and the figures last of all."""
    lines = []
    for path in sorted(folder.glob("*_gpu_*.json"), key=lambda path: ("figures" in path.stem, path.stem)):
        if made := table_lines(json.loads(path.read_text())):
            lines += ["", f"-- {path.stem}", *made[1:]]
    return lines


def main() -> int:
    folder = Path(sys.argv[1])
    lines = [*check_lines(folder), *sanitizer_lines(folder), *timing_lines(folder), *last_lines(folder)]
    print("\n".join(lines) or "no results")
    return 0


if __name__ == "__main__":
    sys.exit(main())
