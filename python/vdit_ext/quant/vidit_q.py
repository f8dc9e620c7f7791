"""ViDiT-Q: per-channel weights, per-row activations, channel mask, rotation, and precision by part of the
steps.

arXiv:2406.02540. Where paper and code differ, section 8 of the specification decides: weights are rounded once,
after mask and rotation; signs are stored; layers that read one tensor share their mask; blocks of 128 channels
are rotated by default; a layer that changes precision keeps one copy of its weight in two planes of nibbles.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .apply import QuantizedModel
from .calibration import Calibration, Progress
from .hadamard import hadamard_block, random_signs, split_size
from .layers import FFN, TEMPORAL, LinearInfo, linear_layers
from .transform import InputTransform, channel_mask
from .uniform import Grid, correct_biases, parse_bits, quantize_layers, round_weight, store, to_planes
from .weights import Weight

BITS = ("w8a8", "w6a6", "w4a8", "w4a8-mp")
ROTATIONS = ("none", "block", "full", "search")
ALPHAS = (0.1, 0.3, 0.5, 0.7, 0.9)
INTERVALS = 4
BitMap = Mapping[str, int]

# What the authors set (specs section 4), by model and bits, as arguments of `quantize`; at 8 and 6 bits they
# set neither mask nor rotation, but at 6 a rotation pays on the toy model. Exponents of their first release,
# which stand on activations, are 1 minus theirs here.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "default": {},
    "opensora": {"w4a8": {"alpha": 0.88}, "w4a8-mp": {"alpha": 0.88}},
    "pixart": {"w4a8": {"alpha": 0.7}},
    "dit": {"w4a8": {"alpha": 0.88, "balanced": r".*\.ff\.net\.2"}},
}


def quantize(
    model: nn.Module,
    calibration: Calibration | None,
    *,
    bits: str = "w8a8",
    preset: str = "default",
    alpha: float | str | None = "auto",
    rotation: str = "auto",
    balanced: str | None = None,
    precision: str | Sequence[BitMap] = "released",
    symmetric: bool = False,
    clip: str = "minmax",
    bias_correction: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
    layers: Iterable[LinearInfo] | None = None,
    device: torch.device | str | None = None,
) -> QuantizedModel:
    """Quantize a transformer's linears; the model is not touched.

    Args:
        calibration: of the same layers; None will do where nothing is masked or searched.
        bits: "w8a8", "w6a6" (a byte for each weight still), "w4a8", or "w4a8-mp": weights that change between 4
            and 8 bits with the part of the steps, as ``precision`` says.
        preset: one of :data:`PRESETS`: the authors' settings for a model.
        alpha: exponent of the mask (:func:`vdit_ext.quant.transform.channel_mask`); "search" tries
            :data:`ALPHAS` and no mask, and takes what changes the outputs of a group of layers least, on the
            calibration's rows; None for no mask; "auto" is the preset's, else "search" where weights may have 4
            bits, else None.
        rotation: "block" for Hadamard blocks of up to 128 channels, fused with quantization; "full" for one
            over all channels, as the authors' code has it, which runs apart; "none"; "search" for "block" or
            "none", whichever changes the outputs of a group less; "auto" is "block" where weights may have
            fewer than 8 bits, else "none".
        balanced: regular expression for the whole names of layers that get mask and rotation; a group gets them
            when one of its layers matches. None is the preset's, else all layers.
        precision: with "w4a8-mp", bits by layer name for each equal part of the steps, first steps first
            (:func:`vdit_ext.quant.sensitivity.plan_precision` makes such maps; a layer not named has 8 bits);
            "released", the shape of the authors' OpenSora map (:func:`released_map`); or "switchable": 8 bits
            everywhere, in planes that can be read as 4, to measure sensitivity with.
        symmetric, clip: of the weights' grids (:func:`vdit_ext.quant.uniform.round_weight`).
        bias_correction: move the mean error of outputs into biases
            (:func:`vdit_ext.quant.uniform.correct_biases`), which the paper does not do.
        seed: of the rotation's signs.
        progress: called with layers done, layers in all, and the layer's name.
        layers: which linears; by default :func:`vdit_ext.quant.linear_layers` of the model.
        device: where to compute; by default where the weights are.

    Returns:
        A :class:`QuantizedModel`. Its report has each group's mask and rotation and the weights' average bits.

    Raises:
        ValueError: one sentence, for options out of range, maps that do not fit, channels that no Hadamard
            matrix of the size asked for divides, or weights that are not finite.
        KeyError: a layer that was not calibrated.
    """
    weight_bits, activation_bits = parse_bits("vidit_q", bits, BITS)
    calibration = Calibration({}) if calibration is None else calibration
    balance = _balance(bits, preset, alpha, rotation, balanced, seed, activation_bits)
    infos = list(linear_layers(model) if layers is None else layers)
    mixed = bits == "w4a8-mp"
    intervals = _intervals(infos, precision) if mixed else ()
    levels = _levels(infos, intervals, weight_bits, switchable=precision == "switchable")
    chosen: dict[str, dict[str, Any]] = {}

    def round_to(weight: Tensor, width: int) -> Grid:
        return round_weight(weight, width, symmetric=symmetric, clip=clip)

    def transform_of(members: list[LinearInfo], weights: list[Tensor]) -> InputTransform:
        low = min(min(levels[info.name]) for info in members)
        candidates = balance.candidates(members, weights, low, calibration)
        best = next(iter(candidates))
        if len(candidates) > 1:
            rows = calibration[members[0].name].rows.to(weights[0].device)
            best = nearest_outputs(rows, weights, candidates, lambda w: round_to(w, low).dequantize())
        chosen[members[0].group] = {"hadamard": best[0], "alpha": best[1]}
        return candidates[best]

    def weight_of(info: LinearInfo, weight: Tensor) -> Weight:
        grid = round_to(weight, max(levels[info.name]))
        return to_planes(grid) if len(levels[info.name]) > 1 else store(grid)

    found = quantize_layers(model, infos, transform_of, weight_of, progress, device)
    if bias_correction:
        found = correct_biases(model, found, calibration, device)
    report = {
        "bits": bits,
        "preset": preset,
        "bias_correction": bias_correction,
        "groups": chosen,
        "average_weight_bits": average_bits(infos, intervals) if mixed else float(weight_bits),
    }
    return QuantizedModel("vidit_q", found, intervals, report)


# ---------------------------------------------------------------------------------------------------------
# Mask and rotation
# ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Balance:
    """The options of :func:`quantize` that decide masks and rotations; "auto" depends on a layer's lowest
    bits."""

    alpha: float | str | None
    rotation: str
    pattern: re.Pattern
    seed: int
    activation_bits: int

    def candidates(
        self,
        members: list[LinearInfo],
        weights: list[Tensor],
        low: int,
        calibration: Calibration,
    ) -> dict[tuple[int, float | None], InputTransform]:
        """The transforms to choose from for a group, by Hadamard size and exponent."""
        if not any(self.pattern.fullmatch(info.name) for info in members):
            return {(0, None): InputTransform(bits=self.activation_bits)}
        wanted = ("block" if low < 8 else "none") if self.rotation == "auto" else self.rotation
        alpha = ("search" if low <= 4 else None) if self.alpha == "auto" else self.alpha
        alphas = (None, *ALPHAS) if alpha == "search" else (alpha,)
        place = weights[0].device
        amax = None if alphas == (None,) else calibration[members[0].name].amax.to(place)
        found = {}
        for kind in ("block", "none") if wanted == "search" else (wanted,):
            turned = _rotation(kind, members[0], self.seed, self.activation_bits).to(place)
            for one in alphas:
                found[turned.hadamard, one] = turned if one is None else _masked(turned, amax, weights, one)
        return found


def _balance(
    bits: str,
    preset: str,
    alpha: float | str | None,
    rotation: str,
    balanced: str | None,
    seed: int,
    activation_bits: int,
) -> _Balance:
    """Check the options and fill in the preset's."""
    for name, value, choices in (("preset", preset, PRESETS), ("rotation", rotation, ("auto", *ROTATIONS))):
        if value not in choices:
            raise ValueError(f"vidit_q: {name} must be one of {', '.join(choices)}, got {value!r}")
    if isinstance(alpha, str) and alpha not in ("auto", "search"):
        raise ValueError(f'vidit_q: alpha must be a number, "auto", "search" or None, got {alpha!r}')
    published = PRESETS[preset].get(bits, {})
    alpha = published.get("alpha", alpha) if alpha == "auto" else alpha
    balanced = published.get("balanced", ".*") if balanced is None else balanced
    try:
        pattern = re.compile(balanced)
    except re.error as error:
        raise ValueError(f"vidit_q: balanced must be a regular expression, got {balanced!r}: {error}") from None
    return _Balance(alpha, rotation, pattern, seed, activation_bits)


