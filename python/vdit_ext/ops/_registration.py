"""What every family registers beside its kernels: sentences of the fakes, and a backward pass that says no."""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import NAMESPACE

_OPS = getattr(torch.ops, NAMESPACE)
# Kept for the life of the process: kernels leave with their library object.
_AUTOGRAD = torch.library.Library(NAMESPACE, "IMPL")


def same_device(op: str, first: Tensor, **others: Tensor | None) -> None:
    """What the kernels check, for the fakes: torch calls a fake when any tensor is on the meta device."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise RuntimeError(
                f"vdit::{op}: {name} must be on {first.device} like the first argument, got {tensor.device}; "
                "move it there"
            )


def register_no_backward(op: str) -> None:
    """Let the backward pass of an op fail with a sentence.

    Without an autograd kernel torch hands out results that ask for gradients, and gives none with a mere
    warning. ``torch.library.register_autograd`` would do, but refuses ops with keyword-only tensors.
    """
    overload = getattr(_OPS, op).default

    def call(keyset, args, kwargs):
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)

    class NoBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, keyset, names, *values):
            args = values[: len(values) - len(names)]
            return call(keyset, args, dict(zip(names, values[len(args) :], strict=True)))

        @staticmethod
        def backward(ctx, *grads):
            raise RuntimeError(
                f"vdit::{op}: it has no backward yet; call it under torch.no_grad() or on detached tensors"
            )

    def kernel(keyset, *args, **kwargs):
        values = (*args, *kwargs.values())
        if torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in values):
            return NoBackward.apply(keyset, tuple(kwargs), *values)
        return call(keyset, args, kwargs)

    _AUTOGRAD.impl(op, kernel, "Autograd", with_keyset=True)
