#!/usr/bin/env python
"""How near seeded weights and layers stay when quantized: ``python bench/quant_snr.py``.

Three tables, all in dB and all from seeds, so that every run prints the same: matrices of four distributions
by every quantizer here and in the package; the output of a W4A8 layer with outlier channels, by what was done
to its input; and the floors that the specifications of ViDiT-Q, LRQ-DiT and VQ4DiT set, each with what was
reached. Ends with 1 where a floor is missed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT / "tests", ROOT / "bench", ROOT / "python"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import torch  # noqa: E402
from cases.weights import (  # noqa: E402
    COLUMNS,
    KINDS,
    lloyd_max,
    normal_float4,
    snr,
    uniform_min_max,
    uniform_mse_clip,
    weight_rows,
)
from torch import Tensor  # noqa: E402

from vdit_ext import ops  # noqa: E402
from vdit_ext.quant import InputTransform, twin_log  # noqa: E402
from vdit_ext.quant.hadamard import hadamard_block, random_signs  # noqa: E402
from vdit_ext.quant.kmeans_vq import FORMATS, kmeans_vq, split_words  # noqa: E402
from vdit_ext.quant.transform import channel_mask  # noqa: E402
from vdit_ext.quant.uniform import round_weight  # noqa: E402


@dataclass(frozen=True)
class Method:
    """A quantizer: its name, the bits it has, and the dequantized result of ``quantize(weight, bits)``."""

    name: str
    bits: tuple[int, ...]
    quantize: Callable[[Tensor, int], Tensor]


def twin(mode: str, grid: str = "small", int8: bool = False) -> Callable[[Tensor, int], Tensor]:
    def quantize(weight: Tensor, bits: int) -> Tensor:
        form = twin_log.fit(weight, bits, mode, grid)
        return form.dequantize_int8() if int8 else form.dequantize()

    return quantize


def vector(weight: Tensor, bits: int, int8: bool = False) -> Tensor:
    """VQ4DiT's starting point: k-means over words of a row, one codebook for the matrix."""
    form = FORMATS[f"w{bits}"]
    found = kmeans_vq(split_words(weight, form.dim), form.codewords, iterations=30)
    book = found.codebook
    if int8:
        scale = book.abs().max() / 127
        book = (book / scale).round() * scale
    return book[found.indices].view_as(weight)


METHODS = (
    Method("uniform, min-max", (2, 3, 4), uniform_min_max),
    Method("uniform, least squares", (2, 3, 4), uniform_mse_clip),
    Method("NF4, a scale a row", (4,), normal_float4),
    Method("NF4, a scale for 64 (more bits)", (4,), lambda weight, bits: normal_float4(weight, bits, 64)),
    Method("twin-log, paper", (3, 4), twin("paper")),
    Method("twin-log, released (more bits)", (3, 4), twin("released")),
    Method("twin-log, corrected", (3, 4), twin("corrected")),
    Method("twin-log, corrected, int8 tables", (3, 4), twin("corrected", int8=True)),
    Method("twin-log, corrected, full grid", (3, 4), twin("corrected", "full")),
    Method("VQ, k-means", (2, 3), vector),
    Method("VQ, k-means, int8 codebook", (2, 3), lambda weight, bits: vector(weight, bits, int8=True)),
    Method("Lloyd-Max levels for every row (no format)", (2, 3, 4), lloyd_max),
)

Figures = dict[tuple[str, int, str], float]  # by method, bits and kind of weights


def weight_figures(rows: int) -> Figures:
    found = {}
    for kind in KINDS:
        weight = weight_rows(kind, rows)
        for method in METHODS:
            for bits in method.bits:
                found[method.name, bits, kind] = snr(weight, method.quantize(weight, bits))
    return found


# ViDiT-Q's synthetic layer: six channels of the input are 60 times larger.
TOKENS, OUTLIERS, FACTOR, SEEDS = 256, 6, 60.0, 5
TREATMENTS = ("none", "mask", "rotation", "mask and rotation")


