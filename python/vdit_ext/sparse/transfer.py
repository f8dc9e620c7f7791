"""Host tensors to the device without waiting for it; a plan must never stop the queue of kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import NAMESPACE


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on ``device``; the host goes on while a GPU still copies it.

    A plain ``.to`` copies from pageable memory, which waits for everything queued before it.
    """
    return _upload(host, device) if device.type == "cuda" else host.to(device)


# An op, so that compiled code need not trace the pinning. The allocator of pinned memory keeps the buffer until
# the copy is done.
@torch.library.custom_op(f"{NAMESPACE}_py::upload", mutates_args=())
def _upload(host: Tensor, device: torch.device) -> Tensor:
    return host.pin_memory().to(device, non_blocking=True)


@_upload.register_fake
def _(host, device):
    return torch.empty_like(host, device=device)
