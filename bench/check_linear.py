"""The linear family's cases for check_cuda.py: CUDA kernels against the CPU kernels and the definitions."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import check_common
import torch
from cases import linear as cases
from check_common import same, short_name
from torch import Tensor

from vdit_ext.ops import linear as defs
from vdit_ext.testing import assert_close, generator

OPS = (*defs.OPS, "sizes", "cuda_graph")
FORMAT_OF = {
    "w8a8_linear": ("int8",),
    "w4a8_linear": ("int4", "nibble_planes"),
    "log4a8_linear": ("log4", "log3"),
}
ONE_ROUNDING = {torch.float32: 3e-6, torch.float16: 2**-11 + 3e-6, torch.bfloat16: 2**-8 + 3e-6}
LONG_ROWS = (1024, 1040, 4096, 5120, 8960, 13824, 20480, 32784)  # every way in which a kernel holds a row
# Sizes of models: the rows are sampled, the channels are whole.
MODEL_SHAPES = ((8192, 1152, 4608), (8192, 5120, 5120), (4096, 13824, 5120), (32760, 1536, 8960))
Named = tuple[str, Callable[[], None]]


class Backend(check_common.Backend):
    definitions = defs


def named_cases(op: str, large: bool, backend: Backend) -> Iterator[Named]:
    """Name and check of every case of an op; a check raises AssertionError with what is wrong."""
    if op in FORMAT_OF:
        return linear_cases(op, backend)
    if op.startswith("expand"):
        return expand_cases(op, backend)
    return globals()[f"{op}_cases"](backend, large)


# ---------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------


def quantize_rows_cases(backend: Backend, large: bool) -> Iterator[Named]:
    long = [
        cases.RowsCase(
            f"long_{k}", (2, 3, k), prologue="layer_norm", modulation="b", channel_scale=True, hadamard=16
        )
        for k in LONG_ROWS
    ]
    for case in (*cases.every_rows, *long):
        for dtype in backend.dtypes():
            yield f"{case} {short_name(dtype)}", lambda c=case, t=dtype: check_rows(backend, c, t)
    if large and backend.name == "cuda":
        yield "over_2e31_elements", lambda: check_huge_rows(backend)


def check_rows(backend: Backend, case: cases.RowsCase, dtype: torch.dtype) -> None:
    inputs = cases.make_rows(case, dtype)
    codes, scale, total = (t.cpu() for t in backend.run("quantize_rows", inputs.x, **inputs.kwargs))
    exact = defs.transform_rows_naive(inputs.x, **inputs.transform)
    q_max = 2 ** (case.bits - 1) - 1
    step = exact.abs().amax(-1) / q_max
    # fp32 arithmetic on values as large as the row's largest.
    noise = 3e-6
    same(total, codes.sum(-1, dtype=torch.int32), "the row sums")
    assert bool(((scale.double() - step).abs() <= noise * step).all()), "a scale is off"
    step = step[..., None]
    worst = ((codes.double() * step - exact).abs() / step.clamp_min(1e-38)).max()
    assert float(worst) <= 0.5 + noise * q_max, f"a code is {float(worst):.4f} steps off"


def check_huge_rows(backend: Backend) -> None:
    """Offsets beyond 32 bits: 262,160 rows of 8,192."""
    x = torch.empty(262_160, 8192, device="cuda", dtype=torch.bfloat16).normal_()
    assert x.numel() > 2**31
    codes, scale, total = backend.ops.quantize_rows(x, hadamard=128)
    some = torch.tensor([0, 131_072, 262_159])
    expected = torch.ops.vdit.quantize_rows(x[some.cuda()].cpu(), hadamard=128)
    same(codes[some.cuda()].sum(-1, dtype=torch.int32), total[some.cuda()], "sums of rows far apart")
    assert_close(scale[some.cuda()], expected[1], tolerance=1e-5, what="scales of rows far apart")


# ---------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------


def expand_cases(op: str, backend: Backend) -> Iterator[Named]:
    for n, k in ((1, 1), (32, 32), (33, 16), (70, 100), (128, 160), (1152, 4608)):
        for bits in (4, 8) if op == "expand_w4" else (3, 4):

            def run(n=n, k=k, bits=bits):
                case = cases.LinearCase("expand", (1,), k, n)
                gen = generator(n + k)
                if op == "expand_w4":
                    planes = cases.make_weight_codes(case, "nibble_planes" if bits == 8 else "int4", gen)
                    kwargs = {"weight_low": planes[1]} if bits == 8 else {}
                    args = planes[0], n, k
                else:
                    args, kwargs = (*cases.make_weight_codes(case, f"log{bits}", gen), k), {}
                same(backend.run(op, *args, **kwargs), getattr(defs, f"{op}_naive")(*args, **kwargs), op)

            yield f"N={n} K={k} {bits} bits", run


# ---------------------------------------------------------------------------------------------------------
# Products
# ---------------------------------------------------------------------------------------------------------


def linear_cases(op: str, backend: Backend) -> Iterator[Named]:
    for case in (*cases.every, *cases.extreme):
        if backend.is_cuda_code and not case.cuda:
            continue
        for format in FORMAT_OF[op]:
            for path in ("auto",) if format == "int8" else ("fused", "expand"):

                def run(c=case, f=format, p=path):
                    check_product(backend, c, f, {} if f == "int8" else {"path": p})

                yield f"{case} {format} {path}", run


def check_product(backend: Backend, case: cases.LinearCase, format: str, path: dict) -> None:
    raw = cases.make_linear(case, format).raw()
    same(backend.run(raw.op, *raw.args, **raw.kwargs, **path), raw.naive(*raw.args, **raw.kwargs), "the sums")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        inputs = cases.make_linear(case, format, dtype)
        got = backend.run(inputs.op, *inputs.args, **inputs.kwargs, **path)
        expected = inputs.naive(*inputs.args, **inputs.kwargs | {"out_dtype": torch.float64})
        if dtype == torch.float16:  # what overflows in one overflows in the other
            expected = torch.where(expected.abs() > 65504, expected.half().double(), expected)
        what = f"{short_name(dtype)} outputs"
        assert_close(got.double(), expected, tolerance=2 * ONE_ROUNDING[dtype], what=what)


def sizes_cases(backend: Backend, large: bool) -> Iterator[Named]:
    """Every tile: numbers of rows around the tiles' sides, and the shapes of models."""
    rows = (1, 16, 17, 64, 65, 129, 300, 1000) if backend.name == "cuda" else (1, 65, 300)
    n, k = (1160, 1152) if backend.name == "cuda" else (136, 144)
    shapes = [(m, k, n) for m in rows] + list(MODEL_SHAPES if backend.name == "cuda" else ())
    if large and backend.name == "cuda":
        shapes.append((119_056, 64, 21_504))  # more than 2^31 outputs
    for m, k, n in shapes:
        for format in cases.FORMATS:
            yield f"M={m} K={k} N={n} {format}", lambda m=m, k=k, n=n, f=format: check_size(backend, m, k, n, f)


