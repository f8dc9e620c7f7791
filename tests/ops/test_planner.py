"""The planner ops against their definitions, on every backend."""

from __future__ import annotations

import warnings

import pytest
import torch
from cases.rows import FLOAT_IDS, FLOATS, on, rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vdit_ext.ops import attention as defs
from vdit_ext.testing import assert_close, generator

quick = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


def permutation(b, h, n, seed=0):
    return torch.rand(b, h, n, generator=generator(seed)).argsort(-1).int()


# --- permute_rows, unpermute_rows ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8, torch.float64], ids=str)
@pytest.mark.parametrize("dim", [1, 3, 64, 128])
@pytest.mark.parametrize("shared", [False, True], ids=["per_head", "shared"])
def test_permute_rows_round_trip_is_exact(backend, dtype, dim, shared):
    x = rows(2, 3, 77, dim).mul(50).to(dtype)
    index = permutation(1, 1, 77) if shared else permutation(2, 3, 77)
    x_, index_ = on(backend, x, index)
    permuted = backend.ops.permute_rows(x_, index_)
    assert torch.equal(permuted.cpu(), defs.permute_rows_naive(x, index))
    restored = backend.ops.unpermute_rows(permuted, index_)
    assert torch.equal(restored.cpu(), x)
    assert torch.equal(restored.cpu(), defs.unpermute_rows_naive(permuted.cpu(), index))


def test_permute_rows_layouts(backend):
    x, index = on(backend, rows(1, 2, 40, 64), permutation(1, 2, 40))
    assert backend.ops.permute_rows(x, index).is_contiguous()
    assert backend.ops.unpermute_rows(x, index).transpose(1, 2).is_contiguous()


def test_permute_rows_gathers_repeats_and_subsets(backend):
    x, index = on(backend, rows(1, 2, 10, 64), torch.tensor([[[9, 9, 0]]], dtype=torch.int32))
    out = backend.ops.permute_rows(x, index)
    assert (
        out.shape == (1, 2, 3, 64)
        and torch.equal(out[:, :, 0], x[:, :, 9])
        and torch.equal(out[:, :, 2], x[:, :, 0])
    )


def test_permute_rows_empty(backend):
    x, index = on(backend, rows(1, 2, 0, 64), torch.zeros(1, 1, 0, dtype=torch.int32))
    assert backend.ops.permute_rows(x, index).shape == (1, 2, 0, 64)


def test_permute_rows_refuses(backend):
    x, index = on(backend, rows(1, 2, 10, 64), permutation(1, 2, 10))
    with pytest.raises(RuntimeError, match="permute_rows: index must be int32, got int64"):
        backend.ops.permute_rows(x, index.long())
    with pytest.raises(
        RuntimeError, match="unpermute_rows: index must have one entry for each of the 10 rows, got 9"
    ):
        backend.ops.unpermute_rows(x, index[..., :9])
    if backend.name == "cuda":
        return
    with pytest.raises(RuntimeError, match=r"permute_rows: index must be in 0..9, got 1\d at position"):
        backend.ops.permute_rows(x, index + 1 + 9 * (index == 9).int())
    with pytest.raises(RuntimeError, match="unpermute_rows: index must be a permutation, got 3 twice"):
        backend.ops.unpermute_rows(x, torch.full_like(index, 3))


# --- mean_pool_blocks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=FLOAT_IDS)
@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("length,block", [(1, 128), (128, 128), (333, 64), (257, 1), (50, 100)])
def test_mean_pool_blocks_uniform(backend, dtype, dim, length, block):
    x = rows(2, 3, length, dim, dtype=dtype)
    out = backend.ops.mean_pool_blocks(*on(backend, x), block_size=block)
    assert_close(out, defs.mean_pool_blocks_naive(x, block_size=block), tolerance=3e-6)


