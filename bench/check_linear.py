"""The linear family's cases for check_cuda.py: CUDA kernels against the CPU kernels and the definitions."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import check_attention
import torch
from cases import linear as cases
from check_attention import same, short_name

from vdit_ext.ops import linear as defs
from vdit_ext.testing import TOLERANCE, assert_close, generator

OPS = (*defs.OPS, "linear_graph")
Named = tuple[str, Callable[[], None]]


class Backend(check_attention.Backend):
    """Where the ops under test run, and what they are compared with."""

    definitions = defs


def named_cases(op: str, large: bool, backend: Backend) -> Iterator[Named]:
    """Name and check of every case of an op; a check raises AssertionError with what is wrong."""
    if op == "quantize_rows":
        yield from quantize_rows_cases(backend)
    elif op.startswith("expand"):
        yield from expand_cases(op, backend)
    elif op == "linear_graph":
        if backend.name == "cuda":
            yield "quantize and multiply, captured once", lambda: check_graph(backend)
    else:
        yield from product_cases(op, backend)


def quantize_rows_cases(backend: Backend) -> Iterator[Named]:
    for case in cases.every_rows:
        for dtype in backend.dtypes():
            yield f"{case} {short_name(dtype)}", lambda c=case, t=dtype: check_rows(backend, c, t)
    yield "a row that is not finite", lambda: check_not_finite(backend)


def check_rows(backend: Backend, case: cases.RowsCase, dtype: torch.dtype) -> None:
    """Codes within half a step of the exact value, which the definition gives in fp64."""
    inputs = cases.make_rows(case, dtype)
    codes, scale, total = (t.cpu() for t in backend.run("quantize_rows", inputs.x, **inputs.kwargs))
    same(total, codes.sum(-1, dtype=torch.int32), "sum")
    exact = defs.transform_rows_naive(inputs.x, **inputs.transform)
    q_max = 2 ** (case.bits - 1) - 1
    step = exact.abs().amax(-1, keepdim=True) / q_max
    noise = 5e-5 if case.rows == "large_mean" else 3e-6
    assert_close(scale, step[..., 0].float(), tolerance=noise, what="scale")
    gap = (codes.double() * step - exact).abs() - step * (0.5 + noise * q_max)
    assert float(gap.max()) <= 0, f"codes are {float(gap.max()):.3e} beyond half a step"


def check_not_finite(backend: Backend) -> None:
    x = torch.randn(3, 64, generator=generator(0))
    x[1, 5] = torch.inf
    if backend.name != "cuda":
        return  # refused there, which the tests check
    codes, scale, _ = backend.run("quantize_rows", x)
    assert scale[1].isnan() and not codes[1].any(), "codes are not 0 or the scale is not NaN"


def formats_of(op: str) -> list[str]:
    return [name for name, of in cases.OPS.items() if of == op]


def product_cases(op: str, backend: Backend) -> Iterator[Named]:
    for case in cases.every + cases.extreme:
        for name in formats_of(op):
            yield f"{case} {name} sums", lambda c=case, f=name: check_sums(backend, c, f)
    for case in cases.epilogues:
        for name in formats_of(op):
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                label = f"{case} {name} {short_name(dtype)}"
                yield label, lambda c=case, f=name, t=dtype: check_product(backend, c, f, t)
    if backend.name == "cuda":
        for m, k, n in ((1, 5120, 5120), (300, 5120, 1536), (4096, 1536, 5120), (1000, 13824, 5120)):
            case = cases.LinearCase(f"{m}x{k}x{n}", (m,), k, n)
            for name in formats_of(op):
                yield f"{case} {name} sums", lambda c=case, f=name: check_sums(backend, c, f)


def check_sums(backend: Backend, case: cases.LinearCase, format: str) -> None:
    """Both paths to the bit: the sums are integers."""
    inputs = cases.make_linear(case, format).raw()
    expected = backend.expected(inputs.op, *inputs.args, **inputs.kwargs)
    for path in [{}] if format == "int8" else [{"path": "fused"}, {"path": "expand"}, {"path": "auto"}]:
        same(backend.run(inputs.op, *inputs.args, **inputs.kwargs, **path), expected, f"sums {path}")


def check_product(backend: Backend, case: cases.LinearCase, format: str, dtype: torch.dtype) -> None:
    inputs = cases.make_linear(case, format, dtype)
    out = backend.run(inputs.op, *inputs.args, **inputs.kwargs)
    expected = inputs.naive(*inputs.args, **inputs.kwargs)
    assert_close(out, expected, tolerance=TOLERANCE[dtype], what="out")


def expand_cases(op: str, backend: Backend) -> Iterator[Named]:
    for name in ("int4", "nibble_planes") if op == "expand_w4" else ("log4", "log3"):
        for case in (cases.corner[4], cases.corner[5], cases.blocks[1]):
            yield f"{case} {name}", lambda c=case, f=name: check_expand(backend, op, c, f)


def check_expand(backend: Backend, op: str, case: cases.LinearCase, format: str) -> None:
    weights = cases.make_weight_codes(case, format, generator(0))
    if op == "expand_w4":
        args, kwargs = (weights[0], case.n, case.k), {"weight_low": weights[1]} if len(weights) > 1 else {}
    else:
        args, kwargs = (*weights, case.k), {}
    same(backend.run(op, *args, **kwargs), backend.expected(op, *args, **kwargs), op)


def check_graph(backend: Backend) -> None:
    """No op waits for the device, so a layer can be captured and replayed on other rows."""
    x = torch.randn(200, 256, generator=generator(0)).cuda().bfloat16()
    weight, scale, _ = torch.ops.vdit.quantize_rows(torch.randn(96, 256, generator=generator(1)).cuda())

    def layer():
        codes, x_scale, _ = torch.ops.vdit.quantize_rows(x, prologue="layer_norm", hadamard=128)
        return torch.ops.vdit.w8a8_linear(codes, x_scale, weight, scale)

    layer()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer()
    x.copy_(torch.randn(200, 256, generator=generator(2)).cuda())
    graph.replay()
    same(captured, layer(), "replayed layer")
