"""What only the CUDA kernels of the linear family have: tiles of several sizes, rows held in several ways, two paths."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from build_emu import build_emulator
from cases import linear as cases
from cases.attention import as_it_lies

from vdit_ext import _C
from vdit_ext.ops import linear as defs
from vdit_ext.testing import generator

EMULATED_MULTIPROCESSORS = 3
WEIGHT_FORMATS = {
    "int8": ("int8", 16),
    "int4": ("int4", 16),
    "nibble_planes": ("nibble planes", 16),
    "log4": ("table", 16),
    "log3": ("table", 8),
}
# Which tile a product of these sizes gets where there are three multiprocessors. Every side is ragged, and there are
# more steps of k than stages in shared memory.
TILES = {
    "128 x 128 x 64": cases.LinearCase(
        "large", (300,), 400, 120, zero=True, bias=True, gate="s", residual="dense"
    ),
    "64 x 64 x 64": cases.LinearCase("medium", (2, 45), 400, 168, zero=True, bias=True, gate="b"),
    "32 x 32 x 256": cases.LinearCase("small", (9,), 1360, 72, zero=True, bias=True, residual="strided"),
}


def chosen(case: cases.LinearCase, format: str, **kwargs) -> dict:
    weight_format, table_size = WEIGHT_FORMATS[format]
    return _C.linear_path(
        torch.Size(case.lead).numel(),
        case.n,
        case.k,
        weight_format=weight_format,
        table_size=table_size,
        multiprocessors=EMULATED_MULTIPROCESSORS,
        **kwargs,
    )


def call(backend, inputs: cases.LinearInputs, **changes) -> torch.Tensor:
    there = [as_it_lies(t, backend.device) for t in inputs.args]
    kwargs = {
        name: as_it_lies(value, backend.device) if isinstance(value, torch.Tensor) else value
        for name, value in (inputs.kwargs | changes).items()
    }
    return getattr(backend.ops, inputs.op)(*there, **kwargs).cpu()


@pytest.mark.parametrize("format", cases.FORMATS)
@pytest.mark.parametrize("tile", TILES)
def test_every_tile_with_every_format(emulator, tile, format):
    """Exact sums, and outputs within two roundings of the CPU's."""
    case = TILES[tile]
    assert chosen(case, format, path="fused")["tile"].startswith(f"linear sm80: {tile} tile")
    inputs = cases.make_linear(case, format, torch.float32)
    path = {} if format == "int8" else {"path": "fused"}
    raw = inputs.raw()
    assert torch.equal(call(emulator, raw, **path), raw.naive(*raw.args, **raw.kwargs))
    expected = getattr(torch.ops.vdit, inputs.op)(*inputs.args, **inputs.kwargs)
    torch.testing.assert_close(call(emulator, inputs, **path), expected, rtol=2e-6, atol=2e-4)


@pytest.mark.parametrize("format", ["int8", "int4", "log3"])
@pytest.mark.parametrize("n", [256, 252, 250])
def test_stores_of_every_width(emulator, format, n):
    """Rows of out at multiples of 16 bytes, of 8, and of 4; nothing past a row or the last column is touched."""
    case = cases.LinearCase(
        "stores", (33,), 48, n, bias=True, gate="s", gate_dtype=torch.bfloat16, residual="dense"
    )
    inputs = cases.make_linear(case, format, torch.bfloat16)
    expected = getattr(torch.ops.vdit, inputs.op)(*inputs.args, **inputs.kwargs)
    torch.testing.assert_close(call(emulator, inputs), expected, rtol=2**-7, atol=1e-3)


def test_a_residual_at_an_odd_address(emulator):
    case = cases.LinearCase("odd", (17,), 64, 64, bias=True)
    inputs = cases.make_linear(case, "int8", torch.bfloat16)
    wide = torch.randn(17, 81, generator=generator(1)).to(torch.bfloat16)
    inputs.kwargs["residual"] = wide[:, 3:67]
    expected = getattr(torch.ops.vdit, inputs.op)(*inputs.args, **inputs.kwargs)
    torch.testing.assert_close(call(emulator, inputs), expected, rtol=2**-7, atol=1e-3)


