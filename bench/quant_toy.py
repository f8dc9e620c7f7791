#!/usr/bin/env python
"""Every quantization method at each of its bit widths on the trained toy models, beside its baselines.

    python bench/quant_toy.py [--models toy_t2v,toy_dit] [--only vidit_q,rtn] [--bits w4a8] [--write]

Prints, for each model and row: SNR of the weights (mask and rotation undone), SNR of whole blocks on the inputs
that the full-precision model gives them, PSNR of what is sampled against the full-precision run from the same
noise, size of the quantized layers, and seconds to quantize (the calibration, which all methods of a model
share, is in the heading). These are toy results. ``--write`` puts them under bench/results.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from machine import facts, slug

from vdit_ext import toyworld
from vdit_ext.quant import apply, calibrate, linear_layers, measure, methods, vidit_q
from vdit_ext.quant.sensitivity import mixed_precision
from vdit_ext.toyworld import dit
from vdit_ext.video import quality

RESULTS = Path(__file__).resolve().parent / "results"
MEASURED_PROMPTS = ("a red disc bounces over blue stripes", "a yellow square slides left over green dots")
CALIBRATION_PROMPTS = (
    "a white ring rises over brown checks",
    "a green triangle falls over plain grey",
    "a purple disc slides right over pink stripes",
    "a blue square bounces over grey dots",
)
UNMEASURED_CLIP = 500  # which maps of bits are measured on
PROBED = (0.1, 0.4, 0.65, 0.9)  # of the steps: one in each quarter, for block outputs


@dataclass(frozen=True)
class Row:
    """One line of the table: a method of `vdit_ext.quant.methods`, bits, and settings other than its own.

    measured: the bit map is measured, on a clip of its own, and has the released one's average; that samples
    some eighty clips, so such a row runs only where `--only` names it.
    """

    method: str
    bits: str
    settings: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    measured: bool = False

    @property
    def name(self) -> str:
        return self.label or self.method


@dataclass(frozen=True)
class Toy:
    """A toy model behind one interface.

    sample(i, on_step): clip i, uint8 [f, h, w, 3], calling on_step(step, steps) before each step. The first
    `num_clips` are for measuring, the runs of the calibration are others.
    """

    name: str
    model: torch.nn.Module
    steps: int
    sample: Callable[[int, Callable[[int, int], None]], np.ndarray]
    runs: list[Callable[[], Any]]


# Baselines first. "same map" is rounding alone under ViDiT-Q's bit map.
_ROUNDED = (
    *(Row("rtn", bits) for bits in ("w8a8", "w6a6", "w4a8", "w4a6", "w4a4", "w3a8", "w3a6", "w3a4")),
    *(Row("rtn", bits, {"clip": "mse"}, "rtn, clipped") for bits in ("w4a8", "w3a8")),
)
_SMOOTHED = tuple(Row("smoothquant", bits) for bits in ("w8a8", "w4a8", "w4a4", "w3a8"))
_VIDIT_Q = (
    *(Row("vidit_q", bits) for bits in ("w8a8", "w6a6", "w4a8", "w4a8-mp")),
    Row("vidit_q", "w8a8", {"rotation": "block"}, "vidit_q, rotated"),
    Row("vidit_q", "w4a8-mp", {"alpha": None, "rotation": "none"}, "rtn, same map"),
    Row("vidit_q", "w4a8", {"clip": "mse"}, "vidit_q, clipped"),
    Row("vidit_q", "w4a8-mp", {}, "measured map", measured=True),
)
_LRQ_DIT = tuple(Row("lrq_dit", bits) for bits in ("w4a8", "w4a6", "w4a4", "w3a8", "w3a6", "w3a4"))


# Without the modulation linears, which the other methods leave alone too.
def _vq(**calibration: int) -> tuple[Row, ...]:
    return tuple(
        Row(method, bits, {"modulation": False} | (calibration if method == "vq4dit" else {}))
        for bits in ("w3", "w2")
        for method in ("kmeans_vq", "vq4dit")
    )


_SCALAR = (*_ROUNDED, *_SMOOTHED, *_VIDIT_Q, *_LRQ_DIT)
# A quarter of the updates on the video model, whose blocks take eight times as long: half an hour otherwise.
ROWS = {"toy_t2v": (*_SCALAR, *_vq(steps=100, codebook_steps=100)), "toy_dit": (*_SCALAR, *_vq())}


def toy_t2v() -> Toy:
    """The text-to-video model; calibrated on other prompts and other noise than it is measured on."""
    pipe = toyworld.load_pipeline()
    steps = toyworld.pipeline.DEFAULT_STEPS

    def sample(i: int, on_step: Callable[[int, int], None]) -> np.ndarray:
        prompt = MEASURED_PROMPTS[i % len(MEASURED_PROMPTS)]
        return pipe(
            prompt, seed=i // len(MEASURED_PROMPTS), callback=measure.before_each(on_step, steps)
        ).frames

    runs = [functools.partial(pipe, prompt, seed=100 + i) for i, prompt in enumerate(CALIBRATION_PROMPTS)]
    return Toy("toy_t2v", pipe.transformer, steps, sample, runs)


def toy_dit() -> Toy:
    """The class-conditional image model: a clip is one picture of each of eight classes."""
    pipe = toyworld.load_dit()
    steps = dit.DEFAULT_STEPS
    classes = list(range(0, len(dit.CLASSES), len(dit.CLASSES) // 8))[:8]

    def sample(i: int, on_step: Callable[[int, int], None]) -> np.ndarray:
        latents = pipe(classes, seed=1000 * i, callback=measure.before_each(on_step, steps))
        return dit.decode(latents).round().clamp(0, 255).to(torch.uint8).numpy()

    others = [label for label in range(len(dit.CLASSES)) if label not in classes][:8]
    runs = [functools.partial(pipe, others, seed=50_000 + 1000 * i) for i in range(2)]
    return Toy("toy_dit", pipe.transformer, steps, sample, runs)


TOYS: dict[str, Callable[[], Toy]] = {"toy_t2v": toy_t2v, "toy_dit": toy_dit}


def quantize(toy: Toy, row: Row, calibration: Any) -> Any:
    """The quantized model of one line."""
    if not row.measured:
        return methods.run(row.method, toy.model, calibration, bits=row.bits, **row.settings)

    def sample(on_step: Callable[[int, int], None]) -> torch.Tensor:
        return torch.from_numpy(toy.sample(UNMEASURED_CLIP, on_step)).float()

    layers = list(linear_layers(toy.model))
    budget = vidit_q.average_bits(layers, vidit_q.released_map(layers))
    return mixed_precision(toy.model, calibration, sample, average_bits=budget, **row.settings)


def measure_row(toy: Toy, row: Row, calibration: Any, probe: measure.BlockProbe, references: list) -> dict:
    """All figures of one line."""
    start = time.perf_counter()
    quantized = quantize(toy, row, calibration)
    seconds = time.perf_counter() - start
    weights = list(measure.weight_snrs(toy.model, quantized).values())
    with apply(toy.model, quantized) as applied:
        blocks = list(probe.snrs(applied).values())
        start = time.perf_counter()
        clips = [toy.sample(i, applied.set_step) for i in range(len(references))]
        sampling = (time.perf_counter() - start) / len(clips)
    found = [quality(clip, reference).psnr for clip, reference in zip(clips, references, strict=True)]
    return {
        "model": toy.name,
        "method": row.name,
        "bits": row.bits,
        "settings": row.settings,
        "average_weight_bits": quantized.report.get("average_weight_bits"),
        "weight_snr_db": measure.mean_db(weights),
        "block_snr_db": measure.mean_db(blocks),
        "psnr_db": statistics.fmean(found),
        "psnr_db_each": found,
        "mib": quantized.nbytes / 2**20,
        "seconds": seconds,
        "seconds_a_clip": sampling,
    }


def full_precision(toy: Toy, clips: int) -> tuple[list[np.ndarray], dict]:
    """The references, and the line of the model itself in bf16 size."""
    ignore = lambda step, steps: None  # noqa: E731
    start = time.perf_counter()
    references = [toy.sample(i, ignore) for i in range(clips)]
    weights = sum(info.in_features * info.out_features for info in linear_layers(toy.model))
    row = {"model": toy.name, "method": "full precision", "bits": "bf16 size", "mib": weights * 2 / 2**20}
    return references, row | {"seconds_a_clip": (time.perf_counter() - start) / clips}


def run(names: list[str], only: set[str], bits: set[str], clips: int, progress: Callable[[str], None]) -> dict:
    """The table as data; `only` and `bits` choose rows, all where they are empty."""
    rows, calibrations = [], {}
    for name in names:
        toy = TOYS[name]()
        references, first = full_precision(toy, clips)
        start = time.perf_counter()
        calibration = calibrate(toy.model, toy.runs)
        calibrations[name] = time.perf_counter() - start
        probed = [int(share * toy.steps) for share in PROBED]
        probe = measure.BlockProbe(toy.model, functools.partial(toy.sample, 0), probed)
        rows.append(first)
        for row in ROWS[name]:
            named = {row.name} if row.measured else {row.name, row.method}
            wanted = named & only if only else not row.measured
            if wanted and (not bits or row.bits in bits):
                progress(f"{name}: {row.name} {row.bits}")
                rows.append(measure_row(toy, row, calibration, probe, references))
    return {
        "date": datetime.date.today().isoformat(),
        **facts(),
        "clips": clips,
        "calibration_seconds": calibrations,
        "rows": rows,
    }


def table(result: dict) -> list[str]:
    """The result as Markdown."""
    lines = [
        "# Quantized toy models",
        "",
        f"{result['machine']['cpu']}, {result['machine']['threads']} threads, "
        f"torch {result['versions']['torch']}. Toy results, {result['clips']} clips each.",
        "",
    ]
    for model, seconds in result["calibration_seconds"].items():
        lines += [
            f"## {model} (calibration {seconds:.0f} s)",
            "",
            "| method | bits | weight SNR | block SNR | PSNR | worst, dB | MiB | s to quantize | s a clip |",
            "|---|---|--:|--:|--:|--:|--:|--:|--:|",
        ]
        for row in result["rows"]:
            if row["model"] == model:
                row = row | {"worst": min(row.get("psnr_db_each", [None]))}
                keys = ("weight_snr_db", "block_snr_db", "psnr_db", "worst", "mib", "seconds", "seconds_a_clip")
                cells = [_cell(row.get(key), 2 if key == "mib" else 1) for key in keys]
                lines.append(f"| {row['method']} | {row['bits']} | {' | '.join(cells)} |")
        lines.append("")
    return lines


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else "inf" if math.isinf(value) else f"{value:.{digits}f}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(TOYS), help="toy_t2v, toy_dit or both (default)")
    parser.add_argument("--only", default="", help="methods, separated by commas; all by default")
    parser.add_argument("--bits", default="", help="as in w4a8, separated by commas; all by default")
    parser.add_argument("--clips", type=int, default=2, help="measured clips of each model (default: 2)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--write", action="store_true", help="also write table and JSON under bench/results")
    parser.add_argument("--name", default="toy-quant", help="end of the files' name (default: toy-quant)")
    options = parser.parse_args(argv)
    names = options.models.split(",")
    if unknown := [name for name in names if name not in TOYS]:
        parser.error(f"--models must be among {', '.join(TOYS)}, got {unknown[0]}")
    if options.clips < 1:
        parser.error(f"--clips must be at least 1, got {options.clips}")
    only, bits = (set(filter(None, text.split(","))) for text in (options.only, options.bits))
    result = run(names, only, bits, options.clips, lambda what: print(what, file=sys.stderr))
    text, data = "\n".join(table(result)), json.dumps(result, indent=1)
    print(data if options.json else text)
    if options.write:
        stem = RESULTS / f"{result['date']}_{slug(result)}_{options.name}"
        stem.with_suffix(".md").write_text(text)
        stem.with_suffix(".json").write_text(data + "\n")


if __name__ == "__main__":
    main()
