"""SVG2: section 9 of its specification line by line, then states, presets, batches, compilation, bad inputs."""

from __future__ import annotations

import copy
import gc
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases.sparse import (
    count_graphs,
    expand_map,
    masked_attention,
    rotary_tables,
    rows_of,
    tensors,
    turned,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from vdit_ext import ops
from vdit_ext.ops.attention import block_mass_fractions
from vdit_ext.sparse import (
    SHAPES,
    SVG1,
    SVG2,
    BlockPlan,
    DraftAttention,
    SparseMethod,
    StepInfo,
    TokenLayout,
    begin_step,
)
from vdit_ext.sparse.flops import attention_flops, video_flops
from vdit_ext.sparse.gate import count_dense_layers, count_dense_steps, flow_timesteps, is_dense_step
from vdit_ext.sparse.kmeans import inertia, kmeans
from vdit_ext.sparse.scores import block_logits
from vdit_ext.sparse.state import refine_clusters
from vdit_ext.sparse.svg2 import PRESETS

SMALL = dict(num_q_clusters=6, num_k_clusters=10, iter_init=4)
GRID = TokenLayout((3, 5, 7))


def make_plan(method: SVG2, layout: TokenLayout, batch=1, heads=2, dim=16, seed=0):
    q, k, v = tensors(batch, heads, layout.num_tokens, dim, seed)
    plan = method.plan(q, k, layout, method.new_state(0, 1))
    return plan.validate(layout.num_tokens, layout.num_tokens), q, k, v


# ---------------------------------------------------------------------------------------------------------
# Section 9
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_svg2_09_01_all_kept_is_dense(dtype, tolerance):
    """p >= 1 short-circuits to all-kept, which is dense attention; C_q = C_k = 1 likewise."""
    q, k, v = tensors(1, 2, GRID.num_tokens, 16, dtype=dtype)
    for method in (SVG2(**SMALL, top_p=1.0), SVG2(num_q_clusters=1, num_k_clusters=1, top_p=0.3)):
        state = method.new_state(0, 1)
        out, lse = method.plan(q, k, GRID, state).attend(q, k, v)
        torch.testing.assert_close(out.double(), masked_attention(q, k, v), atol=tolerance, rtol=tolerance)
        scores = q.double() @ k.double().transpose(-1, -2) / 4
        torch.testing.assert_close(lse.double(), scores.logsumexp(-1), atol=1e-3, rtol=1e-5)
        assert state.mean_density() == 1


def test_svg2_09_02_permutation_round_trip():
    """unpermute(permute(x)) = x bit for bit; offsets[C] = N; sizes sum to N."""
    plan, q, k, _ = make_plan(SVG2(**SMALL), GRID, batch=2)
    assert torch.equal(ops.unpermute_rows(ops.permute_rows(q, plan.q_index), plan.q_index), q)
    assert torch.equal(ops.unpermute_rows(ops.permute_rows(k, plan.kv_index), plan.kv_index), k)
    for offsets in (plan.q_offsets, plan.kv_offsets):
        assert (offsets[..., -1] == GRID.num_tokens).all()
        assert (offsets.diff(dim=-1).sum(-1) == GRID.num_tokens).all()


@settings(max_examples=25, deadline=None)
@given(
    q_sizes=st.lists(st.sampled_from([0, 1, 2, 7, 40]), min_size=1, max_size=6),
    kv_sizes=st.lists(st.sampled_from([0, 1, 3, 9, 70]), min_size=1, max_size=6),
    seed=st.integers(0, 99),
)
def test_svg2_09_03_arbitrary_map_is_masked_dense(q_sizes, kv_sizes, seed):
    """An arbitrary map equals dense attention under the expanded mask, with empty, size-1 and giant clusters."""
    q_sizes[0] += sum(q_sizes) == 0
    kv_sizes[0] += sum(kv_sizes) == 0
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(len(q_sizes), len(kv_sizes), generator=generator) < 0.5
    q_order = torch.randperm(sum(q_sizes), generator=generator)
    kv_order = torch.randperm(sum(kv_sizes), generator=generator)
    counts, lists = ops.lists_from_mask(keep[None, None])
    plan = BlockPlan(
        counts,
        lists,
        q_offsets=torch.tensor([0, *q_sizes]).cumsum(0).int()[None, None],
        kv_offsets=torch.tensor([0, *kv_sizes]).cumsum(0).int()[None, None],
        q_index=q_order.int()[None, None],
        kv_index=kv_order.int()[None, None],
    ).validate(sum(q_sizes), sum(kv_sizes))
    q = torch.randn(1, 1, sum(q_sizes), 16, generator=generator)
    k, v = torch.randn(2, 1, 1, sum(kv_sizes), 16, generator=generator)
    mask = expand_map(keep, q_sizes, kv_sizes, q_order, kv_order)
    assert torch.equal(plan.token_mask(sum(q_sizes), sum(kv_sizes))[0, 0], mask)
    out, lse = plan.attend(q, k, v)
    torch.testing.assert_close(out.double(), masked_attention(q, k, v, mask), atol=1e-5, rtol=1e-5)
    blind = ~mask.any(-1)
    assert (out[0, 0, blind] == 0).all() and (lse[0, 0, blind] == -torch.inf).all()


def test_svg2_09_04_lloyd_iterations():
    """Inertia never rises in a Lloyd iteration; assignment matches brute force; a centroid is its members' mean,
    an empty cluster's stays."""
    (x,) = tensors(2, 3, 200, 8, count=1)
    start = x[:, :, :12].contiguous()
    start[:, :, 5] = 100.0  # nobody's nearest
    centroids, before = start, torch.full((2, 3), torch.inf, dtype=torch.float64)
    for _ in range(6):
        found = kmeans(x, 12, num_iters=1, centroids=centroids)
        distances = torch.cdist(x.double(), centroids.double())
        picked = distances.gather(-1, found.labels.long()[..., None])[..., 0]
        torch.testing.assert_close(picked, distances.min(-1).values)
        assert (inertia(x, centroids, found.labels) <= before * (1 + 1e-9)).all()
        before = inertia(x, found.centroids, found.labels)
        assert (before <= inertia(x, centroids, found.labels) * (1 + 1e-6)).all()
        for b in range(2):
            for h in range(3):
                for c in range(12):
                    members = x[b, h, found.labels[b, h] == c]
                    assert len(members) == found.sizes[b, h, c]
                    expected = members.double().mean(0).float() if len(members) else centroids[b, h, c]
                    torch.testing.assert_close(found.centroids[b, h, c], expected, atol=1e-6, rtol=1e-5)
        centroids = found.centroids
    assert (found.sizes[:, :, 5] == 0).all() and (found.centroids[:, :, 5] == 100.0).all()


def test_svg2_09_05_warm_start_never_raises_inertia():
    """A warm start with two iterations on identical data never raises inertia."""
    (x,) = tensors(1, 2, 150, 8, count=1)
    first = kmeans(x, 9, num_iters=3, seed=4)
    again = kmeans(x, 9, num_iters=2, centroids=first.centroids)
    assert (
        inertia(x, again.centroids, again.labels) <= inertia(x, first.centroids, first.labels) * (1 + 1e-6)
    ).all()


@settings(max_examples=40, deadline=None)
@given(
    p=st.floats(0, 1),
    ratio=st.sampled_from([0.0, 0.1, 0.34, 1.0]),
    spread=st.sampled_from([0.0, 0.5, 8.0]),
    seed=st.integers(0, 99),
)
def test_svg2_09_06_kept_mass(p, ratio, spread, seed):
    """Kept mass per row >= min(p, 1); without the last kept cluster it is <= p unless the minimum ratio forced
    it; kept >= max(1, floor(ratio * C_k))."""
    generator = torch.Generator().manual_seed(seed)
    q_centroids = torch.randn(1, 2, 5, 8, generator=generator) * spread
    k_centroids = torch.randn(1, 2, 12, 8, generator=generator)
    sizes = torch.randint(0, 50, (1, 2, 12), generator=generator, dtype=torch.int32)
    sizes[..., 0] += 1
    counts, lists = SVG2(top_p=p, min_kc_ratio=ratio).select(q_centroids, k_centroids, sizes)
    mass = block_mass_fractions(block_logits(q_centroids, k_centroids), sizes)
    least = max(1, int(ratio * 12))
    for h in range(2):
        for i, kept in enumerate(rows_of(counts[0, h], lists[0, h])):
            weights = mass[0, h, i][sorted(kept)]
            assert len(kept) >= least
            assert float(weights.sum()) >= min(p, 1) - 1e-6
            if len(kept) > least and p < 1:
                assert float(weights.sum() - weights.min()) <= p + 1e-6


def test_svg2_09_07_monotone_and_size_invariant():
    """The kept set grows with p; duplicating every key (sizes times 2) leaves P' unchanged."""
    generator = torch.Generator().manual_seed(1)
    q_centroids = torch.randn(1, 1, 8, 8, generator=generator) * 2
    k_centroids = torch.randn(1, 1, 20, 8, generator=generator)
    sizes = torch.randint(0, 50, (1, 1, 20), generator=generator, dtype=torch.int32)
    before = [set() for _ in range(8)]
    for p in (0.0, 0.2, 0.5, 0.7, 0.9, 0.99, 1.0):
        method = SVG2(top_p=p, min_kc_ratio=0.0)
        counts, lists = method.select(q_centroids, k_centroids, sizes)
        kept = rows_of(counts[0, 0], lists[0, 0])
        assert all(a <= b for a, b in zip(before, kept, strict=True))
        before = kept
        doubled = method.select(q_centroids, k_centroids, sizes * 2)
        assert torch.equal(counts, doubled[0]) and torch.equal(lists, doubled[1])
    scores = block_logits(q_centroids, k_centroids)
    torch.testing.assert_close(block_mass_fractions(scores, sizes), block_mass_fractions(scores, sizes * 2))

    (x,) = tensors(1, 1, 60, 8, count=1)
    start = x[:, :, :7].contiguous()
    once, twice = (kmeans(y, 7, num_iters=3, centroids=start) for y in (x, torch.cat([x, x], 2)))
    assert torch.equal(once.sizes * 2, twice.sizes)
    torch.testing.assert_close(once.centroids, twice.centroids)


def test_svg2_09_08_identical_tokens_give_exact_mass():
    """Identical tokens inside every cluster: P' equals the exact block attention mass, so true recall >= p."""
    generator = torch.Generator().manual_seed(2)
    layout, dim, num_q, num_k = TokenLayout((2, 6, 10)), 16, 5, 8
    q_label = torch.randint(num_q, (120,), generator=generator)
    k_label = torch.randint(num_k, (120,), generator=generator)
    q_points, k_points = (
        torch.randn(num_q, dim, generator=generator),
        torch.randn(num_k, dim, generator=generator),
    )
    q, k = 3 * q_points[q_label][None, None], k_points[k_label][None, None]
    exact = torch.softmax(q.double() @ k.double().transpose(-1, -2) / 4, -1)

    sizes = torch.bincount(k_label, minlength=num_k).int()[None, None]
    mass = block_mass_fractions(block_logits(3 * q_points[None, None], k_points[None, None]), sizes)
    blocks = exact[0, 0] @ torch.nn.functional.one_hot(k_label, num_k).double()
    torch.testing.assert_close(mass[0, 0][q_label], blocks, atol=1e-6, rtol=1e-5)

    for p in (0.3, 0.6, 0.9):
        # k-means++ draws each distinct point once, so that every cluster is one point.
        method = SVG2(top_p=p, min_kc_ratio=0, num_q_clusters=num_q, num_k_clusters=num_k, init="kmeans++")
        mask = method.plan(q, k, layout, method.new_state(0, 1)).token_mask(120, 120)
        assert ((exact * mask).sum(-1) >= p - 1e-6).all()
        assert p == 0.9 or not mask.all()


@pytest.mark.parametrize("text_first", [False, True])
def test_svg2_09_09_padding_and_prompt(text_first):
    """HunyuanVideo: padding influences no valid output; the prompt attends all video; prompt length 256 works."""
    for valid in (256, 100, 0):
        layout = TokenLayout((2, 6, 10), 256, valid, text_first)
        total = layout.num_tokens
        method = SVG2(**SMALL)
        q, k, v = tensors(1, 2, total, 16)
        plan = method.plan(q, k, layout, method.new_state(0, 1)).validate(total, total)
        token = torch.arange(total)
        text = token < 256 if text_first else token >= 120
        pad = text & ((token >= valid) if text_first else (token >= 120 + valid))
        mask = plan.token_mask(total, total)
        assert mask[:, :, text & ~pad][..., ~pad].all() and mask[..., ~pad, :][..., text & ~pad].all()
        assert not mask[:, :, ~pad][..., pad].any() and not mask[:, :, pad][..., ~pad].any()
        assert mask[:, :, pad][..., pad].all()

        out, _ = plan.attend(q, k, v)
        torch.testing.assert_close(out.double(), masked_attention(q, k, v, mask), atol=1e-5, rtol=1e-5)
        poisoned = [torch.where(pad[:, None], torch.nan, x) for x in (q, k, v)]
        again, _ = method.plan(*poisoned[:2], layout, method.new_state(0, 1)).attend(*poisoned)
        assert torch.equal(again[:, :, ~pad], out[:, :, ~pad])


def test_svg2_09_10_key_order_does_not_matter():
    """K and V permuted by any order leave the output unchanged."""
    method = SVG2(**SMALL, top_p=0.5)
    q, k, v = tensors(1, 2, GRID.num_tokens, 16)
    states = [method.new_state(0, 1), method.new_state(0, 1)]
    for state in states:
        method.observe(q, k, GRID, state)  # both continue from the same centroids
    shuffle = torch.randperm(GRID.num_tokens, generator=torch.Generator().manual_seed(5))
    out, _ = method.plan(q, k, GRID, states[0]).attend(q, k, v)
    again, _ = method.plan(q, k[:, :, shuffle], GRID, states[1]).attend(q, k[:, :, shuffle], v[:, :, shuffle])
    torch.testing.assert_close(out, again, atol=1e-5, rtol=1e-5)
    assert states[0].mean_density() < 1


def test_svg2_09_11_density_and_flops():
    """Density lies in (0, 1]; the FLOPs identity reproduces section 7."""
    for p in (0.0, 0.3, 0.9, 1.0):
        plan, *_ = make_plan(SVG2(**SMALL, top_p=p, min_kc_ratio=0.0), GRID, batch=2)
        density = plan.density(GRID.num_tokens, GRID.num_tokens)
        assert density.shape == (2, 2) and (density > 0).all() and (density <= 1).all()
        counted = plan.token_mask(GRID.num_tokens, GRID.num_tokens).float().mean((-1, -2))
        torch.testing.assert_close(density, counted)
    # Wan T2V and I2V, SVG2 and Turbo rows; the published figures are rounded to 0.01 PF.
    for total, forwards, density, published in [
        (658.46, 100, 0.2951, 427.43),
        (658.46, 100, 0.1287, 372.89),
        (526.76, 80, 0.3128, 346.59),
        (526.76, 80, 0.1413, 301.62),
    ]:
        attention = attention_flops(75_600, 5120, 40, forwards) / 1e15
        assert video_flops(total, attention, density, 0.3) == pytest.approx(published, abs=0.01)


def test_svg2_09_12_gate_counts():
    """Dense steps 5, 2, 10, 14, 8, 10; dense layers 1, 0, 1, 1, 1, 1; 1.3B 0, which the decision raises to 1."""
    expected = {
        "hunyuan-t2v-720p": (5, 1),
        "hunyuan-480p": (2, 0),
        "wan2.1-14b-t2v-720p": (10, 1),
        "wan-14b-i2v-720p": (14, 1),
        "wan-i2v-480p": (8, 1),
        "cosmos1-14b": (10, 1),
        "wan2.1-1.3b": (10, 0),
    }
    for model, (steps, layers) in expected.items():
        shape, method = SHAPES[model], SVG2.preset(model, "repo")
        assert count_dense_steps(method.dense_step_fraction, shape.steps) == steps
        assert count_dense_layers(method.dense_layer_fraction, shape.layers) == layers
        dense = [
            [
                method.is_dense(StepInfo(s, shape.steps, 0.0, shape.layers), layer)
                for layer in range(shape.layers)
            ]
            for s in range(shape.steps)
        ]
        assert [all(row) for row in dense] == [s < steps for s in range(shape.steps)]
        assert [all(row[layer] for row in dense) for layer in range(shape.layers)] == [
            layer < layers for layer in range(shape.layers)
        ]
    small = SVG2.preset("wan2.1-1.3b")
    assert small.is_dense(StepInfo(40, 50, 0.0, 30), 0) and not small.is_dense(StepInfo(40, 50, 0.0, 30), 1)


def test_svg2_09_14_norm_and_rope_match_pytorch():
    """RoPE and norms match PyTorch, in what the product runs: the Wan processor's; text positions come back bit
    for bit."""
    wan = pytest.importorskip("diffusers.models.transformers.transformer_wan")
    from vdit_ext.integrations.processors import WanSelfAttentionProcessor, rotate_pairs

    seen = {}

    class Watched(WanSelfAttentionProcessor):
        def attend(self, query, key, value, mask):
            seen.update(query=query, key=key, value=value)
            return value

    torch.manual_seed(0)
    grid, heads, dim = (2, 3, 5), 3, 16
    cos, sin = rotary_tables(grid, dim)
    upstream = wan.WanRotaryPosEmbed(dim, (1, 1, 1), 32)(torch.empty(1, 1, *grid))
    for ours, theirs in zip((cos, sin), upstream, strict=True):
        torch.testing.assert_close(ours, theirs[0, :, 0].float())
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        attn = wan.WanAttention(heads * dim, heads, dim, eps=1e-6)
        torch.nn.init.uniform_(attn.norm_q.weight, 0.5, 1.5)
        torch.nn.init.uniform_(attn.norm_k.weight, 0.5, 1.5)
        attn = attn.to(dtype)
        attn.set_processor(Watched(None, "attn1", "error"))
        hidden = torch.randn(2, 30, heads * dim).to(dtype)
        with torch.no_grad():
            attn(hidden, rotary_emb=upstream)
            for name, linear, norm in (("query", attn.to_q, attn.norm_q), ("key", attn.to_k, attn.norm_k)):
                width = (heads * dim,)
                y = torch.nn.functional.rms_norm(linear(hidden).double(), width, norm.weight.double(), 1e-6)
                expected = turned(y.unflatten(-1, (heads, dim)).transpose(1, 2), cos, sin).transpose(1, 2)
                assert seen[name].dtype == dtype
                torch.testing.assert_close(seen[name].double(), expected, atol=tolerance, rtol=tolerance)
            assert torch.equal(seen["value"], attn.to_v(hidden).unflatten(-1, (heads, dim)))

    # Text among the tokens has tables of angle 0.
    for text_first in (False, True):
        parts = [torch.zeros(10, dim), torch.ones(10, dim)]  # sines, cosines
        tables = [
            torch.cat([t, p] if not text_first else [p, t]) for t, p in zip((sin, cos), parts, strict=True)
        ]
        text = slice(0, 10) if text_first else slice(30, None)
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
            x = torch.randn(2, 40, heads, dim).to(dtype)
            out = rotate_pairs(x, *(t[None, :, None] for t in reversed(tables)))
            expected = turned(x.transpose(1, 2), *reversed(tables)).transpose(1, 2)
            assert out.dtype == dtype and torch.equal(out[:, text], x[:, text])
            torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


# ---------------------------------------------------------------------------------------------------------
# States, presets, batches, compilation, bad inputs
# ---------------------------------------------------------------------------------------------------------


class CountingOps:
    """Counts assignments, that is Lloyd iterations."""

    def __init__(self, monkeypatch):
        self.calls = 0
        real = ops.kmeans_assign

        def assign(x, centroids):
            self.calls += 1
            return real(x, centroids)

        monkeypatch.setattr(ops, "kmeans_assign", assign)

    def take(self) -> int:
        calls, self.calls = self.calls, 0
        return calls


def test_first_call_initialises_and_later_calls_continue(monkeypatch):
    counted = CountingOps(monkeypatch)
    method = SVG2(**SMALL, iter_step=2)
    q, k, _ = tensors(1, 2, GRID.num_tokens, 16)
    state = method.new_state(0, 1)
    method.plan(q, k, GRID, state)
    assert counted.take() == 2 * 4
    method.plan(q, k, GRID, state)
    assert counted.take() == 2 * 2
    method.reset(state)
    assert state.density is None
    method.plan(q, k, GRID, state)
    assert counted.take() == 2 * 4
    method.plan(*tensors(2, 2, GRID.num_tokens, 16, count=2), GRID, state)
    assert counted.take() == 2 * 4, "another batch size starts anew"
    method.plan(q.half(), k.half(), GRID, state)
    assert counted.take() == 2 * 4, "another dtype starts anew"


def test_observed_dense_steps_warm_the_cache(monkeypatch):
    counted = CountingOps(monkeypatch)
    assert SVG2(zero_step_kmeans_init=True).observes_dense_steps and not SVG2().observes_dense_steps
    method = SVG2(**SMALL, zero_step_kmeans_init=True)
    state = method.new_state(0, 1)
    q, k, _ = tensors(1, 2, GRID.num_tokens, 16)
    method.observe(q, k, GRID, state)
    assert counted.take() == 8 and state.density is None
    method.plan(q, k, GRID, state)
    assert counted.take() == 4


def test_guidance_branches_share_or_split_the_cache(monkeypatch):
    counted = CountingOps(monkeypatch)
    q, k, _ = tensors(1, 2, GRID.num_tokens, 16)
    for cache, second in (("shared", 4), ("per_branch", 8)):
        method = SVG2(**SMALL, cfg_cache=cache)
        state = method.new_state(0, 1)
        begin_step(method, StepInfo(0, 4, 900.0, 1, "cond"), GRID, [state])
        method.plan(q, k, GRID, state)
        assert counted.take() == 8
        begin_step(method, StepInfo(0, 4, 900.0, 1, "uncond"), GRID, [state])
        method.plan(q, k, GRID, state)
        assert counted.take() == second
        begin_step(method, StepInfo(1, 4, 700.0, 1, "cond"), GRID, [state])
        method.plan(q, k, GRID, state)
        assert counted.take() == 4


def test_begin_step_resets_for_a_new_video():
    method = SVG2(**SMALL)
    q, k, _ = tensors(1, 2, GRID.num_tokens, 16)
    valid = TokenLayout(GRID.grid)
    for info, layout, forgets in [
        (StepInfo(4, 8, 500.0, 1, "uncond"), GRID, False),
        (StepInfo(5, 8, 400.0, 1), GRID, False),
        (StepInfo(5, 8, 400.0, 1), valid, False),
        (StepInfo(5, 8, 900.0, 1), GRID, True),
        (StepInfo(0, 8, 500.0, 1), GRID, True),
        (StepInfo(5, 8, 400.0, 1), TokenLayout((3, 7, 5)), True),
    ]:
        state = method.new_state(0, 1)
        begin_step(method, StepInfo(4, 8, 500.0, 1), GRID, [state])
        method.plan(q, k, GRID, state)
        begin_step(method, info, layout, [state])
        assert (not state.centroids) == forgets, info


def test_unknown_step_count_falls_back_to_the_timestep():
    for shift in (1.0, 5.0, 7.0):
        method = SVG2(dense_step_fraction=0.3, flow_shift=shift)
        for i in range(50):
            noise = 1 - i / 50
            timestep = 1000 * shift * noise / (1 + (shift - 1) * noise)
            assert method.is_dense(StepInfo(i, None, timestep, 4), 2) == (i < 15)
    assert not SVG2(dense_step_fraction=0.0).is_dense(StepInfo(0, None, 1000.0, 4), 0)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 7.0, 12.0])
