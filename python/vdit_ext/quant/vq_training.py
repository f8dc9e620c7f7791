"""Training of vector-quantized weights until they return what the full-precision module returned (VQ4DiT,
arXiv 2408.17131, section 3): losses, schedule, hardening.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .block_calls import Call
from .soft_vq import SoftWeight, ratio_loss

PARTS = 10  # of a calibration, for progress


@dataclass(frozen=True)
class Settings:
    """How to calibrate, by default as decided in section 8 of the specification.

    Attributes:
        candidates: n, codewords a word may choose from; at most 8.
        ratio_init: "inverse_distance" or "uniform".
        codebooks: "joint": codebooks learn with the ratios; "two_phase": only once assignments are hard.
        schedule: weight of the ratio loss: "ramp": from 0 to ``ratio_weight`` over ``steps``; "gate": 0 where
            the ratio loss is the lowest of the last 50 updates, else ``ratio_weight``.
        units: "relative": distortion in units of plain k-means', rates of codebooks and biases in units of the
            codebook's root mean square; "absolute": mean squares and rates as they are.
        mode: "block": each block alone, on the full-precision model's inputs; "end_to_end": all at once,
            through the whole model.
        steps: updates with soft assignments, at most; then all are forced to their likeliest candidate.
        codebook_steps: updates of codebooks and biases after that.
        calls: of each block that are kept for calibration; a quarter of them is held out to check on.
        ratio_rate, codebook_rate, bias_rate: learning rates of RMSprop with this ``alpha``. A bias counts in
            units of its weight's codebook.
        freeze_above: a word's choice is made once a ratio is above this.
        hard_above: a weight is hard once this share of its words is frozen.
        ratio_weight: weight of the ratio loss.
        iterations: of k-means.
        row_scale: a factor for each row, its root mean square, before k-means.
        share_qkv: one codebook for queries, keys and values of an attention, as in the released code.
        modulation: also the modulation linears inside of blocks (adaLN); None: for DiTTransformer2DModel, where
            the paper does so, and for no other.
        codebook_dtype: "float16", "float32", or "int8", which multiplies 8-bit activations.
        blocks_at_once: most blocks whose calls, inputs and outputs, are kept at a time, 0 for all. Those that
            do not fit into half of the free memory of the CPU wait for another round of all runs.
    """

    candidates: int = 2
    ratio_init: str = "inverse_distance"
    codebooks: str = "joint"
    schedule: str = "ramp"
    units: str = "relative"
    mode: str = "block"
    steps: int = 400
    codebook_steps: int = 400
    calls: int = 32
    ratio_rate: float = 5e-2
    codebook_rate: float = 1e-2
    bias_rate: float = 1e-2
    alpha: float = 0.9
    freeze_above: float = 0.99
    hard_above: float = 0.99
    ratio_weight: float = 4.0
    iterations: int = 100
    row_scale: bool = False
    share_qkv: bool = False
    modulation: bool | None = None
    codebook_dtype: str = "float16"
    blocks_at_once: int = 0

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                wanted = " or ".join(map(repr, allowed))
                raise ValueError(f"vdit_ext.quant: {name} must be {wanted}, got {getattr(self, name)!r}")
        for name, least, most in (
            ("candidates", 1, 8),
            ("calls", 1, None),
            ("steps", 0, None),
            ("codebook_steps", 0, None),
            ("iterations", 0, None),
            ("blocks_at_once", 0, None),
        ):
            value = getattr(self, name)
            if value < least or (most is not None and value > most):
                wanted = f"{least} to {most}" if most is not None else f"at least {least}"
                raise ValueError(f"vdit_ext.quant: {name} must be {wanted}, got {value}")


_CHOICES = {
    "ratio_init": ("inverse_distance", "uniform"),
    "codebooks": ("joint", "two_phase"),
    "schedule": ("ramp", "gate"),
    "units": ("relative", "absolute"),
    "mode": ("block", "end_to_end"),
    "codebook_dtype": ("float16", "float32", "int8"),
}


# The released code: one loss over all blocks, 1,000 trajectories of 50 steps at these rates.
RELEASED: dict[str, Any] = {
    "mode": "end_to_end",
    "codebooks": "two_phase",
    "schedule": "gate",
    "units": "absolute",
    "codebook_rate": 1e-4,
    "bias_rate": 1e-4,
    "ratio_weight": 1.0,
    "share_qkv": True,
    "modulation": True,
    "codebook_dtype": "float32",
}


@dataclass
class Student:
    """A module whose linears are being replaced: a block, or the whole model.

    outputs(overrides, call): the tensors that are compared, with these parameters instead of the module's own.
    soft and biases go by the names of the parameters ``weight`` and ``bias`` inside of the module.
    """

    outputs: Callable[[dict[str, Tensor], Call], tuple[Tensor, ...]]
    soft: dict[str, SoftWeight]
    biases: dict[str, Tensor]
    dtype: torch.dtype

    def run(self, call: Call, *, hard: bool = False) -> tuple[Tensor, ...]:
        made = {name: soft.weight(hard=hard).to(self.dtype) for name, soft in self.soft.items()}
        return self.outputs(made | {name: bias.to(self.dtype) for name, bias in self.biases.items()}, call)

    def distortion(self, call: Call, *, hard: bool = False) -> Tensor:
        """Mean over the compared tensors of their mean squared errors."""
        errors = [
            (came.float() - wanted.to(came.device).float()).square().mean()
            for came, wanted in zip(self.run(call, hard=hard), call.outputs, strict=True)
        ]
        return torch.stack(errors).mean()

    @torch.no_grad()
    def hard_error(self, calls: list[Call]) -> float:
        """What the finished model would have: mean distortion with every choice made."""
        return float(torch.stack([self.distortion(call, hard=True) for call in calls]).double().mean())

    def codebooks(self) -> list[Tensor]:
        """Each once, though weights may share them."""
        return list({id(soft.codebook): soft.codebook for soft in self.soft.values()}.values())

    def groups(self, settings: Settings) -> list[dict[str, Any]]:
        """Codebooks and biases with their learning rates, as an optimizer takes them."""

        def unit(codebook: Tensor) -> float:
            return float(codebook.detach().square().mean().sqrt()) if settings.units == "relative" else 1.0

        found = [{"params": [book], "lr": settings.codebook_rate * unit(book)} for book in self.codebooks()]
        for name, bias in self.biases.items():
            book = self.soft[parameter_name(name.rpartition(".")[0], "weight")].codebook
            found.append({"params": [bias], "lr": settings.bias_rate * unit(book)})
        return found


def calibrate(
    student: Student,
    calls: list[Call],
    settings: Settings,
    seed: int = 0,
    after_part: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Train ratios, codebooks and biases of a student until all of its weights are hard.

    Returns the report: mean squared errors on held-out calls of plain k-means, with assignments made and in the
    end, and what was kept. Raises ValueError for calls whose outputs are not finite.
    """
    used, held = _split_calls(calls)
    before = _state(student)
    plain = student.hard_error(held)
    if not math.isfinite(plain):
        raise ValueError(
            "vdit_ext.quant: outputs of a block must be finite during calibration, got a NaN or an infinity; "
            "run the model in a wider dtype"
        )
    unit = max(student.hard_error(used), 1e-30) if settings.units == "relative" else 1.0
    generator = torch.Generator().manual_seed(seed)
    parts = _parts(settings.steps + settings.codebook_steps, after_part)
    steps = _soften(student, used, settings, unit, generator, parts)
    frozen = {name: soft.frozen_share for name, soft in student.soft.items()}
    for soft in student.soft.values():
        soft.harden()
    assigned = student.hard_error(held)
    _polish(student, used, settings, unit, generator, parts)
    after = student.hard_error(held)
    report = {"kmeans": plain, "assigned": assigned, "calibrated": after, "soft_steps": steps}
    report["frozen_before_forced"] = sum(frozen.values()) / len(frozen)
    better = after <= plain  # a NaN is not
    report["kept"] = "calibrated" if better else "kmeans"
    if not better:
        _restore(student, before)
    return report


