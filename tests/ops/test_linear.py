"""The quantized linears: sums against numpy in int64, epilogues against their definition, on every backend."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from build_emu import build_emulator
from cases import linear as cases
from cases.attention import as_it_lies

from vdit_ext import ops
from vdit_ext.ops import linear as defs
from vdit_ext.testing import generator

BACKENDS = ("cpu", "emu", "emu_sm90", "cuda")
# Half a unit in the last place, as a share of the value: what one rounding may change.
HALF_ULP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def call(backend, inputs: cases.LinearInputs, **changes):
    there = [as_it_lies(t, backend.device) for t in inputs.args]
    kwargs = {
        name: as_it_lies(value, backend.device) if isinstance(value, torch.Tensor) else value
        for name, value in (inputs.kwargs | changes).items()
    }
    return getattr(backend.ops, inputs.op)(*there, **kwargs)


def weight_values(inputs: cases.LinearInputs) -> np.ndarray:
    """int64 [N, K], what the codes stand for before zero and scale."""
    x, k = inputs.args[0], inputs.args[0].shape[-1]
    if inputs.op == "w8a8_linear":
        return inputs.args[2].numpy().astype(np.int64)
    if inputs.op == "log4a8_linear":
        return defs.expand_log4_naive(inputs.args[2], inputs.args[3], k).numpy().astype(np.int64)
    n = inputs.args[4].shape[0]
    codes = ops.unpack_w4(inputs.args[3], n, x.shape[-1]).numpy().astype(np.int64)
    if "weight_low" in inputs.kwargs:
        codes = 16 * codes + ops.unpack_w4(inputs.kwargs["weight_low"], n, k).numpy() - 128
    return codes


def exact_sums(inputs: cases.LinearInputs) -> torch.Tensor:
    """Python-independent of the ops: numpy's int64 product, which must fit int32."""
    sums = inputs.args[0].numpy().astype(np.int64) @ weight_values(inputs).T
    assert np.abs(sums).max(initial=0) < 2**31
    return torch.from_numpy(sums)


def skip_unless_taken(backend, case) -> None:
    if backend.is_cuda_code and not case.cuda:
        pytest.skip("K is a multiple of 16 on CUDA")


# --- sums ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", cases.FORMATS)
@pytest.mark.parametrize("case", cases.corner + cases.blocks + cases.odd_k, ids=str)
def test_sums_are_exact(backend, case, format):
    skip_unless_taken(backend, case)
    inputs = cases.make_linear(case, format).raw()
    out = call(backend, inputs)
    assert out.dtype == torch.int32 and out.is_contiguous()
    assert torch.equal(out.cpu().long(), exact_sums(inputs))


@pytest.mark.parametrize("format", cases.FORMATS)
@pytest.mark.parametrize("case", cases.extreme, ids=str)
def test_sums_of_the_largest_codes_are_exact(backend, case, format):
    inputs = cases.make_linear(case, format).raw()
    expected = exact_sums(inputs)
    assert torch.equal(call(backend, inputs).cpu().long(), expected)


@pytest.mark.parametrize("format", ["int4", "nibble_planes", "log4", "log3"])
@pytest.mark.parametrize("case", [cases.corner[4], cases.blocks[1]], ids=str)
def test_both_paths_give_the_same(backend, case, format):
    inputs = cases.make_linear(case, format)
    raw = [call(backend, inputs.raw(), path=path).cpu() for path in ("fused", "expand", "auto")]
    assert torch.equal(raw[0].long(), exact_sums(inputs.raw()))
    assert torch.equal(raw[0], raw[1]) and torch.equal(raw[0], raw[2])
    full = [call(backend, inputs, path=path).cpu() for path in ("fused", "expand")]
    assert torch.equal(full[0], full[1])


# --- epilogue -----------------------------------------------------------------------------------------------


