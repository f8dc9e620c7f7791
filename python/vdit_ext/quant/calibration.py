"""What goes into each linear while a model samples: the data that the methods are fitted to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .apply import get_linear
from .layers import LinearInfo, linear_layers

AMAX_FLOOR = 1e-3  # ViDiT-Q, specs section 4: a channel that is always 0 would get an unbounded mask
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class InputStatistics:
    """The input of a linear over all calls of a calibration.

    Attributes:
        amax: fp32 ``[C]``, largest magnitude of each channel over tokens, prompts and steps, at least 1e-3.
        rms: root of the mean square of all entries (J of LRQ-DiT's routing).
        rows: ``[R, C]`` in the dtype of the model's activations, a uniform sample of the rows seen, on the CPU.
        num_rows: how many rows were seen.
        calls: how many calls were.
    """

    amax: Tensor
    rms: float
    rows: Tensor
    num_rows: int
    calls: int

    def to(self, device: torch.device | str) -> InputStatistics:
        """The same statistics with their tensors on a device."""
        return replace(self, amax=self.amax.to(device), rows=self.rows.to(device))


@dataclass(frozen=True)
class Calibration:
    """Statistics by layer name. Layers of one group share theirs, as they read one tensor.

    ``runs`` are the calls that made the model sample, for methods that must see whole blocks at work.
    """

    layers: Mapping[str, InputStatistics]
    runs: tuple[Callable[[], Any], ...] = ()

    def __getitem__(self, name: str) -> InputStatistics:
        """The statistics of a layer.

        Raises:
            KeyError: one sentence, for a layer that was not calibrated.
        """
        if name not in self.layers:
            raise KeyError(
                f"vdit_ext.quant: {name} must have been calibrated, it was not; calibrate the same layers"
            )
        return self.layers[name]


def calibrate(
    model: nn.Module,
    runs: Callable[[], Any] | Iterable[Callable[[], Any]],
    *,
    layers: Iterable[LinearInfo] | None = None,
    rows: int = 512,
    seed: int = 0,
    progress: Progress | None = None,
) -> Calibration:
    """Sample with a model and collect what its linears read.

    The model computes as it did; hooks are taken off again, also after an error.

    Args:
        model: full-precision model, not compiled.
        runs: calls that make the model sample, one for each prompt, over all steps; or a single one.
        layers: which linears; by default :func:`vdit_ext.quant.linear_layers` of the model.
        rows: R, rows kept of each input; a layer that saw fewer keeps them all.
        seed: of the choice of rows, which depends on it and on the order of calls alone.
        progress: called with runs done, runs in all, and what is done.

    Raises:
        ValueError: no run or no layer, a layer that never ran, whose input has another size than its weight, or
            that met a NaN or an infinity; one sentence that names the first such layer.
    """
    model = _plain_model(model)
    calls = [runs] if callable(runs) else list(runs)
    infos = list(linear_layers(model) if layers is None else layers)
    if not calls or not infos or rows < 1:
        raise ValueError(
            f"vdit_ext.quant.calibrate: runs, layers and rows must be at least one, got {len(calls)}, "
            f"{len(infos)} and {rows}"
        )
    leaders: dict[str, _Collector] = {}
    for info in infos:
        if info.group not in leaders:
            leaders[info.group] = _Collector(info.name, info.in_features, rows, seed + len(leaders))
    handles = [one.attach(model) for one in leaders.values()]
    try:
        for done, call in enumerate(calls):
            with torch.no_grad():
                call()
            for one in leaders.values():
                one.check()
            if progress is not None:
                progress(done + 1, len(calls), "calibrate")
    finally:
        for handle in handles:
            handle.remove()
    found = {group: one.statistics() for group, one in leaders.items()}
    return Calibration({info.name: found[info.group] for info in infos}, tuple(calls))


def _plain_model(model: nn.Module) -> nn.Module:
    if hasattr(model, "_orig_mod") or any(part._compiled_call_impl is not None for part in model.modules()):
        raise ValueError(
            "vdit_ext.quant.calibrate: the model must not be compiled, it is; calibrate and quantize first"
        )
    return model


class _Collector:
    """Collects the input of one linear."""

    def __init__(self, name: str, channels: int, rows: int, seed: int) -> None:
        self.name, self.channels, self.limit = name, channels, rows
        self.amax: Tensor | None = None
        self.squares: Tensor | None = None  # fp64 sum, on the input's device
        self.num_rows = self.calls = 0
        self.generator = torch.Generator().manual_seed(seed)
        # A uniform sample without knowing how many rows there will be: each row draws a key, and those with the
        # largest keys stay.
        self.keys = torch.empty(0)
        self.rows: Tensor | None = None

    def attach(self, model: nn.Module) -> Any:
        return get_linear(model, self.name).register_forward_pre_hook(self._hook, with_kwargs=True)

    def _hook(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x = (args[0] if args else kwargs["input"]).detach()
        if x.shape[-1] != self.channels:
            raise ValueError(
                f"vdit_ext.quant.calibrate: the input of {self.name} must have {self.channels} channels, "
                f"got {x.shape[-1]}"
            )
        x = x.reshape(-1, self.channels)
        self.calls += 1
        if len(x) == 0:
            return
        # Reductions that copy nothing: a video's feed-forward input takes gigabytes as it is.
        low, high = x.aminmax(dim=0)
        amax = torch.maximum(-low, high).to(torch.float32)
        wide = torch.promote_types(x.dtype, torch.float32)
        squares = torch.linalg.vector_norm(x, dim=1, dtype=wide).double().square().sum()
        self.amax = amax if self.amax is None else torch.maximum(self.amax, amax.to(self.amax.device))
        self.squares = squares if self.squares is None else self.squares + squares.to(self.squares.device)
        self._sample(x)
        self.num_rows += len(x)

    def _sample(self, x: Tensor) -> None:
        keys = torch.rand(len(x), generator=self.generator)
        if len(self.keys) == self.limit:
            chosen = (keys > self.keys.min()).nonzero()[:, 0]
            keys, x = keys[chosen], x[chosen.to(x.device)]
        if len(keys) > self.limit:
            keys, chosen = keys.topk(self.limit)
            x = x[chosen.to(x.device)]
        x = x.cpu()
        rows = x.clone() if self.rows is None else torch.cat([self.rows, x])
        keys = torch.cat([self.keys, keys])
        self.keys, kept = keys.topk(min(self.limit, len(keys)))
        self.rows = rows[kept]

    def check(self) -> None:
        if self.amax is not None and not bool(self.amax.isfinite().all()):
            raise ValueError(
                f"vdit_ext.quant.calibrate: the input of {self.name} must be finite, it has a NaN or an "
                "infinity; run the model in a wider dtype"
            )

    def statistics(self) -> InputStatistics:
        if self.num_rows == 0:
            raise ValueError(
                f"vdit_ext.quant.calibrate: every layer must run, {self.name} never did; leave it out "
                "with layers="
            )
        rms = float((self.squares / (self.num_rows * self.channels)).sqrt())
        amax = self.amax.cpu().clamp_min(AMAX_FLOOR)
        return InputStatistics(amax, rms, self.rows, self.num_rows, self.calls)
