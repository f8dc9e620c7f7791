"""Quantized linears in diffusers transformers: what ``accelerate(..., quant=...)`` does for one of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin
from torch import nn

from .. import _C
from ..quant import files
from ..quant.apply import Applied, QuantizedModel, apply
from ..quant.layers import CLASSES, class_layers, linear_layers, plain_linears
from ..quant.linear import QuantLinear
from ..quant.methods import METHODS, entry_of
from .quantizer import VditQuantConfig, VditQuantizer, described, quantized_layers

Quant = str | Path | QuantizedModel | VditQuantConfig
NOT_GIVEN = "not among the quantized layers that were given"


class LoadedLayers(Applied):
    """Layers that were quantized when the model was loaded; there is nothing to put back."""

    def __init__(
        self, model: nn.Module, layers: dict[str, QuantLinear], intervals: list[dict[str, int]]
    ) -> None:
        super().__init__(model, {}, QuantizedModel("loaded", {}, tuple(intervals)))
        self.layers = layers
        self.set_interval(0)

    def undo(self) -> None:
        """Give every layer its full bits again."""
        for layer in self.layers.values():
            layer.set_bits(max(layer.switchable_bits))


def for_each(quant: Any, models: Mapping[str, nn.Module]) -> dict[str, Quant]:
    """What to do with each transformer of a pipeline.

    Args:
        quant: as ``accelerate`` takes it. A dict goes by the names of the transformers. A folder that holds a
            folder for each transformer, as ``vdit quantize`` makes it of a pipeline with several, is one too.

    Raises:
        TypeError, ValueError: one sentence, for something else, or layers of one model for several.
    """
    if isinstance(quant, Mapping):
        if unknown := sorted(set(quant) - set(models)):
            raise ValueError(
                f"vdit_ext.accelerate: quant must name the transformers that there are ({', '.join(models)}), "
                f"got {unknown[0]!r}"
            )
        return {name: _checked(one) for name, one in quant.items()}
    quant = _checked(quant)
    if isinstance(quant, Path) and not files.is_saved(quant) and quant.is_dir():
        parts = {name: quant / name for name in models if files.is_saved(quant / name)}
        if parts:
            return parts
    own = isinstance(quant, QuantizedModel | Path) or quant.folder is not None
    if own and len(models) > 1:
        raise ValueError(
            "vdit_ext.accelerate: quant must be a dict by the names of the transformers "
            f"({', '.join(models)}), got the layers of one; each has weights of its own"
        )
    return dict.fromkeys(models, quant)


def _checked(quant: Any) -> Path | QuantizedModel | VditQuantConfig:
    if isinstance(quant, str) and quant in METHODS:
        return VditQuantConfig(method=quant, bits=entry_of(quant).bits[0])
    if isinstance(quant, str | Path):
        return Path(quant)
    if isinstance(quant, QuantizedModel | VditQuantConfig):
        return quant
    raise TypeError(
        "vdit_ext.accelerate: quant must be a folder, a quantized model, a VditQuantConfig or the name of a "
        f"method, got {type(quant).__name__}"
    )


def is_known(model: nn.Module, quant: Any) -> bool:
    """Whether the linears of a model can be found: by its class, or because ``quant`` names them."""
    if class_layers(model) is not None or isinstance(quant, QuantizedModel | Path | str | Mapping):
        return True
    return isinstance(quant, VditQuantConfig) and (quant.folder is not None or quant.layers is not None)


def known_classes() -> str:
    """Classes whose linears are known, for messages."""
    return ", ".join(CLASSES)


def layers_for(model: nn.Module, quant: Path | QuantizedModel | VditQuantConfig) -> QuantizedModel:
    """The quantized layers of a model; raises as reading a folder or a method does."""
    if isinstance(quant, Path):
        return files.load(quant)
    return quant if isinstance(quant, QuantizedModel) else quant.quantize(model)


def attach(model: nn.Module, quant: Path | QuantizedModel | VditQuantConfig | None) -> Applied | None:
    """Put quantized layers into a model; or take up those that it was loaded with, when none are given.

    Raises:
        ValueError, FileNotFoundError: one sentence, and the model is as it was.
    """
    if quant is not None:
        if quantized_layers(model):
            raise ValueError(
                f"vdit_ext.accelerate: quant must be left out for {type(model).__name__}, whose linears are "
                "quantized already"
            )
        applied = apply(model, quantized := layers_for(model, quant))
        if isinstance(model, ConfigMixin):
            applied.after_undo.append(announce(model, quantized))
        return applied
    if not (layers := quantized_layers(model)):
        return None
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if isinstance(config, Mapping):
        config = VditQuantConfig.from_dict(dict(config))
    intervals = config.intervals if isinstance(config, VditQuantConfig) else []
    names = {name.removesuffix(".base_layer"): layer for name, layer in layers.items()}
    return LoadedLayers(model, names, intervals)


def announce(model: nn.Module, quantized: QuantizedModel) -> Callable[[], None]:
    """Let diffusers know that a model is quantized, so that its ``save_pretrained`` writes what
    ``from_pretrained`` loads; returns what takes that back."""
    config = described(quantized, str(quantized.report.get("bits", "")))
    before = model._internal_dict
    model.hf_quantizer = VditQuantizer(config)
    model.register_to_config(quantization_config=config)

    def withdraw() -> None:
        del model.hf_quantizer
        model._internal_dict = before

    return withdraw


def linear_rows(
    model_name: str, model: nn.Module, applied: Applied | None, fused: Iterable[nn.Module] = ()
) -> list[dict[str, Any]]:
    """What each linear of a model runs, as dicts; none for a model without quantized linears.

    Args:
        applied: what drives the bits, if anything does.
        fused: blocks that run fused.
    """
    in_fused = {id(part) for block in fused for part in block.modules()}
    quantized = {n.removesuffix(".base_layer"): layer for n, layer in quantized_layers(model).items()}
    if not quantized:
        return []
    rows = []
    for name, layer in quantized.items():
        facts = _quantized_facts(name, layer, applied)
        if id(layer) in in_fused:
            facts["reason"] += ", in a fused block"
        rows.append(_row(model_name, name) | facts)
    known = class_layers(model)
    kept = linear_layers(model).kept if known is not None else {}
    for name, module in plain_linears(model).items():
        dtype = str(module.weight.dtype).removeprefix("torch.")
        reason = f"high precision: {kept.get(name, NOT_GIVEN)}"
        rows.append(_row(model_name, name) | {"format": dtype, "reason": reason})
    order = {name.removesuffix(".base_layer"): i for i, (name, _) in enumerate(model.named_modules())}
    return sorted(rows, key=lambda row: order[row["layer"]])


def _row(model: str, layer: str) -> dict[str, Any]:
    return {
        "model": model,
        "layer": layer,
        "format": "",
        "bits": "",
        "activations": "",
        "transform": "",
        "path": "upstream",
        "reason": "",
    }


def _quantized_facts(name: str, layer: QuantLinear, applied: Applied | None) -> dict[str, Any]:
    config = layer.config()
    source = config["input"]
    parts = [
        "channel scale" if source["has_channel_scale"] else "",
        f"hadamard {source['hadamard']}" if source["hadamard"] else "",
        "dual rotation" if source["rotation_block"] else "",
    ]
    return {
        "format": config["format"],
        "bits": bits_phrase(name, layer, applied),
        "activations": f"int{source['bits']}" if source["bits"] else "as they are",
        "transform": ", ".join(part for part in parts if part) or "none",
        "path": _path(layer),
        "reason": "shares the quantized input of its group" if layer.shared is not None else "quantized",
    }


def bits_phrase(name: str, layer: QuantLinear, applied: Applied | None) -> str:
    """Bits of a layer's weight, by parts of the sampling where they differ: "8", or "8, 4, 4, 4 by
    parts of the steps"."""
    full = max(layer.switchable_bits)
    intervals = applied.intervals if applied is not None else ()
    bits = [part.get(name, full) for part in intervals]
    if len(set(bits)) < 2:
        return str(bits[0] if bits else layer.bits)
    return f"{', '.join(map(str, bits))} by parts of the steps"