def assert_one_rounding(out, inputs: cases.LinearInputs, dtype) -> None:
    """fp32 arithmetic on values up to the largest that takes part, then one rounding to ``dtype``."""
    expected = inputs.naive(*inputs.args, **(inputs.kwargs | {"out_dtype": torch.float64}))
    scale = float(inputs.args[1].max()) * float(inputs.args[4 if inputs.op != "w8a8_linear" else 3].max())
    sums = exact_sums(inputs).abs().max()
    zero = inputs.args[5] if inputs.op == "w4a8_linear" else inputs.kwargs.get("weight_zero")
    x_sum = inputs.args[0].sum(-1, dtype=torch.int32).abs().max()
    parts = float(sums) + (0 if zero is None else float(zero.abs().max()) * float(x_sum))
    gate = inputs.kwargs.get("gate")
    arithmetic = 4e-7 * parts * scale * (1 if gate is None else float(gate.abs().max())) + 1e-6
    error = (out.cpu().double() - expected).abs()
    bound = HALF_ULP[dtype] * expected.abs() * 1.001 + arithmetic
    assert (error <= bound).all(), (float((error - bound).max()), arithmetic)


@pytest.mark.parametrize("format", ["int8", "int4", "log4"])
@pytest.mark.parametrize("case", cases.epilogues + cases.odd_k[2:3], ids=str)
def test_epilogue_within_one_rounding(backend, case, format):
    skip_unless_taken(backend, case)
    dtype = DTYPES[(cases.epilogues.index(case) if case in cases.epilogues else 0) % 3]
    inputs = cases.make_linear(case, format, dtype)
    out = call(backend, inputs)
    assert out.dtype == dtype and out.is_contiguous()
    assert_one_rounding(out, inputs, dtype)
    assert torch.equal(call(backend, inputs), out), "equal inputs give equal bits"


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("format", cases.FORMATS)
def test_whole_tiles_with_everything(backend, format, dtype):
    case = cases.LinearCase("tiles", (2, 65), 144, 97, zero=True, bias=True, gate="b", residual="dense")
    inputs = cases.make_linear(case, format, dtype)
    assert_one_rounding(call(backend, inputs), inputs, dtype)


def test_a_column_does_not_depend_on_its_place(backend):
    """To the bit, whatever part of a vector or a tile it is."""
    inputs = cases.make_linear(cases.epilogues[10], "int8", torch.float32)
    whole = call(backend, inputs).cpu()
    x, x_scale, weight, scale = inputs.args
    for first, last in ((0, 33), (33, 70), (69, 70)):
        part = cases.LinearInputs(inputs.op, (x, x_scale, weight[first:last], scale[first:last]), {})
        part.kwargs = {
            name: value[..., first:last] if name in ("weight_zero", "bias", "gate", "residual") else value
            for name, value in inputs.kwargs.items()
        }
        assert torch.equal(call(backend, part).cpu(), whole[:, first:last])


def test_sums_given_spare_a_pass_and_change_nothing(backend):
    inputs = cases.make_linear(cases.blocks[0], "int8")
    x_sum = inputs.args[0].sum(-1, dtype=torch.int32)
    inputs.kwargs["x_sum"] = x_sum
    given = call(backend, inputs)
    del inputs.kwargs["x_sum"]
    assert torch.equal(given, call(backend, inputs))


def test_bf16_is_the_default(backend):
    inputs = cases.make_linear(cases.corner[1], "int8")
    assert call(backend, inputs, out_dtype=None).dtype == torch.bfloat16


@pytest.mark.parametrize("format", ["int8", "int4", "log3"])
def test_a_row_without_codes_is_nan_and_alone(backend, format):
    inputs = cases.make_linear(cases.LinearCase("nan", (5,), 64, 40, bias=True), format)
    clean = call(backend, inputs).cpu()
    inputs.args[0][2] = 0
    inputs.args[1][2] = torch.nan
    out = call(backend, inputs).cpu()
    others = [0, 1, 3, 4]
    assert out[2].isnan().all() and torch.equal(out[others], clean[others])


