"""kmeans_assign against its definition, on every backend."""

from __future__ import annotations

import pytest
import torch
from cases.rows import FLOAT_IDS, FLOATS, on, rows

from vdit_ext.ops import attention as defs

BACKENDS = ("cpu", "emu", "emu_sm90", "cuda")


def check_nearest(labels, x, centroids):
    """Two centroids may be nearest to within fp32 rounding of the scores; anything further off is a mistake."""
    labels = labels.cpu()
    assert labels.dtype == torch.int32 and labels.min() >= 0 and labels.max() < centroids.shape[2]
    distance = torch.cdist(x.double(), centroids.double()).square()
    chosen = distance.gather(-1, labels.long()[..., None])[..., 0]
    assert (chosen - distance.amin(-1)).max() <= 1e-4 * x.shape[-1]


@pytest.mark.parametrize("dtype", FLOATS, ids=FLOAT_IDS)
@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("n,c", [(1, 1), (300, 17), (129, 130), (64, 3)])
def test_kmeans_assign_finds_a_nearest_centroid(backend, dtype, dim, n, c):
    x, centroids = rows(2, 2, n, dim, dtype=dtype), rows(2, 2, c, dim, seed=1, dtype=dtype, layout="bhsd")
    check_nearest(backend.ops.kmeans_assign(*on(backend, x, centroids)), x, centroids)


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=FLOAT_IDS[1:])
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_kmeans_assign_over_many_tiles(backend, dtype, dim):
    """More tiles of rows than thread blocks, and more tiles of centroids than stages."""
    x, centroids = rows(1, 2, 600, dim, dtype=dtype), rows(1, 2, 700, dim, seed=1, dtype=dtype, layout="bhsd")
    check_nearest(backend.ops.kmeans_assign(*on(backend, x, centroids)), x, centroids)


@pytest.mark.parametrize("order", ["rising", "falling"])
def test_kmeans_assign_finds_every_place_of_a_tile(backend, order):
    """Row i's centroid is i, or counted from the end: each column of a tile wins once."""
    # Corners of a cube around the origin have one norm, so that the product decides; bf16 holds them exactly.
    corners = ((torch.arange(256)[:, None] >> torch.arange(8)) & 1) * 2.0 - 1
    x = torch.zeros(1, 1, 256, 64)
    x[0, 0, :, 40:48] = corners
    centroids = x if order == "rising" else x.flip(2)
    labels = backend.ops.kmeans_assign(*on(backend, x.bfloat16(), centroids.bfloat16().contiguous()))
    expected = torch.arange(256, dtype=torch.int32)
    assert torch.equal(labels[0, 0].cpu(), expected if order == "rising" else expected.flip(0))


@pytest.mark.parametrize("dim", [64, 128])
def test_kmeans_assign_takes_any_strides(backend, dim):
    """Rows at odd multiples of 16 bytes, rows at none, and one matrix for all heads."""
    wide = rows(2, 3, 150, dim + 9, dtype=torch.bfloat16)
    centroids = rows(2, 3, 30, dim, seed=1, dtype=torch.bfloat16, layout="bhsd")
    padded = rows(2, 3, 150, dim + 8, dtype=torch.bfloat16)
    for x in (wide[..., 1 : dim + 1], padded[..., 8:], padded[:, :1, :, :dim].expand(-1, 3, -1, -1)):
        check_nearest(backend.ops.kmeans_assign(*on(backend, x, centroids)), x, centroids)
    x = padded[..., :dim]
    same = rows(2, 3, 30, dim + 8, seed=2, dtype=torch.bfloat16, layout="bhsd")[..., :dim]
    check_nearest(backend.ops.kmeans_assign(*on(backend, x, same)), x, same)


def test_kmeans_assign_ties_go_to_the_lowest_index(backend):
    centroids = rows(1, 2, 5, 64, seed=3, layout="bhsd").bfloat16()
    centroids = torch.cat([centroids, centroids, centroids], 2)
    labels = backend.ops.kmeans_assign(*on(backend, rows(1, 2, 200, 64).bfloat16(), centroids))
    assert labels.max() < 5


def test_kmeans_assign_far_from_the_origin(backend):
    """The expanded distance |x|^2 - 2xc + |c|^2 cancels there; the score must not."""
    # Exact in bf16: the centroids differ in one coordinate only, by one step of that size.
    centroids = torch.zeros(1, 1, 8, 64)
    centroids[..., 0] = 64.0
    centroids[0, 0, :, 1] = torch.arange(8.0)
    x = centroids[:, :, [3, 1, 7, 0, 5]].clone()
    labels = backend.ops.kmeans_assign(*on(backend, x.bfloat16(), centroids.bfloat16()))
    assert labels.flatten().tolist() == [3, 1, 7, 0, 5]


def test_kmeans_assign_nan_row_gets_zero_and_harms_nobody(backend):
    x, centroids = rows(1, 1, 70, 64).bfloat16(), rows(1, 1, 9, 64, seed=1, layout="bhsd").bfloat16()
    clean = backend.ops.kmeans_assign(*on(backend, x, centroids)).cpu()
    x[0, 0, 13] = torch.nan
    labels = backend.ops.kmeans_assign(*on(backend, x, centroids)).cpu()
    assert labels[0, 0, 13] == 0
    labels[0, 0, 13] = clean[0, 0, 13]
    assert torch.equal(labels, clean)


def test_kmeans_assign_refuses(backend):
    x = rows(1, 2, 10, 64, dtype=torch.bfloat16)
    for centroids, match in (
        (rows(1, 2, 0, 64).bfloat16(), r"centroids must be \[1, 2, C >= 1, 64\], got \[1, 2, 0, 64\]"),
        (rows(1, 1, 3, 64).bfloat16(), r"centroids must be \[1, 2, C >= 1, 64\], got \[1, 1, 3, 64\]"),
        (rows(1, 2, 3, 64), "centroids must be bfloat16, got float32"),
    ):
        with pytest.raises(RuntimeError, match=match):
            backend.ops.kmeans_assign(*on(backend, x, centroids))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_kmeans_assign_bad_centroid_gets_no_row(backend, bad):
    x, centroids = rows(1, 1, 70, 64).bfloat16(), rows(1, 1, 140, 64, seed=1, layout="bhsd").bfloat16()
    centroids[0, 0, [0, 5, 130], 7] = bad
    labels = backend.ops.kmeans_assign(*on(backend, x, centroids)).cpu()
    assert torch.equal(labels, defs.kmeans_assign_naive(x, centroids))
    assert not torch.isin(labels, torch.tensor([0, 5, 130])).any()


def test_kmeans_assign_infinite_row_goes_to_the_first_centroid_on_its_side(backend):
    x, centroids = rows(1, 1, 3, 64).bfloat16(), rows(1, 1, 200, 64, seed=1, layout="bhsd").bfloat16()
    centroids[0, 0, :150, 9] = -1
    centroids[0, 0, 150:, 9] = 1
    x[0, 0, 1, 9] = torch.inf
    x[0, 0, 2, 9] = -torch.inf
    labels = backend.ops.kmeans_assign(*on(backend, x, centroids)).cpu()
    assert labels[0, 0, 1:].tolist() == [150, 0]
