#!/usr/bin/env python
"""The short table at the end of gpu.sh: ``python bench/summary.py FOLDER``."""

from __future__ import annotations

import json
import sys
from pathlib import Path


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


def timing_lines(folder: Path) -> list[str]:
    """One line for each timed case of a GPU run, with the best peer."""
    lines = []
    for path in sorted(folder.glob("*_gpu_*.json")):
        for row in json.loads(path.read_text())["rows"]:
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


def main() -> int:
    folder = Path(sys.argv[1])
    print("\n".join([*check_lines(folder), *timing_lines(folder)]) or "no results")
    return 0


if __name__ == "__main__":
    sys.exit(main())
