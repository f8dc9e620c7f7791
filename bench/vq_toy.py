#!/usr/bin/env python
"""Weight-only quantization to 2 and 3 bits on the toy image model: VQ4DiT beside what its parts reach alone.

    python bench/vq_toy.py [--bits w2,w3] [--rows kmeans,vq4dit] [--modulation] [--pictures 24] [--write]

Rows: rounding of each output channel to the nearest of 4 or 8 even steps, over the whole range or over the
share of it with the least squared error; plain k-means; codebooks and biases calibrated under k-means'
assignments; calibrated assignments (VQ4DiT). Figures as in `quant_toy.py`; "colour" is the share of pictures in
which the check of `vdit_ext.toyworld.check_dit` sees the colour asked for. These are toy results.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from machine import facts, slug

from vdit_ext import toyworld
from vdit_ext.quant import InputTransform, QuantizedModel, QuantLayer, apply, measure, vq4dit
from vdit_ext.quant.uniform import round_weight
from vdit_ext.quant.weights import DenseWeight
from vdit_ext.toyworld import check_dit, dit
from vdit_ext.video import quality

RESULTS = Path(__file__).resolve().parent / "results"
SEED = 1000
STEPS = dit.DEFAULT_STEPS
# Calibration: a class and no class a run, from noise that is not measured on.
RUNS = tuple((label, 50_000 + label) for label in (3, 8, 12, 20, 5, 16, 0, 23))
CALIBRATED = {"steps": 400, "codebook_steps": 200}
CODEBOOKS = {"candidates": 1, "steps": 0, "codebook_steps": 600}  # as many updates


def round_to_nearest(model, calibration, *, bits: str, layers: list, clip: str) -> QuantizedModel:
    """Each output channel on an even grid of its own; activations as they are."""
    found, size = {}, 0
    for info in layers:
        linear, width = model.get_submodule(info.name), int(bits[1])
        values = round_weight(linear.weight.detach(), width, clip=clip).dequantize()
        bias = None if linear.bias is None else linear.bias.detach()
        found[info.name] = QuantLayer(DenseWeight(values), bias, InputTransform(bits=0))
        # Codes, and for each row a scale in 16 bits, a zero point in 8, a bias in 32.
        size += values.numel() * width // 8 + info.out_features * (3 + 4 * (bias is not None))
    return QuantizedModel("rtn", found, report={"size": {"quantized": {"bytes": size}}})


ROWS: dict[str, Any] = {
    "rtn": functools.partial(round_to_nearest, clip="minmax"),
    "rtn, clipped": functools.partial(round_to_nearest, clip="mse"),
    "kmeans": vq4dit.quantize_kmeans,
    "kmeans, row scale": functools.partial(vq4dit.quantize_kmeans, row_scale=True),
    "codebooks only": functools.partial(vq4dit.quantize, **CODEBOOKS),
    "vq4dit": functools.partial(vq4dit.quantize, **CALIBRATED),
    "vq4dit, n = 3": functools.partial(vq4dit.quantize, **CALIBRATED, candidates=3),
    "vq4dit, row scale": functools.partial(vq4dit.quantize, **CALIBRATED, row_scale=True),
    "released": functools.partial(vq4dit.quantize, **CALIBRATED, **vq4dit.RELEASED),
}
DEFAULT_ROWS = ("rtn", "rtn, clipped", "kmeans", "codebooks only", "vq4dit")


def probe_of(pipe: toyworld.ToyDiT) -> measure.BlockProbe:
    """Every fourth step of four pictures that neither calibration nor PSNR has seen."""

    def sample(on_step) -> None:
        on_step(0, STEPS)
        told = lambda done, total: on_step(min(done, total - 1), total)  # noqa: E731
        pipe([1, 9, 14, 22], seed=70_000, num_inference_steps=STEPS, callback=told)

    return measure.BlockProbe(pipe.transformer, sample, range(1, STEPS, 4))


def measure_row(pipe, quantized: QuantizedModel, probe, pictures: int, full) -> dict:
    """All figures of one quantized model."""
    weights = measure.weight_snrs(pipe.transformer, quantized).values()
    with apply(pipe.transformer, quantized) as applied:
        blocks = probe.snrs(applied).values()
        checked, frames = check_dit.evaluate(pipe, pictures, SEED, num_inference_steps=STEPS)
    psnr = [quality(came[None], wanted[None]).psnr for came, wanted in zip(frames, full, strict=True)]
    return {
        "weight_snr_db": measure.mean_db(weights),
        "block_snr_db": measure.mean_db(blocks),
        "psnr_db": measure.mean_db(psnr),
        "rates": checked["rates"],
        "kib": quantized.report["size"]["quantized"]["bytes"] / 1024,
    }, frames


def run(bits: list[str], rows: list[str], modulation: bool, pictures: int) -> tuple[dict, dict]:
    """The table as data, and the pictures of each row."""
    pipe = toyworld.load_dit()
    model = pipe.transformer
    layers = vq4dit.linears_of(model, modulation=modulation)
    calibration = [
        functools.partial(pipe, [label], seed=seed, num_inference_steps=STEPS) for label, seed in RUNS
    ]
    checked, full = check_dit.evaluate(pipe, pictures, SEED, num_inference_steps=STEPS)
    weights = sum(info.in_features * info.out_features for info in layers)
    found = [{"method": "full precision", "rates": checked["rates"], "kib": 4 * weights / 1024}]
    probe, sheets = probe_of(pipe), {"full precision": full}
    for width in bits:
        for name in rows:
            start = time.perf_counter()
            quantized = ROWS[name](model, calibration, bits=width, layers=layers)
            row = {"method": name, "bits": width, "seconds": time.perf_counter() - start}
            figures, sheets[f"{name} {width}"] = measure_row(pipe, quantized, probe, pictures, full)
            found.append(row | figures | {"blocks": quantized.report.get("blocks")})
            print(line(found[-1]), file=sys.stderr, flush=True)
    result = {
        "date": datetime.date.today().isoformat(),
        **facts(),
        "weights_sha256": dit.read_card(dit.WEIGHTS, dit.NAME)["sha256"],
        "modulation": modulation,
        "pictures": pictures,
        "rows": found,
    }
    return result, sheets


def line(row: dict) -> str:
    """A row of the table."""
    cells = [f"{row[key]:.1f}" if key in row else "-" for key in ("weight_snr_db", "block_snr_db", "psnr_db")]
    cells += [f"{row['rates']['colour']:.0%}", f"{row['rates']['shape']:.0%}", f"{row['kib']:.0f}"]
    cells.append(f"{row['seconds']:.0f}" if "seconds" in row else "-")
    return f"| {row['method']} | {row.get('bits', '-')} | {' | '.join(cells)} |"


def table(result: dict) -> str:
    """The result as Markdown."""
    which = "with" if result["modulation"] else "without"
    lines = [
        "# Weights of 2 and 3 bits on the toy image model",
        "",
        f"{result['machine']['cpu']}, {result['machine']['threads']} threads, "
        f"torch {result['versions']['torch']}. Toy results: {result['pictures']} pictures, linears {which} "
        "adaLN modulation, activations in fp32.",
        "",
        "| method | bits | weight SNR dB | block SNR dB | PSNR dB | colour | shape | KiB | s to quantize |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
        *map(line, result["rows"]),
    ]
    return "\n".join(lines) + "\n"


def labelled_sheet(sheets: dict[str, np.ndarray], columns: int = 12):
    """A PIL image with the first pictures of each row behind the row's name."""
    from PIL import Image, ImageDraw, ImageFont

    pixels = check_dit.sheet(np.concatenate([frames[:columns] for frames in sheets.values()]), columns)
    font = ImageFont.load_default(14)
    width = 8 + max(int(font.getlength(name)) for name in sheets)
    image = Image.new("RGB", (width + pixels.shape[1], pixels.shape[0]), "white")
    image.paste(Image.fromarray(pixels), (width, 0))
    draw, height = ImageDraw.Draw(image), pixels.shape[0] / len(sheets)
    for i, name in enumerate(sheets):
        draw.text((width - 6, (i + 0.5) * height), name, fill="black", font=font, anchor="rm")
    return image


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", default="w3,w2", help="w2, w3 or both (default)")
    parser.add_argument(
        "--rows", default=";".join(DEFAULT_ROWS), help=f"separated by semicolons: {'; '.join(ROWS)}"
    )
    parser.add_argument("--modulation", action="store_true", help="quantize the adaLN linears too")
    parser.add_argument("--pictures", type=int, default=24, help="measured pictures (default: 24)")
    parser.add_argument(
        "--write", action="store_true", help="write table, JSON and a sheet under bench/results"
    )
    options = parser.parse_args(argv)
    rows = options.rows.split(";")
    if unknown := [name for name in rows if name not in ROWS]:
        parser.error(f"--rows must be among {'; '.join(ROWS)}, got {unknown[0]}")
    result, sheets = run(options.bits.split(","), rows, options.modulation, options.pictures)
    print(table(result))
    if options.write:
        part = "_modulation" if options.modulation else ""
        stem = RESULTS / f"{result['date']}_{slug(result)}_toy-vq{part}"
        stem.with_suffix(".md").write_text(table(result))
        stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        labelled_sheet(sheets).save(stem.with_suffix(".png"))


if __name__ == "__main__":
    main()
