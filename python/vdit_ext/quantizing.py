"""From a model to a folder of quantized layers: loading, calibration, work that can be taken up again, a
report."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from .quant import files
from .quant.apply import QuantizedModel, get_linear
from .quant.calibration import Calibration, calibrate
from .quant.calibration_files import load_calibration, save_calibration
from .quant.layers import LayerList, linear_layers
from .quant.linear import QuantLayer, QuantLinear, compute_device
from .quant.measure import before_each, snr, weight_snr
from .quant.methods import entry_of, run
from .quant.sensitivity import measured_map
from .quant.vidit_q import BitMap, average_bits

if TYPE_CHECKING:
    from .compare import Request

PARTIAL = ".partial"
TRANSFORMERS = ("transformer", "transformer_2")
TOY_PROMPTS = (
    "a red disc bounces over blue stripes",
    "a green square slides right over grey checks",
    "a yellow triangle falls over plain brown",
    "a white disc rises over green dots",
)
# Rows of an input that its layer's output is measured on.
_MEASURED_ROWS = 256

Stage = Callable[[str, int], Callable[[int, int], None]]


class Unfinished(ValueError):
    """An output folder with an unfinished run that is not this one; one sentence."""


@dataclass(frozen=True)
class Job:
    """What to do.

    Attributes:
        method, bits, seed, settings: as :func:`vdit_ext.quant.methods.run` takes them.
        layers: regular expressions for names of linears; by default those of the model's class.
        prompts, steps, guidance, height, width, frames: what the calibration samples; None is the model's
        default.
        rows: rows kept of the input of each layer.
        average_bits: 4 to 8: measure how much each part of the model matters in each quarter of the steps, on
            the first prompt, and plan a bit map of so many bits a weight (:mod:`vdit_ext.quant.sensitivity`);
            None for the method's own map. Only for vidit_q with w4a8-mp.
        by_interval: False measures over all steps at once, in about a quarter of the clips.
        calibration: folder to take the calibration from, or to leave it in for other bits and methods; None
            keeps it only until the run is finished.
    """

    method: str
    bits: str
    seed: int = 0
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    layers: tuple[str, ...] | None = None
    prompts: tuple[str, ...] = ()
    steps: int | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    rows: int = 512
    average_bits: float | None = None
    by_interval: bool = True
    calibration: Path | None = None

    @property
    def calibrated(self) -> bool:
        """Whether the method looks at activations."""
        return entry_of(self.method).calibrated


@dataclass
class Source:
    """A model to quantize.

    Attributes:
        name: what to call it in reports.
        models: its transformers, by name.
        sampler: samples with them (:class:`vdit_ext.compare.Sampler`), None where nothing needs to.
        loadable: whether diffusers' classes alone can load the transformers.
    """

    name: str
    models: dict[str, nn.Module]
    sampler: Any = None
    loadable: bool = True


# ---------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------


def load_source(model: str, job: Job, *, dtype: str = "float32", device: str = "cpu") -> Source:
    """The toy model, a pipeline folder, or a transformer folder.

    Args:
        model: "toy", or a folder with ``model_index.json`` or with the ``config.json`` of a transformer.

    Raises:
        ValueError, OSError: one sentence, for a folder that is neither, a model that is quantized already, or a
            transformer alone for a method that must sample.
    """
    from .compare import FolderSampler, ToySampler

    if model == "toy":
        sampler = ToySampler.load()
        # Its patch embedding is a class of its own.
        return Source("toy", {"transformer": sampler.model}, sampler, loadable=False)
    folder = Path(model)
    if not folder.is_dir():
        raise ValueError(f'MODEL must be "toy" or a folder of a pipeline or a transformer, got {model!r}')
    parts = _transformer_folders(folder)
    for part in parts.values():
        if "quantization_config" in _config(part):
            raise ValueError(f"MODEL must be in full precision, {part} is quantized already")
    if not job.calibrated:
        return Source(folder.name, {name: _load(part, dtype, device) for name, part in parts.items()})
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"MODEL must be a pipeline folder for {job.method}, which samples to calibrate, got a "
            "transformer alone"
        )
    sampler = FolderSampler.load(folder, dtype=dtype, device=device)
    return Source(sampler.name, {name: getattr(sampler.pipe, name) for name in parts}, sampler)


def _transformer_folders(folder: Path) -> dict[str, Path]:
    if (folder / "model_index.json").is_file():
        found = {name: folder / name for name in TRANSFORMERS if (folder / name / "config.json").is_file()}
    else:
        found = {"transformer": folder} if (folder / "config.json").is_file() else {}
    if not found:
        raise ValueError(
            f"MODEL must hold a transformer: {folder} has neither a model_index.json with one nor a config.json"
        )
    return found


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} must be JSON, it is not: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{folder / 'config.json'} must hold a JSON object, got {type(config).__name__}")
    return config


def _load(folder: Path, dtype: str, device: str) -> nn.Module:
    import diffusers

    name = str(_config(folder).get("_class_name"))
    loader = getattr(diffusers, name, None)
    if not (isinstance(loader, type) and issubclass(loader, diffusers.ModelMixin)):
        raise ValueError(f"{folder} must hold a model of diffusers {diffusers.__version__}, got {name}")
    try:
        model = loader.from_pretrained(str(folder), torch_dtype=getattr(torch, dtype), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} could not be loaded: {' '.join(str(error).split())}") from error
    return model.to(device)


# ---------------------------------------------------------------------------------------------------------
# Quantizing
# ---------------------------------------------------------------------------------------------------------


def quantize_to(
    out: Path, source: Source, job: Job, *, resume: bool = False, stage: Stage | None = None
) -> dict[str, Any]:
    """Quantize all transformers of a source and write them, each into a folder that appears when it is
    complete.

    A transformer alone goes into ``out``, several into folders by their names in it. What is finished of an
    interrupted run is in ``out/.partial``.

    Args:
        resume: take up an unfinished run with the same settings; a finished one is left as it is.
        stage: called with the name and the length of each part of the work; returns what to tell its progress.

    Returns:
        The report: facts of the run, and for each transformer of its layers.

    Raises:
        Unfinished: there is an unfinished run, and ``resume`` is not set, or it has other settings.
        TypeError, ValueError, KeyError, OSError: what methods, calibration and files refuse, and a folder that
            holds another model; one sentence. A new run leaves nothing behind then, but for an OSError.
    """
    stage = stage or (lambda name, total: lambda done, total: None)
    check_mixed(job)
    lists = {name: linear_layers(model, job.layers) for name, model in source.models.items()}
    facts = _fingerprint(source, job, lists)
    if resume and (done := _finished(out, source, facts)) is not None:
        return done
    if source.loadable:
        for folder in _folders(out, source).values():
            files.check_target(folder)
    partial = _Partial(out / PARTIAL, facts, resume)
    try:
        return _quantize_all(out, source, job, lists, partial, stage)
    except (TypeError, ValueError, KeyError):
        # The same settings would be refused again, others could not go on from here.
        if partial.new:
            partial.remove()
        raise


def _quantize_all(
    out: Path, source: Source, job: Job, lists: Mapping[str, LayerList], partial: _Partial, stage: Stage
) -> dict[str, Any]:
    start = time.perf_counter()
    records = {}
    for name, model in source.models.items():
        label = name if len(source.models) > 1 else ""
        calibration = _calibration(source, name, lists[name], job, partial, stage) if job.calibrated else None
        precision = _precision(source, name, lists[name], calibration, job, partial, stage)
        tell = stage(label or job.method, 1)
        quantized = _quantize(model, lists[name], calibration, precision, job, partial, name, tell)
        records[name] = (quantized, _layer_records(model, quantized, lists[name], calibration))
    report = _report(source, job, partial.facts, records, lists, partial.seconds + time.perf_counter() - start)
    _write(out, source, job, records, report)
    partial.remove()
    return report


def _quantize(
    model: nn.Module,
    layers: LayerList,
    calibration: Calibration | None,
    precision: tuple[BitMap, ...],
    job: Job,
    partial: _Partial,
    component: str,
    tell: Callable[[int, int], None],
) -> QuantizedModel:
    """Block by block, each kept when it is finished; in one go where the method keeps its own account."""
    common = {"bits": job.bits, "seed": job.seed, **job.settings}
    entry = entry_of(job.method, job.bits)
    if "checkpoint" in inspect.signature(entry.load()).parameters:
        folder = partial.folder / component / "checkpoint"

        def moved(done: int, total: int, name: str) -> None:
            partial.note()
            tell(done, total)

        return run(
            job.method,
            model,
            calibration,
            layers=list(layers),
            progress=moved,
            checkpoint=folder,
            **common,
        )
    parts, done = [], 0
    for block, infos in layers.blocks().items():
        part = partial.block(component, block)
        if part is None:
            before = done
            if precision:
                names = {info.name for info in infos}
                own = [{name: bits for name, bits in one.items() if name in names} for one in precision]
                common["precision"] = own
            part = run(
                job.method,
                model,
                calibration,
                layers=infos,
                progress=lambda ready, total, name, before=before: tell(
                    min(before + ready, len(layers)), len(layers)
                ),
                **common,
            )
            partial.keep_block(component, block, part)
        else:
            tell(done + len(infos), len(layers))
        done += len(infos)
        parts.append(part)
    joined = _joined(parts)
    if joined.intervals:
        average = average_bits(layers, joined.intervals)
        return dataclasses.replace(joined, report={**joined.report, "average_weight_bits": average})
    return joined


def check_mixed(job: Job) -> None:
    """Raise ValueError, one sentence, for an average that the method cannot have, or a measure without one."""
    if job.average_bits is None:
        if not job.by_interval:
            raise ValueError("--measure-whole: --average-bits was expected with it, got none; leave it out")
        return
    if (job.method, job.bits) != ("vidit_q", "w4a8-mp") or "precision" in job.settings:
        raise ValueError(
            "--average-bits: method vidit_q with bits w4a8-mp and no precision of its own was expected, got "
            f"{job.method} with {job.bits}"
        )
    if not 4 <= job.average_bits <= 8:
        raise ValueError(f"--average-bits: 4 to 8 was expected, got {job.average_bits}")


def _precision(
    source: Source,
    component: str,
    layers: LayerList,
    calibration: Calibration | None,
    job: Job,
    partial: _Partial,
    stage: Stage,
) -> tuple[BitMap, ...]:
    """The measured bit map; empty where the method's own is wanted."""
    if job.average_bits is None:
        return ()
    request = _request(source, job, 0)

    def sample(on_step: Callable[[int, int], None]) -> torch.Tensor:
        frames = source.sampler.sample(request, before_each(on_step, request.steps))
        return torch.from_numpy(frames).float()

    tell = stage("measure", 1)
    return measured_map(
        source.models[component],
        calibration,
        sample,
        average_bits=job.average_bits,
        by_interval=job.by_interval,
        kept=partial.losses(component),
        progress=lambda done, total, what: tell(done, total),
        layers=layers,
        seed=job.seed,
        **job.settings,
    )