# --- sizes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", cases.FORMATS)
def test_no_rows_and_no_columns(backend, format):
    for lead, n in (((0,), 40), ((2, 0), 40), ((3,), 0)):
        inputs = cases.make_linear(cases.LinearCase("empty", lead, 32, n, codes="random"), format)
        assert call(backend, inputs).shape == (*lead, n)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_every_number_of_rows(backend, format):
    """The ends of a block of rows, whichever size it has."""
    if backend.is_cuda_code:
        pytest.skip("the corner cases cover the CUDA tiles")
    inputs = cases.make_linear(cases.LinearCase("rows", (67,), 48, 70), format).raw()
    whole = exact_sums(inputs)
    for m in (*range(1, 34), 47, 48, 49, 63, 64, 65, 66, 67):
        part = cases.LinearInputs(inputs.op, (inputs.args[0][:m], *inputs.args[1:]), dict(inputs.kwargs))
        part.args = tuple(
            t[:m] if i in ((1, 2) if format == "int4" else (1,)) else t for i, t in enumerate(part.args)
        )
        assert torch.equal(call(backend, part).long(), whole[:m]), m


def test_the_fourth_bit_of_three_bit_codes_is_not_read(backend):
    codes = torch.randint(0, 16, (40, 64), generator=generator(0), dtype=torch.uint8)
    inputs = cases.make_linear(cases.LinearCase("bit", (9,), 64, 40), "log3").raw()
    x, x_scale, _, table, scale = inputs.args
    inputs.args = x, x_scale, ops.pack_log4(codes), table, scale
    expected = x.long() @ table.long().gather(1, codes.long() & 7).T
    for path in ("fused", "expand"):
        assert torch.equal(call(backend, inputs, path=path).cpu().long(), expected), path


@pytest.mark.parametrize("format", cases.FORMATS)
def test_the_cpu_takes_weights_at_any_address(format):
    """As a file that is mapped has them."""

    def moved(t: torch.Tensor) -> torch.Tensor:
        bytes_ = torch.empty(t.nbytes + 1, dtype=torch.int8)[1:]
        return bytes_.view(t.dtype).view(t.shape).copy_(t)

    inputs = cases.make_linear(cases.LinearCase("moved", (9,), 144, 70), format)
    run = getattr(ops, inputs.op)
    expected = run(*inputs.args, **inputs.kwargs)
    args = [moved(t) if t.element_size() == 1 else t for t in inputs.args]
    kwargs = {k: moved(v) if k == "weight_low" else v for k, v in inputs.kwargs.items()}
    assert torch.equal(run(*args, **kwargs), expected)


def test_weight_rows_need_not_touch(backend):
    wide = torch.randint(-128, 128, (40, 96), generator=generator(0), dtype=torch.int8)
    x = torch.randint(-128, 128, (5, 64), generator=generator(1), dtype=torch.int8)
    inputs = cases.LinearInputs(
        "w8a8_linear", (x, torch.ones(5), wide[:, 16:80], torch.ones(40)), {"out_dtype": torch.int32}
    )
    assert torch.equal(call(backend, inputs).cpu().long(), exact_sums(inputs))


# --- what quantization is for -------------------------------------------------------------------------------


def test_quantize_then_multiply_is_the_linear(backend):
    """8 bits a side: the product of normal numbers within 40 dB."""
    x = torch.randn(24, 256, generator=generator(0))
    weight = torch.randn(48, 256, generator=generator(1))
    scale = weight.abs().amax(1) / 127
    codes = (weight / scale[:, None]).round().to(torch.int8)
    there = [t.to(backend.device) for t in (x, codes, scale)]
    x_codes, x_scale, _ = backend.ops.quantize_rows(there[0])
    out = backend.ops.w8a8_linear(x_codes, x_scale, *there[1:], out_dtype=torch.float32).cpu()
    exact = x @ weight.T
    snr = 10 * torch.log10(exact.square().sum() / (out - exact).square().sum())
    assert snr > 38, float(snr)


