"""Options that several commands share, and how their values become a sampler and methods."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._extras import package_of
from .console import Reporter
from .errors import Refusal, refusing

if TYPE_CHECKING:
    from ..compare import Request, Sampler

EXAMPLE = "a red disc bounces over blue stripes"
# What `vdit_ext.sparse.METHODS` holds; written out so that a misspelt name is refused before torch is loaded.
METHOD_NAMES = ("dense", "svg2", "svg1", "draft")
# What `vdit_ext.quant.methods.METHODS` holds, for the same reason.
QUANT_METHODS = ("vidit_q", "lrq_dit", "vq4dit", "kmeans_vq", "smoothquant", "rtn")
DTYPES = ("float32", "float16", "bfloat16")

Prompt = Annotated[str, typer.Option("--prompt", help=f'What to show, for the toy model as in "{EXAMPLE}".')]
Seed = Annotated[
    int, typer.Option("--seed", min=0, help="Seed of the starting noise; the same for all methods.")
]
Steps = Annotated[
    int | None, typer.Option("--steps", min=1, help="Denoising steps; the pipeline's default if left out.")
]
Guidance = Annotated[
    float | None, typer.Option("--guidance", min=0.0, help="Classifier-free guidance scale; 1 turns it off.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress and no notes.")]
Json = Annotated[bool, typer.Option("--json", help="Results as JSON on stdout, and nothing else there.")]

_MODEL = "Another model"
Model = Annotated[
    Path | None,
    typer.Option(
        "--model", help="Folder of a diffusers Wan pipeline, instead of the toy model.", rich_help_panel=_MODEL
    ),
]
Size = Annotated[
    str | None, typer.Option("--size", help="Width and height, as in 832x480.", rich_help_panel=_MODEL)
]
Frames = Annotated[
    int | None, typer.Option("--frames", min=1, help="Number of frames.", rich_help_panel=_MODEL)
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype", help="float32, float16 or bfloat16; by default bfloat16 on a GPU.", rich_help_panel=_MODEL
    ),
]
Fps = Annotated[
    float | None,
    typer.Option(
        "--fps",
        min=1,
        max=240,
        help="Frames a second of the written clips; by default 8 for the toy model and 16 for a folder, as Wan "
        "2.1 has. Give 24 for Wan 2.2 5B.",
        rich_help_panel=_MODEL,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device", help="cpu, cuda, cuda:1; by default a GPU where there is one.", rich_help_panel=_MODEL
    ),
]

_METHOD = "Method settings"
Quant = Annotated[
    str | None,
    typer.Option(
        "--quant",
        help="Quantized linears: a folder that `vdit quantize` wrote, or rtn.",
        rich_help_panel=_METHOD,
    ),
]
TopP = Annotated[
    float | None,
    typer.Option("--top-p", help="svg2: attention mass to keep in each row, 0 to 1.", rich_help_panel=_METHOD),
]
KeepRatio = Annotated[
    float | None,
    typer.Option(
        "--keep-ratio",
        "--density",
        help="draft, svg1: share of attention to keep, 0 to 1.",
        rich_help_panel=_METHOD,
    ),
]
Setting = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Any setting of the method, as in dense_step_fraction=0.2; repeatable.",
        rich_help_panel=_METHOD,
    ),
]


def check_names(names: Iterable[str]) -> list[str]:
    """Method names, or a Refusal that lists those there are."""
    names = [name.strip() for name in names]
    for name in names:
        if name not in METHOD_NAMES:
            raise Refusal(f"method: one of {', '.join(METHOD_NAMES)} was expected, got {name!r}")
    return names


def check_quant_method(name: str) -> str:
    """The name of a quantization method, or a Refusal that lists those there are."""
    if name not in QUANT_METHODS:
        raise Refusal(f"--method: one of {', '.join(QUANT_METHODS)} was expected, got {name!r}")
    return name


def check_quant(quant: str | None) -> str | None:
    """What to call quantized linears, None without any; a Refusal for what is no folder of them nor a
    method."""
    if quant is None:
        return None
    if quant not in QUANT_METHODS and not Path(quant).is_dir():
        raise Refusal(f"--quant: a folder that `vdit quantize` wrote, or rtn, was expected, got {quant!r}")
    check_packages(*SAMPLING)
    from ..compare import quant_label

    with refusing(ValueError, FileNotFoundError):
        return quant_label(quant)


def settings_for(
    names: Sequence[str], top_p: float | None, keep_ratio: float | None, assignments: list[str] | None
) -> dict[str, dict[str, Any]]:
    """The settings that a command line gives to each of the chosen methods.

    ``--top-p`` and ``--keep-ratio`` reach only the methods that have them, so that several can be compared at
    once. ``name.key=value`` reaches the method of that name, ``key=value`` every sparse one. What would reach
    none of the chosen methods is a Refusal, not ignored.
    """
    from ..compare import keep_settings

    settings: dict[str, dict[str, Any]] = {name: {} for name in names}
    if top_p is not None:
        _give(settings, "--top-p", {"svg2": {"top_p": top_p}})
    if keep_ratio is not None:
        kept = {name: keep_settings(name, keep_ratio) for name in METHOD_NAMES}
        _give(settings, "--keep-ratio (--density)", {name: given for name, given in kept.items() if given})
    for assignment in assignments or ():
        key, equals, value = assignment.partition("=")
        if not equals or not key or not value:
            raise Refusal(f"--set: name=value was expected, as in top_p=0.9, got {assignment!r}")
        target, dot, rest = key.partition(".")
        if dot and target not in METHOD_NAMES:
            raise Refusal(
                f"--set: one of {', '.join(METHOD_NAMES)} was expected before the dot, got {target!r}"
            )
        takers = [name for name in names if name != "dense" and (not dot or name == target)]
        if not takers:
            raise Refusal(_reaches_none(names, target if dot else None, assignment))
        for name in takers:
            settings[name][rest if dot else key] = value
    return settings


def _give(settings: dict[str, dict[str, Any]], option: str, offered: dict[str, dict[str, Any]]) -> None:
    """Hand an option to the chosen methods that have it; a Refusal when none has."""
    if not settings.keys() & offered.keys():
        raise Refusal(
            f"{option}: a method that has it was expected ({', '.join(offered)}), got {', '.join(settings)}; "
            "choose another method or leave the option out"
        )
    for name in settings.keys() & offered.keys():
        settings[name] |= offered[name]


def _reaches_none(names: Sequence[str], target: str | None, assignment: str) -> str:
    if target in (None, "dense"):
        return f"--set: a setting of a sparse method was expected, dense has none, got {assignment!r}"
    return f"--set: a chosen method was expected before the dot ({', '.join(names)}), got {assignment!r}"


def request_for(
    prompt: str,
    seed: int,
    steps: int | None,
    guidance: float | None,
    model: Path | None,
    size: str | None = None,
    frames: int | None = None,
) -> Request:
    """A checked request; whatever can be refused without loading a model is refused here."""
    from ..compare import Request, check_toy_request

    width, height = _size(size)
    request = Request(prompt, seed, steps, guidance, height, width, frames)
    if model is None:
        with refusing():
            check_toy_request(request)
    elif not model.is_dir():
        raise Refusal(
            f"--model: the folder of a diffusers pipeline was expected, there is none at {str(model)!r}"
        )
    return request


def _size(size: str | None) -> tuple[int | None, int | None]:
    if size is None:
        return None, None
    width, _, height = size.lower().partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise Refusal(f"--size: width and height were expected, as in 832x480, got {size!r}")
    return int(width), int(height)


# Modules of the `video` extra by what they are for.
SAMPLING, FOLDERS = ("diffusers", "transformers"), ("accelerate",)
MEASURING, CLIPS, PLOTS = ("torchmetrics.functional.image",), ("av", "PIL.Image"), ("matplotlib.figure",)


def check_packages(*modules: str) -> None:
    """A Refusal that names what to install, unless all of these can be imported; before any clip is sampled."""
    missing = []
    for name in dict.fromkeys(modules):
        root = name.partition(".")[0]
        try:
            import_module(root)
        except ModuleNotFoundError as error:
            if error.name != root:
                raise
            missing.append(package_of(root))
        else:
            import_module(name)
    if missing:
        raise Refusal(
            f"expected these packages to be installed, they are not: {', '.join(missing)}; run "
            "`pip install 'vdit-ext[video]'`"
        )


def load_sampler(
    model: Path | None,
    dtype: str | None,
    device: str | None,
    reporter: Reporter,
    *,
    fps: float | None = None,
    uses: Iterable[str] = (),
) -> Sampler:
    """The toy pipeline, or the one in a folder; a Refusal when it cannot be loaded or used.

    Args:
        fps: frames a second of its clips, where they are not the model's default.
        uses: modules of the ``video`` extra that the command needs beside those that sample.
    """
    if model is None and (dtype is not None or device is not None):
        raise Refusal("--dtype and --device go with --model; the toy model runs in float32 on the CPU")
    if dtype is not None and dtype not in DTYPES:
        raise Refusal(f"--dtype: one of {', '.join(DTYPES)} was expected, got {dtype!r}")
    with reporter.waiting("loading the model"):
        check_packages(*SAMPLING, *(FOLDERS if model is not None else ()), *uses)
        hush_libraries()
        sampler = _load_toy() if model is None else _load_folder(model, dtype, device)
    if fps is not None:
        sampler.fps = fps
    return sampler


def _load_toy() -> Sampler:
    from ..compare import ToySampler

    with refusing():
        return ToySampler.load()


def _load_folder(model: Path, dtype: str | None, device: str | None) -> Sampler:
    import torch

    from ..compare import FolderSampler

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    dtype = dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    # diffusers asks for further packages by ImportError, as for a tokenizer's.
    with refusing(ValueError, OSError, ImportError):
        return FolderSampler.load(model, dtype=dtype, device=device)


def hush_libraries() -> None:
    """Loading advice and bars of diffusers and transformers are for programmers; stderr is the user's."""
    for library in ("diffusers", "transformers"):
        logging = import_module(f"{library}.utils.logging")
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def check_device(device: str) -> None:
    """A Refusal for a device that is neither here nor one of ours."""
    import torch

    try:
        kind, index = torch.device(device).type, torch.device(device).index
    except RuntimeError:
        kind, index = "unknown", None
    if kind not in ("cpu", "cuda"):
        raise Refusal(f"--device: cpu, cuda or cuda:N was expected, got {device!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise Refusal(f"--device: {device} was asked for, torch sees no CUDA device; `vdit doctor` says why")
    if kind == "cuda" and (index or 0) >= (count := torch.cuda.device_count()):
        there = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise Refusal(f"--device: one of the CUDA devices here was expected ({there}), got {device!r}")
