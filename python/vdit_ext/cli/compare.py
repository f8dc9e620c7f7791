"""``vdit compare``: one prompt by several methods, as a table, a contact sheet and a report."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .console import Reporter, print_json, stderr, stdout
from .errors import Refusal, command, refusing
from .files import check_folder, check_own_folder, staged_folder

if TYPE_CHECKING:
    from ..compare import Request, Run, Sampler

DEFAULT_OUT = Path("vdit-compare")
REPORT, SHEET, RESULTS = "report.html", "sheet.png", "results.json"

Methods = Annotated[str, typer.Option("--methods", help="Names separated by commas; dense always runs, first.")]


@command
def compare(
    prompt: options.Prompt = options.EXAMPLE,
    methods: Methods = "dense,draft,svg1,svg2",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help=f"Folder for {REPORT}, {SHEET}, {RESULTS} and a clip each; {DEFAULT_OUT} here if left out, "
            "nothing with --json alone.",
            show_default=False,
        ),
    ] = None,
    seed: options.Seed = 0,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
    top_p: options.TopP = None,
    keep_ratio: options.KeepRatio = None,
    settings: options.Setting = None,
    quant: options.Quant = None,
    model: options.Model = None,
    size: options.Size = None,
    frames: options.Frames = None,
    fps: options.Fps = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
) -> None:
    """Compare methods on one prompt: density, PSNR and SSIM against dense, seconds.

    With --quant, dense attention and every method run again with quantized linears, and all are compared with
    dense attention in full precision. Prints a table and writes an HTML page, a contact sheet and the clips.
    Density is the kept share of attention in the sparse steps, layers that stay dense counted in.

    --json prints a list of objects with method, model, quant, density, density_sparse_layers (over the sparse
    layers of those steps only), density_overall (over all steps), psnr, ssim, identical, seconds, speedup and
    settings. psnr is null where identical is true, since JSON has no infinity. With --set, write
    svg2.top_p=0.8 to reach one method.
    """
    names = split_methods(methods)
    if out is not None:
        check_folder(out)
    elif not as_json:
        out = check_own_folder(DEFAULT_OUT, REPORT, RESULTS)
    request = options.request_for(prompt, seed, steps, guidance, model, size, frames)
    given = options.settings_for(names, top_p, keep_ratio, settings)
    label = options.check_quant(quant)
    reporter = Reporter(quiet)
    uses = (*options.MEASURING, *(options.CLIPS if out is not None else ()))
    sampler = options.load_sampler(model, dtype, device, reporter, fps=fps, uses=uses)
    with refusing(ValueError, TypeError):
        request = sampler.resolve(request)
        chosen = [sampler.method(name, given[name]) for name in names if name != "dense"]
    runs = sample_all(sampler, request, chosen, reporter, quant, label)
    if out is not None:
        _write(out, runs, request, sampler)
    if as_json:
        print_json([run.record(runs[0]) | {"model": sampler.name} for run in runs])
        return
    stdout().print(table(runs, sampler.name))
    if not quiet:
        stderr().print(f"Written: {out / REPORT}, {out / SHEET}, {RESULTS} and the clips.", soft_wrap=True)


def split_methods(methods: str) -> list[str]:
    """Names in the order given, dense first whether named or not; a Refusal for unknown or repeated ones."""
    names = options.check_names(methods.split(","))
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise Refusal(f"--methods: each name was expected once, got {', '.join(repeated)} more than once")
    return ["dense", *(name for name in names if name != "dense")]


def sample_all(
    sampler: Sampler,
    request: Request,
    methods: list[Any],
    reporter: Reporter,
    quant: str | None = None,
    label: str | None = None,
) -> list[Run]:
    """The dense run, then one for each method, measured against it, and these again with quantized linears."""
    from ..compare import Unsupported, check_methods, run_dense, run_name, run_sparse

    with refusing(ValueError, TypeError, FileNotFoundError):
        check_methods(sampler, request, methods, quant)
    plans = [(method, None, None) for method in methods]
    if quant is not None:
        plans += [(method, quant, label) for method in (None, *methods)]
    with reporter.bars():
        sampler.warm_up(request)
        dense = run_dense(sampler, request, reporter.track("dense", request.steps))
        runs = [dense]
        for method, chosen, name in plans:
            tell = reporter.track(run_name(method, name), request.steps)
            with refusing(Unsupported):
                run = run_sparse(sampler, request, method, tell, quant=chosen, label=name)
            runs.append(run.against(dense))
    return runs


def table(runs: list[Run], model: str):
    """The rich table of a comparison."""
    from rich.table import Table

    from . import text

    result = Table(title=f"{model} model", title_justify="left")
    result.add_column("method")
    for column in ("density, sparse steps", "density overall", "PSNR, dB", "SSIM", "seconds", "speedup"):
        result.add_column(column, justify="right")
    dense = runs[0]
    for run in runs:
        result.add_row(
            run.method,
            text.percent(run.density),
            text.percent(run.density_overall),
            text.psnr(run.quality),
            text.ssim(run.quality),
            f"{run.seconds:.2f}",
            f"{dense.seconds / run.seconds:.2f}x",
        )
    return result


def _write(out: Path, runs: list[Run], request: Request, sampler: Sampler) -> None:
    from ..video import write_video
    from .machine import machine, versions
    from .report import html_report
    from .sheets import many_sheet

    about = {
        "prompt": request.prompt,
        "model": sampler.name,
        "seed": request.seed,
        "steps": request.steps,
        "guidance": request.guidance,
        "machine": machine(),
        "versions": versions(),
    }
    with staged_folder(out) as folder:
        for run in runs:
            write_video(folder / f"{run.method}.mp4", run.clip, sampler.fps)
        many_sheet(runs, request, sampler).save(folder / SHEET)
        results = about | {"results": [run.record(runs[0]) for run in runs]}
        (folder / RESULTS).write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
        clips = {run.method: (folder / f"{run.method}.mp4").read_bytes() for run in runs}
        plain = io.BytesIO()
        many_sheet(runs, request, sampler, titled=False).save(plain, "PNG")
        page = html_report(runs, about, clips, plain.getvalue())
        (folder / REPORT).write_text(page, encoding="utf-8")
