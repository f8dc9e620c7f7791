"""What a sparse-attention method returns and what it is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .. import ops


@dataclass(frozen=True)
class TokenLayout:
    """Where the tokens of a self-attention sequence come from.

    Attributes:
        grid: latent frames, rows and columns after patchify; the video tokens are in that order, columns
            fastest.
        text_len: text tokens in the sequence, padding included (0 where text has its own cross attention).
        text_valid: how many of them are real; None means all. Padding stands at the end of the text.
        text_first: text before the video (CogVideoX) instead of after it (HunyuanVideo).
    """

    grid: tuple[int, int, int]
    text_len: int = 0
    text_valid: int | None = None
    text_first: bool = False

    @property
    def num_video(self) -> int:
        """Number of video tokens."""
        frames, rows, columns = self.grid
        return frames * rows * columns

    @property
    def num_tokens(self) -> int:
        """Length of the sequence."""
        return self.num_video + self.text_len


@dataclass(frozen=True)
class StepInfo:
    """Where in the sampling a model call stands; read by the root hook once per call.

    Attributes:
        step: index of the denoising step, from 0.
        num_steps: how many there will be; None when nobody said.
        timestep: the model's timestep input, 0 to 1000.
        num_layers: attention layers that the method is bound to.
        branch: "cond", "uncond" or "batched": which classifier-free-guidance branch this call is.
    """

    step: int
    num_steps: int | None
    timestep: float
    num_layers: int
    branch: str = "cond"


@dataclass(frozen=True)
class BlockPlan:
    """Which key blocks each query block attends to, and in which token order blocks are contiguous.

    Attributes:
        kv_num_blocks: int32 ``[B|1, H|1, nQ]``.
        kv_indices: int32 ``[B|1, H|1, nQ, W]``.
        q_offsets, kv_offsets: int32 ``[B|1, H|1, n+1]`` boundaries of variable blocks, None for uniform ones.
        q_block_size, kv_block_size: uniform block sizes, unused with offsets.
        q_index, kv_index: int32 ``[B|1, H|1, S]``; row i of the permuted sequence is token ``index[i]``.
            None means that the tokens are in order already.
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    q_offsets: Tensor | None = None
    kv_offsets: Tensor | None = None
    q_block_size: int = 128
    kv_block_size: int = 128
    q_index: Tensor | None = None
    kv_index: Tensor | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> tuple[Tensor, Tensor]:
        """Attention under this plan, in the callers' token order.

        Args:
            q: ``[B, H, Sq, D]``; k, v: ``[B, H, Skv, D]``.

        Returns:
            ``out`` ``[B, H, Sq, D]`` and ``lse`` fp32 ``[B, H, Sq]``.
        """
        if self.q_index is not None:
            q = ops.permute_rows(q, self.q_index)
        if self.kv_index is not None:
            k, v = ops.permute_rows(k, self.kv_index), ops.permute_rows(v, self.kv_index)
        out, lse = ops.block_sparse_attention(
            q,
            k,
            v,
            self.kv_num_blocks,
            self.kv_indices,
            q_offsets=self.q_offsets,
            kv_offsets=self.kv_offsets,
            q_block_size=self.q_block_size,
            kv_block_size=self.kv_block_size,
            scale=scale,
        )
        if self.q_index is not None:
            out = ops.unpermute_rows(out, self.q_index)
            lse = ops.unpermute_rows(lse[..., None], self.q_index)[..., 0]
        return out, lse

    def block_sizes(self, seqlen_q: int, seqlen_kv: int) -> tuple[Tensor, Tensor]:
        """Sizes in tokens of the query and key blocks, int64 ``[B|1, H|1, n]`` each."""
        return (
            _sizes(self.q_offsets, self.q_block_size, seqlen_q, self.kv_num_blocks.device),
            _sizes(self.kv_offsets, self.kv_block_size, seqlen_kv, self.kv_num_blocks.device),
        )

    def density(self, seqlen_q: int, seqlen_kv: int) -> Tensor:
        """Kept share of the query-key pairs, fp32 ``[B|1, H|1]`` in 0..1."""
        q_sizes, kv_sizes = self.block_sizes(seqlen_q, seqlen_kv)
        slots = torch.arange(self.kv_indices.shape[-1], device=self.kv_indices.device)
        used = slots < self.kv_num_blocks[..., None]
        rows = kv_sizes[..., None, :].expand(*self.kv_indices.shape[:3], -1)
        kept = (rows.gather(-1, self.kv_indices.long()) * used).sum(-1)
        return ((kept * q_sizes).sum(-1).double() / max(1, seqlen_q * seqlen_kv)).float()


def _sizes(offsets: Tensor | None, block_size: int, length: int, device: torch.device) -> Tensor:
    if offsets is not None:
        return offsets.long().diff(dim=-1)
    starts = torch.arange(0, length, block_size, device=device)
    return (length - starts).clamp(max=block_size)[None, None]


@runtime_checkable
class SparseMethod(Protocol):
    """A sparse-attention method: a frozen dataclass of settings with these methods.

    Everything that lives across steps is in the state object, one per attention layer, so that one method
    object can serve several models. ``plan`` runs inside compiled regions: it may call only tensor ops, and
    must not branch on the layer, the step, or tensor values.
    """

    name: str

    def is_dense(self, info: StepInfo, layer: int) -> bool:
        """Whether this layer runs dense attention at this step. Host-side, no tensors."""

    def new_state(self, layer: int, num_layers: int) -> Any:
        """Fresh state for one attention layer of a model."""

    def plan(self, q: Tensor, k: Tensor, layout: TokenLayout, state: Any) -> BlockPlan:
        """The plan for one attention call; q and k ``[B, H, S, D]`` after norm and RoPE."""

    def observe(self, q: Tensor, k: Tensor, layout: TokenLayout, state: Any) -> None:
        """Called instead of ``plan`` in dense steps when ``observes_dense_steps`` is true."""

    observes_dense_steps: bool

    def token_order(self, layout: TokenLayout) -> Tensor | None:
        """int32 ``[S]`` permutation that the model may apply once, before its first layer, or None.

        When a caller applies it, it passes ``plan`` tokens in that order and ``plan`` must not permute
        again: the state's ``tokens_permuted`` says so.
        """

    def reset(self, state: Any) -> None:
        """Forget everything learned from an earlier video."""
