"""k-means on its own; the iterations' properties are lines 4 and 5 of test_svg2.py."""

from __future__ import annotations

import pytest
import torch
from cases.sparse import tensors
from hypothesis import given, settings
from hypothesis import strategies as st

from vdit_ext import ops
from vdit_ext.ops import attention as defs
from vdit_ext.sparse import SVG2
from vdit_ext.sparse.kmeans import draw_centroids, inertia, kmeans
from vdit_ext.testing import assert_close


def blobs(groups: int, members: int, dim: int = 8, spread: float = 0.01):
    """Well separated groups, ``[1, 2, groups * members, dim]``."""
    generator = torch.Generator().manual_seed(3)
    centers = 10 * torch.randn(1, 2, groups, 1, dim, generator=generator)
    return (centers + spread * torch.randn(1, 2, groups, members, dim, generator=generator)).flatten(2, 3)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 40),
    share=st.floats(0, 1),
    iters=st.integers(1, 4),
    init=st.sampled_from(["random", "kmeans++"]),
    seed=st.integers(0, 99),
)
def test_results_belong_together(rows, share, iters, init, seed):
    (x,) = tensors(2, 2, rows, 8, seed, 1)
    clusters = max(1, round(share * rows))
    found = kmeans(x, clusters, num_iters=iters, init=init, seed=seed)
    assert found.centroids.shape == (2, 2, clusters, 8) and found.offsets.shape == (2, 2, clusters + 1)
    assert torch.equal(found.sizes, torch.nn.functional.one_hot(found.labels.long(), clusters).sum(2).int())
    assert torch.equal(found.sorted_idx.long(), found.labels.argsort(dim=-1, stable=True))
    sums = torch.zeros(2, 2, clusters, 8).scatter_add_(
        2, found.labels.long()[..., None].expand(-1, -1, -1, 8), x
    )
    means = sums / found.sizes.clamp(min=1)[..., None]
    filled = found.sizes > 0
    torch.testing.assert_close(found.centroids[filled], means[filled], atol=1e-5, rtol=1e-5)


def test_random_init_draws_rows_with_replacement():
    (x,) = tensors(2, 3, 20, 8, count=1)
    start = draw_centroids(x, 20, seed=7)
    distances = torch.cdist(start, x.contiguous())
    assert (distances.min(-1).values < 1e-5).all()
    rows = distances.argmin(-1)
    assert (rows[0] == rows[1]).all(), "one draw for the whole batch"
    assert not torch.equal(rows[0, 0], rows[0, 1]), "another for each head"
    assert len(rows[0, 0].unique()) < 20, "with replacement"
    assert torch.equal(start, draw_centroids(x, 20, seed=7))
    assert not torch.equal(start, draw_centroids(x, 20, seed=8))


def test_kmeans_plus_plus_finds_separated_groups():
    x = blobs(6, 15)
    plus = kmeans(x, 6, num_iters=3, init="kmeans++", seed=1)
    assert (plus.sizes == 15).all()
    random = [kmeans(x, 6, num_iters=3, seed=seed) for seed in range(5)]
    total = [float(inertia(x, r.centroids, r.labels).sum()) for r in random]
    assert float(inertia(x, plus.centroids, plus.labels).sum()) <= min(total) * (1 + 1e-6)


def test_fewer_distinct_rows_than_clusters():
    x = torch.ones(1, 1, 12, 8)
    for init in ("random", "kmeans++"):
        found = kmeans(x, 5, num_iters=2, init=init)
        assert found.sizes.tolist() == [[[12, 0, 0, 0, 0]]]
        assert (found.centroids == 1).all()


def test_tolerance_stops_early(monkeypatch):
    x = blobs(4, 10)
    calls, real = [], ops.kmeans_assign
    monkeypatch.setattr(ops, "kmeans_assign", lambda *a: calls.append(1) or real(*a))
    full = kmeans(x, 4, num_iters=20, init="kmeans++")
    assert len(calls) == 20
    calls.clear()
    early = kmeans(x, 4, num_iters=20, init="kmeans++", tolerance=1e-4)
    assert len(calls) < 6 and torch.equal(full.labels, early.labels)


def test_half_precision_and_strided_rows():
    x = blobs(4, 10)
    wide = torch.zeros(1, 40, 2, 20)
    wide[..., 4:12] = x.transpose(1, 2)
    view = wide.transpose(1, 2)[..., 4:12]
    assert torch.equal(kmeans(view, 4, num_iters=3).labels, kmeans(x, 4, num_iters=3).labels)
    for dtype in (torch.float16, torch.bfloat16):
        found = kmeans(x.to(dtype), 4, num_iters=3, init="kmeans++")
        assert found.centroids.dtype == dtype and (found.sizes == 10).all()


