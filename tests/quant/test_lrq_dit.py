"""LRQ-DiT: lines 9 to 11 of section 9 of its specification, then routes, presets, widths and bad input.

Lines 1 to 6 and 10 are in test_twin_log.py, 7 and 8 in test_rotation.py.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from cases.weights import snr, weight_rows
from torch import nn

from vdit_ext import ops
from vdit_ext.quant import QuantLinear, TwinLogWeight, apply, linear_layers, lrq_dit, twin_log
from vdit_ext.quant.calibration import Calibration, InputStatistics, calibrate

STEPS = 16


class Outliers(nn.Module):
    """Scales a few channels up, so that the next layer's input has outliers."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        factor = torch.ones(x.shape[-1])
        factor[[3, 50]] = self.size
        return x * factor


def small_model(outliers: float = 1.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        Outliers(outliers),
        nn.Linear(128, 192),
        nn.GELU(),
        nn.Linear(192, 64),
        nn.Linear(64, 20),
        nn.Linear(20, 8),
    ).requires_grad_(False)


def inputs(rows: int = 96, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, 128, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small_model()


@pytest.fixture(scope="module")
def layers(model):
    return list(linear_layers(model, layers=r"\d"))


@pytest.fixture(scope="module")
def calibration(model, layers) -> Calibration:
    return calibrate(model, lambda: model(inputs()), layers=layers)


def run(model: nn.Module, quantized, x: torch.Tensor) -> torch.Tensor:
    with apply(model, quantized):
        return model(x)


# ---------------------------------------------------------------------------------------------------------
# Section 9
# ---------------------------------------------------------------------------------------------------------


def test_lrq_dit_09_09_routing_is_deterministic(model, layers, calibration):
    """Routing deterministic under fixed seed, and so is all else."""
    first, again = (
        lrq_dit.quantize(model, calibration, bits="w4a4", layers=layers, steps=STEPS, seed=3) for _ in range(2)
    )
    assert first.report == again.report
    for name, layer in first.layers.items():
        tensors = again.layers[name].tensors()
        assert all(torch.equal(tensor, tensors[key]) for key, tensor in layer.tensors().items())
    other = lrq_dit.quantize(model, calibration, bits="w4a4", layers=layers, steps=STEPS, seed=4)
    assert not torch.equal(first.layers["1"].weight.tiles, other.layers["1"].weight.tiles)


def test_lrq_dit_09_09_j_of_ones_is_1(layers, calibration):
    """J of ones is 1; the report has it for every layer, before the mask."""
    model = nn.Sequential(nn.Linear(128, 16)).requires_grad_(False)
    found = list(linear_layers(model, layers="0"))
    for size in (1.0, 3.0):
        same = calibrate(model, lambda size=size: model(torch.full((4, 7, 128), size)), layers=found)
        report = lrq_dit.quantize(model, same, layers=found, steps=2).report["layers"]["0"]
        assert report["j"] == pytest.approx(size, abs=1e-6)


@pytest.mark.parametrize("mode", ["corrected", "paper"])
def test_lrq_dit_09_10_zero_rows_in_a_layer(mode):
    """Zero rows of weights and of activations produce no NaN."""
    weight = weight_rows("gauss .03", 40, 128)
    weight[::3] = 0
    weight[1], weight[2] = weight[1].abs(), 0.5
    layer = nn.Linear(128, 40).requires_grad_(False)
    layer.weight.copy_(weight)
    model = nn.Sequential(layer)
    found = list(linear_layers(model, layers="0"))
    x = inputs(32)
    x[::2] = 0
    for rows in (x, torch.zeros_like(x)):
        statistics = calibrate(model, lambda rows=rows: model(rows), layers=found)
        quantized = lrq_dit.quantize(model, statistics, bits="w3a4", mode=mode, layers=found, steps=STEPS)
        got = run(model, quantized, x)
        assert got.isfinite().all()
        torch.testing.assert_close(got[::2], layer.bias.expand(16, -1))


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("m, n, k", [(5, 33, 96), (1, 8, 4608), (3, 40, 13824), (0, 8, 32)])
def test_lrq_dit_09_11_product_is_exact(m, n, k, bits):
    """The product with int8 tables equals the int64 reference exactly before scaling."""
    form = twin_log.fit(weight_rows("student t4", n, k), bits)
    x = torch.randint(-127, 128, (m, k), dtype=torch.int8, generator=torch.Generator().manual_seed(2))
    weight = lrq_dit.stored(form)
    got = ops.log4a8_linear(
        x, torch.ones(m), weight.tiles, weight.table, weight.scale, out_dtype=torch.int32
    ).numpy()
    values = np.take_along_axis(form.table().numpy().astype(np.int64), form.codes.numpy().astype(np.int64), 1)
    assert np.array_equal(got, x.numpy().astype(np.int64) @ values.T)


def test_lrq_dit_09_11_extreme_codes_stay_exact():
    """At the largest sums that K = 13,824 allows."""
    table = torch.full((2, 16), 127, dtype=torch.int8)
    table[1] = -127
    x = torch.full((1, 13824), 127, dtype=torch.int8)
    tiles = ops.pack_log4(torch.full((2, 13824), 15, dtype=torch.uint8))
    got = ops.log4a8_linear(x, torch.ones(1), tiles, table, torch.ones(2), out_dtype=torch.int32)
    assert got.tolist() == [[127 * 127 * 13824, -127 * 127 * 13824]]


# ---------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bits, floor", [("w4a8", 22), ("w3a8", 15), ("w4a6", 21), ("w3a6", 14), ("w4a4", 17), ("w3a4", 13)]
)
def test_a_quantized_model_is_near(model, layers, calibration, bits, floor):
    x = inputs(seed=7)
    quantized = lrq_dit.quantize(model, calibration, bits=bits, layers=layers, steps=STEPS)
    before = [parameter.clone() for parameter in model.parameters()]
    assert snr(model(x), run(model, quantized, x)) > floor
    assert all(map(torch.equal, before, model.parameters())), "the model itself is untouched"


