"""The linear family: each op's documented wrapper, fake kernel and naive definition side by side.

Shapes: M rows (or B batch times S tokens), K input channels, N output channels. Activations are int8 codes with
one fp32 scale a row; weights are codes of 8, 4 or 3 bits with one fp32 scale an output channel. Integer sums
are exact in int32, which bounds K at 65,536. On CUDA K is a multiple of 16; on the CPU it is any number.

Every op raises RuntimeError, one sentence with what was expected and what came, for tensors of another rank,
shape, dtype or device; "Raises" below names what else is refused. Weight tiles are laid out as
``csrc/include/vdit/linear.h`` says; :func:`pack_w4` and :func:`pack_log4` make them.

No op has a backward: results ask for gradients where an argument does, and ``backward()`` raises RuntimeError.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._library import NAMESPACE
from ._registration import register_no_backward, same_device

_OPS = getattr(torch.ops, NAMESPACE)

# The family, in the order of its schema.
OPS = ("quantize_rows", "w8a8_linear", "w4a8_linear", "log4a8_linear", "expand_w4", "expand_log4")
PROLOGUES = ("none", "layer_norm", "gelu", "gelu_tanh")
HADAMARD_BLOCKS = (16, 32, 64, 128)
MAX_CHANNELS = 65536
TILE = 32  # codes of a weight tile in either direction

for _op in (
    "quantize_rows",
    "w8a8_linear",
    "w4a8_linear",
    "log4a8_linear",
):  # the others take no floating tensor
    register_no_backward(_op)


def _padded_codes(like: Tensor, *shape: int) -> Tensor:
    """An empty int8 tensor whose rows lie a multiple of 16 bytes apart."""
    width = shape[-1]
    padded = (width + 15) // 16 * 16
    codes = like.new_empty(*shape[:-1], padded, dtype=torch.int8)
    return codes if padded == width else codes[..., :width]


# ---------------------------------------------------------------------------------------------------------
# quantize_rows
# ---------------------------------------------------------------------------------------------------------


def quantize_rows(
    x: Tensor,
    *,
    prologue: str = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    modulation_scale: Tensor | None = None,
    shift: Tensor | None = None,
    channel_scale: Tensor | None = None,
    hadamard: int = 0,
    signs: Tensor | None = None,
    bits: int = 8,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows to integer codes with a scale a row, after what lies between a residual stream and a linear layer.

    In this order, in fp32:

    1. ``prologue``: ``"layer_norm"`` over the channels, then ``* norm_weight + norm_bias``, then
       ``* (1 + modulation_scale) + shift``; ``"gelu"`` (by erf); ``"gelu_tanh"``; or ``"none"``;
    2. ``* channel_scale`` (balancing factors, as of SmoothQuant, arXiv:2211.10438, or ViDiT-Q,
       arXiv:2406.02540);
    3. every ``hadamard`` neighbouring channels times ``signs``, then times ``H / sqrt(hadamard)`` with H
       Sylvester's matrix in natural order;
    4. symmetric quantization: ``scale = amax / q_max`` with ``q_max = 2**(bits - 1) - 1``,
       ``codes = round_half_even(row * (q_max / amax))``.

    Args:
        x: ``[M, K]`` or ``[B, S, K]`` fp32, fp16 or bf16, any strides with a contiguous last dimension; K from
            1 to 65,536.
        norm_weight, norm_bias: fp32 ``[K]``; with ``"layer_norm"`` only.
        modulation_scale, shift: ``[B|1, S|1, K]`` (``[M|1, K]`` for a 2-D x), of one floating dtype; with
            ``"layer_norm"`` only.
        channel_scale: fp32 ``[K]``.
        hadamard: 0 for none, or 16, 32, 64 or 128, which must divide K.
        signs: fp32 ``[K]`` of +1 and -1; all +1 by default.
        bits: 2 to 8.
        eps: added to the variance.

    Returns:
        ``codes`` int8 of x's shape, a view of rows that are padded with zeros to a multiple of 16 bytes;
        ``scale`` fp32 and ``sum`` int32 of x's leading shape, ``sum`` the exact sums of the codes. A row of
        zeros (largest magnitude below 1e-30) has codes, scale and sum 0.

    Raises:
        RuntimeError: one sentence, for sizes, bits or blocks out of range, an argument that its prologue does
            not take, and, on the CPU and with ``VDIT_CHECK_PLANS=1`` on CUDA, a row with a NaN or an infinity.
            Unchecked, such a row has codes and sum 0 and the scale NaN, so that all its outputs are NaN.
    """
    return _OPS.quantize_rows(
        x,
        prologue=prologue,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        modulation_scale=modulation_scale,
        shift=shift,
        channel_scale=channel_scale,
        hadamard=hadamard,
        signs=signs,
        bits=bits,
        eps=eps,
    )


