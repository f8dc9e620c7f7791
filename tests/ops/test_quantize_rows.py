"""quantize_rows against its definition, on every backend."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import linear as cases
from cases.attention import as_it_lies
from cases.rows import FLOAT_IDS, FLOATS

from vdit_ext import ops
from vdit_ext.ops import linear as defs
from vdit_ext.testing import generator

BACKENDS = ("cpu", "emu", "emu_sm90", "cuda")


def call(backend, inputs: cases.RowsInputs, **changes):
    kwargs = {
        name: as_it_lies(value, backend.device) if isinstance(value, torch.Tensor) else value
        for name, value in (inputs.kwargs | changes).items()
    }
    return [t.cpu() for t in backend.ops.quantize_rows(as_it_lies(inputs.x, backend.device), **kwargs)]


def assert_well_formed(codes, scale, sum, inputs: cases.RowsInputs) -> None:
    """Shapes, padding, range and exact sums."""
    k = inputs.x.shape[-1]
    assert codes.shape == inputs.x.shape and codes.dtype == torch.int8
    assert scale.shape == sum.shape == inputs.x.shape[:-1]
    assert (scale.dtype, sum.dtype) == (torch.float32, torch.int32)
    q_max = 2 ** (inputs.kwargs["bits"] - 1) - 1
    assert codes.abs().max() <= q_max
    assert torch.equal(sum, codes.sum(-1, dtype=torch.int32))
    assert codes.stride(-2) % 16 == 0 or codes.shape[-2] == 1 or k % 16 == 0


@pytest.mark.parametrize("dtype", FLOATS, ids=FLOAT_IDS)
@pytest.mark.parametrize("case", cases.plain_rows, ids=str)
def test_codes_without_a_transform_are_exact(backend, case, dtype):
    """One fp32 division a row and one fp32 product an element: nothing is left to a tolerance."""
    inputs = cases.make_rows(case, dtype)
    codes, scale, sum = call(backend, inputs)
    assert_well_formed(codes, scale, sum, inputs)
    y = inputs.x.float()
    if case.channel_scale:
        y = y * inputs.kwargs["channel_scale"]
    amax, q_max = y.abs().amax(-1, keepdim=True), torch.tensor(float(2 ** (case.bits - 1) - 1))
    expected = torch.where(amax >= 1e-30, (y * (q_max / amax)).round(), 0.0)
    assert torch.equal(codes, expected.to(torch.int8))
    assert torch.equal(scale, torch.where(amax >= 1e-30, amax / q_max, 0.0)[..., 0])


@pytest.mark.parametrize("dtype", FLOATS, ids=FLOAT_IDS)
@pytest.mark.parametrize("case", cases.transformed_rows, ids=str)
def test_definition_within_half_a_step(backend, case, dtype):
    inputs = cases.make_rows(case, dtype)
    codes, scale, sum = call(backend, inputs)
    assert_well_formed(codes, scale, sum, inputs)
    exact = defs.transform_rows_naive(inputs.x, **inputs.transform)
    amax = exact.abs().amax(-1)
    # fp32 arithmetic on values as large as the row's largest; subtracting a large mean costs some of its digits.
    noise = 5e-5 if case.rows == "large_mean" else 3e-6
    q_max = 2 ** (case.bits - 1) - 1
    live = amax >= 1e-30
    assert torch.equal(scale == 0, ~live) and (codes[~live] == 0).all()
    assert ((scale.double() - amax / q_max).abs() <= noise * amax / q_max).all()
    step = (amax / q_max)[..., None]
    assert ((codes.double() * step - exact).abs() <= step * (0.5 + noise * q_max)).all()


@pytest.mark.parametrize("case", [cases.plain_rows[4], cases.transformed_rows[17]], ids=str)
def test_equal_inputs_give_equal_bits(backend, case):
    inputs = cases.make_rows(case, torch.bfloat16)
    for first, second in zip(call(backend, inputs), call(backend, inputs), strict=True):
        assert torch.equal(first, second)


def test_rows_are_independent(backend):
    """A row's codes do not depend on where it lies, or beside what."""
    inputs = cases.make_rows(replace(cases.transformed_rows[17], shape=(1, 9, 256)), torch.bfloat16)
    codes, scale, _ = call(backend, inputs)
    for row in (0, 4, 8):
        alone = call(backend, cases.RowsInputs(inputs.x[:, row : row + 1], inputs.kwargs))
        assert torch.equal(alone[0][:, 0], codes[:, row]) and torch.equal(alone[1][:, 0], scale[:, row])


