"""The figures that the kernels for compute capability 9.0 are held to: from rows to speed ratios and verdicts.

A row takes part when its ``sizes`` hold ``figure``: ``model``, ``kind`` and, for methods, ``method`` and
``part``.
"""

from __future__ import annotations

DENSE_SUFFIX = " x density"

# Our speed over the speed of the best dense peer at the kept density: what must be reached, and the aim.
TARGETS = {
    "dense": (0.95, 1.0),
    "b128": (0.90, 0.97),
    "variable": (0.85, 0.92),
    "b64": (0.65, 0.80),
    "d64": (0.90, 1.1),
}
# Time to plan and permute over the time of the attention itself: at most.
OVERHEAD = (0.05, 0.02)


def target_of(kind: str, head_dim: int, model: str) -> tuple[float, float] | None:
    """Must and aim of an attention case; None where none was set.

    Dense attention and blocks of 128 at head size 64 have a target of their own; the one for dense attention at
    head size 128 is set at HunyuanVideo's length only.
    """
    if head_dim == 64 and kind in ("dense", "b128"):
        return TARGETS["d64"]
    if kind == "dense" and model != "hunyuan":
        return None
    return TARGETS[kind]


def figures_of(rows: list[dict]) -> list[dict]:
    """One entry for each attention case and for each method's overhead, in the order of the rows."""
    found = []
    for row in rows:
        figure = row.get("sizes", {}).get("figure")
        if figure is None:
            continue
        if figure.get("part", "attention") == "attention":
            found.append(_attention(row, figure))
        elif figure["part"] == "plan":
            found.append(_overhead(row, figure, rows))
    return found


def _attention(row: dict, figure: dict) -> dict:
    target = target_of(figure["kind"], row["sizes"]["head_dim"], figure["model"])
    entry = {
        "case": row["case"],
        "kernel": row["sizes"].get("kernel", ""),
        "density": row["sizes"]["density"],
        "must": target[0] if target else None,
        "aim": target[1] if target else None,
    }
    if row["status"] != "timed":
        return entry | {"verdict": row["status"]}
    entry |= {"us": row["us"], "tflops": row["tflops"]}
    dense = {name: peer for name, peer in row["peers"].items() if name.endswith(DENSE_SUFFIX) and "us" in peer}
    if not dense:
        return entry | {"verdict": "no dense peer ran"}
    best = min(dense, key=lambda name: dense[name]["us"])
    # The harness has our time over (density x theirs); a speed ratio is its inverse.
    ratio = 1 / dense[best]["ratio"]
    entry |= {"peer": best.removesuffix(DENSE_SUFFIX), "peer_us": dense[best]["us"], "ratio": ratio}
    return entry | {"verdict": _verdict(ratio, target)}


def _overhead(row: dict, figure: dict, rows: list[dict]) -> dict:
    """Plan and permutation over the attention under that plan; a part that a method lacks takes no time."""
    parts = {}
    for other in rows:
        theirs = other.get("sizes", {}).get("figure") or {}
        if all(theirs.get(key) == figure[key] for key in ("model", "method")):
            parts[theirs["part"]] = other
    entry = {
        "case": f"{figure['model']}_{figure['method']} plan + permute",
        "kernel": row["sizes"].get("kernel", ""),
        "density": row["sizes"]["density"],
        "must": OVERHEAD[0],
        "aim": OVERHEAD[1],
        "at_most": True,
    }
    failed = [part for part in ("plan", "permute", "attention") if parts.get(part, row)["status"] != "timed"]
    if failed or "attention" not in parts:
        return entry | {"verdict": f"{failed[0]} was not timed" if failed else "attention was not timed"}
    plan, permute = parts["plan"]["us"], parts["permute"]["us"] if "permute" in parts else 0.0
    attention = parts["attention"]["us"]
    entry |= {"us": plan + permute, "plan_us": plan, "permute_us": permute, "attention_us": attention}
    ratio = (plan + permute) / attention
    return entry | {"ratio": ratio, "verdict": _verdict(ratio, OVERHEAD, at_most=True)}


def _verdict(ratio: float, target: tuple[float, float] | None, *, at_most: bool = False) -> str:
    if target is None:
        return "no target"
    must, aim = target
    if at_most:
        ratio, must, aim = -ratio, -must, -aim
    return "aim met" if ratio >= aim else "met" if ratio >= must else "not met"


HEAD = ["case", "kernel", "density", "ms", "TFLOP/s", "best dense peer", "peer ms", "ratio", "target", "aim"]
HEAD += ["verdict"]
TITLE = "Figures against targets"
NOTE = (
    "`ratio` is a speed: (kept density x time of the best dense peer) / our time, in the same rounds, with the "
    "density counted from the lists. For `plan + permute` it is their time over that of the attention."
)


def tables_of(rows: list[dict]) -> list[dict]:
    """The figures as a table for :mod:`report`; none where no row takes part."""
    found = figures_of(rows)
    if not found:
        return []
    return [{"title": TITLE, "note": NOTE, "head": HEAD, "cells": cells(found), "last": counted(found)}]


def cells(figures: list[dict]) -> list[list[str]]:
    """The table below :data:`HEAD`, as text."""
    lines = []
    for entry in figures:
        sign, percent = ("<=", True) if entry.get("at_most") else (">=", False)
        show = (lambda x: f"{100 * x:.1f} %") if percent else (lambda x: f"{x:.2f}")
        ms = f"{entry['us'] / 1e3:.3f}" if "us" in entry else "-"
        peer, peer_ms = entry.get("peer", "-"), f"{entry['peer_us'] / 1e3:.3f}" if "peer_us" in entry else "-"
        if "plan_us" in entry:
            ms += f" = {entry['plan_us'] / 1e3:.3f} + {entry['permute_us'] / 1e3:.3f}"
            peer, peer_ms = "own attention", f"{entry['attention_us'] / 1e3:.3f}"
        lines.append(
            [
                entry["case"],
                entry["kernel"] or "-",
                f"{entry['density']:.3f}",
                ms,
                f"{entry['tflops']:.3g}" if "tflops" in entry else "-",
                peer,
                peer_ms,
                show(entry["ratio"]) if "ratio" in entry else "-",
                f"{sign} {show(entry['must'])}" if entry["must"] is not None else "-",
                f"{sign} {show(entry['aim'])}" if entry["aim"] is not None else "-",
                entry["verdict"],
            ]
        )
    return lines


def counted(figures: list[dict]) -> str:
    """How many of the cases that have a target met it."""
    judged = [entry for entry in figures if entry["must"] is not None]
    met = sum(entry["verdict"] in ("met", "aim met") for entry in judged)
    return f"Figures: {met} of {len(judged)} met, {sum(e['verdict'] == 'aim met' for e in judged)} at their aim"
