"""DraftAttention: a small attention map over pooled tiles says which tile pairs to compute.

Source: "DraftAttention: Fast Video Diffusion via Low-Resolution Attention Guidance", arXiv 2505.14708 v1.
Section numbers are those of its specification.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import ops
from .gate import is_dense_step, is_whole, require_choice, require_number, require_whole
from .plan import BlockPlan, StepInfo, TokenLayout, add_text_blocks, add_text_offsets
from .scores import block_logits
from .shapes import SHAPES, preset_settings
from .state import LayerState, note_density
from .tiles import count_tiles, tile_offsets, tile_order


@dataclass(frozen=True)
class DraftAttention:
    """Settings of DraftAttention; a :class:`~vdit_ext.sparse.plan.SparseMethod`.

    Attributes:
        sparsity: share of the tile pairs that is dropped, 0 to 1; ``r = 1 - sparsity`` is kept.
        tile: rows and columns of a pooling tile, at least 1 each; a list becomes a tuple. Tiles at the bottom
            and right edges may be smaller; each is pooled by its true size.
        swap_portrait: exchange the tile's sides where the grid is higher than wide.
        score: rank softmaxed "probability", as the code does, or the "logit" of the paper's theory.
        parity: "exact" keeps the ``ceil(r * S * S)`` best pairs of a head, ties to the lowest flat index, and
            always each row's best; "code" reproduces the shipped rule, which keeps what is not below the
            ``int(sparsity * S * S)``-th smallest value and forces nothing, so that a row may end up empty.
        budget: rank each "head" on its own, as the paper does, or the heads of a sample together ("all_heads",
            an experiment).
        first_frame_sink: keep the first frame's tiles as keys of every row.
        same_frame: keep all pairs of tiles within a frame.
        dense_step_fraction: the first ``floor(fraction * steps)`` steps run dense.
        dense_above: run dense where the timestep (0 to 1000) exceeds this, instead of counting steps; the
            shipped code's rule.
        dense_layers: the first so many layers run dense.
        flow_shift: shift of the scheduler, at least 0, used only where steps are counted and their number is
            unknown: it then tells by the timestep which steps are dense. None: :meth:`is_dense` raises there.

    Raises:
        ValueError: one sentence, when a setting is out of range or of the wrong type.

    Pooling q and k before RoPE is not offered: a method sees them only afterwards.
    """

    name: ClassVar[str] = "draft"
    observes_dense_steps: ClassVar[bool] = False

    sparsity: float = 0.75
    tile: tuple[int, int] = (8, 16)
    swap_portrait: bool = True
    score: str = "probability"
    parity: str = "exact"
    budget: str = "head"
    first_frame_sink: bool = False
    same_frame: bool = False
    dense_step_fraction: float = 0.25
    dense_above: float | None = None
    dense_layers: int = 1
    flow_shift: float | None = None

    def __post_init__(self) -> None:
        # JSON has lists only; a frozen dataclass must be hashable.
        if isinstance(self.tile, list):
            object.__setattr__(self, "tile", tuple(self.tile))
        for field in ("sparsity", "dense_step_fraction"):
            require_number("DraftAttention", field, getattr(self, field), 0, 1)
        require_whole("DraftAttention", "dense_layers", self.dense_layers, 0)
        if self.dense_above is not None:
            require_number("DraftAttention", "dense_above", self.dense_above, -math.inf)
        if self.flow_shift is not None:
            require_number("DraftAttention", "flow_shift", self.flow_shift, 0)
        require_choice("DraftAttention", "score", self.score, ("probability", "logit"))
        require_choice("DraftAttention", "parity", self.parity, ("exact", "code"))
        require_choice("DraftAttention", "budget", self.budget, ("head", "all_heads"))
        sides = self.tile if isinstance(self.tile, tuple) else ()
        if len(sides) != 2 or not all(is_whole(side) and side >= 1 for side in sides):
            raise ValueError(
                "DraftAttention: tile must be two sizes of at least 1 (rows, columns), whole numbers, got "
                f"{self.tile!r}"
            )

    @classmethod
    def preset(cls, model: str, kind: str = "paper") -> DraftAttention:
        """Published settings.

        Args:
            model: a key of :data:`PRESETS`.
            kind: "paper" counts the first 25 % of the steps dense; "repo" has the timestep thresholds of the
                shipped code, which give 27 to 30 %, its selection rule (``parity="code"``), and no swapped
                tile. There is no script for wan2.1-1.3b and for image-to-video; they share Wan's.

        Raises:
            ValueError: one sentence that lists the names there are.
        """
        return cls(**preset_settings("DraftAttention", PRESETS, model, kind))

    def is_dense(self, info: StepInfo, layer: int) -> bool:
        """Whether this layer runs dense attention at this step (section 4, Gate). Host-side.

        Raises:
            ValueError: one sentence, when a share of the steps is dense and neither their number nor
                ``flow_shift`` is known.
        """
        if layer < self.dense_layers:
            return True
        if self.dense_above is not None:
            return info.timestep > self.dense_above
        return is_dense_step(info, self.dense_step_fraction, self.flow_shift, self.name)

    def new_state(self, layer: int, num_layers: int) -> LayerState:
        """State of one attention layer; it holds only the density log and ``tokens_permuted``."""
        return LayerState(layer, num_layers)

    def begin_step(self, info: StepInfo, layout: TokenLayout, state: LayerState) -> None:
        """Start the density log anew when a new video has begun. Host-side."""
        if state.begins_video(info, layout):
            self.reset(state)
        state.branch = info.branch

    def reset(self, state: LayerState) -> None:
        """Forget the densities; nothing else lasts from step to step."""
        state.reset()

    def observe(self, q: Tensor, k: Tensor, layout: TokenLayout, state: LayerState) -> None:
        """Nothing to learn from dense steps."""

    def grid_tile(self, layout: TokenLayout) -> tuple[int, int]:
        """Rows and columns of a tile on this grid: :attr:`tile`, swapped where the grid stands upright."""
        _, rows, columns = layout.grid
        return (self.tile[1], self.tile[0]) if self.swap_portrait and rows > columns else self.tile

    def token_order(self, layout: TokenLayout) -> Tensor:
        """int32 ``[S]`` CPU: the tile permutation, which all heads, layers and steps share (Algorithm 1).

        A caller that applies it once to tokens and RoPE tables after patch embedding, sets the states'
        ``tokens_permuted`` and applies the inverse before unpatchify, saves every gather in the layers.
        """
        return tile_order(layout, self.grid_tile(layout), torch.device("cpu"))[0, 0]

    def plan(self, q: Tensor, k: Tensor, layout: TokenLayout, state: LayerState) -> BlockPlan:
        """Pool, draft and select one attention call (section 4).

        Args:
            q, k: ``[B, H, S, D]`` fp32, fp16 or bf16 after norm and RoPE, any strides with a contiguous last
                dimension; in tile order already where ``state.tokens_permuted``.
            layout: grid and text; text never enters the draft map and is fully kept.
            state: from :meth:`new_state`.

        Returns:
            A plan whose blocks are the tiles, uniform ones where all tiles are full and the text, if any,
            follows the video without padding. It permutes tokens unless they are permuted already.

        Raises:
            ValueError: one sentence, when q, k and the layout do not fit.
        """
        layout.check(q, k, "DraftAttention")
        tile = self.grid_tile(layout)
        size = tile[0] * tile[1]
        full_tiles = layout.grid[1] % tile[0] == 0 and layout.grid[2] % tile[1] == 0
        index = None
        if not state.tokens_permuted:
            index = tile_order(layout, tile, q.device)
            q, k = ops.permute_rows(q, index), ops.permute_rows(k, index)
        offsets = None if full_tiles else tile_offsets(layout.grid, tile, q.device)
        pooled_q = ops.mean_pool_blocks(layout.video(q), offsets=offsets, block_size=size)
        pooled_k = ops.mean_pool_blocks(layout.video(k), offsets=offsets, block_size=size)

        counts, lists = self.select(block_logits(pooled_q, pooled_k), layout.grid[0])
        num_tiles = count_tiles(layout.grid, tile)
        if full_tiles and not layout.has_padding and not (layout.text_first and layout.text_len):
            text_blocks = -(-layout.text_len // size)
            counts, lists = add_text_blocks(counts, lists, num_tiles, layout, prompt_blocks=text_blocks)
            plan = BlockPlan(
                counts, lists, q_block_size=size, kv_block_size=size, q_index=index, kv_index=index
            )
        else:
            counts, lists = add_text_blocks(counts, lists, num_tiles, layout)
            offsets = add_text_offsets(tile_offsets(layout.grid, tile, q.device), layout)
            plan = BlockPlan(
                counts, lists, q_offsets=offsets, kv_offsets=offsets, q_index=index, kv_index=index
            )
        note_density(plan, layout, state)
        return plan

    def select(self, logits: Tensor, num_frames: int) -> tuple[Tensor, Tensor]:
        """Key tiles of each query tile from the draft logits.

        Args:
            logits: fp32 ``[B, H, S, S]``.
            num_frames: frames of the grid, each ``S / num_frames`` tiles.

        Returns:
            ``kv_num_blocks`` int32 ``[B, H, S]`` and ``kv_indices`` int32 ``[B, H, S, S]``, ascending.

        A logit that is not finite (NaN or Inf in a token of either tile) ranks last, so that one bad key leaves
        the other tiles' ranking alone. A query tile without any finite logit says nothing about its keys and
        keeps all of them, beyond the budget.
        """
        finite = logits.isfinite()
        scores = logits.masked_fill(~finite, -torch.inf)
        if self.score == "probability":
            scores = torch.softmax(scores, dim=-1).nan_to_num(nan=0.0)
        batch, heads, num_tiles, _ = scores.shape
        ranked = scores if self.budget == "head" else scores.reshape(batch, 1, heads * num_tiles, num_tiles)
        pairs = ranked.shape[-2] * num_tiles
        if self.parity == "code":
            counts, lists = ops.lists_from_mask(_not_below_threshold(ranked, int(self.sparsity * pairs)))
        else:
            counts, lists = ops.topk_blocks(ranked, count_kept(self.sparsity, pairs), per_head=True)
        counts = counts.reshape(batch, heads, num_tiles)
        lists = lists.reshape(batch, heads, num_tiles, num_tiles)
        mute = ~finite.any(-1)
        counts = counts.masked_fill(mute, num_tiles)
        everything = torch.arange(num_tiles, dtype=torch.int32, device=scores.device)
        lists = torch.where(mute[..., None], everything, lists)
        if self.first_frame_sink or self.same_frame:
            frame = torch.arange(num_tiles, device=scores.device) // (num_tiles // num_frames)
            extra = torch.zeros(num_tiles, num_tiles, dtype=torch.bool, device=scores.device)
            if self.first_frame_sink:
                extra = extra | (frame == 0)
            if self.same_frame:
                extra = extra | (frame[:, None] == frame)
            counts, lists = ops.lists_from_mask(ops.mask_from_lists(counts, lists, num_tiles) | extra)
        return counts, lists


def count_kept(sparsity: float, pairs: int) -> int:
    """``ceil((1 - sparsity) * pairs)``, not led astray by the last bit of ``1 - sparsity``."""
    return math.ceil(round((1 - sparsity) * pairs, 6))


def _not_below_threshold(scores: Tensor, rank: int) -> Tensor:
    """Keep what is at least the head's rank-th smallest value: all for rank 0, nothing for the last rank."""
    flat = scores.flatten(-2)
    if rank <= 0:
        return torch.ones_like(scores, dtype=torch.bool)
    if rank >= flat.shape[-1]:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = flat.kthvalue(rank, dim=-1).values
    return scores >= threshold[..., None, None]


