"""BlockPlan: masks, densities, FlexAttention both ways, text blocks, validation."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import sys

import pytest
import torch
from cases.sparse import count_graphs, expand_map, masked_attention, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from vdit_ext import ops
from vdit_ext.sparse import (
    METHODS,
    SVG2,
    BlockPlan,
    Dense,
    SparseMethod,
    StepInfo,
    TokenLayout,
    add_text_blocks,
    add_text_index,
    add_text_offsets,
    begin_step,
    dense_layout_plan,
    dense_plan,
)
from vdit_ext.sparse import state as state_module
from vdit_ext.sparse.state import LayerState, note_density


@st.composite
def plans(draw):
    """A random plan with its lengths and, per batch entry and head, its map and token orders."""
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    seed = draw(st.integers(0, 9999))
    generator = torch.Generator().manual_seed(seed)
    sides = []
    for _ in range(2):
        length, blocks = draw(st.integers(1, 60)), draw(st.integers(1, 6))
        cuts = torch.randint(length + 1, (batch, heads, blocks - 1), generator=generator).sort(-1).values
        ends = torch.full((batch, heads, 1), length)
        offsets = torch.cat([torch.zeros_like(ends), cuts, ends], -1).int()
        orders = torch.rand(batch, heads, length, generator=generator).argsort(-1).int()
        sides.append((length, blocks, offsets, orders))
    keep = torch.rand(batch, heads, sides[0][1], sides[1][1], generator=generator) < draw(st.floats(0, 1))
    counts, lists = ops.lists_from_mask(keep)
    plan = BlockPlan(
        counts, lists, q_offsets=sides[0][2], kv_offsets=sides[1][2], q_index=sides[0][3], kv_index=sides[1][3]
    )
    return plan, keep, sides[0][0], sides[1][0]


@settings(max_examples=30, deadline=None)
@given(drawn=plans())
def test_random_plans(drawn):
    """Mask, density and attention of a random plan against loops."""
    plan, keep, seqlen_q, seqlen_kv = drawn
    assert plan.validate(seqlen_q, seqlen_kv) is plan
    batch, heads = keep.shape[:2]
    masks = torch.zeros(batch, heads, seqlen_q, seqlen_kv, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            masks[b, h] = expand_map(
                keep[b, h],
                plan.q_offsets[b, h].diff().tolist(),
                plan.kv_offsets[b, h].diff().tolist(),
                plan.q_index[b, h].long(),
                plan.kv_index[b, h].long(),
            )
    assert torch.equal(plan.token_mask(seqlen_q, seqlen_kv), masks)
    torch.testing.assert_close(plan.density(seqlen_q, seqlen_kv), masks.float().mean((-1, -2)))
    (q,) = tensors(batch, heads, seqlen_q, 8, 1, 1)
    k, v = tensors(batch, heads, seqlen_kv, 8, 2, 2)
    out, _ = plan.attend(q, k, v)
    torch.testing.assert_close(out.double(), masked_attention(q, k, v, masks), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lengths", [(64, 96), (50, 70), (1, 1)])
def test_block_mask_round_trip(lengths):
    seqlen_q, seqlen_kv = lengths
    num_q, num_kv = -(-seqlen_q // 16), -(-seqlen_kv // 32)
    keep = torch.rand(2, 3, num_q, num_kv, generator=torch.Generator().manual_seed(0)) < 0.6
    counts, lists = ops.lists_from_mask(keep)
    plan = BlockPlan(counts, lists, q_block_size=16, kv_block_size=32)
    mask = plan.to_block_mask(seqlen_q, seqlen_kv)
    assert mask.seq_lengths == lengths and mask.BLOCK_SIZE == (16, 32)
    assert torch.equal(mask.to_dense().bool(), keep)
    back = BlockPlan.from_block_mask(mask).validate(seqlen_q, seqlen_kv)
    assert torch.equal(back.token_mask(seqlen_q, seqlen_kv), plan.token_mask(seqlen_q, seqlen_kv))
    narrow = dataclasses.replace(plan, kv_indices=lists[..., : int(counts.max())].contiguous())
    assert torch.equal(narrow.to_block_mask(seqlen_q, seqlen_kv).to_dense().bool(), keep)
    wide = dataclasses.replace(plan, kv_indices=torch.nn.functional.pad(lists, (0, 3), value=99))
    assert torch.equal(wide.to_block_mask(seqlen_q, seqlen_kv).to_dense().bool(), keep)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_block_mask_attends_alike():
    """FlexAttention under the converted mask computes what the plan does."""
    keep = torch.rand(1, 2, 2, 2, generator=torch.Generator().manual_seed(1)) < 0.6
    keep[..., 0] = True
    plan = BlockPlan(*ops.lists_from_mask(keep), q_block_size=128, kv_block_size=128)
    q, k, v = (x.contiguous() for x in tensors(1, 2, 256, 16))
    mask = plan.to_block_mask(256, 256)
    # Eager FlexAttention evaluates only the mask_mod, so the comparison goes through the dense block map.
    expected = flex_attention(
        q,
        k,
        v,
        score_mod=lambda s, b, h, i, j: torch.where(
            mask.to_dense()[b, h, i // 128, j // 128] > 0, s, -torch.inf
        ),
    )
    torch.testing.assert_close(plan.attend(q, k, v)[0], expected, atol=1e-5, rtol=1e-5)


def test_block_masks_that_cannot_be_plans():
    causal = create_block_mask(lambda b, h, i, j: i >= j, 1, 1, 256, 256, device="cpu")
    with pytest.raises(ValueError, match="kept or dropped as a whole, got partial blocks"):
        BlockPlan.from_block_mask(causal)
    blockwise = create_block_mask(lambda b, h, i, j: i // 128 >= j // 128, 1, 1, 384, 384, device="cpu")
    plan = BlockPlan.from_block_mask(blockwise)
    row = torch.arange(384) // 128
    assert torch.equal(plan.token_mask(384, 384)[0, 0], row[:, None] >= row)


def test_plans_that_cannot_be_block_masks():
    plan = dense_layout_plan(TokenLayout((1, 4, 4), 8, 5))
    with pytest.raises(ValueError, match="uniform blocks only"):
        plan.to_block_mask(24, 24)
    permuted = dataclasses.replace(dense_plan(16), q_index=torch.arange(16, dtype=torch.int32)[None, None])
    with pytest.raises(ValueError, match="cannot permute tokens"):
        permuted.to_block_mask(16, 16)


@pytest.mark.parametrize(
    "counts, lists, sentence",
    [
        ([2, 1], [[1, 1], [0, 0]], "may list each key block once, got a block listed twice"),
        ([2, 1], [[0, 0, 0, 0], [1, 0, 0, 0]], "may list each key block once, got a block listed twice"),
        ([4, 1], [[0, 1, 0, 1], [0, 0, 0, 0]], "may list at most 3 blocks, .*, got 4"),
        ([2, 3], [[0, 1], [0, 1]], "may list at most 2 blocks, .*, got 3"),
    ],
)
def test_lists_that_cannot_be_block_masks(counts, lists, sentence):
    """What FlexAttention would compute otherwise is not what the plan does."""
    to_lists = dict(dtype=torch.int32)
    plan = BlockPlan(
        torch.tensor([[counts]], **to_lists), torch.tensor([[lists]], **to_lists), None, None, 8, 8
    )
    with pytest.raises(ValueError, match=f"BlockPlan.to_block_mask: a row {sentence}"):
        plan.to_block_mask(16, 24)


def test_density_is_remembered(monkeypatch):
    plan, calls = dense_plan(300, 70, block_size=64), []
    kept_pairs = BlockPlan.kept_pairs
    monkeypatch.setattr(BlockPlan, "kept_pairs", lambda *args: calls.append(args) or kept_pairs(*args))
    first = plan.density(300, 70)
    assert plan.density(300, 70) is first and len(calls) == 1
    assert plan.density(320, 70) is not first and len(calls) == 2
    assert dataclasses.replace(plan, kv_num_blocks=plan.kv_num_blocks - 1).density(300, 70) < 1


def test_density_is_noted_where_a_log_is_kept():
    layout = TokenLayout((1, 5, 5))
    plan, state = dense_layout_plan(layout, block_size=8), LayerState(0, 1)
    note_density(plan, layout, state)
    assert float(state.density) == 1
    state.reset()
    state.logs_density = False
    note_density(plan, layout, copy.deepcopy(state))
    note_density(plan, layout, state)
    assert state.density is None


def test_attention_without_lse():
    index = torch.arange(34, -1, -1, dtype=torch.int32)[None, None]
    for plan in (dense_plan(35), dataclasses.replace(dense_plan(35), q_index=index)):
        q, k, v = tensors(1, 2, 35, 8)
        assert torch.equal(plan.attend(q, k, v, return_lse=False), plan.attend(q, k, v)[0])


def test_dense_plans():
    plan = dense_plan(300, 70, block_size=64).validate(300, 70)
    assert plan.token_mask(300, 70).all() and plan.density(300, 70).item() == 1
    q, k, v = tensors(1, 2, 35, 8)
    for text_first in (False, True):
        layout = TokenLayout((1, 5, 5), 10, 6, text_first)
        plan = dense_layout_plan(layout, block_size=8).validate(35, 35)
        pad = torch.arange(35)
        pad = (pad >= 6) & (pad < 10) if text_first else pad >= 31
        mask = pad[:, None] == pad
        assert torch.equal(plan.token_mask(35, 35)[0, 0], mask)
        out, _ = plan.attend(q, k, v)
        torch.testing.assert_close(out.double(), masked_attention(q, k, v, mask), atol=1e-5, rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    text=st.integers(0, 9),
    valid=st.none() | st.integers(0, 9) | st.tuples(st.integers(0, 9), st.integers(0, 9)),
    text_first=st.booleans(),
    width=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_text_blocks(text, valid, text_first, width, seed):
    """Text blocks at either end: lists, boundaries and order of the whole sequence."""
    if isinstance(valid, int):
        valid = min(valid, text)
    elif valid is not None:
        valid = tuple(min(n, text) for n in valid)
    layout = TokenLayout((2, 3, 5), text, valid, text_first)
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(2, 1, 4, 5, generator=generator) < 0.5
    counts, lists = ops.lists_from_mask(keep)
    lists = lists[..., : max(width, int(counts.max()))].contiguous()
    order = torch.rand(2, 1, 30, generator=generator).argsort(-1).int()
    q_offsets = torch.tensor([0, 7, 7, 20, 30], dtype=torch.int32)[None, None]
    kv_offsets = torch.tensor([0, 1, 9, 9, 25, 30], dtype=torch.int32)[None, None]
    counts, lists = add_text_blocks(counts, lists, 5, layout)
    plan = BlockPlan(
        counts,
        lists,
        q_offsets=add_text_offsets(q_offsets, layout),
        kv_offsets=add_text_offsets(kv_offsets, layout),
        q_index=add_text_index(order, layout),
        kv_index=add_text_index(order, layout),
    ).validate(layout.num_tokens, layout.num_tokens)
    mask = plan.token_mask(layout.num_tokens, layout.num_tokens)
    start = text if text_first else 0
    for b in range(2):
        real = text if valid is None else valid if isinstance(valid, int) else valid[b]
        token = torch.arange(layout.num_tokens)
        is_text = token < text if text_first else token >= 30
        pad = is_text & (token - (0 if text_first else 30) >= real)
        expected = pad[:, None] == pad
        video = expand_map(keep[b, 0], [7, 0, 13, 10], [1, 8, 0, 16, 5], order[b, 0].long(), order[b, 0].long())
        expected[start : start + 30, start : start + 30] = video
        assert torch.equal(mask[b % mask.shape[0], 0], expected)
    used = torch.arange(lists.shape[-1]) < counts[..., None]
    steps = torch.where(used[..., 1:], lists.diff(dim=-1), 1)
    assert (steps > 0).all(), "lists ascend"
    assert (lists[~used] == 0).all(), "unused entries are 0"


@pytest.mark.parametrize("valid", [None, 5, (5, 3)])
def test_prompt_lengths_are_not_copied_from_the_host(valid):
    """Such a copy waits for everything that a GPU has queued; tensors made from Python lists begin with one."""

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket)
            return func(*args, **(kwargs or {}))

    seen = []
    with Names():
        offsets = add_text_offsets(
            torch.zeros(1, 1, 4, dtype=torch.int32, device="meta"), TokenLayout((1, 4, 4), 8, valid)
        )
    assert offsets.shape[-1] == 5 + (valid is not None)
    assert seen and not {torch.ops.aten.lift_fresh, torch.ops.aten._to_copy, torch.ops.aten.copy_} & set(seen)


def test_prompt_cut_into_several_blocks():
    layout = TokenLayout((1, 4, 4), 10)
    counts, lists = add_text_blocks(
        *ops.lists_from_mask(torch.eye(4, dtype=torch.bool)[None, None]), 4, layout, prompt_blocks=3
    )
    plan = BlockPlan(counts, lists, q_block_size=4, kv_block_size=4).validate(26, 26)
    token = torch.arange(26)
    expected = (token[:, None] // 4 == token // 4) | (token >= 16) | (token[:, None] >= 16)
    assert torch.equal(plan.token_mask(26, 26)[0, 0], expected)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(kv_num_blocks=torch.ones(1, 1, 3, dtype=torch.int32)), r"must be \[B\|1, H\|1, nQ\]"),
        (dict(kv_num_blocks=torch.ones(1, 1, 2)), "kv_num_blocks must be int32 on cpu, got torch.float32"),
        (
            dict(kv_num_blocks=torch.full((1, 1, 2), 5, dtype=torch.int32)),
            "between 0 and the list width 2, got 5 to 5",
        ),
        (dict(kv_indices=torch.full((1, 1, 2, 2), 7, dtype=torch.int32)), "between 0 and 1, got 7 to 7"),
        (dict(kv_indices=torch.zeros(1, 1, 2, 2, dtype=torch.int32)), "got a block listed twice"),
        (dict(q_block_size=0), "q_block_size must be at least 1, got 0"),
        (dict(q_block_size=8), "one entry for each of the 4 query blocks, got 2"),
        (
            dict(q_offsets=torch.tensor([[[0, 9, 3]]], dtype=torch.int32)),
            "q_offsets must start at 0, never fall",
        ),
        (dict(kv_offsets=torch.tensor([[[0, 40, 32]]], dtype=torch.int32)), "kv_offsets must start at 0"),
        (dict(kv_offsets=torch.tensor([0, 32], dtype=torch.int32)), r"kv_offsets must be \[B\|1, H\|1, n\+1\]"),
        (
            dict(q_index=torch.zeros(1, 1, 32, dtype=torch.int32)),
            "q_index must be .* hold each of 0 to 31 once",
        ),
        (dict(kv_index=torch.arange(31, dtype=torch.int32)[None, None]), "kv_index must be"),
    ],
)
def test_validate_says_what_is_wrong(change, sentence):
    plan = dense_plan(32, block_size=16).validate(32, 32)
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(plan, **change).validate(32, 32)


def test_repr_is_one_short_line():
    assert repr(dense_plan(300)) == (
        "BlockPlan(batch 1, heads 1, q 3 blocks of 128, kv blocks of 128, up to 3 of them a row, tokens in order, cpu)"
    )
    assert "variable blocks" in repr(dense_layout_plan(TokenLayout((1, 4, 4), 8, 5)))


def test_methods_by_name():
    assert set(METHODS) >= {"dense", "svg2", "svg1", "draft"}
    for name, factory in METHODS.items():
        method = factory()
        assert method.name == name and isinstance(method, SparseMethod)
        assert isinstance(factory.preset("toy"), SparseMethod)
        hash(method)


def test_dense_method():
    method, layout = Dense(), TokenLayout((2, 4, 4), 6, (6, 2))
    state = method.new_state(0, 1)
    assert method.is_dense(StepInfo(49, 50, 0.0, 4), 3) and method.token_order(layout) is None
    begin_step(method, StepInfo(0, 1, 1000.0, 1), layout, [state])
    q, k, v = tensors(2, 2, 38, 16)
    plan = method.plan(q, k, layout, state).validate(38, 38)
    mask = plan.token_mask(38, 38)
    assert mask[0].all() and not mask[1].all()
    torch.testing.assert_close(
        plan.attend(q, k, v)[0].double(), masked_attention(q, k, v, mask), atol=1e-5, rtol=1e-5
    )
    method.reset(state)


def test_a_new_prompt_length_needs_at_most_one_more_graph():
    """Prompt lengths are host integers: the second one makes them dynamic, further ones cost nothing."""
    torch._dynamo.reset()
    counter, method = CompileCounter(), SVG2(num_q_clusters=3, num_k_clusters=4, iter_init=2)
    state = method.new_state(0, 1)
    compiled = torch.compile(lambda q, k, layout: method.plan(q, k, layout, state).kv_offsets, backend=counter)
    q, k, _ = tensors(1, 1, 24, 8)
    for valid in (8, 5, 3, 7, 2):
        assert int(compiled(q, k, TokenLayout((1, 4, 4), 8, valid))[0, 0, -2]) == 16 + valid
    assert counter.frame_count <= 2
    torch._dynamo.reset()


def test_a_new_sequence_length_needs_at_most_one_more_graph():
    """The remembered density is found by comparing lengths, which dynamic ones allow."""
    torch._dynamo.reset()
    counter, method = CompileCounter(), SVG2(num_q_clusters=3, num_k_clusters=4, iter_init=2)
    state = method.new_state(0, 1)

    def share(q, k, layout):
        return method.plan(q, k, layout, state).density(q.shape[2], q.shape[2])

    compiled = torch.compile(share, backend=counter, fullgraph=True)
    for text in (8, 5, 3, 7, 2):
        q, k, _ = tensors(1, 1, 16 + text, 8)
        assert torch.equal(compiled(q, k, TokenLayout((1, 4, 4), text)), state.density)
    assert counter.frame_count <= 2
    torch._dynamo.reset()


def test_ops_are_named_after_the_build(monkeypatch):
    """Two builds with names of their own may share a process."""
    monkeypatch.setattr(ops, "NAMESPACE", "vdit_twin")
    spec = importlib.util.spec_from_file_location("vdit_ext.sparse.state_twin", state_module.__file__)
    twin = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, twin)
    spec.loader.exec_module(twin)
    for name in ("refine_clusters", "record_density", "sample_rows"):
        assert hasattr(torch.ops.vdit_twin_py, name)
    state = twin.LayerState(0, 1)
    twin.record_density(torch.ones(1, 1), state.handle)
    assert state.density == 1


def test_dense_plan_compiles():
    assert count_graphs(Dense(), TokenLayout((2, 4, 4), 6, 3), steps=1) == 1
