"""``accelerate`` on the real Wan classes of diffusers, in tiny random configurations."""

from __future__ import annotations

import contextlib
import copy
import math
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import nn

diffusers = pytest.importorskip("diffusers")

from cases.methods import Banded  # noqa: E402
from diffusers import (  # noqa: E402
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.hooks import HookRegistry  # noqa: E402
from diffusers.models.attention_dispatch import _AttentionBackendRegistry  # noqa: E402

import vdit_ext  # noqa: E402
from vdit_ext import ops  # noqa: E402
from vdit_ext.integrations import accelerate, explain, handle_of, load_pipeline, processors  # noqa: E402
from vdit_ext.integrations.root_hook import StepCounter  # noqa: E402
from vdit_ext.sparse import SVG1, SVG2, BlockPlan, DraftAttention  # noqa: E402
from vdit_ext.sparse.gate import is_dense_step  # noqa: E402
from vdit_ext.sparse.plan import TokenLayout  # noqa: E402
from vdit_ext.sparse.state import LayerState, note_density  # noqa: E402

TEXT = 12


@dataclass(frozen=True)
class ShareGated(Banded):
    """Dense for the first half of the steps, whose number it must therefore know."""

    name: ClassVar[str] = "share"

    def is_dense(self, info, layer):
        return is_dense_step(info, 0.5, None, self.name)


@dataclass(frozen=True)
class Logging(Banded):
    """Keeps a log of its densities, as the methods of the package do."""

    name: ClassVar[str] = "logging"

    def new_state(self, layer, num_layers):
        state = LayerState(layer, num_layers)
        state.resets = 0
        return state

    def plan(self, q, k, layout, state):
        plan = super().plan(q, k, layout, SimpleNamespace(handle=torch.zeros(1), tokens_permuted=True))
        note_density(plan, layout, state)
        return plan


@pytest.fixture(autouse=True)
def _one_thread():
    """Tensors here are tiny: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_wan(
    layers: int = 2, heads: int = 2, head_dim: int = 64, seed: int = 0, **config
) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT,
        freq_dim=16,
        ffn_dim=32,
        num_layers=layers,
        rope_max_seq_len=32,
        **config,
    )
    return model.eval()


def inputs(grid=(3, 4, 6), batch: int = 1, timestep: float = 900.0, seed: int = 1, channels: int = 4) -> dict:
    """Arguments of the model for a grid of tokens [frames, rows, columns]."""
    make = torch.Generator().manual_seed(seed)
    frames, rows, columns = grid
    return {
        "hidden_states": torch.randn(batch, channels, frames, 2 * rows, 2 * columns, generator=make),
        "timestep": torch.full((batch,), timestep),
        "encoder_hidden_states": torch.randn(batch, 7, TEXT, generator=make),
        "return_dict": False,
    }


@torch.no_grad()
def run(model, **arguments) -> torch.Tensor:
    return model(**arguments)[0]


def assert_same(got: torch.Tensor, want: torch.Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * float(want.abs().max()))


# -- equality with upstream -------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("grid", [(3, 5, 7), (2, 4, 8), (1, 1, 1)])
def test_density_one_equals_stock(grid, batch):
    model, given = tiny_wan(), inputs(grid, batch)
    want = run(model, **given)
    with accelerate(model, sparse=Banded()) as handle:
        assert_same(run(model, **given), want)
        stats = handle.stats()
    assert stats["density"] == pytest.approx(1) and stats["sparse_calls"] == 2
    assert stats["attention_flops"] == pytest.approx(stats["dense_attention_flops"])


def test_per_token_timesteps_equal_stock():
    model, given = tiny_wan(), inputs((2, 3, 4), 2)
    given["timestep"] = torch.linspace(0, 700, 24).expand(2, -1)
    want = run(model, **given)
    method = Banded()
    with accelerate(model, sparse=method):
        assert_same(run(model, **given), want)
    assert method.calls[-1].timestep == 700


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
def test_dense_steps_are_bit_equal(dtype, fused):
    model, given = tiny_wan().to(dtype), inputs()
    given = {k: v.to(dtype) if torch.is_tensor(v) and k != "timestep" else v for k, v in given.items()}
    if fused:
        model.fuse_qkv_projections()
    want = run(model, **given)
    with accelerate(model, sparse=Banded(keep=0.3, dense_steps=1, shuffle=True)) as handle:
        assert torch.equal(run(model, **given), want)
        assert handle.stats()["dense_calls"] == 2
    with accelerate(model):
        assert torch.equal(run(model, **given), want)


def test_bfloat16_density_one_equals_stock():
    model, given = tiny_wan().to(torch.bfloat16), inputs()
    given = {k: v.bfloat16() if torch.is_tensor(v) and k != "timestep" else v for k, v in given.items()}
    want = run(model, **given)
    with accelerate(model, sparse=Banded()):
        assert_same(run(model, **given).float(), want.float(), 2e-2)


def test_autocast_equals_stock():
    model, given = tiny_wan(), inputs((3, 5, 7))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = run(model, **given)
        with accelerate(model, sparse=Banded()):
            assert_same(run(model, **given).float(), want.float(), 2e-2)


def test_narrow_storage_equals_stock():
    """Weights kept in 8 bits and widened layer by layer."""
    model, given = tiny_wan().to(torch.bfloat16), inputs()
    given = {k: v.bfloat16() if torch.is_tensor(v) and k != "timestep" else v for k, v in given.items()}
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    want = run(model, **given)
    with accelerate(model, sparse=Banded(shuffle=True)):
        assert_same(run(model, **given).float(), want.float(), 2e-2)


@pytest.mark.parametrize(
    "method",
    [
        SVG2(top_p=1.0, num_q_clusters=5, num_k_clusters=7, iter_init=3, dense_step_fraction=0.0),
        DraftAttention(sparsity=0.0, tile=(2, 3), dense_layers=0, dense_step_fraction=0.0),
    ],
    ids=["svg2", "draft"],
)
def test_methods_that_keep_everything_equal_stock(method):
    model, given = tiny_wan(), inputs((3, 5, 7), 2)
    want = run(model, **given)
    with accelerate(model, sparse=method) as handle:
        assert_same(run(model, **given), want)
        assert handle.stats()["density"] == pytest.approx(1)


def test_sparse_plan_equals_masked_attention():
    """The plan's mask given to upstream's attention yields the same model output."""
    model, given, method = tiny_wan(), inputs((3, 5, 7)), Banded(keep=0.4, shuffle=True)
    with accelerate(model, sparse=method) as handle:
        got = run(model, **given)
        stats = handle.stats()
    length = 105
    blocks = -(-length // method.block)
    width = round(method.keep * blocks)
    place = torch.empty(length, dtype=torch.long)
    place[method.token_order(TokenLayout((3, 5, 7))).long()] = torch.arange(length)
    block = place // method.block
    mask = (block[None, :] - block[:, None]) % blocks < width
    for part in model.blocks:
        forward = part.attn1.forward
        part.attn1.forward = lambda x, enc, _, rope, forward=forward: forward(x, enc, mask[None, None], rope)
    assert_same(got, run(model, **given))
    assert stats["density"] == pytest.approx(mask.float().mean().item(), rel=1e-5)
    assert stats["attention_flops"] == pytest.approx(stats["dense_attention_flops"] * stats["density"])


def test_fused_projections_equal_stock():
    model, given = tiny_wan(), inputs((3, 5, 7), 2)
    with accelerate(model, sparse=Banded(keep=0.5)) as handle:
        want = run(model, **given)
        model.fuse_qkv_projections()
        assert model.blocks[0].attn1.fused_projections
        assert_same(run(model, **given), want)
        model.unfuse_qkv_projections()
        handle.reset()
        assert_same(run(model, **given), want)


def test_image_conditioned_model_equals_stock():
    model = tiny_wan(image_dim=6, added_kv_proj_dim=128)
    given = inputs() | {"encoder_hidden_states_image": torch.randn(1, 5, 6)}
    given["encoder_hidden_states"] = torch.randn(1, 512, TEXT)
    want = run(model, **given)
    with accelerate(model, sparse=Banded()):
        assert_same(run(model, **given), want)


def test_nan_stays_a_nan():
    model, given = tiny_wan(), inputs()
    given["hidden_states"][0, 0, 0, 0, 0] = math.nan
    given["timestep"] = torch.full((1,), math.nan)
    with accelerate(model, sparse=Banded()) as handle:
        assert run(model, **given).isnan().any()
        run(model, **inputs(timestep=800.0))
        assert handle.stats()["sparse_calls"] == 4


def test_empty_batch():
    """The stock model stops at its last reshape; everything of ours before that works."""
    model = tiny_wan()
    with pytest.raises(RuntimeError) as stock:
        run(model, **inputs(batch=0))
    outputs = []
    model.blocks[-1].register_forward_hook(lambda module, args, output: outputs.append(output.shape))
    with (
        accelerate(model, sparse=Banded(shuffle=True, observes_dense_steps=True)),
        pytest.raises(RuntimeError) as ours,
    ):
        run(model, **inputs(batch=0))
    assert str(ours.value) == str(stock.value) and outputs == [(0, 72, 128)]


# -- token order ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_token", [False, True], ids=["one_timestep", "per_token_timesteps"])
@pytest.mark.parametrize("positional", [False, True], ids=["keywords", "positional"])
def test_hoisted_order_equals_order_in_each_layer(per_token, positional):
    model = tiny_wan(layers=3)
    given = inputs((3, 5, 7), 2)
    if per_token:
        given["timestep"] = torch.linspace(0, 900, 105).expand(2, -1)
    method = Banded(keep=0.3, shuffle=True, dense_layers=1)

    def call():
        if positional:
            names = ("hidden_states", "timestep", "encoder_hidden_states")
            with torch.no_grad():
                return model(*(given[name] for name in names))[0]
        return run(model, **given)

    handle = accelerate(model, sparse=method)
    hook = model._diffusers_hook.get_hook("vdit_ext")
    seen = []
    watch = model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    hoisted = call()
    hook.hoist = False
    assert_same(hoisted, call())
    watch.remove()
    handle.undo()
    order = method.token_order(TokenLayout((3, 5, 7))).long()
    assert torch.equal(seen[0], seen[1][:, order])
    with accelerate(model, sparse=Banded(keep=1.0, shuffle=True)):
        got = call()
    assert_same(got, call())


def test_no_hoisting_under_a_cache():
    """A cache mixes outputs of dense and sparse steps, which must then share one token order."""
    model, given = tiny_wan(), inputs()
    with accelerate(model, sparse=Banded(keep=0.5, shuffle=True)):
        hook = model._diffusers_hook.get_hook("vdit_ext")
        orders = []
        model.blocks[0].register_forward_pre_hook(lambda *_: orders.append(hook.token_order.order))
        model.enable_cache(
            diffusers.PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
            )
        )
        run(model, **given)
        model.disable_cache()
        run(model, **(given | {"timestep": torch.full((1,), 100.0)}))
    assert orders[0] is None and orders[1] is not None


# -- undoing ----------------------------------------------------------------------------------------------


def snapshot(model: nn.Module) -> dict:
    """Everything that accelerate may touch, by identity."""
    found = {}
    for name, part in model.named_modules():
        found[name] = {
            key: value
            for key, value in vars(part).items()
            if key not in ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
        }
        found[name]["hooks"] = (len(part._forward_hooks), len(part._forward_pre_hooks))
        found[name]["backend"] = getattr(getattr(part, "processor", None), "_attention_backend", None)
    found["global"] = _AttentionBackendRegistry.get_active_backend()
    return found


def assert_snapshot(model: nn.Module, before: dict) -> None:
    after = snapshot(model)
    assert after.keys() == before.keys()
    for name in before:
        if name == "global":
            assert after[name] == before[name]
            continue
        assert after[name].keys() == before[name].keys(), name
        for key, value in before[name].items():
            same = after[name][key] is value or after[name][key] == value
            assert same, f"{name}.{key}"


def test_undo_restores_everything():
    model, given = tiny_wan(), inputs()
    want = run(model, **given)
    before = snapshot(model)
    handle = accelerate(model, sparse=Banded(keep=0.4, shuffle=True))
    run(model, **given)
    model.set_attention_backend("native")  # also changes the global backend
    assert model.blocks[0].attn1.processor._attention_backend is not None
    assert handle_of(model) is handle
    handle.undo()
    assert_snapshot(model, before)
    assert handle_of(model) is None
    assert torch.equal(run(model, **given), want)
    handle.undo()  # a second time does nothing
    with accelerate(model, sparse=Banded()):
        pass
    assert_snapshot(model, before)


def test_undo_after_an_error():
    model = tiny_wan()
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError), accelerate(model, sparse=Banded()):
        raise ZeroDivisionError
    assert_snapshot(model, before)


def test_undo_leaves_the_hooks_of_others():
    model, given = tiny_wan(), inputs()
    want = run(model, **given)

    class Doubler(diffusers.hooks.ModelHook):
        def new_forward(self, module, *args, **kwargs):
            return (2 * self.fn_ref.original_forward(*args, **kwargs)[0],)

    registry = HookRegistry.check_if_exists_or_initialize(model)
    registry.register_hook(Doubler(), "below")
    handle = accelerate(model, sparse=Banded(keep=0.4))
    registry.register_hook(Doubler(), "above")
    run(model, **given)
    handle.undo()
    assert torch.equal(run(model, **given), 4 * want)
    registry.remove_hook("above")
    assert torch.equal(run(model, **given), 2 * want)
    registry.remove_hook("below")
    assert torch.equal(run(model, **given), want)


def test_undo_under_a_foreign_wrapper():
    model, given = tiny_wan(), inputs()
    want = run(model, **given)
    handle = accelerate(model, sparse=Banded(keep=0.4))
    inner = model.forward
    model.forward = lambda *args, **kwargs: (3 * inner(*args, **kwargs)[0],)
    handle.undo()
    assert torch.equal(run(model, **given), 3 * want)
    with accelerate(model, sparse=Banded(keep=0.4)) as handle:
        run(model, **given)
        assert handle.stats()["sparse_calls"] == 2
    assert torch.equal(run(model, **given), 3 * want)


# -- norm and rotation in one pass ------------------------------------------------------------------------


def cast_inputs(dtype: torch.dtype, **settings) -> dict:
    given = inputs((3, 5, 7), **settings)
    return {k: v.to(dtype) if torch.is_tensor(v) and k != "timestep" else v for k, v in given.items()}


def in_two_ways(monkeypatch, model, given, method) -> tuple[torch.Tensor, torch.Tensor, int]:
    """A sparse call as it comes, the same with upstream's separate norm and rotation, and the op's calls."""
    with accelerate(model, sparse=method):
        with monkeypatch.context() as patch:
            counted = Calls(patch, ops, "rms_norm_rope")
            got = run(model, **given)
        with monkeypatch.context() as patch:
            patch.setattr(processors, "can_norm_and_rotate", lambda *args: False)
            separate = run(model, **given)
    return got, separate, counted.count


@pytest.mark.parametrize("shuffle", [False, True], ids=["in_order", "hoisted"])
@pytest.mark.parametrize("fused_projections", [False, True], ids=["projections", "fused_projections"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sparse_calls_norm_and_rotate_in_one_pass(monkeypatch, dtype, fused_projections, shuffle):
    model, given = tiny_wan(), cast_inputs(dtype, batch=2)
    for block in model.blocks:
        for norm in (block.attn1.norm_q, block.attn1.norm_k):
            nn.init.normal_(norm.weight, 1.0, 0.3)
    model.to(dtype)
    if fused_projections:
        model.fuse_qkv_projections()
    got, separate, calls = in_two_ways(monkeypatch, model, given, Banded(keep=0.4, shuffle=shuffle))
    assert calls == 4, "q and k of two layers"
    ulps = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype]
    assert_same(got.float(), separate.float(), ulps)
    assert not torch.equal(got, separate), "they round differently"


def test_one_pass_is_nearer_to_exact_than_separate_ones(monkeypatch):
    model, given = tiny_wan(), cast_inputs(torch.bfloat16)
    tables = copy.deepcopy(model.rope)
    model.to(torch.bfloat16).rope = tables  # fp32, as ``from_pretrained`` leaves them
    wide = copy.deepcopy(model).double()
    exact_given = {k: v.double() if torch.is_tensor(v) and k != "timestep" else v for k, v in given.items()}
    method = Banded(keep=0.4)
    got, separate, calls = in_two_ways(monkeypatch, model, given, method)
    assert calls == 4
    with accelerate(wide, sparse=method, on_unsupported="reference"):
        exact = run(wide, **exact_given)
    far = [float((x.double() - exact).square().mean()) for x in (got, separate)]
    assert far[0] <= 1.1 * far[1], far


def test_autocast_norms_and_rotates_in_one_pass(monkeypatch):
    """Weights of the norms are fp32 there, under bf16 activations."""
    model, given = tiny_wan(), inputs((3, 5, 7))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, separate, calls = in_two_ways(monkeypatch, model, given, Banded(keep=0.4))
    assert calls == 4
    assert_same(got.float(), separate.float(), 2e-2)


class OtherNorm(nn.RMSNorm):
    pass


def _with(what: str, model: nn.Module) -> None:
    """Make the norm of q in the first block, or the tables, something that one pass does not stand for."""
    attn = model.blocks[0].attn1
    norm = attn.norm_q
    if what == "forward_hook":
        norm.register_forward_hook(lambda module, args, output: 2 * output)
    elif what == "forward_pre_hook":
        norm.register_forward_pre_hook(lambda module, args: (3 + args[0],))
    elif what == "replaced_forward":
        forward = norm.forward
        norm.forward = lambda x: 2 * forward(x)
    elif what == "other_class":
        attn.norm_q = OtherNorm(norm.normalized_shape, norm.eps)
    elif what == "layer_norm":
        attn.norm_q = nn.LayerNorm(norm.normalized_shape)
    elif what == "identity":
        attn.norm_q = nn.Identity()
    elif what == "no_eps":
        norm.eps = None
    elif what == "fp64_weight":
        attn.norm_q = norm.double()
    elif what == "fp64_tables":
        model.rope.register_forward_hook(lambda module, args, tables: tuple(t.double() for t in tables))
    elif what == "tables_for_each_head":
        model.rope.register_forward_hook(
            lambda module, args, tables: tuple(t.expand(-1, -1, 2, -1) for t in tables)
        )
    elif what == "strided_tables":
        model.rope.register_forward_hook(lambda module, args, tables: tuple(_strided(t) for t in tables))
    elif what == "quantized_weight":
        norm.weight = nn.Parameter(norm.weight.detach().as_subclass(TaggedTensor), requires_grad=False)


class TaggedTensor(torch.Tensor):
    """Stands for the tensor classes of quantization and sharding."""


def _strided(table: torch.Tensor) -> torch.Tensor:
    return table.repeat_interleave(2, -1)[..., ::2]


@pytest.mark.parametrize(
    "what",
    [
        "forward_hook",
        "forward_pre_hook",
        "replaced_forward",
        "other_class",
        "layer_norm",
        "identity",
        "no_eps",
        "fp64_weight",
        "fp64_tables",
        "tables_for_each_head",
        "strided_tables",
        "quantized_weight",
    ],
)
def test_what_one_pass_does_not_stand_for_stays_separate(monkeypatch, what):
    model, given = tiny_wan(layers=1), inputs((3, 5, 7))
    _with(what, model)
    got, separate, calls = in_two_ways(monkeypatch, model, given, Banded(keep=0.4))
    assert calls == 0 and torch.equal(got, separate)


def test_a_norm_that_is_trained_stays_separate(monkeypatch):
    """And is refused, as everything that asks for gradients is."""
    counted = Calls(monkeypatch, ops, "rms_norm_rope")
    model = tiny_wan().requires_grad_(False)
    model.blocks[0].attn1.norm_k.weight.requires_grad_(True)
    with accelerate(model, sparse=Banded()):
        with refused("gradients must not be asked for, call the model under"):
            model(**inputs())
        assert counted.count == 0
        run(model, **inputs())
        assert counted.count == 4


def test_calls_that_the_kernels_do_not_serve_stay_separate(monkeypatch):
    counted = Calls(monkeypatch, ops, "rms_norm_rope")
    model, given = tiny_wan(), inputs()
    block, tokens = model.blocks[0].attn1, torch.randn(1, 72, 128)
    mask = torch.ones(1, 1, 72, 72, dtype=torch.bool)
    with accelerate(model, sparse=Banded(dense_steps=1)):
        run(model, **given)  # dense
    with accelerate(model):
        run(model, **given)  # no method
    with torch.no_grad(), accelerate(model, sparse=Banded(), on_unsupported="dense"):
        block(tokens, None, mask)
    with accelerate(model.double(), sparse=Banded(), on_unsupported="reference"):
        run(model, **{k: v.double() if torch.is_tensor(v) and k != "timestep" else v for k, v in given.items()})
    assert counted.count == 0


def test_one_pass_without_a_rotary_embedding(monkeypatch):
    model, tokens = tiny_wan(layers=1), torch.randn(1, 72, 128)
    attention = model.blocks[0].attn1
    counted = Calls(monkeypatch, ops, "rms_norm_rope")
    with torch.no_grad():
        want = attention(tokens)
        with accelerate(model, sparse=Banded()):
            run(model, **inputs())  # sets the layout
            counted.count = 0
            attention.processor.dense = False
            assert_same(attention(tokens), want)
    assert counted.count == 2


def test_compiled_blocks_norm_and_rotate_in_one_pass():
    class Targets(Counter):
        def __call__(self, graph, example_inputs):
            self.names = [str(node.target) for node in graph.graph.nodes]
            return super().__call__(graph, example_inputs)

    model, given, counter = tiny_wan(layers=3), inputs((3, 5, 7)), Targets()
    with fresh_compiler(), accelerate(model, sparse=Banded(keep=0.4)):
        want = run(model, **given)
        model.compile_repeated_blocks(fullgraph=True, backend=counter)
        assert_same(run(model, **given), want)
    assert counter.graphs == 1
    assert sum("rms_norm_rope" in name for name in counter.names) == 2


# -- compilation ------------------------------------------------------------------------------------------


class Counter:
    """A compiler backend that counts graphs and runs them as they are."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return graph.forward


@contextlib.contextmanager
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "method",
    [
        Banded(keep=0.5, dense_steps=3, dense_layers=1),
        Banded(keep=0.5, dense_steps=3, observes_dense_steps=True),
        Banded(keep=0.5, dense_steps=3, dense_layers=1, shuffle=True),
        SVG2(num_q_clusters=4, num_k_clusters=6, iter_init=3),
        SVG2(num_q_clusters=4, num_k_clusters=6, iter_init=3, zero_step_kmeans_init=True),
        DraftAttention(),
    ],
    ids=["banded", "observing", "hoisted", "svg2", "svg2_observing", "draft"],
)
def test_regional_compile_makes_two_graphs(method):
    """12 layers times 12 steps, both guidance branches, in one graph without breaks for dense and for sparse."""
    model, counter = tiny_wan(layers=12, heads=1), Counter()
    times = [1000.0 - 80 * i for i in range(12)]
    with fresh_compiler(), accelerate(model, sparse=method, num_inference_steps=12) as handle:
        calls = [inputs(timestep=t, seed=seed) for t in times for seed in (0, 1)]
        eager = [run(model, **given) for given in calls]
        eager_stats = handle.stats()
        handle.reset(stats=True)
        model.compile_repeated_blocks(fullgraph=True, backend=counter)
        for given, want in zip(calls, eager, strict=True):
            assert_same(run(model, **given), want)
        stats = handle.stats()
    assert counter.graphs <= 2
    assert stats["dense_calls"] > 0 and stats["sparse_calls"] > 0
    assert stats["dense_calls"] + stats["sparse_calls"] == 12 * 12 * 2
    for figure in ("density", "density_steps", "density_overall"):
        assert stats[figure] == pytest.approx(eager_stats[figure], rel=1e-3)


