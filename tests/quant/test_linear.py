"""The quantized linear, its formats, and inputs that layers share."""

from __future__ import annotations

import copy
import gc
import json
import weakref

import pytest
import torch
from cases.quant import normal, snr
from torch import nn

from vdit_ext import ops
from vdit_ext.quant import (
    DualRotation,
    InputTransform,
    Int8Weight,
    QuantLayer,
    QuantLinear,
    SharedRows,
    TwinLogWeight,
    VQWeight,
)
from vdit_ext.quant.hadamard import random_signs
from vdit_ext.quant.uniform import round_weight, to_int4, to_int8, to_planes
from vdit_ext.quant.weights import DenseWeight

N, K = 40, 96


def rounded(seed: int = 0):
    return round_weight(normal(N, K, seed=seed), 8), round_weight(normal(N, K, seed=seed), 4)


def twin_log(bits: int) -> TwinLogWeight:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (N, K), generator=generator, dtype=torch.uint8)
    table = torch.randint(-127, 128, (N, 2**bits), generator=generator).to(torch.int8)
    return TwinLogWeight(ops.pack_log4(codes), table, torch.rand(N, generator=generator) + 0.5, bits, N, K)


def vq(bits: int) -> VQWeight:
    words, dim = (256, 4) if bits == 2 else (64, 2)
    indices = torch.randint(words, (N, K // dim), generator=torch.Generator().manual_seed(bits))
    codes = ops.pack_vq(indices.to(torch.int32), dim)
    return VQWeight(codes, normal(words, dim, seed=bits), bits, N, K, row_scale=torch.rand(N) + 0.5)


def weights():
    eight, four = rounded()
    plain = normal(N, K)
    symmetric = round_weight(plain, 8, symmetric=True)
    return {
        "int8": to_int8(eight),
        "int8-symmetric": to_int8(symmetric),
        "int6": to_int8(round_weight(plain, 6)),
        "int4": to_int4(four),
        "int3": to_int4(round_weight(plain, 3)),
        "planes": to_planes(eight),
        "twin-log-4": twin_log(4),
        "twin-log-3": twin_log(3),
        "vq-2": vq(2),
        "vq-3": vq(3),
        "vq-2-int8": vq(2).to_int8(),
        "dense": DenseWeight(normal(N, K)),
    }


FORMS = tuple(weights())


def transforms():
    eye = torch.linalg.qr(normal(32, 32, seed=5))[0]
    dual = DualRotation(eye, torch.randperm(K, generator=torch.Generator().manual_seed(0)), eye.T.contiguous())
    mask = torch.rand(K) + 0.5
    return {
        "none": InputTransform(),
        "mask": InputTransform(mask),
        "hadamard": InputTransform(mask, 32, random_signs(K, 0)),
        "full": InputTransform(mask, K, random_signs(K, 0)),
        "dual": InputTransform(mask, rotation=dual),
        "clip": InputTransform(mask, 32, random_signs(K, 0), clip=0.9),
    }


def reference(layer: QuantLayer, x, bits=None):
    """The layer in fp64 on the codes that its input has."""
    rows = x.double()
    if layer.weight.takes_codes:
        turned = layer.transform.clipped(layer.transform.rows(x))
        codes, scale, _ = ops.quantize_rows(turned, bits=layer.transform.bits)
        rows = codes.double() * scale.double()[..., None]
    weight = layer.weight.dequantize() if bits is None else layer.weight.dequantize(bits)
    y = rows @ weight.double().T
    return y if layer.bias is None else y + layer.bias.double()


@pytest.mark.parametrize("form", FORMS)
def test_every_format_multiplies_what_it_dequantizes(form):
    layer = QuantLayer(weights()[form], normal(N, seed=1))
    x = normal(3, 7, K, seed=2)
    assert layer.weight.dequantize().shape == (N, K)
    assert snr(QuantLinear(layer)(x), reference(layer, x)) > 110


@pytest.mark.parametrize("name", tuple(transforms()))
def test_every_transform_leaves_the_product_near(name):
    transform, weight, x = transforms()[name], normal(N, K), normal(50, K, seed=3)
    assert snr(transform.rows(x) @ transform.weight(weight).T, x @ weight.T) > 110
    layer = QuantLayer(to_int8(round_weight(transform.weight(weight), 8)), None, transform)
    y = QuantLinear(layer)(x)
    # The fused rotation rounds in another order, so single codes may differ from the reference's by one.
    assert snr(y, reference(layer, x)) > 55
    assert snr(y, x @ weight.T) > (20 if name == "clip" else 36)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype_and_leading_shape_follow_the_input(dtype):
    layer = QuantLinear(QuantLayer(weights()["int4"], normal(N)))
    for shape in ((K,), (5, K), (2, 5, K), (2, 3, 2, K), (0, K), (2, 0, K)):
        y = layer(torch.zeros(shape, dtype=dtype))
        assert y.dtype == dtype and y.shape == (*shape[:-1], N)


@pytest.mark.parametrize("form", FORMS)
def test_config_and_state_dict_make_the_same_layer(form):
    transform = InputTransform() if form.startswith(("vq", "dense")) else transforms()["hadamard"]
    layer = QuantLinear(QuantLayer(weights()[form], normal(N), transform, "blocks.0.qkv"))
    config = json.loads(json.dumps(layer.config()))
    copied = QuantLinear.empty(config)
    copied.load_state_dict(layer.state_dict())
    x = normal(6, K, seed=4)
    assert torch.equal(copied(x), layer(x))
    assert copied.config() == config
    again = QuantLinear(copied.to_layer())
    assert torch.equal(again(x), layer(x)) and again.to_layer().nbytes == layer.to_layer().nbytes


@pytest.mark.parametrize("form", FORMS)
def test_layout_is_what_the_tensors_are(form):
    layer = QuantLayer(weights()[form], None, transforms()["dual"])
    found = {name: (tuple(t.shape), t.dtype) for name, t in layer.tensors().items()}
    assert QuantLayer.layout(layer.config()) == found


def test_bytes_count_codes_scales_and_tables():
    found = {name: weight.nbytes for name, weight in weights().items()}
    tiles = 2 * 3 * 512  # of 32 x 32
    assert found["int8"] == N * K + 8 * N and found["int8-symmetric"] == N * K + 4 * N
    assert found["int4"] == tiles + 8 * N and found["planes"] == 2 * tiles + 8 * N
    assert found["twin-log-3"] == tiles + 8 * N + 4 * N
    assert found["vq-2"] == 2 * 2 * 512 + 256 * 4 * 4 + 4 * N


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c, t: t.pop("scale"), "layer: the tensors tiles, scale, zero must be there, scale is missing"),
        (
            lambda c, t: t.update(more=torch.ones(1)),
            "layer: the tensors must be tiles, scale, zero, got more too",
        ),
        (lambda c, t: t.update(scale=torch.ones(3)), r"layer: scale must be float32 \[40\], got float32 \[3\]"),
        (lambda c, t: t.update(tiles=t["tiles"].short()), "layer: tiles must be uint8 .* got int16"),
        (lambda c, t: c.update(format="int5"), "format must be one of int8, int4, .* got 'int5'"),
    ],
    ids=["missing", "extra", "shape", "dtype", "format"],
)
def test_tensors_that_do_not_fit_the_config_fail_with_a_sentence(change, sentence):
    layer = QuantLayer(weights()["int4"])
    config, tensors = layer.config(), layer.tensors()
    change(config, tensors)
    with pytest.raises(ValueError, match=sentence) as caught:
        QuantLayer.from_tensors(config, tensors)
    assert "\n" not in str(caught.value)