def test_two_planes_are_one_layer_at_two_widths(backend):
    """The high plane alone is the layer at four bits, both planes the layer at eight."""
    weight = torch.randn(40, 64, generator=generator(2))
    low, high = weight.amin(1), weight.amax(1)
    scale = (high - low) / 255
    codes = ((weight - low[:, None]) / scale[:, None]).round().to(torch.uint8)
    planes = ops.pack_w4(codes >> 4), ops.pack_w4(codes & 15)
    x = torch.randn(9, 64, generator=generator(3))
    x_codes, x_scale, x_sum = defs.quantize_rows_naive(x)
    exact = x @ weight.T
    errors = []
    for planes_used, step, zero in ((1, 16 * scale, (low / scale + 7.5) / 16), (2, scale, low / scale + 128)):
        kwargs = {"weight_low": planes[1]} if planes_used == 2 else {}
        inputs = cases.LinearInputs(
            "w4a8_linear",
            (x_codes, x_scale, x_sum, planes[0], step, zero),
            kwargs | {"out_dtype": torch.float32},
        )
        errors.append(float((call(backend, inputs).cpu() - exact).norm() / exact.norm()))
    assert errors[0] < 0.12 and errors[1] < 0.012, errors


# --- errors -------------------------------------------------------------------------------------------------


def test_w8a8_refuses(backend):
    x = torch.zeros(4, 32, dtype=torch.int8, device=backend.device)
    x_scale, x_sum = (
        torch.ones(4, device=backend.device),
        torch.zeros(4, dtype=torch.int32, device=backend.device),
    )
    weight = torch.zeros(8, 32, dtype=torch.int8, device=backend.device)
    scale = torch.ones(8, device=backend.device)
    out = torch.zeros(4, 8, device=backend.device)
    args = [x, x_scale, weight, scale]
    for at, value, kwargs, sentence in (
        (0, x.float(), {}, "x must be int8, got float32"),
        (0, x[0], {}, r"x must be \[M, K\] or \[B, S, K\], got \[32\]"),
        (0, x.T.contiguous().T, {}, "x must have a contiguous last dimension, got stride 4; call .contiguous"),
        (1, x_scale[:3], {}, r"x_scale must be \[4\], got \[3\]"),
        (1, x_scale.double(), {}, "x_scale must be float32, got float64"),
        (2, weight[:, :16], {}, r"weight must be \[8, 32\] like the channels of x, got \[8, 16\]"),
        (2, weight.int(), {}, "weight must be int8, got int32"),
        (2, weight[0], {}, r"weight must be \[N, K\], got \[32\]"),
        (3, scale[:7], {}, r"weight_scale must be \[8\], got \[7\]"),
        (3, scale.repeat(2)[::2], {}, "weight_scale must be contiguous, got stride 2"),
        (3, scale, {"weight_zero": scale}, "x_sum must be given with weight_zero; quantize_rows returns it"),
        (3, scale, {"x_sum": x_sum.long()}, "x_sum must be int32, got int64"),
        (3, scale, {"bias": scale[:3]}, r"bias must be \[8\], got \[3\]"),
        (3, scale, {"gate": out[:3]}, r"gate must be \[4 or 1, 8\], got \[3, 8\]"),
        (3, scale, {"gate": out.int()}, "gate must be float32, float16 or bfloat16, got int32"),
        (3, scale, {"residual": out}, "residual must be bfloat16, got float32"),
        (3, scale, {"residual": out[:, :7].bfloat16()}, r"residual must be \[4, 8\], got \[4, 7\]"),
        (3, scale, {"out_dtype": torch.float64}, "out_dtype must be float32, float16, bfloat16 or int32"),
        (
            3,
            scale,
            {"out_dtype": torch.int32, "bias": scale},
            "bias, gate and residual must be None with out_dtype",
        ),
        (
            3,
            scale,
            {"out_dtype": torch.int32, "x_sum": x_sum, "weight_zero": scale},
            "weight_zero must be None with out_dtype int32",
        ),
    ):
        changed = [value if i == at else a for i, a in enumerate(args)]
        with pytest.raises(RuntimeError, match=f"vdit::w8a8_linear: {sentence}"):
            backend.ops.w8a8_linear(*changed, **kwargs)


