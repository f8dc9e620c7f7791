"""How a quantized weight is stored: one frozen dataclass a format, plain tensors and whole numbers inside.

Every format has the same few members, so that layers, files and reports need not know which one they hold:

    format, bits               name in files; bits a weight has
    out_features, in_features  O and C of the matrix ``[O, C]``
    nbytes                     bytes of all tensors
    tensors(), settings()      what a safetensors file and what a JSON file keeps
    layout(settings)           names, shapes and dtypes of the tensors that such settings ask for
    dequantize()               the matrix, fp32 ``[O, C]``
    multiply(x, ...)           the product of activations and the matrix, through the ops

Padding inside of tiles is 0 and is never read as a weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops


class QuantizedRows(NamedTuple):
    """Activations as :func:`vdit_ext.ops.quantize_rows` returns them.

    codes int8 ``[..., C]``; scale fp32 ``[...]``; sum int32 ``[...]``, of the codes.
    """

    codes: Tensor
    scale: Tensor
    sum: Tensor


# Name of a tensor to its shape and dtype.
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]

_TILE = 32  # rows and, but for VQ, columns of a tile


def tile_counts(out_features: int, in_features: int, columns: int = _TILE) -> tuple[int, int]:
    """Tiles along O and along C that cover a matrix; the last of each may be ragged."""
    return math.ceil(out_features / _TILE), math.ceil(in_features / columns)


class _Weight:
    """What the formats share. ``takes_codes`` says whether ``multiply`` wants quantized rows or plain ones."""

    format: ClassVar[str]
    takes_codes = True

    def tensors(self) -> dict[str, Tensor]:
        """The tensor fields that are present, by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def to(self, device: torch.device | str) -> Self:
        """The same weight with its tensors on a device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, scales and tables included."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def settings(self) -> dict[str, Any]:
        """What a JSON file keeps: format, bits and sizes."""
        return {
            "format": self.format,
            "bits": self.bits,
            "out_features": self.out_features,
            "in_features": self.in_features,
        }

    @classmethod
    def arguments(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the constructor, other than tensors, that :meth:`settings` of another one hold."""
        return {field.name: settings[field.name] for field in fields(cls) if field.name in settings}

    @classmethod
    def from_tensors(cls, settings: dict[str, Any], tensors: dict[str, Tensor]) -> _Weight:
        """The weight that ``settings`` and ``tensors`` of another one describe."""
        return cls(**cls.arguments(settings), **{name: tensors[name] for name in cls.layout(settings)})


