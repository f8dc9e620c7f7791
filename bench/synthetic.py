"""Inputs that behave as a video model's do: attention with structure, clusters and lists of uneven sizes."""

from __future__ import annotations

import torch
from torch import Tensor

from vdit_ext import ops
from vdit_ext.sparse.plan import TokenLayout

TOPICS = 48
BLOB = 4, 6, 8  # latent frames, rows and columns that belong together
STRAY = 0.1  # share of tokens that belong to no blob around them
# Logit that a key gains by sharing the query's topic, in the first and the last head. With 48 topics and
# p = 0.9 the kept density then falls from head to head, as it differs between those of a real model.
GAIN = 4.7, 7.0


def topic_field(layout: TokenLayout, heads: int, device, gen: torch.Generator) -> Tensor:
    """Topic of every video token, int64 ``[heads, num_video]``: blobs in space and time, and some strays."""
    coarse = tuple(-(-size // blob) for size, blob in zip(layout.grid, BLOB, strict=True))
    field = torch.randint(TOPICS, (heads, *coarse), generator=gen, device=device)
    for axis, (size, blob) in enumerate(zip(layout.grid, BLOB, strict=True), start=1):
        field = field.repeat_interleave(blob, axis).narrow(axis, 0, size)
    field = field.flatten(1)
    strays = torch.rand(field.shape, generator=gen, device=device) < STRAY
    return torch.where(strays, torch.randint(TOPICS, field.shape, generator=gen, device=device), field)


def video_qkv(layout: TokenLayout, heads: int, dim: int, dtype, device) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v ``[1, heads, S, dim]``, stored as ``[1, S, heads, dim]``.

    q and k of a head share topics, so that attention is as concentrated, and as uneven over the heads, as
    selection by clusters is meant for. Text rows and v have none.
    """
    gen = torch.Generator(device).manual_seed(0)
    field = topic_field(layout, heads, device, gen)
    topics = torch.randn(heads, TOPICS, dim, generator=gen, device=device)
    gain = (
        torch.linspace(*GAIN, heads, device=device)
        if heads > 1
        else torch.tensor([sum(GAIN) / 2], device=device)
    )
    strength = (gain / dim**0.5).sqrt()[:, None, None]

    def side(*, structured: bool) -> Tensor:
        rows = torch.randn(heads, layout.num_tokens, dim, generator=gen, device=device)
        if structured:
            rows *= 0.3
            video = rows.narrow(1, layout.video_start, layout.num_video)
            video += strength * topics.gather(1, field[..., None].expand(-1, -1, dim))
        return rows.to(dtype)[None].transpose(1, 2).contiguous().transpose(1, 2)

    return side(structured=True), side(structured=True), side(structured=False)


def video_hidden(layout: TokenLayout, width: int, dtype, device) -> Tensor:
    """Hidden states of the video tokens ``[1, num_video, width]`` whose projections share topics."""
    gen = torch.Generator(device).manual_seed(0)
    field = topic_field(layout, 1, device, gen)[0]
    topics = torch.randn(TOPICS, width, generator=gen, device=device)
    rows = 0.3 * torch.randn(layout.num_video, width, generator=gen, device=device)
    return (rows + topics[field]).to(dtype)[None]


def uneven_offsets(clusters: int, tokens: int, heads: int, gen: torch.Generator, spread: float = 0.8) -> Tensor:
    """Cluster boundaries int32 ``[1, heads, clusters + 1]`` with log-normal sizes, as k-means leaves them.

    Cuts at uniform places would give exponential sizes: too many tiny clusters.
    """
    weights = torch.exp(spread * torch.randn(1, heads, clusters, generator=gen, device=gen.device).double())
    ends = (weights.cumsum(-1) / weights.sum(-1, keepdim=True) * tokens).round().int()
    return torch.nn.functional.pad(ends, (1, 0))


def uneven_lists(q_offsets: Tensor, kv_offsets: Tensor, density: float, gen: torch.Generator) -> tuple:
    """Counts and lists that keep about ``density`` of the pairs.

    Some query blocks keep up to three times as much as others. Each takes key clusters in random order until
    its share of the tokens is reached, as top-p does.
    """
    sizes = kv_offsets.diff(dim=-1)
    batch, heads, num_kv = sizes.shape
    num_q = q_offsets.shape[-1] - 1
    order = torch.rand(batch, heads, num_q, num_kv, generator=gen, device=gen.device).argsort(-1)
    taken = sizes[:, :, None].expand(-1, -1, num_q, -1).gather(-1, order)
    wanted = torch.rand(batch, heads, num_q, 1, generator=gen, device=gen.device) + 0.5  # 0.5 to 1.5, mean 1
    before = taken.cumsum(-1) - taken
    # Half a cluster later than the share is as likely as half a cluster too early.
    keep_in_order = before + taken / 2 <= wanted * density * int(kv_offsets[0, 0, -1])
    keep_in_order[..., 0] = True
    return ops.lists_from_mask(torch.zeros_like(keep_in_order).scatter_(-1, order, keep_in_order))


def uniform_lists(num_q: int, num_kv: int, heads: int, density: float, gen: torch.Generator) -> tuple:
    """Random ascending lists int32, ``round(density * num_kv)`` key blocks for each query block."""
    keep = max(1, round(density * num_kv))
    if keep == num_kv:
        every = torch.arange(num_kv, dtype=torch.int32, device=gen.device)
        lists = every.expand(1, 1, num_q, -1).contiguous()
    else:
        order = torch.rand(1, heads, num_q, num_kv, generator=gen, device=gen.device)
        lists = order.topk(keep).indices.sort(-1).values.int()
    return torch.full(lists.shape[:3], keep, dtype=torch.int32, device=gen.device), lists