def _split_calls(calls: list[Call]) -> tuple[list[Call], list[Call]]:
    """Every fourth call is held out; with fewer than four, all are used and looked at."""
    held = calls[3::4]
    return ([call for i, call in enumerate(calls) if i % 4 != 3], held) if held else (calls, calls)


def _parts(total: int, after_part: Callable[[], None]) -> Callable[[int], None]:
    """A function to call with the number of updates done; it tells of each tenth once."""
    told = 0

    def reached(done: int) -> None:
        nonlocal told
        while told < PARTS and done * PARTS >= (told + 1) * total:
            told += 1
            after_part()

    return reached


def _soften(student, calls, settings, unit, generator, parts) -> int:
    """The updates with soft assignments; returns how many there were."""
    softs = list(student.soft.values())
    ratios = {"params": [soft.logits for soft in softs], "lr": settings.ratio_rate}
    optimizer = torch.optim.RMSprop([ratios, *student.groups(settings)], alpha=settings.alpha)
    lowest = float("inf")
    for step in range(settings.steps):
        open_softs = [soft for soft in softs if not soft.hard]
        if not open_softs:
            return step
        lowest = float("inf") if step % 50 == 0 else lowest  # as long as a trajectory in the released code
        doubt = torch.stack([ratio_loss(soft.logits, soft.frozen) for soft in open_softs]).mean()
        weight = settings.ratio_weight * ratio_factor(settings, step, float(doubt.detach()), lowest)
        lowest = min(lowest, float(doubt.detach()))
        loss = student.distortion(_draw(calls, generator)) / unit + weight * doubt
        _set_gradients(optimizer, loss)
        for soft in softs:
            if soft.logits.grad is not None:
                soft.logits.grad[soft.frozen] = 0
        if settings.codebooks == "two_phase":
            waiting = {id(soft.codebook) for soft in open_softs}
            for book in student.codebooks():
                book.grad = None if id(book) in waiting else book.grad
        optimizer.step()
        for soft in open_softs:
            soft.freeze(settings.freeze_above)
            if soft.frozen_share > settings.hard_above:
                soft.harden()
        parts(step + 1)
    return settings.steps


