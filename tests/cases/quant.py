"""Inputs of the tests of quantized layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vdit_ext.quant.layers import CROSS, FFN, SELF, TEMPORAL, LinearInfo
from vdit_ext.testing import generator


def normal(*shape: int, seed: int = 0, std: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed)) * std


def with_outliers(rows: int, channels: int, *, count: int, factor: float, seed: int) -> Tensor:
    """N(0, 1) ``[rows, channels]``, some channels ``factor`` times larger."""
    x = normal(rows, channels, seed=seed)
    x[:, torch.randperm(channels, generator=generator(seed + 1))[:count]] *= factor
    return x


def snr(actual: Tensor, expected: Tensor) -> float:
    """Signal-to-noise ratio in dB."""
    error = (actual.double() - expected.double()).square().sum()
    return float(10 * torch.log10(expected.double().square().sum() / error))


class Block(nn.Module):
    """A block with the linears of a diffusers block, of which ``attn.to_q`` to ``attn.to_v`` read one tensor."""

    def __init__(self, dim: int, ffn: int) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({name: nn.Linear(dim, dim) for name in ("to_q", "to_k", "to_v", "to_out")})
        self.up, self.down = nn.Linear(dim, ffn), nn.Linear(ffn, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.attn[name](x) for name in ("to_q", "to_k", "to_v"))
        x = x + self.attn["to_out"](torch.tanh(q) * torch.sigmoid(k) + v)
        return x + self.down(torch.relu(self.up(x)))


class Tiny(nn.Module):
    """Two blocks of that kind; layers as :func:`layers_of` lists them."""

    def __init__(self, dim: int = 96, ffn: int = 160, blocks: int = 2, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.blocks = nn.ModuleList([Block(dim, ffn) for _ in range(blocks)])
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def layers_of(model: Tiny) -> list[LinearInfo]:
    """Self-attention, of which ``to_out`` counts as cross-attention, and feed-forward."""
    found = []
    for i, block in enumerate(model.blocks):
        place = f"blocks.{i}"
        names = {f"attn.{name}": (SELF, "qkv") for name in ("to_q", "to_k", "to_v")}
        names |= {"attn.to_out": (CROSS, "out"), "up": (FFN, "up"), "down": (FFN, "down")}
        for name, (kind, group) in names.items():
            linear = block.get_submodule(name)
            sizes = (linear.in_features, linear.out_features)
            found.append(LinearInfo(f"{place}.{name}", place, kind, f"{place}.{group}", *sizes))
    return found


def opensora_layers(blocks: int = 28, dim: int = 1152) -> list[LinearInfo]:
    """The 13 linears of each OpenSora block: 4 each of spatial, temporal and cross-attention, and feed-forward
    (counted as one of 8 dim^2 weights in two linears)."""
    found = []
    for i in range(blocks):
        for kind in (SELF, TEMPORAL, CROSS):
            for name in ("q", "k", "v", "proj"):
                found.append(
                    LinearInfo(f"b.{i}.{kind}.{name}", f"b.{i}", kind, f"b.{i}.{kind}.{name}", dim, dim)
                )
        found.append(LinearInfo(f"b.{i}.fc1", f"b.{i}", FFN, f"b.{i}.fc1", dim, 4 * dim))
        found.append(LinearInfo(f"b.{i}.fc2", f"b.{i}", FFN, f"b.{i}.fc2", 4 * dim, dim))
    return found