@pytest.mark.parametrize("dtype", FLOATS, ids=FLOAT_IDS)
def test_mean_pool_blocks_variable(backend, dtype):
    x = rows(2, 3, 500, 64, dtype=dtype)
    cuts = torch.randint(0, 501, (2, 3, 12), generator=generator(1)).sort(-1).values.int()
    cuts[..., 3] = cuts[..., 2]
    offsets = torch.nn.functional.pad(cuts, (1, 0))
    offsets = torch.cat([offsets, torch.full((2, 3, 1), 500, dtype=torch.int32)], -1)
    out = backend.ops.mean_pool_blocks(*on(backend, x), offsets=offsets.to(backend.device))
    assert_close(out, defs.mean_pool_blocks_naive(x, offsets=offsets), tolerance=3e-6)
    assert (out[:, :, 3] == 0).all(), "an empty block gives 0"


# --- label_sort, segment_mean -------------------------------------------------------------------------------


@pytest.mark.parametrize("n,c", [(1, 1), (1, 500), (1000, 1), (777, 31), (3000, 257), (64, 1000)])
def test_label_sort_is_stable_and_exact(backend, n, c):
    labels = torch.randint(0, c, (2, 3, n), generator=generator(n), dtype=torch.int32)
    labels[0, 0] = 0  # one giant cluster
    sorted_idx, offsets = (t.cpu() for t in backend.ops.label_sort(*on(backend, labels), c))
    expected_idx, expected_offsets = defs.label_sort_naive(labels, c)
    assert torch.equal(offsets, expected_offsets) and torch.equal(sorted_idx, expected_idx)


def test_label_sort_empty(backend):
    sorted_idx, offsets = backend.ops.label_sort(
        torch.zeros(1, 2, 0, dtype=torch.int32, device=backend.device), 4
    )
    assert sorted_idx.shape == (1, 2, 0) and offsets.tolist() == [[[0] * 5] * 2]


def test_label_sort_refuses(backend):
    labels = torch.full((1, 1, 4), 7, dtype=torch.int32, device=backend.device)
    with pytest.raises(RuntimeError, match="label_sort: num_labels must be at least 1, got 0"):
        backend.ops.label_sort(labels, 0)
    with pytest.raises(RuntimeError, match="label_sort: labels must be int32, got int64"):
        backend.ops.label_sort(labels.long(), 8)
    if backend.name != "cuda":
        with pytest.raises(RuntimeError, match="label_sort: labels must be in 0..6, got 7 at position 0"):
            backend.ops.label_sort(labels, 7)


