"""The knapsack, budgets by group, and the bit map that measured sensitivities give."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from cases.quant import Tiny, layers_of, normal

from vdit_ext.quant import calibrate
from vdit_ext.quant.budget import Unit, choose, knapsack, split_budget
from vdit_ext.quant.sensitivity import (
    content_loss,
    measure_sensitivity,
    mixed_precision,
    motion_loss,
    plan_precision,
    quality_loss,
)
from vdit_ext.quant.vidit_q import average_bits, quantize


@pytest.mark.parametrize("seed", range(6))
def test_knapsack_is_as_good_as_trying_everything(seed):
    rng = np.random.default_rng(seed)
    costs = [int(c) for c in rng.integers(0, 12, 10)]
    gains = [float(g) for g in rng.integers(0, 9, 10)]  # whole, so that there are ties
    for budget in (0, 5, 17, 40, 200):
        best = max(
            sum(gains[i] for i in some)
            for count in range(11)
            for some in itertools.combinations(range(10), count)
            if sum(costs[i] for i in some) <= budget
        )
        chosen = knapsack(costs, gains, budget)
        assert sum(gains[i] for i in chosen) == best
        assert sum(costs[i] for i in chosen) <= budget and len(set(chosen)) == len(chosen)


def test_knapsack_is_quick_where_costs_are_alike():
    gains = [float(g) for g in np.random.default_rng(0).random(400)]
    costs = [4 * 1152 * 1152, 8 * 1152 * 1152] * 200
    chosen = knapsack(costs, gains, sum(costs) // 3)
    assert sum(costs[i] for i in chosen) <= sum(costs) // 3


@pytest.mark.parametrize(("cost", "gain"), [(-1, 1.0), (1.5, 1.0), (1, -1.0), (1, float("nan"))])
def test_costs_and_gains_that_make_no_sense_are_refused(cost, gain):
    with pytest.raises(ValueError, match="costs must be whole numbers and gains numbers, none below 0"):
        knapsack([cost], [gain], 10)


def test_budget_is_split_by_share_and_what_is_left_over_goes_on():
    limits = {"a": 100, "b": 100, "c": 10}
    assert split_budget(60, {"a": 2.0, "b": 1.0, "c": 0.0}, limits) == {"a": 40, "b": 20, "c": 0}
    assert split_budget(120, {"a": 1.0, "b": 1.0, "c": 4.0}, limits) == {"a": 55, "b": 55, "c": 10}
    assert split_budget(999, {"a": 1.0, "b": 1.0, "c": 1.0}, limits) == limits


def test_budgets_below_0_and_groups_without_a_share_are_refused():
    unit = Unit((0, "u"), "content", 1, 1.0)
    with pytest.raises(ValueError, match="a budget must be at least 0, got -1"):
        choose([unit], -1)
    with pytest.raises(ValueError, match="every group must have a share, content has none"):
        choose([unit], 1, {"quality": 1.0})


# ---------------------------------------------------------------------------------------------------------
# Sensitivity
# ---------------------------------------------------------------------------------------------------------

STEPS = 4


@pytest.fixture(scope="module")
def measured():
    model = Tiny()
    model.blocks[1].up.weight.mul_(20)  # the part that suffers most
    layers, start = layers_of(model), normal(12, 96)

    def sample(on_step):
        x = start
        for step in range(STEPS):
            on_step(step, STEPS)
            x = x / x.norm(dim=1, keepdim=True) * 10
            x = x + 0.1 * model(x)
        return x.reshape(4, 6, 16, 3)

    found = calibrate(model, lambda: sample(lambda step, steps: None), layers=layers)
    planes = quantize(model, found, bits="w4a8-mp", precision="switchable", layers=layers)
    told = []
    before = list(model.modules())
    result = measure_sensitivity(model, planes, sample, layers=layers, progress=lambda *a: told.append(a))
    assert all(a is b for a, b in zip(before, model.modules(), strict=True))
    return model, layers, found, result, told


def test_units_are_blocks_kinds_and_quarters(measured):
    model, layers, _, result, told = measured
    assert len(result.units) == 2 * 3 * 4
    assert {unit.group for unit in result.units} == {"content", "quality"} == set(result.shares)
    assert result.members["blocks.0.ffn"] == ("blocks.0.up", "blocks.0.down")
    cost = {unit.key: unit.cost for unit in result.units}
    assert cost[0, "blocks.0.self"] == 3 * 96 * 96 and cost[3, "blocks.1.ffn"] == 2 * 96 * 160
    assert told[-1][:2] == (1 + 1 + 2 + 24, 1 + 1 + 2 + 24)
    assert [done for done, _, _ in told] == list(range(1, 29))


def test_losses_that_were_kept_are_not_measured_again():
    model, clips, kept = Tiny(), [], {}
    layers = layers_of(model)

    def sample(on_step):
        clips.append(0)
        if len(clips) == 7:
            raise KeyboardInterrupt
        for step in range(STEPS):
            on_step(step, STEPS)
            x = model(normal(12, 96))
        return x.reshape(4, 6, 16, 3)

    planes = quantize(model, None, bits="w4a8-mp", precision="switchable", alpha=None, layers=layers)
    given = {"layers": layers, "by_interval": False}
    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(model, planes, sample, kept=kept, **given)
    assert len(kept) == 4
    again = measure_sensitivity(model, planes, sample, kept=kept, **given)
    assert len(clips) == 7 + 2 + (2 + 6 - 4)
    assert again == measure_sensitivity(model, planes, sample, **given)


def test_the_part_that_suffers_most_has_the_largest_gain(measured):
    result = measured[3]
    quality = [unit for unit in result.units if unit.group == "quality"]
    assert max(quality, key=lambda unit: unit.gain).key[1] == "blocks.1.ffn"
    assert all(unit.gain >= 0 for unit in result.units)
    assert all(share > 0 for share in result.shares.values())


def test_the_map_keeps_to_its_average_and_reaches_the_layers(measured):
    model, layers, found, result, _ = measured
    last = 0.0
    gain = {unit.key: unit.gain for unit in result.units}
    for bits in (4, 4.7, 5.6, 6.5, 8):
        maps = plan_precision(result, bits)
        assert average_bits(layers, maps) <= bits + 1e-9
        spared = sum(
            gain[i, unit] for i in range(4) for unit, names in result.members.items() if maps[i][names[0]] == 8
        )
        assert spared >= last
        last = spared
    assert all(value == 4 for bits in plan_precision(result, 4) for value in bits.values())
    quantized = quantize(model, found, bits="w4a8-mp", precision=plan_precision(result, 5.6), layers=layers)
    assert quantized.report["average_weight_bits"] <= 5.6
    with pytest.raises(ValueError, match=r"average_bits must be in 4 \.\. 8, got 9"):
        plan_precision(result, 9)


def test_mixed_precision_measures_plans_and_quantizes(measured):
    model, layers, found, _, _ = measured

    def sample(on_step):
        x = normal(12, 96)
        for step in range(STEPS):
            on_step(step, STEPS)
            x = x + 0.1 * model(x / x.norm(dim=1, keepdim=True) * 10)
        return x.reshape(4, 6, 16, 3)

    told = []
    settings = {"layers": layers, "by_interval": False, "progress": lambda *a: told.append(a), "alpha": 0.5}
    quantized = mixed_precision(model, found, sample, average_bits=5.5, **settings)
    assert 4 <= quantized.report["average_weight_bits"] <= 5.5
    assert told[-1][:2] == (2 + 2 + 6, 2 + 2 + 6)
    assert len(quantized.intervals) == 4


def test_metrics_see_what_they_are_named_for():
    clip = torch.rand(5, 16, 16, 3, generator=torch.Generator().manual_seed(0))
    for loss in (content_loss, quality_loss, motion_loss):
        assert loss(clip, clip) == 0
    noisy = clip + 0.1 * normal(5, 16, 16, 3)
    brighter = clip + 0.1
    assert content_loss(clip, brighter) > 20 * content_loss(clip, noisy)  # fine noise is no content
    assert quality_loss(clip, noisy) == pytest.approx(0.01, rel=0.1)
    assert motion_loss(clip, brighter) < 1e-12 < motion_loss(clip, noisy)
    assert motion_loss(clip[:1], noisy[:1]) == 0
