"""The attention family's cases for check_cuda.py: CUDA kernels against the CPU kernels and the definitions."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import check_common
import torch
from cases import attention as cases
from cases import mass as mass_cases
from cases import rope as rope_cases
from check_common import same, short_name
from torch import Tensor

from vdit_ext.ops import attention as defs
from vdit_ext.sparse import SVG1, SVG2, DraftAttention, TokenLayout
from vdit_ext.testing import TOLERANCE, assert_close, generator

OPS = (
    *defs.OPS,
    "plan",
    "cuda_graph",
    "stream",
)
Named = tuple[str, Callable[[], None]]


class Backend(check_common.Backend):
    definitions = defs


def named_cases(op: str, large: bool, backend: Backend) -> Iterator[Named]:
    """Name and check of every case of an op; a check raises AssertionError with what is wrong."""
    return globals()[f"{op}_cases"](backend, large)


def rows(*shape, seed=0, dtype=torch.float32) -> Tensor:
    """[B, H, S, D] stored as [B, S, H, D], as models have it."""
    b, h, s, d = shape
    return torch.randn(b, s, h, d, generator=generator(seed)).to(dtype).transpose(1, 2)


def permutation(b: int, h: int, n: int, seed: int = 0) -> Tensor:
    return torch.rand(b, h, n, generator=generator(seed)).argsort(-1).int()


# ---------------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------------


def block_sparse_attention_cases(backend: Backend, large: bool) -> Iterator[Named]:
    for case in cases.correctness:
        for dtype in backend.dtypes(attention=True):
            yield f"{case} {short_name(dtype)}", lambda c=case, t=dtype: check_attention(backend, c, t)
    if backend.name == "cuda":
        for case in cases.perf(4096, 4):
            yield f"{case} S=4096 bf16", lambda c=case: check_rows(backend, c)
        yield "two runs give equal bits", lambda: check_repeatable(backend)
        if large:
            yield "over_2e31_elements", lambda: check_huge(backend)


def check_attention(backend: Backend, case, dtype) -> None:
    inputs = cases.make_attention(case, dtype)
    out, lse = backend.run("block_sparse_attention", *inputs.args, **inputs.kwargs)
    assert out.dtype == dtype and lse.dtype == torch.float32, f"dtypes are {out.dtype} and {lse.dtype}"
    scale = case.head_dim**-0.5 if case.scale is None else abs(case.scale)
    logits = (inputs.q.float() @ inputs.k.float().transpose(-1, -2)).abs().max() if inputs.q.numel() else 0.0
    tolerance = TOLERANCE[dtype] + float(logits) * scale * 2**-23
    expected = [("CPU", backend.expected("block_sparse_attention", *inputs.args, **inputs.kwargs))]
    expected += [("definition", defs.block_sparse_attention_naive(*inputs.args, **inputs.kwargs))]
    for name, (expected_out, expected_lse) in expected:
        assert_close(out, expected_out, tolerance=tolerance, what=f"out against the {name}")
        assert_close(lse, expected_lse, tolerance=1e-5, what=f"lse against the {name}")


def check_rows(backend: Backend, case) -> None:
    """A longer sequence, against sampled rows in fp64."""
    from bench_attention import make_check, make_lists, make_qkv

    q, k, v = make_qkv(case, torch.bfloat16, backend.device)
    counts, lists, kwargs = make_lists(case, backend.device)
    result = backend.ops.block_sparse_attention(q, k, v, counts, lists, **kwargs)
    make_check(q, k, v, counts, lists, kwargs)(result)


def check_repeatable(backend: Backend) -> None:
    inputs = cases.make_attention(cases.ragged[4], torch.bfloat16)
    first = backend.run("block_sparse_attention", *inputs.args, **inputs.kwargs)
    for _ in range(20):
        again = backend.run("block_sparse_attention", *inputs.args, **inputs.kwargs)
        same(again[0], first[0], "out")
        same(again[1], first[1], "lse")


def check_huge(backend: Backend) -> None:
    """Offsets beyond 32 bits: 24 heads of 128 over 700,000 tokens, four key blocks a query block."""
    from bench_attention import make_check

    heads, tokens = 24, 720_000
    gen = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(1, tokens, heads, 128, generator=gen, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for _ in range(3)
    )
    assert q.numel() > 2**31
    blocks = tokens // 128
    counts = torch.full((1, heads, blocks), 4, device="cuda", dtype=torch.int32)
    lists = torch.randint(blocks, (1, heads, blocks, 4), generator=gen, device="cuda", dtype=torch.int32)
    lists[..., 0] = blocks - 1
    out, lse = backend.ops.block_sparse_attention(q, k, v, counts, lists)
    kwargs = {"q_block_size": 128, "kv_block_size": 128}
    make_check(q, k, v, counts, lists, kwargs)((out, lse))


def merge_attention_cases(backend: Backend, large: bool) -> Iterator[Named]:
    for dtype in backend.dtypes():
        for shape in ((1, 2, 1, 64), (2, 3, 77, 96), (1, 4, 1000, 128)):

            def run(t=dtype, s=shape):
                lse = [torch.randn(s[:3], generator=generator(i)) for i in (5, 6)]
                lse[0][..., ::3] = -torch.inf
                lse[1][..., ::2] = -torch.inf
                args = rows(*s, seed=1, dtype=t), lse[0], rows(*s, seed=2, dtype=t), lse[1]
                got = backend.run("merge_attention", *args)
                for g, e, what in zip(
                    got, backend.expected("merge_attention", *args), ("out", "lse"), strict=True
                ):
                    assert_close(g, e, tolerance=TOLERANCE[t] + 1e-5, what=what)

            yield f"{shape} {short_name(dtype)}", run


# ---------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------


def permute_rows_cases(backend: Backend, large: bool, op: str = "permute_rows") -> Iterator[Named]:
    for dtype in (*backend.dtypes(), torch.int8, torch.float64):
        for dim in (1, 3, 64, 96, 128):
            for shared in (False, True):

                def run(t=dtype, d=dim, shared=shared):
                    x = rows(2, 3, 177, d).mul(50).to(t)
                    index = permutation(1, 1, 177) if shared else permutation(2, 3, 177)
                    same(backend.run(op, x, index), backend.expected(op, x, index), op)

                yield f"D={dim} {short_name(dtype)} {'shared' if shared else 'per head'} index", run
    if large and backend.name == "cuda":
        yield "over_2e31_elements", lambda: check_huge_permutation(backend, op)


def unpermute_rows_cases(backend: Backend, large: bool) -> Iterator[Named]:
    yield from permute_rows_cases(backend, large, "unpermute_rows")


def check_huge_permutation(backend: Backend, op: str) -> None:
    x = torch.empty(1, 720_000, 24, 128, device="cuda", dtype=torch.bfloat16).normal_().transpose(1, 2)
    index = torch.randperm(720_000, device="cuda", dtype=torch.int32)[None, None]
    got = getattr(backend.ops, op)(x, index)
    some = torch.randint(720_000, (4096,), device="cuda")
    there = index[0, 0, some].long()
    left, right = (
        (got[:, :, some], x[:, :, there]) if op == "permute_rows" else (got[:, :, there], x[:, :, some])
    )
    assert torch.equal(left, right), "rows far into the tensor differ"


def mean_pool_blocks_cases(backend: Backend, large: bool) -> Iterator[Named]:
    for dtype in backend.dtypes():
        for dim in (64, 96, 128):
            for length, block in ((1, 128), (128, 128), (333, 64), (257, 1), (50, 100), (4000, 128)):

                def run(t=dtype, d=dim, n=length, b=block):
                    x = rows(2, 3, n, d, dtype=t)
                    got = backend.run("mean_pool_blocks", x, block_size=b)
                    assert_close(got, backend.expected("mean_pool_blocks", x, block_size=b), tolerance=3e-6)

                yield f"S={length} D={dim} block {block} {short_name(dtype)}", run

        def variable(t=dtype):
            x = rows(2, 3, 500, 64, dtype=t)
            cuts = torch.randint(0, 501, (2, 3, 12), generator=generator(1)).sort(-1).values.int()
            ends = torch.full((2, 3, 1), 500, dtype=torch.int32)
            offsets = torch.cat([torch.zeros_like(ends), cuts, ends], -1)
            got = backend.run("mean_pool_blocks", x, offsets=offsets)
            assert_close(got, backend.expected("mean_pool_blocks", x, offsets=offsets), tolerance=3e-6)

        yield f"variable {short_name(dtype)}", variable


# ---------------------------------------------------------------------------------------------------------
# Norm and rotary embedding
# ---------------------------------------------------------------------------------------------------------

ONE_ROUNDING = {torch.float32: 2e-6, torch.float16: 2**-11 + 2e-6, torch.bfloat16: 2**-8 + 2e-6}


def rms_norm_rope_cases(backend: Backend, large: bool) -> Iterator[Named]:
    for case in rope_cases.every:
        for dtype in backend.dtypes():

            def run(c=case, t=dtype):
                inputs = rope_cases.make_norm_rope(c, t)
                got = backend.run("rms_norm_rope", *inputs.args, **inputs.kwargs)
                expected = defs.rms_norm_rope_naive(inputs.x.double(), *inputs.args[1:], **inputs.kwargs)
                assert_close(got, expected, tolerance=ONE_ROUNDING[t])
                index = inputs.kwargs.pop("index", None)
                if index is not None:
                    straight = backend.run("rms_norm_rope", *inputs.args, **inputs.kwargs)
                    same(got, defs.permute_rows_naive(straight.cpu(), index), "in another order")

            yield f"{case} {short_name(dtype)}", run
    if backend.name == "cuda":
        yield "an index per head in a CUDA graph, replayed", lambda: check_norm_rope_graph(backend)
        if large:
            for lead in ((1, 1), (1, 24)):
                yield f"over_2e31_elements index {list(lead)}", lambda n=lead: check_huge_norm_rope(backend, n)


def check_norm_rope_graph(backend: Backend) -> None:
    x = rows(1, 3, 500, 128, dtype=torch.bfloat16).cuda()
    index = permutation(1, 3, 500).cuda()
    expected = backend.ops.rms_norm_rope(x, index=index)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = backend.ops.rms_norm_rope(x, index=index)
    for _ in range(3):
        captured.zero_()
        graph.replay()
        same(captured, expected, "the replay")


def check_huge_norm_rope(backend: Backend, lead: tuple[int, int]) -> None:
    tokens, heads = 720_000, 24
    x = torch.empty(1, tokens, heads, 128, device="cuda", dtype=torch.bfloat16).normal_().transpose(1, 2)
    assert x.numel() > 2**31
    cos, sin = torch.rand(2, 1, 1, tokens, 128, device="cuda")
    index = torch.rand(*lead, tokens, device="cuda").argsort(-1).int()
    got = backend.ops.rms_norm_rope(x, None, cos, sin, index=index)
    some = torch.tensor([0, tokens // 2, tokens - 1], device="cuda")
    for h in (0, heads - 1):
        there = index[0, h % lead[1], some].long()
        parts = (t[:, :, there] for t in (x[:, h : h + 1], cos, sin))
        part, c, s = (t.cpu() for t in parts)
        expected = defs.rms_norm_rope_naive(part, None, c, s)
        assert_close(got[:, h : h + 1, some], expected, tolerance=2**-8, what=f"rows of head {h}")


# ---------------------------------------------------------------------------------------------------------
# Clustering
# ---------------------------------------------------------------------------------------------------------


def kmeans_assign_cases(backend: Backend, large: bool) -> Iterator[Named]:
    for dtype in backend.dtypes():
        for dim in (64, 96, 128):
            for n, c in ((1, 1), (300, 17), (129, 130), (64, 3), (5000, 1000)):

                def run(t=dtype, d=dim, n=n, c=c):
                    x = rows(1, 2, n, d, dtype=t)
                    centroids = rows(1, 2, c, d, seed=1, dtype=t).contiguous()
                    labels = backend.run("kmeans_assign", x, centroids).cpu()
                    assert int(labels.min()) >= 0 and int(labels.max()) < c, "labels out of range"
                    distance = torch.cdist(x.double(), centroids.double()).square()
                    chosen = distance.gather(-1, labels.long()[..., None])[..., 0]
                    worst = float((chosen - distance.amin(-1)).max())
                    # Two centroids may be nearest to within fp32 rounding of the scores.
                    assert worst <= 1e-4 * d, (
                        f"a centroid was chosen that is {worst:.3g} farther than the nearest"
                    )

                yield f"N={n} C={c} D={dim} {short_name(dtype)}", run

    def nan_row():
        x, centroids = rows(1, 1, 70, 64).bfloat16(), rows(1, 1, 9, 64, seed=1).bfloat16().contiguous()
        clean = backend.run("kmeans_assign", x, centroids).cpu()
        x[0, 0, 13] = torch.nan
        labels = backend.run("kmeans_assign", x, centroids).cpu()
        clean[0, 0, 13] = 0
        same(labels, clean, "labels beside a row of NaN")

    yield "a row of NaN", nan_row


def label_sort_cases(backend: Backend, large: bool) -> Iterator[Named]:
    for n, c in ((0, 4), (1, 1), (1, 500), (1000, 1), (777, 31), (3000, 257), (64, 1000), (20_000, 1000)):

        def run(n=n, c=c):
            labels = torch.randint(0, c, (2, 3, n), generator=generator(n), dtype=torch.int32)
            labels[0, 0] = 0  # one giant cluster
            got = backend.run("label_sort", labels, c)
            for g, e, what in zip(
                got, backend.expected("label_sort", labels, c), ("sorted_idx", "offsets"), strict=True
            ):
                same(g, e, what)

        yield f"N={n} labels {c}", run


def segment_mean_cases(backend: Backend, large: bool) -> Iterator[Named]:
    tolerance = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
    for dtype in backend.dtypes():
        for dim in (64, 96, 128):
            for n, c in ((1, 3), (700, 13), (2500, 3), (5000, 1000)):

                def run(t=dtype, d=dim, n=n, c=c):
                    x, fallback = rows(2, 2, n, d, dtype=t), rows(2, 2, c, d, seed=1, dtype=t)
                    labels = torch.randint(
                        0, max(1, c - 1), (2, 2, n), generator=generator(2), dtype=torch.int32
                    )
                    args = x, *defs.label_sort_naive(labels, c), fallback
                    got = backend.run("segment_mean", *args)
                    assert_close(got, backend.expected("segment_mean", *args), tolerance=tolerance[t])
                    same(backend.run("segment_mean", *args), got, "a second run")

                yield f"N={n} C={c} D={dim} {short_name(dtype)}", run

    def bad_row():
        x, fallback = (
            rows(1, 2, 900, 128, dtype=torch.bfloat16),
            rows(1, 2, 7, 128, seed=1, dtype=torch.bfloat16),
        )
        x[0, 1, 40, 100] = torch.nan
        labels = torch.randint(0, 7, (1, 2, 900), generator=generator(2), dtype=torch.int32)
        args = x, *defs.label_sort_naive(labels, 7), fallback
        got, c = backend.run("segment_mean", *args).cpu(), int(labels[0, 1, 40])
        same(got[0, 1, c], fallback[0, 1, c], "the segment with the NaN")
        assert_close(got, backend.expected("segment_mean", *args), tolerance=8e-3)

    yield "a NaN in a row", bad_row


# ---------------------------------------------------------------------------------------------------------
# Selection
# ---------------------------------------------------------------------------------------------------------


def scores_of(*shape, ties: bool = False) -> Tensor:
    scores = torch.randn(shape, generator=generator(0)) * 3
    return (scores * 2).round() / 2 if ties else scores


def topk_blocks_cases(backend: Backend, large: bool) -> Iterator[Named]:
    for nq, nkv in ((1, 1), (7, 33), (40, 100), (3, 1500), (300, 1000)):
        for per_head in (False, True):
            total = nq * nkv if per_head else nkv
            for k in sorted({0, 1, total // 3, total - 1, total + 5}):
                for ties in (False, True):

                    def run(shape=(2, 2, nq, nkv), k=k, per_head=per_head, ties=ties):
                        scores = scores_of(*shape, ties=ties)
                        scores[..., 0, :] = torch.nan
                        got = backend.run("topk_blocks", scores, k, per_head=per_head)
                        expected = backend.expected("topk_blocks", scores, k, per_head=per_head)
                        same(got[0], expected[0], "kv_num_blocks")
                        same(got[1], expected[1], "kv_indices")

                    yield f"{nq}x{nkv} k={k}{' per head' if per_head else ''}{' ties' if ties else ''}", run


def topp_blocks_cases(backend: Backend, large: bool) -> Iterator[Named]:
    for nq, nkv in ((1, 1), (5, 40), (9, 300), (2, 1700), (300, 1000)):
        for p in (0.0, 0.5, 0.9, 0.999, 1.0):
            for weighted in (False, True):

                def run(shape=(2, 2, nq, nkv), p=p, weighted=weighted):
                    check_topp(backend, shape, p, weighted)

                yield f"{nq}x{nkv} p={p}{' weighted' if weighted else ''}", run


def check_topp(backend: Backend, shape, p: float, weighted: bool) -> None:
    """The kept set is the prefix of the descending order that crosses p, up to rounding at the crossing."""
    scores = scores_of(*shape)
    nkv, least = shape[-1], max(1, shape[-1] // 10)
    weights = (
        torch.randint(0, 200, (2, 2, nkv), generator=generator(1), dtype=torch.int32) if weighted else None
    )
    counts, lists = (t.cpu() for t in backend.run("topp_blocks", scores, p, weights=weights, min_blocks=least))
    if p >= 1:
        assert bool((counts == nkv).all()), "p >= 1 must keep every block"
        return
    keep = defs.mask_from_lists(counts, lists, nkv)
    again = defs.lists_from_mask(keep)
    assert torch.equal(again[0], counts) and torch.equal(again[1], lists), (
        "lists are not ascending, unique, zero-tailed"
    )
    mass = defs.block_mass_fractions(scores, weights)
    kept = torch.where(keep, mass, 0.0).sum(-1)
    lightest = torch.where(keep, mass, torch.inf).amin(-1)
    heaviest_out = torch.where(keep, -torch.inf, mass).amax(-1)
    assert bool((counts >= least).all()), "fewer than min_blocks were kept"
    assert bool((heaviest_out <= lightest * (1 + 1e-5) + 1e-12).all()), (
        "a lighter block was kept than one left out"
    )
    assert bool(((kept > p - 1e-5) | (mass.sum(-1) == 0) | (counts == nkv)).all()), (
        "the kept mass does not exceed p"
    )
    assert bool(((kept - lightest <= p + 1e-5) | (counts <= least)).all()), "a block more than needed was kept"


# ---------------------------------------------------------------------------------------------------------
# Block masses
# ---------------------------------------------------------------------------------------------------------


def block_mass_cases(backend: Backend, large: bool) -> Iterator[Named]:
    for case in mass_cases.correctness:
        for dtype in backend.dtypes(attention=True):

            def run(c=case, t=dtype):
                args = mass_cases.make_mass(c, t)
                got = backend.run("block_mass", *args, **c.kwargs)
                for expected in (defs.block_mass_naive, torch.ops.vdit.block_mass):
                    mass_cases.assert_masses(got, expected(*args, **c.kwargs), *args)
                same(backend.run("block_mass", *args, **c.kwargs), got, "a second run")

            yield f"{case} {short_name(dtype)}", run


def block_mass_topk_cases(backend: Backend, large: bool) -> Iterator[Named]:
    listed = list(mass_cases.correctness)
    if backend.name != "emu":  # where 9000 steps take minutes
        listed.append(
            mass_cases.MassCase("row_of_9000_blocks", heads=1, seqlen_q=40, seqlen_kv=9000, kv_block=1)
        )
    for case in listed:

        def run(c=case):
            args = mass_cases.make_mass(c, torch.bfloat16)
            mass = backend.run("block_mass", *args, **c.kwargs).cpu()
            nkv = mass.shape[-1]
            forced = torch.rand(nkv, generator=generator(1)) < 0.2
            for k_max in sorted({0, 1, nkv // 3, nkv}):
                got = backend.run("block_mass_topk", *args, k_max, forced=forced, **c.kwargs)
                expected = defs.heaviest_blocks(mass, k_max, forced)
                for g, e, what in zip(got[:2], expected[:2], ("indices", "mass"), strict=True):
                    same(g, e, what)
                torch.testing.assert_close(got[2].cpu(), expected[2], rtol=1e-6, atol=0)

        yield f"{case}", run


# ---------------------------------------------------------------------------------------------------------
# What only a GPU has: work that runs behind the host, graphs and streams
# ---------------------------------------------------------------------------------------------------------


def plan_cases(backend: Backend, large: bool) -> Iterator[Named]:
    if backend.name != "cuda":
        return
    for text in (0, 20):
        layout = TokenLayout((4, 12, 20), text, 7 if text else None)
        for name, method in (
            ("svg2", SVG2(num_q_clusters=20, num_k_clusters=50, iter_init=4)),
            ("draft", DraftAttention(tile=(4, 4))),
            ("draft code ragged", DraftAttention(tile=(5, 7), parity="code", same_frame=True)),
            ("svg1", SVG1(block_size=64, num_samples=16)),
        ):
            yield (
                f"{name} waits for nothing, {text} text tokens",
                lambda m=method, t=layout: check_no_wait(m, t),
            )


def check_no_wait(method, layout) -> None:
    """A warm plan never waits for the device: torch raises where it would."""
    q, k, v = (rows(1, 2, layout.num_tokens, 64, seed=s, dtype=torch.bfloat16).to("cuda") for s in (0, 1, 2))
    values = {"v": v} if getattr(method, "wants_values", False) else {}
    state = method.new_state(0, 1)
    for _ in range(2):
        method.plan(q, k, layout, state, **values)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            plan = method.plan(q, k, layout, state, **values)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    plan.validate(layout.num_tokens, layout.num_tokens)
    assert bool(plan.attend(q, k, v)[0].isfinite().all()), "the output is not finite"


def whole_plan(backend: Backend):
    """One k-means iteration, selection, permutation and attention: a function of device tensors."""
    q, k, v = (rows(1, 2, 1000, 64, seed=s, dtype=torch.bfloat16).to(backend.device) for s in (0, 1, 2))
    centroids = q[:, :, :20].contiguous(), k[:, :, :50].contiguous()
    ops = backend.ops

    def cluster(x, c):
        index, offsets = ops.label_sort(ops.kmeans_assign(x, c), c.shape[2])
        return index, offsets, ops.segment_mean(x, index, offsets, c)

    def run():
        qi, qo, qc = cluster(q, centroids[0])
        ki, ko, kc = cluster(k, centroids[1])
        scores = qc.float() @ kc.float().transpose(-1, -2) / 8
        counts, lists = ops.topp_blocks(scores, 0.8, weights=ko.diff(dim=-1), min_blocks=5)
        pooled = ops.mean_pool_blocks(q, block_size=128)
        top = ops.topk_blocks(pooled @ pooled.transpose(-1, -2), 3)
        moved = ops.permute_rows(k, ki), ops.permute_rows(v, ki)
        out, lse = ops.block_sparse_attention(q, *moved, counts, lists, q_index=qi, q_offsets=qo, kv_offsets=ko)
        second, second_lse = ops.block_sparse_attention(q, k, v, *top)
        return ops.merge_attention(out, lse, second, second_lse)

    return run


def cuda_graph_cases(backend: Backend, large: bool) -> Iterator[Named]:
    if backend.name == "cuda":
        yield "plan and attention in one graph, replayed", lambda: check_graph(backend)


def check_graph(backend: Backend) -> None:
    """Capture succeeds only where nothing waits for the device; a replay must give the same bits."""
    run = whole_plan(backend)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            expected = run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        same(captured[0], expected[0], "out of the replay")
        same(captured[1], expected[1], "lse of the replay")


def stream_cases(backend: Backend, large: bool) -> Iterator[Named]:
    if backend.name == "cuda":
        yield "the current stream is used", lambda: check_stream(backend)
    yield "plan and attention, two runs agree", lambda: check_plan_twice(backend)


def check_stream(backend: Backend) -> None:
    """Inputs written late on a side stream are seen by an op queued behind them on that stream."""
    index = permutation(1, 1, 4096).cuda()
    x = torch.zeros(1, 4, 4096, 128, device="cuda", dtype=torch.bfloat16)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        x.fill_(7.0)
        got = backend.ops.permute_rows(x, index)
    side.synchronize()
    assert bool((got == 7).all()), "the op ran before what was queued ahead of it on its stream"


def check_plan_twice(backend: Backend) -> None:
    run = whole_plan(backend)
    first, second = run(), run()
    assert bool(first[0].isfinite().all()), "not finite"
    same(first[0], second[0], "out")
    same(first[1], second[1], "lse")
