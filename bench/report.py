"""Rows as a table on the terminal, as Markdown and as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def columns(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Heading and cells, one line a row; every peer that was measured anywhere gets a column."""
    peers: list[str] = []
    for row in rows:
        peers += [name for name, peer in row.get("peers", {}).items() if name not in peers and "ratio" in peer]
    targets = any(row.get("target") for row in rows)
    head = ["op", "case", "dtype", "device", "us", "TFLOP/s", "GB/s", "of floor"]
    head += [f"/ {name}" for name in peers]
    processor = any((row.get("target") or {}).get("cpu_measured") for row in rows)
    head += (["CPU time / peer"] if processor else []) + (["target", "verdict"] if targets else [])
    return head, [_cells(row, peers, targets, processor) for row in rows]


def _cells(row: dict, peers: list[str], targets: bool, processor: bool) -> list[str]:
    cells = [row["op"], row["case"], row["dtype"], row["device"]]
    if row["status"] == "timed":
        cells += [_us(row["us"]), _rate(row["tflops"]), _rate(row["gbps"]), _share(row)]
        cells += [_ratio(row["peers"].get(name)) for name in peers]
    else:
        cells += [row["status"], "", "", ""] + [""] * len(peers)
    target = row.get("target") or {}
    if processor:
        cells.append(f"{target['cpu_measured']:.2f}" if target.get("cpu_measured") else "-")
    if targets:
        cells += [f"<= {target['at_most']:g}" if target else "", target.get("verdict", "")]
    return cells


def _us(us: float) -> str:
    return f"{us:,.0f}" if us >= 100 else f"{us:.1f}"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value else "-"


def _share(row: dict) -> str:
    share = row.get("floor_share")
    return f"{100 * share:.0f} % {row['floor_bound']}" if share else "-"


def _ratio(peer: dict | None) -> str:
    return f"{peer['ratio']:.2f}" if peer and "ratio" in peer else "-"


def reasons(rows: list[dict]) -> list[str]:
    """Peers that could not run, why, and in how many rows."""
    found: dict[str, int] = {}
    for row in rows:
        for name, peer in row.get("peers", {}).items():
            if "reason" in peer:
                line = f"{name}: {peer['reason']}"
                found[line] = found.get(line, 0) + 1
    return [f"{line} ({count} row{'s' if count > 1 else ''})" for line, count in found.items()]


def head_lines(result: dict) -> list[str]:
    """Machine, versions, ceilings and load, a line each."""
    machine, gpu = result["machine"], result["machine"]["gpu"]
    lines = [
        f"Command: `{result['command']}`",
        f"Date: {result['date']}; commit {result['commit']}"
        + (" with uncommitted changes" if result["uncommitted_changes"] else ""),
        f"CPU: {machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['cpu_capability']}, {machine['system']}",
    ]
    built = ", ".join(f"{name} {when}" for name, when in result["libraries"].items())
    lines.append(f"Libraries built: {built}")
    if gpu:
        extra = "; ".join(f"{key} {value}" for key, value in gpu.items() if key not in ("name", "memory_bytes"))
        lines.append(f"GPU: {gpu['name']}; {extra}")
    else:
        lines.append("GPU: none")
    lines.append("Versions: " + ", ".join(f"{name} {version}" for name, version in result["versions"].items()))
    load = result["load_average"]
    lines.append(
        f"Load average (1, 5, 15 minutes): {load['start']} at the start, {load['end']} at the end; "
        f"niceness {machine['niceness']}"
    )
    for ceiling in result["ceilings"]:
        rates = [f"{name} {_engineering(rate)}, from the table" for name, rate in ceiling["known"].items()]
        rates += [
            f"{name} {_engineering(rate)}, best measured in this run"
            for name, rate in ceiling["measured"].items()
        ]
        lines.append(f"Ceilings of {ceiling['device']}: " + "; ".join(rates))
    return lines


