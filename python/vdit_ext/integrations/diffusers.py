"""``accelerate`` and ``explain`` for diffusers transformers and pipelines. Tested with diffusers 0.42.1."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks import HookRegistry
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch import nn

from ..quant.apply import Applied
from ..quant.layers import merge_blocks
from ..sparse.plan import SparseMethod, StepInfo, TokenLayout
from . import quantize
from .fused import FusedBlocks
from .processors import (
    DENSE_CALLS,
    DENSITY_SUM,
    DONE_FLOPS,
    FULL_FLOPS,
    SPARSE_CALLS,
    SparseProcessor,
    WanSelfAttentionProcessor,
    device_gap,
    kernel_gap,
    kernel_name,
)
from .root_hook import HOOK_NAME, Layer, RootHook, StepCounter, WanTokenOrder, refuse_parallel

POLICIES = ("error", "dense", "reference")


@dataclass(frozen=True)
class ModelEntry:
    """How to find and feed the self-attention of one diffusers class.

    Attributes:
        attentions: the eligible attention modules of a model, by name, in the order they run.
        processor: class of the processor that replaces theirs.
        layout: token layout of a call, from the model and the call's arguments by name.
        token_order: class that lets the model run in another token order, or None.
        fused: class that runs blocks of quantized linears fused, or None.
        timestep_rises: whether the model is told how far sampling has come, instead of what is left.
    """

    attentions: Callable[[nn.Module], dict[str, nn.Module]]
    processor: type[SparseProcessor]
    layout: Callable[[nn.Module, dict[str, Any]], TokenLayout | None]
    token_order: type[WanTokenOrder] | None = None
    fused: type[FusedBlocks] | None = None
    timestep_rises: bool = False


def _wan_attentions(model: nn.Module) -> dict[str, nn.Module]:
    return {f"blocks.{i}.attn1": block.attn1 for i, block in enumerate(model.blocks)}


def _wan_layout(model: nn.Module, given: dict[str, Any]) -> TokenLayout:
    sizes = given["hidden_states"].shape[2:]  # latent frames, rows, columns
    return TokenLayout(tuple(size // patch for size, patch in zip(sizes, model.config.patch_size, strict=True)))


def _no_attentions(model: nn.Module) -> dict[str, nn.Module]:
    return {}


def _no_layout(model: nn.Module, given: dict[str, Any]) -> None:
    return None


# Models whose linears are known and whose attention stays upstream's.
_QUANT_ONLY = ModelEntry(_no_attentions, SparseProcessor, _no_layout)
_QUANT_ONLY_RISING = dataclasses.replace(_QUANT_ONLY, timestep_rises=True)
_RISING = ("MochiTransformer3DModel",)  # its pipeline passes 1000 - t

# Class name in diffusers to how its attention is accelerated; a new model is a new line.
MODELS: dict[str, ModelEntry] = {
    "WanTransformer3DModel": ModelEntry(
        _wan_attentions, WanSelfAttentionProcessor, _wan_layout, WanTokenOrder, FusedBlocks
    ),
}


def accelerate(
    model_or_pipeline: Any,
    *,
    sparse: SparseMethod | None = None,
    quant: Any = None,
    on_unsupported: str = "error",
    num_inference_steps: int | None = None,
    collect_stats: bool = True,
) -> Handle:
    """Give the self-attention layers of a diffusers transformer to a sparse method and its linears to quantized
    weights, in place and undoably.

    Cross-attention stays dense. Without ``quant`` the weights stay as they are, and in steps that the method
    calls dense in every layer, the model computes what it did before, bit for bit. Sparse calls norm and rotate
    q and k in one pass, which rounds once instead of after every operation, unless a norm is not the model's
    own or has hooks.

    Args:
        model_or_pipeline: a transformer of a class in :data:`MODELS`, with ``quant`` alone of any class in
            :data:`vdit_ext.quant.layers.CLASSES`, or a pipeline that holds such models as ``transformer`` and
            ``transformer_2`` (Wan 2.2); both are accelerated, and their steps are counted together. It may be
            compiled before or after, with ``compile_repeated_blocks(fullgraph=True)``: that makes one graph for
            dense and one for sparse attention, whatever the number of layers and steps.
        sparse: a method of :mod:`vdit_ext.sparse`. None keeps every layer dense and only counts.
        quant: what the linears become: a folder that ``vdit quantize`` or :func:`vdit_ext.quant.files.save`
            wrote, a :class:`vdit_ext.quant.QuantizedModel`, a :class:`VditQuantConfig` or the name of a method
            that needs no calibration, such as "rtn"; for pipelines with two transformers a dict of these by
            name. Which linears stay in high precision, and why, :meth:`Handle.explain` tells. Where bits differ
            by parts of the sampling, the steps of the calls decide. A model that was loaded quantized needs no
            ``quant``.
        on_unsupported: what happens when the kernels cannot serve a layer (head size, dtype, device, mask):
            "error" raises, "dense" runs upstream's attention, "reference" runs the slow definition of the op,
            which a compiled block cannot contain, and which takes no mask.
        num_inference_steps: denoising steps of one video, at least 1. A pipeline tells it by its scheduler, and
            a number that differs is refused when sampling begins. A transformer alone has none: methods that
            make a share of the steps dense then decide by timestep if they were given ``flow_shift``, as their
            presets are, and refuse otherwise.
        collect_stats: count calls, density and FLOPs on the device; see :meth:`Handle.stats`.

    Returns:
        A :class:`Handle`. Steps are counted from the ``timestep`` of the calls: a lower one is the next step,
        and a higher one, or the end of a pipeline call, begins a new video and forgets what was learned. Loops
        that sample otherwise call ``handle.reset()``. Calls at one timestep are the conditional and the
        unconditional one in turn, unless ``model.cache_context`` names them.

    Raises:
        TypeError: no diffusers model or pipeline of a known class.
        ValueError, FileNotFoundError: already accelerated, an option out of its range, quantized layers that
            are not there, damaged or another model's, or, where it can be known now, a layer that the kernels
            do not support. The model is then as it was. What only a call shows (autocast, a mask, another
            device, another number of steps) raises there.
    """
    if on_unsupported not in POLICIES:
        raise ValueError(
            'vdit_ext.accelerate: on_unsupported must be "error", "dense" or "reference", got '
            f"{on_unsupported!r}"
        )
    if num_inference_steps is not None and num_inference_steps < 1:
        raise ValueError(
            f"vdit_ext.accelerate: num_inference_steps must be at least 1, got {num_inference_steps}"
        )
    if isinstance(sparse, type):
        raise TypeError(
            f"vdit_ext.accelerate: sparse must be a method with its settings, got the class {sparse.__name__}; "
            f"make one with {sparse.__name__}()"
        )
    if sparse is not None and not isinstance(sparse, SparseMethod):
        raise TypeError(
            f"vdit_ext.accelerate: sparse must be a method of vdit_ext.sparse, got {type(sparse).__name__}"
        )
    found = _transformers(model_or_pipeline, "vdit_ext.accelerate", sparse, quant)
    is_pipeline = not isinstance(model_or_pipeline, nn.Module)
    chosen = {} if quant is None else quantize.for_each(quant, found)
    for model in found.values():
        _check(model, sparse, on_unsupported)
        if sparse is not None and not is_pipeline:
            # Methods that need the number of steps say so now, not in the first call. The last layer is the
            # least likely one to be dense in every step.
            layers = len(_attentions(model))
            sparse.is_dense(StepInfo(0, num_inference_steps, 1000.0, layers), layers - 1)
    counter = StepCounter(num_inference_steps, model_or_pipeline if is_pipeline else None)
    backend = _AttentionBackendRegistry.get_active_backend()[0]
    applied = _apply_all(found, chosen, counter)
    attached = [
        _attach(name, model, sparse, on_unsupported, counter, collect_stats, applied[name])
        for name, model in found.items()
    ]
    return Handle(attached, sparse, counter, backend)


def _apply_all(
    found: dict[str, nn.Module], chosen: dict[str, Any], counter: StepCounter
) -> dict[str, Applied | None]:
    """Put the quantized layers into all models, or into none when one of them refuses."""
    done: dict[str, Applied | None] = {}
    try:
        for name, model in found.items():
            done[name] = one = quantize.attach(model, chosen.get(name))
            if one is not None and one.num_intervals > 1 and not counter.can_know_steps:
                raise ValueError(
                    "vdit_ext.accelerate: num_inference_steps must be given for layers whose bits change with "
                    "the steps, a transformer alone does not tell it"
                )
    except BaseException:
        for one in done.values():
            if one is not None:
                one.undo()
        raise
    return done


def explain(model_or_pipeline: Any) -> Explanation:
    """What runs in each self-attention layer of a model or pipeline, accelerated or not, and why.

    Returns:
        A list of dicts, one a layer, that prints as a table; see :meth:`Handle.explain`.

    Raises:
        TypeError: no diffusers model or pipeline of a known class.
    """
    rows, linears = [], []
    for name, model in _transformers(model_or_pipeline, "vdit_ext.explain", quant=True).items():
        handle = handle_of(model)
        if handle is not None:
            told, own = handle.explain(), handle.name_of(model)
            rows += [row | {"model": name} for row in told if row["model"] == own]
            linears += [row | {"model": name} for row in told.linears if row["model"] == own]
            continue
        linears += quantize.linear_rows(name, model, None)
        for layer, attn in _attentions(model).items():
            facts = _facts(name, layer, attn)
            rows.append(facts | {"backend": "upstream", "reason": "accelerate() has not been called"})
    return Explanation(rows, linears)


def handle_of(model: nn.Module) -> Handle | None:
    """The handle of a model that is accelerated now, else None."""
    registry = getattr(_unwrap(model), "_diffusers_hook", None)
    hook = registry.get_hook(HOOK_NAME) if registry is not None else None
    return getattr(hook, "handle", None)


class Explanation(list):
    """A list of dicts, one an attention layer, that prints as a table with like neighbours in one row.

    Attributes:
        linears: a list of dicts, one a linear, of a model that has quantized ones, else empty; a second table.
            Keys: ``model``, ``layer``, ``format``, ``bits`` and ``transform`` of weight and input,
            ``activations``, ``path`` of the product, and ``reason``, which says of the others why they stay in
            high precision.
    """

    COLUMNS = ("model", "layer", "method", "dense_steps", "backend", "dtype", "heads", "head_dim", "reason")
    LINEAR_COLUMNS = ("layer", "model", "format", "bits", "activations", "transform", "path", "reason")

    def __init__(self, rows: Iterable[dict[str, Any]] = (), linears: Iterable[dict[str, Any]] = ()):
        super().__init__(rows)
        self.linears = list(linears)

    def __str__(self) -> str:
        lines = [self.COLUMNS]
        for _, group in itertools.groupby(self, key=_all_but_layer):
            rows = list(group)
            layer = rows[0]["layer"] if len(rows) == 1 else f"{rows[0]['layer']} .. {rows[-1]['layer']}"
            lines.append(tuple(str((rows[0] | {"layer": layer})[column]) for column in self.COLUMNS))
        tables = [_aligned(lines)] if self or not self.linears else []
        if self.linears:
            cells = [tuple(str(row[column]) for column in self.LINEAR_COLUMNS) for row in self.linears]
            tables.append(_aligned([self.LINEAR_COLUMNS, *merge_blocks(cells)]))
        return "\n\n".join(tables)

    __repr__ = __str__


def _aligned(lines: list[tuple[str, ...]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    table = ("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in table)


def _all_but_layer(row: dict[str, Any]) -> tuple:
    return tuple(value for key, value in row.items() if key != "layer")


@dataclass
class _Attached:
    """One accelerated transformer and all that is needed to make it what it was."""

    name: str
    model: nn.Module
    entry: ModelEntry
    hook: RootHook
    layers: list[Layer]
    processors: list[tuple[nn.Module, Any]]
    backends: list[tuple[Any, Any]]
    had_registry: bool
    forward_before: Any
    forward_after: Any
    applied: Applied | None
    fused: FusedBlocks | None


class Handle:
    """Holds what :func:`accelerate` did. As a context manager it undoes that at the end."""

    def __init__(
        self, attached: list[_Attached], method: SparseMethod | None, counter: StepCounter, backend: Any
    ):
        self._attached = attached
        self._method = method
        self._counter = counter
        self._backend = backend
        self._undone = False
        for one in attached:
            one.hook.handle = self

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.undo()

    def name_of(self, model: nn.Module) -> str | None:
        """Under which name this handle lists a transformer."""
        return next((one.name for one in self._attached if one.model is _unwrap(model)), None)

    def reset(self, *, stats: bool = False) -> None:
        """Treat the next call as the first of a new video; ``stats`` also sets the counters to zero."""
        self._counter.reset()
        if stats:
            for one in self._attached:
                for layer in one.layers:
                    layer.processor.stats = None
                    layer.dense_beside_sparse = 0

    def undo(self) -> None:
        """Put back the linears, processors, hooks and attention backends, the global one included, as they were
        before :func:`accelerate`. A second call does nothing."""
        if self._undone:
            return
        self._undone = True
        for one in self._attached:
            for attn, processor in one.processors:
                attn.set_processor(processor)
            for processor, backend in one.backends:
                processor._attention_backend = backend
            if one.hook.token_order is not None:
                one.hook.token_order.remove()
            _remove_root_hook(one)
            one.hook.handle = None
            if one.fused is not None:
                one.fused.undo()
            if one.applied is not None:
                one.applied.undo()
        _AttentionBackendRegistry.set_active_backend(self._backend)

    def explain(self) -> Explanation:
        """What runs in each self-attention layer, and in each linear of a quantized model, and why.

        Returns:
            An :class:`Explanation`, a list that prints as a table, of dicts with: ``model``, ``layer``,
            ``method``; ``dense_steps``, the step numbers that are dense, as far as known before they run;
            ``backend`` of the other steps: "cpu" or "sm80" kernels (those of the latest sparse call, before one
            those of the device that holds the weights), "naive" definition, or "upstream" attention; ``dtype``,
            ``heads``, ``head_dim``; ``reason``, a sentence; and ``ran_dense``, ``ran_sparse``, lists of the
            steps of the latest video that ran so, those that ``on_unsupported="dense"`` made dense among the
            former.
        """
        rows = [self._row(one, i) for one in self._attached for i in range(len(one.layers))]
        linears = [
            quantize.linear_rows(one.name, one.model, one.applied, one.fused.running() if one.fused else ())
            for one in self._attached
        ]
        return Explanation(rows, itertools.chain(*linears))

    def _row(self, one: _Attached, index: int) -> dict[str, Any]:
        layer = one.layers[index]
        row = _facts(one.name, layer.name, layer.attn)
        ran = {"ran_dense": list(layer.dense_steps), "ran_sparse": list(layer.sparse_steps)}
        if self._method is None:
            why = {"backend": "upstream", "reason": "no sparse method was given"}
            return row | why | ran
        row["method"] = self._method.name
        device = layer.processor.ran_on or _weight(layer.attn).device
        gap = layer.processor.reason or _layer_gap(layer.attn, device)
        if gap is None:
            row["dense_steps"] = _dense_steps(self._method, self._counter, index, len(one.layers))
            kernel = kernel_name(device)
            why = {"backend": kernel, "reason": f"head_dim and dtype are served by the {kernel} kernels"}
        elif layer.processor.on_unsupported == "dense":
            why = {"backend": "upstream", "reason": f"dense in every step: {gap}"}
        elif layer.processor.on_unsupported == "reference":
            why = {"backend": "naive", "reason": f"the op's definition: {gap}"}
        else:
            why = {"backend": "none", "reason": f"calls raise: {gap}"}
        return row | why | ran

    def stats(self) -> dict[str, Any]:
        """What was computed since :func:`accelerate`, or since ``reset(stats=True)``. Waits for the device.

        Returns:
            A dict with

            - ``dense_calls`` and ``sparse_calls`` of single layers;
            - the share 0..1 of query-key pairs that was kept, NaN where it has nothing to count: ``density`` of
              the sparse calls, the mean over them; ``density_steps`` of the sparse steps, the mean over the
              calls of all layers in steps where any layer was sparse, dense layers with 1; ``density_overall``
              of all steps, the quotient of the next two;
            - ``attention_flops`` of the self-attention products as computed and ``dense_attention_flops`` as
              they would be without a method;
            - ``video_steps``, steps of the latest video so far;
            - ``layers``, a list of dicts with ``model``, ``layer`` and the first seven of these. There
              ``density_steps`` of a layer that is dense beside sparse ones is 1.
        """
        layers = []
        total, total_beside = torch.zeros(5, dtype=torch.float64), 0
        for one in self._attached:
            for layer in one.layers:
                stats = layer.processor.stats
                stats = torch.zeros(5, dtype=torch.float64) if stats is None else stats.cpu().double()
                total += stats
                total_beside += layer.dense_beside_sparse
                row = {"model": one.name, "layer": layer.name}
                layers.append(row | _summary(stats, layer.dense_beside_sparse))
        return _summary(total, total_beside) | {"video_steps": self._counter.step + 1, "layers": layers}


def _summary(stats: torch.Tensor, dense_beside_sparse: int) -> dict[str, Any]:
    values = stats.tolist()
    calls, kept = values[SPARSE_CALLS], values[DENSITY_SUM]
    return {
        "dense_calls": int(values[DENSE_CALLS]),
        "sparse_calls": int(calls),
        "density": _share(kept, calls),
        "density_steps": _share(kept + dense_beside_sparse, calls + dense_beside_sparse),
        "density_overall": _share(values[DONE_FLOPS], values[FULL_FLOPS]),
        "attention_flops": values[DONE_FLOPS],
        "dense_attention_flops": values[FULL_FLOPS],
    }


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


# ---------------------------------------------------------------------------------------------------------
# Finding and checking
# ---------------------------------------------------------------------------------------------------------


def _unwrap(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", model)  # torch.compile(model) wraps it


def _entry(model: nn.Module) -> ModelEntry:
    names = [c.__name__ for c in type(model).__mro__]
    quant_only = _QUANT_ONLY_RISING if any(name in _RISING for name in names) else _QUANT_ONLY
    return next((MODELS[name] for name in names if name in MODELS), quant_only)


def _attentions(model: nn.Module) -> dict[str, nn.Module]:
    return _entry(model).attentions(model)


def _transformers(
    model_or_pipeline: Any, who: str, sparse: SparseMethod | None = None, quant: Any = None
) -> dict[str, nn.Module]:
    """The transformers of a pipeline by name, or a model alone; raises TypeError for anything else."""
    if isinstance(model_or_pipeline, nn.Module):
        found = {"transformer": _unwrap(model_or_pipeline)}
    else:
        parts = ((name, getattr(model_or_pipeline, name, None)) for name in ("transformer", "transformer_2"))
        found = {name: _unwrap(part) for name, part in parts if isinstance(part, nn.Module)}
    if not found:
        raise TypeError(
            f"{who}: a diffusers transformer, or a pipeline that holds one, is expected, got "
            f"{type(model_or_pipeline).__name__}"
        )
    for model in found.values():
        if any(c.__name__ in MODELS for c in type(model).__mro__):
            continue
        if sparse is None and quantize.is_known(model, quant):
            continue
        names = ", ".join(MODELS) if quant is None else quantize.known_classes()
        where = " for sparse attention" if sparse is not None and quant is not None else ""
        names = ", ".join(MODELS) if sparse is not None else names
        raise TypeError(f"{who}: the model's class must be one of {names}{where}, got {type(model).__name__}")
    return found


def _check(model: nn.Module, method: SparseMethod | None, on_unsupported: str) -> None:
    if handle_of(model) is not None:
        raise ValueError(
            f"vdit_ext.accelerate: {type(model).__name__} is accelerated already; call undo() on the first "
            "handle"
        )
    for name, attn in _attentions(model).items():
        refuse_parallel(attn.processor, name)
        if method is None or on_unsupported != "error":
            continue
        if (gap := _layer_gap(attn, _weight(attn).device)) is not None:
            raise ValueError(
                f'vdit_ext.accelerate: {name}: {gap}; on_unsupported may be set to "dense" or "reference"'
            )


def _weight(attn: nn.Module) -> torch.Tensor:
    """A tensor of an attention module that has the dtype and device it computes on."""
    linear = attn.to_out[0]
    linear = getattr(linear, "base_layer", linear)
    # A quantized linear has no weight in that dtype.
    return attn.norm_q.weight if linear.weight is None else linear.weight


def _layer_gap(attn: nn.Module, device: torch.device) -> str | None:
    """Why the kernels of a device cannot serve a layer, as far as its weights tell, or None."""
    if device.type == "meta":
        return None  # not loaded yet: the call will tell
    return device_gap(device) or kernel_gap(
        attn.inner_dim // attn.heads, _compute_dtype(_weight(attn)), device.type
    )


def _compute_dtype(weight: torch.Tensor) -> torch.dtype:
    # Weights stored in 8 bits are computed in a wider type that only the call shows.
    return torch.bfloat16 if weight.dtype.itemsize == 1 else weight.dtype


def _facts(model: str, layer: str, attn: nn.Module) -> dict[str, Any]:
    return {
        "model": model,
        "layer": layer,
        "method": "dense",
        "dense_steps": "all",
        "backend": "",
        "dtype": str(_weight(attn).dtype).removeprefix("torch."),
        "heads": attn.heads,
        "head_dim": attn.inner_dim // attn.heads,
        "reason": "",
    }


def _dense_steps(method: SparseMethod, counter: StepCounter, layer: int, num_layers: int) -> str:
    """Which steps are dense, as a phrase; only what can be known now."""
    if counter.ended:
        counter.read_schedule()
    total, times = counter.num_steps, counter.timesteps
    if total is None:
        return "unknown, no number of steps"
    dense = []
    for step in range(total):
        known = times is not None and len(times) == total
        answers = {
            method.is_dense(StepInfo(step, total, timestep, num_layers), layer)
            for timestep in ([times[step]] if known else [0.0, 1000.0])
        }
        if len(answers) > 1:
            return "decided by timestep"
        dense += [step] if answers.pop() else []
    return f"{_ranges(dense)} of {total}"


def _ranges(steps: list[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2, 5``."""
    if not steps:
        return "none"
    parts: list[list[int]] = []
    for step in steps:
        if parts and step == parts[-1][-1] + 1:
            parts[-1].append(step)
        else:
            parts.append([step])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