def test_k_beyond_exact_sums_is_refused(backend):
    k = 65536 + 16
    x = torch.zeros(1, k, dtype=torch.int8, device=backend.device)
    weight = torch.zeros(1, k, dtype=torch.int8, device=backend.device)
    one = torch.ones(1, device=backend.device)
    with pytest.raises(
        RuntimeError, match="x must have 1 to 65536 channels, so that int32 sums are exact, got 65552"
    ):
        backend.ops.w8a8_linear(x, one, weight, one)


def test_cuda_refuses_what_it_cannot_load(backend):
    if not backend.is_cuda_code:
        pytest.skip("the CPU takes every K and every address")
    one = torch.ones(4, device=backend.device)
    for k, start, sentence in (
        (24, 0, "the channels of x must be a multiple of 16 on CUDA, got 24"),
        (32, 8, "x must have rows aligned to 16 bytes on CUDA, got rows of 48 elements"),
    ):
        x = torch.zeros(4, 48, dtype=torch.int8, device=backend.device)[:, start : start + k]
        weight = torch.zeros(4, k, dtype=torch.int8, device=backend.device)
        with pytest.raises(RuntimeError, match=sentence):
            backend.ops.w8a8_linear(x, one, weight, one)


def test_tiled_weights_are_checked(backend):
    inputs = cases.make_linear(cases.LinearCase("errors", (4,), 64, 40), "int4")
    x, x_scale, x_sum, weight, scale, zero = (t.to(backend.device) for t in inputs.args)
    table = torch.zeros(40, 16, dtype=torch.int8, device=backend.device)
    w4, log4 = backend.ops.w4a8_linear, backend.ops.log4a8_linear
    for run, sentence in (
        (
            lambda: w4(x, x_scale, x_sum, weight[:1], scale, zero),
            r"weight must be \[2, 2, 512\] for 40 by 64 codes",
        ),
        (lambda: w4(x, x_scale, x_sum, weight.int(), scale, zero), "weight must be uint8, got int32"),
        (lambda: w4(x, x_scale, x_sum, weight.mT, scale, zero), r"weight must be \[2, 2, 512\]"),
        (lambda: w4(x, x_scale, x_sum, weight.transpose(0, 1), scale, zero), "weight must be contiguous"),
        (lambda: w4(x, x_scale, x_sum, weight, scale, zero[:3]), r"weight_zero must be \[40\], got \[3\]"),
        (
            lambda: w4(x, x_scale, x_sum, weight, scale, zero, weight_low=weight[:1]),
            r"weight_low must be \[2, 2, 512\]",
        ),
        (
            lambda: w4(x, x_scale, x_sum, weight, scale, zero, path="best"),
            "path must be auto, fused or expand, got best",
        ),
        (
            lambda: log4(x, x_scale, weight, table[:, :7], scale),
            r"table must be \[40, 16\] \(four bits\) or \[40, 8\]",
        ),
        (lambda: log4(x, x_scale, weight, table[:39], scale), r"table must be \[40, 16\]"),
        (lambda: log4(x, x_scale, weight, table, scale, path=""), "path must be auto, fused or expand, got"),
    ):
        with pytest.raises(RuntimeError, match=f"vdit::(w4|log4)a8_linear: {sentence}"):
            run()


# --- registration -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", cases.FORMATS)
@pytest.mark.parametrize("case", [cases.epilogues[9], cases.odd_k[2]], ids=str)
def test_opcheck(case, format):
    inputs = cases.make_linear(case, format)
    torch.library.opcheck(getattr(torch.ops.vdit, inputs.op).default, inputs.args, inputs.kwargs)


