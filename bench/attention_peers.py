"""Other people's attention, called on our tensors; whatever is not here is absent with its reason.

Nobody else's code is in here, only calls. Argument conventions were read from FlashInfer (August 2026),
flash-attention (August 2026, hopper/ and flash_attn/cute/), Block-Sparse-Attention and Sparse-VideoGen.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import lru_cache

import torch
from harness import NotHere
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vdit_ext.ops import lists_from_mask, mask_from_lists

Call = Callable[[], Tensor]


def needed(module: str, name: str, package: str):
    """``name`` from a module, or :class:`NotHere` with the package that has it."""
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name == module.split(".")[0]:
            raise NotHere(f"{package} is not installed") from error
        raise NotHere(f"{package} cannot be imported: it needs the module {error.name}") from error
    except Exception as error:  # a library of another torch or CUDA fails in many ways
        first = (str(error).splitlines() or [""])[0]
        raise NotHere(f"{package} cannot be imported: {type(error).__name__}: {first[:160]}") from error


def _first(result):
    return result[0] if isinstance(result, tuple) else result


# ---------------------------------------------------------------------------------------------------------
# Dense attention
# ---------------------------------------------------------------------------------------------------------


def dense(q: Tensor, k: Tensor, v: Tensor, device: str, *, flex: bool = False) -> dict[str, Call]:
    """Dense attention, by name; each is compared with at the kept density.

    A call raises :class:`NotHere` where its library is missing. ``flex`` adds FlexAttention, which compiles.
    """
    calls: dict[str, Call] = {"SDPA x density": lambda: scaled_dot_product_attention(q, k, v)}
    if flex:
        calls["FlexAttention x density"] = lambda: _compiled_flex()(q, k, v)
    if not device.startswith("cuda"):
        return calls
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def through(backend):
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v)

    calls["cuDNN x density"] = lambda: through(SDPBackend.CUDNN_ATTENTION)
    calls["FA2 in torch x density"] = lambda: through(SDPBackend.FLASH_ATTENTION)
    bshd = [t.transpose(1, 2) for t in (q, k, v)]
    for name, module, package in FLASH:
        calls[f"{name} x density"] = lambda m=module, p=package: _flash(m, p)(*bshd).transpose(1, 2)
    return calls


# Name in the table, module and package of each flash_attn_func; all take [B, S, H, D].
FLASH = (
    ("FA2", "flash_attn", "flash-attn"),
    ("FA3", "flash_attn_interface", "flash-attn-3 (hopper/ of flash-attention)"),
    ("FA4", "flash_attn.cute", "flash-attn-4"),
)


@lru_cache
def _flash(module: str, package: str) -> Callable:
    function = needed(module, "flash_attn_func", package)
    return lambda q, k, v: _first(function(q, k, v))


# ---------------------------------------------------------------------------------------------------------
# Peers that skip blocks. Each takes q, k, v, counts, lists, kwargs and returns a call, or raises NotHere. One
# that does less than we do returns (call, share of our pairs that it computes).
# ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(q, k, v, counts, lists, kwargs) -> Call:
    """FlexAttention, compiled, with the same lists as full blocks of a BlockMask."""
    from torch.nn.attention.flex_attention import BlockMask

    if "q_offsets" in kwargs or "kv_offsets" in kwargs:
        raise NotHere("a BlockMask has uniform blocks only")
    used = torch.arange(lists.shape[-1], device=lists.device) < counts[..., None]
    full = torch.where(used, lists, 0)
    # As wide as there are key blocks: torch then compiles once for all densities.
    full = torch.nn.functional.pad(full, (0, -(-k.shape[2] // kwargs["kv_block_size"]) - full.shape[-1]))
    full = full.contiguous()
    mask = BlockMask.from_kv_blocks(
        torch.zeros_like(counts),
        torch.zeros_like(full),
        counts,
        full,
        BLOCK_SIZE=(kwargs["q_block_size"], kwargs["kv_block_size"]),
        seq_lengths=(q.shape[2], k.shape[2]),
    )
    function = _compiled_flex()
    return lambda: function(q, k, v, block_mask=mask, scale=kwargs.get("scale"))


def _blocks(q, k, v, counts, lists, kwargs) -> tuple[Tensor, Tensor, Tensor]:
    """What variable-block libraries want: bool mask [B, H, nQ, nKV], sizes int32 [B, H, nQ] and [B, H, nKV]."""
    from bench_attention import block_sizes

    batch, heads = q.shape[:2]
    q_sizes = block_sizes(kwargs.get("q_offsets"), kwargs.get("q_block_size", 0), q.shape[2], q.device)
    kv_sizes = block_sizes(kwargs.get("kv_offsets"), kwargs.get("kv_block_size", 0), k.shape[2], q.device)
    mask = mask_from_lists(counts, lists, kv_sizes.shape[-1])
    sizes = [t.expand(batch, heads, -1).int().contiguous() for t in (q_sizes, kv_sizes)]
    return mask.expand(batch, heads, -1, -1).contiguous(), *sizes


def _flashinfer(q, k, v, counts, lists, kwargs) -> tuple[Callable[[], None], Call]:
    """FlashInfer's variable blocks: its plan() and its run(). Making the bool mask is left out of both."""
    name = "VariableBlockSparseAttentionWrapper"
    make = needed("flashinfer.sparse", name, "flashinfer-python")
    heads = q.shape[1]
    if q.shape[0] != 1:
        raise NotHere("takes one batch entry")
    mask, q_sizes, kv_sizes = (t[0] for t in _blocks(q, k, v, counts, lists, kwargs))
    hsd = [t[0].contiguous() for t in (q, k, v)]
    wrapper = make(torch.empty(2**28, dtype=torch.uint8, device=q.device), backend="auto")

    def plan() -> None:
        wrapper.plan(
            block_mask_map=mask,
            block_row_sz=q_sizes,
            block_col_sz=kv_sizes,
            num_qo_heads=heads,
            num_kv_heads=heads,
            head_dim=q.shape[3],
            sm_scale=kwargs.get("scale"),
            q_data_type=q.dtype,
        )

    return plan, lambda: wrapper.run(*hsd)[None]