@pytest.mark.parametrize("num_steps", [20, 30, 40, 50])
def test_timestep_rule_equals_the_count_rule(num_steps, shift):
    """Also for timesteps rounded to fp32, wherever ``fraction * num_steps`` is whole."""
    times = flow_timesteps(num_steps, shift)
    for count in range(num_steps + 1):
        fraction = count / num_steps
        for rounded in (np.float32, float):
            infos = [StepInfo(i, None, float(rounded(t)), 4) for i, t in enumerate(times)]
            dense = [is_dense_step(info, fraction, shift, "svg2") for info in infos]
            assert dense == [i < count for i in range(num_steps)]


@pytest.mark.parametrize(
    "method",
    [SVG1(), SVG2(), DraftAttention(), SVG2(dense_layer_fraction=0.5)],
    ids=["svg1", "svg2", "draft", "svg2_layers"],
)
def test_unknown_step_count_without_a_shift_is_refused(method):
    sentence = f"{method.name} takes its dense steps as a share of all steps, whose number must be known: pass"
    with pytest.raises(ValueError, match=sentence):
        method.is_dense(StepInfo(0, None, 1000.0, 4), 3)
    count = count_dense_steps(method.dense_step_fraction, 50)
    assert [method.is_dense(StepInfo(i, 50, 999.0, 4), 3) for i in range(50)] == [i < count for i in range(50)]
    assert not replace(method, dense_step_fraction=0.0).is_dense(StepInfo(0, None, 1000.0, 4), 3)
    with pytest.raises(ValueError, match="flow_shift must be at least 0, got -1"):
        replace(method, flow_shift=-1)


