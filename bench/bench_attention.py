"""Attention family: cases, checks, peers, and what each op has to do at least."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Iterator

import attention_peers
import torch
from cases import attention as cases
from cases import mass as mass_cases
from harness import Case, Group, Peer, short
from torch import Tensor

from vdit_ext import ops
from vdit_ext.ops import attention as defs
from vdit_ext.testing import TOLERANCE, assert_close

OPS = (
    *defs.OPS,
    "svg2",
)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FIGURES_UNIFORM, FIGURES_VARIABLE = 1.2, 1.4
FULL_CHECK_PAIRS = 2**23  # up to here every row is compared with the definition, beyond it a sample of rows
SAMPLED_ROWS = 64
STARTED = time.perf_counter()
LSE_TOLERANCE = 1e-5


# ---------------------------------------------------------------------------------------------------------
# Selection
# ---------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ops", default="all", help=f"planner, or comma-separated: {', '.join(OPS)}")
    parser.add_argument(
        "--shape", choices=("plain", *cases.REAL), default="plain", help="plain, or a model's real shape"
    )
    parser.add_argument("--seqlen", type=int, default=8192, help="tokens, for --shape plain")
    parser.add_argument("--heads", type=int, default=8, help="heads, for --shape plain")
    parser.add_argument(
        "--dtypes", default="", help="comma-separated; default: float32,bfloat16 on CPU, bfloat16 on CUDA"
    )
    parser.add_argument("--select", default="", help="regular expression on '<op> <case>'")
    parser.add_argument(
        "--no-flex", action="store_true", help="leave FlexAttention out: it compiles for a while"
    )
    parser.add_argument(
        "--flex-seconds", type=float, default=0.0, help="after this leave FlexAttention out; 0: never"
    )


def apply_figures(args: argparse.Namespace) -> None:
    """The settings behind the figures that the project promises."""
    args.ops, args.shape, args.seqlen, args.heads = "block_sparse_attention", "plain", 8192, 8
    args.dtypes, args.device = "float32,bfloat16", "cpu"
    args.select = r"_b128_|_var100x500_"
    args.seconds, args.min_rounds = 20.0, 3
    # A compilation takes 20 s on two idle cores and minutes on busy ones; the whole has six.
    args.flex_seconds = 60.0


def groups(args: argparse.Namespace, device: str) -> Iterator[Callable[[], Group]]:
    """Builders of the selected groups; each makes its tensors when it is called."""
    wanted = (
        OPS if args.ops == "all" else tuple(PLANNER) if args.ops == "planner" else tuple(args.ops.split(","))
    )
    if unknown := set(wanted) - set(OPS):
        raise SystemExit(f"--ops: expected names among {', '.join(OPS)}, got {', '.join(sorted(unknown))}")
    default = "bfloat16" if device.startswith("cuda") else "float32,bfloat16"
    names = (args.dtypes or default).split(",")
    if unknown := set(names) - set(DTYPES):
        raise SystemExit(
            f"--dtypes: expected names among {', '.join(DTYPES)}, got {', '.join(sorted(unknown))}"
        )
    listed = cases.perf(args.seqlen, args.heads) if args.shape == "plain" else cases.real(args.shape)
    chosen = re.compile(args.select)
    for dim in sorted({case.head_dim for case in listed}):
        for dtype in (DTYPES[name] for name in names):
            mine = [case for case in listed if case.head_dim == dim]
            attention = [case for case in mine if chosen.search(f"block_sparse_attention {case.name}")]
            if "block_sparse_attention" in wanted and attention and not _refused(device, dtype):
                yield lambda m=attention, t=dtype: attention_group(m, t, device, args)
            size = Size.of(mine[0], args.shape)
            planner = [op for op in wanted if op in PLANNER and chosen.search(f"{op} {size.name}")]
            if planner:
                yield lambda p=planner, s=size, t=dtype: planner_group(p, s, t, device)
            if "svg2" in wanted and chosen.search(f"svg2 {size.name}") and not _refused(device, dtype):
                yield lambda s=size, t=dtype: svg2_group(s, t, device)


def _refused(device: str, dtype: torch.dtype) -> bool:
    return device.startswith("cuda") and dtype == torch.float32


def dtypes_of(args: argparse.Namespace, device: str) -> set[torch.dtype]:
    """The types whose matrix rate is a ceiling in this run."""
    default = "bfloat16" if device.startswith("cuda") else "float32,bfloat16"
    return {DTYPES[name] for name in (args.dtypes or default).split(",") if name in DTYPES}


# ---------------------------------------------------------------------------------------------------------
# block_sparse_attention
# ---------------------------------------------------------------------------------------------------------


def attention_group(listed: list[cases.AttentionCase], dtype, device: str, args) -> Group:
    """All cases over one q, k and v, with the dense peers that they share."""
    first = listed[0]
    q, k, v = make_qkv(first, dtype, device)
    group = Group(f"attention S={first.seqlen_q} H={first.heads} D={first.head_dim} {_name(dtype)}", device, [])
    group.calls = attention_peers.dense(q, k, v, device)
    dense_names = list(group.calls)
    for case in listed:
        lists = make_lists(case, device)
        group.cases.append(attention_case(case, q, k, v, lists, group, dense_names, args))
    return group


def make_qkv(case: cases.AttentionCase, dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    if (
        case.seqlen_q * case.heads * case.head_dim > 2**26
    ):  # drawn where it is used: a CPU would take half a minute
        gen = torch.Generator(device).manual_seed(case.seed)
        size = (case.batch, case.seqlen_q, case.heads, case.head_dim)
        return tuple(
            torch.randn(size, generator=gen, device=device, dtype=dtype).transpose(1, 2) for _ in range(3)
        )
    gen = torch.Generator().manual_seed(case.seed)
    lengths = (case.seqlen_q, case.seqlen_kv, case.seqlen_kv)
    return tuple(cases.make_tensor(case, length, gen, dtype).to(device) for length in lengths)


def make_lists(case: cases.AttentionCase, device: str) -> tuple[Tensor, Tensor, dict]:
    """Counts, lists and the op's keyword arguments, as the tests make them."""
    gen = torch.Generator().manual_seed(case.seed + 1)
    q_offsets = cases.make_offsets(case.q_block, case.seqlen_q, case, gen)
    kv_offsets = cases.make_offsets(case.kv_block, case.seqlen_kv, case, gen)
    nq = cases.count_blocks(q_offsets, case.q_block, case.seqlen_q)
    nkv = cases.count_blocks(kv_offsets, case.kv_block, case.seqlen_kv)
    counts, lists = cases.make_lists(case, nq, nkv, gen)
    kwargs = {"scale": case.scale}
    for name, spec, offsets in (("q", case.q_block, q_offsets), ("kv", case.kv_block, kv_offsets)):
        if offsets is None:
            kwargs[f"{name}_block_size"] = spec
        else:
            kwargs[f"{name}_offsets"] = offsets.to(device)
    return counts.to(device), lists.to(device), kwargs


