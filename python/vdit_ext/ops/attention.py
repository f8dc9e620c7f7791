"""The attention family: each op's documented wrapper, fake kernel and naive definition side by side.

Shapes: B batch, H heads, S tokens, D head size, nQ and nKV blocks, W list width, C clusters.
All tensors may have any strides as long as the last dimension is contiguous.

Every op raises RuntimeError, one sentence with what was expected and what came, for tensors of another rank,
shape, dtype or device; "Raises" below names what else is refused. What lists, offsets, indices and labels hold
is checked on the CPU; on CUDA only with ``VDIT_CHECK_PLANS=1``, because reading them back would wait for the
device. Unchecked, no access leaves the tensors; each op says what its result then is.

No op has a backward: results ask for gradients where an argument does, and ``backward()`` raises RuntimeError.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import NAMESPACE
from ._registration import register_no_backward, same_device

_OPS = getattr(torch.ops, NAMESPACE)

# The family, in the order of its schema.
OPS = (
    "block_sparse_attention",
    "merge_attention",
    "permute_rows",
    "unpermute_rows",
    "mean_pool_blocks",
    "kmeans_assign",
    "label_sort",
    "segment_mean",
    "topk_blocks",
    "topp_blocks",
    "rms_norm_rope",
    "block_mass",
    "block_mass_topk",
)
HEAD_DIMS_CUDA = (64, 96, 128)


# The results of kmeans_assign, topk_blocks and topp_blocks are integers, which cut the graph as argmax does.
for _op in OPS:
    if _op != "label_sort":  # takes no floating tensor
        register_no_backward(_op)


# ---------------------------------------------------------------------------------------------------------
# block_sparse_attention
# ---------------------------------------------------------------------------------------------------------


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    *,
    q_offsets: Tensor | None = None,
    kv_offsets: Tensor | None = None,
    q_index: Tensor | None = None,
    q_block_size: int = 128,
    kv_block_size: int = 128,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention in which each query block sees only the key blocks that it lists.

    Args:
        q: ``[B, H, Sq, D]`` fp16 or bf16 (fp32 too on CPU); D in 64, 96, 128 on CUDA, any multiple of 8 up
            to 256 on CPU.
        k, v: ``[B, H, Skv, D]``, dtype and device of ``q``.
        kv_num_blocks: int32 ``[B|1, H|1, nQ]``, how many entries of the list count.
        kv_indices: int32 ``[B|1, H|1, nQ, W]``, key blocks of each query block, as in FlexAttention's
            ``BlockMask``. Entries past the count are ignored. A block listed twice counts twice.
        q_offsets, kv_offsets: int32 ``[B|1, H|1, n+1]``; block i is rows ``[offsets[i], offsets[i+1])`` and
            may be empty. They start at 0, never fall, and end at S. None means uniform blocks.
        q_index: int32 ``[B|1, H|1, Sq]``, a permutation: row i in the order of the blocks is row ``q_index[i]``
            of q, and so it is of the results. None means that queries lie in that order. It spares permuting q
            and putting the results back; k and v, of which every row is read many times, are permuted
            beforehand (:func:`permute_rows`).
        q_block_size, kv_block_size: uniform block sizes; the last block may be ragged. Unused with offsets.
        scale: factor on the logits, by default ``D ** -0.5``.

    Returns:
        ``out`` ``[B, H, Sq, D]`` in q's dtype, stored as ``[B, Sq, H, D]`` when q is such a view, and ``lse``
        fp32 ``[B, H, Sq]``, natural logarithm of the softmax's denominator. A row that sees no key gets zeros
        and ``-inf``, so that partial results merge (:func:`merge_attention`).

    Raises:
        RuntimeError: one sentence, for another head size or dtype than the device has, rows that are not
            aligned to 16 bytes (CUDA), block sizes below 1; counts above W, indices that name no block, a
            ``q_index`` that is no permutation, and offsets that do not start at 0, fall, or do not end at S
            (module docstring: on CUDA on request).

    Unchecked on CUDA: a query block with a count or an index out of range gives NaN in ``out`` and ``lse``;
    ``q_offsets`` that end early leave rows that no block covers, which give 0 and ``-inf`` as rows without keys
    do; with ones that start late or fall, the rows concerned hold anything, and so do rows that ``q_index``
    does not name or names twice. Of ``kv_offsets`` a block is what lies inside the sequence, and empty where
    they fall.

    NaN and Inf in a query row stay in that row; in a key or value row they reach only the query rows whose
    list holds its block.
    """
    return _OPS.block_sparse_attention(
        q,
        k,
        v,
        kv_num_blocks,
        kv_indices,
        q_offsets=q_offsets,
        kv_offsets=kv_offsets,
        q_index=q_index,
        q_block_size=q_block_size,
        kv_block_size=kv_block_size,
        scale=scale,
    )


