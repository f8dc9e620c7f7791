#!/usr/bin/env python
"""What planning must cost at least: ``python bench/plan_cost.py --help``.

Runs the planner's own Python on tensors without memory, notes every op, and calculates for each of them the
FLOPs, the bytes (every tensor read and written once) and the launches, and how long an H200 takes for that at
the best rates known of it. Calculated, not measured: what kernels reach is for bench/run.py on a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT / "tests", ROOT / "bench", ROOT / "python"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from cases.plans import DeviceCall, meta_qkv, warm_plan, watched  # noqa: E402
from machine import KNOWN_GPUS  # noqa: E402
from torch import Tensor  # noqa: E402

from vdit_ext.sparse import SVG2, DraftAttention  # noqa: E402
from vdit_ext.sparse.shapes import SHAPES  # noqa: E402

GPU = "H200"
RATES = KNOWN_GPUS[GPU]
FP32_FLOPS = 2 * 30.9e12  # multiply-adds on the FP32 lanes, without TF32

# Clusters of the shipped scripts; CogVideoX has none and gets the paper's.
MODELS = {
    "hunyuan-t2v-720p": (400, 1000),
    "wan2.1-14b-t2v-720p": (300, 1000),
    "cogvideox-1.5-5b": (100, 500),
}

# Kernels that one call starts on compute capability 9.0, by its launcher in csrc/attention; torch's start one.
LAUNCHES = {
    "vdit::kmeans_assign": 2,  # |c|^2 / 2, then the products
    "vdit::label_sort": 3,
    "vdit::segment_mean": 1,
    "vdit::topp_blocks": 1,
    "vdit::topk_blocks": 9,  # per head
    "vdit::mean_pool_blocks": 1,
    "vdit::permute_rows": 1,
    "vdit::block_sparse_attention": 3,  # the lists as bits, the order of the work, the work
}


@dataclass
class Cost:
    """Of all calls of one op."""

    calls: int = 0
    launches: int = 0
    flops: float = 0.0
    nbytes: float = 0.0
    seconds: float = 0.0  # the sum of the calls' floors

    def add(self, other: Cost) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


def bytes_of(t: Tensor) -> int:
    """What is there to be read, however often a view repeats it."""
    return min(t.numel() * t.element_size(), t.untyped_storage().nbytes())


def cost_of(call: DeviceCall, density: float) -> Cost:
    flops, rate, other_floor = 0.0, RATES["matmul"], 0.0
    if call.name == "vdit::kmeans_assign":
        x, centroids = call.inputs
        flops = 2.0 * x.numel() * centroids.shape[2]
    elif call.name == "aten::bmm":
        a, b = call.inputs
        flops, rate = 2.0 * a.numel() * b.shape[-1], FP32_FLOPS
    elif call.name == "vdit::block_sparse_attention":
        q, k = call.inputs[:2]
        pairs = density * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
        flops, other_floor = 4.0 * pairs * q.shape[3], pairs / RATES["exp"]
    nbytes = float(sum(map(bytes_of, {id(t): t for t in (*call.inputs, *call.outputs)}.values())))
    seconds = max(flops / rate, nbytes / RATES["bandwidth"], other_floor)
    return Cost(1, LAUNCHES.get(call.name, 1), flops, nbytes, seconds)


def costs(method, model: str, density: float) -> tuple[dict[str, Cost], dict[str, Cost]]:
    """Of planning, and of permutation and attention, by op; torch's own ops together."""
    shape = SHAPES[model]
    layout = shape.layout
    with watched() as seen:
        q, k, v = meta_qkv(shape.heads, layout.num_tokens, shape.head_dim)
        seen.calls.clear()  # q, k and v themselves
        # As accelerate() does it: an order that all layers share is put on before the first of them.
        shared_order = method.token_order(layout) is not None
        plan = warm_plan(method, q, k, layout, tokens_permuted=shared_order)
        planned = len(seen.calls)
        plan.attend(q, k, v, return_lse=False)
    return tuple(_by_op(calls, density) for calls in (seen.calls[:planned], seen.calls[planned:]))


def _by_op(calls: list[DeviceCall], density: float) -> dict[str, Cost]:
    by_op: dict[str, Cost] = {}
    for call in calls:
        family, name = call.name.split("::")
        by_op.setdefault(name if family == "vdit" else "torch's ops", Cost()).add(cost_of(call, density))
    return by_op


def report(method, model: str, density: float) -> list[str]:
    shape = SHAPES[model]
    planning, attending = costs(method, model, density)
    attention = attending["block_sparse_attention"].seconds
    lines = [
        f"## {method.name}, {model}: {shape.layout.num_tokens} tokens x {shape.heads} heads x {shape.head_dim}",
        "",
        "| op | calls | launches | GFLOP | MB | floor ms | % of attention |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]

    def row(name: str, c: Cost) -> str:
        share = 100 * c.seconds / attention
        return (
            f"| {name} | {c.calls} | {c.launches} | {c.flops / 1e9:,.0f} | {c.nbytes / 1e6:,.1f} "
            f"| {c.seconds * 1e3:.3f} | {share:.2f} |"
        )

    whole_plan, permuting = Cost(), Cost()
    for name, cost in planning.items():
        lines.append(row(name, cost))
        whole_plan.add(cost)
    lines.append(row("**the plan**", whole_plan))
    for name, cost in attending.items():
        if name == "block_sparse_attention":
            continue
        lines.append(row(name + " around attention", cost))
        permuting.add(cost)
    whole_plan.add(permuting)
    lines.append(row("**plan and permutation**", whole_plan))
    lines.append(row(f"block_sparse_attention at density {density:g}", attending["block_sparse_attention"]))
    return [*lines, ""]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=[*MODELS, "all"], default="all")
    parser.add_argument("--method", choices=("svg2", "draft", "all"), default="all")
    parser.add_argument("--iters", type=int, default=2, help="Lloyd iterations of a warm step (default: 2)")
    parser.add_argument(
        "--sample", type=int, default=1, help="iterations but the last see 1 in so many (default: 1)"
    )
    parser.add_argument("--density", type=float, default=0.25, help="kept share of the pairs (default: 0.25)")
    options = parser.parse_args(argv)
    lines = [
        f"# Floors of planning on an {GPU}, calculated, not measured",
        "",
        f"At {RATES['matmul'] / 1e12:.0f} TFLOP/s (bf16 products), {FP32_FLOPS / 1e12:.1f} (fp32 products), "
        f"{RATES['bandwidth'] / 1e12:.1f} TB/s and {RATES['exp'] / 1e12:.2f}e12 exponentials/s; every tensor",
        "read and written once; launches are counted, not timed. An order that all layers share, as",
        "DraftAttention's, is put on before the first layer and not counted.",
        "",
    ]
    for model in MODELS if options.model == "all" else [options.model]:
        num_q, num_k = MODELS[model]
        methods = {
            "svg2": SVG2(
                num_q_clusters=num_q, num_k_clusters=num_k, iter_step=options.iters, iter_sample=options.sample
            ),
            "draft": DraftAttention(sparsity=1 - options.density),
        }
        for name in methods if options.method == "all" else [options.method]:
            lines += report(methods[name], model, options.density)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
