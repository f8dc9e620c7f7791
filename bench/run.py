#!/usr/bin/env python
"""Check, time and compare the ops of a family: ``python bench/run.py attention --help``.

Protocol and how to read the table: bench/README.md.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.util
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT / "tests", ROOT / "bench"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
if importlib.util.find_spec("vdit_ext") is None:
    sys.path.insert(0, str(ROOT / "python"))

import torch  # noqa: E402
from harness import Settings, measure, short  # noqa: E402
from machine import Ceilings, facts, libraries, load_average, slug  # noqa: E402
from report import show, write  # noqa: E402

FAMILIES = ("attention", "hopper", "layer", "linear", "vq")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/run.py", description=__doc__.splitlines()[0])
    families = parser.add_subparsers(dest="family", required=True, metavar="|".join(FAMILIES))
    for name in FAMILIES:
        family = families.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        family.add_argument(
            "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where usable"
        )
        family.add_argument(
            "--seconds", type=float, default=10.0, help="time for each group, checks not included"
        )
        family.add_argument("--min-rounds", type=int, default=5, help="at least so many rounds")
        family.add_argument("--max-rounds", type=int, default=51, help="at most so many rounds")
        family.add_argument(
            "--budget", type=float, default=0.0, help="seconds after which no group is begun; 0: none"
        )
        family.add_argument(
            "--out", type=Path, default=ROOT / "bench" / "results", help="folder for JSON and Markdown"
        )
        family.add_argument(
            "--name", default="", help="name of the result files; default: date, machine, family"
        )
        family.add_argument("--no-files", action="store_true", help="only print")
        module = importlib.import_module(f"bench_{name}")
        if hasattr(module, "apply_figures"):
            family.add_argument(
                "--figures", action="store_true", help="the promised CPU figures against their targets"
            )
        module.add_arguments(family)
    return parser.parse_args(argv)


def resolve_device(device: str) -> str:
    from vdit_ext import ops

    usable = torch.cuda.is_available() and ops.LIBRARIES["cuda"] == "loaded"
    if device == "auto":
        return "cuda" if usable else "cpu"
    if device == "cuda" and not usable:
        reason = ops.LIBRARIES["cuda"] if torch.cuda.is_available() else "torch sees no GPU"
        raise SystemExit(f"--device cuda: {reason}")
    return device


def run(args: argparse.Namespace, argv: list[str], save: Callable[[dict], None]) -> dict:
    """Measure everything that was selected and return the result that the files hold.

    ``save`` gets the result after every group, so that a run that is cut short leaves what it had.
    """
    family = importlib.import_module(f"bench_{args.family}")
    promised = getattr(args, "figures", False)
    if promised:
        family.apply_figures(args)
    device = resolve_device(args.device)
    settings = Settings(args.seconds, args.min_rounds, args.max_rounds)
    begun = time.perf_counter()
    dtypes = family.dtypes_of(args, device)
    ceilings = Ceilings(device)
    result = {
        "schema": 1,
        "family": f"{args.family}-figures" if promised else args.family,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": "python bench/run.py " + " ".join(hide_paths(argv)),
        **facts(),
        "libraries": libraries(),
        "settings": vars(settings),
        "load_average": {"start": load_average()},
        "groups_not_begun": 0,
        "rows": [],
    }

    def update() -> None:
        for row in result["rows"]:
            add_floor(row, ceilings)
        result["seconds"] = time.perf_counter() - begun
        result["load_average"]["end"] = load_average()
        result["ceilings"] = [ceilings.describe()]
        if hasattr(family, "tables_of"):
            result["tables"] = family.tables_of(result["rows"])
        save(result)

    ceilings.measure(dtypes)
    for build in family.groups(args, device):
        if args.budget and time.perf_counter() - begun > args.budget:
            result["groups_not_begun"] += 1
            continue
        started = time.perf_counter()
        try:
            group = build()
            name = group.name
            rows = measure(group, settings, say)
            del group
        except Exception as error:
            name, rows = "a group", [unmade(device, short(error))]
        result["rows"] += rows
        say(f"{name}: {time.perf_counter() - started:.0f} s")
        for row in rows:
            say("  " + one_line(row))
        update()
    ceilings.measure(dtypes)
    if result["groups_not_begun"]:
        say(f"{result['groups_not_begun']} groups were not begun: the budget of {args.budget:g} s was spent")
    update()
    return result


def one_line(row: dict) -> str:
    """For the log: what there is if the run never comes to its table."""
    if row["status"] != "timed":
        return f"{row['op']} {row['case']} {row['dtype']}: {row['status']}: {row['check']}"
    ratios = [f"{peer['ratio']:.2f} x {name}" for name, peer in row["peers"].items() if "ratio" in peer]
    return f"{row['op']} {row['case']} {row['dtype']}: {row['us']:,.1f} us; {', '.join(ratios)}"


def add_floor(row: dict, ceilings: Ceilings) -> None:
    dtype = getattr(torch, row["dtype"], None)
    row["floor_us"], row["floor_bound"] = ceilings.floor(row, dtype)
    row["floor_share"] = row["floor_us"] / row["us"] if row.get("us") else None


def unmade(device: str, reason: str) -> dict:
    """The row of a group whose tensors could not be made."""
    return {
        "group": "", "op": "-", "case": "-", "dtype": "-", "device": device, "sizes": {},
        "flops": 0.0, "bytes": 0.0, "exps": 0.0, "check": reason, "status": "not made",
    }  # fmt: skip


def hide_paths(argv: list[str]) -> list[str]:
    """Arguments without absolute folders, which say nothing to a reader elsewhere."""
    return [re.sub(r"^(--\w+=)?/.*/", r"\1.../", arg) for arg in argv]


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Returns 1 when a check failed; a missed target is a finding, not an error."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)

    def save(result: dict) -> None:
        if not args.no_files:
            name = args.name or f"{result['date'][:10]}_{slug(result)}_{result['family']}"
            write(result, args.out, name)

    with torch.inference_mode():
        result = run(args, argv, save)
    show(result)
    return 1 if any(row["status"] != "timed" for row in result["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
