"""What a method remembers about one attention layer, and the opaque ops through which compiled code reaches it.

A compiled region must not see what changes from call to call: whether centroids exist yet, how many
iterations to run, which guidance branch is on. So the graph holds only a small CPU tensor, the state's
``handle``, and ops whose eager body looks the state up by it. All layers and all steps then share one graph.
The ops declare that they write the handle (they count calls in it), which keeps the compiler from dropping or
reordering them.
"""

from __future__ import annotations

import itertools
import weakref
from collections import deque

import torch
from torch import Tensor

from ..ops import NAMESPACE
from .kmeans import kmeans
from .plan import BlockPlan, StepInfo, TokenLayout

_STATES: weakref.WeakValueDictionary[int, LayerState] = weakref.WeakValueDictionary()
_NEXT_KEY = itertools.count(1)
# Beside the namespace of the libraries' ops, so that builds with names of their own can share a process.
_OWN_OPS = f"{NAMESPACE}_py"


class LayerState:
    """State of one attention layer; methods make it with ``new_state``.

    Attributes:
        layer, num_layers: which layer this is.
        tokens_permuted: set to True by a caller that applied ``token_order`` before the first layer.
        logs_density: set to False by a caller that will not ask for densities, which spares computing them.
        branch: guidance branch of the model call in progress, set by ``begin_step``.
        handle: int64 CPU ``[2]``: key of this state and how often compiled code called into it.
    """

    def __init__(self, layer: int, num_layers: int) -> None:
        self.layer = layer
        self.num_layers = num_layers
        self.tokens_permuted = False
        self.logs_density = True
        self.branch = "cond"
        self._densities: deque[Tensor] = deque(maxlen=4096)
        self._last_call: tuple[int, float] | None = None
        self._last_shape: tuple | None = None
        self._register()

    def _register(self) -> None:
        key = next(_NEXT_KEY)
        self.handle = torch.tensor([key, 0])
        _STATES[key] = self

    def __deepcopy__(self, memo: dict) -> LayerState:
        copied = self._fresh_copy()
        copied.tokens_permuted = self.tokens_permuted
        copied.logs_density = self.logs_density
        memo[id(self)] = copied
        return copied

    def _fresh_copy(self) -> LayerState:
        """A state like this one that has learned nothing: what a copied model starts with."""
        return LayerState(self.layer, self.num_layers)

    @property
    def density(self) -> Tensor | None:
        """Kept share of the pairs at the last sparse call, fp32 ``[B|1, H|1]``; None before the first."""
        return self._densities[-1] if self._densities else None

    def mean_density(self) -> float:
        """Mean over the sparse calls since the last reset (nan without one); waits for the device."""
        if not self._densities:
            return float("nan")
        return float(torch.stack([d.mean() for d in self._densities]).mean())

    def begins_video(self, info: StepInfo, layout: TokenLayout) -> bool:
        """Whether this model call starts another video than the last one: the timestep rose, the step number
        fell, or the shape changed. False at the very first call."""
        shape = layout.shape_key
        call, last_call, last_shape = (info.step, info.timestep), self._last_call, self._last_shape
        self._last_call, self._last_shape = call, shape
        if last_call is None:
            return False
        return call[0] < last_call[0] or call[1] > last_call[1] or shape != last_shape

    def reset(self) -> None:
        """Forget the video."""
        self._densities.clear()
        self._last_call = self._last_shape = None


