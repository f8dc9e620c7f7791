"""Uniform per-channel rounding of weights, and the loop over layers that the methods share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.linear import MAX_CHANNELS
from .apply import get_linear
from .calibration import Calibration, Progress
from .layers import LinearInfo, linear_layers
from .linear import QuantLayer, QuantLinear, compute_device
from .transform import InputTransform
from .weights import Int4Weight, Int8Weight, NibblePlaneWeight, Weight

CLIPS = ("minmax", "mse")
# Shares of the min-max range that the search for the least squared error tries.
_SHRINKS = tuple(1 - 0.02 * i for i in range(26))


@dataclass(frozen=True)
class Grid:
    """Codes of a weight on a uniform grid: ``weight = (codes + zero) * scale``.

    codes uint8 ``[O, C]``, 0 to 2^bits - 1; scale fp32 ``[O]``, positive; zero fp32 ``[O]``, whole numbers.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int

    def dequantize(self) -> Tensor:
        """fp32 ``[O, C]``."""
        return (self.codes.to(torch.float32) + self.zero[:, None]) * self.scale[:, None]


def round_weight(weight: Tensor, bits: int, *, symmetric: bool = False, clip: str = "minmax") -> Grid:
    """Round each row of a weight to a grid of its own.

    Asymmetric: the grid spans ``[min(0, min w), max(0, max w)]``, so that 0 is a code (ViDiT-Q, specs section
    4). Symmetric: ``[-max |w|, max |w|]`` with ``2^bits - 1`` codes.

    Args:
        weight: ``[O, C]``.
        bits: 2 to 8.
        clip: "minmax", or "mse": the share of that span, down to a half, with the least squared error.

    Raises:
        ValueError: bits or a clip that there is not; a weight that is not finite.
    """
    if bits not in range(2, 9) or clip not in CLIPS:
        raise ValueError(
            f"vdit_ext.quant: bits must be 2 to 8 and clip one of {', '.join(CLIPS)}, got {bits} and {clip!r}"
        )
    weight = weight.to(torch.float32)
    if not bool(weight.isfinite().all()):
        raise ValueError("vdit_ext.quant: a weight must be finite, it has a NaN or an infinity")
    if weight.shape[1] == 0:
        raise ValueError("vdit_ext.quant: a weight must have at least one input channel, got 0")
    low, high = weight.amin(1).clamp_max(0), weight.amax(1).clamp_min(0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    best = _on_grid(weight, low, high, bits, symmetric)
    if clip == "minmax":
        return best
    error = _row_error(weight, best)
    for share in _SHRINKS[1:]:
        grid = _on_grid(weight, low * share, high * share, bits, symmetric)
        found = _row_error(weight, grid)
        better = found < error
        error = torch.where(better, found, error)
        codes = torch.where(better[:, None], grid.codes, best.codes)
        scale, zero = (
            torch.where(better, *pair) for pair in ((grid.scale, best.scale), (grid.zero, best.zero))
        )
        best = Grid(codes, scale, zero, bits)
    return best


def _on_grid(weight: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool) -> Grid:
    top = 2**bits - 1
    steps = top - 1 if symmetric else top
    # A row of zeros keeps a scale of 1, so that nothing is divided by 0.
    span = high - low
    scale = torch.where(span > 1e-30, span / steps, 1.0)
    zero = torch.full_like(scale, -(2 ** (bits - 1))) if symmetric else (low / scale).round()
    codes = ((weight / scale[:, None]).round() - zero[:, None]).clamp(0, top)
    return Grid(codes.to(torch.uint8), scale, zero, bits)


def _row_error(weight: Tensor, grid: Grid) -> Tensor:
    return (grid.dequantize() - weight).square().sum(1)


def to_int8(grid: Grid) -> Int8Weight:
    """The grid's codes in a byte each; symmetric where the grid is."""
    half = 2 ** (grid.bits - 1)
    codes, zero = (grid.codes.to(torch.int16) - half).to(torch.int8), grid.zero + half
    return Int8Weight(codes, grid.scale, zero if bool(zero.any()) else None, grid.bits)


def to_int4(grid: Grid) -> Int4Weight:
    """The grid's codes, of at most 4 bits, as packed tiles."""
    return Int4Weight(ops.pack_w4(grid.codes), grid.scale, grid.zero, *grid.codes.shape, bits=grid.bits)


def to_planes(grid: Grid) -> NibblePlaneWeight:
    """The grid's codes, of 8 bits, as two planes of nibbles."""
    high, low = ops.pack_w4(grid.codes >> 4), ops.pack_w4(grid.codes & 15)
    # No code stands for 0 at 4 bits, so a row of zeros has a scale of 0 instead.
    is_zero = (grid.codes == -grid.zero[:, None]).all(1)
    scale = torch.where(is_zero, 0.0, grid.scale)
    return NibblePlaneWeight(high, low, scale, grid.zero + 128, *grid.codes.shape)


def store(grid: Grid) -> Weight:
    """The smallest format that holds the grid and that the kernels read."""
    return to_int4(grid) if grid.bits <= 4 else to_int8(grid)


def parse_bits(method: str, bits: str, allowed: Sequence[str]) -> tuple[int, int]:
    """``(weight bits, activation bits)`` of a name such as "w4a8" or "w4a8-mp".

    Raises:
        ValueError: a name that is not among ``allowed``, in one sentence that begins with the method.
    """
    if bits not in allowed:
        raise ValueError(f"{method}: bits must be one of {', '.join(allowed)}, got {bits!r}")
    weight, activation = re.match(r"w(\d+)a(\d+)", bits).groups()
    return int(weight), int(activation)


def quantize_layers(
    model: nn.Module,
    layers: Iterable[LinearInfo] | None,
    transform_of: Callable[[list[LinearInfo], list[Tensor]], InputTransform],
    weight_of: Callable[[LinearInfo, Tensor], Weight],
    progress: Progress | None = None,
    device: torch.device | str | None = None,
) -> dict[str, QuantLayer]:
    """Quantize layer by layer, group by group; one group's weights are in memory at a time.

    Args:
        transform_of: the transform that all linears of a group share, from them and their fp32 weights.
        weight_of: the stored weight, from a linear and its transformed weight. Rounding happens here, once.
        progress: called with layers done, layers in all, and the layer's name.
        device: where to compute; by default where each weight is (:func:`compute_device`). The layers returned
            are on the CPU in any case.

    Raises:
        ValueError: no layers, a linear whose weight is not finite, or what the two functions raise; one
            sentence that begins with the layer's name.
    """
    infos = list(linear_layers(model) if layers is None else layers)
    if not infos:
        raise ValueError("vdit_ext.quant: at least one linear must be quantized, got none")
    groups: dict[str, list[LinearInfo]] = {}
    for info in infos:
        groups.setdefault(info.group, []).append(info)
    found: dict[str, QuantLayer] = {}
    for group, members in groups.items():
        linears = [_linear(model, info) for info in members]
        place = compute_device(linears[0]) if device is None else device
        weights = [linear.weight.detach().to(place, torch.float32) for linear in linears]
        for info, weight in zip(members, weights, strict=True):
            if not bool(weight.isfinite().all()):
                raise ValueError(f"{info.name}: the weight must be finite, it has a NaN or an infinity")
        transform = transform_of(members, weights)
        kept = transform.to("cpu")
        for info, linear, weight in zip(members, linears, weights, strict=True):
            bias = None if linear.bias is None else linear.bias.detach().to("cpu", torch.float32, copy=True)
            name = group if len(members) > 1 else None
            stored = weight_of(info, transform.weight(weight)).to("cpu")
            found[info.name] = QuantLayer(stored, bias, kept, name)
            if progress is not None:
                progress(len(found), len(infos), info.name)
    return {info.name: found[info.name] for info in infos}


def correct_biases(
    model: nn.Module,
    layers: Mapping[str, QuantLayer],
    calibration: Calibration,
    device: torch.device | str | None = None,
) -> dict[str, QuantLayer]:
    """Take the mean error of each layer's outputs, on the calibration's rows, off its bias.

    Rounding shifts the mean of an output by the weight's error times the mean input; that part is known and can
    be undone for free (as in data-free quantization, arXiv:1906.04721, section 4.2). Layers without a bias, and
    those that change precision, are left alone.
    """
    found = dict(layers)
    for name, layer in layers.items():
        if layer.bias is None or hasattr(layer.weight, "switchable_bits"):
            continue
        linear = get_linear(model, name)
        place = compute_device(linear) if device is None else device
        weight = linear.weight.detach().to(place, torch.float32)
        rows = calibration[name].rows.to(place, torch.float32)
        wanted = rows @ weight.T + layer.bias.to(place)
        error = QuantLinear(layer.to(place))(rows) - wanted
        found[name] = replace(layer, bias=layer.bias - error.mean(0).cpu())
    return found


def _linear(model: nn.Module, info: LinearInfo) -> nn.Linear:
    linear = get_linear(model, info.name)
    if not isinstance(linear, nn.Linear) or linear._parameters.get("weight") is None:
        raise ValueError(f"{info.name}: it must be a torch.nn.Linear, got {type(linear).__name__}")
    if linear.in_features > MAX_CHANNELS:
        raise ValueError(
            f"{info.name}: input channels must be at most {MAX_CHANNELS}, so that sums are exact in int32, got "
            f"{linear.in_features}; keep this layer as it is"
        )
    return linear
