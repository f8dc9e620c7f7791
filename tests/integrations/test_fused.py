"""Blocks of Wan whose quantized linears norm, modulate, gate and add: equal to the unfused ones but for
rounding."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

from cases import quantized as make
from cases.methods import Banded
from cases.transformers import CASES

from vdit_ext import ops
from vdit_ext.integrations import accelerate, fused
from vdit_ext.testing import difference

WAN = next(case for case in CASES if case.name == "WanTransformer3DModel")
WIDE = dataclasses.replace(WAN, config=WAN.config | {"attention_head_dim": 24})


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@torch.no_grad()
def run(model: nn.Module, case=WIDE, **changes) -> torch.Tensor:
    return model(**(case.arguments() | changes), return_dict=False)[0]


def unfused(model: nn.Module, handle, **changes) -> torch.Tensor:
    """The same call with the blocks as upstream wrote them."""
    one = handle._attached[0]
    blocks, one.hook.fused = one.hook.fused, None
    for forward in blocks._forwards:
        forward.fuses = False
    try:
        return run(model, **changes)
    finally:
        one.hook.fused = blocks


def in_fused_blocks(handle) -> int:
    return sum("in a fused block" in row["reason"] for row in handle.explain().linears)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["int8", "int4", "planes"])
def test_fused_equals_unfused(kind, dtype):
    model = WIDE.build().to(dtype)
    given = {key: t.to(dtype) for key, t in WIDE.arguments().items() if key != "timestep"}
    with accelerate(model, quant=make.quantized(model, kind), num_inference_steps=4) as handle:
        got, want = run(model, **given), unfused(model, handle, **given)
        assert in_fused_blocks(handle) == 20
    assert not torch.equal(got, want)  # otherwise the fused path did not run
    assert (
        difference(got, want).cosine < {torch.float32: 1e-5, torch.bfloat16: 5e-4, torch.float16: 3e-5}[dtype]
    )
    assert got.dtype == dtype


def test_fused_is_nearer_to_full_precision_arithmetic_in_bf16():
    reference = WIDE.build()
    with accelerate(reference, quant=make.quantized(reference)) as handle:
        want = unfused(reference, handle)
    model = WIDE.build().to(torch.bfloat16)
    given = {key: t.to(torch.bfloat16) for key, t in WIDE.arguments().items() if key != "timestep"}
    with accelerate(model, quant=make.quantized(reference)) as handle:
        got, plain = run(model, **given), unfused(model, handle, **given)
    assert difference(got, want).cosine < 1.2 * difference(plain, want).cosine


@pytest.mark.parametrize("grid", ["tokens", "images"])
def test_other_forms_of_the_call(grid):
    if grid == "tokens":
        case, given = WIDE, {"timestep": torch.linspace(0, 900, 12).expand(2, -1)}
    else:
        case = next(c for c in CASES if c.config.get("image_dim"))
        given = {}
    model = case.build()
    with accelerate(model, quant=make.quantized(model), num_inference_steps=4) as handle:
        got = run(model, case, **given)
        handle._attached[0].hook.fused = None
        for forward in handle._attached[0].fused._forwards:
            forward.fuses = False
        want = run(model, case, **given)
    assert not torch.equal(got, want) and difference(got, want).cosine < 1e-5


@pytest.mark.parametrize("change", ["norm", "fused projections"])
def test_other_forms_of_the_block(change):
    config = WIDE.config | ({"cross_attn_norm": False} if change == "norm" else {})
    model = dataclasses.replace(WIDE, config=config).build()
    if change == "fused projections":
        with torch.no_grad():
            model.fuse_qkv_projections()
    with accelerate(model, sparse=Banded(), quant=make.quantized(model)) as handle:
        got, want = run(model), unfused(model, handle)
        assert in_fused_blocks(handle) > 0
    assert not torch.equal(got, want) and difference(got, want).cosine < 1e-5


def test_masks_and_rotations_stay_in_the_pass():
    model = WIDE.build()
    quantized = make.quantized(model, "masked")
    assert {layer.transform.hadamard for layer in quantized.layers.values()} == {16}
    with accelerate(model, quant=quantized) as handle:
        got, want = run(model), unfused(model, handle)
        assert in_fused_blocks(handle) == 20
    assert not torch.equal(got, want) and difference(got, want).cosine < 1e-5


def test_undo_restores_the_forwards():
    model = WIDE.build()
    want = run(model)
    handle = accelerate(model, quant=make.quantized(model))
    assert all("forward" in block.__dict__ for block in model.blocks)
    run(model)
    handle.undo()
    assert not any("forward" in block.__dict__ for block in model.blocks) and torch.equal(run(model), want)


def wrap_norm(model) -> None:
    norm = model.blocks[0].norm1
    inner = norm.forward
    norm.forward = lambda x: inner(x)


def train_dropout(model) -> None:
    model.blocks[0].ffn.net[1].p = 0.1
    model.blocks[0].ffn.train()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.blocks[0].attn1.to_q.register_forward_hook(lambda *a: None), "attn1.to_q has hooks"),
        (wrap_norm, "norm1 has hooks"),
        (train_dropout, "ffn is not upstream's"),
        (lambda m: setattr(m.blocks[0], "norm2", nn.LayerNorm(48)), "norm2 is not upstream's"),
        (lambda m: setattr(m.blocks[0].ffn.net[0], "approximate", "none"), "ffn is not upstream's"),
    ],
    ids=["hook", "replaced forward", "dropout", "norm", "gelu"],
)
def test_a_block_with_other_parts_runs_unfused(change, reason):
    model = WIDE.build()
    with accelerate(model, quant=make.quantized(model)) as handle:
        assert in_fused_blocks(handle) == 20
        change(model)
        assert fused.refusal(model.blocks[0]) == reason
        assert in_fused_blocks(handle) == 10
        torch.manual_seed(0)
        got = run(model)
        torch.manual_seed(0)
        want = unfused(model, handle)
        assert difference(got, want).cosine < 1e-5


def test_blocks_with_linears_in_high_precision_run_unfused():
    model = WIDE.build()
    with accelerate(model, quant=make.quantized(model, layers=r"blocks\.0\..*|blocks\.1\.ffn\..*")) as handle:
        assert in_fused_blocks(handle) == 10
        assert fused.refusal(model.blocks[1]) == "a linear is not quantized, or not to integer rows"


def test_autocast_runs_unfused():
    model = WIDE.build()
    with accelerate(model, quant=make.quantized(model)) as handle:
        with torch.autocast("cpu", torch.bfloat16):
            got, want = run(model), unfused(model, handle)
        assert torch.equal(got, want)


def test_inference_mode_quantizes_once_for_q_k_and_v(monkeypatch):
    model = WIDE.build()
    with accelerate(model, quant=make.quantized(model)):
        want, prologues = run(model), []
        quantize_rows = ops.quantize_rows

        def note(x, **settings):
            prologues.append(settings.get("prologue"))
            return quantize_rows(x, **settings)

        monkeypatch.setattr(ops, "quantize_rows", note)
        with torch.inference_mode():
            got = run(model)
    assert prologues.count("layer_norm") == 2 * 3 and torch.equal(got, want)


def test_regional_compile_of_fused_blocks():
    case = dataclasses.replace(WIDE, config=WIDE.config | {"num_layers": 4})
    model = case.build()
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with accelerate(model, quant=make.quantized(model)):
        want = run(model, case)
        model.compile_repeated_blocks(fullgraph=True, backend=count)
        got = run(model, case)
    torch._dynamo.reset()
    prologues = [
        node.kwargs.get("prologue") for node in graphs[0].graph.nodes if "quantize_rows" in str(node.target)
    ]
    # q, k and v of self-attention once; its output; q, k, v and output of cross-attention; feed-forward.
    norm, plain = "layer_norm", "none"
    want_prologues = [norm, plain, norm, plain, plain, plain, norm, "gelu_tanh"]
    assert len(graphs) == 1 and [p or plain for p in prologues] == want_prologues
    assert difference(got, want).cosine < 1e-8


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offload_of_a_quantized_model(kind):
    model = WIDE.build()
    where = {"onload_device": torch.device("cpu"), "offload_device": torch.device("cpu")}
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    with accelerate(model, quant=make.quantized(model)) as handle:
        want = {"leaf_level": unfused(model, handle), "block_level": run(model)}[kind]
        model.enable_group_offload(**where, offload_type=kind, **blocks)
        assert torch.equal(run(model), want)


def test_a_cache_on_top_of_fused_blocks():
    from diffusers import FirstBlockCacheConfig

    model = WIDE.build()
    plain = run(model)
    handle = accelerate(model, quant=make.quantized(model))
    want = run(model)
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    with model.cache_context("cond"):
        first = run(model)
    assert torch.equal(first, want)
    model.disable_cache()
    assert torch.equal(run(model), want)
    handle.undo()
    assert torch.equal(run(model), plain)
