"""Quantized layers for tests of what is done with them, made without any method of the package."""

from __future__ import annotations

import torch
from torch import nn

from vdit_ext import ops
from vdit_ext.quant.apply import QuantizedModel
from vdit_ext.quant.layers import linear_layers
from vdit_ext.quant.linear import QuantLayer
from vdit_ext.quant.transform import InputTransform
from vdit_ext.quant.weights import Int4Weight, Int8Weight, NibblePlaneWeight


def asymmetric(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes from 0 on, scale and zero of each row, by the row's range."""
    low, high = weight.amin(1).clamp_max(0), weight.amax(1).clamp_min(0)
    scale = (high - low) / (2**bits - 1)
    zero = (low / scale).round()
    return ((weight / scale[:, None]).round() - zero[:, None]).clamp(0, 2**bits - 1), scale, zero


def layer_of(
    linear: nn.Linear,
    kind: str = "int8",
    group: str | None = None,
    transform: InputTransform = InputTransform(),
) -> QuantLayer:
    """A linear rounded to nearest in one of the formats "int8", "int4" and "planes"."""
    weight = transform.weight(linear.weight.detach())
    rows, columns = weight.shape
    if kind == "int8":
        scale = weight.abs().amax(1).clamp_min(1e-12) / 127
        form = Int8Weight((weight / scale[:, None]).round().to(torch.int8), scale)
    elif kind == "int4":
        codes, scale, zero = asymmetric(weight, 4)
        form = Int4Weight(ops.pack_w4(codes.to(torch.uint8)), scale, zero, rows, columns)
    else:
        codes, scale, zero = asymmetric(weight, 8)
        codes = codes.to(torch.uint8)
        planes = (ops.pack_w4(codes // 16), ops.pack_w4(codes % 16))
        form = NibblePlaneWeight(*planes, scale, zero + 128, rows, columns)
    bias = None if linear.bias is None else linear.bias.detach().float().clone()
    return QuantLayer(form, bias, transform, group)


def mask(columns: int) -> InputTransform:
    """A mask, and a rotation where there is one for so many channels."""
    signs = torch.ones(columns)
    signs[::3] = -1
    hadamard = 16 if columns % 16 == 0 else 0
    return InputTransform(torch.linspace(0.5, 2, columns), hadamard, signs if hadamard else None)


def quantized(model: nn.Module, kind: str = "int8", layers: str | None = None) -> QuantizedModel:
    """All linears of a model, in the groups of its class.

    "masked" is "int8" behind :func:`mask`, one and the same for the members of a group.
    """
    chosen = linear_layers(model, layers)
    masks = {info.group: mask(info.in_features) for info in chosen}
    found = {}
    for info in chosen:
        transform = masks[info.group] if kind == "masked" else InputTransform()
        form = "int8" if kind == "masked" else kind
        found[info.name] = layer_of(model.get_submodule(info.name), form, info.group, transform)
    intervals = ()
    if kind == "planes":
        narrow = {info.name: 4 for info in chosen if info.kind != "ffn"}
        intervals = ({}, narrow, narrow, narrow)
    return QuantizedModel("nearest", found, intervals, {"seconds": 0.5})