def test_layers_hold_what_was_asked_for(model, layers, calibration):
    quantized = lrq_dit.quantize(model, calibration, bits="w3a6", layers=layers, steps=STEPS)
    assert quantized.method == "lrq_dit" and list(quantized.layers) == ["1", "3", "4", "5"]
    for name, layer in quantized.layers.items():
        assert isinstance(layer.weight, TwinLogWeight) and layer.weight.bits == 3
        assert layer.transform.bits == 6 and layer.transform.channel_scale is not None
        module = QuantLinear.empty(layer.config())
        module.load_state_dict(QuantLinear(layer).state_dict())
        x = torch.randn(3, layer.weight.in_features)
        assert torch.equal(module(x), QuantLinear(layer)(x))
        wanted = twin_log.fit(layer.transform.weight(model.get_submodule(name).weight), 3)
        assert torch.equal(layer.weight.dequantize(), wanted.dequantize_int8()), "rounded once, after both"
    report = json.loads(json.dumps(quantized.report))
    assert report["bits"] == "w3a6" and report["layers"]["5"]["route"] == "none", "20 channels"


@pytest.mark.parametrize("bits", ["w3a8", "w4a8"])
def test_files_may_keep_three_bits_a_weight(model, layers, calibration, bits):
    quantized = lrq_dit.quantize(model, calibration, bits=bits, layers=layers, routing="hadamard")
    for layer in quantized.layers.values():
        compact = twin_log.compact_tensors(layer.config(), layer.tensors())
        if bits == "w3a8":
            rows, columns = layer.weight.out_features, layer.weight.in_features
            assert compact["planes"].nbytes == rows * 12 * -(-columns // 32) and "tiles" not in compact
        back = twin_log.expanded_tensors(layer.config(), compact)
        assert back.keys() == layer.tensors().keys()
        assert all(torch.equal(tensor, back[name]) for name, tensor in layer.tensors().items())


def test_transform_is_mask_then_rotation(model, layers, calibration):
    for routing in ("hadamard", "dual"):
        quantized = lrq_dit.quantize(model, calibration, layers=layers, routing=routing, steps=STEPS)
        for name in ("1", "3", "4"):
            transform = quantized.layers[name].transform
            linear, x = model.get_submodule(name), calibration[name].rows
            exact = transform.rows(x) @ transform.weight(linear.weight).T
            torch.testing.assert_close(exact, x @ linear.weight.T, rtol=1e-4, atol=1e-4)
            wmax = linear.weight.abs().amax(0)
            mask = (wmax / calibration[name].amax).sqrt()
            torch.testing.assert_close(transform.channel_scale, mask, rtol=1e-4, atol=0)


def test_without_a_mask(model, layers, calibration):
    quantized = lrq_dit.quantize(model, calibration, layers=layers, alpha=None, routing="none")
    assert all(layer.transform.channel_scale is None for layer in quantized.layers.values())
    assert quantized.report["routes"] == {"none": 4}


def test_paper_grid_is_worse(model, layers, calibration):
    paper, corrected = (
        lrq_dit.quantize(model, calibration, bits="w3a8", mode=mode, layers=layers, routing="hadamard")
        for mode in ("paper", "corrected")
    )
    for name, entry in corrected.report["layers"].items():
        assert entry["weight_db"] > paper.report["layers"][name]["weight_db"]


def test_clip_cuts_activations(model, layers, calibration):
    """At .9 the largest magnitude of a row, 7 steps of a max-based scale, becomes 7 steps of a smaller one."""
    quantized = lrq_dit.quantize(model, calibration, bits="w4a4", layers=layers, routing="hadamard", clip=0.9)
    layer = quantized.layers["1"]
    x = inputs(16, seed=9)
    rows = QuantLinear(layer).rows(x)
    amax = layer.transform.rows(x).abs().amax(1)
    torch.testing.assert_close(rows.scale, 0.9 * amax / 7, rtol=1e-5, atol=0)
    assert int(rows.codes.abs().max()) == 7
    assert snr(model(x), run(model, quantized, x)) > 17


# ---------------------------------------------------------------------------------------------------------
# Routes
# ---------------------------------------------------------------------------------------------------------


def statistics_of(rows: torch.Tensor) -> InputStatistics:
    amax = rows.abs().amax(0).clamp(min=1e-3)
    return InputStatistics(amax, float(rows.square().mean().sqrt()), rows, len(rows), 1)


def route_of(rows: torch.Tensor, **settings) -> dict:
    """The report of one layer whose input these rows are."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(rows.shape[1], 32)).requires_grad_(False)
    found = list(linear_layers(model, layers="0"))
    settings = {"bits": "w4a4", "alpha": None, "steps": 64} | settings
    quantized = lrq_dit.quantize(model, Calibration({"0": statistics_of(rows)}), layers=found, **settings)
    return quantized.report["layers"]["0"]


def outlier_rows(channels: list[int], size: float = 40.0) -> torch.Tensor:
    """Normal rows of 512 channels, some of them larger."""
    x = torch.randn(256, 512, generator=torch.Generator().manual_seed(1))
    x[:, channels] *= size
    return x


@pytest.mark.parametrize(
    "channels, route",
    [([], "hadamard"), ([5, 200], "hadamard"), (range(0, 128, 16), "dual")],
)
def test_measured_routing_takes_what_rounds_better(channels, route):
    """The dual rotation where outputs win by 0.3 dB on rows it was not fitted to: outliers that crowd one of the
    blocks, which the permutation parts."""
    found = route_of(outlier_rows(list(channels)))
    wins = found["dual_output_db"] >= found["hadamard_output_db"] + lrq_dit.MARGIN_DB
    assert found["route"] == route == ("dual" if wins else "hadamard")


def test_measured_routing_needs_a_gain_in_outputs():
    """Rows that the dual rotation rounds better by far, at 8 bits, where the weights' rounding hides it."""
    found = route_of(outlier_rows(list(range(0, 128, 16))), bits="w4a8")
    assert found["dual_db"] > found["hadamard_db"] + 1
    assert found["route"] == "hadamard"


def test_measured_outputs_are_those_of_the_layer():
    """All outputs of a small layer are judged: the figure is the quantized layer's own."""
    rows = outlier_rows([5, 200])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 32, bias=False)).requires_grad_(False)
    layers = list(linear_layers(model, layers="0"))
    calibration = Calibration({"0": statistics_of(rows)})
    quantized = lrq_dit.quantize(model, calibration, bits="w4a4", alpha=None, layers=layers, steps=2)
    assert quantized.report["layers"]["0"]["route"] == "hadamard"
    wanted = model(rows[128:])
    got = run(model, quantized, rows[128:])
    expected = quantized.report["layers"]["0"]["hadamard_output_db"]
    assert lrq_dit.signal_to_noise(wanted, got) == pytest.approx(expected, abs=1e-3)


