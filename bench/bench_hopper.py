"""The figures of the attention kernels at the real shapes of three video models, against their targets.

One process holds everything that a ratio is made of: our kernel, every dense peer that runs, every sparse peer
that can be installed, and what a method spends on its plan and permutation.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import attention_peers
import bench_attention
import synthetic
import torch
from cases import attention as cases
from figures import tables_of  # noqa: F401  run.py asks the family for it
from harness import Case, Group, Peer
from torch import Tensor

from vdit_ext import ops
from vdit_ext.sparse import SVG2, DraftAttention, TokenLayout
from vdit_ext.sparse.shapes import SHAPES

# Kinds of blocks and the densities they are timed at.
KINDS = {
    "dense": (1.0,),
    "b128": (0.1, 0.2, 0.3, 0.5),
    "b64": (0.1, 0.25, 0.5),
    "variable": (0.1, 0.2, 0.3, 0.5),
}
ITER_INIT = 10  # Lloyd iterations before the timed, warm ones: timing does not need settled centroids


@dataclass(frozen=True)
class Model:
    """One attention layer of a video model.

    Attributes:
        q_clusters, k_clusters: of SVG2, and of the random variable blocks.
        sparsity: of DraftAttention.
    """

    name: str
    layout: TokenLayout
    heads: int
    dim: int
    q_clusters: int
    k_clusters: int
    sparsity: float


def _model(name: str, shape: str, sparsity: float) -> Model:
    tokens, heads, dim, q_clusters, k_clusters = cases.REAL[name]
    layout = SHAPES[shape].layout
    assert layout.num_tokens == tokens, f"{name}: {layout.num_tokens} tokens in {shape}, {tokens} in the cases"
    return Model(name, layout, heads, dim, q_clusters, k_clusters, sparsity)


MODELS = {
    model.name: model
    for model in (
        _model("hunyuan", "hunyuan-t2v-720p", 0.9),
        _model("wan14b", "wan2.1-14b-t2v-720p", 0.75),
        _model("cogvideox", "cogvideox-1.5-5b", 0.75),
    )
}


# ---------------------------------------------------------------------------------------------------------
# Selection
# ---------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", default=",".join(MODELS), help="comma-separated models")
    parser.add_argument("--select", default="", help="regular expression on '<model>_<kind>_rho<density>'")
    parser.add_argument("--dtype", choices=tuple(bench_attention.DTYPES), default="bfloat16")
    parser.add_argument("--peers", choices=("all", "dense"), default="all", help="dense: leave sparse ones out")
    parser.add_argument(
        "--no-flex", action="store_true", help="leave FlexAttention out: it compiles for a while"
    )
    parser.add_argument(
        "--flex-seconds", type=float, default=0.0, help="after this begin no compilation; 0: never"
    )
    add_size_arguments(parser)


def add_size_arguments(parser: argparse.ArgumentParser) -> None:
    for name, what in (
        ("grid", "frames,rows,columns of every model instead of its own, to try things out"),
        ("text", "text tokens, with --grid, of models that have them; default: 8"),
        ("heads", "heads, with --grid; default: 2"),
        ("clusters", "query,key clusters, with --grid; default: 4,8"),
    ):
        parser.add_argument(f"--{name}", default="", help=what)


def models_of(args: argparse.Namespace) -> list[Model]:
    names = args.shapes.split(",")
    if unknown := set(names) - set(MODELS):
        raise SystemExit(
            f"--shapes: expected names among {', '.join(MODELS)}, got {', '.join(sorted(unknown))}"
        )
    return [resized(MODELS[name], args) for name in names]


def resized(model: Model, args: argparse.Namespace) -> Model:
    """The model at the size that the arguments ask for, its own one without them."""
    if not args.grid:
        if args.text or args.heads or args.clusters:
            raise SystemExit("--text, --heads and --clusters are for sizes of your own: give --grid too")
        return model
    grid = tuple(int(size) for size in args.grid.split(","))
    text = int(args.text or 8) if model.layout.text_len else 0
    layout = TokenLayout(grid, text, text_first=model.layout.text_first)
    q_clusters, k_clusters = (int(n) for n in (args.clusters or "4,8").split(","))
    return replace(
        model, layout=layout, heads=int(args.heads or 2), q_clusters=q_clusters, k_clusters=k_clusters
    )


def dtypes_of(args: argparse.Namespace, device: str) -> set[torch.dtype]:
    """The type whose matrix rate is a ceiling in this run."""
    return {bench_attention.DTYPES[args.dtype]}


def groups(args: argparse.Namespace, device: str) -> Iterator[Callable[[], Group]]:
    """Builders of each model's two groups: blocks of every kind, and the plans of the methods."""
    dtype, chosen = bench_attention.DTYPES[args.dtype], re.compile(args.select)
    for model in models_of(args):
        wanted = [
            (kind, density)
            for kind, densities in KINDS.items()
            for density in densities
            if chosen.search(f"{model.name}_{kind}_rho{density:g}")
        ]
        if wanted:
            yield lambda m=model, w=wanted: blocks_group(m, w, dtype, device, args)
        for method in ("svg2", "draft"):
            if chosen.search(f"{model.name}_{method}"):
                yield lambda m=model, n=method: method_group(m, n, dtype, device, args)


