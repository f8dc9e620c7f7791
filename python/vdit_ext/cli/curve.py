"""``vdit curve``: how close to dense a method stays as it keeps less of attention."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .console import Reporter, print_json, stderr, stdout
from .errors import Refusal, command, refusing
from .files import check_folder, staged_folder

if TYPE_CHECKING:
    from ..compare import Request, Run, Sampler

TOP_PS = "0.3,0.45,0.6,0.7,0.78,0.86,0.93,0.97"
KEEP_RATIOS = "0.1,0.15,0.2,0.25,0.35,0.5,0.7"


@dataclass(frozen=True)
class Point:
    """One setting of one method, averaged over prompts and seeds.

    Attributes:
        method, knob, value: the setting that was varied.
        density, density_sparse_layers, density_overall, psnr, ssim, seconds: means over the runs, as
            :class:`vdit_ext.compare.Run` has them. Clips identical to dense have no finite PSNR and are left
            out of its mean; it is inf where all were.
        psnr_low: the worst clip's.
        runs: how many clips.
    """

    method: str
    knob: str
    value: float
    density: float
    density_sparse_layers: float
    density_overall: float
    psnr: float
    psnr_low: float
    ssim: float
    seconds: float
    runs: int


@command
def curve(
    prompts: Annotated[
        list[str] | None, typer.Option("--prompt", help="Repeatable; figures are means over prompts and seeds.")
    ] = None,
    methods: Annotated[
        str, typer.Option("--methods", help="svg2, draft and svg1, separated by commas.")
    ] = "svg2,draft",
    out: Annotated[Path | None, typer.Option("--out", help="Folder for curve.json and curve.png.")] = None,
    seeds: Annotated[str, typer.Option("--seeds", help="Seeds separated by commas.")] = "0",
    top_ps: Annotated[
        str, typer.Option("--top-ps", help="svg2: values of top_p, separated by commas.")
    ] = TOP_PS,
    keep_ratios: Annotated[
        str, typer.Option("--keep-ratios", help="draft, svg1: shares to keep, separated by commas.")
    ] = KEEP_RATIOS,
    max_density: Annotated[
        float, typer.Option("--max-density", min=0.0, max=1.0, help="Density in the sparse steps, at most.")
    ] = 0.35,
    min_psnr: Annotated[float, typer.Option("--min-psnr", help="PSNR in dB to reach there.")] = 26.0,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
    settings: options.Setting = None,
    model: options.Model = None,
    size: options.Size = None,
    frames: options.Frames = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
) -> None:
    """Measure the whole curve of PSNR against kept share of attention, and say which target it meets.

    Runs every method at several settings on every prompt and seed. The density of a point is the kept share of
    attention in the sparse steps, layers that stay dense counted in. Ends with one line for each method: the
    best PSNR at a density of at most --max-density, and whether it reaches --min-psnr.
    """
    names = _check_methods(methods)
    values = {
        name: _numbers(
            "--top-ps" if name == "svg2" else "--keep-ratios", top_ps if name == "svg2" else keep_ratios
        )
        for name in names
    }
    if out is not None:
        check_folder(out)
    requests = [
        options.request_for(prompt, seed, steps, guidance, model, size, frames)
        for prompt in prompts or [options.EXAMPLE]
        for seed in _seeds(seeds)
    ]
    given = options.settings_for(names, None, None, settings)
    reporter = Reporter(quiet)
    uses = (*options.MEASURING, *(options.PLOTS if out is not None else ()))
    sampler = options.load_sampler(model, dtype, device, reporter, uses=uses)
    with refusing(ValueError, TypeError):
        requests = [sampler.resolve(request) for request in requests]
        chosen = [_variant(sampler, name, given[name], value) for name in names for value in values[name]]
    points = _measure(sampler, requests, chosen, reporter)
    targets = [target(points, name, max_density, min_psnr) for name in names]
    result = _result(points, targets, requests, sampler)
    if out is not None:
        _write(out, points, result, max_density, min_psnr)
    if as_json:
        print_json(result)
        return
    if not quiet:
        stdout().print(_table(points, sampler.name))
    for one in targets:
        print(sentence(one, sampler.name))
    if out is not None and not quiet:
        stderr().print(f"Written: {out / 'curve.png'} and curve.json.", soft_wrap=True)


def _check_methods(methods: str) -> list[str]:
    names = options.check_names(methods.split(","))
    if "dense" in names:
        raise Refusal("--methods: sparse methods were expected, got dense, which is always the reference")
    return list(dict.fromkeys(names))


def _numbers(option: str, text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise Refusal(f"{option}: numbers separated by commas were expected, got {text!r}") from None
    if any(not 0 < value <= 1 for value in values):
        raise Refusal(f"{option}: numbers above 0 and at most 1 were expected, got {text!r}")
    return values


def _seeds(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise Refusal(f"--seeds: whole numbers separated by commas were expected, got {text!r}")
    return [int(part) for part in parts]


@dataclass(frozen=True)
class _Variant:
    name: str
    knob: str
    value: float
    method: Any


def _variant(sampler: Sampler, name: str, given: dict[str, Any], value: float) -> _Variant:
    from ..compare import keep_settings

    settings = {"top_p": value} if name == "svg2" else keep_settings(name, value)
    for key in settings.keys() & given.keys():
        option = "--top-ps" if name == "svg2" else "--keep-ratios"
        raise Refusal(
            f"--set {name}.{key}: a setting that curve does not vary was expected; give {option} instead"
        )
    knob = "top_p" if name == "svg2" else "keep_ratio"
    return _Variant(name, knob, value, sampler.method(name, given | settings))


def _measure(
    sampler: Sampler, requests: Sequence[Request], variants: Sequence[_Variant], reporter: Reporter
) -> list[Point]:
    from ..compare import Unsupported, always_dense, check_methods, run_dense, run_sparse

    with refusing(ValueError, TypeError):
        check_methods(sampler, requests[0], (variant.method for variant in variants))
    for variant in variants:
        if always_dense(sampler, requests[0], variant.method):
            raise _all_dense(variant)
    results: dict[int, list[Run]] = {i: [] for i in range(len(variants))}
    with reporter.bars():
        sampler.warm_up(requests[0])
        total = len(requests) * (len(variants) + 1)
        tick = reporter.track("curve", total)
        done = 0
        for request in requests:
            dense = run_dense(sampler, request)
            tick(done := done + 1, total)
            for i, variant in enumerate(variants):
                with refusing(Unsupported):
                    run = run_sparse(sampler, request, variant.method)
                results[i].append(run.against(dense))
                tick(done := done + 1, total)
    return [_point(variant, results[i]) for i, variant in enumerate(variants)]


def _all_dense(variant: _Variant) -> Refusal:
    return Refusal(
        f"{variant.name}: at least one sparse step was expected, all are dense; raise --steps or lower "
        "--set dense_step_fraction"
    )


def _point(variant: _Variant, runs: Sequence[Run]) -> Point:
    if any(run.density is None for run in runs):  # as where the timesteps decide, which only sampling shows
        raise _all_dense(variant)
    finite = [run.quality.psnr for run in runs if not run.quality.identical]
    return Point(
        variant.name,
        variant.knob,
        variant.value,
        fmean(run.density for run in runs),
        fmean(run.density_sparse_layers for run in runs),
        fmean(run.density_overall for run in runs),
        fmean(finite) if finite else math.inf,
        min(run.quality.psnr for run in runs),
        fmean(run.quality.ssim for run in runs),
        fmean(run.seconds for run in runs),
        len(runs),
    )


def target(points: Sequence[Point], method: str, max_density: float, min_psnr: float) -> dict[str, Any]:
    """A method's best point at a density of at most ``max_density``, and whether it reaches ``min_psnr``."""
    inside = [p for p in points if p.method == method and p.density <= max_density]
    best = max(inside, key=lambda p: p.psnr, default=None)
    return {
        "method": method,
        "max_density": max_density,
        "min_psnr": min_psnr,
        "met": best is not None and best.psnr >= min_psnr,
        "best": None if best is None else _plain(best),
    }