# ---------------------------------------------------------------------------------------------------------
# Attaching and undoing
# ---------------------------------------------------------------------------------------------------------


def _attach(
    name: str,
    model: nn.Module,
    method: SparseMethod | None,
    on_unsupported: str,
    counter: StepCounter,
    collect_stats: bool,
    applied: Applied | None,
) -> _Attached:
    entry = _entry(model)
    layers, processors = [], []
    backends = [
        (part.processor, part.processor._attention_backend)
        for part in model.modules()
        if hasattr(getattr(part, "processor", None), "_attention_backend")
    ]
    for where, attn in entry.attentions(model).items():
        processor = entry.processor(method, where, on_unsupported)
        processor._attention_backend = getattr(attn.processor, "_attention_backend", None)
        processors.append((attn, attn.processor))
        attn.set_processor(processor)
        layers.append(Layer(where, attn, processor))
    token_order = entry.token_order(model) if entry.token_order is not None and method is not None else None
    hook = RootHook(layers, method, counter, entry.layout, token_order, collect_stats)
    hook.timestep_rises = entry.timestep_rises
    hook.applied = applied
    hook.fused = entry.fused(model) if applied is not None and entry.fused is not None else None
    had_registry = hasattr(model, "_diffusers_hook")
    forward_before = model.__dict__.get("forward")
    HookRegistry.check_if_exists_or_initialize(model).register_hook(hook, HOOK_NAME)
    return _Attached(
        name,
        model,
        entry,
        hook,
        layers,
        processors,
        backends,
        had_registry,
        forward_before,
        model.__dict__.get("forward"),
        applied,
        hook.fused,
    )