def test_measured_routing_judges_by_the_layers_own_transform():
    """The figures in the report are those of the transforms that the layer could have got."""
    rows = outlier_rows([5, 200])
    found = route_of(rows)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 32)).requires_grad_(False)
    layers = list(linear_layers(model, layers="0"))
    calibration = Calibration({"0": statistics_of(rows)})
    quantized = lrq_dit.quantize(model, calibration, bits="w4a4", alpha=None, routing="hadamard", layers=layers)
    got = lrq_dit.activation_snr(quantized.layers["0"].transform, rows[128:])
    assert got == pytest.approx(found["hadamard_db"], abs=1e-6)


def test_measured_routing_judges_on_other_rows_than_it_fits(monkeypatch):
    rows, fitted, judged = outlier_rows([5, 200]), [], []
    fit, judge = lrq_dit.fit_dual_rotation, lrq_dit.activation_snr
    monkeypatch.setattr(lrq_dit, "fit_dual_rotation", lambda x, **k: (fitted.append(x), fit(x, **k))[1])
    monkeypatch.setattr(lrq_dit, "activation_snr", lambda t, x: (judged.append(x), judge(t, x))[1])
    route_of(rows, steps=2)
    assert len(fitted) == 1 and torch.equal(fitted[0], rows[:128])
    assert len(judged) == 2 and all(torch.equal(x, rows[128:]) for x in judged)