def attention_case(case, q, k, v, made, group: Group, dense_names: list[str], args) -> Case:
    counts, lists, kwargs = made
    pairs = kept_pairs(counts, lists, kwargs, q, k)
    density = pairs / (q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2])
    check = make_check(q, k, v, counts, lists, kwargs)

    def call():
        return ops.block_sparse_attention(q, k, v, counts, lists, **kwargs)

    peers = [Peer(name, name, scale=density, check=check if density == 1 else None) for name in dense_names]
    peers += sparse_peers(case, q, k, v, made, group, check, args)
    traffic = _nbytes(q, k, v, q, counts) + int(counts.sum()) * 4 + q.shape[:3].numel() * 4
    bound = FIGURES_VARIABLE if isinstance(case.q_block, str) else FIGURES_UNIFORM
    return Case(
        "block_sparse_attention",
        case.name,
        q.dtype,
        call,
        check,
        flops=4.0 * q.shape[3] * pairs,
        nbytes=traffic,
        exps=float(pairs),
        peers=peers,
        target=("SDPA x density", bound) if group.device == "cpu" else None,
        sizes={
            "batch": q.shape[0], "heads": q.shape[1], "seqlen_q": q.shape[2], "seqlen_kv": k.shape[2],
            "head_dim": q.shape[3], "q_block": case.q_block, "kv_block": case.kv_block, "density": density,
            "tile": cuda_tile(q, kwargs) if group.device == "cuda" else None,
        },
    )  # fmt: skip


def cuda_tile(q: Tensor, kwargs: dict) -> str | None:
    """The tile of the kernel that runs, in words; None where ``_C`` was not built."""
    try:
        from vdit_ext import _C
    except ImportError:
        return None

    if (offsets := kwargs.get("q_offsets")) is not None:
        blocks = {"num_q_clusters": offsets.shape[2] - 1}
    else:
        blocks = {"q_block_size": kwargs["q_block_size"]}
    return _C.attention_tile(q.shape[3], q.shape[2], **blocks)["text"]


