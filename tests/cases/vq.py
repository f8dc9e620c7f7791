"""Shared cases of the vq family: what is timed (bench/) is what is checked here."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vdit_ext import ops
from vdit_ext.ops.vq import CODEWORDS
from vdit_ext.testing import generator

from .attention import as_it_lies

DIMS = [4, 2]
DIM_IDS = ["256x4", "64x2"]


@dataclass(frozen=True)
class LinearCase:
    """One call of vq_linear.

    Attributes:
        name: what is awkward about it.
        lead: x's shape without K.
        n, k: output and input channels.
        layout: of x: "dense", "sliced" (a view into a fused projection), "swapped" ([S, B, K] seen as [B, S, K]).
        bias, scale: fp32 [N] each.
        gate: None, or which leading dimensions it has: "" (one row for all), "b", "s", "bs".
        residual: of the result's dtype.
    """

    name: str
    lead: tuple[int, ...] = (7,)
    n: int = 96
    k: int = 128
    layout: str = "dense"
    bias: bool = False
    scale: bool = False
    gate: str | None = None
    residual: bool = False

    @property
    def cuda(self) -> bool:
        return self.k % 16 == 0

    def __str__(self) -> str:
        return self.name


@dataclass
class LinearInputs:
    """Tensors of a case, ready for the op: ``op(*args, **kwargs)``."""

    x: Tensor
    codes: Tensor
    codebook: Tensor
    out_features: int
    kwargs: dict = field(default_factory=dict)

    @property
    def args(self) -> tuple:
        return self.x, self.codes, self.codebook, self.out_features

    def to(self, device) -> LinearInputs:
        moved = {n: as_it_lies(t, device) if isinstance(t, Tensor) else t for n, t in self.kwargs.items()}
        x, codes, codebook = (as_it_lies(t, device) for t in (self.x, self.codes, self.codebook))
        return LinearInputs(x, codes, codebook, self.out_features, moved)


def make_codes(n: int, k: int, dim: int, seed: int = 0) -> Tensor:
    """Random tiles; K need not be a multiple of ``dim``."""
    words = -(-k // dim)
    return ops.pack_vq(torch.randint(0, CODEWORDS[dim], (n, words), generator=generator(seed)), dim)


def make_codebook(dim: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    shape, gen = (CODEWORDS[dim], dim), generator(seed)
    if dtype == torch.int8:
        return torch.randint(-128, 128, shape, generator=gen, dtype=torch.int8)
    return torch.randn(shape, generator=gen).to(dtype)


def make_x(case: LinearCase, dtype: torch.dtype, gen: torch.Generator) -> Tensor:
    def draw(*shape):
        if dtype == torch.int8:
            return torch.randint(-128, 128, shape, generator=gen, dtype=torch.int8)
        return torch.randn(shape, generator=gen).to(dtype)

    if case.layout == "swapped":
        return draw(case.lead[1], case.lead[0], case.k).transpose(0, 1)
    if case.layout == "sliced":
        return draw(*case.lead, 3 * case.k)[..., case.k : 2 * case.k]
    return draw(*case.lead, case.k)


def make_linear(
    case: LinearCase, dim: int, dtype: torch.dtype, out_dtype: torch.dtype | None = None
) -> LinearInputs:
    """Inputs of a case on the CPU, the same for every backend. ``dtype`` is that of x and the codebook."""
    gen = generator(2)
    x = make_x(case, dtype, gen)
    result = out_dtype or (torch.bfloat16 if dtype == torch.int8 else dtype)
    kwargs: dict = {"out_dtype": out_dtype}
    if dtype == torch.int8 and result != torch.int32:
        kwargs["x_scale"] = torch.rand(case.lead, generator=gen) * 1e-4
    if case.scale:
        kwargs["weight_scale"] = 0.5 + torch.rand(case.n, generator=gen)
    if case.bias:
        kwargs["bias"] = torch.randn(case.n, generator=gen)
    if case.gate is not None:
        names = "bs" if len(case.lead) == 2 else "s"
        lead = [size if name in case.gate else 1 for name, size in zip(names, case.lead, strict=True)]
        kwargs["gate"] = torch.randn(*lead, case.n, generator=gen)
    if case.residual:
        kwargs["residual"] = torch.randn(*case.lead, case.n, generator=gen).to(result)
    codes, codebook = make_codes(case.n, case.k, dim), make_codebook(dim, dtype)
    return LinearInputs(x, codes, codebook, case.n, kwargs)


C = LinearCase

# Sizes: nothing, one, ragged, one past a tile.
corner = [
    C("no_rows", (0,)),
    C("no_outputs", (3,), n=0),
    C("one_row", (1,)),
    C("one_output", (5,), n=1),
    C("one_tile", (16,), n=32, k=64),
    C("short_k", (4,), n=40, k=16),
    C("ragged_n", (3,), n=77, k=192),
    C("ragged_m", (37,), n=64, k=80),
    C("all_ragged", (133,), n=135, k=208),
    C("sixteen_rows", (16,), n=70, k=272),
    C("seventeen_rows", (17,), n=70, k=272),
    C("batches", (2, 9), n=33, k=144),
    # More steps along k than stages or warps share; the emulated GPU's three SMs get small tiles, then large ones.
    C("long_k_few_rows", (9,), n=40, k=1104),
    C("long_k_small_tiles", (20,), n=64, k=1104),
    C("large_tiles", (250,), n=384, k=336),
]
# What only the CPU takes.
odd_k = [
    C("k_of_one_word", (9,), n=33, k=4),
    C("k_in_a_quad", (20,), n=33, k=70),
    C("odd_k", (21,), n=5, k=131),
    C("odd_k_few_rows", (2,), n=5, k=131),
]
epilogues = [
    C("bias", (19,), bias=True),
    C("scale", (5,), scale=True),
    C("gate_of_all", (18,), gate="", bias=True, scale=True),
    C("gate_by_batch", (2, 11), n=72, gate="b", residual=True),
    C("gate_by_token", (2, 3), n=40, gate="s"),
    C("everything", (3, 7), n=45, bias=True, scale=True, gate="bs", residual=True),
    C("sliced_x", (2, 20), layout="sliced", residual=True),
    C("swapped_x", (3, 20), layout="swapped", bias=True),
]
# What bench/ times: performance.md's shapes on a GPU, smaller ones on a CPU.
perf_cpu = [
    C(f"m{m}_k{k}_n{n}", (m,), n=n, k=k)
    for k, n in ((1536, 1536), (5120, 5120))
    for m in (1, 4, 16, 64, 256, 1024, 4096)
]
perf_cuda = [
    C(f"m{m}_k{k}_n{n}", (m,), n=n, k=k)
    for k, n in ((1536, 1536), (1536, 8960), (5120, 5120), (5120, 13824), (13824, 5120))
    for m in (1, 16, 64, 256, 1024, 8192, 32760)
]
