"""Plans on tensors without memory: which ops reach the device, and whether one would make the host wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vdit_ext.sparse import svg2
from vdit_ext.sparse.plan import BlockPlan, TokenLayout

# Neither launches a kernel: tensors made without contents, and views by another name.
_NO_KERNEL = {
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::_unsafe_view",
}


class WouldWait(Exception):
    """An op that makes the host wait for the device."""


@dataclass(frozen=True)
class DeviceCall:
    """One op with work for the device: its name, and the tensors that it reads and writes."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


class DeviceCalls(TorchDispatchMode):
    """Records the ops that have work for a device; here that is "meta", whose tensors have no memory.

    Reading a value or a number of elements back raises there by itself, and so does a copy to the host. A copy
    from the host does not, so it raises :class:`WouldWait` here: an ordinary one waits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[DeviceCall] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        name = func._schema.name
        if name in ("aten::_to_copy", "aten::copy_") and len({t.device for t in (*inputs, *outputs)}) > 1:
            raise WouldWait(f"{name} from the host")
        if any(t.is_meta for t in (*inputs, *outputs)) and not func.is_view and name not in _NO_KERNEL:
            self.calls.append(DeviceCall(name, inputs, outputs))
        return result


class _NumbersFromTheHost(TorchFunctionMode):
    """torch.tensor(numbers, device=...) copies within itself, where no op shows it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor) and result.is_meta:
            raise WouldWait(f"torch.{func.__name__} from the host")
        return result


def _tensors(tree) -> tuple[Tensor, ...]:
    return tuple(t for t in tree_leaves(tree) if isinstance(t, Tensor))


@contextmanager
def watched() -> Iterator[DeviceCalls]:
    """Yields the record of the ops that are called in here."""
    # The device "meta" has no autocast to switch off.
    without_autocast = mock.patch.object(torch, "autocast", lambda *_, **__: nullcontext())
    with without_autocast, _NumbersFromTheHost(), DeviceCalls() as calls:
        yield calls


def meta_qkv(heads: int, tokens: int, dim: int, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """bf16 ``[B, H, S, D]`` on "meta" that lie as a model's projections do."""
    return tuple(
        torch.empty(batch, tokens, heads, dim, dtype=torch.bfloat16, device="meta").transpose(1, 2)
        for _ in range(3)
    )


def warm_plan(method, q: Tensor, k: Tensor, layout: TokenLayout, *, tokens_permuted: bool = False) -> BlockPlan:
    """The plan of a later step on "meta": SVG2 finds centroids in its cache.

    Its clustering runs in the open, where tensors without memory would else see one opaque op.
    """
    state = method.new_state(0, 1)
    state.logs_density, state.tokens_permuted = False, tokens_permuted
    if not isinstance(method, svg2.SVG2):
        return method.plan(q, k, layout, state)
    batch, heads, _, dim = q.shape
    for side, clusters in (("q", method.num_q_clusters), ("k", method.num_k_clusters)):
        shape = (batch, heads, min(clusters, layout.num_video), dim)
        state.centroids["shared", side] = torch.empty(shape, dtype=q.dtype, device=q.device)
    with mock.patch.object(svg2, "refine_clusters", lambda x, _, count, side: state.refine(x, count, side)):
        return method.plan(q, k, layout, state)