# Names of the formats to :func:`vdit_ext._C.linear_path`.
_PACKED = {"int4": "int4", "nibble_planes": "nibble planes", "twin_log": "table"}


def _kernel_capability(device: tuple[int, int]) -> int:
    """Of the kernels that are asked for on such a GPU: those for 9.0 run on request only."""
    asked = os.environ.get("VDIT_LINEAR_KERNEL") in ("sm90", "sm90_always")
    return 90 if device == (9, 0) and asked else 80


def _path(layer: QuantLinear) -> str:
    """Which product runs: on the CPU there is one; on CUDA that of the latest call, by its number of rows."""
    config, device = layer.config(), layer.qweight.device
    if device.type == "cpu":
        return f"cpu, {_C.cpu_isa()}"
    if config["format"] == "int8":
        return "int8"
    if config["format"] not in _PACKED or layer.last_rows is None or device.type != "cuda":
        return "fused or expanded, by the number of rows"
    # High planes alone are plain codes of four bits.
    narrow = config["format"] == "nibble_planes" and layer.bits == 4
    chosen = _C.linear_path(
        layer.last_rows,
        layer.out_features,
        layer.in_features,
        weight_format="int4" if narrow else _PACKED[config["format"]],
        table_size=8 if config["bits"] == 3 else 16,
        compute_capability=_kernel_capability(torch.cuda.get_device_capability(device)),
    )
    return {"fused": "fused", "expand": "expanded"}[chosen["path"]] + f" at {layer.last_rows} rows"
