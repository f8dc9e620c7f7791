"""What a model's blocks are called with while it samples: some calls of each, spread evenly over the run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only


@dataclass(frozen=True)
class Call:
    """One call of a module: its arguments, and the floating tensors it returned."""

    args: tuple
    kwargs: dict[str, Any]
    outputs: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        leaves = tree_leaves((self.args, self.kwargs, self.outputs))
        return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))


class Strata:
    """Picks one of each run of `width` neighbours at random, from a sequence whose length nobody knows.

    ``width`` begins at 1 and doubles whenever there are more than ``most`` picks; one of each two is then
    dropped, at random. At the end there are between ``most / 2`` and ``most``, or all.
    """

    def __init__(self, most: int, seed: int = 0) -> None:
        self.most, self.width, self.picks = most, 1, []
        self._place, self._pick = 0, None
        self._generator = torch.Generator().manual_seed(seed)

    def wants(self) -> bool:
        """Whether the next item is to be kept (for now); call once an item, then :meth:`keep` if so."""
        self._place += 1
        return self._draw(self._place)

    def keep(self, item: Any) -> None:
        self._pick = item

    def end_item(self) -> None:
        """Call after each item."""
        if self._place < self.width:
            return
        self.picks.append(self._pick)
        self._place, self._pick = 0, None
        if len(self.picks) > self.most:
            pairs = zip(self.picks[::2], self.picks[1::2], strict=False)
            rest = self.picks[len(self.picks) // 2 * 2 :]
            self.picks = [pair[self._draw(2)] for pair in pairs]
            self.width *= 2
            if rest:  # half of a stratum of the new width
                self._place, self._pick = self.width // 2, rest[0]

    def all(self) -> list[Any]:
        """The picks, that of an unfinished stratum included."""
        return self.picks + ([] if self._pick is None else [self._pick])

    def _draw(self, among: int) -> bool:
        return int(torch.randint(among, (1,), generator=self._generator)) == 0


class _Room:
    """Shares out memory; who comes first gets some in any case."""

    def __init__(self, limit: int | None) -> None:
        self._limit, self._taken = limit, 0

    def take(self, size: int) -> bool:
        """Whether there was room for so many bytes, which are then taken."""
        if self._limit is not None and self._taken and self._taken + size > self._limit:
            return False
        self._taken += size
        return True


@dataclass
class _Recorder:
    """Hooks of one module. ``fits`` is known once its first call, which is always picked, shows its size."""

    strata: Strata
    room: _Room
    fits: bool | None = None
    started: list[tuple | None] = field(default_factory=list)

    def before(self, _module: nn.Module, args: tuple, kwargs: dict) -> None:
        # Copied before the call: a module may write into what it is given.
        wanted = self.fits is not False and self.strata.wants()
        self.started.append(_stored((args, kwargs)) if wanted else None)

    def after(self, _module: nn.Module, _args: tuple, _kwargs: dict, output: Any) -> None:
        came = self.started.pop()
        if came is not None:
            call = Call(*came, _stored(floating(output)))
            if self.fits is None:
                self.fits = self.room.take(self.strata.most * call.nbytes)
            if self.fits:
                self.strata.keep(call)
        self.strata.end_item()


def record_calls(
    model: nn.Module,
    names: Iterable[str],
    runs: Iterable[Callable[[], Any]],
    *,
    calls: int = 32,
    seed: int = 0,
    memory: int | None = None,
) -> dict[str, list[Call]]:
    """Run a sampler and keep some calls of the named modules, by name; ``""`` names the model itself.

    Args:
        runs: each samples with the model; they decide prompts, steps and guidance.
        calls: kept of each module at most, spread evenly over all of its calls and drawn at random within each
            part; at least half as many where there are that many.
        memory: bytes that all calls may take, None for any number. Modules whose calls would not fit are left
            out of what is returned; the first that runs is not.

    Tensors are copied to the CPU.

    Raises:
        ValueError: a module that no run called.
    """
    room = _Room(memory)
    recorders = {name: _Recorder(Strata(calls, seed), room) for name in names}
    handles = []
    try:
        for name, recorder in recorders.items():
            module = model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(recorder.before, with_kwargs=True))
            handles.append(module.register_forward_hook(recorder.after, with_kwargs=True))
        with torch.no_grad():
            for run in runs:
                run()
    finally:
        for handle in handles:
            handle.remove()
    found = {name: one.strata.all() for name, one in recorders.items() if one.fits is not False}
    if silent := [name for name, calls_ in found.items() if not calls_]:
        raise ValueError(
            f"vdit_ext.quant: calibration must call every block, {silent[0] or 'the model'} was not "
            "called; let it sample with the model that is quantized"
        )
    # Tensors of inference mode cannot take part in autograd; copies made outside of it can.
    return {name: [_usable(call) for call in calls_] for name, calls_ in found.items()}


def spare_memory() -> int | None:
    """Half of the bytes that the machine can still give; None where it does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] // 2 if found else None


def floating(output: Any) -> tuple[Tensor, ...]:
    """The floating-point tensors of whatever a module returned, in order."""
    leaves: Sequence[Any] = tree_leaves(output)
    return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point())


def _stored(tree: Any) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), tree)


def _usable(call: Call) -> Call:
    def copied(tensor: Tensor) -> Tensor:
        return tensor.clone() if tensor.is_inference() else tensor

    return Call(*tree_map_only(Tensor, copied, (call.args, call.kwargs, call.outputs)))