def test_moves_never_change_dtypes():
    layer = QuantLinear(QuantLayer(weights()["int4"], normal(N), transforms()["hadamard"]))
    x, before = normal(4, K), {name: t.clone() for name, t in layer.state_dict().items()}
    expected = layer(x)
    model = nn.Sequential(layer, nn.Linear(N, 2)).to(torch.bfloat16).half().float()
    for name, tensor in model[0].state_dict().items():
        assert torch.equal(tensor, before[name])
    assert torch.equal(model[0](x), expected)
    assert model.to("meta")[0].scale.device.type == "meta"


def test_set_bits_reads_the_high_plane_or_both():
    layer, x = QuantLinear(QuantLayer(weights()["planes"], normal(N))), normal(6, K, seed=5)
    for bits in (4, 8, 4):
        layer.set_bits(bits)
        assert snr(layer(x), reference(layer.to_layer(), x, bits)) > 110
    with pytest.raises(ValueError, match="bits of a layer in format nibble_planes must be one of 8, 4, got 6"):
        layer.set_bits(6)
    with pytest.raises(ValueError, match="format int4 must be one of 4, got 8"):
        QuantLinear(QuantLayer(weights()["int4"])).set_bits(8)


def test_gate_and_residual_are_added_in_the_epilogue():
    layer, x = QuantLinear(QuantLayer(weights()["int8"], normal(N))), normal(2, 5, K, seed=6)
    gate, residual = normal(2, 1, N, seed=7), normal(2, 5, N, seed=8)
    assert snr(layer(x, gate=gate, residual=residual), layer(x).double() * gate + residual) > 110