def flashinfer(q, k, v, counts, lists, kwargs) -> Call:
    """With plan(), since the lists are new at every step."""
    plan, run = _flashinfer(q, k, v, counts, lists, kwargs)

    def call() -> Tensor:
        plan()
        return run()

    return call


def flashinfer_run(q, k, v, counts, lists, kwargs) -> Call:
    """Without plan(): what its kernel alone takes."""
    plan, run = _flashinfer(q, k, v, counts, lists, kwargs)
    plan()
    return run


def flashinfer_sm90(q, k, v, counts, lists, kwargs):
    """FlashInfer's 64 x 64 blocks for compute capability 9.0 (pull request 5326), without plan().

    It takes whole blocks only, so the ragged last block of queries and that of keys are left out. The kernel
    for 9.0 in released FlashInfer ("cake") lists at most 64 key blocks a row, fewer than any density here asks.
    """
    if kwargs.get("q_block_size") != 64 or kwargs.get("kv_block_size") != 64:
        raise NotHere("has blocks of 64 only")
    make = needed("flashinfer.sparse", "BlockSparseAttentionWrapper", "flashinfer-python")
    if q.shape[0] != 1:
        raise NotHere("takes one batch entry")
    heads, dim = q.shape[1], q.shape[3]
    whole_q, whole_kv = q.shape[2] // 64, k.shape[2] // 64
    mask, q_sizes, kv_sizes = (t[0] for t in _blocks(q, k, v, counts, lists, kwargs))
    pairs = (mask * kv_sizes[:, None]).sum(-1).mul(q_sizes).sum()
    mask = mask[:, :whole_q, :whole_kv].contiguous()
    share = float(mask.sum() * 64 * 64 / pairs)
    nhd = [
        t[0, :, : n * 64].transpose(0, 1).contiguous() for t, n in ((q, whole_q), (k, whole_kv), (v, whole_kv))
    ]
    backend = "vsa_sm90_blk64"
    wrapper = make(torch.empty(2**27, dtype=torch.uint8, device=q.device), backend=backend)
    try:
        wrapper.plan(
            None, None, whole_q * 64, whole_kv * 64, 64, 64, heads, heads, dim,
            sm_scale=kwargs.get("scale"), q_data_type=q.dtype, o_data_type=q.dtype, block_mask=mask,
        )  # fmt: skip
    except Exception as error:
        raise NotHere(f"this FlashInfer does not take the backend {backend}: {type(error).__name__}") from error
    return (lambda: wrapper.run(*nhd).transpose(0, 1)[None]), share


