"""Shared cases of the attention family: what is timed in bench/ is what is checked here.

Lists are named by purpose: ``corner`` (awkward, small), ``ragged`` (lengths and blocks that divide nothing),
``regular`` (block multiples), ``perf`` (what bench/ times).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionCase:
    """One call of block_sparse_attention.

    Attributes:
        name: what is awkward about it.
        batch, heads, seqlen_q, seqlen_kv, head_dim: sizes.
        q_block, kv_block: uniform block sizes, or sizes lists for variable blocks (one list for all heads, or
            "random:<n>" for n clusters of uneven random sizes, drawn per head).
        density: share of kept blocks; 0 gives empty rows only, 1 keeps all.
        layout: "bhsd", "bshd" (transposed view), "sliced" (a view with a storage offset and gaps).
        lists: "full" or "broadcast" ([1, 1, ...] lists).
        empty_rows: every other query block lists nothing.
        shuffled: queries do not lie in the order of the blocks (``q_index``).
    """

    name: str
    batch: int = 1
    heads: int = 2
    seqlen_q: int = 256
    seqlen_kv: int = 256
    head_dim: int = 64
    q_block: int | str | tuple[int, ...] = 128
    kv_block: int | str | tuple[int, ...] = 128
    density: float = 0.5
    layout: str = "bshd"
    lists: str = "full"
    empty_rows: bool = False
    shuffled: bool = False
    seed: int = 0
    scale: float | None = None

    def __str__(self) -> str:
        return self.name


@dataclass
class AttentionInputs:
    """Tensors of a case, ready for the op: ``op(*args, **kwargs)``."""

    q: Tensor
    k: Tensor
    v: Tensor
    kv_num_blocks: Tensor
    kv_indices: Tensor
    kwargs: dict = field(default_factory=dict)

    @property
    def args(self) -> tuple[Tensor, ...]:
        return self.q, self.k, self.v, self.kv_num_blocks, self.kv_indices

    def to(self, device) -> AttentionInputs:
        moved = {n: as_it_lies(t, device) if isinstance(t, Tensor) else t for n, t in self.kwargs.items()}
        return AttentionInputs(*(as_it_lies(t, device) for t in self.args), kwargs=moved)


def as_it_lies(t: Tensor, device: torch.device | str) -> Tensor:
    """t on a device as the view that it is: ``.to()`` would close its gaps and put it at the start of its memory."""
    if t.device == torch.device(device):
        return t
    storage = torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage())
    return storage.to(device).as_strided(t.shape, t.stride(), t.storage_offset())


def make_tensor(case: AttentionCase, length: int, gen: torch.Generator, dtype: torch.dtype) -> Tensor:
    b, h, d = case.batch, case.heads, case.head_dim
    if case.layout == "bhsd":
        return torch.randn(b, h, length, d, generator=gen).to(dtype)
    if case.layout == "bshd":
        return torch.randn(b, length, h, d, generator=gen).to(dtype).transpose(1, 2)
    # q, k and v as slices of a fused projection, with a row of slack in front: rows stay 16-byte aligned.
    fused = torch.randn(b, length + 1, 3 * h * d, generator=gen).to(dtype)
    return fused[:, 1:, h * d : 2 * h * d].unflatten(-1, (h, d)).transpose(1, 2)


def make_offsets(spec, length: int, case: AttentionCase, gen: torch.Generator) -> Tensor | None:
    if isinstance(spec, int):
        return None
    if isinstance(spec, str):
        count = int(spec.removeprefix("random:"))
        cuts = torch.randint(0, length + 1, (case.batch, case.heads, count - 1), generator=gen).sort(-1).values
        ends = torch.full((case.batch, case.heads, 1), length)
        return torch.cat([torch.zeros_like(ends), cuts, ends], -1).int()
    sizes = torch.tensor([0, *spec])
    assert int(sizes.sum()) == length, f"{case.name}: sizes add up to {int(sizes.sum())}, not {length}"
    return sizes.cumsum(0).int().expand(1, 1, -1).contiguous()


def count_blocks(offsets: Tensor | None, block, length: int) -> int:
    return -(-length // block) if offsets is None else offsets.shape[-1] - 1


def make_lists(case: AttentionCase, nq: int, nkv: int, gen: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random ascending lists: each row keeps round(density * nkv) blocks, at least one unless density is 0."""
    lead = (1, 1) if case.lists == "broadcast" else (case.batch, case.heads)
    keep = 0 if case.density == 0 else max(1, round(case.density * nkv))
    keep = min(keep, nkv)
    order = torch.rand(*lead, nq, nkv, generator=gen).argsort(-1)
    chosen = order[..., :keep].sort(-1).values.int()
    # The tail of a list may hold anything: it must not be read.
    tail = torch.full((*lead, nq, nkv - keep), 2**30, dtype=torch.int32)
    counts = torch.full((*lead, nq), keep, dtype=torch.int32)
    if case.empty_rows and nq > 0:
        counts[..., ::2] = 0
    return counts, torch.cat([chosen, tail], -1)