@pytest.mark.slow
def test_inductor_on_two_layers():
    """The default compiler on the methods of the package, each in a model of its own."""
    given = inputs((3, 5, 7))
    calls = [given | {"timestep": torch.tensor([t])} for t in (900.0, 800.0, 700.0, 600.0)]
    for method in (
        SVG2(num_q_clusters=4, num_k_clusters=6, iter_init=3, zero_step_kmeans_init=True),
        DraftAttention(tile=(2, 2), dense_layers=0),
    ):
        model = tiny_wan(heads=1)
        with fresh_compiler(), accelerate(model, sparse=method, num_inference_steps=4) as handle:
            want = [run(model, **call) for call in calls]
            handle.reset(stats=True)
            model.compile_repeated_blocks(fullgraph=True)
            for call, expected in zip(calls, want, strict=True):
                assert_same(run(model, **call), expected, 1e-4)
            stats = handle.stats()
            assert stats["dense_calls"] == 2 and stats["sparse_calls"] == 6 and 0 < stats["density"] < 1


# -- guidance, steps, videos ------------------------------------------------------------------------------


def test_batched_and_sequential_guidance_agree():
    model, method = tiny_wan(), Banded(keep=0.4)
    both = inputs((3, 5, 7), 2)
    with accelerate(model, sparse=method):
        with model.cache_context("cond_uncond"):
            want = run(model, **both)
        for i, name in enumerate(("cond", "uncond")):
            one = {k: v[i : i + 1] if torch.is_tensor(v) else v for k, v in both.items()}
            with model.cache_context(name):
                assert_same(run(model, **one), want[i : i + 1])
    assert [call.branch for call in method.calls] == ["batched", "cond", "uncond"]
    assert {call.step for call in method.calls} == {0}


