"""Which linears of each diffusers class are quantized, kept, and grouped."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

from cases.transformers import CASES

from vdit_ext.quant import layers as table
from vdit_ext.quant.layers import CLASSES, KINDS, UNLISTED, linear_layers

BY_NAME = {case.name: case for case in CASES}


def build(name: str) -> nn.Module:
    return BY_NAME[name].build()


def inputs_of(model: nn.Module, case) -> dict[str, list]:
    """The tensors that reach each linear in one call."""
    seen: dict[str, list] = {}
    for name, module in table.plain_linears(model).items():
        module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0]))
    with torch.no_grad():
        model(**case.arguments(), return_dict=False)
    return seen


def test_every_class_of_the_table_has_a_case():
    assert {case.name for case in CASES} == set(CLASSES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_linear_is_quantized_or_kept_for_a_known_reason(case):
    model = case.build()
    found = linear_layers(model)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert sorted([info.name for info in found] + list(found.kept)) == sorted(names)
    assert UNLISTED not in found.kept.values()
    assert {info.kind for info in found} <= set(KINDS)
    # Hidden linears of the blocks are what costs: nearly all their weights must be among the quantized.
    assert len(found) >= 8


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_group_reads_one_tensor_and_blocks_come_in_the_order_they_run(case):
    model = case.build()
    found = linear_layers(model)
    seen = inputs_of(model, case)
    for group in found.groups().values():
        first = seen[group[0].name]
        for info in group[1:]:
            assert all(torch.equal(a, b) for a, b in zip(first, seen[info.name], strict=True)), info.name
    ran = [name for name in seen if name not in found.kept]
    ran_blocks = list(dict.fromkeys(name.rsplit(".", name.count(".") - 1)[0] for name in ran))
    assert list(found.blocks()) == ran_blocks


def test_wan_lists():
    found = linear_layers(build("WanTransformer3DModel"))
    first = [info.name for info in found.blocks()["blocks.0"]]
    inner = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_k"]
    inner += ["attn2.to_v", "attn2.to_out.0", "attn2.add_k_proj", "attn2.add_v_proj"]
    inner += ["ffn.net.0.proj", "ffn.net.2"]
    assert first == [f"blocks.0.{name}" for name in inner]
    kinds = {info.name: info.kind for info in found}
    assert kinds["blocks.0.attn1.to_q"] == "self" and kinds["blocks.1.attn2.to_k"] == "cross"
    assert kinds["blocks.1.ffn.net.2"] == "ffn"
    groups = {name: [info.name for info in group] for name, group in found.groups().items()}
    assert groups["blocks.0.attn2.kv"] == ["blocks.0.attn2.to_k", "blocks.0.attn2.to_v"]
    assert found.kept["condition_embedder.time_proj"] == "modulation"
    assert found.kept["proj_out"] == "output head"


def test_temporal_blocks_of_latte_are_a_group_of_their_own():
    found = linear_layers(build("LatteTransformer3DModel"))
    kinds = {info.name: info.kind for info in found}
    assert kinds["temporal_transformer_blocks.0.attn1.to_q"] == "temporal"
    assert kinds["transformer_blocks.0.attn1.to_q"] == "self"
    assert list(found.blocks())[:2] == ["transformer_blocks.0", "temporal_transformer_blocks.0"]


@pytest.mark.parametrize("name", ["WanTransformer3DModel", "CogVideoXTransformer3DModel"])
def test_fused_projections_take_the_place_of_what_they_hold(name):
    case = BY_NAME[name]
    model = case.build()
    with torch.no_grad():
        model.fuse_qkv_projections()
    found = linear_layers(model)
    names = {info.name for info in found}
    assert any(name.endswith("to_qkv") for name in names)
    assert not any(name.endswith(("attn1.to_q", "attn.to_k", "add_v_proj")) for name in names)
    assert set(inputs_of(model, case)) >= names  # nothing that no call reaches
    assert UNLISTED not in found.kept.values()


def test_the_toy_model_keeps_its_position_table():
    from vdit_ext.toyworld import model

    found = linear_layers(model.build(dict(model.CONFIG, num_layers=1)))
    assert found.kept["patch_embedding.position"] == "patch embedding" and len(found) == 10


def test_a_derived_class_is_known_and_another_one_is_refused():
    class MyWan(type(build("WanTransformer3DModel"))):
        pass

    assert (
        table.class_layers(MyWan(**BY_NAME["WanTransformer3DModel"].config)) is CLASSES["WanTransformer3DModel"]
    )
    other = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(
        TypeError, match=r"WanTransformer3DModel.*got Sequential; name its linears with layers="
    ):
        linear_layers(other)
    found = linear_layers(other, layers="0")
    assert [info.name for info in found] == ["0"] and not found.kept


def test_layers_choose_by_whole_names():
    model = build("WanTransformer3DModel")
    found = linear_layers(model, layers=[r"blocks\.\d+\.ffn\..*", "proj_out"])
    assert {info.kind for info in found if "ffn" in info.name} == {"ffn"}
    assert [info.name for info in found][-1] == "proj_out" and len(found) == 5
    assert found.kept["blocks.0.attn1.to_q"] == table.OUTSIDE
    with pytest.raises(ValueError, match="must match linears of .*got ffn, which match none"):
        linear_layers(model, layers="ffn")
    with pytest.raises(ValueError, match=r"must hold regular expressions, got '\('"):
        linear_layers(model, layers="(")


def test_linears_inside_lora_wrappers_keep_their_names():
    pytest.importorskip("peft")
    from peft import LoraConfig

    model = build("WanTransformer3DModel")
    before = linear_layers(model)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "ffn.net.2"]))
    after = linear_layers(model)
    assert after.quantized == before.quantized and after.kept == before.kept


def test_the_list_prints_blocks_that_are_alike_in_one_row():
    lines = str(linear_layers(build("WanTransformer3DModel"))).splitlines()
    assert lines[1].split() == ["blocks.0-1.attn1.to_q", "self", "24", "x", "24"]
    assert any(line.startswith("proj_out ") and line.endswith("output head") for line in lines)
    assert len(lines) == 1 + 12 + 8
