"""ViDiT-Q: each line of section 9 of its specification, then what the method adds around them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases.quant import Tiny, layers_of, normal, opensora_layers, snr, with_outliers

from vdit_ext import ops
from vdit_ext.quant import InputTransform, QuantLayer, QuantLinear, apply, calibrate
from vdit_ext.quant.budget import Unit, choose
from vdit_ext.quant.hadamard import CORES, hadamard, multiply_blocks, random_signs
from vdit_ext.quant.layers import LinearInfo
from vdit_ext.quant.transform import channel_mask
from vdit_ext.quant.uniform import round_weight, to_int4, to_int8, to_planes
from vdit_ext.quant.vidit_q import PRESETS, average_bits, nearest_outputs, quantize, released_map
from vdit_ext.testing import assert_close

MODEL_SIZES = (1152, 1536, 1920, 3072, 4608, 5120, 8960, 13824)


# ---------------------------------------------------------------------------------------------------------
# Section 9
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_activation_error_is_at_most_half_a_step(dtype):
    x = with_outliers(64, 200, count=3, factor=30, seed=0).to(dtype)
    codes, scale, _ = ops.quantize_rows(x)
    error = (codes.double() * scale.double()[:, None] - x.double()).abs()
    assert (error <= scale.double()[:, None] * (0.5 + 1e-5)).all()


def test_zero_row_has_zero_codes_and_a_finite_scale():
    x = normal(4, 96)
    x[2] = 0
    codes, scale, total = ops.quantize_rows(x)
    assert not codes[2].any() and total[2] == 0 and scale.isfinite().all()
    weight = to_int4(round_weight(normal(32, 96, seed=1), 4))
    y = QuantLinear(QuantLayer(weight))(x)
    assert y.isfinite().all() and not y[2].any()


def test_rows_do_not_depend_on_the_batch_bitwise():
    x = with_outliers(40, 256, count=3, factor=30, seed=2)
    transform = InputTransform(hadamard=128, signs=random_signs(256, 0))
    layer = QuantLinear(QuantLayer(to_int4(round_weight(normal(48, 256, seed=1), 4)), None, transform))
    whole = layer(x)
    for rows in (slice(0, 1), slice(7, 24), slice(39, 40)):
        assert torch.equal(layer(x[rows]), whole[rows])
    assert torch.equal(layer(x.view(2, 20, 256)).flatten(0, 1), whole)


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_weight_error_is_at_most_half_a_step(bits):
    weight = normal(64, 300, seed=3) + normal(64, 1, seed=4)
    weight[5] = weight[5].abs() + 1  # one sign only: the grid reaches down to 0
    grid = round_weight(weight, bits)
    assert ((grid.dequantize() - weight).abs() <= grid.scale[:, None] * (0.5 + 1e-4)).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_zero_is_a_code_of_the_asymmetric_grid(bits):
    weight = normal(64, 300, seed=5) + 2 * normal(64, 1, seed=6)
    weight[:, 7] = 0
    weight[9] = 0
    grid = round_weight(weight, bits)
    assert not grid.dequantize()[:, 7].any() and not grid.dequantize()[9].any()
    assert grid.scale.isfinite().all() and (grid.scale > 0).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_zero_is_a_code_of_rows_of_one_sign(bits):
    above = normal(4, 300).abs() + 1
    zero = round_weight(torch.cat([above, -above]), bits).zero  # the code -zero stands for 0
    assert ((-zero >= 0) & (-zero <= 2**bits - 1)).all()


def test_pack_and_unpack_are_inverse_for_every_code_at_every_place():
    n, k = 33, 70  # ragged both ways
    base = torch.arange(n)[:, None] * 5 + torch.arange(k)[None] * 3
    for code in range(16):
        codes = ((base + code) % 16).to(torch.uint8)
        assert torch.equal(ops.unpack_w4(ops.pack_w4(codes), n, k), codes)


def test_tiles_are_laid_out_by_qserves_formula():
    # Twice, for an index takes two nibbles: rows as codes, then columns.
    n, k = np.meshgrid(np.arange(32), np.arange(32), indexing="ij")
    for codes in (n % 16, k % 16, n // 16 * 2 + k // 16):
        tile = ops.pack_w4(torch.from_numpy(codes.astype(np.uint8)))[0, 0].numpy()
        for byte in range(512):
            lane, j = divmod(byte, 16)
            column = 16 * (j // 8) + 4 * (lane % 4) + j % 4
            row = 8 * (j // 4 % 2) + lane // 4
            assert tile[byte] & 15 == codes[row, column]
            assert tile[byte] >> 4 == codes[row + 16, column]


def epilogue_operands():
    x = with_outliers(64, 288, count=3, factor=40, seed=7)
    weight = to_int4(round_weight(normal(96, 288, seed=8, std=0.03) + 0.01, 4))
    return x, weight, ops.quantize_rows(x)


def test_epilogue_equals_dequantize_then_multiply():
    x, weight, (codes, scale, total) = epilogue_operands()
    raw = ops.w4a8_linear(codes, scale, total, weight.tiles, weight.scale, weight.zero, out_dtype=torch.int32)
    zero, step = weight.zero.double(), weight.scale.double()
    y = (raw.double() + zero * total.double()[:, None]) * (scale.double()[:, None] * step)
    integers = ops.unpack_w4(weight.tiles, *(weight.out_features, weight.in_features)).double() + zero[:, None]
    exact = (codes.double() * scale.double()[:, None]) @ (integers * step[:, None]).T
    assert (y - exact).abs().max() <= 1e-13 * exact.abs().max()
    y = ops.w4a8_linear(codes, scale, total, weight.tiles, weight.scale, weight.zero, out_dtype=torch.float32)
    assert_close(y, exact.float(), what="fp32 epilogue")


def test_epilogue_with_sums_from_before_quantization_fails_that():
    x, weight, (codes, scale, total) = epilogue_operands()
    before = (x.double().sum(1) / scale.double()).round().to(torch.int32)
    rest = (weight.tiles, weight.scale, weight.zero)
    exact = (codes.double() * scale.double()[:, None]) @ weight.dequantize().double().T
    wrong = ops.w4a8_linear(codes, scale, before, *rest, out_dtype=torch.float32)
    with pytest.raises(AssertionError, match="absolute error"):
        assert_close(wrong, exact.float())
    right = ops.w4a8_linear(codes, scale, total, *rest, out_dtype=torch.float32)
    true = x.double() @ weight.dequantize().double().T
    assert snr(right, true) > snr(wrong, true) + 6


@pytest.mark.parametrize("size", (*CORES, 40, 144, 16, 32, 64, 128))
def test_hadamard_core_is_orthogonal(size):
    matrix = hadamard(size)
    assert (matrix.abs() == 1).all()
    gram = matrix @ matrix.T / size
    assert (gram - torch.eye(size)).abs().max() < 1e-5
    assert (multiply_blocks(torch.eye(size), size) - matrix / size**0.5).abs().max() < 1e-6


@pytest.mark.parametrize("size", MODEL_SIZES)
def test_full_rotation_of_model_sizes_is_orthogonal(size):
    rows = torch.zeros(48, size)
    rows[torch.arange(48), torch.randperm(size, generator=torch.Generator().manual_seed(0))[:48]] = 1
    turned = InputTransform(hadamard=size, signs=random_signs(size, 1)).rotate(rows)
    assert (turned.abs() * size**0.5 - 1).abs().max() < 1e-3  # spread evenly over all channels
    assert (turned @ turned.T - torch.eye(48)).abs().max() < 1e-5


@pytest.mark.parametrize("size", [128, 0], ids=["block", "full"])
@pytest.mark.parametrize("channels", MODEL_SIZES)
def test_mask_and_rotation_leave_the_product_as_it_is(channels, size):
    x, weight = with_outliers(16, channels, count=6, factor=60, seed=9), normal(24, channels, seed=10, std=0.03)
    mask = channel_mask(x.abs().amax(0), [weight], 0.5)
    transform = InputTransform(mask, size or channels, random_signs(channels, 2))
    y = transform.rows(x).double() @ transform.weight(weight).double().T
    exact = x.double() @ weight.double().T
    assert (y - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_the_mask_of_a_group_is_that_of_its_weights_joined():
    amax = normal(96, seed=11).abs() + 0.1
    weights = [normal(24, 96, seed=12), normal(8, 96, seed=13, std=3), normal(40, 96, seed=14)]
    joined = channel_mask(amax, [torch.cat(weights)], 0.5)
    assert torch.equal(channel_mask(amax, weights, 0.5), joined)
    assert all(not torch.equal(channel_mask(amax, [weight], 0.5), joined) for weight in weights)


@pytest.mark.parametrize("planes", [False, True], ids=["int4", "planes"])
@pytest.mark.parametrize("seed", range(5))
def test_mask_with_rotation_gains_six_decibels_over_either(seed, planes):
    x = with_outliers(256, 1152, count=6, factor=60, seed=seed)
    weight = normal(512, 1152, seed=seed + 100, std=0.03)
    exact = x.double() @ weight.double().T
    mask, signs = channel_mask(x.abs().amax(0), [weight], 0.5), random_signs(1152, seed)
    found = {}
    for name, transform in {
        "none": InputTransform(),
        "mask": InputTransform(mask),
        "rotation": InputTransform(hadamard=128, signs=signs),
        "both": InputTransform(mask, 128, signs),
    }.items():
        turned = transform.weight(weight)
        stored = to_planes(round_weight(turned, 8)) if planes else to_int4(round_weight(turned, 4))
        layer = QuantLinear(QuantLayer(stored, None, transform))
        layer.set_bits(4)
        found[name] = snr(layer(x), exact)
    assert found["both"] >= max(found["mask"], found["rotation"], found["none"]) + 6, found
    assert found["none"] == pytest.approx(17.2, abs=0.8)  # the specification's figures
    assert found["both"] == pytest.approx(28.3, abs=1.0)


def test_nibble_planes_hold_the_8_bit_code():
    grid = round_weight(normal(70, 200, seed=11), 8)
    weight = to_planes(grid)
    high, low = (ops.unpack_w4(plane, 70, 200) for plane in (weight.high, weight.low))
    assert torch.equal(16 * high + low, grid.codes)
    assert torch.equal(weight.dequantize(), to_int8(grid).dequantize())


def test_high_plane_alone_is_within_8_255ths_of_the_range():
    values = normal(70, 200, seed=12)
    weight = to_planes(round_weight(values, 8))
    span = values.amax(1).clamp_min(0) - values.amin(1).clamp_max(0)
    grid_error = (weight.dequantize(4) - weight.dequantize(8)).abs()
    assert (grid_error <= span[:, None] * 8 / 255).all()  # 7.5 steps of the 8-bit grid
    assert ((weight.dequantize(4) - values).abs() <= span[:, None] * (8 / 255 + 1e-6)).all()
    layer, x = QuantLinear(QuantLayer(weight)), normal(16, 200, seed=13)
    layer.set_bits(4)
    codes, scale, _ = ops.quantize_rows(x)
    exact = (codes.double() * scale.double()[:, None]) @ weight.dequantize(4).double().T
    assert_close(layer(x), exact.float(), what="product with the high plane")


@pytest.mark.parametrize("symmetric", [False, True])
def test_rows_of_zeros_stay_so_in_planes_at_either_precision(symmetric):
    values = normal(40, 64, seed=12)
    values[[3, 39]] = 0
    weight = to_planes(round_weight(values, 8, symmetric=symmetric))
    for bits in (8, 4):
        assert not weight.dequantize(bits)[[3, 39]].any() and weight.dequantize(bits)[4].any()
        layer = QuantLinear(QuantLayer(weight))
        layer.set_bits(bits)
        assert not layer(normal(5, 64))[:, [3, 39]].any()


def test_map_of_eights_is_plain_w8a8_bitwise():
    model, x = Tiny(), with_outliers(50, 96, count=2, factor=50, seed=14)
    layers = layers_of(model)
    found = calibrate(model, lambda: model(x), layers=layers)
    plain = {"layers": layers, "alpha": None, "rotation": "none"}
    eights = [{info.name: 8 for info in layers}] * 4
    with apply(model, quantize(model, found, bits="w8a8", **plain)):
        expected = model(x)
    for precision in (eights, "switchable"):  # as a byte each, and in planes
        quantized = quantize(model, found, bits="w4a8-mp", precision=precision, **plain)
        with apply(model, quantized) as applied:
            for step in range(8):
                applied.set_step(step, 8)
                assert torch.equal(model(x), expected)
    formats = {layer.weight.format for layer in quantized.layers.values()}
    assert formats == {"nibble_planes"}


def test_solver_keeps_the_budget_and_never_loses_by_more_of_it():
    rng = np.random.default_rng(0)
    for _ in range(20):
        units = [
            Unit(
                (int(i % 4), f"u{i}"),
                ("content", "quality")[int(rng.integers(2))],
                int(rng.integers(1, 30)),
                float(rng.random()),
            )
            for i in range(24)
        ]
        gain = {unit.key: unit.gain for unit in units}
        cost = {unit.key: unit.cost for unit in units}
        for shares in (None, {"content": 2.0, "quality": 0.5}):
            last = 0.0
            for budget in range(0, sum(cost.values()) + 20, 13):
                chosen = choose(units, budget, shares)
                assert sum(cost[key] for key in chosen) <= budget
                total = sum(gain[key] for key in chosen)
                assert total >= last - 1e-12
                last = total
            assert chosen == set(cost)


@pytest.mark.parametrize("k", [128, 4096, 13824])
@pytest.mark.parametrize("form", ["int8", "int4", "planes"])
def test_sums_match_int64_with_extreme_codes(k, form):
    rng = np.random.default_rng(1)
    x = rng.choice([-127, 127], (5, k)).astype(np.int8)
    x[0], x[1] = 127, -127
    codes = (
        rng.choice([0, 255], (40, k)).astype(np.uint8)
        if form != "int4"
        else rng.choice([0, 15], (40, k)).astype(np.uint8)
    )
    codes[0], codes[1] = codes.max(), 0
    scale, total = torch.ones(5), torch.from_numpy(x.sum(1, dtype=np.int32))
    x_codes, ones, zeros = torch.from_numpy(x), torch.ones(40), torch.zeros(40)
    plane = torch.from_numpy(codes)
    if form == "int8":
        values = codes.astype(np.int64) - 128
        sums = ops.w8a8_linear(
            x_codes, scale, torch.from_numpy(values.astype(np.int8)), ones, out_dtype=torch.int32
        )
    elif form == "int4":
        values = codes.astype(np.int64)
        sums = ops.w4a8_linear(x_codes, scale, total, ops.pack_w4(plane), ones, zeros, out_dtype=torch.int32)
    else:
        values = codes.astype(np.int64) - 128
        high, low = ops.pack_w4(plane >> 4), ops.pack_w4(plane & 15)
        sums = ops.w4a8_linear(x_codes, scale, total, high, ones, zeros, weight_low=low, out_dtype=torch.int32)
    assert np.array_equal(sums.numpy().astype(np.int64), x.astype(np.int64) @ values.T)


# ---------------------------------------------------------------------------------------------------------
# The method
# ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    model, x = Tiny(), with_outliers(300, 96, count=3, factor=30, seed=15)
    return model, x, layers_of(model), calibrate(model, lambda: model(x), layers=layers_of(model))


def error(model, x, quantized) -> float:
    expected = model(x)
    with apply(model, quantized):
        return snr(model(x), expected)


def test_layers_that_read_one_tensor_share_mask_and_signs(tiny):
    model, x, layers, found = tiny
    quantized = quantize(model, found, bits="w4a8", layers=layers).layers
    first = quantized["blocks.0.attn.to_q"]
    assert first.transform.hadamard == 32 and first.group == "blocks.0.qkv"
    for name in ("to_k", "to_v"):
        assert quantized[f"blocks.0.attn.{name}"].transform is first.transform
    other = quantized["blocks.1.attn.to_q"].transform
    assert not torch.equal(other.signs, first.transform.signs)
    assert quantized["blocks.0.up"].group is None


def test_mask_and_rotation_are_off_at_8_bits_and_on_at_4_and_at_6_rotation_alone(tiny):
    model, x, layers, found = tiny
    for layer in quantize(model, found, bits="w8a8", layers=layers).layers.values():
        assert not layer.transform.tensors() and layer.weight.format == "int8"
    for layer in quantize(model, found, bits="w4a8", layers=layers).layers.values():
        assert layer.transform.hadamard == 32 and layer.weight.format == "int4"
    for layer in quantize(model, None, bits="w6a6", layers=layers).layers.values():
        assert layer.transform.hadamard == 32 and layer.transform.channel_scale is None


def test_search_takes_the_transform_with_the_least_output_error(tiny):
    model, x, layers, found = tiny
    weight, rows = model.blocks[0].up.weight, found["blocks.0.up"].rows
    expected = rows @ weight.T
    masks = {
        alpha: None if alpha is None else channel_mask(found["blocks.0.up"].amax, [weight], alpha)
        for alpha in (None, 0.1, 0.5, 0.9)
    }
    candidates = {
        (size, alpha): InputTransform(mask, size, random_signs(96, 0) if size else None)
        for alpha, mask in masks.items()
        for size in (0, 32)
    }

    def output_error(transform):
        layer = QuantLayer(to_int4(round_weight(transform.weight(weight), 4)), None, transform)
        return float((QuantLinear(layer)(rows) - expected).square().sum())

    errors = {key: output_error(transform) for key, transform in candidates.items()}
    for order in (1, -1):
        some = dict(list(candidates.items())[::order])
        best = nearest_outputs(rows, [weight], some, lambda w: round_weight(w, 4).dequantize(), len(rows))
        assert errors[best] <= min(errors.values()) * (1 + 1e-4)


def test_searched_transform_beats_none(tiny):
    model, x, layers, found = tiny
    plain = quantize(model, None, bits="w4a8", layers=layers, alpha=None, rotation="none")
    searched = quantize(model, found, bits="w4a8", layers=layers, rotation="search")
    assert error(model, x, searched) > error(model, x, plain) + 0.5
    # Untrained weights are uniform, which a rotation only widens: the search leaves it out.
    sizes = {group["hadamard"] for group in searched.report["groups"].values()}
    assert 0 in sizes


def test_bias_correction_takes_the_mean_error_away(tiny):
    model, _, layers, found = tiny
    plain = quantize(model, found, bits="w4a8", layers=layers).layers
    corrected = quantize(model, found, bits="w4a8", layers=layers, bias_correction=True).layers
    rows, name = found["blocks.0.up"].rows, "blocks.0.up"
    exact = model.blocks[0].up(rows)
    before, after = ((QuantLinear(some[name])(rows) - exact).mean(0).abs() for some in (plain, corrected))
    assert after.max() < 1e-4 * exact.abs().max() < before.max()
    assert corrected["blocks.0.down"].bias is None
    planes = quantize(model, found, bits="w4a8-mp", precision="switchable", layers=layers, bias_correction=True)
    assert torch.equal(planes.layers[name].bias, plain[name].bias)


def test_presets_and_options_reach_the_layers(tiny):
    model, x, layers, found = tiny
    quantized = quantize(model, found, bits="w4a8", preset="opensora", layers=layers)
    alphas = {group["alpha"] for group in quantized.report["groups"].values()}
    assert alphas == {PRESETS["opensora"]["w4a8"]["alpha"]}
    chosen = quantize(model, found, bits="w4a8", balanced=r".*\.down", alpha=0.3, layers=layers).layers
    rotated = {name for name, layer in chosen.items() if layer.transform.tensors()}
    assert rotated == {"blocks.0.down", "blocks.1.down"}
    full = quantize(model, found, bits="w4a8", rotation="full", alpha=None, layers=layers)
    assert full.layers["blocks.0.up"].transform.hadamard == 96
    assert error(model, x, full) == pytest.approx(
        error(model, x, quantize(model, found, bits="w4a8", rotation="block", alpha=None, layers=layers)), abs=3
    )


def test_six_bits_use_64_codes(tiny):
    model, x, layers, found = tiny
    quantized = quantize(model, found, bits="w6a6", layers=layers)
    layer = quantized.layers["blocks.0.up"]
    assert layer.weight.bits == layer.transform.bits == 6
    assert layer.weight.codes.min() >= -32 and layer.weight.codes.max() <= 31
    eight, four = (
        quantize(model, found, bits=b, layers=layers, alpha=None, rotation="none") for b in ("w8a8", "w4a8")
    )
    assert error(model, x, four) < error(model, x, quantized) < error(model, x, eight)


def test_released_map_has_the_authors_average_bits():
    layers = opensora_layers()
    maps = released_map(layers)
    assert set(maps[0].values()) == {8}
    assert average_bits(layers, [maps[1]]) == pytest.approx(5.6)
    assert average_bits(layers, maps) == pytest.approx(6.2, abs=0.01)
    raised = {name for name in maps[3] if maps[3][name] == 8} - {name for name in maps[2] if maps[2][name] == 8}
    assert {name.rpartition(".")[0] for name in raised} == {"b.23.temporal"}


def test_steps_switch_the_precision_of_planes(tiny):
    model, x, layers, found = tiny
    quantized = quantize(model, found, bits="w4a8-mp", layers=layers)
    assert quantized.report["average_weight_bits"] == pytest.approx(average_bits(layers, released_map(layers)))
    attention, ffn = quantized.layers["blocks.0.attn.to_q"], quantized.layers["blocks.0.up"]
    assert attention.weight.format == "nibble_planes" and ffn.weight.format == "int8"
    assert attention.transform.hadamard and not ffn.transform.tensors()
    with apply(model, quantized) as applied:
        seen = []
        for step in range(8):
            applied.set_step(step, 8)
            seen.append(applied.layers["blocks.0.attn.to_q"].bits)
            assert applied.layers["blocks.0.up"].bits == 8
    assert seen == [8, 8, 4, 4, 4, 4, 4, 4]


def test_hand_written_maps_choose_the_storage(tiny):
    model, x, layers, found = tiny
    always, never = "blocks.0.attn.to_out", "blocks.0.down"
    maps = [{always: 4}, {always: 4, "blocks.0.up": 4}]
    quantized = quantize(model, found, bits="w4a8-mp", precision=maps, layers=layers)
    assert quantized.layers[always].weight.format == "int4"
    assert quantized.layers[never].weight.format == "int8"
    assert quantized.layers["blocks.0.up"].weight.format == "nibble_planes"
    with apply(model, quantized) as applied:
        applied.set_step(1, 2)
        assert {name for name, layer in applied.layers.items() if layer.bits == 4} == {always, "blocks.0.up"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"bits": "w5a8"}, "vidit_q: bits must be one of w8a8, w6a6, w4a8, w4a8-mp, got 'w5a8'"),
        ({"alpha": 1.5, "bits": "w4a8"}, "alpha must be in 0 .. 1, got 1.5"),
        ({"alpha": "best"}, 'alpha must be a number, "auto", "search" or None, got \'best\''),
        ({"rotation": "random"}, "rotation must be one of auto, none, block, full, search, got 'random'"),
        ({"balanced": "("}, "balanced must be a regular expression, got '('"),
        ({"preset": "sora"}, "preset must be one of default, opensora, pixart, dit, got 'sora'"),
        ({"clip": "max"}, "clip one of minmax, mse, got 8 and 'max'"),
        ({"bits": "w4a8-mp", "precision": [{"nowhere": 4}]}, "must name quantized layers, got nowhere"),
        ({"bits": "w4a8-mp", "precision": [{"blocks.0.up": 5}]}, "must be 4 or 8 bits for blocks.0.up, got 5"),
        ({"bits": "w4a8-mp", "precision": []}, "must hold a bit map for each part of the steps, got none"),
        (
            {"bits": "w4a8-mp", "precision": "paper"},
            'must be "released", "switchable" or bit maps, got \'paper\'',
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_bad_arguments_fail_with_a_sentence(tiny, arguments, sentence):
    model, x, layers, found = tiny
    with pytest.raises(ValueError) as caught:
        quantize(model, found, layers=layers, **arguments)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_sizes_without_a_hadamard_matrix_fail_in_full_rotation_and_go_without_in_blocks():
    model = Tiny(dim=88, ffn=24)  # 88 = 11 * 8, 24 = 3 * 8
    x, layers = normal(40, 88, seed=16), layers_of(model)
    found = calibrate(model, lambda: model(x), layers=layers)
    with pytest.raises(ValueError, match=r"^blocks.0.attn.to_q: .* got 88; rotate by blocks instead$"):
        quantize(model, found, bits="w4a8", rotation="full", layers=layers)
    quantized = quantize(model, found, bits="w4a8", layers=layers)
    assert quantized.layers["blocks.0.up"].transform.hadamard == 0
    assert error(model, x, quantized) > 10


def test_layers_that_were_not_calibrated_fail_with_a_sentence(tiny):
    model, x, layers, found = tiny
    some = calibrate(model, lambda: model(x), layers=layers[:3])
    with pytest.raises(KeyError, match="blocks.0.attn.to_out must have been calibrated"):
        quantize(model, some, bits="w4a8", layers=layers)


def test_a_calibration_is_asked_for_where_something_is_searched(tiny):
    model, _, layers, _ = tiny
    for settings in (
        {"bits": "w4a8"},
        {"bits": "w8a8", "alpha": 0.5},
        {"bits": "w8a8", "bias_correction": True},
    ):
        with pytest.raises(KeyError, match="blocks.0.attn.to_q must have been calibrated"):
            quantize(model, None, layers=layers, **settings)
    assert quantize(model, None, bits="w8a8", layers=layers).layers


@pytest.mark.parametrize("bits", ["w8a8", "w4a8"])
def test_weights_that_are_not_finite_fail_with_the_layers_name(tiny, bits):
    model, x, _, found = tiny
    broken = Tiny()
    broken.blocks[1].up.weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"^blocks.1.up: the weight must be finite"):
        quantize(broken, found, bits=bits, layers=layers_of(broken))


def test_channels_beyond_exact_int32_fail_with_the_layers_name():
    model = torch.nn.Sequential(torch.nn.Linear(65552, 1, bias=False))
    info = LinearInfo("0", "0", "self", "0", 65552, 1)
    with pytest.raises(
        ValueError, match=r"^0: input channels must be at most 65536, .* got 65552; keep this layer"
    ):
        quantize(model, None, bits="w8a8", layers=[info])