def test_steps_follow_the_timestep():
    model, method = tiny_wan(layers=1), Banded(dense_steps=1)
    with accelerate(model, sparse=method, num_inference_steps=3) as handle:
        for t in (900, 900, 600, 600, 300, 300, 950, 950):
            run(model, **inputs(timestep=float(t)))
        told = [(call.step, call.branch, call.timestep) for call in method.calls]
        assert told == [
            (0, "cond", 900),
            (0, "uncond", 900),
            (1, "cond", 600),
            (1, "uncond", 600),
            (2, "cond", 300),
            (2, "uncond", 300),
            (0, "cond", 950),
            (0, "uncond", 950),
        ]
        assert {call.num_steps for call in method.calls} == {3} and method.calls[0].num_layers == 1
        assert handle.stats()["dense_calls"] == 4 and handle.stats()["sparse_calls"] == 4
        assert handle.stats()["video_steps"] == 1


def test_new_video_resets_the_states():
    model, method = tiny_wan(), Banded()
    with accelerate(model, sparse=method) as handle:
        states = model._diffusers_hook.get_hook("vdit_ext")._states
        for t in (900.0, 800.0):
            run(model, **inputs(timestep=t))
        states = model._diffusers_hook.get_hook("vdit_ext")._states
        before = [state.resets for state in states]
        run(model, **inputs(timestep=700.0))
        assert [state.resets for state in states] == before
        run(model, **inputs(timestep=900.0))
        assert all(state.resets > count for state, count in zip(states, before, strict=True))
        before = [state.resets for state in states]
        handle.reset()
        run(model, **inputs(timestep=900.0))
        assert all(state.resets > count for state, count in zip(states, before, strict=True))
        assert method.calls[-1].step == 0


