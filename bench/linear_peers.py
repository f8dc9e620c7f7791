"""What the quantized linears are compared with: torch's own products, and other people's where installed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from attention_peers import needed
from harness import NotHere
from torch import Tensor

Call = Callable[[], Tensor]


def bf16_linear(x: Tensor, weight: Tensor) -> Call:
    """The layer that quantization replaces: oneDNN on a CPU, cuBLAS on a GPU."""
    return lambda: torch.nn.functional.linear(x, weight)


def int_mm(codes: Tensor, weight_codes: Tensor) -> Call:
    """torch's int8 product to int32, of codes that are there already, without any epilogue."""
    if codes.device.type == "cuda" and codes.shape[0] <= 16:
        raise NotHere("torch._int_mm takes more than 16 rows on CUDA")
    return lambda: torch._int_mm(codes, weight_codes.T)


def scaled_mm(x: Tensor, weight: Tensor) -> Call:
    """torch's fp8 product with a scale a row and a scale a column, of numbers that are in fp8 already."""
    if x.device.type != "cuda":
        raise NotHere("torch._scaled_mm by rows is for CUDA")
    largest = torch.finfo(torch.float8_e4m3fn).max
    scales = [t.abs().amax(1, keepdim=True).float() / largest for t in (x, weight)]
    a, b = (
        (t / s).clamp(-largest, largest).to(torch.float8_e4m3fn)
        for t, s in zip((x, weight), scales, strict=True)
    )
    return lambda: torch._scaled_mm(
        a, b.T, scale_a=scales[0], scale_b=scales[1].T, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def vllm_int8(codes: Tensor, x_scale: Tensor, weight_codes: Tensor, weight_scale: Tensor) -> Call:
    """vLLM's CUTLASS W8A8 with scales in its epilogue, of codes that are there already."""
    multiply = needed("vllm._custom_ops", "cutlass_scaled_mm", "vllm")
    scales = x_scale[:, None], weight_scale[:, None]
    return lambda: multiply(codes, weight_codes.T, *scales, torch.bfloat16)
