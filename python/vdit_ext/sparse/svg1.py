"""Sparse VideoGen (SVG1): each head attends within frames or along time, whichever its own output prefers.

Source: "Sparse VideoGen: Accelerating Video Diffusion Transformers with Spatial-Temporal Sparsity",
arXiv 2502.01776, as section 4.8 of the SVG2 specification describes it. A baseline.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import ops
from .gate import count_dense_layers, is_dense_step, require_choice, require_number, require_whole
from .plan import BlockPlan, StepInfo, TokenLayout, add_text_blocks, add_text_index, add_text_offsets
from .shapes import SHAPES, preset_settings
from .state import SampleState, note_density, sample_rows
from .transfer import to_device


@dataclass(frozen=True)
class SVG1:
    """Settings of Sparse VideoGen; a :class:`~vdit_ext.sparse.plan.SparseMethod`.

    Attributes:
        density: share of all pairs that the band keeps, text included, 0 to 1. The authors' code calls this
            "sparsity".
        num_samples: query rows that decide a head's kind, at least 1.
        sample_limit: they come from the first so many video tokens; None: from all.
        profile_frames: half-width in frames of the two masks that are compared, unrelated to ``density``.
        sink: keep the first frame_size keys of the head's own order for every row (Wan). For a temporal head
            these are not the first frame.
        rounding: the band's half-width is rounded to whole blocks, "ceil" (Wan) or "floor" (Hunyuan, Cog).
        block_size: tokens of a block, 128 as published.
        dense_step_fraction, dense_layer_fraction, dense_layer_rounding, flow_shift: as in
            :class:`~vdit_ext.sparse.svg2.SVG2`.
        seed: of the sampled rows, 0 or more.

    The band is cut to blocks: it keeps every block that holds a pair within the half-width, which adds less
    than a block on either side.

    Raises:
        ValueError: one sentence, when a setting is out of range or of the wrong type.
    """

    name: ClassVar[str] = "svg1"
    observes_dense_steps: ClassVar[bool] = False
    wants_values: ClassVar[bool] = True

    density: float = 0.30
    num_samples: int = 64
    sample_limit: int | None = 10_000
    profile_frames: float = 2.0
    sink: bool = True
    rounding: str = "ceil"
    block_size: int = 128
    dense_step_fraction: float = 0.3
    dense_layer_fraction: float = 0.03
    dense_layer_rounding: str = "floor"
    seed: int = 0
    flow_shift: float | None = None

    def __post_init__(self) -> None:
        for field in ("density", "dense_step_fraction", "dense_layer_fraction"):
            require_number("SVG1", field, getattr(self, field), 0, 1)
        for field in ("num_samples", "block_size"):
            require_whole("SVG1", field, getattr(self, field), 1)
        require_whole("SVG1", "seed", self.seed, 0)
        require_number("SVG1", "profile_frames", self.profile_frames, 0)
        if self.sample_limit is not None:
            require_whole("SVG1", "sample_limit", self.sample_limit, 1)
        if self.flow_shift is not None:
            require_number("SVG1", "flow_shift", self.flow_shift, 0)
        require_choice("SVG1", "rounding", self.rounding, ("ceil", "floor"))
        require_choice("SVG1", "dense_layer_rounding", self.dense_layer_rounding, ("floor", "ceil"))

    @classmethod
    def preset(cls, model: str, kind: str = "paper") -> SVG1:
        """Published settings; model is a key of :data:`PRESETS`, kind "paper" (30 % dense steps) or "repo".

        Raises:
            ValueError: one sentence that lists the names there are.
        """
        return cls(**preset_settings("SVG1", PRESETS, model, kind))

    def is_dense(self, info: StepInfo, layer: int) -> bool:
        """Whether this layer runs dense attention at this step. Host-side.

        Raises:
            ValueError: one sentence, when a share of the steps is dense and neither their number nor
                ``flow_shift`` is known.
        """
        dense_layers = count_dense_layers(self.dense_layer_fraction, info.num_layers, self.dense_layer_rounding)
        if layer < dense_layers:
            return True
        return is_dense_step(info, self.dense_step_fraction, self.flow_shift, self.name)

    def new_state(self, layer: int, num_layers: int) -> SampleState:
        """State of one attention layer: the generator of its sampled rows and a density log."""
        return SampleState(layer, num_layers, int(self.seed))

    def begin_step(self, info: StepInfo, layout: TokenLayout, state: SampleState) -> None:
        """Start the samples and the density log anew when a new video has begun. Host-side."""
        if state.begins_video(info, layout):
            self.reset(state)
        state.branch = info.branch

    def reset(self, state: SampleState) -> None:
        """Start the samples and the density log anew."""
        state.reset()

    def token_order(self, layout: TokenLayout) -> None:
        """None: the order depends on the head."""
        return None

    def observe(self, q: Tensor, k: Tensor, layout: TokenLayout, state: SampleState) -> None:
        """Nothing to learn from dense steps."""

    def plan(
        self, q: Tensor, k: Tensor, layout: TokenLayout, state: SampleState, v: Tensor | None = None
    ) -> BlockPlan:
        """Find each head's kind and lay out its band.

        Args:
            q, k: ``[B, H, S, D]`` fp32, fp16 or bf16 after norm and RoPE.
            layout: grid and text; text rows and columns are kept.
            state: from :meth:`new_state`.
            v: ``[B, H, S, D]``. With it, heads are judged by the error of the attention output, as published;
                without it, by the softmax mass that a mask drops.

        Returns:
            One block list for all heads, and for each head the order it holds in: frame-major for spatial
            heads, patch-major for temporal ones.

        Raises:
            ValueError: one sentence, when q, k and the layout do not fit.
        """
        layout.check(q, k, "SVG1")
        frames = layout.grid[0]
        frame_size = layout.num_video // frames
        limit = layout.num_video if self.sample_limit is None else min(self.sample_limit, layout.num_video)
        rows = to_device(sample_rows(state.handle, self.num_samples, limit), q.device)
        temporal = self.is_temporal(q, k, layout, rows, v)

        native = torch.arange(layout.num_video, device=q.device, dtype=torch.int32)
        order = torch.where(temporal[..., None], patch_major_order(frames, frame_size, q.device), native)
        num_blocks = -(-layout.num_video // self.block_size)
        block = torch.arange(num_blocks, device=q.device)
        keep = (block[:, None] - block).abs() <= self.band_tokens(layout) // self.block_size
        if self.sink:
            keep = keep | (block * self.block_size < frame_size)
        counts, lists = ops.lists_from_mask(keep[None, None])
        counts, lists = add_text_blocks(counts, lists, num_blocks, layout)
        offsets = torch.arange(num_blocks + 1, device=q.device, dtype=torch.int32) * self.block_size
        offsets = add_text_offsets(offsets.clamp(max=layout.num_video)[None, None], layout)
        index = add_text_index(order, layout)
        plan = BlockPlan(counts, lists, q_offsets=offsets, kv_offsets=offsets, q_index=index, kv_index=index)
        note_density(plan, layout, state)
        return plan

    def band_tokens(self, layout: TokenLayout) -> int:
        """Half-width of the band in tokens, a multiple of the block size.

        What text rows and columns use up of ``density`` is taken off first; a band of half-width w frames
        keeps ``1 - (1 - w / F) ** 2`` of the video's pairs.
        """
        video, total = layout.num_video**2, layout.num_tokens**2
        share = min(1.0, max(0.0, (self.density * total - (total - video)) / video))
        tokens = band_half_width(layout.grid[0], share) * layout.grid[1] * layout.grid[2]
        blocks = tokens / self.block_size
        return self.block_size * (
            math.ceil(blocks - 1e-9) if self.rounding == "ceil" else math.floor(blocks + 1e-9)
        )

    def is_temporal(self, q: Tensor, k: Tensor, layout: TokenLayout, rows: Tensor, v: Tensor | None) -> Tensor:
        """Which heads lose less under the temporal mask than under the spatial one, bool ``[B, H]``.

        Args:
            q, k, v: as in :meth:`plan`.
            rows: int64 ``[R]`` video tokens whose attention is computed.
        """
        frames = layout.grid[0]
        frame_size = layout.num_video // frames
        device = q.device
        native = torch.arange(layout.num_video, device=device)
        temporal = native % frame_size * frames + native // frame_size
        width = self.profile_frames * frame_size
        sampled = layout.video(q)[:, :, rows]
        scores = (sampled @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
        text = torch.ones(len(rows), layout.text_len, dtype=torch.bool, device=device)
        if layout.has_padding:
            video = torch.arange(2, device=device, dtype=torch.int32)[None, None] * layout.num_video
            bounds = add_text_offsets(video, layout)
            start = 1 if layout.text_first else 2
            token = torch.arange(layout.num_tokens, device=device)
            padded = (token >= bounds[..., start, None]) & (token < bounds[..., start + 1, None])
            scores = scores.masked_fill(padded[:, :, None], -torch.inf)

        def attend(keep: Tensor | None) -> tuple[Tensor, Tensor]:
            if keep is None:
                weights = torch.softmax(scores, dim=-1)
            else:
                parts = [text, keep] if layout.text_first else [keep, text]
                weights = torch.softmax(scores.masked_fill(~torch.cat(parts, -1), -torch.inf), dim=-1)
            return weights, weights if v is None else weights.to(v.dtype) @ v

        full_weights, full = attend(None)
        errors = []
        for place in (native, temporal):
            keep = (place[rows][:, None] - place).abs() <= width
            if v is None:
                dropped = full_weights[..., layout.video_start : layout.video_start + layout.num_video] * ~keep
                errors.append(dropped.sum((-1, -2)))
            else:
                errors.append((attend(keep)[1].float() - full.float()).square().mean((-1, -2)))
        return errors[1] < errors[0]


def band_half_width(num_frames: int, density: float) -> float:
    """Half-width in frames of the band that keeps ``density`` of the pairs: ``F * (1 - sqrt(1 - density))``."""
    return num_frames * (1 - math.sqrt(1 - density))


def patch_major_order(num_frames: int, frame_size: int, device: torch.device | str = "cpu") -> Tensor:
    """The temporal order, int32 ``[F * P]``: row ``s * F + f`` of the new order is token ``f * P + s``."""
    tokens = torch.arange(num_frames * frame_size, device=device, dtype=torch.int32)
    return tokens.view(num_frames, frame_size).T.reshape(-1)


def _presets() -> dict[str, dict[str, dict]]:
    floor = dict(rounding="floor", sink=False, profile_frames=1.5)
    # Section 4.8; the dense fractions of section 4.6, which both generations of the scripts share.
    repo = {
        "hunyuan-t2v-720p": dict(density=0.25, dense_step_fraction=0.10, **floor),
        "hunyuan-480p": dict(density=0.20, dense_step_fraction=0.04, dense_layer_fraction=0.0, **floor),
        "wan2.1-14b-t2v-720p": dict(density=0.30, dense_step_fraction=0.20),
        "wan-14b-i2v-720p": dict(density=0.30, dense_step_fraction=0.35),
        "wan-i2v-480p": dict(density=0.30, dense_step_fraction=0.20),
        "wan2.1-1.3b": dict(density=0.30, dense_step_fraction=0.20),
        "cosmos1-14b": dict(density=0.25, dense_step_fraction=0.30),
        "cogvideox-1.5-5b": dict(
            density=0.25,
            num_samples=32,
            sample_limit=None,
            dense_step_fraction=0.20,
            dense_layer_fraction=0.025,
            dense_layer_rounding="ceil",
            **floor,
        ),
    }
    presets = {}
    for model, settings in repo.items():
        settings = settings | dict(flow_shift=SHAPES[model].flow_shift)
        presets[model] = {"paper": settings | dict(dense_step_fraction=0.3), "repo": settings}
    presets["wan2.1-1.3b"]["paper"] |= dict(dense_layer_rounding="ceil")
    presets["toy"] = {
        "paper": dict(
            density=0.25,
            block_size=64,
            profile_frames=1.0,
            sink=False,
            dense_layer_fraction=0.0,
            flow_shift=SHAPES["toy"].flow_shift,
        )
    }
    return presets


PRESETS = _presets()
