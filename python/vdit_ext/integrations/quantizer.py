"""Loading and saving quantized transformers through diffusers. Tested with diffusers 0.42.1.

Importing this module enters :class:`VditQuantConfig` and :class:`VditQuantizer` in diffusers' tables, which
have no public way to register; ``from_pretrained``, ``save_pretrained`` and ``PipelineQuantizationConfig`` then
know them.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from ..quant import files
from ..quant.apply import QuantizedModel, apply, find_linear, shared_groups
from ..quant.linear import QuantLayer, QuantLinear
from ..quant.measure import effective_weight
from ..quant.methods import check_free, quantize_free

VERSION = files.VERSION


class Method(enum.StrEnum):
    """diffusers names a quantizer by a string that has a ``value``."""

    VDIT = "vdit"


@dataclass
class VditQuantConfig(QuantizationConfigMixin):
    """How a transformer is quantized while it is loaded, or how one on disk was.

    Exactly one of ``method`` and ``folder`` says what to do with full-precision weights. ``weights`` and
    ``intervals`` are filled in by loading and are what ``config.json`` of a quantized model holds.

    Attributes:
        method: a method of :data:`vdit_ext.quant.methods.METHODS` that needs no calibration, such as "rtn".
        bits: of weights and activations, as in "w8a8".
        folder: of layers that ``vdit quantize`` wrote for this model.
        layers: regular expressions for names of linears, in place of the list of the model's class
            (:func:`vdit_ext.quant.layers.linear_layers`).
        seed: of the method.
        settings: further settings of the method.
        weights: the config of each quantized layer, by name.
        intervals: bits by layer name for equal parts of the sampling; ``accelerate`` follows them, and without
            it layers keep their full bits.
        version: of the format of the tensors.
    """

    method: str | None = None
    bits: str = "w8a8"
    folder: str | None = None
    layers: str | list[str] | None = None
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, dict[str, Any]] | None = None
    intervals: list[dict[str, int]] = field(default_factory=list)
    version: int = VERSION
    quant_method: Method = Method.VDIT

    def __post_init__(self) -> None:
        self.quant_method = Method.VDIT
        if self.folder is not None:
            self.folder = str(self.folder)
        if self.weights is not None:
            if self.version != VERSION:
                raise ValueError(
                    f"vdit_ext: the quantized model must be of format version {VERSION}, got {self.version}; "
                    "another version of vdit_ext wrote it"
                )
            return
        if (self.method is None) == (self.folder is None):
            raise ValueError(
                "vdit_ext.VditQuantConfig: method or folder is expected, and not both, got "
                f"method={self.method!r}, folder={self.folder!r}"
            )
        if self.method is not None:
            check_free(self.method, self.bits)

    def quantize(self, model: nn.Module) -> QuantizedModel:
        """The quantized layers of a full-precision model, which is left as it is."""
        if self.folder is not None:
            return files.load(self.folder)
        return quantize_free(
            self.method, model, bits=self.bits, layers=self.layers, seed=self.seed, **self.settings
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return super().to_dict() | {"quant_method": self.quant_method.value}


class VditQuantizer(DiffusersQuantizer):
    """Fills :class:`QuantLinear` modules from a quantized folder, or quantizes once full-precision weights are
    in."""

    # What the class wants in fp32 stays so, as without quantization.
    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: VditQuantConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.pre_quantized = quantization_config.weights is not None

    # -- what diffusers asks ---------------------------------------------------------------------------------

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse, in one sentence, a model spread over devices that is yet to be quantized."""
        places = kwargs.get("device_map")
        if self.pre_quantized or not isinstance(places, Mapping) or len(set(places.values())) <= 1:
            return
        raise ValueError(
            "vdit_ext: device_map must name one device for a model that is quantized while it is loaded, got "
            f"{len(set(places.values()))}; save it quantized first, with save_pretrained or `vdit quantize`"
        )

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        return self.pre_quantized and _layer_of(model, param_name) is not None

    def check_quantized_param_shape(self, param_name: str, current_param: Tensor, loaded_param: Tensor) -> bool:
        raise ValueError(
            f"vdit_ext: {param_name} must be {list(current_param.shape)} by config.json, got "
            f"{list(loaded_param.shape)}; the files belong to different models"
        )

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device,
        state_dict: dict[str, Any],
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        layer, key = _layer_of(model, param_name)
        # `param_value` has been cast to the model's dtype; scales stay fp32.
        stored = state_dict[param_name]
        expected = layer._buffers[key].dtype
        if stored.dtype != expected:
            raise ValueError(
                f"vdit_ext: {param_name} must be {_name(expected)} by config.json, got {_name(stored.dtype)}; "
                "the files belong to different models"
            )
        layer._buffers[key] = files.aligned(stored.to(target_device))

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        missing = sorted(key for key in missing_keys if _layer_of(model, key) is not None)
        if missing and self.pre_quantized:
            raise ValueError(
                f"vdit_ext: the file must hold all tensors of the quantized layers, {missing[0]} is missing; "
                "it belongs to another model, or is not complete"
            )
        return missing_keys

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        # Layers of a group have their mask and their signs in common.
        return files.unshared(state_dict), {}

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if not self.pre_quantized:
            return
        for name, config in self.quantization_config.weights.items():
            parent, leaf = find_linear(model, name)
            old = parent._modules.get(leaf)
            try:
                new = QuantLinear.empty(config, device="meta")
            except (KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"vdit_ext: config.json must hold the settings of the quantized layer {name}, they are "
                    f"damaged ({type(error).__name__}: {error})"
                ) from error
            sizes = (new.in_features, new.out_features)
            if not isinstance(old, nn.Linear) or (old.in_features, old.out_features) != sizes:
                raise ValueError(
                    f"vdit_ext: {name} must be a linear from {sizes[0]} to {sizes[1]} channels by "
                    f"config.json, the model has {old}"
                )
            parent._modules[leaf] = new

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        config = self.quantization_config
        if not self.pre_quantized:
            quantized = config.quantize(model)
            apply(model, quantized).release()
            config.weights = {name: layer.config() for name, layer in quantized.layers.items()}
            config.intervals = [dict(bits) for bits in quantized.intervals]
            return
        share_groups(model)

    def _dequantize(self, model: nn.Module) -> nn.Module:
        for name, layer in quantized_layers(model).items():
            parent, _, leaf = name.rpartition(".")
            parent = model.get_submodule(parent)
            parent._modules[leaf] = plain_linear(layer.to_layer(), model.dtype)
        model.register_to_config(quantization_config=None)
        return model