@torch.library.register_fake(f"{NAMESPACE}::quantize_rows")
def _(
    x,
    *,
    prologue="none",
    norm_weight=None,
    norm_bias=None,
    modulation_scale=None,
    shift=None,
    channel_scale=None,
    hadamard=0,
    signs=None,
    bits=8,
    eps=1e-6,
):
    same_device(
        "quantize_rows",
        x,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        modulation_scale=modulation_scale,
        shift=shift,
        channel_scale=channel_scale,
        signs=signs,
    )
    lead = x.shape[:-1]
    return (
        _padded_codes(x, *x.shape),
        x.new_empty(lead, dtype=torch.float32),
        x.new_empty(lead, dtype=torch.int32),
    )


def hadamard_matrix(size: int) -> Tensor:
    """Sylvester's matrix of +1 and -1, fp64 ``[size, size]``, in natural order; ``size`` is a power of two."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


def transform_rows_naive(
    x: Tensor,
    *,
    prologue: str = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    modulation_scale: Tensor | None = None,
    shift: Tensor | None = None,
    channel_scale: Tensor | None = None,
    hadamard: int = 0,
    signs: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """What :func:`quantize_rows` quantizes, in fp64: steps 1 to 3."""
    y = x.double()
    if prologue == "layer_norm":
        y = F.layer_norm(y, y.shape[-1:], eps=eps)
        y = y if norm_weight is None else y * norm_weight.double()
        y = y if norm_bias is None else y + norm_bias.double()
        y = y if modulation_scale is None else y * (1 + modulation_scale.double())
        y = y if shift is None else y + shift.double()
    elif prologue != "none":
        y = F.gelu(y, approximate="tanh" if prologue == "gelu_tanh" else "none")
    if channel_scale is not None:
        y = y * channel_scale.double()
    if hadamard:
        y = y if signs is None else y * signs.double()
        h = hadamard_matrix(hadamard).to(y.device) * hadamard**-0.5
        y = (y.unflatten(-1, (-1, hadamard)) @ h).flatten(-2)
    return y


def quantize_rows_naive(x: Tensor, *, bits: int = 8, **transform) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, in fp64. Arguments and results as :func:`quantize_rows`, the codes dense."""
    y = transform_rows_naive(x, **transform)
    q_max = 2 ** (bits - 1) - 1
    amax = y.abs().amax(-1)
    finite = y.isfinite().all(-1)
    live = finite & (amax >= 1e-30)
    factor = torch.where(live, q_max / amax, 0.0)
    codes = torch.where(live[..., None], (y * factor[..., None]).round(), 0.0).to(torch.int8)
    scale = torch.where(live, amax / q_max, torch.where(finite, 0.0, torch.nan)).float()
    return codes, scale, codes.sum(-1, dtype=torch.int32)


# ---------------------------------------------------------------------------------------------------------
# Weight tiles
# ---------------------------------------------------------------------------------------------------------


def _tiled(codes: Tensor) -> Tensor:
    """``[N, K]`` to ``[tiles of N, tiles of K, 32, 32]``, zeros past N and K."""
    n, k = codes.shape
    padded = F.pad(codes, (0, -k % TILE, 0, -n % TILE))
    return padded.unflatten(1, (-1, TILE)).unflatten(0, (-1, TILE)).transpose(1, 2)


