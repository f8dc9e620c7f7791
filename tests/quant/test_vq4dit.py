"""VQ4DiT. Tests named ``test_property_*`` are the lines of section 9 of its specification."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from vdit_ext import ops
from vdit_ext.quant import (
    InputTransform,
    LinearInfo,
    QuantLayer,
    QuantLinear,
    apply,
    linear_layers,
    vq4dit,
    vq_training,
)
from vdit_ext.quant import kmeans_vq as kmeans
from vdit_ext.quant.accounting import MIB, LinearSize, dit_linears, vq_size
from vdit_ext.quant.block_calls import Strata, record_calls, spare_memory
from vdit_ext.quant.kmeans_vq import (
    FORMATS,
    VQFormat,
    clamp_codewords,
    kmeans_vq,
    nearest_words,
    row_scales,
    split_words,
)
from vdit_ext.quant.soft_vq import SoftWeight, first_logits, ratio_loss, soft_words
from vdit_ext.quant.uniform import round_weight
from vdit_ext.testing import generator

both = pytest.mark.parametrize("bits", ["w2", "w3"])


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed))


def snr(wanted: torch.Tensor, came: torch.Tensor) -> float:
    """Decibels."""
    wanted, came = wanted.detach(), came.detach()
    return float(10 * torch.log10(wanted.square().mean() / (wanted - came).square().mean()))


# --- sizes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "share_qkv", "mib"),
    [("w2", False, 162.08), ("w3", False, 241.14), ("w2", True, 161.86), ("w3", True, 241.12)],
)
def test_property_size_of_dit_xl_2_is_the_papers_to_a_hundredth(bits, share_qkv, mib):
    size = vq_size(dit_linears(share_qkv=share_qkv), FORMATS[bits], codebook_bits=32)
    assert size.total / MIB == pytest.approx(mib, abs=0.01)


def test_parts_of_the_papers_size():
    size = vq_size(dit_linears(), FORMATS["w2"])
    assert sum(linear.weights for linear in dit_linears()) == 668_860_416
    assert size.full / MIB == pytest.approx(2553.35, abs=0.01)
    assert size.codes / MIB == pytest.approx(159.47, abs=0.01)
    assert size.codebooks / MIB == pytest.approx(0.766, abs=0.001)
    assert size.biases / MIB == pytest.approx(1.846, abs=0.001)
    assert size.ratio == pytest.approx(15.7, abs=0.1)


def test_codebooks_of_fewer_bits_and_row_scales_are_counted():
    linear = LinearSize(64, 32, bias=False)
    size = vq_size([linear], VQFormat(4, 16, 2), codebook_bits=8, row_scale_bits=16)
    assert (size.codes, size.codebooks, size.row_scales, size.biases) == (64 * 8 * 4 / 8, 64, 128, 0)


# --- words, codes, k-means -----------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("shape", [(32, 64), (33, 68), (1, 4), (100, 132)], ids=str)
def test_property_decode_of_encode_is_the_chosen_codewords_bitwise(bits, shape):
    form, weight = FORMATS[bits], gaussian(*shape)
    words = split_words(weight, form.dim)
    book = gaussian(form.codewords, form.dim, seed=1)
    indices = nearest_words(words, book)[0][:, 0]
    tiles = ops.pack_vq(indices.reshape(shape[0], -1), form.dim)
    assert torch.equal(ops.unpack_vq(tiles, *shape).long().flatten(), indices)
    assert torch.equal(ops.vq_dequantize(tiles, book, *shape), book[indices].reshape(shape))


@pytest.mark.parametrize("dim", [4, 2])
def test_property_the_tile_formula_is_a_bijection(dim):
    """32 rows of 16 quads: each lands at its own place of the tile, at that of the formula."""
    quads = torch.arange(32 * 16).reshape(32, 16)
    indices = quads % 256 if dim == 4 else torch.stack([quads % 64, quads // 64 % 64], -1).flatten(1)
    tile = ops.pack_vq(indices, dim).flatten().tolist()
    for lane in range(32):
        for j in range(16):
            n, k = 8 * ((j % 8) // 2) + lane // 4, 32 * (j // 8) + 16 * (j % 2) + 4 * (lane % 4)
            if dim == 4:
                assert tile[16 * lane + j] == indices[n, k // 4]
            else:
                bits = int.from_bytes(bytes(tile[24 * lane : 24 * lane + 24]), "little") >> 12 * j
                assert [bits & 63, bits >> 6 & 63] == indices[n, k // 2 : k // 2 + 2].tolist()
    assert torch.equal(ops.unpack_vq(ops.pack_vq(indices, dim), 32, 64).long(), indices)


@both
def test_property_candidates_are_the_nearest_codewords_sorted_and_begin_with_the_kmeans_code(bits):
    form = FORMATS[bits]
    words = gaussian(3000, form.dim)
    found = kmeans_vq(words, form.codewords, iterations=5)
    candidates, distances = nearest_words(words, found.codebook, 4)
    every = (words.double()[:, None] - found.codebook.double()).norm(dim=-1)
    assert torch.equal(candidates[:, 0], found.indices)
    assert (distances.diff(dim=1) >= 0).all()
    # A codeword that is nearer by less than fp32 can tell may come later.
    torch.testing.assert_close(distances.double(), every.topk(4, largest=False).values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(distances.double(), every.gather(1, candidates), atol=1e-6, rtol=1e-6)


def test_property_kmeans_error_never_rises():
    errors = kmeans_vq(gaussian(4096, 4), 64, iterations=30, tolerance=0).errors
    assert len(errors) == 31 and errors[-1] < 0.8 * errors[0]
    assert all(later <= before * (1 + 1e-6) for before, later in zip(errors, errors[1:], strict=False))


def test_property_more_codewords_than_distinct_words_give_no_error_and_no_nan():
    words = gaussian(5, 4).repeat(40, 1)
    found = kmeans_vq(words, 16)
    assert found.codebook.isfinite().all()
    assert torch.equal(found.codebook[found.indices], words)
    assert found.errors[-1] == 0


def test_a_weight_of_zeros_is_kept():
    found = kmeans_vq(torch.zeros(64, 4), 16)
    assert not found.codebook.any() and found.errors[-1] == 0


def test_kmeans_stops_once_nothing_moves():
    assert len(kmeans_vq(gaussian(8, 4), 8, iterations=100).errors) == 2


def test_kmeans_stops_where_a_pass_hardly_pays():
    words = gaussian(20000, 4)
    early, late = kmeans_vq(words, 64), kmeans_vq(words, 64, tolerance=0)
    assert len(early.errors) < len(late.errors) == 101
    assert late.errors[-1] < early.errors[-1] < 1.005 * late.errors[-1]


def test_many_words_are_fitted_by_some_of_them_and_once_by_all(monkeypatch):
    words = gaussian(20000, 4)
    every = kmeans_vq(words, 16)
    monkeypatch.setattr(kmeans, "LLOYD_WORDS", 5000)
    some = kmeans_vq(words, 16)
    assert len(some.errors) == 2 and some.errors[1] < some.errors[0] < 1.03 * every.errors[-1]
    assert torch.equal(nearest_words(words, some.codebook)[0][:, 0], some.indices)


def test_many_words_are_seeded_from_some_of_them(monkeypatch):
    words = gaussian(6000, 4)
    every = kmeans_vq(words, 64, iterations=20)
    monkeypatch.setattr(kmeans, "SEED_WORDS", 1000)
    some, again = (kmeans_vq(words, 64, iterations=20) for _ in range(2))
    assert torch.equal(some.codebook, again.codebook) and not torch.equal(some.codebook, every.codebook)
    assert some.errors[-1] < 1.03 * every.errors[-1]


def test_small_layers_get_fewer_codewords():
    assert [clamp_codewords(256, words) for words in (1, 7, 8, 1023, 1024, 10**6)] == [1, 1, 2, 128, 256, 256]


def test_words_must_divide_the_input_features():
    with pytest.raises(ValueError, match="a multiple of the word length 4, got 66; leave this layer out"):
        split_words(gaussian(8, 66), 4)


@both
def test_property_snr_floors_on_gaussian_weights(bits):
    form, weight = FORMATS[bits], gaussian(512, 512)
    words = split_words(weight, form.dim)
    found = kmeans_vq(words, form.codewords, iterations=40)
    came = snr(words, found.codebook[found.indices])
    assert came >= {"w2": 10.0, "w3": 15.0}[bits]
    if bits == "w2":
        # Grids in which 0 is a code, as integer formats have; one with a free offset reaches 9.2 dB.
        assert came >= snr(weight, round_weight(weight, 2, clip="mse").dequantize()) + 1.5


def test_row_scales_help_rows_of_different_spread():
    weight = gaussian(256, 256) * torch.exp(0.5 * gaussian(256, 1, seed=1))

    def quality(scale):
        words = split_words(weight / scale, 4)
        found = kmeans_vq(words, 256, iterations=10)
        return snr(weight, found.codebook[found.indices].reshape(weight.shape) * scale)

    assert quality(row_scales(weight)[:, None]) > quality(torch.ones(256, 1)) + 0.8
    assert torch.equal(row_scales(torch.zeros(2, 8)), torch.ones(2))


@both
@pytest.mark.parametrize("tails", [False, True], ids=["gaussian", "t4"])
def test_property_an_int8_codebook_loses_at_most_a_fifth_of_a_decibel(bits, tails):
    weight = gaussian(256, 256)
    if tails:  # Student's t with four degrees of freedom
        weight = weight / gaussian(256, 256, 4, seed=1).square().mean(-1).sqrt()
    layer = one_layer(weight, bits, codebook_dtype="float32")
    exact, rounded = layer.weight.dequantize(), layer.weight.to_int8().dequantize()
    assert snr(weight, rounded) >= snr(weight, exact) - 0.2


def one_layer(weight: torch.Tensor, bits: str, **settings) -> QuantLayer:
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    model[0].weight.data = weight
    settings = {"iterations": 10} | settings
    return vq4dit.quantize_kmeans(model, bits=bits, layers=[info_of(model)], **settings).layers["0"]


def info_of(model: nn.Sequential) -> LinearInfo:
    return LinearInfo("0", "0", "self", "0", model[0].in_features, model[0].out_features)


# --- products ------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("rows", [0, 1, 5, 130])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=["bf16", "int8"])
def test_property_the_product_equals_decoding_and_multiplying(bits, rows, dtype):
    """Exact in int32 for int8, within 1e-3 in bf16; 40 outputs are no multiple of 32."""
    weight = one_layer(gaussian(40, 128), bits).weight
    weight = weight.to_int8() if dtype == torch.int8 else weight
    size = (weight.out_features, weight.in_features)
    if dtype == torch.int8:
        x = torch.randint(-127, 128, (rows, 128), generator=generator(2), dtype=torch.int8)
        came = ops.vq_linear(x, weight.codes, weight.codebook, 40, out_dtype=torch.int32)
        decoded = ops.vq_dequantize(weight.codes, weight.codebook, *size)
        assert torch.equal(came.long(), x.long() @ decoded.long().T)
        return
    x, book = gaussian(rows, 128, seed=2).to(dtype), weight.codebook.to(dtype)
    came = ops.vq_linear(x, weight.codes, book, 40, out_dtype=torch.float32)
    wanted = x.double() @ ops.vq_dequantize(weight.codes, book, *size).double().T
    assert came.shape == (rows, 40)
    torch.testing.assert_close(came.double(), wanted, rtol=1e-3, atol=1e-3 * 128**0.5)


# --- soft assignments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["inverse_distance", "uniform"])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_property_ratios_sum_to_one(init, count):
    _, distances = nearest_words(gaussian(500, 4), gaussian(16, 4, seed=1), count)
    ratios = first_logits(distances, init).softmax(-1)
    torch.testing.assert_close(ratios.sum(-1), torch.ones(500))
    assert (ratios.diff(dim=1) <= 1e-6).all(), "a nearer codeword never has the smaller ratio"


def test_property_two_candidates_begin_with_inverse_distance_weights():
    _, distances = nearest_words(gaussian(2000, 4), gaussian(16, 4, seed=1), 2)
    ratios = first_logits(distances).softmax(-1)
    near, far = distances.unbind(1)
    torch.testing.assert_close(ratios[:, 0], far / (near + far), atol=1e-4, rtol=0)


def test_property_a_word_that_is_a_codeword_begins_decided():
    distances = torch.tensor([[0.0, 0.7], [0.0, 0.0]])
    ratios = first_logits(distances).softmax(-1)
    assert ratios[0, 0] > 0.9999
    assert ratios.isfinite().all(), "codewords that repeat"


def test_property_gradients_of_the_soft_weight_match_finite_differences():
    book, logits = gaussian(8, 4).double(), gaussian(20, 3, seed=1).double()
    candidates = torch.stack([torch.randperm(8, generator=generator(i))[:3] for i in range(20)])
    book.requires_grad_(True), logits.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda c, z: soft_words(c, candidates, z), (book, logits), atol=1e-6)
    naive = (logits.softmax(-1)[..., None] * book[candidates]).sum(1)
    torch.testing.assert_close(soft_words(book, candidates, logits), naive)


def test_property_the_ratio_loss_is_zero_when_decided_and_greatest_when_even():
    open_words = torch.zeros(3, dtype=torch.bool)
    even = ratio_loss(torch.zeros(3, 2), open_words)
    assert ratio_loss(torch.tensor([[1e4, 0.0]] * 3), open_words) == 0
    assert even == pytest.approx(0.5)
    for seed in range(20):
        assert ratio_loss(gaussian(3, 2, seed=seed), open_words) <= even
    assert ratio_loss(torch.zeros(3, 2), ~open_words) == 0, "frozen words do not count"
    half = torch.tensor([True, False, False])
    assert ratio_loss(torch.zeros(3, 2), half) == pytest.approx(0.5)


def soft_weight(seed: int = 0, **changes) -> SoftWeight:
    words, book = split_words(gaussian(8, 32, seed=seed), 4), gaussian(16, 4, seed=seed + 1)
    return SoftWeight(words, (8, 32), book.requires_grad_(True), **changes)


def test_property_frozen_choices_never_change():
    soft = soft_weight()
    with torch.no_grad():
        soft.logits[:10] = torch.tensor([0.0, 9.0])
    soft.freeze(0.99)
    frozen, kept = soft.frozen.clone(), soft.chosen()
    assert frozen[:10].all() and not frozen.all()
    optimizer = torch.optim.RMSprop([soft.logits], lr=5e-2, alpha=0.9)
    for step in range(60):
        target = gaussian(8, 32, seed=100 + step)
        (gradient,) = torch.autograd.grad((soft.weight() - target).square().sum(), soft.logits)
        soft.logits.grad = torch.where(soft.frozen[:, None], 0, gradient)
        optimizer.step()
        soft.freeze(0.99)
        assert torch.equal(soft.chosen()[frozen], kept[frozen])
        assert soft.frozen[frozen].all()
    assert not torch.equal(soft.chosen(), kept), "others are free to change"


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "row_scale"])
def test_property_after_hardening_soft_and_hard_forward_agree_bitwise(scaled):
    scale = gaussian(8, seed=5).abs() + 0.1 if scaled else None
    soft = soft_weight(count=3, row_scale=scale)
    assert not torch.equal(soft.weight(), soft.weight(hard=True))
    soft.harden()
    soft.hard = False  # so that the soft path runs
    assert soft.frozen_share == 1
    assert torch.equal(soft.weight(), soft.weight(hard=True))


# --- the toy layer of section 9 ------------------------------------------------------------------------------


class Toy:
    """A 64 x 64 linear, and inputs whose spectrum decays by 0.85 a direction."""

    def __init__(self, seed: int) -> None:
        draws = generator(seed)
        self.model = nn.Sequential(nn.Linear(64, 64, bias=False))
        self.model[0].weight.data = 0.05 * torch.randn(64, 64, generator=draws)
        turn = torch.linalg.qr(torch.randn(64, 64, generator=draws))[0]
        spread = 0.85 ** (torch.arange(64) / 2)
        self.draw = lambda rows: torch.randn(rows, 64, generator=draws) * spread @ turn.T
        self.unseen = self.draw(4096)
        self.layers = [info_of(self.model)]

    def run(self) -> None:
        for _ in range(32):
            self.model(self.draw(64))

    def error(self, quantized) -> float:
        weight = quantized.layers["0"].weight.dequantize()
        return float((self.unseen @ (weight - self.model[0].weight.detach()).T).square().mean())


@pytest.mark.parametrize("seed", range(3))
def test_property_calibrated_assignments_halve_the_error_of_kmeans(seed, monkeypatch):
    """16 words of 4, 400 + 400 RMSprop steps; at most 0.6 x what moving the codebook alone reaches."""
    monkeypatch.setitem(FORMATS, "toy", VQFormat(4, 16, 2))
    toy = Toy(seed)
    common = {"bits": "toy", "layers": toy.layers, "seed": seed, "codebook_dtype": "float32"}
    plain = toy.error(vq4dit.quantize_kmeans(toy.model, **common))
    calibrated = toy.error(vq4dit.quantize(toy.model, toy.run, **common))
    only_codebook = {"candidates": 1, "steps": 0, "codebook_steps": 800}
    codebook = toy.error(vq4dit.quantize(toy.model, toy.run, **common, **only_codebook))
    assert codebook < plain
    assert calibrated <= 0.5 * plain
    assert calibrated <= 0.6 * codebook


SHORT = {"steps": 6, "codebook_steps": 4, "iterations": 3, "calls": 6}


def test_two_phase_codebooks_stay_until_assignments_are_hard():
    toy = Toy(0)
    kept = dict(bits="w2", layers=toy.layers, codebook_dtype="float32", iterations=3)
    plain = vq4dit.quantize_kmeans(toy.model, **kept).layers["0"].weight.codebook
    changes = {"steps": 6, "codebook_steps": 0, "calls": 6}
    two = vq4dit.quantize(toy.model, toy.run, codebooks="two_phase", **changes, **kept)
    joint = vq4dit.quantize(toy.model, toy.run, codebooks="joint", **changes, **kept)
    assert torch.equal(two.layers["0"].weight.codebook, plain)
    assert not torch.equal(joint.layers["0"].weight.codebook, plain)


def test_the_gate_minimises_distortion_alone_while_the_ratio_loss_is_lowest():
    gate = vq4dit.Settings(schedule="gate")
    assert vq_training.ratio_factor(gate, 3, 0.4, 0.4) == 0
    assert vq_training.ratio_factor(gate, 3, 0.5, 0.4) == 1
    ramp = vq4dit.Settings(steps=10, ratio_weight=1.0)
    assert [vq_training.ratio_factor(ramp, step, 0.5, 0.4) for step in (0, 5)] == [0, 0.5]


def test_a_block_that_calibration_makes_worse_keeps_kmeans():
    toy = Toy(0)
    common = {"layers": toy.layers, "codebook_dtype": "float32"}
    wild = SHORT | {"codebook_rate": 30.0}
    quantized = vq4dit.quantize(toy.model, toy.run, **common, **wild)
    assert quantized.report["blocks"]["0"]["kept"] == "kmeans"
    plain = vq4dit.quantize_kmeans(toy.model, **common, iterations=3)
    for name in ("codes", "codebook"):
        assert torch.equal(getattr(quantized.layers["0"].weight, name), getattr(plain.layers["0"].weight, name))


# --- whole models --------------------------------------------------------------------------------------------

diffusers = pytest.importorskip("diffusers")


def tiny_dit(seed: int = 0):
    torch.manual_seed(seed)
    config = dict(num_attention_heads=2, attention_head_dim=16, in_channels=3, num_layers=2, sample_size=8)
    return diffusers.DiTTransformer2DModel(**config, num_embeds_ada_norm=5).eval()


def sampler(model, steps: int = 6):
    """A run: steps of the model on noise, with guidance as a doubled batch."""

    def run():
        x = gaussian(4, 3, 8, 8)
        for step in range(steps):
            time = torch.full((4,), 999 - 100 * step)
            x = x - 0.1 * model(x, time, torch.tensor([1, 2, 5, 5])).sample[:, :3]

    return run


def quantize_dit(model, **changes):
    return vq4dit.quantize(model, sampler(model), **(SHORT | changes))


def forward(model) -> torch.Tensor:
    return model(gaussian(2, 3, 8, 8, seed=9), torch.tensor([10, 500]), torch.tensor([0, 5])).sample


@both
def test_a_quantized_dit_runs_and_comes_back(bits):
    model = tiny_dit()
    before, full = copy.deepcopy(model.state_dict()), forward(model)
    quantized = quantize_dit(model, bits=bits)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with apply(model, quantized) as applied:
        assert all(isinstance(layer, QuantLinear) for layer in applied.layers.values())
        came = forward(model)
    assert not torch.equal(came, full) and snr(full, came) > 3
    assert torch.equal(forward(model), full)


@pytest.mark.parametrize("codebook", ["float16", "int8"])
def test_all_ways_of_serving_give_the_same_result(codebook):
    model = tiny_dit()
    quantized = quantize_dit(model, codebook_dtype=codebook)
    found = {}
    for mode in vq4dit.SERVING:
        with apply(model, vq4dit.serve(quantized, mode, torch.float32)):
            found[mode] = forward(model)
    for mode, came in found.items():
        torch.testing.assert_close(came, found["auto"], atol=1e-4, rtol=1e-4, msg=mode)
    with pytest.raises(ValueError, match="mode must be one of fused, scratch, auto, resident, got 'slow'"):
        vq4dit.serve(quantized, "slow")


def test_a_served_layer_survives_its_config():
    layer = one_layer(gaussian(40, 64), "w2")
    for mode in vq4dit.SERVING:
        served = vq4dit.serve(vq4dit.QuantizedModel("vq4dit", {"0": layer}), mode).layers["0"]
        again = QuantLayer.from_tensors(served.config(), served.tensors())
        assert type(again.weight) is type(served.weight) and again.config() == served.config()
        torch.testing.assert_close(
            again.weight.dequantize(),
            layer.weight.dequantize(),
            atol=0.02,
            rtol=0.01 if mode == "resident" else 0,
        )


@pytest.mark.parametrize("mode", ["block", "end_to_end"])
def test_property_the_same_seed_gives_the_same_codes(mode):
    first, again, other = (quantize_dit(tiny_dit(), mode=mode, seed=seed, candidates=3) for seed in (1, 1, 2))
    names = list(first.layers)
    for name in names:
        mine, same = (q.layers[name].tensors() for q in (first, again))
        assert all(torch.equal(mine[key], same[key]) for key in mine)
    assert first.report == again.report
    assert any(not torch.equal(first.layers[n].weight.codes, other.layers[n].weight.codes) for n in names)


def test_calibration_brings_blocks_closer_than_kmeans():
    model = tiny_dit()
    settings = {"steps": 60, "codebook_steps": 40, "calls": 12}
    quantized = quantize_dit(model, **settings)
    assert len(quantized.report["blocks"]) == 2
    for report in quantized.report["blocks"].values():
        assert report["calibrated"] < 0.9 * report["kmeans"]


def test_end_to_end_calibration_brings_the_model_closer_than_kmeans():
    model = tiny_dit()
    full = forward(model)
    settings = {"steps": 60, "codebook_steps": 40, "calls": 12, "iterations": 3}
    found = {}
    for name, quantized in {
        "kmeans": vq4dit.quantize_kmeans(model, iterations=3),
        "end_to_end": quantize_dit(model, mode="end_to_end", **settings),
    }.items():
        with apply(model, quantized):
            found[name] = snr(full, forward(model))
    assert found["end_to_end"] > found["kmeans"] + 0.5


def test_the_settings_of_the_released_code_run_end_to_end_with_five_codebooks_a_block():
    quantized = quantize_dit(tiny_dit(), **vq4dit.RELEASED)
    assert list(quantized.report["blocks"]) == ["model"]
    wanted = vq_size(dit_linears(2, 32, 128, share_qkv=True), FORMATS["w2"])
    assert quantized.report["size"]["quantized"]["bytes"] == wanted.total


def test_modulation_is_quantized_for_dit_and_both_sizes_are_told():
    model = tiny_dit()
    quantized = quantize_dit(model)
    assert "transformer_blocks.1.norm1.linear" in quantized.layers
    assert len(quantized.layers) == 2 * 7
    sizes = quantized.report["size"]
    assert sizes["quantized"] == sizes["with_modulation"]
    assert sizes["with_modulation"]["bytes"] > sizes["without_modulation"]["bytes"]
    without = quantize_dit(model, modulation=False)
    assert len(without.layers) == 2 * 6
    assert without.report["size"]["quantized"] == without.report["size"]["without_modulation"]


def test_named_layers_get_no_modulation_unless_it_is_asked_for():
    model = tiny_dit()
    every = list(linear_layers(model))
    some = [info for info in every if info.kind == "ffn"]
    assert len(vq4dit.linears_of(model, every)) == 2 * 7, "all of a DiT's own"
    assert vq4dit.linears_of(model, some) == some
    block = [info for info in every if info.block == "transformer_blocks.1"]
    assert len(vq4dit.linears_of(model, block)) == 7, "block by block as in one go"
    assert vq4dit.linears_of(model, vq4dit.linears_of(model)) == vq4dit.linears_of(model)
    assert len(vq4dit.linears_of(model, some, modulation=True)) == 2 * 3
    assert len(vq4dit.linears_of(model, {info.name: info for info in every}, modulation=False)) == 2 * 6


def test_the_reported_size_is_that_of_the_formula():
    report = quantize_dit(tiny_dit(), codebook_dtype="float32").report
    wanted = vq_size(dit_linears(2, 32, 128), FORMATS["w2"])
    assert report["size"]["quantized"]["bytes"] == wanted.total


def test_queries_keys_and_values_can_share_a_codebook():
    layers = quantize_dit(tiny_dit(), share_qkv=True, codebook_dtype="float32").layers
    books = [layers[f"transformer_blocks.0.attn1.to_{part}"].weight.codebook for part in "qkv"]
    assert torch.equal(books[0], books[1]) and torch.equal(books[0], books[2])
    own = quantize_dit(tiny_dit(), codebook_dtype="float32").layers
    books = [own[f"transformer_blocks.0.attn1.to_{part}"].weight.codebook for part in "qkv"]
    assert not torch.equal(books[0], books[1])


def test_row_scales_and_eight_bit_activations_go_into_the_layers():
    scaled = quantize_dit(tiny_dit(), row_scale=True).layers.values()
    assert all(layer.weight.row_scale is not None and layer.transform.bits == 0 for layer in scaled)
    eight = quantize_dit(tiny_dit(), codebook_dtype="int8").layers.values()
    assert all(layer.weight.codebook.dtype == torch.int8 for layer in eight)
    assert all(layer.transform == InputTransform(bits=8) for layer in eight)


def test_a_video_transformer_keeps_its_modulation_and_runs_in_inference_mode():
    torch.manual_seed(0)
    config = dict(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8)
    model = diffusers.WanTransformer3DModel(**config, freq_dim=8, ffn_dim=32, num_layers=2).eval()

    def run():
        with torch.inference_mode():
            for step in (900, 500, 100):
                model(gaussian(1, 4, 2, 4, 4), torch.tensor([step]), gaussian(1, 3, 8))

    quantized = vq4dit.quantize(model, (run,), **SHORT)
    assert len(quantized.layers) == 2 * 10
    assert all(".norm" not in name for name in quantized.layers)


# --- progress and checkpoints --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["block", "end_to_end"])
def test_progress_counts_up_to_its_total(mode):
    told = []
    quantize_dit(tiny_dit(), mode=mode, progress=lambda *now: told.append(now))
    done, totals, names = zip(*told, strict=True)
    assert list(done) == list(range(1, totals[0] + 1)) and len(set(totals)) == 1
    assert totals[0] == 14 + 10 * (2 if mode == "block" else 1)
    assert "transformer_blocks.1.ff.net.2" in names


def test_progress_of_plain_kmeans_counts_layers():
    told = []
    vq4dit.quantize_kmeans(tiny_dit(), iterations=2, progress=lambda *now: told.append(now[:2]))
    assert told == [(done, 14) for done in range(1, 15)]


class Stopped(Exception):
    pass


@pytest.mark.parametrize("mode", ["block", "end_to_end"])
def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path, mode):
    whole = quantize_dit(tiny_dit(), mode=mode)

    def stop_in_the_second_block(done, total, name):
        if name.startswith("transformer_blocks.1."):
            raise Stopped

    if mode == "block":
        with pytest.raises(Stopped):
            quantize_dit(tiny_dit(), checkpoint=tmp_path, progress=stop_in_the_second_block)
        assert [path.name for path in tmp_path.iterdir()] == ["transformer_blocks.0.safetensors"]
    else:
        quantize_dit(tiny_dit(), checkpoint=tmp_path, mode=mode)
    told = []
    resumed = quantize_dit(tiny_dit(), mode=mode, checkpoint=tmp_path, progress=lambda *now: told.append(now))
    for name, layer in whole.layers.items():
        assert all(torch.equal(t, resumed.layers[name].tensors()[key]) for key, t in layer.tensors().items())
    assert resumed.report == whole.report
    assert told[0][2] == ("transformer_blocks.0" if mode == "block" else "model") and told[-1][0] == told[-1][1]


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"bits": "w3"}, {"candidates": 3}, {"model": tiny_dit(1)}], ids=str
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path, change):
    quantize_dit(tiny_dit(), checkpoint=tmp_path)
    model = change.pop("model", None) or tiny_dit()
    with pytest.raises(ValueError, match="must be of this model, seed and settings, it is of others"):
        quantize_dit(model, checkpoint=tmp_path, **change)


@pytest.mark.parametrize("bytes_left", [0, 5, 200])
def test_a_truncated_checkpoint_is_refused(tmp_path, bytes_left):
    quantize_dit(tiny_dit(), checkpoint=tmp_path)
    path = tmp_path / "transformer_blocks.0.safetensors"
    path.write_bytes(path.read_bytes()[:bytes_left])
    with pytest.raises(ValueError, match=r"blocks.0.safetensors must be a whole safetensors file.*delete it"):
        quantize_dit(tiny_dit(), checkpoint=tmp_path)


# --- recording -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [1, 3, 8, 9, 16, 17, 50, 1000])
def test_strata_keep_calls_spread_over_a_run_of_unknown_length(total):
    strata = Strata(8, seed=3)
    for item in range(total):
        if strata.wants():
            strata.keep(item)
        strata.end_item()
    kept = strata.all()
    assert kept == sorted(set(kept))
    if total <= 8:
        assert kept == list(range(total))
    else:
        assert 4 <= len(kept) <= 9
        edges = [0, *kept, total]
        assert max(b - a for a, b in zip(edges, edges[1:], strict=False)) <= 2 * strata.width


def test_every_item_of_a_stratum_is_as_likely_to_stay():
    counts = torch.zeros(64)
    for seed in range(800):
        strata = Strata(8, seed)
        for item in range(64):
            if strata.wants():
                strata.keep(item)
            strata.end_item()
        for item in strata.all():
            counts[item] += 1
    expected = counts.sum() / 64
    assert (counts - expected).abs().max() < 5 * expected.sqrt()


def test_recorded_calls_hold_inputs_as_they_were_before_a_module_wrote_into_them():
    class Writer(nn.Module):
        def forward(self, x, *, scale):
            return x.mul_(scale)

    model = nn.Sequential(Writer())
    calls = record_calls(model, ["0"], [lambda: model[0](torch.ones(2), scale=torch.tensor(3.0))])["0"]
    assert torch.equal(calls[0].args[0], torch.ones(2)) and calls[0].kwargs["scale"] == 3
    assert torch.equal(calls[0].outputs[0], torch.full((2,), 3.0))


class Twice(nn.Module):
    """Two linears, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.second(self.first(x))


