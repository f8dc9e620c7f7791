"""The dual rotation: lines 7 and 8 of section 9 of LRQ-DiT's specification, then its parts and bad input."""

from __future__ import annotations

import pytest
import torch

from vdit_ext.quant import DualRotation, InputTransform
from vdit_ext.quant.rotation import (
    fit_dual_rotation,
    greedy_rotation,
    spreading_matrix,
    value_range,
    zigzag_permutation,
)

STEPS = 32


def outlier_rows(channels: int = 384, rows: int = 48, seed: int = 0) -> torch.Tensor:
    """Normal rows with three channels of large values of either sign, at fixed places."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, channels, generator=generator)
    for i, size in enumerate((60.0, 100.0, 30.0)):
        x[:, (41 + 97 * i) % channels] *= size
    return x


@pytest.fixture(scope="module", params=[(384, 128), (128, 128), (192, 64)], ids=str)
def fitted(request) -> tuple[torch.Tensor, DualRotation, int]:
    channels, block = request.param
    x = outlier_rows(channels)
    return x, fit_dual_rotation(x, block=block, steps=STEPS), block


# ---------------------------------------------------------------------------------------------------------
# Section 9
# ---------------------------------------------------------------------------------------------------------


def test_lrq_dit_09_07_orthogonal_to_1e_5(fitted):
    """R1 and R2 are orthogonal to 1e-5."""
    _, rotation, block = fitted
    for matrix in (rotation.first, rotation.second):
        assert matrix.dtype == torch.float32 and matrix.shape == (block, block)
        assert (matrix @ matrix.T - torch.eye(block)).abs().max() < 1e-5


def test_lrq_dit_09_07_permutation(fitted):
    """P is a permutation."""
    x, rotation, _ = fitted
    assert rotation.permutation.dtype == torch.int64
    assert torch.equal(rotation.permutation.sort().values, torch.arange(x.shape[1]))


def test_lrq_dit_09_07_product_is_unchanged(fitted):
    """(X m R1 P R2)((W / m) R1 P R2)^T = X W^T to 1e-4 relative, in fp32."""
    x, rotation, _ = fitted
    generator = torch.Generator().manual_seed(1)
    weight = 0.03 * torch.randn(64, x.shape[1], generator=generator)
    mask = weight.abs().amax(0).sqrt() / x.abs().amax(0).sqrt()
    transform = InputTransform(channel_scale=mask, rotation=rotation)
    got = transform.rows(x) @ transform.weight(weight).T
    wanted = x.double() @ weight.double().T
    assert (got - wanted).norm() < 1e-4 * wanted.norm()


@pytest.mark.parametrize("kind", ["outliers", "normal", "one outlier", "constant", "flat"])
def test_lrq_dit_09_08_never_increases_the_range(kind):
    """Greedy rotation never increases max-min relative to identity; where no step helps, it is the identity."""
    x = {
        "outliers": outlier_rows(256),
        "normal": torch.randn(16, 256, generator=torch.Generator().manual_seed(2)),
        "one outlier": torch.zeros(4, 256).index_put((torch.tensor(1), torch.tensor(200)), torch.tensor(9.0)),
        "constant": torch.zeros(3, 256),
        "flat": torch.full((3, 256), 2.0),
    }[kind]
    for steps in (0, 1, STEPS):
        rotation, rotated = greedy_rotation(x, spreading_matrix(128), steps)
        assert value_range(rotated) <= value_range(x)
        if steps == 0 or kind in ("constant", "flat"):
            assert torch.equal(rotation, torch.eye(128)) and torch.equal(rotated, x)
    dual = fit_dual_rotation(x, steps=STEPS)
    assert value_range(dual.rotate(x)) <= value_range(x) + 1e-6


# ---------------------------------------------------------------------------------------------------------
# Beyond it
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [None, 0, 5])
@pytest.mark.parametrize("block", [2, 64, 128])
def test_spreading_matrix_spreads_its_first_channel_evenly(block, seed):
    matrix = spreading_matrix(block, seed)
    torch.testing.assert_close(matrix[0], torch.full((block,), block**-0.5), rtol=0, atol=1e-6)
    assert (matrix @ matrix.T - torch.eye(block)).abs().max() < 1e-5


def test_one_step_spreads_the_extreme_channel():
    """The extreme value's channel counted within its block, as decided, and not its row."""
    x = torch.zeros(5, 384)
    x[3, 128 + 77] = -40.0
    rotation, rotated = greedy_rotation(x, spreading_matrix(128), 1)
    torch.testing.assert_close(rotation[77].abs(), torch.full((128,), 128**-0.5), rtol=0, atol=1e-6)
    torch.testing.assert_close(rotated[3, 128:256].abs(), torch.full((128,), 40 * 128**-0.5))


def test_outliers_are_spread():
    x = outlier_rows()
    dual = fit_dual_rotation(x, steps=STEPS)
    once, _ = greedy_rotation(x, spreading_matrix(128), STEPS)
    blocks = (x.view(-1, 128) @ once).view_as(x)
    assert value_range(blocks) < 0.5 * value_range(x), "the first rotation"
    assert value_range(dual.rotate(x)) < value_range(blocks), "permutation and second rotation"


def test_zigzag_deals_evenly():
    amplitude = torch.arange(12.0)  # channel i has amplitude i
    dealt = zigzag_permutation(amplitude, 4).view(3, 4)
    assert dealt.tolist() == [[11, 6, 5, 0], [10, 7, 4, 1], [9, 8, 3, 2]]


def test_zigzag_keeps_the_order_of_equals():
    assert zigzag_permutation(torch.ones(8), 8).tolist() == list(range(8))


def test_seeded():
    x = outlier_rows()
    first, again, other = (fit_dual_rotation(x, steps=4, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.first, again.first) and torch.equal(first.second, again.second)
    assert torch.equal(first.permutation, again.permutation)
    assert not torch.equal(first.first, other.first)


@pytest.mark.parametrize(
    "x, message",
    [
        (
            torch.zeros(4, 72),
            "channels must be a multiple of the block of 128, got 72; leave this layer without",
        ),
        (torch.zeros(0, 128), r"finite rows \[rows, C\] and not empty, got \[0, 128\]"),
        (torch.zeros(128), r"got \[128\]"),
        (torch.full((2, 128), float("nan")), "with 256 values that are NaN or Inf"),
    ],
)
def test_bad_input(x, message):
    with pytest.raises(ValueError, match=message):
        fit_dual_rotation(x)