def empty_like_query(q: Tensor) -> Tensor:
    """An empty ``[B, H, S, D]`` tensor that keeps q's storage order of heads and tokens."""
    b, h, s, d = q.shape
    if q.stride(1) < q.stride(2):
        return q.new_empty(b, s, h, d).transpose(1, 2)
    return q.new_empty(b, h, s, d)


@torch.library.register_fake(f"{NAMESPACE}::block_sparse_attention")
def _(
    q,
    k,
    v,
    kv_num_blocks,
    kv_indices,
    *,
    q_offsets=None,
    kv_offsets=None,
    q_index=None,
    q_block_size=128,
    kv_block_size=128,
    scale=None,
):
    same_device(
        "block_sparse_attention",
        q,
        k=k,
        v=v,
        kv_num_blocks=kv_num_blocks,
        kv_indices=kv_indices,
        q_offsets=q_offsets,
        kv_offsets=kv_offsets,
        q_index=q_index,
    )
    return empty_like_query(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def block_bounds(offsets: Tensor | None, block_size: int, length: int, b: int, h: int) -> list[tuple[int, int]]:
    """First and last-plus-one row of every block of batch entry b, head h."""
    if offsets is None:
        return [(i, min(i + block_size, length)) for i in range(0, length, block_size)]
    row = offsets[b if offsets.shape[0] > 1 else 0, h if offsets.shape[1] > 1 else 0].tolist()
    return list(zip(row[:-1], row[1:], strict=True))


def block_sparse_attention_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    *,
    q_offsets: Tensor | None = None,
    kv_offsets: Tensor | None = None,
    q_index: Tensor | None = None,
    q_block_size: int = 128,
    kv_block_size: int = 128,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, in fp64, one query block at a time. Arguments as :func:`block_sparse_attention`."""
    batch, heads, seqlen_q, dim = q.shape
    scale = dim**-0.5 if scale is None else scale
    out = torch.zeros(batch, heads, seqlen_q, dim, dtype=torch.float64, device=q.device)
    lse = torch.full((batch, heads, seqlen_q), -torch.inf, dtype=torch.float64, device=q.device)
    counts = kv_num_blocks.expand(batch, heads, -1)
    lists = kv_indices.expand(batch, heads, -1, -1)
    order = torch.arange(seqlen_q, device=q.device) if q_index is None else q_index.long()
    order = order.expand(batch, heads, -1)
    for b in range(batch):
        for h in range(heads):
            q_bounds = block_bounds(q_offsets, q_block_size, seqlen_q, b, h)
            kv_bounds = block_bounds(kv_offsets, kv_block_size, k.shape[2], b, h)
            for i, (start, end) in enumerate(q_bounds):
                chosen = lists[b, h, i, : int(counts[b, h, i])].tolist()
                rows = [r for j in chosen for r in range(*kv_bounds[j])]
                if not rows or start == end:
                    continue
                queries = order[b, h, start:end]
                scores = q[b, h, queries].double() @ k[b, h, rows].double().T * scale
                row_lse = torch.logsumexp(scores, dim=-1)
                # A row whose every score is -inf sees nothing, as if its list were empty.
                weights = torch.exp(scores - torch.where(row_lse == -torch.inf, 0.0, row_lse)[:, None])
                seen = (row_lse != -torch.inf)[:, None]
                mixed = weights @ v[b, h, rows].double()
                out[b, h, queries] = torch.where(seen, mixed, 0.0)
                lse[b, h, queries] = row_lse
    return out.to(q.dtype), lse.float()


# ---------------------------------------------------------------------------------------------------------
# merge_attention
# ---------------------------------------------------------------------------------------------------------


def merge_attention(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Join two attention results over disjoint key sets.

    Args:
        out1, out2: ``[B, H, S, D]`` fp32, fp16 or bf16.
        lse1, lse2: fp32 ``[B, H, S]``, natural logarithm; -inf where nothing was seen.

    Returns:
        ``out`` in the dtype of ``out1`` and ``lse`` fp32, as if both key sets had been attended at once.

    Raises:
        RuntimeError: one sentence, when shapes, dtypes or devices differ.
    """
    return _OPS.merge_attention(out1, lse1, out2, lse2)


@torch.library.register_fake(f"{NAMESPACE}::merge_attention")
def _(out1, lse1, out2, lse2):
    same_device("merge_attention", out1, lse1=lse1, out2=out2, lse2=lse2)
    return empty_like_query(out1), lse1.new_empty(lse1.shape)


def merge_attention_naive(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """The definition in fp64. Arguments as :func:`merge_attention`."""
    lse = torch.logaddexp(lse1.double(), lse2.double())
    safe = torch.where(lse == -torch.inf, 0.0, lse)
    w1 = torch.exp(lse1.double() - safe)[..., None]
    w2 = torch.exp(lse2.double() - safe)[..., None]
    # A part of weight 0 has seen nothing: whatever stands in its rows must not leak.
    mixed = torch.where(w1 == 0, 0.0, w1 * out1.double()) + torch.where(w2 == 0, 0.0, w2 * out2.double())
    return mixed.to(out1.dtype), lse.float()


# ---------------------------------------------------------------------------------------------------------
# permute_rows, unpermute_rows
# ---------------------------------------------------------------------------------------------------------


def permute_rows(x: Tensor, index: Tensor) -> Tensor:
    """Gather rows: ``out[b, h, i] = x[b, h, index[b, h, i]]``.

    Args:
        x: ``[B, H, S, D]``, any dtype.
        index: int32 ``[B|1, H|1, N]`` with values in ``[0, S)``.

    Returns:
        ``[B, H, N, D]``, contiguous.

    Raises:
        RuntimeError: one sentence, for an index outside ``[0, S)`` (module docstring: on CUDA on request;
            unchecked, that row's bytes are all 0xff, which is NaN in every floating dtype).
    """
    return _OPS.permute_rows(x, index)


@torch.library.register_fake(f"{NAMESPACE}::permute_rows")
def _(x, index):
    same_device("permute_rows", x, index=index)
    return x.new_empty(x.shape[0], x.shape[1], index.shape[2], x.shape[3])


def permute_rows_naive(x: Tensor, index: Tensor) -> Tensor:
    """The definition. Arguments as :func:`permute_rows`."""
    b, h, _, d = x.shape
    rows = index.long().expand(b, h, -1)
    return x.gather(2, rows[..., None].expand(-1, -1, -1, d))


def unpermute_rows(x: Tensor, index: Tensor) -> Tensor:
    """Scatter rows, the inverse of :func:`permute_rows`: ``out[b, h, index[b, h, i]] = x[b, h, i]``.

    Args:
        x: ``[B, H, S, D]``, any dtype.
        index: int32 ``[B|1, H|1, S]``, a permutation of ``[0, S)`` for each batch entry and head.

    Returns:
        ``[B, H, S, D]``, stored as ``[B, S, H, D]``, which is what the projection after attention reads.

    Raises:
        RuntimeError: one sentence, when the index has another length than x, or is no permutation (module
            docstring: on CUDA on request; unchecked, a row that no entry names holds anything).
    """
    return _OPS.unpermute_rows(x, index)


@torch.library.register_fake(f"{NAMESPACE}::unpermute_rows")
def _(x, index):
    same_device("unpermute_rows", x, index=index)
    b, h, s, d = x.shape
    return x.new_empty(b, s, h, d).transpose(1, 2)


def unpermute_rows_naive(x: Tensor, index: Tensor) -> Tensor:
    """The definition. Arguments as :func:`unpermute_rows`."""
    b, h, s, d = x.shape
    rows = index.long().expand(b, h, -1)
    return torch.empty_like(x).scatter(2, rows[..., None].expand(-1, -1, -1, d), x)


# ---------------------------------------------------------------------------------------------------------
# mean_pool_blocks
# ---------------------------------------------------------------------------------------------------------


def mean_pool_blocks(x: Tensor, *, offsets: Tensor | None = None, block_size: int = 128) -> Tensor:
    """Mean of each block's rows, summed in fp32.

    Args:
        x: ``[B, H, S, D]`` fp32, fp16 or bf16.
        offsets: int32 ``[B|1, H|1, n+1]`` block boundaries, or None for uniform blocks of ``block_size``
            rows, of which the last may be ragged and is divided by its true size.

    Returns:
        fp32 ``[B, H, n, D]``; an empty block gives 0.

    Raises:
        RuntimeError: one sentence, for a block size below 1, or offsets that do not start at 0, fall, or do not
            end at S (module docstring: on CUDA on request; unchecked, a block is what lies inside the sequence,
            and empty where they fall).
    """
    return _OPS.mean_pool_blocks(x, offsets=offsets, block_size=block_size)


def num_blocks(offsets: Tensor | None, block_size: int, length: int) -> int:
    """Number of blocks of a sequence."""
    return (length + block_size - 1) // block_size if offsets is None else offsets.shape[-1] - 1


@torch.library.register_fake(f"{NAMESPACE}::mean_pool_blocks")
def _(x, *, offsets=None, block_size=128):
    same_device("mean_pool_blocks", x, offsets=offsets)
    b, h, s, d = x.shape
    return x.new_empty(b, h, num_blocks(offsets, block_size, s), d, dtype=torch.float32)


def mean_pool_blocks_naive(x: Tensor, *, offsets: Tensor | None = None, block_size: int = 128) -> Tensor:
    """The definition. Arguments as :func:`mean_pool_blocks`."""
    b, h, s, d = x.shape
    out = torch.zeros(b, h, num_blocks(offsets, block_size, s), d, dtype=torch.float64, device=x.device)
    for i in range(b):
        for j in range(h):
            for n, (start, end) in enumerate(block_bounds(offsets, block_size, s, i, j)):
                if end > start:
                    out[i, j, n] = x[i, j, start:end].double().mean(0)
    return out.float()


# ---------------------------------------------------------------------------------------------------------
# kmeans_assign, label_sort, segment_mean
# ---------------------------------------------------------------------------------------------------------


def kmeans_assign(x: Tensor, centroids: Tensor) -> Tensor:
    """Nearest centroid (Euclidean) of each row.

    Args:
        x: ``[B, H, N, D]`` fp32, fp16 or bf16, D a multiple of 8 up to 256.
        centroids: ``[B, H, C, D]``, dtype of x, C >= 1.

    Returns:
        int32 ``[B, H, N]`` in ``[0, C)``. The score ``x.c - |c|^2 / 2`` is formed in fp32, which avoids the
        cancellation of the expanded distance; ties go to the lowest index; a row of NaN gets 0, and a
        centroid with NaN no row.

    Raises:
        RuntimeError: one sentence, for another D, or centroids that do not fit x.
    """
    return _OPS.kmeans_assign(x, centroids)


@torch.library.register_fake(f"{NAMESPACE}::kmeans_assign")
def _(x, centroids):
    same_device("kmeans_assign", x, centroids=centroids)
    return x.new_empty(x.shape[:3], dtype=torch.int32)


def kmeans_assign_naive(x: Tensor, centroids: Tensor) -> Tensor:
    """The definition in fp64. Arguments as :func:`kmeans_assign`."""
    c = centroids.double()
    scores = x.double() @ c.transpose(-1, -2) - c.square().sum(-1)[..., None, :] / 2
    return scores.nan_to_num(nan=-torch.inf).argmax(-1).int()


def label_sort(labels: Tensor, num_labels: int) -> tuple[Tensor, Tensor]:
    """Stable counting sort of labels.

    Args:
        labels: int32 ``[B, H, N]`` in ``[0, num_labels)``.

    Returns:
        ``sorted_idx`` int32 ``[B, H, N]``, the rows of label 0 in order, then of label 1, and so on, and
        ``offsets`` int32 ``[B, H, num_labels + 1]`` with ``offsets[0] = 0`` and ``offsets[-1] = N``.

    Raises:
        RuntimeError: one sentence, when ``num_labels`` is below 1, or a label lies outside (module docstring:
            on CUDA on request; unchecked, it counts as the nearest label that there is).
    """
    return _OPS.label_sort(labels, num_labels)


@torch.library.register_fake(f"{NAMESPACE}::label_sort")
def _(labels, num_labels):
    b, h, n = labels.shape
    return labels.new_empty(b, h, n), labels.new_empty(b, h, num_labels + 1)


def label_sort_naive(labels: Tensor, num_labels: int) -> tuple[Tensor, Tensor]:
    """The definition. Arguments as :func:`label_sort`."""
    sorted_idx = labels.argsort(dim=-1, stable=True).int()
    counts = torch.nn.functional.one_hot(labels.long(), num_labels).sum(-2)
    offsets = torch.nn.functional.pad(counts.cumsum(-1), (1, 0)).int()
    return sorted_idx, offsets


def segment_mean(x: Tensor, sorted_idx: Tensor, offsets: Tensor, fallback: Tensor) -> Tensor:
    """Mean of the rows of each segment; k-means' centroid update.

    Args:
        x: ``[B, H, N, D]`` fp32, fp16 or bf16, D a multiple of 8 up to 256.
        sorted_idx, offsets: as :func:`label_sort` returns them.
        fallback: ``[B, H, C, D]``, dtype of x: what a segment gets that is empty, or whose mean is not finite
            in some column (NaN or Inf in a row, a sum beyond fp32, or a mean beyond x's dtype): all of its
            columns then.

    Returns:
        ``[B, H, C, D]`` in x's dtype, contiguous. Sums are fp32 in a fixed order: equal inputs give equal
        bits. It is finite where the fallback is.

    Raises:
        RuntimeError: one sentence, for another D, rows outside ``[0, N)``, or offsets that do not start at 0,
            fall, or do not end at N (module docstring: on CUDA on request; unchecked, such a row counts as
            zeros, and a segment whose offsets fall as empty).
    """
    return _OPS.segment_mean(x, sorted_idx, offsets, fallback)


@torch.library.register_fake(f"{NAMESPACE}::segment_mean")
def _(x, sorted_idx, offsets, fallback):
    same_device("segment_mean", x, sorted_idx=sorted_idx, offsets=offsets, fallback=fallback)
    return fallback.new_empty(fallback.shape)


def segment_mean_naive(x: Tensor, sorted_idx: Tensor, offsets: Tensor, fallback: Tensor) -> Tensor:
    """The definition in fp64, except that sums may not exceed fp32. Arguments as :func:`segment_mean`."""
    out = fallback.clone()
    for b in range(x.shape[0]):
        for h in range(x.shape[1]):
            bounds = offsets[b, h].tolist()
            for c, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
                total = x[b, h, sorted_idx[b, h, start:end].long()].double().sum(0)
                mean = (total / (end - start)).to(x.dtype) if end > start else total
                if end > start and bool((total.float().isfinite() & mean.isfinite()).all()):
                    out[b, h, c] = mean
    return out


# ---------------------------------------------------------------------------------------------------------
# topk_blocks, topp_blocks
# ---------------------------------------------------------------------------------------------------------


def topk_blocks(
    scores: Tensor, k: int, *, per_head: bool = False, keep_row_max: bool = True
) -> tuple[Tensor, Tensor]:
    """Keep the k best blocks of each row, or of each head's whole map.

    Args:
        scores: fp32 ``[B, H, nQ, nKV]``.
        k: how many to keep: of each row's nKV, or of the head's nQ * nKV when ``per_head``. At least 0.
        per_head: rank the flattened map of a head, so that rows get different counts (DraftAttention).
        keep_row_max: add each row's best block (lowest index) where it was not kept.

    Returns:
        ``kv_num_blocks`` int32 ``[B, H, nQ]`` and ``kv_indices`` int32 ``[B, H, nQ, nKV]``: ascending, unused
        entries 0. Ties go to the lowest flat index; NaN ranks below -inf.

    Raises:
        RuntimeError: one sentence, when ``k`` is negative or scores are not fp32.
    """
    return _OPS.topk_blocks(scores, k, per_head=per_head, keep_row_max=keep_row_max)


def _fake_lists(scores):
    return scores.new_empty(scores.shape[:3], dtype=torch.int32), scores.new_empty(
        scores.shape, dtype=torch.int32
    )


@torch.library.register_fake(f"{NAMESPACE}::topk_blocks")
def _(scores, k, *, per_head=False, keep_row_max=True):
    return _fake_lists(scores)


def lists_from_mask(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Block lists of a boolean map.

    Args:
        keep: bool ``[B, H, nQ, nKV]``.

    Returns:
        ``kv_num_blocks`` int32 ``[B, H, nQ]`` and ``kv_indices`` int32 ``[B, H, nQ, nKV]``, ascending, unused
        entries 0.
    """
    counts = keep.sum(-1, dtype=torch.int32)
    order = (~keep).int().argsort(dim=-1, stable=True).int()
    slots = torch.arange(keep.shape[-1], device=keep.device, dtype=torch.int32)
    return counts, torch.where(slots < counts[..., None], order, 0)


def mask_from_lists(kv_num_blocks: Tensor, kv_indices: Tensor, num_kv_blocks: int) -> Tensor:
    """Boolean map ``[B, H, nQ, num_kv_blocks]`` of block lists; the inverse of :func:`lists_from_mask`."""
    slots = torch.arange(kv_indices.shape[-1], device=kv_indices.device)
    used = slots < kv_num_blocks[..., None]
    target = torch.where(used, kv_indices.long(), num_kv_blocks)
    keep = torch.zeros(*kv_num_blocks.shape, num_kv_blocks + 1, dtype=torch.bool, device=kv_indices.device)
    return keep.scatter_(-1, target, True)[..., :num_kv_blocks]


def _descending(values: Tensor) -> Tensor:
    """Order of the last dimension, largest first, ties by lowest index, NaN last."""
    first = values.argsort(dim=-1, descending=True, stable=True)
    is_nan = values.isnan().gather(-1, first)
    return first.gather(-1, is_nan.int().argsort(dim=-1, stable=True))


def topk_blocks_naive(
    scores: Tensor, k: int, *, per_head: bool = False, keep_row_max: bool = True
) -> tuple[Tensor, Tensor]:
    """The definition. Arguments as :func:`topk_blocks`."""
    flat = scores.flatten(-2) if per_head else scores
    keep = torch.zeros_like(flat, dtype=torch.bool)
    keep = keep.scatter(-1, _descending(flat)[..., :k], True).view(scores.shape)
    if keep_row_max and scores.shape[-1] > 0:
        keep = keep.scatter(-1, _descending(scores)[..., :1], True)
    return lists_from_mask(keep)


def topp_blocks(
    scores: Tensor, p: float, *, weights: Tensor | None = None, min_blocks: int = 1
) -> tuple[Tensor, Tensor]:
    """Keep the fewest blocks of each row whose softmax mass first exceeds p.

    Args:
        scores: fp32 ``[B, H, nQ, nKV]`` logits of query block against key block.
        p: mass to exceed. ``p >= 1`` keeps every block.
        weights: int32 ``[B|1, H|1, nKV]`` sizes of the key blocks in tokens: the mass of block j is
            ``weights[j] * exp(scores[j])``, normalised. None means all 1.
        min_blocks: keep at least the best ``min_blocks``, and never fewer than 1.

    Returns:
        ``kv_num_blocks`` int32 ``[B, H, nQ]`` and ``kv_indices`` int32 ``[B, H, nQ, nKV]``: ascending, unused
        entries 0. The block that crosses p is kept (SVG2, section 4.3 of the paper). All sums are fp32 or
        wider: bf16 sums stall below 0.9. Ties go to the lowest index; NaN has mass 0.

    Raises:
        RuntimeError: one sentence, when ``p`` or ``min_blocks`` is negative, scores are not fp32, or weights do
            not fit them.
    """
    return _OPS.topp_blocks(scores, p, weights=weights, min_blocks=min_blocks)


@torch.library.register_fake(f"{NAMESPACE}::topp_blocks")
def _(scores, p, *, weights=None, min_blocks=1):
    same_device("topp_blocks", scores, weights=weights)
    return _fake_lists(scores)


def block_mass_fractions(scores: Tensor, weights: Tensor | None = None) -> Tensor:
    """Softmax mass of each key block for each query block, fp64 ``[B, H, nQ, nKV]``; NaN scores have 0."""
    logits = scores.double().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if weights is not None:
        logits = logits + weights.double().log()[..., None, :]
    return torch.softmax(logits, dim=-1).nan_to_num(nan=0.0)


def topp_blocks_naive(
    scores: Tensor, p: float, *, weights: Tensor | None = None, min_blocks: int = 1
) -> tuple[Tensor, Tensor]:
    """The definition in fp64. Arguments as :func:`topp_blocks`."""
    if p >= 1:
        return lists_from_mask(torch.ones_like(scores, dtype=torch.bool))
    mass = block_mass_fractions(scores, weights)
    order = _descending(mass)
    before = mass.gather(-1, order).cumsum(-1) - mass.gather(-1, order)
    rank = torch.arange(scores.shape[-1], device=scores.device)
    keep_sorted = (before <= p) | (rank < max(1, min_blocks))
    # A row without any mass has nothing to cross: only the least number is kept.
    keep_sorted &= (mass.sum(-1, keepdim=True) > 0) | (rank < max(1, min_blocks))
    # The prefix ends at the crossing block; rounding must not let a later one back in.
    keep_sorted = keep_sorted.int().cummin(-1).values.bool()
    return lists_from_mask(torch.zeros_like(keep_sorted).scatter(-1, order, keep_sorted))


# ---------------------------------------------------------------------------------------------------------
# rms_norm_rope
# ---------------------------------------------------------------------------------------------------------


def rms_norm_rope(
    x: Tensor,
    weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    index: Tensor | None = None,
    across_heads: bool = False,
    interleaved: bool = True,
    rope_start: int = 0,
    eps: float | None = 1e-6,
) -> Tensor:
    """RMSNorm, rotary embedding and a permutation of tokens in one pass: ``out[i] = rope(norm(x[index[i]]))``.

    Token ``j`` is normed and rotated as token ``j``, wherever it then goes. With pairs ``(c, c')`` of channels,
    ``rope(y)_c = y_c cos_c - y_c' sin_c`` and ``rope(y)_c' = y_c' cos_c' + y_c sin_c'``; with
    ``norm(x) = x / sqrt(mean(x^2) + eps) * weight``.

    Args:
        x: ``[B, H, S, D]`` fp32, fp16 or bf16, D a multiple of 8 up to 256.
        weight: ``[D]``, or ``[H * D]`` for one of its own in each head, fp32 or dtype of x; None means all 1.
        cos, sin: ``[B|1, H|1, R, D]``, or ``[B|1, H|1, R, D/2]`` with one value a pair, fp32 or dtype of x.
            Row r turns token ``rope_start + r``; other tokens, such as text, stay. None: no rotation.
        index: int32 ``[B|1, H|1, S]``, a permutation of ``[0, S)``, or None for the order of x.
        across_heads: the mean is over all heads of a token (Wan) instead of over one (HunyuanVideo).
        interleaved: pairs are neighbours ``(2i, 2i + 1)`` (Wan, HunyuanVideo, CogVideoX, LTX) instead of
            ``(i, i + D/2)``.
        rope_start: at least 0, and ``rope_start + R`` at most S. Where text stands first, its length.
        eps: at least 0, added to the mean; None means no norm, and then takes no weight.

    Returns:
        ``[B, H, S, D]`` in x's dtype, stored as ``[B, S, H, D]`` when x is such a view. The arithmetic is fp32
        throughout and is rounded once. Equal inputs give equal bits, with an index the same as without one, in
        another place.

    Raises:
        RuntimeError: one sentence, for another D, a weight, tables or an index that do not fit, one table
            alone, a weight without a norm, a negative ``eps``, and an index that is no permutation (module
            docstring: on CUDA on request; unchecked, a token that no entry names is dropped, and a row that
            then gets none holds anything).

    NaN and Inf in a row stay in that row, and with ``across_heads`` in the rows of that token.

    q and k are two calls: one launch for both would save a few microseconds of some hundred.
    """
    return _OPS.rms_norm_rope(
        x,
        weight,
        cos,
        sin,
        index=index,
        across_heads=across_heads,
        interleaved=interleaved,
        rope_start=rope_start,
        eps=eps,
    )


@torch.library.register_fake(f"{NAMESPACE}::rms_norm_rope")
def _(
    x,
    weight=None,
    cos=None,
    sin=None,
    *,
    index=None,
    across_heads=False,
    interleaved=True,
    rope_start=0,
    eps=1e-6,
):
    same_device("rms_norm_rope", x, weight=weight, cos=cos, sin=sin, index=index)
    return empty_like_query(x)


def rms_norm_rope_naive(
    x: Tensor,
    weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    index: Tensor | None = None,
    across_heads: bool = False,
    interleaved: bool = True,
    rope_start: int = 0,
    eps: float | None = 1e-6,
) -> Tensor:
    """The definition in fp64. Arguments as :func:`rms_norm_rope`."""
    y = x.double()
    if eps is not None:
        y = y / (y.square().mean((1, 3) if across_heads else 3, keepdim=True) + eps).sqrt()
    if weight is not None:
        y = y * weight.double().view(-1, 1, x.shape[3])
    if cos is not None:
        turned = y[:, :, rope_start : rope_start + cos.shape[2]]
        first, second = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
        other = _pairs(-second, first, interleaved)
        if cos.shape[3] < x.shape[3]:
            cos, sin = (_pairs(t, t, interleaved) for t in (cos, sin))
        turned = turned * cos.double() + other * sin.double()
        y = torch.cat([y[:, :, :rope_start], turned, y[:, :, rope_start + cos.shape[2] :]], 2)
    y = y.to(x.dtype)
    return y if index is None else permute_rows_naive(y, index)


def _pairs(first: Tensor, second: Tensor, interleaved: bool) -> Tensor:
    """Channels from the first and the second ones of all pairs, ``[..., D/2]`` each."""
    return torch.stack([first, second], -1).flatten(-2) if interleaved else torch.cat([first, second], -1)


# ---------------------------------------------------------------------------------------------------------
# block_mass, block_mass_topk
# ---------------------------------------------------------------------------------------------------------


def block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    kv_lengths: Tensor | None = None,
    q_block_size: int = 64,
    kv_block_size: int = 64,
    scale: float | None = None,
) -> Tensor:
    """How much softmax mass each block of keys has for each block of queries, measured and not estimated.

    ``mass[i, j]`` is the sum over the rows r of query block i and the keys t of key block j of
    ``exp(min(scale * q[r].k[t] - lse[r], 30))`` (AdaSpa, arXiv 2502.21079, section 4; its algorithms print a
    logarithm there). With the lse of dense attention over the same q and k, a row of blocks sums to the number
    of its query rows. With an lse of an earlier step it does not, and the clamp keeps the terms finite.

    Args:
        q: ``[B, H, Sq, D]`` fp16 or bf16 (fp32 too on CPU); D in 64, 96, 128 on CUDA, any multiple of 8 up
            to 256 on CPU.
        k: ``[B, H, Skv, D]``, dtype and device of ``q``.
        lse: fp32 ``[B, H, Sq]``, natural logarithm, as :func:`block_sparse_attention` returns it.
        kv_lengths: int32 ``[B]`` in ``[0, Skv]``; keys at or past it are padding and count nothing. None means
            Skv.
        q_block_size, kv_block_size: at least 1; the last block of an axis may be ragged. On CUDA query blocks
            are padded to a multiple of 16 rows and key blocks to one of 64, which costs time only.
        scale: factor on the logits, by default ``D ** -0.5``.

    Returns:
        fp32 ``[B, H, nQ, nKV]``. Exponentials and sums are fp32 in a fixed order: equal inputs give equal bits.
        A row whose lse is -inf saw no key and adds 0, whatever it holds.

    NaN in a query row or its lse reaches all blocks with keys of that row's query block; in a key all masses of
    its key block; behind ``kv_lengths`` nothing.

    Raises:
        RuntimeError: one sentence, for another head size or dtype than the device has, rows that are not
            aligned to 16 bytes (CUDA), block sizes below 1, and lengths outside of ``[0, Skv]`` (module
            docstring: on CUDA on request; unchecked, the nearest length counts).
    """
    return _OPS.block_mass(
        q,
        k,
        lse,
        kv_lengths=kv_lengths,
        q_block_size=q_block_size,
        kv_block_size=kv_block_size,
        scale=scale,
    )


@torch.library.register_fake(f"{NAMESPACE}::block_mass")
def _(q, k, lse, *, kv_lengths=None, q_block_size=64, kv_block_size=64, scale=None):
    same_device("block_mass", q, k=k, lse=lse, kv_lengths=kv_lengths)
    nq, nkv = num_blocks(None, q_block_size, q.shape[2]), num_blocks(None, kv_block_size, k.shape[2])
    return q.new_empty(*q.shape[:2], nq, nkv, dtype=torch.float32)


def block_mass_naive(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    kv_lengths: Tensor | None = None,
    q_block_size: int = 64,
    kv_block_size: int = 64,
    scale: float | None = None,
) -> Tensor:
    """The definition, in fp64, one pair of blocks at a time. Arguments as :func:`block_mass`."""
    b, h, seqlen_q, dim = q.shape
    scale = dim**-0.5 if scale is None else scale
    q_bounds = block_bounds(None, q_block_size, seqlen_q, 0, 0)
    kv_bounds = block_bounds(None, kv_block_size, k.shape[2], 0, 0)
    mass = torch.zeros(b, h, len(q_bounds), len(kv_bounds), dtype=torch.float64, device=q.device)
    seen = lse.double() != -torch.inf
    for entry in range(b):
        length = k.shape[2] if kv_lengths is None else int(kv_lengths[entry])
        for i, (q_start, q_end) in enumerate(q_bounds):
            for j, (start, end) in enumerate(kv_bounds):
                if (end := min(end, length)) <= start:
                    continue
                logits = q[entry, :, q_start:q_end].double() @ k[entry, :, start:end].double().mT * scale
                exponents = logits - lse[entry, :, q_start:q_end, None].double()
                terms = exponents.clamp(max=30).exp().sum(-1)
                mass[entry, :, i, j] = torch.where(seen[entry, :, q_start:q_end], terms, 0.0).sum(-1)
    return mass.float()


def block_mass_topk(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    k_max: int,
    *,
    forced: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    q_block_size: int = 64,
    kv_block_size: int = 64,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The heaviest key blocks of each query block, in such an order that a smaller budget is a prefix.

    :func:`block_mass` and the choice among its rows in one kernel: no ``[nQ, nKV]`` matrix is written. What a
    budget of n blocks keeps is ``indices[..., :n]``, and its recall ``mass[..., :n].sum(-1) / total``.

    Args:
        q, k, lse, kv_lengths, q_block_size, kv_block_size, scale: as :func:`block_mass` takes them.
        k_max: how many blocks to list, 0 to nKV. On CUDA nKV may be up to 24576, or less where a thread block's
            shared memory holds fewer: it takes 4 bytes a key block, and 2 bytes more or 32 KB.
        forced: bool ``[nKV]`` or ``[B|1, H|1, nKV]``: blocks that come first whatever their mass.

    Returns:
        ``indices`` int32 ``[B, H, nQ, k_max]``: first the forced blocks, ascending, then the others by falling
        mass, ties to the lowest index and NaN last. ``mass`` fp32 ``[B, H, nQ, k_max]``, that of each listed
        block. ``total`` fp32 ``[B, H, nQ]``, that of all blocks of the row.

    Raises:
        RuntimeError: as :func:`block_mass`, and for ``k_max`` outside of ``[0, nKV]``, more key blocks than the
            device takes, or ``forced`` of another shape or dtype.
    """
    return _OPS.block_mass_topk(
        q,
        k,
        lse,
        k_max,
        forced=forced,
        kv_lengths=kv_lengths,
        q_block_size=q_block_size,
        kv_block_size=kv_block_size,
        scale=scale,
    )


@torch.library.register_fake(f"{NAMESPACE}::block_mass_topk")
def _(q, k, lse, k_max, *, forced=None, kv_lengths=None, q_block_size=64, kv_block_size=64, scale=None):
    same_device("block_mass_topk", q, k=k, lse=lse, forced=forced, kv_lengths=kv_lengths)
    rows = (*q.shape[:2], num_blocks(None, q_block_size, q.shape[2]))
    return (
        q.new_empty(*rows, k_max, dtype=torch.int32),
        q.new_empty(*rows, k_max, dtype=torch.float32),
        q.new_empty(rows, dtype=torch.float32),
    )


def heaviest_blocks(mass: Tensor, k_max: int, forced: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`block_mass_topk` lists of masses ``[B, H, nQ, nKV]`` that are known."""
    order = _descending(mass)
    if forced is not None:
        first = forced.expand(*mass.shape[:2], -1)[:, :, None].expand(mass.shape)
        index = torch.arange(mass.shape[-1], device=mass.device).expand(mass.shape)
        rank = torch.empty_like(order).scatter_(-1, order, index)
        order = torch.where(first, index - mass.shape[-1], rank).argsort(-1)
    indices = order[..., :k_max]
    return indices.int(), mass.gather(-1, indices), mass.double().sum(-1).float()


def block_mass_topk_naive(
    q: Tensor, k: Tensor, lse: Tensor, k_max: int, *, forced: Tensor | None = None, **kwargs
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition. Arguments as :func:`block_mass_topk`."""
    return heaviest_blocks(block_mass_naive(q, k, lse, **kwargs), k_max, forced)