def block_sparse_attn(q, k, v, counts, lists, kwargs) -> Call:
    """mit-han-lab's Block-Sparse-Attention: blocks of 128."""
    if kwargs.get("q_block_size") != 128 or kwargs.get("kv_block_size") != 128:
        raise NotHere("has blocks of 128 only")
    function = needed("block_sparse_attn", "block_sparse_attn_func", "block-sparse-attn")
    batch, heads, seqlen, dim = q.shape
    nkv = -(-k.shape[2] // 128)
    mask = mask_from_lists(counts, lists, nkv).expand(batch, heads, -1, -1).contiguous()
    rows = [t.transpose(1, 2).reshape(-1, heads, dim) for t in (q, k, v)]
    starts = [torch.arange(batch + 1, device=q.device, dtype=torch.int32) * t.shape[2] for t in (q, k)]
    head_type = torch.ones(heads, device=q.device, dtype=torch.int32)
    scale = kwargs.get("scale")

    def call() -> Tensor:
        sizes = seqlen, k.shape[2], 0.0
        out = function(*rows, *starts, head_type, None, mask, *sizes, softmax_scale=scale)
        return _first(out).view(batch, seqlen, heads, dim).transpose(1, 2)

    return call


def svg_triton(q, k, v, counts, lists, kwargs) -> Call:
    """Sparse-VideoGen's Triton kernel for variable blocks."""
    function = needed("svg.kmeans_utils", "dynamic_block_sparse_fwd_triton", "Sparse-VideoGen (svg)")
    if q.shape[2] != k.shape[2]:
        raise NotHere("takes as many queries as keys")
    if kwargs.get("scale") not in (None, q.shape[3] ** -0.5):
        raise NotHere("takes no scale")
    blocks = _blocks(q, k, v, counts, lists, kwargs)
    return lambda: function(q, k, v, *blocks)


def fa4_blocks(q, k, v, counts, lists, kwargs) -> Call:
    """FA4's block sparsity, with the lists as full blocks of 128."""
    if kwargs.get("q_block_size") != 128 or kwargs.get("kv_block_size") != 128:
        raise NotHere("is tried with blocks of 128 only")
    function = needed("flash_attn.cute", "flash_attn_func", "flash-attn-4")
    tensors = needed("flash_attn.cute.block_sparsity", "BlockSparseTensorsTorch", "flash-attn-4")
    batch, heads = q.shape[:2]
    keep = mask_from_lists(counts, lists, -(-k.shape[2] // 128)).expand(batch, heads, -1, -1)
    full_counts, full_lists = (t.contiguous() for t in lists_from_mask(keep))
    blocks = tensors(
        mask_block_cnt=torch.zeros_like(full_counts),
        mask_block_idx=torch.zeros_like(full_lists),
        full_block_cnt=full_counts,
        full_block_idx=full_lists,
        block_size=(128, 128),
    )
    bshd = [t.transpose(1, 2) for t in (q, k, v)]
    scale = kwargs.get("scale")
    return lambda: _first(function(*bshd, softmax_scale=scale, block_sparse_tensors=blocks)).transpose(1, 2)


def sparse(device: str) -> dict[str, Callable[..., Call]]:
    """Makers of the sparse peers that a device may have, by name."""
    makers = {"FlexAttention": flex}
    if device.startswith("cuda"):
        makers |= {
            "FlashInfer with plan()": flashinfer,
            "FlashInfer without plan()": flashinfer_run,
            "FlashInfer sm90 64x64 without plan()": flashinfer_sm90,
            "block_sparse_attn": block_sparse_attn,
            "SVG2 Triton": svg_triton,
            "FA4 blocks": fa4_blocks,
        }
    return makers
