#!/usr/bin/env python
"""A few calls of the attention kernel and nothing else, for a profiler: ``python bench/one_call.py --help``."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT / "tests", ROOT / "bench"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
if importlib.util.find_spec("vdit_ext") is None:
    sys.path.insert(0, str(ROOT / "python"))

import bench_hopper  # noqa: E402
import torch  # noqa: E402

from vdit_ext import ops  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=tuple(bench_hopper.MODELS), default="hunyuan")
    parser.add_argument("--kind", choices=tuple(bench_hopper.KINDS), default="b128")
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--heads", type=int, default=2, help="few, since a profiler runs a kernel many times")
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args(argv)
    model = replace(bench_hopper.MODELS[args.shape], heads=args.heads)
    gen = torch.Generator(args.device).manual_seed(0)
    dtype = torch.bfloat16
    size = 1, model.layout.num_tokens, model.heads, model.dim
    q, k, v = (torch.randn(size, generator=gen, device=args.device).to(dtype).transpose(1, 2) for _ in range(3))
    counts, lists, kwargs = bench_hopper.make_lists(model, args.kind, args.density, gen)
    with torch.inference_mode():
        for _ in range(args.calls):
            out, _ = ops.block_sparse_attention(q, k, v, counts, lists, **kwargs)
    print(f"{args.shape} {args.kind} {args.density:g}: finite {bool(out.isfinite().all())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
