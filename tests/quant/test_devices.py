"""Methods compute where they are told to, and what they return is on the CPU and the same."""

from __future__ import annotations

import copy

import pytest
import torch
from cases.pretend_device import DEVICE, PretendDevice
from cases.quant import Tiny, layers_of, with_outliers

from vdit_ext.quant import apply, calibrate, methods
from vdit_ext.quant.linear import compute_device

CASES = {
    "rtn": ("rtn", "w4a8", {"clip": "mse"}),
    "smoothquant": ("smoothquant", "w8a8", {}),
    "vidit_q": ("vidit_q", "w4a8", {"rotation": "search", "bias_correction": True}),
    "vidit_q by steps": ("vidit_q", "w4a8-mp", {"rotation": "full"}),
    "lrq_dit": ("lrq_dit", "w3a4", {"steps": 8}),
    "lrq_dit, paper": (
        "lrq_dit",
        "w4a8",
        {"mode": "paper", "routing": "paper", "hadamard": "full", "clip": 0.9},
    ),
}


INPUT = with_outliers(2 * 48, 96, count=3, factor=30, seed=1).view(2, 48, 96)


@pytest.fixture(scope="module")
def tiny():
    model = Tiny().eval()
    return model, calibrate(model, lambda: model(INPUT), layers=layers_of(model)), layers_of(model)


def assert_same_on_the_cpu(there, here):
    for name, layer in here.layers.items():
        moved = there.layers[name].tensors()
        for key, tensor in layer.tensors().items():
            assert type(moved[key]) is torch.Tensor and torch.equal(moved[key], tensor), (name, key)


@pytest.mark.parametrize("case", CASES)
def test_a_method_computes_on_another_device_and_returns_the_same_on_the_cpu(case, tiny):
    model, calibration, layers = tiny
    method, bits, settings = CASES[case]
    common = {"bits": bits, "layers": layers, **settings}
    here = methods.run(method, model, calibration, **common)
    with PretendDevice():
        there = methods.run(method, model, calibration, device=DEVICE, **common)
    assert there.report == here.report and there.intervals == here.intervals
    assert_same_on_the_cpu(there, here)


@pytest.mark.parametrize("method", ["kmeans_vq", "vq4dit"])
def test_codewords_are_fitted_where_the_model_is(method, tiny):
    model, _, layers = tiny
    settings = {"bits": "w3", "layers": layers, "steps": 6, "codebook_steps": 4, "iterations": 3, "calls": 6}
    here = methods.run(method, model, lambda: model(INPUT), **settings)
    with PretendDevice():
        moved, x = copy.deepcopy(model).to(DEVICE), INPUT.to(DEVICE)
        there = methods.run(method, moved, lambda: moved(x), **settings)
    assert there.report == here.report
    assert_same_on_the_cpu(there, here)


def test_a_model_elsewhere_is_calibrated_and_quantized_there(tiny):
    model, calibration, layers = tiny
    quantized = methods.run("vidit_q", model, calibration, bits="w4a8", layers=layers)
    with PretendDevice():
        moved, x = copy.deepcopy(model).to(DEVICE), INPUT.to(DEVICE)
        found = calibrate(moved, lambda: moved(x), layers=layers)
        with apply(moved, quantized):
            out = moved(x)
        assert out.device.type == DEVICE.type
        out = out.cpu()
    for info in layers:
        assert torch.equal(found[info.name].rows, calibration[info.name].rows)
        assert torch.equal(found[info.name].amax, calibration[info.name].amax)
    with apply(model, quantized):
        assert torch.equal(model(INPUT), out)


def test_the_pretended_device_refuses_to_mix():
    with PretendDevice():
        x = torch.ones(3, device=DEVICE)
        assert x.device.type == DEVICE.type and float((x + torch.tensor([1.0, 2, 3], device=DEVICE)).sum()) == 9
        assert type((2 * x).cpu()) is torch.Tensor
        with pytest.raises(RuntimeError, match="all tensors on one device"):
            x + torch.ones(3)


def test_without_kernels_for_a_device_weights_are_quantized_on_the_cpu():
    linear = torch.nn.Linear(8, 8)
    assert compute_device(linear).type == "cpu"
    assert compute_device(linear.to("meta")).type == "cpu"