def nearest_outputs(
    rows: Tensor,
    weights: Sequence[Tensor],
    candidates: Mapping[Any, InputTransform],
    round_to: Callable[[Tensor], Tensor],
    max_rows: int = 256,
) -> Any:
    """The key of the transform with which a group's quantized outputs are nearest to the true ones; of equal
    ones the first.

    Args:
        rows: ``[R, C]``, rows of the input; the first ``max_rows`` count.
        weights: fp32 ``[O, C]`` each, those of the group.
        round_to: a transformed weight as rounding leaves it.
    """
    rows = rows[:max_rows].to(torch.float32)
    outputs = [rows @ weight.T for weight in weights]

    def error(key: Any) -> float:
        transform = candidates[key]
        codes, scale, _ = ops.quantize_rows(transform.rows(rows), bits=transform.bits)
        inputs = codes.to(torch.float32) * scale[:, None]
        pairs = zip(outputs, weights, strict=True)
        return float(sum((inputs @ round_to(transform.weight(w)).T - y).square().sum() for y, w in pairs))

    return min(candidates, key=error)


def _masked(transform: InputTransform, amax: Tensor, weights: Sequence[Tensor], alpha: float) -> InputTransform:
    mask = channel_mask(amax, weights, alpha)
    return InputTransform(mask, transform.hadamard, transform.signs, bits=transform.bits)


