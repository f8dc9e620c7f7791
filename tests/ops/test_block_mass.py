"""block_mass and block_mass_topk against their definitions, on every backend.

Properties carry the number that the specification of AdaSpa gives them (section 9).
"""

from __future__ import annotations

import inspect

import pytest
import torch
from cases import mass as cases
from cases.attention import as_it_lies

from vdit_ext import ops
from vdit_ext.ops import attention as defs
from vdit_ext.testing import generator

BACKENDS = ("cpu", "emu", "emu_sm90", "cuda")


def run(backend, op, q, k, lse, *args, **kwargs):
    moved = [as_it_lies(t, backend.device) for t in (q, k, lse)]
    kwargs = {n: as_it_lies(t, backend.device) if isinstance(t, torch.Tensor) else t for n, t in kwargs.items()}
    result = getattr(backend.ops, op)(*moved, *args, **kwargs)
    return result.cpu() if isinstance(result, torch.Tensor) else tuple(t.cpu() for t in result)


def inputs(**sizes):
    """bf16 tensors of a case made up on the spot, and its keyword arguments."""
    case = cases.MassCase("", **sizes)
    return cases.make_mass(case, torch.bfloat16), case.kwargs


def dtypes_of(backend):
    return [torch.float16, torch.bfloat16] + ([] if backend.is_cuda_code else [torch.float32])


# --- against the definition ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases.correctness, ids=str)
def test_2_masses_are_the_softmax_pooled_over_blocks(backend, case):
    for dtype in dtypes_of(backend):
        q, k, lse = cases.make_mass(case, dtype)
        got = run(backend, "block_mass", q, k, lse, **case.kwargs)
        assert got.dtype == torch.float32
        cases.assert_masses(got, defs.block_mass_naive(q, k, lse, **case.kwargs), q, k, lse)