@pytest.mark.parametrize("dtype", FLOATS, ids=FLOAT_IDS)
@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("n,c", [(1, 3), (700, 13), (2500, 3)])
def test_segment_mean(backend, dtype, dim, n, c):
    x = rows(2, 2, n, dim, dtype=dtype)
    fallback = rows(2, 2, c, dim, seed=1, dtype=dtype)
    labels = torch.randint(0, max(1, c - 1), (2, 2, n), generator=generator(2), dtype=torch.int32)
    sorted_idx, offsets = defs.label_sort_naive(labels, c)
    out = backend.ops.segment_mean(*on(backend, x, sorted_idx, offsets, fallback))
    expected = defs.segment_mean_naive(x, sorted_idx, offsets, fallback)
    assert out.dtype == dtype
    assert_close(
        out, expected, tolerance={torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    )
    assert torch.equal(out[:, :, -1].cpu(), fallback[:, :, -1]), "an empty segment takes the fallback"
    again = backend.ops.segment_mean(*on(backend, x, sorted_idx, offsets, fallback))
    assert torch.equal(out, again), "equal inputs give equal bits"


@pytest.mark.parametrize("dtype", FLOATS, ids=FLOAT_IDS)
@pytest.mark.parametrize("dim", [8, 64, 136, 256])
def test_segment_mean_falls_back_as_a_whole_where_a_column_is_not_finite(backend, dtype, dim):
    x, fallback = rows(1, 2, 90, dim, dtype=dtype), rows(1, 2, 9, dim, seed=1, dtype=dtype)
    labels = (torch.arange(90, dtype=torch.int32) % 9).expand(1, 2, -1).contiguous()
    largest = torch.finfo(dtype).max
    x[0, 0, 0, dim - 1] = torch.nan  # row i is in segment i % 9
    x[0, 0, 10, 3] = torch.inf
    x[0, 1, 2, 0] = -torch.inf
    x[0, 1, [3, 12], 5] = torch.tensor([torch.inf, -torch.inf], dtype=dtype)
    x[0, 1, 4::9, 1] = largest  # in fp16 the sum stays in fp32's range, and the mean in fp16's
    sorted_idx, offsets = defs.label_sort_naive(labels, 9)
    out = backend.ops.segment_mean(*on(backend, x, sorted_idx, offsets, fallback)).cpu()
    expected = defs.segment_mean_naive(x, sorted_idx, offsets, fallback)
    bad = [(0, 0), (0, 1), (1, 2), (1, 3)] + [(1, 4)] * (dtype != torch.float16)
    for h in range(2):
        for c in range(9):
            assert torch.equal(out[0, h, c], fallback[0, h, c]) == ((h, c) in bad), (h, c)
    assert out.isfinite().all()
    scale = torch.where(expected.abs() > 100, expected.abs().double(), 1.0)
    assert_close(
        out / scale,
        expected / scale,
        tolerance={torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype],
    )


def test_segment_mean_hands_out_the_fallback_as_it_is(backend):
    x, fallback = rows(1, 1, 4, 64), torch.full((1, 1, 2, 64), torch.inf)
    labels = torch.zeros(1, 1, 4, dtype=torch.int32)
    out = backend.ops.segment_mean(*on(backend, x, *defs.label_sort_naive(labels, 2), fallback)).cpu()
    assert out[0, 0, 0].isfinite().all() and (out[0, 0, 1] == torch.inf).all()


# --- topk_blocks, topp_blocks -------------------------------------------------------------------------------


def scores_of(*shape, seed=0, ties=False):
    scores = torch.randn(shape, generator=generator(seed)) * 3
    return (scores * 2).round() / 2 if ties else scores


def assert_lists(got, expected):
    counts, lists = (t.cpu() for t in got)
    assert torch.equal(counts, expected[0])
    assert torch.equal(lists, expected[1])


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("per_head", [False, True], ids=["row", "head"])
@pytest.mark.parametrize("keep_row_max", [False, True], ids=["exact", "row_max"])
@pytest.mark.parametrize("nq,nkv", [(1, 1), (7, 33), (40, 100), (3, 1500)])
def test_topk_blocks(backend, ties, per_head, keep_row_max, nq, nkv):
    scores = scores_of(2, 2, nq, nkv, ties=ties)
    total = nq * nkv if per_head else nkv
    for k in {0, 1, total // 3, total - 1, total, total + 5}:
        got = backend.ops.topk_blocks(*on(backend, scores), k, per_head=per_head, keep_row_max=keep_row_max)
        assert_lists(got, defs.topk_blocks_naive(scores, k, per_head=per_head, keep_row_max=keep_row_max))


def test_topk_blocks_ranks_special_values(backend):
    scores = scores_of(1, 1, 4, 9)
    scores[0, 0, 0] = torch.nan
    scores[0, 0, 1, ::2] = torch.inf
    scores[0, 0, 2, :6] = -torch.inf
    scores[0, 0, 3, :4] = torch.tensor([0.0, -0.0, torch.nan, 0.0])
    for per_head in (False, True):
        for k in (1, 3, 8):
            got = backend.ops.topk_blocks(*on(backend, scores), k, per_head=per_head, keep_row_max=True)
            assert_lists(got, defs.topk_blocks_naive(scores, k, per_head=per_head, keep_row_max=True))


def check_topp(backend, scores, p, weights, min_blocks):
    """The kept set is a prefix of the descending order that crosses p, up to rounding at the crossing."""
    kwargs = {"weights": None if weights is None else weights.to(backend.device), "min_blocks": min_blocks}
    counts, lists = (t.cpu() for t in backend.ops.topp_blocks(*on(backend, scores), p, **kwargs))
    keep = defs.mask_from_lists(counts, lists, scores.shape[-1])
    again = defs.lists_from_mask(keep)
    assert torch.equal(again[0], counts) and torch.equal(again[1], lists), "ascending, unique, zero tail"
    mass = defs.block_mass_fractions(scores, weights)
    kept = torch.where(keep, mass, 0.0)
    floor = max(1, min(min_blocks, scores.shape[-1]))
    assert (counts >= floor).all()
    # Prefix: nothing left out is heavier than something kept (fp32 rounding of equal masses aside).
    lightest = torch.where(keep, mass, torch.inf).amin(-1)
    heaviest_out = torch.where(keep, -torch.inf, mass).amax(-1)
    assert (heaviest_out <= lightest * (1 + 1e-5) + 1e-12).all()
    total = mass.sum(-1)
    assert ((kept.sum(-1) > p - 1e-5) | (total == 0) | (counts == scores.shape[-1])).all(), (
        "kept mass exceeds p"
    )
    free = counts > floor
    assert ((kept.sum(-1) - lightest <= p + 1e-5) | ~free).all(), "without the last one it would not"
    return counts


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("nq,nkv", [(1, 1), (5, 40), (9, 300), (2, 1700)])
def test_topp_blocks(backend, weighted, nq, nkv):
    scores = scores_of(2, 2, nq, nkv)
    weights = (
        torch.randint(0, 200, (2, 2, nkv), generator=generator(1), dtype=torch.int32) if weighted else None
    )
    for p in (0.0, 0.5, 0.9, 0.999):
        for min_blocks in (0, 3, nkv // 10):
            check_topp(backend, scores, p, weights, min_blocks)
    counts, _ = backend.ops.topp_blocks(*on(backend, scores), 1.0)
    assert (counts == nkv).all(), "p >= 1 keeps all"


def test_topp_blocks_long_flat_tail_does_not_stall(backend):
    """A bf16 running sum stalls below 0.9 on a Zipf tail and keeps all 1000 clusters (SVG2 spec, 6.5)."""
    mass = 1 / torch.arange(1, 1001).float()
    scores = mass.log()[None, None, None]
    exact = int((mass.double().div(mass.double().sum()).cumsum(0) <= 0.9).sum()) + 1
    counts = check_topp(backend, scores, 0.9, None, 1)
    assert abs(int(counts) - exact) <= 1


def test_topp_blocks_weights_of_zero_sort_last(backend):
    scores = torch.zeros(1, 1, 1, 6)
    scores[..., 2] = 50.0
    weights = torch.tensor([[[5, 5, 0, 5, 5, 5]]], dtype=torch.int32)
    counts, lists = backend.ops.topp_blocks(*on(backend, scores), 0.5, weights=weights.to(backend.device))
    assert lists[0, 0, 0, : int(counts)].tolist() == [0, 1, 3]


def test_topp_blocks_ranks_masses_too_small_for_a_float(backend):
    scores = torch.tensor([0.0, -300.0, -200.0])[None, None, None]
    counts, lists = backend.ops.topp_blocks(*on(backend, scores), 0.5, min_blocks=2)
    assert lists[0, 0, 0, : int(counts)].tolist() == [0, 2]


def test_topp_blocks_nan_and_all_zero_mass(backend):
    scores = scores_of(1, 1, 3, 20)
    scores[0, 0, 0, 4] = torch.nan
    scores[0, 0, 1] = -torch.inf
    counts, lists = (t.cpu() for t in backend.ops.topp_blocks(*on(backend, scores), 0.9, min_blocks=2))
    assert 4 not in lists[0, 0, 0, : int(counts[0, 0, 0])].tolist()
    assert counts[0, 0, 1] == 2


def test_topk_and_topp_refuse(backend):
    (scores,) = on(backend, scores_of(1, 1, 2, 5))
    with pytest.raises(RuntimeError, match="topk_blocks: k must be at least 0, got -1"):
        backend.ops.topk_blocks(scores, -1)
    with pytest.raises(RuntimeError, match="topk_blocks: scores must be float32, got bfloat16"):
        backend.ops.topk_blocks(scores.bfloat16(), 1)
    with pytest.raises(RuntimeError, match="topp_blocks: p must be at least 0, got -0.5"):
        backend.ops.topp_blocks(scores, -0.5)
    with pytest.raises(
        RuntimeError, match="topp_blocks: weights must have one entry for each of the 5 key blocks"
    ):
        backend.ops.topp_blocks(
            scores, 0.5, weights=torch.ones(1, 1, 4, dtype=torch.int32, device=scores.device)
        )


def test_empty_maps(backend):
    for shape in ((1, 2, 0, 5), (1, 2, 3, 0), (0, 2, 3, 4)):
        scores = torch.zeros(shape, device=backend.device)
        for counts, lists in (backend.ops.topk_blocks(scores, 2), backend.ops.topp_blocks(scores, 0.5)):
            assert counts.shape == shape[:3] and lists.shape == shape
            assert shape[3] or (counts == 0).all()


# --- definitions and registration ---------------------------------------------------------------------------


@quick
@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(1, 12))
def test_lists_and_masks_are_inverse(seed, nq, nkv):
    keep = torch.rand(1, 2, nq, nkv, generator=generator(seed)) < 0.4
    assert torch.equal(defs.mask_from_lists(*defs.lists_from_mask(keep), nkv), keep)


@quick
@given(st.integers(0, 2**31), st.integers(1, 90), st.integers(1, 20))
def test_sort_then_mean_is_a_partition(backend, seed, n, c):
    gen = generator(seed)
    labels = torch.randint(0, c, (1, 2, n), generator=gen, dtype=torch.int32)
    sorted_idx, offsets = backend.ops.label_sort(*on(backend, labels), c)
    assert torch.equal(sorted_idx.cpu().sort(-1).values, torch.arange(n, dtype=torch.int32).expand(1, 2, -1))
    x = torch.randn(1, 2, n, 64, generator=gen)
    means = backend.ops.segment_mean(
        *on(backend, x), sorted_idx, offsets, torch.zeros(1, 2, c, 64, device=backend.device)
    )
    sizes = offsets.diff(dim=-1)[..., None]
    assert_close((means * sizes).sum(2).cpu(), x.sum(2), tolerance=1e-5)


OPCHECKS = {
    "permute_rows": lambda: (rows(1, 2, 9, 64), permutation(1, 2, 9)),
    "unpermute_rows": lambda: (rows(1, 2, 9, 64), permutation(1, 1, 9)),
    "mean_pool_blocks": lambda: (rows(1, 2, 300, 64),),
    "kmeans_assign": lambda: (rows(1, 2, 20, 64), rows(1, 2, 4, 64)),
    "label_sort": lambda: (torch.randint(0, 4, (1, 2, 20), dtype=torch.int32), 4),
    "segment_mean": lambda: (
        rows(1, 2, 20, 64), *defs.label_sort_naive(torch.randint(0, 4, (1, 2, 20), dtype=torch.int32), 4), rows(1, 2, 4, 64)
    ),
    "topk_blocks": lambda: (scores_of(1, 2, 5, 9), 3),
    "topp_blocks": lambda: (scores_of(1, 2, 5, 9), 0.7),
    "merge_attention": lambda: (
        rows(1, 2, 9, 64), torch.randn(1, 2, 9), rows(1, 2, 9, 64), torch.randn(1, 2, 9)
    ),
    "rms_norm_rope": lambda: (rows(1, 2, 9, 64), torch.randn(64), *torch.randn(2, 1, 1, 7, 64)),
    "block_mass": lambda: (rows(1, 2, 70, 64), rows(1, 2, 90, 64, seed=1), torch.randn(1, 2, 70)),
    "block_mass_topk": lambda: (rows(1, 2, 70, 64), rows(1, 2, 90, 64, seed=1), torch.randn(1, 2, 70), 2),
}  # fmt: skip


@pytest.mark.parametrize("name", OPCHECKS)
def test_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.vdit, name).default, OPCHECKS[name]())


