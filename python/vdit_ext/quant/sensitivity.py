"""How much a sample suffers when one part of the model has 4 bits, and the bit map that follows.

ViDiT-Q weighs each kind of layer by what it decides (specs section 4): cross-attention by content, spatial
attention and feed-forward by visual quality, temporal attention by motion. The metrics here need no downloads;
CLIP, DOVER or optical flow can take their places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .apply import Applied, QuantizedModel, apply
from .budget import Unit, choose
from .calibration import Calibration, Progress
from .layers import CROSS, FFN, SELF, TEMPORAL, LinearInfo, linear_layers
from .vidit_q import INTERVALS, quantize

# Loss of frames against those of the full-precision model, float [F, H, W, 3] each; 0 for equal ones, higher is
# worse.
Metric = Callable[[Tensor, Tensor], float]
# Samples with the model and returns the frames; calls its argument with (step, steps) before each step.
Sample = Callable[[Callable[[int, int], None]], Tensor]

GROUP_OF_KIND = {CROSS: "content", SELF: "quality", FFN: "quality", TEMPORAL: "motion"}


def content_loss(reference: Tensor, frames: Tensor) -> float:
    """Mean squared difference of what is where: of the means of 8 x 8 pixels."""
    pooled = [F.avg_pool2d(f.movedim(-1, 1).to(torch.float32), 8, ceil_mode=True) for f in (reference, frames)]
    return float(F.mse_loss(*pooled))


def quality_loss(reference: Tensor, frames: Tensor) -> float:
    """Mean squared difference of the pixels, what PSNR measures."""
    return float(F.mse_loss(reference.to(torch.float32), frames.to(torch.float32)))


def motion_loss(reference: Tensor, frames: Tensor) -> float:
    """Mean squared difference of what changes from frame to frame; 0 for a single frame."""
    if len(frames) < 2:
        return 0.0
    return float(F.mse_loss(*(f.to(torch.float32).diff(dim=0) for f in (reference, frames))))


METRICS: dict[str, Metric] = {"content": content_loss, "quality": quality_loss, "motion": motion_loss}


@dataclass(frozen=True)
class Sensitivity:
    """What :func:`measure_sensitivity` found.

    Attributes:
        units: with the loss that each causes at 4 bits as its gain, and its number of weights as its cost.
        shares: by group, the mean squared error of the frames with all of the group's units at 4 bits.
        members: layer names by unit name.
        num_intervals: parts of the steps.
        num_weights: of all layers.
    """

    units: tuple[Unit, ...]
    shares: Mapping[str, float]
    members: Mapping[str, tuple[str, ...]]
    num_intervals: int
    num_weights: int


def measure_sensitivity(
    model: nn.Module,
    quantized: QuantizedModel,
    sample: Sample,
    *,
    layers: Iterable[LinearInfo] | None = None,
    metrics: Mapping[str, Metric] | None = None,
    by_interval: bool = True,
    kept: MutableMapping[str, float] | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """Sample with one unit after another at 4 bits and the rest at 8.

    A unit is the layers of one kind in one block, and with ``by_interval`` in one quarter of the steps. One
    clip is sampled for each unit, and a few more: of Wan 2.1 14B, whose 40 blocks have three kinds each, 484
    clips, or 124 without ``by_interval``.

    Args:
        model: full precision; it is one again afterwards.
        quantized: by :func:`vdit_ext.quant.vidit_q.quantize` with ``precision="switchable"``.
        sample: samples one clip with this model, the same one at every call.
        layers: those that were quantized.
        metrics: loss by group ("content", "quality", "motion"), by default :data:`METRICS`.
        by_interval: False measures a unit over all steps at once, at a quarter of the cost, and divides what it
            finds evenly among the quarters.
        kept: losses that an interrupted call with the same arguments measured, by clip; is added to.
        progress: called with clips done, clips in all, and the unit.

    Raises:
        ValueError: a layer that cannot be read as 4 bits.
    """
    infos = list(linear_layers(model) if layers is None else layers)
    losses = METRICS | dict(metrics or {})
    kept = {} if kept is None else kept
    members, group_of = _units(infos)
    sizes = {info.name: info.in_features * info.out_features for info in infos}
    cost = {unit: sum(sizes[name] for name in names) for unit, names in members.items()}
    spans = [(i,) for i in range(INTERVALS)] if by_interval else [tuple(range(INTERVALS))]
    groups = sorted(set(group_of.values()))
    total = 2 + len(groups) + len(spans) * len(members)
    done = 0

    def tell(what: str) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total, what)

    def loss_of(names: Iterable[str], span: tuple[int, ...], what: str, metric: Metric) -> float:
        clip = f"{what} {span}"
        if clip not in kept:
            kept[clip] = metric(reference, _sample_with(applied, sample, set(names), span))
        tell(what)
        return kept[clip]

    reference = sample(lambda step, steps: None)
    tell("full precision")
    with apply(model, quantized) as applied:
        base = _sample_with(applied, sample, set(), ())
        tell("8 bits")
        everywhere = tuple(range(INTERVALS))
        shares = {}
        for group in groups:
            names = [name for unit in members if group_of[unit] == group for name in members[unit]]
            shares[group] = loss_of(names, everywhere, group, quality_loss)
        found = []
        for span in spans:
            for unit, names in members.items():
                metric = losses[group_of[unit]]
                excess = loss_of(names, span, unit, metric) - metric(reference, base)
                gain = max(0.0, excess) / len(span)
                found += [Unit((interval, unit), group_of[unit], cost[unit], gain) for interval in span]
    return Sensitivity(tuple(found), shares, members, INTERVALS, sum(sizes.values()))


def plan_precision(found: Sensitivity, average_bits: float) -> tuple[dict[str, int], ...]:
    """The bit map that spares most loss with weights of this many bits on average, over weights and steps.

    Each group has a part of the budget by its error at 4 bits, and an exact knapsack within it.

    Args:
        average_bits: 4 to 8; the map's own average is at most this.

    Returns:
        Bits by layer name for each part of the steps, as ``quantize(precision=...)`` takes it.

    Raises:
        ValueError: average_bits out of range.
    """
    if not 4 <= average_bits <= 8:
        raise ValueError(f"vidit_q: average_bits must be in 4 .. 8, got {average_bits}")
    # A unit's cost is its number of weights: 4 bits more of each, for one part of the steps.
    budget = int((average_bits - 4) / 4 * found.num_weights * found.num_intervals)
    raised = choose(found.units, budget, found.shares)
    return tuple(
        {name: 8 if (i, unit) in raised else 4 for unit, names in found.members.items() for name in names}
        for i in range(found.num_intervals)
    )


def measured_map(
    model: nn.Module,
    calibration: Calibration,
    sample: Sample,
    *,
    average_bits: float,
    metrics: Mapping[str, Metric] | None = None,
    by_interval: bool = True,
    kept: MutableMapping[str, float] | None = None,
    progress: Progress | None = None,
    layers: Iterable[LinearInfo],
    **settings: Any,
) -> tuple[dict[str, int], ...]:
    """The bit map of this average for a model: measure, plan.

    Arguments as :func:`measure_sensitivity`, :func:`plan_precision` and :func:`vdit_ext.quant.vidit_q.quantize`
    have them; the last takes ``settings``.
    """
    infos = list(layers)
    planes = quantize(model, calibration, bits="w4a8-mp", precision="switchable", layers=infos, **settings)
    given = {"layers": infos, "metrics": metrics, "by_interval": by_interval, "kept": kept}
    return plan_precision(measure_sensitivity(model, planes, sample, progress=progress, **given), average_bits)


def mixed_precision(
    model: nn.Module,
    calibration: Calibration,
    sample: Sample,
    *,
    average_bits: float,
    metrics: Mapping[str, Metric] | None = None,
    by_interval: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
    layers: Iterable[LinearInfo] | None = None,
    **settings: Any,
) -> QuantizedModel:
    """ViDiT-Q with a bit map of its own: measure, plan, quantize.

    Arguments as :func:`measure_sensitivity`, :func:`plan_precision` and :func:`vdit_ext.quant.vidit_q.quantize`
    have them; the last takes ``settings``. ``progress`` counts sampled clips.
    """
    infos = list(linear_layers(model) if layers is None else layers)
    settings |= {"seed": seed, "layers": infos}
    given = {"average_bits": average_bits, "metrics": metrics, "by_interval": by_interval, "progress": progress}
    precision = measured_map(model, calibration, sample, **given, **settings)
    return quantize(model, calibration, bits="w4a8-mp", precision=precision, **settings)


def _units(infos: list[LinearInfo]) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Layer names and metric group by unit."""
    members: dict[str, tuple[str, ...]] = {}
    group_of = {}
    for info in infos:
        unit = f"{info.block}.{info.kind}"
        members[unit] = (*members.get(unit, ()), info.name)
        group_of[unit] = GROUP_OF_KIND[info.kind]
    return members, group_of


def _sample_with(applied: Applied, sample: Sample, low: set[str], span: tuple[int, ...]) -> Tensor:
    """The frames with some layers at 4 bits in some parts of the steps."""

    def on_step(step: int, steps: int) -> None:
        interval = step * INTERVALS // steps
        for name, layer in applied.layers.items():
            layer.set_bits(4 if name in low and interval in span else 8)

    return sample(on_step)
