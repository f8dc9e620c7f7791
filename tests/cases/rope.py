"""Shared cases of rms_norm_rope: what is checked on a GPU (bench/) is what is checked here."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vdit_ext.testing import generator


@dataclass(frozen=True)
class NormRopeCase:
    """One call of rms_norm_rope.

    Attributes:
        name: which model has it, or what is awkward about it.
        layout: "bshd", "bhsd", "sliced" (a view into a fused projection), "unaligned" (rows at odd addresses).
        weight: None, "head" ([D]) or "all" ([H * D]).
        tables: None, or the shape before rows and columns as letters: "" for [1, 1], "h" for [1, H], "bh".
        half_tables: one value a pair instead of one a channel.
        text: tokens that no row of the tables turns, at the end, or at the front with ``text_first``.
        own_dtype: weight and tables in x's dtype instead of fp32.
        index: None, or as ``tables``.
    """

    name: str
    batch: int = 1
    heads: int = 3
    tokens: int = 19
    head_dim: int = 64
    layout: str = "bshd"
    weight: str | None = "head"
    across_heads: bool = False
    interleaved: bool = True
    eps: float | None = 1e-6
    tables: str | None = ""
    half_tables: bool = False
    text: int = 0
    text_first: bool = False
    own_dtype: bool = False
    index: str | None = None

    def __str__(self) -> str:
        return self.name


@dataclass
class NormRopeInputs:
    """Tensors of a case, ready for the op: ``op(*args, **kwargs)``."""

    x: Tensor
    weight: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    kwargs: dict = field(default_factory=dict)

    @property
    def args(self) -> tuple[Tensor | None, ...]:
        return self.x, self.weight, self.cos, self.sin


def make_norm_rope(case: NormRopeCase, dtype: torch.dtype, seed: int = 0) -> NormRopeInputs:
    """Inputs of a case on the CPU, the same for every backend."""
    gen = generator(seed)
    b, h, s, d = case.batch, case.heads, case.tokens, case.head_dim
    own = dtype if case.own_dtype else torch.float32
    weight = None
    if case.weight is not None:
        weight = (1 + 0.3 * torch.randn(h * d if case.weight == "all" else d, generator=gen)).to(own)
    cos = sin = None
    if case.tables is not None:
        lead = (b if "b" in case.tables else 1, h if "h" in case.tables else 1, s - case.text)
        # Not cos and sin of one angle, nor equal within a pair: every factor must reach its own channel.
        cos, sin = (2 * torch.rand(2, *lead, d // 2 if case.half_tables else d, generator=gen) - 1).to(own)
    kwargs = {"across_heads": case.across_heads, "interleaved": case.interleaved, "eps": case.eps}
    if case.text_first:
        kwargs["rope_start"] = case.text
    if case.index is not None:
        lead = (b if "b" in case.index else 1, h if "h" in case.index else 1)
        kwargs["index"] = torch.rand(*lead, s, generator=gen).argsort(-1).int()
    return NormRopeInputs(_make_x(case, gen, dtype), weight, cos, sin, kwargs)


def _make_x(case: NormRopeCase, gen: torch.Generator, dtype: torch.dtype) -> Tensor:
    b, h, s, d = case.batch, case.heads, case.tokens, case.head_dim
    if case.layout == "bhsd":
        return 2 * torch.randn(b, h, s, d, generator=gen).to(dtype)
    if case.layout == "bshd":
        return 2 * torch.randn(b, s, h, d, generator=gen).to(dtype).transpose(1, 2)
    slack = 1 if case.layout == "unaligned" else 0
    fused = 2 * torch.randn(b, s + 1, 3 * h * d + slack, generator=gen).to(dtype)
    first = h * d + slack
    return fused[:, 1:, first : first + h * d].unflatten(-1, (h, d)).transpose(1, 2)


models = [
    NormRopeCase("wan", heads=12, head_dim=128, weight="all", across_heads=True),
    NormRopeCase("wan_14b", tokens=5, heads=40, head_dim=128, weight="all", across_heads=True, own_dtype=True),
    NormRopeCase("hunyuan", heads=4, head_dim=128, text=5),
    NormRopeCase("cogvideox", head_dim=64, weight=None, eps=None, text=6, text_first=True),
    NormRopeCase("ltx", head_dim=64, weight="all", across_heads=True, tables="h"),
    NormRopeCase("halves", head_dim=128, interleaved=False),
]
corner = [
    NormRopeCase("one_token", tokens=1, heads=1, head_dim=8),
    NormRopeCase("two_batches", batch=2, tables="bh", weight="all", layout="bhsd"),
    NormRopeCase("two_batches_halves", batch=2, tables="bh", across_heads=True, interleaved=False),
    NormRopeCase("d24_halves", head_dim=24, interleaved=False, half_tables=True),
    NormRopeCase("d72", head_dim=72, half_tables=True, own_dtype=True, text=2),
    NormRopeCase("d72_halves", head_dim=72, interleaved=False, own_dtype=True),
    NormRopeCase("d96_sliced", head_dim=96, layout="sliced", across_heads=True, weight="all"),
    NormRopeCase("d256", head_dim=256, half_tables=True),
    NormRopeCase("unaligned", layout="unaligned", weight="all", across_heads=True),
    NormRopeCase("unaligned_halves", layout="unaligned", interleaved=False, half_tables=True),
    # More than a thread block of the CUDA kernel holds.
    NormRopeCase("many_heads", tokens=3, heads=37, head_dim=256, weight="all", across_heads=True, tables="h"),
    NormRopeCase("many_heads_each", tokens=3, heads=37, head_dim=256, interleaved=False, layout="bhsd"),
    NormRopeCase("norm_only", tables=None, across_heads=True, weight="all"),
    NormRopeCase("norm_only_plain", tables=None, weight=None, eps=0.1),
    NormRopeCase("rope_only", weight=None, eps=None),
    NormRopeCase("all_text", text=19),
]
permuted = [
    NormRopeCase("shared", batch=2, index="", weight="all", across_heads=True, text=4),
    NormRopeCase("per_batch", batch=2, index="b", layout="sliced"),
    NormRopeCase("per_head", batch=2, index="h", weight="all", across_heads=True, text=4, text_first=True),
    NormRopeCase("per_batch_and_head", batch=2, index="bh", tables="bh", interleaved=False),
    NormRopeCase("per_head_bhsd", index="h", layout="bhsd", across_heads=True),
    NormRopeCase("copy", index="h", weight=None, eps=None, tables=None, layout="unaligned"),
]
every = models + corner + permuted