def _joined(parts: list[QuantizedModel]) -> QuantizedModel:
    layers = {name: layer for part in parts for name, layer in part.layers.items()}
    count = max(len(part.intervals) for part in parts)
    intervals = tuple(
        {name: bits for part in parts if part.intervals for name, bits in part.intervals[i].items()}
        for i in range(count)
    )
    report = dict(parts[0].report)
    for part in parts[1:]:
        report = {key: _joined_values(report[key], part.report[key]) for key in report if key in part.report}
    return QuantizedModel(parts[0].method, layers, intervals, report)


def _joined_values(first: Any, second: Any) -> Any:
    """One value for two blocks' reports: equal ones stay, tables and lists are united, counts in tables added.

    What differs otherwise is a list of both, in the order of the blocks.
    """
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        joined = dict(first)
        for key, value in second.items():
            known = key in joined
            both = known and type(joined[key]) is type(value) is int
            joined[key] = (
                joined[key] + value if both else _joined_values(joined[key], value) if known else value
            )
        return joined
    if isinstance(first, list) and isinstance(second, list):
        return [*first, *second]
    if first == second:
        return first
    return [*first, second] if isinstance(first, list) else [first, second]


# ---------------------------------------------------------------------------------------------------------
# Calibration
# ---------------------------------------------------------------------------------------------------------