@pytest.mark.parametrize("asks", ["bias", "residual", "x_scale"])
def test_gradients_are_refused_whoever_asks(asks):
    inputs = cases.make_linear(cases.epilogues[9], "int8", torch.float32)
    (inputs.args[1] if asks == "x_scale" else inputs.kwargs[asks]).requires_grad_()
    out = torch.ops.vdit.w8a8_linear(*inputs.args, **inputs.kwargs)
    assert out.requires_grad
    with pytest.raises(RuntimeError, match="w8a8_linear: it has no backward yet"):
        out.sum().backward()
    with torch.no_grad():
        assert torch.equal(torch.ops.vdit.w8a8_linear(*inputs.args, **inputs.kwargs), out)


# Every linear that takes x_sum, with the right one and with one that is off in the last row.
X_SUMS = """
import sys
import torch
from cases import linear as cases
import vdit_ext

if len(sys.argv) > 2:
    torch.ops.load_library(sys.argv[2])
ops = getattr(torch.ops, sys.argv[1])
for format, name in (("int8", "x_sum"), ("int4", 2)):
    for layout in ("dense", "strided"):
        case = cases.LinearCase("sums", (2, 3), 48, 40, zero=True, layout=layout)
        inputs = cases.make_linear(case, format)
        args, kwargs = list(inputs.args), dict(inputs.kwargs)
        getattr(ops, inputs.op)(*args, **kwargs)
        holder = kwargs if name in kwargs else args
        holder[name] = holder[name].clone()
        holder[name][1, 2] += 1
        said = f"got {int(holder[name][1, 2])} for row 5, which sums to {int(args[0][1, 2].sum())}"
        try:
            getattr(ops, inputs.op)(*args, **kwargs)
            print("unchecked")
        except RuntimeError as error:
            line = str(error).splitlines()[0]
            sentence = f"vdit::{inputs.op}: x_sum must be the sums of x's codes, {said}; quantize_rows returns it"
            print("refused" if line == sentence else line)
"""


@pytest.mark.parametrize("value, said", [("1", "refused"), ("0", "unchecked"), ("", "unchecked")])
@pytest.mark.parametrize("namespace", ["vdit", "vdit_emu"])
def test_x_sum_is_checked_on_request(request, namespace, value, said):
    """VDIT_CHECK_PLANS, which is read once a process."""
    library = []
    if namespace == "vdit_emu":
        request.getfixturevalue("emulator")
        library.append(str(build_emulator()))
    folders = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "VDIT_CHECK_PLANS": value, "PYTHONPATH": os.pathsep.join(filter(None, folders))}
    if not value:
        del env["VDIT_CHECK_PLANS"]
    command = [sys.executable, "-c", X_SUMS, namespace, *library]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [said] * 4


@pytest.mark.parametrize("format", ["int8", "nibble_planes", "log3"])
def test_wrapper_names_every_argument(format):
    inputs = cases.make_linear(cases.epilogues[9], format)
    wrapper = getattr(ops, inputs.op)
    assert torch.equal(
        wrapper(*inputs.args, **inputs.kwargs),
        getattr(torch.ops.vdit, inputs.op)(*inputs.args, **inputs.kwargs),
    )


def test_one_graph_under_compile():
    """Quantize, multiply: no graph break, and the same result."""

    def layer(x, weight, scale):
        codes, x_scale, x_sum = ops.quantize_rows(x, prologue="layer_norm", hadamard=16)
        return ops.w8a8_linear(codes, x_scale, weight, scale, x_sum=x_sum)

    weight = torch.randint(-128, 128, (24, 80), generator=generator(0), dtype=torch.int8)
    args = torch.randn(2, 5, 80, generator=generator(1)), weight, torch.ones(24)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), layer(*args))