def test_a_preset_counts_where_it_can_and_else_goes_by_its_shift():
    times = flow_timesteps(50, 5)
    for method in (SVG1.preset("wan2.1-14b-t2v-720p"), SVG2.preset("wan2.1-14b-t2v-720p")):
        for i, timestep in enumerate(times):
            assert method.is_dense(StepInfo(i, None, float(np.float32(timestep)), 40), 39) == (i < 15)
            # The count wins over a timestep that says otherwise.
            assert method.is_dense(StepInfo(i, 50, 1000 - timestep, 40), 39) == (i < 15)


def test_more_clusters_than_tokens():
    layout = TokenLayout((1, 2, 3))
    plan, q, k, v = make_plan(SVG2(top_p=1.0), layout)
    assert plan.q_offsets.shape[-1] == plan.kv_offsets.shape[-1] == 7
    torch.testing.assert_close(
        plan.attend(q, k, v)[0].double(), masked_attention(q, k, v), atol=1e-5, rtol=1e-5
    )
    one = TokenLayout((1, 1, 1))
    plan, q, k, v = make_plan(SVG2(), one)
    torch.testing.assert_close(plan.attend(q, k, v)[0], v)


def test_batch_of_two_is_two_calls():
    method = SVG2(**SMALL)
    layout = TokenLayout(GRID.grid, 8, (8, 3))
    q, k, v = tensors(2, 2, layout.num_tokens, 16)
    both, _ = method.plan(q, k, layout, method.new_state(0, 1)).attend(q, k, v)
    for b, valid in enumerate((8, 3)):
        one = tuple(x[b : b + 1] for x in (q, k, v))
        plan = method.plan(*one[:2], TokenLayout(GRID.grid, 8, valid), method.new_state(0, 1))
        torch.testing.assert_close(plan.attend(*one)[0], both[b : b + 1], atol=1e-6, rtol=1e-5)