def sparse_peers(case, q, k, v, made, group: Group, check, args) -> list[Peer]:
    """Peers that skip blocks too; each is checked as we are, with room for a coarser internal precision."""
    peers = []
    late = args.flex_seconds and time.perf_counter() - STARTED > args.flex_seconds
    for name, make in attention_peers.sparse(group.device).items():
        if name == "FlexAttention" and (args.no_flex or late):
            if late:
                peers.append(Peer(name, reason="not compiled, to keep the run short"))
            continue
        key = f"{name} {case.name}"
        try:
            peer = make(q, k, v, *made)
            # One that leaves ragged blocks out is compared by the share that it computes, and not checked.
            call, share = peer if isinstance(peer, tuple) else (peer, None)
            group.calls[key] = call
            peers.append(
                Peer(name, key, check=check.loosened(4.0)) if share is None else Peer(name, key, 1 / share)
            )
        except attention_peers.NotHere as reason:
            peers.append(Peer(name, reason=str(reason)))
        except Exception as error:
            peers.append(Peer(name, reason=short(error)))
    return peers


def kept_pairs(counts, lists, kwargs, q, k) -> int:
    """Query-key pairs that the lists ask for, over batch and heads."""
    batch, heads = q.shape[:2]
    q_sizes = block_sizes(kwargs.get("q_offsets"), kwargs.get("q_block_size", 0), q.shape[2], q.device)
    kv_sizes = block_sizes(kwargs.get("kv_offsets"), kwargs.get("kv_block_size", 0), k.shape[2], q.device)
    used = torch.arange(lists.shape[-1], device=lists.device) < counts[..., None]
    kv_sizes = kv_sizes[..., None, :].expand(batch, heads, lists.shape[2], -1)
    chosen = torch.where(used, lists, 0).long().expand(batch, heads, -1, -1)
    seen = (kv_sizes.gather(-1, chosen) * used).sum(-1)
    return int((seen * q_sizes).sum())


def block_sizes(offsets: Tensor | None, block: int, length: int, device) -> Tensor:
    if offsets is not None:
        return offsets.long().diff(dim=-1)
    return (length - torch.arange(0, length, block, device=device)).clamp(max=block)[None, None]


# --- checks -------------------------------------------------------------------------------------------------


def make_check(q, k, v, counts, lists, kwargs) -> RowCheck:
    """All rows of small cases, a sample of rows of large ones, in fp64."""
    whole = q.shape[:3].numel() * k.shape[2] <= FULL_CHECK_PAIRS
    rows = torch.arange(q.shape[2]) if whole else sample_rows(q.shape[2], SAMPLED_ROWS)
    return RowCheck(q, k, v, counts, lists, kwargs, rows)


def sample_rows(length: int, count: int, seed: int = 0) -> Tensor:
    """Sorted row numbers, the first and the last among them."""
    drawn = torch.randperm(length, generator=torch.Generator().manual_seed(seed))[: max(0, count - 2)]
    return torch.cat([drawn, torch.tensor([0, length - 1])]).unique()


class RowCheck:
    """Compares rows of an attention result with their exact value; call it with ``out`` or ``(out, lse)``.

    The exact rows are computed when they are first needed, from the block lists and nothing else.
    """

    def __init__(self, q, k, v, counts, lists, kwargs, rows: Tensor, slack: float = 1.0) -> None:
        self.inputs, self.rows, self.slack = (q, k, v, counts, lists, kwargs), rows, slack
        self._exact: list = []

    def loosened(self, slack: float) -> RowCheck:
        """The same rows with a tolerance that is wider by a factor."""
        other = RowCheck(*self.inputs, self.rows, slack)
        other._exact = self._exact
        return other

    def __call__(self, result) -> None:
        out, lse = result if isinstance(result, tuple | list) else (result, None)
        if not self._exact:
            self._exact.append(exact_rows(*self.inputs, self.rows))
        expected, expected_lse, largest = self._exact[0]
        assert out.shape == self.inputs[0].shape, f"out is {list(out.shape)}, not {list(self.inputs[0].shape)}"
        assert not out.isnan().any(), "out holds NaN: elements that were never written, or a real NaN"
        rows = self.rows.to(out.device)
        tolerance = (TOLERANCE[out.dtype] + largest * 2**-23) * self.slack
        assert_close(out[:, :, rows].cpu(), expected.to(out.dtype), tolerance=tolerance, what="out")
        if lse is not None:
            assert_close(lse[:, :, rows].cpu(), expected_lse.float(), tolerance=LSE_TOLERANCE, what="lse")


