"""Linear family: quantization and product together, against the bf16 layer they replace and 8-bit products."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import linear_peers
import torch
from cases import linear as cases
from harness import Case, Group, NotHere, Peer, short
from torch import Tensor

from vdit_ext import ops
from vdit_ext.ops import linear as defs
from vdit_ext.testing import TOLERANCE, assert_close

FORMATS = cases.FORMATS
BITS = {"int8": 8, "int4": 4, "nibble_planes": 8, "log4": 4, "log3": 4}  # as stored
CHECKED_ROWS = 16
BF16, PRODUCT = "bf16 linear", "_int_mm"
# Speeds over the bf16 layer and over the fastest 8-bit product of the run, quantization included; the longest
# time of W4A8 in units of W8A8's; the largest share of quantization in the whole. Promised for two formats.
PROMISED = ("int8", "int4")
FIGURES = {
    "cpu": {"bf16": 1.5, "product": 0.8, "w4a8": 1.1, "quantize": None},
    "cuda": {"bf16": 1.7, "product": 0.95, "w4a8": None, "quantize": 0.03},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shapes",
        default="",
        help=f"comma-separated: {', '.join(cases.sizes)}, or MxKxN; default: squares on CPU, models on CUDA",
    )
    parser.add_argument(
        "--formats", default="int8,int4,log4", help=f"comma-separated, among {', '.join(FORMATS)}"
    )
    parser.add_argument("--select", default="", help="regular expression on '<op> <case>'")


def apply_figures(args: argparse.Namespace) -> None:
    """The settings behind the figures that the project promises."""
    args.shapes, args.formats, args.device = ",".join(map(str, cases.squares)), "int8,int4", "cpu"
    args.seconds, args.min_rounds = 30.0, 5


def groups(args: argparse.Namespace, device: str) -> Iterator[Callable[[], Group]]:
    """Builders of the selected groups, one a size; each makes its tensors when it is called."""
    names = args.shapes.split(",") if args.shapes else [str(s) for s in default_sizes(device)]
    formats = args.formats.split(",")
    if unknown := set(formats) - set(FORMATS):
        raise SystemExit(f"--formats: expected names among {', '.join(FORMATS)}, got {', '.join(unknown)}")
    for size in [size_of(name) for name in names]:
        yield lambda s=size: size_group(s, formats, device, re.compile(args.select))


def default_sizes(device: str) -> list[cases.LinearSize]:
    return cases.real if device.startswith("cuda") else cases.squares


def size_of(name: str) -> cases.LinearSize:
    if name in cases.sizes:
        return cases.sizes[name]
    if not re.fullmatch(r"\d+x\d+x\d+", name):
        raise SystemExit(f"--shapes: expected MxKxN or names among {', '.join(cases.sizes)}, got {name}")
    return cases.LinearSize(name, *map(int, name.split("x")))


def dtypes_of(args: argparse.Namespace, device: str) -> set[torch.dtype]:
    """None: torch has no product of int8 matrices whose rate a ceiling could be taken from."""
    return set()


# ---------------------------------------------------------------------------------------------------------
# One size
# ---------------------------------------------------------------------------------------------------------


@dataclass
class Tensors:
    """What the cases of one size share; codes and scales are those of ``x`` and ``weight``."""

    x: Tensor  # bf16 [M, K]
    weight: Tensor  # bf16 [N, K]
    codes: Tensor
    x_scale: Tensor
    weight_codes: Tensor
    weight_scale: Tensor


def make_tensors(size: cases.LinearSize, device: str) -> Tensors:
    gen = torch.Generator(device).manual_seed(0)
    x = torch.randn(size.m, size.k, generator=gen, device=device, dtype=torch.bfloat16)
    weight = torch.randn(size.n, size.k, generator=gen, device=device, dtype=torch.bfloat16) * size.k**-0.5
    codes, x_scale, _ = ops.quantize_rows(x)
    weight_codes, weight_scale, _ = ops.quantize_rows(weight)
    return Tensors(x, weight, codes, x_scale, weight_codes, weight_scale)


def size_group(size: cases.LinearSize, formats: list[str], device: str, chosen: re.Pattern) -> Group:
    """Quantization, the products alone and both together, with the peers that they share."""
    t = make_tensors(size, device)
    group = Group(f"linear {size} {size.m} x {size.k} -> {size.n}", device, [])
    absent = add_peers(group, t)
    add = [quantize_case(size, t)]
    for name in formats:
        add += linear_cases(size, name, t, device)
    for case in add:
        if chosen.search(f"{case.op} {case.name}"):
            if case.op != "quantize_rows":
                case.peers = [Peer(name, name, check=peer_check(name, t)) for name in group.calls] + absent
            group.cases.append(case)
    return group


def add_peers(group: Group, t: Tensors) -> list[Peer]:
    """Names the peers of a group in its calls; returns those that are not here."""
    absent = []
    for name, make in (
        (BF16, lambda: linear_peers.bf16_linear(t.x, t.weight)),
        (PRODUCT, lambda: linear_peers.int_mm(t.codes, t.weight_codes)),
        ("_scaled_mm", lambda: linear_peers.scaled_mm(t.x, t.weight)),
        ("vLLM int8", lambda: linear_peers.vllm_int8(t.codes, t.x_scale, t.weight_codes, t.weight_scale)),
    ):
        try:
            group.calls[name] = make()
        except NotHere as reason:
            absent.append(Peer(name, reason=str(reason)))
        except Exception as error:
            absent.append(Peer(name, reason=short(error)))
    return absent


def peer_check(name: str, t: Tensors) -> Callable[[Tensor], None] | None:
    """Only what computes on our codes is held to an exact result."""
    if name != PRODUCT:
        return None
    rows = checked_rows(t.x.shape[0]).to(t.x.device)
    expected = (t.codes[rows].double() @ t.weight_codes.double().T).to(torch.int64)

    def check(result: Tensor) -> None:
        assert torch.equal(result[rows].long(), expected), "torch._int_mm is not the exact product"

    return check


def checked_rows(m: int) -> Tensor:
    """Row numbers from the first to the last."""
    return torch.linspace(0, m - 1, min(m, CHECKED_ROWS)).round().long().unique()


# ---------------------------------------------------------------------------------------------------------
# Cases
# ---------------------------------------------------------------------------------------------------------


def quantize_case(size: cases.LinearSize, t: Tensors) -> Case:
    rows = checked_rows(size.m).to(t.x.device)

    def check(result) -> None:
        codes, scale, total = result
        expected, expected_scale, _ = defs.quantize_rows_naive(t.x[rows])
        assert_close(scale[rows], expected_scale, tolerance=1e-6, what="scale")
        # The definition divides in fp64: what lies half way between two codes may fall to either side.
        assert int((codes[rows].int() - expected.int()).abs().max()) <= 1, "codes differ by more than one"
        assert torch.equal(total, codes.sum(-1, dtype=torch.int32)), "sum is not the sum of the codes"

    traffic = t.x.numel() * 3 + 8 * size.m
    return Case(
        "quantize_rows",
        str(size),
        torch.bfloat16,
        lambda: ops.quantize_rows(t.x),
        check,
        nbytes=traffic,
        sizes=describe(size, None),
    )


def linear_cases(size: cases.LinearSize, format: str, t: Tensors, device: str) -> list[Case]:
    """The product alone, on codes that are there, and with the quantization of its rows."""
    op, multiply, naive = weight_of(size, format, t)
    rows = checked_rows(size.m).to(t.x.device)

    def check(result: Tensor) -> None:
        assert not result.isnan().any(), "out holds NaN: elements that were never written, or a real NaN"
        expected = naive(*defs.quantize_rows_naive(t.x[rows]))
        assert_close(result[rows], expected, tolerance=TOLERANCE[torch.bfloat16], what="out")

    quantized = ops.quantize_rows(t.x)
    # Activations (bf16, or codes, scales and sums), weights and results, once each.
    weight_bytes = size.n * size.k * BITS[format] / 8
    traffic = weight_bytes + 2 * size.m * size.n
    made = []
    for part, call, bytes_in in (
        ("whole", lambda: multiply(*ops.quantize_rows(t.x)), 2 * t.x.numel()),
        ("product", lambda: multiply(*quantized), t.x.numel() + 8 * size.m),
    ):
        case = Case(op, f"{size}_{format}_{part}", torch.int8, call, check)
        case.flops, case.nbytes = 2.0 * size.m * size.n * size.k, traffic + bytes_in
        case.sizes = describe(size, format) | {"part": part, "weight_bytes": weight_bytes}
        if part == "whole" and format in PROMISED:
            case.target = (BF16, 1 / FIGURES[device]["bf16"])
        made.append(case)
    return made


def describe(size: cases.LinearSize, format: str | None) -> dict:
    return {"shape": str(size), "m": size.m, "k": size.k, "n": size.n, "format": format}


def weight_of(size: cases.LinearSize, format: str, t: Tensors) -> tuple[str, Callable, Callable]:
    """Op, product and definition of a format, as functions of codes, scale and sum of the rows."""
    gen = torch.Generator().manual_seed(1)
    scale = t.weight_scale
    if format == "int8":
        return (
            "w8a8_linear",
            lambda x, s, a: ops.w8a8_linear(x, s, t.weight_codes, scale, x_sum=a),
            lambda x, s, a: defs.w8a8_linear_naive(x, s, t.weight_codes, scale, x_sum=a),
        )
    case = cases.LinearCase(str(size), (size.m,), size.k, size.n)
    weights = [w.to(t.x.device) for w in cases.make_weight_codes(case, format, gen)]
    if format in ("int4", "nibble_planes"):
        zero = torch.full_like(scale, -7.5 if format == "int4" else 0.5)
        low = {"weight_low": weights[1]} if format == "nibble_planes" else {}
        return (
            "w4a8_linear",
            lambda x, s, a: ops.w4a8_linear(x, s, a, weights[0], scale, zero, **low),
            lambda x, s, a: defs.w4a8_linear_naive(x, s, a, weights[0], scale, zero, **low),
        )
    return (
        "log4a8_linear",
        lambda x, s, _: ops.log4a8_linear(x, s, *weights, scale),
        lambda x, s, _: defs.log4a8_linear_naive(x, s, *weights, scale),
    )


# ---------------------------------------------------------------------------------------------------------
# The figures
# ---------------------------------------------------------------------------------------------------------


def tables_of(rows: list[dict]) -> list[dict]:
    """One line a size and format: speeds, quantization included, beside what they must be."""
    timed = [row for row in rows if row["status"] == "timed"]
    whole = [row for row in timed if row["sizes"].get("part") == "whole"]
    if not whole:
        return []
    head = [
        "size",
        "format",
        "x bf16 linear",
        "x fastest 8-bit product",
        "/ W8A8",
        "quantization",
        "weight / bf16",
    ]
    cells = [figure_cells(row, timed) for row in whole]
    if any("cpu_us" in row for row in whole):
        head.append("both speeds in processor time")
        cells = [[*line, processor_speeds(row)] for line, row in zip(cells, whole, strict=True)]
    note = (
        "Speeds of quantization and product together: bf16 in, bf16 out. The 8-bit products (`_int_mm`, "
        "`_scaled_mm` and vLLM's, as far as they ran) begin with numbers of 8 bits and have no part in making "
        "them. `/ W8A8` is a time in units of W8A8's; `quantization` is its share of the whole. In brackets: "
        "what it must be."
    )
    return [{"title": "Figures", "note": note, "head": head, "cells": cells, "last": ""}]


def figure_cells(row: dict, timed: list[dict]) -> list[str]:
    sizes, must = row["sizes"], FIGURES[row["device"]] if row["sizes"]["format"] in PROMISED else {}
    bf16 = row["peers"].get(BF16, {}).get("ratio")
    products = [p["ratio"] for name, p in row["peers"].items() if name != BF16 and "ratio" in p]
    w8a8 = find(timed, sizes["shape"], format="int8", part="whole")
    quantize = find(timed, sizes["shape"], op="quantize_rows")
    return [
        sizes["shape"],
        sizes["format"],
        cell(1 / bf16 if bf16 else None, must.get("bf16"), at_least=True),
        cell(1 / max(products) if products else None, must.get("product"), at_least=True),
        cell(row["us"] / w8a8["us"] if w8a8 and w8a8 is not row else None, must.get("w4a8"), at_least=False),
        cell(quantize["us"] / row["us"] if quantize else None, must.get("quantize"), at_least=False),
        f"{sizes['weight_bytes'] / (2 * sizes['n'] * sizes['k']):.2f}",
    ]


def processor_speeds(row: dict) -> str:
    """The first two figures by processor time of all threads, which other work on the machine moves less."""
    ratios = {name: peer["cpu_ratio"] for name, peer in row["peers"].items() if "cpu_ratio" in peer}
    bf16 = ratios.pop(BF16, None)
    found = [bf16, max(ratios.values(), default=None)]
    return ", ".join(f"{1 / ratio:.3f}" if ratio else "-" for ratio in found)


def find(rows: list[dict], shape: str, op: str = "", **sizes) -> dict | None:
    wanted = {"shape": shape, **sizes}
    return next(
        (
            row
            for row in rows
            if (not op or row["op"] == op)
            and all(row["sizes"].get(key) == value for key, value in wanted.items())
        ),
        None,
    )


def cell(value: float | None, bound: float | None, *, at_least: bool) -> str:
    """``1.72 (1.5) pass``."""
    if value is None:
        return "-"
    if bound is None:
        return f"{value:.3f}"
    return f"{value:.3f} ({bound:g}) {'pass' if (value >= bound) == at_least or value == bound else 'FAIL'}"