def sentence(one: dict[str, Any], model: str) -> str:
    """A target as a line of text."""
    who = f"{one['method']} on the {model} model"
    goal = f"{one['min_psnr']:g} dB at a density of at most {one['max_density']:g}"
    best = one["best"]
    if best is None:
        return f"{who}: no point at a density of at most {one['max_density']:g}; sweep lower settings."
    reached = "identical to dense" if best["identical"] else f"{best['psnr']:.2f} dB"
    return (
        f"{who}: {reached} at density {best['density']:.3f} in sparse steps ({best['knob']} {best['value']:g}, "
        f"SSIM {best['ssim']:.4f}, mean of {best['runs']}); {goal}: {'met' if one['met'] else 'not met'}."
    )


def _plain(point: Point) -> dict[str, Any]:
    """A point for JSON: infinite PSNR is null, and ``identical`` tells."""
    values = dict(vars(point))
    identical = point.psnr == math.inf
    for key in ("psnr", "psnr_low"):
        values[key] = None if values[key] == math.inf else values[key]
    return values | {"identical": identical}


def _result(
    points: Sequence[Point], targets: list[dict[str, Any]], requests: Sequence[Request], sampler: Sampler
) -> dict[str, Any]:
    from .machine import machine, versions

    return {
        "model": sampler.name,
        "steps": requests[0].steps,
        "guidance": requests[0].guidance,
        "clips": [{"prompt": request.prompt, "seed": request.seed} for request in requests],
        "points": [_plain(point) for point in points],
        "targets": targets,
        "machine": machine(),
        "versions": versions(),
    }


