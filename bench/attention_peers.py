"""Other people's attention, called on our tensors; whatever is not here is absent with its reason."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vdit_ext.ops import mask_from_lists

Call = Callable[[], Tensor]


def dense(q: Tensor, k: Tensor, v: Tensor, device: str) -> dict[str, Call]:
    """Dense attention, by name; each is compared with at the kept density."""
    calls: dict[str, Call] = {"SDPA x density": lambda: scaled_dot_product_attention(q, k, v)}
    if not device.startswith("cuda"):
        return calls
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def through(backend):
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v)

    calls["cuDNN x density"] = lambda: through(SDPBackend.CUDNN_ATTENTION)
    calls["FA2 in torch x density"] = lambda: through(SDPBackend.FLASH_ATTENTION)
    bshd = [t.transpose(1, 2) for t in (q, k, v)]
    for name, module in (("flash_attn x density", "flash_attn"), ("FA3 x density", "flash_attn_interface")):
        if (function := _import(module, "flash_attn_func")) is not None:
            calls[name] = lambda f=function: _first(f(*bshd)).transpose(1, 2)
    return calls


def _import(module: str, name: str):
    try:
        return getattr(__import__(module, fromlist=[name]), name)
    except Exception:
        return None


def _first(result):
    return result[0] if isinstance(result, tuple) else result


# ---------------------------------------------------------------------------------------------------------
# Peers that skip blocks: each takes q, k, v, counts, lists, kwargs and returns a call, or raises its reason
# ---------------------------------------------------------------------------------------------------------


class NotHere(Exception):
    """Why a peer cannot run a case."""


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
    full = torch.where(used, lists, 0).contiguous()
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


def flashinfer(q, k, v, counts, lists, kwargs) -> Call:
    """FlashInfer's variable blocks; plan() belongs to the time, since the mask is new at every step."""
    from bench_attention import block_sizes
    from flashinfer.sparse import VariableBlockSparseAttentionWrapper

    heads = q.shape[1]
    if q.shape[0] != 1:
        raise NotHere("takes one batch entry")
    q_sizes = block_sizes(kwargs.get("q_offsets"), kwargs.get("q_block_size", 0), q.shape[2], q.device)
    kv_sizes = block_sizes(kwargs.get("kv_offsets"), kwargs.get("kv_block_size", 0), k.shape[2], q.device)
    q_sizes, kv_sizes = (t[0].expand(heads, -1).int().contiguous() for t in (q_sizes, kv_sizes))
    mask = mask_from_lists(counts, lists, kv_sizes.shape[-1])[0].expand(heads, -1, -1).contiguous()
    hsd = [t[0].contiguous() for t in (q, k, v)]
    wrapper = VariableBlockSparseAttentionWrapper(
        torch.empty(2**28, dtype=torch.uint8, device=q.device), backend="auto"
    )

    def call() -> Tensor:
        wrapper.plan(
            block_mask_map=mask,
            block_row_sz=q_sizes,
            block_col_sz=kv_sizes,
            num_qo_heads=heads,
            num_kv_heads=heads,
            head_dim=q.shape[3],
            q_data_type=q.dtype,
        )
        return wrapper.run(*hsd)[None]

    return call


def block_sparse_attn(q, k, v, counts, lists, kwargs) -> Call:
    """mit-han-lab's Block-Sparse-Attention: blocks of 128."""
    from block_sparse_attn import block_sparse_attn_func

    if kwargs.get("q_block_size") != 128 or kwargs.get("kv_block_size") != 128:
        raise NotHere("has blocks of 128 only")
    batch, heads, seqlen, dim = q.shape
    nkv = -(-k.shape[2] // 128)
    mask = mask_from_lists(counts, lists, nkv).expand(batch, heads, -1, -1).contiguous()
    rows = [t.transpose(1, 2).reshape(-1, heads, dim) for t in (q, k, v)]
    starts = [torch.arange(batch + 1, device=q.device, dtype=torch.int32) * t.shape[2] for t in (q, k)]
    head_type = torch.ones(heads, device=q.device, dtype=torch.int32)

    def call() -> Tensor:
        out = block_sparse_attn_func(*rows, *starts, head_type, None, mask, seqlen, k.shape[2], 0.0)
        return _first(out).view(batch, seqlen, heads, dim).transpose(1, 2)

    return call


def sparse(device: str) -> dict[str, Callable[..., Call]]:
    """Makers of the sparse peers that a device may have, by name."""
    makers = {"FlexAttention": flex}
    if device.startswith("cuda"):
        makers |= {"FlashInfer with plan()": flashinfer, "block_sparse_attn": block_sparse_attn}
    return makers
