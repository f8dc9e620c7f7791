"""Exact sizes of vector-quantized models (VQ4DiT, sections 3 and 4): codes, codebooks, biases, row scales."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .kmeans_vq import VQFormat, clamp_codewords

MIB = 2**20


@dataclass(frozen=True)
class LinearSize:
    """Sizes of one linear layer. Layers with the same ``codebook`` name share one; None is one of its own."""

    out_features: int
    in_features: int
    bias: bool = True
    codebook: str | None = None

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features


@dataclass(frozen=True)
class VQSize:
    """Bytes of a vector-quantized model's linears, and what they were at full precision."""

    codes: float
    codebooks: float
    biases: float
    row_scales: float
    full: float

    @property
    def total(self) -> float:
        return self.codes + self.codebooks + self.biases + self.row_scales

    @property
    def ratio(self) -> float:
        """How many times smaller than at full precision."""
        return self.full / self.total


def vq_size(
    linears: Iterable[LinearSize],
    form: VQFormat,
    *,
    codebook_bits: int = 32,
    bias_bits: int = 32,
    row_scale_bits: int = 0,
    full_bits: int = 32,
) -> VQSize:
    """Size by the paper's formula: ``O * C / d * log2(k) + k * d * codebook_bits`` bits a layer, plus its bias.

    It counts indices without the padding of tiles. A codebook has fewer words where a layer is so small that
    they are clamped; shared ones count once.
    """
    codes = codebooks = biases = scales = full = 0
    groups: dict[str, int] = {}
    for number, linear in enumerate(linears):
        words = linear.weights // form.dim
        key = f"layer {number}" if linear.codebook is None else f"shared {linear.codebook}"
        groups[key] = groups.get(key, 0) + words
        codes += words * (form.codewords - 1).bit_length()
        biases += linear.out_features * bias_bits * linear.bias
        scales += linear.out_features * row_scale_bits
        full += linear.weights * full_bits + linear.out_features * bias_bits * linear.bias
    for words in groups.values():
        codebooks += clamp_codewords(form.codewords, words) * form.dim * codebook_bits
    return VQSize(*(bits / 8 for bits in (codes, codebooks, biases, scales, full)))


def dit_linears(
    depth: int = 28, hidden: int = 1152, mlp: int = 4608, *, adaln: bool = True, share_qkv: bool = False
) -> list[LinearSize]:
    """The linears of a DiT's blocks; DiT-XL/2 by default.

    share_qkv: one codebook for queries, keys and values (the released code's fused layer: five codebooks a
    block) instead of three (the paper's size: seven a block).
    """
    found = []
    for block in range(depth):
        qkv = f"qkv {block}" if share_qkv else None
        found += [LinearSize(hidden, hidden, codebook=qkv)] * 3
        found += [LinearSize(hidden, hidden), LinearSize(mlp, hidden), LinearSize(hidden, mlp)]
        if adaln:
            found.append(LinearSize(6 * hidden, hidden))
    return found
