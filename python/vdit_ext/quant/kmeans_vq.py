"""Plain vector quantization of a weight: runs of a row's weights, and k-means over them.

VQ4DiT (arXiv 2408.17131), section 3, begins here; as a method of its own it is the baseline that calibrated
assignments are measured against.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops


@dataclass(frozen=True)
class VQFormat:
    """Length of a word, words of a codebook, and the bits a weight costs."""

    dim: int
    codewords: int
    bits: int


# 256 words of 4 weights, 8 bits an index; 64 words of 2 weights, 6 bits an index.
FORMATS = {"w2": VQFormat(4, 256, 2), "w3": VQFormat(2, 64, 3)}


def vq_format(bits: str) -> VQFormat:
    """The format of a name. Raises ValueError for one that VQ does not have."""
    if bits not in FORMATS:
        raise ValueError(
            f"vdit_ext.quant: bits of vector quantization must be {' or '.join(FORMATS)}, got {bits!r}"
        )
    return FORMATS[bits]


# Seeding passes over its words once for each centroid, and a thousand words for each of 256 are enough to find
# where they are.
SEED_WORDS = 1 << 18
# Fitted to 4,096 words for each of 256, centroids come within 0.002 dB of those of 3 million Gaussian words, in
# a third of the time. A feed-forward weight of a 14B model has 17 million.
LLOYD_WORDS = 1 << 20
# Passes that take off less than this share of the error, 0.0004 dB, are not worth their time: half of a hundred
# are left out, for 0.01 dB.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class KMeans:
    """What :func:`kmeans_vq` found.

    codebook fp32 ``[k, d]``; indices int64 ``[V]``, the nearest word of each vector; errors: mean squared error
    per weight, with the codebook at the beginning of each iteration and, last, with this one.
    """

    codebook: Tensor
    indices: Tensor
    errors: list[float]


def split_words(weight: Tensor, dim: int) -> Tensor:
    """Weight ``[O, C]`` to fp32 words ``[O * C / dim, dim]``, along C, row after row.

    Raises ValueError when ``dim`` does not divide C.
    """
    columns = weight.shape[1]
    if columns % dim:
        raise ValueError(
            f"vdit_ext.quant: input features must be a multiple of the word length {dim}, got {columns}; "
            "leave this layer out with layers="
        )
    return weight.detach().to(torch.float32).reshape(-1, dim)


def clamp_codewords(codewords: int, words: int) -> int:
    """``codewords``, but at most the largest power of two that leaves four words to each; at least 1."""
    return min(codewords, 1 << max(0, (words // 4).bit_length() - 1))


def nearest_words(words: Tensor, codebook: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
    """The ``count`` nearest codewords of each word: int64 indices and fp32 distances, both ``[V, count]``.

    Distances are Euclidean (not squared) and summed from differences, so that an exact hit has distance 0;
    rows are sorted by them, ties to the lower index. words fp32 ``[V, d]``, codebook fp32 ``[k, d]``.
    """
    indices = ops.vq_assign(words.contiguous(), codebook.contiguous(), count)[0].long()
    distances = torch.stack(
        [(words - codebook[column]).square().sum(-1).sqrt() for column in indices.unbind(1)], 1
    )
    if count > 1:  # the op's own distances round differently
        order = distances.argsort(dim=1, stable=True)
        indices, distances = indices.gather(1, order), distances.gather(1, order)
    return indices, distances


def kmeans_vq(
    words: Tensor, codewords: int, *, iterations: int = 100, tolerance: float = TOLERANCE, seed: int = 0
) -> KMeans:
    """Lloyd's k-means with k-means++ seeding.

    Where words are many, centroids are fitted to :data:`LLOYD_WORDS` of them, drawn at random, and then once to
    all; the errors are those of the last fit.

    Args:
        words: fp32 ``[V, d]``, V at least 1.
        codewords: k; no clamping here, so that words may be fewer.
        iterations: at most; it ends early once no word changes its cluster.
        tolerance: it also ends once an iteration takes off at most this share of the error.
        seed: of the seeding and of the draw, all else is decided.

    An empty cluster keeps its centroid, which the error can only gain from.
    """
    codebook = seed_codebook(words, codewords, seed)
    if len(words) <= LLOYD_WORDS or iterations == 0:
        return _lloyd(words, codebook, iterations, tolerance)
    some = _drawn(words, LLOYD_WORDS, torch.Generator().manual_seed(seed))
    codebook = _lloyd(some, codebook, iterations, tolerance).codebook
    return _lloyd(words, codebook, 1, tolerance)


def _lloyd(words: Tensor, codebook: Tensor, iterations: int, tolerance: float) -> KMeans:
    indices, distances = nearest_words(words, codebook)
    errors = [_error(distances, words)]
    for _ in range(iterations):
        codebook = _means(words, indices[:, 0], codebook)
        before, (indices, distances) = indices, nearest_words(words, codebook)
        errors.append(_error(distances, words))
        if errors[-2] - errors[-1] <= tolerance * errors[-2] or torch.equal(before, indices):
            break
    return KMeans(codebook, indices[:, 0], errors)


def _drawn(words: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """So many of the words, at random; one may be drawn twice."""
    return words[torch.randint(len(words), (count,), generator=generator).to(words.device)]


def seed_codebook(words: Tensor, codewords: int, seed: int) -> Tensor:
    """k-means++: each next centroid is a word, drawn by its squared distance to those before it.

    Where words are many, centroids are drawn from :data:`SEED_WORDS` of them, themselves drawn at random.
    Returns fp32 ``[k, d]``. Once every word is a centroid, the rest repeat the first one.
    """
    generator = torch.Generator().manual_seed(seed)
    if len(words) > SEED_WORDS:
        words = _drawn(words, SEED_WORDS, generator)
    draws = torch.rand(codewords, dtype=torch.float64, generator=generator).tolist()
    chosen = [min(int(draws[0] * len(words)), len(words) - 1)]
    nearest = (words - words[chosen[0]]).square().sum(-1)
    for draw in draws[1:]:
        mass = nearest.double().cumsum(0)
        total = float(mass[-1])
        place = int(torch.searchsorted(mass, draw * total, right=True)) if total > 0 else chosen[0]
        chosen.append(min(place, len(words) - 1))
        nearest = torch.minimum(nearest, (words - words[chosen[-1]]).square().sum(-1))
    return words[chosen].clone()


def _means(words: Tensor, indices: Tensor, before: Tensor) -> Tensor:
    """Mean of each cluster, in fp64 inside; an empty one stays as before."""
    counts = indices.bincount(minlength=len(before)).unsqueeze(1)
    sums = before.new_zeros(before.shape, dtype=torch.float64).index_add_(0, indices, words.double())
    return torch.where(counts > 0, sums / counts.clamp_min(1), before.double()).float()


def _error(distances: Tensor, words: Tensor) -> float:
    """Mean squared error per weight."""
    return float(distances.double().square().sum()) / words.numel()


def row_scales(weight: Tensor) -> Tensor:
    """fp32 ``[O]``: root mean square of each row, as fp16 stores it; 1 for a zero row.

    Rows of one spread share a codebook better (1.2 to 1.8 dB where row norms vary).
    """
    scale = weight.detach().to(torch.float32).square().mean(1).sqrt().to(torch.float16).to(torch.float32)
    return torch.where(scale > 0, scale, torch.ones_like(scale))
