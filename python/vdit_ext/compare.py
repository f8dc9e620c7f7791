"""One clip by several methods: sampling, timing, density, and distance from the dense clip of the same seed."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Protocol, Union, get_args, get_origin, get_type_hints

import numpy as np

from .video import Quality, quality

Callback = Callable[[int, int], None]


class Unsupported(ValueError):
    """What a model asks of the kernels and they do not serve, where only sampling shows it; one sentence."""


def keep_settings(name: str, share: float) -> dict[str, float]:
    """The setting that makes a method keep a share (0 to 1) of attention; empty for those that have none.

    SVG2 has none: its ``top_p`` bounds the attention mass, and the share follows from the clip.
    """
    if name == "draft":
        return {"sparsity": round(1 - share, 9)}
    return {"density": share} if name == "svg1" else {}


@dataclass(frozen=True)
class Request:
    """What to sample. None stands for the pipeline's own default.

    Attributes:
        prompt: text.
        seed: of the starting noise, drawn on the CPU, so that every method starts from the same.
        steps, guidance: denoising steps and classifier-free-guidance scale.
        height, width, frames: size in pixels and number of frames; the toy model has one size only.
    """

    prompt: str
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None


class Sampler(Protocol):
    """A pipeline behind one interface.

    Attributes:
        name: what to call the model in reports.
        model: transformer or pipeline that ``accelerate`` takes.
        fps: frames a second of its clips; may be set.
    """

    name: str
    model: Any
    fps: float

    def resolve(self, request: Request) -> Request:
        """The request with steps and guidance filled in; ValueError, one sentence, for one it cannot serve."""

    def sample(self, request: Request, callback: Callback | None = None) -> np.ndarray:
        """The clip, uint8 ``[f, h, w, 3]``; ``callback(done, steps)`` after each step."""

    def warm_up(self, request: Request) -> None:
        """Pay one-time costs (memory, thread pools) that would distort the first timing."""

    def method(self, name: str, settings: Mapping[str, Any]) -> Any:
        """A method with the settings published for this model, changed by ``settings``."""


class ToySampler:
    """The toy model that comes with the package."""

    name = "toy"

    def __init__(self, pipe: Any):
        self.pipe = pipe
        self.model = pipe.transformer
        self.fps = pipe.fps

    @classmethod
    def load(cls) -> ToySampler:
        """Load the packaged weights; ValueError, one sentence, when they are missing or damaged."""
        from . import toyworld

        return cls(toyworld.load_pipeline())

    def resolve(self, request: Request) -> Request:
        from .toyworld.pipeline import DEFAULT_GUIDANCE, DEFAULT_STEPS

        check_toy_request(request)
        return dataclasses.replace(
            request,
            steps=DEFAULT_STEPS if request.steps is None else request.steps,
            guidance=DEFAULT_GUIDANCE if request.guidance is None else request.guidance,
        )

    def sample(self, request: Request, callback: Callback | None = None) -> np.ndarray:
        result = self.pipe(
            request.prompt,
            seed=request.seed,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance,
            callback=callback,
        )
        return result.frames

    def warm_up(self, request: Request) -> None:
        self.sample(dataclasses.replace(request, steps=1))

    def method(self, name: str, settings: Mapping[str, Any]) -> Any:
        return build_method(name, ["toy"], settings)


class FolderSampler:
    """A diffusers text-to-video pipeline from a folder on disk.

    A folder does not say how many frames a second its clips have: 16, as Wan 2.1 has, until ``fps`` is set.
    """

    DEFAULT_STEPS, DEFAULT_GUIDANCE, FPS = 50, 5.0, 16

    def __init__(self, pipe: Any, name: str):
        self.pipe = self.model = pipe
        self.name = name
        self.fps = self.FPS
        self.pipe.set_progress_bar_config(disable=True)

    @classmethod
    def load(cls, folder: Path, *, dtype: str, device: str) -> FolderSampler:
        """Load a folder; OSError or ValueError, one sentence, when it is no pipeline for ``accelerate``."""
        import torch

        from .integrations import load_pipeline

        pipe = load_pipeline(folder, dtype=getattr(torch, dtype))
        return cls(pipe.to(device), folder.name)

    def resolve(self, request: Request) -> Request:
        patch = self.pipe.transformer.config.patch_size
        for field, side in (("height", 1), ("width", 2)):
            value, unit = getattr(request, field), self.pipe.vae_scale_factor_spatial * patch[side]
            if value is not None and value % unit:
                raise ValueError(f"{field}: a multiple of {unit} was expected, got {value}")
        unit = self.pipe.vae_scale_factor_temporal
        if request.frames is not None and (request.frames - 1) % unit:
            raise ValueError(f"frames: one more than a multiple of {unit} was expected, got {request.frames}")
        request = dataclasses.replace(
            request,
            steps=self.DEFAULT_STEPS if request.steps is None else request.steps,
            guidance=self.DEFAULT_GUIDANCE if request.guidance is None else request.guidance,
        )
        _check_arguments(self.pipe, self._arguments(request))
        return request

    def sample(self, request: Request, callback: Callback | None = None) -> np.ndarray:
        import torch

        frames = self.pipe(
            **self._arguments(request),
            generator=torch.Generator().manual_seed(request.seed),
            callback_on_step_end=_per_step(callback, request.steps),
            output_type="np",
        ).frames[0]
        return np.clip(np.asarray(frames) * 255 + 0.5, 0, 255).astype(np.uint8)

    def _arguments(self, request: Request) -> dict[str, Any]:
        """What the pipeline is called with for this request; its own defaults stay out."""
        given = {
            "prompt": request.prompt,
            "num_inference_steps": request.steps,
            "guidance_scale": request.guidance,
            "height": request.height,
            "width": request.width,
            "num_frames": request.frames,
        }
        return {key: value for key, value in given.items() if value is not None}

    def warm_up(self, request: Request) -> None:
        """Nothing: one step of a full-size model takes longer than what it would hide."""

    def method(self, name: str, settings: Mapping[str, Any]) -> Any:
        return build_method(name, _presets_like(self.pipe.transformer), settings)


def _check_arguments(pipe: Any, arguments: Mapping[str, Any]) -> None:
    """Let a pipeline check now what its call would check; ValueError, one sentence, for what it refuses."""
    defaults = {name: p.default for name, p in inspect.signature(pipe.__call__).parameters.items()}
    known = defaults | dict(arguments)
    pipe.check_inputs(**{name: known.get(name) for name in inspect.signature(pipe.check_inputs).parameters})


def _per_step(callback: Callback | None, total: int):
    if callback is None:
        return None

    def on_step_end(_pipe, step, _timestep, kwargs):
        callback(step + 1, total)
        return kwargs

    return on_step_end


def check_toy_request(request: Request) -> None:
    """Raise ValueError, in one sentence, for a prompt or a size that the toy model does not have."""
    from .toyworld import captions

    captions.parse(request.prompt)
    for field in ("height", "width", "frames"):
        if getattr(request, field) is not None:
            raise ValueError(
                f"{field}: the toy model makes clips of 16 frames of 96 by 96 pixels only, got "
                f"{getattr(request, field)}; leave it out, or name another model"
            )


def _presets_like(transformer: Any) -> list[str]:
    """Names of the published shapes with this transformer's heads, head size and layers."""
    from .sparse.shapes import SHAPES

    config = transformer.config
    shape = (config.num_attention_heads, config.attention_head_dim, config.num_layers)
    return [name for name, s in SHAPES.items() if (s.heads, s.head_dim, s.layers) == shape]