def _calibration(
    source: Source, component: str, layers: LayerList, job: Job, partial: _Partial, stage: Stage
) -> Calibration:
    """Of an earlier run where it was kept; the calls to sample with are given along in any case."""
    steps, calls = _calls(source, job)
    runs = tuple(call(None) for call in calls)
    facts = {key: partial.facts[key] for key in _CALIBRATION_FACTS}
    folders = [folder / component for folder in (partial.folder, job.calibration) if folder is not None]
    for folder in folders:
        if (kept := load_calibration(folder, facts, runs)) is not None:
            return kept
    tell, done = stage("calibrate", steps * len(calls)), 0

    def note(step: int, total: int) -> None:
        nonlocal done
        done += 1
        tell(done, steps * len(calls))

    model = source.models[component]
    found = calibrate(model, [call(note) for call in calls], layers=list(layers), rows=job.rows, seed=job.seed)
    for folder in folders:
        save_calibration(folder, found, facts)
    partial.note()
    return Calibration(found.layers, runs)


def _calls(source: Source, job: Job) -> tuple[int, list[Callable[[Any], Callable[[], Any]]]]:
    """Denoising steps of a prompt, and for each prompt what makes a call that samples it."""
    sampler, calls, steps = source.sampler, [], 0
    for i in range(len(job.prompts)):
        request = _request(source, job, i)
        steps = request.steps
        calls.append(lambda note, request=request: lambda: sampler.sample(request, note))
    return steps, calls


