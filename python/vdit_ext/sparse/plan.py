"""What a sparse-attention method returns and what it is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, overload, runtime_checkable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, noop_mask

from .. import ops


@dataclass(frozen=True)
class TokenLayout:
    """Where the tokens of a self-attention sequence come from.

    Attributes:
        grid: latent frames, rows and columns after patchify; the video tokens are in that order, columns
            fastest.
        text_len: text tokens in the sequence, padding included (0 where text has its own cross attention).
        text_valid: how many of them are real, for the whole batch or one number for each batch entry; None
            means all. Padding stands at the end of the text.
        text_first: text before the video (CogVideoX) instead of after it (HunyuanVideo).

    Raises:
        ValueError: one sentence, when a size is negative or more text is valid than there is.
    """

    grid: tuple[int, int, int]
    text_len: int = 0
    text_valid: int | tuple[int, ...] | None = None
    text_first: bool = False

    def __post_init__(self) -> None:
        if len(self.grid) != 3 or min(self.grid) < 1:
            raise ValueError(
                f"TokenLayout: grid must be three sizes of at least 1 (frames, rows, columns), got {self.grid}"
            )
        if self.text_len < 0:
            raise ValueError(f"TokenLayout: text_len must be at least 0, got {self.text_len}")
        valid = (self.text_valid,) if isinstance(self.text_valid, int) else self.text_valid or ()
        for count in valid:
            if not 0 <= count <= self.text_len:
                raise ValueError(
                    f"TokenLayout: text_valid must lie between 0 and text_len = {self.text_len}, got "
                    f"{self.text_valid}; count the real text tokens of each prompt"
                )

    @property
    def num_video(self) -> int:
        """Number of video tokens."""
        frames, rows, columns = self.grid
        return frames * rows * columns

    @property
    def num_tokens(self) -> int:
        """Length of the sequence."""
        return self.num_video + self.text_len

    @property
    def video_start(self) -> int:
        """Index of the first video token."""
        return self.text_len if self.text_first else 0

    @property
    def has_padding(self) -> bool:
        """Whether the text may hold padding, which then gets a block of its own."""
        return self.text_len > 0 and self.text_valid is not None

    @property
    def shape_key(self) -> tuple:
        """What must stay the same for things learned from this layout to fit another one.

        The number of valid text tokens is not part of it: guidance branches differ in that alone.
        """
        return self.grid, self.text_len, self.text_first

    def video(self, x: Tensor) -> Tensor:
        """The video rows of ``x [B, H, S, D]``, as a view ``[B, H, num_video, D]``."""
        return x.narrow(2, self.video_start, self.num_video) if self.text_len else x

    def check(self, q: Tensor, k: Tensor, who: str) -> None:
        """Raise ValueError, in one sentence that starts with ``who``, when q or k do not fit this layout."""
        if q.shape[2] != k.shape[2]:
            raise ValueError(
                f"{who}: self-attention needs as many queries as keys, got {q.shape[2]} and {k.shape[2]}; "
                "leave cross-attention dense"
            )
        if q.shape[2] != self.num_tokens:
            raise ValueError(
                f"{who}: the layout {self.grid} with {self.text_len} text tokens has {self.num_tokens} tokens, "
                f"got {q.shape[2]}; pass the grid after patchify"
            )
        if isinstance(self.text_valid, tuple) and len(self.text_valid) != q.shape[0]:
            raise ValueError(
                f"{who}: text_valid must hold one number for each of the {q.shape[0]} batch entries, got "
                f"{len(self.text_valid)}; use one int when all are equal"
            )


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


@dataclass(frozen=True, repr=False)
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
    # What `density` has computed: (seqlen_q, seqlen_kv, density). A list, because to look a length up in a dict
    # makes compiled code anew for every length.
    _densities: list[tuple[int, int, Tensor]] = field(default_factory=list, init=False, compare=False)

    @overload
    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, return_lse: Literal[True] = True
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, return_lse: Literal[False]
    ) -> Tensor: ...

    def attend(self, q, k, v, *, scale=None, return_lse=True):
        """Attention under this plan, in the callers' token order.

        Args:
            q: ``[B, H, Sq, D]``; k, v: ``[B, H, Skv, D]``.
            return_lse: False spares putting ``lse`` into that order, for callers who do not merge results.

        Returns:
            ``out`` ``[B, H, Sq, D]`` and ``lse`` fp32 ``[B, H, Sq]``; ``out`` alone without ``return_lse``.
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
        if not return_lse:
            return out
        if self.q_index is not None:
            lse = ops.unpermute_rows(lse[..., None], self.q_index)[..., 0]
        return out, lse

    def block_sizes(self, seqlen_q: int, seqlen_kv: int) -> tuple[Tensor, Tensor]:
        """Sizes in tokens of the query and key blocks, int64 ``[B|1, H|1, n]`` each."""
        return (
            _sizes(self.q_offsets, self.q_block_size, seqlen_q, self.kv_num_blocks.device),
            _sizes(self.kv_offsets, self.kv_block_size, seqlen_kv, self.kv_num_blocks.device),
        )

    def kept_pairs(self, seqlen_q: int, seqlen_kv: int, *, tile_q: int = 1, tile_kv: int = 1) -> Tensor:
        """Query-key pairs that are computed, int64 ``[B|1, H|1]``.

        Args:
            tile_q, tile_kv: block sizes are first rounded up to multiples of these, which gives the pairs
                that a kernel of that tile size executes when a tile holds rows of one block only.
        """
        q_sizes, kv_sizes = self.block_sizes(seqlen_q, seqlen_kv)
        q_sizes = (q_sizes + tile_q - 1) // tile_q * tile_q
        kv_sizes = (kv_sizes + tile_kv - 1) // tile_kv * tile_kv
        slots = torch.arange(self.kv_indices.shape[-1], device=self.kv_indices.device)
        used = slots < self.kv_num_blocks[..., None]
        batch = max(kv_sizes.shape[0], self.kv_indices.shape[0])
        heads = max(kv_sizes.shape[1], self.kv_indices.shape[1])
        columns = kv_sizes[..., None, :].expand(batch, heads, self.kv_indices.shape[2], -1)
        lists = torch.where(used, self.kv_indices, 0).long().expand(batch, heads, -1, -1)
        kept = (columns.gather(-1, lists) * used).sum(-1)
        return (kept * q_sizes).sum(-1)

    def density(self, seqlen_q: int, seqlen_kv: int) -> Tensor:
        """Kept share of the query-key pairs, fp32 ``[B|1, H|1]`` in 0..1 (SVG2, section 4.6 of the spec).

        Computed once and remembered: the method's log and the caller's counters both ask.
        """
        for known_q, known_kv, density in self._densities:
            if known_q == seqlen_q and known_kv == seqlen_kv:
                return density
        density = (self.kept_pairs(seqlen_q, seqlen_kv).double() / max(1, seqlen_q * seqlen_kv)).float()
        self._densities.append((seqlen_q, seqlen_kv, density))
        return density

    def token_mask(self, seqlen_q: int, seqlen_kv: int) -> Tensor:
        """The plan as a bool mask ``[B, H, Sq, Skv]`` in the callers' token order; for tests and pictures."""
        q_sizes, kv_sizes = self.block_sizes(seqlen_q, seqlen_kv)
        keep = ops.mask_from_lists(self.kv_num_blocks, self.kv_indices, kv_sizes.shape[-1])
        parts = [t for t in (keep, q_sizes, kv_sizes, self.q_index, self.kv_index) if t is not None]
        batch, heads = max(t.shape[0] for t in parts), max(t.shape[1] for t in parts)
        keep = keep.expand(batch, heads, -1, -1)
        q_block = _block_of_row(q_sizes, seqlen_q).expand(batch, heads, -1)
        kv_block = _block_of_row(kv_sizes, seqlen_kv).expand(batch, heads, -1)
        if self.q_index is not None:
            index = self.q_index.long().expand(batch, heads, -1)
            q_block = torch.empty_like(q_block).scatter(-1, index, q_block)
        if self.kv_index is not None:
            index = self.kv_index.long().expand(batch, heads, -1)
            kv_block = torch.empty_like(kv_block).scatter(-1, index, kv_block)
        rows = keep.gather(2, q_block[..., None].expand(-1, -1, -1, keep.shape[-1]))
        return rows.gather(3, kv_block[..., None, :].expand(-1, -1, seqlen_q, -1))

    def to_block_mask(self, seqlen_q: int, seqlen_kv: int) -> BlockMask:
        """This plan as FlexAttention's ``BlockMask``, every listed block a full one.

        Raises:
            ValueError: one sentence, when the plan has variable blocks or permutes tokens, neither of which a
                ``BlockMask`` can say, or when a row lists a block twice or more blocks than there are. Finding
                that out reads the lists back, so this call waits for the device.
        """
        if self.q_offsets is not None or self.kv_offsets is not None:
            raise ValueError(
                "BlockPlan.to_block_mask: a BlockMask has uniform blocks only, got a plan with offsets; attend "
                "through BlockPlan.attend instead"
            )
        if self.q_index is not None or self.kv_index is not None:
            raise ValueError(
                "BlockPlan.to_block_mask: a BlockMask cannot permute tokens, got a plan with q_index or "
                "kv_index; permute the tokens yourself and pass a plan without them"
            )
        num_kv = -(-seqlen_kv // self.kv_block_size)
        width = self.kv_indices.shape[-1]
        limit = min(width, num_kv)
        if self.kv_num_blocks.numel() and int(self.kv_num_blocks.max()) > limit:
            raise ValueError(
                f"BlockPlan.to_block_mask: a row may list at most {limit} blocks, its width or as many as there"
                f" are, got {int(self.kv_num_blocks.max())}"
            )
        if self._lists_twice():
            raise ValueError(
                "BlockPlan.to_block_mask: a row may list each key block once, got a block listed twice, which a"
                " BlockMask cannot say"
            )
        if width > num_kv:
            # A list longer than the row of blocks has unused slots at its end.
            indices = self.kv_indices[..., :num_kv]
        else:
            indices = torch.nn.functional.pad(self.kv_indices, (0, num_kv - width))
        slots = torch.arange(num_kv, device=indices.device)
        indices = torch.where(slots < self.kv_num_blocks[..., None], indices, 0).contiguous()
        return BlockMask.from_kv_blocks(
            torch.zeros_like(self.kv_num_blocks),
            torch.zeros_like(indices),
            self.kv_num_blocks,
            indices,
            BLOCK_SIZE=(self.q_block_size, self.kv_block_size),
            seq_lengths=(seqlen_q, seqlen_kv),
        )

    @classmethod
    def from_block_mask(cls, mask: BlockMask) -> BlockPlan:
        """The plan of a FlexAttention ``BlockMask`` whose blocks are kept or dropped as a whole.

        Raises:
            ValueError: one sentence, when the mask has partial blocks under a ``mask_mod``, which block lists
                cannot say. Finding that out reads the counts back, so this call waits for the device.
        """
        num_kv = mask.kv_indices.shape[-1]
        if mask.mask_mod is not noop_mask and bool(mask.kv_num_blocks.any()):
            raise ValueError(
                "BlockPlan.from_block_mask: every block must be kept or dropped as a whole, got partial blocks "
                "under a mask_mod; choose block boundaries that follow the mask"
            )
        counts, indices = mask.kv_num_blocks, mask.kv_indices
        if mask.full_kv_num_blocks is not None:
            keep = ops.mask_from_lists(counts, indices, num_kv)
            keep = keep | ops.mask_from_lists(mask.full_kv_num_blocks, mask.full_kv_indices, num_kv)
            counts, indices = ops.lists_from_mask(keep)
        q_block_size, kv_block_size = mask.BLOCK_SIZE
        return cls(counts.int(), indices.int(), q_block_size=q_block_size, kv_block_size=kv_block_size)

    def validate(self, seqlen_q: int, seqlen_kv: int) -> BlockPlan:
        """Check everything the kernel relies on and return the plan; reads tensors back, for debugging.

        Raises:
            ValueError: one sentence that names the first thing that is wrong.
        """
        who = "BlockPlan.validate"
        counts, lists = self.kv_num_blocks, self.kv_indices
        if counts.dim() != 3 or lists.dim() != 4 or lists.shape[:3] != counts.shape:
            raise ValueError(
                f"{who}: kv_num_blocks must be [B|1, H|1, nQ] and kv_indices [B|1, H|1, nQ, W], got "
                f"{list(counts.shape)} and {list(lists.shape)}"
            )
        for name in ("kv_num_blocks", "kv_indices", "q_offsets", "kv_offsets", "q_index", "kv_index"):
            tensor = getattr(self, name)
            if tensor is not None and (tensor.dtype != torch.int32 or tensor.device != counts.device):
                raise ValueError(
                    f"{who}: {name} must be int32 on {counts.device}, got {tensor.dtype} on {tensor.device}"
                )
        _check_blocks(who, "q", self.q_offsets, self.q_block_size, seqlen_q)
        _check_blocks(who, "kv", self.kv_offsets, self.kv_block_size, seqlen_kv)
        q_sizes, kv_sizes = self.block_sizes(seqlen_q, seqlen_kv)
        if q_sizes.shape[-1] != counts.shape[-1]:
            raise ValueError(
                f"{who}: kv_num_blocks must have one entry for each of the {q_sizes.shape[-1]} query blocks, "
                f"got {counts.shape[-1]}"
            )
        low, high = (int(counts.min()), int(counts.max())) if counts.numel() else (0, 0)
        if low < 0 or high > lists.shape[-1]:
            raise ValueError(
                f"{who}: kv_num_blocks must lie between 0 and the list width {lists.shape[-1]}, got {low} "
                f"to {high}"
            )
        used = torch.arange(lists.shape[-1], device=lists.device) < counts[..., None]
        listed = lists[used]
        if listed.numel() and not 0 <= int(listed.min()) <= int(listed.max()) < kv_sizes.shape[-1]:
            raise ValueError(
                f"{who}: kv_indices must lie between 0 and {kv_sizes.shape[-1] - 1}, got {int(listed.min())} "
                f"to {int(listed.max())}"
            )
        if self._lists_twice():
            raise ValueError(
                f"{who}: a row may list each key block once, got a block listed twice, which counts twice"
            )
        for name, index, length in (
            ("q_index", self.q_index, seqlen_q),
            ("kv_index", self.kv_index, seqlen_kv),
        ):
            if index is None:
                continue
            expected = torch.arange(length, device=index.device, dtype=torch.int32)
            if (
                index.dim() != 3
                or index.shape[-1] != length
                or bool((index.sort(dim=-1).values != expected).any())
            ):
                raise ValueError(
                    f"{who}: {name} must be [B|1, H|1, {length}] and hold each of 0 to {length - 1} once, got "
                    f"{list(index.shape)} with other contents"
                )
        return self

    def _lists_twice(self) -> bool:
        """Whether a row lists a key block twice; waits for the device."""
        slots = torch.arange(self.kv_indices.shape[-1], device=self.kv_indices.device)
        used = slots < self.kv_num_blocks[..., None]
        ordered = torch.where(used, self.kv_indices.long(), -1 - slots).sort(dim=-1).values
        return bool((ordered.diff(dim=-1) == 0).any())

    def __repr__(self) -> str:
        batch, heads, num_q, width = self.kv_indices.shape
        q_blocks = _describe(num_q, self.q_offsets, self.q_block_size)
        num_kv = None if self.kv_offsets is None else self.kv_offsets.shape[-1] - 1
        kv_blocks = _describe(num_kv, self.kv_offsets, self.kv_block_size)
        order = "permuted" if self.q_index is not None or self.kv_index is not None else "in order"
        return (
            f"BlockPlan(batch {batch}, heads {heads}, q {q_blocks}, kv {kv_blocks}, up to {width} of them a "
            f"row, tokens {order}, {self.kv_num_blocks.device})"
        )


def _describe(count: int | None, offsets: Tensor | None, block_size: int) -> str:
    number = "" if count is None else f"{count} "
    return f"{number}variable blocks" if offsets is not None else f"{number}blocks of {block_size}"


def _sizes(offsets: Tensor | None, block_size: int, length: int, device: torch.device) -> Tensor:
    if offsets is not None:
        return offsets.long().diff(dim=-1)
    starts = torch.arange(0, length, block_size, device=device)
    return (length - starts).clamp(max=block_size)[None, None]


def _block_of_row(sizes: Tensor, length: int) -> Tensor:
    """Block number of each row in plan order, int64 ``[B|1, H|1, length]``."""
    ends = sizes.cumsum(-1)
    rows = torch.arange(length, device=sizes.device).expand(*sizes.shape[:2], length)
    return torch.searchsorted(ends, rows.contiguous(), right=True)


def _check_blocks(who: str, side: str, offsets: Tensor | None, block_size: int, length: int) -> None:
    if offsets is None:
        if block_size < 1:
            raise ValueError(f"{who}: {side}_block_size must be at least 1, got {block_size}")
        return
    if offsets.dim() != 3 or offsets.shape[-1] < 2:
        raise ValueError(f"{who}: {side}_offsets must be [B|1, H|1, n+1], got {list(offsets.shape)}")
    first, last = offsets[..., 0], offsets[..., -1]
    if bool((first != 0).any()) or bool((last != length).any()) or bool((offsets.diff(dim=-1) < 0).any()):
        raise ValueError(
            f"{who}: {side}_offsets must start at 0, never fall and end at {length}, got rows from "
            f"{int(first.min())} to {int(last.max())}"
        )


# ---------------------------------------------------------------------------------------------------------
# Building plans
# ---------------------------------------------------------------------------------------------------------


def dense_plan(
    seqlen_q: int, seqlen_kv: int | None = None, *, block_size: int = 128, device: torch.device | str = "cpu"
) -> BlockPlan:
    """The plan in which every query block sees every key block of ``block_size`` tokens, all in order.

    Args:
        seqlen_q, seqlen_kv: lengths in tokens; equal when the second is left out.
    """
    num_q, num_kv = (-(-n // block_size) for n in (seqlen_q, seqlen_q if seqlen_kv is None else seqlen_kv))
    counts, indices = _all_blocks(num_q, num_kv, torch.device(device))
    return BlockPlan(counts, indices, q_block_size=block_size, kv_block_size=block_size)


def dense_layout_plan(
    layout: TokenLayout, *, block_size: int = 128, device: torch.device | str = "cpu"
) -> BlockPlan:
    """Dense attention for a layout: :func:`dense_plan`, but padded text sees, and is seen by, only itself."""
    if not layout.has_padding:
        return dense_plan(layout.num_tokens, block_size=block_size, device=device)
    device = torch.device(device)
    num_video = -(-layout.num_video // block_size)
    offsets = torch.arange(num_video + 1, device=device, dtype=torch.int32) * block_size
    offsets = offsets.clamp(max=layout.num_video)[None, None]
    counts, indices = add_text_blocks(*_all_blocks(num_video, num_video, device), num_video, layout)
    offsets = add_text_offsets(offsets, layout)
    return BlockPlan(counts, indices, q_offsets=offsets, kv_offsets=offsets)


def _all_blocks(num_q: int, num_kv: int, device: torch.device) -> tuple[Tensor, Tensor]:
    counts = torch.full((1, 1, num_q), num_kv, dtype=torch.int32, device=device)
    lists = torch.arange(num_kv, dtype=torch.int32, device=device).expand(1, 1, num_q, num_kv)
    return counts, lists.contiguous()


def add_text_blocks(
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    num_kv_blocks: int,
    layout: TokenLayout,
    *,
    prompt_blocks: int = 1,
) -> tuple[Tensor, Tensor]:
    """Add the text's blocks, which are always kept, to the block lists of the video.

    The prompt's row and column are kept against everything but the padding, and the padding sees only itself
    (SVG2, section 4.5 of the spec), so that no padded token reaches a valid output.

    Args:
        kv_num_blocks: int32 ``[B|1, H|1, nQ]`` and
        kv_indices: int32 ``[B|1, H|1, nQ, W]``, the video's lists over
        num_kv_blocks: video key blocks.
        layout: says at which end the text stands and whether it may hold padding.
        prompt_blocks: into how many blocks the valid text is cut.

    Returns:
        The lists of the whole sequence: the text's blocks come before or after the video's, as the tokens do,
        and inside the text the padding's block comes last. Each list ascends when the video's did. Unchanged
        when there is no text.
    """
    if layout.text_len == 0:
        return kv_num_blocks, kv_indices
    batch, heads, num_q, width = kv_indices.shape
    device = kv_indices.device
    pads = int(layout.has_padding)
    text_blocks = prompt_blocks + pads
    first_prompt = 0 if layout.text_first else num_kv_blocks
    first_video = text_blocks if layout.text_first else 0
    pad_id = first_prompt + prompt_blocks
    out_width = num_kv_blocks + prompt_blocks
    prompt_ids = torch.arange(prompt_blocks, device=device, dtype=torch.int32) + first_prompt
    video_ids = torch.arange(num_kv_blocks, device=device, dtype=torch.int32) + first_video

    slots = torch.arange(out_width, device=device, dtype=torch.int32)
    video = kv_indices[..., :num_kv_blocks]
    if width < num_kv_blocks:  # to pad by nothing would copy the lists
        video = torch.nn.functional.pad(video, (0, num_kv_blocks - width))
    counts = kv_num_blocks[..., None]
    if layout.text_first:
        lists = torch.cat([prompt_ids.expand(batch, heads, num_q, -1), video + first_video], -1)
    else:
        lists = torch.nn.functional.pad(video, (0, prompt_blocks))
        # The prompt's ids follow on the video's, so slot minus count numbers them.
        lists = torch.where(slots >= counts, slots - counts + first_prompt, lists)
    lists = torch.where(slots < counts + prompt_blocks, lists, 0)

    everything = torch.cat([prompt_ids, video_ids] if layout.text_first else [video_ids, prompt_ids])
    prompt_rows = everything.expand(batch, heads, prompt_blocks, -1)
    pad_rows = torch.where(slots == 0, pad_id, 0).int().expand(batch, heads, pads, -1)
    text_counts = torch.where(torch.arange(text_blocks, device=device) < prompt_blocks, out_width, 1).int()
    text_counts = text_counts.expand(batch, heads, -1)
    text_rows = torch.cat([prompt_rows, pad_rows], 2)
    parts = [(text_counts, text_rows), (kv_num_blocks + prompt_blocks, lists)]
    if not layout.text_first:
        parts.reverse()
    return torch.cat([p[0] for p in parts], 2), torch.cat([p[1] for p in parts], 2)


def add_text_offsets(offsets: Tensor, layout: TokenLayout) -> Tensor:
    """Block boundaries of the whole sequence from those of the video, int32 ``[B|1, H|1, n+1]`` each.

    Adds one block for the valid text and, where :attr:`TokenLayout.has_padding`, one for the padding; the
    blocks are those of :func:`add_text_blocks`. Either may be empty.
    """
    if layout.text_len == 0:
        return offsets
    batch, heads, _ = offsets.shape
    if isinstance(layout.text_valid, tuple):
        batch = max(batch, len(layout.text_valid))
        lengths = layout.text_valid
    else:
        lengths = (layout.text_len if layout.text_valid is None else layout.text_valid,)
    # NOTE: full() and not tensor(), which would copy from the host at every call; a kernel takes the number as
    # its argument.
    valid = torch.cat([torch.full((1, 1, 1), n, dtype=torch.int32, device=offsets.device) for n in lengths])
    bounds = [valid.expand(batch, heads, 1)]
    if layout.has_padding:
        bounds.append(torch.full_like(bounds[0], layout.text_len))
    text = torch.cat(bounds, -1)
    offsets = offsets.expand(batch, heads, -1)
    if layout.text_first:
        return torch.cat([torch.zeros_like(text[..., :1]), text, offsets[..., 1:] + layout.text_len], -1)
    return torch.cat([offsets, text + layout.num_video], -1)


def add_text_index(index: Tensor, layout: TokenLayout) -> Tensor:
    """Permutation of the whole sequence from one of the video, ``[..., num_video]`` to ``[..., num_tokens]``.

    Text tokens stay where they are.
    """
    if layout.text_len == 0:
        return index
    text = torch.arange(layout.text_len, device=index.device, dtype=index.dtype)
    text = text.expand(*index.shape[:-1], -1)
    if layout.text_first:
        return torch.cat([text, index + layout.text_len], -1)
    return torch.cat([index, text + layout.num_video], -1)


# ---------------------------------------------------------------------------------------------------------
# Methods
# ---------------------------------------------------------------------------------------------------------


@runtime_checkable
class SparseMethod(Protocol):
    """A sparse-attention method: a frozen dataclass of settings with these methods.

    Everything that lives across steps is in the state object, one per attention layer, so that one method
    object can serve several models. ``plan`` runs inside compiled regions: it may call only tensor ops, and
    must not branch on the layer, the step, or tensor values.

    A method may also have ``begin_step(info, layout, state)``: see :func:`begin_step`. One with a true
    attribute ``wants_values`` is given the values as well: ``plan(q, k, layout, state, v=v)``.
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


def begin_step(method: SparseMethod, info: StepInfo, layout: TokenLayout, states: Sequence[Any]) -> None:
    """Tell the states of a model's layers where the sampling stands; once per model call, before its layers.

    Host-side, no tensors, outside compiled regions. Methods with something to do have
    ``begin_step(info, layout, state)``, which resets the state when a new video has begun and chooses what
    belongs to the guidance branch; for others nothing happens.
    """
    if (hook := getattr(method, "begin_step", None)) is not None:
        for state in states:
            hook(info, layout, state)
