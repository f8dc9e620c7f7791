"""Quantized layers in a model: put in, checked, and taken out."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases.quant import Tiny, layers_of, normal, snr
from torch import nn

from vdit_ext.quant import InputTransform, QuantizedModel, QuantLinear, apply
from vdit_ext.quant.baselines import round_to_nearest


@pytest.fixture
def model():
    return Tiny()


def quantized(model, **settings) -> QuantizedModel:
    return round_to_nearest(model, bits="w8a8", layers=layers_of(model), **settings)


def test_undo_restores_the_very_objects(model):
    before = dict(model.named_modules())
    x = normal(5, 96)
    expected = model(x)
    with apply(model, quantized(model)) as applied:
        assert isinstance(model.blocks[0].up, QuantLinear) and not torch.equal(model(x), expected)
        assert snr(model(x), expected) > 35
    after = dict(model.named_modules())
    assert list(before) == list(after) and all(after[name] is before[name] for name in before)
    assert torch.equal(model(x), expected)
    applied.undo()


def test_group_shares_one_quantization(model, monkeypatch):
    from vdit_ext import ops

    calls, original = [], ops.quantize_rows
    monkeypatch.setattr(ops, "quantize_rows", lambda x, **kw: calls.append(x) or original(x, **kw))
    with apply(model, quantized(model)) as applied:
        shared = applied.layers["blocks.0.attn.to_q"].shared
        assert shared is applied.layers["blocks.0.attn.to_v"].shared
        assert shared is not applied.layers["blocks.1.attn.to_q"].shared
        model(normal(5, 96))
    assert len(calls) == 2 * 4  # qkv, out, up, down in each block


def test_release_frees_the_originals(model):
    applied = apply(model, quantized(model))
    applied.release()
    with pytest.raises(RuntimeError, match=r"release\(\) gave them up; load the model again"):
        applied.undo()


def test_buffers_go_where_the_weight_was():
    model = Tiny().to("meta")
    data = quantized(Tiny())
    applied = apply(model, data)
    assert all(layer.scale.device.type == "meta" for layer in applied.layers.values())


def wrong_size(data: QuantizedModel) -> QuantizedModel:
    layers = dict(data.layers)
    layers["blocks.0.up"] = layers["blocks.0.down"]
    return dataclasses.replace(data, layers=layers)


def renamed(data: QuantizedModel) -> QuantizedModel:
    return dataclasses.replace(data, layers={f"transformer.{n}": layer for n, layer in data.layers.items()})


def without_bias(data: QuantizedModel) -> QuantizedModel:
    layer = dataclasses.replace(data.layers["blocks.1.up"], bias=None)
    return dataclasses.replace(data, layers={**data.layers, "blocks.1.up": layer})


def torn_group(data: QuantizedModel) -> QuantizedModel:
    layer = dataclasses.replace(data.layers["blocks.0.attn.to_k"], transform=InputTransform(torch.ones(96)))
    return dataclasses.replace(data, layers={**data.layers, "blocks.0.attn.to_k": layer})


def bad_map(data: QuantizedModel) -> QuantizedModel:
    return dataclasses.replace(data, intervals=({"blocks.0.up": 4},))


def stray_map(data: QuantizedModel) -> QuantizedModel:
    return dataclasses.replace(data, intervals=({"blocks.9.up": 8},))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (wrong_size, r"the weight of blocks.0.up must be \[96, 160\], got \[160, 96\]"),
        (renamed, "transformer.blocks.0.attn.to_q must be a layer of Tiny, there is none"),
        (without_bias, "blocks.1.up must have no bias"),
        (torn_group, "layers of group blocks.0.qkv must transform their input alike"),
        (bad_map, "blocks.0.up must have 8 bits in a bit map, got 4"),
        (stray_map, "a bit map must name quantized layers, got blocks.9.up"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_layers_that_do_not_fit_leave_the_model_as_it_was(model, change, sentence):
    data = change(quantized(model))
    before = list(model.modules())
    with pytest.raises(ValueError, match=sentence) as caught:
        apply(model, data)
    assert "\n" not in str(caught.value)
    assert all(a is b for a, b in zip(before, model.modules(), strict=True))


def test_a_quantized_model_is_not_quantized_again(model):
    data = quantized(model)
    with (
        apply(model, data),
        pytest.raises(ValueError, match="must be a torch.nn.Linear, got a linear that is quantized already"),
    ):
        apply(model, data)


def test_linears_with_hooks_are_refused(model):
    data = quantized(model)
    model.blocks[0].up.register_forward_hook(lambda *a: None)
    with pytest.raises(
        ValueError, match=r"blocks.0.up must have no hooks, it has some; quantize before offloading or add_lora"
    ):
        apply(model, data)


def test_steps_out_of_range_are_refused(model):
    applied = apply(model, quantized(model))
    assert applied.num_intervals == 1
    applied.set_step(3, 4)
    with pytest.raises(ValueError, match=r"step must be in 0 \.\. 3, got 4"):
        applied.set_step(4, 4)
    with pytest.raises(ValueError, match=r"interval must be in 0 \.\. 0, got 1"):
        applied.set_interval(1)


def test_eight_bits_of_a_bf16_model_stay_near_it():
    model = Tiny().to(torch.bfloat16)
    x = normal(2, 5, 96).to(torch.bfloat16)
    expected = model(x).float()
    data = quantized(model)
    assert all(layer.weight.scale.dtype == torch.float32 for layer in data.layers.values())
    with apply(model, data):
        y = model(x)
    assert y.dtype == torch.bfloat16 and snr(y.float(), expected) > 33


class Wrapper(nn.Module):
    """Like a LoRA layer of peft: the linear lies below, and its product is added to."""

    def __init__(self, base_layer: nn.Linear):
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x):
        return self.base_layer(x) + 1


def test_linears_below_an_adapter_are_replaced_there(model):
    data = quantized(model)
    model.blocks[0].up = Wrapper(model.blocks[0].up)
    original = model.blocks[0].up.base_layer
    with apply(model, data):
        assert isinstance(model.blocks[0].up, Wrapper)
        assert isinstance(model.blocks[0].up.base_layer, QuantLinear)
    assert model.blocks[0].up.base_layer is original


def test_undo_finds_layers_that_an_adapter_wrapped_since(model):
    original = model.blocks[0].up
    applied = apply(model, quantized(model))
    model.blocks[0].up = Wrapper(model.blocks[0].up)
    applied.undo()
    assert isinstance(model.blocks[0].up, Wrapper) and model.blocks[0].up.base_layer is original