def _request(source: Source, job: Job, i: int) -> Request:
    """What the sampler is asked for with prompt i."""
    from .compare import Request

    sizes = (job.height, job.width, job.frames)
    return source.sampler.resolve(Request(job.prompts[i], job.seed + i, job.steps, job.guidance, *sizes))


# ---------------------------------------------------------------------------------------------------------
# What is finished of a run
# ---------------------------------------------------------------------------------------------------------


# Of a run's fingerprint, what decides its calibration.
_CALIBRATION_FACTS = ("model", "seed", "layers", "prompts", "steps", "guidance", "size", "rows", "weights")


def _fingerprint(source: Source, job: Job, lists: Mapping[str, LayerList]) -> dict[str, Any]:
    """What must be equal for one run to go on with the work of another."""
    return {
        "model": source.name,
        "method": job.method,
        "bits": job.bits,
        "seed": job.seed,
        "settings": dict(job.settings),
        "layers": list(job.layers) if job.layers is not None else None,
        "prompts": list(job.prompts),
        "steps": job.steps,
        "guidance": job.guidance,
        "size": [job.width, job.height, job.frames],
        "rows": job.rows,
        "average_bits": job.average_bits,
        "by_interval": job.by_interval,
        "weights": {name: _digest(model, lists[name]) for name, model in source.models.items()},
        "format": files.VERSION,
    }


