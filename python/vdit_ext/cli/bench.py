"""``vdit bench``: how fast attention is here, next to torch's dense attention in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .console import Reporter, print_json, stdout
from .errors import Refusal, command, refusing

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Shape:
    """What is timed: ``[1, heads, tokens, head_dim]``, uniform blocks, a share of them kept in each row."""

    tokens: int
    heads: int
    head_dim: int
    block: int
    density: float
    dtype: str
    device: str


@command
def bench(
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Sequence length.")] = 4096,
    heads: Annotated[int, typer.Option("--heads", min=1)] = 4,
    head_dim: Annotated[int, typer.Option("--head-dim", min=8, help="64, 96 or 128 on a GPU.")] = 64,
    density: Annotated[
        float, typer.Option("--density", help="Share of key blocks that each query block keeps.")
    ] = 0.25,
    block: Annotated[int, typer.Option("--block", min=1, help="Tokens in a block.")] = 128,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="By default float32 on a CPU, bfloat16 on a GPU.")
    ] = None,
    device: options.Device = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Timed calls; the median counts.")] = 9,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Time block-sparse attention against torch's dense scaled_dot_product_attention at one size.

    The result is checked against the op's definition first; the calls of both alternate, and medians count.
    The benches of the source tree (bench/run.py) cover more ops and sizes.
    """
    shape = _shape(tokens, heads, head_dim, block, density, dtype, device)
    reporter = Reporter(quiet)
    with reporter.waiting("loading"):
        inputs = _inputs(shape)
    with refusing(RuntimeError):  # the op itself checks sizes and dtype
        got = _attend(shape, *inputs)
    _check(shape, got, *inputs)
    result = _time(shape, inputs, repeats, reporter)
    if as_json:
        print_json(result)
        return
    stdout().print(_table(result))
    stdout().print(
        f"{result['machine']}; torch {result['versions']['torch']}, {result['threads']} threads",
        style="dim",
        soft_wrap=True,
    )


def _shape(
    tokens: int, heads: int, head_dim: int, block: int, density: float, dtype: str | None, device: str | None
) -> Shape:
    if not 0 < density <= 1:
        raise Refusal(f"--density: a share above 0 and at most 1 was expected, got {density:g}")
    if dtype is not None and dtype not in options.DTYPES:
        raise Refusal(f"--dtype: one of {', '.join(options.DTYPES)} was expected, got {dtype!r}")
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.check_device(device)
    dtype = dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    return Shape(tokens, heads, head_dim, block, density, dtype, device)


def _inputs(shape: Shape) -> tuple[torch.Tensor, ...]:
    """q, k, v and block lists; each query block keeps the same number of key blocks, drawn by seed 0."""
    import torch

    from ..ops import lists_from_mask

    generator = torch.Generator().manual_seed(0)
    size = (1, shape.heads, shape.tokens, shape.head_dim)
    dtype = getattr(torch, shape.dtype)
    q, k, v = (torch.randn(size, generator=generator).to(shape.device, dtype) for _ in range(3))
    blocks = -(-shape.tokens // shape.block)
    kept = max(1, round(shape.density * blocks))
    order = torch.rand(1, shape.heads, blocks, blocks, generator=generator).argsort(-1).argsort(-1)
    counts, lists = lists_from_mask(order < kept)
    return q, k, v, counts.to(shape.device), lists.to(shape.device)


def _attend(shape: Shape, q, k, v, counts, lists):
    from ..ops import block_sparse_attention

    return block_sparse_attention(q, k, v, counts, lists, q_block_size=shape.block, kv_block_size=shape.block)[
        0
    ]


def _check(shape: Shape, got, q, k, v, counts, lists) -> None:
    """Compare the first and the last query block of the first head with the definition."""
    import torch

    from ..ops.attention import block_sparse_attention_naive
    from ..testing import TOLERANCE

    for i in {0, counts.shape[-1] - 1}:
        rows = slice(i * shape.block, (i + 1) * shape.block)
        one = (t[:, :1].cpu() for t in (q[:, :, rows], k, v, counts[..., i : i + 1], lists[..., i : i + 1, :]))
        expected, _ = block_sparse_attention_naive(*one, q_block_size=shape.block, kv_block_size=shape.block)
        worst = float((got[:, :1, rows].cpu().float() - expected.float()).abs().max())
        limit = TOLERANCE[getattr(torch, shape.dtype)] * max(1.0, float(expected.abs().max()))
        if not worst <= limit:
            raise ArithmeticError(
                f"block_sparse_attention is off by {worst:.2e} from its definition, over {limit:.2e}"
            )


def _time(shape: Shape, inputs: tuple, repeats: int, reporter: Reporter) -> dict[str, Any]:
    import torch

    from ..sparse.plan import BlockPlan
    from .machine import machine, versions

    q, k, v, counts, lists = inputs
    plan = BlockPlan(counts, lists, q_block_size=shape.block, kv_block_size=shape.block)
    density = float(plan.density(shape.tokens, shape.tokens).mean())
    calls = {
        "torch dense": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v),
        "vdit block-sparse": lambda: _attend(shape, *inputs),
    }
    with reporter.bars():
        seconds = _medians(list(calls.values()), repeats, shape.device, reporter.track("timing", repeats))
    work = 4.0 * shape.heads * shape.tokens**2 * shape.head_dim
    rows = [
        {"name": name, "density": d, "us": s * 1e6, "tflops": work * d / s / 1e12, "speedup": seconds[0] / s}
        for name, d, s in zip(calls, (1.0, density), seconds, strict=True)
    ]
    ideal = 1 / density
    return asdict(shape) | {
        "density": density,
        "repeats": repeats,
        "results": rows,
        "share_of_ideal": rows[1]["speedup"] / ideal,
        "threads": torch.get_num_threads(),
        "machine": machine(),
        "versions": versions(),
    }


def _medians(calls: list[Callable], repeats: int, device: str, tick: Callable) -> list[float]:
    import torch

    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    # Larger than any L2 cache: what one call leaves there must not help the next.
    scrub = torch.empty(2**26, dtype=torch.int32, device=device) if device.startswith("cuda") else None
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for done in range(repeats):
        for call, mine in zip(calls, times, strict=True):
            if scrub is not None:
                scrub.zero_()
            wait()
            start = time.perf_counter()
            call()
            wait()
            mine.append(time.perf_counter() - start)
        tick(done + 1, repeats)
    return [statistics.median(mine) for mine in times]


def _table(result: dict[str, Any]):
    from rich.table import Table

    title = (
        f"[1, {result['heads']}, {result['tokens']}, {result['head_dim']}] {result['dtype']} "
        f"on {result['device']}, blocks of {result['block']}, median of {result['repeats']}"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("attention")
    for column in ("kept", "us", "TFLOP/s", "speedup", "of ideal"):
        table.add_column(column, justify="right")
    for row in result["results"]:
        ideal = f"{100 * row['speedup'] * row['density']:.0f} %"
        table.add_row(
            row["name"],
            f"{100 * row['density']:.1f} %",
            f"{row['us']:,.0f}",
            f"{row['tflops']:.3f}",
            f"{row['speedup']:.2f}x",
            ideal,
        )
    return table
