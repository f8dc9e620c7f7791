"""Attention processors: upstream's projections, norms and rotary embedding, then dense or sparse attention.

A processor never holds a layer number that it indexes with, nor a step counter, because a compiled block would
be traced again for every value of them. What changes from call to call is written by the root hook: one boolean
``dense``, the ``layout`` and the ``state`` of the method.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from diffusers.hooks._helpers import AttentionProcessorMetadata, AttentionProcessorRegistry
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from .. import _C, ops
from ..ops.attention import HEAD_DIMS_CUDA, block_sparse_attention_naive, permute_rows_naive
from ..sparse.plan import BlockPlan, SparseMethod, TokenLayout

_CPU_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_CUDA_DTYPES = (torch.float16, torch.bfloat16)

# Rows of `SparseProcessor.stats`.
DENSE_CALLS, SPARSE_CALLS, DENSITY_SUM, FULL_FLOPS, DONE_FLOPS = range(5)


def kernel_gap(head_dim: int, dtype: torch.dtype, device_type: str) -> str | None:
    """What the sparse kernels would need and what they would get, or None when they can run."""
    if device_type == "cpu":
        if head_dim % 8 != 0 or not 8 <= head_dim <= 256:
            return f"head_dim must be a multiple of 8 up to 256 on cpu, got {head_dim}"
        if dtype not in _CPU_DTYPES:
            return f"dtype must be float32, float16 or bfloat16 on cpu, got {_name(dtype)}"
        return None
    if device_type == "cuda":
        if head_dim not in HEAD_DIMS_CUDA:
            return f"head_dim must be 64, 96 or 128 on cuda, got {head_dim}"
        if dtype not in _CUDA_DTYPES:
            return f"dtype must be float16 or bfloat16 on cuda, got {_name(dtype)}"
        return None
    return f"device must be cpu or cuda, got {device_type}"


def device_gap(device: torch.device) -> str | None:
    """Why no kernel can run on a device whatever the shapes, or None."""
    if device.type != "cuda":
        return None
    if (state := ops.LIBRARIES["cuda"]) != "loaded":
        return f"the CUDA library must be loaded for {device}, it was {state}"
    if not torch.cuda.is_available():  # such as for a module that only says it is on a GPU
        return f"a GPU and a driver for it must be there for {device}, torch sees none"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"compute capability must be 8.0 or higher, {device} has {major}.{minor}"
    return None


def kernel_name(device: torch.device) -> str:
    """Which attention kernel serves a device: "cpu", "sm90" where it was asked for and can run, else "sm80"."""
    if device.type != "cuda":
        return "cpu"
    asked = os.environ.get("VDIT_ATTENTION_KERNEL") == "sm90"
    built = any(arch.startswith("90a") for arch in _C.build_info()["cuda_archs"])
    return "sm90" if asked and built and torch.cuda.get_device_capability(device) == (9, 0) else "sm80"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding on neighbouring channel pairs.

    Args:
        x: ``[B, S, H, D]``.
        cos, sin: ``[1, S, 1, D]``, every value twice. The arithmetic is in the wider of the two dtypes.

    Returns:
        ``[B, S, H, D]`` in x's dtype, contiguous.
    """
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = odd * cos + even * sin
    return out


