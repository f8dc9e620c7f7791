"""What the methods are compared with: plain rounding, and SmoothQuant."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .apply import QuantizedModel
from .calibration import Calibration, Progress
from .layers import LinearInfo
from .transform import InputTransform, channel_mask
from .uniform import parse_bits, quantize_layers, round_weight, store
from .weights import Weight

BITS = ("w8a8", "w6a6", "w4a8", "w4a6", "w4a4", "w3a8", "w3a6", "w3a4")


def round_to_nearest(
    model: nn.Module,
    calibration: Calibration | None = None,
    *,
    bits: str,
    clip: str = "minmax",
    symmetric: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
    layers: Iterable[LinearInfo] | None = None,
    device: torch.device | str | None = None,
) -> QuantizedModel:
    """Weights rounded per output channel, activations per row, and nothing else.

    Args:
        calibration, seed: not used; there so that all methods are called alike.
        bits: one of :data:`BITS`.
        clip, symmetric: as in :func:`vdit_ext.quant.uniform.round_weight`.
        progress, layers, device: as in :func:`vdit_ext.quant.vidit_q.quantize`.
    """
    weight_bits, activation_bits = parse_bits("rtn", bits, BITS)
    transform = InputTransform(bits=activation_bits)

    def weight_of(info: LinearInfo, weight: Tensor) -> Weight:
        return store(round_weight(weight, weight_bits, symmetric=symmetric, clip=clip))

    found = quantize_layers(model, layers, lambda infos, weights: transform, weight_of, progress, device)
    return QuantizedModel("rtn", found, report={"bits": bits, "clip": clip, "symmetric": symmetric})


def smooth_quant(
    model: nn.Module,
    calibration: Calibration | None,
    *,
    bits: str,
    alpha: float = 0.5,
    seed: int = 0,
    progress: Progress | None = None,
    layers: Iterable[LinearInfo] | None = None,
    device: torch.device | str | None = None,
) -> QuantizedModel:
    """Channel masks with one share for all layers (SmoothQuant, arXiv:2211.10438, eq. 4), then rounding.

    Args:
        alpha: share of the imbalance that moves from activations to weights, 0 to 1.
        bits, seed, progress, layers, device: as in :func:`round_to_nearest`.
    """
    weight_bits, activation_bits = parse_bits("smoothquant", bits, BITS)
    calibration = Calibration({}) if calibration is None else calibration

    def transform_of(infos: list[LinearInfo], weights: list[Tensor]) -> InputTransform:
        mask = channel_mask(calibration[infos[0].name].amax.to(weights[0].device), weights, 1 - alpha)
        return InputTransform(channel_scale=mask, bits=activation_bits)

    def weight_of(info: LinearInfo, weight: Tensor) -> Weight:
        return store(round_weight(weight, weight_bits))

    found = quantize_layers(model, layers, transform_of, weight_of, progress, device)
    return QuantizedModel("smoothquant", found, report={"bits": bits, "alpha": alpha})