def _table(points: Sequence[Point], model: str):
    from rich.table import Table

    from . import text

    result = Table(title=f"{model} model", title_justify="left")
    result.add_column("method")
    result.add_column("setting")
    for column in ("density, sparse steps", "density overall", "PSNR, dB", "worst", "SSIM", "seconds"):
        result.add_column(column, justify="right")
    for p in points:
        result.add_row(
            p.method,
            f"{p.knob} {p.value:g}",
            text.percent(p.density),
            text.percent(p.density_overall),
            f"{p.psnr:.2f}",
            f"{p.psnr_low:.2f}",
            f"{p.ssim:.4f}",
            f"{p.seconds:.2f}",
        )
    return result


def _write(
    out: Path, points: Sequence[Point], result: dict[str, Any], max_density: float, min_psnr: float
) -> None:
    figure = plot(points, result, max_density, min_psnr)
    with staged_folder(out) as folder:
        (folder / "curve.json").write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
        figure.savefig(folder / "curve.png", dpi=150)


def plot(points: Sequence[Point], result: dict[str, Any], max_density: float, min_psnr: float):
    """A matplotlib figure: PSNR over density, a line for each method, the target region shaded."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    shown = [p for p in points if p.psnr != math.inf]
    right = max([max_density, *(p.density for p in shown)]) + 0.04
    top = max([min_psnr, *(p.psnr for p in shown)]) + 2
    bottom = min([min_psnr, *(p.psnr for p in shown)]) - 2
    axes.fill_between([0, max_density], min_psnr, top, color="#e4f0e4", lw=0, zorder=0)
    label = f"at least {min_psnr:g} dB at density {max_density:g} or less"
    axes.text(0.008, top - 0.3, label, va="top", size=9, color="#47704a")
    colours = {"svg2": "#2f6fd0", "draft": "#d2691e", "svg1": "#6b7280"}
    for name in dict.fromkeys(p.method for p in shown):
        mine = sorted((p for p in shown if p.method == name), key=lambda p: p.density)
        x, y = [p.density for p in mine], [p.psnr for p in mine]
        axes.plot(x, y, "o-", color=colours.get(name), label=f"{name} ({mine[0].knob})", ms=5, lw=1.8)
        for p in mine:
            axes.annotate(
                f"{p.value:g}", (p.density, p.psnr), (0, 7), textcoords="offset points", ha="center", size=8
            )
    axes.set(xlim=(0, min(1.02, right)), ylim=(bottom, top))
    axes.set_xlabel("density: kept share of attention in the sparse steps, dense layers counted in")
    axes.set_ylabel("PSNR against dense, dB")
    clips = len(result["clips"])
    axes.set_title(
        f"{result['model']} model, {result['steps']} steps, mean of {clips} clip{'s' * (clips != 1)}",
        size=11,
        loc="left",
    )
    axes.grid(color="#e6e8ec", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    return figure
