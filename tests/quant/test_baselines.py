"""Plain rounding and SmoothQuant: what the methods must beat."""

from __future__ import annotations

import pytest
import torch
from cases.quant import Tiny, layers_of, normal, snr, with_outliers

from vdit_ext.quant import apply, calibrate
from vdit_ext.quant.baselines import BITS, round_to_nearest, smooth_quant
from vdit_ext.quant.uniform import round_weight


@pytest.fixture(scope="module")
def tiny():
    model, x = Tiny(), with_outliers(200, 96, count=3, factor=30, seed=0)
    return model, x, layers_of(model), calibrate(model, lambda: model(x), layers=layers_of(model))


def output_snr(tiny, quantized) -> float:
    model, x, _, _ = tiny
    expected = model(x)
    with apply(model, quantized):
        return snr(model(x), expected)


def test_every_width_runs_and_wider_is_better(tiny):
    model, _, layers, found = tiny
    got = {bits: output_snr(tiny, round_to_nearest(model, bits=bits, layers=layers)) for bits in BITS}
    assert got["w8a8"] > got["w6a6"] > got["w4a4"] > got["w3a4"]
    assert got["w8a8"] > got["w4a8"] > got["w3a8"]
    assert round_to_nearest(model, bits="w3a8", layers=layers).layers["blocks.0.up"].weight.bits == 3


def test_smooth_quant_helps_with_outlying_channels(tiny):
    model, _, layers, found = tiny
    smooth = smooth_quant(model, found, bits="w8a8", layers=layers)
    assert output_snr(tiny, smooth) > output_snr(tiny, round_to_nearest(model, bits="w8a8", layers=layers)) + 3


def test_smooth_quants_mask_is_its_equation(tiny):
    model, _, layers, found = tiny
    layer = smooth_quant(model, found, bits="w8a8", alpha=0.25, layers=layers).layers["blocks.0.up"]
    weight = model.blocks[0].up.weight.abs().amax(0)
    smooth = found["blocks.0.up"].amax ** 0.25 / weight**0.75  # what SmoothQuant divides activations by
    assert torch.allclose(layer.transform.channel_scale, 1 / smooth, rtol=1e-5)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_clipping_by_error_is_never_worse_in_any_row(bits, symmetric):
    weight = torch.cat([normal(20, 256), normal(20, 256, seed=1) ** 3])
    whole = round_weight(weight, bits, symmetric=symmetric).dequantize()
    clipped = round_weight(weight, bits, symmetric=symmetric, clip="mse").dequantize()
    error, best = ((w - weight).square().sum(1) for w in (whole, clipped))
    assert (best <= error * (1 + 1e-6)).all()
    if bits < 8:
        assert best[:20].sum() < 0.95 * error[:20].sum()


def test_symmetric_grids_leave_out_the_lowest_code():
    grid = round_weight(normal(8, 64), 8, symmetric=True)
    assert grid.codes.min() >= 1 and (grid.zero == -128).all()


@pytest.mark.parametrize(
    ("weight", "arguments", "sentence"),
    [
        (normal(4, 8), {"bits": 9}, "bits must be 2 to 8 .* got 9"),
        (normal(4, 8), {"bits": 4, "clip": "best"}, "clip one of minmax, mse, got 4 and 'best'"),
        (normal(4, 8) * torch.nan, {"bits": 4}, "a weight must be finite"),
        (normal(4, 0), {"bits": 4}, "at least one input channel, got 0"),
    ],
    ids=["bits", "clip", "nan", "empty"],
)
def test_weights_that_cannot_be_rounded_fail_with_a_sentence(weight, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        round_weight(weight, **arguments)


def test_bits_that_a_baseline_does_not_have_fail_with_a_sentence(tiny):
    model, _, layers, found = tiny
    with pytest.raises(ValueError, match=r"^rtn: bits must be one of w8a8, .*, got 'w2a8'$"):
        round_to_nearest(model, bits="w2a8", layers=layers)
    with pytest.raises(ValueError, match=r"^smoothquant: bits must be one of"):
        smooth_quant(model, found, bits="w4", layers=layers)


def test_smooth_quant_without_a_calibration_fails_with_a_sentence(tiny):
    with pytest.raises(KeyError, match="blocks.0.attn.to_q must have been calibrated"):
        smooth_quant(tiny[0], None, bits="w8a8", layers=tiny[2])