@pytest.mark.parametrize("size, route", [(0.99, "hadamard"), (1.01, "dual")])
def test_paper_routing_asks_for_j(size, route):
    """J of the layer's input as it comes: at least 1 is dual, however flat the input is."""
    assert route_of(torch.full((8, 128), size), routing="paper", alpha=0.5)["route"] == route


def test_one_calibration_row_is_enough():
    assert route_of(outlier_rows([5])[:1])["route"] in ("hadamard", "dual")


def test_full_size_hadamard(model, layers, calibration):
    quantized = lrq_dit.quantize(model, calibration, layers=layers, routing="hadamard", hadamard="full")
    assert [layer.transform.hadamard for layer in quantized.layers.values()] == [128, 192, 64, 0]
    x = inputs(seed=7)
    assert snr(model(x), run(model, quantized, x)) > 22


# ---------------------------------------------------------------------------------------------------------
# Presets
# ---------------------------------------------------------------------------------------------------------


def quantize_with(model: nn.Module, preset: str, **settings):
    """A quantized model from made-up calibration rows."""
    infos = list(linear_layers(model))
    generator = torch.Generator().manual_seed(0)
    rows = {info.group: torch.randn(4, info.in_features, generator=generator) for info in infos}
    calibration = Calibration({info.name: statistics_of(rows[info.group]) for info in infos})
    return infos, lrq_dit.quantize(model, calibration, preset=preset, steps=1, **settings)


@pytest.mark.parametrize("preset, dual", [("pixart_alpha_released", 7), ("pixart_sigma_released", 56)])
def test_pixart_presets(preset, dual):
    """7 and 56 of 280 linears are dual, as in the authors' code."""
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=1,
        attention_head_dim=16,
        num_layers=28,
        cross_attention_dim=16,
        caption_channels=8,
        sample_size=8,
    ).requires_grad_(False)
    infos, quantized = quantize_with(model, preset)
    assert len(infos) == 280 and quantized.report["routes"] == {"dual": dual, "hadamard": 280 - dual}
    assert quantized.report["bits"] == "w3a4" and not quantized.report["kept"]


@pytest.fixture(scope="module")
def flux() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    return diffusers.FluxTransformer2DModel(
        num_layers=19,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        in_channels=4,
        axes_dims_rope=(4, 6, 6),
    ).requires_grad_(False)