# Rows of one warp, of 128, 256 and 512 threads with one or two shares of registers, and rows read once a step.
@pytest.mark.parametrize("k", [1024, 1040, 4096, 5120, 13824, 20480, 32784])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_rows_of_every_length(emulator, k, dtype):
    case = cases.RowsCase(
        "long", (2, 2, k), prologue="layer_norm", modulation="b", channel_scale=True, hadamard=16, signs=True
    )
    inputs = cases.make_rows(case, dtype)
    codes, scale, total = emulator.ops.quantize_rows(inputs.x, **inputs.kwargs)
    expected, expected_scale, _ = defs.quantize_rows_naive(inputs.x, **inputs.kwargs)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-5, atol=0)
    step = (codes.int() - expected.int()).abs()
    assert step.max() <= 1 and step.float().mean() < 1e-3, "a code may differ where its value is near a half"
    assert torch.equal(total, codes.sum(-1, dtype=torch.int32))


# --- the path -----------------------------------------------------------------------------------------------


def test_long_products_expand_and_short_ones_do_not():
    """Expanding costs a share of the product that falls with M; unpacking in the kernel the same share at every M."""
    for weight_format in ("int4", "nibble planes", "table"):
        taken = [
            _C.linear_path(m, 5120, 5120, weight_format=weight_format)["path"] for m in (1, 64, 10**3, 10**6)
        ]
        assert taken == ["fused", "fused", "fused", "expand"], weight_format


def test_wgmma_unpacks_four_bits_for_nothing_and_planes_not():
    """What csrc/linear/README.md calculates: planes fill shared memory more than int8 weights do."""
    int4, planes = (
        _C.linear_path(8192, 5120, 5120, weight_format=name, compute_capability=90)
        for name in ("int4", "nibble planes")
    )
    assert int4["expand_cost"] == planes["expand_cost"] == pytest.approx(253 / 8192)
    assert (int4["path"], planes["path"]) == ("fused", "expand")
    assert planes["text"] == (
        "linear: expand for nibble planes weights at M = 8192: expanding would add 3.1 % to the int8 product and "
        "26214400 bytes of scratch, unpacking in the kernel 9.0 % (estimates); by the sm90 kernel"
    )


@pytest.mark.parametrize("weight_format, filled", [("int8", 128), ("int4", 64), ("table", 64)])
@pytest.mark.parametrize("n", [1536, 5120, 13824])
def test_few_rows_are_left_to_the_kernel_for_80(weight_format, filled, n):
    """On 132 multiprocessors. From the rows on that fill the smallest tile of 9.0, its kernel runs."""
    kernels = {
        m: _C.linear_path(m, n, 5120, weight_format=weight_format, compute_capability=90)
        for m in (1, 16, 32, filled, 4096)
    }
    assert [found["kernel"] for found in kernels.values()] == [80, 80, 80, 90, 90]
    for m, found in kernels.items():
        assert found["tile"].startswith(f"linear sm{found['kernel']}: ")
        assert ("sm80 would take" in found["text"]) == (m < filled)
    assert kernels[16]["tile"] == "linear sm80: 32 x 32 x 256 tile, 4 stages, 4 warps"


def test_the_share_of_time_is_what_the_tiles_say():
    """160 tiles of 32 x 32 in two rounds, at twice the large tile's cost and 0.6 of wgmma's rate, beside 20 tiles of
    64 x 256 in one, at 1.3."""
    share = 2 * 32 * 32 * 2.0 / 0.6 / (64 * 256 * 1.3)
    text = _C.linear_path(16, 5120, 5120, compute_capability=90)["text"]
    assert text.endswith(f"; by the sm80 kernel: sm80 would take {share:.2f} of sm90's time (estimate)")


def test_outputs_that_fill_the_multiprocessors_are_for_the_kernel_for_90():
    found = [_C.linear_path(16, n, 5120, compute_capability=90) for n in (25_344, 25_345)]
    assert [f["kernel"] for f in found] == [80, 90]
    assert "by the sm90 kernel: sm80 would take 1.12 of sm90's time" in found[1]["text"]


def test_an_expanded_weight_is_multiplied_by_the_kernel_for_int8():
    """100 rows fill the smallest tile of packed codes, and not that of int8 weights."""
    found = {
        path: _C.linear_path(100, 5120, 5120, path=path, compute_capability=90) for path in ("fused", "expand")
    }
    assert {path: f["kernel"] for path, f in found.items()} == {"fused": 90, "expand": 80}


