"""Rows for the planner ops: what several test modules draw them with, and where they put them."""

from __future__ import annotations

import torch

from vdit_ext.testing import generator

from .attention import as_it_lies

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
FLOAT_IDS = ["fp32", "fp16", "bf16"]


def on(backend, *tensors):
    """The tensors where the backend takes them, as the views that they are."""
    return [as_it_lies(t, backend.device) for t in tensors]


def rows(*shape, seed=0, dtype=torch.float32, layout="bshd"):
    """Normal numbers ``[B, H, S, D]``, by default a view of ``[B, S, H, D]``."""
    b, h, s, d = shape
    if layout == "bshd":
        return torch.randn(b, s, h, d, generator=generator(seed)).to(dtype).transpose(1, 2)
    return torch.randn(shape, generator=generator(seed)).to(dtype)