def layer_snr(treatment: str, seed: int) -> float:
    """Output SNR of one W4A8 layer [1152, 1152], weights uniform by row and inputs by token."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, COLUMNS, generator=generator)
    x[:, torch.randperm(COLUMNS, generator=generator)[:OUTLIERS]] *= FACTOR
    weight = 0.03 * torch.randn(COLUMNS, COLUMNS, generator=generator)
    mask = channel_mask(x.abs().amax(0), [weight], 0.5) if "mask" in treatment else None
    rotated = "rotation" in treatment
    block = hadamard_block(COLUMNS) if rotated else 0
    transform = InputTransform(mask, block, random_signs(COLUMNS, seed) if rotated else None)
    codes, scale, _ = ops.quantize_rows(transform.rows(x))
    got = codes * scale[:, None] @ round_weight(transform.weight(weight), 4).dequantize().T
    return snr(x.double() @ weight.double().T, got)


def layer_figures() -> dict[str, float]:
    return {name: sum(layer_snr(name, seed) for seed in range(SEEDS)) / SEEDS for name in TREATMENTS}


@dataclass(frozen=True)
class Floor:
    """What a specification asks for: ``got`` must be at least ``least``."""

    system: str
    what: str
    got: float
    least: float

    @property
    def holds(self) -> bool:
        return self.got >= self.least


def floors(weights: Figures, layer: dict[str, float]) -> list[Floor]:
    return [*vidit_q_floors(layer), *lrq_dit_floors(weights), *vq4dit_floors(weights)]


def vidit_q_floors(layer: dict[str, float]) -> list[Floor]:
    gain = layer["mask and rotation"] - max(layer["mask"], layer["rotation"])
    return [Floor("ViDiT-Q", "W4A8, mask and rotation over the better one", gain, 6.0)]


def lrq_dit_floors(weights: Figures) -> list[Floor]:
    ours, minmax, clipped = "twin-log, corrected", "uniform, min-max", "uniform, least squares"

    def over(other: str, bits: int, kind: str) -> float:
        return weights[ours, bits, kind] - weights[other, bits, kind]

    found = []
    for bits, least in ((3, 14.2), (4, 19.9)):
        for kind in ("gauss .03", "gauss .3"):
            found.append((f"{bits} bits, {kind}", weights[ours, bits, kind], least))
            found.append((f"{bits} bits, {kind}, over min-max", over(minmax, bits, kind), 2.0))
        found.append((f"{bits} bits, student t4, over min-max", over(minmax, bits, "student t4"), 5.0))
        found.append(
            (f"{bits} bits, any, over least squares", min(over(clipped, bits, k) for k in KINDS), -0.1)
        )
        loss = max(over(f"{ours}, int8 tables", bits, kind) for kind in KINDS)
        found.append((f"{bits} bits, any, gain of int8 tables", -loss, -0.1))
    paper = weights[minmax, 3, "gauss .03"] - weights["twin-log, paper", 3, "gauss .03"]
    found.append(("3 bits, gauss .03, min-max over the paper's formula", paper, 0.0))
    return [Floor("LRQ-DiT", *each) for each in found]


def vq4dit_floors(weights: Figures) -> list[Floor]:
    name, kind, found = "VQ, k-means", "gauss .03", []
    for bits, least in ((2, 10.0), (3, 15.0)):
        found.append((f"{bits} bits, {kind}", weights[name, bits, kind], least))
        gains = [weights[f"{name}, int8 codebook", bits, k] - weights[name, bits, k] for k in KINDS]
        found.append((f"{bits} bits, any, gain of an int8 codebook", min(gains), -0.2))
    gain = weights[name, 2, kind] - weights["uniform, least squares", 2, kind]
    found.append((f"2 bits, {kind}, over least squares", gain, 1.5))
    return [Floor("VQ4DiT", *each) for each in found]


def markdown(rows: int, weights: Figures, layer: dict[str, float], checks: list[Floor]) -> str:
    lines = [
        "# Synthetic SNR",
        "",
        f"`python bench/quant_snr.py --rows {rows}`: seeded, no timing, the same on every machine but for the",
        "last digit. Gaussian weights have the standard deviation in their name, Student t4 and Laplace .03.",
        "",
        f"SNR in dB of matrices [{rows}, {COLUMNS}]:",
        "",
        "| quantizer | bits | " + " | ".join(KINDS) + " |",
        "|---|---|" + "---|" * len(KINDS),
    ]
    for bits in (2, 3, 4):
        for method in METHODS:
            if bits in method.bits:
                cells = [f"{weights[method.name, bits, kind]:.1f}" for kind in KINDS]
                lines.append(f"| {method.name} | {bits} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Output of a W4A8 layer [{COLUMNS}, {COLUMNS}], {TOKENS} tokens, {OUTLIERS} input channels",
        f"{FACTOR:.0f} times larger, mean of {SEEDS} seeds, rotation in blocks of {hadamard_block(COLUMNS)}:",
        "",
        "| " + " | ".join(TREATMENTS) + " |",
        "|---" * len(TREATMENTS) + "|",
        "| " + " | ".join(f"{layer[name]:.1f}" for name in TREATMENTS) + " |",
        "",
        "Floors of the specifications:",
        "",
        "| system | what | dB | at least | |",
        "|---|---|---|---|---|",
    ]
    for check in checks:
        verdict = "ok" if check.holds else "MISSED"
        lines.append(f"| {check.system} | {check.what} | {check.got:.2f} | {check.least:.1f} | {verdict} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=128, help="rows of the weight matrices")
    parser.add_argument("--out", type=Path, help="also write the tables to this Markdown file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    weights, layer = weight_figures(arguments.rows), layer_figures()
    checks = floors(weights, layer)
    text = markdown(arguments.rows, weights, layer, checks)
    print(text, end="")
    if arguments.out is not None:
        arguments.out.write_text(text)
    return 0 if all(check.holds for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