def build_method(name: str, presets: list[str], settings: Mapping[str, Any]) -> Any:
    """A sparse method by name.

    Args:
        name: a key of :data:`vdit_ext.sparse.METHODS`.
        presets: the first of these that the method knows gives the settings; its own defaults when none does.
        settings: what to change; strings are read as the type that the setting is annotated with.

    Raises:
        ValueError: one sentence, for an unknown name or setting, or a value out of range.
    """
    from .sparse import METHODS

    if name not in METHODS:
        raise ValueError(f"method: one of {', '.join(METHODS)} was expected, got {name!r}")
    factory = METHODS[name]
    method = None
    for preset in presets:
        try:
            method = factory.preset(preset)
            break
        except ValueError:
            continue
    method = factory() if method is None else method
    hints = get_type_hints(type(method))
    known = {f.name: hints[f.name] for f in dataclasses.fields(method) if f.init}
    changes = {}
    for key, value in settings.items():
        if key not in known:
            raise ValueError(
                f"{name}: a setting was expected ({', '.join(known) or 'it has none'}), got {key!r}"
            )
        changes[key] = _typed(name, key, value, known[key])
    return dataclasses.replace(method, **changes)


_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def _typed(method: str, key: str, value: Any, hint: Any) -> Any:
    """Read a command line's string as the type that the setting is annotated with; ValueError if it is none."""
    if not isinstance(value, str):
        return value
    kinds = get_args(hint) if get_origin(hint) in (UnionType, Union) else (hint,)
    if type(None) in kinds and value.lower() == "none":
        return None
    (kind,) = (kind for kind in kinds if kind is not type(None))
    if kind is str:
        return value
    try:
        if kind is bool:
            return _BOOLEANS[value.lower()]
        if get_origin(kind) is tuple:
            return tuple(int(part) for part in value.replace("x", ",").split(","))
        number = int(value) if kind is int else float(value)
    except (KeyError, ValueError):
        number = math.nan
    # No setting of a method is negative.
    if not 0 <= number < math.inf:
        what = {bool: "true or false", int: "a whole number, 0 or more", float: "a number, 0 or more"}
        expected = what.get(kind, "whole numbers such as 8,16") + (", or none" * (type(None) in kinds))
        raise ValueError(f"{method}: {key} must be {expected}, got {value!r}")
    return number


