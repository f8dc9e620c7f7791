"""When a method runs dense: the first steps and the first layers. Host-side arithmetic, no tensors."""

from __future__ import annotations

import math
from numbers import Integral, Real

from .plan import StepInfo

# Fractions such as 0.35 have no exact binary form: 0.29 * 100 is 28.999999999999996.
_ROUNDING = 1e-9
# Models take timesteps in fp32, which may be half a unit in the last place above the exact value.
_TIMESTEP_SLACK = 1e-6


def count_dense_steps(fraction: float, num_steps: int) -> int:
    """``floor(fraction * num_steps)``, the integer number of leading dense steps (SVG2 spec, section 4.1)."""
    return math.floor(fraction * num_steps + _ROUNDING)


def count_dense_layers(fraction: float, num_layers: int, rounding: str = "floor") -> int:
    """``floor`` or ``ceil`` of ``fraction * num_layers``; ceil gives a small model at least one dense layer."""
    share = fraction * num_layers
    return math.floor(share + _ROUNDING) if rounding == "floor" else math.ceil(share - _ROUNDING)


def flow_timestep(noise: float, shift: float) -> float:
    """Timestep (0 to 1000) of a flow-matching scheduler where ``noise`` (0 to 1) of the schedule is left."""
    return 1000 * shift * noise / (1 + (shift - 1) * noise)


def flow_timesteps(num_steps: int, shift: float) -> list[float]:
    """The scheduler's timesteps, first step first, each in (0, 1000]."""
    return [flow_timestep(1 - i / num_steps, shift) for i in range(num_steps)]


def is_dense_step(info: StepInfo, fraction: float, shift: float | None, method: str) -> bool:
    """Whether a step belongs to the dense warm-up.

    The rule counts steps. Where nobody said how many there will be, it compares the timestep with the one that
    a flow-matching schedule of this shift reaches after ``fraction`` of its steps, which agrees with the count
    whenever ``fraction * num_steps`` is whole.

    Raises:
        ValueError: one sentence that names ``method``, when neither the number of steps nor the shift is known
            and ``fraction`` is above 0.
    """
    if info.num_steps is not None:
        return info.step < count_dense_steps(fraction, info.num_steps)
    if fraction <= 0:
        return False
    if shift is None:
        raise unknown_steps(method)
    return info.timestep > flow_timestep(1 - fraction, shift) * (1 + _TIMESTEP_SLACK)


def unknown_steps(method: str) -> ValueError:
    """The error of a method that must know the number of steps and does not."""
    return ValueError(
        f"vdit_ext.accelerate: {method} takes its dense steps as a share of all steps, whose number must be "
        "known: pass num_inference_steps, or the pipeline instead of its transformer"
    )


def require_number(who: str, name: str, value: float, low: float, high: float = math.inf) -> None:
    """Raise ValueError, in one sentence, unless ``value`` is a real number with ``low <= value <= high``."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{who}: {name} must be a number, got {value!r}; give it without quotes")
    _require_range(who, name, value, low, high)


def is_whole(value: object) -> bool:
    """Whether a value is an integer, of Python or numpy, and not a bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def require_whole(who: str, name: str, value: int, low: int) -> None:
    """Raise ValueError, in one sentence, unless ``value`` is an integer of at least ``low``."""
    if not is_whole(value):
        raise ValueError(f"{who}: {name} must be a whole number, got {value!r}")
    _require_range(who, name, value, low, math.inf)


def _require_range(who: str, name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        upper = "" if high == math.inf else f" and at most {high:g}"
        raise ValueError(f"{who}: {name} must be at least {low:g}{upper}, got {value:g}")


def require_choice(who: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError, in one sentence, unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{who}: {name} must be one of {', '.join(choices)}, got {value!r}")
