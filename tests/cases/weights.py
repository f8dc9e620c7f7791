"""Seeded weight matrices, and quantizers that twin-log is compared with; shared by tests and ``bench/quant_snr.py``.

Nothing here uses the package, so that what it says of the package's quantizers is independent of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

COLUMNS = 1152
KINDS = ("gauss .03", "gauss .3", "student t4", "laplace")


def weight_rows(kind: str, rows: int = 128, columns: int = COLUMNS, seed: int = 0) -> Tensor:
    """fp32 ``[rows, columns]``; the heavy-tailed kinds have a standard deviation of .03, as the first one has."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(rows, columns, generator=generator, dtype=torch.float64)

    if kind.startswith("gauss"):
        x = float(kind.split()[1]) * normal()
    elif kind == "student t4":
        chi = sum(normal().square() for _ in range(4))
        x = 0.03 / 2**0.5 * normal() / (chi / 4).sqrt()
    elif kind == "laplace":
        u = torch.rand(rows, columns, generator=generator, dtype=torch.float64) - 0.5
        x = -0.03 / 2**0.5 * u.sign() * torch.log1p(-2 * u.abs())
    else:
        raise ValueError(f"weight_rows: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    return x.float()


def snr(wanted: Tensor, got: Tensor) -> float:
    """Signal to noise in dB."""
    wanted, got = wanted.double(), got.double()
    return float(10 * torch.log10(wanted.square().sum() / (wanted - got).square().sum()))


def uniform_min_max(weight: Tensor, bits: int, shrink: Tensor | float = 1.0) -> Tensor:
    """Round to nearest on a grid of 2^bits points from each row's least to its largest value, 0 among them.

    shrink: a factor on both ends, a number or ``[rows, 1]``.
    """
    weight = weight.double()
    low = weight.amin(1, keepdim=True).clamp(max=0) * shrink
    high = weight.amax(1, keepdim=True).clamp(min=0) * shrink
    step = ((high - low) / (2**bits - 1)).clamp(min=1e-300)
    zero = (-low / step).round()
    return ((weight / step).round() + zero).clamp(0, 2**bits - 1).sub(zero) * step


def uniform_mse_clip(weight: Tensor, bits: int) -> Tensor:
    """The same with both ends drawn in by that of 81 factors, .2 to 1, which errs least in squares."""
    best, least = None, torch.full((len(weight), 1), torch.inf, dtype=torch.float64)
    for shrink in torch.linspace(0.2, 1, 81).tolist():
        got = uniform_min_max(weight, bits, shrink)
        error = (got - weight).square().sum(1, keepdim=True)
        best = got if best is None else torch.where(error < least, got, best)
        least = torch.minimum(error, least)
    return best


def normal_float4(weight: Tensor, bits: int = 4, block: int | None = None) -> Tensor:
    """NF4 (QLoRA, arXiv 2305.14314): quantiles of a normal, scaled to the largest value of a row or of a block."""
    assert bits == 4, "NF4 has four bits"
    normal = torch.distributions.Normal(0.0, 1.0)
    tail = 0.9677083
    upper = normal.icdf(torch.linspace(tail, 0.5, 9).double())[:-1]
    lower = -normal.icdf(torch.linspace(tail, 0.5, 8).double())[:-1]
    levels = torch.cat([lower, torch.zeros(1), upper]).sort().values / upper.max()
    parts = weight.double().unflatten(1, (-1, block or weight.shape[1]))
    scale = parts.abs().amax(2, keepdim=True).clamp(min=1e-300)
    nearest = torch.bucketize((parts / scale).contiguous(), (levels[1:] + levels[:-1]) / 2)
    return (levels[nearest] * scale).flatten(1)


def lloyd_max(weight: Tensor, bits: int, steps: int = 200) -> Tensor:
    """The best 2^bits levels for every row that Lloyd's iterations find: what no scalar codes of a row exceed by much.

    Not a format: 2^bits fp32 levels a row are side information that nobody would store.
    """
    ordered = weight.double().sort(1).values.contiguous()
    start = ordered.new_zeros(len(ordered), 1)
    prefix = torch.cat([start, ordered.cumsum(1)], 1)
    columns = ordered.shape[1]
    # Levels that begin as dense as the cube root of the density, which is where they end for fine grids.
    levels = ordered.mean(1, keepdim=True) + ordered.std(1, keepdim=True) * 3**0.5 * torch.distributions.Normal(
        0.0, 1.0
    ).icdf((torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits)
    for _ in range(steps):
        inner = torch.searchsorted(ordered, (levels[:, 1:] + levels[:, :-1]) / 2)
        edges = torch.cat([inner.new_zeros(len(inner), 1), inner, inner.new_full((len(inner), 1), columns)], 1)
        count = edges.diff(dim=1)
        levels = torch.where(count > 0, prefix.gather(1, edges).diff(dim=1) / count.clamp(min=1), levels)
    nearest = torch.searchsorted((levels[:, 1:] + levels[:, :-1]) / 2, weight.double())
    return levels.gather(1, nearest)
