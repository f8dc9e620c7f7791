"""Dual rotation of a layer's input: rotate blocks of channels, deal the channels out anew, rotate again.

Source: LRQ-DiT, arXiv 2508.03485, which takes it from DuQuant (arXiv 2406.01721). Both rotations are found
greedily on calibration rows: at every step the channel that holds the most extreme value is spread evenly over
its block, and the sequence of steps is cut off where the range of the values was smallest. Departures from the
authors' code:

- the channel to spread is the extreme value's channel modulo the block, not its row;
- the random orthogonal factor stands where the even spread survives it, and its seed is fixed;
- channels are dealt to as many piles as there are blocks; the authors' nine agree with that at 1,152 channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .transform import DualRotation

BLOCK = 128
STEPS = 256


def fit_dual_rotation(x: Tensor, *, block: int = BLOCK, steps: int = STEPS, seed: int = 0) -> DualRotation:
    """The dual rotation of a layer from rows of its input, channel scales already applied.

    Neither rotation makes the range of the rows (largest minus smallest value) wider than it was. The same
    rows, settings and seed give the same rotation.

    Args:
        x: ``[rows, C]``, finite, C a multiple of ``block``.
        block: channels that one rotation mixes.
        steps: at most so many greedy steps for each rotation; 0 leaves only the permutation.
        seed: of the random orthogonal factor.

    Raises:
        ValueError: one sentence with what was expected and what came.
    """
    if x.dim() != 2 or not len(x) or not x.isfinite().all():
        raise ValueError(
            f"fit_dual_rotation: x must be finite rows [rows, C] and not empty, got {list(x.shape)} "
            f"with {int((~x.isfinite()).sum())} values that are NaN or Inf"
        )
    if block < 2 or x.shape[1] % block:
        raise ValueError(
            f"fit_dual_rotation: channels must be a multiple of the block of {block}, got {x.shape[1]}; "
            "leave this layer without a rotation"
        )
    x = x.float()
    spread = spreading_matrix(block, seed)
    first, x = greedy_rotation(x, spread, steps)
    permutation = zigzag_permutation(x.abs().amax(0), block)
    second, _ = greedy_rotation(x.index_select(1, permutation), spread, steps)
    return DualRotation(first, permutation, second)


def spreading_matrix(block: int, seed: int | None = 0) -> Tensor:
    """An orthogonal matrix whose row 0 is 1/sqrt(block) everywhere, so that it spreads channel 0 evenly.

    A chain of rotations by two coordinates each, with cosines 1/sqrt(2), 1/sqrt(3), ..., gathers the even row
    last; it changes places with row 0. The other rows are then mixed by a random orthogonal matrix; with None
    for a seed they stay as they are, large along the diagonal.

    Returns:
        fp32 ``[block, block]``, used as ``x @ matrix``.
    """
    matrix = torch.eye(block, dtype=torch.float64)
    for i in range(block - 1):
        cos, sin = 1 / math.sqrt(i + 2), math.sqrt((i + 1) / (i + 2))
        above, below = matrix[i].clone(), matrix[i + 1].clone()
        matrix[i], matrix[i + 1] = cos * above - sin * below, sin * above + cos * below
    matrix = matrix[[block - 1, *range(1, block - 1), 0]]
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(block - 1, block - 1, generator=generator, dtype=torch.float64)
        matrix[1:] = torch.linalg.qr(noise).Q @ matrix[1:]
    return matrix.float()


def greedy_rotation(x: Tensor, spread: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Rotate all blocks by one matrix, again and again, and keep the steps up to the smallest range.

    Every step spreads the channel, counted within its block, that holds the value of largest magnitude.

    Args:
        x: fp32 ``[rows, C]``.
        spread: ``[block, block]`` of :func:`spreading_matrix`.
        steps: how many to try; the best number of them may be 0.

    Returns:
        The matrix of the kept steps, fp32 ``[block, block]``, and x rotated by it.
    """
    block = len(spread)
    rotated = x.reshape(-1, block)
    rotation = torch.eye(block, dtype=torch.float64, device=x.device)
    best = value_range(rotated), rotation
    spread = spread.to(x.device)
    for _ in range(steps):
        channel = int(rotated.abs().argmax()) % block
        step = _exchanged(spread, channel)
        rotated, rotation = rotated @ step, rotation @ step.double()
        now = value_range(rotated)
        if now < best[0]:
            best = now, rotation
    rotation = best[1].float()
    return rotation, (x.reshape(-1, block) @ rotation).view(x.shape)


def _exchanged(matrix: Tensor, channel: int) -> Tensor:
    """With index 0 and ``channel`` swapped among both rows and columns."""
    order = list(range(len(matrix)))
    order[0], order[channel] = channel, 0
    return matrix[order][:, order]


def value_range(x: Tensor) -> float:
    """Largest minus smallest value."""
    low, high = x.aminmax()
    return float(high - low)


def zigzag_permutation(amplitude: Tensor, block: int = BLOCK) -> Tensor:
    """Channels dealt out so that every block gets as many large ones as any other.

    In descending order of amplitude, the channels go to blocks 0, 1, ..., k - 1, then back from k - 1 to 0, and
    so on, with k blocks.

    Args:
        amplitude: ``[C]``, the largest magnitude of each channel; C is a multiple of ``block``.

    Returns:
        int64 ``[C]``: channel i of the dealt row is channel ``permutation[i]`` of the row before.
    """
    order = amplitude.argsort(descending=True, stable=True)
    rounds = order.view(block, -1).clone()
    rounds[1::2] = rounds[1::2].flip(1)
    return rounds.T.reshape(-1)
