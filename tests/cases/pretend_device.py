"""A device that computes on the CPU and yet is not the CPU: code that mixes the two fails as it does on a GPU.

with PretendDevice():
    x = torch.ones(3, device=DEVICE)
    x + torch.ones(3)  # RuntimeError
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("lazy")  # needs no library of its own
CPU = torch.device("cpu")

_aten = torch.ops.aten
# What a GPU takes from the CPU too: copies, and indices.
_CROSSES = {_aten._to_copy.default, _aten.copy_.default, _aten.index.Tensor, _aten.index_put_.default}


class _There(Tensor):
    """A tensor of the pretended device: its numbers are in ``inner``, on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> _There:
        about = {"dtype": inner.dtype, "strides": inner.stride(), "storage_offset": inner.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, inner.shape, device=DEVICE, **about)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class PretendDevice(TorchDispatchMode):
    """While entered, :data:`DEVICE` is a device that tensors can be made on and moved to."""

    def __enter__(self):
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=DEVICE) is a copy then
        return super().__enter__()

    def __exit__(self, *exception):
        torch._C._set_only_lift_cpu_tensors(False)
        return super().__exit__(*exception)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func, args: tuple, kwargs: dict[str, Any]):
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [tensor for tensor in given if isinstance(tensor, _There)]
    here = [tensor for tensor in given if not isinstance(tensor, _There) and tensor.dim()]
    if there and here and func not in _CROSSES:
        raise RuntimeError(f"{func}: expected all tensors on one device, got {DEVICE} and cpu")
    asked = kwargs.get("device")
    inner_args, inner_kwargs = tree_map_only(_There, lambda tensor: tensor.inner, (args, kwargs))
    if asked is not None:
        inner_kwargs["device"] = CPU
    out = func(*inner_args, **inner_kwargs)
    if func._schema.is_mutable:
        return args[0]
    goes_there = torch.device(asked).type == DEVICE.type if asked is not None else bool(there)
    return tree_map_only(Tensor, _There, out) if goes_there else out