def test_another_size_resets_the_states():
    model = tiny_wan()
    with accelerate(model, sparse=Banded()):
        run(model, **inputs((2, 3, 4), timestep=900.0))
        states = model._diffusers_hook.get_hook("vdit_ext")._states
        before = [state.resets for state in states]
        run(model, **inputs((2, 3, 5), timestep=800.0))
        assert all(state.resets > count for state, count in zip(states, before, strict=True))


# -- pipelines --------------------------------------------------------------------------------------------


def tiny_vae() -> AutoencoderKLWan:
    torch.manual_seed(5)
    return AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    ).eval()  # fmt: skip


def tiny_pipeline(two_experts: bool = False, scheduler=None, **config) -> WanPipeline:
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=tiny_wan(),
        transformer_2=tiny_wan(seed=7) if two_experts else None,
        boundary_ratio=0.8 if two_experts else None,
        **config,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, steps: int = 4, **settings) -> torch.Tensor:
    make = torch.Generator().manual_seed(3)
    return pipe(
        prompt_embeds=torch.randn(1, 7, TEXT, generator=make),
        negative_prompt_embeds=torch.randn(1, 7, TEXT, generator=make),
        height=64,
        width=96,
        num_frames=9,
        num_inference_steps=steps,
        generator=make,
        output_type="latent",
        **settings,
    ).frames


def test_pipeline_gives_number_of_steps_and_branches():
    pipe, method = tiny_pipeline(), Banded(dense_steps=1)
    want = sample(pipe)
    with accelerate(pipe, sparse=method) as handle:
        assert_same(sample(pipe), want, 1e-4)
        first = len(method.calls)
        assert [call.step for call in method.calls] == [0, 0, 1, 1, 2, 2, 3, 3]
        assert [call.branch for call in method.calls] == ["cond", "uncond"] * 4
        assert {call.num_steps for call in method.calls} == {4}
        sample(pipe, steps=6, guidance_scale=1.0)
        assert [call.step for call in method.calls[first:]] == list(range(6))
        assert {call.num_steps for call in method.calls[first:]} == {6}
        stats = handle.stats()
        assert stats["video_steps"] == 6
        assert stats["dense_calls"] == 2 * (2 + 1) and stats["sparse_calls"] == 2 * (6 + 5)
    assert torch.equal(sample(pipe), want)


def test_one_step_videos_are_told_apart():
    pipe, method = tiny_pipeline(), Banded(dense_steps=1)
    with accelerate(pipe, sparse=method) as handle:
        for _ in range(3):
            sample(pipe, steps=1, guidance_scale=1.0)
        assert handle.stats()["sparse_calls"] == 0
    assert [call.branch for call in method.calls] == ["cond"] * 3


def test_an_exchanged_scheduler_is_followed():
    pipe, method = tiny_pipeline(), ShareGated()
    with accelerate(pipe, sparse=method) as handle:
        sample(pipe, steps=2, guidance_scale=1.0)
        handle.reset(stats=True)
        pipe.scheduler = UniPCMultistepScheduler.from_config(
            pipe.scheduler.config, use_flow_sigmas=True, flow_shift=5.0
        )
        sample(pipe, steps=6, guidance_scale=1.0)
        assert handle.stats()["dense_calls"] == handle.stats()["sparse_calls"] == 2 * 3
        assert handle.explain()[0]["dense_steps"] == "0-2 of 6"
    assert [(call.step, call.num_steps) for call in method.calls[2:]] == [(step, 6) for step in range(6)]


