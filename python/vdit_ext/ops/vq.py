"""The vq family, weights as indices into a codebook of short words: each op's wrapper, fake and naive
definition.

Shapes: M rows (or B batch times S tokens), K input channels, N output channels, V vectors, C codewords of D
channels.

Two formats of a codebook and its codes (``csrc/include/vdit/vq.h`` has every bit):

==========  =============  ========================================  ==============
codebook    bits a weight  tile of 32 output by 64 input channels    bytes a tile
==========  =============  ========================================  ==============
[256, 4]    2              a byte for four neighbouring inputs       512
[64, 2]     3              12 bits for two indices, the first low    768
==========  =============  ========================================  ==============

``pack_vq`` makes the tiles, ``unpack_vq`` is its inverse. Tiles are padded with index 0 past N and K, which
never changes a result.

Every op raises RuntimeError, one sentence with what was expected and what came, for tensors of another rank,
shape, dtype or device; "Raises" names what else is refused. No op has a backward: results ask for gradients
where an argument does, and ``backward()`` raises RuntimeError. VQ4DiT (arXiv 2408.17131), section 3, is where
the codes come from; the layout follows the register fragments of the m16n8k32 tensor-core instruction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import NAMESPACE
from ._registration import register_no_backward, same_device

_OPS = getattr(torch.ops, NAMESPACE)

# The family, in the order of its schema.
OPS = ("vq_assign", "vq_dequantize", "vq_linear")
TILE_OUT, TILE_IN = 32, 64
# Codewords of a codebook by its word length, and bytes of a tile.
CODEWORDS = {4: 256, 2: 64}
TILE_BYTES = {4: 512, 2: 768}
MAX_DIM, MAX_COUNT, MAX_CODEWORDS, MAX_IN_FEATURES = 16, 8, 65_536, 65_536

for _op in OPS:
    register_no_backward(_op)


# ---------------------------------------------------------------------------------------------------------
# Codes in tiles
# ---------------------------------------------------------------------------------------------------------


def pack_vq(indices: Tensor, dim: int) -> Tensor:
    """Codeword indices of a weight as tiles.

    Args:
        indices: integers ``[N, K / dim]``: entry ``[n, i]`` names the word of inputs ``dim * i`` to
            ``dim * i + dim - 1`` of output n. 0 to 255 for ``dim`` 4, 0 to 63 for ``dim`` 2.
        dim: channels of a word, 4 or 2.

    Returns:
        uint8 ``[ceil(N / 32), ceil(K / 64), 512]``, or 768 for ``dim`` 2.

    Raises:
        ValueError: one sentence, for another ``dim`` or rank, a dtype that is no integer, or an index out of
        range.
    """
    if dim not in CODEWORDS:
        raise ValueError(f"vdit::pack_vq: dim must be 4 or 2, got {dim}")
    if indices.dim() != 2 or indices.is_floating_point():
        raise ValueError(
            f"vdit::pack_vq: indices must be integers [N, K / {dim}], got {indices.dtype} {list(indices.shape)}"
        )
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < CODEWORDS[dim]:
        raise ValueError(
            f"vdit::pack_vq: indices must be in 0..{CODEWORDS[dim] - 1}, got {int(indices.min())} to "
            f"{int(indices.max())}"
        )
    n, words = indices.shape
    rows, columns = -(-n // TILE_OUT), -(-words * dim // TILE_IN)
    padded = indices.new_zeros(rows * TILE_OUT, columns * TILE_IN // dim, dtype=torch.int32)
    padded[:n, :words] = indices
    if dim == 4:
        return _quads_to_lanes(padded, rows, columns).to(torch.uint8).reshape(rows, columns, 512)
    quads = _quads_to_lanes(padded[:, 0::2] + 64 * padded[:, 1::2], rows, columns)
    even, odd = quads[..., 0::2], quads[..., 1::2]  # 24 bits: the even quad low
    three = torch.stack([even & 255, even >> 8 | (odd & 15) << 4, odd >> 4], -1)
    return three.to(torch.uint8).reshape(rows, columns, 768)


def unpack_vq(codes: Tensor, out_features: int, in_features: int) -> Tensor:
    """The inverse of :func:`pack_vq`.

    Args:
        codes: uint8 ``[ceil(N / 32), ceil(K / 64), 512 or 768]``.
        out_features, in_features: N and K; K is a multiple of the word length, which the tile size tells.

    Returns:
        int32 ``[N, K / 4]`` for 512 bytes a tile, ``[N, K / 2]`` for 768.

    Raises:
        ValueError: one sentence, for tiles of another size or number, or a K that words do not fill.
    """
    dim = _dim_of_tiles("unpack_vq", codes, out_features, in_features)
    if in_features % dim:
        raise ValueError(f"vdit::unpack_vq: in_features must be a multiple of {dim}, got {in_features}")
    rows, columns = codes.shape[:2]
    if dim == 4:
        indices = _lanes_to_quads(codes.reshape(rows, columns, 32, 16).int(), rows, columns)
    else:
        three = codes.reshape(rows, columns, 32, 8, 3).int()
        even = three[..., 0] | (three[..., 1] & 15) << 8
        odd = three[..., 1] >> 4 | three[..., 2] << 4
        quads = _lanes_to_quads(torch.stack([even, odd], -1).flatten(-2), rows, columns)
        indices = torch.stack([quads & 63, quads >> 6], -1).flatten(-2)
    return indices[:out_features, : in_features // dim].contiguous()


def _quads_to_lanes(quads: Tensor, rows: int, columns: int) -> Tensor:
    """``[N, K / 4]`` to ``[rows, columns, lane, quad of the lane]``."""
    # n = 8 * sub + group, quad = 8 * half + 4 * middle + lane % 4
    split = quads.reshape(rows, 4, 8, columns, 2, 2, 4)
    return split.permute(0, 3, 2, 6, 4, 1, 5).reshape(rows, columns, 32, 16)


def _lanes_to_quads(lanes: Tensor, rows: int, columns: int) -> Tensor:
    split = lanes.reshape(rows, columns, 8, 4, 2, 4, 2)
    return split.permute(0, 5, 2, 1, 4, 6, 3).reshape(rows * TILE_OUT, columns * TILE_IN // 4)


def _dim_of_tiles(what: str, codes: Tensor, out_features: int, in_features: int) -> int:
    rows, columns = -(-out_features // TILE_OUT), -(-in_features // TILE_IN)
    if codes.dtype != torch.uint8 or list(codes.shape) not in ([rows, columns, b] for b in TILE_BYTES.values()):
        raise ValueError(
            f"vdit::{what}: codes must be uint8 [{rows}, {columns}, 512 or 768] for a weight "
            f"[{out_features}, {in_features}], got {codes.dtype} {list(codes.shape)}"
        )
    return 4 if codes.shape[2] == TILE_BYTES[4] else 2


# ---------------------------------------------------------------------------------------------------------
# vq_assign
# ---------------------------------------------------------------------------------------------------------


def vq_assign(vectors: Tensor, codebook: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
    """The ``count`` nearest codewords of each vector, by Euclidean distance.

    Args:
        vectors: fp32 ``[V, D]``, D from 1 to 16; V may be 0.
        codebook: fp32 ``[C, D]``, C from 1 to 65,536.
        count: 1 to 8, at most C.

    Returns:
        ``indices`` int32 ``[V, count]``, nearest first, ties to the lower index, and ``distances`` fp32
        ``[V, count]``: squared, ``max(0, |v|^2 - 2 v.c + |c|^2)`` in fp32. Its rounding is that of ``|v|^2``
        and ``|c|^2``, so codewords closer together than that may change places. No ``[V, C]`` matrix is formed.

        A vector with a NaN gets indices 0, 1, ... and distances NaN; a codeword with a NaN is never chosen
        before another.

    Raises:
        RuntimeError: one sentence, for D, C or count out of range (module docstring for the rest).
    """
    return _OPS.vq_assign(vectors, codebook, count)


@torch.library.register_fake(f"{NAMESPACE}::vq_assign")
def _(vectors, codebook, count=1):
    same_device("vq_assign", vectors, codebook=codebook)
    shape = (vectors.shape[0], count)
    return vectors.new_empty(shape, dtype=torch.int32), vectors.new_empty(shape)


def vq_assign_naive(vectors: Tensor, codebook: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
    """The definition, in fp64 over every pair, for finite values. Arguments as :func:`vq_assign`."""
    distances = (vectors.double()[:, None] - codebook.double()).square().sum(-1)
    nearest = distances.sort(dim=1, stable=True)
    return nearest.indices[:, :count].int(), nearest.values[:, :count].float()


# ---------------------------------------------------------------------------------------------------------
# vq_dequantize
# ---------------------------------------------------------------------------------------------------------


def vq_dequantize(
    codes: Tensor, codebook: Tensor, out_features: int, in_features: int, *, row_scale: Tensor | None = None
) -> Tensor:
    """The weight that codes and a codebook stand for.

    Args:
        codes: uint8 ``[ceil(N / 32), ceil(K / 64), 512 or 768]`` (:func:`pack_vq`).
        codebook: ``[256, 4]`` for 512 bytes a tile, ``[64, 2]`` for 768; fp32, fp16, bf16 or int8.
        out_features, in_features: N, and K of at most 65,536; K need not be a multiple of the word length.
        row_scale: fp32 ``[N]``, a factor on each row; not with an int8 codebook.

    Returns:
        ``[N, K]`` in the codebook's dtype: without ``row_scale`` the codebook's very bits.

    Raises:
        RuntimeError: one sentence, for codes or a codebook of other sizes, or a ``row_scale`` with int8.
    """
    return _OPS.vq_dequantize(codes, codebook, out_features, in_features, row_scale=row_scale)


@torch.library.register_fake(f"{NAMESPACE}::vq_dequantize")
def _(codes, codebook, out_features, in_features, *, row_scale=None):
    same_device("vq_dequantize", codes, codebook=codebook, row_scale=row_scale)
    return codebook.new_empty(out_features, in_features)


def vq_dequantize_naive(
    codes: Tensor, codebook: Tensor, out_features: int, in_features: int, *, row_scale: Tensor | None = None
) -> Tensor:
    """The definition. Arguments as :func:`vq_dequantize`."""
    whole = -(-in_features // TILE_IN) * TILE_IN  # in_features may end inside a word
    indices = unpack_vq(codes, out_features, whole).long()
    weight = codebook[indices].flatten(1)[:, :in_features]
    return weight if row_scale is None else (weight.float() * row_scale[:, None]).to(codebook.dtype)


# ---------------------------------------------------------------------------------------------------------
# vq_linear
# ---------------------------------------------------------------------------------------------------------


def vq_linear(
    x: Tensor,
    codes: Tensor,
    codebook: Tensor,
    out_features: int,
    *,
    x_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    path: str = "auto",
) -> Tensor:
    """A linear layer whose weight is codes and a codebook: ``epilogue(x W^T)``.

    In fp32 and in this order: the sum, ``* x_scale * weight_scale``, ``+ bias``, ``* gate``, ``+ residual``,
    then one rounding to ``out_dtype``.

    Args:
        x: ``[M, K]`` or ``[B, S, K]`` with a contiguous last dimension; int8 with an int8 codebook, else the
            codebook's fp16 or bf16 (fp32 too on the CPU). K at most 65,536, on CUDA a multiple of 16.
        codes: uint8 ``[ceil(N / 32), ceil(K / 64), 512 or 768]`` (:func:`pack_vq`).
        codebook: ``[256, 4]`` for 512 bytes a tile, ``[64, 2]`` for 768.
        out_features: N.
        x_scale: fp32, the shape of x without K; with int8 only, and there asked for unless ``out_dtype`` is
            int32.
        weight_scale: fp32 ``[N]``; None counts as 1.
        bias: fp32 ``[N]``.
        gate: fp32, fp16 or bf16 ``[M or 1, N]``, or ``[B or 1, S or 1, N]`` where x has three dimensions.
        residual: ``[..., N]`` of ``out_dtype``.
        out_dtype: fp32, fp16, bf16, or int32 for the bare sums of an int8 product (then nothing else is given).
            By default x's dtype, bf16 for int8.
        path: on CUDA, "fused" looks words up where they are multiplied; "expand" writes the weight to a scratch
            and multiplies that, floats with torch's linear, whose product is rounded to x's dtype before the
            rest of the epilogue. "auto" chooses by M (``vdit_ext._C.vq_path`` says how). The CPU always looks
            words up, unless an int8 product is to "expand".

    Returns:
        ``[..., N]`` of ``out_dtype``. With int8 the sums are exact; otherwise they are fp32.

    Raises:
        RuntimeError: one sentence, for codes or a codebook of other sizes, dtypes that do not go together, a
            missing or superfluous ``x_scale``, K above 65,536, a K that is no multiple of 16 (CUDA), an unknown
            ``path``.
    """
    return _OPS.vq_linear(
        x,
        codes,
        codebook,
        out_features,
        x_scale=x_scale,
        weight_scale=weight_scale,
        bias=bias,
        gate=gate,
        residual=residual,
        out_dtype=out_dtype,
        path=path,
    )


@torch.library.register_fake(f"{NAMESPACE}::vq_linear")
def _(
    x,
    codes,
    codebook,
    out_features,
    *,
    x_scale=None,
    weight_scale=None,
    bias=None,
    gate=None,
    residual=None,
    out_dtype=None,
    path="auto",
):
    same_device(
        "vq_linear",
        x,
        codes=codes,
        codebook=codebook,
        x_scale=x_scale,
        weight_scale=weight_scale,
        bias=bias,
        gate=gate,
        residual=residual,
    )
    return x.new_empty((*x.shape[:-1], out_features), dtype=out_dtype or _default_out_dtype(x))


def _default_out_dtype(x: Tensor) -> torch.dtype:
    return torch.bfloat16 if x.dtype == torch.int8 else x.dtype


def vq_linear_naive(
    x: Tensor,
    codes: Tensor,
    codebook: Tensor,
    out_features: int,
    *,
    x_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    path: str = "auto",
) -> Tensor:
    """The definition, in fp64, in which the int8 sums are exact. Arguments as :func:`vq_linear`."""
    out_dtype = out_dtype or _default_out_dtype(x)
    y = x.double() @ vq_dequantize_naive(codes, codebook, out_features, x.shape[-1]).double().T
    if x_scale is not None:
        y = y * x_scale.double()[..., None]
    if weight_scale is not None:
        y = y * weight_scale.double()
    if bias is not None:
        y = y + bias.double()
    if gate is not None:
        y = y * gate.double()
    if residual is not None:
        y = y + residual.double()
    return y.to(out_dtype)