def forward_args(name):
    """Arguments of an op for the gradient tests, floating ones asking for gradients."""
    if name == "block_sparse_attention":
        one = torch.ones(1, 1, 1, dtype=torch.int32)
        args = (*(rows(1, 2, 20, 64, seed=i) for i in range(3)), one, torch.zeros_like(one)[..., None])
    else:
        args = OPCHECKS[name]()
    return [a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]


def floats_of(result):
    results = result if isinstance(result, tuple | list) else (result,)
    return [t for t in results if t.is_floating_point()]


def test_every_op_is_in_the_lists():
    assert set(OPCHECKS) | {"block_sparse_attention"} == set(defs.OPS)


@pytest.mark.parametrize("name", defs.OPS)
def test_backward_is_refused_with_a_sentence(name):
    args = forward_args(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = getattr(torch.ops.vdit, name)(*args)
        for t in result if isinstance(result, tuple) else (result,):
            # Integers cut the graph, as argmax does.
            assert t.requires_grad == t.is_floating_point()
        for t in floats_of(result):
            with pytest.raises(
                RuntimeError, match=f"^vdit::{name}: it has no backward yet; call it under torch.no_grad"
            ):
                t.sum().backward(retain_graph=True)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            again = getattr(torch.ops.vdit, name)(*args)
        for t, first in zip(floats_of(again), floats_of(result), strict=True):
            assert not t.requires_grad and torch.equal(t, first.detach())


@pytest.mark.filterwarnings("ignore:Error detected in NoBackward")
@pytest.mark.parametrize("name", defs.OPS)
def test_compiles_whole_with_gradients_off_and_refuses_them_on(name):
    args = forward_args(name)
    op = getattr(torch.ops.vdit, name)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: op(*a), fullgraph=True, backend="aot_eager")
    expected = op(*(a.detach() if isinstance(a, torch.Tensor) else a for a in args))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for t, e in zip(floats_of(compiled(*args)), floats_of(expected), strict=True):
                assert torch.equal(t, e)
    # Gradients are on, but nobody asks for any.
    compiled(*(a.detach() if isinstance(a, torch.Tensor) else a for a in args))
    if floats_of(expected):
        with pytest.raises(Exception, match=f"vdit::{name}: it has no backward yet"):
            sum(t.sum() for t in floats_of(compiled(*args))).backward()
    torch._dynamo.reset()