def test_the_tail_of_a_schedule_is_counted():
    """Video-to-video pipelines run a part of the steps that they, and accelerate, are given."""
    scheduler = SimpleNamespace(timesteps=torch.arange(1000.0, 0.0, -100.0), num_inference_steps=10)
    counter = StepCounter(10, SimpleNamespace(scheduler=scheduler, num_timesteps=8))
    counter.advance(800.0)
    assert (counter.step, counter.num_steps, counter.timesteps[0]) == (0, 8, 800.0)
    with refused("num_inference_steps must be what the pipeline runs, which is 8, got 9"):
        StepCounter(9, counter._pipeline).advance(800.0)


def test_multistep_scheduler():
    pipe, method = (
        tiny_pipeline(scheduler=UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=5.0)),
        Banded(),
    )
    with accelerate(pipe, sparse=method):
        sample(pipe, steps=5)
    assert [call.step for call in method.calls] == [i // 2 for i in range(10)]


def test_two_experts_share_the_step_count():
    pipe, method = tiny_pipeline(two_experts=True), Banded(dense_steps=3)
    want = sample(pipe, steps=8)
    with accelerate(pipe, sparse=method) as handle:
        assert_same(sample(pipe, steps=8), want, 1e-4)
        calls = [layer["dense_calls"] + layer["sparse_calls"] for layer in handle.stats()["layers"]]
        rows = handle.explain()
    assert [call.step for call in method.calls] == [i // 2 for i in range(16)]
    assert len(calls) == 4 and calls[0] > 0 and calls[2] > 0 and sum(calls[::2]) == 16
    assert {row["model"] for row in rows} == {"transformer", "transformer_2"}
    dense = {step for row in rows for step in row["ran_dense"]}
    assert dense == {0, 1, 2}
    assert {step for row in rows for step in row["ran_sparse"]} == set(range(3, 8))
    assert rows[0]["dense_steps"] == "0-2 of 8"
    assert torch.equal(sample(pipe, steps=8), want)


def test_text_to_image_to_video_timesteps():
    """Wan 2.2 TI2V passes one timestep a token."""
    pipe, method = tiny_pipeline(expand_timesteps=True), Banded(keep=0.5, shuffle=True, dense_steps=1)
    with accelerate(pipe, sparse=method):
        assert sample(pipe).isfinite().all()
    assert [call.step for call in method.calls] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_pipeline_folder_round_trip(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=32, d_model=TEXT, d_kv=4, d_ff=8, num_layers=1, num_heads=2, relative_attention_num_buckets=4)
    )  # fmt: skip
    pipe = WanPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=encoder.eval(),
        vae=tiny_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=tiny_wan(),
    )
    pipe.save_pretrained(tmp_path / "wan")
    loaded = load_pipeline(tmp_path / "wan")
    assert type(loaded) is WanPipeline and loaded.transformer_2 is None
    for one in (pipe, loaded):
        one.set_progress_bar_config(disable=True)

    def movie(one):
        return one(
            prompt="a b", negative_prompt="b", height=32, width=32, num_frames=5, num_inference_steps=2,
            max_sequence_length=8, generator=torch.Generator().manual_seed(0), output_type="pt",
        ).frames  # fmt: skip

    want = movie(pipe)
    assert torch.equal(movie(loaded), want)
    with accelerate(loaded, sparse=Banded(dense_steps=1)):
        assert_same(movie(loaded), want, 1e-3)
    narrow = load_pipeline(tmp_path / "wan", dtype=torch.bfloat16)
    assert narrow.text_encoder.dtype == torch.bfloat16 and narrow.vae.dtype == torch.float32
    narrow.set_progress_bar_config(disable=True)
    seen = []
    narrow.vae.decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    assert movie(narrow).isfinite().all()
    assert set(seen) == {torch.float32}
    half = narrow.transformer.blocks[0]
    assert half.attn1.to_q.weight.dtype == torch.bfloat16
    assert half.scale_shift_table.dtype == torch.float32  # the class keeps it so


def tiny_tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "a", "b"])}
    base = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=base, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=8
    )


# -- LoRA, offload, caches --------------------------------------------------------------------------------


class LowRank(nn.Module):
    """A linear layer with a low-rank addition, put in place of the layer as LoRA libraries do."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(2, base.in_features) / 8)
        self.up = nn.Parameter(torch.randn(base.out_features, 2) / 8)

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_low_rank_layers_before_and_after(before):
    given = inputs((3, 5, 7))
    base = run(tiny_wan(), **given)

    def add(model):
        torch.manual_seed(2)
        for block in model.blocks:
            block.attn1.to_q, block.attn1.to_v = LowRank(block.attn1.to_q), LowRank(block.attn1.to_v)
        return model

    want = run(add(tiny_wan()), **given)
    assert not torch.allclose(want, base, atol=1e-3)
    model = tiny_wan()
    if before:
        add(model)
    with accelerate(model, sparse=Banded()):
        if not before:
            add(model)
        assert_same(run(model, **given), want)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_peft_adapter_before_and_after(before):
    peft = pytest.importorskip("peft")
    given, config = inputs((3, 5, 7)), peft.LoraConfig(r=2, target_modules=["to_q", "to_v", "to_out.0"])

    def add(model):
        torch.manual_seed(2)
        model.add_adapter(config)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.1)
        return model

    want = run(add(tiny_wan()), **given)
    model = tiny_wan()
    if before:
        add(model)
    with accelerate(model, sparse=Banded()):
        if not before:
            add(model)
        assert_same(run(model, **given), want)


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_group_offload(kind, before):
    pytest.importorskip("accelerate")
    model, given = tiny_wan(), inputs()
    method = Banded(keep=0.4, shuffle=True)
    with accelerate(model, sparse=method):
        want = run(model, **given)

    def offload():
        diffusers.hooks.apply_group_offloading(
            model,
            onload_device=torch.device("cpu"),
            offload_device=torch.device("cpu"),
            offload_type=kind,
            num_blocks_per_group=1,
        )

    if before:
        offload()
    with accelerate(model, sparse=method):
        if not before:
            offload()
        assert_same(run(model, **given), want)
    run(model, **given)


def test_pyramid_attention_broadcast_on_top():
    pipe = tiny_pipeline()
    with accelerate(pipe, sparse=Banded(keep=0.5, dense_steps=1, shuffle=True)) as handle:
        pipe.transformer.enable_cache(
            diffusers.PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=2,
                spatial_attention_timestep_skip_range=(0, 1001),
                current_timestep_callback=lambda: pipe.current_timestep,
            )
        )
        assert sample(pipe, steps=6, guidance_scale=1.0).isfinite().all()
        stats = handle.stats()
        assert stats["dense_calls"] + stats["sparse_calls"] == 2 * 3  # the other half came from the cache
        pipe.transformer.disable_cache()


def test_faster_cache_on_top():
    pipe, other = tiny_pipeline(), tiny_pipeline()

    def cache(pipeline):
        pipeline.transformer.enable_cache(
            diffusers.FasterCacheConfig(
                spatial_attention_block_skip_range=2,
                spatial_attention_timestep_skip_range=(-1, 900),  # it needs two steps before it may skip
                tensor_format="BCFHW",
                is_guidance_distilled=True,
                attention_weight_callback=lambda _: 0.3,
                current_timestep_callback=lambda: int(pipeline.current_timestep),
            )
        )

    cache(other)
    want = sample(other, steps=6, guidance_scale=1.0)
    with accelerate(pipe, sparse=Banded()) as handle:
        cache(pipe)
        assert_same(sample(pipe, steps=6, guidance_scale=1.0), want, 1e-4)
        assert 0 < handle.stats()["sparse_calls"] < 2 * 6
    assert_same(sample(pipe, steps=6, guidance_scale=1.0), want, 1e-4)


def test_layer_skip_knows_the_processor():
    from diffusers.hooks import LayerSkipConfig, apply_layer_skip

    model, given = tiny_wan(), inputs()
    with accelerate(model, sparse=Banded()) as handle:
        apply_layer_skip(model, LayerSkipConfig(indices=[1], fqn="blocks", skip_attention=True, skip_ff=False))
        run(model, **given)
        assert handle.stats()["sparse_calls"] == 1


# -- explain and stats ------------------------------------------------------------------------------------


def test_explain_lists_every_layer():
    model = tiny_wan(layers=3)
    rows = explain(model)
    assert [row["backend"] for row in rows] == ["upstream"] * 3
    assert rows[0]["reason"] == "accelerate() has not been called"
    with accelerate(model, sparse=Banded(dense_steps=2, dense_layers=1), num_inference_steps=5) as handle:
        rows = explain(model)
        assert rows == handle.explain()
        assert [row["dense_steps"] for row in rows] == ["0-4 of 5", "0-1 of 5", "0-1 of 5"]
        assert [row["layer"] for row in rows] == [f"blocks.{i}.attn1" for i in range(3)]
        first = rows[1]
        assert (first["method"], first["backend"], first["dtype"]) == ("banded", "cpu", "float32")
        assert (first["heads"], first["head_dim"]) == (2, 64)
        table = str(rows)
        assert "blocks.1.attn1 .. blocks.2.attn1" in table and table.count("\n") == 2
        run(model, **inputs())
        assert explain(model)[1]["ran_dense"] == [0]
    assert explain(model)[0]["method"] == "dense"


def test_explain_tells_what_ran():
    """Steps that a policy made dense count as dense, though the method wanted them sparse."""
    for policy, head_dim, want in [
        ("dense", 12, ([0, 1, 2], [])),
        ("reference", 12, ([0], [1, 2])),
        ("error", 64, ([0], [1, 2])),
    ]:
        model = tiny_wan(head_dim=head_dim)
        with accelerate(model, sparse=Banded(dense_steps=1), on_unsupported=policy) as handle:
            for timestep in (900.0, 600.0, 600.0, 300.0):
                run(model, **inputs(timestep=timestep))
            for row in handle.explain():
                assert (row["ran_dense"], row["ran_sparse"]) == want, policy


def test_explain_tells_what_ran_when_only_one_call_falls_back():
    """Gradients are seen only by the call, and no later call is recorded by an earlier one's answer."""
    model, counter = tiny_wan(), Counter()
    for compiled in (False, True):
        with fresh_compiler(), accelerate(model, sparse=Banded(), on_unsupported="dense") as handle:
            if compiled:
                model.compile_repeated_blocks(fullgraph=True, backend=counter)
            run(model, **inputs(timestep=900.0))
            model(**inputs(timestep=600.0))
            run(model, **inputs(timestep=300.0))
            for row in handle.explain():
                assert (row["ran_dense"], row["ran_sparse"]) == ([1], [0, 2]), compiled
    assert counter.graphs > 0