def _rotation(kind: str, info: LinearInfo, seed: int, bits: int) -> InputTransform:
    """The rotation alone, with signs that depend on the seed and on the group's name."""
    channels = info.in_features
    size = {"none": 0, "block": hadamard_block(channels), "full": channels}[kind]
    if size == 0:
        return InputTransform(bits=bits)
    try:
        split_size(size)
    except ValueError as error:
        raise ValueError(f"{info.name}: {error}") from None
    signs = random_signs(channels, seed ^ zlib.crc32(info.group.encode()))
    return InputTransform(hadamard=size, signs=signs, bits=bits)


# ---------------------------------------------------------------------------------------------------------
# Precision by part of the steps
# ---------------------------------------------------------------------------------------------------------


def released_map(layers: Iterable[LinearInfo]) -> tuple[dict[str, int], ...]:
    """The authors' OpenSora map (specs section 4), for any model: bits by layer name in the four quarters.

    The noisiest quarter has 8 bits; in the others feed-forward has 8 and attention 4, but for the temporal
    attention of block 23 in the last one.
    """
    infos = list(layers)
    maps = [{info.name: 8 for info in infos}]
    for interval in range(1, INTERVALS):
        last = interval == INTERVALS - 1
        maps.append({info.name: 8 if info.kind == FFN or (last and _exempt(info)) else 4 for info in infos})
    return tuple(maps)


def _exempt(info: LinearInfo) -> bool:
    return info.kind == TEMPORAL and info.block.rpartition(".")[2] == "23"


def average_bits(layers: Iterable[LinearInfo], intervals: Sequence[BitMap]) -> float:
    """Bits a weight, mean over weights and over parts of the steps; a layer that a map does not name has 8."""
    sizes = {info.name: info.in_features * info.out_features for info in layers}
    total = sum(size * bits.get(name, 8) for bits in intervals for name, size in sizes.items())
    return total / (sum(sizes.values()) * len(intervals))


def _intervals(infos: list[LinearInfo], precision: str | Sequence[BitMap]) -> tuple[BitMap, ...]:
    if precision == "released":
        return released_map(infos)
    if precision == "switchable":
        return tuple({info.name: 8 for info in infos} for _ in range(INTERVALS))
    if isinstance(precision, str):
        raise ValueError(f'vidit_q: precision must be "released", "switchable" or bit maps, got {precision!r}')
    names = {info.name for info in infos}
    for bits in precision:
        if unknown := sorted(bits.keys() - names):
            raise ValueError(f"vidit_q: precision must name quantized layers, got {unknown[0]}")
        if wrong := next((name for name in bits if bits[name] not in (4, 8)), None):
            raise ValueError(f"vidit_q: precision must be 4 or 8 bits for {wrong}, got {bits[wrong]}")
    if not precision:
        raise ValueError("vidit_q: precision must hold a bit map for each part of the steps, got none")
    return tuple({info.name: bits.get(info.name, 8) for info in infos} for bits in precision)


def _levels(
    infos: list[LinearInfo], intervals: tuple[BitMap, ...], weight_bits: int, *, switchable: bool
) -> dict[str, set[int]]:
    """The numbers of bits that each layer will be read with."""
    if not intervals:
        return {info.name: {weight_bits} for info in infos}
    if switchable:
        return {info.name: {4, 8} for info in infos}
    return {info.name: {bits[info.name] for bits in intervals} for info in infos}
