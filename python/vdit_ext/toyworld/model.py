"""The toy transformer: a diffusers `WanTransformer3DModel`, small, that predicts the clean latents.

The one departure from the class is its patch embedding. Wan knows where the picture ends because
its VAE pads with zeros; our codec has no borders, and rotary embeddings are purely relative, so
without help no token could tell the floor from the ceiling. `PositionedPatch` adds a learned
mixture of fixed waves to every token.
"""

import math

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import nn

from . import codec, text

CONFIG = dict(
    patch_size=(1, 2, 2),
    num_attention_heads=3,
    attention_head_dim=64,
    in_channels=codec.CHANNELS,
    out_channels=codec.CHANNELS,
    text_dim=text.TEXT_DIM,
    freq_dim=128,
    ffn_dim=640,
    num_layers=6,
    cross_attn_norm=True,
    rope_max_seq_len=64,
)
# Up to this many keys, attention trains faster on a CPU as two bfloat16 products and a softmax than
# with the fused kernel: 0.8 s a step instead of 1.2 s at 1024 tokens, 1.5 s instead of 1.9 s at 2048.
_WRITTEN_OUT = 2048
_GRID = 16  # tokens along one side of the picture; waves repeat after twice this


class PositionedPatch(nn.Conv3d):
    """Wan's patch embedding plus absolute positions; same input and output shapes, any grid size."""

    def __init__(self, in_channels: int, dim: int, patch_size: tuple[int, int, int]):
        super().__init__(in_channels, dim, kernel_size=patch_size, stride=patch_size)
        self.position = nn.Linear(3 * 2 * (_GRID // 2 + 1), dim, bias=False)

    def forward(self, latents: torch.Tensor, frames: torch.Tensor | None = None) -> torch.Tensor:
        """Latents [b, c, f, h, w] to [b, dim, f, h/2, w/2].

        frames: int64 [b, f], the place in time of each latent frame; 0, 1, 2, ... when None.
        """
        tokens = super().forward(latents)
        b, _, f, h, w = tokens.shape
        if frames is None:
            frames = torch.arange(f, device=tokens.device).expand(b, f)
        return tokens + self._table(frames, h, w).to(tokens.dtype)

    def _table(self, frames: torch.Tensor, h: int, w: int) -> torch.Tensor:
        part = self.position.weight.unflatten(1, (3, -1)).unbind(1)  # 3 of [dim, waves]
        device = frames.device
        t = F.linear(_waves(frames).to(part[0]), part[0]).permute(0, 2, 1)[..., None, None]
        y = F.linear(_waves(torch.arange(h, device=device)).to(part[1]), part[1]).T[None, :, None, :, None]
        x = F.linear(_waves(torch.arange(w, device=device)).to(part[2]), part[2]).T[None, :, None, None, :]
        return t + y + x


def _waves(places: torch.Tensor) -> torch.Tensor:
    """[...] to [..., 18]: half a turn, then 1 to 8 turns along the grid, as sines and cosines."""
    turns = torch.tensor([0.5, *range(1, _GRID // 2 + 1)], device=places.device)
    angle = (places[..., None] + 0.5) * turns * (2 * math.pi / _GRID)
    return torch.cat([angle.sin(), angle.cos()], -1)


def build(config: dict = CONFIG) -> WanTransformer3DModel:
    """An untrained transformer; seed torch first. config: arguments of the diffusers class."""
    model = WanTransformer3DModel(**config)
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    model.patch_embedding = PositionedPatch(config["in_channels"], dim, tuple(config["patch_size"]))
    return model


def forward_frames(model, latents, frames, timestep, prompt, run_block=None) -> torch.Tensor:
    """The class's forward on some frames of a clip, each with its true place in time.

    Training on two frames of eight costs a quarter, and attention less. With all frames this
    equals `model(latents, timestep, prompt)`; a test keeps it so.

    latents  float [b, 54, f, h, w]; frames int64 [b, f]; timestep float [b] in 0..1000;
    prompt   float [b, 12, text_dim]; returns clean latents like `latents`.
    run_block: replaces `block_forward`, for a compiled version of it.
    """
    run_block = run_block or block_forward
    b, _, f, h, w = latents.shape
    tokens = model.patch_embedding(latents, frames).flatten(2).transpose(1, 2)
    temb, steps, prompt, _ = model.condition_embedder(timestep, prompt)
    rope = _rope(model.rope, frames, h // 2, w // 2)
    for block in model.blocks:
        tokens = run_block(block, tokens, prompt, steps.unflatten(1, (6, -1)), *rope)
    shift, scale = (model.scale_shift_table + temb[:, None]).chunk(2, 1)
    tokens = model.proj_out(model.norm_out(tokens.float()) * (1 + scale) + shift)
    tokens = tokens.float().view(b, f, h // 2, w // 2, 2, 2, -1)
    return tokens.permute(0, 6, 1, 2, 4, 3, 5).reshape(latents.shape)


def _rope(rope, frames: torch.Tensor, h: int, w: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [b, f*h*w, 1, head/2], one per rotated pair, for the frames given."""
    b, f = frames.shape
    tables = []
    for table in (rope.freqs_cos, rope.freqs_sin):
        t, y, x = table.split([rope.t_dim, rope.h_dim, rope.w_dim], 1)
        grid = [t[frames][:, :, None, None], y[None, None, :h, None], x[None, None, None, :w]]
        whole = torch.cat([part.expand(b, f, h, w, -1) for part in grid], -1)
        tables.append(whole[..., ::2].reshape(b, f * h * w, 1, -1).float())
    return tables[0], tables[1]


def block_forward(block, tokens, prompt, steps, cos, sin) -> torch.Tensor:
    """One transformer block, written so that the compiler can fuse it; tokens stay float32."""
    shift, scale, gate, ff_shift, ff_scale, ff_gate = (block.scale_shift_table + steps.float()).chunk(6, 1)
    normed = F.layer_norm(tokens, tokens.shape[-1:], eps=block.norm1.eps) * (1 + scale) + shift
    tokens = tokens + _attend(block.attn1, normed, normed, (cos, sin)) * gate
    normed = F.layer_norm(tokens, tokens.shape[-1:], block.norm2.weight, block.norm2.bias, block.norm2.eps)
    tokens = tokens + _attend(block.attn2, normed, prompt, None)
    normed = F.layer_norm(tokens, tokens.shape[-1:], eps=block.norm3.eps) * (1 + ff_scale) + ff_shift
    return tokens + block.ffn(normed) * ff_gate


def _attend(attn, tokens, context, rope) -> torch.Tensor:
    # Wan rotates neighbouring channels. Taking all first and then all second ones, alike for
    # queries and keys, leaves their products as they are and lets the rotation run on whole vectors.
    order = None if rope is None else _pairs_apart(attn.heads, attn.inner_dim, tokens.device)
    query = _project(attn.to_q, attn.norm_q, tokens, order).unflatten(2, (attn.heads, -1))
    key = _project(attn.to_k, attn.norm_k, context, order).unflatten(2, (attn.heads, -1))
    value = attn.to_v(context).unflatten(2, (attn.heads, -1))
    if rope is not None:
        query, key = _rotate(query, *rope), _rotate(key, *rope)
    query, key, value = (part.to(value.dtype).transpose(1, 2) for part in (query, key, value))
    if key.shape[2] <= _WRITTEN_OUT and tokens.device.type == "cpu":
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(2, 3)
        mixed = scores.softmax(-1, dtype=value.dtype) @ value
    else:
        mixed = F.scaled_dot_product_attention(query, key, value)
    return attn.to_out[0](mixed.transpose(1, 2).flatten(2))


def _pairs_apart(heads: int, dim: int, device) -> torch.Tensor:
    """int64 [dim]: within each head the even channels, then the odd ones."""
    return torch.arange(dim, device=device).view(heads, -1, 2).transpose(1, 2).reshape(-1)


def _project(linear, norm, x, order) -> torch.Tensor:
    weight, bias, gain = linear.weight, linear.bias, norm.weight
    if order is not None:
        weight, bias, gain = weight[order], bias[order], gain[order]
    return F.rms_norm(F.linear(x, weight, bias).float(), gain.shape, gain, norm.eps)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), -1)