def test_map_is_fp32_under_autocast_and_in_bf16():
    a, b = tensors(1, 1, 20, 16, count=2)
    expected = a.double() @ b.double().transpose(-1, -2) / 4
    with torch.autocast("cpu", torch.bfloat16):
        scores = block_logits(a, b)
        assert block_logits(a.bfloat16(), b.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected, atol=1e-6, rtol=1e-5)


def test_strided_views_give_the_same_plan():
    method = SVG2(**SMALL)
    q, k, _ = tensors(1, 2, GRID.num_tokens, 16)
    loose = [torch.nn.functional.pad(x, (3, 5, 2, 1))[..., 2:-1, 3:-5] for x in (q, k)]
    plans = [method.plan(*x, GRID, method.new_state(0, 1)) for x in ((q, k), loose)]
    assert torch.equal(plans[0].kv_indices, plans[1].kv_indices)
    assert torch.equal(plans[0].kv_index, plans[1].kv_index)


def test_random_layers_start_apart_and_seeds_repeat():
    method = SVG2(**SMALL)
    q, k, _ = tensors(1, 2, GRID.num_tokens, 16)
    first, again, other = (method.plan(q, k, GRID, method.new_state(i, 4)) for i in (0, 0, 1))
    assert torch.equal(first.q_index, again.q_index) and not torch.equal(first.q_index, other.q_index)
    same = SVG2(num_q_clusters=6, num_k_clusters=6).plan(q, q, GRID, method.new_state(0, 4))
    assert not torch.equal(same.q_index, same.kv_index), "keys are drawn apart from queries"