def exact_rows(q, k, v, counts, lists, kwargs, rows: Tensor) -> tuple[Tensor, Tensor, float]:
    """Attention of some query rows in fp64 where the tensors are: out and lse on the CPU, largest logit."""
    batch, heads, seqlen_q, dim = q.shape
    scale = dim**-0.5 if kwargs.get("scale") is None else kwargs["scale"]
    rows = rows.to(q.device)
    q_sizes = block_sizes(kwargs.get("q_offsets"), kwargs.get("q_block_size", 0), seqlen_q, q.device)
    kv_sizes = block_sizes(kwargs.get("kv_offsets"), kwargs.get("kv_block_size", 0), k.shape[2], q.device)
    outs, lses, largest = [], [], 0.0
    for b in range(batch):
        for h in range(heads):
            block = torch.searchsorted(_pick(q_sizes, b, h).cumsum(0), rows, right=True)
            listed, used = _pick(lists, b, h)[block].long(), _pick(counts, b, h)[block]
            slots = torch.arange(listed.shape[-1], device=q.device) < used[:, None]
            sizes = _pick(kv_sizes, b, h)
            times = torch.zeros(len(rows), len(sizes), dtype=torch.float64, device=q.device)
            times.scatter_add_(1, torch.where(slots, listed, 0), slots.double())
            logits = q[b, h, rows].double() @ k[b, h].double().T * scale
            largest = max(largest, float(logits.abs().max()))
            # A block listed twice counts twice; one that is not listed has weight 0.
            logits += times.log().repeat_interleave(sizes, dim=1)
            lse = torch.logsumexp(logits, -1)
            weights = torch.exp(logits - torch.where(lse == -torch.inf, 0.0, lse)[:, None])
            outs.append((weights @ v[b, h].double()).cpu())
            lses.append(lse.cpu())
    shape = (batch, heads, len(rows))
    return torch.stack(outs).view(*shape, dim), torch.stack(lses).view(shape), largest


def _pick(t: Tensor, b: int, h: int) -> Tensor:
    return t[b if t.shape[0] > 1 else 0, h if t.shape[1] > 1 else 0]


# ---------------------------------------------------------------------------------------------------------
# Planner ops
# ---------------------------------------------------------------------------------------------------------


class Size:
    """Sizes that the planner ops of one model layer share."""

    def __init__(self, name: str, heads: int, tokens: int, dim: int, q_clusters: int, k_clusters: int) -> None:
        self.name, self.heads, self.tokens, self.dim = name, heads, tokens, dim
        self.q_clusters, self.k_clusters = min(q_clusters, tokens), min(k_clusters, tokens)

    @classmethod
    def of(cls, case: cases.AttentionCase, shape: str) -> Size:
        clusters = cases.REAL[shape][3:] if shape in cases.REAL else (100, 500)
        label = f"{shape}_" if shape in cases.REAL else ""
        return cls(f"{label}d{case.head_dim}", case.heads, case.seqlen_q, case.head_dim, *clusters)

    def describe(self) -> dict:
        return dict(vars(self))