def _untiled(tiles: Tensor, n: int, k: int) -> Tensor:
    return tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1)[:n, :k].contiguous()


def _check_codes(name: str, codes: Tensor, limit: int) -> None:
    if codes.dim() != 2 or codes.dtype != torch.uint8:
        raise ValueError(f"{name}: codes must be uint8 [N, K], got {codes.dtype} {list(codes.shape)}")
    if codes.numel() and int(codes.max()) >= limit:
        raise ValueError(f"{name}: codes must be in 0..{limit - 1}, got {int(codes.max())}")


def _check_tiles(name: str, tiles: Tensor, n: int, k: int) -> None:
    expected = [-(-n // TILE), -(-k // TILE), TILE * TILE // 2]
    if tiles.dtype != torch.uint8 or list(tiles.shape) != expected:
        raise ValueError(f"{name}: tiles must be uint8 {expected}, got {tiles.dtype} {list(tiles.shape)}")


def pack_w4(codes: Tensor) -> Tensor:
    """Codes 0 to 15, uint8 ``[N, K]``, as the tiles that :func:`w4a8_linear` reads.

    Returns:
        uint8 ``[ceil(N/32), ceil(K/32), 512]``; what lies past N and K is 0.

    Raises:
        ValueError: one sentence, for another shape or dtype or a code above 15.
    """
    _check_codes("pack_w4", codes, 16)
    # n = 16 high + 8 sub + row, k = 16 half + 4 quad + t; byte = lane (row, quad), then (half, sub, t).
    parts = _tiled(codes).unflatten(3, (2, 4, 4)).unflatten(2, (2, 2, 8))
    bytes_ = parts[:, :, 0] | parts[:, :, 1] << 4  # [., ., sub, row, half, quad, t]
    return bytes_.permute(0, 1, 3, 5, 4, 2, 6).flatten(2).contiguous()


def unpack_w4(tiles: Tensor, n: int, k: int) -> Tensor:
    """The codes that :func:`pack_w4` made tiles of: uint8 ``[n, k]``."""
    _check_tiles("unpack_w4", tiles, n, k)
    bytes_ = tiles.unflatten(2, (8, 4, 2, 2, 4)).permute(0, 1, 5, 2, 4, 3, 6)  # [., ., sub, row, half, quad, t]
    parts = torch.stack([bytes_ & 15, bytes_ >> 4], 2)
    return _untiled(parts.flatten(5, 7).flatten(2, 4), n, k)


def pack_log4(codes: Tensor) -> Tensor:
    """Codes 0 to 15 (bit 3 is the sign) or 0 to 7 (bit 2 is the sign), uint8 ``[N, K]``, as the tiles that
    :func:`log4a8_linear` reads. Results and errors as :func:`pack_w4`, in another order of nibbles.
    """
    _check_codes("pack_log4", codes, 16)
    # n = 8 sub + row, k = 16 half + 4 quad + t; 16-bit word = lane (row, quad), then (sub, half); nibble t.
    parts = _tiled(codes).unflatten(3, (2, 4, 4)).unflatten(2, (4, 8)).permute(0, 1, 3, 5, 2, 4, 6)
    return (parts[..., 0::2] | parts[..., 1::2] << 4).flatten(2).contiguous()


def unpack_log4(tiles: Tensor, n: int, k: int) -> Tensor:
    """The codes that :func:`pack_log4` made tiles of: uint8 ``[n, k]``."""
    _check_tiles("unpack_log4", tiles, n, k)
    words = tiles.unflatten(2, (8, 4, 4, 2, 2))  # [., ., row, quad, sub, half, pair]
    parts = torch.stack([words & 15, words >> 4], -1).flatten(-2).permute(0, 1, 4, 2, 5, 3, 6)
    return _untiled(parts.flatten(4, 6).flatten(2, 3), n, k)


def expand_w4(
    weight: Tensor, out_features: int, in_features: int, *, weight_low: Tensor | None = None
) -> Tensor:
    """Tiles of 4-bit codes as int8 ``[out_features, in_features]``, what :func:`w8a8_linear` reads.

    Args:
        weight: uint8 tiles ``[ceil(N/32), ceil(K/32), 512]`` of :func:`pack_w4`.
        weight_low: a second plane of tiles, the low nibbles of int8 codes ``16 * high + low - 128``.

    Returns:
        The codes as they are, 0 to 15, or with ``weight_low`` -128 to 127. A view of rows padded with zeros to
        a multiple of 16 bytes.

    Raises:
        RuntimeError: one sentence, for tiles that do not belong to the sizes.
    """
    return _OPS.expand_w4(weight, out_features, in_features, weight_low=weight_low)


@torch.library.register_fake(f"{NAMESPACE}::expand_w4")
def _(weight, out_features, in_features, *, weight_low=None):
    same_device("expand_w4", weight, weight_low=weight_low)
    return _padded_codes(weight, out_features, in_features)


def expand_w4_naive(
    weight: Tensor, out_features: int, in_features: int, *, weight_low: Tensor | None = None
) -> Tensor:
    """The definition. Arguments and results as :func:`expand_w4`."""
    codes = unpack_w4(weight, out_features, in_features).short()
    if weight_low is not None:
        codes = 16 * codes + unpack_w4(weight_low, out_features, in_features).short() - 128
    return codes.to(torch.int8)


def expand_log4(weight: Tensor, table: Tensor, in_features: int) -> Tensor:
    """Tiles of codes as the table entries that they stand for, int8 ``[N, in_features]``.

    Args:
        weight: uint8 tiles ``[ceil(N/32), ceil(in_features/32), 512]`` of :func:`pack_log4`.
        table: int8 ``[N, 16]`` for codes of four bits, ``[N, 8]`` for codes of three (of whose nibbles bit 3 is
            not read).

    Returns:
        A view of rows padded with zeros to a multiple of 16 bytes.

    Raises:
        RuntimeError: one sentence, for tiles or a table that do not belong together.
    """
    return _OPS.expand_log4(weight, table, in_features)


@torch.library.register_fake(f"{NAMESPACE}::expand_log4")
def _(weight, table, in_features):
    same_device("expand_log4", weight, table=table)
    return _padded_codes(weight, table.shape[0], in_features)


def expand_log4_naive(weight: Tensor, table: Tensor, in_features: int) -> Tensor:
    """The definition. Arguments and results as :func:`expand_log4`."""
    codes = unpack_log4(weight, table.shape[0], in_features).long() & (table.shape[1] - 1)
    return table.gather(1, codes)


# ---------------------------------------------------------------------------------------------------------
# The linears
# ---------------------------------------------------------------------------------------------------------


def _linear_like(op: str, x: Tensor, n: int, out_dtype: torch.dtype | None, **tensors: Tensor | None) -> Tensor:
    same_device(op, x, **tensors)
    return x.new_empty(*x.shape[:-1], n, dtype=torch.bfloat16 if out_dtype is None else out_dtype)


def _linear_naive(
    x: Tensor,
    codes: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    *,
    x_sum: Tensor | None = None,
    weight_zero: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The sums in fp64, which holds them exactly, and the epilogue in fp64."""
    sums = x.double() @ codes.double().T
    if out_dtype == torch.int32:
        return sums.to(torch.int64).to(torch.int32)
    if weight_zero is not None:
        sums = sums + weight_zero.double() * x_sum.double()[..., None]
    y = sums * x_scale.double()[..., None] * weight_scale.double()
    y = y if bias is None else y + bias.double()
    y = y if gate is None else y * gate.double()
    y = y if residual is None else y + residual.double()
    return y.to(torch.bfloat16 if out_dtype is None else out_dtype)


def w8a8_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    *,
    x_sum: Tensor | None = None,
    weight_zero: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``x W^T`` of int8 codes, its sums exact in int32, with what follows a linear layer.

    With ``w[n, k] = (weight[n, k] + weight_zero[n]) * weight_scale[n]`` and sums over k, in fp32:
    ``y = (sum(x * weight) + weight_zero * x_sum) * (x_scale * weight_scale) + bias``, then ``* gate``, then
    ``+ residual``, then rounded once to ``out_dtype``.

    Args:
        x: int8 ``[M, K]`` or ``[B, S, K]``, contiguous last dimension: codes of :func:`quantize_rows`. Rows
            that are not evenly spaced, or on the CPU K not a multiple of 16, cost a copy.
        x_scale: fp32 of x's leading shape.
        weight: int8 ``[N, K]``, contiguous last dimension.
        weight_scale: fp32 ``[N]``.
        x_sum: int32 of x's leading shape, the sums of x's codes; needed with ``weight_zero``, and without it
            spares the CPU a pass over x.
        weight_zero, bias: fp32 ``[N]``.
        gate: ``[B|1, S|1, N]`` (``[M|1, N]`` for a 2-D x), any floating dtype.
        residual: x's leading shape and N, of ``out_dtype``.
        out_dtype: fp32, fp16, bf16 (the default), or int32 for the sums of codes themselves; then
            ``weight_zero``, ``bias``, ``gate`` and ``residual`` must be None.

    Returns:
        Contiguous, x's leading shape and N. A row whose scale is NaN is NaN.

    Raises:
        RuntimeError: one sentence, for K above 65,536 or, on CUDA, no multiple of 16 or rows that are not
            aligned to 16 bytes; with ``VDIT_CHECK_PLANS=1`` for an ``x_sum`` that is not the sums of x.
    """
    return _OPS.w8a8_linear(
        x,
        x_scale,
        weight,
        weight_scale,
        x_sum=x_sum,
        weight_zero=weight_zero,
        bias=bias,
        gate=gate,
        residual=residual,
        out_dtype=out_dtype,
    )


@torch.library.register_fake(f"{NAMESPACE}::w8a8_linear")
def _(
    x,
    x_scale,
    weight,
    weight_scale,
    *,
    x_sum=None,
    weight_zero=None,
    bias=None,
    gate=None,
    residual=None,
    out_dtype=None,
):
    return _linear_like(
        "w8a8_linear",
        x,
        weight.shape[0],
        out_dtype,
        x_scale=x_scale,
        weight=weight,
        weight_scale=weight_scale,
        x_sum=x_sum,
        weight_zero=weight_zero,
        bias=bias,
        gate=gate,
        residual=residual,
    )


def w8a8_linear_naive(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, **epilogue) -> Tensor:
    """The definition, in fp64. Arguments as :func:`w8a8_linear`."""
    return _linear_naive(x, weight, x_scale, weight_scale, **epilogue)


def w4a8_linear(
    x: Tensor,
    x_scale: Tensor,
    x_sum: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor,
    *,
    weight_low: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    path: str = "auto",
) -> Tensor:
    """:func:`w8a8_linear` with codes of four bits, 0 to 15: ``(code + weight_zero[n]) * weight_scale[n]``.

    Per-channel scales, as in the per-channel W4A8 of QServe (arXiv:2405.04532); the zero point is taken out of
    the sum: ``sum(x * (code + zero)) = sum(x * code) + zero * x_sum``.

    Args:
        x_sum: int32 of x's leading shape, the sums of x's codes.
        weight: uint8 tiles ``[ceil(N/32), ceil(K/32), 512]`` of :func:`pack_w4`.
        weight_scale, weight_zero: fp32 ``[N]``.
        weight_low: a second plane of tiles: code = 16 * high + low - 128, the int8 code of :func:`w8a8_linear`
            with the same zero and scale, and the same bits in the result. One pair of planes so serves a layer
            at eight bits and, without this argument, at four (with scales and zeros of their own).
        path: ``"fused"`` widens the codes on their way to the product, ``"expand"`` writes them as int8 first
            (:func:`expand_w4`), ``"auto"`` takes what is faster for the shape. The sums are the same.
        x, x_scale, bias, gate, residual, out_dtype: as :func:`w8a8_linear`; with int32, ``weight_zero`` is not
            used.

    Returns, Raises: as :func:`w8a8_linear`, and for a path of another name.
    """
    return _OPS.w4a8_linear(
        x,
        x_scale,
        x_sum,
        weight,
        weight_scale,
        weight_zero,
        weight_low=weight_low,
        bias=bias,
        gate=gate,
        residual=residual,
        out_dtype=out_dtype,
        path=path,
    )


@torch.library.register_fake(f"{NAMESPACE}::w4a8_linear")
def _(
    x,
    x_scale,
    x_sum,
    weight,
    weight_scale,
    weight_zero,
    *,
    weight_low=None,
    bias=None,
    gate=None,
    residual=None,
    out_dtype=None,
    path="auto",
):
    return _linear_like(
        "w4a8_linear",
        x,
        weight_scale.shape[0],
        out_dtype,
        x_scale=x_scale,
        x_sum=x_sum,
        weight=weight,
        weight_scale=weight_scale,
        weight_zero=weight_zero,
        weight_low=weight_low,
        bias=bias,
        gate=gate,
        residual=residual,
    )


def w4a8_linear_naive(
    x: Tensor,
    x_scale: Tensor,
    x_sum: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor,
    *,
    weight_low: Tensor | None = None,
    path: str = "auto",
    **epilogue,
) -> Tensor:
    """The definition, in fp64. Arguments as :func:`w4a8_linear`; ``path`` has no part in it."""
    n, k = weight_scale.shape[0], x.shape[-1]
    codes = unpack_w4(weight, n, k).long()
    if weight_low is not None:
        codes = 16 * codes + unpack_w4(weight_low, n, k).long() - 128
    return _linear_naive(x, codes, x_scale, weight_scale, x_sum=x_sum, weight_zero=weight_zero, **epilogue)


def log4a8_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    table: Tensor,
    weight_scale: Tensor,
    *,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    path: str = "auto",
) -> Tensor:
    """:func:`w8a8_linear` with weights that index a table of their row: ``table[n, code] * weight_scale[n]``.

    For the twin logarithmic codes of LRQ-DiT (sign and exponent; section 4.3 of the family's specification),
    whose values are rounded to int8 once, when the table is made.

    Args:
        weight: uint8 tiles ``[ceil(N/32), ceil(K/32), 512]`` of :func:`pack_log4`. Of four bits bit 3 is the
            sign, of three bit 2, by the order of the table's entries alone.
        table: int8 ``[N, 16]`` for four bits, ``[N, 8]`` for three (of whose nibbles bit 3 is not read): signed
            values.
        weight_scale: fp32 ``[N]``.
        path: as :func:`w4a8_linear`.
        x, x_scale, bias, gate, residual, out_dtype: as :func:`w8a8_linear`.

    Returns, Raises: as :func:`w4a8_linear`.
    """
    return _OPS.log4a8_linear(
        x,
        x_scale,
        weight,
        table,
        weight_scale,
        bias=bias,
        gate=gate,
        residual=residual,
        out_dtype=out_dtype,
        path=path,
    )


@torch.library.register_fake(f"{NAMESPACE}::log4a8_linear")
def _(
    x,
    x_scale,
    weight,
    table,
    weight_scale,
    *,
    bias=None,
    gate=None,
    residual=None,
    out_dtype=None,
    path="auto",
):
    return _linear_like(
        "log4a8_linear",
        x,
        weight_scale.shape[0],
        out_dtype,
        x_scale=x_scale,
        weight=weight,
        table=table,
        weight_scale=weight_scale,
        bias=bias,
        gate=gate,
        residual=residual,
    )


def log4a8_linear_naive(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    table: Tensor,
    weight_scale: Tensor,
    *,
    path: str = "auto",
    **epilogue,
) -> Tensor:
    """The definition, in fp64. Arguments as :func:`log4a8_linear`; ``path`` has no part in it."""
    return _linear_naive(x, expand_log4_naive(weight, table, x.shape[-1]), x_scale, weight_scale, **epilogue)
