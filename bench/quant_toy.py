#!/usr/bin/env python
"""Every quantization method at each of its bit widths on the trained toy models, beside its baselines.

    python bench/quant_toy.py [--models toy_t2v,toy_dit] [--only vidit_q,rtn] [--clips 2] [--write]

Prints, for each model and row: SNR of the weights (mask and rotation undone), SNR of whole blocks fed with the
full-precision model's inputs, PSNR of what is sampled against the full-precision run from the same noise, size of the
quantized layers, and seconds to quantize (without the calibration, which all methods of a model share, and which the
head names). These are toy results. ``--write`` puts them under bench/results.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from machine import cpu_name, versions  # noqa: E402
from report import slug  # noqa: E402

from vdit_ext import toyworld  # noqa: E402
from vdit_ext.quant import apply, calibrate, linear_layers, measure, methods  # noqa: E402
from vdit_ext.video import quality  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"
PROMPTS = (
    "a red disc bounces over blue stripes",
    "a green square moves left over yellow dots",
    "a blue triangle moves right over plain white",
    "a yellow ring moves up over purple checks",
)
PROBED = (0.1, 0.4, 0.65, 0.9)  # of the steps: one in each quarter, for block outputs


@dataclass(frozen=True)
class Row:
    """One line of the table: a method's name in `vdit_ext.quant.methods`, bits, and settings other than its own."""

    method: str
    bits: str
    settings: dict[str, Any] = field(default_factory=dict)
    label: str = ""

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


def before_each(on_step: Callable[[int, int], None], steps: int) -> Callable[[int, int], None]:
    """A callback for after each step, counted from 1, that calls `on_step` before each step, counted from 0."""
    on_step(0, steps)
    return lambda done, total: on_step(done, total) if done < total else None