def can_norm_and_rotate(
    norm: torch.nn.Module, x: Tensor, heads: int, rotary_emb: tuple[Tensor, Tensor] | None
) -> bool:
    """Whether :func:`norm_and_rotate` stands for ``rotate_pairs(norm(x))`` on ``x [B, S, H * D]``.

    It does for torch's own RMSNorm over all heads, which nothing hooks into, quantizes or trains, and for
    tables in the form that ``WanRotaryPosEmbed`` gives.
    """
    plain = (
        type(norm) is torch.nn.RMSNorm
        and norm.eps is not None
        and tuple(norm.normalized_shape) == (x.shape[2],)
        # Offloading and the like replace `forward` instead of registering a hook.
        and not (norm._forward_hooks or norm._forward_pre_hooks or "forward" in norm.__dict__)
    )
    if not plain:
        return False
    weight = norm.weight
    if weight is not None:
        trained = weight.requires_grad and torch.is_grad_enabled()
        if trained or type(weight) is not torch.nn.Parameter or not _goes_with(weight, x):
            return False
    if rotary_emb is None:
        return True
    form = (1, x.shape[1], 1, x.shape[2] // heads)
    cos, sin = rotary_emb
    return cos.dtype == sin.dtype and all(
        tuple(t.shape) == form and t.stride(3) == 1 and _goes_with(t, x) for t in rotary_emb
    )


def _goes_with(t: Tensor, x: Tensor) -> bool:
    return t.device == x.device and t.dtype in (torch.float32, x.dtype)


def norm_and_rotate(
    norm: torch.nn.RMSNorm, x: Tensor, heads: int, rotary_emb: tuple[Tensor, Tensor] | None
) -> Tensor:
    """``rotate_pairs(norm(x))`` in one pass over memory, rounded once, where upstream's several round each.

    Args:
        x: ``[B, S, H * D]``.
        rotary_emb: cos and sin ``[1, S, 1, D]``, every value twice; None for the norm alone.

    Returns:
        ``[B, S, H, D]`` in x's dtype.
    """
    cos, sin = (None, None) if rotary_emb is None else (t.transpose(1, 2) for t in rotary_emb)
    x = x.unflatten(2, (heads, -1)).transpose(1, 2)
    return ops.rms_norm_rope(x, norm.weight, cos, sin, across_heads=True, eps=norm.eps).transpose(1, 2)


def attend_naive(plan: BlockPlan, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention under a plan by the ops' definitions, ``[B, H, S, D]`` in, out; any dtype and head size."""
    if plan.kv_index is not None:
        k, v = permute_rows_naive(k, plan.kv_index), permute_rows_naive(v, plan.kv_index)
    out, _ = block_sparse_attention_naive(
        q,
        k,
        v,
        plan.kv_num_blocks,
        plan.kv_indices,
        q_offsets=plan.q_offsets,
        kv_offsets=plan.kv_offsets,
        q_index=plan.q_index,
        q_block_size=plan.q_block_size,
        kv_block_size=plan.kv_block_size,
    )
    return out


class SparseProcessor:
    """What the processors of all models share: the switch between dense and sparse, refusals, counting.

    Attributes:
        method: the sparse method, None for attention that is dense throughout.
        where: name of the attention module, for messages.
        dense: whether the next call is dense; written by the root hook.
        layout: where the tokens come from; written by the root hook.
        state: the method's state for this layer; written by the root hook.
        stats: fp64 ``[5]`` counters on the query's device, or None when nothing is counted.
        device_gap: why the device cannot run the kernels, None when it can; written by the root hook.
        reason: why the last call did not get the kernels, None when it did.
        ran_dense: whether the last call was dense, by the method or by ``on_unsupported``; None before it,
            which the root hook writes.
        ran_on: device of the last call that got the kernels, None before one. Where layers are offloaded,
            weights lie elsewhere between calls.
    """

    # diffusers writes to both: set_attention_backend to the first, enable_parallelism to the second.
    _attention_backend = None
    _parallel_config = None

    def __init__(self, method: SparseMethod | None, where: str, on_unsupported: str):
        self.method = method
        self.where = where
        self.on_unsupported = on_unsupported
        self.dense = True
        self.layout: TokenLayout | None = None
        self.state: Any = None
        self.stats: Tensor | None = None
        self.device_gap: str | None = None
        self.reason: str | None = None
        self.ran_dense: bool | None = None
        self.ran_on: torch.device | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Self-attention on ``[B, S, H, D]`` tensors after norm and rotary embedding; returns the same shape.

        Raises:
            ValueError: a sentence, when the kernels cannot serve the call and ``on_unsupported`` is "error".
        """
        policy = self.refuse(query, key, value, mask)
        if self.method is None or policy == "dense":
            return self.attend_dense(query, key, value, mask)
        # Autocast norms are fp32; upstream's attention would narrow q and k again, as is done here.
        q, k = query.to(value.dtype).transpose(1, 2), key.to(value.dtype).transpose(1, 2)  # [b, h, s, d] views
        v = value.transpose(1, 2)
        if self.dense:
            if self.method.observes_dense_steps and self.state is not None:
                if policy == "reference":
                    self.method.observe(q.float(), k.float(), self.layout, self.state)
                else:
                    self.method.observe(q, k, self.layout, self.state)
            return self.attend_dense(query, key, value, mask)
        self.ran_dense = False
        if policy == "reference":
            plan = self.plan(q.float(), k.float(), v.float())
            out = attend_naive(plan, q, k, v)
        else:
            self.ran_on = q.device
            plan = self.plan(q, k, v)
            out = plan.attend(q, k, v, return_lse=False)
        self.count(q, plan)
        return out.transpose(1, 2)

    def plan(self, q: Tensor, k: Tensor, v: Tensor):
        """The method's plan for this call; methods that judge by the output (SVG1) are shown the values too."""
        if getattr(self.method, "wants_values", False):
            return self.method.plan(q, k, self.layout, self.state, v=v)
        return self.method.plan(q, k, self.layout, self.state)

    def attend_dense(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Upstream's own attention, bit for bit, on ``[B, S, H, D]`` tensors."""
        self.ran_dense = True
        self.count(query.transpose(1, 2), None)
        return dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=0.0,
            is_causal=False,
            backend=self._attention_backend,
            parallel_config=None,
        )

    def gap(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> str | None:
        """Why the kernels cannot serve this call, or None; of ``query`` and ``key`` any shape will do."""
        if mask is not None:
            return f"attention_mask must be None for sparse attention, got a mask of shape {list(mask.shape)}"
        gap = self.device_gap or kernel_gap(value.shape[-1], value.dtype, value.device.type)
        if gap is None and (query.requires_grad or key.requires_grad or value.requires_grad):
            gap = "gradients must not be asked for, call the model under torch.no_grad()"
        return gap

    def refuse(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> str:
        """The word "kernel", or the policy where the kernels cannot serve this call; "error" raises."""
        if self.method is None:
            return "kernel"
        self.reason = gap = self.gap(query, key, value, mask)
        if gap is None:
            return "kernel"
        if self.on_unsupported == "error" or (self.on_unsupported == "reference" and mask is not None):
            raise ValueError(f"vdit_ext: {self.where}: {gap}")
        return self.on_unsupported

    def count(self, q: Tensor, plan: BlockPlan | None) -> None:
        """Add one call to the counters, on the device and without waiting for it; q ``[B, H, S, D]``."""
        if self.stats is None:
            return
        length = q.shape[2]
        flops = 4 * q.numel() * length  # two products of S x S x D per head, two operations a multiply-add
        self.stats[FULL_FLOPS].add_(flops)
        if plan is None:
            self.stats[DENSE_CALLS].add_(1)
            self.stats[DONE_FLOPS].add_(flops)
            return
        # The methods of the package have computed the same for their log; the plan remembers it.
        density = plan.density(length, length).mean(dtype=torch.float64).to(self.stats.device)
        self.stats[SPARSE_CALLS].add_(1)
        self.stats[DENSITY_SUM].add_(density)
        self.stats[DONE_FLOPS].add_(density * flops)


class WanSelfAttentionProcessor(SparseProcessor):
    """Self-attention of ``WanAttention``: norm over all heads, rotary pairs, video tokens only.

    Calls that the sparse kernels serve norm and rotate q and k in one pass (``ops.rms_norm_rope``), wherever
    :func:`can_norm_and_rotate` says that it stands for what upstream does; q and k then differ by rounding, as
    they are rounded once. All other calls, dense ones among them, do what upstream does, bit for bit.
    """

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """``hidden_states`` ``[B, S, H * D]`` to the same shape; tables ``[1, S, 1, D]``.

        Raises:
            ValueError: a sentence, for other keys than the queries' own tokens, or as :meth:`attend` does.
        """
        if encoder_hidden_states is not None:
            raise ValueError(f"vdit_ext: {self.where}: encoder_hidden_states must be None for self-attention")
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        value = value.unflatten(2, (attn.heads, -1))
        if self.fuses(attn, query, key, value, attention_mask, rotary_emb):
            query = norm_and_rotate(attn.norm_q, query, attn.heads, rotary_emb)
            key = norm_and_rotate(attn.norm_k, key, attn.heads, rotary_emb)
        else:
            query, key = attn.norm_q(query), attn.norm_k(key)
            query, key = (x.unflatten(2, (attn.heads, -1)) for x in (query, key))
            if rotary_emb is not None:
                query, key = rotate_pairs(query, *rotary_emb), rotate_pairs(key, *rotary_emb)
        out = self.attend(query, key, value, attention_mask)
        out = out.flatten(2, 3).type_as(query)
        return attn.to_out[1](attn.to_out[0](out))

    def fuses(
        self,
        attn: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        rotary_emb: tuple[Tensor, Tensor] | None,
    ) -> bool:
        """Whether norm and rotation may be one pass; q and k ``[B, S, H * D]``, value ``[B, S, H, D]``."""
        if self.method is None or self.dense or self.gap(query, key, value, mask) is not None:
            return False
        return query.dtype == key.dtype == value.dtype and all(
            can_norm_and_rotate(norm, x, attn.heads, rotary_emb)
            for norm, x in ((attn.norm_q, query), (attn.norm_k, key))
        )


def _skipped_output(attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


# Upstream's caches and layer skipping look processors up by class.
AttentionProcessorRegistry.register(
    WanSelfAttentionProcessor, AttentionProcessorMetadata(skip_processor_output_fn=_skipped_output)
)
