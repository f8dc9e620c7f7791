"""Tiny random configurations of the diffusers transformers, and the arguments of one call of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

BATCH, TEXT, TOKENS = 2, 12, 7
FRAMES, ROWS, COLUMNS = 2, 4, 6  # latents


@dataclass(frozen=True)
class Case:
    """One class of diffusers: the arguments that make it tiny, and those of a call."""

    name: str
    config: dict[str, Any]
    arguments: Callable[[], dict[str, Any]]

    def build(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        model = getattr(diffusers, self.name)(**self.config).eval().requires_grad_(False)
        for parameter in model.parameters():  # some are made as zeros, which would hide what feeds them
            if not parameter.any():
                parameter.normal_(std=0.1)
        return model

    def __str__(self) -> str:
        return self.name


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def latents(channels: int) -> Tensor:
    return draw(BATCH, channels, FRAMES, ROWS, COLUMNS)


def text(width: int = TEXT) -> Tensor:
    return draw(BATCH, TOKENS, width, seed=2)


def timestep() -> Tensor:
    return torch.full((BATCH,), 500.0)


_WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": TEXT,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


def _wan() -> dict[str, Any]:
    return {"hidden_states": latents(4), "timestep": timestep(), "encoder_hidden_states": text()}


def _wan_image() -> dict[str, Any]:
    return _wan() | {"encoder_hidden_states_image": draw(BATCH, 5, 16, seed=3)}


def _skyreels() -> dict[str, Any]:
    return _wan() | {"fps": [0, 1]}


def _vace() -> dict[str, Any]:
    return _wan() | {"control_hidden_states": latents(6), "control_hidden_states_scale": torch.ones(1)}


def _hunyuan() -> dict[str, Any]:
    mask = torch.ones(BATCH, TOKENS)
    mask[1, 5:] = 0
    return {
        "hidden_states": latents(4),
        "timestep": timestep().long(),
        "encoder_hidden_states": text(),
        "encoder_attention_mask": mask,
        "pooled_projections": draw(BATCH, 8, seed=3),
        "guidance": torch.full((BATCH,), 6000.0),
    }


def _hunyuan15() -> dict[str, Any]:
    mask = torch.ones(BATCH, TOKENS)
    mask[1, 5:] = 0
    return {
        "hidden_states": latents(4),
        "timestep": timestep(),
        "encoder_hidden_states": text(),
        "encoder_attention_mask": mask,
        "encoder_hidden_states_2": draw(BATCH, 3, 10, seed=4),
        "encoder_attention_mask_2": torch.ones(BATCH, 3),
        "image_embeds": draw(BATCH, 4, 14, seed=5),
    }


def _cogvideox() -> dict[str, Any]:
    hidden = draw(BATCH, FRAMES, 4, ROWS, COLUMNS)
    return {"hidden_states": hidden, "encoder_hidden_states": text(), "timestep": timestep()}


def _ltx() -> dict[str, Any]:
    return {
        "hidden_states": draw(BATCH, FRAMES * ROWS * COLUMNS, 4),
        "encoder_hidden_states": text(),
        "timestep": timestep(),
        "encoder_attention_mask": torch.ones(BATCH, TOKENS),
        "num_frames": FRAMES,
        "height": ROWS,
        "width": COLUMNS,
    }


def _ltx2() -> dict[str, Any]:
    return {
        "hidden_states": draw(BATCH, FRAMES * ROWS * COLUMNS, 4),
        "audio_hidden_states": draw(BATCH, 5, 4, seed=3),
        "encoder_hidden_states": text(),
        "audio_encoder_hidden_states": draw(BATCH, TOKENS, TEXT, seed=4),
        "timestep": timestep(),
        "sigma": timestep() / 1000,
        "num_frames": FRAMES,
        "height": ROWS,
        "width": COLUMNS,
        "fps": 25.0,
        "audio_num_frames": 5,
    }


def _mochi() -> dict[str, Any]:
    return {
        "hidden_states": latents(4),
        "encoder_hidden_states": text(16),
        "timestep": timestep(),
        "encoder_attention_mask": torch.ones(BATCH, TOKENS),
    }


def _pixart() -> dict[str, Any]:
    return {
        "hidden_states": draw(BATCH, 4, 8, 8),
        "encoder_hidden_states": text(),
        "timestep": timestep(),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _dit() -> dict[str, Any]:
    labels = torch.tensor([1, 3])
    return {"hidden_states": draw(BATCH, 4, 8, 8), "timestep": timestep().long(), "class_labels": labels}


def _allegro() -> dict[str, Any]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    *tables, grid_t, grid_h, grid_w = get_3d_rotary_pos_embed_allegro(
        embed_dim=24,
        crops_coords=((0, 0), (ROWS // 2, COLUMNS // 2)),
        grid_size=(ROWS // 2, COLUMNS // 2),
        temporal_size=FRAMES,
    )
    places = torch.cartesian_prod(*(grid.long() for grid in (grid_t, grid_h, grid_w)))
    places = [place[None].contiguous() for place in places.unbind(1)]
    return {
        "hidden_states": latents(4),
        "encoder_hidden_states": text(),
        "timestep": timestep(),
        "attention_mask": torch.ones(BATCH, FRAMES, ROWS, COLUMNS),
        "encoder_attention_mask": torch.ones(BATCH, TOKENS),
        "image_rotary_emb": (tuple(tables), places),
    }


def _latte() -> dict[str, Any]:
    hidden = draw(BATCH, 4, FRAMES, 8, 8)
    return {"hidden_states": hidden, "timestep": timestep().long(), "encoder_hidden_states": text()}


def _kandinsky() -> dict[str, Any]:
    return {
        "hidden_states": draw(1, FRAMES, ROWS, COLUMNS, 4),
        "encoder_hidden_states": draw(1, TOKENS, TEXT, seed=2),
        "timestep": timestep()[:1],
        "pooled_projections": draw(1, 10, seed=3),
        "visual_rope_pos": [torch.arange(n) for n in (FRAMES, ROWS // 2, COLUMNS // 2)],
        "text_rope_pos": torch.arange(TOKENS),
    }


def _flux() -> dict[str, Any]:
    return {
        "hidden_states": draw(BATCH, 6, 4),
        "encoder_hidden_states": text(),
        "pooled_projections": draw(BATCH, 8, seed=3),
        "timestep": timestep() / 1000,
        "img_ids": torch.zeros(6, 3),
        "txt_ids": torch.zeros(TOKENS, 3),
        "guidance": torch.full((BATCH,), 3.5),
    }


_HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "text_embed_dim": TEXT,
    "rope_axes_dim": (4, 4, 4),
}
_COGVIDEOX = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": TEXT,
    "num_layers": 2,
    "sample_width": COLUMNS,
    "sample_height": ROWS,
    "sample_frames": 5,
    "max_text_seq_length": TOKENS,
}
_LATTE = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "cross_attention_dim": 24,
    "attention_bias": True,
    "sample_size": 8,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "caption_channels": TEXT,
    "video_length": FRAMES,
}
_LTX2 = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "cross_attention_dim": 24,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 12,
    "audio_cross_attention_dim": 24,
    "num_layers": 2,
    "caption_channels": TEXT,
}

CASES = [
    Case("WanTransformer3DModel", _WAN, _wan),
    Case("WanTransformer3DModel", _WAN | {"image_dim": 16, "added_kv_proj_dim": 24}, _wan_image),
    Case("WanVACETransformer3DModel", _WAN | {"vace_layers": [0], "vace_in_channels": 6}, _vace),
    Case("SkyReelsV2Transformer3DModel", _WAN | {"inject_sample_info": True}, _skyreels),
    Case(
        "HunyuanVideoTransformer3DModel",
        _HUNYUAN | {"num_single_layers": 2, "pooled_projection_dim": 8},
        _hunyuan,
    ),
    Case(
        "HunyuanVideo15Transformer3DModel",
        _HUNYUAN | {"text_embed_2_dim": 10, "image_embed_dim": 14},
        _hunyuan15,
    ),
    Case("CogVideoXTransformer3DModel", _COGVIDEOX, _cogvideox),
    Case(
        "LTXVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "cross_attention_dim": 24,
            "num_layers": 2,
            "caption_channels": TEXT,
        },
        _ltx,
    ),
    Case("LTX2VideoTransformer3DModel", _LTX2, _ltx2),
    Case(
        "LTX2VideoTransformer3DModel",
        _LTX2
        | {"gated_attn": True, "audio_gated_attn": True, "cross_attn_mod": True, "audio_cross_attn_mod": True},
        _ltx2,
    ),
    Case(
        "MochiTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 2,
            "pooled_projection_dim": 16,
            "in_channels": 4,
            "text_embed_dim": 16,  # a pool over it has eight heads
            "time_embed_dim": 8,
            "max_sequence_length": TOKENS,
        },
        _mochi,
    ),
    Case(
        "PixArtTransformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 2,
            "cross_attention_dim": 24,
            "sample_size": 8,
            "caption_channels": TEXT,
        },
        _pixart,
    ),
    Case(
        "DiTTransformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "num_layers": 2,
            "sample_size": 8,
            "num_embeds_ada_norm": 10,
        },
        _dit,
    ),
    Case(
        "AllegroTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 24,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "cross_attention_dim": 48,
            "sample_height": ROWS,
            "sample_width": COLUMNS,
            "sample_frames": FRAMES,
            "caption_channels": TEXT,
        },
        _allegro,
    ),
    Case("LatteTransformer3DModel", _LATTE, _latte),
    Case(
        "SanaVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 12,
            "cross_attention_dim": 24,
            "caption_channels": TEXT,
            "sample_size": 8,
            "rope_max_seq_len": 32,
        },
        _wan,
    ),
    Case(
        "Kandinsky5Transformer3DModel",
        {
            "in_visual_dim": 4,
            "in_text_dim": TEXT,
            "in_text_dim2": 10,
            "time_dim": 8,
            "out_visual_dim": 4,
            "model_dim": 24,
            "ff_dim": 32,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (4, 4, 4),
        },
        _kandinsky,
    ),
    Case(
        "FluxTransformer2DModel",
        {
            "in_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 12,
            "num_attention_heads": 2,
            "joint_attention_dim": TEXT,
            "pooled_projection_dim": 8,
            "guidance_embeds": True,
            "axes_dims_rope": (4, 4, 4),
        },
        _flux,
    ),
]