def test_explain_leaves_out_what_a_cache_answered():
    pipe = tiny_pipeline()
    with accelerate(pipe, sparse=Banded(dense_steps=1)) as handle:
        pipe.transformer.enable_cache(
            diffusers.PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=2,
                spatial_attention_timestep_skip_range=(0, 1001),
                current_timestep_callback=lambda: pipe.current_timestep,
            )
        )
        sample(pipe, steps=6, guidance_scale=1.0)
        for row in handle.explain():
            assert len(row["ran_dense"]) + len(row["ran_sparse"]) == 3
        pipe.transformer.disable_cache()


def test_explain_tells_the_device_that_ran(monkeypatch):
    """Between calls, offloaded weights lie on another device than the kernels ran on."""
    model = tiny_wan()
    with accelerate(model, sparse=Banded()):
        elsewhere = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
        monkeypatch.setattr("vdit_ext.integrations.diffusers._weight", lambda attn: elsewhere)
        assert explain(model)[0]["backend"] == "none"
        run(model, **inputs())
        row = explain(model)[0]
    assert row["backend"] == "cpu" and row["reason"] == "head_dim and dtype are served by the cpu kernels"


def test_explain_without_a_method_or_steps():
    model = tiny_wan(layers=1)
    with accelerate(model):
        assert explain(model)[0]["reason"] == "no sparse method was given"
    with accelerate(model, sparse=Banded()):
        assert explain(model)[0]["dense_steps"] == "unknown, no number of steps"


def test_densities_of_sparse_calls_of_sparse_steps_and_of_all():
    """One of three layers stays dense in the three sparse steps of four."""
    model = tiny_wan(layers=3)
    with accelerate(model, sparse=Banded(keep=0.5, dense_steps=1, dense_layers=1)) as handle:
        for timestep in (900.0, 700.0, 500.0, 300.0):
            for _ in range(2):
                run(model, **inputs(timestep=timestep))
        stats = handle.stats()
        kept = stats["density"]
        assert 0.4 < kept < 0.6 and (stats["sparse_calls"], stats["dense_calls"]) == (12, 12)
        assert stats["density_steps"] == pytest.approx((1 + 2 * kept) / 3)
        assert stats["density_overall"] == pytest.approx((1 + kept) / 2)
        assert [row["density_steps"] for row in stats["layers"]] == pytest.approx([1, kept, kept])
        assert [row["density_overall"] for row in stats["layers"]] == pytest.approx(
            [1, *[(1 + 3 * kept) / 4] * 2]
        )
        assert math.isnan(stats["layers"][0]["density"])
        handle.reset(stats=True)
        run(model, **inputs())
        stats = handle.stats()
        assert math.isnan(stats["density_steps"]) and stats["density_overall"] == 1


def test_steps_that_a_policy_makes_dense_are_no_sparse_steps():
    model = tiny_wan(head_dim=12)
    with accelerate(model, sparse=Banded(keep=0.3, dense_layers=1), on_unsupported="dense") as handle:
        run(model, **inputs())
        assert math.isnan(handle.stats()["density_steps"]) and handle.stats()["density_overall"] == 1


class Calls:
    """Counts the calls of a function that it takes the place of."""

    def __init__(self, monkeypatch, owner, name: str):
        self.count = 0
        function = getattr(owner, name)

        def counted(*args, **kwargs):
            self.count += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)


def test_density_is_computed_once_a_call(monkeypatch):
    counted = Calls(monkeypatch, BlockPlan, "kept_pairs")
    settings = dict(num_q_clusters=4, num_k_clusters=6, iter_init=1, dense_step_fraction=0.0)
    for method in (SVG2(**settings), Logging(keep=0.5), Banded(keep=0.5)):
        counted.count = 0
        model = tiny_wan()
        with accelerate(model, sparse=method) as handle:
            run(model, **inputs())
            assert handle.stats()["sparse_calls"] == counted.count == 2, method.name


def test_density_is_not_computed_when_nobody_asks(monkeypatch):
    counted = Calls(monkeypatch, BlockPlan, "kept_pairs")
    for method in (Logging(keep=0.5), Banded(keep=0.5)):
        model = tiny_wan()
        with accelerate(model, sparse=method, collect_stats=False):
            run(model, **inputs())
    assert counted.count == 0


def test_only_keys_and_values_are_permuted(monkeypatch):
    """Attention takes queries, and leaves its results, where they are."""
    permuted, put_back = (Calls(monkeypatch, ops, name) for name in ("permute_rows", "unpermute_rows"))
    model = tiny_wan()
    with accelerate(model, sparse=Banded(keep=0.5, shuffle=True)):
        model._diffusers_hook.get_hook("vdit_ext").hoist = False
        run(model, **inputs())
    assert (permuted.count, put_back.count) == (2 * 2, 0)


