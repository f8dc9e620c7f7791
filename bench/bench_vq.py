"""vq family: products against the layer they replace and against decoding first; assignment and decoding."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator

import torch
from cases import vq as cases
from harness import Case, Group, Peer
from torch import Tensor
from torch.nn.functional import linear

from vdit_ext import ops
from vdit_ext.ops import vq as defs
from vdit_ext.testing import TOLERANCE, assert_close

FORMATS = {"256x4": 4, "64x2": 2}
CHECKED_ROWS = 16
BF16, FIRST = "bf16 linear", "dequantize + linear"
MANY_ROWS, FEW_ROWS = 8000, (16, 1024)  # where which figure is promised
FIGURES = {"many": (BF16, 1 / 0.98), "few": (FIRST, 0.5)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--formats", default=",".join(FORMATS), help="comma-separated codebooks")
    parser.add_argument(
        "--dtypes", default="bfloat16,int8", help="of x and the codebook: bfloat16, float16, int8"
    )
    parser.add_argument("--ops", default=",".join(defs.OPS), help="comma-separated")
    parser.add_argument("--select", default="", help="regular expression on '<op> <case>'")


def dtypes_of(args: argparse.Namespace, device: str) -> set[torch.dtype]:
    """The type whose matrix rate is a ceiling of the float products; torch has none for int8."""
    return {torch.bfloat16} & {getattr(torch, name) for name in args.dtypes.split(",")}


def groups(args: argparse.Namespace, device: str) -> Iterator[Callable[[], Group]]:
    """Builders of the selected groups, one a weight and a type; each makes its tensors when it is called."""
    chosen, wanted = re.compile(args.select), args.ops.split(",")
    if unknown := set(wanted) - set(defs.OPS):
        raise SystemExit(f"--ops: expected names among {', '.join(defs.OPS)}, got {', '.join(sorted(unknown))}")
    if unknown := set(args.formats.split(",")) - set(FORMATS):
        raise SystemExit(
            f"--formats: expected names among {', '.join(FORMATS)}, got {', '.join(sorted(unknown))}"
        )
    listed = cases.perf_cuda if device.startswith("cuda") else cases.perf_cpu
    for size in sorted({(case.k, case.n) for case in listed}):
        for name in args.formats.split(","):
            mine = [c for c in listed if (c.k, c.n) == size and chosen.search(f"vq_linear {c}_{name}")]
            for dtype in (getattr(torch, t) for t in args.dtypes.split(",")):
                if mine and "vq_linear" in wanted:
                    yield lambda m=mine, f=name, t=dtype: linear_group(m, f, t, device)
            alone = [
                op for op in wanted if op != "vq_linear" and chosen.search(f"{op} k{size[0]}_n{size[1]}_{name}")
            ]
            if alone:
                yield lambda o=alone, s=size, f=name: planner_group(o, *s, f, device)


def checked_rows(m: int) -> Tensor:
    """Row numbers from the first to the last."""
    return torch.linspace(0, m - 1, min(m, CHECKED_ROWS)).round().long().unique()


# ---------------------------------------------------------------------------------------------------------
# vq_linear
# ---------------------------------------------------------------------------------------------------------


def linear_group(listed: list[cases.LinearCase], format: str, dtype: torch.dtype, device: str) -> Group:
    """All numbers of rows over one weight, each with its two peers."""
    dim, first = FORMATS[format], listed[0]
    codes = cases.make_codes(first.n, first.k, dim).to(device)
    codebook = cases.make_codebook(dim, dtype).to(device)
    weight = ops.vq_dequantize(codes, codebook, first.n, first.k).to(torch.bfloat16)
    group = Group(f"vq_linear {first.k} -> {first.n} {format} {_name(dtype)}", device, [])
    for case in listed:
        group.cases.append(linear_case(case, format, codes, codebook, weight, group))
    return group


def linear_case(case: cases.LinearCase, format: str, codes, codebook, weight, group: Group) -> Case:
    gen = torch.Generator().manual_seed(case.lead[0])
    x = cases.make_x(case, codebook.dtype, gen).to(codes.device)
    half = x if x.dtype != torch.int8 else x.to(torch.bfloat16)
    kwargs = {"x_scale": torch.full(case.lead, 1e-4, device=x.device)} if x.dtype == torch.int8 else {}
    rows = checked_rows(case.lead[0])
    scale = {name: value[rows] for name, value in kwargs.items()}
    # Drawn from all rows: the definition in fp64 takes long.
    expected = defs.vq_linear_naive(x[rows].cpu(), codes.cpu(), codebook.cpu(), case.n, **_cpu(scale))

    def check(result: Tensor) -> None:
        assert not result.isnan().any(), "out holds NaN: elements that were never written, or a real NaN"
        assert_close(result[rows].cpu(), expected, tolerance=TOLERANCE[torch.bfloat16], what="out")

    name = f"{case}_{format}_{_name(x.dtype)}"
    group.calls[f"{BF16} {name}"] = lambda: linear(half, weight)
    group.calls[f"{FIRST} {name}"] = lambda: linear(
        half, ops.vq_dequantize(codes, codebook, case.n, case.k).to(half.dtype)
    )
    made = Case(
        "vq_linear",
        name,
        x.dtype,
        lambda: ops.vq_linear(x, codes, codebook, case.n, **kwargs),
        check,
        flops=2.0 * case.lead[0] * case.n * case.k,
        nbytes=float(x.numel() * x.element_size() + codes.numel() + 2 * case.lead[0] * case.n),
        peers=[Peer(peer, f"{peer} {name}") for peer in (BF16, FIRST)],
        sizes={"m": case.lead[0], "k": case.k, "n": case.n, "format": format, "code_bytes": codes.numel()},
    )
    if group.device.startswith("cuda"):
        made.target = target_of(case.lead[0])
    return made


def target_of(m: int) -> tuple[str, float] | None:
    """What is promised on a GPU."""
    if m >= MANY_ROWS:
        return FIGURES["many"]
    return FIGURES["few"] if FEW_ROWS[0] <= m <= FEW_ROWS[1] else None


def _cpu(tensors: dict) -> dict:
    return {name: t.cpu() for name, t in tensors.items()}


def _name(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "int8"}.get(dtype, str(dtype))


# ---------------------------------------------------------------------------------------------------------
# vq_assign, vq_dequantize
# ---------------------------------------------------------------------------------------------------------


def planner_group(wanted: list[str], k: int, n: int, format: str, device: str) -> Group:
    group = Group(f"vq {k} -> {n} {format}", device, [])
    for op in wanted:
        group.cases.append(
            {"vq_assign": assign_case, "vq_dequantize": dequantize_case}[op](k, n, format, group)
        )
    return group


def dequantize_case(k: int, n: int, format: str, group: Group) -> Case:
    dim = FORMATS[format]
    codes = cases.make_codes(n, k, dim).to(group.device)
    codebook = cases.make_codebook(dim, torch.bfloat16).to(group.device)
    indices = ops.unpack_vq(codes, n, k).long()
    expected = codebook[indices].flatten(1)

    def check(result: Tensor) -> None:
        assert torch.equal(result, expected), "not the codebook's words"

    group.calls["codebook[indices]"] = lambda: codebook[indices]
    return Case(
        "vq_dequantize",
        f"k{k}_n{n}_{format}",
        torch.bfloat16,
        lambda: ops.vq_dequantize(codes, codebook, n, k),
        check,
        nbytes=float(codes.numel() + 2 * n * k),
        peers=[Peer("codebook[indices]", "codebook[indices]")],
        sizes={"k": k, "n": n, "format": format},
    )


def assign_case(k: int, n: int, format: str, group: Group) -> Case:
    """The two nearest words of every vector of a weight, as a search for codes asks for them."""
    dim = FORMATS[format]
    gen = torch.Generator().manual_seed(0)
    vectors = torch.randn(n * k // dim, dim, generator=gen).to(group.device)
    codebook = cases.make_codebook(dim, torch.float32).to(group.device)
    some = checked_rows(len(vectors)).to(group.device)
    true = torch.cdist(vectors[some].double(), codebook.double()).square()

    def check(result) -> None:
        chosen = true.gather(1, result[0][some].long())
        assert_close(chosen.float(), true.sort(1).values[:, :2].float(), tolerance=1e-5, what="nearest")

    def by_torch() -> None:
        for part in vectors.split(2**16):
            torch.cdist(part, codebook).topk(2, largest=False)

    group.calls["cdist and topk, in parts"] = by_torch
    return Case(
        "vq_assign",
        f"k{k}_n{n}_{format}",
        torch.float32,
        lambda: ops.vq_assign(vectors, codebook, 2),
        check,
        flops=2.0 * vectors.numel() * len(codebook),
        nbytes=float(4 * vectors.numel() + 16 * len(vectors)),
        peers=[Peer("cdist and topk, in parts", "cdist and topk, in parts")],
        sizes={"k": k, "n": n, "format": format},
    )
