"""Putting quantized layers into a model, and taking them out again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .linear import QuantLayer, QuantLinear, SharedRows


@dataclass(frozen=True)
class QuantizedModel:
    """What a method returns: layers as data; the model itself is untouched.

    Attributes:
        method: name of the method.
        layers: by the name of the linear that each replaces.
        intervals: bits by layer name for each of the equal parts of the sampling steps, first steps first;
            empty when every layer has one precision. A layer that is not named keeps its full bits.
        report: what the method has to say, as JSON can hold it.
    """

    method: str
    layers: Mapping[str, QuantLayer]
    intervals: tuple[Mapping[str, int], ...] = ()
    report: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of all layers."""
        return sum(layer.nbytes for layer in self.layers.values())


class Applied:
    """What :func:`apply` did. As a context manager it undoes that at the end.

    Attributes:
        layers: the new modules, by name.
        after_undo: what else :meth:`undo` takes back, once.
    """

    def __init__(self, model: nn.Module, places: dict[str, _Place], quantized: QuantizedModel) -> None:
        self._model = model
        self._places = places
        self._intervals = quantized.intervals
        self.after_undo: list[Callable[[], None]] = []
        self.layers: dict[str, QuantLinear] = {name: place.new for name, place in places.items()}
        if self._intervals:
            self.set_interval(0)

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.undo()

    @property
    def intervals(self) -> tuple[Mapping[str, int], ...]:
        """Bits by layer name for each part of the sampling; empty when no layer changes."""
        return self._intervals

    @property
    def num_intervals(self) -> int:
        """Parts of the sampling that may differ in precision; 1 when none does."""
        return max(1, len(self._intervals))

    def set_step(self, step: int, num_steps: int) -> None:
        """Take the precision of a sampling step, counted from 0, in every layer; call it before each step.

        Raises:
            ValueError: a step outside of ``0 .. num_steps - 1``.
        """
        if not 0 <= step < num_steps:
            raise ValueError(f"vdit_ext.quant: step must be in 0 .. {num_steps - 1}, got {step}")
        self.set_interval(step * self.num_intervals // num_steps)

    def set_interval(self, interval: int) -> None:
        """Take the precision of one part of the sampling in every layer."""
        if not 0 <= interval < self.num_intervals:
            last = self.num_intervals - 1
            raise ValueError(f"vdit_ext.quant: interval must be in 0 .. {last}, got {interval}")
        if not self._intervals:
            return
        bits = self._intervals[interval]
        for name, layer in self.layers.items():
            layer.set_bits(bits.get(name, max(layer.switchable_bits)))

    def undo(self) -> None:
        """Put the original linears back, the very objects. A second call does nothing.

        Raises:
            RuntimeError: :meth:`release` has given them up.
        """
        for place in self._places.values():
            if place.old is None:
                raise RuntimeError(
                    "vdit_ext.quant: the original linears were expected to be kept, release() gave them up; "
                    "load the model again"
                )
        for name, place in self._places.items():
            parent, leaf = self._slot(name, place)
            parent._modules[leaf] = place.old
        self._places = {}
        while self.after_undo:
            self.after_undo.pop()()

    def _slot(self, name: str, place: _Place) -> tuple[nn.Module, str]:
        """Where the new module stands now: a LoRA wrapper may have come or gone since."""
        try:
            parent, leaf = find_linear(self._model, name)
        except ValueError:
            return place.parent, place.leaf
        return (parent, leaf) if parent._modules.get(leaf) is place.new else (place.parent, place.leaf)

    def release(self) -> None:
        """Give up the original linears, which frees their memory; :meth:`undo` is then impossible."""
        for place in self._places.values():
            place.old = None


@dataclass
class _Place:
    """Where one linear stood: ``parent._modules[leaf]``."""

    parent: nn.Module
    leaf: str
    old: nn.Linear | None
    new: QuantLinear


def apply(model: nn.Module, quantized: QuantizedModel) -> Applied:
    """Replace linears of a model by quantized ones, in place and undoably.

    The layers' tensors are moved to the device of the weights they replace. Linears under a LoRA wrapper are
    replaced below it, so that the adapter is added to the quantized product.

    Args:
        model: the model that was quantized, or one of the same architecture; compiled or not.
        quantized: what a method returned or a file held.

    Returns:
        An :class:`Applied`, whose ``undo()`` restores the model.

    Raises:
        ValueError: a layer that the model does not have, that is no linear, that has hooks (of offloading or
            ``add_lora``, say: quantize first), or another size; one sentence, and the model is as it was.
    """
    model = getattr(model, "_orig_mod", model)
    check_intervals(quantized)
    found = {name: find_linear(model, name) for name in quantized.layers}
    for name, (parent, leaf) in found.items():
        _check(name, parent._modules[leaf], quantized.layers[name])
    groups = shared_groups(quantized.layers)
    places = {}
    for name, (parent, leaf) in found.items():
        layer, old = quantized.layers[name], parent._modules[leaf]
        new = QuantLinear(layer, groups.get(layer.group)).to(old.weight.device).train(old.training)
        places[name] = _Place(parent, leaf, old, new)
    for place in places.values():
        place.parent._modules[place.leaf] = place.new
    return Applied(model, places, quantized)


def find_linear(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a layer, and under which name; below a LoRA wrapper if there is one.

    Raises:
        ValueError: no such layer.
    """
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"vdit_ext.quant: {name} must be a layer of {type(model).__name__}, there is none; the layers are "
            "another model's"
        ) from None
    if isinstance(getattr(module, "base_layer", None), nn.Module):
        name = f"{name}.base_layer"
    parent, _, leaf = name.rpartition(".")
    return model.get_submodule(parent), leaf


def get_linear(model: nn.Module, name: str) -> nn.Module:
    """The module that :func:`find_linear` finds, in a compiled model too."""
    parent, leaf = find_linear(getattr(model, "_orig_mod", model), name)
    return getattr(parent, leaf)


def shared_groups(layers: Mapping[str, QuantLayer]) -> dict[str | None, SharedRows]:
    """One :class:`SharedRows` for each group of at least two layers.

    Raises:
        ValueError: layers of one group whose inputs are transformed differently.
    """
    members: dict[str, list[str]] = {}
    for name, layer in layers.items():
        if layer.group is not None:
            members.setdefault(layer.group, []).append(name)
    for group, names in members.items():
        first = layers[names[0]].transform
        for other in names[1:]:
            if not _equal(first, layers[other].transform):
                raise ValueError(
                    f"vdit_ext.quant: layers of group {group} must transform their input alike, {names[0]} and "
                    f"{other} differ; give them groups of their own"
                )
    return {group: SharedRows(len(names)) for group, names in members.items() if len(names) > 1}


def check_intervals(quantized: QuantizedModel) -> None:
    """Raise ValueError, one sentence, unless the bit maps name layers, and bits that these have."""
    for bits in quantized.intervals:
        if unknown := sorted(bits.keys() - quantized.layers.keys()):
            raise ValueError(f"vdit_ext.quant: a bit map must name quantized layers, got {unknown[0]}")
        for name, value in bits.items():
            weight = quantized.layers[name].weight
            allowed: Iterable[int] = getattr(weight, "switchable_bits", (weight.bits,))
            if value not in allowed:
                raise ValueError(
                    f"vdit_ext.quant: {name} must have {' or '.join(map(str, allowed))} bits in a bit map, "
                    f"got {value}"
                )


def _equal(first: Any, second: Any) -> bool:
    a, b = first.tensors(), second.tensors()
    if first.settings() != second.settings() or a.keys() != b.keys():
        return False
    return all(a[name] is b[name] or torch.equal(a[name], b[name]) for name in a)


def _check(name: str, module: nn.Module, layer: QuantLayer) -> None:
    if not isinstance(module, nn.Linear) or isinstance(module, QuantLinear):
        kind = (
            "a linear that is quantized already" if isinstance(module, QuantLinear) else type(module).__name__
        )
        raise ValueError(f"vdit_ext.quant: {name} must be a torch.nn.Linear, got {kind}")
    expected = (layer.weight.out_features, layer.weight.in_features)
    if tuple(module.weight.shape) != expected:
        raise ValueError(
            f"vdit_ext.quant: the weight of {name} must be {list(expected)}, got {list(module.weight.shape)}; "
            "the layers belong to another model"
        )
    if (module.bias is None) != (layer.bias is None):
        wanted = "no bias" if layer.bias is None else "a bias"
        raise ValueError(f"vdit_ext.quant: {name} must have {wanted}, as when it was quantized")
    hooked = module._forward_hooks or module._forward_pre_hooks
    if hooked or hasattr(module, "_diffusers_hook") or hasattr(module, "_hf_hook"):
        raise ValueError(
            f"vdit_ext.quant: {name} must have no hooks, it has some; quantize before offloading or add_lora"
        )