@pytest.mark.parametrize("m, n", [(0, 64), (16, 0)])
def test_nothing_to_multiply_is_compared_with_nothing(m, n):
    assert "sm80 would take" not in _C.linear_path(m, n, 64, compute_capability=90)["text"]


def test_the_kernel_for_80_is_alone_on_other_gpus():
    found = _C.linear_path(16, 5120, 5120)
    assert found["kernel"] == 80 and "kernel:" not in found["text"]


# Each product in the emulator, whose multiprocessors are three, with its launches on stderr.
PRODUCTS = """
import sys
import torch
from cases import linear, vq

torch.ops.load_library(sys.argv[1])
for m in (4, 300):
    inputs = linear.make_linear(linear.LinearCase("few", (m,), 64, 96), sys.argv[2])
    getattr(torch.ops.vdit_emu_sm90, inputs.op)(*inputs.args, **inputs.kwargs)
    for path in ("fused", "expand"):
        inputs = vq.make_linear(vq.LinearCase("few", (m,), n=96, k=64), 4, torch.int8)
        torch.ops.vdit_emu_sm90.vq_linear(*inputs.args, **inputs.kwargs, path=path)
"""


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("asked", ["sm90", ""])
def test_the_ops_run_the_kernel_that_was_chosen(emulator, format, asked):
    """Asked for "sm90", few rows run that for 8.0; the emulator else runs those for 9.0 at every number of rows."""
    folders = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders)), "VDIT_EMU_LAUNCHES": "1"}
    env |= {"VDIT_LINEAR_KERNEL": asked, "VDIT_VQ_KERNEL": asked}
    command = [sys.executable, "-c", PRODUCTS, str(build_emulator()), format]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    launches = [line.partition("<")[0] for line in done.stderr.splitlines() if line.startswith("vdit::")]
    products = [name for name in launches if name != "vdit::VqDequantizeKernel"]
    few = ["vdit::LinearKernel", "vdit::VqInt8Kernel", "vdit::LinearKernel"]
    codes, int8 = "vdit::sm90::RegisterWeightsKernel", "vdit::sm90::Int8LinearKernel"
    many = [int8 if format == "int8" else codes, codes, int8]
    assert products == [*(few if asked else many), *many]


@pytest.mark.parametrize("path", ["fused", "expand"])
def test_a_path_that_is_asked_for_is_taken(path):
    found = _C.linear_path(16, 64, 100, path=path)
    assert found["path"] == path
    assert found["scratch_bytes"] == (64 * 112 if path == "expand" else 0)
    assert re.search(
        rf"linear: {path} for int4 weights at M = 16, as asked: expanding would add", found["text"]
    )


def test_int8_weights_have_one_path():
    found = _C.linear_path(4096, 4096, 4096, weight_format="int8")
    assert (found["path"], found["text"]) == ("fused", "linear: int8 weights are multiplied as they are")
    assert found["tile"] == "linear sm80: 128 x 128 x 64 tile, 4 stages, 4 warps"


def test_unknown_names_are_one_sentence():
    with pytest.raises(RuntimeError, match="path must be auto, fused or expand, got 'both'"):
        _C.linear_path(1, 1, 16, path="both")
    with pytest.raises(RuntimeError, match="vq_path: path must be auto, fused or expand, got 'both'"):
        _C.vq_path(1, 1, 16, path="both")
    with pytest.raises(RuntimeError, match="linear_path: multiprocessors must be at least 1, got 0"):
        _C.linear_path(1, 1, 16, multiprocessors=0)
    with pytest.raises(
        RuntimeError, match="weight_format must be int8, int4, nibble planes or table, got 'int2'"
    ):
        _C.linear_path(1, 1, 16, weight_format="int2")


@pytest.mark.parametrize("format", ["int4", "nibble_planes", "log4", "log3"])
def test_the_expanded_product_is_the_fused_one(emulator, format):
    case = TILES["128 x 128 x 64"]
    inputs = cases.make_linear(case, format, torch.float32)
    fused, expanded = (call(emulator, inputs, path=path) for path in ("fused", "expand"))
    assert torch.equal(fused, expanded)