def test_recorded_calls_keep_to_a_limit_of_memory_but_for_the_first_module():
    model, each = Twice(), 2 * 4 * 8 * 4  # bytes of a call: 4 rows in, 4 rows out
    runs = [lambda: model(gaussian(4, 8))] * 5
    for memory, names in ((0, ["first"]), (4 * each, ["first"]), (6 * each, ["first", "second"])):
        found = record_calls(model, ["first", "second"], runs, calls=3, memory=memory)
        assert list(found) == names
        assert all(2 <= len(calls) <= 4 for calls in found.values())


def test_blocks_that_do_not_fit_into_memory_wait_for_another_run(monkeypatch):
    whole, runs = quantize_dit(tiny_dit()), []
    monkeypatch.setattr(vq4dit, "spare_memory", lambda: 1)
    model = tiny_dit()
    run = sampler(model)
    waited = vq4dit.quantize(model, lambda: runs.append(run()), **SHORT)
    assert len(runs) == 2 and waited.report == whole.report
    for name, layer in whole.layers.items():
        assert all(torch.equal(t, waited.layers[name].tensors()[key]) for key, t in layer.tensors().items())


def test_spare_memory_is_less_than_the_machines():
    assert spare_memory() is None or 0 < spare_memory() < 2**50


# --- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"bits": "w4"}, "bits of vector quantization must be w2 or w3, got 'w4'"),
        ({"mode": "layer"}, "mode must be 'block' or 'end_to_end', got 'layer'"),
        ({"candidates": 9}, "candidates must be 1 to 8, got 9"),
        ({"calls": 0}, "calls must be at least 1, got 0"),
        ({"codebook_steps": -1}, "codebook_steps must be at least 0, got -1"),
        ({"blocks_at_once": -1}, "blocks_at_once must be at least 0, got -1"),
        ({"candidate": 2}, "settings of vq4dit must be among .*, got candidate"),
    ],
)
def test_wrong_settings_are_one_sentence(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        quantize_dit(tiny_dit(), **changes)


@pytest.mark.parametrize("calibration", [None, (), "run", [3]], ids=str)
def test_a_calibration_without_runs_is_refused(calibration):
    with pytest.raises(ValueError, match="calibration must hold functions that sample with the model"):
        vq4dit.quantize(tiny_dit(), calibration)


def test_a_run_that_leaves_blocks_out_is_refused():
    with pytest.raises(ValueError, match="must call every block, transformer_blocks.0 was not called"):
        vq4dit.quantize(tiny_dit(), lambda: None, **SHORT)


def test_values_that_are_not_finite_are_refused():
    model = tiny_dit()
    model.transformer_blocks[1].attn1.to_k.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="transformer_blocks.1.attn1.to_k must be finite, it has a NaN"):
        quantize_dit(model)
    toy = Toy(0)
    run = lambda: toy.model(torch.full((2, 64), torch.inf))  # noqa: E731
    with pytest.raises(ValueError, match="outputs of a block must be finite during calibration"):
        vq4dit.quantize(toy.model, run, layers=toy.layers, **SHORT)


def test_input_features_that_words_do_not_divide_are_refused_before_anything_runs():
    model = nn.Sequential(nn.Linear(6, 8))
    with pytest.raises(ValueError, match="input features must be a multiple of the word length 4, got 6"):
        vq4dit.quantize(model, pytest.fail, layers=[info_of(model)])