def test_copied_state_is_fresh_and_lost_state_is_an_error():
    method = SVG2(**SMALL)
    q, k, _ = tensors(1, 2, GRID.num_tokens, 16)
    state = method.new_state(1, 4)
    method.plan(q, k, GRID, state)
    twin = copy.deepcopy(state)
    assert twin.layer == 1 and not twin.centroids and twin.handle[0] != state.handle[0]
    handle = state.handle.clone()
    del state
    gc.collect()
    with pytest.raises(RuntimeError, match="keep the object"):
        refine_clusters(q, handle, 4, "q")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", ["q", "k"])
@pytest.mark.parametrize("text", [0, 9])
def test_bad_tokens_stay_in_their_rows_and_calls(bad, side, text):
    """NaN or Inf in one query or key: plans stay valid, only rows that see it are not finite, the cache heals."""
    layout = TokenLayout(GRID.grid, text, text and 5)
    method = SVG2(**SMALL, iter_step=2, top_p=0.95)
    state = method.new_state(0, 1)
    total = layout.num_tokens
    q, k, v = tensors(1, 2, total, 16)
    clean = (q.clone(), k.clone())
    (q if side == "q" else k)[0, 1, 31, 4] = bad
    for call in range(3):  # the cold call of many iterations, then warm ones
        plan = method.plan(q, k, layout, state).validate(total, total)
        assert len(state.centroids) == 2 and all(c.isfinite().all() for c in state.centroids.values())
        out, lse = plan.attend(q, k, v)
        mask = plan.token_mask(total, total)
        touched = torch.zeros(1, 2, total, dtype=torch.bool)
        if side == "q":
            touched[0, 1, 31] = True
        else:
            touched[0, 1] = mask[0, 1, :, 31]
        assert out[~touched].isfinite().all() and lse[~touched].isfinite().all(), f"call {call}"
        # A key of -Inf logits weighs nothing; what weighs is NaN.
        scores = q.double() @ k.double().transpose(-1, -2)
        seen = scores[..., 31] if side == "k" else scores.masked_fill(~mask, -torch.inf).amax(-1)
        assert out[touched & (seen != -torch.inf)].isnan().all()
        assert touched.any() and not touched.all(), "both kinds of rows are there"
    # The other head is what it is without the bad value.
    twin = method.new_state(0, 1)
    for _ in range(3):
        expected = method.plan(*clean, layout, twin)
    assert torch.equal(plan.kv_index[:, 0], expected.kv_index[:, 0])
    assert torch.equal(plan.q_index[:, 0], expected.q_index[:, 0])
    # A clean call later: all is as it should be.
    for _ in range(4):
        plan = method.plan(*clean, layout, state).validate(total, total)
    assert all(c.isfinite().all() for c in state.centroids.values())
    sizes = plan.kv_offsets[0, 1].diff()[:10]
    assert (sizes > 0).sum() >= 8, "clusters are in use again"
    out, _ = plan.attend(*clean, v)
    torch.testing.assert_close(
        out.double(), masked_attention(*clean, v, plan.token_mask(total, total)), atol=1e-5, rtol=1e-5
    )