def settings_of(method: Any) -> dict[str, Any]:
    """A method's settings as plain data for JSON."""
    if method is None or not dataclasses.is_dataclass(method):
        return {}
    values = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    return {
        k: v if isinstance(v, (bool, int, float, str, type(None))) else _plain(v) for k, v in values.items()
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (tuple, list)) else str(value)


@dataclass(frozen=True)
class Run:
    """One sampled clip and what it cost.

    Attributes:
        method: name, "dense" for the pipeline as it is; with quantized linears, what they are after a plus.
        settings: of the method, plain data.
        clip: uint8 ``[f, h, w, 3]``.
        seconds: wall clock of the sampling, decoding included, loading not.
        density: mean kept share of query-key pairs in the sparse steps, over all layers; layers that stay dense
            in such a step count as 1. None when no step was sparse.
        density_sparse_layers: the same over those layers only that were sparse; None when none was.
        density_overall: attention work done over that of dense attention, dense steps counted in.
        quality: against the dense clip; None when there is none to compare with.
        quant: what its linears were, None for full precision.
    """

    method: str
    settings: dict[str, Any]
    clip: np.ndarray
    seconds: float
    density: float | None
    density_sparse_layers: float | None
    density_overall: float
    quality: Quality | None = None
    quant: str | None = None

    def against(self, dense: Run) -> Run:
        """This run with its quality measured against a dense one."""
        return dataclasses.replace(self, quality=quality(self.clip, dense.clip))

    def record(self, dense: Run | None = None) -> dict[str, Any]:
        """The figures as plain data for JSON.

        ``psnr`` is null where there is nothing to compare with and where the clips are identical, which
        ``identical`` tells apart, since JSON has no infinity.
        """
        q = self.quality
        return {
            "method": self.method,
            "quant": self.quant,
            "density": self.density,
            "density_sparse_layers": self.density_sparse_layers,
            "density_overall": self.density_overall,
            "psnr": None if q is None or math.isinf(q.psnr) else q.psnr,
            "ssim": None if q is None else q.ssim,
            "identical": None if q is None else q.identical,
            "seconds": self.seconds,
            "seconds_dense": None if dense is None else dense.seconds,
            "speedup": None if dense is None else dense.seconds / self.seconds,
            "settings": self.settings,
            "frames_sha256": hashlib.sha256(np.ascontiguousarray(self.clip).tobytes()).hexdigest(),
        }


