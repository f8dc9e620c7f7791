"""LoRA beside any linear, quantized or not, added when the layer runs: ``y = layer(x) + scale * B (A x)``.

Nothing is merged, so a quantized weight stays what it is, and an adapter can be scaled, exchanged or taken off
at any time. peft works as well, since quantized layers are linears to it: ``model.load_lora_adapter`` and
``pipe.load_lora_weights`` wrap them as they wrap others. Only the loader of FLUX pipelines reads plain weights:
there, load LoRAs before quantizing, or with ``pipe.transformer.load_lora_adapter``. This module needs neither
peft nor diffusers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The two factors by the names that trainers give them.
_FACTORS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_down.weight": "a",
    "lora_up.weight": "b",
    "lora.down.weight": "a",
    "lora.up.weight": "b",
    "alpha": "alpha",
}
_PREFIXES = ("transformer.", "diffusion_model.", "base_model.model.")


@dataclass
class LowRank:
    """The adapter of one layer: A ``[r, in_features]``, B ``[out_features, r]``, and ``alpha / r`` of its
    file."""

    a: Tensor
    b: Tensor
    scale: float = 1.0


class Adapter:
    """A LoRA on a model, as :func:`add_lora` made it.

    Attributes:
        name: to tell adapters apart.
        scale: what its share is multiplied by; may be set at any time. 0 skips the work.
        layers: names of the layers that it changes.
    """

    def __init__(self, name: str, scale: float):
        self.name = name
        self.layers: list[str] = []
        self._shares: list[_Share] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self.scale = scale

    @property
    def scale(self) -> float:
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        if not math.isfinite(value):
            raise ValueError(f"vdit_ext.quant.lora: scale must be a finite number, got {value}")
        self._scale = float(value)
        for share in self._shares:
            share.scale = self._scale

    def remove(self) -> None:
        """Take the adapter off; the model is then what it was before. A second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class _Share:
    """The forward hook of one layer. Its factors follow the input's device and dtype, once for each."""

    def __init__(self, low_rank: LowRank, scale: float):
        self.low_rank = low_rank
        self.scale = scale

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        if self.scale == 0.0:
            return output
        x, one = args[0], self.low_rank
        if one.a.device != x.device or one.a.dtype != x.dtype:
            self.low_rank = one = LowRank(one.a.to(x.device, x.dtype), one.b.to(x.device, x.dtype), one.scale)
        return output + (self.scale * one.scale) * F.linear(F.linear(x, one.a), one.b)


def add_lora(
    model: nn.Module, state_dict: Mapping[str, Tensor], *, scale: float = 1.0, name: str = "default"
) -> Adapter:
    """Add a LoRA to the linears of a model, in place and undoably; several may be added.

    Args:
        model: with linears or quantized linears of the names that the file has.
        state_dict: of a LoRA in diffusers' names: ``<layer>.lora_A.weight`` ``[r, in_features]`` and
            ``<layer>.lora_B.weight`` ``[out_features, r]``, or ``lora_down`` and ``lora_up``, with
            ``<layer>.alpha`` where the file has it; a prefix ``transformer.`` or ``diffusion_model.`` may stand
            before. Files in another model's names go through the pipeline's ``lora_state_dict`` first.
        scale: what the low-rank product is multiplied by, beside ``alpha / r``.

    Returns:
        An :class:`Adapter`.

    Raises:
        ValueError: a sentence, for a key that is none of these, a layer that the model does not have, a missing
            factor, or sizes that do not fit; the model is then unchanged.
    """
    low_ranks = read_lora(state_dict)
    modules = dict(model.named_modules())
    for layer, one in low_ranks.items():
        _check_fits(layer, modules.get(layer), one)
    adapter = Adapter(name, scale)
    for layer, one in low_ranks.items():
        share = _Share(one, adapter.scale)
        adapter._shares.append(share)
        adapter._handles.append(modules[layer].register_forward_hook(share))
        adapter.layers.append(layer)
    return adapter


def read_lora(state_dict: Mapping[str, Tensor]) -> dict[str, LowRank]:
    """The adapters in a LoRA file by the name of their layer; see :func:`add_lora` for keys and errors."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state_dict.items():
        suffix = next((suffix for suffix in _FACTORS if key.endswith(f".{suffix}")), None)
        if suffix is None:
            raise ValueError(
                "vdit_ext.quant.lora: keys must end in lora_A.weight, lora_B.weight or alpha, got "
                f"{key!r}; the pipeline's lora_state_dict(file) converts files of other trainers"
            )
        layer = key.removesuffix(f".{suffix}")
        layer = next((layer.removeprefix(p) for p in _PREFIXES if layer.startswith(p)), layer)
        parts.setdefault(layer, {})[_FACTORS[suffix]] = tensor
    if not parts:
        raise ValueError("vdit_ext.quant.lora: a state dict with LoRA factors is expected, got an empty one")
    return {layer: _low_rank(layer, found) for layer, found in parts.items()}


def _low_rank(layer: str, found: dict[str, Tensor]) -> LowRank:
    if "a" not in found or "b" not in found:
        missing = "lora_A" if "a" not in found else "lora_B"
        raise ValueError(f"vdit_ext.quant.lora: {layer} must have lora_A and lora_B, {missing} is not there")
    a, b = found["a"], found["b"]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise ValueError(
            f"vdit_ext.quant.lora: {layer}: lora_A [r, in] and lora_B [out, r] are expected, got "
            f"{list(a.shape)} and {list(b.shape)}"
        )
    alpha = float(found["alpha"]) if "alpha" in found else float(a.shape[0])
    return LowRank(a, b, alpha / a.shape[0])


def _check_fits(layer: str, module: nn.Module | None, one: LowRank) -> None:
    if not isinstance(module, nn.Linear):
        came = "nothing of that name" if module is None else type(module).__name__
        raise ValueError(f"vdit_ext.quant.lora: {layer} must be a linear of the model, got {came}")
    sizes = (module.in_features, module.out_features)
    if (one.a.shape[1], one.b.shape[0]) != sizes:
        raise ValueError(
            f"vdit_ext.quant.lora: {layer} takes {sizes[0]} and gives {sizes[1]} channels, the LoRA is for "
            f"{one.a.shape[1]} and {one.b.shape[0]}"
        )