BAD_ROWS = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("bad", BAD_ROWS)
@pytest.mark.parametrize("init", ["random", "kmeans++"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_a_bad_row_holds_up_one_cluster_and_no_other(bad, init, dtype):
    x = blobs(6, 15).to(dtype)
    x[0, 1, 40, 3] = bad
    found = kmeans(x, 6, num_iters=50, init=init, seed=3)
    assert found.centroids.isfinite().all()
    assert torch.equal(found.sizes.sum(-1), torch.tensor([[90, 90]], dtype=torch.int32))
    assert torch.equal(found.sorted_idx.sort(-1).values[0, 1], torch.arange(90, dtype=torch.int32))
    # The head without it is what it is without it, and so are this head's clusters that it is not in.
    clean = kmeans(blobs(6, 15).to(dtype), 6, num_iters=50, init=init, seed=3)
    assert torch.equal(found.labels[0, 0], clean.labels[0, 0])
    assert torch.equal(found.centroids[0, 0], clean.centroids[0, 0])
    home = int(found.labels[0, 1, 40])
    good = torch.arange(90) != 40
    for c in range(6):
        members = x[0, 1][(found.labels[0, 1] == c) & good].float()
        if c != home and len(members):
            torch.testing.assert_close(found.centroids[0, 1, c].float(), members.mean(0), atol=0.1, rtol=1e-2)


def test_starting_centroids_are_made_finite():
    x = blobs(4, 10)
    for init in ("random", "kmeans++"):
        assert draw_centroids(torch.full_like(x, torch.nan), 4, init=init).isfinite().all()
    given_ = x[:, :, :4].clone()
    given_[0, 0, 1] = torch.nan
    given_[0, 1, 2, 5] = -torch.inf
    found = kmeans(x, 4, num_iters=3, centroids=given_)
    assert found.centroids.isfinite().all()
    expected = kmeans(x, 4, num_iters=3, centroids=given_.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))
    assert torch.equal(found.labels, expected.labels)


def test_kmeans_plus_plus_never_draws_a_bad_row_for_its_distance():
    x = blobs(6, 15)
    x[:, :, 7] = torch.inf
    x[:, :, 50, 2] = torch.nan
    start = draw_centroids(x, 6, init="kmeans++", seed=1)
    apart = torch.cdist(start, start) + torch.eye(6) * 100
    assert (apart > 1).all(), "each group is drawn once"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16], ids=["fp16", "fp32", "bf16"])
def test_rows_at_the_edge_of_the_dtype(dtype):
    """Sums of such rows leave fp32: the centroids stay finite."""
    x = blobs(6, 15).to(dtype)
    x[0, 1, 38:41] = torch.finfo(dtype).max
    x[0, 1, 41] = -torch.finfo(dtype).max
    for init in ("random", "kmeans++"):
        found = kmeans(x, 8, num_iters=10, init=init, seed=2)
        assert found.centroids.isfinite().all()
        assert (found.sizes.sum(-1) == 90).all()


def test_bad_inputs():
    (x,) = tensors(1, 1, 10, 8, count=1)
    for given_, sentence in [
        (dict(num_clusters=11, num_iters=1), "at most the 10 rows, got 11; ask for fewer clusters"),
        (dict(num_clusters=0, num_iters=1), "at least 1"),
        (dict(num_clusters=2, num_iters=0), "num_iters must be at least 1, got 0"),
        (dict(num_clusters=2, num_iters=1.5), "kmeans: num_iters must be a whole number, got 1.5"),
        (dict(num_clusters=2.0, num_iters=1), "kmeans: num_clusters must be a whole number, got 2.0"),
        (dict(num_clusters=2, num_iters=1, tolerance="0.1"), "kmeans: tolerance must be a number, got '0.1'"),
        (dict(num_clusters=2, num_iters=1, init="far"), "init must be one of random, kmeans"),
        (dict(num_clusters=2, num_iters=1, centroids=x[:, :, :3]), r"centroids must be \[1, 1, 2, 8\]"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            kmeans(x, **given_)


def test_sampled_iterations_end_with_one_over_all_rows():
    """By hand: the first two iterations see rows 0, 3, 6..., the last all of them."""
    x = blobs(6, 15)
    found = kmeans(x, 6, num_iters=3, seed=2, sample=3)
    centroids = draw_centroids(x, 6, seed=2)
    for rows in (x[:, :, ::3], x[:, :, ::3], x):
        labels = defs.kmeans_assign_naive(rows, centroids)
        order, offsets = defs.label_sort_naive(labels, 6)
        centroids = defs.segment_mean_naive(rows, order, offsets, centroids)
    assert torch.equal(found.labels, labels) and torch.equal(found.sorted_idx, order)
    assert_close(found.centroids, centroids)


def test_sampling_fewer_rows_than_the_stride():
    x = blobs(2, 2)
    found = kmeans(x, 2, num_iters=9, sample=100)
    assert found.labels.shape == x.shape[:3] and found.centroids.isfinite().all()


def test_sampling_and_a_tolerance_are_refused_together():
    with pytest.raises(ValueError, match="kmeans: tolerance must be None with sample 4, got 0.1; leave one"):
        kmeans(blobs(2, 5), 2, num_iters=2, sample=4, tolerance=0.1)
    with pytest.raises(ValueError, match="SVG2: tolerance must be None with iter_sample 4, got 0.1"):
        SVG2(iter_sample=4, tolerance=0.1)