@pytest.mark.parametrize("form", ["int8", "planes", "twin-log-4"])
def test_compiles_into_one_graph(form):
    group = SharedRows(2)
    transform = transforms()["hadamard"]
    layers = nn.ModuleList(
        [QuantLinear(QuantLayer(weights()[form], None, transform, "g"), group) for _ in "ab"]
    )

    def both(x):
        return layers[0](x) + layers[1](x)

    x = normal(8, K)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), both(x))
    if form == "planes":
        layers[0].set_bits(4)
        assert torch.equal(compiled(x), both(x))


def test_rows_of_a_group_can_be_handed_on():
    transform = transforms()["hadamard"]
    first, second = (
        QuantLinear(QuantLayer(weights()[form], None, transform, "g")) for form in ("int8", "int4")
    )
    x = normal(2, 8, K)
    assert torch.equal(second(x, rows=first.rows(x)), second(x))


# ---------------------------------------------------------------------------------------------------------
# Shared inputs
# ---------------------------------------------------------------------------------------------------------


class Counter:
    """A quantization that counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return ops.quantize_rows(x)


def test_members_of_a_group_quantize_their_input_once():
    shared, count, x = SharedRows(3), Counter(), normal(4, K)
    found = [shared.get(x, count) for _ in range(3)]
    assert count.calls == 1 and found[0] is found[1] is found[2]
    shared.get(x, count)
    assert count.calls == 2  # the three have had theirs: the codes were dropped


def test_changes_in_place_and_other_tensors_are_seen():
    shared, count, x = SharedRows(9), Counter(), normal(4, K)
    shared.get(x, count)
    x.mul_(2)
    assert torch.equal(shared.get(x, count)[1], ops.quantize_rows(x)[1]) and count.calls == 2
    x[0, 0] = 100
    shared.get(x, count)
    shared.get(x.clone(), count)
    shared.get(x, count)
    assert count.calls == 5


def test_codes_go_with_the_last_member_or_with_the_tensor():
    shared, x = SharedRows(2), normal(4, K)
    codes = weakref.ref(shared.get(x, ops.quantize_rows)[0])
    assert codes() is not None
    shared.get(x, ops.quantize_rows)
    gc.collect()
    assert codes() is None
    codes = weakref.ref(shared.get(x, ops.quantize_rows)[0])
    del x
    gc.collect()
    assert codes() is None


def test_inference_tensors_are_quantized_by_each_layer():
    shared, count = SharedRows(2), Counter()
    with torch.inference_mode():
        x = normal(4, K)
        shared.get(x, count)
        x.mul_(2)
        assert torch.equal(shared.get(x, count)[1], ops.quantize_rows(x)[1])
    assert count.calls == 2


def test_copies_of_a_model_share_among_themselves():
    shared = SharedRows(2)
    layers = nn.ModuleList([QuantLinear(QuantLayer(weights()["int8"], group="g"), shared) for _ in "ab"])
    x = normal(4, K)
    layers[0](x)  # leaves an entry behind
    copied = copy.deepcopy(layers)
    assert copied[0].shared is copied[1].shared is not shared
    assert torch.equal(copied[1](x), layers[1](x))


def test_symmetric_codes_have_no_zero():
    weight = to_int8(round_weight(normal(N, K), 8, symmetric=True))
    assert weight.zero is None and isinstance(weight, Int8Weight)
    assert weight.codes.min() >= -127


@pytest.mark.parametrize("form", ["dense", "vq-2"])
def test_a_rotation_without_tensors_reaches_float_weights(form):
    turned, x = InputTransform(hadamard=32, bits=0), normal(7, K, seed=3)
    weight = weights()[form]
    assert not turned.tensors()
    assert_close = torch.testing.assert_close
    assert_close(QuantLinear(QuantLayer(weight, None, turned))(x), turned.rows(x) @ weight.dequantize().T)