def quantized_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """The quantized linears of a model, by name as in ``named_modules()``."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def share_groups(model: nn.Module) -> None:
    """Let layers that read one tensor quantize it once, as :func:`vdit_ext.quant.apply.apply` does."""
    layers = quantized_layers(model)
    groups = shared_groups({name: layer.to_layer() for name, layer in layers.items()})
    for layer in layers.values():
        layer.shared = groups.get(layer.config()["group"])


def plain_linear(layer: QuantLayer, dtype: torch.dtype) -> nn.Linear:
    """The linear whose weight is what a quantized one stands for; the input's rounding is gone with it."""
    weight = effective_weight(layer).contiguous()
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
    return linear


def _layer_of(model: nn.Module, key: str) -> tuple[QuantLinear, str] | None:
    """The quantized layer and the tensor in it that a key of a state dict means, or None."""
    name, _, leaf = key.rpartition(".")
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return None
    return (module, leaf) if isinstance(module, QuantLinear) and leaf in module._buffers else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def described(quantized: QuantizedModel, bits: str) -> VditQuantConfig:
    """The config of a model that has these layers; ``bits`` is for the reader."""
    return VditQuantConfig(
        method=quantized.method,
        bits=bits,
        weights={name: layer.config() for name, layer in quantized.layers.items()},
        intervals=[dict(bits) for bits in quantized.intervals],
    )


def save_quantized(
    folder: str | Path,
    model: nn.Module,
    quantized: QuantizedModel,
    *,
    info: Mapping[str, Any] | None = None,
    whole: bool = True,
) -> Path:
    """Write quantized layers of a full-precision diffusers model.

    Args:
        folder: where to; see :func:`vdit_ext.quant.files.save`.
        model: in full precision, as it was when the layers were made.
        quantized: the layers.
        info: further facts for the JSON.
        whole: also write the other tensors and ``config.json``, so that ``from_pretrained(folder)`` loads a
            quantized model; else the layers alone, for ``accelerate(model, quant=folder)``.

    Raises:
        ValueError, OSError: as :func:`vdit_ext.quant.files.save` does.
    """
    info = {"model": type(model).__name__} | dict(info or {})
    if not whole:
        return files.save(folder, quantized, info=info)
    own = tuple(f"{name}." for name in quantized.layers)
    rest = {key: value for key, value in model.state_dict().items() if not key.startswith(own)}
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    own_config = described(quantized, str(info.get("bits", "")))
    names = {"_class_name": type(model).__name__, "_diffusers_version": _diffusers_version()}
    config = names | config | {"quantization_config": own_config.to_dict()}
    return files.save(folder, quantized, info=info, rest=rest, config=config)


def _diffusers_version() -> str:
    import diffusers

    return diffusers.__version__


AUTO_QUANTIZATION_CONFIG_MAPPING[Method.VDIT.value] = VditQuantConfig
AUTO_QUANTIZER_MAPPING[Method.VDIT.value] = VditQuantizer
