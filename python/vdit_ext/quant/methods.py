"""The methods by name: where each is, which bits it has, and whether it needs activations to look at."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import nn

from .apply import QuantizedModel
from .calibration import Progress
from .layers import LinearInfo, linear_layers


@dataclass(frozen=True)
class MethodEntry:
    """One method.

    Attributes:
        module, function: where it is; imported when it is used. The module's ``BITS`` are what it takes, the
            default first.
        calibrated: whether it needs a calibration.
        about: a few words for help texts.
    """

    module: str
    function: str
    calibrated: bool
    about: str

    @property
    def bits(self) -> tuple[str, ...]:
        """What ``bits`` may be, the default first."""
        return tuple(self._home().BITS)

    def load(self) -> Callable[..., QuantizedModel]:
        """The function ``(model, calibration, *, bits, layers, seed, progress, **settings)``."""
        return getattr(self._home(), self.function)

    def __call__(self, model: nn.Module, calibration: Any = None, **settings: Any) -> QuantizedModel:
        """Call the function."""
        return self.load()(model, calibration, **settings)

    def _home(self) -> Any:
        return import_module(f".{self.module}", __package__)


# A method's name to its entry; a new method is a new line.
METHODS: dict[str, MethodEntry] = {
    "vidit_q": MethodEntry("vidit_q", "quantize", True, "channel mask and rotation"),
    "lrq_dit": MethodEntry("lrq_dit", "quantize", True, "twin-log weights"),
    "vq4dit": MethodEntry("vq4dit", "quantize", True, "codewords for runs of weights"),
    "kmeans_vq": MethodEntry("vq4dit", "quantize_kmeans", False, "codewords by plain k-means"),
    "smoothquant": MethodEntry("baselines", "smooth_quant", True, "channel mask alone"),
    "rtn": MethodEntry("baselines", "round_to_nearest", False, "rounding to nearest"),
}


def entry_of(name: str, bits: str | None = None) -> MethodEntry:
    """The entry of a method that has these bits.

    Raises:
        ValueError: one sentence, for an unknown name, or bits that the method does not have.
    """
    if name not in METHODS:
        raise ValueError(f"vdit_ext.quant: method must be one of {', '.join(METHODS)}, got {name!r}")
    entry = METHODS[name]
    if bits is not None and bits not in entry.bits:
        raise ValueError(f"vdit_ext.quant: bits of {name} must be one of {', '.join(entry.bits)}, got {bits!r}")
    return entry


def check_free(name: str, bits: str) -> None:
    """Raise ValueError, one sentence, unless the method has these bits and needs no calibration."""
    if entry_of(name, bits).calibrated:
        free = ", ".join(name for name, entry in METHODS.items() if not entry.calibrated)
        raise ValueError(
            f"vdit_ext.quant: a method without calibration is expected here ({free}), got {name}; run "
            f"`vdit quantize MODEL --method {name} --out FOLDER` and give the folder"
        )


def quantize_free(
    name: str,
    model: nn.Module,
    *,
    bits: str,
    layers: str | Iterable[str] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    **settings: Any,
) -> QuantizedModel:
    """Quantize by a method that needs no calibration; errors as :func:`check_free` and the method have them."""
    check_free(name, bits)
    return run(name, model, None, bits=bits, layers=layers, seed=seed, progress=progress, **settings)


def run(
    name: str,
    model: nn.Module,
    calibration: Any,
    *,
    bits: str,
    layers: str | Iterable[str] | Iterable[LinearInfo] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    **settings: Any,
) -> QuantizedModel:
    """Quantize a model by a method of the table; the model is left as it is.

    Args:
        name: key of :data:`METHODS`.
        model: in full precision.
        calibration: of :mod:`.calibration`, None for methods that need none.
        bits: as in "w4a8".
        layers: regular expressions for names of linears, or the linears themselves; by default those of the
            model's class.
        seed: of what the method draws.
        progress: called with (layers done, layers in all, name of the layer).
        settings: the method's own.

    Raises:
        TypeError, ValueError: one sentence, for a model, name, bits or setting that cannot be served.
    """
    entry = entry_of(name, bits)
    chosen = [] if layers is None or isinstance(layers, str) else list(layers)
    if not (chosen and all(isinstance(one, LinearInfo) for one in chosen)):
        chosen = list(linear_layers(model, chosen or layers))
    return entry(model, calibration, bits=bits, layers=chosen, seed=seed, progress=progress, **settings)
