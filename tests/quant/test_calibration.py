"""What calibration collects, and that the model is as it was afterwards."""

from __future__ import annotations

import pytest
import torch
from cases.quant import Tiny, layers_of, normal

from vdit_ext.quant import calibrate


@pytest.fixture
def model():
    return Tiny()


def test_statistics_are_those_of_all_inputs_of_all_calls(model):
    batches = [normal(3, 20, 96, seed=i) * (i + 1) for i in range(3)]
    batches[0][..., 5] = batches[1][..., 5] = batches[2][..., 5] = 0
    found = calibrate(model, [lambda x=x: model(x) for x in batches], layers=layers_of(model))
    seen, rows = found["blocks.0.attn.to_q"], torch.cat([b.flatten(0, 1) for b in batches])
    expected = rows.abs().amax(0)
    expected[5] = 1e-3  # the floor
    assert torch.equal(seen.amax, expected)
    assert seen.rms == pytest.approx(float(rows.square().mean().sqrt()), rel=1e-6)
    assert (seen.num_rows, seen.calls) == (180, 3)
    assert found["blocks.0.attn.to_v"] is seen and found["blocks.0.up"] is not seen
    assert set(found.layers) == {info.name for info in layers_of(model)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_statistics_of_other_dtypes_are_those_of_their_values(model, dtype):
    model, x = model.to(dtype), (300 * normal(20, 96)).to(dtype)  # squares beyond fp16
    found = calibrate(model, lambda: model(x), layers=layers_of(model)[:1])["blocks.0.attn.to_q"]
    assert torch.equal(found.amax, x.abs().amax(0).to(torch.float32))
    assert found.rms == pytest.approx(float(x.double().square().mean().sqrt()), rel=1e-6)
    assert found.rows.dtype == dtype


def test_inputs_of_later_layers_are_theirs(model):
    x, inner = normal(30, 96), []
    model.blocks[1].down.register_forward_pre_hook(lambda module, args: inner.append(args[0]))
    found = calibrate(model, lambda: model(x), layers=layers_of(model))
    assert torch.equal(found["blocks.1.down"].amax, inner[0].abs().amax(0).clamp_min(1e-3))


def test_all_rows_are_kept_where_few_were_seen(model):
    x = normal(30, 96)
    rows = calibrate(model, lambda: model(x), layers=layers_of(model), rows=64)["blocks.0.up"].rows
    again = calibrate(model, lambda: model(x), layers=layers_of(model), rows=30)["blocks.0.up"].rows
    assert rows.shape == again.shape == (30, 96)
    assert torch.equal(rows.sort(0).values, again.sort(0).values)


def test_kept_rows_are_a_uniform_sample_that_the_seed_decides(model):
    # Each row holds its number in channel 0; 6 calls of 100 rows.
    batches = [torch.full((100, 96), 1.0) for _ in range(6)]
    for i, batch in enumerate(batches):
        batch[:, 0] = torch.arange(100) + 100.0 * i
    layers = layers_of(model)[:1]

    def rows(seed):
        kept = calibrate(model, [lambda b=b: model(b) for b in batches], layers=layers, rows=60, seed=seed)
        return kept["blocks.0.attn.to_q"].rows[:, 0]

    first = rows(0)
    assert len(first.unique()) == 60 and torch.equal(first, rows(0)) and not torch.equal(first, rows(1))
    counts = torch.zeros(6)
    for seed in range(40):
        counts += torch.bincount((rows(seed) // 100).long(), minlength=6)
    # 2,400 draws over 6 calls: 400 each, standard deviation 17.4 (without replacement within a seed).
    assert ((counts - 400).abs() < 5 * 17.4).all()


def test_the_models_outputs_and_hooks_are_untouched(model):
    x = normal(10, 96)
    expected = model(x)
    seen = []
    calibrate(model, lambda: seen.append(model(x)), layers=layers_of(model))
    assert torch.equal(seen[0], expected)
    assert not any(m._forward_pre_hooks for m in model.modules())
    with pytest.raises(ZeroDivisionError):
        calibrate(model, lambda: 1 / 0, layers=layers_of(model))
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_progress_counts_runs(model):
    x, told = normal(4, 96), []
    calibrate(model, [lambda: model(x)] * 2, layers=layers_of(model), progress=lambda *a: told.append(a))
    assert told == [(1, 2, "calibrate"), (2, 2, "calibrate")]


def test_the_first_layer_with_nan_is_named(model):
    model.blocks[0].attn["to_v"].bias[3] = torch.nan
    with pytest.raises(ValueError, match=r"the input of blocks.0.attn.to_out must be finite") as caught:
        calibrate(model, lambda: model(normal(4, 96)), layers=layers_of(model))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_inputs_that_are_not_finite_are_refused(model, value):
    x = normal(4, 96)
    x[2, 7] = value
    with pytest.raises(ValueError, match=r"the input of blocks.0.attn.to_q must be finite, it has a NaN"):
        calibrate(model, lambda: model(x), layers=layers_of(model))


def test_layers_that_never_ran_are_named(model):
    def run():
        model.blocks[0](normal(4, 96))

    with pytest.raises(ValueError, match=r"every layer must run, blocks.1.attn.to_q never did"):
        calibrate(model, run, layers=layers_of(model))
    with pytest.raises(ValueError, match=r"every layer must run, blocks.0.attn.to_q never did"):
        calibrate(model, lambda: model(torch.zeros(0, 96)), layers=layers_of(model))


def test_nothing_to_do_is_refused(model):
    for runs, layers, rows in (
        ([], layers_of(model), 8),
        ([lambda: 0], [], 8),
        ([lambda: 0], layers_of(model), 0),
    ):
        with pytest.raises(ValueError, match="runs, layers and rows must be at least one"):
            calibrate(model, runs, layers=layers, rows=rows)


def test_compiled_models_are_refused(model):
    with pytest.raises(ValueError, match="the model must not be compiled, it is; calibrate and quantize first"):
        calibrate(torch.compile(model), lambda: 0, layers=layers_of(model))
    model.blocks[0].compile()
    with pytest.raises(ValueError, match="the model must not be compiled"):
        calibrate(model, lambda: 0, layers=layers_of(model))
