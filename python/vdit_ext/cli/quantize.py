"""``vdit quantize``: a model to a folder of quantized layers, with a report, and taken up again when
interrupted."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .console import Reporter, print_json, stderr, stdout
from .errors import INTERRUPTED, Refusal, command, refusing, say
from .files import check_folder

if TYPE_CHECKING:
    from ..quantizing import Job, Source

_CALIBRATION = "Calibration"
_MIXED = "Mixed precision"


@command
def quantize(
    model: Annotated[
        str, typer.Argument(help='"toy", or a folder of a diffusers pipeline or of its transformer alone.')
    ],
    method: Annotated[
        str, typer.Option("--method", help=f"One of {', '.join(options.QUANT_METHODS)}.")
    ] = "vidit_q",
    bits: Annotated[
        str | None,
        typer.Option(
            "--bits", help="Of weights and activations, as in w4a8; the method's first choice if left out."
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", help="Folder for the layers; several transformers get a folder each in it.")
    ] = Path("vdit-quantized"),
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            help="Text file with one prompt a line to calibrate with.",
            rich_help_panel=_CALIBRATION,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps", min=1, help="Denoising steps of the calibration.", rich_help_panel=_CALIBRATION
        ),
    ] = None,
    guidance: options.Guidance = None,
    rows: Annotated[
        int,
        typer.Option("--rows", min=1, help="Rows kept of each layer's input.", rich_help_panel=_CALIBRATION),
    ] = 512,
    kept: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            help="Folder to keep the calibration in, and to take it from for other bits and methods.",
            rich_help_panel=_CALIBRATION,
        ),
    ] = None,
    average_bits: Annotated[
        float | None,
        typer.Option(
            "--average-bits",
            help="For vidit_q with w4a8-mp: measure which parts need 8 bits in which quarter of the steps, and "
            "spend this many a weight, 4 to 8. Samples a clip for each kind of layer, block and quarter.",
            rich_help_panel=_MIXED,
        ),
    ] = None,
    whole: Annotated[
        bool,
        typer.Option(
            "--measure-whole",
            help="Measure over all steps at once: about a quarter of the clips.",
            rich_help_panel=_MIXED,
        ),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run; a finished one is only reported.")
    ] = False,
    seed: options.Seed = 0,
    layers: Annotated[
        list[str] | None,
        typer.Option(
            "--layers",
            help="Regular expression for whole names of linears, in place of the model's own list; repeatable.",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of the method, as in alpha=0.5; repeatable.")
    ] = None,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
    size: options.Size = None,
    frames: options.Frames = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
) -> None:
    """Quantize the linears of a model and write them into a folder.

    The folder is for `vdit generate --quant` and `accelerate(..., quant=FOLDER)`. Where the model is one of
    diffusers' own it holds the whole transformer, and `from_pretrained(FOLDER)` loads it quantized. Layers are
    finished block by block; what is finished when the run is interrupted stays in OUT/.partial for --resume.

    Prints, for layers that are alike in all blocks, the mean and the least signal-to-noise ratio in dB of their
    weights, and of their outputs on inputs of the calibration, their size, and at the end size and seconds.
    --json prints all layers: model, layer, kind, format, bits, bytes, weight_snr, output_snr.
    """
    job = _job(model, method, bits, seed, layers, settings, prompts, rows, (steps, guidance, size, frames))
    job = _with_extras(job, average_bits, whole, kept)
    check_folder(out)
    if model == "toy" and (dtype is not None or device is not None):
        raise Refusal("--dtype and --device go with a folder; the toy model runs in float32 on the CPU")
    reporter = Reporter(quiet)
    source = _source(model, job, dtype, device, reporter)
    report = _run(out, source, job, resume, reporter)
    record = {key: value for key, value in report.items() if key != "facts"} | {"out": str(out)}
    if as_json:
        print_json(record)
        return
    stdout().print(table(record))
    print(_summary(record))
    if not quiet:
        stderr().print(f"Written: {out}", soft_wrap=True)


def _job(
    model: str,
    method: str,
    bits: str | None,
    seed: int,
    layers: list[str] | None,
    settings: list[str] | None,
    prompts: Path | None,
    rows: int,
    sampling: tuple[int | None, float | None, str | None, int | None],
) -> Job:
    """A checked job; whatever can be refused without loading a model is refused here."""
    options.check_quant_method(method)
    options.check_packages(*options.SAMPLING)
    from ..quant.methods import entry_of
    from ..quantizing import TOY_PROMPTS, Job, read_prompts, settings_from

    folder = None if model == "toy" else Path(model)
    if folder is not None and not folder.is_dir():
        raise Refusal(f'MODEL must be "toy" or a folder of a pipeline or a transformer, got {model!r}')
    with refusing():
        entry = entry_of(method, bits)
        given = settings_from(method, settings or [])
        said = read_prompts(prompts) if prompts is not None else TOY_PROMPTS if model == "toy" else ()
    if not entry.calibrated:
        _refuse_sampling(method, prompts, sampling)
        said = ()
    elif not said:
        raise Refusal(f"--prompts: a file of prompts was expected for {method}, which calibrates, got none")
    steps, guidance, size, frames = sampling
    requests = [options.request_for(p, seed, steps, guidance, folder, size, frames) for p in said]
    sizes = {f: getattr(requests[0], f) for f in ("height", "width", "frames")} if requests else {}
    chosen = tuple(layers) if layers else None
    return Job(method, bits or entry.bits[0], seed, given, chosen, said, steps, guidance, **sizes, rows=rows)


def _with_extras(job: Job, average_bits: float | None, whole: bool, kept: Path | None) -> Job:
    """The job with a measured bit map and a kept calibration, checked."""
    from ..quantizing import check_mixed

    if kept is not None:
        if not job.calibrated:
            raise Refusal(
                f"--calibration: a method that calibrates was expected, {job.method} does not; leave it out"
            )
        check_folder(kept)
    job = dataclasses.replace(job, average_bits=average_bits, by_interval=not whole, calibration=kept)
    with refusing():
        check_mixed(job)
    return job


def _refuse_sampling(method: str, prompts: Path | None, sampling: tuple[Any, ...]) -> None:
    """A Refusal for options of a calibration that there will not be."""
    names = ("--prompts", "--steps", "--guidance", "--size", "--frames")
    for name, value in zip(names, (prompts, *sampling), strict=True):
        if value is not None:
            raise Refusal(f"{name}: a method that calibrates was expected, {method} does not; leave it out")


def _source(model: str, job: Job, dtype: str | None, device: str | None, reporter: Reporter) -> Source:
    import torch

    from ..quantizing import load_source

    if dtype is not None and dtype not in options.DTYPES:
        raise Refusal(f"--dtype: one of {', '.join(options.DTYPES)} was expected, got {dtype!r}")
    if model != "toy":
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        options.check_device(device)
        options.check_packages(*options.FOLDERS)
        dtype = dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    options.hush_libraries()
    with reporter.waiting("loading the model"), refusing(ValueError, OSError, ImportError):
        return load_source(model, job, dtype=dtype or "float32", device=device or "cpu")


def _run(out: Path, source: Source, job: Job, resume: bool, reporter: Reporter) -> dict[str, Any]:
    from ..quantizing import quantize_to

    def stage(name: str, total: int) -> Callable[[int, int], None]:
        return reporter.track(name, total)

    try:
        with reporter.bars(), refusing(ValueError, TypeError, KeyError, OSError):
            return quantize_to(out, source, job, resume=resume, stage=stage)
    except KeyboardInterrupt:
        say("interrupted; what is finished is kept, the same command with --resume goes on")
        raise typer.Exit(INTERRUPTED) from None


def table(record: dict[str, Any]):
    """The rich table of a report: one row for layers that are alike in all blocks."""
    from rich.table import Table

    from ..quantizing import merged_rows

    several = len({row["model"] for row in record["layers"]}) > 1
    result = Table(title=f"{record['method']} {record['bits']}, {record['model']} model", title_justify="left")
    result.add_column("linear")
    result.add_column("weights")
    for column in ("layers", "weight SNR, dB", "least", "output SNR, dB", "least", "MiB"):
        result.add_column(column, justify="right")
    for model, name, what, rows in merged_rows(record):
        figures = [*_mean_and_least(rows, "weight_snr"), *_mean_and_least(rows, "output_snr")]
        size = f"{sum(row['bytes'] for row in rows) / 2**20:.2f}"
        result.add_row(f"{model}.{name}" if several else name, what, str(len(rows)), *figures, size)
    return result


def _mean_and_least(rows: list[dict[str, Any]], key: str) -> tuple[str, str]:
    values = [row[key] for row in rows if row[key] is not None]
    if not values:
        return "-", "-"
    return f"{statistics.fmean(values):.1f}", f"{min(values):.1f}"


def _summary(record: dict[str, Any]) -> str:
    from .text import seconds

    own, full = record["bytes"] / 2**20, record["bytes_bf16"] / 2**20
    kept = sum(len(names) for names in record["kept"].values())
    bits = [value for value in record["average_weight_bits"].values() if record["bits"].endswith("-mp")]
    average = f" ({statistics.fmean(bits):.2f} bits a weight)" if bits else ""
    return (
        f"{record['method']} {record['bits']}{average} on the {record['model']} model: "
        f"{len(record['layers'])} linears "
        f"in {own:.2f} MiB, {full / own:.2f} times less than in bfloat16; {kept} linears in high precision; "
        f"{seconds(record['seconds'])}"
    )