def make_attention(case: AttentionCase, dtype: torch.dtype) -> AttentionInputs:
    """Inputs of a case on the CPU, the same for every backend."""
    gen = torch.Generator().manual_seed(case.seed)
    q = make_tensor(case, case.seqlen_q, gen, dtype)
    k = make_tensor(case, case.seqlen_kv, gen, dtype)
    v = make_tensor(case, case.seqlen_kv, gen, dtype)
    q_offsets = make_offsets(case.q_block, case.seqlen_q, case, gen)
    kv_offsets = make_offsets(case.kv_block, case.seqlen_kv, case, gen)
    nq = count_blocks(q_offsets, case.q_block, case.seqlen_q)
    nkv = count_blocks(kv_offsets, case.kv_block, case.seqlen_kv)
    counts, lists = make_lists(case, nq, nkv, gen)
    kwargs = {"q_offsets": q_offsets, "kv_offsets": kv_offsets, "scale": case.scale}
    if q_offsets is None:
        kwargs["q_block_size"] = case.q_block
    if kv_offsets is None:
        kwargs["kv_block_size"] = case.kv_block
    if case.shuffled:
        lead = (1, 1) if case.lists == "broadcast" else (case.batch, case.heads)
        kwargs["q_index"] = torch.rand(*lead, case.seqlen_q, generator=gen).argsort(-1).int()
    return AttentionInputs(q, k, v, counts, lists, kwargs)


C = AttentionCase

corner = [
    C("one_token", seqlen_q=1, seqlen_kv=1, density=1.0),
    C("one_block_each", seqlen_q=128, seqlen_kv=128, density=1.0),
    C("no_key_kept", density=0.0),
    C("every_other_row_empty", seqlen_q=384, seqlen_kv=384, empty_rows=True),
    C("one_query_many_keys", seqlen_q=1, seqlen_kv=777, density=0.6),
    C("many_queries_one_key", seqlen_q=300, seqlen_kv=1, density=1.0),
    C(
        "giant_and_empty_clusters",
        seqlen_q=403,
        seqlen_kv=500,
        q_block=(0, 400, 0, 2, 1, 0),
        kv_block=(1, 0, 480, 0, 19),
    ),
    C(
        "listed_blocks_all_empty",
        seqlen_q=64,
        seqlen_kv=64,
        q_block=64,
        kv_block=(0, 64, 0, 0),
        density=0.25,
        seed=2,
    ),
    C("clusters_of_one", seqlen_q=40, seqlen_kv=37, q_block=(1,) * 40, kv_block=(1,) * 37, density=0.3),
    C("large_scale", seqlen_q=130, seqlen_kv=190, q_block=64, kv_block=64, scale=3.0, density=1.0),
    # Scores of a negative scale rank the other way round; of scale 0 all keys weigh the same.
    C("negative_scale", seqlen_q=130, seqlen_kv=190, q_block=64, kv_block=64, scale=-0.2, density=0.7),
    C(
        "negative_scale_variable",
        seqlen_q=150,
        seqlen_kv=333,
        q_block="random:5",
        kv_block="random:9",
        scale=-1.0,
    ),
    C(
        "zero_scale",
        seqlen_q=130,
        seqlen_kv=190,
        q_block=64,
        kv_block=64,
        scale=0.0,
        density=0.7,
        empty_rows=True,
    ),
    C(
        "zero_scale_variable",
        head_dim=128,
        seqlen_q=150,
        seqlen_kv=333,
        q_block="random:5",
        kv_block="random:9",
        scale=0.0,
    ),
]

