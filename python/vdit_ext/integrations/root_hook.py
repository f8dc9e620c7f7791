"""The hook on a whole transformer: it reads each call, counts steps, and tells the processors what to do."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.hooks import ModelHook
from diffusers.hooks.hooks import HookRegistry, StateManager
from torch import Tensor, nn

from ..quant.apply import Applied
from ..sparse.plan import SparseMethod, StepInfo, TokenLayout, begin_step
from .fused import FusedBlocks
from .processors import SparseProcessor, device_gap

HOOK_NAME = "vdit_ext"


class StepCounter:
    """Denoising steps of one sampling run, counted over every transformer of a pipeline.

    Attributes:
        video: how many runs have begun; a change means that everything learned before is void.
        ended: whether the next call begins a run.
        step: index of the current step, from 0; -1 before the first.
        timestep: the timestep of that step.
        num_steps: how many there will be, None when nobody said.
        timesteps: the scheduler's distinct timesteps, largest first, when a pipeline has set them.
    """

    def __init__(self, num_steps: int | None, pipeline: Any = None):
        self._asked = num_steps
        self._pipeline = pipeline
        self._schedule: Tensor | None = None
        self.timesteps: list[float] | None = None
        self.num_steps = num_steps
        self.video = 0
        self.step = -1
        self.timestep = math.nan
        self.ended = True

    @property
    def can_know_steps(self) -> bool:
        """Whether the number of steps was given, or a pipeline will tell it."""
        return self._asked is not None or self._pipeline is not None

    def reset(self) -> None:
        """Treat the next call as the first of a new video."""
        self.ended = True

    def advance(self, timestep: float) -> None:
        """Note a model call. A lower timestep is the next step, a higher one a new video, NaN no news.

        Raises:
            ValueError: one sentence, when a video begins whose pipeline runs another number of steps than
                :func:`accelerate` was given.
        """
        schedule = self._scheduled()
        if self.ended or schedule is not self._schedule or timestep > self.timestep:
            self.read_schedule(begins=True)
            self.ended = False
            self._schedule = schedule
            self.video += 1
            self.step = 0
            self.timestep = math.nan
        elif timestep < self.timestep:
            self.step += 1
        if not math.isnan(timestep):
            self.timestep = timestep

    def read_schedule(self, *, begins: bool = False) -> None:
        """Find out the number of steps: the pipeline's schedule, else the caller's word.

        When no video ``begins``, the schedule may be left from an earlier one, and the caller's word counts.
        """
        times = self._scheduled_timesteps()
        if times is not None and self._asked is not None:
            # A schedule that repeats a timestep, or whose tail alone runs, has fewer steps than its name says.
            named = (len(times), len(self._scheduled()), self._scheduler().num_inference_steps)
            if begins and self._asked not in named:
                raise ValueError(
                    "vdit_ext.accelerate: num_inference_steps must be what the pipeline runs, which is "
                    f"{len(times)}, got {self._asked}; leave it out to follow the pipeline"
                )
            times = times if self._asked in named else None
        self.timesteps = times
        self.num_steps = self._asked if times is None else len(times)

    def _scheduler(self) -> Any:
        # Looked up at every call: `pipe.scheduler = Other.from_config(...)` is the usual way to exchange it.
        return getattr(self._pipeline, "scheduler", None)

    def _scheduled(self) -> Tensor | None:
        # The very tensor that the scheduler stores: every run of a pipeline makes a new one.
        schedule = getattr(self._scheduler(), "__dict__", {}).get("timesteps")
        return schedule if isinstance(schedule, Tensor) else None

    def _scheduled_timesteps(self) -> list[float] | None:
        schedule = self._scheduled()
        if schedule is None or getattr(self._scheduler(), "num_inference_steps", None) is None:
            return None
        # Video-to-video pipelines run only the tail of the schedule, and count it in `num_timesteps`.
        used = getattr(self._pipeline, "num_timesteps", None) or len(schedule)
        # Second-order schedulers and rounding repeat a timestep; the model calls there are one step.
        return sorted(set(schedule[-used:].tolist()), reverse=True)


class _ContextName(StateManager):
    """Receives the name that ``model.cache_context(name)`` announces; upstream looks for this class."""

    def __init__(self) -> None:
        self.name: str | None = None

    def set_context(self, context: Any) -> None:
        # A plain string up to diffusers 0.40, an object with a name since.
        self.name = getattr(context, "name", context)

    def reset(self, *args: Any, **kwargs: Any) -> None:
        self.name = None


@dataclass
class Layer:
    """One self-attention module and its processor.

    Attributes:
        dense_steps, sparse_steps: steps of the latest video that ran so.
        dense_beside_sparse: its dense calls, when stats are collected, in model calls where another layer was
            sparse.
    """

    name: str
    attn: nn.Module
    processor: SparseProcessor
    dense_steps: list[int] = field(default_factory=list)
    sparse_steps: list[int] = field(default_factory=list)
    dense_beside_sparse: int = 0


class WanTokenOrder:
    """Runs ``WanTransformer3DModel`` in another token order while ``order`` is set.

    Tokens change places after the patch embedding and go back after the last projection, where they are
    narrowest. Everything between treats tokens alike, given that the rotary tables and per-token timesteps move
    along.
    """

    def __init__(self, model: nn.Module):
        self.order: Tensor | None = None  # int64 [s] on the device of the tokens
        self._inverse: Tensor | None = None
        self._inverted: Tensor | None = None  # the order that `_inverse` undoes
        self._handles = [
            model.rope.register_forward_hook(self._after_rope),
            model.patch_embedding.register_forward_hook(self._after_patch_embedding),
            model.proj_out.register_forward_hook(self._after_proj_out),
        ]

    def set(self, order: Tensor | None) -> None:
        """Use this int64 ``[S]`` order from now on; None is the model's own order."""
        self.order = order
        if order is not None and order is not self._inverted:
            self._inverse, self._inverted = order.argsort(), order

    def arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the model in the new order: per-token timesteps ``[B, S]``."""
        if self.order is None or given["timestep"].ndim != 2:
            return {}
        timestep = given["timestep"]
        return {"timestep": timestep.index_select(1, self.order.to(timestep.device))}

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _after_rope(self, module: nn.Module, args: tuple, tables: tuple[Tensor, Tensor]) -> Any:
        if self.order is None:
            return None
        return tuple(table.index_select(1, self.order.to(table.device)) for table in tables)  # [1, s, 1, d]

    def _after_patch_embedding(self, module: nn.Module, args: tuple, grid: Tensor) -> Any:
        if self.order is None:
            return None
        moved = grid.flatten(2).index_select(2, self.order).view(grid.shape)  # [b, c, f, y, x]
        # NOTE: the strides must be those of `grid`: compiled blocks are specialised on them, and for a batch
        # of 1 the model's own reshaping carries an irregular first stride through to the blocks.
        return torch.empty_like(grid).copy_(moved)

    def _after_proj_out(self, module: nn.Module, args: tuple, tokens: Tensor) -> Any:
        return None if self.order is None else tokens.index_select(1, self._inverse)


class RootHook(ModelHook):
    """Reads grid, batch, timestep and guidance branch of every call and prepares the processors for it.

    Reading the timestep waits for the device once per model call, not per layer.
    """

    _is_stateful = True  # so that upstream announces cache contexts to it and resets it after a pipeline call

    def __init__(
        self,
        layers: list[Layer],
        method: SparseMethod | None,
        counter: StepCounter,
        layout_of: Callable[[nn.Module, dict[str, Any]], TokenLayout],
        token_order: WanTokenOrder | None,
        collect_stats: bool,
    ):
        super().__init__()
        self.layers = layers
        self.method = method
        self.counter = counter
        self.layout_of = layout_of
        self.token_order = token_order
        self.collect_stats = collect_stats
        self.hoist = True  # tests switch it off to compare
        self.timestep_rises = False
        self.applied: Applied | None = None  # the quantized linears, whose bits follow the steps
        self.fused: FusedBlocks | None = None
        self.context = _ContextName()
        self._states: list[Any] = []
        self._shape: Any = None
        self._orders: dict[Any, Tensor | None] = {}
        self._at = (-1, -1)
        self._calls = 0
        self._caches_above = False

    # -- what upstream calls ------------------------------------------------------------------------------

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict[str, Any]]:
        given = dict(zip(_argument_names(type(module)), args, strict=False)) | kwargs
        hidden = given["hidden_states"]
        layout = self.layout_of(module, given)
        self._refuse_parallel()
        info = self._advance(module, given.get("timestep"))
        self._set_precision(info)
        if self.fused is not None:
            self.fused.check()
        dense = [True] * len(self.layers)
        states = [None] * len(self.layers)
        if self.method is not None and hidden.shape[0] > 0:
            dense = [bool(self.method.is_dense(info, i)) for i in range(len(self.layers))]
            states = self._begin_step(info, layout, hidden)
        order = None if all(dense) else self._order(layout, hidden.device, states)
        if self.token_order is not None:
            self.token_order.set(order)
        self._prepare(module, layout, hidden.device, dense, states, order)
        moved = {} if order is None else self.token_order.arguments(given)
        return _replace(type(module), args, kwargs, moved)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        if self.token_order is not None:
            self.token_order.set(None)
        sparse_step = any(layer.processor.ran_dense is False for layer in self.layers)
        for layer in self.layers:
            if layer.processor.ran_dense is None:
                continue  # a cache answered for it
            if self.collect_stats and sparse_step and layer.processor.ran_dense:
                layer.dense_beside_sparse += 1
            steps = layer.dense_steps if layer.processor.ran_dense else layer.sparse_steps
            if not steps or steps[-1] != self.counter.step:
                steps.append(self.counter.step)
        return output

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.counter.reset()
        return module

    # -- steps and branches -------------------------------------------------------------------------------

    def _set_precision(self, info: StepInfo) -> None:
        """Give the quantized linears the bits of this step."""
        if self.applied is None or self.applied.num_intervals == 1:
            return
        if info.num_steps is None:
            raise ValueError(
                "vdit_ext.accelerate: num_inference_steps must be given for layers whose bits change with the "
                "steps, the pipeline's scheduler does not tell it"
            )
        # More steps than were announced keep the bits of the last ones.
        self.applied.set_step(min(info.step, info.num_steps - 1), info.num_steps)

    def _advance(self, module: nn.Module, timestep: Tensor | None) -> StepInfo:
        """Count the call; returns where it stands."""
        value = float(timestep.max()) if timestep is not None and timestep.numel() > 0 else math.nan
        value = -value if self.timestep_rises else value
        counter = self.counter
        counter.advance(value)
        at = (counter.video, counter.step)
        if at[0] != self._at[0]:
            self.forget()
        if at != self._at:
            self._at, self._calls = at, 0
            self._caches_above = _has_stateful_hooks(module)
        self._calls += 1
        return StepInfo(counter.step, counter.num_steps, counter.timestep, len(self.layers), self._branch())

    def _branch(self) -> str:
        name = self.context.name
        if name is None:
            # The calls at one timestep are the conditional one and the unconditional one in turn.
            return ("cond", "uncond")[(self._calls - 1) % 2]
        parts = name.split("_")
        if "batched" in parts or ("cond" in parts and "uncond" in parts):
            return "batched"
        return "uncond" if "uncond" in parts else "cond"

    def forget(self) -> None:
        """Void what the method learned from an earlier video, and the record of its steps."""
        for state in self._states:
            self.method.reset(state)
        for layer in self.layers:
            layer.dense_steps.clear()
            layer.sparse_steps.clear()

    # -- preparing the processors -------------------------------------------------------------------------

    def _begin_step(self, info: StepInfo, layout: TokenLayout, hidden: Tensor) -> list[Any]:
        """The layers' states, told where the sampling stands."""
        if not self._states:
            self._states = [self.method.new_state(i, len(self.layers)) for i in range(len(self.layers))]
        # Not the layout itself: guidance branches may differ in their number of valid text tokens.
        # NOTE: the package's states notice another grid too, because methods also run without this hook. Batch
        # and device are known here only, and a method may do without begin_step.
        shape = (layout.shape_key, hidden.shape[0], hidden.device)
        if shape != self._shape:
            # Another size or batch: nothing learned fits.
            for state in self._states:
                self.method.reset(state)
            self._shape = shape
        begin_step(self.method, info, layout, self._states)
        return self._states

    def _order(self, layout: TokenLayout, device: torch.device, states: list[Any]) -> Tensor | None:
        """The token order to run this call in, int64 ``[S]``, or None.

        Caches keep outputs from step to step, dense steps included, which must then share one order.
        """
        if not self.hoist or self.token_order is None or self._caches_above:
            return None
        if not all(hasattr(state, "tokens_permuted") for state in states):
            return None
        key = (layout, device)
        if key not in self._orders:
            order = self.method.token_order(layout)
            self._orders = {key: None if order is None else order.to(device, torch.int64)}
        return self._orders[key]

    def _prepare(
        self,
        module: nn.Module,
        layout: TokenLayout,
        device: torch.device,
        dense: list[bool],
        states: list[Any],
        order: Tensor | None,
    ) -> None:
        gap = device_gap(device)
        for layer, layer_dense, state in zip(self.layers, dense, states, strict=True):
            processor = layer.processor
            processor.dense, processor.layout, processor.state = layer_dense, layout, state
            processor.device_gap = gap
            processor.ran_dense = None
            if hasattr(state, "tokens_permuted"):
                state.tokens_permuted = order is not None
            if hasattr(state, "logs_density"):
                state.logs_density = self.collect_stats
            if self.collect_stats:
                self._prepare_stats(module, layer, device)

    def _prepare_stats(self, module: nn.Module, layer: Layer, device: torch.device) -> None:
        if getattr(module, "hf_device_map", None) is not None:
            device = next(layer.attn.parameters()).device
        stats = layer.processor.stats
        if stats is None or stats.device != device:
            # Not an inference tensor: a later call may be outside of inference mode.
            with torch.inference_mode(False):
                dtype = torch.float32 if device.type == "mps" else torch.float64
                fresh = torch.zeros(5, dtype=dtype, device=device)
                layer.processor.stats = fresh if stats is None else fresh + stats.to(device, dtype)

    def _refuse_parallel(self) -> None:
        for layer in self.layers:
            refuse_parallel(layer.processor, layer.name)


def refuse_parallel(processor: Any, name: str) -> None:
    """Raise when diffusers shards sequences over devices, where a plan for the whole sequence is wrong."""
    if getattr(processor, "_parallel_config", None) is not None:
        raise ValueError(
            f"vdit_ext: {name}: context or tensor parallelism must be off, enable_parallelism was called"
        )


def _argument_names(model_class: type) -> list[str]:
    return list(inspect.signature(model_class.forward).parameters)[1:]


def _replace(
    model_class: type, args: tuple, kwargs: dict[str, Any], moved: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """The call's arguments with some of them changed, each where it stood."""
    if not moved:
        return args, kwargs
    names = _argument_names(model_class)
    args = tuple(moved.get(name, value) for name, value in zip(names, args, strict=False))
    return args, kwargs | {name: value for name, value in moved.items() if name in kwargs}


def _has_stateful_hooks(module: nn.Module) -> bool:
    """Whether upstream's caches sit on the model or inside it."""
    for part in module.modules():
        registry: HookRegistry | None = getattr(part, "_diffusers_hook", None)
        if registry is None:
            continue
        if any(hook._is_stateful for name, hook in registry.hooks.items() if name != HOOK_NAME):
            return True
    return False