def _digest(model: nn.Module, layers: LayerList) -> str:
    """Of names and sizes of the linears, and of every byte of their weights: about a second for each GB."""
    digest = hashlib.sha256()
    for info in layers:
        digest.update(repr(dataclasses.astuple(info)).encode())
        digest.update(get_linear(model, info.name).weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


class _Partial:
    """The finished blocks, and the calibration, of a run that may be interrupted.

    Attributes:
        folder: where they are.
        facts: what the run is known by.
        new: whether nothing of an earlier run was there.
        seconds: spent by earlier runs.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], resume: bool):
        self.folder = folder
        self.facts = facts
        self._start = time.perf_counter()
        self.seconds = 0.0
        known = self._read()
        if known is not None and not resume:
            raise Unfinished(
                f"--out: no unfinished run was expected, {folder} has one; go on with --resume or remove "
                "that folder"
            )
        if known is not None:
            self._check(known, facts)
            self.seconds = known["seconds"]
        self.new = known is None
        self._made_parent = not folder.parent.exists()
        folder.mkdir(parents=True, exist_ok=True)
        self.note()

    def _read(self) -> dict[str, Any] | None:
        path = self.folder / "run.json"
        if not path.is_file() or not any(one.is_dir() for one in self.folder.iterdir()):
            return None  # nothing was finished
        try:
            known = json.loads(path.read_text())
            return {"facts": dict(known["facts"]), "seconds": float(known["seconds"])}
        except (ValueError, KeyError, TypeError) as error:
            raise Unfinished(
                f"--resume: {path} must be of an unfinished run, it is damaged; remove {self.folder}"
            ) from error

    def _check(self, known: dict[str, Any], facts: dict[str, Any]) -> None:
        for key, value in facts.items():
            if known["facts"].get(key) != value:
                raise Unfinished(
                    f"--resume: {key} must be as in the unfinished run "
                    f"({json.dumps(known['facts'].get(key))}), got {json.dumps(value)}; remove {self.folder} "
                    "to begin anew"
                )

    def note(self) -> None:
        """Keep what the run is known by, and its seconds."""
        spent = self.seconds + time.perf_counter() - self._start
        text = json.dumps({"facts": self.facts, "seconds": spent}, indent=2)
        with files.staged(self.folder, ["run.json"]) as paths:
            paths["run.json"].write_text(text)

    def block(self, component: str, block: str) -> QuantizedModel | None:
        """What an earlier run finished of a block, or None."""
        folder = self.folder / component / block
        return files.load(folder) if files.is_saved(folder) else None

    def keep_block(self, component: str, block: str, quantized: QuantizedModel) -> None:
        files.save(self.folder / component / block, quantized)
        self.note()

    def losses(self, component: str) -> _Losses:
        """What was measured of a model's sensitivity."""
        (self.folder / component).mkdir(parents=True, exist_ok=True)
        return _Losses(self.folder / component / "losses.json")

    def remove(self) -> None:
        """With the folder it is in, when that was made for it and holds nothing else."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._made_parent:
            with contextlib.suppress(OSError):
                self.folder.parent.rmdir()


class _Losses(dict[str, float]):
    """Losses by clip; a file keeps each as it comes."""

    def __init__(self, path: Path):
        super().__init__(json.loads(path.read_text()) if path.is_file() else {})
        self.path = path

    def __setitem__(self, clip: str, loss: float) -> None:
        super().__setitem__(clip, loss)
        with files.staged(self.path.parent, [self.path.name]) as paths:
            paths[self.path.name].write_text(json.dumps(self))


def _finished(out: Path, source: Source, facts: dict[str, Any]) -> dict[str, Any] | None:
    """The report of a finished run with the same settings, or None."""
    reports = []
    for folder in _folders(out, source).values():
        if not files.is_saved(folder):
            return None
        reports.append(files.read_settings(folder)["info"].get("run"))
    same = all(isinstance(one, dict) and one.get("facts") == facts for one in reports)
    return reports[0] if same else None


# ---------------------------------------------------------------------------------------------------------
# Report and files
# ---------------------------------------------------------------------------------------------------------


def _layer_records(
    model: nn.Module, quantized: QuantizedModel, layers: LayerList, calibration: Calibration | None
) -> list[dict[str, Any]]:
    """What became of each layer: format, bits, bytes, and how near its weight and its output are, in dB."""
    kinds = {info.name: info.kind for info in layers}
    records = []
    for name, layer in quantized.layers.items():
        linear = get_linear(model, name)
        bits = min((part[name] for part in quantized.intervals if name in part), default=layer.weight.bits)
        records.append(
            {
                "layer": name,
                "kind": kinds.get(name, "modulation"),  # which VQ4DiT quantizes too
                "format": layer.weight.format,
                "bits": layer.weight.bits,
                "fewest_bits": bits,
                "bytes": layer.nbytes,
                "bytes_bf16": 2 * linear.weight.numel()
                + (0 if linear.bias is None else 2 * linear.bias.numel()),
                "weight_snr": _finite(weight_snr(linear, layer, bits)),
                "output_snr": _finite(_output_snr(linear, layer, bits, calibration, name)),
            }
        )
    return records


@torch.no_grad()
def _output_snr(
    linear: nn.Linear, layer: QuantLayer, bits: int, calibration: Calibration | None, name: str
) -> float:
    """Of a layer's output on rows of the calibration; NaN without one."""
    if calibration is None or name not in calibration.layers:
        return float("nan")
    place = compute_device(linear)
    rows = calibration[name].rows[:_MEASURED_ROWS].to(place, torch.float32)
    weight, bias = (
        None if t is None else t.detach().to(place, torch.float32) for t in (linear.weight, linear.bias)
    )
    module = QuantLinear(layer.to(place))
    if bits in module.switchable_bits:
        module.set_bits(bits)
    return snr(F.linear(rows, weight, bias), module(rows))


def _finite(value: float) -> float | None:
    return value if torch.tensor(value).isfinite() else None


def _report(
    source: Source,
    job: Job,
    facts: dict[str, Any],
    records: Mapping[str, tuple[QuantizedModel, list[dict[str, Any]]]],
    lists: Mapping[str, LayerList],
    seconds: float,
) -> dict[str, Any]:
    rows = [row | {"model": name} for name, (_, layers) in records.items() for row in layers]
    return {
        "model": source.name,
        "method": job.method,
        "bits": job.bits,
        "settings": dict(job.settings),
        "average_weight_bits": {
            name: quantized.report.get("average_weight_bits") for name, (quantized, _) in records.items()
        },
        "seed": job.seed,
        "prompts": list(job.prompts) if job.calibrated else [],
        "layers": rows,
        "kept": {
            name: {kept: why for kept, why in layers.kept.items() if kept not in records[name][0].layers}
            for name, layers in lists.items()
        },
        "bytes": sum(row["bytes"] for row in rows),
        "bytes_bf16": sum(row["bytes_bf16"] for row in rows),
        "seconds": seconds,
        "facts": facts,
    }


def _folders(out: Path, source: Source) -> dict[str, Path]:
    return {name: out if len(source.models) == 1 else out / name for name in source.models}


def _write(
    out: Path,
    source: Source,
    job: Job,
    records: Mapping[str, tuple[QuantizedModel, list[dict[str, Any]]]],
    report: dict[str, Any],
) -> None:
    from .integrations import save_quantized

    for name, folder in _folders(out, source).items():
        info = {"bits": job.bits, "run": report}
        save_quantized(folder, source.models[name], records[name][0], info=info, whole=source.loadable)


def settings_from(method: str, assignments: list[str]) -> dict[str, Any]:
    """Settings of a method from ``key=value``; values are numbers, true, false, none, or else words.

    Raises:
        ValueError: one sentence, for something else, or a setting that the method does not have.
    """
    known, found = _settings_of(method), {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not (key and equals and value):
            raise ValueError(f"--set: name=value was expected, as in alpha=0.5, got {assignment!r}")
        if key not in known:
            raise ValueError(
                f"--set: a setting of {method} was expected ({', '.join(known) or 'it has none'}), got {key!r}"
            )
        found[key] = _value(value)
    return found


def _settings_of(method: str) -> list[str]:
    function = entry_of(method).load()
    common = {"model", "calibration", "bits", "seed", "progress", "layers", "device", "checkpoint"}
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if p.name not in common and p.kind is not p.VAR_KEYWORD]
    settings = getattr(inspect.getmodule(function), "Settings", None)
    if any(p.kind is p.VAR_KEYWORD for p in parameters) and dataclasses.is_dataclass(settings):
        names += [field.name for field in dataclasses.fields(settings)]
    return names


def _value(text: str) -> Any:
    words = {"none": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts of a text file, one a line; empty lines and lines that begin with ``#`` do not count.

    Raises:
        ValueError, OSError: one sentence, for a file without any, or that is no text.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"--prompts: a text file in UTF-8 was expected, {str(path)!r} is none") from None
    except OSError as error:
        raise ValueError(f"--prompts: {str(path)!r} was expected to be readable: {error.strerror}") from None
    found = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not found:
        raise ValueError(f"--prompts: at least one prompt was expected, {str(path)!r} has none")
    return found


def merged_rows(report: Mapping[str, Any]) -> Iterator[tuple[str, str, str, list[dict[str, Any]]]]:
    """Layers of a report that differ in the number of their block only: (model, name, kind and format,
    rows)."""
    import re

    groups: dict[tuple[str, str, str, str], list[dict[str, Any]]] = {}
    for row in report["layers"]:
        name = re.sub(r"\.\d+\.", ".*.", row["layer"], count=1)
        bits = row["bits"] if row["bits"] == row["fewest_bits"] else f"{row['bits']}/{row['fewest_bits']}"
        groups.setdefault((row["model"], name, row["kind"], f"{row['format']}, {bits} bits"), []).append(row)
    for (model, name, kind, form), rows in groups.items():
        yield model, name, f"{kind}: {form}", rows
