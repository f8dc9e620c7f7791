"""Rectangular tiles of a latent grid: the token order in which each tile is contiguous, and tile boundaries.

Source: DraftAttention, arXiv 2505.14708, Algorithm 1; ragged tiles as section 8 of its specification decides.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .plan import TokenLayout, add_text_index


def count_tiles(grid: tuple[int, int, int], tile: tuple[int, int]) -> int:
    """Number of tiles S of a grid; tiles at the bottom and right edges may be smaller."""
    frames, rows, columns = grid
    return frames * -(-rows // tile[0]) * -(-columns // tile[1])


def tile_offsets(grid: tuple[int, int, int], tile: tuple[int, int], device: torch.device) -> Tensor:
    """Where each tile starts in tile order, int32 ``[1, 1, S+1]``.

    Tiles are numbered frame by frame, then row by row of tiles.
    """
    return _cached(_offsets, grid, tile, device)


def tile_order(layout: TokenLayout, tile: tuple[int, int], device: torch.device) -> Tensor:
    """The permutation of Algorithm 1, int32 ``[1, 1, num_tokens]``.

    Row i of the tiled sequence is token ``order[i]``: tile by tile, and inside a tile row by row. Text tokens
    stay where they are.
    """
    return add_text_index(_cached(_order, layout.grid, tile, device), layout)


def _cached(build, grid, tile, device):
    # A compiled region traces the arithmetic, which folds or fuses; eager code would repeat it at every layer.
    # What a CUDA graph captures is there only from its first replay on: nothing for others to find.
    if torch.compiler.is_compiling() or (
        device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    ):
        return build(grid, tile, device)
    return _cached_build(build, grid, tile, device)


@lru_cache(maxsize=64)
def _cached_build(build, grid, tile, device):
    with torch.inference_mode(False):  # the tensors outlive the caller's mode
        return build(grid, tile, device)


def _tile_starts(grid, tile, device) -> Tensor:
    """First row in tile order of tile (f, i, j), int64 ``[F, rows of tiles, columns of tiles]``."""
    frames, rows, columns = grid
    f = torch.arange(frames, device=device)[:, None, None]
    top = torch.arange(0, rows, tile[0], device=device)[:, None]
    left = torch.arange(0, columns, tile[1], device=device)
    height = (rows - top).clamp(max=tile[0])
    return f * rows * columns + top * columns + left * height


def _offsets(grid, tile, device) -> Tensor:
    frames, rows, columns = grid
    starts = _tile_starts(grid, tile, device).flatten()
    return torch.nn.functional.pad(starts, (0, 1), value=frames * rows * columns).int()[None, None]


def _order(grid, tile, device) -> Tensor:
    frames, rows, columns = grid
    y, x = torch.arange(rows, device=device), torch.arange(columns, device=device)
    i, u, j, v = y // tile[0], y % tile[0], x // tile[1], x % tile[1]
    width = (columns - j * tile[1]).clamp(max=tile[1])
    place = _tile_starts(grid, tile, device)[:, i][:, :, j] + u[:, None] * width + v
    place = place.flatten()
    raster = torch.arange(frames * rows * columns, device=device)
    return torch.empty_like(raster).scatter(0, place, raster).int()[None, None]