def test_statistics_can_be_off_and_cleared():
    model, given = tiny_wan(), inputs()
    with accelerate(model, sparse=Banded(), collect_stats=False) as handle:
        run(model, **given)
        assert handle.stats()["sparse_calls"] == 0 and math.isnan(handle.stats()["density"])
    with accelerate(model, sparse=Banded(dense_layers=1), collect_stats=False) as handle:
        run(model, **given)
        assert math.isnan(handle.stats()["density_steps"]) and math.isnan(handle.stats()["density_overall"])
    with accelerate(model, sparse=Banded()) as handle:
        run(model, **given)
        handle.reset(stats=True)
        assert handle.stats()["sparse_calls"] == 0
        run(model, **given)
        assert handle.stats()["sparse_calls"] == 2


def test_statistics_survive_inference_mode():
    model, given = tiny_wan(), inputs()
    with accelerate(model, sparse=Banded()) as handle:
        with torch.inference_mode():
            model(**given)
        run(model, **given)
        assert handle.stats()["sparse_calls"] == 4


def test_deepcopied_model_is_independent():
    model, given = tiny_wan(), inputs()
    with accelerate(model, sparse=Banded()):
        pass
    copied = copy.deepcopy(model)
    with accelerate(copied, sparse=Banded(keep=0.3)):
        assert not torch.equal(run(copied, **given), run(model, **given))


# -- refusals ---------------------------------------------------------------------------------------------


def refused(pattern: str, kind: type = ValueError):
    return pytest.raises(kind, match=pattern)


def test_refuses_an_unknown_class():
    with refused("class must be one of WanTransformer3DModel.*, got Linear", TypeError):
        accelerate(nn.Linear(2, 2), sparse=Banded())
    with refused("a diffusers transformer, or a pipeline that holds one, is expected, got int", TypeError):
        accelerate(3, sparse=Banded())
    for thing in (3, nn.Linear(2, 2)):
        with refused("^vdit_ext.explain: ", TypeError):
            explain(thing)


def test_names_in_sentences_exist():
    assert vdit_ext.load_pipeline is load_pipeline and "load_pipeline" in vdit_ext.__all__
    code = "import sys; sys.modules['diffusers'] = None; import vdit_ext.integrations as i; i.handle_of"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError: vdit_ext.integrations.handle_of: diffusers is expected to be installed" in done.stderr


def test_refuses_what_is_no_method():
    with refused("sparse must be a method of vdit_ext.sparse, got object", TypeError):
        accelerate(tiny_wan(), sparse=object())
    with refused(r"must be a method with its settings, got the class SVG2; make one with SVG2\(\)", TypeError):
        accelerate(tiny_wan(), sparse=SVG2)


def test_a_fault_of_a_method_stays_what_it_is():
    class Faulty(Banded):
        def is_dense(self, info, layer):
            return len(layer) > 0

    model = tiny_wan()
    before = snapshot(model)
    with refused("object of type 'int' has no len", TypeError):
        accelerate(model, sparse=Faulty())
    assert_snapshot(model, before)
    pipe = tiny_pipeline()
    with accelerate(pipe, sparse=Faulty()), refused("object of type 'int' has no len", TypeError):
        run(pipe.transformer, **inputs())


def test_refuses_an_unknown_policy():
    with refused('on_unsupported must be "error", "dense" or "reference", got \'maybe\''):
        accelerate(tiny_wan(), sparse=Banded(), on_unsupported="maybe")


def test_refuses_a_number_of_steps_below_one():
    with refused("num_inference_steps must be at least 1, got 0"):
        accelerate(tiny_wan(), sparse=Banded(), num_inference_steps=0)


def test_refuses_another_number_of_steps_than_the_pipeline_runs():
    pipe = tiny_pipeline()
    sample(pipe, steps=6)
    with accelerate(pipe, sparse=Banded(dense_steps=1), num_inference_steps=4) as handle:
        assert handle.explain()[0]["dense_steps"] == "0 of 4"  # not of the earlier 6
        for _ in range(2):
            with refused("num_inference_steps must be what the pipeline runs, which is 3, got 4; leave it out"):
                sample(pipe, steps=3)
        sample(pipe, steps=4, guidance_scale=1.0)
        assert handle.stats()["sparse_calls"] == 2 * 3


def test_refuses_to_accelerate_twice():
    model = tiny_wan()
    with accelerate(model, sparse=Banded()):
        with refused(r"WanTransformer3DModel is accelerated already; call undo\(\) on the first handle"):
            accelerate(model, sparse=Banded())
        run(model, **inputs())


def test_refuses_a_share_of_an_unknown_number_of_steps():
    sentence = (
        "share takes its dense steps as a share of all steps, whose number must be known: pass num_inference"
    )
    with refused(sentence):
        accelerate(tiny_wan(), sparse=ShareGated())
    pipe = tiny_pipeline()
    with accelerate(pipe, sparse=ShareGated()) as handle:
        with refused(sentence):
            run(pipe.transformer, **inputs())
        sample(pipe, guidance_scale=1.0)
        assert handle.stats()["dense_calls"] == handle.stats()["sparse_calls"] == 4
    with accelerate(tiny_wan(), sparse=ShareGated(), num_inference_steps=2):
        pass


@pytest.mark.parametrize("method", [SVG1(), SVG2(), DraftAttention()], ids=["svg1", "svg2", "draft"])
def test_methods_without_a_shift_refuse_an_unknown_number_of_steps(method):
    """Even where their first layer is dense in any step."""
    model = tiny_wan()
    before = snapshot(model)
    with refused(
        f"accelerate: {method.name} takes its dense steps as a share of all steps, whose number must be"
    ):
        accelerate(model, sparse=method)
    assert_snapshot(model, before)
    with accelerate(tiny_pipeline(), sparse=method), accelerate(model, sparse=method, num_inference_steps=4):
        pass


def test_a_given_shift_tells_the_dense_steps_of_a_transformer_alone():
    model = tiny_wan(layers=1)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(sigmas=[1 - i / 10 for i in range(10)])
    method = SVG2(num_q_clusters=2, num_k_clusters=3, iter_init=1, dense_step_fraction=0.2, flow_shift=5.0)
    with accelerate(model, sparse=method) as handle:
        for timestep in scheduler.timesteps:
            run(model, **inputs((2, 2, 3), timestep=timestep))
        row = handle.explain()[0]
    assert (row["ran_dense"], row["ran_sparse"]) == ([0, 1], list(range(2, 10)))


def test_refuses_a_head_dim():
    model, given = tiny_wan(head_dim=12), inputs()
    sentence = "blocks.0.attn1: head_dim must be a multiple of 8 up to 256 on cpu, got 12"
    before = snapshot(model)
    with refused(sentence):
        accelerate(model, sparse=Banded())
    assert_snapshot(model, before)
    want = run(model, **given)
    with accelerate(model, sparse=Banded(keep=0.3), on_unsupported="dense") as handle:
        assert torch.equal(run(model, **given), want)
        assert handle.explain()[0]["reason"].startswith("dense in every step: head_dim must")
        assert handle.stats()["sparse_calls"] == 0
    with accelerate(model, sparse=Banded(), on_unsupported="reference") as handle:
        assert_same(run(model, **given), want)
        assert handle.explain()[0]["backend"] == "naive"
        assert handle.stats()["sparse_calls"] == 2


def test_refuses_a_dtype():
    model = tiny_wan().double()
    given = inputs()
    given = {k: v.double() if torch.is_tensor(v) and k != "timestep" else v for k, v in given.items()}
    sentence = "blocks.0.attn1: dtype must be float32, float16 or bfloat16 on cpu, got float64"
    with refused(sentence):
        accelerate(model, sparse=Banded())
    want = run(model, **given)
    with accelerate(model, sparse=Banded(shuffle=True), on_unsupported="reference"):
        assert_same(run(model, **given), want)