def _engineering(rate: float) -> str:
    return f"{rate / 1e12:.3g} T/s" if rate >= 1e12 else f"{rate / 1e9:.3g} G/s"


def notes(result: dict) -> list[str]:
    """What must stand below the table: failures, absent peers, the verdict."""
    lines = []
    for row in result["rows"]:
        if row["status"] != "timed":
            lines.append(
                f"Not timed: {row['op']} {row['case']} {row['dtype']} on {row['device']}: {row['check']}"
            )
    lines += [f"Peer not measured: {line}" for line in reasons(result["rows"])]
    verdicts = [row["target"]["verdict"] for row in result["rows"] if row.get("target")]
    if verdicts:
        lines.append(f"Targets: {verdicts.count('pass')} of {len(verdicts)} met")
    return lines


def markdown(result: dict) -> str:
    head, body = columns(result["rows"])
    lines = [f"# {result['family']}, {result['date'][:10]}", ""]
    lines += [f"- {line}" for line in head_lines(result)]
    lines += [
        "",
        "`/ peer` is our time over the peer's in the same rounds (below 1 is faster); dense peers are scaled "
        "by the kept density. `of floor` is the least time that the machine allows over ours, and what binds. "
        "`CPU time / peer` is the ratio to the target's peer in processor time of all threads, which other "
        "work on the machine moves less.",
        "",
    ]
    for table in result.get("tables", []):
        lines += [f"## {table['title']}", "", table["note"], "", *_markdown(table["head"], table["cells"])]
        lines += ["", table["last"], ""] if table["last"] else [""]
    lines += _markdown(head, body)
    lines += ["", *[f"- {line}" for line in notes(result)]]
    return "\n".join(lines).rstrip() + "\n"


def _markdown(head: list[str], body: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *body]]


def table_lines(result: dict) -> list[str]:
    """The tables that a family makes of its rows, aligned; last, because a log is read from its end."""
    lines: list[str] = []
    for table in result.get("tables", []):
        lines += ["", table["title"], *_aligned(table["head"], table["cells"])]
        lines += [table["last"]] if table["last"] else []
    return lines


def show(result: dict, *, stream=None) -> None:
    """The table on the terminal: rich where it is installed and somebody looks, else aligned text."""
    stream = stream or sys.stdout
    head, body = columns(result["rows"])
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        _plain(head, body, stream)
    else:
        table = Table(title=result["family"], title_justify="left")
        for i, name in enumerate(head):
            table.add_column(name, justify="left" if i < 4 else "right", no_wrap=i < 4)
        for cells in body:
            table.add_row(*(_coloured(cell) for cell in cells))
        Console(file=stream, width=None if stream.isatty() else 200).print(table)
    for line in [*head_lines(result), *notes(result), *table_lines(result)]:
        print(line, file=stream)


def _coloured(cell: str) -> str:
    return {"pass": "[green]pass[/]", "fail": "[red]fail[/]", "check failed": "[red]check failed[/]"}.get(
        cell, cell
    )


def _plain(head: list[str], body: list[list[str]], stream) -> None:
    for line in _aligned(head, body):
        print(line, file=stream)


def _aligned(head: list[str], body: list[list[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [head, *body]
    ]


def write(result: dict, folder: Path, name: str) -> tuple[Path, Path]:
    """Write ``name``.json and ``name``.md into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / f"{name}.json", folder / f"{name}.md"
    paths[0].write_text(_json(_rounded(result)))
    paths[1].write_text(markdown(result))
    return paths


def _json(result: dict) -> str:
    """Indented, but a line a row: samples would otherwise fill the screen."""
    rows = ",\n  ".join(json.dumps(row) for row in result["rows"])
    head = json.dumps(result | {"rows": []}, indent=1)
    return head.replace('"rows": []', f'"rows": [\n  {rows}\n ]' if rows else '"rows": []') + "\n"


def _rounded(value):
    """Ten significant digits are plenty, and keep the files small."""
    if isinstance(value, float):
        return float(f"{value:.10g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