# ---------------------------------------------------------------------------------------------------------
# Random blocks
# ---------------------------------------------------------------------------------------------------------


def blocks_group(model: Model, wanted: list[tuple[str, float]], dtype, device: str, args) -> Group:
    """Lists of every kind over one q, k and v."""
    gen = torch.Generator(device).manual_seed(0)
    size = 1, model.layout.num_tokens, model.heads, model.dim
    q, k, v = (torch.randn(size, generator=gen, device=device).to(dtype).transpose(1, 2) for _ in range(3))
    group = Group(f"{model.name} blocks", device, [], dense_peers(q, k, v, device, args))
    dense = list(group.calls)
    for kind, density in wanted:
        made = make_lists(model, kind, density, gen)
        name = f"{model.name}_{kind}_rho{density:g}"
        figure = {"model": model.name, "kind": kind}
        group.cases.append(attention_case(name, figure, (q, k, v), made, group, dense, args))
    return group


def dense_peers(q: Tensor, k: Tensor, v: Tensor, device: str, args) -> dict[str, Callable]:
    calls = attention_peers.dense(q, k, v, device, flex=not args.no_flex)
    if device == "cuda":
        del calls["SDPA x density"]  # torch's own choice among those that are listed by name
    return calls


def make_lists(model: Model, kind: str, density: float, gen: torch.Generator) -> tuple[Tensor, Tensor, dict]:
    """Counts, lists and the op's keyword arguments."""
    tokens, heads = model.layout.num_tokens, model.heads
    if kind == "variable":
        q_offsets = synthetic.uneven_offsets(model.q_clusters, tokens, heads, gen)
        kv_offsets = synthetic.uneven_offsets(model.k_clusters, tokens, heads, gen)
        counts, lists = synthetic.uneven_lists(q_offsets, kv_offsets, density, gen)
        return counts, lists, {"q_offsets": q_offsets, "kv_offsets": kv_offsets, "scale": None}
    block = 64 if kind == "b64" else 128
    num = -(-tokens // block)
    counts, lists = synthetic.uniform_lists(num, num, heads, density, gen)
    return counts, lists, {"q_block_size": block, "kv_block_size": block, "scale": None}


def attention_case(
    name: str, figure: dict, qkv: tuple, made: tuple, group: Group, dense: list[str], args
) -> Case:
    """One call of our kernel against the dense peers at the listed density and the sparse ones as they are."""
    q, k, v = qkv
    counts, lists, kwargs = made
    batch, heads, tokens, dim = q.shape
    pairs = bench_attention.kept_pairs(counts, lists, kwargs, q, k)
    density = pairs / (batch * heads * tokens * k.shape[2])
    check = bench_attention.make_check(q, k, v, counts, lists, kwargs)

    def call():
        return ops.block_sparse_attention(q, k, v, counts, lists, **kwargs)

    exact = check.loosened(4.0) if density == 1 else None
    case = Case("block_sparse_attention", name, q.dtype, call, check)
    case.peers = [Peer(peer, peer, scale=density, check=exact) for peer in dense]
    if args.peers == "all" and figure["kind"] != "dense":
        case.peers += bench_attention.sparse_peers(case, q, k, v, made, group, check, args)
    case.flops, case.exps = 4.0 * dim * pairs, float(pairs)
    # q, k, v read and out written once, the lists, and the log-sum-exps.
    case.nbytes = (
        4 * q.numel() * q.element_size() + (int(counts.sum()) + counts.numel()) * 4 + q[..., 0].numel() * 4
    )
    case.sizes = {
        "figure": figure, "heads": heads, "seqlen_q": tokens, "head_dim": dim, "density": density,
        "kernel": kernel_of(call, group.device),
    }  # fmt: skip
    return case


def kernel_of(call: Callable, device: str) -> str:
    """Which attention kernel a call runs: "cpu", "sm80" or "sm90", as the profiler sees it."""
    if device != "cuda":
        return "cpu"
    try:
        from torch.profiler import ProfilerActivity, profile

        call()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            call()
            torch.cuda.synchronize()
        names = [event.key for event in seen.key_averages() if "BlockSparseAttention" in event.key]
    except Exception:
        names = []
    if names:
        return "sm90" if any("sm90" in name for name in names) else "sm80"
    asked = os.environ.get("VDIT_ATTENTION_KERNEL", "default")
    return f"{asked}, not seen"


# ---------------------------------------------------------------------------------------------------------
# Methods: plan, permutation and attention apart
# ---------------------------------------------------------------------------------------------------------


def method_group(model: Model, name: str, dtype, device: str, args) -> Group:
    """A method's warm plan on structured q and k, what it permutes, and the attention under it."""
    layout = model.layout
    q, k, v = synthetic.video_qkv(layout, model.heads, model.dim, dtype, device)
    method, state = make_method(name, model.q_clusters, model.k_clusters, model.sparsity)
    if name == "draft":
        # The model runs in tile order from its first layer to its last, so its layers permute nothing.
        q, k, v = (in_order(t, method.token_order(layout)) for t in (q, k, v))
    method.plan(q, k, layout, state)
    plan = method.plan(q, k, layout, state).validate(layout.num_tokens, layout.num_tokens)
    moved = permuted(plan, q, k, v)

    group = Group(f"{model.name} {name}", device, [], dense_peers(q, k, v, device, args))
    dense = list(group.calls)
    made = plan.kv_num_blocks, plan.kv_indices, plan_kwargs(plan)
    figure = {"model": model.name, "kind": kind_of(plan), "method": name, "part": "attention"}
    attention = attention_case(f"{model.name}_{name}", figure, moved, made, group, dense, args)
    in_place(attention, plan, q)
    group.cases.append(attention)

    def part(what: str, call: Callable, check: Callable, nbytes: float = 0.0) -> None:
        case = Case(what, f"{model.name}_{name}", dtype, call, check, nbytes=nbytes)
        case.sizes = attention.sizes | {"figure": figure | {"part": what}}
        group.cases.append(case)

    tokens = layout.num_tokens
    part("plan", lambda: method.plan(q, k, layout, state), lambda got: got.validate(tokens, tokens))
    if plan.kv_index is not None:
        traffic = 4 * k.numel() * k.element_size() + 2 * 4 * plan.kv_index.numel()
        part("permute", permutation(plan, k, v), PermutationCheck(plan, k, v), traffic)
    return group


def in_place(case: Case, plan, q: Tensor) -> None:
    """Lets our side of a case over permuted queries take them as they lie, which is what a model's layer does.

    Sparse peers keep the permuted ones, and are spared the permutation.
    """
    if plan.q_index is None:
        return
    moved, (counts, lists, kwargs) = case.check.inputs[:3], case.check.inputs[3:]
    case.call = lambda: ops.block_sparse_attention(q, *moved[1:], counts, lists, q_index=plan.q_index, **kwargs)
    case.sizes["kernel"] = kernel_of(case.call, q.device.type)
    case.check = bench_attention.PermutedCheck(case.check, plan.q_index)


def make_method(name: str, q_clusters: int, k_clusters: int, sparsity: float):
    """A method and its state for one layer, whose log of densities is off: it is not part of a plan."""
    if name == "svg2":
        method = SVG2(num_q_clusters=q_clusters, num_k_clusters=k_clusters, iter_init=ITER_INIT)
    else:
        method = DraftAttention(sparsity=sparsity)
    state = method.new_state(0, 1)
    state.logs_density = False
    if name == "draft":
        state.tokens_permuted = True
    return method, state


def in_order(t: Tensor, order: Tensor) -> Tensor:
    """Rows of ``[B, H, S, D]`` in another order, stored as ``[B, S, H, D]``."""
    return t.transpose(1, 2).index_select(1, order.to(t.device)).transpose(1, 2)


def kind_of(plan) -> str:
    """Which target a plan's blocks fall under."""
    if plan.q_offsets is not None or plan.kv_offsets is not None:
        return "variable"
    return "b128" if plan.q_block_size % 128 == 0 and plan.kv_block_size % 128 == 0 else "b64"


def plan_kwargs(plan) -> dict:
    kwargs: dict = {"scale": None}
    for side in ("q", "kv"):
        offsets = getattr(plan, f"{side}_offsets")
        if offsets is None:
            kwargs[f"{side}_block_size"] = getattr(plan, f"{side}_block_size")
        else:
            kwargs[f"{side}_offsets"] = offsets
    return kwargs


def permuted(plan, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if plan.q_index is not None:
        q = ops.permute_rows(q, plan.q_index)
    if plan.kv_index is not None:
        k, v = ops.permute_rows(k, plan.kv_index), ops.permute_rows(v, plan.kv_index)
    return q, k, v


def permutation(plan, k: Tensor, v: Tensor) -> Callable:
    """What a layer moves for a plan: keys and values. Attention takes queries and leaves results in place."""
    return lambda: (ops.permute_rows(k, plan.kv_index), ops.permute_rows(v, plan.kv_index))


class PermutationCheck:
    """The moved rows are the definition's."""

    def __init__(self, plan, k: Tensor, v: Tensor) -> None:
        self.index, self.inputs = plan.kv_index, (k, v)

    def __call__(self, result) -> None:
        for got, given in zip(result, self.inputs, strict=True):
            wide = self.index.long()[..., None].expand(*given.shape[:2], -1, given.shape[3])
            assert torch.equal(got, given.gather(2, wide)), "permuted rows are not the definition's"
