"""Runs every emulated op over the awkward cases; started by test_sanitized.py in a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cases import attention as cases
from cases import linear as linear_cases
from cases import rope as rope_cases
from cases import vq as vq_cases


def main(library: str) -> None:
    torch.ops.load_library(library)
    for case in cases.corner + cases.ragged:
        inputs = cases.make_attention(case, torch.bfloat16)
        for ops in (torch.ops.vdit_emu, torch.ops.vdit_emu_sm90):
            run_ops_of_both(ops, inputs)
        run_other_ops(torch.ops.vdit_emu, case, inputs)
        print("ran", case.name, flush=True)
    for case in rope_cases.every:
        inputs = rope_cases.make_norm_rope(case, torch.bfloat16)
        torch.ops.vdit_emu.rms_norm_rope(*inputs.args, **inputs.kwargs)
        print("ran", case.name, flush=True)
    for case in linear_cases.every_rows:
        inputs = linear_cases.make_rows(case, torch.bfloat16)
        torch.ops.vdit_emu.quantize_rows(inputs.x, **inputs.kwargs)
        print("ran", case.name, flush=True)
    for case in (*linear_cases.every, LARGE):
        for ops in (torch.ops.vdit_emu, torch.ops.vdit_emu_sm90):
            run_products(ops, case)
        print("ran", case.name, flush=True)
    for case in (c for c in vq_cases.corner + vq_cases.epilogues if c.cuda):
        for ops in (torch.ops.vdit_emu, torch.ops.vdit_emu_sm90):
            run_vq_ops(ops, case)
        print("ran", case.name, flush=True)
    print("all ran")


# The largest tile of compute capability 8.0, with steps of k for each of its stages.
LARGE = linear_cases.LinearCase("large", (300,), 400, 120, zero=True, bias=True, gate="s", residual="dense")


def run_products(ops, case) -> None:
    """Every weight format by every path."""
    for format in linear_cases.FORMATS:
        inputs = linear_cases.make_linear(case, format)
        for path in ({},) if format == "int8" else ({"path": "fused"}, {"path": "expand"}):
            getattr(ops, inputs.op)(*inputs.args, **inputs.kwargs, **path)


def few_rows(x):
    return x[:, :, : max(1, x.shape[2] // 9)].contiguous()


def run_ops_of_both(ops, inputs) -> None:
    """The ops with kernels of their own for compute capability 9.0."""
    _, lse = ops.block_sparse_attention(*inputs.args, **inputs.kwargs)
    ops.kmeans_assign(inputs.k, few_rows(inputs.k))
    for block in (64, 50):
        sizes = {"q_block_size": block, "kv_block_size": block}
        ops.block_mass(inputs.q, inputs.k, lse, **sizes)
        ops.block_mass_topk(inputs.q, inputs.k, lse, 1, **sizes)


def run_other_ops(ops, case, inputs) -> None:
    x, out, lse = inputs.k, inputs.q, torch.randn(inputs.q.shape[:3])
    ops.merge_attention(out, lse, out, lse)
    ops.mean_pool_blocks(
        x, offsets=inputs.kwargs["kv_offsets"], block_size=inputs.kwargs.get("kv_block_size", 128)
    )
    centroids = few_rows(x)
    labels = ops.kmeans_assign(x, centroids)
    sorted_idx, offsets = ops.label_sort(labels, centroids.shape[2])
    ops.segment_mean(x, sorted_idx, offsets, centroids)
    ops.unpermute_rows(ops.permute_rows(x, sorted_idx), sorted_idx)
    scores = torch.randn(case.batch, case.heads, 5, 1 + x.shape[2] // 3)
    ops.topk_blocks(scores, 7, per_head=True)
    ops.topk_blocks(scores, 2)
    ops.topp_blocks(scores, 0.8, min_blocks=2)


def run_vq_ops(ops, case) -> None:
    for dim, dtype, path in (
        (4, torch.bfloat16, "fused"),
        (2, torch.float16, "expand"),
        (2, torch.int8, "fused"),
    ):
        inputs = vq_cases.make_linear(case, dim, dtype)
        ops.vq_linear(*inputs.args, **inputs.kwargs, path=path)
        ops.vq_dequantize(inputs.codes, inputs.codebook, case.n, case.k)
    ops.vq_assign(torch.randn(130 + case.n, 3), torch.randn(1 + case.k, 3), 1)
    ops.vq_assign(torch.randn(1 + case.n, 8), torch.randn(600, 8), 3)


if __name__ == "__main__":
    main(sys.argv[1])
