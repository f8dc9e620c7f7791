"""Distances of quantized layers and blocks from the originals."""

import math

import pytest
import torch
from cases.transformers import CASES
from torch import nn

from vdit_ext.quant import QuantizedModel, QuantLayer, apply, baselines, linear_layers, measure, vidit_q
from vdit_ext.quant.hadamard import random_signs
from vdit_ext.quant.rotation import fit_dual_rotation
from vdit_ext.quant.transform import InputTransform
from vdit_ext.quant.uniform import round_weight, store, to_planes


def test_snr_of_known_error():
    x = torch.full((10,), 2.0)
    assert measure.snr(x, x * 1.1) == pytest.approx(20, abs=1e-5)
    assert measure.snr(x, x) == math.inf
    assert math.isnan(measure.snr(x * 0, x))


@pytest.mark.parametrize("rotation", [0, 16, 240, "dual"])
def test_effective_weight_undoes_mask_and_rotation(rotation):
    torch.manual_seed(0)
    weight, mask = torch.randn(24, 240), torch.rand(240) + 0.5
    dual = fit_dual_rotation(torch.randn(9, 240), block=80, steps=5) if rotation == "dual" else None
    hadamard = rotation if dual is None else 0  # 240 = 60 * 4, of which the part of 60 is not symmetric
    transform = InputTransform(mask, hadamard, random_signs(240, 0) if hadamard else None, dual)
    torch.testing.assert_close(transform.plain_weight(transform.weight(weight)), weight, rtol=1e-4, atol=1e-5)
    layer = QuantLayer(store(round_weight(transform.weight(weight), 8)), None, transform)
    x = torch.randn(16, 240)
    direct = transform.rows(x) @ layer.weight.dequantize().T
    torch.testing.assert_close(x @ measure.effective_weight(layer).T, direct, rtol=1e-4, atol=1e-4)
    linear = nn.Linear(240, 24, bias=False)
    linear.weight.data.copy_(weight)
    assert 35 < measure.weight_snr(linear, layer) < 60


def test_weight_snr_of_planes_at_four_bits_is_lower():
    torch.manual_seed(0)
    linear = nn.Linear(64, 32, bias=False)
    layer = QuantLayer(to_planes(round_weight(linear.weight.detach(), 8)))
    full, high_plane = measure.weight_snr(linear, layer), measure.weight_snr(linear, layer, 4)
    assert full > high_plane + 15


def _wan():
    case = next(case for case in CASES if case.name == "WanTransformer3DModel")
    torch.manual_seed(0)
    model = case.build().eval()
    inputs = case.arguments()

    def sample(on_step):
        for step in range(4):
            on_step(step, 4)
            model(**inputs)

    return model, sample


def test_block_probe_sees_each_block_alone():
    """A block whose own linears are untouched answers exactly, however wrong the others are."""
    model, sample = _wan()
    probe = measure.BlockProbe(model, sample, [0, 3])
    infos = list(linear_layers(model))
    first = infos[0].block
    rounded = baselines.round_to_nearest(model, bits="w4a8", layers=[i for i in infos if i.block == first])
    with apply(model, rounded) as applied:
        found = probe.snrs(applied)
    assert found.keys() == {info.block for info in infos}
    assert 5 < found[first] < 60
    assert all(value == math.inf for name, value in found.items() if name != first)


def test_block_probe_takes_the_precision_of_each_step():
    model, sample = _wan()
    probe = measure.BlockProbe(model, sample, [0])
    infos = list(linear_layers(model))
    low = {info.name: 4 for info in infos}
    maps = [(dict.fromkeys(low, 8), low), (low, dict.fromkeys(low, 8))]
    found = []
    for first, second in maps:
        settings = {"alpha": None, "rotation": "none", "precision": (first, second)}
        quantized = vidit_q.quantize(model, None, bits="w4a8-mp", **settings)
        with apply(model, quantized) as applied:
            found.append(measure.mean_db(probe.snrs(applied).values()))
    assert found[0] > found[1] + 5


def test_block_probe_names_a_block_that_did_not_run():
    model, sample = _wan()
    with pytest.raises(ValueError, match=r"must run in steps \[9\]"):
        measure.BlockProbe(model, sample, [9])


def test_mean_leaves_out_what_is_exact():
    assert measure.mean_db([10.0, math.inf, 20.0]) == 15
    assert measure.mean_db([math.inf]) == math.inf


def test_weight_snrs_name_every_layer():
    model, _ = _wan()
    quantized = baselines.round_to_nearest(model, bits="w8a8")
    assert isinstance(quantized, QuantizedModel)
    found = measure.weight_snrs(model, quantized)
    assert found.keys() == quantized.layers.keys()
    assert min(found.values()) > 30


def test_before_each_turns_calls_after_steps_into_calls_before_them():
    told = []
    after = measure.before_each(lambda *now: told.append(now), 3)
    assert told == [(0, 3)]
    for done in (1, 2, 3):
        after(done, 3)
    assert told == [(0, 3), (1, 3), (2, 3)]
