"""Runs every emulated op over the awkward cases; started by test_sanitized.py in a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cases import attention as cases
from cases import rope as rope_cases


def main(library: str) -> None:
    torch.ops.load_library(library)
    for ops in (torch.ops.vdit_emu, torch.ops.vdit_emu_sm90):
        run_all(ops)
    print("all ran")


def run_all(ops) -> None:
    for case in cases.corner + cases.ragged:
        inputs = cases.make_attention(case, torch.bfloat16)
        out, lse = ops.block_sparse_attention(*inputs.args, **inputs.kwargs)
        ops.merge_attention(out, lse, out, lse)
        x = inputs.k
        ops.mean_pool_blocks(
            x, offsets=inputs.kwargs["kv_offsets"], block_size=inputs.kwargs.get("kv_block_size", 128)
        )
        centroids = x[:, :, : max(1, x.shape[2] // 9)].contiguous()
        labels = ops.kmeans_assign(x, centroids)
        sorted_idx, offsets = ops.label_sort(labels, centroids.shape[2])
        ops.segment_mean(x, sorted_idx, offsets, centroids)
        ops.unpermute_rows(ops.permute_rows(x, sorted_idx), sorted_idx)
        scores = torch.randn(case.batch, case.heads, 5, 1 + x.shape[2] // 3)
        ops.topk_blocks(scores, 7, per_head=True)
        ops.topk_blocks(scores, 2)
        ops.topp_blocks(scores, 0.8, min_blocks=2)
        for block in (64, 50):
            sizes = {"q_block_size": block, "kv_block_size": block}
            ops.block_mass(inputs.q, x, lse, **sizes)
            ops.block_mass_topk(inputs.q, x, lse, 1, **sizes)
        print("ran", ops.name, case.name, flush=True)
    for case in rope_cases.every:
        inputs = rope_cases.make_norm_rope(case, torch.bfloat16)
        ops.rms_norm_rope(*inputs.args, **inputs.kwargs)
        print("ran", ops.name, case.name, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