class PlannerInputs:
    """Tensors of all planner ops at one size, made once."""

    def __init__(self, size: Size, dtype, device: str) -> None:
        self.size, self.dtype, self.device = size, dtype, device
        gen = torch.Generator(device).manual_seed(0)
        h, s, d, c = size.heads, size.tokens, size.dim, size.k_clusters

        def randn(*shape):
            return torch.randn(shape, generator=gen, device=device)

        self.x = randn(1, s, h, d).to(dtype).transpose(1, 2)
        self.other = randn(1, s, h, d).to(dtype).transpose(1, 2)
        self.lse = randn(1, h, s), randn(1, h, s)
        rows = torch.randint(s, (1, h, c), generator=gen, device=device)
        self.centroids = self.x.gather(2, rows[..., None].expand(-1, -1, -1, d)).contiguous()
        self.labels = torch.randint(c, (1, h, s), generator=gen, device=device, dtype=torch.int32)
        self.sorted_idx, self.offsets = sorted_labels(self.labels, c)
        self.scores = randn(1, h, size.q_clusters, c) * 2
        self.keep = max(1, c // 4)


def sorted_labels(labels: Tensor, num_labels: int) -> tuple[Tensor, Tensor]:
    """label_sort in torch, without the definition's one-hot matrix, which fills the memory at real sizes."""
    counts = torch.zeros(*labels.shape[:2], num_labels, dtype=torch.int32, device=labels.device)
    counts.scatter_add_(-1, labels.long(), torch.ones_like(labels))
    offsets = torch.nn.functional.pad(counts.cumsum(-1), (1, 0)).int()
    return labels.argsort(dim=-1, stable=True).int(), offsets


def planner_group(names: list[str], size: Size, dtype, device: str) -> Group:
    inputs = PlannerInputs(size, dtype, device)
    group = Group(f"planner {size.name} {_name(dtype)}", device, [])
    for name in names:
        case, peers = PLANNER[name](inputs)
        case.sizes = size.describe()
        for label, call in peers.items():
            key = f"{name}: {label}"
            group.calls[key] = call
            case.peers.append(Peer(label, key))
        group.cases.append(case)
    return group


def _nbytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _same(*expected) -> Callable:
    def check(result) -> None:
        got = result if isinstance(result, tuple | list) else (result,)
        for index, (g, e) in enumerate(zip(got, expected, strict=True)):
            assert torch.equal(g.cpu(), e.cpu()), f"result {index} is not the definition's"

    return check


def _close(make_expected: Callable, tolerance: float | None) -> Callable:
    def check(result) -> None:
        got = result if isinstance(result, tuple | list) else (result,)
        expected = make_expected()
        expected = expected if isinstance(expected, tuple | list) else (expected,)
        for index, (g, e) in enumerate(zip(got, expected, strict=True)):
            assert_close(g, e, tolerance=tolerance, what=f"result {index}")

    return check


def merge_case(i: PlannerInputs):
    args = i.x, i.lse[0], i.other, i.lse[1]

    def torch_formula():
        lse = torch.logaddexp(args[1], args[3])
        mixed = (args[1] - lse).exp()[..., None] * args[0] + (args[3] - lse).exp()[..., None] * args[2]
        return mixed.to(i.dtype), lse

    check = _close(lambda: defs.merge_attention_naive(*args), TOLERANCE[i.dtype] + 1e-5)
    case = Case("merge_attention", i.size.name, i.dtype, lambda: ops.merge_attention(*args), check)
    case.nbytes = _nbytes(i.x) * 3 + _nbytes(i.lse[0]) * 3
    return case, {"torch": torch_formula}


def permute_case(i: PlannerInputs):
    index = i.sorted_idx
    wide = index.long()[..., None].expand(-1, -1, -1, i.size.dim)
    heads, rows = torch.arange(i.size.heads, device=i.device)[None, :, None], index.long()
    check = _same(defs.permute_rows_naive(i.x, index))
    case = Case("permute_rows", i.size.name, i.dtype, lambda: ops.permute_rows(i.x, index), check)
    case.nbytes = 2 * _nbytes(i.x) + _nbytes(index)
    return case, {"torch": lambda: i.x.gather(2, wide), "torch indexing": lambda: i.x[0, heads[0], rows[0]]}


def unpermute_case(i: PlannerInputs):
    index, x = i.sorted_idx, i.x.contiguous()
    wide = index.long()[..., None].expand(-1, -1, -1, i.size.dim)
    check = _same(defs.unpermute_rows_naive(x, index))
    case = Case("unpermute_rows", i.size.name, i.dtype, lambda: ops.unpermute_rows(x, index), check)
    case.nbytes = 2 * _nbytes(x) + _nbytes(index)
    return case, {"torch": lambda: torch.empty_like(x).scatter_(2, wide, x)}


def mean_pool_case(i: PlannerInputs):
    block, x = 128, i.x
    whole = i.size.tokens // block * block
    check = _close(lambda: defs.mean_pool_blocks_naive(x, block_size=block), 3e-6)
    case = Case(
        "mean_pool_blocks", i.size.name, i.dtype, lambda: ops.mean_pool_blocks(x, block_size=block), check
    )
    case.nbytes = _nbytes(x) + x.numel() // block * 4
    # The peer leaves the ragged last block out, which costs it nothing.
    return case, {"torch": lambda: x[:, :, :whole].unflatten(2, (-1, block)).mean(3, dtype=torch.float32)}


def kmeans_case(i: PlannerInputs):
    x, c = i.x, i.centroids

    def check(labels) -> None:
        rows = sample_rows(i.size.tokens, 2048).to(x.device)
        assert labels.dtype == torch.int32 and int(labels.min()) >= 0 and int(labels.max()) < c.shape[2], (
            "range"
        )
        distance = torch.cdist(x[:, :, rows].double(), c.double()).square()
        chosen = distance.gather(-1, labels[:, :, rows].long()[..., None])[..., 0]
        worst = float((chosen - distance.amin(-1)).max())
        # Two centroids may be nearest to within fp32 rounding of the scores.
        assert worst <= 1e-4 * i.size.dim, f"a centroid was chosen that is {worst:.3g} farther than the nearest"

    def torch_formula():
        half = c.float().square().sum(-1)[..., None, :] / 2
        return torch.stack(
            [(a @ b.T).sub_(n.to(a.dtype)).argmax(-1) for a, b, n in zip(x[0], c[0], half[0], strict=True)]
        )

    case = Case("kmeans_assign", i.size.name, i.dtype, lambda: ops.kmeans_assign(x, c), check)
    case.flops = 2.0 * x.numel() * c.shape[2]
    case.nbytes = _nbytes(x, c, i.labels)
    return case, {"torch": torch_formula}


def label_sort_case(i: PlannerInputs):
    labels, c = i.labels, i.size.k_clusters

    check = _same(i.sorted_idx, i.offsets)
    case = Case("label_sort", i.size.name, torch.int32, lambda: ops.label_sort(labels, c), check)
    case.nbytes = 2 * _nbytes(labels) + _nbytes(i.offsets)
    return case, {"torch": lambda: sorted_labels(labels, c)}


def segment_mean_case(i: PlannerInputs):
    x, fallback, labels = i.x, i.centroids, i.labels.long()

    def torch_formula():
        sums = torch.zeros(fallback.shape, device=x.device)
        sums.scatter_add_(2, labels[..., None].expand_as(x), x.float())
        sizes = i.offsets.diff(dim=-1)[..., None]
        return torch.where(sizes > 0, sums / sizes, fallback.float()).to(x.dtype)

    tolerance = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[i.dtype]
    moved = tuple(t.cpu() for t in (x, i.sorted_idx, i.offsets, fallback))
    check = _close(lambda: defs.segment_mean_naive(*moved), tolerance)
    call = lambda: ops.segment_mean(x, i.sorted_idx, i.offsets, fallback)  # noqa: E731
    case = Case("segment_mean", i.size.name, i.dtype, call, check)
    case.nbytes = _nbytes(x, i.sorted_idx, i.offsets, fallback)
    return case, {"torch": torch_formula}


def topk_case(i: PlannerInputs):
    check = _same(*defs.topk_blocks_naive(i.scores, i.keep))
    case = Case("topk_blocks", i.size.name, torch.float32, lambda: ops.topk_blocks(i.scores, i.keep), check)
    case.nbytes = 2 * _nbytes(i.scores)
    return case, {"torch": lambda: i.scores.topk(i.keep).indices.sort(-1).values}


def topp_case(i: PlannerInputs):
    sizes, p = i.offsets.diff(dim=-1), 0.9

    def torch_formula():
        mass = torch.softmax(i.scores + sizes.float().log()[..., None, :], -1)
        ordered, order = mass.sort(-1, descending=True)
        keep = torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, order, ordered.cumsum(-1) - ordered <= p)
        return defs.lists_from_mask(keep)

    def check(result) -> None:
        counts, lists = result
        keep = defs.mask_from_lists(counts, lists, i.scores.shape[-1])
        _same(*defs.lists_from_mask(keep))(result)
        mass = defs.block_mass_fractions(i.scores, sizes)
        kept = torch.where(keep, mass, 0.0).sum(-1)
        lightest = torch.where(keep, mass, torch.inf).amin(-1)
        heaviest_out = torch.where(keep, -torch.inf, mass).amax(-1)
        assert (heaviest_out <= lightest * (1 + 1e-5) + 1e-12).all(), (
            "a lighter block was kept than one left out"
        )
        assert (kept > p - 1e-5).all(), "the kept mass does not exceed p"
        assert ((kept - lightest <= p + 1e-5) | (counts == 1)).all(), "a block more than needed was kept"

    call = lambda: ops.topp_blocks(i.scores, p, weights=sizes)  # noqa: E731
    case = Case("topp_blocks", i.size.name, torch.float32, call, check)
    case.nbytes = 2 * _nbytes(i.scores)
    return case, {"torch": torch_formula}