def test_keyword_offsets_reach_the_op_when_gradients_are_asked_for():
    x = rows(1, 2, 30, 64).requires_grad_()
    offsets = torch.tensor([[[0, 7, 30]]], dtype=torch.int32)
    out = torch.ops.vdit.mean_pool_blocks(x, offsets=offsets)
    assert torch.equal(out.detach(), torch.ops.vdit.mean_pool_blocks(x.detach(), offsets=offsets))
    with pytest.raises(RuntimeError, match="mean_pool_blocks: it has no backward yet"):
        out.sum().backward()


def test_planner_compiles_whole_with_dynamic_shapes():
    def plan(x, centroids, scores):
        labels = torch.ops.vdit.kmeans_assign(x, centroids)
        sorted_idx, offsets = torch.ops.vdit.label_sort(labels, centroids.shape[2])
        means = torch.ops.vdit.segment_mean(x, sorted_idx, offsets, centroids)
        pooled = torch.ops.vdit.mean_pool_blocks(x, offsets=offsets)
        lists = torch.ops.vdit.topp_blocks(scores, 0.8, weights=offsets.diff(dim=-1))
        return (
            torch.ops.vdit.permute_rows(x, sorted_idx),
            means,
            pooled,
            *lists,
            *torch.ops.vdit.topk_blocks(scores, 3),
        )

    torch._dynamo.reset()
    compiled = torch.compile(plan, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, c in ((50, 4), (81, 7)):
        args = rows(1, 2, n, 64), rows(1, 2, c, 64, seed=1), scores_of(1, 2, 5, c)
        for got, expected in zip(compiled(*args), plan(*args), strict=True):
            assert torch.equal(got, expected)