def check_size(backend: Backend, m: int, k: int, n: int, format: str) -> None:
    """Sums of sampled rows against integers in fp64, which holds them exactly."""
    gen = torch.Generator(backend.device).manual_seed(m + n)
    x = torch.randint(-127, 128, (m, k), generator=gen, device=backend.device, dtype=torch.int8)
    drawn = cases.make_weight_codes(cases.LinearCase("w", (m,), k, n), format, generator(0))
    weights = [t.to(backend.device) for t in drawn]
    ones, rows = (torch.ones(c, device=backend.device) for c in (n, m))
    sums = x.sum(-1, dtype=torch.int32)
    some = torch.unique(torch.tensor([0, m // 3, m // 2, max(0, m - 130), m - 1])).to(backend.device)
    values = weight_values(backend, weights, format, n, k)
    expected = (x[some].double() @ values.double().T).to(torch.int32)
    for path in (None,) if format == "int8" else ("fused", "expand"):
        kwargs = {"out_dtype": torch.int32} | ({"path": path} if path else {})
        if format == "int8":
            out = backend.ops.w8a8_linear(x, rows, weights[0], ones, **kwargs)
        elif format in ("int4", "nibble_planes"):
            low = {"weight_low": weights[1]} if format == "nibble_planes" else {}
            out = backend.ops.w4a8_linear(x, rows, sums, weights[0], ones, ones, **low, **kwargs)
        else:
            out = backend.ops.log4a8_linear(x, rows, weights[0], weights[1], ones, **kwargs)
        same(out[some], expected, f"sums of sampled rows, path {path}")


def weight_values(backend: Backend, weights: list[Tensor], format: str, n: int, k: int) -> Tensor:
    if format == "int8":
        return weights[0]
    if format in ("int4", "nibble_planes"):
        low = weights[1].cpu() if format == "nibble_planes" else None
        return defs.expand_w4_naive(weights[0].cpu(), n, k, weight_low=low).to(backend.device)
    return defs.expand_log4_naive(weights[0].cpu(), weights[1].cpu(), k).to(backend.device)


# ---------------------------------------------------------------------------------------------------------
# Graphs
# ---------------------------------------------------------------------------------------------------------


def cuda_graph_cases(backend: Backend, large: bool) -> Iterator[Named]:
    if backend.name == "cuda":
        for path in ("fused", "expand"):
            yield f"quantize and multiply in one graph, {path}", lambda p=path: check_graph(backend, p)


def check_graph(backend: Backend, path: str) -> None:
    """Capture succeeds only where nothing waits for the device; a replay must give the same bits."""
    case = cases.LinearCase("graph", (700,), 1152, 1160, bias=True)
    inputs = cases.make_linear(case, "int4")
    x = torch.randn(700, 1152, generator=generator(1)).cuda().bfloat16()
    *weight, bias = (t.cuda() for t in (*inputs.args[3:], inputs.kwargs["bias"]))

    def run() -> Tensor:
        codes, scale, total = backend.ops.quantize_rows(x, prologue="layer_norm", hadamard=128)
        return backend.ops.w4a8_linear(codes, scale, total, *weight, bias=bias, path=path)

    expected = run()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        captured.zero_()
        graph.replay()
        same(captured, expected, "the replay")