def test_presets():
    for model, kinds in PRESETS.items():
        for kind in kinds:
            assert isinstance(SVG2.preset(model, kind), SparseMethod)
        if model != "toy":
            paper = SVG2.preset(model)
            assert (paper.num_q_clusters, paper.num_k_clusters, paper.dense_step_fraction) == (100, 500, 0.3)
            assert (paper.top_p, paper.min_kc_ratio, paper.iter_init, paper.iter_step) == (0.9, 0.1, 50, 2)
    repo = SVG2.preset("hunyuan-t2v-720p", "repo")
    assert (repo.num_q_clusters, repo.num_k_clusters, repo.zero_step_kmeans_init) == (400, 1000, True)
    with pytest.raises(ValueError, match=r"model must be one of .*cosmos1-14b.*, got 'sora'"):
        SVG2.preset("sora")
    with pytest.raises(ValueError, match=r"kind must be one of paper, repo for"):
        SVG2.preset("hunyuan-480p", "turbo")


def test_compiles_to_one_graph():
    method = SVG2(num_q_clusters=4, num_k_clusters=6, iter_init=3)
    assert count_graphs(method, TokenLayout((2, 4, 8))) == 1
    assert count_graphs(method, TokenLayout((2, 4, 8), 5, 3), batch=2, steps=1) == 1


