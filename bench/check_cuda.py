#!/usr/bin/env python
"""Run every CUDA kernel on the shared cases against the CPU kernels: ``python bench/check_cuda.py``.

It never stops at the first failure. Cases run in a process apart; when a kernel crashes, hangs or leaves the
GPU in an error state, that case is reported and a new process goes on with the next. ``--backend emu`` runs
the emulated kernels and ``--backend cpu`` the CPU kernels against the definitions, which tries out this script
without a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import queue
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT / "tests", ROOT / "bench"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
if importlib.util.find_spec("vdit_ext") is None:
    sys.path.insert(0, str(ROOT / "python"))

FAMILIES = ("attention", "linear", "vq")  # each has bench/check_<family>.py with OPS, Backend and named_cases()


def worker(args: argparse.Namespace) -> int:
    """Run the cases from number ``skip`` on, and print a JSON line before and after each.

    Returns 4 when a case failed, 3 when the device does not work any more.
    """
    import torch
    from harness import poisoned, short

    checks = importlib.import_module(f"check_{args.family}")
    backend = checks.Backend(args.backend)
    asked = args.op.split(",") if args.op else checks.OPS
    wanted = [op for op in asked if op in checks.OPS]  # the others are another family's
    cases = ((op, *case) for op in wanted for case in selected(checks, op, args, backend))
    with poisoned():
        pass  # its first use imports much, which is not the first case's time
    faults = 0
    for number, (op, name, run) in enumerate(cases):
        if number < args.skip:
            continue
        print(json.dumps({"number": number, "op": op, "begin": name}), flush=True)
        started = time.perf_counter()
        fault = ""
        try:
            with torch.inference_mode(), poisoned():
                run()
                backend.synchronize()
        except Exception as error:
            fault = short(str(error) if isinstance(error, AssertionError) else error) or type(error).__name__
        line = {
            "number": number,
            "op": op,
            "case": name,
            "fault": fault,
            "seconds": time.perf_counter() - started,
        }
        print(json.dumps(line), flush=True)
        faults += bool(fault)
        if fault and not backend.alive():
            return 3  # the error sticks to the process: what follows would fail because of it
    print(json.dumps({"done": True}), flush=True)
    return 4 if faults else 0


def selected(checks, op: str, args: argparse.Namespace, backend) -> Iterator[tuple]:
    """An op's cases that match ``--select``; with ``--per-op``, so many, drawn the same way every time.

    Not every n-th: dtypes and head sizes alternate in the lists.
    """
    chosen = re.compile(args.select)
    cases = (case for case in checks.named_cases(op, args.large, backend) if chosen.search(f"{op} {case[0]}"))
    if not args.per_op:
        yield from cases
        return
    cases = list(cases)
    drawn = random.Random(0).sample(range(len(cases)), min(args.per_op, len(cases)))
    yield from (cases[i] for i in sorted(drawn))


def watch(args: argparse.Namespace, family: str, deadline: float) -> Iterator[dict]:
    """Results of one family; restarts the worker after whatever ended it."""
    skip = 0
    while True:
        command = [
            sys.executable,
            str(Path(__file__).resolve()),
            "--worker",
            "--family",
            family,
            "--op",
            args.op,
        ]
        command += ["--backend", args.backend, "--select", args.select, "--per-op", str(args.per_op)]
        command += ["--skip", str(skip)]
        command += ["--large"] if args.large else []
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_pump, args=(process.stdout, lines), daemon=True).start()
        noise: list[str] = []
        reader = threading.Thread(target=lambda p=process, n=noise: n.extend(p.stderr), daemon=True)
        reader.start()
        current, done, hung = None, False, False
        while True:
            # Starting takes its time: torch, the libraries, the first use of the GPU.
            patience = args.case_seconds if current else args.start_seconds
            try:
                text = lines.get(timeout=max(0.1, min(patience, deadline - time.monotonic())))
            except queue.Empty:
                hung = True
                break
            if text is None:
                break
            if not text.startswith("{"):
                continue
            line = json.loads(text)
            if "begin" in line:
                current = line
            elif "case" in line:
                skip, current = line["number"] + 1, None
                yield line
            elif line.get("done"):
                done = True
        process.kill()
        code = process.wait()
        reader.join(timeout=2)
        if done:
            return
        late = time.monotonic() >= deadline
        last = next((n.strip() for n in reversed(noise) if n.strip()), "")
        why = (
            "out of time"
            if late
            else f"no answer in {patience:g} s"
            if hung
            else f"the process ended with {code}: {last}"
        )
        if current is not None:
            skip = current["number"] + 1
            case = {"op": current["op"], "case": current["begin"], "number": current["number"]}
            yield case | {"fault": why, "seconds": 0.0}
        elif code != 3 or hung:
            yield {"op": "-", "case": "(start)", "number": -1, "fault": why, "seconds": 0.0}
            return
        if late:
            return


def _pump(stream, lines: queue.Queue) -> None:
    for text in stream:
        lines.put(text)
    lines.put(None)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=("cuda", "emu", "cpu"), default="cuda")
    parser.add_argument("--family", default="", help="one family; default: all")
    parser.add_argument("--op", default="", help="comma-separated ops; default: all")
    parser.add_argument("--select", default="", help="regular expression on '<op> <case>'")
    parser.add_argument("--per-op", type=int, default=0, help="so many cases of each op; 0: all")
    parser.add_argument("--large", action="store_true", help="also more than 2^31 elements (tens of GB)")
    parser.add_argument("--seconds", type=float, default=600.0, help="for everything")
    parser.add_argument("--case-seconds", type=float, default=60.0, help="after this a case counts as hung")
    parser.add_argument("--start-seconds", type=float, default=120.0, help="for a process to come up")
    parser.add_argument("--out", type=Path, help="JSON file with every result")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--skip", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        return worker(args)

    deadline = time.monotonic() + args.seconds
    results: list[dict] = []
    for family in [args.family] if args.family else FAMILIES:
        for result in watch(args, family, deadline):
            results.append(result)
            if result["fault"]:
                print(f"FAIL {result['op']} {result['case']}: {result['fault']}", flush=True)
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps({"backend": args.backend, "results": results}, indent=1) + "\n")
    failed = sum(bool(r["fault"]) for r in results)
    print(f"{args.backend}: {len(results) - failed} of {len(results)} cases passed")
    for op in dict.fromkeys(r["op"] for r in results):
        mine = [r for r in results if r["op"] == op]
        bad = sum(bool(r["fault"]) for r in mine)
        seconds = sum(r["seconds"] for r in mine)
        print(f"{op:<24} {len(mine) - bad:4d} passed {bad:4d} failed {seconds:6.1f} s")
    return 1 if failed or not results else 0


if __name__ == "__main__":
    sys.exit(main())
