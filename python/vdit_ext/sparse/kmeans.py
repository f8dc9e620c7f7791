"""Batched k-means (Lloyd) on the ops; SVG2's clustering.

Source: Sparse VideoGen2, arXiv 2505.18875, section 4.2 of the specification.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from .gate import require_choice, require_number, require_whole
from .transfer import to_device

INITS = ("random", "kmeans++")


class Clusters(NamedTuple):
    """What k-means returns.

    Labels, order and sizes belong to the last assignment, and the centroids are the means of that assignment's
    members; an empty cluster, and one whose mean is not finite, keeps the centroid it had. Centroids are
    always finite.

    Attributes:
        centroids: ``[B, H, C, D]`` in x's dtype.
        labels: int32 ``[B, H, N]`` in ``[0, C)``.
        sorted_idx: int32 ``[B, H, N]``, rows of cluster 0 in order, then of cluster 1, and so on.
        offsets: int32 ``[B, H, C+1]``, where each cluster starts in that order.
    """

    centroids: Tensor
    labels: Tensor
    sorted_idx: Tensor
    offsets: Tensor

    @property
    def sizes(self) -> Tensor:
        """int32 ``[B, H, C]``, members of each cluster."""
        return self.offsets.diff(dim=-1)


def kmeans(
    x: Tensor,
    num_clusters: int,
    *,
    num_iters: int,
    centroids: Tensor | None = None,
    init: str = "random",
    seed: int = 0,
    tolerance: float | None = None,
    sample: int = 1,
) -> Clusters:
    """Cluster the rows of every head by Euclidean distance.

    A row with NaN or Inf gets some label, and its cluster's centroid stands still while it is a member; the
    other clusters move on.

    Args:
        x: ``[B, H, N, D]`` fp32, fp16 or bf16, any strides with a contiguous last dimension.
        num_clusters: C, at least 1 and at most N.
        num_iters: Lloyd iterations, at least 1: an assignment, then the means of its members.
        centroids: ``[B, H, C, D]`` to start from (warm start), NaN and Inf in it counting as 0; ``init`` and
            ``seed`` are then unused.
        init: "random" takes C rows drawn uniformly with replacement, as SVG2's code does; "kmeans++" draws each
            row with probability proportional to its squared distance from those already drawn.
        seed: of the draw. It happens on a CPU generator, once for each head and for the whole batch, so that
            neither the device nor the batch size changes the result of a clip.
        tolerance: stop when no centroid of any head moved farther than this. It reads a number back from the
            device at every iteration, so it is off (None) by default and cannot be used under compilation.
        sample: iterations before the last see every ``sample``-th row only, from the first on; 1 shows them
            all. The last one sees every row. Where rows are pixels, a number that divides the width always
            shows the same columns; take one that does not.

    Raises:
        ValueError: one sentence with what was expected and what came.
    """
    batch, heads, num_rows, dim = x.shape
    require_whole("kmeans", "num_clusters", num_clusters, 1)
    if num_clusters > num_rows:
        raise ValueError(
            f"kmeans: num_clusters must be at least 1 and at most the {num_rows} rows, got {num_clusters}; "
            "ask for fewer clusters"
        )
    require_whole("kmeans", "num_iters", num_iters, 1)
    require_choice("kmeans", "init", init, INITS)
    require_whole("kmeans", "sample", sample, 1)
    if tolerance is not None:
        require_number("kmeans", "tolerance", tolerance, 0)
        if sample > 1:
            raise ValueError(
                f"kmeans: tolerance must be None with sample {sample}, got {tolerance}; leave one of them out"
            )
    if centroids is None:
        centroids = draw_centroids(x, num_clusters, init=init, seed=seed)
    elif centroids.shape != (batch, heads, num_clusters, dim) or centroids.dtype != x.dtype:
        raise ValueError(
            f"kmeans: centroids must be {[batch, heads, num_clusters, dim]} {x.dtype}, got "
            f"{list(centroids.shape)} {centroids.dtype}"
        )
    else:
        centroids = _finite(centroids)
    for iteration in range(num_iters):
        rows = x if iteration == num_iters - 1 else x[:, :, ::sample]
        labels = ops.kmeans_assign(rows, centroids)
        sorted_idx, offsets = ops.label_sort(labels, num_clusters)
        # The fallback serves bad members too. A cluster that took over a mean of NaN or Inf would be dead: no
        # row is near it any more, the bad row moves on to the next cluster, and so until none is left.
        before, centroids = centroids, ops.segment_mean(rows, sorted_idx, offsets, centroids)
        if tolerance is not None:
            shift = (centroids.float() - before.float()).norm(dim=-1).max()
            if float(shift) < tolerance:
                break
    return Clusters(centroids, labels, sorted_idx, offsets)


def draw_centroids(x: Tensor, num_clusters: int, *, init: str = "random", seed: int = 0) -> Tensor:
    """Starting centroids ``[B, H, C, D]``, rows of x with 0 for NaN and Inf; see :func:`kmeans`."""
    generator = torch.Generator().manual_seed(seed)
    _, heads, num_rows, dim = x.shape
    if init == "random":
        rows = to_device(torch.randint(num_rows, (1, heads, num_clusters), generator=generator), x.device)
    else:
        draws = torch.rand(num_clusters, 1, heads, 1, generator=generator, dtype=torch.float64)
        rows = _plus_plus_rows(x, to_device(draws, x.device))
    rows = rows.expand(x.shape[0], -1, -1)
    return _finite(x.gather(2, rows[..., None].expand(-1, -1, -1, dim)).contiguous())


def _finite(x: Tensor) -> Tensor:
    """x with 0 for NaN and Inf."""
    return x.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _plus_plus_rows(x: Tensor, draws: Tensor) -> Tensor:
    """k-means++ row numbers int64 ``[B, H, C]`` from uniform numbers ``[C, 1, H, 1]``."""
    batch, heads, num_rows, dim = x.shape
    weight = torch.ones(batch, heads, num_rows, dtype=torch.float64, device=x.device)
    nearest = torch.full_like(weight, torch.inf)
    rows = []
    for draw in draws:
        mass = weight.cumsum(-1)
        row = torch.searchsorted(mass, (draw * mass[..., -1:]).contiguous(), right=True).clamp(max=num_rows - 1)
        rows.append(row)
        chosen = _finite(x.gather(2, row[..., None].expand(-1, -1, -1, dim)))
        distance = (x.float() - chosen.float()).double().square().sum(-1)
        # A row with NaN or Inf is near nothing: distance 0 keeps it from being drawn and the sums finite.
        nearest = torch.minimum(nearest, _finite(distance))
        # Fewer distinct rows than clusters: every distance is 0, and any row is as good as another.
        weight = torch.where(nearest.sum(-1, keepdim=True) > 0, nearest, 1.0)
    return torch.cat(rows, -1)


def inertia(x: Tensor, centroids: Tensor, labels: Tensor) -> Tensor:
    """Sum over the rows of the squared distance to their centroid, fp64 ``[B, H]``."""
    index = labels.long()[..., None].expand(-1, -1, -1, x.shape[-1])
    return (x.double() - centroids.double().gather(2, index)).square().sum((-1, -2))