def test_observe_compiles_and_is_not_dropped():
    torch._dynamo.reset()
    method = SVG2(**SMALL, zero_step_kmeans_init=True)
    observe = torch.compile(lambda q, k, s: method.observe(q, k, GRID, s), backend="aot_eager", fullgraph=True)
    state = method.new_state(0, 1)
    observe(*tensors(1, 2, GRID.num_tokens, 16, count=2), state)
    assert len(state.centroids) == 2 and state.handle[1] == 2
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "given_, sentence",
    [
        (dict(top_p=1.5), "top_p must be at least 0 and at most 1, got 1.5"),
        (dict(num_q_clusters=0), "num_q_clusters must be at least 1, got 0"),
        (dict(iter_init=0), "iter_init must be at least 1, got 0"),
        (dict(dense_step_fraction=-0.1), "dense_step_fraction must be at least 0"),
        (dict(init="best"), "init must be one of random, kmeans\\+\\+, got 'best'"),
        (dict(cfg_cache="none"), "cfg_cache must be one of shared, per_branch"),
        (dict(dense_layer_rounding="up"), "dense_layer_rounding must be one of"),
        (dict(num_q_clusters=4.5), "SVG2: num_q_clusters must be a whole number, got 4.5"),
        (dict(num_k_clusters="500"), "SVG2: num_k_clusters must be a whole number, got '500'"),
        (dict(iter_step=None), "SVG2: iter_step must be a whole number, got None"),
        (dict(seed=1.0), "SVG2: seed must be a whole number, got 1.0"),
        (dict(iter_init=True), "SVG2: iter_init must be a whole number, got True"),
        (dict(top_p="0.9"), "SVG2: top_p must be a number, got '0.9'; give it without quotes"),
        (dict(top_p=float("nan")), "SVG2: top_p must be at least 0 and at most 1, got nan"),
        (dict(tolerance="small"), "SVG2: tolerance must be a number, got 'small'"),
        (dict(tolerance=-1.0), "SVG2: tolerance must be at least 0, got -1"),
        (dict(flow_shift=[5]), r"SVG2: flow_shift must be a number, got \[5\]"),
    ],
)
def test_bad_settings(given_, sentence):
    with pytest.raises(ValueError, match=sentence):
        SVG2(**given_)