def test_padding_is_zero(backend):
    inputs = cases.make_rows(cases.RowsCase("pad", (5, 77)), torch.float32)
    codes = backend.ops.quantize_rows(inputs.x.to(backend.device))[0].cpu()
    assert codes.stride(0) == 80
    there = backend.ops.quantize_rows(inputs.x.to(backend.device))[0]
    padded = there.as_strided((5, 80), (80, 1)).cpu()
    assert (padded[:, 77:] == 0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("prologue", ["none", "layer_norm", "gelu", "gelu_tanh"])
def test_rows_that_are_not_finite(backend, value, prologue):
    inputs = cases.make_rows(cases.RowsCase("nan", (5, 96), prologue=prologue), torch.float32)
    if prologue.startswith("gelu") and value == -torch.inf:
        value = torch.inf  # of -inf GELU may be 0: that is its limit
    clean = call(backend, inputs)
    inputs.x[3, 40] = value
    if backend.name != "cuda":
        with pytest.raises(RuntimeError, match="x must be finite before it is quantized, .* in row 3"):
            call(backend, inputs)
        return
    codes, scale, sum = call(backend, inputs)
    assert scale[3].isnan() and (codes[3] == 0).all() and sum[3] == 0
    others = [0, 1, 2, 4]
    assert torch.equal(codes[others], clean[0][others]) and torch.equal(scale[others], clean[1][others])


def test_an_overflow_of_the_transform_is_not_finite(backend):
    if backend.name == "cuda":
        pytest.skip("rows are checked on request there")
    x = torch.full((2, 32), 1e38)
    with pytest.raises(RuntimeError, match="must be finite"):
        backend.ops.quantize_rows(x, channel_scale=torch.full((32,), 1e3))


@pytest.mark.parametrize("k", [96, 13824, 65536])
def test_equal_numbers_are_zero_after_layer_norm(backend, k):
    """Their sum is rounded, and a variance by its moments may come out below 0: neither may show."""
    x = torch.tensor([3.7, 125644.328, 149648.69, 128808744.0])[:, None].expand(4, k).contiguous()
    codes, scale, _ = call(backend, cases.RowsInputs(x, {"prologue": "layer_norm"}))
    assert (codes == 0).all() and (scale == 0).all()


def test_numbers_too_small_to_divide_by_are_zero(backend):
    x = torch.zeros(3, 32, device=backend.device)
    x[1, 5] = 1e-31
    x[2, 5] = -2e-30
    codes, scale, _ = backend.ops.quantize_rows(x)
    assert (codes[:2] == 0).all() and (scale[:2] == 0).all()
    assert codes[2, 5] == -127 and scale[2] > 0


def test_hadamard_spreads_a_spike(backend):
    """The reason for it: one large channel costs a row its resolution, and after the rotation costs little."""
    x = torch.randn(8, 256, generator=generator(0)) * 0.1
    x[:, 17] = 20.0
    signs = torch.randint(0, 2, (256,), generator=generator(1)).float() * 2 - 1
    errors = []
    for kwargs in ({}, {"hadamard": 128, "signs": signs}):
        codes, scale, _ = call(backend, cases.RowsInputs(x, kwargs | {"bits": 8}))
        exact = defs.transform_rows_naive(x, **kwargs)
        errors.append(float((codes * scale[:, None] - exact).norm()))
    assert errors[1] < errors[0] / 3, errors


def test_empty(backend):
    for shape in ((0, 32), (2, 0, 32), (0, 3, 20)):
        codes, scale, sum = backend.ops.quantize_rows(torch.zeros(shape, device=backend.device))
        assert codes.shape == shape and scale.shape == sum.shape == shape[:-1]


def test_refuses(backend):
    x = torch.zeros(2, 3, 64, device=backend.device)
    one = torch.ones(64, device=backend.device)
    for args, kwargs, sentence in (
        ((x.double(),), {}, "x must be float32, float16 or bfloat16, got float64"),
        ((x[0, 0],), {}, r"x must be \[M, K\] or \[B, S, K\], got \[64\]"),
        ((x.transpose(1, 2),), {}, "x must have a contiguous last dimension, got stride 64"),
        ((x[..., :0],), {}, "x must have 1 to 65536 channels, .* got 0"),
        ((x,), {"bits": 9}, "bits must be in 2..8, got 9"),
        ((x,), {"bits": 1}, "bits must be in 2..8, got 1"),
        ((x,), {"prologue": "silu"}, "prologue must be none, layer_norm, gelu or gelu_tanh, got silu"),
        ((x,), {"norm_weight": one}, "must be None with prologue none"),
        ((x,), {"shift": x, "prologue": "gelu"}, "must be None with prologue gelu"),
        ((x,), {"prologue": "layer_norm", "norm_weight": one[:5]}, r"norm_weight must be \[64\], got \[5\]"),
        ((x,), {"prologue": "layer_norm", "norm_bias": one.half()}, "norm_bias must be float32, got float16"),
        (
            (x,),
            {"prologue": "layer_norm", "shift": x[0]},
            r"shift must be \[2 or 1, 3 or 1, 64\], got \[3, 64\]",
        ),
        (
            (x,),
            {"prologue": "layer_norm", "shift": x, "modulation_scale": x.half()},
            "modulation_scale and shift must have one dtype, got float16 and float32",
        ),
        ((x,), {"prologue": "layer_norm", "eps": -1.0}, "eps must be at least 0, got -1"),
        ((x,), {"channel_scale": one.repeat(2)[::2]}, "channel_scale must be contiguous, got stride 2"),
        ((x,), {"hadamard": 48}, "hadamard must be 0, 16, 32, 64 or 128, got 48"),
        ((x,), {"hadamard": 128}, "hadamard must divide the 64 channels of x, got 128"),
        ((x,), {"signs": one}, "signs must be None where hadamard is 0"),
    ):
        with pytest.raises(RuntimeError, match=f"vdit::quantize_rows: .*{sentence}"):
            backend.ops.quantize_rows(*args, **kwargs)


@pytest.mark.parametrize("case", [cases.plain_rows[1], cases.transformed_rows[17]], ids=str)
def test_opcheck(case):
    inputs = cases.make_rows(case, torch.bfloat16)
    torch.library.opcheck(torch.ops.vdit.quantize_rows.default, (inputs.x,), inputs.kwargs)


@pytest.mark.parametrize("asks", ["x", "norm_weight", "shift"])
def test_gradients_are_refused_whoever_asks(asks):
    x = torch.randn(3, 64, generator=generator(0))
    kwargs = {"prologue": "layer_norm", "norm_weight": torch.ones(64), "shift": torch.zeros(1, 64)}
    (x if asks == "x" else kwargs[asks]).requires_grad_()
    codes, scale, _ = torch.ops.vdit.quantize_rows(x, **kwargs)
    assert scale.requires_grad and not codes.requires_grad
    with pytest.raises(RuntimeError, match="quantize_rows: it has no backward yet"):
        scale.sum().backward()


def test_wrapper_names_every_argument():
    inputs = cases.make_rows(replace(cases.transformed_rows[17], norm=True), torch.bfloat16)
    for got, expected in zip(
        ops.quantize_rows(inputs.x, **inputs.kwargs),
        torch.ops.vdit.quantize_rows(inputs.x, **inputs.kwargs),
        strict=True,
    ):
        assert torch.equal(got, expected)
