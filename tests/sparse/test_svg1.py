"""SVG1, the baseline: line 13 of section 9 of the SVG2 specification, head profiles, the band, bad inputs."""

from __future__ import annotations

import pytest
import torch
from cases.sparse import count_graphs, masked_attention, tensors

from vdit_ext import ops
from vdit_ext.sparse import SHAPES, SVG1, SparseMethod, StepInfo, TokenLayout
from vdit_ext.sparse.state import sample_rows
from vdit_ext.sparse.svg1 import PRESETS, band_half_width, patch_major_order

GRID = TokenLayout((6, 4, 5))
SMALL = dict(block_size=8, profile_frames=1.0)


def test_svg2_09_13_layout_round_trip_and_half_width():
    """The layout transform round-trips; the half-width is 2.8135 frames at density 0.25 with 21 frames."""
    order = patch_major_order(6, 20)
    token = torch.arange(120)
    assert torch.equal(order[(token % 20) * 6 + token // 20], token.int())  # token (f, s) stands at s * F + f
    (x,) = tensors(2, 3, 120, 8, count=1)
    index = order[None, None]
    assert torch.equal(ops.unpermute_rows(ops.permute_rows(x, index), index), x)
    assert torch.equal(ops.permute_rows(ops.unpermute_rows(x, index), index), x)
    assert band_half_width(21, 0.25) == pytest.approx(2.8135, abs=5e-5)


def structured(kind: str, layout: TokenLayout, dim: int = 16):
    """q, k, v whose attention stays inside a frame ("spatial") or on one place over time ("temporal")."""
    frames, frame_size = layout.grid[0], layout.num_video // layout.grid[0]
    token = torch.arange(layout.num_video)
    group, count = (token // frame_size, frames) if kind == "spatial" else (token % frame_size, frame_size)
    codes = torch.nn.functional.normalize(
        torch.randn(count, dim, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    q = 12 * codes[group][None, None]
    return q, q.clone(), torch.randn(1, 1, layout.num_video, dim, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("with_values", [True, False])
def test_heads_are_told_apart(with_values):
    layout = TokenLayout((8, 3, 10))
    parts = [structured(kind, layout) for kind in ("spatial", "temporal")]
    q, k, v = (torch.cat(x, 1) for x in zip(*parts, strict=True))
    method = SVG1(**SMALL, sink=False)
    state = method.new_state(0, 1)
    plan = method.plan(q, k, layout, state, v if with_values else None).validate(240, 240)
    native = torch.arange(240, dtype=torch.int32)
    assert torch.equal(plan.q_index[0, 0], native)
    assert torch.equal(plan.q_index[0, 1], patch_major_order(8, 30))
    assert torch.equal(plan.q_index, plan.kv_index)
    out, _ = plan.attend(q, k, v)
    dense = masked_attention(q, k, v)
    wrong, _ = method.plan(q.flip(1), k.flip(1), layout, state).attend(q, k, v)
    assert (out - dense).square().mean() < 0.2 * (wrong - dense).square().mean()


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize(
    "layout", [GRID, TokenLayout((6, 4, 5), 7, 4), TokenLayout((6, 3, 5), 7, 4, True)], ids=str
)
def test_output_is_masked_dense_in_the_heads_order(layout, sink):
    """Every pair within the half-width is kept, nothing beyond a block more, and text as everywhere."""
    method = SVG1(**SMALL, sink=sink)
    total, video = layout.num_tokens, layout.num_video
    q, k, v = tensors(2, 3, total, 16)
    plan = method.plan(q, k, layout, method.new_state(0, 1), v).validate(total, total)
    mask = plan.token_mask(total, total)
    out, _ = plan.attend(q, k, v)
    torch.testing.assert_close(out.double(), masked_attention(q, k, v, mask), atol=1e-5, rtol=1e-5)

    width, frame_size = method.band_tokens(layout), video // 6
    for b in range(2):
        for h in range(3):
            order = (plan.q_index[b, h].long() - layout.video_start)[layout.video_start :][:video]
            place = torch.empty(video, dtype=torch.long).scatter(0, order, torch.arange(video))
            distance = (place[:, None] - place).abs()
            inner = mask[b, h, layout.video_start :, layout.video_start :][:video, :video]
            first = (place < -(-frame_size // 8) * 8) & torch.tensor(sink)
            assert inner[distance <= width].all()
            assert not inner[(distance > width + 8) & ~first].any()
            assert not sink or inner[:, place < frame_size].all()
    if layout.text_len:
        token = torch.arange(total)
        text = token < 7 if layout.text_first else token >= video
        pad = text & (token >= (4 if layout.text_first else video + 4))
        assert mask[..., text & ~pad, :][..., ~pad].all() and mask[..., ~pad, :][..., text & ~pad].all()
        assert not mask[..., ~pad, :][..., pad].any()
        poisoned = [torch.where(pad[:, None], 100.0, x) for x in (q, k, v)]
        again, _ = method.plan(*poisoned[:2], layout, method.new_state(0, 1), poisoned[2]).attend(*poisoned)
        torch.testing.assert_close(again[:, :, ~pad], out[:, :, ~pad], atol=1e-6, rtol=1e-5)


def test_density_comes_out_as_asked():
    """At the real shapes the band's blocks keep the asked density to within a block's width."""
    for model in ("wan2.1-14b-t2v-720p", "hunyuan-t2v-720p", "cogvideox-1.5-5b"):
        layout, method = SHAPES[model].layout, SVG1.preset(model, "repo")
        blocks = -(-layout.num_video // 128)
        half = method.band_tokens(layout) // 128
        pairs = sum(min(blocks - 1, i + half) - max(0, i - half) + 1 for i in range(blocks)) * 128**2
        text = layout.num_tokens**2 - layout.num_video**2
        assert (pairs + text) / layout.num_tokens**2 == pytest.approx(method.density, abs=0.004)


def test_full_density_is_dense():
    method = SVG1(density=1.0, **SMALL)
    q, k, v = tensors(1, 2, GRID.num_tokens, 16)
    state = method.new_state(0, 1)
    out, _ = method.plan(q, k, GRID, state).attend(q, k, v)
    torch.testing.assert_close(out.double(), masked_attention(q, k, v), atol=1e-5, rtol=1e-5)
    assert state.mean_density() == 1


def test_samples_differ_from_call_to_call_and_repeat_after_reset():
    seen = []

    class Watched(SVG1):
        def is_temporal(self, q, k, layout, rows, v):
            seen.append(rows)
            return super().is_temporal(q, k, layout, rows, v)

    method = Watched(**SMALL)
    q, k, v = tensors(1, 2, GRID.num_tokens, 16)
    state = method.new_state(2, 4)
    for _ in range(2):
        method.plan(q, k, GRID, state, v)
    method.reset(state)
    method.plan(q, k, GRID, state, v)
    method.plan(q, k, GRID, method.new_state(3, 4), v)
    Watched(**SMALL, seed=1).plan(q, k, GRID, Watched(**SMALL, seed=1).new_state(2, 4), v)
    first, second, again, other_layer, other_seed = seen
    assert first.shape == (64,) and int(first.min()) >= 0 and int(first.max()) < GRID.num_video
    assert torch.equal(again, first)
    for other in (second, other_layer, other_seed):
        assert not torch.equal(other, first)
    method.reset(state)
    assert torch.equal(sample_rows(state.handle, 64, GRID.num_video), first)


def test_presets_and_gate():
    for model, kinds in PRESETS.items():
        for kind in kinds:
            assert isinstance(SVG1.preset(model, kind), SparseMethod)
    toy = SVG1.preset("toy")
    q, k, _ = tensors(1, 3, 2048, 64)
    assert float(toy.plan(q, k, SHAPES["toy"].layout, toy.new_state(0, 6)).density(2048, 2048).max()) <= 0.35
    cog = SVG1.preset("cogvideox-1.5-5b", "repo")
    assert (cog.num_samples, cog.sample_limit, cog.rounding) == (32, None, "floor")
    assert [cog.is_dense(StepInfo(49, 50, 20.0, 42), layer) for layer in range(3)] == [True, True, False]
    assert sum(cog.is_dense(StepInfo(i, 50, 0.0, 42), 9) for i in range(50)) == 10
    with pytest.raises(ValueError, match="model must be one of"):
        SVG1.preset("mochi")


def test_compiles_to_one_graph():
    assert count_graphs(SVG1(**SMALL), TokenLayout((4, 2, 5), 5, 3), steps=2) == 1


def test_bad_inputs():
    for given, sentence in [
        (dict(density=2.0), "density must be at least 0 and at most 1, got 2"),
        (dict(block_size=0), "block_size must be at least 1"),
        (dict(sample_limit=-5), "sample_limit must be at least 1, got -5"),
        (dict(rounding="up"), "rounding must be one of ceil, floor, got 'up'"),
        (dict(num_samples=6.5), "SVG1: num_samples must be a whole number, got 6.5"),
        (dict(block_size="64"), "SVG1: block_size must be a whole number, got '64'"),
        (dict(sample_limit=1e4), "SVG1: sample_limit must be a whole number, got 10000.0"),
        (dict(seed=0.5), "SVG1: seed must be a whole number, got 0.5"),
        (dict(profile_frames="2"), "SVG1: profile_frames must be a number, got '2'"),
        (dict(density=None), "SVG1: density must be a number, got None"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            SVG1(**given)
    method = SVG1(**SMALL)
    q, k, _ = tensors(1, 1, 50, 16)
    with pytest.raises(ValueError, match="SVG1: the layout .* has 120 tokens, got 50"):
        method.plan(q, k, GRID, method.new_state(0, 1))
