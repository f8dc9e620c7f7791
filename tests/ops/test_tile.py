"""Which tile the CUDA attention kernel runs, as the build reports it."""

from __future__ import annotations

import pytest

from vdit_ext import _C


@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_large_blocks_get_large_tiles_and_small_blocks_small_ones(head_dim):
    large = _C.attention_tile(head_dim, 8192, q_block_size=128)
    small = _C.attention_tile(head_dim, 8192, q_block_size=64)
    assert (large["block_m"], small["block_m"]) == (128, 64)
    assert large["text"].startswith("block_sparse_attention sm80: 128 x ")
    # GPUs of compute capability 8.6, 8.9 and 12.0 have 99 KB an SM.
    assert max(large["smem_bytes"], small["smem_bytes"]) <= 64 * 1024


def test_many_small_clusters_get_small_tiles():
    assert _C.attention_tile(128, 119_056, num_q_clusters=400)["block_m"] == 128
    assert _C.attention_tile(128, 119_056, num_q_clusters=4000)["block_m"] == 64


@pytest.mark.parametrize("head_dim, block_m, stages", [(64, 192, 5), (96, 128, 3), (128, 128, 3)])
def test_compute_capability_90_has_tiles_of_its_own(head_dim, block_m, stages):
    tile = _C.attention_tile(head_dim, 8192, q_block_size=64, compute_capability=90)
    assert (tile["block_m"], tile["stages"]) == (block_m, stages)
    assert tile["text"].startswith(f"block_sparse_attention sm90: {block_m} x ")
    assert tile["smem_bytes"] <= 227 * 1024 and tile["threads"] == 2 * block_m + 128


def test_an_unknown_head_size_is_one_sentence():
    with pytest.raises(RuntimeError, match="head_dim must be 64, 96 or 128, got 80"):
        _C.attention_tile(80, 4096)