def test_flux_released_preset(flux):
    """Feed-forward layers stay in full precision, three of the six listed ones among them."""
    _, quantized = quantize_with(flux, "flux_released")
    entries = quantized.report["layers"]
    dual = [name for name, entry in entries.items() if entry["route"] == "dual"]
    assert dual == [f"transformer_blocks.{i}.attn.to_out.0" for i in (16, 17, 18)]
    kept = quantized.report["kept"]
    assert {f"transformer_blocks.{i}.ff_context.net.0.proj" for i in (12, 13, 18)} < set(kept)
    assert len(kept) == 19 * 4 + 2 and not any(".ff" in name for name in entries)
    assert entries["single_transformer_blocks.1.proj_mlp"]["route"] == "none"
    assert entries["single_transformer_blocks.1.attn.to_q"]["route"] == "hadamard"


def test_flux_preset_quantizes_feed_forward_layers_with_wide_activations(flux):
    _, quantized = quantize_with(flux, "flux", bits="w4a4")
    entries = quantized.report["layers"]
    assert not quantized.report["kept"]
    for name, entry in entries.items():
        wide = ".ff" in name or ".proj_mlp" in name or ".proj_out" in name
        assert entry["activation_bits"] == quantized.layers[name].transform.bits == (8 if wide else 4)
    groups = {name: layer.group for name, layer in quantized.layers.items()}
    block = "single_transformer_blocks.0"
    assert groups[f"{block}.attn.to_q"] == groups[f"{block}.attn.to_k"] is not None
    assert groups[f"{block}.proj_mlp"] is None, "it rounds the same tensor to another width"


@pytest.mark.parametrize("preset", ["wan", "cogvideox", "hunyuan_video"])
def test_video_presets(preset):
    """W4A8, Hadamard blocks everywhere, eight prompts."""
    chosen = lrq_dit.PRESETS[preset]
    assert (chosen.routing, chosen.hadamard, chosen.bits, chosen.prompts) == ("hadamard", "block", "w4a8", 8)
    assert not (chosen.dual or chosen.keep or chosen.plain)


# ---------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"bits": "w2a8"}, "bits must be one of w4a8, w3a8, w4a6, w3a6, w4a4, w3a4, got 'w2a8'"),
        ({"mode": "released"}, "mode must be one of corrected, paper, got 'released'"),
        ({"grid": "tiny"}, "grid must be one of small, full, got 'tiny'"),
        (
            {"routing": "best"},
            "routing must be one of measured, paper, listed, hadamard, dual, none, got 'best'",
        ),
        ({"hadamard": "all"}, "hadamard must be one of block, full, got 'all'"),
        ({"preset": "sora"}, "preset must be one of pixart_alpha_released, .*, got 'sora'"),
        ({"routing": "listed"}, "routing 'listed' needs a preset that lists layers, got one without"),
        ({"alpha": 1.5}, "alpha must be None or 0 to 1, got 1.5"),
        ({"clip": 0.0}, "clip must be above 0 and at most 1, got 0.0"),
        ({"steps": -1}, "steps must be at least 0, got -1"),
    ],
)
def test_bad_settings(model, layers, calibration, settings, message):
    with pytest.raises(ValueError, match=f"^lrq_dit: {message}$"):
        lrq_dit.quantize(model, calibration, layers=layers, **settings)


@pytest.mark.parametrize("routing", ["hadamard", "measured"])
def test_bad_weights_are_named(routing):
    model = small_model()
    found = list(linear_layers(model, layers=r"\d"))
    statistics = calibrate(model, lambda: model(inputs()), layers=found)
    model[3].weight[5, 6] = float("nan")
    with pytest.raises(ValueError, match="^3: the weight must be finite"):
        lrq_dit.quantize(model, statistics, layers=found, routing=routing)


def test_uncalibrated_layers_are_named(model, layers, calibration):
    with pytest.raises(KeyError, match="3 must have been calibrated"):
        lrq_dit.quantize(model, Calibration({"1": calibration["1"]}), layers=layers, routing="hadamard")
    with pytest.raises(KeyError, match="1 must have been calibrated"):
        lrq_dit.quantize(model, None, layers=layers)
