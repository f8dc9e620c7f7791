"""Contact sheets of runs."""

from __future__ import annotations

from collections.abc import Sequence

from ..compare import Request, Run, Sampler
from ..video import contact_sheet, difference
from . import text


def describe(request: Request, sampler: Sampler) -> str:
    """Settings of the sampling in one line."""
    return (
        f"{sampler.name} model, seed {request.seed}, {request.steps} steps, guidance {request.guidance:g}, "
        f"{sampler.fps:g} frames a second"
    )


def pair_sheet(run: Run, dense: Run | None, request: Request, sampler: Sampler):
    """Dense above, sparse below, their difference underneath; a single row where there is one run only."""
    if dense is None or run is dense:
        rows = [(_label(run), run.clip)]
    else:
        rows = [("dense", dense.clip), (_label(run), run.clip), _difference_row(run, dense)]
    return contact_sheet(rows, title=request.prompt, subtitle=describe(request, sampler), fps=sampler.fps)


def many_sheet(runs: Sequence[Run], request: Request, sampler: Sampler, *, titled: bool = True):
    """The dense run, then each sparse run with its difference; prompt and settings above if titled."""
    dense, *others = runs
    rows = [("dense", dense.clip)]
    for run in others:
        rows += [(_label(run), run.clip), _difference_row(run, dense)]
    head = {"title": request.prompt, "subtitle": describe(request, sampler)} if titled else {}
    return contact_sheet(rows, fps=sampler.fps, tile=144, **head)


def _label(run: Run) -> str:
    if run.method == "dense":
        return "dense"
    kept = "all steps dense" if run.density is None else f"{text.percent(run.density)} kept"
    return f"{run.method}\n{kept}" + (f"\n{text.psnr(run.quality)} dB" if run.quality else "")


def _difference_row(run: Run, dense: Run):
    gap, gain = difference(run.clip, dense.clip)
    if run.quality is not None and run.quality.identical:
        return ("difference\nnone", gap)
    return (f"difference\namplified {gain}x" if gain > 1 else "difference\nnot amplified", gap)
