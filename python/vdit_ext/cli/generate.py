"""``vdit generate``: one clip by one method, beside the dense clip of the same seed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .console import Reporter, print_json
from .errors import command, refusing
from .files import check_file, staged_files

if TYPE_CHECKING:
    from ..compare import Request, Run, Sampler


@command
def generate(
    prompt: options.Prompt,
    out: Annotated[
        Path, typer.Option("--out", help="The clip, ending in .mp4; a contact sheet .png goes beside it.")
    ],
    method: Annotated[str, typer.Option("--method", help="svg2, draft, svg1 or dense.")] = "svg2",
    seed: options.Seed = 0,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    no_compare: Annotated[
        bool, typer.Option("--no-compare", help="Leave out the dense run, and with it PSNR, SSIM and its row.")
    ] = False,
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
    """Make a clip from a prompt with sparse attention, and with quantized linears where --quant names some.

    Samples the dense clip in full precision first and the other one after it from the same noise, writes the
    other clip and a contact sheet of both and their difference, and ends with one line: density (kept share of
    attention), PSNR and SSIM against dense, seconds of both. Sampling again with the same options gives the
    same frames.
    """
    (name,) = options.check_names([method])
    sheet = out.with_suffix(".png")
    check_file(out, ".mp4", sheet)
    request = options.request_for(prompt, seed, steps, guidance, model, size, frames)
    given = options.settings_for([name], top_p, keep_ratio, settings)[name]
    label = options.check_quant(quant)
    reporter = Reporter(quiet)
    plain = name == "dense" and quant is None
    measured = options.MEASURING if not plain and not no_compare else ()
    uses = (*options.CLIPS, *measured)
    sampler = options.load_sampler(model, dtype, device, reporter, fps=fps, uses=uses)
    with refusing(ValueError, TypeError):
        request = sampler.resolve(request)
        chosen = None if name == "dense" else sampler.method(name, given)
    run, dense = _sample(sampler, request, chosen, not no_compare, reporter, quant, label)
    _write(out, sheet, run, dense, sampler, request)
    if as_json:
        print_json(_record(run, dense, sampler, request) | {"out": str(out), "sheet": str(sheet)})
        return
    from .text import figures

    print(figures(run, dense, sampler.name))


def _sample(
    sampler: Sampler,
    request: Request,
    method: Any,
    compare: bool,
    reporter: Reporter,
    quant: str | None,
    label: str | None,
) -> tuple[Run, Run | None]:
    """The run that was asked for and the dense one, the same for the method "dense" in full precision."""
    from ..compare import Unsupported, check_methods, run_dense, run_name, run_sparse

    plain = method is None and quant is None
    with refusing(ValueError, TypeError, FileNotFoundError):
        check_methods(sampler, request, [] if method is None else [method], quant)
    with reporter.bars():
        sampler.warm_up(request)
        dense = None
        if plain or compare:
            dense = run_dense(sampler, request, reporter.track("dense", request.steps))
        if plain:
            return dense, dense
        tell = reporter.track(run_name(method, label), request.steps)
        with refusing(Unsupported):
            run = run_sparse(sampler, request, method, tell, quant=quant, label=label)
    return (run if dense is None else run.against(dense)), dense


def _write(out: Path, sheet: Path, run: Run, dense: Run | None, sampler: Sampler, request: Request) -> None:
    from ..video import write_video
    from .sheets import pair_sheet

    picture = pair_sheet(run, dense, request, sampler)
    with staged_files(out, sheet) as (clip_path, sheet_path):
        write_video(clip_path, run.clip, sampler.fps)
        picture.save(sheet_path)


def _record(run: Run, dense: Run | None, sampler: Sampler, request: Request) -> dict[str, Any]:
    from .machine import machine, versions

    return run.record(dense) | {
        "prompt": request.prompt,
        "seed": request.seed,
        "steps": request.steps,
        "guidance": request.guidance,
        "model": sampler.name,
        "frames": len(run.clip),
        "height": run.clip.shape[1],
        "width": run.clip.shape[2],
        "fps": sampler.fps,
        "machine": machine(),
        "versions": versions(),
    }