def run_dense(sampler: Sampler, request: Request, callback: Callback | None = None) -> Run:
    """Sample with the pipeline as it is."""
    start = time.perf_counter()
    clip = sampler.sample(request, callback)
    seconds = time.perf_counter() - start
    return Run("dense", {}, clip, seconds, 1.0, None, 1.0, Quality(math.inf, 1.0, True))


def run_sparse(
    sampler: Sampler,
    request: Request,
    method: Any,
    callback: Callback | None = None,
    *,
    quant: Any = None,
    label: str | None = None,
) -> Run:
    """Sample with a sparse method, with quantized linears, or with both, and leave the pipeline as it was.

    Args:
        method: sparse method; None for dense attention.
        quant: as ``accelerate`` takes it; None for full precision.
        label: what to call the quantized linears.

    Raises:
        Unsupported: one sentence, when the kernels cannot serve a call, which :func:`check_methods` could not
            know. Whatever else is raised is a defect.
    """
    from .integrations import accelerate

    steps = request.steps
    with accelerate(sampler.model, sparse=method, quant=quant, num_inference_steps=steps) as handle:
        start = time.perf_counter()
        try:
            clip = sampler.sample(request, callback)
        except ValueError as error:
            # A layer without a backend is one whose call was refused; a ValueError without such is a defect.
            if any(row["backend"] == "none" for row in handle.explain()):
                raise Unsupported(str(error)) from error
            raise
        seconds = time.perf_counter() - start
        stats = handle.stats()
    density = 1.0 if method is None else _or_none(stats["density_steps"])
    return Run(
        run_name(method, label),
        settings_of(method),
        clip,
        seconds,
        density,
        _or_none(stats["density"]),
        stats["density_overall"],
        quant=label,
    )


def run_name(method: Any, label: str | None = None) -> str:
    """What a run is called: its sparse method, then what its linears are."""
    name = "dense" if method is None else method.name
    return name if label is None else f"{name}+{label}"


def _or_none(share: float) -> float | None:
    return None if math.isnan(share) else share


def check_methods(sampler: Sampler, request: Request, methods: Iterable[Any], quant: Any = None) -> None:
    """Raise ValueError or FileNotFoundError, in one sentence, when a method, or quantized linears, cannot serve
    this model; nothing is sampled."""
    from .integrations import accelerate

    for method in methods:
        accelerate(sampler.model, sparse=method, num_inference_steps=request.steps).undo()
    if quant is not None:
        accelerate(sampler.model, quant=quant, num_inference_steps=request.steps).undo()


def quant_label(quant: str) -> str:
    """What to call quantized linears that a command line names: a method, or the method and bits of a folder.

    Raises:
        ValueError, FileNotFoundError: one sentence, for neither.
    """
    from .quant import files
    from .quant.methods import METHODS, check_free, entry_of

    if quant in METHODS:
        check_free(quant, entry_of(quant).bits[0])
        return f"{quant}-{entry_of(quant).bits[0]}"
    folder = Path(quant)
    parts = [folder / name for name in ("transformer", "transformer_2") if files.is_saved(folder / name)]
    settings = files.read_settings(parts[0] if parts and not files.is_saved(folder) else folder)
    return "-".join(filter(None, (settings["method"], str(settings["info"].get("bits", "")))))


def always_dense(sampler: Sampler, request: Request, method: Any) -> bool:
    """Whether a method makes every step of every layer dense, as far as the step numbers tell; no sampling."""
    from .sparse.plan import StepInfo

    layers = getattr(sampler.model, "transformer", sampler.model).config.num_layers
    return all(
        method.is_dense(StepInfo(step, request.steps, timestep, layers), layer)
        for step in range(request.steps)
        for layer in range(layers)
        for timestep in (0.0, 1000.0)
    )