def rope_case(i: PlannerInputs):
    """Wan's form: norm over all heads, neighbouring pairs, fp32 tables of width D."""
    x, (h, d) = i.x, (i.size.heads, i.size.dim)
    gen = torch.Generator(i.device).manual_seed(1)
    weight = torch.randn(h * d, generator=gen, device=i.device).to(i.dtype)
    angle = torch.rand(i.size.tokens, d // 2, generator=gen, device=i.device) * 90
    cos, sin = (t.repeat_interleave(2, -1)[None, None] for t in (angle.cos(), angle.sin()))

    def torch_formula():
        y = torch.nn.functional.rms_norm(x.transpose(1, 2).flatten(2), (h * d,), weight, 1e-6)
        first, second = y.unflatten(2, (h, d // 2, 2)).transpose(1, 2).unbind(-1)
        out = torch.empty_like(x)
        out[..., 0::2] = first * cos[..., 0::2] - second * sin[..., 0::2]
        out[..., 1::2] = first * sin[..., 1::2] + second * cos[..., 1::2]
        return out

    def check(result) -> None:
        rows = sample_rows(i.size.tokens, 2048).to(i.device)
        parts = (t[:, :, rows].cpu() for t in (x, cos, sin))
        part, c, s = parts
        expected = defs.rms_norm_rope_naive(part, weight.cpu(), c, s, across_heads=True)
        assert_close(result[:, :, rows], expected, tolerance=TOLERANCE[i.dtype] / 2)

    call = lambda: ops.rms_norm_rope(x, weight, cos, sin, across_heads=True)  # noqa: E731
    case = Case("rms_norm_rope", i.size.name, i.dtype, call, check)
    case.nbytes = 2 * _nbytes(x) + _nbytes(weight, cos, sin)
    return case, {"torch": torch_formula}


def mass_case(i: PlannerInputs):
    q, k, lse, block, dim = i.x, i.other, i.lse[0], 64, i.size.dim

    def torch_formula(rows: int = 4 * block):
        """Some rows at a time: the whole matrix of logits fits no memory at real sizes."""
        masses = []
        for part, part_lse in zip(q.split(rows, 2), lse.split(rows, 2), strict=True):
            terms = (part @ k.mT).float().mul_(dim**-0.5).sub_(part_lse[..., None]).clamp_(max=30).exp_()
            terms = torch.nn.functional.pad(terms, (0, -k.shape[2] % block, 0, -part.shape[2] % block))
            masses.append(terms.unflatten(-1, (-1, block)).sum(-1).unflatten(2, (-1, block)).sum(3))
        return torch.cat(masses, 2)

    def check(mass) -> None:
        for first in {0, i.size.tokens // 2 // block * block, (i.size.tokens - 1) // block * block}:
            some = slice(first, first + block)
            args = q[:, :, some], k, lse[:, :, some]
            mass_cases.assert_masses(mass[:, :, first // block, None], defs.block_mass_naive(*args), *args)

    case = Case("block_mass", i.size.name, i.dtype, lambda: ops.block_mass(q, k, lse), check)
    pairs = float(i.size.heads * i.size.tokens**2)
    case.flops, case.exps = 2.0 * dim * pairs, pairs
    case.nbytes = _nbytes(q, k, lse) + i.size.heads * (-(-i.size.tokens // block)) ** 2 * 4
    return case, {"torch": torch_formula}


def mass_topk_case(i: PlannerInputs):
    plain, peers = mass_case(i)
    args = i.x, i.other, i.lse[0], max(1, -(-i.size.tokens // 64) * 3 // 10)

    def check(result) -> None:
        mass = ops.block_mass(*args[:3])
        plain.check(mass)
        expected = defs.heaviest_blocks(mass, args[3])
        _same(*expected[:2])(result[:2])
        torch.testing.assert_close(result[2], expected[2], rtol=1e-6, atol=0)

    case = Case("block_mass_topk", i.size.name, i.dtype, lambda: ops.block_mass_topk(*args), check)
    case.flops, case.exps = plain.flops, plain.exps
    case.nbytes = _nbytes(i.x, i.other, i.lse[0]) + i.size.heads * -(-i.size.tokens // 64) * args[3] * 8
    return case, {"torch": lambda: peers["torch"]().topk(args[3])}


PLANNER = {
    "merge_attention": merge_case,
    "permute_rows": permute_case,
    "unpermute_rows": unpermute_case,
    "mean_pool_blocks": mean_pool_case,
    "kmeans_assign": kmeans_case,
    "label_sort": label_sort_case,
    "segment_mean": segment_mean_case,
    "topk_blocks": topk_case,
    "topp_blocks": topp_case,
    "rms_norm_rope": rope_case,
    "block_mass": mass_case,
    "block_mass_topk": mass_topk_case,
}


# ---------------------------------------------------------------------------------------------------------
# The whole of SVG2: plan, permute, attend
# ---------------------------------------------------------------------------------------------------------


def svg2_group(size: Size, dtype, device: str) -> Group:
    """One layer's call with warm centroids against dense attention on the same tensors."""
    from vdit_ext.sparse.plan import TokenLayout
    from vdit_ext.sparse.svg2 import SVG2

    q, k, v = topical_qkv(size, dtype, device)
    layout = TokenLayout((1, 1, size.tokens))
    method = SVG2(num_q_clusters=size.q_clusters, num_k_clusters=size.k_clusters, iter_init=10)
    state = method.new_state(0, 1)
    method.plan(q, k, layout, state)
    plan = method.plan(q, k, layout, state)
    pairs = int(plan.kept_pairs(size.tokens, size.tokens).expand(1, size.heads).sum())
    density = pairs / (size.heads * size.tokens**2)

    group = Group(f"svg2 {size.name} {_name(dtype)}", device, [], attention_peers.dense(q, k, v, device))
    dense = list(group.calls)
    in_order = _permuted(plan, q, k, v)
    check = PermutedCheck(make_check(*in_order), plan.q_index)

    def whole():
        return method.plan(q, k, layout, state).attend(q, k, v)

    def run_case(part, call, check, attends: bool):
        case = Case(
            "svg2", f"{size.name}_{part}", dtype, call, check, sizes=size.describe() | {"density": density}
        )
        if attends:
            case.flops, case.exps = 4.0 * size.dim * pairs, float(pairs)
        # Against dense attention as it is: the question is what the method saves, planning included.
        case.peers = [Peer(name.removesuffix(" x density"), name) for name in dense]
        group.cases.append(case)

    run_case(
        "plan", lambda: method.plan(q, k, layout, state), lambda made: made.validate(*[size.tokens] * 2), False
    )
    run_case("permute_attend", lambda: plan.attend(q, k, v), check, True)
    run_case("whole", whole, lambda result: _plausible(result, q), True)
    return group


def topical_qkv(size: Size, dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """q and k that share topics, so that attention is as concentrated as clustering is meant for."""
    gen = torch.Generator(device).manual_seed(0)
    h, s, d = size.heads, size.tokens, size.dim
    topics = torch.randn(1, h, 48, d, generator=gen, device=device)

    def side(strength: float) -> Tensor:
        label = torch.randint(48, (1, h, s), generator=gen, device=device)
        mean = topics.gather(2, label[..., None].expand(-1, -1, -1, d))
        noise = torch.randn(1, h, s, d, generator=gen, device=device)
        rows = strength * mean + 0.3 * noise
        return rows.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)

    return side(0.9), side(0.9), side(0.0)


def _permuted(plan, q, k, v) -> tuple:
    q, k, v = (
        defs.permute_rows_naive(q, plan.q_index),
        *(defs.permute_rows_naive(t, plan.kv_index) for t in (k, v)),
    )
    kwargs = {"q_offsets": plan.q_offsets, "kv_offsets": plan.kv_offsets, "scale": None}
    return q, k, v, plan.kv_num_blocks, plan.kv_indices, kwargs


class PermutedCheck:
    """A check of rows in plan order, for a result in the callers' order."""

    def __init__(self, check: RowCheck, index: Tensor) -> None:
        self.check, self.index = check, index

    def __call__(self, result) -> None:
        out, lse = result
        lse = defs.permute_rows_naive(lse[..., None], self.index)[..., 0]
        self.check((defs.permute_rows_naive(out, self.index), lse))


def _plausible(result, q: Tensor) -> None:
    # Centroids move from call to call, so there is no fixed plan to compare with; "permute_attend" is exact.
    out, lse = result
    assert out.shape == q.shape and out.isfinite().all() and lse.isfinite().all(), "not finite everywhere"
