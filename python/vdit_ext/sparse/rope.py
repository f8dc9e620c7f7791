"""Norms and rotary embedding of video transformers in plain torch: what the fused kernels are checked against.

Source: Sparse VideoGen2, section 4.7 of the specification.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6) -> Tensor:
    """``x * rsqrt(mean(x^2) + eps) * weight`` over the last dimension, computed in fp32.

    Args:
        x: ``[..., D]`` fp32, fp16 or bf16: ``[B, H, S, D]`` normalises each head (HunyuanVideo, CogVideoX),
            ``[B, S, H * D]`` all heads together (Wan).
        weight: ``[D]`` of that last dimension.

    Returns:
        x's shape and dtype.
    """
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight.float()).to(x.dtype)


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5
) -> Tensor:
    """Layer norm over the last dimension, computed in fp32; shapes as :func:`rms_norm`."""
    y = x.float()
    y = y - y.mean(-1, keepdim=True)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.float()
    return (y if bias is None else y + bias.float()).to(x.dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, *, text_len: int = 0, text_first: bool = False) -> Tensor:
    """Rotate interleaved pairs of the video rows: ``(a, b) -> (a cos - b sin, b cos + a sin)``.

    Args:
        x: ``[B, H, S, D]`` fp32, fp16 or bf16, D even.
        cos, sin: fp32 ``[S - text_len, D]``, each value twice, or fp64 or fp32 ``[S - text_len, D / 2]``; the
            arithmetic is in the tables' dtype.
        text_len, text_first: how many rows are text, and at which end; they come back bit for bit.

    Returns:
        x's shape and dtype.

    Raises:
        ValueError: one sentence, when tables and rows do not fit.
    """
    length, dim = x.shape[-2] - text_len, x.shape[-1]
    for table in (cos, sin):
        if table.shape not in ((length, dim), (length, dim // 2)):
            raise ValueError(
                f"apply_rope: tables must be [{length}, {dim}] or [{length}, {dim // 2}] for {length} video "
                f"rows, got {list(table.shape)}"
            )
    if cos.shape[-1] == dim:
        cos, sin = cos[:, ::2], sin[:, ::2]
    start = text_len if text_first else 0
    a, b = x.narrow(-2, start, length).to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    video = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2).to(x.dtype)
    text = x.narrow(-2, 0 if text_first else length, text_len)
    return torch.cat([text, video] if text_first else [video, text], -2)


def rope_table(grid: tuple[int, int, int], head_dim: int, *, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of three-axis rotary embedding, fp32 ``[frames * rows * columns, D]`` each.

    The pairs of a head are split among frame, row and column; rows and columns get ``D // 6`` pairs each and
    frames the rest. Every value stands twice, for both members of its pair.
    """
    pairs = head_dim // 2
    side = pairs // 3
    angles = []
    for size, count in zip(grid, (pairs - 2 * side, side, side), strict=True):
        frequency = base ** -(torch.arange(count, dtype=torch.float64) / max(1, count))
        angles.append(torch.arange(size, dtype=torch.float64)[:, None] * frequency)
    frames, rows, columns = grid
    f, y, x = angles
    table = torch.cat(
        [
            f[:, None, None].expand(-1, rows, columns, -1),
            y[None, :, None].expand(frames, -1, columns, -1),
            x[None, None].expand(frames, rows, -1, -1),
        ],
        -1,
    ).reshape(frames * rows * columns, pairs)
    table = table.repeat_interleave(2, -1)
    return table.cos().float(), table.sin().float()