class ClusterState(LayerState):
    """SVG2's state: the centroids of queries and keys, kept from step to step.

    A call with centroids in the cache can be captured in a CUDA graph, and each replay moves them on. The first
    call of a video cannot: it draws rows on the host.

    Args:
        iter_init, iter_step: Lloyd iterations of a first and of a later call.
        init, tolerance, seed, sample: as in :func:`vdit_ext.sparse.kmeans.kmeans`.
        per_branch: one cache for each guidance branch instead of a shared one.
    """

    def __init__(
        self,
        layer: int,
        num_layers: int,
        *,
        iter_init: int,
        iter_step: int,
        init: str,
        tolerance: float | None,
        seed: int,
        sample: int,
        per_branch: bool,
    ) -> None:
        super().__init__(layer, num_layers)
        self.settings = dict(
            iter_init=iter_init,
            iter_step=iter_step,
            init=init,
            tolerance=tolerance,
            seed=seed,
            sample=sample,
            per_branch=per_branch,
        )
        self.centroids: dict[tuple[str, str], Tensor] = {}

    def _fresh_copy(self) -> ClusterState:
        return ClusterState(self.layer, self.num_layers, **self.settings)

    def reset(self) -> None:
        super().reset()
        self.centroids.clear()

    def refine(self, x: Tensor, num_clusters: int, side: str) -> tuple[Tensor, Tensor, Tensor]:
        """Cluster x ``[B, H, N, D]``, from the cached centroids where they fit; side is "q" or "k"."""
        settings = self.settings
        slot = (self.branch if settings["per_branch"] else "shared", side)
        cached = self.centroids.get(slot)
        shape = (*x.shape[:2], num_clusters, x.shape[3])
        if cached is not None and (
            cached.shape != shape or cached.dtype != x.dtype or cached.device != x.device
        ):
            cached = None
        found = kmeans(
            x,
            num_clusters,
            num_iters=settings["iter_init"] if cached is None else settings["iter_step"],
            centroids=cached,
            init=settings["init"],
            seed=(settings["seed"] * self.num_layers + self.layer) * 2 + (side == "k"),
            tolerance=settings["tolerance"],
            sample=settings["sample"],
        )
        # A copy, because compiled code may reuse the memory of what the op returns; and in place, so that each
        # replay of a captured CUDA graph starts from the centroids that the last one left.
        if cached is None:
            with torch.inference_mode(False):  # the cache outlives the caller's mode
                self.centroids[slot] = torch.empty_like(found.centroids)
        self.centroids[slot].copy_(found.centroids)
        return found.centroids, found.sorted_idx, found.offsets


class SampleState(LayerState):
    """SVG1's state: the generator of its sampled rows."""

    def __init__(self, layer: int, num_layers: int, seed: int) -> None:
        super().__init__(layer, num_layers)
        self.seed = seed
        self.generator = torch.Generator().manual_seed(seed * num_layers + layer)

    def _fresh_copy(self) -> SampleState:
        return SampleState(self.layer, self.num_layers, self.seed)

    def reset(self) -> None:
        super().reset()
        self.generator.manual_seed(self.seed * self.num_layers + self.layer)


def _find(handle: Tensor) -> LayerState:
    state = _STATES.get(int(handle[0]))
    if state is None:
        raise RuntimeError(
            "vdit_ext.sparse: a method's state was expected to be alive, its handle points to none; keep the "
            "object that new_state returned"
        )
    handle[1] += 1
    return state


@torch.library.custom_op(f"{_OWN_OPS}::refine_clusters", mutates_args=("handle",))
def refine_clusters(x: Tensor, handle: Tensor, num_clusters: int, side: str) -> tuple[Tensor, Tensor, Tensor]:
    """K-means of x in a :class:`ClusterState`.

    Args:
        x: ``[B, H, N, D]`` fp32, fp16 or bf16.
        handle: the state's.
        num_clusters: C, at most N.
        side: "q" or "k", which cache.

    Returns:
        ``centroids`` ``[B, H, C, D]`` in x's dtype, ``sorted_idx`` int32 ``[B, H, N]`` and ``offsets`` int32
        ``[B, H, C+1]``, as :class:`vdit_ext.sparse.kmeans.Clusters`.
    """
    with torch.no_grad():
        return _find(handle).refine(x, num_clusters, side)


@refine_clusters.register_fake
def _(x, handle, num_clusters, side):
    batch, heads, rows, dim = x.shape
    return (
        x.new_empty(batch, heads, num_clusters, dim),
        x.new_empty(batch, heads, rows, dtype=torch.int32),
        x.new_empty(batch, heads, num_clusters + 1, dtype=torch.int32),
    )


@torch.library.custom_op(f"{_OWN_OPS}::record_density", mutates_args=("handle",))
def record_density(density: Tensor, handle: Tensor) -> None:
    """Note the density ``[B|1, H|1]`` of a plan in the state; no synchronisation."""
    _find(handle)._densities.append(density.detach().clone())


@record_density.register_fake
def _(density, handle):
    return None


def note_density(plan: BlockPlan, layout: TokenLayout, state: LayerState) -> None:
    """Note the density of a self-attention plan in the state, where it keeps a log; for the end of ``plan``."""
    if state.logs_density:
        record_density(plan.density(layout.num_tokens, layout.num_tokens), state.handle)


@torch.library.custom_op(f"{_OWN_OPS}::sample_rows", mutates_args=("handle",))
def sample_rows(handle: Tensor, count: int, limit: int) -> Tensor:
    """Row numbers int64 CPU ``[count]`` below ``limit``, other ones at every call of a :class:`SampleState`."""
    return torch.randint(limit, (count,), generator=_find(handle).generator)


@sample_rows.register_fake
def _(handle, count, limit):
    return torch.empty(count, dtype=torch.int64)
