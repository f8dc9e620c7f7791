"""LRQ-DiT: twin-log weights of 3 or 4 bits and rotated activations of 8, 6 or 4 bits.

Source: arXiv 2508.03485. Inputs are balanced by a channel mask and rotated, by Hadamard blocks or, where that
is measured to round better, by the dual rotation; weights take the inverse, once, and are then rounded to
twin-log codes, once. What differs from the paper and its code, and why:

- weights use the corrected grid of :mod:`.twin_log`, not the published formula, which loses to plain rounding;
- the paper routes a layer to the dual rotation where the root mean square J of its input is at least 1, its
  code by a list of names. J says how large an input is and not how uneven, so the error itself decides here,
  that of the layer's outputs with weights and activations rounded: at 8 bits activations hardly count beside
  weights, and a rotation that rounds them better gains nothing. J is in the report, and both other ways are
  there to compare with.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from . import twin_log
from .apply import QuantizedModel
from .calibration import Calibration, Progress
from .hadamard import hadamard_block, random_signs
from .layers import LinearInfo, linear_layers
from .measure import snr
from .rotation import STEPS, fit_dual_rotation
from .transform import InputTransform, channel_mask
from .uniform import parse_bits, quantize_layers
from .weights import TwinLogWeight

BITS = ("w4a8", "w3a8", "w4a6", "w3a6", "w4a4", "w3a4")
MODES = ("corrected", "paper")
ROUTINGS = ("measured", "paper", "listed", "hadamard", "dual", "none")
HADAMARDS = ("block", "full")

MARGIN_DB = 0.3  # by which the dual rotation, which is not fused with the rounding, must win
JUDGED_OUTPUTS = 128  # of each linear, spread evenly, that outputs are compared on
PAPER_J = 1.0
WIDE_BITS = 8


@dataclass(frozen=True)
class Preset:
    """Settings of one family of models. Patterns are regular expressions for whole names of linears.

    Attributes:
        routing: one of :data:`ROUTINGS`; "listed" takes the dual rotation for the layers in ``dual``.
        dual: layers with outliers, by the authors' lists.
        keep: layers left in full precision, beyond those that no method quantizes.
        plain: layers without a rotation.
        wide: layers whose activations have 8 bits at least.
        bits: unless asked for otherwise.
        hadamard: "block", fused with the rounding, or "full" as in the authors' code.
        prompts: how many the calibration should have, over all steps.
    """

    routing: str = "measured"
    dual: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    wide: tuple[str, ...] = ()
    bits: str = "w4a8"
    hadamard: str = "block"
    prompts: int = 8


_FEED_FORWARD = (r".*\.ff(_context)?\.net\..*",)
_SINGLE_FEED_FORWARD = (r"single_transformer_blocks\.\d+\.proj_(mlp|out)",)
_FLUX_DUAL = (
    r"transformer_blocks\.1[678]\.attn\.to_out\.0",
    r"transformer_blocks\.1[238]\.ff_context\.net\.0\.proj",
)

# The released ones reproduce the authors' choices of layers. The authors have none for video models.
PRESETS: Mapping[str, Preset] = {
    "pixart_alpha_released": Preset(
        "listed", (r"transformer_blocks\.2[1-7]\.attn2\.to_q",), bits="w3a4", hadamard="full"
    ),
    "pixart_sigma_released": Preset(
        "listed", (r".*\.attn2\.to_q", r".*\.ff\.net\.2"), bits="w3a4", hadamard="full"
    ),
    # Their last pattern leaves the feed-forward layers alone, three of the listed ones among them, and what is
    # called neither attn nor ff is not rotated.
    "flux_released": Preset(
        "listed",
        _FLUX_DUAL,
        keep=(*_FEED_FORWARD, r"single_transformer_blocks\.\d+\.proj_out"),
        plain=(r"single_transformer_blocks\.\d+\.proj_mlp",),
        bits="w3a4",
        hadamard="full",
    ),
    "flux": Preset(wide=(*_FEED_FORWARD, *_SINGLE_FEED_FORWARD)),
    "wan": Preset("hadamard"),
    "cogvideox": Preset("hadamard"),
    "hunyuan_video": Preset("hadamard"),
}


def quantize(
    model: nn.Module,
    calibration: Calibration | None,
    *,
    bits: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    layers: Iterable[LinearInfo] | None = None,
    device: torch.device | str | None = None,
    preset: str | None = None,
    mode: str = "corrected",
    grid: str = "small",
    alpha: float | None = 0.5,
    routing: str | None = None,
    hadamard: str | None = None,
    clip: float = 1.0,
    steps: int = STEPS,
) -> QuantizedModel:
    """Quantize the linears of a transformer; the model is not changed.

    The same arguments give the same result.

    Args:
        model: in full precision, weights finite.
        calibration: what goes into the linears over prompts and steps.
        bits: one of :data:`BITS`, the preset's by default.
        seed: of the signs before the Hadamard matrices and of the dual rotations.
        progress: called with layers done, layers in all, and the layer's name.
        layers: which linears; by default :func:`vdit_ext.quant.linear_layers` of the model.
        device: where to compute; by default where the weights are.
        preset: a name in :data:`PRESETS`; by default all is left to the other arguments.
        mode: "corrected" or "paper", the weights' grid (:func:`vdit_ext.quant.twin_log.fit`).
        grid: "small" or "full", how many grids are tried.
        alpha: share of the imbalance between channels that the weights keep, 0 to 1; None leaves out the mask.
        routing: which rotation a layer gets. "measured": the dual one where outputs are at least 0.3 dB nearer
            to the true ones than with Hadamard blocks, on other rows than it was fitted to; "paper": the dual
            one where the root mean square of the input is at least 1; "listed": where the preset says so; or
            "hadamard", "dual" or "none" for all. A layer whose channels no block of 16 divides has none.
        hadamard: "block" or "full", blocks of at most 128 channels or all of them.
        clip: share of a row's largest magnitude at which activations are cut, (0, 1]; .9 may pay at 4 bits.
            Rows are then no longer rotated by the op that rounds them.
        steps: of each greedy search for a dual rotation, at most.

    Returns:
        Layers with :class:`TwinLogWeight`. The report's "layers" says for each its route, J, the SNR in dB of
        the rounded weight, and, where they were measured, those of rows and of outputs under either rotation.

    Raises:
        ValueError: one sentence with what was expected and what came.
        KeyError: a layer that was not calibrated.
    """
    chosen = Preset() if preset is None else PRESETS[_require("preset", preset, tuple(PRESETS))]
    plan = _Plan(
        calibration=Calibration({}) if calibration is None else calibration,
        preset=chosen,
        seed=seed,
        mode=_require("mode", mode, MODES),
        grid=_require("grid", grid, tuple(twin_log.SHIFTS)),
        alpha=alpha,
        routing=_require("routing", routing or chosen.routing, ROUTINGS),
        hadamard=_require("hadamard", hadamard or chosen.hadamard, HADAMARDS),
        clip=clip,
        steps=steps,
        bits=parse_bits("lrq_dit", bits or chosen.bits, BITS),
        report={},
    )
    plan.check()
    infos = list(linear_layers(model) if layers is None else layers)
    kept = [info.name for info in infos if _matches(info.name, chosen.keep)]
    infos = [_regrouped(info, chosen) for info in infos if info.name not in set(kept)]
    found = quantize_layers(model, infos, plan.transform_of, plan.weight_of, progress, device)
    return QuantizedModel("lrq_dit", found, report=plan.summary() | {"kept": kept})


def _require(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"lrq_dit: {name} must be one of {', '.join(choices)}, got {value!r}")
    return value


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _regrouped(info: LinearInfo, preset: Preset) -> LinearInfo:
    """Linears that the preset treats apart from others which read the same tensor become a group apart."""
    apart = [key for key in ("plain", "wide") if _matches(info.name, getattr(preset, key))]
    return replace(info, group="-".join([info.group, *apart])) if apart else info


@dataclass(frozen=True)
class _Plan:
    """The settings of one call, and what is decided for each layer."""

    calibration: Calibration
    preset: Preset
    seed: int
    mode: str
    grid: str
    alpha: float | None
    routing: str
    hadamard: str
    clip: float
    steps: int
    bits: tuple[int, int]
    report: dict[str, dict[str, Any]]

    def check(self) -> None:
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"lrq_dit: alpha must be None or 0 to 1, got {self.alpha}")
        if not 0 < self.clip <= 1:
            raise ValueError(f"lrq_dit: clip must be above 0 and at most 1, got {self.clip}")
        if self.steps < 0:
            raise ValueError(f"lrq_dit: steps must be at least 0, got {self.steps}")
        if self.routing == "listed" and not self.preset.dual:
            raise ValueError("lrq_dit: routing 'listed' needs a preset that lists layers, got one without")

    def summary(self) -> dict[str, Any]:
        routes = [entry["route"] for entry in self.report.values()]
        names = ("mode", "grid", "alpha", "routing", "hadamard", "clip", "seed", "steps")
        return {
            "bits": "w{}a{}".format(*self.bits),
            **{name: getattr(self, name) for name in names},
            "routes": {route: routes.count(route) for route in sorted(set(routes))},
            "layers": self.report,
        }

    def transform_of(self, infos: list[LinearInfo], weights: list[Tensor]) -> InputTransform:
        """The transform of the linears that read one tensor; notes in the report why it is this one."""
        statistics = self.calibration[infos[0].name].to(weights[0].device)
        names = [info.name for info in infos]
        wide = any(_matches(name, self.preset.wide) for name in names)
        base = InputTransform(
            channel_scale=None if self.alpha is None else channel_mask(statistics.amax, weights, self.alpha),
            bits=max(self.bits[1], WIDE_BITS) if wide else self.bits[1],
            clip=1.0 if wide else self.clip,
        )
        route, transform, notes = self._route(names, base, statistics.rows, statistics.rms, weights)
        for name in names:
            self.report[name] = {"route": route, "j": statistics.rms, "activation_bits": base.bits, **notes}
        return transform

    def _route(
        self, names: list[str], base: InputTransform, rows: Tensor, j: float, weights: list[Tensor]
    ) -> tuple[str, InputTransform, dict[str, float]]:
        """Name of the route, the transform, and what was measured."""
        block = hadamard_block(rows.shape[1])
        if not block or self.routing == "none" or any(_matches(name, self.preset.plain) for name in names):
            return "none", base, {}
        blocks = self._with_hadamard(base, rows.shape[1] if self.hadamard == "full" else block, rows)
        if self.routing != "measured":
            if self._is_salient(names, j):
                return "dual", self._with_dual(base, rows, block), {}
            return "hadamard", blocks, {}
        # The rows are a random sample in random order: one half to fit, one to judge.
        half = math.ceil(len(rows) / 2)
        dual = self._with_dual(base, rows[:half], block)
        judge = rows[half:] if len(rows) > 1 else rows
        found: dict[str, float] = {}
        for name, transform in (("hadamard", blocks), ("dual", dual)):
            found[f"{name}_db"] = activation_snr(transform, judge)
            found[f"{name}_output_db"] = self._output_snr(transform, judge, weights)
        wins = found["dual_output_db"] >= found["hadamard_output_db"] + MARGIN_DB
        return ("dual", dual, found) if wins else ("hadamard", blocks, found)

    def _output_snr(self, transform: InputTransform, rows: Tensor, weights: list[Tensor]) -> float:
        """SNR in dB of outputs of all linears of a group, weights and rows rounded as they would be."""
        some = torch.cat([weight[:: math.ceil(len(weight) / JUDGED_OUTPUTS)] for weight in weights])
        rounded = twin_log.fit(transform.weight(some), self.bits[0], self.mode, self.grid).dequantize_int8()
        return signal_to_noise(rows.to(torch.float32) @ some.T, rounded_rows(transform, rows) @ rounded.T)

    def _is_salient(self, names: list[str], j: float) -> bool:
        if self.routing == "paper":
            return j >= PAPER_J
        if self.routing == "listed":
            return any(_matches(name, self.preset.dual) for name in names)
        return self.routing == "dual"

    def _with_hadamard(self, base: InputTransform, size: int, rows: Tensor) -> InputTransform:
        signs = random_signs(rows.shape[1], self.seed).to(rows.device)
        return InputTransform(base.channel_scale, size, signs, bits=base.bits, clip=base.clip)

    def _with_dual(self, base: InputTransform, rows: Tensor, block: int) -> InputTransform:
        rotation = fit_dual_rotation(base.rows(rows), block=block, steps=self.steps, seed=self.seed)
        return InputTransform(base.channel_scale, rotation=rotation, bits=base.bits, clip=base.clip)

    def weight_of(self, info: LinearInfo, weight: Tensor) -> TwinLogWeight:
        try:
            form = twin_log.fit(weight, self.bits[0], self.mode, self.grid)
        except ValueError as error:
            raise ValueError(f"{info.name}: {error}") from None
        self.report[info.name]["weight_db"] = signal_to_noise(weight, form.dequantize_int8())
        return stored(form)


def stored(form: twin_log.TwinLog) -> TwinLogWeight:
    """Twin-log codes as the products read them: packed tiles, int8 tables and their steps."""
    tiles = ops.pack_log4(form.codes)
    return TwinLogWeight(tiles, form.table(), form.sigma, form.bits, *form.codes.shape)


def activation_snr(transform: InputTransform, rows: Tensor) -> float:
    """SNR in dB of rows ``[R, C]`` that are transformed and rounded, each with a scale of its own."""
    return signal_to_noise(transform.rows(rows), rounded_rows(transform, rows))


def rounded_rows(transform: InputTransform, rows: Tensor) -> Tensor:
    """Rows as a layer multiplies them: transformed, cut off and rounded, fp32 ``[R, C]``."""
    codes, scale, _ = ops.quantize_rows(transform.clipped(transform.rows(rows)), bits=transform.bits)
    return codes * scale[:, None]


def signal_to_noise(wanted: Tensor, got: Tensor) -> float:
    """SNR in dB as JSON can hold it: 300 where nothing is lost, as of zeros."""
    found = snr(wanted, got)
    return found if math.isfinite(found) else 300.0