def test_refuses_a_dtype_that_only_the_call_shows():
    model, given = tiny_wan(), inputs()
    with accelerate(model, sparse=Banded(dense_steps=1)) as handle:
        model.double()
        given = {k: v.double() if torch.is_tensor(v) and k != "timestep" else v for k, v in given.items()}
        with refused("blocks.0.attn1: dtype must be float32, float16 or bfloat16 on cpu, got float64"):
            run(model, **given)
        assert handle.explain()[0]["reason"].startswith("calls raise: dtype")
        model.float()


def test_refuses_a_device():
    model = tiny_wan()
    with accelerate(model, sparse=Banded()):
        attention = model.blocks[0].attn1.to("meta")
        with refused("blocks.0.attn1: device must be cpu or cuda, got meta"):
            attention(torch.empty(1, 8, 128, device="meta"))


def test_refuses_a_mask():
    model = tiny_wan()
    block, tokens = model.blocks[0].attn1, torch.randn(1, 8, 128)
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    want = block(tokens, None, mask)
    for policy in ("error", "reference"):
        with (
            accelerate(model, sparse=Banded(), on_unsupported=policy),
            refused(r"attention_mask must be None for sparse attention, got a mask of shape \[1, 1, 8, 8\]"),
        ):
            block(tokens, None, mask)
    with accelerate(model, sparse=Banded(), on_unsupported="dense"):
        assert torch.equal(block(tokens, None, mask), want)


def test_refuses_gradients():
    """Silently missing gradients would be worse; the definition has them."""
    model, given = tiny_wan(), inputs()
    want = model(**given)[0]
    want.sum().backward()
    expected = model.blocks[0].attn1.to_q.weight.grad.clone()
    with accelerate(model, sparse=Banded()), refused("gradients must not be asked for, call the model under"):
        model(**given)
    for policy in ("dense", "reference"):
        model.zero_grad()
        with accelerate(model, sparse=Banded(), on_unsupported=policy):
            model(**given)[0].sum().backward()
        assert_same(model.blocks[0].attn1.to_q.weight.grad, expected, 1e-3)


@pytest.mark.parametrize("trained", ["to_q", "to_k", "to_v"])
def test_refuses_gradients_of_one_projection(trained):
    """As with a LoRA on it alone: the other two of query, key and value then ask for no gradient."""
    attention = tiny_wan().requires_grad_(False).blocks[0].attn1
    model_input = torch.randn(1, 72, 128)
    getattr(attention, trained).weight.requires_grad_(True)
    model = tiny_wan(layers=1).requires_grad_(False)
    model.blocks[0].attn1 = attention
    attention(model_input).sum().backward()
    expected = getattr(attention, trained).weight.grad.clone()
    for dense_steps in (0, 1):
        method = Banded(dense_steps=dense_steps)
        with accelerate(model, sparse=method), refused("gradients must not be asked for, call the model under"):
            model(**inputs())
        with accelerate(model, sparse=method):
            run(model, **inputs())
    for policy in ("dense", "reference"):
        with accelerate(model, sparse=Banded(), on_unsupported=policy):
            run(model, **inputs())  # sets the layout
            attention.processor.dense = False
            getattr(attention, trained).weight.grad = None
            attention(model_input).sum().backward()
        # The gradient of the sum with respect to q and k is small, a difference of large terms.
        torch.testing.assert_close(getattr(attention, trained).weight.grad, expected, rtol=1e-3, atol=1e-4)


def test_reference_observes_dense_steps_in_fp32():
    """The centroids that dense steps settle are those that the sparse steps go on from."""
    settings = dict(num_q_clusters=4, num_k_clusters=6, iter_init=3, zero_step_kmeans_init=True)

    class Watched(SVG2):
        seen: ClassVar[list] = []

        def observe(self, q, k, layout, state):
            super().observe(q, k, layout, state)
            self.seen.append(("observe", q.dtype, k.dtype, state.centroids["shared", "q"].dtype))

        def plan(self, q, k, layout, state):
            # Another dtype than the cache's would make the clustering start anew.
            self.seen.append(("plan", q.dtype, k.dtype, state.centroids["shared", "q"].dtype))
            return super().plan(q, k, layout, state)

    model = tiny_wan(layers=1).double()
    method = Watched(**settings, dense_step_fraction=0.5)
    with accelerate(model, sparse=method, on_unsupported="reference", num_inference_steps=2) as handle:
        for timestep in (900.0, 400.0):
            given = inputs(timestep=timestep)
            run(
                model,
                **{k: v.double() if torch.is_tensor(v) and k != "timestep" else v for k, v in given.items()},
            )
        assert handle.stats()["dense_calls"] == handle.stats()["sparse_calls"] == 1
    assert method.seen == [(name, *[torch.float32] * 3) for name in ("observe", "plan")]


def test_reference_observes_under_gradients():
    model = tiny_wan(layers=1)
    method = SVG2(num_q_clusters=4, num_k_clusters=6, iter_init=3, top_p=1.0, zero_step_kmeans_init=True)
    expected = None
    for sparse in (None, method):
        model.zero_grad()
        with accelerate(model, sparse=sparse, on_unsupported="reference", num_inference_steps=4):
            for timestep in (900.0, 700.0, 500.0):
                model(**inputs(timestep=timestep))[0].sum().backward()
        found = model.blocks[0].attn1.to_v.weight.grad.clone()
        if expected is not None:
            assert_same(found, expected, 1e-3)
        expected = found


def test_refuses_foreign_keys():
    model = tiny_wan()
    with accelerate(model, sparse=Banded()), refused("encoder_hidden_states must be None for self-attention"):
        model.blocks[0].attn1(torch.randn(1, 8, 128), torch.randn(1, 8, 128))


def test_refuses_parallelism():
    model = tiny_wan()
    sentence = "blocks.1.attn1: context or tensor parallelism must be off, enable_parallelism was called"
    with accelerate(model, sparse=Banded()):
        model.blocks[1].attn1.processor._parallel_config = object()
        with refused(sentence):
            run(model, **inputs())
    model.blocks[1].attn1.processor._parallel_config = object()
    with refused(sentence):
        accelerate(model, sparse=Banded())


def test_load_pipeline_refuses(tmp_path, monkeypatch):
    with refused("missing is expected to be a folder, there is none", FileNotFoundError):
        load_pipeline(tmp_path / "missing")
    with refused("must be a diffusers pipeline with model_index.json, it has none"):
        load_pipeline(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text("{")
    with refused("must be JSON, it is not"):
        load_pipeline(tmp_path)
    index.write_text("[1]")
    with refused("must hold a JSON object, got list"):
        load_pipeline(tmp_path)
    index.write_text('{"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}')
    with refused("transformer in .* must be one of WanTransformer3DModel.*, got FluxTransformer2DModel"):
        load_pipeline(tmp_path)
    index.write_text('{"_class_name": "MyPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}')
    with refused("must hold a pipeline class of diffusers .*, got MyPipeline"):
        load_pipeline(tmp_path)
    for name, source in (("WanImageToVideoPipeline", "image"), ("WanVideoToVideoPipeline", "video")):
        index.write_text(f'{{"_class_name": "{name}", "transformer": ["diffusers", "WanTransformer3DModel"]}}')
        with refused(f"must hold a pipeline that starts from text alone, .*, got {name}, which takes {source}"):
            load_pipeline(tmp_path)
    index.write_text('{"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}')
    monkeypatch.setattr("vdit_ext.integrations.folder.is_accelerate_available", lambda: True)
    with refused("could not be loaded: "):
        load_pipeline(tmp_path)
    monkeypatch.setattr("vdit_ext.integrations.folder.is_accelerate_available", lambda: False)
    with refused("the package accelerate is expected to be installed, it is not"):
        load_pipeline(tmp_path)
