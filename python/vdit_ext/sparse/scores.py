"""Logits of query block against key block from one vector a block."""

from __future__ import annotations

import torch
from torch import Tensor


def block_logits(q_blocks: Tensor, k_blocks: Tensor) -> Tensor:
    """Scaled products ``q . k * D ** -0.5``, fp32 also under autocast.

    Args:
        q_blocks: ``[B, H, nQ, D]`` and
        k_blocks: ``[B, H, nKV, D]`` fp32, fp16 or bf16: centroids (SVG2) or pooled tiles (DraftAttention).

    Returns:
        fp32 ``[B, H, nQ, nKV]``. Lower precision makes near ties and stalling sums of the selection's input.
    """
    with torch.autocast(q_blocks.device.type, enabled=False):
        return q_blocks.float() @ k_blocks.float().transpose(-1, -2) * q_blocks.shape[-1] ** -0.5
