"""How far quantized layers are from the originals: weights alone, and whole blocks on the inputs that the
full-precision model gives them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from .apply import Applied, QuantizedModel, get_linear
from .layers import linear_layers
from .linear import QuantLayer, compute_device
from .weights import NibblePlaneWeight

OnStep = Callable[[int, int], None]  # (step, from 0; steps in all)
Sample = Callable[[OnStep], Any]  # samples with the model, calling back before each step, as in .sensitivity


def before_each(on_step: OnStep, steps: int) -> OnStep:
    """A callback for after each step, counted from 1, that calls ``on_step`` before each, counted from 0.

    It has been called for the first one when this returns.
    """
    on_step(0, steps)
    return lambda done, total: on_step(done, total) if done < total else None


def snr(reference: Tensor, approximation: Tensor) -> float:
    """Signal over error in dB, over all elements; infinite where both are equal, NaN for a zero signal."""
    reference, error = reference.double(), approximation.double() - reference.double()
    signal, noise = float(reference.square().sum()), float(error.square().sum())
    if signal == 0:
        return math.nan
    return math.inf if noise == 0 else 10 * math.log10(signal / noise)


def effective_weight(layer: QuantLayer, bits: int | None = None) -> Tensor:
    """The matrix that a quantized layer multiplies its untransformed input with, fp32 ``[O, C]``.

    Args:
        bits: precision of a layer in two planes; None for the full one.
    """
    weight = layer.weight
    switched = isinstance(weight, NibblePlaneWeight) and bits is not None
    return layer.transform.plain_weight(weight.dequantize(bits) if switched else weight.dequantize())


def weight_snr(linear: nn.Linear, layer: QuantLayer, bits: int | None = None) -> float:
    """SNR in dB of a quantized weight, mask and rotation undone, against the linear it stands for."""
    place = compute_device(linear)
    return snr(linear.weight.detach().to(place, torch.float32), effective_weight(layer.to(place), bits))


def weight_snrs(model: nn.Module, quantized: QuantizedModel) -> dict[str, float]:
    """:func:`weight_snr` of every layer, by name; where bits change with the steps, at the fewest of them."""
    found = {}
    for name, layer in quantized.layers.items():
        fewest = min((bits[name] for bits in quantized.intervals if name in bits), default=None)
        found[name] = weight_snr(get_linear(model, name), layer, fewest)
    return found


@dataclass(frozen=True)
class _Call:
    step: int
    args: tuple
    kwargs: Mapping[str, Any]
    output: Any


class BlockProbe:
    """Calls of a full-precision model's blocks, to be answered again by quantized ones.

    Each block is fed what the full-precision model fed it, so that the errors of one block do not reach the
    next.

    Args:
        model: in full precision.
        sample: samples with the model once and calls ``on_step(step, steps)`` before each step.
        steps: of the sampling, counted from 0; the first call of each block in each of them is kept.
        blocks: names of the blocks; by default all that hold quantized linears.

    Raises:
        ValueError: a block that did not run in the steps asked for.
    """

    def __init__(
        self, model: nn.Module, sample: Sample, steps: Iterable[int], blocks: Iterable[str] | None = None
    ) -> None:
        names = blocks if blocks is not None else dict.fromkeys(i.block for i in linear_layers(model))
        self._model = model
        self._calls: dict[str, list[_Call]] = {name: [] for name in names}
        self._num_steps = 0
        wanted, at = set(steps), [0]

        def on_step(step: int, steps: int) -> None:
            at[0], self._num_steps = step, steps

        def keep(name: str) -> Callable:
            def hook(_module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
                calls = self._calls[name]
                if at[0] in wanted and not any(call.step == at[0] for call in calls):
                    calls.append(_Call(at[0], *_copied((args, kwargs, output))))

            return hook

        handles = [
            model.get_submodule(name).register_forward_hook(keep(name), with_kwargs=True)
            for name in self._calls
        ]
        try:
            with torch.no_grad():
                sample(on_step)
        finally:
            for handle in handles:
                handle.remove()
        if silent := [name for name, calls in self._calls.items() if len(calls) < len(wanted)]:
            raise ValueError(f"vdit_ext.quant: {silent[0]} must run in steps {sorted(wanted)}, it did not")

    @torch.no_grad()
    def snrs(self, applied: Applied) -> dict[str, float]:
        """SNR in dB of each block's output, over the kept calls, while quantized layers are in the model."""
        found = {}
        for name, calls in self._calls.items():
            block, reference, answers = self._model.get_submodule(name), [], []
            for call in calls:
                applied.set_step(call.step, self._num_steps)
                args, kwargs = _copied((call.args, call.kwargs))
                reference += _floats(call.output)
                answers += _floats(block(*args, **kwargs))
            flat = [torch.cat([t.flatten().cpu().float() for t in part]) for part in (reference, answers)]
            found[name] = snr(*flat)
        return found


def _copied(tree: Any) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), tree)


def _floats(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def mean_db(values: Iterable[float]) -> float:
    """Mean of decibels, those that are finite; infinite where all are."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.inf
