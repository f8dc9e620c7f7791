"""What only the CUDA kernels of the linear family have: tiles of several sizes, rows held in several ways, two paths."""

from __future__ import annotations

import re

import pytest
import torch
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
        "26214400 bytes of scratch, unpacking in the kernel 9.0 % (estimates)"
    )


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