@dataclass(frozen=True)
class Int8Weight(_Weight):
    """Per-channel integers of up to 8 bits in a byte each: ``weight = (codes + zero) * scale``.

    codes int8 ``[O, C]``; scale fp32 ``[O]``; zero fp32 ``[O]``, whole numbers, or None for symmetric codes;
    bits 2 to 8: fewer than 8 use fewer of the byte's values.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    bits: int = 8

    format: ClassVar[str] = "int8"

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1]

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"has_zero": self.zero is not None}

    @classmethod
    def layout(cls, settings: dict[str, Any]) -> Layout:
        rows, columns = settings["out_features"], settings["in_features"]
        found: Layout = {"codes": ((rows, columns), torch.int8), "scale": ((rows,), torch.float32)}
        if settings["has_zero"]:
            found["zero"] = ((rows,), torch.float32)
        return found

    def dequantize(self) -> Tensor:
        return _affine(self.codes, self.scale, self.zero)

    def multiply(self, x: QuantizedRows, *, bits: int | None = None, **epilogue: Any) -> Tensor:
        # The sums spare the CPU a pass over the codes, with a zero point or without.
        weight = (self.codes, self.scale)
        return ops.w8a8_linear(x.codes, x.scale, *weight, x_sum=x.sum, weight_zero=self.zero, **epilogue)


@dataclass(frozen=True)
class Int4Weight(_Weight):
    """Per-channel codes of up to 4 bits, two in a byte: ``weight = (code + zero) * scale``.

    tiles uint8 ``[ceil(O/32), ceil(C/32), 512]`` (:func:`vdit_ext.ops.pack_w4`); scale, zero fp32 ``[O]``;
    bits 2 to 4: fewer than 4 use fewer of the nibble's values.
    """

    tiles: Tensor
    scale: Tensor
    zero: Tensor
    out_features: int
    in_features: int
    bits: int = 4

    format: ClassVar[str] = "int4"

    @classmethod
    def layout(cls, settings: dict[str, Any]) -> Layout:
        rows = settings["out_features"]
        return {
            "tiles": ((*tile_counts(rows, settings["in_features"]), 512), torch.uint8),
            "scale": ((rows,), torch.float32),
            "zero": ((rows,), torch.float32),
        }

    def dequantize(self) -> Tensor:
        codes = ops.unpack_w4(self.tiles, self.out_features, self.in_features)
        return _affine(codes, self.scale, self.zero)

    def multiply(self, x: QuantizedRows, *, bits: int | None = None, **epilogue: Any) -> Tensor:
        return ops.w4a8_linear(*x, self.tiles, self.scale, self.zero, **epilogue)


@dataclass(frozen=True)
class NibblePlaneWeight(_Weight):
    """8-bit codes in two planes of nibbles, which a step may read as 8 bits or, the high plane alone, as 4.

    With ``code = 16 * high + low - 128``, the code of an :class:`Int8Weight` of the same scale and zero,
    ``weight = (code + zero) * scale`` at 8 bits. At 4 bits the low nibble counts as 7.5, the middle of its
    range: ViDiT-Q's precision by timestep without a second copy (specs section 8).

    high, low uint8 ``[ceil(O/32), ceil(C/32), 512]`` (:func:`vdit_ext.ops.pack_w4`); scale, zero fp32 ``[O]``.
    """

    high: Tensor
    low: Tensor
    scale: Tensor
    zero: Tensor
    out_features: int
    in_features: int

    format: ClassVar[str] = "nibble_planes"
    bits: ClassVar[int] = 8
    switchable_bits: ClassVar[tuple[int, ...]] = (8, 4)

    @classmethod
    def layout(cls, settings: dict[str, Any]) -> Layout:
        rows = settings["out_features"]
        plane = ((*tile_counts(rows, settings["in_features"]), 512), torch.uint8)
        scale = ((rows,), torch.float32)
        return {"high": plane, "low": plane, "scale": scale, "zero": scale}

    def dequantize(self, bits: int = 8) -> Tensor:
        size = (self.out_features, self.in_features)
        high = ops.unpack_w4(self.high, *size).to(torch.float32) * 16
        low = ops.unpack_w4(self.low, *size).to(torch.float32) if bits == 8 else 7.5
        return _affine(high + low - 128, self.scale, self.zero)

    def multiply(self, x: QuantizedRows, *, bits: int | None = None, **epilogue: Any) -> Tensor:
        if bits in (None, 8):
            return ops.w4a8_linear(*x, self.high, self.scale, self.zero, weight_low=self.low, **epilogue)
        # (16 h + 7.5 - 128 + zero) s = (h + (zero - 120.5) / 16) 16 s
        return ops.w4a8_linear(*x, self.high, self.scale * 16, (self.zero - 120.5) / 16, **epilogue)


@dataclass(frozen=True)
class TwinLogWeight(_Weight):
    """Codes that index a table of each row: ``weight = table[row, code] * scale`` (LRQ-DiT).

    tiles uint8 ``[ceil(O/32), ceil(C/32), 512]`` (:func:`vdit_ext.ops.pack_log4`); table int8 ``[O, 16]`` or,
    for 3 bits, ``[O, 8]``, signed values; scale fp32 ``[O]``; bits 3 or 4.
    """

    tiles: Tensor
    table: Tensor
    scale: Tensor
    bits: int
    out_features: int
    in_features: int

    format: ClassVar[str] = "twin_log"

    @classmethod
    def layout(cls, settings: dict[str, Any]) -> Layout:
        rows = settings["out_features"]
        return {
            "tiles": ((*tile_counts(rows, settings["in_features"]), 512), torch.uint8),
            "table": ((rows, 2 ** settings["bits"]), torch.int8),
            "scale": ((rows,), torch.float32),
        }

    def dequantize(self) -> Tensor:
        codes = ops.unpack_log4(self.tiles, self.out_features, self.in_features)
        return self.table.gather(1, codes.long()).to(torch.float32) * self.scale[:, None]

    def multiply(self, x: QuantizedRows, *, bits: int | None = None, **epilogue: Any) -> Tensor:
        return ops.log4a8_linear(x.codes, x.scale, self.tiles, self.table, self.scale, **epilogue)


@dataclass(frozen=True)
class VQWeight(_Weight):
    """Indices of codewords that are short runs of a row's weights (VQ4DiT).

    codes uint8 ``[ceil(O/32), ceil(C/64), 512 or 768]`` (:func:`vdit_ext.ops.pack_vq`); codebook ``[256, 4]``
    for 2 bits, ``[64, 2]`` for 3 bits, fp32, fp16 or bf16, or int8, which multiplies quantized rows;
    row_scale fp32 ``[O]``, must be there with an int8 codebook, else may be None; path: how
    :func:`vdit_ext.ops.vq_linear` multiplies, "auto", "fused" or "expand".
    """

    codes: Tensor
    codebook: Tensor
    bits: int
    out_features: int
    in_features: int
    row_scale: Tensor | None = None
    path: str = "auto"

    format: ClassVar[str] = "vq"

    @property
    def takes_codes(self) -> bool:
        return self.codebook.dtype == torch.int8

    def settings(self) -> dict[str, Any]:
        dtype = str(self.codebook.dtype).removeprefix("torch.")
        has_scale = self.row_scale is not None
        return super().settings() | {"codebook_dtype": dtype, "has_row_scale": has_scale, "path": self.path}

    @classmethod
    def layout(cls, settings: dict[str, Any]) -> Layout:
        rows, two_bits = settings["out_features"], settings["bits"] == 2
        tiles = (*tile_counts(rows, settings["in_features"], 64), 512 if two_bits else 768)
        dtype = getattr(torch, settings["codebook_dtype"])
        found: Layout = {
            "codes": (tiles, torch.uint8),
            "codebook": ((256, 4) if two_bits else (64, 2), dtype),
        }
        if settings["has_row_scale"]:
            found["row_scale"] = ((rows,), torch.float32)
        return found

    def to_int8(self) -> VQWeight:
        """The same weight with an int8 codebook, whose one scale goes into ``row_scale``."""
        book = self.codebook.to(torch.float32)
        scale = (book.abs().amax() / 127).clamp_min(1e-30)
        row_scale = scale.expand(self.out_features) if self.row_scale is None else self.row_scale * scale
        codes = (book / scale).round().to(torch.int8)
        return replace(self, codebook=codes, row_scale=row_scale.to(torch.float32).contiguous())

    def dequantize(self) -> Tensor:
        book = self.codebook.to(torch.float32)
        size = (self.out_features, self.in_features)
        return ops.vq_dequantize(self.codes, book, *size, row_scale=self.row_scale)

    def multiply(self, x: QuantizedRows | Tensor, *, bits: int | None = None, **epilogue: Any) -> Tensor:
        epilogue["path"] = self.path
        if self.takes_codes:
            weight = (self.codes, self.codebook, self.out_features)
            return ops.vq_linear(x.codes, *weight, x_scale=x.scale, weight_scale=self.row_scale, **epilogue)
        weight = (self.codes, self.codebook.to(x.dtype), self.out_features)
        return ops.vq_linear(x, *weight, weight_scale=self.row_scale, **epilogue)


@dataclass(frozen=True)
class DenseWeight(_Weight):
    """A weight that was decoded already: values ``[O, C]`` in fp32, fp16 or bf16, multiplied by torch."""

    values: Tensor

    format: ClassVar[str] = "dense"
    takes_codes: ClassVar[bool] = False

    @property
    def bits(self) -> int:
        return 8 * self.values.element_size()

    @property
    def out_features(self) -> int:
        return self.values.shape[0]

    @property
    def in_features(self) -> int:
        return self.values.shape[1]

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"dtype": str(self.values.dtype).removeprefix("torch.")}

    @classmethod
    def arguments(cls, settings: dict[str, Any]) -> dict[str, Any]:
        return {}

    @classmethod
    def layout(cls, settings: dict[str, Any]) -> Layout:
        shape = (settings["out_features"], settings["in_features"])
        return {"values": (shape, getattr(torch, settings["dtype"]))}

    def dequantize(self) -> Tensor:
        return self.values.to(torch.float32)

    def multiply(
        self,
        x: Tensor,
        *,
        bits: int | None = None,
        bias: Tensor | None = None,
        gate: Tensor | None = None,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        y = F.linear(x, self.values.to(x.dtype), None if bias is None else bias.to(x.dtype))
        y = y if gate is None else y * gate
        return (y if residual is None else y + residual).to(out_dtype or x.dtype)


def _affine(codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    value = codes.to(torch.float32)
    return (value if zero is None else value + zero[:, None]) * scale[:, None]


Weight = Int8Weight | Int4Weight | NibblePlaneWeight | TwinLogWeight | VQWeight | DenseWeight

# A format's name in files to its class.
FORMATS: dict[str, type[_Weight]] = {
    form.format: form
    for form in (Int8Weight, Int4Weight, NibblePlaneWeight, TwinLogWeight, VQWeight, DenseWeight)
}
