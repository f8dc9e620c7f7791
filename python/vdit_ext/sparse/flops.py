"""Floating-point operations of sparse video generation; a multiply-add counts as two.

An API of its own, for papers' tables and for budgets before anything runs: what a shape of
:data:`~vdit_ext.sparse.shapes.SHAPES` costs, what of it a density saves, and what the planning adds. ::

    shape = SHAPES["wan2.1-14b-t2v-720p"]
    tokens, width = shape.layout.num_tokens, shape.heads * shape.head_dim
    dense = attention_flops(tokens, width, shape.layers, forwards=2 * shape.steps)
    sparse = video_flops(dense, dense, density=0.3, dense_fraction=0.3)
    sparse += 0.7 * 2 * shape.steps * shape.layers * kmeans_flops(tokens, 300, 1000, width, num_iters=2)

None of the counts holds a method's planning unless it says so: add :func:`kmeans_flops` for SVG2.

Source: the FLOPs identity of the SVG2 specification (section 7) and the check in DraftAttention's (section 7).
"""

from __future__ import annotations

from torch import Tensor

from .plan import BlockPlan

__all__ = ["attention_flops", "kmeans_flops", "plan_flops", "video_flops"]


def attention_flops(num_tokens: int, width: int, layers: int = 1, forwards: int = 1) -> float:
    """Dense self-attention: ``4 N^2 width`` a layer and forward pass.

    Args:
        num_tokens: N, text included where it is in the sequence.
        width: heads times head size.
        forwards: model calls of a video: steps, twice that with two guidance branches.
    """
    return 4.0 * num_tokens**2 * width * layers * forwards


def video_flops(dense_total: float, attention: float, density: float, dense_fraction: float) -> float:
    """A whole video with sparse attention: ``linear + attention * (w + (1 - w) * density)``, without planning.

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
    """Assignments of SVG2's clustering of q and k in one layer: ``2 N (Cq + Ck) width`` an iteration.

    Args:
        num_tokens: N, of the video; text is not clustered.
        num_q_clusters, num_k_clusters: of each head.
        width: heads times head size.
        num_iters: Lloyd iterations: ``iter_init`` in a layer's first call, ``iter_step`` in the later ones.
    """
    return 2.0 * num_tokens * (num_q_clusters + num_k_clusters) * width * num_iters


def plan_flops(
    plan: BlockPlan, seqlen_q: int, seqlen_kv: int, head_dim: int, *, tile_q: int = 1, tile_kv: int = 1
) -> Tensor:
    """Operations of one attention call under a plan, fp64 ``[B|1, H|1]``, without making the plan.

    Args:
        seqlen_q, seqlen_kv: lengths in tokens.
        head_dim: D.
        tile_q, tile_kv: 1 counts the pairs that the plan asks for, weighted by the true block sizes; a kernel's
            tile sizes count what it executes when it rounds every block up to whole tiles.
    """
    return plan.kept_pairs(seqlen_q, seqlen_kv, tile_q=tile_q, tile_kv=tile_kv).double() * (4 * head_dim)
