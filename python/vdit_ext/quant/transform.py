"""What happens to a layer's input before it is rounded: channel mask, then an orthogonal rotation.

``x`` becomes ``(x * channel_scale) R`` and, once and offline, the weight ``(W / channel_scale) R``, so that the
product of the two is unchanged but for rounding (ViDiT-Q, specs section 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .hadamard import FUSED_HADAMARD, multiply_blocks


@dataclass(frozen=True)
class DualRotation:
    """Rotate, permute, rotate: blocks of b channels times ``first``, permuted, blocks times ``second``.

    first, second: fp32 ``[b, b]``, orthogonal, shared by all blocks; permutation: int64 ``[C]``: channel i of
    the permuted row is channel ``permutation[i]`` of the rotated one. C is a multiple of b.
    """

    first: Tensor
    permutation: Tensor
    second: Tensor

    def rotate(self, x: Tensor) -> Tensor:
        """fp32 ``[..., C]`` to the same."""
        x = _blockwise(x, self.first).index_select(-1, self.permutation)
        return _blockwise(x, self.second)

    def undo(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`rotate`."""
        x = _blockwise(x, self.second.T).index_select(-1, self.permutation.argsort())
        return _blockwise(x, self.first.T)


def _blockwise(x: Tensor, matrix: Tensor) -> Tensor:
    return (x.unflatten(-1, (-1, len(matrix))) @ matrix).flatten(-2)


@dataclass(frozen=True)
class InputTransform:
    """Transform and width of a layer's input.

    Attributes:
        channel_scale: fp32 ``[C]``, positive, or None.
        hadamard: block size of the Hadamard rotation; 0 for none. Sizes up to 128 run inside of
            :func:`vdit_ext.ops.quantize_rows`; others, such as all of C, in torch before it.
        signs: fp32 ``[C]`` of +1 and -1, applied before the Hadamard matrix, or None.
        rotation: a :class:`DualRotation` instead of Hadamard blocks, or None.
        bits: of the activations, 2 to 8; 0 leaves them as they are.
        clip: share (0 to 1] of a row's largest magnitude that is the largest code; what lies above is cut.
    """

    channel_scale: Tensor | None = None
    hadamard: int = 0
    signs: Tensor | None = None
    rotation: DualRotation | None = None
    bits: int = 8
    clip: float = 1.0

    @property
    def is_fused(self) -> bool:
        """Whether ``quantize_rows`` does all of it."""
        return self.rotation is None and self.clip == 1 and self.hadamard in (0, *FUSED_HADAMARD)

    @property
    def changes_rows(self) -> bool:
        """Whether :meth:`rows` does anything."""
        return self.channel_scale is not None or self.rotation is not None or self.hadamard != 0

    def rows(self, x: Tensor) -> Tensor:
        """The transformed input before rounding: ``[..., C]`` to fp32 ``[..., C]``."""
        x = x.to(torch.float32)
        return self.rotate(x if self.channel_scale is None else x * self.channel_scale)

    def weight(self, weight: Tensor) -> Tensor:
        """The weight that multiplies :meth:`rows`: ``[O, C]`` to fp32 ``[O, C]``."""
        weight = weight.to(torch.float32)
        return self.rotate(weight if self.channel_scale is None else weight / self.channel_scale)

    def rotate(self, x: Tensor) -> Tensor:
        """The orthogonal part alone, on fp32 ``[..., C]``."""
        if self.rotation is not None:
            return self.rotation.rotate(x)
        if self.hadamard == 0:
            return x
        return multiply_blocks(x if self.signs is None else x * self.signs, self.hadamard)

    def plain_weight(self, weight: Tensor) -> Tensor:
        """The inverse of :meth:`weight`, fp32 ``[O, C]`` to the same: the result multiplies plain rows as the
        argument does :meth:`rows`."""
        if self.rotation is not None:
            weight = self.rotation.undo(weight)
        elif self.hadamard:
            weight = multiply_blocks(weight, self.hadamard, transposed=True)
            weight = weight if self.signs is None else weight * self.signs
        return weight if self.channel_scale is None else weight * self.channel_scale

    def clipped(self, x: Tensor) -> Tensor:
        """Transformed rows with what lies above the clip cut off."""
        if self.clip == 1:
            return x
        limit = x.abs().amax(-1, keepdim=True) * self.clip
        return x.clamp(-limit, limit)

    def to(self, device: torch.device | str) -> InputTransform:
        """The same transform with its tensors on a device."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return InputTransform.from_tensors(self.settings(), moved)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are present, by the name of a module's buffer."""
        found = {"channel_scale": self.channel_scale, "signs": self.signs}
        if self.rotation is not None:
            found |= {f"rotation_{f.name}": getattr(self.rotation, f.name) for f in fields(self.rotation)}
        return {name: value for name, value in found.items() if value is not None}

    def settings(self) -> dict[str, Any]:
        """What a JSON file keeps."""
        return {
            "bits": self.bits,
            "hadamard": self.hadamard,
            "has_channel_scale": self.channel_scale is not None,
            "has_signs": self.signs is not None,
            "rotation_block": 0 if self.rotation is None else len(self.rotation.first),
            "clip": self.clip,
        }

    @staticmethod
    def layout(settings: dict[str, Any], in_features: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Names, shapes and dtypes of the tensors that such settings ask for."""
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        if settings["has_channel_scale"]:
            found["channel_scale"] = ((in_features,), torch.float32)
        if settings["has_signs"]:
            found["signs"] = ((in_features,), torch.float32)
        if size := settings["rotation_block"]:
            block = ((size, size), torch.float32)
            found |= {"rotation_first": block, "rotation_second": block}
            found["rotation_permutation"] = ((in_features,), torch.int64)
        return found

    @classmethod
    def from_tensors(cls, settings: dict[str, Any], tensors: dict[str, Tensor]) -> InputTransform:
        """The transform that ``settings`` and ``tensors`` of another one describe."""
        rotation = None
        if settings["rotation_block"]:
            rotation = DualRotation(**{f.name: tensors[f"rotation_{f.name}"] for f in fields(DualRotation)})
        return cls(
            channel_scale=tensors["channel_scale"] if settings["has_channel_scale"] else None,
            hadamard=settings["hadamard"],
            signs=tensors["signs"] if settings["has_signs"] else None,
            rotation=rotation,
            bits=settings["bits"],
            clip=settings["clip"],
        )


def channel_mask(amax: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """ViDiT-Q's mask ``m_c = w_c^alpha / a_c^(1 - alpha)`` (specs section 4), fp32 ``[C]``.

    Args:
        amax: fp32 ``[C]``, a: largest magnitudes of the input's channels, positive.
        weights: the matrices ``[O, C]`` that read the input; w is the largest magnitude over all of them,
            because they share one mask.
        alpha: 0 to 1, how far the mask follows the weights; SmoothQuant's exponent, and that of ViDiT-Q's first
            release, is 1 - alpha.

    Raises:
        ValueError: alpha out of range.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"vdit_ext.quant: alpha must be in 0 .. 1, got {alpha}")
    wmax = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0).to(torch.float32)
    wmax = wmax.clamp_min(float(wmax.amax().clamp_min(1e-30)) * 1e-5)  # a channel without weights has any mask
    return wmax**alpha / amax ** (1 - alpha)