def test_numbers_of_numpy_are_numbers():
    method = SVG2(num_q_clusters=np.int64(4), top_p=np.float32(0.5), seed=np.int32(3))
    assert make_plan(method, GRID)[0].q_offsets.shape[-1] == 5


def test_bad_inputs():
    method = SVG2(**SMALL)
    state = method.new_state(0, 1)
    q, k, _ = tensors(1, 2, GRID.num_tokens, 16)
    with pytest.raises(ValueError, match="SVG2: the layout .* has 105 tokens, got 100; pass the grid"):
        method.plan(q[:, :, :100], k[:, :, :100], GRID, state)
    with pytest.raises(ValueError, match="as many queries as keys, got 105 and 9; leave cross-attention dense"):
        method.plan(q, k[:, :, :9], GRID, state)
    with pytest.raises(ValueError, match="one number for each of the 1 batch entries, got 2"):
        method.plan(q, k, TokenLayout((2, 5, 7), 35, (3, 4)), state)


def test_ops_are_registered_properly():
    state = SVG2(**SMALL).new_state(0, 1)
    (x,) = tensors(1, 2, 30, 8, count=1)
    torch.library.opcheck(
        refine_clusters, (x, state.handle, 4, "q"), test_utils=("test_schema", "test_faketensor")
    )
