"""Floating-point operations of sparse video generation; a multiply-add counts as two.

Source: the FLOPs identity of the SVG2 specification (section 7) and the check in DraftAttention's (section 7).
"""

from __future__ import annotations

from torch import Tensor

from .plan import BlockPlan


def attention_flops(num_tokens: int, width: int, layers: int = 1, forwards: int = 1) -> float:
    """Dense self-attention: ``4 N^2 width`` a layer and forward pass.

    Args:
        num_tokens: N, text included where it is in the sequence.
        width: heads times head size.
        forwards: model calls of a video: steps, twice that with two guidance branches.
    """
    return 4.0 * num_tokens**2 * width * layers * forwards


def video_flops(dense_total: float, attention: float, density: float, dense_fraction: float) -> float:
    """A whole video with sparse attention: ``linear + attention * (w + (1 - w) * density)``.

    Args:
        dense_total: the video with dense attention everywhere; what is not attention is its linear part.
        attention: :func:`attention_flops` of the whole video.
        density: kept share of the pairs in sparse calls, 0 to 1 (``1 - sparsity`` for DraftAttention).
        dense_fraction: w, share of the steps that run dense, 0 to 1.
    """
    return dense_total - attention + attention * (dense_fraction + (1 - dense_fraction) * density)


def kmeans_flops(
    num_tokens: int, num_q_clusters: int, num_k_clusters: int, width: int, num_iters: int = 1
) -> float:
    """Assignments of SVG2's clustering of q and k in one layer: ``2 N (Cq + Ck) width`` an iteration."""
    return 2.0 * num_tokens * (num_q_clusters + num_k_clusters) * width * num_iters


def plan_flops(
    plan: BlockPlan, seqlen_q: int, seqlen_kv: int, head_dim: int, *, tile_q: int = 1, tile_kv: int = 1
) -> Tensor:
    """Operations of one attention call under a plan, fp64 ``[B|1, H|1]``.

    Args:
        tile_q, tile_kv: 1 counts the pairs that the plan asks for, weighted by the true block sizes; a kernel's
            tile sizes count what it executes when it rounds every block up to whole tiles.
    """
    return plan.kept_pairs(seqlen_q, seqlen_kv, tile_q=tile_q, tile_kv=tile_kv).double() * (4 * head_dim)