def ratio_factor(settings: Settings, step: int, doubt: float, lowest: float) -> float:
    """Share of ``ratio_weight`` that the ratio loss has in a step; ``lowest`` is its least value so far."""
    if settings.schedule == "ramp":
        return step / settings.steps
    return 0.0 if doubt <= lowest else 1.0


def _polish(student, calls, settings, unit, generator, parts) -> None:
    """The updates of codebooks and biases under hard assignments, at rates that fall to zero."""
    optimizer = torch.optim.RMSprop(student.groups(settings), alpha=settings.alpha)
    rates = [group["lr"] for group in optimizer.param_groups]
    for step in range(settings.codebook_steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - step / settings.codebook_steps)
        _set_gradients(optimizer, student.distortion(_draw(calls, generator)) / unit)
        optimizer.step()
        parts(settings.steps + step + 1)
    parts(settings.steps + settings.codebook_steps)


def _set_gradients(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Gradients of the optimizer's own tensors, and of none of the model's parameters."""
    tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    for tensor, gradient in zip(tensors, torch.autograd.grad(loss, tensors, allow_unused=True), strict=True):
        tensor.grad = gradient


def _draw(calls: list[Call], generator: torch.Generator) -> Call:
    return calls[int(torch.randint(len(calls), (1,), generator=generator))]


def _state(student: Student) -> list[Tensor]:
    """Codebooks and biases, copied; k-means' choices are the first candidates and need no copy."""
    return [tensor.detach().clone() for tensor in [*student.codebooks(), *student.biases.values()]]


@torch.no_grad()
def _restore(student: Student, state: list[Tensor]) -> None:
    """Plain k-means again."""
    for tensor, before in zip([*student.codebooks(), *student.biases.values()], state, strict=True):
        tensor.copy_(before)
    for soft in student.soft.values():
        soft.logits.zero_()
        soft.logits[:, 0] = 1  # the nearest codeword
        soft.harden()


def parameter_name(place: str, leaf: str) -> str:
    """Name of a parameter of the submodule at ``place``, which is "" for the module itself."""
    return f"{place}.{leaf}" if place else leaf