def _presets() -> dict[str, dict[str, dict]]:
    # Section 4: sparsity, timestep threshold, dense layers.
    table = {
        "hunyuan-t2v-768p": (0.90, 945, 2),
        "hunyuan-custom-768p": (0.90, 975, 2),
        "wan2.1-14b-768p": (0.75, 925, 1),
        "wan2.1-14b-512p": (0.75, 925, 1),
        "wan2.1-14b-i2v-512p": (0.75, 925, 1),
        "wan2.1-1.3b": (0.75, 925, 1),
        # SVG2's resolutions of the same models, with ragged tiles.
        "hunyuan-t2v-720p": (0.90, 945, 2),
        "wan2.1-14b-t2v-720p": (0.75, 925, 1),
    }
    presets = {}
    for model, (sparsity, threshold, layers) in table.items():
        shared = dict(sparsity=sparsity, dense_layers=layers, flow_shift=SHAPES[model].flow_shift)
        presets[model] = {
            "paper": shared,
            "repo": shared | dict(dense_above=float(threshold), parity="code", swap_portrait=False),
        }
    # 64-token tiles: 32 of them on the toy world's 8 x 16 x 16 grid.
    presets["toy"] = {"paper": dict(sparsity=0.75, tile=(8, 8), flow_shift=SHAPES["toy"].flow_shift)}
    return presets


PRESETS = _presets()