ragged = [
    C("odd_lengths", seqlen_q=257, seqlen_kv=389, batch=2, density=0.6),
    C("blocks_of_64_ragged", seqlen_q=333, seqlen_kv=201, q_block=64, kv_block=64, density=0.5),
    C("q_64_kv_128", seqlen_q=200, seqlen_kv=450, q_block=64, kv_block=128, density=0.5),
    C("q_128_kv_64", seqlen_q=450, seqlen_kv=200, q_block=128, kv_block=64, density=0.5),
    C("variable_both", batch=2, heads=3, seqlen_q=611, seqlen_kv=733, q_block="random:9", kv_block="random:23"),
    C(
        "variable_keys_uniform_queries",
        seqlen_q=300,
        seqlen_kv=417,
        q_block=128,
        kv_block="random:31",
        density=0.4,
    ),
    C(
        "uniform_keys_variable_queries",
        seqlen_q=300,
        seqlen_kv=417,
        q_block="random:7",
        kv_block=64,
        density=0.4,
    ),
    C("sliced_view", layout="sliced", batch=2, seqlen_q=190, seqlen_kv=190, q_block=64, kv_block=64),
    C("head_dim_96", head_dim=96, seqlen_q=213, seqlen_kv=345, q_block="random:5", kv_block="random:11"),
    C("head_dim_128", head_dim=128, seqlen_q=213, seqlen_kv=345, q_block="random:5", kv_block="random:11"),
    C("broadcast_lists", batch=2, heads=3, seqlen_q=300, seqlen_kv=300, lists="broadcast"),
    C("shuffled_queries", batch=2, seqlen_q=333, seqlen_kv=301, q_block=64, kv_block=64, shuffled=True),
    C(
        "shuffled_clusters",
        head_dim=96,
        seqlen_q=213,
        seqlen_kv=345,
        q_block="random:5",
        kv_block="random:11",
        lists="broadcast",
        shuffled=True,
    ),
    C(
        "shuffled_clusters_of_a_slice",
        head_dim=128,
        batch=2,
        seqlen_q=213,
        seqlen_kv=345,
        q_block="random:5",
        kv_block="random:11",
        layout="sliced",
        shuffled=True,
    ),
]

regular = [
    C("d64_128", seqlen_q=512, seqlen_kv=512, density=0.5, layout="bhsd"),
    C("d96_128", head_dim=96, seqlen_q=256, seqlen_kv=384, density=0.7),
    C("d128_128", head_dim=128, seqlen_q=384, seqlen_kv=512, density=0.5),
    C("d128_64", head_dim=128, seqlen_q=256, seqlen_kv=320, q_block=64, kv_block=64, density=0.4),
    C("dense", seqlen_q=384, seqlen_kv=384, density=1.0),
]

correctness = corner + ragged + regular


def perf(seqlen: int = 8192, heads: int = 8) -> list[AttentionCase]:
    """The cases that bench/ times: one sequence, uniform and variable blocks."""
    cases = []
    for dim in (64, 128):
        for density in (0.1, 0.25, 0.5, 1.0):
            name = f"d{dim}_b128_rho{density}"
            cases.append(C(name, heads=heads, seqlen_q=seqlen, seqlen_kv=seqlen, head_dim=dim, density=density))
        for density in (0.1, 0.25, 0.5):
            name = f"d{dim}_b64_rho{density}"
            cases.append(
                C(
                    name,
                    heads=heads,
                    seqlen_q=seqlen,
                    seqlen_kv=seqlen,
                    head_dim=dim,
                    density=density,
                    q_block=64,
                    kv_block=64,
                )
            )
            name = f"d{dim}_var100x500_rho{density}"
            cases.append(
                C(
                    name,
                    heads=heads,
                    seqlen_q=seqlen,
                    seqlen_kv=seqlen,
                    head_dim=dim,
                    density=density,
                    q_block="random:100",
                    kv_block="random:500",
                )
            )
    return cases


# Shapes of video models at 720p: tokens, heads, head dim, query and key clusters of SVG2's scripts.
REAL = {
    "hunyuan": (119_056, 24, 128, 400, 1000),
    "wan14b": (75_600, 40, 128, 300, 1000),
    "cogvideox": (45_106, 48, 64, 100, 500),
}


def real(model: str) -> list[AttentionCase]:
    """The cases that bench/ times on a GPU at a model's own shape, a key of :data:`REAL`."""
    seqlen, heads, dim, q_clusters, k_clusters = REAL[model]
    blocks = [(f"b{n}", n, n, rho) for n, rho in ((128, 0.1), (128, 0.25), (128, 0.5), (64, 0.25))]
    variable = f"var{q_clusters}x{k_clusters}"
    blocks += [(variable, f"random:{q_clusters}", f"random:{k_clusters}", rho) for rho in (0.1, 0.25, 0.5)]
    return [
        C(
            f"{model}_{name}_rho{rho}",
            heads=heads,
            seqlen_q=seqlen,
            seqlen_kv=seqlen,
            head_dim=dim,
            q_block=q_block,
            kv_block=kv_block,
            density=rho,
        )
        for name, q_block, kv_block, rho in blocks
    ]