def _remove_root_hook(one: _Attached) -> None:
    """Take the root hook out of the chain of forwards, wherever others have put theirs since."""
    registry = one.model._diffusers_hook
    place = registry._hook_order.index(HOOK_NAME)
    last = place == len(registry._hook_order) - 1
    if last and one.model.__dict__.get("forward") is not one.forward_after:
        # Something else wrapped `forward` on top (offloading does): stay in its chain, but do nothing.
        reference = registry._fn_refs[place]
        reference.pre_forward = lambda module, *args, **kwargs: (args, kwargs)
        reference.post_forward = lambda module, output: output
        del registry.hooks[HOOK_NAME], registry._hook_order[place], registry._fn_refs[place]
        return
    above = None if last else registry._fn_refs[place + 1]
    replaced = above is not None and above.original_forward is not None
    forward = above.forward if replaced else None
    inner = registry._fn_refs[place].forward
    registry.remove_hook(HOOK_NAME, recurse=False)
    if replaced:
        # NOTE: diffusers 0.42.1 overwrites the `new_forward` of the hook above (FasterCache's, for one) with
        # ours; that hook calls the inner forward through `original_forward` instead.
        above.forward, above.original_forward = forward, inner
    if last and one.forward_before is None:
        del one.model.forward
    if not one.had_registry and not registry.hooks:
        del one.model._diffusers_hook