@pytest.mark.parametrize("case", cases.correctness, ids=str)
def test_topk_lists_what_block_mass_measures(backend, case):
    (q, k, lse), kwargs = cases.make_mass(case, torch.bfloat16), case.kwargs
    mass = run(backend, "block_mass", q, k, lse, **kwargs)
    nkv = mass.shape[-1]
    forced = torch.rand(nkv, generator=generator(1)) < 0.2
    for k_max in sorted({0, 1, (nkv + 1) // 2, nkv}):
        for first in (None, forced):
            indices, listed, total = run(backend, "block_mass_topk", q, k, lse, k_max, forced=first, **kwargs)
            expected = defs.heaviest_blocks(mass, k_max, first)
            assert torch.equal(indices, expected[0]) and torch.equal(listed, expected[1]), (
                "same sums, same order"
            )
            torch.testing.assert_close(total, expected[2], rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
def test_scale(backend, scale):
    (q, k, _), kwargs = inputs(seqlen_q=70, seqlen_kv=150)
    lse = torch.logsumexp(q.double() @ k.double().mT * scale, -1).float()
    got = run(backend, "block_mass", q, k, lse, scale=scale, **kwargs)
    cases.assert_masses(
        got, defs.block_mass_naive(q, k, lse, scale=scale, **kwargs), q, k * abs(scale) * 8, lse
    )


# --- the specification's properties -------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("block", [64, 128])
def test_1_fresh_lse_gives_every_row_mass_one(backend, dim, block):
    (q, k, lse), kwargs = inputs(
        batch=2, seqlen_q=210, seqlen_kv=333, head_dim=dim, q_block=block, kv_block=block, kv_lengths=(333, 200)
    )
    rows = torch.tensor([end - start for start, end in defs.block_bounds(None, block, 210, 0, 0)]).float()
    mass = run(backend, "block_mass", q, k, lse, **kwargs)
    torch.testing.assert_close(mass.sum(-1), rows.expand(2, 2, -1), rtol=1e-4, atol=0)
    total = run(backend, "block_mass_topk", q, k, lse, 2, **kwargs)[2]
    torch.testing.assert_close(total.sum(-1), torch.full((2, 2), 210.0), rtol=1e-4, atol=0)


def test_1_the_lse_of_attention_is_the_one_wanted(backend):
    (q, k, _), kwargs = inputs(seqlen_q=150, seqlen_kv=150)
    lists = torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    whole = {"q_block_size": 2**30, "kv_block_size": 2**30}
    tensors = [as_it_lies(t, backend.device) for t in (q, k, k, lists[..., 0] + 1, lists)]
    _, lse = backend.ops.block_sparse_attention(*tensors, **whole)
    mass = run(backend, "block_mass", q, k, lse.cpu(), **kwargs)
    torch.testing.assert_close(
        mass.sum(-1), torch.tensor([64.0, 64.0, 22.0]).expand(1, 2, -1), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("drift", [-20.0, 7.5, 40.0])
def test_4_choice_does_not_change_when_lse_drifts(backend, drift):
    (q, k, lse), kwargs = inputs(seqlen_q=140, seqlen_kv=500, gain=1.5)
    shift = drift * torch.tensor([1.0, -0.1, 0.5]).repeat_interleave(64)[:140]  # one constant a query block
    before, after = (run(backend, "block_mass_topk", q, k, t, 8, **kwargs) for t in (lse, lse + shift))
    assert torch.equal(before[0], after[0])
    factor = torch.exp(-shift[::64].double()).float()
    torch.testing.assert_close(after[2], before[2] * factor, rtol=2e-5, atol=0)
    recall = [listed.cumsum(-1) / total[..., None] for _, listed, total in (before, after)]
    torch.testing.assert_close(*recall, rtol=2e-5, atol=0)


def test_5_a_cached_search_repeats_the_first(backend):
    (q, k, lse), kwargs = inputs(seqlen_q=200, seqlen_kv=300)
    first = run(backend, "block_mass_topk", q, k, lse, 3, **kwargs)
    later = run(backend, "block_mass_topk", q.clone(), k.clone(), lse.clone(), 3, **kwargs)
    assert all(torch.equal(a, b) for a, b in zip(first, later, strict=True))
    for op in (ops.block_mass, ops.block_mass_topk):
        assert not {"v", "value", "values"} & set(inspect.signature(op).parameters), "a search reads no values"


def test_9_a_smaller_budget_is_a_prefix(backend):
    (q, k, lse), kwargs = inputs(batch=2, seqlen_q=140, seqlen_kv=700, kv_block=64, kv_lengths=(700, 610))
    forced = torch.zeros(11, dtype=torch.bool)
    forced[[2, 9]] = True
    whole = run(backend, "block_mass_topk", q, k, lse, 11, forced=forced, **kwargs)
    assert torch.equal(whole[0].sort(-1).values, torch.arange(11, dtype=torch.int32).expand(2, 2, 3, -1))
    assert (whole[0][..., :2] == torch.tensor([2, 9])).all()
    assert (whole[1][..., 2:].diff(dim=-1) <= 0).all()
    for k_max in range(11):
        part = run(backend, "block_mass_topk", q, k, lse, k_max, forced=forced, **kwargs)
        assert torch.equal(part[0], whole[0][..., :k_max]) and torch.equal(part[1], whole[1][..., :k_max])
        assert torch.equal(part[2], whole[2]), "the total is that of all blocks"


@pytest.mark.parametrize("spread", [1.0, 1e4])
def test_10_saturated_logits_stay_finite(backend, spread):
    (q, k, _), kwargs = inputs(seqlen_q=130, seqlen_kv=200)
    q[..., 0] = spread**0.5 * 8 * torch.where(torch.arange(130) % 2 == 0, 1.0, -1.0)
    k[..., 0] = spread**0.5 * torch.where(torch.arange(200) % 3 == 0, 1.0, -1.0)
    lse = cases.true_lse(q, k)
    for stale in (0.0, -40.0, 40.0, -2e4, 2e4):
        mass = run(backend, "block_mass", q, k, lse + stale, **kwargs)
        assert mass.isfinite().all()
        cases.assert_masses(mass, defs.block_mass_naive(q, k, lse + stale, **kwargs), q, k, lse + stale)


@pytest.mark.parametrize("dim", [64, 128])
def test_13_planted_blocks_are_found(backend, dim):
    blocks, heads, kept = 6, 2, 2
    gen = generator(3)
    signs = torch.randn(1, heads, blocks, dim, generator=gen).sign() * 3
    planted = torch.stack([torch.randperm(blocks, generator=gen)[:kept] for _ in range(heads * blocks)])
    planted = planted.view(1, heads, blocks, kept).sort(-1).values
    k = signs.repeat_interleave(64, 2) + 0.1 * torch.randn(1, heads, blocks * 64, dim, generator=gen)
    q = (
        signs.gather(2, planted.flatten(2)[..., None].expand(-1, -1, -1, dim))
        .view(1, heads, blocks, kept, dim)
        .sum(3)
    )
    q, k = q.repeat_interleave(64, 2).bfloat16(), k.bfloat16()
    lse = cases.true_lse(q, k)
    indices, mass, total = run(backend, "block_mass_topk", q, k, lse, kept)
    assert torch.equal(indices.sort(-1).values, planted.int())
    torch.testing.assert_close(mass.sum(-1) / total, torch.ones(1, heads, blocks), rtol=1e-4, atol=0)


# --- the corners of the contract ----------------------------------------------------------------------------


def test_rows_without_keys_add_nothing_whatever_they_hold(backend):
    (q, k, lse), kwargs = inputs(seqlen_q=130, seqlen_kv=200)
    lse[..., 3::7] = -torch.inf
    expected = defs.block_mass_naive(q, k, lse, **kwargs)
    q[:, :, 3::7] = torch.nan
    cases.assert_masses(run(backend, "block_mass", q, k, lse, **kwargs), expected, q.nan_to_num(0), k, lse)


def test_nan_stays_in_its_row_or_column(backend):
    (q, k, lse), kwargs = inputs(seqlen_q=200, seqlen_kv=400, kv_lengths=(310,))
    clean = run(backend, "block_mass", q, k, lse, **kwargs)
    for place, where in (
        ((q, (0, 0, 70)), (0, 0, 1, slice(0, 5))),
        ((lse, (0, 0, 199)), (0, 0, 3, slice(0, 5))),
        ((k, (0, 0, 130)), (0, 0, slice(None), 2)),
        ((k, (0, 0, 310)), None),  # padding
    ):
        tensor, index = place
        kept = tensor[index].clone()
        tensor[index] = torch.nan
        mass = run(backend, "block_mass", q, k, lse, **kwargs)
        indices, listed, total = run(backend, "block_mass_topk", q, k, lse, 7, **kwargs)
        tensor[index] = kept
        spoiled = torch.zeros_like(mass, dtype=torch.bool)
        if where is not None:
            spoiled[where] = True
        assert torch.equal(mass.isnan(), spoiled)
        assert torch.equal(mass[~spoiled], clean[~spoiled]), "nothing else changes"
        assert torch.equal(indices, defs.heaviest_blocks(mass, 7)[0]), "NaN ranks last"
        assert torch.equal(total.isnan(), spoiled.any(-1)) and torch.equal(
            listed.isnan(), spoiled.gather(-1, indices.long())
        )


def test_infinities_are_clamped_and_not_nan(backend):
    (q, k, lse), kwargs = inputs(seqlen_q=64, seqlen_kv=128)
    q[..., 1:], k[..., 1:] = 0, 0
    q[..., 0] = 1
    k[..., 0] = torch.tensor([1.0, -1.0]).repeat_interleave(64) * torch.inf
    mass = run(backend, "block_mass", q, k, lse.fill_(0.0), **kwargs)
    torch.testing.assert_close(
        mass, torch.tensor([64 * 64 * 30.0**0 * float(torch.tensor(30.0).double().exp()), 0.0]).expand_as(mass)
    )


def test_a_row_of_infinite_lse_adds_nothing(backend):
    (q, k, lse), kwargs = inputs(seqlen_q=64, seqlen_kv=128)
    lse[..., 5] = torch.inf
    mass = run(backend, "block_mass", q, k, lse, **kwargs)
    cases.assert_masses(mass, defs.block_mass_naive(q, k, lse, **kwargs), q, k, lse)
    lse[..., 5] = -torch.inf  # which is documented to add nothing
    assert torch.equal(run(backend, "block_mass", q, k, lse, **kwargs), mass)


def test_ties_go_to_the_lowest_index(backend):
    (q, k, lse), kwargs = inputs(seqlen_q=100, seqlen_kv=64 * 9)
    k[:, :, 64:] = k[:, :, :64].repeat(1, 1, 8, 1)
    k[:, :, 64 * 5 : 64 * 6] *= 2
    indices, mass, _ = run(backend, "block_mass_topk", q, k, lse, 9, **kwargs)
    rest = torch.tensor([0, 1, 2, 3, 4, 6, 7, 8], dtype=torch.int32)
    for row in indices.flatten(0, -2):
        assert torch.equal(row[row != 5], rest)


def test_forced_blocks_come_first_by_head_and_batch(backend):
    (q, k, lse), kwargs = inputs(batch=2, seqlen_q=70, seqlen_kv=64 * 7, kv_lengths=(448, 300))
    mass = run(backend, "block_mass", q, k, lse, **kwargs)
    for shape in ((7,), (1, 1, 7), (2, 1, 7), (1, 2, 7), (2, 2, 7)):
        forced = torch.rand(shape, generator=generator(5)) < 0.5
        for k_max in (2, 7):  # fewer than are forced, and all
            got = run(backend, "block_mass_topk", q, k, lse, k_max, forced=forced, **kwargs)
            expected = defs.heaviest_blocks(mass, k_max, forced)
            assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_any_strides(backend):
    (q, k, lse), kwargs = inputs(batch=2, layout="sliced", seqlen_q=100, seqlen_kv=190, kv_lengths=(190, 77))
    expected = run(backend, "block_mass", q.contiguous(), k.contiguous(), lse, **kwargs)
    kwargs["kv_lengths"] = torch.stack([kwargs["kv_lengths"], kwargs["kv_lengths"] * 0], 1)[:, 0]
    strided = lse.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(run(backend, "block_mass", q, k, strided, **kwargs), expected)
    forced = torch.arange(9).remainder(3).eq(0)[::3]
    got = run(backend, "block_mass_topk", q, k, strided, 2, forced=forced, **kwargs)
    assert torch.equal(got[0], defs.heaviest_blocks(expected, 2, forced)[0])


def test_rows_of_many_blocks(backend):
    """Rows too long for as many query blocks as a thread block could have, and no power of two."""
    (q, k, lse), kwargs = inputs(heads=1, seqlen_q=40, seqlen_kv=2600, q_block=5, kv_block=1)
    mass = run(backend, "block_mass", q, k, lse, **kwargs)
    for k_max in (3, 2600):
        indices, listed, total = run(backend, "block_mass_topk", q, k, lse, k_max, **kwargs)
        expected = defs.heaviest_blocks(mass, k_max)
        assert torch.equal(indices, expected[0]) and torch.equal(listed, expected[1])
        torch.testing.assert_close(total, expected[2], rtol=1e-6, atol=0)


@pytest.mark.parametrize("batch,seqlen_q,seqlen_kv", [(0, 70, 70), (2, 0, 70), (2, 70, 0), (2, 0, 0)])
def test_empty(backend, batch, seqlen_q, seqlen_kv):
    q, k = torch.zeros(batch, 2, seqlen_q, 64), torch.zeros(batch, 2, seqlen_kv, 64)
    q, k, lse = q.bfloat16(), k.bfloat16(), torch.full((batch, 2, seqlen_q), -torch.inf)
    nq, nkv = -(-seqlen_q // 64), -(-seqlen_kv // 64)
    assert run(backend, "block_mass", q, k, lse).shape == (batch, 2, nq, nkv)
    indices, mass, total = run(backend, "block_mass_topk", q, k, lse, nkv)
    assert indices.shape == mass.shape == (batch, 2, nq, nkv) and total.shape == (batch, 2, nq)
    assert (total == 0).all()


def test_two_runs_give_equal_bits(backend):
    (q, k, lse), kwargs = inputs(batch=2, seqlen_q=333, seqlen_kv=400, q_block=128)
    first = run(backend, "block_mass", q, k, lse, **kwargs)
    assert torch.equal(run(backend, "block_mass", q, k, lse, **kwargs), first)


def test_refuses(backend):
    (q, k, lse), _ = inputs(batch=2, seqlen_q=70, seqlen_kv=100)
    for op, more in (("block_mass", ()), ("block_mass_topk", (2,))):

        def refuse(match, *args, op=op, more=more, **kwargs):
            with pytest.raises(RuntimeError, match=f"vdit::{op}: {match}"):
                run(backend, op, *args, *more, **kwargs)

        refuse("k must be bfloat16, got float16", q, k.half(), lse)
        refuse(r"k must be \[2, 2, Skv, 64\] like q, got \[1, 2, 100, 64\]", q, k[:1], lse)
        refuse("lse must be float32, got float16", q, k, lse.half())
        refuse(r"lse must be \[2, 2, 70\], got \[2, 2, 69\]", q, k, lse[..., 1:])
        refuse("block sizes must be positive, got 0 and 64", q, k, lse, q_block_size=0)
        refuse("kv_lengths must be int32, got int64", q, k, lse, kv_lengths=torch.zeros(2, dtype=torch.int64))
        refuse(r"kv_lengths must be \[2\], got \[3\]", q, k, lse, kv_lengths=torch.zeros(3, dtype=torch.int32))
        if backend.name != "cuda":
            for wrong in (-1, 101):
                lengths = torch.tensor([100, wrong], dtype=torch.int32)
                refuse(f"kv_lengths must be in 0..100, got {wrong} for batch 1", q, k, lse, kv_lengths=lengths)
        if backend.is_cuda_code:
            refuse("q must be float16 or bfloat16 on CUDA, got float32", q.float(), k.float(), lse)
            refuse(
                "head_dim must be 64, 96 or 128 on CUDA, got 32", q[..., :32].clone(), k[..., :32].clone(), lse
            )
            odd = torch.zeros(2, 2, 70, 68).bfloat16()[..., 2:66]
            refuse("q must have rows aligned to 16 bytes on CUDA", odd, k, lse)
        else:
            refuse("head_dim must be a multiple of 8 up to 256 on CPU, got 12", q[..., :12], k[..., :12], lse)


def test_topk_refuses(backend):
    (q, k, lse), _ = inputs(batch=2, seqlen_q=70, seqlen_kv=100)

    def refuse(match, k_max=2, **kwargs):
        with pytest.raises(RuntimeError, match=f"vdit::block_mass_topk: {match}"):
            run(backend, "block_mass_topk", q, k, lse, k_max, **kwargs)

    refuse(r"k_max must be in 0..2 \(the key blocks\), got 3", 3)
    refuse(r"k_max must be in 0..2 \(the key blocks\), got -1", -1)
    refuse("forced must be bool, got uint8", forced=torch.zeros(2, dtype=torch.uint8))
    refuse(r"forced must be \[2\] or \[2 or 1, 2 or 1, 2\], got \[3\]", forced=torch.zeros(3, dtype=torch.bool))
    refuse(r"forced must be \[2\] or .*, got \[2, 2\]", forced=torch.zeros(2, 2, dtype=torch.bool))
    if backend.is_cuda_code:
        k = torch.zeros(2, 2, 24577, 64, dtype=torch.bfloat16)
        refuse(
            "there must be at most 24576 key blocks on CUDA, got 24577; raise kv_block_size", kv_block_size=1
        )


# --- registration -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [cases.correctness[4], cases.correctness[10]], ids=str)
def test_opcheck(case):
    args, kwargs = cases.make_mass(case, torch.bfloat16), case.kwargs
    torch.library.opcheck(torch.ops.vdit.block_mass.default, args, kwargs)
    forced = torch.zeros(-(-case.seqlen_kv // case.kv_block), dtype=torch.bool)
    torch.library.opcheck(torch.ops.vdit.block_mass_topk.default, (*args, 2), {"forced": forced} | kwargs)


def test_both_compile_whole_with_dynamic_shapes():
    def search(q, k, lse, forced):
        return ops.block_mass(q, k, lse), *ops.block_mass_topk(q, k, lse, 2, forced=forced)

    torch._dynamo.reset()
    compiled = torch.compile(search, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (200, 333):
        (q, k, lse), _ = inputs(seqlen_q=length, seqlen_kv=length)
        forced = torch.zeros(-(-length // 64), dtype=torch.bool)
        for got, expected in zip(compiled(q, k, lse, forced), search(q, k, lse, forced), strict=True):
            assert torch.equal(got, expected)
    torch._dynamo.reset()
